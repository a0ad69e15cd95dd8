"""Which of Keras' own loops asks for a batch, and what it was called with: Keras tells a dataset neither."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any, NamedTuple

import keras

_LOOPS = ("fit", "evaluate", "predict")


class Host(NamedTuple):
    """A call of `fit`, `evaluate` or `predict`, and what it was called with."""

    name: str
    arguments: Mapping[str, Any]

    @property
    def callbacks(self) -> list[Any]:
        """The callbacks that it was given."""
        given = self.arguments.get("callbacks") or []
        given = getattr(given, "callbacks", given)
        return list(given) if isinstance(given, (list, tuple)) else [given]


def host() -> Host | None:
    """Return the innermost of Keras' loops on the stack; None in a thread that only loads data."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in _LOOPS and isinstance(frame.f_locals.get("self"), keras.Model):
            return Host(frame.f_code.co_name, frame.f_locals)
        frame = frame.f_back
    return None


_REFUSED = {
    "LearningRateScheduler": "sets the learning rate, and so does R8Scheduler: give scheduler_mode its function, as "
    "one of progress in [0, 1]",
    "BackupAndRestore": "brings the model back and not R8Scheduler: leave it out, give the scheduler save_callback, "
    "load_callback and checkpoint_every, and go on with R8Scheduler.resume_from_checkpoint",
}


def fit_problems(fit: Host) -> list[str]:
    """Return what a call of `fit` asks for that the scheduler decides."""
    given, problems = fit.arguments, []
    if given.get("shuffle"):
        problems.append("fit(shuffle=True), the default, asks for batches in a random order: give fit(shuffle=False)")
    if (steps := given.get("steps_per_epoch")) is not None:
        problems.append(f"steps_per_epoch={steps}: the scheduler says how long an epoch is, leave it out")
    if given.get("class_weight") is not None:
        problems.append("class_weight belongs to the dataset: R8Dataset(scheduler, x, y, class_weight={0: 1.0, ...})")
    kinds = {kind for callback in fit.callbacks for kind in type(callback).__mro__}
    names = sorted(kind.__name__ for kind in kinds if kind.__module__.startswith("keras."))
    return problems + [f"keras.callbacks.{name} {_REFUSED[name]}" for name in names if name in _REFUSED]


class _Unshown(keras.callbacks.Callback):  # type: ignore[misc]
    """Keeps `r8/...` out of the progress bar, which has no room for them."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        for name in [name for name in logs or () if name.startswith("r8/")]:
            del logs[name]


def for_loggers(fit: Host, first: keras.callbacks.Callback) -> None:
    """Let `first` come before the callbacks that log what it adds, and the progress bar after them."""
    listed = fit.arguments.get("callbacks")
    if not isinstance(listed, keras.callbacks.CallbackList) or any(isinstance(c, _Unshown) for c in listed.callbacks):
        return
    bars = [one for one in listed.callbacks if isinstance(one, keras.callbacks.ProgbarLogger)]
    others = [one for one in listed.callbacks if one is not first and one not in bars]
    listed.callbacks = [first, *others, _Unshown(), *bars]  # a new list: Keras is going through the old one
