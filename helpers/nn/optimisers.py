"""Optimisers: how a gradient changes parameters, number by number, in place.

An optimiser is a frozen description; what it remembers lies in a state that `start` makes. All is
elementwise on flat arrays. Whoever owns a slice of the parameters can update it alone, and gets the
same bits as an update of the whole (ZeRO: Rajbhandari et al. 2020, section 5).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from helpers.nn.layers import check_dtypes

# Numbers updated at a time: a block and its temporaries stay in the cache of a core.
BLOCK = 16_384


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent, with momentum if asked.

    ``g = gradient + weight_decay * parameters``, ``velocity = momentum * velocity + g``,
    ``parameters -= rate * velocity`` (Sutskever et al. 2013, "On the importance of initialization
    and momentum in deep learning", equations 1 and 2, with the rate outside the velocity, as
    PyTorch has it).

    Parameters
    ----------
    rate : float
        Learning rate, positive or 0.
    momentum : float
        From 0 up to, but not including, 1. With 0 nothing is remembered.
    weight_decay : float
        Added to the gradient, times the parameters. 0 or more.

    Raises
    ------
    ValueError
        If a number is out of its range.

    Examples
    --------
    >>> import numpy as np
    >>> sgd, parameters = SGD(rate=0.5), np.array([1.0, 2.0])
    >>> state = sgd.start(size=2)
    >>> sgd.step(parameters, np.array([1.0, -1.0]), state)
    >>> parameters
    array([0.5, 2.5])
    """

    rate: float
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self):
        _check_at_least_0(rate=self.rate, weight_decay=self.weight_decay)
        _check_below_1(momentum=self.momentum)

    def start(self, size, dtype=np.float64):
        """The state before the first step: ``steps`` and, with momentum, ``velocity``."""
        state = {"steps": 0}
        if self.momentum:
            state["velocity"] = np.zeros(size, dtype)
        return state

    def step(self, parameters, gradient, state, rate=None):
        """Update parameters and state in place; the gradient is left as it is.

        Parameters
        ----------
        parameters, gradient : array of shape (size,)
            Of the same dtype as the state. Slices of larger arrays will do.
        state : dict
            From `start`.
        rate : float, optional
            Instead of the optimiser's own, as schedules need it.

        Raises
        ------
        ValueError
            If sizes differ, the state is not this optimiser's, or the rate is negative.
        TypeError
            If dtypes differ.
        """
        rate = _checked_rate(rate, self.rate)
        momentum, decay = float(self.momentum), float(self.weight_decay)
        moments = _moments(state, ["velocity"] if momentum else [], parameters, gradient)
        state["steps"] += 1
        for p, g, *velocity in _blocks(parameters, gradient, *moments):
            if decay:
                g = g + decay * p
            if velocity:
                (v,) = velocity
                v *= momentum
                v += g
                g = v
            p -= rate * g


@dataclass(frozen=True)
class Adam:
    """Adam, with decoupled weight decay if asked (then also called AdamW).

    ``mean`` and ``square`` are running means of the gradient and of its square. With
    ``m = mean / (1 - beta_1**steps)`` and ``s = square / (1 - beta_2**steps)``, the step is
    ``parameters -= rate * (m / (sqrt(s) + epsilon) + weight_decay * parameters)`` (Kingma and Ba
    2015, "Adam", algorithm 1; Loshchilov and Hutter 2019, "Decoupled Weight Decay
    Regularization", algorithm 2).

    Parameters
    ----------
    rate : float
        Learning rate, positive or 0.
    betas : (float, float)
        Weights of the old in the two running means, from 0 up to, but not including, 1.
    epsilon : float
        Keeps the division away from 0. 0 or more.
    weight_decay : float
        What part of a parameter is taken off in a step, divided by the rate. 0 or more.

    Raises
    ------
    ValueError
        If a number is out of its range.

    Examples
    --------
    >>> import numpy as np
    >>> adam, parameters = Adam(rate=0.1), np.array([1.0, 2.0])
    >>> state = adam.start(size=2)
    >>> adam.step(parameters, np.array([5.0, -0.01]), state)
    >>> parameters.round(3)
    array([0.9, 2.1])
    """

    rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self):
        _check_at_least_0(rate=self.rate, epsilon=self.epsilon, weight_decay=self.weight_decay)
        if len(self.betas) != 2:
            raise ValueError(f"betas {self.betas}: give two numbers.")
        _check_below_1(beta_1=self.betas[0], beta_2=self.betas[1])

    def start(self, size, dtype=np.float64):
        """The state before the first step: ``steps``, ``mean`` and ``square``."""
        return {"steps": 0, "mean": np.zeros(size, dtype), "square": np.zeros(size, dtype)}

    def step(self, parameters, gradient, state, rate=None):
        """Update parameters and state in place; the gradient is left as it is.

        Parameters and errors as for `SGD.step`.
        """
        rate = _checked_rate(rate, self.rate)
        moments = _moments(state, ["mean", "square"], parameters, gradient)
        state["steps"] += 1
        beta_1, beta_2, epsilon, decay = map(float, (*self.betas, self.epsilon, self.weight_decay))
        step_size = rate / (1 - beta_1 ** state["steps"])
        root = math.sqrt(1 - beta_2 ** state["steps"])
        for p, g, mean, square in _blocks(parameters, gradient, *moments):
            mean *= beta_1
            mean += (1 - beta_1) * g
            square *= beta_2
            change = np.square(g)
            square += np.multiply(change, 1 - beta_2, out=change)
            # From here on, one temporary is used again and again.
            np.sqrt(square, out=change)
            change /= root
            change += epsilon
            np.divide(mean, change, out=change)
            change *= step_size
            if decay:
                p *= 1 - rate * decay
            p -= change


