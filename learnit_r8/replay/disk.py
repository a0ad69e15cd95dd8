"""A replay buffer in one file: written whole or not at all, checked when it is read.

    line      "learnit_r8 replay 1"
    record    length of JSON, length of arrays (little-endian uint64), SHA-256 of both, JSON, arrays
    ...       the first has the buffer's state, others the experiences where these are objects
    end       a record of length 0 and 0

JSON and arrays are those of a checkpoint (`checkpoint/state_codec.py`); nothing is unpickled. A
file is written beside its name and renamed when it is on the medium, so whoever is killed leaves
the older one.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from learnit_r8.checkpoint.state_codec import decode, encode
from learnit_r8.checkpoint.storage import FileSystem, write_all
from learnit_r8.core.urls import local
from learnit_r8.errors import CheckpointCorrupt, CheckpointError
from learnit_r8.replay.trees import is_tensor, to_numpy, to_torch

_MAGIC = b"learnit_r8 replay 1\n"
_HEAD = struct.Struct("<QQ32s")
_CHUNK = 4096
"""Objects in one record: its JSON stays small."""
_TENSOR, _BYTES = "$tensor", "$bytes"
_SUFFIX = ".partial"
_ours: set[Path] = set()
"""What this process is writing."""


def write(path: str | Path, state: dict[str, Any], fs: FileSystem | None = None) -> None:
    """Write a buffer's state; a file of this name is replaced once the new one is complete."""
    fs, path = fs or FileSystem(), local(path, "path")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(fs, path)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}{_SUFFIX}")
    _ours.add(partial)
    try:
        with fs.create(partial) as file:
            fs.lock(file.fileno())  # tells others that somebody is writing it
            write_all(fs, file, memoryview(_MAGIC))
            for record in _records(state):
                text, segments = encode(record)
                digest = hashlib.sha256(text)
                for segment in segments:
                    digest.update(segment.data)
                lengths = len(text), sum(segment.size for segment in segments)
                write_all(fs, file, memoryview(_HEAD.pack(*lengths, digest.digest()) + text))
                for segment in segments:
                    write_all(fs, file, segment.data)
            write_all(fs, file, memoryview(_HEAD.pack(0, 0, bytes(32))))
            fs.sync(file)
        fs.rename(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            fs.remove(partial)
        raise
    finally:
        _ours.discard(partial)
    fs.sync_directory(path.parent)


def read(path: str | Path) -> dict[str, Any]:
    """Return the state that `write` wrote, checked to the last byte."""
    path = local(path, "path")
    size = path.stat().st_size
    raw = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
    if raw[: len(_MAGIC)].tobytes() != _MAGIC:
        raise CheckpointCorrupt(f"{path} is no replay buffer of this version: it does not begin with {_MAGIC!r}")
    records = list(_checked(path, raw))
    if not records:
        raise CheckpointCorrupt(f"{path} is empty")
    state, *others = (decode(text, arrays) for text, arrays in records)
    if others:
        held = [_restored(item) for other in others for item in other["objects"]]
        _objects_of(state)["experiences"] = held
    return state


def _checked(path: Path, raw: np.ndarray[Any, Any]) -> Iterator[tuple[bytes, np.ndarray[Any, Any]]]:
    at = len(_MAGIC)
    while at + _HEAD.size <= raw.size:
        text, arrays, digest = _HEAD.unpack(raw[at : at + _HEAD.size].tobytes())
        at += _HEAD.size
        if not text:
            return
        end = at + text + arrays
        if end > raw.size or hashlib.sha256(raw[at:end].data).digest() != digest:
            raise CheckpointCorrupt(f"{path} is damaged: the record at byte {at} is not what was written")
        yield raw[at : at + text].tobytes(), raw[at + text : end]
        at = end
    raise CheckpointCorrupt(f"{path} ends early")


def _records(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    holder = _objects_of(state)
    experiences = holder.get("experiences")
    if not isinstance(experiences, list):
        yield state
        return
    without = {**holder, "experiences": None}
    yield without if holder is state else {**state, "experiences": without}
    for first in range(0, max(len(experiences), 1), _CHUNK):
        part = experiences[first : first + _CHUNK]
        yield {"objects": [_plain(item, f"experience {first + k}") for k, item in enumerate(part)]}


def _objects_of(state: dict[str, Any]) -> dict[str, Any]:
    inner = state.get("experiences")
    return inner if isinstance(inner, dict) else state


def _plain(value: Any, where: str) -> Any:
    """Return an object as what the codec holds; what would come back as something else is refused."""
    if is_tensor(value):
        return {_TENSOR: [str(value.dtype), to_numpy(value)]}
    if type(value) is bytes:
        return {_BYTES: np.frombuffer(value, np.uint8)}
    if type(value) in (list, tuple):
        return type(value)(_plain(item, where) for item in value)
    if type(value) is dict:
        return {key: _plain(item, where) for key, item in value.items()}
    plain = type(value) in (bool, int, float, str) or isinstance(value, np.generic)
    if isinstance(value, (tuple, list, dict, int, float, str)) and not plain:
        raise CheckpointError(
            f"{where} has a {type(value).__qualname__}, which would come back as another type: give a plain "
            "tuple, list, dict or number, or pickle the buffer"
        )
    return value


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        if len(value) == 1 and _TENSOR in value:
            dtype, array = value[_TENSOR]
            return to_torch(array, dtype)
        if len(value) == 1 and _BYTES in value:
            return value[_BYTES].tobytes()
        return {key: _restored(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_restored, value))
    return np.array(value) if isinstance(value, np.ndarray) else value  # not a view of the file


def _remove_stale(fs: FileSystem, path: Path) -> None:
    """Remove what writers that were killed have left: nobody holds its lock."""
    left: Iterable[Path] = path.parent.glob(f"{path.name.replace('[', '[[]')}.*{_SUFFIX}")
    for other in set(left) - _ours:  # a process is granted what it has locked itself
        with contextlib.suppress(OSError), other.open("r+b") as file:
            if fs.lock(file.fileno()):
                fs.remove(other)
