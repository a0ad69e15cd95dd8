"""All batch losses of the last epochs fitted together: the refinement of `batch_losses.py` at an epoch's end.

Gauss-Newton, with conjugate gradients (Hestenes and Stiefel 1952) inside, over index arrays. The model is
that of `batch_losses.py`; what is fitted is u, of which a sample's relative loss is a function.
"""

from __future__ import annotations

import math
from array import array
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.state import Kind, Saved, table

Floats = NDArray[np.float64]

MAX_S = 1.0
"""Above it, long-tailed losses of real training come out worse, not better."""
LIMIT = 1e6
"""Relative losses stay within 1 / limit .. limit (multiplicative)."""
_PATH = ((2.0, 20.0), (0.3, 20.0), (0.1, 20.0), (0.03, 40.0), (0.005, math.inf), (0.0005, math.inf))
"""Candidates of a refinement: (noise share, half-life of a report in epochs), most cautious first.

The first is for batch losses that say next to nothing about their samples."""
_HELD_OUT = 8
"""Every so many-th batch chooses among the candidates."""
_COMPARED = 100
"""Held-out batches, at least, that decide between fit and filter (fewer misjudged it)."""
_SEARCH = (3, 12)
"""Gauss-Newton steps and conjugate-gradient iterations for a candidate, which starts at the one before."""
_FINAL = (4, 30)
"""The same for the final fit to all batches."""
_ALLOWANCE = 1.1
"""The candidate did without an eighth of the batches, which the final fit has."""
_WINDOW = 32
"""Batches to each side over which a refinement smooths the level."""
_FIELDS = 4
_RECORD_ENTRIES = 2 * _FIELDS
"""History entries (4 bytes) that a batch's scalars take."""


class Refined(NamedTuple):
    """What a fit found for each sample."""

    estimate: Floats  # relative losses
    variance: Floats  # of u
    seen: NDArray[np.bool_]  # the samples that any batch held; the others' values are the prior's


def refine(history: BatchHistory, num_samples: int, scale: float, *, additive: bool) -> Refined | None:
    """Fit all batches of a history together.

    None where that predicts held-out batches no better than the streaming estimate predicted the same batches
    before they were reported.
    """
    fit = _Fit(history, num_samples, scale, additive=additive)
    newest_first = np.arange(fit.count)[::-1]
    held_out = newest_first % _HELD_OUT == 0
    u = np.zeros(num_samples)
    best = (math.inf, u, _PATH[0])
    for noise, half_life in _PATH:
        u = fit.solve(u, noise, fit.weights(half_life) * ~held_out, *_SEARCH)
        error = fit.mean_square(fit.error(u), held_out)
        if error >= best[0]:
            break
        best = (error, u, (noise, half_life))
        fit.smooth_level(u)
    _, u, (noise, half_life) = best
    compared = held_out & ((fit.age < 3.0) | (newest_first < _COMPARED * _HELD_OUT))
    if not fit.mean_square(fit.error(u), compared) < _ALLOWANCE * fit.mean_square(fit.filter_error, compared):
        return None
    weights = fit.weights(half_life)
    u = fit.solve(u, noise, weights, *_FINAL)
    return Refined(fit.relative(u), fit.variance(u, noise, weights), fit.seen)


def log_std(relative_std: float) -> float:
    """Return s of the log-normal with mean 1 and this standard deviation, within limits."""
    if relative_std >= 10.0:
        return MAX_S
    return min(MAX_S, max(1e-4, math.sqrt(math.log1p(relative_std * relative_std))))


def relative_std(s: float) -> float:
    """Return the standard deviation of the log-normal with mean 1 and this s."""
    return math.sqrt(math.expm1(s * s))


