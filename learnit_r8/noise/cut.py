"""What the noise guard reckons with: the cut between suspects and the others, evidence, classes, losses since."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.state import Saved, table
from learnit_r8.samples.catalog import LossCatalog
from learnit_r8.types import Indices, Losses, Mask

_MIN_GROUP = 20
"""A class with fewer samples has too few kin to tell by; the guard leaves it alone."""
_SORTED = 1 << 20
"""The cut is found on about this many samples at most."""
_OUTLIERS = 0.99
"""Losses above this quantile count as it: a single one of a thousand would be a group of its own."""
_FLOOR, _POWER = 0.25, 0.25


class Classes:
    """Samples by class; `groups` is the class of each."""

    def __init__(self, groups: NDArray[np.integer[Any]]) -> None:
        _, self._of = np.unique(groups, return_inverse=True)
        counts = np.bincount(self._of)
        self._counts, self._starts = counts, np.cumsum(counts) - counts
        self.large: Mask = (counts >= _MIN_GROUP)[self._of]

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

    def forget(self, ids: Indices) -> None:
        """Count some samples from nothing."""
        self._mean[ids], self._uses[ids] = 0, 0

    def means(self, catalog: LossCatalog) -> Losses:
        """Return the mean of each sample's losses since then, `[N]`; NaN without any."""
        total, times = self._sums(catalog)
        return np.asarray(np.where(times > 0, total / np.maximum(times, 1), np.nan), np.float32)

    def scores(self, catalog: LossCatalog) -> Losses:
        """Return the mean of each sample's losses since then and one more, the mean until then, `[N]`."""
        total, times = self._sums(catalog)
        return np.asarray((self._mean + total) / (1 + times), np.float32)

    def _sums(self, catalog: LossCatalog) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        times = np.maximum(catalog.uses.astype(np.int64) - self._uses, 0)  # a rollback may have taken some back
        total = catalog.mean_loss.astype(np.float64) * (self._uses + times) - self._mean.astype(np.float64) * self._uses
        return np.where(times > 0, total, 0.0), times


def two_groups(losses: Losses) -> tuple[float, float]:
    """Return the cut that parts losses into the two groups with the least variance within (Otsu 1979), and how much.

    That is the share of the variance between them: 0.64 where there is one bell, more for groups. Infinite
    and 0 where they are all alike.
    """
    ordered = np.sort(losses[:: 1 + len(losses) // _SORTED].astype(np.float64))
    if len(ordered) < 2 or ordered[0] == ordered[-1]:
        return float("inf"), 0.0
    ordered = np.minimum(ordered, ordered[int(_OUTLIERS * (len(ordered) - 1))])
    below = np.arange(1, len(ordered))
    sums = np.cumsum(ordered)
    between = (sums[:-1] * len(ordered) - sums[-1] * below) ** 2 / (below * (len(ordered) - below))
    place = int(np.argmax(between))
    parted = float(between[place]) / max(float(ordered.var()) * len(ordered) ** 2, 1e-30)
    return float(ordered[place] + ordered[place + 1]) / 2, parted


def evidence(suspects: Losses, losses: Losses) -> float:
    """Return how much speaks for wrong labels rather than hard samples; above 1 they are likelier.

    Two things tell them apart while a network has not learned by heart. Wrong labels stay at a high loss though they
    are trained on: the `suspects`' median, in nats. And where a share of the labels is wrong, whichever, right ones
    cannot be given more than the rest: the probability that the best known quarter of all `losses` lacks, over the
    share of suspects. In clean data, however hard, that quarter is near certain. Its fourth root counts: it falls by
    orders of magnitude.
    """
    if not len(suspects) or len(suspects) == len(losses):
        return 0.0
    lacking = -np.expm1(-max(float(np.quantile(losses, _FLOOR)), 0.0))
    share = len(suspects) / len(losses)
    return float(np.median(suspects) * (lacking / share) ** _POWER)
