"""n-step returns: what was gained over the next n steps, as one experience."""

from __future__ import annotations

from collections import deque
from typing import Any

from learnit_r8.errors import ConfigError


class NStep:
    """Turn single steps of one environment into n-step experiences.

    The reward becomes R = sum over k < m of gamma^k r_{t+k} (Sutton 1988; Rainbow, Hessel et
    al. 2018), next state and done are those of the last step, and gamma^m is added: under
    "discount" in a dict, as the last element of a tuple. m is n, or less where the episode
    ended first. The target is R + discount * (1 - done) * value(next state).

    Args:
        n: Steps to sum over, at least 1.
        gamma: Discount per step, in 0 .. 1.
        reward: Where an experience has its reward: position in a tuple or key of a dict.
        next_state: The same for the next state.
        done: The same for the flag that the episode has ended for good.

    Raises:
        ConfigError: `n` or `gamma` out of range.
    """

    def __init__(
        self, n: int, gamma: float = 0.99, *, reward: int | str = 2, next_state: int | str = 3, done: int | str = 4
    ) -> None:
        problems = []
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            problems.append(f"n must be an int of at least 1, got {n!r}")
        if not 0.0 <= gamma <= 1.0:
            problems.append(f"gamma must be in 0 .. 1, got {gamma!r}")
        if problems:
            raise ConfigError(problems)
        self.n, self.gamma = n, gamma
        self._fields = (reward, next_state, done)
        self._pending: deque[Any] = deque()

    def push(self, experience: Any) -> list[Any]:
        """Take one step; return the experiences that are complete, oldest first."""
        self._pending.append(experience)
        if experience[self._fields[2]]:
            return self.end_episode()
        if len(self._pending) < self.n:
            return []
        ready = self._combined()
        self._pending.popleft()
        return [ready]

    def end_episode(self) -> list[Any]:
        """The episode was cut short (time limit): return what is pending, with fewer steps each."""
        ready = []
        while self._pending:
            ready.append(self._combined())
            self._pending.popleft()
        return ready

    def state_dict(self) -> dict[str, Any]:
        """Return the steps that are not complete yet."""
        return {"pending": list(self._pending)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the steps that were not complete yet."""
        self._pending = deque(state["pending"])

    def _combined(self) -> Any:
        reward, next_state, done = self._fields
        steps = self._pending
        total = sum(self.gamma**k * step[reward] for k, step in enumerate(steps))
        changes = {reward: total, next_state: steps[-1][next_state], done: steps[-1][done]}
        discount = self.gamma ** len(steps)
        if isinstance(steps[0], dict):
            return {**steps[0], **changes, "discount": discount}
        fields = [changes.get(position, value) for position, value in enumerate(steps[0])]
        return (*fields, discount)
