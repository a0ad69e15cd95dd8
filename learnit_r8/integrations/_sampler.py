"""The scheduler's batches as a torch `batch_sampler`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader, Sampler
from torch.utils.data.dataloader import _BaseDataLoaderIter

from learnit_r8.errors import ConfigError
from learnit_r8.scheduler import R8Scheduler

_DEPTH = 12
"""Frames between a loader and its sampler: torch has 2, a wrapped sampler of Accelerate 6."""


class R8BatchSampler(Sampler[list[int]]):
    """What `DataLoader(data, batch_sampler=R8BatchSampler(scheduler))` draws its batches from.

        for epoch in scheduler.epoch_iterator():
            for inputs, labels in loader:
                losses = train_step(inputs, labels)
                scheduler.update_with_loss(losses)

    A loader with workers is `num_workers * prefetch_factor` batches ahead of the losses. Its lead
    is read off the loader that iterates, and losses are matched to batches in the order of issue;
    so `in_order=False` is refused. Batches that a loop was left with are handed out again by the
    next one. Works with persistent workers, and with torchdata's `StatefulDataLoader`, whose
    state then holds no samples: where the run stands is the scheduler's own state, which a
    checkpoint of the scheduler (or its `state_dict`) keeps.

    Args:
        scheduler: Hands out the batches. On several ranks these are this rank's slices.
        ahead: Further batches that the loop holds before it reports the first of them, e.g.
            `g - 1` where `g` batches are collected for one optimizer step and reported after it.

    Raises:
        ConfigError: Bad arguments.
    """

    def __init__(self, scheduler: R8Scheduler, ahead: int = 0) -> None:
        problems = []
        if not hasattr(scheduler, "batch_iterator"):
            problems.append(f"scheduler must be an R8Scheduler, got {type(scheduler).__name__}")
        if not isinstance(ahead, int) or isinstance(ahead, bool) or ahead < 0:
            problems.append(f"ahead must be a whole number >= 0, got {ahead!r}")
        if problems:
            raise ConfigError(problems)
        self.scheduler = scheduler
        self.ahead = ahead

    def __len__(self) -> int:
        """Return the batches in a full epoch, also in the middle of one."""
        return self.scheduler.steps_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        """Return an iterator over what is left of the current epoch."""
        lead = _lead(sys._getframe(1))
        if lead is not None:
            self.scheduler.allow_lookahead(lead + self.ahead + 1)
        return self._batches()

    def _batches(self) -> Iterator[list[int]]:
        for batch in self.scheduler.batch_iterator():
            yield batch.indices.tolist()

    def state_dict(self) -> dict[str, Any]:
        """Return a note for `StatefulDataLoader`: it must not count batches, which the scheduler does."""
        return {"position": "in the state of R8Scheduler"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: restore the scheduler."""


def _lead(frame: FrameType | None) -> int | None:
    """Return how many batches the loader that is asking keeps in flight, or None where there is no loader.

    A loader does not tell its sampler of itself, so it is looked up on the stack.

    Raises:
        ConfigError: The loader would deliver batches in another order, or skip some.
    """
    for _ in range(_DEPTH):
        if frame is None:
            return None
        for name in ("loader", "self"):
            value = frame.f_locals.get(name)
            if isinstance(value, DataLoader):
                _check(getattr(value, "in_order", True), getattr(value, "snapshot_every_n_steps", 1))
                return value.num_workers * (value.prefetch_factor or 0)
            if isinstance(value, _BaseDataLoaderIter):  # the sampler is wrapped in another one
                _check(getattr(value, "_in_order", True), getattr(value, "_snapshot_interval", 1))
                return int(value._num_workers) * int(getattr(value, "_prefetch_factor", None) or 0)
        frame = frame.f_back
    return None


def _check(in_order: bool, snapshot_interval: int) -> None:
    problems = []
    if not in_order:
        problems.append(
            "DataLoader(in_order=False) delivers batches in another order than they were drawn, so losses would reach "
            "the wrong samples: remove in_order=False"
        )
    if snapshot_interval != 1:
        problems.append(
            f"StatefulDataLoader(snapshot_every_n_steps={snapshot_interval}) draws batches and drops them on resume: "
            "leave it at 1, a snapshot of R8BatchSampler costs nothing"
        )
    if problems:
        raise ConfigError(problems)
