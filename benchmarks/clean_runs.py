"""Ordinary trainings through R8Scheduler, with nothing wrong in them: how often does it intervene?

python -m benchmarks.clean_runs [--quick]

Every run has backups on; the right number of interventions is 0. The detector was changed after some of
these runs failed, so they are tuning data: they guard against old faults and are no exam.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.harness import columns, main, progress
from learnit_r8 import R8Scheduler, TrainingDiverged
from learnit_r8.events import LossReported, RolledBack, SpikeSeen


@dataclass(frozen=True)
class Recipe:
    """One training.

    Attributes:
        data: "digits", "cancer", "diabetes" or "linear".
        batch: Samples a step.
        epochs: Budget.
        lr: Peak learning rate.
        adam: Adam in place of SGD with momentum 0.9.
        dropout: Probability.
        noise: Standard deviation of noise added to the inputs at every step (augmentation).
        flipped: Share of samples whose target is wrong.
        scalar: Report one number a batch.
        options: Further arguments of `R8Scheduler`.
    """

    data: str
    batch: int
    epochs: int
    lr: float
    adam: bool = False
    dropout: float = 0.0
    noise: float = 0.0
    flipped: float = 0.0
    scalar: bool = False
    options: dict[str, Any] = field(default_factory=dict)


RECIPES: dict[str, Recipe] = {
    "digits, batch 1": Recipe("digits", 1, 3, 0.002),
    "digits, batch 1, numbers": Recipe("digits", 1, 3, 0.002, scalar=True, options={"strategy": "uniform"}),
    "digits, batch 8, interpolation": Recipe("digits", 8, 25, 0.02),
    "digits, batch 8, uniform, numbers": Recipe(
        "digits", 8, 25, 0.02, scalar=True, options={"strategy": "uniform", "scheduler_mode": "linear"}
    ),
    "digits, batch 64, edge of stability": Recipe("digits", 64, 80, 0.25, options={"scheduler_mode": "constant"}),
    "digits, batch 64, warm restarts": Recipe(
        "digits", 64, 80, 0.1, options={"scheduler_mode": "cosine_with_restarts"}
    ),
    "digits, batch 8, restarts, uniform": Recipe(
        "digits", 8, 24, 0.02, options={"scheduler_mode": "cosine_with_restarts", "strategy": "uniform"}
    ),
    "digits, noise and dropout": Recipe(
        "digits", 32, 40, 0.05, dropout=0.3, noise=0.5, options={"scheduler_mode": "one_cycle"}
    ),
    "digits, a tenth mislabeled": Recipe(
        "digits", 32, 60, 0.05, flipped=0.1, options={"scheduler_mode": "warmup_stable_decay"}
    ),
    "digits, Adam, numbers": Recipe("digits", 64, 60, 3e-3, adam=True, scalar=True),
    "digits, found rate": Recipe("digits", 64, 60, 0.01, options={"auto_find_lr": True}),
    "cancer, batch 1": Recipe("cancer", 1, 10, 0.01, options={"scheduler_mode": "inverse_sqrt"}),
    "cancer, batch 8, dropout": Recipe(
        "cancer", 8, 60, 0.02, dropout=0.3, options={"scheduler_mode": "cosine_with_min_lr", "min_lr": 1e-3}
    ),
    "cancer, batch 64, Adam": Recipe("cancer", 64, 250, 1e-2, adam=True, options={"scheduler_mode": "polynomial"}),
    "cancer, batch 8, 2% mislabeled": Recipe("cancer", 8, 60, 0.02, flipped=0.02, scalar=True),
    "diabetes, squared error, batch 8": Recipe("diabetes", 8, 80, 2e-3),
    "diabetes, squared error, batch 1": Recipe("diabetes", 1, 12, 3e-4, options={"scheduler_mode": "constant"}),
    "diabetes, Adam to interpolation": Recipe("diabetes", 64, 400, 5e-3, adam=True, scalar=True),
    "linear, noiseless, batch 32": Recipe("linear", 32, 60, 0.01),
    "linear, no warm-up, high rate": Recipe(
        "linear", 32, 60, 0.02, options={"warmup_proportion": 0.0, "scheduler_mode": "constant"}
    ),
}


class Interventions:
    """A sink that counts what the safety net did."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.spikes: list[SpikeSeen] = []
        self.losses: list[float] = []

    def record(self, event: object) -> None:
        self.count[type(event).__name__] += 1
        if isinstance(event, SpikeSeen):
            self.spikes.append(event)
        if isinstance(event, LossReported):
            self.losses.append(event.loss)


