"""A directory belongs to its runs: what each removes, keeps, resumes, and how long it holds the lock."""

import gc
import inspect
import os
import shutil
import signal
import subprocess
import sys
import threading
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest

from learnit_r8 import CheckpointError, Checkpoints, ConfigError, Evaluation, R8Scheduler, events
from learnit_r8.checkpoint import CheckpointStore, Retention, resolve
from learnit_r8.testing import FakeClock

ROOT = Path(__file__).resolve().parents[2]
QUIET = {"ui": "off"}


class Ear:
    """Hears events of one kind."""

    def __init__(self, *kinds):
        self.kinds, self.heard = kinds, []

    def record(self, event):
        if isinstance(event, self.kinds):
            self.heard.append(event)


def writer(name):
    return lambda path: Path(path).write_text(name) and None


def reader(into):
    return lambda path: into.append(Path(path).read_text())


def run(scheduler, stop=None, log=None):
    with scheduler:
        for epoch in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                scheduler.update_with_loss(np.ones(len(batch.indices)))
                if scheduler.global_step == stop:
                    return scheduler
            if log is not None:
                scheduler.log(val_loss=log[epoch])
    return scheduler


def fold(name, directory="checkpoints", **options):
    options = {"num_epochs": 3, "checkpoint_every": "epoch"} | options
    return R8Scheduler(64, 16, checkpoint_dir=directory, save_callback=writer(name), **options, **QUIET)


def models(directory="checkpoints"):
    return {path.name: (path / "model").read_text() for path in Path(directory).glob("step-*")}


def steps(directory):
    return sorted(int(path.name[5:14]) for path in Path(directory).glob("step-*"))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_second_run_in_the_default_directory_removes_nothing_of_the_first():
    final = run(fold("one", num_epochs=4)).save_checkpoint(is_final=True)
    first = models()
    run(fold("two", num_epochs=9))
    assert final.is_dir()
    assert {name: model for name, model in models().items() if model == "one"} == first
    assert sum(model == "two" for model in models().values()) == 3
    got = []
    resumed = R8Scheduler.resume_from_checkpoint("checkpoints", writer("two"), reader(got), **QUIET)
    assert (got, resumed.global_step) == (["two"], 36)
    got.clear()
    resumed = R8Scheduler.resume_from_checkpoint(final, writer("one"), reader(got), num_epochs=6, **QUIET)
    run(resumed)
    assert got == ["one"]
    assert sum(model == "two" for model in models().values()) == 3


@pytest.mark.parametrize("how", ["exception", "kill"])
def test_a_run_that_died_before_its_first_checkpoint_is_not_taken_for_an_earlier_one(how, tmp_path):
    run(fold("one"))
    if how == "kill":
        code = (
            "import os\nfrom learnit_r8 import R8Scheduler\n"
            "for _ in R8Scheduler(64, 16, num_epochs=2, checkpoint_every='epoch', ui='off').epoch_iterator():\n"
            "    os.kill(os.getpid(), 9)\n"
        )
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    else:
        with fold("two") as scheduler:
            assert next(scheduler.epoch_iterator()) == 0
    with pytest.raises(FileNotFoundError, match=r"began last in checkpoints has saved nothing; .* give one of its"):
        R8Scheduler.resume_from_checkpoint("checkpoints", **QUIET)
    assert R8Scheduler.resume_from_checkpoint("checkpoints/step-000000012", **QUIET).global_step == 12


