"""The run's numbers under names that do not change between trackers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from learnit_r8 import events

__all__ = ["Numbers", "Point", "Points"]

_EVALUATION = ("val", "eval", "test")


class Point(NamedTuple):
    """One number of a curve. `time` is seconds since the Unix epoch."""

    name: str
    value: float
    step: int
    time: float


class Points:
    """Turns events into points.

    | name | from |
    |---|---|
    | `train/loss`, `train/lr`, `train/epoch`, `train/epoch_loss` | each step; the last one each epoch |
    | `eval/*`, `train/*` | `scheduler.log(val_loss=...)` is `eval/loss`; a name with a slash stays |
    | `r8/expected_loss`, `r8/score`, `r8/lag`, `r8/seconds` | each step |
    | `r8/spikes`, `r8/rollbacks`, `r8/quarantined` | totals, when they change |
    | `r8/lr_multiplier`, `r8/backup_seconds`, `r8/checkpoint_seconds` | when it happens |
    | `r8/q1_loss` .. `r8/q4_loss`, `r8/q1_uses` .., `r8/unseen`, `r8/stuck` | each epoch |

    Args:
        names: Other names, by the names above; None leaves a curve out.
    """

    def __init__(self, names: Mapping[str, str | None] | None = None) -> None:
        self._names = dict(names or {})
        self._issued = 0
        self.totals = dict.fromkeys(("r8/spikes", "r8/rollbacks", "r8/quarantined"), 0.0)

    def of(self, event: events.Event) -> list[Point]:
        """Return the points of one event; kinds that hold no number have none."""
        if isinstance(event, events.BatchIssued):
            self._issued = event.step
        read = _READ.get(type(event))
        found = [] if read is None else list(read(event))
        if isinstance(event, events.LossReported):
            found.append(("r8/lag", max(self._issued - event.step, 0)))
        points = []
        for name, value in found:
            if name in self.totals:
                value = self.totals[name] = self.totals[name] + value
            shown = self._names.get(name, name)
            if shown is not None:
                points.append(Point(shown, float(value), event.step, event.time))
        return points


_Pairs = Iterable[tuple[str, float]]


def _loss(event: events.LossReported) -> _Pairs:
    pairs = [("train/loss", event.loss), ("train/lr", event.lr), ("train/epoch", event.epoch)]
    known = [("r8/expected_loss", event.expected_loss), ("r8/score", event.score)]
    # NaN says that there is none.
    return [*pairs, ("r8/seconds", event.r8_seconds), *(pair for pair in known if math.isfinite(pair[1]))]


def _quadrants(event: events.QuadrantsRefreshed) -> _Pairs:
    pairs = [(f"r8/q{q}_{what}", value) for what, values in (("loss", event.losses), ("uses", event.uses))
             for q, value in enumerate(values, start=1)]  # fmt: skip
    return [*pairs, ("r8/unseen", event.unseen), ("r8/stuck", event.stuck)]


def _metric(event: events.MetricLogged) -> _Pairs:
    head, _, rest = event.name.partition("_")
    if "/" in event.name:
        return [(event.name, event.value)]
    return [(f"eval/{rest}" if head in _EVALUATION and rest else f"train/{event.name}", event.value)]


_READ: dict[type[events.Event], Callable[[Any], _Pairs]] = {
    events.LossReported: _loss,
    events.QuadrantsRefreshed: _quadrants,
    events.MetricLogged: _metric,
    events.RolledBack: lambda event: [("r8/rollbacks", 1), ("r8/lr_multiplier", event.lr_multiplier)],
    events.EpochEnded: lambda event: [("train/epoch_loss", event.mean_loss)],
    events.SpikeSeen: lambda _: [("r8/spikes", 1)],
    events.SampleQuarantined: lambda event: [("r8/quarantined", len(event.indices))],
    events.BackupTaken: lambda event: [("r8/backup_seconds", event.seconds)],
    events.CheckpointSaved: lambda event: [("r8/checkpoint_seconds", event.seconds)],
}


class Numbers:
    """A sink that keeps the newest of the run's own numbers (`r8/...`), for the loggers of a host's trainer.

    Args:
        scheduler: Is listened to from now on.

    Attributes:
        LATE: Names that have no value in a run's first steps, for loggers that want all names at once.
    """

    ignores_batches = patient = True
    LATE = (
        *(f"r8/q{quadrant}_{what}" for quadrant in range(1, 5) for what in ("loss", "uses")), "r8/unseen", "r8/stuck",
        "r8/expected_loss", "r8/score", "r8/lr_multiplier", "r8/backup_seconds", "r8/checkpoint_seconds",
    )  # fmt: skip

    def __init__(self, scheduler: Any) -> None:
        self._points = Points({"r8/lag": None})
        self._newest = dict.fromkeys(self._points.totals, 0.0)
        self._report: events.LossReported | None = None
        self._settle = scheduler.settle
        scheduler.add_sink(self)

    def record(self, event: events.Event) -> None:
        """Take one event; a step's costs next to nothing."""
        if isinstance(event, events.LossReported):
            self._report = event
        else:
            self._newest.update({point.name: point.value for point in self._points.of(event)})

    def newest(self) -> dict[str, float]:
        """Return name -> value."""
        self._settle()
        step = [] if self._report is None else self._points.of(self._report)
        found = self._newest | {point.name: point.value for point in step}
        return {name: value for name, value in found.items() if name.startswith("r8/")}
