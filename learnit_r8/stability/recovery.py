"""What to do about a verdict: one table, phase x signal -> action and next phase.

`Recovery` is pure logic: it restores nothing itself. The caller carries out the `Action` that
`react` returns and tells back how that went (`rolled_back`, `restore_failed`), which may lead to
another action. A signal is the detector's verdict on a loss, or a fact found on the way:

* SETTLED: long enough calm (16 losses in WARMUP, 8 in SUSPECT, the LR's hold in PROBATION).
* RESTORED, RESTORE_FAILED: what the caller told.
* UNRESTORABLE: there is nothing to restore from, or nobody to restore it.
* TOLERATED: the same, and the loss is finite: it is a warning, no reason to end a run that may recover.
* LEVEL_HELD: the loss came back to the same finite level at once after two rollbacks, without
  growth; or it drifts and nothing is left to try.
* EXHAUSTED: the budget is spent.

ROLLBACK is left within the step in which it is entered. What a rollback does to the learning rate,
and when a backup is to blame for the next fault, is in `aftermath`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from learnit_r8.config import Problems
from learnit_r8.errors import ProtocolError
from learnit_r8.stability.aftermath import Aftermath, AftermathSettings
from learnit_r8.stability.quarantine import Quarantine
from learnit_r8.types import Verdict

_PROMPT = 2
"""Calm losses after a rollback, at most, where the loss has changed its level for good."""


class Phase(StrEnum):
    """How far training is to be trusted."""

    WARMUP = "warmup"
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    ROLLBACK = "rollback"
    PROBATION = "probation"
    FAILED = "failed"


class Signal(StrEnum):
    """Facts, besides the detector's verdicts, that lead from one phase to another."""

    SETTLED = "settled"
    RESTORED = "restored"
    RESTORE_FAILED = "restore failed"
    UNRESTORABLE = "nothing to restore"
    TOLERATED = "nothing to restore (finite)"
    LEVEL_HELD = "level held"
    EXHAUSTED = "budget spent"


class Kind(StrEnum):
    """What the caller is to do."""

    ACCEPT = "accept"
    """Count the update, record the loss."""
    HOLD = "hold"
    """Count the update, keep the loss out of the statistics, take no backup."""
    IGNORE = "ignore"
    """The optimizer step was skipped: neither good nor bad."""
    RESTORE = "restore"
    """Restore from `Action.source`, then call `rolled_back` or `restore_failed`."""
    DROP = "drop"
    """Do not count the update; nothing can be restored."""
    ACCEPT_LEVEL = "accept level"
    """Count the update, let the detector learn the new level, warn."""
    FAIL = "fail"
    """Raise `TrainingDiverged`."""


class _Move(NamedTuple):
    kind: Kind
    phase: Phase


_FAULTS = (Verdict.SPIKE, Verdict.DRIFT, Verdict.NONFINITE)
_LIVE = (Phase.WARMUP, Phase.HEALTHY, Phase.SUSPECT, Phase.PROBATION)

TABLE: dict[tuple[Phase, Verdict | Signal], _Move] = {
    **{(phase, Verdict.CALM): _Move(Kind.ACCEPT, phase) for phase in _LIVE},
    **{(phase, Verdict.SKIPPED): _Move(Kind.IGNORE, phase) for phase in _LIVE},
    **{(phase, fault): _Move(Kind.RESTORE, Phase.ROLLBACK) for phase in _LIVE for fault in _FAULTS},
    **{(Phase.FAILED, verdict): _Move(Kind.FAIL, Phase.FAILED) for verdict in Verdict},
    (Phase.WARMUP, Verdict.SUSPECT): _Move(Kind.HOLD, Phase.WARMUP),
    (Phase.HEALTHY, Verdict.SUSPECT): _Move(Kind.HOLD, Phase.SUSPECT),
    (Phase.SUSPECT, Verdict.SUSPECT): _Move(Kind.HOLD, Phase.SUSPECT),
    (Phase.PROBATION, Verdict.SUSPECT): _Move(Kind.HOLD, Phase.PROBATION),
    (Phase.WARMUP, Signal.SETTLED): _Move(Kind.ACCEPT, Phase.HEALTHY),
    (Phase.SUSPECT, Signal.SETTLED): _Move(Kind.ACCEPT, Phase.HEALTHY),
    (Phase.PROBATION, Signal.SETTLED): _Move(Kind.ACCEPT, Phase.HEALTHY),
    (Phase.ROLLBACK, Signal.RESTORED): _Move(Kind.ACCEPT, Phase.PROBATION),
    (Phase.ROLLBACK, Signal.RESTORE_FAILED): _Move(Kind.RESTORE, Phase.ROLLBACK),
    (Phase.ROLLBACK, Signal.UNRESTORABLE): _Move(Kind.DROP, Phase.SUSPECT),
    (Phase.ROLLBACK, Signal.TOLERATED): _Move(Kind.HOLD, Phase.SUSPECT),
    (Phase.ROLLBACK, Signal.LEVEL_HELD): _Move(Kind.ACCEPT_LEVEL, Phase.HEALTHY),
    (Phase.ROLLBACK, Signal.EXHAUSTED): _Move(Kind.FAIL, Phase.FAILED),
}


