"""Mixed precision: float16 to keep and to send, float32 to compute.

A number takes 2 bytes in place of 4. Float16 has two dangers: a small gradient becomes 0 (below
3e-8), and a small change of a parameter is lost (below about a 4,000th of it). Against the first
the loss is multiplied by a scale before its gradient is taken; against the second a master copy of
the parameters stays in float32 (Micikevicius et al. 2018, "Mixed precision training", sections 3.1
and 3.2).

Here float16 is how numbers are kept and sent. All arithmetic is in float32: NumPy has none of the
hardware's float16, its own is emulated and slow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from helpers.engine.collectives import all_gather, all_to_all
from helpers.nn.layers import check_dtypes

SMALLEST_SCALE = 2.0**-14
"""Below it a run that overflows in every step would go on for ever without a message."""


@dataclass
class LossScale:
    """The number that the loss is multiplied by: halved at once, doubled after patience.

    Attributes
    ----------
    scale : float
        Positive. A power of two changes no digit of a gradient.
    patience : int
        After so many good steps in a row the scale is doubled.
    good : int
        Good steps since the scale was changed.

    Raises
    ------
    ValueError
        The scale or the patience is not positive.

    Examples
    --------
    >>> scale = LossScale(1024.0, patience=2)
    >>> for finite in (False, True, True, True):
    ...     scale.update(finite)
    >>> scale
    LossScale(scale=1024.0, patience=2, good=1)
    """

    scale: float = 2.0**16
    patience: int = 2000
    good: int = 0

    def __post_init__(self):
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale is {self.scale}: give a positive number, such as 2.0**16.")
        if not self.patience >= 1:
            raise ValueError(f"patience is {self.patience}: give a number of steps from 1 up.")

    def update(self, finite: bool) -> None:
        """Note whether the gradient of a step was finite.

        Raises
        ------
        FloatingPointError
            It is not, at any scale: the loss itself has become infinite or NaN.
        """
        if not finite:
            self.scale, self.good = self.scale / 2, 0
            if self.scale < SMALLEST_SCALE:
                raise FloatingPointError(
                    "The gradient is not finite at any scale: training diverged, lower the rate."
                )
            return
        self.good += 1
        if self.good >= self.patience:
            self.scale, self.good = self.scale * 2, 0


class MixedPrecision:
    """One rank's parameters in mixed precision, and how a step changes them.

    Parameters
    ----------
    group : Group
        The ranks that train together, for example ``rank.data``.
    parameters : float32 array of shape (size,)
        Where training starts, the same on all ranks; copied.
    optimiser : SGD or Adam
        Its state is float32.
    scale : LossScale, optional
        The same on all ranks; it is changed. Default: a new one.

    Attributes
    ----------
    half : float16 array of shape (size,)
        The parameters to compute with.
    master : float32 array of shape (size,)
        The parameters to update.
    skipped : int
        How many steps were left out because the gradient had overflowed.

    Raises
    ------
    TypeError
        The parameters are not float32.

    Examples
    --------
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> from helpers.nn import SGD
    >>> def program(rank):
    ...     mixed = MixedPrecision(rank.data, np.ones(3, np.float32), SGD(0.5), LossScale(1024.0))
    ...     gradient = np.full(3, mixed.scale.scale / rank.size, np.float32)
    ...     return mixed.step(gradient), mixed.half.tolist()
    >>> spmd.run(None, Mesh(data=4), program).results[0]
    (True, [0.5, 0.5, 0.5])
    """

    def __init__(self, group, parameters, optimiser, scale: LossScale | None = None):
        check_dtypes(parameters=parameters)
        if parameters.dtype != np.float32:
            raise TypeError(f"parameters are {parameters.dtype}: the master copy is float32.")
        self.group, self.optimiser = group, optimiser
        self.master, self.half = parameters.copy(), to_half(parameters)
        self.state = optimiser.start(parameters.size, np.float32)
        self.scale = LossScale() if scale is None else scale
        self.skipped = 0

    def parameters(self) -> np.ndarray:
        """The parameters as they are kept, float16, made float32 to compute with."""
        return self.half.astype(np.float32)

    def divisor(self, rows) -> float:
        """What the loss is divided by, so that it is a mean over `rows`, times the scale."""
        return rows / self.scale.scale

    def step(self, gradient, rate: float | None = None) -> bool:
        """Add the ranks' gradients in float16, and take a step if the sum is finite.

        Every rank sees the same sum to the last bit. So an overflow on one rank is known to all,
        and all leave out the step.

        Parameters
        ----------
        gradient : float32 array of shape (size,)
            Times the scale. With `divisor` of the rows of all ranks, the sum is that of their mean.
        rate : float, optional
            Instead of the optimiser's own.

        Returns
        -------
        bool
            False when the step was left out.

        Raises
        ------
        FloatingPointError
            See `LossScale.update`.
        """
        total = all_reduce_half(self.group, to_half(gradient))
        finite = bool(np.isfinite(total).all())
        if finite:
            true = total.astype(np.float32)
            true /= np.float32(self.scale.scale)
            self.optimiser.step(self.master, true, self.state, rate=rate)
            self.half = to_half(self.master)
        else:
            self.skipped += 1
        self.scale.update(finite)
        return finite


def all_reduce_half(group, half) -> np.ndarray:
    """Add float16 arrays: sent as float16, added in float32, rounded once.

    Parameters
    ----------
    group : Group
    half : float16 array, one axis

    Returns
    -------
    float16 array
        The same on all ranks to the last bit; infinite where the sum is too large.

    Examples
    --------
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> program = lambda rank: all_reduce_half(rank.data, np.full(3, 2, np.float16)).tolist()
    >>> spmd.run(None, Mesh(data=2), program).results[0]
    [4.0, 4.0, 4.0]
    """
    if half.dtype != np.float16 or half.ndim != 1:
        raise TypeError(f"half is {half.dtype} {list(half.shape)}: give a flat float16 array.")
    first, *rest = all_to_all(group, np.array_split(half, group.size))
    total = first.astype(np.float32)
    for part in rest:
        with np.errstate(invalid="ignore"):  # inf - inf
            total += part
    return all_gather(group, to_half(total))


def to_half(array) -> np.ndarray:
    """A float16 copy. Too large a number becomes infinite, silently: `LossScale` deals with it.

    Examples
    --------
    >>> to_half(np.array([1e-8, 0.1, 70000.0]))
    array([0. , 0.1, inf], dtype=float16)
    """
    with np.errstate(over="ignore"):
        return array.astype(np.float16)
