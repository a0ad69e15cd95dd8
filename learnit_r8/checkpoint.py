"""Durable state on disk: a checkpoint is complete and verified, or it does not exist.

A checkpoint is a directory:

    step-000012340/
      model...        whatever the user's callback wrote
      arrays.bin      numpy arrays, one after another
      state.json      everything else
      manifest.json   size and SHA-256 of each file, and of the manifest itself

It is filled under a temporary name, every file is synced, the manifest is written last, the directory is
renamed, and its parent is synced. Until the rename nothing that existed before has been touched; after it
the checkpoint is whole. (The order is the one of Pillai et al. 2014, "All file systems are not created
equal", which lists what goes wrong with any other.)

Checkpoints are ordered by when they were saved, not by step: after a rollback or a resume from an older
one, a higher step belongs to a past that was given up. `latest` is for humans; loading never reads it.

One process at a time writes into a directory. It holds a lock from its first save to its end, because two
runs that share a directory would each prune what the other one needs. Reading needs no lock.
"""

from __future__ import annotations

import errno
import hashlib
import json
import operator
import os
import re
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from learnit_r8.errors import CheckpointCorrupt, CheckpointError, ConfigError
from learnit_r8.state_codec import MAX_JSON, decode, encode, strict_json
from learnit_r8.storage import (
    BLOCK,
    FileRecord,
    FileSystem,
    hash_file,
    regular_size,
    remove_tree,
    walk_files,
    write_file,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

SCHEMA = 1
"""Version of the layout on disk."""
FORMAT = "learnit_r8 checkpoint"
MANIFEST, STATE, ARRAYS, MODEL = "manifest.json", "state.json", "arrays.bin", "model"
MAX_MANIFEST = 64 << 20
"""Bytes: room for 200,000 files or a model of 10 TB."""
MIN_KEEP = 2
"""The newest checkpoint is not the only one, even when that is asked for."""

_NAME = re.compile(r"step-(\d{9,})(\.\d+)?(-\w+)?", re.ASCII)
_TEMPORARY = re.compile(r"\.tmp-\d+-[0-9a-f]{8}", re.ASCII)
_TAG = re.compile(r"\w{0,40}", re.ASCII)
_STALE_SECONDS = 24 * 3600
"""Where there are no locks, temporary files as old as this are nobody's."""
_THREADS = min(4, os.cpu_count() or 1)
_SAVING = threading.RLock()
"""Locks on files exclude other processes, not other threads of this one."""


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """A checkpoint that is durable.

    Attributes:
        path: Its directory.
        nbytes: Size of all its files.
        seconds: Time that `save` took.
        problems: What went wrong after it was durable (an old one that could not be removed, ...).
    """

    path: Path
    nbytes: int
    seconds: float
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        step: Global step that it was saved at.
        serial: 1 for the first checkpoint saved into its directory, and so on.
        tag: The caller's word for it, such as "final".
        version: Version of the library that wrote it.
        files: One record per file, by relative posix name.
    """

    step: int
    serial: int
    tag: str
    version: str
    files: Mapping[str, FileRecord]

    @property
    def nbytes(self) -> int:
        """Size of all files but the manifest."""
        return sum(record.nbytes for record in self.files.values())


@dataclass(frozen=True, slots=True, eq=False)
class LoadedCheckpoint:
    """A checkpoint whose every byte has been verified.

    Attributes:
        path: Its directory.
        state: What `save` got. Its arrays are writable views of one buffer: copy a small one that is kept for long.
        model_path: What `write_model` got, now inside `path`; nothing is there if it wrote nothing.
        step: Global step that it was saved at.
        manifest: The rest of what it says of itself.
    """

    path: Path
    state: dict[str, Any]
    model_path: Path
    step: int
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Entry:
    """A checkpoint in a directory, unverified; `manifest` is None where that cannot be read."""

    path: Path
    manifest: Manifest | None


class CheckpointStore:
    """The checkpoints of one run, in one directory.

    Args:
        directory: Created at the first save.
        keep: How many to keep, at least 2 (1 is taken as 2). Older ones are removed after a save.
        fs: The operations used; tests make them fail.
        on_corrupt: Told the path and the reason of each checkpoint that `newest` and `older_than` pass over.
        version: The library's version, for the manifest.
        clock: Seconds, for `SavedCheckpoint.seconds`.

    Raises:
        ConfigError: `keep` is below 1.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 3,
        fs: FileSystem | None = None,
        on_corrupt: Callable[[Path, str], object] | None = None,
        version: str = "",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if keep < 1:
            raise ConfigError([f"keep={keep}: a number of checkpoints from 1 on is expected"])
        self.directory = Path(directory)
        self.keep = max(keep, MIN_KEEP)
        self.version = version
        self._fs = fs or FileSystem()
        self._on_corrupt = on_corrupt or (lambda path, reason: None)
        self._clock = clock
        self._lock: tuple[int, weakref.finalize[..., Any]] | None = None

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        write_model: Callable[[Path], object] | None = None,
        *,
        tag: str = "",
    ) -> SavedCheckpoint:
        """Write a checkpoint; when this returns it survives a power cut.

        Saving a step again makes a second checkpoint of it, which counts as the newer one.

        Args:
            step: Global step, for the name.
            state: What `state_codec.encode` takes: nested dicts, lists, scalars and numpy arrays.
            write_model: Called with a path named `model`, at which nothing exists: it writes a file or
                a directory there, or files beside it (`model.npz`). Returning False means that it failed.
            tag: Letters, digits and underscores, added to the name.

        Raises:
            CheckpointError: Nothing was saved, and all earlier checkpoints are as they were. Only when the
                very last sync fails may the new one exist.
            ConfigError: A bad step or tag.
        """
        start = self._clock()
        step = _checked(step, tag)
        segments: Any
        text, segments = encode(state)
        with _SAVING, _reported(f"no checkpoint of step {step} was written to {self.directory}; earlier ones are kept"):
            exclusive = self._open_directory()
            serial = 1 + max((e.manifest.serial for e in self.entries() if e.manifest), default=0)
            temporary = self.directory / f".tmp-{os.getpid()}-{secrets.token_hex(4)}"
            try:
                self._fs.make_directory(temporary)
                self._remove_leftovers(temporary, exclusive)
                files = self._fill(temporary, text, segments, write_model)
                manifest = Manifest(step, serial, tag, self.version, files)
                self._write_manifest(temporary, manifest)
                path = self._free_name(step, tag)
                self._fs.rename(temporary, path)
            except BaseException:
                with suppress(OSError):
                    remove_tree(self._fs, temporary)
                raise
            self._fs.sync_directory(self.directory)
            problems = self._tidy(path, manifest)
        return SavedCheckpoint(path, manifest.nbytes, self._clock() - start, problems)

    def load(self, path: str | Path) -> LoadedCheckpoint:
        """Read one checkpoint and verify every byte that its manifest names.

        Raises:
            CheckpointCorrupt: Its bytes are not the ones that were written.
            CheckpointError: It is not there, cannot be read, or was written by a newer version.
        """
        path = Path(path)
        with _reported(f"the checkpoint {path} cannot be read"):
            manifest = read_manifest(self._fs, path)
            for name, record in manifest.files.items():
                size = regular_size(path, name)
                if size != record.nbytes:
                    raise CheckpointCorrupt(f"{path}: {name} has {size:,} bytes where {record.nbytes:,} were written")
            arrays = np.empty(manifest.files[ARRAYS].nbytes, np.uint8)
            text = np.empty(manifest.files[STATE].nbytes, np.uint8)
            with _pool() as pool:
                for name, record in manifest.files.items():
                    into = {ARRAYS: arrays, STATE: text}.get(name)
                    if hash_file(self._fs, path / name, record.nbytes, pool, into) != record.sha256:
                        raise CheckpointCorrupt(f"{path}: {name} is damaged: its SHA-256 is not the manifest's")
            state = decode(text.tobytes(), arrays)
        return LoadedCheckpoint(path, state, path / MODEL, manifest.step, manifest)

    def newest(self) -> LoadedCheckpoint | None:
        """Return the checkpoint that was saved last and is whole, or None.

        Damaged ones on the way are renamed `*.corrupt` where that is possible, and reported.

        Raises:
            CheckpointError: The next one was written by a newer version of the library.
        """
        return self._first_whole(self.entries())

    def older_than(self, step: int) -> LoadedCheckpoint | None:
        """Return the checkpoint saved last among those of a step below `step`, as `newest` does."""
        return self._first_whole([e for e in self.entries() if e.manifest and e.manifest.step < step])

    def entries(self) -> list[Entry]:
        """Return what is in the directory, saved last first; those without a readable manifest come first of all."""
        if not self.directory.is_dir():
            return []
        entries = []
        for name in self._fs.names(self.directory):
            path = self.directory / name
            if _NAME.fullmatch(name) and path.is_dir():
                manifest = None
                with suppress(CheckpointError, OSError):
                    manifest = read_manifest(self._fs, path)
                entries.append(Entry(path, manifest))
        return sorted(entries, key=lambda e: e.manifest.serial if e.manifest else float("inf"), reverse=True)

    def _first_whole(self, entries: list[Entry]) -> LoadedCheckpoint | None:
        for entry in entries:
            try:
                return self.load(entry.path)
            except CheckpointCorrupt as error:
                if entry.path.exists():  # else another process has pruned it meanwhile
                    self._set_aside(entry.path)
                    self._on_corrupt(entry.path, str(error))
            except CheckpointError as error:
                if not isinstance(error.__cause__, OSError):
                    raise
                # Unreadable is not damaged: the permissions or the mount may be better tomorrow.
                self._on_corrupt(entry.path, str(error))
        return None

    def _set_aside(self, path: Path) -> None:
        target = path.with_name(f"{path.name}.corrupt")
        number = 2
        while target.exists():
            target = path.with_name(f"{path.name}.corrupt{number}")
            number += 1
        with suppress(OSError):
            self._fs.rename(path, target)

    def _open_directory(self) -> bool:
        """Create and lock the directory; return whether the file system has locks."""
        missing = [p for p in (self.directory, *self.directory.parents) if not p.exists()]
        for path in reversed(missing):
            with suppress(FileExistsError):
                self._fs.make_directory(path)
            self._fs.sync_directory(path.parent)
        path = self.directory / ".lock"
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
                f"process {holder or '?'} writes its checkpoints into {self.directory}: "
                "give each run a checkpoint_dir of its own, or end that process"
            )
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        return locked is True

    def _remove_leftovers(self, mine: Path, exclusive: bool) -> None:
        """Remove what killed processes left behind: with a lock, nobody else can be writing here."""
        now = mine.stat().st_mtime
        for name in self._fs.names(self.directory):
            path = self.directory / name
            if path == mine or not _TEMPORARY.fullmatch(name):
                continue
            if exclusive or now - path.lstat().st_mtime > _STALE_SECONDS:
                with suppress(OSError):
                    remove_tree(self._fs, path)

    def _fill(
        self, root: Path, text: bytes, segments: Any, write_model: Callable[[Path], object] | None
    ) -> dict[str, FileRecord]:
        """Write and sync every file but the manifest."""
        if write_model is not None:
            _call_writer(write_model, root / MODEL)
        with _pool() as pool:
            files = self._adopt(root, pool)
            files[ARRAYS] = write_file(self._fs, root / ARRAYS, segments, pool)
            files[STATE] = write_file(self._fs, root / STATE, [np.frombuffer(text, np.uint8)], pool)
        return files

    def _adopt(self, root: Path, pool: Executor) -> dict[str, FileRecord]:
        """Sync and hash the user's files."""
        files = {}
        for name in walk_files(self._fs, root):
            if name in (MANIFEST, STATE, ARRAYS):
                raise CheckpointError(f"the callback wrote {name}, a name that the checkpoint needs: choose another")
            size = regular_size(root, name)
            files[name] = FileRecord(size, hash_file(self._fs, root / name, size, pool))
            self._fs.sync_file(root / name)
        for directory in {parent for name in files for parent in (root / name).parents if root in parent.parents}:
            self._fs.sync_directory(directory)
        return files

    def _write_manifest(self, root: Path, manifest: Manifest) -> None:
        raw = np.frombuffer(manifest_bytes(manifest), np.uint8)
        with _pool() as pool:
            write_file(self._fs, root / MANIFEST, [raw], pool)
        self._fs.sync_directory(root)

    def _free_name(self, step: int, tag: str) -> Path:
        taken = set(self._fs.names(self.directory))
        number, suffix = 1, f"-{tag}" if tag else ""
        name = f"step-{step:09d}{suffix}"
        while name in taken:
            number += 1
            name = f"step-{step:09d}.{number}{suffix}"
        return self.directory / name

    def _tidy(self, path: Path, manifest: Manifest) -> tuple[str, ...]:
        """Move `latest`, and remove old checkpoints if the new one is really there."""
        problems = []
        try:
            self._point_latest(path)
        except OSError as error:
            problems.append(f"{self.directory / 'latest'} still names an older checkpoint: {error}")
        try:
            if read_manifest(self._fs, path) != manifest:
                raise CheckpointCorrupt(f"{path}: the manifest read back differs from the one written")
            for name, record in manifest.files.items():
                if regular_size(path, name) != record.nbytes:
                    raise CheckpointCorrupt(f"{path}: {name} changed its size")
            for entry in [entry for entry in self.entries() if entry.manifest][self.keep :]:
                # Renamed first: killed halfway, it is litter and not a damaged checkpoint.
                temporary = self.directory / f".tmp-{os.getpid()}-{secrets.token_hex(4)}"
                self._fs.rename(entry.path, temporary)
                remove_tree(self._fs, temporary)
        except (OSError, CheckpointError) as error:
            problems.append(f"older checkpoints were not removed: {error}")
        return tuple(problems)

    def _point_latest(self, path: Path) -> None:
        temporary = self.directory / f".tmp-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            with self._fs.create(temporary) as file:
                self._fs.write(file, memoryview(f"{path.name}\n".encode()))
                self._fs.sync(file)
            self._fs.rename(temporary, self.directory / "latest")
        except OSError:
            with suppress(OSError):
                self._fs.remove(temporary)
            raise


