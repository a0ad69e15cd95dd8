"""How far a run has come: everything that steps and epochs count, saved and restored as one."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.config import DEFAULT_DIR, SIGNALS, Checkpoints, Config, Evaluation, Problems
from learnit_r8.core.portable import unpacked
from learnit_r8.core.urls import url_of
from learnit_r8.errors import ConfigError
from learnit_r8.samples.catalog import with_more
from learnit_r8.schedules import Plateau
from learnit_r8.strategies.contract import Rules
from learnit_r8.structures.key_table import KeyTable

NEVER = 1 << 62
"""A step that no run reaches."""


class Stage(StrEnum):
    """Where the current epoch stands."""

    FRESH = "fresh"
    RUNNING = "running"
    DONE = "done"


@dataclass(slots=True)
class Progress:
    """The loop's counters; a state has each as what its default is."""

    epoch: int = 0  # the current one
    stage: Stage = Stage.FRESH  # where it stands
    reported: int = 0  # batches of it whose loss came back
    accepted: int = 0  # those whose loss entered the catalog
    loss_sum: float = 0.0  # of these losses
    global_step: int = 0  # batches of the run whose loss came back
    optimal_lr: float | None = None  # what the LR search found

    @property
    def mean_loss(self) -> float:
        """Mean of the epoch's accepted losses; NaN while there are none."""
        return self.loss_sum / self.accepted if self.accepted else math.nan

    @property
    def finished_epoch(self) -> int | None:
        """The current epoch if it is done, else None."""
        return self.epoch if self.stage is Stage.DONE else None

    def start_epoch(self) -> None:
        """Count the current epoch's batches from nothing."""
        self.stage = Stage.RUNNING
        self.reported = self.accepted = 0
        self.loss_sum = 0.0

    def next_epoch(self) -> None:
        """Turn to the epoch after this one."""
        self.epoch += 1
        self.stage = Stage.FRESH

    def take_back(self, batches: int, loss_sum: float) -> None:
        """Uncount accepted batches of this epoch that will be trained on again."""
        self.reported -= batches
        self.accepted -= batches
        self.loss_sum -= loss_sum

    def state_dict(self) -> dict[str, Any]:
        """Return the counters as JSON scalars."""
        return {**asdict(self), "stage": self.stage.value}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """Return what `state_dict` returned as an object again."""
        given: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(cls)}
        read = {name: state[name] if default is None else type(default)(state[name]) for name, default in given.items()}
        return cls(**read)


_PARTS = (
    "config", "groups", *Progress.__slots__, "searched", "budget", "tickets", "chooser", "catalog", "guard", "safety",
)  # fmt: skip


def resumed_arguments(state: Mapping[str, Any], new_goals: Mapping[str, Any], directory: str) -> dict[str, Any]:
    """Return the arguments of a run that goes on from a saved state, but for those in `new_goals`.

    It goes on saving in the `directory` where the checkpoint lies, also where that is a copy.
    """
    try:
        config = Config.from_json(state["config"])
    except (LookupError, TypeError) as error:
        raise ConfigError([f"this is no state of a scheduler: {type(error).__name__}: {error}"]) from error
    own = {"strategy": config.own_strategy, "scheduler_mode": config.scheduler_mode == "custom"}
    problems = Problems(
        f"{name}: the run had one of your own ({getattr(config, name)}), which no checkpoint holds: give it again"
        for name in own
        if own[name] and name not in new_goals
    )
    if config.evaluation and config.evaluation["again"] and "evaluation" not in new_goals:
        problems.append("evaluation: the run had one with run or ema, which no checkpoint holds: give it again")
    problems.raise_if_any()
    arguments = config.to_json()
    del arguments["own_strategy"]
    if (plateau := arguments.pop("plateau")) is not None:
        arguments["scheduler_mode"] = Plateau(**plateau)
    if (rule := arguments["evaluation"]) is not None:
        arguments["evaluation"] = Evaluation(**{name: value for name, value in rule.items() if name != "again"})
    if arguments.pop("shard") is not None:
        del arguments["world_size"]  # of the ranks that share a batch
        arguments["sharded"] = True
    arguments |= _checkpoints(arguments, directory, new_goals)
    if arguments["recovery"] is None:  # the state of an older version
        del arguments["recovery"]
    if new_goals.get("num_samples", config.num_samples) >= config.num_samples:  # more have to be given with them
        arguments["groups"] = state.get("groups")
    if "keys" not in new_goals and state.get("keys") is not None:
        arguments["keys"] = KeyTable.from_state(state["keys"])
    budgets = {"num_epochs": None, "num_steps": None, "train_duration_seconds": None}
    if any(new_goals.get(name) is not None for name in budgets):
        arguments |= budgets
    return arguments | {name: value for name, value in new_goals.items() if name not in _IN_CHECKPOINTS}


_IN_CHECKPOINTS = {"checkpoint_dir": "dir", "checkpoint_every": "every", "keep_checkpoints": "keep"}


