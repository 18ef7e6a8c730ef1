"""Searches for hyper-parameters: hand-worked cases, and the same results on any engine."""

import doctest
import math
import random
from collections import Counter
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.parallel import search as search_module
from helpers.parallel.search import (
    Job,
    as_loss,
    asha,
    best_of,
    bracket_sizes,
    budgets,
    draw,
    grid,
    hyperband,
    random_search,
    run_serially,
    successive_halving,
    work_of,
)
from helpers.planner.tasks import simulate_search


def itself(config, budget):
    """A trial whose loss is its configuration: short trainings tell the truth."""
    return config


def jobs_of(results):
    return [(job.trial, job.budget) for job, _ in results]


# ---------------------------------------------------------------- configurations


def test_a_grid_has_all_combinations_and_random_ones_are_new_each_time():
    assert len(grid({"a": [1, 2, 3], "b": [1, 2, 3]})) == 9
    configs = draw({"rate": (1e-3, 10.0), "width": [1, 2]}, 200, seed=1)
    rates = [config["rate"] for config in configs]
    assert len(set(rates)) == 200 and min(rates) >= 1e-3 and max(rates) <= 10
    below = sum(rate < 0.1 for rate in rates)
    assert 70 < below < 130  # half of the logarithmic range
    assert Counter(config["width"] for config in configs).keys() == {1, 2}
    assert draw({"rate": (1e-3, 10.0), "width": [1, 2]}, 5, seed=1) == configs[:5]


@pytest.mark.parametrize("bad", [(1.0, 0.1), (0, 1), (1, 2, 3)])
def test_a_range_that_is_none_is_refused(bad):
    with pytest.raises(ValueError, match="0 < low < high"):
        draw({"rate": bad}, 1, seed=0)


@pytest.mark.parametrize(
    ("arguments", "rungs"),
    [((1, 81, 3), [1, 3, 9, 27, 81]), ((2, 2, 2), [2]), ((5, 100, 4), [6, 25, 100])],
)
def test_rungs_go_up_to_the_whole_budget(arguments, rungs):
    assert budgets(*arguments) == rungs


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1, 9, 1), "from 2 on"),
        ((1, 9, 2.5), "from 2 on"),
        ((0, 9, 3), "1 <= least"),
        ((9, 3, 3), "1 <= least"),
    ],
)
def test_impossible_rungs_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        budgets(*arguments)


# ---------------------------------------------------------------- successive halving


def test_halving_keeps_the_best_share_on_each_rung():
    configs = [5, 3, 8, 1, 9, 2, 7, 4, 6]
    results = run_serially(successive_halving(configs, 1, 9, 3), itself)
    assert jobs_of(results)[9:] == [(3, 3), (5, 3), (1, 3), (3, 9)]
    assert best_of(results) == (Job(3, 1, 9), 1)
    assert work_of(job for job, _ in results) == 9 + 9 + 9


def test_halving_is_misled_where_short_trainings_mislead():
    def crossing(config, budget):
        slow_but_good = config == 0
        return (2.0 if budget < 9 else 0.0) if slow_but_good else 1.0

    results = run_serially(successive_halving(range(9), 1, 9, 3), crossing)
    assert best_of(results)[1] == 1.0
    assert best_of(run_serially(random_search(range(9), 9), crossing))[1] == 0.0
    # Hyperband's last bracket trains a few from the beginning to the end.
    configs = [1] * 14 + [0] + [1] * 9
    assert best_of(run_serially(hyperband(configs, 1, 9, 3), crossing))[1] == 0.0


def test_a_diverged_trial_is_the_worst_and_not_the_best():
    losses = {0: math.nan, 1: 0.5, 2: math.inf, 3: 0.7}
    results = run_serially(successive_halving(range(4), 1, 2, 2), lambda c, b: losses[c])
    assert jobs_of(results)[4:] == [(1, 2), (3, 2)]
    assert as_loss(math.nan) == math.inf and as_loss(0.25) == 0.25


def test_one_trial_is_left_however_few_there_are():
    assert jobs_of(run_serially(successive_halving([1, 2], 1, 9, 3), itself))[2:] == [
        (0, 3),
        (0, 9),
    ]
    assert run_serially(successive_halving([], 1, 9, 3), itself) == []


