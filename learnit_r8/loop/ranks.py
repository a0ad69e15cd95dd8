"""Several processes, one plan: the global batch is formed first, then cut by rank.

A strategy's batch has an order (by loss quartile, by bin), so each rank takes places drawn at random: the slices are
alike in expectation. Losses are put back into the batch's order, in which all that is derived from them is derived:
it is the same to the bit on any number of ranks. Slices have one size, since an average of averages would weigh the
samples of a smaller slice more.

Nothing but losses has to travel for the ranks to stay equal, as all else follows from the same
seed. What does not follow from it travels along with every report: the time (rank 0's counts for
everyone), signals, commands and a damaged model (any rank's count for everyone), and a hash of the
plan, so that ranks that differ are found at once and not after a wasted run.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.clock import Clock
from learnit_r8.core.rng import Purpose, RandomStreams
from learnit_r8.errors import ProtocolError
from learnit_r8.loop.losses import Reported, read_losses
from learnit_r8.types import Command, Indices

_COUNT, _HASH, _SECONDS, _SIGNAL, _COMMAND, _DAMAGED, _SAVE, _HEADER = range(8)
_COMMANDS: tuple[Command | None, ...] = (None, *Command)


class SharedClock(Clock):
    """Rank 0's time as of the last report, so that budgets of seconds end at the same step everywhere."""

    now = 0.0

    def monotonic(self) -> float:
        """Return rank 0's seconds."""
        return self.now


