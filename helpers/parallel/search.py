"""Searching for hyper-parameters: which trial comes next, and how much it may train.

A search is a generator that knows no engine. It yields a `Job`, or None while it has nothing to
start before another result has come. Into each ``yield`` goes a list of ``(job, loss)``: the
results since the last one. It ends when it wants no more jobs. The same generator runs on Dask
workers (`helpers.parallel.tasks.run_search`), one job after another (`run_serially`), or on
simulated workers (`helpers.planner.tasks.simulate_search`).

    >>> search = successive_halving(["a", "b", "c", "d"], least=1, most=4, factor=4)
    >>> job = next(search)
    >>> job
    Job(trial=0, config='a', budget=1)
    >>> search.send([(job, 0.7)])
    Job(trial=1, config='b', budget=1)

A smaller loss is better. A trial that failed, or whose training diverged, has the loss infinity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice, pairwise, product
from typing import NamedTuple

import numpy as np


class Job(NamedTuple):
    """One training: of which trial, with which settings, and how much.

    Attributes
    ----------
    trial : int
        Number of the configuration, in the order in which they were tried first.
    config : object
        The hyper-parameters, usually a dict.
    budget : int
        How much it may train, from the beginning: samples, steps or epochs.
    """

    trial: int
    config: object
    budget: int


# ---------------------------------------------------------------- configurations


def grid(space: Mapping[str, Iterable]) -> list[dict]:
    """All combinations of some values.

    Examples
    --------
    >>> grid({"rate": [0.1, 1], "width": [8]})
    [{'rate': 0.1, 'width': 8}, {'rate': 1, 'width': 8}]
    """
    return [dict(zip(space, values)) for values in product(*space.values())]


def draw(space: Mapping[str, object], n: int, seed) -> list[dict]:
    """Configurations drawn at random, each hyper-parameter independently of the others.

    Parameters
    ----------
    space : mapping
        For each hyper-parameter a list of values, or a pair ``(low, high)``: a tuple of two numbers
        above 0, between which the logarithm is uniform.
    n : int
    seed : int or sequence of int
        The same seed gives the same configurations; fewer are the beginning of more.

    Raises
    ------
    ValueError
        A range is none.

    Examples
    --------
    >>> [round(c["rate"], 3) for c in draw({"rate": (0.01, 1.0), "width": [8, 16]}, 3, seed=0)]
    [0.188, 0.012, 0.011]
    """
    for name, values in space.items():
        if isinstance(values, tuple) and not (len(values) == 2 and 0 < values[0] < values[1]):
            raise ValueError(
                f"{name} has the range {values}: give (low, high) with 0 < low < high."
            )
    random = np.random.default_rng(seed)
    return [{name: _draw(values, random) for name, values in space.items()} for _ in range(n)]


def _draw(values, random):
    if isinstance(values, tuple):
        low, high = values
        return float(low * (high / low) ** random.random())
    return values[random.integers(len(values))]


# ---------------------------------------------------------------- searches


def random_search(configs: Iterable, budget: int) -> Iterator[Job]:
    """Every configuration with the whole budget; a grid is searched in the same way.

    Bergstra and Bengio 2012, "Random search for hyper-parameter optimization".

    Examples
    --------
    >>> list(random_search(["a", "b"], budget=9))
    [Job(trial=0, config='a', budget=9), Job(trial=1, config='b', budget=9)]
    """
    for trial, config in enumerate(configs):
        yield Job(trial, config, budget)


def successive_halving(
    configs: Iterable, least: int, most: int, factor: int = 3, *, first: int = 0
) -> Iterator[Job | None]:
    """Train all a little, keep the best share, train those longer, and so on.

    Karnin, Koren and Somekh 2013, "Almost optimal exploration in multi-armed bandits"; for
    hyper-parameters Jamieson and Talwalkar 2016, "Non-stochastic best arm identification and
    hyperparameter optimization". Here with budgets and a factor, as algorithm 1 of Li et al. 2020
    ("A system for massively parallel hyperparameter tuning").

    Parameters
    ----------
    configs : iterable
    least, most : int
        Budgets of the first and of the last rung.
    factor : int
        Of `factor` trials one goes on, with `factor` times the budget.
    first : int
        Number of the first trial.

    Raises
    ------
    ValueError
        A number is impossible.

    Examples
    --------
    >>> def losses(search):
    ...     return [(job.trial, job.budget) for job, loss in run_serially(search, lambda c, b: c)]
    >>> losses(successive_halving([0.3, 0.1, 0.2, 0.4], least=1, most=4, factor=2))
    [(0, 1), (1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 4)]
    """
    alive = dict(enumerate(configs, start=first))
    for budget in budgets(least, most, factor):
        losses = yield from _all_of([Job(trial, alive[trial], budget) for trial in alive])
        keep = sorted(alive, key=lambda trial: losses[trial])[: max(1, len(alive) // factor)]
        alive = {trial: alive[trial] for trial in keep}


def hyperband(configs: Iterable, least: int, most: int, factor: int = 3) -> Iterator[Job | None]:
    """Successive halving several times, from many trials that begin small to few that begin large.

    So it is not lost where short trainings mislead. Li et al. 2018, "Hyperband: a novel
    bandit-based approach to hyperparameter optimization", algorithm 1.

    Parameters
    ----------
    configs : iterable
        As many as `bracket_sizes` add up to are taken from it; it may be endless.
    least, most, factor
        As for `successive_halving`.

    Examples
    --------
    >>> jobs = [job for job, _ in run_serially(hyperband(range(99), 1, 9), lambda c, b: c)]
    >>> len({job.trial for job in jobs}), bracket_sizes(1, 9, 3)
    (17, [9, 5, 3])
    """
    configs, first = iter(configs), 0
    steps = budgets(least, most, factor)
    for start, size in zip(steps, bracket_sizes(least, most, factor)):
        bracket = list(islice(configs, size))
        yield from successive_halving(bracket, start, most, factor, first=first)
        first += len(bracket)


def asha(configs: Iterable, least: int, most: int, factor: int = 3) -> Iterator[Job | None]:
    """Successive halving that waits for nobody: whoever is in the best share so far goes on.

    Li et al. 2020, "A system for massively parallel hyperparameter tuning", algorithm 2. Here for a
    finite number of configurations; it ends when nothing runs and nobody may go on.

    Parameters
    ----------
    configs, least, most, factor
        As for `successive_halving`.

    Examples
    --------
    >>> search = asha([0.3, 0.1, 0.2], least=1, most=2, factor=2)
    >>> [(job.trial, job.budget) for job, _ in run_serially(search, lambda config, budget: config)]
    [(0, 1), (1, 1), (1, 2), (2, 1)]
    """
    rungs = [
        {"budget": budget, "losses": {}, "gone": set()} for budget in budgets(least, most, factor)
    ]
    fresh, known, running = enumerate(configs), {}, 0
    while True:
        job = _promotion(rungs, known, factor)
        if job is None and (new := next(fresh, None)) is not None:
            trial, known[trial] = new[0], new[1]
            job = Job(trial, known[trial], rungs[0]["budget"])
        if job is None and not running:
            return
        running += job is not None
        for done, loss in (yield job) or ():
            running -= 1
            rung = next(rung for rung in rungs if rung["budget"] == done.budget)
            rung["losses"][done.trial] = loss


def _promotion(rungs, known, factor):
    """The job of a trial that may go on, on the highest rung possible; else None."""
    for rung, above in reversed(list(pairwise(rungs))):
        losses = rung["losses"]
        best = sorted(losses, key=losses.get)[: len(losses) // factor]
        for trial in best:
            if trial not in rung["gone"]:
                rung["gone"].add(trial)
                return Job(trial, known[trial], above["budget"])
    return None


def budgets(least: int, most: int, factor: int) -> list[int]:
    """The budgets of the rungs: from about `least`, each `factor` times the last, up to `most`.

    Raises
    ------
    ValueError
        A number is impossible.

    Examples
    --------
    >>> budgets(1000, 27000, 3), budgets(1, 10, 3)
    ([1000, 3000, 9000, 27000], [1, 3, 10])
    """
    if not (isinstance(factor, int) and factor >= 2):
        raise ValueError(f"factor is {factor!r}: give a whole number from 2 on.")
    if not 1 <= least <= most:
        raise ValueError(f"budgets go from {least} to {most}: give 1 <= least <= most.")
    rungs = 1
    while least * factor**rungs <= most:
        rungs += 1
    return [most // factor**rung for rung in reversed(range(rungs))]


def bracket_sizes(least: int, most: int, factor: int) -> list[int]:
    """How many trials each bracket of Hyperband begins with.

    Examples
    --------
    >>> bracket_sizes(1, 81, 3)
    [81, 34, 15, 8, 5]
    """
    last = len(budgets(least, most, factor)) - 1
    return [math.ceil((last + 1) / (s + 1) * factor**s) for s in range(last, -1, -1)]


def _all_of(jobs):
    """Yield jobs, then wait until the results of all have come; returns the losses by trial."""
    losses, waiting = {}, iter(jobs)
    while len(losses) < len(jobs):
        came = yield next(waiting, None)
        losses.update((job.trial, loss) for job, loss in came or ())
    return losses


def run_serially(search: Iterator, train: Callable) -> list[tuple[Job, float]]:
    """Run a search one job after the other.

    Parameters
    ----------
    search : generator
    train : callable
        ``train(config, budget)`` gives a loss.

    Returns
    -------
    list of (Job, float)

    Raises
    ------
    RuntimeError
        The search waits although it has all results.
    """
    results, job = [], next(search, None)
    while job is not None:
        results.append((job, as_loss(train(job.config, job.budget))))
        try:
            job = search.send(results[-1:])
        except StopIteration:
            return results
    if results:
        raise RuntimeError("The search waits for a result, but nothing runs.")
    return results


def as_loss(value) -> float:
    """A loss that can be compared: infinity in place of NaN.

    Examples
    --------
    >>> as_loss(float("nan")), as_loss(np.float32(0.5))
    (inf, 0.5)
    """
    return math.inf if math.isnan(value) else float(value)


def best_of(results) -> tuple[Job, float]:
    """The job with the smallest loss among those with the largest budget.

    Losses of different budgets are not compared: a long training of a poor configuration often
    beats a short one of a good configuration.

    Examples
    --------
    >>> best_of([(Job(0, "a", 1), 0.1), (Job(0, "a", 9), 0.5), (Job(1, "b", 9), 0.4)])[0].trial
    1
    """
    results = list(results)
    most = max(job.budget for job, _ in results)
    return min((pair for pair in results if pair[0].budget == most), key=lambda pair: pair[1])


def work_of(jobs) -> int:
    """The budgets of some jobs together.

    Examples
    --------
    >>> work_of(random_search("abc", budget=5))
    15
    """
    return sum(job.budget for job in jobs if job is not None)
