"""The exact line through all flights, from the files to the weights, on two workers.

Seconds from the first byte that is read to the weights of "arrival delay at take-off": loading
counts. Each run is a fresh process. Python has imported all it needs, the cluster is running, and
nothing of the data was touched. The weights of all sides must agree to `TOLERANCE`.

ours
    ``fit_flights``: each of two workers loads months and returns their sums.
scikit-learn
    `LinearRegression` on one core, after `load_table` of the whole year.
dask-ml
    `LinearRegression` on the same two workers, which load the months and keep them. The solver is
    ``newton``, one step of it (``max_iter=0``) and without scaling the columns first: for a line
    one step is exact, and all else takes longer. Its other solvers are not exact: with their own
    settings, on January alone, lbfgs is off by 8e-5 of the largest weight, gradient_descent and
    proximal_grad by 0.7, and admm needs minutes.
limit
    Half the time in which one core loads the months and sums them up, which two cores without any
    overhead would take.
"""

import time
from importlib.util import find_spec

import numpy as np

from benchmarks.measure import Case, interleaved
from benchmarks.peers import launch
from benchmarks.peers.timing import report
from helpers.cluster import open_cluster
from helpers.datasets import load_table
from helpers.datasets.files import MONTHS
from helpers.parallel.least_squares import Moments, add_up, fit_flights, solve

ROUNDS = 7
TASK = "arrival delay at take-off"
TOLERANCE = 1e-9
"""Largest difference of a weight, as a share of the largest weight."""


def ours(months=MONTHS):
    """Measure ours once, in this process, and report it; the other sides in the same way."""
    with open_cluster(workers=2) as cluster:
        cluster.client.run(import_all)
        import_all()
        _report_timed(lambda: _weights(fit_flights(cluster.client, TASK, months)))


def scikit_learn(months=MONTHS):
    """Load all, then fit."""
    from sklearn.linear_model import LinearRegression

    def fit():
        table = load_table(TASK, month=months)
        line = LinearRegression().fit(table.X, table.y)
        return np.append(line.coef_, line.intercept_)

    import_all()
    _report_timed(fit)


def dask_ml(months=MONTHS):
    """Each month is one block, which stays on the worker that loaded it."""
    import dask
    import dask.array as da
    from dask_ml.linear_model import LinearRegression

    def fit():
        tables = [dask.delayed(load_table, pure=False)(TASK, month=month) for month in months]
        d = 37  # the blocks' heights need not be known, their width must be
        X = da.concatenate([da.from_delayed(t.X, (np.nan, d), float) for t in tables])
        y = da.concatenate([da.from_delayed(t.y, (np.nan,), float) for t in tables])
        X, y = dask.persist(X, y)
        line = LinearRegression(
            solver="newton", max_iter=0, solver_kwargs={"normalize": False}
        ).fit(X, y)
        return np.append(line.coef_, line.intercept_)

    with open_cluster(workers=2) as cluster:
        cluster.client.run(import_all, "dask.array", "dask_ml.linear_model")
        import_all()
        _report_timed(fit)


def limit(months=MONTHS):
    """Half of what one core needs for the loading and the sums."""
    import_all()

    def fit():
        tables = (load_table(TASK, month=month) for month in months)
        return _weights(solve(add_up(Moments.of(table.X, table.y) for table in tables)))

    _report_timed(fit, share=1 / 2)


SIDES = {"ours": ours, "scikit-learn": scikit_learn, "dask-ml": dask_ml, "limit": limit}


def import_all(*more):
    """Import what loading and fitting need, in this process."""
    from importlib import import_module

    needed = ("pandas", "pyarrow.parquet", "pyarrow.pandas_compat")
    for name in (*needed, "helpers.parallel.least_squares", *more):
        import_module(name)


def _weights(fit):
    return np.append(fit.coef, fit.intercept)


def _report_timed(fit, share=1):
    start = time.perf_counter()
    weights = fit()
    report([(time.perf_counter() - start) * share, weights.tolist()])


def checked(side, weights, expected):
    """The weights of one side, when they are those of ours.

    Raises
    ------
    RuntimeError
        A weight differs by more than `TOLERANCE`.
    """
    apart = np.max(np.abs(np.subtract(weights, expected))) / np.max(np.abs(expected))
    if not apart <= TOLERANCE:
        raise RuntimeError(f"The weights of {side} differ from ours by {apart:.1e} of the largest.")
    return weights


def run(rounds=ROUNDS, months=MONTHS):
    """Measure the case "flights".

    Parameters
    ----------
    rounds : int
    months : sequence of int
        Fewer make a quick trial.

    Returns
    -------
    list of Case

    Raises
    ------
    RuntimeError
        A side failed, or found other weights than ours.
    """
    sides = dict(SIDES)
    if not find_spec("dask_ml"):
        print("Note: dask-ml is left out: it is not installed (benchmarks/requirements.in).")
        del sides["dask-ml"]
    found = {}

    def measure(side):
        program = f"from benchmarks.least_squares import SIDES; SIDES[{side!r}]({tuple(months)!r})"
        seconds, weights = launch.python(program)
        found[side] = checked(side, weights, found.get("ours", weights))
        return seconds

    medians = interleaved({side: lambda side=side: measure(side) for side in sides}, rounds)
    return [Case("flights", medians.pop("ours"), medians, medians.pop("limit"))]
