"""Gradient checkpointing whose recomputation takes the routes of the forward pass.

The recomputation of a layer sees inputs that may differ in the last bit (kernels that add in another order), and then
another expert may win: the gradient would be that of another network. Here every router's choice is kept, (T, K) ids
a layer, and taken again.
"""

import contextlib
import types
from contextvars import ContextVar

import torch
from torch import nn

from ..models.layer_router import TopkRouter

# What the checkpointed call that runs now does with routes: None, or ("record" | "replay", list of choices).
_ACTIVE: ContextVar[tuple[str, list[torch.Tensor]] | None] = ContextVar("routes", default=None)


@contextlib.contextmanager
def _routes(mode: str, choices: list[torch.Tensor]):
    token = _ACTIVE.set((mode, choices if mode == "record" else list(choices)))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def replay_contexts():
    """Contexts for the forward pass and the recomputation: `context_fn` of `torch.utils.checkpoint.checkpoint`."""
    choices: list[torch.Tensor] = []
    return _routes("record", choices), _ReplayOften(choices)


class _ReplayOften:
    """A context that may be entered again: with `retain_graph` a layer is recomputed more than once."""

    def __init__(self, choices: list[torch.Tensor]):
        self.choices, self.contexts = choices, []

    def __enter__(self):
        self.contexts.append(_routes("replay", self.choices))
        return self.contexts[-1].__enter__()

    def __exit__(self, *error):
        return self.contexts.pop().__exit__(*error)


def _route(self: TopkRouter, router_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    active = _ACTIVE.get()
    if active is not None and active[0] == "replay":
        topk_indices = active[1].pop(0)
        return self.weigh(router_logits, topk_indices), topk_indices
    topk_weights, topk_indices = type(self).route(self, router_logits)
    if active is not None:
        active[1].append(topk_indices)
    return topk_weights, topk_indices


def replay_routes(model: nn.Module) -> int:
    """Makes the routers of `model` replay inside of `replay_contexts`; returns how many there are."""
    routers = [module for module in model.modules() if isinstance(module, TopkRouter)]
    for router in routers:
        router.route = types.MethodType(_route, router)
    return len(routers)


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Switches gradient checkpointing on, with replayed routes; `model` is ours or a PEFT model around it."""
    replay_routes(model)
    # Transformers 5.23 renames the method.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": replay_contexts})
