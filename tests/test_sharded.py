"""Sharded training equals serial training, and each rank holds what the formula says."""

import doctest
from functools import cache

import numpy as np
import pytest

from helpers.engine import spmd
from helpers.engine.errors import RankError
from helpers.engine.mesh import Mesh
from helpers.nn import MLP, SGD, Adam, clip_by_global_norm
from helpers.parallel import sharded
from helpers.parallel.sharded import (
    STAGES,
    Sharded,
    global_norm,
    gradient_by_layers,
    memory_of,
    predicted_bytes,
)

OPTIMISERS = {
    "sgd": (SGD(0.1), 0),
    "momentum": (SGD(0.1, 0.9, weight_decay=0.01), 1),
    "adam": (Adam(0.01, weight_decay=0.1), 2),
}
MLPS = {"odd": MLP((7, 5, 3, 1)), "even": MLP((8, 16, 8, 1))}
ROWS, STEPS = 21, 4


def data(mlp, rows=ROWS, dtype=np.float64):
    random = np.random.default_rng(0)
    return random.normal(size=(rows, mlp.widths[0])).astype(dtype), np.arange(rows) % 2


def serial(mlp, optimiser, clip=None, dtype=np.float64):
    (x, y), parameters = data(mlp, dtype=dtype), mlp.initialise(3, dtype)
    state = optimiser.start(parameters.size, dtype)
    for _ in range(STEPS):
        _, gradient = mlp.loss_and_gradient(parameters, x, y)
        if clip is not None:
            clip_by_global_norm(gradient, clip)
        optimiser.step(parameters, gradient, state)
    return parameters


def program(rank, mlp, optimiser, stage, clip=None, dtype=np.float64):
    x, y = data(mlp, dtype=dtype)
    mine = np.array_split(np.arange(ROWS), rank.size)[rank.index]
    shared = Sharded(rank.data, mlp.initialise(3, dtype), optimiser, stage, mlp.slices)
    norms, loss = [], 0.0
    for _ in range(STEPS):
        loss = gradient_by_layers(mlp, shared, x[mine], y[mine], divisor=ROWS)
        norms.append(shared.step(clip=clip))
    return shared.whole(), shared.held(), norms, loss


@cache  # equality and memory are looked at in the same runs
def results(ranks, *args):
    return spmd.run(None, Mesh(data=ranks), program, *args).results


# ---------------------------------------------------------------- equal to serial


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", OPTIMISERS)
def test_training_equals_serial_training(name, stage, ranks):
    optimiser, _ = OPTIMISERS[name]
    for mlp in MLPS.values():
        right = serial(mlp, optimiser)
        for whole, *_ in results(ranks, mlp, optimiser, stage):
            assert np.abs(whole - right).max() < 1e-12


@pytest.mark.parametrize("stage", STAGES)
def test_float32_stays_float32_and_equals_serial_but_for_rounding(stage):
    mlp, optimiser = MLPS["odd"], Adam(0.01)
    right = serial(mlp, optimiser, dtype=np.float32)
    for whole, *_ in results(3, mlp, optimiser, stage, None, np.float32):
        assert whole.dtype == np.float32
        assert np.abs(whole - right).max() < 2e-5


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_all_stages_and_all_ranks_agree_to_the_last_bit(ranks):
    found = [
        whole for stage in STAGES for whole, *_ in results(ranks, MLPS["odd"], Adam(0.01), stage)
    ]
    assert len(found) == len(STAGES) * ranks
    assert all(np.array_equal(whole, found[0]) for whole in found)


@pytest.mark.parametrize("ranks", [1, 3, 8])
@pytest.mark.parametrize("stage", STAGES)
def test_clipping_by_the_global_norm_equals_serial_clipping(stage, ranks):
    mlp, optimiser = MLPS["odd"], SGD(0.5, 0.9)
    right = serial(mlp, optimiser, clip=0.05)
    assert np.abs(right - serial(mlp, optimiser)).max() > 0.01  # it does clip
    found = results(ranks, mlp, optimiser, stage, 0.05)
    for whole, _, norms, _ in found:
        assert np.abs(whole - right).max() < 1e-12
        assert norms == found[0][2]
        assert min(norms) > 0.05


def test_the_parts_of_the_loss_add_up_to_that_of_all_rows():
    mlp = MLPS["odd"]
    parts = [loss for *_, loss in results(4, mlp, SGD(0.0), 3)]
    assert sum(parts) == pytest.approx(mlp.loss_at(mlp.initialise(3), *data(mlp)), rel=1e-13)


