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
from pathlib import Path

from learnit_r8.checkpoint.storage import FileSystem
from learnit_r8.errors import CheckpointError

_MUTEX = threading.RLock()  # a signal handler may save during a save


class _Hold:
    """The open lock file of one folder, in one process; who has none of it any more lets go of it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self.locked = False
        weakref.finalize(self, os.close, self.descriptor).atexit = False  # who saves as the program ends needs it


_HELD: weakref.WeakValueDictionary[tuple[int, str], _Hold] = weakref.WeakValueDictionary()


class DirectoryLock:
    """One store's share in its folder's lock; the folder need not exist before `take`."""

    def __init__(self, directory: Path, fs: FileSystem) -> None:
        self._directory = directory
        self._fs = fs
        self._hold: _Hold | None = None

    def take(self) -> bool:
        """Lock the folder for this process; return whether the file system has locks.

        Raises:
            CheckpointError: Another process has the lock.
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
        self._hold = hold or _Hold(path)
        _HELD[key] = self._hold
        return self._hold

    def release(self) -> None:
        """Let other processes have the folder, unless another store of this one still writes there."""
        with _MUTEX:
            self._hold = None
