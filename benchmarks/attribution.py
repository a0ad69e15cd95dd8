"""Estimates from batch losses: `python -m benchmarks.attribution [--quick]`.

Spearman correlation of each estimator with the true losses of generated samples (log-normal,
N = 2000, B = 32, every epoch a new permutation), then of real training, then speed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import lsqr

from benchmarks.harness import columns, main, progress
from benchmarks.timing import interleave
from learnit_r8.samples.batch_losses import PRIOR_ESTIMATE, PRIOR_VARIANCE, BatchAttribution


@dataclass(frozen=True, eq=False)
class Run:
    """Reported batches and what the estimates should be."""

    truth: np.ndarray
    batches: list[np.ndarray]
    losses: np.ndarray


def spearman(a, b):
    """Return the rank correlation."""
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


def generate(epochs, fall=0.0, noise=0.0, seed=0, num_samples=2000, size=32):
    """Return a run of static relative losses; `noise` is a share of the batch losses' deviation."""
    rng = np.random.default_rng(seed)
    truth = np.exp(rng.standard_normal(num_samples))
    orders = [rng.permutation(num_samples) for _ in range(epochs)]
    batches = [order[i : i + size] for order in orders for i in range(0, num_samples, size)]
    means = np.array([truth[batch].mean() for batch in batches])
    means += noise * truth.std() / math.sqrt(size) * rng.standard_normal(len(means))
    return Run(truth, batches, means * np.exp(-fall * np.arange(len(means)) / len(means)))


def normalised(losses, rate=0.02):
    """Return losses over their moving average."""
    level, out = 0.0, np.empty(len(losses))
    for t, loss in enumerate(losses):
        level += max(rate, 1 / (t + 1)) * (loss - level)
        out[t] = loss / level
    return out


def published(run):
    """Catalog the batch loss at the first visit, then x += .1 (y - mean x)."""
    x = np.full(len(run.truth), np.nan)
    for batch, loss in zip(run.batches, run.losses, strict=True):
        x[batch] = np.where(np.isnan(x[batch]), loss, x[batch] + 0.1 * (loss - x[batch].mean()))
    return x


def kaczmarz(run, step=1.0):
    """Apply x += step (y - mean x), from the first loss."""
    x = np.full(len(run.truth), run.losses[0])
    for batch, loss in zip(run.batches, run.losses, strict=True):
        x[batch] += step * (loss - x[batch].mean())
    return x


def running_mean(run):
    """Mean of the losses of the batches that a sample was in."""
    total, count = np.zeros(len(run.truth)), np.zeros(len(run.truth))
    for batch, loss in zip(run.batches, run.losses, strict=True):
        total[batch] += loss
        count[batch] += 1
    return total / count


def diagonal_kalman(run, noise=0.1):
    """Linear filter on the normalised loss, one variance a sample."""
    x, p = np.ones(len(run.truth)), np.ones(len(run.truth))
    for batch, y in zip(run.batches, normalised(run.losses), strict=True):
        n = len(batch)
        gain = p[batch] / n / (p[batch].sum() / n**2 + noise / n)
        x[batch] += gain * (y - x[batch].mean())
        p[batch] *= 1 - gain / n
    return x


def least_squares(run):
    """LSQR on the normalised losses of all batches."""
    sizes = np.array([len(batch) for batch in run.batches])
    rows = np.concatenate([[0], np.cumsum(sizes)])
    matrix = csr_matrix(
        (np.repeat(1 / sizes, sizes), np.concatenate(run.batches), rows), shape=(len(sizes), len(run.truth))
    )
    return lsqr(matrix, normalised(run.losses), iter_lim=300)[0]


class Ours:
    """The library's arrays and estimator, as a catalog holds them."""

    def __init__(self, num_samples):
        self.attribution = BatchAttribution(num_samples)
        rows = np.zeros(num_samples, [("estimate", np.float32), ("variance", np.float32), ("others", np.uint32, (6,))])
        self.estimate, self.variance = rows["estimate"], rows["variance"]
        self.estimate[:] = PRIOR_ESTIMATE
        self.variance[:] = PRIOR_VARIANCE

    def feed(self, batches, losses):
        """Report batches."""
        for batch, loss in zip(batches, losses, strict=True):
            self.attribution.update(self.estimate, self.variance, batch, float(loss))
        return self

    def refine(self):
        """Refine."""
        self.attribution.refine(self.estimate, self.variance)
        return self


def streaming(run):
    """`update` alone."""
    return Ours(len(run.truth)).feed(run.batches, run.losses).estimate


def refined(run):
    """`update`, then `refine` once."""
    return Ours(len(run.truth)).feed(run.batches, run.losses).refine().estimate