def test_more_ranks_than_parameters_leave_some_ranks_with_nothing():
    def few(rank, stage):
        shared = Sharded(rank.data, np.arange(3.0), Adam(0.5), stage)
        shared.give(0, np.ones(3) / rank.size)
        shared.step()
        return shared.whole(), shared.held()["state"]

    for stage in STAGES[1:]:
        found = spmd.run(None, Mesh(data=8), few, stage).results
        assert [nbytes for _, nbytes in found] == [16] * 3 + [0] * 5
        assert all(np.abs(whole - (np.arange(3.0) - 0.5)).max() < 1e-6 for whole, _ in found)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", OPTIMISERS)
def test_each_rank_holds_what_the_formula_says_to_the_byte(name, stage, ranks):
    optimiser, moments = OPTIMISERS[name]
    for mlp in MLPS.values():
        for rank, (_, held, *_) in enumerate(results(ranks, mlp, optimiser, stage)):
            right = predicted_bytes(mlp.size, ranks, rank, stage, moments, 8, mlp.slices)
            assert {kind: held[kind] for kind in right} == right


def test_the_ranks_parts_add_up_to_the_whole():
    for ranks in range(1, 9):
        kinds = [predicted_bytes(1001, ranks, rank, stage=3) for rank in range(ranks)]
        assert sum(kind["parameters"] for kind in kinds) == 4 * 1001
        assert sum(kind["state"] for kind in kinds) == 8 * 1001


@pytest.mark.parametrize("stage", STAGES)
def test_only_one_whole_unit_is_held_beside_the_parts(stage):
    mlp = MLPS["even"]
    largest = max(stop - start for start, stop in mlp.slices) * 8
    for _, held, *_ in results(2, mlp, SGD(0.1), stage):
        assert held["unit"] == (largest if stage >= 2 else 0)
        assert largest < mlp.size * 8


def test_a_slice_counts_with_all_the_memory_that_it_keeps_alive():
    whole = np.zeros(100)
    assert memory_of([whole[:5], whole[50:]]) == whole.nbytes
    assert memory_of([whole[:5].copy()]) == 40
    assert memory_of([]) == 0


# ---------------------------------------------------------------- wrong use


def on_two_ranks(act):
    def with_error(rank):
        try:
            act(rank)
        except (ValueError, TypeError) as error:
            return str(error)

    first, second = spmd.run(None, Mesh(data=2), with_error).results
    assert first == second
    return first


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda r: Sharded(r.data, np.zeros(4), SGD(1.0), 4), "There is no stage 4"),
        (lambda r: Sharded(r.data, np.zeros(4), SGD(1.0), True), "There is no stage True"),
        (lambda r: Sharded(r.data, np.zeros(4, int), SGD(1.0), 1), "give floats"),
        (lambda r: Sharded(r.data, np.zeros(4), SGD(1.0), 1, [(0, 3)]), "from 0 to 4"),
        (lambda r: Sharded(r.data, np.zeros(4), SGD(1.0), 1, [(0, 3), (2, 4)]), "follow each"),
        (lambda r: Sharded(r.data, np.zeros(4), SGD(1.0), 2).give(0, np.zeros(3)), "one number"),
        (lambda r: small(r, MLP((3, 1)), ((0, 4),)), "make it with units=mlp.slices"),
        (lambda r: global_norm(r.data, np.zeros(0)) or predicted_bytes(5, 2, 2, 1), "no rank 2"),
    ],
)
def test_wrong_use_gets_one_sentence_on_each_rank(act, words):
    said = on_two_ranks(act)
    assert words in said
    assert "\n" not in said


def small(rank, mlp, units):
    shared = Sharded(rank.data, np.zeros(4), SGD(1.0), 1, units)
    gradient_by_layers(MLP((1, 1, 1)), shared, np.zeros((1, 1)), np.zeros(1))


def test_a_gradient_that_is_not_finite_is_refused_when_it_is_to_be_clipped():
    def poisoned(rank):
        shared = Sharded(rank.data, np.zeros(4), SGD(1.0), 2)
        shared.give(0, np.full(4, np.nan if rank.index else 1.0))
        shared.step(clip=1.0)

    with pytest.raises(RankError, match="the gradient's norm is nan"):
        spmd.run(None, Mesh(data=2), poisoned)


def test_the_examples_in_its_documentation_are_right():
    result = doctest.testmod(sharded)
    assert result.attempted > 0
    assert result.failed == 0
