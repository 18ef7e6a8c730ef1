"""A GPT of one block whose perceptron is a mixture of experts: small enough to watch the router."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from helpers.nn.blocks import attend, attend_grad, block_shapes, named_views
from helpers.nn.ends import embed, embed_grad, head_loss, head_loss_grad
from helpers.nn.experts import Journey, expert_shapes, mixture, mixture_grad
from helpers.nn.gpt import DEVIATION
from helpers.nn.routing import Route
from helpers.nn.transformer import layer_norm, layer_norm_grad

OWN = ("up_w", "up_b", "down_w", "down_b")
"""The arrays of the experts; the first axis counts them."""


class Trained(NamedTuple):
    """What `ExpertGPT.loss_and_gradient` gives.

    Attributes
    ----------
    loss : float
        This rank's share of the cross-entropy.
    balance : float
        This rank's share of the balance loss; it is not part of ``loss``.
    gradient : array
        As long as this rank's parameters.
    route : Route
    """

    loss: float
    balance: float
    gradient: np.ndarray
    route: Route


@dataclass(frozen=True)
class ExpertGPT:
    """Embedding, one block with a mixture of experts, final norm, and the tied output.

    Parameters
    ----------
    vocabulary, context, width, heads : int
        As for `GPT`.
    experts : int
        Perceptrons, each of ``2 * width`` units.
    choices : {1, 2}
        Experts that a token goes to.
    factor : float
        See `helpers.nn.routing.capacity`.
    weight : float
        Of the balance loss within the whole loss.
    lines : int
        So many lines of a batch share the experts' capacity; they make a group.

    Examples
    --------
    >>> gpt = ExpertGPT(vocabulary=5, context=4, width=8, heads=2, experts=4, lines=2)
    >>> parameters, tokens = gpt.initialise(seed=0), np.array([[0, 1, 2], [2, 1, 0]])
    >>> found = gpt.loss_and_gradient(parameters, tokens, tokens)
    >>> found.gradient.shape == parameters.shape, round(found.loss, 2), int(found.route.load.sum())
    (True, 1.54, 6)
    """

    vocabulary: int
    context: int
    width: int
    heads: int
    experts: int
    choices: int = 1
    factor: float = 1.25
    weight: float = 0.01
    lines: int = 8

    def shapes(self, here=None):
        """The shapes of all arrays by name, with so many of the experts here (default: all)."""
        width = self.width
        names = ("norm_1_scale", "norm_1_shift", "qkv_w", "qkv_b", "out_w", "out_b")
        names += ("norm_2_scale", "norm_2_shift")
        block = block_shapes(width)
        ends = {"tokens": (self.vocabulary, width), "positions": (self.context, width)}
        ends |= {"scale": (width,), "shift": (width,)}
        mix = expert_shapes(width, self.experts, 2 * width, here)
        return ends | {name: block[name] for name in names} | mix

    def views(self, flat, here=None):
        """The arrays by name, as views into a flat array; those of the experts come last."""
        return named_views(flat, self.shapes(here))

    def initialise(self, seed, mine=slice(None), dtype=np.float64):
        """New parameters: all that is shared, and the experts of a slice.

        They depend on the seed, on an array's name and on an expert's number, not on who has it.
        """
        numbers = range(self.experts)[mine]
        shapes = self.shapes(len(numbers))
        flat = np.zeros(sum(map(math.prod, shapes.values())), dtype)
        for name, array in named_views(flat, shapes).items():
            key = [seed, zlib.crc32(name.encode())]
            if name.endswith("scale"):
                array[:] = 1
            elif name in OWN and array.ndim == 3:
                for place, number in enumerate(numbers):
                    array[place] = _normal([*key, number], array.shape[1:])
            elif array.ndim == 2 and name not in OWN:
                array[:] = _normal(key, array.shape)
        return flat

    def shared(self, here=None):
        """Where the parameters lie that all ranks have: a slice of the flat array."""
        shapes = self.shapes(here)
        return slice(0, sum(math.prod(shape) for n, shape in shapes.items() if n not in OWN))

    def loss_and_gradient(
        self, parameters, tokens, targets, divisor=None, groups=None, journey=Journey
    ):
        """The loss of a batch, and the gradient of it and of the balance loss.

        Parameters
        ----------
        parameters : array of one axis
            From `initialise`.
        tokens, targets, divisor
            As for `GPT.loss_and_gradient`; the batch is a multiple of ``lines``.
        groups : int, optional
            Groups of all ranks together. Default: those here.
        journey : callable
            As for `helpers.nn.experts.mixture`.

        Returns
        -------
        Trained

        Raises
        ------
        ValueError
            If the batch does not make whole groups.
        """
        p, width = self.views(parameters, self._here(parameters)), self.width
        if len(tokens) % self.lines:
            raise ValueError(f"{len(tokens)} lines do not make groups of {self.lines}.")
        x = embed(p, tokens)
        x, attended = attend(p, x, self.heads)
        normed, norm = layer_norm(x.reshape(-1, width), p["norm_2_scale"], p["norm_2_shift"])
        grouped = normed.reshape(len(tokens) // self.lines, -1, width)
        about = self.choices, self.factor, groups, journey
        y, even, mixed = mixture(p, grouped, *about)
        x += y.reshape(x.shape)
        loss, head = head_loss(p, p["tokens"], x, targets, divisor)

        gradient = np.zeros_like(parameters)
        g = self.views(gradient, self._here(parameters))
        dx = head_loss_grad(p, p["tokens"], head, g, g["tokens"])
        d_mixed = mixture_grad(p, mixed, dx.reshape(grouped.shape), g, self.weight)
        scales = g["norm_2_scale"], g["norm_2_shift"]
        _, _, d_normed = layer_norm_grad(
            d_mixed.reshape(-1, width), p["norm_2_scale"], norm, *scales
        )
        dx += d_normed.reshape(dx.shape)
        dx = attend_grad(p, attended, dx, g)
        embed_grad(tokens, dx, g, add=True)
        return Trained(loss, even, gradient, mixed.route)

    def _here(self, parameters):
        """How many of the experts these parameters have."""
        width = self.width
        shared = self.shared().stop
        return (parameters.size - shared) // (4 * width**2 + 3 * width)


def _normal(key, shape):
    return np.random.default_rng(key).normal(scale=DEVIATION, size=shape)
