"""Who may write into a directory: one lock a folder and process, held from the first save until it is let go.

Two stores of one process share the lock. POSIX drops a process's lock on a file as soon as the process closes any
descriptor of it, and Windows refuses a second lock even to the process that has the first: one descriptor a folder
suits both.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learnit_r8.checkpoint.storage import FileSystem
from learnit_r8.errors import CheckpointError

_MUTEX = threading.RLock()  # a signal handler may save during a save


@dataclass(slots=True, eq=False)
class _Hold:
    """The open lock file of one folder, in one process."""

    key: tuple[int, str]
    descriptor: int
    users: int = 0
    locked: bool = False


_HELD: dict[tuple[int, str], _Hold] = {}


def _let_go(hold: _Hold) -> None:
    with _MUTEX:
        hold.users -= 1
        if hold.users == 0:
            os.close(hold.descriptor)
            if _HELD.get(hold.key) is hold:
                del _HELD[hold.key]


class DirectoryLock:
    """One store's share in its folder's lock.

    Args:
        directory: The folder; it need not exist before `take`.
        fs: Locks files.
    """

    def __init__(self, directory: Path, fs: FileSystem) -> None:
        self._directory = directory
        self._fs = fs
        self._hold: _Hold | None = None
        self._release: weakref.finalize[..., Any] | None = None  # for stores that nobody closes

    def take(self) -> bool:
        """Lock the folder for this process.

        Returns:
            Whether the file system has locks.

        Raises:
            CheckpointError: Another process has the lock.
            OSError: The folder cannot be written to.
        """
        with _MUTEX:
            hold = self._share()
            # Asked for at every save: a system drops it when anyone of this process opens and closes the file. Windows
            # does not, and refuses what it has given already.
            locked = True if hold.locked and sys.platform == "win32" else self._fs.lock(hold.descriptor)
            hold.locked = locked is True
            os.lseek(hold.descriptor, 0, os.SEEK_SET)
            if locked is False:
                holder = os.read(hold.descriptor, 20).decode(errors="replace").strip()
                self.release()
                raise CheckpointError(
                    f"process {holder or '?'} writes its checkpoints into {self._directory}: "
                    "give each run a checkpoint_dir of its own, or end that process"
                )
            os.ftruncate(hold.descriptor, 0)
            os.lseek(hold.descriptor, 0, os.SEEK_SET)
            os.write(hold.descriptor, f"{os.getpid()}\n".encode())
            return hold.locked

    def _share(self) -> _Hold:
        path = self._directory / ".lock"
        key = os.getpid(), os.path.realpath(self._directory)
        hold = _HELD.get(key)
        if hold is not None and not (path.exists() and os.path.samestat(os.fstat(hold.descriptor), path.stat())):
            hold = None  # the folder was deleted and made anew: its other users notice it when they save
        if hold is None:
            hold = _HELD[key] = _Hold(key, os.open(path, os.O_RDWR | os.O_CREAT, 0o666))
        if self._hold is not hold:
            self.release()
            hold.users += 1
            self._hold, self._release = hold, weakref.finalize(self, _let_go, hold)
        return hold

    def release(self) -> None:
        """Let other processes have the folder, unless another store of this one still writes there."""
        if self._release is not None:
            self._release()
        self._hold = self._release = None
