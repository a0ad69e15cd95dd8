"""What a Hugging Face Trainer was asked for that someone else's batches would silently undo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from learnit_r8.strategies import TokenBudget

_LOADERS = ("get_train_dataloader", "_get_train_sampler", "_get_dataloader")
GROUPED = ("GRPOTrainer", "RLOOTrainer")
"""TRL's trainers whose loader repeats prompts; that is done for them here."""
_KNOWN = (*GROUPED, "KTOTrainer")  # KTO's sampler is the Trainer's where no fixed order is needed


def is_grouped(trainer: Any) -> bool:
    """Whether a trainer scores groups of completions of one prompt."""
    return any(cls.__name__ in GROUPED and cls.__module__.startswith("trl.trainer.") for cls in type(trainer).__mro__)


def default_of(args: Any, name: str) -> Any:
    """Return the default of a training argument, in the class that was used."""
    field = getattr(type(args), "__dataclass_fields__", {}).get(name)
    return None if field is None else field.default


def share_of(args: Any, kind: str) -> bool:
    """Whether logging, evaluation or saving (`kind`) comes at a share of the run's steps."""
    steps = getattr(args, f"{kind}_steps")
    return steps is not None and steps < 1 and getattr(args, f"{kind}_strategy") == "steps"  # an enumeration of str


def host_problems(trainer: Any, mixin: type, sample_loss_func: Any) -> list[str]:
    """Return what a trainer does or was told that does not go with the batches of someone who replaces its loader."""
    args = trainer.args
    problems = _own_loaders(type(trainer), mixin)
    if args.auto_find_batch_size:
        problems.append("auto_find_batch_size=True: the batch size is the scheduler's (or sampler's), leave it out")
    strategy = getattr(args, "train_sampling_strategy", "random")
    if getattr(trainer, "calculate_KL", False):
        problems.append(
            "this KTO loss pairs each sample with its neighbours in a fixed order, which no chosen batch keeps: use "
            "loss_type='apo_zero_unpaired'"
        )
    elif strategy not in ("random", default_of(args, "train_sampling_strategy")):
        problems += _order_problems(trainer, strategy)
    if getattr(args, "data_seed", None) is not None:
        problems.append(f"data_seed={args.data_seed}: the order follows from the seed of the scheduler (or sampler)")
    if not getattr(args, "dataloader_in_order", True):
        problems.append("dataloader_in_order=False: losses would reach the wrong samples")
    if sample_loss_func is not None and trainer.compute_loss_func is not None:
        problems.append("sample_loss_func and compute_loss_func: both say what to train on, give one")
    if sample_loss_func is not None and trainer.label_smoother is not None:
        problems.append("sample_loss_func and label_smoothing_factor: the function says what to train on, give one")
    return problems + data_problems(trainer.train_dataset)


def _order_problems(trainer: Any, strategy: str) -> list[str]:
    """Return what is wrong with an order that was asked for; that of a TokenBudget has batches of one length."""
    chosen = getattr(getattr(trainer, "scheduler", None), "strategy", None)
    said = f"train_sampling_strategy={strategy!r}: the samples are chosen by the scheduler (or sampler)"
    if strategy != "group_by_length":
        return [said]
    if isinstance(getattr(chosen, "wrapped", chosen), TokenBudget):
        return []
    return [
        f"{said}; batches of nearly one length are those of R8Scheduler(strategy=TokenBudget(lengths, max_tokens)), "
        "with lengths = [len(row['input_ids']) for row in train_dataset]"
    ]


def _own_loaders(cls: type, mixin: type) -> list[str]:
    """Return which loaders or samplers, below the mixin and above the Trainer, would be replaced."""
    order: Sequence[type] = cls.__mro__[cls.__mro__.index(mixin) + 1 :]
    return [
        f"{part.__name__}.{name} is its own, and R8 would replace it: this trainer cannot take its batches from R8"
        for part in order
        for name in _LOADERS
        if name in vars(part)
        and not part.__module__.startswith("transformers.")
        and not (part.__name__ in _KNOWN and part.__module__.startswith("trl."))
    ]


def data_problems(dataset: Any) -> list[str]:
    """Return what keeps samples of a data set from being chosen; None has no problems."""
    if dataset is None:
        return []
    iterable = isinstance(dataset, torch.utils.data.IterableDataset) or type(dataset).__name__ == "IterableDataset"
    if iterable or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return [f"train_dataset must have a length and be indexable, got {type(dataset).__name__}"]
    return []
