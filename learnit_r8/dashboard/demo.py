"""The events of a plausible training run, for looking at the dashboard without data and for its tests."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from learnit_r8 import events as ev
from learnit_r8.events import Event

_Timed = tuple[float, Event]


@dataclass
class DemoRun:
    """Generates the events of one run; the same seed gives the same run.

    Iterating yields `(seconds, event)`: the training time since the start at which the event happens. Whoever plays it
    adds a clock, and a speed. The first epoch is cataloging; `spike_every` is a mean number of steps.
    """

    epochs: int = 10
    batches: int = 400
    batch_size: int = 128
    seed: int = 0
    step_seconds: float = 0.05
    start: float = 0.0
    spike_every: int = 1100

    def __iter__(self) -> Iterator[_Timed]:
        self._rng = np.random.default_rng(self.seed)
        self._step = self._cold_until = self._backup = 0
        self._now, self._total = 0.0, self.epochs * self.batches
        config = {"num_samples": self.batches * self.batch_size, "batch_size": self.batch_size, "strategy": "quadrant"}
        yield self._at(
            ev.RunStarted, run="demo", config=config, steps_per_epoch=self.batches, total_steps=self._total,
            resumed=False, version="demo", pid=0, elapsed=0.0,
        )  # fmt: skip
        yield self._at(ev.LrFound, lr=1e-2, suggestions={"steepest": 8.1e-3, "valley": 1e-2}, steps=100)
        for epoch in range(self.epochs):
            yield from self._epoch(epoch)
        yield self._at(ev.RunEnded, reason="finished", seconds=self._now)

    def _at(self, kind: type[Event], **fields: Any) -> _Timed:
        return self._now, kind(time=self.start + self._now, step=self._step, **fields)

    def _lr(self) -> float:
        warm = max(1, self._total // 10)
        if self._step < warm:
            return 1e-2 * (self._step + 1) / warm
        return 0.5e-2 * (1 + math.cos(math.pi * (self._step - warm) / (self._total - warm)))

    def _level(self) -> float:
        """Expected loss at this step: a power law that levels off."""
        return float(0.08 + 2.2 / (1 + 25 * self._step / self._total) ** 1.1)

    def _epoch(self, epoch: int) -> Iterator[_Timed]:
        yield self._at(ev.EpochStarted, epoch=epoch, phase="quadrant" if epoch else "cataloging", batches=self.batches)
        if epoch < 2:
            phase = "balanced" if epoch else "cataloging"
            yield self._at(ev.PhaseChanged, phase=phase, reason=f"epoch {epoch} begins")
        if epoch:
            yield self._quadrants(epoch)
        began, losses = self._now, []
        for _ in range(self.batches):
            for at, event in self._train_step(epoch):
                if isinstance(event, ev.LossReported) and math.isfinite(event.loss):
                    losses.append(event.loss)
                yield at, event
        self._now += self.step_seconds * self.batches * 0.1
        value = self._level() * 1.15 * float(self._rng.lognormal(0.0, 0.03))
        yield self._at(ev.MetricLogged, name="val_loss", value=value)
        yield self._at(ev.MetricLogged, name="accuracy", value=1 - 0.35 * min(1.0, value) ** 0.8)
        mean, seconds = float(np.mean(losses)) if losses else math.nan, self._now - began
        yield self._at(
            ev.EpochEnded, epoch=epoch, mean_loss=mean, seconds=seconds, batches=self.batches, completed=True
        )
        self._now += 0.4
        path = f"checkpoints/ep{epoch}-s{self._step}"
        yield self._at(ev.CheckpointSaved, path=path, bytes=412_000_000, seconds=0.4)

    def _train_step(self, epoch: int) -> Iterator[_Timed]:
        rng, lr, level = self._rng, self._lr(), self._level()
        yield self._at(ev.BatchIssued, epoch=epoch, size=self.batch_size, lr=lr, seconds=1.2e-4)
        seconds = self.step_seconds * float(rng.lognormal(0.0, 0.08))
        self._now += seconds
        loss = level * float(rng.lognormal(0.0, 0.12))
        spike = self._step > 200 and self._step >= self._cold_until and rng.random() < 1 / self.spike_every
        if spike:
            loss = math.nan if rng.random() < 0.2 else level * float(rng.uniform(8, 60))
        verdict = "calm" if not spike else "nonfinite" if math.isnan(loss) else "spike"
        score = (loss - level) / (0.12 * level)
        judged = {"epoch": epoch, "loss": loss, "expected_loss": level, "verdict": verdict, "score": score}
        own = 2.3e-4 + 1e-4 * rng.random()
        yield self._at(ev.LossReported, **judged, lr=lr, size=self.batch_size, step_seconds=seconds, r8_seconds=own)
        if self._step % 10 == 0:
            value = float(rng.lognormal(-0.2, 0.3)) * (12 if spike else 1)
            yield self._at(ev.MetricLogged, name="grad_norm", value=value)
        if spike:
            indices = tuple(int(i) for i in rng.integers(0, self.batches * self.batch_size, self.batch_size))
            yield self._at(ev.SpikeSeen, **judged, indices=indices)
            yield self._at(
                ev.RolledBack, to_step=self._backup, source="ram", lr_multiplier=0.5, hold_steps=200, seconds=0.2
            )
            reason = "a rollback: half the learning rate for 200 steps"
            yield self._at(ev.PhaseChanged, phase="probation", reason=reason)
            self._cold_until = self._step + 200
        elif self._step % 50 == 0:
            yield self._at(ev.BackupTaken, bytes=380_000_000, seconds=0.12)
            if self._step:
                yield self._at(ev.BackupVerified, of_step=self._backup)
            self._backup = self._step
        self._step += 1

    def _quadrants(self, epoch: int) -> _Timed:
        level, quarter = self._level(), self.batches * self.batch_size // 4
        return self._at(
            ev.QuadrantsRefreshed,
            epoch=epoch,
            edges=tuple(level * factor for factor in (0.02, 0.35, 0.8, 1.6, 40.0)),
            counts=(quarter,) * 4,
            losses=tuple(level * factor for factor in (0.2, 0.55, 1.1, 2.4)),
            uses=tuple(epoch + drift for drift in (0.1, 0.0, -0.1, 0.2)),
            easier=(0.0, 0.31, 0.27, 0.12),
            unseen=0,
            stuck=max(0, epoch - 5) * quarter // 300,
        )
