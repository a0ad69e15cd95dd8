"""Immutable facts of a run, for sinks. Every fact has a wall-clock time and a global step.

Events hold plain numbers, strings and tuples only, so `to_json` and `from_json` are exact
for everything but non-finite floats, which strict JSON lacks: they travel as strings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """A fact. `time` is seconds since the Unix epoch, `step` the global step."""

    time: float
    step: int


@dataclasses.dataclass(frozen=True, slots=True)
class RunStarted(Event):
    """The first batch is about to be drawn (again after a resume)."""

    run: str
    config: Mapping[str, Any]
    steps_per_epoch: int
    total_steps: int | None
    """None when the budget is wall-clock time."""
    resumed: bool
    version: str
    pid: int
    elapsed: float
    """Training seconds already spent before this process, on resume."""


@dataclasses.dataclass(frozen=True, slots=True)
class EpochStarted(Event):
    """An epoch's plan is made."""

    epoch: int
    phase: str
    """"cataloging", or the name of the strategy that chooses from now on."""
    batches: int


@dataclasses.dataclass(frozen=True, slots=True)
class BatchIssued(Event):
    """A batch was handed to the user."""

    epoch: int
    size: int
    lr: float
    seconds: float
    """Time that choosing the samples took."""


@dataclasses.dataclass(frozen=True, slots=True)
class LossReported(Event):
    """A loss came back."""

    epoch: int
    loss: float
    expected_loss: float
    lr: float
    verdict: str
    score: float
    """The detector's z; NaN while it is not active."""
    size: int
    step_seconds: float
    """From handing out the batch to its report: the user's share of the step."""
    r8_seconds: float
    """The scheduler's own share of this step: draw and update."""


@dataclasses.dataclass(frozen=True, slots=True)
class QuadrantsRefreshed(Event):
    """New quartile edges at the start of an epoch, and how samples moved in the last one.

    Tuples have one entry a quadrant, Q1 (lowest loss) first.
    """

    epoch: int
    edges: tuple[float, ...]
    """Five losses: lowest, the three quartile edges, highest."""
    counts: tuple[int, ...]
    losses: tuple[float, ...]
    """Mean expected loss."""
    uses: tuple[float, ...]
    """Mean number of times that a sample was trained on."""
    easier: tuple[float, ...]
    """Share of the samples that ended the last epoch in a lower quadrant."""
    unseen: int
    stuck: int
    """Samples that have stayed in Q4 for more than five epochs."""


@dataclasses.dataclass(frozen=True, slots=True)
class EpochEnded(Event):
    """The epoch's last batch was reported, or its loop was left early."""

    epoch: int
    mean_loss: float
    seconds: float
    batches: int
    completed: bool


@dataclasses.dataclass(frozen=True, slots=True)
class PhaseChanged(Event):
    """LR search, cataloging, balanced, probation, ... and why."""

    phase: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class SpikeSeen(Event):
    """A loss, or several, that are not as usual."""

    epoch: int
    verdict: str
    loss: float
    expected_loss: float
    score: float
    indices: tuple[int, ...]
    """Sample ids of the batch."""
    reason: str = ""
    """The evidence in words."""


@dataclasses.dataclass(frozen=True, slots=True)
class RolledBack(Event):
    """The model was restored."""

    to_step: int
    source: str
    """"ram", or the path of a checkpoint."""
    lr_multiplier: float
    hold_steps: int
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class RollbackFailed(Event):
    """No restore was possible, or the callback failed; the update was not counted."""

    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class BackupTaken(Event):
    """The model's state was copied to RAM."""

    bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class BackupVerified(Event):
    """Later losses proved the backup of `of_step` healthy."""

    of_step: int


