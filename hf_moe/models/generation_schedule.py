"""How many tokens to draft next, learned from what was accepted and what steps cost; and the report of a generation."""

from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

SCHEDULES = ("adaptive", "constant", "heuristic", "heuristic_transient")
# Drafts per step where the caller does not say.
DEFAULT_DRAFT_TOKENS = 4
# Probability of the most likely draft below which the adaptive schedule does not have it checked.
DEFAULT_CONFIDENCE = 0.3
# Acceptance of a first draft before any was seen, and how many observations that guess weighs.
_PRIOR_ACCEPTANCE, _PRIOR_WEIGHT = 0.7, 1.5
# A second draft is taken for this much less likely than the first, until it was tried.
_PRIOR_DECLINE = 0.9
# Observations fade, since text changes.
_FADING = 0.98
# Steps between two attempts while drafting does not pay; doubled after each failure.
_FIRST_PAUSE, _LONGEST_PAUSE = 16, 512
# Steps between two plain ones that measure what drafting is compared with. They still yield a token.
_PLAIN_EVERY = 64
_TIMES_KEPT = 9
# Steps of a kind after which their times are believed. New shapes are slow at first, and machines hiccup.
_TIMES_TRUSTED = 3


@dataclass
class SpeculationReport:
    """What multi-token prediction did in one `generate` call.

    Attributes:
        drafted: drafted tokens that were checked, over all rows.
        accepted: of them, those that the model agreed with.
        drafted_by_position, accepted_by_position: the same for the first, second, ... draft of a step.
        steps: forward passes of the model after the prompt, counted once per row.
        tokens: generated tokens over all rows, without the first of each, which the prompt's pass gives.
    """

    drafted_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0

    @property
    def drafted(self) -> int:
        return sum(self.drafted_by_position)

    @property
    def accepted(self) -> int:
        return sum(self.accepted_by_position)

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of accepted drafts at each position, among steps that drafted so far."""
        return [hits / max(1, tries) for hits, tries in zip(self.accepted_by_position, self.drafted_by_position)]

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps if self.steps else 0.0

    def record(self, drafted: int, accepted: list[int]) -> None:
        """Adds a step that offered `drafted` tokens to each row, of which `accepted[b]` were taken."""
        self.steps += len(accepted)
        missing = drafted - len(self.drafted_by_position)
        if missing > 0:
            self.drafted_by_position += [0] * missing
            self.accepted_by_position += [0] * missing
        for position in range(drafted):
            self.drafted_by_position[position] += len(accepted)
            self.accepted_by_position[position] += sum(count > position for count in accepted)

    def __str__(self) -> str:
        shares = " ".join(f"{share:.2f}" for share in self.acceptance_by_position)
        return (
            f"MTP: {self.accepted} of {self.drafted} drafted tokens accepted (by position: {shares or '-'}), "
            f"{self.tokens_per_step:.2f} tokens per step"
        )


class DraftSchedule:
    """Chooses the number of drafts of each step.

    - `"constant"`: always `maximum`.
    - `"heuristic"`, `"heuristic_transient"`: two more after a step in which all drafts of all rows were accepted, else
      one fewer, but at least one; begins anew with each call.
    - `"adaptive"`: the number that promises the most tokens per unit of time by the acceptance and the costs seen so
      far, 0 included. While 0 is best, a draft is tried now and then, ever more rarely.

    Args:
        maximum: most drafts of a step, except for the heuristic schedules, which begin with it.
        cost_ratio: cost of a draft in steps without drafts, assumed until measured; for the adaptive schedule.
        timed: learn costs from the times that `record` is given. Without, `cost_ratio` stays, and choices depend on
            the tokens alone, so that sampling with a seed repeats itself.
    """

    def __init__(self, maximum: int, kind: str, cost_ratio: float = 0.0, timed: bool = False):
        self.maximum = maximum
        self.kind = kind
        self.cost_ratio = cost_ratio
        self.timed = timed
        self.current = maximum
        self.hits: dict[int, float] = defaultdict(float)
        self.tries: dict[int, float] = defaultdict(float)
        self.times: dict[int, deque[float]] = {}
        self.steps = 0
        self.pause, self.pause_length = 0, _FIRST_PAUSE
        self.warm: set[int] = set()

    def choose(self, limit: int) -> int:
        """Drafts of the next step, at most `limit`."""
        if limit <= 0:
            return 0
        if self.kind != "adaptive":
            return min(self.current, limit)
        if self.pause > 0:
            return 0
        if self.timed and self._plain_is_due():
            return 0
        counts = range(min(self.maximum, limit) + 1)
        best = max(counts, key=lambda count: self.expected_tokens(count) / self.expected_cost(count))
        if best == 0 and self.maximum:
            if self.pause < 0:  # the pause is over: one attempt
                return 1
            self.pause = self.pause_length
        return best

    def record(self, planned: int, accepted: list[int], seconds: float) -> None:
        """Learns from a step: `planned` drafts for each row, of which `accepted[b]` were taken, in `seconds`."""
        self.steps += 1
        if self.kind.startswith("heuristic") and planned:
            everything = all(count >= planned for count in accepted)
            self.current = self.current + 2 if everything else max(1, self.current - 1)
        if self.kind != "adaptive":
            return
        if self.pause > 0:
            self.pause -= 1
            if self.pause == 0:
                self.pause = -1
        elif self.pause < 0 and planned:
            self.pause = 0
            if sum(accepted):
                self.pause_length = _FIRST_PAUSE
            else:
                self.pause_length = min(2 * self.pause_length, _LONGEST_PAUSE)
        for position in range(planned):
            reached = sum(count >= position for count in accepted)
            self.hits[position] = _FADING * self.hits[position] + sum(count > position for count in accepted)
            self.tries[position] = _FADING * self.tries[position] + reached
        if self.timed:
            if planned in self.warm:  # the first of its kind pays for allocations
                self.times.setdefault(planned, deque(maxlen=_TIMES_KEPT)).append(seconds)
            self.warm.add(planned)

    def expected_tokens(self, count: int) -> float:
        """Tokens that a step with `count` drafts yields per row."""
        total = chance = 1.0
        guess = _PRIOR_ACCEPTANCE
        for position in range(count):
            share = (self.hits[position] + guess * _PRIOR_WEIGHT) / (self.tries[position] + _PRIOR_WEIGHT)
            chance *= share
            total += chance
            guess = share * _PRIOR_DECLINE
        return total

    def expected_cost(self, count: int) -> float:
        """Time of a step with `count` drafts: seconds once plain steps were measured, else in plain steps."""
        if 0 not in self.times:
            return 1 + self.cost_ratio * count
        plain = _typical(self.times[0])
        measured = self.times.get(count, ())
        if len(measured) >= _TIMES_TRUSTED or (count == 0 and measured):
            return _typical(measured)
        # Extrapolated from what is known best; a few slow samples are no reason not to try again.
        slope = self.cost_ratio * plain
        trusted = [other for other, times in self.times.items() if other and len(times) >= _TIMES_TRUSTED]
        if trusted:
            nearest = min(trusted, key=lambda other: abs(other - count))
            slope = max(0.0, _typical(self.times[nearest]) - plain) / nearest
        return min([plain + slope * count, *measured])

    def _plain_is_due(self) -> bool:
        measured = len(self.times.get(0, ()))
        if measured < 3:
            return self.steps in (2, 4, 6, 8)
        return self.steps % _PLAIN_EVERY == 0


def _typical(times: Iterable[float]) -> float:
    """The lower quartile: what is slower has been disturbed."""
    times = sorted(times)
    return times[len(times) // 4]
