"""Models that several processes train: FP8 weights that stay as they are, and weights that one process reads.

FSDP2 cuts every parameter along its first dimension, FP8 values and their scales alike, and gathers those of a layer
while it runs; a layer's parameters of different dtypes travel as bytes, over NCCL and gloo. What stands in the way is
mixed precision: its `param_dtype` is cast to before gathering, and an FP8 number without its scale is another number.
Models with FP8 weights are therefore gathered as they are stored, and computed under autocast as without FSDP.

DDP sends all parameters around once, to be sure that they are the same; FP8 weights are left out, since they come from
one checkpoint, never change, and gloo does not move them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, disable_fsdp_ram_efficient_loading
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ..models.op_quant import FP8


def has_fp8(model: nn.Module) -> bool:
    """Whether parameters of `model` are FP8."""
    return any(parameter.dtype == FP8 for parameter in model.parameters())


def _uses_fsdp(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP


def uses_fsdp2(accelerator: Accelerator) -> bool:
    """Whether models are sharded by FSDP2."""
    return _uses_fsdp(accelerator) and getattr(accelerator.state.fsdp_plugin, "fsdp_version", 1) == 2


def keep_fp8(accelerator: Accelerator, model: nn.Module) -> bool:
    """Lets FSDP2 gather the FP8 weights of `model`, and all others, in the dtype that they are stored in.

    `hf-moe finetune` does this itself. For `Trainer`, `SFTTrainer` and own loops: call it before the model is prepared,
    with `trainer.accelerator`.

    Returns whether something was changed: not without FSDP, nor for a model without FP8 weights.

    Raises:
        ValueError: for FSDP1, which joins parameters to flat ones, and for Accelerate's own way to load once, which
            takes neither FP8 weights nor the buffers of routers.
    """
    if not _uses_fsdp(accelerator) or not has_fp8(model):
        return False
    plugin = accelerator.state.fsdp_plugin
    if not uses_fsdp2(accelerator):
        raise ValueError("FP8 weights are sharded by FSDP2: set `fsdp_version: 2`, or load with `dequantize=True`")
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "Accelerate's `cpu_ram_efficient_loading` knows no FP8 weights: switch it off, or use `hf-moe finetune`"
        )
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, param_dtype=None, reduce_dtype=None, output_dtype=None
        )
    return True


def hide_fp8_from_ddp(model: nn.Module) -> None:
    """Makes DDP pass over FP8 weights and their scales, which are frozen."""
    names = {
        f"{prefix}.{name}{suffix}"
        for prefix, module in model.named_modules()
        if getattr(module, "fp8", None) is not None
        for name in module.fp8_parts
        for suffix in ("", "_scale_inv")
    }
    if names:
        names.update(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
        # The one private thing: DDP has no public way yet. A test on two processes fails where it is gone.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def refuse_fp8_under_deepspeed(accelerator: Accelerator, model: nn.Module) -> None:
    """Raises `ValueError` where DeepSpeed would change scales of FP8 weights without a word, or could not send them."""
    if not has_fp8(model):
        return
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    if accelerator.mixed_precision != "no" or any(config.get(n, {}).get("enabled") for n in ("bf16", "fp16")):
        raise ValueError(
            "DeepSpeed rounds the scales of FP8 weights in mixed precision: shard them by FSDP2 "
            "(examples/accelerate/fsdp2.yaml), or set `mixed_precision: 'no'`"
        )
    if torch.distributed.get_backend() == "gloo":
        raise ValueError("gloo does not move the FP8 weights that DeepSpeed gathers: shard them by FSDP2")


def forward_context(accelerator: Accelerator, model: nn.Module):
    """The context to call a prepared model in: autocast where `keep_fp8` took FSDP2's own mixed precision away."""
    return accelerator.autocast() if _uses_fsdp(accelerator) and has_fp8(model) else nullcontext()


# --- weights that one process reads -----------------------------------------------------------------------------------


def reads_once(accelerator: Accelerator) -> bool:
    """Whether `cpu_ram_efficient_loading` is asked for: the main process reads the weights and deals them out.

    From then on Transformers no longer sees that option, of which it has a way of its own.
    """
    if not uses_fsdp2(accelerator):
        return False
    disable_fsdp_ram_efficient_loading()
    return bool(accelerator.state.fsdp_plugin.cpu_ram_efficient_loading)


def prepare(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer):
    """`accelerator.prepare(model, optimizer)`, for models with FP8 weights and weights that one process has, too.

    With `cpu_ram_efficient_loading` all processes get the values of the main one; what the others have does not count.
    Losses stay float32: Accelerate would have FSDP2 round what a model returns to bfloat16, sums over tokens too. So do
    the biases of routers, which are buffers: FSDP1 would round those.
    """
    if not _uses_fsdp(accelerator):
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            refuse_fp8_under_deepspeed(accelerator, model)
        elif accelerator.num_processes > 1:
            hide_fp8_from_ddp(model)
        return accelerator.prepare(model, optimizer)
    with _settings_restored(accelerator.state.fsdp_plugin):
        plugin, once = accelerator.state.fsdp_plugin, reads_once(accelerator)
        if uses_fsdp2(accelerator):
            plugin.cpu_ram_efficient_loading = False
            if plugin.mixed_precision_policy is not None:
                plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
        elif plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, buffer_dtype=None)
        keep_fp8(accelerator, model)
        whole = {}
        if once and accelerator.is_main_process:
            # Kept where they are; FSDP2 moves what it needs of them.
            whole = {name: parameter.detach() for name, parameter in model.named_parameters()}
        model, optimizer = accelerator.prepare(model, optimizer)
    if once:
        deal_out(model, whole, accelerator)
    return model, optimizer


@contextmanager
def _settings_restored(plugin) -> Iterator[None]:
    names = ("mixed_precision_policy", "cpu_ram_efficient_loading")
    before = {name: getattr(plugin, name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(plugin, name, value)


@torch.no_grad()
def deal_out(model: nn.Module, whole: dict[str, torch.Tensor], accelerator: Accelerator) -> None:
    """Gives every process its share of the parameters `whole`, by name, that the main one has; and its buffers.

    One parameter at a time is whole on the device, as bytes: gloo does not move FP8, and not every dtype is NCCL's.
    Before that it is cast as Accelerate cast what is trained: to float32 in mixed precision.
    """
    from accelerate.utils import fsdp2_canonicalize_names  # as old as FSDP2 in Accelerate

    device, main = accelerator.device, accelerator.is_main_process
    for name, parameter in fsdp2_canonicalize_names(dict(model.named_parameters())).items():
        if main:
            whole_bytes = _as_bytes(whole.pop(name).to(device, parameter.dtype))
        else:
            size = (*parameter.shape, parameter.element_size())
            whole_bytes = torch.empty(size, dtype=torch.uint8, device=device)
        if isinstance(parameter, DTensor):
            share = distribute_tensor(whole_bytes, parameter.device_mesh, parameter.placements).to_local()
            parameter = parameter.to_local()
        else:
            torch.distributed.broadcast(whole_bytes, src=0)
            share = whole_bytes
        _as_bytes(parameter.detach()).copy_(share)
    for buffer in model.buffers():
        torch.distributed.broadcast(_as_bytes(buffer), src=0)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as (..., bytes of an element)."""
    return tensor.unsqueeze(-1).view(torch.uint8)
