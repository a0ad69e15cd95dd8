"""The safety net under the loop: has every loss judged, and brings the model back when that is needed.

It joins the rooms of `stability`, which know nothing of each other or of the user: the detector says whether a loss
is as usual, a look at the weights says whether they are to blame, the recovery machine says what to do, the ring
holds the backups. What is done happens here: the user's `load_callback`, the catalog, events.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from learnit_r8 import events
from learnit_r8.core.clock import Clock
from learnit_r8.errors import tell
from learnit_r8.loop.callbacks import LoadCallback, SaveCallback
from learnit_r8.loop.crash import CrashRecorder
from learnit_r8.loop.losses import LIMIT, Reported
from learnit_r8.loop.lr_search import parked
from learnit_r8.loop.ram_backups import Emit, RamBackups
from learnit_r8.loop.ranks import Ranks, Word
from learnit_r8.loop.saver import Saver
from learnit_r8.samples.catalog import LossCatalog
from learnit_r8.stability.backups import BackupStatus
from learnit_r8.stability.detector import Detector, Reading
from learnit_r8.stability.policy import Recovery
from learnit_r8.stability.quarantine import Quarantine, not_finite
from learnit_r8.stability.recovery import HELD_UNSEEN, Action, Cause, Kind, Phase, RecoveryMachine
from learnit_r8.types import SAMPLES_TOLD, Indices, Mask, Verdict

LR_RISE = 1.5
"""A learning rate that grows by this factor in a step may well move the loss: the detector is told."""

_MOST = 0.9
"""Share of the samples that must have been seen for their expected losses to be compared with the others'."""
_NONFINITE_AT_END = 10
"""Losses in a row that are not finite, with which no run is finished."""
_HOLD = 100, 20
"""Steps, and share of the budget, for which a fault that returned holds the learning rate down at most."""
_LACKING = (
    "NaN comes back right after each restore, out of calm losses: what state_callback returns probably lacks the "
    "optimizer's state (momentum keeps NaN), batch statistics or gradients; return all that training changes, as "
    "{'model': model.state_dict(), 'optimizer': optimizer.state_dict()}, and load all of it"
)


class Judgement(NamedTuple):
    """What one report is, and what it calls for.

    Attributes:
        verdict: The detector's.
        score: The detector's z; NaN while it is not active.
        action: The recovery table's answer.
        accepted: The loss may enter the catalog.
        tell: What is to be told of it, in words; empty for nothing.
    """

    verdict: Verdict
    score: float
    action: Action
    accepted: bool
    tell: str = ""

    @property
    def alarming(self) -> bool:
        """Whether something is to be told or done."""
        return bool(self.tell) or self.action.kind in _ACTS


_ACTS = (Kind.RESTORE, Kind.ACCEPT_LEVEL, Kind.FAIL)


