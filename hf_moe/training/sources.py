"""Samples from files and from the Hub, checked one by one: an error names the file and the line.

A sample is `{"text": ...}`, `{"prompt": ..., "completion": ...}` (strings or messages) or `{"messages": [...]}`; what
else a row holds is left aside. `conversations` of `from` and `value` are read as messages.
"""

import gzip
import importlib.util
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT, COMPLETION, CHAT = "text", "completion", "chat"
JSON_SUFFIXES, TEXT_SUFFIXES = (".jsonl", ".json", ".ndjson"), (".txt", ".text", ".md", ".rst")
TABLE_SUFFIXES = (".parquet", ".csv", ".arrow")
# How files and folders are named that hold a split.
SPLITS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
ROLES = {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool"}


class DataError(ValueError):
    """Data that cannot be trained on; the message names the file and the line."""


@dataclass(frozen=True)
class Sample:
    """One sample: `kind` says which of `values` there are, `where` names its place for messages."""

    kind: str
    values: dict[str, Any]
    where: str
    running_text: bool = False  # from a text file: may be cut anywhere


def read_samples(
    name: str,
    config: str | None = None,
    split: str = "train",
    text_field: str = "text",
    sample_by: str = "document",
    limit: int | None = None,
) -> Iterator[Sample]:
    """Yields the samples of a file, of the files of a folder, or of a dataset on the Hub.

    Raises:
        DataError: for what is not there, empty, not UTF-8, no JSON, or of the wrong keys.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if split != "train":
            raise DataError(f"{name} is a file, which has no split {split!r}: name other data by --eval_dataset_name")
        samples = _read_file(path, text_field, sample_by)
    elif path.is_dir():
        samples = _read_folder(path, split, text_field, sample_by)
    elif path.suffix in (*JSON_SUFFIXES, *TEXT_SUFFIXES, *TABLE_SUFFIXES, ".gz") or name.startswith((".", "/", "~")):
        raise DataError(f"no such file or folder: {name}")
    else:
        samples = _read_hub(name, config, split, text_field)
    first, count = None, 0
    for sample in samples:
        first = first or sample
        if sample.kind != first.kind:
            raise DataError(f"{sample.where}: a {sample.kind} sample, but {first.where} is a {first.kind} sample")
        yield sample
        count += 1
        if count == limit:
            return
    if not count:
        raise DataError(f"{name} is empty: there is no sample in it")


def _suffix(path: Path) -> str:
    """What kind of file it is: `.jsonl`, of `data.jsonl.gz` too; tables are not read compressed."""
    inner = Path(path.stem).suffix
    return inner if path.suffix == ".gz" and inner not in TABLE_SUFFIXES else path.suffix


def _read_file(path: Path, text_field: str, sample_by: str) -> Iterator[Sample]:
    suffix = _suffix(path)
    if suffix in TABLE_SUFFIXES:
        yield from _read_table(path, text_field)
    elif suffix in JSON_SUFFIXES:
        for line, row in _read_json(path):
            yield check_row(row, f"{path}, line {line}", text_field)
    elif suffix in TEXT_SUFFIXES:
        yield from _read_text(path, sample_by)
    else:
        known = ", ".join((*JSON_SUFFIXES, *TABLE_SUFFIXES, *TEXT_SUFFIXES))
        raise DataError(f"{path}: do not know how to read *{path.suffix or path.name}; known are {known}")


def _read_folder(path: Path, split: str, text_field: str, sample_by: str) -> Iterator[Sample]:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        _need_datasets(path)
        from datasets import load_from_disk

        data = load_from_disk(str(path))
        if (path / "dataset_dict.json").is_file():
            if split not in data:
                raise DataError(f"{path} has no split {split!r}, but {', '.join(data)}")
            data = data[split]
        yield from _check_rows(data, str(path), text_field)
        return
    known = (*JSON_SUFFIXES, *TABLE_SUFFIXES, *TEXT_SUFFIXES)
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and _suffix(file) in known]
    # What editors, notebooks and the Hub's client keep beside the data, and what describes it.
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    files = [file for file in files if not file.name.upper().startswith(("README.", "LICENSE."))]
    if not files:
        raise DataError(f"{path} holds no file of a kind that is known: {', '.join(known)}")
    for file in _files_of_split(path, files, split):
        yield from _read_file(file, text_field, sample_by)


def _files_of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """All files, or where some are named after splits, as `test.jsonl` and `data/train-00000.parquet` are, those of
    `split`: what is put aside must not be trained on."""
    named: dict[str, list[Path]] = {}
    for file in files:
        for kind in {split, *SPLITS}:
            if _names_split(file.relative_to(folder), kind):
                named.setdefault(kind, []).append(file)
    if split in named and (len(named) > 1 or split != "train"):
        return named[split]
    if split != "train" or "train" in named and len(named) > 1:
        raise DataError(f"{folder} has no split {split!r}, but {', '.join(sorted(named)) or 'none at all'}")
    return files


def _names_split(path: Path, split: str) -> bool:
    words = "|".join(map(re.escape, SPLITS.get(split, (split,))))
    if any(re.fullmatch(words, part, re.IGNORECASE) for part in path.parts[:-1]):
        return True
    prose = path.suffix in (".md", ".rst")  # may speak of training and tests
    pattern = rf"({words})" if prose else rf"({words})([^a-z].*)?|.*[^a-z]({words})"
    return re.fullmatch(pattern, path.name.split(".")[0], re.IGNORECASE) is not None


def _need_datasets(name: str | Path) -> None:
    if importlib.util.find_spec("datasets") is None:
        raise ImportError(f"{name} is read by datasets: pip install 'hf-moe[train]'")


def _decode(data: bytes, path: Path, line: int) -> str:
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += data[: error.start].count(b"\n")
        raise DataError(f"{path}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x})") from error


@contextmanager
def _open(path: Path):
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the gzip file is damaged: {error}") from error


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, row) of a file with a JSON object a line, or of one JSON list."""
    with _open(path) as file:
        start = file.read(256).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        yield from _read_json_list(path)
        return
    with _open(path) as file:
        for number, data in enumerate(file, start=1):
            text = _decode(data, path, number).strip()
            if text:
                try:
                    row = json.loads(text)
                except json.JSONDecodeError as error:
                    message = f"{path}, line {number}: no JSON: {error.msg} at column {error.colno}"
                    raise DataError(message) from error
                _check_characters(row, text, f"{path}, line {number}")
                yield number, row


def _read_json_list(path: Path) -> Iterator[tuple[int, Any]]:
    with _open(path) as file:
        text = _decode(file.read(), path, 1)
    decoder, at, line = json.JSONDecoder(), text.index("[") + 1, 1
    gap = re.compile(r"[\s,]*")
    seen = 0
    while True:
        at = gap.match(text, at).end()
        if text[at : at + 1] == "]":
            if text[at + 1 :].strip():
                line += text.count("\n", seen, at + 1 + len(text[at + 1 :]) - len(text[at + 1 :].lstrip()))
                raise DataError(f"{path}, line {line}: more stands behind the end of the list")
            return
        line, seen = line + text.count("\n", seen, at), at
        try:
            row, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}: no JSON: {error.msg} at column {error.colno}") from error
        _check_characters(row, text[at:end], f"{path}, line {line}")
        at = end
        yield line, row


