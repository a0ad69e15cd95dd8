"""Samples that are excluded, or whose labels are mended, in a run."""

from __future__ import annotations

import numpy as np
import pytest

from learnit_r8 import R8Scheduler, events

N, B = 64, 8


class Heard:
    def __init__(self):
        self.events = []

    def record(self, event):
        self.events.append(event)


def scheduler(**options):
    return R8Scheduler(N, B, num_epochs=6, checkpoint_dir=None, ui="off", backup_every=None, **options)


def epoch(run, loss=lambda ids: 1.0 + 0.01 * ids):
    drawn = []
    for batch in run.batch_iterator():
        drawn += batch.indices.tolist()
        run.update_with_loss(loss(batch.indices).astype(np.float32))
    return drawn


@pytest.mark.parametrize("strategy", ["uniform", "quadrant", "spaced", "prioritized"])
def test_excluded_samples_stay_out_of_the_epochs_that_begin_later_also_after_a_resume(strategy):
    heard = Heard()
    run = scheduler(strategy=strategy, sinks=[heard])
    for number in run.epoch_iterator():
        if number == 1:
            next(iter_ := run.batch_iterator())
            run.exclude({3, 5})
            run.update_with_loss(np.ones(B, np.float32))
            iter_.close()
        drawn = epoch(run)
        if number >= 2:
            assert not {3, 5} & set(drawn)
        if number == 3:
            break
    told = [event for event in heard.events if isinstance(event, events.SampleQuarantined)]
    assert [event.indices for event in told] == [(3, 5)]
    assert "exclude" in told[0].reason
    again = scheduler(strategy=strategy)
    again.load_state_dict(run.state_dict())
    next(again.epoch_iterator())
    assert not {3, 5} & set(epoch(again))
    assert again.catalog.left_out.tolist() == [3, 5]


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        ([64], ValueError, "from 0 to 63, got 64"),
        ([-1], ValueError, "got -1"),
        ([0.5], TypeError, "whole numbers"),
        (["a"], TypeError, "whole numbers"),
        (range(64), ValueError, "no batch to train on"),
    ],
)
def test_what_cannot_be_excluded_is_refused_and_nothing_changes(ids, error, words):
    run = scheduler()
    with pytest.raises(error, match=words):
        run.exclude(ids)
    assert not len(run.catalog.left_out)
    if ids != range(64):
        with pytest.raises(error, match=words):
            run.relabelled(ids)


def test_a_relabelled_sample_is_as_if_never_seen_and_comes_back():
    run = scheduler()
    loop = run.epoch_iterator()
    next(loop)
    epoch(run)
    run.exclude([7])
    next(loop)
    assert 7 not in epoch(run)
    before = run.catalog.uses.copy()
    run.relabelled(np.array([7, 9]))
    assert run.catalog.uses[[7, 9]].tolist() == [0, 0]
    assert run.catalog.expected_loss[[7, 9]].tolist() == [0, 0]
    assert run.catalog.num_seen == N - 2
    others = np.setdiff1d(np.arange(N), [7, 9])
    assert np.array_equal(run.catalog.uses[others], before[others])
    assert run.catalog.mean_expected == pytest.approx(float(run.catalog.expected_loss[others].mean()), rel=1e-5)
    next(loop)
    assert {7, 9} <= set(epoch(run, lambda ids: np.where(np.isin(ids, [7, 9]), 0.25, 1.0 + 0.01 * ids)))
    assert run.catalog.expected_loss[[7, 9]].tolist() == [0.25, 0.25]
    assert run.catalog.mean_loss[[7, 9]].tolist() == [0.25, 0.25]


def test_relabelling_amid_an_epoch_holds_for_batches_that_are_out_and_looked_up_ahead():
    run = scheduler()
    loop = run.epoch_iterator()
    next(loop)
    epoch(run)
    next(loop)
    batches = run.batch_iterator()
    first = next(batches)
    ids = first.indices.tolist()
    run.relabelled(ids)
    result = run.update_with_loss(np.full(B, 0.5, np.float32))
    assert np.isnan(result.expected_loss)  # nobody knows what to expect of them
    assert run.catalog.expected_loss[ids].tolist() == [0.5] * B
    assert run.catalog.uses[ids].tolist() == [1] * B
    for _ in batches:
        run.update_with_loss(np.ones(B, np.float32))
    assert run.catalog.num_seen == N


def test_a_rollback_does_not_bring_back_what_was_known_of_the_old_label():
    state = {"w": np.zeros(4)}
    run = R8Scheduler(
        N, B, num_epochs=6, checkpoint_dir=None, ui="off", backup_every=4,
        state_callback=lambda: state, load_callback=lambda saved: None,
    )  # fmt: skip
    loop = run.epoch_iterator()
    for _ in range(3):
        next(loop)
        epoch(run)
    next(loop)
    batches, known = run.batch_iterator(), 0
    for number, _ in enumerate(batches):
        if number == 6:
            ids = np.flatnonzero(run.catalog.last_seen >= run.global_step - 2)[:3]
            run.relabelled(ids)
            known = len(ids)
            state["w"][:] = np.nan
            rolled_back = run.update_with_loss(np.full(B, np.nan, np.float32)).rolled_back
            assert rolled_back
            assert run.catalog.uses[ids].tolist() == [0] * known
            break
        run.update_with_loss(np.ones(B, np.float32))
    assert known == 3
    assert run.catalog.num_seen == N - 3


def test_a_relabelled_suspect_is_one_no_more():
    rng = np.random.default_rng(0)
    wrong = np.zeros(400, bool)
    wrong[rng.permutation(400)[:60]] = True
    run = R8Scheduler(
        400, 20, num_epochs=20, checkpoint_dir=None, ui="off", noise_guard="report", groups=np.arange(400) % 4
    )
    mended = False
    for number in run.epoch_iterator():
        for batch in run.batch_iterator():
            fall = np.exp(-0.02 * run.global_step)
            losses = np.where(wrong[batch.indices] & (not mended), 3.0, 1.4 * fall) * rng.lognormal(0, 0.1, 20)
            run.update_with_loss(losses.astype(np.float32))
        if number == 10:
            flagged = np.flatnonzero(run.noise_guard.flagged)
            assert wrong[flagged].mean() > 0.9
            assert len(flagged) > 40
            run.relabelled(flagged)
            mended = True
            assert not run.noise_guard.flagged.any()
    assert not run.noise_guard.flagged[flagged].any()
