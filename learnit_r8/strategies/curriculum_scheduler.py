"""The curriculum without a scheduler: keyed items, scored by their rewards."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from learnit_r8.config import Problems
from learnit_r8.errors import ConfigError
from learnit_r8.rng import Purpose, RandomStreams
from learnit_r8.strategies.curriculum import LOWEST_TEMPERATURE, bin_probabilities, check_curriculum
from learnit_r8.strategies.keyed_averages import KeyedAverages

_REBIN_EVERY = 50
"""Updates after which the bins' boundaries are taken anew."""


class CurriculumScheduler(KeyedAverages):
    """Tracks the difficulty of keyed items by their scores, and says which to try next.

    Scores are rewards: the higher, the easier. Each item's difficulty is an exponential moving
    average of its scores; boundaries of the bins are quantiles over all items, taken anew at the
    first question after 50 updates or more. Updates are applied together, at a question or when
    256 are pending; each is O(1), and leaves O(log n) to the question that takes new boundaries.

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
        self._rising: list[float] = []
        self._mastered = 0.0  # share of the items at or above the threshold
        self._binned_at = 0
        super().__init__(alpha)

    @property
    def strategy(self) -> str:
        """Name of the strategy."""
        return self._strategy.value

    def get_item_bin(self, item_key: Hashable) -> int:
        """Return the item's bin, 0 (easiest) to n_bins - 1; the middle one if it has no score."""
        self._apply()
        slot = self._slots.get(item_key)
        return self.n_bins // 2 if slot is None else self._bin_of(self._items[2 * slot])

    def _bin_of(self, score: float) -> int:
        self._rebin_if_due()
        return len(self._rising) - bisect_right(self._rising, score)

    def _rebin_if_due(self) -> None:
        if not self._binned_at or self._updates - self._binned_at >= _REBIN_EVERY:
            self._rebin()
            self._binned_at = self._updates

    def _rebin(self) -> None:
        """Set the boundaries: the lowest score of each bin but the hardest, the easiest bin first.

        All bins have the same number of items, within one; equal scores share the easier bin.
        (The published class compares with each bin's highest score: its easiest bin holds the
        best item only, its hardest nearly two bins' worth.) With fewer items than bins the
        boundaries are evenly spaced.
        """
        self._apply()
        count = len(self._keys)
        if not count:
            return
        ranks = [count - i * count // self.n_bins for i in range(1, self.n_bins)]
        if count < self.n_bins:
            ranks = [0, count - 1]
        self._boundaries, below = self._select(ranks, self.competence_threshold)
        if count < self.n_bins:
            low, high = self._boundaries
            self._boundaries = [high - i * (high - low) / self.n_bins for i in range(1, self.n_bins)]
        self._rising = self._boundaries[::-1]
        self._mastered = 1 - below / count

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

    def sample_bin(self, current_step: int = 0, total_steps: int = 1000) -> int:
        """Draw the bin to take the next item from.

        Args:
            current_step: Current training step.
            total_steps: Planned number of steps.
        """
        return self._pick_bin(self._rng(), current_step, total_steps)

    def _pick_bin(self, rng: np.random.Generator, current_step: int, total_steps: int) -> int:
        u = rng.random()
        for number, probability in enumerate(self.bin_probabilities(current_step, total_steps)):
            u -= probability
            if u < 0:
                return number
        return self.n_bins - 1

    def sample_item(self, current_step: int = 0, total_steps: int = 1000) -> Hashable:
        """Draw a tracked item from the bin that `sample_bin` would draw.

        Where no item of that bin turns up (ties can empty a bin), the nearest bin's is taken.

        Raises:
            ValueError: No item is tracked yet.
        """
        self._apply()
        if not self._keys:
            raise ValueError("no item is tracked yet: call update(key, score) first")
        rng = self._rng()
        target = self._pick_bin(rng, current_step, total_steps)
        # Bins are quantiles: a uniform item is in the target bin once in n_bins tries.
        tries = rng.integers(len(self._keys), size=16 * self.n_bins)
        bins = (abs(self._bin_of(self._items[2 * slot]) - target) for slot in tries)
        best, nearest = 0, self.n_bins
        for slot, distance in zip(tries, bins, strict=True):
            if distance < nearest:
                best, nearest = int(slot), distance
            if not distance:
                break
        return self._keys[best]

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
            bins = len(self._rising) - np.searchsorted(np.array(self._rising), scores, side="right")
            for number, count in enumerate(np.bincount(bins, minlength=self.n_bins)):
                metrics[f"curriculum/bin_{number}_count"] = float(count)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return everything that later answers depend on: JSON values and arrays.

        Raises:
            TypeError: A key is neither str nor int, and could not be restored.
        """
        self._apply()
        strange = next((key for key in self._keys if type(key) not in (str, int)), None)
        if strange is not None:
            raise TypeError(f"only str and int keys can be saved, got {strange!r}")
        return {
            "strategy": self.strategy,
            "n_bins": self.n_bins,
            "temperature": self.temperature,
            "ema_alpha": self.ema_alpha,
            "competence_threshold": self.competence_threshold,
            "seed": self.seed,
            "steer": self.steer,
            "draws": self._draws,
            "keys": np.array(self._keys, np.int64) if _all_int64(self._keys) else list(self._keys),
            "scores": np.array(self._items[::2]),
            "counts": np.array(self._items[1::2]).astype(np.uint64),
            "bin_boundaries": list(self._boundaries),
            "updates": self._updates,
            "last_rebin_count": self._binned_at,
            "mastered": self._mastered,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, or the state of the published class.

        The published one holds `item_scores` (key -> average and count) in place of arrays,
        and no randomness.

        Raises:
            ConfigError: The strategy or the number of bins is invalid. Nothing is changed.
        """
        problems: list[str] = []
        strategy, n_bins = check_curriculum(problems, state["strategy"], state["n_bins"])
        if problems:
            raise ConfigError(problems)
        if "item_scores" in state:
            items: dict[Hashable, Any] = state["item_scores"]
            keys, scores, counts = list(items), [pair[0] for pair in items.values()], [p[1] for p in items.values()]
            self._boundaries = []  # its boundaries mean something else; taken anew at the next use
        else:
            keys, scores, counts = state["keys"], state["scores"], state["counts"]
            keys = keys.tolist() if isinstance(keys, np.ndarray) else keys
            self._boundaries = [float(boundary) for boundary in state["bin_boundaries"]]
        self._strategy, self.n_bins = strategy, n_bins
        self.temperature = float(state["temperature"])
        self.ema_alpha = float(state["ema_alpha"])
        self.competence_threshold = float(state["competence_threshold"])
        self.seed = int(state.get("seed", self.seed))
        self._streams = RandomStreams(self.seed)
        self.steer = bool(state.get("steer", self.steer))
        self._draws = int(state.get("draws", 0))
        self._track(keys, map(float, scores), map(float, counts))
        self._rising = self._boundaries[::-1]
        self._applied = int(state.get("updates", sum(self._items[1::2])))
        self._binned_at = int(state["last_rebin_count"]) if "updates" in state else 0
        self._mastered = float(state.get("mastered", 0.0))


def _all_int64(keys: Sequence[Hashable]) -> bool:
    return all(type(key) is int and -(2**63) <= key < 2**63 for key in keys)
