"""A run restored from disk goes on as if nothing had happened: model, order, rates, catalog."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from learnit_r8 import CheckpointError, ConfigError, R8Scheduler, events
from learnit_r8.sinks import read_events
from learnit_r8.strategies import Prioritized

ROOT = Path(__file__).resolve().parents[2]


class Model:
    """Logistic regression by SGD on its own rows: every sample and every rate leaves its mark."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.x = rng.normal(size=(60, 4))
        self.y = np.sign(self.x @ [1.0, -2.0, 0.5, 0.0] + rng.normal(size=60))
        self.w = np.zeros(4)

    def step(self, indices, lr):
        margin = self.y[indices] * (self.x[indices] @ self.w)
        losses = np.log1p(np.exp(-margin))
        self.w = self.w + lr * (self.y[indices] / (1 + np.exp(margin))) @ self.x[indices] / len(indices)
        return losses

    def save(self, state_dict, filepath):
        np.save(filepath + ".npy", self.w)

    def load(self, source, from_ram=False):
        self.w = np.array(source["w"]) if from_ram else np.load(source + ".npy")

    def state(self):
        return {"w": self.w}


def make(model, directory, **more):
    settings = {"num_epochs": 6, "initial_lr": 0.5, "seed": 3, "use_curses": False, "checkpoint_dir": directory}
    return R8Scheduler(60, 7, save_callback=model.save, load_callback=model.load, **(settings | more))


def train(scheduler, model, *, scalar=False, stop=None, log=None):
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            losses = model.step(batch.indices, batch.lr)
            if log is not None:
                log.append((batch.epoch, batch.step, batch.indices.tolist(), batch.lr))
            scheduler.update_with_loss(float(losses.mean()) if scalar else losses)
            if scheduler.global_step == stop:
                return scheduler
    return scheduler


CATALOG = ("expected_loss", "variance", "uses", "last_seen", "mean_loss")


def assert_same_end(scheduler, model, reference, reference_model):
    np.testing.assert_array_equal(model.w, reference_model.w)
    for name in CATALOG:
        np.testing.assert_array_equal(getattr(scheduler.catalog, name), getattr(reference.catalog, name))
    assert scheduler.global_step == reference.global_step
    assert scheduler.current_epoch == reference.current_epoch


@pytest.mark.parametrize("stop", [1, 8, 9, 10, 26, 27, 53])  # an epoch has 9 batches
@pytest.mark.parametrize("strategy", ["uniform", "quadrant"])
@pytest.mark.parametrize("scalar", [False, True])
def test_a_run_resumed_from_disk_ends_with_the_same_bits(scalar, strategy, stop, tmp_path):
    reference_model = Model()
    log = []
    reference = train(make(reference_model, None, strategy=strategy), reference_model, scalar=scalar, log=log)
    model = Model()
    first = train(make(model, tmp_path, strategy=strategy), model, scalar=scalar, stop=stop)
    path = first.save_checkpoint()
    resumed_model, rest = Model(), []
    resumed = R8Scheduler.resume_from_checkpoint(path, resumed_model.save, resumed_model.load)
    assert resumed.global_step == stop
    train(resumed, resumed_model, scalar=scalar, log=rest)
    assert rest == log[stop:]
    assert_same_end(resumed, resumed_model, reference, reference_model)


def test_loading_into_a_running_scheduler_goes_back(tmp_path):
    model, log, again = Model(), [], []
    scheduler = make(model, tmp_path)
    path = train(scheduler, model, stop=20).save_checkpoint()
    train(scheduler, model, stop=40, log=log)
    scheduler.load_checkpoint(path)
    assert scheduler.global_step == 20
    train(scheduler, model, stop=40, log=again)
    assert again == log


def test_loading_amid_the_loop_goes_back_without_leaving_it(tmp_path):
    model = Model()
    scheduler = make(model, tmp_path, num_epochs=3)
    steps = []
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            steps.append(batch.step)
            scheduler.update_with_loss(model.step(batch.indices, batch.lr))
            if batch.step == 10 and steps.count(10) == 1:
                path = scheduler.save_checkpoint()
            if batch.step == 15 and steps.count(15) == 1:
                scheduler.load_checkpoint(path)
    assert steps == [*range(16), *range(11, 27)]
    np.testing.assert_array_equal(scheduler.catalog.uses, 3)


