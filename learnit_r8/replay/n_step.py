"""n-step returns: what was gained over the next n steps, as one experience."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from learnit_r8.core.config import Problems
from learnit_r8.core.state import Kind, Saved, table


class NStep(Saved):
    """Turn single steps of one environment into n-step experiences.

    The reward becomes R = sum over k < m of gamma^k r_{t+k} (Sutton 1988; Rainbow, Hessel et
    al. 2018), next state and done are those of the last step, and gamma^m is added: under
    "discount" in a dict, as the last element of a tuple. m is n, or less where the episode
    ended first. The target is R + discount * (1 - done) * value(next state).

    What is pending is saved with its buffer. Where the environment begins a new episode after a load, call
    `end_episode()` first: else steps of two episodes become one experience.

    Args:
        n: Steps to sum over, at least 1.
        gamma: Discount per step, in 0 .. 1.
        reward: Where an experience has its reward: position in a tuple or key of a dict.
        next_state: The same for the next state.
        done: The same for the flag that the episode has ended for good.

    Raises:
        ConfigError: `n` or `gamma` out of range.
    """

    _saved = table(pending=Kind(lambda _, steps: list(steps), lambda _, saved: deque(saved)))

    def __init__(
        self, n: int, gamma: float = 0.99, *, reward: int | str = 2, next_state: int | str = 3, done: int | str = 4
    ) -> None:
        problems = Problems()
        self.n, self.gamma = problems.integer("n", n, 1), problems.real("gamma", gamma, 0.0, 1.0)
        problems.raise_if_any()
        self._fields = (reward, next_state, done)
        self._pending: deque[Any] = deque()

    @property
    def pending(self) -> list[Any]:
        """The steps that are not complete yet, oldest first."""
        return list(self._pending)

    @property
    def made_with(self) -> dict[str, Any]:
        """The arguments, as JSON data."""
        return {"n": self.n, "gamma": self.gamma, "fields": list(self._fields)}

    def push(self, experience: Any) -> list[Any]:
        """Take one step; return the experiences that are complete, oldest first.

        Raises:
            ValueError: It lacks a field, or its reward is no number. Nothing is changed.
        """
        ready, pending = self.follow([experience])
        self.keep(pending)
        return ready

    def end_episode(self) -> list[Any]:
        """The episode was cut short (time limit): return what is pending, with fewer steps each."""
        ready = self._drain(self._pending)
        self._pending = deque()
        return ready

    def follow(self, steps: Iterable[Any]) -> tuple[list[Any], list[Any]]:
        """Return the experiences that these steps would complete, and what would be pending after them."""
        ready, pending = [], self._pending.copy()
        for step in steps:
            self._check(step, pending[0] if pending else step)
            pending.append(step)
            if step[self._fields[2]]:
                ready += self._drain(pending)
                pending.clear()
            elif len(pending) == self.n:
                ready.append(self.combined(pending))
                pending.popleft()
        return ready, list(pending)

    def keep(self, pending: Iterable[Any]) -> None:
        """Set what is pending."""
        self._pending = deque(pending)

    def _drain(self, pending: Iterable[Any]) -> list[Any]:
        steps = list(pending)
        return [self.combined(steps[first:]) for first in range(len(steps))]

    def _check(self, step: Any, first: Any) -> None:
        reward, next_state, done = self._fields
        try:
            _ = step[next_state], self.gamma * step[reward] + 0.0, bool(step[done])
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"a step needs a reward at {reward!r}, a next state at {next_state!r} and whether it is done at "
                f"{done!r}, got {step!r:.80} ({type(error).__name__}: {error})"
            ) from error
        if isinstance(step, dict) != isinstance(first, dict) or len(step) != len(first):
            raise ValueError(f"the steps of an episode must be built alike: {first!r:.80} and {step!r:.80}")
        if isinstance(step, dict) and "discount" in step:
            raise ValueError('a step has a "discount" of its own, which gamma**n would replace: call it something else')

    def combined(self, steps: Sequence[Any]) -> Any:
        """Return one experience made of all of these steps."""
        reward, next_state, done = self._fields
        total = sum(self.gamma**k * step[reward] for k, step in enumerate(steps))
        changes = {reward: total, next_state: steps[-1][next_state], done: steps[-1][done]}
        discount = self.gamma ** len(steps)
        if isinstance(steps[0], dict):
            return {**steps[0], **changes, "discount": discount}
        fields = list(steps[0])
        for position, value in changes.items():
            fields[position] = value  # type: ignore[index]
        return (*fields, discount)
