"""The level of the loss: its median over the last losses, the best it has been, and whether it drifts up.

Drift is a level that stays far above the best one, and above what it was before this rise began (256 to
1024 steps ago), so that a loss that swings is left alone. The best one is the level from which the least
rise would be drift: that counts in what the noise was at that time, and not only in how low it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from learnit_r8.stability.thresholds import DetectorSettings
from learnit_r8.stability.windows import SortedWindow

_BLOCK, _RECENT_BLOCKS, _PAST_BLOCKS = 64, 4, 16  # steps; blocks
_SWING = 1.25  # times the rise that was seen before


class Level:
    """Follows the level.

    Args:
        settings: Thresholds.

    Attributes:
        recent: The last losses.
        best: The level that the present one is compared with; infinite at first.
        onset: Step at which the present rise began.
    """

    def __init__(self, settings: DetectorSettings) -> None:
        self._settings = settings
        self.recent = SortedWindow(settings.drift_span)
        self._highs = PastHighs()
        self.forget_best()

    def forget_best(self) -> None:
        """Compare with what comes from now on."""
        self.best, self._margin = math.inf, 0.0
        self.onset = self._high_steps = 0

    def forget_all(self) -> None:
        """Begin anew."""
        self.forget_recent()
        self._highs = PastHighs()
        self.forget_best()

    def forget_recent(self) -> None:
        """Let the present level be unknown; the best one stays."""
        self.recent.fill(())
        self._high_steps = 0

    def drifts(self, step: int, s: float, mean: float, first_level: float, ease: float) -> bool:
        """Follow the level that `recent` has now, and say whether it has been too high for long.

        Args:
            step: Global step.
            s: Spread of the losses.
            mean: Running mean of the losses.
            first_level: L0.
            ease: Factor on the threshold.
        """
        settings = self._settings
        if len(self.recent) < settings.drift_span:
            return False
        level = self.recent.median()
        self._highs.push(level)
        if level + settings.drift_score * s < self.best + self._margin:  # it may be the new best
            margin = max(
                settings.drift_rise * abs(level),
                settings.drift_score * s,
                settings.drift_floor * first_level,
                settings.drift_rise * mean,
            )
            if level + margin < self.best + self._margin:
                self.best, self._margin = level, margin
        rise, margin = level - self.best, ease * self._margin
        if rise <= 0.25 * margin:
            self.onset = step
        high = rise > margin and rise > _SWING * (self._highs.highest - self.best)
        self._high_steps = self._high_steps + 1 if high else 0
        return self._high_steps >= settings.drift_span

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain numbers and lists; strict JSON knows no infinity."""
        return {
            "recent": list(self.recent.arrivals),
            "highs": self._highs.state_dict(),
            "best": self.best if math.isfinite(self.best) else None,
            "margin": self._margin,
            "onset": self.onset,
            "high_steps": self._high_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.recent.fill(state["recent"])
        self._highs.fill(state["highs"])
        self.best = math.inf if state["best"] is None else float(state["best"])
        self._margin = float(state["margin"])
        self.onset, self._high_steps = int(state["onset"]), int(state["high_steps"])


class PastHighs:
    """The highest level of 256 to 1024 steps ago, by blocks of steps.

    Attributes:
        highest: It; minus infinity while the run is younger.
    """

    __slots__ = ("blocks", "current", "highest", "steps")

    def __init__(self) -> None:
        self.blocks: list[float] = []
        self.highest = -math.inf
        self.current = -math.inf
        self.steps = 0

    def push(self, level: float) -> None:
        """Add the level of one step."""
        if level > self.current:
            self.current = level
        self.steps += 1
        if self.steps == _BLOCK:
            self._keep([*self.blocks, self.current][-_PAST_BLOCKS:])
            self.current, self.steps = -math.inf, 0

    def fill(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._keep([float(level) for level in state["blocks"]])
        self.current = -math.inf if state["current"] is None else float(state["current"])
        self.steps = int(state["steps"])

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain numbers and lists."""
        return {"blocks": self.blocks, "current": self.current if self.steps else None, "steps": self.steps}

    def _keep(self, blocks: list[float]) -> None:
        self.blocks = blocks
        self.highest = max(blocks[:-_RECENT_BLOCKS], default=-math.inf)
