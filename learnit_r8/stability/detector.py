"""Says of every reported loss whether training is still sound.

Each loss is compared with the recent accepted ones by median and MAD, which a few outliers cannot
move (Hampel 1974, "The influence curve and its role in robust estimation"):

    l' = loss - b (expected loss of the batch - expected loss of all)    composition-corrected
    s  = max(d, min((q90 - m) / 1.2816, 4 d), 0.02 |m|, 1e-3 L0)         d: 1.4826 MAD, m: median, L0: first level
    z  = (l' - m) / s                  a = (l' - m) / max(|m|, 2 s)      score and relative rise

The 90% quantile is there because losses are skewed: in batches of one sample most are near zero and
some are near the first loss, where the MAD sees next to no spread.

`b`, the share of the expected excess that really shows in the losses, is a running regression slope
within [0, 1] (see `windows.Composition`).

A loss is *hard*-flagged for z > 16 and a > 1, *soft*-flagged for z > 6 and a > 0.5. Flagged losses
stay out of the window. One flag proves nothing: a spike is 2 hard flags in 3 steps or 4 soft ones in
8. Runs near interpolation have many harmless outliers, on which fixed counts fire without end. So

* a loss is flagged only where it rises above the second highest harmless outlier of the last 1024
  steps (one that was not followed by a fault within 8 steps);
* where flags were harmless before, as many are asked for as independent ones at the observed rate
  would reach with a probability of at most 2.5e-6 a step;
* where the losses of the samples are known, an outlier that comes from an eighth of the batch or
  less is suspect, but no proof: weights that are broken are so for all samples.

What rises too slowly for the window, which follows it, is found as *drift* (see `level`): the median of the
last 16 losses stays far above the best it has been. The rise must exceed the best level and the mean of its
time, which is far above the median where a few losses are all that matters.

16 losses in a row below the median whose level is less than half of it are a steep fall: the window keeps
only them, or the start of a run would count as usual spread for long.

NaN and infinity are faults from the first step on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from learnit_r8.stability.level import Level
from learnit_r8.stability.thresholds import DetectorSettings
from learnit_r8.stability.windows import HARMLESS_AFTER, Composition, HarmlessOutliers, SortedWindow
from learnit_r8.types import Verdict

_MAD_TO_STD = 1.4826  # of a normal distribution
_NORMAL_Q90 = 1.2816  # standard deviations from the median to the 90% quantile
_MOST_SKEW = 4.0  # times the MAD's: a loss that grows exponentially moves the quantile before it is flagged
_RELATIVE_FLOOR = 0.02
_LEVEL_FLOOR = 1e-3
_TINY = 1e-30
_HUGE = 1e150  # losses are cut off here, so that no difference or product of them is infinite
_HARD_SPAN, _SOFT_SPAN = 3, HARMLESS_AFTER
_SOFT_MASK = (1 << _SOFT_SPAN) - 1
_HARD_MASK = (1 << _HARD_SPAN) - 1
_RATE_WEIGHT = 1 / 512
_RATE_PRIOR = 5e-4
_MEAN_WEIGHT, _MEAN_LIMIT = 1 / 64, 10.0  # of the mean loss; one loss counts for so many L0 at most
_FEW = 8  # an outlier in this part of a batch or less says nothing of the weights
_STEEP = 0.5  # relative to the median
_MIN_BATCH = 4  # samples in a batch that can tell a few bad ones from a bad model


class Reading(NamedTuple):
    """The detector's word on one loss.

    Attributes:
        verdict: CALM, SUSPECT, SPIKE, DRIFT or NONFINITE.
        score: z; NaN while the detector is not active.
        reason: One sentence; empty when calm.
    """

    verdict: Verdict
    score: float
    reason: str = ""


class Detector:
    """Reads losses one by one; O(log window) a step, no array is allocated.

    Attributes:
        settings: As given.
        first_suspect_step: Step at which the present run of suspect losses (or the present
            drift) began, None while all is calm. Backups of earlier steps are not touched by it.
    """

    def __init__(self, settings: DetectorSettings | None = None) -> None:
        self.settings = settings or DetectorSettings()
        self.first_suspect_step: int | None = None
        self._needed_hard = _limits(_HARD_SPAN, 2, self.settings.chance)
        self._needed_soft = _limits(_SOFT_SPAN, 4, self.settings.chance)
        self._window = SortedWindow(self.settings.window)
        self._level = Level(self.settings)
        self._composition = Composition()
        self._outliers = HarmlessOutliers(self.settings.outlier_memory, self.settings.outlier_count)
        self._first = self._first_level = self._mean = math.nan
        self._relaxed_until = -1
        self._falling = 0  # losses in a row below the median of the window
        self._soft_bits = self._hard_bits = 0
        self._soft_rate = self._hard_rate = _RATE_PRIOR

    @property
    def active(self) -> bool:
        """Say whether there are enough losses to compare with."""
        return len(self._window) >= self.settings.warmup

    def observe(
        self,
        step: int,
        loss: float,
        *,
        expected_batch: float = math.nan,
        expected_all: float = math.nan,
        finite: bool = True,
        samples: NDArray[Any] | None = None,
        easy: bool = False,
    ) -> Reading:
        """Read the loss reported for one step.

        Args:
            step: Global step, rising.
            loss: Mean loss of the batch, unweighted.
            expected_batch: The catalog's estimate for the batch; NaN where there is none or it is
                not to be trusted yet.
            expected_all: The same for the whole data set.
            finite: False where a single sample's loss was not finite.
            samples: The losses of the batch's samples, shape `[n]`, where they are known.
            easy: The batch was made of easy samples only: its loss is compared with the others', and they
                are not with it.
        """
        if not finite or not math.isfinite(loss):
            self._mark_suspect(step)
            return Reading(Verdict.NONFINITE, math.nan, f"the loss is not finite ({loss})")
        excess = expected_batch - expected_all
        known = math.isfinite(excess)
        corrected = self._composition.correct(loss, excess) if known else loss
        # An easy batch whose loss is as usual is no fault: estimates may be wrong, above all after one.
        if corrected > loss:
            corrected = loss
        if not -_HUGE < corrected < _HUGE:
            corrected = math.copysign(_HUGE, corrected)
        if len(self._window) < self.settings.warmup:
            reading = self._learn(step, corrected, easy)
        else:
            reading = self._judge(step, corrected, corrected - loss, samples, easy)
        if known and reading.verdict is Verdict.CALM and abs(excess) < 1e75:
            self._composition.learn(loss, excess)
        return reading

    def announce(self, step: int, why: str) -> None:
        """Take notice that the loss may change its level: LR restart or rise, new strategy.

        Args:
            step: Global step at which it happens.
            why: For the reader of the calling code; not kept.
        """
        if not self.active:  # nothing to compare with yet: this is the schedule's warm-up
            return
        self._relaxed_until = step + self.settings.regime_steps
        self._level.forget_best()

    def rebaseline(self) -> None:
        """Accept the present level: forget what losses were compared with, and learn again."""
        self._window.fill(())
        self._level.forget_all()
        self._clear_flags()

    def reset_after_rollback(self, state: Mapping[str, Any] | None = None) -> None:
        """Go on from a rollback.

        Args:
            state: `state_dict()` of the time of the backup. None keeps the window, which holds
                only losses that were accepted.
        """
        if state is not None:
            announced, first = self._relaxed_until, self._first
            self.load_state_dict(state)
            self._relaxed_until = max(announced, self._relaxed_until)  # the learning rate does not go back
            if math.isnan(self._first):  # the next batches are easy ones: theirs would be no measure
                self._first = first
        self._level.forget_recent()
        self._clear_flags()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that later readings depend on, as plain numbers and lists."""
        state: dict[str, Any] = {name.strip("_"): getattr(self, name) for name in _SCALARS}
        # Strict JSON knows no infinity or NaN: what is not there yet is None.
        state = {name: value if value is None or math.isfinite(value) else None for name, value in state.items()}
        return {
            **state,
            "window": list(self._window.arrivals),
            "composition": self._composition.state_dict(),
            "level": self._level.state_dict(),
            "outliers": self._outliers.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, (kind, absent) in _SCALARS.items():
            value = state[name.strip("_")]
            setattr(self, name, absent if value is None else kind(value))
        self._window.fill(state["window"])
        self._composition.fill(state["composition"])
        self._level.load_state_dict(state["level"])
        self._outliers.fill(state["outliers"])

    def _learn(self, step: int, loss: float, easy: bool) -> Reading:
        """Read a loss before the detector is active."""
        settings = self.settings
        if math.isnan(self._first):
            self._first = loss
        limit = settings.warmup_rise * max(abs(self._first), _TINY)
        if math.isnan(self._first_level) and loss - self._first > limit:
            self._hard_bits = (self._hard_bits << 1 | 1) & _HARD_MASK
            self._mark_suspect(step)
            verdict = Verdict.SPIKE if self._hard_bits.bit_count() >= 2 else Verdict.SUSPECT
            return Reading(verdict, math.nan, f"{loss:.4g} is over {settings.warmup_rise:g} times the first loss")
        self._hard_bits = self._hard_bits << 1 & _HARD_MASK
        if not self._hard_bits:
            self.first_suspect_step = None
        if easy:
            return Reading(Verdict.CALM, math.nan)
        self._window.push(loss)
        self._level.recent.push(loss)
        if self.active and math.isnan(self._first_level):
            median = self._window.median()
            self._first_level = max(abs(median), self._window.deviation(median), _TINY)
            self._mean = median
        return Reading(Verdict.CALM, math.nan)

    def _judge(self, step: int, loss: float, shift: float, samples: NDArray[Any] | None, easy: bool) -> Reading:
        settings = self.settings
        m = self._window.median()
        s = self._scale(m)
        rise = loss - m
        z = rise / s
        if 0 <= self._relaxed_until <= step:
            self._relaxed_until = -1
            self._level.forget_best()
        ease = settings.regime_factor if step < self._relaxed_until else 1.0
        soft = hard = False
        self._outliers.pass_step()
        if z > settings.soft_score * ease:
            a = rise / max(abs(m), 2.0 * s)
            if a > settings.soft_rise * ease:
                soft = rise > self._outliers.envelope
                hard = soft and z > settings.hard_score * ease and a > settings.hard_rise * ease
                self._outliers.add(rise)
        if not easy:
            ceiling = abs(m) + _MEAN_LIMIT * self._first_level
            self._mean += _MEAN_WEIGHT * (min(ceiling, loss) - self._mean)
        if soft and samples is not None and len(samples) >= _MIN_BATCH:
            rest = bulk_mean(samples) + shift
            if rest - m <= max(settings.soft_score * s, settings.soft_rise * abs(m)) * ease:
                self._shift_flags(soft=False, hard=False)
                self._mark_suspect(step)
                return Reading(Verdict.SUSPECT, z, f"{loss:.4g} against a median of {m:.4g}, from a few samples")
        self._shift_flags(soft, hard)
        drifting = False
        if not easy:
            self._level.recent.push(loss)
            drifting = self._level.drifts(step, s, self._mean, self._first_level, ease)
        if not soft:
            if not easy:
                self._accept(loss, m)
            if not drifting:
                if not self._soft_bits:
                    self.first_suspect_step = None
                return Reading(Verdict.CALM, z)
        elif hard and (self._hard_bits & _HARD_MASK).bit_count() >= _needed(self._needed_hard, self._hard_rate):
            self._mark_suspect(step)
            return Reading(Verdict.SPIKE, z, f"{loss:.4g} against a median of {m:.4g}, again: z = {z:.3g}")
        elif self._soft_bits.bit_count() >= _needed(self._needed_soft, self._soft_rate):
            self._mark_suspect(step)
            flags = self._soft_bits.bit_count()
            return Reading(Verdict.SPIKE, z, f"{flags} of {_SOFT_SPAN} losses far above the median of {m:.4g}")
        if drifting:
            self.first_suspect_step = min(self._level.onset, step)
            level = f"the level has risen to {self._level.recent.median():.4g} from {self._level.best:.4g}"
            return Reading(Verdict.DRIFT, z, level)
        self._mark_suspect(step)
        return Reading(Verdict.SUSPECT, z, f"{loss:.4g} against a median of {m:.4g}: z = {z:.3g}")

    def _accept(self, loss: float, m: float) -> None:
        """Let a loss be compared with from now on; forget what was before a steep fall."""
        self._window.push(loss)
        self._falling = self._falling + 1 if loss < m else 0
        if self._falling >= self.settings.fall and m - self._level.recent.median() > _STEEP * abs(m):
            self._forget_fall()

    def _scale(self, m: float) -> float:
        """Return s, the spread that is usual around the median `m`."""
        s = spread = _MAD_TO_STD * self._window.deviation(m)
        skewed = (self._window.quantile(0.9) - m) / _NORMAL_Q90
        if skewed > spread:
            s = min(skewed, _MOST_SKEW * spread)
        return max(s, _RELATIVE_FLOOR * abs(m), _LEVEL_FLOOR * self._first_level, _TINY)

    def _shift_flags(self, soft: bool, hard: bool) -> None:
        if not (soft or self._soft_bits or self._hard_bits) and self._soft_rate == self._hard_rate == _RATE_PRIOR:
            return
        # A flag counts as harmless once it is old: during a fault the rates must not rise.
        self._soft_rate += _RATE_WEIGHT * ((self._soft_bits >> _SOFT_SPAN - 1) - self._soft_rate)
        self._soft_rate = max(self._soft_rate, _RATE_PRIOR)
        self._hard_rate += _RATE_WEIGHT * ((self._hard_bits >> _SOFT_SPAN - 1) - self._hard_rate)
        self._hard_rate = max(self._hard_rate, _RATE_PRIOR)
        self._soft_bits = (self._soft_bits << 1 | soft) & _SOFT_MASK
        self._hard_bits = (self._hard_bits << 1 | hard) & _SOFT_MASK

    def _forget_fall(self) -> None:
        """Drop what was before a steep fall: it says nothing of what is usual now."""
        self._falling = 0
        self._window.keep_newest(self.settings.fall)
        values = self._window.values
        self._mean = min(self._mean, math.fsum(values) / len(values))

    def _mark_suspect(self, step: int) -> None:
        if self.first_suspect_step is None:
            self.first_suspect_step = step

    def _clear_flags(self) -> None:
        self._soft_bits = self._hard_bits = 0
        self._outliers.drop_pending()
        self.first_suspect_step = None


# Attributes that are saved, their type, and their value where nothing is known yet.
_SCALARS: dict[str, tuple[type[int] | type[float], Any]] = {
    "first_suspect_step": (int, None),
    "_first": (float, math.nan),
    "_first_level": (float, math.nan),
    "_mean": (float, math.nan),
    "_relaxed_until": (int, -1),
    "_falling": (int, 0),
    "_soft_bits": (int, 0),
    "_hard_bits": (int, 0),
    "_soft_rate": (float, _RATE_PRIOR),
    "_hard_rate": (float, _RATE_PRIOR),
}


def bulk_mean(losses: NDArray[Any]) -> float:
    """Return the mean of a batch's losses without the highest eighth of them (at least one).

    Args:
        losses: One finite loss per sample, shape `[n]`, n >= 4.
    """
    kept = len(losses) - max(1, len(losses) // _FEW)
    return float(np.partition(losses, kept - 1)[:kept].mean(dtype=np.float64))


def _limits(span: int, least: int, chance: float) -> tuple[tuple[int, float], ...]:
    """Return (flags asked for, highest outlier rate for which so many are enough).

    The chance that `k` of `span` independent steps are flagged is at most `C(span, k) rate**k`.
    """
    return tuple((k, (chance / math.comb(span, k)) ** (1 / k)) for k in range(least, span + 1))


def _needed(limits: tuple[tuple[int, float], ...], rate: float) -> int:
    return next((flags for flags, limit in limits if rate <= limit), limits[-1][0])
