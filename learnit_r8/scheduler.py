"""R8Scheduler: THE loop. It decides nothing itself; read it first, then what it calls.

    BatchRequest -> Strategy -> Batch -> user's train step -> LossReport -> Detector -> Verdict
         ^                                                                                |
         |                                       calm: Catalog.record <-------------------+
         +------------ next request              spike: Recovery <------------------------+

Rules that the code below keeps:

* A batch is a ticket. Nothing counts until its loss is reported; what was drawn and never
  reported is handed out again.
* What is drawn depends on (seed, epoch, cursor, catalog) only, the learning rate on the spent
  budget only, so a resumed run continues to the bit.
* Whatever touches the user's model, except a rollback, happens between two steps: when the
  next batch is asked for.
"""

from __future__ import annotations

import atexit
import math
import os
import sys
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

from learnit_r8 import events
from learnit_r8.core.config import DEFAULT_DIR, Checkpoints, Evaluation
from learnit_r8.errors import ProtocolError
from learnit_r8.loop.arguments import check_arguments
from learnit_r8.loop.base.gated import Gated
from learnit_r8.loop.base.persistence import one_of
from learnit_r8.loop.base.steps import BatchLoop
from learnit_r8.loop.counters import Stage, resumed_arguments
from learnit_r8.loop.in_flight import Loader, Ticket
from learnit_r8.loop.losses import Reported, read_classes, read_few, read_losses
from learnit_r8.loop.saver import State
from learnit_r8.loop.shards import common_checkpoint
from learnit_r8.loop.signals import say
from learnit_r8.stability.policy import Recovery
from learnit_r8.strategies.base import Strategy
from learnit_r8.structures.key_table import KeyTable
from learnit_r8.types import Batch, Sink, StepResult, Verdict, WeighedBatch


