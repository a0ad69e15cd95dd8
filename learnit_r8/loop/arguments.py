"""Checks every argument of `R8Scheduler` before anything happens, and reports all mistakes at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.clock import Clock
from learnit_r8.core.config import (
    DEFAULT_DIR,
    MAX_SAMPLES,
    NOISE_GUARDS,
    ROLLBACK_DATA,
    UI_NAMES,
    Checkpoints,
    Config,
    Problems,
)
from learnit_r8.core.urls import url_of
from learnit_r8.errors import ConfigError
from learnit_r8.loop.callbacks import LoadCallback, SaveCallback, accepts
from learnit_r8.loop.shards import shard_folder
from learnit_r8.run.metric import better
from learnit_r8.schedules import Schedule, make_schedule
from learnit_r8.stability.policy import NAMED, Recovery
from learnit_r8.strategies.base import Strategy, make
from learnit_r8.types import Sink

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Arguments:
    """The checked arguments: plain values in `config`, everything else beside it."""

    config: Config
    strategy: Strategy
    schedule: Schedule
    save: SaveCallback | None
    load: LoadCallback | None
    state_callback: Callable[[], Any] | None
    recovery: Recovery
    sinks: tuple[Sink, ...]
    ui: str
    groups: NDArray[np.integer[Any]] | None
    rank: int
    all_gather: Callable[[NDArray[Any]], NDArray[Any]] | None
    clock: Clock


def check_arguments(**given: Any) -> Arguments:
    """Return the arguments, checked.

    Args:
        **given: All arguments of `R8Scheduler`.

    Raises:
        ConfigError: Lists every problem with what came and what is allowed.
    """
    problems, args = Problems(), SimpleNamespace(**given)
    chosen, strategy_name = _strategy(problems, args.strategy)
    rates = _rates(problems, args)
    schedule, schedule_name = _schedule(problems, args.scheduler_mode, rates["warmup_proportion"])
    save = _callback(problems, "save_callback", args.save_callback, SaveCallback)
    load = _callback(problems, "load_callback", args.load_callback, LoadCallback)
    snapshot = _state_callback(problems, args.state_callback)
    shard, sizes = _shard(problems, args), _sizes(problems, args)
    policy = _recovery(problems, args.recovery)
    config = Config(
        **sizes,
        **_budget(problems, args),
        **rates,
        **_search(problems, args, undo=load is not None and (snapshot is not None or _undoes(save))),
        scheduler_mode=schedule_name,
        strategy=strategy_name,
        own_strategy=not isinstance(args.strategy, str),
        shard=shard,
        backup_every=_backup_every(problems, args.backup_every),
        recovery=dataclasses.asdict(policy),
        **_checkpoints(problems, args, shard),
        log_dir=_folder(problems, "log_dir", args.log_dir, used=True),
        noise_guard=problems.choice("noise_guard", args.noise_guard, NOISE_GUARDS),
        seed=problems.integer("seed", args.seed, 0),
        rollback_data=problems.choice("rollback_data", args.rollback_data, ROLLBACK_DATA),
    )
    gather, world = problems.function("all_gather", args.all_gather), shard[1] if shard else config.world_size
    if world > 1 and gather is None:
        problems.append(f"all_gather is needed when world_size={world}: see learnit_r8.integrations.distributed")
    if shard and save is not None and save.collective:
        problems.append(
            "a collective save_callback is for one checkpoint of all ranks, here every rank writes its own: save this "
            "rank's part of the model, torch.save(capture_state(model, optimizer), path)"
        )
    if shard and getattr(chosen, "needs_one_plan", False):
        problems.append(f"strategy {strategy_name!r} chooses on rank 0 for all, which knows its own shard only")
    arguments = Arguments(
        config=config,
        strategy=chosen,
        schedule=schedule,
        save=save,
        load=load,
        state_callback=snapshot,
        recovery=policy,
        sinks=_sinks(problems, args.sinks),
        ui=_ui(problems, args.ui, args.use_curses),
        groups=_groups(problems, args.groups, config.num_samples),
        rank=problems.integer("rank", args.rank, 0, max(world - 1, 0)),
        all_gather=gather,
        clock=_clock(problems, args.clock),
    )
    problems.raise_if_any()
    return arguments


def _rates(problems: Problems, args: SimpleNamespace) -> dict[str, Any]:
    peak = problems.real("initial_lr", args.initial_lr, 0.0, open_low=True)
    floor = problems.real("min_lr", args.min_lr, 0.0)
    if floor > peak and peak > 0:
        problems.append(
            f"min_lr must not exceed initial_lr, got min_lr={args.min_lr!r} and initial_lr={args.initial_lr!r}"
        )
    warmup = problems.real("warmup_proportion", args.warmup_proportion, 0.0, 1.0)
    return {"initial_lr": peak, "min_lr": floor, "warmup_proportion": warmup}


def _shard(problems: Problems, args: SimpleNamespace) -> tuple[int, int] | None:
    """Return (rank, world_size) where each rank has samples of its own; the sizes are then one rank's."""
    if not problems.flag("sharded", args.sharded):
        return None
    world, args.world_size = problems.integer("world_size", args.world_size, 1), 1
    return args.rank if isinstance(args.rank, int) else 0, world  # the rank is checked with the others


