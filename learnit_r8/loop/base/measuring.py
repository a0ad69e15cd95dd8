"""What is measured: the user's numbers, evaluations that are due, and what they call for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from learnit_r8 import events
from learnit_r8.loop.base.persistence import Persistence
from learnit_r8.loop.counters import Stage
from learnit_r8.loop.losses import read_number
from learnit_r8.loop.signals import say


class Measuring(Persistence):
    """A run that acts on what is measured."""

    def log(self, **metrics: float) -> None:
        """Take numbers of your own (`val_loss=`, `grad_norm=`, ...): they are shown, and acted on where that was asked.

        On several ranks, what is acted on is what rank 0 logs: at the end of the epoch, or after the next report.

        Raises:
            TypeError: One is not a number; none is taken then.
        """
        numbers = {name: read_number(name, value) for name, value in metrics.items()}
        self._due_at = 0
        for name, number in numbers.items():
            self._bus.emit(events.MetricLogged(step=self._progress.global_step, name=name, value=number))
            if self._ranks.writes:
                self._saver.logged(self._progress.global_step, name, number)
                if self._saver.best_due and self._control.together:
                    self._control.asks_save = True
        if self._ranks.world_size == 1 or not self._measured.acts:
            self._observe(numbers)
        elif self._ranks.rank == 0:
            self._unshared.append(numbers)
            self._control.asks_share = True

    def _observe(self, numbers: Mapping[str, float]) -> None:
        for event in self._measured.observe(self._progress, numbers):
            self._bus.emit(event)
            if self._args.ui == "off" and self._ranks.rank == 0:  # no display shows it
                if isinstance(event, events.OverfittingSeen):
                    say(f"[r8] {event.reason}")
                elif isinstance(event, events.Notice):
                    say(f"[r8] {event.message}")

    def _evaluate(self, *, last: bool = False) -> None:
        """Call `run` where it is due, hear of what rank 0 has logged, and go back to the best where that is due."""
        if self._search is not None:
            return
        progress, measured = self._progress, self._measured
        if due := measured.due(progress, last=last):
            self._run_evaluation()
            measured.note_evaluated(progress)  # not where run has failed: it is asked again after a resume
        if self._ranks.world_size > 1 and measured.acts:
            shared = due or last or progress.stage is Stage.DONE or self._control.share_due
            self._control.share_due = False
            if shared:
                told = self._ranks.tell(json.dumps(self._unshared) if self._ranks.rank == 0 else "")
                self._unshared = []
                for numbers in json.loads(told):
                    self._observe(numbers)
        if progress.stage is Stage.DONE and (missing := measured.missing()):
            self.tell(missing)
        if measured.restore_due:
            measured.restored()
            self._go_back_to_best()

    def _run_evaluation(self) -> None:
        rule, ema = self._measured.rule, self._measured.ema
        assert rule.run is not None
        if ema is not None and ema.untouched:
            self.tell("ema was never updated: call ema.update_parameters(model) after each optimizer.step()")
        found: Any = rule.run() if ema is None else rule.run(ema.model)
        if isinstance(found, Mapping):
            self.log(**found)
        elif found is not None:
            self.log(**{rule.metric: found})

    def _go_back_to_best(self) -> None:
        """Bring the model back to the checkpoint of the best value; where that fails the run goes on as it is."""
        step = self._progress.global_step
        try:
            self._safety.restore_best(step, self._progress.epoch)
        except (LookupError, RuntimeError) as error:
            self.tell(f"the model could not be brought back to the best {self._measured.metric}: {error}")
