"""What choosing 32 of every 128 candidates of a stream is worth, against 32 that are taken blindly.

    python -m benchmarks.streams [--seeds N] [--tasks A,B]

Each arm trains on as many samples, with the same initial weights and a learning rate that decays fully; a third of the
training data is set aside, which only the arm "holdout" uses: it scores by the loss less that of a model trained there
(Mindermann et al. 2022). A look at 128 candidates costs as much as training on 43 samples, so "uniform, equal compute"
trains 2.3 times as long. Cells are differences to uniform in points of test accuracy, with 95% intervals (Student's t).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.harness import columns, main, progress
from benchmarks.tasks import Model, Task, make_task
from learnit_r8.streams import StreamSelector

BATCH, CANDIDATES = 32, 128
DEARER = 1 + CANDIDATES / 3 / BATCH
"""Of a step with a look, where a forward pass is a third of a training step."""
TASKS = "digits,digits 20%,redundant,longtail,overlap 10%,teacher,modules,modules 15%"
ARMS = ("loss", "loss, no chance", "holdout", "keys", "uniform, equal compute")


def endless(ids: np.ndarray, seed: int) -> Iterator[int]:
    """Yield ids in random order, for ever."""
    rng = np.random.default_rng([seed, 5])
    while True:
        yield from rng.permutation(ids).tolist()


def losses(model: Model, ids: list[int]) -> np.ndarray:
    """Return a quick look at some samples."""
    outputs = model.forward(model.task.inputs[ids])[1]
    return model.losses(outputs, model.task.targets[ids])[0]


def trained(task: Task, ids: np.ndarray, arm: str, seed: int, steps: int, other: Model | None = None) -> Model:
    """Return a model after so many steps on a stream of these samples."""
    model, ones = task.model(seed), np.ones(BATCH)
    scores = {
        "loss": lambda items: losses(model, items),
        "loss, no chance": lambda items: losses(model, items),
        "holdout": lambda items: losses(model, items) - losses(other or model, items),
        "keys": None,
    }
    score = scores.get(arm, np.zeros_like)
    stream = StreamSelector(
        endless(ids, seed), BATCH, CANDIDATES, score=score, key=int if arm == "keys" else None, seed=seed,
        explore=0.0 if arm == "loss, no chance" else 0.25,
    )  # fmt: skip
    for step, chosen in zip(range(steps), stream, strict=False):
        rate = task.peak_lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        stream.update(model.train(np.array(chosen.items), rate, ones))
    return model


def one(name: str, seed: int) -> dict[str, float]:
    """Return what every arm scores."""
    task = make_task(name, seed)
    order = np.random.default_rng([seed, 6]).permutation(len(task.inputs))
    aside, ids = order[: len(order) // 3], order[len(order) // 3 :]
    steps = task.epochs * len(ids) // BATCH
    other = trained(task, aside, "uniform", seed + 1000, steps // 2)
    scores = {arm: trained(task, ids, arm, seed, steps, other).score() for arm in ("uniform", *ARMS[:-1])}
    return scores | {ARMS[-1]: trained(task, ids, "uniform", seed, int(DEARER * steps)).score()}


def run(seeds: int = 8, tasks: str = TASKS) -> dict[str, Any]:
    """Train everything."""
    from scipy import stats

    found = {}
    for name in tasks.split(","):
        progress(name)
        scores = [one(name, seed) for seed in range(seeds)]
        row: dict[str, Any] = {"uniform": 100 * float(np.mean([score["uniform"] for score in scores]))}
        for arm in ARMS:
            gains = 100 * np.array([score[arm] - score["uniform"] for score in scores])
            row[arm] = [float(gains.mean()), float(stats.t.ppf(0.975, seeds - 1) * gains.std(ddof=1) / seeds**0.5)]
        found[name] = row
    return found


def show(found: dict[str, Any]) -> str:
    """Return the table as text."""
    rows = [
        [name, f"{row['uniform']:.1f}", *("{:+.1f} ± {:.1f}".format(*row[a]) for a in ARMS)]
        for name, row in found.items()
    ]
    return columns(("task", "uniform", *ARMS), rows)


if __name__ == "__main__":
    main(run, show, __doc__)
