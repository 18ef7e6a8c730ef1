"""The figures and the panel of notebook 04."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from helpers.classroom import data_parallel_at_scale as lesson
from helpers.cluster import open_cluster
from helpers.engine.collectives import all_reduce

# ---------------------------------------------------------------- figures


def test_lines_are_solid_where_measured_and_dashed_where_not():
    lines = {"seen": pd.Series({1: 4.0, 100: 2.0}), "law": {1: 4.0, 100: 2.0}}
    ax = lesson.plot_lines(lines, dashed=["law"])
    assert [line.get_linestyle() for line in ax.lines] == ["-", "--"]
    assert ax.lines[0].get_marker() != ax.lines[1].get_marker()  # never colour alone
    assert [list(line.get_ydata()) for line in ax.lines] == [[4.0, 2.0]] * 2
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    plt.close(ax.figure)


@pytest.mark.parametrize(
    ("log", "scales"),
    [("", ("linear", "linear")), ("x", ("log", "linear")), ("x0", ("symlog", "linear"))],
)
def test_only_the_axes_that_are_asked_for_are_logarithmic(log, scales):
    ax = lesson.plot_lines({"a": {0.5: 1.0, 8: 2.0}}, log=log, marks=False)
    assert (ax.get_xscale(), ax.get_yscale()) == scales
    assert ax.lines[0].get_marker() == ""
    ax.figure.canvas.draw()
    words = [label.get_text() for label in ax.get_xticklabels()]
    assert not any("$" in word for word in words)  # plain numbers, no powers of ten
    plt.close(ax.figure)


def test_counts_beyond_the_end_are_counted_at_the_end():
    ax = lesson.plot_counts(np.array([0, 1, 1, 3, 40]), most=3)
    assert [bar.get_height() for bar in ax.patches] == [1, 2, 0, 2]
    plt.close(ax.figure)


def test_an_arrow_leads_from_each_method_to_itself_with_feedback():
    index = pd.MultiIndex.from_tuples([(0, "none"), (0, "sign"), (1, "sign")])
    table = pd.DataFrame({"nbytes": [800, 25, 30], "train_loss": [0.5, 0.6, 0.51]}, index)
    ax = lesson.plot_compression(table)
    arrows = [text for text in ax.texts if text.arrow_patch]
    assert [(text.xy, text.xyann) for text in arrows] == [((30, 0.51), (25, 0.6))]
    assert [text.get_text() for text in ax.texts if text.get_text()] == ["none", "sign"]
    (sign,) = [
        text for text in lesson.plot_compression(table, below=["sign"]).texts if text.xyann[1] < 0
    ]
    assert sign.get_text() == "sign"
    plt.close(ax.figure)


def test_memory_is_stacked_and_the_prediction_is_a_line_at_its_height():
    held = {"a": {"parameters": 4e6, "state": 8e6}, "b": {"parameters": 4e6, "state": 2e6}}
    predicted = {"a": {"all": 11e6}, "b": {"all": 6e6}}
    ax = lesson.plot_memory(held, predicted)
    tops = [bar.get_y() + bar.get_height() for bars in ax.containers for bar in bars]
    assert tops == [4, 4, 12, 6]
    assert [line.get_ydata()[0] for line in ax.lines] == [11, 6]
    assert len({bars[0].get_hatch() for bars in ax.containers}) == 2
    plt.close(ax.figure)


# ---------------------------------------------------------------- the panel


def program(rank, how, every):
    if how == "label" and every == 128:
        raise ArithmeticError("no numbers today")
    return float(all_reduce(rank.data, np.ones(1))[0]) + every / 1000, 0.25


def test_the_panel_trains_on_the_ranks_of_its_slider_and_keeps_each_setting(monkeypatch):
    with open_cluster(2) as cluster:
        panel = lesson.LocalStepsPanel(cluster, program, {("hour", 4, 1): 0.5})
        assert panel.tried == {("hour", 4, 1): 0.5, ("random", 2, 16): 2.016}
        before = panel.figure.value
        panel.ranks.value = 3
        assert panel.tried["random", 3, 16] == 3.016 and panel.figure.value != before
        assert "3 ranks, H = 16, at random: loss 3.016 after 0.2 s." in panel.status.value
        panel.how.value = "label"
        panel.every.value = 128
        assert "no numbers today" in panel.status.value and not panel.every.disabled

        figure = panel.draw()
        (ax,) = figure.axes
        drawn = {line.get_label(): list(line.get_xdata()) for line in ax.lines}
        assert list(drawn) == ["at random", "by hour", "by label"]
        assert np.allclose(drawn["at random"], 16, rtol=0.1) and len(drawn["at random"]) == 2
        assert np.allclose([*drawn["by hour"], *drawn["by label"]], [1, 16], rtol=0.1)
        assert [text.get_text() for text in ax.texts] == ["2", "3", "4", "3"]
        plt.close(figure)

        seen = []
        monkeypatch.setattr("helpers.classroom.panels.display", lambda data, **_: seen.append(data))
        panel.display("Figure 9. It.")
        assert {"application/vnd.jupyter.widget-view+json", "image/png"} <= set(seen[0])
    panel.every.value = 64
    assert "These workers were stopped" in panel.status.value
