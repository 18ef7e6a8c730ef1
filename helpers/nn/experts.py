"""A mixture of experts: many perceptrons, of which each token goes through one or two.

So a model can have many parameters, and few of them work for a token (Shazeer et al. 2017,
"Outrageously large neural networks: the sparsely-gated mixture-of-experts layer"). Where a token
goes is decided in `helpers.nn.routing`. A token whose experts were full gets 0, and only what goes
around the mixture, as in ``x + mixture(x)``, carries it on.

Experts may lie on other ranks. All that a mixture then needs from outside is a `Journey`, which
carries tokens there and back.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from helpers.nn.layers import check_dtypes, linear, linear_grad_input, linear_grad_weights
from helpers.nn.routing import Route, balance, combine, dispatch, gates_of, route, router_grad
from helpers.nn.transformer import gelu, gelu_grad


class Journey:
    """How tokens come to their experts and back where all experts are here: they stay.

    Expert parallelism puts another object in its place, see `helpers.parallel.experts`.

    Attributes
    ----------
    counts : integer array
        For each expert that is here, how many rows `there` gives; they are in the order of experts.
    """

    def __init__(self, counts):
        self.counts = counts

    def there(self, rows):
        """Rows, sorted by expert, to where their experts are."""
        return rows

    def back(self, rows):
        """Rows, as `there` gave them, to where they came from."""
        return rows


class MixtureKept(NamedTuple):
    """What `mixture_grad` needs of the forward pass."""

    x: np.ndarray
    route: Route
    journey: Journey
    rows: np.ndarray
    slope: np.ndarray
    active: np.ndarray
    answers: np.ndarray
    divisor: int | None


def expert_shapes(width, experts, columns=None, here=None):
    """The shape of each array of a mixture, by name.

    Parameters
    ----------
    width : int
        Numbers of a token.
    experts : int
        All of them, wherever they are.
    columns : int, optional
        Units of one expert. Default: ``4 * width``.
    here : int, optional
        How many of the experts are here. Default: all.

    Returns
    -------
    dict of str to tuple

    Examples
    --------
    >>> expert_shapes(width=8, experts=4, here=2)["up_w"]
    (2, 8, 32)
    """
    columns, here = columns or 4 * width, experts if here is None else here
    return {
        "router": (width, experts),
        "up_w": (here, width, columns),
        "up_b": (here, columns),
        "down_w": (here, columns, width),
        "down_b": (here, width),
    }


def mixture(parameters, x, choices=1, factor=1.25, divisor=None, journey=Journey):
    """Send each token through the experts that the router chooses.

    Parameters
    ----------
    parameters : dict
        Arrays of the names and shapes that `expert_shapes` tells.
    x : array of shape (groups, tokens, width)
    choices, factor
        As for `route`.
    divisor : int, optional
        As for `balance`.
    journey : callable
        Given the counts of a `Route`, makes a `Journey`.

    Returns
    -------
    y : array of the shape of ``x``
        For each token the answers of its experts, times the gates; 0 where all were full.
    loss : float
        See `balance`.
    kept : MixtureKept

    Raises
    ------
    ValueError, TypeError
        As for `route`.

    Examples
    --------
    >>> random = np.random.default_rng(0)
    >>> shapes = expert_shapes(width=4, experts=3)
    >>> parameters = {name: random.normal(size=shape) for name, shape in shapes.items()}
    >>> y, loss, kept = mixture(parameters, random.normal(size=(2, 5, 4)), choices=2)
    >>> gradient = {name: np.empty(shape) for name, shape in shapes.items()}
    >>> mixture_grad(parameters, kept, np.ones((2, 5, 4)), gradient).shape
    (2, 5, 4)
    """
    found = route(x, parameters["router"], choices, factor)
    trip = journey(found.counts)
    rows = trip.there(dispatch(x, found))
    slope = np.empty((len(rows), parameters["up_w"].shape[2]), x.dtype)
    active, there = np.empty_like(slope), np.empty_like(rows)
    for expert, part in _parts(trip.counts):
        linear(rows[part], parameters["up_w"][expert], parameters["up_b"][expert], slope[part])
        gelu(slope[part], out=active[part], slope=slope[part])
        linear(
            active[part], parameters["down_w"][expert], parameters["down_b"][expert], there[part]
        )
    answers = trip.back(there)
    y = combine(answers * gates_of(found), found, x.shape)
    kept = MixtureKept(x, found, trip, rows, slope, active, answers, divisor)
    return y, balance(found, divisor), kept


def mixture_grad(parameters, kept, dy, gradient_out, weight=0.0):
    """The gradient of `mixture`, and of ``weight`` times its balance loss.

    Parameters
    ----------
    parameters : dict
        What `mixture` was given.
    kept : MixtureKept
        What `mixture` gave.
    dy : array of shape (groups, tokens, width)
        Gradient of the loss by the output.
    gradient_out : dict
        Arrays of the names and shapes of the parameters; they are written.
    weight : float
        Of the balance loss within the whole loss (0.01 in both papers).

    Returns
    -------
    dx : array of the shape of ``dy``

    Raises
    ------
    ValueError, TypeError
        If shapes do not fit or dtypes differ.

    Examples
    --------
    See `mixture`.
    """
    check_dtypes(dy=dy, x=kept.x)
    if dy.shape != kept.x.shape:
        raise ValueError(f"dy has shape {dy.shape}: the mixture was given {kept.x.shape}.")
    found, trip = kept.route, kept.journey
    dy_rows = dispatch(dy, found)
    d_gates = np.zeros(found.experts.size, dy.dtype)
    d_gates[found.order] = np.einsum("ij,ij->i", dy_rows, kept.answers)
    dy_rows *= gates_of(found)
    d_there = trip.there(dy_rows)
    d_rows = np.empty_like(d_there)
    for expert, part in _parts(trip.counts):
        _expert_grad(parameters, kept, d_there[part], gradient_out, expert, part, d_rows[part])
    dx = combine(trip.back(d_rows), found, dy.shape)
    d_scores = router_grad(found, d_gates.reshape(found.experts.shape), weight, kept.divisor)
    width = dy.shape[2]
    rows, d_scores = kept.x.reshape(-1, width), d_scores.reshape(-1, d_scores.shape[2])
    np.matmul(rows.T, d_scores, out=gradient_out["router"])
    dx += (d_scores @ parameters["router"].T).reshape(dx.shape)
    return dx


def _expert_grad(parameters, kept, dy, gradient_out, expert, part, dx):
    """The gradient of one expert's perceptron by its parameters, and into ``dx`` by its rows."""
    down, up = gradient_out["down_w"][expert], gradient_out["up_w"][expert]
    linear_grad_weights(dy, kept.active[part], down, gradient_out["down_b"][expert])
    d_raised = linear_grad_input(dy, parameters["down_w"][expert])
    gelu_grad(d_raised, kept.slope[part], out=d_raised)
    linear_grad_weights(d_raised, kept.rows[part], up, gradient_out["up_b"][expert])
    linear_grad_input(d_raised, parameters["up_w"][expert], dx)


def _parts(counts):
    """The place of each expert's rows."""
    stops = np.cumsum(counts).tolist()
    return [(expert, slice(a, b)) for expert, (a, b) in enumerate(zip([0, *stops], stops))]
