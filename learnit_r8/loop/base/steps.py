"""One epoch and one step: batches are drawn, reports are taken in, and between two steps the rest is done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Self

import numpy as np
from numpy.typing import NDArray

from learnit_r8 import events
from learnit_r8.core.arrays import in_any
from learnit_r8.core.rng import Purpose
from learnit_r8.errors import TrainingDiverged, tell
from learnit_r8.loop.base.measuring import Measuring
from learnit_r8.loop.counters import Stage
from learnit_r8.loop.in_flight import Ticket
from learnit_r8.loop.judge import Judgement
from learnit_r8.loop.losses import Reported
from learnit_r8.loop.lr_search import LrSearch
from learnit_r8.loop.safety import rises
from learnit_r8.samples.catalog import Rows
from learnit_r8.types import Batch, Command, Indices, LossReport, Verdict, WeighedBatch

_QUIETLY = np.errstate(all="ignore")
"""Whatever the program makes of numpy's floating point errors: ours are dealt with where they arise."""


class Steps(Measuring):
    """What the two loops are made of."""

    @_QUIETLY
    def _start_epoch(self) -> None:
        step, epoch = self._progress.global_step, self._progress.epoch
        grown, self._grown = self._grown, 0
        if grown:
            message = f"{grown} samples have come, and the run has {self._config.num_samples} from here on"
            self._bus.emit(events.Notice(step=step, message=message))
        done, total = self._budget.position(epoch, 0, 1, step)
        rng = self._streams.at(Purpose.EXCLUSION, epoch)
        excluded = in_any(self._safety.quarantine, self._guard.start_epoch(done / total, rng))
        table = self._catalog.refresh_quadrants(self._streams.at(Purpose.PLAN, epoch, 1), excluded)
        if table is not None:
            self._bus.emit(events.QuadrantsRefreshed(step=step, epoch=epoch, **asdict(table)))
        alike = self._guard.undecided(done / total)
        self._chooser.start_epoch(epoch, step, done / total, excluded, alike=alike)
        decisions = self._chooser.rules.pop_decisions()
        for decision, reason, figure in decisions:
            self._bus.emit(events.StrategyDecided(step=step, decision=decision, reason=reason, figure=figure))
        if self._ranks.of_plans(bool(decisions)).any():
            self._safety.detector.announce(step, "a strategy decided")
        self._progress.start_epoch()
        self._epoch_started = self._clock.monotonic()
        self._bus.emit(
            events.EpochStarted(
                step=step,
                epoch=epoch,
                phase=self._chooser.phase,
                batches=self._chooser.batches,
                total_steps=step + (self.batches_left or 0) if grown else 0,
            )
        )

    def _end_epoch(self, *, completed: bool) -> None:
        for ticket in self._desk.drop_all():
            self._chooser.forget(ticket.indices)
        ended, self._due_at = self._progress, 0
        ended.stage = Stage.DONE
        self._measured.end_epoch(ended)
        with np.errstate(all="ignore"):
            self._catalog.end_epoch()
        seconds = self._clock.monotonic() - self._epoch_started
        self._bus.emit(
            events.EpochEnded(
                step=ended.global_step,
                epoch=ended.epoch,
                mean_loss=ended.mean_loss,
                seconds=seconds,
                batches=ended.reported,
                completed=completed,
            )
        )
        self._guard_epoch()
        self._output.log_catalog(ended.global_step)
        self._output.hear_of_git(ended.global_step)
        if self._control.stop is Command.STOP_AFTER_EPOCH:
            self._save_if_possible()

    @_QUIETLY
    def _guard_epoch(self) -> None:
        """Let the noise guard think again about who is wrong rather than hard."""
        done, total = self._budget.position(self._progress.epoch + 1, 0, 1, self._progress.global_step)
        found = self._guard.end_epoch(self._catalog, done / total)
        if found is None:
            return
        step = self._progress.global_step
        if found.changed:
            indices, losses = tuple(found.indices.tolist()), tuple(found.losses.tolist())
            self._bus.emit(events.SuspectsNamed(step=step, indices=indices, losses=losses, count=found.count))
        if found.decision:
            self._bus.emit(
                events.StrategyDecided(step=step, decision=found.decision, reason=found.reason, figure=found.figure)
            )

    def _tell_epochs_left(self) -> None:
        """Say that only one epoch was trained, where nobody has looped over them."""
        progress = self._progress
        if (
            progress.stage is Stage.DONE
            and not self._looped
            and not self._budget.over(progress.epoch + 1, self.global_step)
        ):
            self.tell(
                f"the run ends after epoch {progress.epoch}, with budget left: loop over the epochs, `for epoch in "
                "scheduler.epoch_iterator()`, around the loop over their batches"
            )

    def _next_ticket(self) -> Ticket | None:
        """Draw the next batch; None when the epoch's plan, or the budget, is used up."""
        epoch, step = self._progress.epoch, self._progress.global_step + self._desk.open
        stopped = self._control.stop is Command.STOP_AFTER_STEP
        if stopped or self._progress.stage is not Stage.RUNNING or self._budget.used_up(step):
            return None
        started = self._clock.monotonic() if self._bus.sinks else 0.0
        if self._desk.ready and (ticket := self._next_ready(step)) is not None:
            return self._shown(ticket, started)
        waiting = self._desk.reissue()
        cursor = self._chooser.drawn if waiting is None else waiting.cursor
        batches = self._chooser.batches if waiting is None else waiting.batches
        position = self._budget.position(epoch, cursor, batches, step)
        if waiting is not None:
            indices, weights, number = waiting.indices, waiting.weights, waiting.batch.id
        elif cursor < batches:
            progress, stable_only = position[0] / position[1], self._safety.stable_only(step)
            indices, weights = self._chooser.draw(epoch, step, progress, stable_only=stable_only)
            number = self._desk.new_id()
        else:
            return None
        self._lr = self._budget.learning_rate(position, self._safety.lr_multiplier(step))
        self._safety.saw_lr(step, self._lr)
        ticket = self._ticket(indices, weights, number, step, (cursor, batches))
        if waiting is None:
            self._make_ready(step + 1)
        return self._shown(ticket, started)

    def _make_ready(self, step: int) -> None:
        """Make the tickets of the batches that are sure to be drawn next, from this step on.

        Where a rate rises far, or is not to be had, the long way is gone at its turn.
        """
        if not (self._foresees and self._safety.steady(step)):
            return
        batches, progress, budget = self._chooser.coming(), self._progress, self._budget
        if not batches:
            return
        shown, ones = np.stack(batches), np.ones((len(batches), self._config.batch_size), np.float32)
        epoch, number, cursor, planned = progress.epoch, self._desk.next_id, self._chooser.drawn, self._chooser.batches
        before, ready = self._lr, []
        for indices, mine, weights in zip(batches[: budget.left(step, planned - cursor)], shown, ones, strict=False):
            try:
                lr = budget.learning_rate(budget.position(epoch, cursor, planned, step), 1.0)
            except Exception:
                break
            if rises(before, lr):
                break
            keys = None if self._catalog.keys is None else self._catalog.keys.drawn(mine)
            batch = Batch(mine, lr, weights, number, step, epoch, keys)
            ready.append(Ticket(batch, indices, None, cursor, planned, 0.0, 0.0))
            before, number, step, cursor = lr, number + 1, step + 1, cursor + 1
        self._ready_at = budget.peak, budget.reduced
        self._desk.ready = ready[::-1]

    def _next_ready(self, step: int) -> Ticket | None:
        """Draw the batch that was made ready for a step; None where that is not what comes next any more."""
        ticket, budget = self._desk.next_ready(step), self._budget
        if ticket is None or self._ready_at != (budget.peak, budget.reduced):
            self._desk.ready.clear()
            return None
        self._chooser.draw_coming(len(ticket.indices))
        self._lr = ticket.batch.lr
        self._safety.pass_lr(self._lr)
        return self._desk.take_ready()

    def _at_once(self) -> Batch | None:
        """Hand out the next batch where it is ready and nothing is to be done before; else None: nothing is done."""
        desk, control, step = self._desk, self._control, self._progress.global_step
        if (
            step >= self._due_at
            or not desk.ready
            or control.interrupts.pending is not None
            or control.stop is not None
            or self._budget.ended
            or self._reporter != threading.get_ident()
            or self._closed
            or not desk.has_room
        ):
            return None
        if self._bus.sinks and control.waits:
            return None
        started = self._clock.monotonic() if self._bus.sinks else 0.0
        ticket = self._next_ready(step + desk.open)
        if ticket is None:
            return None
        return desk.hand_out(self._shown(ticket, started) if self._bus.sinks else ticket)

    def _next_due(self) -> int:
        """Return the step before which nothing that `_between_steps` does is due; 0 where that has to be looked at."""
        if self._ranks.world_size > 1 or self._progress.stage is not Stage.RUNNING:
            return 0
        return min(self._saver.next_due, self._safety.backups.next_due, self._measured.next_due)

    def _ticket(
        self,
        indices: NDArray[np.int64],
        weights: NDArray[np.float32] | None,
        number: int,
        step: int,
        place: tuple[int, int],
    ) -> Ticket:
        cursor, batches = place
        epoch, size = self._progress.epoch, len(indices)
        order = None if self._ranks.slices == 1 else self._ranks.order(size, self._streams, epoch, cursor)
        if order is None:
            mine, weights_here = indices.copy(), weights
        else:
            here = order[self._ranks.slice]
            mine, weights_here = indices[here], None if weights is None else weights[here]
        kind = Batch if weights is None else WeighedBatch
        shown = self._ones[: len(mine)] if weights_here is None else weights_here
        keys = None if self._catalog.keys is None else self._catalog.keys.drawn(mine)
        batch = kind(mine, self._lr, shown.copy(), number, step, epoch, keys)
        return Ticket(batch, indices, weights, cursor, batches, 0.0, 0.0, order)

    def _shown(self, ticket: Ticket, started: float) -> Ticket:
        """Let sinks hear of a ticket that is handed out; return it with its times."""
        if not self._bus.sinks:
            return ticket
        now, batch = self._clock.monotonic(), ticket.batch
        if self._bus.wants_batches:
            seconds = now - started
            self._bus.emit(
                events.BatchIssued(
                    step=batch.step, epoch=batch.epoch, size=len(ticket.indices), lr=self._lr, seconds=seconds
                )
            )
        return ticket._replace(issued_at=now, draw_seconds=now - started)

    def _record(self, ticket: Ticket, rows: Rows, reported: Reported) -> None:
        """Let an accepted loss enter the catalog, and the strategy hear of it."""
        step = self._progress.global_step
        values = reported.values if reported.own is None else reported.own
        if values is None:
            losses = self._catalog.record_batch(rows, reported.mean, step)
        else:
            once = self._chooser.each_once
            losses = self._catalog.record(rows, values, step, reported.mean, once=once)
        self._progress.accepted += 1
        self._progress.loss_sum += reported.mean
        if self._chooser.listens:
            per_sample = values is not None
            self._chooser.observe(
                LossReport(ticket.indices, losses, reported.mean, per_sample, step, self._progress.epoch)
            )

    def _ask_for_weights(self, batch: WeighedBatch) -> None:
        """Say once that nobody looked at the importance weights of the first batch that had any."""
        self._weighs = True
        if batch.asked:
            return
        message = (
            f"strategy={self._config.strategy!r} draws some samples more often than others, and nobody asked for the "
            "importance weights that make up for it: multiply the losses that are trained on, (losses * batch.weights)"
            ".mean(), in a loop over a loader learnit_r8.integrations.torch.weighted(scheduler, losses).mean() (of "
            "integrations.lightning: weighted(self, losses)), and report them without"
        )
        self._bus.emit(events.Notice(step=self._progress.global_step, message=message, level="warning"))
        tell(message, stacklevel=3)

    def _gather(self, reported: Reported, ticket: Ticket, skipped: bool) -> tuple[Reported, bool]:
        """Exchange this rank's report, and whether it skipped the step, for everyone's; hear of what stops the run."""
        word = self._control.word(skipped=skipped)
        step = self._progress.global_step
        reported, word = self._ranks.gather(reported, ticket.indices, ticket.order, step, word)
        self._control.hear(word)
        return reported, word.skipped

    def _news(
        self, ticket: Ticket, loss: float, expected: float, verdict: Verdict, score: float, step: int, started: float
    ) -> events.LossReported:
        return events.LossReported(
            step=step,
            epoch=self._progress.epoch,
            loss=loss,
            expected_loss=expected,
            lr=ticket.batch.lr,
            verdict=verdict.value,
            score=score,
            size=len(ticket.indices),
            step_seconds=started - (ticket.issued_at or started),
            r8_seconds=self._clock.monotonic() - started + ticket.draw_seconds,
        )

    def _react(self, step: int, judgement: Judgement, loss: float, expected: float, indices: Indices) -> bool:
        """Do what an alarming report calls for; return whether the model was restored."""
        try:
            rolled_back = self._safety.react(step, self._progress.epoch, judgement, loss, expected, indices)
        except TrainingDiverged:
            self._diverged = True  # not to be saved as the newest state
            raise
        if rolled_back:
            self._desk.outdate()
            if self._replays:
                self._progress.take_back(*self._desk.replay(self._safety.restored_step))
        return rolled_back

    def _search_batches(self, search: LrSearch) -> Iterator[Batch]:
        """Yield the batches of the search; afterwards model, optimizer and cursor are as before."""
        search.restart()
        self._bus.emit(
            events.PhaseChanged(
                step=self._progress.global_step, phase="LR search", reason=f"{search.steps} steps at rising rates"
            )
        )
        with self._safety.parked(self._args.save, self.state_dict):
            try:
                while not search.done:
                    indices, self._lr = search.next_batch()
                    started = self._clock.monotonic()
                    ticket = self._ticket(indices, None, self._desk.new_id(), self._progress.global_step, (0, 0))
                    yield self._desk.issue(self._shown(ticket, started))
                    self._desk.check_room()
                    if self._control.interrupted or self._bus.asked:
                        search.restart()  # the model is as before in a moment; then this is seen to
                        return
            except BaseException:  # left or failed: the next loop starts the search anew
                search.restart()
                raise
            finally:
                self._desk.drop_all()
        self._search = None
        found = search.suggestion()
        self._progress.optimal_lr = found.lr
        self._budget.restart_schedule(found.lr or self._config.initial_lr)
        suggestions = {"valley": found.valley, "steep": found.steep, "minimum": found.minimum}
        self._bus.emit(
            events.LrFound(
                step=self._progress.global_step, lr=self._budget.peak, suggestions=suggestions, steps=len(found.lrs)
            )
        )
        if found.reason:
            message = f"LR search: {found.reason}; keeping initial_lr={self._budget.peak:g}"
            self._bus.emit(events.Notice(step=self._progress.global_step, message=message, level="warning"))


class BatchLoop:
    """The batches of a loop. Asked beyond the last one, as loaders with workers do, it lets the scheduler know."""

    def __init__(
        self, batches: Iterator[Batch], at_once: Callable[[], Batch | None], beyond: Callable[[], None]
    ) -> None:
        self._batches = batches
        self._at_once = at_once
        self._beyond = beyond
        self._begun = self._over = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._over:
            self._beyond()
            raise StopIteration
        try:
            if self._begun and (batch := self._at_once()) is not None:
                return batch
            self._begun = True
            return next(self._batches)
        except BaseException:
            self._over = True
            raise

    def close(self) -> None:
        """Leave the loop: batches that are out will be handed out again."""
        self._over = True
        self._batches.close()  # type: ignore[attr-defined]
