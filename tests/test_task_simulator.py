"""The simulator of tasks: hand-worked cases, bounds, and nothing lost when workers die."""

import doctest
from collections import Counter
from itertools import pairwise, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.planner import tasks
from helpers.planner.tasks import (
    POLICIES,
    batch_size,
    makespan,
    shortest_makespan,
    simulate,
    simulate_search,
)

LENGTHS = st.lists(st.integers(0, 20), min_size=1, max_size=24)
WORKERS = st.integers(1, 5)
POLICY = st.sampled_from(POLICIES)
BATCH = st.one_of(st.integers(1, 6), st.just("guided"))


def done(events):
    """How often each task was delivered."""
    return Counter(e.microbatch for e in events if e.operation == "task")


def rows(events):
    """(worker, task, start) of each task."""
    return [(e.rank, e.microbatch, e.start) for e in events if e.operation == "task"]


# ---------------------------------------------------------------- hand-worked cases


def test_static_blocks_are_neighbours_and_nobody_helps():
    events = simulate([5, 5, 1, 1], workers=2, policy="static")
    assert rows(events) == [(0, 0, 0), (1, 2, 0), (1, 3, 1), (0, 1, 5)]
    assert makespan(events) == 10


def test_in_one_queue_who_is_free_takes_the_next():
    events = simulate([5, 5, 1, 1], workers=2, policy="dynamic")
    assert rows(events) == [(0, 0, 0), (1, 1, 0), (0, 2, 5), (1, 3, 5)]


def test_the_longest_first_saves_the_end():
    seconds = [1, 1, 1, 1, 4]
    assert makespan(simulate(seconds, 2, "dynamic")) == 6
    assert makespan(simulate(seconds, 2, "longest first")) == 4


def test_a_thief_takes_from_the_end_of_the_fullest_block():
    events = simulate([4, 4, 4, 4, 1, 1, 1, 1], workers=2, policy="stealing")
    # Worker 1 ends its block at 4 s; worker 0 then begins task 1, and 2 and 3 are left.
    assert [(w, t) for w, t, s in rows(events) if s == 4] == [(0, 1), (1, 3)]
    assert makespan(events) == 12 and makespan(simulate([4] * 4 + [1] * 4, 2, "static")) == 16


def test_grahams_worst_cases_are_reached():
    workers = 3  # list scheduling: m (m - 1) short ones, then one of length m
    seconds = [1] * (workers * (workers - 1)) + [workers]
    best = makespan(simulate(seconds, workers, "longest first"))
    assert makespan(simulate(seconds, workers)) / best == pytest.approx(2 - 1 / workers)
    # longest first, two workers: 3, 3, 2, 2, 2 takes 7 in place of 6
    assert makespan(simulate([3, 3, 2, 2, 2], 2, "longest first")) == 7  # = 6 (4/3 - 1/6)


def test_each_batch_pays_the_overhead_once():
    seconds, overhead = [1.0] * 8, 0.5
    spans = {b: makespan(simulate(seconds, 2, overhead=overhead, batch=b)) for b in (1, 2, 4)}
    assert spans == {1: 6.0, 2: 5.0, 4: 4.5}


def test_a_higher_priority_goes_first_and_equal_ones_keep_their_order():
    order = [t for _, t, _ in rows(simulate([1] * 4, 1, priorities=[0, 5, 0, 5]))]
    assert order == [1, 3, 0, 2]
    order = [t for _, t, _ in rows(simulate([1, 2, 3], 1, "longest first", priorities=[1, 0, 0]))]
    assert order == [0, 2, 1]


def test_what_a_dead_worker_had_not_delivered_is_run_again():
    events = simulate([2, 2, 2], workers=2, deaths=[(1.0, 0)])
    assert rows(events) == [(1, 1, 0), (1, 0, 2), (1, 2, 4)]
    [lost] = [e for e in events if e.operation == "lost"]
    assert (lost.rank, lost.start, lost.length) == (0, 0, 1)


def test_a_dead_workers_block_goes_to_the_others():
    events = simulate([1, 1, 1, 1], workers=2, policy="static", deaths=[(0.5, 0)])
    assert {worker for worker, _, _ in rows(events)} == {1} and makespan(events) == 4


def test_a_worker_comes_back():
    events = simulate([2, 2], workers=1, deaths=[(3.0, 0)], restart=10)
    assert rows(events) == [(0, 0, 0), (0, 1, 13)]


def test_what_is_delivered_at_the_moment_of_death_counts():
    assert done(simulate([1, 1], workers=2, deaths=[(1.0, 0)])) == {0: 1, 1: 1}