def _check_characters(row: Any, text: str, where: str) -> None:
    """Raises `DataError` for half a surrogate pair, which JSON can write and no tokenizer can read."""
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            half = ord(error.object[error.start])
            raise DataError(f"{where}: \\u{half:04x} is half of a surrogate pair, and no character") from error


def _read_text(path: Path, sample_by: str) -> Iterator[Sample]:
    with _open(path) as file:
        text = _decode(file.read(), path, 1).replace("\r\n", "\n")
    if sample_by == "document":
        pieces = [(1, text)] if text.strip() else []
    elif sample_by == "line":
        pieces = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    else:
        pieces = [
            (text.count("\n", 0, match.start()) + 1, match.group())
            for match in re.finditer(r"[^\S\n]*\S[\s\S]*?(?=\n[^\S\n]*\n|\s*\Z)", text)
        ]
    for line, piece in pieces:
        yield Sample(TEXT, {"text": piece}, f"{path}, line {line}", running_text=True)


def _read_table(path: Path, text_field: str) -> Iterator[Sample]:
    _need_datasets(path)
    import pyarrow
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    reader = {".parquet": Dataset.from_parquet, ".csv": Dataset.from_csv, ".arrow": Dataset.from_file}[path.suffix]
    if not path.stat().st_size:
        raise DataError(f"{path} is empty: there is no sample in it")
    try:
        data = reader(str(path))
    except (DatasetGenerationError, pyarrow.ArrowException, ValueError) as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        raise DataError(f"{path} cannot be read as {path.suffix[1:]}: {cause}") from error
    yield from _check_rows(data, str(path), text_field)


