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

One process at a time writes into a directory. It holds a lock from its first save until the store is closed.
Reading needs no lock. Several runs may use a directory: see `directory.py`.
"""

from __future__ import annotations

import itertools
import operator
import re
import time
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from learnit_r8.checkpoint.background import ALONE
from learnit_r8.checkpoint.directory import CheckpointDirectory, Entry, Retention
from learnit_r8.checkpoint.manifest import (
    ARRAYS,
    MODEL,
    STATE,
    LoadedCheckpoint,
    Manifest,
    SavedCheckpoint,
    read_manifest,
)
from learnit_r8.checkpoint.remote import shown
from learnit_r8.checkpoint.state_codec import decode, encode
from learnit_r8.checkpoint.storage import Bytes, FileRecord, FileSystem, hash_file, regular_size
from learnit_r8.checkpoint.writing import call_writer, fill, hashing_threads, reported, write_manifest
from learnit_r8.errors import CheckpointCorrupt, CheckpointError, ConfigError

_TAG = re.compile(r"\w{0,40}", re.ASCII)


class CheckpointStore(CheckpointDirectory):
    """The checkpoints of one run, in one directory.

    Args:
        directory: Created at the first save.
        keep: How many to keep, at least 2 (1 is taken as 2). Older ones are removed after a save.
        fs: The operations used; tests make them fail.
        on_corrupt: Told the path and the reason of each checkpoint that `newest` and `older_than` pass over.
        version: The library's version, for the manifest.
        clock: Seconds, for `SavedCheckpoint.seconds`.
        run: Id of the run that saves here; "" where runs are not told apart.
        retention: What to keep beside the newest `keep`.

    Attributes:
        run: As given; `adopt` may change it.
        always_labelled: Names carry the run's id, also where no other run's checkpoints lie.

    Raises:
        ConfigError: `keep` is below 1.
    """

    always_labelled = False

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 3,
        fs: FileSystem | None = None,
        on_corrupt: Callable[[Path, str], object] | None = None,
        version: str = "",
        clock: Callable[[], float] = time.perf_counter,
        run: str = "",
        retention: Retention | None = None,
    ) -> None:
        if keep < 1:
            raise ConfigError([f"keep={keep}: a number of checkpoints from 1 on is expected"])
        super().__init__(Path(directory).absolute(), fs or FileSystem(), run)  # a later chdir must not move it
        self.version = version
        self._retention = retention or Retention(keep)
        self._on_corrupt = on_corrupt or (lambda path, reason: None)
        self._clock = clock
        self._last_serial: int | None = None
        self._buffer: Bytes = np.empty(0, np.uint8)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a CheckpointStore locks its folder for one process: make another one of the same folder")

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
                a directory there, or files beside it (`model.npz`). Returning False means that it failed; a
                `functools.partial` that it returns is called, too, and may be called later.
            tag: Letters, digits and underscores, added to the name.

        Raises:
            CheckpointError: Nothing was saved, and all earlier checkpoints are as they were. Only when the
                very last sync fails may the new one exist.
            ConfigError: A bad step or tag.
        """
        return self.draft(step, state, write_model, tag=tag, copied=False)()

    def draft(
        self,
        step: int,
        state: Mapping[str, Any],
        write_model: Callable[[Path], object] | None = None,
        *,
        tag: str = "",
        copied: bool = True,
    ) -> Callable[[], SavedCheckpoint]:
        """Do what `save` has to do at the step boundary; return what does the rest, in any thread, once.

        Arrays that may change before they are written are to be `copied`. The memory for that is used again, so the
        rest has to be done before the next one is begun.
        """
        start = self._clock()
        step = _checked(step, tag)
        text, segments = encode(state)
        if copied:
            segments = [self._copied(segments)]
        with self._saving(step):
            path = self.new_temporary(exclusive=self.open())
        with self._dropped_where_it_fails(path):
            later = None if write_model is None else call_writer(write_model, path / MODEL)

        def finish() -> SavedCheckpoint:
            with self._dropped_where_it_fails(path), self._saving(step):
                files = fill(self._fs, path, text, segments, later)
                with ALONE:
                    manifest, final, problems = self._commit(path, step, tag, files)
                if write_model is not None and not manifest.holds_model:
                    problems += ["save_callback wrote nothing to the path that it got: the checkpoint holds no model"]
                saved = SavedCheckpoint(final, manifest.nbytes, self._clock() - start, tuple(problems))
                return self._publish(step, saved)

        return finish

    @contextmanager
    def _dropped_where_it_fails(self, path: Path) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.drop(path)
            raise

    def _copied(self, segments: list[Bytes]) -> Bytes:
        size = sum(segment.size for segment in segments)
        if self._buffer.size < size:
            self._buffer = np.empty(size, np.uint8)
        if segments:
            np.concatenate(segments, out=self._buffer[:size])
        return self._buffer[:size]

    def _saving(self, step: int) -> AbstractContextManager[None]:
        return reported(f"no checkpoint of step {step} was written to {shown(self.directory)}; what lay there is kept")

    def _publish(self, step: int, saved: SavedCheckpoint) -> SavedCheckpoint:
        """Do what is left once a checkpoint lies in the directory."""
        return saved

    def _commit(
        self, filled: Path, step: int, tag: str, files: dict[str, FileRecord]
    ) -> tuple[Manifest, Path, list[str]]:
        """Make a checkpoint of a filled directory, and remove what need not stay; return what went wrong with that."""
        before = self.entries(again=False)
        serial = self.next_serial(before)
        strangers = any(entry.manifest is None or entry.manifest.run != self.run for entry in before)
        manifest = Manifest(step, serial, tag, self.version, files, self.run)
        write_manifest(self._fs, filled, manifest)
        path = self.free_name(step, self.run if strangers or self.always_labelled else "", tag)
        self._fs.rename(filled, path)
        self.leave(filled)
        self._fs.sync_directory(self.directory)
        problems = self._tidy(path, manifest, before)
        # Someone else has saved here since the last save: the lock keeps other processes out only.
        between = range((self._last_serial or serial) + 1, serial)
        if any(entry.manifest and entry.manifest.serial in between for entry in before):
            problems.insert(
                0,
                f"another scheduler of this process saves into {self.directory} too; to resume from the directory "
                "means the one that saved last: give each a checkpoint_dir of its own",
            )
        self._last_serial = serial
        return manifest, path, problems

    def load(self, path: str | Path) -> LoadedCheckpoint:
        """Read one checkpoint and verify every byte that its manifest names.

        Raises:
            CheckpointCorrupt: Its bytes are not the ones that were written.
            CheckpointError: It is not there, cannot be read, or was written by a newer version.
        """
        path = Path(path)
        with reported(f"the checkpoint {path} cannot be read"):
            manifest = read_manifest(self._fs, path)
            for name, record in manifest.files.items():
                size = regular_size(path, name)
                if size != record.nbytes:
                    raise CheckpointCorrupt(f"{path}: {name} has {size:,} bytes where {record.nbytes:,} were written")
            arrays = np.empty(manifest.files[ARRAYS].nbytes, np.uint8)
            text = np.empty(manifest.files[STATE].nbytes, np.uint8)
            targets = {ARRAYS: arrays, STATE: text}
            with hashing_threads() as pool:
                hashes = {
                    name: hash_file(self._fs, path / name, record.nbytes, pool, targets.get(name))
                    for name, record in manifest.files.items()
                }
                for name, record in manifest.files.items():
                    if tuple(block.result() for block in hashes[name]) != record.sha256:
                        raise CheckpointCorrupt(f"{path}: {name} is damaged: its SHA-256 is not the manifest's")
            state = decode(text.tobytes(), arrays)
        return LoadedCheckpoint(path, state, path / MODEL, manifest.step, manifest)

    def newest(self) -> LoadedCheckpoint | None:
        """Return the checkpoint that was saved last and is whole, or None, of the run that saved or began here last.

        Damaged ones on the way are renamed `*.corrupt` where that is possible, and reported.

        Raises:
            CheckpointError: The next one was written by a newer version of the library.
        """
        return self._first_whole(self.of_last_run())

    def older_than(self, step: int, *, names: Container[str] | None = None, skip: int = 0) -> LoadedCheckpoint | None:
        """Return the checkpoint saved last among those of earlier steps, as `newest` does.

        Args:
            step: Global step.
            names: Names of folders that count; None for all.
            skip: How many of the newest not to return.
        """
        older = [e for e in self.entries() if e.manifest and e.manifest.step < step]
        return self._first_whole([e for e in older if names is None or e.path.name in names][skip:])

    def _first_whole(self, entries: list[Entry]) -> LoadedCheckpoint | None:
        for entry in entries:
            try:
                return self.load(entry.path)
            except CheckpointError as error:
                reason = str(error)
                if not entry.path.exists():  # another process has pruned it meanwhile
                    continue
                if isinstance(error, CheckpointCorrupt):
                    reason += self._set_aside(entry.path)
                # Unreadable is not damaged: the permissions or the mount may be better tomorrow.
                elif not isinstance(error.__cause__, OSError):
                    raise
                self._on_corrupt(entry.path, reason)
        return None

    def _set_aside(self, path: Path) -> str:
        targets = (
            path.with_name(f"{path.name}.corrupt{number}") for number in itertools.chain([""], itertools.count(2))
        )
        target = next(target for target in targets if not target.exists())
        try:
            self._fs.rename(path, target)
        except OSError as error:
            return f"; it stays under its name ({error})"
        return f"; it is now {target.name}"

    def _tidy(self, path: Path, manifest: Manifest, before: list[Entry]) -> list[str]:
        """Move `latest`, and remove the run's old checkpoints if the new one is really there."""
        problems = []
        try:
            self._replace(self.directory / "latest", path.name)
        except OSError as error:
            problems.append(f"{self.directory / 'latest'} still names an older checkpoint: {error}")
        try:
            if read_manifest(self._fs, path) != manifest:
                raise CheckpointCorrupt(f"{path}: the manifest read back differs from the one written")
            for name, record in manifest.files.items():
                if regular_size(path, name) != record.nbytes:
                    raise CheckpointCorrupt(f"{path}: {name} changed its size")
            own = [Entry(path, manifest), *self.own(before)]
            for entry in self._retention.doomed(own, self.metrics):
                self.discard(entry.path)
        except (OSError, CheckpointError) as error:
            problems.append(f"older checkpoints were not removed: {error}")
        return problems

    # Whose the directory is ---------------------------------------------------------------

    def adopt(self, loaded: LoadedCheckpoint) -> bool:
        """Go on as the run that wrote a checkpoint here, if that is the run's newest one.

        From an older one a run branches off: it keeps its own id, and never removes the other branch. Returned is
        whether it is the same run from now on.
        """
        run = loaded.manifest.run
        if run == "" or loaded.path.parent.resolve() != self.directory.resolve():
            return False
        serials = [e.manifest.serial for e in self.entries() if e.manifest and e.manifest.run == run]
        if run != self.run and max(serials, default=0) > loaded.manifest.serial:
            return False
        self.run = run
        return True

    def at_step(self, step: int) -> LoadedCheckpoint | None:
        """Return the checkpoint of a step that was saved last, whoever wrote it, if it is whole."""
        return self._first_whole([entry for entry in self.entries() if entry.manifest and entry.manifest.step == step])

    def best(self) -> tuple[float, Path] | None:
        """Return the best value of the retention's metric among the run's checkpoints, and where it lies."""
        if self._retention.best is None:
            return None
        found = self._retention.best_of(self.own(), self.metrics)
        return None if found is None else (found[0], found[1].path)


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
