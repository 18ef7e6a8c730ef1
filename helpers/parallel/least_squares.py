"""Exact linear regression by partial sums: parts are summed up where they lie, the sums are added.

A part's sums are taken about its own mean. Sums about zero are simpler, but lose all digits when a
column is large and varies little. The solution is that of scikit-learn's `LinearRegression`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from helpers.datasets import load_table
from helpers.datasets.files import MONTHS, chosen

RANK_TOLERANCE = 1e-12
"""Columns that are scaled to variance 1 are collinear where the variance of a mixture of them is
below this share of the largest. Rounding leaves about 1e-15 in the sums."""


@dataclass(frozen=True, eq=False)
class Moments:
    """All that least squares must know of some rows: their number, means and centred products.

    Attributes
    ----------
    n : int
        Number of rows; 0 for none, which changes nothing when added.
    mean : numpy.ndarray, shape (d + 1,), float64
        The means of the d columns of X, and last that of y.
    scatter : numpy.ndarray, shape (d + 1, d + 1), float64
        The sums of products of centred columns, ``(Z - mean).T @ (Z - mean)`` with Z = [X, y]: its
        blocks are called Sxx, Sxy and Syy.

    Examples
    --------
    >>> X, y = np.array([[0.0], [1.0], [2.0], [3.0]]), np.array([1.0, 3.0, 5.0, 7.0])
    >>> total = Moments.of(X[:3], y[:3]) + Moments.of(X[3:], y[3:])
    >>> fit = solve(total)
    >>> total.n, fit.coef.round(6), round(fit.intercept, 6)
    (4, array([2.]), 1.0)
    """

    n: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, X, y, name: str = "the part") -> Moments:
        """The moments of one part's rows.

        Parameters
        ----------
        X : array, shape (n, d)
        y : array, shape (n,)
            Numbers of any kind; sums are taken in float64.
        name : str
            What the part is called when something is wrong with it.

        Raises
        ------
        ValueError
            The shapes do not match, or a value is missing or infinite.
        """
        X, y = np.asarray(X, dtype=float), np.asarray(y, dtype=float)
        if X.ndim != 2 or y.shape != X.shape[:1]:
            shapes = f"X has shape {X.shape} and y has shape {y.shape}"
            raise ValueError(f"In {name} {shapes}: give X as (n, d) and y as (n,).")
        n, d = X.shape
        if n == 0:
            return cls(0, np.zeros(d + 1), np.zeros((d + 1, d + 1)))
        shift = _finite_means(X, y, name)
        Z = np.empty((n, d + 1))
        np.subtract(X, shift[:-1], out=Z[:, :-1])
        np.subtract(y, shift[-1], out=Z[:, -1])
        # A mean of large numbers is rounded. What it lacks is the mean of the small differences.
        rest = Z.mean(axis=0)
        return cls(n, shift + rest, Z.T @ Z - n * np.outer(rest, rest))

    def __add__(self, other: Moments) -> Moments:
        """The moments of both parts' rows (Chan, Golub and LeVeque 1983, equations 2.1)."""
        if not isinstance(other, Moments):
            return NotImplemented
        if len(self.mean) != len(other.mean):
            widths = f"{len(self.mean) - 1} and {len(other.mean) - 1}"
            raise ValueError(f"The parts have {widths} columns: give all the same columns.")
        n = self.n + other.n
        apart, share = other.mean - self.mean, other.n / max(n, 1)
        scatter = self.scatter + other.scatter + self.n * share * np.outer(apart, apart)
        return Moments(n, self.mean + share * apart, scatter)


class Fit(NamedTuple):
    """The line that fits best.

    Attributes
    ----------
    coef : numpy.ndarray, shape (d,)
        One weight a column.
    intercept : float
        The constant.
    r2 : float
        Share of the target's variance that is explained; 1 when the target never varies.
    residual : float
        Sum of the squared errors.
    rank : int
        How many directions the columns have; below d some are collinear, or constant.
    """

    coef: np.ndarray
    intercept: float
    r2: float
    residual: float
    rank: int


