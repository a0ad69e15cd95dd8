"""Forgetting on split digits: no replay, uniform, spaced repetition alone, and the hybrid buffer.

    python examples/continual_digits.py --seeds 20
    python examples/continual_digits.py --quick

scikit-learn's digits come in five tasks of two classes each, one after the other; the model
never sees a task's training set again. Every kind of replay keeps the same number of examples
and adds the same number of them to every step, so gradients are matched; "none" repeats samples
of the task in hand instead. Forgetting of a task is its best accuracy so far minus its accuracy at the
end (Chaudhry et al. 2018), averaged over all tasks but the last. Needs: torch, scikit-learn.
"""

from __future__ import annotations

import argparse
import math
from typing import Protocol

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from learnit_r8.replay import HybridSRLReplayBuffer, ReplayItem

TASKS = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))
BATCH = 16


class Memory(Protocol):
    """What a training run asks of its replay."""

    def store(self, features: np.ndarray, label: int, hidden: np.ndarray) -> None:
        """Offer one example, with the model's last hidden layer as its embedding."""
        ...

    def recall(self, step: int, count: int) -> list[tuple[np.ndarray, int]]:
        """Return examples to replay now."""
        ...

    def judge(self, scores: np.ndarray, step: int) -> None:
        """Hear how likely the model found the right answers of the last `recall`."""
        ...


class Uniform:
    """Reservoir sampling (Vitter 1985): every example ever seen is as likely to be held."""

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity, self.rng = capacity, np.random.default_rng(seed)
        self.held: list[tuple[np.ndarray, int]] = []
        self.seen = 0

    def store(self, features: np.ndarray, label: int, hidden: np.ndarray) -> None:
        """Keep it in place of a random one, ever less often."""
        self.seen += 1
        if len(self.held) < self.capacity:
            self.held.append((features, label))
        elif (place := int(self.rng.integers(self.seen))) < self.capacity:
            self.held[place] = (features, label)

    def recall(self, step: int, count: int) -> list[tuple[np.ndarray, int]]:
        """Return random ones."""
        chosen = self.rng.choice(len(self.held), min(count, len(self.held)), replace=False) if self.held else []
        return [self.held[k] for k in chosen]

    def judge(self, scores: np.ndarray, step: int) -> None:
        """Nothing depends on it."""


class Reviewed:
    """Replay by `HybridSRLReplayBuffer`; with alpha 0 it is spaced repetition alone.

    Half of a replay is the hardest that is due, the other half random: the hardest alone would
    starve the rest (forgetting .26 in place of .06). Its reservoir keeps early tasks; under
    eviction="fifo" or "mastered" a task larger than the buffer drives out all others (.73).
    """

    def __init__(self, capacity: int, seed: int, alpha: float) -> None:
        self.rng = np.random.default_rng(seed + 1)
        self.buffer = HybridSRLReplayBuffer(capacity, alpha=alpha, beta=0.0, eviction="reservoir", seed=seed)
        self.last: list[ReplayItem] = []

    def store(self, features: np.ndarray, label: int, hidden: np.ndarray) -> None:
        """Offer it to the reservoir."""
        self.buffer.add((features, label), hidden)

    def recall(self, step: int, count: int) -> list[tuple[np.ndarray, int]]:
        """Return the hardest that are due, and random ones."""
        due = self.buffer.get_due_samples(step, count // 2)
        known = {item.slot for item in due}
        rest = [item for item in self.buffer.get_due_samples(math.inf, self.buffer.capacity) if item.slot not in known]
        chosen = self.rng.choice(len(rest), min(count - len(due), len(rest)), replace=False) if rest else []
        self.last = due + [rest[k] for k in chosen]
        return [item.experience for item in self.last]

    def judge(self, scores: np.ndarray, step: int) -> None:
        """Reschedule what was replayed."""
        self.buffer.update_after_replay(self.last, scores, step)


def network() -> nn.Sequential:
    """Return a small classifier of 8 x 8 pixels; everything but its last layer makes the embedding."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def run(memory: Memory | None, seed: int, epochs: int) -> tuple[float, float]:
    """Return forgetting and final average accuracy of one run through all tasks."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels / 16.0).astype(np.float32)
    test = np.random.default_rng(0).random(len(labels)) < 0.25
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accuracy = np.zeros((len(TASKS), len(TASKS)))
    step = 0
    for number, classes in enumerate(TASKS):
        own = np.flatnonzero(np.isin(labels, classes) & ~test)
        for _ in range(epochs):
            for batch in np.array_split(rng.permutation(own), len(own) // BATCH):
                step += 1
                replay = (
                    memory.recall(step, BATCH) if memory else [(pixels[k], labels[k]) for k in rng.choice(own, BATCH)]
                )
                scores = learn(model, optimizer, pixels[batch], labels[batch], replay)
                if memory:
                    memory.judge(scores, step)
        if memory:
            with torch.no_grad():
                hidden = model[:-1](torch.from_numpy(pixels[own])).numpy()
            for k, embedding in zip(own, hidden, strict=True):
                memory.store(pixels[k], int(labels[k]), embedding)
        for other, others in enumerate(TASKS[: number + 1]):
            asked = np.isin(labels, others) & test
            with torch.no_grad():
                answers = model(torch.from_numpy(pixels[asked])).argmax(1).numpy()
            accuracy[number, other] = (answers == labels[asked]).mean()
    forgetting = (accuracy[:-1].max(axis=0) - accuracy[-1])[:-1].mean()
    return float(forgetting), float(accuracy[-1].mean())


def learn(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pixels: np.ndarray,
    labels: np.ndarray,
    replay: list[tuple[np.ndarray, int]],
) -> np.ndarray:
    """Take one step on a batch and its replay; return the probability of each replayed answer."""
    inputs = torch.from_numpy(np.concatenate([pixels, *(item[None] for item, _ in replay)]))
    answers = torch.tensor([*labels.tolist(), *(int(label) for _, label in replay)])
    losses = nn.functional.cross_entropy(model(inputs), answers, reduction="none")
    optimizer.zero_grad()
    losses.mean().backward()
    optimizer.step()
    return torch.exp(-losses[len(labels) :].detach()).numpy()


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Run every kind of replay over all seeds; return the mean forgetting of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--capacity", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=10, help="per task")
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds, epochs = (1, 2) if options.quick else (options.seeds, options.epochs)
    kinds = {
        "none": lambda seed: None,
        "uniform": lambda seed: Uniform(options.capacity, seed),
        "spaced alone": lambda seed: Reviewed(options.capacity, seed, alpha=0.0),
        "hybrid": lambda seed: Reviewed(options.capacity, seed, alpha=0.2),
    }
    print(f"{seeds} seeds, {options.capacity} examples held: mean (deviation over seeds)")
    forgetting: dict[str, np.ndarray] = {}
    for name, make in kinds.items():
        results = np.array([run(make(seed), seed, epochs) for seed in range(seeds)])
        cells = [f"{column.mean():.3f} ({column.std():.3f})" for column in results.T]
        print(f"{name:<14} forgetting {cells[0]}   final accuracy {cells[1]}", flush=True)
        forgetting[name] = results[:, 0]
    gain = forgetting["uniform"] - forgetting["hybrid"]
    print(f"uniform - hybrid: {gain.mean():+.4f}, standard error {gain.std() / math.sqrt(max(1, seeds - 1)):.4f}")
    return {name: float(values.mean()) for name, values in forgetting.items()}


if __name__ == "__main__":
    main()
