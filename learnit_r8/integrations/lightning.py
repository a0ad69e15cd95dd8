"""R8Scheduler in Lightning: three changed lines.

    class Digits(R8DataModuleMixin, LightningDataModule):                       # 1
        def train_dataloader(self):
            return self.r8_dataloader(self.train, num_workers=4)                # 2

    Trainer(max_epochs=-1, use_distributed_sampler=False, callbacks=[R8Callback(scheduler)])   # 3

The scheduler ends the run. Let `training_step` return `{"loss": losses.mean(), "r8_losses":
losses}`, one loss per sample; with "loss" alone the mean of each batch is reported. Losses are
reported after the optimizer step that they belong to, so with `accumulate_grad_batches=g` each of
the g batches is; with a strategy that weighs samples, train on `weighted(self, losses).mean()`.

The learning rate is the scheduler's: leave Lightning's own schedulers out. ReduceLROnPlateau lowers the
rest of it, and BackboneFinetuning's groups keep their share of it. StochasticWeightAveraging averages
weights, with as many `max_epochs` as the scheduler has, and renews BatchNorm statistics; its `swa_lrs`
are overruled.

Lightning's checkpoints hold the scheduler's state and the random generators', so `fit(ckpt_path=)`
continues to the bit. They load with `weights_only=True`. Lightning's loggers get the
scheduler's numbers as `r8/...`, every `log_every_n_steps`.

With `clip=` of the scheduler gradients are clipped at its norm, in place of `gradient_clip_val`; with
`R8Callback(scheduler, check=True)` a step that would do harm is left out. Both are done before the module's
own `on_before_optimizer_step`. Lightning counts such a step, as one that a `GradScaler` leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging
from torch.utils.data import DataLoader, Dataset

from learnit_r8.core.config import Problems
from learnit_r8.errors import ConfigError, tell
from learnit_r8.integrations.lightning_gate import StepGate, losses_of
from learnit_r8.integrations.torch import sampler as _sampler
from learnit_r8.integrations.torch.learning_rate import LearningRateHook, follow_lr
from learnit_r8.integrations.torch.sampler import R8BatchSampler
from learnit_r8.integrations.torch.state import arrays_from_tensors, capture_state, restore_state, tensors_from_arrays
from learnit_r8.scheduler import R8Scheduler
from learnit_r8.sinks.points import Numbers

__all__ = ["R8Callback", "R8DataModuleMixin", "weighted"]

_SHARDED = (
    "Lightning's checkpoints hold the state of rank 0's shard only: give Trainer(enable_checkpointing=False), and "
    "ShardedScheduler a checkpoint_dir, checkpoint_every and save_callback"
)


def weighted(module: LightningModule | Trainer, losses: torch.Tensor) -> torch.Tensor:
    """Return losses times the importance weights of their samples, in `training_step`.

        return {"loss": weighted(self, losses).mean(), "r8_losses": losses}

    Args:
        module: Whose Trainer has an R8Callback; or the Trainer.
        losses: One row per sample of the batch, `[n, ...]`.

    Raises:
        ConfigError: There is no R8Callback.
        ProtocolError: The batch has another number of samples.
    """
    return _sampler.weighted(_callback_of(getattr(module, "trainer", module)).scheduler, losses)


def _callback_of(trainer: Any) -> R8Callback:
    for callback in getattr(trainer, "callbacks", ()):
        if isinstance(callback, R8Callback):
            return callback
    raise ConfigError(
        "the scheduler is missing: Trainer(callbacks=[R8Callback(scheduler)]); Lightning's Tuner takes callbacks away, "
        "the scheduler finds a rate with R8Scheduler(auto_find_lr=True) and has a batch size of its own"
    )


class R8Callback(Callback):
    """Reports losses, sets the learning rate, backs up and restores the model, ends the run.

    Args:
        scheduler: The scheduler, or a function that makes it. A function is called once Lightning
            has started the processes: with several of them the scheduler needs
            `**learnit_r8.integrations.distributed.rank_arguments()`.
        check: Ask `scheduler.check` before each optimizer step, and leave out those that would do harm.

    Attributes:
        scheduler: The scheduler, once it is made.
        looking: Nothing is trained in this epoch: statistics of BatchNorm are taken for averaged weights.
    """

    def __init__(self, scheduler: R8Scheduler | Callable[[], R8Scheduler], *, check: bool = False) -> None:
        if not (callable(scheduler) or hasattr(scheduler, "batch_iterator")):
            kind = type(scheduler).__name__
            raise ConfigError(f"scheduler must be an R8Scheduler or a function that makes one, got {kind}")
        self._given = scheduler
        self._gate = StepGate(self, checks=check)
        self._epochs: Iterator[int] = iter(())
        self._pending: list[Any] = []  # losses whose optimizer step is not done yet
        self._hooks: list[LearningRateHook] = []
        self._steps_done = 0
        self._rngs: dict[str, Any] | None = None
        self._fit: tuple[Any, Any] = None, None  # the trainer and the module of the last call of fit
        self._numbers: Numbers | None = None
        self.looking = False

    @cached_property
    def scheduler(self) -> R8Scheduler:
        """The scheduler."""
        return self._given() if callable(self._given) else self._given

    # Lightning's hooks, in their order ------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that both sides agree, and come before callbacks that look at the learning rate.

        Raises:
            ConfigError: They do not.
        """
        if stage != "fit":
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [self, *(one for one in callbacks if one is not self)]  # type: ignore[attr-defined]
        Problems(self._problems(trainer)).raise_if_any()

    def _problems(self, trainer: Trainer) -> list[str]:
        scheduler, problems = self.scheduler, self._gate.problems(trainer)
        if trainer.world_size != scheduler.world_size:
            problems.append(
                f"Lightning runs on {trainer.world_size} processes, the scheduler has world_size="
                f"{scheduler.world_size}: give R8Callback a function that makes the scheduler with "
                "**learnit_r8.integrations.distributed.rank_arguments()"
            )
        if scheduler.sharded and trainer.checkpoint_callbacks:
            problems.append(_SHARDED)
        if overfit := getattr(trainer, "overfit_batches", 0):
            problems.append(
                f"overfit_batches={overfit} trains on the same batches in each epoch, and the scheduler chooses "
                "others: leave it out, and take a Subset of the data with num_samples=len(subset)"
            )
        if _averaging(trainer) is not None and trainer.max_epochs != (epochs := _epochs_of(scheduler)):
            problems.append(
                f"StochasticWeightAveraging ends with max_epochs={trainer.max_epochs}, the run with the "
                f"scheduler's num_epochs={epochs}: give Trainer(max_epochs={epochs or 'n'}), or average by "
                "lightning.pytorch.callbacks.WeightAveraging"
            )
        updates = int(scheduler.total_steps or 0) // trainer.accumulate_grad_batches
        most = {"min_epochs": _epochs_of(scheduler), "min_steps": updates}
        problems += [
            f"{name}={least} asks for more than R8Scheduler's budget{f' of {budget}' if budget else ''}, which ends "
            "the run: leave it out, or give the scheduler a larger budget"
            for name, budget in most.items()
            if (least := getattr(trainer, name) or 1) > (budget or 1)
        ]
        return problems

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the scheduler reach the model, before a loader draws the first batch."""
        self._fit = trainer, pl_module
        self._pending.clear()
        if self._numbers is None:
            self._numbers = Numbers(self.scheduler)
        self.scheduler.attach_model(
            lambda: capture_state(*self._parts(), copy=False), lambda state: restore_state(state, *self._parts())
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start, or go on in the middle of an epoch.

        Raises:
            ConfigError: The training loader does not draw from the scheduler.
        """
        if not isinstance(getattr(trainer.train_dataloader, "batch_sampler", None), R8BatchSampler):
            raise ConfigError(
                "the training loader does not draw from the scheduler: return self.r8_dataloader(dataset) "
                "of R8DataModuleMixin, or DataLoader(dataset, batch_sampler=R8BatchSampler(scheduler)), and no "
                "other loader beside it"
            )
        self.on_train_end()
        self._look(trainer, look=False)
        relative = any(isinstance(one, BaseFinetuning) for one in trainer.callbacks)  # type: ignore[attr-defined]
        for optimizer in trainer.optimizers:
            self._hooks.append(follow_lr(self.scheduler, optimizer, relative=relative))
            self._hooks[-1]._handles.append(optimizer.register_step_post_hook(self._after_step))
        self._gate.start(trainer)
        self._epochs = self.scheduler.epoch_iterator()
        self._next_epoch(trainer)
        self._tell_cuts(trainer)
        if self._rngs is not None:
            restore_state({"rngs": self._rngs}, None)
            self._rngs = None

    def _tell_cuts(self, trainer: Trainer) -> None:
        """Say what ends the run, or its epochs, before the scheduler does."""
        scheduler = self.scheduler
        if trainer.should_stop:
            tell(f"nothing is left to train, {scheduler.nothing_to_draw}: give R8Scheduler more epochs to go on")
            return
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        cuts = []
        if trainer.num_training_batches < scheduler.steps_per_epoch:
            cuts.append(
                f"limit_train_batches ends each epoch after {int(trainer.num_training_batches)} of its "
                f"{scheduler.steps_per_epoch} batches"
            )
        if (epochs := _epochs_of(scheduler)) is not None:
            if trainer.max_epochs not in (None, -1) and trainer.max_epochs < epochs:
                cuts.append(f"max_epochs={trainer.max_epochs} ends the run before the scheduler's {epochs} epochs")
            updates, most = int(scheduler.total_steps or 0) // trainer.accumulate_grad_batches, trainer.max_steps
            if 0 <= most < updates:
                as_budget = f"as a budget that is R8Scheduler(num_steps={most * trainer.accumulate_grad_batches})"
                cuts.append(f"max_steps={most} ends the run before the scheduler's {updates} updates ({as_budget})")
            elif most > updates:
                tell(f"max_steps={most} is not reached: R8Scheduler's budget is spent after {updates} updates")
        if cuts:
            tell(f"{' and '.join(cuts)}: the schedule of the learning rate does not come to its end")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the learning rate of the epoch's first step, for monitors."""
        for hook in self._hooks:
            hook.set_now()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the learning rate of the step that comes, for monitors."""
        if self.looking:  # Lightning takes a step at the end of this epoch, with what gradients there are
            for optimizer in trainer.optimizers:
                optimizer.zero_grad(set_to_none=True)
        for hook in self._hooks:
            hook.set_now()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Clip, and ask whether to take the step, where that was asked for."""
        if not self.looking:
            self._gate.before_step(trainer, self._pending)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take note of the losses; report them when their optimizer step is done."""
        if self.looking:
            return
        known = self._gate.take_losses()
        self._pending.append(losses_of(outputs, trainer.accumulate_grad_batches) if known is None else known)
        if self._pending[-1] is not None and self._pending[-1].ndim == 0:
            self.scheduler.tell(
                "training_step returns one loss a batch, from which samples are told apart slowly and roughly: return "
                '{"loss": losses.mean(), "r8_losses": losses}, of reduction="none"'
            )
        whole = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if whole or not pl_module.automatic_optimization:
            self._report()
        if self._numbers is not None and trainer.loggers and trainer._logger_connector.should_update_logs:
            pl_module.log_dict(self._numbers.newest(), rank_zero_only=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on to the next epoch, or end the run."""
        if self.looking:
            trainer.should_stop = True
            return
        self._report()  # an epoch that was cut short may end within an accumulation
        self._next_epoch(trainer)
        averaging = _averaging(trainer)
        last = trainer.should_stop and averaging is not None and trainer.current_epoch == averaging.swa_end
        if last and averaging._model_contains_batch_norm and self._look(trainer, look=True):  # type: ignore[union-attr]
            trainer.should_stop = False

    def on_train_end(self, *args: Any) -> None:
        """Leave the optimizer and the signal handlers alone."""
        self._gate.stop()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if hasattr(self._epochs, "close"):
            self._epochs.close()

    on_exception = on_train_end  # type: ignore[assignment]

    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's state and the random generators', without numpy arrays.

        Raises:
            ConfigError: The file would hold the state of one rank's shard.
        """
        if self.scheduler.sharded:
            raise ConfigError(_SHARDED)
        return {"scheduler": tensors_from_arrays(self.scheduler.state_dict())} | capture_state(None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the scheduler; the random generators follow when training starts."""
        self.scheduler.load_state_dict(arrays_from_tensors(state_dict["scheduler"]))
        self._rngs = state_dict["rngs"]

    def _look(self, trainer: Trainer, *, look: bool) -> bool:
        """Let the next epoch go over all samples without training on them, or not; return whether that is possible."""
        sampler = getattr(trainer.train_dataloader, "batch_sampler", None)
        if isinstance(sampler, _Sampler):
            sampler.looking = self.looking = look
        elif look:
            tell("StochasticWeightAveraging leaves BatchNorm statistics as they are: take self.r8_dataloader(dataset)")
        return self.looking

    def _next_epoch(self, trainer: Trainer) -> None:
        if next(self._epochs, None) is None:
            trainer.should_stop = True

    def _report(self) -> None:
        skipped = self._steps_done == 0  # a GradScaler leaves a step out after an overflow
        pending, self._pending, self._steps_done = self._pending, [], 0
        for losses in pending:
            if losses is None:  # training_step returned None
                self.scheduler.update_with_loss(float("nan"), skipped=True)
            else:
                self.scheduler.update_with_loss(losses, skipped=skipped)

    def _after_step(self, *args: Any) -> None:
        self._steps_done += 1

    def _parts(self) -> tuple[Any, Any, Any]:
        trainer, module = self._fit
        return module, trainer.optimizers, getattr(trainer.precision_plugin, "scaler", None)


