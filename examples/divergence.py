"""A training that goes wrong twice, without and with protection. PyTorch, scikit-learn's digits.

    python examples/divergence.py [--quick]

At a known step the learning rate is driven a thousand times too high for three steps, and one sample of the
data is corrupted: infinity in a pixel. Unprotected, the network ends in NaN. Protected, the run goes back to
verified backups in RAM, names the sample and ends as good as the clean run.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import Linear, ReLU, Sequential
from torch.nn.functional import cross_entropy

from learnit_r8 import R8Scheduler
from learnit_r8.events import RolledBack, SampleQuarantined

BATCH_SIZE, PEAK_LR, CORRUPTED = 32, 0.05, 123
TOO_HIGH, STEPS_TOO_HIGH = 1000.0, 3


@dataclass
class Outcome:
    """How a run ended."""

    accuracy: float
    loss: float
    rollbacks: list[RolledBack] = field(default_factory=list)
    quarantined: set[int] = field(default_factory=set)

    def record(self, event: Any) -> None:
        """Hear the scheduler's events."""
        if isinstance(event, RolledBack):
            self.rollbacks.append(event)
        elif isinstance(event, SampleQuarantined):
            self.quarantined.update(event.indices)


def data(*, corrupted: bool) -> tuple[torch.Tensor, ...]:
    """Return training and test images and labels; one training image may hold infinity."""
    x, y = load_digits(return_X_y=True)
    split = train_test_split(x / 16, y, test_size=0.3, random_state=0, stratify=y)
    x_train, x_test, y_train, y_test = (torch.tensor(part) for part in split)
    if corrupted:
        x_train[CORRUPTED, 20] = math.inf
    return x_train.float(), x_test.float(), y_train, y_test


def train(epochs: int, *, faults: bool, protected: bool) -> Outcome:
    """Train once; `faults`: with the corrupted sample and the learning rate driven too high."""
    torch.manual_seed(0)
    x, x_test, y, y_test = data(corrupted=faults)
    model = Sequential(Linear(64, 128), ReLU(), Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=PEAK_LR, momentum=0.9)
    outcome = Outcome(math.nan, math.nan)

    def state() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def load(backup: dict[str, Any]) -> None:
        model.load_state_dict(backup["model"])
        optimizer.load_state_dict(backup["optimizer"])

    scheduler = R8Scheduler(
        len(x),
        BATCH_SIZE,
        num_epochs=epochs,
        initial_lr=PEAK_LR,
        checkpoint_dir=None,
        ui="off",
        sinks=[outcome],
        state_callback=state if protected else None,
        load_callback=load if protected else None,
    )
    too_high_from = scheduler.total_steps // 2
    with scheduler:
        for _ in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                too_high = faults and too_high_from <= batch.step < too_high_from + STEPS_TOO_HIGH
                optimizer.param_groups[0]["lr"] = batch.lr * (TOO_HIGH if too_high else 1.0)
                losses = cross_entropy(model(x[batch.indices]), y[batch.indices], reduction="none")
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
                if protected:
                    scheduler.update_with_loss(losses)
                else:  # a plain loop: nobody looks at the loss
                    scheduler.update_with_loss(0.0)
    with torch.no_grad():
        logits = model(x_test)
        outcome.loss = float(cross_entropy(logits, y_test))
        outcome.accuracy = float((logits.argmax(1) == y_test).float().mean())
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 epochs in place of 40")
    epochs = 20 if parser.parse_args().quick else 40
    torch.set_num_threads(1)
    clean = train(epochs, faults=False, protected=True)
    unprotected = train(epochs, faults=True, protected=False)
    protected = train(epochs, faults=True, protected=True)
    print(f"{'':12} {'accuracy':>9} {'test loss':>10} {'rollbacks':>10}  quarantined")
    for name, run in (("clean", clean), ("unprotected", unprotected), ("protected", protected)):
        found = ", ".join(map(str, sorted(run.quarantined))) or "-"
        print(f"{name:12} {run.accuracy:9.2%} {run.loss:10.4f} {len(run.rollbacks):10}  {found}")
    for event in protected.rollbacks:
        print(f"step {event.step}: back to step {event.to_step}, learning rate x {event.lr_multiplier:g}")
    points = 100 * (clean.accuracy - protected.accuracy)
    print(f"protected ends {points:+.2f} points from clean; the corrupted sample is {CORRUPTED}")


if __name__ == "__main__":
    main()
