"""What a run shows itself on: the display, the event log, the samples' figures."""

from __future__ import annotations

import os
import platform
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from learnit_r8 import events
from learnit_r8._version import __version__
from learnit_r8.checkpoint.lock import DirectoryLock
from learnit_r8.checkpoint.storage import FileSystem
from learnit_r8.core.config import Config
from learnit_r8.core.provenance import Repository, command, device, packages, program_folder, seeds
from learnit_r8.core.urls import settled, url_of
from learnit_r8.dashboard import open_dashboard
from learnit_r8.errors import CheckpointError, tell
from learnit_r8.loop.arguments import Arguments
from learnit_r8.loop.judge import shown
from learnit_r8.noise.guard import NoiseGuard
from learnit_r8.run.samples_file import CATALOG_FILE, write_catalog
from learnit_r8.run.tail import CONSOLE_FILE, EVENTS_FILE
from learnit_r8.samples.catalog import LossCatalog
from learnit_r8.sinks import EventBus, JsonlSink
from learnit_r8.types import Sink

if TYPE_CHECKING:
    from learnit_r8.checkpoint.background import Background


_GIT_AT_END = 2.0
"""Seconds that the end of an epoch, or of the run, waits for git, which has answered long since."""


class Output:
    """Opens what is to be seen of a run when it begins, and closes it when it ends."""

    def __init__(self, args: Arguments, bus: EventBus, catalog: LossCatalog, guard: NoiseGuard, rank: int) -> None:
        self._args = args
        self._config = args.config
        self._bus = bus
        self._catalog = catalog
        self._guard = guard
        self._rank = rank
        self._display: Sink | None = None
        self._log: Sink | None = None
        self._begun = False
        self._lock: DirectoryLock | None = None
        self._logged_at: int | None = None
        self._repository: Repository | None = None  # while git has not answered
        self._folder = settled(self._config.log_dir)  # or what stands in for it, where it is a URL
        self._far = FarFolders(self._config, bus) if rank == 0 else None

    def begin(self, step: int, elapsed: float, total_steps: int | None, *, resumed: bool) -> None:
        """Open the display and the log, and tell them of the run."""
        config = self._config
        if self._far is not None and not self._begun:
            self._folder = self._far.open(step)
        log = config.log_dir is not None and self._log is None and self._rank == 0
        taken = self._lock_folder() if log else self._lock_again()
        if log and not resumed and step == 0:
            for name in (EVENTS_FILE, CATALOG_FILE, CONSOLE_FILE):
                with suppress(OSError):
                    _set_aside(Path(self._folder or ".") / name)
        missed = () if self._begun else tuple(self._bus.recent)
        self._begun = True
        self._open_display()
        if log:
            self._log = JsonlSink(Path(self._folder or ".") / EVENTS_FILE)
            self._bus.add(self._log)
        self._bus.emit(
            events.RunStarted(
                step=step,
                run=Path(config.log_dir or ".").resolve().name,
                config=config.to_json(),
                steps_per_epoch=config.steps_per_epoch,
                total_steps=total_steps,
                resumed=resumed,
                version=__version__,
                pid=os.getpid(),
                elapsed=elapsed,
            )
        )
        if self._bus.sinks:
            self._repository = Repository(program_folder())
            self._tell_made_with(step, self._repository)
        warnings = [taken] if taken else []
        if config.batch_size > config.num_samples:
            warnings.append(
                f"batch_size={config.batch_size} is larger than num_samples={config.num_samples}, so every batch is "
                "the whole data set: give a smaller batch_size"
            )
        if config.checkpoint_every is not None and self._args.save is None and self._rank == 0:
            warnings.append("there is no save_callback: the checkpoints hold the run's state, not the model")
        for message in warnings:
            self._bus.emit(events.Notice(step=step, message=message, level="warning"))
        if taken:
            tell(taken, stacklevel=4)
        for sink in filter(None, (self._display, self._log)):
            for event in missed:  # what a resume loaded, and which checkpoint it passed over
                with suppress(Exception):  # the bus drops a sink that fails, at the next event
                    sink.record(event)

    def _tell_made_with(self, step: int, repository: Repository) -> None:
        self._bus.emit(
            events.MadeWith(
                step=step,
                commit=repository.commit,
                dirty=repository.dirty,
                packages=packages(),
                device=device(),
                host=platform.node(),
                command=command(),
                seeds=seeds(self._config.seed),
            )
        )

    def hear_of_git(self, step: int) -> None:
        """Tell whether files differ from the commit, at the end of the first epoch or of the run."""
        repository = self._repository
        if repository is not None and repository.asked(_GIT_AT_END):
            self._repository = None
            if repository.dirty is not None:
                self._tell_made_with(step, repository)

    def _lock_folder(self) -> str:
        """Make the log's folder this process's own; where another live run logs there, take one beside it and tell."""
        wanted, number = Path(self._folder or "."), 1
        while True:
            folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
            self._lock = DirectoryLock(folder, FileSystem())
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._lock.take()
            except CheckpointError:
                number += 1
                continue
            except OSError:  # who writes there will tell
                return ""
            self._folder = str(folder)
            if number == 1:
                return ""
            return f"a live run writes into {wanted}, so this one is logged in {folder}: give each a log_dir of its own"

    def _lock_again(self) -> str:
        """Take the log's folder back, where the run had ended and goes on; return what to tell of it, or ""."""
        try:
            if self._lock is not None:
                self._lock.take()
        except CheckpointError:
            return f"another run has begun to write into {self._folder} meanwhile: give each a log_dir of its own"
        return ""

    def _open_display(self) -> None:
        """Open the best display that there is; it is one sink among the others."""
        self._close_display()
        if self._args.ui != "off":  # the environment's R8_UI may choose the display, not force one on a program
            self._display = open_dashboard(self._args.ui, log_dir=self._folder, rank=self._rank)
        if self._display is not None:
            self._bus.add(self._display)

    def _close_display(self) -> None:
        if self._display is not None:
            self._bus.remove(self._display)
            self._display = None

    def terminal(self) -> AbstractContextManager[None]:
        """Give the terminal to the caller for a while; what is no dashboard leaves it alone anyway."""
        suspended: Any = getattr(self._display, "suspended", nullcontext)
        return cast("AbstractContextManager[None]", suspended())

    def log_catalog(self, step: int) -> None:
        """Write the figures of the samples beside the event log; they help nobody enough to end a run."""
        if self._folder is None or self._rank != 0 or self._logged_at == step:
            return
        self._logged_at = step
        try:
            flagged = None if self._guard.mode == "off" else self._guard.flagged
            write_catalog(self._folder, self._catalog, self._args.groups, step, flagged)
        except Exception as error:
            message = f"the samples' figures were not logged: {type(error).__name__}: {error}"
            self._bus.emit(events.Notice(step=step, message=message, level="warning"))
        if self._far is not None:
            self._far.send(step)

    def end(
        self,
        step: int,
        reason: str,
        elapsed: float,
        levels: tuple[float | None, float | None, int | None],
        warning: str,
    ) -> None:
        """Tell of the end, and give the terminal back: what is printed from now on belongs on the normal screen."""
        self.log_catalog(step)
        self.hear_of_git(step)
        left_out = tuple(self._catalog.left_out.tolist())
        if warning:
            self._bus.emit(events.Notice(step=step, message=warning, level="warning"))
        if left_out:
            those = shown(self._catalog.names(left_out))
            message = f"samples left out, which faults or exclude() named: {those} (catalog.left_out has all)"
            self._bus.emit(events.Notice(step=step, message=message, level="warning"))
        final, best, at = levels
        self._bus.emit(
            events.RunEnded(
                step=step,
                reason=reason,
                seconds=elapsed,
                final_level=final,
                best_level=best,
                best_step=at,
                left_out=left_out,
            )
        )
        if self._far is not None:
            self._far.send(step, wait=True)
        if self._lock is not None:
            self._lock.release()
        self._close_display()