def test_a_damaged_manifest_of_the_last_run_does_not_bring_an_earlier_run_back():
    run(fold("one"))
    run(fold("two", num_epochs=1))
    (two,) = [name for name, model in models().items() if model == "two"]
    (Path("checkpoints") / two / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoint of the run in checkpoints is whole"):
        R8Scheduler.resume_from_checkpoint("checkpoints", **QUIET)
    assert sorted(models().values()) == ["one"] * 3 + ["two"]  # set aside, not gone


def test_a_copied_folder_is_resumed_in_the_copy_with_its_own_log():
    original = R8Scheduler(
        80, 8, num_epochs=5, checkpoint_dir="a/checkpoints", checkpoint_every=10, log_dir="a/log", **QUIET
    )
    run(original)
    shutil.copytree("a/checkpoints/step-000000030", "b/checkpoints/step-000000030")
    before = sorted(Path("a").rglob("*")), Path("a/log/events.jsonl").read_bytes()
    ear = Ear(events.Notice)
    run(R8Scheduler.resume_from_checkpoint("b/checkpoints", sinks=[ear], **QUIET))
    assert (sorted(Path("a").rglob("*")), Path("a/log/events.jsonl").read_bytes()) == before
    assert steps("b/checkpoints") == [30, 40, 50]
    assert Path("b/log/events.jsonl").is_file()
    assert sum("where this one lies" in event.message for event in ear.heard) == 1


def test_from_an_older_checkpoint_a_run_branches_off_and_removes_nothing():
    run(fold("one", num_epochs=6))
    before = models()
    older = min(Path("checkpoints").glob("step-*"))
    resumed = R8Scheduler.resume_from_checkpoint(older, writer("branch"), lambda path: None, **QUIET)
    run(resumed)
    assert before.items() <= models().items()
    assert resolve("checkpoints").model_path.read_text() == "branch"


def test_a_resumed_run_goes_on_as_itself_and_prunes_its_own():
    run(fold("one", num_epochs=6), stop=12)
    run(R8Scheduler.resume_from_checkpoint("checkpoints", writer("one"), lambda path: None, **QUIET))
    assert steps("checkpoints") == [16, 20, 24]


def test_checkpoints_of_the_older_layout_load_and_stay():
    store = CheckpointStore("checkpoints")
    state = fold("old").state_dict()
    store.save(4, state)
    assert '"schema": 1' in Path("checkpoints/step-000000004/manifest.json").read_text()
    store.close()
    run(R8Scheduler.resume_from_checkpoint("checkpoints", writer("new"), num_epochs=6, **QUIET))
    assert Path("checkpoints/step-000000004").is_dir()
    assert len(models_of_runs()) == 3


def models_of_runs():
    return [name for name in os.listdir("checkpoints") if name.startswith("step-") and name.count("-") == 2]


def test_close_lets_another_process_write_and_so_does_the_end_of_the_loops():
    scheduler = fold("one")
    for _ in scheduler.epoch_iterator():
        for _ in scheduler.batch_iterator():
            scheduler.update_with_loss(1.0)
    code = "from learnit_r8.checkpoint import CheckpointStore as S; S('checkpoints').save(1, {})"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_twelve_closed_runs_leave_no_memory_behind():
    tracemalloc = pytest.importorskip("tracemalloc")
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for _ in range(12):
            run(R8Scheduler(1_000_000, 4096, num_epochs=1, checkpoint_dir=None, **QUIET), stop=3)
        assert tracemalloc.get_traced_memory()[0] < 40e6  # one run has 32 MB of samples' figures
    finally:
        tracemalloc.stop()
        gc.enable()


# ---------------------------------------------------------------- what stays


def test_the_best_by_a_logged_metric_stays_wherever_it_was_logged():
    values = [1.0, 0.5, 0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    policy = Checkpoints(dir="best", every="epoch", keep=2, keep_best="val_loss")
    run(R8Scheduler(64, 16, num_epochs=10, checkpoints=policy, **QUIET), log=values)
    assert steps("best") == [12, 36, 40]


def test_a_new_best_value_is_a_reason_to_save_and_outlives_a_resume():
    policy = Checkpoints(dir="best", every=1000, keep=2, keep_best=("score", "max"))
    scheduler = R8Scheduler(64, 16, num_epochs=6, checkpoints=policy, **QUIET)
    scores = iter([0.1, 0.9, 0.2, 0.3, 0.4, 0.5, 0.6, 0.2, 0.95, 0.1, 0.1, 0.1])
    for run_number in range(2):
        with scheduler:
            for epoch in scheduler.epoch_iterator():
                for batch in scheduler.batch_iterator():
                    scheduler.update_with_loss(1.0)
                    if batch.step % 2:
                        scheduler.log(score=next(scores))
                if epoch == 2 and run_number == 0:
                    break
        if run_number == 0:
            assert steps("best") == [4, 12]
            scheduler = R8Scheduler.resume_from_checkpoint("best", **QUIET)
    assert steps("best") == [18, 24]


def test_every_nth_and_named_checkpoints_stay():
    policy = Checkpoints(dir="some", every=3, keep=2, keep_every=10)
    scheduler = R8Scheduler(64, 16, num_epochs=10, checkpoints=policy, **QUIET)
    with scheduler:
        for _ in scheduler.epoch_iterator():
            for _ in scheduler.batch_iterator():
                scheduler.update_with_loss(1.0)
                if scheduler.global_step == 7:
                    assert scheduler.save_checkpoint(name="before_surgery").name == "step-000000007-before_surgery"
    assert steps("some") == [7, 12, 21, 30, 39, 40]


def test_retention_is_the_same_function_of_what_is_there_at_any_time():
    rule = Retention(newest=2, every=5, best="a", sign=1)
    store = CheckpointStore("r", retention=rule)
    for step in range(1, 30):
        store.add_metrics(store.save(step, {}).path, {"a": -abs(step - 13)})
    assert sorted(entry.manifest.step for entry in store.entries()) == [5, 10, 13, 15, 20, 25, 28, 29]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"every": 0}, "every must be a whole number >= 1"),
        ({"keep": 0, "keep_every": 0}, "keep_every must be"),
        ({"keep_best": ("loss", "lowest")}, 'must end in "min" or "max"'),
        ({"keep_best": 3}, "must be the name of a logged metric"),
        ({"dir": None, "every": 5}, "needs a checkpoint_dir"),
        ({"dir": None, "keep_best": "loss"}, "need a dir"),
        ({"signals": ("KILL",)}, "signals must be some of"),
        ({"signals": "INT"}, "signals must be some of"),
    ],
)
def test_a_bad_policy_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Checkpoints(**fields)


