"""Block FP8 weights in memory: kept as stored, saved bit for bit, multiplied piece by piece, protected from casts."""

import copy

import pytest
import torch
from checkpoints import (
    assert_same_bits,
    assert_same_tensors,
    decode_checkpoint,
    edited_golden,
    golden,
    is_fp8_name,
    quantise_fp8,
    read_config,
    read_tensors,
)
from testing import assert_close, assert_golden, load_golden
from tiny import random_ids, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, FineGrainedFP8Config
from transformers.distributed import DistributedConfig

from hf_moe.models import layer_mla, op_fp8, op_quant
from hf_moe.models.layer_experts import Experts
from hf_moe.models.layer_linear import Linear
from hf_moe.models.weights_safetensors import CheckpointError

FP8 = torch.float8_e4m3fn
CASE = "v3_fp8"


def load(folder=None, dtype=torch.float32, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder or golden(CASE), dtype=dtype, **kwargs).eval()


@pytest.fixture(scope="module")
def kept():
    return load()


@pytest.fixture(scope="module")
def decoded():
    return load(dequantize=True)


def fp8_modules(model):
    return {name: module for name, module in model.named_modules() if getattr(module, "fp8", None) is not None}


# --- what is held -----------------------------------------------------------------------------------------------------


def test_weights_stay_as_stored(kept):
    stored = read_tensors(golden(CASE))
    held = kept.state_dict()
    for name, tensor in stored.items():
        if ".experts." not in name and name in held:
            same = tensor.dtype == FP8 or name.endswith("_scale_inv")
            assert_same_bits(name, held[name], tensor if same else tensor.float())
    for layer in (1, 2, 3):
        stem, experts = f"model.layers.{layer}.mlp.experts", kept.model.layers[layer].mlp.experts
        for expert in range(8):
            for suffix in ("", "_scale_inv"):
                gate, up, down = (
                    stored[f"{stem}.{expert}.{kind}_proj.weight{suffix}"] for kind in ("gate", "up", "down")
                )
                # 72 rows are no whole block: the up projection's grid begins anew.
                assert_same_bits("gate_up", getattr(experts, f"gate_up_proj{suffix}")[expert], torch.cat((gate, up)))
                assert_same_bits("down", getattr(experts, f"down_proj{suffix}")[expert], down)


def test_the_files_decide_which_modules_are_fp8(kept):
    names = set(fp8_modules(kept))
    for name, module in kept.named_modules():
        if isinstance(module, (Linear, Experts)):
            assert (name in names) == is_fp8_name(f"{name}.weight"), name
    assert "model.layers.3.self_attn.o_proj" in names, "the MTP layer is not FP8"
    for name, parameter in kept.named_parameters():
        assert parameter.requires_grad == (parameter.dtype != FP8 and not name.endswith("_scale_inv")), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, "auto"], ids=str)
def test_memory_is_that_of_the_files(dtype):
    model = load(dtype=dtype)
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    stored = sum(tensor.nbytes for tensor in read_tensors(golden(CASE)).values())
    assert 0.5 * stored < held <= 1.15 * stored
    assert {parameter.dtype for parameter in model.parameters()} == {FP8, torch.float32, torch.bfloat16}
    assert model.dtype == torch.bfloat16


def test_configuration_is_that_of_the_file(kept):
    upstream = read_config(golden(CASE))["quantization_config"]
    assert kept.config.quantization_config == upstream and kept.is_quantized
    assert kept.model.config.to_dict()["quantization_config"] == upstream
    assert not hasattr(AutoConfig.from_pretrained(golden(CASE)), "load_options")


# --- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_size", ["1GB", "100KB"])
def test_saved_bit_for_bit(max_shard_size, tmp_path):
    load(dtype=torch.bfloat16).save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert_same_tensors(read_tensors(tmp_path), read_tensors(golden(CASE)))
    assert read_config(tmp_path)["quantization_config"] == read_config(golden(CASE))["quantization_config"]
    assert read_config(tmp_path)["torch_dtype"] == "bfloat16"


