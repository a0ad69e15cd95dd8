"""What a report is and what it calls for: the detector's word, a look at the weights, and the recovery table's answer.

It joins the rooms of `stability`, which know nothing of each other or of the user: the detector says whether a loss
is as usual, a look at the weights says whether they are to blame, the recovery machine says what to do, the ring
holds the backups. What is done about it is `loop.safety`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from learnit_r8 import events
from learnit_r8.core.clock import Clock
from learnit_r8.loop.callbacks import LoadCallback
from learnit_r8.loop.crash import CrashRecorder
from learnit_r8.loop.losses import LIMIT, Reported
from learnit_r8.loop.ram_backups import Emit, RamBackups
from learnit_r8.loop.ranks import Ranks
from learnit_r8.loop.saver import Saver
from learnit_r8.run.formats import sample
from learnit_r8.samples.catalog import LossCatalog
from learnit_r8.stability.changes import HABIT
from learnit_r8.stability.detector import Detector, Reading
from learnit_r8.stability.gate import Gate
from learnit_r8.stability.policy import Recovery
from learnit_r8.stability.quarantine import Quarantine, not_finite
from learnit_r8.stability.recovery import Action, Cause, Kind, RecoveryMachine
from learnit_r8.types import Indices, Verdict

_HABIT_LOST = 1.5
"""Habits that weights must have moved by since the best backup, where the loss is the untrained model's for dozens of
steps: six are never reached in so many, and without any a GAN's generator was restored."""
_HOLD = 100, 20
"""Steps, and share of the budget, for which a fault that returned holds the learning rate down at most."""
_LATE = 0.2  # seconds that news of a loss may be late
_ACTS = (Kind.RESTORE, Kind.ACCEPT_LEVEL, Kind.FAIL)


