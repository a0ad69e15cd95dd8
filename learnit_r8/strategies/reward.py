"""Reward-weighted sampling: `P(i)` proportional to `exp(score_i / temperature)`.

After reward-weighted regression (Peters & Schaal 2007). The score is the reward scaled to
0..1, `(r - min) / (max - min)`, or its rank scaled to 0..1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from learnit_r8.core.arrays import as_losses
from learnit_r8.core.config import Problems
from learnit_r8.core.state import row, table
from learnit_r8.strategies.base import BatchRequest, builtin
from learnit_r8.strategies.weighting import UNIFORM_SHARE, Floats, WeightedSampler, WeightedStrategy
from learnit_r8.types import LossReport


def scores(rewards: Floats, *, use_rank: bool) -> Floats:
    """Return the rewards, or their ranks, scaled to 0..1; equal rewards score alike (all equal: 0)."""
    if use_rank:
        levels, ranks = np.unique(rewards, return_inverse=True)
        return np.asarray(ranks / max(len(levels) - 1, 1))
    low, high = rewards.min(), rewards.max()
    # Halves first: the range of two finite numbers may overflow.
    width = high / 2 - low / 2
    return (rewards / 2 - low / 2) / width if width > 0 else np.zeros(len(rewards))


def reward_weights(scores: Floats, temperature: float) -> Floats:
    """Return `exp(score / temperature)` up to a factor, so that the highest score has weight 1."""
    # Dividing by a tiny temperature may overflow to -inf, whose exponential is the right 0.
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(np.exp((scores - 1.0) / temperature))


def _check(rewards: ArrayLike | None, temperature: float, seed: int = 0, defensive: float = 0.0) -> Floats | None:
    """Return the rewards as a checked copy."""
    problems = Problems()
    problems.real("defensive", defensive, 0.0, 0.8)
    problems.real("temperature", temperature, 0.0, open_low=True)
    problems.integer("seed", seed, 0)
    values = None
    if rewards is not None:
        values = as_losses(rewards)
        if values.ndim != 1 or not len(values):
            problems.append(f"rewards must be a 1-D array with at least one reward, got shape {values.shape}")
        elif not np.isfinite(values).all():
            problems.append(f"rewards must be finite, got {int((~np.isfinite(values)).sum())} that are not")
    problems.raise_if_any()
    return values


@builtin("reward")
class RewardWeighted(WeightedStrategy):
    """Draws samples of high reward more often, and corrects the bias.

    Args:
        rewards: One number per sample, `[N]`. None: the reward is minus the expected loss, so
            that well-learned samples come more often.
        temperature: The lower, the greedier.
        use_rank: Use ranks in place of rewards; they ignore outliers. With `rewards=None`
            the weights are then set at epoch starts only.
    """

    _saved = table(range=row(float, float))

    grows = True

    def __init__(self, rewards: ArrayLike | None = None, temperature: float = 1.0, use_rank: bool = False) -> None:
        self._rewards = _check(rewards, temperature)
        self.temperature = float(temperature)
        self.use_rank = bool(use_rank)
        self._range = (0.0, 0.0)
        super().__init__()

    def epoch_weights(self, request: BatchRequest) -> Floats:
        """Return the weights of the rewards, or of the catalog's losses, float64 `[N]`.

        Raises:
            ValueError: There are more or fewer rewards than samples.
        """
        if self._rewards is not None:
            count, samples = len(self._rewards), request.num_samples
            if count != samples:
                raise ValueError(f"rewards must have one entry per sample: {count} rewards, {samples} samples")
            return reward_weights(scores(self._rewards, use_rank=self.use_rank), self.temperature)
        weights = np.ones(request.num_samples)
        seen = np.flatnonzero(request.catalog.uses)
        if len(seen):
            losses = request.catalog.expected_loss[seen].astype(np.float64)
            self._range = (float(losses.min()), float(losses.max()))
            weights[seen] = reward_weights(scores(-losses, use_rank=self.use_rank), self.temperature)
        return weights

    def observe(self, report: LossReport) -> None:
        """Move the batch's samples within the epoch's range of losses."""
        low, high = self._range
        if self._sampler is None or self._rewards is not None or self.use_rank or not high > low:
            return
        score = (high - report.losses.astype(np.float64)) / (high - low)
        score = np.minimum(np.maximum(score, 0.0), 1.0)  # half of np.clip's time
        self._sampler.set(report.indices, reward_weights(score, self.temperature))


class RewardWeightedSampler(WeightedSampler):
    """The same without a scheduler.

    Args:
        rewards: One finite number per sample, `[N]`.
        temperature: The lower, the greedier.
        use_rank: Use ranks in place of rewards.
        seed: Any non-negative int; global random states are never touched.
        defensive: Share of uniform draws, 0 to 0.8. At 0.2 no sample is starved and no importance weight is
            above 5; at 0 draws follow `exp(score / temperature)` itself, and importance weights have no limit.

    Raises:
        ConfigError: No rewards, a reward that is NaN or infinite, a temperature <= 0.
    """

    def __init__(
        self,
        rewards: ArrayLike,
        temperature: float = 1.0,
        use_rank: bool = False,
        seed: int = 0,
        *,
        defensive: float = UNIFORM_SHARE,
    ) -> None:
        values = _check(rewards if rewards is not None else (), temperature, seed, defensive)
        assert values is not None
        super().__init__(reward_weights(scores(values, use_rank=use_rank), float(temperature)), seed, float(defensive))
