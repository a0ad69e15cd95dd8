"""Which class a model gives each sample most often, in five bytes a sample."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.state import Kind, Saved, table
from learnit_r8.types import Indices

_MOST = 255


def _padded(kind: Any, other: int) -> Kind:
    """An array with a number a sample; samples that a later run has more of get the `other` one."""

    def load(votes: Any, saved: Any) -> NDArray[Any]:
        array = np.full(votes.num_samples, other, kind)
        array[: len(saved)] = saved
        return array

    return Kind(lambda _, array: array.copy(), load)


class Votes(Saved):
    """The majority's candidate of each sample (Boyer and Moore 1981), of those that are not its own class.

    Args:
        num_samples: Size N of the data set.
        groups: Class of each sample, int `[N]`: votes for it do not count. None: all count.
    """

    _saved = table(classes=_padded(np.int32, -1), lead=_padded(np.uint8, 0))

    def __init__(self, num_samples: int, groups: NDArray[np.integer[Any]] | None) -> None:
        self.num_samples, self.groups = num_samples, groups
        self._classes = np.full(num_samples, -1, np.int32)
        self._lead = np.zeros(num_samples, np.uint8)

    @property
    def classes(self) -> NDArray[np.int32]:
        """Candidate of each sample, int32 `[N]`; -1 where nobody voted."""
        return self._classes

    def forget(self, ids: Indices) -> None:
        """Count some samples from nothing."""
        self._classes[ids], self._lead[ids] = -1, 0

    def add(self, ids: Indices, classes: NDArray[np.integer[Any]]) -> None:
        """Count a vote for each of some samples."""
        if self.groups is not None:
            other = classes != self.groups[ids]
            ids, classes = ids[other], classes[other]
        held, lead = self._classes[ids], self._lead[ids]
        same, fallen = held == classes, lead == 0
        self._classes[ids] = np.where(fallen, classes, held)
        self._lead[ids] = np.where(same | fallen, np.minimum(lead, _MOST - 1) + 1, lead - 1)
