"""Step3's text model: goldens and what mistakes would cost there, files and names, generation, training."""

import copy
import functools

import pytest
import torch
from checkpoints import (
    LogRecorder,
    assert_same_bits,
    assert_same_tensors,
    decode_fp8,
    edited_golden,
    golden,
    max_difference,
    quantise_fp8,
    read_config,
    read_tensors,
)
from testing import GOLDENS, assert_close, assert_golden, load_golden
from tiny import left_padded, random_ids
from tiny_step3 import text_config, text_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    GenerationConfig,
    StaticCache,
)

from hf_moe.models import layer_mfa
from hf_moe.models.layer_dense import RMSNorm
from hf_moe.models.layer_rope import rotate_interleaved
from hf_moe.models.modeling_step3_text import Step3TextForCausalLM, Step3TextModel
from hf_moe.models.weights_experts import defer_experts
from hf_moe.models.weights_lazy import plain_tensors
from hf_moe.models.weights_safetensors import CheckpointError, open_files
from hf_moe.models.weights_step3 import join_stacks

CASES = ["step3_text", "step3_text_renorm", "step3_fp8"]
FLOAT = ["step3_text", "step3_text_renorm"]


@functools.cache
def load(case: str, implementation: str = "sdpa"):
    model = AutoModelForCausalLM.from_pretrained(
        golden(case), dtype=torch.float32, attn_implementation=implementation
    ).eval()
    assert type(model) is Step3TextForCausalLM
    model.generation_config.eos_token_id = None  # the goldens were generated without stopping
    model.generation_config.pad_token_id = 1
    return model


def run(model, expected, **kwargs):
    """Output of a pass over a golden's inputs, and the routes (weights, indices) of its MoE layers."""
    routes, handles = [], []
    for layer in model.base_model.layers:
        if layer.is_moe:
            handles.append(layer.moe.gate.register_forward_hook(lambda _, __, output: routes.append(output[1:])))
    with torch.no_grad():
        output = model(expected["input_ids"], attention_mask=expected["attention_mask"], **kwargs)
    for handle in handles:
        handle.remove()
    return output, routes


def logits_error(model, expected) -> float:
    output, _ = run(model, expected)
    padding = expected["attention_mask"].bool().logical_not().unsqueeze(-1)
    return max_difference(output.logits.masked_fill(padding, 0.0), expected["logits"])


# --- goldens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_logits_routes_and_loss(case, implementation):
    model, expected = load(case, implementation), load_golden(case)[0]
    output, routes = run(model, expected, labels=expected["labels"], output_hidden_states=True)
    padding = expected["attention_mask"].bool().logical_not().unsqueeze(-1)
    assert_golden("logits", output.logits.masked_fill(padding, 0.0), expected["logits"], "logits")
    last = output.hidden_states[-1].masked_fill(padding, 0.0)
    assert_golden("last_hidden_state", last, expected["last_hidden_state"], "last_hidden_state")
    assert_golden("loss", output.loss.view(1), expected["loss"], "loss")
    real = expected["attention_mask"].bool()
    assert len(routes) == len(expected["topk_indices"])
    for layer, (weights, indices) in enumerate(routes):
        want_ids, want_weights = expected["topk_indices"][layer][real], expected["topk_weights"][layer][real]
        weights, order = weights.view(*real.shape, -1)[real].sort(-1, descending=True)
        ids = indices.view(*real.shape, -1)[real].gather(-1, order)
        assert torch.equal(ids.sort(-1).values, want_ids.sort(-1).values), f"MoE layer {layer} chose other experts"
        assert_golden(f"router {layer}", weights, want_weights, "router_weights")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_greedy(case, implementation):
    model, expected = load(case, implementation), load_golden(case)[0]
    ids = expected["input_ids"]
    for kwargs in ({}, {"cache_implementation": "static", "disable_compile": True}):
        generated = model.generate(
            ids, attention_mask=expected["attention_mask"], max_new_tokens=32, do_sample=False, **kwargs
        )
        assert torch.equal(generated[:, ids.shape[1] :], expected["generated_ids"]), kwargs


@pytest.mark.parametrize("case", CASES)
def test_saved_copy_in_shards(case, tmp_path):
    model, expected = load(case), load_golden(case)[0]
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    copied = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert_same_tensors(copied.state_dict(), model.state_dict())
    assert logits_error(copied, expected) < 1e-4


