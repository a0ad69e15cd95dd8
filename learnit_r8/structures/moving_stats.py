"""Exponentially weighted mean and standard deviation of a stream of losses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.arrays import as_losses
from learnit_r8.core.config import Problems
from learnit_r8.core.state import Saved, table


class ExponentialMovingStats(Saved):
    """Exponentially weighted mean and standard deviation of a stream of numbers.

    Finch 2009, "Incremental calculation of weighted mean and variance"; several numbers at once
    count as one observation of weight `alpha` that is spread over them.

    Args:
        alpha: Weight of a new observation, above 0 and at most 1.

    Raises:
        ConfigError: `alpha` is out of range.
    """

    _saved = table(alpha=float, count=int, mean=float, variance=float)

    def __init__(self, alpha: float = 0.1) -> None:
        problems = Problems()
        self.alpha = problems.real("alpha", alpha, 0.0, 1.0, open_low=True)
        problems.raise_if_any()
        self.count = 0
        self._mean = 0.0
        self._variance = 0.0

    def update(self, x: Any) -> None:
        """Take a number, or an array or tensor of them; what is not finite is left out.

        Raises:
            TypeError: Not numbers.
        """
        values = as_losses(x)
        values = values[np.isfinite(values)]
        if len(values):
            self.move(values - self._mean)

    def move(self, off: NDArray[np.float64]) -> None:
        """Take finite numbers, at least one, given as what they are above the mean."""
        weight = self.alpha if self.count else 1.0
        shift = weight * float(np.add.reduce(off)) / len(off)
        variance = (1 - weight) * self._variance + weight * float(off.dot(off)) / len(off) - shift * shift
        self._variance = max(variance, 0.0)
        self._mean += shift
        self.count += 1

    @property
    def mean(self) -> float:
        """Weighted mean; 0 before the first number."""
        return self._mean

    @property
    def std(self) -> float:
        """Weighted standard deviation; 0 before the second observation, unless it was an array."""
        return math.sqrt(self._variance)
