"""The same small training with what people use now: when it goes wrong, when it is killed, and what a step costs.

python -m benchmarks.rivals [--quick] [--only "plain loop,learnit_r8"]

A network of 64-128-10 learns scikit-learn's digits: SGD with momentum, warm-up and cosine, batches of 32, a checkpoint
after each epoch of which the last three are kept. "plain loop" is a shuffling DataLoader, transformers' cosine schedule
and `torch.save`; Lightning has ModelCheckpoint and an EarlyStopping that stops at losses that are not finite, as its
manual advises; the rest is everyone's default. Every run is a process of its own. Composer runs where it is installed.

- "bad pixel", "3 bad rows", "10 bad rows": so many training images hold infinity. "bad rate", "3 bad rates": the
  learning rate is a thousand times too high for three steps, halfway or at a quarter, half and three quarters. Counted
  are the accuracy of the model that the run leaves, the finite checkpoints, and whether the program said that
  something was wrong.
- "killed": SIGKILL in the middle of an epoch, then the resume that the library offers. Counted are the steps that are
  done again and the largest difference of a weight at the end to the run that nobody killed (0: resumed to the bit).
- "step": a whole clean training, microseconds of CPU time a step, rivals in turns, medians; machines are shared.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness import columns, main, progress

BATCH, PEAK_LR, KEEP = 32, 0.05, 3
CURVES = ("plain loop", "learnit_r8")
"""Whose losses are kept, for a picture."""
CORRUPTED = [123, 7, 311, 402, 518, 640, 755, 871, 990, 1111]
TOO_HIGH, STEPS_TOO_HIGH = 1000.0, 3
FAULTS = {
    "clean": (0, 0), "bad pixel": (1, 0), "3 bad rows": (3, 0), "10 bad rows": (10, 0), "bad rate": (0, 1),
    "3 bad rates": (0, 3),
}  # fmt: skip
"""Bad training images, and stretches of a bad learning rate."""


@dataclass(frozen=True)
class Plan:
    """One run: where its files go and what is done to it."""

    folder: Path
    epochs: int
    bad_rows: int = 0
    bad_rates: int = 0
    kill_at: int = -1
    resume: bool = False
    save: bool = True

    @property
    def epoch_steps(self) -> int:
        return math.ceil(len(digits()[1]) / BATCH)

    @property
    def steps(self) -> int:
        return self.epochs * self.epoch_steps


class Digits(Dataset):
    """Training images as a map-style data set; HF wants dictionaries."""

    def __init__(self, plan: Plan, *, named: bool = False) -> None:
        self.x, self.y = (part.clone() for part in digits()[:2])
        self.named = named
        self.x[CORRUPTED[: plan.bad_rows], 20] = math.inf

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, k: int) -> Any:
        return {"x": self.x[k], "labels": self.y[k]} if self.named else (self.x[k], self.y[k])


@functools.cache
def digits() -> tuple[torch.Tensor, ...]:
    """Return training images and labels, test images and labels."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = (
        torch.tensor(part) for part in train_test_split(x / 16, y, test_size=0.3, random_state=0, stratify=y)
    )
    return x.float(), y, x_test.float(), y_test


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def accuracy(state: dict[str, torch.Tensor]) -> float:
    model, (_, _, x, y) = network(), digits()
    model.load_state_dict(state)
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


class FaultySGD(torch.optim.SGD):
    """SGD whose learning rate goes wrong, or whose process is killed, at a known step of this process."""

    def __init__(self, parameters: Any, plan: Plan) -> None:
        super().__init__(parameters, lr=PEAK_LR, momentum=0.9)
        self.plan, self.calls, self.times = plan, 0, []

    def step(self, closure: Any = None) -> Any:
        if closure is not None:  # Lightning computes the loss in here
            with torch.enable_grad():
                closure()
        if self.calls == self.plan.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        count, steps = self.plan.bad_rates, self.plan.steps
        began = [steps * (k + 1) // (count + 1) for k in range(count)]
        wrong = any(start <= self.calls < start + STEPS_TOO_HIGH for start in began)
        self.calls += 1
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] *= TOO_HIGH if wrong else 1.0
        super().step()
        self.times.append(time.process_time())
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate


