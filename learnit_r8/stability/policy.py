"""What faults cause: the user's choice."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from learnit_r8.core.config import Problems

CHOICES = ("rollback", "report", "off")


@dataclass(frozen=True, slots=True)
class Recovery:
    """What a non-finite loss, a spike and a drift each cause: `R8Scheduler(recovery=Recovery(...))`.

    * `"rollback"`: the fault is told, and the model restored where that is beyond doubt the answer.
    * `"report"`: it is told.
    * `"off"`: nothing. A loss that is not finite still enters no statistics.

    Attributes:
        nonfinite: NaN or infinity in a loss, or in the model where no loss shows it. Where the model is finite the
            report is left out; where some samples of a batch are the cause they are left out from then on; where the
            model holds NaN or infinity it is restored. `TrainingDiverged` only where that fails again and again.
        spike: Losses that jump far above what is usual, or fall back to the untrained model's for dozens of steps. The
            model is restored where its weights moved beyond their habit, too (in the second case: by 30%); where they
            cannot be seen, for want of a `state_callback`, only in the second case.
        drift: A loss that grows slowly or has shifted for good. "rollback" goes back to the best backup.
    """

    nonfinite: str = "rollback"
    spike: str = "rollback"
    drift: str = "report"

    def __post_init__(self) -> None:
        problems = Problems()
        for field in fields(self):
            problems.choice(f"Recovery({field.name}=...)", getattr(self, field.name), CHOICES)
        problems.raise_if_any()

    @classmethod
    def read(cls, value: Any) -> Recovery | None:
        """Return the policy that "auto", "report", "off" or a policy means, None where it means none."""
        if isinstance(value, cls):
            return value
        return NAMED.get(value) if isinstance(value, str) else None


NAMED = {"auto": Recovery(), **{name: Recovery(name, name, name) for name in ("report", "off")}}
