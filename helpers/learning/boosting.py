"""Gradient boosting of stumps, with rows divided among ranks: each tree corrects those before it.

The trees come one after the other, so they cannot be trained at the same time. But one tree can be
trained by all: each rank sums the gradients of its own rows by feature and bin, the sums of all
ranks are added up, and every rank finds the same best split. Rows never travel.

Sources: Freund and Schapire 1997, "A decision-theoretic generalization of on-line learning and an
application to boosting" (boosting); Friedman 2001, "Greedy function approximation: a gradient
boosting machine", algorithm 1 (its shrinkage is `rate` here); Chen and Guestrin 2016, "XGBoost",
section 2.2 (Newton steps, the gain of a split); Ke et al. 2017, "LightGBM", section 2.1
(histograms).
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import numpy as np

from helpers.engine.collectives import all_reduce
from helpers.learning.soft import sigmoid

__all__ = ["Boosted", "Stump", "best_split", "bin_edges", "boost", "histograms", "to_bins"]

LEAST_CURVATURE = 1e-3
"""A leaf whose rows are all but certain already gets no value of its own (as in LightGBM)."""


class Stump(NamedTuple):
    """A tree of one question: is this feature's bin at most `bin`?

    Attributes
    ----------
    feature, bin : int
    low, high : float
        What is added to the score of rows at most, and above.
    """

    feature: int
    bin: int
    low: float
    high: float


class Boosted(NamedTuple):
    """What boosting gave: the first score of every row, and the stumps that change it."""

    start: float
    stumps: list

    def scores(self, bins):
        """The scores of rows, given by the bins of their features; shape (n,)."""
        z = np.full(len(bins), self.start)
        for stump in self.stumps:
            z += np.where(bins[:, stump.feature] <= stump.bin, stump.low, stump.high)
        return z

    def probabilities(self, bins):
        """The probability of class 1 of rows; shape (n,)."""
        return sigmoid(self.scores(bins))


def bin_edges(x, bins=32):
    """For each feature the values that divide its rows into bins, as equal as can be.

    All ranks must use the same: take them from rows that all know.

    Returns
    -------
    list of array
        At most ``bins - 1`` different values each.

    Examples
    --------
    >>> [edges.tolist() for edges in bin_edges(np.array([[0.0, 5.0], [1.0, 5.0], [2.0, 5.0]]), 3)]
    [[1.0, 2.0], []]
    """
    if not 2 <= operator.index(bins) <= 256:
        raise ValueError(f"{bins} bins: give 2 to 256.")
    shares = np.arange(1, bins) / bins
    found = []
    for column in np.asarray(x).T:
        # A value of the data, so that a feature of few values gets a bin for each of them.
        edges = np.unique(np.quantile(column, shares, method="higher"))
        found.append(edges[edges > column.min()])
    return found


def to_bins(x, edges):
    """The bin of every value: how many edges are at most as large. Shape (n, d), uint8.

    Examples
    --------
    >>> to_bins(np.array([[0.5], [1.0], [9.0]]), [np.array([1.0, 2.0])]).tolist()
    [[0], [1], [2]]
    """
    columns = [np.searchsorted(e, column, side="right") for e, column in zip(edges, x.T)]
    return np.column_stack(columns).astype(np.uint8)


def histograms(bins, values, number):
    """Sums of values by feature and bin.

    Parameters
    ----------
    bins : array of shape (n, d), uint8
    values : array of shape (k, n)
    number : int
        Of bins.

    Returns
    -------
    array of shape (k, d, number)

    Examples
    --------
    >>> histograms(np.array([[0], [1], [1]], np.uint8), np.array([[1.0, 2.0, 3.0]]), 2).tolist()
    [[[1.0, 5.0]]]
    """
    features = bins.T
    return np.array([[np.bincount(f, v, number) for f in features] for v in values])


def best_split(sums, smoothing=0.0):
    """The feature and the bin with the largest gain, and the Newton step of both sides.

    Parameters
    ----------
    sums : array of shape (2, d, bins)
        Sums of the gradients and of the curvatures.
    smoothing : float
        Added to the curvature of a leaf, lambda in XGBoost.

    Returns
    -------
    feature, bin : int
    low, high : float
        Newton steps of the rows whose bin is at most `bin`, and of the others.

    Raises
    ------
    ValueError
        If no split leaves rows on both sides.

    Examples
    --------
    >>> gradients, curvatures = [[2.0, -1.0, -1.0]], [[1.0, 1.0, 1.0]]
    >>> best_split(np.array([gradients, curvatures]))
    (0, 0, -2.0, 1.0)
    """
    below = np.cumsum(sums, axis=2)[:, :, :-1]
    above = sums.sum(axis=2, keepdims=True) - below
    (g_low, h_low), (g_high, h_high) = below, above
    possible = (h_low > LEAST_CURVATURE) & (h_high > LEAST_CURVATURE)
    if not possible.any():
        raise ValueError("no split leaves rows on both sides: take fewer stumps or more rows.")
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = g_low**2 / (h_low + smoothing) + g_high**2 / (h_high + smoothing)
    place = np.unravel_index(np.argmax(np.where(possible, gain, -np.inf)), gain.shape)
    low, high = (-g[place] / (h[place] + smoothing) for g, h in ((g_low, h_low), (g_high, h_high)))
    return int(place[0]), int(place[1]), float(low), float(high)


def boost(group, bins, y, stumps, rate=0.1, number=32, smoothing=0.0):
    """Boost stumps on the rows of all ranks; every rank gets the same model.

    Parameters
    ----------
    group : Group
    bins : array of shape (n, d), uint8
        This rank's rows, by `to_bins` with the edges that all use.
    y : array of shape (n,)
        Their labels, 0 or 1.
    stumps : int
        How many.
    rate : float
        How far each stump goes: shrinkage.
    number : int
        Of bins.
    smoothing : float
        As for `best_split`.

    Returns
    -------
    Boosted

    Raises
    ------
    ValueError
        If all labels of all ranks are alike, or no split is possible.

    Examples
    --------
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> x = np.random.default_rng(0).normal(size=(400, 3))
    >>> bins = to_bins(x, bin_edges(x, 8))
    >>> def program(rank):
    ...     mine = slice(rank.index, None, rank.size)
    ...     return boost(rank.world, bins[mine], (x[:, 1] > 0)[mine], 10, number=8)
    >>> one, = spmd.run(None, Mesh(data=1), program).results
    >>> two, _ = spmd.run(None, Mesh(data=2), program).results
    >>> one.stumps[0].feature, bool(np.allclose(one.scores(bins), two.scores(bins), rtol=1e-12))
    (1, True)
    """
    y = np.asarray(y, np.float64)
    ones, rows = all_reduce(group, np.array([y.sum(), len(y)]))
    if not 0 < ones < rows:
        raise ValueError("all labels are alike: there is nothing to learn.")
    model = Boosted(float(np.log(ones / (rows - ones))), [])
    z = np.full(len(y), model.start)
    for _ in range(operator.index(stumps)):
        p = sigmoid(z)
        sums = histograms(bins, np.array([p - y, p * (1 - p)]), number)
        feature, place, low, high = best_split(all_reduce(group, sums, out=sums), smoothing)
        stump = Stump(feature, place, rate * low, rate * high)
        model.stumps.append(stump)
        z += np.where(bins[:, feature] <= place, stump.low, stump.high)
    return model
