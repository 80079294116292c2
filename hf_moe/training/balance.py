"""Keeping the router's load even while training: correction biases, balance losses, and what the load is.

`RouterBalance` attaches to a model, counts where the tokens of training passes go, adds balance losses to the loss of
the model, and moves the correction biases after each optimiser step:

    balance = RouterBalance(model, BalanceOptions.for_model(model))
    for batch in loader:
        model(**batch).loss.backward()      # holds the balance losses
        optimizer.step()
        balance.step()                      # on every rank
        log(balance.metrics())

The biases follow the load of the whole global batch: micro-batches since the last step are summed, and so are ranks,
by one all-reduce. A pass counts once, recomputed for gradient checkpointing or not; padding, positions that join two
packed sequences in an MTP layer, evaluation and passes without gradient do not count.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hf_moe.models.modeling_causal_lm import find_joints

from . import balance_losses as losses
from .expert_load import LayerLoad, Load
from .partition import reduction_device


@dataclass(frozen=True)
class BalanceOptions:
    """What is done about the balance; 0 switches a part off.

    Attributes:
        bias_update_rate: gamma of DeepSeek-V3, `b_i += gamma * sign(mean load - load_i)`; of LongCat, whose rule is
            proportional, mu of `b_i += mu * (K_e / (K N) - load_i / (K tokens))` for real experts. 0 freezes the
            biases. Routers without a correction bias (DeepSeek-V2, Step3) have nothing to update.
        sequence_loss: coefficient of DeepSeek-V3's sequence-wise loss, over choices by plain scores.
        expert_loss: coefficient of DeepSeek-V2's expert-level loss, over the router's choices.
        device_loss: coefficient of DeepSeek-V2's device-level loss, or LongCat's where there are zero experts.
        communication_loss: coefficient of DeepSeek-V2's loss on how many devices receive a token.
        num_devices: groups of consecutive experts that the last two speak of; `None` takes the router's groups.
        devices_per_token: devices that a token may go to (M); `None` takes the router's group limit.
        real_experts_per_token: K_e, how many real experts LongCat's tokens should get on average; `None` takes the
            share of real experts, `K N / (N + Z)`.

    Raises:
        ValueError: for values that are negative or not finite.
    """

    bias_update_rate: float = 0.0
    sequence_loss: float = 0.0
    expert_loss: float = 0.0
    device_loss: float = 0.0
    communication_loss: float = 0.0
    num_devices: int | None = None
    devices_per_token: int | None = None
    real_experts_per_token: float | None = None

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"`{field.name}={value!r}` must be a number of at least 0; 0 switches it off.")

    @classmethod
    def for_model(cls, model: nn.Module) -> "BalanceOptions":
        """The values that a family was published with: DeepSeek-V3 and Kimi-K2 gamma 0.001 and a sequence-wise loss of
        1e-4, DeepSeek-V2 losses of 0.003, 0.05 and 0.02 (the last two where routing is limited to groups).

        LongCat's mu is not published; 0.001 here. Step3's report names no balance loss, and gets none.
        """
        router = next(iter(find_routers(model).values()))
        if hasattr(router, "num_real_experts"):
            return cls(bias_update_rate=1e-3)
        if router.e_score_correction_bias is not None:
            return cls(bias_update_rate=1e-3, sequence_loss=1e-4)
        if type(router).__name__ != "TopkRouter":
            return cls()
        if router.num_group == 1:
            return cls(expert_loss=3e-3)
        return cls(expert_loss=3e-3, device_loss=0.05, communication_loss=0.02)

    def has_losses(self) -> bool:
        """Whether any balance loss is on."""
        return any((self.sequence_loss, self.expert_loss, self.device_loss, self.communication_loss))


def find_routers(model: nn.Module) -> dict[str, nn.Module]:
    """Routers of hf_moe's models by module name, wherever they are wrapped.

    Raises:
        ValueError: for a model without any.
    """
    # By name, not by class: a model that came with its own code has classes of its own.
    routers = {name: module for name, module in model.named_modules() if _is_a(module, "TopkRouter")}
    if not routers:
        raise ValueError(f"{type(model).__name__} has no routers of hf_moe: there is nothing to balance.")
    return routers


def _is_a(module: nn.Module, class_name: str) -> bool:
    return any(base.__name__ == class_name for base in type(module).__mro__)


def _decoder(model: nn.Module, router_name: str) -> nn.Module:
    """The decoder that a router belongs to: it is called with masks and positions, and holds `layers`."""
    stem = router_name
    while "." in stem:
        stem = stem.rpartition(".")[0]
        module = model.get_submodule(stem)
        if _is_a(module, "MoePreTrainedModel"):
            return module
    return model


@dataclass
class _Pass:
    """One training pass: its real tokens and sequences, and what its routers did so far."""

    real: torch.Tensor  # (batch, seq) bool
    sequences: torch.Tensor  # (batch, seq) int64
    count: int
    seen: set[str]
    routed: dict[str, tuple[torch.Tensor, torch.Tensor]]  # logits with gradient, choices

    def tokens(self, num_routed: int) -> losses.Sequences:
        """Of the main layers, or of an MTP layer, whose position i joins the states at i with a token further on."""
        length = num_routed // self.real.shape[0]
        ahead = self.real.shape[1] - length
        real, ids = self.real[:, :length], self.sequences[:, :length]
        if ahead:
            real = real & self.real[:, ahead:] & (ids == self.sequences[:, ahead:])
        return losses.Sequences(ids.flatten(), real.flatten(), self.count)


class RouterBalance:
    """Counts, losses and bias updates of every router of `model`, MTP layers included; see the module.

    Args:
        model: a causal language model of hf_moe, possibly inside PEFT, DDP or FSDP2.
        options: `BalanceOptions.for_model(model)` if not given.
        process_group: ranks that share a global batch; all of them if not given. Ranks that see the same tokens (tensor
            or expert parallelism) may be among them.

    Raises:
        ValueError: for a model without routers, or options that do not fit it.
    """

    def __init__(self, model: nn.Module, options: BalanceOptions | None = None, process_group=None):
        self.routers = find_routers(model)
        self.options = BalanceOptions.for_model(model) if options is None else options
        self.process_group = process_group
        self.bias_update_rate = self.options.bias_update_rate  # may be changed while training
        first = next(iter(self.routers))
        self.decoder = _decoder(model, first)
        self.model_name = type(self.decoder).__name__.removeprefix("FSDP")
        self._check_options()
        self._pass: _Pass | None = None
        self._counts: dict[str, torch.Tensor] = {}  # since the last step
        self._window: torch.Tensor | None = None  # (layers, E), since the last metrics
        self._total: torch.Tensor | None = None  # (layers, E), since the start
        self._loss_sum, self._loss_steps = 0.0, 0
        self._head = self._find_head(model)
        self._handles = [
            self.decoder.register_forward_pre_hook(self._begin_pass, with_kwargs=True),
            *(router.register_forward_hook(self._router_hook(name)) for name, router in self.routers.items()),
        ]
        if self._head is not None:
            self._head.auxiliary_loss = self._loss

    def _find_head(self, model: nn.Module) -> nn.Module | None:
        if not self.options.has_losses():
            return None
        for module in model.modules():
            if _is_a(module, "CausalLMMixin"):
                if module.auxiliary_loss is not None:
                    raise ValueError("The model already has a balance loss: call `detach()` on the other one first.")
                return module
        raise ValueError(f"{type(model).__name__} is no causal language model of hf_moe: it cannot add balance losses.")

    def _check_options(self) -> None:
        for router in self.routers.values():
            if self.options.device_loss or self.options.communication_loss:
                losses._group_size(self._num_real(router), self._num_devices(router))
            if hasattr(router, "num_real_experts") and self._real_per_token(router) > router.top_k:
                raise ValueError(
                    f"`real_experts_per_token={self.options.real_experts_per_token}` is more than the {router.top_k} "
                    "choices of a token."
                )
            break

    def detach(self) -> None:
        """Takes every hook off the model again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._head is not None:
            self._head.auxiliary_loss = None
            self._head = None

    # --- what a pass does ---------------------------------------------------------------------------------------------

    def _begin_pass(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = kwargs.get("input_ids", args[0] if args else None)
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        self._pass = None
        # Asked here, and not in the routers: reentrant checkpointing runs these without gradient at first.
        if not module.training or not torch.is_grad_enabled() or inputs is None or inputs.numel() == 0:
            return
        with torch.no_grad():
            names = ("attention_mask", "position_ids", "cu_seq_lens_q")
            arguments = {name: kwargs.get(name) for name in names}
            starts = find_joints(inputs, **arguments)
            starts[:, 0] = True
            ids = (starts.flatten().cumsum(0) - 1).view_as(starts)
            real = _real_tokens(arguments["attention_mask"], starts)
            # Without losses nobody asks how many sequences there are, which would wait for the device.
            count = 1 if self._head is None else int(ids[-1, -1]) + 1
        self._pass = _Pass(real, ids, count, set(), {})

    def _router_hook(self, name: str):
        def hook(router: nn.Module, args: tuple, output: tuple) -> None:
            current = self._pass
            # A second time is the recomputation of a checkpoint.
            if current is None or not router.training or name in current.seen:
                return
            # Not those in the output: expert parallelism may have cut them down to those of a rank.
            router_logits, chosen = output[0], router._last_topk_indices
            current.seen.add(name)
            self._count(name, router, current, chosen)
            if self._head is not None:
                if not torch.is_grad_enabled():
                    raise ValueError(
                        "Balance losses need the router's gradient, which reentrant checkpointing does not keep: pass "
                        "`gradient_checkpointing_kwargs={'use_reentrant': False}`."
                    )
                current.routed[name] = router_logits, chosen

        return hook

    @torch.no_grad()
    def _count(self, name: str, router: nn.Module, current: _Pass, chosen: torch.Tensor) -> None:
        real = current.tokens(chosen.shape[0]).real.to(chosen.device)
        # Padding counts as an expert that is cut off.
        kept = chosen.masked_fill(~real.unsqueeze(-1), router.num_experts).flatten()
        counts = torch.bincount(kept, minlength=router.num_experts + 1)[: router.num_experts]
        before = self._counts.get(name)
        self._counts[name] = counts if before is None else before + counts

    def _loss(self, has_target: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor | None:
        """Balance losses of the pass: the sum over routers, the mean over sequences by their number of targets.

        `has_target`: (batch, seq) bool, positions that count in the loss. `num_items`: targets of the global batch, if
        the loss is divided by them; then the sequences of all micro-batches and ranks weigh together what those of one
        pass weigh otherwise.
        """
        current = self._pass
        if current is None or not current.routed:
            return None
        routed, current.routed = current.routed, {}
        total = None
        for name, (router_logits, chosen) in routed.items():
            sequences = current.tokens(chosen.shape[0]).to(router_logits.device)
            values = self._sequence_losses(self.routers[name], router_logits, chosen, sequences)
            total = values if total is None else total + values.to(total.device)
        targets = losses.Sequences(current.sequences.flatten(), current.real.flatten(), current.count)
        targets = targets.sum(has_target.flatten().to(current.real.device, total.dtype)).to(total.device)
        if num_items is None:
            num_items = targets.sum().clamp(min=1)
        elif isinstance(num_items, torch.Tensor):
            num_items = num_items.to(total.device)
        loss = (total * targets).sum() / num_items
        self._loss_sum = self._loss_sum + loss.detach()
        return loss

    def _sequence_losses(self, router: nn.Module, router_logits, chosen, sequences) -> torch.Tensor:
        """(S,) all losses of one router, times their coefficients."""
        options, num_devices = self.options, self._num_devices(router)
        probability = losses.probabilities(router_logits, router.scoring_func)
        result = probability.new_zeros(sequences.count)
        if options.sequence_loss:
            plain = losses.plain_choices(router_logits, router.top_k)
            result = result + options.sequence_loss * losses.expert_loss(probability, plain, sequences)
        if options.expert_loss:
            result = result + options.expert_loss * losses.expert_loss(probability, chosen, sequences)
        if options.device_loss and hasattr(router, "num_real_experts"):
            split = (num_devices, router.num_real_experts, self._real_per_token(router))
            values = losses.zero_expert_device_loss(probability, chosen, sequences, *split)
            result = result + options.device_loss * values
        elif options.device_loss:
            values = losses.device_loss(probability, chosen, sequences, num_devices)
            result = result + options.device_loss * values
        if options.communication_loss:
            limit = options.devices_per_token or router.topk_group
            values = losses.communication_loss(probability, chosen, sequences, num_devices, limit)
            result = result + options.communication_loss * values
        return result

    def _num_devices(self, router: nn.Module) -> int:
        return self.options.num_devices or router.num_group

    def _num_real(self, router: nn.Module) -> int:
        return getattr(router, "num_real_experts", router.num_experts)

    def _real_per_token(self, router: nn.Module) -> float:
        share = router.num_real_experts / router.num_experts
        return self.options.real_experts_per_token or router.top_k * share

    # --- after the optimiser's step -----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> None:
        """Sums the counts since the last call over ranks, moves the biases by them, and keeps them for `metrics`.

        To be called on every rank after each step of the optimiser, also where a rank had no batch.
        """
        device = self._device()
        width = max(router.num_experts for router in self.routers.values())
        counts = torch.zeros(len(self.routers), width, dtype=torch.int64, device=device)
        for row, name in enumerate(self.routers):
            if name in self._counts:
                counts[row, : self._counts[name].numel()] = self._counts[name].to(device)
        self._counts = {}
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(self.process_group) > 1:
            dist.all_reduce(counts, group=self.process_group)
        trained = {name for name, router in self.routers.items() if _is_trained(router)}
        for row, (name, router) in zip(counts, self.routers.items()):
            # Frozen beside others that are trained, as those of MTP layers may be, a router stays what it is.
            if name in trained or not trained:
                self._move_bias(router, row[: router.num_experts])
        self._window = counts if self._window is None else self._window + counts
        self._total = counts if self._total is None else self._total + counts
        self._loss_steps += 1

    def _device(self) -> torch.device:
        """Where counts of all routers are summed."""
        bias = next(iter(self.routers.values())).e_score_correction_bias
        device = next(self.decoder.parameters()).device if bias is None else bias.device
        return reduction_device(device, self.process_group)

    def _move_bias(self, router: nn.Module, counts: torch.Tensor) -> None:
        bias, rate = router.e_score_correction_bias, self.bias_update_rate
        if bias is None or not rate:
            return
        counts = counts.to(bias.device)
        if hasattr(router, "num_real_experts"):
            real, top_k = router.num_real_experts, router.top_k
            total = counts.sum().clamp(min=1).double()  # K choices of every token, zero experts included
            change = self._real_per_token(router) / (top_k * real) - counts[:real] / total
            # Zero experts have no target of their own; without tokens nothing moves.
            bias[:real] += (rate * change * (counts.sum() > 0)).to(bias.dtype)
            return
        # sign(mean - load) from integers: a load that equals the mean leaves its bias exactly where it is.
        bias += rate * (counts.sum() - counts * counts.numel()).sign().to(bias.dtype)

    # --- what the load was --------------------------------------------------------------------------------------------

    def metrics(self, reset: bool = True) -> dict[str, float]:
        """Numbers for a log, of the steps since the last call: those of `Load.metrics`, and `router_balance_loss`, the
        balance losses in the loss of this rank, by step. Waits for the device."""
        values = self.load(since_start=False).metrics()
        if self._head is not None and self._loss_steps:
            values["router_balance_loss"] = float(self._loss_sum) / self._loss_steps
        if reset:
            self._window, self._loss_sum, self._loss_steps = None, 0.0, 0
        return values

    def load(self, since_start: bool = True) -> Load:
        """Choices of every layer, over all ranks, since the start or since the last `metrics`."""
        counts = self._total if since_start else self._window
        layers, tokens = [], 0
        for row, (name, router) in enumerate(self.routers.items()):
            values = torch.zeros(router.num_experts, dtype=torch.int64)
            if counts is not None:
                values = counts[row, : router.num_experts].cpu()
            layers.append(LayerLoad(_layer_index(name), values, self._num_real(router)))
            tokens = max(tokens, int(values.sum()) // router.top_k)
        return Load(self.model_name, layers, tokens)

    def save_heat_map(self, path: str | Path) -> Path:
        """`Load.save_heat_map` of the whole training."""
        return self.load().save_heat_map(path)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs for the same metrics and heat map; the biases are buffers of the model."""
        values = {"window": self._window, "total": self._total, "loss_sum": torch.as_tensor(self._loss_sum)}
        tensors = {name: value.cpu() for name, value in values.items() if value is not None}
        rates = {"bias_update_rate": self.bias_update_rate, "first_bias_update_rate": self.options.bias_update_rate}
        return {**tensors, "loss_steps": self._loss_steps, **rates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave. A rate that was changed while training stays so, unless the options of this
        run name another one than those of that run did."""
        device = self._device()
        self._window, self._total = (state[name].to(device) if name in state else None for name in ("window", "total"))
        self._loss_sum, self._loss_steps = state["loss_sum"].to(device), state["loss_steps"]
        if state.get("first_bias_update_rate", self.options.bias_update_rate) == self.options.bias_update_rate:
            self.bias_update_rate = state["bias_update_rate"]


def _is_trained(router: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in router.parameters())


def _layer_index(router_name: str) -> int:
    numbers = [int(part) for part in router_name.split(".") if part.isdigit()]
    return numbers[0] if numbers else 0


def _real_tokens(attention_mask: Any, like: torch.Tensor) -> torch.Tensor:
    """(batch, seq) bool: which tokens are no padding; all, where nothing tells."""
    if not isinstance(attention_mask, torch.Tensor):
        return torch.ones_like(like)
    seq = like.shape[1]
    if attention_mask.dim() == 2:
        return (attention_mask[:, -seq:] != 0).to(like.device).expand_as(like)
    itself = attention_mask[:, 0].diagonal(offset=attention_mask.shape[-1] - seq, dim1=-2, dim2=-1)
    itself = itself if itself.dtype == torch.bool else itself > -1e4
    return itself.to(like.device).expand_as(like)