# ---------------------------------------------------------------- Hyperband


def test_hyperbands_brackets_are_those_of_the_paper():
    # Li et al. 2018, table 1: R = 81, factor 3.
    assert bracket_sizes(1, 81, 3) == [81, 34, 15, 8, 5]
    results = run_serially(hyperband(count(), 1, 81, 3), itself)
    table = {
        0: [(1, 81), (3, 27), (9, 9), (27, 3), (81, 1)],
        81: [(3, 34), (9, 11), (27, 3), (81, 1)],
        115: [(9, 15), (27, 5), (81, 1)],
        130: [(27, 8), (81, 2)],
        138: [(81, 5)],
    }
    found = {first: Counter() for first in table}
    for trial, budget in jobs_of(results):
        found[max(first for first in table if first <= trial)][budget] += 1
    assert {first: sorted(c.items()) for first, c in found.items()} == table


# ---------------------------------------------------------------- ASHA


def test_asha_goes_on_as_soon_as_a_trial_is_in_the_best_share():
    results = run_serially(asha([0.5, 0.4, 0.3, 0.6, 0.7, 0.2], 1, 9, 3), itself)
    # After three trials the best goes on; after six, the best two of which one has gone already.
    assert jobs_of(results) == [(0, 1), (1, 1), (2, 1), (2, 3), (3, 1), (4, 1), (5, 1), (5, 3)]


def test_asha_never_promotes_a_trial_twice_and_ends():
    results = run_serially(asha(range(27), 1, 27, 3), itself)
    assert max(Counter(jobs_of(results)).values()) == 1
    assert best_of(results)[0].trial == 0
    assert Counter(job.budget for job, _ in results)[1] == 27


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.randoms(use_true_random=False))
def test_on_any_number_of_workers_each_job_runs_once(trials, workers, chance):
    losses = [chance.random() for _ in range(trials)]
    for make in (
        lambda: random_search(range(trials), 9),
        lambda: successive_halving(range(trials), 1, 9, 3),
        lambda: hyperband(range(trials), 1, 9, 3),
        lambda: asha(range(trials), 1, 9, 3),
    ):
        results, events = simulate_search(
            make(), lambda job: (losses[job.trial], chance.random() * job.budget), workers
        )
        jobs = [(job.trial, job.budget) for _, job, _ in results]
        assert len(set(jobs)) == len(jobs) == len(events)
        assert {trial for trial, _ in jobs} <= set(range(trials))
        assert len({trial for trial, b in jobs}) == trials or make().__name__ == "hyperband"
        for trial, budget in jobs:  # nobody is on a rung without having been on all below
            if make().__name__ == "asha" and budget > 1:
                assert (trial, budget // 3) in jobs


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 99))
def test_halving_gives_the_same_on_any_number_of_workers(trials, workers, seed):
    chance = random.Random(seed)
    losses = [chance.random() for _ in range(trials)]
    serial = run_serially(successive_halving(range(trials), 1, 9, 3), lambda c, b: losses[c])
    parallel, _ = simulate_search(
        successive_halving(range(trials), 1, 9, 3),
        lambda job: (losses[job.trial], chance.random()),
        workers,
    )
    assert sorted(serial) == sorted((job, loss) for _, job, loss in parallel)


def test_halving_lets_workers_wait_and_asha_does_not():
    def trial(job):
        return job.trial, job.budget * (1 + 3 * (job.trial % 4 == 0))  # every fourth is slow

    idle = {}
    for make in (successive_halving, asha):
        _, events = simulate_search(make(range(27), 1, 27, 3), trial, workers=8)
        first = [e for e in events if e.length < 27]
        end = max(e.stop for e in first)
        idle[make.__name__] = 1 - sum(e.length for e in first) / (8 * end)
    assert idle["asha"] < idle["successive_halving"]


def test_a_search_that_waits_for_nothing_is_told():
    def stuck():
        yield Job(0, None, 1)
        yield None

    with pytest.raises(RuntimeError, match="waits for a result"):
        run_serially(stuck(), lambda c, b: 0)


def test_the_examples():
    assert doctest.testmod(search_module).failed == 0
