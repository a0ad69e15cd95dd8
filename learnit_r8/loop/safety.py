"""The safety net under the loop: has every loss judged, and brings the model back when that is needed.

It joins the rooms of `stability`, which know nothing of each other or of the user: the detector
says what a loss is, the recovery table says what to do, the ring holds the backups. What is done
happens here: the user's `load_callback`, the catalog, events.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from learnit_r8 import events
from learnit_r8.catalog import LossCatalog
from learnit_r8.clock import Clock
from learnit_r8.loop.callbacks import LoadCallback, SaveCallback
from learnit_r8.loop.crash import CrashRecorder
from learnit_r8.loop.losses import Reported
from learnit_r8.loop.lr_search import parked
from learnit_r8.loop.ram_backups import Emit, RamBackups
from learnit_r8.loop.ranks import Ranks
from learnit_r8.loop.saver import Saver
from learnit_r8.stability.backups import BackupInfo
from learnit_r8.stability.detector import Detector
from learnit_r8.stability.recovery import Action, Kind, Recovery
from learnit_r8.types import Indices, Mask, Verdict

LR_RISE = 1.5
"""A learning rate that grows by this factor in a step may well move the loss: the detector is told."""

_MOST = 0.9
"""Share of the samples that must have been seen for their expected losses to be compared with the others'."""


class Judgement(NamedTuple):
    """What one report is, and what it calls for.

    Attributes:
        verdict: The detector's.
        score: The detector's z; NaN while it is not active.
        action: The recovery table's answer.
        accepted: The loss may enter the catalog.
    """

    verdict: Verdict
    score: float
    action: Action
    accepted: bool

    @property
    def alarming(self) -> bool:
        """Whether the model may need to be restored."""
        return self.verdict in _FAULTS


_FAULTS = (Verdict.SPIKE, Verdict.DRIFT, Verdict.NONFINITE)
_GOES_ON = (Kind.ACCEPT, Kind.HOLD, Kind.IGNORE)


