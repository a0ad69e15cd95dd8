"""An epoch's plan: queues of samples from which every batch takes its even share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.state import Kind, Saved, maybe, table
from learnit_r8.types import Indices

_LOOK_AHEAD = 128  # samples of a queue that may be swapped in
_SWAPS = 4  # a queue, at most
_AHEAD, _AHEAD_SAMPLES = (32, 128), (1 << 13, 1 << 16)
"""Batches, and samples in them, that are cut together: up to the second numbers, but no more than one of the first."""


class EpochPlan:
    """Queues of sample ids that are used up together.

    A batch takes from each queue in proportion to what is left in it, so queues of equal size
    give equal shares (within one sample) in every batch, and all run out at the epoch's end.
    """

    def __init__(self, queues: Sequence[NDArray[np.uint32]]) -> None:
        self._queues = list(queues)
        self._taken = [0] * len(self._queues)
        self._size = 0
        # Batches of this size that are cut ahead, the next one last, each with what is taken after it.
        self._ahead: list[tuple[Indices, list[int]]] = []

    @property
    def remaining(self) -> int:
        """Samples that are still to be drawn."""
        return sum(map(len, self._queues)) - sum(self._taken)

    def take(self, size: int) -> Indices:
        """Return the next batch, int64; fewer ids than asked when fewer are left."""
        if size != self._size or not self._ahead:
            self._cut_ahead(size, _AHEAD[1])
        batch, self._taken = self._ahead.pop()
        return batch

    def ahead(self, size: int) -> list[Indices]:
        """Return the batches of this size that come next, as far as they are cut together, the next one first."""
        if size != self._size or not self._ahead:
            self._cut_ahead(size, _AHEAD[1])
        return [batch for batch, _ in reversed(self._ahead)]

    def _cut_ahead(self, size: int, count: int) -> None:
        """Cut up to so many of the next batches together: a handful of calls of numpy serve them all."""
        count = max(1, min(count, _AHEAD_SAMPLES[1] // size, max(_AHEAD[0], _AHEAD_SAMPLES[0] // size)))
        left = [len(queue) - start for queue, start in zip(self._queues, self._taken, strict=True)]
        share, rest = divmod(size, len(left))
        if rest == 0 and min(left) == max(left) >= share:
            self._cut_alike(share, min(count, left[0] // share))
            return
        taken, parts = self._taken, []
        cut: list[tuple[int, list[int]]] = []
        for _ in range(count):
            shares = self._shares(size, taken)
            if cut and not any(shares):
                break
            after = [start + share for start, share in zip(taken, shares, strict=True)]
            parts += [queue[start:end] for queue, start, end in zip(self._queues, taken, after, strict=True)]
            taken = after
            cut.append((sum(shares), after))
        ids, end = np.concatenate(parts, dtype=np.int64), 0
        self._size, self._ahead = size, []
        for length, after in cut:
            self._ahead.append((ids[end : end + length], after))
            end += length
        self._ahead.reverse()

    def _cut_alike(self, share: int, count: int) -> None:
        """Cut batches that take equally many from each queue, as equally many are left in each."""
        pairs = list(zip(self._queues, self._taken, strict=True))
        parts = [queue[start : start + count * share].reshape(count, share) for queue, start in pairs]
        ids = np.concatenate(parts, axis=1, dtype=np.int64)
        self._size = share * len(pairs)
        self._ahead = [(ids[k], [start + (k + 1) * share for _, start in pairs]) for k in reversed(range(count))]

    def steer(self, size: int, losses: Callable[[Indices], NDArray[Any]], target: float, tolerance: float) -> None:
        """Bring the next batch's mean loss near a target by swapping samples with later ones of their queue.

        Every sample is still drawn once. The hardest queue is tried first: its losses differ most.
        """
        shares = self._shares(size, self._taken)
        chosen = [queue[at : at + n] for queue, at, n in zip(self._queues, self._taken, shares, strict=True)]
        missing = target * sum(shares) - float(losses(np.concatenate(chosen, dtype=np.int64)).sum(dtype=np.float64))
        for queue in reversed(range(len(shares))):
            mine = chosen[queue]  # a view: swapping in it changes the plan
            start = self._taken[queue] + shares[queue]
            later = self._queues[queue][start : start + _LOOK_AHEAD]
            for _ in range(_SWAPS):
                if abs(missing) <= tolerance * sum(shares) or not len(mine) or not len(later):
                    break
                gains = losses(later.astype(np.int64)) - losses(mine.astype(np.int64))[:, None]
                best = int(np.abs(missing - gains).argmin())
                here, there = divmod(best, len(later))
                if abs(missing - gains[here, there]) >= abs(missing):
                    break
                missing -= float(gains[here, there])
                mine[here], later[there] = later[there], mine[here]
        self._cut_ahead(size, 1)

    def take_first(self, size: int) -> Indices:
        """Return the next batch from the first queue that still has samples, then the next."""
        parts, taken = [], []
        for queue, start in zip(self._queues, self._taken, strict=True):
            parts.append(queue[start : start + size])
            taken.append(start + len(parts[-1]))
            size -= len(parts[-1])
        self._taken, self._ahead = taken, []
        return np.concatenate(parts, dtype=np.int64)

    def _shares(self, size: int, taken: list[int]) -> list[int]:
        """Split a batch over the queues by what is left in each; the largest remainders round up."""
        left = [len(queue) - start for queue, start in zip(self._queues, taken, strict=True)]
        total = sum(left)
        if size >= total:
            return left
        shares = [size * count // total for count in left]
        missing = size - sum(shares)
        if missing:
            by_remainder = sorted(range(len(left)), key=lambda queue: -(size * left[queue] % total))
            for queue in by_remainder[:missing]:
                shares[queue] += 1
        return shares

    def state_dict(self) -> dict[str, Any]:
        """Return what is left of the plan."""
        rest = [queue[taken:] for queue, taken in zip(self._queues, self._taken, strict=True)]
        return {"samples": np.concatenate(rest), "sizes": [len(queue) for queue in rest]}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> EpochPlan:
        """Return the plan that goes on where `state_dict` was called."""
        ends = np.cumsum([0, *state["sizes"]])
        samples = np.array(state["samples"], np.uint32)
        return cls([samples[start:end] for start, end in pairwise(ends)])


class PlannedStrategy(Saved):
    """Base of strategies that plan the whole epoch at its start. Subclasses define `queues`."""

    _saved = table(plan=maybe(Kind(lambda _, plan: plan.state_dict(), lambda _, saved: EpochPlan.from_state(saved))))

    covers = grows = True

    def __init__(self) -> None:
        self._plan: EpochPlan | None = None

    def queues(self, request: Any) -> list[NDArray[np.uint32]]:
        """Return the queues of an epoch, the most stable samples first."""
        raise TypeError(f"{type(self).__name__} does not define queues(request)")

    def start_epoch(self, request: Any) -> int:
        """Make the epoch's plan and return its number of samples."""
        self._plan = EpochPlan(self.queues(request))
        return self._plan.remaining

    def draw(self, request: Any) -> Indices:
        """Return the plan's next batch; on probation the stable samples come first."""
        if self._plan is None:
            self.start_epoch(request)
        assert self._plan is not None
        return self._plan.take_first(request.size) if request.stable_only else self._plan.take(request.size)

    def certain(self) -> EpochPlan | None:
        """Return the plan where its batches depend on nothing else, else None: ask `draw`."""
        return self._plan


def allowed(request: Any) -> NDArray[np.uint32]:
    """Return the ids that the epoch may draw, ascending, uint32."""
    ids = np.arange(request.num_samples) if request.excluded is None else np.flatnonzero(~request.excluded)
    return ids.astype(np.uint32)


def shuffled(request: Any) -> NDArray[np.uint32]:
    """Return the same in random order."""
    # numpy shuffles 8-byte integers faster than others, by more than the conversion costs.
    order: NDArray[np.int64] = request.rng.permutation(allowed(request).astype(np.int64))
    return order.astype(np.uint32)
