"""Where tensors come from: a local checkpoint folder, or a repository on the Hub of which only some bytes are read.

Only headers are read when a source is opened, and all of them are checked: nothing is written for a checkpoint that
is broken. Tensors are read with plain reads into memory of their own. Mapped files would count as resident memory, and
a conversion would seem to need as much memory as the checkpoint is large.
"""

import ctypes
import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..models.weights_safetensors import DTYPES, INDEX_NAME, SINGLE_NAME, CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MANIFEST_NAME = "conversion.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
WEIGHTS = (*PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".part")
CARRIED_FOLDERS = ("additional_chat_templates",)
NOT_CARRIED = ("config.json", MANIFEST_NAME, ".gitattributes", ".gitignore")


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of a source: where its bytes are, and how to get them."""

    store: "Store"
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    filename: str
    begin: int  # first byte in the file
    nbytes: int

    def read(self) -> torch.Tensor:
        """The whole tensor, in memory of its own."""
        tensor = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        self.read_into(memory_of(tensor), 0)
        return tensor

    def read_rows(self, begin: int, end: int) -> torch.Tensor:
        """Rows `begin` to `end` of the first dimension."""
        return self.rows(begin, end).read()

    def rows(self, begin: int, end: int) -> "SourceTensor":
        """The unread tensor of rows `begin` to `end` of the first dimension."""
        if not 0 <= begin <= end <= self.shape[0]:
            raise IndexError(f"rows {begin} to {end} of tensor {self.name}, which has {self.shape[0]}")
        row = self.nbytes // max(self.shape[0], 1)
        shape = (end - begin, *self.shape[1:])
        return replace(self, shape=shape, begin=self.begin + begin * row, nbytes=(end - begin) * row)

    def read_into(self, buffer: memoryview, offset: int = 0) -> None:
        """Fills `buffer` with the tensor's bytes from byte `offset` on."""
        if len(buffer):
            self.store.read_into(self.filename, self.begin + offset, buffer, f"tensor {self.name}")


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor; valid as long as the tensor lives."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    size = tensor.numel() * tensor.itemsize
    if not size:
        return memoryview(b"")
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")


class Store:
    """Files by name: what a folder and a repository have in common."""

    name: str  # of the folder, or `id@commit`
    place: str  # for messages: a path or an address that tells files of this store apart

    def files(self) -> dict[str, int]:
        """Sizes of all files by relative name."""
        raise NotImplementedError

    def folders(self) -> list[str]:
        """Names of the folders in it, but hidden ones."""
        raise NotImplementedError

    def read_file(self, filename: str) -> bytes:
        """A whole small file."""
        raise NotImplementedError

    def read_into(self, filename: str, begin: int, buffer: memoryview, what: str) -> None:
        """Fills `buffer` with bytes of a file from `begin` on; `what` is named in messages."""
        raise NotImplementedError

    def identity(self, filename: str) -> dict[str, Any]:
        """What changes when the file changes, without reading it."""
        raise NotImplementedError

    def checksum(self, filename: str) -> str | None:
        """The file's SHA-256 where it is known without reading the file."""
        return None

    def forget_heads(self) -> None:
        """Frees what was kept for reading headers."""

    def path(self, filename: str) -> str:
        """The file's name for messages."""
        return f"{self.place}/{filename}"


