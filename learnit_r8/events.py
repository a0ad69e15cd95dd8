"""Immutable facts of a run, for sinks. Every fact has a wall-clock time and a global step.

Events hold plain numbers, strings and tuples only, so `to_json` and `from_json` are exact
for everything but non-finite floats, which strict JSON lacks: they travel as strings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A fact. `time` is seconds since the Unix epoch, put in when it is told; `step` the global step."""

    time: float = math.nan
    step: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EpochStarted(Event):
    """An epoch's plan is made."""

    epoch: int
    phase: str
    """"cataloging", or the name of the strategy that chooses from now on."""
    batches: int
    total_steps: int = 0
    """Steps of the whole run, where samples have come since it began; 0: as was said."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BatchIssued(Event):
    """A batch was handed to the user."""

    epoch: int
    size: int
    lr: float
    seconds: float
    """Time that choosing the samples took."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EpochEnded(Event):
    """The epoch's last batch was reported, or its loop was left early."""

    epoch: int
    mean_loss: float
    seconds: float
    batches: int
    completed: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PhaseChanged(Event):
    """LR search, cataloging, balanced, probation, ... and why."""

    phase: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SpikeSeen(Event):
    """A loss, or several, that are not as usual."""

    epoch: int
    verdict: str
    loss: float
    expected_loss: float
    score: float
    indices: tuple[int | str, ...]
    """Samples of the batch, here and elsewhere: ids, or keys where the run was given keys."""
    reason: str = ""
    """The evidence in words."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RolledBack(Event):
    """The model was restored."""

    to_step: int
    source: str
    """"ram", or the path of a checkpoint."""
    lr_multiplier: float
    hold_steps: int
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RollbackFailed(Event):
    """No restore was possible, or the callback failed; the update was not counted."""

    reason: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BackupTaken(Event):
    """The model's state was copied to RAM."""

    bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BackupVerified(Event):
    """Later losses proved the backup of `of_step` healthy."""

    of_step: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SampleQuarantined(Event):
    """Samples are kept out of batches from now on."""

    indices: tuple[int | str, ...]
    reason: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SuspectsNamed(Event):
    """The samples most likely to be wrong rather than hard, most suspicious first."""

    indices: tuple[int | str, ...]
    losses: tuple[float, ...]
    count: int
    """How many were flagged; `indices` holds the first of them."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StrategyDecided(Event):
    """A strategy changed its mind, with the figure that made it."""

    decision: str
    reason: str
    figure: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved(Event):
    """A checkpoint is durable on disk."""

    path: str
    bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFailed(Event):
    """Saving or reading a checkpoint failed; the previous one stays."""

    path: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointLoaded(Event):
    """State was restored from disk."""

    path: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LrFound(Event):
    """LR discovery ended; `lr` is the new peak (the configured one when ambiguous)."""

    lr: float
    suggestions: Mapping[str, float | None]
    steps: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MetricLogged(Event):
    """A number of the user's own: validation loss, gradient norm, accuracy, ..."""

    name: str
    value: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated(Event):
    """A value of the metric that `Evaluation` names came, seen beside the training loss."""

    epoch: int
    metric: str
    value: float
    train_loss: float
    """Mean of the losses since the last value; NaN where there were none."""
    best: float
    """NaN where no value counts yet."""
    best_step: int
    waited: int
    """Values since then."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OverfittingSeen(Event):
    """The metric became worse for good while the training loss fell; nothing is done about it."""

    epoch: int
    metric: str
    since_step: int
    """Step of the best value, smoothed over three, as all numbers here are."""
    best: float
    value: float
    train_loss_then: float
    train_loss: float
    reason: str
    """All of it as a sentence."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MadeWith(Event):
    """What a run is made with: told at its start, with what git says after the first epoch, and at a resume."""

    commit: str
    """Of the git repository that the program runs in; "" where there is none."""
    dirty: bool | None
    """Whether tracked files differ from it; None where git has not said, or cannot."""
    packages: Mapping[str, str]
    """Versions of the packages that are loaded."""
    device: str
    host: str
    command: str
    seeds: Mapping[str, int]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Paused(Event):
    """The loop waits (`paused` true) or goes on."""

    paused: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Notice(Event):
    """Something that the user should know."""

    message: str
    level: str = "info"
    """"info" or "warning"."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SinkFailed(Event):
    """A sink raised and was dropped."""

    sink: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
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
        ValueError: The event's class is unknown, or a field is missing or of another type.
    """
    name = str(data.get("event"))
    if name not in EVENT_TYPES:
        raise ValueError(f"unknown event {name}")
    kind = EVENT_TYPES[name]
    known = [field for field in dataclasses.fields(kind) if field.name in data]
    try:
        return kind(**{field.name: _read(data[field.name], str(field.type)) for field in known})
    except (TypeError, ValueError) as error:
        raise ValueError(f"incomplete {name}: {error}") from error


def plain(value: Any) -> Any:
    """Return a value as strict-JSON data: tuples as lists, non-finite floats as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value


def _read(value: Any, annotation: str) -> Any:
    """Take back what `plain` made of tuples, and of floats that are not finite, in any depth."""
    if annotation == "float":
        return float(value)
    if isinstance(value, dict) and "float" in annotation:
        return {key: _read(item, annotation) for key, item in value.items()}
    if annotation.startswith("tuple") or isinstance(value, list):
        return tuple([_read(item, "float") for item in value] if "float" in annotation else value)
    return float(value) if isinstance(value, str) and "float" in annotation else value
