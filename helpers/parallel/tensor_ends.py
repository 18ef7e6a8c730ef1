"""The two ends of a GPT with the table of tokens cut by rows; see `helpers.parallel.tensor`."""

from __future__ import annotations

import numpy as np

from helpers.engine.collectives import all_gather, all_reduce
from helpers.nn.blocks import Memory, check_vectors, ready_contiguous
from helpers.nn.ends import HeadKept, head_loss_grad_weights
from helpers.nn.layers import check_dtypes, check_integers
from helpers.nn.tokens import IGNORE, check_tokens
from helpers.nn.transformer import layer_norm, layer_norm_grad
from helpers.parallel.tensor_exchange import TensorParallel


def embed(parameters, tokens, group, start=0, out=None, exchange=None):
    """Tokens become vectors, with the table of tokens cut by rows.

    A rank looks up the tokens that it holds, and has 0 for the others; the sum over the ranks is
    what one rank with the whole table would have.

    Parameters
    ----------
    parameters : dict
        ``tokens`` of shape (vocabulary / ranks, width) and ``positions`` of shape (context, width).
    tokens : integer array of shape (batch, length)
        The same on all ranks.
    group : Group
    start : int
        The position of the first token.
    out : array of the shape of the result, optional
    exchange : TensorParallel or SequenceParallel, optional
        Default: ``TensorParallel(group)``.

    Returns
    -------
    array of shape (batch, length, width)
        With `SequenceParallel` (batch, length / ranks, width).

    Raises
    ------
    ValueError, TypeError
        As for `helpers.nn.embedding`.

    Examples
    --------
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> def program(rank):
    ...     mine = {"tokens": np.array([[1.0 + rank.index]]), "positions": np.zeros((2, 1))}
    ...     return embed(mine, np.array([[1, 0]]), rank.tensor).ravel().tolist()
    >>> spmd.run(None, Mesh(tensor=2), program).results
    [[2.0, 1.0], [2.0, 1.0]]
    """
    table, positions = parameters["tokens"], parameters["positions"]
    exchange = exchange or TensorParallel(group)
    check_dtypes(tokens=table, positions=positions)
    local, here = _here(check_tokens(tokens, len(table) * group.size), len(table), group)
    if start + local.shape[1] > len(positions):
        raise ValueError(
            f"the text goes to position {start + local.shape[1]}: the context has {len(positions)}."
        )
    mine = exchange.positions(local.shape[1])
    x = np.take(table, local, axis=0)
    x[~here] = 0
    x = exchange.leave(x)
    return np.add(x, positions[start:][mine], out=ready_contiguous(out, x.shape, x.dtype))


def embed_grad(tokens, dy, gradient_out, group, add=False, memory=None, exchange=None):
    """The gradient of `embed`, written into ``gradient_out``.

    Parameters
    ----------
    tokens : integer array of shape (batch, length)
    dy : array of the shape of the result of `embed`
    gradient_out : dict
        Arrays of the names and shapes of the parameters, to write into.
    group : Group
    add : bool
        Add to the gradient of the table that `head_loss_grad` has written there.
    memory : Memory, optional
    exchange : TensorParallel or SequenceParallel, optional

    Raises
    ------
    ValueError, TypeError
        If shapes do not fit, dtypes differ, or a token is not in the vocabulary.

    Examples
    --------
    See tests/test_tensor.py.
    """
    table, positions = gradient_out["tokens"], gradient_out["positions"]
    dy = (exchange or TensorParallel(group)).leave_grad(dy)
    check_dtypes(dy=dy, tokens=table, positions=positions)
    local, here = _here(check_tokens(tokens, len(table) * group.size), len(table), group)
    if dy.shape != (*local.shape, table.shape[1]):
        raise ValueError(f"dy has shape {dy.shape}: tokens {local.shape} need one vector each.")
    one_hot = (memory or Memory(dy.dtype)).take("one_hot", (local.size, len(table)))
    one_hot[:] = 0
    one_hot[np.arange(local.size), local.ravel()] = here.ravel()
    rows = dy.reshape(-1, table.shape[1])
    if add:
        table += one_hot.T @ rows
    else:
        np.matmul(one_hot.T, rows, out=table)
    length = local.shape[1]
    np.sum(dy, axis=0, out=positions[:length])
    positions[length:] = 0