def _sizes(problems: Problems, args: SimpleNamespace) -> dict[str, Any]:
    size = problems.integer("num_samples", args.num_samples, 1, MAX_SAMPLES)
    batch = problems.integer("batch_size", args.batch_size, 1)
    whole = problems.flag("drop_last", args.drop_last)
    if whole and batch > size:
        problems.append(
            f"drop_last=True with batch_size={batch} > num_samples={size} leaves no batch: lower batch_size"
        )
    world = problems.integer("world_size", args.world_size, 1)
    if world > batch:
        problems.append(f"batch_size is the global batch and must be >= world_size={world}, got {args.batch_size!r}")
    elif batch % world:
        near = batch - batch % world
        problems.append(
            f"batch_size is the global batch and must be a multiple of world_size={world}, got {args.batch_size!r}: "
            f"give {near} or {near + world}; an average over slices of different sizes weighs samples differently"
        )
    elif world > size:
        problems.append(
            f"num_samples must be >= world_size={world}, got {args.num_samples!r}: each rank needs a sample"
        )
    return {"num_samples": size, "batch_size": batch, "drop_last": whole, "world_size": world}


def _undoes(save: SaveCallback | None) -> bool:
    return save is not None and not save.collective  # each rank would give it another temporary file


def _search(problems: Problems, args: SimpleNamespace, *, undo: bool) -> dict[str, Any]:
    wanted = problems.flag("auto_find_lr", args.auto_find_lr)
    if wanted and not undo:
        problems.append(
            "auto_find_lr needs load_callback, and state_callback or save_callback, to undo the search: give both"
        )
    ahead = problems.integer("lookahead", args.lookahead, 1)
    if wanted and ahead > 1:
        problems.append(
            f"auto_find_lr needs lookahead=1, got lookahead={ahead}: each loss decides the search's next rate; "
            "find the rate in a short run of its own, and give it as initial_lr"
        )
    return {"auto_find_lr": wanted, "lookahead": ahead}


def _state_callback(problems: Problems, function: Any) -> Callable[[], Any] | None:
    snapshot = problems.function("state_callback", function)
    if snapshot is not None and not accepts(snapshot, 0):
        problems.append(f"state_callback must take no arguments and return the model's state, got {snapshot!r}")
    return snapshot


def _folder(problems: Problems, name: str, value: Any, *, used: bool) -> str | None:
    path = problems.path(name, value)
    if path is not None and (url := url_of(value)) is not None:
        from learnit_r8.checkpoint.remote import check

        try:
            check(name, url)
        except ConfigError as error:
            problems.extend(error.problems)
        return url
    if path is not None and used and path.is_file():
        problems.append(f"{name} must be a folder, got {str(path)!r}, which is a file")
    return None if path is None else str(path)


def _budget(problems: Problems, args: SimpleNamespace) -> dict[str, Any]:
    given = {name: getattr(args, name) for name in ("num_epochs", "num_steps", "train_duration_seconds")}
    if sum(value is not None for value in given.values()) != 1:
        problems.append(
            "give exactly one of num_epochs and train_duration_seconds, or num_steps, got "
            + ", ".join(f"{name}={value!r}" for name, value in given.items())
        )
    epochs, steps, seconds = given.values()
    return {
        "num_epochs": None if epochs is None else problems.integer("num_epochs", epochs, 1),
        "num_steps": None if steps is None else problems.integer("num_steps", steps, 1),
        "train_duration_seconds": (
            None if seconds is None else problems.real("train_duration_seconds", seconds, 0.0, open_low=True)
        ),
    }


_FLAT = {"checkpoint_dir": DEFAULT_DIR, "checkpoint_every": None, "keep_checkpoints": 3}
"""The flat names of what is in `Checkpoints`, with their defaults."""


