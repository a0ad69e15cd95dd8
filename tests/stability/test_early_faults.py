"""NaN while the detector still learns: a rollback to the untrained model must not make ordinary losses look wrong."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.fault_training import STEPS, Run
from tests.backup_watch import survivable


@pytest.mark.parametrize("seed", range(25))
def test_each_early_fault_is_one_rollback(seed):
    rng = np.random.default_rng(seed)
    faults: list[int] = [0] if seed % 2 else []
    while len(faults) < 4 or not survivable(faults):
        faults = sorted({*faults[: seed % 2], *rng.integers(0, 70, 4 - seed % 2).tolist()})
    run = Run(seed, backup_every=4)

    def before(step: int) -> None:
        if step in faults:
            run.model.arrays["w"][3] = np.nan

    run.go(before=before)
    assert [step for step, _ in run.rollbacks] == faults
    assert run.scheduler.global_step == STEPS
    assert np.isfinite(run.model.arrays["w"]).all()
