"""Memory and bytes of a layout are those of real runs, to the byte."""

import doctest
import math

import numpy as np
import pytest

from helpers.engine import spmd
from helpers.engine.collectives import all_reduce
from helpers.engine.mesh import Mesh
from helpers.nn import GPT, SGD, Adam
from helpers.parallel import counted, schedules
from helpers.parallel.hybrid import Hybrid
from helpers.planner import layout
from helpers.planner.layout import Layout, factorisations, memory, sent_bytes, units

# Numbers that split evenly over all ranks and rings: then the formulas hold to the byte.
MODEL = GPT(vocabulary=16, context=16, width=16, heads=4, layers=8)
BATCH, LENGTH = 16, 8

LAYOUTS = [
    *(Layout(*sizes) for ranks in (1, 2, 4, 8) for sizes in factorisations(ranks, MODEL)),
    Layout(2, 2, 2, microbatches=4, zero=1),
    Layout(4, 2, 1, microbatches=2, zero=1),
    Layout(2, 2, 2, microbatches=2, sequence=True, zero=1),
    Layout(1, 4, 2, microbatches=2, sequence=True, recompute="selective"),
    Layout(1, 2, 2, microbatches=4, recompute="full"),
    Layout(1, 2, 2, microbatches=4, sequence=True, recompute="full"),
    Layout(1, 1, 4, microbatches=8, schedule=schedules.gpipe),
    Layout(1, 1, 2, microbatches=4, schedule=schedules.interleaved, chunks=2),
    Layout(1, 2, 2, microbatches=2, schedule=schedules.interleaved, chunks=4),
    Layout(1, 1, 4, microbatches=4, schedule=schedules.one_by_one),
]


def name_of(plan):
    extra = [plan.schedule.__name__, *(str(plan.chunks),) * (plan.chunks > 1)]
    extra += ["ZeRO"] * plan.zero + ["sequence"] * plan.sequence
    extra += [plan.recompute] * (plan.recompute != "none")
    return f"{plan} {plan.microbatches} {' '.join(extra)}"


each_layout = pytest.mark.parametrize("plan", LAYOUTS, ids=name_of)


def lines(batch=BATCH):
    return np.random.default_rng(0).integers(0, MODEL.vocabulary, (batch, LENGTH))


def program(rank, plan, optimiser, dtype, steps=2):
    groups = counted.count(rank)
    settings = dict(microbatches=plan.microbatches, schedule=plan.schedule, chunks=plan.chunks)
    settings |= dict(zero=plan.zero, sequence=plan.sequence, recompute=plan.recompute)
    trainer = Hybrid(rank, MODEL, optimiser, dtype=dtype, **settings)
    sent = []
    for _ in range(steps):
        before = {axis: group.sent for axis, group in groups.items()}
        trainer.step(lines(), lines())
        sent.append({axis: group.sent - before[axis] for axis, group in groups.items()})
    return rank.coordinate, trainer.held(), sent


def measured(plan, optimiser, dtype="f8"):
    mesh = Mesh(plan.data, plan.tensor, plan.pipeline)
    return spmd.run(None, mesh, program, plan, optimiser, dtype).results


@each_layout
def test_memory_and_bytes_are_those_of_a_run(plan):
    for where, held, sent in measured(plan, Adam(0.01)):
        at = dict(pipeline=where.pipeline, itemsize=8)
        assert held == memory(MODEL, plan, BATCH, LENGTH, data=where.data, **at)
        for step in sent:
            world = step.pop("world")
            assert step == sent_bytes(MODEL, plan, BATCH, LENGTH, **at)
            assert world <= 2 * 16  # loss and norm, whatever the layout


@pytest.mark.parametrize(("optimiser", "moments"), [(SGD(0.1), 0), (SGD(0.1, 0.9), 1)])
def test_memory_follows_the_optimiser_and_the_dtype(optimiser, moments):
    plan = Layout(2, 2, 2, microbatches=2, zero=1)
    for where, held, _ in measured(plan, optimiser, "f4"):
        at = dict(data=where.data, pipeline=where.pipeline)
        right = memory(MODEL, plan, BATCH, LENGTH, **at, moments=moments, itemsize=4)
        assert held == right


def test_zero_cuts_uneven_layers_to_the_byte():
    plan, gpt = Layout(data=5, zero=1), GPT(vocabulary=7, context=5, width=6, heads=2, layers=2)
    tokens = np.zeros((5, 4), int)

    def of_rank(rank):
        trainer = Hybrid(rank, gpt, Adam(0.01), zero=1)
        trainer.step(tokens, tokens)
        return trainer.held()

    for rank, held in enumerate(spmd.run(None, Mesh(data=5), of_rank).results):
        assert held == memory(gpt, plan, batch=5, length=4, data=rank)
    states = [memory(gpt, plan, 5, 4, data=rank)["state"] for rank in range(5)]
    assert sum(states) == 2 * 8 * gpt.size and len(set(states)) > 1


def test_all_stages_together_have_the_model_and_one_copy_of_the_table():
    for plan in LAYOUTS:
        whole = sum(sum(units(MODEL, plan, stage)) for stage in range(plan.pipeline))
        table, replicated = MODEL.vocabulary * MODEL.width, 6 * MODEL.width * MODEL.layers
        replicated += MODEL.context * MODEL.width + 2 * MODEL.width
        copy = table if plan.stages > 1 else 0
        assert whole * plan.tensor == MODEL.size + copy + (plan.tensor - 1) * replicated


def test_every_factorisation_that_fits_is_found():
    found = {sizes for ranks in range(1, 9) for sizes in factorisations(ranks, MODEL)}
    for data in range(1, 9):
        for tensor in range(1, 9):
            for pipeline in range(1, 9):
                fits = tensor in (1, 2, 4) and data * tensor * pipeline <= 8
                assert ((data, tensor, pipeline) in found) == fits
    assert all(math.prod(sizes) == 8 for sizes in factorisations(8, MODEL))


def test_counting_can_be_stopped():
    def add_twice(rank):
        groups, x = counted.count(rank), np.ones(100)
        first = all_reduce(rank.data, x)
        sent = groups["data"].sent
        counted.stop(groups)
        second = all_reduce(rank.data, x)
        return first[0] == second[0] == 2, sent, groups["data"].sent

    assert spmd.run(None, Mesh(data=2), add_twice).results == [(True, 800, 800)] * 2


@pytest.mark.parametrize("module", [layout, counted])
def test_examples(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed
