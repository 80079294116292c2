"""What saving needs of ours: the copies that upstream files hold, and files that are replaced when all are complete."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.modeling_utils import PreTrainedModel

from .weights_safetensors import variant_names


def with_duplicates(model: PreTrainedModel, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same and the copies that upstream files hold of some; none of what a caller's own has left out."""
    output = dict(state_dict)
    for duplicate, original in model.mtp_duplicates().items():
        if original not in output or duplicate in output:
            continue
        tensor = output[original]
        if tensor.device.type == "meta":  # offloaded
            tensor = load_offloaded_parameter(model, original)
        output[duplicate] = tensor.detach().clone()  # safetensors refuses tensors that share memory
    return output


def drop_fp8_config(config: PreTrainedConfig) -> None:
    """Takes the note of FP8 weights out of the configuration of a model that has none."""
    for holder in (config, config.get_text_config()):
        stored = getattr(holder, "quantization_config", None)
        if isinstance(stored, dict) and stored.get("quant_method") == "fp8":
            del holder.quantization_config


@contextlib.contextmanager
def replaced_when_complete(folder: str | os.PathLike, variant: str | None) -> Iterator[str]:
    """A folder beside the final place of its files, which are moved there when the block ends without an error."""
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as staging:
        yield staging
        _replace_files(Path(staging), Path(folder), variant)


def _replace_files(staging: Path, target: Path, variant: str | None) -> None:
    """Moves complete files into place, and removes weight files of an older checkpoint that would be read with them.

    Files of other variants stay: they are other checkpoints of the same folder.
    """
    new = {path.name for path in staging.iterdir()}
    for path in sorted(staging.iterdir(), key=lambda path: path.suffix == ".json"):  # index and config last
        os.replace(path, target / path.name)
    infix = re.escape(f".{variant}") if variant else ""
    shard = re.compile(rf"model{infix}-\d{{5}}-of-\d{{5}}\.safetensors")
    if any(name.endswith(".safetensors") for name in new):
        for path in target.iterdir():
            stale = shard.fullmatch(path.name) or path.name in variant_names(variant)
            if stale and path.name not in new:
                path.unlink()
