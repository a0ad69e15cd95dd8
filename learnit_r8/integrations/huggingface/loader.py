"""What a Hugging Face Trainer draws its batches from, and how many of them make its epoch.

The Trainer fixes once how many micro-batches an epoch has. Here the sampler decides: an epoch is as long as it draws,
and the micro-batches of an optimizer step end where the Trainer's list of them does.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_utils import seed_worker


class EpochLength(int):
    """Number of micro-batches that a Trainer expects in an epoch; equals the one after which it is to step.

    The Trainer steps after `gradient_accumulation_steps` micro-batches, or where their number `== steps_in_epoch`.
    """

    end = -1  # number of the last micro-batch of the present optimizer step, from 1

    def __eq__(self, other: object) -> bool:
        return bool(other == self.end)

    __hash__ = int.__hash__


class Repeated(Sampler[list[int]]):
    """A batch sampler each of whose batches comes `batches` times, with each of its ids `ids` times in it.

    So a prompt stands there once for each of its completions, and comes once for each part that is trained on.
    """

    def __init__(self, sampler: Sampler[list[int]], ids: int = 1, batches: int = 1) -> None:
        self.sampler, self._ids, self._batches = sampler, ids, batches

    def __len__(self) -> int:
        return len(self.sampler) * self._batches  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.sampler:
            rows = batch if self._ids == 1 else [index for index in batch for _ in range(self._ids)]
            for _ in range(self._batches):
                yield rows


class EpochLoader(DataLoader[Any]):
    """A DataLoader whose new iterator leaves torch's random numbers alone where it goes on with an epoch.

    So a resumed run has the random numbers of the uninterrupted one, whose iterator drew its seed when the epoch began.
    """

    trainer: Any

    def __iter__(self) -> Any:
        if self.trainer._over():  # the Trainer asks also where a finished run was resumed
            return iter(())
        if not self.trainer._goes_on():
            return super().__iter__()
        state = torch.get_rng_state()
        iterator = super().__iter__()
        torch.set_rng_state(state)
        return iterator


def make_loader(trainer: Any, sampler: Sampler[list[int]]) -> EpochLoader:
    """Return a loader as the trainer's own, for a batch sampler; one prepared by Accelerate would cut batches anew."""
    args, dataset, collate = trainer.args, trainer.train_dataset, trainer.data_collator
    if dataset is None:
        raise ValueError("Trainer: training requires a train_dataset.")
    if type(dataset).__module__.startswith("datasets."):
        dataset = trainer._remove_unused_columns(dataset, description="training")
    else:
        collate = trainer._get_collator_with_removed_columns(collate, description="training")
    loader = EpochLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory and torch.accelerator.is_available(),
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        generator=torch.default_generator,  # as without one: what is drawn for an epoch's workers is drawn from it
        multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),
        worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
    )
    loader.trainer = trainer
    return loader
