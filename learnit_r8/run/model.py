"""Events to numbers: everything that the dashboard shows, kept in bounded memory."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any, cast

import numpy as np

from learnit_r8 import events as e
from learnit_r8.run import export
from learnit_r8.run.blocks import Block
from learnit_r8.run.journal import Entry, entry, validation_entry
from learnit_r8.run.metric import Metric, is_validation
from learnit_r8.run.pace import Pace
from learnit_r8.run.series import Floats, Series, smoothed

DECAYS = (0.98, 0.995, 0.9)
"""Decays of the moving averages that the chart can show."""
MARKS_KEPT = 256
ENTRIES_KEPT = 2000
EPOCHS_KEPT = 1024
RECENT_STEPS = 512
SIGMA_GAIN = 0.02
LATEST = 1e12
"""Times beyond this many seconds since 1970 are taken for errors."""
_COLUMNS = ("time", "step", "loss", "expected_loss", "lr", "step_seconds", "r8_seconds", "size")
_NUMBERS = attrgetter(*_COLUMNS)
_BLOCK = 512
"""More losses than these do not wait: taking them would hold the interpreter for long."""
METRICS_KEPT = 100
"""Names beyond these are ignored: a name made of a step number would grow without end."""
_MARKED = {
    e.SpikeSeen: "!",
    e.RolledBack: "R",
    e.CheckpointSaved: "C",
    e.CheckpointFailed: "X",
    e.RollbackFailed: "X",
    e.PhaseChanged: "P",
    e.LrFound: "L",
}

_AMID_LOSSES = {
    e.BackupTaken, e.BackupVerified, e.MetricLogged, e.Notice, e.QuadrantsRefreshed, e.SampleQuarantined, e.SpikeSeen,
    e.SuspectsNamed,
}  # fmt: skip
"""What changes nothing of how losses are taken; all else is taken in its turn."""


def _ends_evaluation(event: e.Event) -> bool:
    """Whether the time since the last loss was spent on an evaluation."""
    return isinstance(event, e.MetricLogged) and is_validation(event.name)


class DashboardModel:
    """The state of one run as its events tell it. Memory is constant in the number of events.

    Attributes are for reading. Losses are the reported means of a batch; NaN stands for "not
    known yet". `step` counts reported steps, so it is one more than the last report's step.
    """

    def __init__(self) -> None:
        self.run = ""
        self.config: Mapping[str, Any] = {}
        self.version = ""
        self.pid = 0
        self.steps_per_epoch = 0
        self.total_steps: int | None = None
        self.started = math.nan
        self.spent_before = 0.0
        self.first_time = math.nan
        self.last_time = math.nan
        self.last_report = math.nan
        self.ended: e.RunEnded | None = None
        self.paused = False
        self.phase = ""
        self.step = self.epoch = self.epoch_first_step = self.epoch_batches = 0
        self.epoch_phase = ""
        self.searching = False
        self.loss = self.expected_loss = self.lr = self.score = math.nan
        self.verdict = ""
        self.sigma_squared = 0.0
        self.best_step = 0
        self.samples = self.spikes = self.rollbacks = self.nonfinite = self.quarantined = 0
        self.backup_step: int | None = None
        self.checkpoint: e.CheckpointSaved | None = None
        self.quadrants: e.QuadrantsRefreshed | None = None
        self.quadrant_losses: deque[tuple[float, ...]] = deque(maxlen=64)
        self.suspects: e.SuspectsNamed | None = None
        self.alarms: dict[str, Entry] = {}
        self.entries: deque[Entry] = deque(maxlen=ENTRIES_KEPT)
        self.marks: dict[str, deque[tuple[int, float]]] = {}
        self.epoch_starts: list[tuple[int, int]] = []
        self.recent_steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self.series: dict[str, Series] = {
            "loss": Series(DECAYS),
            "surprise": Series(DECAYS[:1]),
            "lr": Series(),
            "step ms": Series(DECAYS[:1]),
        }
        self.metrics: dict[str, Metric] = {}
        self.pace = Pace()
        self._loss, self._surprise, self._lr, self._step_ms = self.series.values()
        self._waiting: list[e.LossReported] = []
        self._blocks: list[Block] = []
        self._amid = False

    def consume(self, event: Any) -> None:
        """Take one event of `learnit_r8.events`; other objects are ignored."""
        self.consume_all((event,))

    def consume_all(self, events: Iterable[Any], later: bool = False) -> None:
        """Take events, the oldest first; losses go through numpy together, which is three times as fast.

        `later`: the last losses may wait for the next call; of them only what the newest one says is known meanwhile.
        """
        for event in events:
            kind = type(event)
            if kind is Block:
                self._amid = False
                self._on_block(event)
            elif kind is e.LossReported:
                self._waiting.append(event)
                self._amid = False
            elif isinstance(event, e.Event) and kind is not e.BatchIssued:
                self._amid = kind in _AMID_LOSSES and not _ends_evaluation(event)
                if (self._waiting or self._blocks) and not self._amid:
                    self._on_losses()
                self._on_event(event)
        if self._blocks or (self._waiting and not (later and len(self._waiting) < _BLOCK)):
            latest = self.last_time
            self._on_losses()
            if self._amid:  # it came after the losses
                self.last_time = latest
        elif self._waiting and not self._amid:
            self._on_newest(self._waiting[-1], self._waiting[-1].time)

    def _on_event(self, event: e.Event) -> None:
        if not -LATEST < event.time < LATEST:
            event = replace(event, time=self._now())
        self._seen(event.time)
        self._apply(event)
        line = entry(event)
        if line is not None:
            self.entries.append(line)
        icon = _MARKED.get(type(event))
        if icon is not None:
            self._mark(icon, event)

    def _apply(self, event: e.Event) -> None:
        match event:
            case e.MetricLogged():
                self._on_metric(event)
            case e.RunStarted():
                self._on_run_started(event)
            case e.RunEnded():
                self.pace.pause(event.time, paused=False)
                self.pace.start_epoch(event.time)
                self.ended, self.paused = event, False
            case e.EpochStarted():
                self._on_epoch_started(event)
            case e.EpochEnded():
                self.pace.end_epoch(event.time)
            case e.QuadrantsRefreshed():
                self.quadrants = event
                self.quadrant_losses.append(event.losses)
            case e.PhaseChanged():
                self.phase = event.phase
                self.searching = "lr" in event.phase.casefold().replace("-", " ").replace("_", " ").split()
            case e.SpikeSeen():
                self.spikes += 1
            case e.RolledBack():
                self.rollbacks += 1
                self.alarms.pop("no rollback", None)
                self.pace.set_aside("rollbacks", event.seconds)
            case e.BackupTaken():
                self.backup_step = event.step
            case e.SampleQuarantined():
                self.quarantined += len(event.indices)
            case e.SuspectsNamed():
                self.suspects = event
            case e.CheckpointSaved():
                self.checkpoint = event
                self.alarms.pop("no ckpt", None)
                self.pace.set_aside("checkpoints", event.seconds)
            case e.LrFound():
                self.searching = False
                self.phase = self.epoch_phase or self.phase
            case e.Paused():
                self.paused = event.paused
                self.pace.pause(event.time, event.paused)
            case e.RollbackFailed() | e.CheckpointFailed() | e.SinkFailed() | e.Notice(level="warning"):
                self._alarm(event)

    def _now(self) -> float:
        """Return a time in place of one that is an error: a log may hold anything, and a chart needs a place for it."""
        return 0.0 if math.isnan(self.last_time) else self.last_time

    def _seen(self, time: float) -> None:
        self.last_time = time
        if math.isnan(self.first_time):
            self.first_time = time
        if math.isnan(self.started):
            self.started = self.pace.started = time

    def _mark(self, icon: str, event: e.Event) -> None:
        self.marks.setdefault(icon, deque(maxlen=MARKS_KEPT)).append((event.step, event.time))

    def _on_newest(self, event: Any, time: float) -> None:
        self.last_time = self.last_report = time if -LATEST < time < LATEST else self._now()
        self.step, self.epoch = event.step + 1, event.epoch
        self.verdict, self.score, self.lr = event.verdict, event.score, event.lr
        self.loss, self.expected_loss = event.loss, event.expected_loss

    def _on_losses(self) -> None:
        """Take the losses that wait."""
        events, self._waiting = self._waiting, []
        if events:
            self._on_numbers(np.array([*map(_NUMBERS, events)]).T, events[-1])
        blocks, self._blocks = self._blocks, []
        told = [block for block in blocks if e.LossReported in block.columns]
        if told:
            columns = [block.columns[e.LossReported] for block in told]
            rows = np.array([np.concatenate([some[name] for some in columns]) for name in _COLUMNS])
            self._on_numbers(rows, cast("e.Event", told[-1].newest(e.LossReported)))
        if blocks and -LATEST < blocks[-1].time < LATEST:
            self.last_time = blocks[-1].time

    def _on_block(self, block: Block) -> None:
        """Take what a log says of a stretch of the run; its losses wait for those of the next ones."""
        if self._waiting:
            self._on_losses()
        self._blocks.append(block)
        backup, metrics = block.newest(e.BackupTaken), block.events(e.MetricLogged)
        if math.isnan(self.first_time) or any(map(_ends_evaluation, metrics)):
            self._on_losses()
        for event in [*([] if backup is None else [backup]), *metrics]:
            self._on_event(event)

    def _on_numbers(self, rows: Floats, newest: e.Event) -> None:
        """Take consecutive losses, rows as `_COLUMNS` has them."""
        times, steps, losses, expected, lrs, users, own, sizes = rows
        for wrong in np.flatnonzero(~(np.abs(times) < LATEST)):
            times[wrong] = times[wrong - 1] if wrong else self._now()
        self._seen(float(times[0]))
        self._on_newest(newest, float(times[-1]))
        self.samples += int(sizes.sum())
        series = self._loss
        lowest = series.lo
        averages = series.extend(steps, times, losses)[:, 0]
        if series.lo < lowest:
            self.best_step = int(steps[np.argmax(losses == series.lo)])
        self.nonfinite += len(losses) - int(np.count_nonzero(np.isfinite(losses)))
        with np.errstate(over="ignore", invalid="ignore"):
            distances, surprises = losses - averages, losses - expected
        near = np.abs(distances) < 1e150  # their squares are finite
        if near.any():
            self.sigma_squared = float(smoothed(distances[near] ** 2, [self.sigma_squared], (1.0 - SIGMA_GAIN,))[-1, 0])
        known = np.isfinite(surprises)
        self._surprise.extend(steps[known], times[known], surprises[known])
        self._lr.extend(steps, times, lrs)
        kind = "search" if self.searching else "cataloging" if self.epoch_phase == "cataloging" else "train"
        seconds = self.pace.report(times, users, own, kind)
        self._step_ms.extend(steps, times, seconds * 1000.0)
        self.recent_steps.extend(seconds.tolist())

    def _on_metric(self, event: e.MetricLogged) -> None:
        metric = self.metrics.get(event.name)
        if metric is None:
            if len(self.metrics) >= METRICS_KEPT:
                return
            metric = self.metrics[event.name] = Metric(event.name, Series(DECAYS))
        metric.add(event.step, event.time, event.value, self.epoch)
        if _ends_evaluation(event):
            self.pace.evaluate(event.time)
            before = self.entries[-1] if self.entries else None
            line = validation_entry(event, metric.is_best, before)
            if before is not None and line.step == before.step and before.icon == "V":
                self.entries.pop()
            else:
                self._mark("V", event)
            self.entries.append(line)

    def _on_run_started(self, event: e.RunStarted) -> None:
        self.run, self.config, self.version, self.pid = event.run, event.config, event.version, event.pid
        self.steps_per_epoch, self.total_steps = event.steps_per_epoch, event.total_steps
        self.started = event.time
        self.spent_before = event.elapsed if 0 <= event.elapsed < LATEST else 0.0
        self.step, self.ended, self.paused = event.step, None, False
        if event.steps_per_epoch:
            # An epoch that is resumed in its middle starts without an EpochStarted.
            # With another batch size than before, the steps so far may make more epochs than there are.
            self.epoch = min(event.step // event.steps_per_epoch, (self.num_epochs or event.step + 1) - 1)
            self.epoch_batches = event.steps_per_epoch
            self.epoch_first_step = self.epoch * event.steps_per_epoch
        # Rates of an earlier process say nothing about this one.
        self.pace = Pace(started=event.time)

    def _on_epoch_started(self, event: e.EpochStarted) -> None:
        self.epoch, self.epoch_phase, self.epoch_batches = event.epoch, event.phase, event.batches
        self.epoch_first_step = event.step
        if event.total_steps:
            self.total_steps, self.steps_per_epoch = event.total_steps, event.batches
        missed = event.step - event.epoch * self.steps_per_epoch
        if self.pace.steps == 0 and 0 < missed < event.batches:
            self.epoch_first_step -= missed  # resumed within the epoch
        self.phase = event.phase
        self.pace.start_epoch(event.time)
        if len(self.epoch_starts) >= EPOCHS_KEPT:
            self.epoch_starts = self.epoch_starts[::2]
        self.epoch_starts.append((self.epoch_first_step, event.epoch))

    def _alarm(self, event: e.Event) -> None:
        line = entry(event)
        if line is not None:
            self.alarms.pop(line.kind, None)  # the latest one stands last
            self.alarms[line.kind] = line

    @property
    def sigma(self) -> float:
        """Standard deviation of the loss about its moving average."""
        return math.sqrt(self.sigma_squared)

    @property
    def num_epochs(self) -> int | None:
        """Epochs of the whole run; None under a time budget."""
        value = self.config.get("num_epochs")
        return int(value) if isinstance(value, (int, float)) and value == value and value > 0 else None

    @property
    def budget(self) -> float | None:
        """Seconds that the whole run may take, where that is its goal."""
        value = self.config.get("train_duration_seconds")
        return float(value) if isinstance(value, (int, float)) and 0 < value < LATEST else None

    def elapsed(self, now: float) -> float:
        """Return the training seconds so far, those before a resume counted."""
        if self.ended is not None:
            return self.ended.seconds
        return self.spent_before + max(0.0, now - self.started) if self.started <= now else self.spent_before

    def progress(self, now: float) -> float | None:
        """Return the share of the run that is done, 0 to 1; None where the goal is unknown."""
        if self.total_steps:
            return min(1.0, max(0.0, self.step / self.total_steps))
        if self.budget:
            return min(1.0, max(0.0, self.elapsed(now) / self.budget))
        return None

    @property
    def epoch_step(self) -> int:
        """Steps of the current epoch that were reported."""
        return min(max(0, self.step - self.epoch_first_step), self.epoch_batches)

    def eta(self, now: float) -> tuple[float, float | None] | None:
        """Return the seconds left and their uncertainty (None: exact or unknown); None while unknown."""
        if self.ended is not None or self.searching:
            return None
        if self.total_steps is None:
            return None if self.budget is None else (max(0.0, self.budget - self.elapsed(now)), None)
        left = max(0, self.total_steps - self.step)
        cataloging = min(left, self._cataloging_left())
        if self.num_epochs is not None:
            validations = max(0, self.num_epochs - self.epoch)
        else:
            validations = -(-left // self.steps_per_epoch) if self.steps_per_epoch else 0
        return self.pace.eta(now, left - cataloging, cataloging, validations)

    def epoch_eta(self, now: float) -> float | None:
        """Return the seconds until the epoch's validation is over; None while unknown."""
        if self.ended is not None or self.searching or not self.epoch_batches:
            return None
        cataloging = self._cataloging_left()
        train = 0 if cataloging else self.epoch_batches - self.epoch_step
        found = self.pace.eta(now, train, cataloging, 1)
        return None if found is None else found[0]

    def _cataloging_left(self) -> int:
        return self.epoch_batches - self.epoch_step if self.epoch_phase == "cataloging" else 0

    def metric_names(self) -> list[str]:
        """Return the names that the chart can show; new ones are appended."""
        return ["loss", "lr", "step ms", "surprise", *self.metrics]

    def metric_series(self, name: str) -> Series:
        """Return the series of a name in `metric_names`."""
        return self.metrics[name].series if name in self.metrics else self.series[name]

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as strict-JSON data; what is not known or not finite is null."""
        return export.numbers(self)
