"""Small learning tasks and numpy models for the benchmarks: `make_task(name, seed)`.

The seed decides split, wrong labels and initial weights, so two strategies with one seed differ in
nothing but the samples they choose. Wrong labels are uniform over the other classes; the test set is clean.

* digits: scikit-learn's 1797 handwritten digits, 1197 to train on.
* redundant: 300 of them five times over (copies differ by noise of a third of a pixel's deviation), 900 once.
* longtail: from class to class a fifth to a quarter fewer, the rarest a twelfth of the most common.
* overlap, separated: a generated mixture, 4 classes of 3 Gaussian clusters in 20 dimensions.
* spirals: three interleaved arms in the plane.
* cancer: scikit-learn's breast-cancer data, 2 classes, 30 features.
* friedman: regression, Friedman 1991, "Multivariate adaptive regression splines", eq. 56; squared error.
* teacher: labels of a random network of 24 tanh units, 6 classes, 16 dimensions.
* sparse: a generated mixture, 5 classes of 2 clusters, 8 of 60 features say anything.
* modules: which of six modules of the standard library 80 characters come from, by hashed trigrams.
* diabetes: scikit-learn's regression, 442 patients, noisy by nature; squared error.
* characters: 16 characters of Python's own standard library are a sample; next-character loss in nats.
"""

from __future__ import annotations

import functools
import itertools
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, make_classification

Array = NDArray[Any]
CONTEXT, WINDOW = 8, 16


@dataclass(frozen=True, eq=False)
class Task:
    """What is to be learned, and how well it was.

    Attributes:
        name: As given to `make_task`.
        inputs: Training inputs, float32 `[N, features]` or characters `[N, CONTEXT + WINDOW]`.
        targets: Class ids, or float32 numbers for a regression, `[N]`.
        test_inputs: The same for the test set.
        test_targets: The same for the test set, never wrong.
        groups: Class as labelled, int64 `[N]`; None where there are no classes.
        wrong: True where the label is wrong, bool `[N]`.
        loss: The score is a mean loss, lower is better; otherwise accuracy.
        epochs: Budget.
        peak_lr: Learning rate that suits uniform sampling.
        network: `seed -> model` with `train(indices, lr, weights)` and `score()`.
    """

    name: str
    inputs: Array
    targets: Array
    test_inputs: Array
    test_targets: Array
    groups: Array | None
    wrong: Array
    loss: bool
    epochs: int
    peak_lr: float
    network: Callable[[Task, int], Model]

    def model(self, seed: int) -> Model:
        return self.network(self, seed)


class Model:
    """One hidden layer of ReLUs, SGD with momentum .9; weights live in one flat array."""

    def __init__(self, task: Task, seed: int, features: int, hidden: int, outputs: int) -> None:
        self.task = task
        rng = np.random.default_rng([seed, 1])
        shapes = [(features, hidden), (hidden,), (hidden, outputs), (outputs,), *self.extra_shapes()]
        ends = np.cumsum([0] + [int(np.prod(shape)) for shape in shapes])
        self.values, self.gradient, self.speed = (np.zeros(ends[-1], np.float32) for _ in range(3))
        cut = [slice(a, b) for a, b in itertools.pairwise(ends)]
        self.parts = [self.values[c].reshape(s) for c, s in zip(cut, shapes, strict=True)]
        self.gradients = [self.gradient[c].reshape(s) for c, s in zip(cut, shapes, strict=True)]
        for part in self.parts:
            if part.ndim == 2:
                part[:] = rng.normal(0, np.sqrt(2 / len(part)), part.shape)

    def extra_shapes(self) -> list[tuple[int, ...]]:
        return []

    def forward(self, inputs: Array) -> tuple[Array, Array]:
        hidden = np.maximum(inputs @ self.parts[0] + self.parts[1], 0)
        return hidden, hidden @ self.parts[2] + self.parts[3]

    def backward(self, inputs: Array, hidden: Array, delta: Array) -> Array:
        """Set the gradients from d loss / d outputs; return d loss / d hidden sums."""
        np.matmul(hidden.T, delta, out=self.gradients[2])
        delta.sum(axis=0, out=self.gradients[3])
        below = (delta @ self.parts[2].T) * (hidden > 0)
        np.matmul(inputs.T, below, out=self.gradients[0])
        below.sum(axis=0, out=self.gradients[1])
        return below

    def step(self, lr: float) -> None:
        self.speed *= 0.9
        self.speed += self.gradient
        self.values -= np.float32(lr) * self.speed

    def train(self, indices: Array, lr: float, weights: Array) -> Array:
        """Take one step on the weighted mean loss; return each sample's unweighted loss, float32 `[n]`."""
        inputs = self.task.inputs[indices]
        hidden, outputs = self.forward(inputs)
        losses, delta = self.losses(outputs, self.task.targets[indices])
        delta *= (weights / len(indices)).astype(np.float32)[:, None]
        self.backward(inputs, hidden, delta)
        self.step(lr)
        return losses

    def losses(self, outputs: Array, targets: Array) -> tuple[Array, Array]:
        """Return each row's loss and its derivative."""
        return cross_entropy(outputs, targets)

    def score(self) -> float:
        """Return accuracy or mean loss on the test set."""
        outputs = self.forward(self.task.test_inputs)[1]
        return float(np.mean(outputs.argmax(axis=1) == self.task.test_targets))


