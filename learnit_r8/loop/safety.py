"""The safety net under the loop: judge a loss, and bring the model back when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from learnit_r8 import events
from learnit_r8.catalog import LossCatalog
from learnit_r8.clock import Clock
from learnit_r8.errors import TrainingDiverged
from learnit_r8.loop.callbacks import LoadCallback, SaveCallback
from learnit_r8.loop.losses import Reported
from learnit_r8.stability.backups import BackupRing, BackupStatus
from learnit_r8.types import Indices, Mask, Verdict

Emit = Callable[..., None]

MAX_UNCOUNTED = 10
"""Failed updates in a row, with no way to restore the model, after which training has diverged."""


class Judgement(NamedTuple):
    """The detector's word on one report.

    Attributes:
        verdict: What it is.
        score: The detector's z; NaN while it is not active.
        accepted: The loss may enter the catalog.
        alarming: The model needs to be restored.
    """

    verdict: Verdict
    score: float
    accepted: bool
    alarming: bool


class SafetyNet:
    """Detector, backups and recovery of one run.

    Args:
        load: Restores the user's model, or None.
        state_callback: Returns the user's model state, or None.
        backup_every: Steps between automatic backups, or None for none.
        catalog: Rewound on a rollback.
        emit: `(event class, step, *fields)`.
        clock: Measures how long restoring takes.
    """

    def __init__(
        self,
        load: LoadCallback | None,
        state_callback: Callable[[], Any] | None,
        backup_every: int | None,
        catalog: LossCatalog,
        emit: Emit,
        clock: Clock,
    ) -> None:
        self._load = load
        self._state_callback = state_callback
        self._backup_every = backup_every
        self._catalog = catalog
        self._emit = emit
        self._clock = clock
        self._ring = BackupRing()
        self._last_backup = -1
        self._uncounted: list[tuple[int, ...]] = []

    def attach(self, state_callback: Callable[[], Any], load: LoadCallback) -> None:
        """Take the callbacks that were not given at construction."""
        self._state_callback = self._state_callback or state_callback
        self._load = self._load or load

    @property
    def quarantine(self) -> Mask | None:
        """Samples that are kept out of batches, bool `[N]`, or None."""
        return None

    def stable_only(self, step: int) -> bool:
        """Whether the model is on probation and wants stable data."""
        return False

    def lr_multiplier(self, step: int) -> float:
        """Recovery's factor on the learning rate, in (0, 1]."""
        return 1.0

    # Backups ------------------------------------------------------------------------------

    def before_step(self, step: int) -> None:
        """Take an automatic backup when one is due."""
        if self._state_callback is None or self._backup_every is None or self._load is None:
            return
        if self._last_backup < 0 or step - self._last_backup >= self._backup_every:
            self.keep(self._state_callback(), step)

    def keep(self, state: Any, step: int) -> None:
        """Copy a state of the user's model into the ring."""
        self._last_backup = step
        # The first one has to serve until another is proved: it is all there is.
        info = self._ring.take(state, step, initial=self._ring.find() is None)
        if info is not None:
            self._emit(events.BackupTaken, step, info.nbytes, info.seconds)

    # Judgement ----------------------------------------------------------------------------

    def judge(self, step: int, reported: Reported, expected: float, *, skipped: bool) -> Judgement:
        """Say what a report is. Changes nothing but the detector."""
        if skipped:
            return Judgement(Verdict.SKIPPED, float("nan"), accepted=reported.finite, alarming=False)
        if not reported.finite:
            return Judgement(Verdict.NONFINITE, float("nan"), accepted=False, alarming=True)
        self._uncounted.clear()
        for info in self._ring.healthy(step):
            if info.status is BackupStatus.VERIFIED:
                self._emit(events.BackupVerified, step, info.step)
        return Judgement(Verdict.CALM, float("nan"), accepted=True, alarming=False)

    def react(
        self, step: int, epoch: int, judgement: Judgement, reported: Reported, indices: Indices, expected: float
    ) -> bool:
        """Answer an alarm; return True when the model was restored.

        Raises:
            TrainingDiverged: Nothing is left to try.
        """
        batch = tuple(indices.tolist())
        self._emit(
            events.SpikeSeen, step, epoch, judgement.verdict.value, reported.mean, expected, judgement.score, batch
        )
        self._uncounted.append(batch)
        reason = self._restore(step)
        if not reason:
            self._uncounted.clear()
            return True
        self._emit(events.RollbackFailed, step, reason)
        if len(self._uncounted) >= MAX_UNCOUNTED:
            raise TrainingDiverged(
                f"{len(self._uncounted)} losses in a row were not finite and the model could not be restored: {reason}",
                batches=self._uncounted,
            )
        return False

    def _restore(self, step: int) -> str:
        """Bring the newest good state back; return why that failed, or "" when it did not."""
        if self._load is None:
            return "there is no load_callback"
        info = self._ring.find(step + 1)
        if info is None:
            return "there is no backup: give state_callback, or call update_cpu_backup(state) now and then"
        started = self._clock.monotonic()
        error: Exception | None = None
        for _ in range(2):  # once more with a fresh copy: a half-done load may have changed the first
            info, state = self._ring.restore(step + 1)
            try:
                self._load(state, from_ram=True)
            except Exception as raised:
                error = raised
                continue
            self._catalog.rewind(info.step)
            self._ring.discard_after(info.step)
            seconds = self._clock.monotonic() - started
            self._emit(events.RolledBack, step, info.step, "ram", self.lr_multiplier(step), 0, seconds)
            return ""
        return f"load_callback failed: {type(error).__name__}: {error}"

    @contextmanager
    def parked(self, save: SaveCallback | None, scheduler_state: Callable[[], dict[str, Any]]) -> Iterator[None]:
        """Put the user's model aside and bring it back at the end, whatever was done to it meanwhile."""
        assert self._load is not None
        if self._state_callback is not None:
            ring = BackupRing(2)
            ring.take(self._state_callback(), 0, initial=True)
            try:
                yield
            finally:
                self._load(ring.restore()[1], from_ram=True)
            return
        assert save is not None
        import tempfile

        with tempfile.TemporaryDirectory(prefix="r8-lr-search-") as folder:
            path = Path(folder) / "model"
            save(scheduler_state, path)
            try:
                yield
            finally:
                self._load(str(path), from_ram=False)

    def state_dict(self) -> dict[str, Any]:
        """Return what the next steps depend on; backups stay in RAM."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._last_backup = -1
        self._uncounted.clear()
