"""Several processes, one plan: the global batch is formed first, then cut by rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.errors import ProtocolError
from learnit_r8.loop.losses import Reported, read_losses


class Ranks:
    """This process's place among the others.

    Args:
        rank: From 0.
        world_size: Number of processes.
        all_gather: `(array) -> array`: every rank's array, concatenated in rank order.
    """

    def __init__(self, rank: int, world_size: int, all_gather: Callable[[NDArray[Any]], NDArray[Any]] | None) -> None:
        self.rank = rank
        self.world_size = world_size
        self._all_gather = all_gather

    def cut(self, size: int) -> slice:
        """Return this rank's part of a global batch: contiguous, sizes differ by one at most."""
        share, rest = divmod(size, self.world_size)
        start = self.rank * share + min(self.rank, rest)
        return slice(start, start + share + (self.rank < rest))

    def everyone(self, number: float) -> NDArray[np.float64]:
        """Return this number of every rank, shape `[world_size]`. All ranks must call it."""
        mine = np.array([number], np.float64)
        if self.world_size == 1:
            return mine
        assert self._all_gather is not None
        return np.asarray(self._all_gather(mine), dtype=np.float64).ravel()

    def gather(self, reported: Reported, size: int) -> Reported:
        """Return the report of the global batch; one rank's NaN is every rank's NaN.

        Args:
            reported: This rank's report.
            size: Samples in the global batch.

        Raises:
            ProtocolError: Some ranks reported per sample and others one number.
        """
        assert self._all_gather is not None
        mine = np.array([reported.mean]) if reported.values is None else reported.values.astype(np.float64)
        everyone = np.asarray(self._all_gather(mine), dtype=np.float64).ravel()
        if len(everyone) == size:
            return read_losses(everyone, size)
        if len(everyone) == self.world_size:
            shares = [Ranks(rank, self.world_size, None).cut(size) for rank in range(self.world_size)]
            sizes = np.array([part.stop - part.start for part in shares])
            return read_losses(float(everyone @ sizes) / size, size)
        raise ProtocolError(
            f"all_gather returned {len(everyone)} losses for a global batch of {size} samples on {self.world_size} "
            "ranks: report per-sample losses on every rank, or one number on every rank"
        )
