"""Folders of an object store (`s3://bucket/run`, `gs://`, `memory://`, ...), through fsspec.

A folder of this machine stands in for one: what is written there is copied to the store file by file, and what is
read is copied from it first. A store neither renames nor locks. So a checkpoint exists there where its manifest does,
which is written last and removed first, and all its bytes are compared with that when they are read.
"""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from learnit_r8.checkpoint.manifest import MANIFEST
from learnit_r8.core.urls import UrlPath, url_of
from learnit_r8.errors import CheckpointError, ConfigError


def check(name: str, url: str) -> None:
    """Raise a ConfigError where fsspec, or its part for a URL's kind of store, is not installed."""
    protocol = url.split(":")[0]
    try:
        importlib.import_module("fsspec").get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        reason = (
            f"{name}={url!r} is the URL of an object store: pip install 'learnit_r8[remote]' and what fsspec needs for "
            f"{protocol}:// (s3fs, gcsfs, adlfs, ...), or give a folder that this machine has mounted ({error})"
        )
        raise ConfigError([reason]) from error


class Remote:
    """One folder of a store, and the folder of this machine that stands in for it.

    Where the store does not answer, the methods raise CheckpointError.

    Args:
        url: As `url_of` returns it.

    Attributes:
        url: As given.
        folder: What stands in for it; removed when the program ends.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.folder = Path(tempfile.mkdtemp(prefix="r8-")).resolve()
        weakref.finalize(self, _remove, self.folder, os.getpid())
        self._sent: dict[str, tuple[int, int]] = {}  # what the store has: nanoseconds of the last change, and size
        self._opened: tuple[Any, str] | None = None

    @contextmanager
    def _store(self, what: str) -> Iterator[tuple[Any, str]]:
        """Give the file system and the folder's path in it; what goes wrong there is told as one kind of error."""
        try:
            if self._opened is None:
                self._opened = importlib.import_module("fsspec").core.url_to_fs(self.url)
            yield self._opened
        except CheckpointError:
            raise
        except Exception as error:  # each store has its own
            raise CheckpointError(f"{self.url} {what}: {type(error).__name__}: {error}") from error

    def names(self) -> list[str]:
        """Return what lies in the folder."""
        with self._store("cannot be read") as (fs, root):
            fs.invalidate_cache()
            try:
                return sorted({str(name).rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(root, detail=False)})
            except FileNotFoundError:
                return []

    def bring(self, name: str) -> bool:
        """Copy a file from the store to its place in `folder`; return whether it is there."""
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._store("cannot be read") as (fs, root):
            try:
                fs.get_file(f"{root}/{name}", str(target))
            except FileNotFoundError:
                target.unlink(missing_ok=True)
                return False
        self._sent[name] = _stamp(target)
        return True

    def send(self, name: str) -> None:
        """Copy a file of `folder` to the store, unless it has it."""
        source = self.folder / name
        stamp = _stamp(source)
        if self._sent.get(name) == stamp:
            return
        with self._store("cannot be written to") as (fs, root):
            if not getattr(fs, "async_impl", False):  # a file system, whose folders have to be made
                fs.makedirs(f"{root}/{name}".rsplit("/", 1)[0], exist_ok=True)
            fs.put_file(str(source), f"{root}/{name}")
        self._sent[name] = stamp

    def remove(self, name: str) -> None:
        """Remove a checkpoint from the store: its manifest first, without which it is none."""
        with self._store("cannot be written to") as (fs, root):
            fs.invalidate_cache()
            if fs.exists(f"{root}/{name}/{MANIFEST}"):
                fs.rm_file(f"{root}/{name}/{MANIFEST}")
            if fs.exists(f"{root}/{name}"):
                fs.rm(f"{root}/{name}", recursive=True)

    def send_all(self) -> None:
        """Copy what has changed in `folder` to the store; checkpoints, which may lie there too, have their own way."""
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder)
            if path.is_file() and not name.parts[0].startswith((".", "step-")):
                self.send(name.as_posix())

    def bring_all(self) -> None:
        """Copy the files of the folder, not those in folders below it, from the store."""
        for name in self.names():
            with self._store("cannot be read") as (fs, root):
                is_file = fs.isfile(f"{root}/{name}")
            if is_file:
                self.bring(name)


@cache
def remote(url: str) -> Remote:
    """Return the one stand-in of this process for a folder of a store."""
    found = Remote(url)
    _FOLDERS[found.folder] = found
    return found


_FOLDERS: dict[Path, Remote] = {}


def behind(path: Path) -> Remote | None:
    """Return the folder of a store that a folder of this machine stands in for."""
    return _FOLDERS.get(path)


def folder_of(directory: str | Path) -> Path:
    """Return the folder of this machine that is a directory, or stands in for it."""
    url = url_of(directory)
    return Path(directory) if url is None else remote(url).folder


def shown(path: Path) -> Path:
    """Return a path as the user knows it: what lies in a stand-in, by its URL."""
    for folder, store in _FOLDERS.items():
        if path.is_relative_to(folder):
            rest = path.relative_to(folder).as_posix()
            return UrlPath(f"{store.url}/{rest}" if rest != "." else store.url)
    return path


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # in a forked child it is the parent's
        shutil.rmtree(folder, ignore_errors=True)


def _stamp(path: Path) -> tuple[int, int]:
    info = path.stat()
    return info.st_mtime_ns, info.st_size
