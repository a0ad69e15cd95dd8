"""How fast the run goes, when it will end, and where its time went.

Training steps, validation and checkpoints have moving averages of their own, because each has
its own number of occurrences left; so have cataloging and LR discovery, whose steps cost
something else. Everything is measured since this process started: a resumed run may be on
another machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from learnit_r8.run.series import Floats

MIN_STEPS = 20
MIN_SECONDS, SHORT_SECONDS = 10.0, 1.0
"""No estimate before both: the first steps compile, fill caches and start workers. Once a tenth is done, the second
suffices: an estimate is then off by little, and a short run has one."""
LONGEST = 1e9
"""Longer spans are nonsense in a log, not time."""
BLOCK_SECONDS = 1.0
BLOCK_STEPS = 4
SLOWEST_GAIN = 0.03
"""The average then looks back over about 1 / 0.03 blocks."""


_SPENT = (
    "user step",
    "r8 overhead",
    "between steps",
    "between epochs",
    "evaluation",
    "checkpoints",
    "rollbacks",
    "paused",
)


@dataclass(slots=True)
class Average:
    """A mean that turns from plain to exponential, and its standard error."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def add(self, value: float) -> None:
        """Take a value."""
        self.count += 1
        gain = max(1.0 / self.count, SLOWEST_GAIN)
        distance = value - self.mean
        self.mean += gain * distance
        self.variance = (1.0 - gain) * (self.variance + gain * distance * distance)

    @property
    def error(self) -> float:
        """Standard error of the mean; an exponential one averages over (2 - g) / g values."""
        if self.count < 2:
            return self.mean
        return math.sqrt(self.variance / min(self.count - 1, (2.0 - SLOWEST_GAIN) / SLOWEST_GAIN))


@dataclass(slots=True)
class StepTimes:
    """Duration of one kind of step, averaged over blocks of at least a second.

    Blocks keep the slow drift that decides how far off an estimate is; single steps are noise
    that cancels out.
    """

    blocks: Average = field(default_factory=Average)
    steps: int = 0
    seconds: float = 0.0
    total_steps: int = 0

    def extend(self, seconds: Floats) -> None:
        """Take consecutive steps' durations, float64 `[n]`."""
        self.total_steps += len(seconds)
        while len(seconds):
            sums = self.seconds + np.cumsum(seconds)
            full = int(np.searchsorted(sums, BLOCK_SECONDS))
            end = max(full, BLOCK_STEPS - 1 - self.steps) + 1
            if end > len(seconds):
                self.steps, self.seconds = self.steps + len(seconds), float(sums[-1])
                return
            self.blocks.add(float(sums[end - 1]) / (self.steps + end))
            self.steps, self.seconds, seconds = 0, 0.0, seconds[end:]

    @property
    def mean(self) -> float:
        """Seconds a step; NaN before the first one."""
        if self.blocks.count:
            return self.blocks.mean
        return self.seconds / self.steps if self.steps else math.nan


