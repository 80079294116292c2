"""Multi-head latent attention (DeepSeek-V2 report, arXiv 2405.04434, section 2.1) over a latent cache.

The cache holds, per token and layer, the normed latent `c` (kv_lora_rank) and one rotary key shared by all heads
(qk_rope_head_dim), and nothing else. Two evaluation orders give the same function:

- **expanded**: `c` goes through `kv_b_proj` into per-head keys and values; attention runs through Transformers'
  attention interface. Its cost per call has a term in context x latent x heads, paid again at every decode step. Only
  so many heads are expanded at a time as a bound allows, and of a long context, without gradients, a piece at a time.
- **absorbed**: the key half of `kv_b_proj` is applied to the queries and the value half to the attention output, so
  that scores and sums are taken against the latent itself, like multi-query attention with one head of width
  kv_lora_rank + qk_rope_head_dim. Cheaper for few queries, dearer for many. On GPUs one kernel does it.

Shapes: B batch, S new tokens, T context (new tokens included), h heads, n qk_nope_head_dim, p qk_rope_head_dim,
v v_head_dim, r kv_lora_rank.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .layer_dense import RMSNorm
from .layer_linear import Linear
from .layer_rope import rotate_halves, rotate_interleaved, yarn_softmax_gain
from .op_mla import decodes_on_kernels, latent_decode, latent_scores, weigh_and_sum
from .op_prefill import LONG_CONTEXT, CausalMask, latent_prefill

# Elements of per-head keys and values that expanded attention holds at a time where no gradient needs them all.
_EXPANDED_ELEMENTS = 1 << 26
# From so many queries on, PyTorch's flash attention is faster on the CPU, though it wants values as wide as keys: with
# heads of 192 and 128 in bfloat16, 33 instead of 65 ms for a prompt of 1,024 tokens. The other form, which takes any
# widths, also holds the scores of all heads.
_FLASH_QUERIES = 128

# What the calls that the absorbed order has more cost, in multiplications: measured with 4 heads and latents of 64 on a
# CPU, a step takes 2.7 ms expanded and 3.4 ms absorbed at 64 tokens, 3.4 and 3.9 ms at 500.
_ABSORBED_EXTRA_CALLS = 16_000_000

# Elements of the scores that absorbed attention holds at a time: 64 heads and 8,192 tokens, 128 queries.
_ABSORBED_SCORES = 1 << 26


def absorbed_is_cheaper(config, num_queries: int, context: int) -> bool:
    """Whether the absorbed order is cheaper for S = `num_queries` against T = `context`.

    Multiplications, expanded, per head: T r (n + v) to expand the context, S T (n + p + v) to attend. Absorbed, per
    head: S r (n + v) to move in and out of latent space, S T (2 r + p) to attend. The absorbed order is more calls,
    which decides for very small models. A plain function of shapes, so that launches are predictable.
    """
    latent, projections = config.kv_lora_rank, config.qk_nope_head_dim + config.v_head_dim
    expanded = context * latent * projections + num_queries * context * (projections + config.qk_rope_head_dim)
    absorbed = num_queries * latent * projections + num_queries * context * (2 * latent + config.qk_rope_head_dim)
    return config.num_attention_heads * (expanded - absorbed) > _ABSORBED_EXTRA_CALLS


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of attention: (B, h, S, d) queries against (B, h, T, d) keys; softmax in float32.

    `attention_mask` is boolean (True attends) or additive, and broadcasts to (B, h, S, T). Returns (B, S, h, v) and the
    weights (B, h, S, T).
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=_wide(query.dtype)).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a softmax: float32, or float64 for a float64 model."""
    return torch.promote_types(dtype, torch.float32)


