"""The detector's thresholds."""

from __future__ import annotations

from dataclasses import dataclass

from learnit_r8.core.config import Problems


@dataclass(frozen=True, slots=True)
class DetectorSettings:
    """Thresholds. The defaults come from clean curves; see `python -m benchmarks.stability`.

    Attributes:
        window: Accepted losses that are compared with.
        warmup: Losses before the detector is active; until then only far flags count.
        hard_score: z of a hard flag.
        hard_rise: a of a hard flag.
        soft_score: z of a soft flag.
        soft_rise: a of a soft flag.
        chance: Bound on the probability, per step, that independent outliers pass for a spike.
        outlier_memory: Steps for which a harmless outlier is remembered.
        outlier_count: A loss is flagged only where it rises further than the so-manieth highest of them.
        fall: So many losses in a row below the median are a steep fall: the window keeps only them.
        regime_factor: Factor on all thresholds after an announced change.
        regime_steps: For so many steps.
    """

    window: int = 64
    warmup: int = 16
    hard_score: float = 16.0
    hard_rise: float = 1.0
    soft_score: float = 6.0
    soft_rise: float = 0.5
    chance: float = 2.5e-6
    outlier_memory: int = 1024
    outlier_count: int = 2
    fall: int = 16
    regime_factor: float = 3.0
    regime_steps: int = 128

    def __post_init__(self) -> None:
        problems = Problems.of_settings(self)
        if self.window < self.warmup or self.warmup < 4:
            problems.append(f"4 <= warmup <= window must hold, got {self.warmup=}, {self.window=}")
        problems.raise_if_any()
