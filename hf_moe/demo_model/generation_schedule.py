"""How many tokens to draft next, learned from what was accepted and what steps cost; and the report of a generation."""

from collections import defaultdict, deque
from dataclasses import dataclass, field

from torch import nn

from .layer_experts import Experts

SCHEDULES = ("adaptive", "constant", "heuristic", "heuristic_transient")
# Drafts per step where the caller does not say.
DEFAULT_DRAFT_TOKENS = 4
# Chance of the drafts so far, by the MTP layers' own probabilities, below which the adaptive schedule adds no other.
# These probabilities are cautious: of drafts of 0.1 to 0.2, a demo model of four layers accepted seven in ten.
DEFAULT_CONFIDENCE = 0.15
# Acceptance of a first draft before any was seen, and how many observations that guess weighs.
_PRIOR_ACCEPTANCE, _PRIOR_WEIGHT = 0.7, 4.0
# A second draft is taken for this much less likely than the first, until it was tried.
_PRIOR_DECLINE = 0.9
# Observations fade, since text changes.
_FADING = 0.98
# Steps between two attempts while drafting does not pay; doubled after each failure.
_FIRST_PAUSE, _LONGEST_PAUSE = 8, 512
# What drafting may have cost in all against plain steps, in plain steps: so much at once, and this share of all steps.
# What it has gained counts for no more than `_MAX_CREDIT`, so that a good start does not pay for what follows.
_LOSS_AT_ONCE, _LOSS_SHARE, _MAX_CREDIT = 0.7, 0.02, 4.0
# Steps between two plain ones that measure what drafting is compared with. They still yield a token.
_PLAIN_EVERY = 64
# Drafts of a step until it is known what they cost.
_FIRST_DRAFTS = 2
# Times of a kind that are kept, for how many steps, and after how many they are believed: new shapes are slow at first,
# machines hiccup, and contexts grow.
_TIMES_KEPT, _TIMES_VALID, _TIMES_TRUSTED = 12, 256, 3
# Where costs are assumed and not measured: parameters that are read in the time that the calls of a layer take; a
# draft beside its layer and head, which has two states to join and the tokens of the last step to see; and a check,
# which touches more experts than a plain step.
_LAYER_CALLS, _DRAFT_EXTRA, _CHECK_SHARE = 2_500_000, 1.3, 0.25


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
      far, 0 included. While 0 is best, a draft is tried now and then, ever more rarely. Whatever the estimates
      promise, drafting pauses while it has cost more than a small share of the time.

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
        # By position of the draft: rows that accepted it, of those that had accepted what was before it; and steps that
        # made it, of those that had planned it and made what was before it.
        self.hits: dict[int, float] = defaultdict(float)
        self.tries: dict[int, float] = defaultdict(float)
        self.made: dict[int, float] = defaultdict(float)
        self.planned: dict[int, float] = defaultdict(float)
        # By number of drafts made: the step, and what it took.
        self.times: dict[int, deque[tuple[int, float]]] = {}
        # Measured times of steps by drafts made, in plain steps; empty until enough is known.
        self.known: dict[int, float] = {}
        self.steps = 0
        self.pause, self.pause_length = 0, _FIRST_PAUSE
        self.balance = 0.0
        self.warm: set[int] = set()

    def choose(self, limit: int) -> int:
        """Drafts of the next step, at most `limit`."""
        if limit <= 0:
            return 0
        if self.kind != "adaptive":
            return min(self.current, limit)
        broke = self.balance < -(_LOSS_AT_ONCE + _LOSS_SHARE * self.steps)
        if self.pause > 0 or broke or (self.timed and self._plain_is_due()):
            return 0
        most = self.maximum if self.known or not self.timed else min(_FIRST_DRAFTS, self.maximum)
        counts = range(min(most, limit) + 1)
        best = max(counts, key=lambda count: self.expected_tokens(count) / self.expected_cost(count))
        if best == 0 and self.maximum:
            if self.pause < 0:  # the pause is over: one attempt
                return 1
            self.pause = self.pause_length
        return best

    def record(self, planned: int, accepted: list[int], seconds: float | None, drafted: int | None = None) -> None:
        """Learns from a step.

        Args:
            planned: drafts that were asked for.
            accepted: how many drafts each row took.
            seconds: what the step took; `None` if it had other work to do, which says nothing of later ones.
            drafted: drafts that were made, where that is fewer.
        """
        self.steps += 1
        if self.kind.startswith("heuristic") and planned:
            everything = all(count >= planned for count in accepted)
            self.current = self.current + 2 if everything else max(1, self.current - 1)
        if self.kind != "adaptive":
            return
        drafted = planned if drafted is None else drafted
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
            if position <= drafted:
                self.made[position] = _FADING * self.made[position] + (position < drafted)
                self.planned[position] = _FADING * self.planned[position] + 1
        if drafted:
            gain = 1 + sum(accepted) / len(accepted) - self._cost(drafted)
            self.balance = min(self.balance + gain, _MAX_CREDIT)
        if self.timed and seconds is not None:
            if drafted in self.warm or not drafted:  # the first with drafts pays for allocations
                self.times.setdefault(drafted, deque(maxlen=_TIMES_KEPT)).append((self.steps, seconds))
                self._update_costs()
            self.warm.add(drafted)

    def expected_tokens(self, planned: int) -> float:
        """Tokens that a step with so many planned drafts yields per row."""
        total = chance = 1.0
        guess = _PRIOR_ACCEPTANCE
        for position in range(planned):
            share = (self.hits[position] + guess * _PRIOR_WEIGHT) / (self.tries[position] + _PRIOR_WEIGHT)
            chance *= share
            total += chance
            guess = share * _PRIOR_DECLINE
        return total

    def expected_cost(self, planned: int) -> float:
        """Time of a step with so many planned drafts, in plain steps."""
        total = chance = 1.0
        guess = _PRIOR_ACCEPTANCE
        for position in range(planned):
            if position:
                guess = (self.made[position] + guess) / (self.planned[position] + 1)
                chance *= guess
            total += chance * (self._cost(position + 1) - self._cost(position))
        return total

    def _update_costs(self) -> None:
        typical = {}
        for count, times in self.times.items():
            valid = sorted(seconds for step, seconds in times if step >= self.steps - _TIMES_VALID)
            if len(valid) >= _TIMES_TRUSTED:
                # The lower quartile, since what is slower has been disturbed. Of plain steps, which are few, the least:
                # in doubt, drafting is worth less.
                typical[count] = valid[len(valid) // 4 if count else 0]
        plain = typical.pop(0, None)
        self.known = {} if plain is None else {count: seconds / plain for count, seconds in typical.items()}

    def _cost(self, made: int) -> float:
        """Time of a step with so many drafts, in plain steps: measured, or else extrapolated from the nearest."""
        if not made or not self.known:
            return 1 + self.cost_ratio * made
        # More drafts never take less: what seems to, tells that the others were disturbed.
        bounds = [cost for count, cost in self.known.items() if count >= made]
        if made not in self.known:
            nearest = min(self.known, key=lambda count: abs(count - made))
            # The first draft is the dearest, and what was assumed may be too much.
            slope = max(0.0, min(self.cost_ratio, (self.known[nearest] - 1) / nearest))
            bounds.append(self.known[nearest] + (made - nearest) * slope)
        return max(1.0, min(bounds))

    def _plain_is_due(self) -> bool:
        if len(self.times.get(0, ())) < _TIMES_TRUSTED and self.steps < _PLAIN_EVERY:
            return self.steps % 2 == 1
        return self.steps % _PLAIN_EVERY == 0


def draft_cost_ratio(model: nn.Module) -> float:
    """Estimated cost of a draft and its check, in plain steps, by layers and parameters that a token meets."""
    per_token = model.config.num_experts_per_tok
    head = sum(parameter.numel() for parameter in model.lm_head.parameters())
    main = [_active_parameters(layer, per_token) for layer in model.model.layers[: model.config.num_hidden_layers]]
    drafts = [_active_parameters(layer, per_token) for _, layer in model.model.mtp_layers()]
    routed = sum(active for _, active in main)
    step = sum(total + _LAYER_CALLS for total, _ in main) + head
    draft = max(total + _LAYER_CALLS for total, _ in drafts) + head
    return (_DRAFT_EXTRA * draft + _CHECK_SHARE * routed) / step


def _active_parameters(layer: nn.Module, experts_per_token: int) -> tuple[float, float]:
    """Parameters of a layer that a token takes part in: all of them, and those of routed experts."""
    total = routed = 0.0
    for module in layer.modules():
        own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        if isinstance(module, Experts):
            own *= min(1.0, experts_per_token / max(1, module.num_experts))
            routed += own
        total += own
    return total, routed
