"""Router balance and QK-Clip under Transformers' `Trainer` and what derives from it, as TRL's `SFTTrainer`:

    trainer = Trainer(model, args, train_dataset=dataset)
    add_callbacks(trainer, RouterBalanceCallback(), QKClipCallback())
    trainer.train()

Muon is handed to a trainer as any other optimiser: `optimizers=(Muon(muon_groups(model), lr=2e-4), None)`.
"""

import importlib.util
from pathlib import Path

from transformers import Trainer, TrainerCallback

from .balance import BalanceOptions, RouterBalance
from .qk_clip import QKClip


def add_callbacks(trainer: Trainer, *callbacks: TrainerCallback) -> None:
    """Adds callbacks ahead of those that report, so that what they add to a line of the log is reported, too."""
    for callback in reversed(callbacks):
        trainer.add_callback(callback)
        handler = trainer.callback_handler
        handler.callbacks.insert(0, handler.callbacks.pop())


class _Watching(TrainerCallback):
    """Keeps something on the model from the first to the last step, and puts its metrics into the log."""

    watched: RouterBalance | QKClip | None = None

    def make(self, model) -> RouterBalance | QKClip:
        raise NotImplementedError

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.watched is not None:  # of a training that was interrupted
            self.watched.detach()
        self.watched = self.make(model)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.watched.step()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.watched is None or "loss" not in logs:
            return
        metrics = self.watched.metrics()
        logs.update(metrics)
        if state.log_history:  # where the line was already put, as another dictionary
            state.log_history[-1].update(metrics)

    def on_train_end(self, args, state, control, **kwargs):
        self.watched.detach()


class RouterBalanceCallback(_Watching):
    """`RouterBalance`: balance losses, bias updates, `router_...` in the log, and a heat map at the end.

    Args:
        options: the values of the family (`BalanceOptions.for_model`) if not given.
        heat_map: name of a PNG in the output folder; `None` for none. Needs matplotlib.
    """

    def __init__(self, options: BalanceOptions | None = None, heat_map: str | None = "expert_load.png"):
        if heat_map is not None and importlib.util.find_spec("matplotlib") is None:
            raise ImportError("The heat map needs matplotlib: pip install 'hf-moe[plot]', or pass `heat_map=None`.")
        self.options, self.heat_map = options, heat_map

    def make(self, model) -> RouterBalance:
        return RouterBalance(model, self.options)

    def on_train_end(self, args, state, control, **kwargs):
        super().on_train_end(args, state, control, **kwargs)
        if self.heat_map is not None and state.is_world_process_zero and state.global_step:
            self.watched.save_heat_map(Path(args.output_dir) / self.heat_map)


class QKClipCallback(_Watching):
    """`QKClip`; its arguments."""

    def __init__(self, threshold: float = 100.0, interval: int = 1):
        self.threshold, self.interval = threshold, interval

    def make(self, model) -> QKClip:
        return QKClip(model, self.threshold, self.interval)
