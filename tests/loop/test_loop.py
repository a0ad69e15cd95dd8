"""The loop: what it hands out, what a report does, rollbacks, budgets, LR search, several ranks, signals."""

from __future__ import annotations

import gc
import math
import os
import random
import signal
import subprocess
import sys
import threading
from collections import deque
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from learnit_r8 import Batch, ProtocolError, R8Scheduler, Verdict, events
from learnit_r8.testing import FakeClock

ROOT = Path(__file__).resolve().parents[2]
BARE = {"use_curses": False, "checkpoint_dir": None}


class Ear:
    def __init__(self):
        self.heard = []

    def record(self, event):
        self.heard.append(event)

    def of(self, kind):
        return [event for event in self.heard if isinstance(event, kind)]


def train(scheduler, loss=lambda batch: np.ones(len(batch.indices)), before=lambda batch: None):
    """Train to the end; return (batch, result) pairs."""
    done = []
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            before(batch)
            done.append((batch, scheduler.update_with_loss(loss(batch))))
    return done


# What is handed out ----------------------------------------------------------------------------


def test_a_batch_unpacks_as_indices_and_rate():
    scheduler = R8Scheduler(20, 8, num_epochs=1, **BARE)
    batch = next(scheduler.batch_iterator())
    indices, lr = batch
    assert isinstance(batch, Batch)
    assert len(batch) == 2
    assert indices is batch.indices
    assert indices.dtype == np.int64
    assert type(lr) is float
    assert lr == batch.lr == scheduler.lr
    assert batch.weights.dtype == np.float32
    assert batch.weights.tolist() == [1.0] * 8
    assert (batch.id, batch.step, batch.epoch) == (0, 0, 0)


def test_a_user_may_write_into_the_batch():
    scheduler = R8Scheduler(20, 8, num_epochs=2, **BARE)

    def spoil(batch):
        batch.indices[:] = 0
        batch.weights[:] = 9

    for batch, _ in train(scheduler, before=spoil):
        assert (batch.weights == 9).all()
    np.testing.assert_array_equal(scheduler.catalog.uses, 2)
    assert scheduler._ones.tolist() == [1.0] * 8


def test_the_published_numbers_are_there():
    scheduler = R8Scheduler(num_samples=20, batch_size=8, num_epochs=3, **BARE)
    assert (scheduler.global_step, scheduler.current_epoch, scheduler.steps_per_epoch) == (0, 0, 3)
    assert scheduler.total_steps == 9
    assert scheduler.optimal_lr_found is None
    assert scheduler.strategy.name == "quadrant"
    steps = [batch.step for batch, _ in train(scheduler)]
    assert steps == list(range(9))
    assert R8Scheduler(20, 8, num_epochs=3, drop_last=True, **BARE).steps_per_epoch == 2
    assert R8Scheduler(20, 8, train_duration_seconds=3, **BARE).total_steps is None


@pytest.mark.parametrize(("size", "batch"), [(1, 1), (1, 8), (3, 8), (8, 8), (9, 8)])
def test_tiny_data_sets_are_trained_on(size, batch):
    scheduler = R8Scheduler(size, batch, num_epochs=3, **BARE)
    sizes = [len(each.indices) for each, _ in train(scheduler)]
    assert sum(sizes) == 3 * size
    np.testing.assert_array_equal(scheduler.catalog.uses, 3)


def test_the_first_epoch_is_random_and_seeds_differ():
    def first_epoch(seed):
        scheduler = R8Scheduler(100, 10, num_epochs=1, seed=seed, **BARE)
        return np.concatenate([batch.indices for batch, _ in train(scheduler)])

    assert not np.array_equal(first_epoch(0), np.arange(100))
    assert not np.array_equal(first_epoch(0), first_epoch(1))
    np.testing.assert_array_equal(first_epoch(5), first_epoch(5))


def test_epochs_differ_from_each_other():
    scheduler = R8Scheduler(100, 10, num_epochs=3, strategy="uniform", **BARE)
    order = [tuple(batch.indices) for batch, _ in train(scheduler)]
    assert len(set(order)) == 30


def test_global_random_numbers_are_neither_used_nor_disturbed():
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global state is what is tested
    torch.manual_seed(1)

    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    before = state()
    train(R8Scheduler(40, 8, num_epochs=2, **BARE))
    assert state() == before


def test_the_rate_warms_up_and_ends_at_the_floor():
    scheduler = R8Scheduler(100, 1, num_epochs=1, initial_lr=1.0, min_lr=0.25, warmup_proportion=0.1, **BARE)
    rates = [batch.lr for batch, _ in train(scheduler)]
    assert rates[9] == pytest.approx(1.0)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.25, abs=1e-3)
    assert min(rates) >= 0.25


def test_a_schedule_of_the_users_own_gets_progress_and_gives_a_factor():
    seen = []

    def shape(progress):
        seen.append(progress)
        return 1.0 - progress

    scheduler = R8Scheduler(10, 1, num_epochs=1, initial_lr=2.0, scheduler_mode=shape, warmup_proportion=0.0, **BARE)
    rates = [batch.lr for batch, _ in train(scheduler)]
    assert rates[0] == 2.0
    assert all(0 <= progress <= 1 for progress in seen)
    assert rates == sorted(rates, reverse=True)