def cosine(optimizer: torch.optim.Optimizer, plan: Plan) -> Any:
    from transformers import get_cosine_schedule_with_warmup

    return get_cosine_schedule_with_warmup(optimizer, plan.steps // 10, plan.steps)


@dataclass
class End:
    """How a run ended.

    Attributes:
        weights: The model that the program holds when it is over.
        optimizer: Its optimizer.
        told: Whether the program stopped, raised or reported, rather than going on in silence.
        checkpoints: The weights of each checkpoint on disk.
        losses: Of each step, where the loop is ours.
    """

    weights: dict[str, torch.Tensor]
    optimizer: FaultySGD
    told: bool
    checkpoints: list[dict[str, torch.Tensor]]
    losses: Sequence[float] = ()


def plain_loop(plan: Plan) -> End:
    model = network()
    optimizer = FaultySGD(model.parameters(), plan)
    schedule = cosine(optimizer, plan)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    files = sorted(plan.folder.glob("epoch-*.pt"))
    first = 0
    if plan.resume:
        saved = torch.load(files[-1])
        first = saved["epoch"] + 1
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    loader, losses = DataLoader(Digits(plan), BATCH, shuffle=True), []
    for epoch in range(first, plan.epochs):
        for x, y in loader:
            loss = cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())  # people print it
        if plan.save:
            files.append(plan.folder / f"epoch-{epoch:03}.pt")
            torch.save({"epoch": epoch, **{name: part.state_dict() for name, part in parts.items()}}, files[-1])
            for old in files[:-KEEP]:
                old.unlink(missing_ok=True)
    checkpoints = [torch.load(file)["model"] for file in files[-KEEP:]]
    return End(model.state_dict(), optimizer, told=False, checkpoints=checkpoints, losses=losses)


