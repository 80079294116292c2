"""Inputs of the experts' tests: shapes, routings, weights of every format, and the double loop to compare with."""

from dataclasses import dataclass, replace

import torch

from hf_moe.models.op_expert_lora import ExpertLora


@dataclass(frozen=True)
class Shape:
    """Tokens, experts, choices; `routing` is "random", "empty" (half of the experts get nothing), "one" (all tokens on
    one expert), "skipped" (a third of the ids belong to no expert) or "nobody" (all of them)."""

    tokens: int
    experts: int
    top_k: int
    routing: str = "random"

    def __str__(self) -> str:
        return f"T{self.tokens}-E{self.experts}-K{self.top_k}-{self.routing}"


# As wide as the matrix of block FP8 MoE tests elsewhere: tokens from 1 to 8192.
MATRIX = [
    Shape(1, 2, 1),
    Shape(1, 8, 2),
    Shape(1, 16, 6),
    Shape(1, 256, 8),
    Shape(2, 256, 6),
    Shape(7, 8, 6),
    Shape(16, 16, 2),
    Shape(33, 2, 2),
    Shape(33, 256, 8),
    Shape(63, 8, 2),
    Shape(64, 16, 8),
    Shape(83, 256, 6),
    Shape(128, 8, 1),
    Shape(222, 16, 6),
    Shape(256, 2, 1),
    Shape(512, 8, 8),
    Shape(1024, 256, 2),
    Shape(1024, 16, 1),
    Shape(2048, 8, 6),
    Shape(4096, 16, 2),
    Shape(8192, 256, 1),
    Shape(8192, 2, 2),
    Shape(0, 8, 2),
    Shape(17, 8, 2, "empty"),
    Shape(1024, 16, 6, "empty"),
    Shape(1, 8, 1, "one"),
    Shape(200, 8, 1, "one"),
    Shape(4096, 16, 1, "one"),
    Shape(40, 8, 3, "skipped"),
    Shape(1000, 16, 8, "skipped"),
    Shape(5, 8, 2, "nobody"),
]


def route(shape: Shape, seed: int = 0) -> torch.Tensor:
    """(T, K) int64 ids, without repetition inside a token (but for "one")."""
    generator = torch.Generator().manual_seed(seed)
    if shape.routing == "one":
        return torch.full((shape.tokens, shape.top_k), shape.experts - 2)
    if shape.routing == "nobody":
        return torch.full((shape.tokens, shape.top_k), shape.experts)
    pool = shape.experts // 2 if shape.routing == "empty" else shape.experts
    ids = torch.rand(shape.tokens, pool, generator=generator).argsort(-1)[:, : shape.top_k]
    if shape.routing == "empty":
        ids = 2 * ids + 1
    if shape.routing == "skipped":
        skipped = torch.rand(ids.shape, generator=generator) < 1 / 3
        ids = ids.masked_fill(skipped, shape.experts).masked_fill(skipped & (torch.arange(shape.top_k) == 0), -1)
    return ids


@dataclass
class Case:
    """All arguments of `experts`."""

    hidden_states: torch.Tensor
    topk_indices: torch.Tensor
    topk_weights: torch.Tensor
    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    gate_up_scale: torch.Tensor | None = None
    down_scale: torch.Tensor | None = None
    lora: ExpertLora | None = None

    def arguments(self) -> tuple:
        return tuple(vars(self).values())

    def to(self, device: str) -> "Case":
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        if self.lora is not None:
            tensors = {name: value for name, value in vars(self.lora).items() if isinstance(value, torch.Tensor)}
            moved["lora"] = replace(self.lora, **{name: value.to(device) for name, value in tensors.items()})
        return replace(self, **moved)

    def widened(self) -> "Case":
        """The same values in float32: what a 16-bit result is compared with has no rounding of its own."""
        low = (torch.bfloat16, torch.float16)
        wide = {name: t.float() for name, t in vars(self).items() if isinstance(t, torch.Tensor) and t.dtype in low}
        if self.lora is not None:
            names = ("gate_up_a", "gate_up_b", "down_a", "down_b")
            factors = {name: getattr(self.lora, name) for name in names if getattr(self.lora, name) is not None}
            wide["lora"] = replace(self.lora, **{name: factor.float() for name, factor in factors.items()})
        return replace(self, **wide) if self.hidden_states.dtype in low else self