def test_a_schedule_that_gives_no_number_is_refused():
    with pytest.raises(ValueError, match=r"finite number"):
        R8Scheduler(10, 1, num_epochs=1, scheduler_mode=lambda p: math.nan, **BARE)


# Leaving the loops -----------------------------------------------------------------------------


def test_after_a_break_at_the_end_of_an_epoch_the_next_epoch_follows():
    scheduler = R8Scheduler(16, 8, num_epochs=3, **BARE)
    epochs = []
    while len(epochs) < 3:
        for epoch in scheduler.epoch_iterator():
            epochs.append(epoch)
            for batch in scheduler.batch_iterator():
                scheduler.update_with_loss(1.0)
                if batch.step % 2:
                    break
            break
    assert epochs == [0, 1, 2]
    assert list(scheduler.epoch_iterator()) == []


def test_a_checkpoint_is_due_after_an_epoch_whose_loop_was_left_at_its_last_batch(tmp_path):
    ear = Ear()
    scheduler = R8Scheduler(
        16, 8, num_epochs=2, use_curses=False, checkpoint_dir=tmp_path, checkpoint_every="epoch", sinks=[ear]
    )
    for _ in scheduler.epoch_iterator():
        for _, _ in zip(range(2), scheduler.batch_iterator(), strict=False):
            scheduler.update_with_loss(1.0)
    assert [event.step for event in ear.of(events.CheckpointSaved)] == [2, 4]


def test_several_open_batches_come_again_in_order_after_a_break():
    scheduler = R8Scheduler(64, 8, num_epochs=1, lookahead=3, **BARE)
    batches = scheduler.batch_iterator()
    first = [next(batches).indices.tolist() for _ in range(3)]
    batches.close()
    batches = scheduler.batch_iterator()
    again = next(batches)
    assert again.indices.tolist() == first[0]
    other = R8Scheduler(64, 8, num_epochs=1, lookahead=3, **BARE)
    other.load_state_dict(scheduler.state_dict())
    batches = other.batch_iterator()
    assert [next(batches).indices.tolist() for _ in range(3)] == first


def test_batches_of_an_epoch_that_was_given_up_can_no_longer_be_reported():
    scheduler = R8Scheduler(16, 8, num_epochs=2, **BARE)
    epochs = scheduler.epoch_iterator()
    next(epochs)
    late = next(scheduler.batch_iterator())
    assert next(epochs) == 1
    with pytest.raises(ProtocolError, match="not open"):
        scheduler.update_with_loss(1.0, late)
    assert scheduler.catalog.num_seen == 0


def test_samples_that_the_first_epoch_missed_are_drawn_in_the_second():
    scheduler = R8Scheduler(64, 8, num_epochs=2, **BARE)
    for epoch in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            if epoch == 0 and batch.step == 3:
                break
            scheduler.update_with_loss(np.cos(batch.indices))
    assert scheduler.catalog.uses.min() == 1
    assert scheduler.catalog.num_seen == 64


def test_leftover_losses_can_be_reported_after_the_batch_loop():
    scheduler = R8Scheduler(64, 8, num_epochs=2, lookahead=4, **BARE)
    for _ in scheduler.epoch_iterator():
        waiting = deque()
        for batch in scheduler.batch_iterator():
            waiting.append(batch)
            if len(waiting) == 4:
                scheduler.update_with_loss(np.ones(8), waiting.popleft())
        assert len(waiting) == 3
        while waiting:
            scheduler.update_with_loss(np.ones(8), waiting.pop())
    np.testing.assert_array_equal(scheduler.catalog.uses, 2)


def test_without_a_name_a_loss_belongs_to_the_oldest_open_batch():
    scheduler = R8Scheduler(64, 8, num_epochs=1, lookahead=2, **BARE)
    batches = scheduler.batch_iterator()
    oldest, _ = next(batches), next(batches)
    scheduler.update_with_loss(np.ones(8))
    assert np.flatnonzero(scheduler.catalog.uses).tolist() == sorted(oldest.indices)


# A report --------------------------------------------------------------------------------------


def test_a_result_says_what_was_expected_and_what_came():
    scheduler = R8Scheduler(8, 8, num_epochs=2, **BARE)
    (_, first), (_, second) = train(scheduler, lambda batch: np.full(8, 3.0 - batch.epoch))
    assert (first.accepted, first.rolled_back, first.verdict, first.loss, first.step) == (True, False, "calm", 3.0, 0)
    assert math.isnan(first.expected_loss)
    assert (second.loss, second.expected_loss, second.surprise, second.step) == (2.0, 3.0, -1.0, 1)


def test_a_skipped_optimizer_step_is_no_fault():
    rolled = []
    scheduler = R8Scheduler(32, 8, num_epochs=1, load_callback=rolled.append, **BARE)
    scheduler.update_cpu_backup({"w": 1})
    batches = scheduler.batch_iterator()
    next(batches)
    result = scheduler.update_with_loss(math.inf, skipped=True)
    assert result.verdict is Verdict.SKIPPED
    assert (bool(result), result.rolled_back, scheduler.global_step) == (False, False, 1)
    next(batches)
    assert scheduler.update_with_loss(np.ones(8), skipped=True).accepted
    assert rolled == []
    assert scheduler.catalog.num_seen == 8


