"""Is the overfitting verdict right? Real trainings on scikit-learn's data sets; a large test set says what is true.

    python -m benchmarks.overfitting            # 20 curves of tasks that the rule was not built on
    python -m benchmarks.overfitting second     # 20 curves of the tasks that it was built on, other seeds
    python -m benchmarks.overfitting first      # 20 others, some with validation sets of 40 samples
    python -m benchmarks.overfitting built-on   # those that it was built on

Each list was written down before the rule was run on it, and the rule is as it was before the first. A run overfits, in
truth, if its test loss over the last tenth of the epochs lies more than 5% above the lowest mean of five epochs, while
its training loss fell since. The rule sees validation losses only, of other samples.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn import datasets

from learnit_r8 import Evaluation, R8Scheduler
from learnit_r8.events import Evaluated, OverfittingSeen


class Curve(NamedTuple):
    """A training: data set, samples to train on and to validate with, model, optimizer."""

    data: str
    train: int
    validate: int
    width: int = 64  # of two hidden layers; 0: a linear model
    epochs: int = 60
    lr: float = 1e-3
    noise: float = 0.0  # share of wrong labels, or noise on targets, of the samples that are trained on
    dropout: float = 0.0
    decay: float = 0.0
    seed: int = 0
    schedule: str = "constant"


BUILT_ON = [
    Curve("digits", 200, 300, width=128, epochs=80, lr=3e-3, noise=0.1),
    Curve("digits", 1000, 300, dropout=0.2),
    Curve("digits", 1000, 60, noise=0.3, width=256, seed=1),
    Curve("cancer", 200, 150, width=128, lr=3e-3, noise=0.2),
    Curve("cancer", 300, 100, width=0, decay=0.1),
    Curve("cancer", 300, 60, seed=2, schedule="cosine"),
    Curve("diabetes", 200, 100, width=128, lr=3e-3, epochs=100),
    Curve("diabetes", 250, 60, width=0, lr=1e-2),
    Curve("wine", 80, 40, width=64, lr=3e-3, noise=0.2, seed=1),
    Curve("wine", 80, 40, width=16, epochs=40, decay=0.1),
    Curve("friedman", 300, 200, width=128, lr=3e-3, noise=1.0, epochs=100),
    Curve("friedman", 2000, 200, width=32),
]
FIRST = [
    Curve("digits", 150, 200, width=256, epochs=100, lr=3e-3, noise=0.2, seed=11),
    Curve("digits", 400, 100, width=128, epochs=80, noise=0.2, seed=12),
    Curve("digits", 1200, 200, width=128, epochs=40, seed=13),
    Curve("digits", 1200, 50, width=64, epochs=60, dropout=0.5, seed=14),
    Curve("digits", 800, 150, width=0, epochs=60, lr=3e-3, seed=15),
    Curve("digits", 600, 300, width=64, epochs=60, lr=3e-2, seed=16),
    Curve("digits", 300, 60, width=512, epochs=60, noise=0.4, seed=17, schedule="cosine"),
    Curve("digits", 1000, 300, width=128, epochs=15, seed=18),
    Curve("cancer", 150, 100, width=256, epochs=100, lr=3e-3, noise=0.3, seed=11),
    Curve("cancer", 300, 50, width=32, epochs=60, dropout=0.3, decay=0.05, seed=12),
    Curve("cancer", 250, 150, width=0, epochs=80, lr=3e-3, seed=13),
    Curve("cancer", 100, 200, width=128, epochs=120, lr=1e-2, seed=14),
    Curve("diabetes", 150, 100, width=256, epochs=120, lr=3e-3, seed=11),
    Curve("diabetes", 250, 80, width=16, epochs=60, decay=0.1, seed=12),
    Curve("diabetes", 200, 40, width=64, epochs=80, dropout=0.5, seed=13),
    Curve("wine", 60, 50, width=128, epochs=100, lr=3e-3, noise=0.3, seed=11),
    Curve("wine", 90, 40, width=0, epochs=60, lr=1e-2, seed=12),
    Curve("friedman", 200, 100, width=256, epochs=120, lr=3e-3, noise=2.0, seed=11),
    Curve("friedman", 1500, 100, width=64, epochs=40, seed=12),
    Curve("friedman", 800, 50, width=64, epochs=80, noise=1.0, dropout=0.2, seed=13, schedule="cosine"),
]

SECOND = [
    Curve("digits", 300, 600, width=128, epochs=80, lr=3e-3, noise=0.15, seed=101),
    Curve("digits", 500, 500, width=256, epochs=60, noise=0.3, seed=102),
    Curve("digits", 700, 500, width=64, epochs=40, dropout=0.3, seed=103),
    Curve("digits", 700, 500, width=0, epochs=80, lr=3e-3, seed=104),
    Curve("digits", 600, 600, width=32, epochs=30, seed=105),
    Curve("digits", 200, 700, width=512, epochs=60, noise=0.4, seed=106, schedule="cosine"),
    Curve("parity", 300, 600, width=128, epochs=80, lr=3e-3, noise=0.1, seed=107),
    Curve("parity", 700, 500, width=0, epochs=60, lr=3e-3, seed=108),
    Curve("parity", 500, 600, width=256, epochs=100, noise=0.2, seed=109),
    Curve("parity", 700, 500, width=32, epochs=25, decay=0.05, seed=110),
    Curve("cancer", 150, 200, width=128, epochs=80, lr=3e-3, noise=0.2, seed=111),
    Curve("cancer", 150, 200, width=0, epochs=60, lr=3e-3, seed=112),
    Curve("cancer", 120, 220, width=256, epochs=120, noise=0.3, seed=113, schedule="cosine"),
    Curve("diabetes", 120, 160, width=128, epochs=100, lr=3e-3, seed=114),
    Curve("diabetes", 120, 160, width=0, epochs=60, lr=1e-2, seed=115),
    Curve("diabetes", 140, 150, width=256, epochs=80, lr=1e-3, seed=116),
    Curve("friedman", 150, 1500, width=256, epochs=120, noise=4.0, seed=117),
    Curve("friedman", 2000, 1000, width=64, epochs=30, seed=118),
    Curve("friedman", 1000, 1000, width=0, epochs=40, lr=1e-2, seed=119),
    Curve("friedman", 1500, 1000, width=32, epochs=60, noise=1.0, decay=0.05, seed=120, schedule="cosine"),
]

THIRD = [  # other tasks, validation sets of 150 samples and more
    Curve("moons", 100, 400, width=256, epochs=100, lr=3e-3, noise=0.2, seed=201),
    Curve("moons", 1000, 300, width=32, epochs=40, seed=202),
    Curve("moons", 200, 200, width=0, epochs=60, lr=1e-2, seed=203),
    Curve("moons", 150, 300, width=128, epochs=120, lr=3e-3, noise=0.3, seed=204, schedule="cosine"),
    Curve("hastie", 200, 500, width=128, epochs=80, lr=3e-3, seed=205),
    Curve("hastie", 2000, 400, width=64, epochs=30, dropout=0.2, seed=206),
    Curve("hastie", 300, 300, width=0, epochs=50, lr=3e-3, noise=0.1, seed=207),
    Curve("hastie", 400, 150, width=256, epochs=60, noise=0.2, seed=208),
    Curve("quantiles", 200, 300, width=128, epochs=100, lr=3e-3, noise=0.2, seed=209),
    Curve("quantiles", 1500, 500, width=64, epochs=40, seed=210),
    Curve("quantiles", 300, 200, width=64, epochs=60, dropout=0.4, decay=0.1, noise=0.2, seed=211),
    Curve("sparse", 200, 300, width=256, epochs=80, lr=3e-3, seed=212),
    Curve("sparse", 1500, 300, width=0, epochs=40, lr=3e-3, seed=213),
    Curve("sparse", 300, 300, width=64, epochs=50, decay=0.3, seed=214),
    Curve("friedman2", 150, 400, width=256, epochs=120, lr=3e-3, noise=3.0, seed=215),
    Curve("friedman2", 1500, 500, width=64, epochs=40, noise=0.5, seed=216),
    Curve("friedman3", 120, 300, width=128, epochs=100, lr=3e-3, noise=4.0, seed=217, schedule="cosine"),
    Curve("friedman3", 1500, 300, width=32, epochs=40, seed=218),
    Curve("roll", 150, 200, width=256, epochs=100, lr=3e-3, noise=3.0, seed=219),
    Curve("roll", 1500, 400, width=64, epochs=60, noise=1.0, seed=220, schedule="cosine"),
]


def load(name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return features, standardised, and targets: classes, or standardised numbers."""
    made = {
        "friedman": lambda: datasets.make_friedman1(4000, random_state=seed),
        "friedman2": lambda: datasets.make_friedman2(4000, random_state=seed),
        "friedman3": lambda: datasets.make_friedman3(4000, random_state=seed),
        "roll": lambda: datasets.make_swiss_roll(4000, random_state=seed),
        "moons": lambda: datasets.make_moons(4000, noise=0.3, random_state=seed),
        "hastie": lambda: datasets.make_hastie_10_2(4000, random_state=seed),
        "quantiles": lambda: datasets.make_gaussian_quantiles(
            n_samples=4000, n_features=6, n_classes=3, random_state=seed
        ),
        "sparse": lambda: datasets.make_classification(4000, 60, n_informative=6, n_classes=4, random_state=seed),
    }
    if name in made:
        x, y = made[name]()
        y = (y > 0).astype(int) if name == "hastie" else y
    else:
        kinds = {"cancer": datasets.load_breast_cancer, "diabetes": datasets.load_diabetes, "wine": datasets.load_wine}
        x, y = kinds.get(name, datasets.load_digits)(return_X_y=True)
        y = y % 2 if name == "parity" else y
    if y.dtype.kind == "f":
        y = (y - y.mean()) / y.std()
    return (x - x.mean(0)) / (x.std(0) + 1e-6), y


