"""Which optimiser a name means."""

import torch
from torch import nn

from .arguments import FinetuneArguments
from .muon import Muon, muon_groups
from .partition import whole_shape

MUON = ("muon", "muonclip")
ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw")


def build_optimizer(model: nn.Module, args: FinetuneArguments) -> torch.optim.Optimizer:
    """The optimiser of `args.optim` for all parameters of `model` that require a gradient.

    Raises:
        ValueError: for an unknown name, and for a model in which nothing is trained.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("nothing is trained: no parameter of the model requires a gradient")
    if args.optim in ADAMW:
        return build_adamw(model, args)
    if args.optim in MUON:
        return Muon(
            muon_groups(model, weight_decay=args.weight_decay),
            lr=args.learning_rate,
            momentum=args.muon_momentum,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
        )
    raise ValueError(f"--optim must be one of {', '.join((*ADAMW, *MUON))}, got {args.optim!r}")


def build_adamw(model: nn.Module, args: FinetuneArguments) -> torch.optim.AdamW:
    """AdamW that decays matrices alone: norms, biases and embeddings keep their scale."""
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    decayed, kept = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            plain = len(whole_shape(parameter)) < 2 or id(parameter) in embeddings
            (kept if plain else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=True if args.optim == "adamw_torch_fused" else None,
    )
