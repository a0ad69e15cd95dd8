"""Shares of a mixture: do those that follow the losses train as well as the best ones that stay?

python -m benchmarks.mixtures [--quick]

Five collections of three sources each, a small network, equally many steps for all. The static shares are those in
proportion to the sources' sizes and the ten of a grid (sixths, none 0); "adapt" is `Mixture(adapt="loss")`, which
starts in proportion, or from equal shares. Shown are mean test accuracy over the sources, and that of the worst one: of
the best static shares in hindsight (chosen on the other half of the seeds, as choosing on the same ones flatters the
best of eleven), and what the others have more, with its 95% interval over the seeds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.ndimage import rotate
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine, make_classification

from benchmarks.harness import columns, main, progress
from benchmarks.noise import Network, interval
from learnit_r8 import R8Scheduler
from learnit_r8.strategies import Mixture

EPOCHS, BATCH, FLOOR = 15, 32, 0.05
GRID = [tuple(part / 6 for part in parts) for parts in itertools.product(range(1, 5), repeat=3) if sum(parts) == 6]


class Source(NamedTuple):
    """Training and test data of one source."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def _split(x: np.ndarray, y: np.ndarray, train: int, rng: np.random.Generator, test: int = 200) -> Source:
    order = rng.permutation(len(y))
    here, there = order[:train], order[train : train + test]
    return Source(x[here].astype(np.float32), y[here], x[there].astype(np.float32), y[there])


def _digits() -> tuple[np.ndarray, np.ndarray]:
    x, y = load_digits(return_X_y=True)
    return x / 16, y


def turned(rng: np.random.Generator) -> list[Source]:
    """Digits upright, and turned by 20 and 60 degrees, ever fewer of them."""
    x, y = _digits()
    made = [
        rotate(x.reshape(-1, 8, 8), angle, (1, 2), reshape=False, order=1).reshape(len(x), -1) for angle in (0, 20, 60)
    ]
    return [_split(part, y, size, rng) for part, size in zip(made, (600, 300, 150), strict=True)]


def blurred(rng: np.random.Generator) -> list[Source]:
    """Digits with more and more noise, equally many."""
    x, y = _digits()
    return [_split(x + rng.normal(0, level, x.shape), y, 300, rng) for level in (0.0, 0.3, 0.6)]


def classes(rng: np.random.Generator) -> list[Source]:
    """Digits 0 to 3, 4 to 6, and 7 to 9, of which there are few."""
    x, y = _digits()
    kept = [np.isin(y, few) for few in ((0, 1, 2, 3), (4, 5, 6), (7, 8, 9))]
    return [_split(x[mask], y[mask], size, rng) for mask, size in zip(kept, (500, 200, 60), strict=True)]


def tasks(rng: np.random.Generator) -> list[Source]:
    """Tumours, wines and irises, in features of their own of one network."""
    found = []
    for number, (load, train) in enumerate(((load_breast_cancer, 400), (load_wine, 110), (load_iris, 90))):
        x, y = load(return_X_y=True)
        wide = np.zeros((len(x), 46))
        start = (0, 30, 43)[number]
        x = ((x - x.mean(0)) / x.std(0))[:, : (30, 13, 3)[number]]
        wide[:, start : start + x.shape[1]] = x
        found.append(_split(wide, y, train, rng, 60))
    return found


def clouds(rng: np.random.Generator) -> list[Source]:
    """Three problems of rising difficulty; a feature says which one it is."""
    found = []
    for number, (apart, size) in enumerate(((2.0, 200), (1.0, 400), (0.6, 300))):
        x, y = make_classification(
            size + 400, 20, n_informative=10, n_redundant=0, n_classes=4, class_sep=apart,
            random_state=int(rng.integers(1 << 30)),
        )  # fmt: skip
        found.append(_split(np.hstack([x, np.tile(np.eye(3)[number] * 3, (len(x), 1))]), y, size, rng, 400))
    return found


