"""Networks in NumPy, as pure functions: a value, and beside it the gradient of that value.

Nothing here knows of ranks, of workers or of Dask. Parameters and gradients are flat arrays of one
dimension, so that any slice of them can be sent, summed or updated by whoever owns it.
"""

from helpers.nn.layers import (
    linear,
    linear_grad,
    linear_grad_input,
    linear_grad_weights,
    relu,
    relu_grad,
)
from helpers.nn.losses import logistic_loss, softmax_loss, squared_loss
from helpers.nn.mlp import MLP, Workspace
from helpers.nn.optimisers import SGD, Adam, clip_by_global_norm, state_bytes

__all__ = [
    "MLP",
    "SGD",
    "Adam",
    "Workspace",
    "clip_by_global_norm",
    "linear",
    "linear_grad",
    "linear_grad_input",
    "linear_grad_weights",
    "logistic_loss",
    "relu",
    "relu_grad",
    "softmax_loss",
    "squared_loss",
    "state_bytes",
]
