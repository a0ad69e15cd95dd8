"""`r8 doctor` tells what is there, what would be shown and why, and whether a run works."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from learnit_r8.core.clock import Clock
from learnit_r8.report import doctor
from learnit_r8.scheduler import R8Scheduler
from tests.terminal_driver import Terminal

COMMAND = [sys.executable, "-W", "error", "-m", "learnit_r8", "doctor"]


def findings(part):
    return {finding.name: finding for finding in part}


def test_in_a_pipe_all_is_well_and_the_choice_says_why_it_is_not_curses(tmp_path):
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.getcwd(), "TERM": "xterm"}
    done = subprocess.run(COMMAND, capture_output=True, text=True, cwd=tmp_path, timeout=60, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert 'shows "log", because standard output is not a terminal' in done.stdout
    for words in ("learnit_r8 ", "numpy ", "was rolled back", "saved and read back", "All is well."):
        assert words in done.stdout, words
    assert list(tmp_path.iterdir()) == []


def test_on_a_terminal_it_names_the_screen_and_its_size(tmp_path):
    with Terminal("", tmp_path, (100, 40), argv=COMMAND) as terminal:
        assert terminal.wait(60) == 0
        assert 'ui="auto" shows "curses"' in terminal.text()
        assert "100x40, room for charts" in terminal.text()


@pytest.mark.parametrize(
    ("environment", "chosen"), [({"R8_UI": "rich"}, "log"), ({"R8_UI": "off"}, "off"), ({"CI": "true"}, "log")]
)
def test_the_environment_is_taken_into_account(environment, chosen):
    shown = findings(doctor._terminal(environment))["dashboard"]
    assert f'shows "{chosen}"' in shown.text


def test_a_folder_that_cannot_be_written_is_marked_and_the_way_out_named(tmp_path):
    bad = findings(doctor._places(tmp_path / "missing"))["runs and checkpoints"]
    assert bad.good is False
    assert "give R8Scheduler another checkpoint_dir" in bad.text


def test_the_run_of_one_second_trains_rolls_back_saves_and_logs():
    found = findings(doctor._run(Clock()))
    assert {name: finding.good for name, finding in found.items()} == {
        "training": True,
        "rollback": True,
        "checkpoint": True,
        "event log": True,
        "cost": None,
    }


def test_a_run_that_fails_is_a_finding_with_its_error(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("the library is broken")

    monkeypatch.setattr(R8Scheduler, "update_with_loss", broken)
    found = findings(doctor._run(Clock()))
    assert found["failed"].good is False
    assert "the library is broken" in found["failed"].text
