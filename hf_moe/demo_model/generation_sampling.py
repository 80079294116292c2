"""What speculative decoding does with logits: processing for rows of unequal length, and the acceptance rule.

Shapes: B rows, n positions, V vocabulary.
"""

import torch
from transformers.generation import logits_process
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList


def _classes(*names: str) -> tuple[type, ...]:
    """Those of Transformers' processors that its version has."""
    return tuple(getattr(logits_process, name) for name in names if hasattr(logits_process, name))


# Processors that look at the scores alone: they take all rows and positions in one call.
_CONTEXT_FREE = _classes(
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "TopHLogitsWarper",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "SuppressTokensLogitsProcessor",
)
# Processors that treat every row alike, by its tokens: they take rows of the same length in any order.
_ROW_WISE = (
    *_CONTEXT_FREE,
    *_classes(
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "NoBadWordsLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "ExponentialDecayLengthPenalty",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
    ),
)
# Processors that run or remember something from one token to the next, which a rejected token would spoil.
_STATEFUL = ("UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")


class AllowedTokens(LogitsProcessor):
    """`prefix_allowed_tokens_fn` for rows that are not at their place in the batch: `rows` says which they are."""

    def __init__(self, function):
        self.function = function
        self.rows: list[int] | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        mask = torch.full_like(scores, float("-inf"))
        rows = range(len(input_ids)) if self.rows is None else self.rows
        for index, (row, prefix) in enumerate(zip(rows, input_ids)):
            allowed = self.function(row, prefix)
            if len(allowed) == 0:
                raise ValueError(
                    f"`prefix_allowed_tokens_fn` returned an empty list for batch ID {row}: it must leave at least one "
                    f"token. Tokens so far: {prefix.tolist()}"
                )
            mask[index, allowed] = 0
        return scores + mask


class Processing:
    """Applies the logits processors of plain generation to positions of several rows.

    Raises:
        ValueError: for processors that carry a state from token to token (guidance, SynthID watermarks).
    """

    def __init__(self, processors: LogitsProcessorList, batch: int):
        for processor in processors:
            if type(processor).__name__ in _STATEFUL:
                raise ValueError(
                    f"`use_mtp=True` does not support {type(processor).__name__}, which keeps a state from token to "
                    "token; generate without it, or without `use_mtp`."
                )
        self.processors = processors
        self.batch = batch
        self.context_free = all(type(processor) in _CONTEXT_FREE for processor in processors)

    def __call__(
        self, logits: torch.Tensor, tokens: torch.Tensor, first: int, lengths: list[int], rows: list[int]
    ) -> torch.Tensor:
        """Processed scores (B, n, V) of float32 `logits` (B, n, V).

        Args:
            tokens: (B, slots); position j of row b follows tokens `first` to `lengths[b] + j`.
            first: slot of the first token that processors get to see.
            lengths: tokens of each row before position 0.
            rows: index of each row in the original batch.
        """
        if not self.processors:
            return logits
        batch, count, vocab = logits.shape
        if self.context_free:
            context = tokens[:, first : min(lengths)].repeat_interleave(count, 0)
            return self.processors(context, logits.reshape(-1, vocab)).view(batch, count, vocab)
        # Positions of the same length, whatever their row, go through in one call.
        by_length: dict[int, list[tuple[int, int]]] = {}
        for row, length in enumerate(lengths):
            for position in range(count):
                by_length.setdefault(length + position, []).append((row, position))
        processed = torch.empty_like(logits)
        for length, pairs in sorted(by_length.items()):
            row_index, position_index = torch.tensor(pairs, device=logits.device).unbind(1)
            context = tokens[row_index, first:length]
            scores = logits[row_index, position_index]
            originals = [rows[row] for row, _ in pairs]
            for processor in self.processors:
                scores = self._apply(processor, context, scores, originals)
            processed[row_index, position_index] = scores
        return processed

    def _apply(
        self, processor: LogitsProcessor, context: torch.Tensor, scores: torch.Tensor, rows: list[int]
    ) -> torch.Tensor:
        """One processor on rows of the original batch that have the same length, each at most once."""
        if isinstance(processor, AllowedTokens):
            processor.rows = rows
        elif type(processor) not in _ROW_WISE and rows != list(range(self.batch)):
            # It may know rows by their place: they take it, and copies of the first fill the others.
            index = torch.tensor(rows, device=scores.device)
            contexts = context[:1].repeat(self.batch, 1)
            all_scores = scores[:1].repeat(self.batch, 1)
            contexts[index], all_scores[index] = context, scores
            return processor(contexts, all_scores)[index]
        return processor(context, scores)


def accept_greedy(scores: torch.Tensor, drafts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Accepts drafts for as long as they are what greedy decoding picks.

    Args:
        scores: (B, k + 1, V), processed.
        drafts: (B, k) drafted tokens.

    Returns the number of accepted drafts (B,), and the token that follows them (B,).
    """
    picks = scores.argmax(-1)  # (B, k + 1)
    accepted = (picks[:, :-1] == drafts).cumprod(1).sum(1)
    return accepted, picks.gather(1, accepted.unsqueeze(1)).squeeze(1)


def accept_sampled(
    scores: torch.Tensor, drafts: torch.Tensor, draft_probs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Speculative sampling (arXiv 2211.17192): what is returned is distributed as if sampled from `scores` alone.

    A draft x is accepted with probability min(1, p(x) / q(x)). The token behind the accepted ones is sampled from the
    part of p that exceeds q where a draft was rejected, and from p where all were accepted.

    Args:
        scores: (B, k + 1, V), processed, in float32: p is their softmax.
        drafts: (B, k) tokens drawn from q.
        draft_probs: (B, k, V), q.

    Returns as `accept_greedy`.
    """
    probs = scores.softmax(-1)
    count = drafts.shape[1]
    picked = drafts.unsqueeze(-1)
    p, q = probs[:, :count].gather(-1, picked).squeeze(-1), draft_probs.gather(-1, picked).squeeze(-1)
    chosen = torch.rand_like(p) * q < p
    accepted = chosen.long().cumprod(1).sum(1)  # (B,)
    rows = torch.arange(len(probs), device=probs.device)
    p = probs[rows, accepted]  # (B, V)
    if count:
        q = draft_probs[rows, accepted.clamp(max=count - 1)]
        excess = torch.where((accepted < count).unsqueeze(1), (p - q).clamp(min=0), p)
        # Where rounding leaves nothing, p and q are the same.
        p = torch.where(excess.sum(-1, keepdim=True) > 0, excess, p)
    return accepted, torch.multinomial(p, 1).squeeze(1)