def test_weights_rounded_to_bfloat16_are_another_golden():
    """Dequantising to bfloat16 rounds once more, and its values are known, too."""
    expected = load_golden("step3_fp8")[0]
    model = AutoModelForCausalLM.from_pretrained(golden("step3_fp8"), dtype=torch.bfloat16, dequantize=True)
    model = model.float().eval()
    padding = expected["attention_mask"].bool().logical_not().unsqueeze(-1)
    logits = run(model, expected)[0].logits.masked_fill(padding, 0.0)
    assert max_difference(logits, expected["logits_if_dequantised_to_bf16"]) < 1e-4
    assert max_difference(logits, expected["logits"]) > 1e-3


# What a mistake costs, on the goldens: comparisons that cannot fail would prove nothing.


def test_trap_interleaved_rotary_pairs(monkeypatch):
    monkeypatch.setattr(layer_mfa, "rotate_halves", rotate_interleaved)
    assert logits_error(load("step3_text"), load_golden("step3_text")[0]) > 1.0


def test_trap_norm_weights_are_not_offsets_from_one():
    model = copy.deepcopy(load("step3_text"))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.weight += 1
    assert logits_error(model, load_golden("step3_text")[0]) > 1.0


@pytest.mark.parametrize("case", FLOAT)
def test_trap_normalisation_of_the_chosen_weights_follows_the_configuration(case):
    model = copy.deepcopy(load(case))
    for layer in model.model.layers:
        if layer.is_moe:
            layer.moe.gate.norm_topk_prob = not layer.moe.gate.norm_topk_prob
    assert logits_error(model, load_golden(case)[0]) > 0.1


def test_trap_the_configured_epsilon_is_read_by_every_norm():
    """1e-3 in this golden, in the inner norm as well."""
    for inner in (True, False):
        model = copy.deepcopy(load("step3_text_renorm"))
        assert {m.variance_epsilon for m in model.modules() if isinstance(m, RMSNorm)} == {1e-3}
        for name, module in model.named_modules():
            if isinstance(module, RMSNorm) and ("inter_norm" in name) == inner:
                module.variance_epsilon = 1e-6
        assert logits_error(model, load_golden("step3_text_renorm")[0]) > 1e-3, inner


def test_trap_the_first_layer_may_have_experts():
    assert [layer.is_moe for layer in load("step3_text_renorm").model.layers] == [True, True, False, True]


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_config_is_written_back_key_for_key(case, tmp_path):
    upstream = read_config(golden(case))
    AutoConfig.from_pretrained(golden(case)).save_pretrained(tmp_path)
    output = read_config(tmp_path)
    assert {key: output.get(key, "absent") for key in upstream} == upstream
    assert all(type(output[key]) is type(value) for key, value in upstream.items())
    assert output["auto_map"] == {"AutoConfig": "configuration_step3_text.Step3TextConfig"}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("case", FLOAT)
def test_round_trip_is_bitwise(case, shards, tmp_path):
    folder = edited_golden(tmp_path / "upstream", case, shards=shards)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert_same_tensors(read_tensors(tmp_path / "again"), read_tensors(golden(case)))


def test_fp8_stays_fp8_and_goes_back_bit_for_bit(tmp_path):
    """Fused stacks of values and of scales, gate before up, each expert with a grid of its own."""
    tensors = read_tensors(golden("step3_fp8"))
    model, info = AutoModelForCausalLM.from_pretrained(golden("step3_fp8"), output_loading_info=True)
    assert not any(info.values()), info
    experts = model.model.layers[1].moe.experts
    assert experts.gate_up_proj.dtype == torch.float8_e4m3fn and experts.gate_up_proj.shape == (8, 320, 192)
    assert experts.gate_up_proj_scale_inv.shape == (8, 4, 2) and experts.down_proj_scale_inv.shape == (8, 2, 2)
    for half, name in enumerate(("gate", "up")):
        stem = f"model.layers.1.moe.{name}_proj.weight"
        values = experts.gate_up_proj.detach().chunk(2, dim=1)[half]
        assert_same_bits(stem, values, tensors[stem])
        scales = experts.gate_up_proj_scale_inv.detach().chunk(2, dim=1)[half]
        assert_same_bits(stem, scales, tensors[f"{stem}_scale_inv"])
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert {"lm_head.weight", "model.layers.1.moe.gate.weight", "model.embed_tokens.weight"} <= kept
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    assert_same_tensors(read_tensors(tmp_path), tensors)
    quantisation = read_config(golden("step3_fp8"))["quantization_config"]
    assert read_config(tmp_path)["quantization_config"] == quantisation


