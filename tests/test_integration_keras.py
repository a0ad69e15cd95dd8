"""R8Scheduler in Keras, on each backend that is installed; a process each, for Keras has one backend per process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_keras_resumes_to_the_bit_survives_nan_and_knows_each_samples_loss(backend):
    found = drive(backend, "resume", "losses", "faults", "refusals", "saved")
    check_resumed(found["resume"])
    assert max(found["losses"]) < 1e-5
    check_faults(found["faults"])
    assert len(found["refusals"]) == len(REFUSED)
    assert all(word in message for word, message in zip(REFUSED, found["refusals"], strict=True))
    assert found["saved"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "jax", "tensorflow"])
def test_keras_with_loading_threads_and_more_faults(backend):
    found = drive(backend, "resume-threads", "many-faults")
    check_resumed(found["resume-threads"])
    check_faults(found["many-faults"])


def check_resumed(runs: list[dict]) -> None:
    for run in runs:
        assert run["ids"]
        assert run["weights"]
        assert (run["steps"], run["uses"]) == (39, [3])
        assert run["peak"] == pytest.approx(0.02, rel=0.05)


def check_faults(runs: list[dict]) -> None:
    for run in runs:
        assert run == {"finite": True, "rollbacks": 3, "equal": True, "unchanged": True, "steps": 156}
