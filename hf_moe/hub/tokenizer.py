"""A fast tokenizer (`tokenizer.json`) out of a tiktoken vocabulary, as the Kimi-K2 releases have it.

The releases hold `tiktoken.model` (one `base64 rank` a line), a `tokenizer_config.json` that names some of the 256
special ids after the ranks, and remote code that joins the two. What is written here loads with plain `AutoTokenizer`.

**Merges.** tiktoken has no list of merges: it joins, again and again, the neighbours whose bytes together have the
lowest rank, the leftmost of several. The tokenizers library joins by a list of pairs. One pair a token is enough, and
exact: what happens between the two ends of a token, before anything is joined across them, happens in the order in
which it happens to the token's bytes alone; so the last join that makes a token is always the one found by running
tiktoken's rule on its bytes, and other splits of it never stand beside one another. A token that its own bytes do not
lead to is found only as a whole piece, by tiktoken and, with `ignore_merges`, by us.

**Pieces.** The published pattern has intersections of character classes, which the library's regular expressions have
too, and over the same Unicode tables: every code point falls into the same classes (a test compares all of them).
"""

import base64
import binascii
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from .manifest import with_manifest

VOCABULARY = "tiktoken.model"
CONFIG = "tokenizer_config.json"
FAST = "tokenizer.json"
# Ids after the ranks that are special, named or not.
RESERVED = 256
# How Kimi cuts text into pieces; no token crosses them. Han runs stand alone, and are kept out of other words.
PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


class TokenizerError(ValueError):
    """A tokenizer file that cannot be converted; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class FastTokenizer:
    """What takes the place of a tiktoken vocabulary.

    - `files`: name to bytes, to be written.
    - `replaced`: files of the release that nothing needs any more (its vocabulary and its remote code).
    """

    files: dict[str, bytes]
    replaced: tuple[str, ...]
    tokenizer: Tokenizer


def needs_fast_tokenizer(names) -> bool:
    """Whether a folder with these file names has a tiktoken vocabulary and no `tokenizer.json`."""
    return VOCABULARY in names and FAST not in names


def read_ranks(data: bytes, name: str = VOCABULARY) -> dict[bytes, int]:
    """Token bytes to rank, from the lines of a tiktoken file.

    Raises:
        TokenizerError: for a line that is not `base64 rank`, a token or rank that occurs twice, ranks with gaps, and a
            vocabulary that lacks one of the 256 bytes.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            encoded, rank_text = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(rank_text)
        except (ValueError, binascii.Error) as error:
            raise TokenizerError(f"{name}, line {number}: {line[:60]!r} is not `base64 rank` ({error}).") from error
        if not token or token in ranks:
            problem = "there twice" if token else "empty"
            raise TokenizerError(f"{name}, line {number}: the token {token!r} is {problem}.")
        ranks[token] = rank
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(f"{name}: the ranks of its {len(ranks)} tokens are not 0 to {len(ranks) - 1}, each once.")
    lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if lacking:
        first = f"the first is {lacking[0]:#04x}"
        raise TokenizerError(f"{name}: {len(lacking)} of the 256 single bytes have no rank, {first}.")
    return ranks


