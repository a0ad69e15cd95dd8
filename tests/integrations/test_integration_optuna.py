"""A search by Optuna: it prunes, and 200 trials leave nothing behind."""

from __future__ import annotations

import gc
import os
import runpy
import signal
import sys
import threading
from pathlib import Path

import pytest

from learnit_r8 import scheduler as module

optuna = pytest.importorskip("optuna")
psutil = pytest.importorskip("psutil")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "optuna_digits.py"


def left_behind():
    """Return what a process may gather run by run, and how much memory it has."""
    gc.collect()
    process = psutil.Process()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    hooks = [sys.excepthook, threading.excepthook, sys.unraisablehook, sys.displayhook, sys.stdout, sys.stderr]
    runs = [one for one in gc.get_objects() if isinstance(one, module.R8Scheduler)]
    files = sorted(file.path for file in process.open_files())
    listed = threading.active_count(), process.num_fds(), files, handlers, hooks, sorted(os.listdir())
    return (*listed, len(runs), len(module._running)), process.memory_info().rss


def test_a_search_prunes_what_is_hopeless(capsys):
    study = runpy.run_path(str(EXAMPLE))["main"](["--trials", "12"])
    states = [trial.state for trial in study.trials]
    assert len(states) == 12
    assert optuna.trial.TrialState.PRUNED in states
    assert set(states) <= {optuna.trial.TrialState.PRUNED, optuna.trial.TrialState.COMPLETE}
    assert study.best_trial.user_attrs["accuracy"] > 0.85
    assert "pruned; test accuracy" in capsys.readouterr().out


@pytest.mark.slow
def test_two_hundred_trials_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    search = runpy.run_path(str(EXAMPLE))["search"]
    search(30)
    before, memory = left_behind()
    study = search(200, seed=1)
    assert len(study.trials) == 200
    del study
    after, memory_after = left_behind()
    assert after == before
    assert memory_after - memory < 8e6  # bytes; a run's parts are 0.3 MB, so 200 of them would be 60
