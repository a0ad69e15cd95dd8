"""The examples for PyTorch, Hugging Face and several ranks run from start to end, and are short."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.backup_watch import fingerprint

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("pytorch_loop", "huggingface", "ddp", "ray_train")


def run(*command, tries=1, timeout=280):
    path = f"{ROOT}{os.pathsep}{ROOT / 'examples'}"
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}  # its workers starve on a busy machine
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    # gloo of torch 2.13 aborts now and then at a process's exit, in a plain DDP program as well.
    if tries > 1 and done.returncode and "terminate called without an active exception" in done.stderr:
        return run(*command, tries=tries - 1)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_an_example_fits_on_a_page(name):
    lines = (ROOT / "examples" / f"{name}.py").read_text().splitlines()
    assert len(lines) < 80


@pytest.mark.slow
def test_the_pytorch_loop_survives_a_nan_under_prefetching_workers():
    output = run(sys.executable, "examples/pytorch_loop.py", "--workers", "2", "--nan")
    assert "step 176: loss nan, the model was restored" in output
    # Backups are paced by time: on a busy machine the only one may be that of the untrained model.
    assert float(output.split("accuracy ")[1].split()[0]) > 0.7


@pytest.mark.slow
def test_the_hugging_face_trainer_resumes_from_its_checkpoint():
    assert "after 256 steps" in run(sys.executable, "examples/huggingface.py", "--resume")


@pytest.mark.slow
def test_two_ranks_and_one_train_the_same_number_of_steps():
    one = run(sys.executable, "examples/ddp.py")
    two = run(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "examples/ddp.py", tries=4)
    assert "after 264 steps" in one
    assert "after 264 steps" in two


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ray_starts_the_workers_again_and_the_run_ends_as_if_none_had_died(tmp_path):
    pytest.importorskip("ray", reason='Ray is not installed: pip install "ray[train]"')
    import torch

    steps = sorted(np.random.default_rng(0).choice(np.arange(1, 160), 10, replace=False).tolist())
    ends = []
    for name, dies in (("whole", []), ("killed", steps)):
        (tmp_path / name).mkdir()
        command = ("tests/ray_driver.py", ",".join(map(str, dies)), str(tmp_path / name), "--workers", "2")
        output = run(sys.executable, *command, timeout=900)
        assert "'steps': 160" in output
        assert ("is passed over" in output) == bool(dies)
        newest = max((tmp_path / name).glob("storage/r8/checkpoint_2*"))
        ends.append(torch.load(newest / "state.pt", weights_only=True))
    assert len(list((tmp_path / "killed").glob("died-*"))) == 10
    assert [end["r8"]["global_step"] for end in ends] == [160, 160]
    for part in ("model", "optimizer"):
        assert fingerprint(ends[0]["model"][part]) == fingerprint(ends[1]["model"][part])
    assert fingerprint(ends[0]["r8"]["catalog"]) == fingerprint(ends[1]["r8"]["catalog"])  # every sample's losses, once
