"""A Hugging Face Trainer whose batches someone else chooses, and who hears one loss per sample after each step."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback, TrainerState

from learnit_r8.core.config import Problems
from learnit_r8.errors import ConfigError, ProtocolError
from learnit_r8.integrations.huggingface.checks import data_problems, host_problems, is_grouped
from learnit_r8.integrations.huggingface.loader import EpochLength, Repeated, make_loader
from learnit_r8.integrations.huggingface.losses import LossWatch

_Trainer: Any = object  # to type checkers: the class that is mixed into has all that is used of it here

ENDLESS = 1 << 40
"""Epochs, and steps in each, that the Trainer reckons with: where they end is seen when the batches do."""


class SampleLossMixin(_Trainer):  # type: ignore[misc]
    """Lets a Trainer draw someone else's batches, and report each micro-batch after its optimizer step.

    The loss that is trained on is the Trainer's own. One loss per sample is read off the model's outputs where these
    add up to it: cross-entropy of classes, tokens and next tokens, squared errors, several labels, spans, TRL's fused
    heads, reward models and DPO, with label smoothing and experts' auxiliary losses. Else the mean of each micro-batch
    is reported, which is said once; `note_sample_losses` or `sample_loss_func` help then.

    Args:
        sample_loss_func: `(outputs, labels) -> losses [B]`, with grad: the loss to train on is their mean.

    Raises:
        ConfigError: Arguments that would not be respected; all are listed.
    """

    args: Any
    compute_loss_func: Any

    def __init__(self, *args: Any, sample_loss_func: Callable[[Any, Any], Tensor] | None = None, **kwargs: Any) -> None:
        Problems(data_problems(kwargs.get("train_dataset"))).raise_if_any()  # the Trainer would advise max_steps
        super().__init__(*args, **kwargs)
        Problems(host_problems(self, SampleLossMixin, sample_loss_func) + self._problems()).raise_if_any()
        self._told: set[str] = set()
        self._read: list[Tensor] = []  # the losses of this optimizer step, where they were wanted before it
        self._sampler: Any = None
        self._resumed = self._trained = False
        self._micro = 0  # micro-batches of the Trainer's epoch so far
        self._length = EpochLength(0)
        self._given: Any = None  # the iterator of the Trainer's epoch, and the one that is drawn from
        self._iterator: Iterator[Any] | None = None
        self._sample_loss_func = sample_loss_func
        self._used_func = sample_loss_func is None
        if sample_loss_func is not None:
            self.compute_loss_func = self._mean_of_samples
        self._watch = LossWatch(self, reads=not is_grouped(self))
        self.args = copy.copy(self.args)  # some values follow from the sampler; the caller's object stays as it is
        self.args.ignore_data_skip = True  # the sampler knows where it stands
        self.callback_handler.callbacks.insert(0, _Callback(self))  # others see the step as it was judged

    # What subclasses define -----------------------------------------------------------------

    _times = 1, 1  # how often a batch holds each id, and how often it comes

    def _problems(self) -> list[str]:
        return []

    _batch_sampler: Callable[[], Sampler[list[int]]]
    _hand_over: Callable[[list[Tensor], bool], None]
    """Reports the micro-batches of an optimizer step, one loss per sample of each or their mean, unless skipped."""
    _batch_rows: Callable[[], int]
    """Samples of the micro-batch that is being trained on."""
    _goes_on: Callable[[], bool]
    """Whether the next batch belongs to an epoch of which some were trained on."""
    _place: Callable[[], tuple[float, int]]
    """The epoch, with its fraction, and optimizer steps left."""

    def _weights(self, loss: Tensor) -> Tensor | None:  # of the samples of the micro-batch with this loss; None: ones
        return None

    def _over(self) -> bool:  # there is nothing to draw any more
        return False

    def _batches_left(self) -> bool:  # the epoch has more to draw, though its iterator has ended
        return False

    def _before_step(self) -> None: ...
    def _on_train_begin(self, control: Any) -> None: ...
    def _on_step_end(self, control: Any) -> None: ...
    def _on_epoch_end(self, control: Any) -> None: ...
    def _on_save(self, folder: str) -> None: ...

    def _follow(self, state: Any) -> None:
        """Write down in the Trainer's state where the training stands, and the step that will end it."""
        state.epoch, left = self._place()
        most = int(self.args.max_steps)
        state.max_steps = state.global_step + left if most <= 0 else min(state.global_step + left, most)

    # For own losses -------------------------------------------------------------------------

    def note_sample_losses(self, losses: Tensor) -> None:
        """Give one loss per sample of the micro-batch, from within a `compute_loss` of your own.

        Args:
            losses: `[B]`, with grad if there are importance weights, which are applied if their mean is your loss.

        Raises:
            ProtocolError: Another shape.
        """
        self._watch.give(losses)

    def _mean_of_samples(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        """Stand in for `compute_loss_func`; what it returns, the Trainer does not divide any more."""
        assert self._sample_loss_func is not None
        losses: Tensor = self._sample_loss_func(outputs, labels)
        mean: Tensor = losses.mean()
        if not self._watch.open:
            return mean
        self._used_func = True
        self._watch.give(losses)
        averaged = self.args.average_tokens_across_devices and num_items_in_batch is not None
        world = self.accelerator.num_processes if averaged else 1
        return mean.div(self.current_gradient_accumulation_steps * world)

    def _say(self, key: str, sentence: str) -> None:
        """Tell the user, once."""
        if key not in self._told:
            self._told.add(key)
            warnings.warn(sentence, RuntimeWarning, stacklevel=1)

    # What the Trainer calls -----------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return a loader of the sampler's batches.

        Raises:
            ValueError: There is no `train_dataset`.
        """
        self._sampler = Repeated(self._batch_sampler(), *self._times)
        self._loader = make_loader(self, self._sampler)
        return self._loader

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """As the Trainer's; but how long an epoch is, and the run, is seen as it comes."""
        if getattr(dataloader, "batch_sampler", None) is not self._sampler:
            raise ConfigError(
                f"{type(self).__name__}.get_train_dataloader() returned another loader than R8's, so other batches "
                "would be trained on than R8 chooses: leave it out"
            )
        values = super().set_initial_training_values(args, dataloader)
        if len(values) != 7 or values[5] != len(dataloader):
            raise ConfigError(_VERSION)
        self._length, start = EpochLength(values[5]), TrainerState()
        self._follow(start)
        most = max(start.max_steps, 1)  # logging_steps=0.1 and the like are shares of it
        return ENDLESS, ENDLESS, *values[2:5], self._length, most

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """As the Trainer's; the optimizer steps after the last of the micro-batches that are returned."""
        if self.state.global_step >= self.state.max_steps:  # a resume from a step that is beyond them
            self.control.should_training_stop = True
            return [], None
        if epoch_iterator is not self._given:
            self._given, self._iterator, self._micro = epoch_iterator, epoch_iterator, 0
        aligned = num_batches - self._micro % num_batches  # the Trainer also steps at multiples of num_batches
        samples, items = super().get_batch_samples(self._iterator, aligned, device)
        if not samples and self._batches_left():  # after a rollback some come again
            self._iterator = iter(self._loader)
            samples, items = super().get_batch_samples(self._iterator, aligned, device)
        self._micro += len(samples)
        self._length.end = self._micro
        self.control.should_epoch_stop |= not samples
        return samples, items

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`.

        Raises:
            ProtocolError: This trainer has trained already, or a search of hyperparameters asks for a trial.
        """
        if kwargs.get("trial") is not None or (args and args[0] is not None):
            raise ProtocolError(_NO_TRIALS)
        self._resumed = bool(resume_from_checkpoint)
        if self._trained and not self._resumed:
            raise ProtocolError(
                f"this {type(self).__name__} has trained already, and who chose its batches stands at the end of that: "
                "for another run create the trainer and its scheduler (or sampler) anew; to go on where a run was "
                "stopped, train(resume_from_checkpoint=True)"
            )
        self._trained = True
        self._watch.notes.clear()
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._watch.detach()
            self._given = self._iterator = None  # the loop over the batches ends with it, and gives the signals back

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse.

        Raises:
            ProtocolError: Always.
        """
        raise ProtocolError(_NO_TRIALS)

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As `Trainer.training_step`; takes note of the losses.

        Raises:
            ProtocolError: `sample_loss_func` was given to a trainer that does not use it.
        """
        parent: Any = super()
        loss = self._watch.step(lambda: parent.training_step(model, *args, **kwargs), model)
        if not self._used_func:
            raise ProtocolError(
                f"{type(self).__name__}.compute_loss does not call compute_loss_func, so sample_loss_func has no "
                "effect: leave it out, and call self.note_sample_losses(losses) in your compute_loss"
            )
        return loss

    # Reports --------------------------------------------------------------------------------

    def _read_notes(self) -> list[Tensor]:
        """Return one loss per sample of each micro-batch of an optimizer step, or their mean."""
        notes, self._watch.notes = self._watch.notes, []
        found = [self._watch.judge(note) for note in notes]
        if self.args.world_size > 1:  # a report is one loss per sample on all ranks or on none
            flags = torch.tensor([one is not None for one in found], device=self.accelerator.device).int()
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MIN)
            found = [one if flag else None for one, flag in zip(found, flags.tolist(), strict=True)]
        return [note.mean if one is None else one for one, note in zip(found, notes, strict=True)]

    def _report_notes(self) -> None:
        """Report the micro-batches of an optimizer step."""
        reports, self._read = self._read or self._read_notes(), []
        self._hand_over(reports, bool(self.accelerator.optimizer_step_was_skipped))


class _Callback(TrainerCallback):
    """Carries the Trainer's events to the trainer's own methods."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._on_train_begin(control)
        state.num_train_epochs = math.ceil(args.num_train_epochs)
        self._trainer._follow(state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._before_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._report_notes()
        self._trainer._resumed = False
        self._trainer._follow(state)
        self._trainer._on_step_end(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._watch.notes.clear()  # of an accumulation that was left: no optimizer step came
        self._trainer._on_epoch_end(control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._on_save(os.path.join(args.output_dir, f"checkpoint-{state.global_step}"))


_VERSION = "this version of transformers counts the steps of an epoch in another way: install transformers 5.24"
_NO_TRIALS = (
    "hyperparameter_search cannot set what R8Scheduler decides (learning rate, batch size, epochs), and one scheduler "
    "serves one run: in the objective of your search (optuna, ray) create a scheduler and a trainer for each trial"
)
