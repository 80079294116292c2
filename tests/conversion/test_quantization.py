"""Block FP8, packed INT4 and bfloat16 from one to another, against loops and against other libraries."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_moe.conversion.arithmetic import changed_blocks, decode_block_rows, encode_block_rows
from hf_moe.conversion.families import find_family, is_exempt, is_quantized
from hf_moe.conversion.quantization import plan_bf16, plan_fp8, plan_fp8_ue8m0
from hf_moe.conversion.run import convert
from hf_moe.conversion.source import open_source
from hf_moe.models.op_quant import dequantize_block_fp8, quantize_block_fp8
from hf_moe.models.weights_safetensors import CheckpointError
from hf_moe.register import FAMILIES

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
FP8 = torch.float8_e4m3fn
FP8_CASES = ("v3_fp8", "longcat_fp8", "step3_fp8")


def tensors_of(folder):
    """All tensors of a folder, by the safetensors library."""
    tensors = {}
    for path in sorted(Path(folder).glob("model*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def run(source, plan, target, **options):
    """Converts a folder; returns the summary."""
    opened = open_source(source)
    return convert(opened, plan(opened), target, progress=False, **options)


def blocks_of(matrix):
    """Row and column ranges of the blocks of a matrix."""
    for top in range(0, matrix.shape[-2], 128):
        for left in range(0, matrix.shape[-1], 128):
            yield slice(top, top + 128), slice(left, left + 128)


def cast_as_upstream(values, scales):
    """What DeepSeek's script computes: block by block the float32 product, stored as bfloat16."""
    output = torch.empty(values.shape, dtype=torch.bfloat16)
    for rows, columns in blocks_of(values):
        scale = scales[..., rows.start // 128, columns.start // 128]
        output[..., rows, columns] = values[..., rows, columns].to(torch.float32) * scale[..., None, None]
    return output


def same_bytes(left, right):
    """Whether two tensors are equal bit for bit."""
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
    )


@pytest.mark.parametrize("case", FP8_CASES)
def test_fp8_to_bfloat16_is_bit_for_bit_what_upstream_computes(case, tmp_path):
    run(GOLDENS / case, plan_bf16, tmp_path / "bf16")
    before, after = tensors_of(GOLDENS / case), tensors_of(tmp_path / "bf16")
    assert set(after) == {name for name in before if not name.endswith("_scale_inv")}
    decoded = 0
    for name, tensor in after.items():
        if before[name].dtype == FP8:
            assert same_bytes(tensor, cast_as_upstream(before[name], before[f"{name}_scale_inv"])), name
            decoded += 1
        else:
            assert same_bytes(tensor, before[name]), name
    assert decoded > 30
    assert FP8 not in {tensor.dtype for tensor in after.values()}


