"""The directory that checkpoints lie in: who may write there, what is there, what it is called."""

from __future__ import annotations

import os
import re
import secrets
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learnit_r8.checkpoint.manifest import Manifest, read_manifest
from learnit_r8.checkpoint.storage import FileSystem, remove_tree, write_all
from learnit_r8.errors import CheckpointError

NAME = re.compile(r"step-(\d{9,})(\.\d+)?(-\w+)?", re.ASCII)
_TEMPORARY = re.compile(r"\.tmp-\d+-[0-9a-f]{8}", re.ASCII)
_STALE_SECONDS = 24 * 3600
"""Where there are no locks, temporary files as old as this are nobody's."""
_ACTIVE: set[Path] = set()
"""Temporary directories of this process that are in use: a signal handler may save during a save."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A checkpoint in a directory, unverified; `manifest` is None where that cannot be read."""

    path: Path
    manifest: Manifest | None


class CheckpointDirectory:
    """One directory of checkpoints.

    Args:
        path: It need not exist before `open` is called.
        fs: The operations used.
    """

    def __init__(self, path: Path, fs: FileSystem) -> None:
        self.path = path
        self._fs = fs
        self._lock: tuple[int, weakref.finalize[..., Any]] | None = None

    def entries(self) -> list[Entry]:
        """Return what is in the directory, saved last first; those without a readable manifest come first of all."""
        if not self.path.is_dir():
            return []
        entries = []
        for name in self._fs.names(self.path):
            path = self.path / name
            if NAME.fullmatch(name) and path.is_dir():
                manifest = None
                with suppress(CheckpointError, OSError):
                    manifest = read_manifest(self._fs, path)
                entries.append(Entry(path, manifest))
        return sorted(entries, key=lambda e: e.manifest.serial if e.manifest else float("inf"), reverse=True)

    def open(self) -> bool:
        """Create the directory if need be and lock it for this process, until this object goes.

        Returns:
            Whether the file system has locks.

        Raises:
            CheckpointError: Another process has the lock.
            OSError: The directory cannot be made or written to.
        """
        missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
        for path in reversed(missing):
            with suppress(FileExistsError):
                self._fs.make_directory(path)
            self._fs.sync_directory(path.parent)
        path = self.path / ".lock"
        if self._lock is None or not path.exists() or not os.path.samestat(os.fstat(self._lock[0]), path.stat()):
            if self._lock is not None:
                self._lock[1]()
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            self._lock = descriptor, weakref.finalize(self, os.close, descriptor)
        descriptor = self._lock[0]
        # Asked for at every save: the system drops it when another store of this process closes the file.
        locked = self._fs.lock(descriptor)
        if locked is False:
            os.lseek(descriptor, 0, os.SEEK_SET)
            holder = os.read(descriptor, 20).decode(errors="replace").strip()
            raise CheckpointError(
                f"process {holder or '?'} writes its checkpoints into {self.path}: "
                "give each run a checkpoint_dir of its own, or end that process"
            )
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        return locked is True

    def next_serial(self) -> int:
        """Return a number above that of every checkpoint here, even of one that cannot be read at the moment."""
        serials = [entry.manifest.serial for entry in self.entries() if entry.manifest]
        unread = sum(name.startswith("step-") for name in self._fs.names(self.path)) - len(serials)
        return 1 + unread + max(serials, default=0)

    def _remove_leftovers(self, now: float, exclusive: bool) -> None:
        """Remove what killed processes left behind: with a lock, nobody else can be writing here."""
        for name in self._fs.names(self.path):
            path = self.path / name
            if path in _ACTIVE or not _TEMPORARY.fullmatch(name):
                continue
            with suppress(OSError):
                if exclusive or now - path.lstat().st_mtime > _STALE_SECONDS:
                    remove_tree(self._fs, path)

    @contextmanager
    def temporary(self, *, exclusive: bool) -> Iterator[Path]:
        """Make a directory for a new checkpoint, and remove it unless it was renamed.

        What killed processes left behind is removed first.
        """
        path = self.temporary_path()
        _ACTIVE.add(path)
        try:
            self._fs.make_directory(path)
            # The file system's own clock, which need not be this machine's.
            self._remove_leftovers(path.stat().st_mtime, exclusive)
            yield path
        except BaseException:
            with suppress(OSError):
                remove_tree(self._fs, path)
            raise
        finally:
            _ACTIVE.discard(path)

    def discard(self, path: Path) -> None:
        """Remove a checkpoint."""
        # Renamed first: killed halfway, it is litter and not a damaged checkpoint.
        temporary = self.temporary_path()
        self._fs.rename(path, temporary)
        remove_tree(self._fs, temporary)

    def temporary_path(self) -> Path:
        """Return a name that no checkpoint has."""
        return self.path / f".tmp-{os.getpid()}-{secrets.token_hex(4)}"

    def free_name(self, step: int, tag: str) -> Path:
        """Return a path that is not taken yet."""
        taken = set(self._fs.names(self.path))
        number, suffix = 1, f"-{tag}" if tag else ""
        name = f"step-{step:09d}{suffix}"
        while name in taken:
            number += 1
            name = f"step-{step:09d}.{number}{suffix}"
        return self.path / name

    def point_latest(self, path: Path) -> None:
        """Let the file `latest` name a checkpoint."""
        temporary = self.temporary_path()
        try:
            with self._fs.create(temporary) as file:
                write_all(self._fs, file, memoryview(f"{path.name}\n".encode()))
                self._fs.sync(file)
            self._fs.rename(temporary, self.path / "latest")
        except OSError:
            with suppress(OSError):
                self._fs.remove(temporary)
            raise
