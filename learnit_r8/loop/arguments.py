"""Checks every argument of `R8Scheduler` before anything happens, and reports all mistakes at once."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.arrays import as_array
from learnit_r8.core.clock import Clock
from learnit_r8.core.config import (
    DEFAULT_DIR,
    UI_NAMES,
    Checkpoints,
    Config,
    Evaluation,
    Problems,
    argument,
    read_arguments,
)
from learnit_r8.core.urls import url_of
from learnit_r8.errors import ConfigError
from learnit_r8.loop.callbacks import LoadCallback, SaveCallback, accepts
from learnit_r8.loop.shards import shard_folder
from learnit_r8.run.metric import better
from learnit_r8.schedules import Plateau, Schedule, make_schedule
from learnit_r8.stability.policy import NAMED, Recovery
from learnit_r8.strategies.base import Strategy, make
from learnit_r8.structures.key_table import KeyTable
from learnit_r8.types import Sink

# One argument each -------------------------------------------------------------------------


def _callback(problems: Problems, name: str, function: Any, wrap: Callable[[Any], Any]) -> Any:
    if problems.function(name, function) is None:
        return None
    try:
        return wrap(function)
    except TypeError as error:
        problems.append(f"{error}, got {function!r}")
        return None


def _state_callback(function: Any) -> Any:
    if not accepts(function, 0):
        raise TypeError("state_callback must take no arguments and return the model's state")
    return function


def _recovery(problems: Problems, name: str, given: Any) -> Recovery:
    policy = Recovery.read(Recovery(**given) if isinstance(given, dict) else given)
    if policy is None:
        problems.append(f"{name} must be one of {', '.join(map(repr, NAMED))} or a Recovery(...), got {given!r}")
        return Recovery()
    return policy


def _sinks(problems: Problems, name: str, sinks: Any) -> tuple[Sink, ...]:
    if isinstance(sinks, Sequence) and not isinstance(sinks, str):
        wrong = [sink for sink in sinks if not isinstance(sink, Sink) or isinstance(sink, type)]
        if not wrong:
            return tuple(sinks)
        problems.append(f"{name} must be objects with record(event), got {wrong[0]!r}")
    else:
        problems.append(f"{name} must be a list of objects with record(event), got {sinks!r}")
    return ()


def _instance(problems: Problems, name: str, given: Any, kind: type) -> Any:
    if given is None or isinstance(given, kind):
        return given
    problems.append(f"{name} must be a learnit_r8.{kind.__name__}, got {given!r}")
    return None


def _clock(problems: Problems, name: str, clock: Any) -> Clock:
    if clock is None:
        return Clock()
    methods = ("monotonic", "wall", "sleep")
    if isinstance(clock, type) or not all(callable(getattr(clock, method, None)) for method in methods):
        problems.append(f"{name} must have monotonic(), wall() and sleep(seconds), got {clock!r}")
    return clock  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True, slots=True)
class Arguments:
    """The checked arguments: plain values in `config`, everything else beside it."""

    config: Config
    strategy: Strategy
    schedule: Schedule
    ui: str
    groups: NDArray[np.integer[Any]] | None
    keys: KeyTable | None
    rank: int
    save: SaveCallback | None = argument(_callback, SaveCallback, of="save_callback")
    load: LoadCallback | None = argument(_callback, LoadCallback, of="load_callback")
    state_callback: Callable[[], Any] | None = argument(_callback, _state_callback)
    recovery: Recovery = argument(_recovery)
    sinks: tuple[Sink, ...] = argument(_sinks)
    evaluation: Evaluation | None = argument(_instance, Evaluation)
    all_gather: Callable[[NDArray[Any]], NDArray[Any]] | None = argument(Problems.function)
    clock: Clock = argument(_clock)

    def plan(self) -> str:
        """Return a text that is equal on all ranks of a run: what decides which samples come when."""
        alone = self.keys is None or self.all_gather is None
        return self.config.order_hash() + ("" if alone or self.keys is None else self.keys.digest())


def check_arguments(**given: Any) -> Arguments:
    """Return all arguments of `R8Scheduler`, checked; one ConfigError lists what is wrong."""
    problems = Problems()
    shard = None
    if problems.flag("sharded", given["sharded"]):  # the sizes are then one rank's; the rank is checked below
        shard = (
            given["rank"] if isinstance(given["rank"], int) else 0,
            problems.integer("world_size", given["world_size"], 1),
        )
        given["world_size"] = 1
    values, others = read_arguments(Config, problems, given), read_arguments(Arguments, problems, given)
    chosen, strategy_name = _strategy(problems, given["strategy"])
    schedule, schedule_name = _schedule(problems, given["scheduler_mode"], values["warmup_proportion"])
    _sizes(problems, given, values)
    _budget(problems, given)
    _search(problems, values, others)
    saving = _checkpoints(problems, given, shard)
    evaluation = _evaluating(problems, others, saving, given)
    if values["min_lr"] > values["initial_lr"] > 0:
        problems.append(
            f"min_lr must not exceed initial_lr, got min_lr={given['min_lr']!r} and initial_lr={given['initial_lr']!r}"
        )
    mode = given["scheduler_mode"]
    if isinstance(mode, Plateau) and values["min_lr"]:
        problems.append(f"a plateau has its own floor: give plateau(min_lr={given['min_lr']!r}), not min_lr beside it")
    config = Config(
        **values,
        **saving,
        plateau=dataclasses.asdict(mode) if isinstance(mode, Plateau) else None,
        evaluation=evaluation,
        scheduler_mode=schedule_name,
        strategy=strategy_name,
        own_strategy=not isinstance(given["strategy"], str),
        shard=shard,
        recovery=dataclasses.asdict(others["recovery"]),
        log_dir=_folder(problems, "log_dir", given["log_dir"], used=True),
    )
    world = shard[1] if shard else config.world_size
    if world > 1 and others["all_gather"] is None:
        problems.append(f"all_gather is needed when world_size={world}: see learnit_r8.integrations.distributed")
    save = others["save"]
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
        ui=_ui(problems, given["ui"], given["use_curses"]),
        groups=check_groups(problems, given["groups"], config.num_samples),
        keys=_keys(problems, given["keys"], config),
        rank=problems.integer("rank", given["rank"], 0, max(world - 1, 0)),
        **others,
    )
    problems.raise_if_any()
    return arguments


# What arguments mean for each other --------------------------------------------------------


def _sizes(problems: Problems, given: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    size, batch, world = values["num_samples"], values["batch_size"], values["world_size"]
    if values["drop_last"] and batch > size:
        problems.append(
            f"drop_last=True with batch_size={batch} > num_samples={size} leaves no batch: lower batch_size"
        )
    got = f"got {given['batch_size']!r}"
    if world > batch:
        problems.append(f"batch_size is the global batch and must be >= world_size={world}, {got}")
    elif batch % world:
        near = batch - batch % world
        problems.append(
            f"batch_size is the global batch and must be a multiple of world_size={world}, {got}: give {near} or "
            f"{near + world}; an average over slices of different sizes weighs samples differently"
        )
    elif world > size:
        problems.append(
            f"num_samples must be >= world_size={world}, got {given['num_samples']!r}: each rank needs a sample"
        )


def _budget(problems: Problems, given: Mapping[str, Any]) -> None:
    budgets = {name: given[name] for name in ("num_epochs", "num_steps", "train_duration_seconds")}
    if sum(value is not None for value in budgets.values()) != 1:
        problems.append(
            "give exactly one of num_epochs and train_duration_seconds, or num_steps, got "
            + ", ".join(f"{name}={value!r}" for name, value in budgets.items())
        )


def _search(problems: Problems, values: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    if not values["auto_find_lr"]:
        return
    save = others["save"]
    # a collective save_callback would be given another temporary file on each rank
    captures = others["state_callback"] is not None or (save is not None and not save.collective)
    if others["load"] is None or not captures:
        problems.append(
            "auto_find_lr needs load_callback, and state_callback or save_callback, to undo the search: give both"
        )
    if values["lookahead"] > 1:
        problems.append(
            f"auto_find_lr needs lookahead=1, got lookahead={values['lookahead']}: each loss decides the search's next "
            "rate; find the rate in a short run of its own, and give it as initial_lr"
        )


def _evaluating(
    problems: Problems, others: Mapping[str, Any], saving: dict[str, Any], given: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return what a state holds of `evaluation`; where it goes back to the best, the best is kept."""
    rule: Evaluation | None = others["evaluation"]
    if rule is None:
        return None
    mode = rule.mode
    if mode == "auto":
        mode = _better(problems, rule.metric, f"Evaluation(metric={rule.metric!r})", 'mode="max"')
    if rule.ema is not None and rule.run is not None and not accepts(rule.run, 1):
        problems.append("Evaluation(run=...) must take the averaged model, as ema is given: run(ema)")
    elif rule.ema is None and rule.run is not None and not accepts(rule.run, 0):
        problems.append("Evaluation(run=...) must take no arguments where no ema is given")
    if rule.ema is not None and given["auto_find_lr"] and others["state_callback"] is None:
        problems.append("auto_find_lr needs state_callback to undo what the search does to the ema of Evaluation")
    if rule.goes_back:
        lacks = [name for name in ("save_callback", "load_callback", "checkpoint_dir") if given.get(name) is None]
        if saving["checkpoint_dir"] is not None and "checkpoint_dir" in lacks:
            lacks.remove("checkpoint_dir")
        if lacks:
            problems.append(f"Evaluation goes back to the checkpoint of the best value: give {', '.join(lacks)}")
        kept = saving["keep_best"] = saving["keep_best"] or (rule.metric, mode)
        if tuple(kept) != (rule.metric, mode):
            problems.append(f"Evaluation goes back to the best {rule.metric} ({mode}), but keep_best is {kept!r}")
    return {**rule.to_json(), "mode": mode}


