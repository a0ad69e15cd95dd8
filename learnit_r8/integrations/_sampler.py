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

    Every new iterator of a `DataLoader` draws a seed from torch's global generator. Give it one of
    its own (`generator=torch.Generator()`) where a resumed run has to equal the uninterrupted one.

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
        return self._batches(*_look_up_loader(sys._getframe(1), self.scheduler.catalog.num_samples))

    def _batches(self, lead: int | None, problems: list[str]) -> Iterator[list[int]]:
        if problems:  # not earlier: a loader that fails while it is made fails once more when it is deleted
            raise ConfigError(problems)
        if lead is not None:
            self.scheduler.allow_lookahead(lead + self.ahead + 1, prefetched=lead)
        for batch in self.scheduler.batch_iterator():
            yield batch.indices.tolist()

    def state_dict(self) -> dict[str, Any]:
        """Return a note for `StatefulDataLoader`: it must not count batches, which the scheduler does."""
        return {"position": "in the state of R8Scheduler"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: restore the scheduler."""


def _look_up_loader(frame: FrameType | None, num_samples: int) -> tuple[int | None, list[str]]:
    """Return how many batches the loader that is asking keeps in flight, and what is wrong with it or its data.

    A loader does not tell its sampler of itself, so it is looked up on the stack. (None, []): there is none.
    """
    for _ in range(_DEPTH):
        if frame is None:
            break
        for name in ("loader", "self"):
            value = frame.f_locals.get(name)
            if isinstance(value, DataLoader):
                lead = value.num_workers * (value.prefetch_factor or 0)
                problems = _problems(getattr(value, "in_order", True), getattr(value, "snapshot_every_n_steps", 1))
                return lead, problems + _size_problems(value.dataset, num_samples)
            if isinstance(value, _BaseDataLoaderIter):  # the sampler is wrapped in another one
                lead = int(value._num_workers) * int(getattr(value, "_prefetch_factor", None) or 0)
                problems = _problems(getattr(value, "_in_order", True), getattr(value, "_snapshot_interval", 1))
                return lead, problems + _size_problems(value._dataset, num_samples)
        frame = frame.f_back
    return None, []


def _problems(in_order: bool, snapshot_interval: int) -> list[str]:
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
    return problems


def _size_problems(dataset: Any, num_samples: int) -> list[str]:
    size = len(dataset) if hasattr(dataset, "__len__") else num_samples
    if size == num_samples:
        return []
    return [
        f"the loader's data set has {size} samples, R8Scheduler has num_samples={num_samples}: create it with "
        "num_samples=len(data), and resume with the data set that the run was saved with"
    ]
