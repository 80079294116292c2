"""QK-Clip for latent attention: no attention logit grows beyond a threshold (Kimi-K2 report, section 2.1).

For each head, S is the largest scaled logit of a position that attention may look at, over the global batch of a step.
After the optimiser's step, where S exceeds the threshold tau, with gamma = tau / S:

- the head's rows of `q_b_proj` (`q_proj` without low-rank queries) that give the non-rotary query, and its rows of
  `kv_b_proj` that give the non-rotary key, are multiplied by sqrt(gamma);
- its rows that give the rotary query are multiplied by gamma, since the rotary key is shared by all heads.

Both parts of each logit then shrink by gamma. Fused attention does not tell its logits, so they are computed beside it,
without gradient, in blocks of queries: the first of attention's two products once more for every pass (twice with
gradient checkpointing), and a block of scores in memory. `interval` measures and clips every so many steps only.

Shapes: B batch, S queries, T keys, h heads.
"""

import math

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from .partition import reduction_device

# Elements of the scores that are held at a time.
_BLOCK_ELEMENTS = 1 << 24


@torch.no_grad()
def max_logits(
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    sequences: torch.Tensor | None = None,
) -> torch.Tensor:
    """Largest scaled logit of each head, (h,) float32, over the pairs that causal attention looks at.

    Args:
        query: (B, h, S, d).
        key: (B, h, T, d); the last S keys belong to the queries.
        attention_mask: boolean (True attends) or additive, broadcasting to (B, h, S, T); (B, T), non-zero for real
            keys; or `None`. Positions ahead of a query never count, whatever the mask says.
        scaling: softmax scale.
        sequences: (B or 1, T) integers: a query looks at keys of its own number only (packed sequences).
    """
    batch, heads, num_queries, _ = query.shape
    context = key.shape[2]
    largest = query.new_full((heads,), -math.inf, dtype=torch.float32)
    positions = torch.arange(context, device=query.device)
    size = max(1, _BLOCK_ELEMENTS // max(1, batch * heads * context))
    for start in range(0, num_queries, size):
        stop = min(start + size, num_queries)
        seen = context - num_queries + stop  # keys behind the last query of this block are ahead of all of them
        own = positions[seen - (stop - start) : seen]
        allowed = positions[:seen] <= own.unsqueeze(1)  # (block, seen)
        scores = torch.matmul(query[:, :, start:stop], key[:, :, :seen].transpose(2, 3)).float() * scaling
        if sequences is not None:
            allowed = allowed & (sequences[:, None, own, None] == sequences[:, None, None, :seen])
        if attention_mask is not None and attention_mask.dim() == 2:
            real = attention_mask[:, -context:].bool()
            allowed = allowed & real[:, None, None, :seen] & real[:, None, own, None]
        elif attention_mask is not None:
            block = attention_mask[:, :, start:stop, :seen] if attention_mask.shape[2] > 1 else attention_mask
            block = block[..., :seen]
            allowed = allowed & (block if block.dtype == torch.bool else block > -1e4)
        largest = torch.maximum(largest, scores.masked_fill(~allowed, -math.inf).amax((0, 2, 3)))
    return largest


class QKClip:
    """Watches every latent attention of `model`, MTP layers included, and clips after the optimiser's step.

        clip = QKClip(model)
        for batch in loader:
            model(**batch).loss.backward()
            optimizer.step()
            clip.step()                     # on every rank

    Args:
        model: a model of hf_moe with latent attention, possibly inside DDP or FSDP2.
        threshold: tau.
        interval: measure and clip in every so many steps.
        process_group: ranks that share a global batch; all of them if not given.

    Raises:
        ValueError: for a model without latent attention, with frozen, FP8 or adapted query or key projections, or with
            `mla_mode="absorbed"`, which has no keys to multiply with.
    """

    def __init__(self, model: nn.Module, threshold: float = 100.0, interval: int = 1, process_group=None):
        if not 0 < threshold < math.inf:
            raise ValueError(f"`threshold={threshold!r}` must be a positive number.")
        if interval < 1:
            raise ValueError(f"`interval={interval!r}` must be at least 1.")
        self.threshold, self.interval, self.process_group = threshold, interval, process_group
        self.layers = {
            name: module
            for name, module in model.named_modules()
            if any(base.__name__ == "LatentAttention" for base in type(module).__mro__)
        }
        if not self.layers:
            raise ValueError(f"{type(model).__name__} has no latent attention: QK-Clip is made for it.")
        for name, layer in self.layers.items():
            _check(name, layer)
        self._steps = 0
        self._largest: dict[str, torch.Tensor] = {}  # since the last step
        self.last: torch.Tensor | None = None  # (layers, heads) of the last step that measured
        for name, layer in self.layers.items():
            layer.observe_logits = self._observer(name)

    def detach(self) -> None:
        """Stops watching."""
        for layer in self.layers.values():
            layer.observe_logits = None

    def _observer(self, name: str):
        def observe(layer: nn.Module, query, key, attention_mask, first_head: int, arguments: dict) -> None:
            if not layer.training or self._steps % self.interval != self.interval - 1:
                return
            if not isinstance(attention_mask, torch.Tensor):
                attention_mask = None  # a block mask: packed sequences are read from the positions
            # Flash and flex attention separate packed sequences by themselves, the others by the mask alone.
            by_mask = layer.config._attn_implementation in ("eager", "sdpa")
            sequences = None if by_mask else _sequences(key, **arguments)
            found = max_logits(query.detach(), key.detach(), attention_mask, layer.scaling, sequences)
            # A maximum: that checkpointing computes a pass again does not matter.
            largest = self._largest.get(name)
            if largest is None:
                largest = self._largest[name] = found.new_full((layer.num_heads,), -math.inf)
            part = slice(first_head, first_head + found.numel())
            largest[part] = torch.maximum(largest[part], found)

        return observe

    @torch.no_grad()
    def step(self) -> None:
        """Takes the largest logits over ranks and micro-batches since the last call, and scales the weights of heads
        beyond the threshold. To be called on every rank after each step of the optimiser."""
        measured = self._steps % self.interval == self.interval - 1
        self._steps += 1
        if not measured:
            return
        heads = max(layer.num_heads for layer in self.layers.values())
        device = next(next(iter(self.layers.values())).parameters()).device
        device = reduction_device(device, self.process_group)
        largest = torch.full((len(self.layers), heads), -math.inf, device=device)
        for row, name in enumerate(self.layers):
            if name in self._largest:
                largest[row, : self._largest[name].numel()] = self._largest[name].to(device)
        self._largest = {}
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(self.process_group) > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.process_group)
        self.last = largest
        for row, layer in zip(largest, self.layers.values()):
            if layer.kv_b_proj.weight.requires_grad:  # not of an MTP layer that was frozen since
                factor = (self.threshold / row[: layer.num_heads].clamp(min=self.threshold)).nan_to_num(nan=1.0)
                clip_heads(layer, factor)

    def metrics(self) -> dict[str, float]:
        """`max_attention_logit` and `clipped_heads` (a share) of the last step that measured. Waits for the device."""
        if self.last is None or not self.last.isfinite().any():
            return {}
        heads = self.last[self.last.isfinite()]
        share = (heads > self.threshold).float().mean().item()
        return {"max_attention_logit": heads.max().item(), "clipped_heads": share}


