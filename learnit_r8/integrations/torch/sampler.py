"""The scheduler's batches as a torch `batch_sampler`."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Sampler
from torch.utils.data.dataloader import _BaseDataLoaderIter

from learnit_r8.core.config import Problems
from learnit_r8.errors import ConfigError, ProtocolError
from learnit_r8.integrations.torch.workers import SeededIndices, SignalsHeld, shield
from learnit_r8.loop.in_flight import Loader
from learnit_r8.scheduler import R8Scheduler
from learnit_r8.types import Batch

_DEPTH = 16
"""Frames between a sampler and whatever iterates its loader: torch has 3, wrappers of Accelerate up to 8."""

_UNUSED = (
    "nobody asks for R8Scheduler's learning rate, so the optimizer keeps its own while the schedule goes on: call "
    "learnit_r8.integrations.torch.follow_lr(scheduler, optimizer) once before the loop, or, with a schedule of your "
    "own, give R8Scheduler(scheduler_mode='constant', warmup_proportion=0)"
)


class R8BatchSampler(Sampler[list[int]]):
    """What `DataLoader(data, batch_sampler=R8BatchSampler(scheduler))` draws its batches from.

        for epoch in scheduler.epoch_iterator():
            for inputs, labels in loader:
                losses = train_step(inputs, labels)
                scheduler.update_with_loss(losses)

    A loader with workers is `num_workers * prefetch_factor` batches ahead of the losses. Its lead is read off the
    loader that iterates, and losses are matched to batches in the order of issue; so `in_order=False` is refused, and
    each batch that comes out of the loader has to be reported before the next one, also one that is left out:
    `scheduler.update_with_loss(float("nan"), skipped=True)`. Batches that a loop was left with are handed out again by
    the next one. A loop where no epoch is open is refused: to evaluate on the training data, take
    `evaluation_loader(loader)`. Where nobody asks for the scheduler's learning rate (see `follow_lr`), that is said.

    Workers' random numbers (torch, numpy, random) follow from the scheduler's seed, the epoch and the batch, so a
    resumed run has those of the uninterrupted one. A dataset with generators of its own derives them from
    `torch.initial_seed()` in `__getitem__`. Without workers it draws from the global generators, which
    `capture_state` keeps.

    Works with persistent workers, and with torchdata's `StatefulDataLoader`, whose state then holds no samples: where
    the run stands is the scheduler's own state.

    Args:
        scheduler: Hands out the batches. On several ranks these are this rank's slices.
        ahead: Further batches that the loop holds before it reports the first of them, e.g.
            `g - 1` where `g` batches are collected for one optimizer step and reported after it.

    Raises:
        ConfigError: Bad arguments.
    """

    def __init__(self, scheduler: R8Scheduler, ahead: int = 0) -> None:
        problems = Problems()
        if not hasattr(scheduler, "batch_iterator"):
            problems.append(f"scheduler must be an R8Scheduler, got {type(scheduler).__name__}")
        self.scheduler, self.ahead = scheduler, problems.integer("ahead", ahead, 0)
        problems.raise_if_any()
        self._generator = torch.Generator()
        self._first: tuple[float, int] | None = None  # rate, and global step when it was drawn
        self._looked = False  # whether anybody asks for the learning rate

    def __len__(self) -> int:
        """Return the batches in a full epoch, also in the middle of one."""
        return self.scheduler.steps_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        """Return an iterator over what is left of the current epoch."""
        asker, loader = _who_asks(sys._getframe(1), self)
        held = shield(loader, self.scheduler.awaited_signals)
        if loader is not None and loader.generator in (None, self._generator):
            # An iterator draws a seed for its workers: not from the global generator, which would be another one
            # after a resume.
            loader.generator = self._generator.manual_seed(self.scheduler.data_seed())
        return _Lists(self, asker, held)

    def _look(self, lr: float) -> None:
        first, step = self._first = self._first or (lr, self.scheduler.global_step)
        if lr != first and self.scheduler.global_step > step + 1:  # else a loader may be ahead of who sets the rate
            self._looked = True
            if not self.scheduler.lr_asked:
                self.scheduler.tell(_UNUSED)

    def state_dict(self) -> dict[str, Any]:
        """Return a note for `StatefulDataLoader`: it must not count batches, which the scheduler does."""
        return {"position": "in the state of R8Scheduler"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: restore the scheduler."""


