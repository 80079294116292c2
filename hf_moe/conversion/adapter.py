"""A PEFT LoRA adapter as it is saved: which tensors of a checkpoint it changes, and by what.

Facts of the format (PEFT 0.18 to 0.21). A linear layer's factors are `lora_A` (r, in) and `lora_B` (out, r), an
embedding's `lora_embedding_A` (r, rows) and `lora_embedding_B` (width, r); the weight changes by scaling * B A. A
fused parameter (E, rows, cols) of experts, a target of `target_parameters`, has one pair for all experts: in `lora_A`,
(E r, .), the experts' ranks follow one another; in `lora_B`, (., r E), the experts of each rank do. Two parameters of
one module are nested, so that one has `base_layer` in its name; which is which follows from the shapes.
"""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..models.weights_safetensors import CheckpointError
from .source import SourceTensor, Store, open_store, read_header, read_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTORS = re.compile(r"(.*)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.(weight|bias))?$")
# Settings that mean another computation than scaling * B A.
_VARIANTS = (
    "use_dora", "use_qalora", "use_bdlora", "velora_config", "monteclora_config", "arrow_config", "kasa_config",
    "alora_invocation_tokens", "layer_replication", "fan_in_fan_out", "trainable_token_indices",
)  # fmt: skip
# Initialisations that also change the base weights: their factors do not fit the published ones.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Delta:
    """What one pair of factors adds to a matrix, or to every matrix of a stack.

    Attributes:
        a, b: the factors in the file.
        scaling: alpha over the rank, or over its root.
        experts: matrices that share the factors; 1 for a plain weight.
        swapped: whether `a` belongs to the rows of the weight (embeddings; fused parameters in PEFT before 0.20).
    """

    # Not part of the representation, by which a conversion is known again: the adapter's checksums are.
    a: SourceTensor = field(repr=False)
    b: SourceTensor = field(repr=False)
    scaling: float
    experts: int = 1
    swapped: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrices that it belongs to."""
        rows, cols = self.b.shape[0], self.a.shape[1]
        return (cols, rows) if self.swapped else (rows, cols)

    def rows(self, expert: int, begin: int, end: int) -> torch.Tensor:
        """Rows `begin` to `end` of what is added to the matrix of an expert, float32."""
        rank = self.a.shape[0] // self.experts
        right = self.a.read_rows(expert * rank, (expert + 1) * rank).float()  # (r, in)
        left = _by_expert(self.b, self.experts)[expert]  # (out, r)
        if self.swapped:
            left, right = right.T, left.T
        return (left[begin:end] @ right) * self.scaling


@functools.lru_cache(maxsize=3)
def _by_expert(factor: SourceTensor, experts: int) -> torch.Tensor:
    """`lora_B` (out, r E) as (E, out, r) in float32; kept, since the experts of a layer are merged one by one."""
    weight = factor.read().float()
    return weight.view(weight.shape[0], -1, experts).permute(2, 0, 1).contiguous()


@dataclass
class Target:
    """A pair of factors that has not been matched with a weight.

    Attributes:
        module: the module's name, without `base_layer`.
        a, b, bias: as in the file.
        embedding: whether it is an embedding's.
    """

    module: str
    a: SourceTensor | None = None
    b: SourceTensor | None = None
    bias: SourceTensor | None = None
    embedding: bool = False


@dataclass
class Adapter:
    """An adapter: settings, pairs of factors, and tensors that replace those of the base.

    Attributes:
        store: where it lies.
        config: `adapter_config.json`.
        targets: pairs of factors.
        replaced: other tensors by the name of the model's parameter or buffer: `modules_to_save`, biases.
    """

    store: Store
    config: dict[str, Any]
    targets: list[Target] = field(default_factory=list)
    replaced: dict[str, SourceTensor] = field(default_factory=dict)

    def scaling(self, name: str, rank: int) -> float:
        """The factor of the product for a module or parameter of this name."""
        alpha = self.config.get("lora_alpha", 8)
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                alpha = value
                break
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def complain(self, entry: SourceTensor, problem: str) -> CheckpointError:
        """An error that names a tensor of the adapter and its file."""
        return CheckpointError(f"{self.store.path(entry.filename)}: tensor {entry.name} {problem}.")


def open_adapter(path_or_hub_id: str, revision: str | None = None, token: str | None = None) -> Adapter:
    """Opens a folder or repository with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        CheckpointError: for other methods than LoRA, variants of it that are no plain product, and damaged files.
    """
    store = open_store(path_or_hub_id, revision, token)
    present = store.files()
    if ADAPTER_CONFIG not in present:
        raise CheckpointError(f"{store.path(ADAPTER_CONFIG)}: missing. This is no PEFT adapter.")
    config = read_json(store, ADAPTER_CONFIG)
    _check_config(config, store.path(ADAPTER_CONFIG))
    if ADAPTER_WEIGHTS not in present:
        pickle = "adapter_model.bin" in present
        problem = "its weights are a pickle (adapter_model.bin), which hf_moe does not read" if pickle else "missing"
        raise CheckpointError(f"{store.path(ADAPTER_WEIGHTS)}: {problem}. Save it with safetensors.")
    entries, _ = read_header(store, ADAPTER_WEIGHTS, present[ADAPTER_WEIGHTS])
    adapter = Adapter(store, config)
    _sort_entries(adapter, entries)
    return adapter


def _check_config(config: dict[str, Any], path: str) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: `peft_type` is {config.get('peft_type')!r}; only LORA is merged.")
    for key in _VARIANTS:
        if config.get(key):
            what = "DoRA" if key == "use_dora" else f"`{key}={config[key]!r}`"
            raise CheckpointError(
                f"{path}: the adapter uses {what}, which is more than a product of two factors. Merge it with PEFT."
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise CheckpointError(
            f"{path}: `init_lora_weights={start!r}` changed the base weights when training began, so that the factors "
            "do not fit this checkpoint. Save the adapter with PEFT's `path_initial_model_for_weight_conversion` first."
        )


def _sort_entries(adapter: Adapter, entries: list[SourceTensor]) -> None:
    targets: dict[str, Target] = {}
    for entry in entries:
        name = entry.name.removeprefix(_PREFIX)
        if ".lora_magnitude_vector" in name:
            raise adapter.complain(entry, "belongs to DoRA, which is more than a product of two factors")
        found = _FACTORS.fullmatch(name)
        if found is None:
            plain = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            adapter.replaced[plain] = entry
            continue
        module = ".".join(part for part in found[1].split(".") if part != "base_layer")
        target = targets.setdefault(found[1], Target(module))
        target.embedding = "embedding" in found[2]
        if found[3] == "bias":
            target.bias = entry
        elif found[2].endswith("_A"):
            target.a = entry
        else:
            target.b = entry
    for path, target in targets.items():
        pair = {"A": target.a, "B": target.b}
        absent = [name for name, entry in pair.items() if entry is None]
        if absent:
            raise CheckpointError(
                f"{adapter.store.path(ADAPTER_WEIGHTS)}: {path} has no lora_{absent[0]}: the adapter is incomplete."
            )
        for entry in pair.values():
            if len(entry.shape) != 2 or not entry.dtype.is_floating_point:
                raise adapter.complain(
                    entry, f"has shape {entry.shape} and dtype {entry.dtype}; only matrices are merged"
                )
        if target.a.shape[0] != target.b.shape[1] or target.a.shape[0] == 0:
            raise adapter.complain(
                target.b, f"has shape {target.b.shape}, which does not fit {target.a.shape} of {target.a.name}"
            )
        adapter.targets.append(target)


def deltas_of(adapter: Adapter, target: Target, parameters: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Delta]]:
    """The parameter that a pair of factors belongs to, of those in `parameters` (name to shape), and what it adds.

    `parameters` are those of the module: `weight`, or fused ones of experts.

    Raises:
        CheckpointError: if the factors fit none.
    """
    if target.embedding:
        a, b = target.a, target.b
        # (r, rows) and (width, r): the first belongs to the rows.
        delta = Delta(a, b, adapter.scaling(target.module, a.shape[0]), swapped=True)
        yield _checked(adapter, target, "weight", delta, parameters)
        return
    if "weight" in parameters and len(parameters["weight"]) == 2:
        delta = Delta(target.a, target.b, adapter.scaling(target.module, target.a.shape[0]))
        yield _checked(adapter, target, "weight", delta, parameters)
        return
    sizes = (target.b.shape[0], target.a.shape[1])
    for name, shape in parameters.items():
        if len(shape) != 3 or sorted(shape[1:]) != sorted(sizes) or target.a.shape[0] % shape[0]:
            continue
        scaling = adapter.scaling(f"{target.module}.{name}", target.a.shape[0] // shape[0])
        swapped = sizes != tuple(shape[1:])
        if shape[1] == shape[2]:
            release = _peft_release(adapter.config)
            if release is None:
                raise adapter.complain(
                    target.a,
                    f"fits {target.module}.{name} {shape} either way round: PEFT changed which is which in 0.20, and "
                    "adapter_config.json does not name the release that saved it. Add its `peft_version` there",
                )
            swapped = release < (0, 20)
        yield name, Delta(target.a, target.b, scaling, experts=shape[0], swapped=swapped)
        return
    raise adapter.complain(
        target.a, f"and lora_B have the sizes {target.a.shape} and {target.b.shape}, which fit none of {parameters}"
    )


def _checked(adapter, target: Target, name: str, delta: Delta, parameters) -> tuple[str, Delta]:
    if delta.shape != parameters[name]:
        raise adapter.complain(
            delta.b, f"and lora_A make {delta.shape}, but {target.module}.{name} has shape {parameters[name]}"
        )
    return name, delta


def _peft_release(config: dict[str, Any]) -> tuple[int, int] | None:
    found = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    return (int(found[1]), int(found[2])) if found else None
