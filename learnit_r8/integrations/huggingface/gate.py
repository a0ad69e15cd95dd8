"""The gate before the Trainer's optimizer step: gradients clipped at the scheduler's norm, bad batches left out."""

from __future__ import annotations

import math
from typing import Any

from learnit_r8.integrations.huggingface.checks import default_of, is_grouped
from learnit_r8.integrations.huggingface.mixin import SampleLossMixin
from learnit_r8.integrations.torch.gradients import measure
from learnit_r8.scheduler import R8Scheduler


class GatedMixin(SampleLossMixin):
    """Clips where the scheduler has `clip`, and asks it before each optimizer step where that `check`s."""

    scheduler: R8Scheduler
    _check = False
    _norm: Any = None  # of this step's gradient, as `scheduler.clipped` takes it

    def _gate_problems(self) -> list[str]:
        """Return what the Trainer was asked for that does not go with it."""
        clips, args, found = self.scheduler.clips, self.args, []
        if not (asked := " and ".join(["clip="] * clips + ["check=True"] * self._check)):
            return []
        if self.is_deepspeed_enabled:
            found.append(
                f"{asked}: DeepSpeed clips and steps within its backward, where nobody can be asked: leave it out, and "
                "give max_grad_norm"
            )
        if str(getattr(args.optim, "value", args.optim)) in ("lomo", "adalomo"):
            found.append(f"{asked}: LOMO changes the weights within backward, before a gradient is known: leave it out")
        if clips and args.max_grad_norm not in (None, 0, default_of(args, "max_grad_norm")):
            found.append(f"max_grad_norm={args.max_grad_norm} of the Trainer and clip= both clip: give one")
        if self._check and is_grouped(self):
            found.append(
                "check=True: a batch of prompts is trained on in several steps, and its loss says little: leave it "
                "out, clip= of R8Scheduler has its place"
            )
        return found

    def _clip_grad_norm(self, model: Any) -> Any:
        if not (self.scheduler.clips or self._check):
            return super()._clip_grad_norm(model)
        args, scaler = self.args, self.accelerator.scaler
        given = args.max_grad_norm
        measured = None if scaler is not None else measure(self.model)
        args.max_grad_norm = self.scheduler.clip_norm() if self.scheduler.clips else given or math.inf
        try:
            norm = super()._clip_grad_norm(model)
        finally:
            args.max_grad_norm = given
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        if scaler is not None and (measured := measure(self.model)) is not None:  # it is unscaled by now
            measured = measured[0], measured[1] * (norm / measured[1][0])
        self._norm = norm, *(measured or ((), None))
        return norm

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None:  # max_grad_norm=0
            self._norm = None
            if self.scheduler.clips or self._check:
                grad_norm = self._clip_grad_norm(model)
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _before_step(self) -> None:
        taken, self._norm = self._norm, None
        if taken is None:
            return
        overflow = self.accelerator.scaler is not None and not math.isfinite(float(taken[0])) if self._check else False
        if overflow:  # the scaler leaves the step out itself, and that is no fault
            return
        self.scheduler.clipped(*taken)
        if self._check:
            self._read = self._read_notes()
            if not self.scheduler.check(self._read, batch=self.scheduler.open_batches[: len(self._read)]):
                self._leave_out()

    def _leave_out(self) -> None:
        """Let the optimizer's next step be none; a scaler goes on as after any step."""
        optimizer = self.optimizer
        own = vars(optimizer).get("step")

        def step(*_: Any, **__: Any) -> None:
            if own is None:
                del optimizer.step
            else:
                optimizer.step = own
            if (scaler := getattr(optimizer, "scaler", None)) is not None:
                scaler.update()
                optimizer._is_overflow = False

        optimizer.step = step