@dataclass(slots=True)
class Pace:
    """Times of one process of a run. Times are seconds since the Unix epoch."""

    train: StepTimes = field(default_factory=StepTimes)
    cataloging: StepTimes = field(default_factory=StepTimes)
    validation: Average = field(default_factory=Average)
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_SPENT, 0.0))
    started: float = math.nan
    steps: int = 0
    _last_report: float | None = None
    _epoch_ended: float | None = None
    _paused_at: float | None = None
    _set_aside: float = 0.0
    _evaluated: float = 0.0
    """Seconds of the evaluation after this epoch."""
    _amid: float = 0.0
    """Seconds of evaluations amid epochs."""

    def report(self, times: Floats, step_seconds: Floats, r8_seconds: Floats, kind: str) -> Floats:
        """Take consecutive steps, "train", "cataloging" or "search"; return the seconds of each, `[n]` as all are.

        Where batches are handed out ahead (a loader's workers), a step's own seconds hold those of the steps before: it
        took no more than have passed since the one before.
        """
        # Clocks of other machines and hand-made logs may go backwards.
        user, own = (np.minimum(np.fmax(seconds, 0.0), LONGEST) for seconds in (step_seconds, r8_seconds))
        before = math.nan if self._last_report is None else self._last_report + self._set_aside
        passed, busy = np.diff(times, prepend=before), user + own
        busy = np.where((passed > 0) & (passed < busy), passed, busy)
        gaps, own = np.fmax(passed - busy, 0.0), np.minimum(own, busy)
        self.spent["between steps"] += float(gaps.sum())
        self.spent["user step"] += float((busy - own).sum())
        self.spent["r8 overhead"] += float(own.sum())
        self._last_report, self._set_aside = float(times[-1]), 0.0
        # The first step compiles and warms up; it says nothing about the others.
        first = int(self.steps == 0)
        self.steps += len(times)
        if kind != "search":
            (self.cataloging if kind == "cataloging" else self.train).extend((busy + gaps)[first:])
        return busy

    def set_aside(self, what: str, seconds: float) -> None:
        """Take time that was neither step nor validation: "checkpoints", "rollbacks" or "paused"."""
        if 0 < seconds < LONGEST:
            self.spent[what] += seconds
            self._set_aside += seconds

    def evaluate(self, time: float) -> None:
        """Take the end of an evaluation: it began with the end of the last step, or of the epoch."""
        since = self._last_report if self._epoch_ended is None else self._epoch_ended
        seconds = 0.0 if since is None else time - since - self._set_aside
        if self._epoch_ended is None:
            self._amid += max(0.0, seconds)
        else:
            self._evaluated += max(0.0, seconds)
        self.set_aside("evaluation", seconds)

    def pause(self, time: float, paused: bool) -> None:
        """Take the start or the end of a pause."""
        if paused:
            self._paused_at = time if self._paused_at is None else self._paused_at
        elif self._paused_at is not None:
            self.set_aside("paused", time - self._paused_at)
            self._paused_at = None

    def end_epoch(self, time: float) -> None:
        """Take the end of an epoch's batches; validation usually follows."""
        self._epoch_ended, self._last_report, self._set_aside = time, None, 0.0

    def start_epoch(self, time: float) -> None:
        """Take the start of an epoch."""
        if self._epoch_ended is not None:
            gap = max(0.0, time - self._epoch_ended - self._set_aside)
            self.validation.add(gap + self._evaluated)
            self.spent["between epochs"] += gap
        self._epoch_ended, self._last_report, self._set_aside, self._evaluated = None, None, 0.0, 0.0

    @property
    def step_seconds(self) -> float:
        """Mean duration of a training step, all of it; NaN before the first."""
        return self.train.mean if self.train.total_steps else self.cataloging.mean

    def eta(
        self, now: float, train_steps: int, cataloging_steps: int, validations: int
    ) -> tuple[float, float | None] | None:
        """Return the seconds left and their uncertainty (two standard errors), or None while unknown.

        Given are the steps left after cataloging, those left of it, and the ends of epochs still to be validated.
        """
        since = now - self.started
        enough = SHORT_SECONDS if train_steps + cataloging_steps <= 9 * self.steps else MIN_SECONDS
        if self.steps < MIN_STEPS or not since >= enough or math.isnan(self.step_seconds):
            return None
        train = self.train if self.train.total_steps else self.cataloging
        cataloging = self.cataloging if self.cataloging.total_steps else train
        checkpoints = (self.spent["checkpoints"] + self._amid) / self.steps
        left = train_steps * (train.mean + checkpoints) + cataloging_steps * (cataloging.mean + checkpoints)
        left += validations * self.validation.mean - self._done_of_current(now)
        if train.blocks.count < 3:
            return max(0.0, left), None
        error = train_steps * train.blocks.error + cataloging_steps * cataloging.blocks.error
        if self.validation.count:
            error = math.hypot(error, validations * self.validation.error)
        return max(0.0, left), 2.0 * error

    def _done_of_current(self, now: float) -> float:
        """Seconds already spent on the step or validation under way, no more than it should take."""
        if self._paused_at is not None:
            return 0.0
        if self._epoch_ended is not None:
            return min(max(0.0, now - self._epoch_ended), self.validation.mean)
        if self._last_report is not None:
            return min(max(0.0, now - self._last_report), self.step_seconds)
        return 0.0
