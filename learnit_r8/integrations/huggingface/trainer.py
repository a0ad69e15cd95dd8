"""R8Scheduler in the Hugging Face Trainer: three changed lines.

    from learnit_r8.integrations.huggingface import R8Trainer
    scheduler = R8Scheduler(len(data), batch_size=16, num_epochs=3, initial_lr=5e-5)
    trainer = R8Trainer(model, args, train_dataset=data, scheduler=scheduler)

The scheduler's batches are the Trainer's micro-batches; with gradient accumulation each of them
is reported, after the optimizer step that they share. The learning rate (effective and logged) is
the scheduler's. Its state is part of the Trainer's checkpoints, in `scheduler.pt`, so that
`resume_from_checkpoint` resumes both.

With `clip=` of the scheduler gradients are clipped at its norm in place of `max_grad_norm` (another than its default is
refused); with `R8Trainer(check=True)` a step that would do harm is left out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Sampler
from transformers import Trainer

from learnit_r8.integrations.huggingface.backups import TrainedState
from learnit_r8.integrations.huggingface.checks import default_of, is_grouped, share_of
from learnit_r8.integrations.huggingface.gate import GatedMixin
from learnit_r8.integrations.huggingface.mixin import SampleLossMixin
from learnit_r8.integrations.torch.learning_rate import LearningRateHook, follow_lr, scales, unwrapped
from learnit_r8.integrations.torch.sampler import R8BatchSampler
from learnit_r8.integrations.torch.state import arrays_from_tensors, tensors_from_arrays
from learnit_r8.scheduler import R8Scheduler
from learnit_r8.sinks.points import Numbers

__all__ = ["R8Mixin", "R8Trainer", "SRSTrainer", "SampleLossMixin"]

MANY = 1_000_000
"""Epochs that the Trainer is told of when the budget is seconds; the scheduler ends the run."""
SAMPLER_STATE = "r8_sampler.pt"


class _SchedulerRates(LRScheduler):
    """What the Trainer takes for its scheduler of the rate, which `follow_lr` sets; carries the state of the run."""

    def __init__(self, scheduler: R8Scheduler, optimizer: Any) -> None:
        self.optimizer = unwrapped(optimizer)
        self._scheduler = scheduler
        self._hook: LearningRateHook = follow_lr(scheduler, optimizer)
        self.loaded = False  # a checkpoint's state was restored

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the rate follows the batches."""

    def get_last_lr(self) -> list[float]:  # type: ignore[override]
        """Return the learning rate of the last optimizer step, for each parameter group."""
        return [self._hook.lr * scale for scale in scales(self.optimizer)]

    def state_dict(self) -> dict[str, Any]:
        """Return the R8Scheduler's state as tensors."""
        return tensors_from_arrays(self._scheduler.state_dict())  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the R8Scheduler."""
        self._scheduler.load_state_dict(arrays_from_tensors(state_dict))
        self.loaded = True


class R8Mixin(GatedMixin):
    """Makes a Trainer of your own an R8Trainer: `class Mine(R8Mixin, MyTrainer)`.

    Training is as in `MyTrainer`, on the scheduler's batches and at its learning rate. With TRL's GRPO and RLOO a
    batch of the scheduler is that many prompts, each with all its completions, and what the catalog learns of a prompt
    is minus their mean reward.

    Args:
        scheduler: Chooses the samples and the learning rate. Its `batch_size` and `num_epochs`
            replace `per_device_train_batch_size` and `num_train_epochs`, its `initial_lr` and
            `scheduler_mode` the Trainer's learning rate. Without callbacks of its own it backs up
            and restores what is trained of the model, the optimizer and the random generators.
        check: Ask `scheduler.check` before each optimizer step, and leave out those that would do harm. The Trainer
            counts such a step, as one that a `GradScaler` leaves out.
        sample_loss_func: See `SampleLossMixin`.

    Raises:
        ConfigError: Arguments that do not go together; all are listed.
    """

    lr_scheduler: Any
    _train_batch_size: Any
    _calculate_rewards: Any

    def __init__(self, *args: Any, scheduler: R8Scheduler, check: bool = False, **kwargs: Any) -> None:
        self.scheduler = scheduler
        self._check = check
        self._grouped = False
        super().__init__(*args, **kwargs)
        self._loop: Iterator[int] = iter(())
        self._rates: _SchedulerRates | None = None
        self._leaving = False
        scheduler.host_saves = True
        self._parts: list[Tensor] = []  # of a batch that is trained on in several micro-batches
        self._rewards: list[Tensor] = []  # of the batches whose completions were scored, oldest first
        self._backups: TrainedState | None = None
        self._numbers = Numbers(scheduler)
        self._tell_replaced()
        self._take_over()
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and not self.accelerator.is_fsdp2):
            scheduler.tell(
                "under DeepSpeed and the first FSDP no backups in RAM are taken: no loss leads back to an earlier state"
            )
        else:
            self._backups = TrainedState(self)
            scheduler.attach_model(self._backups.capture, self._backups.restore)

    def _problems(self) -> list[str]:
        scheduler, dataset = self.scheduler, self.train_dataset
        problems = self._gate_problems()
        rows = len(dataset) if hasattr(dataset, "__len__") else 0
        if rows not in (0, size := scheduler.catalog.num_samples):
            packed = " after packing" if getattr(self.args, "packing", False) else ""
            problems.append(
                f"train_dataset has {rows} samples{packed}, the scheduler num_samples={size}: create it with "
                f"num_samples={rows}"
            )
        shares = [f"{kind}_steps" for kind in ("logging", "eval", "save") if share_of(self.args, kind)]
        if shares and scheduler.total_steps is None:
            problems.append(
                f"{', '.join(shares)} below 1: a share of the run's steps, and nobody knows how many fit into "
                "train_duration_seconds; give a number of steps"
            )
        if self.lr_scheduler is not None:
            problems.append("optimizers=(optimizer, lr_scheduler): the scheduler sets the learning rate, give None")
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        if plugin is not None and "scheduler" in plugin.deepspeed_config:
            problems.append("DeepSpeed's config has a scheduler: R8Scheduler sets the learning rate, leave it out")
        if self.args.dataloader_drop_last and not scheduler.drop_last:
            problems.append("dataloader_drop_last=True: give R8Scheduler(drop_last=True)")
        if scheduler.sharded and self.args.save_strategy != "no":
            problems.append(
                "the Trainer's checkpoints hold rank 0's state only, and each rank has a shard of its own: give "
                "TrainingArguments(save_strategy='no'), and ShardedScheduler a checkpoint_dir, checkpoint_every and "
                "save_callback"
            )
        if self.args.world_size != scheduler.world_size:
            problems.append(
                f"the Trainer runs on {self.args.world_size} processes, the scheduler has world_size="
                f"{scheduler.world_size}: create it after TrainingArguments, with "
                "**learnit_r8.integrations.distributed.rank_arguments()"
            )
        return problems + (self._group_problems() if is_grouped(self) else [])

    def _group_problems(self) -> list[str]:
        self._grouped, parts, group = True, self.args.steps_per_generation, self.num_generations
        self._times = group, parts * self.num_iterations
        if group % parts == 0 or (self.scheduler.drop_last and self._rows() % parts == 0):
            return []
        return [
            f"steps_per_generation={parts} does not divide num_generations={group}, so completions of a last, smaller "
            "batch would be left out: change one, or give R8Scheduler(drop_last=True) and a batch_size of a multiple"
        ]

    def _rows(self) -> int:  # of the Trainer that a full batch of the scheduler has on this process
        return self.scheduler.batch_size // self.scheduler.world_size * self._times[0]

    def _tell_replaced(self) -> None:
        """Name the Trainer's arguments that were given and that the scheduler's own take the place of."""
        args, tell, size = self.args, self.scheduler.tell, self.scheduler.batch_size
        rates = ("learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio")
        ours = {"num_train_epochs": self._epochs(), "per_device_train_batch_size": size, **dict.fromkeys(rates)}
        theirs = [
            (name, getattr(args, name, None), (None, default_of(args, name), value)) for name, value in ours.items()
        ]
        if given := [f"{name}={getattr(value, 'value', value)!r}" for name, value, fine in theirs if value not in fine]:
            tell(f"{', '.join(given)} of the Trainer: R8Scheduler's own values count in place of it")
        most, own, each = args.max_steps, self._place()[1], args.gradient_accumulation_steps * self._times[1]
        if 0 < most < own:
            tell(
                f"max_steps={most} ends the training before R8Scheduler's budget does, so the schedule of the learning "
                f"rate does not come to its end: as a budget that is R8Scheduler(num_steps={most * each}), in batches"
            )
        elif most > own:
            tell(f"max_steps={most} is not reached: R8Scheduler's budget is spent after {own} steps")

    def _epochs(self) -> int:
        steps = self.scheduler.total_steps
        return MANY if steps is None else -(-steps // self.scheduler.steps_per_epoch)

    def _take_over(self) -> None:
        self.args.num_train_epochs = self._epochs()
        rows = self._rows()
        if self._grouped:
            self._calculate_rewards = partial(self._keep_rewards, self._calculate_rewards)
            self.args.generation_batch_size = rows * self.scheduler.world_size
            rows //= self.args.steps_per_generation
        self.args.per_device_train_batch_size = self._train_batch_size = rows

    # Batches and reports --------------------------------------------------------------------

    def _batch_sampler(self) -> Sampler[list[int]]:
        return R8BatchSampler(self.scheduler, ahead=self.args.gradient_accumulation_steps - 1)

    def _position(self) -> int:  # among the open batches, of the one that is being trained on
        return (len(self._parts) + len(self._watch.notes)) // self._times[1]

    def _batch_rows(self) -> int:
        return len(self.scheduler.open_batches[self._position()].indices)

    def _weights(self, loss: Tensor) -> Tensor | None:
        weights = self.scheduler.importance_weights(self._position())
        return None if weights is None else torch.from_numpy(weights).to(loss.device)

    def _hand_over(self, reports: list[Tensor], skipped: bool) -> None:
        for losses in self._of_prompts(reports) if self._grouped else reports:
            self.scheduler.update_with_loss(losses, skipped=skipped)

    def _of_prompts(self, reports: list[Tensor]) -> Iterator[Tensor]:
        """Yield minus the reward of each prompt of a batch that was trained on, or the mean loss of its completions."""
        for loss in reports:
            self._parts.append(loss.detach().float().mean())
            if len(self._parts) == self._times[1]:
                mean, self._parts = torch.stack(self._parts).mean(), []
                rewards = self._rewards.pop(0) if self._rewards else None
                yield mean if rewards is None or not torch.isfinite(mean) else -rewards

    def _keep_rewards(self, calculate: Any, *args: Any, **kwargs: Any) -> Any:
        """Take note of each prompt's mean reward on this process, as TRL computes the rewards of all of them."""
        rewards = calculate(*args, **kwargs)
        if self.model.training:
            group, rank = self.num_generations, self.args.process_index
            total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1).view(-1, group).mean(dim=1)
            self._rewards.append(total.detach().chunk(self.args.world_size)[rank])
        return rewards

    # Progress -------------------------------------------------------------------------------

    def _goes_on(self) -> bool:
        return self.scheduler.epoch_batches[0] > 0

    def _over(self) -> bool:
        return self.scheduler.nothing_to_draw is not None

    def _batches_left(self) -> bool:
        reported, planned = self.scheduler.epoch_batches
        return reported < planned

    def _place(self) -> tuple[float, int]:
        scheduler = self.scheduler
        reported, planned = scheduler.epoch_batches
        left = scheduler.batches_left
        left = MANY * scheduler.steps_per_epoch if left is None else left
        here = min(planned - reported, left)
        whole, rest = divmod(left - here, scheduler.steps_per_epoch)
        steps = self._steps(here, len(self._parts)) + whole * self._steps(scheduler.steps_per_epoch) + self._steps(rest)
        return scheduler.current_epoch + reported / max(planned, 1), steps

    def _steps(self, batches: int, parts: int = 0) -> int:
        """Return how many optimizer steps so many batches of one epoch make, `parts` of the first being done."""
        return max(-(-(batches * self._times[1] - parts) // int(self.args.gradient_accumulation_steps)), 0)

    def _on_train_begin(self, control: Any) -> None:
        if self._resumed and not (self._rates is not None and self._rates.loaded):
            self._say(
                "state",
                "the checkpoint that training resumes from has no scheduler.pt, or no optimizer.pt: R8Scheduler starts "
                "at its first epoch and knows nothing of the samples, only the model is as it was saved",
            )
        if self._backups is not None:
            self._backups.watch()
        self._parts.clear()
        self._loop = self.scheduler.epoch_iterator()
        self._on_epoch_end(control)

    def _on_step_end(self, control: Any) -> None:
        if not self.scheduler.interrupted:
            return
        if self.args.save_strategy != "no":
            control.should_save = self._leaving = True
            return
        self.scheduler.deliver_signal(
            f"stopped after {self.scheduler.global_step} batches and not saved: save_strategy='no'"
        )

    def _on_save(self, folder: str) -> None:
        if self._parts:
            parts, each = self._times[1], int(self.args.gradient_accumulation_steps)
            self._say(
                "parts",
                f"{folder} lies amid the completions of a batch of prompts, and no checkpoint holds them: a resume "
                f"from it lets the prompts come again. save_steps={math.lcm(parts, each) // each}, or a multiple, "
                "saves after whole batches",
            )
        if self._leaving:
            self._leaving = False
            self.scheduler.deliver_signal(
                f"stopped after {self.scheduler.global_step} batches, saved in {folder}: go on with "
                f"trainer.train(resume_from_checkpoint={folder!r})"
            )

    def _on_epoch_end(self, control: Any) -> None:
        self._rewards.clear()
        if control.should_training_stop and self.scheduler.batches_left != 0:
            return  # by max_steps or a callback: a resume goes on in this epoch
        if next(self._loop, None) is None:
            control.should_training_stop = True

    def _say(self, key: str, sentence: str) -> None:
        if key not in self._told:
            self.scheduler.tell(sentence)
        super()._say(key, sentence)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log; the Trainer's own loggers get the scheduler's numbers, as `r8/...`, beside each training loss."""
        more = self._numbers.newest() if "loss" in logs else {}
        super().log({**logs, **more}, *args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        """Return what the Trainer takes for its learning-rate scheduler."""
        self._rates = _SchedulerRates(self.scheduler, optimizer or self.optimizer)
        self.lr_scheduler, self._created_lr_scheduler = self._rates, True
        return self._rates

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`."""
        try:
            result = super().train(*args, **kwargs)
            if self.scheduler.interrupted:  # it came after the last step
                self.scheduler.deliver_signal("the training was over")
            return result
        finally:
            if hasattr(self._loop, "close"):
                self._loop.close()  # signal handlers are put back, also after an exception


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
        self.train_sampler = train_sampler
        super().__init__(*args, **kwargs)
        self.args.per_device_train_batch_size = self._train_batch_size = train_sampler.batch_size

    def _problems(self) -> list[str]:
        problems, sampler = [], self.train_sampler
        if not hasattr(sampler, "update_difficulties"):
            problems.append(f"train_sampler must have update_difficulties(loss), got {type(sampler).__name__}")
        if self.args.world_size > 1:
            problems.append(f"SRSTrainer runs on one process, got {self.args.world_size}: use R8Trainer with 'spaced'")
        return problems

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Keep an `indices` field, with which data sets for such samplers are published, from a model without one."""
        self._set_signature_columns_if_needed()
        if isinstance(inputs, dict) and "indices" not in (self._signature_columns or ()):
            inputs = {name: value for name, value in inputs.items() if name != "indices"}
        return super()._prepare_inputs(inputs)

    def _batch_sampler(self) -> Any:
        return self.train_sampler

    def _batch_rows(self) -> int:
        return int(self.train_sampler.batch_size)

    def _updates(self) -> int:
        return max(-(-len(self.train_sampler) // int(self.args.gradient_accumulation_steps)), 1)

    def _goes_on(self) -> bool:
        return self._resumed and self.state.global_step % self._updates() > 0

    def _place(self) -> tuple[float, int]:
        done, updates, most = self.state.global_step, self._updates(), self.args.max_steps
        return done / updates, (most if most > 0 else math.ceil(self.args.num_train_epochs * updates)) - done

    def _hand_over(self, reports: list[Tensor], skipped: bool) -> None:
        for losses in reports:
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
