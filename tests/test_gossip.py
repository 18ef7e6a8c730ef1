"""Gossip: on the complete graph it is the all-reduce, and it shrinks as the spectral gap says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.engine import spmd
from helpers.engine.collectives import all_reduce
from helpers.engine.mesh import Mesh
from helpers.learning.gossip import (
    agree,
    average_with,
    graph,
    learn_by_gossip,
    mixing_weights,
    second_eigenvalue,
)
from helpers.nn import MLP

RANKS = 6
NETWORK = MLP((4, 5, 1))


def on_ranks(p, program, *args):
    return spmd.run(None, Mesh(data=p), program, *args).results


def numbers_of(rank, n=3):
    return np.random.default_rng(rank).normal(size=n)


graphs = st.builds(
    graph,
    st.sampled_from(["ring", "random", "complete"]),
    st.integers(1, 12),
    st.integers(0, 99),
    st.integers(2, 6),
)


@settings(deadline=None, max_examples=60)
@given(graphs)
def test_weights_are_symmetric_keep_the_mean_and_shrink_what_differs(edges):
    weights = mixing_weights(edges)
    assert np.array_equal(edges, edges.T) and not edges.diagonal().any()
    assert np.allclose(weights, weights.T) and np.allclose(weights.sum(axis=0), 1)
    assert (weights >= -1e-15).all() and not (weights > 1e-15)[
        ~edges & ~np.eye(len(edges), dtype=bool)
    ].any()
    assert second_eigenvalue(weights) < 1  # all graphs are connected


def test_a_random_graph_has_the_ring_in_it_and_the_degree_that_was_asked():
    edges = graph("random", 16, seed=3, degree=4)
    assert (edges >= graph("ring", 16)).all()
    assert edges.sum(axis=1).max() == 4 and edges.sum() > graph("ring", 16).sum()
    assert not np.array_equal(edges, graph("random", 16, seed=4, degree=4))


def test_the_ring_has_the_eigenvalues_that_are_known():
    """1/3 + 2/3 cos(2 pi k / p), for weights of a third (Boyd et al. 2006)."""
    p = 9
    found = np.sort(np.linalg.eigvalsh(mixing_weights(graph("ring", p))))
    right = np.sort(1 / 3 + 2 / 3 * np.cos(2 * np.pi * np.arange(p) / p))
    assert np.allclose(found, right, atol=1e-12)


def test_on_the_complete_graph_a_round_is_the_all_reduce():
    weights = mixing_weights(graph("complete", RANKS))

    def program(rank):
        mine = numbers_of(rank.index)
        return average_with(rank.world, mine, weights), all_reduce(rank.world, mine) / rank.size

    for gossip, mean in on_ranks(RANKS, program):
        np.testing.assert_allclose(gossip, mean, rtol=1e-13)


@pytest.mark.parametrize("kind", ["ring", "random", "complete"])
def test_rounds_on_ranks_are_products_with_the_weights(kind):
    weights = mixing_weights(graph(kind, RANKS, seed=1))
    found = np.array(
        on_ranks(RANKS, lambda rank: agree(rank.world, numbers_of(rank.index), weights, 5))
    )
    x = np.array([numbers_of(k) for k in range(RANKS)])
    for number in range(6):
        right = np.linalg.matrix_power(weights, number) @ x
        np.testing.assert_allclose(found[:, number], right, rtol=1e-10, atol=1e-13)
    far = np.linalg.norm(found - found.mean(axis=0), axis=(0, 2))
    bound = far[0] * second_eigenvalue(weights) ** np.arange(6)
    assert (far <= bound + 1e-12).all()
    assert np.allclose(found.mean(axis=0), x.mean(axis=0))


def batch_of(rank, step):
    random = np.random.default_rng([rank, step])
    x = random.normal(size=(8, 4))
    return x, (x[:, 0] > 0.2 * rank).astype(float)


def gossiped(rank, weights, steps):
    def gradient_of(w, step):
        return NETWORK.loss_and_gradient(w, *batch_of(rank.index, step))[1]

    return learn_by_gossip(rank.world, NETWORK.initialise(0), gradient_of, weights, steps, 0.3)


@pytest.mark.parametrize("kind", ["ring", "complete"])
def test_training_by_gossip_is_that_of_one_process(kind):
    weights, p = mixing_weights(graph(kind, 4)), 4
    w = np.array([NETWORK.initialise(0)] * p)
    for step in range(6):
        g = [NETWORK.loss_and_gradient(w[k].copy(), *batch_of(k, step))[1] for k in range(p)]
        w = weights @ w - 0.3 * np.array(g)
    np.testing.assert_allclose(on_ranks(p, gossiped, weights, 6), w, rtol=1e-10, atol=1e-13)


def test_who_talks_to_nobody_trains_alone():
    alone = on_ranks(3, gossiped, np.eye(3), 4)
    (first,) = on_ranks(1, gossiped, np.eye(1), 4)
    assert np.array_equal(alone[0], first) and not np.allclose(alone[0], alone[1])


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="no graph 'star': choose ring, random, complete"):
        graph("star", 4)
    with pytest.raises(ValueError, match="0 ranks: give 1 or more"):
        graph("ring", 0)
    with pytest.raises(ValueError, match="not symmetric: who is heard must also hear"):
        mixing_weights([[False, True], [False, False]])
    assert second_eigenvalue(mixing_weights(graph("ring", 1))) == 0
