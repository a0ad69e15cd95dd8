"""What is measured and acted on: early stopping, plateaus, the way back to the best, averaged models, evaluations."""

import json
import math
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from learnit_r8 import Checkpoints, ConfigError, Evaluation, R8Scheduler, events
from learnit_r8.schedules import plateau

BARE = {"ui": "off", "checkpoint_dir": None, "strategy": "uniform", "warmup_proportion": 0.0}


class Heard:
    """A sink that keeps what it hears."""

    def __init__(self):
        self.events = []

    def record(self, event):
        self.events.append(event)

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def notices(self):
        return [event.message for event in self.of(events.Notice)]


def sequence(rng, length=30):
    """Values that fall, with noise, ties, stretches of no progress, and here and there one that is not finite."""
    values = 2.0 * np.exp(-np.arange(length) / rng.uniform(2, 20)) + rng.normal(0, rng.choice([0.0, 0.01, 0.2]), length)
    values = np.round(values, rng.integers(1, 6))
    if rng.random() < 0.3:
        values[rng.integers(length)] = rng.choice([np.nan, np.inf])
    return np.float32(values).astype(float).tolist()  # Lightning logs float32


def trained(values, metric="val_loss", scheduler=None, **arguments):
    """Run an epoch of one batch for each value; return the rates and the scheduler."""
    rates, heard = [], Heard()
    scheduler = scheduler or R8Scheduler(4, 4, num_epochs=len(values), sinks=[heard], **{**BARE, **arguments})
    with scheduler:
        for epoch in scheduler.epoch_iterator():
            for _, lr in scheduler.batch_iterator():
                rates.append(lr)
                scheduler.update_with_loss(1.0)
            scheduler.log(**{metric: values[epoch]})
    return rates, scheduler, heard


# Against the frameworks --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(50))
def test_a_plateau_is_that_of_torch(seed):
    import torch

    rng = np.random.default_rng(seed)
    rule = {
        "mode": str(rng.choice(["min", "max"])), "factor": float(rng.uniform(0.05, 0.9)),
        "patience": int(rng.integers(0, 6)), "threshold": float(rng.choice([0.0, 1e-4, 0.05])),
        "threshold_mode": str(rng.choice(["rel", "abs"])), "cooldown": int(rng.integers(0, 4)),
        "min_lr": float(rng.choice([0.0, 1e-3])),
    }  # fmt: skip
    values = sequence(rng, 60)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    theirs, expected = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **rule), []
    for value in values:
        expected.append(optimizer.param_groups[0]["lr"])
        theirs.step(value)
    rates, _, _ = trained(values, initial_lr=0.1, scheduler_mode=plateau(**rule))
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


def rule_of(rng):
    rule = {
        "min_delta": float(np.float32(rng.choice([0.0, 0.0123457, 0.1123457]))),
        "check_finite": bool(rng.random() < 0.7),
    }
    rule["mode"] = str(rng.choice(["min", "min", "max"]))
    if rng.random() < 0.3:
        rule["stopping_threshold" if rng.random() < 0.5 else "divergence_threshold"] = float(rng.choice([0.3, 1.5]))
    return rule, int(rng.integers(1, 6))


def ours(values, rule, patience, folder):
    """Return after how many values the run stops, and which of them is the best checkpoint's."""
    points = Checkpoints(folder, keep=1, keep_best=("val_loss", rule["mode"]))
    evaluation = Evaluation(stop_after=patience, **rule)
    rates, scheduler, _ = trained(values, evaluation=evaluation, checkpoints=points, checkpoint_dir="./checkpoints")
    best = scheduler.best_checkpoint
    return len(rates), None if best is None else int(best.name.split("-")[1]) - 1


