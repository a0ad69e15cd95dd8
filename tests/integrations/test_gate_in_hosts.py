"""The gate before the step within the Hugging Face Trainer and Lightning, which take the steps themselves."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from learnit_r8 import R8Scheduler, events
from learnit_r8.errors import ConfigError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("lightning.pytorch")
    transformers = pytest.importorskip("transformers")

    from learnit_r8.integrations.huggingface import R8Trainer
    from learnit_r8.integrations.lightning import R8Callback, R8DataModuleMixin

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own, of its dependencies

SAMPLES, BATCH, EPOCHS = 160, 4, 3
BAD, TWO_BAD = {60, 90, 91}, {45, 50}  # optimizer steps whose gradients explode, on one rank and on two


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Ears(list):
    def record(self, event):
        self.append(event)

    def of(self, kind):
        return [event for event in self if isinstance(event, kind)]


class Net(nn.Module):
    """Two layers whose gradients explode at some optimizer steps; `step` counts them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.step, self.bad, self.by = 0, set(), 1e4
        for parameter in self.parameters():
            parameter.register_hook(lambda grad: grad * self.by if self.step in self.bad else grad)

    def losses(self, x, y):
        return (self.head(torch.tanh(self.body(x)))[:, 0] - y).square()


def data():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(SAMPLES, 4)).astype(np.float32))
    return x, torch.sin(x.sum(1)) + 0.3 * torch.from_numpy(rng.normal(size=SAMPLES).astype(np.float32))


def scheduler_for(**options):
    ears = Ears()
    options = {"num_epochs": EPOCHS, "initial_lr": 0.02, "checkpoint_dir": None, "ui": "off"} | options
    return R8Scheduler(SAMPLES, options.pop("batch_size", BATCH), sinks=[ears], **options), ears