@pytest.mark.parametrize("scalar", [False, True])
def test_the_catalog_learns_which_samples_are_hard(scalar):
    scheduler = R8Scheduler(64, 8, num_epochs=60, **BARE)
    hard = np.arange(64) % 4 == 0
    train(scheduler, lambda b: (lambda v: v.mean() if scalar else v)(np.where(hard[b.indices], 5.0, 1.0)))
    estimate = scheduler.catalog.expected_loss
    assert estimate[hard].min() > estimate[~hard].max()
    assert 0 < scheduler.catalog.confidence <= 1
    assert (scheduler.catalog.quadrants()[hard] == 3).mean() > 0.9


@pytest.mark.parametrize("make_loss", [
    lambda n: torch.ones(n, requires_grad=True) * 2,
    lambda n: torch.full((n,), 2.0, dtype=torch.bfloat16),
    lambda n: torch.tensor(2.0, dtype=torch.float16, requires_grad=True),
    lambda n: [2] * n,
    lambda n: np.full(n, 2, np.int8),
    lambda n: 2,
    lambda n: np.float16(2),
], ids=["torch grad", "bf16", "fp16 0-d", "list", "int8", "int", "numpy scalar"])  # fmt: skip
def test_losses_of_any_kind_work_end_to_end(make_loss):
    scheduler = R8Scheduler(20, 8, num_epochs=3, **BARE)
    results = [result for _, result in train(scheduler, lambda batch: make_loss(len(batch.indices)))]
    assert all(result.loss == 2.0 for result in results)
    np.testing.assert_allclose(scheduler.catalog.expected_loss, 2.0, rtol=1e-3)


# Losses that are not finite --------------------------------------------------------------------


class Model:
    """A model whose state is changed in place, as optimizers do."""

    def __init__(self):
        self.weights = np.zeros(3)
        self.nested = {"moments": [torch.zeros(2), 0]}
        self.loads = []

    def state(self):
        return {"weights": self.weights, "nested": self.nested}

    def step(self):
        self.weights += 1
        self.nested["moments"][0] += 1
        self.nested["moments"][1] += 1

    def load(self, source, from_ram=False):
        self.loads.append(from_ram)
        self.weights, self.nested = source["weights"], source["nested"]

    @property
    def value(self):
        return [*self.weights.tolist(), *self.nested["moments"][0].tolist(), self.nested["moments"][1]]


BAD = {
    "scalar nan": lambda n: math.nan,
    "scalar inf": lambda n: -math.inf,
    "one nan": lambda n: np.r_[np.ones(n - 1), math.nan],
    "one inf": lambda n: torch.tensor([math.inf] + [1.0] * (n - 1)),
    "overflow": lambda n: [1e300] * n,
}
LAST = 11


@pytest.mark.parametrize("at", [0, 1, 5, LAST])
@pytest.mark.parametrize("kind", BAD)
def test_a_loss_that_is_not_finite_rolls_the_model_back(kind, at):
    model, ear = Model(), Ear()
    scheduler = R8Scheduler(32, 8, num_epochs=3, load_callback=model.load, sinks=[ear], **BARE)
    scheduler.update_cpu_backup(model.state())

    def loss(batch):
        model.step()
        return BAD[kind](len(batch.indices)) if batch.step == at else np.ones(len(batch.indices))

    done = train(scheduler, loss)
    assert scheduler.global_step == 12
    bad = done[at][1]
    assert (bool(bad), bad.accepted, bad.rolled_back, bad.verdict) == (False, False, True, Verdict.NONFINITE)
    assert bad.step == at
    assert sum(result.rolled_back for _, result in done) == 1
    assert model.loads == [True]
    assert model.value == [LAST - at] * 6, "the backup's values, and the steps since"
    catalog = scheduler.catalog
    for values in (catalog.expected_loss, catalog.variance, catalog.mean_loss):
        assert np.isfinite(values).all()
    (spike,) = ear.of(events.SpikeSeen)
    assert spike.step == at
    assert spike.indices == tuple(done[at][0].indices)
    assert [event.to_step for event in ear.of(events.RolledBack)] == [0]


def test_samples_whose_only_loss_was_not_finite_are_drawn_again():
    scheduler = R8Scheduler(32, 8, num_epochs=2, **BARE)
    done = train(scheduler, lambda batch: math.nan if batch.step == 2 else np.ones(8))
    lost = done[2][0].indices
    uses = scheduler.catalog.uses
    assert set(uses[lost]) == {1}
    assert set(np.delete(uses, lost)) == {2}


def test_nothing_but_a_copy_reaches_or_leaves_the_backup():
    given = {"w": np.zeros(2), "t": torch.zeros(2), "list": [np.zeros(1)]}
    loaded = []

    def load(source):
        loaded.append({"w": source["w"].copy(), "t": source["t"].clone(), "list": [source["list"][0].copy()]})
        source["w"] += 5
        source["t"] += 5
        source["list"][0][:] = 5
        source["list"].append("junk")

    scheduler = R8Scheduler(80, 8, num_epochs=1, load_callback=load, **BARE)
    scheduler.update_cpu_backup(given)
    given["w"][:] = 7
    given["t"][:] = 7
    given["list"][0][:] = 7
    train(scheduler, lambda batch: math.nan if batch.step in (1, 3, 6) else np.ones(8))
    assert len(loaded) == 3
    for state in loaded:
        assert state["w"].tolist() == [0, 0]
        assert state["t"].tolist() == [0, 0]
        assert state["list"][0].tolist() == [0]