def test_the_configuration_comes_from_the_checkpoint_and_goals_may_change(tmp_path):
    model = Model()
    first = make(model, tmp_path, checkpoint_every=4, keep_checkpoints=2, strategy="uniform", min_lr=1e-3)
    train(first, model, stop=12)
    resumed = R8Scheduler.resume_from_checkpoint(tmp_path, model.save, model.load, num_epochs=8, use_curses=False)
    assert resumed.total_steps == 72
    assert resumed.strategy.name == "uniform"
    config = resumed.state_dict()["config"]
    assert (config["checkpoint_every"], config["keep_checkpoints"], config["min_lr"]) == (4, 2, 1e-3)
    assert config["checkpoint_dir"] == str(tmp_path)
    train(resumed, model)
    np.testing.assert_array_equal(resumed.catalog.uses, 8)


def test_a_finished_run_goes_on_with_more_epochs(tmp_path):
    model = Model()
    path = train(make(model, tmp_path, num_epochs=2), model).save_checkpoint(is_final=True)
    same = R8Scheduler.resume_from_checkpoint(path, model.save, model.load)
    assert list(same.epoch_iterator()) == []
    more = R8Scheduler.resume_from_checkpoint(path, model.save, model.load, num_epochs=3)
    log = []
    train(more, model, log=log)
    assert [epoch for epoch, *_ in log] == [2] * 9
    np.testing.assert_array_equal(more.catalog.uses, 3)


def test_epochs_may_become_seconds(tmp_path):
    model = Model()
    path = train(make(model, tmp_path), model, stop=5).save_checkpoint()
    resumed = R8Scheduler.resume_from_checkpoint(path, model.save, model.load, train_duration_seconds=1000.0)
    assert resumed.total_steps is None
    train(resumed, model, stop=9)
    np.testing.assert_array_equal(resumed.catalog.uses, 1)


@pytest.mark.parametrize("batch_size", [1, 5, 30, 100])
def test_the_batch_size_may_change_amid_an_epoch(batch_size, tmp_path):
    model = Model()
    path = train(make(model, tmp_path), model, stop=11).save_checkpoint()
    resumed = R8Scheduler.resume_from_checkpoint(path, model.save, model.load, batch_size=batch_size)
    log = []
    train(resumed, model, log=log)
    assert max(len(indices) for *_, indices, _ in log) <= max(batch_size, 7)
    np.testing.assert_array_equal(resumed.catalog.uses, 6)


def test_a_bad_goal_is_refused_with_all_problems(tmp_path):
    model = Model()
    path = train(make(model, tmp_path), model, stop=3).save_checkpoint()
    with pytest.raises(ConfigError) as caught:
        R8Scheduler.resume_from_checkpoint(path, model.save, 5, num_epochs=0, initial_lr=-1)
    assert len(caught.value.problems) == 3
    with pytest.raises(ConfigError, match="seed: the state was saved with 3"):
        R8Scheduler.resume_from_checkpoint(path, model.save, model.load, seed=4)


class Alternating:
    """A user's strategy: no state but what the request tells."""

    def draw(self, request):
        order = request.streams.at(request.purpose, request.epoch).permutation(request.num_samples)
        return order[request.cursor * 7 : request.cursor * 7 + request.size]


class Counting(Alternating):
    """A user's strategy with a state of its own."""

    def __init__(self):
        self.drawn = 0

    def draw(self, request):
        self.drawn += 1
        return np.sort(super().draw(request)) if self.drawn % 2 else super().draw(request)

    def state_dict(self):
        return {"drawn": self.drawn}

    def load_state_dict(self, state):
        self.drawn = state["drawn"]