class LocalStore(Store):
    """A folder. Links may lead within it, or into the blobs of the Hub cache that it belongs to."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.place, self.name = str(folder), folder.resolve().name
        cache = folder.resolve().parent.parent
        if folder.resolve().parent.name == "snapshots" and cache.name.startswith("models--"):
            self.name = f"{cache.name.removeprefix('models--').replace('--', '/')}@{self.name}"

    def files(self) -> dict[str, int]:
        sizes = {path.name: path.stat().st_size for path in sorted(self.folder.iterdir()) if path.is_file()}
        for name in CARRIED_FOLDERS:
            folder = self.folder / name
            paths = sorted(folder.iterdir()) if folder.is_dir() else []
            sizes |= {f"{name}/{path.name}": path.stat().st_size for path in paths if path.is_file()}
        return sizes

    def folders(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith("."))

    def check_link(self, filename: str) -> None:
        """Refuses files that are links to somewhere else."""
        path, real = self.folder / filename, (self.folder / filename).resolve()
        root = self.folder.resolve()
        allowed = [root]
        if root.parent.name == "snapshots":  # of the Hub cache: snapshots/COMMIT/FILE is a link to blobs/HASH
            allowed.append(root.parent.parent / "blobs")
        if not any(real.is_relative_to(place) for place in allowed):
            raise CheckpointError(f"{path}: is a link out of its folder, to {real}. Copy the file here.")

    def read_file(self, filename: str) -> bytes:
        self.check_link(filename)
        return (self.folder / filename).read_bytes()

    def read_into(self, filename: str, begin: int, buffer: memoryview, what: str) -> None:
        with open(self.folder / filename, "rb", buffering=0) as stream:
            stream.seek(begin)
            done = 0
            while done < len(buffer):
                try:
                    count = stream.readinto(buffer[done:])
                except OSError as error:  # which does not know its file
                    raise CheckpointError(f"{self.path(filename)}: {what} cannot be read: {error.strerror}.") from error
                if not count:
                    raise CheckpointError(f"{self.path(filename)}: ended inside {what}. Download it again.")
                done += count

    def identity(self, filename: str) -> dict[str, Any]:
        status = (self.folder / filename).stat()
        return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


@dataclass
class Source:
    """A checkpoint to convert, of which the headers have been read and checked.

    Attributes:
        name: name of the folder, or `id@commit`.
        config: `config.json`.
        entries: every tensor by name, in the order of files and bytes.
        files: sizes of the weight files by name.
        carried: names of the other files that a converted checkpoint keeps: tokenizer, templates, licence and so on.
        headers: SHA-256 of every weight file's header.
    """

    store: Store
    name: str
    config: dict[str, Any]
    entries: Mapping[str, SourceTensor]
    files: dict[str, int]
    carried: list[str]
    headers: dict[str, str]

    @property
    def local(self) -> bool:
        return isinstance(self.store, LocalStore)

    @property
    def folder(self) -> Path | None:
        """The folder of a local source."""
        return self.store.folder if isinstance(self.store, LocalStore) else None

    def read_file(self, filename: str) -> bytes:
        """A small file, such as `tokenizer.json`."""
        return self.store.read_file(filename)

    def left_behind(self) -> list[str]:
        """What stays: weight files of other formats, adapters, what no index names; and folders, such as pictures."""
        files = [name for name in self.store.files() if name.endswith(WEIGHTS) and name not in self.files]
        folders = [f"{name}/" for name in self.store.folders() if name not in CARRIED_FOLDERS]
        return [name for name in files if f"{name.partition('/')[0]}/" not in folders] + folders

    def path(self, filename: str) -> str:
        """The file's name for messages."""
        return self.store.path(filename)

    def complain(self, name: str, problem: str) -> CheckpointError:
        """An error that names a tensor and its file."""
        return CheckpointError(f"{self.path(self.entries[name].filename)}: tensor {name} {problem}.")

    def fingerprint(self) -> dict[str, Any]:
        """What tells this source from another or a changed one; for resuming, not for publication."""
        weights = {name: {**self.store.identity(name), "header": self.headers[name]} for name in self.files}
        return {"place": self.store.place, "config": self.config, "weights": weights}

    def describe(self) -> dict[str, Any]:
        """The source as a manifest names it: without paths of this machine."""
        files = {}
        for name, size in self.files.items():
            checksum = self.store.checksum(name)
            known = {"sha256": checksum} if checksum else {"header_sha256": self.headers[name]}
            files[name] = {"size": size, **known}
        return {"name": self.name, "files": files}


def open_source(path_or_hub_id: str | os.PathLike, *, revision: str | None = None, token: str | None = None) -> Source:
    """Opens a local folder or, where there is none of that name, a repository on the Hub; reads headers only.

    Args:
        path_or_hub_id: folder with `config.json` and safetensors files, or `organisation/name`.
        revision: branch, tag or commit of a repository.
        token: of the Hub; left out: the one that is logged in.

    Raises:
        CheckpointError: for whatever is wrong with it; the message names the file and what to do.
    """
    return read_source(open_store(path_or_hub_id, revision, token))


def open_store(path_or_hub_id: str | os.PathLike, revision: str | None = None, token: str | None = None) -> "Store":
    """The files of a local folder or, where there is none of that name, of a repository on the Hub.

    With `HF_HUB_OFFLINE` set, a repository is read from the Hub's cache.

    Raises:
        CheckpointError: if there is neither, and for a revision of a folder.
    """
    folder, text = Path(path_or_hub_id), os.fspath(path_or_hub_id)
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"{folder} is a folder, and only repositories have revisions such as {revision!r}. Leave it out, or, "
                f"for the repository {text}, start where there is no such folder."
            )
        return LocalStore(folder)
    if folder.exists():
        raise CheckpointError(f"{folder} is a file. Name the folder of the checkpoint.")
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text:
        raise CheckpointError(f"{text}: there is no such folder.")
    from .hub_store import cached_snapshot, open_hub_store

    snapshot = cached_snapshot(text, revision)
    return open_hub_store(text, revision, token) if snapshot is None else LocalStore(snapshot)


