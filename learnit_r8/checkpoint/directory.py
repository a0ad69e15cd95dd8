"""The directory that checkpoints lie in: what is there, whose it is, what it is called, and which of them stay.

Several runs may use one directory, one after another. Each checkpoint says in its manifest which run wrote it, and a
run removes none but its own. Where another run's checkpoints lie, a run's names carry its id, and the file `.run`
says which run began there last: it may have saved nothing before it died, and is not to be taken for an earlier one.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from learnit_r8.checkpoint.background import ALONE
from learnit_r8.checkpoint.lock import DirectoryLock
from learnit_r8.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from learnit_r8.checkpoint.storage import FileSystem, remove_tree, write_all
from learnit_r8.checkpoint.writing import reported
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
MIN_KEEP = 2
"""The newest checkpoint is not the only one, even when that is asked for."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A checkpoint in a directory, unverified; `manifest` is None where that cannot be read."""

    path: Path
    manifest: Manifest | None


class CheckpointDirectory:
    """One directory of checkpoints, which need not exist before the first; `run` is the id of who saves there."""

    def __init__(self, path: Path, fs: FileSystem, run: str) -> None:
        self.directory = path
        self.run = run
        self._fs = fs
        self._lock = DirectoryLock(path, fs)
        self._read: dict[str, tuple[tuple[int, ...], Entry]] = {}  # by name, with the stamp of the manifest's file

    def entries(self, *, again: bool = True) -> list[Entry]:
        """Return what is in the directory, saved last first; those without a readable manifest come first of all.

        Args:
            again: Manifests that were read before are read again if they have changed; to look takes milliseconds
                where a thousand are kept, and no save changes one.
        """
        if not self.directory.is_dir():
            return []
        read, self._read = self._read, {}
        for name in filter(NAME.fullmatch, self._fs.names(self.directory)):
            stamp, entry = read.get(name) or ((), Entry(self.directory / name, None))
            if entry.manifest is None or (again and stamp != self._stamp(name)):
                if not entry.path.is_dir():
                    continue
                stamp, entry = self._stamp(name), Entry(entry.path, None)
                with suppress(CheckpointError, OSError):
                    entry = Entry(entry.path, read_manifest(self._fs, entry.path))
            self._read[name] = stamp, entry
        found = [entry for _, entry in self._read.values()]
        return sorted(found, key=lambda e: e.manifest.serial if e.manifest else float("inf"), reverse=True)

    def _stamp(self, name: str) -> tuple[int, ...]:
        with suppress(OSError):
            info = os.stat(f"{self.directory}/{name}/{MANIFEST}")
            return info.st_mtime_ns, info.st_size, info.st_ino
        return ()

    def own(self, entries: list[Entry] | None = None) -> list[Entry]:
        """Return the entries of this run."""
        entries = self.entries() if entries is None else entries
        return [entry for entry in entries if entry.manifest and entry.manifest.run == self.run]

    def of_last_run(self) -> list[Entry]:
        """Return the entries of the run that saved or began here last; those that cannot be read may be its."""
        entries = self.entries()
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
            said = json.loads((self.directory / RUN).read_text())
            return str(said["run"]), int(said["serial"])
        return "", 0

    def begin(self) -> None:
        """Note in a directory with other runs' checkpoints that this one begins, and so is the last one from now on.

        Raises:
            CheckpointError: The directory cannot be written to, or another process writes there.
        """
        if not self.directory.is_dir():
            return
        with ALONE, reported(f"{self.directory} cannot be written to"):
            entries = self.entries()
            if len(self.own(entries)) < len(entries) or self._begun()[0]:
                self.open()
                self._replace(self.directory / RUN, json.dumps({"run": self.run, "serial": self.next_serial()}))

    def metrics(self, path: Path) -> Mapping[str, float]:
        """Return what was logged at a checkpoint's step, by name."""
        with suppress(OSError, ValueError, AttributeError, TypeError):
            return {str(k): float(v) for k, v in json.loads((path / METRICS).read_text()).items()}
        return {}

    def add_metrics(self, path: Path, metrics: Mapping[str, float]) -> None:
        """Write down beside a checkpoint what was logged at its step.

        Raises:
            CheckpointError: It cannot be written.
        """
        with reported(f"{path} cannot be written to"):
            self._replace(path / METRICS, json.dumps({**self.metrics(path), **metrics}))

    def open(self) -> bool:
        """Create the directory if need be and lock it for this process, until `close` or until this object goes.

        Returns:
            Whether the file system has locks; a CheckpointError says that another process has this one.
        """
        missing = [p for p in (self.directory, *self.directory.parents) if not p.exists()]
        for path in reversed(missing):
            with suppress(FileExistsError):
                self._fs.make_directory(path)
            self._fs.sync_directory(path.parent)
        return self._lock.take()

    def close(self) -> None:
        """Let other processes write into the directory; the next save takes the lock again."""
        self._lock.release()

    def next_serial(self, entries: list[Entry] | None = None) -> int:
        """Return a number above that of every checkpoint here, even of one that cannot be read at the moment."""
        serials = [entry.manifest.serial for entry in entries or self.entries() if entry.manifest]
        unread = sum(name.startswith("step-") for name in self._fs.names(self.directory)) - len(serials)
        return max(1 + unread + max(serials, default=0), self._begun()[1])

    def new_temporary(self, *, exclusive: bool) -> Path:
        """Make a directory for a new checkpoint: `drop` it, or rename it and `leave` it.

        What killed processes left behind is removed: with a lock, nobody else can be writing here.
        """
        path = self.temporary_path()
        _ACTIVE.add(path)
        try:
            self._fs.make_directory(path)
            now = path.stat().st_mtime  # the file system's own clock, which need not be this machine's
            for left in map(self.directory.joinpath, filter(_TEMPORARY.fullmatch, self._fs.names(self.directory))):
                with suppress(OSError):
                    if left not in _ACTIVE and (exclusive or now - left.lstat().st_mtime > _STALE_SECONDS):
                        remove_tree(self._fs, left)
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
        return self.directory / f".tmp-{os.getpid()}-{secrets.token_hex(4)}"

    def free_name(self, step: int, run: str, tag: str) -> Path:
        """Return a path that is not taken yet; `run` is "" where the name need not tell it from another run's."""
        taken = set(self._fs.names(self.directory))
        suffix = "".join(f"-{part}" for part in (run, tag) if part)
        numbers = itertools.chain([""], (f".{i}" for i in itertools.count(2)))
        names = (f"step-{step:09d}{number}{suffix}" for number in numbers)
        return self.directory / next(name for name in names if name not in taken)

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