def _checkpoints(problems: Problems, args: SimpleNamespace, shard: tuple[int, int] | None) -> dict[str, Any]:
    value = args.checkpoints
    flat = [name for name, default in _FLAT.items() if getattr(args, name) != default]
    if value is not None and not isinstance(value, Checkpoints):
        problems.append(f"checkpoints must be a learnit_r8.Checkpoints, got {value!r}")
        value = None
    if value is None:
        every = problems.cadence("checkpoint_every", args.checkpoint_every, args.checkpoint_dir)
        keep = problems.integer("keep_checkpoints", args.keep_checkpoints, 1)
        directory, value = args.checkpoint_dir, Checkpoints()
    else:
        if flat:
            problems.append(f"give {', '.join(flat)} within checkpoints=Checkpoints(...), not beside it")
        directory, every, keep = value.dir, value.every, value.keep
    if shard and url_of(directory):
        problems.append(f"checkpoint_dir must be a folder for the ranks' shards, got the URL {str(directory)!r}")
        directory = None
    if shard and isinstance(directory, (str, Path)) and str(directory).strip():
        directory = shard_folder(Path(directory), *shard)
    best = problems.metric("keep_best", value.keep_best)
    if best is not None and best[1] == "":
        best = best[0], {-1: "min", 1: "max"}.get(better(best[0]), "")
        if best[1] == "":
            problems.append(f'keep_best={best[0]!r}: say which way is better: keep_best=({best[0]!r}, "max") or "min"')
    return {
        "checkpoint_dir": _folder(problems, "checkpoint_dir", directory, used=every is not None or best is not None),
        "checkpoint_every": every,
        "keep_checkpoints": keep,
        "keep_best": best,
        "keep_every": value.keep_every,
        "signals": tuple(value.signals),
    }


def _strategy(problems: Problems, strategy: Any) -> tuple[Strategy, str]:
    try:
        chosen = make(strategy)
    except ConfigError as error:
        problems.extend(error.problems)
        return make("uniform"), "uniform"
    return chosen, strategy if isinstance(strategy, str) else getattr(chosen, "name", type(chosen).__name__)


def _schedule(problems: Problems, mode: Any, warmup: float) -> tuple[Schedule, str]:
    try:
        return make_schedule(mode, warmup), mode if isinstance(mode, str) else "custom"
    except ConfigError as error:
        problems.extend(error.problems)
        return make_schedule("constant", 0.0), "constant"


def _callback(problems: Problems, name: str, function: Any, wrap: Callable[[Any], T]) -> T | None:
    if problems.function(name, function) is None or not callable(function):
        return None
    try:
        return wrap(function)
    except TypeError as error:
        problems.append(f"{error}, got {function!r}")
        return None


def _backup_every(problems: Problems, every: Any) -> int | str | None:
    if every is None or every == "auto":
        return every  # type: ignore[no-any-return]
    if isinstance(every, str):
        problems.append(f'backup_every must be "auto", a number of steps >= 1 or None, got {every!r}')
        return None
    return problems.integer("backup_every", every, 1)


def _recovery(problems: Problems, given: Any) -> Recovery:
    policy = Recovery.read(Recovery(**given) if isinstance(given, dict) else given)
    if policy is None:
        problems.append(f"recovery must be one of {', '.join(map(repr, NAMED))} or a Recovery(...), got {given!r}")
        return Recovery()
    return policy


def _ui(problems: Problems, ui: Any, use_curses: Any) -> str:
    wanted = problems.flag("use_curses", use_curses)
    if ui is None:
        return "auto" if wanted else "off"
    return problems.choice("ui", ui, UI_NAMES)


def _sinks(problems: Problems, sinks: Any) -> tuple[Sink, ...]:
    if isinstance(sinks, Sequence) and not isinstance(sinks, str):
        wrong = [sink for sink in sinks if not isinstance(sink, Sink) or isinstance(sink, type)]
        if not wrong:
            return tuple(sinks)
        problems.append(f"sinks must be objects with record(event), got {wrong[0]!r}")
    else:
        problems.append(f"sinks must be a list of objects with record(event), got {sinks!r}")
    return ()


def _clock(problems: Problems, clock: Any) -> Clock:
    if clock is None:
        return Clock()
    if isinstance(clock, type) or not all(callable(getattr(clock, name, None)) for name in _CLOCK_METHODS):
        problems.append(f"clock must have monotonic(), wall() and sleep(seconds), got {clock!r}")
    return clock  # type: ignore[no-any-return]


_CLOCK_METHODS = ("monotonic", "wall", "sleep")


def _groups(problems: Problems, groups: Any, num_samples: int) -> NDArray[np.integer[Any]] | None:
    if groups is None:
        return None
    try:
        array = np.asarray(groups.detach().cpu() if hasattr(groups, "detach") else groups)
    except (ValueError, TypeError, RuntimeError):  # ragged, or a tensor without data
        array = np.empty((0, 0))
    if array.ndim != 1 or array.dtype.kind not in "iub" or len(array) != num_samples:
        problems.append(
            f"groups must hold one whole number (the class) per sample, shape ({num_samples},), got "
            f"{type(groups).__name__} of shape {array.shape} and dtype {array.dtype}; "
            "numpy.unique(labels, return_inverse=True)[1] turns names into numbers"
        )
        return None
    narrow = np.iinfo(np.int32)  # a checkpoint holds them
    return array.astype(np.int32 if narrow.min <= array.min() and array.max() <= narrow.max else np.int64)