def refined_each_epoch(run):
    """`update`, with `refine` at every epoch's end."""
    ours, per_epoch = Ours(len(run.truth)), -(-len(run.truth) // len(run.batches[0]))
    for start in range(0, len(run.batches), per_epoch):
        ours.feed(run.batches[start : start + per_epoch], run.losses[start : start + per_epoch]).refine()
    return ours.estimate


ESTIMATORS: dict[str, Callable[[Run], np.ndarray]] = {
    "published": published,
    "published, x0=y": lambda run: kaczmarz(run, 0.1),
    "running mean": running_mean,
    "Kaczmarz": kaczmarz,
    "diag. Kalman": diagonal_kalman,
    "full lsq": least_squares,
    "streaming": streaming,
    "refined": refined,
    "each epoch": refined_each_epoch,
}


def generated(seeds, lengths):
    """Return rows of Spearman medians, one for each length and kind of losses."""
    rows = []
    for epochs in lengths:
        progress(f"{epochs} epochs")
        for name, fall, noise in (("static", 0, 0), ("falling e^-2", 2, 0), ("30% noise", 0, 0.3), ("both", 2, 0.3)):
            runs = [generate(epochs, fall, noise, seed) for seed in range(seeds)]
            row = {
                key: float(np.median([spearman(method(run), run.truth) for run in runs]))
                for key, method in ESTIMATORS.items()
            }
            rows.append({"epochs": epochs, "losses": name, "seeds": seeds, **row})
    return rows


def balanced_order(rng, estimate, size):
    """Return an epoch in which each batch takes a quarter from each quartile of the estimate."""
    quarters = [rng.permutation(part) for part in np.array_split(np.argsort(estimate), 4)]
    ranks = np.concatenate([(np.arange(len(q)) + rng.random(len(q))) / len(q) for q in quarters])
    order = np.concatenate(quarters)[np.argsort(ranks)]
    return [order[i : i + size] for i in range(0, len(order), size)]


SCHEMES: dict[str, Callable[[int], float | None]] = {
    "a: random": lambda epoch: None,
    "b: balanced": lambda epoch: 0.0,
    "c: every 4th random": lambda epoch: None if epoch % 4 == 0 else 0.0,
    "c': every 2nd random": lambda epoch: None if epoch % 2 == 0 else 0.0,
    "d: edges perturbed .5": lambda epoch: 0.5,
    "d': edges perturbed 1": lambda epoch: 1.0,
}
"""Epoch -> None: random batches; else noise added to log estimate before quartiles are taken."""


def balanced(seeds, size=32):
    """Return rows of what quadrant-balanced batches cost each estimator."""
    rows = []
    for epochs in (10, 50):
        progress(f"balanced batches, {epochs} epochs")
        for fall in (0.0, 2.0):
            for name, plan in SCHEMES.items():
                values = np.median([_balanced_run(epochs, fall, plan, seed, size) for seed in range(seeds)], axis=0)
                found = dict(zip(("running mean", "streaming", "each epoch", "confidence"), values, strict=True))
                row = {"epochs": epochs, "losses": "falling" if fall else "static", "scheme": name, "seeds": seeds}
                rows.append(row | found)
    return rows


def _balanced_run(epochs, fall, plan, seed, size):
    rng = np.random.default_rng(seed)
    truth = np.exp(rng.standard_normal(2000))
    ours, alone = Ours(2000), Ours(2000)
    batches, losses = [], []
    for epoch in range(epochs):
        perturbation = plan(epoch) if epoch else None
        if perturbation is None:
            order = rng.permutation(2000)
            new = [order[i : i + size] for i in range(0, 2000, size)]
        else:
            new = balanced_order(
                rng,
                np.log(ours.estimate) + perturbation * rng.standard_normal(2000) * np.log(ours.estimate).std(),
                size,
            )
        level = np.exp(-fall * (epoch + np.arange(len(new)) / len(new)) / epochs)
        y = np.array([truth[batch].mean() for batch in new]) * level
        ours.feed(new, y).refine()
        alone.feed(new, y)
        batches += new
        losses += list(y)
    mean = running_mean(Run(truth, batches, normalised(np.array(losses))))
    return (
        spearman(mean, truth),
        spearman(alone.estimate, truth),
        spearman(ours.estimate, truth),
        ours.attribution.known(ours.variance),
    )


def train(wrong, epochs, seed, size=32, num_samples=2000, hidden=64):
    """Return (run, losses of all samples at the end) of a small network on overlapping classes."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 4, num_samples)
    x = 0.9 * rng.standard_normal((4, 10))[label] + rng.standard_normal((num_samples, 10))
    flipped = rng.random(num_samples) < wrong
    label[flipped] = rng.integers(0, 4, flipped.sum())
    w1, w2 = rng.standard_normal((10, hidden)) * 0.45, rng.standard_normal((hidden, 4)) * 0.1
    batches, losses = [], []

    def forward(rows):
        h = np.maximum(x[rows] @ w1, 0)
        out = h @ w2
        p = np.exp(out - out.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        return h, p, -np.log(np.maximum(p[np.arange(len(rows)), label[rows]], 1e-9))

    for epoch in range(epochs):
        order = rng.permutation(num_samples)
        for i in range(0, num_samples, size):
            rows = order[i : i + size]
            h, p, loss = forward(rows)
            batches.append(rows)
            losses.append(loss.mean())
            p[np.arange(len(rows)), label[rows]] -= 1
            rate = 0.15 * (1 - epoch / epochs) / len(rows)
            step = x[rows].T @ (p @ w2.T * (h > 0))
            w2 -= rate * h.T @ p
            w1 -= rate * step
    return Run(forward(np.arange(num_samples))[2], batches, np.array(losses))


TRAINED = ("published", "running mean", "diag. Kalman", "full lsq", "streaming", "refined", "each epoch")


def training(seeds):
    """Return rows of Spearman with the losses that a trained network really has."""
    rows = []
    for epochs in (10, 20, 50):
        progress(f"real training, {epochs} epochs")
        for wrong in (0.0, 0.2):
            runs = [train(wrong, epochs, seed) for seed in range(seeds)]
            found = {name: np.median([spearman(ESTIMATORS[name](run), run.truth) for run in runs]) for name in TRAINED}
            rows.append({"epochs": epochs, "wrong labels": wrong, "seeds": seeds, **found})
    return rows


def speed():
    """Return the costs of update and refine."""
    progress("speed")
    rng = np.random.default_rng(0)
    costs = {}
    for num_samples in (10_000, 1_000_000):
        rivals = {}
        for size in (32, 256, 1024):
            ours, ids = Ours(num_samples), rng.choice(num_samples, size, replace=False)

            def call(ours=ours, ids=ids):
                ours.attribution.update(ours.estimate, ours.variance, ids, 1.0)

            rivals[f"N={num_samples} B={size}"] = call
        costs |= {name: 1e6 * value for name, value in interleave(rivals, rounds=9, calls=300).items()}
    run = generate(50, 2.0, 0.0, 0, num_samples=50_000)
    ours = Ours(50_000).feed(run.batches, run.losses)
    times = []
    for _ in range(3):
        arrays = ours.estimate.copy(), ours.variance.copy()
        start = time.perf_counter()
        ours.attribution.refine(*arrays)
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    solution = least_squares(run)
    rival = time.perf_counter() - start
    found = (spearman(x, run.truth) for x in (ours.estimate, arrays[0], solution))
    names = ("before", "refined", "full lsq")
    return {
        "update_us": costs, "rounds": 9, "refine_s": float(np.median(times)), "refine rounds": len(times),
        "lsqr_s": rival, "spearman": dict(zip(names, found, strict=True)),
    }  # fmt: skip


def judge(rows, cost):
    """Return what was demanded, and whether it holds."""
    at = {(row["epochs"], row["losses"]): row for row in rows}
    ten, fifty = at[10, "falling e^-2"], at[50, "falling e^-2"]
    gap = max(row["full lsq"] - max(row["refined"], row["streaming"]) for row in rows)
    growth = cost["update_us"]["N=1000000 B=1024"] / cost["update_us"]["N=10000 B=1024"]
    gain = {name: ten[name] / ten["published"] for name in ("refined", "streaming")}
    return {
        **{f"10 epochs, falling: {name} / published = {value:.2f} >= 2": value >= 2 for name, value in gain.items()},
        f"50 epochs, falling: refined {fifty['refined']:.3f} >= .95": fifty["refined"] >= 0.95,
        f"behind full least squares at most {gap:.3f} <= .02": gap <= 0.02,
        f"refinement {cost['refine_s']:.2f} s < 2 s": cost["refine_s"] < 2,
        f"update: N=1e6 costs {growth:.2f}x N=1e4 at B=1024, <= 2 (caches)": growth <= 2,
    }


def run(*, quick=False):
    """Measure; `quick`: one seed, at most 50 epochs."""
    seeds, lengths = (1, (10, 50)) if quick else (5, (10, 50, 100))
    rows, cost = generated(seeds, lengths), speed()
    few = min(seeds, 3)
    return {
        "generated": rows, "balanced": balanced(few), "training": training(few), "speed": cost,
        "checks": judge(rows, cost),
    }  # fmt: skip


def table(results):
    def part(title, rows):
        head = [key for key in rows[0] if key != "seeds"]
        cells = [[f"{row[key]:.3f}" if isinstance(row[key], float) else row[key] for key in head] for row in rows]
        return [f"\n{title}, medians of {rows[0]['seeds']} seeds", columns(head, cells)]

    cost = results["speed"]
    found = cost["spearman"]
    return "\n".join([
        *part("Spearman with the true losses (N=2000, B=32)", results["generated"]),
        *part("Batches balanced over quartiles of the refined estimate (N=2000, B=32)", results["balanced"]),
        *part("Real training (numpy network, 4 overlapping classes): with its losses at the end", results["training"]),
        "\nupdate, microseconds a call",
        "  ".join(f"{name}: {value:.1f}" for name, value in cost["update_us"].items()),
        f"refine, N=50000, 50 epochs: {cost['refine_s']:.2f} s, Spearman {found['before']:.3f} -> "
        f"{found['refined']:.3f} (LSQR of scipy: {cost['lsqr_s']:.2f} s, {found['full lsq']:.3f})",
        *(f"{'PASS' if passed else 'FAIL'} {line}" for line, passed in results["checks"].items()),
    ])  # fmt: skip


if __name__ == "__main__":
    main(run, table, __doc__)