class Regressor(Model):
    """The same with one output and the squared error."""

    def losses(self, outputs: Array, targets: Array) -> tuple[Array, Array]:
        off = outputs - targets[:, None]
        return np.square(off[:, 0]), off

    def score(self) -> float:
        return float(np.mean(np.square(self.forward(self.task.test_inputs)[1][:, 0] - self.task.test_targets)))


class CharacterModel(Model):
    """The next character from the CONTEXT characters before it (Bengio et al. 2003), embeddings learned."""

    width = 12

    def __init__(self, task: Task, seed: int, characters: int, hidden: int) -> None:
        self.characters = characters
        super().__init__(task, seed, CONTEXT * self.width, hidden, characters)
        self.parts[4] *= 2

    def extra_shapes(self) -> list[tuple[int, ...]]:
        return [(self.characters, self.width)]

    def embed(self, text: Array) -> tuple[Array, Array, Array]:
        contexts = np.lib.stride_tricks.sliding_window_view(text[:, :-1], CONTEXT, axis=1).reshape(-1, CONTEXT)
        return contexts, self.parts[4][contexts].reshape(len(contexts), -1), text[:, CONTEXT:].reshape(-1)

    def train(self, indices: Array, lr: float, weights: Array) -> Array:
        contexts, inputs, targets = self.embed(self.task.inputs[indices])
        hidden, outputs = self.forward(inputs)
        losses, delta = cross_entropy(outputs, targets)
        delta *= np.repeat(weights / len(targets), WINDOW).astype(np.float32)[:, None]
        below = self.backward(inputs, hidden, delta)
        spread = (below @ self.parts[0].T).reshape(-1, self.width)
        rows = contexts.reshape(-1)
        for column in range(self.width):
            self.gradients[4][:, column] = np.bincount(rows, spread[:, column], self.characters)
        self.step(lr)
        return losses.reshape(-1, WINDOW).mean(axis=1)

    def score(self) -> float:
        _, inputs, targets = self.embed(self.task.test_inputs)
        return float(cross_entropy(self.forward(inputs)[1], targets)[0].mean())


def cross_entropy(outputs: Array, targets: Array) -> tuple[Array, Array]:
    """Return each row's loss in nats and its derivative."""
    rows = np.arange(len(targets))
    outputs = outputs - outputs.max(axis=1, keepdims=True)
    delta = np.exp(outputs)
    total = delta.sum(axis=1)
    losses = np.log(total) - outputs[rows, targets]
    delta /= total[:, None]
    delta[rows, targets] -= 1
    return losses, delta


# Data -----------------------------------------------------------------------------------------


def _classes(task: Task, seed: int) -> Model:
    return Model(task, seed, task.inputs.shape[1], 64, int(task.targets.max()) + 1)


