"""The controlling terminal through a private descriptor that never blocks.

A terminal that was stopped (Ctrl-S) or that nobody reads makes a blocking `write`, `tcdrain` or `tcsetattr(TCSADRAIN)`
wait for ever. So the dashboard opens `/dev/tty` anew with O_NONBLOCK (an own file description: nobody else's descriptor
changes) and draws no new frame before the last one is gone. Nothing here waits without a deadline.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import termios
import time
from typing import Any

from learnit_r8.dashboard.terminal.board import TerminalGone
from learnit_r8.dashboard.terminal.outflow import Outflow

LOOK_SECONDS = 0.5
_AWAKE_LOOKS = 4
"""So often a child that waited for what is typed may be seen awake before it is taken to have got it."""
_MOST_CHILDREN = 16
_READS = (b"0 0x", b"63 0x")
"""Numbers of `read` on x86-64 and arm64, as /proc shows the call that a process waits in."""


class Tty(Outflow):
    """The controlling terminal, its modes as they were found in `saved`; OSError where there is none."""

    def __init__(self) -> None:
        super().__init__(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC))
        self.saved: list[Any] = termios.tcgetattr(self.fd)
        self.modes = _view_modes(self.saved, self.fd)
        self._look_again, self._asked, self._awake = 0.0, False, 0

    def size(self) -> tuple[int, int]:
        """Return columns and rows; 80 x 24 where the terminal does not know."""
        try:
            columns, rows = os.get_terminal_size(self.fd)
        except OSError:
            return 80, 24
        return (columns, rows) if rows and columns else (80, 24)

    def in_foreground(self) -> bool:
        """Return whether this process may draw, as part of the foreground group; `TerminalGone` where all is over."""
        try:
            return os.tcgetpgrp(self.fd) == os.getpgrp()
        except OSError as error:
            raise TerminalGone(str(error)) from error

    def set_modes(self, modes: list[Any]) -> None:
        """Set terminal modes at once, without waiting for output to drain."""
        with contextlib.suppress(termios.error, OSError):
            termios.tcsetattr(self.fd, termios.TCSANOW, modes)

    def taken(self) -> bool:
        """Return whether somebody has set other modes than the view's: an editor, a prompt for a password."""
        with contextlib.suppress(termios.error, OSError):
            now: list[Any] = termios.tcgetattr(self.fd)
            return bool(now[:4] not in (self.modes[:4], self.saved[:4]))
        return False

    def asked(self) -> bool:
        """Return whether a child waits for what is typed, as `read` in a shell script; only Linux tells.

        Children of the main thread are looked at, once in `LOOK_SECONDS`.
        """
        now = time.monotonic()
        if now >= self._look_again:
            self._look_again = now + LOOK_SECONDS
            found = set(map(_reads_terminal, _descendants(os.getpid())))
            # New modes wake a reader: on a busy machine it is seen on its way back into its wait.
            self._awake = self._awake + 1 if self._asked and None in found and True not in found else 0
            self._asked = True in found or 0 < self._awake <= _AWAKE_LOOKS
        return self._asked

    def read(self) -> bytes:
        """Return the bytes typed so far, without waiting."""
        poller = select.poll()
        poller.register(self.fd, select.POLLIN)
        happened = dict(poller.poll(0)).get(self.fd, 0)
        try:
            data = os.read(self.fd, 4096) if happened & select.POLLIN else b""
        except BlockingIOError:
            return b""
        except OSError as error:
            # A background process that blocks SIGTTIN gets EIO too; only a hang-up is final.
            if error.errno == errno.EIO and not happened & select.POLLHUP:
                return b""
            raise TerminalGone(str(error)) from error
        if not data and happened & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
            raise TerminalGone("the terminal hung up")
        return data

    def unstop(self) -> None:
        """Let output flow again after Ctrl-S, so that the screen's last bytes arrive before the process is gone."""
        with contextlib.suppress(termios.error):
            # TCOON alone undoes only a TCOOFF (Linux keeps the two stops apart), so stop first.
            termios.tcflow(self.fd, termios.TCOOFF)
            termios.tcflow(self.fd, termios.TCOON)


def _view_modes(saved: list[Any], fd: int) -> list[Any]:
    """Return the modes for drawing: keys at once, unechoed, Ctrl-C still a signal, Ctrl-Z a key, no output mapping."""
    iflag, oflag, cflag, lflag, ispeed, ospeed, control = saved
    control = list(control)
    control[termios.VMIN], control[termios.VTIME] = b"\x01", b"\x00"
    control[termios.VSUSP] = bytes([os.fpathconf(fd, "PC_VDISABLE") & 0xFF])
    iflag &= ~(termios.ICRNL | termios.INLCR | termios.IGNCR)
    oflag &= ~(termios.ONLCR | termios.OCRNL | termios.TABDLY)
    lflag &= ~(termios.ICANON | termios.ECHO | termios.ECHONL)
    return [iflag, oflag, cflag, lflag, ispeed, ospeed, control]


def _descendants(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            children = _contents(f"/proc/{parent}/task/{parent}/children").split()
            found += map(int, children[: _MOST_CHILDREN + 1 - len(found)])
    return found[1:]


def _contents(path: str) -> bytes:
    # Python's own files cost several times as much, twice a second.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def _reads_terminal(pid: int) -> bool | None:
    """Return whether a process waits in `read` for a terminal; None: it is awake, and may be about to."""
    try:
        call = _contents(f"/proc/{pid}/syscall")
        if call.startswith(b"running"):
            return None
        where = os.readlink(f"/proc/{pid}/fd/{int(call.split()[1], 16)}") if call.startswith(_READS) else ""
    except (OSError, ValueError, IndexError):
        return False
    return where.startswith(("/dev/pts/", "/dev/tty", "/dev/console"))