@pytest.mark.parametrize("case", FP8_CASES)
def test_back_to_fp8_gives_the_bytes_where_a_blocks_maximum_is_representable(case, tmp_path):
    run(GOLDENS / case, plan_bf16, tmp_path / "bf16")
    summary = run(tmp_path / "bf16", plan_fp8, tmp_path / "fp8")
    before, after = tensors_of(GOLDENS / case), tensors_of(tmp_path / "fp8")
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in after.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in before.items()
    }
    compared = exact = 0
    for name, values in before.items():
        if values.dtype != FP8:
            assert name.endswith("_scale_inv") or same_bytes(values, after[name]), name
            continue
        scales, ours = before[f"{name}_scale_inv"], after[f"{name}_scale_inv"]
        stack = values.reshape(-1, *values.shape[-2:]), after[name].reshape(-1, *values.shape[-2:])
        for matrix, (theirs, new) in enumerate(zip(*stack)):
            for rows, columns in blocks_of(theirs):
                grid = (rows.start // 128, columns.start // 128)
                scale = scales.reshape(-1, *scales.shape[-2:])[matrix][grid]
                top = theirs[rows, columns].float().abs().max()
                # A block whose largest value fills the range has the scale that quantising finds again, but for the
                # rounding of that value to bfloat16.
                if top == 448:
                    assert same_bytes(theirs[rows, columns].contiguous(), new[rows, columns].contiguous()), name
                    compared += 1
                    if (top * scale).bfloat16().float() == top * scale:
                        assert ours.reshape(-1, *ours.shape[-2:])[matrix][grid] == scale
                        exact += 1
    assert compared > 150
    report = summary.manifest["steps"][-1]["report"]
    assert 0 < report["sampled_squared_error"] < 0.002 * report["sampled_squared_weights"]
    assert report["blocks"] - report["changed_blocks"] >= compared


def test_the_error_report_counts_what_changed(tmp_path):
    # Quantising what came from FP8 with other scales moves weights by up to half a step, 1 in 16.
    run(GOLDENS / "longcat_fp8", plan_bf16, tmp_path / "bf16")
    summary = run(tmp_path / "bf16", plan_fp8, tmp_path / "fp8")
    plain, new = tensors_of(tmp_path / "bf16"), tensors_of(tmp_path / "fp8")
    error = weights = 0.0
    blocks = changed = 0
    for name, tensor in new.items():
        if tensor.dtype == FP8:
            decoded = cast_as_upstream(tensor, new[f"{name}_scale_inv"])
            for rows, columns in blocks_of(decoded):
                blocks += 1
                after, before = (part[rows, columns].view(torch.int16).int() for part in (decoded, plain[name]))
                changed += bool(((after - before).abs() > 1).any())
            decoded = decoded.double()
            error += (decoded - plain[name].double()).square().sum().item()
            weights += plain[name].double().square().sum().item()
    report = summary.manifest["steps"][-1]["report"]
    assert report["sampled_squared_weights"] == pytest.approx(weights, rel=1e-4)  # all of it: the matrices are small
    assert report["sampled_squared_error"] == pytest.approx(error, rel=0.05)
    assert (report["blocks"], report["changed_blocks"]) == (blocks, changed) and 0 < changed < blocks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [3, 128])
def test_changed_blocks_are_counted_exactly(rows, dtype):
    torch.manual_seed(rows)
    codes = torch.randn(rows, 300).mul(100).to(FP8)
    scales = torch.tensor([0.5, 0.25, 3.0])
    source = dequantize_block_fp8(codes, scales[None], (128, 128)).to(dtype)
    assert changed_blocks(codes, scales, source, 128) == 0
    source[-1, 299] = 1000.0  # the last number of the last block, behind the first rows
    assert changed_blocks(codes, scales, source, 128) == 1
    source[0, 0] = -1000.0
    assert changed_blocks(codes, scales, source, 128) == 2
    assert changed_blocks(codes, scales, torch.randn(rows, 300).to(dtype), 128) == 3


@pytest.mark.parametrize("shape", [(1, 1), (127, 129), (128, 128), (200, 300), (576, 256), (130, 1)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e5])
def test_rows_of_blocks_are_decoded_as_defined(shape, size):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    codes[(codes & 127) == 127] = 3  # no NaN; all other codes, the subnormal ones too
    codes = codes.view(FP8)
    scales = torch.rand(math.ceil(shape[0] / 128), math.ceil(shape[1] / 128), generator=generator) * size
    for block, rows in enumerate(codes.split(128)):
        assert torch.equal(decode_block_rows(rows, scales[block], 128), dequantize_block_fp8(rows, scales[block][None]))


@pytest.mark.parametrize("ue8m0", [False, True], ids=["float32", "ue8m0"])
@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (77, 300), (64, 513)])
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-3, 1.0, 1e30])
def test_rows_of_blocks_are_encoded_as_defined(shape, size, ue8m0):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(shape, generator=generator).mul_(torch.rand(shape[1], generator=generator).exp()) * size
    values[:, :1] = 0
    codes = torch.empty(shape, dtype=FP8)
    scales = encode_block_rows(values.clone(), codes, 128, ue8m0)
    expected_codes, expected_scales = quantize_block_fp8(values, ue8m0=ue8m0)
    assert torch.equal(scales[None], expected_scales)
    assert same_bytes(codes, expected_codes)
    half = values.bfloat16()
    scales = encode_block_rows(half.float(), codes, 128, ue8m0, half)
    expected_codes, expected_scales = quantize_block_fp8(half.float(), ue8m0=ue8m0)
    assert torch.equal(scales[None], expected_scales)
    assert same_bytes(codes, expected_codes)


