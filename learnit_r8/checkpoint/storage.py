"""Files that are hashed as they are written and verified as they are read.

A file's hash is a list of SHA-256 digests, one per block of 16 MiB, so that a large file is hashed by
several threads (hashlib releases the GIL). For a file of one block it is what `sha256sum` prints.

While saving, digests are taken from the bytes read back from the file, and those bytes are compared with
the ones in memory. A short write, a write to the wrong place or a state that changes while it is being
saved is thus found before the checkpoint is committed, and no second pass is needed. What is read back
comes from the page cache: it proves what the operating system accepted, not what the medium holds.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from io import FileIO
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from learnit_r8.errors import CheckpointCorrupt, CheckpointError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

BLOCK = 16 << 20
"""Bytes under one digest."""
PIECE = 1 << 18
"""Bytes read at once: small enough to be still in the CPU's cache when they are hashed and compared."""

Bytes = NDArray[np.uint8]

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
"""What file systems without locks answer."""
_NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
"""What a name is answered with that leads nowhere; one that is no Unicode raises a ValueError."""


class FileSystem:
    """The primitive operations that durability is made of; a subclass can make any of them fail."""

    def make_directory(self, path: Path) -> None:
        """Create one directory."""
        path.mkdir()

    def create(self, path: Path) -> FileIO:
        """Open a new file for writing, unbuffered."""
        return FileIO(path, "xb")

    def write(self, file: FileIO, data: memoryview) -> int:
        """Write some of `data` and return how many bytes."""
        return file.write(data) or 0

    def sync(self, file: FileIO) -> None:
        """Return when the file's bytes are on the medium."""
        if sys.platform == "darwin":
            # fsync leaves the bytes in the drive's cache there.
            fcntl.fcntl(file.fileno(), fcntl.F_FULLFSYNC)
        else:
            os.fsync(file.fileno())

    def sync_file(self, path: Path) -> None:
        """Do the same for a file that somebody else wrote."""
        with FileIO(path, "r+b" if sys.platform == "win32" else "rb") as file:
            self.sync(file)

    def sync_directory(self, path: Path) -> None:
        """Return when the directory's entries are on the medium (Windows has no such call)."""
        if sys.platform != "win32":
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def open(self, path: Path) -> FileIO:
        """Open a file for reading, unbuffered."""
        return FileIO(path, "rb")

    def read(self, file: FileIO, buffer: memoryview) -> int:
        """Fill some of `buffer` and return how many bytes; 0 at the end of the file."""
        return file.readinto(buffer) or 0

    def rename(self, source: Path, target: Path) -> None:
        """Rename, replacing a file (but not a directory with something in it)."""
        source.replace(target)

    def names(self, path: Path) -> list[str]:
        """Return the names in a directory, sorted."""
        return sorted(os.listdir(path))

    def remove(self, path: Path) -> None:
        """Remove a file."""
        path.unlink()

    def remove_directory(self, path: Path) -> None:
        """Remove an empty directory."""
        path.rmdir()

    def lock(self, descriptor: int) -> bool | None:
        """Try to take an exclusive lock for this process.

        Returns:
            True when this process holds it, False when another one does, None where the file
            system has no locks. The system releases it when the process ends, however it ends.
        """
        try:
            if sys.platform == "win32":
                os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # beyond the text, which others must be able to read
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            else:
                # Not flock: children share that, and an orphaned data-loading worker would keep it.
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return None if error.errno in _NO_LOCKS else False
        return True


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a manifest says of one file: its size and the SHA-256 of each block, at least one, in hex."""

    nbytes: int
    sha256: tuple[str, ...]


def write_file(fs: FileSystem, path: Path, segments: Sequence[Bytes], pool: Executor) -> FileRecord:
    """Write the segments one after another, sync, and hash what arrived, while later blocks are written and synced."""
    digests: list[Future[str]] = []
    offset = 0
    with fs.create(path) as file:
        for block in _blocks(segments):
            for piece in block:
                write_all(fs, file, piece.data)
            digests.append(pool.submit(_digest, fs, path, offset, block, compare=True))
            offset += sum(piece.size for piece in block)
        fs.sync(file)
    sha256 = tuple(digest.result() for digest in digests)
    size = path.lstat().st_size
    if size != offset:
        raise CheckpointCorrupt(f"{path}: has {size} bytes after {offset} were written")
    return FileRecord(offset, sha256)


def hash_file(fs: FileSystem, path: Path, nbytes: int, pool: Executor, into: Bytes | None = None) -> list[Future[str]]:
    """Start to hash a file's first `nbytes` bytes, and to read them `into` an array; return digests, block by block.

    A digest's `result()` raises CheckpointCorrupt where the file ends early, OSError where a read fails.
    """
    blocks = [(offset, min(BLOCK, nbytes - offset)) for offset in range(0, max(nbytes, 1), BLOCK)]
    if into is None:
        return [pool.submit(_discard_digest, fs, path, *block) for block in blocks]
    return [pool.submit(_digest, fs, path, at, [into[at : at + size]], compare=False) for at, size in blocks]


def regular_size(root: Path, name: str) -> int:
    """Return the size of the regular file `name` (posix style, relative) below `root`, reached through no link."""
    parts = PurePosixPath(name).parts
    if name != "/".join(parts) or not parts or {"..", "/", "."} & set(parts) or "\\" in name or "\0" in name:
        raise CheckpointCorrupt(f"{root}: the manifest names {name!r}, which is not a plain path inside the checkpoint")
    path = root
    if ":" in name and path.joinpath(*parts).drive != path.drive:
        raise CheckpointCorrupt(f"{root}: the manifest names {name!r}, which is on another drive")
    for part in parts:
        path = path / part
        try:
            info = path.lstat()
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_FILE:
                raise
            raise CheckpointCorrupt(f"{root}: {name:.80} is missing") from error
        if stat.S_ISLNK(info.st_mode):
            raise CheckpointCorrupt(f"{root}: {name} is reached through a symbolic link; only real files are read")
    if not stat.S_ISREG(info.st_mode):
        raise CheckpointCorrupt(f"{root}: {name} is not a regular file")
    return info.st_size


def walk_files(fs: FileSystem, root: Path, below: str = "") -> Iterator[str]:
    """Yield the relative posix names of all files below `root`, in order; anything else there is an error."""
    for entry in fs.names(root / below):
        name = f"{below}/{entry}" if below else entry
        mode = (root / name).lstat().st_mode
        if stat.S_ISDIR(mode):
            yield from walk_files(fs, root, name)
        elif stat.S_ISREG(mode):
            yield name
        else:
            raise CheckpointError(f"{name} is a link or a device; a checkpoint holds regular files only: write a copy")


def remove_tree(fs: FileSystem, path: Path) -> None:
    """Remove a file, or a directory and all that is in it; links are removed, never followed."""
    if stat.S_ISDIR(path.lstat().st_mode):
        for name in fs.names(path):
            remove_tree(fs, path / name)
        fs.remove_directory(path)
    else:
        fs.remove(path)


def write_all(fs: FileSystem, file: FileIO, data: memoryview) -> None:
    """Write until everything is written."""
    while data:
        written = fs.write(file, data)
        if written <= 0:
            raise OSError(errno.EIO, "the file system accepts no more bytes", file.name)
        data = data[written:]


def _blocks(segments: Sequence[Bytes]) -> Iterator[list[Bytes]]:
    """Cut the concatenated segments into blocks of `BLOCK` bytes (the last one shorter, or empty)."""
    block: list[Bytes] = []
    room = BLOCK
    for segment in segments:
        rest = segment
        while rest.size:
            block.append(rest[:room])
            room -= block[-1].size
            rest = rest[block[-1].size :]
            if not room:
                yield block
                block, room = [], BLOCK
    if block or not any(segment.size for segment in segments):
        yield block


def _digest(fs: FileSystem, path: Path, offset: int, block: Iterable[Bytes], *, compare: bool) -> str:
    """Read one block: into `block`, or with `compare` beside it, to be compared with it."""
    sha256 = hashlib.sha256()
    scratch = np.empty(PIECE, np.uint8) if compare else None
    with fs.open(path) as file:
        file.seek(offset)
        for segment in block:
            for start in range(0, segment.size, PIECE):
                piece = segment[start : start + PIECE]
                target = piece if scratch is None else scratch[: piece.size]
                read_all(fs, file, target.data, path)
                sha256.update(target.data)
                if scratch is not None and not _same(target, piece):
                    raise CheckpointCorrupt(
                        f"{path}: the bytes read back differ from those in memory: either the disk is failing "
                        "or the state was changed by another thread while it was being saved"
                    )
    return sha256.hexdigest()


def _same(one: Bytes, other: Bytes) -> bool:
    if one.size % 8 == 0:  # whole words are compared in half the time
        return np.array_equal(one.view(np.uint64), other.view(np.uint64))
    return np.array_equal(one, other)


def _discard_digest(fs: FileSystem, path: Path, offset: int, length: int) -> str:
    scratch = np.empty(min(PIECE, length), np.uint8)
    pieces = (scratch[: min(PIECE, length - start)] for start in range(0, length, PIECE))
    return _digest(fs, path, offset, pieces, compare=False)


def read_all(fs: FileSystem, file: FileIO, buffer: memoryview, path: Path) -> None:
    """Read until the buffer is full."""
    while buffer:
        count = fs.read(file, buffer)
        if count <= 0:
            raise CheckpointCorrupt(f"{path}: ends early")
        buffer = buffer[count:]
