"""Exercises of notebook 06, Pipeline parallelism."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

from helpers.classroom.checks import check_letters, close_to, exercise, known_mistake
from helpers.parallel.schedules import Operation, one_f_one_b, plan
from helpers.planner.pipeline import (
    Costs,
    find_fault,
    peak_activations,
    simulate,
    step_seconds,
)

# ---------------------------------------------------------------- 06.1: micro-batches for a bubble


@exercise(
    "06.1",
    hint="Solve (p - 1) / (m + p - 1) ≤ bubble for m, and round up; at least 1.",
    shows="A long pipeline needs very many micro-batches, and so a very large batch.",
)
def smallest_m(answer):
    """Exercise 06.1: the fewest micro-batches with which a rank is idle no more than that."""
    # A quarter is exact in floats, so that it can be seen who rounds a whole number up; no other
    # case is whole, where floats could end on either side.
    for ranks, bubble in ((6, 0.25), (16, 0.06), (2, 0.3), (4, 0.31), (1, 0.1), (3, 0.9)):
        exact = (ranks - 1) * (1 - bubble) / bubble
        right, got = max(1, math.ceil(exact)), answer(ranks, bubble)
        mistakes = (
            (math.ceil(exact), "with few ranks this gives 0: take at least 1."),
            (exact, "micro-batches are whole, and there is at least one: round up."),
            (max(1, math.floor(exact)), "rounded down, the bubble is larger than asked: round up."),
            (
                max(1, math.floor(exact) + 1),
                "one more than needed where it fits exactly: use ceil.",
            ),
            (
                max(1, math.ceil((ranks - 1) / bubble)),
                "this is m + p - 1, the length of the step: subtract p - 1.",
            ),
            (
                max(1, math.ceil(ranks * (1 - bubble) / bubble)),
                "filling takes p - 1 steps, not p.",
            ),
        )
        fault = known_mistake(got, right, mistakes)
        if fault:
            return fault
        if not close_to(got, right):
            return (
                f"for {ranks} ranks and a bubble of {bubble:.0%} it should be {right}, not {got}."
            )
    return None


# ---------------------------------------------------------------- 06.2: what a rank keeps


@exercise(
    "06.2",
    hint="One micro-batch takes batch_bytes / microbatches. How many of them does a rank keep?",
    shows="Under GPipe finer micro-batches save no memory; under 1F1B they do.",
)
def kept_bytes(answer):
    """Exercise 06.2: bytes of activations that a rank keeps at most, under GPipe and 1F1B."""
    for rank, ranks, m, whole in ((1, 5, 8, 800), (3, 4, 8, 800), (1, 4, 2, 600), (0, 2, 16, 64)):
        got = answer(rank, ranks, m, whole)
        if not isinstance(got, (tuple, list)) or len(got) != 2:
            return "return a pair: the bytes under GPipe, and those under 1F1B."
        one = whole / m
        right = whole, min(m, ranks - rank) * one
        mistakes = (
            (right[::-1], "the pair is the wrong way round: GPipe first."),
            ((m, min(m, ranks - rank)), "these are micro-batches: multiply by the bytes of one."),
            ((whole, (ranks - rank) * one), "there are not so many micro-batches: use min."),
            (
                (whole, min(m, ranks - rank - 1) * one),
                "the rank itself counts, too: at most p - r micro-batches are kept.",
            ),
            ((whole, min(m, rank + 1) * one), "the first rank keeps the most, not the last one."),
            ((whole, min(m, ranks) * one), "this is right for rank 0; later ranks keep fewer."),
            (
                (m * whole, min(m, ranks - rank) * whole),
                "`batch_bytes` is for the whole batch: divide it by the micro-batches.",
            ),
            ((one, right[1]), "GPipe keeps all micro-batches, not one."),
        )
        for wrong, sentence in mistakes:
            if _same(got, wrong) and not _same(wrong, right):
                return sentence
        if not _same(got, right):
            return (
                f"for rank {rank} of {ranks}, {m} micro-batches and {whole} bytes it should be "
                f"{right[0]:g} and {right[1]:g}, not {got[0]} and {got[1]}."
            )
    return None


def _same(some, others):
    return all(close_to(a, b) for a, b in zip(some, others, strict=True))


# ---------------------------------------------------------------- 06.3: a thrifty schedule

MOST_KEPT = 3


@exercise(
    "06.3",
    hint="In 1F1B, `ahead` forward passes come first, and one more is kept. Allow at most two.",
    shows="Memory and bubble can be traded: a schedule is only a list.",
    nothing="your schedule gives nothing: it yields its operations, as in `yield Operation(…)`.",
)
def thrifty(answer):
    """Exercise 06.3: three micro-batches kept at most, as quick as 1F1B or quicker than waves."""
    for ranks, microbatches in ((2, 8), (3, 8), (4, 8), (3, 2), (5, 1), (1, 3)):
        fault = _fault_of_schedule(answer, ranks, microbatches)
        if fault:
            return f"with {ranks} ranks and {microbatches} micro-batches: {fault}"
    return None


def _fault_of_schedule(answer, ranks, microbatches):
    lists = plan(answer, ranks, microbatches)
    if not all(isinstance(op, Operation) for operations in lists for op in operations):
        return 'yield operations, such as Operation("forward", 0).'
    fault = find_fault(lists)
    if fault:
        return fault
    seen = {op.microbatch for operations in lists for op in operations}
    if len(seen) < microbatches:
        return f"there are only {len(seen)} micro-batches in the lists."
    costs = Costs(forward=1.0, backward=2.0)
    events = simulate(lists, costs)
    peak = max(peak_activations(events, ranks))
    if peak > MOST_KEPT:
        return f"a rank keeps the activations of {peak} micro-batches: at most {MOST_KEPT}."
    return _too_slow(step_seconds(events), ranks, microbatches, costs)


def _too_slow(units, ranks, microbatches, costs):
    """As quick as 1F1B where that keeps no more; else quicker than waves."""
    needed = {
        schedule: step_seconds(simulate(plan(schedule, ranks, microbatches), costs))
        for schedule in (one_f_one_b, _waves)
    }
    if ranks <= MOST_KEPT and units > needed[one_f_one_b]:
        return (
            f"it takes {units:g} units, and 1F1B, which here keeps no more than {MOST_KEPT} "
            f"either, {needed[one_f_one_b]:g}: a rank near the end needs fewer ahead."
        )
    if ranks > MOST_KEPT and microbatches > MOST_KEPT and units >= needed[_waves]:
        return f"it takes {units:g} units, and waves of {MOST_KEPT} take {needed[_waves]:g}."
    return None


def _waves(rank, ranks, microbatches):
    """Three micro-batches forward, the same three back, then the next ones."""
    for begin in range(0, microbatches, MOST_KEPT):
        wave = range(begin, min(begin + MOST_KEPT, microbatches))
        yield from (Operation("forward", m) for m in wave)
        yield from (Operation("backward", m) for m in wave)


# ---------------------------------------------------------------- 06.4: the best cut


@exercise(
    "06.4",
    hint="Try all places with combinations(range(1, len(costs)), stages - 1): a minimum of maxima.",
    shows="The pipeline is as quick as its slowest stage: cut by time.",
)
def best_cut(answer):
    """Exercise 06.4: the time of the slowest stage of the best cut."""
    cases = (
        ([1, 1, 1, 1, 4], 2),
        ([3, 1, 2, 5, 1, 1, 4], 3),
        ([2.5, 1, 1], 3),
        ([1, 2, 3, 4], 1),
        ([5, 1, 1, 1, 1, 1], 3),
    )
    for costs, stages in cases:
        given = list(costs)
        got, right = answer(costs, stages), _best(given, stages)
        if costs != given:
            return "your function changes the list that it was given."
        mistakes = (
            (sum(costs) / stages, "that is the mean: layers cannot be divided."),
            (_equal_numbers(costs, stages), "these are equal numbers of layers; try all places."),
            (_extreme(costs, stages, max), "this is the worst cut: take the minimum of all."),
            (_fastest(costs, stages), "the *slowest* stage of a cut counts: take its maximum."),
            (max(costs), "a stage is at least as slow as its slowest layer, but here slower."),
        )
        fault = known_mistake(got, right, mistakes)
        if fault:
            return fault
        if not close_to(got, right):
            return f"for {costs} on {stages} stages it should be {right:g}, not {got}."
    return None


def _cuts(costs, stages):
    """The times of the stages of each cut."""
    for inside in combinations(range(1, len(costs)), stages - 1):
        yield [sum(costs[a:b]) for a, b in pairwise([0, *inside, len(costs)])]


def _extreme(costs, stages, choose):
    return choose(max(times) for times in _cuts(costs, stages))


def _best(costs, stages):
    return _extreme(costs, stages, min)


def _fastest(costs, stages):
    return min(min(times) for times in _cuts(costs, stages))


def _equal_numbers(costs, stages):
    places = [len(costs) * stage // stages for stage in range(stages + 1)]
    return max(sum(costs[a:b]) for a, b in pairwise(places))


# ---------------------------------------------------------------- the quiz


@exercise(
    "06.quiz",
    hint="Sections 2, 2, 5, 8 and 9.",
    shows="A schedule decides about idle time and memory; the stages decide about the pace.",
)
def quiz(answers):
    """The quiz of notebook 06."""
    right = {"1": "c", "2": "a", "3": "b", "4": "c", "5": "a"}
    why = {
        "1a": "3 of 4 + 3 steps are idle, not 1 of 4: see the formula of section 2.",
        "1b": "that holds for one micro-batch; here four share the filling.",
        "2b": "that is GPipe: it keeps the whole batch however it is cut.",
        "2c": "there are more micro-batches, but no more of them are kept at a time.",
        "3a": "they may be as large as the weights themselves.",
        "3c": "nothing is computed twice; that is recomputation, section 7.",
        "4a": "each of them still waits for the slow stage.",
        "4b": "a stash keeps old weights; it makes nothing quicker.",
        "5b": "it is: it never empties.",
        "5c": "it is: that is what it was made for.",
    }
    return check_letters(answers, right, why)
