"""The benchmark of the pipeline's step measures what it says, and its targets are met."""

import os

import numpy as np
import pytest

from benchmarks import pipeline_step
from benchmarks.peers import launch
from benchmarks.peers.timing import MICROBATCHES
from helpers.engine import spmd
from helpers.engine.mesh import Mesh
from helpers.parallel.schedules import gpipe, plan

TWO_CORES = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="the targets are for two cores")
NEEDS_TORCH = pytest.mark.skipif(bool(launch.missing("torch")), reason="torch is not installed")


def checked(rank, forgets):
    """Whether a step of training on this rank is accepted."""
    stage, step = pipeline_step.trainer(rank, plan(gpipe, rank.size, MICROBATCHES))
    if forgets:
        stage.update = lambda: stage.gradient.fill(0)
    pipeline_step.check(rank, stage, step)
    return np.isfinite(stage.parameters).all()


def test_two_stages_do_what_one_rank_does_and_a_step_that_forgets_the_update_is_refused():
    assert all(spmd.run(None, Mesh(pipeline=2), checked, False).results)
    with pytest.raises(spmd.RankError, match="parameters differ from those of one rank"):
        spmd.run(None, Mesh(pipeline=2), checked, True)


def test_every_schedule_is_a_case_with_its_bubble_and_its_limit(monkeypatch):
    def ours(schedule, exchanging):
        assert schedule in ("gpipe", "one_f_one_b")
        return [0.9, 0.125] if exchanging else [0.8]

    monkeypatch.setattr(launch, "present", list)
    monkeypatch.setattr(launch, "ranks", lambda module, name: 1.0)
    monkeypatch.setattr(pipeline_step, "_ours", ours)
    cases = pipeline_step.run(3)
    assert [case.name for case in cases] == ["GPipe", "1F1B"]
    for case in cases:
        assert (case.ours, case.peers) == (0.9, {"torch": 1.0})
        assert case.limit == pytest.approx(0.8 * 9 / 8)
        assert case.more == {"bubble": 0.125, "theory": 1 / 9}


@pytest.mark.slow
@pytest.mark.timeout(900)
@TWO_CORES
@NEEDS_TORCH
def test_the_step_is_as_quick_as_its_peer_and_as_idle_as_the_theory_says():
    for case in pipeline_step.run(5):
        assert case.ours <= case.peers["torch"], case
        assert abs(case.more["bubble"] - case.more["theory"]) <= 0.05, case
