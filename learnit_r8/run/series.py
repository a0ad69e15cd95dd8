"""One number over a run, in bounded memory, without ever losing a spike.

Three levels, each finer and shorter than the one before:

    whole    the run from its start in at most 1024 bins; a full level merges its bins in pairs
    middle   the last 512 bins of 64 points and more
    recent   the last 512 points and more, one a bin

A bin keeps minimum, maximum, last value and counts, so a spike of one point survives every merge;
keeping every other point, or means, would lose it. The moving averages run over every point.

Points arrive one at a time or in blocks, and are binned 512 at a time, by numpy.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

WHOLE_BINS = 1024
MIDDLE_BINS = 512
RECENT_POINTS = 512
BLOCK = 64
"""Points in a bin of the middle level."""
_CHUNK = 512
HUGE = 1e300
"""Larger values count as infinite: their differences would overflow."""

Floats = npt.NDArray[np.float64]
Bins = npt.NDArray[np.void]
"""Consecutive bins, a record each, as `bin_type` has them."""


@cache
def bin_type(averages: int) -> np.dtype[np.void]:
    """Return the record of a bin: consecutive points, where they lie, their extremes, the last one, the averages there.

    Where no point is finite, `lo` is inf, `hi` is -inf and `last` is NaN. Times are seconds since the Unix epoch.
    """
    names = ("first_step", "last_step", "first_time", "last_time", "lo", "hi", "last", "points", "bad")
    return np.dtype([*((name, np.float64) for name in names), ("averages", np.float64, (averages,))])


def merge(left: Bins, right: Bins) -> Bins:
    """Return bins that hold the points of both, pair by pair, those of `right` being the later."""
    both = right.copy()
    both["first_step"], both["first_time"] = left["first_step"], left["first_time"]
    both["lo"] = np.minimum(left["lo"], right["lo"])
    both["hi"] = np.maximum(left["hi"], right["hi"])
    both["last"] = np.where(right["lo"] <= right["hi"], right["last"], left["last"])
    both["points"] += left["points"]
    both["bad"] += left["bad"]
    return both


@cache
def _powers(decays: tuple[float, ...]) -> tuple[Floats, Floats]:
    """Return `decay ** n` for n = 1, 2, ..., float64 `[b, d]`, and the gains `(1 - decay) / decay ** n`.

    The powers end at 1e-4: what is summed up has then lost no digits that its result would have.
    """
    block = max(1, min(256, int(math.log(1e4) / -math.log(min(decays)))))
    powers: Floats = np.array(decays) ** np.arange(1, block + 1)[:, None]
    return powers, (1.0 - np.array(decays)) / powers


def smoothed(values: Floats, start: Floats | Sequence[float], decays: tuple[float, ...]) -> Floats:
    """Return the moving averages `[n, d]` after each value, `a <- decay * a + (1 - decay) * value`."""
    powers, gains = _powers(decays)
    result = np.empty((len(values), len(decays)))
    for first in range(0, len(values), len(powers)):
        some = values[first : first + len(powers), None]
        result[first : first + len(some)] = powers[: len(some)] * (start + (gains[: len(some)] * some).cumsum(axis=0))
        start = result[first + len(some) - 1]
    return result


class Series:
    """A stream of (step, time, value), binned. Adding is O(1) a point; memory is constant.

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
        # From here on `1 - decay ** n` is 1 to double precision.
        self._settled = max((math.ceil(-37.0 / math.log(d)) for d in self.decays if 0 < d < 1), default=1)
        self._type = bin_type(len(self.decays))
        self._whole, self._middle = bytearray(), bytearray()
        self._open: Bins | None = None
        self._span = 1
        # Rows of step, time, value and averages, one after the other; the last `_pending` of them are in no bin yet.
        self._points = array("d")
        self._columns = 3 + len(self.decays)
        self._pending = 0

    def add(self, step: float, time: float, value: float) -> None:
        """Append a point; NaN and infinities are counted and leave a gap."""
        self.extend(*np.array([[step], [time], [value]], np.float64))

    def extend(self, steps: Floats, times: Floats, values: Floats) -> Floats:
        """Append points, each argument float64 `[n]`; return the moving averages after each, float64 `[n, d]`."""
        good = (values > -HUGE) & (values < HUGE)
        finite = values[good]
        rows = np.empty((len(values), self._columns))
        rows[:, 0], rows[:, 1], rows[:, 2] = steps, times, np.where(good, values, math.nan)
        if self.decays:
            averages = self._debiased(finite)
            rows[:, 3:] = averages[good.cumsum()]
            self.averages = tuple(averages[-1].tolist())
        if len(finite):
            self.lo, self.hi = min(self.lo, float(finite.min())), max(self.hi, float(finite.max()))
            self.last = float(finite[-1])
        self.count += len(values)
        self.bad += len(values) - len(finite)
        at = 0
        while at < len(rows):
            some = rows[at : at + _CHUNK - self._pending]
            self._points.frombytes(some.tobytes())
            self._pending += len(some)
            at += len(some)
            if self._pending == _CHUNK:
                self._close_chunk()
        return rows[:, 3:]

    def _debiased(self, values: Floats) -> Floats:
        """Return the moving averages before the first of some finite values and after each, float64 `[n + 1, d]`."""
        before, averages = self.count - self.bad, np.empty((len(values) + 1, len(self.decays)))
        averages[0] = self.averages
        if before > self._settled:
            averages[1:] = smoothed(values, averages[0], self.decays)
        else:
            bias = 1.0 - np.array(self.decays) ** np.arange(before, before + len(averages))[:, None]
            averages[1:] = smoothed(values, averages[0] * bias[0] if before else bias[0], self.decays) / bias[1:]
        return averages

    def _close_chunk(self) -> None:
        middle = self._binned(_CHUNK, BLOCK) if self._span > BLOCK else None
        bins = self._binned(_CHUNK, self._span)
        self._pending = 0
        if len(self._points) >= 2 * RECENT_POINTS * self._columns:
            del self._points[: -RECENT_POINTS * self._columns]
        if middle is not None:
            self._middle += middle.tobytes()
            if len(self._middle) >= 2 * MIDDLE_BINS * self._type.itemsize:
                del self._middle[: -MIDDLE_BINS * self._type.itemsize]
        if self._span > _CHUNK:
            bins = bins if self._open is None else merge(self._open, bins)
            self._open = bins if bins["points"][0] < self._span else None
            if self._open is not None:
                return
        self._whole += bins.tobytes()
        if len(self._whole) >= WHOLE_BINS * self._type.itemsize:
            bins = np.frombuffer(self._whole, self._type)
            self._whole = bytearray(merge(bins[::2], bins[1::2]).tobytes())
            self._span *= 2

    def _binned(self, points: int, span: int) -> Bins:
        """Return the last points in bins of `span` of them each; the last bin may have fewer."""
        if points == 0:
            return np.empty(0, self._type)
        rows = np.frombuffer(self._points[len(self._points) - points * self._columns :]).reshape(-1, self._columns)
        starts = np.arange(0, points, span)
        ends = np.append(starts[1:], points) - 1
        values = rows[:, 2]
        bad = np.isnan(values)
        bins = np.empty(len(starts), self._type)
        bins["first_step"], bins["last_step"] = rows[starts, 0], rows[ends, 0]
        bins["first_time"], bins["last_time"] = rows[starts, 1], rows[ends, 1]
        bins["points"], bins["averages"] = ends + 1 - starts, rows[ends, 3:]
        if not bad.any():
            bins["bad"], bins["last"] = 0.0, values[ends]
        else:
            bins["bad"] = np.add.reduceat(bad, starts, dtype=np.float64)
            newest = np.maximum.accumulate(np.where(bad, -1, np.arange(points)))[ends]
            bins["last"] = np.where(newest >= starts, values[newest], math.nan)
        bins["lo"] = np.minimum.reduceat(np.where(bad, math.inf, values), starts)
        bins["hi"] = np.maximum.reduceat(np.where(bad, -math.inf, values), starts)
        return bins

    def bins(self, since: float = -math.inf, *, by_time: bool = False) -> Bins:
        """Return the finest bins that reach back to `since`, a step or a time, oldest first; none ends before it."""
        place = 1 if by_time else 0
        recent = min(RECENT_POINTS, len(self._points) // self._columns)
        if self.count <= recent or self._points[place - recent * self._columns] <= since:
            found = self._binned(recent, 1)
        else:
            found = np.frombuffer(self._middle, self._type)[-MIDDLE_BINS:]
            if len(found) and found["first_time" if by_time else "first_step"][0] <= since:
                found = self._joined(found.tobytes(), self._binned(self._pending, BLOCK).tobytes())
            else:
                started = b"" if self._open is None else self._open.tobytes()
                found = self._joined(self._whole, started, self._binned(self._pending, self._span).tobytes())
        if since == -math.inf:
            return found
        kept: Bins = found[found["last_time" if by_time else "last_step"] >= since]
        return kept

    def _joined(self, *parts: bytes | bytearray) -> Bins:
        # numpy's own concatenation of records looks at every field's type.
        return np.frombuffer(b"".join(parts), self._type)

    def values(self, most: int) -> list[float]:
        """Return at most `most` values, spread evenly over the run, the newest last."""
        if self.count == len(self._points) // self._columns:
            values: Sequence[float] | Floats = self._points[2 :: self._columns]
        else:
            values = np.frombuffer(self._whole, self._type)["last"]
        some = min(most, len(values))
        return [*(float(values[(i + 1) * len(values) // some - 1]) for i in range(some - 1)), self.last][:most]
