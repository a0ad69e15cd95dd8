"""Bad input: one clear error that lists every problem, and a state that is as it was."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from learnit_r8 import Batch, CheckpointError, ConfigError, ProtocolError, R8Scheduler, TrainingDiverged
from learnit_r8.checkpoint import state_codec

NAN = math.nan


class DrawsNothing:
    pass


# Constructor: one bad argument ----------------------------------------------------------------

BAD = [
    ("num_samples", value, "num_samples must be a whole number from 1 to 4294967295")
    for value in (0, -1, 2.0, "100", None, True, NAN, [100], 2**32)
]
BAD += [
    ("batch_size", value, "batch_size must be a whole number >= 1")
    for value in (0, -3, 1.5, "8", None, False, np.float64(8), b"8")
]
BAD += [
    ("num_epochs", value, "num_epochs must be a whole number >= 1") for value in (0, -1, 1.5, "3", True, math.inf, [3])
]
BAD += [
    ("initial_lr", value, "initial_lr must be a finite number > 0")
    for value in (0, -0.1, NAN, math.inf, "0.1", None, True, 1j, [0.1, 0.2])
]
BAD += [("min_lr", value, "min_lr must be a finite number >= 0") for value in (-1e-9, NAN, math.inf, "0", None, False)]
BAD += [("min_lr", 0.02, "min_lr must not exceed initial_lr")]
BAD += [
    ("warmup_proportion", value, "warmup_proportion must be a finite number >= 0 and <= 1")
    for value in (-0.1, 1.1, NAN, "0.1", None, True)
]
BAD += [("scheduler_mode", value, "scheduler_mode") for value in ("cosin", "", None, 3, 0.5, ["cosine"], b"cosine")]
BAD += [
    ("strategy", value, "strategy must be one of") for value in ("quadrants", "", None, 3, DrawsNothing(), DrawsNothing)
]
BAD += [
    (name, value, f"{name} must be True or False")
    for name in ("auto_find_lr", "use_curses", "drop_last")
    for value in (1, 0, "yes", None)
]
BAD += [
    (name, value, f"{name} must be a function or None")
    for name in ("save_callback", "load_callback", "state_callback", "all_gather")
    for value in (3, "save", [print])
]
BAD += [
    ("save_callback", lambda: None, "save_callback must take (state_dict, filepath) or (filepath)"),
    ("save_callback", lambda a, b, c: None, "save_callback must take (state_dict, filepath) or (filepath)"),
    ("load_callback", lambda: None, "load_callback must take (source) or (source, from_ram)"),
    ("load_callback", lambda a, b: None, "load_callback must take (source) or (source, from_ram)"),
    ("state_callback", lambda model: None, "state_callback must take no arguments and return the model's state"),
]
BAD += [("backup_every", value, "backup_every must be a whole number >= 1") for value in (0, -1, 2.5, True)]
BAD += [("backup_every", "50", 'backup_every must be "auto", a number of steps >= 1 or None')]
BAD += [
    ("recovery", value, "recovery must be one of 'auto', 'report', 'off' or a Recovery") for value in (None, "on", 1)
]
BAD += [("checkpoints", value, "checkpoints must be a learnit_r8.Checkpoints") for value in (3, "epoch", {"keep": 2})]
BAD += [("checkpoint_dir", value, "checkpoint_dir must be a path or None") for value in (3, "", "  ", b"x", ["x"])]
BAD += [("log_dir", value, "log_dir must be a path or None") for value in (3, "", True)]
BAD += [
    ("checkpoint_every", "epochs", 'checkpoint_every must be "epoch", a number of steps >= 1 or None'),
    *(("checkpoint_every", value, "checkpoint_every must be a whole number >= 1") for value in (0, -1, 1.5, True)),
]
BAD += [
    ("keep_checkpoints", value, "keep_checkpoints must be a whole number >= 1") for value in (0, -1, 1.5, None, "3")
]
BAD += [("ui", value, "ui must be one of 'auto', 'curses', 'rich', 'log', 'off'") for value in ("web", "", 3, True)]
BAD += [
    ("sinks", value, "sinks must be")
    for value in (None, 3, "sink", print, [print], [object()], [None], {"record": print}, iter([]))
]
BAD += [("noise_guard", value, "noise_guard must be one of 'off', 'report', 'cap'") for value in ("on", None, True, 1)]
BAD += [
    ("groups", value, "groups must hold one whole number (the class) per sample, shape (100,)")
    for value in (
        [0] * 99, [0] * 101, [], 3, "x" * 100, [0.5] * 100, [NAN] * 100, ["cat"] * 100, [None] * 100,
        np.zeros((100, 1), int), [[1]] * 50 + [[1, 2]] * 50, np.zeros(100, complex),
        torch.zeros(100, requires_grad=True), torch.zeros(100, dtype=torch.int64, device="meta"),
    )
]  # fmt: skip
BAD += [("seed", value, "seed must be a whole number >= 0") for value in (-1, 1.5, None, "0", True, NAN)]
BAD += [("lookahead", value, "lookahead must be a whole number >= 1") for value in (0, -1, 1.5, None, "2", True)]
BAD += [("rollback_data", value, "rollback_data must be one of 'skip', 'replay'") for value in ("again", None, True, 2)]
BAD += [("rank", value, "rank must be a whole number from 0 to 0") for value in (-1, 1, 0.0, None, "0")]
BAD += [("world_size", value, "world_size must be a whole number >= 1") for value in (0, -1, 1.5, None, "1")]
BAD += [("world_size", 2, "all_gather is needed when world_size=2")]
BAD += [("clock", value, "clock must have monotonic(), wall() and sleep(seconds)") for value in (3, "now", object(), 0)]


@pytest.mark.parametrize(
    ("name", "value", "message"), BAD, ids=[f"{n}-{type(v).__name__}-{i}" for i, (n, v, _) in enumerate(BAD)]
)
def test_a_bad_argument_is_the_one_problem_that_is_listed(name, value, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = {"num_samples": 100, "batch_size": 8, "num_epochs": 2} | {name: value}
    with pytest.raises(ConfigError) as caught:
        R8Scheduler(**arguments)
    (problem,) = caught.value.problems
    assert message in problem
    assert "got" in problem or "all_gather is needed" in problem
    assert isinstance(caught.value, ValueError)
    assert list(tmp_path.iterdir()) == []


COMBINATIONS = {
    "no budget": ({"num_epochs": None}, ["give exactly one of num_epochs and train_duration_seconds"]),
    "two budgets": ({"train_duration_seconds": 3.0}, ["give exactly one of num_epochs and train_duration_seconds"]),
    "drop_last leaves nothing": (
        {"num_samples": 4, "drop_last": True},
        ["drop_last=True with batch_size=8 > num_samples=4 leaves no batch"],
    ),
    "more ranks than samples in a batch": (
        {"world_size": 9, "all_gather": lambda array: array},
        ["batch_size is the global batch and must be >= world_size=9, got 8"],
    ),
    "rank beyond the world": (
        {"world_size": 2, "rank": 2, "all_gather": lambda array: array},
        ["rank must be a whole number from 0 to 1, got 2"],
    ),
    "search without load": (
        {"auto_find_lr": True, "save_callback": lambda path: None},
        ["auto_find_lr needs load_callback"],
    ),
    "search without save": (
        {"auto_find_lr": True, "load_callback": lambda path: None},
        ["auto_find_lr needs load_callback"],
    ),
    "search with batches ahead": (
        {"auto_find_lr": True, "load_callback": lambda s: None, "state_callback": dict, "lookahead": 2},
        ["auto_find_lr needs lookahead=1, got lookahead=2"],
    ),
    "cadence without directory": (
        {"checkpoint_every": "epoch", "checkpoint_dir": None},
        ["checkpoint_every='epoch' needs a checkpoint_dir, got None"],
    ),
    **{
        f"seconds={value!r}": (
            {"num_epochs": None, "train_duration_seconds": value},
            ["train_duration_seconds must be a finite number > 0"],
        )
        for value in (0, -1.0, NAN, math.inf, "60", True, [60])
    },
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_arguments_that_do_not_go_together_are_listed(name):
    changed, messages = COMBINATIONS[name]
    with pytest.raises(ConfigError) as caught:
        R8Scheduler(**({"num_samples": 100, "batch_size": 8, "num_epochs": 2} | changed))
    assert len(caught.value.problems) == len(messages)
    for problem, message in zip(caught.value.problems, messages, strict=True):
        assert message in problem


def test_all_bad_arguments_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        R8Scheduler(
            num_samples=0,
            batch_size="8",
            num_epochs=-1,
            checkpoints=6,
            evaluation="val_loss",
            initial_lr=NAN,
            scheduler_mode="cosin",
            warmup_proportion=2,
            min_lr=-1,
            auto_find_lr=1,
            strategy="quadrants",
            save_callback=3,
            load_callback=lambda: None,
            state_callback=4,
            backup_every=0,
            checkpoint_dir=5,
            checkpoint_every=0,
            keep_checkpoints=0,
            use_curses="no",
            ui="web",
            sinks=7,
            log_dir=8,
            noise_guard="on",
            groups="x",
            keys="x",
            seed=-1,
            drop_last=2,
            clip="hard",
            lookahead=0,
            rollback_data="again",
            sharded=3,
            recovery="never",
            rank=-1,
            world_size=0,
            all_gather=9,
            clock=10,
        )
    others = {"num_steps", "train_duration_seconds"}  # one budget only
    names = [name for name in inspect.signature(R8Scheduler).parameters if name not in others]
    for name in names:
        assert sum(problem.startswith(name) for problem in caught.value.problems) == 1, name
    assert str(caught.value).startswith(f"{len(names)} problems:\n  - ")


def test_an_unknown_argument_is_pythons_own_error():
    with pytest.raises(TypeError, match="nums_epochs"):
        R8Scheduler(10, 5, nums_epochs=3)


GOOD = {
    "numpy integers": {"num_samples": np.int32(100), "batch_size": np.uint8(8), "seed": np.int64(3)},
    "numpy floats": {"initial_lr": np.float32(0.1), "min_lr": np.float64(0.0), "warmup_proportion": np.float16(0.5)},
    "a tensor as rate": {"initial_lr": torch.tensor(0.1)},
    "numpy bool": {"drop_last": np.True_, "use_curses": np.False_},
    "huge seed": {"seed": 2**200},
    "a batch larger than the data": {"batch_size": 1000},
    "a path object": {"checkpoint_dir": Path("x"), "log_dir": Path("y")},
    "a tuple of sinks": {"sinks": ()},
    "groups of any integers": {"groups": np.arange(100, dtype=np.uint8)},
    "groups as tensor": {"groups": torch.zeros(100, dtype=torch.int64)},
    "bool groups": {"groups": [True, False] * 50},
    "groups far from zero": {"groups": np.arange(100) - 2**40},
    "equal rates": {"initial_lr": 0.1, "min_lr": 0.1},
    "no backups": {"backup_every": None},
}


@pytest.mark.parametrize("name", GOOD)
def test_good_arguments_of_other_types_are_taken(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = {"num_samples": 100, "batch_size": 8, "num_epochs": 2, "use_curses": False} | GOOD[name]
    scheduler = R8Scheduler(**arguments)
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            scheduler.update_with_loss(np.ones(len(batch.indices)))
    assert scheduler.global_step == scheduler.total_steps
    assert state_codec.encode(scheduler.state_dict())[1]
    scheduler.close()


# The loop --------------------------------------------------------------------------------------


class StoppedClock:
    """Time is part of a scheduler's state; here it stands still."""

    def monotonic(self):
        return 0.0

    def wall(self):
        return 0.0

    def sleep(self, seconds):
        raise AssertionError("nobody waits")


