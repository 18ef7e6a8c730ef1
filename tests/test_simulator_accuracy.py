"""The simulator tells how long real ranks will take: costs of one run, times of others."""

from statistics import median

import numpy as np
import pytest

from helpers.cluster import open_cluster, usable_cores
from helpers.engine import spmd
from helpers.engine.collectives import barrier
from helpers.engine.mesh import Mesh
from helpers.nn import GPT
from helpers.parallel import schedules
from helpers.parallel.pipeline import run_schedule
from helpers.parallel.stage import GPTStage, Parts, deal
from helpers.planner.pipeline import fit, simulate, step_of, step_seconds

RANKS, STEPS, WARM_UP = 2, 7, 2
MODEL = GPT(vocabulary=40, context=32, width=64, heads=4, layers=4)
# Schedule, stages of a rank, micro-batches; and texts of a micro-batch.
MEASURED = [("gpipe", 1, 4), ("zero_bubble", 1, 4), ("interleaved", 2, 2)]
LAYOUTS = [
    ("one_by_one", 1, 3, 8),
    ("gpipe", 1, 8, 8),
    ("one_f_one_b", 1, 2, 8),
    ("one_f_one_b", 1, 8, 8),
    ("zero_bubble", 1, 8, 8),
    ("interleaved", 2, 4, 8),
    ("gpipe", 1, 2, 24),
    ("one_f_one_b", 1, 6, 24),
    ("zero_bubble", 1, 6, 24),
    ("interleaved", 2, 6, 24),
]


def plan_of(schedule, chunks, microbatches):
    options = {"chunks": chunks} if chunks > 1 else {}
    return schedules.plan(getattr(schedules, schedule), RANKS, microbatches, **options)


def program(rank, schedule, chunks, microbatches, rows):
    """Some steps of one layout."""
    plan, dealt = plan_of(schedule, chunks, microbatches), deal(MODEL, RANKS * chunks)
    stages = []
    for chunk in range(chunks):
        parts = Parts(MODEL, dealt[chunk * RANKS + rank.index])
        parameters = parts.cut(lambda layer: MODEL.initialise_layer(layer, seed=0))
        stages.append(GPTStage(parts, parameters, np.empty_like(parameters)))
    tokens = np.random.default_rng(0).integers(40, size=(microbatches, rows, 32))
    for _ in range(WARM_UP + STEPS):
        for stage in stages:
            stage.start(list(tokens), list(tokens), divisor=tokens.size)
        barrier(rank.world)
        run_schedule(rank.pipeline, plan, stages)


def measure(cluster, *layout):
    """The events of all steps but those of the warm-up, and the median of their seconds."""
    run = spmd.run(cluster.client, Mesh(pipeline=RANKS), program, *layout, record=True)
    steps = [step_of(run.events, number) for number in range(WARM_UP, WARM_UP + STEPS)]
    return run.events, median(map(step_seconds, steps))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(usable_cores() < RANKS, reason="each rank needs a core of its own")
def test_simulated_steps_are_within_a_tenth_of_measured_ones():
    """No layout is predicted from a run of its own."""
    errors = {}
    with open_cluster(RANKS) as cluster:
        for rows in (8, 24):
            costs = {}
            for schedule, chunks, microbatches in MEASURED:
                events, _ = measure(cluster, schedule, chunks, microbatches, rows)
                costs[schedule] = fit(events)
            for schedule, chunks, microbatches in (x[:3] for x in LAYOUTS if x[3] == rows):
                known = costs.get(schedule, costs["gpipe"])
                predicted = simulate(plan_of(schedule, chunks, microbatches), known, chunks)
                _, seconds = measure(cluster, schedule, chunks, microbatches, rows)
                errors[schedule, microbatches, rows] = step_seconds(predicted) / seconds - 1
    assert len(errors) == 10
    assert median(map(abs, errors.values())) <= 0.1, errors