class BatchHistory(Saved):
    """The last reports: flat sample ids, and per batch (size, loss, level, prediction).

    In `capacity` entries of 4 bytes, of which a batch takes its size plus 8, and with at most `most_ids` sample ids.
    The oldest quarter is dropped when it is full.
    """

    _saved = table(
        ids=Kind(lambda me, _: me.ids, lambda _, saved: _array("I", np.asarray(saved, np.uint32))),
        records=Kind(lambda me, _: me.records, lambda _, saved: _array("d", np.asarray(saved, np.float64))),
    )

    def __init__(self, capacity: int, most_ids: float = math.inf) -> None:
        self._capacity, self._most_ids = capacity, most_ids
        self._ids, self._records = array("I"), array("d")
        self.appended = 0  # reports that were ever added, less those that were forgotten

    @property
    def entries(self) -> int:
        """Sample ids that are held."""
        return len(self._ids)

    @property
    def count(self) -> int:
        """Batches that are held."""
        return len(self._records) // _FIELDS

    def append(self, indices: NDArray[np.integer[Any]], loss: float, level: float, predicted: float) -> None:
        """Add a report: its samples, loss, and the level and the prediction before it."""
        end = len(self._ids) + len(indices)
        if end + _RECORD_ENTRIES * (self.count + 1) > self._capacity or end > self._most_ids:
            self._drop_oldest()
            end = len(self._ids) + len(indices)
            if end + _RECORD_ENTRIES * (self.count + 1) > self._capacity:
                return
        self._ids.frombytes(indices.astype(np.uint32).tobytes())
        self._records.extend((len(indices), loss, level, predicted))
        self.appended += 1

    def forget(self, reports: int) -> int:
        """Forget the newest so many reports, as far as they are there; return how many these were."""
        forgotten = min(self.count, reports)
        kept = self.count - forgotten
        del self._ids[len(self._ids) - int(sum(self._records[kept * _FIELDS :: _FIELDS])) :]
        del self._records[kept * _FIELDS :]
        self.appended -= reports
        return forgotten

    def _drop_oldest(self) -> None:
        ends = np.cumsum(self.records[:, 0] + _RECORD_ENTRIES)
        bound = min(self._capacity, self._most_ids)
        drop = min(self.count, int(np.searchsorted(ends, bound / 4)) + 1)
        del self._ids[: int(self.records[:drop, 0].sum())]
        del self._records[: drop * _FIELDS]

    @property
    def ids(self) -> NDArray[np.uint32]:
        """Sample ids, uint32 `[entries]`, batch after batch; a copy, as views would keep the array from growing."""
        return np.array(self._ids, np.uint32)

    @property
    def records(self) -> Floats:
        """Size, loss, level and prediction of each batch, float64 `[count, 4]`; a copy."""
        return np.array(self._records).reshape(-1, _FIELDS)

    def _state_taken(self) -> None:
        self.appended = self.count


def _array(code: str, numbers: NDArray[Any]) -> array[Any]:
    made = array(code)
    made.frombytes(numbers.tobytes())
    return made


