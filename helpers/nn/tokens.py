"""Where a network meets tokens: the embedding at its start, the cross-entropy at its end."""

from __future__ import annotations

import numpy as np

from helpers.nn.layers import check_dtypes, check_integers, ready
from helpers.nn.losses import softmax_loss

# The target of a position that does not count, such as padding.
IGNORE = -1


def embedding(tokens, table, positions, start=0, out=None):
    """The rows of a table that tokens name, plus those of their positions.

    Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", equation 2.

    Parameters
    ----------
    tokens : integer array of shape (batch, length)
        From 0 to vocabulary - 1.
    table : array of shape (vocabulary, width)
    positions : array of shape (context, width), of the same dtype
    start : int
        The position of the first token.
    out : array of shape (batch, length, width), optional
        Where to write the result.

    Returns
    -------
    array of shape (batch, length, width)

    Raises
    ------
    ValueError
        If shapes do not fit, a token is not in the table, or a position is beyond the context.
    TypeError
        If tokens are no integers, or dtypes differ.

    Examples
    --------
    >>> import numpy as np
    >>> table, positions = np.array([[1.0], [2.0]]), np.array([[0.1], [0.2]])
    >>> embedding(np.array([[1, 0]]), table, positions).tolist()
    [[[2.1], [1.2]]]
    """
    check_dtypes(table=table, positions=positions)
    if table.ndim != 2 or positions.ndim != 2 or table.shape[1] != positions.shape[1]:
        raise ValueError(
            f"table has shape {table.shape} and positions {positions.shape}: "
            "give (vocabulary, width) and (context, width)."
        )
    tokens = check_tokens(tokens, len(table))
    stop = start + tokens.shape[1]
    if stop > len(positions):
        raise ValueError(f"the text goes to position {stop}: the context has {len(positions)}.")
    out = ready(out, (*tokens.shape, table.shape[1]), table.dtype)
    # All tokens are in the table; with "clip" take needs no copy of its result.
    np.take(table, tokens, axis=0, out=out, mode="clip")
    return np.add(out, positions[start:stop], out=out)


def embedding_grad(dy, tokens, dtable, dpositions, add=False, one_hot=None):
    """The gradient of `embedding` by the table and the positions, for text that starts at 0.

    A row of the table gets the sum of ``dy`` over all places where its token stands.

    Parameters
    ----------
    dy : array of shape (batch, length, width)
        Gradient of the loss by the output.
    tokens : integer array of shape (batch, length)
    dtable : array of shape (vocabulary, width)
        Where to write the gradient by the table.
    dpositions : array of shape (context, width)
        Where to write that by the positions; those beyond the text have 0.
    add : bool
        Add to what stands in ``dtable``: a table that is tied to the output has a gradient of two
        parts.
    one_hot : array of shape (batch * length, vocabulary), optional
        Memory to work in.

    Returns
    -------
    dtable, dpositions : array

    Raises
    ------
    ValueError, TypeError
        If shapes do not fit, dtypes differ, or a token is not in the table.

    Examples
    --------
    >>> import numpy as np
    >>> dy = np.array([[[1.0], [2.0], [4.0]]])
    >>> dtable, dpositions = np.empty((3, 1)), np.empty((4, 1))
    >>> _ = embedding_grad(dy, np.array([[1, 0, 1]]), dtable, dpositions)
    >>> dtable.ravel().tolist(), dpositions.ravel().tolist()
    ([2.0, 5.0, 0.0], [1.0, 2.0, 4.0, 0.0])
    """
    check_dtypes(dy=dy, dtable=dtable, dpositions=dpositions)
    tokens = check_tokens(tokens, len(dtable))
    width, length = dtable.shape[1], tokens.shape[1]
    if dy.shape != (*tokens.shape, width) or dpositions.shape[1:] != (width,):
        raise ValueError(
            f"dy has shape {dy.shape}, tokens {tokens.shape}, dtable {dtable.shape} and dpositions "
            f"{dpositions.shape}: give (batch, length, width), (batch, length), twice (…, width)."
        )
    if length > len(dpositions):
        raise ValueError(f"the text goes to position {length}: the context has {len(dpositions)}.")
    # This product sums quicker than np.add.at, and is no larger than that of the output.
    one_hot = ready(one_hot, (tokens.size, len(dtable)), dy.dtype, "one_hot")
    one_hot[:] = 0
    one_hot[np.arange(tokens.size), tokens.ravel()] = 1
    rows = dy.reshape(-1, width)
    if add:
        dtable += one_hot.T @ rows
    else:
        np.matmul(one_hot.T, rows, out=dtable)
    np.sum(dy, axis=0, out=dpositions[:length])
    dpositions[length:] = 0
    return dtable, dpositions


def cross_entropy(z, targets, divisor=None, out=None):
    """`helpers.nn.softmax_loss` over a vocabulary, where a target of -1 does not count.

    Parameters
    ----------
    z : float array of shape (n, vocabulary)
    targets : integer array of shape (n,)
        The token that comes next, or -1 where none is asked for, as in padding.
    divisor, out
        As for `helpers.nn.softmax_loss`, as are the results and the errors. A rank with a shard of
        a batch gives the number of targets that count in the whole batch.

    Examples
    --------
    >>> import numpy as np
    >>> value, dz = cross_entropy(np.zeros((2, 2)), np.array([1, -1]))
    >>> round(value, 3), dz.tolist()
    (0.693, [[0.5, -0.5], [0.0, 0.0]])
    """
    return softmax_loss(z, targets, divisor, out, ignore=IGNORE)


def check_tokens(tokens, vocabulary):
    """The tokens as an integer array of shape (batch, length), each of them in the vocabulary."""
    tokens = check_integers("tokens", tokens, vocabulary)
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ValueError(
            f"tokens have shape {tokens.shape}: give (batch, length), with at least one token each."
        )
    return tokens
