"""How ranks share work: batches cut into shards, gradients into buckets, averaged parameters."""

from __future__ import annotations

import operator
import zlib
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from helpers.engine.collectives import all_gather, all_reduce
from helpers.engine.groups import Group
from helpers.nn.layers import check_dtypes


def shard(rows, group):
    """Which rows of a batch are this rank's: a slice, cut as `numpy.array_split` cuts.

    Parameters
    ----------
    rows : int
        Rows of the whole batch. With fewer rows than ranks the last ranks get none.
    group : Group
        Whose ranks share the batch, for example ``rank.data``.

    Returns
    -------
    slice

    Raises
    ------
    ValueError
        If the batch has no row.

    Examples
    --------
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> spmd.run(None, Mesh(data=3), lambda rank: shard(8, rank.data)).results
    [slice(0, 3, None), slice(3, 6, None), slice(6, 8, None)]
    """
    rows = positive("the number of rows of the batch", rows)
    small, longer = divmod(rows, group.size)
    start = group.rank * small + min(group.rank, longer)
    return slice(start, start + small + (group.rank < longer))


def alone(rank):
    """A group of this rank only: who trains with it exchanges nothing.

    Examples
    --------
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> spmd.run(None, Mesh(data=2), lambda rank: shard(8, alone(rank))).results
    [slice(0, 8, None), slice(0, 8, None)]
    """
    return Group(rank, "alone", (rank.index,))


class Bucket(NamedTuple):
    """Layers whose gradients travel together.

    Attributes
    ----------
    layer : int
        The first of them. The backward pass ends with it, and the bucket is complete.
    start, stop : int
        Where they lie in the flat gradient.
    """

    layer: int
    start: int
    stop: int


def buckets(model, bucket_bytes=None, dtype=np.float64):
    """Cut the gradient into buckets, in the order in which the backward pass completes them.

    Parameters
    ----------
    model : Network
    bucket_bytes : int, optional
        A bucket is closed once it holds so many bytes; a layer is never cut. Default: one bucket.
    dtype : dtype
        Of the gradient.

    Returns
    -------
    list of Bucket

    Raises
    ------
    ValueError, TypeError
        If the number of bytes is not a positive whole number.

    Examples
    --------
    >>> from helpers.nn import MLP
    >>> buckets(MLP((4, 3, 2, 1)), bucket_bytes=80)
    [Bucket(layer=1, start=15, stop=26), Bucket(layer=0, start=0, stop=15)]
    """
    itemsize = np.dtype(dtype).itemsize
    least = model.size * itemsize
    if bucket_bytes is not None:
        least = positive("bucket_bytes", bucket_bytes)
    found, stop = [], model.size
    for layer, (start, _) in reversed(list(enumerate(model.slices))):
        if layer == 0 or (stop - start) * itemsize >= least:
            found.append(Bucket(layer, start, stop))
            stop = start
    return found


def average_parameters(group, parameters, rows, out=None):
    """The mean of all ranks' parameters, each weighted by the rows that it was trained on.

    Parameters
    ----------
    group : Group
    parameters : float array
        The same dtype and shape on all ranks.
    rows : int
        Rows of this rank; a rank with 0 rows has no say.
    out : array, optional
        Where to write the mean; it may be ``parameters`` itself.

    Returns
    -------
    array
        The same bits on all ranks.

    Raises
    ------
    ValueError
        If ``rows`` is negative, or 0 on all ranks.
    TypeError
        If the parameters are no floating-point array.

    Examples
    --------
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> def program(rank):
    ...     return average_parameters(rank.data, np.array([4.0 * rank.index]), rows=3 - rank.index)
    >>> spmd.run(None, Mesh(data=3), program).results[0].round(6)
    array([2.666667])
    """
    check_dtypes(parameters=parameters)
    if operator.index(rows) < 0:
        raise ValueError(f"rows is {rows}: give 0 or more.")
    total = int(all_reduce(group, np.array(rows, np.int64)))
    if total == 0:
        raise ValueError("No rank has a row: there is nothing to average.")
    out = np.multiply(parameters, float(rows / total), out=out)
    if rows == 0:
        out[...] = 0  # whatever stood there: 0 times NaN would be NaN
    return all_reduce(group, out, out=out)


def compare(group, counted, parameters):
    """The sum of what all ranks have counted, once all are known to start from the same point.

    Parameters
    ----------
    group : Group
    counted : int
        This rank's number.
    parameters : contiguous array
        Where this rank starts.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        On all ranks, if some have different parameters.
    """
    mine = [[counted, zlib.crc32(parameters)]]
    numbers, sums = all_gather(group, np.array(mine, np.int64)).T
    other = [group.members[place] for place in np.flatnonzero(sums != sums[0])]
    if other:
        raise ValueError(
            f"ranks {', '.join(map(str, other))} start with other parameters than rank "
            f"{group.members[0]}: initialise all with the same seed and dtype."
        )
    return int(numbers.sum())


def cuts(rows, parts):
    """Cut so many rows into parts as equal as can be: a list of slices."""
    ends = [part * rows // parts for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(ends)]


def positive(name, number):
    """The number, if it is whole and above 0."""
    if isinstance(number, bool) or not hasattr(number, "__index__"):
        raise TypeError(f"{name} is {number!r}: give a whole number.")
    if operator.index(number) < 1:
        raise ValueError(f"{name} is {number}: give 1 or more.")
    return operator.index(number)