def test_zero_blocks_and_blocks_at_the_limits_survive(tmp_path):
    tensors = tensors_of(GOLDENS / "v3_fp8")
    name = "model.layers.0.mlp.gate_proj.weight"
    codes = tensors[name].view(torch.uint8)
    codes[:128, :128] = 0
    codes[128:, 128:] = 0x80  # negative zeros
    folder = write(tmp_path / "in", config_of("v3_fp8"), tensors)
    run(folder, plan_bf16, tmp_path / "bf16")
    run(tmp_path / "bf16", plan_fp8, tmp_path / "fp8")
    after = tensors_of(tmp_path / "fp8")
    assert not after[name].float()[:128, :128].any()
    assert after[f"{name}_scale_inv"][0, 0] == 1  # never zero, by which engines divide
    assert same_bytes(after[name], tensors[name])


def config_of(case):
    """`config.json` of a golden."""
    return json.loads((GOLDENS / case / "config.json").read_text())


def write(folder, config, tensors):
    """A checkpoint of one file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def unpack(packed, scale, shape, group=32):
    """INT4 weights one by one."""
    output = torch.empty(shape)
    for row in range(shape[0]):
        for column in range(shape[1]):
            nibble = (int(packed[row, column // 8]) >> (4 * (column % 8))) & 15
            output[row, column] = (nibble - 8) * float(scale[row, column // group])
    return output


def test_int4_to_bfloat16(tmp_path):
    run(GOLDENS / "kimi_k2_int4", plan_bf16, tmp_path / "bf16")
    before, after = tensors_of(GOLDENS / "kimi_k2_int4"), tensors_of(tmp_path / "bf16")
    packed = [name for name in before if name.endswith(".weight_packed")]
    assert len(packed) == 2 * 24 * 3
    assert set(after) == {name.replace("_packed", "") for name in before if not name.endswith(("_scale", "_shape"))}
    for name in packed[::36]:
        stem = name.removesuffix("_packed")
        shape = before[f"{stem}_shape"].tolist()
        assert torch.equal(after[stem], unpack(before[name], before[f"{stem}_scale"], shape).bfloat16())
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert "quantization_config" not in config and config["torch_dtype"] == "bfloat16"


def test_int4_is_what_compressed_tensors_unpacks(tmp_path):
    compressed = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers", exc_type=ImportError)
    run(GOLDENS / "kimi_k2_int4", plan_bf16, tmp_path / "bf16")
    before, after = tensors_of(GOLDENS / "kimi_k2_int4"), tensors_of(tmp_path / "bf16")
    for name in [name for name in before if name.endswith(".weight_packed")]:
        stem = name.removesuffix("_packed")
        shape = torch.Size(before[f"{stem}_shape"].tolist())
        integers = compressed.unpack_from_int32(before[name], 4, shape)
        scale = before[f"{stem}_scale"].repeat_interleave(32, dim=1)[:, : shape[1]]
        assert same_bytes(after[stem], integers.to(torch.bfloat16) * scale), stem


def test_int4_to_fp8_quantises_what_kimi_k2_instruct_has_in_fp8(tmp_path):
    run(GOLDENS / "kimi_k2_int4", plan_fp8, tmp_path / "fp8")
    before, after = tensors_of(GOLDENS / "kimi_k2_int4"), tensors_of(tmp_path / "fp8")
    stem = "model.layers.2.mlp.experts.7.down_proj.weight"
    exact = unpack(before[f"{stem}_packed"], before[f"{stem}_scale"], before[f"{stem}_shape"].tolist())
    codes, scales = quantize_block_fp8(exact)  # from the exact products: no rounding to bfloat16 in between
    assert same_bytes(after[stem], codes) and same_bytes(after[f"{stem}_scale_inv"], scales)
    assert after["model.layers.0.self_attn.q_a_proj.weight"].dtype == FP8
    assert after["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16
    fields = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert fields == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }


@pytest.mark.parametrize("case", FP8_CASES)
def test_power_of_two_scales_there_and_back(case, tmp_path):
    run(GOLDENS / case, plan_fp8_ue8m0, tmp_path / "ue8m0")
    run(tmp_path / "ue8m0", plan_fp8, tmp_path / "fp8")
    before, powers, back = (tensors_of(folder) for folder in (GOLDENS / case, tmp_path / "ue8m0", tmp_path / "fp8"))
    assert json.loads((tmp_path / "ue8m0" / "config.json").read_text())["quantization_config"]["scale_fmt"] == "ue8m0"
    assert "scale_fmt" not in json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    for name, values in before.items():
        if values.dtype == FP8:
            exact = dequantize_block_fp8(values, before[f"{name}_scale_inv"])
            codes, scales = quantize_block_fp8(exact, ue8m0=True)
            assert same_bytes(powers[name], codes) and same_bytes(powers[f"{name}_scale_inv"], scales), name
            assert (torch.frexp(scales).mantissa == 0.5).all()
    # Powers of two are float32 scales, too: nothing is lost by keeping them.
    assert all(same_bytes(powers[name], back[name]) for name in powers)


def test_scales_of_eight_bits_become_float32(tmp_path):
    tensors = tensors_of(GOLDENS / "v3_fp8")
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        powers = torch.exp2(torch.log2(tensors[name]).round())
        tensors[name] = powers.to(torch.float8_e8m0fnu)
    config = config_of("v3_fp8")
    config["quantization_config"]["scale_fmt"] = "ue8m0"
    folder = write(tmp_path / "in", config, tensors)
    run(folder, plan_fp8_ue8m0, tmp_path / "out")
    run(folder, plan_bf16, tmp_path / "bf16")
    after, plain = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "bf16")
    for name, tensor in tensors.items():
        assert same_bytes(after[name], tensor.float() if tensor.dtype == torch.float8_e8m0fnu else tensor)
        if tensor.dtype == FP8:
            assert same_bytes(plain[name], cast_as_upstream(tensor, tensors[f"{name}_scale_inv"].float()))


@pytest.mark.parametrize(("case", "plan"), [("v3_basic", plan_bf16), ("v3_fp8", plan_fp8)])
def test_a_source_of_the_format_is_told_so(case, plan, tmp_path):
    with pytest.raises(CheckpointError, match="has this format already"):
        run(GOLDENS / case, plan, tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("case", ["longcat_flash", "v3_basic"])
def test_wide_floats_become_bfloat16_but_for_routing(case, tmp_path):
    tensors = {name: tensor.float() for name, tensor in tensors_of(GOLDENS / case).items()}
    folder = write(tmp_path / "in", {**config_of(case), "torch_dtype": "float32"}, tensors)
    run(folder, plan_bf16, tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    kept = {name for name, tensor in after.items() if tensor.dtype == torch.float32}
    routing = ("e_score_correction_bias", "router.classifier.weight")
    assert kept == {name for name in tensors if name.endswith(routing)} and kept
    for name, tensor in tensors.items():
        assert same_bytes(after[name], tensor if name in kept else tensor.bfloat16())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_configuration_keeps_its_keys_and_their_order(tmp_path):
    run(GOLDENS / "v3_fp8", plan_bf16, tmp_path / "bf16")
    run(tmp_path / "bf16", plan_fp8, tmp_path / "fp8")
    before = config_of("v3_fp8")
    after = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert list(after) == [key for key in before if key != "quantization_config"]
    assert all(after[key] == before[key] for key in after)
    again = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert again == before and list(again) == [*after, "quantization_config"]


def test_a_configuration_inside_of_another_is_edited_too(tmp_path):
    config = config_of("step3_vl")
    tensors = tensors_of(GOLDENS / "step3_vl")
    run(write(tmp_path / "in", config, tensors), plan_fp8, tmp_path / "fp8")
    nested = json.loads((tmp_path / "fp8" / "config.json").read_text())
    nested["text_config"]["quantization_config"] = nested.pop("quantization_config")
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(nested))
    run(tmp_path / "fp8", plan_bf16, tmp_path / "bf16")
    assert "quantization_config" not in (tmp_path / "bf16" / "config.json").read_text()
    vision = [name for name in tensors if name.startswith(("vision_model.", "vit_"))]
    after = tensors_of(tmp_path / "fp8")
    assert vision and all(same_bytes(after[name], tensors[name]) for name in vision)


def test_longcats_exempt_modules_stay(tmp_path):
    config = {**config_of("longcat_flash"), "disable_quant_module": ["self_attn", "mlps"]}
    run(write(tmp_path / "in", config, tensors_of(GOLDENS / "longcat_flash")), plan_fp8, tmp_path / "fp8")
    quantised = {name for name, tensor in tensors_of(tmp_path / "fp8").items() if tensor.dtype == FP8}
    assert quantised and all(".mlp.experts." in name or ".mtp.layers.0." in name for name in quantised)
    assert not any("self_attn" in name for name in quantised)
    assert is_exempt(config, "model.layers.0.self_attn.1.o_proj.weight")
    assert not is_exempt(config, "model.layers.0.mlp.experts.0.up_proj.weight")


KEPT = [
    ("deepseek_v3", "model.embed_tokens.weight"),
    ("deepseek_v3", "lm_head.weight"),
    ("deepseek_v3", "model.layers.3.mlp.gate.weight"),
    ("deepseek_v3", "model.layers.61.eh_proj.weight"),
    ("deepseek_v3", "model.layers.61.shared_head.head.weight"),
    ("deepseek_v3", "model.layers.0.self_attn.kv_a_layernorm.weight"),
    ("step3_vl", "model.layers.5.moe.gate.weight"),
    ("step3_vl", "model.layers.5.self_attn.inter_norm.weight"),
    ("step3_vl", "vision_model.transformer.layers.0.self_attn.out_proj.weight"),
    ("step3_vl", "vit_large_projector.weight"),
    ("longcat_flash", "model.layers.0.mlp.router.classifier.weight"),
    ("longcat_flash_ngram", "model.ngram_embeddings.post_projs.0.weight"),
    ("longcat_flash", "model.mtp.embed_tokens.weight"),
]
QUANTISED = [
    ("deepseek_v3", "model.layers.61.mlp.experts.255.down_proj.weight"),
    ("deepseek_v3", "model.layers.61.mlp.shared_experts.up_proj.weight"),
    ("kimi_k2", "model.layers.0.mlp.gate_proj.weight"),
    ("deepseek_v2", "model.layers.0.self_attn.q_proj.weight"),
    ("step3_text", "model.layers.5.moe.gate_proj.weight"),
    ("step3_text", "model.layers.5.share_expert.down_proj.weight"),
    ("step3_vl", "model.layers.0.self_attn.wq.weight"),
    ("longcat_flash", "model.layers.0.mlps.1.down_proj.weight"),
    ("longcat_flash", "model.mtp.layers.0.eh_proj.weight"),
    ("longcat_flash", "model.mtp.layers.0.transformer_layer.mlp.up_proj.weight"),
]


@pytest.mark.parametrize(
    ("model_type", "name", "quantised"), [(*row, False) for row in KEPT] + [(*row, True) for row in QUANTISED]
)
def test_what_releases_quantise(model_type, name, quantised):
    assert is_quantized(find_family({"model_type": model_type}), name) is quantised


def test_families_are_found_without_a_model_type():
    known = {
        "DeepseekV3ForCausalLM": "deepseek_v3",
        "DeepseekV2ForCausalLM": "deepseek_v2",
        "Step3VLForConditionalGeneration": "step3_vl",
        "Step3TextForCausalLM": "step3_text",
        "LongcatFlashForCausalLM": "longcat_flash",
        "LongcatFlashNgramForCausalLM": "longcat_flash_ngram",
        "LongcatCausalLM": "longcat",
        "LongcatNextForCausalLM": "longcat_next",
    }
    for architecture, model_type in known.items():
        assert find_family({"architectures": [architecture]}).model_type == model_type
    assert find_family({"model_type": "llama", "architectures": ["DeepseekV3ForCausalLM"]}) is None


def test_every_registered_family_says_what_to_quantise():
    assert all(find_family({"model_type": model_type}).fp8_weights for model_type in FAMILIES)


def test_mtp_layers_are_converted(tmp_path):
    run(GOLDENS / "v3_mtp2", plan_fp8, tmp_path / "fp8")
    after = tensors_of(tmp_path / "fp8")
    depths = config_of("v3_mtp2")["num_nextn_predict_layers"]
    first = config_of("v3_mtp2")["num_hidden_layers"]
    for layer in range(first, first + depths):
        assert after[f"model.layers.{layer}.mlp.experts.0.up_proj.weight"].dtype == FP8
        assert after[f"model.layers.{layer}.eh_proj.weight"].dtype == torch.bfloat16
