"""The blocks of a GPT. Each can run alone, wherever its parameters are, and be cut over ranks.

The form is that of GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners", section 2.3). A block has two halves, attention and a perceptron, and each adds to what
came in: ``x + branch(norm(x))``.

A half is a pair of functions. Parameters go in as arrays with names; what the gradient needs of
the forward pass comes out beside the result, as ``kept``. The gradient is there in one function,
or in two (Qi et al. 2024, "Zero bubble pipeline parallelism", section 2): that by the input, for
which the block before waits, and that by the weights, for which nobody waits.
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
from helpers.nn.transformer import (
    attention,
    attention_grad,
    attention_weights,
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
    scratch : Memory, optional
        For what is needed for a moment only; several memories can share one. Default: itself.

    Examples
    --------
    >>> memory = Memory("f4")
    >>> first = memory.take("scores", (4, 3))
    >>> memory.take("scores", (2, 3)).base is first.base, memory.nbytes
    (True, 48)
    """

    def __init__(self, dtype, scratch=None):
        self.dtype = np.dtype(dtype)
        self._arrays, self._scratch = {}, scratch

    @property
    def scratch(self):
        """Where arrays lie that are needed for a moment only."""
        # Not an attribute that holds itself: such a memory would outlive its pass.
        return self if self._scratch is None else self._scratch

    def take(self, name, shape):
        """The array of this name, in this shape; its contents are undefined."""
        size = math.prod(shape)
        if name not in self._arrays or self._arrays[name].size < size:
            self._arrays[name] = np.empty(size, self.dtype)
        return self._arrays[name][:size].reshape(shape)

    @property
    def nbytes(self):
        """Bytes of all arrays, without those of another scratch."""
        return sum(array.nbytes for array in self._arrays.values())


class Alone:
    """What a half block exchanges with other ranks where there are none: nothing.

    Tensor parallelism puts another object in its place (Shoeybi et al. 2019, "Megatron-LM", section
    3; there ``enter`` is called f, and ``leave`` is called g). Each method takes and returns an
    array of shape (batch, length, width).
    """

    def enter(self, x):
        """Before the matrix that is cut by columns."""
        return x

    def leave(self, x):
        """After the matrix that is cut by rows; what each rank gives is a part of a sum."""
        return x

    def leave_grad(self, dy):
        """The gradient of `leave`."""
        return dy

    def enter_grad(self, dx):
        """The gradient of `enter`; what each rank gives is a part of a sum."""
        return dx


ALONE = Alone()


class AttendKept(NamedTuple):
    """What `attend_grad` needs of the forward pass; arrays of one row a position, but weights.

    ``normed`` has three axes. ``weights`` is None where they are computed again.
    """

    shape: tuple
    heads: int
    norm: tuple
    normed: np.ndarray
    qkv: np.ndarray
    mixed: np.ndarray
    weights: np.ndarray | None


class PerceiveKept(NamedTuple):
    """What `perceive_grad` needs of the forward pass; arrays of one row a position.

    ``normed`` has three axes.
    """

    shape: tuple
    norm: tuple
    normed: np.ndarray
    slope: np.ndarray
    active: np.ndarray


class BlockKept(NamedTuple):
    """What `block_grad` needs of the forward pass."""

    attend: AttendKept
    perceive: PerceiveKept


class Later(NamedTuple):
    """What the gradient by the weights of a half needs beside what was kept.

    Attributes
    ----------
    entered : array of shape (positions, width)
        What the matrix that is cut by columns was given. Of ranks that share the positions none
        keeps it all: it is gathered again (Korthikanti et al. 2022, section 4.2.2).
    d_branch : array of shape (positions, width)
        Gradient by what the branch gave.
    d_inner : array of shape (positions, columns)
        Gradient by what the matrix that is cut by columns gave.
    d_norm : (array, array)
        Gradients by scale and shift.
    """

    entered: np.ndarray
    d_branch: np.ndarray
    d_inner: np.ndarray
    d_norm: tuple


# ---------------------------------------------------------------- attention