def test_saved_in_fused_form_and_read_again(kept, tmp_path):
    kept.save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.1.mlp.experts.gate_up_proj_scale_inv" in read_tensors(tmp_path)
    assert_same_tensors(load(tmp_path).state_dict(), kept.state_dict())
    decoded = load(tmp_path, dequantize=True).state_dict()
    assert_same_tensors(decoded, load(dequantize=True).state_dict())


def test_saving_another_state_dict(kept, tmp_path):
    state = {name: tensor.clone() for name, tensor in kept.state_dict().items()}
    state["model.norm.weight"] += 1
    kept.save_pretrained(tmp_path, state_dict=state)
    assert_same_bits("norm", read_tensors(tmp_path)["model.norm.weight"], kept.model.norm.weight + 1)


@pytest.mark.parametrize("form", ["float32", "float8_e8m0fnu"])
def test_ue8m0_scales_are_kept(form, tmp_path):
    def edit(tensors):
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            scale = 2.0 ** torch.ceil(torch.log2(tensors[name]))
            tensors[name] = scale.to(getattr(torch, form))

    config = {"quantization_config": {**read_config(golden(CASE))["quantization_config"], "scale_fmt": "ue8m0"}}
    folder = edited_golden(tmp_path / "in", CASE, edit, **config)
    model = load(folder, dtype=torch.bfloat16)
    assert model.lm_head.fp8 is None and all(module.fp8.ue8m0 for module in fp8_modules(model).values())
    assert model.model.layers[1].mlp.experts.down_proj_scale_inv.dtype == getattr(torch, form)
    model.save_pretrained(tmp_path / "out")
    assert_same_tensors(read_tensors(tmp_path / "out"), read_tensors(folder))
    assert read_config(tmp_path / "out")["quantization_config"] == config["quantization_config"]
    ids = random_ids(2, 7, high=300)
    plain = load(folder, dequantize=True)
    with torch.no_grad():
        assert_close("logits", load(folder)(ids).logits, plain(ids).logits, "float32")


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["hf_moe", "eager"])
@pytest.mark.parametrize("mla_mode", ["expanded", "absorbed"])
def test_logits_are_those_of_the_dequantised_weights(implementation, mla_mode, decoded):
    expected, _ = load_golden(CASE)
    model = load(experts_implementation=implementation)
    model.config.mla_mode = mla_mode
    for variant in (model, decoded):
        with torch.no_grad():
            output = variant(expected["input_ids"], output_mtp_logits=True)
        assert_golden("logits", output.logits, expected["logits"], "logits")
        assert_golden("mtp", output.mtp_logits[0], expected["mtp1_logits"], "mtp_logits")


@pytest.mark.parametrize("quantize", [False, True], ids=["exact", "actquant"])
def test_heads_of_fp8_weights_are_expanded_some_at_a_time(quantize, kept, monkeypatch):
    """Two heads have 128 rows here, one row of blocks."""
    ids = load_golden(CASE)[0]["input_ids"]
    monkeypatch.setattr(kept.config, "mla_mode", "expanded")
    kept.set_fp8_activations(quantize)
    with torch.no_grad():
        whole = kept(ids).logits
        monkeypatch.setattr(layer_mla, "_EXPANDED_ELEMENTS", 1)
        assert kept.model.layers[0].self_attn._heads_at_a_time(4, torch.empty(2, 1, 14, 128)) == 2
        assert_close("logits", kept(ids).logits, whole, "float32")
    kept.set_fp8_activations(None)


