"""Ranks that own the samples they train on: each draws its batches from its own shard, and knows only its samples.

Samples are numbered within the shard. With each report the ranks exchange sums, from which all get one verdict on the
mean loss of all of them; once an epoch quantiles of their losses, for the quartiles of the whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.checkpoint import CheckpointStore
from learnit_r8.checkpoint.manifest import MANIFEST
from learnit_r8.core.clock import Clock
from learnit_r8.core.rng import RandomStreams
from learnit_r8.errors import CheckpointError, ConfigError, ProtocolError
from learnit_r8.loop.losses import LIMIT, Reported
from learnit_r8.loop.ranks import Ranks, Word
from learnit_r8.samples.catalog import LossCatalog, Rows
from learnit_r8.samples.quartiles import QuadrantTable
from learnit_r8.types import Indices, Losses, Mask

Gather = Callable[[NDArray[Any]], NDArray[Any]]

_FOLDER = re.compile(r"shard-(\d{4,})-of-(\d{4,})")
_QUANTILES = 1024
_SKETCHED = 1 << 18
"""At most so many of a shard's losses are sorted for its quantiles; 64 shards then stand for 16 million."""


class ShardedCatalog(LossCatalog):
    """One shard's catalog, which answers for the whole data set where a mean is asked for.

    Args:
        num_samples: Size of the shard.
        all_gather: As for `R8Scheduler`.
    """

    def __init__(self, num_samples: int, all_gather: Gather) -> None:
        super().__init__(num_samples)
        self._gather = all_gather
        # Expected loss of the batch and of all samples, share of the samples that were seen: of all ranks.
        self._of_all = math.nan, math.nan, 0.0

    def sums(self, indices: Indices) -> list[float]:
        """Return what `agree` needs of each rank for its batch."""
        expected, size = super().look_up(indices).expected, float(len(indices))
        known = [0.0, 0.0] if math.isnan(expected) else [expected * size, size]
        return [*known, self._sum, float(self._num_seen), float(self.num_samples)]

    def agree(self, expected: float, known: float, total: float, seen: float, samples: float) -> None:
        """Take the sums over all ranks of what `sums` returned."""
        self._of_all = expected / known if known else math.nan, total / seen if seen else math.nan, seen / samples

    def look_up(self, indices: Indices) -> Rows:
        """Return the rows of this rank's batch, and the expected loss of the global one."""
        return super().look_up(indices)._replace(expected=self._of_all[0])

    def record(self, rows: Rows, losses: Losses, step: int, mean: float | None = None, *, once: bool = False) -> Losses:
        """Take this rank's losses; `mean` is that of all ranks."""
        return super().record(rows, losses, step)

    @property
    def mean_expected(self) -> float:
        """Mean of the expected loss over all ranks' samples that were seen."""
        return self._of_all[1]

    @property
    def share_seen(self) -> float:
        """Share of all ranks' samples that were seen."""
        return self._of_all[2]

    def refresh_quadrants(
        self, rng: np.random.Generator, excluded: Mask | None = None, edges: Losses | None = None
    ) -> QuadrantTable | None:
        """Set the quartile edges of the whole data set; see `LossCatalog.refresh_quadrants`."""
        losses = self._rows["estimate"][self._rows["uses"] > 0]
        if len(losses) > _SKETCHED:
            losses = losses[rng.integers(0, len(losses), _SKETCHED)]
        places = np.arange(_QUANTILES if len(losses) else 0) * len(losses) + len(losses) // 2
        everyone = np.sort(self._gather(np.sort(losses)[places // _QUANTILES].astype(np.float64)))
        if not len(everyone):
            return None
        quartiles = everyone[np.arange(1, 4) * len(everyone) // 4 - 1].astype(np.float32)
        return super().refresh_quadrants(rng, excluded, quartiles)

    def state_dict(self) -> dict[str, Any]:
        """As `LossCatalog.state_dict`, and what all ranks knew."""
        return {**super().state_dict(), "agreed": list(self._of_all)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        expected, mean, seen = state.get("agreed", self._of_all)  # not in states of older versions
        self._of_all = float(expected), float(mean), float(seen)


class Shards(Ranks):
    """Ranks with batches, and checkpoints, of their own.

    Args:
        rank, world_size, all_gather, clock, plan: As for `Ranks`; one rank needs no `all_gather`.
    """

    def __init__(self, rank: int, world_size: int, all_gather: Gather | None, clock: Clock, plan: str) -> None:
        self._every: Gather = all_gather or np.asarray
        super().__init__(rank, world_size, self._every, clock, plan)
        self.writes = self.exchanges = True
        self.writes_alone = False

    def new_catalog(self, num_samples: int) -> LossCatalog:
        """Return the catalog of this rank's samples. Shards of different sizes are refused."""
        sizes = self.everyone(num_samples).astype(int).tolist()
        if sizes != [num_samples] * self.world_size:
            raise ConfigError(f"num_samples is a shard's size, the same on all ranks: got {sizes}")
        self._catalog = ShardedCatalog(num_samples, self._every)
        return self._catalog

    def order(self, size: int, streams: RandomStreams, epoch: int, cursor: int) -> None:
        """Return None: all of the batch is this rank's own."""

    def of_plans(self, number: float) -> NDArray[np.float64]:
        """Return this number of every rank, each of which has a plan of its own."""
        return self.everyone(number)

    def gather(
        self, reported: Reported, indices: Indices, order: Indices | None, step: int, word: Word
    ) -> tuple[Reported, Word]:
        """Return the mean loss of all ranks' batches; see `Ranks.gather`."""
        size = len(indices)
        if reported.values is None and not word.skipped:
            raise ProtocolError("a sharded run needs one loss per sample: report the array, not its mean")
        own = np.full(size, reported.mean, np.float32) if reported.values is None else reported.values
        fine = own[np.abs(own) <= LIMIT]
        few = 0 < size - len(fine) <= max(1, size // 4)
        mine = [
            *(reported.mean * size, size, not reported.finite and not few, few),
            *(float(fine.sum(dtype=np.float64)), len(fine), *self._catalog.sums(indices)),
        ]
        _, parts, word = self._exchange(np.array(mine), len(mine), b"", step, word)
        total, count, broken, bad, rest, left, *sums = np.sum(parts, axis=0).tolist()
        self._catalog.agree(*sums)
        others = rest / left if bad and not broken and left else math.nan
        return Reported(None, total / count, not (bad or broken), own, others), word


def shard_folder(directory: Path, rank: int, world_size: int) -> Path:
    """Return a rank's folder in a run's `checkpoint_dir`, which may be given as a rank's folder."""
    directory = directory.parent if _FOLDER.fullmatch(directory.name) else directory
    return directory / f"shard-{rank:04d}-of-{world_size:04d}"


def common_checkpoint(directory: Path, rank: int, world_size: int, all_gather: Gather | None) -> Path:
    """Return this rank's newest checkpoint of a step that all ranks have a whole checkpoint of.

    All ranks must call it, with the run's `checkpoint_dir` or one checkpoint of this rank. After a crash between their
    saves, the newest ones may be of different steps.
    """

    def every(*numbers: float) -> NDArray[np.int64]:
        return np.asarray((all_gather or np.asarray)(np.array(numbers, np.float64))).astype(np.int64)

    worlds = {int(found[2]) for entry in directory.glob("shard-*") if (found := _FOLDER.fullmatch(entry.name))}
    strange = every(max(worlds - {world_size}, default=0)).max()
    if not every(world_size in worlds).any() and strange:
        raise CheckpointError(
            f"the checkpoints in {directory} are of {strange} shards, this run has {world_size}: resume it "
            "on as many ranks, each with its shard"
        )
    if not worlds and (directory / MANIFEST).is_file():
        return directory
    mine = shard_folder(directory, rank, world_size)
    store = CheckpointStore(mine if mine.is_dir() or worlds else directory)
    held: dict[int, Path] = {}  # by step, the one saved last: after a rollback a higher step may be an abandoned past
    for entry in store.of_last_run():
        if entry.manifest is not None:
            held.setdefault(entry.manifest.step, entry.path)
    sizes, steps = every(len(held)), every(*held)
    if not len(steps):
        raise FileNotFoundError(f"no checkpoint in {directory} on any of {world_size} ranks")
    by_rank = [part.tolist() for part in np.split(steps, np.cumsum(sizes)[:-1])]
    for step in by_rank[0]:
        if not all(step in each for each in by_rank):
            continue
        whole = True
        try:
            store.load(held[step])
        except CheckpointError:
            whole = False
        if every(whole).all():
            return held[step]
    newest = "; ".join(f"rank {number}: {each or 'none'}" for number, each in enumerate(by_rank))
    raise CheckpointError(f"the ranks have no whole checkpoint of one step in {directory}; steps of {newest}")
