"""R8Scheduler under Accelerate: saved and loaded with its own functions, on one process and on two."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import accelerate_driver as driver
from tests.backup_watch import check_survival, random_steps

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_run_that_accelerate_saved_and_loaded_equals_the_uninterrupted_one(tmp_path):
    found = driver.resumed(tmp_path)
    assert found["same_ids"]
    assert found["same_weights"]
    assert found["steps"] == 36
    assert found["losses_apart"] < 1e-5  # each sample's own losses, not those of a micro-batch's neighbours
    saved = torch.load(tmp_path / "custom_checkpoint_0.pkl", weights_only=True)
    assert saved["global_step"] == 18


def test_nan_at_random_steps_ends_finite_and_rollbacks_bring_back_the_backup(tmp_path):
    check_survival(driver.accelerated(tmp_path, faults=random_steps(0), num_epochs=17), accumulation=2)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("plugin", [[], ["fsdp"]], ids=["ddp", "fsdp2"])
def test_two_processes_agree_in_the_trainer_and_under_accelerate_whichever_rank_meets_nan(tmp_path, plugin):
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", driver.__file__, str(tmp_path), *plugin]
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for name, found in ranks[0].items():
        assert found["weights"] == ranks[1][name]["weights"]
    for rank in ranks:
        assert rank["resumed"]["same_ids"]
        assert rank["resumed"]["same_weights"]
        assert rank["resumed"]["losses_apart"] < 1e-5
        check_survival(rank["faults"], accumulation=2)
        check_survival(rank["trainer"])
        assert rank["whole"]["kind"] == ("DTensor" if plugin else "Parameter")
        assert rank["second"]["steps"] == rank["whole"]["steps"] == 36
        for name in ("weights", "losses"):
            assert rank["second"][name] == rank["whole"][name]
        if plugin:
            assert (rank["hidden"]["rollbacks"], rank["hidden"]["finite"], rank["hidden"]["equal"]) == (1, True, True)
    slices = zip(*(rank["resumed"]["seen"] for rank in ranks), strict=True)
    batches = [list(itertools.chain(*parts)) for parts in slices]
    epochs = [sorted(itertools.chain(*batches[start : start + 12])) for start in range(0, 36, 12)]
    assert epochs == [list(range(driver.SAMPLES))] * 3
