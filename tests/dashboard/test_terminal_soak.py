"""The long trials of the screen: every size, a storm of keys, a real multiplexer, an unchanged step rate."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.terminal_driver import PRELUDE, Terminal

pytestmark = pytest.mark.slow
FOREVER = "d = open_dashboard('curses', log_dir='run')\nwhile not os.path.exists(os.environ['STOP_FILE']): train(d)\n"
CHECKED = FOREVER + "assert d.name == 'curses' and not d.fault, d.fault\nd.close()\n"


def test_every_size_from_1x1_to_300x100_is_drawn(tmp_path):
    with Terminal(CHECKED, tmp_path) as terminal:
        terminal.until("loss")
        for columns in (1, 2, 3, 10, 20, 40, 59, 60, 61, 79, 80, 99, 100, 119, 120, 200, 300):
            for rows in (1, 2, 3, 4, 15, 16, 24, 35, 60, 100):
                terminal.resize(columns, rows)
                seen = len(terminal.raw)
                terminal.until(lambda: len(terminal.raw) > seen)  # noqa: B023 - run before the next turn
        terminal.resize(120, 35)
        terminal.until("EPOCH")
        terminal.stop()
        assert terminal.wait() == 0
        assert terminal.stty() == terminal.before


def test_random_keys_and_sizes_never_cost_the_screen(tmp_path):
    rng = np.random.default_rng(1)
    keys = [
        *"scp123456yzx+-/gf?=",
        "\t",
        "\r",
        "\x1b",
        "\x1b[A",
        "\x1b[B",
        "\x1b[C",
        "\x1b[D",
        "\x1b[5~",
        "\x1b[6~",
        "\x0c",
    ]
    with Terminal(CHECKED, tmp_path) as terminal:
        terminal.until("loss")
        for _ in range(1500):
            terminal.send(str(rng.choice(keys)))
            if rng.random() < 0.2:
                terminal.resize(int(rng.integers(1, 200)), int(rng.integers(1, 70)))
            terminal.pump(0.01)
        terminal.stop()
        assert terminal.wait() == 0


STEPS = """
import hashlib, json
block = bytes(1 << 17)
d = open_dashboard('curses', log_dir='run')
open('ready', 'w')
for turn in range(6):
    while not os.path.exists(f'turn{turn}'):
        time.sleep(0.01)
    began = time.perf_counter()
    for _, (_, event) in zip(range(4000), DemoRun(start=time.time())):
        hashlib.sha256(block).digest()
        d.record(event)
    with open(f'part{turn}', 'w') as file:
        json.dump(time.perf_counter() - began, file)
    os.rename(f'part{turn}', f'time{turn}')
d.close()
"""


def test_a_stopped_terminal_does_not_change_the_step_rate(tmp_path):
    times = {True: [], False: []}
    with Terminal(STEPS, tmp_path) as terminal:
        terminal.until(lambda: (tmp_path / "ready").exists())
        for turn in range(6):
            stopped = turn % 2 == 1
            terminal.send("\x13" if stopped else "\x11")
            (tmp_path / f"turn{turn}").touch()
            done = tmp_path / f"time{turn}"
            terminal.until(done.exists, 120)
            times[stopped].append(json.loads(done.read_text()))
        assert terminal.wait() == 0
    assert statistics.median(times[True]) < 1.5 * statistics.median(times[False])


def test_a_window_that_is_closed_leaves_training_alone(tmp_path):
    code = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + (
        "d = open_dashboard('curses', log_dir='run')\nopen('ready', 'w')\ntrain(d)\n"
        "print('still here', flush=True)\nd.close()\nopen('closed', 'w').write(d.name)\n"
    )
    terminal = Terminal(code, tmp_path)
    try:
        terminal.until("loss")
        terminal.vanish()
        time.sleep(1)
        assert terminal.process.poll() is None
        terminal.stop()
        assert terminal.process.wait(20) == 0
        assert (tmp_path / "closed").read_text() == "off"
        assert "still here" in (tmp_path / "run" / "console.log").read_text()
    finally:
        terminal.close()


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
@pytest.mark.parametrize("size", [(120, 35), (80, 24)])
def test_tmux_shows_the_same_screen_and_gets_its_shell_back(size, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        PRELUDE + "d = open_dashboard()\nprint('a 宽 line of mine')\ntrain(d)\nd.close()\nprint('after', d.name)\n"
    )
    server = ["tmux", "-S", str(tmp_path / "socket"), "-f", "/dev/null"]

    def tmux(*words):
        return subprocess.run([*server, *words], capture_output=True, text=True, check=True).stdout

    def until(condition):
        deadline = time.monotonic() + 20
        while not condition(tmux("capture-pane", "-p")):
            assert time.monotonic() < deadline, tmux("capture-pane", "-p")
            time.sleep(0.05)

    env = {**os.environ, "STOP_FILE": str(tmp_path / "stop"), "PYTHONPATH": os.getcwd(), "LANG": "C.UTF-8", "CI": ""}
    env.pop("PYTEST_CURRENT_TEST", None)
    columns, rows = (str(number) for number in size)
    subprocess.run([*server, "new-session", "-d", "-x", columns, "-y", rows, "sh"], env=env, check=True, timeout=20)
    try:
        tmux("send-keys", f"PS1='ready> '; clear; {sys.executable} {script}", "Enter")
        until(lambda text: "TOTAL" in text and text.count("│") > 10 and (size[1] < 35 or "line of mine" in text))
        picture = tmux("capture-pane", "-p").splitlines()
        assert len(picture[0]) == size[0]
        if size == (120, 35):
            line = next(line for line in picture if "a 宽 line of mine" in line)
            assert len(line) == size[0] - 1, "a wide character takes two cells, and the frame stays straight"
            assert line[-1] == "│"
        assert picture[0][0] == "┌"
        assert picture[0][-1] == "┐"
        assert picture[size[1] - 1][-1] == "┘", "the last cell of the screen is drawn"
        tmux("send-keys", "C-z")
        until(lambda text: "ready>" in text and "TOTAL" not in text)
        tmux("send-keys", "fg", "Enter")
        until(lambda text: "TOTAL" in text)
        tmux("send-keys", "C-c")
        until(lambda text: "KeyboardInterrupt" in text and text.rstrip().endswith("ready>"))
    finally:
        subprocess.run([*server, "kill-server"], check=False)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_fifty_deaths_leave_fifty_sane_terminals(number, tmp_path):
    for turn in range(50):
        folder = tmp_path / str(turn)
        folder.mkdir()
        with Terminal("d = open_dashboard('curses')\nopen('ready', 'w')\ntrain(d)", folder) as terminal:
            terminal.until((folder / "ready").exists)
            time.sleep(0.004 * turn)
            terminal.process.send_signal(number)
            assert terminal.wait() == -number
            terminal.until(lambda: terminal.stty() == terminal.before)
