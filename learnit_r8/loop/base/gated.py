"""The gate before the optimizer's step: what a batch's loss and gradient say of it while nothing is done yet."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from learnit_r8 import events
from learnit_r8.loop.arguments import Arguments
from learnit_r8.loop.base.steps import Steps
from learnit_r8.loop.in_flight import Ticket
from learnit_r8.loop.losses import Reported, read_losses, read_number
from learnit_r8.types import Batch, StepResult, Verdict


class _Checked(NamedTuple):
    """What was checked of a batch: its loss as it was given and as it was read, and why no step is to be taken."""

    batch: Batch
    loss: Any
    reported: Reported | None
    why: str


class Gated(Steps):
    """A run whose steps can be asked about before they are taken."""

    def __init__(self, args: Arguments) -> None:
        super().__init__(args)
        self._checks: dict[int, _Checked] = {}  # by the batch's id
        self._clips = args.config.clip is not None
        self._clipper_seen = False
        self._norm: Any = None  # that a clipper found, still to be read

    def check(self, loss: Any = None, grad_norm: Any = None, *, batch: Batch | None = None) -> StepResult:
        """Ask, before `optimizer.step()`, whether to take it: a falsy answer means leave this step out.

            if scheduler.check(losses, grad_norm=norm):
                optimizer.step()
            scheduler.update_with_loss(losses)

        A step is left out whose loss or norm is not finite, or stands far above all that the run has shown. The
        report that follows (it is due as ever; without a loss it takes the one that was checked, and nothing is read
        twice) names it as skipped; it costs no rollback. What stands out in more than three steps in a row, or in
        more than one in 48 for long, is a level and no outlier: it is let through, which is told. All ranks have to
        call it, and get one answer.

        Args:
            loss: As for `update_with_loss`; None where only the norm is to be judged.
            grad_norm: Norm of the gradient of the step, before clipping: a number or a tensor, read once. The one of
                `clip_gradients` where None.
            batch: Which batch; the one that the loop got last when None.

        Returns:
            Truthy to take the step; else the verdict is `nonfinite` or `suspect`.

        Raises:
            ProtocolError: No such batch is open, or the number of losses is not the batch's.
            TypeError: Neither is given, or one is not a number (or, of losses, a 1-D array).
        """
        self._check_open()
        ticket = self._desk.find(self.current_batch if batch is None else batch)
        grad_norm, self._norm = self._norm if grad_norm is None else grad_norm, None
        if loss is None and grad_norm is None:
            raise TypeError("check got nothing to judge: give the batch's loss, the norm of its gradient, or both")
        reported = None if loss is None else read_losses(loss, len(ticket.batch.indices))
        norm = None if grad_norm is None else read_number("grad_norm", grad_norm)
        mean = None if reported is None else reported.mean if reported.finite else math.nan
        if self._ranks.world_size > 1:
            everyone = self._ranks.everyone(0.0 if mean is None else mean, 0.0 if norm is None else norm)
            with np.errstate(invalid="ignore"):
                mean = None if mean is None else float(everyone[:, 0].mean())
                norm = None if norm is None else float(everyone[:, 1].max())
        expected, why = math.nan, ""
        if self._search is None:
            if self._config.shard is None:  # else it is known once the losses are exchanged
                expected = self._catalog.look_up(ticket.indices).expected
            why = self._judge_step(mean, expected - self._catalog.usual, norm)
        before = self._checks.get(ticket.batch.id)
        if before is not None and before.batch is ticket.batch:  # of a loss and a norm that are checked one by one
            why = before.why or why
            loss, reported = (before.loss, before.reported) if reported is None else (loss, reported)
        self._checks[ticket.batch.id] = _Checked(ticket.batch, loss, reported, why)
        finite = (mean is None or math.isfinite(mean)) and (norm is None or math.isfinite(norm))
        verdict = Verdict.CALM if not why else Verdict.SUSPECT if finite else Verdict.NONFINITE
        mean = math.nan if mean is None else mean
        return StepResult(not why, False, verdict, mean, expected, mean - expected, self._progress.global_step)

    def clip_norm(self) -> float:
        """Return the norm that the next gradient is to be clipped at; infinite for not at all.

        It is the argument `clip` where that is a number. With "auto" it follows from the norms of the last 64 steps,
        and is infinite before the 16th.
        """
        clip = self._config.clip
        if isinstance(clip, str):
            return self._safety.gate.clip_at
        return math.inf if clip is None else clip

    def clip_problems(self, instead: str) -> list[str]:
        """Return what is wrong where a framework takes the steps: nobody could clip, unless by its own `instead`."""
        clip = self._config.clip
        return [] if clip is None else [f"clip={clip!r}: the steps are taken for you, leave it out and give {instead}"]

    def clipped(self, norm: Any) -> None:
        """Take the norm of a gradient that was clipped, as it was before; it is read when its batch is reported.

        For clippers such as `learnit_r8.integrations.torch.clip_gradients`.

        Args:
            norm: A number or a tensor.
        """
        self._norm, self._clipper_seen = norm, True

    def _judge_step(self, mean: float | None, excess: float, norm: float | None) -> str:
        gate = self._safety.gate
        why = gate.judge(self._safety.detector, mean, excess, norm)
        if gate.news:
            self.tell(gate.news)
        if norm is not None:
            self._show_norm(norm)
        return why

    def _show_norm(self, norm: float) -> None:
        if self._bus.sinks:
            self._bus.emit(events.MetricLogged(step=self._progress.global_step, name="grad_norm", value=norm))

    def _end_epoch(self, *, completed: bool) -> None:
        self._checks.clear()
        super()._end_epoch(completed=completed)

    def _reported(self, ticket: Ticket, loss: Any) -> tuple[Reported, str]:
        """Return a report, and why its step was to be left out; "" where it was not."""
        checked = self._checks.pop(ticket.batch.id, None)
        if checked is not None and checked.batch is not ticket.batch:  # it was handed out again since
            checked = None
        if self._clips and not self._clipper_seen:
            self._clipper_seen = True
            self.tell(
                f"clip={self._config.clip!r} and nothing clips: call clip_gradients(scheduler, model) of "
                "learnit_r8.integrations.torch before optimizer.step(), or clip at scheduler.clip_norm() and give "
                "the norm to scheduler.clipped()"
            )
        if self._norm is not None:
            norm, self._norm = read_number("grad_norm", self._norm), None
            if self._search is None:
                self._safety.gate.learn(norm)
                self._show_norm(norm)
        if checked is None or checked.reported is None or (loss is not None and loss is not checked.loss):
            return read_losses(loss, len(ticket.batch.indices)), "" if checked is None else checked.why
        return checked.reported, checked.why
