"""Keys of items: what means the same is one key, and every key can be saved."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

from learnit_r8.core.state import Kind

_PLAIN = (str, int, float, bool, bytes, type(None))
_TUPLE, _BYTES, _INFINITE = "tuple", "bytes", "float"


def plain_key(key: Any) -> Hashable:
    """Return a key as Python's own value: an element of an array or a tensor as its number, tuples in depth."""
    if type(key) in _PLAIN:
        if key != key:
            raise TypeError("NaN is no key: it equals nothing, not even itself")
        return key  # type: ignore[no-any-return]
    if isinstance(key, tuple):
        return tuple(map(plain_key, key))
    if callable(getattr(key, "item", None)) and getattr(key, "shape", None) == ():
        return plain_key(key.item())
    if isinstance(key, str):  # numpy's text, an enumeration's member; likewise below
        return str.__str__(key)
    if isinstance(key, bytes):
        return bytes(key)
    if isinstance(key, (int, float)):
        return int(key) if isinstance(key, int) else float(key)
    raise TypeError(
        f"a key is a text, a number, bytes, None, a tuple of those, or one element of an array or a tensor, got "
        f"{type(key).__qualname__}: use its name or its number"
    )


def key_to_json(key: Hashable) -> Any:
    """Return a plain key as JSON data."""
    if isinstance(key, tuple):
        return {_TUPLE: [key_to_json(part) for part in key]}
    if isinstance(key, float) and math.isinf(key):  # which JSON does not know
        return {_INFINITE: str(key)}
    return {_BYTES: key.hex()} if isinstance(key, bytes) else key


def key_from_json(saved: Any) -> Hashable:
    """Return the key that `key_to_json` got."""
    if not isinstance(saved, dict):
        return plain_key(saved)
    ((kind, value),) = saved.items()
    if kind == _INFINITE:
        return float(value)
    return tuple(map(key_from_json, value)) if kind == _TUPLE else bytes.fromhex(value)


KEY = Kind(lambda _, key: key_to_json(key), lambda _, saved: key_from_json(saved))
"""How a key is saved."""
