"""Who chooses the samples of this epoch, how many are left of its plan, and what they weigh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from learnit_r8.core.config import Config
from learnit_r8.core.rng import Purpose, RandomStreams
from learnit_r8.errors import ProtocolError, tell
from learnit_r8.samples.catalog import LossCatalog
from learnit_r8.strategies.base import BatchRequest, Draw, Strategy, complaint
from learnit_r8.strategies.uniform import Uniform
from learnit_r8.types import Indices, Losses, LossReport, Mask


class Sampling:
    """Asks the strategy, or in the first epoch the cataloger, for the next batch.

    Args:
        strategy: Chooses from the second epoch on; one with `catalogs = False` from the first.
        config: The run.
        catalog: Shown to the strategy.
        streams: The run's randomness.
        agreed: Returns the number of batches that all ranks take, where each draws its own and no plan says it; the
            number may not grow then.

    Attributes:
        batches: Number of batches in the epoch's plan; it grows where the strategy draws fewer samples than asked for.
        drawn: How many of them were drawn.
    """

    def __init__(
        self,
        strategy: Strategy,
        config: Config,
        catalog: LossCatalog,
        streams: RandomStreams,
        agreed: Callable[[int], int] | None = None,
    ) -> None:
        self.strategy = strategy
        self._agreed = agreed
        self.batches = 0
        self.drawn = 0
        self._config = config
        self._catalog = catalog
        self._streams = streams
        self._cataloger = Uniform()
        self._cataloging = False
        self._left = 0  # samples of the plan that are not drawn yet
        self._excluded: Mask | None = None
        self._observe = getattr(strategy, "observe", None)
        chain = strategy, getattr(strategy, "wrapped", strategy)  # FromRank0 passes on what another one chose
        self._trusted = all(type(one).__module__.startswith("learnit_r8.") for one in chain)
        self._warned = False
        self._fast: Callable[[int], Indices | None] | None = None  # a plan's next batch, without a request

    @property
    def each_once(self) -> bool:
        """Whether it is certain that this epoch draws no sample twice."""
        return self._cataloging or (self._trusted and bool(getattr(self.strategy, "covers", False)))

    @property
    def phase(self) -> str:
        """The strategy's name, or "cataloging" in the first epoch."""
        return "cataloging" if self._cataloging else self._config.strategy

    @property
    def _active(self) -> Strategy:
        return self._cataloger if self._cataloging else self.strategy

    def _find_fast(self) -> Callable[[int], Indices | None] | None:
        return getattr(self._active, "next_planned", None) if self._trusted or self._cataloging else None

    def start_epoch(
        self, epoch: int, step: int, progress: float, excluded: Mask | None, *, alike: bool = False
    ) -> None:
        """Let the strategy plan an epoch.

        Args:
            epoch: From 0.
            step: Global step.
            progress: Share of the budget that is spent.
            excluded: Samples to leave out, or None.
            alike: Draw every sample equally often: go on cataloging, unless the strategy does that itself.
        """
        first = epoch == 0 and getattr(self.strategy, "catalogs", True)
        self._cataloging = first or (alike and not getattr(self.strategy, "covers", False))
        self._excluded = _read_only(excluded)
        self.drawn = 0
        request = self._request(self._config.batch_size, epoch, step, progress, Purpose.PLAN)
        start = getattr(self._active, "start_epoch", None)
        samples = start(request) if start is not None else None
        if samples is None:
            samples = self._config.num_samples - (0 if excluded is None else int(np.count_nonzero(excluded)))
        elif not self._trusted and (not isinstance(samples, (int, np.integer)) or samples < 1):
            raise ProtocolError(
                f"{type(self._active).__name__}.start_epoch must return how many samples the epoch will draw, a whole "
                f"number >= 1, or None for all that are not excluded: got {samples!r}"
            )
        self._left = int(samples)
        self._fast = self._find_fast()
        self.batches = self._count()

    def _count(self) -> int:
        """Return how many batches the epoch has; all ranks must call it where none has the others' plan."""
        return self._planned() if self._agreed is None else self._agreed(self._planned())

    def draw(self, epoch: int, step: int, progress: float, *, stable_only: bool) -> tuple[Indices, Losses | None]:
        """Return the next batch: sample ids, int64, and their weights (None for ones)."""
        size = self._config.next_size(self._left)
        indices = None if stable_only or self._fast is None else self._fast(size)
        weights: Losses | None = None
        if indices is not None:
            count = len(indices)
            if not self._catalog.expects(indices) and self.each_once:
                self._catalog.expect([indices, *self._active.planned_ahead()])  # type: ignore[attr-defined]
        else:
            request = self._request(size, epoch, step, progress, Purpose.BATCH, stable_only)
            indices, weights, count = self._ask(request)
        self.drawn += 1
        self._left -= count
        if count < size:
            if (self._trusted or self._cataloging) and count % self._config.world_size:  # the ranks get equally many
                whole = count - count % self._config.world_size
                indices, weights = indices[:whole], None if weights is None else weights[:whole]
            self._plan_longer(count, size)
        return indices, weights

    @np.errstate(all="ignore")
    def _ask(self, request: BatchRequest) -> tuple[Indices, Losses | None, int]:
        """Return ids and weights that the strategy draws, and how many it drew: a stranger's may be fewer now."""
        chosen = self._active.draw(request)
        draw = chosen if isinstance(chosen, Draw) else Draw(chosen)
        if self._trusted or self._cataloging:
            indices, weights = draw.indices.astype(np.int64), draw.importance(self._config.num_samples)
        else:
            indices, weights = self._checked(draw, request)
        return indices, weights, len(draw.indices)

    def _plan_longer(self, count: int, asked: int) -> None:
        """Let the epoch go on until all of its samples were drawn."""
        if self._agreed is None:
            self.batches = self._planned()
        elif not self._trusted:
            raise ProtocolError(
                f"{type(self._active).__name__}.draw returned {count} ids where {asked} were asked for: under "
                "ShardedScheduler, whose ranks take steps together, each batch has to be full"
            )

    def _planned(self) -> int:
        """Return how many batches the epoch has: full ones from here on, unless the strategy knows better."""
        left = getattr(self._active, "batches_left", None)
        return self.drawn + (self._config.batches(self._left) if left is None else left)

    def _request(
        self, size: int, epoch: int, step: int, progress: float, purpose: Purpose, stable_only: bool = False
    ) -> BatchRequest:
        return BatchRequest(
            size,
            epoch,
            self.drawn,
            step,
            progress,
            self._catalog,
            self._streams,
            purpose,
            self._excluded,
            stable_only,
            self._config.world_size,
        )

    def _checked(self, draw: Draw, request: BatchRequest) -> tuple[Indices, Losses | None]:
        """Return copies of what a stranger drew, which may go on writing into its arrays."""
        name = type(self._active).__name__
        indices = np.asarray(draw.indices)
        if indices.ndim != 1 or indices.dtype.kind not in "iu" or not 1 <= len(indices) <= request.size:
            raise ProtocolError(
                f"{name}.draw must return 1 to {request.size} sample ids in a 1-D integer array, "
                f"got {type(draw.indices).__name__} of shape {indices.shape} and dtype {indices.dtype}"
            )
        if indices.min() < 0 or indices.max() >= self._config.num_samples:
            raise ProtocolError(
                f"{name}.draw returned ids from {indices.min()} to {indices.max()}, allowed are 0 to "
                f"{self._config.num_samples - 1}"
            )
        if not getattr(self._active, "replacement", False) and len(np.unique(indices)) < len(indices):
            raise ProtocolError(
                f"{name}.draw returned a sample twice in one batch: draw without replacement, or set the class "
                "attribute replacement = True"
            )
        weights = self._checked_weights(draw, name)
        indices = indices.astype(np.int64)
        if request.excluded is None or not request.excluded[indices].any():
            return indices, weights
        return self._without_excluded(indices, weights, ~request.excluded[indices], name)

    def _checked_weights(self, draw: Draw, name: str) -> Losses | None:
        given = draw.probabilities if draw.weights is None else draw.weights
        kind = "probabilities" if draw.weights is None else "weights"
        if given is None:
            return None
        values = np.asarray(given)
        if (wanted := complaint(kind, values, len(draw.indices))) is not None:
            raise ProtocolError(
                f"{name}.draw must return {kind} that are {wanted}: got shape "
                f"{values.shape}, {np.array2string(values, threshold=8)}, for {len(draw.indices)} samples"
            )
        weights = draw.importance(self._config.num_samples)
        return None if weights is None else weights.copy()

    def _without_excluded(
        self, indices: Indices, weights: Losses | None, kept: Mask, name: str
    ) -> tuple[Indices, Losses | None]:
        """Take out what must not be trained on. To stop would punish a run for a quarantine that came hours into it."""
        advice = f"{name}.draw returned samples of request.excluded (quarantine, noise guard): leave these out"
        remain = np.flatnonzero(kept)
        remain = remain[: len(remain) - len(remain) % self._config.world_size]
        if not len(remain):
            raise ProtocolError(f"{advice}; too few of a batch remain")
        if not self._warned:
            self._warned = True
            tell(f"{advice}; until then they are taken out of its batches", stacklevel=2)
        return indices[remain], None if weights is None else weights[remain]

    @property
    def listens(self) -> bool:
        """Whether the strategy wants to hear reports."""
        return self._observe is not None

    @np.errstate(all="ignore")
    def observe(self, report: LossReport) -> None:
        """Let the strategy hear an accepted report."""
        if self._observe is not None:
            self._observe(report)

    def pop_decisions(self) -> list[tuple[str, str, float]]:
        """Return (decision, reason, figure) of what the strategy decided since the last call."""
        pop = getattr(self.strategy, "pop_decisions", None)
        return [] if pop is None else pop()

    def forget(self, indices: Indices) -> None:
        """Tell the strategy that these were drawn and will not be reported."""
        forget = getattr(self._active, "forget", None)
        if forget is not None:
            forget(indices)

    def state_dict(self) -> dict[str, Any]:
        """Return the plan's position and the strategy's own state."""
        return {
            "batches": self.batches,
            "drawn": self.drawn,
            "left": self._left,
            "cataloging": self._cataloging,
            "excluded": None if self._excluded is None else np.packbits(self._excluded),
            "cataloger": self._cataloger.state_dict(),
            "strategy": _state(self.strategy),
        }

    def load_state_dict(self, state: dict[str, Any], epoch: int, step: int, progress: float) -> None:
        """Restore what `state_dict` returned. A strategy without state plans its epoch anew."""
        self._cataloging = bool(state["cataloging"])
        packed = state["excluded"]
        count = self._config.num_samples
        self._excluded = None if packed is None else _read_only(np.unpackbits(packed, count=count).astype(bool))
        self._cataloger.load_state_dict(state["cataloger"])
        self._fast = self._find_fast()
        load = getattr(self.strategy, "load_state_dict", None)
        start = getattr(self.strategy, "start_epoch", None)
        if load is not None:
            load(state["strategy"])
        elif start is not None and not self._cataloging and state["batches"]:
            self.drawn = 0
            start(self._request(self._config.batch_size, epoch, step, progress, Purpose.PLAN))
        self.drawn, self._left = int(state["drawn"]), int(state["left"])
        # The batch size may have changed since: count again what is left.
        self.batches = self._count() if state["batches"] else 0


def _read_only(mask: Mask | None) -> Mask | None:
    if mask is None:
        return None
    view = mask.view()
    view.flags.writeable = False
    return view


def _state(strategy: Strategy) -> dict[str, Any] | None:
    save = getattr(strategy, "state_dict", None)
    return None if save is None else save()
