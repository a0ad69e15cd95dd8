"""An averaged model (EMA, SWA) that is part of the run: backups and checkpoints take it along."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from learnit_r8.core.arrays import as_array, as_losses
from learnit_r8.loop.arguments import Arguments
from learnit_r8.loop.callbacks import LoadCallback

_KEYS = {"r8 model", "r8 ema"}


class Averages:
    """The user's averaged model: anything with `state_dict` and `load_state_dict`."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def untouched(self) -> bool:
        """Whether it says of itself that nothing was averaged yet."""
        count = getattr(self.model, "n_averaged", None)
        return count is not None and float(count) == 0.0

    def around(self, state: Any) -> dict[str, Any]:
        """Return a state of the user's model with this one beside it."""
        return {"r8 model": state, "r8 ema": self.model.state_dict()}

    def along(self, args: Arguments) -> Arguments:
        """Return a run's arguments with callbacks that take it along and bring it back."""
        capture, load = args.state_callback, args.load
        return replace(
            args,
            state_callback=None if capture is None else self.capturing(capture),
            load=None if load is None else self.loading(load),
        )

    def capturing(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Return a `state_callback` that takes it along."""
        return lambda: self.around(function())

    def loading(self, load: LoadCallback) -> LoadCallback:
        """Return a `load_callback` that brings it back where it was taken along."""

        def restore(source: Any, from_ram: bool = False) -> None:
            if not isinstance(source, dict) or source.keys() != _KEYS:
                return load(source, from_ram=from_ram)
            load(source["r8 model"], from_ram=from_ram)
            self.model.load_state_dict(source["r8 ema"])
            return None

        return LoadCallback(restore)

    def state_dict(self) -> Any:
        """Return its state with numpy arrays for tensors."""
        return _plain(self.model.state_dict())

    def load_state_dict(self, state: Any) -> None:
        """Bring back what `state_dict` returned."""
        self.model.load_state_dict(_like(state, self.model.state_dict()))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if not hasattr(value, "shape"):
        return value
    try:
        return np.array(as_array(value))
    except TypeError:  # bfloat16, which numpy lacks, is part of float32
        return as_losses(value.reshape(-1)).astype(np.float32).reshape(tuple(value.shape))


def _like(value: Any, there: Any) -> Any:
    """Return plain data as what is there now: tensors of its type, on its device."""
    if isinstance(there, Mapping):
        return {name: _like(value[name], item) for name, item in there.items()}
    if isinstance(there, (list, tuple)):
        return type(there)(map(_like, value, there))
    return there.new_tensor(value) if hasattr(there, "new_tensor") else value
