"""Where a mixture of experts sends its tokens: the router, capacity, and the loss that balances.

A router scores the experts for each token, and the token goes to the best one (Fedus et al. 2021,
"Switch Transformers", section 2.1) or the best two (Lepikhin et al. 2020, "GShard", section 2.2).
Each expert takes a limited number of tokens of a group: its capacity. What comes beyond is dropped.
A second loss keeps the experts evenly busy.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from helpers.nn.layers import check_dtypes


class Route(NamedTuple):
    """Which tokens go to which experts.

    An assignment is a token with one of its experts. Assignments are numbered by group, then by
    choice (all first choices of a group before its second ones), then by token.

    Attributes
    ----------
    probabilities : array of shape (groups, tokens, experts)
        Softmax of the router's scores.
    experts : integer array of shape (groups, choices, tokens)
        The chosen experts.
    gates : array of shape (groups, choices, tokens)
        What the expert's answer is multiplied by; 0 where the token was dropped.
    order : integer array of shape (assignments that were kept,)
        Their numbers, by expert.
    counts : integer array of shape (experts,)
        How many were kept, for each expert.
    load : integer array of shape (groups, experts)
        How many were asked for, dropped ones included.
    """

    probabilities: np.ndarray
    experts: np.ndarray
    gates: np.ndarray
    order: np.ndarray
    counts: np.ndarray
    load: np.ndarray

    @property
    def dropped(self):
        """How many assignments found their expert full."""
        return self.experts.size - len(self.order)


def capacity(tokens, experts, choices=1, factor=1.25):
    """How many tokens of a group an expert takes: ``factor`` times an even share, rounded up.

    Fedus et al. 2021, equation 3.

    Parameters
    ----------
    tokens : int
        Of one group.
    experts : int
    choices : int
        Experts that a token goes to.
    factor : float
        Positive. With 1, all experts are full if all are asked for equally often; with infinity
        nothing is dropped.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        If the factor is not positive.

    Examples
    --------
    >>> capacity(tokens=32, experts=4), capacity(32, 4, choices=2, factor=1.0)
    (10, 16)
    """
    if not factor > 0:
        raise ValueError(f"the capacity factor is {factor}: give a positive number, such as 1.25.")
    if math.isinf(factor):
        return tokens * choices
    return min(tokens * choices, math.ceil(factor * tokens * choices / experts))


def route(x, router, choices=1, factor=1.25):
    """Choose the experts of each token.

    With one choice the gate is the probability of the expert (Switch); with two, the two
    probabilities divided by their sum (GShard), so that the router learns in both cases.

    Parameters
    ----------
    x : array of shape (groups, tokens, width)
        Each group fills its own share of the experts' capacity: what becomes of a token does not
        depend on other groups, and so not on how groups are dealt out to ranks.
    router : array of shape (width, experts)
    choices : {1, 2}
        Experts that a token goes to.
    factor : float
        As for `capacity`.

    Returns
    -------
    Route

    Raises
    ------
    ValueError, TypeError
        If shapes do not fit, dtypes differ, or there are other than one or two choices.

    Examples
    --------
    >>> x = np.array([[[1.0], [1.0], [-1.0]]])
    >>> found = route(x, np.array([[2.0, -2.0]]), factor=1.0)
    >>> found.experts.tolist(), found.counts.tolist(), found.dropped
    ([[[0, 0, 1]]], [2, 1], 0)
    """
    _check_route(x, router, choices)
    tokens, number = x.shape[1], router.shape[1]
    scores = x @ router
    scores -= scores.max(axis=2, keepdims=True)
    probabilities = np.exp(scores, out=scores)
    probabilities /= probabilities.sum(axis=2, keepdims=True)
    # Stable: of equal probabilities the lower number wins, on every machine.
    best = np.argsort(-probabilities, axis=2, kind="stable")[..., :choices]
    experts = np.ascontiguousarray(best.swapaxes(1, 2))
    gates = np.take_along_axis(probabilities, best, axis=2).swapaxes(1, 2).copy()
    if choices > 1:
        gates /= gates.sum(axis=1, keepdims=True)
    kept, load = _places(experts, number, capacity(tokens, number, choices, factor))
    gates *= kept
    asked = np.where(kept, experts, number).ravel()
    order = np.argsort(asked, kind="stable")[: np.count_nonzero(kept)]
    counts = np.bincount(asked, minlength=number + 1)[:number]
    return Route(probabilities, experts, gates, order, counts, load)


def balance(found, divisor=None):
    """The loss that keeps experts evenly busy: 1 where they are, more where they are not.

    For a group: ``experts * sum(share * probability)``, where ``share`` is the part of the tokens
    whose first choice an expert is, and ``probability`` its mean probability (Fedus et al. 2021,
    equation 4); then the mean over groups.

    Parameters
    ----------
    found : Route
    divisor : int, optional
        What the sum over groups is divided by. Default: the groups that are here, for their mean. A
        rank with some of the groups gives the number of all ranks' groups instead.

    Returns
    -------
    float

    Examples
    --------
    >>> x = np.array([[[1.0], [1.0], [1.0], [1.0]]])
    >>> round(balance(route(x, np.array([[5.0, -5.0]]))), 3)
    2.0
    """
    shares = _shares(found)
    means = found.probabilities.mean(axis=1)
    return float(shares.shape[1] * np.sum(shares * means) / (divisor or len(shares)))


def router_grad(found, d_gates, weight, divisor=None):
    """The gradient by the router's scores.

    Parameters
    ----------
    found : Route
    d_gates : array of shape (groups, choices, tokens)
        Gradient of the loss by the gates.
    weight : float
        Of the balance loss within the whole loss.
    divisor : int, optional
        As for `balance`.

    Returns
    -------
    array of shape (groups, tokens, experts)
    """
    probabilities, experts = found.probabilities, found.experts
    tokens, number = probabilities.shape[1:]
    shares = _shares(found).astype(probabilities.dtype)
    factor = float(weight) * number / ((divisor or len(shares)) * tokens)
    d_probabilities = np.repeat(factor * shares[:, np.newaxis], tokens, axis=1)
    # A gate that was set to 0 because the expert was full passes no gradient on.
    d_gates = np.where(found.gates > 0, d_gates, 0)
    if experts.shape[1] > 1:
        chosen = np.take_along_axis(probabilities, experts.swapaxes(1, 2), axis=2).swapaxes(1, 2)
        total = chosen.sum(axis=1, keepdims=True)
        d_gates -= np.sum(d_gates * chosen / total, axis=1, keepdims=True)
        d_gates /= total
    for choice in range(experts.shape[1]):
        where = experts[:, choice, :, np.newaxis]
        there = np.take_along_axis(d_probabilities, where, axis=2)
        there += d_gates[:, choice, :, np.newaxis]
        np.put_along_axis(d_probabilities, where, there, axis=2)
    mean = np.sum(d_probabilities * probabilities, axis=2, keepdims=True)
    d_probabilities -= mean
    d_probabilities *= probabilities
    return d_probabilities


def tokens_of(found):
    """The token of each assignment that was kept, by expert; tokens are counted over all groups."""
    _, choices, tokens = found.experts.shape
    return found.order // (choices * tokens) * tokens + found.order % tokens


def gates_of(found):
    """The gate of each assignment that was kept, by expert; shape (n, 1)."""
    return found.gates.reshape(-1, 1)[found.order]


def dispatch(x, found):
    """The rows of the tokens that were kept, sorted by expert; one for each assignment."""
    return x.reshape(-1, x.shape[2])[tokens_of(found)]


def combine(rows, found, shape):
    """Rows, one for each assignment that was kept, added up for each token."""
    groups, choices, tokens = found.experts.shape
    every = np.zeros((groups * choices * tokens, shape[2]), rows.dtype)
    every[found.order] = rows
    return every.reshape(groups, choices, tokens, shape[2]).sum(axis=1)


# ---------------------------------------------------------------- small parts


def _places(experts, number, most):
    """Which assignments find room, and how many of each group ask for each expert."""
    groups = len(experts)
    asked = experts.reshape(groups, -1)
    ones = asked[..., np.newaxis] == np.arange(number)
    before = np.cumsum(ones, axis=1) - 1  # how many of the group came to the expert earlier
    place = np.take_along_axis(before, asked[..., np.newaxis], axis=2)[..., 0]
    return (place < most).reshape(experts.shape), ones.sum(axis=1)


def _shares(found):
    """For each group and expert, the part of the tokens whose first choice it is."""
    number = found.probabilities.shape[2]
    first = found.experts[:, 0, :, np.newaxis] == np.arange(number)
    return first.mean(axis=1)


def _check_route(x, router, choices):
    check_dtypes(x=x, router=router)
    if x.ndim != 3 or router.ndim != 2 or x.shape[2] != router.shape[0]:
        raise ValueError(
            f"x has shape {x.shape} and the router {router.shape}: give (groups, tokens, width) "
            "and (width, experts)."
        )
    if choices not in (1, 2) or choices > router.shape[1]:
        most = min(2, router.shape[1])
        raise ValueError(f"choices is {choices}: a token goes to 1 expert, or at most {most} here.")