def _data(name: str, flipped: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    from sklearn import datasets

    if name == "linear":
        x = rng.standard_normal((1000, 30))
        return x, x @ rng.standard_normal(30)
    loaders = {
        "digits": datasets.load_digits, "cancer": datasets.load_breast_cancer, "diabetes": datasets.load_diabetes
    }  # fmt: skip
    x, y = loaders[name](return_X_y=True)
    x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    if name == "diabetes":
        return x, (y - y.mean()) / y.std()
    wrong = rng.random(len(y)) < flipped
    y[wrong] = rng.integers(0, y.max() + 1, int(wrong.sum()))
    return x, y


class Training:
    """A small network in PyTorch and its optimizer."""

    def __init__(self, recipe: Recipe, seed: int) -> None:
        import torch

        torch.manual_seed(seed)
        self.recipe, self.torch = recipe, torch
        x, y = _data(recipe.data, recipe.flipped, np.random.default_rng(seed))
        self.classes = y.dtype.kind in "iu"
        self.x = torch.tensor(x, dtype=torch.float32)
        self.y = torch.tensor(y) if self.classes else torch.tensor(y, dtype=torch.float32)
        outputs = int(y.max()) + 1 if self.classes else 1
        hidden = [] if recipe.data == "linear" else [64, 64]
        layers: list[torch.nn.Module] = []
        for a, b in itertools.pairwise([x.shape[1], *hidden]):
            layers += [torch.nn.Linear(a, b), torch.nn.ReLU(), torch.nn.Dropout(recipe.dropout)]
        self.model = torch.nn.Sequential(*layers, torch.nn.Linear((hidden or [x.shape[1]])[-1], outputs))
        parameters = self.model.parameters()
        self.optimizer = (
            torch.optim.Adam(parameters) if recipe.adam else torch.optim.SGD(parameters, lr=1.0, momentum=0.9)
        )

    def step(self, indices: np.ndarray, lr: float) -> Any:
        """Train on a batch; return the losses of its samples."""
        self.optimizer.param_groups[0]["lr"] = lr
        x = self.x[indices]
        if self.recipe.noise:
            x = x + self.recipe.noise * self.torch.randn_like(x)
        output = self.model(x)
        if self.classes:
            losses = self.torch.nn.functional.cross_entropy(output, self.y[indices], reduction="none")
        else:
            losses = (output[:, 0] - self.y[indices]) ** 2
        self.optimizer.zero_grad()
        losses.mean().backward()
        self.optimizer.step()
        return losses

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: Any) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def train(recipe: Recipe, seed: int, epochs: int | None = None) -> Interventions:
    """Run a recipe and return what the scheduler did about it."""
    training, heard = Training(recipe, seed), Interventions()
    scheduler = R8Scheduler(
        len(training.x),
        recipe.batch,
        num_epochs=epochs or recipe.epochs,
        initial_lr=recipe.lr,
        seed=seed,
        state_callback=training.state,
        load_callback=training.load,
        backup_every=20,
        checkpoint_dir=None,
        ui="off",
        sinks=[heard],
        **recipe.options,
    )
    with scheduler, contextlib.suppress(TrainingDiverged):  # counted by its spikes
        for _ in scheduler.epoch_iterator():
            for indices, lr in scheduler.batch_iterator():
                losses = training.step(indices, lr)
                scheduler.update_with_loss(losses.mean() if recipe.scalar else losses)
    return heard


def rows(seeds: int, epochs: int | None = None) -> Iterator[dict[str, Any]]:
    """Run every recipe; yield its steps, interventions and rollbacks."""
    for name, recipe in RECIPES.items():
        progress(name)
        count: Counter[str] = Counter()
        for seed in range(seeds):
            count += train(recipe, seed, epochs).count
        kinds = {"steps": LossReported, "interventions": SpikeSeen, "rollbacks": RolledBack}
        yield {"training": name, **{key: count[kind.__name__] for key, kind in kinds.items()}}


def run(*, quick: bool = False) -> dict[str, Any]:
    """Train; `quick`: one seed in place of three, 3 epochs of each."""
    import torch

    torch.set_num_threads(1)
    seeds = 1 if quick else 3
    found = list(rows(seeds, 3 if quick else None))
    return {"seeds": seeds, "trainings": found} | {key: sum(row[key] for row in found) for key in list(found[0])[1:]}


def table(results: dict[str, Any]) -> str:
    head = list(results["trainings"][0])
    steps, alarms = results["steps"], results["interventions"]
    return "\n".join([
        columns(head, [[row[key] for key in head] for row in results["trainings"]]),
        f"total: {steps:,} steps, {alarms} interventions, {alarms / steps * 1e5:.2f} per 100k",
    ])  # fmt: skip


if __name__ == "__main__":
    main(run, table, __doc__)
