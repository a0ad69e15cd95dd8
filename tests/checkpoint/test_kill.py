"""Kill -9 at random moments, resumed each time, ends as the uninterrupted run does, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def kill(count, seed):
    """In a process of its own: it forks, which a test process with threads must not."""
    command = [sys.executable, "-m", "benchmarks.fault_kills", "--kills", str(count), "--seed", str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{count} kills, {count} resumed to the bit" in done.stdout


def test_a_sample_of_kills():
    kill(6, 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_hundred_kills():
    kill(200, 0)
