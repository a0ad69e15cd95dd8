"""The curriculum without a scheduler: keyed items, scored by their rewards."""

from __future__ import annotations

import math
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.config import Problems
from learnit_r8.core.rng import Purpose, RandomStreams
from learnit_r8.core.state import KEEP, Kind, Saved, alone, each, fixed, kind, row, table
from learnit_r8.errors import ConfigError
from learnit_r8.strategies.curriculum import (
    LOWEST_TEMPERATURE,
    CurriculumStrategy,
    bin_probabilities,
    bins_of,
    check_curriculum,
)
from learnit_r8.strategies.weighting import Floats
from learnit_r8.structures.keyed_averages import KeyedAverages
from learnit_r8.structures.keys import KEY, key_to_json, plain_key

_REBIN_EVERY = 50
"""Updates after which the bins' boundaries are taken anew."""


class CurriculumScheduler(KeyedAverages, Saved):
    """Tracks the difficulty of keyed items by their scores, and says which to try next.

    Scores are rewards: the higher, the easier. Each item's difficulty is an exponential moving
    average of its scores; boundaries of the bins are quantiles over all items, taken anew at the
    first question after 50 updates or more. Equal scores share a bin, the lowest of all the hardest, so that
    a few solved items among many unsolved ones are told apart. Updates are applied together, at a question or when
    256 are pending; each is O(1), and leaves O(log n) to the question that takes new boundaries. Any number of threads
    may use one.

    Args:
        strategy: "uniform", "easy_first" or "competence_based".
        n_bins: Number of bins.
        temperature: Higher is closer to uniform; at least 0.01.
        ema_alpha: Weight of a new score; clamped to 0..1.
        competence_threshold: Score from which on an item counts as mastered.
        seed: Any non-negative int; global random states are never touched.
        steer: For competence_based: centre on the bin where the scores cross
            `competence_threshold`, in place of one that moves with progress alone.

    Raises:
        ConfigError: Unknown strategy, `n_bins` below 1, numbers that are not finite.
    """

    n_bins: int = fixed()
    seed: int = fixed()
    _as_json = sys.maxsize
    _saved = table(
        strategy=CurriculumStrategy,
        n_bins=int,
        temperature=float,
        ema_alpha=kind(float, of="_alpha"),
        competence_threshold=float,
        seed=kind(int, absent=KEEP),
        steer=kind(bool, absent=KEEP),
        draws=kind(int, absent=0),
        keys=each(KEY),
        scores=Kind(lambda _, items: np.array(items[::2]), lambda _, saved: list(map(float, saved)), "_items"),
        counts=Kind(
            lambda _, items: np.array(items[1::2]).astype(np.int64),
            lambda me, saved: (me._items, list(map(float, saved))),
            "_items",
        ),
        bin_boundaries=kind(each(float), of="_boundaries"),
        updates=kind(int, of="_applied"),
        last_rebin_count=kind(int, of="_binned_at"),
        mastered=kind(float, absent=0.0),
        ends=kind(row(float, float), absent=(0.0, 0.0)),
    )

    def __init__(
        self,
        strategy: str = "uniform",
        n_bins: int = 5,
        temperature: float = 1.0,
        ema_alpha: float = 0.3,
        competence_threshold: float = 0.5,
        *,
        seed: int = 0,
        steer: bool = False,
    ) -> None:
        problems = Problems()
        self._strategy, self.n_bins = check_curriculum(problems, strategy, n_bins)
        low = -math.inf  # values below the range are clamped, as published
        self.temperature = max(LOWEST_TEMPERATURE, problems.real("temperature", temperature, low))
        alpha = min(1.0, max(0.0, problems.real("ema_alpha", ema_alpha, low)))
        self.competence_threshold = problems.real("competence_threshold", competence_threshold, low)
        self.seed = problems.integer("seed", seed, 0)
        problems.raise_if_any()
        self.steer = bool(steer)
        self._streams = RandomStreams(self.seed)
        self._draws = 0
        self._boundaries: list[float] = []
        self._edges: list[float] = []  # the boundaries as losses
        self._ends = (0.0, 0.0)  # the lowest and the highest score
        self._mastered = 0.0  # share of the items at or above the threshold
        self._binned_at = 0
        super().__init__(alpha)

    @property
    def strategy(self) -> str:
        """Name of the strategy."""
        return self._strategy.value

    @alone
    def get_item_bin(self, item_key: Hashable) -> int:
        """Return the item's bin, 0 (easiest) to n_bins - 1; the middle one if it has no score."""
        self._apply()
        slot = self._slots.get(plain_key(item_key))
        if slot is None:
            return self.n_bins // 2
        self._rebin_if_due()
        return self._bin_of(self._items[2 * slot])

    def _bin_of(self, score: float) -> int:
        """Return what `bins_of` says of one score."""
        low, high = bisect_left(self._edges, -score), bisect_right(self._edges, -score)
        if high - low < 2:
            return low
        lowest, highest = self._ends
        if score >= highest:
            return 0
        return len(self._edges) if score <= lowest else (low + high) // 2

    def _bins(self, scores: Floats) -> NDArray[np.intp]:
        lowest, highest = self._ends
        return bins_of(np.array(self._edges), -scores, -highest, -lowest, upper=False)

    def _rebin_if_due(self) -> None:
        if not self._binned_at or self._updates - self._binned_at >= _REBIN_EVERY:
            self._rebin()
            self._binned_at = self._updates

    def _rebin(self) -> None:
        """Set the boundaries: the lowest score of each bin but the hardest, the easiest bin first.

        All bins have the same number of items, within one, but equal scores share a bin (see `bins_of`).
        (The published class compares with each bin's highest score: its easiest bin holds the
        best item only, its hardest nearly two bins' worth.) With fewer items than bins the
        boundaries are evenly spaced.
        """
        self._apply()
        count = len(self._keys)
        if not count:
            return
        ranks = [count - i * count // self.n_bins for i in range(1, self.n_bins)] if count >= self.n_bins else []
        (*self._boundaries, low, high), below = self._select([*ranks, 0, count - 1], self.competence_threshold)
        self._ends = low, high
        if count < self.n_bins:
            self._boundaries = [high - i * (high - low) / self.n_bins for i in range(1, self.n_bins)]
        self._edges = [-score for score in self._boundaries]
        self._mastered = 1 - below / count

    @alone
    def bin_probabilities(self, current_step: int = 0, total_steps: int = 1000) -> list[float]:
        """Return the probability of each bin, easiest first."""
        frontier = None
        if self.steer and self._updates:
            self._rebin_if_due()
            frontier = min(max(self._mastered * self.n_bins - 0.5, 0.0), self.n_bins - 1.0)
        progress = current_step / max(1, total_steps)
        return bin_probabilities(self._strategy, self.n_bins, progress, self.temperature, frontier)

    def _rng(self) -> np.random.Generator:
        self._draws += 1
        return self._streams.at(Purpose.BATCH, 0, self._draws)

    @alone
    def sample_bin(self, current_step: int = 0, total_steps: int = 1000) -> int:
        """Draw the bin to take the next item from, at this step of so many."""
        return self._pick_bin(self._rng(), current_step, total_steps)

    def _pick_bin(self, rng: np.random.Generator, current_step: int, total_steps: int) -> int:
        u = rng.random()
        for number, probability in enumerate(self.bin_probabilities(current_step, total_steps)):
            u -= probability
            if u < 0:
                return number
        return self.n_bins - 1

    @alone
    def sample_item(self, current_step: int = 0, total_steps: int = 1000) -> Hashable:
        """Draw a tracked item from the bin that `sample_bin` would draw.

        Where that bin is empty (of many equal scores all are in one), the nearest is taken, of two the harder.

        Raises:
            ValueError: No item is tracked yet.
        """
        self._apply()
        if not self._keys:
            raise ValueError("no item is tracked yet: call update(key, score) first")
        rng = self._rng()
        target = self._pick_bin(rng, current_step, total_steps)
        self._rebin_if_due()
        # Bins are quantiles: mostly, a uniform item is in the target bin once in n_bins tries.
        for slot in rng.integers(len(self._keys), size=4 * self.n_bins).tolist():
            if self._bin_of(self._items[2 * slot]) == target:
                return self._keys[int(slot)]
        bins = self._bins(np.array(self._items[::2]))
        counts = np.bincount(bins, minlength=self.n_bins)
        nearest = min(counts.nonzero()[0].tolist(), key=lambda number: (abs(number - target), -number))
        return self._keys[int(rng.choice(np.flatnonzero(bins == nearest)))]

    @alone
    def metrics_dict(self) -> dict[str, float]:
        """Return figures for a metrics log; O(n)."""
        self._apply()
        if not self._keys:
            return {"curriculum/items_tracked": 0, "curriculum/strategy": 0}
        scores = np.array(self._items[::2])
        metrics = {
            "curriculum/items_tracked": float(len(scores)),
            "curriculum/mean_difficulty": float(scores.mean()),
            "curriculum/min_difficulty": float(scores.min()),
            "curriculum/max_difficulty": float(scores.max()),
            "curriculum/total_updates": float(self._updates),
        }
        self._rebin_if_due()
        if self._boundaries:
            for number, count in enumerate(np.bincount(self._bins(scores), minlength=self.n_bins)):
                metrics[f"curriculum/bin_{number}_count"] = float(count)
        return metrics

    def _state_tree(self) -> dict[str, Any]:
        self._apply()
        return super()._state_tree()

    def _take_state(self, state: Mapping[str, Any], changes: list[Any]) -> None:
        """Take also the state of the published class: `item_scores` (key -> average and count), no randomness."""
        if "item_scores" in state:
            items = {plain_key(key): pair for key, pair in state["item_scores"].items()}
            scores, counts = zip(*items.values(), strict=True) if items else ((), ())
            state = {**state, "keys": map(key_to_json, items), "scores": scores, "counts": counts}
            state["bin_boundaries"] = ()  # the published ones mean something else: they are taken anew at the next use
        if "updates" not in state:
            state = {**state, "updates": sum(state["counts"]), "last_rebin_count": 0}
        super()._take_state(state, changes)

    def _state_taken(self) -> None:
        problems: list[str] = []
        check_curriculum(problems, self._strategy, self.n_bins)
        loaded: Any = self._items
        (scores, counts), keys, updates = loaded, self._keys, self._applied
        if not len(keys) == len(scores) == len(counts) == len(set(keys)):
            problems.append(f"{len(keys)} keys, {len(scores)} scores, {len(counts)} counts")
        if problems:
            raise ConfigError(problems)
        self._track(keys, scores, counts)
        self._applied = updates
        self._streams = RandomStreams(self.seed)
        self._edges = [-score for score in self._boundaries]
