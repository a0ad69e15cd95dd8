"""Several processes, one plan: the global batch is formed first, then cut by rank.

A strategy's batch has an order (by loss quartile, by bin), so each rank takes places drawn at random: the slices are
alike in expectation. Losses are put back into the batch's order, in which all that is derived from them is derived:
it is the same to the bit on any number of ranks. Slices have one size, since an average of averages would weigh the
samples of a smaller slice more.

Nothing but losses has to travel for the ranks to stay equal, as all else follows from the same
seed. What does not follow from it travels along with every report: the time (rank 0's counts for
everyone), signals and commands (any rank's count for everyone), and a hash of the plan, so that ranks
that differ are found at once and not after a wasted run.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.clock import Clock
from learnit_r8.core.rng import Purpose, RandomStreams
from learnit_r8.errors import CheckpointError, ProtocolError
from learnit_r8.loop.callbacks import SaveCallback
from learnit_r8.loop.losses import Reported, read_losses
from learnit_r8.samples.catalog import LossCatalog
from learnit_r8.types import Command, Indices

_COUNT, _HASH, _SECONDS, _WORD = range(4)
_HEADER = _WORD + 5
_COMMANDS: tuple[Command | None, ...] = (None, *Command)


class Word(NamedTuple):
    """What a rank says beside its losses; after the exchange, what all of them have to hear."""

    signal: int = 0
    command: Command | None = None
    saves: bool = False  # a checkpoint is asked for that all ranks write
    skipped: bool = False  # the optimizer step
    shares: bool = False  # rank 0 has logged what all have to hear

    def numbers(self) -> list[float]:
        """Return it as numbers of which the highest of all ranks counts."""
        return [self.signal, _COMMANDS.index(self.command), self.saves, self.skipped, self.shares]

    @classmethod
    def of_all(cls, numbers: NDArray[np.float64]) -> Self:
        """Return what all have to hear; `numbers` of each rank, `[world, 5]`."""
        signal, command, saves, skipped, shares = numbers.max(axis=0).tolist()
        return cls(int(signal), _COMMANDS[int(command)], bool(saves), bool(skipped), bool(shares))


class SharedClock(Clock):
    """Rank 0's time as of the last report, so that budgets of seconds end at the same step everywhere."""

    now = 0.0

    def monotonic(self) -> float:
        """Return it."""
        return self.now


