"""A real pseudo-terminal with an emulated screen: spawn a script, feed keys, resize, read cells."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from typing import ClassVar

import pyte

# A test ends `train` and `wait_for_stop` by creating the stop file.
PRELUDE = """
import ctypes, os, signal, subprocess, sys, threading, time
from learnit_r8.dashboard import open_dashboard
from learnit_r8.dashboard.demo import DemoRun
from learnit_r8.types import Command

def train(dashboard, seconds=30.0, pause=0.001, **kw):
    began = time.time()
    for _, event in DemoRun(start=began, **kw):
        if dashboard is not None:
            dashboard.record(event)
            if Command.STOP_AFTER_STEP in dashboard.commands:
                return
        if os.path.exists(os.environ["STOP_FILE"]) or time.time() - began > seconds:
            return
        time.sleep(pause)

def wait_for_stop(seconds=30.0):
    began = time.time()
    while not os.path.exists(os.environ["STOP_FILE"]) and time.time() - began < seconds:
        time.sleep(0.005)
"""
LEFT_ALTERNATE = b"\x1b[?1049l"

# A shell in miniature: runs its argument as a foreground job, answers a stop with `fg` after a look at the modes.
JOB_CONTROL = """
import os, signal, subprocess, sys, termios, time
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
job = subprocess.Popen([sys.executable, "-c", sys.argv[1]], process_group=0)
os.tcsetpgrp(0, job.pid)
for _ in range(2):
    pid, status = os.waitpid(job.pid, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        break
    os.tcsetpgrp(0, os.getpgrp())
    subprocess.run(["stty", "-a"], stdout=open("stopped", "w"))
    while not os.path.exists("fg"):
        time.sleep(0.01)
    os.tcsetpgrp(0, job.pid)
    os.killpg(job.pid, signal.SIGCONT)
os.tcsetpgrp(0, os.getpgrp())
sys.exit(os.waitstatus_to_exitcode(status))
"""


class Screen(pyte.Screen):
    """pyte lacks SU and SD, which ncurses sends (within margins) when rows move as a whole."""

    def scroll_up(self, count=1):
        y, self.cursor.y = self.cursor.y, self.margins.bottom if self.margins else self.lines - 1
        for _ in range(count or 1):
            self.index()
        self.cursor.y = y

    def scroll_down(self, count=1):
        y, self.cursor.y = self.cursor.y, self.margins.top if self.margins else 0
        for _ in range(count or 1):
            self.reverse_index()
        self.cursor.y = y


class Stream(pyte.ByteStream):
    csi: ClassVar = {**pyte.ByteStream.csi, "S": "scroll_up", "T": "scroll_down"}
    events = pyte.ByteStream.events | {"scroll_up", "scroll_down"}


class Terminal:
    """Runs Python code on a pty of its own, as the leader of a new session.

    Args:
        code: Runs after `PRELUDE`.
        folder: For the stop file; the working directory of the script.
        size: Columns and rows.
        env: Added to a small, fixed environment; a value of None removes a variable.
    """

    def __init__(self, code, folder, size=(100, 30), env=None, argv=None, drain=True):
        self.folder = folder
        self.stop_file = folder / "stop"
        self.screen = Screen(*size)
        self.stream = Stream(self.screen)
        self.raw = b""
        self.drain = drain
        self.master, self.slave = os.openpty()
        self.resize(*size)
        self.before = self.stty()
        variables = {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "TERM": "xterm-256color",
            "PYTHONPATH": os.getcwd(),
            "STOP_FILE": str(self.stop_file),
            **(env or {}),
        }
        self.process = subprocess.Popen(
            argv or [sys.executable, "-c", PRELUDE + code],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            cwd=folder,
            env={name: value for name, value in variables.items() if value is not None},
            start_new_session=True,
            preexec_fn=_take_terminal,
        )

    @property
    def pid(self):
        return self.process.pid

    def stty(self):
        """Everything that `stty -a` says, the window's size aside, which tests change themselves."""
        text = subprocess.run(["stty", "-a"], stdin=self.slave, capture_output=True, text=True, check=True).stdout
        return text.split(";", 3)[0] + text.split(";", 3)[3]

    def resize(self, columns, rows):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
        self.screen.resize(rows, columns)

    def send(self, keys):
        os.write(self.master, keys.encode() if isinstance(keys, str) else keys)

    def pump(self, seconds=0.05):
        """Let the emulator read for a moment."""
        if not self.drain:
            time.sleep(seconds)
            return
        if select.select([self.master], [], [], seconds)[0]:
            try:
                data = os.read(self.master, 1 << 16)
            except OSError:
                return
            self.raw += data
            self.stream.feed(data)

    def text(self):
        return "\n".join(self.screen.display)

    def until(self, condition, seconds=20.0):
        """Pump until the condition holds; a string must appear on the screen."""
        check = (lambda: condition in self.text()) if isinstance(condition, str) else condition
        deadline = time.monotonic() + seconds
        while not check():
            assert time.monotonic() < deadline, (
                f"waited in vain for {condition!r}; shown:\n{self.text()}\nraw tail:\n{self.raw[-2000:]!r}"
            )
            self.pump()

    def stop(self):
        self.stop_file.touch()

    def wait(self, seconds=20.0):
        """Wait for the end and return the exit status: minus the signal's number for a killed process."""
        self.until(lambda: self.process.poll() is not None, seconds)
        while select.select([self.master], [], [], 0.05)[0] and self.drain:
            before = len(self.raw)
            self.pump()
            if len(self.raw) == before:
                break
        return self.process.returncode

    def vanish(self):
        """Hang up, as a closed window does."""
        os.close(self.master)
        os.close(self.slave)
        self.master = self.slave = -1

    def close(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
        self.process.wait()
        for fd in {self.slave, self.master} - {-1}:
            os.close(fd)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


def _take_terminal():
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and children inherit that
