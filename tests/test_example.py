"""The program that a newcomer runs first."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(*options):
    command = [sys.executable, "-W", "error", "example.py", "--epochs", "5", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def without_times(output):
    """Leave the lines of the display out, and the figures that a clock decides."""
    lines = [line for line in output.splitlines() if not line.startswith("r8 ")]
    table = "\n".join(lines)
    table = table[table.index("Digits, ") :]
    return re.sub(r"where the time went.*?└", "", table, flags=re.S)


def test_example_survives_its_nan_and_shows_a_result_in_a_pipe():
    output = run()
    assert "\x1b" not in output
    assert "\r" not in output
    assert "the model was restored from its backup in RAM" in output
    assert "1 / 1" in output  # spikes / rollbacks
    accuracy = float(re.search(r"test accuracy\s*│ ([\d.]+)", output).group(1))
    assert accuracy > 0.9
    assert len(re.findall(r"#\d+ label \d", output)) == 5


def test_example_gives_the_same_result_for_the_same_seed():
    assert without_times(run("--ui", "off")) == without_times(run("--ui", "off"))