def test_when_all_are_dead_it_says_so():
    with pytest.raises(ValueError, match="All workers died, and 3 tasks were never done"):
        simulate([1, 1, 1], workers=2, deaths=[(0.5, 0), (0.5, 1)])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(seconds=[-1]), "0 or more"),
        (dict(seconds=[float("inf")]), "finite"),
        (dict(workers=0), "from 1 on"),
        (dict(policy="fast"), "choose one of static"),
        (dict(overhead=-1), "overhead is -1"),
        (dict(batch=0), 'or "guided"'),
        (dict(priorities=[1]), "1 priorities for 2 tasks"),
        (dict(deaths=[(1, 2)]), "worker below 2"),
        (dict(restart=-1), "restart is -1"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(arguments, words):
    with pytest.raises(ValueError, match=words):
        simulate(**(dict(seconds=[1, 1], workers=2) | arguments))


# ---------------------------------------------------------------- properties


@settings(max_examples=150, deadline=None)
@given(LENGTHS, WORKERS, POLICY, BATCH, st.integers(0, 3), st.data())
def test_no_task_is_lost_or_counted_twice_when_workers_die(
    seconds, workers, policy, batch, overhead, data
):
    deaths = data.draw(
        st.lists(st.tuples(st.integers(0, 60), st.integers(0, workers - 1)), max_size=6)
    )
    restart = data.draw(st.sampled_from([None, 0, 3]))
    if restart is None:
        deaths = [(when, worker) for when, worker in deaths if worker > 0]  # one survives
    options = dict(batch=batch, overhead=overhead, deaths=deaths, restart=restart)
    events = simulate(seconds, workers, policy, **options)
    assert done(events) == Counter(range(len(seconds)))
    for event in events:
        if event.operation == "task":
            assert event.length == seconds[event.microbatch]
    for worker in range(workers):
        mine = [event for event in events if event.rank == worker and event.length]
        assert all(a.stop <= b.start for a, b in pairwise(mine))  # one thing at a time


@settings(max_examples=150, deadline=None)
@given(LENGTHS, WORKERS)
def test_the_bounds_of_graham_hold(seconds, workers):
    least = shortest_makespan(seconds, workers)
    spans = {policy: makespan(simulate(seconds, workers, policy)) for policy in POLICIES}
    assert all(span >= least - 1e-9 for span in spans.values())
    # No better than 2 - 1/m times the lower bound: its proof needs no more than that.
    assert spans["dynamic"] <= sum(seconds) / workers + (1 - 1 / workers) * max(seconds) + 1e-9
    assert spans["stealing"] <= sum(seconds) / workers + (1 - 1 / workers) * max(seconds) + 1e-9
    assert spans["static"] <= sum(seconds)


def best_possible(seconds, workers):
    """The shortest makespan of all, by trying every assignment."""
    best = [sum(seconds)]

    def place(task, loads):
        if max(loads) >= best[0]:
            return
        if task == len(seconds):
            best[0] = max(loads)
            return
        for worker in range(workers):
            place(task + 1, [x + seconds[task] * (w == worker) for w, x in enumerate(loads)])

    place(0, [0] * workers)
    return best[0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 3))
def test_the_ratios_of_graham_hold_against_the_best_of_all_schedules(seconds, workers):
    best = best_possible(seconds, workers)
    assert makespan(simulate(seconds, workers)) <= best * (2 - 1 / workers) + 1e-9
    longest = makespan(simulate(seconds, workers, "longest first"))
    assert longest <= best * (4 / 3 - 1 / (3 * workers)) + 1e-9


def test_some_order_of_the_queue_reaches_the_best():
    seconds = [3, 3, 2, 2, 2]
    spans = [makespan(simulate(order, 2)) for order in permutations(seconds)]
    assert min(spans) == best_possible(seconds, 2) == 6


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 500), st.integers(1, 8))
def test_guided_batches_shrink_to_one_and_take_all(waiting, workers):
    sizes = []
    while waiting:
        sizes.append(batch_size("guided", waiting, workers))
        waiting -= sizes[-1]
    assert waiting == 0 and sizes[-1] == 1
    assert all(a >= b for a, b in pairwise(sizes))


# ---------------------------------------------------------------- a search on simulated workers


def test_a_search_that_waits_for_nothing_is_told():
    def never():
        yield None

    with pytest.raises(RuntimeError, match="waits for a result"):
        simulate_search(never(), lambda job: (0, 1), workers=2)


def test_an_empty_search_ends_at_once():
    assert simulate_search(iter(()), lambda job: (0, 1), workers=2) == ([], [])


def test_the_examples():
    assert doctest.testmod(tasks).failed == 0
