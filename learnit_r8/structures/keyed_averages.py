"""Exponential moving averages of keyed scores, updated many at a time."""

from __future__ import annotations

import math
from array import array
from collections.abc import Hashable, Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from learnit_r8.structures.keys import plain_key
from learnit_r8.structures.rank_windows import RankWindows

_MOST_PENDING = 2 * 256
"""Keys and scores that wait to be applied together, so that the processor need not wait for one key's memory before
it asks for the next one's."""
_FEW = 8  # updates for which that is not worth a call of numpy
_CHANGED = 8
"""Where more than one average in 8 has changed, sorting all of them costs less than moving each."""
_USUAL = {int, str}  # keys that are as they are
_SMALL = 2048  # keys; up to there it always does


class KeyedAverages:
    """One average for each key: the base of `CurriculumScheduler`. What reads the averages calls `_apply` first.

    Args:
        ema_alpha: Weight of a new score, 0..1.
    """

    _lock: Any

    def __init__(self, ema_alpha: float) -> None:
        self._alpha = ema_alpha
        self._track([], [], [])

    @property
    def ema_alpha(self) -> float:
        """Weight of a new score, 0..1; a new value counts for the scores that come after it."""
        return self._alpha

    @ema_alpha.setter
    def ema_alpha(self, value: float) -> None:
        self._apply()
        self._alpha = value

    def _track(self, keys: Sequence[Hashable], scores: Iterable[float], counts: Iterable[float]) -> None:
        self._keys = list(keys)
        self._slots = {key: slot for slot, key in enumerate(self._keys)}
        # Average and number of updates of each key, side by side: one cache line for an update.
        self._items = array("d", chain.from_iterable(zip(scores, counts, strict=True)))
        self._applied = 0  # updates
        # Keys and scores in turn: threads add to it at any time, and take from it one at a time.
        self._pending: list[Any] = []
        self._ranked: RankWindows | None = None  # as of the last `_select`; averages that have gone and come since:
        self._left, self._entered = array("d"), array("d")

    def _apply(self) -> None:
        """Apply the pending updates, as if one after another."""
        if not self._pending:
            return
        with self._lock:
            taken = self._pending[:]
            del self._pending[: len(taken)]
            self._apply_these(taken[::2], taken[1::2])

    def _apply_these(self, keys: list[Hashable], scores: list[float]) -> None:
        self._applied += len(keys)
        if len(keys) <= _FEW or len(set(keys)) < len(keys):
            for key, score in zip(keys, scores, strict=True):
                self._apply_one(key, score)
        else:
            self._apply_many(keys, scores)
        if self._ranked is not None and _CHANGED * len(self._entered) > len(self._keys):
            self._ranked = None

    def _apply_one(self, key: Hashable, score: float) -> None:
        slot = self._slots.get(key)
        at = 2 * (self._slot_of(key) if slot is None else slot)
        old = self._items[at]
        if old == old:  # not NaN: the key is not new
            score = self._alpha * score + (1 - self._alpha) * old
        self._items[at] = score
        self._items[at + 1] += 1.0
        if self._ranked is not None:
            self._entered.append(score)
            if old == old:
                self._left.append(old)

    def _apply_many(self, keys: list[Hashable], scores: list[float]) -> None:
        slots: Any = list(map(self._slots.get, keys))
        if None in slots:
            slots = list(map(self._slot_of, keys))
        items = np.frombuffer(self._items)
        at = 2 * np.array(slots)
        old = items.take(at)
        items[at + 1] += 1.0
        new, known = np.array(scores), old == old
        new = np.where(known, self._alpha * new + (1 - self._alpha) * old, new)
        items[at] = new
        if self._ranked is not None:
            self._left.frombytes(old[known].tobytes())
            self._entered.frombytes(new.tobytes())

    def _slot_of(self, key: Hashable) -> int:
        slot = self._slots.get(key)
        if slot is None:  # the key last: who finds it in another thread finds its average
            slot = len(self._keys)
            self._items.extend((math.nan, 0.0))
            self._keys.append(key)
            self._slots[key] = slot
        return slot

    @property
    def _updates(self) -> int:
        return self._applied + len(self._pending) // 2

    @property
    def n_items_tracked(self) -> int:
        """Number of items with at least one score."""
        self._apply()
        return len(self._keys)

    def update(self, item_key: Hashable, score: float) -> None:
        """Take one score of an item.

        Args:
            item_key: A text, a number, bytes, None, or a tuple of those; an element of an array or a
                tensor is its number.
            score: Finite; higher is easier.

        Raises:
            ValueError: The score is not finite.
            TypeError: The key is none of these. Nothing is changed in either case.
        """
        if type(item_key) not in _USUAL:
            item_key = plain_key(item_key)
        score = float(score)
        if not math.isfinite(score):
            raise ValueError(f"score must be finite, got {score} for item {item_key!r}")
        self._pending.extend((item_key, score))
        if len(self._pending) >= _MOST_PENDING:
            self._apply()

    def update_batch(self, item_key: Hashable, scores: Sequence[float]) -> None:
        """Take the mean of several scores of one item; no scores, no change."""
        if len(scores):
            self.update(item_key, math.fsum(map(float, scores)) / len(scores))

    def get_item_difficulty(self, item_key: Hashable) -> float | None:
        """Return the item's average score (higher is easier), or None if it has none."""
        self._apply()
        slot = self._slots.get(plain_key(item_key))
        return None if slot is None else self._items[2 * slot]

    def _select(self, ranks: list[int], mark: float) -> tuple[list[float], int]:
        """Return the averages of these ranks (0: the lowest), and how many are below the mark."""
        found = None
        if self._ranked is not None and self._entered:
            self._ranked.replace(self._left, self._entered)
            found = self._ranked.answer(ranks, mark)
        self._left, self._entered = array("d"), array("d")
        if found is None:
            ordered = np.sort(np.frombuffer(self._items)[::2])
            found = ordered[ranks].tolist(), int(ordered.searchsorted(mark))
            self._ranked = RankWindows(ordered, ranks, mark) if len(ordered) > _SMALL else None
        return found
