"""The benchmark of task parallelism measures what it says, on every side."""

import numpy as np
import pytest

from benchmarks import task_search
from benchmarks.peers import launch


def small(side, batch=1):
    program = (
        "from benchmarks.task_search import SIDES\n"
        f"if __name__ == '__main__': SIDES[{side!r}](6, 3, {batch!r})"
    )
    return launch.python(program)


def test_every_side_finds_the_losses_of_a_plain_loop():
    data = task_search.rows()
    expected = [task_search.train(task, data) for task in task_search.configurations(6, 3)]
    assert len(set(expected)) == 6
    for side, batch in (("ours", 1), ("ours", "guided"), ("loky", 1), ("limit", 1)):
        seconds, losses = small(side, batch)
        assert seconds > 0
        assert np.allclose(losses, expected, rtol=1e-6), side


def test_ray_finds_the_same():
    pytest.importorskip("ray")
    data = task_search.rows()
    expected = [task_search.train(task, data) for task in task_search.configurations(6, 3)]
    assert np.allclose(small("ray")[1], expected, rtol=1e-6)


def test_a_side_that_finds_something_else_is_not_measured(monkeypatch):
    answers = iter([0.001, [1.0, [0.5]], [1.0, [0.6]]])
    monkeypatch.setattr(launch, "python", lambda program: next(answers))
    monkeypatch.setattr(task_search, "SIDES", {"ours": None, "loky": None})
    monkeypatch.setattr(task_search, "find_spec", lambda name: True)
    with pytest.raises(RuntimeError, match="loky found other losses than ours"):
        task_search.run(1, {"10 ms": (0.01, 1, 1)})


def test_the_case_has_its_share_of_the_limit(monkeypatch):
    def python(program):
        if "calibrate" in program:
            return 0.001
        assert "(4, 10, 'guided')" in program
        return [1.0 if "'limit'" in program else 1.25, [0.5]]

    monkeypatch.setattr(launch, "python", python)
    [case] = task_search.run(1, {"10 ms": (0.01, 4, "guided")})
    assert (case.ours, case.limit, case.more["of_limit"]) == (1.25, 1.0, 0.8)