def scheduler_at(step=3, **more):
    """A scheduler in the middle of its second epoch, and its open batch."""
    arguments = {"num_epochs": 3, "use_curses": False, "checkpoint_dir": None, "clock": StoppedClock()}
    scheduler = R8Scheduler(32, 8, **(arguments | more))
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            if scheduler.global_step == step:
                return scheduler, batch
            scheduler.update_with_loss(np.cos(batch.indices))
    raise AssertionError("the run is shorter than that")


def frozen(scheduler):
    """All of a scheduler's state as bytes."""
    text, segments = state_codec.encode(scheduler.state_dict())
    return text, b"".join(segment.tobytes() for segment in segments)


BAD_LOSSES = {
    "None": (None, TypeError, "got None"),
    "a string": ("0.5", TypeError, "got str '0.5'"),
    "bytes": (b"0.5", TypeError, "got bytes"),
    "complex": (1 + 2j, TypeError, "got complex"),
    "True": (True, TypeError, "got bool True"),
    "dict": ({"loss": 1.0}, TypeError, "got dict"),
    "object": (object(), TypeError, "got object"),
    "complex array": (np.ones(8, complex), TypeError, "dtype complex128"),
    "complex tensor": (torch.ones(8, dtype=torch.complex64), TypeError, "complex64"),
    "bool array": (np.ones(8, bool), TypeError, "dtype bool"),
    "bool tensor": (torch.ones(8, dtype=torch.bool), TypeError, "dtype bool"),
    "list of strings": (["1"] * 8, TypeError, "dtype <U1"),
    "list of None": ([None] * 8, TypeError, "dtype object"),
    "2-D": (np.ones((8, 1)), TypeError, "2 dimensions, shape (8, 1)"),
    "2-D tensor": (torch.ones(8, 10), TypeError, "2 dimensions, shape (8, 10)"),
    "ragged": ([[1.0], [1.0, 2.0]], TypeError, "got list"),
    "too short": (np.ones(7), ProtocolError, "the batch has 8 samples, but 7 losses came"),
    "too long": ([1.0] * 9, ProtocolError, "the batch has 8 samples, but 9 losses came"),
    "empty": ([], ProtocolError, "the batch has 8 samples, but 0 losses came"),
    "a length-1 tensor": (torch.ones(1), ProtocolError, "the batch has 8 samples, but 1 losses came"),
}


