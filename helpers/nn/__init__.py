"""Networks in NumPy, as pure functions: a value, and beside it the gradient of that value.

Nothing here knows of ranks, of workers or of Dask. Parameters and gradients are flat arrays of one
dimension, so that any slice of them can be sent, summed or updated by whoever owns it.
"""

from helpers.nn.blocks import (
    Memory,
    block,
    block_grad,
    block_shapes,
    embed,
    embed_grad,
    head_loss,
    head_loss_grad,
    named_views,
)
from helpers.nn.generate import generate
from helpers.nn.gpt import GPT, GPTWorkspace, KeyValueCache
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
from helpers.nn.tokens import cross_entropy, embedding, embedding_grad
from helpers.nn.transformer import (
    attention,
    attention_grad,
    gelu,
    gelu_grad,
    layer_norm,
    layer_norm_grad,
)

__all__ = [
    "GPT",
    "MLP",
    "SGD",
    "Adam",
    "GPTWorkspace",
    "KeyValueCache",
    "Memory",
    "Workspace",
    "attention",
    "attention_grad",
    "block",
    "block_grad",
    "block_shapes",
    "clip_by_global_norm",
    "cross_entropy",
    "embed",
    "embed_grad",
    "embedding",
    "embedding_grad",
    "gelu",
    "gelu_grad",
    "generate",
    "head_loss",
    "head_loss_grad",
    "layer_norm",
    "layer_norm_grad",
    "linear",
    "linear_grad",
    "linear_grad_input",
    "linear_grad_weights",
    "logistic_loss",
    "named_views",
    "relu",
    "relu_grad",
    "softmax_loss",
    "squared_loss",
    "state_bytes",
]