@pytest.mark.parametrize("suffix", ["actquant", "actquant_ue8m0"])
def test_quantised_activations_match_the_golden(suffix, tmp_path):
    """Within the tolerance that the golden states, which a rounding that flips can reach and a wrong rule cannot."""
    expected, _ = load_golden(CASE)
    scheme = {"scale_fmt": "ue8m0"} if suffix.endswith("ue8m0") else {}
    config = {"quantization_config": {**read_config(golden(CASE))["quantization_config"], **scheme}}
    model = load(edited_golden(tmp_path, CASE, **config))
    model.config.mla_mode = "expanded"  # as in the golden: the absorbed order has no input to kv_b_proj
    model.set_fp8_activations(True)
    with torch.no_grad():
        output = model(expected["input_ids"], output_mtp_logits=True)
    for actual, name in ((output.logits, "logits"), (output.mtp_logits[0], "mtp1_logits")):
        exact, wanted = expected[name], expected[f"{name}_{suffix}"]
        assert (actual - wanted).norm() < 0.2 * (exact - wanted).norm(), name
        assert (actual - wanted).abs().median() < 1e-3, name
    model.set_fp8_activations(None)
    with torch.no_grad():
        assert_golden("logits", model(expected["input_ids"]).logits, expected["logits"], "logits")


