"""The language model head: logits, or the losses of its tokens without the logits of all of them."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .layer_linear import Linear
from .op_loss import IGNORE_INDEX, cross_entropy, linear_cross_entropy

# Tokens whose logits a head that we cannot look into is asked for at once, for a vocabulary of so many entries.
_HEAD_ELEMENTS = 1 << 23


class LMHead(Linear):
    """`Linear` from states to logits. With `targets` it returns the losses of its tokens instead.

    That the losses come out of the head's own `forward` is what lets a sharded head gather its weight for them.
    """

    def forward(self, hidden_states: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """(..., hidden) to (..., vocab); or (N, hidden) and `targets` (N,) to (N,), see `linear_cross_entropy`."""
        if targets is None:
            return super().forward(hidden_states)
        if _is_plain(self.weight):
            return linear_cross_entropy(hidden_states, self.weight, targets)
        return cross_entropy(super().forward(hidden_states), targets)


def head_losses(head: nn.Module, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Losses (N,) in float32 of states (N, hidden) whose next tokens are `targets` (N,), -100 for none.

    A head that is not a plain linear layer, or that has hooks (an adapter, tensor parallelism, another quantisation),
    is called as it is, for a few tokens at a time, and again in the backward pass. If it is also sharded over ranks, it
    is called once: ranks that have more tokens must not gather more often than others.
    """
    if _keeps_its_forward(head) and head.bias is None:
        if isinstance(head, LMHead):
            return head(states, targets=targets)
        if _is_plain(head.weight):  # what resizing the vocabulary leaves behind
            return linear_cross_entropy(states, head.weight, targets)
    vocab_size = getattr(head, "out_features", None) or 1 << 17
    step = max(1, states.shape[0] if _is_sharded(head) else _HEAD_ELEMENTS // vocab_size)
    losses = []
    for start in range(0, max(states.shape[0], 1), step):
        piece = states[start : start + step], targets[start : start + step]
        if torch.is_grad_enabled():
            losses.append(checkpoint(_called_losses, head, *piece, use_reentrant=False))
        else:
            losses.append(_called_losses(head, *piece))
    return torch.cat(losses)


def _called_losses(head: nn.Module, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = head(states)
    return cross_entropy(logits, targets.to(logits.device))


def _keeps_its_forward(head: nn.Module) -> bool:
    """Whether nothing but the weight stands between states and logits: no hooks, no forward that was replaced.

    The hooks of FSDP2 and ZeRO-3, and the forward of Accelerate's device maps, gather or move the weight and take any
    call.
    """
    is_linear = isinstance(head, LMHead) or type(head) is nn.Linear
    hooked = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks
    replaced = "forward" in vars(head) and not hasattr(head, "_hf_hook")
    return is_linear and not replaced and (not hooked or (isinstance(head, LMHead) and _is_sharded(head)))


def _is_sharded(head: nn.Module) -> bool:
    """Whether FSDP2 wraps the module itself, or ZeRO-3 its parameters."""
    wrapped = any(base.__name__ == "FSDPModule" for base in type(head).__mro__)
    return wrapped or any(hasattr(parameter, "ds_id") for parameter in head.parameters())


def _is_plain(weight: torch.Tensor) -> bool:
    """Whether `weight` is an ordinary tensor: not distributed, not quantised."""
    return type(weight) in (torch.Tensor, nn.Parameter) and weight.is_floating_point() and weight.itemsize > 1


def check_targets(targets: torch.Tensor, vocab_size: int) -> None:
    """Raises `IndexError` for labels (without -100) outside of the vocabulary."""
    if targets.numel():
        low, high = torch.stack(targets.aminmax()).tolist()
        if low < 0 or high >= vocab_size:
            raise IndexError(
                f"`labels` holds token ids from {low} to {high}, but the vocabulary has {vocab_size} entries; use "
                f"{IGNORE_INDEX} where there is no target."
            )
