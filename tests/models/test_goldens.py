"""Every golden checkpoint: logits, routes, loss, greedy ids and MTP logits, in every order and from shards."""

import functools

import pytest
import torch
from testing import GOLDENS, assert_golden, load_golden
from transformers import AutoModelForCausalLM

import hf_moe  # noqa: F401  registers the families

CASES = [
    "v3_basic",
    "v3_qlora_none",
    "v3_mtp2",
    "v3_fp8",
    "v2_group_limited",
    "v2_lite_greedy",
    "kimi_k2",
    "kimi_k2_int4",
]
MTP_CASES = ["v3_basic", "v3_mtp2", "v3_fp8"]
MODES = ["auto", "expanded", "absorbed"]


@functools.cache
def load(case: str):
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / case, dtype=torch.float32).eval()
    assert type(model).__module__.startswith("hf_moe.")
    model.generation_config.eos_token_id = None  # the goldens were generated without stopping
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(params=[pytest.param((case, mode), id=f"{case}-{mode}") for case in CASES for mode in MODES])
def golden(request):
    case, mode = request.param
    model = load(case)
    model.config.mla_mode = mode
    yield model, load_golden(case)[0]
    model.config.mla_mode = "auto"


def record_routes(model, run):
    """Runs `run` and returns `{layer: (topk_weights, topk_indices)}` of every router that took part."""
    routes, handles = {}, []
    for index, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "gate"):
            hook = functools.partial(lambda i, module, args, output: routes.__setitem__(i, output[1:]), index)
            handles.append(layer.mlp.gate.register_forward_hook(hook))
    try:
        with torch.no_grad():
            output = run()
    finally:
        for handle in handles:
            handle.remove()
    return output, routes


def assert_routes(routes, expected, scale):
    """Identical sets of experts, and their weights before `routed_scaling_factor`: V2's 16 scales rounding as well."""
    layers = sorted({int(key.split(".")[1]) for key in expected if key.startswith("router.")})
    assert layers and set(layers) <= set(routes)
    for layer in layers:
        weights, indices = routes[layer]
        ids, order = indices.sort(-1)
        want_ids, want_weights = expected[f"router.{layer}.topk_indices"], expected[f"router.{layer}.topk_weights"]
        assert torch.equal(ids.view_as(want_ids), want_ids), f"layer {layer} chose other experts"
        weights = weights.gather(-1, order).view_as(want_weights) / scale
        assert_golden(f"router {layer}", weights, want_weights / scale, "router_weights")


def test_logits_routes_and_loss(golden):
    model, expected = golden
    ids = expected["input_ids"]
    has_mtp = "mtp1_logits" in expected
    run = functools.partial(model, input_ids=ids, labels=ids, output_mtp_logits=has_mtp, output_hidden_states=True)
    output, routes = record_routes(model, run)
    assert_golden("logits", output.logits, expected["logits"], "logits")
    assert_golden("loss", output.loss.view(1), expected["loss"], "loss")
    last = output.hidden_states[-1]
    assert_golden("last_hidden_state", last, expected["last_hidden_state"], "last_hidden_state")
    assert_routes(routes, expected, model.config.routed_scaling_factor)
    if has_mtp:
        for depth, logits in enumerate(output.mtp_logits, start=1):
            assert_golden(f"mtp{depth}_logits", logits, expected[f"mtp{depth}_logits"], "mtp_logits")
            flat = logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(flat, ids[:, depth + 1 :].flatten())
            assert_golden(f"mtp{depth}_loss", loss.view(1), expected[f"mtp{depth}_loss"], "loss")


def test_base_model_gives_the_last_hidden_state(golden):
    model, expected = golden
    with torch.no_grad():
        output = model.model(input_ids=expected["input_ids"])
    assert_golden("last_hidden_state", output.last_hidden_state, expected["last_hidden_state"], "last_hidden_state")


def test_left_padding(golden):
    model, expected = golden
    mask = expected["attention_mask_padded"]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    real = mask.bool().unsqueeze(-1)
    for name, kwargs in {"positions from the mask": {"position_ids": positions}, "plain positions": {}}.items():
        with torch.no_grad():
            logits = model(input_ids=expected["input_ids_padded"], attention_mask=mask, **kwargs).logits
        assert_golden(name, logits.masked_fill(~real, 0.0), expected["logits_padded"], "logits")


@pytest.mark.parametrize("padded", [False, True], ids=["full", "left_padded"])
def test_greedy(golden, padded):
    model, expected = golden
    suffix = "_padded" if padded else ""
    ids = expected[f"input_ids{suffix}"]
    mask = expected["attention_mask_padded"] if padded else torch.ones_like(ids)
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=32, do_sample=False)
    assert torch.equal(generated[:, ids.shape[1] :], expected[f"greedy_new_ids{suffix}"])


@pytest.mark.parametrize("case", CASES)
def test_prefill_then_steps(case):
    """Logits of a prompt in two unequal pieces and of single steps behind it are those of one forward pass."""
    model, expected = load(case), load_golden(case)[0]
    ids, logits, cache = expected["input_ids"], [], None
    lengths = [5, ids.shape[1] - 5 - 4, 1, 1, 1, 1]
    with torch.no_grad():
        for piece in ids.split(lengths, dim=1):
            output = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
    assert_golden("logits", torch.cat(logits, dim=1), expected["logits"], "logits")


@pytest.mark.parametrize("case", CASES)
def test_saved_copy_in_shards(case, tmp_path):
    model, expected = load(case), load_golden(case)[0]
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    copy = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert {name: tensor.shape for name, tensor in copy.state_dict().items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    for name, tensor in copy.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), f"{name} changed on its way through the file"
    run = functools.partial(copy, input_ids=expected["input_ids"], output_mtp_logits=case in MTP_CASES)
    output, routes = record_routes(copy, run)
    assert_golden("logits", output.logits, expected["logits"], "logits")
    assert_routes(routes, expected, model.config.routed_scaling_factor)


@pytest.mark.parametrize("case", MTP_CASES)
def test_mtp_reads_the_normed_state(case):
    """The mistake of feeding the state before the final norm is far from the golden: the comparison has teeth."""
    model, (expected, meta) = load(case), load_golden(case)
    effect = meta["mtp"]["effect of feeding the pre-norm state instead (max abs logit change)"]
    assert len(effect) == len(model.model.mtp_layers()) and min(effect) > 1.0
    if "mtp1_logits_if_prenorm" in expected:
        with torch.no_grad():
            logits = model(input_ids=expected["input_ids"], output_mtp_logits=True).mtp_logits[0]
        assert (logits - expected["mtp1_logits_if_prenorm"]).abs().max() > 1.0
