"""From scores to draws: one sampler and one bias correction for every weighted strategy.

A weighted strategy gives each sample a weight `w_i >= 0`, hence a preference `p_i = w_i / sum w`.
Three rules make of it a batch whose inclusion probabilities are known exactly:

1. Draws come from the defensive mixture `q_i = (1 - s) p_i + s / n` (Hesterberg 1995, "Weighted
   average importance sampling and defensive mixture distributions") over the n samples that may
   be drawn. The share s is at least 0.2, so no importance weight `1 / (n q_i)` exceeds 5. The
   tree holds `w_i + floor`; the floor is set anew, in O(n), only when s has left [0.2, 0.25].
2. A batch of B is a systematic sample (Madow 1949) of the samples in random order (Hartley & Rao
   1962): B points one B-th of the total apart hit no sample twice and hit sample i with
   probability `B q_i`, exactly. Drawing one after another has neither property.
3. Where `B q_i > 1`, sample i is in every batch and the others share the rest of it; its
   probability is reported as `1 / B`.

The offset of the points moves by the golden ratio from batch to batch, the sequence of lowest
discrepancy, so that over an epoch each sample is drawn about as often as it should be: with
equal weights an epoch is nearly a permutation.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from learnit_r8.core.arrays import as_array, read_only
from learnit_r8.core.portable import JSON_SIZE
from learnit_r8.core.rng import Purpose, RandomStreams
from learnit_r8.core.state import Kind, Saved, alone, each, kind, maybe, part, same, table
from learnit_r8.errors import ConfigError
from learnit_r8.strategies.base import BatchRequest, Draw
from learnit_r8.structures.sum_tree import SumTree
from learnit_r8.types import Indices, Mask

Floats = NDArray[np.float64]

UNIFORM_SHARE = 0.2
"""Least share of uniform draws in the mixture."""
MAX_WEIGHT = 1 / UNIFORM_SHARE
"""No importance weight is larger."""
_FRESH_SHARE, _HIGHEST_SHARE, _MOST_UNIFORM = 0.22, 0.25, 0.999
_GOLDEN = (5**0.5 - 1) / 2
_ALMOST_ONE = 1 - 1e-9
_BATCHES_BEHIND = 4
_LARGE = 100_000
"""Samples from which on twice as many batches may be behind: there 8 are a smaller part of an epoch."""


class MixtureSampler(Saved):
    """Draws distinct samples from a defensive mixture over changing weights.

    A draw and an update of B weights cost O(B log N). All weights start at 1. With `uniform=0` draws are in
    proportion to the weights, and no importance weight is limited.
    """

    _saved = table(
        weights=np.float64,
        order=np.uint32,
        floor=float,
        phase=float,
        tree=Kind(lambda me, tree: tree.view[: len(me._order)].copy(), lambda me, saved: me._tree_of(saved)),
        behind=each(np.int64),
    )

    def __init__(self, num_samples: int, uniform: float = UNIFORM_SHARE) -> None:
        self._uniform = uniform
        self.weights: Floats = np.ones(num_samples)
        self._order = np.arange(num_samples, dtype=np.uint32)
        self._slots = np.arange(num_samples, dtype=np.int64)
        self._tree = SumTree(num_samples)
        self._floor = 0.0
        self._phase = 0.0
        self._most_behind = _BATCHES_BEHIND * (2 if num_samples >= _LARGE else 1)
        self._behind: list[Indices] = []  # samples whose weights the tree does not have yet
        self._ahead: deque[Draw] = deque()  # drawn from the tree as it is, the next batch first
        self._ahead_size = 0
        self._steps = np.arange(0.0)
        self._fill()

    def restart(self, weights: Floats, rng: np.random.Generator, excluded: Mask | None = None) -> None:
        """Take new weights, finite and not negative, and put the samples in a new random order; O(N)."""
        self.weights = weights
        order = np.arange(len(weights), dtype=np.uint32)
        self._order = order if excluded is None else order[~excluded]
        rng.shuffle(self._order)
        self._phase = float(rng.random())
        self._place()
        self._fill()

    def set(self, indices: Indices, weights: Floats) -> None:
        """Change the weights of some samples; where one is named twice the last counts.

        The tree follows a few batches at a time, which halves the cost of an update; at most a
        16th of the samples are behind. Reported probabilities are those of the tree.
        """
        self.weights[indices] = weights
        self._behind.append(indices)
        count = len(self._behind)
        if count >= self._most_behind or 16 * count * len(indices) >= len(self._order):
            self._catch_up()

    def _catch_up(self) -> None:
        self._ahead.clear()
        indices = np.concatenate(self._behind)
        self._behind.clear()
        slots = self._slots.take(indices)
        if len(self._order) < len(self.weights):  # some may be excluded since they were drawn
            indices, slots = indices[slots >= 0], slots[slots >= 0]
        self._tree.set(slots, self.weights.take(indices) + self._floor)
        base = self._floor * len(self._order)
        total = self._tree.total
        lowest, highest = self._uniform, self._uniform * _HIGHEST_SHARE / UNIFORM_SHARE
        if self._uniform and (base < lowest * total or (base > highest * total and base < _ALMOST_ONE * total)):
            self._fill()

    def draw(self, size: int) -> Draw:
        """Return `size` different samples (all of them where there are fewer)."""
        count = len(self._order)
        size = min(size, count)
        if size == count:
            self._phase = next_phase(self._phase)
            probabilities = np.full(count, 1 / max(count, 1))
            return Draw(self._order.astype(np.int64), probabilities, self._importance(probabilities))
        if not self._ahead or size != self._ahead_size:
            self._draw_ahead(size)
        self._phase = next_phase(self._phase)
        return self._ahead.popleft()

    def _draw_ahead(self, size: int) -> None:
        """Draw the batches that the tree will not change for, if each is reported before the next is drawn.

        One call for several batches halves the cost of a batch. Whenever the tree changes, what was
        drawn ahead is forgotten, so each batch is what it would be if it were drawn by itself.
        """
        phases = [self._phase]
        while len(phases) < self._most_behind - len(self._behind):
            phases.append(next_phase(phases[-1]))
        slots = self._tree.draw(self._points(size, *phases))
        values = self._tree.view.take(slots)
        if values.max() * size > self._tree.total * _ALMOST_ONE:
            slots, probabilities = self._draw_capped(size, self._phase)
        else:
            probabilities = values / self._tree.total
        indices = self._order.take(slots).astype(np.int64)
        weights = self._importance(probabilities)
        self._ahead_size = size
        self._ahead = deque(map(Draw, *(array.reshape(-1, size) for array in (indices, probabilities, weights))))

    def _draw_capped(self, size: int, phase: float) -> tuple[Indices, Floats]:
        """Draw where some samples are so heavy that they belong in every batch.

        Such a sample is wider than the distance between two points, so every draw finds it:
        which ones are set aside does not depend on the phase.
        """
        certain, widths = np.empty(0, np.int64), np.empty(0)
        try:
            while True:
                left = size - len(certain)
                slots = self._tree.draw(self._points(left, phase)) if left else certain[:0]
                values = self._tree.view.take(slots)
                found = np.unique(slots[values * left > self._tree.total * _ALMOST_ONE])
                if not len(found):
                    shares = values / self._tree.total * (left / size)
                    return np.append(certain, slots), np.append(np.full(len(certain), 1 / size), shares)
                certain, widths = np.append(certain, found), np.append(widths, self._tree.view.take(found))
                self._tree.set(found, np.zeros(len(found)))
        finally:
            self._tree.set(certain, widths)

    def _importance(self, probabilities: Floats) -> Floats:
        weights: Floats = 1.0 / (len(self._order) * probabilities)
        return np.minimum(weights, 1 / self._uniform) if self._uniform else weights

    def _points(self, size: int, *phases: float) -> Floats:
        if len(self._steps) != size:
            self._steps = np.arange(float(size))
        return np.asarray((self._steps + np.array(phases)[:, None]) / size).reshape(-1)

    def _place(self) -> None:
        self._slots = np.full(len(self.weights), -1, np.int64)
        self._slots[self._order] = np.arange(len(self._order))

    def _fill(self) -> None:
        """Set the floor for the current weights and build the tree; O(N)."""
        live = self.weights[self._order]
        mean = float(live.mean()) if len(live) else 0.0
        share = min(self._uniform * _FRESH_SHARE / UNIFORM_SHARE, _MOST_UNIFORM)
        self._floor = mean * share / (1 - share) if mean > 0 else 1.0
        self._tree.fill(self._padded(live + self._floor))
        self._behind.clear()
        self._ahead.clear()

    def _padded(self, values: Any) -> Floats:
        return np.pad(np.asarray(values, np.float64), (0, len(self.weights) - len(values)))

    def _tree_of(self, values: Any) -> SumTree:
        tree = SumTree(len(self.weights))
        tree.fill(self._padded(values))
        return tree

    def _state_taken(self) -> None:
        self._place()
        self._ahead = deque()


SAMPLER = part(lambda _, saved: MixtureSampler(len(saved["weights"])))
"""How a strategy saves its sampler."""


def next_phase(phase: float) -> float:
    """Return the offset of the next systematic sample."""
    return (phase + _GOLDEN) % 1.0


class WeightedStrategy(Saved):
    """Base of strategies that draw by weight. Subclasses define `epoch_weights`."""

    _saved = table(sampler=maybe(SAMPLER))

    def __init__(self) -> None:
        self._sampler: MixtureSampler | None = None

    def epoch_weights(self, request: BatchRequest) -> Floats:
        """Return the weight of each sample at an epoch's start, float64 `[N]`."""
        raise TypeError(f"{type(self).__name__} does not define epoch_weights(request)")

    def start_epoch(self, request: BatchRequest) -> None:
        """Take the weights from the catalog and a new random order."""
        weights = self.epoch_weights(request)
        if self._sampler is None or len(self._sampler.weights) != request.num_samples:  # there may be more since
            self._sampler = MixtureSampler(request.num_samples)
        self._sampler.restart(weights, request.rng, request.excluded)

    def draw(self, request: BatchRequest) -> Draw:
        """Return a batch from the mixture; samples of low loss where only stable ones are wanted."""
        if self._sampler is None:
            self.start_epoch(request)
        assert self._sampler is not None
        return Draw(draw_stable(request)) if request.stable_only else self._sampler.draw(request.size)


