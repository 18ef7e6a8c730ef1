"""Diagrams and figures draw what they are given, and their examples are right."""

import doctest

import matplotlib.pyplot as plt
import pytest

from helpers.classroom import diagrams, plots


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.mark.parametrize("module", [diagrams, plots])
def test_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_a_task_stands_right_of_its_inputs():
    place, columns, rows = diagrams._grid({"a": (), "b": ("a",), "c": ("a", "b"), "d": ()})
    assert (columns, rows) == (3, 2)
    assert place["a"][0] == place["d"][0] < place["b"][0] < place["c"][0]
    assert len(set(place.values())) == 4


@pytest.mark.parametrize("cut", ["rows", "inner", "columns"])
def test_each_placement_shows_three_matrices(cut):
    words = [text.get_text() for text in diagrams.draw_placement(cut).texts]
    assert {"X", "W", "Y"} <= set(words)
    assert "0" in words
    assert "1" in words


def test_an_unknown_cut_is_one_sentence():
    with pytest.raises(ValueError, match="cut must be one of rows, inner, columns, not 'layers'"):
        diagrams.draw_placement("layers")


def test_a_system_has_its_workers():
    words = [text.get_text() for text in diagrams.draw_system(3).texts]
    assert sum(word.startswith("worker") for word in words) == 3


def test_bars_are_measured_and_lines_predicted():
    ax = plots.plot_bars({"loop": 1.0, "threads": 1.9}, {"threads": 2.0})
    assert [bar.get_height() for bar in ax.patches] == [1.0, 1.9]
    assert [list(line.get_ydata()) for line in ax.lines] == [[2.0, 2.0]]
    assert ax.lines[0].get_linestyle() == "--"
    assert len({bar.get_hatch() for bar in ax.patches}) == 2
