"""Learning-rate discovery: sweep the LR exponentially, watch the loss, suggest a peak.

The range test of Smith 2017 ("Cyclical learning rates for training neural networks", section 3.3)
with fastai's rules for reading the curve. The loop drives it:

    finder = LrFinder(plan_steps(total_steps))  # 0: the run is too short to search
    going = True
    while going:
        going = finder.record(train_one_batch(finder.next_lr()))
    found = finder.result()
    peak = found.lr or configured_peak

All rules read the smoothed loss, an exponential mean whose memory is half a decade of LR
(debiased as in Adam, Kingma and Ba 2015, section 3). The first tenth of the sweep is not read: its
mean still rests on few batches.

* valley (the suggestion): 2/3 through the longest decreasing subsequence, which is taken to be the
  stretch of as many steps before its end. So does fastai's `SuggestionMethod.Valley`, after ESRI's
  finder; fastai documents 2/3 but computes the index at 1/2. On multi-layer perceptrons and linear
  models with SGD and Adam, 2/3 was in or nearer to the range of LRs that trained best.
* steep: where, within the valley, the loss falls most per unit of log LR.
* minimum: a tenth of the LR where the loss is lowest.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.config import Problems

MAX_STEPS = 100
"""Steps of a full search: 12 a decade between 1e-7 and 10 (fastai's default)."""
MIN_STEPS = 20
"""Steps of the shortest search worth its cost: with 12, noise decided more often than the LR."""
MIN_POINTS = 10
"""Smoothed losses that a suggestion needs."""
MIN_FALL = 5.0
"""Least fall along the valley, in standard deviations of the smoothed loss. Of 500 sweeps of pure noise
(normal, lognormal, exponential, Student t with 3 degrees of freedom) at most 1.4% pass in 100 steps, 4.4% in 20."""
MEMORY_DECADES = 0.5
"""Default memory of the exponential mean, in decades of LR."""
ROUNDING = 1e-6
"""Noise of any loss relative to its size: 8 float32 roundings."""
MAX_SMOOTHING = 0.98
"""Longest default memory, 50 steps (fastai's `Recorder`), for sweeps of a narrow range."""


@dataclass(frozen=True, slots=True)
class LrSuggestion:
    """What a search found. The four rates are None when the curve is ambiguous.

    Attributes:
        lr: The suggestion: `valley`.
        valley: 2/3 through the longest fall of the loss.
        steep: Where the loss falls fastest.
        minimum: A tenth of the rate with the lowest loss.
        lrs: Rates tried, ascending.
        losses: Smoothed loss at each of them; the finite ones, so one may be missing at the end.
        reason: Why there is no suggestion; empty when there is one.
    """

    lr: float | None
    valley: float | None
    steep: float | None
    minimum: float | None
    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    reason: str = ""


def plan_steps(total_steps: float) -> int:
    """Return how many steps to search in a run of that many: a tenth, from 20 to 100.

    0, do not search, when 20 steps would be more than a quarter of the run.
    """
    if not total_steps >= 4 * MIN_STEPS:
        return 0
    return int(min(MAX_STEPS, max(MIN_STEPS, total_steps // 10)))


class LrFinder:
    """One search. It knows nothing of models: restore yours when the search is over.

    Args:
        num_steps: Length of the sweep, at least 2; see `plan_steps`.
        min_lr: First rate.
        max_lr: Last rate.
        smoothing: Decay of the exponential mean, in [0, 1). None: half a decade of LR.
        divergence: The search ends when the smoothed loss exceeds this many times its best, > 1.
            Where the best is zero or negative a multiple means nothing; then it ends
            `divergence - 1` times the loss's scale above the best, the scale being the largest
            of |best|, the fall so far and 1.4826 times the median deviation of the reported losses.

    Raises:
        ConfigError: One or more bad arguments.
    """

    def __init__(
        self,
        num_steps: int = MAX_STEPS,
        min_lr: float = 1e-7,
        max_lr: float = 10.0,
        smoothing: float | None = None,
        divergence: float = 4.0,
    ) -> None:
        problems = Problems()
        self.num_steps = problems.integer("num_steps", num_steps, 2)
        self.min_lr = low = problems.real("min_lr", min_lr, 0.0, open_low=True)
        self.max_lr = high = problems.real("max_lr", max_lr, 0.0, open_low=True)
        if low and high and not (low < high and high / low < math.inf):
            problems.append(f"min_lr must be below max_lr={max_lr!r}, got {min_lr!r}")
        if smoothing is not None and problems.real("smoothing", smoothing, 0.0) >= 1.0:
            problems.append(f"smoothing must be None or a number in [0, 1), got {smoothing!r}")
        problems.real("divergence", divergence, 1.0, open_low=True)
        problems.raise_if_any()
        if smoothing is None:
            decades_per_step = math.log10(high / low) / (self.num_steps - 1)
            smoothing = min(MAX_SMOOTHING, math.exp(-decades_per_step / MEMORY_DECADES))
        self.smoothing, self.divergence = float(smoothing), float(divergence)
        self._losses: list[float] = []
        self._smoothed: list[float] = []
        self._mean = 0.0
        self._end = ""

    @property
    def done(self) -> bool:
        """True when the search is over."""
        return self._end != ""

    def next_lr(self) -> float:
        """Return the rate for the next step; the same until its loss is recorded."""
        return self._lr_at(min(len(self._losses), self.num_steps - 1))

    def record(self, loss: float) -> bool:
        """Take the loss of the step at `next_lr()`; return False when the search is over.

        A loss reported after the end is ignored.
        """
        if self.done:
            return False
        if not self._add(float(loss)):
            self._end = "the loss became NaN or infinite"
        elif self._diverged():
            self._end = "the loss diverged"
        elif len(self._losses) == self.num_steps:
            self._end = "the sweep is complete"
        return not self.done

    def result(self) -> LrSuggestion:
        """Return the suggestion from what was recorded so far."""
        lrs = tuple(self._lr_at(i) for i in range(len(self._losses)))
        curve = tuple(self._smoothed)
        if len(curve) - self._skip < MIN_POINTS:
            reason = f"{self._end or 'the search was cut short'} after {len(curve)} steps, too few to read"
            return LrSuggestion(None, None, None, None, lrs, curve, reason)
        losses = np.array(curve[self._skip :])
        start, end = longest_valley(losses)
        fall, noise = self._fall(start, end)
        if not fall > MIN_FALL * noise:
            reason = f"the loss fell by {fall:.3g}, which is not clearly more than its noise, {noise:.3g}"
            return LrSuggestion(None, None, None, None, lrs, curve, reason)
        valley = self._lr_at(self._skip + start + (2 * (end - start)) // 3)
        # The rates are equally spaced in log LR, so the steepest step is the steepest slope.
        steep = self._lr_at(self._skip + start + int(np.argmin(np.diff(losses[start : end + 1]))))
        minimum = max(self.min_lr, self._lr_at(self._skip + int(np.argmin(losses))) / 10.0)
        return LrSuggestion(valley, valley, steep, minimum, lrs, curve)

    @property
    def _skip(self) -> int:
        return self.num_steps // 10

    def _lr_at(self, index: int) -> float:
        lr = self.min_lr * math.pow(self.max_lr / self.min_lr, index / (self.num_steps - 1))
        return min(self.max_lr, max(self.min_lr, lr))

    def _add(self, loss: float) -> bool:
        """Take a loss into the curve; False, and nothing changes, when it overflows."""
        mean = self.smoothing * self._mean + (1.0 - self.smoothing) * loss
        smoothed = mean / (1.0 - self.smoothing ** (len(self._losses) + 1))
        # Above the square root of the largest float the fall's variance would overflow.
        if not abs(smoothed) < 1e150 or not abs(loss) < 1e150:
            return False
        self._mean = mean
        self._losses.append(loss)
        self._smoothed.append(smoothed)
        return True

    def _diverged(self) -> bool:
        curve = self._smoothed[self._skip :]
        if len(curve) < 2:
            return False
        best = min(curve)
        scale = best
        if best <= 0.0:
            losses = np.sort(self._losses)
            spread = 1.4826 * float(np.median(np.abs(losses - losses[len(losses) // 2])))
            scale = max(-best, max(curve[: curve.index(best) + 1]) - best, spread)
        return bool(curve[-1] > best + (self.divergence - 1.0) * scale)

    def _fall(self, start: int, end: int) -> tuple[float, float]:
        """The smoothed loss's fall along the valley, and the standard deviation of its noise.

        The noise is measured in second differences, which a trend hardly enters: their variance is
        6 times that of white noise. An exponential mean divides it by (1 + smoothing) / (1 - smoothing).
        """
        fall = self._smoothed[self._skip + start] - self._smoothed[self._skip + end]
        losses = np.array(self._losses[: self._skip + end + 1])
        wiggle = np.diff(losses, 2)
        variance = float(np.mean(wiggle**2)) / 6.0 if wiggle.size else 0.0
        noise = math.sqrt(variance * (1.0 - self.smoothing) / (1.0 + self.smoothing))
        return fall, max(noise, ROUNDING * float(np.abs(losses).max()))


def longest_valley(losses: NDArray[np.float64]) -> tuple[int, int]:
    """Return (start, end) of the longest strictly decreasing subsequence, the earliest to end.

    `start` is `end` less the subsequence's length, as in fastai: gaps are passed over, so that a
    noisy plateau in front of the fall does not stretch it.

    Args:
        losses: Shape `[n]`, n >= 1.
    """
    tails: list[float] = []  # tails[k]: the largest last element of a subsequence of length k + 1, negated
    best_end = 0
    for index, loss in enumerate(-losses):
        length = bisect.bisect_left(tails, loss)
        if length == len(tails):
            tails.append(loss)
            best_end = index
        else:
            tails[length] = loss
    return max(0, best_end - len(tails)), best_end
