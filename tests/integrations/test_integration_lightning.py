"""R8Scheduler in Lightning: resumes to the bit, survives NaN, sets the learning rate."""

from __future__ import annotations

import contextlib
import csv
import os
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from learnit_r8 import R8Scheduler, TrainingDiverged
from learnit_r8.errors import ConfigError
from learnit_r8.events import RolledBack, SpikeSeen
from tests.backup_watch import BackupWatch, always, check_diverged, check_survival, fingerprint, random_steps

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers import CSVLogger

    from learnit_r8.integrations.lightning import R8Callback, R8DataModuleMixin, weighted

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own, of its dependencies

SAMPLES, BATCH = 96, 8


@pytest.fixture(autouse=True)
def _quiet():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Data(R8DataModuleMixin, lightning.LightningDataModule):
    def __init__(self, workers: int = 0) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        x = torch.from_numpy(rng.normal(size=(SAMPLES, 4)).astype(np.float32))
        self.train = TensorDataset(torch.arange(SAMPLES), x, (x[:, 0] > 0).long() + (x[:, 1] > 1).long())
        self.workers = workers

    def train_dataloader(self):
        return self.r8_dataloader(self.train, num_workers=self.workers)


class Model(lightning.LightningModule):
    def __init__(self, watch: BackupWatch | None = None, per_sample: bool = True) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))
        self.watch, self.per_sample = watch, per_sample
        self.seen: list[list[int]] = []
        self.rates: list[float] = []

    def training_step(self, batch, batch_idx):
        numbers, x, y = batch
        self.seen.append(numbers.tolist())
        losses = nn.functional.cross_entropy(self.net(x), y, reduction="none")
        if self.watch is not None:
            losses = losses * self.watch.factor()
        return {"loss": losses.mean(), "r8_losses": losses} if self.per_sample else losses.mean()

    def on_before_zero_grad(self, optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def scheduler_for(**options) -> R8Scheduler:
    options = {"num_epochs": 3, "initial_lr": 0.02, "checkpoint_dir": None, "ui": "off", "backup_every": 4} | options
    return R8Scheduler(SAMPLES, BATCH, **options)


class StopAt(lightning.Callback):
    """Saves a checkpoint after so many batches, and ends."""

    def __init__(self, batches: int, path) -> None:
        self.batches, self.path, self.count = batches, str(path), 0

    def on_train_batch_end(self, trainer, *args) -> None:
        self.count += 1
        if self.count == self.batches:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


def fit(model, scheduler, *more, workers=0, accumulate=1, ckpt=None, **options):
    trainer = lightning.Trainer(
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        accumulate_grad_batches=accumulate,
        callbacks=[*more, R8Callback(scheduler)],
        **{"max_epochs": -1, "logger": False} | options,
    )
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        trainer.fit(model, datamodule=Data(workers), ckpt_path=ckpt, weights_only=True)
    return trainer


def model_for(seed: int = 0, **options) -> Model:
    torch.manual_seed(seed)
    return Model(**options)


@pytest.mark.parametrize(
    ("workers", "accumulate", "stop_at"),
    [(0, 1, 17), pytest.param(2, 4, 16, marks=pytest.mark.slow), pytest.param(0, 4, 12, marks=pytest.mark.slow)],
)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, workers, accumulate, stop_at):
    whole = model_for()
    scheduler = scheduler_for()
    fit(whole, scheduler, workers=workers, accumulate=accumulate)
    assert scheduler.global_step == 36
    first = model_for()
    fit(first, scheduler_for(), StopAt(stop_at, tmp_path / "run.ckpt"), workers=workers, accumulate=accumulate)
    second = model_for(seed=5)
    fit(second, scheduler_for(), workers=workers, accumulate=accumulate, ckpt=str(tmp_path / "run.ckpt"))
    assert first.seen[:stop_at] + second.seen == whole.seen
    assert fingerprint(second.state_dict()) == fingerprint(whole.state_dict())


def test_the_learning_rate_is_the_schedulers_and_each_sample_is_used_once_an_epoch():
    model, scheduler = model_for(), scheduler_for()
    trainer = fit(model, scheduler)
    assert scheduler.catalog.uses.tolist() == [3] * SAMPLES
    assert len(model.rates) == 36
    assert max(model.rates) == pytest.approx(0.02, rel=0.05)
    assert model.rates[-1] < 0.002
    assert trainer.current_epoch == 3


def test_one_loss_per_batch_is_reported_undivided_when_gradients_accumulate():
    class Losses:
        losses: list[float] = []  # noqa: RUF012

        def record(self, event) -> None:
            if type(event).__name__ == "LossReported":
                self.losses.append(event.loss)

    heard = Losses()
    fit(model_for(per_sample=False), scheduler_for(num_epochs=1, sinks=[heard]), accumulate=5)
    assert len(heard.losses) == 12
    assert 0.8 < heard.losses[0] < 1.6  # about log(3)


