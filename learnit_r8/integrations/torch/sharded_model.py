"""A model that is sharded over ranks, in backups and in checkpoints that any number of ranks reads."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from learnit_r8.errors import CheckpointError
from learnit_r8.integrations.torch.state import (
    capture_rngs,
    capture_state,
    packed,
    restore_rngs,
    restore_state,
    unpacked,
)

F = TypeVar("F", bound=Callable[..., Any])


def collective(function: F) -> F:
    """Mark a `save_callback` that has to run on all ranks: `R8Scheduler(save_callback=collective(save), ...)`.

    All ranks call it at the same step with the same path, on storage that they share. Those that have nothing to
    write just return.

    Args:
        function: `(state_dict, filepath)` or `(filepath)`.
    """
    marked: Any = function
    try:
        marked.collective = True
    except AttributeError:  # a bound method takes no attributes
        marked = partial(function)
        marked.collective = True
    return marked  # type: ignore[no-any-return]


class ShardedModel:
    """All that training changes, for a run's callbacks, whatever shards it: FSDP2, HSDP, tensor parallelism, DDP, none.

        parts = ShardedModel(model, optimizer)
        R8Scheduler(..., state_callback=parts.capture, load_callback=parts.load, save_callback=parts.save)

    Checkpoints go through `torch.distributed.checkpoint`: written by n ranks, they are read by m. Random generators
    are saved for each rank, and restored on those ranks that there were.

    Args:
        model: A module, wrapped as it is trained.
        optimizer: Its optimizer, or a list of them.
        scaler: `torch.amp.GradScaler`, or None.
        ema: Averaged weights, a module, or None.
    """

    def __init__(self, model: torch.nn.Module, optimizer: Any = (), scaler: Any = None, ema: Any = None) -> None:
        self._model = model
        self._optimizers = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
        self._scaler = scaler
        self._ema = ema

    def capture(self) -> dict[str, Any]:
        """Return this rank's live state, for `state_callback`: the scheduler copies it."""
        return capture_state(self._model, self._optimizers, self._scaler, self._ema, copy=False)

    @collective
    def save(self, filepath: str) -> None:
        """Write it into a folder, on all ranks at once."""
        state = self._state() | {self._own_rngs: packed(capture_rngs())}
        if self._scaler is not None:
            state["scaler"] = packed(self._scaler.state_dict())
        _quietly(save, state, filepath)

    def load(self, source: Any) -> None:
        """Restore what `save` wrote, on all ranks at once, or what `capture` returned.

        Args:
            source: The folder, or the captured state.

        Raises:
            CheckpointError: It is no such folder.
        """
        if not isinstance(source, (str, Path)):
            restore_state(source, self._model, self._optimizers, self._scaler, self._ema)
            return
        if not (Path(source) / ".metadata").is_file():
            raise CheckpointError(f"{source} is no folder that ShardedModel.save wrote")
        known = FileSystemReader(source).read_metadata().state_dict_metadata
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)  # else its state is not made, and then not loaded
        state = self._state() | {name: b"" for name in (self._own_rngs, "scaler") if name in known}
        _quietly(load, state, source)
        set_model_state_dict(self._model, state["model"])
        # Not strict: SGD without momentum has no state. What a state lacks was missed when it was read.
        options = StateDictOptions(strict=False)
        set_optimizer_state_dict(self._model, self._optimizers, state["optimizer"], options=options)
        if self._ema is not None:
            self._ema.load_state_dict(state["ema"])
        if self._scaler is not None and "scaler" in known:
            self._scaler.load_state_dict(unpacked(state["scaler"]))
        if self._own_rngs in known:
            restore_rngs(unpacked(state[self._own_rngs]))

    @property
    def _own_rngs(self) -> str:
        return f"rngs-{dist.get_rank() if dist.is_initialized() else 0}"

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self._model, self._optimizers)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer}
        if self._ema is not None:
            state["ema"] = self._ema.state_dict()
        return state


def _quietly(exchange: Callable[..., Any], state: dict[str, Any], folder: str | Path) -> None:
    with warnings.catch_warnings():  # one process is fine
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        exchange(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