class SafetyNet:
    """Detector, backups and recovery of one run.

    Args:
        policy: What faults cause.
        load: Restores the user's model, or None.
        state_callback: Returns the user's model state, or None.
        backup_every: Steps between automatic backups, "auto", or None for none.
        total_steps: Steps of the whole budget, or None.
        saver: Finds a checkpoint to go back to when RAM has nothing.
        catalog: Rewound on a rollback; knows the samples that are left out.
        emit: Lets the sinks hear an event.
        clock: Measures backups and restores, for the events.
        crash: Writes down what is known when training has diverged.
        ranks: They must take the same backups and go back to the same step, or each would go on with
            another model.

    Attributes:
        restored_step: Step of the state that the last rollback went back to.
    """

    def __init__(
        self,
        policy: Recovery,
        load: LoadCallback | None,
        state_callback: Callable[[], Any] | None,
        backup_every: int | str | None,
        total_steps: int | None,
        saver: Saver,
        catalog: LossCatalog,
        emit: Emit,
        clock: Clock,
        crash: CrashRecorder,
        ranks: Ranks,
    ) -> None:
        self._policy = policy
        self._load = load
        self._paced = backup_every is not None
        self._given = state_callback
        self._saver = saver
        self._catalog = catalog
        self._emit = emit
        self._clock = clock
        self._crash = crash
        self._everyone, self._world_size = ranks.everyone, ranks.world_size
        self._detector = Detector()
        self._machine = RecoveryMachine(min(_HOLD[0], max(8, (total_steps or 10**9) // _HOLD[1])))
        self._quarantine = Quarantine(catalog.num_samples)
        capture = state_callback if self._paced and load is not None else None
        self._backups = RamBackups(capture, backup_every or 1, emit, clock, ranks)
        self._lr = -1.0  # of the last batch; negative before the first one
        self._load_error: Exception | None = None
        self._looked = False  # at the weights, and told, since losses began to stand out
        self._sound = False  # the last look found the state finite, and nothing was trained since
        self._told_lack = False
        self.restored_step = 0

    # What the loop asks ---------------------------------------------------------------------

    def attach(self, state_callback: Callable[[], Any], load: LoadCallback) -> None:
        """Take callbacks where none were given at construction; of two pairs, halves would not fit."""
        if self._load is None:
            self._load, self._given = load, state_callback
            self._backups.capture = state_callback if self._paced else None

    @property
    def damaged(self) -> int | None:
        """Step of a backup that was found damaged on this rank and not acted on yet, or None."""
        return self._backups.damaged

    def hear(self, word: Word) -> None:
        """Take over what any rank found."""
        self._backups.damaged = word.damaged

    @property
    def quarantine(self) -> Mask | None:
        """Samples that are kept out of batches, bool `[N]`, or None."""
        ids = self._catalog.left_out
        if not len(ids):
            return None
        mask = np.zeros(self._catalog.num_samples, bool)
        mask[ids] = True
        return mask

    def stable_only(self, step: int) -> bool:
        """Whether a fault came back and batches of stable data are wanted."""
        return self._machine.stable_only(step)

    @property
    def restored(self) -> bool:
        """Whether the model was ever restored."""
        return self._machine.used is not None

    def lr_multiplier(self, step: int) -> float:
        """Recovery's factor on the learning rate, in (0, 1]."""
        return self._machine.lr_multiplier(step)

    def saw_lr(self, step: int, lr: float) -> None:
        """Take note of a batch's learning rate."""
        if lr > 0.0 and lr >= LR_RISE * self._lr >= 0.0:
            self._detector.announce(step, "the learning rate rises")
        self._lr = lr
        self._backups.path += lr

    def announce(self, step: int, why: str) -> None:
        """Tell the detector that the loss may change its level for a good reason."""
        self._detector.announce(step, why)

    def before_step(self, step: int) -> None:
        """Take an automatic backup when one is due."""
        if self._machine.backups_allowed:
            self._backups.before_step(step, self._detector)

    def keep(self, state: Any, step: int) -> None:
        """Copy a state of the user's model into the ring, unless the model is suspect right now."""
        if self._machine.backups_allowed:
            self._backups.keep(state, step, self._detector)

    def state_of(self, step: int) -> Any:
        """Return a copy of the model's state as it was before a step, if a backup was taken there; else None."""
        return self._backups.state_of(step)

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
        if skipped:
            self._crash.note(step, Verdict.SKIPPED, reported.mean, indices)
            action = self._machine.react(step, Cause.SKIPPED)
            return Judgement(Verdict.SKIPPED, math.nan, action, accepted=reported.finite)
        reading = self._read(step, reported, expected)
        self._crash.note(step, reading.verdict, reported.mean, indices)
        if outdated and reading.verdict is not Verdict.CALM:
            self._detector.reset_after_rollback()
            return Judgement(reading.verdict, reading.score, Action(Kind.IGNORE), accepted=False)
        if reading.verdict in (Verdict.CALM, Verdict.SUSPECT) and self._policy.spike == "rollback":
            since = self._backups.worse_since_move(reported.mean, calm=reading.verdict is Verdict.CALM)
            if since is not None and (judgement := self._moved_and_worse(step, reading, indices, since)):
                return judgement
        if reading.verdict is Verdict.CALM:
            return self._judge_calm(step, reported, reading)
        if reading.verdict is Verdict.NONFINITE:
            return self._judge_nonfinite(step, reported, reading, indices)
        if reading.verdict is Verdict.DRIFT:
            return self._judge_drift(step, reading)
        return self._judge_flagged(step, reported, reading, indices)

    def _read(self, step: int, reported: Reported, expected: float) -> Reading:
        catalog = self._catalog
        known = catalog.share_seen >= _MOST  # not all: what is always NaN is never seen
        return self._detector.observe(
            step,
            reported.mean,
            expected_batch=expected if known else math.nan,
            expected_all=catalog.mean_expected if known else math.nan,
            finite=reported.finite,
            samples=reported.values,
            easy=self._machine.stable_only(step),
        )

    def _moved_and_worse(self, step: int, reading: Reading, indices: Indices, since: int) -> Judgement | None:
        """Weights moved far beyond their habit, and the losses since are higher, if not by much: both is enough."""
        look = self._backups.look(step + 1, since)
        if (look is not None and not (look.nonfinite or look.jumped)) or not self._can_restore(step):
            return None
        seen = look or "the model is not seen"
        why = f"losses are higher since step {since}, before which weights had moved far; {seen}"
        action = self._machine.react(step, Cause.DAMAGE, can_restore=True, batch=indices, before_step=since, why=why)
        return Judgement(Verdict.SPIKE, reading.score, action, accepted=False, tell=why)

    def _judge_calm(self, step: int, reported: Reported, reading: Reading) -> Judgement:
        self._looked = False
        self._quarantine.calm()
        damaged, why = self._backups.damaged_since(), ""
        if damaged is not None:
            why = self._backups.damage
        elif self._machine.on_trial and self._policy.nonfinite == "rollback":
            look = self._backups.look(step + 1, None, calm=True)
            self._sound = look is not None and not look.nonfinite
            if look is not None and look.nonfinite:  # before any loss shows it
                damaged, why = step + 1, str(look)
        if damaged is not None and self._policy.nonfinite == "rollback" and self._can_restore(step):
            action = self._machine.react(
                step, Cause.DAMAGE, can_restore=True, finite=False, before_step=damaged, why=why
            )
            return Judgement(Verdict.NONFINITE, reading.score, action, accepted=False, tell=why)
        action = self._machine.react(step, Cause.CALM)
        self._backups.calm(step, self._detector.median)
        return Judgement(reading.verdict, reading.score, action, accepted=action.kind is Kind.ACCEPT)

    def _judge_nonfinite(self, step: int, reported: Reported, reading: Reading, indices: Indices) -> Judgement:
        ids, others = not_finite(indices, reported.values, LIMIT, self._world_size)
        if reported.own is not None:
            ids, others = indices[~(np.abs(reported.own) <= LIMIT)], reported.others
        found = not math.isnan(others) and self._detector.ordinary(others)
        named = tuple(ids.tolist()) if found else ()
        policy, sound_before = self._policy.nonfinite, self._sound
        self._sound = False
        if policy == "off":
            return Judgement(reading.verdict, reading.score, Action(Kind.IGNORE), accepted=False)
        cause, why, seen = Cause.REPORT, reading.reason, False
        if found:
            who = f"samples {shown(named)}" if named else "samples of another rank"
            why = f"the losses of {who} are not finite, those of the rest of the batch are"
        if policy == "rollback" and self._load is not None:
            look = self._backups.look(step + 1, self._detector.first_suspect_step)
            again = self._machine.nonfinite >= 1 and not found
            if look is None:
                # Where nobody can look, backups by hand are few and near; a checkpoint may be an epoch old.
                damaged = bool(self._backups.ring.backups) or again
            else:
                seen, self._sound = True, not look.nonfinite
                blind = look.since < 0 and bool(self._backups.ring.backups)  # all was zero, or has another layout
                damaged = bool(look.nonfinite or look.jumped) or (blind and again)
            if damaged:
                cause, why = (
                    Cause.DAMAGE,
                    f"{why}; {look}" if look and (look.nonfinite or look.jumped) else f"{why}, again",
                )
        if found:
            self._leave_out(step, named, "not finite, while the rest of its batch was")
        else:
            self._quarantine.suspect(indices, reported.values if reported.own is None else reported.own)
        if cause is Cause.REPORT and not seen and self._load is None and not found and policy == "rollback":
            cause = Cause.DAMAGE  # nobody can tell, and nobody can restore: it may be the end
        explained = found or (sound_before and self._machine.on_trial and self._machine.proven)
        action = self._machine.react(
            step,
            cause,
            can_restore=cause is Cause.DAMAGE and self._can_restore(step),
            batch=indices,
            finite=False,
            explained=explained,
            before_step=step + 1 if found else self._detector.first_suspect_step,
            why=why,
        )
        return Judgement(reading.verdict, reading.score, action, accepted=False, tell=why)

    def _judge_drift(self, step: int, reading: Reading) -> Judgement:
        policy = self._policy.drift
        best = self._backups.ring.best()
        if policy == "rollback" and best is not None and self._can_restore(step):
            action = self._machine.react(
                step, Cause.DAMAGE, can_restore=True, before_step=best.step + 1, why=reading.reason
            )
            return Judgement(reading.verdict, reading.score, action, accepted=False, tell=reading.reason)
        action = self._machine.react(step, Cause.DRIFT)
        tell = "" if policy == "off" else reading.reason
        return Judgement(reading.verdict, reading.score, action, accepted=True, tell=tell)

    def _judge_flagged(self, step: int, reported: Reported, reading: Reading, indices: Indices) -> Judgement:
        """Judge a loss that stands out: one is an outlier, several raise the question of the weights."""
        spike, policy = reading.verdict is Verdict.SPIKE, self._policy.spike
        cause, why, seen = Cause.JUMP if spike else Cause.OUTLIER, reading.reason, self._backups.capture is not None
        tell = reading.reason if spike and not self._looked and policy != "off" else ""
        self._sound = False
        self._quarantine.suspect(indices, reported.values)
        if spike and policy == "rollback" and self._can_restore(step):
            damage = self._damage(step)
            if damage:
                cause, why = Cause.DAMAGE, f"{reading.reason}; {damage}"
        self._looked |= spike
        action = self._machine.react(
            step,
            cause,
            can_restore=cause is Cause.DAMAGE,
            batch=indices,
            seen=seen,
            before_step=self._detector.first_suspect_step,
            why=why,
        )
        whole = self._detector.whole_batch
        if cause is Cause.DAMAGE:
            tell = why
        # What a whole batch has in common says nothing of its samples; what stands out among them does.
        return Judgement(reading.verdict, reading.score, action, accepted=not whole, tell=tell)

    def _damage(self, step: int) -> str:
        """Return what was found when losses in a row stand out, or "".

        The first look counts: what moved the losses moved the weights before them; later they follow the losses.
        """
        flagged = self._machine.flagged + 1
        if self._backups.capture is None:
            lost = self._detector.lost_all and flagged >= HELD_UNSEEN
            return f"{flagged} losses in a row as high as those of the untrained model" if lost else ""
        if self._looked:
            return ""
        if self._machine.just_restored:  # sound weights give such losses: it is not the weights
            self._backups.excuse(step)
            return ""
        look = self._backups.look(step + 1, self._detector.first_suspect_step)
        if look is not None and (look.nonfinite or look.jumped):
            return str(look)
        self._backups.excuse(step)
        return ""

    def _leave_out(self, step: int, ids: tuple[int, ...], reason: str) -> None:
        new = self._catalog.leave_out(ids)
        if new:
            self._emit(events.SampleQuarantined(step=step, indices=new, reason=reason))

    def _can_restore(self, step: int) -> bool:
        if self._load is None:
            return False
        return bool(self._everyone(bool(self._backups.ring.backups)).all()) or self._may_be_on_disk(step + 1)

    def _may_be_on_disk(self, before: int) -> bool:
        return bool(self._everyone(self._saver.has_before(before))[0])  # rank 0 writes for all

    # Recovery -------------------------------------------------------------------------------

    def react(self, step: int, epoch: int, judgement: Judgement, loss: float, expected: float, ids: Indices) -> bool:
        """Do what an alarming judgement calls for; return True when the model was restored.

        Raises:
            TrainingDiverged: Nothing is left to try.
        """
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
        if action.kind is Kind.RESTORE and not self._detector.ordinary(loss):
            self._leave_out(step, self._quarantine.trigger(), "in the batches of several faults")
        try:
            while action.kind is Kind.RESTORE:
                restored = self._from_ram(step, action) if action.source == "ram" else self._from_disk(step, action)
                if restored is None:
                    return True
                action = restored
        except BaseException:  # Ctrl-C in load_callback: the model may be half restored, the run must not be
            self._machine.restore_abandoned()
            raise
        if action.kind is Kind.FAIL:
            self._diverged(step, action.reason)
        if action.kind is Kind.ACCEPT_LEVEL:
            self._looked = False
            self._backups.excuse(step)
            self._detector.rebaseline()
            if self._policy.spike != "off":
                self._tell(step, f"a new level of the loss is accepted, the model was left alone: {action.reason}")
        elif judgement.action.kind is Kind.RESTORE or action.reason.startswith("nothing to restore"):
            why = "there is no load_callback" if self._load is None else "there is no backup to go back to"
            self._emit(events.RollbackFailed(step=step, reason=f"{action.reason} ({why})"))
        return False

    def finish(self, step: int) -> None:
        """Take a last look at the model: damage of the last steps shows in no loss, or in one."""
        policy, last = self._policy, self._detector.last
        if self._load is None or self._machine.phase is Phase.FAILED:
            return
        if policy.nonfinite == "rollback" and self._machine.nonfinite >= _NONFINITE_AT_END:
            reason = f"the last {self._machine.nonfinite} losses are not finite"
            self._diverged(step, self._machine.with_samples(reason))
        look = self._backups.look(step, None)
        if look is None:
            return
        damaged = look.nonfinite and policy.nonfinite == "rollback"
        damaged = damaged or (look.jumped and policy.spike == "rollback" and self._backups.worse_than_before(last))
        if not damaged or not self._can_restore(step):
            return
        action = self._machine.react(step, Cause.DAMAGE, can_restore=True, before_step=step, why=f"at the end: {look}")
        judgement = Judgement(
            Verdict.NONFINITE if look.nonfinite else Verdict.SPIKE, math.nan, action, False, str(look)
        )
        self.react(step, 0, judgement, last, math.nan, np.empty(0, np.int64))

    def _tell(self, step: int, message: str) -> None:
        self._emit(events.Notice(step=step, message=message, level="warning"))

    def _diverged(self, step: int, reason: str) -> None:
        if self._machine.lacks or self._told_lack:
            reason = f"{reason}; {_LACKING}"
        best = self._where_the_best_is(step)
        reason = f"{reason}; {best}" if best else reason
        self._emit(events.RollbackFailed(step=step, reason=reason))
        self._crash.diverged(step, reason, self._machine.failing_batches, self._load_error)

    def _from_ram(self, step: int, action: Action) -> Action | None:
        """Restore from the ring; None when it worked, else what to do next."""
        found = self._backups.newest(action.before_step, unproven=action.unproven)
        if found is None:
            return self._machine.restore_failed("no backup in RAM is good", empty=True)
        began = self._clock.monotonic()
        state, detector = self._backups.restore(found)
        failure = self._try_load(state, from_ram=True)
        if failure:
            return self._machine.restore_failed(failure)
        proven = found.initial or found.status is BackupStatus.VERIFIED
        self._machine.rolled_back(step, found.step, found.id, proven=proven)
        self._after_rollback(step, found.step, "ram", began, detector)
        return None

    def _from_disk(self, step: int, action: Action) -> Action | None:
        found = self._on_disk(step + 1 if action.before_step is None else action.before_step, action.skip)
        if found is None:
            return self._machine.restore_failed("there is no checkpoint", empty=True)
        began = self._clock.monotonic()
        to_step, path = found
        failure = self._try_load(str(path), from_ram=False)
        if failure:
            return self._machine.restore_failed(failure)
        self._machine.rolled_back(step, to_step, None)
        self._after_rollback(step, to_step, str(path.parent), began, self._saver.detector_of(path))
        return None

    def _on_disk(self, before: int, skip: int) -> tuple[int, Path] | None:
        """Return the step and model path of a checkpoint that every rank can read."""
        found = self._saver.find_before(before, skip)
        steps = self._everyone(-1.0 if found is None else found[0])
        if found is None and steps[0] >= 0:
            found = self._saver.find_step(int(steps[0]))
        steps = self._everyone(-1.0 if found is None else found[0])
        return found if steps.min() == steps.max() else None

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

    def _after_rollback(
        self, step: int, to_step: int, source: str, began: float, detector: dict[str, Any] | None
    ) -> None:
        self.restored_step = to_step
        self._looked, self._sound = False, True
        self._detector.reset_after_rollback(detector)
        self._catalog.rewind(to_step)
        self._backups.rolled_back(to_step, step + 1)
        seconds = self._clock.monotonic() - began
        multiplier = self._machine.lr_multiplier(step + 1)
        hold = self._machine.hold if multiplier < 1.0 else 0
        self._emit(
            events.RolledBack(
                step=step, to_step=to_step, source=source, lr_multiplier=multiplier, hold_steps=hold, seconds=seconds
            )
        )
        if self._machine.lacks and not self._told_lack:
            self._told_lack = True
            self._tell(step, _LACKING)
            tell(_LACKING, stacklevel=2)

    # How it ended ---------------------------------------------------------------------------

    def levels(self) -> tuple[float | None, float | None, int | None]:
        """Return the level of the loss now, the lowest that it was, and the step of that; None where unknown."""
        level = self._detector.level
        if not (math.isfinite(level.now) and math.isfinite(level.lowest)):
            return None, None, None
        return level.now, level.lowest, level.lowest_step

    def ending(self, step: int) -> str:
        """Return a warning where the loss ends far above its best level, or ""."""
        level = self._detector.level
        if not level.far_above_best():
            return ""
        where = self._where_the_best_is(step)
        return (
            f"the loss ends at {level.now:.4g}, far above its best level of {level.lowest:.4g} around step "
            f"{level.lowest_step}" + (f": {where}" if where else "")
        )

    def _where_the_best_is(self, step: int) -> str:
        best = self._backups.ring.best()
        if best is not None and self._load is not None:
            return f"the backup of step {best.step} holds it, scheduler.restore_best() gets it back"
        found = self._saver.find_before(self._detector.level.lowest_step + 1, 0)
        return "" if found is None else f"the checkpoint {found[1].parent} is from before that"

    def restore_best(self, step: int, epoch: int) -> int:
        """Bring the model back to the backup, or else the checkpoint, of the best level; return its step.

        Raises:
            LookupError: There is none.
        """
        best = self._backups.ring.best()
        if self._load is None or (best is None and not self._may_be_on_disk(step + 1)):
            raise LookupError("there is no backup and no checkpoint to restore: give state_callback and load_callback")
        self._load_error = None
        began = self._clock.monotonic()
        if best is not None:
            (state, detector), to_step, source = self._backups.restore(best), best.step, "ram"
            failure = self._try_load(state, from_ram=True)
        else:
            found = self._saver.find_before(self._detector.level.lowest_step + 1, 0)
            found = found or self._saver.find_before(step + 1, 0)
            if found is None:
                raise LookupError("there is no checkpoint that can be read")
            to_step, source, detector = found[0], str(found[1].parent), self._saver.detector_of(found[1])
            failure = self._try_load(str(found[1]), from_ram=False)
        if failure:
            raise RuntimeError(failure) from self._load_error
        self.restored_step = to_step
        self._detector.reset_after_rollback(detector)
        self._backups.rolled_back(to_step, step)
        self._emit(
            events.RolledBack(
                step=step,
                to_step=to_step,
                source=source,
                lr_multiplier=1.0,
                hold_steps=0,
                seconds=self._clock.monotonic() - began,
            )
        )
        return to_step

    def recall(self, step: int, after: int) -> int | None:
        """Bring the model back to the newest backup in RAM, as a step was broken off; return the backup's step.

        It needs no other rank.

        Args:
            step: Updates that the model had seen before the step that was broken off.
            after: A backup of this step or an earlier one is of no use.

        Returns:
            None where there is no such backup, or `load_callback` failed: the model is as it was left.
        """
        found = self._backups.ring.latest()
        if self._load is None or found is None or found.step <= after:
            return None
        began = self._clock.monotonic()
        state, detector = self._backups.restore(found)
        try:
            self._load(state, from_ram=True)
        except Exception as error:
            self._tell(step, f"load_callback failed: {type(error).__name__}: {error}")
            return None
        if found.step < step:
            self._detector.reset_after_rollback(detector)
            self._catalog.rewind(found.step)
        self._emit(
            events.RolledBack(
                step=step,
                to_step=found.step,
                source="ram",
                lr_multiplier=self.lr_multiplier(step),
                hold_steps=0,
                seconds=self._clock.monotonic() - began,
            )
        )
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
            "detector": self._detector.state_dict(),
            "recovery": self._machine.state_dict(),
            "quarantine": self._quarantine.state_dict(),
            "lr": self._lr,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, or nothing; backups of another state of the model are forgotten."""
        detector, machine, lr = Detector(), RecoveryMachine(self._machine.hold), float(state["lr"])
        quarantine = Quarantine(self._catalog.num_samples)
        detector.load_state_dict(state["detector"])
        machine.load_state_dict(state["recovery"])
        quarantine.load_state_dict(state["quarantine"])
        self._detector, self._machine, self._quarantine, self._lr = detector, machine, quarantine, lr
        self._looked, self._sound = False, False
        self._backups.forget()


def shown(ids: tuple[int, ...]) -> str:
    """Return the first ids, and how many more there are."""
    first = ", ".join(map(str, ids[:8]))
    return first + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