def test_a_backup_is_detached_and_on_the_cpu():
    parameter = torch.nn.Parameter(torch.ones(2))
    loaded = []
    scheduler = R8Scheduler(32, 8, num_epochs=1, load_callback=loaded.append, **BARE)
    scheduler.update_cpu_backup({"p": parameter, "grad": parameter * 2})
    train(scheduler, lambda batch: math.nan if batch.step == 1 else 1.0)
    assert not loaded[0]["grad"].requires_grad
    assert loaded[0]["p"].device.type == "cpu"


def test_backups_are_taken_by_the_scheduler_before_the_first_step_and_then_now_and_again():
    model, ear = Model(), Ear()
    scheduler = R8Scheduler(
        80, 8, num_epochs=2, state_callback=model.state, load_callback=model.load, backup_every=5, sinks=[ear], **BARE
    )
    train(scheduler, lambda batch: model.step() or np.ones(8))
    taken = [event.step for event in ear.of(events.BackupTaken)]
    assert taken[0] == 0
    assert all(later - earlier >= 5 for earlier, later in pairwise(taken))


def test_without_a_backup_the_loss_is_left_out_and_training_goes_on():
    ear = Ear()
    scheduler = R8Scheduler(32, 8, num_epochs=1, sinks=[ear], **BARE)
    done = train(scheduler, lambda batch: math.nan if batch.step == 1 else np.ones(8))
    assert [result.accepted for _, result in done] == [True, False, True, True]
    assert not done[1][1].rolled_back
    (failed,) = ear.of(events.RollbackFailed)
    assert "load_callback" in failed.reason


# A budget in seconds ---------------------------------------------------------------------------


def test_a_time_budget_ends_the_run_and_the_rate_follows_the_time():
    clock = FakeClock()
    scheduler = R8Scheduler(
        100, 10, train_duration_seconds=100, initial_lr=1.0, min_lr=0.1, clock=clock, warmup_proportion=0.1, **BARE
    )
    rates = []

    def step(batch):
        rates.append((clock.monotonic(), batch.lr))
        clock.advance(0.5 if batch.step % 2 else 1.5)  # uneven steps: time counts, not steps
        return np.ones(10)

    done = train(scheduler, step)
    assert len(done) == 100
    assert clock.monotonic() == pytest.approx(100.0)
    assert list(scheduler.epoch_iterator()) == []
    assert max(lr for _, lr in rates) == pytest.approx(1.0, rel=0.02)
    assert rates[-1][1] == pytest.approx(0.1, abs=0.01)
    after = [lr for now, lr in rates if now >= 10]
    assert after == sorted(after, reverse=True)
    half = min(rates, key=lambda pair: abs(pair[0] - 55))[1]
    assert half == pytest.approx(0.1 + 0.9 * 0.5, abs=0.02), "cosine, half way from the end of warm-up"


def test_time_spent_before_a_resume_counts_and_time_between_does_not():
    clock = FakeClock()
    scheduler = R8Scheduler(100, 10, train_duration_seconds=50, clock=clock, **BARE)

    def run(scheduler, stop):
        for _ in scheduler.epoch_iterator():
            for _ in scheduler.batch_iterator():
                clock.advance(1)
                scheduler.update_with_loss(np.ones(10))
                if scheduler.global_step == stop:
                    return

    run(scheduler, 20)
    state = scheduler.state_dict()
    clock.advance(10_000)
    resumed = R8Scheduler(100, 10, train_duration_seconds=50, clock=clock, **BARE)
    resumed.load_state_dict(state)
    run(resumed, None)
    assert resumed.global_step == 50


def test_a_finished_time_budget_goes_on_when_there_is_more_time():
    clock = FakeClock()

    def run(scheduler):
        train(scheduler, lambda batch: clock.advance(1) or np.ones(10))
        return scheduler

    first = run(R8Scheduler(100, 10, train_duration_seconds=20, clock=clock, **BARE))
    assert first.global_step == 20
    second = R8Scheduler(100, 10, train_duration_seconds=30, clock=clock, **BARE)
    second.load_state_dict(first.state_dict())
    assert run(second).global_step == 30


# LR search -------------------------------------------------------------------------------------