class _Lists:
    """The scheduler's batches as lists. Workers' loaders ask on beyond the last one, and that is passed on."""

    def __init__(self, sampler: R8BatchSampler, asker: _Asker | None, held: SignalsHeld) -> None:
        self._sampler = sampler
        self._asker = asker
        self._held = held
        self._batches: Iterator[Batch] | None = None

    def __iter__(self) -> _Lists:
        return self

    def __next__(self) -> list[int]:
        if self._batches is None:
            self._held.end()  # the loader's workers have been started
            self._batches = self._begin()
        batch = next(self._batches)
        if not self._sampler._looked:
            self._sampler._look(batch.lr)
        ids: list[Any] = batch.indices.tolist() if batch.keys is None else batch.keys
        seeds = self._asker is not None and self._asker.workers > 0
        return SeededIndices(ids, self._sampler.scheduler.data_seed(batch)) if seeds else ids

    def _begin(self) -> Iterator[Batch]:
        scheduler, asker, ahead = self._sampler.scheduler, self._asker, self._sampler.ahead
        # Not earlier: a loader that fails while it is made fails once more when it is deleted.
        if asker is not None and (problems := asker.problems(scheduler.catalog.num_samples)):
            raise ConfigError(problems)
        if (why := scheduler.nothing_to_draw) is not None:
            raise ProtocolError(
                f"the loader is iterated and {why}: to train, iterate it inside `for epoch in "
                "scheduler.epoch_iterator()`, once an epoch; to evaluate on the training data, or for BatchNorm "
                "statistics (update_bn), take learnit_r8.integrations.torch.evaluation_loader(loader)"
            )
        if asker is None and ahead:
            scheduler.allow_lookahead(ahead + 1)
        return scheduler.batch_iterator(
            None if asker is None else Loader(asker.lead, ahead, asker.delivered, asker.failed)
        )


