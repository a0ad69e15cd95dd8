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
from numpy.typing import NDArray

from learnit_r8.core.config import Problems
from learnit_r8.core.state import Saved, each, table
from learnit_r8.strategies.base import BatchRequest, Draw, builtin
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
    """Return the probability of each bin, easiest first; `frontier`: the bin that competence_based is centred on."""
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


def bins_of(
    edges: NDArray[Any], losses: NDArray[Any], lowest: float, highest: float, *, upper: bool
) -> NDArray[np.intp]:
    """Return the bin of each loss, at an edge the `upper` one; equal losses that fill several are in the middle one.

    Unless they are the lowest or the highest there are, which are in the first and the last bin: what everybody
    solves is the easiest bin, and what nobody solves the hardest, however many share it.
    """
    low, high = edges.searchsorted(losses, "left"), edges.searchsorted(losses, "right")
    tied = high - low > 1
    bins = high if upper else low
    if tied.any():
        bins[tied] = (low[tied] + high[tied]) // 2
        bins[tied & (losses >= highest)] = len(edges)
        bins[tied & (losses <= lowest)] = 0
    return bins


@builtin("curriculum")
class Curriculum(Saved):
    """Draws from bins of the catalog's loss; the bins are made anew at every epoch start.

    Within a bin the samples take turns in random order. A fifth of each batch is uniform, so no
    sample starves. The bias is the purpose, so weights are ones unless `debias` is set.

    Args:
        strategy: "uniform", "easy_first" or "competence_based".
        n_bins: Number of bins.
        temperature: Higher is closer to uniform; at least 0.01.
        debias: Return importance weights.
    """

    _saved = table(members=np.uint32, starts=np.int64, turns=each(int))

    grows = True

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
        self._members, self._starts = np.zeros(0, np.uint32), np.zeros(1, np.int64)  # bin by bin, and where each starts
        self._turns: list[int] = []  # whose turn it is in each
        self._state_taken()

    def _state_taken(self) -> None:
        """Work out what every draw of the epoch needs."""
        starts = self._starts
        self._sizes = starts[1:] - starts[:-1]
        self._count = int(self._sizes.sum())
        self._uniform = self._sizes / max(self._count, 1)
        self._present = self._sizes > 0
        self._bounds = starts.tolist()

    def start_epoch(self, request: BatchRequest) -> None:
        """Sort the samples into bins; those without a known loss go to the middle one."""
        order = shuffled(request)
        losses = request.catalog.expected_loss[order]
        seen = request.catalog.uses[order] > 0
        known = losses[seen]
        bins = np.full(len(order), self.n_bins // 2, np.int32)
        if len(known):
            ranks = np.unique(np.arange(1, self.n_bins) * len(known) // self.n_bins)
            bins[seen] = bins_of(np.partition(known, ranks)[ranks], known, known.min(), known.max(), upper=True)
        starts = np.concatenate([[0], np.cumsum(np.bincount(bins, minlength=self.n_bins))])
        self._members, self._starts, self._turns = order[np.argsort(bins, kind="stable")], starts, [0] * self.n_bins
        self._state_taken()

    def draw(self, request: BatchRequest) -> Draw:
        """Return a batch whose shares of the bins follow the curriculum."""
        if not self._turns:
            self.start_epoch(request)
        if request.stable_only:
            return Draw(draw_stable(request))
        size = min(request.size, self._count)
        expected = self._expected_counts(size, request.progress)
        # Systematic rounding: the shares are whole numbers with exactly these expectations.
        edges = np.zeros(len(expected) + 1)
        np.add.accumulate(expected, out=edges[1:])
        edges += request.rng.random()
        edges += 1e-9
        np.floor(edges, out=edges)
        edges[-1] = edges[0] + size
        counts = (edges[1:] - edges[:-1]).astype(np.int64)
        indices = np.concatenate(list(map(self._take, range(len(expected)), counts.tolist())), dtype=np.int64)
        probabilities = (expected / np.maximum(self._sizes, 1) / max(size, 1)).repeat(counts)
        weights = 1.0 / (self._count * probabilities) if self.debias else np.ones(size)
        return Draw(indices, probabilities, weights)

    def _expected_counts(self, size: int, progress: float) -> Floats:
        """Return the expected number of samples from each bin: the mixture, capped at the bins' sizes."""
        wanted = np.array(bin_probabilities(self.strategy, self.n_bins, progress, self.temperature)) * self._present
        total = float(np.add.reduce(wanted))
        wanted = wanted / total if total > 0 else self._uniform
        expected: Floats = size * ((1 - UNIFORM_SHARE) * wanted + UNIFORM_SHARE * self._uniform)
        sizes, full = self._sizes, np.zeros(self.n_bins, bool)
        while np.count_nonzero(over := (expected > sizes) & ~full):
            full |= over
            expected[full] = sizes[full]
            rest = expected[~full].sum()
            if rest > 0:
                expected[~full] *= (size - sizes[full].sum()) / rest
        return expected

    def _take(self, number: int, count: int) -> Any:
        """Return the next members of a bin, starting over at its end."""
        start, end = self._bounds[number], self._bounds[number + 1]
        first = start + self._turns[number]
        part = self._members[first : min(first + count, end)]
        missing = count - len(part)
        if missing:
            part = np.concatenate([part, self._members[start : start + missing]])
        self._turns[number] = (self._turns[number] + count) % max(end - start, 1)
        return part
