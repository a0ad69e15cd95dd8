"""InfoBatch: leave out some of what is already learned, and weigh the rest of it more.

Qin et al. 2024 (ICLR), "InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning":
samples whose loss is below the mean are dropped with probability r and the kept ones weigh
1 / (1 - r); the last part of the budget uses everything. Here exactly the share r of them is
dropped each epoch, at random, so the inclusion probability is exact and an epoch's length known.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from learnit_r8.config import Problems
from learnit_r8.strategies.base import BatchRequest, Draw, register
from learnit_r8.strategies.plan import EpochPlan, shuffled
from learnit_r8.types import Mask


@register("infobatch")
class InfoBatch:
    """Every sample of high loss once an epoch, those below the mean once in `1 / (1 - ratio)` epochs.

    Args:
        ratio: Share of the samples below the mean loss that an epoch leaves out.
        anneal: Share of the budget, at its end, that uses all samples.
        normalize: Scale the weights to mean 1, so that a step is as large as without pruning
            and an epoch has fewer of them. False: the published weights, 1 and `1 / (1 - ratio)`,
            which keep an epoch's sum of gradients in place of a step's size.
    """

    def __init__(self, ratio: float = 0.5, anneal: float = 0.125, normalize: bool = True) -> None:
        problems = Problems()
        self.ratio = problems.real("ratio", ratio, 0.0, 0.99)
        self.anneal = problems.real("anneal", anneal, 0.0, 1.0)
        problems.raise_if_any()
        self.normalize = bool(normalize)
        self._plan: EpochPlan | None = None
        self._low: Mask = np.zeros(0, bool)
        self._probabilities = (1.0, 1.0)  # of samples of high loss, of those below the mean
        self._count = 1

    def start_epoch(self, request: BatchRequest) -> int:
        """Choose what the epoch leaves out; return how many samples it draws."""
        order = shuffled(request)
        low = self._below_mean(order, request)
        below, others = order[low], order[~low]
        kept = below[: max(round(len(below) * (1 - self.ratio)), min(1, len(below)))]
        self._plan = EpochPlan([kept, others])
        self._low = np.zeros(request.num_samples, bool)
        self._low[kept] = True
        drawn = self._plan.remaining
        inclusion = len(kept) / len(below) if len(below) else 1.0
        self._probabilities = (1.0 / max(drawn, 1), inclusion / max(drawn, 1))
        self._count = len(order)
        return drawn

    def _below_mean(self, order: Any, request: BatchRequest) -> Mask:
        if request.progress >= 1 - self.anneal or self.ratio == 0:
            return np.zeros(len(order), bool)
        seen = request.catalog.uses[order] > 0
        losses = request.catalog.expected_loss[order]
        mean = losses[seen].mean(dtype=np.float64) if seen.any() else 0.0
        return np.asarray(seen & (losses < mean))

    def draw(self, request: BatchRequest) -> Draw:
        """Return the plan's next batch; on probation samples below the mean come first."""
        if self._plan is None:
            self.start_epoch(request)
        assert self._plan is not None
        take = self._plan.take_first if request.stable_only else self._plan.take
        indices = take(request.size)
        probabilities = np.where(self._low[indices], self._probabilities[1], self._probabilities[0])
        # The published weights are relative to a sample that is drawn once an epoch.
        weights = 1.0 / (self._count * probabilities) if self.normalize else self._probabilities[0] / probabilities
        return Draw(indices, probabilities, weights)

    def state_dict(self) -> dict[str, Any]:
        """Return what is left of the plan, and who weighs more."""
        return {
            "plan": None if self._plan is None else self._plan.state_dict(),
            "low": np.packbits(self._low),
            "size": len(self._low),
            "probabilities": list(self._probabilities),
            "count": self._count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._plan = None if state["plan"] is None else EpochPlan.from_state(state["plan"])
        self._low = np.unpackbits(np.asarray(state["low"], np.uint8), count=int(state["size"])).astype(bool)
        high, low = state["probabilities"]
        self._probabilities = (float(high), float(low))
        self._count = int(state["count"])