@pytest.mark.parametrize("tokens", [3, 30])
def test_only_the_experts_that_are_hit_are_decoded_and_never_a_whole_stack(kept, tokens, monkeypatch):
    experts, seen = kept.model.layers[1].mlp.experts, []
    original = op_quant.decode_fp8

    def record(weight, *args, **kwargs):
        seen.append((weight.data_ptr(), weight.numel()))
        return original(weight, *args, **kwargs)

    for module in (op_fp8, op_quant):
        monkeypatch.setattr(module, "decode_fp8", record)
    monkeypatch.setattr(op_fp8, "_PIECE", 64 * 128)
    indices = torch.tensor([[2, 5], [5, 2], [2, 5]]).repeat(tokens // 3, 1)
    with torch.no_grad():
        experts(torch.randn(tokens, 192), indices, torch.rand(tokens, 2))
    assert max(numel for _, numel in seen) <= 128 * 192, "a piece is one row of blocks"
    for name in ("gate_up_proj", "down_proj"):
        stack = getattr(experts, name)
        size = stack[0].numel()
        hit = {(pointer - stack.data_ptr()) // size for pointer, _ in seen}
        assert hit & set(range(8)) == {2, 5}, name


def test_gradients_are_those_of_the_dequantised_model(kept, decoded):
    embeds = torch.randn(2, 6, 192, generator=torch.Generator().manual_seed(0))
    gradients = []
    for model in (kept, decoded):
        inputs = embeds.clone().requires_grad_()
        model.zero_grad()
        output = model(inputs_embeds=inputs, labels=random_ids(2, 6, high=300))
        output.loss.backward()
        gradients.append({"embeds": inputs.grad, "norm": model.model.layers[0].input_layernorm.weight.grad.clone()})
    for name in gradients[0]:
        assert_close(name, gradients[0][name], gradients[1][name], "float32")
    assert all(parameter.grad is None for parameter in kept.parameters() if parameter.dtype == FP8)
    kept.zero_grad()


@pytest.mark.parametrize("backend", ["hf_moe", "eager", "compiled"])
def test_fp8_weights_get_no_gradient_however_they_are_marked(backend):
    model = load().train().requires_grad_(True)
    if backend == "eager":
        model.set_experts_implementation("eager")
    run = torch.compile(model, backend="aot_eager") if backend == "compiled" else model
    run(random_ids(2, 6, high=300), labels=random_ids(2, 6, high=300)).loss.backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert any("layernorm" in name for name in trained)
    assert not [name for name in trained if dict(model.named_parameters())[name].dtype == FP8]
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite()


def test_second_derivatives_through_fp8_weights_are_refused(kept):
    layer = kept.model.layers[0].mlp.up_proj
    rows = torch.randn(6, layer.in_features, requires_grad=True)
    seed = torch.randn(6, layer.out_features, requires_grad=True)
    first = torch.autograd.grad(layer(rows), rows, seed, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="twice"):
        first.sum().backward()


def test_generation_and_the_base_model(kept):
    expected, _ = load_golden(CASE)
    ids = expected["input_ids"]
    generated = kept.generate(ids, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generated[:, ids.shape[1] :], expected["greedy_new_ids"])
    base = AutoModel.from_pretrained(golden(CASE), dtype=torch.float32)
    assert set(fp8_modules(base)) == {name.removeprefix("model.") for name in fp8_modules(kept)}


def test_bfloat16_is_near_float32(kept):
    """The exact weights rounded once, products in bfloat16."""
    ids = load_golden(CASE)[0]["input_ids"]
    layer, low = kept.model.layers[0].self_attn.q_a_proj, load(dtype=torch.bfloat16).model.layers[0].self_attn.q_a_proj
    hidden = torch.randn(ids.shape[0], 5, 192)
    with torch.no_grad():
        assert low(hidden.bfloat16()).dtype == torch.bfloat16
        assert_close("q_a", low(hidden.bfloat16()), layer(hidden.bfloat16().float()), "bfloat16")


# --- other ways to load -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [FineGrainedFP8Config(dequantize=True), None], ids=["config", "argument"])
def test_dequantize_gives_a_plain_model(config):
    options = {"dequantize": True} if config is None else {"quantization_config": config}
    model = load(dtype=torch.bfloat16, **options)
    assert not fp8_modules(model) and not getattr(model, "is_quantized", False)
    assert getattr(model.config, "quantization_config", None) is None
    plain = decode_checkpoint(read_tensors(golden(CASE)))
    name = "model.layers.3.self_attn.kv_a_proj_with_mqa.weight"
    assert_same_bits(name, model.state_dict()[name], plain[name].bfloat16())
    model.half().float()


def test_dequantize_after_loading(decoded, tmp_path):
    model = load(dtype=torch.float32).dequantize(torch.float32)
    assert_same_tensors(model.state_dict(), decoded.state_dict())
    assert not fp8_modules(model) and not model.is_quantized
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in read_config(tmp_path)
    assert_same_tensors(load(tmp_path).state_dict(), decoded.state_dict())
    assert model.bfloat16().lm_head.weight.dtype == torch.bfloat16


def test_a_request_for_fp8_keeps_what_the_file_says(kept):
    model = load(quantization_config=FineGrainedFP8Config(weight_block_size=(64, 64)))
    assert_same_tensors(model.state_dict(), kept.state_dict())
    assert model.config.quantization_config == kept.config.quantization_config


@pytest.mark.parametrize("ue8m0", [False, True], ids=["float32", "ue8m0"])
def test_quantised_on_load(ue8m0, tmp_path):
    request = FineGrainedFP8Config(scale_fmt="ue8m0" if ue8m0 else "float", modules_to_not_convert=["o_proj"])
    tiny_model(hidden_size=136, kv_lora_rank=130).bfloat16().save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "plain", dtype=torch.bfloat16, quantization_config=request)
    names = set(fp8_modules(model))
    for name, module in model.named_modules():
        if isinstance(module, (Linear, Experts)):
            assert (name in names) == (is_fp8_name(f"{name}.weight") and not name.endswith("o_proj")), name
    model.save_pretrained(tmp_path / "fp8")
    stored = read_config(tmp_path / "fp8")["quantization_config"]
    assert stored == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": ["o_proj"],
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        **({"scale_fmt": "ue8m0"} if ue8m0 else {}),
    }
    plain, saved = read_tensors(tmp_path / "plain"), read_tensors(tmp_path / "fp8")
    for name, tensor in plain.items():
        if not is_fp8_name(name) or "o_proj" in name:
            kept = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
            assert_same_bits(name, saved[name], tensor.to(kept))
            continue
        values, scales = quantise_fp8(tensor, power_of_two=ue8m0)
        assert_same_bits(name, saved[name], values)
        assert_same_bits(name, saved[f"{name}_scale_inv"], scales)
    again = load(tmp_path / "fp8", dtype=torch.bfloat16)
    assert_same_tensors(again.state_dict(), model.state_dict())