def test_flat_names_beside_the_value_and_names_that_do_not_tell_are_refused():
    with pytest.raises(ConfigError, match="checkpoint_every within checkpoints=Checkpoints"):
        R8Scheduler(64, 16, num_epochs=1, checkpoints=Checkpoints(), checkpoint_every=5)
    with pytest.raises(ConfigError, match=r"""say which way is better: keep_best=\('score', "max"\)"""):
        R8Scheduler(64, 16, num_epochs=1, checkpoints=Checkpoints(keep_best="score"))


@pytest.mark.parametrize(("every", "stop"), [(5, None), ("epoch", None), (5, 7), ("epoch", 7)])
def test_the_last_state_of_a_run_is_saved_wherever_it_ends(every, stop):
    run(fold("m", checkpoint_every=every), stop=stop)
    assert steps("checkpoints")[-1] == (stop or 12)


def test_nothing_is_saved_that_nobody_asked_for():
    run(R8Scheduler(64, 16, num_epochs=1, **QUIET))
    assert os.listdir(".") == []


# ---------------------------------------------------------------- thrown out of a step


def test_an_exception_between_two_steps_saves_and_one_in_a_step_says_that_it_could_not():
    def broken(directory, save, at):
        updates = 0
        options = {"checkpoint_dir": directory, "checkpoint_every": 4, "save_callback": save}
        with R8Scheduler(640, 16, num_epochs=3, **options, **QUIET) as scheduler:
            for _ in scheduler.epoch_iterator():
                for _ in scheduler.batch_iterator():
                    updates += 1
                    if scheduler.global_step == 10 and at == "in":
                        raise RuntimeError("out of memory")
                    scheduler.update_with_loss(1.0)
                    if scheduler.global_step == 10 and at == "after":
                        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError) as caught:
        broken("a", writer("m"), "after")
    assert "saved in" in caught.value.__notes__[0]
    assert steps("a")[-1] == 10
    with pytest.raises(RuntimeError) as caught:
        broken("b", writer("m"), "in")
    assert "the model may be trained halfway and is not saved" in caught.value.__notes__[0]
    assert "step-000000008" in caught.value.__notes__[0]
    assert steps("b")[-1] == 8
    with pytest.raises(RuntimeError):
        broken("c", None, "in")  # without a model there is nothing to tear
    assert steps("c")[-1] == 10


def test_a_save_between_the_optimizers_step_and_the_report_is_refused():
    with fold("m", checkpoint_every=None) as scheduler:
        for _ in scheduler.epoch_iterator():
            for _ in scheduler.batch_iterator():
                with pytest.raises(CheckpointError, match="has not been reported"):
                    scheduler.save_checkpoint()
                scheduler.update_with_loss(1.0)
                scheduler.save_checkpoint()
            break
    assert steps("checkpoints") == [2, 3, 4]