def resolve(path: str | Path, *, on_corrupt: Callable[[Path, str], object] | None = None) -> LoadedCheckpoint:
    """Return the checkpoint that `path` means: one itself (or a file in it), or the newest whole one in it.

    Raises:
        FileNotFoundError: There is none; the message says what is there instead.
        CheckpointCorrupt: The one asked for is damaged, or all in the directory are.
        CheckpointError: It cannot be read, or was written by a newer version.
    """
    path = Path(path)
    directory = path.parent if path.is_file() else path
    if (directory / MANIFEST).is_file() or _NAME.fullmatch(directory.name):
        if not directory.is_dir():
            raise FileNotFoundError(f"no checkpoint {path}: {_contents(path.parent)}")
        return CheckpointStore(directory.parent).load(directory)
    failures: list[str] = []

    def passed_over(bad: Path, reason: str) -> None:
        failures.append(reason)
        if on_corrupt is not None:
            on_corrupt(bad, reason)

    with _reported(f"{directory} cannot be read", missing=False):
        found = CheckpointStore(directory, on_corrupt=passed_over).newest()
    if found is not None:
        return found
    if failures:
        listing = "\n".join(f"  - {reason}" for reason in failures)
        raise CheckpointCorrupt(f"no checkpoint in {directory} is whole:\n{listing}")
    raise FileNotFoundError(f"no checkpoint in {directory}: {_contents(directory)}")


