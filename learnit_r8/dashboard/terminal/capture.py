"""The user's own prints while the dashboard has the screen: descriptors 1 and 2 go into a file.

A file, not a pipe or a pty: C code that holds the GIL and prints more than such a buffer takes would wait for a reader
that waits for the GIL. A file also survives SIGKILL. It is opened with O_APPEND, so that subprocesses and both
descriptors never overwrite each other.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from learnit_r8.run.tail import ESCAPES

_OTHER_THAN_COLOUR = re.compile(ESCAPES.pattern.replace("[@-~]|", "[@-ln-~]|"))
REPLAY_BYTES, REPLAY_LINES = 1 << 20, 5000
"""Of what was kept so much is put on the terminal at once; it is about what a terminal remembers."""
_IOLBF = 1  # <stdio.h> of glibc, musl, macOS and the BSDs


class ConsoleFile:
    """A file for prints, one in the temporary folder when None is given, and how much of it the terminal has shown.

    From offset `start` on it is this run's.
    """

    def __init__(self, path: Path | None = None) -> None:
        if path is None:
            fd, name = tempfile.mkstemp(prefix=f"learnit_r8-{os.getpid()}-", suffix=".console.log")
            os.close(fd)
            path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path.absolute()
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        self._file = os.open(path, flags, 0o644)
        self.start = self._told = os.fstat(self._file).st_size
        self._amid_line = False

    def unshown(self, last: bool = False, lines: bool = False) -> bytes:
        """Return what was added since the last call, as text for a terminal: colours stay, other escapes do not.

        An unfinished line is ended where it is the `last`, and held back where `lines` are asked for.
        """
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                first = max(self._told, size - REPLAY_BYTES)
                file.seek(first)
                data = file.read(size - first)
        except OSError:
            return b""
        if lines:
            data = data[: data.rfind(b"\n") + 1]
        skipped, self._told = first - self._told, first + len(data)
        rows = data.split(b"\n")
        if skipped or len(rows) > REPLAY_LINES:
            rows = [f"[r8] earlier lines are in {self.path}".encode(), *rows[1:][-REPLAY_LINES:]]
        text = b"\n".join(map(_last_state, rows))
        self._amid_line = not text.endswith(b"\n") if text else self._amid_line
        return text + b"\n" if last and self._amid_line else text

    def close(self) -> None:
        """Close the file; one that this run added nothing to, and that nobody named, is removed."""
        if self._file >= 0:
            grown = os.fstat(self._file).st_size > self.start
            os.close(self._file)
            self._file = -1
            if not grown and not self.start:
                with contextlib.suppress(OSError):
                    self.path.unlink()


class Capture(ConsoleFile):
    """Sends the descriptors that are terminals into one file until `release`; others are left alone."""

    def __init__(self, path: Path | None = None, descriptors: tuple[int, ...] = (1, 2)) -> None:
        super().__init__(path)
        self._descriptors = descriptors
        self._saved: dict[int, int] = {}
        self.engage()

    def engage(self) -> None:
        flush_streams()
        for fd in self._descriptors:
            if fd not in self._saved and _isatty(fd):
                self._saved[fd] = _duplicate(fd)
                os.dup2(self._file, fd)
        if self._saved:
            _line_buffer_c_stdout()

    def release(self) -> None:
        """Give the descriptors back; nothing that was printed so far can land elsewhere."""
        if not self._saved:
            return
        flush_streams()
        for fd, saved in list(self._saved.items()):
            os.dup2(saved, fd)
            os.close(saved)
            del self._saved[fd]

    def close(self) -> None:
        self.release()
        super().close()


def _last_state(line: bytes) -> bytes:
    r"""Return a line as `fold` does, its colours kept."""
    shown = line.rstrip(b"\r").rsplit(b"\r", 1)[-1].decode("utf-8", "replace")
    text = _OTHER_THAN_COLOUR.sub("", shown)
    return "".join(char for char in text if char >= " " or char in "\t\x1b").encode("utf-8", "replace")


def flush_streams() -> None:
    """Flush what Python and C still hold for descriptors 1 and 2."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    with contextlib.suppress(Exception):
        library = ctypes.CDLL(None)
        for name in ("stdout", "stderr"):
            library.fflush(c_stream(library, name))


def _line_buffer_c_stdout() -> None:
    # C decides on full buffering when it first meets a file; a killed process would then lose up to 4 KiB of printf.
    with contextlib.suppress(Exception):
        library = ctypes.CDLL(None)
        library.setvbuf(c_stream(library, "stdout"), None, _IOLBF, ctypes.c_size_t(0))


def c_stream(library: Any, name: str) -> ctypes.c_void_p:
    """Return the C library's variable for "stdout" or "stderr"."""
    try:
        return ctypes.c_void_p.in_dll(library, name)
    except ValueError:
        return ctypes.c_void_p.in_dll(library, f"__{name}p")  # macOS


def _isatty(fd: int) -> bool:
    try:
        return os.isatty(fd)
    except OSError:
        return False


def _duplicate(fd: int) -> int:
    import fcntl

    # Above the low numbers, so that code which closes "the first few" does not lose the terminal.
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 20)
