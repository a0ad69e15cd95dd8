"""Checkpoints are finished by a thread while training goes on: what they hold, when they count, who hears of it."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from benchmarks.fault_fs import same
from learnit_r8 import BackgroundSave, Checkpoints, R8Scheduler, events
from learnit_r8.checkpoint import CheckpointStore, FileSystem, resolve

ROOT = Path(__file__).resolve().parents[2]


class Gate:
    """Holds every fsync of the writer's thread until it is opened."""

    def __init__(self, monkeypatch):
        self.open, self.waiting = threading.Event(), threading.Event()
        sync = FileSystem.sync

        def held(fs, file):
            if threading.current_thread().name == "r8-save":
                self.waiting.set()
                assert self.open.wait(30)
            sync(fs, file)

        monkeypatch.setattr(FileSystem, "sync", held)


class Ear:
    def __init__(self):
        self.heard = []

    def record(self, event):
        self.heard.append(event)

    def of(self, kind):
        return [event for event in self.heard if isinstance(event, kind)]


class Model:
    """Weights that each step changes, saved by a function that reads them where they are."""

    def __init__(self):
        self.weights = np.zeros(1000)

    def step(self, batch):
        self.weights += batch.lr * (1.0 + batch.indices[0])
        return np.full(len(batch.indices), 1.0 / (1.0 + batch.step)) + 0.01 * batch.indices * batch.weights.clip(1, 1)

    def save(self, path):
        write_array(self.weights, path)

    def load(self, path):
        self.weights = np.load(path)


def write_array(array, path):
    with open(path, "wb") as file:
        np.save(file, array)


def make(model, **more):
    options = {
        "num_epochs": 2,
        "checkpoint_every": 4,
        "keep_checkpoints": 100,
        "ui": "off",
        "strategy": "spaced",
    } | more
    options = {"save_callback": model.save, "load_callback": model.load} | options
    return R8Scheduler(100, 10, checkpoint_dir="runs", **options)


def train(scheduler, model, stop=None, seen=None):
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            scheduler.update_with_loss(model.step(batch))
            if seen is not None:
                seen[scheduler.global_step] = scheduler.state_dict(), model.weights.copy()
            if scheduler.global_step == stop:
                return


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def saved_steps():
    return [entry.manifest.step for entry in reversed(CheckpointStore("runs").entries())]


@pytest.mark.parametrize("background", [False, True])
def test_what_is_written_late_is_the_state_of_the_boundary(monkeypatch, background):
    gate, model, seen = Gate(monkeypatch), Model(), {}
    options = {}
    if background:
        options = {"save_callback": BackgroundSave(lambda: model.weights, write_array)}
    with make(model, **options) as scheduler:
        loop = iter(scheduler.batch_iterator())
        for _ in range(7):
            batch = next(loop)
            scheduler.update_with_loss(model.step(batch))
            seen[scheduler.global_step] = scheduler.state_dict(), model.weights.copy()
        assert gate.waiting.wait(30)
        assert saved_steps() == []  # three steps later it is still being written
        gate.open.set()
    found = {entry.manifest.step: entry.path for entry in CheckpointStore("runs").entries()}
    loaded = resolve(found[4])
    state, weights = seen[4]
    np.testing.assert_array_equal(np.load(loaded.model_path), weights)
    del state["budget"], loaded.state["budget"]  # seconds
    for name in state:
        if name != "tickets":  # a batch is out where a boundary saves
            assert same(_plain(state[name]), _plain(loaded.state[name])), name


def _plain(tree):
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_plain(value) for value in tree]
    return np.asarray(tree).tolist() if isinstance(tree, (np.ndarray, np.generic)) else tree


def test_no_due_checkpoint_is_missing_and_a_resumed_run_ends_alike():
    whole, first, second = Model(), Model(), Model()
    with make(whole, checkpoint_every=None) as scheduler:
        train(scheduler, whole)
    with make(first) as scheduler:
        train(scheduler, first, stop=11)
    assert saved_steps() == [4, 8, 11]
    with R8Scheduler.resume_from_checkpoint(
        resolve("runs").path.parent / "step-000000008", second.save, second.load, ui="off"
    ) as scheduler:
        train(scheduler, second)
    np.testing.assert_array_equal(second.weights, whole.weights)


