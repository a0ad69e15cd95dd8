"""A model that is full of NaN while its losses stay finite: the scan of its backups sees it, and it is undone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.fault_training import BACKUP_EVERY, STEPS, Ear, Run
from learnit_r8 import R8Scheduler, TrainingDiverged
from learnit_r8.events import BackupVerified, Notice, RolledBack
from learnit_r8.integrations.torch import capture_state, follow_lr, restore_state
from learnit_r8.testing import FakeClock
from tests.backup_watch import finite
from tests.loop.test_safety import run_ranks

PROOF = 8  # calm losses before a backup is scanned


class Hiding(Run):
    """A run whose model has parts that no loss depends on: `table`, and a `mask` that is not finite by nature."""

    def __init__(self, seed: int = 0, **options) -> None:
        callbacks = {"state_callback": self.state, "load_callback": self.load}
        super().__init__(seed, **callbacks | options)
        self.parts = {"table": np.ones(5), "mask": np.array([0.0, -np.inf, np.nan])}

    def state(self):
        return {**self.model.arrays, **self.parts}

    def load(self, source) -> None:
        self.parts = {name: source.pop(name) for name in list(self.parts)}
        self.model.arrays = source

    def poisoned_at(self, *steps: int, value: float = np.nan):
        def before(step: int) -> None:
            if step in steps:
                self.parts["table"][2] = value

        return self.go(before=before)

    @property
    def notices(self) -> list[str]:
        return [event.message for event in self.ear.of(Notice) if "losses do not show" in event.message]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [1, 19, 20, 21, 100])
def test_damage_that_no_loss_shows_is_undone_at_the_next_backups_scan(at, value):
    run = Hiding().poisoned_at(at, value=value)
    ((step, to_step),) = run.rollbacks
    first_bad = -(-(at + 1) // BACKUP_EVERY) * BACKUP_EVERY
    assert (step, to_step) == (first_bad + PROOF, first_bad - BACKUP_EVERY)
    assert np.isfinite(run.parts["table"]).all()
    assert run.model.loss < 0.12
    assert len(run.notices) == 1
    assert "table" in run.notices[0]
    assert run.ear.of(BackupVerified)[-1].step > step  # backups go on


def test_what_was_not_finite_from_the_first_is_no_fault_and_stays():
    run = Hiding().go()
    assert run.rollbacks == []
    assert run.notices == []
    assert len(run.ear.of(BackupVerified)) > 5
    assert run.parts["mask"].tolist()[:2] == [0.0, -np.inf]


def test_a_part_that_is_not_finite_when_it_first_appears_is_no_alarm():
    run = Hiding()

    def before(step: int) -> None:
        if step == 30:
            run.parts["best"] = np.array(np.inf)

    run.go(before=before)
    assert run.rollbacks == []


def test_a_part_that_came_later_and_was_proved_finite_is_watched_too():
    run = Hiding()

    def before(step: int) -> None:
        if step == 30:
            run.parts["momentum"] = np.zeros(3)
        if step == 90:
            run.parts["momentum"][0] = np.nan

    run.go(before=before)
    assert run.rollbacks == [(100 + PROOF, 80)]
    assert "momentum" in run.notices[0]


def test_every_fault_is_undone_when_they_come_again_and_again():
    run = Hiding().poisoned_at(30, 75, 120)
    assert len(run.rollbacks) == 3
    assert finite(run.parts["table"])


def test_damage_that_comes_back_at_every_step_ends_in_an_error_that_blames_no_sample():
    run = Hiding(num_epochs=200)
    with pytest.raises(TrainingDiverged, match=r"10 times right after.*NaN or infinity in table") as caught:
        run.poisoned_at(*range(1, 10_000))
    assert not caught.value.batches[-1]


def test_without_a_way_to_restore_the_user_is_told_and_training_goes_on():
    run = Hiding(load_callback=None, state_callback=None)

    def before(step: int) -> None:
        if step % BACKUP_EVERY == 0:
            run.scheduler.update_cpu_backup(run.state())
        if step == 50:
            run.parts["table"][:] = np.nan

    run.go(before=before)
    assert run.scheduler.global_step == STEPS
    assert run.rollbacks == []
    assert run.notices


def test_a_nan_loss_before_the_alarm_leads_to_one_rollback_behind_both_faults():
    run = Hiding()

    def report(step: int, losses: np.ndarray) -> np.ndarray:
        return losses * np.nan if step == 40 + PROOF else losses

    def before(step: int) -> None:
        if step == 30:
            run.parts["table"][:] = np.nan

    run.go(report, before)
    assert run.rollbacks == [(40 + PROOF, 20)]


def test_one_ranks_hidden_damage_rolls_all_ranks_back():
    def body(rank, all_gather):
        run = Hiding(3, rank=rank, world_size=2, all_gather=all_gather)
        run.poisoned_at(*([70] if rank else []))
        return run.rollbacks, finite(run.parts["table"])

    first, second = run_ranks(body)
    assert first == second
    assert first[1]
    assert [to for _, to in first[0]] == [60]


class Gate(nn.Module):
    """A relu that, as TensorFlow's, turns NaN into 0."""

    def forward(self, x):
        return torch.where(x > 0, x, 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_a_torch_model_whose_activation_hides_nan_is_brought_back(seed):
    torch.manual_seed(seed)
    at = int(np.random.default_rng(seed).integers(5, 150))
    x = torch.randn(96, 4)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 1).long()
    model = nn.Sequential(nn.Linear(4, 16), Gate(), nn.Linear(16, 3))
    model.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ear = Ear()
    scheduler = R8Scheduler(
        96, 8, num_epochs=17, initial_lr=0.02, backup_every=4, clock=FakeClock(), checkpoint_dir=None, ui="off",
        sinks=[ear],
    )  # fmt: skip
    scheduler.attach_model(
        lambda: capture_state(model, optimizer, copy=False), lambda state: restore_state(state, model, optimizer)
    )
    follow_lr(scheduler, optimizer)
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            if batch.step == at:
                with torch.no_grad():
                    model[0].weight.fill_(float("nan"))
            losses = nn.functional.cross_entropy(model(x[batch.indices]), y[batch.indices], reduction="none")
            assert losses.isfinite().all()
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
            scheduler.update_with_loss(losses)
    assert ear.of(RolledBack)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        assert nn.functional.cross_entropy(model(x), y).item() < 0.5
