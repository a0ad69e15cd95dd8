"""What to do about a report: one table, phase x signal -> action and next phase.

`RecoveryMachine` is pure logic: it looks at nothing and restores nothing itself. The caller says what a report comes
to, once the evidence is in (a `Cause`), carries out the `Action` that `react` returns and tells back how that went
(`rolled_back`, `restore_failed`), which may lead to another action.

The answer is in proportion to the cause. Samples whose losses alone are not finite are left out, a report that is not
finite while the model is sound is left out, a loss that jumps while the weights go on as usual is told and accepted
after 16 losses. Only damaged weights are restored:

* The newest backup from before the damage comes first, also one that only a calm loss and a scan have tested. The next
  losses are its trial: eight calm ones acquit it, whatever comes later.
* A fault that comes back within the trial, and that no sample and no batch explains, speaks against the backup or
  comes from outside (a rate out of bounds). A proven backup is tried once more; then the next older one, those on disk
  included, while the newer ones are kept; ten such returns without an acquittal are a divergence. An
  older one is also tried where a fault that grows takes as many steps to show as it did the first time, and where one
  backup is needed for the fourth time and none newer was proved in between.
* Only such a return within 30 steps lowers the learning rate: by half, down to an eighth, for 100 steps or a
  twentieth of the budget, and takes the next eight batches from stable samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice
from typing import Any, NamedTuple

from learnit_r8.core.state import Saved, each, maybe, table
from learnit_r8.errors import ProtocolError
from learnit_r8.types import SAMPLES_TOLD

ACQUITTAL = 8  # calm losses: as many as prove a backup
HELD = 16  # Losses in a row that stand out, after which their level is accepted
HELD_UNSEEN = 32  # The same where the weights cannot be seen: most spikes heal within a few dozen steps
_SETTLE = 8
_QUICK = 30
_RETURNS = 10
_GRADUAL = 3  # losses that stood out before a fault that grew
_NO_PROGRESS = 3  # Restores of one backup, none newer being proved in between, after which an older one is tried
_NONFINITE = 64  # reports in a row, while the model is sound
_UNRESTORABLE = 10
_LEAST_FACTOR = 1 / 8
_LACKS = 4  # reports, at most, after which NaN is back


class Phase(StrEnum):
    """How far training is to be trusted."""

    HEALTHY = "healthy"
    QUESTION = "question"
    ROLLBACK = "rollback"
    TRIAL = "trial"
    FAILED = "failed"


class Cause(StrEnum):
    """What a report comes to."""

    CALM = "calm"
    SKIPPED = "skipped"  # The optimizer's step was
    OUTLIER = "outlier"  # One loss stands out
    JUMP = "jump"  # Losses in a row stand out, and the weights moved as usual or cannot be seen
    DRIFT = "drift"
    REPORT = "report"  # The loss is not finite, the model is; or only some samples' losses are not
    DAMAGE = "damage"  # The weights hold NaN, or moved beyond their habit


class Signal(StrEnum):
    """Facts, besides causes, that lead from one phase to another."""

    SETTLED = "settled"
    ACQUITTED = "acquitted"
    HELD = "level held"
    RESTORED = "restored"
    RESTORE_FAILED = "restore failed"
    UNRESTORABLE = "nothing to restore"
    EXHAUSTED = "exhausted"


class Kind(StrEnum):
    """What the caller is to do."""

    ACCEPT = "accept"  # Record the loss
    HOLD = "hold"  # Keep the loss out of the statistics, take no backup
    IGNORE = "ignore"  # Leave the report out
    TELL = "tell"  # Record the loss, tell of it
    RESTORE = "restore"  # Restore from `Action.source`, then call `rolled_back` or `restore_failed`
    ACCEPT_LEVEL = "accept level"  # Let the detector learn the new level, warn
    FAIL = "fail"  # Raise `TrainingDiverged`


class _Move(NamedTuple):
    kind: Kind
    phase: Phase


_LIVE = (Phase.HEALTHY, Phase.QUESTION, Phase.TRIAL)

TABLE: dict[tuple[Phase, Cause | Signal], _Move] = {
    **{(phase, Cause.CALM): _Move(Kind.ACCEPT, phase) for phase in _LIVE},
    **{(phase, Cause.DRIFT): _Move(Kind.TELL, phase) for phase in _LIVE},
    **{(phase, cause): _Move(Kind.IGNORE, phase) for phase in _LIVE for cause in (Cause.SKIPPED, Cause.REPORT)},
    **{(phase, Cause.DAMAGE): _Move(Kind.RESTORE, Phase.ROLLBACK) for phase in _LIVE},
    **{(phase, cause): _Move(Kind.HOLD, Phase.QUESTION) for phase in _LIVE for cause in (Cause.OUTLIER, Cause.JUMP)},
    (Phase.TRIAL, Cause.OUTLIER): _Move(Kind.HOLD, Phase.TRIAL),
    (Phase.TRIAL, Cause.JUMP): _Move(Kind.HOLD, Phase.TRIAL),
    **{(Phase.FAILED, cause): _Move(Kind.FAIL, Phase.FAILED) for cause in Cause},
    (Phase.QUESTION, Signal.SETTLED): _Move(Kind.ACCEPT, Phase.HEALTHY),
    (Phase.QUESTION, Signal.HELD): _Move(Kind.ACCEPT_LEVEL, Phase.HEALTHY),
    (Phase.TRIAL, Signal.HELD): _Move(Kind.ACCEPT_LEVEL, Phase.HEALTHY),
    (Phase.TRIAL, Signal.ACQUITTED): _Move(Kind.ACCEPT, Phase.HEALTHY),
    (Phase.ROLLBACK, Signal.RESTORED): _Move(Kind.ACCEPT, Phase.TRIAL),
    (Phase.ROLLBACK, Signal.RESTORE_FAILED): _Move(Kind.RESTORE, Phase.ROLLBACK),
    (Phase.ROLLBACK, Signal.UNRESTORABLE): _Move(Kind.IGNORE, Phase.QUESTION),
    (Phase.ROLLBACK, Signal.EXHAUSTED): _Move(Kind.FAIL, Phase.FAILED),
    (Phase.QUESTION, Signal.EXHAUSTED): _Move(Kind.FAIL, Phase.FAILED),
    (Phase.TRIAL, Signal.EXHAUSTED): _Move(Kind.FAIL, Phase.FAILED),
    (Phase.HEALTHY, Signal.EXHAUSTED): _Move(Kind.FAIL, Phase.FAILED),
}


@dataclass(frozen=True, slots=True)
class Action:
    """What the caller is to do now, and why in one sentence for events and errors.

    The rest is for RESTORE: from "ram" or "disk", from before which step, how many of the newest checkpoints not to
    try, and whether a backup in RAM that only one loss has tested will do.
    """

    kind: Kind
    reason: str = ""
    source: str = ""
    before_step: int | None = None
    skip: int = 0
    unproven: bool = False


_PLAIN = {kind: Action(kind) for kind in Kind}
_ACCEPT = _PLAIN[TABLE[Phase.HEALTHY, Cause.CALM].kind]  # what nearly every step gets


class RecoveryMachine(Saved):
    """The state machine of `TABLE` with its counters.

    `hold`: steps for which a fault that returned holds the learning rate down. `used`: id (None: a checkpoint) and step
    of the backup that was restored last; `proven`: later losses had proved it. `lacks`: NaN came back so soon, from
    calm losses, that it must lack something. `failing_batches`: sample ids of the last faulty batches, oldest first, at
    most 3.
    """

    _saved = table(
        phase=Phase, used=maybe(each(maybe(int))), failing_batches=each(each(int)), source=str, factor=float,
        before_step=maybe(int), older=maybe(int),
        **dict.fromkeys(("lacks", "proven", "callback_failed", "unproven", "explained", "grew"), bool),
        **dict.fromkeys(("flagged", "nonfinite", "calm", "calm_since", "reports_since", "returns", "uses"), int),
        **dict.fromkeys(("soon", "unrestorable", "until", "stable_until", "attempts", "skip", "same", "delay"), int),
    )  # fmt: skip

    def __init__(self, hold: int = 100) -> None:
        self.phase = Phase.HEALTHY
        self.hold = hold
        self.flagged = self.nonfinite = 0
        self.used: list[int | None] | None = None
        self.lacks = False
        self.failing_batches: list[list[int]] = []
        self._calm = 0  # calm losses in a row
        self._calm_since = self._reports_since = 0  # the last restore
        self._returns = self._uses = self._soon = self._unrestorable = 0
        self._factor, self._until, self._stable_until = 1.0, 0, 0
        self._source, self._attempts, self._skip = "ram", 0, 0
        self._before_step: int | None = None
        self._older: int | None = None  # faults returned: only backups of earlier steps
        self._callback_failed = self._unproven = self._explained = False
        self._grew = False
        self._same = self._delay = 0
        self.proven = False

    @property
    def backups_allowed(self) -> bool:
        """Say whether the state is sound enough to be backed up."""
        return not self.flagged and not self.nonfinite and self.phase is not Phase.FAILED

    @property
    def on_trial(self) -> bool:
        """Say whether the backup that was restored last has yet to be acquitted."""
        return self.phase is Phase.TRIAL

    def healthy(self, step: int) -> bool:
        """Say whether a calm loss of this step changes nothing but counts, and was of an ordinary batch."""
        return self.phase is Phase.HEALTHY and step >= self._stable_until

    @property
    def just_restored(self) -> bool:
        """Say whether no calm loss has come since the last restore."""
        return self.phase is Phase.TRIAL and self._calm_since == 0

    def lr_multiplier(self, step: int) -> float:
        """Return the factor on the scheduled learning rate at a step."""
        return self._factor if step < self._until else 1.0

    def stable_only(self, step: int) -> bool:
        """Say whether a batch of this step should come from stable (low-loss) samples."""
        return step < self._stable_until

    def react(
        self,
        step: int,
        cause: Cause,
        *,
        can_restore: bool = False,
        batch: Iterable[int] = (),
        finite: bool = True,
        explained: bool = False,
        seen: bool = True,
        before_step: int | None = None,
        why: str = "",
    ) -> Action:
        """Take what a report comes to and say what to do.

        `explained`: samples of this batch, or the batch, are the cause: no backup is to blame. `seen`: the weights
        could be looked at. Backups from `before_step` on are touched by the damage.
        """
        if self.used is not None:
            self._reports_since += 1
        if cause is Cause.CALM:
            return self._on_calm()
        if cause in (Cause.SKIPPED, Cause.DRIFT) or self.phase is Phase.FAILED:
            return self._move(cause, why)
        self._calm = 0
        self.nonfinite = 0 if finite else self.nonfinite + 1
        if cause is not Cause.OUTLIER:
            self.failing_batches = [*self.failing_batches, [int(i) for i in islice(batch, SAMPLES_TOLD)]][-3:]
        if not finite and self.nonfinite >= _NONFINITE:
            return self._give_up(f"{_NONFINITE} losses in a row are not finite, while the model is: look at the data")
        if cause is Cause.REPORT:
            return self._move(cause, why)
        if cause is Cause.DAMAGE:
            return self._on_damage(step, can_restore, finite, explained, before_step, why)
        self.flagged += 1
        if self.flagged >= (HELD if seen else HELD_UNSEEN):
            self._move(cause)
            self.flagged = 0
            return self._move(Signal.HELD, why or f"{HELD if seen else HELD_UNSEEN} losses in a row stand out")
        return self._move(cause, why or "the loss stands out")

    def pass_calm(self, losses: int) -> None:
        """Take calm losses where the run is healthy: they change nothing but counts."""
        if self.used is not None:
            self._reports_since += losses
        self.flagged = self.nonfinite = self._unrestorable = 0
        self._calm += losses

    def rolled_back(self, step: int, to_step: int, backup_id: int | None, *, proven: bool = True) -> None:
        """Take note that the model was restored after the faulty loss of `step`; a checkpoint has no id."""
        self._move(Signal.RESTORED)
        same = self.used == [backup_id, to_step]
        self._uses = self._uses if same else 0
        self._same = self._same + (not self._explained) if same else 1
        self.used, self.proven, self._delay = [backup_id, to_step], proven, step + 1 - to_step
        self.flagged = self._unrestorable = 0
        self._calm_since = self._reports_since = 0

    def restore_failed(self, reason: str, *, empty: bool = False) -> Action:
        """Take note that the restore failed, or that its source was empty, and say what to try next.

        Each backup and checkpoint is tried twice, the second time with a fresh copy; then older ones, then the disk.
        """
        self._callback_failed |= not empty
        if not empty and self._attempts == 0:
            self._attempts = 1
            return self._restore(Signal.RESTORE_FAILED, f"{reason}; once more with a fresh copy")
        self._attempts = 0
        if self._source == "ram":
            self._source = "disk"
        elif not empty:
            self._skip += 1
        elif self._older is not None and not self._callback_failed:
            self._older, self._source, self._skip = None, "ram", 0  # nothing is older: the newest one again
        else:
            return self._give_up(f"no backup and no checkpoint is left to restore: {reason}")
        return self._restore(Signal.RESTORE_FAILED, reason)

    def restore_abandoned(self) -> None:
        """Take note that the restore was interrupted: the model is what the caller left it at."""
        self._attempts = 0
        if self.phase is Phase.ROLLBACK:
            self._move(Signal.UNRESTORABLE)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; a run that had diverged, or was amid a restore, is tried anew."""
        if Phase(state["phase"]) in _LIVE:
            super().load_state_dict(state)
        else:
            self.__init__(self.hold)  # type: ignore[misc]

    def _on_calm(self) -> Action:
        self.flagged = self.nonfinite = self._unrestorable = 0
        self._calm += 1
        if self.phase is Phase.HEALTHY:  # nearly always
            return _ACCEPT
        action = self._move(Cause.CALM)
        if self.phase is Phase.QUESTION:
            return self._move(Signal.SETTLED) if self._calm >= _SETTLE else action
        if self.phase is Phase.TRIAL:
            self._calm_since += 1
            if self._calm_since >= ACQUITTAL:
                self._returns = self._uses = self._soon = self._skip = 0
                self._older, self._callback_failed, self.lacks = None, False, False
                return self._move(Signal.ACQUITTED)
        return action

    def _on_damage(
        self, step: int, can_restore: bool, finite: bool, explained: bool, before_step: int | None, why: str
    ) -> Action:
        returned, self._explained = self.on_trial and not explained, explained
        self._move(Cause.DAMAGE)
        if not can_restore:
            self._unrestorable += 1
            if self._unrestorable >= _UNRESTORABLE:
                return self._give_up(f"{_UNRESTORABLE} faulty losses in a row and nothing to restore from: {why}")
            return self._move(Signal.UNRESTORABLE, f"nothing to restore from: {why}")
        if returned:
            self._returns += 1
            self._uses += 1
            self._soon = self._soon + 1 if not finite and self._reports_since <= _LACKS else 0
            self.lacks = self._soon >= 2
            if self._returns >= _RETURNS:
                return self._give_up(f"the fault came back {_RETURNS} times right after the model was restored: {why}")
            if self._uses >= 2 and self.used is not None:
                self._older, self._uses = self.used[1], 0
            if self._calm_since and self._reports_since <= _QUICK:
                self._factor = max(self.lr_multiplier(step) / 2, _LEAST_FACTOR)
                self._until, self._stable_until = step + 1 + self.hold, step + 1 + ACQUITTAL
        alike = abs(self._reports_since - self._delay) <= max(2, self._delay // 2) and self._delay > 2
        grows = finite and alike and (self.flagged >= _GRADUAL or self._grew)
        self._grew = grows
        if not explained and self.used is not None and (grows or self._same >= _NO_PROGRESS):
            self._older, self._same = self.used[1], 0
        self._source, self._attempts, self._skip = "ram", 0, 0
        self._before_step, self._unproven = before_step, not returned
        return self._restore(None, why)

    def _restore(self, signal: Signal | None, reason: str) -> Action:
        if signal is not None:
            self._move(signal)
        limits = [limit for limit in (self._before_step, self._older) if limit is not None]
        return Action(
            Kind.RESTORE, reason, self._source, min(limits, default=None), self._skip, self._unproven and not limits[1:]
        )

    def _give_up(self, reason: str) -> Action:
        return self._move(Signal.EXHAUSTED, self.with_samples(reason))

    def with_samples(self, reason: str) -> str:
        """Return a reason and the samples of the last faulty batch."""
        ids = self.failing_batches[-1] if self.failing_batches else []
        shown = f"{ids[:32]}" + (f" and {len(ids) - 32} more" if len(ids) > 32 else "")
        return f"{reason}; the last batch held the samples {shown}"

    def _move(self, signal: Cause | Signal, reason: str = "") -> Action:
        move = TABLE.get((self.phase, signal))
        if move is None:
            raise ProtocolError(f"{signal} cannot happen in phase {self.phase}: report how the restore went first")
        self.phase = move.phase
        return replace(_PLAIN[move.kind], reason=reason) if reason else _PLAIN[move.kind]
