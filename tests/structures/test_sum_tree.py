"""The sum tree against a plain array of weights and its cumulative sum."""

import importlib.util
import math
import re
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from learnit_r8.errors import ConfigError
from learnit_r8.structures import sum_tree
from learnit_r8.structures.sum_tree import MAX_WEIGHT, SumTree

needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="no numba")
PATHS = [False, pytest.param(True, marks=needs_numba)]
WEIGHTS = st.one_of(st.just(0.0), st.floats(0.0, 10.0), st.floats(0.0, MAX_WEIGHT), st.floats(0.0, 1e-300))
"""Zero, everyday, and every magnitude that the tree takes, subnormal ones included."""


@st.composite
def histories(draw):
    size = draw(st.sampled_from([1, 2, 15, 16, 17, 255, 300, 70_000]))
    update = st.lists(st.tuples(st.integers(0, size - 1), WEIGHTS), max_size=20)
    return size, draw(st.lists(update, min_size=1, max_size=6)), draw(st.integers(0, 2**32))


@pytest.mark.parametrize("fast", PATHS)
@settings(deadline=None, max_examples=60)
@example((15, [[(1, 2.0**53 - 1), (2, 1.0), (8, 2.0)], [(0, 0.0)]], 0))
@given(histories())
def test_weights_and_total_follow_any_history_with_the_last_duplicate_winning(fast, history):
    size, updates, seed = history
    tree, expected = SumTree(size, fast=fast), np.zeros(size)
    for update in updates:
        for slot, weight in update:
            expected[slot] = weight
        tree.set(np.array([slot for slot, _ in update], dtype=np.int64), np.array([weight for _, weight in update]))
    np.testing.assert_array_equal(tree.view, expected)
    assert tree.total == pytest.approx(math.fsum(expected), rel=1e-12, abs=0.0)
    refilled = SumTree(size, fast=fast)
    refilled.fill(tree.view)
    assert refilled.total == tree.total
    if tree.total:
        u = np.random.default_rng(seed).random(64)
        u[:2] = 0.0, np.nextafter(1.0, 0.0)
        slots = tree.draw(u)
        assert (expected[slots] > 0.0).all()
        np.testing.assert_array_equal(refilled.draw(u), slots)


@needs_numba
@settings(deadline=None, max_examples=60)
@given(histories())
def test_numpy_and_numba_agree_to_the_last_bit(history):
    size, updates, seed = history
    plain, compiled = SumTree(size, fast=False), SumTree(size, fast=True)
    u = np.random.default_rng(seed).random(50)
    for update in updates:
        slots, weights = np.array([s for s, _ in update], dtype=np.int64), np.array([w for _, w in update])
        plain.set(slots, weights)
        compiled.set(slots, weights)
        assert plain.total == compiled.total
        if plain.total:
            np.testing.assert_array_equal(plain.draw(u), compiled.draw(u))


@pytest.mark.parametrize("size", [1, 16, 1000, 100_000])
def test_a_draw_is_the_place_of_u_in_the_cumulative_sum(size):
    rng = np.random.default_rng(size)
    weights = rng.integers(0, 5, size).astype(float) + (np.arange(size) == 0)
    tree, u = SumTree(size), rng.random(5000)
    tree.fill(weights)
    # Small integers add up without rounding, so both must agree everywhere.
    expected = np.searchsorted(np.cumsum(weights), u * weights.sum(), side="right")
    np.testing.assert_array_equal(tree.draw(u), expected)


@pytest.mark.parametrize("fast", PATHS)
def test_draw_frequencies_match_after_a_million_updates_with_duplicates(fast):
    rng = np.random.default_rng(7)
    size, batch = 5000, 1000
    tree, expected = SumTree(size, fast=fast), np.zeros(size)
    for _ in range(1000):
        slots, weights = rng.integers(0, size, batch), rng.pareto(1.5, batch)
        tree.set(slots, weights)
        expected[slots] = weights
    counts = np.bincount(tree.draw(rng.random(1_000_000)), minlength=size)
    p_value = stats.chisquare(counts, 1e6 * expected / expected.sum()).pvalue
    assert p_value > 1e-3
    assert abs(tree.total / math.fsum(expected) - 1.0) < 1e-9


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf, 2 * MAX_WEIGHT])
def test_a_bad_weight_is_refused_and_changes_nothing(bad):
    tree = SumTree(10)
    tree.fill(np.full(10, 2.0))
    with pytest.raises(ValueError, match=re.escape(f"got {bad}")):
        tree.fill(np.where(np.arange(10) == 3, bad, 1.0))
    assert tree.total == 20.0
    np.testing.assert_array_equal(tree.view, np.full(10, 2.0))


def test_an_all_zero_tree_is_refused():
    with pytest.raises(ValueError, match="every weight is zero"):
        SumTree(3).draw(np.array([0.5]))


@pytest.mark.parametrize("fast", PATHS)
def test_empty_updates_and_draws_are_fine(fast):
    tree = SumTree(5, fast=fast)
    tree.set(np.empty(0, np.int64), np.empty(0))
    assert tree.total == 0.0
    tree.set(np.array([1, 3]), np.full(2, 0.5))
    np.testing.assert_array_equal(tree.view, [0.0, 0.5, 0.0, 0.5, 0.0])
    assert len(tree.draw(np.empty(0))) == 0


def test_without_numba_large_trees_use_numpy_and_fast_true_says_what_to_install(monkeypatch):
    sum_tree._compiled.cache_clear()
    monkeypatch.setitem(sys.modules, "numba", None)
    try:
        assert SumTree(100_000)._kernels is None
        with pytest.raises(ConfigError, match="numba"):
            SumTree(10, fast=True)
    finally:
        sum_tree._compiled.cache_clear()
    monkeypatch.undo()
    assert (SumTree(100_000)._kernels is not None) == (importlib.util.find_spec("numba") is not None)
