"""Whether validation says that a model has begun to overfit: a rule on pairs of training and validation losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_AFTER = 8
"""Evaluations since the best one: fewer tell no trend from noise."""
_RISE = 0.05
"""Least rise above the best, relative to it; of what is no loss, relative to the range of its values."""
_TREND = 4.0
"""Least slope since the best, in standard errors: the best of many noisy values lies below all that follow."""


class Overfitting(NamedTuple):
    """What was found: the place of the best evaluation, and medians of three there and now."""

    best: int
    best_value: float
    value: float
    best_train: float
    train: float


def overfitting(train: Sequence[float], values: Sequence[float], sign: float = 1.0) -> Overfitting | None:
    """Say whether the metric has become worse for good while the training loss still fell; None: no, or not yet.

    `train` are the mean training losses since the evaluation before, `values` the metric at each, `sign` is -1 where
    higher is better.
    """
    pairs = np.array([train, values], float)
    kept = np.flatnonzero(np.isfinite(pairs).all(axis=0))
    if len(kept) <= _AFTER:
        return None
    metric = sign * pairs[1, kept]
    smooth, losses = _medians(metric), _medians(pairs[0, kept])
    best = int(np.argmin(smooth))
    since = metric[best + 1 :]
    if len(since) < _AFTER or not losses[-1] < losses[best]:
        return None
    scale = abs(smooth[best]) if sign > 0 and metric.min() > 0 else float(np.ptp(smooth))
    if not smooth[-1] - smooth[best] > _RISE * scale or not _slope(since) > _TREND:
        return None
    place = max(best - 1, 0) + int(np.argmin(metric[max(best - 1, 0) : best + 2]))
    numbers = (sign * smooth[best], sign * smooth[-1], losses[best], losses[-1])
    return Overfitting(int(kept[place]), *map(float, numbers))


def _slope(values: NDArray[np.float64]) -> float:
    """Return the slope of a line through values, in standard errors."""
    places, centred = np.arange(len(values)) - (len(values) - 1) / 2, values - values.mean()
    if not centred.any():
        return 0.0
    r = float(places @ centred / math.sqrt((places @ places) * (centred @ centred)))
    return r * math.sqrt((len(values) - 2) / max(1.0 - r * r, 1e-12))


def _medians(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the median of each number and its neighbours; at the end, of the last ones."""
    padded = np.concatenate([numbers[:1], numbers, numbers[-1:]])
    smooth: NDArray[np.float64] = np.median(np.stack([padded[:-2], padded[1:-1], padded[2:]]), axis=0)
    smooth[-1] = np.median(numbers[-3:])
    return smooth
