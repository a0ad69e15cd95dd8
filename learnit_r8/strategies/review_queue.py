"""What to repeat when: the queue that both faces of spaced repetition share.

A sample is in one of three places:

    unseen --take--> waiting(due step) --step >= due--> due pool --take--> waiting ...

* A draw makes a sample wait for `patience` steps. A report of its loss reschedules it; without
  one it simply becomes due again, so nothing that was drawn is ever lost.
* The due pool yields the hardest samples (highest average loss) first, through a `MaxTree`.
* Waiting samples stand in a calendar, due step -> ids. Entries are not removed when a sample
  is rescheduled: an entry counts only while the sample's own due step still is the entry's.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.config import Problems, argument
from learnit_r8.core.state import Kind, Saved, mask, maybe, part, sized, table
from learnit_r8.structures.max_tree import MaxTree
from learnit_r8.structures.moving_stats import ExponentialMovingStats
from learnit_r8.types import Indices, Mask

_UNSEEN = -2
_DUE = -1
_EMA = 0.3
"""Weight of a new loss in a sample's average."""

_ROW = np.dtype([("due", "i8"), ("difficulty", "f4"), ("interval", "f4")])
_OPAQUE = np.dtype(f"V{_ROW.itemsize}")  # numpy moves opaque rows faster than structured ones

_Z_EDGES = np.array([-2.0, -1.0, 1.0, 2.0])
_Z_FACTORS = np.array([4.0, 2.0, 1.0, 0.5, 0.25])


@dataclass(frozen=True, slots=True)
class Spacing:
    """How reviews are spaced; the names are those of `SpacedRepetition`'s arguments."""

    spacing_steps: float = argument(Problems.real, 0.0, 1e9)
    min_backlog_ratio: float = argument(Problems.real, 0.0, 1.0)
    growth_rate: float = argument(Problems.real, 1.0, 1e6)
    max_interval: float = argument(Problems.real, 1.0, 1e6)
    success_threshold_std: float = argument(Problems.real, -math.inf)
    patience: int = argument(Problems.integer, 1)