class Listener:
    """A sink that keeps losses and counts rollbacks."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rollbacks = 0

    def record(self, event: Any) -> None:
        kind = type(event).__name__
        self.rollbacks += kind == "RolledBack"
        if kind == "LossReported":
            self.losses.append(event.loss)


def r8(plan: Plan) -> End:
    from learnit_r8 import R8Scheduler, TrainingDiverged
    from learnit_r8.integrations.torch import R8BatchSampler, follow_lr

    model, heard = network(), Listener()
    optimizer = FaultySGD(model.parameters(), plan)

    def state() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def save(path: str) -> None:
        torch.save(state(), path)

    def load(source: Any) -> None:
        saved = source if isinstance(source, dict) else torch.load(source)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])

    options = {"num_epochs": plan.epochs, "state_callback": state, "ui": "off", "sinks": [heard]}
    if plan.resume:
        scheduler = R8Scheduler.resume_from_checkpoint(plan.folder, save, load, **options)
    else:
        scheduler = R8Scheduler(
            len(digits()[1]), BATCH, initial_lr=PEAK_LR, checkpoint_dir=plan.folder, keep_checkpoints=KEEP,
            checkpoint_every="epoch" if plan.save else None, save_callback=save, load_callback=load, **options
        )  # fmt: skip
    follow_lr(scheduler, optimizer)
    loader = DataLoader(Digits(plan), batch_sampler=R8BatchSampler(scheduler))
    with scheduler, contextlib.suppress(TrainingDiverged):
        for _ in scheduler.epoch_iterator():
            for x, y in loader:
                losses = cross_entropy(model(x), y, reduction="none")
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
                scheduler.update_with_loss(losses)
    checkpoints = [torch.load(file)["model"] for file in sorted(plan.folder.glob("step-*/model*"))]
    return End(model.state_dict(), optimizer, heard.rollbacks > 0, checkpoints, heard.losses)


def lightning(plan: Plan) -> End:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            self.sgd = FaultySGD(self.parameters(), plan)
            return {"optimizer": self.sgd, "lr_scheduler": {"scheduler": cosine(self.sgd, plan), "interval": "step"}}

    module = Module()
    callbacks: list[Any] = [EarlyStopping("loss", patience=10**9, check_finite=True, verbose=False)]
    if plan.save:
        callbacks.append(ModelCheckpoint(plan.folder, monitor="step", mode="max", save_top_k=KEEP, save_last=True))
    trainer = pl.Trainer(
        max_epochs=plan.epochs, accelerator="cpu", devices=1, logger=False, callbacks=callbacks,
        default_root_dir=plan.folder, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=plan.save,
    )  # fmt: skip
    last = plan.folder / "last.ckpt"
    trainer.fit(module, DataLoader(Digits(plan), BATCH, shuffle=True), ckpt_path=last if plan.resume else None)
    files = sorted(plan.folder.glob("epoch=*.ckpt"))
    checkpoints = [torch.load(file, weights_only=False)["state_dict"] for file in files]
    return End(module.net.state_dict(), module.sgd, trainer.global_step < plan.steps, [_inner(c) for c in checkpoints])


def _inner(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("net."): value for name, value in state.items()}


def huggingface(plan: Plan) -> End:
    from safetensors.torch import load_file
    from transformers import PrinterCallback, Trainer, TrainingArguments

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.net(x)
            return {"loss": cross_entropy(logits, labels), "logits": logits}

    model = Model()
    optimizer = FaultySGD(model.parameters(), plan)
    arguments = TrainingArguments(
        str(plan.folder), use_cpu=True, report_to=[], disable_tqdm=True, num_train_epochs=plan.epochs,
        per_device_train_batch_size=BATCH, save_strategy="epoch" if plan.save else "no", save_total_limit=KEEP,
        logging_strategy="epoch", seed=0,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=Digits(plan, named=True), optimizers=(optimizer, cosine(optimizer, plan))
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=plan.resume or None)
    told = any(not math.isfinite(entry.get("loss", 0.0)) for entry in trainer.state.log_history)
    checkpoints = [load_file(file) for file in sorted(plan.folder.glob("checkpoint-*/model.safetensors"))]
    return End(model.net.state_dict(), optimizer, told, [_inner(state) for state in checkpoints])


def composer(plan: Plan) -> End:
    from composer import ComposerModel, Trainer
    from composer.callbacks import NaNMonitor
    from composer.optim import CosineAnnealingWithWarmupScheduler

    class Model(ComposerModel):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, batch: Any) -> torch.Tensor:
            return self.net(batch[0])

        def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
            return cross_entropy(outputs, batch[1])

    model = Model()
    optimizer = FaultySGD(model.parameters(), plan)
    trainer = Trainer(
        model=model, train_dataloader=DataLoader(Digits(plan), BATCH, shuffle=True), optimizers=optimizer, device="cpu",
        schedulers=CosineAnnealingWithWarmupScheduler("0.1dur"), max_duration=f"{plan.epochs}ep", seed=0,
        callbacks=[NaNMonitor()], progress_bar=False, save_folder=str(plan.folder) if plan.save else None,
        save_interval="1ep", save_num_checkpoints_to_keep=KEEP, save_overwrite=True, autoresume=False,
        load_path=str(plan.folder / "latest-rank0.pt") if plan.resume else None,
    )  # fmt: skip
    told = False
    try:
        trainer.fit()
    except RuntimeError as error:
        told = "nan" in str(error).lower()
    files = sorted(plan.folder.glob("ep*.pt"))
    checkpoints = [torch.load(file, weights_only=False)["state"]["model"] for file in files]
    return End(model.net.state_dict(), optimizer, told, [_inner(state) for state in checkpoints])


RIVALS: dict[str, tuple[Callable[[Plan], End], tuple[str, ...]]] = {
    "plain loop": (plain_loop, ("torch", "transformers")),
    "Lightning": (lightning, ("lightning",)),
    "HF Trainer": (huggingface, ("accelerate",)),
    "Composer": (composer, ("composer",)),
    "learnit_r8": (r8, ()),
}


# A run in a process of its own -----------------------------------------------------------------


def _child(rival: str, plan: Plan) -> None:
    log = os.open(plan.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    end = RIVALS[rival][0](plan)
    times = np.diff(end.optimizer.times[plan.epoch_steps :])  # the first epoch warms up, or catalogs
    found = {
        "weights": end.weights, "steps": end.optimizer.calls, "told": end.told,
        "accuracy": accuracy(end.weights), "finite": _finite(end.weights),
        "checkpoints": len(end.checkpoints), "finite checkpoints": sum(map(_finite, end.checkpoints)),
        "losses": list(end.losses), "step_us": float(times.mean() * 1e6) if len(times) else math.nan,
    }  # fmt: skip
    torch.save(found, plan.folder / "end.pt")


def _finite(state: dict[str, torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in state.values())


def train(rival: str, plan: Plan) -> dict[str, Any] | None:
    """Run a rival and return how it ended; None if it was killed."""
    process = multiprocessing.get_context("fork").Process(target=_child, args=(rival, plan))
    process.start()
    process.join()
    if process.exitcode == -signal.SIGKILL:
        return None
    if process.exitcode:
        raise RuntimeError(f"{rival}, {plan}: {(plan.folder / 'log.txt').read_text()[-2000:]}")
    return torch.load(plan.folder / "end.pt")


def faults(rival: str, epochs: int, root: Path) -> dict[str, Any]:
    """Return what becomes of a clean run, the faulty ones, and a killed one."""
    found = {}
    for name, (bad_rows, bad_rates) in FAULTS.items():
        progress(f"{rival}: {name}")
        plan = Plan(root / rival / name, epochs, bad_rows, bad_rates)
        plan.folder.mkdir(parents=True)
        found[name] = train(rival, plan)
    progress(f"{rival}: killed and resumed")
    plan = Plan(root / rival / "killed", epochs)
    plan = replace(plan, kill_at=(epochs * 3 // 5) * plan.epoch_steps + plan.epoch_steps // 2)
    plan.folder.mkdir()
    if train(rival, plan) is not None:
        raise RuntimeError(f"{rival} was not killed")
    resumed = train(rival, replace(plan, kill_at=-1, resume=True))
    clean = found["clean"]
    difference = max(float((resumed["weights"][name] - value).abs().max()) for name, value in clean["weights"].items())
    again = plan.kill_at + resumed["steps"] - plan.steps
    cells = {
        name: {
            key: value for key, value in end.items() if key not in {"weights", "step_us", "steps", "losses"}
            or (key == "losses" and rival in CURVES and name in ("bad pixel", "bad rate"))
        }
        for name, end in found.items()
    }  # fmt: skip
    killed = {"at step": plan.kill_at, "steps again": again, "difference": difference, "accuracy": resumed["accuracy"]}
    return cells | {"killed": killed}


def step_cost(names: list[str], epochs: int, rounds: int, root: Path) -> dict[str, dict[str, float]]:
    """Return microseconds a step of clean runs without checkpoints, rivals in turns."""
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        progress(f"step, round {turn + 1} of {rounds}")
        for name in names:
            folder = root / f"step {turn}" / name
            folder.mkdir(parents=True)
            times[name].append(train(name, Plan(folder, epochs, save=False))["step_us"])
    base = times[names[0]]
    return {
        name: {
            "us": statistics.median(values), "rounds": rounds,
            "ratio": statistics.median(mine / other for mine, other in zip(values, base, strict=True)),
        }
        for name, values in times.items()
    }  # fmt: skip


def run(*, quick: bool = False, rounds: int = 9, only: str = "") -> dict[str, Any]:
    """Measure; `quick`: short trainings, two rounds; `only`: rivals, separated by commas."""
    epochs, rounds = (6, 2) if quick else (20, rounds)
    missing, names = {}, only.split(",") if only else list(RIVALS)
    for name in list(names):
        for module in RIVALS[name][1]:
            try:
                importlib.import_module(module)  # before the fork, once for all runs
            except Exception as error:  # a rival that does not load here is left out, whatever its reason
                missing[name] = f"{type(error).__name__}: {error}"
                names.remove(name)
                break
    digits()
    with tempfile.TemporaryDirectory(prefix="r8-rivals-") as folder:
        found = {name: faults(name, epochs, Path(folder)) for name in names}
        cost = step_cost(names, epochs, rounds, Path(folder))
    return {"epochs": epochs, "batch": BATCH, "rivals": found, "step": cost, "left out": missing}


def table(results: dict[str, Any]) -> str:
    def cell(end: dict[str, Any]) -> str:
        model = f"{end['accuracy']:.1%}" if end["finite"] else "NaN"
        return f"{model}, {end['finite checkpoints']}/{end['checkpoints']}" + (", told" if end["told"] else "")

    rows = []
    for name, found in results["rivals"].items():
        killed, step = found["killed"], results["step"][name]
        cells = [cell(found[kind]) for kind in FAULTS]
        differs = f"{killed['difference']:.2g}" if killed["difference"] else "0, to the bit"
        rows.append([name, *cells, killed["steps again"], differs, f"{step['us']:.0f}", f"{step['ratio']:.2f}"])
    head = ("", *FAULTS, "steps again", "weights differ", "us/step", "ratio")
    left = [f"{name} is left out: {reason}" for name, reason in results["left out"].items()]
    title = "Accuracy of the model that is left, finite checkpoints, whether the program told; killed and resumed; cost"
    return "\n".join([title, columns(head, rows), *left])


if __name__ == "__main__":
    main(run, table, __doc__)