def test_a_diverged_run_is_not_saved_as_its_newest_state():
    from learnit_r8 import TrainingDiverged

    def train():
        states = {"w": np.ones(3)}
        options = {"state_callback": lambda: states, "load_callback": lambda state: None, "checkpoint_every": 1000}
        with R8Scheduler(64, 16, num_epochs=500, backup_every=1, save_callback=writer("m"), **options, **QUIET) as run:
            for _ in run.epoch_iterator():
                for _ in run.batch_iterator():
                    run.update_with_loss(1.0 if run.global_step < 40 else float("nan"))

    with pytest.raises(TrainingDiverged):
        train()
    assert steps("checkpoints") == []


UNCLOSED = """
import sys
from learnit_r8 import R8Scheduler
s = R8Scheduler(640, 16, num_epochs=9, checkpoint_every=100, ui="off", save_callback=lambda p: open(p, "w").close())
def train():
    for e in s.epoch_iterator():
        for b in s.batch_iterator():
            if s.global_step == 7 and sys.argv[1] == "in": raise RuntimeError("broken")
            s.update_with_loss(1.0)
            if s.global_step == 7 and sys.argv[1] == "after": raise RuntimeError("broken")
            if s.global_step == 7 and sys.argv[1] == "break": return
            if s.global_step == 7 and sys.argv[1] == "exit": sys.exit(3)
train()
"""


@pytest.mark.parametrize(
    ("how", "saved", "said"),
    [("in", [], "trained halfway"), ("after", [7], "saved in"), ("break", [7], ""), ("exit", [7], "saved in")],
)
def test_without_close_the_end_of_the_program_saves_what_is_owed(how, saved, said):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", UNCLOSED, how],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert steps("checkpoints") == saved, done.stderr
    assert said in done.stderr


# ---------------------------------------------------------------- signals

SIGNALLED = """
import os, signal, sys
import numpy as np
from learnit_r8 import R8Scheduler
s = R8Scheduler(640, 16, num_epochs=9, ui="off", checkpoint_dir=sys.argv[1])
for _ in s.epoch_iterator():
    for b in s.batch_iterator():
        if b.step == 5:
            for name in sys.argv[2:]:
                os.kill(os.getpid(), getattr(signal, name))
        s.update_with_loss(1.0)
"""


def signalled(*names, before=""):
    return subprocess.run(
        [sys.executable, "-c", before + SIGNALLED, "c", *names],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("names", [["SIGUSR1"], ["SIGUSR2"], ["SIGHUP"], ["SIGHUP"] * 3, ["SIGUSR1", "SIGTERM"]])
def test_every_signal_saves_within_the_step_and_then_acts(names):
    done = signalled(*names, before="import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n")  # nohup ignores it
    assert done.returncode == -getattr(signal, names[0])
    assert steps("c") == [6]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ignored_signals_stay_ignored_and_the_users_handlers_are_called_and_put_back():
    before = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    assert signalled("SIGHUP", before=before).returncode == 0
    assert not Path("c").exists()
    heard = []
    mine = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        ours = signal.getsignal(signal.SIGUSR1)
        with R8Scheduler(64, 16, num_epochs=1, checkpoint_dir="mine", **QUIET) as scheduler:
            for batch in scheduler.batch_iterator():
                if batch.step == 1:
                    signal.raise_signal(signal.SIGUSR1)
                    assert heard == []
                scheduler.update_with_loss(1.0)
        assert heard == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGUSR1) is ours
        assert steps("mine") == [2]
    finally:
        signal.signal(signal.SIGUSR1, mine)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_only_the_chosen_signals_are_caught():
    with R8Scheduler(64, 16, num_epochs=1, checkpoints=Checkpoints(signals=("USR2",)), **QUIET) as scheduler:
        for _ in scheduler.batch_iterator():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
            assert getattr(signal.getsignal(signal.SIGUSR2), "__self__", None) is not None
            scheduler.update_with_loss(1.0)


def test_handlers_come_back_where_the_loops_are_closed_in_another_thread():
    before = signal.getsignal(signal.SIGINT)
    scheduler = R8Scheduler(64, 16, num_epochs=2, **QUIET)
    epochs = scheduler.epoch_iterator()
    next(epochs)
    batches = scheduler.batch_iterator()
    next(batches)
    assert signal.getsignal(signal.SIGINT) is not before

    def close():
        batches.close()
        epochs.close()
        scheduler.close()

    thread = threading.Thread(target=close)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before


# ---------------------------------------------------------------- budgets and names


