"""How many losses are too high: the cut between suspects and the others, by class, checks of it, held-out losses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.state import Saved, table
from learnit_r8.samples.catalog import LossCatalog
from learnit_r8.types import Losses, Mask

_MIN_GROUP = 20
"""A class with fewer samples has too few kin to tell by; the guard leaves it alone."""
_SORTED = 1 << 20
"""The cut is found on about this many samples at most."""


class Classes:
    """Samples by class; `groups` is the class of each."""

    def __init__(self, groups: NDArray[np.integer[Any]]) -> None:
        _, self._of = np.unique(groups, return_inverse=True)
        counts = np.bincount(self._of)
        self._counts, self._starts = counts, np.cumsum(counts) - counts
        self.large: Mask = (counts >= _MIN_GROUP)[self._of]
        shares = counts / len(self._of)
        self.entropy = -float(np.sum(shares * np.log(shares)))

    def excess(self, losses: Losses, share: float = 0.5) -> Losses:
        """Return by how much the level of each sample's class exceeds the median class's, `[N]`.

        The level is this `share` as a quantile of a class's losses: the median or a lower one.
        """
        places = self._starts + (self._counts * share).astype(np.int64)
        levels = losses[np.lexsort((losses, self._of))][places]
        excess: Losses = np.maximum(levels - np.median(levels), 0).astype(np.float32)
        return excess[self._of]


class LossesSince(Saved):
    """What has been reported of each sample since this was made, of its mean loss and uses until then; 8 bytes each."""

    _saved = table(mean=np.float32, uses=np.uint32)

    def __init__(self, mean: Losses, uses: NDArray[np.uint32]) -> None:
        self._mean, self._uses = np.array(mean, np.float32), np.array(uses, np.uint32)

    def forget(self, ids: NDArray[np.int64]) -> None:
        """Count some samples from nothing."""
        self._mean[ids], self._uses[ids] = 0, 0

    def means(self, catalog: LossCatalog, mask: Mask) -> NDArray[np.float64]:
        """Return the mean loss since then of those samples in a mask that have any, `[<= N]`."""
        total, times = self._sums(catalog)
        heard = mask & (times > 0)
        return np.asarray(total[heard] / times[heard])

    def scores(self, catalog: LossCatalog) -> Losses:
        """Return the mean of each sample's losses since then and one more, the mean until then, `[N]`."""
        total, times = self._sums(catalog)
        return np.asarray((self._mean + total) / (1 + times), np.float32)

    def _sums(self, catalog: LossCatalog) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        times = np.maximum(catalog.uses.astype(np.int64) - self._uses, 0)  # a rollback may have taken some back
        total = catalog.mean_loss.astype(np.float64) * (self._uses + times) - self._mean.astype(np.float64) * self._uses
        return np.where(times > 0, total, 0.0), times


def half_way(losses: Losses, low: float, high: float) -> float:
    """Return the cut half-way between the medians of the losses below and above it, from `low` to `high`.

    Medians, not the means of 2-means clustering: the wrong samples' losses have a long tail that
    would draw the cut up.
    """
    ordered = np.sort(losses[:: 1 + len(losses) // _SORTED])
    cut = high
    for _ in range(50):
        below = int(np.searchsorted(ordered, cut, "right"))
        if below in (0, len(ordered)):
            break
        middle = (float(ordered[below // 2]) + float(ordered[(below + len(ordered)) // 2])) / 2
        before, cut = cut, min(max(middle, low), high)
        if cut == before:
            break
    return cut


def even_loss(losses: Losses) -> float:
    """Return ln K from the losses of an untrained classifier, however large its outputs are.

    Such a model gives each of the K classes 1/K on average, and exp(-loss) is what it gave the right
    one. Losses that are no cross-entropies may have any spread: never less than half of their mean.
    """
    values = losses.astype(np.float64)
    least = float(values.min())
    even = least - math.log(float(np.mean(np.exp(least - values))))
    return max(even, 0.5 * float(values.mean()))


def agreement(losses: Losses, suspects: int, low: float, high: float) -> float:
    """Return the share of wrong labels that the others' loss implies, over the share of suspects.

    While a share s of the labels is wrong, whichever, a model gives right ones a probability of
    1 - s at best, a loss of -ln(1 - s): until it learns by heart. Where the others' loss is lower
    than the number of suspects implies (below 1), the suspects lie together: a part of the data
    that was not learned yet. For cross-entropies in nats only. `suspects` is their number by their mean loss; where
    more of the `losses`, the latest ones, lie above the cut, these count.
    """
    cut = half_way(losses, low, high)
    others = losses[losses <= cut]
    share = max(1 - len(others) / len(losses), suspects / len(losses), 1e-9)
    return -math.expm1(-float(np.median(others))) / share if len(others) else 0.0
