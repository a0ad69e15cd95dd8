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
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from learnit_r8 import events
from learnit_r8._version import __version__
from learnit_r8.core.arrays import in_any
from learnit_r8.core.config import DEFAULT_DIR, Checkpoints
from learnit_r8.core.portable import portable, unpacked
from learnit_r8.core.rng import Purpose, RandomStreams
from learnit_r8.core.urls import url_of
from learnit_r8.errors import CheckpointError, ConfigError, ProtocolError, TrainingDiverged, tell
from learnit_r8.loop.arguments import check_arguments
from learnit_r8.loop.budget import Budget
from learnit_r8.loop.callbacks import LoadCallback
from learnit_r8.loop.control import Control
from learnit_r8.loop.counters import Progress, Stage, check_state, resumed_arguments
from learnit_r8.loop.crash import CrashRecorder
from learnit_r8.loop.in_flight import InFlight, Loader, Ticket
from learnit_r8.loop.judge import Judgement
from learnit_r8.loop.losses import Reported, read_losses, read_number
from learnit_r8.loop.lr_search import LrSearch
from learnit_r8.loop.output import Output
from learnit_r8.loop.ranks import Ranks
from learnit_r8.loop.safety import SafetyNet
from learnit_r8.loop.sampling import Sampling
from learnit_r8.loop.saver import Saver, State, not_saved
from learnit_r8.loop.shards import Shards, common_checkpoint
from learnit_r8.loop.signals import say
from learnit_r8.loop.together import SaveTogether
from learnit_r8.noise.guard import NoiseGuard
from learnit_r8.samples.catalog import LossCatalog, Rows
from learnit_r8.sinks import EventBus
from learnit_r8.stability.policy import Recovery
from learnit_r8.strategies.base import Strategy
from learnit_r8.types import Batch, Command, Indices, LossReport, Sink, StepResult, Verdict, WeighedBatch

if TYPE_CHECKING:
    from learnit_r8.checkpoint import LoadedCheckpoint

_QUIETLY = np.errstate(all="ignore")
"""Whatever the program makes of numpy's floating point errors: ours are dealt with where they arise."""