def state_diagram() -> str:
    """Return the table as a Mermaid state diagram; what stays in its phase is left out."""
    arrows: dict[tuple[Phase, Phase], list[str]] = {}
    for (phase, signal), move in TABLE.items():
        if phase is not move.phase:
            arrows.setdefault((phase, move.phase), []).append(str(signal))
    lines = ["stateDiagram-v2", f"    [*] --> {Phase.WARMUP.name}"]
    for (start, end), signals in sorted(arrows.items(), key=lambda item: [list(Phase).index(p) for p in item[0]]):
        lines.append(f"    {start.name} --> {end.name}: {', '.join(signals)}")
    return "\n".join([*lines, f"    {Phase.FAILED.name} --> [*]"])


@dataclass(frozen=True, slots=True)
class RecoverySettings:
    """Budgets and lengths, in steps unless it says otherwise.

    Attributes:
        warmup: Calm losses in WARMUP.
        settle: Calm losses in a row that end SUSPECT.
        per_span: Rollbacks within `span` steps before training has diverged.
        span: See `per_span`.
        uncounted: Faults in a row without any way to restore before training has diverged.
    """

    warmup: int = 16
    settle: int = 8
    per_span: int = 10
    span: int = 1000
    uncounted: int = 10

    def __post_init__(self) -> None:
        Problems.of_settings(self).raise_if_any()


@dataclass(frozen=True, slots=True)
class Action:
    """What the caller is to do now.

    Attributes:
        kind: See `Kind`.
        reason: One sentence for events and errors; empty for ACCEPT.
        source: RESTORE only: "ram" or "disk".
        before_step: RESTORE only: use backups and checkpoints of earlier steps only.
        skip: RESTORE from disk only: how many of the newest checkpoints not to try.
        discard: Id of a RAM backup to forget first, or None.
        quarantine: Ids of samples to keep out of batches from now on.
    """

    kind: Kind
    reason: str = ""
    source: str = ""
    before_step: int | None = None
    skip: int = 0
    discard: int | None = None
    quarantine: tuple[int, ...] = ()


_PLAIN = {kind: Action(kind) for kind in Kind}
_ACCEPT = _PLAIN[TABLE[Phase.HEALTHY, Verdict.CALM].kind]  # what nearly every step gets


