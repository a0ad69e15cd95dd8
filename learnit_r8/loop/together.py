"""A `save_callback` that runs on all ranks at once: of a sharded model, no rank holds all.

Rank 0 writes the checkpoint as ever. Where it would call the user's function, it tells the others the path, and all
call it; the checkpoint is whole only if none of them failed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from learnit_r8.errors import CheckpointError
from learnit_r8.loop.callbacks import SaveCallback
from learnit_r8.loop.ranks import Ranks

State = Callable[[], dict[str, Any]]


class SaveTogether(SaveCallback):
    """The user's function on all ranks; on rank 0 it takes the place of `SaveCallback`."""

    def __init__(self, save: SaveCallback, ranks: Ranks) -> None:
        self.collective = True
        self._save, self._ranks = save, ranks
        self._told = False

    def prepare(self) -> None:
        """There is nothing to get ready for."""

    def lead(self, write: Callable[[], Path]) -> Path:
        """Write a checkpoint on rank 0 while the others `follow`; `write` calls this object with the model's path."""
        self._told, path = False, ""
        try:
            path = str(write())
        finally:
            if not self._told:  # it failed before the model's turn: the others wait for that
                self._ranks.tell("")
            self._ranks.tell(path)
        return Path(path)

    def follow(self, state: State) -> Path:
        """Do on another rank what rank 0 does in `lead`; return the checkpoint's path."""
        failure = "rank 0 could not write it"
        if path := self._ranks.tell(""):
            try:
                self._on_all(state, Path(path))
            except CheckpointError as error:
                failure = str(error)
        if saved := self._ranks.tell(""):
            return Path(saved)
        raise CheckpointError(f"no checkpoint was written; what lay there is kept: {failure}")

    def __call__(self, state: State, path: Path) -> None:
        """Save the model on all ranks; rank 0 calls it."""
        self._told = True
        self._ranks.tell(str(path))
        self._on_all(state, path)

    def _on_all(self, state: State, path: Path) -> None:
        lacks, failure = not path.parent.is_dir(), ""
        if self._ranks.everyone(lacks).any():
            raise CheckpointError(
                f"{path.parent} is not there on {'this' if lacks else 'another'} rank: give a checkpoint_dir on "
                "storage that all ranks share"
            )
        try:
            self._save(state, path)
        except Exception as error:
            failure = f"save_callback failed: {type(error).__name__}: {error}"
        if self._ranks.everyone(bool(failure)).any():
            raise CheckpointError(failure or "save_callback failed on another rank")
