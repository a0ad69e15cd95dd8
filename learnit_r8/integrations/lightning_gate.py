"""The gate before Lightning's optimizer step: gradients clipped at the scheduler's norm, bad batches left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from learnit_r8.errors import ConfigError
from learnit_r8.integrations.torch.gradients import clip_gradients


class StepGate:
    """Clips where the scheduler has `clip`, and asks it before each optimizer step where it `checks`."""

    def __init__(self, callback: Any, *, checks: bool) -> None:
        self._callback, self._checks = callback, checks
        self._leaves_out = False
        self._losses: Any = None  # of the batch that is trained on
        self._undo: list[Callable[[], None]] = []

    def problems(self, trainer: Trainer) -> list[str]:
        """Return what Lightning was asked for that does not go with it."""
        module, clips = trainer.lightning_module, self._callback.scheduler.clips
        found = []
        if not (asked := " and ".join(["clip="] * clips + ["check=True"] * self._checks)):
            return []
        if (kind := type(trainer.strategy).__name__) in ("FSDPStrategy", "DeepSpeedStrategy"):
            found.append(f"{asked}: under {kind} no rank sees a whole gradient before the step: leave it out")
        if not module.automatic_optimization:
            if self._checks:
                found.append(
                    "check=True of R8Callback: this module takes its own steps (automatic_optimization=False): leave "
                    "it out, and call scheduler.check before optimizer.step() in its training_step"
                )
            return found
        if clips and trainer.gradient_clip_val:
            found.append(
                f"gradient_clip_val={trainer.gradient_clip_val} of the Trainer and clip= of R8Scheduler both clip: "
                "give one"
            )
        hook = type(module).configure_gradient_clipping
        if clips and hook is not LightningModule.configure_gradient_clipping:
            found.append("configure_gradient_clipping of the module and clip= of R8Scheduler both clip: give one")
        return found

    def start(self, trainer: Trainer) -> None:
        """Stand around the training step and the optimizer's."""
        module: Any = trainer.lightning_module
        if not (self._checks or self._callback.scheduler.clips) or not module.automatic_optimization:
            return
        (optimizer,) = trainer.optimizers
        if getattr(optimizer, "_step_supports_amp_scaling", False) and getattr(
            trainer.precision_plugin, "scaler", None
        ):
            raise ConfigError(
                "clip= and check= need gradients that are unscaled before the step, which this optimizer does within "
                "it: create it with fused=False"
            )
        if not self._checks:
            return
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigError("check=True: LBFGS evaluates the loss many times a step, none of which can be left out")
        self._wrap(module, "training_step", self._train)
        self._wrap(optimizer, "step", self._step)

    def stop(self) -> None:
        """Leave both alone."""
        while self._undo:
            self._undo.pop()()
        self._losses, self._leaves_out = None, False

    def _wrap(self, thing: Any, name: str, around: Callable[..., Any]) -> None:
        inner = getattr(thing, name)

        @wraps(inner)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return around(inner, *args, **kwargs)

        own = vars(thing).get(name)
        setattr(thing, name, wrapped)
        self._undo.append(lambda: delattr(thing, name) if own is None else setattr(thing, name, own))

    def _train(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = inner(*args, **kwargs)
        self._losses = None if self._callback.looking else losses_of(outputs, 1)
        return outputs

    def _step(self, inner: Any, closure: Any = None, **kwargs: Any) -> Any:
        if closure is None:
            return None if self._leaves_out else inner(**kwargs)
        with torch.enable_grad():
            loss = closure()  # Lightning computes the gradients within the step
        return loss if self._leaves_out else inner(closure=lambda: loss, **kwargs)

    def take_losses(self) -> Any:
        """Return the losses of the batch that was trained on, where they are known, and forget them."""
        losses, self._losses = self._losses, None
        return losses

    def before_step(self, trainer: Trainer, pending: list[Any]) -> None:
        """Clip, and ask; `pending` are the losses of the batches before that share the step."""
        self._leaves_out = False
        scheduler, module = self._callback.scheduler, trainer.lightning_module
        if not (self._checks or scheduler.clips) or not module.automatic_optimization:
            return
        norm = clip_gradients(scheduler, module)
        if not self._checks:
            return
        if getattr(trainer.precision_plugin, "scaler", None) is not None and not math.isfinite(float(norm)):
            return  # an overflow: the scaler leaves the step out itself, and that is no fault
        known = [
            pair for pair in zip(scheduler.open_batches, [*pending, self._losses], strict=False) if pair[1] is not None
        ]
        if known:
            batches, losses = zip(*known, strict=True)
            self._leaves_out = not scheduler.check(list(losses), batch=list(batches))


def losses_of(outputs: Any, accumulated: int) -> Any:
    """Return the losses of a training step, or None where it was left out."""
    if isinstance(outputs, Mapping):
        if outputs.get("r8_losses") is not None:
            return outputs["r8_losses"].detach()
        outputs = outputs.get("loss")
    # Lightning divides the loss by the number of batches that are accumulated.
    return None if outputs is None else outputs.detach() * accumulated
