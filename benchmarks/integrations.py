"""What R8 costs inside frameworks: R8Trainer against transformers.Trainer, R8BatchSampler against a blind loader.

python -m benchmarks.integrations [--rounds 30]

The rivals' trainings of a tiny model take turns of a few steps each, in alternating order, in processes of their
own that are started anew for each round. Shown are medians over the rounds of CPU and of wall-clock time, and of
the ratios within each round with their 95% bootstrap interval. A round holds two backups where a rival takes
backups: R8Trainer does, as often as it may by default; a third row is without them.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.harness import columns, main, progress
from learnit_r8 import R8Scheduler
from learnit_r8.integrations.torch import R8BatchSampler, capture_state, follow_lr, restore_state

SAMPLES, BATCH, LENGTH, EVERY = 2048, 16, 32, 50
TURN, WARM_UP, TURNS = 10, 6, 10  # steps a turn, and turns a round: the first is one step, the next ones make buffers
ENDLESS = 1000  # epochs
Training = Callable[[Callable[[], None]], None]


class Seconds(NamedTuple):
    """Time of this process and time on the wall."""

    cpu: float
    wall: float

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.cpu - other.cpu, self.wall - other.wall)


def now() -> Seconds:
    return Seconds(time.process_time(), time.perf_counter())


class Rival:
    """A training in a process of its own that stands still but for its turns.

    Args:
        train: Trains, and calls what it is given after each step.
    """

    def __init__(self, train: Training) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_train, args=(train, theirs), daemon=True)
        self._process.start()

    def turn(self) -> Seconds:
        """Train some steps."""
        self._pipe.send(None)
        return Seconds(*self._pipe.recv())

    def end(self) -> None:
        self._process.kill()
        self._process.join()


def _train(train: Training, pipe: Connection) -> None:
    left, start = 1, Seconds(0.0, 0.0)

    def step() -> None:
        nonlocal left, start
        left -= 1
        if not left:
            pipe.send(now() - start)
            pipe.recv()
            left, start = TURN, now()

    pipe.recv()
    train(step)


class Tokens(Dataset):
    """Random sequences with a label that follows from the first token."""

    def __init__(self) -> None:
        self.ids = torch.randint(3, 1000, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
        self.labels = (self.ids[:, 0] % 2).long()

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def huggingface(folder: str) -> dict[str, Training]:
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
    from transformers.utils import logging

    from learnit_r8.integrations.huggingface import R8Trainer

    logging.set_verbosity_error()
    data = Tokens()

    def trainer(kind: str) -> Trainer:
        torch.manual_seed(0)
        size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
        model = BertForSequenceClassification(BertConfig(vocab_size=1000, **size))
        args = TrainingArguments(
            folder,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=10_000_000,
            num_train_epochs=ENDLESS,
            per_device_train_batch_size=BATCH,
        )
        if kind == "Trainer":
            return Trainer(model, args, train_dataset=data)
        every = {"R8Trainer": EVERY, "R8Trainer, no backups": None}[kind]
        scheduler = R8Scheduler(SAMPLES, BATCH, num_epochs=ENDLESS, backup_every=every, checkpoint_dir=None, ui="off")
        return R8Trainer(model, args, train_dataset=data, scheduler=scheduler)

    def train(kind: str, step: Callable[[], None]) -> None:
        class Turns(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                step()

        rival = trainer(kind)
        rival.add_callback(Turns())
        rival.train()

    return {
        kind: lambda step, kind=kind: train(kind, step) for kind in ("Trainer", "R8Trainer", "R8Trainer, no backups")
    }


def companions() -> dict[str, Training]:
    """Loops with what loops usually have: a schedule of the learning rate, a progress bar, the loss as a number."""
    plain = plain_torch(companions=True)
    return {f"{name}, with companions": training for name, training in plain.items()}


def plain_torch(*, companions: bool = False) -> dict[str, Training]:
    data = TensorDataset(torch.randn(SAMPLES, 64), torch.randint(10, (SAMPLES,)))

    def parts() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        return model, torch.optim.AdamW(model.parameters())

    def update(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        return losses

    def shown(loader: DataLoader) -> Any:
        if not companions:
            return loader
        from tqdm import tqdm

        return tqdm(loader, file=open(os.devnull, "w"))

    total = 0.0

    def note(losses: torch.Tensor) -> None:
        nonlocal total
        if companions:
            total += losses.mean().item()

    def blind(step: Callable[[], None]) -> None:
        model, optimizer = parts()
        loader = DataLoader(data, batch_size=BATCH, shuffle=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ENDLESS * len(loader))
        while True:
            for x, y in shown(loader):
                note(update(model, optimizer, x, y))
                if companions:
                    schedule.step()
                step()

    def scheduled(step: Callable[[], None], every: int | None) -> None:
        model, optimizer = parts()
        scheduler = R8Scheduler(SAMPLES, BATCH, num_epochs=ENDLESS, backup_every=every, checkpoint_dir=None, ui="off")
        scheduler.attach_model(
            lambda: capture_state(model, optimizer, copy=False), lambda state: restore_state(state, model, optimizer)
        )
        follow_lr(scheduler, optimizer)
        loader = DataLoader(data, batch_sampler=R8BatchSampler(scheduler))
        for _ in scheduler.epoch_iterator():
            for x, y in shown(loader):
                losses = update(model, optimizer, x, y)
                scheduler.update_with_loss(losses)
                note(losses)
                step()

    return {
        "DataLoader(shuffle=True)": blind,
        "R8BatchSampler": lambda step: scheduled(step, EVERY),
        "R8BatchSampler, no backups": lambda step: scheduled(step, None),
    }


def compare(trainings: dict[str, Training], rounds: int) -> dict[str, dict[str, Any]]:
    """Return each rival's time a step and its overhead over the first one's, with a 95% interval."""
    times: dict[str, list[Seconds]] = {name: [] for name in trainings}
    for number in range(rounds):
        rivals = {name: Rival(train) for name, train in trainings.items()}  # anew: where memory lies decides on 6%
        try:
            turns: dict[str, list[Seconds]] = {name: [] for name in rivals}
            for turn in range(WARM_UP + TURNS):
                for name in reversed(rivals) if (number + turn) % 2 else rivals:
                    turns[name].append(rivals[name].turn())
        finally:
            for rival in rivals.values():
                rival.end()
        for name, values in turns.items():
            times[name].append(Seconds(*np.sum(values[WARM_UP:], axis=0).tolist()))
    base, rng = np.array(times[next(iter(rivals))]), np.random.default_rng(0)
    found: dict[str, dict[str, Any]] = {}
    for name, values in times.items():
        mine, found[name] = np.array(values), {"rounds": rounds}
        for k, kind in enumerate(Seconds._fields):
            excess = mine[:, k] / base[:, k] - 1
            drawn = np.median(excess[rng.integers(0, rounds, (2000, rounds))], axis=1)
            found[name][f"{kind}_us"] = float(np.median(mine[:, k])) / (TURN * TURNS) * 1e6
            found[name][f"{kind}_overhead"] = float(np.median(excess))
            found[name][f"{kind}_excess"] = excess.tolist()
            found[name][f"{kind}_interval"] = np.quantile(drawn, [0.025, 0.975]).tolist()
    return found


def run(*, quick: bool = False, rounds: int = 30, only: str = "") -> dict[str, Any]:
    """Measure; `quick`: two rounds; `only`: "huggingface" or "torch"."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rounds = 2 if quick else rounds
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))]).step()  # imports a lot, here once for all processes
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        if only in ("", "huggingface"):
            progress("Hugging Face")
            found["Hugging Face"] = compare(huggingface(folder), rounds)
    for name, make in (("PyTorch", plain_torch), ("PyTorch with companions", companions)):
        if only in ("", "torch"):
            progress(name)
            found[name] = compare(make(), rounds)
    return found


def table(results: dict[str, Any]) -> str:
    rows = []
    for rivals in results.values():
        for name, row in rivals.items():
            cells = [name]
            for kind in Seconds._fields:
                low, high = row[f"{kind}_interval"]
                cells += [f"{row[f'{kind}_us']:.0f}", f"{row[f'{kind}_overhead']:+.1%}", f"{low:+.1%} to {high:+.1%}"]
            rows.append(cells)
    return columns((f"batch {BATCH}", *("CPU us/step", "overhead", "95%", "wall us/step", "overhead", "95%")), rows)


if __name__ == "__main__":
    main(run, table, __doc__)