class Judgement(NamedTuple):
    """What one report is, and what it calls for.

    `score` is the detector's z, `tell` what is to be told, empty for nothing; an accepted loss may enter the catalog.
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


_ACCEPT = Action(Kind.ACCEPT)


class Judge:
    """Detector, backups and recovery machine of one run.

    The saver finds a checkpoint to go back to when RAM has nothing; ranks must take the same backups and go back to the
    same step, or each would go on with another model.
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
        self._detector, self.gate = Detector(), Gate()
        self._machine = RecoveryMachine(min(_HOLD[0], max(8, (total_steps or 10**9) // _HOLD[1])))
        self._quarantine = Quarantine(catalog.num_samples)
        capture = state_callback if self._paced and load is not None else None
        self._backups = RamBackups(capture, backup_every or 1, emit, clock, ranks)
        # How high each of the next losses may be to be calm beyond doubt, the next one last; and those that were, which
        # nobody has judged yet: step, mean, what was expected of the batch beyond the mean of all, samples, news, time.
        self.limits: list[float] = []
        self.floor = -math.inf  # how low they may be, without what was expected beyond the mean of all
        self.remembers = False  # while losses may be put off: whether there are backups to go back to
        self._put_off: list[tuple[int, float, float, Indices, events.LossReported | None, float]] = []
        self.tell_calm: Callable[[events.LossReported, float, float], None] = lambda event, score, time: None
        self._lr = -1.0  # of the last batch; negative before the first one
        self._looked = False  # at the weights, and told, since losses began to stand out
        self._sound = False  # the last look found the state finite, and nothing was trained since

    def grow(self, num_samples: int) -> None:
        """Judge the samples of a larger data set."""
        self._quarantine.num_samples = num_samples

    @property
    def detector(self) -> Detector:
        """The detector, every loss in it."""
        self.settle()
        return self._detector

    @property
    def machine(self) -> RecoveryMachine:
        """The recovery machine, likewise."""
        self.settle()
        return self._machine

    @property
    def backups(self) -> RamBackups:
        """The backups in RAM, likewise."""
        self.settle()
        return self._backups

    # What no calm loss changes, asked at every step.

    @property
    def goes_back(self) -> bool:
        """Whether there are backups in RAM to go back to."""
        return self._load is not None and len(self._backups.ring) > 0

    @property
    def restored(self) -> bool:
        """Whether the model was ever restored from a backup."""
        return self._machine.used is not None

    def stable_only(self, step: int) -> bool:
        """Say whether a batch of this step should come from stable (low-loss) samples."""
        return self._machine.stable_only(step)

    def lr_multiplier(self, step: int) -> float:
        """Return the factor on the scheduled learning rate at a step."""
        return self._machine.lr_multiplier(step)

    def steady(self, step: int) -> bool:
        """Say whether neither of these is in force from a step on, and nothing is in question."""
        return self._machine.healthy(step) and self._machine.lr_multiplier(step) == 1.0

    # Losses that are calm beyond doubt are put off, and judged together.

    def put_off(
        self, step: int, loss: float, excess: float, indices: Indices, news: events.LossReported | None, time: float
    ) -> None:
        """Take a loss within the next one of `limits`: it is calm, which is worked out later.

        `news`: an event but for its score, to be told then; it happened at this time.
        """
        self._put_off.append((step, loss, excess, indices, news, time))
        self.limits.pop()
        if not self.limits or time - self._put_off[0][-1] > _LATE:
            self.settle()
            self.allow(step + 1)

    def allow(self, step: int) -> None:
        """Work out which losses may be put off from this step on."""
        backups, self.remembers = self._backups, self.goes_back
        if backups.unsuspected and self._machine.healthy(step):
            self.limits, self.floor = self._detector.calm_limits(backups.ring.undecided)

    def settle(self) -> None:
        """Judge what was put off, as if each loss had been judged when it came. Until `allow`, none is put off."""
        if self.limits:
            self.limits = []
        if not self._put_off:
            return
        waiting, self._put_off = self._put_off, []
        steps, losses, excesses, indices, news, times = zip(*waiting, strict=True)
        scores = self._detector.take_calm(losses, excesses, scored=news[-1] is not None)
        for k in range(len(scores), len(losses)):  # none, as far as `calm_limits` is right; a run must not end over it
            reading = self._detector.observe(steps[k], losses[k], expected_batch=excesses[k], expected_all=0.0)
            scores.append(reading.score)
        told = [(event, z, at) for event, z, at in zip(news, scores, times, strict=True) if event is not None]
        for event, z, at in told[:-1]:
            self.tell_calm(event, z, at)
        self._pass_calm(steps, losses, indices)
        for event, z, at in told[-1:]:
            self.tell_calm(event, z, at)

    def _pass_calm(self, steps: Sequence[int], losses: Sequence[float], indices: Sequence[Indices]) -> None:
        """Let all but the detector hear of calm losses while nothing is in question."""
        self._crash.note_calm(steps, losses, indices)
        self._looked = False
        self._quarantine.calm(len(losses))
        self._machine.pass_calm(len(losses))
        self._backups.pass_calm(steps[-1], losses)

    def judge(
        self,
        step: int,
        reported: Reported,
        expected: float,
        indices: Indices,
        *,
        skipped: bool,
        outdated: bool = False,
        scored: bool = True,
        left_out: str = "",
    ) -> Judgement:
        """Say what a report is and what it calls for.

        `outdated`: the batch was out when the model was restored: its loss may be of the model that is gone. `scored`:
        the score of a calm loss is wanted, too. `left_out`: why no step was taken on the batch.
        """
        self.settle()
        if left_out and reported.finite:
            self._crash.note(step, Verdict.SKIPPED, reported.mean, indices)
            self._quarantine.suspect(indices, reported.values)
            action = self.machine.react(step, Cause.SKIPPED)
            return Judgement(
                Verdict.SKIPPED, math.nan, action, accepted=False, tell=f"left out before its step: {left_out}"
            )
        if not (skipped or outdated or left_out) and (
            calm := self._take_calm(step, reported, expected, indices, scored)
        ):
            return calm
        if skipped and not left_out:
            self._crash.note(step, Verdict.SKIPPED, reported.mean, indices)
            action = self.machine.react(step, Cause.SKIPPED)
            return Judgement(Verdict.SKIPPED, math.nan, action, accepted=reported.finite)
        reading = self._read(step, reported, expected)
        self._crash.note(step, reading.verdict, reported.mean, indices)
        if outdated and reading.verdict is not Verdict.CALM:
            self.detector.reset_after_rollback()
            return Judgement(reading.verdict, reading.score, Action(Kind.IGNORE), accepted=False)
        if judgement := self._judge_worse(step, reported, reading, indices):
            return judgement
        if reading.verdict is Verdict.CALM:
            return self._judge_calm(step, reading)
        if reading.verdict is Verdict.NONFINITE:
            return self._judge_nonfinite(step, reported, reading, indices, applied=not left_out)
        if reading.verdict is Verdict.DRIFT:
            return self._judge_drift(step, reading)
        return self._judge_flagged(step, reported, reading, indices)

    def _take_calm(
        self, step: int, reported: Reported, expected: float, indices: Indices, scored: bool
    ) -> Judgement | None:
        """Judge a loss that is calm beyond doubt amid others, as nearly all are: the same as below, in fewer calls."""
        if not (reported.finite and self._backups.unsuspected and self._machine.healthy(step)):
            return None
        excess = expected - self._catalog.usual
        scores = self._detector.take_calm((reported.mean,), (excess,), scored=scored)
        if not scores:
            return None
        self._pass_calm((step,), (reported.mean,), (indices,))
        return Judgement(Verdict.CALM, scores[0], _ACCEPT, True)

    def _read(self, step: int, reported: Reported, expected: float) -> Reading:
        return self.detector.observe(
            step,
            reported.mean,
            expected_batch=expected,
            expected_all=self._catalog.usual,
            finite=reported.finite,
            samples=reported.values,
            easy=self.machine.stable_only(step),
        )

    def _undo(
        self,
        step: int,
        reading: Reading,
        why: str,
        before: int,
        *,
        indices: Iterable[int] = (),
        verdict: Verdict = Verdict.SPIKE,
    ) -> Judgement:
        """Ask for a backup from before a step: the evidence is beyond doubt."""
        finite = verdict is not Verdict.NONFINITE
        action = self.machine.react(
            step, Cause.DAMAGE, can_restore=True, batch=indices, finite=finite, before_step=before, why=why
        )
        return Judgement(verdict, reading.score, action, accepted=False, tell=why)

    def _judge_worse(self, step: int, reported: Reported, reading: Reading, indices: Indices) -> Judgement | None:
        """Judge what no single loss shows."""
        if reading.verdict in (Verdict.CALM, Verdict.SUSPECT):
            calm = reading.verdict is Verdict.CALM
            since = self.backups.worse_since_move(reported.mean, self.detector.first_level, calm=calm)
            if since is not None:
                why = f"losses are higher since step {since}, before which weights had moved far"
                if judgement := self._undo_if_moved(step, reading, indices, since, why):
                    return judgement
        level = self.detector.level
        if level.lost:
            level.lost = False
            best = self.backups.best()
            # It may be a new task that is not learned yet: it is undone again only after it was learned again.
            if best is not None or self.backups.capture is None:
                since = (level.lowest_step if best is None else best.step) + 1
                why = "the loss has been that of the untrained model for dozens of steps"
                return self._undo_if_moved(step, reading, indices, since, why, habit=_HABIT_LOST)
        return None

    def _undo_if_moved(
        self, step: int, reading: Reading, indices: Indices, since: int, why: str, *, habit: float = HABIT
    ) -> Judgement | None:
        """Losses are worse since a step, if not by a jump: where weights moved far since then, both is enough."""
        if self._policy.spike != "rollback" or not self._can_restore(step):
            return None
        look = self.backups.look(step + 1, since, habit=habit)
        if look is not None and not look.damaged:
            return None
        return self._undo(step, reading, f"{why}; {look or 'the model is not seen'}", since, indices=indices)

    def _judge_calm(self, step: int, reading: Reading) -> Judgement:
        self._looked = False
        self._quarantine.calm()
        damaged, why = self.backups.damaged_since(), self.backups.damage
        if damaged is None and self.machine.on_trial and self._policy.nonfinite == "rollback":
            look = self.backups.look(step + 1, None, calm=True)
            self._sound = look is not None and not look.nonfinite
            if look is not None and look.nonfinite:  # before any loss shows it
                damaged, why = step + 1, str(look)
        if damaged is not None and self._policy.nonfinite == "rollback" and self._can_restore(step):
            return self._undo(step, reading, why, damaged, verdict=Verdict.NONFINITE)
        action = self.machine.react(step, Cause.CALM)
        self.backups.calm(step, self.detector.last)
        return Judgement(reading.verdict, reading.score, action, accepted=action.kind is Kind.ACCEPT)

    def _judge_nonfinite(
        self, step: int, reported: Reported, reading: Reading, indices: Indices, *, applied: bool
    ) -> Judgement:
        ids, others = not_finite(indices, reported.values, LIMIT, self._world_size)
        if reported.own is not None:
            ids, others = indices[~(np.abs(reported.own) <= LIMIT)], reported.others
        found = not math.isnan(others) and self.detector.ordinary(others)
        named = tuple(ids.tolist()) if found else ()
        policy, sound_before = self._policy.nonfinite, self._sound
        self._sound = False
        if policy == "off":
            return Judgement(reading.verdict, reading.score, Action(Kind.IGNORE), accepted=False)
        cause, why, seen = Cause.REPORT, reading.reason, False
        if found:
            who = f"samples {shown(self._catalog.names(named))}" if named else "samples of another rank"
            why = f"the losses of {who} are not finite, those of the rest of the batch are"
        if policy == "rollback" and self._load is not None:
            look = self.backups.look(step + 1, self.detector.first_suspect_step)
            again = self.machine.nonfinite >= 1 and not found
            if look is None:
                # Where nobody can look, backups by hand are few and near; a checkpoint may be an epoch old.
                damaged = (applied and bool(self.backups.ring.backups)) or again
            else:
                seen, self._sound = True, not look.nonfinite
                blind = look.since < 0 and bool(self.backups.ring.backups)  # all was zero, or has another layout
                damaged = look.damaged or (blind and again)
            if damaged:
                cause = Cause.DAMAGE
                why = f"{why}; {look}" if look is not None and look.damaged else f"{why}, again"
        if found:
            self.leave_out(step, named, "not finite, while the rest of its batch was")
        else:
            self._quarantine.suspect(indices, reported.values if reported.own is None else reported.own)
        if cause is Cause.REPORT and not seen and self._load is None and not found and policy == "rollback" and applied:
            cause = Cause.DAMAGE  # nobody can tell, and nobody can restore: it may be the end
        explained = found or (sound_before and self.machine.on_trial and self.machine.proven)
        action = self.machine.react(
            step,
            cause,
            can_restore=cause is Cause.DAMAGE and self._can_restore(step),
            batch=indices,
            finite=False,
            explained=explained,
            before_step=step + 1 if found else self.detector.first_suspect_step,
            why=why,
        )
        return Judgement(reading.verdict, reading.score, action, accepted=False, tell=why)

    def _judge_drift(self, step: int, reading: Reading) -> Judgement:
        policy = self._policy.drift
        if policy == "rollback" and self._can_restore(step) and (best := self.backups.best()) is not None:
            return self._undo(step, reading, reading.reason, best.step + 1, verdict=reading.verdict)
        action = self.machine.react(step, Cause.DRIFT)
        tell = "" if policy == "off" else reading.reason
        return Judgement(reading.verdict, reading.score, action, accepted=True, tell=tell)

    def _judge_flagged(self, step: int, reported: Reported, reading: Reading, indices: Indices) -> Judgement:
        """Judge a loss that stands out: one is an outlier, several raise the question of the weights."""
        spike, policy = reading.verdict is Verdict.SPIKE, self._policy.spike
        cause, why, seen = Cause.JUMP if spike else Cause.OUTLIER, reading.reason, self.backups.capture is not None
        tell = reading.reason if spike and not self._looked and policy != "off" else ""
        self._sound = False
        self._quarantine.suspect(indices, reported.values)
        if spike and policy == "rollback" and self._can_restore(step):
            damage = self._damage(step)
            if damage:
                cause, why = Cause.DAMAGE, f"{reading.reason}; {damage}"
        self._looked |= spike
        action = self.machine.react(
            step,
            cause,
            can_restore=cause is Cause.DAMAGE,
            batch=indices,
            seen=seen,
            before_step=self.detector.first_suspect_step,
            why=why,
        )
        whole = self.detector.whole_batch
        if cause is Cause.DAMAGE:
            tell = why
        # What a whole batch has in common says nothing of its samples; what stands out among them does.
        return Judgement(reading.verdict, reading.score, action, accepted=not whole, tell=tell)

    def _damage(self, step: int) -> str:
        """Return what was found when losses in a row stand out, or "".

        The first look counts: what moved the losses moved the weights before them; later they follow the losses.
        """
        if self._looked or self.backups.capture is None:
            return ""
        if self.machine.just_restored:  # sound weights give such losses: it is not the weights
            self.backups.excuse(step)
            self.detector.level.learned = 0  # nor was anything lost
            return ""
        look = self.backups.look(step + 1, self.detector.first_suspect_step)
        if look is not None and look.damaged:
            return str(look)
        self.backups.excuse(step)
        return ""

    def leave_out(self, step: int, ids: tuple[int, ...], reason: str) -> None:
        """Keep samples out of the epochs to come, and tell which are new."""
        new = self._catalog.leave_out(ids)
        if new:
            self._emit(events.SampleQuarantined(step=step, indices=new, reason=reason))

    def _can_restore(self, step: int) -> bool:
        if self._load is None:
            return False
        return bool(self._everyone(bool(self.backups.ring.backups)).all()) or self._may_be_on_disk(step + 1)

    def _may_be_on_disk(self, before: int) -> bool:
        return bool(self._everyone(self._saver.has_before(before))[0])  # rank 0 writes for all


def shown(ids: Sequence[int | str]) -> str:
    """Return the first ids, or keys, and how many more there are."""
    first = ", ".join(sample(one, 40) for one in ids[:8])
    return first + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
