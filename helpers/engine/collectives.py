"""Exchanges in which all ranks of a group take part, built from sending and receiving.

Every member calls the same functions in the same order. The result is the same to the last bit on
every rank and in every run: each number is combined in one fixed order, on one rank (or, in
"halving", on pairs of ranks in orders that commute).

Costs, for p ranks and n bytes, with latency α (seconds a message) and 1/β the bandwidth (β seconds
a byte), for the slowest rank of an all-reduce:

==========  =============================  ====================================================
naive       2 (p - 1) (α + n β)            all to rank 0, which adds and sends to all
tree        2 log2(p) (α + n β)            the same along a binomial tree
ring        2 (p - 1) (α + n/p β)          parts go round; the least bytes
halving     2 log2(p) α + 2 (p-1)/p n β    recursive halving and doubling, for p a power of two
direct      two meetings and no message    ranks of one host read each other's memory
==========  =============================  ====================================================

Sources: Thakur, Rabenseifner and Gropp 2005, "Optimization of collective communication operations
in MPICH"; Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms" (ring).
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np

from helpers.engine.groups import Group, sendable

OPERATIONS = {"sum": np.add, "product": np.multiply, "max": np.maximum, "min": np.minimum}
ALGORITHMS = ("direct", "naive", "tree", "ring", "halving")
SMALL_BYTES = 64 * 1024
"""Up to here fewer messages are worth more than fewer bytes."""
BLOCK_BYTES = 128 * 1024
"""What is added at once, so that the sum is still in the cache when it is written to the others."""


def all_reduce(group: Group, array, out=None, operation="sum", algorithm=None) -> np.ndarray:
    """Combine the arrays of all ranks; everybody gets the result.

    Parameters
    ----------
    group : Group
        For example ``rank.data``.
    array : array_like
        The same dtype and shape on all ranks.
    out : numpy.ndarray, optional
        Where the result is written; it may be `array` itself. Default: a new array.
    operation : {"sum", "product", "max", "min"}
    algorithm : {"direct", "naive", "tree", "ring", "halving"}, optional
        Default: "direct" for ranks on one host, else "halving" for small and "ring" for large
        arrays.

    Returns
    -------
    numpy.ndarray
        `out`.

    Raises
    ------
    Mismatch
        Another rank is in another exchange, or brings another dtype or shape.

    Examples
    --------
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> run = spmd.run(None, Mesh(data=3), lambda rank: all_reduce(rank.data, [rank.index, 1]))
    >>> [result.tolist() for result in run.results]
    [[3, 3], [3, 3], [3, 3]]
    """
    array, combine = sendable(array), _operation(operation)
    if algorithm is not None and algorithm not in ALGORITHMS:
        raise ValueError(f"There is no algorithm {algorithm!r}: choose {', '.join(ALGORITHMS)}.")
    result = _result(array, out)
    flat = result.reshape(-1)
    what = group.call(f"all_reduce {operation} {algorithm or ''}".rstrip(), array)
    if group.size > 1:
        _all_reduce(group, flat, combine, algorithm, what)
    return _written(result, out)


def _all_reduce(group, flat, combine, algorithm, what):
    if algorithm == "direct" and not group.near:
        raise ValueError("direct is for ranks of one host, and these are on several: choose ring.")
    if algorithm in (None, "direct") and group.near and _direct(group, flat, combine, what):
        return
    if algorithm in (None, "direct"):  # not one host, or no room for shared memory
        algorithm = "halving" if flat.nbytes <= SMALL_BYTES else "ring"
    by_name = {"naive": _naive, "tree": _tree, "ring": _ring, "halving": _halving}
    by_name[algorithm](group, flat, combine, what)


def _direct(group, flat, combine, what) -> bool:
    """Each rank combines its part straight from the others' memory and writes it to all."""
    mine, place = group.expose(flat)
    views = group.look(mine, what, place)
    if views is None:
        return False
    part = slice(*_parts(flat.size, group.size)[group.rank])
    _combine_into_all([view[part] for view in views], combine)
    barrier(group, what)
    if mine is not flat:
        flat[:] = mine
    return True


