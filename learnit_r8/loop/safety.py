"""The safety net under the loop: has every loss judged, and brings the model back when that is needed.

What a judgement calls for is done here: the user's `load_callback`, the catalog, events.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from learnit_r8 import events
from learnit_r8.errors import tell
from learnit_r8.loop.callbacks import LoadCallback, SaveCallback
from learnit_r8.loop.evaluation.averages import Averages
from learnit_r8.loop.judge import Judge, Judgement
from learnit_r8.loop.lr_search import parked
from learnit_r8.stability.backups import BackupInfo, BackupStatus
from learnit_r8.stability.detector import Detector, Reading
from learnit_r8.stability.gate import Gate
from learnit_r8.stability.quarantine import Quarantine
from learnit_r8.stability.recovery import Action, Kind, Phase, RecoveryMachine
from learnit_r8.types import SAMPLES_TOLD, Indices, Mask, Verdict

if TYPE_CHECKING:
    from learnit_r8.checkpoint import LoadedCheckpoint

LR_RISE = 1.5
"""A learning rate that grows by this factor in a step may well move the loss: the detector is told."""

_NONFINITE_AT_END = 10
"""Losses in a row that are not finite, with which no run is finished."""
_LACKING = (
    "NaN comes back right after each restore, out of calm losses: what state_callback returns probably lacks the "
    "optimizer's state (momentum keeps NaN), batch statistics or gradients; return all that training changes, as "
    "{'model': model.state_dict(), 'optimizer': optimizer.state_dict()}, and load all of it"
)


def rises(before: float, lr: float) -> bool:
    """Say whether a learning rate is so much higher than the last one that it may move the loss."""
    return lr > 0.0 and lr >= LR_RISE * before >= 0.0


class _Found(NamedTuple):
    """What the model can go back to: a backup's state or a checkpoint's path (id None), and the detector's of then."""

    step: int
    state: Any
    source: str
    detector: dict[str, Any] | None
    id: int | None = None
    proven: bool = True
    ema: Any = None  # state of the averaged model, of a checkpoint


