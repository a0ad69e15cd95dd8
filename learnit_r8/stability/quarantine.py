"""Which samples to keep out of batches because faults keep happening with them.

"It was in the batch of two faults" proves little: with batches of 256 out of 1000 samples, 66
samples are in any two batches by chance. So a fault names as few samples as it can (those whose own
loss is not finite or stands far out; the whole batch only where nothing is known of its samples),
and a sample is quarantined when it was named so often that the expected number of samples named as
often by chance, N P(Binomial(faults, named / N) >= times), is at most 0.05.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.state import Kind, Saved, each, row, table

_MAX_EXPECTED = 0.05  # samples quarantined by chance
_FAULTS_KEPT = 10
_RUN_KEPT = 8  # batches of one suspect run: as many as lead to a spike
_FAR_OUT = 20.0  # robust standard deviations above the batch's median

Ids = NDArray[np.int64]


_IDS = Kind(lambda _, ids: ids.tolist(), lambda _, saved: np.array(saved, np.int64))


class Quarantine(Saved):
    """Counts how often faults name a sample."""

    _saved = table(run=each(row(bool, _IDS)), faults=each(_IDS), calm_run=int)

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self._run: list[tuple[bool, Ids]] = []
        self._faults: list[Ids] = []
        self._calm_run = 0

    def suspect(self, indices: Iterable[int], losses: NDArray[np.floating[Any]] | None) -> None:
        """Take a batch whose loss was flagged or faulty.

        The batch that does the harm comes before the losses that show it, so all batches of a
        suspect run are evidence for the fault it ends in.
        """
        self._calm_run = 0
        self._run = [*self._run, named(np.asarray(list(indices), np.int64), losses)][-_RUN_KEPT:]

    def calm(self, losses: int = 1) -> None:
        """Take calm losses: eight in a row end a suspect run."""
        if self._run:
            self._calm_run = min(self._calm_run + losses, _RUN_KEPT)
            if self._calm_run >= _RUN_KEPT:
                self._run = []

    def trigger(self) -> tuple[int, ...]:
        """Close the suspect run with a fault; return the samples that faults have named too often."""
        precise = [ids for is_precise, ids in self._run if is_precise]
        evidence = precise or [ids for _, ids in self._run]
        self._run = []
        fault = np.unique(np.concatenate(evidence)) if evidence else np.empty(0, np.int64)
        # The same batch again (replayed data) says nothing new about which of its samples it was.
        repeated = not precise and any(np.array_equal(fault, other) for other in self._faults)
        if not fault.size or repeated:
            return ()
        self._faults = [*self._faults, fault][-_FAULTS_KEPT:]
        ids, counts = np.unique(np.concatenate(self._faults), return_counts=True)
        share = min(1.0, max(other.size for other in self._faults) / self.num_samples)
        return tuple(int(i) for i in ids[counts >= self._needed(len(self._faults), share)])

    def _needed(self, faults: int, share: float) -> int:
        """Return how many of the faults must name a sample; more than there are if none will do."""
        tail = 0.0
        needed = faults + 1
        for times in range(faults, 1, -1):
            tail += math.comb(faults, times) * share**times * (1 - share) ** (faults - times)
            if self.num_samples * tail > _MAX_EXPECTED:
                break
            needed = times
        return needed


def not_finite(
    indices: Ids, losses: NDArray[np.floating[Any]] | None, limit: float, world_size: int = 1
) -> tuple[Ids, float]:
    """Return the samples whose losses alone are not finite or beyond the limit, and the mean of the others.

    No ids, and NaN, where over a quarter of a rank's share is not finite: its weights may be broken.
    """
    if losses is None:
        return indices[:0], math.nan
    with np.errstate(invalid="ignore"):
        fine = np.abs(losses) <= limit
    count = int(np.count_nonzero(fine))
    if not 0 < len(losses) - count <= max(1, len(losses) // (4 * world_size)) or not count:
        return indices[:0], math.nan
    return indices[~fine], float(losses[fine].mean(dtype=np.float64))


def named(indices: Ids, losses: NDArray[np.floating[Any]] | None) -> tuple[bool, Ids]:
    """Return (True, the samples that stand out in a batch) or (False, all of them)."""
    if losses is None or not indices.size:
        return False, indices
    losses = np.asarray(losses, np.float64)
    few = max(1, indices.size // 8)
    out = ~np.isfinite(losses)
    if not out.any():
        centre = float(np.median(losses))
        spread = max(1.4826 * float(np.median(np.abs(losses - centre))), 0.05 * abs(centre))
        out = losses > centre + _FAR_OUT * spread
    # Where most samples stand out, the weights are broken and the samples say nothing.
    return (True, indices[out]) if 0 < np.count_nonzero(out) <= few else (False, indices)
