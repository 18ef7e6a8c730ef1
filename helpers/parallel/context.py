"""Ring attention: a long text cut over ranks, keys and values on their way round a ring.

Each rank holds the same share of the positions, and of queries, keys and values only theirs. Keys
and values go from rank to rank; with each block that comes by, a rank adds to its queries' result
what they take of it. The softmax needs no second pass: the largest score so far and the sum of the
exponentials so far are kept, and what was added before is scaled when they change (Liu, Zaharia and
Abbeel 2023, "Ring attention with blockwise transformers for near-infinite context"; the sums as in
Milakov and Gimelshein 2018, "Online normalizer calculation for softmax").

The positions may lie on the ranks in two ways. One run of neighbours each is the simple one, but
the causal mask gives the last rank most of the work. Balanced, the text is cut into twice as many
chunks as ranks, and rank r holds the chunks r from the front and r from the back; then all have as
much to do (Brandon et al. 2023, "Striped attention", has the thought; this is the "zigzag" cut).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from helpers.nn.blocks import Memory
from helpers.nn.layers import check_dtypes, ready


class RingKept(NamedTuple):
    """What `ring_attention_grad` needs of the forward pass; all of this rank's positions."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    y: np.ndarray
    log_total: np.ndarray
    balanced: bool

    @property
    def nbytes(self):
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self[:5])


def chunks(rank, ranks, balanced=False):
    """The numbers of the chunks of the text that a rank holds, counted from its start.

    Parameters
    ----------
    rank, ranks : int
    balanced : bool
        False: as many chunks as ranks, one each. True: twice as many, and each rank has one from
        the front and one from the back.

    Returns
    -------
    tuple of int

    Examples
    --------
    >>> [chunks(rank, 3) for rank in range(3)], [chunks(rank, 3, True) for rank in range(3)]
    ([(0,), (1,), (2,)], [(0, 5), (1, 4), (2, 3)])
    """
    return (rank, 2 * ranks - 1 - rank) if balanced else (rank,)


def places(length, rank, ranks, balanced=False):
    """The positions of a text that a rank holds, in the order in which it holds them.

    Parameters
    ----------
    length : int
        Positions of the whole text.
    rank, ranks, balanced
        As for `chunks`.

    Returns
    -------
    integer array of shape (length / ranks,)

    Raises
    ------
    ValueError
        If the length does not split over the chunks.

    Examples
    --------
    >>> places(8, 0, 2).tolist(), places(8, 0, 2, balanced=True).tolist()
    ([0, 1, 2, 3], [0, 1, 6, 7])
    """
    parts = ranks * (2 if balanced else 1)
    size, rest = divmod(length, parts)
    if rest or not size:
        near = size * parts or parts
        raise ValueError(
            f"{length} positions do not split over {ranks} ranks into {parts} chunks: take a "
            f"multiple of {parts}, such as {near}."
        )
    mine = chunks(rank, ranks, balanced)
    return np.concatenate([np.arange(size) + chunk * size for chunk in mine])


def work(rank, ranks, balanced=False):
    """How much of the scores a rank computes: a share of the square of all positions.

    Examples
    --------
    >>> [work(rank, 2) for rank in range(2)], [work(rank, 2, True) for rank in range(2)]
    ([0.125, 0.375], [0.25, 0.25])
    """
    mine = chunks(rank, ranks, balanced)
    count = ranks * len(mine)  # of the chunks of the text
    # A chunk meets all before it, and half of itself.
    return sum(chunk + 0.5 for chunk in mine) / count**2


def ring_bytes(nbytes, ranks):
    """Bytes that a rank sends, for local arrays of so many bytes.

    Keys and values travel to all other ranks. Backward, their gradients travel with them, and one
    step further, to the rank that they belong to.

    Parameters
    ----------
    nbytes : int
        Of the keys that a rank holds.
    ranks : int

    Returns
    -------
    dict of str to int
        ``forward`` and ``backward``.

    Examples
    --------
    >>> ring_bytes(1000, ranks=4)
    {'forward': 6000, 'backward': 14000}
    """
    home = 0 if ranks == 1 else ranks
    return {
        "forward": 2 * (ranks - 1) * nbytes,
        "backward": 2 * (ranks - 1) * nbytes + 2 * home * nbytes,
    }


def ring_attention(q, k, v, group, balanced=False, out=None, memory=None):
    """Causal attention over a text that is cut over the ranks of a group.

    Parameters
    ----------
    q, k, v : array of shape (batch, positions, heads, size)
        Of this rank's positions (see `places`); as many on all ranks.
    group : Group
    balanced : bool
        How the positions lie on the ranks, see `chunks`.
    out : array of the shape of ``q``, optional
        Where to write the result.
    memory : Memory, optional
        To work in: the scores of one chunk by another.

    Returns
    -------
    y : array of the shape of ``q``
        What `helpers.nn.attention` gives for these positions of the whole text.
    kept : RingKept

    Raises
    ------
    ValueError, TypeError
        If shapes or dtypes differ, or an odd number of positions is to be balanced.

    Examples
    --------
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> def program(rank):
    ...     q = k = np.zeros((1, 1, 1, 1))  # one position a rank, and equal scores
    ...     v = np.full((1, 1, 1, 1), 2.0 + 2 * rank.index)
    ...     return ring_attention(q, k, v, rank.world)[0].item()
    >>> spmd.run(None, Mesh(data=2), program).results
    [2.0, 3.0]
    """
    _check(q, k, v, balanced)
    memory, y = memory or Memory(q.dtype), ready(out, q.shape, q.dtype)
    y[...] = 0
    highest = np.full((q.shape[0], q.shape[2], q.shape[1], 1), -np.inf, q.dtype)
    total = np.zeros_like(highest)
    for source, (keys, values) in _round(group, np.stack([k, v])):
        for mine, theirs, diagonal in _meetings(group, source, q.shape[1], balanced):
            block = _first_heads(q[:, mine], keys[:, theirs], values[:, theirs], y[:, mine])
            state = highest[:, :, mine], total[:, :, mine]
            _add_block(*block, *state, diagonal, memory)
    y /= total.swapaxes(1, 2)
    return y, RingKept(q, k, v, y, np.log(total) + highest, balanced)