@pytest.mark.parametrize("late", [False, True], ids=["on_load", "after_loading"])
def test_fp8_stacks_are_decoded_block_by_block(late, tmp_path):
    """Against the format's definition, a block grid per expert; edge blocks on both sides."""
    tensors = read_tensors(golden("step3_fp8"))
    model = AutoModelForCausalLM.from_pretrained(golden("step3_fp8"), dtype=torch.float32, dequantize=not late)
    if late:
        model.dequantize(torch.float32)
    state = model.state_dict()
    for expert in (0, 7):
        parts = []
        for name in ("gate", "up"):
            weight = tensors[f"model.layers.1.moe.{name}_proj.weight"][expert]
            parts.append(decode_fp8(weight, tensors[f"model.layers.1.moe.{name}_proj.weight_scale_inv"][expert]))
        assert_same_bits("gate_up", state["model.layers.1.moe.experts.gate_up_proj"][expert], torch.cat(parts).float())
    name = "model.layers.0.self_attn.wq.weight"
    assert_same_bits(name, state[name], decode_fp8(tensors[name], tensors[f"{name}_scale_inv"]).float())
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in read_config(tmp_path)
    assert not any(name.endswith("scale_inv") for name in read_tensors(tmp_path))


def test_quantised_to_fp8_on_load(tmp_path):
    """Stacks and matrices of a bfloat16 checkpoint, block by block, as the published FP8 file has them."""
    request = FineGrainedFP8Config()
    model = AutoModelForCausalLM.from_pretrained(golden("step3_text"), quantization_config=request)
    model.save_pretrained(tmp_path)
    written, upstream = read_tensors(tmp_path), read_tensors(golden("step3_text"))
    linears = {"q_proj", "wq", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    quantised = {name for name, tensor in written.items() if tensor.dtype == torch.float8_e4m3fn}
    assert quantised == {name for name in upstream if name.split(".")[-2] in linears}
    name = "model.layers.2.moe.gate_proj.weight"
    for expert in (0, 7):
        values, scales = quantise_fp8(upstream[name][expert])
        assert_same_bits("values", written[name][expert], values)
        assert_same_bits("scales", written[f"{name}_scale_inv"][expert], scales)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_tensors(again.state_dict(), model.state_dict())


def test_base_model_loads_and_saves(tmp_path):
    expected = load_golden("step3_text")[0]
    base = AutoModel.from_pretrained(golden("step3_text"), dtype=torch.float32).eval()
    assert type(base) is Step3TextModel
    padding = expected["attention_mask"].bool().logical_not().unsqueeze(-1)
    last = run(base, expected)[0].last_hidden_state.masked_fill(padding, 0.0)
    assert_golden("last_hidden_state", last, expected["last_hidden_state"], "last_hidden_state")
    base.save_pretrained(tmp_path)
    with LogRecorder() as recorder:
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert "lm_head" in recorder.text
    assert_same_tensors(again.model.state_dict(), base.state_dict())


def test_disk_offload(tmp_path):
    expected = load_golden("step3_text")[0]
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{index}": "cpu" if index == 0 else "disk" for index in range(4)}
    model = AutoModelForCausalLM.from_pretrained(
        golden("step3_text"), dtype=torch.float32, device_map=places, offload_folder=tmp_path
    )
    assert logits_error(model.eval(), expected) < 1e-4


@pytest.mark.parametrize("case", ["step3_text", "step3_fp8"])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_model_with_a_device_map_is_saved_bit_for_bit(case, place, tmp_path):
    kwargs = {"device_map": {"": place}, "offload_folder": tmp_path / "offload"}
    model = AutoModelForCausalLM.from_pretrained(golden(case), **kwargs)
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(read_tensors(tmp_path / "saved"), read_tensors(golden(case)))


@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj"])
def test_missing_experts_are_an_error(part, tmp_path):
    name = f"model.layers.2.moe.{part}.weight"
    folder = edited_golden(tmp_path, "step3_text", lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert name in str(caught.value) and "moe_num_experts=8" in str(caught.value)


@pytest.mark.parametrize("change", ["experts", "rows"])
def test_stack_of_the_wrong_shape_is_an_error(change, tmp_path):
    name = "model.layers.1.moe.up_proj.weight"

    def cut(tensors):
        tensors[name] = tensors[name][:-1] if change == "experts" else tensors[name][:, :-1]

    with pytest.raises(CheckpointError) as caught:
        AutoModelForCausalLM.from_pretrained(edited_golden(tmp_path, "step3_text", cut))
    assert name in str(caught.value) and "(8, 64, 128)" in str(caught.value)


@pytest.mark.parametrize("name", ["model.layers.1.moe.up_proj.weight", "model.layers.0.self_attn.wq.weight"])
def test_fp8_weight_without_scales_or_with_a_wrong_grid(name, tmp_path):
    folder = edited_golden(tmp_path / "a", "step3_fp8", lambda tensors: tensors.pop(f"{name}_scale_inv"))
    with pytest.raises(CheckpointError, match=f"{name} has no scales"):
        AutoModelForCausalLM.from_pretrained(folder)

    def cut(tensors):
        tensors[f"{name}_scale_inv"] = tensors[f"{name}_scale_inv"][..., :1]

    with pytest.raises(CheckpointError, match=f"{name}_scale_inv has shape"):
        AutoModelForCausalLM.from_pretrained(edited_golden(tmp_path / "b", "step3_fp8", cut))


# --- generation -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny():
    model = text_model()
    model.generation_config = GenerationConfig(bos_token_id=0, pad_token_id=2, max_new_tokens=12, do_sample=False)
    return model


@torch.no_grad()
def greedy_by_full_passes(model, ids: torch.Tensor, steps: int = 12) -> torch.Tensor:
    for _ in range(steps):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    return ids


def test_every_way_to_generate_gives_the_same(tiny):
    rows = [random_ids(1, length, seed=length)[0] for length in (9, 4, 1)]
    ids, mask = left_padded(rows)
    expected = [greedy_by_full_passes(tiny, row.unsqueeze(0))[0, -12:] for row in rows]
    assert len({tuple(row.tolist()) for row in expected}) == 3
    ways = [
        {},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 4},
        {"cache_implementation": "offloaded"} if torch.cuda.is_available() else {},
    ]
    for kwargs in ways:
        generated = tiny.generate(ids, attention_mask=mask, **kwargs)[:, -12:]
        assert torch.equal(generated, torch.stack(expected)), kwargs


def test_beams_and_assistant(tiny):
    ids = random_ids(2, 9)
    cached = tiny.generate(ids, num_beams=3)
    assert torch.equal(cached, tiny.generate(ids, num_beams=3, use_cache=False))
    expected = greedy_by_full_passes(tiny, ids[:1])
    assert torch.equal(tiny.generate(ids[:1], prompt_lookup_num_tokens=3), expected)
    other = text_model(num_hidden_layers=2)
    assert torch.equal(tiny.generate(ids[:1], assistant_model=other), expected)
    assert torch.equal(tiny.generate(ids[:1], assistant_early_exit=2), expected)  # its first layers draft


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_sequences_equal_separate_ones(implementation):
    model = text_model(implementation)
    parts = [random_ids(1, length, seed=length) for length in (5, 8)]
    positions = torch.cat([torch.arange(5), torch.arange(8)]).unsqueeze(0)
    with torch.no_grad():
        packed = model(torch.cat(parts, dim=1), position_ids=positions, use_cache=False).logits
        separate = torch.cat([model(part).logits for part in parts], dim=1)
    assert_close("logits", packed, separate, "float32")


def test_full_graph_decode_step():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = text_model(num_hidden_layers=2)
    ids = random_ids(2, 9)
    results = []
    for step in (model, torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)):
        cache = StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            model(ids[:, :6], past_key_values=cache)
            kwargs = [{"position_ids": torch.full((2, 1), at), "past_key_values": cache} for at in range(6, 9)]
            results.append(torch.cat([step(ids[:, 6 + i : 7 + i], **kw).logits for i, kw in enumerate(kwargs)], 1))
    assert_close("logits", results[1], results[0], "float32")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("padded", [False, True], ids=["full", "left_padded"])
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_attention_implementations_agree(implementation, padded):
    """A whole pass and a cached step. Flex runs uncompiled here: the masks are ours, the kernel is not."""
    model = text_model("eager")
    ids, mask = left_padded([random_ids(1, 9)[0], random_ids(1, 9 - 4 * padded, seed=1)[0]])
    mask_of = (lambda length: mask[:, :length]) if padded else (lambda length: None)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = model(ids, attention_mask=mask_of(9)).logits
        model.set_attn_implementation(implementation)
        whole = model(ids, attention_mask=mask_of(9)).logits
        assert_close("logits", whole[mask.bool()], expected[mask.bool()], "float32")
        cache = model(ids[:, :8], attention_mask=mask_of(8), use_cache=True).past_key_values
        step = model(ids[:, 8:], attention_mask=mask_of(9), past_key_values=cache).logits
        assert_close("step", step, expected[:, 8:], "float32")


