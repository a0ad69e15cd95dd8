"""What follows a rollback: the learning rate is held down, and the backup that was used is on trial.

The LR is multiplied by `f <- max(f / 2, 1 / 64)`, held for `max(32, 2 x steps lost)` steps, and led
back to 1 geometrically over as many steps; three triggers within such a recovery halve the peak for good.

A fault that comes back soon may be in the backup, or come from outside (a learning rate out of
bounds, a stretch of bad data), against which older backups are no better. The backup is to blame

* at once, if the very first loss after the restore, which tests its weights as they are, is faulty;
* at once, if the fault was seen growing and needs as many steps to show as it did the first time;
* if two restores in a row led to a fault within 16 steps;
* after three restores without a healthy stretch between them, whatever the reason.

The run's last resort has only the last rule, and not even that where another backup led to the same: the
fault is outside then, and may end before the budget of rollbacks does. No new backups are taken during
the trial: what grows unseen would be in them, and they would take the place of those from before it. A
fault that came out of calm losses, as most NaN do, grew from nothing: its trial is short, and what took longer
than that to show is no measure of the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from learnit_r8.config import Problems

_ALIKE = 0.5  # relative difference of two delays that are the same, but for noise


@dataclass(frozen=True, slots=True)
class AftermathSettings:
    """Lengths are in steps.

    Attributes:
        per_backup: Rollbacks to one backup, without a healthy stretch between them, before it is discarded.
        retrigger: A fault within so many steps of a rollback comes from the backup, or goes on from outside.
        min_hold: Least number of steps for which the LR is held down.
        min_factor: Least LR multiplier of one recovery.
        triggers_to_halve: Triggers during one recovery that halve the peak for good.
    """

    per_backup: int = 3
    retrigger: int = 16
    min_hold: int = 32
    min_factor: float = 1 / 64
    triggers_to_halve: int = 3

    def __post_init__(self) -> None:
        Problems.of_settings(self).raise_if_any()


class Aftermath:
    """Follows the losses since the last rollback.

    Args:
        settings: Lengths and limits.

    Attributes:
        hold: Steps for which the last rollback holds the LR down; 0 while there was none.
        used: Id (None: a checkpoint) and step of the backup that was used last, or None.
        calm: Calm losses since.
    """

    def __init__(self, settings: AftermathSettings | None = None) -> None:
        self.settings = settings or AftermathSettings()
        self.hold = 0
        self.used: list[int | None] | None = None
        self.calm = 0
        self._reports = 0  # since the rollback
        self._factor = self._peak = 1.0
        self._since = self._triggers = self._uses = self._trial = 0
        self._delay = 0  # steps from the backup's to the fault that it was first used for; 0: they tell nothing
        self._tried = 0  # different backups since the last healthy stretch
        self._last_resort = False

    @property
    def on_trial(self) -> bool:
        """Say whether a fault now would speak against the backup that was used last."""
        return self.used is not None and self._reports <= self._trial

    @property
    def from_disk(self) -> bool:
        """Say whether the last rollback went to a checkpoint."""
        return self.used is not None and self.used[0] is None

    def report(self, *, calm: bool) -> None:
        """Count a report."""
        self._reports += 1
        self.calm += calm

    def to_blame(self) -> bool:
        """Say, of the fault that was reported last, whether it speaks against the backup used before."""
        if not self.on_trial:
            return False
        if self._last_resort and self._tried >= 2:
            return False
        if self._uses >= self.settings.per_backup:
            return True
        if self._last_resort:
            return False
        if not self.calm or (self._delay and abs(self._reports - self._delay) <= max(2, _ALIKE * self._delay)):
            return True
        return self._uses >= 2 and self._reports <= self.settings.retrigger

    def rolled_back(
        self, step: int, to_step: int, backup_id: int | None, *, last_resort: bool, resumes_at: int, sudden: bool
    ) -> None:
        """Begin anew.

        Args:
            step: Global step of the faulty loss.
            to_step: Step of the restored state.
            backup_id: Id of the RAM backup, None for a checkpoint.
            last_resort: There is nothing else to go back to.
            resumes_at: Global step that is trained next.
            sudden: The losses before the fault were calm.
        """
        settings, same = self.settings, self.used == [backup_id, to_step]
        again = same and self.on_trial
        lost = self._reports if same else step - to_step
        if not again:
            self._delay = 0 if sudden and lost > settings.retrigger else lost
        self._tried = self._tried + (not again) if self.on_trial else 1
        self._uses = self._uses + 1 if again else 1
        self.used, self._last_resort = [backup_id, to_step], last_resort
        factor = self._recovery_factor(step)
        self._triggers = self._triggers + 1 if factor < 1.0 else 0
        self._factor = max(factor / 2, settings.min_factor)
        if self._triggers >= settings.triggers_to_halve:
            self._triggers, self._peak = 0, self._peak / 2
        self._since = resumes_at
        self.hold = max(settings.min_hold, 2 * lost)
        self._trial = settings.retrigger if sudden else max(settings.retrigger, round((1.0 + _ALIKE) * self._delay))
        self.calm = self._reports = 0

    def holds(self, step: int) -> bool:
        """Say whether the LR of a step is still held down."""
        return step < self._since + self.hold

    def lr_multiplier(self, step: int) -> float:
        """Return the factor on the scheduled LR at a step; 1 while nothing was ever rolled back."""
        return self._peak * self._recovery_factor(step) if self.used is not None else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Return what later answers depend on, as plain numbers and lists."""
        return {"used": self.used, **{name.strip("_"): getattr(self, name) for name in _SAVED}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, kind in _SAVED.items():
            setattr(self, name, kind(state[name.strip("_")]))
        used = state["used"]
        self.used = None if used is None else [None if used[0] is None else int(used[0]), int(used[1])]

    def _recovery_factor(self, step: int) -> float:
        if self._factor >= 1.0:
            return 1.0
        beyond = step - self._since - self.hold
        if beyond < 0:
            return self._factor
        return 1.0 if beyond >= self.hold else float(self._factor ** (1.0 - beyond / self.hold))


_SAVED: dict[str, type[int] | type[float]] = {
    **dict.fromkeys(("hold", "calm", "_reports", "_since", "_triggers", "_uses", "_trial", "_delay", "_tried"), int),
    **dict.fromkeys(("_factor", "_peak"), float),
    "_last_resort": bool,
}
