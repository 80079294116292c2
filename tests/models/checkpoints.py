"""Checkpoints as files, for the tests beside this one: goldens, edited copies of them, and comparisons bit for bit.

Reading and writing goes through the safetensors library, never through the code under test.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
REPOSITORY = Path(__file__).resolve().parents[2]
UNQUANTISED = ("v3_basic", "v3_qlora_none", "v3_mtp2", "v2_group_limited", "v2_lite_greedy", "kimi_k2")
QUANTISED = ("v3_fp8", "kimi_k2_int4")
CASES = UNQUANTISED + QUANTISED
# Absolute, on float32 logits against the expected values of a golden.
LOGITS_ATOL = 1e-4


def golden(case: str) -> Path:
    """Folder of a golden checkpoint."""
    return GOLDENS / case


def read_config(folder: Path) -> dict:
    """`config.json` of a folder, as it is written."""
    return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all weight files in a folder."""
    tensors = {}
    for path in sorted(Path(folder).glob("model*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def expected(case: str) -> dict[str, torch.Tensor]:
    """Expected values of a golden."""
    return load_file(golden(case) / "expected.safetensors")


def write_checkpoint(folder: Path, config: dict, tensors: dict[str, torch.Tensor], shards: int = 1) -> Path:
    """Writes an upstream checkpoint, in one file or in `shards` files with an index; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    names = sorted(tensors)
    for shard in range(shards):
        filename = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        held = names[shard::shards]  # interleaved: the parts of one expert are in different files
        save_file({name: tensors[name] for name in held}, folder / filename, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(held, filename))
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def edited_golden(folder: Path, case: str, edit=None, shards: int = 1, **config_changes) -> Path:
    """A copy of a golden after `edit(tensors)` and with some configuration keys changed (`None` values are written)."""
    tensors = read_tensors(golden(case))
    if edit is not None:
        edit(tensors)
    return write_checkpoint(folder, {**read_config(golden(case)), **config_changes}, tensors, shards)


def copy_golden(folder: Path, case: str) -> Path:
    """A verbatim copy of a golden's checkpoint files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(golden(case) / name, folder / name)
    return folder


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, as a flat uint8 tensor."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def assert_same_bits(name: str, actual: torch.Tensor, wanted: torch.Tensor) -> None:
    """Fails unless dtype, shape and every bit agree; says how many elements differ and where the first one is."""
    assert actual.dtype == wanted.dtype, f"{name}: {actual.dtype} instead of {wanted.dtype}"
    assert actual.shape == wanted.shape, f"{name}: {tuple(actual.shape)} instead of {tuple(wanted.shape)}"
    if torch.equal(raw_bytes(actual), raw_bytes(wanted)):
        return
    differing = (actual != wanted).flatten().nonzero().flatten()
    first = int(differing[0]) if len(differing) else -1  # -1: only the signs of zeros or NaN payloads differ
    raise AssertionError(
        f"{name}: {len(differing)} of {wanted.numel()} elements differ, first at flat index {first}: "
        f"{actual.flatten()[first].item()!r} instead of {wanted.flatten()[first].item()!r}"
    )


def assert_same_tensors(actual: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Fails unless both have the same names and, per name, the same dtype, shape and bits."""
    missing, surplus = sorted(set(wanted) - set(actual)), sorted(set(actual) - set(wanted))
    assert not missing and not surplus, f"missing {missing[:5]}, surplus {surplus[:5]}"
    for name in wanted:
        assert_same_bits(name, actual[name], wanted[name])


def max_difference(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest absolute difference, after a check of shapes and finiteness."""
    assert actual.shape == wanted.shape, f"{tuple(actual.shape)} instead of {tuple(wanted.shape)}"
    assert actual.isfinite().all(), "not finite"
    return (actual.double() - wanted.double()).abs().max().item()


def run_python(code: str, *arguments: str, interpreter: str = sys.executable, flags: tuple = (), **environment) -> str:
    """Runs `code` in a fresh process that can import the repository; returns its output, fails with its traceback."""
    environment = {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run(
        [interpreter, *flags, "-c", code, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-6000:]}"
    return result.stdout


class LogRecorder(logging.Handler):
    """Context manager: the warnings and errors that Transformers logs, as one text (`recorder.text`)."""

    def __init__(self):
        super().__init__(level=logging.WARNING)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"

    def __enter__(self):
        logging.getLogger("transformers").addHandler(self)
        return self

    def __exit__(self, *exception) -> None:
        logging.getLogger("transformers").removeHandler(self)


# --- an upstream checkpoint from its configuration, names and shapes written out by hand ------------------------------


def upstream_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the upstream tensors that belong to the keys of a `config.json`, MTP layers included."""
    hidden, heads, vocab = config["hidden_size"], config["num_attention_heads"], config["vocab_size"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    query_rank, rank = config["q_lora_rank"], config["kv_lora_rank"]
    expert, experts = config["moe_intermediate_size"], config["n_routed_experts"]
    main, depths = config["num_hidden_layers"], config.get("num_nextn_predict_layers", 0)
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    shapes["lm_head.weight"] = (vocab, hidden)

    def mlp(stem: str, width: int) -> None:
        shapes[f"{stem}.gate_proj.weight"] = (width, hidden)
        shapes[f"{stem}.up_proj.weight"] = (width, hidden)
        shapes[f"{stem}.down_proj.weight"] = (hidden, width)

    for layer in range(main + depths):
        stem = f"model.layers.{layer}"
        shapes[f"{stem}.input_layernorm.weight"] = (hidden,)
        shapes[f"{stem}.post_attention_layernorm.weight"] = (hidden,)
        if query_rank is None:
            shapes[f"{stem}.self_attn.q_proj.weight"] = (heads * (nope + rope), hidden)
        else:
            shapes[f"{stem}.self_attn.q_a_proj.weight"] = (query_rank, hidden)
            shapes[f"{stem}.self_attn.q_a_layernorm.weight"] = (query_rank,)
            shapes[f"{stem}.self_attn.q_b_proj.weight"] = (heads * (nope + rope), query_rank)
        shapes[f"{stem}.self_attn.kv_a_proj_with_mqa.weight"] = (rank + rope, hidden)
        shapes[f"{stem}.self_attn.kv_a_layernorm.weight"] = (rank,)
        shapes[f"{stem}.self_attn.kv_b_proj.weight"] = (heads * (nope + value), rank)
        shapes[f"{stem}.self_attn.o_proj.weight"] = (hidden, heads * value)
        if layer < config["first_k_dense_replace"] and layer < main:
            mlp(f"{stem}.mlp", config["intermediate_size"])
        else:
            shapes[f"{stem}.mlp.gate.weight"] = (experts, hidden)
            if config["topk_method"] == "noaux_tc":
                shapes[f"{stem}.mlp.gate.e_score_correction_bias"] = (experts,)
            for index in range(experts):
                mlp(f"{stem}.mlp.experts.{index}", expert)
            if config["n_shared_experts"]:
                mlp(f"{stem}.mlp.shared_experts", expert * config["n_shared_experts"])
        if layer >= main:
            shapes[f"{stem}.enorm.weight"] = shapes[f"{stem}.hnorm.weight"] = (hidden,)
            shapes[f"{stem}.shared_head.norm.weight"] = (hidden,)
            shapes[f"{stem}.eh_proj.weight"] = (hidden, 2 * hidden)
            shapes[f"{stem}.embed_tokens.weight"] = shapes[f"{stem}.shared_head.head.weight"] = (vocab, hidden)
    return shapes


def upstream_tensors(config: dict, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors for `upstream_shapes`: bias in float32, MTP duplicates equal to their originals."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in upstream_shapes(config).items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            tensors[name] = (1 + 0.1 * values).to(dtype)
        elif name.endswith("e_score_correction_bias"):
            tensors[name] = 0.1 * values
        else:
            tensors[name] = (values * shape[-1] ** -0.5).to(dtype)
    for name in tensors:
        if ".layers." in name and name.endswith(".embed_tokens.weight"):
            tensors[name] = tensors["model.embed_tokens.weight"].clone()
        elif name.endswith(".shared_head.head.weight"):
            tensors[name] = tensors["lm_head.weight"].clone()
    return tensors


# --- quantised formats, decoded here a second time, in float64 --------------------------------------------------------


def e4m3_values() -> torch.Tensor:
    """The 256 values of float8_e4m3fn by bit pattern, float64: 1 sign, 4 exponent (bias 7) and 3 mantissa bits."""
    values = []
    for bits in range(256):
        sign, exponent, mantissa = -1.0 if bits >> 7 else 1.0, (bits >> 3) & 15, bits & 7
        if exponent == 15 and mantissa == 7:
            values.append(float("nan"))
        elif exponent == 0:
            values.append(sign * mantissa / 8 * 2.0**-6)
        else:
            values.append(sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return torch.tensor(values, dtype=torch.float64)


def decode_fp8(weight: torch.Tensor, scale: torch.Tensor, block: int = 128) -> torch.Tensor:
    """Block FP8 to float64, element by element: row a and column b take the scale at (a // block, b // block)."""
    rows, cols = weight.shape
    decoded = e4m3_values()[weight.view(torch.uint8).long()]
    if scale.dtype == torch.float8_e8m0fnu:  # one byte, the biased exponent
        scale = 2.0 ** (scale.view(torch.uint8).double() - 127)
    row_blocks, col_blocks = torch.arange(rows) // block, torch.arange(cols) // block
    return decoded * scale.double()[row_blocks[:, None], col_blocks[None, :]]


def decode_int4(packed: torch.Tensor, scale: torch.Tensor, shape: torch.Tensor, group: int = 32) -> torch.Tensor:
    """Packed INT4 to float64: column 8 j + n is bits 4 n to 4 n + 3 of word j, less 8, times its group's scale."""
    rows, cols = shape.tolist()
    words = packed.long() & 0xFFFFFFFF
    columns = torch.arange(cols)
    nibbles = (words[:, columns // 8] >> (4 * (columns % 8))) & 15
    assert nibbles.shape == (rows, cols)
    return (nibbles - 8).double() * scale.double()[:, columns // group]


def decode_checkpoint(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A quantised checkpoint as float32 tensors under the plain names; what is not quantised stays as it is."""
    plain = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            plain[name] = decode_fp8(tensor, tensors[f"{name}_scale_inv"]).float()
        elif name.endswith(".weight_packed"):
            stem = name.removesuffix("_packed")
            plain[stem] = decode_int4(tensor, tensors[f"{stem}_scale"], tensors[f"{stem}_shape"]).float()
        elif not name.endswith(("weight_scale_inv", "weight_scale", "weight_shape")):
            plain[name] = tensor
    return plain


def quantise_fp8(weight: torch.Tensor, block: int = 128, power_of_two: bool = False):
    """(rows, cols) to float8_e4m3fn and float32 scales (ceil(rows / block), ceil(cols / block))."""
    rows, cols = weight.shape
    grid = (-(-rows // block), -(-cols // block))
    scale = torch.empty(grid)
    quantised = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(grid[0]):
        for j in range(grid[1]):
            area = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            scale[i, j] = weight[area].float().abs().max() / 448
            if power_of_two:
                scale[i, j] = 2.0 ** torch.ceil(torch.log2(scale[i, j]))
            quantised[area] = (weight[area].float() / scale[i, j]).to(torch.float8_e4m3fn)
    return quantised, scale


def is_fp8_name(name: str) -> bool:
    """Whether the published FP8 checkpoints quantise the tensor of this name."""
    kept = ("embed_tokens", "norm", "mlp.gate.", "eh_proj", "lm_head", "shared_head")
    return name.endswith("weight") and not any(part in name for part in kept)


def fused_experts(tensors: dict[str, torch.Tensor], num_experts: int) -> dict[str, torch.Tensor]:
    """Upstream tensors as the model holds them: experts stacked, gate rows first; other tensors as they are."""
    fused, stems = {}, set()
    for name, tensor in tensors.items():
        stem, found, _ = name.partition(".experts.")
        if found:
            stems.add(stem)
        else:
            fused[name] = tensor
    for stem in stems:
        parts = {
            kind: [tensors[f"{stem}.experts.{expert}.{kind}_proj.weight"] for expert in range(num_experts)]
            for kind in ("gate", "up", "down")
        }
        fused[f"{stem}.experts.down_proj"] = torch.stack(parts["down"])
        fused[f"{stem}.experts.gate_up_proj"] = torch.stack(
            [torch.cat(pair) for pair in zip(parts["gate"], parts["up"])]
        )
    return fused


def stored_dtype(case: str) -> torch.dtype:
    """The dtype of a golden's unquantised weights; two of the goldens have another one in their `torch_dtype`."""
    with safe_open(golden(case) / "model.safetensors", "pt") as stream:
        return stream.get_tensor("model.norm.weight").dtype