def test_what_cannot_be_quantised_on_load_is_refused(tmp_path):
    with pytest.raises(ValueError, match="activation_scheme='static'"):
        load(golden("v3_basic"), quantization_config=FineGrainedFP8Config(activation_scheme="static"))
    for blocks in ([128], 128, [0, 128], ["128", "128"]):
        with pytest.raises(ValueError, match="weight_block_size is .*rows and columns"):
            load(golden("v3_basic"), quantization_config={"quant_method": "fp8", "weight_block_size": blocks})
    name = "model.layers.0.mlp.up_proj.weight"

    def edit(tensors):
        tensors[name][0, 0] = float("inf")

    with pytest.raises((CheckpointError, RuntimeError), match="not finite|up_proj"):
        load(edited_golden(tmp_path, "v3_basic", edit), quantization_config=FineGrainedFP8Config())


def test_a_new_model_of_an_fp8_configuration_is_saved_as_what_it_is(tmp_path):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(golden(CASE)))
    assert not fp8_modules(model)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in read_config(tmp_path)


def test_fp8_weights_outside_of_files_are_refused(kept):
    config = AutoConfig.from_pretrained(golden(CASE))
    with pytest.raises(ValueError, match="`state_dict` holds FP8 weights"):
        type(kept).from_pretrained(None, config=config, state_dict=kept.state_dict())
    for sharding in (DistributedConfig(fsdp_size=2), {"tp_size": 2, "fsdp_size": 2}, {"pp_size": 2}):
        with pytest.raises(ValueError, match="tensor parallelism.*dequantize=True"):
            load(distributed_config=sharding)


def test_a_stack_of_fp8_and_plain_experts_is_refused(tmp_path):
    name = "model.layers.1.mlp.experts.3.down_proj.weight"

    def edit(tensors):
        tensors[name] = tensors[name].bfloat16()
        del tensors[f"{name}_scale_inv"]

    folder = edited_golden(tmp_path, CASE, edit)
    with pytest.raises(CheckpointError, match=r"experts\.3\.down_proj.*dequantize=True"):
        load(folder)
    assert not fp8_modules(load(folder, dequantize=True))


def test_a_plain_linear_among_fp8_ones(decoded, tmp_path):
    name = "model.layers.1.self_attn.o_proj.weight"

    def edit(tensors):
        tensors[name] = decode_checkpoint(tensors)[name]
        del tensors[f"{name}_scale_inv"]

    model = load(edited_golden(tmp_path, CASE, edit))
    assert model.model.layers[1].self_attn.o_proj.fp8 is None
    ids = random_ids(1, 9, high=300)
    with torch.no_grad():
        assert_close("logits", model(ids).logits, decoded(ids).logits, "float32")


# --- casts, devices, state dicts --------------------------------------------------------------------------------------

