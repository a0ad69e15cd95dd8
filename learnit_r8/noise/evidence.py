"""Each sample's losses since a moment: held-out ones, where it was left out before."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.state import Saved, table
from learnit_r8.samples.catalog import LossCatalog
from learnit_r8.types import Losses, Mask


class LossesSince(Saved):
    """What has been reported of each sample since this was made, of its mean loss and uses until then; 8 bytes each."""

    _saved = table(mean=np.float32, uses=np.uint32)

    def __init__(self, mean: Losses, uses: NDArray[np.uint32]) -> None:
        self._mean, self._uses = np.array(mean, np.float32), np.array(uses, np.uint32)

    @classmethod
    def empty(cls) -> LossesSince:
        """Return one to load a state into."""
        return cls(np.empty(0, np.float32), np.empty(0, np.uint32))

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
