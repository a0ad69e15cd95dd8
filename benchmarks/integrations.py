"""What R8 costs inside frameworks: R8Trainer against transformers.Trainer, R8BatchSampler against a blind loader.

python -m benchmarks.integrations [--rounds 15]

Rivals take turns, each turn is a whole training of a tiny model. Shown are medians of CPU and of
wall-clock time, and of the ratios within each round. R8Trainer takes a backup every 50 steps at
most, and gives backups 3% of the time; the third row is without them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

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


def compare(title: str, rivals: dict[str, Callable[[], Seconds]], rounds: int) -> None:
    times: dict[str, list[Seconds]] = {name: [] for name in rivals}
    for turn in range(rounds + 1):
        for name, rival in rivals.items():
            seconds = rival()
            if turn:  # the first one warms up
                times[name].append(seconds)
    base = next(iter(rivals))
    steps = EPOCHS * SAMPLES // BATCH
    print(f"\n{title}: {steps} steps of batch {BATCH}, {rounds} interleaved rounds")
    print(f"{'':26}" + "".join(f"{f'{kind} us/step':>14} {'overhead':>9}" for kind in Seconds._fields))
    for name, values in times.items():
        row = f"{name:26}"
        for kind in range(2):
            ratio = statistics.median(mine[kind] / other[kind] for mine, other in zip(values, times[base], strict=True))
            row += f"{statistics.median(value[kind] for value in values) / steps * 1e6:14.0f} {ratio - 1:+9.1%}"
        print(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        compare("Hugging Face", huggingface(folder), rounds)
    compare("PyTorch", plain_torch(), rounds)


if __name__ == "__main__":
    main()
