"""Whether a checkpoint folder is whole and sound: `verify_folder` says every problem that it finds.

It looks at the files (index, headers, strays), at the tensors against what config.json asks for (names, shapes, dtypes,
scales), at every value, and at the checksums of the manifest that a conversion writes. Values are read in pieces, so
that memory stays small whatever the checkpoint's size.
"""

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..models.op_quant import FP8, block_grid
from ..models.weights_lazy import read_quantization_config
from ..models.weights_safetensors import INDEX_NAME, SINGLE_NAME, CheckpointError
from .families import quantization_of
from .inference import by_tensor, inference_files, plan_from_inference, read_inference_source, to_upstream_name
from .progress import ProgressDisplay
from .source import MANIFEST_NAME, PICKLES, LocalStore, SourceTensor, read_header, read_json
from .structure import Structure, fused_parameter, read_structure, wrapper_prefix

PIECE = 1 << 20  # elements that are looked at at a time: few enough to stay in the processor's cache
_SHOWN = 8  # problems of one kind that are written out
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
_INT4_PARTS = ("weight_packed", "weight_scale", "weight_shape")


@dataclass
class Report:
    """What `verify_folder` found.

    Attributes:
        folder: the checkpoint.
        problems: one sentence each, that names the file or tensor; empty for a sound checkpoint.
        notes: what was looked at, and what could not be.
        tensors, bytes: how many there are.
    """

    folder: str
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tensors: int = 0
    bytes: int = 0

    @property
    def ok(self) -> bool:
        return not self.problems

    def add(self, kind: str, problems: list[str]) -> None:
        """Adds problems of one kind, the first of them written out."""
        self.problems += problems[:_SHOWN]
        if len(problems) > _SHOWN:
            self.problems.append(f"{self.folder}: {len(problems) - _SHOWN} more problems of this kind ({kind}).")

    def to_dict(self) -> dict[str, Any]:
        """As `hf-moe verify --json` prints it."""
        return {
            "folder": self.folder,
            "ok": self.ok,
            "tensors": self.tensors,
            "bytes": self.bytes,
            "problems": self.problems,
            "notes": self.notes,
        }


def verify_folder(
    folder: str | os.PathLike, *, values: bool = True, checksums: bool = True, progress: bool = False
) -> Report:
    """Looks at a local checkpoint folder in the Hub's layout.

    Args:
        folder: with config.json and safetensors files.
        values: read every tensor, for values that are not finite and for scales that are not positive.
        checksums: compare the files with the manifest of the conversion that wrote them, where there is one.
        progress: whether to say on standard error how far the reading is.

    Raises nothing for a bad checkpoint: the report's `problems` say what is wrong.
    """
    folder = Path(folder)
    report = Report(str(folder))
    if not folder.is_dir():
        report.problems.append(f"{folder}: there is no such folder.")
        return report
    store = LocalStore(folder)
    try:
        by_rank = bool(inference_files(store))
    except CheckpointError as error:
        report.problems.append(str(error))
        return report
    if by_rank:
        _verify_ranks(store, report, values, progress)
        if checksums:
            _check_manifest(folder, report, progress)
        return report
    config = _read_config(store, report)
    entries = _read_files(store, report)
    report.tensors = len(entries)
    report.bytes = sum(entry.nbytes for entry in entries.values())
    if config is not None and entries:
        _check_structure(config, entries, report)
    if values:
        _check_values(entries.values(), report, progress)
    if checksums:
        _check_manifest(folder, report, progress)
    return report


def _verify_ranks(store: LocalStore, report: Report, values: bool, progress: bool) -> None:
    """The inference layout: what its files make together is looked at as a checkpoint in upstream names."""
    try:
        source = read_inference_source(store)
        plan = plan_from_inference(source)
    except CheckpointError as error:
        report.problems.append(str(error))
        return
    report.tensors, report.bytes = len(source.entries), sum(entry.nbytes for entry in source.entries.values())
    joined = {}
    for group in plan.groups:
        output, held = group.outputs[0], source.entries[group.inputs[0]]
        joined[output.name] = replace(held, name=output.name, dtype=output.dtype, shape=output.shape)
    report.notes.append(f"DeepSeek's inference layout, {len(source.files)} ranks")
    _check_structure(source.config, joined, report)
    if not values:
        return
    _check_values(source.entries.values(), report, progress)
    for name, held in by_tensor(source).items():
        first = held[0] if 0 in held else None
        place = to_upstream_name(name)
        if first is None or place is None or place.dim is not None or place.expert is not None:
            continue
        for entry in list(held.values())[1:]:
            pairs = zip(pieces(first), pieces(entry))
            if not all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs):
                report.problems.append(
                    _of(entry, f"differs from that of {first.filename}; all ranks hold the same one.")
                )


