"""What tensor ranks exchange around a pair of cut matrices; see `helpers.parallel.tensor`."""

from __future__ import annotations

from helpers.engine.collectives import all_gather, all_reduce, reduce_scatter
from helpers.nn.blocks import Alone
from helpers.parallel.tensor_cuts import check_length


class TensorParallel(Alone):
    """What the ranks exchange that share the heads and units of a block.

    Each method takes and returns an array of shape (batch, length, width); sums take the place of
    what was given.

    Parameters
    ----------
    group : Group
        As a rule ``rank.tensor``.
    algorithm : str, optional
        Of `all_reduce`.

    Examples
    --------
    >>> import numpy as np
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> def program(rank):
    ...     return TensorParallel(rank.tensor).leave(np.full((1, 1, 1), rank.index + 1.0)).item()
    >>> spmd.run(None, Mesh(tensor=3), program).results
    [6.0, 6.0, 6.0]
    """

    def __init__(self, group, algorithm=None):
        self.group, self.algorithm = group, algorithm

    def positions(self, length):
        """Which positions of a text this rank holds outside of the cut matrices: a slice."""
        return slice(0, length)

    def leave(self, x):
        """The sum over the ranks, on all of them."""
        return self._sum(x)

    def enter_grad(self, dx):
        """The sum over the ranks, on all of them."""
        return self._sum(dx)

    def _sum(self, x):
        if self.group.size == 1:
            return x
        with self.group.owner.record("all_reduce", nbytes=x.nbytes):
            return all_reduce(self.group, x, out=x, algorithm=self.algorithm)


class SequenceParallel(TensorParallel):
    """The same with each rank holding a part of the positions outside of the cut matrices.

    The gradients of `partial_names` are then parts of a sum: `complete` adds them up.

    Parameters
    ----------
    group : Group
        As a rule ``rank.tensor``.
    algorithm : str, optional
        Of `reduce_scatter`. With "ring" the gathers too are rings, and all bytes are messages.

    Raises
    ------
    ValueError
        By `positions` and `leave`, if the length does not split over the ranks.

    Examples
    --------
    >>> import numpy as np
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> def program(rank):
    ...     exchange = SequenceParallel(rank.tensor)
    ...     part = exchange.leave(np.array([[[1.0], [2.0]]]))
    ...     return part.ravel().tolist(), exchange.enter(part).ravel().tolist()
    >>> spmd.run(None, Mesh(tensor=2), program).results
    [([2.0], [2.0, 4.0]), ([4.0], [2.0, 4.0])]
    """

    def positions(self, length):
        """Which positions of a text this rank holds outside of the cut matrices: a slice."""
        check_length(length, self.group.size)
        part = length // self.group.size
        return slice(self.group.rank * part, (self.group.rank + 1) * part)

    def enter(self, x):
        """All positions, from the parts of all ranks."""
        return self._gather(x)

    def leave(self, x):
        """This rank's positions of the sum over the ranks."""
        return self._scatter(x)

    def leave_grad(self, dy):
        """All positions, from the parts of all ranks."""
        return self._gather(dy)

    def enter_grad(self, dx):
        """This rank's positions of the sum over the ranks."""
        return self._scatter(dx)

    def _gather(self, x):
        if self.group.size == 1:
            return x
        alike = self.algorithm != "ring"
        with self.group.owner.record("all_gather", nbytes=self.group.size * x.nbytes):
            return all_gather(self.group, x, alike, axis=1)

    def _scatter(self, x):
        if self.group.size == 1:
            return x
        check_length(x.shape[1], self.group.size)
        with self.group.owner.record("reduce_scatter", nbytes=x.nbytes):
            return reduce_scatter(self.group, x, algorithm=self.algorithm, axis=1)