class R8Scheduler:
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
            function of progress in [0, 1] that returns a factor of the peak.
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
        use_curses: False means `ui="off"`.
        ui: "auto", "curses", "rich", "log" or "off".
        sinks: Further listeners with `record(event)`.
        log_dir: Where the event log of the run goes, for `r8 watch`; rank 0's. A run that starts anew there sets
            the log of an earlier one aside.
        noise_guard: "off", "report" suspects, or "cap": draw them at a tenth of the rate, and from
            the middle of the budget not at all.
        groups: Class of each sample, int `[N]`, for the noise guard and the report.
        seed: Decides every random draw.
        drop_last: Leave out an epoch's last, shorter batch.
        lookahead: How many batches may be out before their losses come back.
        rollback_data: "skip": after a rollback the data move on; "replay": the batches of the epoch since the
            backup whose losses were calm are trained on once more.
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
        use_curses: bool = True,
        ui: str | None = None,
        sinks: Sequence[Sink] = (),
        log_dir: str | Path | None = None,
        noise_guard: str = "report",
        groups: Sequence[int] | None = None,
        seed: int = 0,
        drop_last: bool = False,
        lookahead: int = 1,
        rollback_data: str = "skip",
        sharded: bool = False,
        rank: int = 0,
        world_size: int = 1,
        all_gather: Callable[[NDArray[Any]], NDArray[Any]] | None = None,
        clock: Any = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name != "self"}
        args = check_arguments(**given)
        config = args.config
        self._args, self._config, self._clock = args, config, args.clock
        kind, world = (Ranks, config.world_size) if config.shard is None else (Shards, config.shard[1])
        self._ranks = kind(args.rank, world, args.all_gather, args.clock, config.order_hash())
        leads = self._ranks.rank == 0  # a tracker gets each number once
        self._bus = EventBus([s for s in args.sinks if leads or not getattr(s, "once", False)], args.clock)
        self._budget = Budget(config, args.schedule, self._ranks.clock)
        self._streams = RandomStreams(config.seed, config.shard and config.shard[0])
        self._catalog = self._ranks.new_catalog(config.num_samples)
        agreed = None if config.shard is None else self._ranks.least
        self._chooser = Sampling(args.strategy, config, self._catalog, self._streams, agreed)
        self._desk = InFlight(config.lookahead)
        seeking = not self._chooser.rules.covers
        self._guard = NoiseGuard(config.noise_guard, config.num_samples, args.groups, seeking=seeking)
        self._together = None
        if args.save is not None and args.save.collective and self._ranks.world_size > 1:
            if config.checkpoint_dir is not None and url_of(config.checkpoint_dir):
                raise ConfigError(
                    [f"a collective save_callback needs a folder that all ranks see, got {config.checkpoint_dir!r}"]
                )
            self._together = SaveTogether(args.save, self._ranks)
            args = self._args = replace(args, save=self._together)
        self._saver = Saver(args, self._bus)
        evidence, recent = config.log_dir or config.checkpoint_dir, partial(tuple, self._bus.recent)
        self._safety = SafetyNet(
            args.recovery,
            args.load,
            args.state_callback,
            config.backup_every,
            config.total_steps,
            self._saver,
            self._catalog,
            self._bus.emit,
            args.clock,
            CrashRecorder(evidence, config.to_json(), recent),
            self._ranks,
        )
        saves = config.checkpoint_dir is not None
        self._control = Control(self._bus, self._ranks, args.clock, saves=saves, signals=config.signals)
        self._control.together = self._together is not None or config.shard is not None
        self._output = Output(args, self._bus, self._catalog, self._guard, self._ranks.rank)
        self._replays = config.rollback_data == "replay"
        self._ones = np.ones(config.batch_size, np.float32)
        self._progress = Progress()
        self._epoch_started = 0.0  # monotonic seconds
        self._lr = self._lr_at(0, 0)
        self._search = LrSearch(config, self._streams) if config.auto_find_lr else None
        self._resumed = self._begun = self._closed = False
        self._weighs = False  # whether it is known that importance weights reach the loss, or was said that they do not
        self.host_saves = False  # a framework saves the run, and acts on signals
        self._within = False  # whether an epoch loop is going
        self._diverged = False
        self._reporter: int | None = None  # thread that reports losses

    # What users read ----------------------------------------------------------------------

    @property
    def global_step(self) -> int:
        """Number of batches whose loss was reported."""
        return self._progress.global_step

    @property
    def current_epoch(self) -> int:
        """Number of the current epoch, from 0."""
        return self._progress.epoch

    @property
    def lr(self) -> float:
        """Learning rate of the batch that was handed out last; before the first one, that one's."""
        return self._lr

    @property
    def steps_per_epoch(self) -> int:
        """Batches in a full epoch."""
        return self._config.steps_per_epoch

    @property
    def total_steps(self) -> int | None:
        """Batches in the whole run; None when the budget is seconds."""
        return self._config.total_steps

    @property
    def optimal_lr_found(self) -> float | None:
        """The peak that `auto_find_lr` found; None before, without, or when it was ambiguous."""
        return self._progress.optimal_lr

    @property
    def catalog(self) -> LossCatalog:
        """What is known of every sample."""
        return self._catalog

    @property
    def strategy(self) -> Strategy:
        """What chooses the samples once they are cataloged."""
        return self._chooser.rules.strategy  # type: ignore[no-any-return]

    @property
    def noise_guard(self) -> NoiseGuard:
        """Which samples look wrong rather than hard."""
        return self._guard

    # What integrations use ----------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """Samples in a full batch of all ranks."""
        return self._config.batch_size * (self.world_size // self._config.world_size)

    @property
    def drop_last(self) -> bool:
        """Whether an epoch's last, shorter batch is left out."""
        return self._config.drop_last

    @property
    def world_size(self) -> int:
        """Number of parts that a batch has: one for each process, unless several train on one."""
        return self._ranks.slices

    @property
    def sharded(self) -> bool:
        """Whether each rank has samples, and a state, of its own: what one rank saves does not resume the others."""
        return self._config.shard is not None and self.world_size > 1

    @property
    def open_batches(self) -> tuple[Batch, ...]:
        """The batches that were handed out and whose loss is due, oldest first."""
        return self._desk.open_batches

    @property
    def epoch_batches(self) -> tuple[int, int]:
        """How many batches of the current epoch were reported, and how many it has."""
        if self._progress.stage is Stage.FRESH:
            return 0, self._config.steps_per_epoch
        return self._progress.reported, self._chooser.batches

    @property
    def batches_left(self) -> int | None:
        """Batches that are left of the budget, as far as one can tell; None when it is seconds."""
        if self._config.num_epochs is None:
            return None if self.total_steps is None else max(self.total_steps - self.global_step, 0)
        reported, planned = self.epoch_batches
        later = max(self._config.num_epochs - self.current_epoch - 1, 0)
        return planned - reported + later * self.steps_per_epoch

    @property
    def interrupted(self) -> bool:
        """Whether a signal waits to be acted on: where `host_saves`, the host does and then delivers it."""
        return self._control.interrupted

    def deliver_signal(self, news: str) -> None:
        """Act on the signal that waits, as if it had come now.

        Args:
            news: What has become of the run and how it goes on, one sentence.
        """
        self._end("stopped")  # the terminal is given back before the process may die
        self._control.interrupts.deliver(news)
        self._begin()  # a handler of the user's own has returned

    def tell(self, message: str) -> None:
        """Show a warning beside the run's other events, once; without a display, on standard error."""
        self._saver.tell(self._progress.global_step, message)

    def importance_weights(self, position: int) -> NDArray[np.float32] | None:
        """Return the importance weights of an open batch, None where all are 1.

        Args:
            position: Its place in `open_batches`.
        """
        return self._desk.importance_weights(position)

    @property
    def awaited_signals(self) -> list[int]:
        """The signals that wait for the next step boundary, once a loop runs in this thread."""
        return self._control.interrupts.wanted()

    def lr_now(self) -> float:
        """Return the learning rate for the oldest open batch as of now: a rollback since its issue counts."""
        ticket = self._desk.oldest
        if ticket is None or self._search is not None:
            return self._lr
        changed = self._safety.restored or self._budget.scaled
        return self._lr_at(ticket.cursor, ticket.batches) if changed else ticket.batch.lr

    @property
    def next_lr(self) -> float:
        """Learning rate of the step that comes next, also where its batch is not drawn yet."""
        drawn = self._desk.oldest is not None or self._search is not None
        if drawn or self._progress.stage is not Stage.RUNNING:
            return self.lr_now()
        return self._lr_at(self._chooser.drawn, self._chooser.batches)

    def highest_lr_ahead(self) -> float:
        """Return the highest learning rate that the schedule has from now on."""
        done, total = self._budget.position(
            self._progress.epoch, self._progress.reported, self._chooser.batches, self._progress.global_step
        )
        return self._budget.highest(done, total)

    def scale_lr(self, factor: float, who: str) -> None:
        """Multiply the learning rate, from the next step to the run's end; it is part of the run's state.

        Args:
            factor: Positive.
            who: Asked for it.
        """
        self._budget.scale(factor)
        message = f"{who} multiplied the learning rate by {factor:.3g}: the schedule's peak is {self._budget.peak:.3g}"
        self._bus.emit(events.Notice(step=self._progress.global_step, message=message))

    @property
    def running(self) -> bool:
        """Whether a loop over epochs or batches has begun and not ended."""
        return self._begun and not self._closed

    def _lr_at(self, cursor: int, batches: int) -> float:
        progress = self._progress
        position = self._budget.position(progress.epoch, cursor, batches, progress.global_step)
        return self._budget.learning_rate(position, self._safety.lr_multiplier(self._progress.global_step))

    @property
    def current_batch(self) -> Batch | None:
        """The batch that the loop got last and has not reported: `current_batch.weights` are its importance weights."""
        ticket = self._desk.current
        return None if ticket is None else ticket.batch

    @property
    def nothing_to_draw(self) -> str | None:
        """Why a loop over the batches would be empty, None where it would not, or where somebody stopped the run."""
        progress = self._progress
        if self._closed:
            return "the scheduler is closed"
        if self._control.stop or progress.stage is Stage.RUNNING:
            return None
        if self._budget.over(progress.epoch + (progress.stage is Stage.DONE), progress.global_step):
            return "the run has spent its budget"
        done = progress.stage is Stage.DONE
        return f"all batches of epoch {progress.epoch} are reported, and no other epoch is open" if done else None

    def data_seed(self, batch: Batch | None = None) -> int:
        """Return a seed for the random numbers of loading a batch, or of the workers that this epoch starts.

        It follows from the run's seed, the epoch, the batch's place in it, and the rank.
        """
        cursor = 0 if batch is None else 1 + self._desk.find(batch).cursor
        rng = self._streams.at(Purpose.LOADING, self._progress.epoch, cursor)
        return int(rng.integers(1 << 62)) + self._ranks.rank

    def allow_lookahead(self, batches: int) -> None:
        """Let at least so many batches be out before their losses come back.

        For loaders that prefetch: their lead is known only once they exist.

        Args:
            batches: As `lookahead`.

        Raises:
            ProtocolError: A learning-rate search is due, which needs every loss before the next batch.
        """
        self._check_search(batches - 1)
        self._desk.allow(batches)

    def _check_search(self, lead: int) -> None:
        if self._search is not None and lead > 0:
            raise ProtocolError(
                f"auto_find_lr needs each loss before the next batch, and this loader is {lead} ahead: search "
                "with a loader that does not prefetch (num_workers=0), or give initial_lr"
            )

    def expect_sharded_model(self) -> None:
        """Refuse a `save_callback` that would run on rank 0 alone, as the model is sharded over the ranks.

        Raises:
            ConfigError: It would write one rank's part of the model, or wait for the others for ever.
        """
        if self._args.save is not None and self._ranks.writes_alone and not self._together:
            raise ConfigError(
                [
                    "save_callback runs on rank 0 alone, but the model is sharded over the ranks: give "
                    "save_callback=collective(save), of learnit_r8.integrations.distributed, to have it called on all "
                    "ranks with one path, or ShardedModel(model, optimizer).save"
                ]
            )

    def attach_model(self, capture: Callable[[], Any], restore: Callable[[Any], Any]) -> None:
        """Give the callbacks for backups in RAM that were not given at construction.

        Args:
            capture: As `state_callback`.
            restore: As `load_callback`, called with what `capture` returned.
        """
        self._safety.attach(capture, LoadCallback(restore))

    # The two loops ------------------------------------------------------------------------

    def epoch_iterator(self) -> Iterator[int]:
        """Yield the numbers of the epochs that are left.

        An epoch that was left by `break` is continued by the next `epoch_iterator()`, and given
        up when this one goes on.
        """
        self._begin(anyhow=self._resumed)
        if self._progress.stage is Stage.DONE:
            self._progress.next_epoch()
        if self._resumed and self._over():
            self._resumed = False
            self.tell(self._budget.nothing_left)
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
            self._save_last()
        self._end("stopped" if self._control.stop else "finished")

    def batch_iterator(self, loader: Loader | None = None) -> Iterator[Batch]:
        """Yield the batches that are left of the current epoch; each unpacks as `indices, lr`.

        Args:
            loader: What draws ahead of the loop, for integrations.

        Raises:
            ProtocolError: The next batch is asked for while the loss of an earlier one is due, or no epoch is open.
        """
        return _BatchLoop(self._batches(loader), self._request)

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
            self._between_steps()
        self._desk.count_request()

    def update_with_loss(
        self, loss: Any = None, batch: Batch | None = None, *, skipped: bool = False, batch_loss: Any = None
    ) -> StepResult:
        """Report the loss of a batch, after its optimizer step: a rollback restores the model at once.

        Args:
            loss: One unweighted loss per sample, in the batch's order (best), or their mean.
                Any framework's array or tensor, on any device, with or without a graph.
            batch: Which batch; the oldest open one when None.
            skipped: The optimizer step was skipped (AMP overflow): no fault, whatever the loss.
            batch_loss: Another name for `loss`.

        Raises:
            ProtocolError: No such batch is open, or the number of losses is not the batch's.
            TypeError: Not a real number or a 1-D array of them. Nothing has changed then.
            TrainingDiverged: Recovery is out of means.
        """
        self._check_open()
        ticket = self._desk.find(batch)
        if batch_loss is not None:
            if loss is not None:
                raise TypeError("update_with_loss got loss and batch_loss, two names for one thing: give one")
            loss = batch_loss
        reported = read_losses(loss, len(ticket.batch.indices))
        if not self._weighs and isinstance(ticket.batch, WeighedBatch):
            self._ask_for_weights(ticket.batch)
        self._reporter = threading.get_ident()
        started = self._clock.monotonic() if self._bus else 0.0
        if self._ranks.exchanges:
            reported, skipped = self._gather(reported, ticket, bool(skipped))
        outdated = self._desk.close(ticket)
        if self._search is not None:
            return self._search.report(reported)
        progress = self._progress
        step = progress.global_step
        rows = self._catalog.look_up(ticket.indices)
        expected = rows.expected
        judgement = self._safety.judge(
            step, reported, expected, ticket.indices, skipped=bool(skipped), outdated=outdated
        )
        if judgement.accepted:
            self._record(ticket, rows, reported)
            if self._replays and judgement.verdict is Verdict.CALM:
                self._desk.remember(step, ticket, reported.mean)
        progress.global_step += 1
        progress.reported += 1
        if self._bus:
            self._emit_loss(ticket, reported.mean, expected, judgement, started)
        rolled_back = judgement.alarming and self._react(step, judgement, reported.mean, expected, ticket.indices)
        if progress.reported == self._chooser.batches:
            self._end_epoch(completed=True)
        surprise = reported.mean - expected
        return StepResult(judgement.accepted, rolled_back, judgement.verdict, reported.mean, expected, surprise, step)

    def _emit_loss(self, ticket: Ticket, loss: float, expected: float, judgement: Judgement, started: float) -> None:
        self._bus.emit(
            events.LossReported(
                step=self._progress.global_step - 1,
                epoch=self._progress.epoch,
                loss=loss,
                expected_loss=expected,
                lr=ticket.batch.lr,
                verdict=judgement.verdict.value,
                score=judgement.score,
                size=len(ticket.indices),
                step_seconds=started - (ticket.issued_at or started),
                r8_seconds=self._clock.monotonic() - started + ticket.draw_seconds,
            )
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
        word = self._control.word(self._safety.damaged, skipped=skipped)
        step = self._progress.global_step
        reported, word = self._ranks.gather(reported, ticket.indices, ticket.order, step, word)
        self._control.hear(word)
        self._safety.hear(word)
        return reported, word.skipped

    def log(self, **metrics: float) -> None:
        """Show numbers of your own (`val_loss=`, `grad_norm=`, ...) beside the scheduler's.

        Raises:
            TypeError: One is not a number; none is shown then.
        """
        numbers = {name: read_number(name, value) for name, value in metrics.items()}
        for name, number in numbers.items():
            self._bus.emit(events.MetricLogged(step=self._progress.global_step, name=name, value=number))
            if self._ranks.writes:
                self._saver.logged(self._progress.global_step, name, number)
                if self._saver.best_due and self._control.together:
                    self._control.ask_for_save()

    # One epoch ----------------------------------------------------------------------------

    @_QUIETLY
    def _start_epoch(self) -> None:
        step, epoch = self._progress.global_step, self._progress.epoch
        done, total = self._budget.position(epoch, 0, 1, step)
        rng = self._streams.at(Purpose.EXCLUSION, epoch)
        excluded = in_any(self._safety.quarantine, self._guard.start_epoch(self._catalog, done / total, rng))
        table = self._catalog.refresh_quadrants(self._streams.at(Purpose.PLAN, epoch, 1), excluded)
        if table is not None:
            self._bus.emit(events.QuadrantsRefreshed(step=step, epoch=epoch, **asdict(table)))
        alike = self._guard.undecided(done / total)
        self._chooser.start_epoch(epoch, step, done / total, excluded, alike=alike)
        decisions = self._chooser.rules.pop_decisions()
        for decision, reason, figure in decisions:
            self._bus.emit(events.StrategyDecided(step=step, decision=decision, reason=reason, figure=figure))
        if self._ranks.any_of(bool(decisions)):
            self._safety.announce(step, "a strategy decided")
        self._progress.start_epoch()
        self._epoch_started = self._clock.monotonic()
        self._bus.emit(
            events.EpochStarted(step=step, epoch=epoch, phase=self._chooser.phase, batches=self._chooser.batches)
        )

    def _end_epoch(self, *, completed: bool) -> None:
        for ticket in self._desk.drop_all():
            self._chooser.forget(ticket.indices)
        ended = self._progress
        ended.stage = Stage.DONE
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

    # One step -----------------------------------------------------------------------------

    def _next_ticket(self) -> Ticket | None:
        """Draw the next batch; None when the epoch's plan, or the budget, is used up."""
        epoch, step = self._progress.epoch, self._progress.global_step + self._desk.open
        if self._progress.stage is not Stage.RUNNING or self._budget.used_up(step) or self._control.stops_now:
            return None
        started = self._clock.monotonic() if self._bus else 0.0
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
        return self._ticket(indices, weights, number, step, (cursor, batches), started)

    def _ticket(
        self,
        indices: NDArray[np.int64],
        weights: NDArray[np.float32] | None,
        number: int,
        step: int,
        place: tuple[int, int],
        started: float,
    ) -> Ticket:
        cursor, batches = place
        epoch, size = self._progress.epoch, len(indices)
        order, mine = None, indices
        if self._ranks.slices > 1 and (order := self._ranks.order(size, self._streams, epoch, cursor)) is not None:
            order_here = order[self._ranks.cut(size)]
            mine, weights_here = indices[order_here], None if weights is None else weights[order_here]
        else:
            mine, weights_here = indices.copy(), weights
        kind = Batch if weights is None else WeighedBatch
        shown = self._ones[: len(mine)] if weights_here is None else weights_here
        batch = kind(mine, self._lr, shown.copy(), number, step, epoch)
        now = self._clock.monotonic() if self._bus else 0.0
        if self._bus and self._bus.wants_batches:
            self._bus.emit(events.BatchIssued(step=step, epoch=epoch, size=size, lr=self._lr, seconds=now - started))
        return Ticket(batch, indices, weights, cursor, batches, now, now - started, order)

    def _record(self, ticket: Ticket, rows: Rows, reported: Reported) -> None:
        """Let an accepted loss enter the catalog, and the strategy hear of it."""
        step = self._progress.global_step
        values = reported.values if reported.own is None else reported.own
        if values is None:
            losses = self._catalog.record_batch(rows, reported.mean, step)
        else:
            once = self._chooser.each_once
            losses = self._catalog.record(rows, values, step, reported.mean, once=once)
        self._progress.accept(reported.mean)
        if self._chooser.listens:
            per_sample = values is not None
            self._chooser.observe(
                LossReport(ticket.indices, losses, reported.mean, per_sample, step, self._progress.epoch)
            )

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
        if self._bus and self._bus.commanding:
            self._control.obey(self._progress.global_step, self._save_if_possible)
        if self._ranks.world_size > 1:
            self._control.act_together(self._progress.global_step)
        self._safety.before_step(self._progress.global_step)
        if self._control.save_due:
            self._control.save_due = False
            self._save_if_possible()
        self._save_if_due()

    # LR search ----------------------------------------------------------------------------

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
                    ticket = self._ticket(
                        indices, None, self._desk.new_id(), self._progress.global_step, (0, 0), started
                    )
                    yield self._desk.issue(ticket)
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

    # State --------------------------------------------------------------------------------

    def update_cpu_backup(self, state: Any) -> None:
        """Keep a deep copy of the model's state in RAM, to roll back to.

        Args:
            state: Any tree of arrays, tensors, dicts, lists and copyable objects.
        """
        self._check_open()
        if self._search is None:  # a backup amid the search would be of a model that is thrown away
            self._safety.keep(state, self._progress.global_step)

    def restore_best(self) -> int:
        """Bring the model back to the backup in RAM, or else the checkpoint, whose losses were lowest.

        The run's position, learning rate and catalog stay as they are.

        Returns:
            The step of that state.

        Raises:
            LookupError: There is none.
            RuntimeError: `load_callback` failed.
        """
        return self._safety.restore_best(self._progress.global_step, self._progress.epoch)

    def save_checkpoint(self, is_final: bool = False, *, name: str = "") -> Path:
        """Write the run's state, and the model through `save_callback`; return the checkpoint's path.

        On several ranks, rank 0 writes it; the others write nothing and get the directory's path. With a collective
        `save_callback` all ranks have to call it.

        Args:
            is_final: Mark the checkpoint as the run's last one: it stays whatever follows.
            name: A word that is added to the folder's name; such a checkpoint stays too.

        Raises:
            CheckpointError: Nothing was saved; earlier checkpoints are as they were.
        """
        step = self._progress.global_step
        if self._args.save is not None and self._desk.in_step and (self._ranks.writes or self._together):
            raise CheckpointError(
                f"the loss of step {step} has not been reported, so the model may be a step ahead of the run: call "
                "save_checkpoint after update_with_loss, or outside the batch loop"
            )
        return self._save(name or ("final" if is_final else ""))

    def _save(self, tag: str = "") -> Path:
        step, epoch = self._progress.global_step, self._progress.finished_epoch
        write = partial(self._saver.save, step, epoch, self.state_dict, tag)
        if self._together is None:
            return write() if self._ranks.writes else self._saver.store.directory
        if self._ranks.writes:
            return self._together.lead(write)
        self._saver.note(step, epoch)
        path = self._together.follow(self.state_dict)
        self._saver.note(step, epoch, path)
        return path

    def load_checkpoint(self, filepath: str | Path | None = None, *, path: str | Path | None = None) -> None:
        """Restore the run's state, and the model through `load_callback`.

        What this scheduler was created with counts where the run may differ from it (the learning rate, the batch
        size, the budget, the groups, ...).

        Args:
            filepath: A checkpoint, or a directory of them: the newest valid one of the run that saved there last.
            path: Another name for it.

        Raises:
            FileNotFoundError: There is none.
            CheckpointError: It cannot be used; the run is as it was.
        """
        found = one_of("load_checkpoint", filepath=filepath, path=path)
        if self._config.shard is not None:
            found = common_checkpoint(Path(found), *self._config.shard, self._args.all_gather)
        self._restore(self._saver.find(found))

    def _restore(self, loaded: LoadedCheckpoint) -> None:
        check_state(loaded.state, self._config)
        if self._args.load is not None:  # first: it may fail, and nothing has changed yet
            self._args.load(str(loaded.model_path), from_ram=False)
        elif loaded.holds_model:
            message = f"there is no load_callback: the model in {loaded.path} was not loaded"
            self._bus.emit(events.Notice(step=loaded.step, message=message, level="warning"))
        self.load_state_dict(loaded.state)
        self._saver.restored(loaded, self._progress.finished_epoch)

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

    def state_dict(self) -> State:
        """Return all that the next step depends on: JSON scalars, lists, dicts and numpy arrays.

        Saved with `torch.save` it loads with `torch.load`'s defaults (see `portable.py`).

        Raises:
            ProtocolError: The search of `auto_find_lr` is running.
        """
        if self._search is not None and self._search.running:
            raise ProtocolError("the LR search is running: its state cannot be saved, save before or after it")
        state = {
            "version": __version__,
            "config": self._config.to_json(),
            "groups": None if self._args.groups is None else self._args.groups.copy(),
            **self._progress.state_dict(),
            "searched": self._search is None,
            "budget": self._budget.state_dict(),
            "tickets": self._desk.state_dict(),
            "chooser": self._chooser.state_dict(),
            "catalog": self._catalog.state_dict(),
            "safety": self._safety.state_dict(),
            "guard": self._guard.state_dict(),
        }
        return portable(state)  # type: ignore[no-any-return]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; a finished run goes on where there are more epochs now.

        Raises:
            ConfigError: The state belongs to another data set, strategy or seed, and nothing has changed; or it is
                damaged, and the run goes on as before, without the backups in RAM that it had.
            ProtocolError: The search of `auto_find_lr` is running.
        """
        state = unpacked(state)
        check_state(state, self._config)
        before, flags = self.state_dict(), (self._search, self._control.stop, self._begun, self._resumed)
        try:
            self._apply(state)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            self._apply(before)
            self._search, self._control.stop, self._begun, self._resumed = flags
            reason = f"the state is damaged ({type(error).__name__}: {error}): load another one, or start a new run"
            raise ConfigError([reason]) from error

    def _apply(self, state: Mapping[str, Any]) -> None:
        self._progress = Progress.from_state(state)
        if state["searched"] and (state["config"].get("auto_find_lr") or self._progress.global_step):
            self._search = None
        self._budget.load_state_dict(state["budget"])
        if state["config"].get("initial_lr") != self._config.initial_lr:  # what was given now counts
            self._budget.peak = self._config.initial_lr
        self._catalog.load_state_dict(state["catalog"])
        self._desk.load_state_dict(state["tickets"], self._progress.epoch, int(state["chooser"]["batches"]))
        done, total = self._budget.position(self._progress.epoch, 0, 1, self._progress.global_step)
        self._chooser.load_state_dict(state["chooser"], self._progress.epoch, self._progress.global_step, done / total)
        self._safety.load_state_dict(state["safety"])
        self._guard.load_state_dict(state["guard"])
        self._epoch_started = self._clock.monotonic()
        self._lr = self._lr_at(self._chooser.drawn, self._chooser.batches)
        self._control.stop = None
        self._begun = False
        self._resumed = True
        self._saver.note(self._progress.global_step, self._progress.finished_epoch)

    def _save_if_due(self) -> None:
        best = self._saver.best_due and not self._control.together  # else all ranks hear of it with the next report
        if best or self._saver.due(self._progress.global_step, self._progress.finished_epoch):
            self._save_if_possible(background=self._together is None)

    def _save_if_possible(self, *, background: bool = False) -> None:
        """Save; a failure is an event and a warning, and training goes on.

        Args:
            background: A thread does what does not need the model, while training goes on.
        """
        if self._config.checkpoint_dir is None or not (self._ranks.writes or self._together):
            return
        if self._search is not None and self._search.running:
            return
        try:
            if background:
                self._saver.save_in_background(
                    self._progress.global_step, self._progress.finished_epoch, self.state_dict
                )
            else:
                self._save()
        except CheckpointError as error:
            not_saved(error)

    def _save_last(self) -> None:
        """Save the last state of a run that has a cadence, unless that has been done."""
        if self._saver.owes(self._progress.global_step) and not self._diverged:
            self._save_if_possible()

    def _rescue(self, thrown: BaseException | None) -> str:
        """Save what a run that is thrown out of its loops, or left by `break`, has done since its last checkpoint.

        Args:
            thrown: What throws it out, or None: who leaves a loop of his own will has not left a step halfway.

        Returns:
            What to tell of it; "" where there is nothing to say.
        """
        step = self._progress.global_step
        signalled = self._control.interrupts.pending is not None
        writes = self._ranks.writes or self._together is not None
        if self._diverged or not writes or not (signalled or self._saver.owes(step)):
            return ""
        if self._together is not None and not self._control.interrupted:
            return ""  # the others may be elsewhere, and all have to write it
        halfway = self._desk.in_step or (thrown is not None and self._desk.left_in_step)
        if halfway and self._args.save is not None:
            back = self._safety.recall(step, self._saver.saved_at)
            if back is None:
                return self._saver.broken_off(step)
            if back < step:
                self._desk.outdate()
                if self._replays:
                    self._progress.take_back(*self._desk.replay(back))
            self._save_if_possible()
            return self._saver.brought_back(step, back)
        self._save_if_possible()
        return self._saver.farewell(step, writes=True)

    # Beginning and end --------------------------------------------------------------------

    def _begin(self, *, anyhow: bool = False) -> None:
        """Open what the run shows itself on; the first call counts.

        Args:
            anyhow: Also where nothing is left to train.
        """
        self._check_open()
        if self._begun or (self._over() and not anyhow):
            return
        self._begun, self._control.stop = True, None
        _running.add(self)
        if self._ranks.writes:
            self._saver.begin()
        self._output.begin(self._progress.global_step, self._budget.elapsed, resumed=self._resumed)
        if out := self._config.left_out:
            message = (
                f"each epoch leaves out {out} samples, others each time: its last batch gives all "
                f"{self._config.world_size} ranks equally many"
            )
            self._bus.emit(events.Notice(step=self._progress.global_step, message=message))
        self._budget.begin()

    def _end(self, reason: str) -> None:
        if self._begun:
            if (missed := self._saver.missed_metric()) and reason == "finished" and self._ranks.writes:
                self.tell(missed)
            self._begun = False
            self._budget.stop()
            levels, warning = self._safety.levels(), self._safety.ending(self._progress.global_step)
            self._output.end(self._progress.global_step, reason, self._budget.elapsed, levels, warning)
        self._saver.close()

    def _over(self) -> bool:
        """Whether the budget is spent."""
        return self._budget.over(self._progress.epoch, self._progress.global_step)

    def add_sink(self, sink: Sink) -> None:
        """Let one more listener hear the run from now on; it is closed with the others."""
        self._bus.add(sink)

    def terminal(self) -> AbstractContextManager[None]:
        """Lend the terminal: inside `with scheduler.terminal():` an editor, a password or a menu have it to themselves.

        `input()`, `getpass`, reads from `sys.stdin` and debuggers need no such line.
        """
        return self._output.terminal()

    def close(self) -> None:
        """Save what the cadence owes, release terminal, log, directory and signal handlers; any number of times."""
        self._close("closed", sys.exception())

    def _close(self, reason: str, error: BaseException | None, *, printed: bool = False) -> None:
        if self._closed:
            return
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

    def _check_open(self) -> None:
        if self._closed:
            raise ProtocolError("this scheduler is closed: create a new one, or resume_from_checkpoint")


class _BatchLoop:
    """The batches of a loop. Asked beyond the last one, as loaders with workers do, it lets the scheduler know."""

    def __init__(self, batches: Iterator[Batch], beyond: Callable[[], None]) -> None:
        self._batches = batches
        self._beyond = beyond
        self._over = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._over:
            self._beyond()
            raise StopIteration
        try:
            return next(self._batches)
        except BaseException:
            self._over = True
            raise

    def close(self) -> None:
        """Leave the loop: batches that are out will be handed out again."""
        self._over = True
        self._batches.close()  # type: ignore[attr-defined]


def one_of(function: str, **names: Any) -> Any:
    """Return the one argument that was given under one of several names."""
    given = [value for value in names.values() if value is not None]
    if len(given) != 1:
        raise TypeError(f"{function} needs a path as {' or '.join(names)}, got {names}")
    return given[0]


_running: weakref.WeakSet[R8Scheduler] = weakref.WeakSet()


@atexit.register
def _close_forgotten() -> None:
    """Save what a program that ends without `close()` owes, such as one that an error ends."""
    for run in list(_running):
        if run._control.interrupts._pid in (0, os.getpid()):  # in a forked child the run is its parent's
            error = getattr(sys, "last_value", None)
            run._close("closed" if error is None else "error", error, printed=True)