CASTS = {
    "half": lambda model: model.half(),
    "float": lambda model: model.float(),
    "double": lambda model: model.double(),
    "bfloat16": lambda model: model.bfloat16(),
    "to": lambda model: model.to(torch.bfloat16),
    "to device and dtype": lambda model: model.to("cpu", torch.float16),
    "type": lambda model: model.type(torch.float32),
    "a part": lambda model: model.model.layers[1].to(torch.float32),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_are_refused_and_change_nothing(cast):
    model = load(dtype=torch.bfloat16)
    before = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    with pytest.raises(TypeError, match=r"FP8 weights.*dequantize=True"):
        CASTS[cast](model)
    after = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert {name for name in after if after[name] != before[name]} <= {
        name for name in after if cast == "a part" and ".layers.1." in name
    }


def test_moves_copies_and_pickles(kept, tmp_path):
    assert kept.to("cpu") is kept
    moved = copy.deepcopy(kept).to("meta")
    assert moved.model.layers[0].mlp.up_proj.weight.dtype == FP8 and moved.lm_head.weight.device.type == "meta"
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:  # shapes without memory, as plain models give them
            logits = moved(torch.zeros(2, 5, dtype=torch.long, device="meta")).logits
        assert logits.device.type == "meta" and logits.shape == (2, 5, kept.config.vocab_size)
    torch.save(kept, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert_same_tensors(again.state_dict(), kept.state_dict())
    assert not any(parameter.requires_grad for parameter in again.parameters() if parameter.dtype == FP8)


def test_dequantize_after_saving(tmp_path):
    model = load(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)  # leaves the name of the dtype in the configuration
    assert model.dequantize().model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_state_dict_goes_back_in(kept):
    model = load()
    with torch.no_grad():
        for module in fp8_modules(model).values():
            for name in module.fp8_parts:
                getattr(module, name).view(torch.uint8).zero_()
    model.load_state_dict(kept.state_dict())
    assert_same_tensors(model.state_dict(), kept.state_dict())


def test_state_dict_of_the_other_form_is_refused(kept, decoded):
    for model, other in ((load(), decoded), (load(dequantize=True), kept)):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "q_a_proj" in name}
        with pytest.raises(RuntimeError, match="FP8"):
            model.load_state_dict(other.state_dict())
        assert_same_tensors({name: model.state_dict()[name] for name in before}, before)


def test_device_map_knows_the_size_of_fp8_weights():
    stored = sum(tensor.nbytes for tensor in read_tensors(golden(CASE)).values())
    model = load(dtype=torch.bfloat16, device_map="auto", max_memory={"cpu": int(1.3 * stored)})
    assert set(getattr(model, "hf_device_map", {"": "cpu"}).values()) == {"cpu"}


def test_unsuitable_experts_backend_is_refused(kept):
    with pytest.raises(ValueError, match="grouped_mm'` multiplies plain weights"):
        kept.set_experts_implementation("grouped_mm")
    with pytest.raises(ValueError, match="batched_mm'` multiplies plain weights"):
        load(experts_implementation="batched_mm")


def test_compiled_forward(kept):
    expected, _ = load_golden(CASE)
    compiled = torch.compile(kept, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_golden("logits", compiled(expected["input_ids"]).logits, expected["logits"], "logits")


def test_compiled_linear_has_the_gradient(kept):
    layer, rows = kept.model.layers[0].self_attn.kv_a_proj_with_mqa, torch.randn(3, 192)
    gradients = []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        inputs = rows.clone().requires_grad_()
        function(inputs).square().sum().backward()
        gradients.append(inputs.grad)
    assert_close("gradient", gradients[1], gradients[0], "float32")


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_lora_on_fp8_trains_as_on_the_dequantised_model():
    peft = pytest.importorskip("peft")
    results = []
    for model in (load(), load(dequantize=True)):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_a_proj", "kv_b_proj", "o_proj"])
        model = peft.get_peft_model(model, config).train()
        trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable and all("lora_" in name and p.dtype == torch.float32 for name, p in trainable.items())
        optimizer = torch.optim.SGD(trainable.values(), lr=0.02)
        ids, losses = random_ids(2, 8, high=300), []
        for _ in range(3):
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        results.append((torch.stack(losses), trainable))
    assert results[0][0][2] < results[0][0][0]
    assert_close("losses", results[0][0], results[1][0], "float32")
    for name, parameter in results[0][1].items():
        assert_close(name, parameter, results[1][1][name], "float32_grad")


def test_lora_model_refuses_casts_too():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load(), peft.LoraConfig(r=2, target_modules=["q_a_proj"]))
    with pytest.raises(TypeError, match="FP8 weights"):
        model.half()
