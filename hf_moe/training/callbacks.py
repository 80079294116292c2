"""What may take part in a fine-tuning run without being part of the loop."""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .trainer import FinetuneTrainer


class Callback:
    """Every method may be left as it is. They are called in the order of the trainer's list."""

    def model_kwargs(self, trainer: "FinetuneTrainer") -> dict[str, Any]:
        """More arguments of the model's forward pass in training."""
        return {}

    def on_train_begin(self, trainer: "FinetuneTrainer") -> None:
        """Before the first step, after a checkpoint was read."""

    def extra_loss(self, trainer: "FinetuneTrainer", outputs, batch: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """A scalar to add to a micro-batch's loss, or None.

        The losses of the micro-batches of a step, on all processes, add up to the loss of the step: scale what is a
        mean over a micro-batch by `trainer.micro_batch_share`, its share of the step's targets.
        """
        return None

    def on_micro_batch(self, trainer: "FinetuneTrainer", outputs, batch: dict[str, torch.Tensor]) -> None:
        """After a micro-batch's backward pass, in which gradient checkpointing recomputes."""

    def before_optimizer_step(self, trainer: "FinetuneTrainer") -> None:
        """When the gradients are complete, before they are clipped."""

    def on_step_end(self, trainer: "FinetuneTrainer") -> dict[str, float] | None:
        """After an optimiser step; the numbers returned go into the next line of the log."""
        return None

    def metrics(self, trainer: "FinetuneTrainer") -> dict[str, float]:
        """More numbers for a line of the log; asked when one is due, on every process."""
        return {}

    def on_log(self, trainer: "FinetuneTrainer", metrics: dict[str, float]) -> None:
        """When a line is logged, on the main process alone."""

    def on_evaluate(self, trainer: "FinetuneTrainer", metrics: dict[str, float]) -> None:
        """After an evaluation."""

    def on_train_end(self, trainer: "FinetuneTrainer") -> None:
        """After the last step, before the result is written."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings and containers of them, to go into checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the state of a checkpoint."""