def head_loss(parameters, table, x, targets, group, divisor=None, memory=None, exchange=None):
    """The final norm, scores by the table of tokens, and the cross-entropy, cut by the vocabulary.

    The scores of a rank are those of its tokens, and stay there. What travels are three numbers a
    position: the largest score, the sum of the exponentials, and the score of the target (Shoeybi
    et al. 2019, section 3, the fused cross-entropy).

    Parameters
    ----------
    parameters : dict
        ``scale`` and ``shift`` of the final norm, of shape (width,).
    table : array of shape (vocabulary / ranks, width)
        This rank's rows of the table of tokens.
    x : array of shape (batch, length, width)
        With `SequenceParallel` this rank's positions only.
    targets : integer array of shape (batch, length)
        The token that comes next, or -1 where none is asked for; of all positions, on all ranks.
    group : Group
    divisor : number, optional
        As for `helpers.nn.cross_entropy`.
    memory : Memory, optional
        Where what is kept lies.
    exchange : TensorParallel or SequenceParallel, optional

    Returns
    -------
    loss : float
        The same on all ranks.
    kept : HeadKept
        What `head_loss_grad` needs.

    Raises
    ------
    ValueError, TypeError
        If shapes do not fit, dtypes differ, or a target is no token.

    Examples
    --------
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> norm, targets = {"scale": np.ones(2), "shift": np.zeros(2)}, np.array([[0, 3, -1]])
    >>> def program(rank):
    ...     x, table = np.ones((1, 3, 2)), np.zeros((2, 2))
    ...     return round(head_loss(norm, table, x, targets, rank.tensor)[0], 3)
    >>> spmd.run(None, Mesh(tensor=2), program).results  # the logarithm of 4
    [1.386, 1.386]
    """
    exchange, memory = exchange or TensorParallel(group), memory or Memory(x.dtype)
    z, norm, normed = _scores(parameters, table, x, memory, exchange)
    targets = np.asarray(targets)
    if targets.shape != normed.shape[:2]:
        raise ValueError(
            f"targets have shape {targets.shape}: they need that of the text, {normed.shape[:2]}."
        )
    loss, dz = _cross_entropy(z, targets.ravel(), group, divisor)
    return loss, HeadKept(x.shape, norm, normed.reshape(len(z), -1), dz)


def head_loss_grad(
    parameters, table, kept, gradient_out, table_out, group, out=None, exchange=None
):
    """The gradient of `head_loss`: that by its input, and by its parameters in the given arrays.

    Parameters
    ----------
    parameters, table, group, exchange
        What `head_loss` was given.
    kept : HeadKept
        What `head_loss` gave.
    gradient_out : dict
        Arrays ``scale`` and ``shift``, to write into.
    table_out : array of the shape of ``table``
        Where to write the output's part of the table's gradient.
    out : array of the shape of ``x``, optional
        Where to write the result.

    Returns
    -------
    dx : array of the shape of ``x``

    Raises
    ------
    ValueError, TypeError
        If shapes do not fit or dtypes differ.

    Examples
    --------
    See tests/test_tensor.py.
    """
    dx, d_norm = head_loss_grad_input(parameters, table, kept, group, out, exchange)
    head_loss_grad_weights(kept, d_norm, gradient_out, table_out)
    return dx