def _better(problems: Problems, metric: str, given: str, wanted: str) -> str:
    """Return the mode that a metric's name tells."""
    mode = {-1: "min", 1: "max"}.get(better(metric), "")
    if not mode:
        problems.append(f'{given}: say which way is better: {wanted} or "min"')
    return mode


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


_FLAT = {"checkpoint_dir": DEFAULT_DIR, "checkpoint_every": None, "keep_checkpoints": 3}
"""The flat names of what is in `Checkpoints`, with their defaults."""


def _checkpoints(problems: Problems, given: Mapping[str, Any], shard: tuple[int, int] | None) -> dict[str, Any]:
    value = _instance(problems, "checkpoints", given["checkpoints"], Checkpoints)
    flat = [name for name, default in _FLAT.items() if given[name] != default]
    if value is None:
        every = problems.cadence("checkpoint_every", given["checkpoint_every"], given["checkpoint_dir"])
        keep = problems.integer("keep_checkpoints", given["keep_checkpoints"], 1)
        directory, value = given["checkpoint_dir"], Checkpoints()
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
        best = best[0], _better(problems, best[0], f"keep_best={best[0]!r}", f'keep_best=({best[0]!r}, "max")')
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
        return make_schedule(mode, warmup), mode if isinstance(mode, str) else "plateau" if isinstance(
            mode, Plateau
        ) else "custom"
    except ConfigError as error:
        problems.extend(error.problems)
        return make_schedule("constant", 0.0), "constant"


def _ui(problems: Problems, ui: Any, use_curses: Any) -> str:
    wanted = problems.flag("use_curses", use_curses)
    if ui is None:
        return "auto" if wanted else "off"
    return problems.choice("ui", ui, UI_NAMES)


def _keys(problems: Problems, keys: Any, config: Config) -> KeyTable | None:
    if keys is None:
        return None
    try:
        made = copy.copy(keys) if isinstance(keys, KeyTable) else KeyTable(keys)  # a run may add some
    except (ConfigError, TypeError) as error:
        problems.append(f"keys: {'; '.join(getattr(error, 'problems', (str(error),)))}")
        return None
    if len(made) != config.num_samples:
        problems.append(f"keys must hold one key per sample, got {len(made)} for num_samples={config.num_samples}")
    if config.shard is not None:
        problems.append(
            "keys: with sharded=True each rank's samples are the numbers 0 to num_samples - 1, leave keys out"
        )
    return made


def check_groups(problems: Problems, groups: Any, num_samples: int) -> NDArray[np.integer[Any]] | None:
    """Return the classes of so many samples, or None."""
    if groups is None:
        return None
    try:
        array = as_array(groups)
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
