"""When and where the run's state is saved, and the user's model with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learnit_r8 import events
from learnit_r8._version import __version__
from learnit_r8.errors import CheckpointError
from learnit_r8.loop.arguments import Arguments
from learnit_r8.sinks import EventBus

if TYPE_CHECKING:  # loaded at the first checkpoint: many runs have none
    from learnit_r8.checkpoint import CheckpointStore, LoadedCheckpoint

State = dict[str, Any]


class Saver:
    """The scheduler's side of a checkpoint directory.

    Args:
        arguments: Directory, cadence, retention and callbacks of the run.
        bus: Hears what was saved.
    """

    def __init__(self, arguments: Arguments, bus: EventBus) -> None:
        self._args = arguments
        self._bus = bus
        self._saved_step = -1
        self._saved_epoch = -1
        self._own: dict[str, int] = {}  # name: step; the directory may hold another run's checkpoints too
        self._newest: tuple[int, Path] | None = None
        self._told: set[str] = set()
        self._store: CheckpointStore | None = None

    @property
    def store(self) -> CheckpointStore:
        """The checkpoint directory.

        Raises:
            CheckpointError: The run has none.
        """
        config = self._args.config
        if config.checkpoint_dir is None:
            raise CheckpointError("this scheduler has checkpoint_dir=None: create it with a checkpoint_dir to save")
        if self._store is None:
            from learnit_r8.checkpoint import CheckpointStore

            self._store = CheckpointStore(
                config.checkpoint_dir,
                keep=config.keep_checkpoints,
                on_corrupt=self.passed_over,
                version=__version__,
            )
        return self._store

    def passed_over(self, path: Path, reason: str) -> None:
        """Tell that a damaged checkpoint is not used."""
        self._bus.emit(events.CheckpointFailed, max(self._saved_step, 0), str(path), reason)
        warnings.warn(f"a checkpoint is passed over: {reason}", RuntimeWarning, stacklevel=2)

    def due(self, step: int, finished_epoch: int | None) -> bool:
        """Whether the cadence asks for a checkpoint now.

        Args:
            step: Global step.
            finished_epoch: The epoch that has just ended, or None in the middle of one.
        """
        every = self._args.config.checkpoint_every
        if every == "epoch":
            return finished_epoch is not None and finished_epoch != self._saved_epoch
        return every is not None and step > 0 and step % int(every) == 0 and step != self._saved_step

    def save(self, step: int, finished_epoch: int | None, state: Callable[[], State], tag: str = "") -> Path:
        """Write a checkpoint and return its path.

        Raises:
            CheckpointError: It could not be written; earlier ones are as they were.
        """
        save, contents = self._args.save, state()
        write = None if save is None else lambda path: save(lambda: contents, path)
        try:
            saved = self.store.save(step, contents, write, tag=tag)
        except CheckpointError as error:
            self._bus.emit(events.CheckpointFailed, step, self._args.config.checkpoint_dir or "", str(error))
            raise
        finally:
            # A failing disk is asked again at the next cadence, not at every step.
            self.note(step, finished_epoch)
        self.note(step, finished_epoch, saved.path)
        self._bus.emit(events.CheckpointSaved, step, str(saved.path), saved.nbytes, saved.seconds)
        for problem in saved.problems:
            if problem not in self._told:  # once: it mostly is the same at every save
                self._told.add(problem)
                self._bus.emit(events.Notice, step, problem, "warning")
        return saved.path

    def note(self, step: int, finished_epoch: int | None, path: Path | None = None) -> None:
        """Take note of a save, by this rank or another, and of where it is if it worked."""
        self._saved_step = step
        self._saved_epoch = -1 if finished_epoch is None else finished_epoch
        if path is not None:
            self._own[path.name] = step
            self._newest = step, path

    def farewell(self, step: int, *, writes: bool) -> str:
        """Return where a run that stops now is saved and how it goes on, as one sentence.

        Args:
            step: Global step.
            writes: Whether this rank writes checkpoints.
        """
        stopped = f"stopped after {step} steps"
        if not writes:
            return f"{stopped}; rank 0 saves the run"
        if self._args.config.checkpoint_dir is None:
            return f"{stopped} and not saved: give R8Scheduler a checkpoint_dir to be able to go on"
        if self._newest is None:
            return f"{stopped} and not saved: start again"
        saved_step, path = self._newest
        saved = "saved" if saved_step == step else f"saved last after {saved_step}"
        lacking = "" if self._args.save else " (without the model: give save_callback for that)"
        return (
            f"{stopped}, {saved} in {path}{lacking}: go on with R8Scheduler.resume_from_checkpoint({str(path)!r}, ...)"
        )

    def find(self, path: str | Path) -> LoadedCheckpoint:
        """Return the checkpoint that a path means, verified.

        Raises:
            FileNotFoundError: There is none.
            CheckpointError: It cannot be used.
        """
        from learnit_r8.checkpoint import resolve

        return resolve(path, on_corrupt=self.passed_over)

    def find_before(self, step: int, passed_over: int) -> tuple[int, Path] | None:
        """Return step and model path of this run's newest whole checkpoint of an earlier step.

        Args:
            step: Checkpoints of this step and later ones do not count.
            passed_over: How many of the newest not to return.
        """
        if not self._own or self._args.save is None:
            return None
        found = self.store.older_than(step, names=self._own, skip=passed_over)
        return None if found is None else (found.step, found.model_path)

    def has_before(self, step: int) -> bool:
        """Whether `find_before` has anything to look at: reading a checkpoint takes far longer than a rollback."""
        if self._args.save is None or not any(saved < step for saved in self._own.values()):
            return False
        return any((self.store.directory / name).is_dir() for name, saved in self._own.items() if saved < step)

    def compare_directory(self, found: Path) -> None:
        """Tell where a resumed run saves, if that is not where its checkpoint lies.

        Args:
            found: The directory of the checkpoint.
        """
        directory = Path(self._args.config.checkpoint_dir or found).absolute()
        if directory.resolve() != found.resolve():
            message = (
                f"new checkpoints go to {directory}, not to {found.absolute()}: give checkpoint_dir to change that"
            )
            self._bus.emit(events.Notice, self._saved_step, message, "warning")

    def restored(self, loaded: LoadedCheckpoint, finished_epoch: int | None) -> None:
        """Note where the run stands after a load, so that the same state is not saved again."""
        self._saved_step = loaded.step
        self._newest = loaded.step, loaded.path
        self._saved_epoch = -1 if finished_epoch is None else finished_epoch
        path, directory = loaded.path.resolve(), self._args.config.checkpoint_dir
        self._own = {path.name: loaded.step} if directory and path.parent == Path(directory).resolve() else {}
        self._bus.emit(events.CheckpointLoaded, loaded.step, str(loaded.path))
