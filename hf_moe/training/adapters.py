"""LoRA as the options describe it, and the memory that training takes."""

import torch
from torch import nn

from ..models.layer_head import LMHead
from ..units import bytes_text
from .arguments import FinetuneArguments
from .lora import check_targets, mtp_targets
from .partition import count_elements, whole_shape

EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
ALL_LINEAR = "all-linear"


def apply_lora(model: nn.Module, args: FinetuneArguments) -> nn.Module:
    """`model` inside of a PEFT model with the factors that the options ask for.

    Raises:
        ValueError: for a target that matches nothing.
    """
    from peft import LoraConfig, get_peft_model

    modules, parameters = args.lora_target_modules, args.lora_target_parameters
    if modules == [ALL_LINEAR]:
        modules = linear_modules(model)
    if args.lora_mtp == "only":
        if modules or parameters:
            raise ValueError("--lora_mtp only names its targets itself: leave --lora_target_* out")
        modules, parameters = mtp_targets(model)
    elif not modules and not parameters:
        modules, parameters = default_targets(model)
    if args.lora_mtp == "none":
        modules, parameters = (without_mtp_layers(model, names) for names in (modules, parameters))
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        # PEFT takes targets of its own choice where none is named; an empty list means no module at all.
        target_modules=modules or [],
        target_parameters=parameters or None,
        modules_to_save=args.lora_modules_to_save,
        use_rslora=args.use_rslora,
        task_type="CAUSAL_LM",
    )
    check_targets(model, config)
    return get_peft_model(model, config)


def linear_modules(model: nn.Module) -> list[str]:
    """The names of all linear modules but heads, as PEFT understands `all-linear`."""
    heads = {id(model.get_output_embeddings())}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, LMHead) and id(module) not in heads
    ]


def without_mtp_layers(model: nn.Module, targets: list[str] | None) -> list[str]:
    """The whole names of what `targets` match, outside of the MTP layers."""
    layers = model.model.mtp_layers() if hasattr(getattr(model, "model", None), "mtp_layers") else []
    inside = {id(part) for _, layer in layers for part in (*layer.modules(), *layer.parameters())}
    named = [*model.named_modules(), *model.named_parameters()]
    found: list[str] = []
    for target in targets or ():
        matched = [(name, part) for name, part in named if name == target or name.endswith(f".{target}")]
        # One that matches nothing stays, to be named.
        found += [name for name, part in matched if id(part) not in inside] if matched else [target]
    return found


def default_targets(model: nn.Module) -> tuple[list[str], list[str]]:
    """The linear modules of attention and the stacked experts, by the ends of their names."""
    modules = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".self_attn." in name
    }
    parameters = {
        ".".join(name.split(".")[-2:])
        for name, parameter in model.named_parameters()
        if len(whole_shape(parameter)) == 3 and name.rpartition(".")[2] in EXPERT_PARAMETERS
    }
    return sorted(modules), sorted(parameters)


def estimate_memory(model: nn.Module, optimizer_states: int = 2, shards: int = 1) -> str:
    """A line on what the weights, gradients and optimiser of one process take, without activations.

    `shards`: processes that share them out.
    """
    sizes = [(p, count_elements([p])) for p in model.parameters()]
    weights = sum(size * p.element_size() for p, size in sizes) / shards
    gradients = sum(size * p.element_size() for p, size in sizes if p.requires_grad) / shards
    optimizer = optimizer_states * gradients
    count, total = sum(size for p, size in sizes if p.requires_grad), sum(size for _, size in sizes)
    return (
        f"{count:,} of {total:,} parameters are trained ({100 * count / total:.2f} %). Memory: weights "
        f"{bytes_text(weights)}, gradients {bytes_text(gradients)}, optimiser {bytes_text(optimizer)}, together "
        f"{bytes_text(weights + gradients + optimizer)} and activations"
    )


def memory_hint(error: torch.OutOfMemoryError) -> str:
    """What to try when the device's memory was not enough."""
    return (
        f"{str(error).splitlines()[0]}\nTry, in this order: --gradient_checkpointing, a smaller "
        "--per_device_train_batch_size with more --gradient_accumulation_steps, a smaller --max_length, --bf16"
    )
