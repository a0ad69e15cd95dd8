"""Train a small network on scikit-learn's digits through R8Scheduler, no framework needed.

    python -m pip install -e ".[example]" && python example.py

Halfway the weights are overwritten with NaN, as an exploding gradient would leave them: the run
goes back to a verified backup in RAM and finishes. The same budget is then spent on blind
shuffling, for comparison.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from learnit_r8 import R8Scheduler, StepResult
from learnit_r8.events import LossReported, RolledBack, SpikeSeen

EPOCHS, BATCH_SIZE, PEAK_LR = 20, 32, 0.2
NAN_STEP = 450


class Network:
    """64 inputs, 64 hidden units, 10 classes; SGD with momentum; everything in numpy."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.weights = {
            "w1": rng.normal(0, np.sqrt(2 / 64), (64, 64)),
            "b1": np.zeros(64),
            "w2": rng.normal(0, np.sqrt(1 / 64), (64, 10)),
            "b2": np.zeros(10),
        }
        self.velocity = {name: np.zeros_like(value) for name, value in self.weights.items()}

    def forward(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        hidden = np.maximum(x @ self.weights["w1"] + self.weights["b1"], 0)
        return hidden, hidden @ self.weights["w2"] + self.weights["b2"]

    def train_step(self, x: np.ndarray, y: np.ndarray, lr: float) -> np.ndarray:
        """Take one optimizer step and return the loss of every sample."""
        hidden, logits = self.forward(x)
        logits -= logits.max(axis=1, keepdims=True)
        log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        d_logits = np.exp(log_probabilities)
        d_logits[np.arange(len(y)), y] -= 1
        d_logits /= len(y)
        d_hidden = (d_logits @ self.weights["w2"].T) * (hidden > 0)
        gradients = {
            "w1": x.T @ d_hidden,
            "b1": d_hidden.sum(axis=0),
            "w2": hidden.T @ d_logits,
            "b2": d_logits.sum(axis=0),
        }
        for name, gradient in gradients.items():
            self.velocity[name] = 0.9 * self.velocity[name] + gradient
            self.weights[name] -= lr * 0.1 * self.velocity[name]
        return -log_probabilities[np.arange(len(y)), y]

    def accuracy(self, x: np.ndarray, y: np.ndarray) -> float:
        return float(np.mean(self.forward(x)[1].argmax(axis=1) == y))

    def state(self) -> dict[str, Any]:
        return {"weights": self.weights, "velocity": self.velocity}

    def restore(self, source: dict[str, Any]) -> None:
        self.weights, self.velocity = source["weights"], source["velocity"]


class Counts:
    """A sink: it hears every event of the run and counts what the final table shows."""

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()
        self.step_seconds = self.r8_seconds = 0.0

    def record(self, event: object) -> None:
        self.events[type(event).__name__] += 1
        if isinstance(event, LossReported):
            self.step_seconds += event.step_seconds
            self.r8_seconds += event.r8_seconds


def train(
    data: tuple[np.ndarray, ...], strategy: str, ui: str, nan_step: int | None
) -> tuple[float, R8Scheduler, Counts]:
    x_train, x_test, y_train, y_test = data
    network, counts = Network(seed=0), Counts()
    with R8Scheduler(
        num_samples=len(x_train),
        batch_size=BATCH_SIZE,
        num_epochs=EPOCHS,
        initial_lr=PEAK_LR,
        scheduler_mode="cosine",
        strategy=strategy,
        state_callback=network.state,
        load_callback=network.restore,
        checkpoint_dir=None,
        ui=ui,
        sinks=[counts],
    ) as scheduler:
        for _ in scheduler.epoch_iterator():
            for indices, lr in scheduler.batch_iterator():
                losses = network.train_step(x_train[indices], y_train[indices], lr)
                if scheduler.global_step == nan_step:
                    network.weights["w2"][:] = np.nan  # the next loss will tell
                report(scheduler.update_with_loss(losses))
            scheduler.log(val_accuracy=network.accuracy(x_test, y_test))
    return network.accuracy(x_test, y_test), scheduler, counts


def report(result: StepResult) -> None:
    if result.rolled_back:
        print(f"step {result.step}: the loss is {result.loss}; the model was restored from its backup in RAM")


def draw(images: np.ndarray, captions: list[str]) -> str:
    """Return digits side by side, two pixels to a character."""
    shades = " ░▒▓█"
    rows = []
    for row in range(8):
        pixels = ("".join(shades[round(v / 16 * 4)] * 2 for v in image.reshape(8, 8)[row]) for image in images)
        rows.append("   ".join(pixels))
    return "\n".join([*rows, "   ".join(f"{caption:<16}" for caption in captions)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ui", default="auto", help="auto, curses, rich, log or off")
    ui = parser.parse_args().ui
    x, y = load_digits(return_X_y=True)
    data = train_test_split(x / 16, y, test_size=0.3, random_state=0, stratify=y)

    started = time.perf_counter()
    accuracy, scheduler, counts = train(data, "quadrant", ui, NAN_STEP)
    seconds = time.perf_counter() - started
    uniform, *_ = train(data, "uniform", "off", None)

    table = Table(title=f"Digits, {len(data[0])} training samples, {EPOCHS} epochs", show_header=False)
    table.add_row("test accuracy", f"{accuracy:.4f}")
    table.add_row("the same budget, blind shuffle", f"{uniform:.4f}")
    table.add_row("steps", str(scheduler.global_step))
    table.add_row("spikes / rollbacks", f"{counts.events[SpikeSeen.__name__]} / {counts.events[RolledBack.__name__]}")
    other = seconds - counts.step_seconds - counts.r8_seconds
    table.add_row(
        "where the time went",
        f"training {counts.step_seconds / seconds:.0%}, scheduler {counts.r8_seconds / seconds:.0%}, "
        f"evaluation, backups and display {other / seconds:.0%} of {seconds:.1f} s",
    )
    console = Console()
    console.print(table)
    suspects = scheduler.catalog.suspects(5)
    captions = [f"#{i} label {data[2][i]}" for i in suspects]
    console.print("The five most suspicious training samples (their loss stays high):\n")
    console.print(draw(data[0][suspects] * 16, captions), markup=False, highlight=False)


if __name__ == "__main__":
    main()
