"""Quadrant-balanced batches: a quarter from each loss quartile, every sample once, the least used first."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learnit_r8 import R8Scheduler
from learnit_r8.core.rng import Purpose, RandomStreams
from learnit_r8.samples.catalog import LossCatalog
from learnit_r8.strategies import BatchRequest, Quadrant

BARE = {"use_curses": False, "checkpoint_dir": None}


def request(catalog, size, cursor=0, *, epoch=1, seed=0, excluded=None, stable_only=False):
    purpose = Purpose.PLAN if cursor == 0 else Purpose.BATCH
    streams = RandomStreams(seed)
    return BatchRequest(size, epoch, cursor, 0, 0.0, catalog, streams, purpose, excluded, stable_only)


def cataloged(losses, seen=None):
    catalog = LossCatalog(len(losses))
    seen = np.arange(len(losses)) if seen is None else np.flatnonzero(seen)
    if len(seen):
        catalog.record(catalog.look_up(seen), np.asarray(losses, np.float32)[seen], 0)
    return catalog


def plan(catalog, size, excluded=None, seed=0):
    """Return all batches of an epoch."""
    catalog.refresh_quadrants(np.random.default_rng(seed), excluded)
    strategy = Quadrant()
    left = strategy.start_epoch(request(catalog, size, excluded=excluded, seed=seed))
    batches = []
    while left:
        batches.append(strategy.draw(request(catalog, min(size, left), len(batches), excluded=excluded, seed=seed)))
        left -= len(batches[-1])
    return batches


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 12), st.integers(4, 30), st.integers(0, 11), st.sampled_from([0.0, 0.3]), st.integers(0, 5))
def test_every_batch_takes_a_quarter_of_each_quadrant(size, batches, rest, share_excluded, seed):
    rng = np.random.default_rng(seed)
    count = size * batches + rest
    catalog = cataloged(np.round(rng.normal(size=count), 1))
    excluded = rng.random(count) < share_excluded
    if (~excluded).sum() < 4 * size:
        excluded[:] = False
    drawn = plan(catalog, size, excluded if excluded.any() else None, seed)
    codes = catalog.quadrants()
    for batch in drawn:
        shares = np.bincount(codes[batch], minlength=4)
        assert np.abs(shares - len(batch) / 4).max() <= 1
    assert sorted(np.concatenate(drawn)) == np.flatnonzero(~excluded).tolist()


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 120), st.integers(1, 16), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), st.integers(0, 5))
def test_samples_without_a_known_loss_are_drawn_once_too_and_spread_over_the_batches(count, size, unseen, seed):
    rng = np.random.default_rng(seed)
    seen = rng.random(count) >= unseen
    catalog = cataloged(rng.normal(size=count), seen)
    drawn = plan(catalog, size, seed=seed)
    assert sorted(np.concatenate(drawn)) == list(range(count))
    assert all(len(batch) == size for batch in drawn[:-1])


def test_on_probation_the_stable_samples_come_first_and_all_still_come_once():
    catalog = cataloged(np.arange(40.0))
    catalog.refresh_quadrants(np.random.default_rng(0))
    strategy = Quadrant()
    strategy.start_epoch(request(catalog, 8))
    first = strategy.draw(request(catalog, 8, 1, stable_only=True))
    assert first.max() < 10
    rest = [strategy.draw(request(catalog, 8, cursor)) for cursor in range(2, 6)]
    assert sorted(np.concatenate([first, *rest])) == list(range(40))
    assert all(np.ptp(np.bincount(batch // 10, minlength=4)) <= 3 for batch in rest)


def test_within_a_quadrant_the_least_used_samples_come_first():
    catalog = cataloged(np.ones(64))
    often = np.arange(0, 64, 2)
    catalog.record(catalog.look_up(often), np.ones(32, np.float32), 1)
    drawn = plan(catalog, 8)
    uses = catalog.uses
    codes = catalog.quadrants()
    for quadrant in range(4):
        order = [uses[i] for batch in drawn for i in batch if codes[i] == quadrant]
        assert order == sorted(order)


def test_the_order_within_a_quadrant_is_random():
    catalog = cataloged(np.arange(400.0))
    one, other = (np.concatenate(plan(catalog, 8, seed=seed)) for seed in (1, 2))
    assert not np.array_equal(one, other)
    quarter = one[catalog.quadrants()[one] == 0]
    assert 30 < np.count_nonzero(np.diff(quarter) > 0) < 70, "neither rising nor falling"


def test_ties_fall_on_either_side_of_an_edge_at_random():
    sides = []
    for seed in range(20):
        catalog = cataloged(np.zeros(8))
        catalog.refresh_quadrants(np.random.default_rng(seed))
        sides.append(tuple(catalog.quadrants()))
    assert len(set(sides)) > 10


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("losses", ["distinct", "equal", "negative", "zero"])
@pytest.mark.parametrize(("count", "size"), [(64, 16), (67, 16), (100, 7), (33, 8), (16, 4), (4, 1), (130, 32)])
def test_a_run_keeps_its_shares_in_every_epoch(count, size, losses, scalar):
    values = {
        "distinct": np.sin(np.arange(count)) + 2,
        "equal": np.ones(count),
        "negative": -np.arange(count) - 1.0,
        "zero": np.zeros(count),
    }[losses]
    scheduler = R8Scheduler(count, size, num_epochs=6, **BARE)
    for epoch in scheduler.epoch_iterator():
        quadrants = None
        for batch in scheduler.batch_iterator():
            if quadrants is None:
                quadrants = scheduler.catalog.quadrants()
            if epoch:
                shares = np.bincount(quadrants[batch.indices], minlength=4)
                assert np.abs(shares - len(batch.indices) / 4).max() <= 1
            mine = values[batch.indices]
            scheduler.update_with_loss(mine.mean() if scalar else mine)
    np.testing.assert_array_equal(scheduler.catalog.uses, 6)
    assert np.isfinite(scheduler.catalog.expected_loss).all()


def test_uses_differ_by_at_most_one_even_when_batches_are_lost():
    scheduler = R8Scheduler(64, 8, num_epochs=6, **BARE)
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            scheduler.update_with_loss(math.nan if batch.step == 11 else np.cos(batch.indices))
    uses = scheduler.catalog.uses
    assert uses.max() - uses.min() == 1
    assert uses.sum() == 64 * 6 - 8


def test_a_strategy_without_an_epoch_plan_makes_one():
    catalog = cataloged(np.arange(16.0))
    catalog.refresh_quadrants(np.random.default_rng(0))
    assert len(Quadrant().draw(request(catalog, 8))) == 8