@torch.no_grad()
def clip_heads(layer: nn.Module, factor: torch.Tensor) -> None:
    """Scales the weights of a latent attention so that the logits of head h are multiplied by `factor[h]`, (h,)."""
    nope, rope, value = layer.qk_nope_head_dim, layer.qk_rope_head_dim, layer.v_head_dim
    root = factor.sqrt()
    query = torch.cat((root[:, None].expand(-1, nope), factor[:, None].expand(-1, rope)), dim=1)
    key = torch.cat((root[:, None].expand(-1, nope), torch.ones_like(root)[:, None].expand(-1, value)), dim=1)
    _scale_rows(_query_projection(layer).weight, query.flatten())
    _scale_rows(layer.kv_b_proj.weight, key.flatten())


def _query_projection(layer: nn.Module) -> nn.Module:
    return layer.q_proj if hasattr(layer, "q_proj") else layer.q_b_proj


def _scale_rows(weight: torch.Tensor, factors: torch.Tensor) -> None:
    if hasattr(weight, "ds_id"):
        raise ValueError("QK-Clip cannot scale weights that DeepSpeed's ZeRO-3 cuts: use FSDP2.")
    column = factors.to(weight.device, weight.dtype).unsqueeze(1)
    if isinstance(weight, DTensor):
        by_row = [
            placement if isinstance(placement, Shard) and placement.dim == 0 else Replicate()
            for placement in weight.placements
        ]
        column = distribute_tensor(column, weight.device_mesh, by_row, src_data_rank=None)
    weight.mul_(column)


def _check(name: str, layer: nn.Module) -> None:
    if layer.config.mla_mode == "absorbed":
        raise ValueError("QK-Clip cannot see the keys of `config.mla_mode='absorbed'`: set it to 'auto'.")
    for projection in (_query_projection(layer), layer.kv_b_proj):
        weight = getattr(projection, "weight", None)
        if not hasattr(projection, "fp8_parts") or weight is None or not weight.requires_grad:
            raise ValueError(
                f"QK-Clip scales the query and key projections of {name}, which are frozen, adapted or FP8 here; it "
                "belongs to full fine-tuning."
            )


def _sequences(key: torch.Tensor, position_ids=None, cu_seq_lens_q=None, **arguments) -> torch.Tensor | None:
    """(B or 1, T) numbers of packed sequences; `None` where there is one."""
    context = key.shape[2]
    if cu_seq_lens_q is not None and key.shape[0] == 1:
        starts = torch.zeros(context + 1, dtype=torch.long, device=key.device)
        starts[cu_seq_lens_q.to(key.device).long().clamp(max=context)] = 1
        return starts[:-1].cumsum(0).unsqueeze(0)
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] != context:
        return None
    starts = nn.functional.pad((position_ids.diff(dim=1) != 1).long(), (1, 0))
    return starts.cumsum(1).to(key.device)
