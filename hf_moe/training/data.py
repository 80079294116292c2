"""Samples to rows of tokens with labels; rows to batches; the order of rows.

Labels are -100 where nothing is learnt. A sample's first token never is a target, packed or not. Packed rows hold whole
samples with positions that start again at each; our models then keep attention and the targets of all MTP depths
within a sample.
"""

import importlib.util
import itertools
import os
import re
import shutil
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from .arguments import FinetuneArguments
from .chat import encode_chat
from .sources import CHAT, COMPLETION, TEXT, DataError, Sample, read_samples
from .token_rows import IGNORE_INDEX, TokenRows, pack, write_samples

__all__ = ["IGNORE_INDEX", "Collator", "Encoder", "RowOrder", "TokenRows", "load_rows", "pack"]

# Folders of tokens that a run which was killed left behind are deleted after so many days.
_KEPT_DAYS = 30
# Characters that a tokenizer gets at once, where a text can be cut: its records take some 150 bytes for each. Tokens of
# so many characters on both sides show whether it can, at so many places.
_PIECE, _CONTEXT, _TRIALS = 1 << 20, 256, 100
_GAP = re.compile(r"(?<=\n)(?=\S)|(?<=\S)(?= \S)")


@dataclass
class Collator:
    """Rows to a batch: `input_ids`, `labels`, and `attention_mask`, or `position_ids` where samples are packed.

    `flatten` puts all rows into one, (1, tokens): flash attention reads packed positions of a single row alone. Batches
    are at least `shortest` tokens long: an MTP layer that is left out on one process would be waited for by the others.
    """

    pad_id: int
    packed: bool = False
    flatten: bool = False
    shortest: int = 1

    def __call__(self, rows: list[list[tuple[torch.Tensor, torch.Tensor]]]) -> dict[str, torch.Tensor]:
        if self.flatten:
            rows = [[sample for row in rows for sample in row]]
        longest = max(self.shortest, *(sum(len(ids) for ids, _ in row) for row in rows))
        shape = (len(rows), longest)
        input_ids, labels = torch.full(shape, self.pad_id), torch.full(shape, IGNORE_INDEX)
        positions, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        for index, row in enumerate(rows):
            at = 0
            for ids, targets in row:
                end = at + len(ids)
                input_ids[index, at:end], labels[index, at:end] = ids, targets
                labels[index, at] = IGNORE_INDEX
                positions[index, at:end] = torch.arange(len(ids))
                at = end
            mask[index, :at] = 1
            positions[index, at:] = torch.arange(longest - at)  # padding is a sequence of its own
        batch = {"input_ids": input_ids, "labels": labels}
        return {**batch, "position_ids": positions} if self.packed else {**batch, "attention_mask": mask}


