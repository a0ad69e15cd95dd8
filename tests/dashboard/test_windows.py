"""Windows: what every machine can try (no fcntl, termios and curses), and what a Windows Python shows on its console.

`R8_WINPY` names a Windows Python that is run through wine (`.ci/windows/setup.sh` makes one), or `python` there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# What a Windows Python lacks, taken away after the standard library has set itself up for this system.
FAKE = """
import os, select, signal, subprocess, sys, importlib, pkgutil
import asyncio, multiprocessing, tempfile, logging, numpy, rich
import learnit_r8.checkpoint.storage  # it locks files with msvcrt on Windows, chosen by the platform's name
MISSING = {"fcntl", "termios", "curses", "_curses", "pty", "tty", "pwd", "grp", "resource", "syslog"}
class Windows:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
for name in [name for name in sys.modules if name.partition(".")[0] in MISSING]:
    del sys.modules[name]
sys.meta_path.insert(0, Windows())
sys.builtin_module_names = tuple(n for n in sys.builtin_module_names if n not in MISSING)
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in MISSING else real(name, package)
for module, names in (
    (select, "poll epoll"),
    (signal, "pthread_sigmask SIGHUP SIGTSTP SIGCONT SIGUSR1 SIGUSR2 SIGTTIN SIGTTOU SIGWINCH SIGCHLD SIGALRM SIGKILL"),
    (os, "tcgetpgrp getpgrp killpg ttyname register_at_fork set_blocking O_NONBLOCK O_NOCTTY"),
):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
"""
TRAINING = """
import numpy as np
from learnit_r8 import R8Scheduler
for ui in ("auto", "curses", "rich", "log"):
    with R8Scheduler(64, 16, num_epochs=2, ui=ui, log_dir="run") as scheduler:
        for epoch in scheduler.epoch_iterator():
            for indices, lr in scheduler.batch_iterator():
                scheduler.update_with_loss(np.random.rand(len(indices)))
        with scheduler.terminal():
            print("my own line")
"""


def python(code, folder):
    env = os.environ | {"PYTHONPATH": ROOT}
    for name in ("R8_UI", "CI", "PYTEST_CURRENT_TEST"):
        env.pop(name, None)
    return subprocess.run([sys.executable, "-c", FAKE + code], cwd=folder, env=env, capture_output=True, text=True)


def test_every_module_but_those_of_posix_terminals_loads_without_them(tmp_path):
    code = """
import learnit_r8
failed = []
for module in pkgutil.walk_packages(learnit_r8.__path__, "learnit_r8.", lambda name: None):
    if ".integrations." not in module.name and not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            assert error.name in MISSING, error
            failed.append(module.name.rpartition(".")[2])
print(sorted(failed))
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['curses_screen', 'posix_board', 'rich_live', 'tty', 'windows_board']\n"


def test_a_run_without_them_shows_its_lines_and_its_summary(tmp_path):
    done = python(TRAINING, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("learnit::r8  run  finished") == 4
    assert done.stdout.count("epoch: epoch 2") == 4
    assert done.stdout.count("my own line") == 4
    assert "rich display needs a POSIX terminal" in done.stdout, "a wish that is not met is told"
    assert done.stderr == ""


@pytest.mark.parametrize(
    "command", ["demo --ui log --speed 1000 --epochs 1", "watch run --once --size 80x24", "doctor"]
)
def test_the_commands_work_without_them(command, tmp_path):
    assert python(TRAINING, tmp_path).returncode == 0
    code = f"from learnit_r8.cli import main\nprint('status', main({command.split()!r}))"
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "status 0" in done.stdout


WINPY = os.environ.get("R8_WINPY", "python" if sys.platform == "win32" else "")


@pytest.mark.slow
@pytest.mark.skipif(not WINPY, reason="R8_WINPY names no Windows Python")
def test_a_windows_console_has_the_screen_takes_keys_and_is_given_back(tmp_path):
    result = os.path.join(ROOT, "windows-console.json")
    try:
        if sys.platform == "win32":
            subprocess.run([WINPY, "-m", "tests.windows_driver", result], cwd=ROOT, check=True, timeout=120)
        else:
            from tests.terminal_driver import Terminal

            driver = [WINPY, "-m", "tests.windows_driver", os.path.basename(result)]
            code = f"os.chdir({ROOT!r})\nos.execvp({WINPY!r}, {driver!r})"
            with Terminal(code, tmp_path, size=(120, 35), env={"HOME": os.environ.get("HOME")}) as terminal:
                terminal.until(lambda: os.path.exists(result) and os.path.getsize(result) > 1000, 90)
        with open(result, encoding="utf-8") as file:
            seen = json.load(file)
    finally:
        shutil.rmtree(os.path.join(ROOT, "wine-run"), ignore_errors=True)
        if os.path.exists(result):
            os.unlink(result)
    text = {name: "\n".join(rows) for name, rows in seen.items() if isinstance(rows, list)}
    assert (seen["name"], seen["after q"], seen["fault"], seen["stream is back"]) == ("curses", "log", "", True)
    for line in ("TOTAL", "a print of the program", "a warning of an early handler", "printed by a child"):
        assert line in text["first"]
    assert "close this view" in text["help"]
    assert "moving average of the loss" in text["words"]
    assert "moving average" not in text["closed"]
    assert "TOTAL" in text["zoomed"]
    assert "loss [1]" in text["back"]
    assert "lr [1]" in text["metric"]
    assert "ppau_" not in text["asked"]
    assert "pau_" in text["asked"]
    assert seen["commands"] == ["pause", "stop-now"]
    assert [len(seen["small"]), {len(row) for row in seen["small"]}] == [28, {90}]
    assert "TOTAL" in text["small"]