def test_flash_kernels_get_the_one_head(monkeypatch):
    """They share a key head among query heads themselves; every other implementation gets views."""
    seen = {}

    def kernel(module, query, key, value, attention_mask, **kwargs):
        seen.update(query=query.shape, key=key.shape, value=value.shape)
        return query.transpose(1, 2), None

    model = text_model("eager")
    registry = layer_mfa.ALL_ATTENTION_FUNCTIONS
    monkeypatch.setitem(registry._local_mapping, "flash_probe", kernel)
    layer = model.model.layers[0].self_attn
    monkeypatch.setattr(layer.config, "_attn_implementation_internal", "flash_probe")
    states = torch.randn(2, 7, 48)
    layer(states, model.model.rotary_emb(states, torch.arange(7).unsqueeze(0)), None)
    assert tuple(seen["query"]) == (2, 5, 7, 16) and tuple(seen["key"]) == tuple(seen["value"]) == (2, 1, 7, 16)


# --- training and outputs ---------------------------------------------------------------------------------------------


def test_gradient_checkpointing_and_every_parameter_learns():
    model = text_model().train()
    ids = random_ids(4, 16)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        results.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
        counts = model.model.layers[1].moe.gate.tokens_per_expert
        assert counts.sum() == 4 * 16 * 3
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert gradient.any() and gradient.isfinite().all(), name
        assert_close(name, results[1][1][name], gradient, "float32")


