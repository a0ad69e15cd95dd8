"""The gate before the optimizer's step: what a batch's loss and gradient say of it while nothing is done yet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from learnit_r8 import events
from learnit_r8.errors import ProtocolError
from learnit_r8.loop.arguments import Arguments
from learnit_r8.loop.base.steps import Steps
from learnit_r8.loop.in_flight import Ticket
from learnit_r8.loop.losses import Reported, read_losses, read_number
from learnit_r8.run.metric import GRADIENT
from learnit_r8.samples.catalog import Rows
from learnit_r8.stability.gate import Seen
from learnit_r8.types import Batch, StepResult, Verdict

_PARTS_EVERY = 8
"""Steps between two times that the norms of a model's parts are told; where a step is left out they are at once."""


_LEAST_KNOWN, _SMALL = 4, 0.02
"""Samples of a batch, and a share of the usual loss: differences between losses below it say nothing."""


class _Checked(NamedTuple):
    """What was checked of a batch: its loss as it was given and as it was read, and why no step is to be taken."""

    batch: Batch
    loss: Any
    reported: Reported | None
    why: str


class _Norm(NamedTuple):
    """What a clipper found, still to be read: the norm, the names of the model's parts, and the norm with theirs."""

    whole: Any
    names: Sequence[str] = ()
    each: Any = None

    def read(self) -> tuple[float, dict[str, float]]:
        if not self.names:
            return read_number("grad_norm", self.whole), {}
        whole, *parts = (self.each.detach() if hasattr(self.each, "detach") else self.each).tolist()
        return whole, dict(zip(self.names, parts, strict=True))


