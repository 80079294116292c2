"""Samples to rows of tokens with labels; rows to batches; the order of rows.

Labels are -100 where nothing is learnt. A sample's first token never is a target, packed or not. Packed rows hold whole
samples with positions that start again at each; our models then keep attention and the targets of all MTP depths
within a sample.
"""

import bisect
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .arguments import FinetuneArguments
from .chat import encode_chat
from .sources import CHAT, COMPLETION, TEXT, DataError, Sample, read_samples

IGNORE_INDEX = -100


@dataclass
class TokenRows(Dataset):
    """Rows of samples: `rows[i]` lists samples, sample s has `ids[starts[s]:starts[s + 1]]` and its labels."""

    ids: np.ndarray  # (tokens,) int32
    labels: np.ndarray  # (tokens,) int32
    starts: np.ndarray  # (samples + 1,) int64
    rows: list[list[int]]
    packed: bool = False
    dropped: Counter = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(ids, labels) of every sample of a row, (length,) int64 each."""
        parts = [slice(self.starts[sample], self.starts[sample + 1]) for sample in self.rows[index]]
        return [
            (torch.from_numpy(self.ids[part].astype(np.int64)), torch.from_numpy(self.labels[part].astype(np.int64)))
            for part in parts
        ]

    @property
    def num_samples(self) -> int:
        return len(self.starts) - 1

    @property
    def num_targets(self) -> int:
        return int((self.labels != IGNORE_INDEX).sum())

    def fingerprint(self) -> str:
        """A short name of the content and its order."""
        import hashlib

        digest = hashlib.sha256()
        for array in (self.ids, self.labels, self.starts, np.array([len(row) for row in self.rows])):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    @classmethod
    def from_samples(cls, samples: Iterable[tuple[list[int], list[int]]], max_length: int, packed: bool) -> "TokenRows":
        """Rows of one sample, or packed ones of at most `max_length` tokens."""
        ids, labels, lengths = [], [], []
        for sample_ids, sample_labels in samples:
            ids.append(np.asarray(sample_ids, dtype=np.int32))
            labels.append(np.asarray(sample_labels, dtype=np.int32))
            lengths.append(len(sample_ids))
        rows = pack(lengths, max_length) if packed else [[sample] for sample in range(len(lengths))]
        none = np.empty(0, dtype=np.int32)
        return cls(
            np.concatenate(ids or [none]), np.concatenate(labels or [none]), np.cumsum([0, *lengths]), rows, packed
        )


def pack(lengths: list[int], size: int) -> list[list[int]]:
    """Best fit, the longest first: rows of sample indices whose lengths add up to at most `size`."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, row), sorted
    for sample in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        at = bisect.bisect_left(free, (lengths[sample], -1))
        if at == len(free):
            room, row = size, len(rows)
            rows.append([])
        else:
            room, row = free.pop(at)
        rows[row].append(sample)
        bisect.insort(free, (room - lengths[sample], row))
    return rows


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

    def permutation(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.num_rows, generator=generator).tolist()

    def micro_batches(
        self, first_step: int, last_step: int, accumulation: int, batch_size: int, world: int = 1, rank: int = 0
    ) -> Iterator[list[int]]:
        """Rows of each micro-batch of process `rank`, from step `first_step` on.

        The rows of a step do not depend on how they are divided among micro-batches and processes.
        """
        size = accumulation * batch_size * world
        epoch, order = -1, []
        for step in range(first_step, last_step):
            for turn in range(accumulation):
                first = step * size + (turn * world + rank) * batch_size
                rows = []
                for position in range(first, first + batch_size):
                    if position // self.num_rows != epoch:
                        epoch = position // self.num_rows
                        order = self.permutation(epoch)
                    rows.append(order[position % self.num_rows])
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
        ids = list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
        bos, eos, wanted = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.args.add_bos_token
        if special and ids and ids[-1] == eos and eos != bos:
            ids.pop()  # put back at the very end
        if special and wanted is not None:
            if wanted and ids[:1] != [bos]:
                ids.insert(0, bos)
            elif not wanted and bos is not None and ids[:1] == [bos]:
                ids.pop(0)
        return ids

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


def load_rows(tokenizer, args: FinetuneArguments) -> tuple[TokenRows, TokenRows | None]:
    """Rows to train on and, if the options name any, rows to evaluate on.

    Raises:
        DataError: naming file and line, for data that cannot be trained on.
    """
    train, dropped = _encode_all(tokenizer, args, args.dataset_name, args.dataset_split, args.max_train_samples)
    held_out, name, split = None, args.eval_dataset_name, args.dataset_test_split
    if name or split:
        if not split:  # that of the training data may be one of the Hub's
            split = "train" if name and Path(name).exists() else args.dataset_split
        held_out, _ = _encode_all(tokenizer, args, name or args.dataset_name, split, args.max_eval_samples)
    elif args.validation_split:
        share = args.validation_split
        count = round(share * len(train)) if share < 1 else int(share)
        if not 0 < count < len(train):
            raise DataError(f"--validation_split {share:g} of {len(train)} samples leaves one side empty")
        order = RowOrder(len(train), args.seed if args.data_seed is None else args.data_seed).permutation(-1)
        chosen = set(order[:count])
        held_out = [sample for index, sample in enumerate(train) if index in chosen][: args.max_eval_samples]
        train = [sample for index, sample in enumerate(train) if index not in chosen]
    rows = TokenRows.from_samples(train, args.max_length, args.packing)
    rows.dropped = dropped
    if held_out is None:
        return rows, None
    return rows, TokenRows.from_samples(held_out, args.max_length, args.packing)


def _encode_all(tokenizer, args: FinetuneArguments, name: str, split: str, limit: int | None):
    samples = read_samples(name, args.dataset_config, split, args.dataset_text_field, args.sample_by, limit)
    encoder = Encoder(tokenizer, args)
    shown = tqdm(encoder(samples), desc=f"reading {name}", unit=" samples", disable=args.disable_tqdm)
    # Lists of Python's integers would take ten times the memory.
    encoded = [(np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32)) for ids, labels in shown]
    if not encoded:
        left_out = ", ".join(f"{count} {what}" for what, count in encoder.dropped.items())
        raise DataError(f"{name}: no sample is left to learn from ({left_out})")
    return encoded, encoder.dropped