class Ranks:
    """This process's place among the others, all of which hold one plan.

    Args:
        rank, world_size: Of the slices.
        all_gather: `(array) -> array`: every rank's array, concatenated in rank order. Where several processes train
            on one slice (tensor parallelism), it has the attributes `slices`, the number of each process's slice, and
            `place`, this process's number.
        clock: This process's time.
        plan: Text that is equal on all ranks of a run.

    Attributes:
        rank, world_size: Of the processes; `slice`, `slices`: of the parts that a step's samples have.
        clock: The time that all ranks agree on.
        writes: Whether this rank writes checkpoints; `writes_alone`: for all ranks.
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
        self.writes = self.rank == 0
        self.writes_alone = self.exchanges = world_size > 1
        self._all_gather, self._local, self._created = all_gather, clock, clock.monotonic()
        self._shared = SharedClock()
        self.clock = clock if world_size == 1 else self._shared
        self._hash = zlib.crc32(plan.encode())

    def new_catalog(self, num_samples: int) -> LossCatalog:
        """Return the catalog of the samples that this rank knows: all."""
        return LossCatalog(num_samples)

    def order(self, size: int, streams: RandomStreams, epoch: int, cursor: int) -> Indices | None:
        """Return the places of a global batch that each rank takes, `[slices, share]`; None: this one takes all."""
        if self.slices == 1:
            return None
        if size % self.slices:
            raise ProtocolError(
                f"the strategy drew {size} samples for {self.slices} ranks, whose slices would differ in size and "
                "weigh their samples differently: let draw(request) return a multiple of request.multiple samples"
            )
        return streams.at(Purpose.SLICES, epoch, cursor).permutation(size).reshape(self.slices, -1)

    def of_plans(self, number: float) -> NDArray[np.float64]:
        """Return this number of each plan there is: of all ranks where each has one, else this rank's own."""
        return np.array([number], np.float64)

    def everyone(self, *numbers: float) -> NDArray[np.float64]:
        """Return this number of every rank, shape `[world_size]`, or these, `[world_size, n]`. All ranks call it."""
        mine = np.array(numbers, np.float64)
        if self.world_size > 1:
            assert self._all_gather is not None
            mine = np.asarray(self._all_gather(mine), dtype=np.float64).ravel()
        return mine if len(numbers) == 1 else mine.reshape(-1, len(numbers))

    def tell(self, text: str) -> str:
        """Return what rank 0 has to say, which alone gives a text. All ranks must call it."""
        assert self._all_gather is not None
        mine = np.frombuffer(text.encode(), np.uint8).astype(np.float64)
        return bytes(np.asarray(self._all_gather(mine)).astype(np.uint8).tolist()).decode()

    def gather(
        self, reported: Reported, indices: Indices, order: Indices | None, step: int, word: Word
    ) -> tuple[Reported, Word]:
        """Return the report of the global batch, and what all ranks have to hear; one rank's NaN is every rank's."""
        values = np.array([reported.mean]) if reported.values is None else reported.values
        count = 0 if reported.values is None else len(values)
        counts, parts, word = self._exchange(values, count, indices.tobytes(), step, word)
        if word.skipped and not np.isfinite(np.concatenate(parts)).all():  # who had no losses sends one NaN
            return Reported(None, math.nan, finite=False), word
        if len(self._firsts) < len(parts):
            counts, parts = counts[self._firsts], [self._agreed(parts, number) for number in range(self.slices)]
        losses = np.concatenate(parts)
        joined = self._join(counts, losses, len(indices))
        if order is not None and joined.values is not None:
            values = np.empty_like(losses)
            values[order.ravel()] = losses
            joined = read_losses(values, len(values))
        return joined, word

    def _exchange(
        self, values: NDArray[Any], count: int, plan: bytes, step: int, word: Word
    ) -> tuple[NDArray[np.float64], list[NDArray[np.float64]], Word]:
        """Return every rank's `count`, `[world]`, every rank's values, and what all have to hear.

        `count` is that of the values, 0 for a single number that stands for all samples; `plan` has to be equal on all
        ranks.
        """
        assert self._all_gather is not None
        self._hash = zlib.crc32(plan, zlib.crc32(str(step).encode(), self._hash))
        header = [count, self._hash, self._local.monotonic() - self._created, *word.numbers()]
        everyone = np.asarray(self._all_gather(np.concatenate([header, values])), dtype=np.float64).ravel()
        found, parts, end = [], [], 0
        while (start := end + _HEADER) < len(everyone):
            found.append(everyone[end:start])
            end = start + max(int(found[-1][_COUNT]), 1)
            parts.append(everyone[start:end])
        if len(found) != self.world_size or end != len(everyone):
            raise ProtocolError(
                f"all_gather returned {len(everyone)} numbers from which {len(found)} reports of {self.world_size} "
                "could be read: it must return all ranks' arrays, of different lengths, concatenated in rank order"
            )
        headers = np.stack(found)
        if len(different := np.flatnonzero(headers[:, _HASH] != headers[0, _HASH])):
            raise ProtocolError(
                f"the ranks' plans differ at step {step}: rank 0 has hash {int(headers[0, _HASH]):08x}, rank "
                f"{different[0]} has {int(headers[different[0], _HASH]):08x}: give all ranks the same arguments, data "
                "set and checkpoint, and a strategy that depends on nothing else"
            )
        self._shared.now = float(headers[0, _SECONDS])
        return headers[:, _COUNT], parts, Word.of_all(headers[:, _WORD:])

    def _agreed(self, parts: list[NDArray[np.float64]], number: int) -> NDArray[np.float64]:
        """Return what the processes of a slice report; one's NaN is the slice's."""
        same = [part for part, of in zip(parts, self._of_process, strict=True) if of == number]
        if len({len(part) for part in same}) > 1:
            raise ProtocolError(
                f"processes that share slice {number} reported {[len(part) for part in same]} losses: they train on "
                "the same samples, and report the same losses"
            )
        return np.asarray(np.maximum.reduce(same))  # equal, up to rounding

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


class SaveTogether(SaveCallback):
    """A `save_callback` that runs on all ranks at once: of a sharded model, no rank holds all.

    Rank 0 writes the checkpoint as ever. Where it would call the user's function, it tells the others the path, and all
    call it; the checkpoint is whole only if none of them failed.
    """

    def __init__(self, save: SaveCallback, ranks: Ranks) -> None:
        self.collective = True
        self._save, self._ranks = save, ranks
        self._told = False

    def prepare(self) -> None:
        """There is nothing to get ready for."""

    def lead(self, write: Callable[[], Path]) -> Path:
        """Write a checkpoint on rank 0 while the others `follow`; `write` calls this object with the model's path."""
        self._told, path = False, ""
        try:
            path = str(write())
        finally:
            if not self._told:  # it failed before the model's turn: the others wait for that
                self._ranks.tell("")
            self._ranks.tell(path)
        return Path(path)

    def follow(self, state: Callable[[], dict[str, Any]]) -> Path:
        """Do on another rank what rank 0 does in `lead`; return the checkpoint's path."""
        failure = "rank 0 could not write it"
        if path := self._ranks.tell(""):
            try:
                self._on_all(state, Path(path))
            except CheckpointError as error:
                failure = str(error)
        if saved := self._ranks.tell(""):
            return Path(saved)
        raise CheckpointError(f"no checkpoint was written; what lay there is kept: {failure}")

    def __call__(self, state: Callable[[], dict[str, Any]], path: Path) -> None:
        """Save the model on all ranks; rank 0 calls it."""
        self._told = True
        self._ranks.tell(str(path))
        self._on_all(state, path)

    def _on_all(self, state: Callable[[], dict[str, Any]], path: Path) -> None:
        lacks, failure = not path.parent.is_dir(), ""
        if self._ranks.everyone(lacks).any():
            raise CheckpointError(
                f"{path.parent} is not there on {'this' if lacks else 'another'} rank: give a checkpoint_dir on "
                "storage that all ranks share"
            )
        try:
            self._save(state, path)
        except Exception as error:
            failure = f"save_callback failed: {type(error).__name__}: {error}"
        if self._ranks.everyone(bool(failure)).any():
            raise CheckpointError(failure or "save_callback failed on another rank")