def test_recorded_outputs():
    model = text_model("eager")
    with torch.no_grad():
        output = model(random_ids(2, 7), output_hidden_states=True, output_attentions=True, output_router_logits=True)
    assert len(output.hidden_states) == 5 and len(output.router_logits) == 2
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 5, 7, 7)] * 4
    assert_close("row sums", output.attentions[0].sum(-1), torch.ones(2, 5, 7), "float32")
    assert tuple(output.router_logits[0].shape) == (14, 8)


def test_experts_implementations_agree():
    model = text_model()
    results = {}
    for name in ("hf_moe", "eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(name)
        with torch.no_grad():
            results[name] = model(random_ids(2, 9)).logits
    for name, logits in results.items():
        assert_close(name, logits, results["eager"], "float32")


def test_autocast_and_bfloat16():
    model = text_model().train()
    ids = random_ids(2, 12)
    expected = model(ids, labels=ids).loss.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=0.05)
    low = text_model(dtype=torch.bfloat16)
    with torch.no_grad():
        cache = low(ids[:, :11], use_cache=True).past_key_values
        step = low(ids[:, 11:], past_key_values=cache).logits
        assert step.dtype == torch.bfloat16 and step.isfinite().all()


def test_adapters_train_and_merge():
    from peft import LoraConfig, get_peft_model

    base = text_model()
    model = get_peft_model(
        base,
        LoraConfig(
            r=4,
            target_modules=["q_proj", "wq", "k_proj", "v_proj", "o_proj"],
            target_parameters=["moe.experts.gate_up_proj", "moe.experts.down_proj"],
            init_lora_weights=False,
        ),
    )
    ids = random_ids(2, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        assert_close("merged", model.merge_and_unload()(ids).logits, adapted, "float32")


def test_token_ids_out_of_range():
    with pytest.raises(IndexError, match="from 5 to 101.*101 entries"):
        text_model()(torch.tensor([[5, 101]]))
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        text_model()()


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "moe_layers", "written"),
    [
        ("1,3", [1, 3], "1,3"),
        (" 1, 3 ", [1, 3], " 1, 3 "),
        ("2", [2], "2"),
        ([1, 2], [1, 2], "1,2"),
        ((0, 3), [0, 3], "0,3"),
        (None, [1, 2, 3], None),
        ("4,5,99", [], "4,5,99"),
    ],
    ids=str,
)
def test_moe_layers_enum(value, moe_layers, written, tmp_path):
    config = text_config(moe_layers_enum=value)
    assert [layer for layer in range(4) if config.is_moe_layer(layer)] == moe_layers
    config.save_pretrained(tmp_path)
    assert read_config(tmp_path)["moe_layers_enum"] == written
    again = AutoConfig.from_pretrained(tmp_path)
    assert [layer for layer in range(4) if again.is_moe_layer(layer)] == moe_layers


