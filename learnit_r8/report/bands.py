"""Long series as few points that still show every extreme."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from learnit_r8.run.series import smoothed

Floats = NDArray[np.float64]
BINS = 1500
"""Bins of a chart: more than the pixels of its width, so that no spike hides beside another."""
DECAY = 0.98
"""Decay of the smoothed line, the dashboard's default."""


@dataclass(frozen=True, slots=True, eq=False)
class Band:
    """Consecutive points, binned. Arrays are float64 `[bins]`; NaN where a bin has no finite value."""

    first: Floats  # first x of each bin
    last: Floats  # last x of each bin
    low: Floats  # smallest finite value
    high: Floats  # largest finite value
    mean: Floats  # mean of the finite values
    smooth: Floats  # the moving average after the bin's last point

    @property
    def middle(self) -> Floats:
        """Where on the x axis a bin is drawn."""
        return (self.first + self.last) / 2


def band(x: Floats, y: Floats, bins: int = BINS, decay: float | None = DECAY) -> Band:
    """Bin a series by its order: minimum, maximum, mean and moving average of each bin.

    Positions and values are `[n]`; values that are not finite belong to no figure. A series that is not longer than
    `bins` keeps every point; without a `decay`, `smooth` is the mean.
    """
    size = len(x)
    if size == 0:
        empty = np.empty(0)
        return Band(empty, empty, empty, empty, empty, empty)
    count = min(bins, size)
    starts = np.arange(count) * size // count
    ends = np.append(starts[1:], size) - 1
    finite = np.isfinite(y)
    counts = np.add.reduceat(finite.astype(np.int64), starts)
    low = np.minimum.reduceat(np.where(finite, y, np.inf), starts)
    high = np.maximum.reduceat(np.where(finite, y, -np.inf), starts)
    with np.errstate(over="ignore", invalid="ignore"):
        mean = np.add.reduceat(np.where(finite, y, 0.0), starts) / np.maximum(counts, 1)
    mean = np.clip(mean, low, high)  # rounding must not give equal values a spread
    empty_bins = counts == 0
    for values in (low, high, mean):
        values[empty_bins] = np.nan
    return Band(x[starts], x[ends], low, high, mean, mean if decay is None else _smooth(y, decay)[ends])


def _smooth(y: Floats, decay: float) -> Floats:
    """Return the debiased moving average (Kingma and Ba 2015, section 3) after each point."""
    finite = np.isfinite(y)
    values = y[finite]
    with np.errstate(over="ignore", invalid="ignore"):
        averages = smoothed(values, [0.0], (decay,))[:, 0] / -np.expm1(np.arange(1, len(values) + 1) * np.log(decay))
    # A point that is not finite shows the average before it.
    places = np.cumsum(finite)
    found: Floats = np.append(np.nan, averages)[places]
    return found


def wants_log(values: Floats) -> bool:
    """Return whether a log scale shows a series better: positive, and it or its highest spike spans a factor of 20."""
    finite = values[np.isfinite(values)]
    if not len(finite) or finite.min() <= 0:
        return False
    low, middle, high = np.percentile(finite, (1, 50, 99))
    return bool(high > 20 * low or finite.max() > 20 * middle)
