"""Data sets beyond one machine's memory: every rank owns a shard, and what it knows of its samples stays there.

    scheduler = ShardedScheduler(len(my_shard), batch_size_of_a_rank, num_epochs=3, **rank_arguments())

Sample ids are those of the rank's own shard. With each report the ranks exchange 19 numbers, from which all get one
verdict on the global mean loss; once an epoch 1,024 quantiles of their losses, whose union gives the quartile edges of
the whole (within 0.1% of the samples). Samples never change their rank, the shards are of one size, losses are reported
per sample, every rank writes its own checkpoints, and another number of ranks cannot resume them.
"""

from __future__ import annotations

from typing import Any, Self

from learnit_r8.scheduler import R8Scheduler

__all__ = ["ShardedScheduler"]


class ShardedScheduler(R8Scheduler):
    """`R8Scheduler(sharded=True)` over one rank's shard, in step with the other ranks.

    Args:
        num_samples: Size of this rank's shard, the same on all ranks.
        batch_size: Samples a step of this rank.
        rank, world_size, all_gather: See `learnit_r8.integrations.distributed`.
        **options: As for `R8Scheduler`. Each rank draws its own random numbers from the one `seed`, and saves into its
            own folder in `checkpoint_dir`.

    Raises:
        ConfigError: Bad arguments, or shards of different sizes.
    """

    def __init__(
        self, num_samples: int, batch_size: int, *, rank: int, world_size: int, all_gather: Any, **options: Any
    ) -> None:
        options |= {"rank": rank, "world_size": world_size, "all_gather": all_gather, "sharded": True}
        super().__init__(num_samples, batch_size, **options)

    @classmethod
    def resume_from_checkpoint(cls, *arguments: Any, **new_goals: Any) -> Self:
        """As `R8Scheduler.resume_from_checkpoint`; give `rank`, `world_size` and `all_gather` again.

        Args:
            *arguments: As there; of the run's `checkpoint_dir`, all ranks go on from the newest step that each has
                whole.
            **new_goals: As there.

        Raises:
            FileNotFoundError: No rank has a checkpoint.
            CheckpointError: The ranks have none of one step, or it was saved by another number of ranks.
        """
        return super().resume_from_checkpoint(*arguments, **(new_goals | {"sharded": True}))
