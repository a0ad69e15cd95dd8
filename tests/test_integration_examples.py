"""The examples for PyTorch, Hugging Face and several ranks run from start to end, and are short."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("pytorch_loop", "huggingface", "ddp", "ray_train")


def run(*command, tries=1):
    path = f"{ROOT}{os.pathsep}{ROOT / 'examples'}"
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["RAY_USAGE_STATS_ENABLED"] = "0"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
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
@pytest.mark.timeout(600)
def test_ray_starts_the_workers_again_and_the_run_ends_as_if_none_had_died(tmp_path):
    pytest.importorskip("ray", reason='Ray is not installed: pip install "ray[train]"')
    import torch

    from learnit_r8.checkpoint import resolve

    ends = []
    for name, step in (("whole", -1), ("killed", 77)):
        run(sys.executable, "tests/ray_driver.py", str(step), "--workers", "2", "--folder", str(tmp_path / name))
        last = resolve(tmp_path / name)
        assert (last.state["global_step"], last.state["config"]["world_size"]) == (160, 2)
        ends.append(torch.load(last.model_path, weights_only=True)["model"])
    assert (tmp_path / "killed-died").exists()
    assert all(torch.equal(ends[0][part], ends[1][part]) for part in ends[0])
