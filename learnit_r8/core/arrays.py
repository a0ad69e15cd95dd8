"""Any framework's numbers as numpy arrays, read-only views, and masks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    """Return a view that nobody can write through."""
    view = array.view()
    view.flags.writeable = False
    return view


def in_any(one: NDArray[np.bool_] | None, other: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
    """Return what is true in one of two masks, or None where neither is given."""
    if one is None or other is None:
        return other if one is None else one
    return one | other


def largest(scores: NDArray[Any], k: int) -> NDArray[np.int64]:
    """Return the places of the k largest numbers, the largest first."""
    found = np.argpartition(scores, -k)[-k:] if k > 0 else np.empty(0, np.int64)
    return found[np.argsort(-scores[found], kind="stable")]


def sample_ids(ids: Any, count: int) -> NDArray[np.int64]:
    """Return distinct ids of `count` samples, int64, ascending, from any collection or array of them.

    Raises:
        TypeError: They are no whole numbers.
        ValueError: One is below 0 or not below `count`.
    """
    given = np.atleast_1d(as_array(list(ids) if isinstance(ids, (set, frozenset, range)) else ids))
    if given.ndim != 1 or (given.dtype.kind not in "iu" and given.size):
        raise TypeError(f"ids must be sample ids, whole numbers, got {type(ids).__name__} of {given.dtype}")
    found = np.unique(given.astype(np.int64))
    if len(found) and not 0 <= found[0] <= found[-1] < count:
        wrong = found[0] if found[0] < 0 else found[-1]
        raise ValueError(f"ids must be sample ids from 0 to {count - 1}, got {wrong}")
    return found


def as_array(values: Any) -> NDArray[Any]:
    """Return numbers, an array or a tensor (of any device, with grad) as an array."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def as_losses(values: Any, name: str = "losses") -> NDArray[np.float64]:
    """Return the same as a float64 array of its own; numpy has no bfloat16.

    Raises:
        TypeError: Not numbers.
    """
    try:
        array = as_array(values.double() if hasattr(values, "detach") and hasattr(values, "double") else values)
    except (TypeError, ValueError) as error:
        got = f"{type(values).__name__}: {error}"
        raise TypeError(f"{name} must be numbers, an array or a tensor, got {got}") from error
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":  # that is JAX's and TensorFlow's
        raise TypeError(f"{name} must be numbers, an array or a tensor, got {type(values).__name__} of {array.dtype}")
    return array.astype(np.float64)
