"""When and where the run's state is saved, and the user's model with it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learnit_r8 import events
from learnit_r8._version import __version__
from learnit_r8.core.urls import url_of
from learnit_r8.errors import CheckpointError, tell
from learnit_r8.loop.arguments import Arguments
from learnit_r8.loop.counters import NEVER
from learnit_r8.loop.signals import say
from learnit_r8.sinks import EventBus

if TYPE_CHECKING:  # loaded at the first checkpoint: many runs have none
    from learnit_r8.checkpoint import CheckpointStore, LoadedCheckpoint, SavedCheckpoint
    from learnit_r8.checkpoint.background import Background

State = dict[str, Any]


class Saver:
    """The scheduler's side of a checkpoint directory."""

    def __init__(self, arguments: Arguments, bus: EventBus) -> None:
        self._args = arguments
        self._bus = bus
        self._attempted = 0  # step of the last attempt: the cadence counts from there
        self._attempted_epoch = -1
        self._own: dict[str, int] = {}  # name: step; the directory may hold another run's checkpoints too
        self._newest: tuple[int, Path] | None = None
        self._told: set[str] = set()
        self._store: CheckpointStore | None = None
        self._logged: tuple[int, float] | None = None  # step and value of the metric that `keep_best` names
        self._best: float | None = None
        self.best_due = self._prepared = False
        self._under_way: tuple[int, bool, Background[SavedCheckpoint]] | None = None  # step, for a new best value

    @property
    def store(self) -> CheckpointStore:
        """The checkpoint directory; a CheckpointError where the run has none."""
        config = self._args.config
        if config.checkpoint_dir is None:
            raise CheckpointError("this scheduler has checkpoint_dir=None: create it with a checkpoint_dir to save")
        if self._store is None:
            from learnit_r8.checkpoint import Retention, new_run, open_store

            best, mode = config.keep_best or (None, "min")
            self._store = open_store(
                config.checkpoint_dir,
                on_corrupt=self.passed_over,
                version=__version__,
                run=new_run(),
                retention=Retention(config.keep_checkpoints, config.keep_every, best, 1 if mode == "max" else -1),
            )
        return self._store

    def begin(self) -> None:
        """Note in a directory that other runs have used that this one begins, so that it is not taken for them.

        Where it is a folder that no checkpoint can be written to, that is told now, not after the first epoch.
        """
        config = self._args.config
        if config.checkpoint_dir is None or (config.checkpoint_every is None and self._args.save is None):
            return
        if url_of(config.checkpoint_dir) is None:
            folder = Path(os.path.abspath(config.checkpoint_dir))
            nearest = next(path for path in (folder, *folder.parents) if path.exists())
            if not nearest.is_dir() or not os.access(nearest, os.W_OK):
                what = "cannot be written to" if nearest.is_dir() else "is no folder"
                self.tell(self._attempted, f"no checkpoint can be saved: {nearest} {what}; give another checkpoint_dir")
                return
            if nearest != folder:
                return
        try:
            self.store.begin()
        except CheckpointError as error:
            self.tell(self._attempted, str(error))
        finally:
            self.store.close()  # who has not saved yet keeps nobody out

    def close(self) -> None:
        """Let others have the directory; the next save takes it again."""
        self.settle()
        if self._store is not None:
            self._store.close()

    def tell(self, step: int, message: str) -> None:
        """Say what the user would not expect, once: it mostly is the same at every save."""
        if message not in self._told:
            self._told.add(message)
            self._bus.emit(events.Notice(step=step, message=message, level="warning"))
            if self._args.ui == "off":  # no display shows it
                say(f"[r8] {message}")

    def passed_over(self, path: Path, reason: str) -> None:
        """Tell that a damaged checkpoint is not used."""
        self._bus.emit(events.CheckpointFailed(step=self._attempted, path=str(path), reason=reason))
        tell(f"a checkpoint is passed over: {reason}", stacklevel=2)

    def due(self, step: int, finished_epoch: int | None) -> bool:
        """Whether the cadence asks for a checkpoint now: its turn has come, or has passed since the last one."""
        every = self._args.config.checkpoint_every
        if every == "epoch":
            return finished_epoch is not None and finished_epoch != self._attempted_epoch
        return every is not None and step // int(every) > self._attempted // int(every)

    @property
    def next_due(self) -> int:
        """Step before which nothing is to be done amid an epoch; 0 while a checkpoint is under way or due."""
        every = self._args.config.checkpoint_every
        if not self._prepared or self._under_way is not None or self.best_due:
            return 0
        return (self._attempted // every + 1) * every if isinstance(every, int) else NEVER

    def prepare(self, step: int) -> None:
        """Get ready for the first checkpoint, once there was a step: by then optimizers have their state."""
        if self._prepared or step == 0:
            return
        self._prepared = True
        if self._args.save is not None and self._args.config.checkpoint_every is not None:
            self._args.save.prepare()

    def owes(self, step: int) -> bool:
        """Whether the state of this step, the last one of a run, is still to be saved."""
        self.settle()
        config = self._args.config
        wanted = config.checkpoint_every is not None or config.keep_best is not None
        return wanted and step > 0 and step != (self._newest[0] if self._newest else -1)

    def save(self, step: int, finished_epoch: int | None, state: Callable[[], State], tag: str = "") -> Path:
        """Write a checkpoint and return its path; a CheckpointError leaves earlier ones as they were."""
        finish, was_due = self._draft(step, finished_epoch, state, tag, copied=False)
        return self._committed(step, was_due, finish)

    def save_in_background(self, step: int, finished_epoch: int | None, state: Callable[[], State]) -> None:
        """Do what a checkpoint needs of the model now, and let a thread do the rest; `settle` tells how that went."""
        from learnit_r8.checkpoint.background import Background

        finish, was_due = self._draft(step, finished_epoch, state, "", copied=True)
        self._under_way = step, was_due, Background(finish)

    def _draft(
        self, step: int, finished_epoch: int | None, state: Callable[[], State], tag: str, *, copied: bool
    ) -> tuple[Callable[[], SavedCheckpoint], bool]:
        self.settle()
        save, contents = self._args.save, state()
        write = None if save is None else lambda path: save(lambda: contents, path)
        # A failing disk is asked again at the next cadence, not at every step.
        self.note(step, finished_epoch)
        was_due, self.best_due = self.best_due, False
        with self._telling(step):
            return self.store.draft(step, contents, write, tag=tag, copied=copied), was_due

    @contextmanager
    def _telling(self, step: int) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            self._bus.emit(
                events.CheckpointFailed(step=step, path=self._args.config.checkpoint_dir or "", reason=str(error))
            )
            raise

    def _committed(self, step: int, was_due: bool, outcome: Callable[[], SavedCheckpoint]) -> Path:
        with self._telling(step):
            saved = outcome()
        self._own[saved.path.name] = step
        self._newest = step, saved.path
        self._bus.emit(
            events.CheckpointSaved(step=step, path=str(saved.path), bytes=saved.nbytes, seconds=saved.seconds)
        )
        for problem in saved.problems:
            self.tell(step, problem)
        if self._logged is not None and (was_due or self._logged[0] == step):
            self._attach(saved.path)
        return saved.path

    def settle(self, *, wait: bool = True) -> None:
        """Take note of what has become of the checkpoint that is under way; a failure is told, and training goes on."""
        if self._under_way is None:
            return
        step, was_due, outcome = self._under_way
        if not outcome.ours or not (wait or outcome.done()):
            return
        outcome.exception()  # waits; interrupted meanwhile, it stays under way
        self._under_way = None
        try:
            self._committed(step, was_due, outcome.result)
        except CheckpointError as error:
            not_saved(error)

    def note(self, step: int, finished_epoch: int | None, path: Path | None = None) -> None:
        """Let the cadence count from a step, which was saved (at `path`) or loaded, by this rank or another."""
        self._attempted = step
        self._attempted_epoch = -1 if finished_epoch is None else finished_epoch
        if path is not None:
            self._own[path.name] = step
            self._newest = step, path

    # The best by a metric -----------------------------------------------------------------

    def logged(self, step: int, name: str, value: float) -> None:
        """Take note of a number of the user's: a new best value is a reason to save."""
        best = self._args.config.keep_best
        if best is None or name != best[0] or not math.isfinite(value):
            return
        if self._under_way is not None and self._under_way[0] != step:
            self.settle()  # whether it is the best so far decides what follows
        self._logged = step, value
        if self._under_way is not None:
            return  # `settle` writes it beside the checkpoint
        if self._newest is not None and self._newest[0] == step:
            self._attach(self._newest[1])
            return
        if self._best is None and (known := self.store.best()) is not None:
            self._best = known[0]
        self.best_due |= self._is_best(value)

    def _is_best(self, value: float) -> bool:
        higher = self._args.config.keep_best is not None and self._args.config.keep_best[1] == "max"
        return self._best is None or (value > self._best if higher else value < self._best)

    def _attach(self, path: Path) -> None:
        best = self._args.config.keep_best
        if best is None or self._logged is None:
            return
        step, value = self._logged
        try:
            self.store.add_metrics(path, {best[0]: value})
        except CheckpointError as error:
            self.tell(step, str(error))
        if self._is_best(value):
            self._best = value

    def find_best(self) -> LoadedCheckpoint | None:
        """Return this run's checkpoint with the best value of the metric that `keep_best` names, verified, or None."""
        from learnit_r8.checkpoint import resolve

        self.settle()
        config = self._args.config
        if config.keep_best is None or config.checkpoint_dir is None or (best := self.store.best()) is None:
            return None
        return resolve(best[1], on_corrupt=self.passed_over)

    def missed_metric(self) -> str:
        """Return what to tell where the metric that `keep_best` names was never logged, or ""."""
        best = self._args.config.keep_best
        if best is None or self._logged is not None:
            return ""
        return f"keep_best={best[0]!r} was never logged: give it to scheduler.log({best[0]}=...)"

    def farewell(self, step: int, *, writes: bool) -> str:
        """Return where a run that stops now is saved and how it goes on, as one sentence."""
        stopped = f"stopped after {step} steps"
        if not writes:
            return f"{stopped}; rank 0 saves the run"
        if self._args.config.checkpoint_dir is None:
            return f"{stopped} and not saved: give R8Scheduler a checkpoint_dir to be able to go on"
        saved = self.saved_at
        if self._newest is None:
            return f"{stopped} and not saved: start again"
        lacking = "" if self._args.save else " (without the model: give save_callback for that)"
        return f"{stopped}, {'saved' if saved == step else f'saved last after {saved}'} {self._goes_on(lacking)}"

    def broken_off(self, step: int) -> str:
        """Return that a step was broken off, so that the model cannot be saved, and how the run goes on; a sentence."""
        why = f"thrown out of step {step}: the model may be trained halfway and is not saved"
        saved = self.saved_at
        if self._newest is None:
            return f"{why}, nor was anything before: start again"
        return f"{why}, the run was saved last after {saved} steps {self._goes_on()}"

    def brought_back(self, step: int, back: int, again: int) -> str:
        """Return that a step was broken off and the model brought back to step `back`, and how the run goes on.

        `again` of the batches since come again.
        """
        to = "as it was before" if back == step else f"as it was after {back} steps, the newest backup in RAM"
        lost = step - back - again
        if again:
            to += f", and the {again} batches since come again"
        if lost:
            to += f"; what it learned from {lost} others since is lost"
        return f"thrown out of step {step}, the model was put back {to}; {self.farewell(step - again, writes=True)}"

    def _goes_on(self, lacking: str = "") -> str:
        path = str(self._newest[1]) if self._newest else ""
        return f"in {path}{lacking}: go on with R8Scheduler.resume_from_checkpoint({path!r}, ...)"

    @property
    def saved_at(self) -> int:
        """Step of the newest checkpoint that was saved or loaded, -1 without one."""
        self.settle()
        return -1 if self._newest is None else self._newest[0]

    def find(self, path: str | Path) -> LoadedCheckpoint:
        """Return the checkpoint that a path means, verified; FileNotFoundError or CheckpointError without one."""
        from learnit_r8.checkpoint import resolve

        self.settle()
        return resolve(path, on_corrupt=self.passed_over)

    def find_before(self, step: int, passed_over: int) -> LoadedCheckpoint | None:
        """Return this run's newest whole checkpoint of an earlier step, `passed_over` newer ones not counted."""
        self.settle()
        if not self._own or self._args.save is None:
            return None
        return self.store.older_than(step, names=self._own, skip=passed_over)

    def find_step(self, step: int) -> LoadedCheckpoint | None:
        """Return a whole checkpoint of a step, which another rank has written."""
        self.settle()
        return None if self._args.config.checkpoint_dir is None else self.store.at_step(step)

    def has_before(self, step: int) -> bool:
        """Whether `find_before` has anything to look at: reading a checkpoint takes far longer than a rollback."""
        self.settle()
        if self._args.save is None or not any(saved < step for saved in self._own.values()):
            return False
        return any((self.store.directory / name).is_dir() for name, saved in self._own.items() if saved < step)

    def compare_directory(self, saved: str | None) -> None:
        """Tell where a resumed run saves, if that is not `saved`, where it was told to save when it began."""
        directory = self._args.config.checkpoint_dir
        if directory and saved and not url_of(directory) and os.path.realpath(directory) != os.path.realpath(saved):
            message = f"new checkpoints go to {os.path.abspath(directory)}, where this one lies, not to {saved}"
            message += ": give checkpoint_dir to change that"
            self._bus.emit(events.Notice(step=self._attempted, message=message, level="warning"))

    def restored(self, loaded: LoadedCheckpoint, finished_epoch: int | None) -> None:
        """Note where the run stands after a load, so that the same state is not saved again."""
        from learnit_r8.checkpoint.remote import shown

        self.settle()
        self.note(loaded.step, finished_epoch)
        place = shown(loaded.path)
        self._newest = loaded.step, place
        self._own = {}
        if self._args.config.checkpoint_dir is not None:
            if self.store.adopt(loaded):  # older ones too: the newest may hold a model that was damaged already
                self._own = {entry.path.name: entry.manifest.step for entry in self.store.own() if entry.manifest}
            elif loaded.path.parent.resolve() == self.store.directory.resolve():
                message = f"this run branches off at {loaded.path.name}: later checkpoints there stay as they are"
                self._bus.emit(events.Notice(step=loaded.step, message=message, level="info"))
        self._bus.emit(events.CheckpointLoaded(step=loaded.step, path=str(place)))


def not_saved(error: CheckpointError) -> None:
    """Tell that a checkpoint which was due is not there."""
    tell(f"checkpoint not saved, training goes on: {error}", stacklevel=3)
