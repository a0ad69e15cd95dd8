"""Prioritized sampling: the higher the loss, the more often.

Schaul et al. 2015, "Prioritized Experience Replay": `p_i = (|l_i| + eps)^alpha`, importance
weights `(N P(i))^-beta` with beta rising to 1 over the run.
"""

from __future__ import annotations

import numpy as np

from learnit_r8.core.config import Problems
from learnit_r8.strategies.base import BatchRequest, Draw, builtin
from learnit_r8.strategies.weighting import MAX_WEIGHT, Floats, WeightedStrategy, fill_unseen
from learnit_r8.types import LossReport


@builtin("prioritized")
class Prioritized(WeightedStrategy):
    """Draws in proportion to a power of the expected loss. Unseen samples get the highest one.

    Args:
        alpha: 0 is uniform, 1 is proportional to the loss.
        beta: Exponent of the bias correction at the start of the run.
        beta_end: The same at its end; 1 corrects fully.
        eps: Keeps samples of loss 0 in the draw.
        normalize: Divide a batch's weights by their "mean" or "max", or not at all (None).
            "max" shrinks the step, so "mean" is the default.
    """

    grows = True

    def __init__(
        self,
        alpha: float = 0.6,
        beta: float = 0.4,
        beta_end: float = 1.0,
        eps: float = 1e-6,
        normalize: str | None = "mean",
    ) -> None:
        problems = Problems()
        self.alpha = problems.real("alpha", alpha, 0.0, 4.0)
        self.beta = problems.real("beta", beta, 0.0, 1.0)
        self.beta_end = problems.real("beta_end", beta_end, 0.0, 1.0)
        self.eps = problems.real("eps", eps, 0.0, open_low=True)
        if normalize not in ("mean", "max", None):
            problems.append(f"normalize must be 'mean', 'max' or None, got {normalize!r}")
        problems.raise_if_any()
        self.normalize = normalize
        super().__init__()

    def _priorities(self, losses: Floats) -> Floats:
        return (np.abs(losses) + self.eps) ** self.alpha

    def epoch_weights(self, request: BatchRequest) -> Floats:
        """Return the priorities of the catalog's losses."""
        catalog = request.catalog
        return self._priorities(fill_unseen(np.abs(catalog.expected_loss), catalog.uses))

    def observe(self, report: LossReport) -> None:
        """Give the batch's samples their new priorities."""
        if self._sampler is not None:
            self._sampler.set(report.indices, self._priorities(report.losses.astype(np.float64)))

    def draw(self, request: BatchRequest) -> Draw:
        """Return a batch with weights `(N P)^-beta`."""
        draw = super().draw(request)
        if draw.weights is None:
            return draw
        beta = self.beta + (self.beta_end - self.beta) * request.progress
        weights = draw.weights**beta
        if self.normalize is not None:
            weights /= weights.sum() / len(weights) if self.normalize == "mean" else weights.max()
        return Draw(draw.indices, draw.probabilities, np.minimum(weights, MAX_WEIGHT))