class Regression:
    """Least squares by SGD: the best rate is known to lie below 2 / largest eigenvalue."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.x = rng.normal(size=(640, 5))
        self.y = self.x @ np.arange(1.0, 6.0) + 3 * rng.normal(size=640)  # a floor under the loss: no spikes
        self.w = np.zeros(5)
        self.loads = 0

    def step(self, indices, lr):
        x, error = self.x[indices], self.x[indices] @ self.w - self.y[indices]
        with np.errstate(over="ignore", invalid="ignore"):
            losses = error**2
            self.w -= lr * 2 * x.T @ error / len(indices)
        return losses

    def state(self):
        return {"w": self.w}

    def load(self, source, from_ram=False):
        self.loads += 1
        if not from_ram:
            source = {"w": np.load(source + ".npy")}
        self.w = np.array(source["w"])

    def save(self, state, path):
        np.save(path + ".npy", self.w)

    def loss(self):
        return float(np.mean((self.x @ self.w - self.y) ** 2))


def searching(model, by_file=False, **more):
    callbacks = {"save_callback": model.save} if by_file else {"state_callback": model.state}
    settings = {"num_epochs": 10, "use_curses": False, "checkpoint_dir": None, "auto_find_lr": True, "initial_lr": 1e-7}
    return R8Scheduler(640, 8, load_callback=model.load, **(settings | callbacks | more))


@pytest.mark.parametrize("by_file", [False, True])
def test_a_search_finds_a_rate_and_leaves_no_trace(by_file):
    model, ear = Regression(), Ear()
    scheduler = searching(model, by_file, sinks=[ear])
    searched = 0
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            if scheduler._search is not None:
                searched += 1
            elif scheduler.global_step == 0:
                assert not model.w.any(), "the model is as it was before the search"
                assert scheduler.catalog.num_seen == 0
                assert (batch.step, batch.epoch) == (0, 0)
            scheduler.update_with_loss(model.step(batch.indices, batch.lr))
    found = scheduler.optimal_lr_found
    assert searched > 10
    assert 1e-3 < found < 0.5
    assert max(event.lr for event in ear.of(events.BatchIssued)[searched:]) == pytest.approx(found, rel=0.01)
    assert [event.lr for event in ear.of(events.LrFound)] == [found]
    assert scheduler.global_step == 800
    np.testing.assert_array_equal(scheduler.catalog.uses, 10)
    assert model.loss() < 15, "with initial_lr=1e-7 nothing would have been learned"


def test_a_run_that_is_too_short_for_a_search_keeps_its_rate_and_says_so():
    model, ear = Regression(), Ear()
    scheduler = R8Scheduler(
        16, 8, num_epochs=2, auto_find_lr=True, initial_lr=0.01, state_callback=model.state, load_callback=model.load,
        sinks=[ear], **BARE,
    )  # fmt: skip
    train(scheduler, lambda batch: model.step(batch.indices, batch.lr))
    assert scheduler.optimal_lr_found is None
    assert scheduler.global_step == 4
    assert any("too short" in event.message for event in ear.of(events.Notice))


def test_amid_the_search_nothing_can_be_saved_and_after_leaving_it_can():
    model = Regression()
    scheduler = searching(model)
    reference = {"w": model.w.copy()}
    for _ in scheduler.epoch_iterator():
        for count, batch in enumerate(scheduler.batch_iterator()):
            scheduler.update_with_loss(model.step(batch.indices, batch.lr))
            with pytest.raises(ProtocolError, match="the LR search is running"):
                scheduler.state_dict()
            if count == 7:
                break
        break
    np.testing.assert_array_equal(model.w, reference["w"])
    state = scheduler.state_dict()
    assert state["global_step"] == 0
    model = Regression()
    resumed = searching(model)
    resumed.load_state_dict(state)
    train(resumed, lambda batch: model.step(batch.indices, batch.lr))
    assert resumed.optimal_lr_found is not None
    assert resumed.global_step == 800


def test_a_search_that_was_left_starts_again():
    model = Regression()
    scheduler = searching(model)

    def some(count):
        for _ in scheduler.epoch_iterator():
            for number, batch in enumerate(scheduler.batch_iterator()):
                if number == count:
                    return
                scheduler.update_with_loss(model.step(batch.indices, batch.lr))

    some(5)
    assert not model.w.any()
    some(3)
    train(scheduler, lambda batch: model.step(batch.indices, batch.lr))
    once = Regression()
    reference = searching(once)
    train(reference, lambda batch: once.step(batch.indices, batch.lr))
    assert scheduler.optimal_lr_found == reference.optimal_lr_found
    np.testing.assert_array_equal(model.w, once.w)


def test_an_exception_amid_the_search_restores_the_model():
    model = Regression()
    scheduler = searching(model)

    def body():
        for batch in scheduler.batch_iterator():
            scheduler.update_with_loss(model.step(batch.indices, batch.lr))
            if model.w.any():
                raise KeyError("the data is gone")

    with pytest.raises(KeyError, match="the data is gone"):
        body()
    assert not model.w.any()


def test_the_found_rate_survives_a_resume():
    model = Regression()
    first = searching(model)
    rates = []
    train(first, lambda batch: rates.append(batch.lr) or model.step(batch.indices, batch.lr))
    again = Regression()
    second = searching(again)
    for _ in second.epoch_iterator():
        for batch in second.batch_iterator():
            second.update_with_loss(again.step(batch.indices, batch.lr))
            if second.global_step == 100:
                break
        break
    third = searching(again)
    third.load_state_dict(second.state_dict())
    assert third.optimal_lr_found == first.optimal_lr_found
    rest = []
    train(third, lambda batch: rest.append(batch.lr) or again.step(batch.indices, batch.lr))
    assert rest == rates[-len(rest) :]
    np.testing.assert_array_equal(again.w, model.w)


# Several ranks ---------------------------------------------------------------------------------


class World:
    """Ranks as threads; all_gather meets at a barrier."""

    def __init__(self, size):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=20)
        self.slots = [None] * size
        self.errors = []

    def gather(self, rank):
        def all_gather(array):
            self.slots[rank] = np.array(array)
            self.barrier.wait()
            result = np.concatenate(self.slots)
            self.barrier.wait()
            return result

        return all_gather

    def run(self, work):
        """Call work(rank, all_gather) in one thread per rank; return the results."""
        results = [None] * self.size

        def body(rank):
            try:
                results[rank] = work(rank, self.gather(rank))
            except BaseException as error:
                self.errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]
        return results


def rank_run(num_samples, world_size, loss, scalar=False, stop=None, state=None, epochs=3):
    """Train on several ranks; return each rank's (slices, results, final scheduler)."""

    def work(rank, all_gather):
        scheduler = R8Scheduler(
            num_samples, 6, num_epochs=epochs, rank=rank, world_size=world_size,
            all_gather=all_gather if world_size > 1 else None, **BARE,
        )  # fmt: skip
        if state is not None:
            scheduler.load_state_dict(state)
        slices, results = [], []
        for _ in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                values = loss(batch)
                slices.append(batch.indices.tolist())
                results.append(scheduler.update_with_loss(float(np.mean(values)) if scalar else values))
                if scheduler.global_step == stop:
                    return slices, results, scheduler
        return slices, results, scheduler

    return World(world_size).run(work)


