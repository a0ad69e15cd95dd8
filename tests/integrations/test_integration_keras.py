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

HERE = Path(__file__).parents[1]
REFUSED = (
    "must have 100 rows",
    "global_clipnorm",
    "R8Dataset",
    "shuffle=False",
    "LearningRateSchedule",
    "steps_per_execution",
    "spent",
)


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


MISUSED = (
    "R8Callback",
    "shuffle=False",
    "steps_per_epoch=2",
    "class_weight=",
    "LearningRateScheduler",
    "BackupAndRestore",
)


@pytest.mark.parametrize(
    "backend", ["torch", *(pytest.param(one, marks=pytest.mark.slow) for one in ("jax", "tensorflow"))]
)
def test_what_keras_does_besides_training_is_right_or_refused_by_name(backend):
    found = drive(backend, "misuse")["misuse"]
    assert len(found["refused"]) == len(MISUSED)
    assert all(word in message for word, message in zip(MISUSED, found["refused"], strict=True))
    assert len(found["told"]) == 1
    for looked in found["looked"]:
        assert looked["difference"] < 1e-5
        assert looked["predicted"]
    assert [looked["steps"] for looked in found["looked"]] == [39, 36]
    assert found["looked"][0]["uses"] == [3]
    for failed in found["failed"]:
        assert failed["left"] in (17, 16)  # TensorFlow is one ahead
        assert (failed["steps"], failed["uses"]) == (39, [3])
    assert found["plateau"] == pytest.approx([2e-2, 2e-2, 2e-3, 2e-4], rel=1e-4)
    trained, wanted, reported = found["class_weight"]
    assert trained == pytest.approx(wanted, rel=0.02)
    assert reported < 1e-4


def test_keras_own_loggers_get_the_schedulers_numbers_and_the_progress_bar_does_not():
    found = drive("torch", "logged")["logged"]
    assert [float(row["r8/rollbacks"]) for row in found["rows"]] == [0.0] * 3
    assert float(found["rows"][-1]["r8/expected_loss"]) > 0
    assert "r8/seconds" in found["history"]
    assert "accuracy" in found["shown"]
    assert "r8/" not in found["shown"]


def check_resumed(runs: list[dict]) -> None:
    for run in runs:
        assert run["ids"]
        assert run["weights"]
        assert (run["steps"], run["uses"]) == (39, [3])
        assert run["peak"] == pytest.approx(0.02, rel=0.05)
