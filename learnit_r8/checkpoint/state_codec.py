"""A nested state as strict JSON plus one run of raw little-endian array bytes, exact in both directions.

What JSON lacks is an object with one key that starts with "$":

| Python | JSON |
|---|---|
| nan, inf, -inf | `{"$float": "nan"}` |
| tuple | `{"$tuple": [...]}` |
| numpy array | `{"$array": ["<f4", [3, 2], 128]}`: dtype, shape, offset; C order |
| numpy scalar | `{"$scalar": ["<i8", [], 192]}` |
| dict key that starts with "$" | the key with one more "$" in front |
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.portable import PortableArray
from learnit_r8.errors import CheckpointCorrupt, CheckpointError

ALIGNMENT = 64
"""Arrays start at multiples of this: a cache line, and a multiple of every item size."""
MAX_JSON = 64 << 20
"""Largest state.json in bytes: numbers by the million belong into arrays."""
MAX_DEPTH = 100
MAX_DIMENSIONS = 32
"""numpy 1's own limit."""
DTYPES = {
    text: np.dtype(text)
    for text in ("|b1", "|i1", "<i2", "<i4", "<i8", "|u1", "<u2", "<u4", "<u8", "<f2", "<f4", "<f8", "<c8", "<c16")
}
"""The dtypes with one meaning everywhere: no objects, records, strings, dates or long doubles."""

_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode(state: Mapping[str, Any]) -> tuple[bytes, list[NDArray[np.uint8]]]:
    """Return the JSON text (UTF-8) and the array bytes, to be written one after another.

    Contiguous little-endian arrays are not copied: the segments are views of the caller's memory. Big-endian ones are
    stored, and come back, little-endian. Of what cannot be stored a CheckpointError says where it is.
    """
    if not isinstance(state, Mapping):
        raise CheckpointError(f"a state is a dict with str keys, not {_describe(state)}")
    encoder = _Encoder()
    plain = encoder.encode(dict(state), "state", 0)
    try:
        text = json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except ValueError as error:
        # A lone surrogate, or an int of more digits than Python converts.
        raise CheckpointError(f"a str or int in the state has no JSON form: {error}") from error
    if len(text) > MAX_JSON:
        raise CheckpointError(
            f"the state without its arrays takes {len(text):,} bytes of JSON and {MAX_JSON:,} are allowed: "
            "turn long lists of numbers into numpy arrays"
        )
    return text, encoder.segments


def decode(text: bytes, arrays: NDArray[np.uint8]) -> dict[str, Any]:
    """Return the state that `encode` made `text` and `arrays` from; CheckpointCorrupt: it would not have written that.

    Its arrays are writable views of `arrays`, so that a large catalog is in memory only once.
    """
    decoder = _Decoder(arrays)
    state = decoder.decode(strict_json(text, "state.json"), 0)
    if not isinstance(state, dict):
        raise CheckpointCorrupt(f"state.json holds {_describe(state)} where a state is expected")
    if decoder.end != arrays.size:
        raise CheckpointCorrupt(f"state.json accounts for {decoder.end} of the {arrays.size} bytes of arrays")
    return state


