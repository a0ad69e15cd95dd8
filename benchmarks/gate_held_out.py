"""Trainings and curves that the gate's rule was not made on; written down before the rule was changed, run once after.

python -m benchmarks.gate_held_out [--quick]

Ten trainings of other tasks, through the scheduler, with the norm of the gradient and without: clean (two of them
change their level on purpose), and with four lone losses of 20 times the level each, gradient included. Four families
of curves.
"""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn import datasets
from torch import nn

from benchmarks.gate import judged
from learnit_r8 import R8Scheduler

_CE = nn.CrossEntropyLoss(reduction="none")
Losses = Callable[[nn.Module, torch.Tensor, int], torch.Tensor]


class Task(NamedTuple):
    """Samples, how to make a model, one loss a sample (of model, ids and step), and how it is trained."""

    samples: int
    model: Callable[[], nn.Module]
    losses: Losses
    batch: int
    lr: float
    adam: bool = True
    options: dict[str, Any] = {}  # noqa: RUF012  (never written)


def _mlp(*sizes: int, dropout: float = 0.0) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers[:-2])


def _classes(x: Any, y: Any, *sizes: int, changed: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
             dropout: float = 0.0) -> tuple[int, Callable[[], nn.Module], Losses]:  # fmt: skip
    x = torch.tensor((x - x.mean(0)) / (x.std(0) + 1e-6), dtype=torch.float32)
    y = torch.tensor(y).long()

    def losses(model: nn.Module, ids: torch.Tensor, step: int) -> torch.Tensor:
        rows = x[ids] if changed is None else changed(x[ids], step)
        return _CE(model(rows), y[ids])  # type: ignore[no-any-return]

    return len(x), lambda: _mlp(x.shape[1], *sizes, int(y.max()) + 1, dropout=dropout), losses


def _squares(x: Any, y: Any, *sizes: int, factor: Callable[[int], float] = lambda _: 1.0) -> Any:
    x = torch.tensor((x - x.mean(0)) / (x.std(0) + 1e-6), dtype=torch.float32)
    y = torch.tensor((y - y.mean(0)) / (y.std(0) + 1e-6), dtype=torch.float32).reshape(len(x), -1)

    def losses(model: nn.Module, ids: torch.Tensor, step: int) -> torch.Tensor:
        return factor(step) * (model(x[ids]) - y[ids]).square().mean(1)

    return len(x), lambda: _mlp(x.shape[1], *sizes, y.shape[1]), losses


class _Words(nn.Module):
    def __init__(self, attends: bool) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(16, 24), nn.Linear(24, 16)
        layer = nn.TransformerEncoderLayer(24, 2, 48, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2) if attends else nn.GRU(24, 24, batch_first=True)
        self.attends = attends

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.embedding(ids)
        if not self.attends:
            return self.head(self.body(x)[0])
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.body(x, mask=mask, is_causal=True))


def _text(attends: bool, samples: int) -> Any:
    rng = np.random.default_rng(5)
    table = rng.dirichlet(np.full(16, 0.15), 16).cumsum(1)
    rows = np.zeros((samples, 13), np.int64)
    for k in range(1, 13):
        rows[:, k] = (rng.random(samples)[:, None] > table[rows[:, k - 1]]).sum(1).clip(0, 15)
    text = torch.from_numpy(rows)

    def losses(model: nn.Module, ids: torch.Tensor, _: int) -> torch.Tensor:
        return _CE(model(text[ids, :-1]).transpose(1, 2), text[ids, 1:]).mean(1)  # type: ignore[no-any-return]

    return samples, lambda: _Words(attends), losses


def _wrong(y: Any, share: float) -> Any:
    rng = np.random.default_rng(6)
    return np.where(rng.random(len(y)) < share, rng.integers(0, int(y.max()) + 1, len(y)), y)


