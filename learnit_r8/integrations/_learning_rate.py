"""The scheduler's learning rate, set where it takes effect: right before `optimizer.step()`."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from learnit_r8.scheduler import R8Scheduler

_SCALE = "r8_scale"
"""Key of a parameter group's factor; it is saved and restored with the optimizer."""


def set_lr(optimizer: Any, lr: float) -> list[float]:
    """Set the learning rate of every parameter group.

    Groups keep their proportions: the one that was given the largest learning rate gets `lr`,
    the others the same fraction of it that they were created with.

    Args:
        optimizer: A torch optimizer, or a wrapper with `param_groups`.
        lr: Learning rate of this step.

    Returns:
        The learning rate of each group.
    """
    rates = [lr * scale for scale in scales(optimizer)]
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
        rates = [float(group["lr"]) for group in groups]
        largest = max(rates)
        for group, rate in zip(groups, rates, strict=True):
            group[_SCALE] = rate / largest if largest > 0 else 1.0
    return [group.setdefault(_SCALE, 1.0) for group in groups]


class LearningRateHook:
    """Sets the learning rate before each step, and says once when someone else sets it too.

    Args:
        scheduler: Knows the learning rate.
        optimizer: Gets it.

    Attributes:
        lr: Learning rate of the last step.
    """

    def __init__(self, scheduler: R8Scheduler, optimizer: Optimizer) -> None:
        self.lr = scheduler.lr
        self._scheduler = scheduler
        self._expected: list[float] | None = None
        self._warned = False
        scales(optimizer)  # before anything changes the rates
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        rates = [group["lr"] for group in optimizer.param_groups]
        if self._expected is not None and not self._warned and not _equal(rates, self._expected):
            self._warned, rates = True, [float(rate) for rate in rates]
            warnings.warn(
                f"something else set the learning rate to {rates}, R8Scheduler had set {self._expected} and sets its "
                "own at every step: remove the other learning-rate scheduler",
                RuntimeWarning,
                stacklevel=2,
            )
        self.lr = self._scheduler.lr_now()
        self._expected = set_lr(optimizer, self.lr)

    def _after_load(self, optimizer: Optimizer) -> None:
        self._expected = None

    def remove(self) -> None:
        """Leave the optimizer alone from now on."""
        for handle in self._handles:
            handle.remove()


def _equal(left: list[Any], right: list[float]) -> bool:
    if len(left) != len(right):
        return False
    return all(a is b or math.isclose(float(a), b, rel_tol=1e-6) for a, b in zip(left, right, strict=True))


def follow_lr(scheduler: R8Scheduler, optimizer: Any) -> LearningRateHook:
    """Let an optimizer use the scheduler's learning rate from now on; nothing else needs to set it.

    The rate is that of the batch whose loss is reported next, so report a loss after its
    `optimizer.step()`. A rollback's lower rate counts at once, also for batches that a loader
    had drawn before it.

    Args:
        scheduler: Knows the learning rate.
        optimizer: A torch optimizer, or one wrapped by Accelerate. Its groups keep their
            proportions, see `set_lr`.

    Returns:
        The hook; `remove()` undoes it.
    """
    return LearningRateHook(scheduler, unwrapped(optimizer))


def unwrapped(optimizer: Any) -> Optimizer:
    """Return the optimizer inside Accelerate's wrapper, which has no hooks of its own."""
    while not hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer  # type: ignore[no-any-return]
