"""The figures and the panel of notebook 08."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest

from helpers.classroom import all_three as lesson
from helpers.cluster import open_cluster
from helpers.engine import spmd
from helpers.engine.events import Event
from helpers.engine.mesh import Mesh


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


# ---------------------------------------------------------------- figures


def test_each_rank_stands_at_its_coordinates():
    mesh = Mesh(data=2, tensor=2, pipeline=3)
    held = [
        (mesh.coordinate(rank), f"part {rank}", f"rows of {mesh.coordinate(rank).data}")
        for rank in range(mesh.size)
    ]
    figure = lesson.draw_mesh(held)
    assert [ax.get_title() for ax in figure.axes] == ["data 0: rows of 0", "data 1: rows of 1"]
    places = {
        text.get_text(): (number, *text.get_position())
        for number, ax in enumerate(figure.axes)
        for text in ax.texts
    }
    for rank in range(mesh.size):
        where = mesh.coordinate(rank)
        at = places[f"rank {rank}"]
        assert (at[0], at[1] - 0.5, math.floor(at[2])) == (where.data, where.pipeline, where.tensor)
        assert places[f"part {rank}"][:2] == at[:2]


def test_an_uneven_number_of_data_ranks_leaves_no_empty_frame():
    held = [(Mesh(3).coordinate(rank), "all", "some") for rank in range(3)]
    assert [ax.axison for ax in lesson.draw_mesh(held).axes] == [True, True, True, False]


def test_bytes_have_a_bar_for_each_axis_and_a_dash_where_predicted():
    measured = {"a": dict(data=1e3, tensor=2e3, pipeline=3e3), "b": dict.fromkeys(lesson.AXES, 0)}
    predicted = {
        "a": dict(data=4e3, tensor=5e3, pipeline=6e3),
        "b": dict.fromkeys(lesson.AXES, 7e3),
    }
    ax = lesson.plot_bytes(measured, predicted)
    assert [bar.get_height() for bar in ax.patches[:3]] == [2, 3, 1]
    assert [line.get_ydata()[0] for line in ax.lines] == [5, 6, 4, 7, 7, 7]
    assert all(line.get_linestyle() == "--" for line in ax.lines)
    assert len({bar.get_hatch() for bar in ax.patches}) == 3  # never colour alone


def test_load_and_capacity():
    ax = lesson.plot_load({"a": [1, 9], "b": [5, 5]}, room=6)
    assert [bar.get_height() for bar in ax.patches] == [1, 9, 5, 5]
    assert ax.lines[0].get_ydata()[0] == 6


def test_latency_and_throughput_measured_solid_predicted_dashed():
    time = lesson.machine.TokenTime
    measured = {"1 × 1 × 1": {1: time(0.001, 1000), 8: time(0.002, 4000)}}
    predicted = measured | {"2 × 1 × 1": {1: time(0.004, 250)}}
    ax = lesson.plot_trade(measured, predicted)
    drawn = {line.get_label(): line for line in ax.lines}
    assert list(drawn) == ["1 × 1 × 1", "1 × 1 × 1, predicted", "2 × 1 × 1, predicted"]
    assert [line.get_linestyle() for line in ax.lines] == ["-", "--", "--"]
    assert list(drawn["1 × 1 × 1"].get_xdata()) == [1, 2]
    assert [text.get_text() for text in ax.texts] == ["1", "8"]
    only = lesson.plot_trade({}, predicted)
    assert [text.get_text() for text in only.texts] == ["1", "8"]


def test_a_step_is_drawn_in_milliseconds_from_its_first_event():
    events = [
        Event(1, "forward", 5.0, 0.5),
        Event(0, "backward", 5.5, 0.25),
        Event(0, "wait", 5, 1),
    ]
    ax = lesson.draw_step(events, 2, plt.figure().subplots())
    bars = [(bar.get_y() + 0.35, bar.get_x(), bar.get_width()) for bar in ax.patches]
    assert np.allclose(bars, [(1, 0, 500), (0, 500, 250)])


# ---------------------------------------------------------------- the panel


def measured(cluster, plan):
    def program(rank):
        with rank.record("forward", layer=0, microbatch=0):
            return rank.index

    run = spmd.run(
        cluster.client, Mesh(plan.data, plan.tensor, plan.pipeline), program, record=True
    )
    if plan.schedule is lesson.SCHEDULES["GPipe"]:
        raise ArithmeticError("no numbers today")
    kinds = dict(parameters=1e6, gradients=1e6, state=2e6, activations=3e6)
    sent = dict(data=plan.data, tensor=plan.tensor, pipeline=plan.pipeline)
    number = len(run.results)
    return dict(events=run.events, held=[kinds] * number, sent=[sent] * number, tokens=1e3 * number)


def test_the_panel_runs_the_mesh_of_its_sliders(monkeypatch):
    with open_cluster(2) as cluster:
        predict = lambda plan: measured(cluster, plan) | {"tokens": 500.0}  # noqa: E731
        panel = lesson.MeshPanel(cluster, lambda plan: measured(cluster, plan), predict)
        assert str(panel.drawn) == "1 × 1 × 2" and panel.drawn.microbatches == 4
        before = panel.figure.value
        panel.sizes[0].value = 2
        assert "2 × 1 × 2, 1F1B: 4,000 tokens a second, predicted 500." in panel.status.value
        assert panel.figure.value != before
        panel.sizes[1].value = 4
        assert "16 ranks are too many here: choose 8 or fewer" in panel.status.value
        assert str(panel.drawn) == "2 × 1 × 2"  # the figure stays with what was run
        panel.rows = 4
        panel.sizes[1].value = 1
        panel.microbatches.value = 8
        assert "4 lines do not make 8 micro-batches on each of 2" in panel.status.value
        panel.rows = 32
        panel.microbatches.value = 4
        panel.sizes[1].value = 1
        panel.schedule.value = "GPipe"
        assert "no numbers today" in panel.status.value and not panel.schedule.disabled
        titles = [ax.get_title() for part in panel.draw().subfigs for ax in part.axes]
        assert titles[0] == "2 × 1 × 2: 4,000 tokens a second (measured), 500 (predicted)"
        _, (memory, sent) = (part.axes for part in panel.draw().subfigs)
        assert [label.get_text() for label in memory.get_xticklabels()] == ["0", "1", "2", "3"]
        assert len(memory.patches) == 4 * 4 and len(sent.patches) == 4 * 3

        seen = []
        monkeypatch.setattr("helpers.classroom.panels.display", lambda data, **_: seen.append(data))
        panel.display("Figure 9. It.")
        assert {"application/vnd.jupyter.widget-view+json", "image/png"} <= set(seen[0])
    panel.microbatches.value = 8
    assert "These workers were stopped" in panel.status.value
