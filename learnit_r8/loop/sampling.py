"""Who chooses the samples of this epoch, how many are left of its plan, and what they weigh."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.arrays import read_only
from learnit_r8.core.config import Config
from learnit_r8.core.rng import Purpose, RandomStreams
from learnit_r8.errors import ProtocolError, tell
from learnit_r8.samples.catalog import LossCatalog
from learnit_r8.strategies.base import BatchRequest, Draw, Strategy
from learnit_r8.strategies.contract import Rules
from learnit_r8.strategies.plan import EpochPlan
from learnit_r8.strategies.uniform import Uniform
from learnit_r8.types import Indices, Losses, LossReport, Mask


def _none() -> None:
    return None


class Sampling:
    """Asks the strategy, or in the first epoch the cataloger, for the next batch.

    Args:
        strategy: Chooses from the second epoch on; one with `catalogs = False` from the first.
        config: The run.
        catalog: Shown to the strategy.
        streams: The run's randomness.
        of_plans: Returns a number of every plan there is: of all ranks, where each has samples of its own.

    Attributes:
        each_once: Whether it is certain that this epoch draws no sample twice.
        listens: Whether the strategy wants to hear reports.
        batches: Number of batches in the epoch's plan; it grows where the strategy draws fewer samples than asked for.
        drawn: How many of them were drawn.
    """

    def __init__(
        self,
        strategy: Strategy,
        config: Config,
        catalog: LossCatalog,
        streams: RandomStreams,
        of_plans: Callable[[float], NDArray[np.float64]],
    ) -> None:
        self.rules = Rules(strategy)
        self._of_plans = of_plans
        self.batches = 0
        self.drawn = 0
        self._config = config
        self._catalog = catalog
        self._streams = streams
        self._cataloger = Rules(Uniform())
        self.listens = self.rules.has("observe")
        self._left = 0  # samples of the plan that are not drawn yet
        self._excluded: Mask | None = None
        self._warned = False
        self._turn(cataloging=False)

    @property
    def phase(self) -> str:
        """The strategy's name, or "cataloging" in the first epoch."""
        return "cataloging" if self._cataloging else self._config.strategy

    def _turn(self, *, cataloging: bool) -> None:
        """Let the cataloger draw, or the strategy."""
        self._cataloging = cataloging
        self._active = active = self._cataloger if cataloging else self.rules
        self.each_once = active.sound and active.covers
        # Where it is known which batches come, whatever is reported: the plan, and how many were looked up ahead.
        certain = getattr(active.strategy, "certain", _none) if self.each_once else _none
        self._certain: Callable[[], EpochPlan | None] = certain
        self._foreseen = 0
        self._take_next: Callable[[int], Indices]

    def _require(self, fault: str) -> None:
        if fault:
            raise ProtocolError(f"{type(self._active.strategy).__name__}.{fault}")

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
        self._turn(cataloging=(epoch == 0 and self.rules.catalogs) or (alike and not self.rules.covers))
        self._excluded = None if excluded is None else read_only(excluded)
        self.drawn = 0
        request = self._request(self._config.batch_size, epoch, step, progress, Purpose.PLAN)
        samples = self._active.start_epoch(request)
        if not self._active.sound:
            self._require(self._active.length_fault(samples))
        if samples is None:
            samples = self._config.num_samples - (0 if excluded is None else int(np.count_nonzero(excluded)))
        self._left = int(samples)
        self.batches = self._count()

    def _count(self) -> int:
        """Return how many batches the epoch has: what all ranks can take. All must call it."""
        return int(self._of_plans(self._planned()).min())

    def draw(self, epoch: int, step: int, progress: float, *, stable_only: bool) -> tuple[Indices, Losses | None]:
        """Return the next batch: sample ids, int64, and their weights (None for ones)."""
        size = self._config.next_size(self._left)
        plan = None if stable_only else self._certain()
        weights: Losses | None = None
        if plan is not None:
            self._foresee(plan, size)
            indices = plan.take(size)
            count = len(indices)
        else:
            request = self._request(size, epoch, step, progress, Purpose.BATCH, stable_only)
            indices, weights, count = self._ask(request)
            self._foreseen = 0
        self.drawn += 1
        self._left -= count
        if count < size:
            self._plan_longer(count, size)
        return indices, weights

    def _foresee(self, plan: EpochPlan, size: int) -> None:
        """Count one of the batches that were looked up ahead; look the next ones up together where there is none."""
        if self._foreseen == 0:
            batches = plan.ahead(size)
            self._catalog.expect(batches)
            self._foreseen = len(batches)
        self._foreseen -= 1

    def coming(self) -> list[Indices]:
        """Return batches that are sure to be drawn next, the next one first, full ones, as far as they are cut."""
        plan, size = self._certain(), self._config.batch_size
        if self._foreseen <= 0 or plan is None or self._left < size:
            return []
        self._take_next = plan.take
        return list(takewhile(lambda ids: len(ids) == size, plan.ahead(size)))

    def draw_coming(self, size: int) -> None:
        """Draw the next one of `coming`, of this size."""
        self._take_next(size)
        self._foreseen -= 1
        self.drawn += 1
        self._left -= size

    @np.errstate(all="ignore")
    def _ask(self, request: BatchRequest) -> tuple[Indices, Losses | None, int]:
        """Return ids and weights that the strategy draws, and how many it drew: a stranger's may be fewer now."""
        draw = Draw.of(self._active.draw(request))
        if self._active.sound:
            indices, weights = draw.indices.astype(np.int64), draw.importance(self._config.num_samples)
        else:
            indices, weights = self._checked(draw, request)
        return indices, weights, len(draw.indices)

    def _plan_longer(self, count: int, asked: int) -> None:
        """Let the epoch go on until all of its samples were drawn; not where the other ranks have other plans."""
        if self._config.shard is None:
            self.batches = self._planned()
        elif not self._active.sound:
            self._require(
                f"draw returned {count} ids where {asked} were asked for: under ShardedScheduler, whose ranks take "
                "steps together, each batch has to be full"
            )

    def _planned(self) -> int:
        """Return how many batches the epoch has: full ones from here on, unless the strategy knows better."""
        left = self._active.batches_left
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
        self._require(self._active.draw_fault(draw, request.size, self._config.num_samples))
        indices, weights = np.array(draw.indices, np.int64), draw.importance(self._config.num_samples)
        weights = None if weights is None else weights.copy()
        if request.excluded is None or not request.excluded[indices].any():
            return indices, weights
        return self._without_excluded(indices, weights, ~request.excluded[indices])

    def _without_excluded(self, indices: Indices, weights: Losses | None, kept: Mask) -> tuple[Indices, Losses | None]:
        """Take out what must not be trained on. To stop would punish a run for a quarantine that came hours into it."""
        advice = "draw returned samples of request.excluded (quarantine, noise guard): leave these out"
        remain = np.flatnonzero(kept)
        remain = remain[: len(remain) - len(remain) % self._config.world_size]
        if not len(remain):
            self._require(f"{advice}; too few of a batch remain")
        if not self._warned:
            self._warned = True
            name = type(self._active.strategy).__name__
            tell(f"{name}.{advice}; until then they are taken out of its batches", stacklevel=2)
        return indices[remain], None if weights is None else weights[remain]

    def grow(self, num_samples: int) -> None:
        """Plan the epochs that begin from now on for more samples."""
        if self._excluded is not None:
            more = np.zeros(num_samples, np.bool_)
            more[: len(self._excluded)] = self._excluded
            self._excluded = read_only(more)

    @np.errstate(all="ignore")
    def observe(self, report: LossReport) -> None:
        """Let the strategy hear an accepted report."""
        self.rules.observe(report)

    def forget(self, indices: Indices) -> None:
        """Tell the strategy that these were drawn and will not be reported."""
        self._active.forget(indices)

    def state_dict(self) -> dict[str, Any]:
        """Return the plan's position and the strategy's own state."""
        return {
            "batches": self.batches,
            "drawn": self.drawn,
            "left": self._left,
            "cataloging": self._cataloging,
            "excluded": None if self._excluded is None else np.packbits(self._excluded),
            "cataloger": self._cataloger.state_dict(),
            "strategy": self.rules.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], epoch: int, step: int, progress: float) -> None:
        """Restore what `state_dict` returned. A strategy without state plans its epoch anew."""
        self._turn(cataloging=bool(state["cataloging"]))
        packed = state["excluded"]
        count = self._config.num_samples
        self._excluded = None if packed is None else read_only(np.unpackbits(packed, count=count).astype(bool))
        self._cataloger.load_state_dict(state["cataloger"])
        if self.rules.has("load_state_dict"):
            self.rules.load_state_dict(state["strategy"])
        elif not self._cataloging and state["batches"]:
            self.drawn = 0
            self.rules.start_epoch(self._request(self._config.batch_size, epoch, step, progress, Purpose.PLAN))
        self.drawn, self._left = int(state["drawn"]), int(state["left"])
        # The batch size may have changed since: count again what is left.
        self.batches = self._count() if state["batches"] else 0
