"""Prompts for RL as a strategy: the samples are prompts, and their losses are minus the mean rewards of groups."""

from __future__ import annotations

from functools import partial

import numpy as np

from learnit_r8.core.state import Saved, part, table
from learnit_r8.errors import ConfigError
from learnit_r8.prompts import PromptScheduler
from learnit_r8.strategies.base import BatchRequest
from learnit_r8.strategies.contract import sound
from learnit_r8.types import Indices, LossReport


@sound
class Prompts(Saved):
    """Draws prompts whose groups of completions are likely to teach, inside `R8Scheduler`; see `PromptScheduler`.

    With R8Mixin over TRL's GRPOTrainer or RLOOTrainer a sample is a prompt, and its reported loss is minus the mean
    reward of its group; report the same in a loop of your own. Only means are known here: the rewards of a group are
    taken to vary as much as these allow, as they do where each is 0 or 1. An epoch is as many draws as there are
    prompts; the dull ones are left out of it, the others come again.

    Args:
        group_size: Completions of a prompt, TRL's `num_generations`.
        reward_range: The lowest and the highest reward that there can be.
        fade: What evidence keeps of its weight from one batch to the next.

    Raises:
        ConfigError: An argument out of range.
    """

    catalogs = False
    _saved = table(prompts=part(lambda me, _: me._new()))

    def __init__(
        self, group_size: int = 8, reward_range: tuple[float, float] = (0.0, 1.0), fade: float = 0.999
    ) -> None:
        self._new = partial(PromptScheduler, group_size=group_size, reward_range=reward_range, fade=fade)
        self.prompts = self._new()
        """What is known of the prompts: `pass_rate(id)`, `metrics_dict()`."""

    def start_epoch(self, request: BatchRequest) -> None:
        """Take in the prompts, at the first epoch."""
        if not len(self.prompts):
            seed = int(request.rng.integers(1 << 62))
            self.prompts = self._new(range(request.num_samples), seed=seed)

    def draw(self, request: BatchRequest) -> Indices:
        """Return the next prompts."""
        allowed = len(self.prompts) if request.excluded is None else np.flatnonzero(~request.excluded)
        return np.array(self.prompts.draw_among(allowed, request.size), np.int64)

    def observe(self, report: LossReport) -> None:
        """Learn from the groups' mean rewards.

        Raises:
            ConfigError: A reward is out of range.
        """
        low, high = self.prompts.reward_range
        means = -np.asarray(report.losses, np.float64)
        slack = 1e-6 * (high - low)  # losses are float32
        if not ((means >= low - slack) & (means <= high + slack)).all():
            found = f"mean rewards of {means.min():g} to {means.max():g}"
            raise ConfigError([f"Prompts(reward_range={(low, high)}) got {found}: give the range that they have"])
        gains = np.clip((means - low) / (high - low), 0.0, 1.0)
        for slot, gain in zip(report.indices.tolist(), gains.tolist(), strict=True):
            self.prompts.learn(slot, self.prompts.group_size, gain)

    def forget(self, indices: Indices) -> None:
        """Wait no longer for these groups."""
        for slot in indices.tolist():
            self.prompts.update(slot, [])
