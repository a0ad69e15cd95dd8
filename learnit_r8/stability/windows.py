"""What the detector remembers of past losses; each part costs O(log n) a step."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

HARMLESS_AFTER = 8  # steps that pass over an outlier before it counts as harmless
_SLOPE_MEMORY = 64  # calm losses


def numbers(thing: Any, names: Mapping[str, Any]) -> dict[str, Any]:
    """Return attributes as strict JSON, which knows no infinity or NaN: what is not there yet is None."""
    values = {name.strip("_"): getattr(thing, name) for name in names}
    return {name: value if value is None or math.isfinite(value) else None for name, value in values.items()}


def take_numbers(thing: Any, names: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Restore what `numbers` returned; `names` says what each attribute is where nothing is known yet."""
    for name, absent in names.items():
        value = state[name.strip("_")]
        setattr(thing, name, absent if value is None else (int if absent is None else type(absent))(value))


class SortedWindow:
    """The last `size` values, in order of arrival and sorted."""

    __slots__ = ("_low", "arrivals", "size", "values")

    def __init__(self, size: int) -> None:
        self.size = size
        self.arrivals: deque[float] = deque()
        self.values: list[float] = []
        self._low = 0  # where `deviation` was found last

    def __len__(self) -> int:
        return len(self.values)

    def push(self, value: float) -> None:
        """Add a value; the oldest leaves a full window."""
        if len(self.values) == self.size:
            del self.values[bisect_left(self.values, self.arrivals.popleft())]
        self.arrivals.append(value)
        insort(self.values, value)

    def keep_newest(self, count: int) -> None:
        """Forget all but the newest so many values."""
        self.fill(list(self.arrivals)[-count:])

    def fill(self, values: Iterable[float]) -> None:
        """Replace the contents, oldest first."""
        self.arrivals = deque(float(value) for value in values)
        self.values = sorted(self.arrivals)

    def median(self) -> float:
        """Return the median of what is there."""
        values, half = self.values, len(self.values) // 2
        return values[half] if len(values) % 2 else 0.5 * (values[half - 1] + values[half])

    def quantile(self, share: float) -> float:
        """Return the value that this share of the others are below, not interpolated."""
        return self.values[int(share * (len(self.values) - 1))]

    def deviation(self, centre: float) -> float:
        """Return the median distance from the centre, the upper one of an even number.

        The `count` values nearest to the centre are neighbours in sorted order. Their first is
        looked for from where it was last time, as one more value hardly moves it.
        """
        values = self.values
        count = len(values) // 2 + 1
        low, high = self._low, len(values) - count
        if low > high:
            low = high
        while low < high and centre - values[low] > values[low + count] - centre:
            low += 1
        while low and centre - values[low - 1] <= values[low + count - 1] - centre:
            low -= 1
        self._low = low
        below, above = centre - values[low], values[low + count - 1] - centre
        return max(above, below)


class Composition:
    """How much of a batch's expected excess shows in its loss: a running regression slope, 0 to 1.

    Estimates of samples that were last seen long ago are out of date while the model learns fast.
    Subtracting them in full would then add noise in place of removing it, many times the loss itself.
    Until losses have shown otherwise the estimates are believed: the slope is drawn toward 1 with
    the weight of two losses.
    """

    __slots__ = ("count", "covariance", "excess", "loss", "variance")

    def __init__(self) -> None:
        self.count = 0
        self.loss = self.excess = self.covariance = self.variance = 0.0

    def correct(self, loss: float, excess: float) -> float:
        """Return the loss without the part that the batch's composition explains."""
        if self.variance <= 0.0:
            return loss - excess
        slope = (self.count * self.covariance / self.variance + 2.0) / (self.count + 2.0)
        return loss - min(1.0, max(0.0, slope)) * excess

    def learn(self, loss: float, excess: float) -> None:
        """Take a calm loss and the excess that was expected of its batch."""
        self.count += 1
        weight = 1.0 / min(_SLOPE_MEMORY, self.count)
        off_loss, off_excess = loss - self.loss, excess - self.excess
        self.loss += weight * off_loss
        self.excess += weight * off_excess
        # Exponentially weighted moments (Finch 2009, "Incremental calculation of weighted mean and variance").
        rest = 1.0 - weight
        self.covariance = rest * (self.covariance + weight * off_loss * off_excess)
        self.variance = rest * (self.variance + weight * off_excess * off_excess)

    def state_dict(self) -> dict[str, float]:
        """Return the state as plain numbers."""
        return {name: getattr(self, name) for name in self.__slots__}

    def fill(self, state: Mapping[str, float]) -> None:
        """Restore what `state_dict` returned."""
        for name in self.__slots__:
            setattr(self, name, float(state[name]))
        self.count = int(state["count"])


class HarmlessOutliers:
    """How far single losses have lately stood out without anything coming of it.

    An outlier counts as harmless at the first ordinary loss from `HARMLESS_AFTER` steps after it on: a level that holds
    is none. It is forgotten after `memory` steps; the `count`-th highest is the envelope.
    """

    __slots__ = ("_age", "_count", "_memory", "_pending", "_remembered", "_rises")

    def __init__(self, memory: int, count: int) -> None:
        self._memory = memory
        self._count = count
        self.fill({"age": 0, "pending": [], "remembered": []})

    @property
    def envelope(self) -> float:
        """Return the `count`-th highest rise remembered, 0 where there are fewer."""
        return self._rises[-self._count] if len(self._rises) >= self._count else 0.0

    def pass_step(self, *, ordinary: bool = True) -> None:
        """Count one step, whose loss is ordinary or not."""
        self._age += 1
        if self._remembered and self._remembered[0][0] <= self._age - self._memory:
            del self._rises[bisect_left(self._rises, self._remembered.popleft()[1])]
        if ordinary and self._pending and self._pending[0][0] <= self._age - HARMLESS_AFTER:
            rise = self._pending.popleft()[1]
            self._remembered.append((self._age, rise))
            insort(self._rises, rise)

    def pass_ordinary(self, steps: int) -> None:
        """Count steps whose losses are ordinary."""
        if self._remembered or self._pending:
            for _ in range(steps):
                self.pass_step()
        else:
            self._age += steps

    def add(self, rise: float) -> None:
        """Take the rise of an outlier at the step that was counted last."""
        self._pending.append((self._age, rise))

    def remember(self, rise: float) -> None:
        """Take a rise that is known to be harmless."""
        self._remembered.append((self._age, rise))
        insort(self._rises, rise)

    def drop_pending(self) -> None:
        """Forget those that are not known to be harmless: they were part of a fault."""
        self._pending.clear()

    def fill(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._age = int(state["age"])
        self._pending, self._remembered = (
            deque((int(age), float(rise)) for age, rise in state[name]) for name in ("pending", "remembered")
        )
        self._rises = sorted(rise for _, rise in self._remembered)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain numbers and lists."""
        outliers = {"pending": self._pending, "remembered": self._remembered}
        return {"age": self._age, **{name: [list(outlier) for outlier in kept] for name, kept in outliers.items()}}
