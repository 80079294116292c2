"""A tiny model and rows to run the training loop on, for the tests beside this file."""

import random
from pathlib import Path

from tiny import tiny_model

from hf_moe.training import FinetuneArguments, FinetuneTrainer
from hf_moe.training.data import IGNORE_INDEX, TokenRows

VOCABULARY = 60  # below the tiny models' one


def some_rows(count: int = 12, seed: int = 0, low: int = 4, high: int = 20, packed: bool = False) -> TokenRows:
    """Samples of different lengths, some of whose tokens are not learnt."""
    rng = random.Random(seed)
    samples = []
    for _ in range(count):
        ids = [rng.randrange(3, VOCABULARY) for _ in range(rng.randrange(low, high))]
        samples.append(
            (ids, [token if at > 0 and rng.random() < 0.7 else IGNORE_INDEX for at, token in enumerate(ids)])
        )
        samples[-1][1][-1] = ids[-1]
    return TokenRows.from_samples(samples, max_length=32, packed=packed)


def options(folder: Path, **more) -> FinetuneArguments:
    defaults = dict(
        model_name_or_path="none", dataset_name="none", output_dir=str(folder), max_steps=4, disable_tqdm=True,
        per_device_train_batch_size=2, logging_steps=1, save_strategy="no", learning_rate=1e-3, use_cpu=True,
    )  # fmt: skip
    return FinetuneArguments(**{**defaults, **more})


def trained(folder: Path, data: TokenRows, model=None, held_out=None, callbacks=(), **more):
    """A trainer after its run, on a tiny model."""
    model = model or tiny_model()
    trainer = FinetuneTrainer(model, options(folder, **more), data, held_out, callbacks=callbacks)
    trainer.result = trainer.train()
    return trainer


def losses(trainer: FinetuneTrainer) -> list[tuple]:
    """What a run optimised, exactly."""
    names = ("loss", "main_loss", "mtp_loss_1", "grad_norm", "eval_loss")
    return [(line["step"], *(line.get(name) for name in names)) for line in trainer.log_lines]
