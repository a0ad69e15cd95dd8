"""A Hugging Face Trainer that computes one loss per sample and reports it after the optimizer step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback
from transformers.trainer_utils import seed_worker

from learnit_r8.errors import ProtocolError
from learnit_r8.integrations._sample_losses import logits_of, loss_function


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
        items = losses.number().sum() if num_items_in_batch is None else num_items_in_batch
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
