"""The small GPT in PyTorch, from its own layers, with the parameters of ours."""

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """A block of GPT-2."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class Model(nn.Module):
    """The network that a `helpers.nn.GPT` describes; gives the loss, summed and divided.

    Parameters
    ----------
    gpt : GPT
    parameters : float32 array of shape (gpt.size,)
        Where it starts.
    """

    def __init__(self, gpt, parameters):
        super().__init__()
        self.tokens = nn.Embedding(gpt.vocabulary, gpt.width)
        self.positions = nn.Embedding(gpt.context, gpt.width)
        self.blocks = nn.ModuleList(Block(gpt.width, gpt.heads) for _ in range(gpt.layers))
        self.norm = nn.LayerNorm(gpt.width)
        first, *blocks, last = gpt.views(parameters)
        with torch.no_grad():
            self.tokens.weight[:] = torch.tensor(first["tokens"])
            self.positions.weight[:] = torch.tensor(first["positions"])
            for module, arrays in zip((*self.blocks, self.norm), (*blocks, last)):
                _fill(module, arrays)

    def forward(self, tokens, targets, divisor):
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        z = functional.linear(self.norm(x), self.tokens.weight)
        flat = z.flatten(0, 1), targets.flatten()
        return functional.cross_entropy(*flat, ignore_index=-1, reduction="sum") / divisor


def _fill(module, arrays):
    """Copy arrays such as ``qkv_w`` and ``norm_1_scale`` to the parameters of their names."""
    kinds = {"w": "weight", "b": "bias", "scale": "weight", "shift": "bias"}
    for name, array in arrays.items():
        *path, kind = name.rsplit("_", 1)
        layer = module.get_submodule(".".join(path))
        # A linear layer of PyTorch holds its weights the other way round.
        getattr(layer, kinds[kind])[:] = torch.tensor(array.T if kind == "w" else array)