class R8Scheduler(Gated):
    """Owns the epoch loop and the batch loop of a training run.

        with R8Scheduler(num_samples=len(data), batch_size=32, num_epochs=10) as scheduler:
            for epoch in scheduler.epoch_iterator():
                for indices, lr in scheduler.batch_iterator():
                    scheduler.update_with_loss(train_step(indices, lr))

    Args:
        num_samples: Size of the data set; samples are the numbers 0 to N-1.
        batch_size: Samples a step, over all ranks.
        num_epochs: Budget in epochs; this, `num_steps` or `train_duration_seconds`.
        num_steps: Budget in steps. A run that ends amid an epoch goes on there when it is resumed with more.
        train_duration_seconds: Budget in seconds of wall-clock time, resumes included. An epoch in the middle of
            which it is spent is not taken up again by a resume with more seconds; the next one begins.
        initial_lr: Peak learning rate, reached after warm-up.
        scheduler_mode: Name of a schedule (`learnit_r8.schedules.schedule_names()`), or a
            function of progress in [0, 1] that returns a factor of the peak, or
            `learnit_r8.schedules.plateau(...)`.
        warmup_proportion: Share of the budget over which the learning rate rises.
        min_lr: Learning rate that the schedule ends at.
        auto_find_lr: Search the peak first; the model is restored afterwards.
        strategy: How samples are chosen: a name (`learnit_r8.strategies.names()`) or an object
            with `draw(request)`.
        save_callback: `(state_dict, filepath)` or `(filepath)`: write the model there.
        load_callback: `(source)` or `(source, from_ram)`: restore the model from a path, or
            from a copy of what `update_cpu_backup` or `state_callback` gave.
        state_callback: Returns the model's state, for automatic backups in RAM.
        backup_every: Steps between automatic backups; "auto": chosen by the size of the state, from 8 steps for less
            than a megabyte to 512, and told; None for none.
        recovery: What faults cause: "auto", "report" (they are told), "off", or a `Recovery` that says it of
            non-finite losses, spikes and drifts.
        checkpoint_dir: Where checkpoints go; made at the first one. A run removes none but its own there.
        checkpoint_every: "epoch", a number of steps, or None for by hand only.
        keep_checkpoints: How many of the newest to keep; those that were given a name, and final ones, stay.
        checkpoints: A `Checkpoints`: the three above and more (the best by a metric, every n-th, signals).
        evaluation: An `Evaluation`: what is measured beside the training loss and acted on (early stopping, an averaged
            model, the way back to the best).
        use_curses: False means `ui="off"`.
        ui: "auto", "curses", "rich", "log" or "off".
        sinks: Further listeners with `record(event)`.
        log_dir: Where the event log of the run goes, for `r8 watch`; rank 0's. A run that starts anew there sets
            the log of an earlier one aside.
        noise_guard: "off", "report" suspects, or "cap": draw them at a fifth of the rate, and from
            the middle of the budget not at all.
        groups: Class of each sample, int `[N]`, for the noise guard and the report.
        keys: What the samples are called by, one key each, in place of the numbers: texts, whole numbers, or tuples of
            those; a list, an iterator or a `KeyTable`. Batches unpack as `keys, lr` then, and events, reports and
            exports name keys.
        seed: Decides every random draw.
        drop_last: Leave out an epoch's last, shorter batch.
        clip: Norm that gradients are clipped at: a number, "auto" (from the run's own norms), or None; by
            `clip_gradients` of `learnit_r8.integrations.torch` or `.jax`.
        lookahead: How many batches may be out before their losses come back.
        rollback_data: "skip": after a rollback the data move on; "replay": the batches of the epoch since the
            backup whose losses were calm are trained on once more, each at most once.
        sharded: Each rank has samples of its own, which no other rank knows; `num_samples` and `batch_size` are those
            of this rank (see `learnit_r8.integrations.sharded`).
        rank: Number of this process, with several.
        world_size: Number of processes.
        all_gather: `(array) -> array`: all ranks' arrays, concatenated in rank order.
        clock: Source of time (`learnit_r8.core.clock.Clock`); tests bring their own.

    Raises:
        ConfigError: One or more bad arguments; all are listed.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        num_epochs: int | None = None,
        num_steps: int | None = None,
        train_duration_seconds: float | None = None,
        initial_lr: float = 0.01,
        scheduler_mode: str | Callable[[float], float] = "cosine",
        warmup_proportion: float = 0.1,
        min_lr: float = 0.0,
        auto_find_lr: bool = False,
        strategy: str | Strategy = "quadrant",
        save_callback: Callable[..., Any] | None = None,
        load_callback: Callable[..., Any] | None = None,
        state_callback: Callable[[], Any] | None = None,
        backup_every: int | str | None = "auto",
        recovery: str | Recovery = "auto",
        checkpoint_dir: str | Path | None = DEFAULT_DIR,
        checkpoint_every: str | int | None = None,
        keep_checkpoints: int = 3,
        checkpoints: Checkpoints | None = None,
        evaluation: Evaluation | None = None,
        use_curses: bool = True,
        ui: str | None = None,
        sinks: Sequence[Sink] = (),
        log_dir: str | Path | None = None,
        noise_guard: str = "report",
        groups: Sequence[int] | None = None,
        keys: Iterable[Hashable] | KeyTable | None = None,
        seed: int = 0,
        drop_last: bool = False,
        clip: float | str | None = None,
        lookahead: int = 1,
        rollback_data: str = "skip",
        sharded: bool = False,
        rank: int = 0,
        world_size: int = 1,
        all_gather: Callable[[NDArray[Any]], NDArray[Any]] | None = None,
        clock: Any = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name != "self"}
        super().__init__(check_arguments(**given))

    # The two loops ------------------------------------------------------------------------

    def epoch_iterator(self) -> Iterator[int]:
        """Yield the numbers of the epochs that are left.

        An epoch that was left by `break` is continued by the next `epoch_iterator()`, and given
        up when this one goes on.
        """
        self._looped = True
        self._begin(anyhow=self._resumed)
        if self._progress.stage is Stage.DONE:
            self._evaluate()
            self._progress.next_epoch()
        if self._over():
            if self._resumed:
                self.tell(self._budget.nothing_left)
            else:  # it has ended before, and has no display any more
                say(f"[r8] {self._budget.nothing_left}")
            self._resumed = False
        with self._control.interrupts:
            while not self._control.stop and not self._over():
                if self._progress.stage is Stage.FRESH:
                    self._start_epoch()
                self._within = True
                try:
                    yield self._progress.epoch
                except GeneratorExit:
                    self._saver.settle()  # who leaves the loop finds what was saved
                    raise
                finally:
                    self._within = False
                self._desk.leave()
                if self._budget.steps_up(self._progress.global_step) and self._progress.stage is Stage.RUNNING:
                    break  # amid an epoch, which goes on where there is a larger budget
                if self._progress.stage is Stage.RUNNING and not self._control.stop:
                    everything = self._chooser.drawn == self._chooser.batches
                    if everything and (left_out := self._desk.left_out(self._progress.reported)) is not None:
                        self.tell(left_out)
                    self._end_epoch(completed=False)
                self._between_steps()
                if self._progress.stage is Stage.DONE:
                    self._progress.next_epoch()
            if not self._control.stop:
                self._safety.finish(self._progress.global_step)
                self._evaluate(last=True)
            self._save_last()
            if not self._control.stop and self._measured.rule.restore_best:
                self._go_back_to_best()
        self._end("stopped" if self._control.stop else "finished")

    def batch_iterator(self, loader: Loader | None = None) -> Iterator[Batch]:
        """Yield the batches that are left of the current epoch; each unpacks as `indices, lr`.

        Args:
            loader: What draws ahead of the loop, for integrations.

        Raises:
            ProtocolError: The next batch is asked for while the loss of an earlier one is due, or no epoch is open.
        """
        return BatchLoop(self._batches(loader), self._at_once, self._request)

    def _batches(self, loader: Loader | None) -> Iterator[Batch]:
        self._begin()
        if loader is not None:
            self._check_search(loader.lead + loader.ahead)
        if self._progress.stage is Stage.FRESH and not self._over():
            self._start_epoch()
        elif self._progress.stage is Stage.DONE and not (
            self._within or self._budget.over(self._progress.epoch + 1, self._progress.global_step)
        ):
            raise ProtocolError(
                f"{self.nothing_to_draw}: begin the next one with `for epoch in scheduler.epoch_iterator()`"
            )
        self._desk.start_pass(loader)
        with self._control.interrupts:
            while self._search is not None:
                yield from self._search_batches(self._search)
                self._desk.leave()
                if self._search is not None:  # it was left for a signal or a command
                    self._between_steps()
                    if self._control.stop:
                        return
            try:
                while True:
                    self._desk.check_room()
                    self._request()
                    ticket = self._next_ticket()
                    if ticket is None:
                        return
                    yield self._desk.issue(ticket)
            except GeneratorExit:
                self._desk.leave()
                self._saver.settle()
                raise

    def _request(self) -> None:
        """A batch is asked for: where the model stands between two steps, what is due is done now."""
        here = threading.get_ident()
        if self._reporter not in (None, here):
            self.tell(
                "batches are asked for in another thread than losses are reported in: checkpoints, backups and signals "
                "wait for the end of each epoch",
            )
        elif self._desk.between_steps() and not self._closed:
            waits = self._bus.sinks and self._control.waits
            if self._progress.global_step >= self._due_at or self._control.interrupts.pending is not None or waits:
                self._between_steps()
                self._due_at = self._next_due()
        self._desk.count_request()

    def update_with_loss(
        self,
        loss: Any = None,
        batch: Batch | None = None,
        *,
        skipped: bool = False,
        batch_loss: Any = None,
        predictions: Any = None,
    ) -> StepResult:
        """Report the loss of a batch, after its optimizer step: a rollback restores the model at once.

        Args:
            loss: One unweighted loss per sample, in the batch's order (best), or their mean.
                Any framework's array or tensor, on any device, with or without a graph. After `check` none is needed.
            batch: Which batch; the oldest open one when None.
            skipped: The optimizer step was skipped (AMP overflow): no fault, whatever the loss.
            batch_loss: Another name for `loss`.
            predictions: The class that the model gives each sample, whole numbers in the batch's order, as
                `logits.argmax(1)`: from them `noise_guard.suggestions` says what a suspect's label should be.

        Raises:
            ProtocolError: No such batch is open, or the number of losses or predictions is not the batch's; or
                predictions with several ranks.
            TypeError: Not a real number or a 1-D array of them, or predictions that are no whole numbers. Nothing has
                changed then.
            TrainingDiverged: Recovery is out of means.
        """
        if self._closed:
            self._check_open()
        if self._safety.limits and batch_loss is None and predictions is None and not skipped:
            result = self._pass_calm(loss, batch)
            if result is not None:
                return result
        ticket = self._desk.find(batch)
        if batch_loss is not None:
            if loss is not None:
                raise TypeError("update_with_loss got loss and batch_loss, two names for one thing: give one")
            loss = batch_loss
        left_out = ""
        if self._checks or self._clips:
            reported, left_out = self._reported(ticket, loss)
        else:
            reported = read_losses(loss, len(ticket.batch.indices))
        if predictions is not None:
            predictions = read_classes(predictions, len(ticket.batch.indices), self._ranks.world_size)
        if batch is None:
            self._desk.check_failed(skipped=skipped)
        if not self._weighs and isinstance(ticket.batch, WeighedBatch):
            self._ask_for_weights(ticket.batch)
        self._reporter = threading.get_ident()
        started, skipped = self._clock.monotonic() if self._bus.sinks else 0.0, bool(skipped)
        if self._ranks.exchanges:
            reported, skipped = self._gather(reported, ticket, skipped)
        outdated = self._desk.close(ticket)
        if self._search is not None:
            return self._search.report(reported)
        return self._judged(
            ticket, reported, started, predictions, skipped=skipped, outdated=outdated, left_out=left_out
        )

    def _judged(
        self,
        ticket: Ticket,
        reported: Reported,
        started: float,
        predictions: NDArray[Any] | None,
        *,
        skipped: bool,
        outdated: bool,
        left_out: str,
    ) -> StepResult:
        """Have a report judged, and do what it calls for; the long way, which what is in doubt goes."""
        progress, shown = self._progress, bool(self._bus.sinks)
        step = progress.global_step
        rows = self._catalog.look_up(ticket.indices)
        expected = rows.expected
        judgement = self._safety.judge(
            step,
            reported,
            expected,
            ticket.indices,
            skipped=skipped,
            outdated=outdated,
            scored=shown,
            left_out=left_out,
        )
        if judgement.accepted:
            self._record(ticket, rows, reported)
            if predictions is not None:
                self._guard.hear_predictions(ticket.indices, predictions)
            if (self._replays or self._safety.goes_back) and judgement.verdict is Verdict.CALM:
                self._desk.remember(step, ticket, reported.mean)
        progress.global_step += 1
        progress.reported += 1
        if shown:
            self._bus.emit(
                self._news(ticket, reported.mean, expected, judgement.verdict, judgement.score, step, started)
            )
        rolled_back = judgement.alarming and self._react(step, judgement, reported.mean, expected, ticket.indices)
        if judgement.alarming:
            self._due_at = 0
        elif self._puts_off and judgement.verdict is Verdict.CALM and judgement.accepted and self._bus.patient:
            self._safety.allow(step + 1)
        if progress.reported == self._chooser.batches:
            self._end_epoch(completed=True)
        surprise = reported.mean - expected
        return StepResult(judgement.accepted, rolled_back, judgement.verdict, reported.mean, expected, surprise, step)

    def _pass_calm(self, loss: Any, batch: Batch | None) -> StepResult | None:
        """Take a loss that is calm beyond doubt, and put off all that nobody looks at; else None: nothing is done."""
        desk, safety, progress = self._desk, self._safety, self._progress
        ticket = desk.next_report(batch)
        if ticket is None:
            return None
        size = len(ticket.indices)
        few = read_few(loss, size)
        if few is None:
            reported = read_losses(loss, size)
            if reported.values is None or not reported.finite:
                return None
            few = reported.values, reported.mean
        losses, mean = few
        started, step = self._clock.monotonic() if self._bus.sinks else 0.0, progress.global_step
        if (
            mean > safety.limits[-1]
            or (found := self._catalog.take(ticket.indices, losses, mean, step, safety.floor)) is None
        ):
            return None
        self._reporter = threading.get_ident()
        desk.close(ticket)
        expected, excess = found
        news, now = None, 0.0
        if self._bus.sinks:
            news = self._news(ticket, mean, expected, Verdict.CALM, math.nan, step, started)
            now = self._clock.wall()
        safety.put_off(step, mean, excess, ticket.indices, news, now)
        if self._replays or safety.remembers:
            desk.remember(step, ticket, mean)
        progress.global_step = step + 1
        progress.accepted += 1
        progress.loss_sum += mean
        progress.reported += 1
        if progress.reported == self._chooser.batches:
            self._end_epoch(completed=True)
        return StepResult(True, False, Verdict.CALM, mean, expected, mean - expected, step)

    def _between_steps(self) -> None:
        """Do what touches the user's model, or waits: signals, commands, backups, checkpoints."""
        self._saver.settle(wait=False)
        self._saver.prepare(self._progress.global_step)
        if self._control.interrupted and not self.host_saves:
            self._save_if_possible()
            if self._ranks.world_size > 1:
                with suppress(Exception):  # another rank may be gone; else none dies before rank 0 has saved
                    self._ranks.everyone(0.0)
            self.deliver_signal(self._saver.farewell(self._progress.global_step, writes=self._ranks.writes))
        if self._ranks.world_size > 1 or (self._bus and self._bus.commanding):
            self._control.obey(self._progress.global_step, self._save_if_possible)
        self._evaluate()
        self._safety.before_step(self._progress.global_step)
        if self._control.save_due:
            self._control.save_due = False
            self._save_if_possible()
        self._save_if_due()

    @classmethod
    def resume_from_checkpoint(
        cls,
        checkpoint_path: str | Path | None = None,
        save_callback: Callable[..., Any] | None = None,
        load_callback: Callable[..., Any] | None = None,
        *,
        path: str | Path | None = None,
        **new_goals: Any,
    ) -> Self:
        """Return a scheduler that goes on where a checkpoint was written.

        It saves where the checkpoint lies, unless `checkpoint_dir` is given: a run that is resumed from a copy of its
        folder leaves the original alone.

        Args:
            checkpoint_path: A checkpoint, or a directory of them: the newest valid one of the run that saved there
                last.
            save_callback: As at construction.
            load_callback: As at construction; called with the checkpoint's model path.
            path: Another name for `checkpoint_path`.
            **new_goals: Arguments that differ from the checkpoint's configuration. A strategy or
                schedule that was an object must be given again.

        Raises:
            FileNotFoundError: There is no checkpoint.
            CheckpointError: It cannot be used.
            ConfigError: Bad arguments.
        """
        from learnit_r8.checkpoint import resolve, shown

        damaged: list[tuple[Path, str]] = []
        found = one_of("resume_from_checkpoint", checkpoint_path=checkpoint_path, path=path)
        if new_goals.get("sharded"):
            rank, world = new_goals.get("rank", 0), new_goals.get("world_size", 1)
            found = common_checkpoint(Path(found), rank, world, new_goals.get("all_gather"))
        loaded = resolve(found, on_corrupt=lambda bad, reason: damaged.append((bad, reason)))
        arguments = resumed_arguments(loaded.state, new_goals, str(shown(loaded.path).parent))
        scheduler = cls(**arguments, save_callback=save_callback, load_callback=load_callback)
        for bad, reason in damaged:
            scheduler._saver.passed_over(bad, reason)
        scheduler._restore(loaded)
        if "checkpoint_dir" not in new_goals and "checkpoints" not in new_goals:
            scheduler._saver.compare_directory(loaded.state["config"]["checkpoint_dir"])
        if new_goals.get("initial_lr") is not None:  # also over a rate that auto_find_lr has found
            scheduler._budget.peak = scheduler._config.initial_lr
            scheduler._lr = scheduler._lr_at(scheduler._chooser.drawn, scheduler._chooser.batches)
        return scheduler

    # Beginning and end --------------------------------------------------------------------

    def deliver_signal(self, news: str) -> None:
        """Act on the signal that waits, as if it had come now.

        Args:
            news: What has become of the run and how it goes on, one sentence.
        """
        self._end("stopped")  # the terminal is given back before the process may die
        self._control.interrupts.deliver(news)
        self._begin()  # a handler of the user's own has returned

    def _begin(self, *, anyhow: bool = False) -> None:
        """Open what the run shows itself on; the first call counts.

        Args:
            anyhow: Also where nothing is left to train.
        """
        self._check_open()
        if self._begun or (self._over() and not anyhow):
            return
        self._begun, self._control.stop, self._pid = True, None, os.getpid()
        _running.add(self)
        if self._ranks.writes:
            self._saver.begin()
        step, left = self._progress.global_step, self.batches_left
        total = None if left is None else step + left  # batches before a resume may have been of another size
        self._output.begin(step, self._budget.elapsed, total, resumed=self._resumed)
        if out := self._config.left_out:
            message = (
                f"each epoch leaves out {out} samples, others each time: its last batch gives all "
                f"{self._config.world_size} ranks equally many"
            )
            self._bus.emit(events.Notice(step=self._progress.global_step, message=message))
        if self._args.state_callback is not None and self._args.load is None:
            self.tell("there is no load_callback to restore what state_callback returns: no backups are made in RAM")
        self._budget.begin()

    def _end(self, reason: str) -> None:
        if self._begun:
            missed = (self._saver.missed_metric(), self._measured.missing(ended=True))
            if any(missed) and reason == "finished" and self._ranks.writes:
                self.tell(next(filter(None, missed)))
            self._begun = False
            self._budget.stop()
            levels, warning = self._safety.levels(), self._safety.ending(self._progress.global_step)
            self._output.end(self._progress.global_step, reason, self._budget.elapsed, levels, warning)
        self._saver.close()

    def close(self) -> None:
        """Save what the cadence owes, release terminal, log, directory and signal handlers; any number of times."""
        self._close("closed", sys.exception())

    def _close(self, reason: str, error: BaseException | None, *, printed: bool = False) -> None:
        if self._closed:
            return
        if self._is_parents():  # a forked child leaves the parent's loop: nothing here is the child's
            self._closed = True
            return
        if error is None and self._begun:
            self._tell_epochs_left()
        said = self._rescue(error)
        if said and printed:
            say(f"[r8] {said}")
        elif said and error is not None:
            error.add_note(f"[r8] {said}")
        self._end(reason)
        self._closed = True
        _running.discard(self)
        self._control.interrupts.release()
        self._bus.close()
        self._control.interrupts.deliver(
            said or self._saver.farewell(self._progress.global_step, writes=self._ranks.writes)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close("closed" if kind is None else "stopped" if kind is KeyboardInterrupt else "error", error)

    def __getstate__(self) -> State:
        raise TypeError(
            "an R8Scheduler cannot be copied or pickled, it holds your callbacks and files: save state_dict(), and "
            "give it to load_state_dict of another one"
        )


_running: weakref.WeakSet[R8Scheduler] = weakref.WeakSet()


def _after_fork() -> None:
    for run in _running:
        run._forked_at = run.global_step


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


@atexit.register
def _close_forgotten() -> None:
    """Save what a program that ends without `close()` owes, such as one that an error ends."""
    for run in list(_running):
        error = getattr(sys, "last_value", None)
        run._close("closed" if error is None else "error", error, printed=True)