# --- files ------------------------------------------------------------------------------------------------------------


def _read_config(store: LocalStore, report: Report) -> dict[str, Any] | None:
    if not (store.folder / "config.json").is_file():
        report.problems.append(f"{store.path('config.json')}: is missing.")
        return None
    try:
        return read_json(store, "config.json")
    except CheckpointError as error:
        report.problems.append(str(error))
        return None


def _read_files(store: LocalStore, report: Report) -> dict[str, SourceTensor]:
    present = store.files()
    folder = store.folder
    weights = sorted(name for name in present if name.endswith(".safetensors") and "/" not in name)
    weight_map = None
    if INDEX_NAME in present:
        if SINGLE_NAME in present:
            problem = f"stands beside {INDEX_NAME}; only one of the two can be the checkpoint"
            report.problems.append(f"{folder / SINGLE_NAME}: {problem}.")
        weight_map = _read_index(store, report)
        names = sorted(set(weight_map.values()))
    else:
        names = [SINGLE_NAME] if SINGLE_NAME in present else []
    if not names:
        pickles = [name for name in present if name.endswith(PICKLES)]
        problem = "holds no safetensors files"
        if pickles:
            problem = f"its weights are pickles ({', '.join(pickles[:3])}), which hf_moe does not read"
        elif weights:
            problem = f"{weights[0]} and others have no {INDEX_NAME}"
        report.problems.append(f"{folder}: {problem}.")
    stray = [name for name in weights if name not in names and name.startswith("model")]
    report.add("stray files", [f"{folder / name}: no index names this file." for name in stray])
    entries: dict[str, SourceTensor] = {}
    broken = set()
    for name in names:
        if name not in present:
            report.problems.append(f"{folder / name}: this shard of {INDEX_NAME} is missing.")
            broken.add(name)
            continue
        try:
            found, _ = read_header(store, name, present[name])
        except CheckpointError as error:
            report.problems.append(str(error))
            broken.add(name)
            continue
        twice = [entry.name for entry in found if entry.name in entries]
        report.add(
            "tensors in two files",
            [f"{folder / name}: tensor {tensor} is in {entries[tensor].filename}, too." for tensor in twice],
        )
        entries.update({entry.name: entry for entry in found})
    if weight_map is not None:
        _check_index(store, weight_map, entries, broken, report)
    return entries


def _read_index(store: LocalStore, report: Report) -> dict[str, str]:
    path = store.path(INDEX_NAME)
    try:
        weight_map = read_json(store, INDEX_NAME).get("weight_map")
    except CheckpointError as error:
        report.problems.append(str(error))
        return {}
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        report.problems.append(f"{path}: not a checkpoint index (it has no table `weight_map` of file names).")
        return {}
    if not weight_map:
        report.problems.append(f"{path}: the index names no tensor.")
    outside = {name for name in weight_map.values() if Path(name).name != name or name in ("", ".", "..")}
    outside |= {name for name in weight_map.values() if not name.endswith(".safetensors")}
    report.add("paths", [f"{path}: names {n!r}, which is no safetensors file of this folder." for n in sorted(outside)])
    return {tensor: name for tensor, name in weight_map.items() if name not in outside}