@pytest.mark.parametrize("strategy", [Alternating, Counting])
def test_a_strategy_and_a_schedule_of_the_users_own_are_given_again(strategy, tmp_path):
    def shape(progress):
        return 1 - progress / 2

    def arguments():
        return {"strategy": strategy(), "scheduler_mode": shape}

    model, log, rest = Model(), [], []
    reference_model = Model()
    reference = train(make(reference_model, None, **arguments()), reference_model, log=log)
    path = train(make(model, tmp_path, **arguments()), model, stop=13).save_checkpoint()
    with pytest.raises(ConfigError) as caught:
        R8Scheduler.resume_from_checkpoint(path, model.save, model.load)
    assert [problem.split(": the run had one of your own")[0] for problem in caught.value.problems] == list(arguments())
    resumed = R8Scheduler.resume_from_checkpoint(path, model.save, model.load, **arguments())
    train(resumed, model, log=rest)
    assert rest == log[13:]
    assert_same_end(resumed, model, reference, reference_model)


def test_the_learning_rate_is_known_before_the_first_batch(tmp_path):
    model, log = Model(), []
    scheduler = make(model, tmp_path)
    first = scheduler.lr
    path = train(scheduler, model, stop=13, log=log).save_checkpoint()
    assert first == log[0][-1] > 0
    resumed = R8Scheduler.resume_from_checkpoint(path, model.save, model.load)
    next_one = resumed.lr
    train(resumed, model, log=log)
    assert next_one == log[13][-1] > 0


def test_a_built_in_strategy_with_settings_of_its_own_is_given_again_too(tmp_path):
    model = Model()
    path = train(make(model, tmp_path, strategy=Prioritized(alpha=1.0)), model, stop=13).save_checkpoint()
    with pytest.raises(ConfigError, match=r"strategy: the run had one of your own \(prioritized\)"):
        R8Scheduler.resume_from_checkpoint(path, model.save, model.load)
    resumed = R8Scheduler.resume_from_checkpoint(path, model.save, model.load, strategy=Prioritized(alpha=1.0))
    again = train(resumed, model, stop=20).save_checkpoint()
    with pytest.raises(ConfigError, match="strategy: the run had one"):
        R8Scheduler.resume_from_checkpoint(again, model.save, model.load)


# Which checkpoint ------------------------------------------------------------------------------


def test_a_directory_means_its_newest_checkpoint_and_an_empty_one_is_not_found(tmp_path):
    model = Model()
    scheduler = make(model, tmp_path / "c")
    for place in (tmp_path / "c", tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError):
            R8Scheduler.resume_from_checkpoint(place, model.save, model.load)
    for stop in (5, 15, 10**9):
        train(scheduler, model, stop=stop)
        scheduler.save_checkpoint()
    assert R8Scheduler.resume_from_checkpoint(tmp_path / "c", model.save, model.load).global_step == 54


@pytest.mark.parametrize("resumed", [False, True])
def test_a_damaged_newest_checkpoint_is_passed_over_and_that_is_heard(resumed, tmp_path):
    model = Model()
    scheduler = make(model, tmp_path)
    for stop in (5, 15):
        path = train(scheduler, model, stop=stop).save_checkpoint()
    victim = max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    heard = []

    class Ear:
        def record(self, event):
            heard.append(event)

    def load():
        fresh = make(model, tmp_path, sinks=[Ear()])
        fresh.load_checkpoint(tmp_path)
        return fresh

    def resume():
        return R8Scheduler.resume_from_checkpoint(tmp_path, model.save, model.load, log_dir=tmp_path)

    with pytest.warns(RuntimeWarning, match="a checkpoint is passed over: .* is damaged.*it is now step-.*corrupt"):
        fresh = (resume if resumed else load)()
    assert fresh.global_step == 5
    if resumed:
        train(fresh, model)
        fresh.close()
        heard = list(read_events(tmp_path / "events.jsonl"))  # which did not exist when the checkpoint was loaded
    assert [event.reason for event in heard if isinstance(event, events.CheckpointFailed)]
    assert [event.step for event in heard if isinstance(event, events.CheckpointLoaded)] == [5]


def test_a_damaged_checkpoint_that_was_named_is_refused_and_the_run_is_as_it_was(tmp_path):
    model = Model()
    scheduler = make(model, tmp_path)
    path = train(scheduler, model, stop=5).save_checkpoint()
    train(scheduler, model, stop=9)
    (path / "state.json").write_text("{}")
    weights = model.w.copy()
    with pytest.raises(CheckpointError):
        scheduler.load_checkpoint(path)
    assert scheduler.global_step == 9
    np.testing.assert_array_equal(model.w, weights)
    train(scheduler, model)
    np.testing.assert_array_equal(scheduler.catalog.uses, 6)


