"""What a whole step of a tiny model costs under each library, with the same things switched on.

python -m benchmarks.overhead [--rounds 10] [--only "bare loop,learnit_r8"]

A network of 64-128-10, batches of 32 from a loader, AdamW, one thread. Everyone has a cosine schedule a step, a
progress display (into the void), each step's loss in a file or list as the library keeps it, a stop at losses that
are not finite, and every 50 steps a copy of model and optimizer in RAM, which only learnit_r8 brings along; for the
others it is a `deepcopy` of both states in a hook. "bare loop" has none of it, "loop with all of it" has it by hand.
learnit_r8 besides chooses the batches by loss and watches for spikes. "defaults" is a backup as often as it likes.

Each training is a process of its own, a round has one of each; the first 500 steps warm up, the next 2000 are timed as
a whole. Shown are medians over the rounds, and of the ratio to the bare loop within each. What is not installed is left
out by name. Composer is not measured: it publishes no figure for a step's overhead, and pins an older torch.
"""

from __future__ import annotations

import copy
import csv
import importlib
import itertools
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.harness import columns, main, progress

SAMPLES, BATCH, WARM_UP, TIMED, EVERY = 32 * 256, 32, 500, 2000, 50
STEPS = WARM_UP + TIMED + 50
EPOCHS = -(-STEPS * BATCH // SAMPLES)


class Stopwatch:
    """Called after each step; remembers how long the timed ones took."""

    def __init__(self) -> None:
        self.steps, self.cpu, self.wall = 0, math.nan, math.nan

    def __call__(self) -> None:
        self.steps += 1
        if self.steps == WARM_UP:
            self.cpu, self.wall = time.process_time(), time.perf_counter()
        elif self.steps == WARM_UP + TIMED:
            self.cpu, self.wall = time.process_time() - self.cpu, time.perf_counter() - self.wall


Training = Callable[[Path, Stopwatch], None]


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 64, generator=generator)
    return TensorDataset(x, (x[:, :10] + torch.randn(SAMPLES, 10, generator=generator)).argmax(1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-3)


def cosine(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * SAMPLES // BATCH)


class Copies:
    """What a hook does that keeps the last good state in RAM."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.parts, self.steps, self.kept = (model, optimizer), 0, None

    def __call__(self) -> None:
        self.steps += 1
        if self.steps % EVERY == 0:
            self.kept = [copy.deepcopy(part.state_dict()) for part in self.parts]


def bare_loop(_: Path, done: Stopwatch) -> None:
    model = network()
    optimizer = adam(model)
    loader = DataLoader(data(), BATCH, shuffle=True)
    for _ in range(EPOCHS):
        for x, y in loader:
            loss = cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done()


def full_loop(folder: Path, done: Stopwatch) -> None:
    from tqdm import tqdm

    model = network()
    optimizer = adam(model)
    schedule, copies = cosine(optimizer), Copies(model, optimizer)
    loader = DataLoader(data(), BATCH, shuffle=True)
    with (folder / "log.csv").open("w") as file:
        log = csv.writer(file)
        for _ in range(EPOCHS):
            bar = tqdm(loader, file=sys.stderr)
            for x, y in bar:
                loss = cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                number = loss.item()
                if not math.isfinite(number):
                    raise FloatingPointError("the loss is not finite")
                log.writerow((number, schedule.get_last_lr()[0]))
                copies()
                done()


def lightning(folder: Path, done: Stopwatch) -> None:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = adam(self)
            self.copies = Copies(self.net, optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine(optimizer), "interval": "step"}}

    class Hook(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if not math.isfinite(outputs["loss"].item()):
                trainer.should_stop = True
            module.copies()
            done()

    trainer = pl.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", devices=1, callbacks=[Hook()], default_root_dir=folder,
        logger=CSVLogger(folder), log_every_n_steps=1, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(data(), BATCH, shuffle=True))


class Named(Dataset):
    """The data as dictionaries."""

    def __init__(self) -> None:
        self.x, self.y = data().tensors

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, k: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[k], "labels": self.y[k]}


class Answering(nn.Module):
    """The network with its loss, as the Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.net(x)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def huggingface(folder: Path, done: Stopwatch, scheduler: Any = None) -> None:
    from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

    from learnit_r8.integrations.huggingface import R8Trainer

    class Hook(TrainerCallback):
        copies: Any = None

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if scheduler is None:
                self.copies = self.copies or Copies(more["model"], more["optimizer"])
                self.copies()
            done()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            if scheduler is None and not math.isfinite(logs.get("loss", 0.0)):
                control.should_training_stop = True

    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to=[], num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH,
        save_strategy="no", logging_steps=1 if scheduler is None else 10**6, lr_scheduler_type="cosine", seed=0,
        learning_rate=1e-3,
    )  # fmt: skip
    kind, more = (Trainer, {}) if scheduler is None else (R8Trainer, {"scheduler": scheduler})
    trainer = kind(Answering(), arguments, train_dataset=Named(), callbacks=[Hook()], **more)
    trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ProgressCallback):
            callback.on_log = lambda *_, **__: None  # it prints each step's numbers
    trainer.train()


