"""Drafts of speculative decoding: MTP layers over what the model has seen, for rows of unequal length.

With n tokens known of a row (the newest of them not yet fed to the model):

- MTP depth d (from 1) at slot i takes the state of depth d - 1 at slot i and the token at slot i + d. With D depths,
  slots below n - D rest on known tokens at every depth and stay in the MTP caches; the D - 1 behind them use drafts,
  and are computed again in the next step from the states that `pending` holds.
- drafts beyond D come from the last depth, applied to its own output one slot further on.
"""

import torch
from torch import nn

from .generation_rows import RowCache, SingleLayerCache, TokenRows, columns_from, cut, pick, write
from .generation_sampling import Processing


class Drafting:
    """The drafts of one `generate` call.

    Args:
        model: a causal LM with MTP layers.
        rows: the tokens; drafts are written behind the known ones.
        processing: the logits processors.
        do_sample: draw drafts, instead of taking the likeliest.
        threshold: no further draft where those so far are less likely than this to be right together.
        entry: device on which the model takes its inputs, or `None` where it moves them itself.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: TokenRows,
        processing: Processing,
        do_sample: bool,
        threshold: float,
        entry: torch.device | None,
    ):
        self.model, self.rows, self.processing = model, rows, processing
        self.do_sample, self.threshold, self.entry = do_sample, threshold, entry
        self.layers = [layer for _, layer in model.model.mtp_layers()]
        prompt = rows.prompt
        # Of tokens that came in a cache there are no states: MTP layers begin behind them.
        self.offset = prompt.past
        hidden = None if prompt.mask is None else prompt.mask[:, prompt.past :]
        self.caches = [RowCache(SingleLayerCache(), [0] * len(rows), hidden) for _ in self.layers]
        # States (B, n, hidden) that MTP layers have yet to see, and how many of them count in each row.
        self.pending: list[tuple[torch.Tensor, list[int]]] = []
        self.pending_lengths = [0] * len(rows)
        # Of the present step, one entry a draft: (B, 1) tokens, (B, 1, V) probabilities where they are drawn, and
        # (B, 1) probability that all drafts so far are right.
        self.drafts: list[torch.Tensor] = []
        self.probs: list[torch.Tensor] = []
        self.chances: list[torch.Tensor] = []

    def add(self, states: torch.Tensor, counts: list[int]) -> None:
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
        starts = [length + self.offset for length in self.caches[0].lengths]
        even = all(length == width for length in self.pending_lengths)
        new: torch.Tensor | int = width
        prompt, mask = self.rows.prompt, self.rows.prompt.mask
        if not even or mask is not None:
            new = torch.arange(width, device=device) < torch.tensor(self.pending_lengths, device=device).unsqueeze(1)
            if mask is not None and starts[0] < prompt.length:
                hidden = cut(self._own(mask).to(device), starts, width) == 0
                new = new & ~(hidden & (columns_from(starts, width, device) < prompt.length))
        positions = cut(self.rows.positions, starts, width).to(device)
        final = None
        for depth, (layer, cache) in enumerate(zip(self.layers, self.caches)):
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

    def _own(self, prompt: torch.Tensor) -> torch.Tensor:
        """Of something of the whole batch's prompt, what belongs to the rows that have not ended."""
        return prompt[torch.tensor(self.rows.originals, device=prompt.device)]

    def _embed(self, layer: nn.Module, starts: list[int], count: int) -> torch.Tensor:
        """What an MTP layer takes for the tokens at `count` slots of each row, from `starts[b]` on."""
        embeds = self._token_embeds(layer, cut(self.rows.tokens, starts, count))
        prompt = self.rows.prompt
        if prompt.embeds is not None and self.caches[0].length + self.offset < prompt.length:
            given = cut(self._own(prompt.embeds), starts, count).to(embeds)
            is_prompt = columns_from(starts, count, embeds.device) < prompt.length
            embeds = torch.where(is_prompt.unsqueeze(-1), given, embeds)
        return embeds

    def _token_embeds(self, layer: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.mtp_embed(layer, tokens if self.entry is None else tokens.to(self.entry))

    def _draft_token(self, layer: nn.Module, state: torch.Tensor, index: int, last: bool) -> None:
        """Drafts token `index` of the step, possibly its last one, from a state (B, 1, hidden)."""
        logits = self.model.mtp_head(layer)(state).to(device=self.rows.tokens.device, dtype=torch.float32)
        lengths = [length + index for length in self.rows.lengths]
        scores = self.processing(logits, self.rows.tokens, self.rows.prompt.first, lengths, self.rows.originals)
        # The chance of the last one decides nothing.
        threshold = 0.0 if last else self.threshold
        if self.do_sample:
            probs = scores.softmax(-1)
            token = torch.multinomial(probs[:, 0], 1)
            self.probs.append(probs)
            chance = probs.amax(-1) if threshold else None  # (B, 1)
        elif threshold:
            chance, token = scores.softmax(-1).max(-1)
        else:
            chance, token = None, scores.argmax(-1)
        if chance is not None:
            self.chances.append(chance * self.chances[-1] if self.chances else chance)
        self.drafts.append(token)
        write(self.rows.tokens, lengths, token)

    def draft(self, count: int) -> int:
        """Drafts up to `count` tokens for every row; returns how many."""
        self.drafts, self.probs, self.chances = [], [], []
        depths = len(self.layers)
        state, new = self._window(heads=count)
        layer, cache = self.layers[-1], self.caches[-1]
        # On an accelerator reading a chance waits for the device: there it is done once per step.
        at_once = self.rows.tokens.device.type == "cpu"
        for index in range(depths, count):
            if at_once and self.chances and float(self.chances[-1].mean()) < self.threshold:
                break
            # One slot behind the last state, whose token is the newest draft.
            if isinstance(new, int):
                new = new + 1
            else:
                new = torch.cat((new, new.new_ones((len(self.rows), 1))), dim=1)
            # The first of these drafts comes from the state at the newest token.
            positions = cut(self.rows.positions, [length - 1 + index - depths for length in self.rows.lengths], 1)
            state = self.model.model.mtp_forward(
                layer,
                state,
                self._token_embeds(layer, self.drafts[-1]),
                cache.mask(new, state.device),
                positions.to(state.device),
                past_key_values=cache.cache,
            ).to(state.device)
            self._draft_token(layer, state, index, last=index + 1 == count)
        kept = len(self.drafts) if at_once and depths == 1 else self._worth_checking()
        self.drafts, self.probs = self.drafts[:kept], self.probs[:kept]
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
        return 1 + int((means >= self.threshold).sum())

    def _commit_window(self) -> None:
        """Keeps in the MTP caches what rests on known tokens, and the states of the rest."""
        depths = len(self.layers)
        kept = []
        for length, cached, pending in zip(self.rows.lengths, self.caches[0].lengths, self.pending_lengths):
            kept.append(min(pending, max(0, length - depths - self.offset - cached)))
        for cache in self.caches:
            cache.commit(kept)
        left = [pending - count for pending, count in zip(self.pending_lengths, kept)]
        width = max(left)
        states = self.pending[0][0]  # `_window` joined them
        self.pending, self.pending_lengths = [], left
        if width:
            self.pending = [(cut(states, kept, width), left)]

    def catch_up(self) -> None:
        """Runs the MTP layers over pending states without drafting."""
        self._window(heads=0)
        self._commit_window()

    def select(self, active: list[int]) -> None:
        """Drops all rows but these, given as indices into the present ones."""
        for cache in self.caches:
            cache.select(active)
        index = torch.tensor(active)
        self.pending = [(part[index.to(part.device)], [counts[i] for i in active]) for part, counts in self.pending]
        self.pending_lengths = [self.pending_lengths[i] for i in active]
