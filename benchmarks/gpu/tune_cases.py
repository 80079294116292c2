"""What `tune.py` tries: launches at the layer shapes of released models, the most important first, and the tiles around
the shipped ones.

Candidates are what peers ship as measured on an H100 for such shapes, and neighbours of the shipped tile: more or fewer
steps loaded ahead, wider and narrower tiles, more programs on a multiprocessor.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from expert_kernels import DRY_MODELS, MODELS
from linear_fp8 import LAYERS
from occupancy import H100
from timing import copies_beyond_cache

from hf_moe.models import kernel_experts, kernel_experts_backward, kernel_fp8, kernel_mla, kernel_prefill
from hf_moe.models.kernel_mla import MlaTile
from hf_moe.models.kernel_prefill import PrefillTile
from hf_moe.models.kernel_routing import build_layout
from hf_moe.models.kernel_tiles import Tile, tile_rows

FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16
FAMILIES = ("experts", "mla_decode", "linear", "mla_prefill", "backward")
MAX_WIDE_BYTES = 64 << 20  # as in `op_experts_triton`: rows of slots in float32


class Problem(NamedTuple):
    """A launch with operands on a device."""

    launch: Callable[..., torch.Tensor]  # of the choices, and of which copy of the operands
    nbytes: float  # that have to be read
    flops: float
    copies: int = 1
    repeats: int = 1  # calls of each copy in one graph
    rate: float = H100.bfloat16
    step_bytes: Callable[[dict], int] | None = None  # of what is read from memory, in one step of a tile
    routing: tuple[torch.Tensor, int] | None = None


class Case(NamedTuple):
    """What is tuned: `names` are those that `kernel_tiles.trying` knows the launch by."""

    place: int
    label: dict
    kernel: str  # cases of one kernel compile the same
    names: tuple[str, ...]
    candidates: list[dict]
    build: Callable[[str], Problem]


# --- candidates -------------------------------------------------------------------------------------------------------

# By what is multiplied, and rows of a tile.
FEW = [(16, 64, 128, 4, 3, 0), (16, 64, 128, 4, 5, 0), (16, 128, 128, 4, 3, 0), (16, 128, 128, 4, 4, 0)]
FEW += [(16, 32, 128, 4, 5, 0), (16, 128, 128, 8, 4, 0), (16, 64, 64, 4, 5, 0)]
FEW_PLAIN = [*FEW, (16, 64, 256, 4, 3, 0), (16, 32, 256, 4, 4, 0), (16, 128, 64, 4, 5, 0)]
SOME = [(64, 128, 64, 4, 4, 2), (64, 128, 64, 8, 3, 2), (64, 256, 64, 8, 4, 1), (64, 128, 128, 4, 3, 1)]
SOME += [(64, 64, 64, 4, 4, 3), (32, 128, 64, 4, 4, 2), (16, 128, 128, 4, 3, 0)]
MANY = [(128, 128, 64, 8, 3, 2), (128, 256, 64, 8, 3, 1), (128, 128, 64, 4, 3, 2), (128, 128, 64, 8, 4, 1)]
MANY += [(64, 256, 64, 8, 4, 1), (64, 256, 64, 4, 3, 1), (64, 128, 64, 4, 4, 2), (64, 128, 64, 4, 3, 3)]
QUANTIZED = [(64, 128, 128, 4, 3, 2), (64, 128, 128, 4, 4, 2), (64, 128, 128, 4, 3, 3), (128, 128, 128, 8, 3, 1)]
QUANTIZED += [(128, 128, 128, 8, 4, 1), (64, 128, 128, 8, 4, 2), (128, 64, 128, 4, 3, 2)]
WIDENED = [(128, 128, 64, 8, 3, 1), (64, 128, 64, 4, 3, 2), (64, 128, 64, 4, 4, 2), (64, 128, 128, 4, 3, 2)]
WIDENED += [(128, 128, 128, 8, 3, 1), (128, 64, 64, 4, 3, 2)]


def expert_tiles(kind: str, part: str, tokens: int, mean: float) -> list[Tile]:
    if mean <= 16:
        tiles = FEW_PLAIN if kind == "bf16" else FEW
    elif mean <= 64:
        tiles = SOME if kind == "bf16" else WIDENED[1:4] + FEW[2:3]
    else:
        tiles = {"bf16": MANY, "w8a8": QUANTIZED, "w8a16": WIDENED}[kind]
        if kind == "w8a8" and part == "gate_up":  # two blocks of columns after one another
            tiles = [*tiles, (128, 256, 128, 8, 3, 1), (64, 256, 128, 4, 3, 1)]
        if kind == "w8a8":
            tiles = [*tiles, (128, 256, 128, 16, 3, 1)]
    return [Tile(*tile) for tile in tiles]


def fewer(count: int) -> int:
    return max(1, count // 2)


def twice(count: int) -> int:
    return 2 * count


# --- experts ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)  # both products of a layer
def stack(device: str, experts: int, rows: int, columns: int, fp8: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An experts' weight, all experts alike, and its scales; rows are those of gate and up if there are two parts."""
    weight = torch.empty(experts, rows, columns, dtype=FP8 if fp8 else BF16, device=device)
    if device != "meta":
        one = torch.randn(rows, columns, device=device) * (100.0 if fp8 else columns**-0.5)
        weight.copy_(one.clamp(-448, 448).to(weight.dtype).expand_as(weight))
    return weight, None