def tasks() -> dict[str, Task]:
    """Return the trainings by name."""
    moons = datasets.make_moons(300, noise=0.25, random_state=1)
    quantiles = datasets.make_gaussian_quantiles(n_samples=800, n_features=5, n_classes=3, random_state=2)
    hastie = datasets.make_hastie_10_2(1500, random_state=3)
    friedman = datasets.make_friedman2(1000, noise=5.0, random_state=4)
    sparse = datasets.make_classification(1200, 30, n_informative=6, n_classes=4, random_state=5)
    cancer, roll = datasets.load_breast_cancer(return_X_y=True)[0], datasets.make_swiss_roll(900, random_state=6)
    digits = datasets.load_digits(return_X_y=True)

    def noisier(x: torch.Tensor, step: int) -> torch.Tensor:
        return x + (3.0 * torch.randn_like(x) if step >= 1500 else 0.0)

    def ninefold(step: int) -> float:
        return 9.0 if step > 1700 else 1.0

    return {
        "moons to interpolation": Task(*_classes(*moons, 64, 64), 16, 0.1, adam=False),
        "quantiles, 10% wrong": Task(*_classes(quantiles[0], _wrong(quantiles[1], 0.1), 128, 128), 8, 2e-3),
        "hastie, dropout": Task(
            *_classes(hastie[0], hastie[1] > 0, 64, dropout=0.3), 64, 3e-3, options={"scheduler_mode": "one_cycle"}
        ),
        "friedman": Task(*_squares(*friedman, 64, 64), 32, 3e-3),
        "characters, recurrent": Task(*_text(False, 800), 16, 5e-3),
        "characters, attention": Task(*_text(True, 600), 8, 2e-3, options={"scheduler_mode": "cosine"}),
        "cancer, autoencoder": Task(*_squares(cancer, cancer, 8, 32), 16, 3e-3),
        "parity to interpolation": Task(*_classes(digits[0][:900], digits[1][:900] % 2, 64), 12, 3e-3),
        "sparse, noise switched on": Task(*_classes(*sparse, 64, changed=noisier), 32, 3e-3),
        "roll, loss times 9 from a step on": Task(*_squares(*roll, 64, factor=ninefold), 32, 3e-3),
    }  # fmt: skip


def train(task: Task, seed: int, steps: int, *, norms: bool, outliers: frozenset[int] = frozenset()) -> set[int]:
    """Train with checks; return the steps that were left out."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    model = task.model()
    make: Any = torch.optim.Adam if task.adam else torch.optim.SGD
    optimizer = make(model.parameters(), lr=task.lr, **({} if task.adam else {"momentum": 0.9}))
    levels: deque[float] = deque(maxlen=64)
    left_out: set[int] = set()
    with R8Scheduler(
        task.samples, task.batch, num_steps=steps, initial_lr=task.lr, seed=seed, ui="off", checkpoint_dir=None,
        **task.options,
    ) as scheduler:  # fmt: skip
        for _ in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                optimizer.param_groups[0]["lr"] = batch.lr
                losses = task.losses(model, torch.from_numpy(batch.indices), batch.step)
                if batch.step in outliers:
                    losses = losses * (20.0 * float(np.median(levels)) / losses.mean().item())
                optimizer.zero_grad()
                losses.mean().backward()
                norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
                if scheduler.check(losses, norm if norms else None):
                    optimizer.step()
                else:
                    left_out.add(batch.step)
                levels.append(scheduler.update_with_loss(losses).loss)
    return left_out


def families(steps: int) -> dict[str, NDArray[np.float64]]:
    """Return generated curves, one of each family."""
    rng = np.random.default_rng(77)
    t = np.arange(steps)
    fall = 0.3 + 2.0 / np.sqrt(1.0 + t / 50.0)
    sixfold = np.where(rng.random(steps) < 1e-3, 6.0, 1.0)
    walk = np.exp(0.8 * _smooth(rng.standard_normal(steps), 0.99))
    return {
        "log-logistic, 16 a batch": fall * (1.0 / rng.random((16, steps)) - 1.0).__pow__(0.3).mean(0),
        "volatility that wanders": fall * np.exp(0.2 * walk * rng.standard_normal(steps)),
        "one in a thousand sixfold": fall * rng.lognormal(0, 0.15, steps) * sixfold,
        "Weibull, 4 a batch, toward zero": (0.02 + np.exp(-t / (steps / 8))) * rng.weibull(0.6, (4, steps)).mean(0),
    }  # fmt: skip


def _smooth(noise: NDArray[np.float64], keep: float) -> NDArray[np.float64]:
    made, at = np.empty_like(noise), 0.0
    for k, value in enumerate(noise):
        at = keep * at + (1.0 - keep * keep) ** 0.5 * value
        made[k] = at
    return made


def main() -> None:
    """Print what was left out."""
    quick = "--quick" in sys.argv
    steps = 800 if quick else 2500
    total = skipped = 0
    for name, task in tasks().items():
        clean = [train(task, seed, steps, norms=norms) for seed in (0, 1) for norms in (False, True)]
        row = [f"{sum(map(len, clean))} of {4 * steps} clean {sorted(set().union(*clean))}"]
        total, skipped = total + 4 * steps, skipped + sum(map(len, clean))
        for norms in (False, True):
            at = frozenset((300 + np.arange(4) * (steps - 400) // 4 + np.array([7, 31, 3, 55])).tolist())
            left = train(task, 2, steps, norms=norms, outliers=at)
            row.append(f"{'norms' if norms else 'losses'}: {len(left & at)} of 4, {len(left - at)} others")
        print(f"{name:36}", "; ".join(row), flush=True)
    print(f"{skipped} of {total:,} clean steps of trainings left out")
    for name, curve in families(4000 if quick else 100_000).items():
        print(f"{name:36} {judged(curve, [None] * len(curve))} of {len(curve):,}", flush=True)


if __name__ == "__main__":
    main()
