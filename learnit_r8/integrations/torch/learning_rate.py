"""The scheduler's learning rate, set where it takes effect: right before `optimizer.step()`.

The scheduler owns the rate, parameter groups own their proportions. A group's scale is its given rate over the largest
one of all optimizers that follow the scheduler, fixed when the first of them takes a step; groups and optimizers that
come later get theirs on the same measure. A rate that somebody changes in between is one of three things: of one group
among several, or to or from 0, it is a new proportion; of all groups alike by ReduceLROnPlateau it lowers the rest of
the schedule; else it is a second owner of the rate, which is overruled and named.
"""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.hooks import RemovableHandle

from learnit_r8.scheduler import R8Scheduler

_SCALE = "r8_scale"
"""Key of a parameter group's factor; it is saved and restored with the optimizer."""


def set_lr(optimizer: Any, lr: float, shares: list[float] | None = None) -> list[float]:
    """Set the learning rate of every parameter group.

    Groups keep their proportions: the one that was given the largest learning rate gets `lr`,
    the others the same fraction of it that they were created with.

    Args:
        optimizer: A torch optimizer, or a wrapper with `param_groups`.
        lr: Learning rate of this step.
        shares: Each group's fraction, where it is known.

    Returns:
        The learning rate of each group.
    """
    rates = [lr * share for share in shares or scales(optimizer)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):  # capturable optimizers read it on the device
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    return rates


def scales(optimizer: Any) -> list[float]:
    """Return each parameter group's share of the learning rate; the first call fixes them."""
    groups = optimizer.param_groups
    if not any(_SCALE in group for group in groups):
        rates = [_given(group) for group in groups]
        _scale(groups, rates, max(rates))
    return [group.setdefault(_SCALE, 1.0) for group in groups]


def _given(group: dict[str, Any]) -> float:
    """Return the rate that a group was given, also where torch's schedulers have begun to change it."""
    return float(group.get("initial_lr", group["lr"]))


def _scale(groups: list[dict[str, Any]], rates: list[float], largest: float) -> None:
    for group, rate in zip(groups, rates, strict=True):
        group[_SCALE] = rate / largest if largest > 0 else 1.0


class _Run:
    """The optimizers of one scheduler, and what their rates are measured by."""

    def __init__(self) -> None:
        self.largest = 0.0
        self.started = False
        self._new: list[tuple[list[dict[str, Any]], list[float]]] = []  # groups and their rates, until the first step

    def join(self, optimizer: Optimizer) -> None:
        """Let an optimizer's groups have their scales."""
        groups = [group for group in optimizer.param_groups if _SCALE not in group]
        rates = [_given(group) for group in groups]
        # Groups with a scale have followed a scheduler, maybe in another process: what they were given is lost.
        known = rates or [float(optimizer.defaults.get("lr", 0.0))]
        if self.started and self.largest > 0:
            _scale(groups, rates, self.largest)
            return
        self.largest = max(self.largest, *known)
        self._new.append((groups, rates))
        for others, theirs in self._new:
            _scale(others, theirs, self.largest)

    def start(self) -> None:
        """Fix the measure."""
        self.started = True
        self._new.clear()


_runs: weakref.WeakKeyDictionary[R8Scheduler, _Run] = weakref.WeakKeyDictionary()
_hooks: weakref.WeakKeyDictionary[Optimizer, LearningRateHook] = weakref.WeakKeyDictionary()


