"""Groups that count what they send, so that bytes on each axis of a mesh can be compared."""

from __future__ import annotations


class CountedGroup:
    """A group whose collectives send messages, as on a network, and count their bytes.

    Ranks of one host otherwise look into each other's memory, and nothing is sent.

    Parameters
    ----------
    group : Group

    Attributes
    ----------
    sent : int
        Bytes of all arrays that this rank has sent to others of the group.
    near : bool
        False, so that collectives send messages. Set it to ``group.near`` when all is counted, and
        they are as quick as ever.

    Examples
    --------
    >>> import numpy as np
    >>> from helpers.engine import spmd
    >>> from helpers.engine.collectives import all_reduce
    >>> from helpers.engine.mesh import Mesh
    >>> def program(rank):
    ...     group = CountedGroup(rank.data)
    ...     total = all_reduce(group, np.ones(100, np.float32))
    ...     return total[0].item(), group.sent
    >>> spmd.run(None, Mesh(data=4), program).results[0]
    (4.0, 600)
    """

    def __init__(self, group):
        self.group, self.sent, self.near = group, 0, False

    def __getattr__(self, name):
        return getattr(self.group, name)

    def send(self, array, *args, **kwargs):
        """As `Group.send`."""
        self.sent += array.nbytes
        return self.group.send(array, *args, **kwargs)

    def post(self, array, *args, **kwargs):
        """As `Group.post`."""
        self.sent += array.nbytes
        return self.group.post(array, *args, **kwargs)

    def exchange(self, array, *args, **kwargs):
        """As `Group.exchange`."""
        self.sent += array.nbytes
        return self.group.exchange(array, *args, **kwargs)


def stop(counted) -> None:
    """From here on collectives take the quickest way again, and are counted no longer.

    Parameters
    ----------
    counted : dict of str to CountedGroup
        What `count` gave. All ranks stop at the same place of the program.
    """
    for group in counted.values():
        group.near = group.group.near


def count(rank) -> dict[str, CountedGroup]:
    """Put counted groups in place of a rank's groups; call it before anything uses them.

    Returns
    -------
    dict of str to CountedGroup
        ``data``, ``tensor``, ``pipeline`` and ``world``.

    Examples
    --------
    >>> from helpers.engine import spmd
    >>> from helpers.engine.collectives import barrier
    >>> from helpers.engine.mesh import Mesh
    >>> def program(rank):
    ...     counted = count(rank)
    ...     barrier(rank.world)
    ...     return {axis: group.sent for axis, group in counted.items()}
    >>> spmd.run(None, Mesh(data=2), program).results[0]
    {'data': 0, 'tensor': 0, 'pipeline': 0, 'world': 0}
    """
    counted = {}
    for axis in ("data", "tensor", "pipeline", "world"):
        counted[axis] = CountedGroup(getattr(rank, axis))
        setattr(rank, axis, counted[axis])
    return counted
