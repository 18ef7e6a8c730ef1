"""Mutual learning, multi-task and split learning give the numbers of PyTorch's autograd."""

import numpy as np
import pytest

from helpers.engine import spmd
from helpers.engine.mesh import Mesh
from helpers.learning.multi_task import learn_tasks
from helpers.learning.mutual import learn_mutually
from helpers.learning.soft import Learner
from helpers.learning.vertical import learn_split
from helpers.nn import MLP, SGD

torch = pytest.importorskip("torch")

NETWORK = MLP((5, 7, 1))
RATE, WEIGHT = 0.2, 1.5


def rows(n=40):
    random = np.random.default_rng(0)
    x = random.normal(size=(n, 5))
    return x, (x[:, 0] + x[:, 1] > 0).astype(float)


def tensors(seed):
    """The layers of a network as tensors that remember what is computed from them."""
    layers = NETWORK.views(NETWORK.initialise(seed))
    return [torch.tensor(a.copy(), requires_grad=True) for layer in layers for a in layer]


def scores(parts, x):
    w, b, v, c = parts
    return (torch.relu(x @ w + b) @ v + c)[:, 0]


def flat(parts):
    return np.concatenate([part.detach().numpy().ravel() for part in parts])


def batches(seed, n, size, epochs):
    random = np.random.default_rng([seed, 2])
    for _ in range(epochs):
        order = random.permutation(n)
        for start in range(0, n, size):
            yield order[start : start + size]


def on_ranks(p, program):
    return spmd.run(None, Mesh(data=p), program).results


def test_mutual_learning_is_cross_entropy_plus_kullback_leibler():
    x, y = rows()

    def program(rank):
        learner = Learner(NETWORK, SGD(RATE), seed=rank.index, batch=8)
        learn_mutually(rank.world, learner, x, y, 3, WEIGHT, seed=4)
        return learner.parameters

    X, Y = torch.tensor(x), torch.tensor(y)
    models = [tensors(k) for k in range(3)]
    optimisers = [torch.optim.SGD(parts, lr=RATE) for parts in models]
    for b in batches(4, len(x), 8, 3):
        said = [torch.sigmoid(scores(parts, X[b])).detach() for parts in models]
        for k, parts in enumerate(models):
            z = scores(parts, X[b])
            p = torch.sigmoid(z)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(z, Y[b])
            for j in (j for j in range(3) if j != k):  # KL(p_j || p_k), equation 6
                q = said[j]
                kl = q * torch.log(q / p) + (1 - q) * torch.log((1 - q) / (1 - p))
                loss = loss + WEIGHT * kl.mean() / 2
            optimisers[k].zero_grad()
            (loss / (1 + WEIGHT)).backward()
        for optimiser in optimisers:
            optimiser.step()
    for found, parts in zip(on_ranks(3, program), models):
        np.testing.assert_allclose(found, flat(parts), rtol=1e-10, atol=1e-12)


def test_shared_layers_are_those_of_one_network_with_two_heads():
    x, y = rows()
    labels = [y, (x[:, 2] > 0).astype(float)]

    def program(rank):
        learner = Learner(NETWORK, SGD(RATE), seed=1, batch=8)
        learn_tasks(rank.world, learner, x, labels[rank.index], 3, seed=4)
        return learner.parameters

    X, Y = torch.tensor(x), [torch.tensor(part) for part in labels]
    w, b, v, c = tensors(1)
    heads = [[v, c], [torch.tensor(a.detach().numpy(), requires_grad=True) for a in (v, c)]]
    shared = torch.optim.SGD([w, b], lr=RATE / 2)  # the mean of two losses
    own = torch.optim.SGD([part for head in heads for part in head], lr=RATE)
    for rows_ in batches(4, len(x), 8, 3):
        loss = sum(
            torch.nn.functional.binary_cross_entropy_with_logits(
                scores([w, b, *head], X[rows_]), target[rows_]
            )
            for head, target in zip(heads, Y)
        )
        for optimiser in (shared, own):
            optimiser.zero_grad()
        loss.backward()
        shared.step()
        own.step()
    for found, head in zip(on_ranks(2, program), heads):
        np.testing.assert_allclose(found, flat([w, b, *head]), rtol=1e-10, atol=1e-12)


def test_split_learning_is_a_network_over_all_columns():
    x, y = rows()
    columns = [[0, 2], [1, 3, 4]]

    def program(rank):
        mine = x[:, columns[rank.index]]
        labels = None if rank.index else y
        party = learn_split(
            rank.world, NETWORK, columns, mine, labels, 5, batch=8, rate=RATE, seed=4
        )
        return party.scores(mine)

    X, Y, parts = torch.tensor(x), torch.tensor(y), tensors(4)
    optimiser = torch.optim.SGD(parts, lr=RATE)
    for b in batches(4, len(x), 8, 5):
        optimiser.zero_grad()
        z = scores(parts, X[b])
        torch.nn.functional.binary_cross_entropy_with_logits(z, Y[b]).backward()
        optimiser.step()
    right = scores(parts, X).detach().numpy()
    np.testing.assert_allclose(on_ranks(2, program)[0], right, rtol=1e-10, atol=1e-12)
