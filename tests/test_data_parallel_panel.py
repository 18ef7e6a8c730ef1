"""The figures and the panel of notebook 03."""

import time

import matplotlib.pyplot as plt
import pytest

from helpers.classroom import data_parallel as lesson
from helpers.classroom.timeline import draw_schedule, timeline_svg
from helpers.cluster import open_cluster
from helpers.engine.collectives import all_reduce, barrier
from helpers.engine.events import Event


def step(rank, begin):
    """The events of one made-up training step: 2 s of it computing, 1 s in an exchange."""
    return [
        Event(rank, "forward", begin, 0.5),
        Event(rank, "backward", begin + 0.5, 1.0),
        Event(rank, "all_reduce", begin + 1.5, 1.0),
        Event(rank, "wait", begin + 1.6, 0.75),
        Event(rank, "update", begin + 2.5, 0.5),
    ]


def program(rank, batch, width):
    with rank.record("warm-up"), rank.record("forward"):
        time.sleep(0.001)
    for _ in range(2):
        barrier(rank.data)
        with rank.record("forward"):
            time.sleep(batch / 1e6)
        with rank.record("all_reduce"):
            all_reduce(rank.data, [width])
    return batch / 1e6


def failing(rank, batch, width):
    raise ArithmeticError("no numbers today")


# ---------------------------------------------------------------- where the time goes


def test_shares_are_means_over_ranks_and_steps():
    events = [*step(0, 0), *step(1, 0), *step(0, 3), *step(1, 3)]
    assert lesson.time_shares(events) == {"compute": 2.0, "exchange": 0.25, "waiting": 0.75}


def test_shares_leave_out_the_warm_up_other_waiting_and_the_background():
    warm_up = [Event(0, "warm-up", 0, 50), *step(0, 10)]
    between = [Event(0, "wait", 59, 1.0), Event(0, "wait", 61, 7.0, lane=1)]
    shares = lesson.time_shares([*warm_up, *between, *step(0, 60)])
    assert shares == {"compute": 2.0, "exchange": 0.25, "waiting": 0.75}


def test_shares_of_a_run_without_steps_are_refused():
    with pytest.raises(ValueError, match="No step was recorded: run with record=True"):
        lesson.time_shares([Event(0, "wait", 0, 1)])


# ---------------------------------------------------------------- figures


def test_exchange_times_are_solid_where_measured_and_dashed_where_predicted():
    measured = {"ring": {8: 1e-3, 80: 2e-3}, "direct": {8: 1e-4, 80: 1e-4}}
    ax = lesson.plot_exchange_times(measured, {"ring": {8: 2e-3, 80: 2e-3}})
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines) == ["ring", "ring, predicted", "direct"]
    assert list(lines["ring"].get_ydata()) == pytest.approx([1, 2])  # milliseconds
    assert [line.get_linestyle() for line in lines.values()] == ["-", "--", "-"]
    assert lines["ring"].get_marker() != lines["direct"].get_marker()  # never colour alone
    plt.close(ax.figure)


def test_shares_are_stacked_in_milliseconds():
    shares = {"compute": 0.02, "exchange": 0.001, "waiting": 0.004}
    ax = lesson.plot_shares({"1 rank": dict.fromkeys(shares, 0.0), "2 ranks": shares})
    tops = [bar.get_y() + bar.get_height() for bars in ax.containers for bar in bars]
    assert tops == pytest.approx([0, 20, 0, 21, 0, 25])
    assert len({bars[0].get_hatch() for bars in ax.containers}) == 3
    plt.close(ax.figure)


def test_background_communication_is_a_thin_bar_below_its_rank():
    events = [Event(1, "backward", 0, 2), Event(1, "network", 1, 2, lane=1)]
    ax = draw_schedule(events, ranks=2, name="rank")
    above, below = (patch for patch in ax.patches)
    assert below.get_height() < above.get_height()
    assert below.get_y() >= above.get_y() + above.get_height()  # downwards: the axis is inverted
    assert above.get_y() > 0.5 and below.get_y() + below.get_height() < 1.5
    assert [text.get_text() for text in ax.get_yticklabels()] == ["rank 0", "rank 1"]
    plt.close(ax.figure)


def test_waiting_is_pale_and_changes_no_other_colour():
    fit = Event(0, "fit", 0, 1)
    alone, beside = draw_schedule([fit]), draw_schedule([Event(0, "wait", 1, 1), fit])
    colours = {bar.get_facecolor() for bar in beside.patches}
    assert alone.patches[0].get_facecolor() in colours and len(colours) == 2
    assert 'fill="#d9d9d9"' in timeline_svg([Event(0, "wait", 1, 1)], ranks=1)
    plt.close(alone.figure)
    plt.close(beside.figure)


# ---------------------------------------------------------------- the panel


def test_the_panel_trains_on_as_many_ranks_as_its_slider_says(monkeypatch):
    with open_cluster(2) as cluster:
        panel = lesson.DataParallelPanel(cluster, program)
        assert panel.ranks.value == 2 and {event.rank for event in panel.events} == {0, 1}
        assert "2,048" not in panel.status.value and "rows a second" in panel.status.value
        before = panel.figure.value
        panel.ranks.value = 3
        assert {event.rank for event in panel.events} == {0, 1, 2}
        assert panel.figure.value != before
        panel.batch.value = 8192
        assert "A step took 8.2 ms: 1,000,000 rows a second." in panel.status.value
        names = ["2 ranks\nbatch 2048", "3 ranks\nbatch 2048", "3 ranks\nbatch 8192"]
        assert list(panel.tried) == [f"{name}\nwidth 256" for name in names]
        assert panel.tried[f"{names[2]}\nwidth 256"]["compute"] > 0.008

        seen = []
        monkeypatch.setattr("helpers.classroom.panels.display", lambda data, **_: seen.append(data))
        panel.display("Figure 7. It.")
        assert {"application/vnd.jupyter.widget-view+json", "image/png"} <= set(seen[0])
        assert "sliders" in seen[0]["text/plain"]

        panel.program = failing
        panel.width.value = 64
        assert "no numbers today" in panel.status.value and not panel.width.disabled
    panel.width.value = 512
    assert "These workers were stopped" in panel.status.value


def test_the_panel_shows_the_last_settings_only():
    with open_cluster(1) as cluster:
        panel = lesson.DataParallelPanel(cluster, program)
        for batch in (512, 2048, 8192):
            for width in (64, 256, 512):
                panel.batch.value, panel.width.value = batch, width
        assert len(panel.tried) == lesson.SETTINGS_SHOWN
        assert list(panel.tried)[-1] == "1 rank\nbatch 8192\nwidth 512"


def test_the_panel_does_not_keep_the_workers_alive():
    cluster = open_cluster(1)
    panel = lesson.DataParallelPanel(cluster, program)
    finalizer = cluster._finalizer
    del cluster
    assert not finalizer.alive
    panel.batch.value = 512
    assert "These workers were stopped" in panel.status.value
