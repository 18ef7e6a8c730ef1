"""Learning from soft labels: a target may be any probability, also what another model says.

The loss of a row with score z and target t is the cross-entropy of the probability
``p = 1 / (1 + exp(-z))`` against t; its gradient by z is ``p - t`` (Hinton, Vinyals and Dean 2015,
"Distilling the knowledge in a neural network", section 2, at temperature 1). The loss is linear in
t. So a sum of two losses, own labels y and w times what others say q, has the same gradient as
``1 + w`` times the loss with the target ``(y + w q) / (1 + w)``: see `blend`.
"""

from __future__ import annotations

import operator

import numpy as np

from helpers.nn import SGD


def sigmoid(z):
    """The probability that belongs to a score: ``1 / (1 + exp(-z))``, stable for large ``|z|``.

    Examples
    --------
    >>> sigmoid(np.array([0.0, -1000.0, 1000.0])).tolist()
    [0.5, 0.0, 1.0]
    """
    small = np.exp(-np.abs(z))
    return np.where(z >= 0, 1, small) / (1 + small)


def cross_entropy(z, target, divisor=None):
    """The loss of scores against targets from 0 to 1, and its gradient by the scores.

    Parameters
    ----------
    z : float array of shape (n,) or (n, 1)
        Scores.
    target : array of the same number of values
        Probabilities; a label is 0 or 1.
    divisor : number, optional
        What the sum over the rows is divided by. Default: the number of rows.

    Returns
    -------
    value : float
    dz : array of the shape of ``z``

    Raises
    ------
    ValueError
        If the numbers of rows differ, or a target is outside of 0 to 1.

    Examples
    --------
    >>> value, dz = cross_entropy(np.array([0.0, 0.0]), np.array([0.5, 1.0]))
    >>> round(value, 3), dz.tolist()
    (0.693, [0.0, -0.25])
    """
    target = np.asarray(target, z.dtype)
    if target.size != z.size or len(target) != len(z):
        raise ValueError(f"{len(z)} scores and targets of shape {target.shape}: give one for each.")
    if target.size and not (target.min() >= 0 and target.max() <= 1):
        raise ValueError("a target is outside of 0 to 1: give probabilities, not scores.")
    target = target.reshape(z.shape)
    divisor = float(max(1, len(z)) if divisor is None else divisor)
    losses = np.maximum(z, 0) - z * target + np.log1p(np.exp(-np.abs(z)))
    return float(np.sum(losses, dtype=np.float64)) / divisor, (sigmoid(z) - target) / divisor


def blend(own, others, weight):
    """The target that stands for two losses: own labels, and `weight` times what others say.

    Examples
    --------
    >>> blend(np.array([1.0, 0.0]), np.array([0.2, 0.2]), weight=3).round(2).tolist()
    [0.4, 0.15]
    """
    if not weight >= 0:
        raise ValueError(f"weight is {weight}: give 0 or more.")
    return (own + weight * others) / (1 + weight)


def loss_and_gradient(network, parameters, x, target, divisor=None, out=None, workspace=None):
    """The loss of a network on soft labels, and its gradient by all parameters.

    Parameters
    ----------
    network : MLP
        With one output.
    parameters : array of shape (size,)
    x : array of shape (n, d), of the same dtype
    target : array of shape (n,)
        From 0 to 1.
    divisor, out, workspace
        As for `helpers.nn.Network.loss_and_gradient`.

    Returns
    -------
    loss : float
    gradient : array of shape (size,)

    Raises
    ------
    ValueError, TypeError
        As for `cross_entropy` and for the network.

    Examples
    --------
    >>> from helpers.nn import MLP
    >>> mlp, x = MLP((2, 3, 1)), np.array([[1.0, -1.0], [0.0, 2.0]])
    >>> hard = mlp.loss_and_gradient(mlp.initialise(0), x, np.array([0, 1]))
    >>> soft = loss_and_gradient(mlp, mlp.initialise(0), x, np.array([0.0, 1.0]))
    >>> bool(np.allclose(hard[1], soft[1], rtol=1e-12))
    True
    """
    workspace = workspace or network.workspace(len(x), parameters.dtype)
    out = np.empty_like(parameters) if out is None else out
    network.forward(parameters, x, np.zeros(len(x)), workspace)
    space = workspace.first(len(x))
    loss, space.gradients[-1][:] = cross_entropy(space.outputs[-1], target, divisor)
    for _layer in network.backward(parameters, x, out, workspace):
        pass
    return loss, out


class Learner:
    """One of the models that learn together: its parameters, its optimiser, its order of rows.

    Parameters
    ----------
    network : MLP
        With one output.
    optimiser : SGD or Adam, optional
        Default: SGD with rate 0.2.
    seed : int
        For the first parameters and the order of the rows.
    batch : int
        Rows of a step in `epochs`.
    dtype : dtype
        Of the parameters.

    Examples
    --------
    >>> from helpers.nn import MLP
    >>> x = np.random.default_rng(0).normal(size=(200, 3))
    >>> learner = Learner(MLP((3, 8, 1)), seed=1)
    >>> learner.epochs(x, x[:, 0] > 0, 40)
    >>> bool(np.mean((learner.probabilities(x) > 0.5) == (x[:, 0] > 0)) > 0.95)
    True
    """

    def __init__(self, network, optimiser=None, seed=0, batch=64, dtype=np.float64):
        self.network, self.batch = network, operator.index(batch)
        self.optimiser = SGD(0.2) if optimiser is None else optimiser
        self.parameters = network.initialise(seed, dtype)
        self.state = self.optimiser.start(network.size, dtype)
        self.random = np.random.default_rng([seed, 1])
        self._gradient = np.empty_like(self.parameters)
        self._workspace = network.workspace(dtype=dtype)

    def step(self, x, target, divisor=None):
        """One step towards targets from 0 to 1; returns the loss before it."""
        loss, gradient = loss_and_gradient(
            *(self.network, self.parameters, x, target, divisor, self._gradient, self._workspace)
        )
        self.optimiser.step(self.parameters, gradient, self.state)
        return loss

    def epochs(self, x, target, number=1):
        """Go so many times through all rows, in a new order each time."""
        target = np.asarray(target, x.dtype)
        for _ in range(operator.index(number)):
            order = self.random.permutation(len(x))
            for start in range(0, len(x), self.batch):
                rows = order[start : start + self.batch]
                self.step(x[rows], target[rows])

    def probabilities(self, x):
        """What this model says about rows: an array of shape (n,)."""
        return sigmoid(self.network.predict(self.parameters, x)[:, 0])