def fitted(values, rule, patience, folder):
    """Return the same of Lightning's callbacks."""
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer, self.epochs = torch.nn.Linear(1, 1), 0

        def training_step(self, batch, index):
            self.epochs += 1
            return self.layer(batch).sum()

        def validation_step(self, batch, index):
            self.log("val_loss", torch.tensor(values[self.current_epoch]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    stopping = EarlyStopping("val_loss", patience=patience, **rule)
    keeping = ModelCheckpoint(folder, "{epoch}", monitor="val_loss", mode=rule["mode"], save_top_k=1)
    trainer = pl.Trainer(
        max_epochs=len(values), callbacks=[stopping, keeping], logger=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", num_sanity_val_steps=0,
    )  # fmt: skip
    data = torch.utils.data.DataLoader(torch.zeros(1, 1))
    model = Model()
    trainer.fit(model, data, data)
    return model.epochs, int(keeping.best_model_path.split("epoch=")[1].split(".")[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(5))
def test_the_end_and_the_best_are_those_of_lightning(part, tmp_path):
    for seed in range(10 * part, 10 * part + 10):
        rng = np.random.default_rng(seed)
        values, (rule, patience) = sequence(rng, 20), rule_of(rng)
        if not math.isfinite(values[0]):
            values[0] = 2.5  # Lightning keeps a first value that is not finite as the best
        theirs = fitted(values, rule, patience, tmp_path / f"theirs{seed}")
        assert ours(values, rule, patience, tmp_path / f"ours{seed}") == theirs, (seed, rule, patience, values)


@pytest.mark.parametrize("seed", range(50))
def test_patience_is_that_of_lightning(seed):
    import torch
    from lightning.pytorch.callbacks import EarlyStopping

    rng = np.random.default_rng(1000 + seed)
    values, (rule, patience) = sequence(rng), rule_of(rng)
    theirs = EarlyStopping("val_loss", patience=patience, **rule)
    stops = [theirs._evaluate_stopping_criteria(torch.tensor(value, dtype=torch.float64))[0] for value in values]
    expected = stops.index(True) + 1 if True in stops else len(values)
    rates, _, _ = trained(values, evaluation=Evaluation(stop_after=patience, **rule))
    assert len(rates) == expected


def test_the_defaults_are_those_of_the_frameworks():
    import inspect

    import torch
    from lightning.pytorch.callbacks import EarlyStopping

    torchs = inspect.signature(torch.optim.lr_scheduler.ReduceLROnPlateau).parameters
    for name, given in inspect.signature(plateau).parameters.items():
        if name != "metric":
            assert given.default == torchs[name].default, name
    lightnings = inspect.signature(EarlyStopping).parameters
    for name in ("min_delta", "check_finite", "stopping_threshold", "divergence_threshold"):
        assert getattr(Evaluation(), name) == lightnings[name].default, name


# The schedule ------------------------------------------------------------------------------------


def test_a_plateau_follows_warm_up():
    rates, _, _ = trained([1.0] * 10, initial_lr=0.5, warmup_proportion=0.4, scheduler_mode=plateau(patience=5))
    assert rates == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5, 0.05, 0.05, 0.05])


def test_a_plateau_says_what_it_did():
    _, _, heard = trained([1.0] * 4, scheduler_mode=plateau(patience=1))
    told = "val_loss has had 2 values no better than its best of 1: the learning rate's peak goes from 0.01 to 0.001"
    assert told in heard.notices


def test_a_batch_that_is_out_gets_the_lower_rate():
    scheduler = R8Scheduler(8, 2, num_epochs=1, initial_lr=1.0, scheduler_mode=plateau(patience=0), lookahead=2, **BARE)
    batches = scheduler.batch_iterator()
    first, second = next(batches), next(batches)
    scheduler.update_with_loss(1.0, first)
    scheduler.log(val_loss=1.0)
    scheduler.log(val_loss=1.0)
    assert (second.lr, scheduler.lr_now()) == (1.0, pytest.approx(0.1))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"mode": "auto"}, "mode must be one of 'min', 'max'"),
        ({"factor": 1.0}, "factor must be below 1"),
        ({"metric": 3}, "metric must be the name of a logged number"),
    ],
)
def test_a_wrong_plateau_is_refused(wrong, said):
    with pytest.raises(ConfigError, match=said):
        plateau(**wrong)


