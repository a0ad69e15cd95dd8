"""The scheduler's arguments as frozen values, checked all at once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import numbers
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from learnit_r8.errors import ConfigError

UI_NAMES = ("auto", "curses", "rich", "log", "off")
NOISE_GUARDS = ("off", "report", "cap")
ROLLBACK_DATA = ("skip", "replay")

SIGNALS = tuple(name for name in ("INT", "TERM", "USR1", "USR2", "HUP", "BREAK") if hasattr(signal, f"SIG{name}"))
"""What asks a run to save and stop, as far as the platform has it: people, schedulers of machines, lost terminals."""

# Numbers of samples are stored as uint32 in plans and reports.
MAX_SAMPLES = 2**32 - 1


class Problems(list[str]):
    """Collects one sentence per bad argument; `raise_if_any` turns them into one ConfigError."""

    def must(self, name: str, wanted: str, value: Any, holds: bool) -> bool:
        """Note what an argument must be, unless it holds; return whether it does."""
        if not holds:
            self.append(f"{name} must be {wanted}, got {value!r}")
        return holds

    def integer(self, name: str, value: Any, low: int, high: int | None = None) -> int:
        """Check a whole number; numpy integers count, bools do not."""
        good = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        good = good and value >= low and (high is None or value <= high)
        bounds = f">= {low}" if high is None else f"from {low} to {high}"
        return int(value) if self.must(name, f"a whole number {bounds}", value, good) else low

    def positive(self, name: str, value: Any) -> float:
        """Check a finite number above 0."""
        return self.real(name, value, 0.0, open_low=True)

    def real(self, name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False) -> float:
        """Check a finite number within bounds; `open_low` excludes the lower one."""
        number = _as_float(value)
        good = math.isfinite(number) and low <= number <= high and not (open_low and number == low)
        bounds = (f"> {low:g}" if open_low else f">= {low:g}") + (f" and <= {high:g}" if high != math.inf else "")
        return number if self.must(name, f"a finite number {bounds}", value, good) else low

    def flag(self, name: str, value: Any) -> bool:
        """Check a bool (numpy's too)."""
        return self.must(name, "True or False", value, type(value).__name__ in {"bool", "bool_"}) and bool(value)

    def choice(self, name: str, value: Any, allowed: Sequence[str]) -> str:
        """Check one of several names."""
        good = isinstance(value, str) and value in allowed
        wanted = f"one of {', '.join(map(repr, allowed))}"
        return value if self.must(name, wanted, value, good) else allowed[0]

    def function(self, name: str, value: Any) -> Callable[..., Any] | None:
        """Check a callable or None."""
        return value if self.must(name, "a function or None", value, value is None or callable(value)) else None

    def path(self, name: str, value: Any) -> Path | None:
        """Check a path or None."""
        good = value is None or (isinstance(value, (str, Path)) and str(value).strip() != "")
        return Path(value) if self.must(name, "a path or None", value, good) and value is not None else None

    def steps_or(self, name: str, value: Any, word: str) -> int | str | None:
        """Check how often something is done: a number of steps, a word, or None for never."""
        if value is None or isinstance(value, str):
            wanted = f'"{word}", a number of steps >= 1 or None'
            return value if self.must(name, wanted, value, value in {None, word}) else None
        return self.integer(name, value, 1)

    def cadence(self, name: str, value: Any, directory: Any) -> str | int | None:
        """Check how often checkpoints are written."""
        if value is not None and directory is None:
            self.append(f"{name}={value!r} needs a checkpoint_dir, got None")
        return self.steps_or(name, value, "epoch")

    def metric(self, name: str, value: Any) -> tuple[str, str] | None:
        """Check a metric's name, or its name and "min" or "max"; "" where only the name was given."""
        if value is None:
            return None
        pair = (value, "") if isinstance(value, str) else value
        good = isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
        if not self.must(name, 'the name of a logged metric, or (name, "min" or "max")', value, good):
            return None
        if not isinstance(value, str) and pair[1] not in ("min", "max"):
            self.append(f'{name} must end in "min" or "max", got {value!r}')
        return pair[0], pair[1]

    def clip(self, name: str, value: Any) -> float | str:
        """Check what gradients are clipped at: a number above 0 or "auto"."""
        if not isinstance(value, str):
            return self.positive(name, value)
        self.must(name, 'a number > 0, "auto" or None', value, value == "auto")
        return value

    def raise_if_any(self) -> None:
        """Raise one ConfigError that lists every problem, if there is one."""
        if self:
            raise ConfigError(list(self))


def argument(check: Callable[..., Any], *bounds: Any, optional: bool = False, of: str = "", **default: Any) -> Any:
    """Declare a field that is an argument of `R8Scheduler`.

    Args:
        check: `(problems, name, value, *bounds) -> value`, such as `Problems.integer`.
        *bounds: What the value is checked against.
        optional: None is a value, too.
        of: The argument's name, where it is not the field's.
        **default: `default=` of the field, for states that were written before it was there.
    """

    def read(problems: Problems, name: str, value: Any) -> Any:
        return None if optional and value is None else check(problems, name, value, *bounds)

    return dataclasses.field(metadata={"read": read, "of": of}, **default)


def read_arguments(kind: type, problems: Problems, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that a class declares by `argument`, checked one by one."""
    values = {}
    for field in dataclasses.fields(kind):
        if read := field.metadata.get("read"):
            name = field.metadata["of"] or field.name
            values[field.name] = read(problems, name, given[name])
    return values


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """What a run is, as plain values; what checkpoints hold of its arguments.

    A new argument of this kind is a field here, with its check, and a parameter of `R8Scheduler`.
    """

    num_samples: int = argument(Problems.integer, 1, MAX_SAMPLES)
    batch_size: int = argument(Problems.integer, 1)
    num_epochs: int | None = argument(Problems.integer, 1, optional=True)
    train_duration_seconds: float | None = argument(Problems.positive, optional=True)
    initial_lr: float = argument(Problems.positive)
    warmup_proportion: float = argument(Problems.real, 0.0, 1.0)
    min_lr: float = argument(Problems.real, 0.0)
    auto_find_lr: bool = argument(Problems.flag)
    backup_every: int | str | None = argument(Problems.steps_or, "auto")
    noise_guard: str = argument(Problems.choice, NOISE_GUARDS)
    seed: int = argument(Problems.integer, 0)
    drop_last: bool = argument(Problems.flag)
    lookahead: int = argument(Problems.integer, 1)
    world_size: int = argument(Problems.integer, 1)
    rollback_data: str = argument(Problems.choice, ROLLBACK_DATA, default="skip")
    num_steps: int | None = argument(Problems.integer, 1, optional=True, default=None)
    clip: float | str | None = argument(Problems.clip, optional=True, default=None)
    _: dataclasses.KW_ONLY
    scheduler_mode: str
    """The schedule's name, or "custom" for a function of the user's."""
    strategy: str
    """The strategy's name, or the class of a strategy object."""
    own_strategy: bool = False
    """The strategy was given as an object: its name does not make it again."""
    log_dir: str | None
    checkpoint_dir: str | None
    checkpoint_every: str | int | None
    keep_checkpoints: int
    keep_best: tuple[str, str] | None = None
    """Name of a logged metric, and "min" or "max"."""
    keep_every: int | None = None
    signals: tuple[str, ...] = SIGNALS
    recovery: Mapping[str, str] | None = None
    """What non-finite losses, spikes and drifts each cause; None in the states of older versions."""
    plateau: Mapping[str, Any] | None = None
    """What `learnit_r8.schedules.plateau` was given, where that is the schedule."""
    evaluation: Mapping[str, Any] | None = None
    """What `Evaluation` was given, but for the functions and objects in it."""
    shard: tuple[int, int] | None = None
    """Number of this rank's shard and of all, where each rank has samples of its own (`world_size` is 1 then)."""

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
        if self.num_steps is not None:
            return self.num_steps
        return None if self.num_epochs is None else self.num_epochs * self.steps_per_epoch

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as JSON data."""
        data = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in data.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Config:
        """Return the configuration that `to_json` wrote."""
        return cls(**{field.name: data[field.name] for field in dataclasses.fields(cls) if field.name in data})

    def order_hash(self) -> str:
        """Return a hash of what decides the order of samples; equal on all ranks of a run."""
        names = ("num_samples", "batch_size", "seed", "drop_last", "strategy")
        decisive = {name: getattr(self, name) for name in names}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


class _DefaultDir(str):
    """The directory that nobody chose: a resumed run saves where its checkpoint lies instead."""

    __slots__ = ()


DEFAULT_DIR = _DefaultDir("./checkpoints")


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoints:
    """Where a run's checkpoints go, when they are written, and which of them stay.

    Args:
        dir: A folder, made at the first checkpoint; None for no checkpoints.
        every: "epoch", a number of steps, or None for by hand (and by signals) only. The last state of a run is
            saved wherever this is set.
        keep: How many of the newest stay, at least 2. A run removes none but its own.
        keep_best: Name of a metric that is given to `R8Scheduler.log`: the checkpoint with its best value stays, and
            a new best value is a reason to save one. Where the name does not tell which way is better:
            `("score", "max")`.
        keep_every: Steps: the first checkpoint at or after each multiple stays.
        signals: What asks the run to save and stop, names without "SIG"; () for none.

    Raises:
        ConfigError: All that is wrong.
    """

    dir: str | Path | None = DEFAULT_DIR
    every: str | int | None = None
    keep: int = 3
    keep_best: str | tuple[str, str] | None = None
    keep_every: int | None = None
    signals: Sequence[str] = SIGNALS

    def __post_init__(self) -> None:
        problems = Problems()
        problems.path("dir", self.dir)
        problems.cadence("every", self.every, self.dir)
        problems.integer("keep", self.keep, 1)
        if self.keep_every is not None:
            problems.integer("keep_every", self.keep_every, 1)
        problems.metric("keep_best", self.keep_best)
        if self.dir is None and (self.keep_best is not None or self.keep_every is not None):
            problems.append("keep_best and keep_every need a dir, got None")
        names = () if isinstance(self.signals, str) else tuple(self.signals)
        unknown = [name for name in names if name not in SIGNALS]
        good = not isinstance(self.signals, str) and not unknown
        problems.must("signals", f"some of {', '.join(SIGNALS)}", self.signals, good)
        object.__setattr__(self, "signals", names)
        problems.raise_if_any()


@dataclasses.dataclass(frozen=True, slots=True)
class Evaluation:
    """What is measured beside the training loss, and what follows from it.

    Words and defaults are those of Lightning's and Keras's `EarlyStopping`. Of several ranks, rank 0's numbers count.

    Args:
        run: Called between two steps: returns the metric, or a dict of numbers that go to `R8Scheduler.log`; or None,
            having logged them. All ranks call it. None: you log by hand.
        every: "epoch", or a number of steps; what it leaves over is evaluated at the run's end.
        stop_after: Patience: the run ends when so many evaluations in a row were no better than the best before. None:
            it does not.
        metric: The logged number that all this is about.
        mode: "min" where lower is better, "max" where higher is, "auto": the name tells.
        min_delta: What is better is better by more than this.
        ema: An averaged model with `state_dict` and `load_state_dict`, such as `torch.optim.swa_utils.AveragedModel`.
            `run` is called with it, and backups, checkpoints and rollbacks take it along; it is updated by you.
        restore_best: The model is brought back to the checkpoint of the best value when the run ends.
        start_from_epoch: Values of earlier epochs stop nothing and are no best.
        check_finite: Stop at a value that is not finite, where `stop_after` is given.
        stopping_threshold: Stop as soon as the metric is better than this.
        divergence_threshold: Stop as soon as it is worse than this.
        on_divergence: "stop", or "restore": go on from the checkpoint of the best value instead. Three such returns
            without a new best between them end the run.

    Raises:
        ConfigError: All that is wrong.
    """

    run: Callable[..., Any] | None = None
    every: str | int = "epoch"
    stop_after: int | None = None
    metric: str = "val_loss"
    mode: str = "auto"
    min_delta: float = 0.0
    ema: Any = None
    restore_best: bool = False
    start_from_epoch: int = 0
    check_finite: bool = True
    stopping_threshold: float | None = None
    divergence_threshold: float | None = None
    on_divergence: str = "stop"

    def __post_init__(self) -> None:
        problems = Problems()
        problems.function("run", self.run)
        problems.steps_or("every", self.every, "epoch")
        problems.must(
            "metric", "the name of a logged number", self.metric, isinstance(self.metric, str) and self.metric != ""
        )
        problems.choice("mode", self.mode, ("auto", "min", "max"))
        problems.choice("on_divergence", self.on_divergence, ("stop", "restore"))
        problems.real("min_delta", self.min_delta, 0.0)
        problems.integer("start_from_epoch", self.start_from_epoch, 0)
        if self.stop_after is not None:
            problems.integer("stop_after", self.stop_after, 0)
        for name in ("stopping_threshold", "divergence_threshold"):
            if getattr(self, name) is not None:
                problems.real(name, getattr(self, name), -math.inf)
        for name in ("restore_best", "check_finite"):
            problems.flag(name, getattr(self, name))
        if self.ema is not None and not all(hasattr(self.ema, name) for name in ("state_dict", "load_state_dict")):
            problems.append(f"ema must have state_dict() and load_state_dict(state), got {self.ema!r}")
        problems.raise_if_any()

    @property
    def goes_back(self) -> bool:
        """Whether the model may be brought back to the best value's checkpoint."""
        return self.restore_best or self.on_divergence == "restore"

    def to_json(self) -> dict[str, Any]:
        """Return what can be saved of it."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("run", "ema")
        } | {"again": self.run is not None or self.ema is not None}


def _as_float(value: Any) -> float:
    """Return a number as a float, NaN for what is none."""
    if isinstance(value, (bool, str, bytes)) or type(value).__name__ == "bool_":
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
