"""LR discovery inside the user's own loop: a few batches at rising rates, then back to the start."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from learnit_r8.core.config import Config
from learnit_r8.core.rng import Purpose, RandomStreams
from learnit_r8.loop.callbacks import LoadCallback, SaveCallback
from learnit_r8.loop.losses import Reported
from learnit_r8.schedules.range_test import LrFinder, LrSuggestion, plan_steps
from learnit_r8.stability.backups import BackupRing
from learnit_r8.types import Indices, StepResult, Verdict


class LrSearch:
    """The search's batches and what came of them. No epoch, no catalog entry and no step of the budget is used.

    `steps` is 0 where the run is too short for one.
    """

    def __init__(self, config: Config, streams: RandomStreams) -> None:
        self.steps = plan_steps(math.inf if config.total_steps is None else config.total_steps)
        self._streams = streams
        self._num_samples = config.num_samples
        self._batch_size = min(config.batch_size, config.num_samples)
        self.restart()

    def restart(self) -> None:
        """Begin again: a search that was left is worth nothing."""
        self._finder = LrFinder(self.steps) if self.steps else None
        self._order = np.empty(0, np.int64)
        self._taken = 0

    @property
    def running(self) -> bool:
        """Whether batches of the search were handed out."""
        return self._taken > 0

    @property
    def done(self) -> bool:
        """Whether no further batch is wanted."""
        return self._finder is None or self._finder.done

    def next_batch(self) -> tuple[Indices, float]:
        """Return sample ids and the rate to try; the data set starts over when it is used up."""
        assert self._finder is not None
        if not len(self._order):
            self._order = self._streams.at(Purpose.LR_SEARCH, 0).permutation(self._num_samples)
        start = self._taken * self._batch_size
        self._taken += 1
        indices = np.take(self._order, np.arange(start, start + self._batch_size), mode="wrap")
        return indices, self._finder.next_lr()

    def suggestion(self) -> LrSuggestion:
        """Return what was found."""
        if self._finder is None:
            return LrSuggestion(None, None, None, None, (), (), "the run is too short for a search")
        return self._finder.result()

    def report(self, reported: Reported) -> StepResult:
        """Take the loss of the last batch."""
        assert self._finder is not None
        self._finder.record(reported.mean if reported.finite else math.nan)
        verdict = Verdict.CALM if reported.finite else Verdict.NONFINITE
        return StepResult(reported.finite, False, verdict, reported.mean, math.nan, math.nan, 0)


@contextmanager
def parked(
    capture: Callable[[], Any] | None,
    load: LoadCallback,
    save: SaveCallback | None,
    scheduler_state: Callable[[], dict[str, Any]],
) -> Iterator[None]:
    """Put the user's model aside and bring it back at the end, whatever was done to it meanwhile.

    Where `capture` is None, `save` writes the model to a temporary file; it may ask for the scheduler's state.
    """
    if capture is not None:
        ring = BackupRing()
        ring.take(capture(), 0, initial=True)
        try:
            yield
        finally:
            load(ring.restore()[1], from_ram=True)
        return
    assert save is not None
    with tempfile.TemporaryDirectory(prefix="r8-lr-search-") as folder:
        path = Path(folder) / "model"
        save(scheduler_state, path)
        try:
            yield
        finally:
            load(str(path), from_ram=False)
