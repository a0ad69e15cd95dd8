"""Which checkpoint a path or a URL means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from learnit_r8.checkpoint.background import wait_for_all
from learnit_r8.checkpoint.directory import NAME
from learnit_r8.checkpoint.manifest import MANIFEST, LoadedCheckpoint, contents
from learnit_r8.checkpoint.remote import remote
from learnit_r8.checkpoint.remote_store import open_store
from learnit_r8.checkpoint.writing import reported
from learnit_r8.core.urls import url_of
from learnit_r8.errors import CheckpointCorrupt, CheckpointError

_ADVICE = "give the checkpoint_dir of the run, or one of the step-... folders in it"


def resolve(path: str | Path, *, on_corrupt: Callable[[Path, str], object] | None = None) -> LoadedCheckpoint:
    """Return the checkpoint that `path` means: one itself (or a file in it), or the newest whole one in it.

    Raises:
        FileNotFoundError: There is none; the message says what is there instead.
        CheckpointCorrupt: The one asked for is damaged, or all in the directory are.
        CheckpointError: It cannot be read, or was written by a newer version.
    """
    wait_for_all()  # what this process is about to save there counts
    url = url_of(path)
    if url is None:
        return _resolve(Path(path), on_corrupt)
    parent, _, name = url.rpartition("/")
    store = remote(parent if NAME.fullmatch(name) else url)
    try:
        open_store(store.url).entries()
        return _resolve(store.folder / name if NAME.fullmatch(name) else store.folder, on_corrupt)
    except (CheckpointError, FileNotFoundError) as error:  # which tell of the folder that stands in for the store
        raise type(error)(str(error).replace(str(store.folder), store.url)) from error


def _resolve(path: Path, on_corrupt: Callable[[Path, str], object] | None) -> LoadedCheckpoint:
    directory = path.parent if path.is_file() else path
    if (directory / MANIFEST).is_file() or NAME.fullmatch(directory.name):
        if not directory.is_dir():
            raise FileNotFoundError(f"no checkpoint {path}: {contents(path.parent)}; {_ADVICE}")
        try:
            return open_store(directory.parent).load(directory)
        except CheckpointCorrupt as error:
            raise CheckpointCorrupt(f"{error}; give {directory.parent} to use the newest one that is whole") from error
    failures: list[str] = []

    def passed_over(bad: Path, reason: str) -> None:
        failures.append(reason)
        if on_corrupt is not None:
            on_corrupt(bad, reason)

    with reported(f"{directory} cannot be read", missing=False):
        found = open_store(directory, on_corrupt=passed_over).newest()
    if found is not None:
        return found
    if failures:
        listing = "\n".join(f"  - {reason}" for reason in failures)
        raise CheckpointCorrupt(f"no checkpoint of the run in {directory} is whole:\n{listing}")
    others = [entry.path.name for entry in open_store(directory).entries()]
    if others:
        raise FileNotFoundError(
            f"the run that began last in {directory} has saved nothing; to go on with an earlier one, give one of its "
            f"checkpoints: {', '.join(others[:5])}{', ...' if len(others) > 5 else ''}"
        )
    given = f"{path} is a file, and there is " if path.is_file() else ""
    raise FileNotFoundError(f"{given}no checkpoint in {directory}: {contents(directory)}; {_ADVICE}")
