"""Layers as pairs of pure functions: what a layer computes, and its gradient.

A gradient function is given ``dy``, the gradient of the loss by what the layer computed, and gives
the gradient by what went in (the chain rule: Rumelhart, Hinton and Williams 1986, "Learning
representations by back-propagating errors", equations 4 to 7). Every function can write into arrays
that it is given, so that a training step need not allocate memory. Apart from those arrays nothing
is changed.
"""

from __future__ import annotations

import numpy as np


def linear(x, w, b, out=None):
    """A linear layer: ``x @ w + b``.

    Parameters
    ----------
    x : array of shape (n, d_in)
        One row an example. All arrays have the same floating-point dtype.
    w : array of shape (d_in, d_out)
    b : array of shape (d_out,)
    out : array of shape (n, d_out), optional
        Where to write the result.

    Returns
    -------
    array of shape (n, d_out)

    Raises
    ------
    ValueError
        If shapes do not fit.
    TypeError
        If dtypes differ, or are not floating-point.

    Examples
    --------
    >>> import numpy as np
    >>> linear(np.array([[1.0, 2.0]]), np.array([[3.0], [4.0]]), np.array([0.5]))
    array([[11.5]])
    """
    check_dtypes(x=x, w=w, b=b)
    _check_product(x, w)
    if b.shape != w.shape[1:]:
        raise ValueError(f"b has shape {b.shape}: w {w.shape} needs one of shape {w.shape[1:]}.")
    y = np.matmul(x, w, out=ready(out, (len(x), w.shape[1]), x.dtype))
    return np.add(y, b, out=y)


def linear_grad(dy, x, w, dw=None, db=None, dx=None, need_dx=True):
    """The gradient of a linear layer by its weights, its biases and its input.

    ``dw = x.T @ dy``, ``db`` is the sum of the rows of ``dy``, ``dx = dy @ w.T``.

    Parameters
    ----------
    dy : array of shape (n, d_out)
        Gradient of the loss by the output of the layer.
    x, w : array of shape (n, d_in) and (d_in, d_out)
        What `linear` was given.
    dw, db, dx : array, optional
        Where to write the results. They have the shapes of ``w``, of the biases and of ``x``.
    need_dx : bool
        The first layer needs no ``dx``: False saves that product.

    Returns
    -------
    dw, db, dx : array
        ``dx`` is None if ``need_dx`` is False.

    Raises
    ------
    ValueError, TypeError
        As for `linear`.

    Examples
    --------
    >>> import numpy as np
    >>> x, w = np.array([[1.0, 3.0]]), np.array([[4.0], [5.0]])
    >>> dw, db, dx = linear_grad(np.array([[2.0]]), x, w)
    >>> dw.tolist(), db.tolist(), dx.tolist()
    ([[2.0], [6.0]], [2.0], [[8.0, 10.0]])
    """
    dw, db = linear_grad_weights(dy, x, dw, db)
    if not need_dx:
        return dw, db, None
    return dw, db, linear_grad_input(dy, w, dx)


def linear_grad_weights(dy, x, dw=None, db=None):
    """The part of `linear_grad` that the optimiser needs: ``(dw, db)``.

    Parameters, errors and an example stand at `linear_grad`.
    """
    check_dtypes(dy=dy, x=x)
    _check_rows(dy, x)
    dw = ready(dw, (x.shape[1], dy.shape[1]), x.dtype, "dw")
    db = ready(db, dy.shape[1:], x.dtype, "db")
    return np.matmul(x.T, dy, out=dw), np.sum(dy, axis=0, out=db)


def linear_grad_input(dy, w, dx=None):
    """The part of `linear_grad` that the layer before needs: ``dx``.

    Parameters, errors and an example stand at `linear_grad`.
    """
    check_dtypes(dy=dy, w=w)
    _check_product(dy, w.T, names=("dy", "w.T"))
    dx = ready(dx, (len(dy), len(w)), w.dtype, "dx")
    # With one output there is nothing to sum, and the outer product is quicker as a plain one.
    product = np.multiply if w.shape[1] == 1 else np.matmul
    return product(dy, w.T, out=dx)


