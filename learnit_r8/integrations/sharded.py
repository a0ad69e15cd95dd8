"""Data sets beyond one machine's memory: every rank owns a shard, and what it knows of its samples stays there.

    scheduler = ShardedScheduler(len(my_shard), batch_size_of_a_rank, num_epochs=3, **rank_arguments())

Sample ids are those of the rank's own shard. What R8Scheduler derives from the whole data set comes
from sums: with each report the ranks exchange 11 numbers, from which all get the same verdict on
the global mean loss, and so the same rollbacks and learning rates. Once an epoch they exchange
1,024 quantiles of their losses, whose union gives the quartile edges of the whole (within 0.1% of
the samples). Every batch is balanced over these quartiles as far as the shard has samples in them.

Differences from a replicated plan: samples never change their rank, the shards have to be of one
size, a run is resumed on the same number of ranks (another one is refused), losses are reported per
sample but judged by their mean over all ranks, every rank writes its own checkpoints (into a folder
of its own in `checkpoint_dir`), and ties at a quartile edge are not split.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.checkpoint import CheckpointStore
from learnit_r8.checkpoint.manifest import MANIFEST
from learnit_r8.core.config import Checkpoints
from learnit_r8.core.rng import RandomStreams
from learnit_r8.core.urls import url_of
from learnit_r8.errors import CheckpointError, ConfigError, ProtocolError
from learnit_r8.loop.arguments import Arguments
from learnit_r8.loop.in_flight import Ticket
from learnit_r8.loop.losses import Reported
from learnit_r8.loop.ranks import Ranks
from learnit_r8.samples.catalog import LossCatalog, Rows
from learnit_r8.samples.quartiles import QuadrantTable
from learnit_r8.scheduler import R8Scheduler, one_of
from learnit_r8.types import Indices, Losses, Mask

__all__ = ["ShardedScheduler"]

Gather = Callable[[NDArray[Any]], NDArray[Any]]

_FOLDER = re.compile(r"shard-(\d{4,})-of-(\d{4,})")

QUANTILES = 1024
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
        self._expected = math.nan
        self._mean = math.nan
        self._complete = False

    def sums(self, rows: Rows) -> tuple[float, float, float]:
        """Return (expected loss of a batch's samples, sum over the shard, samples seen); 0 while unknown."""
        expected = 0.0 if math.isnan(rows.expected) else rows.expected * len(rows.indices)
        return expected, self._sum, float(self._num_seen)

    def agree(self, expected: float, mean: float, *, complete: bool) -> None:
        """Take what all ranks have found together."""
        self._expected, self._mean, self._complete = expected, mean, complete

    def look_up(self, indices: Indices) -> Rows:
        """Return the rows of this rank's batch, and the expected loss of the global one."""
        return super().look_up(indices)._replace(expected=self._expected)

    def record(self, rows: Rows, losses: Losses, step: int, mean: float | None = None, *, once: bool = False) -> Losses:
        """Take this rank's losses; `mean`, which is that of all ranks, is no help here."""
        return super().record(rows, losses, step)

    def look_up_here(self, indices: Indices) -> Rows:
        """Return the rows of this rank's batch, and its own expected loss."""
        return super().look_up(indices)

    @property
    def mean_expected(self) -> float:
        """Mean of the expected loss over all ranks' samples that were seen."""
        return self._mean

    @property
    def num_seen(self) -> int:
        """Number of this shard's samples with a report; one less while another shard is not complete."""
        return min(self._num_seen, self.num_samples - (not self._complete))

    def refresh_quadrants(
        self, rng: np.random.Generator, excluded: Mask | None = None, edges: Losses | None = None
    ) -> QuadrantTable | None:
        """Set the quartile edges of the whole data set; see `LossCatalog.refresh_quadrants`."""
        losses = self._rows["estimate"][self._rows["uses"] > 0]
        if len(losses) > _SKETCHED:
            losses = losses[rng.integers(0, len(losses), _SKETCHED)]
        mine = np.empty(0)
        if len(losses):
            losses = np.sort(losses)
            mine = losses[(np.arange(QUANTILES) * len(losses) + len(losses) // 2) // QUANTILES].astype(np.float64)
        everyone = np.sort(np.asarray(self._gather(mine), np.float64))
        if not len(everyone):
            return None
        quartiles = everyone[np.arange(1, 4) * len(everyone) // 4 - 1].astype(np.float32)
        return super().refresh_quadrants(rng, excluded, quartiles)


class ShardedRanks(Ranks):
    """Ranks with batches, and checkpoints, of their own.

    Args:
        rank: Number of this process.
        world_size: Number of processes.
        all_gather: As for `R8Scheduler`.
        args: The scheduler's arguments.
    """

    def __init__(self, rank: int, world_size: int, all_gather: Gather, args: Arguments) -> None:
        plan = f"{args.config.num_samples} {args.config.batch_size} {args.config.strategy}"
        super().__init__(rank, world_size, all_gather, args.clock, plan)
        self.writes = self.exchanges = True
        self.writes_alone = False
        if args.save is not None and args.save.collective:
            raise ConfigError(
                [
                    "a collective save_callback is for one checkpoint of all ranks, here every rank writes its own: "
                    "save this rank's part of the model, torch.save(capture_state(model, optimizer), path)"
                ]
            )

    def order(self, size: int, streams: RandomStreams, epoch: int, cursor: int) -> None:
        """Return None: all of the batch is this rank's own."""


class ShardedScheduler(R8Scheduler):
    """`R8Scheduler` over one rank's shard, in step with the other ranks.

    Args:
        num_samples: Size of this rank's shard, the same on all ranks.
        batch_size: Samples a step of this rank.
        rank: From 0.
        world_size: Number of ranks.
        all_gather: See `learnit_r8.integrations.distributed`.
        seed: The same on all ranks; each draws its own random numbers.
        **options: As for `R8Scheduler`. Each rank saves into its own folder in `checkpoint_dir`.

    Raises:
        ConfigError: Bad arguments, or shards of different sizes.
    """

    _catalog: ShardedCatalog
    _values: Losses | None = None  # of this rank's last report

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        rank: int,
        world_size: int,
        all_gather: Gather | None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self._shard = (rank, world_size, all_gather or np.asarray)
        if isinstance(seed, int):
            seed = seed % (1 << 64) | (rank + 1) << 64  # the same again where a checkpoint's seed is given
        policy = options.get("checkpoints")
        folder = policy.dir if isinstance(policy, Checkpoints) else options.get("checkpoint_dir", "./checkpoints")
        if isinstance(folder, (str, Path)) and url_of(folder):
            raise ConfigError([f"checkpoint_dir must be a folder that all ranks see, got the URL {str(folder)!r}"])
        if isinstance(folder, (str, Path)) and str(folder).strip():
            folder = Path(folder)
            folder = folder.parent if _FOLDER.fullmatch(folder.name) else folder  # of a checkpoint's configuration
            folder /= _folder(rank, world_size)
            if isinstance(policy, Checkpoints):
                options["checkpoints"] = dataclasses.replace(policy, dir=folder)
            else:
                options["checkpoint_dir"] = folder
        super().__init__(num_samples, batch_size, seed=seed, **options)
        sizes = np.asarray(self._shard[2](np.array([num_samples, batch_size], np.float64))).reshape(-1, 2)
        if len(sizes) != world_size or (sizes != sizes[0]).any():
            raise ConfigError(
                [f"shards and batches must be of one size on all ranks, got {sizes.astype(int).tolist()}"]
            )

    @classmethod
    def resume_from_checkpoint(
        cls,
        checkpoint_path: str | Path | None = None,
        save_callback: Callable[..., Any] | None = None,
        load_callback: Callable[..., Any] | None = None,
        *,
        path: str | Path | None = None,
        **new_goals: Any,
    ) -> ShardedScheduler:
        """As `R8Scheduler.resume_from_checkpoint`; give `rank`, `world_size` and `all_gather` again.

        Args:
            checkpoint_path: The run's `checkpoint_dir`: all ranks go on from the newest step that each has whole.
            save_callback: As there.
            load_callback: As there.
            path: Another name for `checkpoint_path`.
            **new_goals: As there.

        Raises:
            FileNotFoundError: No rank has a checkpoint.
            CheckpointError: The ranks have none of one step, or it was saved by another number of ranks.
        """
        rank, world = new_goals["rank"], new_goals["world_size"]
        directory = Path(one_of("resume_from_checkpoint", checkpoint_path=checkpoint_path, path=path))
        mine = common_checkpoint(directory, rank, world, new_goals["all_gather"] or np.asarray)
        return super().resume_from_checkpoint(mine, save_callback, load_callback, **new_goals)

    @property
    def batch_size(self) -> int:
        """Samples in a full batch of all ranks."""
        return self._config.batch_size * self._shard[1]

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._shard[1]

    def _make_ranks(self, args: Arguments) -> Ranks:
        return ShardedRanks(*self._shard, args)

    def _make_catalog(self, num_samples: int) -> LossCatalog:
        return ShardedCatalog(num_samples, self._shard[2])

    def _gather(self, reported: Reported, ticket: Ticket) -> Reported:
        if reported.values is None:
            raise ProtocolError("a sharded run needs one loss per sample: report the array, not its mean")
        rows = self._catalog.look_up_here(ticket.indices)
        size = len(ticket.indices)
        mine = np.array([reported.mean * size, size, not reported.finite, *self._catalog.sums(rows)])
        _, everyone = self._ranks.exchange(
            mine, len(mine), b"", self._progress.global_step, self._control.interrupts.pending
        )
        self._control.heed_ranks()
        total, count, bad, expected, known, seen = everyone.reshape(-1, len(mine)).sum(axis=0)
        complete = bool((everyone.reshape(-1, len(mine))[:, 5] == self._catalog.num_samples).all())
        self._catalog.agree(expected / count, known / seen if seen else math.nan, complete=complete)
        # The values of one shard must not decide: all ranks have to come to one verdict.
        self._values = reported.values
        return Reported(None, float(total / count), not bad)

    def _record(self, ticket: Ticket, rows: Rows, reported: Reported) -> None:
        super()._record(ticket, rows, reported._replace(values=self._values))

    def state_dict(self) -> dict[str, Any]:
        """As `R8Scheduler.state_dict`, of this rank's shard."""
        return {**super().state_dict(), "shard": list(self._shard[:2])}

    def _start_epoch(self) -> None:
        super()._start_epoch()
        self._agree_on_batches()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As `R8Scheduler.load_state_dict`, on all ranks together."""
        mine, saved = list(self._shard[:2]), list(state.get("shard", self._shard[:2]))
        if mine != saved:
            raise ConfigError(
                [
                    f"the state is that of shard {saved[0]} of {saved[1]}, this is shard {mine[0]} of {mine[1]}: each "
                    "rank loads what it saved, on as many ranks as there were"
                ]
            )
        super().load_state_dict(state)
        self._agree_on_batches()

    def _agree_on_batches(self) -> None:
        # Samples in quarantine, or left out by a strategy, differ by shard; the number of steps must not.
        batches = np.asarray(self._shard[2](np.array([self._chooser.batches], np.float64)))
        self._chooser.batches, self._chooser.fixed = int(batches.min()), True


def _folder(rank: int, world_size: int) -> str:
    return f"shard-{rank:04d}-of-{world_size:04d}"


def common_checkpoint(directory: Path, rank: int, world_size: int, gather: Gather) -> Path:
    """Return this rank's newest checkpoint of a step that all ranks have a whole checkpoint of.

    All ranks must call it. After a crash between their saves, the newest ones may be of different steps.

    Args:
        directory: The run's `checkpoint_dir`, or one checkpoint of this rank.
        rank: Of this process.
        world_size: Number of processes.
        gather: As for `R8Scheduler`.

    Raises:
        FileNotFoundError: No rank has a checkpoint.
        CheckpointError: There is none that all have.
    """
    worlds = {int(found[2]) for entry in directory.glob("shard-*") if (found := _FOLDER.fullmatch(entry.name))}
    others = worlds - {world_size}
    strange = np.asarray(gather(np.array([max(others, default=0)], np.float64)))
    if strange.any() and world_size not in worlds:
        raise CheckpointError(
            f"the checkpoints in {directory} are of {int(strange.max())} shards, this run has {world_size}: resume it "
            "on as many ranks, each with its shard"
        )
    mine = directory / _folder(rank, world_size)
    store = CheckpointStore(mine if mine.is_dir() or worlds else directory)
    if not worlds and (directory / MANIFEST).is_file():
        return directory
    held: dict[int, Path] = {}  # by step, the one saved last
    for entry in store.of_last_run():
        if entry.manifest is not None:
            held.setdefault(entry.manifest.step, entry.path)
    sizes = np.asarray(gather(np.array([len(held)], np.float64))).astype(int)
    steps = np.asarray(gather(np.array(list(held), np.float64))).astype(int)
    by_rank = np.split(steps, np.cumsum(sizes)[:-1])
    if not len(steps):
        raise FileNotFoundError(f"no checkpoint in {directory} on any of {world_size} ranks")
    for step in by_rank[0].tolist():
        if not all(step in each for each in by_rank):
            continue
        whole = True
        try:
            store.load(held[step])
        except CheckpointError:
            whole = False
        if np.asarray(gather(np.array([whole], np.float64))).all():
            return held[step]
    newest = [f"rank {number}: {each.tolist() or 'none'}" for number, each in enumerate(by_rank)]
    raise CheckpointError(
        f"the ranks have no whole checkpoint of one step in {directory}; steps of {'; '.join(newest)}"
    )