class Ranks:
    """This process's place among the others.

    Args:
        rank: From 0.
        world_size: Number of processes.
        all_gather: `(array) -> array`: every rank's array, concatenated in rank order. Where several processes train
            on one slice (tensor parallelism), it has the attributes `slices`, the number of each process's slice, and
            `place`, this process's number; `rank` and `world_size` are those of the slices then.
        clock: This process's time.
        plan: Text that is equal on all ranks of a run.

    Attributes:
        rank: Number of this process.
        world_size: Number of processes.
        slice: Number of this process's slice of a batch.
        slices: Number of slices.
        clock: The time that all ranks agree on.
        asked: A command that a sink of this rank gave; `command` on all ranks after the next report.
        command: The command that a rank was given, or None.
        damaged_since: Step at which this rank's model was damaged, or None; after the next report, any rank's.
        writes: Whether this rank writes checkpoints.
        writes_alone: Whether one rank writes for all.
        exchanges: Whether reports are exchanged.
        signal: The signal that a rank got, or 0.
        asks_save: This rank was asked for a checkpoint that all have to write; `save` on all after the next report.
        save: A rank was asked for one.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        all_gather: Callable[[NDArray[Any]], NDArray[Any]] | None,
        clock: Clock,
        plan: str,
    ) -> None:
        self.slice, self.slices = rank, world_size
        self._of_process = of_process = np.asarray(getattr(all_gather, "slices", np.arange(world_size)))
        self.rank = int(getattr(all_gather, "place", rank))
        self.world_size = world_size = len(of_process)
        self._firsts = np.unique(of_process, return_index=True)[1]  # a process of each slice
        self.asks_save = self.save = False
        self.asked: Command | None = None
        self.command: Command | None = None
        self.damaged_since: int | None = None
        self.signal = 0
        self.writes = self.rank == 0
        self.writes_alone = self.exchanges = world_size > 1
        self._all_gather = all_gather
        self._local = clock
        self._created = clock.monotonic()
        self._shared = SharedClock()
        self.clock = clock if world_size == 1 else self._shared
        self._hash = zlib.crc32(plan.encode())

    def order(self, size: int, streams: RandomStreams, epoch: int, cursor: int) -> Indices | None:
        """Return the places of a global batch in the order in which the ranks take them; None: as they are.

        Args:
            size: Samples in the global batch.
            streams: The run's randomness.
            epoch: Of the batch.
            cursor: Number of the batch within the epoch.

        Raises:
            ProtocolError: The ranks cannot have equal shares of it.
        """
        if self.slices == 1:
            return None
        if size % self.slices:
            raise ProtocolError(
                f"the strategy drew {size} samples for {self.slices} ranks, whose slices would differ in size and "
                "weigh their samples differently: let draw(request) return a multiple of request.multiple samples"
            )
        return streams.at(Purpose.SLICES, epoch, cursor).permutation(size)

    def cut(self, size: int) -> slice:
        """Return this rank's part of what `order` returned."""
        share = size // self.slices
        return slice(self.slice * share, (self.slice + 1) * share)

    def everyone(self, number: float) -> NDArray[np.float64]:
        """Return this number of every rank, shape `[world_size]`. All ranks must call it."""
        mine = np.array([number], np.float64)
        if self.world_size == 1:
            return mine
        assert self._all_gather is not None
        return np.asarray(self._all_gather(mine), dtype=np.float64).ravel()

    def tell(self, text: str) -> str:
        """Return what rank 0 has to say, which alone gives a text. All ranks must call it."""
        assert self._all_gather is not None
        mine = np.frombuffer(text.encode(), np.uint8).astype(np.float64)
        return bytes(np.asarray(self._all_gather(mine)).astype(np.uint8).tolist()).decode()

    def gather(
        self, reported: Reported, indices: Indices, order: Indices | None, step: int, signal: int | None
    ) -> Reported:
        """Return the report of the global batch; one rank's NaN is every rank's NaN.

        Args:
            reported: This rank's report.
            indices: The global batch.
            order: The places in it that the ranks' losses belong to, in rank order; None: as they are.
            step: Global step.
            signal: A signal that this process got.

        Raises:
            ProtocolError: The ranks' plans differ, or some reported per sample and others one number.
        """
        values = np.array([reported.mean]) if reported.values is None else reported.values
        count = 0 if reported.values is None else len(values)
        counts, losses = self.exchange(values, count, indices.tobytes(), step, signal)
        reported = self._join(counts, losses, len(indices))
        if order is None or reported.values is None:
            return reported
        values = np.empty_like(losses)
        values[order] = losses
        return read_losses(values, len(values))

    def exchange(
        self, values: NDArray[Any], count: int, plan: bytes, step: int, signal: int | None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return every rank's `count`, `[world]`, and all ranks' values, joined.

        Args:
            values: This rank's numbers.
            count: How many they are; 0 for a single number that stands for all samples.
            plan: Bytes that have to be equal on all ranks.
            step: Global step.
            signal: A signal that this process got.

        Raises:
            ProtocolError: The ranks' plans differ.
        """
        assert self._all_gather is not None
        self._hash = zlib.crc32(plan, zlib.crc32(str(step).encode(), self._hash))
        header = np.empty(_HEADER)
        header[_COUNT] = count
        header[_HASH] = self._hash
        header[_SECONDS] = self._local.monotonic() - self._created
        header[_SIGNAL] = signal or 0
        header[_COMMAND] = _COMMANDS.index(self.asked)
        header[_SAVE] = self.asks_save
        header[_DAMAGED] = np.inf if self.damaged_since is None else self.damaged_since
        everyone = np.asarray(self._all_gather(np.concatenate([header, values])), dtype=np.float64).ravel()
        headers, parts = self._split(everyone)
        self._compare(headers[:, _HASH], step)
        if len(self._firsts) < len(parts):
            parts = [self._agreed(parts, number) for number in range(self.slices)]
        losses = np.concatenate(parts)
        self._shared.now = float(headers[0, _SECONDS])
        self.signal = int(headers[:, _SIGNAL].max())
        self.command, self.asked = _COMMANDS[int(headers[:, _COMMAND].max())], None
        since = headers[:, _DAMAGED].min()
        self.damaged_since = int(since) if since < np.inf else None
        self.asks_save, self.save = False, self.save or bool(headers[:, _SAVE].any())
        return headers[self._firsts, _COUNT], losses

    def _split(self, everyone: NDArray[np.float64]) -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
        """Return the ranks' headers, `[world, header]`, and what follows each."""
        headers, losses, start = [], [], 0
        while start + _HEADER < len(everyone):
            headers.append(everyone[start : start + _HEADER])
            end = start + _HEADER + max(int(headers[-1][_COUNT]), 1)
            losses.append(everyone[start + _HEADER : end])
            start = end
        if len(headers) != self.world_size or start != len(everyone):
            raise ProtocolError(
                f"all_gather returned {len(everyone)} numbers from which {len(headers)} reports of {self.world_size} "
                "could be read: it must return all ranks' arrays, of different lengths, concatenated in rank order"
            )
        return np.stack(headers), losses

    def _agreed(self, parts: list[NDArray[np.float64]], number: int) -> NDArray[np.float64]:
        """Return what the processes of a slice report; one's NaN is the slice's."""
        same = [part for part, of in zip(parts, self._of_process, strict=True) if of == number]
        if len({len(part) for part in same}) > 1:
            raise ProtocolError(
                f"processes that share slice {number} reported {[len(part) for part in same]} losses: they train on "
                "the same samples, and report the same losses"
            )
        highest: NDArray[np.float64] = np.maximum.reduce(same)  # equal, up to rounding
        return highest

    def _compare(self, hashes: NDArray[np.float64], step: int) -> None:
        different = np.flatnonzero(hashes != hashes[0])
        if len(different):
            other = int(different[0])
            raise ProtocolError(
                f"the ranks' plans differ at step {step}: rank 0 has hash {int(hashes[0]):08x}, rank {other} has "
                f"{int(hashes[other]):08x}: give all ranks the same arguments, data set and checkpoint, and a strategy "
                "that depends on nothing else"
            )

    def _join(self, counts: NDArray[np.float64], losses: NDArray[np.float64], size: int) -> Reported:
        if len(losses) == size and counts.all():
            return read_losses(losses, size)
        if not counts.any():
            return read_losses(float(losses.mean()), size)
        raise ProtocolError(
            f"there came {len(losses)} losses for a global batch of {size} samples on {self.slices} ranks, by rank "
            f"{[int(count) for count in counts]} (0: one number for all of them): report per-sample losses on every "
            "rank, or one number on every rank"
        )
