"""The events of a plausible training run, for looking at the dashboard without data and for its tests."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from learnit_r8 import events as ev
from learnit_r8.events import Event

_VERSION = "demo"


class DemoRun:
    """Generates the events of one run; the same seed gives the same run.

    Iterating yields `(seconds, event)`: the training time since the start at which the event happens. Whoever plays it
    adds a clock, and a speed.

    Args:
        epochs: Epochs, the first one cataloging.
        batches: Batches in an epoch.
        batch_size: Samples in a batch.
        seed: Of every random number.
        step_seconds: Mean time of one step.
        start: Wall-clock time of the first event.
        spike_every: Mean number of steps between two spikes.
    """

    def __init__(
        self,
        epochs: int = 10,
        batches: int = 400,
        batch_size: int = 128,
        seed: int = 0,
        step_seconds: float = 0.05,
        start: float = 0.0,
        spike_every: int = 1100,
    ) -> None:
        self.epochs, self.batches, self.batch_size = epochs, batches, batch_size
        self.step_seconds, self.start, self.spike_every = step_seconds, start, spike_every
        self.total = epochs * batches
        self._rng = np.random.default_rng(seed)
        self._step = 0
        self._now = 0.0
        self._cold_until = 0
        self._backup = 0
        self._best = math.inf

    def __iter__(self) -> Iterator[tuple[float, Event]]:
        config = {"num_samples": self.batches * self.batch_size, "batch_size": self.batch_size, "strategy": "quadrant"}
        yield self._at(
            ev.RunStarted(
                step=self._step,
                run="demo",
                config=config,
                steps_per_epoch=self.batches,
                total_steps=self.total,
                resumed=False,
                version=_VERSION,
                pid=0,
                elapsed=0.0,
            )
        )
        yield self._at(
            ev.LrFound(step=self._step, lr=1e-2, suggestions={"steepest": 8.1e-3, "valley": 1e-2}, steps=100)
        )
        for epoch in range(self.epochs):
            yield from self._epoch(epoch)
        yield self._at(ev.RunEnded(step=self._step, reason="finished", seconds=self._now))

    def _at(self, event: Event) -> tuple[float, Event]:
        return self._now, replace(event, time=self.start + self._now)

    def _lr(self) -> float:
        warm = max(1, self.total // 10)
        if self._step < warm:
            return 1e-2 * (self._step + 1) / warm
        return 0.5e-2 * (1 + math.cos(math.pi * (self._step - warm) / (self.total - warm)))

    def _level(self) -> float:
        """Expected loss at this step: a power law that levels off, and a bump after a rollback."""
        return float(0.08 + 2.2 / (1 + 25 * self._step / self.total) ** 1.1)

    def _epoch(self, epoch: int) -> Iterator[tuple[float, Event]]:
        phase = "cataloging" if epoch == 0 else "quadrant"
        yield self._at(ev.EpochStarted(step=self._step, epoch=epoch, phase=phase, batches=self.batches))
        if epoch < 2:
            yield self._at(
                ev.PhaseChanged(
                    step=self._step, phase="cataloging" if epoch == 0 else "balanced", reason=f"epoch {epoch} begins"
                )
            )
        if epoch:
            yield self._quadrants(epoch)
        began, losses = self._now, []
        for _ in range(self.batches):
            for item in self._train_step(epoch):
                if isinstance(item[1], ev.LossReported) and math.isfinite(item[1].loss):
                    losses.append(item[1].loss)
                yield item
        yield from self._validate(epoch)
        mean = float(np.mean(losses)) if losses else math.nan
        yield self._at(
            ev.EpochEnded(
                step=self._step,
                epoch=epoch,
                mean_loss=mean,
                seconds=self._now - began,
                batches=self.batches,
                completed=True,
            )
        )
        self._now += 0.4
        yield self._at(
            ev.CheckpointSaved(
                step=self._step, path=f"checkpoints/ep{epoch}-s{self._step}", bytes=412_000_000, seconds=0.4
            )
        )

    def _train_step(self, epoch: int) -> Iterator[tuple[float, Event]]:
        rng, lr = self._rng, self._lr()
        yield self._at(ev.BatchIssued(step=self._step, epoch=epoch, size=self.batch_size, lr=lr, seconds=1.2e-4))
        seconds = self.step_seconds * float(rng.lognormal(0.0, 0.08))
        self._now += seconds
        level = self._level()
        loss = level * float(rng.lognormal(0.0, 0.12))
        spike = self._step > 200 and self._step >= self._cold_until and rng.random() < 1 / self.spike_every
        if spike:
            loss = math.nan if rng.random() < 0.2 else level * float(rng.uniform(8, 60))
        verdict = "calm" if not spike else "nonfinite" if math.isnan(loss) else "spike"
        score = (loss - level) / (0.12 * level)
        yield self._at(
            ev.LossReported(
                step=self._step,
                epoch=epoch,
                loss=loss,
                expected_loss=level,
                lr=lr,
                verdict=verdict,
                score=score,
                size=self.batch_size,
                step_seconds=seconds,
                r8_seconds=2.3e-4 + 1e-4 * rng.random(),
            )
        )
        if self._step % 10 == 0:
            yield self._at(
                ev.MetricLogged(
                    step=self._step, name="grad_norm", value=float(rng.lognormal(-0.2, 0.3)) * (12 if spike else 1)
                )
            )
        if spike:
            yield from self._recover(epoch, loss, level, score, verdict)
        elif self._step % 50 == 0:
            yield self._at(ev.BackupTaken(step=self._step, bytes=380_000_000, seconds=0.12))
            if self._step:
                yield self._at(ev.BackupVerified(step=self._step, of_step=self._backup))
            self._backup = self._step
        self._step += 1

    def _recover(
        self, epoch: int, loss: float, level: float, score: float, verdict: str
    ) -> Iterator[tuple[float, Event]]:
        indices = tuple(int(i) for i in self._rng.integers(0, self.batches * self.batch_size, self.batch_size))
        yield self._at(
            ev.SpikeSeen(
                step=self._step,
                epoch=epoch,
                verdict=verdict,
                loss=loss,
                expected_loss=level,
                score=score,
                indices=indices,
            )
        )
        yield self._at(
            ev.RolledBack(
                step=self._step, to_step=self._backup, source="ram", lr_multiplier=0.5, hold_steps=200, seconds=0.2
            )
        )
        yield self._at(
            ev.PhaseChanged(
                step=self._step, phase="probation", reason="a rollback: half the learning rate for 200 steps"
            )
        )
        self._cold_until = self._step + 200

    def _validate(self, epoch: int) -> Iterator[tuple[float, Event]]:
        self._now += self.step_seconds * self.batches * 0.1
        value = self._level() * 1.15 * float(self._rng.lognormal(0.0, 0.03))
        yield self._at(ev.MetricLogged(step=self._step, name="val_loss", value=value))
        yield self._at(ev.MetricLogged(step=self._step, name="accuracy", value=1 - 0.35 * min(1.0, value) ** 0.8))
        if value < self._best:
            self._best = value

    def _quadrants(self, epoch: int) -> tuple[float, Event]:
        level, quarter = self._level(), self.batches * self.batch_size // 4
        edges = tuple(level * factor for factor in (0.02, 0.35, 0.8, 1.6, 40.0))
        means = tuple(level * factor for factor in (0.2, 0.55, 1.1, 2.4))
        uses = tuple(epoch + drift for drift in (0.1, 0.0, -0.1, 0.2))
        stuck = max(0, epoch - 5) * quarter // 300
        return self._at(
            ev.QuadrantsRefreshed(
                step=self._step,
                epoch=epoch,
                edges=edges,
                counts=(quarter,) * 4,
                losses=means,
                uses=uses,
                easier=(0.0, 0.31, 0.27, 0.12),
                unseen=0,
                stuck=stuck,
            )
        )