def ring_attention_grad(dy, kept, group, memory=None):
    """The gradient of `ring_attention` by queries, keys and values.

    The weights of a block are computed again from its scores and the logarithm of their total (Dao
    et al. 2022, "FlashAttention", section 3.1 and appendix B.2).

    Parameters
    ----------
    dy : array of shape (batch, positions, heads, size)
        Gradient of the loss by the output, for this rank's positions.
    kept : RingKept
    group : Group
    memory : Memory, optional

    Returns
    -------
    dq, dk, dv : array of the shape of ``dy``

    Raises
    ------
    ValueError, TypeError
        If shapes or dtypes differ.

    Examples
    --------
    See tests/test_context.py.
    """
    q, k, v, y, log_total, balanced = kept
    check_dtypes(dy=dy, q=q)
    if dy.shape != q.shape:
        raise ValueError(f"dy has shape {dy.shape}: the attention was given {q.shape}.")
    memory, dq = memory or Memory(q.dtype), np.zeros_like(q)
    # One over the root of the size belongs to the gradient of every score: dy has it from here on.
    scaled = dy * (1 / math.sqrt(q.shape[3]))
    own = np.einsum("bphs,bphs->bhp", scaled, y)[..., np.newaxis]
    travelling = np.zeros((2, *k.shape), k.dtype)
    for source, (keys, values) in _round(group, np.stack([k, v])):
        for mine, theirs, diagonal in _meetings(group, source, q.shape[1], balanced):
            block = _first_heads(q[:, mine], keys[:, theirs], values[:, theirs], dq[:, mine])
            given = _first_heads(dy[:, mine], scaled[:, mine])
            into = _first_heads(*travelling[:, :, theirs])
            state = log_total[:, :, mine], own[:, :, mine]
            _add_block_grad(*block, *given, *state, *into, diagonal, memory)
        travelling = _pass_on(group, travelling)
    return dq, *travelling


# ---------------------------------------------------------------- the ring


def _round(group, block):
    """Each rank's block in turn, and whose it is; the next one travels while this one is used."""
    for step in range(group.size):
        last = step == group.size - 1
        coming = None if last else group.owner.background(_pass_on, group, block)
        yield (group.rank - step) % group.size, block
        block = None if last else coming.wait()


def _pass_on(group, block):
    """Give a block to the next rank, and take that of the rank before."""
    if group.size == 1:
        return block
    after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    return group.exchange(block, after, before, what="ring attention")


def _meetings(group, source, positions, balanced):
    """Which chunks of this rank's queries meet which of the keys: two slices, and the same chunk?

    Keys that are later than all queries are left out.
    """
    mine = chunks(group.rank, group.size, balanced)
    size = positions // len(mine)
    for i, query in enumerate(mine):
        for j, key in enumerate(chunks(source, group.size, balanced)):
            if key <= query:
                own = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
                yield *own, key == query


# ---------------------------------------------------------------- one block


def _add_block(q, k, v, y, highest, total, diagonal, memory):
    """Add what queries take of some keys to their result, which is not yet divided by the total."""
    scores = _scores(q, k, diagonal, memory)
    higher = np.maximum(highest, scores.max(axis=3, keepdims=True))
    scores -= higher
    np.exp(scores, out=scores)
    shrink = np.exp(highest - higher)
    total *= shrink
    total += scores.sum(axis=3, keepdims=True)
    y *= shrink
    y += scores @ v
    highest[...] = higher


def _add_block_grad(q, k, v, dq, dy, scaled, log_total, own, dk, dv, diagonal, memory):
    """Add what some queries and some keys give to each other's gradients."""
    weights = _scores(q, k, diagonal, memory)
    weights -= log_total
    np.exp(weights, out=weights)
    dv += weights.swapaxes(2, 3) @ dy
    ds = np.matmul(scaled, v.swapaxes(2, 3), out=memory.take("ds", weights.shape))
    ds -= own
    ds *= weights
    dq += ds @ k
    dk += ds.swapaxes(2, 3) @ q


def _scores(q, k, diagonal, memory):
    """Scores of some queries by some keys; of the same chunk, those of later keys do not count."""
    scores = memory.take("scores", (*q.shape[:3], k.shape[2]))
    np.matmul(q, k.swapaxes(2, 3), out=scores)
    scores *= 1 / math.sqrt(q.shape[3])
    if diagonal:
        later = np.triu(np.ones(scores.shape[2:], bool), k=1)
        np.copyto(scores, -np.inf, where=later)
    return scores


def _first_heads(*arrays):
    """Views with the heads before the positions."""
    return [array.swapaxes(1, 2) for array in arrays]


def _check(q, k, v, balanced):
    check_dtypes(q=q, k=k, v=v)
    if q.ndim != 4 or not q.shape == k.shape == v.shape:
        raise ValueError(
            f"q has shape {q.shape}, k {k.shape} and v {v.shape}: all need the same (batch, "
            "positions, heads, size)."
        )
    if balanced and q.shape[1] % 2:
        raise ValueError(
            f"a rank has {q.shape[1]} positions: balanced it holds two chunks, so take an even "
            "number."
        )
