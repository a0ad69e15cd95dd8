"""Checkpoints and logs in object stores: in memory, and in an S3 server whose connections break."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

from benchmarks.s3_outage import Outage, judge, s3_server
from learnit_r8 import CheckpointError, Checkpoints, ConfigError, R8Scheduler, events
from learnit_r8.checkpoint import open_store, resolve
from learnit_r8.checkpoint.remote import Remote
from learnit_r8.checkpoint.remote_store import RemoteStore
from learnit_r8.run.blocks import decode, each_event

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield fsspec.filesystem("memory")
    fsspec.filesystem("memory").store.clear()
    assert os.listdir(".") == []  # a URL never becomes a folder here


class Model:
    weights = 0.0

    def save(self, path):
        Path(path).mkdir()
        (Path(path) / "weights.json").write_text(json.dumps(self.weights))

    def load(self, path):
        self.weights = json.loads((Path(path) / "weights.json").read_text())


def train(model, scheduler, stop=None):
    with scheduler:
        for epoch in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                model.weights += batch.lr * float(batch.indices.sum())
                scheduler.update_with_loss(np.ones(len(batch.indices)))
                if scheduler.global_step == stop:
                    return
            scheduler.log(val_loss=abs(epoch - 1))


def begin(model, url, **more):
    options = {"num_epochs": 3, "ui": "off", "checkpoints": Checkpoints(dir=url, every="epoch", keep=2)} | more
    return R8Scheduler(64, 16, save_callback=model.save, load_callback=model.load, **options)


def fresh(url):
    """The store as another process sees it."""
    return RemoteStore(Remote(url))


def test_a_run_in_a_store_is_resumed_to_the_bit(memory):
    whole, first, second = Model(), Model(), Model()
    train(whole, begin(whole, "memory://whole"))
    train(first, begin(first, "memory://runs/one"), stop=9)
    scheduler = R8Scheduler.resume_from_checkpoint("memory://runs/one", second.save, second.load, ui="off")
    assert scheduler.global_step == 9
    train(second, scheduler)
    assert second.weights == whole.weights
    assert [e.manifest.step for e in fresh("memory://runs/one").entries()] == [12, 9]
    assert {name.split("/")[3].split("-r")[0] for name in memory.find("/runs/one") if "/step" in name} == {
        "step-000000009",
        "step-000000012",
    }


def test_paths_are_urls_again_when_they_come_back():
    model, told = Model(), []
    scheduler = begin(
        model, Path("memory://runs/two"), sinks=[type("Ear", (), {"record": lambda _, e: told.append(e)})()]
    )
    train(model, scheduler, stop=5)
    path = resolve("memory://runs/two")
    (saved, *_) = [event for event in told if isinstance(event, events.CheckpointSaved)]
    assert saved.path.startswith("memory://runs/two/step-000000004-r")
    again = R8Scheduler.resume_from_checkpoint(saved.path, model.save, model.load, ui="off")
    assert again.global_step == 4
    written = again.save_checkpoint(name="mine")
    assert str(written).startswith("memory://runs/two/step-000000004")
    assert str(written / "model").endswith("-mine/model")
    again.close()
    assert resolve(written).state["global_step"] == 4
    assert path.step == 5


def test_a_store_belongs_to_its_runs():
    one, two = Model(), Model()
    train(one, begin(one, "memory://shared"))
    train(two, begin(two, "memory://shared", num_epochs=4))
    runs = {}
    for entry in fresh("memory://shared").entries():
        runs.setdefault(entry.manifest.run, []).append(entry.manifest.step)
    assert list(runs.values()) == [[16, 12], [12, 8]]
    scheduler = begin(Model(), "memory://shared")  # it begins, and dies before its first checkpoint
    next(iter(scheduler.batch_iterator()))
    with pytest.raises(FileNotFoundError, match="the run that began last in memory://shared has saved nothing"):
        resolve("memory://shared")
    scheduler.close()


def test_the_best_and_the_named_stay():
    model = Model()
    policy = Checkpoints(dir="memory://best", every="epoch", keep=2, keep_best="val_loss")
    scheduler = begin(model, "memory://best", checkpoints=policy, num_epochs=6)
    with scheduler:
        for epoch in scheduler.epoch_iterator():
            for _ in scheduler.batch_iterator():
                scheduler.update_with_loss(1.0)
            scheduler.log(val_loss=abs(epoch - 1))
            if epoch == 2:
                scheduler.save_checkpoint(name="kept")
    assert sorted(e.manifest.step for e in fresh("memory://best").entries()) == [8, 12, 20, 24]


def test_a_damaged_checkpoint_in_the_store_is_passed_over(memory):
    model = Model()
    train(model, begin(model, "memory://damaged"))
    name = max(name for name in memory.find("/damaged") if name.endswith("weights.json"))
    memory.pipe_file(name, memory.cat_file(name)[:-1] + b"9")
    bad = []
    store = RemoteStore(Remote("memory://damaged"), on_corrupt=lambda path, reason: bad.append(reason))
    assert store.newest().step == 8
    assert "SHA-256" in bad[0]


def test_a_checkpoint_whose_manifest_is_not_there_yet_is_none(memory):
    model = Model()
    train(model, begin(model, "memory://half"))
    memory.rm_file(max(name for name in memory.find("/half") if name.endswith("manifest.json")))
    assert fresh("memory://half").newest().step == 8


def test_a_store_that_fails_is_told_and_asked_again(memory, monkeypatch):
    model, put, calls = Model(), type(memory).put_file, []

    def fails(self, source, target, **options):
        calls.append(target)
        if len(calls) == 3:
            raise PermissionError("403 Forbidden")
        return put(self, source, target, **options)

    monkeypatch.setattr(type(memory), "put_file", fails)
    with pytest.warns(
        RuntimeWarning, match=r"no checkpoint of step 4 .*memory://fails cannot be written to: Permission"
    ):
        train(model, begin(model, "memory://fails"))
    assert [e.manifest.step for e in fresh("memory://fails").entries()] == [12, 8]


def test_a_store_that_cannot_be_read_is_a_checkpoint_error(memory, monkeypatch):
    def refuse(self, *args, **options):
        raise OSError("the network is gone")

    monkeypatch.setattr(type(memory), "ls", refuse)
    with pytest.raises(CheckpointError, match="memory://gone cannot be read: OSError: the network is gone"):
        resolve("memory://gone")


def test_nothing_there_is_said_with_the_url():
    with pytest.raises(FileNotFoundError, match="no checkpoint in memory://none"):
        R8Scheduler.resume_from_checkpoint("memory://none", None, None)


@pytest.mark.parametrize("name", ["checkpoint_dir", "log_dir"])
@pytest.mark.parametrize("url", ["s3://bucket/run", Path("s3://bucket/run")])
def test_without_fsspec_a_url_is_refused(monkeypatch, name, url):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ConfigError, match=rf"{name}='s3://bucket/run' .* pip install 'learnit_r8\[remote\]'"):
        R8Scheduler(64, 16, num_epochs=1, **{name: url})


def test_an_unknown_store_is_refused():
    with pytest.raises(ConfigError, match=r"checkpoint_dir='quux://bucket/run'.*Protocol not known"):
        R8Scheduler(64, 16, num_epochs=1, checkpoint_dir="quux://bucket/run")


def lines(memory, name):
    return [type(event).__name__ for event in each_event(decode(memory.cat_file(name).splitlines()))]


def test_logs_in_a_store_go_on_and_are_set_aside(memory):
    model = Model()
    train(model, begin(model, "memory://logged/c", log_dir="memory://logged/log"), stop=9)
    first = lines(memory, "/logged/log/events.jsonl")
    assert first.count("LossReported") == 9
    assert first[-1] == "RunEnded"
    again = R8Scheduler.resume_from_checkpoint("memory://logged/c", model.save, model.load, ui="off")
    train(model, again)
    assert lines(memory, "/logged/log/events.jsonl").count("LossReported") == 12
    train(model, begin(model, "memory://logged/c", log_dir="memory://logged/log"))
    assert lines(memory, "/logged/log/events.1.jsonl").count("LossReported") == 12
    assert lines(memory, "/logged/log/events.jsonl").count("RunStarted") == 1


# S3 ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    with s3_server(tmp_path_factory.mktemp("s3")) as outage:
        yield outage


def test_s3_survives_connections_that_break(s3, monkeypatch):
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    outcomes = [judge(s3, seed) for seed in range(2)]
    assert all(outcome.survived for outcome in outcomes), outcomes


PROGRAM = """
import sys, numpy as np
from pathlib import Path
from learnit_r8 import R8Scheduler
model = {}
def save(path): Path(path).write_bytes(np.full(200_000, scheduler.global_step).tobytes())
def load(path): model["at"] = np.fromfile(path, int)[7]
try:
    scheduler = R8Scheduler.resume_from_checkpoint(sys.argv[1], save, load, ui="off")
    assert model["at"] == scheduler.global_step, model
