"""The parts of a transformer as pairs of pure functions: what a part computes, and its gradient.

The parts are those of GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners", section 2.3): layer norm, GELU, and causal attention with several heads (Vaswani et al.
2017, "Attention Is All You Need").

Rows are worked through in chunks, so that what is computed between two arrays stays in the cache
of a core.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from helpers.nn.layers import check_dtypes, ready

# Numbers worked on at a time. So many of float32 are 96 KiB: they stay in the cache of a core, and
# the C library gives them from memory at hand. From 128 KiB up it may take an array from the system
# anew each time, page by page, as it does in the workers of Dask.
CHUNK = 24_576
# Keeps the division of a layer norm away from 0; the number of GPT-2.
EPSILON = 1e-5
# GELU is written with these two, see `gelu`.
OUTER, INNER = math.sqrt(2 / math.pi), 0.044715


def layer_norm(x, scale, shift, out=None, normed=None):
    """Layer norm: each row with mean 0 and variance 1, then scaled and shifted.

    ``normed = (x - mean) / sqrt(variance + 1e-5)``, ``y = normed * scale + shift``, mean and
    variance over a row (Ba, Kiros and Hinton 2016, "Layer Normalization", equation 4).

    Parameters
    ----------
    x : array of shape (n, width)
        One row a position. All arrays have the same floating-point dtype.
    scale, shift : array of shape (width,)
    out, normed : array of shape (n, width), optional
        Where to write the result, and the rows before they are scaled and shifted.

    Returns
    -------
    y : array of shape (n, width)
    kept : (array of shape (n, width), array of shape (n, 1))
        ``normed``, and one over the deviation of each row: what `layer_norm_grad` needs.

    Raises
    ------
    ValueError
        If shapes do not fit.
    TypeError
        If dtypes differ, or are not floating-point.

    Examples
    --------
    >>> import numpy as np
    >>> y, kept = layer_norm(np.array([[1.0, 3.0]]), np.array([2.0, 2.0]), np.array([0.5, 0.5]))
    >>> y.round(3)
    array([[-1.5,  2.5]])
    """
    check_dtypes(x=x, scale=scale, shift=shift)
    if x.ndim != 2 or not scale.shape == shift.shape == x.shape[1:]:
        raise ValueError(
            f"x has shape {x.shape}, scale {scale.shape} and shift {shift.shape}: "
            "give (n, width) and twice (width,)."
        )
    out, normed = ready(out, x.shape, x.dtype), ready(normed, x.shape, x.dtype, "normed")
    inverse = np.empty((len(x), 1), x.dtype)
    # A product with this vector is the mean of a row, and quicker than np.mean of short rows.
    mean_of = np.full((x.shape[1], 1), 1 / x.shape[1], x.dtype)
    for rows in _chunks(x):
        part = np.subtract(x[rows], x[rows] @ mean_of, out=normed[rows])
        variance = np.square(part) @ mean_of
        variance += EPSILON
        np.divide(1, np.sqrt(variance, out=variance), out=inverse[rows])
        part *= inverse[rows]
        y = np.multiply(part, scale, out=out[rows])
        y += shift
    return out, (normed, inverse)


def layer_norm_grad(dy, scale, kept, dscale=None, dshift=None, dx=None):
    """The gradient of `layer_norm` by its scale, its shift and its input.

    With ``g = dy * scale``: ``dx = (g - mean(g) - normed * mean(g * normed)) / deviation``, the
    means over a row.

    Parameters
    ----------
    dy : array of shape (n, width)
        Gradient of the loss by the output.
    scale : array of shape (width,)
        What `layer_norm` was given.
    kept : (array, array)
        What `layer_norm` gave.
    dscale, dshift, dx : array, optional
        Where to write the results; ``dx`` may be ``dy`` itself.

    Returns
    -------
    dscale, dshift : array of shape (width,)
    dx : array of shape (n, width)

    Raises
    ------
    ValueError, TypeError
        If shapes do not fit or dtypes differ.

    Examples
    --------
    >>> import numpy as np
    >>> scale, shift = np.ones(2), np.zeros(2)
    >>> y, kept = layer_norm(np.array([[1.0, 3.0]]), scale, shift)
    >>> dscale, dshift, dx = layer_norm_grad(np.array([[1.0, 1.0]]), scale, kept)
    >>> dscale.round(3).tolist(), dshift.tolist(), dx.tolist()
    ([-1.0, 1.0], [1.0, 1.0], [[0.0, 0.0]])
    """
    normed, inverse = kept
    check_dtypes(dy=dy, scale=scale, normed=normed)
    if dy.shape != normed.shape:
        raise ValueError(f"dy has shape {dy.shape}: the layer norm gave rows of {normed.shape}.")
    dscale = ready(dscale, scale.shape, dy.dtype, "dscale")
    dshift = ready(dshift, scale.shape, dy.dtype, "dshift")
    dx = ready(dx, dy.shape, dy.dtype, "dx")
    dscale[:], dshift[:] = 0, 0
    mean_with_scale = (scale / len(scale))[:, np.newaxis]
    for rows in _chunks(dy):
        part, g = normed[rows], dy[rows]
        product = g * part
        dscale += product.sum(axis=0)
        dshift += g.sum(axis=0)
        mean_g, mean_product = g @ mean_with_scale, product @ mean_with_scale
        g = np.multiply(g, scale, out=dx[rows])
        g -= mean_g
        g -= np.multiply(part, mean_product, out=product)
        g *= inverse[rows]
    return dscale, dshift, dx


def gelu(x, out=None, slope=None):
    """The Gaussian error linear unit, in its form with tanh.

    ``y = 0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))`` (Hendrycks and Gimpel 2016,
    "Gaussian Error Linear Units", section 2; the form of GPT-2).

    Parameters
    ----------
    x : array of shape (n, ...)
    out : array of the same shape and dtype, optional
        Where to write the result; not ``x`` itself if there is a ``slope``.
    slope : array of the same shape and dtype, optional
        Where to write the derivative too, which `gelu_grad` needs; may be ``x`` itself.

    Returns
    -------
    array of the shape of ``x``

    Raises
    ------
    ValueError, TypeError
        If ``out`` or ``slope`` has another shape or dtype, or ``x`` is no floating-point array.

    Examples
    --------
    >>> import numpy as np
    >>> gelu(np.array([-10.0, 0.0, 1.0])).round(3).tolist()
    [-0.0, 0.0, 0.841]
    """
    check_dtypes(x=x)
    out = ready(out, x.shape, x.dtype)
    if slope is not None:
        slope = ready(slope, x.shape, x.dtype, "slope")
    for rows in _chunks(x):
        square = np.square(x[rows])
        half = square * (-2 * OUTER * INNER)
        half -= 2 * OUTER
        half *= x[rows]
        # (1 + tanh(u)) / 2 is 1 / (1 + exp(-2 * u)), and exp is twice as quick as tanh.
        with np.errstate(over="ignore"):  # one over infinity is 0, as it should be
            np.exp(half, out=half)
        half += 1
        np.divide(1, half, out=half)
        y = np.multiply(x[rows], half, out=out[rows])
        if slope is not None:
            _write_slope(square, half, y, slope[rows])
    return out


def gelu_grad(dy, slope, out=None):
    """The gradient of `gelu` by its input: ``dy * slope``.

    Parameters
    ----------
    dy : array of any shape
        Gradient of the loss by the output.
    slope : array of the same shape and dtype
        The derivative, as `gelu` writes it.
    out : array of the same shape and dtype, optional
        Where to write the result; may be ``dy`` itself.

    Returns
    -------
    array of the shape of ``dy``

    Raises
    ------
    ValueError, TypeError
        If shapes or dtypes differ.

    Examples
    --------
    >>> import numpy as np
    >>> x, slope = np.array([-1.0, 0.0, 10.0]), np.empty(3)
    >>> y = gelu(x, slope=slope)
    >>> gelu_grad(np.array([5.0, 5.0, 5.0]), slope).round(3).tolist()
    [-0.415, 2.5, 5.0]
    """
    check_dtypes(dy=dy, slope=slope)
    if dy.shape != slope.shape:
        raise ValueError(f"dy has shape {dy.shape} and slope {slope.shape}: they must be the same.")
    return np.multiply(dy, slope, out=ready(out, dy.shape, dy.dtype))


def attention(q, k, v, out=None, weights=None):
    """Causal attention of several heads: each position takes from itself and those before it.

    ``weights = softmax(q @ k.T / sqrt(size))``, ``y = weights @ v``, for each sequence and each
    head alone (Vaswani et al. 2017, equation 1 and section 3.2.3). With fewer queries than keys the
    queries belong to the last positions, as when text is generated.

    Parameters
    ----------
    q : array of shape (batch, queries, heads, size)
        All arrays have the same floating-point dtype. Views of a larger array will do.
    k, v : array of shape (batch, positions, heads, size)
    out : array of the shape of ``q``, optional
        Where to write the result.
    weights : array of shape (batch, heads, queries, positions), optional
        Where to write the attention weights.

    Returns
    -------
    y : array of the shape of ``q``
    weights : array of shape (batch, heads, queries, positions)
        How much each query takes of each position: a row sums to 1, and later positions have 0.

    Raises
    ------
    ValueError, TypeError
        If shapes do not fit or dtypes differ.

    Examples
    --------
    >>> import numpy as np
    >>> q = k = np.zeros((1, 2, 1, 1))
    >>> y, weights = attention(q, k, np.array([[[[2.0]], [[4.0]]]]))
    >>> y.ravel().tolist(), weights[0, 0].tolist()
    ([2.0, 3.0], [[1.0, 0.0], [0.5, 0.5]])
    """
    check_dtypes(q=q, k=k, v=v)
    batch, queries, heads, _ = _attention_shape(q, k, v)
    out = ready(out, q.shape, q.dtype)
    shape = (batch, heads, queries, k.shape[1])
    weights = ready(weights, shape, q.dtype, "weights")
    # The heads come before the positions, as views: matmul multiplies them where they lie.
    q, k, v, y = (array.swapaxes(1, 2) for array in (q, k, v, out))
    for rows in _chunks(weights):
        part = _softmax_of_scores(q[rows], k[rows], weights[rows])
        np.matmul(part, v[rows], out=y[rows])
    return out, weights


def attention_weights(q, k, out=None):
    """The weights of `attention` alone; arguments, result and errors are as there."""
    check_dtypes(q=q, k=k)
    batch, queries, heads, _ = _attention_shape(q, k, k)
    out = ready(out, (batch, heads, queries, k.shape[1]), q.dtype, "weights")
    q, k = q.swapaxes(1, 2), k.swapaxes(1, 2)
    for rows in _chunks(out):
        _softmax_of_scores(q[rows], k[rows], out[rows])
    return out


def attention_grad(dy, q, k, v, y, weights, dq=None, dk=None, dv=None):
    """The gradient of `attention` by queries, keys and values.

    With ``dw = dy @ v.T`` the scores have ``ds = weights * (dw - sum(dw * weights))``, and the sum
    is that of ``dy * y`` (Dao et al. 2022, "FlashAttention", appendix B.2).

    Parameters
    ----------
    dy : array of shape (batch, positions, heads, size)
        Gradient of the loss by the output.
    q, k, v : array of the same shape
        What `attention` was given, as many queries as keys.
    y, weights : array
        What `attention` gave.
    dq, dk, dv : array of the same shape, optional
        Where to write the results. Views of a larger array will do.

    Returns
    -------
    dq, dk, dv : array of the same shape

    Raises
    ------
    ValueError, TypeError
        If shapes do not fit or dtypes differ.

    Examples
    --------
    >>> import numpy as np
    >>> q = k = np.zeros((1, 2, 1, 1))
    >>> v = np.array([[[[2.0]], [[4.0]]]])
    >>> y, weights = attention(q, k, v)
    >>> dq, dk, dv = attention_grad(np.ones((1, 2, 1, 1)), q, k, v, y, weights)
    >>> dv.ravel().tolist()
    [1.5, 0.5]
    """
    check_dtypes(dy=dy, q=q, k=k, v=v, y=y, weights=weights)
    batch, length, heads, _ = _attention_shape(q, k, v)
    if not dy.shape == y.shape == q.shape == k.shape:
        raise ValueError(
            f"dy has shape {dy.shape}, y {y.shape}, q {q.shape} and k {k.shape}: "
            "they must be the same."
        )
    if weights.shape != (batch, heads, length, length):
        raise ValueError(
            f"weights have shape {weights.shape}: there is a gradient only where all positions "
            "were given together, without a cache."
        )
    dq = ready(dq, q.shape, q.dtype, "dq")
    dk = ready(dk, q.shape, q.dtype, "dk")
    dv = ready(dv, q.shape, q.dtype, "dv")
    results = dq, dk, dv
    arrays = (dy, q, k, v, y, dq, dk, dv)
    dy, q, k, v, y, dq, dk, dv = (array.swapaxes(1, 2) for array in arrays)
    ones = np.ones((q.shape[3], 1), q.dtype)
    for rows in _chunks(weights):
        part = weights[rows]
        np.matmul(part.swapaxes(2, 3), dy[rows], out=dv[rows])
        # Scaled here, where there are the fewest numbers, and not in ds.
        scaled = dy[rows] * (1 / math.sqrt(q.shape[3]))
        ds = scaled @ v[rows].swapaxes(2, 3)
        ds -= np.multiply(scaled, y[rows], out=scaled) @ ones
        ds *= part
        np.matmul(ds, k[rows], out=dq[rows])
        np.matmul(ds.swapaxes(2, 3), q[rows], out=dk[rows])
    return results


def _chunks(array):
    """Slices of the first axis, each of about as many numbers as stay in the cache."""
    step = max(1, CHUNK * len(array) // max(1, array.size))
    return (slice(start, start + step) for start in range(0, len(array), step))


def _softmax_of_scores(q, k, out):
    """Weights of some sequences, all arrays with the heads before the positions."""
    later, ones = _later(q.shape[2], k.shape[2], q.dtype), np.ones((k.shape[2], 1), q.dtype)
    np.matmul(q, k.swapaxes(2, 3), out=out)
    out *= 1 / math.sqrt(q.shape[3])
    out += later
    out -= out.max(axis=3, keepdims=True)
    np.exp(out, out=out)
    out /= (out.reshape(-1, len(ones)) @ ones).reshape(*out.shape[:3], 1)
    return out


def _write_slope(square, half, y, slope):
    """The derivative of GELU, from what `gelu` has computed; ``square`` is used up.

    It is ``half + x * d half / dx``; ``d half / dx`` has the factor ``2 * half * (1 - half)``, for
    the derivative of tanh is ``1 - tanh**2``.
    """
    square *= 6 * OUTER * INNER
    square += 2 * OUTER
    square *= y
    np.subtract(1, half, out=slope)
    slope *= square
    slope += half


def _attention_shape(q, k, v):
    """The shape of ``q``, if those of ``k`` and ``v`` fit."""
    fits = q.ndim == k.ndim == 4 and k.shape == v.shape and q.shape[1] <= k.shape[1]
    if not fits or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"q has shape {q.shape}, k {k.shape} and v {v.shape}: all need (batch, positions, "
            "heads, size), as many keys as values, and no more queries than keys."
        )
    return q.shape


@lru_cache(maxsize=256)
def _later(queries, positions, dtype):
    """What is added to scores: 0, and minus infinity where a position is later than the query."""
    mask = np.full((queries, positions), -np.inf, dtype)
    mask = np.triu(mask, k=1 + positions - queries)
    mask.flags.writeable = False
    return mask
