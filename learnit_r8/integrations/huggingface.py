"""R8Scheduler in the Hugging Face Trainer: three changed lines.

    from learnit_r8.integrations.huggingface import R8Trainer
    scheduler = R8Scheduler(len(data), batch_size=16, num_epochs=3, initial_lr=5e-5)
    trainer = R8Trainer(model, args, train_dataset=data, scheduler=scheduler)

The scheduler's batches are the Trainer's micro-batches; with gradient accumulation each of them
is reported, after the optimizer step that they share. The learning rate (effective and logged) is
the scheduler's. Its state is part of the Trainer's checkpoints, in `scheduler.pt`, so that
`resume_from_checkpoint` resumes both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Sampler
from transformers import Trainer

from learnit_r8.errors import ConfigError, ProtocolError
from learnit_r8.integrations._learning_rate import LearningRateHook, follow_lr, scales, unwrapped
from learnit_r8.integrations._sampler import R8BatchSampler
from learnit_r8.integrations._state import arrays_from_tensors, capture_state, restore_state, tensors_from_arrays
from learnit_r8.integrations._trainer_losses import SampleLossMixin
from learnit_r8.scheduler import R8Scheduler

__all__ = ["R8Mixin", "R8Trainer", "SRSTrainer", "SampleLossMixin"]

ENDLESS = 1_000_000
"""Epochs that the Trainer is told of when the budget is seconds; the scheduler ends the run."""
SAMPLER_STATE = "r8_sampler.pt"


class _SchedulerRates(LRScheduler):
    """What the Trainer takes for its learning-rate scheduler: says the rate, and carries the run's state.

    The rate itself is set by `follow_lr`, right before each step. (LRScheduler's own constructor
    would set it too.)
    """

    def __init__(self, scheduler: R8Scheduler, optimizer: Any) -> None:
        self.optimizer = unwrapped(optimizer)
        self._scheduler = scheduler
        self._hook: LearningRateHook = follow_lr(scheduler, optimizer)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the rate follows the batches."""

    def get_last_lr(self) -> list[float]:  # type: ignore[override]
        """Return the learning rate of the last optimizer step, for each parameter group."""
        return [self._hook.lr * scale for scale in scales(self.optimizer)]

    def state_dict(self) -> dict[str, Any]:
        """Return the R8Scheduler's state as tensors."""
        state: dict[str, Any] = tensors_from_arrays(self._scheduler.state_dict())
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the R8Scheduler."""
        self._scheduler.load_state_dict(arrays_from_tensors(state_dict))

    def close(self) -> None:
        """Leave the optimizer alone."""
        self._hook.remove()


class R8Mixin(SampleLossMixin):
    """Makes a Trainer of your own an R8Trainer: `class Mine(R8Mixin, MyTrainer)`.

    Args:
        scheduler: Chooses the samples and the learning rate. Its `batch_size` and `num_epochs`
            replace `per_device_train_batch_size` and `num_train_epochs`, its `initial_lr` and
            `scheduler_mode` the Trainer's learning rate. Without callbacks of its own it backs up
            and restores the model, the optimizer and the random generators.
        sample_loss_func: See `SampleLossMixin`.

    Raises:
        ConfigError: Arguments that do not go together; all are listed.
    """

    def __init__(self, *args: Any, scheduler: R8Scheduler, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scheduler = scheduler
        self._epochs: Iterator[int] = iter(())
        self._rates: _SchedulerRates | None = None
        self._check()
        steps = scheduler.total_steps
        self.args.num_train_epochs = ENDLESS if steps is None else steps // max(scheduler.steps_per_epoch, 1)
        self.args.per_device_train_batch_size = self._train_batch_size = scheduler.batch_size // scheduler.world_size
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):  # type: ignore[attr-defined]
            scheduler.attach_model(self._capture, self._restore)

    def _check(self) -> None:
        trainer: Any = self
        problems = []
        dataset, size = trainer.train_dataset, self.scheduler.catalog.num_samples
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            problems.append(f"train_dataset must have a length and be indexable, got {type(dataset).__name__}")
        elif len(dataset) != size:
            problems.append(f"train_dataset has {len(dataset)} samples, the scheduler num_samples={size}")
        if trainer.args.max_steps > 0:
            problems.append(f"max_steps={trainer.args.max_steps}: the scheduler's num_epochs says how long to train")
        if trainer.lr_scheduler is not None:
            problems.append("optimizers=(optimizer, lr_scheduler): the scheduler sets the learning rate, give None")
        if trainer.args.world_size != self.scheduler.world_size:
            problems.append(
                f"the Trainer runs on {trainer.args.world_size} processes, the scheduler has "
                f"world_size={self.scheduler.world_size}: create it after TrainingArguments, with "
                "**learnit_r8.integrations.distributed.rank_arguments()"
            )
        if problems:
            raise ConfigError(problems)

    def _batch_sampler(self) -> Sampler[list[int]]:
        return R8BatchSampler(self.scheduler, ahead=self.args.gradient_accumulation_steps - 1)

    def _weights(self, losses: Tensor) -> Tensor | None:
        weights = self.scheduler.importance_weights(len(self._pending))
        if weights is None:
            return None
        if len(weights) != len(losses):
            raise ProtocolError(f"the batch has {len(weights)} samples and {len(losses)} losses were computed")
        return torch.from_numpy(weights).to(losses.device)

    def _report(self, losses: Tensor, *, skipped: bool) -> None:
        self.scheduler.update_with_loss(losses, skipped=skipped)

    def _capture(self) -> dict[str, Any]:
        trainer: Any = self
        scaler = getattr(trainer.accelerator, "scaler", None)
        return capture_state(trainer.model, unwrapped(trainer.optimizer), scaler, copy=False)

    def _restore(self, state: dict[str, Any]) -> None:
        trainer: Any = self
        scaler = getattr(trainer.accelerator, "scaler", None)
        restore_state(state, trainer.model, unwrapped(trainer.optimizer), scaler)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        """Return what the Trainer takes for its learning-rate scheduler."""
        trainer: Any = self
        if self._rates is not None:
            self._rates.close()
        self._rates = _SchedulerRates(self.scheduler, optimizer or trainer.optimizer)
        trainer.lr_scheduler, trainer._created_lr_scheduler = self._rates, True
        return self._rates

    def _on_train_begin(self, control: Any) -> None:
        self._epochs = self.scheduler.epoch_iterator()
        self._on_epoch_end(control)

    def _on_epoch_end(self, control: Any) -> None:
        if next(self._epochs, None) is None:
            control.should_training_stop = True

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if hasattr(self._epochs, "close"):
                self._epochs.close()  # signal handlers are put back, also after an exception


class R8Trainer(R8Mixin, Trainer):
    """`transformers.Trainer` with an R8Scheduler; see `R8Mixin` for the arguments."""


class SRSTrainer(SampleLossMixin, Trainer):
    """`transformers.Trainer` that draws its batches from a `SpacedRepetitionSampler`.

    All else is the Trainer's: learning rate, number of epochs (passes over the sampler). The
    sampler's state is saved beside the Trainer's, and resumed with it.

    Args:
        train_sampler: `learnit_r8.strategies.SpacedRepetitionSampler`, or any batch sampler with
            `update_difficulties(loss)`, `state_dict` and `load_state_dict`.
        sample_loss_func: See `SampleLossMixin`.

    Raises:
        ConfigError: Several processes, or something else than such a sampler.
    """

    def __init__(self, *args: Any, train_sampler: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        problems = []
        if not hasattr(train_sampler, "update_difficulties"):
            problems.append(f"train_sampler must have update_difficulties(loss), got {type(train_sampler).__name__}")
        if self.args.world_size > 1:
            problems.append(f"SRSTrainer runs on one process, got {self.args.world_size}: use R8Trainer with 'spaced'")
        if problems:
            raise ConfigError(problems)
        self.train_sampler = train_sampler
        self.args.per_device_train_batch_size = self._train_batch_size = train_sampler.batch_size

    def _batch_sampler(self) -> Any:
        return self.train_sampler

    def _report(self, losses: Tensor, *, skipped: bool) -> None:
        self.train_sampler.update_difficulties(losses)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = tensors_from_arrays(self.train_sampler.state_dict())
        torch.save(state, os.path.join(output_dir, SAMPLER_STATE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        path = os.path.join(checkpoint or "", SAMPLER_STATE)
        if checkpoint is not None and os.path.exists(path):
            self.train_sampler.load_state_dict(arrays_from_tensors(torch.load(path, weights_only=True)))
