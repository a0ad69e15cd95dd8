"""Which prompts get rollouts, in reinforcement learning with verifiable or graded rewards.

    prompts = PromptScheduler(range(len(dataset)), group_size=8)
    for _ in range(steps):
        for key in prompts.draw(16):
            prompts.update(key, rewards_of(rollouts(key)))  # the rewards of the group's completions

A group whose rewards are all alike has no advantage to learn from, and rollouts are what this kind of training
costs. So each prompt's chance of success p is estimated, and those are drawn whose groups are likely to be mixed and
have much to gain: the chance of a mixed group of g, 1 - p^g - (1 - p)^g, times 1 - p.

* The estimate is a Beta posterior, of a uniform prior and of evidence that fades, since the policy moves: by `fade`
  a draw, and by half with every new group.
* Thompson's rule (1933) chooses: p is drawn from the posterior, for several times as many random prompts as are
  wanted, and those that are worth most are taken. So unseen prompts are tried, solved ones rest, and come back as
  their evidence fades. Three tenths are drawn uniformly, so that no prompt is given up.
* Where rewards are graded, that is multiplied by the share of their greatest variance, p (1 - p), that the prompt's
  groups have shown: one that is always rewarded .5 teaches nothing.

`python -m benchmarks.prompts` says what it gains and where it loses: prompts whose answers are partly chance.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from learnit_r8.core.arrays import as_losses
from learnit_r8.core.config import Problems
from learnit_r8.core.rng import Purpose, RandomStreams
from learnit_r8.core.state import Kind, Saved, alone, each, fixed, row, table
from learnit_r8.structures.key_table import KeyTable
from learnit_r8.structures.keys import KEY, plain_key

__all__ = ["PromptScheduler"]

_CARRY = 0.5
"""What earlier evidence keeps of its weight beside a whole new group."""
_POOL = 3
"""Random prompts that are looked at for each that is wanted."""
_EXPLORE = 0.3
"""Share of the prompts that is drawn uniformly."""
_PATIENCE = 16
"""Draws for which a prompt is not drawn again while its group is under way."""

_WAITS = each(row(KEY, int), dict)
_WAITING = Kind(lambda me, waits: _WAITS.save(me, waits.items()), _WAITS.load)


class PromptScheduler(Saved):
    """Chooses the prompts whose groups of rollouts are likely to teach, from the rewards of earlier ones.

    Any number of threads may use one.

    Args:
        keys: The prompts' names or numbers: texts, numbers, bytes, or tuples of those. More can come later.
        group_size: Completions that a prompt gets at a time.
        seed: Any non-negative int; global random states are never touched.
        reward_range: The lowest and the highest reward that there can be.
        fade: What evidence keeps of its weight from one draw to the next.

    Raises:
        ConfigError: An argument out of range, or a key given twice.
    """

    seed: int = fixed()
    reward_range: tuple[float, float] = fixed()
    _as_json = sys.maxsize
    _saved = table(
        group_size=int,
        seed=int,
        fade=float,
        reward_range=row(float, float),
        draws=int,
        groups=int,
        mixed=int,
        keys=each(KEY, KeyTable),
        wins=np.float64,
        losses=np.float64,
        shown=np.float64,
        possible=np.float64,
        at=np.int64,
        waits=_WAITING,
        gone=_WAITING,
    )

    def __init__(
        self,
        keys: Iterable[Hashable] = (),
        group_size: int = 8,
        seed: int = 0,
        *,
        reward_range: tuple[float, float] = (0.0, 1.0),
        fade: float = 0.999,
    ) -> None:
        problems = Problems()
        self.group_size = problems.integer("group_size", group_size, 2)
        self.seed = problems.integer("seed", seed, 0)
        self.fade = problems.real("fade", fade, 0.0, 1.0, open_low=True)
        bounds = np.array(reward_range, np.float64) if np.shape(reward_range) == (2,) else np.zeros(2)
        if not (np.isfinite(bounds).all() and bounds[0] < bounds[1]):
            problems.append(f"reward_range must be two finite numbers, the lower first, got {reward_range!r}")
        problems.raise_if_any()
        self.reward_range = (float(bounds[0]), float(bounds[1]))
        self._draws = self._groups = self._mixed = 0
        self._keys = KeyTable()
        # Evidence of each prompt, as of draw `at` (-1: none): rewards, what they lacked of the highest, the variance
        # that its groups have shown and the most that their means allowed.
        self._wins, self._losses, self._shown, self._possible = np.zeros((4, 0))
        self._at = np.zeros(0, np.int64)
        self._waits: dict[Hashable, int] = {}  # prompts whose groups are under way, and their draw
        self._gone: dict[Hashable, int] = {}  # likewise, of prompts that were removed since
        self._state_taken()
        self.add(keys)

    def _state_taken(self) -> None:
        self._streams = RandomStreams(self.seed)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._keys

    @alone
    def add(self, keys: Iterable[Hashable]) -> None:
        """Take in more prompts; costs O(all of them), so add many at a time.

        Raises:
            ConfigError: A key stands for two prompts. Then none is added.
        """
        before = len(self)
        self._keys.add(keys)
        self._keep(np.arange(before), len(self) - before)

    @alone
    def remove(self, keys: Iterable[Hashable]) -> None:
        """Draw these prompts no more and forget them; what still comes of their groups is ignored. O(all of them).

        Raises:
            KeyError: There is no such prompt. Then none is removed.
        """
        gone = self._keys.numbers(keys)
        kept = np.delete(np.arange(len(self)), gone)
        self._gone |= {key: self._waits.pop(key) for key in self._keys.of(gone) if key in self._waits}
        self._keep(kept)
        self._keys = KeyTable(self._keys.of(kept))

    def _keep(self, slots: NDArray[np.int64], new: int = 0) -> None:
        for name in ("_wins", "_losses", "_shown", "_possible"):
            setattr(self, name, np.append(getattr(self, name)[slots], np.zeros(new)))
        self._at = np.append(self._at[slots], np.full(new, -1))

    def _slot(self, key: Hashable) -> int:
        slot = int(self._keys.find([key])[0])
        if slot < 0:
            raise KeyError(f"there is no prompt {key!r}: add([{key!r}]) first")
        return slot

    @alone
    def draw(self, n: int) -> list[Hashable]:
        """Return the keys of `n` different prompts, in random order; all of them where there are fewer.

        Those whose groups are under way are left out while there are others, for up to 16 draws: a group may be lost.

        Raises:
            ConfigError: `n` is below 1, or there is no prompt.
        """
        problems = Problems()
        n = problems.integer("n", n, 1)
        if not len(self):
            problems.append("there is no prompt to draw: add(keys) first")
        problems.raise_if_any()
        return self.draw_among(len(self), n)

    @alone
    def draw_among(self, slots: int | NDArray[np.int64], n: int) -> list[Hashable]:
        """As `draw`, from the prompts of these places in the order in which they were added, or of all so many."""
        rng = self._streams.at(Purpose.BATCH, 0, self._draws)
        self._draws += 1
        for waits in (self._waits, self._gone):
            for key in [key for key, since in waits.items() if self._draws - since > _PATIENCE]:
                del waits[key]
        there = slots if isinstance(slots, int) else len(slots)
        pool = rng.choice(slots, min(there, _POOL * n + len(self._waits)), replace=False)
        busy = np.isin(pool, self._keys.find(self._waits))
        pool = np.concatenate([pool[~busy][: _POOL * n], pool[busy]])  # these last, for want of others
        free = min(len(pool) - int(busy.sum()), _POOL * n)
        tried = min(int(n * _EXPLORE + rng.random()), free)
        by_worth = np.argsort(-self._worth(pool[tried:free], rng), kind="stable") + tried
        chosen = np.concatenate([pool[:tried], pool[by_worth], pool[free:]])[:n]
        keys = self._keys.of(rng.permutation(chosen))
        self._waits |= dict.fromkeys(keys, self._draws)
        return keys

    def _worth(self, slots: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float64]:
        """Return what a group of each prompt is believed, this time, to be worth."""
        left = self._left(slots)
        p = rng.beta(1.0 + left * self._wins[slots], 1.0 + left * self._losses[slots])
        mixed = 1.0 - p**self.group_size - (1.0 - p) ** self.group_size
        shown, possible = left * self._shown[slots], left * self._possible[slots]
        return np.asarray(mixed * (1.0 - p) * (shown + 1.0) / (possible + 1.0))

    def _left(self, slots: Any) -> Any:
        """Return how much of the evidence has not faded."""
        return self.fade ** (self._draws - self._at[slots])

    @alone
    def update(self, key: Hashable, rewards: ArrayLike) -> None:
        """Report the rewards of a prompt's completions: of a group, late, or a part of it.

        Args:
            key: The prompt; one that was not drawn can be reported, too.
            rewards: Numbers within `reward_range`, `[n]`; none when the group was lost.

        Raises:
            KeyError: There is no such prompt, nor was there one whose group was under way.
            TypeError: Not numbers.
            ValueError: A reward is not finite or out of range.
        """
        values = as_losses(rewards).reshape(-1)
        low, high = self.reward_range
        if not ((values >= low) & (values <= high)).all():
            raise ValueError(f"rewards must lie within reward_range={self.reward_range}, got {values.tolist()}")
        key = plain_key(key)
        if key in self._gone and key not in self._keys:  # it may have several groups under way
            return
        slot = self._slot(key)
        self._waits.pop(key, None)
        if len(values):
            gains = (values - low) / (high - low)
            self.learn(slot, len(values), float(gains.mean()), float(gains.var()))

    def learn(self, slot: int, count: int, mean: float, variance: float | None = None) -> None:
        """Take in a group of which only this is known: mean and variance of so many rewards between 0 and 1.

        Where the variance is None it is the most that the mean allows, as where rewards are 0 or 1.
        """
        most = mean * (1.0 - mean)
        shown = most if variance is None else variance
        left = self._left(slot) * _CARRY ** (count / self.group_size)
        parts = ((self._wins, mean), (self._losses, 1.0 - mean), (self._shown, shown), (self._possible, most))
        for evidence, new in parts:
            evidence[slot] = left * evidence[slot] + count * new
        self._waits.pop(self._keys[slot], None)
        self._at[slot] = self._draws
        self._groups += 1
        self._mixed += shown > 0.0

    @alone
    def pass_rate(self, key: Hashable) -> float:
        """Return the mean of the belief about a prompt's reward, 0 (the lowest) to 1 (the highest); .5 if unseen.

        Raises:
            KeyError: There is no such prompt.
        """
        return float(self._rates(np.array([self._slot(key)]))[0])

    def _rates(self, slots: Any) -> NDArray[np.float64]:
        left = self._left(slots)
        wins, losses = left * self._wins[slots], left * self._losses[slots]
        return np.asarray((1.0 + wins) / (2.0 + wins + losses))

    @alone
    def metrics_dict(self) -> dict[str, float]:
        """Return numbers for a log.

        A seen prompt is on the "frontier" where a group of it is more likely mixed than not, else "solved" or
        "unsolved". "groups" were reported, "mixed_groups" of them had different rewards.
        """
        seen = self._at >= 0
        rates = self._rates(slice(None))[seen]
        mixed = 1.0 - rates**self.group_size - (1.0 - rates) ** self.group_size > 0.5
        return {
            "prompts": len(self),
            "unseen": int((~seen).sum()),
            "solved": int((~mixed & (rates > 0.5)).sum()),
            "frontier": int(mixed.sum()),
            "unsolved": int((~mixed & (rates < 0.5)).sum()),
            "under_way": len(self._waits),
            "groups": self._groups,
            "mixed_groups": self._mixed,
            "mean_pass_rate": float(rates.mean()) if len(rates) else 0.0,
        }