def test_a_budget_of_steps_ends_there_and_a_resume_with_more_goes_on_in_the_same_epoch():
    whole = R8Scheduler(100, 10, num_steps=37, scheduler_mode="constant", checkpoint_dir=None, **QUIET)
    seen = [(b.indices.tolist(), b.lr) for b in walk(whole)]
    assert (whole.total_steps, len(seen), whole.current_epoch) == (37, 37, 3)
    part = R8Scheduler(
        100, 10, num_steps=14, scheduler_mode="constant", checkpoint_every=10, warmup_proportion=0.0, **QUIET
    )
    first = [b.indices.tolist() for b in walk(part)]
    assert steps("checkpoints") == [10, 14]
    rest = [b.indices.tolist() for b in walk(R8Scheduler.resume_from_checkpoint("checkpoints", num_steps=37, **QUIET))]
    assert first + rest == [indices for indices, _ in seen]
    linear = R8Scheduler(100, 10, num_steps=8, scheduler_mode="linear", warmup_proportion=0.0, **QUIET)
    assert [round(b.lr / 0.01, 3) for b in walk(linear)] == [1 - n / 8 for n in range(8)]


def walk(scheduler):
    with scheduler:
        for _ in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                yield batch
                scheduler.update_with_loss(np.cos(batch.indices))


def test_the_published_keyword_names_work():
    scheduler = fold("m")
    with scheduler:
        for _ in scheduler.epoch_iterator():
            for _ in scheduler.batch_iterator():
                scheduler.update_with_loss(batch_loss=1.0)
    again = R8Scheduler.resume_from_checkpoint(
        checkpoint_path="checkpoints", save_callback=writer("m"), load_callback=lambda path: None, **QUIET
    )
    again.load_checkpoint(filepath="checkpoints")
    assert again.global_step == 12
    assert R8Scheduler.resume_from_checkpoint(path="checkpoints", **QUIET).global_step == 12
    with pytest.raises(TypeError, match="needs a path as filepath or path"):
        again.load_checkpoint()


# ---------------------------------------------------------------- what is given on resume counts


def saved_run():
    strategy = {"strategy": "uniform", "initial_lr": 0.1, "scheduler_mode": "constant", "warmup_proportion": 0.0}
    run(fold("m", num_epochs=4, checkpoint_every=4, **strategy), stop=8)


TAKES_EFFECT = {
    "num_epochs": (8, lambda s, g: s.total_steps == 32),
    "num_steps": (50, lambda s, g: s.total_steps == 50),
    "train_duration_seconds": (9.0, lambda s, g: s.total_steps is None),
    "batch_size": (8, lambda s, g: s.batch_size == 8),
    "initial_lr": (0.01, lambda s, g: s.lr == 0.01),
    "scheduler_mode": ("linear", lambda s, g: s.lr == 0.05),
    "warmup_proportion": (1.0, lambda s, g: s.lr == pytest.approx(0.1 * 9 / 16)),
    "min_lr": (0.1, lambda s, g: s.lr == 0.1),
    "save_callback": (writer("new"), lambda s, g: (s.save_checkpoint() / "model").read_text() == "new"),
    "load_callback": (lambda path: Path("loaded").touch(), lambda s, g: Path("loaded").exists()),
    "state_callback": (lambda: {"w": np.ones(1)}, lambda s, g: s._args.state_callback is g),
    "backup_every": (1, lambda s, g: s.state_dict()["config"]["backup_every"] == 1),
    "checkpoint_dir": ("elsewhere", lambda s, g: s.save_checkpoint().parent.name == "elsewhere"),
    "checkpoint_every": (3, lambda s, g: run(s) and steps("checkpoints")[-3:] == [12, 15, 16]),
    "keep_checkpoints": (2, lambda s, g: run(s) and s._saver.store._retention.newest == 2),
    "checkpoints": (Checkpoints(every=5), lambda s, g: run(s) and steps("checkpoints")[-3:] == [10, 15, 16]),
    "evaluation": (Evaluation(stop_after=1), lambda s, g: epochs_without_progress(s) == 1),
    "clip": (0.5, lambda s, g: s.clip_norm() == g),
    "ui": ("log", lambda s, g: s._args.ui == "log"),
    "use_curses": (False, lambda s, g: s._args.ui == "off"),
    "sinks": ([Ear(events.LossReported)], lambda s, g: run(s) and len(g[0].heard) == 8),
    "log_dir": ("logs", lambda s, g: run(s) and Path("logs/events.jsonl").exists()),
    "noise_guard": ("cap", lambda s, g: s.noise_guard.mode == "cap"),
    "keys": ([f"row {i}" for i in range(64)], lambda s, g: s.keys.numbers(g).tolist() == list(range(64))),
    "groups": ([0, 1] * 32, lambda s, g: s.state_dict()["groups"].tolist() == g),
    "lookahead": (3, lambda s, g: held(s) == 3),
    "rollback_data": ("replay", lambda s, g: s.state_dict()["config"]["rollback_data"] == "replay"),
    "recovery": ("report", lambda s, g: s.state_dict()["config"]["recovery"]["spike"] == "report"),
    "clock": (FakeClock(), lambda s, g: s._clock is g),
    "world_size": (2, lambda s, g: s.world_size == 2),
    "rank": (1, lambda s, g: s._ranks.rank == 1),
    "all_gather": (lambda array: array, lambda s, g: s._ranks._all_gather is g),
}
REFUSED = {
    "num_samples": 56,
    "strategy": "quadrant",
    "seed": 1,
    "drop_last": True,
    "auto_find_lr": True,
    "sharded": True,
}