def scales(device: str, experts: int, rows: int, columns: int, parts: int) -> torch.Tensor:
    grid = parts * -(-rows // parts // 128), -(-columns // 128)
    return torch.full((experts, *grid), 0.01 * columns**-0.5, device=device)


def routed(device: str, tokens: int, experts: int, top_k: int) -> torch.Tensor:
    if device == "meta":
        return torch.empty(tokens, top_k, dtype=torch.int64, device=device)
    generator = torch.Generator().manual_seed(0)
    return torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :top_k].contiguous().to(device)


def values(device: str, *shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    if device == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.randn(shape, device=device).to(dtype)


def build_experts(sizes: tuple, tokens: int, kind: str, part: str, device: str) -> Problem:
    experts, hidden, inter, top_k = sizes
    slots, fp8, first = tokens * top_k, kind != "bf16", part == "gate_up"
    rows, columns = (2 * inter, hidden) if first else (hidden, inter)
    weight, _ = stack(device, experts, rows, columns, fp8)
    scale = scales(device, experts, rows, columns, 2 if first else 1) if fp8 else None
    x, x_scale = values(device, tokens if first else slots, columns), None
    if kind == "w8a8":
        x, x_scale = x.to(FP8), torch.ones(len(x), -(-columns // 128), device=device)
    ids, factors, layouts = routed(device, tokens, experts, top_k), torch.ones(slots, device=device), {}
    out_dtype = torch.float32 if slots * hidden * 4 <= MAX_WIDE_BYTES else BF16

    def launch(choices: dict, copy: int = 0) -> torch.Tensor:
        tile = choices.get(part)
        block_m = tile.block_m if tile else tile_rows(slots, experts, BF16)
        if block_m not in layouts:
            layouts[block_m] = build_layout(ids, experts, block_m)
        layout, given = layouts[block_m], {"x_scale": x_scale}
        if first:
            given["out_dtype"] = torch.float32 if kind == "w8a8" else BF16
            return kernel_experts.gate_up(x, weight, scale, layout, top_k, **given)[0]
        given.update(to_slots=True, factors=factors, out_dtype=out_dtype)
        return kernel_experts.multiply_rows(x, weight, scale, layout, top_k, **given)

    host_ids = routed("cpu", tokens, experts, top_k)
    size = weight.element_size()
    return Problem(
        launch,
        nbytes=host_ids.unique().numel() * rows * columns * size,
        flops=2 * slots * rows * columns,
        repeats=8 if slots <= 16 * experts else 1,
        rate=H100.float8 if kind == "w8a8" else H100.bfloat16,
        step_bytes=lambda tile: tile["block_n"] * tile["block_k"] * size,
        routing=(host_ids, experts),
    )


LAYERS_IN_ORDER = [("deepseek_v3", tokens, "w8a16") for tokens in (1, 16, 64, 4)]
LAYERS_IN_ORDER += [("deepseek_v3", tokens, "w8a8") for tokens in (8192, 4096)]
LAYERS_IN_ORDER += [("deepseek_v3", tokens, "bf16") for tokens in (8192, 4096, 1, 16, 64)]
LATER = [("longcat_flash", tokens, "w8a16") for tokens in (1, 16, 64)] + [("longcat_flash", 8192, "w8a8")]
LATER += [("longcat_flash", tokens, "bf16") for tokens in (8192, 1)]
LATER += [("step3", tokens, "w8a16") for tokens in (1, 64)] + [("step3", tokens, "w8a8") for tokens in (4096, 8192)]
LATER += [("step3", tokens, "bf16") for tokens in (4096, 8192, 1)]
LATER += [("kimi_k2", tokens, "w8a16") for tokens in (1, 64)] + [("kimi_k2", 8192, "w8a8"), ("kimi_k2", 8192, "bf16")]
LATER += [("deepseek_v3", 1024, kind) for kind in ("w8a16", "bf16")] + [("deepseek_v3", 4096, "w8a16")]
DRY_LAYERS = [("deepseek_v3", 1, "w8a16"), ("deepseek_v3", 20, "w8a8"), ("deepseek_v3", 20, "bf16")]


def expert_cases(layers: list, dry: bool) -> list[dict]:
    cases = []
    for model, tokens, kind in layers:
        sizes = (DRY_MODELS if dry else MODELS)[model]
        mean = tokens * sizes[3] / sizes[0]
        for part in ("gate_up", "rows"):
            label = {"family": "experts", "model": model, "tokens": tokens, "kind": kind, "part": part}
            wide = tokens * sizes[3] * sizes[1] * 4 <= MAX_WIDE_BYTES
            group = f"experts {sizes[1:]} {kind} {part} {tile_rows(tokens * sizes[3], sizes[0], BF16)} {wide}"
            tiles = expert_tiles(kind, part, tokens, mean)
            build = functools.partial(build_experts, sizes, tokens, kind, part)
            candidates = [{part: tile} for tile in tiles]
            cases.append({"label": label, "kernel": group, "names": (part,), "candidates": candidates, "build": build})
    return cases


# --- backward ---------------------------------------------------------------------------------------------------------

LORA_SIZES, LORA_TOKENS = (128, 2048, 768, 8), 4096  # PEFT's own figure is for these


def build_backward(sizes: tuple, tokens: int, part: str, device: str) -> Problem:
    experts, hidden, inter, top_k = sizes
    slots, rank = tokens * top_k, 16
    ids, factors, layouts = routed(device, tokens, experts, top_k), torch.ones(slots, device=device), {}
    name = "rows" if part.startswith("rows") else part
    if part == "inner_grad":
        operands = values(device, tokens, hidden), stack(device, experts, hidden, inter, False)[0]
        pre = values(device, slots, 2 * inter)
    elif part == "rows transposed":
        operands = values(device, slots, 2 * inter), stack(device, experts, 2 * inter, hidden, False)[0]
    elif part == "rows low":
        operands = values(device, tokens, hidden), stack(device, experts, rank, hidden, False)[0]
    else:
        operands = values(device, slots, 2 * inter), values(device, slots, rank)

    def launch(choices: dict, copy: int = 0) -> torch.Tensor:
        tile = choices.get(name)
        block_m = tile.block_m if isinstance(tile, Tile) else tile_rows(slots, experts, BF16)
        if block_m not in layouts:
            layouts[block_m] = build_layout(ids, experts, block_m)
        layout = layouts[block_m]
        if part == "inner_grad":
            return kernel_experts_backward.inner_grad(*operands, None, layout, top_k, pre, factors)[0]
        if part == "outer":
            return kernel_experts_backward.sum_outer(*operands, layout, top_k, out_dtype=BF16)
        given = {"transposed": True, "to_slots": True, "parts": 2} if part == "rows transposed" else {"gather": True}
        return kernel_experts.multiply_rows(*operands, None, layout, top_k, out_dtype=BF16, **given)

    inner = {"inner_grad": inter * hidden, "rows transposed": 2 * inter * hidden}
    return Problem(
        launch,
        nbytes=sum(operand.numel() * operand.element_size() for operand in operands),
        flops=2 * slots * inner.get(part, rank * (hidden if part == "rows low" else 2 * inter)),
        repeats=4,
        routing=None if part == "outer" else (routed("cpu", tokens, experts, top_k), experts),
    )


def backward_cases(dry: bool) -> list[dict]:
    sizes, tokens = ((4, 64, 32, 2), 20) if dry else (LORA_SIZES, LORA_TOKENS)
    tiles = {
        "rows transposed": MANY[:6],
        "inner_grad": [
            (128, 128, 64, 8, 3, 1),
            (128, 128, 64, 8, 3, 2),
            (64, 128, 64, 4, 3, 2),
            (128, 64, 64, 4, 3, 2),
        ],
        "rows low": [(128, 16, 128, 4, 4, 2), (128, 16, 64, 4, 4, 2), (64, 16, 128, 4, 4, 4), (128, 16, 64, 8, 4, 1)],
    }
    cases = []
    for part in ("rows transposed", "inner_grad", "rows low", "outer"):
        name = "rows" if part.startswith("rows") else part
        if part == "outer":
            changes = {"num_stages": 4}, {"num_warps": 8}, {"BLOCK_K": 128}, {"BLOCK_K": 32, "num_stages": 4}
            candidates = [{name: functools.partial(changed, change)} for change in changes]
        else:
            candidates = [{name: Tile(*tile)} for tile in tiles[part]]
        label = {"family": "backward", "model": "lora", "tokens": tokens, "kind": "bf16", "part": part}
        build = functools.partial(build_backward, sizes, tokens, part)
        cases.append({"label": label, "kernel": part, "names": (name,), "candidates": candidates, "build": build})
    return cases


def changed(change: dict, shipped: dict) -> dict:
    return shipped | change


# --- dense layers -----------------------------------------------------------------------------------------------------


def build_linear(sizes: tuple, rows: int, kind: str, device: str) -> Problem:
    out_features, in_features = sizes
    nbytes = out_features * in_features
    copies = 1 if device == "meta" else copies_beyond_cache(nbytes)
    grid = -(-out_features // 128), -(-in_features // 128)
    weights = [values(device, out_features, in_features).to(FP8) for _ in range(copies)]
    scale = torch.full(grid, 0.02, device=device)
    x, given = values(device, rows, in_features), {"out_dtype": BF16}
    if kind == "w8a8":
        x, given["x_scale"] = x.to(FP8), torch.ones(rows, grid[1], device=device)

    def launch(choices: dict, copy: int = 0) -> torch.Tensor:
        return kernel_fp8.multiply(x, weights[copy], scale, **given)

    return Problem(
        launch,
        nbytes,
        flops=2 * rows * nbytes,
        copies=copies,
        rate=H100.float8 if kind == "w8a8" else H100.bfloat16,
        step_bytes=lambda tile: tile["block_n"] * tile["block_k"],
    )


def linear_cases(dry: bool) -> list[dict]:
    layers = {"tiny": (40, 136)} if dry else LAYERS
    cases = []
    for rows in (2, 20) if dry else (1, 16, 64, 4096):
        for kind in ("w8a16", "w8a8"):
            for layer, sizes in layers.items():
                label = {"family": "linear", "layer": layer, "rows": rows, "kind": kind}
                if rows <= 16:
                    tiles = [FEW[0], FEW[1], FEW[2], FEW[4]]
                elif rows <= 128:
                    tiles = [(64, 64, 128, 4, 4, 2), (64, 128, 64, 4, 4, 2), (16, 64, 128, 4, 4, 0)]
                else:
                    tiles = QUANTIZED[:5] if kind == "w8a8" else WIDENED
                candidates = [{"linear": Tile(*tile)} for tile in tiles]
                if rows <= 128 and not dry:
                    candidates += [{"linear_splits": fewer}, {"linear_splits": lambda count: 1}]
                build = functools.partial(build_linear, sizes, rows, kind)
                names, group = ("linear", "linear_splits"), f"linear {sizes} {rows} {kind}"
                case = {"label": label, "kernel": group, "names": names, "candidates": candidates, "build": build}
                cases.append(case)
    return cases


# --- attention --------------------------------------------------------------------------------------------------------


def build_mla(batch: int, context: int, heads: int, masked: bool, device: str) -> Problem:
    nbytes = batch * context * (512 + 64) * 2
    copies = 1 if device == "meta" else copies_beyond_cache(nbytes)
    query, query_rope = values(device, batch, 1, heads, 512), values(device, batch, 1, heads, 64)
    caches = [(values(device, batch, context, 512), values(device, batch, context, 64)) for _ in range(copies)]
    mask = None
    if masked:  # padding on the left
        mask = torch.ones(batch, 1, context, dtype=torch.bool, device=device)
        mask[:, :, : context // 16] = False

    def launch(choices: dict, copy: int = 0) -> torch.Tensor:
        return kernel_mla.mla_decode(query, query_rope, *caches[copy], mask, 0.02)

    return Problem(
        launch,
        nbytes,
        flops=2 * batch * heads * context * (2 * 512 + 64),
        copies=copies,
        step_bytes=lambda tile: tile["block_n"] * (512 + 64) * 2,
    )


def mla_cases(dry: bool) -> list[dict]:
    tiles = [(64, 64, 8, 2, None), (64, 32, 8, 2, None), (64, 16, 8, 4, None), (32, 32, 8, 3, None)]
    tiles += [(32, 64, 8, 2, None), (32, 32, 4, 2, 255), (16, 32, 4, 3, 255), (64, 32, 8, 3, 255)]
    candidates = [{"mla_decode": MlaTile(*tile)} for tile in tiles]
    candidates += [{"mla_splits": fewer}, {"mla_splits": twice}]
    shapes = [(1, 32768, 128, False), (16, 32768, 128, False), (1, 32768, 64, False), (16, 32768, 64, False)]
    shapes += [(1, 4096, 128, False), (16, 4096, 128, False), (1, 32768, 16, False), (16, 32768, 128, True)]
    cases = []
    for batch, context, heads, masked in [(2, 40, 2, False)] if dry else shapes:
        label = {"family": "mla_decode", "batch": batch, "context": context, "heads": heads, "masked": masked}
        build = functools.partial(build_mla, batch, context, heads, masked)
        names, group = ("mla_decode", "mla_splits"), f"mla {heads} {masked}"
        cases.append({"label": label, "kernel": group, "names": names, "candidates": candidates, "build": build})
    return cases


def build_prefill(queries: int, context: int, heads: int, device: str) -> Problem:
    query, query_rope = values(device, 1, queries, heads, 128), values(device, 1, queries, heads, 64)
    expanded, key_rope = values(device, 1, context, heads * 256), values(device, 1, context, 64)
    out = torch.empty(1, queries, heads, 128, dtype=BF16, device=device)

    def launch(choices: dict, copy: int = 0) -> torch.Tensor:
        kernel_prefill.mla_prefill(query, query_rope, expanded, key_rope, None, context - queries, 0.07, out)
        return out.clone()

    seen = queries * context - queries * (queries - 1) // 2
    return Problem(launch, nbytes=expanded.numel() * 2, flops=2 * heads * seen * 320)


def prefill_cases(dry: bool) -> list[dict]:
    tiles = [(128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 2), (128, 32, 8, 4)]
    cases = []
    for queries, context, heads in [(40, 70, 2)] if dry else [(8192, 8192, 32), (2048, 32768, 32)]:
        label = {"family": "mla_prefill", "queries": queries, "context": context, "heads": heads}
        build = functools.partial(build_prefill, queries, context, heads)
        candidates = [{"mla_prefill": PrefillTile(*tile)} for tile in tiles]
        names = ("mla_prefill",)
        cases.append({"label": label, "kernel": "prefill", "names": names, "candidates": candidates, "build": build})
    return cases


def all_cases(dry: bool) -> list[Case]:
    """In the order of their importance."""
    linear = linear_cases(dry)
    few = [case for case in linear if case["label"]["rows"] <= 64]
    many = [case for case in linear if case not in few]
    first, later = (DRY_LAYERS, []) if dry else (LAYERS_IN_ORDER, LATER)
    cases = expert_cases(first, dry) + mla_cases(dry) + prefill_cases(dry) + few
    cases += expert_cases(later, dry) + backward_cases(dry) + many
    return [Case(place, **case) for place, case in enumerate(cases)]
