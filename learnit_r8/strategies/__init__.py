"""One idea a file: how the samples of the next batch are chosen."""

from __future__ import annotations

from learnit_r8.strategies.adaptive import Adaptive, AdaptiveBatchSampler
from learnit_r8.strategies.auto import Auto
from learnit_r8.strategies.base import BatchRequest, Draw, Strategy, make, names, register
from learnit_r8.strategies.curriculum import Curriculum, CurriculumStrategy
from learnit_r8.strategies.curriculum_scheduler import CurriculumScheduler
from learnit_r8.strategies.infobatch import InfoBatch
from learnit_r8.strategies.mixture import Balanced, Mixture
from learnit_r8.strategies.prioritized import Prioritized
from learnit_r8.strategies.prompts import Prompts
from learnit_r8.strategies.quadrant import Quadrant
from learnit_r8.strategies.reward import RewardWeighted, RewardWeightedSampler
from learnit_r8.strategies.spaced import ExponentialMovingStats, SpacedRepetition, SpacedRepetitionSampler
from learnit_r8.strategies.token_budget import TokenBudget
from learnit_r8.strategies.uniform import Uniform
from learnit_r8.strategies.weighted import Weighted

__all__ = [
    "Adaptive",
    "AdaptiveBatchSampler",
    "Auto",
    "Balanced",
    "BatchRequest",
    "Curriculum",
    "CurriculumScheduler",
    "CurriculumStrategy",
    "Draw",
    "ExponentialMovingStats",
    "InfoBatch",
    "Mixture",
    "Prioritized",
    "Prompts",
    "Quadrant",
    "RewardWeighted",
    "RewardWeightedSampler",
    "SpacedRepetition",
    "SpacedRepetitionSampler",
    "Strategy",
    "TokenBudget",
    "Uniform",
    "Weighted",
    "make",
    "names",
    "register",
]