@pytest.mark.parametrize(
    ("workers", "accumulate", "seed"),
    [(0, 1, 0), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(2, 1, 1), (0, 4, 2), (2, 4, 3)])],
)
def test_nan_at_random_steps_ends_finite_and_rollbacks_bring_back_the_backup(workers, accumulate, seed):
    watch = BackupWatch(random_steps(seed), scheduler_for, num_epochs=17)
    fit(model_for(watch=watch), watch.scheduler, workers=workers, accumulate=accumulate)
    check_survival(watch.findings(), accumulation=accumulate)


def test_more_nan_than_backups_can_undo_ends_in_an_error_that_names_samples():
    watch = BackupWatch(always, scheduler_for)
    with pytest.raises(TrainingDiverged) as caught:
        fit(model_for(watch=watch), watch.scheduler)
    check_diverged(str(caught.value))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_that_mixed_precision_left_out_is_no_fault(accumulate):
    from lightning.pytorch.plugins import MixedPrecision

    class Overflowing(Model):
        """The gradients of some micro-batches overflow; their losses do not."""

        backwards = 0

        def on_after_backward(self) -> None:
            if self.backwards in (4, 13, 29):
                next(self.parameters()).grad.fill_(float("inf"))
            self.backwards += 1

    class Listener(list):
        record = list.append

    heard = Listener()
    torch.manual_seed(0)
    scheduler = scheduler_for(sinks=[heard])
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16.0))
    fit(Overflowing(), scheduler, accumulate=accumulate, plugins=[precision])
    reports = [event for event in heard if type(event).__name__ == "LossReported"]
    skipped = {event.step // accumulate for event in reports if event.verdict == "skipped"}
    assert skipped == {step // accumulate for step in (4, 13, 29)}
    assert scheduler.global_step == len(reports) == 36
    assert not any(isinstance(event, (SpikeSeen, RolledBack)) for event in heard)
    assert precision.scaler.get_scale() == 2.0


def test_a_loader_that_does_not_draw_from_the_scheduler_is_refused():
    class Plain(Data):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(self.train, batch_size=8)

    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[R8Callback(scheduler_for())],
    )  # fmt: skip
    with pytest.raises(ConfigError, match="r8_dataloader"):
        trainer.fit(model_for(), datamodule=Plain())


def test_options_that_the_scheduler_decides_are_refused():
    class Wrong(Data):
        def train_dataloader(self):
            return self.r8_dataloader(TensorDataset(torch.zeros(3)), batch_size=8, shuffle=True)

    data = Wrong()
    data.trainer = lightning.Trainer(logger=False, accelerator="cpu", callbacks=[R8Callback(scheduler_for())])
    with pytest.raises(ConfigError, match=r"batch_size, shuffle[\s\S]*3 samples"):
        data.train_dataloader()


def test_something_else_than_a_scheduler_is_refused():
    with pytest.raises(ConfigError, match="int"):
        R8Callback(3)


@pytest.mark.slow
def test_two_processes_share_one_plan(tmp_path):
    import subprocess
    import sys

    script = tmp_path / "train.py"
    script.write_text(TWO)
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [np.load(tmp_path / f"rank{rank}.npz") for rank in range(2)]
    assert rows[0]["uses"].tolist() == rows[1]["uses"].tolist() == [2] * SAMPLES
    assert rows[0]["weights"].tobytes() == rows[1]["weights"].tobytes()
    assert sorted([*rows[0]["seen"], *rows[1]["seen"]]) == sorted([*range(SAMPLES)] * 2)


TWO = """
import sys
import numpy as np, torch
import lightning.pytorch as pl
from torch.utils.data import TensorDataset
from learnit_r8 import R8Scheduler
from learnit_r8.integrations.distributed import rank_arguments
from learnit_r8.integrations.lightning import R8Callback, R8DataModuleMixin

class Data(R8DataModuleMixin, pl.LightningDataModule):
    def train_dataloader(self):
        return self.r8_dataloader(TensorDataset(torch.arange(96), torch.linspace(-1, 1, 96)[:, None]))

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.seen = torch.nn.Linear(1, 1), []

    def training_step(self, batch, batch_idx):
        numbers, x = batch
        self.seen += numbers.tolist()
        losses = ((self.net(x) - 2 * x) ** 2).mean(1)
        return {"loss": losses.mean(), "r8_losses": losses}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

def make():
    return R8Scheduler(96, 16, num_epochs=2, checkpoint_dir=None, ui="off", **rank_arguments())

if __name__ == "__main__":
    callback, model = R8Callback(make), Model()
    pl.Trainer(max_epochs=-1, accelerator="cpu", devices=2, strategy="ddp", use_distributed_sampler=False, logger=False,
               enable_checkpointing=False, enable_progress_bar=False, callbacks=[callback]).fit(model, Data())
    weights = np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])
    np.savez(f"{sys.argv[1]}/rank{torch.distributed.get_rank()}.npz", uses=callback.scheduler.catalog.uses,
             weights=weights, seen=model.seen)
"""


# Lightning's own parts -------------------------------------------------------------------


class Rates(Model):
    """Notes the rates of all groups within the step, and uses another optimizer than Model."""

    def __init__(self, make) -> None:
        super().__init__()
        self.make, self.within = make, []

    def training_step(self, batch, batch_idx):
        self.within.append([float(group["lr"]) for one in self.trainer.optimizers for group in one.param_groups])
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return self.make(self)


CONSTANT = {"scheduler_mode": "constant", "warmup_proportion": 0.0}


def test_a_second_part_of_the_model_that_is_unfrozen_keeps_its_share_of_the_rate():
    class Two(Rates):
        def __init__(self, make) -> None:
            super().__init__(make)
            self.backbone = nn.Linear(4, 4)

    finetuning = lightning.callbacks.BackboneFinetuning(
        unfreeze_backbone_at_epoch=1, backbone_initial_ratio_lr=0.1, lambda_func=lambda epoch: 2.0, verbose=False
    )
    model = Two(lambda it: torch.optim.SGD(it.net.parameters(), lr=0.1))
    scheduler = scheduler_for(**CONSTANT | {"warmup_proportion": 0.5})
    fit(model, scheduler, finetuning)
    shares = [row[1] / row[0] for row in model.within if len(row) == 2]
    assert len(shares) == 24
    # The callback's numbers are shares of the rate at an epoch's start, which rises in the warm-up.
    assert shares[:12] == pytest.approx([shares[0]] * 12)
    assert 0.08 < shares[0] < 0.11
    assert shares[12:] == pytest.approx([shares[12]] * 12)


def test_two_optimizers_have_the_rates_that_they_were_given():
    class Two(Rates):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            output = super().training_step(batch, batch_idx)
            self.manual_backward(output["loss"])
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()
            return output

    model = Two(lambda it: [torch.optim.SGD(it.net[k].parameters(), lr=lr) for k, lr in ((0, 0.005), (3, 0.02))])
    fit(model, scheduler_for(**CONSTANT))
    assert model.within[-1] == pytest.approx([0.005, 0.02])


def test_a_plateau_lowers_the_rest_of_the_schedule():
    def make(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=10.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "always_one"}}

    class Logs(Rates):
        def on_train_epoch_end(self) -> None:
            self.log("always_one", torch.ones(()))

    model = Logs(make)
    fit(model, scheduler_for(**CONSTANT))
    assert [model.within[at][0] for at in (0, 12, 24)] == pytest.approx([0.02, 0.002, 0.0002])


