"""Stages of a GPT, and all three kinds of parallelism at once: equal to one rank alone."""

import doctest
import itertools
import os
import signal
import sys
import threading
import time

import cloudpickle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.cluster import open_cluster
from helpers.engine import spmd
from helpers.engine.errors import RankError
from helpers.engine.mesh import Mesh
from helpers.nn import GPT, SGD, Adam, clip_by_global_norm
from helpers.parallel import hybrid, schedules, stage
from helpers.parallel.hybrid import Hybrid
from helpers.parallel.stage import RECOMPUTE, GPTStage, Parts, deal

cloudpickle.register_pickle_by_value(sys.modules[__name__])

DEEP = GPT(vocabulary=8, context=8, width=8, heads=4, layers=8)
ROWS, LENGTH, STEPS = 8, 8, 5
CLIP = 0.1  # shorter than the gradients of the first steps
MESHES = [
    Mesh(data, tensor, pipeline)
    for data, tensor, pipeline in itertools.product((1, 2, 4, 8), (1, 2, 4), (1, 2, 4, 8))
    if data * tensor * pipeline in (1, 2, 4, 8)
]
WAYS = {
    "plain": {},
    "clip": {"largest_norm": CLIP},
    "zero and clip": {"zero": 1, "largest_norm": CLIP},
    "sequence and clip": {"sequence": True, "recompute": "selective", "largest_norm": CLIP},
    "gpipe, full": {"schedule": schedules.gpipe, "recompute": "full"},
    "zero bubble": {"schedule": schedules.zero_bubble, "sequence": True, "zero": 1},
    "interleaved": {"schedule": schedules.interleaved, "chunks": 2},
}


def batch(gpt=DEEP, rows=ROWS, length=LENGTH):
    random = np.random.default_rng(0)
    tokens = random.integers(0, gpt.vocabulary, (rows, length))
    return tokens, random.integers(-1, gpt.vocabulary, (rows, length))


def program(rank, options, gpt=DEEP, optimiser=None, rows=ROWS, length=LENGTH, steps=STEPS):
    trainer = Hybrid(rank, gpt, optimiser or Adam(0.01, weight_decay=0.1), **options)
    losses = [trainer.step(*batch(gpt, rows, length)) for _ in range(steps)]
    moments = {kind: trainer.layers(kind) for kind in trainer.kinds}
    return losses, trainer.norm, moments, trainer.held()


def serial(clip=None, gpt=DEEP, optimiser=None, rows=ROWS, length=LENGTH, steps=STEPS, dtype="f8"):
    optimiser = optimiser or Adam(0.01, weight_decay=0.1)
    parameters, losses, norm = gpt.initialise(0, dtype), [], None
    state = optimiser.start(gpt.size, dtype)
    for _ in range(steps):
        loss, gradient = gpt.loss_and_gradient(parameters, *batch(gpt, rows, length))
        if clip:
            norm = clip_by_global_norm(gradient, clip)
        optimiser.step(parameters, gradient, state)
        losses.append(loss)
    return losses, norm, {"parameters": parameters, **state}


def check(results, expected, gpt=DEEP, tolerance=1e-10):
    losses, norm, arrays = expected
    seen = set()
    for found, found_norm, kinds, _ in results:
        assert np.allclose(found, losses, rtol=0, atol=tolerance)
        assert norm is None or np.isclose(found_norm, norm, rtol=0, atol=tolerance)
        for kind, layers in kinds.items():
            for layer, flat in layers.items():
                whole = arrays[kind][slice(*gpt.slices[layer])]
                assert np.allclose(flat, whole, rtol=0, atol=tolerance)
                seen.add(layer)
    assert seen == set(range(gpt.layers + 2))


def microbatches(mesh, way):
    most = ROWS // mesh.data
    if WAYS[way].get("chunks"):
        return mesh.pipeline if mesh.pipeline <= most else 0
    return min(2, most)


FITTING = [
    (mesh, way)
    for mesh in MESHES
    for way in WAYS
    if microbatches(mesh, way) and mesh.pipeline * WAYS[way].get("chunks", 1) <= DEEP.layers
]


@pytest.mark.parametrize("way", ["plain", "clip", "zero and clip", "zero bubble"])
def test_two_of_each_axis_equal_one_rank(way):
    run_and_check(Mesh(2, 2, 2), way)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "way"), FITTING, ids=[f"{m.data}x{m.tensor}x{m.pipeline} {way}" for m, way in FITTING]
)
def test_every_mesh_that_fits_equals_one_rank(mesh, way):
    run_and_check(mesh, way)