def _check_index(store: LocalStore, weight_map: dict[str, str], entries, broken: set[str], report: Report) -> None:
    path = store.path(INDEX_NAME)
    wrong = [
        f"{path}: says that {filename} holds {tensor}, but it does not."
        for tensor, filename in weight_map.items()
        if filename not in broken and (tensor not in entries or entries[tensor].filename != filename)
    ]
    report.add("index", wrong)
    unlisted = [_of(entry, f"is not in {INDEX_NAME}.") for name, entry in entries.items() if name not in weight_map]
    report.add("tensors without an index", unlisted)
    try:
        metadata = read_json(store, INDEX_NAME).get("metadata")
    except CheckpointError:
        return  # said already
    actual = sum(entry.nbytes for entry in entries.values())
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total is None and isinstance(metadata, dict):  # DeepSeek's fp8_cast_bf16.py writes none, and nobody needs it
        report.notes.append(f"{path}: `metadata` has no `total_size`")
    elif total != actual and not broken:
        report.problems.append(f"{path}: `metadata.total_size` is {total!r}, but the tensors have {actual} bytes.")


# Beginnings of names of files that people edit after a conversion.
DOCUMENTS = ("README", "LICENSE", "LICENCE")


def _check_manifest(folder: Path, report: Report, progress: bool) -> None:
    path = folder / MANIFEST_NAME
    if not path.is_file():
        report.notes.append(f"no {MANIFEST_NAME}: no checksums to compare")
        return
    try:
        shards = manifest_checksums(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        report.problems.append(f"{path}: not a manifest of a conversion ({error!r}).")
        return
    there = {}
    for name, expected in sorted(shards.items()):
        file = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute() or not file.is_file():
            report.problems.append(f"{file}: {MANIFEST_NAME} lists this file, but it is not there.")
        elif not name.startswith(DOCUMENTS):
            there[file] = expected
    sizes = {file: file.stat().st_size for file in there}
    with ProgressDisplay(f"{folder.name}: checksums", sum(sizes.values()), progress) as display:
        for file, expected in there.items():
            if file_sha256(file) != expected:
                report.problems.append(f"{file}: its SHA-256 is not the one in {MANIFEST_NAME}: it has changed since.")
            display.advance(sizes[file])
    report.notes.append(f"{len(shards)} checksums of {MANIFEST_NAME} compared")


def manifest_checksums(manifest: dict[str, Any]) -> dict[str, str]:
    """File name to SHA-256 of the files that a manifest lists."""
    return {name: record["sha256"] for name, record in manifest["files"].items()}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --- tensors ----------------------------------------------------------------------------------------------------------


def _check_structure(config: dict[str, Any], entries: dict[str, SourceTensor], report: Report) -> None:
    wrapper = wrapper_prefix(entries)
    if wrapper is not None:
        prefix, own = wrapper
        report.notes.append(f"tensors outside of {prefix} are not checked against config.json")
        kept = {name: entry for name, entry in entries.items() if name.startswith(prefix) or name == "lm_head.weight"}
        entries = {own + name.removeprefix(prefix) if prefix in name else name: entry for name, entry in kept.items()}
    try:
        stored = quantization_of(config)
        quantization = read_quantization_config(stored)
    except CheckpointError as error:  # names the file
        report.problems.append(str(error))
        return
    except ValueError as error:
        report.problems.append(f"config.json: {error}")
        return
    if stored is not None and quantization is None:
        report.problems.append(f"config.json: unknown `quant_method` {stored.get('quant_method')!r}.")
        return
    problems, shapes = plain_shapes(entries, quantization)
    report.add("quantisation", problems)
    report.add("dtypes", list(_dtype_problems(entries)))
    try:
        structure = read_structure(config, shapes)
    except CheckpointError as error:
        report.problems.append(str(error))
        return
    _check_names(structure, shapes, entries, report)
    if len({entry.dtype for name, entry in entries.items() if entry.dtype == FP8}) == 0 and quantization:
        if quantization["quant_method"] == "fp8":
            report.problems.append("config.json: says that weights are FP8, but none is.")


def plain_shapes(
    entries: dict[str, SourceTensor], quantization: dict[str, Any] | None
) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    """Problems of quantised tensors, and the shape of every weight under its plain name.

    As `plain_tensors`, which raises for the first one.
    """
    method = quantization["quant_method"] if quantization else None
    problems: list[str] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for name, entry in entries.items():
        if entry.dtype == FP8:
            scale = entries.get(f"{name}_scale_inv")
            shapes[name] = entry.shape
            if method != "fp8":
                problems.append(_of(entry, "is FP8, but config.json has no `quantization_config` of method 'fp8'."))
            elif scale is None:
                problems.append(_of(entry, f"has no scales: {name}_scale_inv is missing."))
            elif len(entry.shape) < 2:
                problems.append(_of(entry, f"is FP8, but has the shape {entry.shape}."))
            else:
                parts = 2 if name.endswith("gate_up_proj") else 1
                grid = block_grid(entry.shape, quantization["block_size"], parts)
                if scale.shape != grid:
                    problems.append(_of(scale, f"has shape {scale.shape}; blocks of the weight need {grid}."))
                if scale.dtype not in _SCALES:
                    problems.append(_of(scale, f"has dtype {scale.dtype}, which is none of scales."))
        elif name.endswith("_scale_inv"):
            weight = entries.get(name.removesuffix("_scale_inv"))
            if weight is None or weight.dtype != FP8:
                problems.append(_of(entry, f"belongs to no FP8 weight {name.removesuffix('_scale_inv')}."))
        elif name.endswith(_INT4_PARTS):
            stem = name.rpartition("_")[0]
            missing = [part for part in _INT4_PARTS if f"{stem.removesuffix('weight')}{part}" not in entries]
            if method != "int4":
                problems.append(_of(entry, "is packed, but config.json does not say that it is INT4."))
            elif missing:
                problems.append(_of(entry, f"is incomplete: {', '.join(missing)} missing beside it."))
            elif name.endswith("weight_packed"):
                problems += _int4_problems(entries, stem, quantization["group_size"])
                shape = entries[f"{stem}_shape"]
                if shape.shape == (2,):
                    shapes[stem] = tuple(shape.read().tolist())
        else:
            shapes[name] = entry.shape
    return problems, shapes


def _int4_problems(entries: dict[str, SourceTensor], stem: str, group_size: int) -> Iterator[str]:
    packed, scale, shape = (entries[f"{stem}_{part}"] for part in ("packed", "scale", "shape"))
    if shape.shape != (2,) or shape.dtype not in (torch.int32, torch.int64):
        yield _of(shape, f"has shape {shape.shape} and dtype {shape.dtype}, not two integers.")
        return
    rows, cols = shape.read().tolist()
    for entry, width in ((packed, 8), (scale, group_size)):
        expected = (rows, -(-cols // width))
        if entry.shape != expected:
            yield _of(entry, f"has shape {entry.shape}, but {shape.name} asks for {expected}.")
    if packed.dtype != torch.int32:
        yield _of(packed, f"has dtype {packed.dtype}, not int32.")


def _dtype_problems(entries: dict[str, SourceTensor]) -> Iterator[str]:
    halves: dict[torch.dtype, SourceTensor] = {}
    groups: dict[str, SourceTensor] = {}
    for name, entry in entries.items():
        if name.endswith((*_INT4_PARTS, "_scale_inv")) or entry.dtype == FP8:
            plain = entry.dtype == FP8
        else:
            plain = True
            if entry.dtype not in _FLOATS:
                yield _of(entry, f"has dtype {entry.dtype}, which is none of weights.")
            elif entry.dtype.itemsize == 2:
                halves.setdefault(entry.dtype, entry)
        stem, found, _ = name.partition(".experts.")
        if plain and found and name.endswith((".weight", "_proj")):
            first = groups.setdefault(stem, entry)
            if first.dtype != entry.dtype:
                yield _of(entry, f"has dtype {entry.dtype}, but {first.name} of the same layer has {first.dtype}.")
    if len(halves) > 1:
        first, second = list(halves.values())[:2]
        yield _of(second, f"has dtype {second.dtype}, but {first.name} has {first.dtype}: the two are mixed.")


def _check_names(structure: Structure, shapes, entries: dict[str, SourceTensor], report: Report) -> None:
    expected = dict(structure.shapes)
    for parameter, parts in structure.parameters.items():
        if len(parts) > 1 or parts[0].name != parameter:
            _accept_fused(structure, parameter, parts, shapes, expected)
    for duplicate, original in structure.duplicates.items():
        if duplicate in shapes and original in expected:
            expected[duplicate] = expected[original]
    missing = [name for name in expected if name not in shapes]
    if missing:
        key, count = structure.model.experts_key, getattr(structure.config.get_text_config(), "n_routed_experts", None)
        report.add(
            "missing tensors",
            [
                f"{report.folder}: tensor {name} is missing; config.json asks for it ({key}={count})."
                for name in missing
            ],
        )
    unexpected = [name for name in shapes if name not in expected and not name.endswith("rotary_emb.inv_freq")]
    report.add("unexpected tensors", [_of(_any(entries, n), "is not what config.json asks for.") for n in unexpected])
    wrong = [
        _of(_any(entries, name), f"has shape {shapes[name]}, but config.json asks for {shape}.")
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name]) != tuple(shape)
    ]
    report.add("shapes", wrong)
    mtp = getattr(structure.config, "num_nextn_predict_layers", 0) or 0
    report.notes.append(f"{len(expected)} tensors asked for by {type(structure.model).__name__}, {mtp} MTP layers")


def _accept_fused(structure: Structure, parameter: str, parts, shapes, expected: dict[str, tuple[int, ...]]) -> None:
    """Where a fused parameter of experts stands in the file in place of its parts, that is what is asked for."""
    stem = parameter if parameter in shapes else parameter.replace("model.language_model.", "model.", 1)
    if fused_parameter(stem) and stem in shapes and not any(part.name in shapes for part in parts):
        for part in parts:
            expected.pop(part.name, None)
        expected[stem] = tuple(structure.model.state_dict()[parameter].shape)


def _any(entries: dict[str, SourceTensor], name: str) -> SourceTensor:
    return entries[name] if name in entries else entries[f"{name}_packed"]


def _of(entry: SourceTensor, problem: str) -> str:
    return f"{entry.store.path(entry.filename)}: tensor {entry.name} {problem}"


# --- values -----------------------------------------------------------------------------------------------------------


def pieces(entry: SourceTensor, elements: int = PIECE) -> Iterator[torch.Tensor]:
    """The tensor's values in flat pieces of so many elements."""
    total = entry.nbytes // entry.dtype.itemsize
    flat = replace(entry, shape=(total,))
    for begin in range(0, total, elements):
        yield flat.read_rows(begin, min(total, begin + elements))


def _check_values(entries: Collection[SourceTensor], report: Report, progress: bool) -> None:
    problems: list[str] = []
    with ProgressDisplay(
        f"{Path(report.folder).name}: values", sum(entry.nbytes for entry in entries), progress
    ) as bar:
        for entry in entries:
            problems += bad_values(entry)
            bar.advance(entry.nbytes)
    report.add("values", problems)


def bad_values(entry: SourceTensor) -> Iterator[str]:
    """Says, once, that a tensor holds values that are not finite, or scales that are not positive."""
    if not (entry.dtype.is_floating_point or entry.dtype == torch.float8_e8m0fnu):
        return
    is_scale = entry.name.endswith(("_scale_inv", ".weight_scale"))
    zero_is_fine = entry.name.endswith(".weight_scale")  # of a group of zeros
    infinite, negative = 0, 0
    for piece in pieces(entry):
        if entry.dtype == FP8:
            codes = piece.view(torch.uint8) & 127
            if codes.amax() == 127:  # counting takes ten times as long
                infinite += int((codes == 127).sum())
        elif entry.dtype == torch.float8_e8m0fnu:
            infinite += int((piece.view(torch.uint8) == 255).sum())
        else:
            piece = piece.float() if entry.dtype.itemsize == 1 else piece
            low, high = (bound.item() for bound in piece.aminmax())
            if math.isfinite(low) and math.isfinite(high) and not (is_scale and low <= 0):
                continue
            finite = piece.isfinite()
            infinite += piece.numel() - int(finite.sum())
            if is_scale:
                negative += int((finite & (piece < 0 if zero_is_fine else piece <= 0)).sum())
    if infinite:
        yield _of(entry, f"holds {infinite} values that are not finite.")
    if negative:
        yield _of(entry, f"holds {negative} scales that are not positive.")
