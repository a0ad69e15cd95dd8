"""Wrong labels: what the noise guard finds and what it wins. `python -m benchmarks.noise [--quick]`.

Each line is one task: a data set, a share of labels that were changed to another class at random
before training, and the test accuracy (true labels) of four runs of equal epochs with the same
decayed learning rate: uniform; the default strategy under `noise_guard="cap"`, with and without
`groups=`; and uniform without the wrong samples. "closed" is the guard's share of the gap between
the first and the last. A run under the guard draws fewer samples, never more: "draws" is its share.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import zlib
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import rotate
from sklearn.datasets import load_breast_cancer, load_digits, make_classification, make_gaussian_quantiles

from benchmarks.tasks import modules
from learnit_r8 import R8Scheduler

EPOCHS, BATCH_SIZE, PEAK_LR, HIDDEN = 30, 32, 0.05, 128
TUNED = ("digits", "separate", "overlap", "many")
SEEN = ("cancer", "shells", "crowd", "teacher", "modules", "ellipses")
"""Not used at first, but seen before the last changes."""
RUN_ONCE = ("rotated", "sums", "deep", "blend")
"""Run once, when the guard was thought to be done; later changes were tried on them, too."""
HELD_OUT = ("charts", "letters")
"""Written down before the guard was run on them, which was after its last change (with groups: its last but one)."""


class Network:
    """A multi-layer perceptron with one hidden layer, SGD with momentum 0.9, in numpy."""

    def __init__(self, inputs: int, classes: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        sizes = (inputs, HIDDEN, classes)
        self.values = [rng.normal(0, np.sqrt(2 / a), (a, b)).astype(np.float32) for a, b in itertools.pairwise(sizes)]
        self.values += [np.zeros(size, np.float32) for size in sizes[1:]]
        self.speeds = [np.zeros_like(value) for value in self.values]

    def logits(self, x):
        w1, w2, b1, b2 = self.values
        hidden = np.maximum(x @ w1 + b1, 0)
        return hidden, hidden @ w2 + b2

    def train_step(self, x, y, lr):
        """Take one step; return the loss of every sample."""
        hidden, z = self.logits(x)
        z = z - z.max(1, keepdims=True)
        exp = np.exp(z)
        total = exp.sum(1, keepdims=True)
        rows = np.arange(len(y))
        losses = np.log(total[:, 0]) - z[rows, y]
        delta = exp / total
        delta[rows, y] -= 1
        delta /= len(y)
        below = (delta @ self.values[1].T) * (hidden > 0)
        gradients = x.T @ below, hidden.T @ delta, below.sum(0), delta.sum(0)
        for value, speed, gradient in zip(self.values, self.speeds, gradients, strict=True):
            speed *= 0.9
            speed += gradient
            value -= lr * speed
        return losses

    def accuracy(self, x, y):
        return float(np.mean(self.logits(x)[1].argmax(1) == y))


@dataclass(frozen=True, eq=False)
class Task:
    """Training data with the labels as given, which of them are wrong, and clean test data."""

    x: np.ndarray
    y: np.ndarray
    wrong: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    true: np.ndarray


@functools.cache
def load(name):
    """Return (x, y, number of training samples)."""
    made = functools.partial(make_classification, flip_y=0, n_redundant=4)
    if name == "digits":
        x, y = load_digits(return_X_y=True)
        return x / 16 - 0.3, y, 1200
    if name == "cancer":
        x, y = load_breast_cancer(return_X_y=True)
        return (x - x.mean(0)) / x.std(0), y, 400
    if name == "shells":
        x, y = make_gaussian_quantiles(n_samples=4000, n_features=6, n_classes=3, random_state=5)
        return x, y, 2000
    if name == "modules":
        return *modules(), 2800
    if name == "ellipses":  # Gaussian classes that differ in their covariances, too
        rng = np.random.default_rng(29)
        y = rng.integers(0, 5, 4000)
        shapes, centres = rng.normal(0, 0.5, (5, 10, 10)), rng.normal(0, 0.8, (5, 10))
        return np.einsum("nij,nj->ni", shapes[y], rng.normal(size=(4000, 10))) + centres[y], y, 2000
    if name == "teacher":  # labels of a random network
        rng = np.random.default_rng(17)
        x = rng.normal(size=(4000, 12))
        y = (np.tanh(x @ rng.normal(size=(12, 10))) @ rng.normal(size=(10, 5))).argmax(1)
        return x, y, 2500
    if name == "rotated":  # digits, each turned by up to an eighth of a circle
        images, y = load_digits(return_X_y=True)
        angles = np.random.default_rng(31).uniform(-45, 45, len(y))
        turned = [rotate(x.reshape(8, 8), a, reshape=False, order=1) for x, a in zip(images, angles, strict=True)]
        return np.array(turned).reshape(-1, 64) / 16 - 0.3, y, 1200
    if name == "sums":  # two digits side by side; in which fifth of all pairs their sum is
        images, digits = load_digits(return_X_y=True)
        pairs = np.random.default_rng(37).integers(0, len(digits), (4500, 2))
        y = np.digitize(digits[pairs].sum(1), (6, 8, 10, 13))
        return images[pairs].reshape(-1, 128) / 16 - 0.3, y, 3000
    if name == "deep":  # labels of a random network with three hidden layers
        rng = np.random.default_rng(41)
        inputs = x = rng.normal(size=(4000, 10))
        for width in (16, 16, 16):
            x = np.tanh(x @ rng.normal(0, 1.5 / np.sqrt(x.shape[1]), (x.shape[1], width)))
        scores = x @ rng.normal(size=(16, 5))
        return inputs, (scores - scores.mean(0)).argmax(1), 2500
    if name == "blend":  # half of the features say anything, half of those twice
        x, y = made(4000, 40, n_informative=12, n_redundant=12, n_classes=5, class_sep=1.5, random_state=43)
        return x / x.std(0), y, 2000
    if name == "charts":
        return *charts(np.random.default_rng(47)), 1500
    if name == "letters":
        return *letters(np.random.default_rng(53)), 3000
    if name == "separate":
        x, y = made(2600, 20, n_informative=10, n_classes=4, class_sep=2.0, random_state=7)
        size = 1500
    elif name == "overlap":
        x, y = made(2600, 20, n_informative=8, n_classes=4, class_sep=1.2, random_state=3)
        size = 1500
    elif name == "many":
        x, y = made(3600, 30, n_informative=16, n_classes=10, n_clusters_per_class=1, class_sep=1.6, random_state=11)
        size = 2000
    else:
        x, y = made(4000, 24, n_informative=16, n_classes=6, n_clusters_per_class=2, class_sep=1.8, random_state=23)
        size = 2400
    return x / x.std(0), y, size


def charts(rng, count=3600, length=60):
    """Return control charts in six states (Alcock & Manolopoulos 1999, "Time-series similarity queries")."""
    y, t = rng.integers(0, 6, count), np.arange(length)
    x = 30 + 2 * rng.uniform(-3, 3, (count, length))
    amplitude, period = rng.uniform(10, 15, (2, count, 1))
    slope, jump = rng.uniform(0.2, 0.5, (count, 1)), rng.uniform(7.5, 20, (count, 1))
    jumped = jump * (t >= rng.integers(length // 3, 2 * length // 3, (count, 1)))
    cycle, trend = amplitude * np.sin(2 * np.pi * t / period), slope * t
    x += np.choose(y[:, None], [np.zeros_like(x), cycle, trend, -trend, jumped, -jumped])
    return (x - 30) / 10, y


def letters(rng, count=6000):
    """Return the capital letters of twelve fonts, each turned, moved and with noise, 16 x 16 pixels."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    oblique, italic = ("", "-Bold", "-Oblique", "-BoldOblique"), ("", "-Bold", "-Italic", "-BoldItalic")
    families = ("Sans", oblique), ("SansMono", oblique), ("Serif", italic)
    faces = [f"DejaVu{family}{style}.ttf" for family, styles in families for style in styles]
    fonts = [[ImageFont.truetype(folder / face, size) for size in (15, 17)] for face in faces]
    y, images = rng.integers(0, 26, count), []
    for label in y:
        image = Image.new("L", (16, 16))
        font = fonts[rng.integers(len(fonts))][rng.integers(2)]
        ImageDraw.Draw(image).text(tuple(8 + rng.uniform(-1, 1, 2)), chr(65 + label), 255, font, anchor="mm")
        images.append(image.rotate(rng.uniform(-8, 8), Image.Resampling.BILINEAR))
    x = np.array([np.asarray(image) for image in images]).reshape(count, -1) / 255
    return x + rng.normal(0, 0.05, x.shape) - 0.2, y