def manifest_bytes(manifest: Manifest) -> bytes:
    """Return the text of manifest.json: the one and only spelling of its content, hashed in itself."""
    body = {
        "format": FORMAT,
        "schema": SCHEMA,
        "step": manifest.step,
        "serial": manifest.serial,
        "tag": manifest.tag,
        "version": manifest.version,
        "files": {name: {"bytes": r.nbytes, "sha256": list(r.sha256)} for name, r in manifest.files.items()},
    }
    return _sealed(body)


def read_manifest(fs: FileSystem, root: Path) -> Manifest:
    """Read and check a checkpoint's manifest; its files are not looked at.

    Raises:
        CheckpointCorrupt: It is not as it was written.
        CheckpointError: It is of another schema than this version's.
        OSError: It cannot be read.
    """
    name = f"{root / MANIFEST}"
    if not root.is_dir():
        raise CheckpointError(f"there is no checkpoint {root}: {_contents(root.parent)}")
    size = regular_size(root, MANIFEST)
    if size > MAX_MANIFEST:
        raise CheckpointCorrupt(f"{name}: {size:,} bytes, at most {MAX_MANIFEST:,} make sense")
    buffer = np.empty(size, np.uint8)
    with fs.open(root / MANIFEST) as file:
        done = 0
        while done < size:
            count = fs.read(file, buffer.data[done:])
            if not count:
                raise CheckpointCorrupt(f"{name} ends early")
            done += count
    raw = buffer.tobytes()
    data = strict_json(raw, name)
    body = data.get("manifest") if isinstance(data, dict) else None
    if not isinstance(body, dict) or raw != _sealed(body):
        raise CheckpointCorrupt(f"{name} is damaged: its own SHA-256 does not match")
    schema = body.get("schema")
    if body.get("format") != FORMAT or type(schema) is not int or schema < 1:
        raise CheckpointCorrupt(f"{name} is not a manifest of a {FORMAT}")
    if schema != SCHEMA:
        raise CheckpointError(
            f"{root} was written by a newer version of learnit_r8 ({body.get('version')!s:.40}, schema {schema}; "
            f"this one reads schema {SCHEMA}): upgrade learnit_r8 to load it"
        )
    return _checked_manifest(body, name)


