"""Adaptive sampling in the manner of AdaBoost: weights grow where losses stay above the batch's mean.

`w_i <- momentum w_i + (1 - momentum) w_i exp(learning_rate (l_i - mean) / std)`, mean and
standard deviation over the reported batch (Freund & Schapire 1997 reweight by an exponential
of the error; momentum damps it). Only ratios of weights matter, so they are never normalised
over the whole data set: an update touches the batch alone.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from learnit_r8.core.arrays import as_losses
from learnit_r8.core.config import Problems
from learnit_r8.core.state import alone
from learnit_r8.strategies.base import BatchRequest, builtin
from learnit_r8.strategies.weighting import Floats, WeightedSampler, WeightedStrategy, as_ids, fill_unseen
from learnit_r8.types import LossReport

_LARGEST_EXPONENT = 20.0
_RANGE = 1e3
"""Weights stay within this factor of 1. Without a limit one stubborn sample ends up with nearly all of
the weight: it is in every batch anyway, and all others would be drawn uniformly."""


def reweigh(weights: Floats, losses: Floats, learning_rate: float, momentum: float) -> Floats:
    """Return the weights of some samples after their losses were seen, both float64 `[n]`."""
    factor = losses - np.add.reduce(losses) / len(losses)
    spread = math.sqrt(factor.dot(factor) / len(losses))
    if spread > 0:
        factor /= spread
    factor *= learning_rate
    np.exp(np.minimum(factor, _LARGEST_EXPONENT, out=factor), out=factor)
    factor *= 1 - momentum
    factor += momentum
    factor *= weights
    np.minimum(factor, _RANGE, out=factor)
    return np.asarray(np.maximum(factor, 1 / _RANGE, out=factor))


@builtin("adaptive")
class Adaptive(WeightedStrategy):
    """Draws by weights that are boosted where losses stay high, and corrects the bias.

    Args:
        learning_rate: Strength of the boost.
        momentum: Share of a weight that stays as it is.
    """

    def __init__(self, learning_rate: float = 0.1, momentum: float = 0.9) -> None:
        problems = Problems()
        self.learning_rate = problems.real("learning_rate", learning_rate, 0.0)
        self.momentum = problems.real("momentum", momentum, 0.0, 1.0)
        problems.raise_if_any()
        super().__init__()

    def epoch_weights(self, request: BatchRequest) -> Floats:
        """Return the weights so far; at first, those after one look at all catalogued losses."""
        if self._sampler is not None:
            return self._sampler.weights
        uses, weights = request.catalog.uses, np.ones(request.num_samples)
        seen = np.flatnonzero(uses)
        if len(seen):
            losses = request.catalog.expected_loss[seen].astype(np.float64)
            weights[seen] = reweigh(weights[seen], losses, self.learning_rate, self.momentum)
        return fill_unseen(weights, uses)

    def observe(self, report: LossReport) -> None:
        """Boost or relax the batch's samples."""
        if self._sampler is not None:
            before, losses = self._sampler.weights[report.indices], report.losses.astype(np.float64)
            self._sampler.set(report.indices, reweigh(before, losses, self.learning_rate, self.momentum))


class AdaptiveBatchSampler(WeightedSampler):
    """The same without a scheduler.

    Args:
        dataset_size: Number of samples.
        learning_rate: Strength of the boost.
        momentum: Share of a weight that stays as it is.
        seed: Any non-negative int; global random states are never touched.

    Raises:
        ConfigError: An argument is out of range; all of them are listed.
    """

    def __init__(self, dataset_size: int, learning_rate: float = 0.1, momentum: float = 0.9, seed: int = 0) -> None:
        problems = Problems()
        size = problems.integer("dataset_size", dataset_size, 1)
        self.learning_rate = problems.real("learning_rate", learning_rate, 0.0)
        self.momentum = problems.real("momentum", momentum, 0.0, 1.0)
        problems.integer("seed", seed, 0)
        problems.raise_if_any()
        super().__init__(np.ones(size), seed)

    @alone
    def update_weights(self, indices: ArrayLike, losses: ArrayLike) -> None:
        """Boost or relax samples by their losses; where one is named twice the last counts.

        Args:
            indices: Sample ids, shape `[n]`.
            losses: Their losses, array or tensor of shape `[n]`.

        Raises:
            ValueError: Shapes differ, an id is no integer or outside the data set, or a loss is not finite.
                Nothing is changed.
        """
        ids = as_ids(indices, len(self))
        values = as_losses(losses).reshape(-1)
        if len(ids) != len(values):
            raise ValueError(f"need one loss per index, got {len(ids)} indices and {len(values)} losses")
        if not len(ids):
            return
        if not np.isfinite(values).all():
            raise ValueError("losses must be finite: leave out the samples whose loss is not")
        self._sampler.set(ids, reweigh(self._sampler.weights[ids], values, self.learning_rate, self.momentum))
