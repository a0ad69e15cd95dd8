"""Charts: spikes stay visible, odd input draws something true, axes are labelled."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from learnit_r8.dashboard.drawing.cells import Grid
from learnit_r8.dashboard.drawing.charts import LABEL_WIDTH, Chart, draw_chart
from learnit_r8.dashboard.drawing.glyphs import RASTERS, bar, sparkline
from learnit_r8.dashboard.drawing.scales import tick_labels, x_ticks
from learnit_r8.run.series import Series
from learnit_r8.run.styles import Style

GLYPHS = sorted(RASTERS)
HEIGHT = 12


def drawn(bins, glyphs="braille", width=80, height=HEIGHT, **options):
    grid = Grid(width, height, ascii_only=glyphs == "ascii")
    scale = draw_chart(grid, 0, 0, width, height, Chart(bins, **options), glyphs)
    return grid, scale


def series_of(values, decays=()):
    series = Series(decays)
    for step, value in enumerate(values):
        series.add(step, float(step), value)
    return series


@cache
def spiky_million():
    """A million quiet points with 20 spikes of one point each, anywhere."""
    rng = np.random.default_rng(7)
    values = rng.normal(1.0, 0.05, 1_000_000)
    spikes = np.sort(rng.choice(values.size, 20, replace=False))
    values[spikes] = rng.uniform(3.0, 60.0, spikes.size)
    return series_of(values.tolist(), (0.98,)).bins(), spikes.tolist(), values[spikes].tolist()


@pytest.mark.parametrize("glyphs", GLYPHS)
def test_every_spike_of_a_million_points_is_visible_at_every_width(glyphs):
    bins, spikes, _ = spiky_million()
    arrow = "^" if glyphs == "ascii" else "▲"
    for width in range(20, 301):
        grid, scale = drawn(bins, glyphs, width, average=0)
        cells = width - LABEL_WIDTH - 1
        columns = cells * RASTERS[glyphs].columns
        for step in spikes:
            # The bin's first step decides on the arrow's cell, up to 1024 steps before the spike.
            near = {int(s * (columns - 1) / 999_999) // RASTERS[glyphs].columns for s in (max(0, step - 1024), step)}
            above = {grid.rows()[0][LABEL_WIDTH + 1 + cell] for cell in range(min(near), max(near) + 1)}
            assert arrow in above, (width, step)
            body = {grid.rows()[3][LABEL_WIDTH + 1 + cell] for cell in range(min(near), max(near) + 1)}
            assert body != {" "}, (width, step)
        assert scale is not None
        assert scale.high < 3.0


def test_the_largest_outliers_carry_their_value():
    bins, _, sizes = spiky_million()
    grid, _ = drawn(bins, width=200, average=0)
    assert f"{max(sizes):.3g}" in grid.rows()[0]


@pytest.mark.parametrize("glyphs", GLYPHS)
@given(values=st.lists(st.floats(), max_size=120), width=st.integers(0, 90), height=st.integers(0, 30), data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_values_in_any_rectangle_draw_without_an_error(glyphs, values, width, height, data):
    bins = series_of(values, (0.98,)).bins()
    options = {
        "average": data.draw(st.sampled_from([None, 0])),
        "axis": data.draw(st.sampled_from(["step", "time", "epoch"])),
        "scale": data.draw(st.sampled_from(["auto", "log", "linear"])),
        "prefer_log": True,
        "marks": [(3, 3.0, "!"), (3, 3.0, "R"), (-5, -5.0, "C"), (900, 900.0, "?")],
        "points": [(2, 2.0, 1.0), (5, 5.0, math.nan), (-1, -1.0, -3.0)],
        "epochs": [(0, 0), (40, 1), (80, 2)],
        "others": [("a", bins)],
    }
    grid, _ = drawn(bins, glyphs, width, height, **options)
    assert [len(row) for row in grid.rows()] == [max(0, width)] * height


def rows_with(grid, style):
    return {y for y in range(grid.height) for _, text, run in grid.runs(y) if run is style and text.strip()}


@pytest.mark.parametrize("glyphs", GLYPHS)
def test_a_constant_is_one_straight_line(glyphs):
    grid, scale = drawn(series_of([0.25] * 300).bins(), glyphs)
    assert len(rows_with(grid, Style.ACCENT)) == 1
    assert scale is not None
    assert scale.low < 0.25 < scale.high


@pytest.mark.parametrize("glyphs", GLYPHS)
def test_one_point_is_drawn(glyphs):
    grid, _ = drawn(series_of([3.0]).bins(), glyphs)
    assert len(rows_with(grid, Style.ACCENT)) == 1


def test_rising_values_are_drawn_rising():
    grid, _ = drawn(series_of([float(i) for i in range(200)]).bins(), "ascii")
    tops = [next(y for y in range(10) if grid._styles[y][x] is Style.ACCENT) for x in range(LABEL_WIDTH + 1, 80)]
    assert tops == sorted(tops, reverse=True)
    assert (tops[0], tops[-1]) == (9, 0)


def test_no_values_say_so():
    assert "waiting for the first value" in "\n".join(drawn(series_of([]).bins())[0].rows())
    assert "no finite value yet" in "\n".join(drawn(series_of([math.nan] * 5).bins())[0].rows())


def test_nan_is_a_gap_and_a_mark():
    values = [1.0 + i % 2 for i in range(100)]
    values[40:60] = [math.nan] * 20
    grid, _ = drawn(series_of(values).bins(), width=107)
    text = grid.rows()
    assert "×" in text[0]
    assert all(text[y][LABEL_WIDTH + 1 + 45 : LABEL_WIDTH + 1 + 55].strip() == "" for y in range(1, 10))


def test_log_axis_needs_positive_values():
    assert drawn(series_of([1.0, 10.0, 1000.0] * 9).bins(), scale="log")[1].log
    assert not drawn(series_of([0.0, 10.0, 1000.0] * 9).bins(), scale="log")[1].log
    assert not drawn(series_of([1.0, 10.0, 1000.0] * 9).bins(), scale="linear")[1].log


def test_neighbouring_marks_both_show_and_the_graver_one_has_the_place():
    marks = [(50, 50.0, "C"), (50, 50.0, "R"), (50, 50.0, "!")]
    axis = drawn(series_of([1.0, 2.0] * 50).bins(), marks=marks)[0].rows()[HEIGHT - 2]
    assert "!R" in axis


def test_range_follows_the_ordinary_values_and_not_the_outlier():
    values = [1.0 + 0.01 * (i % 7) for i in range(500)]
    values[250] = 1e9
    _, scale = drawn(series_of(values).bins())
    assert scale.high < 1.2


@given(st.floats(0, 1e9), st.floats(1e-3, 1e9), st.integers(10, 300), st.sampled_from(["step", "time"]))
def test_horizontal_ticks_lie_inside_and_do_not_crowd(low, width, cells, kind):
    ticks = x_ticks(low, low + width, cells, kind)
    slack = 1e-6 * (low + width)
    assert all(low - slack <= position <= low + width + slack for position, _ in ticks)
    assert len(ticks) <= cells / 4 + 2


@given(st.lists(st.floats(-1e12, 1e12).filter(lambda value: not 0 < abs(value) < 1e-99), min_size=1, max_size=8))
@example([100.0, -0.0625])
def test_tick_labels_fit_their_column(values):
    assert all(len(label) <= 6 for label in tick_labels(values))


@given(st.lists(st.floats(), max_size=50), st.integers(-1, 30))
def test_sparklines_have_their_width(values, width):
    assert len(sparkline(values, width)) == max(0, min(width, len(values)))


def test_sparkline_heights_follow_the_values():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0, math.nan, 1.0], 3) == "▁ ▁"


@given(st.floats(), st.integers(-1, 60))
def test_bars_have_their_width(share, width):
    assert len(bar(share, width)) == max(0, width)


def test_bars_are_exact_to_an_eighth():
    assert bar(0.5, 4, ".") == "██.."
    assert bar(0.5625, 4, ".") == "██▎."
    assert bar(2.0, 3) == "███"
