"""Writes the files of one checkpoint into its directory: the user's model, the state, at last the manifest.

The user's function runs where the model stands between two steps. All else may be done by another thread later.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from learnit_r8.checkpoint.manifest import ARRAYS, MANIFEST, STATE, Manifest, manifest_bytes
from learnit_r8.checkpoint.storage import (
    Bytes,
    FileRecord,
    FileSystem,
    hash_file,
    regular_size,
    walk_files,
    write_file,
)
from learnit_r8.errors import CheckpointError

_THREADS = min(4, os.cpu_count() or 1)


Later = Callable[[], object]
"""The rest of a user's function: it writes a copy that was made at the step boundary."""


@contextmanager
def hashing_threads() -> Iterator[Executor]:
    """Give threads for hashing; what has not begun at the end is dropped."""
    here = threading.current_thread() is threading.main_thread()
    if not here or not threading.main_thread().is_alive():
        yield _AtOnce()  # in the background the cores are the training's; a program that ends starts no threads
        return
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="r8-hash")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


class _AtOnce(Executor):
    """Does the work itself."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(function(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done


def fill(fs: FileSystem, root: Path, text: bytes, segments: list[Bytes], later: Later | None) -> dict[str, FileRecord]:
    """Write and sync every file but the manifest, into a directory that holds what the user's function has written."""
    if later is not None:
        call_writer(later)
    with hashing_threads() as pool:
        files = _adopt(fs, root, pool)
        files[ARRAYS] = write_file(fs, root / ARRAYS, segments, pool)
        files[STATE] = write_file(fs, root / STATE, [np.frombuffer(text, np.uint8)], pool)
    return files


def _adopt(fs: FileSystem, root: Path, pool: Executor) -> dict[str, FileRecord]:
    """Sync and hash the user's files."""
    names = list(walk_files(fs, root))
    taken = sorted({MANIFEST, STATE, ARRAYS} & set(names))
    if taken:
        raise CheckpointError(f"the callback wrote {taken[0]}, a name that the checkpoint needs: choose another")
    sizes = {name: regular_size(root, name) for name in names}
    hashes = {name: hash_file(fs, root / name, size, pool) for name, size in sizes.items()}
    for name in names:
        fs.sync_file(root / name)
    for directory in {parent for name in names for parent in (root / name).parents if root in parent.parents}:
        fs.sync_directory(directory)
    return {name: FileRecord(sizes[name], tuple(block.result() for block in hashes[name])) for name in names}


def write_manifest(fs: FileSystem, root: Path, manifest: Manifest) -> None:
    """Write and sync the manifest, which makes the directory a checkpoint."""
    raw = np.frombuffer(manifest_bytes(manifest), np.uint8)
    with hashing_threads() as pool:
        write_file(fs, root / MANIFEST, [raw], pool)
    fs.sync_directory(root)


def call_writer(write: Callable[..., object], *args: Any) -> Later | None:
    """Call the user's function, or the rest of it; return what is left. That it failed is a CheckpointError."""
    try:
        result = write(*args)
    except CheckpointError:  # it says what is wrong itself
        raise
    except Exception as error:
        raise CheckpointError(f"the save callback raised {type(error).__name__}: {error}") from error
    if result is False or (isinstance(result, np.bool_) and not result):
        raise CheckpointError("the save callback returned False")
    return result if isinstance(result, partial) else None


@contextmanager
def reported(what: str, *, missing: bool = True) -> Iterator[None]:
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