COLLECTIONS: dict[str, Callable[[np.random.Generator], list[Source]]] = {
    make.__name__: make for make in (turned, blurred, classes, tasks, clouds)
}


def train(sources: list[Source], shares: tuple[float, ...] | None, adapt: str | None, seed: int) -> list[float]:
    """Return the test accuracy of each source."""
    x, y = (np.concatenate([getattr(source, name) for source in sources]) for name in ("x", "y"))
    ends = np.cumsum([0, *(len(source.y) for source in sources)])
    ids = {f"s{k}": range(*pair) for k, pair in enumerate(itertools.pairwise(ends.tolist()))}
    given = None if shares is None else dict(zip(ids, shares, strict=True))
    floor = {"floor": FLOOR} if adapt else {}
    network = Network(x.shape[1], int(y.max()) + 1, seed)
    with R8Scheduler(
        len(y), BATCH, num_epochs=EPOCHS, initial_lr=0.05, seed=seed, checkpoint_dir=None, ui="off",
        strategy=Mixture(ids, given, adapt, **floor), noise_guard="off",
    ) as run:  # fmt: skip
        for _ in run.epoch_iterator():
            for batch in run.batch_iterator():
                run.update_with_loss(network.train_step(x[batch.indices], y[batch.indices], batch.lr))
    return [network.accuracy(source.x_test, source.y_test) for source in sources]


def run(*, quick: bool = False, seeds: int = 10) -> dict[str, Any]:
    """Measure; `quick`: two seeds of one collection."""
    names, seeds = (["classes"], 2) if quick else (list(COLLECTIONS), seeds)
    return {name: _collection(name, seeds) for name in names}


def _collection(name: str, seeds: int) -> dict[str, Any]:
    progress(name)
    ways: dict[str, tuple[tuple[float, ...] | None, str | None]] = {"in proportion": (None, None)}
    ways |= {" ".join(f"{share:.2f}" for share in shares): (shares, None) for shares in GRID}
    ways |= {"adapt": (None, "loss"), "adapt, equal": ((1 / 3,) * 3, "loss")}
    rows: dict[str, list[list[float]]] = {way: [] for way in ways}
    for seed in range(seeds):
        sources = COLLECTIONS[name](np.random.default_rng(seed))
        for way, (shares, adapt) in ways.items():
            rows[way].append(train(sources, shares, adapt, seed))
    accuracy = {way: np.array(found) for way, found in rows.items()}
    found: dict[str, Any] = {}
    for kind, measure in (("mean", lambda a: a.mean(1)), ("worst", lambda a: a.min(1))):
        of = {way: measure(values) for way, values in accuracy.items()}
        static = [way for way in of if not way.startswith("adapt")]
        best, chosen = np.empty(seeds), []
        for half in (0, 1):  # what is best on one half is judged on the other
            way = max(static, key=lambda way: of[way][half::2].mean())
            best[1 - half :: 2] = of[way][1 - half :: 2]
            chosen.append(way)
        found[kind] = {"shares": chosen, "best": float(best.mean())}
        for way in ("in proportion", "adapt", "adapt, equal"):
            gain, width = interval(of[way] - best)
            found[kind][way] = {"accuracy": float(of[way].mean()), "gain": gain, "interval": width}
    return found


def table(results: dict[str, Any]) -> str:
    ways, rows = ("in proportion", "adapt", "adapt, equal"), []
    for name, kinds in results.items():
        for kind, row in kinds.items():
            cells = [f"{100 * row[way]['gain']:+.2f} ±{100 * row[way]['interval']:.2f}" for way in ways]
            rows.append([name, kind, f"{row['best']:.3f}", *cells, " | ".join(row["shares"])])
    return columns(("collection", "sources", "best static", *(f"{way}, points" for way in ways), "best shares"), rows)


if __name__ == "__main__":
    main(run, table, __doc__)