class FarFolders:
    """Copies what a run writes beside its checkpoints to the object stores that `log_dir` and `checkpoint_dir` name."""

    def __init__(self, config: Config, bus: EventBus) -> None:
        self._bus = bus
        self._log_dir = settled(config.log_dir)
        self._urls = sorted({url for path in (config.log_dir, config.checkpoint_dir) if path and (url := url_of(path))})
        self._sending: Background[None] | None = None

    def open(self, step: int) -> str | None:
        """Bring what earlier runs have logged; return the folder of this machine to log into."""
        if self._log_dir is None or url_of(self._log_dir) is None:
            return self._log_dir
        from learnit_r8.checkpoint.remote import remote

        store = remote(self._log_dir)
        try:
            store.bring_all()
        except CheckpointError as error:
            self._urls.remove(self._log_dir)  # what is there would be overwritten
            self._tell(step, error)
        return str(store.folder)

    def send(self, step: int, *, wait: bool = False) -> None:
        """Copy what has changed, in the background."""
        if not self._urls or (self._sending is not None and not self._sending.done() and not wait):
            return
        from learnit_r8.checkpoint.background import Background

        self._settle(step)
        self._sending = Background(self._send)
        if wait:
            self._settle(step)

    def _send(self) -> None:
        from learnit_r8.checkpoint.remote import remote

        for url in self._urls:
            remote(url).send_all()

    def _settle(self, step: int) -> None:
        sending, self._sending = self._sending, None
        try:
            if sending is not None:
                sending.result()
        except CheckpointError as error:
            self._tell(step, error)

    def _tell(self, step: int, error: CheckpointError) -> None:
        message = f"the run's log was not copied, training goes on: {error}"
        self._bus.emit(events.Notice(step=step, message=message, level="warning"))
        tell(message, stacklevel=3)


def _set_aside(path: Path) -> None:
    """Rename what an earlier run wrote, to `events.1.jsonl` and so on: two runs in one log would be drawn as one."""
    if not path.is_file():
        return
    number = 1
    while (earlier := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    path.rename(earlier)