class R8DataModuleMixin:
    """Gives a `LightningDataModule`, or a `LightningModule`, loaders that draw from the scheduler."""

    def r8_dataloader(self, dataset: Dataset[Any], **options: Any) -> DataLoader[Any]:
        """Return the training loader.

        Args:
            dataset: Indexable, as long as the scheduler's `num_samples`.
            **options: As for `torch.utils.data.DataLoader`: workers, `collate_fn`, `pin_memory`, ...

        Raises:
            ConfigError: No R8Callback, another number of samples, or options that the scheduler decides.
        """
        trainer: Any = getattr(self, "trainer", None)
        scheduler, problems = _callback_of(trainer).scheduler, Problems()
        if clashing := sorted({"batch_size", "shuffle", "sampler", "batch_sampler", "drop_last"} & set(options)):
            problems.append(f"the scheduler forms the batches: leave out {', '.join(clashing)}")
        size, wanted = len(dataset), scheduler.catalog.num_samples  # type: ignore[arg-type]
        if size != wanted:
            problems.append(f"the dataset has {size} samples, the scheduler num_samples={wanted}")
        problems.raise_if_any()
        return _ResumableLoader(dataset, batch_sampler=_Sampler(scheduler, trainer), **options)


class _Sampler(R8BatchSampler):
    """Knows how many batches Lightning collects for a step, and hands all samples out where nothing is trained."""

    def __init__(self, scheduler: R8Scheduler, trainer: Any) -> None:
        self._trainer = trainer
        self.looking = False  # the next pass is over all samples, without the scheduler
        super().__init__(scheduler)

    @property
    def ahead(self) -> int:
        """Batches that are held besides the first; a GradientAccumulationScheduler changes it."""
        return int(self._trainer.accumulate_grad_batches) - 1

    @ahead.setter
    def ahead(self, value: int) -> None:
        pass

    def __iter__(self) -> Iterator[list[int]]:
        if not self.looking:
            return super().__iter__()
        pieces = np.array_split(np.arange(self.scheduler.catalog.num_samples), len(self))
        return iter([piece.tolist() for piece in pieces])


class _ResumableLoader(DataLoader[Any]):
    """Tells Lightning that it resumes in the middle of an epoch: the scheduler does."""

    state_dict, load_state_dict = R8BatchSampler.state_dict, R8BatchSampler.load_state_dict


def _epochs_of(scheduler: R8Scheduler) -> int | None:
    return None if scheduler.total_steps is None else -(-scheduler.total_steps // scheduler.steps_per_epoch)


def _averaging(trainer: Trainer) -> StochasticWeightAveraging | None:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((one for one in callbacks if isinstance(one, StochasticWeightAveraging)), None)