@dataclasses.dataclass(frozen=True, slots=True)
class SampleQuarantined(Event):
    """Samples are kept out of batches from now on."""

    indices: tuple[int, ...]
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class SuspectsNamed(Event):
    """The samples most likely to be wrong rather than hard, most suspicious first."""

    indices: tuple[int, ...]
    losses: tuple[float, ...]
    count: int
    """How many were flagged; `indices` holds the first of them."""


@dataclasses.dataclass(frozen=True, slots=True)
class StrategyDecided(Event):
    """A strategy changed its mind, with the figure that made it."""

    decision: str
    reason: str
    figure: float


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointSaved(Event):
    """A checkpoint is durable on disk."""

    path: str
    bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointFailed(Event):
    """Saving or reading a checkpoint failed; the previous one stays."""

    path: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointLoaded(Event):
    """State was restored from disk."""

    path: str


@dataclasses.dataclass(frozen=True, slots=True)
class LrFound(Event):
    """LR discovery ended; `lr` is the new peak (the configured one when ambiguous)."""

    lr: float
    suggestions: Mapping[str, float | None]
    steps: int


@dataclasses.dataclass(frozen=True, slots=True)
class MetricLogged(Event):
    """A number of the user's own: validation loss, gradient norm, accuracy, ..."""

    name: str
    value: float


@dataclasses.dataclass(frozen=True, slots=True)
class Paused(Event):
    """The loop waits (`paused` true) or goes on."""

    paused: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Notice(Event):
    """Something that the user should know."""

    message: str
    level: str = "info"
    """"info" or "warning"."""


@dataclasses.dataclass(frozen=True, slots=True)
class SinkFailed(Event):
    """A sink raised and was dropped."""

    sink: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class RunEnded(Event):
    """The budget is spent, or the scheduler was closed earlier."""

    reason: str
    """"finished", "stopped" (by command or signal), "closed" or "error"."""
    seconds: float
    """Training seconds, those before a resume counted."""
    final_level: float | None = None
    """Median of the last losses; None in a run of fewer than 48."""
    best_level: float | None = None
    """The lowest that it was."""
    best_step: int | None = None
    """Around when."""
    left_out: tuple[int, ...] = ()
    """Samples that faults named."""


EVENT_TYPES: dict[str, type[Event]] = {cls.__name__: cls for cls in Event.__subclasses__()}

_FIELDS = {
    kind: [(field.name, str(field.type), field.type in ("int", "str", "bool")) for field in dataclasses.fields(kind)]
    for kind in EVENT_TYPES.values()
}
"""Name and type of each event's fields, and whether they stand in JSON as they are."""


def to_json(event: Event) -> dict[str, Any]:
    """Return the event as strict-JSON data, its class under "event"."""
    data: dict[str, Any] = {"event": type(event).__name__}
    for field in dataclasses.fields(event):
        data[field.name] = plain(getattr(event, field.name))
    return data


def from_json(data: Mapping[str, Any]) -> Event:
    """Return the event that `to_json` made `data` from.

    Unknown fields are ignored, so that an older reader follows a newer writer.

    Raises:
        ValueError: The event's class is unknown or a field is missing.
    """
    kind = EVENT_TYPES.get(data.get("event", ""))
    if kind is None:
        raise ValueError(f"unknown event {data.get('event')!r}")
    values = {}
    for name, annotation, simple in _FIELDS[kind]:
        if name in data:
            value = data[name]
            values[name] = value if simple or type(value) is float else _revive(value, annotation)
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"incomplete {kind.__name__}: {error}") from error


def plain(value: Any) -> Any:
    """Return a value as strict-JSON data: tuples as lists, non-finite floats as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value


def _revive(value: Any, annotation: str) -> Any:
    if "float" in annotation:
        if isinstance(value, str):
            return float(value)
        if isinstance(value, int) and annotation == "float":
            return float(value)
    if isinstance(value, list):
        return tuple(_revive(item, annotation) for item in value)
    if isinstance(value, dict) and "float" in annotation:
        return {key: _revive(item, annotation) for key, item in value.items()}
    return value
