"""The directory that checkpoints lie in: what is there, whose it is, what it is called.

Several runs may use one directory, one after another. Each checkpoint says in its manifest which run wrote it, and a
run removes none but its own. Where another run's checkpoints lie, a run's names carry its id, and the file `.run`
says which run began there last: it may have saved nothing before it died, and is not to be taken for an earlier one.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from learnit_r8.checkpoint.lock import DirectoryLock
from learnit_r8.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from learnit_r8.checkpoint.storage import FileSystem, remove_tree, write_all
from learnit_r8.errors import CheckpointError

NAME = re.compile(r"step-(\d{9,})(\.\d+)?(-(?P<run>r[0-9a-f]{8}))?(-\w+)?", re.ASCII)
METRICS = "metrics.json"
"""What the user logged at a checkpoint's step; written beside its files, since it often comes after them."""
RUN = ".run"
"""Says which run began in the directory last."""
_TEMPORARY = re.compile(r"\.tmp-\d+-[0-9a-f]{8}", re.ASCII)
_STALE_SECONDS = 24 * 3600
"""Where there are no locks, temporary files as old as this are nobody's."""
_ACTIVE: set[Path] = set()
"""Temporary files and directories of this process that are in use: another run, or a signal handler, may save now."""


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
        self._lock = DirectoryLock(path, fs)
        self._read: dict[str, tuple[tuple[int, int, int], Manifest | None]] = {}  # by name, with the file's stamp

    def entries(self) -> list[Entry]:
        """Return what is in the directory, saved last first; those without a readable manifest come first of all."""
        if not self.path.is_dir():
            return []
        entries, read = [], self._read
        self._read = {}
        for name in self._fs.names(self.path):
            if NAME.fullmatch(name) and (self.path / name).is_dir():
                self._read[name] = self._manifest(name, read.get(name))
                entries.append(Entry(self.path / name, self._read[name][1]))
        return sorted(entries, key=lambda e: e.manifest.serial if e.manifest else float("inf"), reverse=True)

    def _manifest(
        self, name: str, known: tuple[tuple[int, int, int], Manifest | None] | None
    ) -> tuple[tuple[int, int, int], Manifest | None]:
        """Return a checkpoint's manifest and its file's stamp; one that is known is read again if it changed."""
        stamp = -1, -1, -1
        with suppress(OSError):
            info = os.stat(f"{self.path}/{name}/{MANIFEST}")
            stamp = info.st_mtime_ns, info.st_size, info.st_ino
        if known is not None and known[0] == stamp and known[1] is not None:
            return known
        with suppress(CheckpointError, OSError):
            return stamp, read_manifest(self._fs, self.path / name)
        return stamp, None

    def of_last_run(self, entries: list[Entry]) -> list[Entry]:
        """Return the entries of the run that saved or began here last; those that cannot be read may be its."""
        newest = next((entry for entry in entries if entry.manifest), None)
        run, serial = (newest.manifest.run, newest.manifest.serial) if newest and newest.manifest else ("", 0)
        marked, since = self._begun()
        named = marked != "" and since > serial
        run = marked if named else run
        labelled = named or (newest is not None and _run_in(newest) != "")
        return [e for e in entries if (e.manifest.run == run if e.manifest else _run_in(e) == run * labelled)]

    def _begun(self) -> tuple[str, int]:
        """Return the run that began here last and the serial that its first checkpoint may have; ("", 0) if unknown."""
        with suppress(OSError, ValueError, LookupError, TypeError):
            said = json.loads((self.path / RUN).read_text())
            return str(said["run"]), int(said["serial"])
        return "", 0

    def note_run(self, run: str) -> None:
        """Write down that a run begins, where another one's checkpoints lie; without them nothing is written.

        Raises:
            CheckpointError: Another process writes here.
            OSError: The directory cannot be written to.
        """
        if all(entry.manifest and entry.manifest.run == run for entry in self.entries()) and not self._begun()[0]:
            return
        self.open()
        self._replace(self.path / RUN, json.dumps({"run": run, "serial": self.next_serial()}))

    def metrics(self, path: Path) -> Mapping[str, float]:
        """Return what was logged at a checkpoint's step, by name."""
        with suppress(OSError, ValueError, AttributeError, TypeError):
            return {str(k): float(v) for k, v in json.loads((path / METRICS).read_text()).items()}
        return {}

    def add_metrics(self, path: Path, metrics: Mapping[str, float]) -> None:
        """Write down what was logged at a checkpoint's step.

        Raises:
            OSError: It cannot be written.
        """
        self._replace(path / METRICS, json.dumps({**self.metrics(path), **metrics}))

    def open(self) -> bool:
        """Create the directory if need be and lock it for this process, until `close` or until this object goes.

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
        return self._lock.take()

    def close(self) -> None:
        """Let go of the lock; the next `open` takes it again."""
        self._lock.release()

    def next_serial(self, entries: list[Entry] | None = None) -> int:
        """Return a number above that of every checkpoint here, even of one that cannot be read at the moment."""
        serials = [entry.manifest.serial for entry in entries or self.entries() if entry.manifest]
        unread = sum(name.startswith("step-") for name in self._fs.names(self.path)) - len(serials)
        return max(1 + unread + max(serials, default=0), self._begun()[1])

    def _remove_leftovers(self, now: float, exclusive: bool) -> None:
        """Remove what killed processes left behind: with a lock, nobody else can be writing here."""
        for name in self._fs.names(self.path):
            path = self.path / name
            if path in _ACTIVE or not _TEMPORARY.fullmatch(name):
                continue
            with suppress(OSError):
                if exclusive or now - path.lstat().st_mtime > _STALE_SECONDS:
                    remove_tree(self._fs, path)

    def new_temporary(self, *, exclusive: bool) -> Path:
        """Make a directory for a new checkpoint: `drop` it, or rename it and `leave` it.

        What killed processes left behind is removed first.
        """
        path = self.temporary_path()
        _ACTIVE.add(path)
        try:
            self._fs.make_directory(path)
            # The file system's own clock, which need not be this machine's.
            self._remove_leftovers(path.stat().st_mtime, exclusive)
        except BaseException:
            self.drop(path)
            raise
        return path

    def drop(self, path: Path) -> None:
        """Remove a temporary directory."""
        with suppress(OSError):
            remove_tree(self._fs, path)
        self.leave(path)

    def leave(self, path: Path) -> None:
        """Take note that a temporary directory is not in use any more."""
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

    def free_name(self, step: int, run: str, tag: str) -> Path:
        """Return a path that is not taken yet.

        Args:
            step: Global step.
            run: The run's id where the name has to tell it from another run's, else "".
            tag: The caller's word, or "".
        """
        taken = set(self._fs.names(self.path))
        suffix = "".join(f"-{part}" for part in (run, tag) if part)
        number, name = 1, f"step-{step:09d}{suffix}"
        while name in taken:
            number += 1
            name = f"step-{step:09d}.{number}{suffix}"
        return self.path / name

    def point_latest(self, path: Path) -> None:
        """Let the file `latest` name a checkpoint."""
        self._replace(self.path / "latest", path.name)

    def _replace(self, path: Path, line: str) -> None:
        """Write a small file so that at any time it holds the old line or the new one."""
        temporary = self.temporary_path()
        _ACTIVE.add(temporary)
        try:
            with self._fs.create(temporary) as file:
                write_all(self._fs, file, memoryview(f"{line}\n".encode()))
                self._fs.sync(file)
            self._fs.rename(temporary, path)
        except OSError:
            with suppress(OSError):
                self._fs.remove(temporary)
            raise
        finally:
            self.leave(temporary)


def new_run() -> str:
    """Return the id of a new run."""
    return f"r{secrets.token_hex(4)}"


def _run_in(entry: Entry) -> str:
    """Return the run that a checkpoint's name tells, or ""."""
    match = NAME.fullmatch(entry.path.name)
    return (match["run"] or "") if match else ""
