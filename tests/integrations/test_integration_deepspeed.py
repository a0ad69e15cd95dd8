"""R8Scheduler under DeepSpeed, on two processes: its own engine, Accelerate's plugin and the Trainer; ZeRO 1 to 3."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).resolve().parents[2]
DRIVER = ROOT / "tests" / "deepspeed_driver.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", str(DRIVER), str(folder)]
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "R8_UI": "off"},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_engine_is_saved_and_resumed_by_all_ranks_and_goes_back_to_its_checkpoint(ranks, stage):
    for rank in (each[f"plain{stage}"] for each in ranks):
        assert rank["whole"]["rates"]
        assert rank["whole"]["apart"] < 1e-5  # each sample's own losses
        assert rank["resumed"]["weights"] == rank["whole"]["weights"] == ranks[0][f"plain{stage}"]["whole"]["weights"]
        assert rank["resumed"]["losses"] == rank["whole"]["losses"]
        assert rank["faults"]["rolled_back"] == [[34, 30]]  # nobody looks at the model: the second NaN in a row tells
        assert rank["faults"]["losses"][-1] < 0.3


@pytest.mark.slow
def test_no_part_of_deepspeeds_state_is_copied_and_that_is_said_before_the_first_step(ranks):
    for rank in ranks:
        for stage in (1, 2, 3):
            assert rank[f"plain{stage}"]["refused"] == dict.fromkeys(("engine", "both", "net", "inner"), True)
        for stage in (2, 3):
            found = rank[f"accelerate{stage}"]
            assert (found["optimizer"], found["model"]) == (True, True)
            assert "take no backups in RAM" in found["said"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_the_trainer_says_that_it_takes_no_backups_and_resumes_to_the_bit(ranks, stage):
    for rank in ranks:
        whole, resumed = rank[f"trainer{stage}-0"], rank[f"trainer{stage}-10"]
        assert ["DeepSpeed and the first FSDP no backups" in said for said in whole["told"]] == [True]
        assert whole["rates"] == [True] * 24
        assert resumed["rates"] == [True] * 14
        assert resumed["weights"] == whole["weights"] == ranks[0][f"trainer{stage}-0"]["weights"]
        assert resumed["losses"] == whole["losses"]
        assert "DeepSpeed's config has a scheduler" in rank["error"]