class Recovery:
    """The state machine of `TABLE` with its counters.

    Args:
        num_samples: Samples in the data set, for the quarantine's statistics.
        settings: Budgets and lengths.
        aftermath: Those that hold after a rollback.

    Attributes:
        aftermath: What follows the last rollback.
        phase: The present phase.
        failing_batches: Sample ids of the last faulty batches, oldest first, at most 3.
    """

    def __init__(
        self,
        num_samples: int,
        settings: RecoverySettings | None = None,
        aftermath: AftermathSettings | None = None,
    ) -> None:
        self.settings = settings or RecoverySettings()
        self.aftermath = Aftermath(aftermath)
        self.phase = Phase.WARMUP
        self.failing_batches: list[list[int]] = []
        self._quarantine = Quarantine(num_samples)
        self._reports = self._calm_run = self._uncounted = 0
        self._rollbacks: list[int] = []
        self._excesses: list[float] = []
        self._level = math.nan
        self._source, self._skip, self._attempts = "ram", 0, 0
        self._before_step: int | None = None
        self._drifting = self._callback_failed = self._sudden = False
        self._unseen = ""

    @property
    def backups_allowed(self) -> bool:
        """Say whether the state is sound enough to be backed up."""
        if self.phase is Phase.PROBATION:
            return not self.aftermath.on_trial
        return self.phase is Phase.HEALTHY or self.phase is Phase.WARMUP

    @property
    def quarantined(self) -> NDArray[np.int64]:
        """Return the ids of all quarantined samples, ascending."""
        return self._quarantine.ids

    def react(
        self,
        step: int,
        verdict: Verdict,
        *,
        can_restore: bool,
        batch_indices: Iterable[int] = (),
        loss: float = math.nan,
        sample_losses: NDArray[np.floating[Any]] | None = None,
        first_suspect_step: int | None = None,
        unseen: str = "",
    ) -> Action:
        """Take the verdict on one loss and say what to do.

        Args:
            step: Global step of the loss.
            verdict: The detector's.
            can_restore: There is a way to restore: a callback, and a backup or a checkpoint.
            batch_indices: Sample ids of the batch.
            loss: Its mean loss.
            sample_losses: One loss per sample where those were reported, in the batch's order.
            first_suspect_step: The detector's.
            unseen: The fault in words, where no loss shows it: this batch is not to blame.
        """
        self._reports += 1
        if self.aftermath.used is not None:
            self.aftermath.report(calm=verdict is Verdict.CALM)
        if verdict is Verdict.CALM:
            return self._calm(step, loss)
        if self.phase is Phase.FAILED or verdict is Verdict.SKIPPED:
            return self._move(verdict)
        self._calm_run = 0
        self._unseen = unseen
        if unseen:
            batch_indices, sample_losses, loss = (), None, math.nan
        self._quarantine.suspect(batch_indices, sample_losses)
        if verdict is Verdict.SUSPECT:
            return self._move(verdict, "the loss stands out")
        self.failing_batches = [*self.failing_batches, [int(i) for i in batch_indices]][-3:]
        self._move(verdict)
        self._rollbacks = [at for at in self._rollbacks if at > self._reports - self.settings.span]
        if not self._rollbacks:
            self._excesses = []
        if not can_restore:
            return self._unrestorable(verdict, loss)
        self._drifting, self._callback_failed = verdict is Verdict.DRIFT, False
        self._sudden = bool(unseen) or (verdict is Verdict.NONFINITE and first_suspect_step in (None, step))
        excess = loss - self._level
        if self.aftermath.calm > _PROMPT:
            self._excesses = []  # it took time to come back: it grows, however high it stood when it was noticed
        if verdict is not Verdict.NONFINITE and self._level_held(excess):
            self._excesses = []
            return self._move(Signal.LEVEL_HELD, "the loss came back to the same level after two rollbacks")
        return self._begin(step, step if first_suspect_step is None else first_suspect_step, excess)

    def rolled_back(
        self,
        step: int,
        to_step: int,
        backup_id: int | None,
        *,
        last_resort: bool = False,
        resumes_at: int | None = None,
    ) -> None:
        """Take note that the restore succeeded.

        Args:
            step: Global step of the faulty loss.
            to_step: Step of the restored state.
            backup_id: Id of the RAM backup, None for a checkpoint.
            last_resort: There is nothing else to go back to: kept for its full budget of rollbacks.
            resumes_at: Global step that is trained next; default `step + 1`.
        """
        self._move(Signal.RESTORED)
        self._rollbacks = [*self._rollbacks, self._reports]
        resumes_at = step + 1 if resumes_at is None else resumes_at
        self.aftermath.rolled_back(
            step, to_step, backup_id, last_resort=last_resort, resumes_at=resumes_at, sudden=self._sudden
        )

    def restore_failed(self, step: int, reason: str, *, backup_id: int | None = None, empty: bool = False) -> Action:
        """Take note that the restore failed and say what to try next.

        Each backup and checkpoint is tried twice, the second time with a fresh copy.

        Args:
            step: Global step of the faulty loss.
            reason: For the error, should nothing work.
            backup_id: Id of the RAM backup that was tried.
            empty: The action's source held nothing that could be tried.
        """
        self._callback_failed |= not empty
        if not empty and self._attempts == 0:
            self._attempts = 1
            return self._restore(Signal.RESTORE_FAILED, f"{reason}; once more with a fresh copy")
        self._attempts = 0
        if self._source == "disk":
            if empty:
                return self._give_up(f"no backup and no checkpoint is left to restore: {reason}")
            self._skip += 1
        elif empty:
            self._source = "disk"
        return self._restore(Signal.RESTORE_FAILED, reason, discard=backup_id)

    def restore_abandoned(self) -> None:
        """Take note that the restore was interrupted: the model is what the caller left it at."""
        self._attempts = 0
        if self.phase is Phase.ROLLBACK:
            self._move(Signal.UNRESTORABLE)

    def stable_only(self, step: int) -> bool:
        """Say whether a batch of this step should come from stable (low-loss) samples."""
        return self.phase is Phase.PROBATION and self.aftermath.holds(step)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that later actions depend on, as plain numbers, strings and lists."""
        names = ("failing_batches", "_rollbacks", "_excesses", "_before_step", *_SAVED)
        state = {name.strip("_"): getattr(self, name) for name in names}
        state["phase"] = str(self.phase)
        state["level"] = None if math.isnan(self._level) else self._level
        return {**state, "quarantine": self._quarantine.state_dict(), "aftermath": self.aftermath.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, kind in _SAVED.items():
            setattr(self, name, kind(state[name.strip("_")]))
        self.failing_batches = [[int(i) for i in batch] for batch in state["failing_batches"]]
        self._rollbacks = [int(at) for at in state["rollbacks"]]
        self._excesses = [float(excess) for excess in state["excesses"]]
        self._before_step = None if state["before_step"] is None else int(state["before_step"])
        self.phase = Phase(state["phase"])
        self._level = math.nan if state["level"] is None else float(state["level"])
        self._quarantine.load_state_dict(state["quarantine"])
        self.aftermath.load_state_dict(state["aftermath"])

    def _move(self, signal: Verdict | Signal, reason: str = "", **details: Any) -> Action:
        move = TABLE.get((self.phase, signal))
        if move is None:
            raise ProtocolError(f"{signal} cannot happen in phase {self.phase}: report how the restore went first")
        self.phase = move.phase
        return Action(move.kind, reason, **details) if reason or details else _PLAIN[move.kind]

    def _calm(self, step: int, loss: float) -> Action:
        self._quarantine.calm()
        self._calm_run += 1
        self._uncounted = 0
        if math.isfinite(loss):
            self._level = loss if math.isnan(self._level) else self._level + (loss - self._level) / 16
        if self.phase is Phase.HEALTHY:  # nearly always
            return _ACCEPT
        action = self._move(Verdict.CALM)
        settled = {
            Phase.WARMUP: self._calm_run >= self.settings.warmup,
            Phase.SUSPECT: self._calm_run >= self.settings.settle,
            Phase.PROBATION: not self.aftermath.holds(step),
        }
        return self._move(Signal.SETTLED) if settled.get(self.phase) else action

    def _unrestorable(self, verdict: Verdict, loss: float) -> Action:
        self._uncounted += 1
        limit = self.settings.uncounted
        if verdict is not Verdict.NONFINITE:
            if self._uncounted < limit:
                return self._move(Signal.TOLERATED, "nothing to restore from")
            self._uncounted = 0
            return self._move(Signal.LEVEL_HELD, f"{limit} losses in a row stand out and nothing can be restored")
        if self._uncounted < limit:
            return self._move(Signal.UNRESTORABLE, "nothing to restore from; the update is not counted")
        return self._give_up(f"{limit} faulty losses in a row and nothing to restore from")

    def _give_up(self, reason: str) -> Action:
        if self._drifting and not self._callback_failed:
            return self._move(Signal.LEVEL_HELD, f"the drift comes back and cannot be undone: {reason}")
        ids = self.failing_batches[-1] if self.failing_batches else []
        shown = f"{ids[:32]}" + (f" and {len(ids) - 32} more" if len(ids) > 32 else "")
        cause = self._unseen or f"the last batch held the samples {shown}"
        return self._move(Signal.EXHAUSTED, f"{reason}; {cause}")

    def _level_held(self, excess: float) -> bool:
        """Say whether the fault stands as high above the healthy level as the last two did."""
        last = self._excesses[-2:]
        if len(last) < 2 or not math.isfinite(excess):
            return False
        same = all(abs(excess - other) <= 0.5 * max(abs(excess), abs(other)) for other in last)
        return same and excess <= 1.5 * min(last)

    def _begin(self, step: int, before_step: int, excess: float) -> Action:
        """Choose the first restore for a fault, or give up."""
        settings, recent = self.settings, self._rollbacks
        if len(recent) >= settings.per_span:
            return self._give_up(f"{len(recent)} rollbacks within {settings.span} steps")
        used, spent = self.aftermath.used, self.aftermath.to_blame()
        self._skip = self._skip + spent if self.aftermath.from_disk and recent else 0
        discard = used[0] if spent and used else None
        self._source, self._attempts, self._before_step = "ram", 0, before_step
        self._excesses = [*self._excesses, excess][-2:] if math.isfinite(excess) else []
        reason = f"fault at step {step}, first suspect at step {before_step}"
        return replace(self._restore(None, reason, discard=discard), quarantine=self._quarantine.trigger())

    def _restore(self, signal: Signal | None, reason: str, *, discard: int | None = None) -> Action:
        if signal is not None:
            self._move(signal)
        skip = self._skip if self._source == "disk" else 0
        return Action(Kind.RESTORE, reason, self._source, self._before_step, skip, discard)


_SAVED: dict[str, type[int] | type[str]] = {
    **dict.fromkeys(("_reports", "_calm_run", "_uncounted", "_skip", "_attempts"), int),
    **dict.fromkeys(("_drifting", "_callback_failed", "_sudden"), bool),
    "_source": str,
}
