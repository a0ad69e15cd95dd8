"""Wrong labels as people make them: what the noise guard finds and wins. `python -m benchmarks.noise [--quick]`.

A line is one data set and one kind of wrong labels (`benchmarks.noise_data`), some seeds: test accuracy
(true labels) of runs of equal epochs with the same decayed learning rate: uniform; the default strategy
under `noise_guard="cap"`, with and without `groups=`; uniform without the wrong samples; and, where it is
installed, uniform without what cleanlab takes for wrong after a cross-validation of the same network.
"closed" is a run's share of the gap between the first and the one without wrong samples. A run under the
guard draws fewer samples, never more. `--rows FILE` keeps every run's figures, `--part 0/2` does every
second line, and `--summary FILE ...` makes the table by kinds of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.noise_data import CHOSEN_ON, GENERATED, HELD_OUT, KINDS, Task, available, make_task
from learnit_r8 import R8Scheduler

EPOCHS, BATCH_SIZE, PEAK_LR, HIDDEN = 30, 32, 0.05, 128
FOLDS, FOLD_EPOCHS = 5, 10
"""Of the cross-validation for cleanlab: more epochs rank worse."""
TUNED = ("digits", "many", "overlap")
LEAST_GAP = 0.03
"""Shares of smaller gaps say nothing."""
CONDITIONS = (
    ("random", 0.0, False), ("random", 0.0, True),
    *((kind, 0.2, False) for kind in KINDS),
    *((kind, rate, False) for rate in (0.1, 0.4) for kind in KINDS[:3]),
)  # fmt: skip
"""Kind, share, long tail."""


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
        self.predicted = delta.argmax(1)
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


@dataclass(frozen=True)
class Result:
    """Figures of one run."""

    accuracy: float
    draws: float
    wrong_draws: float
    flagged: float
    precision: float
    recall: float
    top: float
    """Precision of `catalog.suspects(k)`, k the number of wrong samples."""
    suggested: float
    """Share of the flagged wrong samples whose suggested label is the true one."""
    seconds: float
    """Of the processor."""


def train(task, seed, *, strategy="uniform", guard="off", groups=False, scalar=False, predict=False, mended_at=()):
    """Train a network through R8Scheduler; return its figures.

    `predict`: report predicted classes, too; `mended_at`: epochs before which flagged samples get their true labels.
    """
    started, labels = time.process_time(), task.y.copy()
    network = Network(task.x.shape[1], int(max(task.y_test.max(), task.y.max())) + 1, seed)
    n, wrong = len(task.y), task.wrong
    with R8Scheduler(
        n,
        BATCH_SIZE,
        num_epochs=EPOCHS,
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
                more = {"predictions": network.predicted} if predict else {}
                run.update_with_loss(float(losses.mean()) if scalar else losses, **more)
        uses, flagged = run.catalog.uses.astype(np.float64), run.noise_guard.flagged
        top, suggestions = run.catalog.suspects(int(wrong.sum())), run.noise_guard.suggestions
    found = flagged & wrong
    return Result(
        accuracy=network.accuracy(task.x_test, task.y_test),
        draws=uses.sum() / (n * EPOCHS),
        wrong_draws=uses[wrong].sum() / uses.sum(),
        flagged=float(flagged.mean()),
        precision=float(wrong[flagged].mean()) if flagged.any() else np.nan,
        recall=float(flagged[wrong].mean()) if wrong.any() else np.nan,
        top=float(wrong[top].mean()) if len(top) else np.nan,
        suggested=float((suggestions == task.true)[found].mean()) if found.any() else np.nan,
        seconds=time.process_time() - started,
    )


def left_out(task, out):
    """Return the task less some samples."""
    kept = ~out
    return Task(task.x[kept], task.y[kept], task.wrong[kept], task.x_test, task.y_test, task.true[kept])


def without_wrong(task):
    """Return the task less its wrong samples."""
    return left_out(task, task.wrong)


def cleanlab(task, seed):
    """Cross-validate the same network, let cleanlab judge, train without what it flags; return the figures."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    started, n, classes = time.process_time(), len(task.y), int(max(task.y_test.max(), task.y.max())) + 1
    rng = np.random.default_rng(seed)
    fold, given = rng.permutation(n) % FOLDS, np.zeros((n, classes))
    for number in range(FOLDS):
        held = fold == number
        part, network = left_out(task, held), Network(task.x.shape[1], classes, seed)
        steps = FOLD_EPOCHS * -(-len(part.y) // BATCH_SIZE)
        batches = [
            b for _ in range(FOLD_EPOCHS) for b in np.array_split(rng.permutation(len(part.y)), steps // FOLD_EPOCHS)
        ]
        for step, batch in enumerate(batches):
            done = step / steps
            rate = PEAK_LR * (done / 0.1 if done < 0.1 else (1 + np.cos(np.pi * (done - 0.1) / 0.9)) / 2)
            network.train_step(part.x[batch], part.y[batch], rate)
        z = network.logits(task.x[held])[1].astype(np.float64)
        z = np.exp(z - z.max(1, keepdims=True))
        given[held] = z / z.sum(1, keepdims=True)
    present = np.unique(task.y)
    labels = np.searchsorted(present, task.y)
    given = given[:, present] / given[:, present].sum(1, keepdims=True)
    flagged = find_label_issues(labels, given, n_jobs=1)
    order = np.argsort(get_label_quality_scores(labels, given), kind="stable")
    seconds, wrong = time.process_time() - started, task.wrong
    rest = train(left_out(task, flagged), seed) if not flagged.all() else None
    return {
        "accuracy": rest.accuracy if rest else np.nan,
        "flagged": float(flagged.mean()),
        "precision": float(wrong[flagged].mean()) if flagged.any() else np.nan,
        "recall": float(flagged[wrong].mean()) if wrong.any() else np.nan,
        "top": float(wrong[order[: wrong.sum()]].mean()) if wrong.any() else np.nan,
        "seconds": seconds,
    }


def interval(values):
    """Return mean and half-width of the 95% interval (Student's t)."""
    quantiles = {2: 12.7, 3: 4.30, 4: 3.18, 5: 2.78, 10: 2.26}
    values = np.asarray(values)
    spread = values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(quantiles.get(len(values), 2.0) * spread)


def run_line(name, kind, rate, tail, seeds, rows):
    """Run one line; print it, and append its runs to the file of rows."""
    runs, rivals = [], importlib.util.find_spec("cleanlab") is not None
    for seed in seeds:
        task = make_task(name, kind, rate, seed, tail=tail)
        one = {"uniform": asdict(train(task, seed))}
        one["clean"] = asdict(train(without_wrong(task), seed)) if rate else one["uniform"]
        one["guard"] = asdict(train(task, seed, strategy="quadrant", guard="cap"))
        one["groups"] = asdict(train(task, seed, strategy="quadrant", guard="cap", groups=True, predict=True))
        if rivals and rate in (0.0, 0.2):
            one["cleanlab"] = cleanlab(task, seed)
        runs.append(one)
        if rows:
            with rows.open("a") as file:
                file.write(
                    json.dumps({"set": name, "kind": kind, "rate": rate, "tail": tail, "seed": seed, **one}) + "\n"
                )
    of = {key: np.array([run[key]["accuracy"] for run in runs]) for key in runs[0]}
    cells = [
        f"{name:10}",
        f"{kind:10}",
        f"{rate:4.0%}{' tail' if tail else ''}",
        f"{of['uniform'].mean():.3f}",
        f"{of['clean'].mean():.3f}",
    ]
    for key in list(of)[2:]:
        gain, half = interval(of[key] - of["uniform"]) if len(runs) > 1 else ((of[key] - of["uniform"]).mean(), np.nan)
        flagged = np.mean([run[key]["flagged"] for run in runs])
        cells.append(f"{100 * gain:+6.2f} ±{100 * half:4.2f} {flagged:5.3f}")
    print(" | ".join(cells), flush=True)


def summary(files, names):
    """Print the means over the sets of each kind and share, of sets with a gap of three points."""
    rows = [json.loads(line) for file in files for line in Path(file).read_text().splitlines()]
    rows = [row for row in rows if row["set"] in names]
    print("kind, share, run | sets with a gap | closed, points in the mean, at worst, sets below beyond the interval |")
    print("    flagged, precision, recall, precision at k, seconds")
    for condition in CONDITIONS:
        sets = {}
        for row in rows:
            if (row["kind"], row["rate"], row["tail"]) == condition:
                sets.setdefault(row["set"], []).append(row)
        for key in ("guard", "groups", "cleanlab") if sets else ():
            print(_summary_line(condition, key, sets))


def _summary_line(condition, key, sets):
    closed, points, below, figures = [], {}, [], []
    for name, runs in sets.items():
        runs = [run for run in runs if key in run]
        if not runs:
            continue
        gains = np.array([run[key]["accuracy"] - run["uniform"]["accuracy"] for run in runs])
        gap = np.mean([run["clean"]["accuracy"] - run["uniform"]["accuracy"] for run in runs])
        points[name] = 100 * gains.mean()
        if len(gains) > 1 and gains.mean() + interval(gains)[1] < 0:
            below.append(name)
        if gap >= LEAST_GAP:
            closed.append(gains.mean() / gap)
        columns = "flagged", "precision", "recall", "top", "seconds"
        figures.append([np.nanmean([run[key][c] for run in runs] or [np.nan]) for c in columns])
    if not points:
        return f"{condition} {key}: -"
    worst = min(points, key=points.get)
    share = f"{np.mean(closed):5.2f}" if closed else "    -"
    means = " ".join(f"{value:.3f}" for value in np.nanmean(figures, 0))
    mean = np.mean(list(points.values()))
    label = f"{condition[0]:10} {condition[1]:4.0%}{' tail' if condition[2] else '     '} {key:8}"
    return f"{label} | {len(closed):2} | {share} {mean:+.2f} {worst} {points[worst]:+.2f} {below} | {means}"


def precision_table(seeds):
    """Print precision of `suspects(k)` from losses per sample and from one loss a batch."""
    print("\nprecision of catalog.suspects(k), k = number of wrong labels (chance .20), 20% wrong, no guard")
    for name in TUNED:
        found = {False: [], True: []}
        for seed, scalar in itertools.product(range(seeds), (False, True)):
            found[scalar].append(train(make_task(name, "random", 0.2, seed), seed, scalar=scalar).top)
        (sample, one), (batch, two) = interval(found[False]), interval(found[True])
        print(f"{name:9} per sample {sample:.3f} ±{one:.3f}   one a batch {batch:.3f} ±{two:.3f}", flush=True)


def strategy_table(names, seeds):
    """Print how often wrong samples are drawn under each strategy, guard at "cap"."""
    print("\nshare of draws that are wrong samples, 20% wrong, and test accuracy: guard off -> cap")
    for strategy, name in itertools.product(names, ("digits", "many")):
        pairs = []
        for seed in range(seeds):
            task = make_task(name, "random", 0.2, seed)
            pairs.append([train(task, seed, strategy=strategy, guard=guard) for guard in ("off", "cap")])
        off, cap = (np.mean([[p[i].wrong_draws, p[i].accuracy] for p in pairs], 0) for i in (0, 1))
        print(f"{strategy:12} {name:9} {off[0]:.3f} -> {cap[0]:.3f}   {off[1]:.3f} -> {cap[1]:.3f}", flush=True)


def relabelled_table(seeds):
    """Print what it is worth to mend flagged labels in mid-run: uniform, guard at "report"."""
    print("\n30% wrong, flagged labels mended at four times from a quarter of the run on: accuracy, share of the gap")
    for name, kind in itertools.product(TUNED, KINDS[:3]):
        found = []
        for seed in range(seeds):
            task = make_task(name, kind, 0.3, seed)
            right = Task(task.x, task.true, task.wrong, task.x_test, task.y_test, task.true)
            mend = tuple(range(EPOCHS // 4, EPOCHS // 2 + 6, 4))
            noisy, mended = train(task, seed), train(task, seed, guard="report", groups=True, mended_at=mend)
            found.append([noisy.accuracy, mended.accuracy, train(right, seed).accuracy])
        noisy, mended, clean = np.mean(found, 0)
        share = (mended - noisy) / (clean - noisy)
        print(f"{name:9} {kind:9} {noisy:.3f} -> {mended:.3f}, clean {clean:.3f}: {share:.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 seeds instead of 10")
    parser.add_argument("--data", nargs="*", default=(*CHOSEN_ON, *HELD_OUT, *GENERATED))
    parser.add_argument("--only", choices=("accuracy", "precision", "strategies", "relabelled"))
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--summary", nargs="+")
    options = parser.parse_args()
    if options.summary:
        summary(options.summary, options.data)
        return
    seeds = 3 if options.quick else 10
    names, missing = available(options.data)
    if missing:
        print("left out, as river is not installed:", *missing)
    if options.only in (None, "accuracy"):
        print("data | kind | wrong | uniform | clean | gain in points, share flagged: guard | with groups | cleanlab")
        part, parts = (int(number) for number in options.part.split("/"))
        for name, condition in list(itertools.product(names, CONDITIONS))[part::parts]:
            run_line(name, *condition, range(seeds), options.rows)
    if options.only in (None, "precision"):
        precision_table(seeds)
    if options.only in (None, "strategies"):
        from learnit_r8.strategies import names as strategies

        strategy_table(strategies(), seeds)
    if options.only in (None, "relabelled"):
        relabelled_table(seeds)


if __name__ == "__main__":
    main()