@pytest.mark.parametrize("name", BAD_LOSSES)
def test_a_bad_loss_is_refused_and_the_batch_stays_open(name):
    loss, error, message = BAD_LOSSES[name]
    scheduler, batch = scheduler_at()
    before = frozen(scheduler)
    with pytest.raises(error) as caught:
        scheduler.update_with_loss(loss)
    assert message in str(caught.value)
    assert frozen(scheduler) == before
    assert scheduler.update_with_loss(np.ones(8), batch).accepted


def a_batch(number):
    return Batch(np.arange(8), 0.1, np.ones(8, np.float32), number, 3, 0)


BAD_BATCHES = {
    "the indices": (
        lambda batch: batch.indices,
        TypeError,
        "batch must be a Batch from batch_iterator() or None, got ndarray",
    ),
    "the id": (lambda batch: batch.id, TypeError, "got int"),
    "a pair": (lambda batch: tuple(batch), TypeError, "got tuple"),
    "one of another run": (
        lambda batch: a_batch(1000),
        ProtocolError,
        "batch id 1000 (step 3) is not open (open ids: [3])",
    ),
    "a reported one": (
        lambda batch: a_batch(0),
        ProtocolError,
        "batch id 0 (step 3) is not open (open ids: [3]): report each batch once",
    ),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_a_bad_batch_is_refused_and_nothing_changes(name):
    which, error, message = BAD_BATCHES[name]
    scheduler, batch = scheduler_at()
    before = frozen(scheduler)
    with pytest.raises(error) as caught:
        scheduler.update_with_loss(np.ones(8), which(batch))
    assert message in str(caught.value)
    assert frozen(scheduler) == before


def test_a_foreign_batch_with_the_number_of_an_open_one_is_refused():
    scheduler, batch = scheduler_at(3)
    _, foreign = scheduler_at(3, seed=7)
    assert foreign.id == batch.id
    before = frozen(scheduler)
    with pytest.raises(ProtocolError, match="is not open"):
        scheduler.update_with_loss(np.ones(8), foreign)
    assert frozen(scheduler) == before


def test_no_batch_is_open_before_the_loop_after_a_report_and_after_the_run():
    scheduler = R8Scheduler(8, 8, num_epochs=1, use_curses=False, checkpoint_dir=None, clock=StoppedClock())
    with pytest.raises(ProtocolError, match="no batch is open"):
        scheduler.update_with_loss(1.0)
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            scheduler.update_with_loss(1.0)
            before = frozen(scheduler)
            with pytest.raises(ProtocolError, match="no batch is open"):
                scheduler.update_with_loss(1.0)
            with pytest.raises(ProtocolError, match=r"batch id 0 .* report each batch once"):
                scheduler.update_with_loss(1.0, batch)
            assert frozen(scheduler) == before
    with pytest.raises(ProtocolError, match="no batch is open"):
        scheduler.update_with_loss(1.0)
    assert scheduler.global_step == 1


@pytest.mark.parametrize("lookahead", [1, 2, 3])
def test_asking_for_one_batch_too_many_names_the_step_that_is_due(lookahead):
    scheduler = R8Scheduler(
        64, 8, num_epochs=1, ui="off", checkpoint_dir=None, lookahead=lookahead, clock=StoppedClock()
    )
    next(scheduler.epoch_iterator())
    batches = scheduler.batch_iterator()
    for _ in range(lookahead):
        next(batches)
    before = frozen(scheduler)
    with pytest.raises(ProtocolError, match=rf"the loss of step 0 .* at once \(lookahead={lookahead}\)"):
        next(batches)
    assert frozen(scheduler) == before
    redrawn = next(scheduler.batch_iterator())
    assert redrawn.id == 0, "the loop can be entered again"


def test_a_closed_scheduler_says_so():
    scheduler, _ = scheduler_at()
    scheduler.close()
    scheduler.close()
    for use in (
        lambda: scheduler.update_with_loss(1.0),
        lambda: next(scheduler.epoch_iterator()),
        lambda: next(scheduler.batch_iterator()),
        lambda: scheduler.update_cpu_backup({}),
    ):
        with pytest.raises(ProtocolError, match="this scheduler is closed"):
            use()
    assert scheduler.state_dict()["global_step"] == 3


# Callbacks that fail ---------------------------------------------------------------------------


def fail(*_):
    raise OSError("the disk is full")


@pytest.mark.parametrize("save", [fail, lambda state, path: False], ids=["raises", "returns False"])
def test_a_save_that_fails_is_a_checkpoint_error_and_nothing_changes(save, tmp_path):
    scheduler, _ = scheduler_at(save_callback=save, checkpoint_dir=tmp_path)
    before = frozen(scheduler)
    with pytest.raises(CheckpointError, match=r"the disk is full|returned False"):
        scheduler.save_checkpoint()
    assert frozen(scheduler) == before
    with pytest.raises(FileNotFoundError):
        scheduler.load_checkpoint(tmp_path)


def test_a_scheduled_save_that_fails_warns_and_training_goes_on(tmp_path):
    with pytest.warns(RuntimeWarning, match=r"checkpoint not saved, training goes on: .*the disk is full"):
        scheduler, _ = scheduler_at(11, save_callback=fail, checkpoint_dir=tmp_path, checkpoint_every=5)
    assert scheduler.global_step == 11


def test_saving_without_a_directory_says_how_to_get_one():
    scheduler, _ = scheduler_at(checkpoint_dir=None)
    with pytest.raises(CheckpointError, match="create it with a checkpoint_dir"):
        scheduler.save_checkpoint()


def test_a_state_callback_that_raises_warns_once_and_training_goes_on():
    calls = []

    def state():
        calls.append(1)
        if len(calls) in (1, 3, 4):
            raise OSError("the disk is full")
        return {"w": np.ones(2)}

    scheduler = R8Scheduler(
        64, 8, num_epochs=1, use_curses=False, checkpoint_dir=None, state_callback=state, load_callback=lambda s: None,
        backup_every=1,
    )  # fmt: skip
    with pytest.warns(RuntimeWarning, match="no backup was taken, training goes on.*the disk is full") as warned:
        assert sum(scheduler.update_with_loss(1.0).accepted for _ in scheduler.batch_iterator()) == 8
    assert len(warned) == 1
    assert len(calls) >= 8


@pytest.mark.parametrize("load", [fail, lambda source: False], ids=["raises", "returns False"])
def test_a_rollback_that_fails_is_one_error_that_says_why_and_the_loss_stays_out(load):
    scheduler = R8Scheduler(32, 8, num_epochs=2, use_curses=False, checkpoint_dir=None, load_callback=load)
    scheduler.update_cpu_backup({"w": np.ones(2)})

    def train():
        for batch in scheduler.batch_iterator():
            scheduler.update_with_loss(NAN if batch.step >= 2 else np.ones(8))

    with pytest.raises(TrainingDiverged, match=r"load_callback failed: .*(the disk is full|returned False)"):
        train()
    assert scheduler.catalog.num_seen == 16
    assert np.isfinite(scheduler.catalog.expected_loss).all()


def test_losses_that_stay_not_finite_end_the_run_with_the_batches_to_blame():
    scheduler = R8Scheduler(400, 8, num_epochs=1, use_curses=False, checkpoint_dir=None)
    seen = []

    def train():
        for batch in scheduler.batch_iterator():
            seen.append(tuple(batch.indices.tolist()))
            scheduler.update_with_loss(NAN)

    with pytest.raises(TrainingDiverged, match="faulty losses in a row and nothing to restore from") as caught:
        train()
    assert caught.value.batches[-1] == seen[-1]
    assert 1 < len(seen) < 50
    assert scheduler.catalog.num_seen == 0


def test_a_backup_that_cannot_be_copied_is_refused_and_nothing_changes():
    scheduler, _ = scheduler_at()
    before = frozen(scheduler)
    with pytest.raises(TypeError):
        scheduler.update_cpu_backup({"w": (x for x in "ab")})
    assert frozen(scheduler) == before


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_scheduler_is_not_copied_and_says_what_to_do(copier):
    scheduler, _ = scheduler_at()
    before = frozen(scheduler)
    with pytest.raises(TypeError, match=r"save state_dict\(\), and give it to load_state_dict of another one"):
        copier(scheduler)
    assert frozen(scheduler) == before


# Restoring -------------------------------------------------------------------------------------

OTHER_RUNS = {
    "num_samples": {"num_samples": 31},
    "strategy": {"strategy": "uniform"},
    "seed": {"seed": 1},
    "drop_last": {"drop_last": True},
}


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_the_state_of_another_run_is_refused_and_nothing_changes(name):
    state = scheduler_at()[0].state_dict()
    arguments = {"num_samples": 32, "batch_size": 8, "num_epochs": 3, "use_curses": False, "checkpoint_dir": None}
    other = R8Scheduler(**(arguments | OTHER_RUNS[name]))
    before = frozen(other)
    with pytest.raises(ConfigError, match=f"{name}: the state was saved with"):
        other.load_state_dict(state)
    assert frozen(other) == before


def test_all_differences_to_another_run_are_listed():
    other = R8Scheduler(31, 8, num_epochs=3, use_curses=False, checkpoint_dir=None, strategy="uniform", seed=1)
    with pytest.raises(ConfigError) as caught:
        other.load_state_dict(scheduler_at()[0].state_dict())
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["num_samples", "strategy", "seed"]


def broken_states():
    state = scheduler_at()[0].state_dict()
    yield "None", None
    yield "a list", [state]
    yield "empty", {}
    for name in sorted(state.keys() - {"version", "measured", "keys"}):  # older versions have none of these
        yield f"without {name}", {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(("name", "state"), [pytest.param(*case, id=case[0]) for case in broken_states()])
def test_a_state_that_is_none_is_refused_and_nothing_changes(name, state):
    scheduler, _ = scheduler_at(5)
    before = frozen(scheduler)
    with pytest.raises(ConfigError, match="state"):
        scheduler.load_state_dict(state)
    assert frozen(scheduler) == before