def test_two_floors_are_refused():
    with pytest.raises(ConfigError, match=r"give plateau\(min_lr=0.001\)"):
        R8Scheduler(4, 4, num_epochs=1, min_lr=0.001, scheduler_mode=plateau(), **BARE)


# Early stopping ----------------------------------------------------------------------------------


def test_a_run_that_stops_early_has_finished_and_says_why(capfd):
    rates, _, heard = trained([1, 0.5, 0.6, 0.7, 0.4], evaluation=Evaluation(stop_after=2))
    assert len(rates) == 4
    assert heard.of(events.RunEnded)[0].reason == "finished"
    assert "val_loss has not been better than its best of 0.5 at step 2 for 2 evaluations" in heard.notices[-1]
    assert capfd.readouterr().err == f"[r8] {heard.notices[-1]}\n"


def test_a_run_can_stop_amid_an_epoch_and_stays_stopped():
    scheduler = R8Scheduler(100, 4, num_epochs=3, evaluation=Evaluation(stop_after=1), **BARE)
    for _ in scheduler.epoch_iterator():
        for _ in scheduler.batch_iterator():
            scheduler.update_with_loss(1.0)
            scheduler.log(val_loss=1.0)
    assert scheduler.global_step == 2
    again = R8Scheduler(100, 4, num_epochs=3, evaluation=Evaluation(stop_after=1), **BARE)
    again.load_state_dict(scheduler.state_dict())
    assert list(again.epoch_iterator()) == []
    more = R8Scheduler(100, 4, num_epochs=3, evaluation=Evaluation(stop_after=5), **BARE)
    more.load_state_dict(scheduler.state_dict())
    assert list(more.epoch_iterator()) == [0, 1, 2]


def test_early_epochs_do_not_count():
    rates, _, _ = trained([0.1, 1.0, 0.9, 0.95, 0.99], evaluation=Evaluation(stop_after=2, start_from_epoch=1))
    assert len(rates) == 5


def test_a_metric_that_never_comes_is_missed_once():
    _, _, heard = trained([1.0] * 6, "val_acc", evaluation=Evaluation(stop_after=2), scheduler_mode=plateau("val_f1"))
    missed = [message for message in heard.notices if "never logged" in message]
    assert missed == [
        "what is to be acted on was never logged: scheduler.log(val_loss=... and val_f1=...), or return it from "
        "Evaluation(run=...)"
    ]


def test_another_metric_begins_anew_and_says_so():
    _, first, _ = trained([1.0, 2.0], evaluation=Evaluation(stop_after=3))
    heard = Heard()
    second = R8Scheduler(
        4, 4, num_epochs=9, evaluation=Evaluation(metric="val_acc", stop_after=3), sinks=[heard], **BARE
    )
    second.load_state_dict(first.state_dict())
    assert "the run acted on val_loss before, and begins anew with val_acc" in heard.notices


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"every": None, "stop_after": -1}, "stop_after must be a whole number >= 0"),
        ({"every": "day"}, 'every must be "epoch", a number of steps'),
        ({"run": 3}, "run must be a function or None"),
        ({"min_delta": -1.0}, "min_delta must be a finite number >= 0"),
        ({"ema": object()}, "ema must have state_dict"),
    ],
)
def test_a_wrong_evaluation_is_refused(wrong, said):
    with pytest.raises(ConfigError, match=said):
        Evaluation(**wrong)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (Evaluation(metric="score"), r"say which way is better: mode=\"max\" or \"min\""),
        (Evaluation(restore_best=True), "give save_callback, load_callback, checkpoint_dir"),
        (Evaluation(run=lambda model: 1.0), "must take no arguments where no ema is given"),
        ("val_loss", "evaluation must be a learnit_r8.Evaluation"),
    ],
)
def test_what_does_not_fit_is_refused(rule, said):
    with pytest.raises(ConfigError, match=said):
        R8Scheduler(4, 4, num_epochs=1, evaluation=rule, **BARE)


# The way back ------------------------------------------------------------------------------------


