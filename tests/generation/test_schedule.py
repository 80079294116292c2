"""The schedule against simulated models, whose acceptance and costs are known."""

import random

import pytest

from hf_moe.models.generation_schedule import DraftSchedule, SpeculationReport

LIMIT = 1000


def simulate(
    acceptance: float, cost: float, timed: bool, tokens: int = 400, rows: int = 1, maximum: int = 4, seed: int = 0,
    machine=None,
):  # fmt: skip
    """Time per token and row, in plain steps, of a model whose drafts are accepted with the given probability.

    `cost` is that of each draft with its check. Times jitter by a tenth, and `machine` slows what is measured.
    """
    rng = random.Random(seed)
    slowness = (machine or quiet)(random.Random(seed + 1000))
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
        schedule.record(count, accepted, seconds * next(slowness))
        spent += seconds
        done += 1 + sum(accepted) / rows
        chosen.append(count)
    return spent / done, chosen


def quiet(rng: random.Random):
    while True:
        yield 1.0


def busy(rng: random.Random):
    """What a shared machine does to times: phases that are slower, and single steps that are much slower."""
    while True:
        phase = rng.choice([1.0, 1.0, 1.4, 1.8])
        for _ in range(rng.randint(10, 150)):
            hiccup = rng.uniform(1.5, 3.0) if rng.random() < 0.3 else 10.0 if rng.random() < 0.01 else 1.0
            yield phase * hiccup


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


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("cost", [0.05, 0.35, 0.7])
@pytest.mark.parametrize("acceptance", [0.0, 0.2, 0.4, 0.6, 0.9])
def test_a_busy_machine_does_not_mislead_it(acceptance, cost, rows):
    times = [simulate(acceptance, cost, True, rows=rows, seed=seed, machine=busy)[0] for seed in range(20)]
    mean = sum(times) / len(times)
    assert mean < 1.05
    assert mean < 1.2 * best(acceptance, cost)


def test_losses_are_bounded_where_the_assumed_cost_is_far_too_low():
    times = [simulate(0.3, 1.2, True, tokens=400, seed=seed)[0] for seed in range(10)]
    assert max(times) < 1.05


@pytest.mark.parametrize("cost", [0.1, 0.2, 0.5])
def test_a_short_first_call_loses_little_and_gains_what_there_is(cost):
    """64 tokens, of which some go into learning what drafts cost."""
    for acceptance in (0.0, 0.2, 0.4, 0.6, 0.8, 0.9):
        times = [simulate(acceptance, cost, True, tokens=64, seed=seed)[0] for seed in range(40)]
        mean = sum(times) / len(times)
        assert mean < 1.05
        assert mean < 1.2 * best(acceptance, cost)


def test_long_steps_after_a_pause_teach_no_costs():
    schedule = DraftSchedule(2, "adaptive", cost_ratio=0.3, timed=True)
    for step in range(12):
        schedule.record(step % 2, [step % 2], 1.3 if step % 2 else 1.0)
    known = dict(schedule.known)
    assert known == {1: 1.3}
    schedule.record(1, [1], None)
    assert schedule.known == known


def test_drafts_that_end_early_cost_what_was_made():
    """Four planned drafts of which one is made cost little more than one."""
    schedule = DraftSchedule(4, "adaptive", cost_ratio=0.3, timed=False)
    for _ in range(100):
        schedule.record(4, [1], 1.0, drafted=1)
    assert schedule.expected_cost(4) < schedule.expected_cost(1) + 0.05
    assert schedule.expected_tokens(4) == pytest.approx(2.0, abs=0.1)


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
