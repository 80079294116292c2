"""Speculative decoding with a model's own MTP layers, for batches whose rows advance unevenly.

A step drafts k tokens with the MTP layers, checks them in one forward pass of k + 1 tokens, and keeps what the model
agrees with, row by row. With n tokens known of a row (the newest of them not yet fed to the model) the model's cache
holds n - 1 slots; the step feeds slots n - 1 to n - 1 + k and keeps what was accepted.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, StaticLayer
from transformers.generation import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from .generation_drafts import Drafting
from .generation_output import GeneratedRows, MTPGenerateOutput
from .generation_rows import RowCache, TokenRows, check_cache, cut, take_prompt, write
from .generation_sampling import Processing, accept_greedy, accept_sampled
from .generation_schedule import DraftSchedule, SpeculationReport, draft_cost_ratio

# While drafting pauses, states wait for the MTP layers, which see them at one go when it begins again, or when there
# are so many.
_MAX_PENDING = 4096


@dataclass
class MTPSettings:
    """What `generate` was asked for, beyond what Transformers hands on."""

    num_assistant_tokens: int
    schedule: str
    confidence_threshold: float
    streamer: Any
    cache_is_given: bool


class MTPDecoding:
    """One `generate` call; see the head of this file for the terms."""

    def __init__(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        settings: MTPSettings,
        model_kwargs: dict[str, Any],
    ):
        self.model, self.settings, self.config = model, settings, generation_config
        batch, self.device = input_ids.shape[0], input_ids.device
        # Where the model takes its inputs: prompts may be on the CPU. An offloaded model moves them itself.
        entry = model.get_input_embeddings().weight.device
        self.entry = None if entry.type == "meta" else entry
        self.processing = Processing(logits_processor, batch)
        self.do_sample = bool(generation_config.do_sample)
        self.report = SpeculationReport()
        # On the CPU, what this thread worked: it has a part in every product, and other programs do not count.
        self.clock = time.thread_time if self.device.type == "cpu" else time.perf_counter

        self.cache: Cache = model_kwargs.pop("past_key_values")
        check_cache(self.cache)
        past, mask_length = int(self.cache.get_seq_length()), getattr(generation_config, "_mask_length", None)
        self.prompt = take_prompt(input_ids, past, model_kwargs, mask_length)
        for name in ("logits_to_keep", "use_cache"):
            model_kwargs.pop(name, None)
        self.extra = model_kwargs
        self.rows = TokenRows(self.prompt, stopping_criteria.max_length, settings.num_assistant_tokens)
        keep = bool(generation_config.return_dict_in_generate or settings.cache_is_given)
        self.main = RowCache(self.cache, [self.prompt.length] * batch, self.prompt.mask, keep=keep)
        threshold = settings.confidence_threshold
        self.drafting = Drafting(model, self.rows, self.processing, self.do_sample, threshold, self.entry)
        self.generated = GeneratedRows(self.rows, stopping_criteria, generation_config, settings.streamer)

    def _new_schedule(self) -> DraftSchedule:
        count, kind = self.settings.num_assistant_tokens, self.settings.schedule
        if kind != "adaptive":
            return DraftSchedule(count, kind)
        # The estimate walks over all layers.
        return DraftSchedule(count, kind, draft_cost_ratio(self.model), timed=not self.do_sample)

    def run(self) -> torch.LongTensor | MTPGenerateOutput:
        """Generates, and returns what plain generation would."""
        taught, key = {}, (len(self.rows), self.settings.num_assistant_tokens)
        if self.settings.schedule == "adaptive" and not self.do_sample:
            # What earlier calls with such a batch have taught belongs to this call until it ends: calls of other
            # threads meanwhile begin anew.
            taught = self.model.__dict__.setdefault("_draft_schedules", {})
        schedule = taught.pop(key, None) or self._new_schedule()
        try:
            return self._run(schedule)
        finally:
            taught[key] = schedule

    def _run(self, schedule: DraftSchedule) -> torch.LongTensor | MTPGenerateOutput:
        self._take(self._logits(self._prefill()), drafted=0)
        while len(self.rows):
            started = self.clock()
            self.rows.make_room()
            planned = schedule.choose(self._draft_limit())
            # What waits since a pause, or since the prompt, makes the step that sees it a long one.
            waiting = max(self.drafting.pending_lengths)
            usual = waiting <= 2 * (self.settings.num_assistant_tokens + 1) + len(self.drafting.layers)
            drafted = self.drafting.draft(planned) if planned else 0
            if not planned and waiting >= _MAX_PENDING:
                self.drafting.catch_up()
            states = self._check(drafted)
            accepted = self._take(self._logits(states), drafted, states)
            usual = usual or (not planned and waiting < _MAX_PENDING)
            seconds = self.clock() - started if usual else None
            schedule.record(planned, accepted, seconds, drafted)
            self.report.record(drafted, accepted)
        return self._finish()

    def _prefill(self) -> torch.Tensor:
        """Runs the prompt; returns the state (B, 1, hidden) of its last slot."""
        prompt = self.prompt
        chunk = self.config.prefill_chunk_size or prompt.length - prompt.past
        for start in range(prompt.past, prompt.length, chunk):
            end = min(start + chunk, prompt.length)
            if prompt.embeds is None:
                inputs = {"input_ids": self.rows.tokens[:, start:end]}
            else:
                inputs = {"inputs_embeds": prompt.embeds[:, start:end]}
            states = self._run_model(
                attention_mask=None if prompt.mask is None else prompt.mask[:, :end],
                position_ids=prompt.position_ids[:, start - prompt.past : end - prompt.past],
                **inputs,
            )
            self.drafting.add(states, [end - start] * len(self.rows))
            if end < prompt.length:
                self.drafting.catch_up()
        return states[:, -1:]

    def _run_model(self, **inputs) -> torch.Tensor:
        if self.entry is not None:
            inputs = {name: value if value is None else value.to(self.entry) for name, value in inputs.items()}
        outputs = self.model.model(past_key_values=self.cache, use_cache=True, **inputs, **self.extra)
        return outputs.last_hidden_state

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(states).to(device=self.device, dtype=torch.float32)

    def _draft_limit(self) -> int:
        """Drafts that could still be used, and that the cache has room for."""
        limit = self.rows.draft_limit()
        for layer in self.main.layers:
            if isinstance(layer, StaticLayer):
                limit = min(limit, layer.max_cache_len - self.main.length - 1)
        return limit

    def _check(self, drafted: int) -> torch.Tensor:
        """Runs the model over the newest token and the drafts of every row: states (B, drafted + 1, hidden)."""
        starts = [length - 1 for length in self.rows.lengths]
        return self._run_model(
            input_ids=cut(self.rows.tokens, starts, drafted + 1),
            attention_mask=self.main.mask(drafted + 1, self.device),
            position_ids=cut(self.rows.positions, starts, drafted + 1),
        )

    def _take(self, logits: torch.Tensor, drafted: int, states: torch.Tensor | None = None) -> list[int]:
        """Accepts drafts by the model's logits (B, drafted + 1, V), and books the new tokens of every row.

        Returns how many drafts each row accepted, before any stopping criterion.
        """
        rows = self.rows
        # Processors see the drafts as if they had been generated.
        scores = self.processing(logits, rows.tokens, rows.prompt.first, rows.lengths, rows.originals)
        drafts = cut(rows.tokens, rows.lengths, drafted)
        if self.do_sample:
            probs = torch.cat(self.drafting.probs, dim=1) if drafted else scores[:, :0]
            accepted, following = accept_sampled(scores, drafts, probs)
        else:
            accepted, following = accept_greedy(scores, drafts)
        following = following.unsqueeze(1)
        # The one place per step that waits for the device.
        booked = torch.cat((drafts, following, accepted.unsqueeze(1)), dim=1).tolist()
        counts = [row[-1] for row in booked]
        write(rows.tokens, [length + count for length, count in zip(rows.lengths, counts)], following)
        kept = self.generated.book([row[: row[-1]] + [row[-2]] for row in booked], scores, logits)
        if states is not None:
            self.main.commit(kept)
        self.generated.emit()
        self._end_rows(states, kept)
        return counts

    def _end_rows(self, states: torch.Tensor | None, kept: list[int]) -> None:
        """Drops rows that have ended, and hands the states of the others to the MTP layers."""
        active = self.generated.active()
        if states is not None and active:
            self.drafting.add(states, kept)
        if len(active) == len(self.rows):
            return
        self.rows.select(active)
        if active:
            self.main.select(active)
            self.drafting.select(active)

    def _finish(self) -> torch.LongTensor | MTPGenerateOutput:
        sequences, asked = self.generated.finish(self.report)
        if self.main.keep:
            self.main.restore(self.prompt.length + self.generated.length() - 1)
        if not self.config.return_dict_in_generate:
            return sequences
        return MTPGenerateOutput(sequences=sequences, past_key_values=self.cache, speculation=self.report, **asked)
