"""What the hybrid buffer hands out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class ReplayItem:
    """One experience as it stood when it was handed out. `item["easiness"]` works too.

    Attributes:
        experience: What was added.
        embedding: float32, shape `[d]`.
        variance: Variance of its rewards.
        interval: Steps between two reviews.
        easiness: 1.3 (hard) to 2.5 (easy).
        last_review: Step of the last review; 0 before the first.
        serial: Its number among all that were ever added.
        slot: Where the buffer keeps it.
    """

    experience: Any
    embedding: NDArray[np.float32]
    variance: float
    interval: float
    easiness: float
    last_review: float
    serial: int
    slot: int

    def __getitem__(self, name: str) -> Any:
        if name not in self.__slots__:
            raise KeyError(name)
        return getattr(self, name)