class SafetyNet:
    """Detector, backups and recovery of one run.

    Args:
        load: Restores the user's model, or None.
        state_callback: Returns the user's model state, or None.
        backup_every: Least number of steps between automatic backups, or None for none.
        saver: Finds a checkpoint to go back to when RAM has nothing.
        catalog: Rewound on a rollback.
        emit: `(event class, step, *fields)`.
        clock: Measures steps, backups and restores.
        crash: Writes down what is known when training has diverged.
        ranks: They must take the same backups and go back to the same step, or each would go on with
            another model.

    Attributes:
        restored_step: Step of the state that the last rollback went back to.
    """

    def __init__(
        self,
        load: LoadCallback | None,
        state_callback: Callable[[], Any] | None,
        backup_every: int | None,
        saver: Saver,
        catalog: LossCatalog,
        emit: Emit,
        clock: Clock,
        crash: CrashRecorder,
        ranks: Ranks,
    ) -> None:
        self._load = load
        self._paced = backup_every is not None
        self._saver = saver
        self._catalog = catalog
        self._emit = emit
        self._clock = clock
        self._crash = crash
        self._everyone = ranks.everyone
        self._detector = Detector()
        self._recovery = Recovery(catalog.num_samples)
        capture = state_callback if self._paced and load is not None else None
        self._backups = RamBackups(capture, backup_every or 1, emit, clock, ranks)
        self._lr = -1.0  # of the last batch; negative before the first one
        self._load_error: Exception | None = None
        self.restored_step = 0

    # What the loop asks ---------------------------------------------------------------------

    def attach(self, state_callback: Callable[[], Any], load: LoadCallback) -> None:
        """Take callbacks where none were given at construction; of two pairs, halves would not fit."""
        if self._load is None:
            self._load = load
            self._backups.capture = state_callback if self._paced else None

    @property
    def quarantine(self) -> Mask | None:
        """Samples that are kept out of batches, bool `[N]`, or None."""
        ids = self._recovery.quarantined
        if not len(ids):
            return None
        mask = np.zeros(self._catalog.num_samples, bool)
        mask[ids] = True
        return mask

    def stable_only(self, step: int) -> bool:
        """Whether the model is on probation and wants stable data."""
        return self._recovery.stable_only(step)

    @property
    def restored(self) -> bool:
        """Whether the model was ever restored."""
        return self._recovery.aftermath.used is not None

    def lr_multiplier(self, step: int) -> float:
        """Recovery's factor on the learning rate, in (0, 1]."""
        return self._recovery.aftermath.lr_multiplier(step)

    def saw_lr(self, step: int, lr: float) -> None:
        """Take note of a batch's learning rate."""
        if lr > 0.0 and lr >= LR_RISE * self._lr >= 0.0:
            self._detector.announce(step, "the learning rate rises")
        self._lr = lr

    def announce(self, step: int, why: str) -> None:
        """Tell the detector that the loss may change its level for a good reason."""
        self._detector.announce(step, why)

    def before_step(self, step: int) -> None:
        """Take an automatic backup when one is due."""
        if self._backups.capture is not None:
            self._backups.before_step(step, self._detector, allowed=self._recovery.backups_allowed)

    def keep(self, state: Any, step: int) -> None:
        """Copy a state of the user's model into the ring, unless the model is suspect right now."""
        if self._recovery.backups_allowed:
            self._backups.keep(state, step, self._detector)

    # Judgement ------------------------------------------------------------------------------

    def judge(
        self, step: int, reported: Reported, expected: float, indices: Indices, *, skipped: bool, outdated: bool = False
    ) -> Judgement:
        """Say what a report is and what it calls for.

        Args:
            step: Global step.
            reported: The loss, of all ranks.
            expected: The catalog's estimate for the batch.
            indices: Sample ids of the batch.
            skipped: The optimizer step was skipped.
            outdated: The batch was out when the model was restored: its loss may be of the model that is gone.
        """
        verdict, score = Verdict.SKIPPED, math.nan
        if not skipped:
            catalog = self._catalog
            known = catalog.num_seen >= _MOST * catalog.num_samples  # not all: what is always NaN is never seen
            reading = self._detector.observe(
                step,
                reported.mean,
                expected_batch=expected if known else math.nan,
                expected_all=catalog.mean_expected if known else math.nan,
                finite=reported.finite,
                samples=reported.values,
                easy=self._recovery.stable_only(step),
            )
            verdict, score = reading.verdict, reading.score
        damaged_since = None if skipped or outdated else self._damaged_since(step)
        if damaged_since is not None:
            verdict = Verdict.NONFINITE
        self._crash.note(step, verdict, reported.mean, indices)
        if verdict is Verdict.CALM:
            action = self._recovery.react(step, verdict, can_restore=False, loss=reported.mean)
            self._backups.calm(step)
            return Judgement(verdict, score, action, action.kind is Kind.ACCEPT)
        if outdated:
            self._detector.reset_after_rollback()
            return Judgement(verdict, score, Action(Kind.IGNORE), accepted=False)
        action = self._recovery.react(
            step,
            verdict,
            can_restore=damaged_since is not None or (verdict in _FAULTS and self._can_restore(step)),
            batch_indices=indices,
            loss=reported.mean,
            sample_losses=reported.values,
            first_suspect_step=self._suspect_since(verdict) if damaged_since is None else damaged_since,
            unseen="" if damaged_since is None else self._backups.damage,
        )
        # A suspect loss counts too: it mostly is a harmless outlier, and a rollback takes it out of the catalog again.
        return Judgement(verdict, score, action, reported.finite and action.kind in _GOES_ON)

    def _damaged_since(self, step: int) -> int | None:
        """Return the step from which the model holds NaN that no loss shows, if that is news and can be undone."""
        since = self._backups.damaged_since()
        return since if since is not None and self._can_restore(step) else None

    def _can_restore(self, step: int) -> bool:
        if self._load is None:
            return False
        return bool(self._everyone(bool(self._backups.ring.backups)).all()) or self._may_be_on_disk(step + 1)

    def _suspect_since(self, verdict: Verdict) -> int | None:
        """Return the step before which the model was sound."""
        since = self._detector.first_suspect_step
        if verdict is not Verdict.DRIFT or since is None or self._backups.newest(since) or self._may_be_on_disk(since):
            return since
        # A drift may have begun before the oldest backup: going back to that is better than giving up.
        proved = self._backups.proved_steps()
        return proved[0] + 1 if proved else since

    def _may_be_on_disk(self, before: int) -> bool:
        return bool(self._everyone(self._saver.has_before(before)).all())

    def _on_disk(self, before: int, passed_over: int) -> tuple[int, Path] | None:
        """Return a checkpoint's step and model if every rank has one of that step."""
        found = self._saver.find_before(before, passed_over)
        steps = self._everyone(-1.0 if found is None else found[0])
        return found if steps.min() == steps.max() else None

    # Recovery -------------------------------------------------------------------------------

    def react(self, step: int, epoch: int, judgement: Judgement, loss: float, expected: float, ids: Indices) -> bool:
        """Do what an alarming judgement calls for; return True when the model was restored.

        Raises:
            TrainingDiverged: Nothing is left to try.
        """
        batch = tuple(ids.tolist())
        self._emit(events.SpikeSeen, step, epoch, judgement.verdict.value, loss, expected, judgement.score, batch)
        action, self._load_error = judgement.action, None
        try:
            while action.kind is Kind.RESTORE:
                self._prepare(step, action)
                restored = self._from_ram(step, action) if action.source == "ram" else self._from_disk(step, action)
                if restored is None:
                    return True
                action = restored
        except BaseException:  # Ctrl-C in load_callback: the model may be half restored, the run must not be
            self._recovery.restore_abandoned()
            raise
        if action.kind is Kind.FAIL:
            self._emit(events.RollbackFailed, step, action.reason)
            self._crash.diverged(step, action.reason, self._recovery.failing_batches, self._load_error)
        if action.kind is Kind.HOLD:
            return False
        if action.kind is Kind.ACCEPT_LEVEL:
            self._detector.rebaseline()
            self._emit(events.Notice, step, f"a new level of the loss is accepted: {action.reason}", "warning")
        else:
            why = "there is no load_callback" if self._load is None else "there is no backup to go back to"
            self._emit(events.RollbackFailed, step, f"{action.reason} ({why})")
        return False

    def _prepare(self, step: int, action: Action) -> None:
        self._backups.discard(action.discard)
        if action.quarantine:
            self._emit(events.SampleQuarantined, step, action.quarantine, "in the batches of several faults")

    def _from_ram(self, step: int, action: Action) -> Action | None:
        """Restore from the ring; None when it worked, else what to do next."""
        found = self._backups.newest(action.before_step)
        if found is None:
            return self._recovery.restore_failed(step, "no backup in RAM is good", empty=True)
        began = self._clock.monotonic()
        info, state, detector = self._backups.restore(found)
        failure = self._try_load(state, from_ram=True)
        if failure:
            return self._recovery.restore_failed(step, failure, backup_id=info.id)
        self._recovery.rolled_back(step, info.step, info.id, last_resort=self._last_resort(info))
        self._detector.reset_after_rollback(detector)
        self._after_rollback(step, info.step, "ram", began)
        return None

    def _last_resort(self, info: BackupInfo) -> bool:
        """Whether a second fault soon after would find nothing else: then the backup is not to blame at once."""
        return not self._may_be_on_disk(info.step) and all(step >= info.step for step in self._backups.proved_steps())

    def _from_disk(self, step: int, action: Action) -> Action | None:
        found = self._on_disk(step + 1 if action.before_step is None else action.before_step, action.skip)
        if found is None:
            return self._recovery.restore_failed(step, "there is no checkpoint", empty=True)
        began = self._clock.monotonic()
        to_step, path = found
        failure = self._try_load(str(path), from_ram=False)
        if failure:
            return self._recovery.restore_failed(step, failure)
        self._recovery.rolled_back(step, to_step, None)
        self._detector.reset_after_rollback()
        self._after_rollback(step, to_step, str(path.parent), began)
        return None

    def _try_load(self, source: Any, *, from_ram: bool) -> str:
        """Let the user's function restore the model; return what went wrong, or ""."""
        assert self._load is not None
        failure = ""
        try:
            self._load(source, from_ram=from_ram)
        except Exception as error:
            self._load_error = error
            failure = f"load_callback failed: {type(error).__name__}: {error}"
        if self._everyone(bool(failure)).any():
            return failure or "load_callback failed on another rank"
        return ""

    def _after_rollback(self, step: int, to_step: int, source: str, began: float) -> None:
        self.restored_step = to_step
        self._catalog.rewind(to_step)
        self._backups.rolled_back(to_step)
        seconds = self._clock.monotonic() - began
        multiplier, hold = self._recovery.aftermath.lr_multiplier(step + 1), self._recovery.aftermath.hold
        self._emit(events.RolledBack, step, to_step, source, multiplier, hold, seconds)

    # LR search and state --------------------------------------------------------------------

    def parked(
        self, save: SaveCallback | None, scheduler_state: Callable[[], dict[str, Any]]
    ) -> AbstractContextManager[None]:
        """Put the user's model aside and bring it back at the end, whatever was done to it meanwhile."""
        assert self._load is not None
        return parked(self._backups.capture, self._load, save, scheduler_state)

    def state_dict(self) -> dict[str, Any]:
        """Return what the next steps depend on; backups stay in RAM."""
        return {"detector": self._detector.state_dict(), "recovery": self._recovery.state_dict(), "lr": self._lr}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, or nothing; backups of another state of the model are forgotten."""
        detector, recovery, lr = Detector(), Recovery(self._catalog.num_samples), float(state["lr"])
        detector.load_state_dict(state["detector"])
        recovery.load_state_dict(state["recovery"])
        self._detector, self._recovery, self._lr = detector, recovery, lr
        self._backups.forget()
