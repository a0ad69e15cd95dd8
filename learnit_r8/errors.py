"""The few errors that the library raises on purpose; every one is an `R8Error`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path


class R8Error(Exception):
    """Base class of every error that the library raises on purpose."""


class ConfigError(R8Error, ValueError):
    """One or more bad arguments; the message lists all of them.

    Attributes:
        problems: One sentence per bad argument: what came and what is allowed.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        if len(self.problems) == 1:
            message = self.problems[0]
        else:
            listing = "\n".join(f"  - {problem}" for problem in self.problems)
            message = f"{len(self.problems)} problems:\n{listing}"
        super().__init__(message)


class ProtocolError(R8Error, RuntimeError):
    """The loop's order was broken: for instance a loss reported for no open batch."""


class CheckpointError(R8Error):
    """A checkpoint could not be written, found or used."""


class CheckpointCorrupt(CheckpointError):
    """A checkpoint's bytes are not the ones that were written."""


class StateError(CheckpointError, ValueError):
    """What was given to `load_state_dict` is damaged, or belongs to something else."""


class TrainingDiverged(R8Error):
    """Training is beyond recovery: the rollback budget is spent.

    Args:
        message: What happened, and where the evidence is.
        batches: The ids, or keys, of the samples of the last failing batches, oldest first; an attribute, too.
        crash_bundle: Folder with the evidence, or None when nothing could be written; an attribute, too.
    """

    def __init__(
        self,
        message: str,
        *,
        batches: Sequence[Sequence[int | str]] = (),
        crash_bundle: Path | None = None,
    ) -> None:
        self.batches = tuple(tuple(i if isinstance(i, str) else int(i) for i in batch) for batch in batches)
        self.crash_bundle = crash_bundle
        super().__init__(message)


def tell(message: str, stacklevel: int = 1) -> None:
    """Warn, without ending a run: where warnings are errors (`python -W error`), the sentence goes to stderr instead.

    Args:
        message: The sentence.
        stacklevel: As for `warnings.warn`, from the caller.
    """
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=stacklevel + 1)
    except RuntimeWarning:
        sys.stderr.write(f"RuntimeWarning: {message}\n")
