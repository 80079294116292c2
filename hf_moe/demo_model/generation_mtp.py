"""Speculative decoding with a model's own MTP layers, inside `generate`, for batches whose rows advance unevenly.

A step drafts k tokens with the MTP layers, checks them in one forward pass of k + 1 tokens, and keeps what the model
agrees with, row by row. Terms, with n tokens known of a row (the newest of them not yet fed to the model):

- the model's cache holds n - 1 slots. The step feeds slots n - 1 to n - 1 + k and keeps what was accepted.
- MTP depth d (from 1) at slot i takes the state of depth d - 1 at slot i and the token at slot i + d. With D depths,
  slots below n - D rest on known tokens at every depth and stay in the MTP caches; the D - 1 behind them use drafts,
  and are computed again in the next step from the states that `pending` holds.
- drafts beyond D come from the last depth, applied to its own output one slot further on.
"""

import copy
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, StaticLayer
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from .generation_rows import RowCache, SingleLayerCache, check_cache, columns_from, cut, pick, write
from .generation_sampling import AllowedTokens, Processing, accept_greedy, accept_sampled
from .generation_schedule import (
    DEFAULT_CONFIDENCE,
    DEFAULT_DRAFT_TOKENS,
    SCHEDULES,
    DraftSchedule,
    SpeculationReport,
    draft_cost_ratio,
)

# While drafting pauses, states wait for the MTP layers, which see them at one go when it begins again, or when there
# are so many.
_MAX_PENDING = 4096


@dataclass
class MTPGenerateOutput(GenerateDecoderOnlyOutput):
    """Transformers' output with `speculation`, a `SpeculationReport`."""

    speculation: SpeculationReport | None = None


@dataclass
class _Settings:
    """What `generate` was asked for, beyond what Transformers hands on."""

    num_assistant_tokens: int
    schedule: str
    confidence_threshold: float
    streamer: Any
    cache_is_given: bool


