"""Multi-matrix factorisation attention (Step3 report, arXiv 2507.19427, section 3): many query heads, one key head.

The queries of all heads come from one normed low-rank vector; all heads share one key and one value head, and the
cache holds those two, `2 d` values a token and layer. Two evaluation orders give the same function, and neither of them
makes a copy of keys or values per query head:

- **rows**: the heads become rows of one matrix product per sequence, (S h, d) x (d, T). The cache is read once,
  whatever the number of heads, and the scores are written and read besides. This is the definition (`"eager"`) and how
  a decode step runs under `"sdpa"`.
- **interface**: Transformers' attention interface with keys and values as stride-0 views over the heads (flash kernels
  take the single head as it is). For prompts, whose scores would be larger than the cache.

Traffic of a decode step, per layer and sequence, in elements: rows `2 T d` (keys and values once) and a few passes
over the `h T` scores. The plain form repeats keys and values first: it reads `2 T d`, writes `2 h T d` and reads those
again, `(4 h + 2) T d` or `2 h + 1` times as much: at h = 64, d = 256, T = 16,384 and bfloat16, 17 MB against 2.2 GB.

Shapes: B batch, S new tokens, T context (new tokens included), h query heads, d head_dim.
"""

import functools
from collections.abc import Callable

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .layer_dense import RMSNorm
from .layer_linear import Linear
from .layer_rope import rotate_halves
from .op_mla import latent_scores, weigh_and_sum
from .op_prefill import CausalMask

# Under `"sdpa"`, up to so many new tokens against a cache take the rows order. Measured with 64 heads of 256 in
# bfloat16 against 8,192 tokens, 2 cores: 1.4 against 157 ms for one, 37 against 68 ms for 16, and 243 against 335 ms
# for 64, where the scores are 8 times the size of the cache.
_ROWS_MAX_TOKENS = 16
# Entries of a mask that a block of queries has, where all of them together have none.
_MASK_ENTRIES = 1 << 24