def test_a_failure_of_the_writer_is_told_and_the_next_one_is_written(monkeypatch):
    sync, failed = FileSystem.sync, []

    def fails_once(fs, file):
        if threading.current_thread().name == "r8-save" and not failed:
            failed.append(file.name)
            raise OSError(28, os.strerror(28))
        sync(fs, file)

    monkeypatch.setattr(FileSystem, "sync", fails_once)
    ear, model = Ear(), Model()
    said = r"not saved, training goes on: no checkpoint of step 4 .*free some space"
    with pytest.warns(RuntimeWarning, match=said), make(model, sinks=[ear]) as scheduler:
        train(scheduler, model)
    assert saved_steps() == [8, 12, 16, 20]
    (told,) = ear.of(events.CheckpointFailed)
    assert told.step == 4
    assert [event.step for event in ear.of(events.CheckpointSaved)] == [8, 12, 16, 20]
    assert not list(Path("runs").glob(".tmp*"))


def test_who_leaves_the_loop_finds_what_was_due(monkeypatch):
    gate, model = Gate(monkeypatch), Model()
    scheduler = make(model, checkpoint_every=4)
    threading.Timer(0.2, gate.open.set).start()
    train(scheduler, model, stop=5)
    assert saved_steps() == [4]
    assert resolve("runs").step == 4
    scheduler.close()


def test_a_metric_that_is_logged_while_its_checkpoint_is_written_counts(monkeypatch):
    gate, model = Gate(monkeypatch), Model()
    losses = iter([3.0, 1.0, 2.0, 4.0, 5.0])
    policy = Checkpoints(dir="runs", every="epoch", keep=2, keep_best="val_loss")
    with R8Scheduler(100, 10, num_epochs=5, checkpoints=policy, save_callback=model.save, ui="off") as scheduler:
        for epoch in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                scheduler.update_with_loss(model.step(batch))
            scheduler.log(val_loss=next(losses))
            if epoch == 1:
                gate.open.set()
            elif epoch == 0:
                threading.Timer(0.2, gate.open.set).start()
    assert saved_steps() == [20, 40, 50]


PROGRAM = """
import numpy as np, sys
from learnit_r8 import R8Scheduler
s = R8Scheduler(100, 10, num_epochs=2, checkpoint_dir="runs", checkpoint_every=7, ui="off",
                save_callback=lambda path: open(path, "wb").write(bytes(40_000_000)) and None)
for epoch in s.epoch_iterator():
    for batch in s.batch_iterator():
        s.update_with_loss(1.0)
        if s.global_step == 8:
            sys.exit(3)
"""


def test_a_program_that_ends_at_once_waits_for_the_writer():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=os.getcwd(), env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 3
    assert saved_steps() == [7, 8]
    assert resolve("runs").model_path.stat().st_size == 40_000_000


def test_a_background_save_takes_two_functions():
    with pytest.raises(TypeError, match="needs two functions"):
        BackgroundSave("model", np.save)


def test_a_background_save_that_fails_is_told():
    def write(copy, path):
        raise ValueError("no room for the model")

    model = Model()
    save = BackgroundSave(lambda: model.weights, write)
    said = "save callback raised ValueError: no room for the model"
    with (
        pytest.warns(RuntimeWarning, match=said),
        make(model, save_callback=save, checkpoint_every=15) as scheduler,
    ):
        train(scheduler, model, stop=16)
    assert saved_steps() == []


class ThrownError(Exception):
    pass


def throw(scheduler, model, at):
    with scheduler:
        for _ in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                losses = model.step(batch)
                if scheduler.global_step == at:
                    model.weights[:500] = 7.0
                    raise ThrownError
                scheduler.update_with_loss(losses)


def broken_off(model, at, **options):
    """Train with backups in RAM; an exception throws the run out of a step that has half-changed the model."""
    back = {"state_callback": lambda: model.weights, "load_callback": model.restore, "recovery": "report"}
    scheduler = make(model, **({"checkpoint_every": "epoch"} | back | options))
    with pytest.raises(ThrownError) as caught:
        throw(scheduler, model, at)
    return " ".join(caught.value.__notes__)


class Restored(Model):
    def restore(self, source):
        self.weights[:] = np.load(source) if isinstance(source, str) else source