def test_a_load_callback_that_fails_leaves_the_run_as_it_was(tmp_path):
    model = Model()
    path = train(make(model, tmp_path), model, stop=5).save_checkpoint()

    def load(source, from_ram=False):
        raise OSError("the disk is gone")

    fresh = R8Scheduler(60, 7, num_epochs=6, seed=3, use_curses=False, checkpoint_dir=tmp_path, load_callback=load)
    with pytest.raises(OSError, match="the disk is gone"):
        fresh.load_checkpoint(path)
    assert fresh.global_step == 0
    assert fresh.catalog.num_seen == 0


def test_a_load_callback_that_fails_takes_no_open_batch_and_no_backup_away(tmp_path):
    model = Model()
    path = train(make(model, tmp_path), model, stop=5).save_checkpoint()

    def load(source, from_ram=False):
        if not from_ram:
            raise OSError("the disk is gone")
        model.load(source, from_ram)

    running = R8Scheduler(60, 7, num_epochs=6, use_curses=False, checkpoint_dir=tmp_path, seed=3, load_callback=load)
    batch = next(iter(running.batch_iterator()))
    running.update_cpu_backup(model.state())
    with pytest.raises(OSError, match="the disk is gone"):
        running.load_checkpoint(path)
    assert running.open_batches == (batch,)
    assert running.update_with_loss(math.nan).rolled_back


@pytest.mark.parametrize("wrong", [{}, [1], "x"], ids=str)
@pytest.mark.parametrize(
    "part", ["config", "epoch", "stage", "budget", "tickets", "chooser", "catalog", "guard", "safety"]
)
def test_a_state_with_a_damaged_part_is_refused_and_the_run_goes_on_as_it_was(part, wrong, tmp_path):
    runs = []
    for _ in range(2):
        model = Model()
        scheduler = make(model, tmp_path, strategy="spaced", noise_guard="cap")
        early = train(scheduler, model, stop=5).state_dict()
        train(scheduler, model, stop=21)
        runs.append((scheduler, model))
    with pytest.raises(ConfigError, match="the state is damaged"):
        runs[0][0].load_state_dict(early | {part: wrong})
    for scheduler, model in runs:
        train(scheduler, model)
    (tried, model), (never, other) = runs
    np.testing.assert_array_equal(tried.catalog.uses, never.catalog.uses)
    np.testing.assert_array_equal(model.w, other.w)


@pytest.mark.parametrize(("every", "steps"), [("epoch", [9, 18, 27]), (10, [10, 20, 27]), (9, [9, 18, 27]), (None, [])])
def test_checkpoints_are_written_at_their_cadence(every, steps, tmp_path):
    heard = []

    class Ear:
        def record(self, event):
            if isinstance(event, events.CheckpointSaved):
                heard.append(event.step)

    model = Model()
    train(make(model, tmp_path / "c", num_epochs=3, checkpoint_every=every, sinks=[Ear()]), model)
    assert heard == steps
    assert (tmp_path / "c").exists() == bool(steps)


def test_the_model_and_the_state_of_a_checkpoint_belong_together(tmp_path):
    model = Model()
    first = make(model, tmp_path, checkpoint_every=5, keep_checkpoints=100)
    seen = {}
    for _ in first.epoch_iterator():
        for batch in first.batch_iterator():
            seen[batch.step] = model.w.copy()
            first.update_with_loss(model.step(batch.indices, batch.lr))
    checkpoints = [path for path in tmp_path.iterdir() if path.is_dir() and not path.is_symlink()]
    assert len(checkpoints) == 11  # the last state too
    seen[54] = model.w
    for path in checkpoints:
        other = Model()
        resumed = R8Scheduler.resume_from_checkpoint(path, other.save, other.load)
        np.testing.assert_array_equal(other.w, seen[resumed.global_step])


# A process that is killed ----------------------------------------------------------------------