def strict_json(text: bytes, name: str) -> Any:
    """Parse JSON as the standard has it: UTF-8, finite numbers, no key twice in one object; `name` is what to blame."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            raise CheckpointCorrupt(f"{name} has the key {next(k for k in keys if keys.count(k) > 1)!r} twice")
        return result

    def refuse(literal: str) -> NoReturn:
        raise CheckpointCorrupt(f"{name} holds {literal}, which strict JSON lacks")

    def finite(literal: str) -> float:
        value = float(literal)
        return value if math.isfinite(value) else refuse(literal)

    try:
        return json.loads(text.decode(), object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise CheckpointCorrupt(f"{name} is not JSON: {error}") from error


class _Encoder:
    def __init__(self) -> None:
        self.segments: list[NDArray[np.uint8]] = []
        self.offset = 0

    def encode(self, value: Any, where: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise CheckpointError(f"{where[:80]}... is nested deeper than {MAX_DEPTH} levels; does it contain itself?")
        if isinstance(value, np.generic):
            return {"$scalar": self._store(np.asarray(value), where)}
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$float": str(float(value))}
        if isinstance(value, (list, tuple)):
            items = [self.encode(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
            return {"$tuple": items} if isinstance(value, tuple) else items
        if isinstance(value, Mapping):
            return {
                self._key(key, where): self.encode(item, f"{where}[{key!r}]", depth + 1) for key, item in value.items()
            }
        if type(value) in (np.ndarray, np.memmap, PortableArray):
            return {"$array": self._store(value, where)}
        raise CheckpointError(
            f"{where} is {_describe(value)}, which a checkpoint cannot hold: use None, bool, int, float, str, "
            "list, tuple, dict or a numpy array of numbers"
        )

    def _key(self, key: Any, where: str) -> str:
        if not isinstance(key, str):
            raise CheckpointError(f"{where} has the key {key!r}: keys are str, use {str(key)!r}")
        return f"${key}" if key.startswith("$") else key

    def _store(self, array: NDArray[Any], where: str) -> list[Any]:
        dtype = array.dtype.newbyteorder("<")
        if dtype.str not in DTYPES or dtype.fields is not None:
            raise CheckpointError(f"{where} has dtype {array.dtype}, which is not stored: use one of {list(DTYPES)}")
        raw = np.asarray(array, dtype=dtype, order="C").reshape(-1).view(np.uint8)
        padding = -self.offset % ALIGNMENT
        self.segments += [np.zeros(padding, np.uint8)] * bool(padding)
        offset = self.offset + padding
        self.segments.append(raw)
        self.offset = offset + raw.size
        return [dtype.str, list(array.shape), offset]


class _Decoder:
    def __init__(self, arrays: NDArray[np.uint8]) -> None:
        self.arrays = arrays
        self.end = 0

    def decode(self, value: Any, depth: int) -> Any:
        if depth > MAX_DEPTH + 1:
            raise CheckpointCorrupt(f"state.json is nested deeper than {MAX_DEPTH} levels")
        if isinstance(value, list):
            return [self.decode(item, depth + 1) for item in value]
        if not isinstance(value, dict):
            return value
        if len(value) == 1:
            ((key, item),) = value.items()
            match key:
                case "$array":
                    return self._array(item)
                case "$scalar":
                    array = self._array(item)
                    if array.shape != ():
                        raise CheckpointCorrupt(f"state.json: a scalar has the shape {list(array.shape)}")
                    return array[()]
                case "$tuple" if isinstance(item, list):
                    return tuple(self.decode(part, depth + 1) for part in item)
                case "$float" if isinstance(item, str) and item in _SPECIAL:
                    return _SPECIAL[item]
                case "$tuple" | "$float":
                    raise CheckpointCorrupt(f"state.json: no {key[1:]} is written as {item!r:.80}")
        return {self._key(key): self.decode(item, depth + 1) for key, item in value.items()}

    def _key(self, key: str) -> str:
        if not key.startswith("$"):
            return key
        if not key.startswith("$$"):
            raise CheckpointCorrupt(f"state.json has the unknown marker {key!r}")
        return key[1:]

    def _array(self, entry: Any) -> NDArray[Any]:
        if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[0], str) or entry[0] not in DTYPES:
            raise CheckpointCorrupt(
                f"state.json: {entry!r:.80} is not [dtype, shape, offset] with one of {list(DTYPES)}"
            )
        dtype, shape, offset = DTYPES[entry[0]], entry[1], entry[2]
        if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
            raise CheckpointCorrupt(f"state.json: {shape!r:.80} is not the shape of an array")
        # Offsets say nothing that the order does not: no overlap, no hole and no jump can be expressed.
        start = self.end + -self.end % ALIGNMENT
        stop = start + math.prod(shape) * dtype.itemsize
        if not _is_size(offset) or offset != start:
            raise CheckpointCorrupt(f"state.json: an array begins at {offset!r:.80} where {start} is next")
        if stop > self.arrays.size:
            raise CheckpointCorrupt(
                f"state.json: an array of {stop - start} bytes, {self.arrays.size - start} are left in arrays.bin"
            )
        self.end = stop
        raw = self.arrays[start:stop]
        if dtype == np.bool_ and raw.size and raw.max() > 1:
            raise CheckpointCorrupt("arrays.bin: a bool array holds something other than 0 and 1")
        try:
            return raw.view(dtype).reshape(shape)
        except (ValueError, OverflowError) as error:
            raise CheckpointCorrupt(f"state.json: no array has the shape {shape!r:.80}: {error}") from error


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _describe(value: Any) -> str:
    return f"a {type(value).__module__}.{type(value).__qualname__}".replace("builtins.", "")
