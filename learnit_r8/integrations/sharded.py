"""Data sets beyond one machine's memory: every rank owns a shard, and what it knows of its samples stays there.

    scheduler = ShardedScheduler(len(my_shard), batch_size_of_a_rank, num_epochs=3, **rank_arguments())

Sample ids are those of the rank's own shard. What R8Scheduler derives from the whole data set comes
from sums: with each report the ranks exchange 19 numbers, from which all get the same verdict on
the global mean loss, and so the same rollbacks and learning rates. Once an epoch they exchange
1,024 quantiles of their losses, whose union gives the quartile edges of the whole (within 0.1% of
the samples). Every batch is balanced over these quartiles as far as the shard has samples in them.

Differences from a replicated plan: samples never change their rank, the shards have to be of one
size, a run is resumed on the same number of ranks (another one is refused), losses are reported per
sample but judged by their mean over all ranks, every rank writes its own checkpoints (into a folder
of its own in `checkpoint_dir`), and ties at a quartile edge are not split.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from numpy.typing import NDArray

from learnit_r8.scheduler import R8Scheduler

__all__ = ["ShardedScheduler"]


class ShardedScheduler(R8Scheduler):
    """`R8Scheduler(sharded=True)` over one rank's shard, in step with the other ranks.

    Args:
        num_samples: Size of this rank's shard, the same on all ranks.
        batch_size: Samples a step of this rank.
        rank: From 0.
        world_size: Number of ranks.
        all_gather: See `learnit_r8.integrations.distributed`.
        **options: As for `R8Scheduler`. Each rank draws its own random numbers from the one `seed`, and saves into its
            own folder in `checkpoint_dir`.

    Raises:
        ConfigError: Bad arguments, or shards of different sizes.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        rank: int,
        world_size: int,
        all_gather: Callable[[NDArray[Any]], NDArray[Any]] | None,
        **options: Any,
    ) -> None:
        ranks = {"rank": rank, "world_size": world_size, "all_gather": all_gather}
        super().__init__(num_samples, batch_size, **(options | ranks | {"sharded": True}))

    @classmethod
    def resume_from_checkpoint(
        cls,
        checkpoint_path: str | Path | None = None,
        save_callback: Callable[..., Any] | None = None,
        load_callback: Callable[..., Any] | None = None,
        *,
        path: str | Path | None = None,
        **new_goals: Any,
    ) -> Self:
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
        return super().resume_from_checkpoint(
            checkpoint_path, save_callback, load_callback, path=path, **(new_goals | {"sharded": True})
        )