def make_task(name, kind, rate, seed):
    """Return a task; kind is "balanced", "imbalanced" (smallest class a tenth) or "tail" (a fiftieth)."""
    x, y, size = load(name)
    rng = np.random.default_rng([seed, zlib.crc32(f"{name} {kind} {rate}".encode())])
    order = rng.permutation(len(y))
    x, y = x[order].astype(np.float32), y[order].astype(np.int64)
    train, test = np.arange(size), np.arange(size, len(y))
    classes = int(y.max()) + 1
    if kind != "balanced":
        shares = np.geomspace(1, 0.1 if kind == "imbalanced" else 0.02, classes)
        members = [np.flatnonzero(y[:size] == c) for c in range(classes)]
        train = np.concatenate([m[: max(3, int(s * len(m)))] for m, s in zip(members, shares, strict=True)])
    given = y[train]
    wrong = np.zeros(len(train), bool)
    wrong[rng.permutation(len(train))[: round(rate * len(train))]] = True
    given[wrong] = (given[wrong] + rng.integers(1, classes, wrong.sum())) % classes
    return Task(x[train], given, wrong, x[test], y[test], y[train])


@dataclass(frozen=True)
class Result:
    """Figures of one run."""

    accuracy: float
    draws: float
    wrong_draws: float
    flagged: float
    precision: float
    top: float
    """Precision of `catalog.suspects(k)`, k the number of wrong samples."""