def epochs_without_progress(scheduler):
    """Return how many epochs are trained where the validation loss stays as it is."""
    for _ in (epochs := scheduler.epoch_iterator()):
        scheduler.log(val_loss=1.0)
        scheduler.log(val_loss=1.0)
        return 1 + len(list(epochs))
    return 0


def held(scheduler):
    """Return how many batches may be out at once."""
    next(scheduler.epoch_iterator())
    return len([batch for _, batch in zip(range(3), scheduler.batch_iterator(), strict=False)])


def resumed(options):
    return R8Scheduler.resume_from_checkpoint("checkpoints", **options)


def loaded(options):
    scheduler = made_anew(options)
    scheduler.load_checkpoint("checkpoints")
    return scheduler


def state_loaded(options):
    """Go on as the integrations do: Lightning's `fit(ckpt_path=)`, the Trainer's `resume_from_checkpoint=`."""
    scheduler = made_anew(options)
    scheduler.load_state_dict(resolve("checkpoints").state)
    if load := options.get("load_callback"):
        load("the host's own file")
    return scheduler


def made_anew(options):
    default = {"num_samples": 64, "batch_size": 16, "num_epochs": 4, "strategy": "uniform", **QUIET}
    if {"num_steps", "train_duration_seconds"} & options.keys():
        del default["num_epochs"]
    if "use_curses" in options:
        del default["ui"]
    curve = {"initial_lr": 0.1, "scheduler_mode": "constant", "warmup_proportion": 0.0}
    files = {"checkpoint_dir": "checkpoints", "checkpoint_every": 4, "save_callback": writer("m")}
    if "checkpoints" in options:
        del files["checkpoint_dir"], files["checkpoint_every"]
    return R8Scheduler(**default | curve | files | options)


WAYS = (resumed, loaded, state_loaded)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", sorted(TAKES_EFFECT))
def test_what_is_given_on_resume_takes_effect(name, way):
    saved_run()
    value, holds = deepcopy(TAKES_EFFECT[name])
    goals = {"ui": "off", "load_callback": lambda path: None, name: value}
    if name in {"world_size", "rank", "all_gather"}:
        goals |= {"world_size": 2, "all_gather": TAKES_EFFECT["all_gather"][0]}
    if name == "warmup_proportion":
        goals["scheduler_mode"] = "linear"
    if name == "use_curses":
        del goals["ui"]
    assert holds(way(goals), value)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_a_run_cannot_change_is_refused_on_resume_by_name(name, way):
    saved_run()
    goals = {"load_callback": lambda path: None, "save_callback": lambda path: None} | {name: REFUSED[name]} | QUIET
    with pytest.raises(ConfigError, match=rf"(?m)^{name}[:=]|{name}: the state"):
        way(goals)


def test_every_argument_is_in_one_of_the_two_tables():
    names = set(inspect.signature(R8Scheduler).parameters)
    assert names == TAKES_EFFECT.keys() | REFUSED.keys()


def test_a_learning_rate_given_with_a_loaded_state_counts_too():
    saved_run()
    other = R8Scheduler(64, 16, num_epochs=4, initial_lr=0.03, scheduler_mode="constant", warmup_proportion=0.0,
                        strategy="uniform", load_callback=lambda path: None, **QUIET)  # fmt: skip
    other.load_checkpoint("checkpoints")
    assert other.lr == 0.03