def run(curve: Curve) -> dict[str, Any]:
    """Train; return the losses of each epoch, what the scheduler said, and what is true."""
    rng = np.random.default_rng(curve.seed)
    torch.manual_seed(curve.seed)
    x, y = load(curve.data, curve.seed)
    order = rng.permutation(len(x))
    parts = np.split(order, [curve.train, curve.train + curve.validate])
    classes = 0 if y.dtype.kind == "f" else int(y.max()) + 1
    learned = y[parts[0]].copy()
    wrong = rng.random(len(learned)) < curve.noise
    learned = np.where(wrong, rng.integers(classes, size=len(learned)), learned) if classes else learned + (
        curve.noise * rng.standard_normal(len(learned)) / 5
    )  # fmt: skip
    tensors = [(torch.tensor(x[p], dtype=torch.float32), torch.tensor(y[p])) for p in parts]
    inputs, targets = tensors[0][0], torch.tensor(learned)
    if not classes:
        targets, tensors = targets.float(), [(a, b.float()) for a, b in tensors]
    model, optimizer = _model(x.shape[1], max(classes, 1), curve)

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        out = model(a)
        if classes:
            return torch.nn.functional.cross_entropy(out, b, reduction="none")
        return (out.squeeze(1) - b) ** 2

    tested: list[float] = []

    @torch.no_grad()
    def evaluate() -> float:
        model.eval()
        tested.append(float(loss(*tensors[2]).mean()))
        value = float(loss(*tensors[1]).mean())
        model.train()
        return value

    heard = _Heard()
    with R8Scheduler(
        len(inputs), 32, num_epochs=curve.epochs, initial_lr=curve.lr, scheduler_mode=curve.schedule, ui="off",
        strategy="uniform", checkpoint_dir=None, sinks=[heard], evaluation=Evaluation(run=evaluate), seed=curve.seed,
    ) as scheduler:  # fmt: skip
        for _ in scheduler.epoch_iterator():
            for indices, lr in scheduler.batch_iterator():
                for group in optimizer.param_groups:
                    group["lr"] = lr
                losses = loss(inputs[indices], targets[indices])
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
                scheduler.update_with_loss(losses)
    return {
        "train": heard.train,
        "val": heard.val,
        "test": tested,
        "said": heard.said,
        "true": _true(tested, heard.train),
    }