class _Fit:
    """Penalised least squares over a history: minimise sum_t w_t (target - A x(u))_t^2 / r + |u|^2.

    A averages over each batch and is never built: `_mean` and `_spread_out` apply it and its
    transpose. r is the noise share of the variance that the prior gives to a batch.
    """

    def __init__(self, history: BatchHistory, num_samples: int, scale: float, *, additive: bool) -> None:
        sizes, loss, level, predicted = history.records.T
        self.count = history.count
        self._num_samples = num_samples
        self._additive = additive
        unit = np.full(self.count, scale) if additive else np.maximum(level, np.finfo(float).tiny)
        self._observed: Floats = np.clip(1.0 + (loss - level) / unit, -LIMIT, LIMIT)
        self._target = self._observed
        self.filter_error = np.clip((loss - predicted) / unit, -LIMIT, LIMIT)
        self._ids = history.ids.astype(np.intp)
        self._sizes = sizes.astype(np.intp)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._buffer = np.empty(len(self._ids))
        self.seen = np.bincount(self._ids, minlength=self._num_samples) > 0
        # In epochs: how often a sample has been reported since, on average.
        self.age = (history.entries - np.cumsum(sizes)) / self._num_samples
        recent = self.weights(_PATH[0][1])
        std = math.sqrt(float(recent @ ((self._observed - 1.0) ** 2 * sizes) / recent.sum()))
        self._std = max(std, 1e-4) if additive else log_std(std)
        self._signal = self._std**2 if additive else math.expm1(self._std**2)

    def weights(self, half_life: float) -> Floats:
        """Return the weight of each batch."""
        return np.asarray(np.exp2(-self.age / half_life))

    def relative(self, u: Floats) -> Floats:
        """Return relative losses in the filter's terms: right on average over the last epoch."""
        x = self._value(u)
        weights = self._sizes * (self.age < 1.0)
        observed, fitted = float(weights @ self._observed), float(weights @ self._mean(x))
        if self._additive:
            lowest, x = -LIMIT, x + (observed - fitted) / float(weights.sum())
        else:
            lowest, x = 1.0 / LIMIT, x * (observed / fitted)
        return np.minimum(np.maximum(x, lowest), LIMIT)

    def error(self, u: Floats) -> Floats:
        """Return target minus prediction for each batch."""
        return np.asarray(self._target - self._mean(self._value(u)))

    def mean_square(self, error: Floats, mask: NDArray[np.bool_]) -> float:
        """Return the mean square of some batches' errors; old and small batches count less."""
        weights = (self._sizes * self.weights(_PATH[0][1]))[mask]
        return float(weights @ error[mask] ** 2) / float(weights.sum())

    def smooth_level(self, u: Floats) -> None:
        """Correct the level by what the fit leaves unexplained in the batches on both sides."""
        fitted = self._mean(self._value(u))
        observed, predicted = _moving_sum(self._sizes * self._observed), _moving_sum(self._sizes * fitted)
        if self._additive:
            self._target = self._observed - (observed - predicted) / _moving_sum(self._sizes)
        else:
            self._target = self._observed * (predicted / np.maximum(observed, 1e-3 * predicted))

    def solve(self, u: Floats, noise: float, weights: Floats, steps: int, iterations: int) -> Floats:
        """Return the minimiser by Gauss-Newton, each step halved until it helps."""
        weights = weights * self._sizes / (noise * self._signal)
        error = self.error(u)
        objective = float(weights @ error**2 + u @ u)
        for _ in range(steps):
            slope = self._slope(u)
            step = self._conjugate_gradients(slope, weights, slope * self._spread_out(weights * error) - u, iterations)
            if not self._additive:
                np.clip(step, -2.0, 2.0, out=step)
            for _ in range(4):
                trial = u + step
                trial_error = self.error(trial)
                value = float(weights @ trial_error**2 + trial @ trial)
                if value < objective:
                    break
                step *= 0.5
            else:
                return u
            u, error, objective = trial, trial_error, value
        return u

    def variance(self, u: Floats, noise: float, weights: Floats) -> Floats:
        """Return the variances of u, shape `[N]`, where the doubt about a batch's other samples counts as noise.

        1 / P_i = 1 + g_i^2 sum_t (w_t / B_t) / (mean(P g^2) + noise), g = dx/du. With equal slopes and
        no noise that is P = 1 - equations per unknown, which is exact for random equations.
        """
        squares = self._slope(u) ** 2
        evidence = self._spread_out(weights) * squares
        p = np.ones_like(u)
        for _ in range(60):
            previous = p
            p = 1.0 / (1.0 + evidence / (float(np.mean(p * squares)) + noise * self._signal))
            if np.abs(p - previous).max() < 1e-3:
                break
        return p

    def _value(self, u: Floats) -> Floats:
        if self._additive:
            return 1.0 + self._std * u
        return np.asarray(np.exp(np.clip(self._std * u - self._std**2 / 2, -14.0, 14.0)))

    def _slope(self, u: Floats) -> Floats:
        return np.full_like(u, self._std) if self._additive else self._std * self._value(u)

    def _mean(self, x: Floats) -> Floats:
        x.take(self._ids, out=self._buffer, mode="clip")
        return np.asarray(np.add.reduceat(self._buffer, self._starts) / self._sizes)

    def _spread_out(self, r: Floats) -> Floats:
        weights = np.repeat(r / self._sizes, self._sizes)
        return np.bincount(self._ids, weights, self._num_samples).astype(np.float64, copy=False)

    def _conjugate_gradients(self, slope: Floats, weights: Floats, b: Floats, iterations: int) -> Floats:
        """Solve (S A' W A S + 1) step = b, S = diag(slope), preconditioned by its diagonal.

        The slopes differ by orders of magnitude, so the diagonal halves the iterations.
        """
        diagonal = 1.0 + slope**2 * self._spread_out(weights / self._sizes)
        step = np.zeros_like(b)
        residual = b
        direction = b / diagonal
        square = first = float(b @ direction)
        for _ in range(iterations):
            if square <= 1e-2 * first or square <= 1e-280:
                break
            image = slope * self._spread_out(weights * self._mean(slope * direction)) + direction
            length = square / float(direction @ image)
            step += length * direction
            residual = residual - length * image
            scaled = residual / diagonal
            previous, square = square, float(residual @ scaled)
            direction = scaled + square / previous * direction
        return step


def _moving_sum(values: NDArray[Any]) -> Floats:
    total = np.concatenate([[0.0], np.cumsum(values)])
    centre = np.arange(len(values))
    last = np.minimum(centre + _WINDOW + 1, len(values))
    return np.asarray(total[last] - total[np.maximum(centre - _WINDOW, 0)])
