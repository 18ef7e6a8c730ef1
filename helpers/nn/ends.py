"""The two ends of a GPT: tokens become vectors, and vectors become scores and a loss.

Both use the same table of tokens (Press and Wolf 2017, "Using the Output Embedding to Improve
Language Models"). Each end is a pair of functions that can run alone, wherever its parameters are.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from helpers.nn.blocks import Memory, check_vectors, ready_contiguous
from helpers.nn.layers import check_dtypes, ready
from helpers.nn.tokens import cross_entropy, embedding, embedding_grad
from helpers.nn.transformer import layer_norm, layer_norm_grad


class HeadKept(NamedTuple):
    """What `head_loss_grad` needs of the forward pass."""

    shape: tuple
    norm: tuple
    normed: np.ndarray
    dz: np.ndarray


def embed(parameters, tokens, start=0, out=None):
    """The first stage: tokens become vectors.

    Parameters
    ----------
    parameters : dict
        ``tokens`` of shape (vocabulary, width) and ``positions`` of shape (context, width).
    tokens, start, out
        As for `helpers.nn.embedding`.

    Returns
    -------
    array of shape (batch, length, width)

    Raises
    ------
    ValueError, TypeError
        As for `helpers.nn.embedding`.

    Examples
    --------
    >>> import numpy as np
    >>> from helpers.nn import GPT
    >>> gpt = GPT(vocabulary=5, context=4, width=2, heads=1, layers=1)
    >>> parts = gpt.views(gpt.initialise(seed=0))
    >>> embed(parts[0], np.array([[0, 1, 2]])).shape
    (1, 3, 2)
    """
    return embedding(tokens, parameters["tokens"], parameters["positions"], start, out)


def embed_grad(tokens, dy, gradient_out, add=False, memory=None):
    """The gradient of `embed`, written into ``gradient_out``.

    Parameters
    ----------
    tokens : integer array of shape (batch, length)
    dy : array of shape (batch, length, width)
    gradient_out : dict
        Arrays of the names and shapes of the parameters, to write into.
    add : bool
        Add to the gradient of the table that `head_loss_grad` has written there.
    memory : Memory, optional

    Raises
    ------
    ValueError, TypeError
        As for `helpers.nn.embedding_grad`.

    Examples
    --------
    >>> import numpy as np
    >>> gradient = {"tokens": np.empty((3, 1)), "positions": np.empty((4, 1))}
    >>> embed_grad(np.array([[1, 1]]), np.ones((1, 2, 1)), gradient)
    >>> gradient["tokens"].ravel().tolist()
    [0.0, 2.0, 0.0]
    """
    memory = memory or Memory(dy.dtype)
    table = gradient_out["tokens"]
    one_hot = memory.take("one_hot", (np.size(tokens), len(table)))
    embedding_grad(dy, tokens, table, gradient_out["positions"], add, one_hot)


def head_loss(parameters, table, x, targets, divisor=None, memory=None):
    """The last stage: the final norm, scores by the table of tokens, and the cross-entropy.

    Parameters
    ----------
    parameters : dict
        ``scale`` and ``shift`` of the final norm, of shape (width,).
    table : array of shape (vocabulary, width)
        The table of tokens, which is tied to the output.
    x : array of shape (batch, length, width)
    targets : integer array of shape (batch, length)
        The token that comes next, or -1 where none is asked for.
    divisor : number, optional
        As for `helpers.nn.cross_entropy`.
    memory : Memory, optional
        Where what is kept lies.

    Returns
    -------
    loss : float
    kept : HeadKept
        What `head_loss_grad` needs.

    Raises
    ------
    ValueError, TypeError
        If shapes do not fit, dtypes differ, or a target is no token.

    Examples
    --------
    >>> import numpy as np
    >>> norm = {"scale": np.ones(2), "shift": np.zeros(2)}
    >>> table, gradient = np.zeros((5, 2)), np.empty((5, 2))
    >>> loss, kept = head_loss(norm, table, np.ones((1, 3, 2)), np.array([[0, 4, -1]]))
    >>> round(loss, 3)
    1.609
    >>> norm_gradient = {"scale": np.empty(2), "shift": np.empty(2)}
    >>> head_loss_grad(norm, table, kept, norm_gradient, gradient).shape
    (1, 3, 2)
    """
    check_vectors(x, parameters["scale"])
    targets = np.asarray(targets)
    if targets.shape != x.shape[:2]:
        raise ValueError(f"targets have shape {targets.shape}: they need that of the text.")
    memory = memory or Memory(x.dtype)
    z, norm, normed = head_scores(parameters, table, x, memory)
    loss, dz = cross_entropy(z, targets.ravel(), divisor, out=z)
    return loss, HeadKept(x.shape, norm, normed, dz)


def head_loss_grad(parameters, table, kept, gradient_out, table_out, out=None):
    """The gradient of `head_loss`: that by its input, and by its parameters in the given arrays.

    Parameters
    ----------
    parameters : dict
    table : array of shape (vocabulary, width)
        What `head_loss` was given.
    kept : HeadKept
        What `head_loss` gave.
    gradient_out : dict
        Arrays ``scale`` and ``shift``, to write into.
    table_out : array of the shape of ``table``
        Where to write the output's part of the table's gradient.
    out : array of shape (batch, length, width), optional
        Where to write the result.

    Returns
    -------
    dx : array of shape (batch, length, width)

    Raises
    ------
    ValueError, TypeError
        If shapes do not fit or dtypes differ.

    Examples
    --------
    See `head_loss`.
    """
    dx, d_norm = head_loss_grad_input(parameters, table, kept, out)
    head_loss_grad_weights(kept, d_norm, gradient_out, table_out)
    return dx


def head_loss_grad_input(parameters, table, kept, out=None):
    """The half of `head_loss_grad` for which the last block waits.

    Returns
    -------
    dx : array of shape (batch, length, width)
    d_norm : (array, array)
        For `head_loss_grad_weights`: the gradients by scale and shift.
    """
    check_dtypes(table=table, dz=kept.dz)
    dx = ready_contiguous(out, kept.shape, table.dtype)
    rows = dx.reshape(-1, kept.shape[2])
    np.matmul(kept.dz, table, out=rows)
    dscale, dshift, _ = layer_norm_grad(rows, parameters["scale"], kept.norm, dx=rows)
    return dx, (dscale, dshift)


def head_loss_grad_weights(kept, d_norm, gradient_out, table_out):
    """The half of `head_loss_grad` for which nobody waits."""
    shape = kept.dz.shape[1], kept.normed.shape[1]
    np.matmul(kept.dz.T, kept.normed, out=ready(table_out, shape, kept.dz.dtype, "table_out"))
    gradient_out["scale"][:], gradient_out["shift"][:] = d_norm


def head_scores(parameters, table, x, memory):
    """The final norm and the scores by the table."""
    rows = x.reshape(-1, x.shape[2])
    check_dtypes(x=x, table=table)
    if table.ndim != 2 or table.shape[1] != x.shape[2]:
        raise ValueError(
            f"table has shape {table.shape} and x {x.shape}: both need the same width."
        )
    normed, norm = layer_norm(
        rows,
        parameters["scale"],
        parameters["shift"],
        memory.take("normed", rows.shape),
        memory.take("norm", rows.shape),
    )
    z = memory.take("z", (len(rows), len(table)))
    return np.matmul(normed, table.T, out=z), norm, normed
