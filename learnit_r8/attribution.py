"""One loss for a whole batch, turned into estimates for its samples.

The model. A batch's loss is the mean of its samples' losses. Sample i has a relative loss x_i
that changes slowly, while the level of all losses moves as the model learns:

    loss_t = to_loss(mean of x over the batch) + noise,   to_loss(x) = level + scale * (x - 1)

* Multiplicative (until a loss is negative): scale = level, x > 0. x is taken as log-normal, which
  is what losses look like: most are small, a few large. x = exp(s u - s^2 / 2), u ~ N(0, 1).
* Additive (from the first negative loss on, as with the NLL of a density): scale is held, x is
  normal around 1.

`variance` is that of u, which is the share of the prior variance still unexplained: 1 for a sample
never seen, 0 for one that is known. No absolute size of the losses enters the gains.

`update` is a Kalman filter on u with a diagonal covariance and one scalar observation (Kalman 1960;
linearised at the current x). `refine` fits all batches in the history together: Gauss-Newton, with
conjugate gradients (Hestenes and Stiefel 1952) inside, over index arrays.

N unknowns get N / B equations an epoch, so nothing identifies them all in fewer than B epochs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Float32s = NDArray[np.float32]

PRIOR_ESTIMATE = 1.0
"""Relative loss of a sample that was never seen: the mean."""
PRIOR_VARIANCE = 1.0
"""Variance of a sample that was never seen."""

_LEVEL_RATE = 0.02
"""Of the moving averages of level and spread: they remember about fifty batches."""
_NOISE = 0.1
"""Variance of a batch loss that its samples do not explain, as a share of what they do."""
_PROCESS_NOISE = 1e-4
"""Added to the variance at each visit: what a sample's loss drifts in an epoch."""
_MAX_S = 1.0
"""Above it, long-tailed losses of real training come out worse, not better."""
_MAX_STEP = 1.5
"""Of log x in one update; the linearisation is no good beyond."""
_LIMIT = 1e6
"""Relative losses stay within 1 / limit .. limit (multiplicative)."""
_MIN_EQUATIONS = 0.2
"""Equations per unknown below which a refinement gains nothing on real training."""
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
_RECORD_ENTRIES = 8
"""History entries (4 bytes) that a batch's scalars take."""


