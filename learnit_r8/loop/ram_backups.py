"""The run's backups in RAM: taken every so many steps, and used where every rank has them."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from learnit_r8 import events
from learnit_r8.core.clock import Clock
from learnit_r8.errors import ConfigError, tell
from learnit_r8.loop.counters import NEVER
from learnit_r8.loop.ranks import Ranks
from learnit_r8.stability.backups import BackupInfo, BackupRing, BackupStatus, Look, chosen_interval, names
from learnit_r8.stability.changes import HABIT
from learnit_r8.stability.detector import Detector

Emit = Callable[[events.Event], None]
_EVIDENCE, _BEFORE, _ENOUGH, _GOES_ON = 4, range(8, 65), 16, 0.25
"""Losses that make evidence against weights that moved far, those they are compared with (the more there are, the less
do rare high ones of single samples mislead, or jumps that come again and again), and those that acquit. Where the
losses were falling, weights that moved beyond any habit are acquitted by losses that fall further, by a quarter of what
they had fallen by from one half of those before to the other."""
_RISE, _LEARNED, _LOST = 0.5, 0.25, 0.2
"""Least relative rise of the losses: weights at the edge of stability jump, too, and losses by a quarter. A loss far
above 0, as a language model's, seldom rises by half: where it has fallen by a quarter of the untrained model's, a fifth
of that fall will do."""
_FAILED, _NEVER = 3.0, 4.0
"""What a rank says of a backup that it has not: beside 0, and 1 for weights that moved, 2 that moved far."""
_DAMAGE = "the model's state holds NaN or infinity, which the losses do not show"


class RamBackups:
    """A ring of backups and when they are taken.

    Ranks must take the same backups and prove the same ones, or each would go back to another step. `damaged` is the
    step of a backup in which NaN or infinity was found, on any rank, since `damaged_since` was asked; `path` the sum of
    the learning rates of all steps so far.
    """

    def __init__(
        self,
        capture: Callable[[], Any] | None,
        every: int | str,
        emit: Emit,
        clock: Clock,
        ranks: Ranks,
    ) -> None:
        self.capture = capture
        self._emit = emit
        self._clock = clock
        self._ranks = ranks
        self._every = None if isinstance(every, str) else every
        self._warned: set[str] = set()
        self.path = 0.0
        self.damaged: int | None = None
        self.forget()

    def forget(self) -> None:
        """Begin with an empty ring."""
        self.ring = BackupRing(clock=self._clock.monotonic)
        self._detectors: dict[int, tuple[dict[str, Any], list[float]]] = {}  # and the last losses, by backup id
        self._next = self._taken_at = 0  # steps
        self._excused = -1  # step
        # Weights moved before this step, beyond any habit or not; losses before the backup that they are compared with,
        # and after.
        self._moved: tuple[int, bool, list[float], list[float]] | None = None
        self._losses: deque[float] = deque(maxlen=_BEFORE[-1])
        self._before: list[float] = []  # the last ones before the last backup
        self._heal()

    @property
    def next_due(self) -> int:
        """Step at which the turn of the next automatic backup comes, or has come while none was allowed."""
        return self._next if self.capture is not None else NEVER

    def before_step(self, step: int, detector: Detector) -> None:
        """Take an automatic backup when one is due; none while weights that moved beyond any habit are in question.

        The ring is small: it would lose the backup from before the move.
        """
        if step < self.next_due or (self._moved is not None and self._moved[1]):
            return
        taken = self._try_keep(step, detector)
        if self._every is None and taken is not None:
            nbytes = int(self._ranks.everyone(float(taken.nbytes)).max())
            self._every = chosen_interval(nbytes)
            message = (
                f"a backup in RAM every {self._every} steps: a copy takes {_size(nbytes)}, there are three, and a "
                "fourth once one was needed (backup_every=n chooses the steps)"
            )
            self._emit(events.Notice(step=step, message=message))
        self._next = step + (self._every or 1)

    def _try_keep(self, step: int, detector: Detector) -> BackupInfo | None:
        """Take a backup; a failure costs the backup, not the run."""
        assert self.capture is not None
        failed: Exception | None = None
        first = not self.ring.taken
        try:
            info = self._take(self.capture(), step)
            code = float(bool(info.moved)) + info.far
        except Exception as error:
            failed = error
            code = _NEVER if isinstance(error, (TypeError, ConfigError)) else _FAILED
        codes = self._ranks.everyone(code)
        worst = codes.max()
        if worst < _FAILED:
            return self._took(info, step, detector, moved=worst)
        if first and worst == _NEVER:  # what cannot be copied at all is better known before anything is trained
            raise failed or TypeError("the first backup failed on another rank, whose error says why")
        failure = f"{type(failed).__name__}: {failed}" if failed else "it failed on another rank"
        if failure not in self._warned:  # once: it mostly is the same every time
            self._warned.add(failure)
            message = f"no backup was taken, training goes on with the older ones: state_callback failed ({failure})"
            self._emit(events.Notice(step=step, message=message, level="warning"))
            tell(message, stacklevel=2)
        self.ring.discard_after(step - 1)  # no rank keeps what another one lacks
        if failed and codes.min() < _FAILED:
            self.ring.make_room(step)
        return None

    def keep(self, state: Any, step: int, detector: Detector) -> BackupInfo:
        """Copy a state of the user's model into the ring, and the detector's beside it."""
        info = self._take(state, step)
        return self._took(info, step, detector, moved=self._ranks.everyone(float(bool(info.moved)) + info.far).max())

    def _take(self, state: Any, step: int) -> BackupInfo:
        # The first one has to serve until another is proved: it is all there is.
        return self.ring.take(state, step, initial=self.ring.find() is None, path=self.path)

    def _took(self, info: BackupInfo, step: int, detector: Detector, *, moved: float) -> BackupInfo:
        sudden = self._excused < self._taken_at and len(self._before) in _BEFORE
        far, pending = moved > 1.0, self._moved
        if moved and sudden and (pending is None or (far and not pending[1])):
            self._moved = step, far, self._before, []
        self._before, self._taken_at = list(self._losses), step
        held = {backup.id for backup in self.ring.backups}
        self._detectors = {key: value for key, value in self._detectors.items() if key in held}
        self._detectors[info.id] = detector.state_dict(), list(self._losses)
        self._emit(events.BackupTaken(step=step, bytes=info.nbytes, seconds=info.seconds))
        return info

    @property
    def unsuspected(self) -> bool:
        """Whether weights have not moved far lately, and no backup was found to be damaged."""
        return self._moved is None and self.damaged is None

    def pass_calm(self, step: int, losses: Sequence[float]) -> None:
        """Count calm losses, up to that of a step, where nothing is suspected."""
        self._losses.extend(losses)
        if len(self.ring):
            self.calm(step, *losses)

    def calm(self, step: int, *losses: float) -> None:
        """Count calm losses in favour of the backups before it; one that is found damaged says that the model is."""
        for info in self.ring.healthy(step, *losses, anywhere=lambda bad: bool(self._ranks.everyone(bad).any())):
            if info.status is BackupStatus.VERIFIED:
                self._emit(events.BackupVerified(step=step, of_step=info.step))
            elif self.damaged is None:
                self.damaged = info.step
                where = names(info.damaged) or "arrays of another rank"
                self.damage = f"{_DAMAGE}: {where}, in the backup of step {info.step}"
                self._emit(events.Notice(step=step, message=self.damage, level="warning"))

    def worse_since_move(self, loss: float, first: float, *, calm: bool) -> int | None:
        """Count a finite loss; return the step of a backup whose weights had moved far, if losses are worse since.

        Worse: their median is above the highest of the last 8 to 64 before, and by half above their median, or by a
        fifth of what they had fallen by since `first`, the untrained model's. Where the weights moved beyond any habit:
        they are higher than the last 16 or 8, if by little; their mean is above the highest (weights sixty times as
        large make most losses 0, and a few enormous); or they were falling, and 32 later hardly do: nothing is learned.
        """
        if calm:
            self._losses.append(loss)
        if self._moved is None:
            return None
        step, far, before, after = self._moved
        after.append(loss)
        usual = median(before)
        rise, fall = _RISE * abs(usual), first - usual
        if usual >= 0.0 and fall >= _LEARNED * first:
            rise = min(rise, _LOST * fall)
        limit = max(*before, usual + rise)
        worse = median(after) > limit
        last = (before[-count:] for count in (_ENOUGH, _BEFORE[0]))
        worse |= far and (sum(after) / len(after) > max(before) or any(higher(after, some) for some in last))
        worse = worse and len(after) >= _EVIDENCE
        earlier, later = before[: len(before) // 2], before[len(before) // 2 :]
        falling = far and higher(earlier, later)
        if falling and len(after) == 2 * _ENOUGH:
            worse = median(before[-_BEFORE[0] :]) - median(after[_ENOUGH:]) < _GOES_ON * (
                median(earlier) - median(later)
            )
        if worse or len(after) >= (2 * _ENOUGH if falling else _ENOUGH):
            self._moved = None
        return step if worse else None

    def worse_than_before(self, loss: float) -> bool:
        """Say whether a loss is above the highest of the last 8 to 64 before the last backup."""
        return bool(self._before) and not loss <= max(self._before)

    def excuse(self, step: int) -> None:
        """Take note that losses stood out while the weights had not moved: what they do from now on is the answer."""
        self._excused, self._moved = step, None
        self._losses.clear()

    def damaged_since(self) -> int | None:
        """Return the step of a backup in which NaN or infinity was found since the last call, or None."""
        since, self.damaged = self.damaged, None
        return since

    def look(self, step: int, before: int | None, *, calm: bool = False, habit: float = HABIT) -> Look | None:
        """Look at the present state of the model, on every rank (see `BackupRing.look`), or None where that fails."""
        if self.capture is None:
            return None
        try:
            mine = self.ring.look(self.capture(), self.path, before, calm=calm, habit=habit)
        except Exception as error:
            self._emit(
                events.Notice(step=step, message=f"the model's state could not be looked at: {error}", level="warning")
            )
            mine = None
        code = math.nan if mine is None else 2.0 * bool(mine.nonfinite) + bool(mine.jumped)
        codes = self._ranks.everyone(code)
        if any(math.isnan(other) for other in codes):
            return None
        assert mine is not None
        elsewhere = ("arrays of another rank",)
        if codes.max() >= 2.0:
            return Look(mine.nonfinite or elsewhere, ())
        return Look((), mine.jumped or elsewhere, mine.since) if codes.max() else mine

    def newest(self, before: int | None, *, unproven: bool = False) -> BackupInfo | None:
        """Return the newest backup of an earlier step that every rank has."""
        while True:
            mine = self.ring.find(before, unproven=unproven)
            steps = self._ranks.everyone(-1.0 if mine is None else mine.step)
            lowest = int(steps.min())
            if lowest < 0 or steps.min() == steps.max():
                return None if lowest < 0 else mine
            if before == lowest + 1:  # an unproved first backup is found whatever is asked for
                return None
            before = lowest + 1

    def best(self) -> BackupInfo | None:
        """Return the backup of the best level, if it is the same one on every rank."""
        mine = self.ring.best()
        steps = self._ranks.everyone(-1.0 if mine is None else mine.step)
        return mine if steps.min() == steps.max() else None

    def restore(self, found: BackupInfo) -> tuple[Any, dict[str, Any] | None]:
        """Return a copy of a backup's state for the user to keep, and the detector's state of then."""
        _, state = self.ring.restore(info=found)
        self.path = found.path
        detector, self._before = self._detectors.get(found.id, (None, []))
        return state, detector

    def rolled_back(self, to_step: int, resumes_at: int) -> None:
        """Forget what was taken after a step: it never happened."""
        self.ring.discard_after(to_step)
        self._moved = None
        self._losses.clear()
        self._losses.extend(self._before)
        self._next = min(self._next, resumes_at + (self._every or 1))
        self._heal()

    def _heal(self) -> None:
        self.damaged, self.damage = None, ""


def higher(after: list[float], before: list[float]) -> bool:
    """Say whether losses are higher than those before, by rank (Mann and Whitney 1947) and three standard errors."""
    ordered, count, others = sorted(before), len(after), len(before)
    excess = sum(bisect_left(ordered, loss) for loss in after) - count * others / 2
    return excess > 3.0 * math.sqrt(count * others * (count + others + 1) / 12)


def _size(nbytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes / 1e3:.3g} kB"
