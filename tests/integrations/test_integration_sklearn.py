"""scikit-learn's `partial_fit` in the loop, and the examples of all frameworks."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import SGDClassifier

from learnit_r8 import R8Scheduler
from tests.backup_watch import BackupWatch, check_survival, fingerprint, never, random_steps

ROOT = Path(__file__).resolve().parents[2]
SAMPLES, BATCH = 120, 8


def scheduler_for(**options) -> R8Scheduler:
    return R8Scheduler(SAMPLES, BATCH, initial_lr=0.1, min_lr=1e-4, checkpoint_dir=None, ui="off", **options)


class Run:
    def __init__(self, faults=never, epochs: int = 3) -> None:
        rng = np.random.default_rng(0)
        self.x = rng.normal(size=(SAMPLES, 5))
        self.y = (self.x[:, 0] > 0).astype(int) + (self.x[:, 1] > 1)
        self.model = SGDClassifier(loss="log_loss", learning_rate="constant", eta0=0.1, random_state=0)
        self.model.partial_fit(self.x[:1], self.y[:1], classes=np.arange(3))
        self.seen: list[list[int]] = []
        self.watch = BackupWatch(faults, scheduler_for, num_epochs=epochs)
        self.scheduler = self.watch.scheduler
        self.scheduler.attach_model(lambda: self.model.__dict__, self.restore)

    def restore(self, state) -> None:
        self.model.__dict__.update(copy.deepcopy(state))

    def go(self, stop_at: int | None = None) -> None:
        for _ in self.scheduler.epoch_iterator():
            for batch in self.scheduler.batch_iterator():
                x, y = self.x[batch.indices], self.y[batch.indices]
                losses = -np.log(np.maximum(self.model.predict_proba(x)[np.arange(len(y)), y], 1e-7))
                self.model.set_params(eta0=batch.lr).partial_fit(x, y)
                factor = self.watch.factor()
                self.model.coef_ *= factor
                losses[0] *= factor
                self.seen.append(batch.indices.tolist())
                self.scheduler.update_with_loss(losses)
                if self.scheduler.global_step == stop_at:
                    return


def test_a_resumed_run_equals_the_uninterrupted_one():
    whole, first, second = Run(), Run(), Run()
    whole.go()
    first.go(stop_at=19)
    second.scheduler.load_state_dict(first.scheduler.state_dict())
    second.model = copy.deepcopy(first.model)
    second.go()
    assert first.seen + second.seen == whole.seen
    assert fingerprint(second.model.__dict__) == fingerprint(whole.model.__dict__)


@pytest.mark.parametrize("seed", range(4))
def test_nan_at_random_steps_ends_finite_and_rollbacks_bring_back_the_backup(seed):
    run = Run(random_steps(seed), epochs=14)
    run.go()
    check_survival(run.watch.findings())


@pytest.mark.parametrize(
    ("script", "backend"),
    [
        ("sklearn_digits.py", ""),
        pytest.param("jax_digits.py", "jax", marks=pytest.mark.slow),
        pytest.param("keras_digits.py", "torch", marks=pytest.mark.slow),
        pytest.param("keras_digits.py", "jax", marks=pytest.mark.slow),
        pytest.param("lightning_digits.py", "lightning", marks=pytest.mark.slow),
    ],
)
def test_an_example_runs_and_learns(script, backend, tmp_path):
    for module in filter(None, (backend, "keras" if "keras" in script else "")):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "KERAS_BACKEND": backend or "numpy"}
    path = ROOT / "examples" / script
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.search(r"accuracy (0\.\d+)", done.stdout)
    assert found is not None
    assert float(found[1]) > 0.85
    assert list(tmp_path.iterdir()) == []