def train(task, seed, *, strategy="uniform", guard="off", groups=False, scalar=False, epochs=EPOCHS, mended_at=()):
    """Train a network through R8Scheduler; return its figures.

    `mended_at`: epochs before which flagged samples get their true labels.
    """
    labels = task.y.copy()
    network = Network(task.x.shape[1], int(task.y_test.max()) + 1, seed)
    n, wrong = len(task.y), task.wrong
    with R8Scheduler(
        n,
        BATCH_SIZE,
        num_epochs=epochs,
        initial_lr=PEAK_LR,
        strategy=strategy,
        noise_guard=guard,
        groups=task.y if groups else None,
        checkpoint_dir=None,
        ui="off",
        seed=seed,
    ) as run:
        for epoch in run.epoch_iterator():
            if epoch in mended_at:
                flagged = np.flatnonzero(run.noise_guard.flagged)
                labels[flagged] = task.true[flagged]
                run.relabelled(flagged)
            for batch in run.batch_iterator():
                losses = network.train_step(task.x[batch.indices], labels[batch.indices], batch.lr)
                run.update_with_loss(float(losses.mean()) if scalar else losses)
        uses, flagged = run.catalog.uses.astype(np.float64), run.noise_guard.flagged
        top = run.catalog.suspects(int(wrong.sum()))
    return Result(
        accuracy=network.accuracy(task.x_test, task.y_test),
        draws=uses.sum() / (n * epochs),
        wrong_draws=uses[wrong].sum() / uses.sum(),
        flagged=float(flagged.mean()),
        precision=float(wrong[flagged].mean()) if flagged.any() else np.nan,
        top=float(wrong[top].mean()) if len(top) else np.nan,
    )


def without_wrong(task):
    """Return the task less its wrong samples."""
    right = ~task.wrong
    return Task(task.x[right], task.y[right], task.wrong[right], task.x_test, task.y_test, task.true[right])


def interval(values):
    """Return mean and half-width of the 95% interval (Student's t)."""
    quantiles = {3: 4.30, 5: 2.78, 10: 2.26}
    values = np.asarray(values)
    spread = values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(quantiles.get(len(values), 2.0) * spread)