def shared_head_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of many query heads to one key and value head, the heads as rows of one product.

    Args:
        query: (B, S, h, d).
        key, value: (B, 1, T, d).
        attention_mask: boolean (True attends) or additive, broadcasting to (B, h, S, T); `None` attends to all.
        scaling: softmax scale.
        dropout: dropout rate on the attention weights.

    Returns (B, S, h, d) and the weights (B, h, S, T). The softmax is in float32, or in float64 for a float64 model.
    """
    batch, seq, heads, _ = query.shape
    # The queries are scaled, not the scores, which are as long as the context.
    scores = latent_scores((query * scaling).flatten(1, 2), key.squeeze(1)).view(batch, seq, heads, -1)
    return weigh_and_sum(scores, attention_mask, value.squeeze(1), dropout)


class MultiMatrixAttention(nn.Module):
    """Step3's attention; parameter names are the upstream ones.

    `wq(inter_norm(q_proj(x)))` are the queries of all heads, `k_proj(x)` and `v_proj(x)` the one key and value. Rotary
    embedding turns all dimensions of queries and keys, in halves.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = 1  # the interface is handed a (repeated) view with a key head per query head
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.scaling = self.head_dim**-0.5

        self.q_proj = Linear(config.hidden_size, config.share_q_dim, bias=False)
        self.inter_norm = RMSNorm(config.share_q_dim, eps=config.rms_norm_eps)
        self.wq = Linear(config.share_q_dim, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = Linear(config.hidden_size, self.head_dim, bias=False)
        self.v_proj = Linear(config.hidden_size, self.head_dim, bias=False)
        self.o_proj = Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, S, hidden) to (B, S, hidden), and the attention weights (B, h, S, T) where the order has them.

        `attention_mask` is what the attention interface takes, or a `CausalMask`.
        """
        batch, seq, _ = hidden_states.shape
        cos, sin = position_embeddings
        query = self.wq(self.inter_norm(self.q_proj(hidden_states))).view(batch, seq, -1, self.head_dim)
        query = rotate_halves(query, cos, sin)  # (B, S, h, d)
        key = rotate_halves(self.k_proj(hidden_states).unsqueeze(2), cos, sin).transpose(1, 2)  # (B, 1, S, d)
        value = self.v_proj(hidden_states).unsqueeze(1)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        implementation = self.config._attn_implementation or "eager"
        dropout = self.attention_dropout if self.training else 0.0
        blocks = None
        if isinstance(attention_mask, CausalMask):
            context = attention_mask.past + seq
            key, value = key[:, :, :context], value[:, :, :context]  # a static cache has free slots behind
            if seq <= _ROWS_MAX_TOKENS:
                attention_mask = attention_mask.matrix(seq, query.device)
            elif attention_mask.past or attention_mask.real is not None:
                blocks, attention_mask = attention_mask, None
            else:
                attention_mask = None
        if self._takes_rows(implementation, seq, attention_mask):
            output, weights = shared_head_attention(query, key, value, attention_mask, self.scaling, dropout)
        else:
            if "flash" not in implementation:
                heads = query.shape[2]
                key, value = key.expand(-1, heads, -1, -1), value.expand(-1, heads, -1, -1)
            attention: Callable = ALL_ATTENTION_FUNCTIONS[implementation]
            attention = functools.partial(attention, self, dropout=dropout, scaling=self.scaling, **kwargs)
            if blocks is not None:
                output, weights = _attend_in_blocks(attention, query, key, value, blocks), None
            else:
                output, weights = attention(query.transpose(1, 2), key, value, attention_mask)  # (B, S, h, d)
                if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 4:  # flash attention's has 2
                    output = _fill_blind(output, value, attention_mask)
        # Kernels of other libraries, bitsandbytes on the CPU, take any input for contiguous.
        return self.o_proj(output.reshape(batch, seq, -1).contiguous()), weights

    def _takes_rows(self, implementation: str, seq: int, attention_mask: torch.Tensor | None) -> bool:
        if implementation == "eager":
            return True
        if implementation != "sdpa" or seq == 1:
            return implementation == "sdpa"
        # Without a mask, more than one query would need the causal one that the interface makes. An exported program
        # holds for every length.
        few = not torch.compiler.is_exporting() and seq <= _ROWS_MAX_TOKENS
        return few and isinstance(attention_mask, torch.Tensor)


def _fill_blind(output: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Gives queries that see nothing, which padding may be, the mean of all values, as eager attention does.

    The loss, in which the last padding token predicts the first real one, then does not depend on the implementation.
    PyTorch gives them zeros. An additive mask of large numbers would do it in the forward pass, but the backward pass
    of flash and of memory-efficient attention is wrong by large factors there: the logarithm that they keep of a
    row's sum has no room for the number of its keys beside the mask.

    Args:
        output: (B, S, h, d).
        value: (B, h or 1, T, d), the same for all heads.
        mask: (B or 1, 1, S, T); only a boolean one (True attends) is looked at.
    """
    if mask.dtype != torch.bool:
        return output
    blind = ~mask.any(-1).transpose(1, 2).unsqueeze(-1)  # (B or 1, S, 1, 1)
    mean = value[:, :1].mean(2, dtype=torch.promote_types(value.dtype, torch.float32)).unsqueeze(1)  # (B, 1, 1, d)
    return torch.where(blind, mean.to(output.dtype), output)


def _attend_in_blocks(attention: Callable, query, key, value, mask: CausalMask) -> torch.Tensor:
    """(B, S, h, d) of queries (B, S, h, d) that attend some at a time, to the keys up to the last one's own."""
    batch, seq, _, _ = query.shape
    context = mask.past + seq
    output, step = torch.empty_like(query), max(64, _MASK_ENTRIES // (batch * context))
    for start in range(0, seq, step):
        stop = min(start + step, seq)
        seen = mask.block(start, stop, mask.past + stop, query.device)
        keys, values = (tensor[:, :, : mask.past + stop] for tensor in (key, value))
        part, _ = attention(query[:, start:stop].transpose(1, 2), keys, values, seen)
        output[:, start:stop] = part if mask.real is None else _fill_blind(part, value, seen)
    return output
