"""The benchmark of the small GPT measures what it says, and its targets are met."""

import os

import numpy as np
import pytest

from benchmarks import gpt_tokens
from benchmarks.measure import as_table
from benchmarks.peers import launch
from benchmarks.peers.gpt_data import LINES, NETWORK, TOKENS, lines
from helpers.engine import spmd
from helpers.engine.mesh import Mesh

# How many times as many tokens a second as the peer.
TARGETS = {"torch": 0.9, "ddp": 1.1}
TWO_CORES = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="the targets are for two cores")
NEEDS_TORCH = pytest.mark.skipif(bool(launch.missing("torch")), reason="torch is not installed")


def test_the_lines_are_dealt_out_without_loss():
    tokens, targets, count = lines(0, 1)
    parts = [lines(index, 2) for index in (0, 1)]
    assert tokens.shape == targets.shape == (LINES, 32) and tokens.size == TOKENS
    np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), tokens)
    np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), targets)
    assert count == parts[0][2] == parts[1][2] == (targets >= 0).sum() < TOKENS


def test_a_training_that_goes_another_way_is_not_measured():
    with pytest.raises(RuntimeError, match="In step 5 the loss is 3.000000, that of a plain loop"):
        gpt_tokens.check(3.0)


def test_two_ranks_are_checked_and_timed():
    seconds = spmd.run(None, Mesh(data=2), gpt_tokens.train).results
    assert all(0 < each < 5 for each in seconds)


def test_the_limit_holds_all_products_of_a_step_and_no_more():
    width, context, found = NETWORK.width, NETWORK.context, gpt_tokens.products(2)
    weights = 12 * width**2 * NETWORK.layers + width * NETWORK.vocabulary
    attention = 2 * context * width * NETWORK.layers
    multiplications = sum(left.size * right.shape[-1] for left, right, _ in found)
    assert multiplications == 3 * 2 * context * (weights + attention)
    for left, right, out in found:
        np.matmul(left, right, out=out)  # the shapes fit


def test_the_table_has_seconds_and_tokens_a_second(monkeypatch):
    monkeypatch.setattr(launch, "present", list)
    monkeypatch.setattr(gpt_tokens, "_ours", lambda ranks, program: 0.04 / ranks)
    monkeypatch.setattr(gpt_tokens, "_peer", lambda ranks: 0.08 / ranks)
    one, two = gpt_tokens.run(1)
    assert (one.name, one.ours, one.peers, one.limit) == ("1 rank", 0.04, {"torch": 0.08}, 0.04)
    assert two.more["ours tokens/s"] == TOKENS / 0.02 == 2 * two.more["ddp tokens/s"]
    assert "102400" in as_table([one, two]).splitlines()[-1]


@NEEDS_TORCH
def test_the_peer_is_the_same_network_and_starts_where_ours_starts():
    import torch

    from benchmarks.peers.gpt_model import Model

    parameters, (tokens, targets, count) = NETWORK.initialise(0, np.float32), lines(0, 1)
    loss, gradient = NETWORK.loss_and_gradient(parameters, tokens, targets)
    model = Model(NETWORK, parameters)
    theirs = model(torch.tensor(tokens), torch.tensor(targets), count)
    theirs.backward()
    assert sum(each.numel() for each in model.parameters()) == NETWORK.size
    assert theirs.item() == pytest.approx(loss, rel=1e-6)
    views, block = NETWORK.views(gradient), model.blocks[1]
    for ours, other in (
        (views[0]["tokens"], model.tokens.weight),
        (views[0]["positions"], model.positions.weight),
        (views[2]["qkv_w"].T, block.qkv.weight),
        (views[2]["norm_2_shift"], block.norm_2.bias),
        (views[2]["down_b"], block.down.bias),
        (views[3]["scale"], model.norm.weight),
    ):
        assert np.abs(ours - other.grad.numpy()).max() < 1e-6


@pytest.mark.slow
@pytest.mark.timeout(900)
@TWO_CORES
@NEEDS_TORCH
def test_the_gpt_trains_as_quickly_as_its_targets():
    for case in gpt_tokens.run(5):
        [(peer, seconds)] = case.peers.items()
        assert TARGETS[peer] * case.ours <= seconds, case
