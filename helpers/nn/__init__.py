"""Networks in NumPy, as pure functions: a value, and beside it the gradient of that value.

Nothing here knows of ranks, of workers or of Dask. Parameters and gradients are flat arrays of one
dimension, so that any slice of them can be sent, summed or updated by whoever owns it.
"""

from helpers.nn.blocks import (
    ALONE,
    Alone,
    Memory,
    attend,
    attend_grad,
    attend_grad_input,
    attend_grad_weights,
    block,
    block_grad,
    block_grad_input,
    block_grad_weights,
    block_shapes,
    named_views,
    perceive,
    perceive_grad,
    perceive_grad_input,
    perceive_grad_weights,
)
from helpers.nn.ends import (
    embed,
    embed_grad,
    head_loss,
    head_loss_grad,
    head_loss_grad_input,
    head_loss_grad_weights,
)
from helpers.nn.expert_gpt import ExpertGPT
from helpers.nn.experts import expert_shapes, mixture, mixture_grad
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
from helpers.nn.network import Network
from helpers.nn.optimisers import SGD, Adam, clip_by_global_norm, state_bytes
from helpers.nn.tokens import cross_entropy, embedding, embedding_grad
from helpers.nn.transformer import (
    attention,
    attention_grad,
    attention_weights,
    gelu,
    gelu_grad,
    layer_norm,
    layer_norm_grad,
)

__all__ = [
    "ALONE",
    "GPT",
    "MLP",
    "SGD",
    "Adam",
    "Alone",
    "ExpertGPT",
    "GPTWorkspace",
    "KeyValueCache",
    "Memory",
    "Network",
    "Workspace",
    "attend",
    "attend_grad",
    "attend_grad_input",
    "attend_grad_weights",
    "attention",
    "attention_grad",
    "attention_weights",
    "block",
    "block_grad",
    "block_grad_input",
    "block_grad_weights",
    "block_shapes",
    "clip_by_global_norm",
    "cross_entropy",
    "embed",
    "embed_grad",
    "embedding",
    "embedding_grad",
    "expert_shapes",
    "gelu",
    "gelu_grad",
    "generate",
    "head_loss",
    "head_loss_grad",
    "head_loss_grad_input",
    "head_loss_grad_weights",
    "layer_norm",
    "layer_norm_grad",
    "linear",
    "linear_grad",
    "linear_grad_input",
    "linear_grad_weights",
    "logistic_loss",
    "mixture",
    "mixture_grad",
    "named_views",
    "perceive",
    "perceive_grad",
    "perceive_grad_input",
    "perceive_grad_weights",
    "relu",
    "relu_grad",
    "softmax_loss",
    "squared_loss",
    "state_bytes",
]