class Watched(torch.optim.AdamW):
    """Counts the steps that are really taken, and keeps the norm of the gradient that each got."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.got = []

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.got.append(float(torch.nn.utils.get_total_norm(grads)))
        super().step()
        return loss


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.x, self.y = data()

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return {"x": self.x[index], "labels": self.y[index]}


class ForTrainer(Net):
    def forward(self, x, labels):
        losses = self.losses(x, labels)
        return {"loss": losses.mean(), "losses": losses}


class Counter(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.step = state.global_step


class Sampled(R8Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        self.note_sample_losses(outputs["losses"])
        loss = outputs["losses"].mean()
        return (loss, outputs) if return_outputs else loss


def in_trainer(folder, scheduler, bad=(), accumulate=1, check=False, scaler=None, **options):
    model = ForTrainer()
    model.bad = set(bad)
    args = transformers.TrainingArguments(
        output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1,
        gradient_accumulation_steps=accumulate, **options,
    )  # fmt: skip
    optimizer = Watched(model.parameters(), lr=0.02)
    trainer = Sampled(
        model, args, train_dataset=Rows(), scheduler=scheduler, callbacks=[Counter()], optimizers=(optimizer, None),
        check=check,
    )  # fmt: skip
    if scaler is not None:  # Accelerate makes one on a GPU only
        trainer.accelerator.scaler, trainer.accelerator.native_amp = scaler, True
        trainer.accelerator.state._mixed_precision = "fp16"
    trainer.train()
    return trainer, optimizer, model


class ForLightning(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def training_step(self, batch, batch_idx):
        self.net.step = self.trainer.global_step
        losses = self.net.losses(batch["x"], batch["labels"])
        return {"loss": losses.mean(), "r8_losses": losses}

    def configure_optimizers(self):
        self.made = Watched(self.parameters(), lr=0.02)
        return self.made


class Loader(R8DataModuleMixin, lightning.LightningDataModule):
    def train_dataloader(self):
        return self.r8_dataloader(Rows())


def in_lightning(folder, scheduler, bad=(), accumulate=1, check=False, module=None, **options):
    module = module or ForLightning()
    if hasattr(module, "net"):
        module.net.bad = set(bad)
    trainer = lightning.Trainer(
        accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, accumulate_grad_batches=accumulate, logger=False, max_epochs=-1,
        default_root_dir=str(folder), callbacks=[R8Callback(scheduler, check=check)],
        **options,
    )  # fmt: skip
    trainer.fit(module, datamodule=Loader())
    return trainer, module.made, getattr(module, "net", module)


HOSTS = pytest.mark.parametrize("host", [in_trainer, in_lightning])


def global_step(host, trainer):
    return trainer.state.global_step if host is in_trainer else trainer.global_step


@HOSTS
@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_that_explode_are_left_out_and_all_counters_stay_right(tmp_path, host, accumulate):
    epochs = EPOCHS * accumulate
    scheduler, ears = scheduler_for(num_epochs=epochs, clip="auto")
    trainer, optimizer, _ = host(tmp_path, scheduler, BAD, accumulate, check=True)
    steps = EPOCHS * SAMPLES // BATCH
    assert global_step(host, trainer) == steps
    assert scheduler.global_step == steps * accumulate
    assert len(optimizer.got) == steps - len(BAD)
    assert max(optimizer.got) < 100
    assert {int(state["step"]) for state in optimizer.state.values()} == {steps - len(BAD)}
    told = ears.of(events.SpikeSeen)
    assert [event.step // accumulate for event in told] == sorted(k for k in BAD for _ in range(accumulate))
    assert all(event.verdict == "skipped" for event in told)
    assert all("a gradient's norm of" in event.reason for event in told)
    assert not ears.of(events.RolledBack)
    rates = [event.lr for event in ears.of(events.LossReported)]
    assert len(set(rates)) > steps // 2  # the schedule goes on
    assert {event.name for event in ears.of(events.MetricLogged)} >= {"grad_norm", *(
        ("grad_norm/body", "grad_norm/head")
    )}  # fmt: skip
    assert "step" not in vars(optimizer)


@HOSTS
def test_a_run_in_which_nothing_is_left_out_is_the_same_to_the_bit(tmp_path, host):
    _, _, plain = host(tmp_path, scheduler_for(num_epochs=1)[0], **no_clip(host))
    _, _, asked = host(tmp_path, scheduler_for(num_epochs=1)[0], check=True, **no_clip(host))
    for before, after in zip(plain.parameters(), asked.parameters(), strict=True):
        assert torch.equal(before, after)


def no_clip(host):
    return {"max_grad_norm": 0.0} if host is in_trainer else {}


@HOSTS
def test_a_clip_that_is_a_number_holds_exactly(tmp_path, host):
    scheduler, ears = scheduler_for(num_epochs=1, clip=0.5)
    _, optimizer, _ = host(tmp_path, scheduler)
    norms = [event.value for event in ears.of(events.MetricLogged) if event.name == "grad_norm"]
    assert len(norms) == len(optimizer.got) == SAMPLES // BATCH
    assert min(norms) < 0.5 < max(norms)
    for before, after in zip(norms, optimizer.got, strict=True):
        assert after == pytest.approx(min(before, 0.5), rel=1e-4)


@HOSTS
def test_what_clips_beside_is_refused_by_name(tmp_path, host):
    name, options = ("max_grad_norm", {"max_grad_norm": 0.3}) if host is in_trainer else (
        "gradient_clip_val", {"gradient_clip_val": 0.3}
    )  # fmt: skip
    with pytest.raises(ConfigError, match=rf"{name}=0.3 of the Trainer and clip= .*both clip: give one"):
        host(tmp_path, scheduler_for(clip=1.0)[0], **options)
    scheduler, _ = scheduler_for(num_epochs=1)  # alone it counts, also where steps are checked
    _, optimizer, _ = host(tmp_path, scheduler, check=True, **options)
    assert max(optimizer.got) == pytest.approx(0.3, rel=1e-4)


def test_a_scaler_goes_on_over_steps_that_are_left_out_and_its_overflows_are_no_faults(tmp_path):
    scheduler, ears = scheduler_for(clip="auto")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000, backoff_factor=2.0**-40)
    trainer, optimizer, _ = in_trainer(tmp_path, scheduler, BAD, check=True, scaler=scaler)
    assert [event.step for event in ears.of(events.SpikeSeen)] == sorted(BAD)
    skipped = [event.step for event in ears.of(events.LossReported) if event.verdict == "skipped"]
    overflows = sorted(set(skipped) - BAD)
    assert overflows
    assert overflows == list(range(len(overflows)))
    assert scaler.get_scale() == 2.0 ** (127 - 40 * len(overflows))
    assert len(optimizer.got) == trainer.state.global_step - len(skipped)
    assert max(optimizer.got) < 100
    parts = [event for event in ears.of(events.MetricLogged) if event.name == "grad_norm/head"]
    assert all(event.value < 1e6 for event in parts)


def test_lightning_s_scaler_goes_on_over_steps_that_are_left_out(tmp_path):
    from lightning.pytorch.plugins.precision import MixedPrecision

    scheduler, ears = scheduler_for(clip="auto")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000, backoff_factor=2.0**-40)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trainer, optimizer, _ = in_lightning(tmp_path, scheduler, BAD, check=True, plugins=[plugin])
    skipped = [event.step for event in ears.of(events.LossReported) if event.verdict == "skipped"]
    assert [event.step for event in ears.of(events.SpikeSeen)] == sorted(BAD)
    assert len(optimizer.got) == trainer.global_step - len(skipped)
    assert len(skipped) > len(BAD)
    assert max(optimizer.got) < 100


def test_what_lightning_cannot_do_right_is_refused_by_name(tmp_path):
    class Manual(ForLightning):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    class Clips(ForLightning):
        def configure_gradient_clipping(self, *args, **kwargs):
            pass

    class Second(ForLightning):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(ConfigError, match=r"call scheduler\.check before optimizer\.step"):
        in_lightning(tmp_path, scheduler_for()[0], check=True, module=Manual())
    with pytest.raises(ConfigError, match="configure_gradient_clipping of the module"):
        in_lightning(tmp_path, scheduler_for(clip=1.0)[0], module=Clips())
    with pytest.raises(ConfigError, match="LBFGS"):
        in_lightning(tmp_path, scheduler_for()[0], check=True, module=Second())


def test_a_fit_leaves_module_and_optimizer_as_they_were(tmp_path):
    module = ForLightning()
    scheduler, _ = scheduler_for(num_epochs=1)
    in_lightning(tmp_path, scheduler, check=True, module=module)
    assert "training_step" not in vars(module)
    assert "step" not in vars(module.made)


def test_nan_losses_are_left_out_before_they_reach_the_weights(tmp_path):
    scheduler, ears = scheduler_for(num_epochs=2)
    model_bad = {20}
    trainer, optimizer, model = in_lightning(tmp_path, scheduler, (), check=True, module=Spoiled(model_bad))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert len(optimizer.got) == trainer.global_step - 1
    assert not ears.of(events.RolledBack)
    assert all(map(math.isfinite, optimizer.got))


class Spoiled(ForLightning):
    def __init__(self, bad):
        super().__init__()
        self.spoiled = bad

    def training_step(self, batch, batch_idx):
        made = super().training_step(batch, batch_idx)
        by = math.nan if self.trainer.global_step in self.spoiled else 1.0
        return {name: loss * by for name, loss in made.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trainer", "lightning"])
def test_two_ranks_leave_out_the_same_steps_and_stay_equal(tmp_path, kind):
    driver = Path(__file__).parents[1] / "gate_driver.py"
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", str(driver), str(tmp_path), kind]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "R8_UI": "off"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=200, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    steps = 6 * SAMPLES // 8 // 2
    assert (first["host"], first["global_step"], first["steps"]) == (steps, 2 * steps, steps - len(TWO_BAD))
    assert first["skipped"] == [2 * k + micro for k in sorted(TWO_BAD) for micro in (0, 1)]
    assert first["highest"] < 100