class _Heard:
    def __init__(self) -> None:
        self.train: list[float] = []
        self.val: list[float] = []
        self.said = ""

    def record(self, event: object) -> None:
        if isinstance(event, Evaluated):
            self.train.append(event.train_loss)
            self.val.append(event.value)
        elif isinstance(event, OverfittingSeen):
            self.said = self.said or event.reason


def _model(inputs: int, outputs: int, curve: Curve) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    layers: list[torch.nn.Module] = []
    if curve.width:
        for size in (inputs, curve.width):
            layers += [torch.nn.Linear(size, curve.width), torch.nn.ReLU(), torch.nn.Dropout(curve.dropout)]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(curve.width or inputs, outputs))
    return model, torch.optim.AdamW(model.parameters(), lr=curve.lr, weight_decay=curve.decay)


def _true(test: list[float], train: list[float]) -> bool:
    means = np.convolve(test, np.ones(5) / 5, "valid")
    best = int(np.argmin(means))
    end = max(1, len(test) // 10)
    rise = float(np.mean(test[-end:])) / float(means[best]) - 1.0
    return rise > 0.05 and float(np.mean(train[-end:])) < float(np.mean(train[best : best + 5]))


def main() -> None:
    """Print each curve, and how many verdicts are right."""
    curves = {"built-on": BUILT_ON, "first": FIRST, "second": SECOND, "third": THIRD}[
        sys.argv[1] if sys.argv[1:] else "third"
    ]
    right = 0
    for curve in curves:
        found = run(curve)
        good = bool(found["said"]) == found["true"]
        right += good
        print(
            "right" if good else "WRONG", "overfits" if found["true"] else "does not", curve, found["said"], flush=True
        )
    print(f"{right} of {len(curves)} right")


if __name__ == "__main__":
    main()
