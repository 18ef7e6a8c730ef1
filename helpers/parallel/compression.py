"""Gradient compression: fewer bytes travel, and what was left out is not forgotten.

A compressor turns a gradient into a payload, a tuple of arrays that is what travels, and a payload
back into a gradient that is near the first one. `mean_gradient` exchanges payloads among ranks.
`ErrorFeedback` adds what a step left out to the next step's gradient (Karimireddy et al. 2019,
"Error feedback fixes SignSGD and other gradient compression schemes", algorithm 2).

Bytes are those of the arrays that a rank hands to an exchange. A compressed sum is as a rule not a
sum of compressed parts: payloads are gathered, so that every rank receives those of all others.
Only PowerSGD (`helpers.parallel.power_sgd`) can add what travels, as an uncompressed gradient can.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

import numpy as np

from helpers.engine.collectives import all_gather, all_reduce
from helpers.nn.layers import check_dtypes


class Exchanged(NamedTuple):
    """What an exchange of compressed gradients gave.

    Attributes
    ----------
    mean : array of shape (size,)
        The mean over the ranks of what they sent; the same to the last bit on all of them.
    sent : array of shape (size,)
        What this rank sent, decompressed.
    nbytes : int
        Bytes of the arrays that this rank handed to the exchange.
    """

    mean: np.ndarray
    sent: np.ndarray
    nbytes: int


@dataclass(frozen=True)
class Plain:
    """No compression: the gradient itself is summed.

    Examples
    --------
    >>> payload = Plain().compress(np.array([1.0, 2.0]))
    >>> Plain().decompress(payload, 2)
    array([1., 2.])
    """

    def compress(self, gradient):
        """The gradient, as a payload of one array."""
        return (checked(gradient),)

    def decompress(self, payload, size):
        """The gradient again."""
        return payload[0]

    def mean_gradient(self, group, gradient) -> Exchanged:
        """As the function `mean_gradient`."""
        (gradient,) = self.compress(gradient)
        return Exchanged(all_reduce(group, gradient) / group.size, gradient, gradient.nbytes)


class _Gathered:
    """Compressors whose payloads are gathered: every rank decompresses those of all."""

    def mean_gradient(self, group, gradient) -> Exchanged:
        """As the function `mean_gradient`."""
        payload = self.compress(gradient)
        mine = np.concatenate([array.view(np.uint8) for array in payload])
        total = np.zeros_like(gradient)
        for theirs in all_gather(group, mine).reshape(group.size, len(mine)):
            total += self.decompress(_unpacked(theirs, payload), gradient.size)
        sent = self.decompress(payload, gradient.size)
        return Exchanged(total / group.size, sent, len(mine))


@dataclass(frozen=True)
class TopK(_Gathered):
    """The k numbers that are largest in size, with their places (Aji and Heafield 2017).

    "Sparse communication for distributed gradient descent", EMNLP. A place takes four bytes: with
    float32 a number that travels costs twice its own size.

    Parameters
    ----------
    k : int
        How many numbers travel: 1 or more.

    Examples
    --------
    >>> places, values = TopK(2).compress(np.array([1.0, -5.0, 0.5, 3.0]))
    >>> places.tolist(), values.tolist()
    ([1, 3], [-5.0, 3.0])
    >>> TopK(2).decompress((places, values), size=4)
    array([ 0., -5.,  0.,  3.])
    """

    k: int

    def __post_init__(self):
        check_count("k", self.k, "numbers that travel")

    def compress(self, gradient):
        """``(places, values)``: int32 in rising order, and the dtype of the gradient."""
        gradient = checked(gradient)
        if self.k > gradient.size:
            raise ValueError(
                f"k is {self.k}, but the gradient has {gradient.size} numbers: choose a smaller k."
            )
        places = np.argpartition(np.abs(gradient), gradient.size - self.k)[-self.k :]
        places = np.sort(places).astype(np.int32)
        return places, gradient[places]

    def decompress(self, payload, size):
        """The numbers at their places, 0 elsewhere."""
        places, values = payload
        gradient = np.zeros(size, values.dtype)
        gradient[places] = values
        return gradient


@dataclass(frozen=True)
class Sign(_Gathered):
    """One bit a number, and one scale for all: the mean size of the numbers.

    Karimireddy et al. 2019, section 5 ("scaled sign"). The sign of 0 counts as positive.

    Examples
    --------
    >>> bits, scale = Sign().compress(np.array([1.0, -5.0, 0.0, 2.0]))
    >>> bits.nbytes, Sign().decompress((bits, scale), size=4).tolist()
    (1, [2.0, -2.0, 2.0, 2.0])
    """

    def compress(self, gradient):
        """``(bits, scale)``: uint8 of shape (ceil(size / 8),), and one number."""
        gradient = checked(gradient)
        scale = np.mean(np.abs(gradient), keepdims=True, dtype=gradient.dtype)
        return np.packbits(gradient >= 0), scale

    def decompress(self, payload, size):
        """The scale with each number's sign."""
        bits, scale = payload
        return np.where(np.unpackbits(bits, count=size), scale, -scale)


