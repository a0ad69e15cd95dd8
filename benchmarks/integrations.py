"""What R8 costs inside frameworks: R8Trainer against transformers.Trainer, R8BatchSampler against a blind loader.

python -m benchmarks.integrations [--rounds 15]

Rivals take turns, each turn is a whole training of a tiny model. Shown are medians of CPU and of
wall-clock time, and of the ratios within each round. R8Trainer takes a backup every 50 steps at
most, and gives backups 3% of the time; the third row is without them.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.harness import columns, main, progress
from learnit_r8 import R8Scheduler
from learnit_r8.integrations.torch import R8BatchSampler, capture_state, follow_lr, restore_state

SAMPLES, BATCH, LENGTH, EPOCHS = 2048, 16, 32, 1


class Seconds(NamedTuple):
    """Time of this process and time on the wall."""

    cpu: float
    wall: float

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.cpu - other.cpu, self.wall - other.wall)


def now() -> Seconds:
    return Seconds(time.process_time(), time.perf_counter())


class Tokens(Dataset):
    """Random sequences with a label that follows from the first token."""

    def __init__(self) -> None:
        self.ids = torch.randint(3, 1000, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
        self.labels = (self.ids[:, 0] % 2).long()

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def huggingface(folder: str) -> dict[str, Callable[[], Seconds]]:
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
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
            logging_steps=10_000,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
        )
        if kind == "Trainer":
            return Trainer(model, args, train_dataset=data)
        every = {"R8Trainer": 50, "R8Trainer, no backups": None}[kind]
        scheduler = R8Scheduler(SAMPLES, BATCH, num_epochs=EPOCHS, backup_every=every, checkpoint_dir=None, ui="off")
        return R8Trainer(model, args, train_dataset=data, scheduler=scheduler)

    def seconds(kind: str) -> Seconds:
        rival = trainer(kind)
        rival.log = lambda *args, **kwargs: None  # the summary would be printed
        start = now()
        rival.train()
        return now() - start

    return {kind: lambda kind=kind: seconds(kind) for kind in ("Trainer", "R8Trainer", "R8Trainer, no backups")}


def plain_torch() -> dict[str, Callable[[], Seconds]]:
    data = TensorDataset(torch.randn(SAMPLES, 64), torch.randint(10, (SAMPLES,)))

    def parts() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        return model, torch.optim.AdamW(model.parameters())

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        return losses

    def blind() -> Seconds:
        model, optimizer = parts()
        loader = DataLoader(data, batch_size=BATCH, shuffle=True)
        start = now()
        for _ in range(EPOCHS):
            for x, y in loader:
                step(model, optimizer, x, y)
        return now() - start

    def scheduled() -> Seconds:
        model, optimizer = parts()
        scheduler = R8Scheduler(SAMPLES, BATCH, num_epochs=EPOCHS, checkpoint_dir=None, ui="off")
        scheduler.attach_model(
            lambda: capture_state(model, optimizer, copy=False), lambda state: restore_state(state, model, optimizer)
        )
        follow_lr(scheduler, optimizer)
        loader = DataLoader(data, batch_sampler=R8BatchSampler(scheduler))
        start = now()
        for _ in scheduler.epoch_iterator():
            for x, y in loader:
                scheduler.update_with_loss(step(model, optimizer, x, y))
        return now() - start

    return {"DataLoader(shuffle=True)": blind, "R8BatchSampler": scheduled}


def compare(rivals: dict[str, Callable[[], Seconds]], rounds: int) -> dict[str, dict[str, float]]:
    """Return each rival's time a step and its overhead over the first one's."""
    times: dict[str, list[Seconds]] = {name: [] for name in rivals}
    for turn in range(rounds + 1):
        for name, rival in rivals.items():
            seconds = rival()
            if turn:  # the first one warms up
                times[name].append(seconds)
    base, steps = times[next(iter(rivals))], EPOCHS * SAMPLES // BATCH
    found: dict[str, dict[str, float]] = {}
    for name, values in times.items():
        found[name] = {"rounds": rounds}
        for k, kind in enumerate(Seconds._fields):
            ratio = statistics.median(mine[k] / other[k] for mine, other in zip(values, base, strict=True))
            found[name][f"{kind}_us"] = statistics.median(value[k] for value in values) / steps * 1e6
            found[name][f"{kind}_overhead"] = ratio - 1
    return found


def run(*, quick: bool = False, rounds: int = 15) -> dict[str, Any]:
    """Measure; `quick`: two rounds."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rounds = 2 if quick else rounds
    with tempfile.TemporaryDirectory() as folder:
        progress("Hugging Face")
        found = {"Hugging Face": compare(huggingface(folder), rounds)}
    progress("PyTorch")
    return {**found, "PyTorch": compare(plain_torch(), rounds)}


def table(results: dict[str, Any]) -> str:
    rows = [
        [name, *(text for kind in Seconds._fields
                 for text in (f"{row[f'{kind}_us']:.0f}", f"{row[f'{kind}_overhead']:+.1%}"))]
        for rivals in results.values() for name, row in rivals.items()
    ]  # fmt: skip
    return columns((f"batch {BATCH}", "CPU us/step", "overhead", "wall us/step", "overhead"), rows)


if __name__ == "__main__":
    main(run, table, __doc__)
