"""What speculative decoding has generated, row by row: where rows end, and what `generate` returns.

Shapes: B rows that have not ended, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    GenerationConfig,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from .generation_rows import TokenRows
from .generation_schedule import SpeculationReport


@dataclass
class MTPGenerateOutput(GenerateDecoderOnlyOutput):
    """Transformers' output with `speculation`, a `SpeculationReport`."""

    speculation: SpeculationReport | None = None


class GeneratedRows:
    """Generated tokens of every row of the original batch, and where each ended.

    Args:
        rows: the tokens of rows that have not ended; their lengths grow as tokens are booked.
        config: says what is to be returned, and the token that fills ended rows.
        streamer: gets every position that all rows have reached.
    """

    def __init__(
        self, rows: TokenRows, stopping_criteria: StoppingCriteriaList, config: GenerationConfig, streamer: Any
    ):
        self.rows, self.config, self.streamer = rows, config, streamer
        self.criteria = [c for c in stopping_criteria if not isinstance(c, (MaxLengthCriteria, EosTokenCriteria))]
        ends = [c.eos_token_id.tolist() for c in stopping_criteria if isinstance(c, EosTokenCriteria)]
        self.eos = {token for tokens in ends for token in tokens}
        batch, returns = len(rows), config.return_dict_in_generate
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.ended: list[int | None] = [None] * batch
        self.scores = [[] for _ in range(batch)] if returns and config.output_scores else None
        self.logits = [[] for _ in range(batch)] if returns and config.output_logits else None
        self.emitted = 0

    def book(self, news: list[list[int]], scores: torch.Tensor, logits: torch.Tensor) -> list[int]:
        """Appends each row's new tokens up to where it stops; returns how many."""
        stops = self._stops_by_criteria(news, scores) if self.criteria else {}
        kept = []
        for index, (row, tokens) in enumerate(zip(self.rows.originals, news)):
            generated, count = self.tokens[row], 0
            for token in tokens:
                if self.rows.is_full(self.rows.lengths[index] + count):
                    break
                generated.append(token)
                count += 1
                full = self.rows.is_full(self.rows.lengths[index] + count)
                if self.ended[row] is None and (full or token in self.eos or stops.get(index) == count):
                    self.ended[row] = len(generated)
                    if self.eos or full:
                        break
            for position in range(count):
                if self.scores is not None:
                    self.scores[row].append(scores[index, position].clone())
                if self.logits is not None:
                    self.logits[row].append(logits[index, position].clone())
            kept.append(count)
            self.rows.lengths[index] += count
        return kept

    def _stops_by_criteria(self, news: list[list[int]], scores: torch.Tensor) -> dict[int, int]:
        """After how many of its new tokens a row is stopped by a criterion other than length and EOS.

        Criteria see rows of the same length together, each up to the token in question.
        """
        by_length: dict[int, list[tuple[int, int]]] = {}
        for index, tokens in enumerate(news):
            for count in range(1, len(tokens) + 1):
                by_length.setdefault(self.rows.lengths[index] + count, []).append((index, count))
        stops: dict[int, int] = {}
        for length, pairs in sorted(by_length.items()):
            pairs = [pair for pair in pairs if pair[0] not in stops]
            if not pairs:
                continue
            rows = torch.tensor([index for index, _ in pairs], device=self.rows.tokens.device)
            input_ids = self.rows.tokens[rows, self.rows.prompt.first : length]
            history = None if self.scores is None else self._score_history(pairs, scores)
            done = torch.zeros(len(pairs), dtype=torch.bool, device=self.rows.tokens.device)
            for criterion in self.criteria:
                done = done | criterion(input_ids, history)
            stops |= {index: count for (index, count), stop in zip(pairs, done.tolist()) if stop}
        return stops

    def _score_history(self, pairs: list[tuple[int, int]], scores: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Scores of all tokens so far, (rows, V) each, as plain generation passes them."""
        histories = [[*self.scores[self.rows.originals[index]], *scores[index, :count]] for index, count in pairs]
        return tuple(torch.stack(step) for step in zip(*histories))

    def active(self) -> list[int]:
        """The rows that go on, as indices into the present ones."""
        if self.eos:
            return [index for index, row in enumerate(self.rows.originals) if self.ended[row] is None]
        # As in plain generation: without an EOS there is no padding, and rows go on until the last one stops.
        goal = max(self.ended) if all(end is not None for end in self.ended) else None
        return [
            index
            for index, row in enumerate(self.rows.originals)
            if (goal is None or len(self.tokens[row]) < goal) and not self.rows.is_full(self.rows.lengths[index])
        ]

    def length(self) -> int:
        return max(end if end is not None else len(tokens) for end, tokens in zip(self.ended, self.tokens))

    def emit(self) -> None:
        """Streams every position that all rows have reached."""
        if self.streamer is None:
            return
        reached = min(
            1 << 62 if self.eos and end is not None else len(tokens) for end, tokens in zip(self.ended, self.tokens)
        )
        pad = self._pad_token()
        for position in range(self.emitted, min(reached, self.length())):
            column = [tokens[position] if position < len(tokens) else pad for tokens in self.tokens]
            self.streamer.put(torch.tensor(column))
            self.emitted = position + 1

    def _pad_token(self) -> int:
        pad = getattr(self.config, "_pad_token_tensor", None)
        return 0 if pad is None else int(pad.flatten()[0])

    def finish(self, report: SpeculationReport) -> tuple[torch.LongTensor, dict[str, tuple[torch.Tensor, ...] | None]]:
        """Ends the stream, counts tokens in the report, and returns prompts with what follows them, and what else was
        asked for."""
        length, pad, prompt = self.length(), self._pad_token(), self.rows.prompt.input_ids
        rows = [tokens[:length] + [pad] * (length - len(tokens)) for tokens in self.tokens]
        report.tokens = sum(min(len(tokens), length) - 1 for tokens in self.tokens)
        if self.streamer is not None:
            self.streamer.end()
        sequences = torch.cat((prompt, torch.tensor(rows, dtype=prompt.dtype, device=prompt.device)), dim=1)
        return sequences, {"scores": _columns(self.scores, length), "logits": _columns(self.logits, length)}


def _columns(rows: list[list[torch.Tensor]] | None, length: int) -> tuple[torch.Tensor, ...] | None:
    """Per generated token (B, V); zeros where a row had ended."""
    if rows is None:
        return None
    empty = torch.zeros_like(rows[0][0])
    return tuple(torch.stack([row[i] if i < len(row) else empty for row in rows]) for i in range(length))
