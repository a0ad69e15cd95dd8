"""Says of a step before it is taken whether it is to be left out: by its loss and by the norm of its gradient.

Both are measured by their relative rise above the median of the recent ones, `a = (x - m) / max(|m|, 2 s)` (the
detector's for losses). What stands out once may do harm at once, so one reading decides; and it may be a tail that the
run has always had, so it is compared with that tail. A step is left out where

    a > max(4, K highest),   K = 3 (1 + (96 / n)^2),   n >= 16

`highest` is the highest rise among the `n` steps that were taken, halved in 8192. For a tail that falls as x^-k the
chance of such a rise is about 1 / (n K^k) a step: with k = 2, where the variance is infinite, less than one in a run of
20,000. From the fourth step on one is left out, too, whose loss is far-flagged by the detector while its norm is ten
times the highest of the last 64. What is not finite is left out always.

Where most losses or norms are next to nothing (rewards that are sparse, margins that hold) the few others are what is
learned from: with a median below a thousandth of the first level, nothing below that level is left out.

A run is never starved. Three steps in a row at most are left out, and all are paid for from a credit of 16, which grows
by one in 48 steps: what stands out longer or more often is no outlier but a level, or the tail. It is let through, and
ordinary from then on; the detector judges it as ever.

Norms are clipped at their median times (q90 / median)^1.95, which of a log-normal spread is z = 2.5 (Kumar et al. 2025,
"ZClip: Adaptive Spike Mitigation for LLM Pre-Training"); by quantiles, since a mean follows the outliers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from learnit_r8.core.state import Kind, Saved, table
from learnit_r8.stability.detector import Detector
from learnit_r8.stability.windows import SortedWindow

WARMUP, _WINDOW = 16, 64
_LEAST_SEEN, _LEAST_RISE, _FACTOR, _YOUNG = 16, 4.0, 3.0, 96.0
_KEPT = 0.5 ** (1 / 8192)
_EASE = 3.0  # on losses, after an announced change
_IN_A_ROW, _CREDIT, _EARNED = 3, 16.0, 1 / 48  # steps that may be left out, and how many more a step
_FAR = 10.0
_NOTHING = 1e-3  # of the first level
_HUGE = 1e30  # rises beyond it are cut off, so that the state stays finite
_CLIP_POWER = 2.5 / 1.2816  # standard deviations, and those from the median to the 90% quantile
_OVERFLOWS = 16


class Rise(NamedTuple):
    """How far a number stands above those before it, and the highest of these: relative to their median."""

    above: float
    highest: float
    median: float


class _Tail:
    """The highest rise that was taken for ordinary, and of how many."""

    def __init__(self) -> None:
        self.highest, self.seen = 0.0, 0

    def excess(self, number: float, rise: Rise | None, first: float) -> float:
        """Return a rise over the one from which on it is an outlier, 0 where nothing can be said."""
        if rise is None or self.seen < _LEAST_SEEN:
            return 0.0
        if abs(rise.median) < _NOTHING * first and number <= first:  # it stands out since most are next to nothing
            return 0.0
        factor = _FACTOR * (1.0 + (_YOUNG / self.seen) ** 2)
        return rise.above / max(_LEAST_RISE, factor * max(self.highest, rise.highest))

    def take(self, rise: float) -> None:
        self.highest, self.seen = max(min(rise, _HUGE), self.highest * _KEPT), self.seen + 1


def _fill(tail: list[float]) -> _Tail:
    made = _Tail()
    made.highest, made.seen = float(tail[0]), int(tail[1])
    return made


_TAIL = Kind(lambda _, tail: [tail.highest, tail.seen], lambda _, saved: _fill(saved))


def _window(values: list[float]) -> SortedWindow:
    window = SortedWindow(_WINDOW)
    window.fill(values)
    return window


class Gate(Saved):
    """Decides over steps, one at a time and before each; says why in words.

    Attributes:
        news: What the last step gave to be told of the run; "" for nothing.
    """

    _saved: ClassVar = table(
        norms=Kind(lambda _, window: list(window.arrivals), lambda _, saved: _window(saved)),
        loss_tail=_TAIL,
        norm_tail=_TAIL,
        first_norm=float,
        credit=float,
        row=int,
        overflows=int,
    )

    def __init__(self) -> None:
        self._norms = SortedWindow(_WINDOW)
        self._loss_tail, self._norm_tail = _Tail(), _Tail()
        self._first_norm = 0.0  # the highest of the first 16
        self._credit, self._row = _CREDIT, 0  # what may be left out; steps in a row that were
        self._overflows = 0  # norms in a row that are not finite
        self.news = ""

    @property
    def clip_at(self) -> float:
        """The norm that gradients are to be clipped at; infinite while too few are known."""
        norms = self._norms
        if len(norms) < WARMUP:
            return math.inf
        median = norms.median()
        return float(median * (norms.quantile(0.9) / median) ** _CLIP_POWER) if median > 0.0 else math.inf

    def judge(self, detector: Detector, losses: Sequence[tuple[float, float]], norm: float | None) -> str:
        """Return why a step is to be left out, or "".

        Args:
            detector: Knows the losses so far.
            losses: Of each batch that shares the step, and its `excess` as the detector's.
            norm: Of the gradient, None where it is not given.
        """
        self.news = ""
        for loss, _ in losses:
            if not math.isfinite(loss):
                return f"the loss is not finite ({loss})"
        if norm is not None and not math.isfinite(norm):
            self._overflows += 1
            if self._overflows == _OVERFLOWS:
                self.news = (
                    f"the last {_OVERFLOWS} norms of the gradient are not finite: their steps were left out, and "
                    "nothing is trained until one is"
                )
            return f"the norm of the gradient is not finite ({norm})"
        self._credit = min(_CREDIT, self._credit + _EARNED)
        ease = _EASE if detector.eased else 1.0
        found = []
        for loss, excess in losses:
            rise = detector.rise(loss, excess)
            of_loss = None if rise is None else Rise(*rise)
            found.append((self._loss_tail.excess(loss, of_loss, detector.first_level) / ease, "a loss", loss, of_loss))
        of_norm = None if norm is None else self._rise(norm)
        by_norm = 0.0 if norm is None else self._norm_tail.excess(norm, of_norm, self._first_norm)
        worst = [max(found, key=lambda one: one[0])] if found else []
        why = " and ".join(
            f"{what} of {number:.4g} against a median of {rise.median:.4g}"
            for excess, what, number, rise in [*worst, (by_norm, "a gradient's norm", norm, of_norm)]
            if excess > 1.0 and rise is not None
        )
        highest = self._norms.values[-1] if len(self._norms) > 2 else math.inf
        if not why and worst and norm is not None and norm > _FAR * highest and detector.far(worst[0][2]):
            why = (
                f"a loss of {worst[0][2]:.4g}, and a gradient's norm of {norm:.4g} against {highest:.4g} at most before"
            )
        if why and self._credit >= 1.0 and self._row < _IN_A_ROW:
            self._credit, self._row = self._credit - 1.0, self._row + 1
            return why
        self._row = 0
        if why:
            self.news = (
                f"what stands out is a level or a tail by now, and no outlier: {_IN_A_ROW} steps in a row, or more "
                f"than one in {1 / _EARNED:.0f}, were left out; it is taken from here on ({why})"
            )
        for _, _, _, of_loss in found:
            if of_loss is not None:
                self._loss_tail.take(of_loss.above)
        if of_norm is not None:
            self._norm_tail.take(of_norm.above)
        if norm is not None:
            self._overflows = 0
            self.learn(norm)
        return ""

    def learn(self, norm: float) -> None:
        """Take the norm of a step that is taken whatever it is."""
        if math.isfinite(norm):
            self._norms.push(norm)
            if self._norm_tail.seen == 0 and len(self._norms) <= WARMUP:
                self._first_norm = max(self._first_norm, norm)

    def _rise(self, norm: float) -> Rise | None:
        norms = self._norms
        if len(norms) < WARMUP:
            return None
        median = norms.median()
        scale = max(median, 2.0 * 1.4826 * norms.deviation(median), 1e-30)
        return Rise((norm - median) / scale, (norms.values[-1] - median) / scale, median)
