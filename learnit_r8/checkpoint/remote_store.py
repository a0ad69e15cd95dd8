"""Checkpoints in an object store: saved on this machine first, then copied there, the manifest last."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from learnit_r8.checkpoint.directory import METRICS, NAME, RUN, Entry
from learnit_r8.checkpoint.manifest import MANIFEST, LoadedCheckpoint, SavedCheckpoint, read_manifest
from learnit_r8.checkpoint.remote import Remote, behind, remote, shown
from learnit_r8.checkpoint.store import CheckpointStore
from learnit_r8.core.urls import url_of
from learnit_r8.errors import CheckpointError


def open_store(directory: str | Path, **options: Any) -> CheckpointStore:
    """Return the store of a folder, of a URL, or of the folder that stands in for one; options: `CheckpointStore`'s."""
    url = url_of(directory)
    found = behind(Path(directory)) if url is None else remote(url)
    return CheckpointStore(directory, **options) if found is None else RemoteStore(found, **options)


class RemoteStore(CheckpointStore):
    """The checkpoints of one run in a folder of an object store.

    Of those that are there, this machine holds the manifests. Names carry the run's id: nothing keeps another process
    from writing there, and its files must not get mixed with this one's.
    """

    always_labelled = True

    def __init__(self, place: Remote, **options: Any) -> None:
        super().__init__(place.folder, **options)
        self._remote = place
        self._known = False  # whether this machine knows what is there
        self._removed: list[str] = []  # here, and still in the store

    def sync(self) -> None:
        """Learn what is in the store."""
        there = self._remote.names()
        for path in self.directory.iterdir():
            if NAME.fullmatch(path.name) and path.name not in there:
                shutil.rmtree(path)
        for name in filter(NAME.fullmatch, there):
            if not (self.directory / name).is_dir() and self._remote.bring(f"{name}/{MANIFEST}"):
                self._remote.bring(f"{name}/{METRICS}")
            elif not (self.directory / name / MANIFEST).exists():  # being written, being removed, or given up
                shutil.rmtree(self.directory / name, ignore_errors=True)
        if RUN in there:
            self._remote.bring(RUN)
        self._known = True

    def entries(self, *, again: bool = True) -> list[Entry]:
        if not self._known:
            self.sync()
        return super().entries(again=again)

    def load(self, path: str | Path) -> LoadedCheckpoint:
        """Copy a checkpoint from the store, and verify it as `CheckpointStore` does; it stays for this process."""
        path = Path(path)
        if not self._known:
            self.sync()
        if path.is_dir():
            manifest = read_manifest(self._fs, path)
            for name, record in manifest.files.items():
                file = path / name
                if not file.is_file() or file.stat().st_size != record.nbytes:
                    self._remote.bring(f"{path.name}/{name}")
        return super().load(path)

    def discard(self, path: Path) -> None:
        """Remove a checkpoint from this machine; `_publish` removes it from the store once the new one is there."""
        super().discard(path)
        self._removed.append(path.name)

    def _publish(self, step: int, saved: SavedCheckpoint) -> SavedCheckpoint:
        path, problems = saved.path, saved.problems
        try:
            for file in sorted(path.rglob("*"), key=lambda file: file.name == MANIFEST):
                if file.is_file():
                    self._remote.send(file.relative_to(self.directory).as_posix())
        except CheckpointError as error:
            self._known = False  # older ones that have gone here are still there
            self._removed.clear()
            shutil.rmtree(path, ignore_errors=True)
            raise CheckpointError(
                f"no checkpoint of step {step} was written; what lay there is kept: {error}"
            ) from error
        try:
            self._remote.send("latest")
            while self._removed:
                self._remote.remove(self._removed[0])
                del self._removed[0]
        except CheckpointError as error:
            problems += (f"older checkpoints were not removed: {error}",)
        for file in path.rglob("*"):
            if file.is_file() and file.name not in (MANIFEST, METRICS):
                file.unlink()
        return replace(saved, path=shown(path), problems=problems)

    def _set_aside(self, path: Path) -> str:
        return "; it stays under its name"

    def begin(self) -> None:
        self.sync()
        super().begin()
        if (self.directory / RUN).exists():
            self._remote.send(RUN)

    def add_metrics(self, path: Path, metrics: Mapping[str, float]) -> None:
        super().add_metrics(self.directory / path.name, metrics)
        self._remote.send(f"{path.name}/{METRICS}")

    def close(self) -> None:
        """Let go of the folder that stands in for the store."""
        with suppress(OSError):
            super().close()
