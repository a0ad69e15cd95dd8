"""Says of every reported loss whether it is as usual. What a jump means is judged elsewhere, by the weights.

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
  steps (one that was not followed by a fault within 8 steps), and above the second highest jump of the last
  4096 whose level was accepted;
* where flags were harmless before, as many are asked for as independent ones at the observed rate
  would reach with a probability of at most 2.5e-6 a step;
* where the losses of the samples are known, an outlier that comes from an eighth of the batch or
  less is suspect, but no proof: weights that are broken are so for all samples.

*Far*-flagged is, from the third loss on and whatever was harmless before, a loss with z > 6 that is ten times as
high as both the median and the highest of the first losses; three in a row are a spike.

What is too slow for the window, which follows it, is told as *drift* (see `level`).

16 losses in a row below the median whose level is less than half of it are a steep fall: the window keeps
only them, or the start of a run would count as usual spread for long.

NaN and infinity are told from the first step on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from learnit_r8.stability.level import Level
from learnit_r8.stability.windows import (
    HARMLESS_AFTER,
    Composition,
    HarmlessOutliers,
    SortedWindow,
    numbers,
    take_numbers,
)
from learnit_r8.types import Verdict

WARMUP, _WINDOW = 16, 64
"""Losses before the detector is active (until then only far flags count), and those that are compared with."""
_HARD_SCORE, _HARD_RISE = 16.0, 1.0
_SOFT_SCORE, _SOFT_RISE = 6.0, 0.5
_CHANCE, _OUTLIERS, _OUTLIER_MEMORY = 2.5e-6, 2, 1024  # steps
_FALL = 16  # losses in a row below the median: a steep fall, the window keeps only them
_EASE, _EASED_STEPS = 3.0, 128  # factor on all thresholds after an announced change, and for how long
_MAD_TO_STD = 1.4826  # of a normal distribution
_NORMAL_Q90 = 1.2816  # standard deviations from the median to the 90% quantile
_MOST_SKEW = 4.0  # times the MAD's: a loss that grows exponentially moves the quantile before it is flagged
_RELATIVE_FLOOR = 0.02
_LEVEL_FLOOR = 1e-3
_TINY = 1e-30
_HUGE = 1e150  # losses are cut off here, so that no difference or product of them is infinite
_LARGE = 1e75  # whose squares are finite
_HARD_SPAN, _SOFT_SPAN = 3, HARMLESS_AFTER
_SOFT_MASK = (1 << _SOFT_SPAN) - 1
_HARD_MASK = (1 << _HARD_SPAN) - 1
_RATE_WEIGHT = 1 / 512
_RATE_PRIOR = 5e-4
_FAR, _FAR_SPAN = 10.0, 3  # times the highest of the first losses; in a row
_FAR_MASK = (1 << _FAR_SPAN) - 1
_JUMP_MEMORY, _JUMP_MARGIN = 4096, 1.25
_FEW = 8  # an outlier in this part of a batch or less says nothing of the weights
_STEEP = 0.5  # relative to the median
_MIN_BATCH = 4  # samples in a batch that can tell a few bad ones from a bad model


class Reading(NamedTuple):
    """The detector's word on one loss: its z (NaN while not active) and one sentence, empty when calm."""

    verdict: Verdict
    score: float
    reason: str = ""


