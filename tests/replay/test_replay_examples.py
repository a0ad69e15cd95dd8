"""The replay and fine-tuning examples run from start to end."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(name, folder, *arguments):
    command = [sys.executable, str(ROOT / "examples" / name), "--quick", *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "HF_HUB_OFFLINE": "1", "HOME": str(folder)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_cartpole_compares_both_kinds_of_replay_and_draws_the_curve(tmp_path):
    output = run("dqn_cartpole.py", tmp_path, "--picture", "curve.png")
    assert re.search(r"seed 0 uniform +\w+ steps\nseed 0 prioritized +\w+ steps", output)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_digits_are_forgotten_without_replay_and_kept_with_it(tmp_path):
    output = run("continual_digits.py", tmp_path)
    forgetting = dict(re.findall(r"^(\w[\w ]*?) +forgetting ([\d.]+)", output, flags=re.MULTILINE))
    assert set(forgetting) == {"none", "uniform", "spaced alone", "hybrid"}
    assert float(forgetting["none"]) > 0.8
    assert float(forgetting["hybrid"]) < float(forgetting["none"]) - 0.2


@pytest.mark.slow
def test_fine_tuning_reports_a_finite_perplexity_for_every_method(tmp_path):
    output = run("iw_sft.py", tmp_path)
    values = [float(value) for value in re.findall(r" ([\d.]+) \([\d.]+ to", output)]
    assert len(values) == 6
    assert all(1.0 < value < 128.0 and math.isfinite(value) for value in values)


@pytest.mark.slow
def test_policy_optimisation_takes_its_prompts_from_every_curriculum(tmp_path):
    output = run("grpo_bandit.py", tmp_path)
    assert len(re.findall(r" 0\.\d{3} \(0\.\d{3} to 0\.\d{3}\) ", output)) == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pomdp_grid.py", "grpo_replay.py"])
def test_replay_of_successes_is_compared_with_none_and_a_reservoir(tmp_path, name):
    output = run(name, tmp_path)
    assert re.findall(r"^(none|reservoir|hybrid) .*0\.\d{3}", output, flags=re.MULTILINE) == [
        "none",
        "reservoir",
        "hybrid",
    ]


@pytest.mark.slow
def test_a_transformer_learns_to_add_on_sums_of_either_choice(tmp_path):
    output = run("grpo_addition.py", tmp_path)
    assert re.findall(r"^(uniform|prompts) +0\.\d{3} -> 0\.\d{3}", output, flags=re.MULTILINE) == ["uniform", "prompts"]
    assert "uniform's end: " in output
