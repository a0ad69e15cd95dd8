"""The frozen values that travel round the loop, and the protocols of its guests."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Losses = NDArray[np.float32]
Mask = NDArray[np.bool_]


SAMPLES_TOLD = 1000
"""Sample ids of one batch that an event, a crash bundle or a saved state holds at most: nobody reads a million."""


class Verdict(StrEnum):
    """What the detector says of one reported loss."""

    CALM = "calm"
    """Nothing unusual: the loss enters every statistic."""
    SUSPECT = "suspect"
    """Unusual, but not yet enough to act on: kept out of the detector's window."""
    SPIKE = "spike"
    """Far above what the recent losses allow, repeatedly: act."""
    DRIFT = "drift"
    """The level itself has been rising for long: act."""
    NONFINITE = "nonfinite"
    """NaN or infinity: act at once; it never enters any statistic."""
    SKIPPED = "skipped"
    """The user skipped the optimizer step (AMP overflow): not a fault."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """A ticket: the samples of one training step, to be answered by one report.

    It unpacks as `indices, lr = batch`.

    Attributes:
        indices: Sample ids, int64, shape `[batch size]` (the last one may be shorter).
        lr: Learning rate for this step.
        weights: Importance weights, float32, same shape, mean about 1 (with "infobatch" up to 2). They multiply
            per-sample losses; all ones for unbiased strategies.
        id: Number of the ticket, unique within a run.
        step: Global step at which it is trained on, from 0.
        epoch: Epoch that it belongs to, from 0.
        keys: The samples' keys, in the same order, where the run was given keys; then it unpacks as `keys, lr`.
    """

    indices: Indices
    lr: float
    weights: Losses
    id: int
    step: int
    epoch: int
    keys: list[Hashable] | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.indices if self.keys is None else self.keys, self.lr))

    def __len__(self) -> int:
        return 2


_WEIGHTS: Any = vars(Batch)["weights"]  # its slot


class WeighedBatch(Batch):
    """A batch whose samples count unequally; it notes whether anybody looked at its weights.

    Attributes:
        asked: Whether `weights` was read.
    """

    __slots__ = ("asked",)
    asked: bool

    @property
    def weights(self) -> Losses:
        """Importance weights."""
        object.__setattr__(self, "asked", True)
        weights: Losses = _WEIGHTS.__get__(self, Batch)
        return weights

    @weights.setter
    def weights(self, value: Losses) -> None:
        _WEIGHTS.__set__(self, value)
        object.__setattr__(self, "asked", False)


def unnoticed(batch: Batch) -> Batch:
    """Return a batch as one that takes no note of who reads its weights."""
    if not isinstance(batch, WeighedBatch):
        return batch
    return Batch(batch.indices, batch.lr, _WEIGHTS.__get__(batch, Batch), batch.id, batch.step, batch.epoch, batch.keys)


@dataclass(frozen=True, slots=True, eq=False)
class LossReport:
    """What came back for one batch, cleaned: finite or not, per sample or not.

    Attributes:
        indices: Sample ids of the batch, int64, shape `[n]`.
        losses: Per-sample losses, float32, shape `[n]`. Where the user reported one
            number for the whole batch these are the catalog's estimates after it.
        loss: Mean loss of the batch, unweighted.
        per_sample: True when `losses` were reported, False when they were estimated.
        step: Global step that the batch was trained at.
        epoch: Epoch that the batch belongs to.
    """

    indices: Indices
    losses: Losses
    loss: float
    per_sample: bool
    step: int
    epoch: int


class StepResult(NamedTuple):
    """What one report led to; truthy when the loss was accepted.

    Attributes:
        accepted: The loss entered the catalog.
        rolled_back: The model was restored from a backup.
        verdict: The detector's word on the loss.
        loss: Mean of the reported loss; NaN or infinite where that was reported.
        expected_loss: The catalog's estimate for the batch before the report; NaN while
            none of its samples had been seen.
        surprise: `loss - expected_loss`.
        step: Global step that the report belongs to.
    """

    accepted: bool
    rolled_back: bool
    verdict: Verdict
    loss: float
    expected_loss: float
    surprise: float
    step: int

    def __bool__(self) -> bool:
        return self.accepted


@runtime_checkable
class Sink(Protocol):
    """Hears every event of a run. It cannot slow or break training.

    `record` is called from the training thread for every event and must return at once:
    append to a `collections.deque` and work elsewhere. An exception drops the sink.

    Optional members, used where present: `close()`, called once at the end, and
    `commands`, a `collections.deque` of `Command` that the loop polls between steps;
    `ignores_batches`, True where `BatchIssued` tells nothing that `LossReported` does not: it
    is then only sent if another sink wants it;
    `patient`, True where `LossReported` of calm losses may come a few steps late, in order and for a fifth of a
    second at most, which makes steps cheaper.
    """

    def record(self, event: Any) -> None:
        """Take one event of `learnit_r8.events`."""
        ...


class Command(StrEnum):
    """What a sink may ask of the loop, carried out between two steps."""

    CHECKPOINT = "checkpoint"
    PAUSE = "pause"
    RESUME = "resume"
    STOP_AFTER_STEP = "stop-after-step"
    STOP_AFTER_EPOCH = "stop-after-epoch"
    """Finish the epoch, write a checkpoint, then stop."""
    STOP_NOW = "stop-now"
    """Raise KeyboardInterrupt in the training thread at the next step boundary."""
