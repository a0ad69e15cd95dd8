"""Backups of the model's state in RAM that are used only once later losses have proved them.

The loss at step t tests the weights before update t, so a snapshot says nothing about itself:
"the latest backup" is poisoned exactly when it is needed. A backup is a CANDIDATE until enough
calm losses were reported at or after its step and every float array in it is finite; then it is
VERIFIED, for good. `BackupRing.restore` hands out verified ones (and the first state when there is none).

Memory: three copies of the state; a fourth from the first look at a suspect model or the first restore on, and where
the best one is old and backups come faster than they are proved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from statistics import median
from typing import Any, NamedTuple

from learnit_r8.stability.changes import BEYOND, HABIT, Habits, copied, relative_changes
from learnit_r8.stability.tree_copy import CopyPlan, Pool, TreeCopy

_CAPACITY = 3
_PROOF = 8
"""Calm losses that verify a backup, as measured: NaN in momentum takes up to that long to show in the loss."""
_REACH = 4  # intervals between two backups
_WARY = 8  # backups after a restore, during which the oldest one stays
_FAR_OFF = 1 << 30
_NAMED = 3  # arrays that a sentence names


class BackupStatus(StrEnum):
    """How far a backup is proved."""

    CANDIDATE = "candidate"
    VERIFIED = "verified"
    DISCARDED = "discarded"


@dataclass(frozen=True, slots=True)
class BackupInfo:
    """Facts of one backup.

    `step` is how many updates the state had seen, the next one that it will be trained at. `initial`: eligible without
    proof when nothing else is. `damaged`: arrays that were finite in an earlier backup and are not in this one, which
    is DISCARDED. `level`: median of the losses that proved it. `path`: sum of the learning rates of all steps before
    it. `moved`: arrays that moved beyond their habit since the backup before it, farthest first; `far`: one of them
    beyond any habit.
    """

    id: int
    step: int
    nbytes: int
    seconds: float
    initial: bool
    status: BackupStatus
    damaged: tuple[str, ...] = ()
    level: float = math.nan
    path: float = 0.0
    moved: tuple[str, ...] = ()
    far: bool = False


class Look(NamedTuple):
    """What a look at the present state found.

    Arrays that hold NaN or infinity and did not always, and those that moved beyond their habit, farthest first, since
    the backup of a step (-1: there is none, or no array can be compared).
    """

    nonfinite: tuple[str, ...]
    jumped: tuple[str, ...]
    since: int = -1

    @property
    def damaged(self) -> bool:
        """Whether anything was found."""
        return bool(self.nonfinite or self.jumped)

    def __str__(self) -> str:
        if self.nonfinite:
            return f"NaN or infinity in {names(self.nonfinite)}"
        return f"{names(self.jumped)} moved far beyond what is usual since step {self.since}"


def names(paths: Sequence[str]) -> str:
    """Return the first paths of arrays, and how many more there are."""
    more = f" and {len(paths) - _NAMED} more arrays" if len(paths) > _NAMED else ""
    return ", ".join(path.lstrip("/") for path in paths[:_NAMED]) + more


@dataclass(slots=True)
class _Slot:
    info: BackupInfo
    copy: TreeCopy
    changes: Mapping[str, float] = field(default_factory=dict)  # since an earlier backup
    stretch: float = 0.0  # sum of the learning rates from then on
    calm: list[float] = field(default_factory=list)  # losses, since it was taken


class BackupRing:
    """A few deep copies of the training state, their buffers used again and again.

    When the ring is full, a new backup replaces a verified one, or the newest candidate where only
    one is verified: so there is always a verified one once there was any, and the oldest candidate
    lives to be proved even where a backup is taken at every step. Of three verified ones the middle
    one goes, until the oldest is four intervals old and the newest one's level is as good: so the oldest is there
    for a fault that grows unseen, and it is the best one of a run whose level rises.

    `taken` backups so far took `seconds` to be copied and scanned.
    """

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.taken, self.seconds = 0, 0.0
        self._clock = clock
        self._slots: list[_Slot] = []
        self._spare: Pool | None = None
        self._since_restore = _WARY  # backups
        self._habits = Habits()
        self._harmless: frozenset[str] = frozenset()  # arrays that may hold infinity: a mask is part of many models
        self._sound: frozenset[str] = frozenset()  # arrays that were finite once

    @property
    def backups(self) -> tuple[BackupInfo, ...]:
        """Return what the ring holds, oldest first."""
        return tuple(slot.info for slot in self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def undecided(self) -> int:
        """Calm losses until one ends the proof of a backup."""
        return _PROOF - max(
            (len(slot.calm) for slot in self._slots if slot.info.status is BackupStatus.CANDIDATE), default=-_FAR_OFF
        )

    def take(self, state: Any, step: int, *, initial: bool | None = None, path: float = 0.0) -> BackupInfo:
        """Copy the state, after so many steps whose learning rates sum to `path`.

        A copy that fails, for what cannot be copied (TypeError) or want of memory, leaves the ring as it was. (Only a
        device error or a signal amid the copying of bytes costs the backup that was about to be replaced.)
        """
        if state is None:
            raise TypeError("a backup needs the model's state, got None: does state_callback return it?")
        start = self._clock()
        victim = self._victim(step)
        plan = CopyPlan(state, victim.copy.pool if victim else self._spare)
        if victim:
            self._slots.remove(victim)
        self._spare = None
        copy = plan.fill()
        seconds = self._clock() - start
        initial = step == 0 if initial is None else initial
        info = BackupInfo(self.taken, step, copy.nbytes, seconds, initial, BackupStatus.CANDIDATE, path=path)
        if step == 0 and not self.taken:
            self._harmless = copy.nonfinite()
        slot, earlier = _Slot(info, copy), self._find(step)
        if earlier is not None:
            slot.changes = relative_changes(copy, earlier.copy, sampled=True)
            slot.stretch = path - earlier.info.path
            moved = self._beyond_habit(copy, slot.changes, slot.stretch, unknown=math.inf)
            far = any(slot.changes[name] > BEYOND for name in moved)
            slot.info = info = replace(info, moved=moved, far=far)
        self.taken += 1
        self.seconds += self._clock() - start
        self._since_restore += 1
        self._slots.append(slot)
        return info

    def make_room(self, step: int) -> None:
        """Give up the backup that one of this step would have replaced, as other ranks have."""
        if victim := self._victim(step):
            self._drop(victim)

    def look(
        self, state: Any, path: float, before: int | None = None, *, calm: bool = False, habit: float = HABIT
    ) -> Look:
        """Say whether a state is damaged: NaN or infinity in it, or weights that moved far beyond their habit.

        It is compared with backups of steps earlier than `before`. After a calm loss, arrays that were never finite are
        no fault.
        """
        copy = CopyPlan(state, self._spare).fill()
        self._spare = copy.pool
        found = copy.nonfinite() - self._harmless
        bad = tuple(sorted(found & self._sound if calm else found))
        slot = self._find(before)
        if bad or slot is None:
            return Look(bad, ())
        changes = relative_changes(copy, slot.copy)
        if not changes:
            return Look((), ())
        return Look((), self._beyond_habit(copy, changes, path - slot.info.path, habit=habit), slot.info.step)

    def _beyond_habit(
        self, copy: TreeCopy, changes: Mapping[str, float], stretch: float, **limits: float
    ) -> tuple[str, ...]:
        broken = self._habits.broken(changes, stretch, **limits)
        explained = copied(broken, copy)
        return tuple(sorted(broken.keys() - explained, key=lambda name: -broken[name]))

    def healthy(self, step: int, *losses: float, anywhere: Callable[[bool], bool] = bool) -> tuple[BackupInfo, ...]:
        """Take calm losses, up to that of a step; return the backups whose proof ended with the last of them.

        Their status is VERIFIED or DISCARDED now. There may be as many losses as are `undecided`.
        `anywhere`: from whether this rank's part of a backup is damaged to whether any rank's is.
        """
        decided = []
        for slot in list(self._slots):
            if slot.info.status is not BackupStatus.CANDIDATE or slot.info.step > step:
                continue
            slot.calm += losses or (math.nan,)
            if len(slot.calm) < _PROOF:
                continue
            start = self._clock()
            bad = slot.copy.nonfinite()
            self.seconds += self._clock() - start
            self._harmless |= bad - self._sound  # what was never finite is no fault, as these losses were calm
            bad -= self._harmless
            if anywhere(bool(bad)):
                slot.info = replace(slot.info, damaged=tuple(sorted(bad)))
                decided.append(self._drop(slot))
                continue
            self._sound |= slot.copy.paths - self._harmless
            self._habits.learn(slot.changes, slot.stretch)
            slot.info = replace(slot.info, status=BackupStatus.VERIFIED, level=median(slot.calm))
            decided.append(slot.info)
        return tuple(decided)

    def find(self, before_step: int | None = None, *, unproven: bool = False) -> BackupInfo | None:
        """Return the backup that `restore` would use, or None.

        `unproven`: a candidate with a calm loss will do: the fault's cause is known, and came after it.
        """
        slot = self._find(before_step, unproven=unproven)
        return slot.info if slot else None

    def latest(self) -> BackupInfo | None:
        """Return the newest backup that nothing speaks against, proved or not: the model is not under suspicion."""
        return next((s.info for s in reversed(self._slots) if not s.info.moved and self._is_finite(s)), None)

    def best(self) -> BackupInfo | None:
        """Return the verified backup whose level was lowest, or None."""
        proved = [slot.info for slot in self._slots if slot.info.status is BackupStatus.VERIFIED]
        known = [info for info in proved if math.isfinite(info.level)]
        return min(known or proved, key=lambda info: info.level, default=None)

    def restore(self, before_step: int | None = None, *, info: BackupInfo | None = None) -> tuple[BackupInfo, Any]:
        """Return the newest verified backup (see `find`), or the given one, and a deep copy of its state to keep.

        New memory costs far more than copying into it (page faults: 1.1 s against 0.03 s for 500 MB), so the copy is
        made in the buffers of a backup that is of no more use where there is one: of a later step, or the next older
        one when two others are left. That backup is gone.
        """
        wanted = next((slot for slot in self._slots if info is not None and slot.info.id == info.id), None)
        slot = wanted or self._find(before_step)
        if slot is None:
            limit = "" if before_step is None else f" of a step before {before_step}"
            raise LookupError(f"no verified backup{limit}; the ring holds {list(self.backups)}")
        return slot.info, CopyPlan(slot.copy.tree, self._donated(slot)).fill().tree

    def discard_after(self, step: int) -> None:
        """Forget the backups of later steps: the run went back to `step`, they never happened."""
        self._since_restore = 0
        for slot in [slot for slot in self._slots if slot.info.step > step]:
            self._drop(slot)
        for slot in self._slots:
            slot.calm.clear()  # the same steps again prove no more than they did

    def _find(self, before_step: int | None, *, unproven: bool = False) -> _Slot | None:
        limit = math.inf if before_step is None else before_step
        for slot in reversed(self._slots):
            proved = slot.info.status is BackupStatus.VERIFIED
            tested = slot.calm and not slot.info.moved
            if slot.info.step < limit and (proved or (unproven and tested and self._is_finite(slot))):
                return slot
        # The first state is the last resort even for a fault at its own step.
        return next((slot for slot in self._slots if slot.info.initial and self._is_finite(slot)), None)

    def _is_finite(self, slot: _Slot) -> bool:
        return not slot.copy.nonfinite() - self._harmless

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

    def _victim(self, step: int) -> _Slot | None:
        """Return the backup whose place a new one takes, or None where one more has room."""
        if len(self._slots) < _CAPACITY:
            return None
        verified = [slot for slot in self._slots if slot.info.status is BackupStatus.VERIFIED]
        if len(verified) >= 2:
            oldest, newest = verified[0].info, verified[-1].info
            # The fault that led to a restore may be in all the others.
            best = oldest.level < newest.level or self._since_restore < _WARY
            if len(verified) >= 3:
                old = step - oldest.step > _REACH * (step - newest.step)
                return verified[0] if old and not best else verified[-2]
            if not best:
                return verified[0]
            if len(self._slots) <= _CAPACITY:
                return None
        return next(slot for slot in reversed(self._slots) if slot.info.status is BackupStatus.CANDIDATE)

    def _drop(self, slot: _Slot) -> BackupInfo:
        self._slots.remove(slot)
        self._spare = slot.copy.pool
        return replace(slot.info, status=BackupStatus.DISCARDED)


def chosen_interval(nbytes: int) -> int:
    """Return the steps between two backups of a state of this size, where the user gives none.

    8 sqrt(MB), 8 to 512: a copy costs as its bytes, a step at least as the square root of them, on any machine; so
    8 MB are copied every 23 steps and 1 GB every 253. Measured: `python -m benchmarks.recovery`.
    """
    return min(512, max(8, math.ceil(8.0 * math.sqrt(nbytes / 1e6))))