def quantize_blocks(weight: torch.Tensor, parts: int = 1, ue8m0: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(E, O, I) to e4m3 and scales (E, parts * ceil(O / parts / 128), ceil(I / 128)), block by block."""
    values, scales = [], []
    for piece in weight.float().chunk(parts, dim=1):
        rows, columns = (-(-size // 128) for size in piece.shape[1:])
        quantized = torch.empty(piece.shape, dtype=torch.float8_e4m3fn)
        scale = torch.empty(piece.shape[0], rows, columns)
        for row in range(rows):
            for column in range(columns):
                at = (slice(None), slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128))
                factor = piece[at].abs().amax((1, 2)) / 448
                if ue8m0:
                    factor = torch.exp2(torch.ceil(torch.log2(factor)))
                scale[:, row, column] = factor
                quantized[at] = (piece[at] / factor[:, None, None]).to(torch.float8_e4m3fn)
        values.append(quantized)
        scales.append(scale)
    scale = torch.cat(scales, 1)
    values = torch.cat([value.view(torch.uint8) for value in values], 1).view(torch.float8_e4m3fn)
    return values, scale.to(torch.float8_e8m0fnu) if ue8m0 else scale


def draw_dropout(
    hidden_states: torch.Tensor, top_k: int, intermediate: int, dropout: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks (T, H) and (T * K, I) of an `ExpertLora` with this dropout, from the generator of the device."""
    tokens, hidden = hidden_states.shape
    shapes = (tokens, hidden), (tokens * top_k, intermediate)
    return tuple(torch.rand(shape, device=hidden_states.device) >= dropout for shape in shapes)


def make_case(
    shape: Shape,
    hidden: int,
    inter: int,
    dtype: torch.dtype = torch.float32,
    weights: str = "plain",
    rank: int = 0,
    dropout: float = 0.0,
    lora_on: tuple[str, ...] = ("gate_up", "down"),
) -> Case:
    """`weights`: "plain", "fp8" or "fp8_ue8m0"; LoRA factors if `rank`."""
    generator = torch.Generator().manual_seed(1)

    def random(*sizes):
        return torch.randn(sizes, generator=generator)

    experts, slots = shape.experts, shape.tokens * shape.top_k
    case = Case(
        random(shape.tokens, hidden).to(dtype),
        route(shape),
        torch.rand(shape.tokens, shape.top_k, generator=generator) + 0.2,
        random(experts, 2 * inter, hidden) * hidden**-0.5,
        random(experts, hidden, inter) * inter**-0.5,
    )
    if dtype == torch.float64:
        case.topk_weights = case.topk_weights.double()
    if weights == "plain":
        case.gate_up_proj, case.down_proj = case.gate_up_proj.to(dtype), case.down_proj.to(dtype)
    else:
        ue8m0 = weights == "fp8_ue8m0"
        case.gate_up_proj, case.gate_up_scale = quantize_blocks(case.gate_up_proj, 2, ue8m0)
        case.down_proj, case.down_scale = quantize_blocks(case.down_proj, 1, ue8m0)
    if rank:
        sizes = {
            "gate_up_a": (experts, rank, hidden),
            "gate_up_b": (experts, 2 * inter, rank),
            "down_a": (experts, rank, inter),
            "down_b": (experts, hidden, rank),
        }
        factors = {
            name: (random(*size) * size[-1] ** -0.5).to(dtype)
            for name, size in sizes.items()
            if name.rsplit("_", 1)[0] in lora_on
        }
        torch.manual_seed(2)
        kept = draw_dropout(case.hidden_states, shape.top_k, inter, dropout) if dropout else (None, None)
        case.lora = ExpertLora(
            **factors,
            gate_up_scaling=0.5,
            down_scaling=0.75,
            kept_hidden=kept[0],
            kept_inner=kept[1],
            dropout=dropout,
        )
        assert slots == 0 or kept[1] is None or kept[1].shape == (slots, inter)
    return case


def double_loop(case: Case) -> torch.Tensor:
    """The sum over choices in float64, one token and one choice at a time, plain weights and no LoRA."""
    gate_up, down = case.gate_up_proj.double(), case.down_proj.double()
    hidden, weights = case.hidden_states.double(), case.topk_weights.double()
    output = torch.zeros_like(hidden)
    for token, ids in enumerate(case.topk_indices.tolist()):
        for choice, expert in enumerate(ids):
            if 0 <= expert < gate_up.shape[0]:
                gate, up = (gate_up[expert] @ hidden[token]).chunk(2)
                output[token] += weights[token, choice] * (down[expert] @ (gate / (1 + torch.exp(-gate)) * up))
    return output


def run_with_gradients(function, case: Case) -> dict[str, torch.Tensor]:
    """Output and every gradient, by name."""
    leaves, arguments = {}, dict(vars(case))
    for name in ("hidden_states", "topk_weights", "gate_up_proj", "down_proj"):
        if arguments[name].dtype != torch.float8_e4m3fn and (case.lora is None or "proj" not in name):
            leaves[name] = arguments[name] = arguments[name].detach().clone().requires_grad_()
    if case.lora is not None:
        names = ("gate_up_a", "gate_up_b", "down_a", "down_b")
        factors = {name: getattr(case.lora, name) for name in names if getattr(case.lora, name) is not None}
        factors = {name: factor.detach().clone().requires_grad_() for name, factor in factors.items()}
        leaves.update(factors)
        arguments["lora"] = replace(case.lora, **factors)
    output = function(*arguments.values())
    generator = torch.Generator().manual_seed(3)
    seed = torch.randn(output.shape, generator=generator).bfloat16()  # the same in every dtype
    output.backward(seed.to(output))
    return {"output": output, **{f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}}