def evaluation_loader(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a loader over all training data that asks the scheduler for nothing, at any time.

        torch.optim.swa_utils.update_bn(evaluation_loader(loader), averaged_model)

    Each sample once, in order, in batches of nearly equal size. Workers, `collate_fn` and the like are those of
    `loader`.

    Args:
        loader: A loader that draws from an R8BatchSampler.

    Raises:
        ConfigError: It does not.
    """
    _, sampler = _unwrapped(getattr(loader, "batch_sampler", None))
    if sampler is None:
        raise ConfigError(f"loader must draw from an R8BatchSampler, got {type(loader).__name__}")
    size, keys = sampler.scheduler.catalog.num_samples, sampler.scheduler.keys
    pieces = max(size * sampler.scheduler.world_size // sampler.scheduler.batch_size, 1)
    same = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "prefetch_factor")
    return DataLoader(
        loader.dataset,
        batch_sampler=[keys.of(ids) if keys else ids.tolist() for ids in np.array_split(np.arange(size), pieces)],
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator(),
        **{name: getattr(loader, name) for name in same},
    )


def weighted(scheduler: R8Scheduler, losses: torch.Tensor) -> torch.Tensor:
    """Return losses times the importance weights of their samples, for the batch that came to the loop last.

        losses = criterion(model(inputs), labels)                    # reduction="none"
        weighted(scheduler, losses).mean().backward()
        ...
        scheduler.update_with_loss(losses)                           # without the weights

    Args:
        scheduler: Handed the batch out. With a strategy that draws all samples alike the weights are ones.
        losses: One row per sample of the batch, `[n, ...]`.

    Raises:
        ProtocolError: No batch is open, or it has another number of samples.
    """
    batch = scheduler.current_batch
    if batch is None or losses.ndim == 0 or len(losses) != len(batch.indices):
        came = "no batch is open" if batch is None else f"the batch has {len(batch.indices)} samples"
        raise ProtocolError(
            f"{came}, and losses of shape {tuple(losses.shape)} are to be weighted: call weighted(scheduler, losses) "
            "with one loss per sample (reduction='none'), between getting a batch and reporting it"
        )
    weights = torch.from_numpy(batch.weights).to(losses.device, losses.dtype)
    return losses * weights.reshape(-1, *(1,) * (losses.ndim - 1))


class _Asker:
    """A loader's iterator that draws from the sampler, known by a weak reference: it holds the sampler's batches."""

    def __init__(self, iterator: _BaseDataLoaderIter, wrappers: list[Any]) -> None:
        # Its attributes outlive it for a moment: what it has delivered by the time that a loop is thrown out of a step.
        self._last: dict[str, Any] = vars(iterator)
        self._iterator = weakref.ref(iterator, self._count_last)
        self._hosts: list[str] = []
        self._in_batches = any(type(wrapper) is BatchSampler for wrapper in wrappers)
        self._shard: Any = lambda: None
        self._skipped = 0
        self._delivered = 0
        self._before: int | None = None  # what the iterator has counted before the first draw
        self._lag = 0  # likewise: what it has received and not given
        self.workers = int(iterator._num_workers)
        self._prefetched = self.workers * int(getattr(iterator, "_prefetch_factor", None) or 0)
        for wrapper in wrappers:
            self.add_host(wrapper)
        if not all(_of_accelerate(wrapper) for wrapper in wrappers):
            self._skipped = 0  # one in between hands out what is to be skipped

    def add_host(self, host: Any) -> None:  # of Accelerate, around the sampler or the loader
        self._hosts.append(type(host).__name__)
        if self._hosts[-1] == "DataLoaderShard":
            self._shard = weakref.ref(host)
        self._skipped += getattr(host, "skip_batches", 0)

    @property
    def lead(self) -> int:
        """Batches that are drawn and have not come to the loop, at most."""
        return self._prefetched + (self._shard() is not None)

    def delivered(self) -> int:
        """Return how many batches the loop has got; asked for the first time at the first draw."""
        if self._last:
            count = self._last["_num_yielded"]
            if self._before is None:  # a wrapper may have sent batches of its own
                self._before = max(count, self._last.get("_send_idx", 0))
                self._lag = self._last.get("_rcvd_idx", count) - count
            shard = self._shard()  # keeps a batch back until it knows whether that is the last
            held_back = shard is not None and not shard.end_of_dataloader
            self._delivered = max(count - self._before - held_back, 0)
        return self._delivered

    def failed(self) -> int:
        """Return for how many batches workers sent an error in place of data."""
        if not self.workers or not self._last:
            return 0
        return int(self._last["_rcvd_idx"] - self._last["_num_yielded"]) - self._lag

    def _count_last(self, _: Any) -> None:
        self.delivered()
        self._last = {}

    def problems(self, num_samples: int) -> list[str]:
        """Return what would lead losses to other samples."""
        iterator: Any = self._iterator()
        problems = []
        if self._in_batches:
            problems.append(
                "the sampler hands out whole batches, and was given for single samples: DataLoader(data, batch_sampler="
                "R8BatchSampler(scheduler)), not sampler=, and no batch_size"
            )
        if not getattr(iterator, "_in_order", True):
            problems.append(
                "DataLoader(in_order=False) delivers batches in another order than they were drawn, so losses would "
                "reach the wrong samples: remove in_order=False"
            )
        if (every := getattr(iterator, "_snapshot_interval", 1)) != 1:
            problems.append(
                f"StatefulDataLoader(snapshot_every_n_steps={every}) draws batches and drops them on resume: "
                "leave it at 1, a snapshot of R8BatchSampler costs nothing"
            )
        cutting = sorted({"BatchSamplerShard", "DataLoaderDispatcher"} & set(self._hosts))
        if cutting or self._skipped:
            problems.append(
                f"Accelerate's {cutting[0] if cutting else 'skip_first_batches'} takes batches out of R8Scheduler's "
                "plan, which every rank holds and a resume continues by itself: leave the loader out of "
                "accelerator.prepare() and skip_first_batches(), and move each batch to accelerator.device"
            )
        size = len(iterator._dataset) if hasattr(iterator._dataset, "__len__") else num_samples
        if size != num_samples:
            problems.append(
                f"the loader's data set has {size} samples, R8Scheduler has num_samples={num_samples}: create it with "
                "num_samples=len(data), and resume with the data set that the run was saved with"
            )
        return problems


def _who_asks(frame: FrameType | None, sampler: R8BatchSampler) -> tuple[_Asker | None, Any]:
    """Look up the iterator that draws from a sampler, and its loader: torch tells the sampler of neither."""
    found, loader, depth = None, None, 0
    while frame is not None and (depth := depth + 1) <= _DEPTH:
        host = frame.f_locals.get("self")
        if found is None and isinstance(host, _BaseDataLoaderIter):
            around, asked = _unwrapped(host._index_sampler)
            if asked is not sampler:
                break
            found, loader = _Asker(host, around), frame.f_locals.get("loader")
        elif found is not None and _of_accelerate(host):
            found.add_host(host)
        frame = frame.f_back
    return found, loader


def _of_accelerate(host: Any) -> bool:
    return type(host).__module__.startswith("accelerate.")


def _unwrapped(sampler: Any) -> tuple[list[Any], R8BatchSampler | None]:
    """Return the samplers around an R8BatchSampler, the outermost first, and that one."""
    around = []
    while sampler is not None and not isinstance(sampler, R8BatchSampler):
        around.append(sampler)
        sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)
    return around, sampler
