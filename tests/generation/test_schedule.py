"""The schedule against simulated models, whose acceptance and costs are known."""

import random

import pytest

from hf_moe.models.generation_schedule import DraftSchedule, SpeculationReport

LIMIT = 1000


def simulate(
    acceptance: float, cost: float, timed: bool, tokens: int = 400, rows: int = 1, maximum: int = 4, seed: int = 0
):
    """Time per token and row, in plain steps, of a model whose drafts are accepted with the given probability.

    `cost` is that of each draft with its check. Times jitter by a tenth.
    """
    rng = random.Random(seed)
    schedule = DraftSchedule(maximum, "adaptive", cost_ratio=cost if not timed else 0.3, timed=timed)
    spent = done = 0.0
    chosen = []
    while done < tokens:
        count = schedule.choose(LIMIT)
        accepted = []
        for _ in range(rows):
            hits = 0
            while hits < count and rng.random() < acceptance:
                hits += 1
            accepted.append(hits)
        seconds = (1 + cost * count) * rng.uniform(0.95, 1.05)
        schedule.record(count, accepted, seconds)
        spent += seconds
        done += 1 + sum(accepted) / rows
        chosen.append(count)
    return spent / done, chosen


def best(acceptance: float, cost: float, maximum: int = 4) -> float:
    """Time per token of the best fixed number of drafts."""
    return min((1 + cost * k) / sum(acceptance**i for i in range(k + 1)) for k in range(maximum + 1))


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("cost", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("acceptance", [0.0, 0.1, 0.3, 0.6, 0.9])
def test_costs_at_most_five_percent_and_nears_the_best(acceptance, cost, rows, timed):
    times = [simulate(acceptance, cost, timed, rows=rows, seed=seed)[0] for seed in range(10)]
    mean = sum(times) / len(times)
    assert mean < 1.05
    assert mean < 1.12 * best(acceptance, cost)


def test_stops_and_asks_again_ever_more_rarely():
    _, chosen = simulate(0.0, 0.5, timed=True, tokens=2000)
    attempts = [step for step, count in enumerate(chosen) if count]
    assert len(attempts) < 20
    gaps = [later - earlier for earlier, later in zip(attempts, attempts[1:])]
    assert gaps[-1] > 200


def test_drafting_returns_when_the_text_changes():
    rng = random.Random(0)
    schedule = DraftSchedule(3, "adaptive", cost_ratio=0.2, timed=False)
    for acceptance, steps in ((0.0, 300), (0.95, 900)):
        for _ in range(steps):
            count = schedule.choose(LIMIT)
            hits = 0
            while hits < count and rng.random() < acceptance:
                hits += 1
            schedule.record(count, [hits], 1.0)
    assert schedule.choose(LIMIT) == 3


def test_fixed_schedules():
    constant = DraftSchedule(3, "constant", 0.3, timed=True)
    assert [constant.choose(10), constant.choose(2), constant.choose(0)] == [3, 2, 0]
    heuristic = DraftSchedule(2, "heuristic", 0.3, timed=True)
    heuristic.record(2, [2, 2], 1.0)
    assert heuristic.choose(10) == 4
    heuristic.record(4, [4, 1], 1.0)
    assert heuristic.choose(10) == 3
    for _ in range(5):
        heuristic.record(3, [0, 0], 1.0)
    assert heuristic.choose(10) == 1


def test_report_counts_by_position():
    report = SpeculationReport()
    report.record(2, [0, 2, 1])
    report.record(0, [0, 0, 0])
    report.record(3, [3, 1, 0])
    assert report.drafted_by_position == [6, 6, 3] and report.accepted_by_position == [4, 2, 1]
    assert (report.drafted, report.accepted, report.steps) == (15, 7, 9)
    assert report.acceptance_by_position == [4 / 6, 2 / 6, 1 / 3]