@pytest.mark.parametrize("at", [6, 15])
def test_a_broken_off_step_saves_the_last_whole_boundary_out_of_ram(at):
    whole, model, resumed = Restored(), Restored(), Restored()
    with make(whole, checkpoint_every=None) as scheduler:
        train(scheduler, whole)
    note = broken_off(model, at, backup_every=1)
    assert f"thrown out of step {at}, the model was put back as it was before; stopped after {at} steps, saved" in note
    assert saved_steps()[-1] == at
    with R8Scheduler.resume_from_checkpoint("runs", resumed.save, resumed.restore, ui="off") as scheduler:
        train(scheduler, resumed)
    np.testing.assert_array_equal(resumed.weights, whole.weights)


@pytest.mark.parametrize("rollback_data", ["skip", "replay"])
@pytest.mark.parametrize("at", [6, 17])
def test_what_was_trained_since_an_older_backup_comes_again_before_it_counts(at, rollback_data):
    whole, model, resumed = Restored(), Restored(), Restored()
    with make(whole, checkpoint_every=None, strategy="uniform") as scheduler:
        train(scheduler, whole)
    note = broken_off(model, at, backup_every=4, rollback_data=rollback_data, strategy="uniform")
    back = at - at % 4
    assert f"put back as it was after {back} steps, the newest backup in RAM, and the {at - back} batches" in note
    assert saved_steps()[-1] == back
    assert resolve("runs").state["global_step"] == back
    with R8Scheduler.resume_from_checkpoint("runs", resumed.save, resumed.restore, ui="off") as scheduler:
        train(scheduler, resumed)
    assert scheduler.global_step == 20
    np.testing.assert_array_equal(resumed.weights, whole.weights)


def test_what_an_earlier_epoch_learned_since_the_backup_is_lost_and_that_is_said():
    note = broken_off(Restored(), 12, backup_every=9, strategy="uniform", checkpoint_every=7)
    assert "put back as it was after 9 steps, the newest backup in RAM, and the 2 batches since come again; " in note
    assert "what it learned from 1 others since is lost; stopped after 10 steps, saved in" in note


def test_a_step_that_is_broken_off_without_backups_says_that_it_is_not_saved():
    note = broken_off(Restored(), 6, backup_every=None)
    assert "thrown out of step 6: the model may be trained halfway and is not saved, nor was anything before" in note
    assert saved_steps() == []


def test_a_backup_that_is_older_than_the_newest_checkpoint_is_of_no_use():
    note = broken_off(Restored(), 14, backup_every=40)
    assert "thrown out of step 14: the model may be trained halfway and is not saved" in note
    assert saved_steps() == [10]


FORKED = """
import os, sys, time
import numpy as np
from learnit_r8 import R8Scheduler
from learnit_r8.checkpoint import FileSystem
sync, codes = FileSystem.sync, []
def slow(fs, file):
    time.sleep(0.01)
    sync(fs, file)
FileSystem.sync = slow
save = lambda path: np.save(open(path, "wb"), np.zeros(3))
with R8Scheduler(40, 4, num_epochs=2, checkpoint_dir="runs", checkpoint_every=5, save_callback=save, ui="off") as run:
    for _ in run.epoch_iterator():
        for batch in run.batch_iterator():
            run.update_with_loss(1.0)
            if batch.step in (5, 10):  # while a save is under way
                child = os.fork()
                if child == 0 and batch.step == 5:
                    sys.exit(3)
                if child == 0:
                    raise OSError("the child's own")
                codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(codes, run.global_step)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on Windows")
def test_a_forked_child_that_leaves_the_loop_saves_nothing_and_waits_for_nothing():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[3, 1] 20\n"
    assert done.stderr.count("the child's own") == 1
    assert "[r8]" not in done.stderr
    assert saved_steps() == [10, 15, 20]


TRAINS_ON = """
import os
from learnit_r8 import R8Scheduler
save = lambda path: open(path, "w").close()
with R8Scheduler(40, 4, num_epochs=2, checkpoint_dir="runs", checkpoint_every=99, save_callback=save, ui="off") as run:
    for _ in run.epoch_iterator():
        for batch in run.batch_iterator():
            run.update_with_loss(1.0)
            if batch.step == 6 and (child := os.fork()):
                os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on Windows")
def test_a_forked_child_that_trains_on_says_once_that_nothing_of_it_is_saved():
    done = subprocess.run([sys.executable, "-c", TRAINS_ON], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.count("forked from the run's, at step 7, goes on with it, and saves nothing") == 1
    assert done.stderr.count("RuntimeWarning") == 1
    assert [path.name for path in Path("runs").glob("step-*")] == ["step-000000020"]