SCRIPT = """
import sys, time
import numpy as np
from learnit_r8 import R8Scheduler

directory, slow = sys.argv[1], float(sys.argv[2])
weights = np.zeros(1)

def save(state_dict, filepath):
    np.save(filepath + ".npy", weights)

def load(source, from_ram=False):
    weights[:] = np.load(source + ".npy")

goals = dict(checkpoint_every=3, keep_checkpoints=2, use_curses=False)
try:
    scheduler = R8Scheduler.resume_from_checkpoint(directory, save, load, **goals)
except FileNotFoundError:
    goals |= dict(num_epochs=5, checkpoint_dir=directory, save_callback=save, load_callback=load)
    scheduler = R8Scheduler(64, 8, **goals)
print("start", scheduler.global_step, flush=True)
for epoch in scheduler.epoch_iterator():
    for batch in scheduler.batch_iterator():
        weights += np.sum(batch.indices * batch.lr)
        time.sleep(slow)
        scheduler.update_with_loss(np.cos(batch.indices * 1.7) / (1 + batch.epoch))
        print("step", batch.step, flush=True)
print("end", weights[0].hex(), scheduler.catalog.expected_loss.tobytes().hex(), scheduler.catalog.uses.tolist())
"""


def start(directory, slow):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(directory), str(slow)],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path):
    reference = start(tmp_path / "whole", 0).communicate(timeout=60)[0].splitlines()[-1]
    starts = []
    for kill_at in (7, 14, 26):  # the checkpoint before the one that is being written is on the disk
        process = start(tmp_path / "killed", 0.002)
        starts.append(int(process.stdout.readline().split()[1]))
        for line in process.stdout:
            if line.startswith("step") and int(line.split()[1]) >= kill_at:
                break
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    out = start(tmp_path / "killed", 0).communicate(timeout=60)[0].splitlines()
    assert starts[0] == 0
    assert starts[1] >= 3
    assert out[-1].startswith("end ")
    assert out[-1] == reference


# Losses that are not finite --------------------------------------------------------------------


def test_a_run_with_a_rollback_before_the_save_resumes_to_the_same_bits(tmp_path):
    def run(scheduler, model, stop=None):
        for _ in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                if batch.step == 0:
                    scheduler.update_cpu_backup(model.state())
                losses = model.step(batch.indices, batch.lr)
                scheduler.update_with_loss(math.nan if batch.step == 6 else losses)
                if scheduler.global_step == stop:
                    return scheduler
        return scheduler

    reference_model, model = Model(), Model()
    reference = run(make(reference_model, None), reference_model)
    path = run(make(model, tmp_path), model, stop=20).save_checkpoint()
    resumed = R8Scheduler.resume_from_checkpoint(path, model.save, model.load)
    run(resumed, model)
    assert_same_end(resumed, model, reference, reference_model)


def test_groups_come_from_the_checkpoint_and_may_be_given_anew(tmp_path):
    classes = np.arange(400) % 4
    wrong = (np.arange(400) % 9 == 0) & (classes < 3)

    def train(scheduler, epochs=None):
        drawn = []
        with scheduler:
            for epoch in scheduler.epoch_iterator():
                for batch in scheduler.batch_iterator():
                    settled = np.where(wrong[batch.indices] | (classes[batch.indices] == 3), 3.0, 0.5)
                    scheduler.update_with_loss(settled if epoch else np.full(len(settled), np.log(4)))
                    drawn.append(batch.indices.tolist())
                if epoch == epochs:
                    scheduler.save_checkpoint()
                    break
        return drawn

    def make(folder):
        return R8Scheduler(400, 16, num_epochs=12, groups=classes - 2**40, checkpoint_dir=tmp_path / folder, ui="off")

    head = train(make("run"), epochs=0)
    with R8Scheduler.resume_from_checkpoint(tmp_path / "run") as resumed:
        tail = train(resumed)
        assert np.array_equal(resumed.noise_guard.flagged, wrong)
    assert head + tail == train(make("other"))
    with R8Scheduler.resume_from_checkpoint(tmp_path / "run", groups=None) as resumed:
        train(resumed)
        assert resumed.noise_guard.flagged[classes == 3].all()
    with pytest.raises(ConfigError, match="groups must hold one whole number"):
        R8Scheduler.resume_from_checkpoint(tmp_path / "run", num_samples=401)