class Gated(Steps):
    """A run whose steps can be asked about before they are taken."""

    def __init__(self, args: Arguments) -> None:
        super().__init__(args)
        self._checks: dict[int, _Checked] = {}  # by the batch's id
        self._clips = args.config.clip is not None
        self._clipper_seen = False
        self._norm: _Norm | None = None
        self._parts_told = -_PARTS_EVERY  # the step at which they were

    def check(
        self, loss: Any = None, grad_norm: Any = None, *, batch: Batch | Sequence[Batch] | None = None
    ) -> StepResult:
        """Ask, before `optimizer.step()`, whether to take it: a falsy answer means leave this step out.

            if scheduler.check(losses, grad_norm=norm):
                optimizer.step()
            scheduler.update_with_loss(losses)

        A step is left out whose loss or norm is not finite, or stands far above all that the run has shown. The
        report that follows (it is due as ever; without a loss it takes the one that was checked, and nothing is read
        twice) names it as skipped; it costs no rollback. What comes again as high, or in more than one step of 48 for
        long, is a level and no outlier: it is let through, which is told. All ranks have to call it, and get one
        answer.

        Args:
            loss: As for `update_with_loss`; None where only the norm is to be judged.
            grad_norm: Norm of the gradient of the step, before clipping: a number or a tensor, read once. The one of
                `clip_gradients` where None.
            batch: Which batch; the one that the loop got last when None. Of several that share the step, a list, and
                `loss` then is a list of theirs: the step is left out where one of them stands out.

        Returns:
            Truthy to take the step; else the verdict is `nonfinite` or `suspect`.

        Raises:
            ProtocolError: No such batch is open, or the number of losses is not the batch's.
            TypeError: Neither is given, or one is not a number (or, of losses, a 1-D array).
        """
        self._check_open()
        one = batch is None or isinstance(batch, Batch)
        batches: Any = [self.current_batch if batch is None else batch] if one else batch
        tickets = [self._desk.find(found) for found in batches]
        given = [loss] * len(tickets) if one or loss is None else list(loss)
        if len(given) != len(tickets):
            raise ProtocolError(f"check got {len(tickets)} batches and {len(given)} losses: give one for each batch")
        clipped, self._norm = self._norm, None
        if loss is None and grad_norm is None and clipped is None:
            raise TypeError("check got nothing to judge: give the batch's loss, the norm of its gradient, or both")
        reports = [
            None if loss is None else read_losses(each, len(ticket.batch.indices))
            for each, ticket in zip(given, tickets, strict=True)
        ]
        norm: float | None = None
        parts: dict[str, float] = {}
        if clipped is not None and (grad_norm is None or grad_norm is clipped.whole):
            norm, parts = clipped.read()
        elif grad_norm is not None:
            norm = read_number("grad_norm", grad_norm)
        sharded = self._config.shard is not None  # then it is known once the losses are exchanged
        looked_up = [None if sharded else self._catalog.look_up(ticket.indices) for ticket in tickets]
        expected = [math.nan if rows is None else rows.expected for rows in looked_up]
        seen = [
            Seen(r.mean if r.finite else math.nan, math.nan, self._shift(ticket, rows, r))
            for ticket, rows, r in zip(tickets, looked_up, reports, strict=True)
            if r is not None
        ]
        seen, norm = self._of_all_ranks(seen, norm)
        return self._answer(tickets, given, reports, seen, expected, norm, parts)

    def _shift(self, ticket: Ticket, rows: Rows | None, reported: Reported) -> float:
        """Return by how much the samples stand above what is expected of each, as the median of the logarithms."""
        values, usual = reported.values, abs(self._safety.detector.usual)
        if rows is None or values is None or not reported.finite or not usual > 0.0:
            return math.nan
        expected = self._catalog.estimates(rows)
        if ticket.order is not None:
            expected = expected[ticket.order[self._ranks.slice]]
        known = expected > 0.0
        count = int(np.count_nonzero(known))
        if count < max(_LEAST_KNOWN, len(values) // 2):
            return math.nan
        if count < len(values):
            values, expected = values[known], expected[known]
        small = np.float32(_SMALL * usual)
        ratios = (values + small) / (expected + small)
        ratios.sort()
        middle = float(ratios[count // 2])
        return math.log(middle) if middle > 0.0 else math.nan

    def _of_all_ranks(self, seen: list[Seen], norm: float | None) -> tuple[list[Seen], float | None]:
        """Return each batch's means over the ranks, and the highest norm."""
        if self._ranks.world_size == 1:
            return seen, norm
        everyone = self._ranks.everyone(*(x for one in seen for x in (one.loss, one.shift)), 0.0, norm or 0.0)
        with np.errstate(invalid="ignore"):
            means = everyone.mean(axis=0)
            shared = [Seen(float(means[2 * k]), math.nan, float(means[2 * k + 1])) for k in range(len(seen))]
            return shared, None if norm is None else float(everyone[:, -1].max())

    def _answer(
        self, tickets: list[Ticket], given: list[Any], reports: list[Reported | None], seen: list[Seen],
        expected: list[float], norm: float | None, parts: dict[str, float],
    ) -> StepResult:  # fmt: skip
        why = ""
        if self._search is None:
            usual = self._catalog.usual
            losses = [one._replace(excess=before - usual) for one, before in zip(seen, expected, strict=False)]
            why = self._safety.gate.judge(self._safety.detector, losses, norm)
            if self._safety.gate.news:
                self.tell(self._safety.gate.news)
            if why and norm is not None and parts and max(parts.values()) > 0.7 * norm:
                why += f", most of it in {max(parts, key=parts.__getitem__)}"
            if norm is not None:
                self._show_norm(norm, parts, left_out=bool(why))
        for ticket, loss, reported in zip(tickets, given, reports, strict=True):
            before = self._checks.get(ticket.batch.id)
            if before is not None and before.batch is ticket.batch:  # of a loss and a norm that are checked one by one
                why = before.why or why
                loss, reported = (before.loss, before.reported) if reported is None else (loss, reported)
            self._checks[ticket.batch.id] = _Checked(ticket.batch, loss, reported, why)
        known = [one.loss for one in seen]
        finite = all(map(math.isfinite, known)) and (norm is None or math.isfinite(norm))
        verdict = Verdict.CALM if not why else Verdict.SUSPECT if finite else Verdict.NONFINITE
        mean = sum(known) / len(known) if known else math.nan
        usually = sum(expected) / len(expected)
        return StepResult(not why, False, verdict, mean, usually, mean - usually, self._progress.global_step)

    def clip_norm(self) -> float:
        """Return the norm that the next gradient is to be clipped at; infinite for not at all.

        It is the argument `clip` where that is a number. With "auto" it follows from the norms of the last 64 steps,
        and is infinite before the 16th.
        """
        clip = self._config.clip
        if isinstance(clip, str):
            return self._safety.gate.clip_at
        return math.inf if clip is None else clip

    @property
    def clips(self) -> bool:
        """Whether gradients are to be clipped: `clip` is given."""
        return self._clips

    def clipped(self, norm: Any, names: Sequence[str] = (), norms: Any = None) -> None:
        """Take the norm of a gradient that was clipped, as it was before; it is read when its batch is reported.

        For clippers such as `learnit_r8.integrations.torch.clip_gradients`.

        Args:
            norm: A number or a tensor.
            names: Of parts of the model whose norms are known, too.
            norms: An array or tensor `[1 + parts]`: `norm`, then those of the parts; it alone is read then.
        """
        self._norm, self._clipper_seen = _Norm(norm, names, norms), True

    def _show_norm(self, norm: float, parts: Mapping[str, float], *, left_out: bool = False) -> None:
        if not self._bus.sinks:
            return
        step = self._progress.global_step
        self._bus.emit(events.MetricLogged(step=step, name=GRADIENT, value=norm))
        if parts and (left_out or not 0 <= step - self._parts_told < _PARTS_EVERY):
            self._parts_told = step
            for name, value in parts.items():
                self._bus.emit(events.MetricLogged(step=step, name=f"{GRADIENT}/{name}", value=value))

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
            (norm, parts), self._norm = self._norm.read(), None
            if self._search is None:
                self._safety.gate.learn(norm)
                self._show_norm(norm, parts)
        if checked is None or checked.reported is None or (loss is not None and loss is not checked.loss):
            return read_losses(loss, len(ticket.batch.indices)), "" if checked is None else checked.why
        return checked.reported, checked.why
