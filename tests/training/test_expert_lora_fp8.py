"""LoRA on FP8 experts and projections: trained beside frozen FP8 weights, merged into them block by block."""

import copy
import threading

import pytest
import torch
from expert_cases import Shape, make_case, run_with_gradients
from lora_cases import EXPERTS, adapted, factors_of, ids_of, wrappers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from testing import GOLDENS, assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from hf_moe.models.op_experts import experts
from hf_moe.models.op_quant import FP8, dequantize_block_fp8, quantize_block_fp8
from hf_moe.training.lora import check_targets

FOLDERS = {"deepseek_v3": "v3_fp8", "step3": "step3_fp8", "longcat": "longcat_fp8"}
# Of the output of one product or one experts module, as a norm: quantising has an error of about 2.5% of each weight.
QUANTISED = 0.05


def load(family: str = "deepseek_v3", dtype: torch.dtype = torch.float32, **kwargs):
    return AutoModelForCausalLM.from_pretrained(GOLDENS / FOLDERS[family], dtype=dtype, **kwargs).eval()


@torch.no_grad()
def logits(model, ids):
    return model.eval()(ids).logits


def fp8_layers(model) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if getattr(module, "fp8", None) is not None}


@pytest.mark.parametrize("family", FOLDERS)
def test_values_and_gradients_are_those_beside_decoded_weights(family):
    results = []
    for model in (load(family), load(family, dequantize=True)):
        ids = ids_of(model)
        model = adapted(model)
        entry = {"logits": logits(model, ids)}
        model.train()(ids, labels=ids).loss.backward()
        entry |= {name: parameter.grad for name, parameter in factors_of(model).items()}
        results.append(entry)
    assert any("experts" in name for name in results[0])
    for name, expected in results[1].items():
        if expected is None:
            assert results[0][name] is None
        else:
            assert_close(name, results[0][name], expected, "float32_grad" if "lora" in name else "float32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_no_matrix_of_an_expert_is_decoded_whole(dtype, monkeypatch):
    """One of real size would come as fresh pages from the system, which takes longer than the product."""
    monkeypatch.setattr("hf_moe.models.op_fp8._PIECE", 1 << 14)
    monkeypatch.setattr("hf_moe.models.op_fp8._memory", threading.local())  # no larger than these pieces need
    case = make_case(Shape(48, 2, 1, "even"), 512, 384, dtype, weights="fp8", rank=4)
    size, made = min(case.gate_up_proj[0].numel(), case.down_proj[0].numel()), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor) and output.dtype.is_floating_point and output.dtype != FP8:
                made.append(output.numel())
            return output

    with Watch():
        run_with_gradients(experts, case)
    assert made and max(made) < size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_factors_are_in_the_models_dtype_and_drawn_in_full(dtype):
    """PEFT gives new factors the dtype of the weight, which rounds what was drawn to FP8."""
    model = load(dtype=dtype)
    config = LoraConfig(r=4, target_modules=["o_proj"], target_parameters=EXPERTS)
    kept = get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False)
    assert {parameter.dtype for parameter in factors_of(kept).values()} == {dtype}
    wide = get_peft_model(model, config)
    for name, parameter in factors_of(wide).items():
        assert parameter.dtype == torch.float32
        if "lora_A" in name:
            assert not torch.equal(parameter, parameter.to(FP8).float()), name


def sample_calls(model) -> dict:
    """A call of each adapted module with FP8 weights, by the name it has in the model without adapters."""
    calls = {}
    for name, module in model.base_model.model.named_modules():
        base = module.get_base_layer() if hasattr(module, "get_base_layer") else None
        if getattr(base, "fp8", None) is None or name.endswith("base_layer"):
            continue
        if hasattr(base, "num_experts"):
            ids = torch.rand(16, base.num_experts).argsort(-1)[:, :2]
            calls[name] = module, (torch.randn(16, base.hidden_dim), ids, torch.rand(16, 2))
        else:
            calls[name] = module, (torch.randn(16, base.in_features),)
    return calls


@pytest.mark.parametrize("family", FOLDERS)
def test_merged_into_fp8(family):
    """Merging decodes, adds, and quantises anew; the file form and the kinds of tensors stay."""
    model = load(family)
    wrapped = adapted(model)
    calls, before_merge = sample_calls(wrapped), {}
    with torch.no_grad():
        for name, (module, inputs) in calls.items():
            before_merge[name] = module(*inputs)
    before = {name: (p.dtype, tuple(p.shape)) for name, p in load(family).named_parameters()}
    expected = {}
    for layer in wrappers(wrapped):
        base, name = layer.get_base_layer(), layer.parameter_name
        scale = getattr(base, f"{name}_scale_inv")
        decoded = dequantize_block_fp8(getattr(base, name), scale, base.fp8.block_size, base.fp8_parts[name])
        total = decoded + layer.get_delta_weight("default").detach()
        halves = total.unflatten(1, (base.fp8_parts[name], -1))
        values, scales = quantize_block_fp8(halves, base.fp8.block_size, base.fp8.ue8m0)
        expected[id(base), name] = values.flatten(1, 2), scales.flatten(1, 2), total
    merged = wrapped.merge_and_unload()
    assert not any(".lora_" in name or "base_layer" in name for name, _ in merged.named_parameters())
    assert {name: (p.dtype, tuple(p.shape)) for name, p in merged.named_parameters()} == before
    for module in fp8_layers(merged).values():
        for name in ("gate_up_proj", "down_proj"):
            if (id(module), name) in expected:
                values, scales, total = expected.pop((id(module), name))
                weight, scale = getattr(module, name), getattr(module, f"{name}_scale_inv")
                assert torch.equal(weight.view(torch.uint8), values.view(torch.uint8)) and not weight.requires_grad
                assert torch.equal(scale.float(), scales)
                decoded = dequantize_block_fp8(weight, scale, module.fp8.block_size, module.fp8_parts[name])
                assert ((decoded - total).norm() / total.norm()).item() < 0.035
    assert not expected and len(before_merge) > 4
    for name, wanted in before_merge.items():
        with torch.no_grad():
            error = ((merged.get_submodule(name)(*calls[name][1]) - wanted).norm() / wanted.norm()).item()
        assert 0 < error < QUANTISED, (name, error)


