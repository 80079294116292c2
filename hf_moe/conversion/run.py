"""Carries out a plan: reads, converts and writes piece by piece, in bounded memory, and can be stopped at any moment.

What is written lies in `TARGET.partial` until all of it is there; then one rename makes it the target. The state file
there names the finished files with their checksums, so that the same command goes on where it was stopped, and another
one is refused.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..models.weights_safetensors import INDEX_NAME, CheckpointError
from ..units import bytes_text
from ..version import __version__
from .plan import Copy, Group, Part, Plan, Tensors
from .progress import ProgressDisplay
from .source import MANIFEST_NAME, Source, memory_of, read_json
from .target import FILES_NAME, STATE_NAME, check_target, partial_folder, partial_path
from .writer import (
    PIECE_BYTES,
    Piece,
    Shard,
    ShardWriter,
    by_rows,
    file_hash,
    lay_out,
    parse_size,
    pieces_of,
    source_part,
)

__all__ = ["Summary", "convert", "partial_path"]

_SPARE_BYTES = 16 << 20  # beside the tensors: index, manifest, file system
_COPY_BYTES = 8 << 20
_OPEN_FILES = 8


@dataclass
class Summary:
    """What a conversion wrote, or would write.

    Attributes:
        title, target: of the plan and where.
        tensors: how many are written.
        shards: weight files with their sizes.
        bytes_read, bytes_written: of tensors.
        memory: bytes of the largest part that is in memory at once, times the number of workers.
        files: other files that are written.
        notes: what the user should know.
        resumed: files that an earlier run had finished.
        seconds: that this run took.
        manifest: content of `conversion.json`; empty for a dry run.
    """

    title: str
    target: Path
    tensors: int
    shards: dict[str, int]
    bytes_read: int
    bytes_written: int
    memory: int
    files: list[str]
    notes: list[str] = field(default_factory=list)
    resumed: list[str] = field(default_factory=list)
    seconds: float = 0.0
    manifest: dict[str, Any] = field(default_factory=dict)


def convert(
    source: Source,
    plan: Plan,
    target: str | os.PathLike,
    *,
    workers: int = 2,
    max_shard_size: int | str = "5GB",
    dry_run: bool = False,
    progress: bool = True,
) -> Summary:
    """Writes the checkpoint that `plan` makes of `source` to the folder `target`.

    Args:
        source, plan: what is read, and what becomes of it.
        target: a folder that does not exist or is empty. It appears when everything is written.
        workers: threads that read, convert and write. Their number does not change the result.
        max_shard_size: of weight files, such as `5GB`; no tensor is cut. Plans with files of their own ignore it.
        dry_run: only says what would be written.
        progress: whether to report on standard error.

    Raises:
        CheckpointError: for a target that is not empty, too little disk space, the remains of another conversion, and
            for what is wrong with the source.
        KeyboardInterrupt: with a message that says how to go on.
    """
    target = Path(target)
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}.")
    check_target(source, target)
    shards = lay_out(plan, parse_size(max_shard_size))
    pieces = {shard.filename: _pieces(source, shard) for shard in shards}
    summary = _summary(source, plan, target, shards, pieces, workers)
    if dry_run:
        return summary
    started = time.monotonic()
    with partial_folder(source, target, progress) as folder:
        job = _Job(source, plan, target, folder, shards, pieces, workers)
        summary.resumed = job.load_state(progress)
        job.check_disk()
        job.run(summary, progress)
        try:
            summary.manifest = job.finish()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(job.interrupted()) from None
    summary.seconds = time.monotonic() - started
    return summary


def _pieces(source: Source, shard: Shard) -> list[Piece]:
    return [piece for group in shard.groups for piece in pieces_of(source, shard, group)]


def _summary(source, plan, target, shards, pieces, workers) -> Summary:
    largest = max((piece.memory for found in pieces.values() for piece in found), default=0)
    read = sum(source_part(source, part).nbytes for group in plan.groups for part in group.inputs)
    carried = source.carried if plan.carried is None else plan.carried
    files = [*([] if plan.config is None else ["config.json"]), *plan.files, *carried]
    if plan.shard_of is None and len(shards) > 1:
        files.append(INDEX_NAME)
    left = source.left_behind()
    return Summary(
        title=plan.title,
        target=target,
        tensors=sum(len(group.outputs) for group in plan.groups),
        shards={shard.filename: shard.size for shard in shards},
        bytes_read=read,
        bytes_written=sum(shard.size for shard in shards),
        memory=_budget(largest, workers),
        files=sorted(set(files) | {MANIFEST_NAME}),
        notes=[*plan.notes, *([f"left behind, as no part of the checkpoint: {', '.join(left)}"] if left else [])],
    )


def _budget(largest: int, workers: int) -> int:
    return max(largest, workers * PIECE_BYTES)


class _Job:
    """One run of a conversion: the threads, what they share, and the state on disk."""

    def __init__(self, source, plan, target, folder, shards, pieces, workers):
        self.source, self.plan, self.target, self.workers = source, plan, target, workers
        self.state_path, self.files = folder / STATE_NAME, folder / FILES_NAME
        self.shards: list[Shard] = shards
        self.pieces: dict[str, list[Piece]] = pieces
        self.identity = _identity(source, plan, shards)
        self.earlier = _earlier_steps(source)  # read now: a damaged record is no news for the end
        self.finished: dict[str, dict[str, Any]] = {}
        self.stop = threading.Event()
        self.lock = threading.Lock()
        largest = max((piece.memory for found in pieces.values() for piece in found), default=0)
        self.memory = _Budget(_budget(largest, workers), self.stop)

    # State on disk

    def load_state(self, progress: bool) -> list[str]:
        """Takes over what an earlier run finished, checked by its checksums; returns those files' names."""
        if not self.state_path.exists():
            self.save_state()
            return []
        try:
            state = json.loads(self.state_path.read_text(encoding="utf-8"))
            known, finished = dict(state["identity"]), dict(state["finished"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.state_path}: damaged ({error!r}). Remove {self.state_path.parent}."
            ) from error
        different = [key for key in self.identity if known.get(key) != self.identity[key]]
        if different:
            raise CheckpointError(
                f"{self.state_path.parent}: holds a part of another conversion (the {' and the '.join(different)} "
                "differ). Repeat that one with its source and options to finish it, or remove the folder to begin anew."
            )
        if finished and progress:
            print(f"checking {len(finished)} finished weight files", file=sys.stderr, flush=True)
        sizes = {shard.filename: shard.size for shard in self.shards}
        pool = ThreadPoolExecutor(self.workers, "check")
        try:
            with ProgressDisplay("finished files", sum(sizes.get(name, 0) for name in finished), progress) as display:
                for filename, good in zip(finished, pool.map(self._is_good, finished, finished.values())):
                    display.advance(sizes.get(filename, 0))
                    if good:
                        self.finished[filename] = finished[filename]
        except KeyboardInterrupt:
            self.stop.set()
            pool.shutdown(cancel_futures=True)
            raise KeyboardInterrupt(f"Interrupted; {self.state_path.parent} is as it was.") from None
        pool.shutdown()
        return list(self.finished)

    def _is_good(self, filename: str, record: dict[str, Any]) -> bool:
        path = self.files / filename
        if not path.is_file() or path.stat().st_size != record["size"]:
            return False
        return file_hash(path, self.stop) == record["sha256"]

    def save_state(self) -> None:
        """Writes the state, at once or not at all."""
        _write_file(self.state_path, _json({"identity": self.identity, "finished": self.finished}))

    def check_disk(self) -> None:
        """Refuses a conversion for which the disk has no room."""
        needed = _SPARE_BYTES + sum(shard.size for shard in self.shards if shard.filename not in self.finished)
        sizes = self.source.store.files()
        carried = self.source.carried if self.plan.carried is None else self.plan.carried
        needed += sum(sizes[name] for name in carried) + sum(map(len, self.plan.files.values()))
        for path in self.files.iterdir():  # what was under way, and is written again
            if path.is_dir():  # of carried templates
                shutil.rmtree(path)
            elif path.name not in self.finished:
                path.unlink()
        free = shutil.disk_usage(self.files).free
        if needed > free:
            self._drop_empty_state()
            raise CheckpointError(
                f"{self.target}: the disk has {bytes_text(free)} free, but the conversion needs {bytes_text(needed)}."
            )

    def _drop_empty_state(self) -> None:
        if not self.finished:
            self.state_path.unlink(missing_ok=True)

    # Work

    def run(self, summary: Summary, progress: bool) -> None:
        """Makes all weight files that are not finished."""
        todo = [shard for shard in self.shards if shard.filename not in self.finished]
        total = sum(shard.size for shard in self.shards)
        threads_before = torch.get_num_threads()
        with ProgressDisplay(self.plan.title, total, progress) as self.display:
            self.display.skip(total - sum(shard.size for shard in todo))
            if summary.resumed:
                self.display.say(f"going on: {len(summary.resumed)} of {len(self.shards)} weight files are there")
            self.queue = self._work(todo)
            self.writers: dict[str, ShardWriter] = {}
            self.opened = threading.Condition()
            torch.set_num_threads(1)
            # A thread's first numbers of PyTorch would be made by as many threads again.
            pool = ThreadPoolExecutor(self.workers + 1, "convert", torch.set_num_threads, (1,))
            try:
                futures = [pool.submit(self._worker) for _ in range(self.workers)]
                futures.append(pool.submit(self._hasher, todo))
                wait(futures, return_when=FIRST_EXCEPTION)
            except KeyboardInterrupt:
                self.stop.set()
                pool.shutdown()
                raise KeyboardInterrupt(self.interrupted()) from None
            finally:
                self.stop.set()  # without an exception all have ended
                pool.shutdown()
                for writer in self.writers.values():
                    writer.stream.close()
                torch.set_num_threads(threads_before)
        failed = next((future for future in futures if future.exception() is not None), None)
        if failed is not None:
            self._drop_empty_state()  # nothing to go on with
            try:
                failed.result()
            except CheckpointError:
                raise
            except OSError as error:
                raise self._explain(error) from error

    def interrupted(self) -> str:
        """What an interrupted conversion says."""
        done = f"{len(self.finished)} of {len(self.shards)} weight files are finished"
        return f"Interrupted; {done} in {self.state_path.parent}. Repeat the command to go on."

    def _explain(self, error: OSError) -> CheckpointError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return CheckpointError(
                f"{self.files}: the disk is full ({error.strerror}). Make room and repeat the command to go on; "
                f"{len(self.finished)} of {len(self.shards)} weight files are finished."
            )
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return CheckpointError(
                f"{self.target}: was filled by somebody else meanwhile. Move that folder and repeat the command; all "
                f"weight files are finished in {self.files}."
            )
        return CheckpointError(f"{error.filename or self.files}: {error.strerror or error}.")

    def _work(self, todo: list[Shard]) -> Iterator[Piece]:
        for shard in todo:
            with self.opened:  # a few open files at once, however small they are
                while len(self.writers) >= _OPEN_FILES and not self.stop.is_set():
                    self.opened.wait(0.2)
                self.writers[shard.filename] = ShardWriter(self.files / shard.filename, shard)
                self.opened.notify_all()
            yield from self.pieces[shard.filename]

    def _worker(self) -> None:
        while not self.stop.is_set():
            with self.lock:
                piece = next(self.queue, None)
            if piece is None:
                return
            with self.memory.hold(piece.memory):
                if not self.stop.is_set():
                    _do(self.source, piece, self.writers[piece.shard.filename], self.display)

    def _hasher(self, todo: list[Shard]) -> None:
        for shard in todo:
            with self.opened:
                while shard.filename not in self.writers and not self.stop.is_set():
                    self.opened.wait(0.2)
            if self.stop.is_set():
                return
            writer = self.writers[shard.filename]
            digest = writer.hash(self.stop)
            if digest is None:
                return
            os.fsync(writer.stream.fileno())  # what counts as finished outlives a loss of power
            writer.stream.close()
            report = _merge([writer.report[key] for key in sorted(writer.report)])
            record = {"size": shard.size, "sha256": digest, **({"report": report} if report else {})}
            self.finished[shard.filename] = record
            self.save_state()
            with self.opened:
                del self.writers[shard.filename]
                self.opened.notify_all()

    # The end

    def finish(self) -> dict[str, Any]:
        """Writes the small files and the manifest, and puts everything in its place."""
        files: dict[str, dict[str, Any]] = {}
        for shard in self.shards:
            record = self.finished[shard.filename]
            files[shard.filename] = {"size": record["size"], "sha256": record["sha256"]}
        small = dict(self.plan.files)
        if self.plan.config is not None:
            store = self.source.store  # whose file may be in other words: that of DeepSeek's inference code
            kept = "config.json" in store.files() and self.plan.config == read_json(store, "config.json")
            small["config.json"] = self.source.read_file("config.json") if kept else _json(self.plan.config, sort=False)
        if self.plan.shard_of is None and len(self.shards) > 1:
            small[INDEX_NAME] = self._index()
        try:
            for name, content in small.items():
                _write_file(self.files / name, content)
                files[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name in self.source.carried if self.plan.carried is None else self.plan.carried:
                if name not in files:
                    files[name] = self._carry(name)
            manifest = self._manifest(files)
            _write_file(self.files / MANIFEST_NAME, _json(manifest, sort=False))
            os.replace(self.files, self.target)
            self.state_path.unlink()
        except CheckpointError:
            raise
        except OSError as error:
            raise self._explain(error) from error
        return manifest

    def _index(self) -> bytes:
        outputs = [(output, shard.filename) for shard in self.shards for output in shard.outputs]
        weight_map = {output.name: filename for output, filename in sorted(outputs, key=lambda pair: pair[0].name)}
        total = sum(output.nbytes for output, _ in outputs)
        return _json({"metadata": {"total_size": total}, "weight_map": weight_map}, sort=False)

    def _carry(self, name: str) -> dict[str, Any]:
        size, path = self.source.store.files()[name], self.files / name
        path.parent.mkdir(exist_ok=True)
        digest = hashlib.sha256()
        with open(path, "wb") as stream:
            for begin in range(0, size, _COPY_BYTES):
                block = bytearray(min(_COPY_BYTES, size - begin))
                self.source.store.read_into(name, begin, memoryview(block), "the file")
                digest.update(block)
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
        return {"size": size, "sha256": digest.hexdigest()}

    def _manifest(self, files: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Without times and paths: equal runs give equal manifests."""
        report = _merge([self.finished[shard.filename].get("report", {}) for shard in self.shards])
        step = {
            "title": self.plan.title,
            "options": self.plan.options,
            "hf_moe": __version__,
            "torch": torch.__version__,
            "source": self.source.describe(),
            **({"report": report} if report else {}),
        }
        return {
            "format": 1,
            "steps": [*self.earlier, step],
            "tensors": sum(len(group.outputs) for group in self.plan.groups),
            "bytes": sum(output.nbytes for shard in self.shards for output in shard.outputs),
            "files": dict(sorted(files.items())),
        }


def _earlier_steps(source: Source) -> list[Any]:
    """The conversions that the source remembers."""
    if MANIFEST_NAME not in source.store.files():
        return []
    steps = read_json(source.store, MANIFEST_NAME).get("steps")
    return steps if isinstance(steps, list) else []


class _Budget:
    """Bytes that pieces may hold in memory together; one alone may always run."""

    def __init__(self, limit: int, stop: threading.Event):
        self.limit, self.stop, self.used = limit, stop, 0
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, count: int) -> Iterator[None]:
        with self.changed:
            while self.used and self.used + count > self.limit and not self.stop.is_set():
                self.changed.wait(0.2)
            self.used += count
        try:
            yield
        finally:
            with self.changed:
                self.used -= count
                self.changed.notify_all()


def _do(source: Source, piece: Piece, writer: ShardWriter, display: ProgressDisplay) -> None:
    """Reads, converts and writes a piece."""
    group, offsets = piece.group, piece.shard.offsets
    if isinstance(group.step, Copy) and not by_rows(group):
        buffer = torch.empty(piece.end - piece.begin, dtype=torch.uint8)
        source_part(source, piece.source).read_into(memory_of(buffer), piece.begin - piece.start)
        writer.write(offsets[group.outputs[0].name] + piece.begin, memory_of(buffer))
        display.advance(piece.end - piece.begin)
        return
    inputs = _read(source, piece)
    if by_rows(group):
        results, report = {group.outputs[0].name: next(iter(inputs.values()))}, {}
    else:
        results = group.step(inputs)
        results, report = results if isinstance(results, tuple) else (results, {})
    del inputs
    if report:
        writer.report[offsets[group.outputs[0].name] + piece.begin] = report
    for output in group.outputs:
        tensor = results.pop(output.name).contiguous()
        row = output.nbytes // output.shape[0] if output.shape and output.shape[0] else 0
        strip = 1 if by_rows(group) else group.strip[output.name] if group.strip else 0
        rows = min(piece.end * strip, output.shape[0]) - piece.begin * strip if strip else None
        shape = output.shape if rows is None else (rows, *output.shape[1:])
        if tensor.dtype != output.dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"{output.name} became {tensor.dtype} {tuple(tensor.shape)}, not {output.dtype} {shape}")
        data = memory_of(tensor)
        writer.write(offsets[output.name] + piece.begin * strip * row, data)
        display.advance(len(data))


def _read(source: Source, piece: Piece) -> Tensors:
    """The inputs of a piece, by name or alias."""
    group = piece.group
    tensors = {}
    for part in group.inputs:
        name = part if isinstance(part, str) else part.alias or part.name
        entry = source_part(source, part)
        if by_rows(group):
            rows = entry.read_rows(piece.begin, piece.end)
            tensors[name] = rows[:, part.begin : part.end].contiguous()
        elif group.strip is not None:
            strip = group.strip[part]
            tensors[name] = entry.read_rows(piece.begin * strip, min(piece.end * strip, entry.shape[0]))
        elif isinstance(part, Part) and part.dim == 1:
            tensors[name] = _read_columns(entry, part)
        else:
            tensors[name] = entry.read()
    return tensors


def _read_columns(entry, part: Part) -> torch.Tensor:
    """Columns of a matrix, whose other columns are in memory a few rows at a time only."""
    result = torch.empty((entry.shape[0], part.end - part.begin), dtype=entry.dtype)
    rows = max(1, PIECE_BYTES // 4 // max(entry.shape[1] * entry.dtype.itemsize, 1))
    for begin in range(0, entry.shape[0], rows):
        end = min(begin + rows, entry.shape[0])
        result[begin:end] = entry.read_rows(begin, end)[:, part.begin : part.end]
    return result


def _identity(source: Source, plan: Plan, shards: list[Shard]) -> dict[str, Any]:
    """What two runs must have in common for one to go on with the other's files; JSON."""
    digest = hashlib.sha256()
    for group in plan.groups:
        digest.update(f"{group.inputs}|{[output.name for output in group.outputs]}|{_step_name(group)}".encode())
    carried = source.carried if plan.carried is None else plan.carried
    headers = {shard.filename: hashlib.sha256(shard.header).hexdigest() for shard in shards}
    identity = {
        "source": source.fingerprint(),
        "version of hf_moe": __version__,
        "conversion": [plan.title, plan.options, digest.hexdigest()],
        "sizes of the weight files": headers,
        "configuration": plan.config,
        "other files": [list(carried), {name: hashlib.sha256(data).hexdigest() for name, data in plan.files.items()}],
    }
    return json.loads(json.dumps(identity))


def _step_name(group: Group) -> str:
    return repr(group.step) if hasattr(group.step, "__dataclass_fields__") else group.step.__qualname__


def _merge(reports: list[dict[str, float]]) -> dict[str, float]:
    merged: dict[str, float] = {}
    for report in reports:
        for key, value in report.items():
            known = merged.get(key, 0)
            merged[key] = max(known, value) if key.startswith("max_") else known + value
    return merged


def _json(content: Any, sort: bool = True) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=sort, ensure_ascii=False) + "\n").encode()


def _write_file(path: Path, content: bytes) -> None:
    """Writes a small file under another name and renames it."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
