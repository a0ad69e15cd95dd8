"""Curriculum learning: bins of difficulty, and how likely each is drawn from as training goes on.

Bin 0 is the easiest. With progress t in [0, 1] and n bins, before normalisation:

* uniform: 1.
* easy_first: `(1 - t) exp(-2 i / (n - 1)) + t / n`.
* competence_based: `exp(-(i - t (n - 1))^2 / 2)`, a frontier that moves from easy to hard
  (in the spirit of Platanios et al. 2019, "Competence-based Curriculum Learning").

A temperature T makes `p^(1 / T)` of p.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Any

import numpy as np

from learnit_r8.config import Problems
from learnit_r8.strategies.base import BatchRequest, Draw, register
from learnit_r8.strategies.plan import shuffled
from learnit_r8.strategies.weighting import UNIFORM_SHARE, Floats, draw_stable

LOWEST_TEMPERATURE = 0.01


class CurriculumStrategy(StrEnum):
    """How bins are preferred over the course of training."""

    UNIFORM = "uniform"
    EASY_FIRST = "easy_first"
    COMPETENCE_BASED = "competence_based"


def bin_probabilities(
    strategy: CurriculumStrategy, n_bins: int, progress: float, temperature: float = 1.0, frontier: float | None = None
) -> list[float]:
    """Return the probability of each bin, easiest first.

    Args:
        strategy: Which curriculum.
        n_bins: Number of bins.
        progress: Share of the training that is done; clamped to 0..1.
        temperature: Higher is closer to uniform.
        frontier: For competence_based: the bin to centre on, 0 to n_bins - 1. None: by progress.
    """
    t = min(1.0, max(0.0, progress))
    if strategy is CurriculumStrategy.UNIFORM:
        return [1.0 / n_bins] * n_bins
    # Logarithms, so that a low temperature cannot make all bins vanish.
    if strategy is CurriculumStrategy.EASY_FIRST:
        slope = 2.0 / max(1, n_bins - 1)
        logs = [math.log((1 - t) * math.exp(-slope * i) + t / n_bins) for i in range(n_bins)]
    else:
        centre = t * (n_bins - 1) if frontier is None else frontier
        logs = [-0.5 * (i - centre) ** 2 for i in range(n_bins)]
    highest = max(logs)
    powers = [math.exp((log - highest) / temperature) for log in logs]
    total = sum(powers)
    return [power / total for power in powers]


def check_curriculum(
    problems: list[str], strategy: str | CurriculumStrategy, n_bins: int
) -> tuple[CurriculumStrategy, int]:
    """Return the two arguments, checked; what is wrong is added to `problems`."""
    valid = [member.value for member in CurriculumStrategy]
    if strategy not in valid:
        problems.append(f"Invalid curriculum strategy '{strategy}'. Must be one of: {valid}")
        strategy = CurriculumStrategy.UNIFORM
    if isinstance(n_bins, bool) or not isinstance(n_bins, (int, np.integer)) or n_bins < 1:
        problems.append(f"n_bins must be >= 1, got {n_bins}")
        n_bins = 1
    return CurriculumStrategy(strategy), int(n_bins)


@register("curriculum")
class Curriculum:
    """Draws from bins of the catalog's loss; the bins are made anew at every epoch start.

    Within a bin the samples take turns in random order. A fifth of each batch is uniform, so no
    sample starves. The bias is the purpose, so weights are ones unless `debias` is set.

    Args:
        strategy: "uniform", "easy_first" or "competence_based".
        n_bins: Number of bins.
        temperature: Higher is closer to uniform; at least 0.01.
        debias: Return importance weights.
    """

    def __init__(
        self,
        strategy: str = "easy_first",
        n_bins: int = 5,
        temperature: float = 1.0,
        debias: bool = False,
    ) -> None:
        problems = Problems()
        self.strategy, self.n_bins = check_curriculum(problems, strategy, n_bins)
        self.temperature = max(LOWEST_TEMPERATURE, problems.real("temperature", temperature, 0.0))
        problems.raise_if_any()
        self.debias = bool(debias)
        self._members = np.zeros(0, np.uint32)
        self._starts = np.zeros(0, np.int64)
        self._turns: list[int] = []

    def start_epoch(self, request: BatchRequest) -> None:
        """Sort the samples into bins; those without a known loss go to the middle one."""
        order = shuffled(request)
        losses = request.catalog.expected_loss[order]
        seen = request.catalog.uses[order] > 0
        known = losses[seen]
        bins = np.full(len(order), self.n_bins // 2, np.int32)
        if len(known):
            ranks = np.unique(np.arange(1, self.n_bins) * len(known) // self.n_bins)
            bins[seen] = np.searchsorted(np.partition(known, ranks)[ranks], known, side="right")
        self._members = order[np.argsort(bins, kind="stable")]
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(bins, minlength=self.n_bins))])
        self._turns = [0] * self.n_bins

    def draw(self, request: BatchRequest) -> Draw:
        """Return a batch whose shares of the bins follow the curriculum."""
        if not self._turns:
            self.start_epoch(request)
        if request.stable_only:
            return Draw(draw_stable(request))
        sizes = np.diff(self._starts)
        size = min(request.size, int(sizes.sum()))
        expected = self._expected_counts(sizes, size, request.progress)
        # Systematic rounding: the shares are whole numbers with exactly these expectations.
        edges = np.floor(np.concatenate([[0.0], np.cumsum(expected)]) + request.rng.random() + 1e-9)
        edges[-1] = edges[0] + size
        counts = np.diff(edges).astype(np.int64)
        indices = np.concatenate([self._take(number, int(count)) for number, count in enumerate(counts)])
        probabilities = np.repeat(expected / np.maximum(sizes, 1) / max(size, 1), counts)
        weights = 1.0 / (sizes.sum() * probabilities) if self.debias else np.ones(size)
        return Draw(indices.astype(np.int64), probabilities, weights)

    def _expected_counts(self, sizes: Any, size: int, progress: float) -> Floats:
        """Return the expected number of samples from each bin: the mixture, capped at the bins' sizes."""
        wanted = np.array(bin_probabilities(self.strategy, self.n_bins, progress, self.temperature)) * (sizes > 0)
        total = wanted.sum()
        uniform = sizes / sizes.sum()
        wanted = wanted / total if total > 0 else uniform
        expected: Floats = size * ((1 - UNIFORM_SHARE) * wanted + UNIFORM_SHARE * uniform)
        full = np.zeros(self.n_bins, bool)
        while (over := (expected > sizes) & ~full).any():
            full |= over
            expected[full] = sizes[full]
            rest = expected[~full].sum()
            if rest > 0:
                expected[~full] *= (size - sizes[full].sum()) / rest
        return expected

    def _take(self, number: int, count: int) -> Any:
        """Return the next members of a bin, starting over at its end."""
        start, end = int(self._starts[number]), int(self._starts[number + 1])
        first = start + self._turns[number]
        part = self._members[first : min(first + count, end)]
        missing = count - len(part)
        if missing:
            part = np.concatenate([part, self._members[start : start + missing]])
        self._turns[number] = (self._turns[number] + count) % max(end - start, 1)
        return part

    def state_dict(self) -> dict[str, Any]:
        """Return the bins of the epoch."""
        return {"members": self._members.copy(), "starts": self._starts.copy(), "turns": list(self._turns)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._members = np.array(state["members"], np.uint32)
        self._starts = np.array(state["starts"], np.int64)
        self._turns = [int(turn) for turn in state["turns"]]