def test_a_monitor_sees_the_rate_that_the_step_uses(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    model, logger = Model(), CSVLogger(tmp_path)
    monitor = lightning.callbacks.LearningRateMonitor("step")
    fit(model, scheduler_for(), monitor, logger=logger, log_every_n_steps=1)
    text = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = text[0].split(",").index("lr-AdamW")
    logged = [float(line.split(",")[column]) for line in text[1:] if line.split(",")[column]]
    assert logged == pytest.approx(model.rates)
    assert len(set(logged)) > 30


def test_a_monitor_of_epochs_sees_the_rate_of_their_first_steps(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    model, monitor = Model(), lightning.callbacks.LearningRateMonitor("epoch")
    fit(model, scheduler_for(), monitor, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    text = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = text[0].split(",").index("lr-AdamW")
    logged = [float(line.split(",")[column]) for line in text[1:] if line.split(",")[column]]
    assert logged == pytest.approx(model.rates[::12])


def test_a_checkpoint_goes_on_with_the_goals_that_are_given_now(tmp_path):
    first = Model()
    fit(first, scheduler_for(), StopAt(15, tmp_path / "c.ckpt"))
    model = Model()
    goals = {"num_epochs": None, "num_steps": 40, "initial_lr": 0.002, "scheduler_mode": "constant"}
    scheduler = scheduler_for(**goals, warmup_proportion=0.0)
    fit(model, scheduler, ckpt=str(tmp_path / "c.ckpt"))
    assert scheduler.global_step == 40
    assert len(model.seen) == 40 - 15
    assert model.rates == pytest.approx([0.002] * len(model.rates))


def test_averaged_weights_get_batch_norm_statistics_of_all_data_and_nothing_is_trained_on_meanwhile():
    class Normed(Rates):
        def __init__(self) -> None:
            super().__init__(lambda it: torch.optim.SGD(it.net.parameters(), lr=0.1))
            self.net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
            self.starts = []

        def on_train_epoch_start(self) -> None:
            self.starts.append(self.net[1].weight.detach().clone())

    model, scheduler = Normed(), scheduler_for(num_epochs=4)
    averaging = lightning.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)
    fit(model, scheduler, averaging, max_epochs=4)
    assert scheduler.global_step == 48
    assert set(scheduler.catalog.uses.tolist()) == {4}
    assert averaging.n_averaged == 3  # Lightning counts epochs from 1
    assert torch.allclose(model.net[1].weight, torch.stack(model.starts[1:4]).mean(dim=0), atol=1e-6)
    x = Data().train.tensors[1]
    assert model.net[0].num_batches_tracked == 12
    assert torch.allclose(model.net[0].running_mean, x.mean(dim=0), atol=1e-5)


def test_accumulation_that_changes_between_epochs_keeps_losses_at_their_samples():
    scheduler, model = scheduler_for(), Model()
    fit(model, scheduler, lightning.callbacks.GradientAccumulationScheduler({0: 1, 1: 4, 2: 2}), workers=2)
    assert scheduler.global_step == 36
    assert len(model.rates) == 12 + 3 + 6
    assert set(scheduler.catalog.uses.tolist()) == {3}


def test_weights_reach_the_loss_by_one_call():
    class Weighs(Model):
        def training_step(self, batch, batch_idx):
            numbers, x, y = batch
            losses = nn.functional.cross_entropy(self.net(x), y, reduction="none")
            given = weighted(self, torch.ones(len(y)))
            batches = {tuple(one.indices.tolist()): one.weights for one in self.open()}
            assert given.tolist() == batches[tuple(numbers.tolist())].tolist()
            self.spread = max(self.spread, float(given.max() / given.min()))
            return {"loss": (losses * given).mean(), "r8_losses": losses}

    scheduler, model = scheduler_for(strategy="prioritized"), Weighs()
    model.open, model.spread = lambda: scheduler.open_batches, 1.0
    fit(model, scheduler, workers=2, accumulate=3)
    assert scheduler.global_step == 36
    assert model.spread > 1.1


@pytest.mark.parametrize(
    ("callbacks", "options", "word"),
    [
        ((), {"overfit_batches": 2}, "overfit_batches=2 trains on the same"),
        ((), {"min_epochs": 4}, "min_epochs=4 asks for more than R8Scheduler's budget of 3"),
        ((), {"min_steps": 37}, "min_steps=37 asks for more than R8Scheduler's budget of 36"),
        ((lightning.callbacks.StochasticWeightAveraging(0.1),), {}, r"give Trainer\(max_epochs=3\)"),
        ((lightning.callbacks.StochasticWeightAveraging(0.1),), {"max_epochs": 9}, r"give Trainer\(max_epochs=3\)"),
    ],
)
def test_what_goes_against_the_scheduler_is_refused_by_name(callbacks, options, word):
    with pytest.raises(ConfigError, match=word):
        fit(Model(), scheduler_for(), *callbacks, **options)


def test_the_tuner_is_told_what_takes_its_place():
    from lightning.pytorch.tuner import Tuner

    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[R8Callback(scheduler_for())], enable_checkpointing=False,
    )  # fmt: skip
    model = Model()
    model.lr = 0.1
    with pytest.raises(ConfigError, match=r"auto_find_lr=True"):
        Tuner(trainer).lr_find(model, datamodule=Data(), num_training=5)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"max_epochs": 2}, "max_epochs=2"),
        ({"max_steps": 5}, r"max_steps=5 .*num_steps=5"),
        ({"max_steps": 99}, "max_steps=99 is not reached"),
        ({"limit_train_batches": 0.5}, "limit_"),
    ],
)
def test_an_end_before_the_schedulers_is_said(options, word):
    with pytest.warns(RuntimeWarning, match=word):
        fit(Model(), scheduler_for(), **options)


def test_a_second_fit_of_a_spent_scheduler_says_so():
    scheduler, model = scheduler_for(num_epochs=1), Model()
    fit(model, scheduler)
    with pytest.warns(RuntimeWarning, match="nothing is left to train, the run has spent its budget"):
        fit(model, scheduler)
    assert len(model.seen) == 12


def test_lightnings_own_loggers_get_the_schedulers_numbers(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(model_for(), scheduler_for(num_epochs=2), logger=logger, log_every_n_steps=5)
    with open(tmp_path / "lightning_logs" / "version_0" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.get("r8/seconds")]
    assert [int(row["step"]) for row in rows][:4] == [4, 9, 14, 19]
    assert all(float(row["r8/rollbacks"]) == 0 for row in rows)
    assert float(rows[-1]["r8/expected_loss"]) > 0
