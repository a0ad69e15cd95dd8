"""How much of the training is spent, and the learning rate that follows from it alone."""

from __future__ import annotations

import math

from learnit_r8.core.clock import Clock
from learnit_r8.core.config import Config
from learnit_r8.core.state import Kind, Saved, table
from learnit_r8.schedules import Schedule

VIRTUAL_STEPS = 10_000
"""A budget in seconds is laid out as this many steps, so that schedules need no second form."""


_POINTS = 256
"""Where the rest of a schedule is looked at, to find its highest rate."""


class Budget(Saved):
    """Epochs, steps or seconds, and where the run stands in them."""

    _saved = table(
        elapsed=Kind(lambda budget, _: budget.elapsed, lambda _, saved: float(saved), "_before"),
        peak=float,
        offset=float,
    )

    def __init__(self, config: Config, schedule: Schedule, clock: Clock) -> None:
        self._config = config
        self._schedule = schedule
        self._clock = clock
        self._before = 0.0
        self._started: float | None = None
        self.resize()
        self._seconds = config.train_duration_seconds
        self.peak = config.initial_lr
        self.scaled = False  # the peak has changed since batches were drawn
        self.reduced = 1.0  # by a plateau
        self.ended = ""  # why the run ends before its budget is spent
        self._offset = 0.0  # seconds spent on finding the learning rate: no part of the schedule

    def resize(self) -> None:
        """Follow the size of the data set."""
        self._steps_per_epoch, self._total_steps = self._config.steps_per_epoch, self._config.total_steps

    @property
    def elapsed(self) -> float:
        """Training seconds so far, those before a resume included."""
        running = 0.0 if self._started is None else self._clock.monotonic() - self._started
        return self._before + running

    def begin(self) -> None:
        """Start the clock, once."""
        if self._started is None:
            self._started = self._clock.monotonic()

    def stop(self) -> None:
        """Stop the clock."""
        self._before, self._started = self.elapsed, None

    def over(self, epoch: int, step: int) -> bool:
        """Whether nothing is left for this epoch, and this step."""
        if self._config.num_epochs is not None:
            return bool(self.ended) or epoch >= self._config.num_epochs
        return self.time_up or self.steps_up(step)

    def steps_up(self, step: int) -> bool:
        """Whether the budget of steps is spent, or the run ended before; else never when the budget is another one."""
        return bool(self.ended) or (self._config.num_steps is not None and step >= self._config.num_steps)

    def used_up(self, step: int) -> bool:
        """Whether no batch of this step may be drawn."""
        return (self._seconds is not None and self.time_up) or self.steps_up(step)

    def left(self, step: int, most: int) -> int:
        """Return how many steps of `most` are left from one on, where the budget is not seconds."""
        return most if self._config.num_steps is None else max(0, min(most, self._config.num_steps - step))

    @property
    def time_up(self) -> bool:
        """Whether the wall-clock budget is spent; never when the budget is epochs."""
        return self._seconds is not None and self.elapsed >= self._seconds

    @property
    def nothing_left(self) -> str:
        """What to tell who resumes a run whose budget is spent."""
        if self.ended:
            return f"nothing is left to train: {self.ended}"
        budgets = ("num_epochs", "num_steps", "train_duration_seconds")
        (spent,) = (f"{name}={given:g}" for name in budgets if (given := getattr(self._config, name)) is not None)
        return f"nothing is left to train: the run has spent its {spent}; give a larger number to go on"

    def position(self, epoch: int, batch: int, batches: int, step: int) -> tuple[float, float]:
        """Return (steps done, steps in all) of a full-length run.

        An epoch that draws fewer batches is stretched: the rate follows the spent budget, not the number of updates.
        """
        if self._total_steps is None:
            assert self._seconds is not None
            share = (self.elapsed - self._offset) / max(self._seconds - self._offset, 1e-9)
            return min(max(share, 0.0), 1.0) * VIRTUAL_STEPS, VIRTUAL_STEPS
        if self._config.num_steps is not None:
            return min(step, self._total_steps), self._total_steps
        steps = self._steps_per_epoch
        within = batch if batches == steps else batch * steps / max(batches, 1)
        return epoch * steps + within, self._total_steps

    def learning_rate(self, position: tuple[float, float], multiplier: float) -> float:
        """Return the learning rate at a position, within [min_lr, peak]."""
        floor = min(self._config.min_lr, self.peak)
        rate = (floor + (self.peak - floor) * self._schedule(*position)) * (multiplier * self.reduced)
        if not math.isfinite(rate):
            raise ValueError(
                f"the schedule gave a learning rate of {rate!r} at step {position[0]:g} of {position[1]:g}"
            )
        return min(self.peak, max(floor, rate))

    def highest(self, done: float, total: float) -> float:
        """Return the highest learning rate from a position to the end."""
        points = ((done + (total - done) * part / _POINTS, total) for part in range(_POINTS + 1))
        return max(self.learning_rate(point, 1.0) for point in points)

    def scale(self, factor: float) -> None:
        """Multiply the peak."""
        self.peak *= factor
        self.scaled = True

    def restart_schedule(self, peak: float) -> None:
        """Take a new peak; what is left of the budget is the whole schedule."""
        self.peak = peak
        self._offset = self.elapsed

    def _state_taken(self) -> None:
        if self._started is not None:  # the clock goes on from there
            self._started = self._clock.monotonic()