def line(name, kind, rate, seeds):
    """Run one task; return a row of the table and its figures."""
    runs = {key: [] for key in ("uniform", "guard", "groups", "clean")}
    for seed in range(seeds):
        task = make_task(name, kind, rate, seed)
        runs["uniform"].append(train(task, seed))
        runs["guard"].append(train(task, seed, strategy="quadrant", guard="cap"))
        runs["groups"].append(train(task, seed, strategy="quadrant", guard="cap", groups=True))
        runs["clean"].append(train(without_wrong(task), seed) if rate else runs["uniform"][-1])
    of = {key: np.array([run.accuracy for run in results]) for key, results in runs.items()}
    gap = (of["clean"] - of["uniform"]).mean()
    cells = [f"{name:9}", f"{kind:10}", f"{rate:4.0%}", f"{of['uniform'].mean():.3f}", f"{of['clean'].mean():.3f}"]
    for key in ("guard", "groups"):
        gain, half = interval(of[key] - of["uniform"])
        closed = f"{(of[key] - of['uniform']).mean() / gap:6.2f}" if gap > 0.005 else "     -"
        results = runs[key]
        flagged, draws = np.mean([r.flagged for r in results]), np.mean([r.draws for r in results])
        precision = np.nanmean([r.precision for r in results]) if flagged else np.nan
        cells.append(f"{100 * gain:+6.2f} ±{100 * half:4.2f} {closed} {flagged:5.3f} {precision:5.2f} {draws:5.2f}")
    print(" | ".join(cells), flush=True)


def precision_table(seeds):
    """Print precision of `suspects(k)` from losses per sample and from one loss a batch."""
    print("\nprecision of catalog.suspects(k), k = number of wrong labels (chance .20), 20% wrong, no guard")
    for name in TUNED:
        found = {False: [], True: []}
        for seed, scalar in itertools.product(range(seeds), (False, True)):
            found[scalar].append(train(make_task(name, "balanced", 0.2, seed), seed, scalar=scalar).top)
        (sample, one), (batch, two) = interval(found[False]), interval(found[True])
        print(f"{name:9} per sample {sample:.3f} ±{one:.3f}   one a batch {batch:.3f} ±{two:.3f}", flush=True)


def strategy_table(names, seeds):
    """Print how often wrong samples are drawn under each strategy, guard at "cap"."""
    print("\nshare of draws that are wrong samples, 20% wrong, and test accuracy: guard off -> cap")
    for strategy, name in itertools.product(names, ("digits", "separate")):
        pairs = []
        for seed in range(seeds):
            task = make_task(name, "balanced", 0.2, seed)
            pairs.append([train(task, seed, strategy=strategy, guard=guard) for guard in ("off", "cap")])
        off, cap = (np.mean([[p[i].wrong_draws, p[i].accuracy] for p in pairs], 0) for i in (0, 1))
        print(f"{strategy:12} {name:9} {off[0]:.3f} -> {cap[0]:.3f}   {off[1]:.3f} -> {cap[1]:.3f}", flush=True)


def relabelled_table(seeds):
    """Print what it is worth to mend flagged labels in mid-run: uniform, guard at "report"."""
    print("\n30% wrong, flagged labels mended at four times from a quarter of the run on: accuracy, share of the gap")
    for name in TUNED:
        found = []
        for seed in range(seeds):
            task = make_task(name, "balanced", 0.3, seed)
            right = Task(task.x, task.true, task.wrong, task.x_test, task.y_test, task.true)
            mend = tuple(range(EPOCHS // 4, EPOCHS // 2 + 6, 4))
            noisy, mended = train(task, seed), train(task, seed, guard="report", groups=True, mended_at=mend)
            found.append([noisy.accuracy, mended.accuracy, train(right, seed).accuracy])
        noisy, mended, clean = np.mean(found, 0)
        share = (mended - noisy) / (clean - noisy)
        print(f"{name:9} {noisy:.3f} -> {mended:.3f}, clean {clean:.3f}: {share:.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 seeds instead of 10")
    parser.add_argument("--data", nargs="*", default=(*TUNED, *SEEN, *RUN_ONCE, *HELD_OUT))
    parser.add_argument("--only", choices=("accuracy", "precision", "strategies", "relabelled"))
    options = parser.parse_args()
    seeds = 3 if options.quick else 10
    if options.only in (None, "accuracy"):
        columns = "gain, points  closed flagged prec draws"
        print(f"data      | kind       | wrong | uniform | clean | {columns} | with groups: {columns}")
        for name in options.data:
            for rate in (0.0, 0.1, 0.2, 0.4):
                line(name, "balanced", rate, seeds)
            line(name, "imbalanced", 0.1, seeds)
            line(name, "tail", 0.0, seeds)
    if options.only in (None, "precision"):
        precision_table(seeds)
    if options.only in (None, "strategies"):
        from learnit_r8.strategies import names

        strategy_table(names(), seeds)
    if options.only in (None, "relabelled"):
        relabelled_table(seeds)


if __name__ == "__main__":
    main()