class MTPGenerationMixin(GenerationMixin):
    """`generate(use_mtp=True)` for a model of `modeling_causal_lm.MTPCausalLMMixin`."""

    def generate(self, *args, **kwargs):
        """Generates text; arguments are those of Transformers, and with `use_mtp=True` these mean:

        Args:
            use_mtp: draft with the model's own MTP layers. The text is that of plain greedy search, or a sample of the
                same distribution, for any batch size.
            num_assistant_tokens: most drafts per step (default 4); may exceed the number of MTP layers.
            num_assistant_tokens_schedule: `"adaptive"` (default: learns how many pay, down to none), `"constant"`, or
                one of Transformers' heuristic ones. What greedy search learns is kept for later calls; sampling
                learns acceptance alone and begins anew, so that a seed gives the same text again.
            assistant_confidence_threshold: no further draft where those of the step so far are less likely than this
                to be right together, by the MTP layers' own probabilities and on average over the rows (default 0.15
                with the adaptive schedule; 0, which is never, with the others).
            return_dict_in_generate: the output then has `speculation`, a `SpeculationReport`.

        Raises:
            ValueError: with `use_mtp` for a model without MTP layers, beam search, an assistant model or other
                speculation beside it, stateful logits processors, offloaded or quantised caches, attentions or hidden
                states as outputs, and generation that is synchronised between processes.
        """
        arguments = inspect.signature(GenerationMixin.generate).bind(self, *args, **kwargs).arguments
        arguments.pop("self")
        arguments |= arguments.pop("kwargs", {})
        given = arguments.get("generation_config")

        def option(name: str) -> Any:
            if arguments.get(name) is not None:
                return arguments[name]
            value = getattr(given, name, None)
            return getattr(self.generation_config, name, None) if value is None else value

        if not option("use_mtp") or arguments.get("use_mtp") is False:
            return super().generate(**arguments)
        self._check_mtp_options(arguments, option)
        cache = arguments.get("past_key_values")
        schedule = option("num_assistant_tokens_schedule") or "adaptive"
        threshold = option("assistant_confidence_threshold")
        if threshold is None:
            threshold = DEFAULT_CONFIDENCE if schedule == "adaptive" else 0.0
        settings = _Settings(
            num_assistant_tokens=option("num_assistant_tokens") or DEFAULT_DRAFT_TOKENS,
            schedule=schedule,
            confidence_threshold=threshold,
            streamer=arguments.get("streamer"),
            cache_is_given=cache is not None,
        )
        # Transformers does not hand these on to a decoding method that is given to it.
        if (function := arguments.pop("prefix_allowed_tokens_fn", None)) is not None:
            processors = arguments.get("logits_processor") or ()
            arguments["logits_processor"] = LogitsProcessorList([*processors, AllowedTokens(function)])
        tokenizer = arguments.pop("tokenizer", None)
        if (strings := option("stop_strings")) is not None:
            if tokenizer is None:
                raise ValueError("`stop_strings` needs the tokenizer: pass `tokenizer=` to `generate`.")
            criteria = arguments.get("stopping_criteria") or ()
            stop = StopStringCriteria(stop_strings=strings, tokenizer=tokenizer)
            arguments["stopping_criteria"] = StoppingCriteriaList([*criteria, stop])
        # `use_mtp` is Transformers' own speculation, which reads MTP weights from a checkpoint.
        handled = {"use_mtp": False, "stop_strings": None}
        if given is not None:
            arguments["generation_config"] = _changed(given, handled)
        elif self.generation_config.stop_strings is not None:
            arguments["generation_config"] = _changed(self.generation_config, handled)
        arguments = {name: value for name, value in arguments.items() if name not in handled}
        if "generation_config" not in arguments:
            arguments["use_mtp"] = False

        def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
            decoding = MTPDecoding(
                model, input_ids, logits_processor, stopping_criteria, generation_config, settings, model_kwargs
            )
            return decoding.run()

        return super().generate(**arguments, custom_generate=decode)

    def _check_mtp_options(self, arguments: dict[str, Any], option: Callable[[str], Any]) -> None:
        if not self.model.mtp_layers():
            raise ValueError(
                "`use_mtp=True` needs MTP layers, and this model has none: its checkpoint came without their weights "
                "(`num_nextn_predict_layers` is 0). Generate without `use_mtp`."
            )
        if (option("num_beams") or 1) > 1:
            raise ValueError("`use_mtp=True` does not go together with beam search: leave out one of the two.")
        rivals = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "custom_generate")
        for name in rivals:
            if option(name) is not None:
                raise ValueError(f"`use_mtp=True` and `{name}` are two ways to draft tokens: choose one.")
        if option("dola_layers") is not None or option("penalty_alpha") is not None:
            raise ValueError("`use_mtp=True` works with greedy search and sampling only.")
        if option("use_cache") is False:
            raise ValueError("`use_mtp=True` needs the cache: leave out `use_cache=False`.")
        for name in ("output_attentions", "output_hidden_states"):
            if option(name) and option("return_dict_in_generate"):
                raise ValueError(f"`use_mtp=True` does not return what `{name}` asks for: leave it out.")
        count, schedule = option("num_assistant_tokens"), option("num_assistant_tokens_schedule")
        if count is not None and (not isinstance(count, int) or count < 1):
            raise ValueError(f"`num_assistant_tokens={count!r}` must be an integer of at least 1.")
        if schedule is not None and schedule not in SCHEDULES:
            raise ValueError(f"`num_assistant_tokens_schedule={schedule!r}` is unknown; use one of {SCHEDULES}.")
        if arguments.get("synced_gpus"):
            raise ValueError("`use_mtp=True` cannot keep processes in step (`synced_gpus`): generate without it.")


def _changed(config: GenerationConfig, changes: dict[str, Any]) -> GenerationConfig:
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