def read_source(store: Store) -> Source:
    """Reads and checks the configuration, the index and all headers of a store."""
    present = store.files()
    config = _read_config(store, present)
    filenames, weight_map = _weight_files(store, present)
    carried = carried_files(present)
    if isinstance(store, LocalStore):
        for filename in carried:
            store.check_link(filename)
    entries: dict[str, SourceTensor] = {}
    headers: dict[str, str] = {}
    for filename, (found, headers[filename]) in zip(filenames, _read_headers(store, filenames, present)):
        for entry in found:
            if entry.name in entries:
                places = f"{store.path(entries[entry.name].filename)} and {store.path(filename)}"
                raise CheckpointError(f"Tensor {entry.name} is in both {places}.")
            entries[entry.name] = entry
    _check_weight_map(store, entries, weight_map)
    if not entries:
        raise CheckpointError(f"{store.place}: the weight files hold no tensor.")
    files = {filename: present[filename] for filename in filenames}
    return Source(store, store.name, config, entries, files, carried, headers)


def _read_headers(store: Store, filenames: list[str], sizes: Mapping[str, int]) -> Iterator[tuple]:
    """What `read_header` returns for each file; a few at a time, since a repository takes a while to answer."""
    with ThreadPoolExecutor(8) as pool:
        yield from pool.map(lambda filename: read_header(store, filename, sizes[filename]), filenames)
    store.forget_heads()


def _read_config(store: Store, present: Mapping[str, int]) -> dict[str, Any]:
    if "config.json" not in present:
        raise CheckpointError(f"{store.path('config.json')}: missing. It says how the weights are to be read.")
    config = read_json(store, "config.json")
    if not (config.get("model_type") or config.get("architectures")):
        raise CheckpointError(f"{store.path('config.json')}: names neither `model_type` nor `architectures`.")
    return config


