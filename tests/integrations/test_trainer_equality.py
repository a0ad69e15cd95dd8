"""R8Mixin trains as the plain class does, whatever the loss: same losses, rates and weights on the same batches."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("trl")

from tests.trainer_cases import CASES, QUICK

ALONE = ("classes", "llama", "dpo", "weights in forward", "R-Drop")
TRAININGS = [
    pytest.param(name, accumulation, marks=() if name in quick else pytest.mark.slow)
    for accumulation, quick in ((1, ALONE), (4, QUICK))
    for name in CASES
]


def check(name: str, found: dict) -> None:
    assert "error" not in found, (name, found)
    assert found["steps"] >= 8, name
    assert max(found["weights"], found["losses"]) <= 1e-6, (name, found)
    assert found["moved"] > found["weights"], name
    assert (found["rates"], found["epochs"]) == (True, True), (name, found)
    assert found["per_sample"] == CASES[name].per_sample, name
    assert len(found["said"]) == (0 if CASES[name].per_sample else 1), (name, found["said"])


@pytest.mark.parametrize(("name", "accumulation"), TRAININGS)
def test_training_is_the_hosts(tmp_path, name, accumulation):
    from tests.trainer_equality import compare

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(name, compare(CASES[name], accumulation, tmp_path))


def on_two_processes(accumulation: int, names: list[str]) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.trainer_equality"]
    run = subprocess.run(
        [sys.executable, *command, str(accumulation), *names], capture_output=True, text=True, timeout=300, check=False
    )
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"name"')]
    assert [one["name"] for one in found] == names, run.stderr[-3000:]
    for one in found:
        assert one["ranks"] == 2
        check(one["name"], one)


def test_training_is_the_hosts_on_two_processes():
    on_two_processes(4, ["llama", "weights in forward", "dpo"])


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 4])
def test_every_third_training_is_the_hosts_on_two_processes(accumulation):
    """All of them: `torchrun --nproc-per-node 2 -m tests.trainer_equality 1 NAME...`."""
    on_two_processes(accumulation, list(CASES)[accumulation // 4 :: 3])