def head_loss_grad_input(parameters, table, kept, group, out=None, exchange=None):
    """The half of `head_loss_grad` for which the last block waits; the other half is that of
    `helpers.nn.ends`: it needs no exchange.

    Returns
    -------
    dx : array of the shape of ``x``
    d_norm : (array, array)
        For `head_loss_grad_weights`: the gradients by scale and shift.
    """
    check_dtypes(table=table, dz=kept.dz)
    exchange = exchange or TensorParallel(group)
    d_normed = (kept.dz @ table).reshape(kept.shape[0], -1, kept.shape[2])
    d_normed = exchange.enter_grad(d_normed)
    dx = ready_contiguous(out, kept.shape, table.dtype)
    rows, dx_rows = (array.reshape(-1, kept.shape[2]) for array in (d_normed, dx))
    dscale, dshift, _ = layer_norm_grad(rows, parameters["scale"], kept.norm, dx=dx_rows)
    return dx, (dscale, dshift)


def head_scores(parameters, table, x, group, memory=None):
    """The scores of all tokens on all ranks, gathered: for generating text only.

    Parameters
    ----------
    parameters, table, x, group, memory
        As for `head_loss`.

    Returns
    -------
    array of shape (batch, length, vocabulary)

    Examples
    --------
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> norm, x = {"scale": np.zeros(1), "shift": np.ones(1)}, np.zeros((1, 1, 1))
    >>> def program(rank):
    ...     table = np.array([[1.0 + rank.index]])
    ...     return head_scores(norm, table, x, rank.tensor).ravel().tolist()
    >>> spmd.run(None, Mesh(tensor=2), program).results
    [[1.0, 2.0], [1.0, 2.0]]
    """
    z, _, _ = _scores(parameters, table, x, memory or Memory(x.dtype), TensorParallel(group))
    if group.size > 1:
        with group.owner.record("all_gather", nbytes=group.size * z.nbytes):
            parts = all_gather(group, z[np.newaxis], alike=True)
        z = parts.swapaxes(0, 1)
    return z.reshape(*x.shape[:2], -1)


def _here(tokens, count, group):
    """The numbers of tokens among the `count` of this rank (0 for others), and which are here."""
    local = tokens.astype(np.int64) - group.rank * count  # small integers would overflow
    here = (local >= 0) & (local < count)
    return np.where(here, local, 0), here


def _scores(parameters, table, x, memory, exchange):
    """The final norm of this rank's positions, and the scores of its tokens at all positions."""
    check_vectors(x, parameters["scale"])
    check_dtypes(x=x, table=table)
    if table.ndim != 2 or table.shape[1] != x.shape[2]:
        raise ValueError(
            f"table has shape {table.shape} and x {x.shape}: both need the same width."
        )
    rows = x.reshape(-1, x.shape[2])
    out, place = memory.take("normed", rows.shape), memory.take("norm", rows.shape)
    _, norm = layer_norm(rows, parameters["scale"], parameters["shift"], out, place)
    normed = exchange.enter(out.reshape(x.shape))
    z = memory.take("z", (normed.shape[0] * normed.shape[1], len(table)))
    np.matmul(normed.reshape(len(z), -1), table.T, out=z)
    return z, norm, normed


def _cross_entropy(z, targets, group, divisor):
    """The loss, and its gradient in place of the scores of this rank's tokens."""
    counts = check_integers("targets", targets, z.shape[1] * group.size, IGNORE) != IGNORE
    divisor = np.count_nonzero(counts) if divisor is None else divisor
    if not divisor > 0:
        raise ValueError(f"the divisor is {divisor}: give a positive one, or a target that counts.")
    rows, (at, here) = np.arange(len(z)), _here(targets, z.shape[1], group)
    z -= _combined(group, z.max(axis=1), "max")[:, np.newaxis]
    score = _combined(group, np.where(here, z[rows, at], 0))
    total = _combined(group, np.exp(z, out=z).sum(axis=1))
    value = np.log(total) - score
    z *= ((counts / divisor).astype(z.dtype) / total)[:, np.newaxis]
    z[rows, at] -= (here / divisor).astype(z.dtype)
    return float(np.sum(value[counts], dtype=np.float64) / divisor), z


def _combined(group, numbers, operation="sum"):
    """One number a position, combined over the ranks."""
    if group.size == 1:
        return numbers
    with group.owner.record("all_reduce", nbytes=numbers.nbytes):
        return all_reduce(group, numbers, out=numbers, operation=operation)
