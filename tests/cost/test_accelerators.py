"""Rooflines and disaggregation against the report's numbers and against sums by hand."""

import json

import pytest

from hf_moe.inspect import cost
from hf_moe.inspect.accelerators import (
    DEFAULT,
    Accelerator,
    active_share,
    batch_for_compute,
    disaggregate,
    distinct_experts,
    load_accelerators,
    min_active_share,
    network_bytes,
    roofline,
    usd_per_million_tokens,
)
from hf_moe.inspect.architecture import read_architecture
from hf_moe.inspect.sources import read_source

DEVICES = load_accelerators()
ROUND = Accelerator("round", "Round numbers", 1e12, 1e12, {"bf16": 1e14, "fp8": 2e14}, 1e11, 3.6)


def architecture(name: str):
    return read_architecture(read_source(name).config, name)


@pytest.mark.parametrize(
    "name, ratio, usd", [("h800", 591, 2), ("h20", 74, 0.8), ("a800", 156, 0.75), ("910b", 175, 0.67)]
)
def test_cards_of_the_report(name, ratio, usd):
    device = DEVICES[name]
    assert round(device.ratio("fp8")) == ratio and device.usd_per_hour == usd


@pytest.mark.parametrize("name, share", [("h800", 0.058), ("h20", 0.0073), ("a800", 0.031), ("910b", 0.034)])
def test_least_active_share_of_the_report(name, share):
    value = min_active_share(architecture("step3"), DEVICES[name], "fp8")
    assert float(f"{value:.2g}") == share
    # H ratio L / (network x 11.1 ms)
    by_hand = 7168 * DEVICES[name].ratio("fp8") * 61 / (8 * DEVICES[name].network * 0.05 / 3 * 2 / 3)
    assert value == pytest.approx(by_hand, rel=1e-12)


def test_batches_of_the_report():
    step3 = architecture("step3")
    assert active_share(step3) == pytest.approx((3 + 1) / (48 + 1))
    assert active_share(architecture("deepseek-v3")) == pytest.approx((8 + 1) / (256 + 1))
    batch = batch_for_compute(step3, DEVICES["h800"], "fp8")
    assert batch["dense"] == pytest.approx(591.04 / 2, rel=1e-4)
    assert batch["moe"] == pytest.approx(591.04 / 2 * 49 / 4, rel=1e-4)
    assert active_share(architecture("qwen3-32b")) == 1


def test_network_of_the_report():
    assert network_bytes(architecture("step3")) == {
        "to_experts": 7168,
        "from_experts": 14336,
        "layer": 21504,
        "token": 1_311_744,
    }


@pytest.mark.parametrize("name, usd", [("deepseek-v3", 0.068), ("step3", 0.0632)])
def test_price_by_hand(name, usd):
    """8K context on H800, and the sum of the formula."""
    a, device = architecture(name), DEVICES["h800"]
    value = usd_per_million_tokens(a, device, 8192, "fp8", "fp8")
    assert value == pytest.approx(usd, abs=0.0005)
    attention = max(cost.attention_flops(a, 8192) / 1.98e15, cost.kv_cache_bytes(a, 8192, 1, "fp8") / 3.35e12)
    seconds = attention + (cost.linear_flops(a) + cost.ffn_flops(a)) / 1.98e15
    assert value == pytest.approx(1e6 * seconds * 2 / 3600, rel=1e-12)
    assert usd_per_million_tokens(a, DEVICES["h100"], 8192, "fp8", "fp8") is None
    apart = usd_per_million_tokens(a, DEVICES["h20"], 8192, "fp8", "fp8", device)
    here = max(cost.attention_flops(a, 8192) / 2.96e14, cost.kv_cache_bytes(a, 8192, 1, "fp8") / 4e12)
    here += cost.linear_flops(a) / 2.96e14
    assert apart == pytest.approx(1e6 * (here * 0.8 + cost.ffn_flops(a) / 1.98e15 * 2) / 3600, rel=1e-12)


def test_distinct_experts():
    a = architecture("deepseek-v3")
    assert distinct_experts(a, 1) == pytest.approx(8) and distinct_experts(a, 10**6) == pytest.approx(256)
    assert distinct_experts(a, 2) == pytest.approx(256 * (1 - (248 / 256) ** 2))
    assert distinct_experts(architecture("qwen3-32b"), 5) == 0


@pytest.mark.parametrize("batch", [1, 200])
def test_roofline_by_hand(batch):
    """Qwen3-32B in bfloat16 on one device with round numbers."""
    a = architecture("qwen3-32b")
    row = roofline(a, ROUND, 4096, batch, "bf16", "bf16")
    cache = 4096 * 64 * 2 * 8 * 128 * 2
    attention, linear, ffn = 4 * 4096 * 64 * 64 * 128, 64 * (5120 * 8192 * 2 + 2 * 5120 * 1024), 64 * 3 * 5120 * 25600
    head = 151936 * 5120
    core = max(batch * attention / 1e14, batch * cache / 1e12)
    projections = max(batch * 2 * (linear + head) / 1e14, 2 * (linear + head) / 1e12)
    step = core + projections + max(batch * 2 * ffn / 1e14, 2 * ffn / 1e12)
    assert row["fits_on_one"] and row["min_devices"] == 1
    assert row["step_seconds"] == pytest.approx(step, rel=1e-9)
    assert row["tokens_per_second"] == pytest.approx(batch / step, rel=1e-9)
    assert row["ffn_bound"] == ("memory" if batch == 1 else "compute") and row["attention_bound"] == "memory"
    weights = cost.total_params(cost.parameters(a)) * 2
    assert row["max_batch"] == int((0.9e12 - weights) / cache)


