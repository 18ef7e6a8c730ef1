"""What training asks of a network, whatever its layers are: parameters in one flat array."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import numpy as np

from helpers.nn.layers import check_dtypes, ready


class Network(ABC):
    """A frozen description of a network; parameters go in, gradients come out.

    In the flat array stand the parameters of layer 0, then those of layer 1, and so on. `MLP` and
    `GPT` say what is abstract here. Who trains a network needs no more than what stands here.
    """

    # ------------------------------------------------------------ what each network says

    @property
    @abstractmethod
    def sizes(self):
        """For each layer, the number of its parameters."""

    @abstractmethod
    def views(self, flat):
        """The arrays of each layer, as views into a flat array that `check_flat` accepts."""

    @abstractmethod
    def initialise(self, seed, dtype=np.float64):
        """New parameters, of shape (size,)."""

    @abstractmethod
    def check_inputs(self, parameters, x):
        """Raise unless parameters and inputs are those of this network."""

    @abstractmethod
    def workspace(self, *, dtype=np.float64):
        """Memory for one forward and backward pass, to be used again; it grows with the batch."""

    @abstractmethod
    def forward(self, parameters, x, y, workspace, divisor=None):
        """The loss; what `backward` needs is left in the workspace.

        Arguments, result and errors as for `loss_and_gradient`.
        """

    @abstractmethod
    def backward(self, parameters, x, out, workspace):
        """Write the gradient into ``out``, and yield each layer's number when its part is there.

        Layers come from the last to the first. While one part of the gradient is sent to other
        ranks, the next one is computed. `forward` must have run with the same arguments.

        Parameters
        ----------
        parameters, x, workspace
            As for `forward`. Do not change the parameters before the end.
        out : array of shape (size,)
            Where to write the gradient.

        Yields
        ------
        int
            A layer whose ``slices`` of ``out`` are complete.

        Raises
        ------
        ValueError, TypeError
            If shapes do not fit, dtypes differ, or `forward` has not run.
        """

    def counted(self, y):
        """How many of these targets count in the loss: the divisor of a mean over all of them."""
        return len(y)

    # ------------------------------------------------------------ what follows from that

    @cached_property
    def slices(self):
        """For each layer, where its parameters lie in the flat array: (start, stop)."""
        stops = np.cumsum(self.sizes).tolist()
        return tuple(zip([0, *stops], stops))

    @property
    def size(self):
        """The number of parameters."""
        return self.slices[-1][1]

    def loss_and_gradient(self, parameters, x, y, divisor=None, out=None, workspace=None):
        """The loss of a batch, and its gradient by all parameters.

        Parameters
        ----------
        parameters : array of shape (size,)
        x, y : array
            Inputs and targets, as the network's class says.
        divisor : number, optional
            What the sum over the targets is divided by. Default: the number of those that count,
            for the mean. A rank with a shard of a batch gives the number of the whole batch.
        out : array of shape (size,), optional
            Where to write the gradient.
        workspace : optional
            From `workspace`. With it and ``out``, only small arrays are allocated.

        Returns
        -------
        loss : float
        gradient : array of shape (size,)

        Raises
        ------
        ValueError, TypeError
            If shapes do not fit, dtypes differ, or an input or a target is not possible.
        """
        self.check_inputs(parameters, x)
        workspace = workspace or self.workspace(dtype=parameters.dtype)
        out = ready(out, parameters.shape, parameters.dtype)
        loss = self.forward(parameters, x, y, workspace, divisor)
        for _layer in self.backward(parameters, x, out, workspace):
            pass
        return loss, out

    def check_gradient(self, parameters, out):
        """Raise unless the gradient can be written into ``out``."""
        self.check_flat("the gradient", out)
        check_dtypes(parameters=parameters, gradient=out)

    def check_flat(self, name, flat):
        """Raise unless this is a flat array of the network's size."""
        check_dtypes(**{name: flat})
        if flat.shape != (self.size,) or not flat.flags.c_contiguous:
            raise ValueError(
                f"{name} of shape {flat.shape}: {self} needs one contiguous array of shape "
                f"({self.size},)."
            )
