"""Every sample once an epoch, in random order: what most training loops do."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from learnit_r8.strategies.base import BatchRequest, builtin
from learnit_r8.strategies.plan import PlannedStrategy, shuffled


@builtin("uniform")
class Uniform(PlannedStrategy):
    """Random permutation of the data set each epoch."""

    def queues(self, request: BatchRequest) -> list[NDArray[np.uint32]]:
        """Return one queue: all samples, shuffled."""
        return [shuffled(request)]