def _read_hub(name: str, config: str | None, split: str, text_field: str) -> Iterator[Sample]:
    _need_datasets(name)
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        data = load_dataset(name, config, split=split)
    except DatasetNotFoundError as error:
        raise DataError(f"--dataset_name {name}: neither a file or folder here nor a dataset on the Hub") from error
    except (DatasetGenerationError, HfHubHTTPError, HFValidationError, ConnectionError, ValueError) as error:
        raise DataError(f"--dataset_name {name}: {str(error.__cause__ or error).splitlines()[0]}") from error
    yield from _check_rows(data, f"{name} ({split})", text_field)


def _check_rows(data, origin: str, text_field: str) -> Iterator[Sample]:
    for number, row in enumerate(data, start=1):
        yield check_row(row, f"{origin}, row {number}", text_field)


def check_row(row: Any, where: str, text_field: str = "text") -> Sample:
    """The sample that `row` is.

    Raises:
        DataError: naming `where`, if it is none.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with keys, got {type(row).__name__}")
    # Columns of a table that a row does not have come as None, and so they are written as JSON.
    names, row = list(row), {key: value for key, value in row.items() if value is not None}
    if "messages" in row or "conversations" in row:
        key = "messages" if "messages" in row else "conversations"
        messages = _check_messages(row[key], key, where)
        if not any(message["role"] == "assistant" for message in messages):
            raise DataError(f"{where}: no assistant turn in {key!r}, so there is nothing to learn")
        return Sample(CHAT, {"messages": messages, **_template_values(row, where)}, where)
    if "prompt" in row and "completion" in row:
        kinds = {type(row["prompt"]), type(row["completion"])}
        if kinds == {list}:
            messages = {key: _check_messages(row[key], key, where) for key in ("prompt", "completion")}
            if not any(message["role"] == "assistant" for message in messages["completion"]):
                raise DataError(f"{where}: no assistant turn in 'completion', so there is nothing to learn")
            return Sample(CHAT, {**messages, **_template_values(row, where)}, where)
        if kinds != {str}:
            raise DataError(f"{where}: 'prompt' and 'completion' must both be text, or both lists of messages")
        if not row["completion"]:
            raise DataError(f"{where}: 'completion' is empty")
        return Sample(COMPLETION, {"prompt": row["prompt"], "completion": row["completion"]}, where)
    if text_field in row:
        text = row[text_field]
        if not isinstance(text, str):
            raise DataError(f"{where}: {text_field!r} must be text, got {text!r:.60}")
        return Sample(TEXT, {"text": text}, where)
    keys = ", ".join(sorted(str(key) if key in row else f"{key} (null)" for key in names)) or "no keys"
    raise DataError(
        f"{where}: found {keys}; expected {text_field!r} (see --dataset_text_field), 'prompt' and 'completion', "
        "or 'messages'"
    )


def _template_values(row: dict[str, Any], where: str) -> dict[str, Any]:
    """What else the template gets: both may be text that holds JSON, as tables have it."""
    values = {}
    for key, kind in (("tools", list), ("chat_template_kwargs", dict)):
        value = row.get(key)
        if isinstance(value, str) and value:
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: {key!r} is no JSON: {error}") from error
        if value:
            if not isinstance(value, kind):
                raise DataError(
                    f"{where}: {key!r} must be {'a list' if kind is list else 'an object'}, got {value!r:.60}"
                )
            values[key] = value
    return values


def _check_messages(messages: Any, key: str, where: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: {key!r} must be a list of messages with 'role' and 'content'")
    checked = []
    for number, message in enumerate(messages, start=1):
        if isinstance(message, dict) and {"from", "value"} <= set(message):
            role = message["from"]
            message = {"role": ROLES.get(role, role) if isinstance(role, str) else role, "content": message["value"]}
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: message {number} of {key!r} has no 'role'")
        content = message.get("content")
        if not isinstance(content, (str, list)) and not message.get("tool_calls"):
            raise DataError(f"{where}: message {number} of {key!r} has no 'content'")
        checked.append({name: value for name, value in message.items() if value is not None or name == "content"})
    return checked
