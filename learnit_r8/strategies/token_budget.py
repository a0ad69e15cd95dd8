"""Batches of as many samples as fit a budget of tokens, each sample once an epoch."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from learnit_r8.core.config import Problems
from learnit_r8.core.state import Saved, table
from learnit_r8.errors import ConfigError, ProtocolError
from learnit_r8.strategies.base import BatchRequest, Draw
from learnit_r8.strategies.contract import sound
from learnit_r8.strategies.plan import allowed

_WINDOW = 2048
"""Samples that are packed together: enough for a fill of 95 to 99%, few enough for a batch to stay random."""


@sound
class TokenBudget(Saved):
    """Batches whose samples fit into a number of tokens; their own number varies, `batch_size` is the most.

    Padded batches are of samples of nearly one length, and a batch takes `samples x its longest`. Packed ones
    (`padded=False`, for models that take sequences end to end) take the sum of their lengths, and mix all lengths.
    Which samples share a batch, and the order of the batches, are random in each epoch. With several ranks the
    budget is for all of them together, and each rank's slice of a padded batch is within its part of it: no sample may
    be longer than that. Where the samples cannot be shared equally, an epoch leaves out the few that are over.

    Args:
        lengths: Tokens of each sample, whole numbers from 1, `[num_samples]`.
        max_tokens: The most that a batch may take.
        padded: Whether short samples are padded to the batch's longest.

    Raises:
        ConfigError: Lengths that are none, or longer than a batch.
    """

    catalogs = False
    covers = True
    _saved = table(order=np.uint32, ends=np.int64, taken=int)

    def __init__(self, lengths: ArrayLike, max_tokens: int = 8192, *, padded: bool = True) -> None:
        problems = Problems()
        self.max_tokens = problems.integer("max_tokens", max_tokens, 1)
        self.padded = problems.flag("padded", padded)
        values = np.asarray(lengths)
        if values.ndim != 1 or not len(values) or values.dtype.kind not in "iu" or values.min() < 1:
            problems.append(
                f"lengths must be whole numbers from 1, one a sample, in a 1-D array, got shape {values.shape}, dtype "
                f"{values.dtype}"
            )
        elif len(long := np.flatnonzero(values > self.max_tokens)):
            problems.append(
                f"lengths must be at most max_tokens={self.max_tokens}, and {len(long)} samples are longer, the first "
                f"ones {long[:8].tolist()}: cut them, or raise max_tokens"
            )
        problems.raise_if_any()
        self._lengths = values.astype(np.int64)
        self._order = np.zeros(0, np.uint32)
        self._ends = np.zeros(0, np.int64)  # of each batch, in the order
        self._taken = 0  # samples of the order that were drawn

    @property
    def batches_left(self) -> int:
        """Batches of the epoch that are not drawn yet."""
        return len(self._ends) - int(np.searchsorted(self._ends, self._taken, "right"))

    def start_epoch(self, request: BatchRequest) -> int:
        """Plan the epoch's batches; return how many samples they have.

        Raises:
            ConfigError: More or fewer lengths than samples, or one that is longer than a rank's part of the budget.
            ProtocolError: Packed batches on several ranks, whose slices would not be of one size.
        """
        if len(self._lengths) != request.num_samples:
            raise ConfigError([f"lengths must be one a sample: {len(self._lengths)} for {request.num_samples} samples"])
        if not self.padded and request.multiple > 1:
            raise ProtocolError(
                "TokenBudget(padded=False) works on one rank: slices of a packed batch have equal samples, not equal "
                "tokens. Use padded=True, or pack the samples beforehand"
            )
        rng = request.rng
        self._plan(rng.permutation(allowed(request)), rng, request)
        return len(self._order)

    def _plan(self, shuffled: NDArray[Any], rng: np.random.Generator, request: BatchRequest) -> None:
        batches = self._padded_batches(shuffled, request) if self.padded else self._packed_batches(shuffled, request)
        places = rng.permutation(len(batches))
        self._order = np.concatenate([batches[k] for k in places]).astype(np.uint32)
        self._ends = np.cumsum([len(batches[k]) for k in places])
        self._taken = 0

    def _padded_batches(self, shuffled: NDArray[Any], request: BatchRequest) -> list[NDArray[Any]]:
        ranks = request.multiple
        shuffled = shuffled[: len(shuffled) - len(shuffled) % ranks]
        part = self.max_tokens // ranks
        if len(long := shuffled[self._lengths[shuffled] > part]):
            raise ConfigError(
                f"lengths must be at most {part}, the part of max_tokens={self.max_tokens} that each of {ranks} "
                f"ranks has, and {len(long)} samples are longer, the first ones {np.sort(long)[:8].tolist()}: cut "
                "them, or raise max_tokens"
            )
        ids = shuffled[np.argsort(self._lengths[shuffled], kind="stable")]  # equal lengths stay shuffled
        lengths, batches, stop = self._lengths[ids], [], len(ids)
        # From the longest down: each batch takes what its longest sample allows.
        while stop:
            count = min(self.max_tokens // int(lengths[stop - 1]), request.size, stop)
            count -= count % ranks
            batches.append(ids[stop - count : stop])
            stop -= count
        return batches

    def _packed_batches(self, shuffled: NDArray[Any], request: BatchRequest) -> list[NDArray[Any]]:
        """Best fit, the longest first (Johnson 1973), a window of random samples at a time."""
        batches: list[NDArray[Any]] = []
        bins: list[list[int]] = []
        for start in range(0, len(shuffled), _WINDOW):
            window = shuffled[start : start + _WINDOW]
            # Tokens that are left in a batch, and which one it is.
            free = sorted((self.max_tokens - int(self._lengths[b].sum()), k) for k, b in enumerate(bins))
            for sample in window[np.argsort(-self._lengths[window], kind="stable")].tolist():
                length = int(self._lengths[sample])
                place = bisect_left(free, (length, -1))
                if place == len(free):
                    bins.append([])
                    free.append((self.max_tokens, len(bins) - 1))
                    place = len(free) - 1
                left, which = free.pop(place)
                bins[which].append(sample)
                if left > length and len(bins[which]) < request.size:
                    insort(free, (left - length, which))
            # What is nearly full is done; the others get more of the next window.
            done = [sum(self._lengths[b]) >= 0.98 * self.max_tokens or len(b) >= request.size for b in bins]
            batches += [np.array(b) for b, full in zip(bins, done, strict=True) if full]
            bins = [b for b, full in zip(bins, done, strict=True) if not full]
        return batches + [np.array(b) for b in bins]

    def draw(self, request: BatchRequest) -> Draw:
        """Return the next batch; where `batch_size` is smaller than when the epoch was planned, a part of it."""
        if self._taken >= len(self._order):
            self.start_epoch(request)
        end = int(self._ends[np.searchsorted(self._ends, self._taken, "right")])
        if (end - self._taken) % request.multiple:  # planned for another number of ranks
            self._plan(self._order[self._taken :].astype(np.int64), request.rng, request)
            end = int(self._ends[0])
        start, self._taken = self._taken, min(end, self._taken + request.size)
        return Draw(self._order[start : self._taken].astype(np.int64))
