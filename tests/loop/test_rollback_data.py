"""What is trained on after a rollback: the data move on, or the batches since the backup come again."""

from __future__ import annotations

import math

import numpy as np
import pytest

from learnit_r8 import R8Scheduler, events
from learnit_r8.testing import FakeClock


class Run:
    """Counts its steps as a model would; `nan_at` is the step whose loss is NaN."""

    def __init__(self, nan_at, rollback_data, **more):
        self.weights = np.zeros(3)
        self.nan_at = nan_at
        self.seen, self.heard = [], []
        self.scheduler = R8Scheduler(
            400, 10, num_epochs=3, strategy="uniform", checkpoint_dir=None, ui="off", backup_every=5, clock=FakeClock(),
            sinks=[self], rollback_data=rollback_data, state_callback=lambda: {"w": self.weights},
            load_callback=self.load, **more,
        )  # fmt: skip

    def load(self, state):
        self.weights = state["w"].copy()

    def record(self, event):
        self.heard.append(event)

    def of(self, kind):
        return [event for event in self.heard if isinstance(event, kind)]

    def go(self, stop=math.inf):
        scheduler = self.scheduler
        for _ in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                self.weights = self.weights + (math.nan if batch.step == self.nan_at else 1)
                self.seen.append((batch.epoch, batch.indices.tolist()))
                scheduler.update_with_loss(math.nan if batch.step == self.nan_at else 1.0 + batch.indices % 7)
                if scheduler.global_step >= stop:
                    return self
        return self


@pytest.mark.parametrize("at", [42, 57, 79])  # an epoch has 40 steps
def test_the_calm_batches_since_the_backup_come_again_in_order(at):
    run = Run(at, "replay").go()
    [back] = run.of(events.RolledBack)
    first = max(back.to_step, 40)
    again = at - first
    assert run.seen[at + 1 : at + 1 + again] == run.seen[first:at]
    assert run.scheduler.global_step == 120 + again
    assert [event.batches for event in run.of(events.EpochEnded)] == [40, 40, 40]
    assert (run.weights == 120 + again - (at + 1 - back.to_step)).all()
    uses = np.full(400, 3)
    uses[run.seen[at][1]] -= 1  # the loss was NaN
    if back.to_step < 40:
        for _, ids in run.seen[back.to_step : 40]:  # of the epoch before, which is over
            uses[ids] -= 1
    np.testing.assert_array_equal(run.scheduler.catalog.uses, uses)


def test_by_default_the_data_move_on():
    run = Run(57, "skip").go()
    assert len(run.of(events.RolledBack)) == 1
    assert run.scheduler.global_step == 120
    for epoch in range(3):
        ids = sorted(i for at, batch in run.seen if at == epoch for i in batch)
        assert ids == list(range(400))


def test_a_replay_goes_on_after_a_resume():
    whole = Run(57, "replay").go()
    [back] = whole.of(events.RolledBack)
    stop = 57 + 1 + (57 - back.to_step) // 2
    half = Run(57, "replay").go(stop)
    rest = Run(-1, "replay")
    rest.scheduler.load_state_dict(half.scheduler.state_dict())
    rest.go()
    assert half.seen + rest.seen == whole.seen


def test_a_prefetched_batch_is_trained_on_before_the_replay():
    run = Run(57, "replay", lookahead=3)
    scheduler, waiting, order = run.scheduler, [], []
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            waiting.append(batch)
            if len(waiting) == 3 or scheduler.steps_per_epoch - batch.step % 40 <= 2:
                due = waiting.pop(0)
                order.append(due.indices.tolist())
                loss = 1.0 + due.indices % 7
                if len(order) - 1 == 57:
                    run.weights, loss = run.weights * math.nan, math.nan
                scheduler.update_with_loss(loss, due)
        while waiting:
            due = waiting.pop(0)
            order.append(due.indices.tolist())
            scheduler.update_with_loss(1.0 + due.indices % 7, due)
        if scheduler.global_step > 70:
            break
    [back] = run.of(events.RolledBack)
    repeated = order[58:].index(order[back.to_step])
    assert order[58 + repeated : 58 + repeated + 57 - back.to_step] == order[back.to_step : 57]
