"""Value ranges, axis ticks and their labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from learnit_r8.run import formats as f
from learnit_r8.run.series import Bins, Floats

OUTLIER_MARGIN = 0.35
"""Extremes that exceed the range of ordinary values by more than this share of it are clipped."""
PAD = 0.03
MAX_LOG = 700.0
"""Just inside what a double can hold."""
_TINY = 5e-324
_TIME_STEPS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 21600, 43200, 86400)


@dataclass(frozen=True, slots=True)
class Scale:
    """A vertical axis: values between `low` and `high`, linear or logarithmic."""

    low: float
    high: float
    log: bool

    def shares(self, values: Floats) -> Floats:
        """Return where values lie: 0 at the bottom, 1 at the top; NaN stays NaN, what has no logarithm is far below."""
        low, high = self.low, self.high
        if self.log:
            # Differences of logarithms: the quotient of the values could overflow.
            low, high, values = math.log(low), math.log(high), np.log(np.maximum(values, _TINY))
        with np.errstate(over="ignore"):  # what is infinitely far off is drawn at the edge
            return (values - low) / (high - low)

    def rows(self, values: Floats, rows: int) -> Floats:
        """Return the row of each value, of `rows` from the top; those outside lie on the edge, NaN stays NaN."""
        return np.rint(np.clip((1.0 - self.shares(values)) * rows - 0.5, 0, rows - 1))

    def value(self, share: float) -> float:
        if self.log:
            bottom = math.log(self.low)
            return math.exp(bottom + share * (math.log(self.high) - bottom))
        return self.low + share * (self.high - self.low)


def _quantile(ordered: Floats, q: float) -> float:
    """Nearest rank, but the most extreme value is never taken: one point may be the outlier."""
    last = len(ordered) - 1
    if last < 4:
        return float(ordered[0 if q < 0.5 else -1])
    return float(ordered[min(last - 1, max(1, round(q * last)))])


def choose_scale(bins: Bins, mode: str, prefer_log: bool, extra: Sequence[float] = ()) -> Scale | None:
    """Return the axis for these bins, or None where no value is finite.

    It covers at least the 0.5 to 99.5 percentiles (of the bins' last values, an even sample of the points) and the 10
    to 90 percentiles of the bins' extremes, `extra`, and everything where no value is an outlier. It is logarithmic
    where the mode is "log", or "auto" with `prefer_log` and a range that calls for it.
    """
    finite = bins["lo"] <= bins["hi"]
    if not finite.any():
        return None
    lasts, lows, highs = (np.sort(bins[name][finite]) for name in ("last", "lo", "hi"))
    log = mode != "linear" and lows[0] > 0 and all(value > 0 for value in extra)
    if mode == "auto":
        log = log and prefer_log and highs[-1] > 2.5 * lows[0]
    if log:
        lasts, lows, highs = np.log(lasts), np.log(lows), np.log(highs)
        extra = [math.log(value) for value in extra]
    low = min(_quantile(lasts, 0.005), _quantile(lows, 0.1))
    high = max(_quantile(lasts, 0.995), _quantile(highs, 0.9))
    margin = OUTLIER_MARGIN * (high - low)
    low = min(low, float(lows[np.searchsorted(lows, low - margin)]), *extra)
    high = max(high, float(highs[np.searchsorted(highs, high + margin, "right") - 1]), *extra)
    pad = PAD * (high - low) or 0.05 * (abs(high) or 1.0)
    low, high = low - pad, high + pad
    if log:
        low, high = math.exp(max(low, -MAX_LOG)), math.exp(min(high, MAX_LOG))
    return Scale(low, high, log) if low < high else None


def _nice_step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    return next((factor * power for factor in (1, 2, 5) if factor * power >= raw * 0.999), 10 * power)


def _multiples(step: float, low: float, high: float) -> list[float]:
    return [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    step = _nice_step((high - low) / max(1, most))
    return _multiples(step, low, high) if 0 < step < math.inf and abs(low) / step <= 1e9 else []


def y_ticks(scale: Scale, rows: int) -> list[tuple[int, str]]:
    """Return (row, label) of the ticks, at least two rows apart, top row 0."""

    def placed(values: Sequence[float]) -> list[tuple[int, float]]:
        inside = [value for value in values if scale.low <= value <= scale.high]
        return sorted(zip(scale.rows(np.array(inside), rows).astype(int).tolist(), inside, strict=True))

    candidates = [_linear_ticks(scale.low, scale.high, max(2, rows // 2))]
    if scale.log:
        decades = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
        if len(decades) < 60:
            candidates += [[m * 10.0**k for k in decades for m in group] for group in ((1, 2, 5), (1, 3), (1,))]
        candidates += [[10.0**k for k in decades[::stride]] for stride in (2, 3, 5, 10, 25, 50, 100, 200)]
    best: list[tuple[int, float]] = []
    for found in map(placed, candidates):
        if len(found) > len(best) and all(b[0] - a[0] >= 2 for a, b in pairwise(found)):
            best = found
    if len(best) < 2:
        # No round numbers fit: the values at the edges, to two digits.
        shares = (1 - 0.5 / rows, 0.5 / rows) if rows > 2 else (0.5,)
        edges = placed([float(f"{scale.value(share):.2g}") for share in shares])
        best = edges if len(edges) == len(shares) else best or placed([scale.value(0.5)])
    return list(zip([row for row, _ in best], tick_labels([value for _, value in best]), strict=True))


def tick_labels(values: Sequence[float]) -> list[str]:
    """Return labels of at most 6 characters with as many decimals as tell them apart."""
    largest = max(abs(value) for value in values)
    smallest = min((abs(value) for value in values if value), default=1.0)
    if largest < 9999.5 and smallest > 0.0095:
        for places in range(4):
            labels = [f"{value:.{places}f}" for value in values]
            if all(abs(float(label) - v) <= 1e-3 * abs(v) for label, v in zip(labels, values, strict=True)):
                break
        if max(len(label) for label in labels) <= 6:
            return labels
    tiny = 0 < largest < 1
    return [_scientific(value) if tiny and value else _compact(value) for value in values]


def _compact(value: float) -> str:
    if value == 0:
        return "0"
    if 1e3 <= abs(value) < 1e15:
        return f.count(value)
    if 0.0095 < abs(value) < 1e3:
        return next(text for digits in (3, 2) if len(text := f"{value:.{digits}g}") <= 6)
    return _scientific(value)


def _scientific(value: float) -> str:
    text = _power(value, 1).replace(".0e", "e")
    return text if len(text) <= 6 else _power(value, 0)


def _power(value: float, digits: int) -> str:
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def in_six(value: float) -> str:
    """Return a number in at most 6 characters down to 1e-99: one that is cut off would lose its exponent."""
    text = f.short(value)
    return text if len(text) <= 6 else _power(value, 0)


def x_ticks(low: float, high: float, cells: int, kind: str) -> list[tuple[float, str]]:
    """Return (position, label) of a horizontal axis' ticks; of kind "time" positions are seconds, else steps."""
    if not high > low:
        return [(low, f.span(low) if kind == "time" else f.count(low))]
    raw = (high - low) * 10 / max(10, cells)
    if kind != "time":
        return [(at, f.count(at)) for at in _multiples(max(1.0, _nice_step(raw)), low, high)]
    step = next((float(s) for s in _TIME_STEPS if s >= raw), 86400.0 * math.ceil(raw / 86400))
    return [(at, _clock(at)) for at in _multiples(step, low, high)]


def _clock(seconds: float) -> str:
    text = "0" if seconds == 0 else f.span(seconds) if seconds >= 60 else f"{seconds:.0f}s"
    return text.replace("m00s", "m").replace("h00m", "h").replace("d00h", "d")