def absorbed_attention(
    query: torch.Tensor,
    query_rope: torch.Tensor,
    latent: torch.Tensor,
    key_rope: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in latent space: every head reads the same (T, r + p) cache, once.

    Args:
        query: (B, S, h, r), queries in latent space.
        query_rope: (B, S, h, p).
        latent: (B, 1, T, r).
        key_rope: (B, 1, T, p).
        attention_mask: boolean (True attends) or additive, broadcasting to (B, h, S, T); `None` attends to all.
        scaling: softmax scale.
        dropout: dropout rate on the attention weights.

    Returns the attended latents (B, S, h, r) and the weights (B, h, S, T).
    """
    batch, seq, heads, _ = query.shape
    context = latent.shape[2]
    latent, key_rope = latent.squeeze(1), key_rope.squeeze(1)  # (B, T, r), (B, T, p)
    # Heads become rows of one matrix product per sequence: the cache is read once, not once a head.
    # The queries are scaled, not the scores, which are as long as the context.
    scores = latent_scores((query_rope * scaling).flatten(1, 2), key_rope)  # (B, S h, T)
    scores = latent_scores((query * scaling).flatten(1, 2), latent, add=scores)
    scores = scores.view(batch, seq, heads, context)
    return weigh_and_sum(scores, attention_mask, latent, dropout)


def absorbed_in_blocks(query, query_rope, latent, key_rope, attention_mask, *options):
    """`absorbed_attention` some queries at a time, where the scores of all are many; then without the weights."""
    _, seq, heads, _ = query.shape
    step = max(1, _ABSORBED_SCORES // max(1, query.shape[0] * heads * latent.shape[2]))
    if step >= seq:
        return absorbed_attention(query, query_rope, latent, key_rope, attention_mask, *options)
    attended = torch.empty_like(query)
    for start in range(0, seq, step):
        some, mask = slice(start, start + step), attention_mask
        if mask is not None and mask.shape[2] > 1:
            mask = mask[:, :, some]
        operands = query[:, some], query_rope[:, some], latent, key_rope, mask
        attended[:, some] = absorbed_attention(*operands, *options)[0]
    return attended, None


class LatentAttention(nn.Module):
    """Multi-head latent attention with both evaluation orders; parameter names are the upstream ones.

    `q_lora_rank` of `None` replaces `q_a_proj`, `q_a_layernorm` and `q_b_proj` by one `q_proj`. The two inner norms
    use an epsilon of 1e-6 whatever `rms_norm_eps` says, as the upstream modeling code does (it differs for
    Kimi-K2-Thinking and LongCat, whose `rms_norm_eps` is 1e-5). `mla_scale_q_lora` and `mla_scale_kv_lora` multiply
    the queries and the normed latent, as it is cached, by the square root of hidden_size over the rank.
    """

    # Set by training to see what attention multiplies, in the expanded order: called with the layer, queries
    # (B, g, S, n + p), keys (B, g, T, n + p), the mask, the number of the first of g heads, and the keyword arguments.
    observe_logits: Callable | None = None

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.num_key_value_groups = 1  # the expanded form has a key head for every query head
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.qk_head_dim = config.qk_head_dim
        self.v_head_dim = config.v_head_dim
        self.kv_lora_rank = config.kv_lora_rank
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.scaling = self.qk_head_dim**-0.5 * yarn_softmax_gain(config.rope_parameters)
        # LongCat's variance alignment. The factor on the queries goes into the softmax scale, where it costs nothing.
        if getattr(config, "mla_scale_q_lora", False):
            self.scaling *= (config.hidden_size / config.q_lora_rank) ** 0.5
        self.latent_scale = None
        if getattr(config, "mla_scale_kv_lora", False):
            self.latent_scale = (config.hidden_size / self.kv_lora_rank) ** 0.5
        self.rotate = rotate_interleaved if config.rope_interleave else rotate_halves

        query_width = self.num_heads * self.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = Linear(config.hidden_size, query_width, bias=False)
        else:
            self.q_a_proj = Linear(config.hidden_size, config.q_lora_rank, bias=config.attention_bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank)
            self.q_b_proj = Linear(config.q_lora_rank, query_width, bias=False)
        self.kv_a_proj_with_mqa = Linear(
            config.hidden_size, self.kv_lora_rank + self.qk_rope_head_dim, bias=config.attention_bias
        )
        self.kv_a_layernorm = RMSNorm(self.kv_lora_rank)
        self.kv_b_proj = Linear(
            self.kv_lora_rank, self.num_heads * (self.qk_nope_head_dim + self.v_head_dim), bias=False
        )
        self.o_proj = Linear(self.num_heads * self.v_head_dim, config.hidden_size, bias=config.attention_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        absorbed: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, S, hidden) to (B, S, hidden), and the attention weights (B, h, S, T) where the backend has them.

        `attention_mask` is what the attention interface takes, or a `CausalMask`, in the expanded order, and boolean
        or additive (B, 1, S, T) or `None` in the absorbed one.
        """
        batch, seq, _ = hidden_states.shape
        cos, sin = position_embeddings
        query = self._project_queries(hidden_states).view(batch, seq, -1, self.qk_head_dim)
        query_nope, query_rope = query.split_with_sizes([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        query_rope = self.rotate(query_rope, cos, sin)

        latent, key_rope = self.kv_a_proj_with_mqa(hidden_states).split_with_sizes(
            [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1
        )
        latent = self.kv_a_layernorm(latent)  # the rotary key is neither normed nor scaled
        if self.latent_scale is not None:
            latent = latent * self.latent_scale
        key_rope = self.rotate(key_rope.unsqueeze(2), cos, sin)  # (B, S, 1, p)
        # One head, four dimensions: the layout that every cache class expects.
        latent, key_rope = latent.unsqueeze(1), key_rope.transpose(1, 2)  # (B, 1, S, r), (B, 1, S, p)
        if past_key_values is not None:
            latent, key_rope = past_key_values.update(latent, key_rope, self.layer_idx)

        attend = self._attend_absorbed if absorbed else self._attend_expanded
        output, weights = attend(query_nope, query_rope, latent, key_rope, attention_mask, **kwargs)
        # Kernels of other libraries, bitsandbytes on the CPU, take any input for contiguous.
        return self.o_proj(output.reshape(batch, seq, -1).contiguous()), weights

    def _project_queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.config.q_lora_rank is None:
            return self.q_proj(hidden_states)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))

    def _attend_expanded(self, query_nope, query_rope, latent, key_rope, attention_mask, **kwargs):
        mask = self._mask_of_long_context(query_nope, latent, attention_mask, kwargs)
        if mask is not None:
            return self._attend_pieces(query_nope, query_rope, latent, key_rope, mask), None
        if isinstance(attention_mask, CausalMask):
            context = attention_mask.past + query_nope.shape[1]
            latent, key_rope = latent[:, :, :context], key_rope[:, :, :context]
            attention_mask = attention_mask.matrix(query_nope.shape[1], query_nope.device)
        query = torch.cat((query_nope, query_rope), dim=-1).transpose(1, 2)  # (B, h, S, n + p)
        size = self._heads_at_a_time(query.shape[1], latent)
        if size >= query.shape[1]:
            expanded = self._expand(latent.squeeze(1))
            return self._attend_heads(query, expanded, key_rope, attention_mask, **kwargs)
        parts, width = [], self.qk_nope_head_dim + self.v_head_dim
        for start, queries in zip(range(0, query.shape[1], size), query.split(size, dim=1)):
            expanded = self.kv_b_proj.outputs(latent.squeeze(1), start * width, (start + queries.shape[1]) * width)
            parts.append(self._attend_heads(queries, expanded, key_rope, attention_mask, start, **kwargs))
        outputs, weights = zip(*parts)
        return torch.cat(outputs, dim=2), None if weights[0] is None else torch.cat(weights, dim=1)

    def _mask_of_long_context(self, query, latent, attention_mask, kwargs: dict) -> CausalMask | None:
        """The mask for `_attend_pieces`; `None` where the attention interface has to attend."""
        if torch.compiler.is_compiling():
            return None
        if attention_mask is None:  # as the interface reads it: causal from the first token, or a single query
            attention_mask = CausalMask(latent.shape[2] - 1 if query.shape[1] == 1 else 0)
        if not isinstance(attention_mask, CausalMask) or attention_mask.past + query.shape[1] < LONG_CONTEXT:
            return None
        plain = self.config._attn_implementation == "sdpa" and self.observe_logits is None and not self._drops()
        causal = kwargs.get("is_causal") in (None, True) and getattr(self.config, "is_causal", True)
        if not plain or not causal or self._needs_grad(latent, query):
            return None
        return attention_mask

    def _attend_pieces(self, query_nope, query_rope, latent, key_rope, mask: CausalMask) -> torch.Tensor:
        """(B, S, h, v), with a piece of the context expanded at a time."""
        dtype, width = query_nope.dtype, self.qk_nope_head_dim + self.v_head_dim
        latent, key_rope = latent.squeeze(1), key_rope.squeeze(1)
        by_head = self._expands_by_head()

        def expand(first: int, count: int, start: int, stop: int) -> torch.Tensor:
            piece = latent[:, start:stop]
            if by_head:
                return self.kv_b_proj.outputs(piece, first * width, (first + count) * width).to(dtype)
            return self._expand(piece).to(dtype)

        # Under autocast, what was rotated is wider than what was projected.
        query_rope, key_rope = query_rope.to(dtype), key_rope.to(dtype)
        step = self._head_step() if by_head else 0
        return latent_prefill(query_nope, query_rope, key_rope, expand, mask, self.scaling, self.v_head_dim, step)

    def _expand(self, latent: torch.Tensor) -> torch.Tensor:
        """(B, T, r) to (B, T, h (n + v)), by whatever module `kv_b_proj` is."""
        return self.kv_b_proj(latent if type(self.kv_b_proj) is Linear else latent.contiguous())

    def _drops(self) -> float:
        return self.attention_dropout if self.training else 0.0

    def _needs_grad(self, *tensors: torch.Tensor) -> bool:
        """Whether a backward pass may go through the expansion."""
        trained = any(tensor.requires_grad for tensor in (*tensors, *self.kv_b_proj.parameters()))
        return torch.is_grad_enabled() and trained

    def _expands_by_head(self) -> bool:
        """Whether `kv_b_proj` gives some heads alone; a wrapped or sharded module gives all at once."""
        module = self.kv_b_proj
        hooked = hasattr(module, "_hf_hook") or module._forward_hooks or module._forward_pre_hooks
        return type(module) is Linear and not hooked and type(module.weight) in (torch.Tensor, nn.Parameter)

    def _head_step(self) -> int:
        """Heads that are expanded together come in multiples of this: FP8 weights in whole rows of blocks."""
        if self.kv_b_proj.fp8 is None:
            return 1
        rows, width = self.kv_b_proj.fp8.block_size[0], self.qk_nope_head_dim + self.v_head_dim
        return math.lcm(rows, width) // width

    def _heads_at_a_time(self, heads: int, latent: torch.Tensor) -> int:
        """How many heads to expand together, so that their keys and values stay within `_EXPANDED_ELEMENTS`."""
        if torch.compiler.is_compiling():
            return heads
        batch, _, context, _ = latent.shape
        # What kv_b_proj gives, and the keys with their rotary part.
        per_head = batch * context * (2 * self.qk_nope_head_dim + self.v_head_dim + self.qk_rope_head_dim)
        if heads * per_head <= _EXPANDED_ELEMENTS or not self._expands_by_head() or self._needs_grad(latent):
            return heads  # they are few, or autograd keeps them all
        step, size = self._head_step(), max(1, _EXPANDED_ELEMENTS // max(1, per_head))
        return max(1, size // step) * step

    def _attend_heads(self, query, expanded, key_rope, attention_mask, first_head: int = 0, **kwargs):
        """(B, g, S, n + p) queries of g heads and their (B, T, g (n + v)) keys and values to (B, S, g, v)."""
        sizes = [self.qk_nope_head_dim, self.v_head_dim]
        expanded = expanded.view(*expanded.shape[:-1], -1, sum(sizes)).transpose(1, 2)
        key_nope, value = expanded.split_with_sizes(sizes, dim=-1)  # (B, g, T, .)
        key = torch.cat((key_nope, key_rope.expand(-1, key_nope.shape[1], -1, -1)), dim=-1)
        if self.observe_logits is not None:
            self.observe_logits(self, query, key, attention_mask, first_head, kwargs)

        implementation = self.config._attn_implementation
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        # Flash kernels take one width for queries, keys and values.
        flash = "flash" in (implementation or "")
        if implementation == "sdpa" and query.device.type == "cpu" and not torch.compiler.is_exporting():
            flash = query.shape[2] >= _FLASH_QUERIES  # an exported program holds for every length
        pad = self.qk_head_dim - self.v_head_dim if flash else 0
        if pad > 0:
            value = nn.functional.pad(value, (0, pad))
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self._drops(),
            scaling=self.scaling,
            **kwargs,
        )
        return (output[..., : self.v_head_dim] if pad > 0 else output), weights

    def _attend_absorbed(self, query_nope, query_rope, latent, key_rope, attention_mask, **kwargs):
        key_half, value_half = self._kv_b_halves(query_nope)
        batch, seq = query_nope.shape[:2]
        # Into latent space, head by head: (h, B S, n) x (h, n, r).
        query = torch.bmm(query_nope.flatten(0, 1).transpose(0, 1), key_half)
        query = query.transpose(0, 1).view(batch, seq, -1, self.kv_lora_rank)  # (B, S, h, r)
        dropout, wants_weights = self._drops(), self._wants_weights(kwargs)
        if not dropout and not wants_weights and decodes_on_kernels(query, latent, attention_mask):
            attended, weights = latent_decode(query, query_rope, latent, key_rope, attention_mask, self.scaling), None
        else:
            attend = absorbed_attention
            if not torch.is_grad_enabled() and not wants_weights and not torch.compiler.is_compiling():
                attend = absorbed_in_blocks
            attended, weights = attend(query, query_rope, latent, key_rope, attention_mask, self.scaling, dropout)
        # And out of it: (h, v, r) x (h, r, B S). The weight goes first, since it must not be copied.
        output = torch.bmm(value_half, attended.flatten(0, 1).permute(1, 2, 0))
        return output.permute(2, 0, 1).view(batch, seq, -1, self.v_head_dim), weights  # (B, S, h, v)

    def _wants_weights(self, kwargs: dict) -> bool:
        """Whether attention weights are to be returned, which only the eager implementation promises."""
        wanted = kwargs.get("output_attentions") or getattr(self.config, "output_attentions", False)
        return bool(wanted) or self.config._attn_implementation == "eager"

    def _kv_b_halves(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`kv_b_proj` as its key part (h, n, r) and value part (h, v, r): the two alternate head by head."""
        if type(self.kv_b_proj) is Linear and not hasattr(self.kv_b_proj, "_hf_hook"):
            weight = self.kv_b_proj.plain_weight(like.dtype)
        else:
            # An adapter, a foreign layer or an offloaded one: the matrix is what the module makes of unit vectors.
            weight = self.kv_b_proj(torch.eye(self.kv_lora_rank, dtype=like.dtype, device=like.device)).t()
        sizes = [self.qk_nope_head_dim, self.v_head_dim]
        return weight.view(-1, sum(sizes), weight.shape[1]).split_with_sizes(sizes, dim=1)