@pytest.mark.parametrize("num_samples", [30, 33, 35])  # the last batch: none, 3 or 5 samples
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("scalar", [False, True])
def test_ranks_share_one_plan_and_learn_the_same(num_samples, world_size, scalar):
    def loss(batch):
        return np.sin(batch.indices) + 2

    (single, single_results, alone), *_ = rank_run(num_samples, 1, loss, scalar)
    ranks = rank_run(num_samples, world_size, loss, scalar)
    left_out = num_samples % 6 % world_size
    for step, whole in enumerate(single):
        parts = [slices[step] for slices, _, _ in ranks]
        if step < len(single) // 3:  # later the plan depends on what was left out, or on rounding of averaged scalars
            assert sorted(sum(parts, [])) == sorted(whole[: len(whole) - len(whole) % world_size])  # noqa: RUF017
        assert len(set(map(len, parts))) == 1
        assert len(parts[0]) >= 1
    for _, results, scheduler in ranks:
        assert [r.loss for r in results] == [r.loss for r in ranks[0][1]]
        for name in ("expected_loss", "uses", "last_seen", "variance"):
            np.testing.assert_array_equal(getattr(scheduler.catalog, name), getattr(ranks[0][2].catalog, name))
    if not scalar and not left_out:
        np.testing.assert_array_equal(ranks[0][2].catalog.expected_loss, alone.catalog.expected_loss)
        assert [r.loss for r in ranks[0][1]] == pytest.approx([r.loss for r in single_results], rel=1e-6)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("scalar", [False, True])
def test_one_ranks_nan_is_every_ranks_nan(world_size, scalar):
    def loss(batch):
        values = np.ones(len(batch.indices))
        if (batch.step == 2 and 5 in batch.indices) or (batch.step == 6 and batch.indices[0] % 2):
            values[0] = math.nan
        return values

    ranks = rank_run(32, world_size, loss, scalar)
    verdicts = [[result.verdict for result in results] for _, results, _ in ranks]
    assert all(each == verdicts[0] for each in verdicts)
    uses = [scheduler.catalog.uses.tolist() for _, _, scheduler in ranks]
    assert all(each == uses[0] for each in uses)


def test_a_nan_on_one_rank_is_seen_by_all():
    def work(rank, all_gather):
        scheduler = R8Scheduler(16, 8, num_epochs=1, rank=rank, world_size=2, all_gather=all_gather, **BARE)
        batches = scheduler.batch_iterator()
        next(batches)
        first = scheduler.update_with_loss([math.nan if rank else 1.0] * 4)
        next(batches)
        return first.accepted, scheduler.update_with_loss(math.inf if rank == 0 else 1.0).accepted

    assert World(2).run(work) == [(False, False)] * 2


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2)])
def test_a_run_resumes_with_another_number_of_ranks(before, after):
    def loss(batch):
        return np.sin(batch.indices) + 2

    (whole, _, reference), *_ = rank_run(42, 1, loss)
    first = rank_run(42, before, loss, stop=7)
    resumed = rank_run(42, after, loss, state=first[0][2].state_dict())
    for step in range(7, len(whole)):
        parts = [slices[step - 7] for slices, _, _ in resumed]
        assert sorted(sum(parts, [])) == sorted(whole[step])  # noqa: RUF017 - three short lists
    np.testing.assert_array_equal(resumed[0][2].catalog.expected_loss, reference.catalog.expected_loss)
    np.testing.assert_array_equal(resumed[0][2].catalog.uses, 3)


