"""The level of the loss over longer times: the best it has been, whether it rises without end, or has shifted for good.

Neither is proof of anything broken, and neither undoes itself: it is told, and only what lies above all that the run
has shown in the last half of its steps. A loss near 0 swings by factors, and one of warm restarts rises by design.

* *Growth*: the median of the last 48 losses lies above the highest level of the half of the run before the best
  such median by more than four times the best level (in what scale it had then: its median, its mean or twice its
  spread, whichever is largest). The next growth is told by the same measure of the level that was told.
* *Shift*: the median of the last 48 losses exceeds that of the 96 before by seven standard errors, and by 10% both
  that and the highest level of the half of the run before them, at two looks in a row.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from learnit_r8.stability.windows import numbers, take_numbers

_RECENT, _BEFORE, _EVERY = 48, 96, 16
_GROWTH = 4.0
_SHIFT, _ERRORS = 0.1, 7.0
_LEARNED, _LOST = 0.5, 0.9  # of the untrained model's level
_SUDDEN = 6  # looks
_STANDARD_ERROR = 0.22
"""Of the difference of the two medians, in standard deviations of a loss: 1.25 sqrt(1/48 + 1/96)."""
_BLOCKS, _LATELY = 48, 2  # of the levels of a run at most; the last half of them count
_MAD_TO_STD = 1.4826
_SWING = 1.5  # mean deviations; a level that has just jumped to a constant one is up to two of them above the old one
_FLOOR = 1e-3


class Level:
    """Follows the level.

    Attributes:
        now: Median of the last 48 losses; NaN until there are so many.
        best: The lowest that it was since a new level was accepted; infinite at first.
        best_step: The step at which that was.
        lowest: The lowest that it ever was.
        lowest_step: The step of that.
        lowest_scale: What counted as one level then.
        scale: What counts as one best level.
        learned: Looks left in which a return to the untrained model's level would be sudden: 6 after a look at which it
            was below half of that, 0 once it was lost; 0 for losses that may be negative, whose zero means nothing.
        lost: It has come back to the untrained model's, suddenly; whoever acts on it says False.
    """

    def __init__(self) -> None:
        self.now, self.best, self.scale, self.best_step = math.nan, math.inf, 0.0, 0
        self.lowest, self.lowest_step, self.lowest_scale = math.inf, 0, 0.0
        self.learned, self.lost = 0, False
        self._limit = math.inf  # a level above it is told
        self._shifted = False
        self._count = 0
        self._looks, self._block = 0, 1  # looks in all, and in a block
        self._highs: list[float] = []  # highest level of each block of looks, all blocks but the last of one length
        self._before: deque[float] = deque(maxlen=(_RECENT + _BEFORE) // _EVERY)  # `_lately` at the last looks
        self._losses: deque[float] = deque(maxlen=_RECENT + _BEFORE)

    def take(self, loss: float) -> bool:
        """Take a loss as `push` does, unless a look is due with it: False then, and nothing is done."""
        if (self._count + 1) % _EVERY == 0:
            return False
        self._losses.append(loss)
        self._count += 1
        return True

    @property
    def until_look(self) -> int:
        """Losses that `take` takes from here on."""
        return _EVERY - 1 - self._count % _EVERY

    @property
    def record(self) -> tuple[float, int, float]:
        """The lowest level, its step and its scale."""
        return self.lowest, self.lowest_step, self.lowest_scale

    @record.setter
    def record(self, record: tuple[float, int, float]) -> None:
        self.lowest, self.lowest_step, self.lowest_scale = record

    def push(self, step: int, loss: float, first_level: float) -> str:
        """Take a finite, composition-corrected loss; return what is to be told, or ""."""
        if self.take(loss):
            return ""
        self._losses.append(loss)
        self._count += 1
        losses = list(self._losses)
        low = min(self.lowest, *losses) >= 0.0 and _median(sorted(losses[-_EVERY:])) < _LEARNED * first_level
        self.learned = _SUDDEN if low else max(0, self.learned - 1)
        if len(losses) < _RECENT:
            return ""
        recent = sorted(losses[-_RECENT:])
        self.now = _median(recent)
        cut = recent[: 1 + _RECENT * 15 // 16]  # a mean that few losses cannot move
        mean = math.fsum(cut) / len(cut)
        scale = max(abs(self.now), abs(mean), 2.0 * _spread(recent, self.now), _FLOOR * first_level)
        if self.now < self.lowest:
            self.record = self.now, step, scale
        if self.learned and recent[_RECENT // 8] > _LOST * first_level:
            self.learned, self.lost = 0, True
        lately = self._remember(max(self.now, mean))
        told = self._grown(step, scale, lately) or self._has_shifted(losses, first_level)
        self._before.append(lately)
        return told

    def _remember(self, level: float) -> float:
        """Keep the level of a look; return the highest of the last half of the run."""
        if len(self._highs) == _BLOCKS and self._looks % self._block == 0:
            self._highs = [max(pair) for pair in zip(self._highs[::2], self._highs[1::2], strict=True)]
            self._block *= 2
        if self._looks % self._block == 0:
            self._highs.append(level)
        self._looks += 1
        self._highs[-1] = max(self._highs[-1], level)
        return max(self._highs[-max(1, len(self._highs) // _LATELY) :])

    def just_lost(self, first_level: float) -> bool:
        """Say whether the last losses are the untrained model's, though it may be too early to call that the level."""
        last = sorted(list(self._losses)[-_EVERY:])
        level = _median(last) if len(last) == _EVERY else self.now
        return self.learned > 0 and level > _LOST * first_level

    def far_above_best(self) -> bool:
        """Say whether the level is twice its lowest, or more, and beyond its spread, then and now."""
        if not (math.isfinite(self.now) and math.isfinite(self.lowest)):
            return False
        # Not the median of the deviations: of losses that are 0 but for a few that is 0, too.
        swing = math.fsum(abs(loss - self.now) for loss in self._losses) / max(1, len(self._losses))
        return self.now - self.lowest > max(self.lowest_scale, _SWING * swing)

    def restart(self, *, forget_best: bool) -> None:
        """Go on with new losses: a change was announced, a new level was accepted, or the model was restored."""
        self._losses.clear()
        self._count, self._shifted = 0, False
        if forget_best:
            self.best = math.inf

    def _grown(self, step: int, scale: float, lately: float) -> str:
        better, grown = self.now + scale < self.best + self.scale, self.now > self._limit
        if better:
            self.best, self.scale, self.best_step = self.now, scale, step
        if better or grown:
            self._limit = lately + _GROWTH * scale
        if better or not grown:
            return ""
        self.restart(forget_best=False)
        return f"the loss has grown from {self.best:.4g} (step {self.best_step}) to {self.now:.4g}"

    def _has_shifted(self, losses: list[float], first_level: float) -> str:
        if len(losses) < _RECENT + _BEFORE:
            return ""
        if self.now <= self._before[0]:
            self._shifted = False
            return ""
        before = sorted(losses[:_BEFORE])
        middle = _median(before)
        error = _STANDARD_ERROR * max(_spread(before, middle), _FLOOR * abs(middle), _FLOOR * first_level)
        high = max(middle, self._before[0])
        shifted = self.now > max(middle + _ERRORS * error, high + _SHIFT * abs(high))
        told = shifted and self._shifted
        self._shifted = shifted
        if not told:
            return ""
        self.restart(forget_best=False)
        return f"the loss has shifted from {middle:.4g} to {self.now:.4g}"

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain numbers and lists; strict JSON knows no infinity."""
        return {**numbers(self, _NUMBERS), **{name: list(getattr(self, "_" + name)) for name in _LISTS}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        take_numbers(self, _NUMBERS, state)
        for name in _LISTS:
            values = getattr(self, "_" + name)
            values.clear()
            values.extend(float(value) for value in state[name])


_NUMBERS: dict[str, float | int | bool] = {
    "now": math.nan, "best": math.inf, "scale": 0.0, "best_step": 0, "lowest": math.inf, "lowest_step": 0,
    "lowest_scale": 0.0, "learned": 0, "lost": False, "_limit": math.inf, "_shifted": False, "_count": 0, "_looks": 0,
    "_block": 1,
}  # fmt: skip
"""What is saved, and its value where nothing is known yet."""
_LISTS = ("losses", "highs", "before")


def _median(ordered: list[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else 0.5 * (ordered[half - 1] + ordered[half])


def _spread(ordered: list[float], middle: float) -> float:
    return _MAD_TO_STD * _median(sorted(abs(value - middle) for value in ordered))
