"""Backups of the model's state in RAM that are used only once later losses have proved them.

The loss at step t tests the weights before update t, so a snapshot says nothing about itself:
"the latest backup" is poisoned exactly when it is needed. A backup is a CANDIDATE until enough
calm losses were reported at or after its step and every float array in it is finite; then it is
VERIFIED. `BackupRing.restore` hands out verified ones (and the initial state when there is none).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from learnit_r8.errors import ConfigError
from learnit_r8.stability.tree_copy import CopyPlan, Pool, TreeCopy

_REACH = 4  # intervals between two backups
_PACE_WEIGHT = 0.05  # about the last 20 steps


class BackupStatus(StrEnum):
    """How far a backup is proved."""

    CANDIDATE = "candidate"
    VERIFIED = "verified"
    DISCARDED = "discarded"


@dataclass(frozen=True, slots=True)
class BackupInfo:
    """Facts of one backup.

    Attributes:
        id: Unique within a run, rising.
        step: Updates that the state had seen, which is the next step that it will be trained at.
        nbytes: Size of its arrays, in bytes.
        seconds: Time that the copy took.
        initial: The state before training: eligible without proof when nothing else is.
        status: CANDIDATE, VERIFIED or DISCARDED.
        scan_seconds: Time that looking for NaN and infinity took, once that was done.
        damaged: DISCARDED only: paths of the arrays that were finite in an earlier backup and are not in this one.
    """

    id: int
    step: int
    nbytes: int
    seconds: float
    initial: bool
    status: BackupStatus
    scan_seconds: float = 0.0
    damaged: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BackupStats:
    """Totals of a run; seconds are wall-clock time."""

    taken: int = 0
    verified: int = 0
    discarded: int = 0
    restored: int = 0
    copy_seconds: float = 0.0
    scan_seconds: float = 0.0


@dataclass(slots=True)
class _Slot:
    info: BackupInfo
    copy: TreeCopy
    healthy: int = 0


class BackupRing:
    """A few deep copies of the training state, their buffers used again and again.

    When the ring is full, a new backup replaces a verified one, or the newest candidate where only
    one is verified: so there is always a verified one once there was any, and the oldest candidate
    lives to be proved even where a backup is taken at every step. Of three verified ones the middle
    one goes, until the oldest is four intervals old: a fault that grows unseen is in the newest ones.

    Args:
        capacity: Number of copies kept, at least 3.
        proof: Calm losses that verify a backup. 8, as measured: NaN in momentum takes up to that
            long to show in the loss.
        clock: Returns seconds; only differences are used.

    Attributes:
        stats: Totals so far.
    """

    def __init__(self, capacity: int = 3, *, proof: int = 8, clock: Callable[[], float] = time.perf_counter) -> None:
        problems = []
        if capacity < 3:
            problems.append(f"capacity must be at least 3 (verified, being proved, newest), got {capacity!r}")
        if proof < 1:
            problems.append(f"proof must be at least 1, got {proof!r}")
        if problems:
            raise ConfigError(problems)
        self.stats = BackupStats()
        self._capacity = capacity
        self._proof = proof
        self._clock = clock
        self._slots: list[_Slot] = []
        self._spare: Pool | None = None
        self._next_id = 0
        self._harmless: frozenset[str] | None = None
        self._sound: frozenset[str] = frozenset()  # arrays that were finite once

    @property
    def backups(self) -> tuple[BackupInfo, ...]:
        """Return what the ring holds, oldest first."""
        return tuple(slot.info for slot in self._slots)

    def take(self, state: Any, step: int, *, initial: bool | None = None) -> BackupInfo:
        """Copy the state.

        A copy that fails leaves the ring as it was, whatever the cause lies in: object that cannot
        be copied, no memory. (Only a device error or a signal amid the copying of bytes costs the
        backup that was about to be replaced.)

        Args:
            state: Any tree of dicts, lists, tuples, dataclasses, numpy arrays, torch tensors
                (copied detached, to the CPU) and objects that `copy.deepcopy` can copy.
            step: Updates that the state has seen.
            initial: Eligible without proof while nothing is verified. Default: `step == 0`.

        Raises:
            TypeError: The state is None, or holds something that cannot be copied.
        """
        if state is None:
            raise TypeError("a backup needs the model's state, got None: does state_callback return it?")
        start = self._clock()
        victim = self._victim(step) if len(self._slots) >= self._capacity else None
        plan = CopyPlan(state, victim.copy.pool if victim else self._spare)
        if victim:
            self._slots.remove(victim)
        self._spare = None
        copy = plan.fill()
        seconds = self._clock() - start
        if self._harmless is None:
            # A mask of -inf is part of many models: what is not finite from the first is no fault.
            self._harmless = self._scan(copy)
            self._sound = copy.paths - self._harmless
        initial = step == 0 if initial is None else initial
        info = BackupInfo(self._next_id, step, copy.nbytes, seconds, initial, BackupStatus.CANDIDATE)
        self._next_id += 1
        self._slots.append(_Slot(info, copy))
        self.stats = replace(self.stats, taken=self.stats.taken + 1, copy_seconds=self.stats.copy_seconds + seconds)
        return info

    def healthy(self, step: int) -> tuple[BackupInfo, ...]:
        """Count one calm loss, reported for `step`.

        Returns:
            The backups whose proof ended with it, their status now VERIFIED or DISCARDED.
        """
        decided = []
        for slot in list(self._slots):
            if slot.info.status is not BackupStatus.CANDIDATE or slot.info.step > step:
                continue
            slot.healthy += 1
            if slot.healthy < self._proof:
                continue
            before = self.stats.scan_seconds
            bad = self._scan(slot.copy) - (self._harmless or frozenset())
            slot.info = replace(slot.info, scan_seconds=self.stats.scan_seconds - before)
            if bad:
                slot.info = replace(slot.info, damaged=tuple(sorted(bad & self._sound)))
                decided.append(self._drop(slot))
                continue
            self._sound |= slot.copy.paths - (self._harmless or frozenset())
            slot.info = replace(slot.info, status=BackupStatus.VERIFIED)
            self.stats = replace(self.stats, verified=self.stats.verified + 1)
            decided.append(slot.info)
        return tuple(decided)

    def find(self, before_step: int | None = None) -> BackupInfo | None:
        """Return the backup that `restore` would use, or None."""
        slot = self._find(before_step)
        return slot.info if slot else None

    def restore(self, before_step: int | None = None) -> tuple[BackupInfo, Any]:
        """Return the newest verified backup and a fresh deep copy of its state, for the caller to keep.

        New memory costs far more than copying into it (page faults: 1.1 s against 0.03 s for
        500 MB), so the copy is made in the buffers of a backup that is of no more use where there is
        one: of a later step, or the next older one when two others are left. That backup is gone.

        Args:
            before_step: Only backups of earlier steps. The initial state is exempt while nothing
                is verified.

        Raises:
            LookupError: There is no such backup; see `find`.
        """
        slot = self._find(before_step)
        if slot is None:
            limit = "" if before_step is None else f" of a step before {before_step}"
            raise LookupError(f"no verified backup{limit}; the ring holds {list(self.backups)}")
        plan = CopyPlan(slot.copy.tree, self._donated(slot))
        tree = plan.fill().tree
        self.stats = replace(self.stats, restored=self.stats.restored + 1)
        return slot.info, tree

    def discard(self, info: BackupInfo) -> None:
        """Forget a backup that led to trouble; unknown ones are ignored."""
        for slot in [slot for slot in self._slots if slot.info.id == info.id]:
            self._drop(slot)

    def discard_after(self, step: int) -> None:
        """Forget the backups of later steps: the run went back to `step`, they never happened."""
        for slot in [slot for slot in self._slots if slot.info.step > step]:
            self._drop(slot)

    def _find(self, before_step: int | None) -> _Slot | None:
        verified = [slot for slot in self._slots if slot.info.status is BackupStatus.VERIFIED]
        limit = math.inf if before_step is None else before_step
        older = [slot for slot in verified if slot.info.step < limit]
        if older:
            return older[-1]
        # The initial state is the last resort even for a fault at its own step.
        return next((slot for slot in self._slots if slot.info.initial), None)

    def _donated(self, kept: _Slot) -> Pool | None:
        if self._spare is not None:
            pool, self._spare = self._spare, None
            return pool
        later = [slot for slot in self._slots if slot.info.step > kept.info.step]
        others = [slot for slot in self._slots if slot is not kept]
        for slot in [*later, *(others[-1:] if len(others) > 1 else [])][:1]:
            self._slots.remove(slot)
            return slot.copy.pool
        return None

    def _victim(self, step: int) -> _Slot:
        verified = [slot for slot in self._slots if slot.info.status is BackupStatus.VERIFIED]
        if len(verified) >= 3 and step - verified[0].info.step <= _REACH * (step - verified[-1].info.step):
            return verified[-2]
        if len(verified) >= 2:
            return verified[0]
        return next(slot for slot in reversed(self._slots) if slot.info.status is BackupStatus.CANDIDATE)

    def _drop(self, slot: _Slot) -> BackupInfo:
        self._slots.remove(slot)
        self._spare = slot.copy.pool
        self.stats = replace(self.stats, discarded=self.stats.discarded + 1)
        return replace(slot.info, status=BackupStatus.DISCARDED)

    def _scan(self, copy: TreeCopy) -> frozenset[str]:
        start = self._clock()
        found = copy.nonfinite()
        self.stats = replace(self.stats, scan_seconds=self.stats.scan_seconds + self._clock() - start)
        return found


class BackupPacer:
    """Says when an automatic backup is due, so that backups cost a bounded share of the time.

    A token bucket: each step earns `max_share` of its seconds, each backup spends what it took,
    and the next one waits until its price is there. No backups are saved up. The first one of a process
    is free: most of its time goes into memory that is new, which says nothing of the next ones' price.

    Args:
        max_share: Largest share of the training time that backups may take, in (0, 1].
        backup_every: Least number of steps between two backups.
    """

    def __init__(self, max_share: float = 0.03, backup_every: int = 50) -> None:
        problems = []
        if not 0 < max_share <= 1:
            problems.append(f"max_share must be in (0, 1], got {max_share!r}")
        if backup_every < 1:
            problems.append(f"backup_every must be at least 1, got {backup_every!r}")
        if problems:
            raise ConfigError(problems)
        self._share = max_share
        self._every = backup_every
        self._steps = 0
        self._price = 0.0
        self._purse = 0.0
        self._pace = 0.0
        self._paid = False  # the first one is free

    @property
    def interval(self) -> int:
        """Steps between two backups at the present pace."""
        if self._pace <= 0.0:
            return self._every
        return max(self._every, math.ceil(self._price / (self._share * self._pace)))

    @property
    def due(self) -> bool:
        """Say whether a backup should be taken now."""
        return self._steps >= self._every and self._purse >= self._price

    def stepped(self, seconds: float) -> None:
        """Count one training step that took `seconds`."""
        self._steps += 1
        self._pace += _PACE_WEIGHT * (seconds - self._pace) if self._pace else seconds
        self._purse = min(self._purse + self._share * seconds, self._price)

    def took(self, seconds: float) -> None:
        """Count a backup that cost `seconds`, with the scan of the one before it."""
        self._steps = 0
        if self._paid:
            self._price = seconds
            self._purse -= seconds
        self._paid = True