def test_devices_that_hold_a_model():
    a = architecture("deepseek-v3")
    weights = sum(cost.weight_bytes(a, "fp8")[side] for side in ("attention", "ffn"))
    assert weights == pytest.approx(cost.checkpoint_bytes(a, "fp8") - 17e9, rel=0.01)  # without MTP and its copies
    for batch in (1, 1000):
        row = roofline(a, DEVICES["h200"], 32768, batch, "bf16", "fp8")
        needed = weights + batch * cost.kv_cache_bytes(a, 32768, 1, "bf16")
        assert (row["min_devices"] - 1) * 0.9 * 141e9 < needed <= row["min_devices"] * 0.9 * 141e9
        assert row["max_batch"] >= batch
    assert not row["fits_on_one"]


def test_precision_sets_rate_and_bytes():
    a = architecture("kimi-k2")
    sizes = [roofline(a, DEVICES["h200"], 1024, 1, "bf16", precision)["min_devices"] for precision in cost.PRECISIONS]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[1] > sizes[2] > sizes[3]
    assert ROUND.rate("fp8") == 2 * ROUND.rate("bf16") == 2 * ROUND.rate("int4") == 2 * ROUND.rate("fp32")
    assert DEVICES["a800"].rate("fp8") == DEVICES["a800"].rate("bf16")


def test_disaggregation():
    a = architecture("step3")
    row = disaggregate(a, DEVICES["h20"], DEVICES["h800"], 4096, 6144, "fp8", "fp8")
    assert row["meets_tpot"] and row["token_seconds"] <= 0.05
    assert row["token_seconds"] == pytest.approx(3 * max(row["stage_seconds"].values()))
    assert row["stage_seconds"]["network"] == pytest.approx(
        2048 * 1_311_744 / min(row["attention_devices"] * 5e10, row["ffn_devices"] * 5e10)
    )
    assert row["tokens_per_second"] == pytest.approx(6144 / row["token_seconds"])
    # 300 GB of expert weights in FP8 do not fit fewer than five devices of 80 GB.
    assert row["ffn_devices"] >= 5 and row["slowest_stage"] in ("attention", "ffn")
    hurried = disaggregate(a, DEVICES["h20"], DEVICES["h800"], 4096, 6144, "fp8", "fp8", tpot=0.02)
    assert hurried["attention_devices"] > row["attention_devices"]
    slow = Accelerator("slow", "Slow wire", 1e12, 1e12, {"bf16": 1e15}, 1e6)
    assert not disaggregate(a, slow, slow, 4096, 6144, "fp8", "fp8")["meets_tpot"]


def test_stage_and_throughput_of_the_report():
    """A third of 50 ms per stage, 272 us of it per layer, and 4,039 tokens/s per device from 6,144 sequences on 32."""
    assert 0.05 / 3 / 61 == pytest.approx(272e-6, rel=5e-3)
    assert 6144 / (32 * 4039) == pytest.approx(0.0475, rel=2e-3)


# --- data -------------------------------------------------------------------------------------------------------------


def test_devices_of_a_user(tmp_path):
    mine = {"mine": {"memory": 1e10, "bandwidth": 1e11, "network": 1e9, "flops": {"bf16": 1e12}}}
    mine["h20"] = {**mine["mine"], "title": "Another H20"}
    (tmp_path / "mine.json").write_text(json.dumps(mine))
    known = load_accelerators(tmp_path / "mine.json")
    assert known["mine"].title == "mine" and known["mine"].usd_per_hour is None
    assert known["h20"].title == "Another H20" and known["h800"] == DEVICES["h800"]
    assert set(DEFAULT) <= set(known)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"memory": None}, "`memory`"),
        ({"bandwidth": "fast"}, "`bandwidth`"),
        ({"network": -1}, "`network`"),
        ({"flops": {"fp8": 1e12}}, "flops.bf16"),
        ({"flops": 3}, "flops by dtype"),
        ({"usd_per_hour": 0}, "usd_per_hour"),
        ({"memroy": 1}, "memroy"),
    ],
)
def test_bad_devices(change, message, tmp_path):
    entry = {"memory": 1e10, "bandwidth": 1e11, "network": 1e9, "flops": {"bf16": 1e12}, **change}
    (tmp_path / "mine.json").write_text(json.dumps({"mine": entry}))
    with pytest.raises(ValueError, match=f"mine.json.*'mine'.*{message}"):
        load_accelerators(tmp_path / "mine.json")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_files_that_hold_no_devices(text, tmp_path):
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(ValueError, match="mine.json"):
        load_accelerators(tmp_path / "mine.json")
