"""Everything that a report tells of one run, read from its folder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from learnit_r8 import events as e
from learnit_r8.errors import ConfigError
from learnit_r8.report.bands import Floats
from learnit_r8.run.journal import Entry, entry
from learnit_r8.run.metric import is_validation
from learnit_r8.run.samples_file import CatalogSnapshot, read_catalog
from learnit_r8.run.table import EventsTable, read_table
from learnit_r8.run.tail import CONSOLE_FILE, EVENTS_FILE, ConsoleTail

CONSOLE_LINES = 200
JOURNAL_LINES = 500
_CONSOLE_BYTES = 1 << 19
_Kind = TypeVar("_Kind", bound=e.Event)
_ROUTINE = (e.Evaluated, e.EpochStarted, e.QuadrantsRefreshed)


@dataclass(frozen=True, slots=True, eq=False)
class RunData:
    """One run."""

    folder: Path  # where it was read from
    name: str  # what it calls itself
    table: EventsTable  # its log
    catalog: CatalogSnapshot | None  # the samples' figures; None where the run wrote none, or a damaged file
    console: list[str]  # the last lines that it printed
    problem: str  # what could not be read, as a sentence; empty when all could

    def of(self, kind: type[_Kind]) -> list[_Kind]:
        """Return the events of one kind, in the order of the log."""
        return [event for event in self.table.others if type(event) is kind]

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration that the last process started with."""
        started = self.of(e.RunStarted)
        return started[-1].config if started else {}

    @property
    def seconds(self) -> float:
        """Seconds of all processes together, from each one's start to its last event."""
        return sum(end - start for start, end in self._spans())

    def _spans(self) -> Iterator[tuple[float, float]]:
        starts = [event.time for event in self.of(e.RunStarted)]
        for i, start in enumerate(starts):
            until = starts[i + 1] if i + 1 < len(starts) else math.inf
            times = self.table.columns["time"]
            last = float(times[times < until].max(initial=start))
            others = [event.time for event in self.table.others if start <= event.time < until]
            yield start, max([last, *others])

    @property
    def state(self) -> str:
        """Why the run ended, or that it has not."""
        ended = self.of(e.RunEnded)
        later = bool(ended) and any(event.time > ended[-1].time for event in self.of(e.RunStarted))
        return ended[-1].reason if ended and not later else "not ended"

    def time_spent(self) -> dict[str, float]:
        """Return where the time went, in seconds; what no event accounts for stands last."""
        columns = self.table.columns
        spent = {
            "your training step": float(np.nansum(columns["step_seconds"])),
            "scheduler": float(np.nansum(columns["r8_seconds"])),
            "evaluation": self._evaluations(),
            "backups in RAM": self.table.backups,
            "checkpoints": sum(event.seconds for event in self.of(e.CheckpointSaved)),
            "rollbacks": sum(event.seconds for event in self.of(e.RolledBack)),
        }
        rest = self.seconds - sum(spent.values())
        return {**spent, "between steps (loading and the rest)": max(0.0, rest)}

    def _evaluations(self) -> float:
        """Return the seconds that lie before validation metrics, since the event before each."""
        times = {name: rows[1] for name, rows in self.table.metrics.items()}
        ends = np.unique(np.concatenate([[], *(found for name, found in times.items() if is_validation(name))]))
        others = np.array([event.time for event in self.table.others])
        since = np.full(len(ends), -math.inf)
        for some, side in (
            (self.table.columns["time"], "right"), (others, "right"), *((found, "left") for found in times.values())
        ):  # fmt: skip
            before = np.append(-math.inf, np.sort(some, kind="stable"))
            since = np.maximum(since, before[np.searchsorted(before, ends, side) - 1])  # type: ignore[call-overload]
        seconds = ends - since
        return float(seconds[np.isfinite(seconds)].clip(0.0).sum())

    @property
    def metrics(self) -> dict[str, tuple[Floats, Floats]]:
        """The user's own numbers: name -> steps and values, float64 `[n]` each."""
        return {name: (rows[0], rows[2]) for name, rows in self.table.metrics.items()}

    def journal(self) -> list[Entry]:
        """Return the last notable events as lines, newest first."""
        notable = [event for event in self.table.others if not isinstance(event, _ROUTINE)]
        lines = [entry(event) for event in notable[-JOURNAL_LINES:]]
        return [line for line in reversed(lines) if line is not None]


def load_run(folder: Path) -> RunData:
    """Read a run.

    Raises:
        ConfigError: The log holds no reported loss.
    """
    return run_of(folder, read_table(folder / EVENTS_FILE))


def run_of(folder: Path, table: EventsTable) -> RunData:
    """Return what a log and the files beside it tell of a run.

    Raises:
        ConfigError: The log holds no reported loss.
    """
    if not len(table):
        raise ConfigError([f"{folder} has no reported loss yet: let it train for a step, then ask again"])
    catalog, problem = None, ""
    try:
        catalog = read_catalog(folder)
    except ValueError as error:
        problem = str(error)
    started = [event for event in table.others if isinstance(event, e.RunStarted)]
    name = started[-1].run if started else folder.resolve().name
    return RunData(folder, name, table, catalog, _console(folder / CONSOLE_FILE), problem)


def _console(path: Path) -> list[str]:
    if not path.is_file():
        return []
    tail = ConsoleTail(path, max(0, path.stat().st_size - _CONSOLE_BYTES), CONSOLE_LINES)
    return tail.poll()
