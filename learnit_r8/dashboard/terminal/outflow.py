"""Bytes to a descriptor without ever waiting for its reader."""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
import time
from collections import deque
from typing import Any

from learnit_r8.dashboard.terminal.board import POSIX, Board, TerminalGone

_SHARED_PIECE = 512
"""Bytes in one write: a pipe that polls writable takes PIPE_BUF of them at once, and POSIX has that at 512 or more."""


class Outflow:
    """Keeps what the reader would not take for the next call; once `muted`, drops all.

    A `shared` descriptor stays as it is, and blocks; any other is this object's own, and does not.
    """

    def __init__(self, fd: int, shared: bool = False) -> None:
        self.fd, self._shared = fd, shared
        self.muted = False
        self._pending = bytearray()

    @property
    def congested(self) -> bool:
        return bool(self._pending)

    def send(self, data: bytes, seconds: float = 0.0) -> None:
        """Write `data` after what is waiting; what is not taken within `seconds` waits for the next call.

        Raises:
            TerminalGone: The reader is gone.
        """
        if self.muted:
            return
        self._pending += data
        deadline = time.monotonic() + seconds
        while self._pending:
            try:
                del self._pending[: self._write()]
            except BlockingIOError:
                left = deadline - time.monotonic()
                if left <= 0:
                    return
                # A stopped pty reports no room, but one with a few bytes of room wakes a poll at once: hence the nap.
                time.sleep(min(left, 0.01))
            except OSError as error:
                self._pending.clear()
                raise TerminalGone(str(error)) from error

    def _write(self) -> int:
        if not self._shared:
            return os.write(self.fd, self._pending[:65536])
        poller = select.poll()
        poller.register(self.fd, select.POLLOUT)
        if not poller.poll(0):
            raise BlockingIOError
        return os.write(self.fd, self._pending[:_SHARED_PIECE])

    def discard(self) -> None:
        self._pending.clear()

    def close(self) -> None:
        self.muted = True
        self._pending.clear()
        if not self._shared:
            with contextlib.suppress(OSError):
                os.close(self.fd)
        self.fd = -1


class Outlet(Board):
    """Lines to a stream, `sys.stdout` when None.

    A file is written through its descriptor, past Python's buffer: a thread that waits inside that buffer holds a
    lock which the interpreter needs at exit. Other streams (`StringIO`, a notebook's, whose descriptor leads to the
    server's terminal, and all on Windows, which has no way to ask for room) are written as they are.
    """

    def __init__(self, stream: Any = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._flow: Outflow | None = None
        self._waiting: deque[str] = deque(maxlen=256)
        with contextlib.suppress(AttributeError, OSError, ValueError):
            if POSIX and isinstance(self._stream, io.TextIOWrapper):
                fd = self._stream.fileno()
                self._flow = Outflow(fd, shared=True)
                if os.isatty(fd):
                    # A terminal may have room for less than one line: only a non-blocking descriptor is safe.
                    flags = os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC
                    self._flow = Outflow(os.open(os.ttyname(fd), flags))

    def line(self, text: str) -> None:
        """Queue one line; the oldest of 256 waiting ones is dropped."""
        self._waiting.append(f"{text}\n")

    def pump(self, seconds: float = 0.0) -> None:
        """Write queued lines until there is no room for `seconds`.

        Raises:
            TerminalGone: The reader is gone.
        """
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        while self._waiting or (self._flow is not None and self._flow.congested):
            late = self._flow is not None and self._flow.congested
            data = b"" if late else self._waiting.popleft().encode(encoding, "replace")
            if self._flow is not None:
                self._flow.send(data, seconds)
                if self._flow.congested:
                    return
                continue
            try:
                self._stream.write(data.decode(encoding))
                getattr(self._stream, "flush", str)()  # it may be anything that has a `write`
            except (OSError, ValueError) as error:
                self._waiting.clear()
                raise TerminalGone(str(error)) from error

    def release(self) -> None:
        if self._flow is not None:
            self._flow.close()

    abandon = release