@dataclass(frozen=True)
class RowOrder:
    """An endless order of rows: a new permutation for every epoch, one after the other."""

    num_rows: int
    seed: int

    def permutation(self, epoch: int) -> np.ndarray:
        """(rows,) int64."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.num_rows, generator=generator).numpy()

    def micro_batches(
        self, first_step: int, last_step: int, accumulation: int, batch_size: int, world: int = 1, rank: int = 0
    ) -> Iterator[list[int]]:
        """Rows of each micro-batch of process `rank`, from step `first_step` on.

        The rows of a step do not depend on how they are divided among micro-batches and processes.
        """
        size = accumulation * batch_size * world
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(first_step, last_step):
            for turn in range(accumulation):
                first = step * size + (turn * world + rank) * batch_size
                rows = []
                for position in range(first, first + batch_size):
                    if position // self.num_rows != epoch:
                        epoch = position // self.num_rows
                        order = self.permutation(epoch)
                    rows.append(int(order[position % self.num_rows]))
                yield rows


# --- samples to tokens ------------------------------------------------------------------------------------------------


class Encoder:
    """Samples to `(ids, labels)`, as the options say; `dropped` counts what was left out or cut."""

    def __init__(self, tokenizer, args: FinetuneArguments):
        self.tokenizer, self.args = tokenizer, args
        self.dropped: Counter = Counter()
        if args.add_eos_token and tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no EOS token: pass --no_add_eos_token")
        if args.add_bos_token and tokenizer.bos_token_id is None:
            raise DataError("the tokenizer has no BOS token, but --add_bos_token asks for it")

    def __call__(self, samples: Iterable[Sample]) -> Iterator[tuple[list[int], list[int]]]:
        encode = {TEXT: self._text, COMPLETION: self._completion, CHAT: self._chat}
        for sample in samples:
            if sample.kind == TEXT and not sample.values["text"].strip():  # corpora cut into lines have many
                self.dropped["left out as blank"] += 1
                continue
            ids, learn = encode[sample.kind](sample)
            for part_ids, part_learn in self._fit(ids, learn, sample):
                labels = [token if flag else IGNORE_INDEX for token, flag in zip(part_ids, part_learn)]
                labels[:1] = [IGNORE_INDEX] * len(labels[:1])
                if any(label != IGNORE_INDEX for label in labels):
                    yield part_ids, labels
                elif len(ids) > self.args.max_length:
                    self.dropped["left without anything to learn"] += 1
                else:
                    raise DataError(f"{sample.where}: nothing to learn in {len(ids)} tokens")

    def _encode(self, text: str, special: bool = True) -> list[int]:
        first, *others = self._pieces(text)
        ids = self._ids(first, special)
        bos, eos, wanted = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.args.add_bos_token
        if special and ids and ids[-1] == eos and eos != bos:
            ids.pop()  # put back at the very end
        if special and wanted is not None:
            if wanted and ids[:1] != [bos]:
                ids.insert(0, bos)
            elif not wanted and bos is not None and ids[:1] == [bos]:
                ids.pop(0)
        for piece in others:
            ids += self._ids(piece)
        return ids

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _pieces(self, text: str) -> list[str]:
        """A text in pieces that have the same tokens; whole, where it is short or has no such places."""
        pieces, start = [], 0
        while len(text) - start > _PIECE:
            end = self._find_cut(text, start + _PIECE // 2)
            pieces.append(text[start:end])
            start = end
        return [*pieces, text[start:]]

    def _find_cut(self, text: str, start: int) -> int:
        """The first place from `start` on where a cut changes no token, or the end."""
        for match in itertools.islice(_GAP.finditer(text, start), _TRIALS):
            at = match.start()
            before, behind = text[at - _CONTEXT : at], text[at : at + _CONTEXT]
            if self._ids(before + behind) == self._ids(before) + self._ids(behind):
                return at
        return len(text)

    def _end(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return [*ids, eos] if self.args.add_eos_token and ids[-1:] != [eos] else ids

    def _text(self, sample: Sample) -> tuple[list[int], list[bool]]:
        ids = self._end(self._encode(sample.values["text"]))
        return ids, [True] * len(ids)

    def _completion(self, sample: Sample) -> tuple[list[int], list[bool]]:
        prompt = self._encode(sample.values["prompt"])
        # Tokenised apart, as they are when a prompt is completed.
        completion = self._end(self._encode(sample.values["completion"], special=False))
        learn_prompt = not self.args.completion_only_loss
        return prompt + completion, [learn_prompt] * len(prompt) + [True] * len(completion)

    def _chat(self, sample: Sample) -> tuple[list[int], list[bool]]:
        values = sample.values
        messages = values.get("messages") or [*values["prompt"], *values["completion"]]
        template = dict(values.get("chat_template_kwargs") or {})
        if values.get("tools"):
            template["tools"] = values["tools"]
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{sample.where}: a chat, but the tokenizer has no chat template; give one by --chat_template_path"
            )
        first = 0 if "messages" in values or not self.args.completion_only_loss else len(values["prompt"])
        ids, learn = encode_chat(self.tokenizer, messages, sample.where, first, **template)
        if not self.args.assistant_only_loss and not first:
            learn = [True] * len(ids)
        if not any(learn):
            raise DataError(f"{sample.where}: the chat template shows no token of an assistant's turn")
        return ids, learn

    def _fit(self, ids: list[int], learn: list[bool], sample: Sample) -> Iterator[tuple[list[int], list[bool]]]:
        limit = self.args.max_length
        policy = self.args.too_long or ("split" if sample.running_text else "error")
        if len(ids) <= limit:
            yield ids, learn
        elif policy == "error":
            raise DataError(
                f"{sample.where}: {len(ids)} tokens, more than --max_length {limit}; raise it, or choose what happens "
                "with --too_long truncate, drop or split"
            )
        elif policy == "truncate":
            self.dropped["truncated"] += 1
            yield ids[:limit], learn[:limit]
        elif policy == "drop":
            self.dropped["dropped"] += 1
        else:
            # One token of overlap: the first token of a part was the last target of the part before.
            for start in range(0, len(ids) - 1, limit - 1):
                yield ids[start : start + limit], learn[start : start + limit]


def load_rows(
    tokenizer, args: FinetuneArguments, accelerator: Accelerator | None = None
) -> tuple[TokenRows, TokenRows | None]:
    """Rows to train on and, if the options name any, rows to evaluate on.

    One process of each machine tokenises, into files in the cache of `datasets`, and all read those. The files go with
    the rows, or when the process ends. With an `accelerator` every process calls it.

    Raises:
        DataError: naming file and line, for data that cannot be trained on; on every process.
    """
    if importlib.util.find_spec("datasets") is None:
        raise ImportError("the tokens of training data are kept on the disk by datasets: pip install 'hf-moe[train]'")
    from datasets import Dataset as Samples

    writes = accelerator is None or accelerator.is_local_main_process
    # Each machine has its own folder, also where they share the file system that it lies on.
    first = 0 if accelerator is None else accelerator.process_index - accelerator.local_process_index
    folder = Path(_from_all(_make_folder() if writes else "", accelerator)[first])
    dropped, error = Counter(), None
    if writes:
        keeper = _Folder(folder)
        try:
            dropped = _write_all(tokenizer, args, folder)
        except DataError as found:
            error = found
    outcomes = _from_all((str(error or ""), dict(dropped)), accelerator)
    if error is not None:
        raise error
    for message, _ in outcomes:
        if message:
            raise DataError(message)
    files = {name: Samples.from_file(str(folder / name)) for name in ("train", "held_out") if (folder / name).exists()}
    train, held_out = files["train"], files.get("held_out")
    train_part, held_out_part = _validation_split(args, len(train))
    if held_out_part is not None:
        held_out = train
    rows = TokenRows.from_dataset(train, args.max_length, args.packing, train_part)
    rows.dropped = Counter(outcomes[first][1])
    others = None
    if held_out is not None:
        others = TokenRows.from_dataset(held_out, args.max_length, args.packing, held_out_part)
    if writes:
        rows.keeper = keeper
        if others is not None:
            others.keeper = keeper
    return rows, others


class _Folder:
    """A folder that is deleted when nobody holds this any more; copies of it in other processes delete nothing."""

    def __init__(self, path: Path):
        weakref.finalize(self, _delete_own, path, os.getpid())


def _delete_own(folder: Path, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def _make_folder() -> str:
    from datasets import config

    parent = Path(config.HF_DATASETS_CACHE) / "hf_moe"
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob("tokens-*"):  # by a run that was killed
        if time.time() - left.stat().st_mtime > _KEPT_DAYS * 24 * 3600:
            shutil.rmtree(left, ignore_errors=True)
    return tempfile.mkdtemp(prefix="tokens-", dir=parent)


def _from_all(value: Any, accelerator: Accelerator | None) -> list[Any]:
    """What every process has, in the order of their ranks; they wait for each other."""
    return [value] if accelerator is None or accelerator.num_processes == 1 else gather_object([value])


def _write_all(tokenizer, args: FinetuneArguments, folder: Path) -> Counter:
    """Writes the files `train` and, where there is data of its own for it, `held_out`; what was left out or cut."""
    dropped = _write(tokenizer, args, folder / "train", args.dataset_name, args.dataset_split, args.max_train_samples)
    name, split = args.eval_dataset_name, args.dataset_test_split
    if name or split:
        if not split:  # that of the training data may be one of the Hub's
            split = "train" if name and Path(name).exists() else args.dataset_split
        _write(tokenizer, args, folder / "held_out", name or args.dataset_name, split, args.max_eval_samples)
    return dropped


def _write(tokenizer, args: FinetuneArguments, path: Path, name: str, split: str, limit: int | None) -> Counter:
    samples = read_samples(name, args.dataset_config, split, args.dataset_text_field, args.sample_by, limit)
    encoder = Encoder(tokenizer, args)
    shown = tqdm(encoder(samples), desc=f"reading {name}", unit=" samples", disable=args.disable_tqdm)
    if not write_samples(path, shown):
        left_out = ", ".join(f"{count} {what}" for what, count in encoder.dropped.items())
        raise DataError(f"{name}: no sample is left to learn from ({left_out})")
    return encoder.dropped


def _validation_split(args: FinetuneArguments, count: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Indices of the samples to train on and to evaluate on; `None` for all, and for none."""
    share = args.validation_split
    if not share or args.eval_dataset_name or args.dataset_test_split:
        return None, None
    put_aside = round(share * count) if share < 1 else int(share)
    if not 0 < put_aside < count:
        raise DataError(f"--validation_split {share:g} of {count} samples leaves one side empty")
    order = RowOrder(count, args.seed if args.data_seed is None else args.data_seed).permutation(-1)
    return np.sort(order[put_aside:]), np.sort(order[:put_aside])[: args.max_eval_samples]