except FileNotFoundError:
    scheduler = R8Scheduler(6400, 16, num_epochs=9, checkpoint_dir=sys.argv[1], checkpoint_every=1, save_callback=save,
                            load_callback=print, ui="off")
print("start", scheduler.global_step, flush=True)
for epoch in scheduler.epoch_iterator():
    for batch in scheduler.batch_iterator():
        scheduler.update_with_loss(1.0)
        print(scheduler.global_step, flush=True)
"""


def test_a_run_in_s3_that_is_killed_goes_on(s3):
    steps = []
    for _ in range(2):
        run = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "s3://bucket/killed"],
            env=os.environ | s3.environment | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        steps.append(int(run.stdout.readline().split()[1]))
        for line in run.stdout:
            if int(line) >= steps[-1] + 4:
                break
        time.sleep(0.05 * len(steps))
        run.send_signal(signal.SIGKILL)
        run.communicate(timeout=60)
    assert steps[0] == 0
    assert steps[0] + 2 <= steps[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_s3_survives_fifty_outages(s3, monkeypatch):
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    outcomes = [judge(s3, seed) for seed in range(100, 150)]
    assert all(outcome.survived for outcome in outcomes), [o for o in outcomes if not o.survived]
    assert isinstance(s3, Outage)
    assert open_store("s3://bucket/outage-100").newest().step >= 20