def _combine_into_all(arrays, combine):
    """Replace every one of these equally long arrays by their combination, block by block."""
    first, second, *rest = arrays
    block = max(1, BLOCK_BYTES // first.itemsize)
    for start in range(0, first.size, block):
        part = slice(start, start + block)
        # With two ranks the sum can be written where it belongs; with more, an array that is still
        # to be added must not be overwritten.
        total = combine(first[part], second[part], out=None if rest else first[part])
        for array in rest:
            combine(total, array[part], out=total)
        for array in arrays:
            if array is not first or rest:
                array[part] = total


def _naive(group, flat, combine, what):
    """Everybody sends to rank 0, which combines in the order of the ranks and sends back."""
    if group.rank == 0:
        for source in range(1, group.size):
            group.take(flat, source, combine, what)
        for to in range(1, group.size):
            group.send(flat, to, what)
    else:
        group.send(flat, 0, what)
        group.receive(0, flat, what)


def _tree(group, flat, combine, what):
    """Up a binomial tree to rank 0, and down again."""
    _tree_reduce(group, flat, combine, 0, what)
    _tree_broadcast(group, flat, 0, what)


def _ring(group, flat, combine, what):
    """The parts go round the ring twice: to be combined, and to be known to all."""
    parts = _parts(flat.size, group.size)
    _ring_reduce_scatter(group, flat, parts, combine, what)
    _ring_all_gather(group, flat, parts, what)


def _ring_reduce_scatter(group, flat, parts, combine, what):
    """Afterwards each rank's own part of `flat` is complete; the rest of it is spoilt."""
    after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    for step in range(1, group.size):
        give = slice(*parts[(group.rank - step) % group.size])
        take = slice(*parts[(group.rank - step - 1) % group.size])
        group.exchange(flat[give], after, before, flat[take], combine, what)


def _ring_all_gather(group, flat, parts, what):
    """Each rank's own part of `flat` goes to all the others."""
    after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    for step in range(group.size - 1):
        give = slice(*parts[(group.rank - step) % group.size])
        take = slice(*parts[(group.rank - step - 1) % group.size])
        group.exchange(flat[give], after, before, flat[take], what=what)


def _halving(group, flat, combine, what):
    """Exchange halves with ever nearer partners, then gather them in the opposite order.

    With p ranks, those beyond the largest power of two first hand their array to a partner, and
    get the result from it at the end.
    """
    power = 1 << (group.size.bit_length() - 1)
    extra = group.size - power
    if group.rank >= power:
        group.send(flat, group.rank - power, what)
        group.receive(group.rank - power, flat, what)
        return
    if group.rank < extra:
        group.take(flat, group.rank + power, combine, what)
    start, stop, path = 0, flat.size, []
    distance = power // 2
    while distance:
        partner, middle = group.rank ^ distance, (start + stop) // 2
        keep, give = (start, middle), (middle, stop)
        if group.rank & distance:
            keep, give = give, keep
        group.exchange(flat[slice(*give)], partner, partner, flat[slice(*keep)], combine, what)
        path.append((partner, keep, give))
        (start, stop), distance = keep, distance // 2
    for partner, keep, give in reversed(path):
        group.exchange(flat[slice(*keep)], partner, partner, flat[slice(*give)], what=what)
    if group.rank < extra:
        group.send(flat, group.rank + power, what)


def reduce_scatter(
    group: Group, array, operation="sum", algorithm=None, axis: int = 0
) -> np.ndarray:
    """Combine the arrays of all ranks; each rank gets one part of the result.

    Parameters
    ----------
    group : Group
    array : array_like
        At least one axis; the same dtype and shape on all ranks. It is not changed.
    operation : {"sum", "product", "max", "min"}
    algorithm : {"direct", "ring"}, optional
        Default: "direct" for ranks on one host.
    axis : int
        Along which the result is cut, counted from 0.

    Returns
    -------
    numpy.ndarray
        This rank's part, as `numpy.array_split` cuts.
    """
    array, combine = sendable(array), _operation(operation)
    what = group.call(f"reduce_scatter {operation}", array)
    rows = _parts(_rows(array, "reduce_scatter", axis), group.size)
    if group.size == 1:
        return array.copy()
    if algorithm != "ring" and group.near:
        part = (*[slice(None)] * axis, slice(*rows[group.rank]))
        found = _direct_reduce_scatter(group, array, part, combine, what)
        if found is not None:
            return found
    array = np.ascontiguousarray(np.moveaxis(array, axis, 0))
    flat, width = array.reshape(-1).copy(), array.size // max(1, array.shape[0])
    parts = [(start * width, stop * width) for start, stop in rows]
    _ring_reduce_scatter(group, flat, parts, combine, what)
    start, stop = rows[group.rank]
    mine = flat[slice(*parts[group.rank])].reshape(stop - start, *array.shape[1:])
    return np.moveaxis(mine, 0, axis).copy()


def _direct_reduce_scatter(group, array, part, combine, what):
    mine, place = group.expose(array)
    views = group.look(mine, what, place)
    if views is None:
        return None
    total = views[0][part].copy()
    for view in views[1:]:
        combine(total, view[part], out=total)
    barrier(group, what)
    return total


def all_gather(group: Group, array, alike: bool = False, axis: int = 0) -> np.ndarray:
    """Join the arrays of all ranks along an axis; everybody gets the whole.

    Parameters
    ----------
    group : Group
    array : array_like
        At least one axis. Along `axis` it may be longer on one rank than on another.
    alike : bool
        True: all ranks bring the same dtype and shape. On one host that is several times quicker.
    axis : int
        Counted from 0.

    Returns
    -------
    numpy.ndarray
        The arrays in the order of the ranks.
    """
    array = sendable(array)
    _rows(array, "all_gather", axis)
    if alike and group.near and group.size > 1:
        whole = _direct_all_gather(group, array, group.call("all_gather alike", array), axis)
        if whole is not None:
            return whole
    what = group.call("all_gather")
    found = [None] * group.size
    found[group.rank] = array
    after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    for step in range(group.size - 1):
        give, take = (group.rank - step) % group.size, (group.rank - step - 1) % group.size
        found[take] = group.exchange(found[give], after, before, what=what)
    kinds = {(part.dtype, *part.shape[:axis], *part.shape[axis + 1 :]) for part in found}
    if len(kinds) > 1:
        shapes = ", ".join(f"{part.dtype} {list(part.shape)}" for part in found)
        raise ValueError(f"all_gather joins rows of one kind, but the ranks brought {shapes}.")
    return np.concatenate(found, axis, dtype=array.dtype)


def _direct_all_gather(group, array, what, axis):
    mine, place = group.expose(array)
    views = group.look(mine, what, place)
    if views is None:
        return None
    whole = np.concatenate(views, axis)
    barrier(group, what)
    return whole


def broadcast(group: Group, array=None, root: int = 0) -> np.ndarray:
    """Give the array of one rank to all, along a binomial tree.

    Parameters
    ----------
    group : Group
    array : array_like, optional
        On `root`: what to send. Elsewhere: None, or an array of the same kind to be filled.
    root : int
        Number within the group.
    """
    what = group.call(f"broadcast from {root}")
    if group.rank == root:
        array = sendable(array)
    return _tree_broadcast(group, array, root, what)


def _tree_broadcast(group, array, root, what):
    """Rank r (counted from the root) receives from r less its highest bit, then passes on."""
    place = (group.rank - root) % group.size
    if place:
        parent = place - (1 << (place.bit_length() - 1))
        array = group.receive((parent + root) % group.size, array, what)
    step = 1 << place.bit_length()
    while place + step < group.size:
        group.send(array, (place + step + root) % group.size, what)
        step *= 2
    return array


def reduce(group: Group, array, root: int = 0, operation="sum") -> np.ndarray | None:
    """Combine the arrays of all ranks on one of them, along a binomial tree.

    Returns
    -------
    numpy.ndarray or None
        The result on `root`, None elsewhere.
    """
    array, combine = sendable(array), _operation(operation)
    result = array.copy()
    what = group.call(f"reduce {operation} to {root}", array)
    _tree_reduce(group, result.reshape(-1), combine, root, what)
    return result if group.rank == root else None


def _tree_reduce(group, flat, combine, root, what):
    """The mirror image of the broadcast: children hand their sums to their parents."""
    place = (group.rank - root) % group.size
    first = 1 << place.bit_length()
    steps = [1 << bit for bit in range(group.size.bit_length()) if first <= 1 << bit]
    for step in reversed([step for step in steps if place + step < group.size]):
        group.take(flat, (place + step + root) % group.size, combine, what)
    if place:
        parent = place - (1 << (place.bit_length() - 1))
        group.send(flat, (parent + root) % group.size, what)


def all_to_all(group: Group, parts) -> list[np.ndarray]:
    """Everybody sends one array to everybody; in pairs, one distance after the other.

    Parameters
    ----------
    group : Group
    parts : sequence of array_like
        ``parts[k]`` goes to rank k; any dtypes and shapes.

    Returns
    -------
    list of numpy.ndarray
        Item k came from rank k.
    """
    parts = [sendable(part) for part in parts]
    if len(parts) != group.size:
        raise ValueError(
            f"all_to_all needs one array for each of the {group.size} ranks, not {len(parts)}."
        )
    what = group.call("all_to_all")
    found = [None] * group.size
    found[group.rank] = parts[group.rank].copy()
    for step in range(1, group.size):
        to, source = (group.rank + step) % group.size, (group.rank - step) % group.size
        found[source] = group.exchange(parts[to], to, source, what=what)
    return found


def barrier(group: Group, what: str | None = None) -> None:
    """Wait until all ranks are here (dissemination barrier, log2(p) rounds).

    Source: Hensgen, Finkel and Manber 1988, "Two algorithms for barrier synchronization".
    """
    what = what or group.call("barrier")
    distance = 1
    while distance < group.size:
        to, source = (group.rank + distance) % group.size, (group.rank - distance) % group.size
        group.signal(to, source, what)
        distance *= 2


# ---------------------------------------------------------------- small parts


def _operation(name):
    if name not in OPERATIONS:
        raise ValueError(f"There is no operation {name!r}: choose {', '.join(OPERATIONS)}.")
    return OPERATIONS[name]


@lru_cache(maxsize=256)
def _parts(length: int, ranks: int) -> tuple[tuple[int, int], ...]:
    """Where `numpy.array_split` cuts: (start, stop) of each rank's part."""
    small, longer = divmod(length, ranks)
    starts = [rank * small + min(rank, longer) for rank in range(ranks + 1)]
    return tuple(pairwise(starts))


def _result(array, out) -> np.ndarray:
    """A contiguous array that holds this rank's values and will hold the result."""
    if out is None:
        return array.copy()
    if out.shape != array.shape or out.dtype != array.dtype:
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)}, but the result is {array.dtype} "
            f"{list(array.shape)}: give an array of this kind."
        )
    result = out if out.flags.c_contiguous else np.empty_like(array)
    if result is not array:
        result[...] = array
    return result


def _written(result, out):
    if out is not None and result is not out:
        out[...] = result
        return out
    return result


def _rows(array, name, axis):
    if array.ndim == 0:
        raise ValueError(f"{name} cuts along an axis, and a single number has none.")
    if not 0 <= axis < array.ndim:
        raise ValueError(f"{name} along axis {axis}: this array has axes 0 to {array.ndim - 1}.")
    return array.shape[axis]
