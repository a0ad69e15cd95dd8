"""Who sets the learning rate: groups and optimizers keep their proportions, other owners are honoured or named."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR

from learnit_r8 import R8Scheduler, events
from learnit_r8.integrations.torch import capture_state, follow_lr, restore_state

CONSTANT = {"scheduler_mode": "constant", "warmup_proportion": 0.0}


def scheduler_for(**options) -> R8Scheduler:
    options = {"num_epochs": 3, "ui": "off", "checkpoint_dir": None, "initial_lr": 1e-3} | CONSTANT | options
    return R8Scheduler(32, 8, **options)


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.zeros(1))


def step(*optimizers) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for one in group["params"]:
                one.grad = torch.ones_like(one)
        optimizer.step()


def rates(optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def used(scheduler, *optimizers, at_epoch=lambda epoch: None, loss=lambda step: 1.0) -> list[list[float]]:
    """Train; return the rates of all groups at each step."""
    found = []
    for epoch in scheduler.epoch_iterator():
        at_epoch(epoch)
        for batch in scheduler.batch_iterator():
            step(*optimizers)
            found.append([rate for optimizer in optimizers for rate in rates(optimizer)])
            scheduler.update_with_loss(loss(batch.step))
    return found


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.lists(st.sampled_from([1e-5, 3e-4, 1e-3, 0.0]), min_size=1, max_size=3), min_size=1, max_size=3),
    st.sampled_from([1e-4, 1e-3]),
    st.booleans(),
)
def test_each_group_has_the_rate_that_it_was_given_beside_the_largest(given_rates, late, tensors):
    given_rates[0][0] = 1e-3  # the largest, and the scheduler's
    optimizers = [
        Adam([{"params": parameter(), "lr": torch.tensor(lr) if tensors else lr} for lr in part], lr=1e-3)
        for part in given_rates
    ]
    with scheduler_for() as scheduler:
        for optimizer in optimizers:
            follow_lr(scheduler, optimizer)

        def join(epoch):
            if epoch == 1:
                optimizers[0].add_param_group({"params": parameter(), "lr": late})

        found = used(scheduler, *optimizers, at_epoch=join)
    wanted = [lr for part in given_rates for lr in part]
    assert found[0] == pytest.approx(wanted)
    first = len(given_rates[0])
    assert found[-1] == pytest.approx([*wanted[:first], late, *wanted[first:]])


def test_a_group_that_comes_between_follow_lr_and_the_first_step_keeps_its_proportion():
    optimizer = SGD([parameter()], lr=1e-3)
    with scheduler_for() as scheduler:
        follow_lr(scheduler, optimizer)
        optimizer.add_param_group({"params": parameter(), "lr": 1e-5})
        assert used(scheduler, optimizer)[0] == pytest.approx([1e-3, 1e-5])


def test_a_later_optimizer_is_measured_as_the_first_ones_were():
    first, later = SGD([parameter()], lr=0.1), SGD([parameter()], lr=0.02)
    with scheduler_for(initial_lr=1e-3) as scheduler:
        follow_lr(scheduler, first)

        def join(epoch):
            if epoch == 1:
                follow_lr(scheduler, later)

        assert used(scheduler, first, later, at_epoch=join)[-1] == pytest.approx([1e-3, 2e-4])


def test_rates_that_an_old_warm_up_set_to_zero_are_those_from_before_it():
    optimizer = SGD([{"params": parameter(), "lr": 1e-3}, {"params": parameter(), "lr": 1e-5}])
    old = LambdaLR(optimizer, lambda count: min(1.0, count / 100))
    assert rates(optimizer) == [0.0, 0.0]
    with scheduler_for() as scheduler:
        follow_lr(scheduler, optimizer)
        assert used(scheduler, optimizer)[-1] == pytest.approx([1e-3, 1e-5])
    assert old.last_epoch == 0


@pytest.mark.parametrize("groups", [1, 2])
def test_a_group_is_frozen_and_unfrozen_by_its_rate(groups):
    optimizer = SGD([{"params": parameter(), "lr": 1e-3} for _ in range(groups)])
    with scheduler_for() as scheduler:
        follow_lr(scheduler, optimizer)

        def change(epoch):
            optimizer.param_groups[-1]["lr"] = {0: 1e-3, 1: 0.0, 2: 1e-4}[epoch]

        found = used(scheduler, optimizer, at_epoch=change)
    assert [found[at][-1] for at in (3, 4, 7, 8, 11)] == pytest.approx([1e-3, 0.0, 0.0, 1e-4, 1e-4])
    assert all(row[0] == pytest.approx(1e-3) for row in found if groups == 2)


def test_a_rate_that_is_set_in_the_run_is_the_highest_from_then_on():
    optimizer = SGD([{"params": parameter(), "lr": 1e-2}, {"params": parameter(), "lr": 0.0}])
    with scheduler_for(initial_lr=1e-2, scheduler_mode="cosine", warmup_proportion=0.5) as scheduler:
        follow_lr(scheduler, optimizer)

        def change(epoch):
            if epoch:
                optimizer.param_groups[1]["lr"] = 1e-3

        second = [row[1] for row in used(scheduler, optimizer, at_epoch=change)]
    assert second[:4] == [0.0] * 4
    assert max(second) <= 1e-3
    assert second[8] == pytest.approx(1e-3, rel=0.01)  # in the decay it counts at once
    assert 5e-4 < max(second[4:8]) <= 1e-3


def test_a_rollback_leaves_unfrozen_what_was_unfrozen_since_the_backup():
    optimizer = SGD([{"params": parameter(), "lr": 1e-3}, {"params": parameter(), "lr": 0.0}])
    model = nn.Linear(1, 1)
    with scheduler_for(num_epochs=6, backup_every=1000) as scheduler:
        scheduler.attach_model(
            lambda: capture_state(model, optimizer, copy=False), lambda state: restore_state(state, model, optimizer)
        )
        follow_lr(scheduler, optimizer)

        def change(epoch):
            if epoch == 1:
                optimizer.param_groups[1]["lr"] = 1e-4

        found = used(scheduler, optimizer, at_epoch=change, loss=lambda at: float("nan") if at == 17 else 1.0)
    assert [row[1] / row[0] for row in found[4:]] == pytest.approx([0.1] * len(found[4:]))


@pytest.mark.parametrize("kind", [Adam, SGD], ids=["with a state", "without"])
def test_a_group_that_was_added_since_the_backup_survives_a_rollback(kind):
    one, two = nn.Linear(1, 1), nn.Linear(1, 1)
    model = nn.ModuleList([one, two])
    optimizer = kind([{"params": one.parameters(), "lr": 1e-3}])
    with scheduler_for(num_epochs=6, backup_every=8) as scheduler:
        scheduler.attach_model(
            lambda: capture_state(model, optimizer, copy=False), lambda state: restore_state(state, model, optimizer)
        )
        follow_lr(scheduler, optimizer)

        def spoil(step):
            if step == 12:
                optimizer.add_param_group({"params": two.parameters(), "lr": 1e-4})
            if step == 14:
                nn.init.constant_(one.weight, float("nan"))
            return float("nan") if step == 14 else 1.0

        found = used(scheduler, optimizer, loss=spoil)
        assert scheduler.global_step == 24
    assert [len(row) for row in found] == [1] * 13 + [2] * 11
    assert [row[1] / row[0] for row in found[13:]] == pytest.approx([0.1] * 11)
    assert all(torch.isfinite(each).all() for each in model.parameters())


def test_a_state_with_fewer_groups_is_refused_where_nothing_was_trained():
    state = Adam([parameter()]).state_dict()
    optimizer = Adam([{"params": [parameter()]}, {"params": [parameter()]}])
    with pytest.raises(ValueError, match="parameter groups"):
        restore_state({"optimizer": state}, None, optimizer)


def test_a_state_from_before_the_run_leaves_the_proportions_as_they_are():
    optimizer = SGD([{"params": parameter(), "lr": 1e-3}, {"params": parameter(), "lr": 1e-5}])
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        group["lr"] = 1e-8
    with scheduler_for() as scheduler:
        follow_lr(scheduler, optimizer)

        def load(epoch):
            if epoch == 1:
                optimizer.load_state_dict(old)

        assert used(scheduler, optimizer, at_epoch=load)[-1] == pytest.approx([1e-3, 1e-5])


def test_proportions_are_saved_with_the_optimizer():
    def make():
        return SGD([{"params": parameter(), "lr": 1e-3}, {"params": parameter(), "lr": 1e-4}])

    first, second = make(), make()
    with scheduler_for(scheduler_mode="cosine") as scheduler:
        follow_lr(scheduler, first)
        used(scheduler, first)
    second.load_state_dict(first.state_dict())
    with scheduler_for() as scheduler:
        follow_lr(scheduler, second)
        second.add_param_group({"params": parameter(), "lr": 1e-5})
        assert used(scheduler, second)[-1] == pytest.approx([1e-3, 1e-4, 1e-5])


@pytest.mark.parametrize("closes", [True, False])
def test_an_optimizer_is_its_users_again_after_the_run(closes):
    optimizer = SGD([parameter()], lr=1e-3)
    scheduler = scheduler_for(scheduler_mode="cosine")
    follow_lr(scheduler, optimizer)
    used(scheduler, optimizer)
    if closes:
        scheduler.close()
    optimizer.param_groups[0]["lr"] = 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(optimizer)
    assert rates(optimizer) == [0.5]
    scheduler.close()


def test_runs_one_after_another_on_one_optimizer_do_not_hear_of_each_other():
    optimizer, alive = SGD([{"params": parameter(), "lr": 1e-3}, {"params": parameter(), "lr": 1e-4}]), []
    for fold in range(1, 4):
        scheduler = scheduler_for(initial_lr=1e-3 * fold)
        follow_lr(scheduler, optimizer)
        assert used(scheduler, optimizer)[-1] == pytest.approx([1e-3 * fold, 1e-4 * fold])
        alive.append(weakref.ref(scheduler))
        scheduler.close()
    del scheduler
    gc.collect()
    assert [one() for one in alive] == [None] * 3
    assert len(optimizer._optimizer_step_pre_hooks) == 1


# Other owners ----------------------------------------------------------------------------


class Notices:
    def __init__(self) -> None:
        self.messages = []

    def record(self, event) -> None:
        if isinstance(event, events.Notice):
            self.messages.append(event.message)


def test_reduce_on_plateau_lowers_the_rest_of_the_schedule_also_after_a_resume():
    optimizer = SGD([{"params": parameter(), "lr": 1e-3}, {"params": parameter(), "lr": 1e-4}])
    plateau, notices = ReduceLROnPlateau(optimizer, factor=0.1, patience=0), Notices()
    scheduler = scheduler_for(sinks=[notices], num_epochs=4)
    follow_lr(scheduler, optimizer)
    found = used(scheduler, optimizer, at_epoch=lambda epoch: plateau.step(1.0) if epoch in (1, 2) else None)
    assert [row[0] for row in (found[0], found[7], found[8], found[-1])] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])
    assert all(row[1] == pytest.approx(row[0] / 10) for row in found)
    assert [message for message in notices.messages if "ReduceLROnPlateau multiplied" in message] == notices.messages
    resumed = scheduler_for(num_epochs=5)
    resumed.load_state_dict(scheduler.state_dict())
    fresh = SGD([parameter()], lr=1e-3)
    follow_lr(resumed, fresh)
    assert used(resumed, fresh)[-1] == pytest.approx([1e-4])
    scheduler.close()
    resumed.close()


@pytest.mark.parametrize("groups", [1, 2])
def test_another_scheduler_of_the_rate_is_overruled_and_named(groups):
    optimizer = SGD([{"params": parameter(), "lr": 1e-3} for _ in range(groups)])
    other = StepLR(optimizer, 1, gamma=0.1)
    with scheduler_for() as scheduler, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        follow_lr(scheduler, optimizer)
        found = used(scheduler, optimizer, at_epoch=lambda epoch: other.step() if epoch else None)
    assert all(row == pytest.approx([1e-3] * groups) for row in found)
    (message,) = (str(one.message) for one in caught)
    assert message.startswith("StepLR set the learning rate to")
    assert "remove the other learning-rate scheduler" in message


def test_a_rate_that_is_set_by_hand_for_all_groups_is_overruled_and_said_once():
    optimizer = SGD([parameter()], lr=1e-3)
    with scheduler_for() as scheduler, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        follow_lr(scheduler, optimizer)

        def by_hand(epoch):
            optimizer.param_groups[0]["lr"] = 0.3

        found = used(scheduler, optimizer, at_epoch=by_hand)
    assert all(row == pytest.approx([1e-3]) for row in found[:1] + found[4:])
    assert len(caught) == 1
