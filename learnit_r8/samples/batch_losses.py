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
linearised at the current x). `refine` fits all batches in the history together (`batch_losses_fit.py`).

N unknowns get N / B equations an epoch, so nothing identifies them all in fewer than B epochs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.state import Saved, kind, part, table
from learnit_r8.samples.batch_losses_fit import LIMIT, MAX_S, BatchHistory, log_std, refine, relative_std

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
_MAX_STEP = 1.5
"""Of log x in one update; the linearisation is no good beyond."""
_MIN_EQUATIONS = 0.2
"""Equations per unknown below which a refinement gains nothing on real training."""
_EPOCHS = 128
"""So many epochs' reports are kept at most: a refinement goes over all of them."""
_NEWS = 1 / 8
"""Share of the history that must be new: so refinements cost the same share of a run, however long it grows."""


class Exact:
    """The units of the catalog's estimates while one loss is reported for each sample: they are losses."""

    attributed = False
    """Whether estimates come from one loss a batch: then they are relative, and an unseen sample's is the mean."""

    def to_loss(self, estimate: Float32s) -> Float32s:
        """Return estimates in units of the loss."""
        return estimate

    def from_loss(self, losses: Float32s) -> Float32s:
        """Return losses in units of the estimates."""
        return losses

    def expected_mean(self, estimate: float) -> float:
        """Return the loss of samples whose mean estimate this is."""
        return estimate


class BatchAttribution(Saved, Exact):
    """Streaming estimates from batch losses, and a history of reports to refine them.

    The caller owns the arrays; they start at `PRIOR_ESTIMATE` and `PRIOR_VARIANCE`. `history_entries` bounds the
    history, in entries of 4 bytes; 0: no refinement.
    """

    attributed = True
    _saved = table(
        level=float, scale=float, additive=bool, reports=int, batch_size=float, spread=float, history=part(),
        news=kind(int, absent=0),
    )  # fmt: skip

    def __init__(self, num_samples: int, *, history_entries: int = 1 << 24) -> None:
        self.num_samples = num_samples
        self.level = 0.0  # mean loss of the recent batches; 0 before the first report
        self.scale = 0.0  # loss per unit of relative loss
        self.additive = False  # a negative loss was reported
        self._reports = 0
        self._batch_size = 0.0
        self._spread = relative_std(MAX_S)
        self._history = BatchHistory(history_entries, _EPOCHS * num_samples)
        self._news = 0  # reports since the last refinement

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
        """Take the finite mean loss of one batch; O(batch size). The arrays of all samples are changed in place."""
        n = len(indices)
        self._track(estimate, variance, loss, n)
        # Not `take`: it copies the whole of a strided array, as the columns of the catalog's rows are.
        x = estimate[indices]
        p = variance[indices]
        mean = float(np.add.reduce(x)) / n
        if n < self.num_samples:  # all samples together say nothing of one
            self._history.append(indices, loss, self.level, self.level + self.scale * (mean - 1.0))
            self._news += 1
        if self.scale == 0.0:
            return
        error = (loss - self.level) / self.scale - (mean - 1.0)
        error = min(LIMIT, max(-LIMIT, error))
        s = 1.0 if self.additive else log_std(self._spread)
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
            np.maximum(x, -LIMIT, out=x)
        else:
            np.minimum(gain, _MAX_STEP, out=gain)
            np.maximum(gain, -_MAX_STEP, out=gain)
            x *= np.exp(gain, out=gain)
            np.maximum(x, 1.0 / LIMIT, out=x)
        estimate[indices] = np.minimum(x, LIMIT, out=x)
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
        return np.minimum(np.maximum(relative, -LIMIT), LIMIT).astype(np.float32)

    def expected_mean(self, estimate: float) -> float:
        """Return the loss of samples whose mean relative loss is `estimate`; O(1)."""
        return self.level + self.scale * (estimate - 1.0)

    def known(self, variance: Float32s) -> float:
        """Return the share of the samples' differences that is known, 0 to 1."""
        return min(1.0, max(0.0, 1.0 - float(np.mean(variance, dtype=np.float64)) / PRIOR_VARIANCE))

    def refine(self, estimate: Float32s, variance: Float32s) -> bool:
        """Fit all batches of the history together; for the end of an epoch.

        The fit replaces the arrays' values where it predicts held-out batches better than
        the streaming estimate predicted the same batches before they were reported; says whether.
        """
        count = self._history.count
        if count / self.num_samples < _MIN_EQUATIONS or self.scale == 0.0 or self._news < _NEWS * count:
            return False
        self._news = 0
        found = refine(self._history, self.num_samples, self.scale, additive=self.additive)
        if found is None:
            return False
        estimate[found.seen] = found.estimate[found.seen]
        variance[found.seen] = found.variance[found.seen]
        return True

    def mark(self) -> tuple[float, ...]:
        """Return what `back_to` needs to take back all reports from here on, but for the arrays'."""
        return self.level, self.scale, self._reports, self._batch_size, self._spread, self._history.appended

    def back_to(self, mark: tuple[float, ...]) -> None:
        """Forget the reports since `mark` was taken, in the same units."""
        self.level, self.scale, reports, self._batch_size, self._spread, appended = mark
        self._reports = int(reports)
        self._news = max(0, self._news - self._history.forget(int(self._history.appended - appended)))

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
