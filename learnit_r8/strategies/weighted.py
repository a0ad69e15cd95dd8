"""Samples drawn as often as their weights say: fixed weights, or ones that change in the run.

Nothing is corrected: the weights are what the user wants to train on. (`"prioritized"`, `"adaptive"` and `"reward"`
choose weights themselves, and correct the bias.) A batch is a systematic sample (Madow 1949) of the samples in random
order: a sample of weight w is in it either the whole number of times below or above `size w / sum w`, and over the
run as often as its weight says.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from learnit_r8.core.arrays import as_losses, read_only
from learnit_r8.core.state import Saved, sized, table
from learnit_r8.errors import ConfigError
from learnit_r8.strategies.base import BatchRequest, Draw
from learnit_r8.strategies.contract import sound
from learnit_r8.strategies.plan import allowed
from learnit_r8.strategies.weighting import as_ids, next_phase
from learnit_r8.structures.sum_tree import MAX_WEIGHT, SumTree


@sound
class Weighted(Saved):
    """Draws each sample in proportion to its weight, on any number of ranks.

    A heavy sample may be in a batch more than once, as with torch's `WeightedRandomSampler`, whose use on one process
    this does on all. One of weight 0 is never drawn. Samples that are excluded (quarantine, noise guard) are left out,
    and the others keep their proportions. An epoch is as many draws as there are samples that may be drawn.

    Args:
        weights: Not negative, at least one positive, `[num_samples]`.

    Raises:
        ConfigError: Weights that are none.
    """

    catalogs = False
    replacement = True
    _saved = table(weights=sized(np.float64, lambda me: len(me._weights), "strategy"), order=np.uint32, phase=float)

    def __init__(self, weights: ArrayLike) -> None:
        self._weights = _checked(weights)
        if self._weights.ndim != 1 or not self._weights.any():
            shape = self._weights.shape
            raise ConfigError(f"weights must be a 1-D array with a positive one, got shape {shape} of all zeros")
        self._order = np.arange(len(self._weights), dtype=np.uint32)
        self._phase = 0.0
        self._state_taken()

    def _state_taken(self) -> None:
        self._slots = np.full(len(self._weights), -1, np.int64)
        self._slots[self._order] = np.arange(len(self._order))
        self._tree = SumTree(len(self._weights))
        self._tree.fill(np.pad(self._weights[self._order], (0, len(self._weights) - len(self._order))))

    @property
    def weights(self) -> NDArray[np.float64]:
        """The weight of each sample, read-only, `[num_samples]`."""
        return read_only(self._weights)

    def set(self, ids: ArrayLike, weights: ArrayLike) -> None:
        """Give samples other weights, from the next batch on; with several ranks, on each of them.

        Args:
            ids: Sample ids, `[n]`.
            weights: Not negative, `[n]` or one for all.

        Raises:
            ConfigError: Weights that are none, or not one for each id; or no sample would have any.
            ValueError: There is no such sample.
        """
        indices = as_ids(ids, len(self._weights))
        values = _checked(weights)
        if values.ndim and values.shape != indices.shape:
            raise ConfigError([f"weights must be one for each of the {len(indices)} ids, got shape {values.shape}"])
        changed = self._weights.copy()
        changed[indices] = values
        if not changed.any():
            raise ConfigError(["weights must leave a positive one, and all would be 0"])
        self._weights = changed
        slots = self._slots[indices]
        self._tree.set(slots[slots >= 0], changed[indices][slots >= 0])

    def start_epoch(self, request: BatchRequest) -> None:
        """Put the samples that may be drawn in a new random order.

        Raises:
            ConfigError: More or fewer weights than samples, or none of those that may be drawn has a weight.
        """
        if request.num_samples != len(self._weights):
            raise ConfigError([f"weights must be one a sample: {len(self._weights)} for {request.num_samples} samples"])
        self._order = allowed(request)
        if not self._weights[self._order].any():
            raise ConfigError(["no sample with a weight is left to draw: all of them are excluded"])
        request.rng.shuffle(self._order)
        self._state_taken()

    def draw(self, request: BatchRequest) -> Draw:
        """Return a batch by weight, also on probation after a rollback."""
        if not self._tree.total:
            raise ConfigError(["no sample with a weight is left to draw: the others are excluded"])
        self._phase = next_phase(self._phase)
        slots = self._tree.draw((np.arange(request.size) + self._phase) / request.size)
        return Draw(self._order[slots].astype(np.int64))


def _checked(weights: Any) -> NDArray[np.float64]:
    values = as_losses(weights)
    if not ((values >= 0) & (values <= MAX_WEIGHT)).all():
        raise ConfigError([f"weights must be finite and not negative, got {np.array2string(values, threshold=8)}"])
    return values