class WeightedSampler(Saved):
    """Base of the stand-alone samplers: a mixture sampler with its own randomness."""

    _as_json = JSON_SIZE
    _saved = table(
        round=int,
        drawn=int,
        uniform=kind(same("_uniform", "defensive"), absent=UNIFORM_SHARE),
        sampler=part(lambda sampler, saved: sampler._sampler_for(saved)),
    )

    def __init__(self, weights: Floats, seed: int, uniform: float = UNIFORM_SHARE) -> None:
        self._uniform = uniform
        self._streams = RandomStreams(seed)
        self._round = 0
        self._drawn = 0
        self._sampler = MixtureSampler(len(weights), uniform)
        self._sampler.restart(weights, self._streams.at(Purpose.PLAN, 0))

    def _sampler_for(self, state: dict[str, Any]) -> MixtureSampler:
        if len(state["weights"]) != len(self):
            raise ValueError(f"the state has {len(state['weights'])} samples, this sampler {len(self)}")
        return MixtureSampler(len(self), self._uniform)

    def __len__(self) -> int:
        return len(self._sampler.weights)

    @property
    def weights(self) -> Floats:
        """Preference of each sample before the mixture with uniform, read-only, adds up to 1."""
        total = self._sampler.weights.sum()
        shares = self._sampler.weights / total if total > 0 else np.full(len(self), 1 / len(self))
        return read_only(shares)

    @alone
    def sample(self, n: int | None = None, *, batch_size: int | None = None) -> tuple[Indices, NDArray[np.float32]]:
        """Draw a batch of different samples.

        Args:
            n: How many, at least 1; all come back, once each, when there are fewer.
            batch_size: Another name for `n`.

        Returns:
            Sample ids, int64 `[n]`, and importance weights `1 / (N q)`, float32 `[n]`: mean
            about 1, at most 5 (the inverse of the uniform share).

        Raises:
            ConfigError: `n` is missing, given twice or below 1, or above the number of samples that can be drawn.
        """
        size: Any = n if batch_size is None else batch_size
        whole = isinstance(size, (int, np.integer)) and not isinstance(size, bool)
        if not whole or size < 1 or None not in (n, batch_size):
            raise ConfigError([f"sample needs n >= 1 (or batch_size), got n={n!r}, batch_size={batch_size!r}"])
        if not self._uniform and len(self) > size > (able := int(np.count_nonzero(self._sampler.weights))):
            raise ConfigError([f"sample needs n <= {able} with defensive=0: no other sample has a weight, got {size}"])
        if self._drawn >= len(self):
            self._round += 1
            self._drawn = 0
            self._sampler.restart(self._sampler.weights, self._streams.at(Purpose.PLAN, self._round))
        draw = self._sampler.draw(int(size))
        self._drawn += len(draw.indices)
        assert draw.weights is not None
        return draw.indices.astype(np.int64, copy=False), draw.weights.astype(np.float32)


