"""Which part of a GPT lies on which tensor rank; see `helpers.parallel.tensor`."""

from __future__ import annotations

import math

import numpy as np

from helpers.engine.collectives import all_reduce
from helpers.nn.blocks import block_shapes, named_views

BY_COLUMNS = ("up_w", "up_b")
BY_ROWS = ("out_w", "down_w", "tokens")
BY_HEADS = ("qkv_w", "qkv_b")
"""Their columns are those of queries, of keys and of values: each of the three is cut."""
NORMS = ("norm_1_scale", "norm_1_shift", "norm_2_scale", "norm_2_shift", "scale", "shift")


def check(gpt, ranks):
    """Refuse a number of ranks over which a GPT does not split.

    Parameters
    ----------
    gpt : GPT
    ranks : int

    Raises
    ------
    ValueError
        It divides not all of: the heads, the units of a perceptron, the vocabulary.

    Examples
    --------
    >>> from helpers.nn import GPT
    >>> check(GPT(vocabulary=40, context=8, width=12, heads=4, layers=1), ranks=3)
    Traceback (most recent call last):
    ValueError: 3 ranks do not divide 4 heads and a vocabulary of 40: choose 1, 2 or 4.
    """
    counts = {
        "{} heads": gpt.heads,
        "{} units": 4 * gpt.width,
        "a vocabulary of {}": gpt.vocabulary,
    }
    common = math.gcd(*counts.values())
    if ranks < 1 or common % ranks:
        odd = [words.format(n) for words, n in counts.items() if ranks < 1 or n % ranks]
        right = [n for n in range(1, common + 1) if common % n == 0]
        raise ValueError(f"{ranks} ranks do not divide {_listed(odd, 'and')}: {_choose(right)}.")


def check_length(length, ranks):
    """Refuse a text whose positions do not split over the ranks."""
    if length % ranks:
        near = [n for n in (length - length % ranks, length + ranks - length % ranks) if n]
        raise ValueError(
            f"{length} positions do not split over {ranks} ranks: take a multiple of {ranks}, "
            f"such as {_listed(near, 'or')}."
        )


def split_names(gpt, layer):
    """The names of a layer's arrays that are cut; the others lie whole on each rank.

    Parameters
    ----------
    gpt : GPT
    layer : int
        0 for the tables, then the blocks, last the final norm.

    Returns
    -------
    tuple of str

    Examples
    --------
    >>> from helpers.nn import GPT
    >>> gpt = GPT(vocabulary=4, context=8, width=4, heads=2, layers=1)
    >>> split_names(gpt, 0), split_names(gpt, 1), split_names(gpt, 2)
    (('tokens',), ('qkv_w', 'qkv_b', 'out_w', 'up_w', 'up_b', 'down_w'), ())
    """
    return tuple(n for n in gpt.shapes[layer] if n in (*BY_COLUMNS, *BY_ROWS, *BY_HEADS))


def partial_names(gpt, layer):
    """The names of a layer's arrays whose gradient is a part of a sum with `SequenceParallel`."""
    return tuple(name for name in gpt.shapes[layer] if name in NORMS)


