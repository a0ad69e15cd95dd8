"""The run's backups in RAM: taken when they are due, and used where every rank has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from learnit_r8 import events
from learnit_r8.clock import Clock
from learnit_r8.loop.ranks import Ranks
from learnit_r8.stability.backups import BackupInfo, BackupPacer, BackupRing, BackupStatus
from learnit_r8.stability.detector import Detector

Emit = Callable[..., None]
_DAMAGE = "the model's state holds NaN or infinity, which the losses do not show"


class RamBackups:
    """A ring of backups and their pace.

    Args:
        capture: Returns the user's model state, or None: then there are no automatic backups.
        backup_every: Least number of steps between automatic backups.
        emit: `(event class, step, *fields)`.
        clock: Measures steps and backups.
        ranks: They must take the same backups, or each would go back to another step.

    Attributes:
        capture: As given.
        ring: The backups.
        damage: What was found in the backup that was damaged last, in words.
    """

    def __init__(
        self,
        capture: Callable[[], Any] | None,
        backup_every: int,
        emit: Emit,
        clock: Clock,
        ranks: Ranks,
    ) -> None:
        self.capture = capture
        self._emit = emit
        self._clock = clock
        self._ranks = ranks
        self._pacer = BackupPacer(backup_every=backup_every)
        self.forget()

    def forget(self) -> None:
        """Begin with an empty ring."""
        self.ring = BackupRing(clock=self._clock.monotonic)
        self._detectors: dict[int, dict[str, Any]] = {}  # by backup id
        self._next = 0  # step; several ranks keep to it, their clocks differ
        self._scanned = 0.0  # seconds on scans up to the last backup
        self._step_began: float | None = None
        self._step_counted = 0
        self._heal()

    def before_step(self, step: int, detector: Detector, *, allowed: bool) -> None:
        """Take an automatic backup when one is due; there must be a `capture`."""
        assert self.capture is not None
        began = self._clock.monotonic()
        if self._step_began is not None and step > self._step_counted:  # asked twice at the end of an epoch
            self._pacer.stepped(began - self._step_began)
        self._step_counted = step
        if allowed and self._due(step):
            self.keep(self.capture(), step, detector)
            scanned = self.ring.stats.scan_seconds
            self._pacer.took(self._clock.monotonic() - began + scanned - self._scanned)
            self._scanned = scanned
            self._next = step + int(self._ranks.everyone(self._pacer.interval).max())
            began = self._clock.monotonic()
        self._step_began = began

    def keep(self, state: Any, step: int, detector: Detector) -> None:
        """Copy a state of the user's model into the ring, and the detector's beside it."""
        # The first one has to serve until another is proved: it is all there is.
        info = self.ring.take(state, step, initial=self.ring.find() is None)
        held = {backup.id for backup in self.ring.backups}
        self._detectors = {key: value for key, value in self._detectors.items() if key in held}
        self._detectors[info.id] = detector.state_dict()
        self._emit(events.BackupTaken, step, info.nbytes, info.seconds)

    def calm(self, step: int) -> None:
        """Count a calm loss in favour of the backups before it; one that is found damaged says that the model is."""
        for info in self.ring.healthy(step):
            if info.status is BackupStatus.VERIFIED:
                self._emit(events.BackupVerified, step, info.step)
            elif info.damaged and self._ranks.damaged_since is None:
                self._ranks.damaged_since = info.step
                names = ", ".join(name.lstrip("/") for name in info.damaged[:3])
                more = f" and {len(info.damaged) - 3} more arrays" if len(info.damaged) > 3 else ""
                self.damage = f"{_DAMAGE}: {names}{more}, in the backup of step {info.step}"
                self._emit(events.Notice, step, self.damage, "warning")

    def damaged_since(self) -> int | None:
        """Return the step of a backup in which NaN or infinity was found since the last call, on any rank, or None."""
        since, self._ranks.damaged_since = self._ranks.damaged_since, None
        return since

    def proved_steps(self) -> list[int]:
        """Return the steps of this rank's proved backups, ascending."""
        return [info.step for info in self.ring.backups if info.status is BackupStatus.VERIFIED]

    def newest(self, before: int | None) -> BackupInfo | None:
        """Return the newest backup of an earlier step that every rank has."""
        while True:
            mine = self.ring.find(before)
            steps = self._ranks.everyone(-1.0 if mine is None else mine.step)
            lowest = int(steps.min())
            if lowest < 0 or steps.min() == steps.max():
                return None if lowest < 0 else mine
            if before == lowest + 1:  # an unproved first backup is found whatever is asked for
                return None
            before = lowest + 1

    def restore(self, found: BackupInfo) -> tuple[BackupInfo, Any, dict[str, Any] | None]:
        """Return the backup, a copy of its state for the user to keep, and the detector's state of then."""
        info, state = self.ring.restore(None if found.initial else found.step + 1)
        return info, state, self._detectors.get(info.id)

    def discard(self, backup_id: int | None) -> None:
        """Forget a backup."""
        for info in self.ring.backups:
            if info.id == backup_id:
                self.ring.discard(info)

    def rolled_back(self, to_step: int) -> None:
        """Forget what was taken after a step: it never happened."""
        self.ring.discard_after(to_step)
        self._next = 0
        self._heal()

    def _heal(self) -> None:
        self._ranks.damaged_since, self.damage = None, f"{_DAMAGE} on another rank"

    def _due(self, step: int) -> bool:
        if self._ranks.world_size > 1:
            return step >= self._next
        return not self.ring.backups or self._pacer.due
