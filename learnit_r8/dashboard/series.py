"""One number over a run, in bounded memory, without ever losing a spike.

Three levels, each finer and shorter than the one before:

    whole    the run from its start in at most 1024 bins; a full level merges its bins in pairs
    middle   the last 512 bins of 64 points
    recent   the last 512 points, one a bin

A bin keeps minimum, maximum, last value and counts, so a spike of one point survives every merge;
keeping every other point, or means, would lose it. The moving averages run over every point.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

WHOLE_BINS = 1024
MIDDLE_BINS = 512
RECENT_POINTS = 512
BLOCK = 64
"""Points in a bin of the middle level."""
HUGE = 1e300
"""Larger values count as infinite: their differences would overflow."""


class Bin(NamedTuple):
    """Consecutive points: where they lie, their extremes, the last one and the averages after it.

    Where no point is finite, `lo` is inf, `hi` is -inf and `last` is NaN. `times` are seconds
    since the Unix epoch.
    """

    first_step: float
    last_step: float
    first_time: float
    last_time: float
    lo: float
    hi: float
    last: float
    points: int
    bad: int
    averages: tuple[float, ...]


def merge(left: Bin, right: Bin) -> Bin:
    """Return the bin that holds the points of both, `right` being the later."""
    return Bin(
        left.first_step,
        right.last_step,
        left.first_time,
        right.last_time,
        min(left.lo, right.lo),
        max(left.hi, right.hi),
        right.last if right.lo <= right.hi else left.last,
        left.points + right.points,
        left.bad + right.bad,
        right.averages,
    )


class Series:
    """A stream of (step, time, value), binned. Adding is O(1) amortised; memory is constant.

    Args:
        decays: Decays of the moving averages to keep. Each is debiased by `1 - decay ** n` as in
            Adam (Kingma and Ba 2015, section 3), so it starts at the first value and not at zero.

    Attributes:
        count: Points added.
        bad: Those among them that are not finite.
        lo: Smallest finite value; inf before the first.
        hi: Largest finite value; -inf before the first.
        last: Last finite value; NaN before the first.
        averages: Moving averages, one a decay; NaN before the first finite value.
    """

    def __init__(self, decays: Sequence[float] = ()) -> None:
        self.decays = tuple(decays)
        self.count = self.bad = 0
        self.lo, self.hi, self.last = math.inf, -math.inf, math.nan
        self.averages: tuple[float, ...] = (math.nan,) * len(self.decays)
        self._gains: tuple[float, ...] = ()
        # From here on `1 - decay ** n` is 1 to double precision.
        self._settled = max((math.ceil(-37.0 / math.log(d)) for d in self.decays if 0 < d < 1), default=1)
        self._whole: list[Bin] = []
        self._open: Bin | None = None
        self._span = 1
        self._middle: deque[Bin] = deque(maxlen=MIDDLE_BINS)
        self._recent: deque[Bin] = deque(maxlen=RECENT_POINTS)
        self._block: list[Bin] = []

    def add(self, step: float, time: float, value: float) -> None:
        """Append a point; NaN and infinities are counted and leave a gap."""
        self.count += 1
        if -HUGE < value < HUGE:
            if value < self.lo:
                self.lo = value
            if value > self.hi:
                self.hi = value
            self.last = value
            if self.decays:
                self._average(value)
            point = Bin(step, step, time, time, value, value, value, 1, 0, self.averages)
        else:
            self.bad += 1
            point = Bin(step, step, time, time, math.inf, -math.inf, math.nan, 1, 1, self.averages)
        self._recent.append(point)
        self._block.append(point)
        if len(self._block) >= self._span or len(self._block) >= BLOCK:
            self._close_block()

    def _average(self, value: float) -> None:
        finite = self.count - self.bad
        if finite == 1:
            self._gains = (1.0,) * len(self.decays)
            self.averages = (value,) * len(self.decays)
            return
        if finite <= self._settled:
            self._gains = tuple([(1.0 - decay) / (1.0 - decay**finite) for decay in self.decays])
        self.averages = tuple(
            [old + gain * (value - old) for old, gain in zip(self.averages, self._gains, strict=True)]
        )

    def _close_block(self) -> None:
        block = _summarize(self._block)
        self._block = []
        if self._span > BLOCK:
            self._middle.append(block)
        self._open = block if self._open is None else merge(self._open, block)
        if self._open.points < self._span:
            return
        self._whole.append(self._open)
        self._open = None
        if len(self._whole) >= WHOLE_BINS:
            self._whole = [merge(a, b) for a, b in zip(self._whole[::2], self._whole[1::2], strict=True)]
            self._span *= 2

    def bins(self, since: float = -math.inf, *, by_time: bool = False) -> list[Bin]:
        """Return the finest bins that reach back to `since`, oldest first.

        Args:
            since: A step, or a time where `by_time` is true. Bins that end before it are left out.
            by_time: What `since` is.
        """
        tail = [_summarize(self._block)] if self._block else []
        if self.count <= RECENT_POINTS or _reaches(self._recent[0], since, by_time):
            found = list(self._recent)
        elif self._middle and _reaches(self._middle[0], since, by_time):
            found = [*self._middle, *tail]
        else:
            found = [*self._whole, *([self._open] if self._open else []), *tail]
        if since == -math.inf:
            return found
        return [item for item in found if (item.last_time if by_time else item.last_step) >= since]

    def copy(self) -> Series:
        """Return an independent copy."""
        twin = Series(self.decays)
        twin.__dict__.update(self.__dict__)
        twin._whole, twin._block = list(self._whole), list(self._block)
        twin._middle, twin._recent = self._middle.copy(), self._recent.copy()
        return twin


def _reaches(oldest: Bin, since: float, by_time: bool) -> bool:
    return (oldest.first_time if by_time else oldest.first_step) <= since


def _summarize(points: Sequence[Bin]) -> Bin:
    """Return one bin for single points; the same as merging them one by one."""
    if len(points) == 1:
        return points[0]
    bad = sum([point.bad for point in points])
    lasts = [point.last for point in points if not point.bad]
    return Bin(
        points[0].first_step,
        points[-1].last_step,
        points[0].first_time,
        points[-1].last_time,
        min(lasts, default=math.inf),
        max(lasts, default=-math.inf),
        lasts[-1] if lasts else math.nan,
        len(points),
        bad,
        points[-1].averages,
    )
