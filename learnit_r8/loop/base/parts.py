"""The scheduler's parts, put together; and what others may read of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8 import events
from learnit_r8.core.rng import Purpose, RandomStreams
from learnit_r8.core.urls import settled, url_of
from learnit_r8.errors import ConfigError, ProtocolError
from learnit_r8.loop.arguments import Arguments
from learnit_r8.loop.budget import Budget
from learnit_r8.loop.callbacks import LoadCallback
from learnit_r8.loop.control import Control
from learnit_r8.loop.counters import Progress, Stage
from learnit_r8.loop.crash import CrashRecorder
from learnit_r8.loop.evaluation.measured import Measured
from learnit_r8.loop.in_flight import InFlight
from learnit_r8.loop.lr_search import LrSearch
from learnit_r8.loop.output import Output
from learnit_r8.loop.ranks import Ranks, SaveTogether
from learnit_r8.loop.safety import SafetyNet
from learnit_r8.loop.sampling import Sampling
from learnit_r8.loop.saver import Saver
from learnit_r8.loop.shards import Shards
from learnit_r8.noise.guard import NoiseGuard
from learnit_r8.samples.catalog import LossCatalog
from learnit_r8.schedules import Plateau
from learnit_r8.sinks import EventBus
from learnit_r8.strategies.base import Strategy
from learnit_r8.structures.key_table import KeyTable
from learnit_r8.types import Batch, Sink


class Parts:
    """A run's parts, and what users and integrations may ask of them."""

    def __init__(self, args: Arguments) -> None:
        config = args.config
        self._args, self._config, self._clock = args, config, args.clock
        kind, world = (Ranks, config.world_size) if config.shard is None else (Shards, config.shard[1])
        self._ranks = kind(args.rank, world, args.all_gather, args.clock, args.plan())
        leads = self._ranks.rank == 0  # a tracker gets each number once
        self._bus = EventBus([s for s in args.sinks if leads or not getattr(s, "once", False)], args.clock)
        self._budget = Budget(config, args.schedule, self._ranks.clock)
        plateau = None if config.plateau is None else Plateau(**config.plateau)
        self._measured = Measured(args.evaluation, config.evaluation, plateau, self._budget)
        self._unshared: list[dict[str, float]] = []  # numbers of rank 0
        if self._measured.ema is not None:
            args = self._args = self._measured.ema.along(args)
        self._streams = RandomStreams(config.seed, config.shard and config.shard[0])
        self._catalog = self._ranks.new_catalog(config.num_samples)
        self._call(args.keys)
        self._chooser = Sampling(args.strategy, config, self._catalog, self._streams, self._ranks.of_plans)
        self._replays = config.rollback_data == "replay"  # after rollbacks; where a step is broken off always
        self._desk = InFlight(config.lookahead, 4096 if self._replays else 512)  # the longest automatic interval
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
        evidence, recent = settled(config.log_dir or config.checkpoint_dir), partial(tuple, self._bus.recent)
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
            CrashRecorder(evidence, config.to_json(), recent, self._catalog.names),
            self._ranks,
        )
        self._safety.ema = self._measured.ema
        self._bus.first, self._safety.tell_calm = self._safety.settle, self._bus.emit_late
        saves = config.checkpoint_dir is not None
        self._control = Control(self._bus, self._ranks, args.clock, saves=saves, signals=config.signals)
        self._control.together = self._together is not None or config.shard is not None
        self._output = Output(args, self._bus, self._catalog, self._guard, self._ranks.rank)
        # Whether tickets can be made ready ahead of their turn, for what is the tickets' rate and peak then.
        self._foresees = kind is Ranks and world == self._ranks.slices == 1 and config.train_duration_seconds is None
        self._puts_off = self._foresees and config.clip is None and not self._chooser.listens
        self._ready_at = 0.0, 1.0
        self._due_at = 0  # step before which nothing is to be done between two steps
        self._ones = np.ones(config.batch_size, np.float32)
        self._progress = Progress()
        self._epoch_started = 0.0  # monotonic seconds
        self._lr = self._lr_at(0, 0)
        self._search = LrSearch(config, self._streams) if config.auto_find_lr else None
        self._resumed = self._begun = self._closed = False
        self._weighs = False  # whether it is known that importance weights reach the loss, or was said that they do not
        self.lr_asked = False  # for the rate of a step, by whoever sets it
        self.host_saves = False  # a framework saves the run, and acts on signals
        self._within = self._looped = False  # whether an epoch loop is going, or ever began
        self._diverged = False
        self._grown = 0  # samples that have come since the last epoch began
        self._pid = self._forked_at = 0  # process that runs the loop, once it has begun; a forked one's first step
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
        self.lr_asked = True
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
    def keys(self) -> KeyTable | None:
        """The samples' keys: `keys.of(ids)` and `keys.numbers(keys)`; None where the run was given none."""
        return self._catalog.keys

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

    def tell(self, message: str) -> None:
        """Show a warning beside the run's other events, once; without a display, on standard error."""
        self._saver.tell(self._progress.global_step, message)

    def importance_weights(self, position: int) -> NDArray[np.float32] | None:
        """Return the importance weights of an open batch, None where all are 1."""
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
            return self._budget.ended or "the run has spent its budget"
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
        load, ema = LoadCallback(restore), self._measured.ema
        self._due_at = 0
        if ema is None:
            self._safety.attach(capture, load)
        else:
            self._safety.attach(ema.capturing(capture), ema.loading(load))

    def terminal(self) -> AbstractContextManager[None]:
        """Lend the terminal: inside `with scheduler.terminal():` an editor, a password or a menu have it to themselves.

        `input()`, `getpass`, reads from `sys.stdin` and debuggers need no such line.
        """
        return self._output.terminal()

    def settle(self) -> None:
        """Let the listeners hear all that has happened: of calm losses they hear a fifth of a second late at most."""
        self._safety.settle()

    def add_sink(self, sink: Sink) -> None:
        """Let one more listener hear the run from now on; it is closed with the others."""
        self._bus.add(sink)

    def _call(self, keys: KeyTable | None) -> None:
        """Call the samples by these keys."""
        self._catalog.keys = keys
        self._bus.names = None if keys is None else keys.names

    def _lr_at(self, cursor: int, batches: int) -> float:
        progress = self._progress
        position = self._budget.position(progress.epoch, cursor, batches, progress.global_step)
        return self._budget.learning_rate(position, self._safety.lr_multiplier(self._progress.global_step))

    def _check_search(self, lead: int) -> None:
        if self._search is not None and lead > 0:
            raise ProtocolError(
                f"auto_find_lr needs each loss before the next batch, and this loader is {lead} ahead: search "
                "with a loader that does not prefetch (num_workers=0), or give initial_lr"
            )

    def _check_open(self) -> None:
        if self._closed:
            raise ProtocolError("this scheduler is closed: create a new one, or resume_from_checkpoint")

    def _over(self) -> bool:
        """Whether the budget is spent."""
        return self._budget.over(self._progress.epoch, self._progress.global_step)