class Toy:
    """A model of one number, and an average of it."""

    def __init__(self):
        self.w, self.mean = 0.0, 0.0

    def step(self, lr):
        self.w += 1.0
        self.mean += 0.5 * (self.w - self.mean)

    def save(self, path):
        with open(path, "w") as file:
            json.dump([self.w], file)

    def load(self, source):
        if isinstance(source, str):
            with open(source) as file:
                source = json.load(file)
        self.w = float(source[0])

    def capture(self):
        return [np.array(self.w)]

    # the average
    def state_dict(self):
        return {"mean": np.array(self.mean)}

    def load_state_dict(self, state):
        self.mean = float(state["mean"])


def toy_run(folder, values, model=None, **arguments):
    model, heard = model or Toy(), Heard()
    seen = iter(values)
    scheduler = R8Scheduler(
        8, 4, num_epochs=len(values), checkpoints=Checkpoints(folder, every="epoch", keep=2), save_callback=model.save,
        load_callback=model.load, state_callback=model.capture, sinks=[heard],
        evaluation=Evaluation(run=lambda ema: next(seen), ema=model, **arguments), ui="off", strategy="uniform",
    )  # fmt: skip
    with scheduler:
        for _ in scheduler.epoch_iterator():
            for _, lr in scheduler.batch_iterator():
                model.step(lr)
                scheduler.update_with_loss(1.0)
    return model, scheduler, heard


def test_the_best_comes_back_at_the_end_with_its_average(tmp_path):
    model, scheduler, _ = toy_run(tmp_path, [1.0, 0.5, 0.6, 0.7, 0.8], restore_best=True)
    assert scheduler.global_step == 10
    assert (model.w, model.mean) == (4.0, 3.0625)
    last = max(tmp_path.glob("step-*"))
    assert json.loads(next(last.glob("model*")).read_text()) == [10.0]  # the checkpoint is of the last step


def test_a_blow_up_goes_back_to_the_best_and_the_run_goes_on(tmp_path):
    values = [1.0, 0.5, 90.0, 0.4, 0.45]
    model, scheduler, heard = toy_run(tmp_path, values, divergence_threshold=10.0, on_divergence="restore")
    assert [event.to_step for event in heard.of(events.RolledBack)] == [4]
    assert (scheduler.global_step, model.w) == (10, 8.0)


def test_a_run_that_blows_up_again_and_again_ends(tmp_path):
    _, scheduler, heard = toy_run(tmp_path, [1.0] + [math.nan] * 8, on_divergence="restore")
    assert len(heard.of(events.RolledBack)) == 3
    assert scheduler.global_step == 10
    assert "stopped early: val_loss is nan again and again" in heard.notices


def test_a_rollback_brings_the_average_back(tmp_path):
    model = Toy()
    scheduler = R8Scheduler(
        400, 4, num_epochs=1, load_callback=model.load, state_callback=model.capture, backup_every=1, ui="off",
        checkpoint_dir=None, strategy="uniform", evaluation=Evaluation(ema=model),
    )  # fmt: skip
    for batch in scheduler.batch_iterator():
        model.step(batch.lr)
        broken = scheduler.global_step == 60
        if broken:
            model.w = model.mean = math.nan
        result = scheduler.update_with_loss(math.nan if broken else 1.0)
        if result.rolled_back:
            break
    assert broken
    assert 0 < model.w < 61
    assert math.isfinite(model.mean)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_averaged_model_of_torch_comes_back_to_the_bit(dtype):
    import torch
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).to(getattr(torch, dtype))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    scheduler = R8Scheduler(4, 4, num_epochs=2, evaluation=Evaluation(ema=averaged), **BARE)
    for _ in range(3):
        with torch.no_grad():
            model[0].weight += torch.randn(2, 3)
        averaged.update_parameters(model)
    state = scheduler.state_dict()
    before = {name: value.clone() for name, value in averaged.state_dict().items()}
    averaged.update_parameters(model.apply(lambda part: getattr(part, "reset_parameters", int)()))
    scheduler.load_state_dict(state)
    for name, value in averaged.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name]), name