def _checked_manifest(body: Mapping[str, Any], name: str) -> Manifest:
    files = body.get("files")
    expected = {"format": str, "schema": int, "step": int, "serial": int, "tag": str, "version": str, "files": dict}
    if {key: type(value) for key, value in body.items()} != expected or not isinstance(files, dict):
        raise CheckpointCorrupt(f"{name}: expected the fields {sorted(expected)} with their types")
    if body["step"] < 0 or body["serial"] < 1 or not {STATE, ARRAYS} <= set(files):
        raise CheckpointCorrupt(f"{name}: step, serial or files are not those of a checkpoint")
    records = {}
    for file, entry in files.items():
        if not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"}:
            raise CheckpointCorrupt(f"{name}: {file!r} needs bytes and sha256")
        nbytes, digests = entry["bytes"], entry["sha256"]
        if type(nbytes) is not int or nbytes < 0 or not isinstance(digests, list):
            raise CheckpointCorrupt(f"{name}: {file!r} has no valid size or digests")
        if len(digests) != max(1, -(-nbytes // BLOCK)) or not all(isinstance(d, str) and len(d) == 64 for d in digests):
            raise CheckpointCorrupt(f"{name}: {file!r} needs one SHA-256 for every {BLOCK:,} bytes")
        records[file] = FileRecord(nbytes, tuple(digests))
    if records[STATE].nbytes > MAX_JSON:
        raise CheckpointCorrupt(f"{name}: {STATE} of {records[STATE].nbytes:,} bytes, at most {MAX_JSON:,} are read")
    return Manifest(body["step"], body["serial"], body["tag"], body["version"], records)


def _sealed(body: Mapping[str, Any]) -> bytes:
    digest = hashlib.sha256(_spelled(body).encode()).hexdigest()
    return _spelled({"manifest": body, "sha256": digest}).encode()


def _spelled(data: Mapping[str, Any]) -> str:
    return json.dumps(data, allow_nan=False, indent=1, sort_keys=True) + "\n"


def _checked(step: int, tag: str) -> int:
    problems = []
    try:
        step = operator.index(step)
    except TypeError:
        step = -1
    if step < 0:
        problems.append(f"step={step!r}: an int from 0 on is expected")
    if not isinstance(tag, str) or not _TAG.fullmatch(tag):
        problems.append(f"tag={tag!r}: at most 40 letters, digits and underscores are expected")
    if problems:
        raise ConfigError(problems)
    return step


def _call_writer(write_model: Callable[[Path], object], path: Path) -> None:
    try:
        result = write_model(path)
    except Exception as error:
        raise CheckpointError(f"the save callback raised {type(error).__name__}: {error}") from error
    if result is False or (isinstance(result, np.bool_) and not result):
        raise CheckpointError("the save callback returned False")


@contextmanager
def _pool() -> Iterator[Executor]:
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="r8-hash")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _reported(what: str, *, missing: bool = True) -> Iterator[None]:
    """Turn what the system says into a CheckpointError that says what it means."""
    advice = {
        errno.ENOSPC: "; free some space, or keep fewer checkpoints",
        errno.EDQUOT: "; free some space, or keep fewer checkpoints",
        errno.EROFS: "; the file system is read-only",
        errno.EACCES: "; check who owns the directory",
    }
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not missing:
            raise
        raise CheckpointError(f"{what}: {error}{advice.get(error.errno or 0, '')}") from error


def _contents(directory: Path) -> str:
    """Describe a directory in which something was looked for in vain."""
    if not directory.exists():
        return f"{directory} does not exist"
    if not directory.is_dir():
        return f"{directory} is not a directory"
    names = sorted(os.listdir(directory))
    listing = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    return f"{directory} contains {listing}" if names else f"{directory} is empty"