class BatchAttribution:
    """Streaming estimates from batch losses, and a history of reports to refine them.

    The caller owns the arrays; they start at `PRIOR_ESTIMATE` and `PRIOR_VARIANCE`.

    Args:
        num_samples: Number of samples N, below 2^32.
        history_entries: Bound of the history in entries of 4 bytes; a batch takes its size
            plus 8. The oldest quarter is dropped when it is full. 0: no refinement.

    Attributes:
        level: Mean loss of the recent batches; 0 before the first report.
        scale: Loss per unit of relative loss.
        additive: A negative loss was reported.
    """

    def __init__(self, num_samples: int, *, history_entries: int = 1 << 24) -> None:
        self.num_samples = num_samples
        self.level = 0.0
        self.scale = 0.0
        self.additive = False
        self._reports = 0
        self._batch_size = 0.0
        self._spread = _relative_std(_MAX_S)
        self._history = _History(history_entries)

    def start(self, losses: NDArray[np.floating[Any]]) -> None:
        """Take level and scale from losses known per sample, shape `[n]`, before any batch is reported."""
        self.level = float(np.mean(losses, dtype=np.float64))
        self.additive = bool(np.min(losses) < 0.0)
        deviation = float(np.std(losses, dtype=np.float64))
        self.scale = (deviation or abs(self.level) or 1.0) if self.additive else self.level
        self._reports = round(1.0 / _LEVEL_RATE)
        if self.scale > 0.0:
            self._spread = deviation / self.scale

    def update(self, estimate: Float32s, variance: Float32s, indices: NDArray[np.integer[Any]], loss: float) -> None:
        """Take the finite mean loss of one batch; O(batch size).

        Args:
            estimate: Relative losses of all samples, float32, shape `[N]`, strided or not; changed
                in place.
            variance: Their variances, float32, shape `[N]`; changed in place.
            indices: The batch's samples, shape `[n]`, n >= 1.
            loss: Mean of their losses, unweighted, finite.
        """
        n = len(indices)
        self._track(estimate, variance, loss, n)
        # Not `take`: it copies the whole of a strided array, as the columns of the catalog's rows are.
        x = estimate[indices]
        p = variance[indices]
        mean = float(np.add.reduce(x)) / n
        self._history.append(indices, loss, self.level, self.level + self.scale * (mean - 1.0))
        if self.scale == 0.0:
            return
        error = (loss - self.level) / self.scale - (mean - 1.0)
        error = min(_LIMIT, max(-_LIMIT, error))
        s = 1.0 if self.additive else _log_std(self._spread)
        slope = np.full(n, 1.0 / n, np.float32) if self.additive else x * np.float32(s / n)
        gain = p * slope
        signal = 1.0 if self.additive else math.expm1(s * s)
        gain /= np.float32(float(gain.dot(slope)) + _NOISE * signal / n)
        slope *= gain
        np.subtract(1.0, slope, out=slope)
        p *= slope
        p += np.float32(_PROCESS_NOISE)
        gain *= np.float32(s * error)
        if self.additive:
            x += gain
            np.maximum(x, -_LIMIT, out=x)
        else:
            np.minimum(gain, _MAX_STEP, out=gain)
            np.maximum(gain, -_MAX_STEP, out=gain)
            x *= np.exp(gain, out=gain)
            np.maximum(x, 1.0 / _LIMIT, out=x)
        estimate[indices] = np.minimum(x, _LIMIT, out=x)
        variance[indices] = np.minimum(p, PRIOR_VARIANCE, out=p)

    def to_loss(self, estimate: Float32s) -> Float32s:
        """Return relative losses in units of the loss."""
        with np.errstate(over="ignore"):
            return (self.level + self.scale * (estimate.astype(np.float64) - 1.0)).astype(np.float32)

    def from_loss(self, losses: NDArray[np.floating[Any]]) -> Float32s:
        """Return losses in relative units, within +-1e6; all `PRIOR_ESTIMATE` while the scale is unknown."""
        if self.scale == 0.0:
            return np.full(np.shape(losses), PRIOR_ESTIMATE, np.float32)
        with np.errstate(over="ignore"):
            relative = 1.0 + (np.asarray(losses, np.float64) - self.level) / self.scale
        return np.minimum(np.maximum(relative, -_LIMIT), _LIMIT).astype(np.float32)

    def expected(self, estimate: Float32s) -> float:
        """Return the loss that a batch with these relative losses, shape `[n]`, should have."""
        return self.expected_mean(float(np.add.reduce(estimate)) / len(estimate))

    def expected_mean(self, estimate: float) -> float:
        """Return the loss of samples whose mean relative loss is `estimate`; O(1)."""
        return self.level + self.scale * (estimate - 1.0)

    def confidence(self, variance: Float32s) -> float:
        """Return the share of the samples' differences that is known, 0 to 1."""
        return min(1.0, max(0.0, 1.0 - float(np.mean(variance, dtype=np.float64)) / PRIOR_VARIANCE))

    def refine(self, estimate: Float32s, variance: Float32s) -> bool:
        """Fit all batches of the history together; for the end of an epoch.

        The fit replaces the arrays' values where it predicts held-out batches better than
        the streaming estimate predicted the same batches before they were reported.

        Returns:
            Whether the arrays were changed.
        """
        history = self._history
        equations = history.count / self.num_samples
        if equations < _MIN_EQUATIONS or self.scale == 0.0:
            return False
        fit = _Fit(self, history)
        newest_first = np.arange(fit.count)[::-1]
        held_out = newest_first % _HELD_OUT == 0
        u = np.zeros(self.num_samples)
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
            return False
        weights = fit.weights(half_life)
        u = fit.solve(u, noise, weights, *_FINAL)
        seen = fit.seen
        estimate[seen] = fit.relative(u)[seen]
        variance[seen] = fit.variance(u, noise, weights)[seen]
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return all state: JSON scalars and numpy arrays."""
        return {
            "level": self.level,
            "scale": self.scale,
            "additive": self.additive,
            "reports": self._reports,
            "batch_size": self._batch_size,
            "spread": self._spread,
            "history": self._history.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, to the bit."""
        self.level = float(state["level"])
        self.scale = float(state["scale"])
        self.additive = bool(state["additive"])
        self._reports = int(state["reports"])
        self._batch_size = float(state["batch_size"])
        self._spread = float(state["spread"])
        self._history.load_state_dict(state["history"])

    def _track(self, estimate: Float32s, variance: Float32s, loss: float, n: int) -> None:
        """Move level, spread and scale."""
        if loss < 0.0 and not self.additive:
            self._turn_additive(estimate, variance, loss)
        self._reports += 1
        rate = max(_LEVEL_RATE, 1.0 / self._reports)
        self._batch_size += rate * (n - self._batch_size)
        # A ragged last batch says less about the mean than a full one.
        self.level += rate * min(1.0, n / self._batch_size) * (loss - self.level)
        if not self.additive:
            self.scale = self.level
        if self.scale == 0.0:
            return
        # 1.25 times the mean absolute deviation is the standard deviation of a normal.
        deviation = min(1e30, 1.2533 * math.sqrt(n) * abs(loss - self.level) / self.scale)
        self._spread += max(_LEVEL_RATE, 1.0 / (self._reports + 4)) * (deviation - self._spread)
        if self.additive and not 1e-3 <= self._spread <= 1e3:
            self._rescale(estimate)

    def _turn_additive(self, estimate: Float32s, variance: Float32s, loss: float) -> None:
        self.additive = True
        old = self.scale
        self.scale = max(old * max(1.0, self._spread) or abs(loss), 1e-300)
        factor = old / self.scale
        self._spread = self._spread * factor or 1.0
        _scale_about_one(estimate, factor)
        # The differences shrank with the level, wrongly as it turns out: let them be learnt again.
        np.maximum(variance, 0.5, out=variance)

    def _rescale(self, estimate: Float32s) -> None:
        """Keep x - 1 well inside float32's range and precision; O(N), rare."""
        if self._spread < 1.0 and self.scale * self._spread < 1e-6 * abs(self.level):
            return
        if not 0.0 < self.scale * self._spread < math.inf:
            return
        _scale_about_one(estimate, 1.0 / self._spread)
        self.scale *= self._spread
        self._spread = 1.0