@dataclass(frozen=True, slots=True)
class Retention:
    """What a run keeps.

    Attributes:
        newest: How many of the newest, at least `MIN_KEEP`.
        every: Steps: the first checkpoint at or after each multiple stays. None: none for that reason.
        best: Name of a logged metric: the checkpoint with its best value stays. None: none for that reason.
        sign: 1 where higher values of it are better, -1 where lower ones are.
    """

    newest: int = 3
    every: int | None = None
    best: str | None = None
    sign: int = -1

    def doomed(self, own: Sequence[Entry], metrics: Callable[[Path], Mapping[str, float]]) -> list[Entry]:
        """Return those that may go.

        Args:
            own: The run's readable checkpoints, saved last first.
            metrics: Returns what was logged at a checkpoint's step.
        """
        stay = {entry.path for entry in own[: max(self.newest, MIN_KEEP)]}
        if self.every is not None:
            last = 0
            for entry in reversed(own):
                turn = (entry.manifest.step if entry.manifest else 0) // self.every
                if turn > last:
                    last = turn
                    stay.add(entry.path)
        best = self.best_of(own, metrics)
        if best is not None:
            stay.add(best[1].path)
        return [entry for entry in own if entry.path not in stay and not (entry.manifest and entry.manifest.tag)]

    def best_of(
        self, own: Sequence[Entry], metrics: Callable[[Path], Mapping[str, float]]
    ) -> tuple[float, Entry] | None:
        """Return the best value of the metric and its checkpoint, the oldest of equal ones; None without one."""
        if self.best is None:
            return None
        values = ((metrics(entry.path).get(self.best, math.nan), entry) for entry in reversed(own))
        finite = [(value, entry) for value, entry in values if math.isfinite(value)]
        return max(finite, key=lambda pair: self.sign * pair[0]) if finite else None


def new_run() -> str:
    """Return the id of a new run."""
    return f"r{secrets.token_hex(4)}"


def _run_in(entry: Entry) -> str:
    """Return the run that a checkpoint's name tells, or ""."""
    match = NAME.fullmatch(entry.path.name)
    return (match["run"] or "") if match else ""