# Evaluations -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "steps"), [("epoch", [5, 10, 15]), (4, [4, 8, 12, 15]), (7, [7, 14, 15])])
def test_evaluations_come_when_they_are_due_and_at_the_end(every, steps):
    seen = []
    scheduler = R8Scheduler(
        20, 4, num_epochs=3, evaluation=Evaluation(run=lambda: seen.append(scheduler.global_step), every=every), **BARE
    )
    for _ in scheduler.epoch_iterator():
        for _ in scheduler.batch_iterator():
            scheduler.update_with_loss(1.0)
    assert seen == steps


def test_training_and_validation_stand_side_by_side():
    heard, losses = Heard(), iter(range(1, 7))
    scheduler = R8Scheduler(12, 4, num_epochs=2, evaluation=Evaluation(run=lambda: 0.5, every=2), sinks=[heard], **BARE)
    for _ in scheduler.epoch_iterator():
        for _ in scheduler.batch_iterator():
            scheduler.update_with_loss(float(next(losses)))
    found = [(event.step, event.train_loss, event.value, event.waited) for event in heard.of(events.Evaluated)]
    assert found == [(2, 1.5, 0.5, 0), (4, 3.5, 0.5, 1), (6, 5.5, 0.5, 2)]


def test_overfitting_is_told_once_and_nothing_is_done():
    train = [2.0, 1.5, 1.2, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.1]
    values = [2.0, 1.6, 1.4, 1.3, 1.25, 1.3, 1.35, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0, 2.1]
    heard = Heard()
    scheduler = R8Scheduler(4, 4, num_epochs=15, sinks=[heard], **BARE)
    for epoch in scheduler.epoch_iterator():
        for _ in scheduler.batch_iterator():
            scheduler.update_with_loss(train[epoch])
        scheduler.log(val_loss=values[epoch])
    (said,) = heard.of(events.OverfittingSeen)
    assert said.reason.startswith(
        "overfitting since epoch 5 (step 5): val_loss went from 1.3 to 1.7 while the training"
    )
    assert scheduler.global_step == 15


# Several ranks, and kill -9 ----------------------------------------------------------------------


class World:
    def __init__(self, size):
        self.barrier, self.slots = threading.Barrier(size, timeout=20), [None] * size

    def gather(self, rank):
        def all_gather(array):
            self.slots[rank] = np.array(array)
            self.barrier.wait()
            result = np.concatenate(self.slots)
            self.barrier.wait()
            return result

        return all_gather


@pytest.mark.parametrize("amid", [False, True])
def test_ranks_act_as_rank_0_measures(amid, tmp_path):
    world, models, found, errors = World(2), [Toy(), Toy()], [None, None], []
    values = [1.0, 0.5, 90.0, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2]

    def work(rank):
        model, rates = models[rank], []
        scheduler = R8Scheduler(
            12, 4, num_epochs=10, scheduler_mode=plateau(patience=1), checkpoints=Checkpoints(tmp_path, every="epoch"),
            save_callback=model.save, load_callback=model.load, rank=rank, world_size=2, all_gather=world.gather(rank),
            evaluation=Evaluation(stop_after=6, divergence_threshold=10.0, on_divergence="restore"), ui="off",
            warmup_proportion=0.0, strategy="uniform",
        )  # fmt: skip
        with scheduler:
            for epoch in scheduler.epoch_iterator():
                for batch in scheduler.batch_iterator():
                    rates.append(batch.lr)
                    model.step(batch.lr)
                    scheduler.update_with_loss([1.0] * len(batch.indices))
                    if amid and rank == 0 and scheduler.global_step % 3 == 1:
                        scheduler.log(val_loss=values[epoch])
                if not amid:
                    scheduler.log(val_loss=values[epoch] + rank)
        found[rank] = rates, model.w, scheduler.global_step

    def guarded(rank):
        try:
            work(rank)
        except BaseException as error:
            errors.append(error)
            world.barrier.abort()

    threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert found[0] == found[1]
    rates, _, steps = found[0]
    assert steps == (23 if amid else 24)  # amid an epoch all ranks hear of it with the next report
    assert len(set(rates)) > 2


