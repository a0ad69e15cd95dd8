"""URLs of object stores where a path is expected."""

from __future__ import annotations

import os
import re
from pathlib import Path

from learnit_r8.errors import ConfigError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)")  # a Path has swallowed the second slash; a drive has one letter


def url_of(path: str | Path) -> str | None:
    """Return the URL that a path is, in one spelling, or None where it is a folder of this machine."""
    found = _URL.fullmatch(str(path))
    return f"{found[1]}://{found[2].rstrip('/')}" if found else None


def local(path: str | Path, name: str) -> Path:
    """Return a path of this machine; a URL, of which a folder would be made, is refused by the argument's name."""
    if url := url_of(path):
        raise ConfigError([f"{name} must be a path of this machine, got {url}: write here, and copy the file there"])
    return Path(path)


class UrlPath(type(Path())):  # type: ignore[misc]
    """A URL as a path: its text has both slashes."""

    def __str__(self) -> str:
        return url_of(super().__str__().replace("\\", "/")) or ""

    def __fspath__(self) -> str:
        return str(self)


def settled(path: str | None) -> str | None:
    """Return a URL as it is, and a folder's path as one that does not change with the working directory."""
    return path if path is None or url_of(path) else os.path.abspath(path)