def state_bytes(state):
    """Bytes of all arrays in the state of an optimiser.

    Examples
    --------
    >>> state_bytes(Adam(rate=0.1).start(size=1000))
    16000
    """
    return sum(value.nbytes for value in state.values() if isinstance(value, np.ndarray))


def clip_by_global_norm(gradient, largest, norm=None):
    """Scale a gradient down in place, if it is longer than allowed.

    Pascanu et al. 2013, "On the difficulty of training recurrent neural networks", algorithm 1.

    Parameters
    ----------
    gradient : float array
        All of the gradient, or the part of it that this rank holds.
    largest : float
        The length that is allowed, positive.
    norm : float, optional
        The length (Euclidean norm) of the whole gradient, for one that is spread over ranks.
        Default: that of ``gradient``.

    Returns
    -------
    float
        The length before.

    Raises
    ------
    ValueError
        If the limit is not positive, or the length is not a number or not finite.
    TypeError
        If the gradient is no floating-point array.

    Examples
    --------
    >>> import numpy as np
    >>> gradient = np.array([3.0, 4.0])
    >>> clip_by_global_norm(gradient, largest=1.0)
    5.0
    >>> gradient
    array([0.6, 0.8])
    """
    check_dtypes(gradient=gradient)
    if not largest > 0:
        raise ValueError(f"largest is {largest}: give a positive length.")
    norm = float(np.linalg.norm(gradient) if norm is None else norm)
    if not (math.isfinite(norm) and norm >= 0):
        raise ValueError(f"the gradient's norm is {norm}: training has diverged, lower the rate.")
    if norm > largest:
        gradient *= float(largest) / norm
    return norm


def _blocks(*arrays):
    """Views of the same part of each array, one part after the other."""
    for start in range(0, len(arrays[0]), BLOCK):
        yield [array[start : start + BLOCK] for array in arrays]


def _moments(state, names, parameters, gradient):
    """The named arrays of a state, once all arrays are known to fit together."""
    if set(state) != {"steps", *names}:
        raise ValueError(
            f"the state holds {sorted(state)}: take one from start of the same optimiser."
        )
    moments = {name: state[name] for name in names}
    arrays = {"parameters": parameters, "gradient": gradient, **moments}
    check_dtypes(**arrays)
    if parameters.ndim != 1 or len({array.shape for array in arrays.values()}) > 1:
        found = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(f"shapes are {found}: all need one axis of the same length.")
    return list(moments.values())


def _checked_rate(rate, default):
    """The rate as a Python float, like all other numbers that meet the arrays.

    A NumPy scalar of float64 would widen float32 arrays.
    """
    rate = default if rate is None else rate
    _check_at_least_0(rate=rate)
    return float(rate)


def _check_at_least_0(**numbers):
    for name, number in numbers.items():
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{name} is {number}: give 0 or more.")


def _check_below_1(**numbers):
    for name, number in numbers.items():
        if not 0 <= number < 1:
            raise ValueError(f"{name} is {number}: give a number from 0 up to, not including, 1.")