def last_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts that tiktoken's rule joins last on the way to `token`; `None` where it does not get there."""
    parts = [token[index : index + 1] for index in range(len(token))]
    while len(parts) > 2:
        best, place = None, -1
        for index in range(len(parts) - 1):
            rank = ranks.get(parts[index] + parts[index + 1])
            if rank is not None and (best is None or rank < best):
                best, place = rank, index
        if best is None:
            return None
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def find_merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """One pair for each token that joining can make, in the order of the tokens' ranks."""
    found = (last_merge(token, ranks) for token in sorted(ranks, key=ranks.__getitem__))
    return [pair for pair in found if pair is not None]


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary."""
    kept = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in kept else next(others)) for byte in range(256)]


def special_tokens(config: Mapping[str, Any], first: int, name: str = CONFIG) -> list[AddedToken]:
    """The `RESERVED` tokens from id `first` on: as `added_tokens_decoder` names them, else `<|reserved_token_ID|>`.

    Raises:
        TokenizerError: for ids outside of that range, and a text that two ids have.
    """
    named = config.get("added_tokens_decoder") or {}
    try:
        by_id = {int(key): dict(entry) for key, entry in named.items()}
        contents = {index: entry["content"] for index, entry in by_id.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(f"{name}: `added_tokens_decoder` is not a table of ids with their `content`.") from error
    outside = sorted(index for index in by_id if not first <= index < first + RESERVED)
    if outside:
        raise TokenizerError(
            f"{name}: the added token {contents[outside[0]]!r} has the id {outside[0]}, but the vocabulary of {first} "
            f"tokens leaves the ids {first} to {first + RESERVED - 1} for them."
        )
    tokens = []
    for index in range(first, first + RESERVED):
        entry = by_id.get(index, {})
        tokens.append(
            AddedToken(
                contents.get(index, f"<|reserved_token_{index}|>"),
                # A marker that is not special stays in the text when special tokens are skipped: tool calls do.
                special=bool(entry.get("special", True)),
                lstrip=bool(entry.get("lstrip", False)),
                rstrip=bool(entry.get("rstrip", False)),
                single_word=bool(entry.get("single_word", False)),
                normalized=False,
            )
        )
    twice = sorted({token.content for token in tokens if [other.content for other in tokens].count(token.content) > 1})
    if twice:
        raise TokenizerError(f"{name}: `added_tokens_decoder` has {twice[0]!r} at more than one id.")
    return tokens


def build_tokenizer(ranks: Mapping[bytes, int], added: list[AddedToken]) -> Tokenizer:
    """A tokenizer of the library that gives tiktoken's ids; `added` take the ids after the ranks, in their order."""
    alphabet = byte_alphabet()

    def spell(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    merges = [(spell(left), spell(right)) for left, right in find_merges(ranks)]
    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for token in added:
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    wrong = [
        token.content for index, token in enumerate(added) if tokenizer.token_to_id(token.content) != len(ranks) + index
    ]
    if wrong:
        raise TokenizerError(f"{CONFIG}: the added token {wrong[0]!r} is spelled like a token of {VOCABULARY}.")
    return tokenizer


def make_fast_tokenizer(files: Mapping[str, bytes], origin: str = "") -> FastTokenizer:
    """Builds the fast tokenizer from the files of a release: `tiktoken.model` and `tokenizer_config.json`.

    The new `tokenizer_config.json` keeps every key (chat template, special tokens, sides) but those that call for the
    remote code. `origin` stands before file names in messages.

    Raises:
        TokenizerError: for a file that is missing or wrong.
    """
    prefix = f"{origin}/" if origin else ""
    for name in (VOCABULARY, CONFIG):
        if name not in files:
            raise TokenizerError(f"{prefix}{name} is missing: a tokenizer is made from {VOCABULARY} and {CONFIG}.")
    try:
        config = json.loads(files[CONFIG].decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{prefix}{CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise TokenizerError(f"{prefix}{CONFIG} holds a {type(config).__name__}, not an object.")
    ranks = read_ranks(files[VOCABULARY], prefix + VOCABULARY)
    tokenizer = build_tokenizer(ranks, special_tokens(config, len(ranks), prefix + CONFIG))
    code = _remote_code(config)
    config = {key: value for key, value in config.items() if key not in ("auto_map", "vocab_file")}
    if not config.get("extra_special_tokens"):
        config.pop("extra_special_tokens", None)  # empty, it would hide `additional_special_tokens`
    # The name that every release of Transformers, and other engines, know.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["clean_up_tokenization_spaces"] = False  # as the remote code does, whatever the file says
    written = {
        FAST: tokenizer.to_str().encode("utf-8"),
        CONFIG: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode("utf-8"),
    }
    return FastTokenizer(written, (VOCABULARY, *(name for name in code if name in files)), tokenizer)


def _remote_code(config: Mapping[str, Any]) -> list[str]:
    """File names of the classes in `auto_map`."""
    entry = (config.get("auto_map") or {}).get("AutoTokenizer") or ()
    references = [entry] if isinstance(entry, str) else [reference for reference in entry if reference]
    return [f"{reference.rpartition('--')[2].split('.')[0]}.py" for reference in references]


def convert_tokenizer(source: Path, target: Path, overwrite: bool = False) -> list[Path]:
    """Writes the fast tokenizer of the release in `source` into `target`, which may be the same folder.

    The chat template's own file is copied along. Files get their names when they are complete.

    Raises:
        TokenizerError: for what cannot be converted, and a `tokenizer.json` in `target` without `overwrite`.
    """
    if not source.is_dir():
        raise TokenizerError(f"{source} is not a folder.")
    if not overwrite and (target / FAST).exists():
        raise TokenizerError(f"{target / FAST} exists: give --overwrite to replace it.")
    carried = ("chat_template.jinja", "special_tokens_map.json")
    names = [path.name for path in source.iterdir() if path.is_file()]
    wanted = [name for name in names if name in (VOCABULARY, CONFIG, *carried)]
    files = {name: (source / name).read_bytes() for name in wanted}
    fast = make_fast_tokenizer(files, str(source))
    written = {name: files[name] for name in carried if name in files and target.resolve() != source.resolve()}
    written |= with_manifest(target, fast.files)
    target.mkdir(parents=True, exist_ok=True)
    for name, data in written.items():
        write_whole(target / name, data)
    return [target / name for name in written]


def with_fast_tokenizer(source: Any, plan: Any) -> Any:
    """A plan of a conversion that writes the fast tokenizer too, where its source has only a tiktoken vocabulary.

    The vocabulary itself is carried like every other file. One that cannot be converted is carried as it is, with a
    note: the weights do not depend on it.

    Args:
        source: with `carried` (names) and `read_file(name)`.
        plan: a dataclass with `carried`, `files` and `notes`.
    """
    carried = source.carried if plan.carried is None else plan.carried
    if not needs_fast_tokenizer({*carried, *plan.files}) or CONFIG not in carried:
        return plan
    try:
        fast = make_fast_tokenizer({name: source.read_file(name) for name in carried if name in (VOCABULARY, CONFIG)})
    except TokenizerError as error:
        return replace(plan, notes=[*plan.notes, f"No fast tokenizer: {error}"])
    code = set(_remote_code(json.loads(source.read_file(CONFIG))))
    note = f"{FAST} is made from {VOCABULARY}: plain AutoTokenizer gives the same ids, without remote code."
    return replace(
        plan,
        files={**plan.files, **fast.files},
        carried=tuple(name for name in carried if name not in code),
        notes=[*plan.notes, note],
    )


def write_whole(path: Path, data: bytes) -> None:
    """Writes through a temporary name, so that no half file is left under `path`."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