def relu(x, out=None):
    """The rectifier: ``max(x, 0)``, number by number.

    Parameters
    ----------
    x : array of any shape
    out : array of the same shape and dtype, optional
        Where to write the result; may be ``x`` itself.

    Returns
    -------
    array of the shape of ``x``

    Raises
    ------
    ValueError, TypeError
        If ``out`` has another shape or dtype, or ``x`` is no floating-point array.

    Examples
    --------
    >>> import numpy as np
    >>> relu(np.array([-1.0, 2.0]))
    array([0., 2.])
    """
    check_dtypes(x=x)
    return np.maximum(x, 0, out=ready(out, x.shape, x.dtype))


def relu_grad(dy, y, out=None, mask=None):
    """The gradient of `relu` by its input: ``dy`` where the output was positive, 0 elsewhere.

    Parameters
    ----------
    dy : array of any shape
        Gradient of the loss by the output.
    y : array of the same shape and dtype
        The output of `relu`. (It says as much as the input, and the input need not be kept.)
    out : array of the same shape and dtype, optional
        Where to write the result; may be ``dy`` itself.
    mask : bool array of the same shape, optional
        Memory to work in; afterwards it says which outputs were positive.

    Returns
    -------
    array of the shape of ``y``

    Raises
    ------
    ValueError, TypeError
        If shapes or dtypes differ.

    Examples
    --------
    >>> import numpy as np
    >>> relu_grad(np.array([5.0, 5.0]), relu(np.array([-1.0, 2.0])))
    array([0., 5.])
    """
    check_dtypes(dy=dy, y=y)
    if dy.shape != y.shape:
        raise ValueError(f"dy has shape {dy.shape} and y {y.shape}: they must be the same.")
    mask = np.greater(y, 0, out=ready(mask, y.shape, np.dtype(bool), "mask"))
    # NumPy multiplies by small integers quicker than by truth values; the bytes are the same.
    return np.multiply(dy, mask.view(np.uint8), out=ready(out, y.shape, y.dtype))


def check_dtypes(**arrays):
    """Raise unless all are arrays of one and the same floating-point dtype.

    NumPy would compute in the wider of two dtypes, and nobody would notice but the clock.
    """
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{name} is a {type(array).__name__}: give a NumPy array.")
        if array.dtype.kind != "f":
            raise TypeError(f"{name} has dtype {array.dtype}: give floats, as float32 or float64.")
    if len({array.dtype for array in arrays.values()}) > 1:
        found = ", ".join(f"{name} {array.dtype}" for name, array in arrays.items())
        raise TypeError(f"dtypes differ ({found}): convert with astype until they are the same.")


def check_integers(name, numbers, stop, ignore=None):
    """The numbers as an integer array, each of them from 0 to ``stop - 1`` or ``ignore``."""
    numbers = np.asarray(numbers)
    if numbers.dtype.kind not in "iu":
        raise TypeError(f"{name} have dtype {numbers.dtype}: give integers.")
    found = numbers if ignore is None else numbers[numbers != ignore]
    if found.size and not (found.min() >= 0 and found.max() < stop):
        also = "" if ignore is None else f", or be {ignore} where none counts"
        span = f"go from {found.min()} to {found.max()}"
        raise ValueError(f"{name} {span}: they must lie in 0 to {stop - 1}{also}.")
    return numbers


def ready(out, shape, dtype, name="out"):
    """The array to write into: ``out`` if it fits, a new one if it is None."""
    if out is None:
        return np.empty(shape, dtype)
    if not isinstance(out, np.ndarray) or out.dtype != dtype:
        found = getattr(out, "dtype", type(out).__name__)
        raise TypeError(f"{name} is {found}: the result needs a NumPy array of {dtype}.")
    if out.shape != shape:
        raise ValueError(f"{name} has shape {out.shape}: the result has shape {shape}.")
    return out


def _check_product(x, w, names=("x", "w")):
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0]:
        raise ValueError(
            f"{names[0]} has shape {x.shape} and {names[1]} {w.shape}: both need two axes, "
            "and the last of the one must be as long as the first of the other."
        )


def _check_rows(dy, x):
    if dy.ndim != 2 or x.ndim != 2 or len(dy) != len(x):
        raise ValueError(
            f"dy has shape {dy.shape} and x {x.shape}: both need two axes and as many rows."
        )
