"""The small GPT in NumPy gives the numbers of PyTorch, where that is installed."""

import numpy as np
import pytest

from helpers.nn import (
    GPT,
    Adam,
    attention,
    attention_grad,
    block,
    block_grad,
    cross_entropy,
    gelu,
    gelu_grad,
    layer_norm,
    layer_norm_grad,
)

torch = pytest.importorskip("torch")

SMALL = GPT(vocabulary=11, context=9, width=12, heads=3, layers=2)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def tensor(array):
    """A copy as a tensor that remembers what is computed from it."""
    return torch.tensor(array, requires_grad=True)


def same(ours, theirs, tolerance=1e-11):
    return np.allclose(ours, theirs.detach().numpy(), rtol=tolerance, atol=tolerance)


def parameters_of(gpt):
    """Parameters large enough that attention is not nearly even, and biases that are not 0."""
    return gpt.initialise(3) + normal(gpt.size, seed=4) / 4


def a_batch(gpt, batch=4, length=7):
    random = np.random.default_rng(0)
    tokens, targets = random.integers(0, gpt.vocabulary, (2, batch, length))
    targets[0, 3:] = -1
    return tokens, targets


def torch_block(p, x, heads):
    """A block of GPT-2, from the functions of PyTorch."""
    functions, (batch, length, width) = torch.nn.functional, x.shape

    def norm(number, x):
        scale, shift = p[f"norm_{number}_scale"], p[f"norm_{number}_shift"]
        return functions.layer_norm(x, (width,), scale, shift)

    qkv = norm(1, x) @ p["qkv_w"] + p["qkv_b"]
    q, k, v = (part.view(batch, length, heads, -1).transpose(1, 2) for part in qkv.chunk(3, 2))
    mixed = functions.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + mixed.transpose(1, 2).reshape(batch, length, width) @ p["out_w"] + p["out_b"]
    raised = functions.gelu(norm(2, x) @ p["up_w"] + p["up_b"], approximate="tanh")
    return x + raised @ p["down_w"] + p["down_b"]


def torch_logits(gpt, flat, tokens):
    """The scores of our network, computed by PyTorch from the same flat array."""
    first, *blocks, last = torch_views(gpt, flat)
    x = first["tokens"][torch.tensor(tokens)] + first["positions"][: tokens.shape[1]]
    for each in blocks:
        x = torch_block(each, x, gpt.heads)
    x = torch.nn.functional.layer_norm(x, (gpt.width,), last["scale"], last["shift"])
    return x @ first["tokens"].T


def torch_views(gpt, flat):
    layers = []
    for (start, _), shapes in zip(gpt.slices, gpt.shapes):
        layer = {}
        for name, shape in shapes.items():
            stop = start + int(np.prod(shape))
            layer[name] = flat[start:stop].view(shape)
            start = stop
        layers.append(layer)
    return layers


def torch_loss(gpt, flat, tokens, targets):
    z, targets = torch_logits(gpt, flat, tokens), torch.tensor(targets)
    return torch.nn.functional.cross_entropy(z.flatten(0, 1), targets.flatten(), ignore_index=-1)


def test_the_layer_norm_equals_that_of_pytorch():
    x, scale, shift, dy = normal(5, 4), normal(4, seed=1), normal(4, seed=2), normal(5, 4, seed=3)
    y, kept = layer_norm(x, scale, shift)
    theirs = [tensor(array) for array in (scale, shift, x)]
    expected = torch.nn.functional.layer_norm(theirs[2], (4,), *theirs[:2])
    expected.backward(torch.tensor(dy))
    assert same(y, expected)
    for ours, other in zip(layer_norm_grad(dy, scale, kept), theirs):
        assert same(ours, other.grad)


def test_gelu_equals_that_of_pytorch():
    x, dy, slope = 3 * normal(30), normal(30, seed=1), np.empty(30)
    y, tx = gelu(x, slope=slope), tensor(x)
    expected = torch.nn.functional.gelu(tx, approximate="tanh")
    expected.backward(torch.tensor(dy))
    assert same(y, expected) and same(gelu_grad(dy, slope), tx.grad)


def test_attention_equals_that_of_pytorch():
    q, k, v, dy = (normal(3, 6, 2, 4, seed=seed) for seed in range(4))
    y, weights = attention(q, k, v)
    theirs = [tensor(array) for array in (q, k, v)]
    heads_first = [each.transpose(1, 2) for each in theirs]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)
    expected = expected.transpose(1, 2)
    expected.backward(torch.tensor(dy))
    assert same(y, expected)
    for ours, other in zip(attention_grad(dy, q, k, v, y, weights), theirs):
        assert same(ours, other.grad)


@pytest.mark.parametrize("divisor", [None, 10])
def test_the_cross_entropy_equals_that_of_pytorch(divisor):
    z, targets = 5 * normal(8, 6), np.array([0, 5, -1, 3, 2, -1, 1, 4])
    value, dz = cross_entropy(z, targets, divisor)
    tz = tensor(z)
    theirs = torch.nn.functional.cross_entropy(
        tz, torch.tensor(targets), ignore_index=-1, reduction="sum"
    ) / (divisor or 6)
    theirs.backward()
    assert same(value, theirs) and same(dz, tz.grad)


def test_a_block_equals_one_of_pytorch():
    start, stop = SMALL.slices[1]
    flat, x, dy = parameters_of(SMALL), normal(2, 5, 12), normal(2, 5, 12, seed=1)
    gradient = np.full_like(flat, np.nan)
    y, kept = block(SMALL.views(flat)[1], x, SMALL.heads)
    dx = block_grad(SMALL.views(flat)[1], kept, dy, SMALL.views(gradient)[1])
    theirs, tx = tensor(flat), tensor(x)
    expected = torch_block(torch_views(SMALL, theirs)[1], tx, SMALL.heads)
    expected.backward(torch.tensor(dy))
    assert same(y, expected) and same(dx, tx.grad)
    assert same(gradient[start:stop], theirs.grad[start:stop])


def test_the_network_and_its_gradient_equal_those_of_pytorch():
    parameters, (tokens, targets) = parameters_of(SMALL), a_batch(SMALL)
    loss, gradient = SMALL.loss_and_gradient(parameters, tokens, targets)
    theirs = tensor(parameters)
    expected = torch_loss(SMALL, theirs, tokens, targets)
    expected.backward()
    assert same(loss, expected) and same(gradient, theirs.grad)
    assert same(SMALL.logits(parameters, tokens), torch_logits(SMALL, theirs, tokens))


def test_twenty_steps_of_adamw_lead_where_those_of_pytorch_lead(tmp_path, monkeypatch):
    # The first optimiser loads PyTorch's compiler, which makes a folder that nobody removes.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    parameters, (tokens, targets) = SMALL.initialise(seed=0), a_batch(SMALL)
    theirs, adam = tensor(parameters), Adam(0.003, betas=(0.9, 0.95), weight_decay=0.1)
    optimiser = torch.optim.AdamW([theirs], lr=0.003, betas=(0.9, 0.95), weight_decay=0.1)
    state = adam.start(SMALL.size)
    for _ in range(20):
        _, gradient = SMALL.loss_and_gradient(parameters, tokens, targets)
        adam.step(parameters, gradient, state)
        optimiser.zero_grad()
        torch_loss(SMALL, theirs, tokens, targets).backward()
        optimiser.step()
    # Adam divides by the root of the squares: where a gradient is nearly 0, rounding grows.
    assert same(parameters, theirs, tolerance=1e-7)