PROGRAM = """
import json, os, signal, sys
import numpy as np
from learnit_r8 import Checkpoints, Evaluation, R8Scheduler
from learnit_r8.schedules import plateau

folder, out, kills = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
data = np.random.default_rng(0).normal(size=(40, 3))
state = {"w": np.zeros(3), "mean": np.zeros(3)}

class Mean:
    def state_dict(self):
        return {"mean": state["mean"]}
    def load_state_dict(self, saved):
        state["mean"] = np.array(saved["mean"])

def save(path):
    np.save(path + ".npy", state["w"]), os.replace(path + ".npy", path)

def load(source):
    state["w"] = np.load(source) if isinstance(source, str) else source

def fatal(moment):
    if kills and kills[0] == moment:
        os.kill(os.getpid(), signal.SIGKILL)

def evaluate(mean):
    fatal(["evaluate", scheduler.global_step])
    t = scheduler.global_step
    return {"val_loss": float(np.sum((mean.state_dict()["mean"] - 0.1) ** 2) + (60.0 if t == 25 else 0.0)) + 1e-3 * t}

arguments = dict(
    save_callback=save, load_callback=load, state_callback=lambda: state["w"],
    evaluation=Evaluation(run=evaluate, every=5, stop_after=6, ema=Mean(), restore_best=True,
                          divergence_threshold=50.0, on_divergence="restore"),
)
try:
    scheduler = R8Scheduler.resume_from_checkpoint(folder, ui="off", **arguments)
except FileNotFoundError:
    scheduler = R8Scheduler(40, 4, num_epochs=20, initial_lr=0.1, ui="off", strategy="uniform",
                            scheduler_mode=plateau(patience=2, factor=0.5),
                            checkpoints=Checkpoints(folder, every=3, keep=2), **arguments)
rates = []
with scheduler:
    for epoch in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            fatal(["step", scheduler.global_step])
            gradient = state["w"] - data[batch.indices].mean(0)
            state["w"] = state["w"] - batch.lr * gradient
            state["mean"] = 0.8 * state["mean"] + 0.2 * state["w"]
            scheduler.update_with_loss(1.0 + float(np.sum(gradient**2)) * 1e-3)
            rates.append([scheduler.global_step, batch.lr])
best = scheduler.best_checkpoint
json.dump([state["w"].tolist(), state["mean"].tolist(), scheduler.global_step, best.name, rates], open(out, "w"))
"""


def killed_and_resumed(folder, kills):
    """Run the program, killed at each of the moments; return what the last process wrote."""
    folder.mkdir()
    (folder / "program.py").write_text(PROGRAM)
    out = folder / "out.json"
    for i in range(len(kills) + 1):
        line = [sys.executable, "program.py", "run", "out.json", json.dumps(kills[i : i + 1])]
        ended = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
        assert ended.returncode == (-signal.SIGKILL if i < len(kills) else 0), ended.stderr
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_kill_9_changes_no_decision(tmp_path):
    whole = killed_and_resumed(tmp_path / "whole", [])
    kills = [["step", 4], ["evaluate", 10], ["step", 16], ["evaluate", 25], ["step", 26], ["step", 33]]
    cut = killed_and_resumed(tmp_path / "cut", kills)
    assert cut[:4] == whole[:4]
    assert cut[4] == whole[4][-len(cut[4]) :]


def test_a_plateau_alone_whose_metric_never_comes_is_told_too():
    heard = Heard()
    run = R8Scheduler(
        20, 10, num_epochs=4, initial_lr=1.0, checkpoint_dir=None, ui="off", sinks=[heard],
        scheduler_mode=plateau(patience=1), warmup_proportion=0.0,
    )  # fmt: skip
    for _ in run.epoch_iterator():
        for _ in run.batch_iterator():
            run.update_with_loss(1.0)
    assert len([message for message in heard.notices if "scheduler.log(val_loss=...)" in message]) == 1


def test_a_plateau_by_its_name_is_answered_with_what_to_give():
    with pytest.raises(ConfigError, match=r"learnit_r8\.schedules\.plateau\(\)"):
        R8Scheduler(20, 10, num_epochs=4, scheduler_mode="reduce_on_plateau")
