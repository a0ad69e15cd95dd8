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


def as_losses(values: Any) -> NDArray[np.float64]:
    """Return numbers, an array or a tensor (of any device, with grad) as a float64 array.

    Raises:
        TypeError: Not numbers.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.double().numpy() if hasattr(values, "double") else values
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"losses must be numbers, an array or a tensor, got {type(values).__name__}: {error}"
        ) from error
    if array.dtype.kind not in "fiub":
        raise TypeError(f"losses must be numbers, an array or a tensor, got {type(values).__name__} of {array.dtype}")
    return array.astype(np.float64)