def draw_stable(request: BatchRequest) -> Indices:
    """Return samples of low loss: of four times as many uniform ones the lowest quarter.

    That keeps to the lower part of the losses without a pass over all of them.
    """
    count = request.num_samples
    pool = request.rng.choice(count, min(count, 4 * request.size), replace=False, shuffle=False)
    if request.excluded is not None:
        pool = pool[~request.excluded[pool]]
        if len(pool) < request.size:
            pool = np.flatnonzero(~request.excluded)
    losses = np.where(request.catalog.uses[pool] > 0, request.catalog.expected_of(pool), np.inf)
    if len(pool) > request.size:
        pool = pool[np.argpartition(losses, request.size - 1)[: request.size]]
    return pool.astype(np.int64, copy=False)


def fill_unseen(losses: ArrayLike, uses: NDArray[np.uint32]) -> Floats:
    """Return losses as float64 with the highest known one (1 where none is known) where `uses` is 0."""
    filled = np.array(losses, np.float64)
    seen = uses > 0
    if not seen.all():
        filled[~seen] = filled[seen].max() if seen.any() else 1.0
    return filled


def as_ids(indices: Any, size: int) -> Indices:
    """Return sample ids below `size`, an array or a tensor of any device, as int64 `[n]`; else raise ValueError."""
    ids = as_array(indices).reshape(-1)
    if len(ids) and ids.dtype.kind not in "iu":
        raise ValueError(f"indices must be integers, got dtype {ids.dtype}")
    ids = ids.astype(np.int64)
    if len(ids) and (ids.min() < 0 or ids.max() >= size):
        raise ValueError(f"indices must be in 0 .. {size - 1}, got {ids.min()} .. {ids.max()}")
    return ids
