"""The loss catalog: exact statistics per sample, balanced quadrants, and an undo that leaves no trace."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learnit_r8.samples.catalog import LossCatalog
from learnit_r8.samples.quartiles import UNSEEN

FIELDS = ("expected_loss", "variance", "uses", "last_seen", "mean_loss", "variability", "correctness")


def report(catalog, indices, losses, step=0):
    indices = np.asarray(indices, np.int64)
    rows = catalog.look_up(indices)
    if np.ndim(losses) == 0:
        return catalog.record_batch(rows, float(losses), step)
    return catalog.record(rows, np.asarray(losses, np.float32), step)


def refresh(catalog, excluded=None, seed=0):
    return catalog.refresh_quadrants(np.random.default_rng(seed), excluded)


def snapshot(catalog):
    return {name: getattr(catalog, name).copy() for name in FIELDS} | {"quadrants": catalog.quadrants()}


def assert_same(left, right):
    for name, values in left.items():
        np.testing.assert_array_equal(values, right[name], err_msg=name)


@pytest.mark.parametrize("size", [1, 7, 32, 130, 1000])
@pytest.mark.parametrize("seen", [0, 350, 1000])
def test_batches_that_are_looked_up_ahead_have_the_rows_and_expected_losses_of_one_by_one(size, seen):
    rng, catalog = np.random.default_rng(0), LossCatalog(1000)
    for start in range(0, seen, 50):
        ids = np.arange(start, start + 50)
        catalog.record(catalog.look_up(ids), rng.lognormal(0, 2, 50).astype(np.float32), start)
    order = rng.permutation(1000)
    batches = [order[start : start + size] for start in range(0, 1000, size)]
    singly = [catalog.look_up(batch) for batch in batches]
    catalog.expect(batches)
    for number, (batch, alone) in enumerate(zip(batches, singly, strict=True)):
        found = catalog.look_up(batch)
        np.testing.assert_array_equal(found.block.view(np.uint8), alone.block.view(np.uint8))
        if seen != 350 or number == 0:
            np.testing.assert_equal((found.expected, found.unseen), (alone.expected, alone.unseen))
        losses = rng.lognormal(0, 1, len(batch)).astype(np.float32)
        catalog.record(found, losses, number, float(losses.mean(dtype=np.float64)), once=True)
    assert catalog.num_seen == 1000
    assert (catalog.uses == np.where(np.arange(1000) < seen, 2, 1)).all()


def test_a_new_catalog_knows_nothing():
    catalog = LossCatalog(5)
    assert catalog.num_seen == 0
    assert catalog.confidence == 0.0
    assert np.isnan(catalog.mean_expected)
    assert np.isnan(catalog.look_up(np.arange(3)).expected)
    assert (catalog.quadrants() == UNSEEN).all()
    assert refresh(catalog) is None
    assert len(catalog.suspects(5)) == 0


def test_a_sample_costs_at_most_32_bytes():
    assert LossCatalog(1000).nbytes <= 32_000


@pytest.mark.parametrize("name", FIELDS)
def test_what_users_read_cannot_be_written(name):
    catalog = LossCatalog(4)
    report(catalog, [0, 1], [1.0, 2.0])
    with pytest.raises(ValueError, match="read-only"):
        getattr(catalog, name)[0] = 7


def test_quadrants_hands_out_a_copy():
    catalog = LossCatalog(4)
    report(catalog, range(4), [1, 2, 3, 4])
    refresh(catalog)
    catalog.quadrants()[:] = 3
    assert catalog.quadrants().tolist() == [0, 1, 2, 3]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), min_size=1, max_size=30))
def test_the_statistics_agree_with_a_plain_recomputation_in_float64(history):
    catalog = LossCatalog(3)
    for step, losses in enumerate(history):
        report(catalog, [2, 0, 1], losses, step)
    seen = np.array(history, np.float64)[:, [1, 2, 0]]
    size = np.abs(seen).max() + 1e-15
    estimate, variance = seen[0].copy(), np.zeros(3)
    for row in seen[1:]:
        surprise = row - estimate
        variance = 0.5 * (variance + 0.5 * surprise**2)
        estimate = estimate + 0.5 * surprise
    np.testing.assert_allclose(catalog.expected_loss, estimate, atol=1e-5 * size)
    np.testing.assert_allclose(catalog.variance, variance, atol=1e-5 * size**2)
    np.testing.assert_allclose(catalog.mean_loss, seen.mean(axis=0), atol=1e-5 * size)
    np.testing.assert_allclose(catalog.variability, seen.std(axis=0), atol=3e-3 * size)
    np.testing.assert_array_equal(catalog.uses, len(history))
    np.testing.assert_array_equal(catalog.last_seen, len(history) - 1)
    np.testing.assert_allclose(catalog.mean_expected, estimate.mean(), atol=1e-5 * size)


def test_an_unseen_sample_is_expected_to_be_like_the_others():
    catalog = LossCatalog(4)
    report(catalog, [0, 1], [1.0, 3.0])
    assert catalog.look_up(np.array([2, 3])).expected != catalog.look_up(np.array([0, 1])).expected  # NaN: all unseen
    assert catalog.look_up(np.array([1, 2])).expected == pytest.approx((3.0 + 2.0) / 2)


def test_an_unseen_sample_that_a_batch_holds_twice_is_counted_once():
    catalog = LossCatalog(4)
    catalog.record(catalog.look_up(np.array([1, 1, 2])), np.array([1.0, 1.0, 3.0], np.float32), 0)
    catalog.refresh_quadrants(np.random.default_rng(0))
    assert catalog.num_seen == 2
    assert catalog.confidence == 0.5
    assert catalog.mean_expected == 2.0


def test_correctness_counts_losses_below_ln_two():
    catalog = LossCatalog(2)
    for losses in ([0.69, 0.70], [0.1, 0.1], [0.5, 2.0]):
        report(catalog, [0, 1], losses)
    np.testing.assert_allclose(catalog.correctness, [1.0, 1 / 3], rtol=1e-6)


LOSS_KINDS = {
    "continuous": lambda rng, n: rng.normal(size=n),
    "negative": lambda rng, n: -rng.exponential(size=n),
    "all equal": lambda rng, n: np.full(n, 0.7),
    "all zero": lambda rng, n: np.zeros(n),
    "two values": lambda rng, n: rng.integers(0, 2, n).astype(float),
    "many ties": lambda rng, n: rng.integers(0, 5, n) / 3,
    "huge and tiny": lambda rng, n: rng.choice([-1e14, -1e-30, 0.0, 1e-30, 1e14], n),
}


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 200), st.sampled_from(list(LOSS_KINDS)), st.integers(0, 9), st.data())
def test_quadrants_are_quarters_of_what_may_be_drawn_and_are_ordered_by_loss(n, kind, seed, data):
    catalog = LossCatalog(n)
    losses = LOSS_KINDS[kind](np.random.default_rng(seed), n).astype(np.float32)
    report(catalog, range(n), losses)
    excluded = None
    if data.draw(st.booleans(), label="exclude some"):
        excluded = np.random.default_rng(seed + 1).random(n) < 0.3
    table = refresh(catalog, excluded, seed)
    drawable = np.ones(n, bool) if excluded is None else ~excluded
    if not drawable.any():
        assert table is None
        return
    codes = catalog.quadrants()
    counts = np.bincount(codes[drawable], minlength=4)
    assert counts.max() - counts.min() <= 1
    assert counts.sum() == drawable.sum()
    for lower, upper in zip(range(3), range(1, 4), strict=True):
        below, above = losses[drawable & (codes == lower)], losses[drawable & (codes == upper)]
        if len(below) and len(above):
            assert below.max() <= above.min()
    assert (codes <= 3).all(), "an excluded sample has a quadrant too"
    assert np.isfinite(table.losses).all()


def test_a_reported_sample_moves_to_the_quadrant_of_its_new_loss():
    catalog = LossCatalog(8)
    report(catalog, range(8), np.arange(8.0))
    refresh(catalog)
    report(catalog, [7, 0], [-100.0, 100.0])
    assert catalog.quadrants()[[7, 0]].tolist() == [0, 3]
    table = refresh(catalog)
    assert table.easier[3] == pytest.approx(0.5), "one of Q4's two samples got easier"


def test_quadrants_before_the_first_refresh_leave_the_unseen_out():
    catalog = LossCatalog(8)
    report(catalog, [1, 3, 5, 7], [4.0, 3.0, 2.0, 1.0])
    assert catalog.quadrants().tolist() == [255, 3, 255, 2, 255, 1, 255, 0]


def test_suspects_are_those_whose_loss_is_high_throughout():
    catalog = LossCatalog(6)
    for epoch in range(6):
        learned_late = 5.0 if epoch < 3 else 0.0
        report(catalog, range(6), [0.1, 4.0, learned_late, 0.2, 3.0, 0.1], epoch)
    assert catalog.suspects(2).tolist() == [1, 4]
    assert sorted(catalog.suspects(100).tolist()) == list(range(6))
    assert len(catalog.suspects(0)) == 0
    for k in (2.5, "3", None, True, float("nan")):
        with pytest.raises(TypeError, match="k must be a whole number, got"):
            catalog.suspects(k)
    with pytest.raises(ValueError, match="k must be >= 0, got -1"):
        catalog.suspects(-1)


def test_an_unseen_sample_is_no_suspect():
    catalog = LossCatalog(4)
    report(catalog, [2], [-5.0])
    assert catalog.suspects(4).tolist() == [2]


@pytest.mark.parametrize("keep", [0, 1, 2, 5])
def test_rewinding_leaves_no_trace_of_the_later_reports(keep):
    catalog, reference = LossCatalog(12), LossCatalog(12)
    rng = np.random.default_rng(3)
    batches = [(step, rng.permutation(12)[:4], rng.normal(size=4)) for step in range(6)]
    for step, indices, losses in batches:
        report(catalog, indices, losses, step)
        if step < keep:
            report(reference, indices, losses, step)
    assert catalog.rewind(keep) == 6 - keep
    assert_same(snapshot(reference), snapshot(catalog))
    assert catalog.num_seen == reference.num_seen
    if keep:
        assert catalog.mean_expected == pytest.approx(reference.mean_expected)


def test_a_sample_rewound_over_an_epoch_start_is_in_the_quadrant_of_its_restored_loss():
    catalog, rng, losses = LossCatalog(8), np.random.default_rng(0), np.arange(1.0, 9.0, dtype=np.float32)
    catalog.record(catalog.look_up(np.arange(8)), losses, 0)
    catalog.refresh_quadrants(rng)
    catalog.record(catalog.look_up(np.array([0])), np.array([100.0], np.float32), 1)
    catalog.refresh_quadrants(rng)
    assert catalog.quadrants()[0] == 3
    assert catalog.rewind(1) == 1
    assert catalog.quadrants()[0] == 0
    np.testing.assert_array_equal(catalog.expected_loss, losses)


def test_rewinding_a_scalar_report_leaves_no_trace_in_the_samples():
    catalog, reference = LossCatalog(8), LossCatalog(8)
    for each in (catalog, reference):
        report(each, [0, 1, 2, 3], 2.0, 0)
        report(each, [4, 5, 6, 7], 3.0, 1)
    before = reference.uses.copy(), reference.mean_loss.copy(), reference.num_seen
    report(catalog, [0, 4], 50.0, 2)
    assert catalog.rewind(2) == 1
    np.testing.assert_array_equal(catalog.uses, before[0])
    np.testing.assert_array_equal(catalog.mean_loss, before[1])
    assert catalog.num_seen == before[2]


def test_the_undo_journal_still_works_after_very_many_reports():
    catalog = LossCatalog(50_000)
    everyone, losses = np.arange(50_000), np.ones(50_000, np.float32)
    for step in range(100):  # far more than the journal's budget of bytes, an epoch start after each
        report(catalog, everyone, losses, step)
        refresh(catalog)
    report(catalog, everyone, losses * 9, 100)
    assert catalog.rewind(100) == 1
    np.testing.assert_array_equal(catalog.expected_loss, 1.0)


@pytest.mark.parametrize("scalar", [False, True])
def test_a_restored_catalog_goes_on_bit_for_bit(scalar):
    first, second = LossCatalog(20), LossCatalog(20)
    rng = np.random.default_rng(0)

    def some_reports(catalogs, steps):
        for step in steps:
            indices, losses = rng.permutation(20)[:5], rng.exponential(size=5)
            for catalog in catalogs:
                report(catalog, indices, losses.mean() if scalar else losses, step)
            if step % 4 == 3:
                for catalog in catalogs:
                    catalog.end_epoch()
                    refresh(catalog)

    some_reports([first], range(10))
    second.load_state_dict(first.state_dict())
    assert_same(snapshot(first), snapshot(second))
    some_reports([first, second], range(10, 25))
    assert_same(snapshot(first), snapshot(second))
    assert first.mean_expected == second.mean_expected
    assert first.confidence == second.confidence


def test_the_state_is_a_copy():
    catalog = LossCatalog(4)
    report(catalog, range(4), [1, 2, 3, 4])
    state = catalog.state_dict()
    report(catalog, range(4), [9, 9, 9, 9])
    catalog.load_state_dict(state)
    report(catalog, range(4), [5, 5, 5, 5])
    other = LossCatalog(4)
    other.load_state_dict(state)
    assert other.expected_loss.tolist() == [1, 2, 3, 4]


def test_a_state_of_another_size_is_refused_and_nothing_changes():
    catalog = LossCatalog(4)
    report(catalog, range(4), [1, 2, 3, 4])
    with pytest.raises(ValueError, match=r"5 samples.*num_samples=4"):
        catalog.load_state_dict(LossCatalog(5).state_dict())
    assert catalog.expected_loss.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("scalar_first", [True, False])
def test_per_sample_and_scalar_reports_may_alternate(scalar_first):
    catalog = LossCatalog(8)
    for step in range(12):
        losses = np.full(8, 2.0)
        report(catalog, range(8), losses.mean() if (step % 2 == 0) == scalar_first else losses, step)
    assert np.isfinite(catalog.expected_loss).all()
    np.testing.assert_allclose(catalog.expected_loss, 2.0, rtol=0.3)
    np.testing.assert_array_equal(catalog.uses, 12)
