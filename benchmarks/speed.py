"""What a step costs: draw + update against blind shuffling and against the published algorithm.

python -m benchmarks.speed [--quick]

Times are of the thread's CPU: all of it is one thread's work, and so other processes disturb less.
"""

from __future__ import annotations

import functools
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.harness import columns, main, progress
from benchmarks.timing import interleave
from learnit_r8 import R8Scheduler


class Published:
    """The algorithm that learnit_r8 was first published with, per batch: Python lists, a full sort.

    Written anew from its description: an exponential moving average per sample, corrected by the
    batch's surprise; every batch sorts all samples by it, cuts the order into four quadrants and
    takes the least used samples of each.
    """

    def __init__(self, num_samples: int, batch_size: int) -> None:
        self.average = [1.0] * num_samples
        self.uses = [0] * num_samples
        self.batch_size = batch_size
        self.random = random.Random(0)

    def step(self, loss: float) -> None:
        order = sorted(range(len(self.average)), key=self.average.__getitem__)
        quarter, batch = len(order) // 4, []
        for quadrant in range(4):
            members = order[quadrant * quarter : (quadrant + 1) * quarter]
            self.random.shuffle(members)
            members.sort(key=self.uses.__getitem__)
            batch += members[: self.batch_size // 4]
        surprise = loss - sum(self.average[i] for i in batch) / len(batch)
        for i in batch:
            self.average[i] += 0.1 * surprise
            self.uses[i] += 1


def torch_batches(num_samples: int, batch_size: int) -> Iterator[list[int]]:
    from torch.utils.data import BatchSampler, RandomSampler

    while True:
        yield from BatchSampler(RandomSampler(range(num_samples)), batch_size, drop_last=True)


class Loop:
    """A scheduler past its cataloging epoch, one step at a time."""

    def __init__(self, num_samples: int, batch_size: int, **options: object) -> None:
        self.scheduler = R8Scheduler(
            num_samples, batch_size, num_epochs=1000, checkpoint_dir=None, drop_last=True, ui="off", **options
        )
        self.losses = np.random.default_rng(0).lognormal(size=batch_size).astype(np.float32)
        # Cataloging ten million samples step by step would take minutes; the rows say "seen" at once.
        rows = self.scheduler.catalog._rows
        rows["estimate"] = np.random.default_rng(1).lognormal(size=num_samples)
        rows["uses"] = 1
        self.scheduler.catalog._num_seen = num_samples
        self.scheduler._progress.epoch = 1
        self.batches = self._forever()

    def _forever(self) -> Iterator[object]:
        for _ in self.scheduler.epoch_iterator():
            yield from self.scheduler.batch_iterator()

    def step(self) -> None:
        next(self.batches)
        self.scheduler.update_with_loss(self.losses)


def per_step(quick: bool) -> list[dict[str, float]]:
    """Return the cost of draw + update at each size."""
    rows = []
    for size in (10_000, 1_000_000) if quick else (10_000, 1_000_000, 10_000_000):
        for batch in (32, 256, 1024):
            progress(f"N={size:,} B={batch}")
            blind, loop = torch_batches(size, batch), Loop(size, batch)
            calls = max(min(200, size // batch // 4), 2)
            rounds = max(
                9 if quick else 15, 3000 // calls
            )  # memory that is new costs a run's first thousand steps more
            rivals = {"r8": loop.step, "torch": lambda blind=blind: next(blind)}
            times = interleave(rivals, rounds=rounds, calls=calls, clock=time.thread_time)
            published = math.nan
            if size <= 1_000_000:
                lists = {"published": functools.partial(Published(size, batch).step, 1.0)}
                published = interleave(lists, rounds=1, clock=time.thread_time)["published"] * 1e6
            rows.append({
                "N": size, "B": batch, "r8_us": times["r8"] * 1e6, "torch_us": times["torch"] * 1e6,
                "published_us": published, "r8/torch": times["r8"] / times["torch"], "rounds": rounds, "calls": calls,
            })  # fmt: skip
    return rows


def per_epoch(quick: bool) -> list[dict[str, float]]:
    """Return the cost of a step of 256 samples over whole epochs, what an epoch's start costs each rival included."""
    rows = []
    for size, rounds in ((10_000, 41), (1_000_000, 3 if quick else 7), *([] if quick else [(10_000_000, 3)])):
        progress(f"whole epochs, N={size:,}")
        blind, loop = torch_batches(size, 256), Loop(size, 256)
        times = interleave({"r8": loop.step, "torch": lambda b=blind: next(b)}, rounds=rounds, calls=size // 256)
        rows.append({
            "N": size, "B": 256, "r8_us": times["r8"] * 1e6, "torch_us": times["torch"] * 1e6,
            "r8/torch": times["r8"] / times["torch"], "rounds": rounds,
        })  # fmt: skip
    return rows


def boundary(quick: bool) -> dict[str, float]:
    """Return the cost of an epoch's boundary, and the catalog's memory."""
    size = 1_000_000 if quick else 10_000_000
    progress(f"epoch boundary at N={size:,}")
    loop = Loop(size, 256)
    scheduler = loop.scheduler
    next(scheduler.epoch_iterator())

    def turn() -> None:
        scheduler._end_epoch(completed=True)
        scheduler._progress.next_epoch()
        scheduler._start_epoch()

    rng = np.random.default_rng(0)
    rivals = {"boundary": turn, "permutation": lambda: rng.permutation(size)}
    times = interleave(rivals, rounds=5, clock=time.thread_time)
    return {
        "N": size, "boundary_s": times["boundary"], "permutation_s": times["permutation"],
        "ratio": times["boundary"] / times["permutation"], "rounds": 5,
        "bytes a sample": scheduler.catalog.nbytes / size,
    }  # fmt: skip


def import_cost(rounds: int = 15) -> dict[str, float]:
    """Return the time of `import learnit_r8` over that of `import numpy`, whole processes."""

    def seconds(module: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
        return time.perf_counter() - start

    progress("import")
    pairs = [(seconds("learnit_r8"), seconds("numpy")) for _ in range(rounds)]
    return {"ratio": statistics.median(ours / numpy for ours, numpy in pairs), "rounds": rounds}


def run(*, quick: bool = False) -> dict[str, Any]:
    """Measure; `quick`: up to a million samples."""
    steps = per_step(quick)
    at = {row["N"]: row["r8_us"] for row in steps if row["B"] == 256}
    return {
        "steps": steps, "epochs": per_epoch(quick), "growth": at[max(at)] / at[min(at)], "boundary": boundary(quick),
        "import": import_cost(),
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    rows = [
        [f"{row['N']:,}", row["B"], f"{row['r8_us']:.1f}", f"{row['torch_us']:.1f}", f"{row['published_us']:.0f}",
         f"{row['r8/torch']:.2f}"]
        for row in results["steps"]
    ]  # fmt: skip
    epochs = [
        [f"{row['N']:,}", row["B"], f"{row['r8_us']:.1f}", f"{row['torch_us']:.1f}", f"{row['r8/torch']:.2f}"]
        for row in results["epochs"]
    ]
    edge, largest = results["boundary"], max(row["N"] for row in results["steps"])
    return "\n".join([
        "Draw + update between epoch starts, microseconds a step (median of interleaved rounds; goal at B=256: 10)",
        columns(("N", "B", "r8", "torch", "published", "r8/torch"), rows),
        "The same over whole epochs, their starts included (goal 10)",
        columns(("N", "B", "r8", "torch", "r8/torch"), epochs),
        f"B=256: N={largest:,} costs {results['growth']:.2f}x what N=10,000 costs (goal 1.3)",
        f"Epoch boundary at N={edge['N']:,}: {edge['boundary_s']:.2f} s, Generator.permutation "
        f"{edge['permutation_s']:.2f} s, {edge['ratio']:.2f}x (goal 4)",
        f"Catalog: {edge['bytes a sample']:.0f} bytes a sample (goal 32)",
        f"import learnit_r8: {results['import']['ratio']:.2f}x import numpy, whole processes (goal 1.3)",
    ])  # fmt: skip


if __name__ == "__main__":
    main(run, table, __doc__)
