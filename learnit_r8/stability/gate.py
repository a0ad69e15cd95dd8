"""Says of a step before it is taken whether it is to be left out: by its loss and by the norm of its gradient.

Both are measured by their relative rise above the median of the recent ones, `a = (x - m) / max(|m|, 2 s)` (the
detector's for losses). What stands out once may do harm at once, so one reading decides; and it may be a tail that the
run has always had, so it is compared with that tail. A step is left out where

    a > max(4, K highest),   K = 3 (1 + 32 / n),   n >= 64

`highest` is the highest rise among the `n` steps that were taken, halved in 8192. For a tail that falls as x^-k the
chance of such a rise is about 1 / (n K^k) a step: with k = 2, where the variance is infinite, less than one in a run of
20,000. What is not finite is left out always.

A run is never starved. What stands out once 16 of the last 64 steps were left out is no outlier but a level: it is let
through, until a step is ordinary again; the detector judges it as ever.

Norms are clipped at their median times (q90 / median)^1.95, which of a log-normal spread is z = 2.5 (Kumar et al. 2025,
"ZClip: Adaptive Spike Mitigation for LLM Pre-Training"); by quantiles, since a mean follows the outliers.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

from learnit_r8.core.state import Kind, Saved, table
from learnit_r8.stability.detector import Detector
from learnit_r8.stability.windows import SortedWindow

WARMUP, _WINDOW = 16, 64
_LEAST_SEEN, _LEAST_RISE, _FACTOR, _YOUNG = 64, 4.0, 3.0, 32.0
_KEPT = 0.5 ** (1 / 8192)
_EASE = 3.0  # on losses, after an announced change
_MOST = 16  # of 64
_ALL = (1 << 64) - 1
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

    def exceeded(self, rise: Rise, ease: float = 1.0) -> bool:
        if self.seen < _LEAST_SEEN:
            return False
        factor = _FACTOR * (1.0 + _YOUNG / self.seen)
        return rise.above > ease * max(_LEAST_RISE, factor * max(self.highest, rise.highest))

    def take(self, rise: float) -> None:
        self.highest, self.seen = max(rise, self.highest * _KEPT), self.seen + 1


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
        bits=int,
        open=bool,
        overflows=int,
    )

    def __init__(self) -> None:
        self._norms = SortedWindow(_WINDOW)
        self._loss_tail, self._norm_tail = _Tail(), _Tail()
        self._bits = 0  # of the last 64 steps, those that were left out
        self._open = False  # what stands out is let through, as a level
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

    def judge(self, detector: Detector, loss: float | None, excess: float, norm: float | None) -> str:
        """Return why a step is to be left out, or "". What is not given is None; `excess` as the detector's."""
        self.news = ""
        if loss is not None and not math.isfinite(loss):
            return f"the loss is not finite ({loss})"
        if norm is not None and not math.isfinite(norm):
            self._overflows += 1
            if self._overflows == _OVERFLOWS:
                self.news = (
                    f"the last {_OVERFLOWS} norms of the gradient are not finite: their steps were left out, and "
                    "nothing is trained until one is"
                )
            return f"the norm of the gradient is not finite ({norm})"
        found = None if loss is None else detector.rise(loss, excess)
        of_loss = None if found is None else Rise(*found)
        of_norm = None if norm is None else self._rise(norm)
        why = ""
        if of_loss is not None and self._loss_tail.exceeded(of_loss, _EASE if detector.eased else 1.0):
            why = f"a loss of {loss:.4g} against a median of {of_loss.median:.4g}"
        if of_norm is not None and self._norm_tail.exceeded(of_norm):
            why += f"{' and ' if why else ''}a gradient's norm of {norm:.4g} against a median of {of_norm.median:.4g}"
        if why and self._lets_through(why):
            why = ""
        elif not why:
            self._open = False
            if of_loss is not None:
                self._loss_tail.take(of_loss.above)
            if of_norm is not None:
                self._norm_tail.take(of_norm.above)
        self._bits = (self._bits << 1 | bool(why)) & _ALL
        if norm is not None:
            self._overflows = 0
            if not why:
                self._norms.push(norm)
        return why

    def learn(self, norm: float) -> None:
        """Take the norm of a step that is taken whatever it is."""
        if math.isfinite(norm):
            self._norms.push(norm)

    def _rise(self, norm: float) -> Rise | None:
        norms = self._norms
        if len(norms) < WARMUP:
            return None
        median = norms.median()
        scale = max(median, 2.0 * 1.4826 * norms.deviation(median), 1e-30)
        return Rise((norm - median) / scale, (norms.values[-1] - median) / scale, median)

    def _lets_through(self, why: str) -> bool:
        """Say whether what stands out is taken for a level by now."""
        if self._open:
            return True
        if self._bits.bit_count() >= _MOST:
            self._open = True
            self.news = (
                f"{_MOST} of the last 64 steps were left out, which is a level by now and no outlier: what stands out "
                f"is taken from here on ({why})"
            )
        return self._open