def keras(folder: Path, done: Stopwatch) -> None:
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    steps = EPOCHS * SAMPLES // BATCH
    x, y = (part.numpy() for part in data().tensors)
    layers = keras.layers
    model = keras.Sequential([keras.Input((64,)), layers.Dense(128, "relu"), layers.Dense(10)])
    rate = keras.optimizers.schedules.CosineDecay(1e-3, steps)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(rate), loss)

    class Hook(keras.callbacks.Callback):
        steps = 0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.log.writerow((logs["loss"],))
            self.steps += 1
            if self.steps % EVERY == 0:
                self.kept = model.get_weights(), [value.numpy().copy() for value in model.optimizer.variables]
            done()

    hook = Hook()
    with (folder / "log.csv").open("w") as file:
        hook.log = csv.writer(file)
        callbacks = [hook, keras.callbacks.TerminateOnNaN()]
        model.fit(x, y, BATCH, EPOCHS, verbose=1, callbacks=callbacks)


def fastai(folder: Path, done: Stopwatch) -> None:
    from fastai.callback.core import Callback
    from fastai.callback.schedule import ParamScheduler, SchedCos
    from fastai.callback.tracker import TerminateOnNaNCallback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    class Hook(Callback):
        def after_batch(self) -> None:
            if not hasattr(self, "copies"):
                self.copies = Copies(self.model, self.opt)
            self.copies()
            done()

    loaders = DataLoaders(DataLoader(data(), BATCH, shuffle=True, drop_last=True), [])
    learner = Learner(
        loaders, network(), cross_entropy, cbs=[TerminateOnNaNCallback(), Hook()], path=folder, train_bn=False,
        opt_func=lambda parameters, **_: OptimWrapper(parameters, torch.optim.AdamW),
    )  # fmt: skip
    learner.fit(EPOCHS, 1e-3, cbs=[ParamScheduler({"lr": SchedCos(1e-3, 0.0)})])


def ignite(folder: Path, done: Stopwatch) -> None:
    from ignite.contrib.handlers import ProgressBar
    from ignite.engine import Events, create_supervised_trainer
    from ignite.handlers import TerminateOnNan

    model = network()
    optimizer = adam(model)
    schedule, copies = cosine(optimizer), Copies(model, optimizer)
    trainer = create_supervised_trainer(model, optimizer, cross_entropy)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    ProgressBar(file=sys.stderr).attach(trainer, output_transform=lambda loss: {"loss": loss})
    with (folder / "log.csv").open("w") as file:
        log = csv.writer(file)

        @trainer.on(Events.ITERATION_COMPLETED)
        def _(engine: Any) -> None:
            schedule.step()
            log.writerow((engine.state.output, schedule.get_last_lr()[0]))
            copies()
            done()

        trainer.run(DataLoader(data(), BATCH, shuffle=True), max_epochs=EPOCHS)


def scheduler(folder: Path, every: int | str | None) -> Any:
    from learnit_r8 import R8Scheduler

    options = {} if every is None else {"backup_every": every}
    return R8Scheduler(
        SAMPLES, BATCH, num_epochs=EPOCHS, initial_lr=1e-3, log_dir=folder, checkpoint_dir=None, ui="log", **options
    )


