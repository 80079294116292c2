"""The cost model: parameters, bytes and operations of an architecture.

Formulas and the symbols below are those of the Step3 report (arXiv 2507.19427, sections 3 and 4), with its conventions:
a multiplication and an addition are two operations; attention is what a decoded token does with the cache, without the
projections; the latent attention of DeepSeek is charged its full cache width for both products.

N context, L attention sublayers, h query heads, d head width, g key/value heads.
"""

import math
from dataclasses import dataclass

from .architecture import Architecture, Shape, count_elements

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}
PRECISIONS = ("fp32", "bf16", "fp8", "int4")
FP8_BLOCK = 128
INT4_GROUP = 32
# Parts of the main model, in the order of every table; MTP and vision stand beside it.
MAIN_PARTS = ("embedding", "head", "attention", "dense", "shared", "routed", "router", "norm")
PARTS = (*MAIN_PARTS, "mtp", "vision")


@dataclass(frozen=True)
class Part:
    """Elements of one part of a model, and how many of them a text token meets."""

    total: int
    active: float


def mlp_params(architecture: Architecture, width: int) -> int:
    return 3 * architecture.hidden_size * width


def parameters(a: Architecture) -> dict[str, Part]:
    """By part. MTP layers and vision count no active parameters: plain decoding of text does not run them."""
    table = a.vocab_size * a.hidden_size
    projections = a.ngram_tables * a.ngram_width * a.hidden_size
    attention = a.num_attentions * (a.attention.linear_params + a.attention.other_params)
    dense = a.num_dense * mlp_params(a, a.dense_width)
    shared = a.num_moe * mlp_params(a, a.shared_width)
    totals = {
        "embedding": table + a.ngram_rows * a.ngram_width + projections,
        "head": 0 if a.tied else table,
        "attention": attention,
        "dense": dense,
        "shared": shared,
        "routed": a.num_moe * a.num_experts * a.expert_params,
        "router": a.router_weights,
        "norm": a.norm_params,
        "mtp": count_elements(a.mtp_linears) + a.mtp_other,
        "vision": a.vision_params,
    }
    return {name: Part(total, active_of(a, name, total)) for name, total in totals.items()}


def active_of(a: Architecture, part: str, total: int) -> float:
    """How many of the `total` elements of a part a text token meets."""
    if part == "embedding":
        # The word table counts in full, as published figures have it; of an n-gram table one row does.
        return a.vocab_size * a.hidden_size + a.ngram_tables * a.ngram_width * (1 + a.hidden_size)
    if part == "routed":
        return total * a.real_experts_per_token / a.num_experts if a.num_experts else 0
    return 0 if part in ("mtp", "vision") else total


def total_params(parts: dict[str, Part]) -> int:
    """Elements of the main model: what releases print."""
    return sum(parts[name].total for name in MAIN_PARTS)


def active_params(parts: dict[str, Part], embedding: bool = True) -> int:
    return round(sum(parts[name].active for name in MAIN_PARTS if embedding or name != "embedding"))


# --- bytes ------------------------------------------------------------------------------------------------------------


def linear_bytes(linears: tuple[Shape, ...], precision: str) -> float:
    """Bytes of linear weights; FP8 with a float32 scale for each block of 128 x 128."""
    if precision == "fp8":
        blocks = sum(math.ceil(rows / FP8_BLOCK) * math.ceil(columns / FP8_BLOCK) for rows, columns in linears)
        return count_elements(linears) + 4 * blocks
    return count_elements(linears) * DTYPE_BYTES[precision]


def _mlp(a: Architecture, width: int) -> tuple[Shape, ...]:
    return ((width, a.hidden_size), (width, a.hidden_size), (a.hidden_size, width)) if width else ()


def checkpoint_bytes(a: Architecture, precision: str) -> int:
    """Bytes of the tensors of a checkpoint, MTP layers, the copies that they bring, and vision included.

    `fp8` is DeepSeek's format: attention, MLPs and experts, with block scales; the rest bfloat16. `int4` is that of
    Kimi-K2-Thinking: routed experts in groups of 32 with a bfloat16 scale; the rest bfloat16. Correction biases are
    float32.
    """
    rest = "bf16" if precision in ("fp8", "int4") else precision
    quantised = "fp8" if precision == "fp8" else rest
    expert = expert_bytes(a, precision)
    routed = a.num_moe * a.num_experts * expert
    if precision == "int4":  # those of MTP layers, too
        routed += a.mtp_experts * (expert - linear_bytes(_mlp(a, a.expert_width), quantised))
    linears = (
        a.num_attentions * linear_bytes(a.attention.linears, quantised)
        + a.num_dense * linear_bytes(_mlp(a, a.dense_width), quantised)
        + a.num_moe * linear_bytes(_mlp(a, a.shared_width), quantised)
        + linear_bytes(a.mtp_linears, quantised)
    )
    parts = parameters(a)
    others = sum(parts[name].total for name in ("embedding", "head", "norm", "vision"))
    others += a.num_attentions * a.attention.other_params + a.mtp_other + a.mtp_copies
    return round(linears + routed + others * DTYPE_BYTES[rest] + router_bytes(a, rest) + 4 * a.router_buffers)