def _scale_about_one(estimate: Float32s, factor: float) -> None:
    estimate -= np.float32(1.0)
    estimate *= np.float32(factor)
    estimate += np.float32(1.0)


def _log_std(relative_std: float) -> float:
    """Return s of the log-normal with mean 1 and this standard deviation, within limits."""
    if relative_std >= 10.0:
        return _MAX_S
    return min(_MAX_S, max(1e-4, math.sqrt(math.log1p(relative_std * relative_std))))


def _relative_std(s: float) -> float:
    return math.sqrt(math.expm1(s * s))


class _History:
    """The last reports: flat sample ids, and per batch (size, loss, level, prediction)."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._clear()

    def _clear(self) -> None:
        self._ids = np.empty(0, np.uint32)
        self._records = np.empty((0, 4))
        self.entries = 0
        self.count = 0

    def append(self, indices: NDArray[np.integer[Any]], loss: float, level: float, predicted: float) -> None:
        n = len(indices)
        end = self.entries + n
        if end + _RECORD_ENTRIES * (self.count + 1) > self._capacity:
            self._drop_oldest()
            end = self.entries + n
            if end + _RECORD_ENTRIES * (self.count + 1) > self._capacity:
                return
        if end > len(self._ids):
            self._ids = _grown(self._ids, max(end, 2 * len(self._ids), 1024))
        if self.count == len(self._records):
            self._records = _grown(self._records, max(64, 2 * self.count))
        self._ids[self.entries : end] = indices
        self._records[self.count] = (n, loss, level, predicted)
        self.entries = end
        self.count += 1

    def _drop_oldest(self) -> None:
        sizes = self._records[: self.count, 0]
        ends = np.cumsum(sizes + _RECORD_ENTRIES)
        drop = min(self.count, int(np.searchsorted(ends, self._capacity / 4)) + 1)
        entries = int(sizes[:drop].sum())
        self._ids[: self.entries - entries] = self._ids[entries : self.entries].copy()
        self._records[: self.count - drop] = self._records[drop : self.count].copy()
        self.entries -= entries
        self.count -= drop

    @property
    def ids(self) -> NDArray[np.uint32]:
        return self._ids[: self.entries]

    @property
    def records(self) -> Floats:
        return self._records[: self.count]

    def state_dict(self) -> dict[str, Any]:
        return {"ids": self.ids.copy(), "records": self.records.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._ids = np.array(state["ids"], np.uint32)
        self._records = np.array(state["records"], np.float64).reshape(-1, 4)
        self.entries = len(self._ids)
        self.count = len(self._records)


def _grown(array: NDArray[Any], length: int) -> NDArray[Any]:
    grown = np.empty((length, *array.shape[1:]), array.dtype)
    grown[: len(array)] = array
    return grown


class _Fit:
    """Penalised least squares over a history: minimise sum_t w_t (target - A x(u))_t^2 / r + |u|^2.

    A averages over each batch and is never built: `_mean` and `_spread_out` apply it and its
    transpose. r is the noise share of the variance that the prior gives to a batch.
    """

    def __init__(self, owner: BatchAttribution, history: _History) -> None:
        sizes, loss, level, predicted = history.records.T
        self.count = history.count
        self._num_samples = owner.num_samples
        self._additive = owner.additive
        unit = np.full(self.count, owner.scale) if owner.additive else np.maximum(level, np.finfo(float).tiny)
        self._observed: Floats = np.clip(1.0 + (loss - level) / unit, -_LIMIT, _LIMIT)
        self._target = self._observed
        self.filter_error = np.clip((loss - predicted) / unit, -_LIMIT, _LIMIT)
        self._ids = history.ids.astype(np.intp)
        self._sizes = sizes.astype(np.intp)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._buffer = np.empty(len(self._ids))
        self.seen = np.bincount(self._ids, minlength=self._num_samples) > 0
        # In epochs: how often a sample has been reported since, on average.
        self.age = (history.entries - np.cumsum(sizes)) / self._num_samples
        recent = self.weights(_PATH[0][1])
        std = math.sqrt(float(recent @ ((self._observed - 1.0) ** 2 * sizes) / recent.sum()))
        self._std = max(std, 1e-4) if owner.additive else _log_std(std)
        self._signal = self._std**2 if owner.additive else math.expm1(self._std**2)

    def weights(self, half_life: float) -> Floats:
        """Return the weight of each batch."""
        weights: Floats = np.exp2(-self.age / half_life)
        return weights

    def relative(self, u: Floats) -> Floats:
        """Return relative losses in the filter's terms: right on average over the last epoch."""
        x = self._value(u)
        weights = self._sizes * (self.age < 1.0)
        observed, fitted = float(weights @ self._observed), float(weights @ self._mean(x))
        if self._additive:
            lowest, x = -_LIMIT, x + (observed - fitted) / float(weights.sum())
        else:
            lowest, x = 1.0 / _LIMIT, x * (observed / fitted)
        return np.minimum(np.maximum(x, lowest), _LIMIT)

    def error(self, u: Floats) -> Floats:
        """Return target minus prediction for each batch."""
        error: Floats = self._target - self._mean(self._value(u))
        return error

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
        values: Floats = np.exp(np.clip(self._std * u - self._std**2 / 2, -14.0, 14.0))
        return values

    def _slope(self, u: Floats) -> Floats:
        return np.full_like(u, self._std) if self._additive else self._std * self._value(u)

    def _mean(self, x: Floats) -> Floats:
        x.take(self._ids, out=self._buffer, mode="clip")
        means: Floats = np.add.reduceat(self._buffer, self._starts) / self._sizes
        return means

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
    sums: Floats = total[last] - total[np.maximum(centre - _WINDOW, 0)]
    return sums