@dataclass(frozen=True)
class EightBit(_Gathered):
    """Whole numbers from -127 to 127, and a scale for each block of numbers.

    Rounded to the nearest (Dettmers 2016, "8-bit approximations for parallelism in deep learning",
    has finer codes). The error is at most half a step: 1/254 of the largest number of the block.

    Parameters
    ----------
    block : int
        How many numbers share a scale: 1 or more.

    Examples
    --------
    >>> codes, scales = EightBit().compress(np.array([1.27, -0.5, 0.004], np.float32))
    >>> codes.tolist(), scales.round(4).tolist()
    ([127, -50, 0], [0.009999999776482582])
    """

    block: int = 256

    def __post_init__(self):
        check_count("block", self.block, "numbers that share a scale")

    def compress(self, gradient):
        """``(codes, scales)``: int8 of shape (size,), and one number a block."""
        gradient = checked(gradient)
        starts = np.arange(0, gradient.size, self.block)
        scales = np.maximum.reduceat(np.abs(gradient), starts) / gradient.dtype.type(127)
        steps = np.where(scales > 0, scales, 1)  # a block of zeros has no scale
        codes = np.rint(gradient / self._spread(steps, gradient.size)).astype(np.int8)
        return codes, scales

    def decompress(self, payload, size):
        """Codes times scales."""
        codes, scales = payload
        return codes * self._spread(scales, size)

    def _spread(self, scales, size):
        return np.repeat(scales, self.block)[:size]


class ErrorFeedback:
    """A compressor with a memory: what one step left out is added to the next gradient.

    Sent so far, plus the residual, is always the sum of all gradients: nothing is lost, it only
    comes later (Karimireddy et al. 2019, algorithm 2; the rate is left outside, so the residual is
    in units of gradients).

    Parameters
    ----------
    compressor
        One of this module's.

    Attributes
    ----------
    residual : array or None
        What was not sent yet. None before the first step.

    Examples
    --------
    >>> feedback = ErrorFeedback(TopK(1))
    >>> [feedback.decompress(feedback.compress(np.array([3.0, 2.0])), 2).tolist() for _ in "123"]
    [[3.0, 0.0], [0.0, 4.0], [6.0, 0.0]]
    >>> feedback.residual
    array([0., 2.])
    """

    def __init__(self, compressor):
        self.compressor, self.residual = compressor, None

    def compress(self, gradient):
        """The payload of the gradient and the residual; the new residual is kept."""
        corrected = self._corrected(gradient)
        payload = self.compressor.compress(corrected)
        self.residual = corrected - self.decompress(payload, corrected.size)
        return payload

    def decompress(self, payload, size):
        """As the compressor does."""
        return self.compressor.decompress(payload, size)

    def mean_gradient(self, group, gradient) -> Exchanged:
        """As the function `mean_gradient`; the new residual is kept."""
        corrected = self._corrected(gradient)
        exchanged = self.compressor.mean_gradient(group, corrected)
        self.residual = corrected - exchanged.sent
        return exchanged

    def _corrected(self, gradient):
        gradient = checked(gradient)
        if self.residual is None:
            return gradient
        if self.residual.shape != gradient.shape:
            raise ValueError(
                f"the gradient has {gradient.size} numbers, the residual {self.residual.size}: "
                "make a new ErrorFeedback for another network."
            )
        return gradient + self.residual


def mean_gradient(group, compressor, gradient) -> Exchanged:
    """The mean over the ranks of their compressed gradients.

    Parameters
    ----------
    group : helpers.engine.groups.Group
        For example ``rank.data``. All members give the same kind of compressor.
    compressor
        `Plain`, `TopK`, `Sign`, `EightBit`, `PowerSGD`, or one of them in `ErrorFeedback`.
    gradient : float array of shape (size,)
        This rank's own, not changed.

    Returns
    -------
    Exchanged

    Raises
    ------
    ValueError, TypeError
        The gradient is not a flat array of finite floats, or does not fit the compressor.

    Examples
    --------
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> gradients = [np.array([4.0, 1.0]), np.array([0.0, 2.0])]
    >>> def program(rank, gradient):
    ...     return mean_gradient(rank.data, TopK(1), gradient)
    >>> run = spmd.run(None, Mesh(data=2), program, each=gradients)
    >>> [exchanged.mean.tolist() for exchanged in run.results], run.results[0].nbytes
    ([[2.0, 1.0], [2.0, 1.0]], 12)
    """
    return compressor.mean_gradient(group, gradient)


def checked(gradient):
    """The gradient, if it can be compressed."""
    check_dtypes(gradient=gradient)
    if gradient.ndim != 1 or gradient.size == 0:
        raise ValueError(f"the gradient has shape {gradient.shape}: give one axis with numbers.")
    if not np.isfinite(gradient).all():
        raise ValueError("the gradient is not finite: training has diverged, lower the rate.")
    return gradient


def check_count(name, count, what):
    if isinstance(count, bool) or not isinstance(count, Integral):
        raise TypeError(f"{name} is {count!r}: give the number of {what} as a whole number.")
    if count < 1:
        raise ValueError(f"{name} is {count}: give the number of {what}, 1 or more.")


def _unpacked(buffer, like):
    """The arrays of a payload from their bytes, with the dtypes and shapes of another payload."""
    arrays, start = [], 0
    for array in like:
        part = buffer[start : start + array.nbytes]
        # A copy lies where its dtype may lie.
        arrays.append(part.copy().view(array.dtype).reshape(array.shape))
        start += array.nbytes
    return tuple(arrays)
