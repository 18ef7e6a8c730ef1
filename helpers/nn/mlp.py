"""A multilayer perceptron whose parameters lie in one flat array.

The network is a frozen description; parameters go in and gradients come out. In the flat array
stand the weights of layer 0 row by row, then its biases, then those of layer 1, and so on.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import numpy as np

from helpers.nn.layers import (
    check_dtypes,
    linear,
    linear_grad_input,
    linear_grad_weights,
    relu,
    relu_grad,
)
from helpers.nn.losses import logistic_loss, softmax_loss, squared_loss
from helpers.nn.network import Network

LOSSES = {"logistic": logistic_loss, "softmax": softmax_loss, "squared": squared_loss}


@dataclass(frozen=True)
class Workspace:
    """Memory for one forward and backward pass, to be used again for the next one.

    Attributes
    ----------
    outputs : list of array
        What each layer computed (after the rectifier), of shape (rows, width).
    gradients : list of array
        The gradients of the loss by these outputs; the rectifier's input for hidden layers.
    masks : list of array
        Which outputs of a hidden layer were positive, dtype bool.
    """

    outputs: list
    gradients: list
    masks: list

    def grow(self, rows):
        """Make room for so many rows, if there is not; what was there is lost."""
        if rows > len(self.outputs[0]):
            for part in (self.outputs, self.gradients, self.masks):
                part[:] = [np.empty((rows, array.shape[1]), array.dtype) for array in part]

    def first(self, rows):
        """The same memory, cut to its first rows.

        Raises
        ------
        ValueError
            If it holds fewer rows.
        """
        if rows > len(self.outputs[0]):
            raise ValueError(
                f"the workspace holds {len(self.outputs[0])} rows, the batch has {rows}: "
                "run forward with this batch first."
            )
        parts = (self.outputs, self.gradients, self.masks)
        return Workspace(*([array[:rows] for array in part] for part in parts))


@dataclass(frozen=True)
class MLP(Network):
    """A multilayer perceptron: linear layers with a rectifier between them, and a loss.

    Parameters
    ----------
    widths : sequence of int
        Numbers of inputs, of units of each hidden layer, and of outputs: two or more.
    loss : str
        ``logistic`` (one output, labels 0 and 1), ``softmax`` (one output a class, integer labels)
        or ``squared``.

    Raises
    ------
    ValueError
        If there are fewer than two widths, a width is not positive, or the loss is unknown or does
        not fit the number of outputs.

    Examples
    --------
    >>> import numpy as np
    >>> mlp = MLP((2, 3, 1))
    >>> mlp.size, mlp.slices
    (13, ((0, 9), (9, 13)))
    >>> parameters = mlp.initialise(seed=0)
    >>> x, y = np.array([[1.0, -1.0], [0.0, 2.0]]), np.array([0, 1])
    >>> loss, gradient = mlp.loss_and_gradient(parameters, x, y)
    >>> mlp.loss_at(parameters - 0.1 * gradient, x, y) < loss
    True
    """

    widths: tuple[int, ...]
    loss: str = "logistic"

    def __post_init__(self):
        widths = tuple(operator.index(width) for width in self.widths)
        object.__setattr__(self, "widths", widths)
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(
                f"widths {widths}: give at least the numbers of inputs and outputs, 1 or more each."
            )
        if self.loss not in LOSSES:
            raise ValueError(f"no loss is called {self.loss!r}: choose one of {sorted(LOSSES)}.")
        if self.loss == "logistic" and widths[-1] != 1:
            raise ValueError(
                f"the logistic loss needs 1 output, not {widths[-1]}: softmax takes more."
            )
        if self.loss == "softmax" and widths[-1] < 2:
            raise ValueError("the softmax loss needs one output for each class, at least 2.")

    @property
    def shapes(self):
        """The shape of each layer's weights, (inputs, outputs)."""
        return tuple(zip(self.widths, self.widths[1:]))

    @property
    def sizes(self):
        """For each layer, the number of its parameters."""
        return [(d_in + 1) * d_out for d_in, d_out in self.shapes]

    def views(self, flat):
        """The weights and biases of each layer, as views into a flat array.

        Parameters
        ----------
        flat : contiguous float array of shape (size,)
            Parameters or a gradient.

        Returns
        -------
        list of (w, b)
            Of shapes (d_in, d_out) and (d_out,). Writing into them writes into ``flat``.

        Raises
        ------
        ValueError, TypeError
            If ``flat`` has another size, is not contiguous, or holds no floats.
        """
        self.check_flat("the flat array", flat)
        layers = []
        for (d_in, d_out), (start, stop) in zip(self.shapes, self.slices):
            middle = stop - d_out
            layers.append((flat[start:middle].reshape(d_in, d_out), flat[middle:stop]))
        return layers

    def initialise(self, seed, dtype=np.float64):
        """New parameters: normal weights with variance 2 / d_in, and biases of 0.

        The weights of a layer depend on the seed, the layer's number and its shape, and on nothing
        else: however layers are dealt out to ranks, training starts from the same point. The scale
        is that of He et al. 2015, "Delving Deep into Rectifiers", equation 10. Those of float32
        are those of float64, rounded.

        Parameters
        ----------
        seed : int
            Not negative.
        dtype : dtype
            Of the parameters.

        Returns
        -------
        array of shape (size,)
        """
        flat = np.zeros(self.size, dtype)
        for layer, (w, _) in enumerate(self.views(flat)):
            random = np.random.default_rng([seed, layer])
            w[:] = random.normal(scale=np.sqrt(2 / len(w)), size=w.shape)
        return flat

    def workspace(self, rows=0, dtype=np.float64):
        """Memory for batches of so many rows, see `Workspace`; it grows where more are given."""
        hidden, outer = self.widths[1:-1], self.widths[1:]
        return Workspace(
            outputs=[np.empty((rows, width), dtype) for width in outer],
            gradients=[np.empty((rows, width), dtype) for width in outer],
            masks=[np.empty((rows, width), bool) for width in hidden],
        )

    def predict(self, parameters, x):
        """The outputs of the last layer: scores for a class, or predicted numbers.

        Parameters
        ----------
        parameters : array of shape (size,)
        x : array of shape (n, widths[0]), of the same dtype

        Returns
        -------
        array of shape (n, widths[-1])
            Logistic loss: a probability is ``1 / (1 + exp(-output))``.

        Raises
        ------
        ValueError, TypeError
            If shapes do not fit or dtypes differ.
        """
        self.check_inputs(parameters, x)
        return self._outputs(parameters, x, [None] * len(self.shapes))

    def loss_at(self, parameters, x, y, divisor=None):
        """The loss at these parameters, a float. Arguments as for `loss_and_gradient`."""
        return LOSSES[self.loss](self.predict(parameters, x), y, divisor)[0]

    def forward(self, parameters, x, y, workspace, divisor=None):
        """The loss; what `backward` needs is left in the workspace.

        Parameters
        ----------
        parameters : array of shape (size,)
        x : array of shape (n, widths[0]), of the same dtype
        y : array of shape (n,)
            Labels or targets, as the loss asks; of shape (n, outputs) for several targets.
        workspace : Workspace
        divisor : number, optional
            As for `loss_and_gradient`.

        Returns
        -------
        float

        Raises
        ------
        ValueError, TypeError
            If shapes do not fit, dtypes differ, or a label is no class.
        """
        self.check_inputs(parameters, x)
        self._check_workspace(workspace, x.dtype)
        workspace.grow(len(x))
        space = workspace.first(len(x))
        z = self._outputs(parameters, x, space.outputs)
        loss, _ = LOSSES[self.loss](z, y, divisor, out=space.gradients[-1])
        return loss

    def backward(self, parameters, x, out, workspace):
        """Write the gradient, and yield each layer's number; see `Network.backward`.

        Examples
        --------
        >>> import numpy as np
        >>> mlp, x = MLP((2, 3, 1)), np.ones((4, 2))
        >>> parameters, workspace = mlp.initialise(seed=0), mlp.workspace(rows=4)
        >>> gradient = np.empty(mlp.size)
        >>> loss = mlp.forward(parameters, x, np.ones(4), workspace)
        >>> [mlp.slices[layer] for layer in mlp.backward(parameters, x, gradient, workspace)]
        [(9, 13), (0, 9)]
        """
        self.check_inputs(parameters, x)
        self.check_gradient(parameters, out)
        self._check_workspace(workspace, x.dtype)
        return self._layers_backward(parameters, x, out, workspace.first(len(x)))

    def _outputs(self, parameters, x, outs):
        """The forward pass: what each layer computes is written into one of ``outs``."""
        for layer, (w, b) in enumerate(self.views(parameters)):
            if layer > 0:
                x = relu(x, out=x)
            x = linear(x, w, b, out=outs[layer])
        return x

    def _layers_backward(self, parameters, x, out, space):
        """The backward pass, checked arguments."""
        inputs, dy = [x, *space.outputs], space.gradients[-1]
        layers, gradients = self.views(parameters), self.views(out)
        for layer in reversed(range(len(layers))):
            linear_grad_weights(dy, inputs[layer], *gradients[layer])
            yield layer
            if layer > 0:
                before = layer - 1
                dx = linear_grad_input(dy, layers[layer][0], space.gradients[before])
                dy = relu_grad(dx, inputs[layer], out=dx, mask=space.masks[before])

    def check_inputs(self, parameters, x):
        """Raise unless parameters and inputs are those of this network."""
        check_dtypes(parameters=parameters, x=x)
        self.check_flat("parameters", parameters)
        if x.ndim != 2 or x.shape[1] != self.widths[0]:
            raise ValueError(f"x has shape {x.shape}: this network needs (rows, {self.widths[0]}).")

    def _check_workspace(self, workspace, dtype):
        """Raise unless the workspace was made for such a network."""
        made = tuple((array.shape[1], array.dtype) for array in workspace.outputs)
        if made != tuple((width, dtype) for width in self.widths[1:]):
            raise ValueError(
                f"the workspace was made for other widths or another dtype than {self.widths} and "
                f"{dtype}: take one from mlp.workspace(rows, dtype)."
            )
