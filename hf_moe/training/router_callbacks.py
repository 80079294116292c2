"""Router balance and QK-Clip as parts of the training loop."""

import importlib.util
from pathlib import Path
from typing import Any

import torch

from .arguments import FinetuneArguments
from .balance import BalanceOptions, RouterBalance, find_routers
from .callbacks import Callback
from .qk_clip import QKClip

HEAT_MAP = "expert_load.png"
QK_CLIP_THRESHOLD = 100.0  # of Kimi-K2


def balance_callbacks(model: torch.nn.Module, args: FinetuneArguments) -> list[Callback]:
    """What the options ask for: load metrics always, balance and QK-Clip where they apply.

    Raises:
        ValueError: for values that do not fit the model.
    """
    callbacks: list[Callback] = []
    if has_routers(model):
        callbacks.append(BalanceCallback(model, balance_options(model, args)))
    threshold = args.qk_clip_threshold
    if threshold is None and args.optim == "muonclip":
        threshold = QK_CLIP_THRESHOLD
    if threshold:
        callbacks.append(QKClipCallback(model, threshold))
    return callbacks


def has_routers(model: torch.nn.Module) -> bool:
    try:
        return bool(find_routers(model))
    except ValueError:
        return False


def balance_options(model: torch.nn.Module, args: FinetuneArguments) -> BalanceOptions:
    """The published values of the family for full fine-tuning, nothing for LoRA, and what was named in either case.

    With LoRA the router is not trained, and an adapter has no place for moved biases.
    """
    options = BalanceOptions() if args.use_peft else BalanceOptions.for_model(model)
    given = {
        "bias_update_rate": args.router_bias_update_rate,
        "sequence_loss": args.router_sequence_loss,
        "expert_loss": args.router_expert_loss,
        "device_loss": args.router_device_loss,
        "communication_loss": args.router_communication_loss,
        "num_devices": args.router_num_devices,
        "real_experts_per_token": args.router_real_experts_per_token,
    }
    values = {**vars(options), **{name: value for name, value in given.items() if value is not None}}
    return BalanceOptions(**values)


class BalanceCallback(Callback):
    """`RouterBalance`; its load goes into the log and, at the end, into a heat map."""

    def __init__(self, model: torch.nn.Module, options: BalanceOptions):
        self.balance = RouterBalance(model, options)

    def on_step_end(self, trainer) -> None:
        self.balance.step()

    def metrics(self, trainer) -> dict[str, float]:
        return self.balance.metrics()

    def on_train_end(self, trainer) -> None:
        if trainer.accelerator.is_main_process and importlib.util.find_spec("matplotlib") is not None:
            if trainer.step and self.balance.load().num_tokens:
                self.balance.save_heat_map(Path(trainer.output_dir) / HEAT_MAP)
        self.balance.detach()

    def state_dict(self) -> dict[str, Any]:
        return self.balance.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.balance.load_state_dict(state)


class QKClipCallback(Callback):
    """`QKClip`, after every step."""

    def __init__(self, model: torch.nn.Module, threshold: float):
        self.clip = QKClip(model, threshold)

    def on_step_end(self, trainer) -> None:
        self.clip.step()

    def metrics(self, trainer) -> dict[str, float]:
        return self.clip.metrics()

    def on_train_end(self, trainer) -> None:
        self.clip.detach()