def add_up(parts: Iterable[Moments]) -> Moments:
    """The moments of all parts' rows; parts may arrive one by one and are not kept.

    Parameters
    ----------
    parts : iterable of Moments

    Raises
    ------
    ValueError
        There is no part, or one has other columns than those before it.

    Examples
    --------
    >>> add_up(Moments.of(np.ones((n, 2)), np.ones(n)) for n in (3, 0, 4)).n
    7
    """
    total = None
    for number, part in enumerate(parts):
        try:
            total = part if total is None else total + part
        except ValueError:
            widths = f"{len(part.mean) - 1} columns, those before it have {len(total.mean) - 1}"
            raise ValueError(f"Part {number} has {widths}: give all the same columns.") from None
    if total is None:
        raise ValueError("There are no parts to add up: give at least one.")
    return total


def solve(moments: Moments) -> Fit:
    """The best line for all rows in the sums; of several, that with the smallest weights.

    Raises
    ------
    ValueError
        The sums hold no rows.
    """
    if moments.n == 0:
        raise ValueError("There are no rows to fit: give at least one.")
    Sxx, Sxy = moments.scatter[:-1, :-1], moments.scatter[:-1, -1]
    spread = np.sqrt(np.diag(moments.scatter))
    # What rounding leaves of a constant is no variation.
    varies = spread > 8 * np.finfo(float).eps * np.sqrt(moments.n) * abs(moments.mean)
    use, coef = np.flatnonzero(varies[:-1]), np.zeros(len(Sxy))
    coef[use], rank = _smallest(Sxx[np.ix_(use, use)], Sxy[use])
    errors = np.append(-coef, 1.0)  # this mixture of the columns [X, y] is the error
    residual = max(float(errors @ moments.scatter @ errors), 0.0)
    r2 = 1 - residual / spread[-1] ** 2 if varies[-1] else 1.0
    return Fit(coef, float(errors @ moments.mean), float(r2), residual, rank)


def fit_flights(client, task: str, month=None) -> Fit:
    """The exact line for all flights: each month is loaded and summed up on a worker.

    Parameters
    ----------
    client : distributed.Client
        That of `helpers.cluster.open_cluster`. Its workers find the course's data.
    task, month
        As in `helpers.datasets.load_table`.

    Raises
    ------
    ValueError, DataError
        As in `helpers.datasets.load_table`.

    Examples
    --------
    >>> with open_cluster(2) as cluster:  # doctest: +SKIP
    ...     fit_flights(cluster.client, "arrival delay at take-off").rank
    37
    """
    months = chosen("month", month, MONTHS)
    # pure=False: whoever fits again wants the work done again, not the answer of last time.
    return solve(add_up(client.gather(client.map(_of_month, months, task=task, pure=False))))


def _of_month(month: int, task: str) -> Moments:
    """The moments of one month, loaded where this runs."""
    table = load_table(task, month=month)
    return Moments.of(table.X, table.y, name=f"month {month}")


def _finite_means(X: np.ndarray, y: np.ndarray, name: str) -> np.ndarray:
    """The means of [X, y]; a sentence when one is not a number."""
    with np.errstate(invalid="ignore", over="ignore"):
        mean = np.append(X.mean(axis=0), y.mean())
    wrong = np.flatnonzero(~np.isfinite(mean))
    if len(wrong):
        column = "y" if wrong[0] == X.shape[1] else f"column {wrong[0]} of X"
        raise ValueError(f"In {name} {column} has a value that is NaN or infinite: leave it out.")
    return mean


def _smallest(A: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, int]:
    """The smallest w of all that solve A w = b best, and the rank of A, which has no empty row."""
    scale = 1 / np.sqrt(np.diag(A))
    # With all columns at variance 1 the rank does not hang on the units in which they are given.
    values, vectors = np.linalg.eigh(A * np.outer(scale, scale))
    keep = values > RANK_TOLERANCE * max(values, default=0)
    known, free = vectors[:, keep], vectors[:, ~keep]
    w = scale * (known @ (known.T @ (scale * b) / values[keep]))
    # The mixtures of columns that change no prediction are taken out of w: that makes it smallest.
    basis, _ = np.linalg.qr(scale[:, None] * free)
    return w - basis @ (basis.T @ w), int(keep.sum())
