"""The scheduler's arguments as one frozen value, checked all at once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from learnit_r8.errors import ConfigError

UI_NAMES = ("auto", "curses", "rich", "log", "off")
NOISE_GUARDS = ("off", "report", "cap")
ROLLBACK_DATA = ("skip", "replay")

# Numbers of samples are stored as uint32 in plans and reports.
MAX_SAMPLES = 2**32 - 1


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """What a run is. Field names and meanings are those of `R8Scheduler`'s arguments, but for `own_strategy`."""

    num_samples: int
    batch_size: int
    num_epochs: int | None
    train_duration_seconds: float | None
    initial_lr: float
    scheduler_mode: str
    """The schedule's name, or "custom" for a function of the user's."""
    warmup_proportion: float
    min_lr: float
    auto_find_lr: bool
    strategy: str
    """The strategy's name, or the class of a strategy object."""
    backup_every: int | None
    checkpoint_dir: str | None
    checkpoint_every: str | int | None
    keep_checkpoints: int
    log_dir: str | None
    noise_guard: str
    seed: int
    drop_last: bool
    lookahead: int
    world_size: int
    rollback_data: str = "skip"
    own_strategy: bool = False
    """The strategy was given as an object: its name does not make it again."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches in a full epoch."""
        return self.batches(self.num_samples)

    def batches(self, samples: int) -> int:
        """Batches that so many samples make."""
        full, rest = divmod(samples, self.batch_size)
        return full + (rest >= self.world_size and rest > 0 and not self.drop_last)

    def next_size(self, samples: int) -> int:
        """Size of the next batch where so many samples are left.

        The last batch, too, gives every rank equally many; what is over is left out. Padding would count samples
        twice, and slices of different sizes would weigh them differently.
        """
        return min(self.batch_size, samples - samples % self.world_size)

    @property
    def left_out(self) -> int:
        """Samples of each full epoch that no rank gets, see `next_size`."""
        return 0 if self.drop_last else self.num_samples % self.batch_size % self.world_size

    @property
    def total_steps(self) -> int | None:
        """Batches in the whole budget; None when the budget is time."""
        return None if self.num_epochs is None else self.num_epochs * self.steps_per_epoch

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as JSON data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Config:
        """Return the configuration that `to_json` wrote."""
        return cls(**{field.name: data[field.name] for field in dataclasses.fields(cls) if field.name in data})

    def order_hash(self) -> str:
        """Return a hash of what decides the order of samples; equal on all ranks of a run."""
        names = ("num_samples", "batch_size", "seed", "drop_last", "strategy")
        decisive = {name: getattr(self, name) for name in names}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


class Problems(list[str]):
    """Collects one sentence per bad argument; `raise_if_any` turns them into one ConfigError."""

    def integer(self, name: str, value: Any, low: int, high: int | None = None) -> int:
        """Check a whole number; numpy integers count, bools do not."""
        good = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if good and value >= low and (high is None or value <= high):
            return int(value)
        bounds = f">= {low}" if high is None else f"from {low} to {high}"
        self.append(f"{name} must be a whole number {bounds}, got {value!r}")
        return low

    def real(self, name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False) -> float:
        """Check a finite number within bounds; `open_low` excludes the lower one."""
        number = _as_float(value)
        if number is not None and math.isfinite(number) and low <= number <= high and not (open_low and number == low):
            return number
        bounds = f"> {low:g}" if open_low else f">= {low:g}"
        if high != math.inf:
            bounds += f" and <= {high:g}"
        self.append(f"{name} must be a finite number {bounds}, got {value!r}")
        return low

    def flag(self, name: str, value: Any) -> bool:
        """Check a bool (numpy's too)."""
        if type(value).__name__ in {"bool", "bool_"}:
            return bool(value)
        self.append(f"{name} must be True or False, got {value!r}")
        return False

    def choice(self, name: str, value: Any, allowed: Sequence[str]) -> str:
        """Check one of several names."""
        if isinstance(value, str) and value in allowed:
            return value
        self.append(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        return allowed[0]

    def function(self, name: str, value: Any) -> Callable[..., Any] | None:
        """Check a callable or None."""
        if value is None or callable(value):
            return value  # type: ignore[no-any-return]
        self.append(f"{name} must be a function or None, got {value!r}")
        return None

    def path(self, name: str, value: Any) -> Path | None:
        """Check a path or None."""
        if value is None:
            return None
        if isinstance(value, (str, Path)) and str(value).strip():
            return Path(value)
        self.append(f"{name} must be a path or None, got {value!r}")
        return None

    @classmethod
    def of_settings(cls, settings: Any) -> Self:
        """Check a dataclass whose fields must all be positive numbers."""
        values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
        return cls(f"{name} must be positive, got {value!r}" for name, value in values.items() if not value > 0)

    def raise_if_any(self) -> None:
        """Raise one ConfigError that lists every problem, if there is one."""
        if self:
            raise ConfigError(list(self))


def _as_float(value: Any) -> float | None:
    if isinstance(value, (bool, str, bytes)) or type(value).__name__ == "bool_":
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