def test_absent_keys_take_the_class_defaults():
    config = AutoConfig.for_model("step3_text")
    assert [layer for layer in range(61) if config.is_moe_layer(layer)] == list(range(4, 60))
    assert config.num_attention_groups == 1 and config.norm_expert_weight is False
    assert config.share_expert_dim == 5120 and config.rope_parameters["rope_theta"] == 500000.0
    assert (config.num_attention_heads, config.head_dim, config.share_q_dim) == (64, 256, 2048)
    assert (config.moe_num_experts, config.moe_top_k, config.vocab_size) == (48, 3, 128815)


def test_aliases_are_read(tmp_path):
    aliases = {"num_key_value_heads": 1, "max_position_embeddings": 777, "num_experts_per_tok": 5}
    config = AutoConfig.for_model("step3_text", **aliases)
    assert (config.num_attention_groups, config.max_position_embedding, config.moe_top_k) == (1, 777, 5)
    config.save_pretrained(tmp_path)
    written = read_config(tmp_path)
    assert (written["max_position_embedding"], written["moe_top_k"]) == (777, 5)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"num_attention_groups": 8}, ["num_attention_groups=8", "1"]),
        ({"num_key_value_heads": 2}, ["num_attention_groups=2"]),
        ({"moe_layers_enum": "4,five"}, ["moe_layers_enum", "4,five"]),
        ({"moe_layers_enum": "4,,5"}, ["moe_layers_enum", "4,,5"]),
        ({"moe_layers_enum": ""}, ["moe_layers_enum"]),
        ({"moe_layers_enum": "-1"}, ["moe_layers_enum", "-1"]),
        ({"moe_layers_enum": [1.5]}, ["moe_layers_enum", "1.5"]),
        ({"moe_layers_enum": 4}, ["moe_layers_enum", "4"]),
        ({"moe_top_k": 9, "moe_num_experts": 8}, ["moe_top_k=9", "moe_num_experts=8"]),
        ({"head_dim": 15}, ["head_dim"]),
        ({"rope_scaling": {"type": "spiral", "factor": 2}}, ["rope_scaling", "spiral"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_bad_option_is_one_clear_error(keys, named):
    with pytest.raises(ValueError) as caught:
        text_config(**keys)
    for word in named:
        assert word in str(caught.value), caught.value


def test_goldens_are_the_files_that_the_expectations_belong_to():
    assert {path.name for path in GOLDENS.glob("step3_*")} >= set(CASES)


def test_stacks_joined_for_sharded_models():
    """Tensor parallelism slices the fused parameter: gate and up rows by their place in it, of weights and scales."""
    entries = open_files([str(golden("step3_fp8") / "model.safetensors")])
    tensors = plain_tensors(entries, {"quant_method": "fp8", "block_size": (128, 128)})
    joined = join_stacks(defer_experts(tensors))
    stem = "model.layers.1.moe"
    assert f"{stem}.up_proj.weight" not in joined and f"{stem}.down_proj.weight" in joined
    fused = AutoModelForCausalLM.from_pretrained(golden("step3_fp8"), dtype=torch.float32, dequantize=True)
    wanted = fused.model.layers[1].moe.experts.gate_up_proj.detach()
    source = joined[f"{stem}.gate_proj.weight"]
    assert source.get_shape() == list(wanted.shape) and torch.equal(source[...], wanted)
    for rows in (slice(0, 80), slice(160, 240), slice(100, 200), slice(0, 320), slice(320, 320)):
        assert torch.equal(source[slice(2, 5), rows, slice(7, 90)], wanted[2:5, rows, 7:90]), rows