def _mislabel(labels: Array, share: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return labels of which exactly that share was replaced by another class, and which."""
    wrong = np.zeros(len(labels), bool)
    wrong[rng.choice(len(labels), round(share * len(labels)), replace=False)] = True
    classes = int(labels.max()) + 1
    shift = np.where(wrong, rng.integers(1, classes, len(labels)), 0)
    return (labels + shift) % classes, wrong


def _labelled(
    name: str, data: tuple[Array, Array], rng: np.random.Generator, train: int, wrong: float, *,
    epochs: int, peak_lr: float,
    shape: Callable[[Array, Array, np.random.Generator], tuple[Array, Array]] | None = None,
) -> Task:  # fmt: skip
    order = rng.permutation(len(data[1]))
    inputs, labels = data[0][order], data[1][order]
    mean, spread = inputs[:train].mean(axis=0), inputs[:train].std(axis=0) + 0.1
    inputs = ((inputs - mean) / spread).astype(np.float32)
    ours, classes = inputs[:train], labels[:train]
    if shape is not None:
        ours, classes = shape(ours, classes, rng)
    given, flipped = _mislabel(classes, wrong, rng)
    return Task(
        name, ours, given, inputs[train:], labels[train:], given.astype(np.int64), flipped, loss=False,
        epochs=epochs, peak_lr=peak_lr, network=_classes,
    )  # fmt: skip


@functools.cache
def _digits_data() -> tuple[Array, Array]:
    return load_digits(return_X_y=True)  # type: ignore[no-any-return]


@functools.cache
def _cancer_data() -> tuple[Array, Array]:
    return load_breast_cancer(return_X_y=True)  # type: ignore[no-any-return]


def _repeated(inputs: Array, labels: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    which = np.concatenate([np.repeat(np.arange(300), 5), np.arange(300, len(labels))])
    jitter = rng.normal(0, 1 / 3, (len(which), inputs.shape[1]))
    jitter[1500:] = 0
    return (inputs[which] + jitter).astype(np.float32), labels[which]


def _long_tailed(inputs: Array, labels: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    share = 12.0 ** (-rng.permutation(10) / 9)
    rank = np.zeros(len(labels))
    for label in range(10):
        mine = labels == label
        rank[mine] = np.arange(mine.sum()) / mine.sum()
    kept = rank < share[labels]
    return inputs[kept], labels[kept]


def _digits(name: str, rng: np.random.Generator, wrong: float) -> Task:
    return _labelled(name, _digits_data(), rng, 1197, wrong, epochs=25, peak_lr=0.03)


def _redundant(name: str, rng: np.random.Generator, wrong: float) -> Task:
    return _labelled(name, _digits_data(), rng, 1197, wrong, epochs=12, peak_lr=0.03, shape=_repeated)


def _longtail(name: str, rng: np.random.Generator, wrong: float) -> Task:
    return _labelled(name, _digits_data(), rng, 1197, wrong, epochs=40, peak_lr=0.03, shape=_long_tailed)


def _mixture(name: str, rng: np.random.Generator, wrong: float) -> Task:
    spread = {"overlap": 1.25, "separated": 1.8}[name.split()[0]]
    centres = rng.normal(0, spread, (12, 20))
    cluster = rng.integers(0, 12, 3200)
    data = centres[cluster] + rng.normal(0, 1.4, (3200, 20)), cluster % 4
    return _labelled(name, data, rng, 1200, wrong, epochs=25, peak_lr=0.03)


def _spirals(name: str, rng: np.random.Generator, wrong: float) -> Task:
    arm = rng.integers(0, 3, 3000)
    radius = np.sqrt(rng.random(3000))
    angle = arm * 2 * np.pi / 3 + radius * 7 + rng.normal(0, 0.2, 3000)
    plane = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return _labelled(name, (plane, arm), rng, 1000, wrong, epochs=40, peak_lr=0.1)


def _cancer(name: str, rng: np.random.Generator, wrong: float) -> Task:
    return _labelled(name, _cancer_data(), rng, 380, wrong, epochs=40, peak_lr=0.03)


def _friedman(name: str, rng: np.random.Generator, wrong: float) -> Task:
    x = rng.random((3000, 10))
    y = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    y = ((y - 14.4) / 4.9).astype(np.float32)
    inputs = ((x - 0.5) * 12**0.5).astype(np.float32)
    given = (y[:1000] + rng.normal(0, 0.2, 1000)).astype(np.float32)
    flipped = np.zeros(1000, bool)
    flipped[rng.choice(1000, round(wrong * 1000), replace=False)] = True
    given[flipped] = rng.permutation(given[flipped])
    return Task(
        name, inputs[:1000], given, inputs[1000:], y[1000:], None, flipped, loss=True, epochs=40, peak_lr=0.02,
        network=lambda task, seed: Regressor(task, seed, 10, 64, 1),
    )  # fmt: skip


def _teacher(name: str, rng: np.random.Generator, wrong: float) -> Task:
    x = rng.normal(size=(4000, 16))
    labels = (np.tanh(x @ rng.normal(0, 0.5, (16, 24))) @ rng.normal(size=(24, 6))).argmax(axis=1)
    return _labelled(name, (x, labels), rng, 2000, wrong, epochs=25, peak_lr=0.03)


def _sparse(name: str, rng: np.random.Generator, wrong: float) -> Task:
    data = make_classification(
        3500, 60, n_informative=8, n_redundant=0, n_classes=5, n_clusters_per_class=2, class_sep=2.0, flip_y=0,
        random_state=int(rng.integers(2**31)),
    )  # fmt: skip
    return _labelled(name, data, rng, 1500, wrong, epochs=25, peak_lr=0.03)


@functools.cache
def modules() -> tuple[Array, Array]:
    """Return pieces of six modules' source, trigram counts float32 `[n, 256]`, and which module, int64 `[n]`."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = ("decimal.py", "_pydecimal.py"), ("turtle.py",), ("typing.py",), ("pickle.py",), ("ssl.py",), ("socket.py",)
    rows, labels = [], []
    for label, files in enumerate(names):
        text = "".join((folder / name).read_text("utf8") for name in files)[:64_000]
        codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int64)
        hashed = (codes[:-2] * 31 * 31 + codes[1:-1] * 31 + codes[2:]) * 2654435761 % 2**32 >> 24
        for start in range(0, len(hashed) - 80, 80):
            rows.append(np.bincount(hashed[start : start + 80], minlength=256))
            labels.append(label)
    return np.sqrt(np.array(rows, np.float32)), np.array(labels)


