"""The networks in NumPy give the numbers of PyTorch, where that is installed."""

import numpy as np
import pytest

from helpers.nn import (
    MLP,
    SGD,
    Adam,
    clip_by_global_norm,
    linear,
    linear_grad,
    logistic_loss,
    relu,
    relu_grad,
    softmax_loss,
    squared_loss,
)

torch = pytest.importorskip("torch")

ROWS = 20
NETWORKS = [
    MLP((5, 7, 6, 1)),
    MLP((5, 7, 4), loss="softmax"),
    MLP((5, 7, 1), loss="squared"),
]
PAIRS = [
    (SGD(0.05), lambda p: torch.optim.SGD(p, lr=0.05)),
    (
        SGD(0.05, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    ),
    (Adam(0.01), lambda p: torch.optim.Adam(p, lr=0.01)),
    (
        Adam(0.01, betas=(0.8, 0.95), epsilon=1e-6, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
    ),
]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def tensor(array):
    """A copy as a tensor that remembers what is computed from it."""
    return torch.tensor(array, requires_grad=True)


def same(ours, theirs, tolerance=1e-12):
    return np.allclose(ours, theirs.detach().numpy(), rtol=tolerance, atol=tolerance)


def labels(mlp, rows=ROWS):
    random = np.random.default_rng(1)
    if mlp.loss == "squared":
        return random.normal(size=rows)
    return random.integers(0, max(2, mlp.widths[-1]), rows)


def torch_loss(name, z, y):
    """The mean loss of PyTorch that goes with ours."""
    y = torch.tensor(y)
    if name == "softmax":
        return torch.nn.functional.cross_entropy(z, y)
    functions = torch.nn.functional
    by_name = {
        "logistic": functions.binary_cross_entropy_with_logits,
        "squared": functions.mse_loss,
    }
    return by_name[name](z, y.to(z.dtype).reshape(z.shape))


def torch_network(mlp, parameters):
    """Our network as PyTorch modules with the same parameters."""
    modules = []
    for w, b in mlp.views(parameters):
        layer = torch.nn.Linear(*w.shape, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(w.T))
            layer.bias.copy_(torch.tensor(b))
        modules += [layer, torch.nn.ReLU()]
    return torch.nn.Sequential(*modules[:-1])


def flat(network, of=lambda parameter: parameter):
    """Parameters of a PyTorch network (or what belongs to them) in the order of ours."""
    parts = [part for m in network if hasattr(m, "weight") for part in (of(m.weight).T, of(m.bias))]
    return torch.cat([part.reshape(-1) for part in parts])


def test_layers_equal_those_of_pytorch():
    x, w, b, dy = normal(6, 4), normal(4, 3, seed=1), normal(3, seed=2), normal(6, 3, seed=3)
    tx, tw, tb = tensor(x), tensor(w), tensor(b)
    inner = torch.nn.functional.linear(tx, tw.T, tb)
    inner.retain_grad()
    outer = torch.relu(inner)
    outer.backward(torch.tensor(dy))
    y = relu(linear(x, w, b))
    assert same(y, outer)
    inner_grad = relu_grad(dy, y)
    assert same(inner_grad, inner.grad)
    for ours, theirs in zip(linear_grad(inner_grad, x, w), (tw, tb, tx)):
        assert same(ours, theirs.grad)


@pytest.mark.parametrize(
    ("loss", "name", "outputs"),
    [(logistic_loss, "logistic", 1), (softmax_loss, "softmax", 4), (squared_loss, "squared", 1)],
)
def test_losses_equal_those_of_pytorch(loss, name, outputs):
    mlp = MLP((5, outputs), loss=name)
    z, y = 10 * normal(ROWS, outputs), labels(mlp)
    value, dz = loss(z, y)
    tz = tensor(z)
    theirs = torch_loss(name, tz, y)
    theirs.backward()
    assert same(value, theirs) and same(dz, tz.grad)


@pytest.mark.parametrize("mlp", NETWORKS, ids=str)
def test_the_gradient_of_a_network_equals_that_of_pytorch(mlp):
    parameters, x, y = mlp.initialise(seed=0), normal(ROWS, 5), labels(mlp)
    loss, gradient = mlp.loss_and_gradient(parameters, x, y)
    network = torch_network(mlp, parameters)
    theirs = torch_loss(mlp.loss, network(torch.tensor(x)), y)
    theirs.backward()
    assert same(loss, theirs)
    assert same(gradient, flat(network, of=lambda parameter: parameter.grad))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("mlp", NETWORKS, ids=str)
def test_twenty_steps_lead_where_those_of_pytorch_lead(mlp, ours, theirs):
    parameters, x, y = mlp.initialise(seed=0), normal(ROWS, 5), labels(mlp)
    network = torch_network(mlp, parameters)
    optimiser, state = theirs(network.parameters()), ours.start(mlp.size)
    for step in range(20):
        rate = ours.rate / (1 + step)  # a schedule
        optimiser.param_groups[0]["lr"] = rate
        _, gradient = mlp.loss_and_gradient(parameters, x, y)
        ours.step(parameters, gradient, state, rate=rate)
        optimiser.zero_grad()
        torch_loss(mlp.loss, network(torch.tensor(x)), y).backward()
        optimiser.step()
        assert same(parameters, flat(network))


def test_clipping_equals_that_of_pytorch():
    gradient, parameter = normal(30), tensor(normal(30, seed=1))
    parameter.grad = torch.tensor(gradient)
    norm = torch.nn.utils.clip_grad_norm_([parameter], max_norm=2.0)
    assert same(clip_by_global_norm(gradient, largest=2.0), norm)
    # PyTorch adds 1e-6 to the norm before it divides.
    assert same(gradient, parameter.grad, tolerance=1e-6)
