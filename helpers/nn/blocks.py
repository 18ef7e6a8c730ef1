"""The stages of a GPT: embedding, block, head. Each can run alone, wherever its parameters are.

The form is that of GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners", section 2.3): layer norms stand before attention and before the perceptron of each block,
and the table of tokens is also that of the outputs (Press and Wolf 2017, "Using the Output
Embedding to Improve Language Models").

A stage is a pair of functions. Parameters go in as arrays with names; what the gradient needs of
the forward pass comes out beside the result, as ``kept``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from helpers.nn.layers import (
    check_dtypes,
    linear,
    linear_grad_input,
    linear_grad_weights,
    ready,
)
from helpers.nn.tokens import cross_entropy, embedding, embedding_grad
from helpers.nn.transformer import (
    attention,
    attention_grad,
    gelu,
    gelu_grad,
    layer_norm,
    layer_norm_grad,
)


class Memory:
    """Named arrays that are made when first asked for, and given again after that.

    What was in an array is lost when it is asked for again: one memory serves one pass at a time.

    Parameters
    ----------
    dtype : dtype
        Of all arrays.

    Examples
    --------
    >>> memory = Memory("f4")
    >>> first = memory.take("scores", (4, 3))
    >>> memory.take("scores", (2, 3)).base is first.base, memory.nbytes
    (True, 48)
    """

    def __init__(self, dtype):
        self.dtype = np.dtype(dtype)
        self._arrays = {}

    def take(self, name, shape):
        """The array of this name, in this shape; its contents are undefined."""
        size = math.prod(shape)
        if name not in self._arrays or self._arrays[name].size < size:
            self._arrays[name] = np.empty(size, self.dtype)
        return self._arrays[name][:size].reshape(shape)

    @property
    def nbytes(self):
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self._arrays.values())


class BlockKept(NamedTuple):
    """What `block_grad` needs of the forward pass; arrays of one row a position, but weights."""

    shape: tuple
    heads: int
    norm_1: tuple
    normed_1: np.ndarray
    qkv: np.ndarray
    mixed: np.ndarray
    weights: np.ndarray
    norm_2: tuple
    normed_2: np.ndarray
    slope: np.ndarray
    active: np.ndarray


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


def block(parameters, x, heads, out=None, memory=None, reduce=None, cache=None):
    """One block: attention and a perceptron of two layers, each added to what came in.

    ``m = x + out(attention(qkv(norm_1(x))))``, ``y = m + down(gelu(up(norm_2(m))))``.

    Parameters
    ----------
    parameters : dict
        Arrays of the names and shapes that `block_shapes` tells.
    x : array of shape (batch, length, width)
    heads : int
        Heads whose weights are here.
    out : array of the shape of ``x``, optional
        Where to write the result; may be ``x`` itself.
    memory : Memory, optional
        Where what is kept lies. Use it for nothing else before `block_grad` has run.
    reduce : function, optional
        For tensor parallelism, where a rank holds some of the heads and of the perceptron's
        columns: is given an array of shape (batch * length, width) and puts the sum of all ranks'
        arrays in its place. It is called twice here and twice in `block_grad` (Shoeybi et al. 2019,
        "Megatron-LM", section 3).
    cache : KeyValueCache, optional
        Keys and values of the positions before, see `GPT.cache`. There is no gradient then.

    Returns
    -------
    y : array of the shape of ``x``
    kept : BlockKept
        What `block_grad` needs.

    Raises
    ------
    ValueError, TypeError
        If shapes do not fit or dtypes differ.

    Examples
    --------
    >>> import numpy as np
    >>> from helpers.nn import GPT
    >>> gpt = GPT(vocabulary=5, context=4, width=2, heads=1, layers=1)
    >>> parameters, x = gpt.views(gpt.initialise(seed=0))[1], np.ones((1, 3, 2))
    >>> y, kept = block(parameters, x, heads=1)
    >>> gradient = {name: np.empty_like(array) for name, array in parameters.items()}
    >>> block_grad(parameters, kept, np.ones((1, 3, 2)), gradient).shape
    (1, 3, 2)
    """
    _check_vectors(x, parameters["norm_1_scale"])
    memory, reduce = memory or Memory(x.dtype), reduce or _alone
    y = _ready_contiguous(out, x.shape, x.dtype)
    rows, y_rows = x.reshape(-1, x.shape[2]), y.reshape(-1, x.shape[2])
    branch, *attended = _attend(parameters, rows, x.shape, heads, memory, cache)
    reduce(branch)
    branch += parameters["out_b"]
    np.add(rows, branch, out=y_rows)
    branch, *perceived = _perceive(parameters, y_rows, memory)
    reduce(branch)
    branch += parameters["down_b"]
    y_rows += branch
    return y, BlockKept(x.shape, heads, *attended, *perceived)


def block_grad(parameters, kept, dy, gradient_out, out=None, memory=None, reduce=None):
    """The gradient of `block`: that by its input, and in ``gradient_out`` that by its parameters.

    Parameters
    ----------
    parameters : dict
        What `block` was given.
    kept : BlockKept
        What `block` gave.
    dy : array of shape (batch, length, width)
        Gradient of the loss by the output.
    gradient_out : dict
        Arrays of the names and shapes of the parameters, to write into.
    out : array of the shape of ``dy``, optional
        Where to write the result; may be ``dy`` itself.
    memory : Memory, optional
        To work in; all blocks can share it.
    reduce : function, optional
        As for `block`.

    Returns
    -------
    dx : array of the shape of ``dy``

    Raises
    ------
    ValueError, TypeError
        If shapes do not fit or dtypes differ.

    Examples
    --------
    See `block`.
    """
    if dy.shape != kept.shape:
        raise ValueError(f"dy has shape {dy.shape}: the block was given {kept.shape}.")
    memory, reduce = memory or Memory(dy.dtype), reduce or _alone
    dx = _ready_contiguous(out, dy.shape, dy.dtype)
    rows, dx_rows = dy.reshape(-1, dy.shape[2]), dx.reshape(-1, dy.shape[2])
    branch = _perceive_grad(parameters, kept, rows, gradient_out, memory)
    reduce(branch)
    _normalise_grad("2", parameters, kept.norm_2, branch, gradient_out)
    np.add(rows, branch, out=dx_rows)
    branch = _attend_grad(parameters, kept, dx_rows, gradient_out, memory)
    reduce(branch)
    _normalise_grad("1", parameters, kept.norm_1, branch, gradient_out)
    dx_rows += branch
    return dx


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
    _check_vectors(x, parameters["scale"])
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
    check_dtypes(table=table, dz=kept.dz)
    dx = _ready_contiguous(out, kept.shape, table.dtype)
    rows = dx.reshape(-1, kept.shape[2])
    np.matmul(kept.dz.T, kept.normed, out=ready(table_out, table.shape, table.dtype, "table_out"))
    np.matmul(kept.dz, table, out=rows)
    layer_norm_grad(
        rows, parameters["scale"], kept.norm, gradient_out["scale"], gradient_out["shift"], rows
    )
    return dx


def block_shapes(width, inner=None, columns=None):
    """The shape of each array of a block, by name, in the order of the flat array.

    In ``qkv_w`` stand the columns of all queries, then of all keys, then of all values, head after
    head.

    Parameters
    ----------
    width : int
        Numbers of a position.
    inner : int, optional
        Numbers of all heads that are here. Default: ``width``.
    columns : int, optional
        Units of the perceptron that are here. Default: ``4 * width``.

    Returns
    -------
    dict of str to tuple

    Examples
    --------
    >>> block_shapes(width=64, inner=32, columns=128)["qkv_w"]
    (64, 96)
    """
    inner, columns = inner or width, columns or 4 * width
    return {
        "norm_1_scale": (width,),
        "norm_1_shift": (width,),
        "qkv_w": (width, 3 * inner),
        "qkv_b": (3 * inner,),
        "out_w": (inner, width),
        "out_b": (width,),
        "norm_2_scale": (width,),
        "norm_2_shift": (width,),
        "up_w": (width, columns),
        "up_b": (columns,),
        "down_w": (columns, width),
        "down_b": (width,),
    }


def named_views(flat, shapes):
    """Views into a contiguous flat array, one after the other, by name.

    Parameters
    ----------
    flat : contiguous array of one axis
    shapes : dict of str to tuple
        Such as those of `block_shapes`.

    Returns
    -------
    dict of str to array
        Writing into them writes into ``flat``.

    Raises
    ------
    ValueError
        If ``flat`` has another size than all views together, or is not contiguous.

    Examples
    --------
    >>> import numpy as np
    >>> named_views(np.arange(3.0), {"w": (1, 2), "b": (1,)})
    {'w': array([[0., 1.]]), 'b': array([2.])}
    """
    stops = np.cumsum([math.prod(shape) for shape in shapes.values()]).tolist()
    if flat.shape != (stops[-1],) or not flat.flags.c_contiguous:
        raise ValueError(
            f"the flat array has shape {flat.shape}: give a contiguous one of ({stops[-1]},)."
        )
    bounds = zip([0, *stops], stops, shapes.items())
    return {name: flat[start:stop].reshape(shape) for start, stop, (name, shape) in bounds}


# ---------------------------------------------------------------- parts of a block


def _attend(parameters, rows, shape, heads, memory, cache):
    """What attention adds (without its bias, which comes after the sum over ranks)."""
    norm, normed = _normalise("1", parameters, rows, memory)
    qkv_w, out_w = parameters["qkv_w"], parameters["out_w"]
    qkv = memory.take("qkv", (len(rows), qkv_w.shape[1]))
    linear(normed, qkv_w, parameters["qkv_b"], out=qkv)
    q, k, v = _split(qkv, shape, heads)
    if cache is not None:
        k, v = cache.append(k, v)
    weights = memory.take("weights", (shape[0], heads, shape[1], k.shape[1]))
    mixed = memory.take("mixed", (len(rows), qkv.shape[1] // 3))
    attention(q, k, v, mixed.reshape(q.shape), weights)
    branch = np.matmul(mixed, out_w, out=memory.take("branch", rows.shape))
    return branch, norm, normed, qkv, mixed, weights


def _attend_grad(parameters, kept, dy, gradient_out, memory):
    """The gradient of `_attend` by the output of its layer norm."""
    linear_grad_weights(dy, kept.mixed, gradient_out["out_w"], gradient_out["out_b"])
    d_mixed = memory.take("d_mixed", kept.mixed.shape)
    linear_grad_input(dy, parameters["out_w"], d_mixed)
    d_qkv = memory.take("d_qkv", kept.qkv.shape)
    q, k, v = _split(kept.qkv, kept.shape, kept.heads)
    d_y, y = d_mixed.reshape(q.shape), kept.mixed.reshape(q.shape)
    attention_grad(d_y, q, k, v, y, kept.weights, *_split(d_qkv, kept.shape, kept.heads))
    linear_grad_weights(d_qkv, kept.normed_1, gradient_out["qkv_w"], gradient_out["qkv_b"])
    return linear_grad_input(d_qkv, parameters["qkv_w"], memory.take("d_normed", dy.shape))


def _perceive(parameters, rows, memory):
    """What the perceptron adds (without its last bias, which comes after the sum over ranks)."""
    norm, normed = _normalise("2", parameters, rows, memory)
    raised = memory.take("slope", (len(rows), parameters["up_w"].shape[1]))
    linear(normed, parameters["up_w"], parameters["up_b"], out=raised)
    # The derivative takes the place of the input, which nothing needs any more.
    active = gelu(raised, out=memory.take("active", raised.shape), slope=raised)
    branch = np.matmul(active, parameters["down_w"], out=memory.take("branch", rows.shape))
    return branch, norm, normed, raised, active


def _perceive_grad(parameters, kept, dy, gradient_out, memory):
    """The gradient of `_perceive` by the output of its layer norm."""
    linear_grad_weights(dy, kept.active, gradient_out["down_w"], gradient_out["down_b"])
    d_active = memory.take("d_active", kept.active.shape)
    linear_grad_input(dy, parameters["down_w"], d_active)
    d_raised = gelu_grad(d_active, kept.slope, out=d_active)
    linear_grad_weights(d_raised, kept.normed_2, gradient_out["up_w"], gradient_out["up_b"])
    return linear_grad_input(d_raised, parameters["up_w"], memory.take("d_normed", dy.shape))


def _normalise(number, parameters, rows, memory):
    """One of the two layer norms of a block: what it keeps, and its output."""
    scale, shift = parameters[f"norm_{number}_scale"], parameters[f"norm_{number}_shift"]
    out = memory.take(f"normed_{number}", rows.shape)
    _, kept = layer_norm(rows, scale, shift, out, memory.take(f"norm_{number}", rows.shape))
    return kept, out


def _normalise_grad(number, parameters, kept, dy, gradient_out):
    """Its gradient; that by its input takes the place of ``dy``."""
    scale, shift = f"norm_{number}_scale", f"norm_{number}_shift"
    layer_norm_grad(dy, parameters[scale], kept, gradient_out[scale], gradient_out[shift], dx=dy)


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


def _split(qkv, shape, heads):
    """Queries, keys and values as views of shape (batch, length, heads, size)."""
    batch, length, _ = shape
    if qkv.shape[1] % (3 * heads):
        raise ValueError(f"{qkv.shape[1]} columns of qkv_w do not split over {heads} heads.")
    parts = qkv.reshape(batch, length, 3, heads, qkv.shape[1] // (3 * heads))
    return parts[:, :, 0], parts[:, :, 1], parts[:, :, 2]


def _check_vectors(x, scale):
    check_dtypes(x=x, scale=scale)
    if x.ndim != 3 or x.shape[2:] != scale.shape or not x.flags.c_contiguous:
        raise ValueError(
            f"x has shape {x.shape}: give one contiguous array of (batch, length, {len(scale)})."
        )


def _ready_contiguous(out, shape, dtype):
    """As `ready`, for an array whose rows are written through a reshaped view."""
    out = ready(out, shape, dtype)
    if not out.flags.c_contiguous:
        raise ValueError("out is not contiguous: a reshaped view of it would be a copy.")
    return out


def _alone(branch):
    """The sum over ranks, where there is one."""
