"""Losses, each with its gradient: ``value, dz = logistic_loss(z, y)``.

A loss is the SUM over the rows, divided by ``divisor``. Left out, the divisor is the number of
rows, and the loss is their mean. Ranks that hold shards of a batch give the number of rows of the
whole batch instead. Their values and gradients then add up to those of the batch, however unequal
the shards are. A shard without rows has the value 0.

The value is a Python float, summed in float64; the gradient has the dtype of ``z``.
"""

from __future__ import annotations

import math

import numpy as np

from helpers.nn.layers import check_dtypes, check_integers, ready


def logistic_loss(z, y, divisor=None, out=None):
    """The logistic loss of two classes (binary cross-entropy), and its gradient.

    For a row: ``log(1 + exp(-z))`` if ``y`` is 1, ``log(1 + exp(z))`` if it is 0. The gradient is
    ``sigmoid(z) - y``. Both are stable for large ``|z|`` (Bishop 2006, "Pattern Recognition and
    Machine Learning", equations 4.90 and 4.91).

    Parameters
    ----------
    z : float array of shape (n,) or (n, 1)
        Scores: the logarithms of the odds that ``y`` is 1.
    y : array of shape (n,) or (n, 1)
        Labels, 0 or 1.
    divisor : number, optional
        What the sum over the rows is divided by. Default: the number of rows.
    out : array of the shape of ``z``, optional
        Where to write the gradient.

    Returns
    -------
    value : float
    dz : array of the shape of ``z``

    Raises
    ------
    ValueError
        If shapes do not fit, a label is not 0 or 1, or the divisor is not positive.
    TypeError
        If ``z`` is no floating-point array.

    Examples
    --------
    >>> import numpy as np
    >>> value, dz = logistic_loss(np.array([0.0, 0.0]), np.array([0, 1]))
    >>> round(value, 3), dz.tolist()
    (0.693, [0.25, -0.25])
    """
    check_dtypes(z=z)
    if z.ndim == 0 or z.size != len(z):
        raise ValueError(f"z has shape {z.shape}: the logistic loss needs (n,) or (n, 1).")
    y = _targets(y, z)
    if not np.all((y == 0) | (y == 1)):
        raise ValueError("a label is neither 0 nor 1: the logistic loss knows two classes.")
    sign = 1 - 2 * y
    margin = sign * z  # how far a row is on the wrong side
    small = np.exp(-np.abs(margin))  # at most 1, so nothing overflows
    value = np.maximum(margin, 0) + np.log1p(small)
    sigmoid = np.where(margin > 0, 1, small) / (1 + small)
    divisor = _checked_divisor(divisor, z)
    dz = np.multiply(sign, sigmoid, out=ready(out, z.shape, z.dtype))
    return _total(value, divisor), np.divide(dz, divisor, out=dz)


def squared_loss(z, y, divisor=None, out=None):
    """The squared error, and its gradient.

    For a row: the sum of ``(z - y)**2`` over its outputs. The gradient is ``2 * (z - y)``.

    Parameters
    ----------
    z : float array of shape (n,) or (n, outputs)
        Predictions.
    y : array of the shape of ``z``, or (n,) if there is one output
        Targets.
    divisor, out
        As for `logistic_loss`.

    Returns
    -------
    value : float
    dz : array of the shape of ``z``

    Raises
    ------
    ValueError
        If shapes do not fit, or the divisor is not positive.
    TypeError
        If ``z`` is no floating-point array.

    Examples
    --------
    >>> import numpy as np
    >>> value, dz = squared_loss(np.array([1.0, 3.0]), np.array([1, 1]))
    >>> value, dz.tolist()
    (2.0, [0.0, 2.0])
    """
    check_dtypes(z=z)
    if z.ndim not in (1, 2):
        raise ValueError(f"z has shape {z.shape}: the squared loss needs (n,) or (n, outputs).")
    y = _targets(y, z)
    divisor = _checked_divisor(divisor, z)
    dz = np.subtract(z, y, out=ready(out, z.shape, z.dtype))
    value = _total(np.square(dz), divisor)
    return value, np.multiply(dz, 2 / divisor, out=dz)


def softmax_loss(z, y, divisor=None, out=None, ignore=None):
    """The cross-entropy of the softmax of ``z``, and its gradient.

    For a row: ``log(sum(exp(z))) - z[y]``. The gradient is ``softmax(z)``, less 1 at the label
    (Bishop 2006, equations 4.108 and 4.109). The largest score is taken off first, so that nothing
    overflows.

    Parameters
    ----------
    z : float array of shape (n, classes)
        Scores: logarithms of probabilities, up to a constant for each row.
    y : integer array of shape (n,)
        Labels, from 0 to classes - 1.
    divisor : number, optional
        What the sum over the rows is divided by. Default: the number of rows that count.
    out : array of the shape of ``z``, optional
        Where to write the gradient; may be ``z`` itself.
    ignore : int, optional
        A row with this label does not count: its loss and its gradient are 0.

    Returns
    -------
    value : float
    dz : array of the shape of ``z``

    Raises
    ------
    ValueError
        If shapes do not fit, a label is no class, or the divisor is not positive.
    TypeError
        If ``z`` is no floating-point array or ``y`` does not hold integers.

    Examples
    --------
    >>> import numpy as np
    >>> value, dz = softmax_loss(np.zeros((1, 2)), np.array([1]))
    >>> round(value, 3), dz.tolist()
    (0.693, [[0.5, -0.5]])
    """
    check_dtypes(z=z)
    y = _labels(y, z, ignore)
    counts = y != ignore  # all, if that is None
    divisor = _checked_divisor(divisor, y[counts])
    rows, label = np.arange(len(z)), np.where(counts, y, 0)
    dz = np.subtract(z, z.max(axis=1, keepdims=True), out=ready(out, z.shape, z.dtype))
    at_label = dz[rows, label]
    total = np.exp(dz, out=dz).sum(axis=1, keepdims=True)
    value = np.log(total[:, 0]) - at_label
    dz *= (counts / divisor).astype(z.dtype)[:, np.newaxis] / total
    dz[rows, label] -= counts / divisor
    return _total(value[counts], divisor), dz


def _targets(y, z):
    """The targets in the shape and dtype of ``z``."""
    y = np.asarray(y)
    one_each = z.size == len(z) and y.shape in ((len(z),), (len(z), 1))
    if y.shape != z.shape and not one_each:
        raise ValueError(f"y has shape {y.shape} and z {z.shape}: give one target for each output.")
    # astype first: 1 - 2 * y of unsigned labels would wrap around.
    return y.astype(z.dtype, copy=False).reshape(z.shape)


def _labels(y, z, ignore):
    """The labels as an integer array, each of them a class of ``z``, or to be ignored."""
    if z.ndim != 2 or np.shape(y) != (len(z),) or z.shape[1] < 1:
        raise ValueError(f"z has shape {z.shape} and y {np.shape(y)}: give (n, classes) and (n,).")
    return check_integers("labels", y, z.shape[1], ignore)


def _checked_divisor(divisor, z):
    """The divisor as a Python float: a NumPy scalar of float64 would widen float32 arrays."""
    if divisor is None:
        return float(max(1, len(z)))
    if not (math.isfinite(divisor) and divisor > 0):
        raise ValueError(f"divisor is {divisor}: give a positive number, such as all ranks' rows.")
    return float(divisor)


def _total(values, divisor):
    return float(np.sum(values, dtype=np.float64)) / divisor
