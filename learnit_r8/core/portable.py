"""States as plain data: what `state_dict()` returns can be saved with anything and loaded with nothing imported.

`torch.load` refuses numpy arrays unless it is told to trust the file, and JSON has none. So

* stand-alone samplers of up to `JSON_SIZE` samples, and curricula of any size, give lists: JSON;
* all other arrays become `{"$array": [dtype, shape, base64 text, ...]}` when they are pickled,
  which is what `torch.save` does. Until then they are arrays.

`unpacked` takes that back, so every `load_state_dict` takes both forms.
"""

from __future__ import annotations

import base64
import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.errors import CheckpointError

_ARRAY, _SCALAR = "$array", "$scalar"
_PIECE = 48 << 20
"""Bytes in one text: pickle's older protocols end at 4 GiB. A multiple of 3, so that pieces need no padding."""

JSON_SIZE = 100_000
"""Largest array that a sampler's state has as a list: with millions of numbers text takes seconds."""


class PortableArray(np.ndarray[Any, Any]):
    """An array that is pickled as plain data."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not _is_plain(self.dtype):
            return super().__reduce_ex__(protocol)
        return OrderedDict, (list(_packed_array(self).items()),)


def portable(tree: Any, as_json: int = 0) -> Any:
    """Return a nested state whose arrays are pickled as plain data; nothing is copied but the nesting.

    Args:
        tree: Dicts, lists and tuples of anything.
        as_json: Arrays of up to this many numbers become lists, and numpy's scalars Python's.
    """

    def leaf(value: Any) -> Any:
        if isinstance(value, np.generic) and _is_plain(value.dtype):
            return value.item() if as_json else {_SCALAR: _packed_array(np.asarray(value))[_ARRAY]}
        if not isinstance(value, np.ndarray):
            return value
        return value.tolist() if as_json and value.size <= as_json else np.asarray(value).view(PortableArray)

    return _mapped(tree, leaf)


def unpacked(tree: Any) -> Any:
    """Return the state with ordinary arrays.

    Raises:
        CheckpointError: The text of an array is damaged.
    """
    if isinstance(tree, Mapping) and len(tree) == 1:
        if _ARRAY in tree:
            return _unpacked_array(tree[_ARRAY])
        if _SCALAR in tree:
            return _unpacked_array(tree[_SCALAR])[()]
    return _mapped(tree, lambda value: np.asarray(value) if type(value) is PortableArray else value, unpacked)


def _mapped(tree: Any, leaf: Callable[[Any], Any], back: Callable[[Any], Any] | None = None) -> Any:
    """Apply `leaf` to all but dicts, lists and tuples; what needs no change is returned as it is."""

    def inner(value: Any) -> Any:
        if value is None or type(value) in (int, float, str, bool):
            return value
        return back(value) if back is not None else _mapped(value, leaf)

    if type(tree) in (dict, OrderedDict):
        return type(tree)((key, inner(value)) for key, value in tree.items())
    if type(tree) is list:
        return [inner(value) for value in tree]
    if isinstance(tree, tuple):
        items = [inner(value) for value in tree]
        if all(map(operator.is_, items, tree)):
            return tree
        return tree._make(items) if hasattr(tree, "_make") else tuple(items)
    return leaf(tree)


def owned(state: Any) -> Any:
    """Return an unpickled state whose arrays can be written, changed in place.

    Ray, joblib and dask hand arrays over in memory that they share, and that nobody may write into. Objects of ours
    are looked into; those with a `__setstate__` have done it themselves.
    """
    seen: dict[int, Any] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return value if _can_be_written(value) else seen.setdefault(id(value), value.copy())
        if type(value) is list:
            value[:] = map(walk, value)
        elif type(value) is dict:
            value.update({key: walk(item) for key, item in value.items()})
        elif id(value) not in seen and _is_ours(value):
            seen[id(value)] = value
            walk(getattr(value, "__dict__", {}))
        return value

    return walk(state)


def _is_ours(value: Any) -> bool:
    return type(value).__module__.startswith("learnit_r8.") and not hasattr(value, "__setstate__")


def _can_be_written(array: NDArray[Any]) -> bool:
    if array.flags.writeable:
        return True
    try:
        array.flags.writeable = True
    except ValueError:  # the memory is another's
        return False
    array.flags.writeable = False  # as its owner wanted it
    return True


def _is_plain(dtype: np.dtype[Any]) -> bool:
    """Whether the dtype's text says all there is to say of it: not of objects, nor of other packages' dtypes."""
    return not dtype.hasobject and dtype.fields is None and np.dtype(dtype.str) == dtype


def _packed_array(array: NDArray[Any]) -> dict[str, Any]:
    if not _is_plain(array.dtype):
        raise CheckpointError(f"an array of dtype {array.dtype} cannot be saved: convert it to one of numpy's numbers")
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8) if array.size else np.zeros(0, np.uint8)
    pieces = [base64.b64encode(raw[k : k + _PIECE].data).decode("ascii") for k in range(0, len(raw), _PIECE)]
    return {_ARRAY: [array.dtype.str, list(array.shape), *pieces]}


def _unpacked_array(entry: Any) -> NDArray[Any]:
    try:
        text, shape, *pieces = entry
        dtype = np.dtype(text)
        raw = bytearray().join(base64.b64decode(piece, validate=True) for piece in pieces)
        return np.frombuffer(raw, dtype).reshape(shape)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"the state is damaged, an array cannot be read: {error}") from error