class LearningRateHook:
    """Sets the learning rate before each step while the scheduler's run goes on, and heeds who else sets it.

    Args:
        scheduler: Knows the learning rate.
        optimizer: Gets it. A hook of another scheduler is taken from it.
        relative: What others set is meant relative to the present rate; False: to the highest one to come.

    Attributes:
        lr: Learning rate of the last step.
    """

    def __init__(self, scheduler: R8Scheduler, optimizer: Optimizer, *, relative: bool = False) -> None:
        self.lr = scheduler.lr
        self.relative = relative
        self._scheduler = weakref.ref(scheduler)
        self._optimizer = weakref.ref(optimizer)
        self._expected: list[float] | None = None
        self._scales: list[float] = []
        self._owners: list[str] | None = None
        self._warned = False
        if optimizer in _hooks:
            _hooks[optimizer].remove()
        _hooks[optimizer] = self
        self._run = _runs.setdefault(scheduler, _Run())
        self._run.join(optimizer)
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("the hook of follow_lr belongs to one optimizer: call follow_lr(scheduler, optimizer) again")

    def set_now(self) -> None:
        """Set the rate of the step that comes next, for who looks at it before."""
        optimizer, scheduler = self._optimizer(), self._scheduler()
        if optimizer is not None and scheduler is not None and scheduler.running:
            self._set(scheduler, optimizer, scheduler.next_lr)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        scheduler = self._scheduler()
        if scheduler is not None and scheduler.running:
            self._set(scheduler, optimizer, scheduler.lr_now())
        else:  # the optimizer is its user's again
            self._expected = None

    def _set(self, scheduler: R8Scheduler, optimizer: Optimizer, lr: float) -> None:
        groups, expected = optimizer.param_groups, self._expected
        known = expected is not None and len(groups) == len(expected)
        if known:  # nearly always each rate is the very object that was set here
            for group, rate in zip(groups, expected or (), strict=True):
                if group["lr"] is not rate:
                    known = False
        if not known:
            self._look(scheduler, optimizer)
            lr = scheduler.lr_now() if scheduler.open_batches else scheduler.next_lr  # scaled perhaps
            self._expected = set_lr(optimizer, lr, self._scales)
        elif lr != self.lr:
            self._expected = rates = [lr * scale for scale in self._scales]
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
        self.lr = lr

    def _look(self, scheduler: R8Scheduler, optimizer: Optimizer) -> None:
        """Take in what has changed about the groups since the last step."""
        groups = optimizer.param_groups
        if any(_SCALE not in group for group in groups):
            self._welcome(optimizer)
        self._run.start()
        if self._expected is not None:
            self._heed(scheduler, groups, [float(group["lr"]) for group in groups], self._expected)
        self._scales = scales(optimizer)

    def _welcome(self, optimizer: Optimizer) -> None:
        """Let groups that were added have their scales."""
        if not (self.relative and self._expected):
            self._run.join(optimizer)
            return
        late = [group for group in optimizer.param_groups if _SCALE not in group]
        _scale(late, [float(group["lr"]) for group in late], self.lr)

    def _heed(
        self, scheduler: R8Scheduler, groups: list[dict[str, Any]], rates: list[float], expected: list[float]
    ) -> None:
        """Work out what it means that somebody else set rates."""
        known = range(min(len(groups), len(expected)))
        changed = [k for k in known if not math.isclose(rates[k], expected[k], rel_tol=1e-6)]
        if not changed:
            return
        if self._owners is None:
            self._owners = _owners(groups)
        ratios = {round(rates[k] / expected[k], 6) for k in known if expected[k] > 0}
        alike = len(ratios) == 1 and ratios != {0.0} and all(expected[k] > 0 for k in changed)
        if self._owners == [ReduceLROnPlateau.__name__] and alike:
            scheduler.scale_lr(rates[changed[0]] / expected[changed[0]], ReduceLROnPlateau.__name__)
        elif self._owners or alike:
            self._overrule(rates, expected)
        else:
            highest = self.lr if self.relative else scheduler.highest_lr_ahead()
            for k in changed:
                groups[k][_SCALE] = rates[k] / highest if highest > 0 else 1.0

    def _overrule(self, rates: list[float], expected: list[float]) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"{' and '.join(self._owners or ()) or 'code beside R8Scheduler'} set the learning rate to {rates}, "
            f"R8Scheduler had set {expected} and sets its own at every step: remove the other learning-rate scheduler, "
            "or give it as scheduler_mode, a function of progress in [0, 1] that returns a factor of the peak",
            RuntimeWarning,
            stacklevel=4,
        )

    def _after_load(self, optimizer: Optimizer) -> None:
        self._expected = None
        scheduler = self._scheduler()
        rolled_back = scheduler is not None and scheduler.running
        if len(self._scales) == len(optimizer.param_groups):
            for group, scale in zip(optimizer.param_groups, self._scales, strict=True):
                # What was frozen or unfrozen since a backup stays so; a state of before the run says nothing of it.
                group[_SCALE] = scale if rolled_back else group.get(_SCALE, scale)

    def remove(self) -> None:
        """Leave the optimizer alone from now on."""
        for handle in self._handles:
            handle.remove()


def has_stepped(optimizer: Optimizer) -> bool:
    """Say whether an optimizer has taken a step since it follows a scheduler."""
    return optimizer in _hooks and bool(_hooks[optimizer]._scales)


def _owners(groups: list[dict[str, Any]]) -> list[str]:
    """Return the names of torch's learning-rate schedulers that live on the optimizer of these groups."""
    kinds = [one for one in gc.get_objects() if issubclass(type(one), LRScheduler)]
    theirs = [one for one in kinds if getattr(getattr(one, "optimizer", None), "param_groups", None) is groups]
    return sorted({type(one).__name__ for one in theirs if not type(one).__module__.startswith("learnit_r8.")})


def follow_lr(scheduler: R8Scheduler, optimizer: Any, *, relative: bool = False) -> LearningRateHook:
    """Let an optimizer use the scheduler's learning rate while the run goes on; nothing else needs to set it.

    The rate is that of the batch whose loss is reported next, so report a loss after its
    `optimizer.step()`. A rollback's lower rate counts at once, also for batches that a loader
    had drawn before it.

    Groups, and the optimizers of one scheduler (a GAN's two), keep the proportions of the rates that they were given:
    the largest is the scheduler's, one that was given a tenth of it, or comes later with a tenth of it, has a tenth.
    Setting a group's `"lr"` in the run freezes it (0), or makes the number its highest rate from then on. torch's
    ReduceLROnPlateau lowers the rest of the schedule; any other scheduler of the rate is overruled and named.

    Args:
        scheduler: Knows the learning rate.
        optimizer: A torch optimizer, or one wrapped by Accelerate.
        relative: A number that is set in the run is meant for now, not for the highest rate to come.

    Returns:
        The hook; `remove()` undoes it.
    """
    inner = unwrapped(optimizer)
    if any(is_sharded(parameter) for group in inner.param_groups for parameter in group["params"]):
        scheduler.expect_sharded_model()
    return LearningRateHook(scheduler, inner, relative=relative)


def is_sharded(parameter: Any) -> bool:
    """Whether a rank may hold a part of a parameter only: a DTensor, or one of FSDP 1 or of DeepSpeed ZeRO-3."""
    return any(hasattr(parameter, name) for name in ("placements", "_fsdp_flattened", "_is_flat_param", "ds_id"))


def unwrapped(optimizer: Any) -> Optimizer:
    """Return the optimizer inside Accelerate's wrapper, which has no hooks of its own."""
    while not hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer  # type: ignore[no-any-return]
