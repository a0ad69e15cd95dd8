"""Learning rates: curves over the budget, and the range test that finds a peak."""

from __future__ import annotations

from learnit_r8.schedules.curves import (
    Schedule,
    Shape,
    constant,
    half_cosine,
    inverse_sqrt,
    learning_rate,
    make_schedule,
    one_cycle,
    polynomial,
    restarts,
    schedule_names,
    stable_then_decay,
    with_warmup,
)
from learnit_r8.schedules.reduction import Plateau, Reduction, plateau

__all__ = [
    "Plateau",
    "Reduction",
    "Schedule",
    "Shape",
    "constant",
    "half_cosine",
    "inverse_sqrt",
    "learning_rate",
    "make_schedule",
    "one_cycle",
    "plateau",
    "polynomial",
    "restarts",
    "schedule_names",
    "stable_then_decay",
    "with_warmup",
]
