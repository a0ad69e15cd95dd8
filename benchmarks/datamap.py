"""Where wrong labels lie on the map of mean loss against variability: digits, a fifth of the labels changed.

    python -m benchmarks.datamap [--quick]

One run of a small network with per-sample losses and the noise guard's report; it is told nothing of the changes.
Precision is of the samples that the guard flags, and of `catalog.suspects(k)`, k the number of wrong labels; the rival
is naming the samples whose last loss is highest.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.harness import columns, main
from benchmarks.noise import Network
from benchmarks.noise_data import make_task
from learnit_r8 import R8Scheduler

BATCH, PEAK_LR = 32, 0.05


def run(*, quick: bool = False, seed: int = 0) -> dict[str, Any]:
    """Train; `quick`: 15 epochs in place of 30."""
    task, epochs = make_task("digits", "random", 0.2, seed), 15 if quick else 30
    network, last = Network(task.x.shape[1], 10, seed), np.zeros(len(task.y))
    with R8Scheduler(
        len(task.y), BATCH, num_epochs=epochs, initial_lr=PEAK_LR, checkpoint_dir=None, ui="off", seed=seed
    ) as scheduler:
        for _ in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                losses = network.train_step(task.x[batch.indices], task.y[batch.indices], batch.lr)
                scheduler.update_with_loss(losses)
                last[batch.indices] = losses
        catalog, flagged = scheduler.catalog, scheduler.noise_guard.flagged
    k = int(task.wrong.sum())
    named = {
        "flagged": np.flatnonzero(flagged), f"catalog.suspects({k})": catalog.suspects(k),
        f"the {k} highest last losses": np.argsort(last)[-k:],
    }  # fmt: skip
    return {
        "epochs": epochs, "samples": len(task.y), "wrong": np.flatnonzero(task.wrong),
        "test accuracy": network.accuracy(task.x_test, task.y_test),
        "named": {name: {"samples": len(ids), "wrong": int(task.wrong[ids].sum())} for name, ids in named.items()},
        "flagged": np.flatnonzero(flagged),
        "mean loss": np.round(catalog.mean_loss.astype(float), 4),
        "variability": np.round(catalog.variability.astype(float), 4),
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    wrong = len(results["wrong"])
    rows = [
        [name, found["samples"], found["wrong"], f"{found['wrong'] / max(1, found['samples']):.1%}",
         f"{found['wrong'] / wrong:.1%}"]
        for name, found in results["named"].items()
    ]  # fmt: skip
    title = f"{results['samples']} digits, {wrong} labels wrong, {results['epochs']} epochs"
    return f"{title}\n{columns(('', 'named', 'wrong', 'precision', 'recall'), rows)}"


if __name__ == "__main__":
    main(run, table, __doc__)