class MTPDecoding:
    """One `generate` call; see the head of this file for the terms."""

    def __init__(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        settings: _Settings,
        model_kwargs: dict[str, Any],
    ):
        self.model, self.settings, self.config = model, settings, generation_config
        self.device = input_ids.device
        # Where the model takes its inputs: prompts may be on the CPU. An offloaded model moves them itself.
        entry = model.get_input_embeddings().weight.device
        self.entry = None if entry.type == "meta" else entry
        self.layers = [layer for _, layer in model.model.mtp_layers()]
        self.processing = Processing(logits_processor, input_ids.shape[0])
        self.do_sample = bool(generation_config.do_sample)
        self.report = SpeculationReport()
        self.schedule = self._schedule(input_ids.shape[0])
        # On the CPU, what this thread worked: it has a part in every product, and other programs do not count.
        self.clock = time.thread_time if self.device.type == "cpu" else time.perf_counter
        self.max_length = stopping_criteria.max_length
        self.criteria = [c for c in stopping_criteria if not isinstance(c, (MaxLengthCriteria, EosTokenCriteria))]
        ends = [c.eos_token_id.tolist() for c in stopping_criteria if isinstance(c, EosTokenCriteria)]
        self.eos = {token for tokens in ends for token in tokens}
        self._set_prompt(input_ids, model_kwargs)

        # Per row of the original batch: generated tokens, where it ended, and what was asked to be returned.
        self.batch = input_ids.shape[0]
        self.generated: list[list[int]] = [[] for _ in range(self.batch)]
        self.ended: list[int | None] = [None] * self.batch
        returns = generation_config.return_dict_in_generate
        self.scores = [[] for _ in range(self.batch)] if returns and generation_config.output_scores else None
        self.logits = [[] for _ in range(self.batch)] if returns and generation_config.output_logits else None
        self.emitted = 0
        # Of the present step, one entry a draft.
        self.drafts: list[torch.Tensor] = []
        self.draft_probs: list[torch.Tensor] = []
        # (B, 1) probability that all drafts so far are right.
        self.chances: list[torch.Tensor] = []

    def _schedule(self, batch: int) -> DraftSchedule:
        """A new schedule; or, where it learns from times, the one that earlier calls with such a batch have taught."""
        count, kind = self.settings.num_assistant_tokens, self.settings.schedule
        if kind != "adaptive":
            return DraftSchedule(count, kind)
        taught = {} if self.do_sample else self.model.__dict__.setdefault("_draft_schedules", {})
        if (batch, count) not in taught:
            # The estimate walks over all layers.
            taught[batch, count] = DraftSchedule(count, kind, draft_cost_ratio(self.model), timed=not self.do_sample)
        return taught[batch, count]

    # --- the prompt -------------------------------------------------------------------------------------------------

    def _set_prompt(self, input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> None:
        """Lays out slots, and takes what the model is called with out of `model_kwargs`."""
        self.cache: Cache = model_kwargs.pop("past_key_values")
        check_cache(self.cache)
        past = int(self.cache.get_seq_length())
        mask, position_ids = model_kwargs.pop("attention_mask", None), model_kwargs.pop("position_ids", None)
        embeds = model_kwargs.pop("inputs_embeds", None)
        for name in ("logits_to_keep", "use_cache"):
            model_kwargs.pop(name, None)
        self.extra = model_kwargs
        batch, given = input_ids.shape
        if embeds is not None:
            prompt = embeds.shape[1]
        else:
            # With a past, either all tokens are given or only the new ones; the mask always covers all.
            total = mask.shape[1] if mask is not None else getattr(self.config, "_mask_length", given)
            prompt = given if total == given else past + given
        self.prompt, self.past = prompt, past
        self.first = prompt - given  # slot of the first token in `input_ids`
        self.prompt_embeds = embeds
        new = prompt - past
        if new < 1:
            raise ValueError(f"The cache holds {past} tokens and the prompt {prompt}: there is nothing new to process.")
        if position_ids is None:
            position_ids = torch.arange(past, prompt, device=self.device).unsqueeze(0)
        self.prompt_positions = position_ids[:, -new:].expand(batch, -1)
        self.mask = mask if mask is not None and mask.shape[1] == prompt and not bool(mask.all()) else None
        room = max(1, self.max_length - given) if self.max_length else 256
        self.tokens = input_ids.new_zeros((batch, prompt + room + self.settings.num_assistant_tokens + 1))
        self.tokens[:, self.first : prompt] = input_ids
        # Position of every slot, which go on from the last one of the prompt.
        shift = self.prompt_positions[:, -1:] - (prompt - 1)  # (B, 1)
        self.positions = torch.arange(self.tokens.shape[1], device=self.device).unsqueeze(0) + shift
        self.prompt_ids = input_ids
        self.lengths = [prompt] * batch  # known tokens of each row
        self.rows = list(range(batch))

    def _prefill(self) -> torch.Tensor:
        """Runs the prompt; returns the state (B, 1, hidden) of its last slot."""
        chunk = self.config.prefill_chunk_size or self.prompt - self.past
        hidden_mask = None if self.mask is None else self.mask[:, self.past :]
        # Of tokens that came in a cache there are no states: MTP layers begin behind them.
        self.mtp_offset = self.past
        self.mtp_caches = [RowCache(SingleLayerCache(), [0] * len(self.rows), hidden_mask) for _ in self.layers]
        # States (B, n, hidden) that MTP layers have yet to see, and how many of them count in each row.
        self.pending: list[tuple[torch.Tensor, list[int]]] = []
        self.pending_lengths = [0] * len(self.rows)
        for start in range(self.past, self.prompt, chunk):
            end = min(start + chunk, self.prompt)
            if self.prompt_embeds is None:
                inputs = {"input_ids": self.tokens[:, start:end]}
            else:
                inputs = {"inputs_embeds": self.prompt_embeds[:, start:end]}
            states = self._run_model(
                attention_mask=None if self.mask is None else self.mask[:, :end],
                position_ids=self.prompt_positions[:, start - self.past : end - self.past],
                **inputs,
            )
            self._add_pending(states, [end - start] * len(self.rows))
            if end < self.prompt:
                self._catch_up()
        keep = self.config.return_dict_in_generate or self.settings.cache_is_given
        self.main = RowCache(self.cache, [self.prompt] * len(self.rows), self.mask, keep=bool(keep))
        return states[:, -1:]

    def _run_model(self, **inputs) -> torch.Tensor:
        inputs = {name: self._place(value) for name, value in inputs.items()}
        outputs = self.model.model(past_key_values=self.cache, use_cache=True, **inputs, **self.extra)
        return outputs.last_hidden_state

    def _place(self, value: torch.Tensor | None) -> torch.Tensor | None:
        """Moves an input to where the model takes it."""
        return value if value is None or self.entry is None else value.to(self.entry)

    # --- drafting ---------------------------------------------------------------------------------------------------

    def _add_pending(self, states: torch.Tensor, counts: list[int]) -> None:
        """Adds the first `counts[b]` of the new states (B, n, hidden) to those that MTP layers have yet to see."""
        self.pending.append((states, counts))
        self.pending_lengths = [old + count for old, count in zip(self.pending_lengths, counts)]

    def _join_pending(self) -> torch.Tensor:
        """The pending states as one tensor (B, W, hidden), each row's from the left."""
        parts = [part for part, _ in self.pending]
        width = max(self.pending_lengths)
        if len(parts) == 1:
            return parts[0].narrow(1, 0, width)
        states = torch.cat(parts, dim=1)
        columns, start = [[] for _ in self.pending_lengths], 0
        for part, counts in self.pending:
            for row, count in zip(columns, counts):
                row.extend(range(start, start + count))
            start += part.shape[1]
        if all(row[-1:] == [len(row) - 1] for row in columns if row):  # nothing before a row's last is left out
            states = states[:, :width]
        else:
            columns = [row + [0] * (width - len(row)) for row in columns]
            states = pick(states, torch.tensor(columns, device=states.device))
        self.pending = [(states, self.pending_lengths)]
        return states

    def _window(self, heads: int) -> tuple[torch.Tensor, torch.Tensor | int]:
        """Runs all depths over the pending states, drafting with the first `heads` of them.

        Returns the last depth's state (B, 1, hidden) at the last slot, and which of the window's slots are real, as
        `RowCache.mask` takes it.
        """
        states = self._join_pending()
        width, device = states.shape[1], states.device
        starts = [length + self.mtp_offset for length in self.mtp_caches[0].lengths]
        even = all(length == width for length in self.pending_lengths)
        new: torch.Tensor | int = width
        if not even or self.mask is not None:
            new = torch.arange(width, device=device) < torch.tensor(self.pending_lengths, device=device).unsqueeze(1)
            if self.mask is not None and starts[0] < self.prompt:
                hidden = cut(self.mask[self._mask_rows()].to(device), starts, width) == 0
                new = new & ~(hidden & (columns_from(starts, width, device) < self.prompt))
        positions = cut(self.positions, starts, width).to(device)
        final = None
        for depth, (layer, cache) in enumerate(zip(self.layers, self.mtp_caches)):
            states = self.model.model.mtp_forward(
                layer,
                states,
                self._embed(layer, [start + depth + 1 for start in starts], width),
                cache.mask(new, device),
                positions,
                past_key_values=cache.cache,
            ).to(device)
            final = cut(states, [length - 1 for length in self.pending_lengths], 1)
            if depth < heads:
                self._draft_token(layer, final, depth, last=depth + 1 == heads)
        return final, new

    def _mask_rows(self) -> torch.Tensor:
        return torch.tensor(self.rows, device=self.mask.device)

    def _embed(self, layer: nn.Module, starts: list[int], count: int) -> torch.Tensor:
        """What an MTP layer takes for the tokens at `count` slots of each row, from `starts[b]` on."""
        embeds = self.model.mtp_embed(layer, self._place(cut(self.tokens, starts, count)))
        if self.prompt_embeds is not None and self.mtp_caches[0].length + self.mtp_offset < self.prompt:
            rows = torch.tensor(self.rows, device=self.prompt_embeds.device)
            prompt = cut(self.prompt_embeds[rows], starts, count).to(embeds)
            is_prompt = columns_from(starts, count, embeds.device) < self.prompt
            embeds = torch.where(is_prompt.unsqueeze(-1), prompt, embeds)
        return embeds

    def _draft_token(self, layer: nn.Module, state: torch.Tensor, index: int, last: bool) -> None:
        """Drafts token `index` of the step, possibly its last one, from a state (B, 1, hidden)."""
        logits = self.model.mtp_head(layer)(state).to(device=self.device, dtype=torch.float32)
        lengths = [length + index for length in self.lengths]
        scores = self.processing(logits, self.tokens, self.first, lengths, self.rows)
        # The chance of the last one decides nothing.
        threshold = 0.0 if last else self.settings.confidence_threshold
        if self.do_sample:
            probs = scores.softmax(-1)
            token = torch.multinomial(probs[:, 0], 1)
            self.draft_probs.append(probs)
            chance = probs.amax(-1) if threshold else None  # (B, 1)
        elif threshold:
            chance, token = scores.softmax(-1).max(-1)
        else:
            chance, token = None, scores.argmax(-1)
        if chance is not None:
            self.chances.append(chance * self.chances[-1] if self.chances else chance)
        self.drafts.append(token)
        write(self.tokens, lengths, token)

    def _draft(self, count: int) -> int:
        """Drafts up to `count` tokens for every row; returns how many."""
        depths = len(self.layers)
        state, new = self._window(heads=count)
        layer, cache = self.layers[-1], self.mtp_caches[-1]
        threshold = self.settings.confidence_threshold
        # On an accelerator reading a chance waits for the device: there it is done once per step.
        at_once = self.device.type == "cpu"
        for index in range(depths, count):
            if at_once and self.chances and float(self.chances[-1].mean()) < threshold:
                break
            # One slot behind the last state, whose token is the newest draft.
            if isinstance(new, int):
                new = new + 1
            else:
                new = torch.cat((new, new.new_ones((len(self.rows), 1))), dim=1)
            state = self.model.model.mtp_forward(
                layer,
                state,
                self.model.mtp_embed(layer, self._place(self.drafts[-1])),
                cache.mask(new, state.device),
                # The first of these drafts comes from the state at the newest token.
                cut(self.positions, [length - 1 + index - depths for length in self.lengths], 1).to(state.device),
                past_key_values=cache.cache,
            ).to(state.device)
            self._draft_token(layer, state, index, last=index + 1 == count)
        kept = len(self.drafts) if at_once and depths == 1 else self._worth_checking()
        self.drafts, self.draft_probs = self.drafts[:kept], self.draft_probs[:kept]
        self._commit_window()
        return kept

    def _worth_checking(self) -> int:
        """How many drafts of the step, from the first, to check: those that are likely enough, and one behind them.

        The decision rests on the distributions of drafts, never on the tokens drawn from them, so that sampling stays
        exact.
        """
        chances = self.chances[: len(self.drafts) - 1]
        if not chances:
            return len(self.drafts)
        means = torch.cat(chances, dim=1).mean(0)  # (drafts - 1,), falling
        return 1 + int((means >= self.settings.confidence_threshold).sum())

    def _commit_window(self) -> None:
        """Keeps in the MTP caches what rests on known tokens, and the states of the rest."""
        depths = len(self.layers)
        kept = []
        for length, cached, pending in zip(self.lengths, self.mtp_caches[0].lengths, self.pending_lengths):
            kept.append(min(pending, max(0, length - depths - self.mtp_offset - cached)))
        for cache in self.mtp_caches:
            cache.commit(kept)
        left = [pending - count for pending, count in zip(self.pending_lengths, kept)]
        width = max(left)
        states = self.pending[0][0]  # `_window` joined them
        self.pending, self.pending_lengths = [], left
        if width:
            self.pending = [(cut(states, kept, width), left)]

    def _catch_up(self) -> None:
        """Runs the MTP layers over pending states without drafting."""
        self._window(heads=0)
        self._commit_window()

    # --- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> torch.LongTensor | MTPGenerateOutput:
        """Generates, and returns what plain generation would."""
        logits = self.model.lm_head(self._prefill()).to(device=self.device, dtype=torch.float32)
        self._take(logits, drafted=0)
        while self.rows:
            started = self.clock()
            self._make_room()
            planned = self.schedule.choose(self._draft_limit())
            self.drafts, self.draft_probs, self.chances = [], [], []
            # What waits since a pause, or since the prompt, makes the step that sees it a long one.
            waiting = max(self.pending_lengths)
            usual = waiting <= 2 * (self.settings.num_assistant_tokens + 1) + len(self.layers)
            drafted = self._draft(planned) if planned else 0
            if not planned and waiting >= _MAX_PENDING:
                self._catch_up()
            states = self._check(drafted)
            logits = self.model.lm_head(states).to(device=self.device, dtype=torch.float32)
            accepted = self._take(logits, drafted, states)
            usual = usual or (not planned and waiting < _MAX_PENDING)
            seconds = self.clock() - started if usual else None
            self.schedule.record(planned, accepted, seconds, drafted)
            self.report.record(drafted, accepted)
        return self._finish()

    def _make_room(self) -> None:
        """Without a maximal length the buffer of tokens grows as needed."""
        short = max(self.lengths) + self.settings.num_assistant_tokens + 2 - self.tokens.shape[1]
        if self.max_length is None and short > 0:
            more = max(short, self.tokens.shape[1])
            self.tokens = nn.functional.pad(self.tokens, (0, more))
            behind = torch.arange(1, more + 1, device=self.device)
            self.positions = torch.cat((self.positions, self.positions[:, -1:] + behind), dim=1)

    def _draft_limit(self) -> int:
        """Drafts that could still be used, and that the cache has room for."""
        limit = self.tokens.shape[1] - max(self.lengths) - 1
        if self.max_length is not None:
            limit = min(limit, self.max_length + self.first - min(self.lengths) - 1)
        for layer in self.main.layers:
            if isinstance(layer, StaticLayer):
                limit = min(limit, layer.max_cache_len - self.main.length - 1)
        return limit

    def _check(self, drafted: int) -> torch.Tensor:
        """Runs the model over the newest token and the drafts of every row: states (B, drafted + 1, hidden)."""
        starts = [length - 1 for length in self.lengths]
        return self._run_model(
            input_ids=cut(self.tokens, starts, drafted + 1),
            attention_mask=self.main.mask(drafted + 1, self.device),
            position_ids=cut(self.positions, starts, drafted + 1),
        )

    def _take(self, logits: torch.Tensor, drafted: int, states: torch.Tensor | None = None) -> list[int]:
        """Accepts drafts by the model's logits (B, drafted + 1, V), and books the new tokens of every row.

        Returns how many drafts each row accepted, before any stopping criterion.
        """
        # Processors see the drafts as if they had been generated.
        scores = self.processing(logits, self.tokens, self.first, self.lengths, self.rows)
        drafts = cut(self.tokens, self.lengths, drafted)
        if self.do_sample:
            probs = torch.cat(self.draft_probs, dim=1) if drafted else scores[:, :0]
            accepted, following = accept_sampled(scores, drafts, probs)
        else:
            accepted, following = accept_greedy(scores, drafts)
        following = following.unsqueeze(1)
        # The one place per step that waits for the device.
        booked = torch.cat((drafts, following, accepted.unsqueeze(1)), dim=1).tolist()
        counts = [row[-1] for row in booked]
        write(self.tokens, [length + count for length, count in zip(self.lengths, counts)], following)
        news = [row[:count] + [row[-2]] for row, count in zip(booked, counts)]
        kept = self._book(news, scores, logits)
        if states is not None:
            self.main.commit(kept)
        self._emit()
        self._end_rows(states, kept)
        return counts

    def _book(self, news: list[list[int]], scores: torch.Tensor, logits: torch.Tensor) -> list[int]:
        """Appends each row's new tokens up to where it stops; returns how many."""
        stops = self._stops_by_criteria(news, scores) if self.criteria else {}
        kept = []
        for index, (row, tokens) in enumerate(zip(self.rows, news)):
            generated, count = self.generated[row], 0
            for token in tokens:
                if self._is_full(self.lengths[index] + count):
                    break
                generated.append(token)
                count += 1
                full = self._is_full(self.lengths[index] + count)
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
            self.lengths[index] += count
        return kept

    def _stops_by_criteria(self, news: list[list[int]], scores: torch.Tensor) -> dict[int, int]:
        """After how many of its new tokens a row is stopped by a criterion other than length and EOS.

        Criteria see rows of the same length together, each up to the token in question.
        """
        by_length: dict[int, list[tuple[int, int]]] = {}
        for index, tokens in enumerate(news):
            for count in range(1, len(tokens) + 1):
                by_length.setdefault(self.lengths[index] + count, []).append((index, count))
        stops: dict[int, int] = {}
        for length, pairs in sorted(by_length.items()):
            pairs = [pair for pair in pairs if pair[0] not in stops]
            if not pairs:
                continue
            rows = torch.tensor([index for index, _ in pairs], device=self.device)
            input_ids = self.tokens[rows, self.first : length]
            history = None if self.scores is None else self._score_history(pairs, scores)
            done = torch.zeros(len(pairs), dtype=torch.bool, device=self.device)
            for criterion in self.criteria:
                done = done | criterion(input_ids, history)
            stops |= {index: count for (index, count), stop in zip(pairs, done.tolist()) if stop}
        return stops

    def _score_history(self, pairs: list[tuple[int, int]], scores: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Scores of all tokens so far, (rows, V) each, as plain generation passes them."""
        histories = [[*self.scores[self.rows[index]], *scores[index, :count]] for index, count in pairs]
        return tuple(torch.stack(step) for step in zip(*histories))

    def _end_rows(self, states: torch.Tensor | None, kept: list[int]) -> None:
        """Drops rows that have ended, and hands the states of the others to the MTP layers."""
        if self.eos:
            active = [index for index, row in enumerate(self.rows) if self.ended[row] is None]
        else:
            # As in plain generation: without an EOS there is no padding, and rows go on until the last one stops.
            goal = max(self.ended) if all(end is not None for end in self.ended) else None
            active = [
                index
                for index, row in enumerate(self.rows)
                if (goal is None or len(self.generated[row]) < goal) and not self._is_full(self.lengths[index])
            ]
        if states is not None and active:
            self._add_pending(states, kept)
        if len(active) == len(self.rows):
            return
        self.rows, self.lengths = [self.rows[i] for i in active], [self.lengths[i] for i in active]
        if not active:
            return
        for cache in (self.main, *self.mtp_caches):
            cache.select(active)
        index = torch.tensor(active, device=self.device)
        self.tokens, self.positions = self.tokens[index], self.positions[index]
        self.pending = [(part[index.to(part.device)], [counts[i] for i in active]) for part, counts in self.pending]
        self.pending_lengths = [self.pending_lengths[i] for i in active]

    def _is_full(self, length: int) -> bool:
        """Whether a row with `length` known tokens may get no more."""
        return self.max_length is not None and length - self.first >= self.max_length

    # --- output -----------------------------------------------------------------------------------------------------

    def _final_length(self) -> int:
        return max(end if end is not None else len(tokens) for end, tokens in zip(self.ended, self.generated))

    def _emit(self) -> None:
        """Streams every position that all rows have reached."""
        streamer = self.settings.streamer
        if streamer is None:
            return
        reached = min(
            1 << 62 if self.eos and end is not None else len(tokens) for end, tokens in zip(self.ended, self.generated)
        )
        pad = self._pad_token()
        for position in range(self.emitted, min(reached, self._final_length())):
            column = [tokens[position] if position < len(tokens) else pad for tokens in self.generated]
            streamer.put(torch.tensor(column))
            self.emitted = position + 1

    def _pad_token(self) -> int:
        pad = getattr(self.config, "_pad_token_tensor", None)
        return 0 if pad is None else int(pad.flatten()[0])

    def _finish(self) -> torch.LongTensor | MTPGenerateOutput:
        length, pad = self._final_length(), self._pad_token()
        rows = [tokens[:length] + [pad] * (length - len(tokens)) for tokens in self.generated]
        prompt = self.prompt_ids
        sequences = torch.cat((prompt, torch.tensor(rows, dtype=prompt.dtype, device=prompt.device)), dim=1)
        self.report.tokens = sum(min(len(tokens), length) - 1 for tokens in self.generated)
        if self.settings.streamer is not None:
            self.settings.streamer.end()
        if self.main.keep:
            self.main.restore(self.prompt + length - 1)
        if not self.config.return_dict_in_generate:
            return sequences
        return MTPGenerateOutput(
            sequences=sequences,
            scores=_columns(self.scores, length),
            logits=_columns(self.logits, length),
            past_key_values=self.cache,
            speculation=self.report,
        )


def _columns(rows: list[list[torch.Tensor]] | None, length: int) -> tuple[torch.Tensor, ...] | None:
    """Per generated token (B, V); zeros where a row had ended."""
    if rows is None:
        return None
    empty = torch.zeros_like(rows[0][0])
    return tuple(torch.stack([row[i] if i < len(row) else empty for row in rows]) for i in range(length))
