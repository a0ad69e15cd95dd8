"""R8Scheduler in Keras, on each backend that is installed; a process each, for Keras has one backend per process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backup_watch import check_diverged, check_survival

HERE = Path(__file__).parent
REFUSED = ("must have 100 rows", "R8Dataset", "shuffle=False", "LearningRateSchedule", "steps_per_execution", "spent")


def drive(backend: str, *wanted: str) -> dict:
    for module in ("keras", backend):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    environment = os.environ | {"KERAS_BACKEND": backend, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / "keras_driver.py"), *wanted],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_keras_on_torch_resumes_to_the_bit_and_survives_nan():
    found = drive("torch", "resume", "faults", "diverged")
    check_resumed(found["resume"])
    check_survival(*found["faults"])
    check_diverged(found["diverged"])


def test_keras_on_jax_resumes_to_the_bit_survives_nan_and_knows_each_samples_loss():
    found = drive("jax", "resume", "losses", "faults", "diverged")
    check_resumed(found["resume"])
    check_survival(*found["faults"])
    check_diverged(found["diverged"])
    assert max(found["losses"]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "jax", "tensorflow"])
def test_keras_with_everything_on_each_backend(backend):
    found = drive(backend, "resume", "resume-threads", "losses", "faults", "many-faults", "refusals", "saved")
    check_resumed(found["resume"] + found["resume-threads"])
    for findings in found["faults"] + found["many-faults"]:
        check_survival(findings)
    assert max(found["losses"]) < 1e-5
    assert len(found["refusals"]) == len(REFUSED)
    assert all(word in message for word, message in zip(REFUSED, found["refusals"], strict=True))
    assert found["saved"]


def check_resumed(runs: list[dict]) -> None:
    for run in runs:
        assert run["ids"]
        assert run["weights"]
        assert (run["steps"], run["uses"]) == (39, [3])
        assert run["peak"] == pytest.approx(0.02, rel=0.05)
