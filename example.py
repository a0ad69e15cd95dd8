"""Train a small network on scikit-learn's digits through R8Scheduler, no framework needed.

    python -m pip install -e ".[example]" && python example.py

Halfway the weights are overwritten with NaN, as an exploding gradient would leave them: the run
goes back to a verified backup in RAM and finishes. The same budget is then spent on blind
shuffling, for comparison.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections import Counter
from typing import Any

# Two threads on matrices of this size wait for each other more than they compute.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from learnit_r8 import R8Scheduler, StepResult
from learnit_r8.events import LossReported, RolledBack, SpikeSeen

BATCH_SIZE, PEAK_LR = 32, 0.05


class Network:
    """A multi-layer perceptron, 64-1024-1024-10, with SGD and momentum, in numpy: wide enough to watch."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        sizes = (64, 1024, 1024, 10)
        self.weights = [
            rng.normal(0, np.sqrt(2 / fan_in), (fan_in, fan_out)).astype(np.float32)
            for fan_in, fan_out in itertools.pairwise(sizes)
        ]
        self.biases = [np.zeros(size, np.float32) for size in sizes[1:]]
        self.velocity = [np.zeros_like(value) for value in self.weights + self.biases]

    def forward(self, x: np.ndarray) -> list[np.ndarray]:
        activations = [x]
        for weight, bias in zip(self.weights, self.biases, strict=True):
            activations.append(np.maximum(activations[-1], 0) @ weight + bias)
        return activations

    def train_step(self, x: np.ndarray, y: np.ndarray, lr: float) -> np.ndarray:
        """Take one optimizer step and return the loss of every sample."""
        *hidden, logits = self.forward(x)
        rows = np.arange(len(y))
        logits = logits - logits.max(axis=1, keepdims=True)
        log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        delta = np.exp(log_probabilities)
        delta[rows, y] -= 1
        delta /= len(y)
        weight_gradients, bias_gradients = [], []
        for weight, below in zip(reversed(self.weights), reversed(hidden), strict=True):
            weight_gradients.insert(0, np.maximum(below, 0).T @ delta)
            bias_gradients.insert(0, delta.sum(axis=0))
            delta = (delta @ weight.T) * (below > 0)
        gradients = weight_gradients + bias_gradients
        for value, speed, gradient in zip(self.weights + self.biases, self.velocity, gradients, strict=True):
            speed *= 0.9
            speed += gradient
            value -= lr * speed
        return -log_probabilities[rows, y]

    def accuracy(self, x: np.ndarray, y: np.ndarray) -> float:
        return float(np.mean(self.forward(x)[-1].argmax(axis=1) == y))

    def state(self) -> dict[str, Any]:
        return {"weights": self.weights, "biases": self.biases, "velocity": self.velocity}

    def restore(self, source: dict[str, Any]) -> None:
        self.weights, self.biases, self.velocity = source["weights"], source["biases"], source["velocity"]


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
    data: tuple[np.ndarray, ...], epochs: int, strategy: str, ui: str, *, poison: bool
) -> tuple[float, R8Scheduler, Counts]:
    x_train, x_test, y_train, y_test = data
    network, counts = Network(seed=0), Counts()
    with R8Scheduler(
        num_samples=len(x_train),
        batch_size=BATCH_SIZE,
        num_epochs=epochs,
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
                if poison and scheduler.global_step == scheduler.total_steps // 2 + 10:
                    network.weights[-1][:] = np.nan  # the next loss will tell
                report(scheduler.update_with_loss(losses))
            scheduler.log(val_acc=network.accuracy(x_test, y_test))
    return network.accuracy(x_test, y_test), scheduler, counts


def report(result: StepResult) -> None:
    if result.rolled_back:
        print(f"step {result.step}: the loss is {result.loss}; the model was restored from its backup in RAM")


def draw(images: np.ndarray, captions: list[str], per_row: int = 4) -> str:
    """Return digits side by side, two characters to a pixel."""
    shades = " ░▒▓█"
    lines = []
    for start in range(0, len(images), per_row):
        row = slice(start, start + per_row)
        lines += [
            "   ".join("".join(shades[round(v * 4)] * 2 for v in image[y]) for image in images[row]) for y in range(8)
        ]
        lines += ["   ".join(f"{caption:<16}" for caption in captions[row]), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ui", default="auto", help="auto, curses, rich, log or off")
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    x, y = load_digits(return_X_y=True)
    data = train_test_split((x / 16).astype(np.float32), y, test_size=0.3, random_state=0, stratify=y)

    started = time.perf_counter()
    accuracy, scheduler, counts = train(data, options.epochs, "quadrant", options.ui, poison=True)
    seconds = time.perf_counter() - started
    uniform, *_ = train(data, options.epochs, "uniform", "off", poison=False)

    table = Table(title=f"Digits, {len(data[0])} training samples, {options.epochs} epochs", show_header=False)
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
    console.print(draw(data[0][suspects].reshape(-1, 8, 8), captions), markup=False, highlight=False)


if __name__ == "__main__":
    main()
