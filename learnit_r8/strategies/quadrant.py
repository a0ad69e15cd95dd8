"""Batches that are balanced over the quartiles of the catalog's loss."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from learnit_r8.strategies.base import BatchRequest, builtin
from learnit_r8.strategies.plan import EpochPlan, PlannedStrategy, shuffled
from learnit_r8.types import Indices


@builtin("quadrant")
class Quadrant(PlannedStrategy):
    """Every sample once an epoch; every batch takes a quarter from each loss quartile.

    Within a quadrant the samples with the fewest uses come first, ties in random order.
    Samples without a known loss are spread over the quadrants.

    Args:
        target_loss: Also swap samples within their quadrants until the batch's expected loss is
            within a tenth of the data set's mean, where a few swaps can do that.
    """

    def __init__(self, *, target_loss: bool = False) -> None:
        super().__init__()
        self._target_loss = target_loss

    def draw(self, request: BatchRequest) -> Indices:
        """Return the plan's next batch; on probation the stable samples come first."""
        if self._target_loss and self._plan is not None and not request.stable_only:
            mean = request.catalog.mean_expected
            if not math.isnan(mean):
                self._plan.steer(request.size, request.catalog.expected_of, mean, 0.1 * abs(mean))
        return super().draw(request)

    def certain(self) -> EpochPlan | None:
        """Return the plan, None where it is steered."""
        return None if self._target_loss else self._plan

    def queues(self, request: BatchRequest) -> list[NDArray[np.uint32]]:
        """Return four queues, Q1 (lowest loss) first."""
        order = _least_used_first(shuffled(request), request.catalog.uses)
        codes = request.catalog.quadrants()[order]
        unseen = np.flatnonzero(codes > 3)
        if len(unseen):
            wanted = np.array([(len(order) - part + 3) // 4 for part in range(4)])
            missing = np.maximum(wanted - np.bincount(codes, minlength=256)[:4], 0)
            codes[unseen] = np.resize(_interleave(missing), len(unseen))
        return [order[codes == quadrant] for quadrant in range(4)]


def _least_used_first(order: NDArray[np.uint32], uses: NDArray[np.uint32]) -> NDArray[np.uint32]:
    low, high = int(uses.min()), int(uses.max())
    if low == high:
        return order
    # 16 bits make the stable sort a radix sort: linear in N.
    rank = np.minimum(uses[order] - low, 65535).astype(np.uint16)
    return order[np.argsort(rank, kind="stable")]


def _interleave(counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return each quadrant's number `counts` times, spread evenly: [2, 1, 1, 0] -> 0 1 2 0."""
    codes = np.repeat(np.arange(4, dtype=np.uint8), counts)
    turn = np.concatenate([np.arange(count) for count in counts]) if counts.sum() else np.zeros(0)
    return codes[np.argsort(turn, kind="stable")]
