"""The program that a newcomer runs first."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(*options):
    command = [sys.executable, "-W", "error", "example.py", "--epochs", "4", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def result(output):
    """Return the final table and the digits, without the figures that a clock decides."""
    lines = [line for line in output.splitlines() if not line.startswith("r8 ")]
    table = "\n".join(lines)
    return re.sub(r"where the time went.*?└", "", table[table.index("Digits, ") :], flags=re.DOTALL)


def test_example_survives_its_nan_and_gives_the_same_result_with_and_without_a_display():
    output = run()
    assert "\x1b" not in output
    assert "\r" not in output
    assert "the model was restored from its backup in RAM" in output
    assert "1 / 1" in output  # spikes / rollbacks
    assert float(re.search(r"test accuracy\s*│ ([\d.]+)", output).group(1)) > 0.9
    assert len(re.findall(r"#\d+ label \d", output)) == 5
    assert result(output) == result(run("--ui", "off"))
