"""The figures and the panel of notebook 06."""

import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import same_color

from helpers.classroom import pipeline_parallel as lesson
from helpers.classroom.timeline import draw_schedule
from helpers.cluster import open_cluster
from helpers.engine.events import Event
from helpers.parallel.schedules import (
    gpipe,
    interleaved,
    one_by_one,
    one_f_one_b,
    plan,
    zero_bubble,
)
from helpers.planner.pipeline import Costs, bubble, simulate

COSTS = Costs(forward=0.01, input=0.01, weight=0.01)


def step(schedule, ranks, microbatches, **options):
    chunks = options.get("chunks", 1)
    return simulate(plan(schedule, ranks, microbatches, **options), COSTS, chunks)


def bars(ax, colour):
    return [bar for bar in ax.patches if same_color(bar.get_facecolor(), colour)]


# ---------------------------------------------------------------- timelines


def test_a_bar_has_its_micro_batch_s_number_its_colour_and_its_place():
    figure = lesson.draw_timelines({"simulated": step(gpipe, 2, 3)}, 2)
    (ax,) = figure.axes
    words = [text.get_text() for text in ax.texts]
    assert sorted(word for word in words if word) == sorted("012" * 4)
    forward = bars(ax, lesson.STYLES["forward"][0])
    assert [(bar.get_x(), bar.get_width()) for bar in forward if bar.get_y() < 0] == [
        (pytest.approx(10 * m), pytest.approx(10))
        for m in range(3)  # in milliseconds
    ]
    assert ax.get_title(loc="left") == "simulated" and ax.get_xlabel() == "time (ms)"
    plt.close(figure)


def test_all_timelines_have_one_scale_and_there_is_one_legend():
    several = {"a": step(one_by_one, 2, 4), "b": step(zero_bubble, 2, 4)}
    figure = lesson.draw_timelines(several, 2)
    first, second = figure.axes
    assert first.get_xlim() == second.get_xlim() and first.get_xlim()[1] > 240
    assert second.get_legend() is None
    words = [text.get_text() for text in first.get_legend().get_texts()]
    assert words == ["forward", "backward", "wait", "input gradient", "weight gradient"]
    plt.close(figure)


def test_chunks_are_told_apart_and_units_are_no_milliseconds():
    figure = lesson.draw_timelines({"a": step(interleaved, 2, 2, chunks=2)}, 2, units=True)
    (ax,) = figure.axes
    hatched = [bar for bar in ax.patches if bar.get_hatch()]
    assert len(hatched) == 8 and ax.get_xlabel() == "time (units)" and ax.get_xlim()[1] < 1
    plt.close(figure)


def test_what_is_too_narrow_for_its_number_has_none_and_messages_are_not_drawn():
    events = [
        Event(0, "forward", 0, 1.0, layer=0, microbatch=7),
        Event(0, "backward", 1, 0.001, layer=0, microbatch=8),
        Event(0, "send", 1, 9.0),
    ]
    figure = lesson.draw_timelines({"a": events}, 1)
    (ax,) = figure.axes
    assert [text.get_text() for text in ax.texts] == ["7", ""]
    assert ax.get_xlim()[1] < 1100
    plt.close(figure)


def test_a_schedule_can_be_drawn_in_chosen_styles():
    events = [Event(0, "fit", 0, 1), Event(0, "other", 1, 1)]
    ax = draw_schedule(events, styles={"fit": ("#123456", "//")}, words=lambda e: e.operation)
    (bar,) = ax.patches
    assert same_color(bar.get_facecolor(), "#123456") and bar.get_hatch() == "//"
    assert [text.get_text() for text in ax.texts] == ["fit"]
    plt.close(ax.figure)


# ---------------------------------------------------------------- other figures


def test_places_are_boxes_in_the_row_of_their_rank():
    figure = lesson.draw_places({0: {0: "w0", 1: "w1"}, 1: {2: "w2"}})
    (ax,) = figure.axes
    places = {text.get_text(): text.get_position() for text in ax.texts}
    assert places == {"w0": (0.5, 0), "w1": (1.5, 0), "w2": (2.5, 1)}
    plt.close(figure)


def test_scores_are_bars_where_measured_and_dashes_where_predicted():
    measured = {"GPipe": step(gpipe, 2, 4), "1F1B": step(one_f_one_b, 2, 4)}
    predicted = {"GPipe": step(gpipe, 2, 8), "1F1B": step(one_f_one_b, 2, 8)}
    figure = lesson.plot_scores(measured, predicted, 2)
    left, right = figure.axes
    assert [bar.get_height() for bar in left.patches] == [
        bubble(events, 2) for events in measured.values()
    ]
    assert [line.get_ydata()[0] for line in left.lines] == [
        bubble(events, 2) for events in predicted.values()
    ]
    assert [bar.get_height() for bar in right.patches] == [4, 4, 2, 1]
    assert [line.get_ydata()[0] for line in right.lines] == [8, 8, 2, 1]
    assert {line.get_linestyle() for line in (*left.lines, *right.lines)} == {"--"}
    plt.close(figure)


def test_the_activations_of_a_chunk_count_as_a_part_of_a_stage():
    once = {"interleaved": step(interleaved, 4, 8, chunks=2)}
    figure = lesson.plot_scores(once, once, 4, chunks={"interleaved": 2})
    right = figure.axes[1]
    assert [bar.get_height() for bar in right.patches] == [5.5, 4.5, 3.5, 2.5]
    assert [line.get_ydata()[0] for line in right.lines] == [5.5, 4.5, 3.5, 2.5]
    plt.close(figure)


def test_recomputation_is_solid_where_measured_and_dashed_where_predicted():
    ways = {"none": (0.1, 4e6), "full": (0.2, 1e6)}
    ax = lesson.plot_recomputation(ways, dict.fromkeys(ways, (0.1, 2000000.0)))
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines["measured"].get_xdata()) == [100, 200]
    assert list(lines["measured"].get_ydata()) == [4, 1]
    assert [lines[n].get_linestyle() for n in ("measured", "predicted")] == ["-", "--"]
    plt.close(ax.figure)


# ---------------------------------------------------------------- the panel


def measure(schedule, ranks, microbatches):
    if ranks == 4:
        raise ArithmeticError("no numbers today")
    return step(schedule, ranks, microbatches), step(schedule, ranks, microbatches), "measured"


def test_the_panel_tries_what_its_sliders_say_and_says_what_came_out(monkeypatch):
    choices = {"naive": one_by_one, "GPipe": gpipe}
    with open_cluster(2) as cluster:
        panel = lesson.PipelinePanel(cluster, measure, choices)
        assert "GPipe, 2 stages: 270 ms a step, predicted 270 ms." in panel.status.value
        before = panel.figure.value
        panel.schedule.value = "naive"
        assert "naive, 2 stages: 480 ms a step" in panel.status.value
        assert panel.figure.value != before
        panel.microbatches.value = 1
        panel.stages.value = 3
        titles = list(panel.timelines)
        assert titles[0] == "simulated: 90 ms, bubble 67 %, activations kept at most 1, 1, 1"
        assert titles[1].startswith("measured: 90 ms")
        panel.stages.value = 4
        assert "no numbers today" in panel.status.value and not panel.stages.disabled
        panel.stages.value = 1

        seen = []
        monkeypatch.setattr("helpers.classroom.panels.display", lambda data, **_: seen.append(data))
        panel.display("Figure 9. It.")
        assert {"application/vnd.jupyter.widget-view+json", "image/png"} <= set(seen[0])
        assert "sliders" in seen[0]["text/plain"]
    panel.microbatches.value = 4
    assert "These workers were stopped" in panel.status.value
