"""Which of a run's checkpoints stay: the newest, every n-th, the best, and those with a name of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from learnit_r8.checkpoint.directory import Entry

MIN_KEEP = 2
"""The newest checkpoint is not the only one, even when that is asked for."""


@dataclass(frozen=True, slots=True)
class Retention:
    """What a run keeps.

    Attributes:
        newest: How many of the newest, at least `MIN_KEEP`.
        every: Steps: the first checkpoint at or after each multiple stays. None: none for that reason.
        best: Name of a logged metric: the checkpoint with its best value stays. None: none for that reason.
        sign: 1 where higher values of it are better, -1 where lower ones are.
    """

    newest: int = 3
    every: int | None = None
    best: str | None = None
    sign: int = -1

    def doomed(self, own: Sequence[Entry], metrics: Callable[[Path], Mapping[str, float]]) -> list[Entry]:
        """Return those that may go.

        Args:
            own: The run's readable checkpoints, saved last first.
            metrics: Returns what was logged at a checkpoint's step.
        """
        stay = {entry.path for entry in own[: max(self.newest, MIN_KEEP)]}
        if self.every is not None:
            last = 0
            for entry in reversed(own):
                turn = (entry.manifest.step if entry.manifest else 0) // self.every
                if turn > last:
                    last = turn
                    stay.add(entry.path)
        best = self.best_of(own, metrics)
        if best is not None:
            stay.add(best[1].path)
        return [entry for entry in own if entry.path not in stay and not (entry.manifest and entry.manifest.tag)]

    def best_of(
        self, own: Sequence[Entry], metrics: Callable[[Path], Mapping[str, float]]
    ) -> tuple[float, Entry] | None:
        """Return the best value of the metric and its checkpoint, the oldest of equal ones; None without one."""
        if self.best is None:
            return None
        values = ((metrics(entry.path).get(self.best, math.nan), entry) for entry in reversed(own))
        finite = [(value, entry) for value, entry in values if math.isfinite(value)]
        return max(finite, key=lambda pair: self.sign * pair[0]) if finite else None