def _modules(name: str, rng: np.random.Generator, wrong: float) -> Task:
    return _labelled(name, modules(), rng, 2000, wrong, epochs=20, peak_lr=0.03)


def _diabetes(name: str, rng: np.random.Generator, wrong: float) -> Task:
    x, y = load_diabetes(return_X_y=True)
    order = rng.permutation(len(y))
    x, y = x[order].astype(np.float32) / x.std(), ((y[order] - y.mean()) / y.std()).astype(np.float32)
    given, flipped = y[:300].copy(), np.zeros(300, bool)
    flipped[rng.choice(300, round(wrong * 300), replace=False)] = True
    given[flipped] = rng.permutation(given[flipped])
    return Task(
        name, x[:300], given, x[300:], y[300:], None, flipped, loss=True, epochs=30, peak_lr=0.01,
        network=lambda task, seed: Regressor(task, seed, 10, 64, 1),
    )  # fmt: skip


@functools.cache
def _text() -> tuple[Array, int]:
    """Return the standard library's text as characters 0 to C - 1, and C."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse.py", "ast.py", "asyncio/base_events.py", "calendar.py", "csv.py", "dataclasses.py",
             "datetime.py", "difflib.py", "doctest.py", "inspect.py", "optparse.py", "pathlib.py", "shutil.py",
             "statistics.py", "subprocess.py", "tarfile.py", "textwrap.py", "zipfile.py")  # fmt: skip
    text = "".join((folder / name).read_text("utf8") for name in names if (folder / name).exists())
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8)
    known, numbers = np.unique(codes, return_inverse=True)
    return numbers.astype(np.int64), len(known)


def _characters(name: str, rng: np.random.Generator, wrong: float) -> Task:
    text, known = _text()
    starts = rng.permutation(len(text) // WINDOW - 2)[:2000] * WINDOW
    samples = text[starts[:, None] + np.arange(CONTEXT + WINDOW)]
    ours = samples[:1500].copy()
    flipped = np.zeros(1500, bool)
    flipped[rng.choice(1500, round(wrong * 1500), replace=False)] = True
    ours[flipped] = rng.choice(text, ours[flipped].shape)
    return Task(
        name, ours, np.zeros(1500, np.int64), samples[1500:], np.zeros(500, np.int64), None, flipped, loss=True,
        epochs=8, peak_lr=0.1, network=lambda task, seed: CharacterModel(task, seed, known, 96),
    )  # fmt: skip


_KINDS: dict[str, Callable[[str, np.random.Generator, float], Task]] = {
    "digits": _digits,
    "redundant": _redundant,
    "longtail": _longtail,
    "overlap": _mixture,
    "separated": _mixture,
    "spirals": _spirals,
    "cancer": _cancer,
    "friedman": _friedman,
    "characters": _characters,
    "teacher": _teacher,
    "sparse": _sparse,
    "modules": _modules,
    "diabetes": _diabetes,
}

TUNED = (
    "digits", "digits 3%", "digits 10%", "digits 20%", "digits 40%", "redundant", "longtail", "longtail 10%",
    "longtail 30%", "overlap", "overlap 10%", "overlap 30%", "separated", "separated 20%",
)  # fmt: skip
"""Tasks that the constants of `strategy="auto"` were chosen on."""
SEEN = ("spirals", "spirals 15%", "cancer", "cancer 15%", "friedman", "friedman 10%", "characters", "characters 20%")
"""Tasks that the first constants were not chosen on, but later changes were."""
UNSEEN = ("teacher", "teacher 20%", "sparse", "sparse 10%", "modules", "modules 15%", "diabetes", "diabetes 10%")
"""Tasks that nothing was chosen on."""


def make_task(name: str, seed: int) -> Task:
    """Return a task: a kind and, after a blank, the share of wrong labels, as in "digits 20%".

    Raises:
        ValueError: Unknown kind.
    """
    kind, _, share = name.partition(" ")
    if kind not in _KINDS:
        raise ValueError(f"task must be one of {sorted(_KINDS)}, with a share such as 'digits 20%', got {name!r}")
    return _KINDS[kind](name, np.random.default_rng([seed, 0]), float(share.rstrip("%") or 0) / 100)
