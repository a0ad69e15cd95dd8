"""Detector, backups, recovery table and checkpoints through R8Scheduler: models that are really poisoned."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import clean_runs
from benchmarks.fault_training import BATCH, EPOCHS, SAMPLES, STEPS, Run
from learnit_r8 import R8Scheduler, TrainingDiverged, Verdict
from learnit_r8.events import BackupTaken, BatchIssued, RollbackFailed, RolledBack, SampleQuarantined, SpikeSeen
from learnit_r8.strategies.uniform import Uniform

ROOT = Path(__file__).resolve().parents[2]
PER_EPOCH = SAMPLES // BATCH


def poison_at(run, *steps):
    def before(step):
        if step in steps:
            run.model.arrays["w"][0] = np.nan

    return before


def fine(run):
    assert run.model.loss < 0.12
    assert np.isfinite(run.scheduler.catalog.expected_loss).all()
    return True


# Step 0 -------------------------------------------------------------------------------------------


def test_nan_at_step_0_goes_back_to_the_initial_state():
    run = Run(1)
    run.go(before=poison_at(run, 0))
    assert run.rollbacks == [(0, 0)]
    assert fine(run)


def test_nan_at_step_0_is_undone_with_a_backup_by_hand_alone():
    run = Run(1, state_callback=None)
    run.scheduler.update_cpu_backup(run.model.arrays)
    run.go(before=poison_at(run, 0))
    assert run.rollbacks == [(0, 0)]
    assert fine(run)


def test_nan_at_step_0_with_nothing_to_go_back_to_ends_after_ten_with_a_bundle(tmp_path):
    run = Run(1, state_callback=None, load_callback=None, log_dir=tmp_path)
    with pytest.raises(TrainingDiverged) as raised:
        run.go(before=poison_at(run, 0))
    assert len(run.ear.of(RollbackFailed)) == 10
    bundle = json.loads((raised.value.crash_bundle / "crash.json").read_text())
    assert bundle["step"] == 9
    assert [step["verdict"] for step in bundle["steps"]] == ["nonfinite"] * 10
    assert bundle["steps"][-1]["indices"] == [int(i) for i in raised.value.batches[-1]]
    assert bundle["config"]["num_samples"] == SAMPLES
    assert [event["event"] for event in bundle["events"]].count("SpikeSeen") == 10


# What happens after a rollback --------------------------------------------------------------------


def test_the_data_move_on_and_the_rate_is_left_alone():
    run = Run(2, num_epochs=2 * EPOCHS, warmup_proportion=0.0)
    run.go(before=poison_at(run, 50))
    assert run.rollbacks == [(50, 40)]
    assert {event.lr for event in run.ear.of(BatchIssued)} == {0.01}
    assert len([e.indices for e in run.ear.of(SpikeSeen)]) == 1
    assert run.scheduler.global_step == 2 * STEPS


def test_a_fault_that_returns_at_once_lowers_the_rate_for_a_while_and_draws_stable_samples():
    run = Run(3, num_epochs=2 * EPOCHS, warmup_proportion=0.0)
    stable = []

    def before(step):
        if step in (50, 53, 56):
            run.model.arrays["w"] *= 60.0
        if run.scheduler._safety.machine.stable_only(step):
            ticket = next(iter(run.scheduler._desk._open.values()))
            stable.extend(run.scheduler.catalog.quadrants()[ticket.indices].tolist())

    run.go(before=before)
    rates = [event.lr for event in run.ear.of(BatchIssued)]
    hold = 2 * STEPS // 20
    assert rates[:52] == [0.01] * 52
    assert len(run.rollbacks) == 3
    last = run.rollbacks[-1][0]
    assert set(rates[last + 1 : last + 1 + hold]) == {0.0025}
    assert set(rates[last + 1 + hold :]) == {0.01}
    # Rewound estimates may have moved a sample across an edge since the epoch was planned.
    assert np.mean(np.array(stable[: 2 * BATCH]) == 0) > 0.8


@pytest.mark.parametrize("at", [PER_EPOCH - 1, PER_EPOCH, 2 * PER_EPOCH - 1, 2 * PER_EPOCH])
def test_a_rollback_at_an_epochs_first_or_last_batch_loses_no_step(at):
    run = Run(4)
    run.go(before=poison_at(run, at))
    assert len(run.rollbacks) == 1
    assert run.scheduler.global_step == STEPS
    assert fine(run)


def test_losses_of_a_sick_model_do_not_outlive_the_rollback_in_the_catalog():
    run = Run(16)

    def before(step):
        if step == 127:  # suspect at an epoch's last batch, proved at the next one's first
            run.model.arrays["w"] *= 40

    run.go(before=before)
    assert len(run.rollbacks) == 1
    assert run.scheduler.catalog.mean_loss.max() < 200
    assert fine(run)


def test_a_skipped_step_is_no_fault_whatever_its_loss():
    run = Run(5)
    scheduler = run.scheduler
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            losses = run.model.step(batch.indices, batch.lr)
            if batch.step % 10 == 3:
                result = scheduler.update_with_loss(float("nan"), skipped=True)
                assert result.verdict is Verdict.SKIPPED
            else:
                scheduler.update_with_loss(losses)
    assert run.rollbacks == []
    assert run.ear.of(SpikeSeen) == []
    assert fine(run)


def test_reports_that_were_under_way_during_a_rollback_cause_no_second_one():
    run = Run(6, lookahead=3)
    scheduler, under_way = run.scheduler, []

    def report():
        batch, losses = under_way.pop(0)
        scheduler.update_with_loss(losses, batch)

    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            run.clock.now += 1
            if batch.step == 60:
                run.model.arrays["w"][0] = np.nan
            under_way.append((batch, run.model.step(batch.indices, batch.lr)))
            if len(under_way) == 3:  # losses come back two steps late
                report()
        while under_way:
            report()
    assert [step for step, _ in run.rollbacks] == [60]
    assert fine(run)


# Backups ------------------------------------------------------------------------------------------


def test_a_full_ring_is_filled_again_and_again_in_the_same_memory():
    run, seen = Run(7, backup_every=5), []
    ring = run.scheduler._safety.backups.ring

    def before(step):
        # Arrays of one size may swap their buffers.
        seen.append({array.ctypes.data for slot in ring._slots for array in slot.copy.tree.values()})

    run.go(before=before)
    assert len(run.ear.of(BackupTaken)) > 30
    assert len(set.union(*seen)) <= 4 * len(run.model.arrays)


@pytest.mark.parametrize("every", [1, 7, 50])
def test_backup_every_n_steps_means_n_however_long_a_backup_takes(every):
    def state():
        run.clock.now += 3.0  # a step takes one second
        return run.model.arrays

    run = Run(8, backup_every=every, state_callback=state)
    run.go()
    assert [event.step for event in run.ear.of(BackupTaken)] == list(range(0, STEPS + 1, every))[
        : -(-STEPS // every) + 1
    ]


# Disk ---------------------------------------------------------------------------------------------


def test_where_ram_has_nothing_the_newest_checkpoint_older_than_the_fault_is_used(tmp_path):
    def save(state, path):
        run.model.save(state, path)

    run = Run(9, state_callback=None, checkpoint_dir=tmp_path, checkpoint_every=30, save_callback=save)
    run.go(before=poison_at(run, 100))
    (event,) = run.ear.of(RolledBack)
    assert (event.step, event.to_step) == (101, 90)
    assert str(tmp_path) in event.source
    assert fine(run)


def test_another_runs_checkpoints_in_the_same_directory_are_never_loaded(tmp_path):
    other = Run(10, state_callback=None, checkpoint_dir=tmp_path)
    other.scheduler._saver._args.save  # noqa: B018 - it has none
    other = R8Scheduler(
        SAMPLES, BATCH, num_epochs=1, ui="off", checkpoint_dir=tmp_path, save_callback=lambda path: None
    )
    other.save_checkpoint()
    other.close()
    run = Run(10, state_callback=None, checkpoint_dir=tmp_path, save_callback=lambda path: None)
    with pytest.raises(TrainingDiverged):
        run.go(before=poison_at(run, 100))
    assert run.rollbacks == []


# Bad samples --------------------------------------------------------------------------------------


def test_a_corrupted_sample_is_quarantined_left_out_and_stays_so_after_a_resume():
    run = Run(11)
    run.model.x[77] = np.inf

    def batches_with_77(run):
        return [e.step for e in run.ear.of(SpikeSeen) if 77 in e.indices]

    run.go()
    (event,) = run.ear.of(SampleQuarantined)
    assert event.indices == (77,)
    assert len(batches_with_77(run)) == 1
    assert run.scheduler.catalog.left_out.tolist() == [77]
    assert run.scheduler.catalog.suspects(1).tolist() == [77]
    assert run.scheduler.catalog.uses[77] == 0
    again = Run(11, num_epochs=EPOCHS + 2)
    again.model.x[77] = np.inf
    again.scheduler.load_state_dict(run.scheduler.state_dict())
    seen = set()
    for _ in again.scheduler.epoch_iterator():
        for batch in again.scheduler.batch_iterator():
            seen.update(batch.indices.tolist())
            again.scheduler.update_with_loss(np.ones(len(batch.indices)))
    assert seen == set(range(SAMPLES)) - {77}


# Several ranks ------------------------------------------------------------------------------------


class World:
    """Ranks as threads."""

    def __init__(self, size):
        self.size, self.parts = size, [None] * size
        self.barrier = threading.Barrier(size, timeout=20)

    def gather(self, rank):
        def all_gather(array):
            self.parts[rank] = array
            self.barrier.wait()
            everything = np.concatenate(self.parts)
            self.barrier.wait()
            return everything

        return all_gather


def run_ranks(body, size=2):
    world, outcomes = World(size), [None] * size

    def work(rank):
        try:
            outcomes[rank] = body(rank, world.gather(rank))
        except BaseException as error:
            outcomes[rank] = error
            world.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return outcomes


@pytest.mark.parametrize("fails", [False, True], ids=["", "load_callback fails once on one rank"])
def test_ranks_take_the_same_backups_and_go_back_to_the_same_step(fails):
    def body(rank, all_gather):
        calls = []

        def load(source):
            calls.append(rank)
            if fails and rank == 1 and len(calls) == 1:
                raise OSError("this rank only")
            run.model.load(source)

        run = Run(12, rank=rank, world_size=2, all_gather=all_gather, load_callback=load)

        def before(step):
            run.clock.now += 5 * rank  # their clocks differ
            if rank == 0 and step == 70:
                run.model.arrays["w"][0] = np.nan

        run.go(before=before)
        return [event.step for event in run.ear.of(BackupTaken)], run.rollbacks, len(calls)

    first, second = run_ranks(body)
    assert first == second
    assert [step for step, _ in first[1]] == [70]
    assert first[2] == 1 + fails


# Nothing wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["digits, batch 64, warm restarts", "cancer, batch 8, dropout", "linear, noiseless, batch 32"]
)
def test_ordinary_trainings_are_left_alone(name):
    torch.set_num_threads(1)
    heard = clean_runs.train(clean_runs.RECIPES[name], seed=0, epochs=20)
    assert heard.spikes == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_ordinary_trainings_are_left_alone():
    torch.set_num_threads(1)
    found = {row["training"]: row["rollbacks"] for row in clean_runs.rows(1)}  # what is only told leaves a run alone
    assert len(found) >= 20
    assert {name for name, rollbacks in found.items() if rollbacks} == set()


def test_the_divergence_example_ends_as_well_as_the_clean_run():
    done = subprocess.run(
        [sys.executable, "examples/divergence.py", "--quick"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()[1:4]}
    accuracy = {name: float(rows[name][1].rstrip("%")) for name in ("clean", "protected")}
    assert rows["unprotected"][2] == "nan"
    assert accuracy["protected"] >= accuracy["clean"] - 0.5
    assert rows["protected"][4] == "123"


class TwoMinds(Uniform):
    """Blind, but says that it has changed its mind at the 8th epoch."""

    epochs = 0

    def pop_decisions(self):
        self.epochs += 1
        return [("harder", "because", 1.0)] if self.epochs == 8 else []


@pytest.mark.parametrize("announced", [True, False])
def test_a_change_of_strategy_may_change_the_loss(announced):
    run = Run(1, strategy=TwoMinds() if announced else Uniform())
    at = 7 * PER_EPOCH
    level = 0.1

    def report(step, losses):
        return losses + (8 * level if step >= at else 0.0)

    run.go(report)
    assert (run.ear.of(SpikeSeen) == []) is announced


# State --------------------------------------------------------------------------------------------


def leaves(state, path=()):
    for name, value in state.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))


def damaged(state, path, how):
    state = copy.deepcopy(state)
    at = state
    for name in path[:-1]:
        at = at[name]
    if how == "missing":
        del at[path[-1]]
    else:
        at[path[-1]] = how
    return state


@pytest.mark.parametrize("how", ["missing", ["x"], {}, "junk"], ids=str)
def test_a_damaged_state_is_refused_as_a_whole(how):
    net = Run(3).go().scheduler._safety
    other = Run(4)
    other.go(before=poison_at(other, 50))
    good, before = other.scheduler._safety.state_dict(), str(net.state_dict())
    refused = 0
    for path in leaves(good):
        try:
            net.load_state_dict(damaged(good, path, how))
        except (KeyError, TypeError, ValueError, AttributeError):
            refused += 1
            assert str(net.state_dict()) == before, path
        else:  # an empty list may well be right
            before = str(net.state_dict())
    assert refused >= 30