class Detector:
    """Reads losses one by one; O(log window) a step, no array is allocated.

    `first_suspect_step` is where the present run of suspect losses began, None while all is calm: backups of earlier
    steps are not touched by it. `whole_batch`: the last flagged loss stood out for more than a few samples, as far as
    is known. `chance` bounds the probability, per step, that independent outliers pass for a spike.
    """

    def __init__(self, *, chance: float = _CHANCE, outliers: int = _OUTLIERS) -> None:
        self.first_suspect_step: int | None = None
        self.whole_batch = False
        self.last = math.nan
        self._needed_hard = _limits(_HARD_SPAN, 2, chance)
        self._needed_soft = _limits(_SOFT_SPAN, 4, chance)
        self._window = SortedWindow(_WINDOW)
        self.level = Level()
        self._composition = Composition()
        self._outliers = HarmlessOutliers(_OUTLIER_MEMORY, outliers)
        self._jumps = HarmlessOutliers(_JUMP_MEMORY, outliers)
        self._first_level = math.nan
        self._untrained = 0.0  # highest of the first losses
        self._relaxed_until = -1
        self._falling = 0  # losses in a row below the median of the window
        self._soft_bits = self._hard_bits = self._far_bits = 0
        self._jump = 0.0  # highest rise of the present run of flags
        self._soft_rate = self._hard_rate = _RATE_PRIOR

    @property
    def active(self) -> bool:
        """Say whether there are enough losses to compare with."""
        return len(self._window) >= WARMUP

    @property
    def just_lost(self) -> bool:
        """Say whether the last losses are the untrained model's, after a level of half of that."""
        return self.level.just_lost(self._first_level)

    def ordinary(self, loss: float) -> bool:
        """Say whether a loss would not stand out; true while too little is known."""
        if not self.active:
            return True
        m = self._window.median()
        return loss - m <= max(_SOFT_SCORE * self._scale(m), _SOFT_RISE * abs(m))

    @property
    def eased(self) -> bool:
        """Whether an announced change may still move the loss."""
        return self._relaxed_until >= 0

    @property
    def first_level(self) -> float:
        """The level of the untrained model's losses; NaN while unknown."""
        return self._first_level

    @property
    def usual(self) -> float:
        """The median of the recent losses; NaN while not active."""
        return self._window.median() if self.active else math.nan

    def far(self, loss: float) -> bool:
        """Say of a loss that is still to be read whether it would be far-flagged."""
        return len(self._window) > 2 and loss > _FAR * self._untrained > 0.0

    def rise(self, loss: float, excess: float) -> tuple[float, float, float] | None:
        """Return `a` of a loss that is still to be read, that of the highest in the window, and the median.

        None where there is nothing to compare with. `excess` as in `take_calm`.
        """
        if not self.active:
            return None
        corrected = min(loss, self._composition.correct(loss, excess)) if math.isfinite(excess) else loss
        m = self._window.median()
        unit = max(abs(m), 2.0 * self._scale(m))
        return (corrected - m) / unit, (self._window.values[-1] - m) / unit, m

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
        """Read the mean loss reported for one step.

        The catalog's estimates for the batch and for all data are NaN where they are not to be trusted yet. `easy`: the
        batch was made of easy samples only; its loss is compared with the others', and they are not with it.
        """
        self.last = loss
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
        if len(self._window) < WARMUP:
            reading = self._learn(step, corrected, easy)
        else:
            reading = self._judge(step, corrected, corrected - loss, samples, easy)
        if known and reading.verdict is Verdict.CALM and abs(excess) < _LARGE:
            self._composition.learn(loss, excess)
        return reading

    def take_calm(self, losses: Sequence[float], excesses: Sequence[float], *, scored: bool = False) -> list[float]:
        """Read losses that are calm beyond doubt as `observe` does, in a fraction of its calls.

        Such are at most by half above the median, while no flag is up, nothing was announced and no look at the level
        is due. `excesses`: what was expected of each batch beyond the mean of all, or NaN.

        Returns:
            z of each loss that was taken, up to the first one that has to go the long way; NaN unless `scored`.
        """
        window, composition, level = self._window, self._composition, self.level
        scores: list[float] = []
        if not self._unflagged:
            return scores
        far = _FAR * self._untrained
        for loss, excess in zip(losses, excesses, strict=True):
            known = math.isfinite(excess)
            corrected = composition.correct(loss, excess) if known else loss
            if corrected > loss:
                corrected = loss
            m = window.median()
            if not (-_HUGE < corrected <= m + _SOFT_RISE * abs(m) and loss <= far):
                break
            if not level.take(max(corrected, min(corrected - (corrected - loss), m))):  # rounded as in `_judge`
                break
            scores.append((corrected - m) / self._scale(m) if scored else math.nan)
            self._accept(corrected, m)
            if known and abs(excess) < _LARGE:
                composition.learn(loss, excess)
        if scores:
            self.last, self.first_suspect_step, self._jump = losses[len(scores) - 1], None, 0.0
            self._outliers.pass_ordinary(len(scores))
            self._jumps.pass_ordinary(len(scores))
            if not self._soft_rate == self._hard_rate == _RATE_PRIOR:
                for _ in scores:
                    self._shift_flags(soft=False, hard=False)
        return scores

    @property
    def _unflagged(self) -> bool:
        """Whether there are enough losses to compare with, no flag is up and nothing was announced."""
        flagged = self._soft_bits or self._hard_bits or self._far_bits
        return not flagged and self._relaxed_until < 0 and self.active

    def calm_limits(self, most: int) -> tuple[list[float], float]:
        """Return how high each of the next losses may be that `take_calm` is sure to take, the next one last.

        Whatever they are: each moves the median by one place at most. There are no more than `most`, and than are left
        until the next look at the level. Where the window may be cut for a steep fall meanwhile, there are as few as
        it takes to know that, or losses less their excess must not be below the second value.
        """
        values, arrivals, falling = self._window.values, self._window.arrivals, self._falling
        if not self.level.until_look or not self._unflagged:
            return [], 0.0
        middle = (len(values) - 1) // 2
        count, floor = min(most, self.level.until_look, middle + 1), -math.inf
        if falling + count > _FALL:
            highest = values[min(middle + 1 + count, len(values) - 1)]  # that the median may come to
            floor = highest - _STEEP * abs(highest)
            if falling and min(itertools.islice(reversed(arrivals), falling)) < floor:
                count, floor = min(count, max(1, _FALL - falling)), -math.inf
        far = _FAR * self._untrained
        limits = [min(low + _SOFT_RISE * abs(low), far) for low in values[middle + 1 - count : middle + 1]]
        return limits, floor

    def announce(self, step: int, why: str) -> None:
        """Take notice that the loss may change its level, and why: LR restart or rise, new strategy."""
        if not self.active:  # nothing to compare with yet: this is the schedule's warm-up
            return
        self._relaxed_until = step + _EASED_STEPS

    def rebaseline(self) -> None:
        """Accept the present level: forget what losses were compared with, and learn again."""
        if self._jump > 0.0:
            self._jumps.remember(self._jump)
            self._untrained = max(self._untrained, self._jump)
        self._window.fill(())
        self.level.restart(forget_best=True)
        self._clear_flags()

    def reset_after_rollback(self, state: Mapping[str, Any] | None = None) -> None:
        """Go on from a rollback, with the state of the time of the backup.

        None, or one that had no level yet, keeps the window, which holds only losses that were accepted.
        """
        if state is not None and len(state["window"]) >= WARMUP:
            announced, record = self._relaxed_until, self.level.record
            learned = self.level.learned  # what was lost once must be learned again before it can be lost again
            self.load_state_dict(state)
            self.level.learned = learned
            self._relaxed_until = max(announced, self._relaxed_until)  # the learning rate does not go back
            self.level.record = min(record, self.level.record)
        self.level.restart(forget_best=False)
        self._clear_flags()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that later readings depend on, as plain numbers and lists."""
        return {
            **numbers(self, _NUMBERS),
            "window": list(self._window.arrivals),
            "composition": self._composition.state_dict(),
            "level": self.level.state_dict(),
            "outliers": self._outliers.state_dict(),
            "jumps": self._jumps.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        take_numbers(self, _NUMBERS, state)
        self._window.fill(state["window"])
        self._composition.fill(state["composition"])
        self.level.load_state_dict(state["level"])
        self._outliers.fill(state["outliers"])
        self._jumps.fill(state["jumps"])

    def _learn(self, step: int, loss: float, easy: bool) -> Reading:
        """Read a loss before the detector is active."""
        if self._far(loss, 0.0):
            self._mark_suspect(step)
            self._jump = max(self._jump, loss)
            spike = self._far_bits == _FAR_MASK
            verdict = Verdict.SPIKE if spike else Verdict.SUSPECT
            return Reading(
                verdict, math.nan, f"{loss:.4g} is over {_FAR:g} times the highest before, {self._untrained:.4g}"
            )
        self.first_suspect_step = None
        if easy:
            return Reading(Verdict.CALM, math.nan)
        self._window.push(loss)
        if math.isnan(self._first_level):
            self._untrained = max(self._untrained, abs(loss))
            if self.active:
                median = self._window.median()
                self._first_level = max(abs(median), self._window.deviation(median), _TINY)
        elif self._relaxed_until < 0:  # after a new level was accepted: it is followed from its first loss on
            self.level.push(step, loss, self._first_level)
        return Reading(Verdict.CALM, math.nan)

    def _far(self, loss: float, level: float) -> bool:
        """Shift the far flags, and say whether this loss is so flagged."""
        known = len(self._window) >= 2 or not math.isnan(self._first_level)
        far = known and loss > _FAR * max(self._untrained, level) > 0.0
        self._far_bits = (self._far_bits << 1 | far) & _FAR_MASK
        return far

    def _judge(self, step: int, loss: float, shift: float, samples: NDArray[Any] | None, easy: bool) -> Reading:
        m = self._window.median()
        s = self._scale(m)
        rise = loss - m
        z = rise / s
        ease = 1.0
        if self._relaxed_until >= 0:
            if step < self._relaxed_until:
                ease = _EASE
            else:
                self._relaxed_until = -1
                self.level.restart(forget_best=True)
        stands_out = z > _SOFT_SCORE
        far = (self._far_bits or loss > _FAR * self._untrained) and self._far(loss if stands_out else -_HUGE, m)
        soft, hard = self._flags(rise, z, m, s, ease)
        if soft and samples is not None and len(samples) >= _MIN_BATCH:
            rest = bulk_mean(samples) + shift
            if rest - m <= max(_SOFT_SCORE * s, _SOFT_RISE * abs(m)) * ease:
                self._shift_flags(soft=False, hard=False)
                self._far_bits &= ~1
                self._mark_suspect(step)
                self.whole_batch = False
                return Reading(Verdict.SUSPECT, z, f"{loss:.4g} against a median of {m:.4g}, from a few samples")
        self._shift_flags(soft, hard)
        told = ""
        if not easy and self._relaxed_until < 0:
            explained = max(loss, min(loss - shift, m))  # estimates that are far off must not make up a level
            told = self.level.push(step, explained, self._first_level)
        if not (soft or (far and self._far_bits == _FAR_MASK)):
            if not easy:
                self._accept(loss, m)
            if not self._soft_bits:
                self.first_suspect_step, self._jump = None, 0.0
            return Reading(Verdict.DRIFT, z, told) if told else Reading(Verdict.CALM, z)
        self._mark_suspect(step)
        self.whole_batch = samples is None or len(samples) >= _MIN_BATCH
        self._jump = max(self._jump, rise)
        if hard and (self._hard_bits & _HARD_MASK).bit_count() >= _needed(self._needed_hard, self._hard_rate):
            return Reading(Verdict.SPIKE, z, f"{loss:.4g} against a median of {m:.4g}, again: z = {z:.3g}")
        if soft and self._soft_bits.bit_count() >= _needed(self._needed_soft, self._soft_rate):
            flags = self._soft_bits.bit_count()
            return Reading(Verdict.SPIKE, z, f"{flags} of {_SOFT_SPAN} losses far above the median of {m:.4g}")
        if self._far_bits == _FAR_MASK:
            return Reading(Verdict.SPIKE, z, f"{_FAR_SPAN} losses over {_FAR:g} times the untrained model's")
        return Reading(Verdict.SUSPECT, z, f"{loss:.4g} against a median of {m:.4g}: z = {z:.3g}")

    def _flags(self, rise: float, z: float, m: float, s: float, ease: float) -> tuple[bool, bool]:
        """Return whether a loss is soft- and hard-flagged, and remember it as an outlier where it stands out."""
        a = rise / max(abs(m), 2.0 * s)
        outlier = z > _SOFT_SCORE * ease and a > _SOFT_RISE * ease
        self._outliers.pass_step(ordinary=not outlier)
        self._jumps.pass_step()
        if not outlier:
            return False, False
        soft = rise > max(self._outliers.envelope, _JUMP_MARGIN * self._jumps.envelope)
        self._outliers.add(rise)
        return soft, soft and z > _HARD_SCORE * ease and a > _HARD_RISE * ease

    def _accept(self, loss: float, m: float) -> None:
        """Let a loss be compared with from now on; forget what was before a steep fall."""
        self._window.push(loss)
        self._falling = self._falling + 1 if loss < m else 0
        if self._falling >= _FALL:
            fallen = sorted(list(self._window.arrivals)[-self._falling :])
            if m - fallen[len(fallen) // 2] > _STEEP * abs(m):
                self._falling = 0
                self._window.keep_newest(_FALL)
            elif self._falling >= _WINDOW:
                self._falling = _FALL

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

    def _mark_suspect(self, step: int) -> None:
        if self.first_suspect_step is None:
            self.first_suspect_step = step

    def _clear_flags(self) -> None:
        self._soft_bits = self._hard_bits = self._far_bits = 0
        self._outliers.drop_pending()
        self.first_suspect_step, self._jump = None, 0.0


_NUMBERS: dict[str, float | int | None] = {
    "first_suspect_step": None, "_first_level": math.nan, "_untrained": 0.0, "_jump": 0.0, "_relaxed_until": -1,
    "_falling": 0, "_soft_bits": 0, "_hard_bits": 0, "_far_bits": 0, "_soft_rate": _RATE_PRIOR,
    "_hard_rate": _RATE_PRIOR,
}  # fmt: skip
"""What is saved, and its value where nothing is known yet."""


def bulk_mean(losses: NDArray[Any]) -> float:
    """Return the mean of a batch's losses, at least 4, without the highest eighth of them (at least one)."""
    kept = len(losses) - max(1, len(losses) // _FEW)
    return float(np.partition(losses, kept - 1)[:kept].mean(dtype=np.float64))


def _limits(span: int, least: int, chance: float) -> tuple[tuple[int, float], ...]:
    """Return (flags asked for, highest outlier rate for which so many are enough).

    The chance that `k` of `span` independent steps are flagged is at most `C(span, k) rate**k`.
    """
    return tuple((k, (chance / math.comb(span, k)) ** (1 / k)) for k in range(least, span + 1))


def _needed(limits: tuple[tuple[int, float], ...], rate: float) -> int:
    return next((flags for flags, limit in limits if rate <= limit), limits[-1][0])