def test_merged_model_is_saved_and_read_again(tmp_path):
    model = adapted(load())
    ids = ids_of(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert fp8_layers(again).keys() == fp8_layers(merged).keys()
    assert torch.equal(logits(again, ids), logits(merged, ids))


def test_unmerging_brings_the_very_weights_back():
    model = load()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids = ids_of(model)
    model = adapted(model)
    wanted = logits(model, ids)
    model.merge_adapter()
    assert not torch.equal(logits(model, ids), wanted)
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), wanted)
    for name, parameter in model.unload().named_parameters():
        assert torch.equal(parameter.float(), before[name].float()), name


def test_merging_holds_one_decoded_matrix_at_a_time():
    layer = wrappers(adapted(load()))[0]
    experts, sizes = layer.get_base_layer(), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor) and output.dtype == torch.float32:
                sizes.append(output.untyped_storage().nbytes() // 4)
            return output

    with Watch():
        layer.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
    blocks = [-(-size // 128) * 128 for size in (experts.intermediate_dim, experts.hidden_dim)]
    assert max(sizes) <= 2 * blocks[0] * blocks[1] < experts.down_proj.numel()  # a gate and an up, in whole blocks


def test_safe_merge_sees_what_is_not_finite():
    model = adapted(load())
    layer = model.base_model.model.model.layers[0].self_attn.o_proj
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] = float("nan")
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="default seems to be broken"):
        layer.merge(safe_merge=True)
    assert torch.equal(before.view(torch.uint8), layer.base_layer.weight.view(torch.uint8)) and not layer.merged


@pytest.mark.parametrize(
    ("options", "match"),
    [({"use_dora": True}, "FP8 weights"), ({"init_lora_weights": "pissa"}, "pissa.*FP8"), ({"lora_bias": True}, "FP8")],
)
def test_what_fp8_weights_cannot_have_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        get_peft_model(load(), LoraConfig(target_modules=["o_proj"], **options))


def test_modules_of_fp8_weights_cannot_be_trained_whole():
    model = load()
    for name in ("shared_experts", "o_proj", "mlp"):
        with pytest.raises(ValueError, match=f"'{name}' has FP8 weights, which are frozen"):
            check_targets(model, LoraConfig(target_modules=["kv_b_proj"], modules_to_save=[name]))
    check_targets(model, LoraConfig(target_modules=["kv_b_proj"], modules_to_save=["lm_head", "gate", "norm"]))


def test_an_adapter_trained_beside_fp8_serves_the_decoded_model(tmp_path):
    model = adapted(load())
    ids = ids_of(model)
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(load(dequantize=True), tmp_path)
    assert_close("logits", logits(plain, ids), logits(model, ids), "float32")


def test_ue8m0_scales_stay_powers_of_two(tmp_path):
    from safetensors.torch import load_file

    config = (GOLDENS / "v3_fp8" / "config.json").read_text()
    tensors = load_file(GOLDENS / "v3_fp8" / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        weight = dequantize_block_fp8(tensors[name.removesuffix("_scale_inv")], tensors[name])
        values, scales = quantize_block_fp8(weight, ue8m0=True)
        tensors[name.removesuffix("_scale_inv")], tensors[name] = values, scales.to(torch.float8_e8m0fnu)
    (tmp_path / "config.json").write_text(config.replace('"fmt": "e4m3"', '"fmt": "e4m3", "scale_fmt": "ue8m0"'))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = ids_of(model)
    model = adapted(model)
    calls = sample_calls(model)
    name, (module, inputs) = next((name, call) for name, call in calls.items() if name.endswith("experts"))
    with torch.no_grad():
        wanted = module(*inputs)
    merged = model.merge_and_unload()
    scales = [getattr(m, f"{n}_scale_inv") for m in fp8_layers(merged).values() for n in m.fp8_parts]
    assert {scale.dtype for scale in scales} == {torch.float8_e8m0fnu}
    with torch.no_grad():
        error = ((merged.get_submodule(name)(*inputs) - wanted).norm() / wanted.norm()).item()
    assert 0 < error < QUANTISED
    assert logits(merged, ids).isfinite().all()
