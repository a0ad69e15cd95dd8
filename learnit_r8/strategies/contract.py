"""A strategy's contract, said once: for the loop, `make`, wrappers and `check_strategy`.

A strategy has `draw(request)`. All else that it may have stands in `Rules`, with what holds where it has not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.types import Indices, LossReport

if TYPE_CHECKING:
    from learnit_r8.strategies.base import BatchRequest, Draw

_SOUND: set[type] = set()


def sound(cls: type) -> type:
    """Class decorator: draws of this strategy need no check in every step, since its tests call `check_strategy`."""
    _SOUND.add(cls)
    return cls


class Rules:
    """A strategy with every member that it may have; what it has not does nothing.

    Where it is `sound` its draws need no check; a subclass's do.

    Args:
        strategy: An object with `draw(request)`.
    """

    catalogs = True
    """False when it draws the first epoch, too, in place of the cataloging."""
    covers = False
    """True when one epoch draws each sample exactly once. Where it is not, `noise_guard="cap"` has every sample
    drawn alike until it has judged."""
    replacement = False
    """True when one batch may hold a sample twice."""
    grows = False
    """True when a run with more samples may load its state: from the next epoch on it draws the new ones, too."""

    def __init__(self, strategy: Any) -> None:
        self.strategy, self.draw, self._name = strategy, strategy.draw, type(strategy).__name__
        # FromRank0 passes on what another one chose.
        self.sound = {type(strategy), type(getattr(strategy, "wrapped", strategy))} <= _SOUND
        for name in OPTIONAL:
            if hasattr(strategy, name) and not isinstance(vars(Rules)[name], property):
                setattr(self, name, getattr(strategy, name))

    @property
    def batches_left(self) -> int | None:
        """How many batches of the epoch are still to be drawn, where they are not full ones."""
        return getattr(self.strategy, "batches_left", None)

    def start_epoch(self, request: BatchRequest) -> int | None:
        """Plan an epoch; return the number of samples that it will draw, at least 1.

        None: as many as there are, less `request.excluded`. The epoch goes on until so many are drawn, also where
        draws return fewer ids than asked for.
        """
        return None

    def observe(self, report: LossReport) -> None:
        """Hear an accepted report."""

    def forget(self, indices: Indices) -> None:
        """These were drawn and will never be reported."""

    def pop_decisions(self) -> list[tuple[str, str, float]]:
        """Return (decision, reason, figure) of what it decided since the last call; each becomes an event."""
        return []

    def state_dict(self) -> Any:
        """Return all that draws depend on besides the request: JSON scalars, lists, dicts and arrays, all copies."""

    def load_state_dict(self, state: Any) -> None:
        """Restore what `state_dict` returned."""

    def has(self, name: str) -> bool:
        """Say whether the strategy itself has an optional member."""
        return hasattr(self.strategy, name)

    # What is wrong, as a sentence that begins with the member's name; "" where nothing is.

    def state_fault(self) -> str:
        """Say which half of saving and loading is missing."""
        halves = {name: self.has(name) for name in ("state_dict", "load_state_dict")}
        has, lacks = sorted(halves, key=halves.__getitem__, reverse=True)
        return f"has {has} but no {lacks}: a resume needs both" if halves[has] != halves[lacks] else ""

    def length_fault(self, samples: Any) -> str:
        """Say what is wrong with what `start_epoch` returned."""
        if samples is None or (isinstance(samples, (int, np.integer)) and samples >= 1):
            return ""
        return (
            "start_epoch must return how many samples the epoch will draw, a whole number >= 1, or None for all that "
            f"are not excluded: got {samples!r}"
        )

    def draw_fault(self, draw: Draw, asked: int, num_samples: int) -> str:
        """Say what is wrong with a draw of up to so many of the samples, but for excluded ones."""
        ids = np.asarray(draw.indices)
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or not 1 <= len(ids) <= asked:
            return (
                f"draw must return 1 to {asked} sample ids in a 1-D integer array, got {type(draw.indices).__name__} "
                f"of shape {ids.shape} and dtype {ids.dtype}; with fewer the epoch takes more batches"
            )
        if ids.min() < 0 or ids.max() >= num_samples:
            return f"draw returned ids from {ids.min()} to {ids.max()}, allowed are 0 to {num_samples - 1}"
        if not self.replacement and len(np.unique(ids)) < len(ids):
            return (
                "draw returned a sample twice in one batch: draw without replacement, or set the class attribute "
                "replacement = True"
            )
        kind = "weights" if draw.weights is not None else "probabilities"
        return _numbers_fault(kind, getattr(draw, kind), len(ids))


OPTIONAL = tuple(name for name in vars(Rules) if not name.startswith("_") and name != "has" and "fault" not in name)
"""Names of what a strategy may have besides `draw`."""
FLAGS = tuple(name for name in OPTIONAL if isinstance(vars(Rules)[name], bool))


def _numbers_fault(kind: str, given: Any, count: int) -> str:
    if given is None:
        return ""
    values: NDArray[Any] = np.asarray(given)
    zeros = kind == "weights"  # of a sample that is drawn but does not count
    if values.shape == (count,) and values.dtype.kind in "fiu" and np.isfinite(values).all():
        low = values.min()
        if low > 0 or (zeros and low == 0 and values.any()):
            return ""
    wanted = "finite, not negative and not all 0" if zeros else "finite and positive"
    return (
        f"draw must return {kind} that are {wanted}, one per sample: got shape {values.shape}, "
        f"{np.array2string(values, threshold=8)}, for {count} samples"
    )
