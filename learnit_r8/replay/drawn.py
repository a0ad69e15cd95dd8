"""Slots that know when they were drawn."""

from __future__ import annotations

from typing import Any

import numpy as np


class DrawnIndices(np.ndarray[Any, np.dtype[np.int64]]):
    """What `sample` returns; slices of it know the same.

    Attributes:
        as_of: Number of experiences that had been added until then.
    """

    as_of: int | None = None

    def __array_finalize__(self, source: Any) -> None:
        self.as_of = getattr(source, "as_of", None)