def _checkpoints(arguments: dict[str, Any], directory: str, new_goals: Mapping[str, Any]) -> dict[str, Any]:
    """Return `checkpoints` and `log_dir` of a run that goes on in a directory; take their parts out of `arguments`."""
    saved, logs = arguments["checkpoint_dir"], arguments["log_dir"]
    own = {name: arguments.pop(flat) for flat, name in _IN_CHECKPOINTS.items()}
    own |= {name: arguments.pop(name) for name in ("keep_best", "keep_every", "signals")}
    own["signals"] = tuple(name for name in own["signals"] if name in SIGNALS)  # of another system perhaps
    given = new_goals.get("checkpoints")
    flat = {name: new_goals[old] for old, name in _IN_CHECKPOINTS.items() if old in new_goals}
    if given is None:
        value = Checkpoints(**{**own, "dir": directory, **flat})
    elif isinstance(given, Checkpoints) and not flat:
        value = dataclasses.replace(given, dir=directory) if given.dir is DEFAULT_DIR else given
    elif flat:
        raise ConfigError([f"give {', '.join(flat)} within checkpoints=Checkpoints(...), not beside it"])
    else:
        return {"checkpoints": given}
    far = any(path is not None and url_of(path) for path in (logs, saved, directory))
    if logs is not None and saved is not None and not far and os.path.realpath(saved) != os.path.realpath(directory):
        # A folder that holds both was copied or moved: the log of the copy goes on, not the original's.
        beside = os.path.relpath(os.path.abspath(logs), os.path.abspath(saved))
        if beside.count("..") <= 1:
            logs = os.path.normpath(os.path.join(directory, beside))
    return {"checkpoints": value, "log_dir": logs}


_FIXED = ("num_samples", "strategy", "seed", "drop_last")  # what a run cannot change, but for more samples


def check_state(state: Mapping[str, Any], config: Config, rules: Rules) -> None:
    """Raise unless a scheduler's state is complete and belongs to this run, whose strategy is one of these rules."""
    if not isinstance(state, Mapping):
        raise ConfigError([f"a state is the dict that state_dict() returned, got {type(state).__name__}"])
    missing = [name for name in _PARTS if name not in state]
    if missing:
        raise ConfigError([f"this is no state of a scheduler: {', '.join(missing)} missing, got {list(state)}"])
    saved = state["config"]
    if not isinstance(saved, Mapping) or not saved.keys() >= set(_FIXED):
        raise ConfigError([f"the state is damaged: its config lacks some of {', '.join(_FIXED)}, got {saved!r}"])
    problems = Problems(
        f"{name}: the state was saved with {saved[name]!r}, this run has {getattr(config, name)!r}: use what it was "
        "saved with, or start a new run"
        for name in _FIXED
        if saved[name] != getattr(config, name)
        and not (name == "num_samples" and config.shard is None and saved[name] < config.num_samples)
    )
    shard, own = saved.get("shard") or state.get("shard"), config.shard  # the second in states of older versions
    if (shard and tuple(shard)) != own:
        saved_by, this = ("all samples" if not one else f"shard {one[0]} of {one[1]}" for one in (shard, own))
        problems.append(
            f"sharded: the state is that of {saved_by}, this is {this}: each rank loads what it saved, on as many "
            "ranks as there were"
        )
    if config.auto_find_lr and not saved.get("auto_find_lr") and state["global_step"]:
        problems.append(
            f"auto_find_lr=True: the search comes before the first step, and this run has had {state['global_step']}: "
            "give initial_lr"
        )
    if saved["num_samples"] < config.num_samples and not rules.grows:
        problems.append(
            f"num_samples: the state was saved with {saved['num_samples']}, this run has {config.num_samples}, and "
            f"strategy={saved['strategy']!r} cannot take more samples: use what it was saved with, or start a new run"
        )
    problems.raise_if_any()


def grown(state: Mapping[str, Any], num_samples: int) -> dict[str, Any]:
    """Return the state with samples behind its last one; they join the epochs that begin later."""
    if state["config"]["num_samples"] == num_samples:
        return dict(state)
    catalog, guard = with_more(state["catalog"], num_samples), grown_guard(state["guard"], num_samples)
    return {**state, "catalog": catalog, "guard": guard}


def grown_guard(state: Mapping[str, Any], num_samples: int) -> dict[str, Any]:
    """Return the noise guard's state with more samples; masks need nothing: what their bytes do not reach is False."""
    guard: dict[str, Any] = dict(unpacked(state))
    if guard["phase"] is not None:
        guard["phase"] = _padded(guard["phase"], num_samples)
    if guard["since"] is not None:
        guard["since"] = {name: _padded(value, num_samples) for name, value in guard["since"].items()}
    return guard


def _padded(values: Any, size: int) -> NDArray[Any]:
    array = np.asarray(values)
    return np.concatenate([array, np.zeros(size - len(array), array.dtype)])