def read_json(store: Store, filename: str) -> dict[str, Any]:
    """A JSON object, in which no key may stand twice."""
    try:
        content = json.loads(store.read_file(filename).decode("utf-8"), object_pairs_hook=_unique_keys)
    except (UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(f"{store.path(filename)}: not readable as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{store.path(filename)}: holds {type(content).__name__}, not a JSON object.")
    return content


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return result


def _weight_files(store: Store, present: Mapping[str, int]) -> tuple[list[str], dict[str, str] | None]:
    """Names of the weight files, and the index's table where there is an index."""
    if INDEX_NAME in present:
        weight_map = read_json(store, INDEX_NAME).get("weight_map")
        path = store.path(INDEX_NAME)
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{path}: not a checkpoint index (it has no table `weight_map` of file names).")
        if not weight_map:
            raise CheckpointError(f"{path}: the index names no tensor.")
        filenames = sorted(set(weight_map.values()))
        for filename in filenames:
            if Path(filename).name != filename or filename in ("", ".", "..") or "\\" in filename:
                raise CheckpointError(f"{path}: names {filename!r}, which is not a file of this folder.")
            _refuse_pickle(store, filename)
            if filename not in present:
                raise CheckpointError(f"{store.path(filename)}: this shard of {INDEX_NAME} is missing.")
        if SINGLE_NAME in present and SINGLE_NAME not in filenames:  # which Transformers would load instead
            raise CheckpointError(
                f"{store.path(SINGLE_NAME)}: stands beside {INDEX_NAME}, which does not name it. Only one of the two "
                "can be the checkpoint: move the other one away."
            )
        return filenames, weight_map
    if SINGLE_NAME in present:
        return [SINGLE_NAME], None
    loose = [name for name in present if name.endswith(".safetensors") and "/" not in name]
    adapters = [name for name in loose if name.startswith("adapter_")]
    if len(loose) > len(adapters):
        return sorted(set(loose) - set(adapters)), None
    if adapters:
        raise CheckpointError(f"{store.path(adapters[0])}: is an adapter. `hf-moe merge` puts it into its base model.")
    for filename in present:
        _refuse_pickle(store, filename)
    raise CheckpointError(
        f"{store.place}: holds no weights; looked for {SINGLE_NAME}, {INDEX_NAME} and other safetensors files."
    )


def _refuse_pickle(store: Store, filename: str) -> None:
    if filename.endswith(PICKLES):
        raise CheckpointError(
            f"{store.path(filename)}: is a pickle, which can run code when it is read, and hf_moe does not read it. "
            "Convert it to safetensors first."
        )
    if filename.endswith(WEIGHTS) and not filename.endswith(".safetensors"):
        raise CheckpointError(f"{store.path(filename)}: only safetensors files are read. Convert it first.")


def _check_weight_map(store: Store, entries: Mapping[str, SourceTensor], weight_map: dict[str, str] | None) -> None:
    if weight_map is None:
        return
    for name, filename in weight_map.items():
        if name not in entries or entries[name].filename != filename:
            raise CheckpointError(
                f"{store.path(INDEX_NAME)}: says that {filename} holds {name}, but it does not. Download both again."
            )
    for name, entry in entries.items():
        if name not in weight_map:
            path = store.path(entry.filename)
            raise CheckpointError(f"{path}: tensor {name} is not in {INDEX_NAME}. Download both again.")


def carried_files(present: Iterable[str]) -> list[str]:
    """Which files a conversion carries unchanged: all but weights, indices, `config.json` and hidden ones.

    Python files stay, and `auto_map` with them: a checkpoint that brings code of its own works with that code before
    and after, since a conversion changes formats that the code never sees. Whoever wants ours saves the model with it.
    """
    kept = []
    for name in present:
        folder, _, base = name.rpartition("/")
        known = not folder or folder in CARRIED_FOLDERS
        if known and not base.startswith(".") and base not in NOT_CARRIED:
            if not base.endswith(WEIGHTS) and not base.endswith(".index.json"):
                kept.append(name)
    return sorted(kept)


def read_header(store: Store, filename: str, size: int) -> tuple[list[SourceTensor], str]:
    """The tensors of a safetensors file in the order of their bytes, and the SHA-256 of its header.

    Raises:
        CheckpointError: for a file that is truncated or too long, a header that is damaged, and tensors that overlap,
            leave holes, or have another number of bytes than their shape needs.
    """
    path = store.path(filename)
    if isinstance(store, LocalStore):
        store.check_link(filename)
    if size < 8:
        raise CheckpointError(f"{path}: not a safetensors file ({size} bytes). Download it again.")
    prefix = bytearray(8)
    store.read_into(filename, 0, memoryview(prefix), "the header")
    length = struct.unpack("<Q", prefix)[0]
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(f"{path}: not a safetensors file, or cut off inside its header. Download it again.")
    raw = bytearray(length)
    store.read_into(filename, 8, memoryview(raw), "the header")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
    except ValueError as error:
        raise CheckpointError(f"{path}: the safetensors header is damaged ({error}).") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is damaged (it is no JSON object).")
    header.pop("__metadata__", None)
    entries = [_entry(store, filename, name, fields, 8 + length) for name, fields in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.begin + entry.nbytes))
    _check_ranges(path, entries, 8 + length, size)
    return entries, hashlib.sha256(prefix + raw).hexdigest()


def _entry(store: Store, filename: str, name: str, fields: Any, data_begin: int) -> SourceTensor:
    path = store.path(filename)
    try:
        dtype_name, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError):
        numbers = [-1]
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
        raise CheckpointError(f"{path}: the safetensors header is damaged at tensor {name}.")
    dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        raise CheckpointError(f"{path}: tensor {name} has the unknown dtype {dtype_name}.")
    needed = dtype.itemsize
    for length in shape:
        needed *= length
    if end - begin != needed:
        raise CheckpointError(f"{path}: tensor {name} has {end - begin} bytes, but its shape needs {needed}.")
    return SourceTensor(store, name, dtype, tuple(shape), filename, data_begin + begin, needed)


def _check_ranges(path: str, entries: list[SourceTensor], begin: int, size: int) -> None:
    for entry in entries:
        if entry.begin < begin:
            raise CheckpointError(f"{path}: the bytes of tensor {entry.name} overlap with those of another tensor.")
        if entry.begin > begin:
            raise CheckpointError(f"{path}: {entry.begin - begin} bytes before tensor {entry.name} belong to none.")
        begin += entry.nbytes
    if begin > size:
        raise CheckpointError(
            f"{path}: truncated, {size:,} bytes where its header promises {begin:,}. Download it again."
        )
    if begin < size:
        raise CheckpointError(f"{path}: {size - begin:,} bytes after the last tensor belong to none.")
