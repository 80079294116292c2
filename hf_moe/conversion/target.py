"""Where a conversion writes: a target that must not hold anything, and the folder beside it until all is there."""

import contextlib
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from ..folders import why_not_writable
from ..models.weights_safetensors import CheckpointError
from .source import Source

STATE_NAME = "state.json"
FILES_NAME = "files"
LOCK_NAME = "lock"
_OWN = (STATE_NAME, f"{STATE_NAME}.part", FILES_NAME, LOCK_NAME)


def check_target(source: Source, target: Path) -> None:
    """Refuses targets that would overwrite something, or whose partial folder is somebody else's.

    Raises:
        CheckpointError: that names the folder.
    """
    real = target.resolve()
    if source.folder is not None:
        origin = source.folder.resolve()
        if real == origin or real.is_relative_to(origin) or origin.is_relative_to(real):
            raise CheckpointError(f"{target}: lies in the source {source.folder}, or around it. Name another folder.")
    if target.is_symlink():
        raise CheckpointError(f"{target}: is a link. Name a folder.")
    if target.exists():
        if not target.is_dir():
            raise CheckpointError(f"{target}: is a file. Name a folder that does not exist yet.")
        if any(target.iterdir()):
            raise CheckpointError(f"{target}: exists and is not empty. Name another folder, or remove it.")
        if os.path.ismount(target):
            raise CheckpointError(f"{target}: is a mount point, which cannot be replaced. Name a folder in it.")
    problem = why_not_writable(target.absolute().parent)
    if problem is not None:
        raise CheckpointError(f"{target}: {problem}")
    _check_partial(source, partial_path(target))


def _check_partial(source: Source, folder: Path) -> None:
    """Refuses a partial folder that is not a conversion's: what is left of it is removed in the end."""
    if folder.is_symlink():  # the last rename cannot lead to another disk
        raise CheckpointError(f"{folder}: is a link. Remove it, or name another target.")
    if not folder.is_dir():
        return
    if source.folder is not None and source.folder.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{folder}: the source lies there, where the conversion writes. Name another target.")
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in _OWN)
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise CheckpointError(
            f"{folder}: holds {foreign[0]}{more}, which no conversion accounts for. Move the folder, or name another "
            "target."
        )


def partial_path(target: Path) -> Path:
    """Where a conversion to `target` lies until it is complete."""
    return target.with_name(target.name + ".partial")


@contextlib.contextmanager
def partial_folder(source: Source, target: Path, progress: bool) -> Iterator[Path]:
    """The partial folder of a target, locked against a second conversion; removed if nothing is worth keeping.

    Raises:
        CheckpointError: where it cannot be made, another conversion is at work, or files of nobody are in it.
    """
    folder = partial_path(target.absolute())
    try:
        (folder / FILES_NAME).mkdir(parents=True, exist_ok=True)
        lock = _lock(folder, progress)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be made ({error.strerror}). Name another target.") from error
    try:
        # Another conversion may have ended, and put its target there, while this one read its source.
        check_target(source, target)
        if not (folder / FILES_NAME).is_dir():
            raise CheckpointError(f"{folder}: another conversion ended there just now. Repeat the command.")
        if not (folder / STATE_NAME).exists() and any((folder / FILES_NAME).iterdir()):
            raise CheckpointError(f"{folder}: holds files that no conversion accounts for. Move them or remove it.")
        try:
            yield folder
        finally:
            if not (folder / STATE_NAME).exists():
                shutil.rmtree(folder / FILES_NAME, ignore_errors=True)
    finally:
        _remove_empty(folder)
        os.close(lock)


def _remove_empty(folder: Path) -> None:
    """Removes a partial folder with nothing in it but a lock and an empty folder."""
    if (folder / STATE_NAME).exists():
        return
    with contextlib.suppress(OSError):  # not empty: nothing of ours
        if (folder / FILES_NAME).exists():
            (folder / FILES_NAME).rmdir()
        (folder / LOCK_NAME).unlink(missing_ok=True)
        folder.rmdir()


def _lock(folder: Path, progress: bool) -> int:
    """A descriptor that holds the lock of a folder until it is closed."""
    # NFS locks only what is open for writing, which folders never are; some file systems lock nothing.
    for path, mode in ((folder, os.O_RDONLY), (folder / LOCK_NAME, os.O_RDWR | os.O_CREAT)):
        descriptor = os.open(path, mode)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise CheckpointError(f"{folder}: another conversion is writing to it.") from None
        except OSError:
            os.close(descriptor)
    if progress:
        print(f"{folder} cannot be locked: start no second conversion to this target.", file=sys.stderr, flush=True)
    return os.open(folder, os.O_RDONLY)