class ReviewQueue(Saved):
    """Unseen, due and waiting samples; `rng` puts the unseen ones in order, `stats` are of all losses."""

    _saved = table(
        difficulty=sized(np.float32, lambda queue: len(queue._rows), "queue"),
        interval=sized(np.float32, lambda queue: len(queue._rows), "queue"),
        due=sized(np.int64, lambda queue: len(queue._rows), "queue"),
        unseen=Kind(lambda queue, ids: ids[queue._due[ids] == _UNSEEN], lambda _, saved: np.array(saved, np.uint32)),
        excluded=maybe(mask(lambda queue: len(queue._due))),
        stats=part(),
    )

    def __init__(
        self,
        num_samples: int,
        spacing: Spacing,
        stats: ExponentialMovingStats,
        rng: np.random.Generator,
        excluded: Mask | None = None,
    ) -> None:
        self.spacing = spacing
        self.stats = stats
        # All that is known of a sample lies together, so that a step reads memory once for each.
        self._look_at(np.zeros(num_samples, _ROW))
        self._due[:] = _UNSEEN
        self._unseen = np.arange(num_samples, dtype=np.uint32)
        rng.shuffle(self._unseen)
        self.exclude(excluded)

    def _look_at(self, rows: NDArray[Any]) -> None:
        self._rows = rows
        self._opaque = rows.view(_OPAQUE)
        self.difficulty = rows["difficulty"]
        """Average loss of each sample; 0 before its first report."""
        self.interval = rows["interval"]
        """Review interval of each sample; 0 before its first report."""
        self._due = rows["due"]

    def __getstate__(self) -> dict[str, Any]:
        views = ("_opaque", "difficulty", "interval", "_due")  # copied one by one they would come apart
        return {name: value for name, value in super().__getstate__().items() if name not in views}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._look_at(self._rows)

    def exclude(self, excluded: Mask | None) -> None:
        """Draw these no more (None: draw all again), and sort the others into their places; O(N)."""
        self.excluded = excluded
        allowed = np.ones(len(self._due), bool) if excluded is None else ~excluded
        self._unseen = self._unseen[self._due[self._unseen] == _UNSEEN]
        self._backlog, self._next = self._unseen[allowed[self._unseen]], 0
        self._num_backlog = len(self._backlog)
        self._pool = MaxTree(len(self._due))
        self._pool.fill(np.where((self._due == _DUE) & allowed, self.difficulty, -np.inf).astype(np.float32))
        self._calendar: dict[int, list[Indices]] = {}
        self._days: list[int] = []
        waiting = np.flatnonzero((self._due >= 0) & allowed)
        self._enter(waiting, self._due[waiting])

    # Drawing ------------------------------------------------------------------------------

    def take(self, size: int, step: int) -> Indices:
        """Return the batch of a step: different samples, as many as there are up to `size`.

        First the unseen samples' share, then due ones, the hardest first; what is left of the
        batch goes to more unseen samples, then to those that are due soonest.
        """
        self._release(step)
        share = min(math.ceil(self.spacing.min_backlog_ratio * size - 1e-9), self._num_backlog)
        due = self._pool.top(size - share)
        new = self._take_backlog(size - len(due)) if self._num_backlog else []
        missing = size - len(due) - sum(map(len, new))
        batch = np.concatenate([*new, due, *self._soonest(missing)], dtype=np.int64)
        if len(due):
            self._pool.remove(due)
        self._due[batch] = step + self.spacing.patience
        self._note(step + self.spacing.patience, batch)
        return batch

    def _release(self, step: int) -> None:
        """Move what is due to the pool."""
        while self._days and self._days[0] <= step:
            ids = self._valid(heapq.heappop(self._days))
            if len(ids):
                self._due[ids] = _DUE
                self._pool.insert(ids, self.difficulty[ids])

    def _valid(self, day: int) -> Indices:
        """Take a day's entries out of the calendar; return those that still count."""
        entries = self._calendar.pop(day)
        ids: Indices = entries[0] if len(entries) == 1 else np.concatenate(entries or [np.empty(0, np.int64)])
        ids = ids[self._due[ids] == day]
        return ids if self.excluded is None else ids[~self.excluded[ids]]

    def _take_backlog(self, count: int) -> list[NDArray[Any]]:
        missing = count = min(count, self._num_backlog)
        parts: list[NDArray[Any]] = []
        while missing:
            part = self._backlog[self._next : self._next + missing]
            self._next += len(part)
            part = part[self._due[part] == _UNSEEN]  # others were reported without being drawn here
            parts.append(part)
            missing -= len(part)
        self._num_backlog -= count
        return parts

    def _soonest(self, count: int) -> list[NDArray[Any]]:
        """Take waiting samples, the soonest due first; of one day the hardest."""
        parts: list[NDArray[Any]] = []
        while count and self._days:
            day = heapq.heappop(self._days)
            ids = self._valid(day)
            if not len(ids):
                continue
            if len(ids) > count and len(hardest := self._hardest_first(ids)) > count:
                self._note(day, hardest[count:])
                ids = hardest[:count]
            else:
                ids.sort()
                if np.count_nonzero(ids[1:] == ids[:-1]):  # some were entered twice
                    ids = np.unique(ids)
            parts.append(ids)
            count -= len(ids)
        return parts

    def _hardest_first(self, ids: Indices) -> Indices:
        """Return the ids without repeats, by difficulty, equal ones by number."""
        easiness = -self.difficulty[ids].astype(np.float64)
        order = easiness.argsort()  # takes a third of a stable sort's time
        rising = easiness.take(order)
        if np.count_nonzero(rising[1:] == rising[:-1]):
            ids = np.unique(ids)
            order = (-self.difficulty[ids]).argsort(kind="stable")
        return ids.take(order)

    # Reporting ----------------------------------------------------------------------------

    def report(self, ids: Indices, losses: NDArray[np.float64], step: int) -> None:
        """Take losses of some samples and reschedule these; a loss that is not finite is due at once."""
        finite = np.isfinite(losses)
        if np.count_nonzero(finite) < len(losses):
            self.forget(ids[~finite], step)
            ids, losses = ids[finite], losses[finite]
            if not len(ids):
                return
        first = not self.stats.count
        if first:  # nothing to compare with but itself
            self.stats.update(losses)
        mean, std = self.stats.mean, self.stats.std
        block = self._opaque.take(ids)
        dates, floats = block.view(np.int64)[::2], block.view(np.float32)
        # Copies: numpy takes twice as long for numbers that do not lie end to end.
        before, old, intervals = dates.copy(), floats[2::4].astype(np.float64), floats[3::4].copy()
        spacing = self.spacing
        floats[2::4] = old + (losses - old) * np.where(intervals > 0, _EMA, 1.0)  # the first loss counts in full
        np.maximum(intervals, 1.0, out=intervals)
        intervals *= spacing.growth_rate
        np.minimum(intervals, spacing.max_interval, out=intervals)
        intervals[losses >= mean + spacing.success_threshold_std * std] = 1.0
        floats[3::4] = intervals
        off = losses - mean
        factors = _Z_FACTORS.take(_Z_EDGES.searchsorted(off / std)) if std > 0 else 1.0
        due = np.ceil(spacing.spacing_steps * intervals * factors).astype(np.int64)
        due += step
        dates[:] = due
        self._leave(ids, before)
        self._strike(ids, step)
        self._opaque[ids] = block
        self._enter(ids, due)
        if not first:
            self.stats.move(off)

    def forget(self, ids: Indices, step: int) -> None:
        """These were drawn but will not be reported: they are due at once."""
        self._leave(ids, self._due[ids])
        self._due[ids] = step
        if len(ids):
            self._note(step, ids)

    def _leave(self, ids: Indices, due: Indices) -> None:
        """Take samples out of the place where they are, which their due date tells."""
        if not np.count_nonzero(due < 0):  # all of them wait
            return
        pooled = ids[due == _DUE]
        if len(pooled):
            self._pool.remove(pooled)
        new = ids[due == _UNSEEN]
        if len(new):
            new = np.unique(new)
            self._num_backlog -= len(new) if self.excluded is None else int((~self.excluded[new]).sum())

    def _strike(self, ids: Indices, step: int) -> None:
        """Strike out what the draw of this very batch entered: no longer valid, it would only be read in vain."""
        day = step + self.spacing.patience
        if day in self._calendar:
            self._calendar[day] = [entry for entry in self._calendar[day] if entry is not ids]

    def _enter(self, ids: Indices, due: Indices) -> None:
        """Enter samples into the calendar."""
        if not len(ids):
            return
        order = due.argsort()
        ids, due = ids.take(order), due.take(order)
        starts = [0, *((due[1:] != due[:-1]).nonzero()[0] + 1).tolist()]
        for day, start, end in zip(due.take(starts).tolist(), starts, [*starts[1:], len(ids)], strict=True):
            self._note(day, ids[start:end])

    def _note(self, day: int, ids: Indices) -> None:
        if day in self._calendar:
            self._calendar[day].append(ids)
        else:
            self._calendar[day] = [ids]
            heapq.heappush(self._days, day)

    def _state_taken(self) -> None:
        rows = np.zeros(len(self._due), _ROW)
        rows["due"], rows["difficulty"], rows["interval"] = self._due, self.difficulty, self.interval
        self._look_at(rows)
        self.exclude(self.excluded)
