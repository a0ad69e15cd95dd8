"""What was measured beside the training loss, and what follows: patience, the plateau, a verdict on overfitting.

It decides; the loop does what it says. All of it is part of the run's state, so a resumed run decides the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from learnit_r8 import events
from learnit_r8.core.config import Evaluation
from learnit_r8.core.state import Saved, each, finite, maybe, part, row, table
from learnit_r8.loop.budget import Budget
from learnit_r8.loop.counters import NEVER, Progress, Stage
from learnit_r8.loop.evaluation.averages import Averages
from learnit_r8.schedules import Plateau, Reduction
from learnit_r8.stability.overfitting import overfitting

_KEPT = 512
"""Evaluations that the verdict looks back on."""
_RETURNS = 3
"""Returns to the best value without a new one."""
_UNSEEN_EPOCHS = 2
"""Epochs after which a metric that something waits for is missed."""


class Measured(Saved):
    """The metric of `Evaluation`, and that of a plateau.

    Attributes:
        next_due: Step at which the loop has something to do; 0: at once.
        restore_due: The model has to go back to the best value.
        evaluated: Step of the last call of `run`, and the epoch that it belongs to, -1: none.
    """

    _saved = table(
        metric=str,
        best=finite(math.nan),
        best_step=int,
        wait=int,
        returns=int,
        last=maybe(finite(math.nan)),
        restore_due=bool,
        evaluated=row(int, int),
        past=row(float, int),
        seen=row(float, int),
        history=each(row(int, int, finite(math.nan), finite(math.nan))),
        overfits_since=int,
        reduction=maybe(part()),
    )

    def __init__(
        self, rule: Evaluation | None, saved: Mapping[str, Any] | None, plateau: Plateau | None, budget: Budget
    ) -> None:
        self.rule = rule or Evaluation()
        self._budget = budget
        self._sign = -1.0 if saved and saved["mode"] == "max" else 1.0
        self.metric = self.rule.metric
        self.reduction = None if plateau is None else Reduction(plateau)
        self.ema = None if self.rule.ema is None else Averages(self.rule.ema)
        self.best, self.best_step, self.wait, self.returns = math.nan, 0, 0, 0
        self.last: float | None = None  # of those that count
        self.evaluated = (-1 if self.rule.every == "epoch" else 0), -1
        self.past = self.seen = (0.0, 0)  # sum and number of losses: of ended epochs, and at the last evaluation
        self.history: list[tuple[int, int, float, float]] = []  # step, epoch, training loss, metric
        self.overfits_since, self.restore_due = -1, False
        self.next_due = self.rule.every if self.rule.run and isinstance(self.rule.every, int) else NEVER
        self._unseen = 0  # epochs

    @property
    def acts(self) -> bool:
        """Whether anything of the run depends on a metric, so that all ranks have to hear of it."""
        return self.reduction is not None or self._stops

    @property
    def _stops(self) -> bool:
        rule = self.rule
        thresholds = (rule.stop_after, rule.stopping_threshold, rule.divergence_threshold)
        return rule.goes_back or any(value is not None for value in thresholds)

    def missing(self, *, ended: bool = False) -> str:
        """Return what to tell where a metric that something waits for has not come, or ""."""
        if not self.acts or not (ended or self._unseen >= _UNSEEN_EPOCHS):
            return ""
        lacks = [self.metric] if self._stops and not self.history and self.last is None else []
        plateau = self.reduction
        if plateau is not None and math.isnan(plateau.best) and not plateau.bad and plateau.rule.metric not in lacks:
            lacks.append(plateau.rule.metric)
        if not lacks:
            return ""
        wanted = " and ".join(f"{name}=..." for name in lacks)
        return (
            f"what is to be acted on was never logged: scheduler.log({wanted}), or return it from Evaluation(run=...)"
        )

    # Evaluations ----------------------------------------------------------------------------

    def due(self, progress: Progress, *, last: bool = False) -> bool:
        """Whether `run` is to be called where the run stands; `last`: it ends here."""
        if self.rule.run is None or progress.global_step == self.evaluated[0]:
            return False
        if last:
            return progress.global_step > 0 and not self._budget.ended
        if isinstance(self.rule.every, int):
            return progress.global_step // self.rule.every > max(self.evaluated[0], 0) // self.rule.every
        return progress.stage is Stage.DONE and self.evaluated[1] != progress.epoch

    def note_evaluated(self, progress: Progress) -> None:
        """Take note that `run` was called."""
        self.evaluated = progress.global_step, progress.epoch
        self._plan()

    def restored(self) -> None:
        """Take note that the model went back."""
        self.restore_due = False
        self._plan()

    def end_epoch(self, progress: Progress) -> None:
        """Take note of an epoch's losses."""
        self.past = self.past[0] + progress.loss_sum, self.past[1] + progress.accepted
        self._unseen += 1

    def _plan(self) -> None:
        every = self.rule.every
        if self.restore_due:
            self.next_due = 0
        elif self.rule.run is not None and isinstance(every, int):
            self.next_due = (max(self.evaluated[0], 0) // every + 1) * every
        else:
            self.next_due = NEVER

    def _train_loss(self, progress: Progress) -> float:
        """Return the mean of the losses since the last evaluation."""
        total, count = self.past
        if progress.stage is Stage.RUNNING:
            total, count = total + progress.loss_sum, count + progress.accepted
        mean = (total - self.seen[0]) / (count - self.seen[1]) if count > self.seen[1] else math.nan
        self.seen = total, count
        return mean

    # What follows ---------------------------------------------------------------------------

    def observe(self, progress: Progress, values: Mapping[str, float]) -> Iterator[events.Event]:
        """Take logged numbers; yield what is to be told of them."""
        step = progress.global_step
        if self.reduction is not None and self.reduction.rule.metric in values:
            yield from self._reduce(step, values[self.reduction.rule.metric])
        if self.metric not in values:
            return
        value = values[self.metric]
        if progress.epoch >= self.rule.start_from_epoch:
            yield from self._judge(step, value)
        train = self._train_loss(progress)
        self.history = [*self.history[1 - _KEPT :], (step, progress.epoch, train, value)]
        yield events.Evaluated(
            step=step, epoch=progress.epoch, metric=self.metric, value=value, train_loss=train, best=self.best,
            best_step=self.best_step, waited=self.wait,
        )  # fmt: skip
        yield from self._compare(step, progress.epoch)

    def _reduce(self, step: int, value: float) -> Iterator[events.Event]:
        assert self.reduction is not None
        rule, before = self.reduction.rule, self._budget.peak * self.reduction.scale
        if self.reduction.observe(value, self._budget.peak):
            self._budget.reduced, self._budget.scaled = self.reduction.scale, True
            now = self._budget.peak * self.reduction.scale
            yield events.Notice(
                step=step,
                message=f"{rule.metric} has had {rule.patience + 1} values no better than its best of "
                f"{self.reduction.best:.4g}: the learning rate's peak goes from {before:.3g} to {now:.3g}",
            )

    def _judge(self, step: int, value: float) -> Iterator[events.Event]:
        self.last, at_once = value, self._at_once(value)
        better = math.isnan(self.best) or self._sign * value + self.rule.min_delta < self._sign * self.best
        if better and math.isfinite(value) and not at_once:
            self.best, self.best_step, self.wait, self.returns = value, step, 0, 0
        else:
            self.wait += 1
        if at_once and self._returns(value):
            if math.isnan(self.best):
                message = f"{at_once}, and there is no better value to go back to"
                yield events.Notice(step=step, message=message, level="warning")
            else:
                self.returns += 1
                self.restore_due = self.returns <= _RETURNS
                self._plan()
        self._budget.ended = self._why_ended()
        if self._budget.ended:
            yield events.Notice(step=step, message=f"stopped early: {self._budget.ended}")

    def _why_ended(self) -> str:
        reason = "" if self.last is None else self._at_once(self.last)
        if reason and self._returns(self.last):
            reason = f"{reason} again and again" if self.returns > _RETURNS else ""
        return reason or self._out_of_patience()

    def _returns(self, value: float | None) -> bool:
        """Whether a value that ends a run brings this one back to the best one instead."""
        return self.rule.on_divergence == "restore" and not self._is_past(value, self.rule.stopping_threshold)

    def _at_once(self, value: float) -> str:
        """Return why a value ends the run, whatever came before it, or ""."""
        rule = self.rule
        if not math.isfinite(value) and rule.check_finite and (rule.stop_after is not None or rule.goes_back):
            return f"{self.metric} is {value}"
        if self._is_past(value, rule.stopping_threshold):
            return f"{self.metric} of {value:.4g} is better than stopping_threshold={rule.stopping_threshold:g}"
        if rule.divergence_threshold is not None and self._sign * (value - rule.divergence_threshold) > 0.0:
            return f"{self.metric} of {value:.4g} is worse than divergence_threshold={rule.divergence_threshold:g}"
        return ""

    def _is_past(self, value: float | None, threshold: float | None) -> bool:
        return threshold is not None and value is not None and self._sign * (threshold - value) > 0.0

    def _out_of_patience(self) -> str:
        patience = self.rule.stop_after
        if patience is None or self.wait < max(patience, 1):
            return ""
        best = "" if math.isnan(self.best) else f" of {self.best:.4g} at step {self.best_step}"
        return f"{self.metric} has not been better than its best{best} for {self.wait} evaluations"

    def _compare(self, step: int, epoch: int) -> Iterator[events.Event]:
        """Say that the run has begun to overfit, once for each best value."""
        found = overfitting([row[2] for row in self.history], [row[3] for row in self.history], self._sign)
        if found is None or self.history[found.best][0] == self.overfits_since:
            return
        since, at, _, _ = self.history[found.best]
        self.overfits_since = since
        yield events.OverfittingSeen(
            step=step, epoch=epoch, metric=self.metric, since_step=since, value=found.value, best=found.best_value,
            train_loss=found.train, train_loss_then=found.best_train,
            reason=f"overfitting since epoch {at + 1} (step {since}): {self.metric} went from {found.best_value:.4g} "
            f"to {found.value:.4g} while the training loss went on from {found.best_train:.4g} to {found.train:.4g}",
        )  # fmt: skip

    # State ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return all that later decisions depend on, and the averaged model."""
        return {**super().state_dict(), "ema": None if self.ema is None else self.ema.state_dict()}

    def load(self, state: Mapping[str, Any] | None) -> str:
        """Restore what `state_dict` returned, None for that of an older version; return what to tell, or "".

        What is asked for now decides whether the run has ended. A metric or a plateau that is new begins anew.
        """
        told = ""
        if state is not None:
            mine = None if self.reduction is None else self.reduction.state_dict()
            reduction = state["reduction"] if mine and state["reduction"] else mine
            if state["metric"] != self.metric:
                told = f"the run acted on {state['metric']} before, and begins anew with {self.metric}"
                state = {**super().state_dict(), "ema": state["ema"]}
            self.load_state_dict({**state, "reduction": reduction})
            if self.ema is not None and state["ema"] is not None:
                self.ema.load_state_dict(state["ema"])
        self._budget.reduced = 1.0 if self.reduction is None else self.reduction.scale
        self._budget.ended = self._why_ended()
        self._plan()
        return told
