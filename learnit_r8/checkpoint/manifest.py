"""manifest.json: what a checkpoint says of itself, in one spelling and hashed in itself.

The text is compared with a fresh rendering of what was parsed from it, so that not even a changed blank
goes unnoticed, and no key can be there twice.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from learnit_r8.checkpoint.state_codec import MAX_JSON, strict_json
from learnit_r8.checkpoint.storage import BLOCK, FileRecord, FileSystem, read_all, regular_size
from learnit_r8.errors import CheckpointCorrupt, CheckpointError

SCHEMA = 2
"""Version of the layout on disk; 1 did not say which run wrote a checkpoint."""
FORMAT = "learnit_r8 checkpoint"
MANIFEST, STATE, ARRAYS, MODEL = "manifest.json", "state.json", "arrays.bin", "model"
MAX_MANIFEST = 64 << 20
"""Bytes: room for 200,000 files or a model of 10 TB."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        step: Global step that it was saved at.
        serial: Grows from save to save, and so gives the order of the checkpoints in a directory.
        tag: The caller's word for it, such as "final".
        version: Version of the library that wrote it.
        files: One record per file, by relative posix name.
        run: Id of the run that wrote it; "" where that is not known.
    """

    step: int
    serial: int
    tag: str
    version: str
    files: Mapping[str, FileRecord]
    run: str = ""

    @property
    def nbytes(self) -> int:
        """Size of all files but the manifest."""
        return sum(record.nbytes for record in self.files.values())

    @property
    def holds_model(self) -> bool:
        """Whether there is more in it than the run's own state."""
        return bool(self.files.keys() - {STATE, ARRAYS})


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

    @property
    def holds_model(self) -> bool:
        """Whether `write_model` wrote anything."""
        return self.manifest.holds_model


def manifest_bytes(manifest: Manifest) -> bytes:
    """Return the text of manifest.json: the one and only spelling of its content, hashed in itself."""
    body: dict[str, Any] = {
        "format": FORMAT,
        "schema": SCHEMA if manifest.run else 1,
        "step": manifest.step,
        "serial": manifest.serial,
        "tag": manifest.tag,
        "version": manifest.version,
        "files": {name: {"bytes": r.nbytes, "sha256": list(r.sha256)} for name, r in manifest.files.items()},
    }
    if manifest.run:
        body["run"] = manifest.run
    return _sealed(body)


def read_manifest(fs: FileSystem, root: Path) -> Manifest:
    """Read and check a checkpoint's manifest; its files are not looked at."""
    name = f"{root / MANIFEST}"
    if not root.is_dir():
        raise CheckpointError(f"there is no checkpoint {root}: {contents(root.parent)}")
    size = regular_size(root, MANIFEST)
    if size > MAX_MANIFEST:
        raise CheckpointCorrupt(f"{name}: {size:,} bytes, at most {MAX_MANIFEST:,} make sense")
    buffer = np.empty(size, np.uint8)
    with fs.open(root / MANIFEST) as file:
        read_all(fs, file, buffer.data, root / MANIFEST)
    raw = buffer.tobytes()
    data = strict_json(raw, name)
    body = data.get("manifest") if isinstance(data, dict) else None
    if not isinstance(body, dict) or raw != _sealed(body):
        raise CheckpointCorrupt(f"{name} is damaged: its own SHA-256 does not match")
    schema = body.get("schema")
    if body.get("format") != FORMAT or type(schema) is not int or schema < 1:
        raise CheckpointCorrupt(f"{name} is not a manifest of a {FORMAT}")
    if schema > SCHEMA:
        raise CheckpointError(
            f"{root} was written by a newer version of learnit_r8 ({body.get('version')!s:.40}, schema {schema}; "
            f"this one reads schema {SCHEMA}): upgrade learnit_r8 to load it"
        )
    return _checked_manifest(body, name)


def _checked_manifest(body: Mapping[str, Any], name: str) -> Manifest:
    files = body.get("files")
    expected = {"format": str, "schema": int, "step": int, "serial": int, "tag": str, "version": str, "files": dict}
    if body["schema"] > 1:
        expected["run"] = str
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
    return Manifest(body["step"], body["serial"], body["tag"], body["version"], records, body.get("run", ""))


def _sealed(body: Mapping[str, Any]) -> bytes:
    digest = hashlib.sha256(_spelled(body).encode()).hexdigest()
    return _spelled({"manifest": body, "sha256": digest}).encode()


def _spelled(data: Mapping[str, Any]) -> str:
    return json.dumps(data, allow_nan=False, indent=1, sort_keys=True) + "\n"


def contents(directory: Path) -> str:
    """Describe a directory in which something was looked for in vain."""
    if not directory.exists():
        return f"{directory} does not exist"
    if not directory.is_dir():
        return f"{directory} is not a directory"
    names = sorted(os.listdir(directory))
    listing = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    return f"{directory} contains {listing}" if names else f"{directory} is empty"