def r8(folder: Path, done: Stopwatch, every: int | None = EVERY) -> None:
    from learnit_r8.integrations.torch import R8BatchSampler, capture_state, follow_lr, restore_state

    model = network()
    optimizer = adam(model)
    run = scheduler(folder, every)
    run.attach_model(
        lambda: capture_state(model, optimizer, copy=False), lambda state: restore_state(state, model, optimizer)
    )
    follow_lr(run, optimizer)
    loader = DataLoader(data(), batch_sampler=R8BatchSampler(run))
    with run:
        for _ in run.epoch_iterator():
            for x, y in loader:
                losses = cross_entropy(model(x), y, reduction="none")
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
                run.update_with_loss(losses)
                done()


def r8_trainer(folder: Path, done: Stopwatch) -> None:
    huggingface(folder, done, scheduler(folder, EVERY))


RIVALS: dict[str, tuple[Training, tuple[str, ...]]] = {
    "bare loop": (bare_loop, ()),
    "loop with all of it": (full_loop, ("tqdm",)),
    "learnit_r8": (r8, ()),
    "learnit_r8, defaults": (lambda folder, done: r8(folder, done, None), ()),
    "Ignite": (ignite, ("ignite.engine",)),
    "fastai": (fastai, ("fastai.learner",)),
    "Lightning": (lightning, ("lightning.pytorch",)),
    "Keras on torch": (keras, ("keras",)),
    "HF Trainer": (huggingface, ("transformers", "accelerate")),
    "R8Trainer": (r8_trainer, ("transformers", "accelerate")),
}


def _child(train: Training, folder: Path, pipe: Any) -> None:
    void = os.open(folder / "printed.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(void, 1)
    os.dup2(void, 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    done = Stopwatch()
    train(folder, done)
    pipe.send((done.cpu / TIMED * 1e6, done.wall / TIMED * 1e6))


def measure(train: Training, folder: Path) -> tuple[float, float]:
    """Train in a process of its own; return microseconds a step, of CPU and on the wall."""
    folder.mkdir(parents=True)
    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_child, args=(train, folder, theirs))
    process.start()
    theirs.close()
    try:
        return mine.recv()
    except EOFError:
        raise RuntimeError((folder / "printed.txt").read_text()[-2000:]) from None
    finally:
        process.join()


def run(*, quick: bool = False, rounds: int = 10, only: str = "") -> dict[str, Any]:
    """Measure; `quick`: two rounds; `only`: rivals, separated by commas."""
    os.environ["KERAS_BACKEND"] = "torch"
    names, missing = only.split(",") if only else list(RIVALS), {}
    for name in list(names):
        try:
            for module in RIVALS[name][1]:
                importlib.import_module(module)  # before the fork, once for all
        except Exception as error:  # a rival that does not load here is left out, whatever its reason
            missing[name] = f"{type(error).__name__}: {error}"
            names.remove(name)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    rounds = 2 if quick else rounds
    with tempfile.TemporaryDirectory(prefix="r8-overhead-") as folder:
        for turn in range(rounds):
            progress(f"round {turn + 1} of {rounds}")
            for name in names if turn % 2 else reversed(names):
                times[name].append(measure(RIVALS[name][0], Path(folder) / f"{turn} {name}"))
    base = np.array(times[names[0]])
    found = {}
    for name, values in times.items():
        ratios = np.array(values) / base
        cpu, wall = (statistics.median(column) for column in zip(*values, strict=True))
        found[name] = {
            "cpu_us": cpu, "wall_us": wall, "rounds": rounds, "cpu_ratio": float(np.median(ratios[:, 0])),
            "wall_ratio": float(np.median(ratios[:, 1])), "ratios": ratios[:, 0].tolist(),
        }  # fmt: skip
    return {"batch": BATCH, "steps": TIMED, "rivals": found, "left out": missing}


def table(results: dict[str, Any]) -> str:
    base = next(iter(results["rivals"].values()))
    rows = [
        [name, f"{row['cpu_us']:.0f}", f"{row['cpu_us'] - base['cpu_us']:+.0f}", f"{row['cpu_ratio']:.2f}",
         f"{min(row['ratios']):.2f} to {max(row['ratios']):.2f}", f"{row['wall_us']:.0f}", f"{row['wall_ratio']:.2f}"]
        for name, row in results["rivals"].items()
    ]  # fmt: skip
    head = (f"batch {results['batch']}", "CPU us/step", "more", "ratio", "rounds", "wall us/step", "ratio")
    left = [f"{name} is left out: {reason}" for name, reason in results["left out"].items()]
    return "\n".join(itertools.chain([columns(head, rows)], left))


if __name__ == "__main__":
    main(run, table, __doc__)
