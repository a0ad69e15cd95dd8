"""Says of a step before it is taken whether it is to be left out: by its loss and by the norm of its gradient.

Both are measured by their relative rise above the median of the recent ones, `a = (x - m) / max(|m|, 2 s)` (the
detector's for losses). What stands out once may do harm at once, so one reading decides; and it may be a tail that the
run has always had, so it is compared with that tail. A step is left out where

    a > max(4, K highest),   K (1 + (96 / n)^2),   n >= 16

`highest` is the highest rise among the `n` steps that were taken, halved in 8192; K is 3 for norms, 4 for losses. For
a tail that falls as x^-k the chance of such a rise is about 1 / (n K^k) a step. From the fourth step on one is left
out, too, whose loss is far-flagged by the detector while its norm is ten times the highest of the last 64. What is not
finite is left out always.

Where the samples' losses are known, a batch that is bad differs from one that a few hard samples make as high: all of
it stands out. Then the evidence is added up,

    log(1 + a) + shift + log(norm / median norm)

with `shift` the median over the batch of log(loss / expected loss), above its own median: each has a tail, but these
hardly meet. The sum is to lie above its highest by log 4, by log 9 with a norm; and a mean loss alone, which a few
samples make, then needs K = 10.

Where most losses or norms are next to nothing (rewards that are sparse, margins that hold) the few others are what is
learned from: with a median below a thousandth of the first level, nothing below that level is left out.

A run is never starved. What stands out and comes again as high in the next step is a level, unless outliers were seen
that did not; three steps in a row at most are left out, and all are paid for from a credit of 16, which grows by one in
48 steps. What stands out more often is the tail. Both are let through, and ordinary from then on; the detector judges
them as ever.

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
_ALONE, _FEW = 4.0, 10.0  # in place of _FACTOR, of a loss whose samples are not known, or of which few stand out
_PAIR, _TRIPLE = math.log(4.0), math.log(9.0)  # margins of loss and samples together, and of these with the norm
_LEAST_AGREED, _LEAST_ABOVE = 2.5, 2.0
_ALIKE = 2.0  # factor between two that are of one level
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


class Seen(NamedTuple):
    """What is known of a batch before its step.

    Attributes:
        loss: Its mean loss.
        excess: What was expected of it beyond the mean of all, as the detector's; NaN where that is not known.
        shift: Median over its samples of log(loss / expected loss); NaN where these are not known.
    """

    loss: float
    excess: float = math.nan
    shift: float = math.nan


class _Tail:
    """The highest rise that was taken for ordinary, and of how many."""

    def __init__(self) -> None:
        self.highest, self.seen = 0.0, 0

    def excess(self, number: float, rise: Rise | None, first: float, factor: float) -> float:
        """Return a rise over the one from which on it is an outlier, 0 where nothing can be said."""
        if rise is None or self.seen < _LEAST_SEEN:
            return 0.0
        if abs(rise.median) < _NOTHING * first and number <= first:  # it stands out since most are next to nothing
            return 0.0
        factor *= 1.0 + (_YOUNG / self.seen) ** 2
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
        shifts=Kind(lambda _, window: list(window.arrivals), lambda _, saved: _window(saved)),
        pair_tail=_TAIL,
        triple_tail=_TAIL,
        lone=bool,
        last=dict,
    )

    def __init__(self) -> None:
        self._norms = SortedWindow(_WINDOW)
        self._loss_tail, self._norm_tail = _Tail(), _Tail()
        self._first_norm = 0.0  # the highest of the first 16
        self._credit, self._row = _CREDIT, 0  # what may be left out; steps in a row that were
        self._shifts, self._pair_tail, self._triple_tail = SortedWindow(_WINDOW), _Tail(), _Tail()
        self._lone = False  # a step was left out that was none of a level
        self._last: dict[str, float] = {}  # what stood out in the last step, if it was left out
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

    def judge(self, detector: Detector, losses: Sequence[Seen], norm: float | None) -> str:
        """Return why a step is to be left out, or "".

        Args:
            detector: Knows the losses so far.
            losses: Of each batch that shares the step.
            norm: Of the gradient, None where it is not given.
        """
        self.news = ""
        for seen in losses:
            if not math.isfinite(seen.loss):
                return f"the loss is not finite ({seen.loss})"
        if norm is not None and not math.isfinite(norm):
            self._overflows += 1
            if self._overflows == _OVERFLOWS:
                self.news = (
                    f"the last {_OVERFLOWS} norms of the gradient are not finite: their steps were left out, and "
                    "nothing is trained until one is"
                )
            return f"the norm of the gradient is not finite ({norm})"
        self._credit = min(_CREDIT, self._credit + _EARNED)
        rises = [detector.rise(seen.loss, seen.excess) for seen in losses]
        of_losses = [None if rise is None else Rise(*rise) for rise in rises]
        of_norm = None if norm is None else self._rise(norm)
        out: dict[str, float] = {}  # what stands out, and by which number
        for seen, rise in zip(losses, of_losses, strict=True):
            if rise is not None and self._by_loss(detector, seen, rise, norm) > 1.0:
                out[f"a loss of {seen.loss:.4g} against a median of {rise.median:.4g}"] = seen.loss
        if norm is not None and self._norm_tail.excess(norm, of_norm, self._first_norm, _FACTOR) > 1.0:
            assert of_norm is not None
            out[f"a gradient's norm of {norm:.4g} against a median of {of_norm.median:.4g}"] = norm
        why = " and ".join(out)
        if not why and losses and norm is not None:
            why = self._far(detector, max(seen.loss for seen in losses), norm)
        if why and self._may_be_left_out({what.partition(" of ")[0]: number for what, number in out.items()}):
            return why
        if why:
            self.news = (
                "what stands out is a level or a tail by now, and no outlier: it came again, or steps were left out "
                f"more often than one in {1 / _EARNED:.0f}; it is taken from here on ({why})"
            )
        elif self._row:
            self._lone = True
        self._row, self._last = 0, {}
        for seen, rise in zip(losses, of_losses, strict=True):
            if rise is not None:
                self._loss_tail.take(rise.above)
                if (joint := self._joint(seen, rise, norm)) is not None:
                    joint[1].take(joint[0])
            if math.isfinite(seen.shift):
                self._shifts.push(seen.shift)
        if of_norm is not None:
            self._norm_tail.take(of_norm.above)
        if norm is not None:
            self._overflows = 0
            self.learn(norm)
        return ""

    def _by_loss(self, detector: Detector, seen: Seen, rise: Rise, norm: float | None) -> float:
        """Return how far a loss stands out, 1 where it is just not ordinary any more."""
        ease, first, factor = _EASE if detector.eased else 1.0, detector.first_level, _ALONE
        if (joint := self._joint(seen, rise, norm)) is not None:
            agreed, tail, margin = joint
            if tail.seen >= _LEAST_SEEN:
                factor = _FEW
                margin += math.log(ease) + 0.5 * math.log1p((_YOUNG / tail.seen) ** 2)
                if agreed > max(_LEAST_AGREED, tail.highest + margin) and rise.above > _LEAST_ABOVE:
                    return math.inf
        return self._loss_tail.excess(seen.loss, rise, first, factor) / ease

    def _joint(self, seen: Seen, rise: Rise, norm: float | None) -> tuple[float, _Tail, float] | None:
        """Return the logarithm of all rises together, the tail that it belongs to, and the margin above that."""
        if not math.isfinite(seen.shift) or len(self._shifts) < WARMUP:
            return None
        sum_of = math.log1p(max(rise.above, 0.0)) + seen.shift - self._shifts.median()
        if norm is None:
            return sum_of, self._pair_tail, _PAIR
        if len(self._norms) < WARMUP or not (usual := self._norms.median()) > 0.0 < norm:
            return None
        return sum_of + math.log(norm / usual), self._triple_tail, _TRIPLE

    def _far(self, detector: Detector, loss: float, norm: float) -> str:
        highest = self._norms.values[-1] if len(self._norms) > 2 else math.inf
        if not (norm > _FAR * highest and detector.far(loss)):
            return ""
        return f"a loss of {loss:.4g}, and a gradient's norm of {norm:.4g} against {highest:.4g} at most before"

    def _may_be_left_out(self, out: dict[str, float]) -> bool:
        """Say of a step that stands out whether it is left out, or is a level or a tail by now."""
        last, self._last = self._last, out
        again = bool(last) and all(
            what in last and last[what] / _ALIKE < number < last[what] * _ALIKE for what, number in out.items()
        )
        if self._credit < 1.0 or self._row >= (1 if again and not self._lone else _IN_A_ROW):
            return False
        self._credit, self._row = self._credit - 1.0, self._row + 1
        return True

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
