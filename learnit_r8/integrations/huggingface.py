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

import copy
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import seed_worker

from learnit_r8.errors import ConfigError, ProtocolError
from learnit_r8.integrations._learning_rate import LearningRateHook, follow_lr, scales, unwrapped
from learnit_r8.integrations._sample_losses import logits_of, loss_function
from learnit_r8.integrations._sampler import R8BatchSampler
from learnit_r8.integrations._state import arrays_from_tensors, capture_state, restore_state, tensors_from_arrays
from learnit_r8.scheduler import R8Scheduler

__all__ = ["R8Mixin", "R8Trainer", "SRSTrainer", "SampleLossMixin"]

ENDLESS = 1_000_000
"""Epochs that the Trainer is told of when the budget is seconds; the scheduler ends the run."""
SAMPLER_STATE = "r8_sampler.pt"


class SampleLossMixin:
    """Lets a Trainer compute one loss per sample and report each micro-batch after its optimizer step.

    For sequence classification and causal language models the losses come from the logits, once,
    and their sum is the model's own loss. For other models, with label smoothing and with a
    `compute_loss_func`, the mean of the micro-batch is reported: give `sample_loss_func`.

    Args:
        sample_loss_func: `(outputs, labels) -> losses [B]`, with grad.
    """

    def __init__(self, *args: Any, sample_loss_func: Callable[[Any, Any], Tensor] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        self._pending: list[Tensor] = []  # losses whose optimizer step is not done yet
        self._stepping = False
        self._resumed = False
        self._sample_loss_func = sample_loss_func
        plain = trainer.compute_loss_func is None and trainer.label_smoother is None
        self._head_losses = loss_function(trainer.model) if plain and trainer.model is not None else None
        if sample_loss_func is not None or self._head_losses is not None:
            trainer.compute_loss_func = self._compute_sample_losses
        self.args = copy.copy(trainer.args)  # some values follow from the sampler; the caller's object stays as it is
        trainer.add_callback(_Callback(self))

    # What subclasses define -----------------------------------------------------------------

    def _batch_sampler(self) -> Sampler[list[int]]:
        raise NotImplementedError

    def _report(self, losses: Tensor, *, skipped: bool) -> None:
        raise NotImplementedError

    def _weights(self, losses: Tensor) -> Tensor | None:
        """Return importance weights for the micro-batch that is being trained on."""
        return None

    def _on_train_begin(self, control: Any) -> None:
        pass

    def _on_epoch_end(self, control: Any) -> None:
        pass

    # What the Trainer calls -----------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return a plain loader: one prepared by Accelerate would cut the batches anew.

        Raises:
            ValueError: There is no `train_dataset`.
        """
        trainer: Any = self
        args, dataset, collate = trainer.args, trainer.train_dataset, trainer.data_collator
        if dataset is None:
            raise ValueError("Trainer: training requires a train_dataset.")
        if type(dataset).__module__.startswith("datasets."):
            dataset = trainer._remove_unused_columns(dataset, description="training")
        else:
            collate = trainer._get_collator_with_removed_columns(collate, description="training")
        self._sampler = _Skipping(self._batch_sampler())
        return DataLoader(
            dataset,
            batch_sampler=self._sampler,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.accelerator.is_available(),
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
        )

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`."""
        self._resumed = bool(resume_from_checkpoint)
        self._pending.clear()
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `Trainer.training_step`; takes note of the losses."""
        known = len(self._pending)
        self._stepping = True
        try:
            loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._stepping = False
        if len(self._pending) == known:
            steps = self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
            self._pending.append(loss.detach() * steps)
        return loss

    def _compute_sample_losses(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        """Return the loss to train on, as `compute_loss_func` does; the Trainer does not scale it any more."""
        trainer: Any = self
        steps = trainer.current_gradient_accumulation_steps if self._stepping else 1
        if self._sample_loss_func is not None:
            values = self._sample_loss_func(outputs, labels)
            return self._weighted(values, values.detach()).mean() / steps
        if labels is None or self._head_losses is None:
            raise ProtocolError(
                "the batch has no labels, so no loss per sample can be computed: let the data collator give "
                "'labels', or give the trainer a sample_loss_func(outputs, labels)"
            )
        config = trainer.model.config
        losses = self._head_losses(logits_of(outputs), labels, config)
        total = self._weighted(losses.sums, losses.means).sum()
        items = losses.items.sum() if num_items_in_batch is None else num_items_in_batch
        loss: Tensor = total / (items if torch.is_tensor(items) else max(items, 1))
        auxiliary = outputs.get("aux_loss") if isinstance(outputs, dict) else None
        if auxiliary is not None:  # mixture-of-experts models add it where they compute the loss themselves
            loss = loss + config.router_aux_loss_coef * auxiliary / steps
        return loss

    def _weighted(self, losses: Tensor, reported: Tensor) -> Tensor:
        """Return the losses times their importance weights, and keep what is to be reported."""
        if not self._stepping:
            return losses
        weights = self._weights(losses)
        self._pending.append(reported)
        return losses if weights is None else losses * weights

    def _report_pending(self) -> None:
        skipped = bool(self.accelerator.optimizer_step_was_skipped)  # type: ignore[attr-defined]
        pending, self._pending = self._pending, []
        for losses in pending:
            self._report(losses, skipped=skipped)


class _Callback(TrainerCallback):
    """Carries the Trainer's events to the trainer's own methods."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._on_train_begin(control)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        if trainer._resumed and not args.ignore_data_skip:
            # The Trainer skips what was trained on before it was stopped; the sampler is past that already.
            updates = -(-len(trainer._sampler) // args.gradient_accumulation_steps)
            trainer._sampler.skip = state.global_step % max(updates, 1) * args.gradient_accumulation_steps
        trainer._resumed = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._report_pending()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._report_pending()  # an epoch that was cut short may end within an accumulation
        if not control.should_training_stop or state.global_step >= state.max_steps:
            self._trainer._on_epoch_end(control)


class _Skipping(Sampler[list[int]]):
    """A batch sampler with placeholders in front, for a loader that skips its first `skip` batches."""

    def __init__(self, sampler: Sampler[list[int]]) -> None:
        self.sampler = sampler
        self.skip = 0

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.skip):
            yield []
        self.skip = 0
        yield from self.sampler


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
        batch = self.scheduler.open_batches[len(self._pending)]
        if len(batch.weights) != len(losses):
            raise ProtocolError(f"the batch has {len(batch.weights)} samples and {len(losses)} losses were computed")
        if (batch.weights == 1).all():
            return None
        return torch.from_numpy(batch.weights).to(losses.device)

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