def shapes(gpt, layer, ranks):
    """The shapes of one rank's part of a layer, by name.

    Parameters
    ----------
    gpt : GPT
    layer : int
    ranks : int

    Returns
    -------
    dict of str to tuple

    Raises
    ------
    ValueError
        As for `check`.

    Examples
    --------
    >>> from helpers.nn import GPT
    >>> gpt = GPT(vocabulary=4, context=8, width=4, heads=2, layers=1)
    >>> shapes(gpt, 0, ranks=2)
    {'tokens': (2, 4), 'positions': (8, 4)}
    >>> shapes(gpt, 1, ranks=2)["down_w"]
    (8, 4)
    """
    check(gpt, ranks)
    if layer == 0:
        return gpt.shapes[0] | {"tokens": (gpt.vocabulary // ranks, gpt.width)}
    if layer == gpt.layers + 1:
        return gpt.shapes[layer]
    return block_shapes(gpt.width, gpt.width // ranks, 4 * gpt.width // ranks)


def cut(gpt, layer, flat, rank, ranks):
    """One rank's part of a layer.

    Parameters
    ----------
    gpt : GPT
    layer : int
    flat : contiguous array of one axis
        Parameters, a gradient or a moment of the whole layer.
    rank, ranks : int
        The number of the rank on the tensor axis, and how many there are.

    Returns
    -------
    array of one axis
        A copy, in the order of `shapes`.

    Raises
    ------
    ValueError
        As for `check`, or if the layer has another size.

    Examples
    --------
    >>> from helpers.nn import GPT
    >>> gpt = GPT(vocabulary=2, context=1, width=2, heads=2, layers=1)
    >>> cut(gpt, 0, np.arange(6.0), rank=1, ranks=2).tolist()  # a row of tokens, and positions
    [2.0, 3.0, 4.0, 5.0]
    """
    check(gpt, ranks)
    whole = named_views(flat, gpt.shapes[layer])
    return np.concatenate([_part(name, whole[name], rank, ranks).ravel() for name in whole])


def join(gpt, layer, parts):
    """A whole layer from the parts of all ranks: the inverse of `cut`.

    Parameters
    ----------
    gpt : GPT
    layer : int
    parts : sequence of array
        One for each rank, as `cut` gives them. What lies whole on each is taken from the first.

    Returns
    -------
    array of one axis

    Raises
    ------
    ValueError
        As for `check`, or if a part has another size.

    Examples
    --------
    >>> from helpers.nn import GPT
    >>> gpt = GPT(vocabulary=2, context=1, width=2, heads=2, layers=1)
    >>> layer = gpt.initialise_layer(1, seed=0)
    >>> np.array_equal(join(gpt, 1, [cut(gpt, 1, layer, rank, 2) for rank in range(2)]), layer)
    True
    """
    ranks, kinds = len(parts), shapes(gpt, layer, len(parts))
    start, stop = gpt.slices[layer]
    flat = np.empty(stop - start, parts[0].dtype)
    whole = named_views(flat, gpt.shapes[layer])
    for rank in reversed(range(ranks)):  # the first rank writes last what all ranks have
        for name, array in named_views(parts[rank], kinds).items():
            place = _part(name, whole[name], rank, ranks)
            place[...] = array.reshape(place.shape)
    return flat


def _part(name, array, rank, ranks):
    """A view of a rank's part of an array."""
    if name in BY_HEADS:
        array = array.reshape(*array.shape[:-1], 3, -1)
    axis = 0 if name in BY_ROWS else -1
    if name not in (*BY_COLUMNS, *BY_ROWS, *BY_HEADS):
        return array
    part = array.shape[axis] // ranks
    mine = slice(rank * part, (rank + 1) * part)
    return array[mine] if axis == 0 else array[..., mine]


def complete(gpt, layers, gradients, group):
    """Add up the gradients that are parts of a sum with `SequenceParallel`, in one exchange.

    Parameters
    ----------
    gpt : GPT
    layers : sequence of int
    gradients : sequence of dict
        For each of these layers its arrays by name; those of `partial_names` are changed.
    group : Group

    Examples
    --------
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> from helpers.nn import GPT
    >>> gpt = GPT(vocabulary=2, context=1, width=2, heads=2, layers=1)
    >>> def program(rank):
    ...     gradient = {"scale": np.ones(2), "shift": np.full(2, 0.5 * rank.index)}
    ...     complete(gpt, [2], [gradient], rank.tensor)
    ...     return gradient["scale"].tolist(), gradient["shift"].tolist()
    >>> spmd.run(None, Mesh(tensor=2), program).results[0]
    ([2.0, 2.0], [0.5, 0.5])
    """
    pairs = zip(layers, gradients, strict=True)
    arrays = [gradient[name] for n, gradient in pairs for name in partial_names(gpt, n)]
    if group.size == 1 or not arrays:
        return
    whole = np.concatenate([array.ravel() for array in arrays])
    with group.owner.record("all_reduce", nbytes=whole.nbytes):
        all_reduce(group, whole, out=whole)
    stops = np.cumsum([array.size for array in arrays])
    for array, part in zip(arrays, np.split(whole, stops[:-1]), strict=True):
        array[...] = part.reshape(array.shape)


def block_bytes(nbytes, ranks, sequence=False):
    """Bytes that a rank sends for one block, with exchanges as rings.

    An all-reduce of n bytes sends ``2 (ranks - 1) / ranks * n``, a reduce-scatter and an all-gather
    half of that. `SequenceParallel` gathers twice more backward, what the matrices that are cut by
    columns were given: then no rank keeps it whole.

    Parameters
    ----------
    nbytes : int
        Of one array of (batch, length, width).
    ranks : int
    sequence : bool
        `SequenceParallel`.

    Returns
    -------
    dict of str to int
        ``forward`` and ``backward``.

    Examples
    --------
    >>> block_bytes(1000, ranks=2), block_bytes(1000, ranks=2, sequence=True)
    ({'forward': 2000, 'backward': 2000}, {'forward': 2000, 'backward': 3000})
    """
    half = nbytes * (ranks - 1) // ranks
    return {"forward": 4 * half, "backward": (6 if sequence else 4) * half}


def _choose(numbers):
    return f"choose {_listed(numbers, 'or')}" if len(numbers) > 1 else f"choose {numbers[0]}"


def _listed(items, word):
    *first, last = map(str, items)
    return f"{', '.join(first)} {word} {last}" if first else last