def attend(
    parameters,
    x,
    heads,
    out=None,
    memory=None,
    exchange=ALONE,
    cache=None,
    keep_weights=True,
):
    """The first half of a block: ``x + out(attention(qkv(norm_1(x))))``.

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
        Where what is kept lies. Use it for nothing else before the gradient has been taken.
    exchange : Alone
        What the ranks exchange that share the heads.
    cache : KeyValueCache, optional
        Keys and values of the positions before, see `GPT.cache`. There is no gradient then.
    keep_weights : bool
        False: the attention weights, which take the most memory, are computed again for the
        gradient (Korthikanti et al. 2022, "Reducing activation recomputation in large transformer
        models", section 5: selective recomputation).

    Returns
    -------
    y : array of the shape of ``x``
    kept : AttendKept

    Raises
    ------
    ValueError, TypeError
        If shapes do not fit or dtypes differ.

    Examples
    --------
    See `block`.
    """
    check_vectors(x, parameters["norm_1_scale"])
    memory, y = memory or Memory(x.dtype), ready_contiguous(out, x.shape, x.dtype)
    norm, normed = _normalise("1", parameters, x, memory)
    entered = exchange.enter(normed)
    rows = _rows(entered)
    qkv = memory.take("qkv", (len(rows), parameters["qkv_w"].shape[1]))
    linear(rows, parameters["qkv_w"], parameters["qkv_b"], out=qkv)
    q, k, v = _split(qkv, entered.shape, heads)
    if cache is not None:
        k, v = cache.append(k, v)
    mixed = memory.take("mixed", (len(rows), qkv.shape[1] // 3))
    place = memory if keep_weights else memory.scratch
    weights = place.take("weights", (q.shape[0], heads, q.shape[1], k.shape[1]))
    attention(q, k, v, mixed.reshape(q.shape), weights)
    branch = memory.scratch.take("branch", entered.shape)
    np.matmul(mixed, parameters["out_w"], out=_rows(branch))
    branch = exchange.leave(branch)
    branch += parameters["out_b"]
    np.add(x, branch, out=y)
    return y, AttendKept(
        x.shape, heads, norm, normed, qkv, mixed, weights if keep_weights else None
    )


def attend_grad_input(parameters, kept, dy, out=None, memory=None, exchange=ALONE):
    """The gradient of `attend` by its input.

    Parameters
    ----------
    parameters : dict
        What `attend` was given.
    kept : AttendKept
        What `attend` gave.
    dy : array of shape (batch, length, width)
        Gradient of the loss by the output.
    out : array of the shape of ``dy``, optional
        Where to write the result; not ``dy`` itself.
    memory : Memory, optional
        Where to work, and where what is needed later lies.
    exchange : Alone
        As for `attend`.

    Returns
    -------
    dx : array of the shape of ``dy``
    later : Later
        For `attend_grad_weights`. Until then leave ``dy`` and the memory alone.

    Raises
    ------
    ValueError, TypeError
        If shapes do not fit or dtypes differ.

    Examples
    --------
    See `block_grad_input`.
    """
    return _input_half(_attend_back, parameters, kept, dy, out, memory, exchange)


def attend_grad_weights(kept, later, gradient_out):
    """The gradient of `attend` by its parameters, written into ``gradient_out``.

    Parameters
    ----------
    kept : AttendKept
    later : Later
    gradient_out : dict
        Arrays of the names and shapes of the parameters. Those of the other half are left alone.

    Examples
    --------
    See `block_grad_input`.
    """
    linear_grad_weights(later.d_branch, kept.mixed, gradient_out["out_w"], gradient_out["out_b"])
    linear_grad_weights(later.d_inner, later.entered, gradient_out["qkv_w"], gradient_out["qkv_b"])
    gradient_out["norm_1_scale"][:], gradient_out["norm_1_shift"][:] = later.d_norm


def attend_grad(parameters, kept, dy, gradient_out, out=None, memory=None, exchange=ALONE):
    """Both gradients of `attend`.

    Parameters, result and errors are those of `attend_grad_input` and `attend_grad_weights`, but
    ``out`` may be ``dy`` itself.
    """
    halves = _attend_back, attend_grad_weights
    return _both_halves(*halves, parameters, kept, dy, gradient_out, out, memory, exchange)


def _attend_back(parameters, kept, dy, memory, exchange):
    """The gradient by the input of the branch, and what those by the weights need."""
    _check_gradient(dy, kept.shape)
    d_branch = exchange.leave_grad(dy)
    d_mixed = memory.scratch.take("d_mixed", kept.mixed.shape)
    linear_grad_input(_rows(d_branch), parameters["out_w"], d_mixed)
    d_qkv = memory.take("d_qkv", kept.qkv.shape)
    q, k, v = _split(kept.qkv, d_branch.shape, kept.heads)
    weights = kept.weights
    if weights is None:
        shape = (q.shape[0], kept.heads, q.shape[1], k.shape[1])
        weights = memory.scratch.take("weights", shape)
        attention_weights(q, k, weights)
    d_y, y = d_mixed.reshape(q.shape), kept.mixed.reshape(q.shape)
    attention_grad(d_y, q, k, v, y, weights, *_split(d_qkv, d_branch.shape, kept.heads))
    d_normed = memory.scratch.take("d_normed", d_branch.shape)
    linear_grad_input(d_qkv, parameters["qkv_w"], _rows(d_normed))
    d_normed = exchange.enter_grad(d_normed)
    d_norm = _normalise_grad(parameters["norm_1_scale"], kept.norm, d_normed)
    entered = exchange.enter(kept.normed)
    return d_normed, Later(_rows(entered), _rows(d_branch), d_qkv, d_norm)


# ---------------------------------------------------------------- the perceptron


def perceive(parameters, x, out=None, memory=None, exchange=ALONE):
    """The second half of a block: ``x + down(gelu(up(norm_2(x))))``.

    Parameters, results and errors are those of `attend`, with a `PerceiveKept`.
    """
    check_vectors(x, parameters["norm_2_scale"])
    memory, y = memory or Memory(x.dtype), ready_contiguous(out, x.shape, x.dtype)
    norm, normed = _normalise("2", parameters, x, memory)
    entered = exchange.enter(normed)
    rows = _rows(entered)
    raised = memory.take("slope", (len(rows), parameters["up_w"].shape[1]))
    linear(rows, parameters["up_w"], parameters["up_b"], out=raised)
    # The derivative takes the place of the input, which nothing needs any more.
    active = gelu(raised, out=memory.take("active", raised.shape), slope=raised)
    branch = memory.scratch.take("branch", entered.shape)
    np.matmul(active, parameters["down_w"], out=_rows(branch))
    branch = exchange.leave(branch)
    branch += parameters["down_b"]
    np.add(x, branch, out=y)
    return y, PerceiveKept(x.shape, norm, normed, raised, active)


def perceive_grad_input(parameters, kept, dy, out=None, memory=None, exchange=ALONE):
    """The gradient of `perceive` by its input; all is as for `attend_grad_input`."""
    return _input_half(_perceive_back, parameters, kept, dy, out, memory, exchange)


def perceive_grad_weights(kept, later, gradient_out):
    """The gradient of `perceive` by its parameters; all is as for `attend_grad_weights`."""
    linear_grad_weights(later.d_branch, kept.active, gradient_out["down_w"], gradient_out["down_b"])
    linear_grad_weights(later.d_inner, later.entered, gradient_out["up_w"], gradient_out["up_b"])
    gradient_out["norm_2_scale"][:], gradient_out["norm_2_shift"][:] = later.d_norm


def perceive_grad(parameters, kept, dy, gradient_out, out=None, memory=None, exchange=ALONE):
    """Both gradients of `perceive`; all is as for `attend_grad`."""
    halves = _perceive_back, perceive_grad_weights
    return _both_halves(*halves, parameters, kept, dy, gradient_out, out, memory, exchange)


def _perceive_back(parameters, kept, dy, memory, exchange):
    """The gradient by the input of the branch, and what those by the weights need."""
    _check_gradient(dy, kept.shape)
    d_branch = exchange.leave_grad(dy)
    d_raised = memory.take("d_raised", kept.active.shape)
    linear_grad_input(_rows(d_branch), parameters["down_w"], d_raised)
    gelu_grad(d_raised, kept.slope, out=d_raised)
    d_normed = memory.scratch.take("d_normed", d_branch.shape)
    linear_grad_input(d_raised, parameters["up_w"], _rows(d_normed))
    d_normed = exchange.enter_grad(d_normed)
    d_norm = _normalise_grad(parameters["norm_2_scale"], kept.norm, d_normed)
    entered = exchange.enter(kept.normed)
    return d_normed, Later(_rows(entered), _rows(d_branch), d_raised, d_norm)


# ---------------------------------------------------------------- both


def block(
    parameters,
    x,
    heads,
    out=None,
    memory=None,
    exchange=ALONE,
    cache=None,
    keep_weights=True,
):
    """One block: `attend`, then `perceive`.

    Parameters, results and errors are those of `attend`, with a `BlockKept`.

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
    memory = memory or Memory(x.dtype)
    y, attended = attend(parameters, x, heads, out, memory, exchange, cache, keep_weights)
    y, perceived = perceive(parameters, y, y, memory, exchange)
    return y, BlockKept(attended, perceived)


def block_grad_input(parameters, kept, dy, out=None, memory=None, exchange=ALONE):
    """The gradient of `block` by its input; all is as for `attend_grad_input`.

    Examples
    --------
    >>> import numpy as np
    >>> from helpers.nn import GPT
    >>> gpt = GPT(vocabulary=5, context=4, width=2, heads=1, layers=1)
    >>> parameters, x = gpt.views(gpt.initialise(seed=0))[1], np.ones((1, 3, 2))
    >>> y, kept = block(parameters, x, heads=1)
    >>> dx, later = block_grad_input(parameters, kept, np.ones((1, 3, 2)))
    >>> gradient = {name: np.empty_like(array) for name, array in parameters.items()}
    >>> block_grad_weights(kept, later, gradient)
    >>> gradient["down_b"].tolist()
    [3.0, 3.0]
    """
    memory = memory or Memory(dy.dtype)
    middle = memory.take("d_middle", dy.shape)
    middle, perceived = perceive_grad_input(parameters, kept.perceive, dy, middle, memory, exchange)
    dx, attended = attend_grad_input(parameters, kept.attend, middle, out, memory, exchange)
    return dx, (attended, perceived)


def block_grad_weights(kept, later, gradient_out):
    """The gradient of `block` by its parameters; all is as for `attend_grad_weights`."""
    attend_grad_weights(kept.attend, later[0], gradient_out)
    perceive_grad_weights(kept.perceive, later[1], gradient_out)


def block_grad(parameters, kept, dy, gradient_out, out=None, memory=None, exchange=ALONE):
    """Both gradients of `block`; all is as for `attend_grad`."""
    memory = memory or Memory(dy.dtype)
    dx = perceive_grad(parameters, kept.perceive, dy, gradient_out, out, memory, exchange)
    return attend_grad(parameters, kept.attend, dx, gradient_out, dx, memory, exchange)


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


# ---------------------------------------------------------------- small parts


def _normalise(number, parameters, x, memory):
    """One of the two layer norms of a block: what it keeps, and its output."""
    scale, shift = parameters[f"norm_{number}_scale"], parameters[f"norm_{number}_shift"]
    out, rows = memory.take(f"normed_{number}", x.shape), _rows(x)
    _, kept = layer_norm(rows, scale, shift, _rows(out), memory.take(f"norm_{number}", rows.shape))
    return kept, out


def _normalise_grad(scale, kept, dy):
    """Its gradients by scale and shift; that by its input takes the place of ``dy``."""
    dscale, dshift, _ = layer_norm_grad(_rows(dy), scale, kept, dx=_rows(dy))
    return dscale, dshift


def _input_half(back, parameters, kept, dy, out, memory, exchange):
    """The gradient of a half block by its input, and what the other half needs."""
    d_in, later = back(parameters, kept, dy, memory or Memory(dy.dtype), exchange)
    return np.add(dy, d_in, out=ready_contiguous(out, dy.shape, dy.dtype)), later


def _both_halves(back, weights, parameters, kept, dy, gradient_out, out, memory, exchange):
    """Both gradients of a half block; those by weights first, as ``out`` may be ``dy``."""
    d_in, later = back(parameters, kept, dy, memory or Memory(dy.dtype), exchange)
    weights(kept, later, gradient_out)
    return np.add(dy, d_in, out=ready_contiguous(out, dy.shape, dy.dtype))


def _rows(x):
    """An array of (batch, length, width) with one row a position."""
    return x.reshape(-1, x.shape[2])


def _split(qkv, shape, heads):
    """Queries, keys and values as views of shape (batch, length, heads, size)."""
    batch, length, _ = shape
    if qkv.shape[1] % (3 * heads):
        raise ValueError(f"{qkv.shape[1]} columns of qkv_w do not split over {heads} heads.")
    parts = qkv.reshape(batch, length, 3, heads, qkv.shape[1] // (3 * heads))
    return parts[:, :, 0], parts[:, :, 1], parts[:, :, 2]


def check_vectors(x, scale):
    """Refuse what is not one contiguous array of vectors of the width of ``scale``."""
    check_dtypes(x=x, scale=scale)
    if x.ndim != 3 or x.shape[2:] != scale.shape or not x.flags.c_contiguous:
        raise ValueError(
            f"x has shape {x.shape}: give one contiguous array of (batch, length, {len(scale)})."
        )


def ready_contiguous(out, shape, dtype):
    """As `ready`, for an array whose rows are written through a reshaped view."""
    out = ready(out, shape, dtype)
    if not out.flags.c_contiguous:
        raise ValueError("out is not contiguous: a reshaped view of it would be a copy.")
    return out


def _check_gradient(dy, shape):
    if dy.shape != shape:
        raise ValueError(f"dy has shape {dy.shape}: the block was given {shape}.")