class SafetyNet(Judge):
    """Has losses judged, and does what that calls for. Arguments: see `Judge`.

    Attributes:
        restored_step: Step of the state that the last rollback went back to.
    """

    restored_step = 0
    _load_error: Exception | None = None
    _told_lack = False
    ema: Averages | None = None

    # What the loop asks ---------------------------------------------------------------------

    def attach(self, state_callback: Callable[[], Any], load: LoadCallback) -> None:
        """Take callbacks where none were given at construction; of two pairs, halves would not fit."""
        if self._load is None:
            self._load, self._given = load, state_callback
            self.backups.capture = state_callback if self._paced else None

    @property
    def quarantine(self) -> Mask | None:
        """Samples that are kept out of batches, bool `[N]`, or None."""
        ids = self._catalog.left_out
        if not len(ids):
            return None
        mask = np.zeros(self._catalog.num_samples, bool)
        mask[ids] = True
        return mask

    def saw_lr(self, step: int, lr: float) -> None:
        """Take note of a batch's learning rate."""
        if rises(self._lr, lr):
            self.detector.announce(step, "the learning rate rises")
        self.pass_lr(lr)

    def pass_lr(self, lr: float) -> None:
        """Take note of a batch's learning rate that is no far rise."""
        self._lr = lr
        self._backups.path += lr

    def before_step(self, step: int) -> None:
        """Take an automatic backup when one is due."""
        if self.machine.backups_allowed:
            self.backups.before_step(step, self.detector)

    def keep(self, state: Any, step: int) -> None:
        """Copy a state of the user's model into the ring, unless the model is suspect right now."""
        if self.machine.backups_allowed:
            self.backups.keep(state, step, self.detector)

    # Recovery -------------------------------------------------------------------------------

    def react(self, step: int, epoch: int, judgement: Judgement, loss: float, expected: float, ids: Indices) -> bool:
        """Do what an alarming judgement calls for, TrainingDiverged at worst; say whether the model was restored."""
        batch = tuple(ids[:SAMPLES_TOLD].tolist())
        if judgement.tell:
            verdict = judgement.verdict.value
            self._emit(
                events.SpikeSeen(
                    step=step,
                    epoch=epoch,
                    verdict=verdict,
                    loss=loss,
                    expected_loss=expected,
                    score=judgement.score,
                    indices=batch,
                    reason=judgement.tell,
                )
            )
        action, self._load_error = judgement.action, None
        if action.kind is Kind.RESTORE and not self.detector.ordinary(loss):
            self.leave_out(step, self._quarantine.trigger(), "in the batches of several faults")
        try:
            while action.kind is Kind.RESTORE:
                then = self._restore(step, action)
                if then is None:
                    return True
                action = then
        except BaseException:  # Ctrl-C in load_callback: the model may be half restored, the run must not be
            self.machine.restore_abandoned()
            raise
        if action.kind is Kind.FAIL:
            self._diverged(step, action.reason)
        if action.kind is Kind.ACCEPT_LEVEL:
            self._looked = False
            self.backups.excuse(step)
            self.detector.rebaseline()
            if self._policy.spike != "off":
                self._tell(step, f"a new level of the loss is accepted, the model was left alone: {action.reason}")
        elif judgement.action.kind is Kind.RESTORE or action.reason.startswith("nothing to restore"):
            why = "there is no load_callback" if self._load is None else "there is no backup to go back to"
            self._emit(events.RollbackFailed(step=step, reason=f"{action.reason} ({why})"))
        return False

    def finish(self, step: int) -> None:
        """Take a last look at the model: damage of the last steps shows in no loss, or in one."""
        policy, last = self._policy, self.detector.last
        if self._load is None or self.machine.phase is Phase.FAILED:
            return
        if policy.nonfinite == "rollback" and self.machine.nonfinite >= _NONFINITE_AT_END:
            reason = f"the last {self.machine.nonfinite} losses are not finite"
            self._diverged(step, self.machine.with_samples(reason))
        best = self.backups.best() if self.detector.just_lost else None
        before = step if best is None else best.step + 1
        look = self.backups.look(step, None if best is None else before)
        if look is None:
            return
        worse = best is not None or self.backups.worse_than_before(last)
        damaged = look.nonfinite and policy.nonfinite == "rollback"
        damaged = damaged or (look.jumped and policy.spike == "rollback" and worse)
        if not damaged or not self._can_restore(step):
            return
        verdict = Verdict.NONFINITE if look.nonfinite else Verdict.SPIKE
        judgement = self._undo(step, Reading(verdict, math.nan), f"at the end: {look}", before, verdict=verdict)
        self.react(step, 0, judgement, last, math.nan, np.empty(0, np.int64))

    def _tell(self, step: int, message: str) -> None:
        self._emit(events.Notice(step=step, message=message, level="warning"))

    def _diverged(self, step: int, reason: str) -> None:
        if self.machine.lacks or self._told_lack:
            reason = f"{reason}; {_LACKING}"
        best = self._where_the_best_is(step)
        reason = f"{reason}; {best}" if best else reason
        self._emit(events.RollbackFailed(step=step, reason=reason))
        self._crash.diverged(step, reason, self.machine.failing_batches, self._load_error)

    def _restore(self, step: int, action: Action) -> Action | None:
        """Restore from where the action says; None when it worked, else what to do next."""
        began = self._clock.monotonic()
        if action.source == "ram":
            info = self.backups.newest(action.before_step, unproven=action.unproven)
            found, lacking = None if info is None else self._in_ram(info), "no backup in RAM is good"
        else:
            found = self._on_disk(step + 1 if action.before_step is None else action.before_step, action.skip)
            lacking = "there is no checkpoint"
        if found is None:
            return self.machine.restore_failed(lacking, empty=True)
        failure = self._try_load(found)
        if failure:
            return self.machine.restore_failed(failure)
        self.machine.rolled_back(step, found.step, found.id, proven=found.proven)
        self._catalog.rewind(found.step)
        self._restored(step, step + 1, found, began)
        if self.machine.lacks and not self._told_lack:
            self._told_lack = True
            self._tell(step, _LACKING)
            tell(_LACKING, stacklevel=2)
        return None

    def _in_ram(self, info: BackupInfo) -> _Found:
        state, detector = self.backups.restore(info)
        proven = info.initial or info.status is BackupStatus.VERIFIED
        return _Found(info.step, state, "ram", detector, info.id, proven)

    def _on_disk(self, before: int, skip: int = 0) -> _Found | None:
        """Return a checkpoint that every rank can read."""
        return self._of_all(self._saver.find_before(before, skip))

    def _of_all(self, found: LoadedCheckpoint | None) -> _Found | None:
        """Return a checkpoint that a rank has found, if every rank can read it."""
        steps = self._everyone(-1.0 if found is None else found.step)
        if found is None and steps[0] >= 0:
            found = self._saver.find_step(int(steps[0]))
        steps = self._everyone(-1.0 if found is None else found.step)
        if found is None or steps.min() != steps.max():
            return None
        ema = (found.state.get("measured") or {}).get("ema")
        detector = found.state["safety"]["detector"]
        return _Found(found.step, str(found.model_path), str(found.path), detector, ema=ema)

    def _try_load(self, found: _Found) -> str:
        """Let the user's function restore the model; return what went wrong, or ""."""
        assert self._load is not None
        failure, self._load_error = "", None
        try:
            self._load(found.state, from_ram=found.source == "ram")
            if self.ema is not None and found.ema is not None:
                self.ema.load_state_dict(found.ema)
        except Exception as error:
            self._load_error = error
            failure = f"load_callback failed: {type(error).__name__}: {error}"
        if self._everyone(bool(failure)).any():
            return failure or "load_callback failed on another rank"
        return ""

    def _restored(self, step: int, resumes_at: int, found: _Found, began: float) -> None:
        """Bring everything else to where the model is."""
        self.restored_step = found.step
        self._looked, self._sound = False, True
        self.detector.reset_after_rollback(found.detector)
        self.backups.rolled_back(found.step, resumes_at)
        self._tell_restored(step, resumes_at, found, began)

    def _tell_restored(self, step: int, resumes_at: int, found: _Found, began: float) -> None:
        multiplier = self.machine.lr_multiplier(resumes_at)
        self._emit(
            events.RolledBack(
                step=step,
                to_step=found.step,
                source=found.source,
                lr_multiplier=multiplier,
                hold_steps=self.machine.hold if multiplier < 1.0 else 0,
                seconds=self._clock.monotonic() - began,
            )
        )

    # How it ended ---------------------------------------------------------------------------

    def levels(self) -> tuple[float | None, float | None, int | None]:
        """Return the level of the loss now, the lowest that it was, and the step of that; None where unknown."""
        level = self.detector.level
        if not (math.isfinite(level.now) and math.isfinite(level.lowest)):
            return None, None, None
        return level.now, level.lowest, level.lowest_step

    def ending(self, step: int) -> str:
        """Return a warning where the loss ends far above its best level, or ""."""
        level = self.detector.level
        if not level.far_above_best():
            return ""
        where = self._where_the_best_is(step)
        return (
            f"the loss ends at {level.now:.4g}, far above its best level of {level.lowest:.4g} around step "
            f"{level.lowest_step}" + (f": {where}" if where else "")
        )

    def _where_the_best_is(self, step: int) -> str:
        best = self.backups.ring.best()
        if best is not None and self._load is not None:
            return f"the backup of step {best.step} holds it, scheduler.restore_best() gets it back"
        found = self._saver.find_before(self.detector.level.lowest_step + 1, 0)
        return "" if found is None else f"the checkpoint {found.path} is from before that"

    def restore_best(self, step: int, epoch: int) -> int:
        """Bring the model back to the checkpoint of the best metric, or else to the best level; return its step.

        Raises:
            LookupError: There is none.
        """
        found = None if self._load is None else self._of_all(self._saver.find_best())
        best = self.backups.ring.best() if found is None else None
        if self._load is None or (found is None and best is None and not self._may_be_on_disk(step + 1)):
            raise LookupError("there is no backup and no checkpoint to restore: give state_callback and load_callback")
        if found is None:
            found = self._on_disk(self.detector.level.lowest_step + 1) if best is None else self._in_ram(best)
        found = found or self._on_disk(step + 1)
        if found is None:
            raise LookupError("there is no checkpoint that can be read")
        began = self._clock.monotonic()
        failure = self._try_load(found)
        if failure:
            raise RuntimeError(failure) from self._load_error
        self._restored(step, step, found, began)
        return found.step

    def recall(self, step: int, after: int) -> int | None:
        """Bring the model back to the newest backup in RAM, as a step was broken off; return the backup's step.

        It needs no other rank. None where there is no backup after the step `after`, or `load_callback` failed: the
        model is as it was left.
        """
        info = self.backups.ring.latest()
        if self._load is None or info is None or info.step <= after:
            return None
        began = self._clock.monotonic()
        found = self._in_ram(info)
        try:
            self._load(found.state, from_ram=True)
        except Exception as error:
            self._tell(step, f"load_callback failed: {type(error).__name__}: {error}")
            return None
        if found.step < step:
            self.detector.reset_after_rollback(found.detector)
            self._catalog.rewind(found.step)
        self._tell_restored(step, step, found, began)
        return found.step

    # LR search and state --------------------------------------------------------------------

    def parked(
        self, save: SaveCallback | None, scheduler_state: Callable[[], dict[str, Any]]
    ) -> AbstractContextManager[None]:
        """Put the user's model aside and bring it back at the end, whatever was done to it meanwhile."""
        assert self._load is not None
        return parked(self._given, self._load, save, scheduler_state)

    def state_dict(self) -> dict[str, Any]:
        """Return what the next steps depend on; backups stay in RAM."""
        return {
            "detector": self.detector.state_dict(),
            "recovery": self.machine.state_dict(),
            "quarantine": self._quarantine.state_dict(),
            "gate": self.gate.state_dict(),
            "lr": self._lr,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, or nothing; backups of another state of the model are forgotten."""
        self.settle()
        detector, machine, lr = Detector(), RecoveryMachine(self.machine.hold), float(state["lr"])
        quarantine = Quarantine(self._catalog.num_samples)
        detector.load_state_dict(state["detector"])
        machine.load_state_dict(state["recovery"])
        quarantine.load_state_dict(state["quarantine"])
        gate = Gate()
        if "gate" in state:  # not in states of older versions
            gate.load_state_dict(state["gate"])
        self._detector, self._machine, self._quarantine, self._lr = detector, machine, quarantine, lr
        self.gate = gate
        self._looked, self._sound = False, False
        self.backups.forget()
