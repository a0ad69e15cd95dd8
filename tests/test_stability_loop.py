"""Detector, backups and recovery together bring a damaged run back, whatever was damaged and when."""

from __future__ import annotations

import numpy as np
import pytest

from learnit_r8.stability.backups import BackupRing
from learnit_r8.stability.detector import Detector
from learnit_r8.stability.recovery import Kind, Recovery
from learnit_r8.types import Verdict


def nan_weight(state, rng):
    state["w"][rng.integers(20)] = np.nan


def scaled_weights(state, rng):
    state["w"] *= 40.0


def nan_momentum(state, rng):
    state["v"][rng.integers(20)] = np.nan


DAMAGES = {"nothing": None, "NaN weight": nan_weight, "weights x 40": scaled_weights, "NaN momentum": nan_momentum}


def train(damage, at, *, backup_every, seed=0, steps=600):
    """Least squares by SGD with momentum; `damage` befalls the state just before step `at`."""
    rng = np.random.default_rng([seed, at])
    x = rng.standard_normal((512, 20))
    y = x @ rng.standard_normal(20) + 0.3 * rng.standard_normal(512)
    state = {"w": np.zeros(20), "v": np.zeros(20)}
    detector, ring, recovery = Detector(), BackupRing(), Recovery(512)
    saved, rollbacks = {}, []
    for step in range(steps):
        if step == at and damage is not None:
            damage(state, rng)
        if step % backup_every == 0 and recovery.backups_allowed:
            info = ring.take(state, step)
            saved[info.id] = detector.state_dict()
        ids = rng.choice(512, 32, replace=False)
        error = x[ids] @ state["w"] - y[ids]
        loss = float(np.mean(error**2))
        reading = detector.observe(step, loss)
        action = recovery.react(
            step,
            reading.verdict,
            can_restore=ring.find(detector.first_suspect_step) is not None,
            batch_indices=ids,
            loss=loss,
            sample_losses=error**2,
            first_suspect_step=detector.first_suspect_step,
        )
        assert action.kind in (Kind.ACCEPT, Kind.HOLD, Kind.RESTORE)
        if action.kind is Kind.RESTORE:
            for info in ring.backups:
                if info.id == action.discard:
                    ring.discard(info)
            info, state = ring.restore(action.before_step)
            ring.discard_after(info.step)
            detector.reset_after_rollback(saved[info.id])
            recovery.rolled_back(step, info.step, info.id, last_resort=info.initial)
            rollbacks.append((step, info.step))
            continue
        if reading.verdict is Verdict.CALM:
            ring.healthy(step)
        state["v"] = 0.9 * state["v"] + 2 * error @ x[ids] / 32
        state["w"] = state["w"] - 0.01 * recovery.aftermath.lr_multiplier(step) * state["v"]
    return float(np.mean((x @ state["w"] - y) ** 2)), rollbacks


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("at", [1, 16, 99, 100, 101, 500])
@pytest.mark.parametrize("backup_every", [1, 7, 50])
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_a_damaged_run_ends_as_well_as_a_clean_one(kind, at, backup_every):
    clean, none = train(None, at, backup_every=backup_every)
    final, rollbacks = train(DAMAGES[kind], at, backup_every=backup_every)
    assert none == []
    assert final < 1.1 * clean
    if kind.startswith("NaN"):
        assert 1 <= len(rollbacks) <= 2
    for step, to in rollbacks:
        assert to < at <= step
        assert step - to <= 16 + 2 * backup_every + 8
