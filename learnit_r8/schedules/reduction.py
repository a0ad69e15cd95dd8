"""The learning rate follows a metric: torch's `ReduceLROnPlateau`, fed by `R8Scheduler.log`."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

from learnit_r8.core.config import Problems
from learnit_r8.core.state import Saved, finite, table


@dataclass(frozen=True, slots=True)
class Plateau:
    """A `scheduler_mode` that lowers the learning rate where a metric no longer improves.

    Words and defaults are those of `torch.optim.lr_scheduler.ReduceLROnPlateau`. Each value that is given to
    `R8Scheduler.log` under the metric's name counts as one of its epochs. Warm-up comes first, as with every schedule.

    Args:
        metric: Name of a logged number.
        mode: "min" where lower is better, "max" where higher is.
        factor: The rate is multiplied by it, in (0, 1).
        patience: So many values in a row may be no better; the next one lowers the rate.
        threshold: What counts as better, see `threshold_mode`.
        min_lr: The rate goes no lower.
        threshold_mode: "rel": better than best * (1 - threshold), in "max" (1 + threshold); "abs": by more than it.
        cooldown: Values after a reduction that do not count against it.
        eps: Reductions by less are left out.

    Raises:
        ConfigError: All that is wrong.
    """

    metric: str = "val_loss"
    mode: str = "min"
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    min_lr: float = 0.0
    _: KW_ONLY
    threshold_mode: str = "rel"
    cooldown: int = 0
    eps: float = 1e-8

    def __post_init__(self) -> None:
        problems = Problems()
        named = isinstance(self.metric, str) and self.metric != ""
        problems.must("metric", "the name of a logged number", self.metric, named)
        problems.choice("mode", self.mode, ("min", "max"))
        problems.must("factor", "below 1", self.factor, problems.positive("factor", self.factor) < 1.0)
        problems.choice("threshold_mode", self.threshold_mode, ("rel", "abs"))
        for name in ("patience", "cooldown"):
            problems.integer(name, getattr(self, name), 0)
        for name in ("threshold", "min_lr", "eps"):
            problems.real(name, getattr(self, name), 0.0)
        problems.raise_if_any()

    def __call__(self, progress: float) -> float:
        """Return 1: as a shape it is constant, and the scheduler lowers the rate as the metric says."""
        return 1.0


plateau = Plateau
"""`Plateau`, spelled as the other shapes are."""


class Reduction(Saved):
    """How far a plateau has lowered the rate: `scale` is what the peak is multiplied by.

    Args:
        rule: When it is lowered.
    """

    _saved = table(best=finite(math.nan), bad=int, cooling=int, scale=float)

    def __init__(self, rule: Plateau) -> None:
        self.rule = rule
        self.best, self.bad, self.cooling, self.scale = math.nan, 0, 0, 1.0  # NaN: there was none

    def observe(self, value: float, peak: float) -> bool:
        """Take a value of the metric; return whether the rate, `peak` times `scale`, is lower now."""
        rule = self.rule
        if self._better(value):
            self.best, self.bad = value, 0
        else:
            self.bad += 1
        if self.cooling > 0:
            self.cooling -= 1
            self.bad = 0
        if self.bad <= rule.patience:
            return False
        self.cooling, self.bad = rule.cooldown, 0
        old = peak * self.scale
        new = max(old * rule.factor, rule.min_lr)
        if old - new <= rule.eps:
            return False
        self.scale = new / peak
        return True

    def _better(self, value: float) -> bool:
        sign = 1.0 if self.rule.mode == "min" else -1.0
        best = sign * math.inf if math.isnan(self.best) else self.best
        if self.rule.threshold_mode == "rel":
            edge = best * (1.0 - sign * self.rule.threshold)
        else:
            edge = best - sign * self.rule.threshold
        return sign * value < sign * edge
