"""Forgetting on four streams of real data: no replay, a reservoir, spaced repetition alone, the hybrid buffer.

    python -m benchmarks.continual [--quick] [--seeds 10]

The data come as tasks, one after the other, and a task's training set is never seen again:

    digits    scikit-learn's digits, five tasks of two classes each
    letters   capitals of twelve fonts, five tasks of five classes each
    modules   pieces of the standard library's sources, by module, tasks of two modules each
    turned    the digits with all their classes, turned by another angle in each of five tasks

Every kind of replay holds equally many examples and adds equally many to every step, so gradients
are matched; "none" repeats samples of the task in hand. Forgetting of a task is its best accuracy so far minus
its accuracy at the end (Chaudhry et al. 2018), averaged over all tasks but the last. The interval is that of the
mean difference to the reservoir, seed by seed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from torch import nn

from benchmarks.harness import columns, main, progress
from benchmarks.noise_data import letters
from benchmarks.tasks import modules
from examples.continual_digits import BATCH, Memory, Reviewed, Uniform, learn

STREAMS = ("digits", "letters", "modules", "turned")
KINDS: dict[str, Callable[[int, int], Memory | None]] = {
    "none": lambda capacity, seed: None,
    "reservoir": Uniform,
    "spaced": functools.partial(Reviewed, alpha=0.0),
    "hybrid": functools.partial(Reviewed, alpha=0.2),
}


@functools.cache
def stream(name: str) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Return inputs, classes and, for each task, the samples that belong to it."""
    if name == "turned":
        images, classes = load_digits(return_X_y=True)
        angles = np.array([-60, -30, 0, 30, 60])
        task = np.random.default_rng(0).integers(5, size=len(classes))
        turned = [rotate(x.reshape(8, 8), angles[k], reshape=False, order=1) for x, k in zip(images, task, strict=True)]
        return np.float32(turned).reshape(-1, 64) / 16, classes, [np.flatnonzero(task == k) for k in range(5)]
    if name == "digits":
        inputs, classes = load_digits(return_X_y=True)
        inputs, group = inputs / 16, 2
    elif name == "letters":
        (inputs, classes), group = letters(6000), 5
    else:
        (inputs, classes), group = modules(), 2
    count = int(classes.max() + 1) // group
    return np.float32(inputs), classes, [np.flatnonzero(classes // group == k) for k in range(count)]


def one_run(name: str, kind: str, seed: int, *, epochs: int, capacity: int) -> tuple[float, float]:
    """Return forgetting and final average accuracy of one run through all tasks."""
    inputs, classes, tasks = stream(name)
    torch.manual_seed(seed)
    rng, memory = np.random.default_rng(seed), KINDS[kind](capacity, seed)
    test = np.random.default_rng(0).random(len(classes)) < 0.25
    body = nn.Sequential(nn.Linear(inputs.shape[1], 64), nn.ReLU())
    model = nn.Sequential(*body, nn.Linear(64, int(classes.max()) + 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accuracy = np.zeros((len(tasks), len(tasks)))
    step = 0
    for number, members in enumerate(tasks):
        own = members[~test[members]]
        for _ in range(epochs):
            for batch in np.array_split(rng.permutation(own), max(1, len(own) // BATCH)):
                step += 1
                again = [(inputs[k], classes[k]) for k in rng.choice(own, BATCH)]
                replay = again if memory is None else memory.recall(step, BATCH)
                scores = learn(model, optimizer, inputs[batch], classes[batch], replay)
                if memory is not None:
                    memory.judge(scores, step)
        with torch.no_grad():
            if memory is not None:
                for k, embedding in zip(own, body(torch.from_numpy(inputs[own])).numpy(), strict=True):
                    memory.store(inputs[k], int(classes[k]), embedding)
            for other, others in enumerate(tasks[: number + 1]):
                asked = others[test[others]]
                answers = model(torch.from_numpy(inputs[asked])).argmax(1).numpy()
                accuracy[number, other] = (answers == classes[asked]).mean()
    forgetting = (accuracy[:-1].max(axis=0) - accuracy[-1])[:-1].mean()
    return float(forgetting), float(accuracy[-1].mean())


def run(*, quick: bool = False, seeds: int = 10, epochs: int = 10, capacity: int = 200) -> dict[str, Any]:
    """Measure; `quick`: two streams, two seeds, two epochs a task."""
    torch.set_num_threads(1)
    if quick:
        seeds, epochs = 2, 2
    rows = []
    for name in STREAMS[: 2 if quick else None]:
        found = {}
        for kind in KINDS:
            progress(f"{name}, {kind}")
            found[kind] = np.array(
                [one_run(name, kind, seed, epochs=epochs, capacity=capacity) for seed in range(seeds)]
            )
        for kind, values in found.items():
            gain = found["reservoir"][:, 0] - values[:, 0]
            half = 1.96 * gain.std(ddof=1) / seeds**0.5
            rows.append({
                "stream": name, "kind": kind, "forgetting": values[:, 0].mean(), "accuracy": values[:, 1].mean(),
                "less than the reservoir": gain.mean(), "half interval": half,
            })  # fmt: skip
    return {"rows": rows, "seeds": seeds, "epochs": epochs, "capacity": capacity}


def table(results: dict[str, Any]) -> str:
    lines = [
        [row["stream"], row["kind"], f"{row['forgetting']:.3f}", f"{row['accuracy']:.3f}",
         f"{row['less than the reservoir']:+.3f} +- {row['half interval']:.3f}"]
        for row in results["rows"]
    ]  # fmt: skip
    head = f"{results['seeds']} seeds, {results['epochs']} epochs a task, {results['capacity']} examples held"
    return "\n".join([head, columns(("stream", "replay", "forgetting", "accuracy", "less than the reservoir"), lines)])


if __name__ == "__main__":
    main(run, table, __doc__)