def run_and_check(mesh, way):
    options = {"microbatches": microbatches(mesh, way), **WAYS[way]}
    run = spmd.run(None, mesh, program, options, patience=30)
    check(run.results, serial(options.get("largest_norm")))


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_mesh_shape_and_number_of_micro_batches(data):
    heads = data.draw(st.sampled_from([2, 4]), "heads")
    tensor = data.draw(st.sampled_from([1, 2]), "tensor")
    pipeline, ranks = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    layers = data.draw(st.integers(pipeline, 4), "layers")
    gpt = GPT(6, 6, heads * data.draw(st.integers(1, 3)), heads, layers)
    parts = data.draw(st.integers(1, 3), "micro-batches")
    rows = data.draw(st.integers(ranks * parts, ranks * parts + 3), "rows")
    length = 2 * data.draw(st.integers(1, 3), "half of the length")
    options = {
        "microbatches": parts,
        "zero": data.draw(st.sampled_from([0, 1])),
        "sequence": data.draw(st.booleans()),
        "recompute": data.draw(st.sampled_from(RECOMPUTE)),
        "schedule": data.draw(
            st.sampled_from([schedules.gpipe, schedules.one_f_one_b, schedules.zero_bubble])
        ),
        "largest_norm": data.draw(st.sampled_from([None, CLIP])),
    }
    sizes = gpt, SGD(0.1, momentum=0.9), rows, length, 2
    run = spmd.run(None, Mesh(ranks, tensor, pipeline), program, options, *sizes)
    check(run.results, serial(options["largest_norm"], *sizes), gpt)


def test_unequal_stages_equal_one_rank():
    options = {"places": [0, 1, 3, 8], "microbatches": 2}
    check(spmd.run(None, Mesh(pipeline=3), program, options).results, serial())


def test_in_float32_it_is_equal_to_a_millionth():
    options = {"microbatches": 2, "dtype": np.float32, "largest_norm": CLIP}
    run = spmd.run(None, Mesh(2, 2, 2), program, options, DEEP, SGD(0.1))
    check(run.results, serial(CLIP, DEEP, SGD(0.1), dtype="f4"), tolerance=1e-6)


