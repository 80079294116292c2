"""The command line as tests call it, and small checkpoint folders to call it with."""

import errno
import json
import os
import re
import struct
import time
from pathlib import Path

from models.checkpoints import edited_golden, read_config, read_tensors, write_checkpoint  # noqa: F401
from typer.testing import CliRunner

from hf_moe.cli import app


def run(*arguments):
    """The result of `hf-moe` with these arguments."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "1000"})


def message(result) -> str:
    """Everything that was printed, as one line without the frame around errors."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", result.output)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its content; folders and links with `None`."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in sorted(folder.rglob("*"))
    }


def rewrite_header(path: Path, edit) -> None:
    """Writes a safetensors file anew with the text `edit(header)` returns for the header, bytes behind it unchanged."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = edit(json.loads(data[8 : 8 + length]))
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def edit_json(path: Path, edit) -> None:
    """Writes a JSON file anew after `edit(content)`, which may change it or return another."""
    content = json.loads(path.read_text(encoding="utf-8"))
    result = edit(content)
    path.write_text(json.dumps(content if result is None else result), encoding="utf-8")


def fills_up(monkeypatch, limit=100_000, state=None):
    """Writes fail after `limit` bytes; given a conversion's state file, not before that names a finished file."""
    written = []
    write = os.pwrite

    def fail(descriptor, data, offset):
        written.append(len(data))
        if sum(written) > limit:
            deadline = time.monotonic() + 20
            while state is not None and "sha256" not in state.read_text() and time.monotonic() < deadline:
                time.sleep(0.01)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", fail)
