"""The figures and the panel of notebook 05."""

import doctest
import time

import matplotlib.pyplot as plt
import numpy as np
import pytest

from helpers.classroom import tensor_parallel as lesson
from helpers.classroom import tensor_parallel_programs as programs
from helpers.cluster import open_cluster
from helpers.engine import spmd
from helpers.engine.events import Event
from helpers.engine.mesh import Mesh
from helpers.parallel.tensor import TensorParallel, block_bytes


def program(rank, width, sequence):
    """Two made-up steps with one all-reduce each."""
    for _ in range(2):
        with rank.record("step"):
            TensorParallel(rank.tensor, "ring").leave(np.ones((1, 1, width)))
            time.sleep(0.001)
    return width / 1e6, 10**6 * (1 + sequence)


def predict(ranks, width, sequence):
    return width / 1e6, 16 * width * (ranks - 1) / ranks, 10**6 * (1 + sequence)


def failing(rank, width, sequence):
    raise ArithmeticError("no numbers today")


# ---------------------------------------------------------------- figures


def test_pieces_lie_where_they_were_cut():
    ax = lesson.draw_pieces({"w": (2, 4)}, [{"w": np.s_[:, :1]}, {"w": np.s_[:, 1:]}])
    first, second = ax.patches
    assert second.get_width() == pytest.approx(3 * first.get_width())
    assert second.get_x() == pytest.approx(first.get_x() + first.get_width())
    assert first.get_hatch() != second.get_hatch()  # never colour alone
    plt.close(ax.figure)


def test_what_several_ranks_hold_is_drawn_once_and_what_nobody_holds_not_at_all():
    whole = {"b": np.s_[:, :]}
    ax = lesson.draw_pieces({"b": (1, 4), "c": (1, 4)}, [whole, whole])
    assert [text.get_text() for text in ax.texts] == ["0,1", "b", "c"]
    assert len(ax.patches) == 1
    plt.close(ax.figure)


def test_several_pieces_of_one_rank_have_its_colour():
    pieces = [{"w": [np.s_[:, :1], np.s_[:, 2:3]]}, {"w": [np.s_[:, 1:2], np.s_[:, 3:]]}]
    ax = lesson.draw_pieces({"w": (1, 4)}, pieces)
    colours = [patch.get_facecolor() for patch in ax.patches]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    plt.close(ax.figure)


def test_the_pair_says_what_f_and_g_do_in_both_directions():
    ax = lesson.draw_pair()
    words = [text.get_text() for text in ax.texts]
    assert "forward: nothing\nbackward: all-reduce" in words
    assert "forward: all-reduce\nbackward: nothing" in words
    assert {"rank 0", "rank 1", "f", "g"} <= set(words)
    plt.close(ax.figure)


def test_gains_are_solid_where_measured_and_dashed_where_predicted():
    ax = lesson.plot_gain({"a": {16: 0.5}}, {"a": {16: 0.6}, "b": {16: 0.7}})
    lines = {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}
    assert list(lines) == ["a, measured", "a, predicted", "b, predicted"]
    assert [line.get_linestyle() for line in lines.values()] == ["-", "--", "--"]
    assert lines["a, predicted"].get_marker() != lines["b, predicted"].get_marker()
    assert lines["a, measured"].get_color() == lines["a, predicted"].get_color()
    plt.close(ax.figure)


def test_work_is_a_bar_where_measured_and_a_line_where_predicted():
    shares = {"in a row": [0.25, 0.75], "balanced": [0.5, 0.5]}
    ax = lesson.plot_work(shares, {"in a row": [0.2, 0.8], "balanced": [0.5, 0.5]})
    assert [bar.get_height() for bar in ax.patches] == [0.25, 0.75, 0.5, 0.5]
    assert [line.get_ydata()[0] for line in ax.lines] == [0.2, 0.8, 0.5, 0.5]
    assert len({bar.get_hatch() for bar in ax.patches}) == 2
    assert [text.get_text() for text in ax.get_legend().get_texts()].count("predicted") == 1
    plt.close(ax.figure)


