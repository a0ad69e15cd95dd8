"""The binned series: nothing extreme is ever lost, and memory does not grow."""

from __future__ import annotations

import math
from copy import deepcopy
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from learnit_r8.run.series import BLOCK, MIDDLE_BINS, RECENT_POINTS, WHOLE_BINS, Series

VALUES = st.floats(allow_nan=True, allow_infinity=True, width=64)


def records(series, *since, **how):
    return [SimpleNamespace(**dict(zip(row.dtype.names, row, strict=True))) for row in series.bins(*since, **how)]


def filled(values, decays=()):
    series, steps = Series(decays), np.arange(len(values), dtype=float)
    series.extend(steps, 0.5 * steps, np.array(values, float))
    return series


@given(st.lists(VALUES, max_size=400), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_bins_agree_with_the_whole_list(values, repeats):
    values = values * repeats
    series = filled(values)
    bins = records(series)
    finite = [v for v in values if -1e300 < v < 1e300]
    assert sum(b.points for b in bins) == len(values) == series.count
    assert sum(b.bad for b in bins) == len(values) - len(finite) == series.bad
    assert min((b.lo for b in bins), default=math.inf) == min(finite, default=math.inf) == series.lo
    assert max((b.hi for b in bins), default=-math.inf) == max(finite, default=-math.inf) == series.hi
    if finite:
        assert series.last == finite[-1]
    assert all(a.last_step < b.first_step for a, b in pairwise(bins))


@given(st.integers(1, 60_000), st.lists(st.integers(0, 59_999), max_size=5))
@settings(max_examples=15, deadline=None)
def test_every_bin_holds_the_extremes_of_exactly_its_points(count, places):
    values = np.sin(np.arange(count))
    values[[p for p in places if p < count]] = 1e6
    for b in records(filled(values.tolist())):
        part = values[int(b.first_step) : int(b.last_step) + 1]
        assert (b.points, b.lo, b.hi, b.last) == (len(part), part.min(), part.max(), part[-1])


@pytest.mark.parametrize("decay", [0.9, 0.98, 0.995])
def test_moving_average_agrees_with_the_debiased_definition(decay):
    values = np.random.default_rng(1).normal(3.0, 1.0, 3000)
    series = filled(values.tolist(), (decay,))
    total = 0.0
    for n, value in enumerate(values, 1):
        total = decay * total + (1 - decay) * value
        expected = total / (1 - decay**n)
    assert series.averages[0] == pytest.approx(expected, rel=1e-9)
    assert filled([7.0], (decay,)).averages == pytest.approx((7.0,))


def test_moving_average_is_of_every_point_after_many_merges():
    values = np.random.default_rng(2).normal(0.0, 1.0, 50_000)
    series = filled(values.tolist(), (0.98,))
    weights = 0.02 * 0.98 ** np.arange(2000)
    assert series.averages[0] == pytest.approx(float(weights @ values[::-1][:2000]), abs=1e-9)
    assert tuple(series.bins()[-1]["averages"]) == series.averages


def test_window_is_served_by_the_finest_level_that_covers_it():
    series = filled([float(i) for i in range(300_000)])
    recent = records(series, 300_000 - RECENT_POINTS)
    assert [b.points for b in recent] == [1] * RECENT_POINTS
    middle = records(series, 300_000 - (MIDDLE_BINS - 2) * BLOCK)
    assert max(b.points for b in middle) == BLOCK
    assert len(series.bins(150_000, by_time=False)) > 200
    assert records(series, 149_990.0, by_time=True)[0].last_time >= 149_990.0


def test_a_nan_breaks_no_statistic():
    series = filled([1.0, math.nan, 3.0, math.inf, 5.0], (0.9,))
    assert (series.lo, series.hi, series.last, series.bad) == (1.0, 5.0, 5.0, 2)
    assert math.isfinite(series.averages[0])


def test_huge_values_do_not_poison_the_average():
    series = filled([1e308, -1e308, 1.0, 2.0], (0.9,))
    assert series.bad == 2
    assert 1.0 <= series.averages[0] <= 2.0


def test_a_copy_is_independent():
    series = filled([1.0, 2.0], (0.9,))
    twin = deepcopy(series)
    for step in range(2, 3000):
        series.add(step, step, 9.0)
    assert (twin.count, twin.hi, len(twin.bins())) == (2, 2.0, 2)


def blocks_of(count, cuts):
    edges = [0, *sorted(cut % (count + 1) for cut in cuts), count]
    return [slice(*pair) for pair in pairwise(edges)]


@given(
    st.lists(st.one_of(st.floats(-1e6, 1e6), VALUES), max_size=300),
    st.integers(1, 12),
    st.lists(st.integers(0, 5000), max_size=6),
    st.lists(st.sampled_from([0.5, 0.9, 0.98, 0.995]), max_size=3, unique=True),
)
@example([0.0] * 10 + [1.0], 5, [0, 0, 1, 1, 54], [0.5])  # single points before and after a block that settles it
@settings(max_examples=80, deadline=None)
def test_points_in_blocks_are_the_same_as_points_one_by_one(values, repeats, cuts, decays):
    values = np.array(values * repeats, float)
    single, block = Series(decays), Series(decays)
    steps = np.arange(len(values), dtype=float)
    for step, value in enumerate(values.tolist()):
        single.add(step, 0.5 * step, value)
    for number, part in enumerate(blocks_of(len(values), cuts)):
        if number % 3 == 2:
            for step in steps[part]:
                block.add(step, 0.5 * step, values[int(step)])
        else:
            averages = block.extend(steps[part], 0.5 * steps[part], values[part])
            for last in averages[-1:]:
                np.testing.assert_array_equal(last, block.averages)
    assert (block.count, block.bad, block.lo, block.hi) == (single.count, single.bad, single.lo, single.hi)
    one, other = single.bins(), block.bins()
    for name in set(one.dtype.names) - {"averages"}:
        np.testing.assert_array_equal(one[name], other[name])
    # Rounding is relative to the largest value that an average has seen, but for numbers near the smallest there is.
    close = {"rtol": 1e-9, "atol": 1e-11 * max((abs(v) for v in values if abs(v) < 1e300), default=0.0) + 1e-300}
    np.testing.assert_allclose(one["averages"], other["averages"], **close)
    np.testing.assert_allclose(block.averages, single.averages, **close)


def held(series):
    """Bytes of the three levels."""
    return len(series._whole) + len(series._middle) + 8 * len(series._points)


def most(series):
    row = series.bins().dtype.itemsize
    return (WHOLE_BINS + 2 * MIDDLE_BINS) * row + (2 * RECENT_POINTS + BLOCK) * row


def test_memory_has_a_bound():
    series = filled([float(i % 97) for i in range(200_000)])
    assert held(series) <= most(series)
    assert len(series.bins()) <= WHOLE_BINS + 2


@pytest.mark.slow
def test_memory_is_flat_for_ten_million_points():
    series = Series((0.98,))
    sizes = []
    for first in range(0, 10_000_000, 1000):
        steps = np.arange(first, first + 1000, dtype=float)
        series.extend(steps, steps, steps % 1013)
        if first % 2_500_000 == 0:
            sizes.append(held(series))
    assert max(sizes) <= most(series)
    assert sum(b.points for b in records(series)) == 10_000_000