def test_on_worker_processes_it_equals_one_rank():
    with open_cluster(workers=2) as cluster:
        options = {"microbatches": 2, **WAYS["sequence and clip"]}
        check(spmd.run(cluster.client, Mesh(2, 2, 2), program, options).results, serial(CLIP))


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("zero", [0, 1])
def test_memory_of_a_rank_equals_the_formula_to_the_byte(zero):
    mesh, itemsize = Mesh(2, 2, 2), 8
    run = spmd.run(None, mesh, program, {"zero": zero, "microbatches": 2})
    width, vocabulary, context, layers = 8, 8, 8, 8
    a_block = 12 * width**2 // 2 + (3 + 4) * width // 2 + 2 * width + 4 * width
    tables = (vocabulary // 2 * width, context * width)
    first = sum(tables) + layers // 2 * a_block
    last = layers // 2 * a_block + 2 * width + tables[0]
    for index, (*_, held) in enumerate(run.results):
        count = (first, last)[mesh.coordinate(index).pipeline]
        assert held["parameters"] == held["gradients"] == count * itemsize
        assert held["state"] == 2 * count * itemsize // (2 if zero else 1)


@pytest.mark.parametrize(
    ("schedule", "most"), [(schedules.gpipe, [4, 4]), (schedules.one_f_one_b, [2, 1])]
)
def test_activations_are_those_of_the_micro_batches_that_a_schedule_keeps(schedule, most):
    options = {"schedule": schedule, "microbatches": 4}
    run = spmd.run(None, Mesh(pipeline=2), program, options)
    alone = spmd.run(None, Mesh(pipeline=2), program, {"microbatches": 1}, DEEP, None, ROWS // 4)
    for rank in range(2):
        one = alone.results[rank][3]["activations"]
        assert run.results[rank][3]["activations"] == most[rank] * one


def test_recomputation_keeps_less():
    gpt = GPT(vocabulary=8, context=8, width=8, heads=4, layers=4)
    kept = {}
    for recompute in RECOMPUTE:
        run = spmd.run(None, Mesh(), program, {"recompute": recompute}, gpt)
        kept[recompute] = run.results[0][3]["activations"]
    batch_heads, positions = ROWS * gpt.heads, ROWS * LENGTH
    weights, inputs = batch_heads * LENGTH**2 * 8, positions * gpt.width * 8
    # Two norms and what they give, queries, keys, values, what is mixed, slopes and units.
    a_block = (4 + 3 + 1 + 4 + 4) * inputs + weights
    head = positions * (2 * gpt.width + gpt.vocabulary) * 8
    assert kept["none"] == gpt.layers * a_block + head
    assert kept["selective"] == kept["none"] - gpt.layers * weights
    assert kept["full"] == gpt.layers * inputs + head


# ---------------------------------------------------------------- going on from whole layers


def test_training_goes_on_from_whole_layers_under_another_mesh():
    def first(rank):
        trainer = Hybrid(rank, DEEP, Adam(0.01), microbatches=2, zero=1)
        losses = [trainer.step(*batch()) for _ in range(3)]
        return losses, {kind: trainer.layers(kind) for kind in trainer.kinds}

    def second(rank, whole):
        trainer = Hybrid(rank, DEEP, Adam(0.01), microbatches=2, seed=5, sequence=True)
        trainer.load(lambda kind, layer: whole[kind][layer], steps=3)
        return [trainer.step(*batch()) for _ in range(2)]

    run = spmd.run(None, Mesh(2, 1, 4), first)
    whole = {"parameters": {}, "mean": {}, "square": {}}
    for _, kinds in run.results:
        for kind, layers in kinds.items():
            whole[kind] |= layers
    later = spmd.run(None, Mesh(1, 4, 2), second, whole).results
    expected, *_ = serial(optimiser=Adam(0.01))
    assert all(np.allclose(run.results[0][0] + more, expected, atol=1e-10) for more in later)


# ---------------------------------------------------------------- what goes wrong


def test_a_killed_rank_ends_all_within_ten_seconds():
    def program(rank):
        if rank.index == 5:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
        trainer = Hybrid(rank, DEEP, Adam(0.01), microbatches=2)
        while True:
            trainer.step(*batch())

    with open_cluster(workers=4) as cluster:
        began = time.monotonic()
        with pytest.raises(RankError, match="its worker has died"):
            spmd.run(cluster.client, Mesh(2, 2, 2), program)
        assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("mesh", "options", "sentence"),
    [
        (Mesh(tensor=3), {}, "3 ranks do not divide 4 heads.*choose 1, 2, 4 or 8|choose 1, 2 or 4"),
        (Mesh(), {"chunks": 2}, "one_f_one_b has one chunk a rank, not 2"),
        (
            Mesh(pipeline=3),
            {"chunks": 3, "schedule": schedules.interleaved, "microbatches": 3},
            "8 blocks do not make 9 stages.*take 1 to 8",
        ),
        (Mesh(data=3), {"microbatches": 4}, "8 rows do not make 4 micro-batches.*take 12 rows"),
        (Mesh(), {"zero": 2}, "choose 0 or 1"),
        (Mesh(), {"recompute": "half"}, "choose one of none, selective, full"),
        (
            Mesh(),
            {"microbatches": 0},
            "microbatches must be a whole number from 1 up|give 1 or more",
        ),
        (Mesh(), {"largest_norm": 0.0}, "give a positive length"),
        (Mesh(pipeline=2), {"places": [0, 8]}, "give 3 rising numbers from 0 to 8"),
        (
            Mesh(pipeline=2),
            {"schedule": schedules.interleaved, "chunks": 2, "microbatches": 3},
            "take 2 or 4",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(mesh, options, sentence):
    with pytest.raises(RankError, match=sentence):
        spmd.run(None, mesh, program, options)


def test_a_length_that_does_not_split_is_refused():
    with pytest.raises(RankError, match="7 positions do not split over 2 ranks"):
        spmd.run(None, Mesh(tensor=2), program, {"sequence": True}, DEEP, None, ROWS, 7)


# ---------------------------------------------------------------- parts of stages


def test_every_parameter_lies_on_one_stage_and_the_table_on_two():
    dealt = deal(DEEP, 3)
    assert [number for layers in dealt for number in layers] == list(range(DEEP.layers + 2))
    sizes = [Parts(DEEP, layers).size for layers in dealt]
    assert sum(sizes) == DEEP.size + DEEP.vocabulary * DEEP.width


def test_a_stage_refuses_another_way_to_recompute():
    parts = Parts(DEEP, range(DEEP.layers + 2))
    with pytest.raises(ValueError, match="recompute is 'some'"):
        GPTStage(parts, DEEP.initialise(0), np.empty(DEEP.size), recompute="some")


@pytest.mark.parametrize("module", [hybrid, stage])
def test_examples_in_docstrings_hold(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0