def test_ranks_that_report_differently_are_told():
    def work(rank, all_gather):
        scheduler = R8Scheduler(16, 8, num_epochs=1, rank=rank, world_size=2, all_gather=all_gather, **BARE)
        next(scheduler.batch_iterator())
        with pytest.raises(ProtocolError, match="5 losses for a global batch of 8 samples on 2 ranks"):
            scheduler.update_with_loss(1.0 if rank else np.ones(4))
        return scheduler.update_with_loss(np.ones(4)).accepted

    assert World(2).run(work) == [True, True]


# Signals, in real processes --------------------------------------------------------------------

SCRIPT = """
import signal, sys, time
import numpy as np
from learnit_r8 import R8Scheduler

mode, directory = sys.argv[1:]
scheduler = R8Scheduler(64, 8, num_epochs=1000, use_curses=False, checkpoint_dir=directory)

def step(n):
    if mode == "slow step":
        print("ready", flush=True)
        while True:  # never reaches the step boundary
            time.sleep(0.01)
    time.sleep(0.005)
    if scheduler.global_step == 10:
        print("ready", flush=True)
    return np.ones(n)

try:
    with scheduler:
        for _ in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                loss = step(len(batch.indices))
                if mode == "break at once" and scheduler.global_step == 5:
                    signal.raise_signal(signal.SIGTERM)
                    break
                scheduler.update_with_loss(loss)
            if mode == "break at once":
                break
        print("left the loops", flush=True)
    print("closed", flush=True)
    time.sleep(1)
except KeyboardInterrupt:
    print("interrupted at step", scheduler.global_step, flush=True)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    sys.exit(7)
"""


def start(mode, directory):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, mode, str(directory)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=directory.parent, env=env,
    )  # fmt: skip
    if mode != "break at once":
        assert process.stdout.readline() == "ready\n"
    return process


def finish(process):
    try:
        return *process.communicate(timeout=30), process.returncode
    finally:
        process.kill()


def saved_step(directory):
    resumed = R8Scheduler.resume_from_checkpoint(directory, use_curses=False)
    uses = resumed.catalog.uses
    assert uses.max() - uses.min() <= 1
    assert uses.sum() == 8 * resumed.global_step
    return resumed.global_step


def test_sigterm_saves_after_the_step_and_then_ends_the_process_as_sigterm_does(tmp_path):
    process = start("train", tmp_path / "c")
    process.send_signal(signal.SIGTERM)
    _, err, code = finish(process)
    assert code == -signal.SIGTERM
    assert "SIGTERM: saving a checkpoint after this step" in err
    assert saved_step(tmp_path / "c") >= 10


def test_ctrl_c_saves_after_the_step_and_is_then_a_keyboard_interrupt(tmp_path):
    process = start("train", tmp_path / "c")
    process.send_signal(signal.SIGINT)
    out, _, code = finish(process)
    assert code == 7
    step = int(out.split("interrupted at step")[1])
    assert saved_step(tmp_path / "c") == step >= 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once(number, tmp_path):
    process = start("slow step", tmp_path / "c")
    process.send_signal(number)
    assert "saving a checkpoint after this step" in process.stderr.readline() + process.stderr.readline()
    process.send_signal(number)
    out, _, code = finish(process)
    assert code == (7 if number == signal.SIGINT else -signal.SIGTERM)
    assert number == signal.SIGTERM or "interrupted at step 0" in out
    assert not (tmp_path / "c").exists()


def test_a_signal_in_the_last_step_of_a_loop_that_is_left_is_not_lost(tmp_path):
    out, err, code = finish(start("break at once", tmp_path / "c"))
    assert code == -signal.SIGTERM, err
    assert "left the loops" in out
    assert "closed" not in out
    assert saved_step(tmp_path / "c") == 5


def test_handlers_are_put_back_when_the_loops_end():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    scheduler = R8Scheduler(16, 8, num_epochs=2, **BARE)
    inside = set()
    train(scheduler, lambda batch: inside.add(signal.getsignal(signal.SIGTERM)) or 1.0)
    assert before[1] not in inside
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with pytest.raises(KeyError):
        train(R8Scheduler(16, 8, num_epochs=2, **BARE), lambda batch: {}["no loss"])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_after_an_interrupt_at_once_the_loop_can_be_entered_again():
    scheduler = R8Scheduler(16, 8, num_epochs=1, **BARE)

    def twice(batch):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(scheduler, before=twice)
    assert len(train(scheduler)) == 2


def test_a_handler_of_the_users_own_is_called_between_two_steps():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(scheduler.global_step))
    try:
        scheduler = R8Scheduler(32, 8, num_epochs=1, **BARE)
        train(scheduler, before=lambda batch: signal.raise_signal(signal.SIGTERM) if batch.step == 1 else None)
        assert heard == [2]
        assert scheduler.global_step == 4
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("keeps", ["a traceback", "uncollected garbage"])
def test_a_run_that_was_thrown_out_is_waited_for_until_the_next_step_only_where_its_loop_is_kept_open_by(keeps):
    def fail(scheduler):
        loop = [scheduler.epoch_iterator()]
        if keeps == "uncollected garbage":
            loop.append(loop)
        for _ in loop[0]:
            raise ValueError("thrown out")

    heard, kept = [], []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(scheduler.global_step))
    gc.collect()
    gc.disable()
    try:
        try:
            fail(R8Scheduler(32, 8, num_epochs=1, **BARE))
        except ValueError as error:
            kept += [error] if keeps == "a traceback" else []
        scheduler = R8Scheduler(32, 8, num_epochs=1, **BARE)
        train(scheduler, before=lambda batch: signal.raise_signal(signal.SIGTERM) if batch.step == 1 else None)
        assert heard == [3]
    finally:
        gc.enable()
        signal.signal(signal.SIGTERM, before)