def test_bytes_are_those_of_one_ranks_messages():
    events = [
        Event(rank, name, 0, 1, nbytes=400 + rank)
        for rank in range(4)
        for name in ("all_reduce", "exchange", "all_gather", "exchange")
    ]
    assert lesson.bytes_sent(events, rank=2) == 2 * 402
    assert lesson.bytes_sent([Event(0, "step", 0, 1, nbytes=8)]) == 0


# ---------------------------------------------------------------- the panel


def test_the_panel_runs_on_as_many_ranks_as_its_slider_says(monkeypatch):
    with open_cluster(2) as cluster:
        panel = lesson.TensorParallelPanel(cluster, program, predict)
        assert len(panel.tried) == 1 + len(lesson.BEGIN_WITH)
        assert list(panel.tried)[-1] == "2 × 128\nwhole"
        measured, told = panel.tried["2 × 128\nwhole"]
        assert measured == pytest.approx(told)
        assert measured["MB sent"] == pytest.approx(8 * 128 / 1e6)
        before = panel.figure.value
        panel.ranks.value = 4
        assert panel.figure.value != before
        panel.width.value = 256
        assert panel.tried["4 × 256\nwhole"][0]["MB sent"] == pytest.approx(12 * 256 / 1e6)
        panel.sequence.value = "cut"
        assert "keeps 2.00 MB" in panel.status.value and "0.3 ms a step" in panel.status.value
        panel.ranks.value = 1
        assert panel.tried["1 × 256\ncut"][0]["MB sent"] == 0
        assert len(panel.tried) == lesson.TRIED_SHOWN

        seen = []
        monkeypatch.setattr("helpers.classroom.panels.display", lambda data, **_: seen.append(data))
        panel.display("Figure 8. It.")
        assert {"application/vnd.jupyter.widget-view+json", "image/png"} <= set(seen[0])
        assert "sliders" in seen[0]["text/plain"]

        panel.program = failing
        panel.width.value = 64
        assert "no numbers today" in panel.status.value and not panel.width.disabled
    panel.width.value = 128
    assert "These workers were stopped" in panel.status.value


def test_the_panel_does_not_keep_the_workers_alive():
    cluster = open_cluster(1)
    panel = lesson.TensorParallelPanel(cluster, program, predict)
    finalizer = cluster._finalizer
    del cluster
    assert not finalizer.alive
    panel.width.value = 64
    assert "These workers were stopped" in panel.status.value


@pytest.mark.parametrize("sequence", [False, True])
def test_the_bytes_of_a_block_are_counted_and_are_those_of_its_rings(sequence):
    with open_cluster(2) as cluster:
        mesh, arguments = Mesh(tensor=2), (programs.block_step, 8, sequence, 1)
        run = spmd.run(cluster.client, mesh, *arguments, record=True, transport="tcp")
    told = block_bytes(16 * 32 * 8 * 4, 2, sequence)
    assert lesson.bytes_sent(run.events) == sum(told.values()) > 0


# ---------------------------------------------------------------- numbers of the notebook


def test_the_figures_of_the_solutions_are_those_of_their_formulas():
    """What the text of a solution says, computed."""
    most = 1 + 6 * 4096 * 450e9 * 0.1 / 495e12
    assert int(most) == 3
    assert int(1 + 4.5 * 4096 * 450e9 * 0.1 / 495e12) == 2  # of a whole block
    width, length, heads, ranks, blocks = 12288, 2048, 96, 8, 96
    outside, inside = 4 * width, 12 * width + heads * length
    plain, cut = outside + inside / ranks, (outside + inside) / ranks
    assert (plain, cut) == (92_160, 49_152)
    gigabytes = [round(2 * numbers * length * blocks / 1e9) for numbers in (plain, cut)]
    assert gigabytes == [36, 19]


def test_the_examples_in_the_docstrings():
    for module in (lesson, programs):
        found = doctest.testmod(module)
        assert found.attempted > 0 and found.failed == 0
    plt.close("all")
