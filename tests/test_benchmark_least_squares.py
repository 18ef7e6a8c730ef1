"""The benchmark of the exact line: every side finds the same weights, and ours is the quickest."""

import os
import re
from importlib.util import find_spec

import numpy as np
import pytest

from benchmarks import least_squares
from benchmarks.peers import launch


@pytest.fixture
def made_up(monkeypatch):
    """Sides that take known seconds and find the given weights."""
    seconds = {"ours": 1.0, "scikit-learn": 3.0, "dask-ml": 2.0, "limit": 0.5}
    weights = {side: [2.0, -4.0] for side in seconds}
    asked = []

    def python(program):
        side = re.search(r"SIDES\['(.+)'\]", program)[1]
        asked.append(side)
        return seconds[side], weights[side]

    monkeypatch.setattr(launch, "python", python)
    return weights, asked


def with_dask_ml(monkeypatch, installed):
    monkeypatch.setattr(least_squares, "find_spec", lambda name: object() if installed else None)


def test_all_sides_are_measured_in_turn(made_up, monkeypatch, capsys):
    with_dask_ml(monkeypatch, True)
    [case] = least_squares.run(2)
    assert made_up[1] == ["ours", "scikit-learn", "dask-ml", "limit"] * 2
    assert (case.name, case.ours, case.limit) == ("flights", 1.0, 0.5)
    assert case.peers == {"scikit-learn": 3.0, "dask-ml": 2.0}
    assert capsys.readouterr().out == ""


def test_without_dask_ml_a_note_is_printed(made_up, monkeypatch, capsys):
    with_dask_ml(monkeypatch, False)
    [case] = least_squares.run(1)
    assert list(case.peers) == ["scikit-learn"]
    assert re.match(r"Note: dask-ml is left out: it is not installed", capsys.readouterr().out)


@pytest.mark.parametrize("side", ["scikit-learn", "dask-ml", "limit"])
def test_a_side_with_other_weights_is_refused(made_up, monkeypatch, side):
    with_dask_ml(monkeypatch, True)
    made_up[0][side] = [2.0, -4.0 + 1e-7]
    with pytest.raises(RuntimeError, match=f"weights of {side} differ from ours by 2.5e-08 of"):
        least_squares.run(1)
    made_up[0][side] = [2.0, np.nan]
    with pytest.raises(RuntimeError, match=f"weights of {side} differ from ours by nan"):
        least_squares.run(1)
    made_up[0][side] = [2.0, -4.0 + 1e-9]
    assert least_squares.run(1)


def test_a_month_is_measured_on_every_side_that_is_installed():
    [case] = least_squares.run(1, months=(4,))
    expected = {"scikit-learn"} | ({"dask-ml"} if find_spec("dask_ml") else set())
    assert set(case.peers) == expected
    assert min(case.limit, case.ours, *case.peers.values()) > 0
    assert max(case.limit, case.ours, *case.peers.values()) < 60


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="the target is for two cores")
def test_ours_is_faster_than_its_peers():
    [case] = least_squares.run(3)
    assert case.ours < min(case.peers.values()), case