def test_a_run_inside_the_step_of_another_leaves_the_signal_to_that_one():
    heard = []
    outer = R8Scheduler(32, 8, num_epochs=1, **BARE)
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append((outer.global_step, inner.global_step)))
    try:
        for _ in outer.epoch_iterator():
            for batch in outer.batch_iterator():
                if batch.step == 1:
                    inner = R8Scheduler(32, 8, num_epochs=1, **BARE)
                    train(inner, before=lambda b: signal.raise_signal(signal.SIGTERM) if b.step == 0 else None)
                outer.update_with_loss(np.ones(8))
        assert heard == [(2, 4)]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_run_goes_on_to_be_shown_after_a_handler_of_the_users_own():
    reasons = []

    class Ear:
        def record(self, event):
            if isinstance(event, (events.RunStarted, events.RunEnded)):
                reasons.append(getattr(event, "reason", "started"))

    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        caught = []
        scheduler = R8Scheduler(32, 8, num_epochs=1, sinks=[Ear()], **BARE)

        def body(batch):
            caught.append(signal.getsignal(signal.SIGTERM))
            if batch.step == 1:
                signal.raise_signal(signal.SIGTERM)

        train(scheduler, before=body)
        assert reasons == ["started", "stopped", "started", "finished"]
        assert len(caught) == 4
        assert len(set(caught)) == 1  # the next signal is kept for a step boundary, too
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("first", [0, 1])
def test_runs_whose_loops_overlap_leave_no_handler_behind(first):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    runs = [R8Scheduler(64, 8, num_epochs=2, **BARE) for _ in range(2)]
    loops = [run.batch_iterator() for run in runs]
    for _ in range(3):  # loops end and begin again on top of one another
        for run, loop in zip(runs, loops, strict=True):
            next(loop)
            run.update_with_loss(1.0)
        loops[0].close()
        loops[0] = runs[0].batch_iterator()
    for place in (first, 1 - first):
        runs[place].close()
        loops[place].close()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


OVERLAPPING = """
import signal, sys
from learnit_r8 import R8Scheduler

number, stale, folder = getattr(signal, sys.argv[1]), sys.argv[2] == "stale", sys.argv[3]
signal.signal(signal.SIGINT, signal.default_int_handler)
runs = [R8Scheduler(64, 8, num_epochs=9, ui="off", checkpoint_dir=f"{folder}/{name}") for name in "ab"]
left = runs[0].batch_iterator()
next(left)  # as after an error in a notebook, which keeps the loop that it came from
if not stale:
    runs[0].update_with_loss(1.0)
try:
    for _ in runs[1].epoch_iterator():
        for batch in runs[1].batch_iterator():
            if batch.step == 3:
                signal.raise_signal(number)
            runs[1].update_with_loss(1.0)
            if not stale:
                next(left)
                runs[0].update_with_loss(1.0)
finally:
    if not stale:
        for run in runs:
            run.close()
"""


@pytest.mark.parametrize(("name", "runs"), [("SIGINT", "stale"), ("SIGINT", "both"), ("SIGTERM", "both")])
def test_one_signal_stops_runs_whose_loops_overlap_and_saves_them(name, runs, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", OVERLAPPING, name, runs, str(tmp_path)],
        capture_output=True, text=True, timeout=60, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == -getattr(signal, name), done.stderr
    assert done.stderr.count("after this step") == 1
    assert saved_step(tmp_path / "b") == 4
    if runs == "both":
        assert saved_step(tmp_path / "a") == 4


def test_a_loop_in_another_thread_catches_no_signals():
    before = signal.getsignal(signal.SIGINT)
    seen = []
    scheduler = R8Scheduler(16, 8, num_epochs=1, **BARE)
    thread = threading.Thread(
        target=train, args=(scheduler, lambda b: seen.append(signal.getsignal(signal.SIGINT)) or 1.0)
    )
    thread.start()
    thread.join()
    assert seen == [before] * 2
    assert scheduler.global_step == 2


def test_a_second_nan_right_after_a_rollback_finds_the_backup_that_the_first_one_left():
    """The rollback to a backup forgets the later ones; what is left is the last resort then."""

    model, restored = {"w": np.zeros(3)}, []

    def load(state):
        restored.append(state)
        model["w"] = state["w"]

    scheduler = R8Scheduler(
        96,
        8,
        num_epochs=3,
        backup_every=5,
        state_callback=lambda: model,
        load_callback=load,
        checkpoint_dir=None,
        ui="off",
    )
    for _ in scheduler.epoch_iterator():
        for _ in scheduler.batch_iterator():
            bad = scheduler.global_step in (9, 21, 22)
            model["w"] = model["w"] + (math.nan if bad else 1.0)
            scheduler.update_with_loss(math.nan if bad else 1.0)
    assert len(restored) == 3