def expert_bytes(a: Architecture, precision: str) -> float:
    """Bytes of one routed expert."""
    if precision == "int4":
        return a.expert_params * (0.5 + 2 / INT4_GROUP)
    return linear_bytes(_mlp(a, a.expert_width), precision)


def router_bytes(a: Architecture, precision: str) -> int:
    """Bytes of all routers of the main model, some of which stay in float32."""
    return a.router_weights * max(a.router_bytes, DTYPE_BYTES[precision])


def weight_bytes(a: Architecture, precision: str) -> dict[str, float]:
    """Bytes in memory of what decoding runs, `attention` (with head, norms and router) and `ffn`; no MTP, no vision."""
    rest = "bf16" if precision in ("fp8", "int4") else precision
    quantised = "fp8" if precision == "fp8" else rest
    parts = parameters(a)
    expert = expert_bytes(a, precision)
    others = sum(parts[name].total for name in ("embedding", "head", "norm"))
    others += a.num_attentions * a.attention.other_params
    ffn = a.num_dense * linear_bytes(_mlp(a, a.dense_width), quantised)
    ffn += a.num_moe * linear_bytes(_mlp(a, a.shared_width), quantised)
    linear = a.num_attentions * linear_bytes(a.attention.linears, quantised)
    return {
        "attention": linear + others * DTYPE_BYTES[rest] + router_bytes(a, rest),
        "ffn": ffn + a.num_moe * a.num_experts * expert,
        "attention_read": linear + (parts["head"].total or a.vocab_size * a.hidden_size) * DTYPE_BYTES[rest],
        "ffn_always_read": ffn,
        "expert": expert,
    }


def kv_cache_bytes(a: Architecture, context: int, batch: int = 1, kv_dtype: str = "bf16") -> int:
    """GQA and MFA: N L 2 g d; MLA: N L (kv_lora_rank + qk_rope_head_dim); times bytes per element and sequences."""
    return context * batch * a.num_attentions * a.attention.kv_elements * DTYPE_BYTES[kv_dtype]


# --- operations -------------------------------------------------------------------------------------------------------


def attention_flops(a: Architecture, context: int) -> int:
    """Of a decoded token, all layers, without linear layers. GQA and MFA: 4 N L h d; MLA: 4 N L h (512 + 64)."""
    return 4 * context * a.num_attentions * a.attention.heads * a.attention.score_width


def attention_flops_exact(a: Architecture, context: int) -> int:
    """As `attention_flops`, with the width that the values of latent attention really have (512)."""
    width = a.attention.score_width + a.attention.value_width
    return 2 * context * a.num_attentions * a.attention.heads * width


def linear_flops(a: Architecture) -> int:
    """Projections of attention: 2 L times their weights."""
    return 2 * a.num_attentions * a.attention.linear_params


def ffn_flops(a: Architecture) -> float:
    """Dense MLPs, shared and chosen experts: 2 times their weights."""
    parts = parameters(a)
    return 2 * sum(parts[name].active for name in ("dense", "shared", "routed"))


def other_flops(a: Architecture) -> dict[str, int]:
    """What the report leaves out: router, and head (with the projections of n-gram tables)."""
    ngram = a.ngram_tables * a.ngram_width * a.hidden_size
    router = a.num_moe * (a.num_experts + a.num_zero_experts) * a.hidden_size
    return {"router": 2 * router, "head": 2 * (a.vocab_size * a.hidden_size + ngram)}


def decode_flops(a: Architecture, context: int) -> float:
    """Everything a decoded token costs, with `attention_flops_exact`."""
    return attention_flops_exact(a, context) + linear_flops(a) + ffn_flops(a) + sum(other_flops(a).values())


def prefill_flops_per_token(a: Architecture, context: int) -> float:
    """Mean over a prompt of N tokens: causal attention over (N + 1) / 2 tokens, keys and values expanded per head.

    The head runs for the last token alone.
    """
    width = a.attention.prefill_width
    attention = 2 * (context + 1) / 2 * a.num_attentions * a.attention.heads * width
    other = other_flops(a)
    return attention + linear_flops(a) + ffn_flops(a) + other["router"] + other["head"] / context


def arithmetic_intensity(a: Architecture, kv_dtype: str = "bf16") -> float:
    """Operations of attention per byte of cache: 2 h / g for GQA and MFA, 4 h for MLA, with one byte per element."""
    return attention_flops(a, 1) / kv_cache_bytes(a, 1, 1, kv_dtype)
