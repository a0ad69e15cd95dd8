"""What a step costs: draw + update against blind shuffling and against the published algorithm.

python -m benchmarks.speed [--quick]
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np

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


def per_step(quick: bool) -> None:
    print("\nDraw + update, microseconds a step (median of interleaved rounds)")
    print(f"{'N':>9} {'B':>5} {'r8':>8} {'torch':>8} {'published':>11} {'r8/torch':>9}")
    cost = {}
    for size in (10_000, 1_000_000) if quick else (10_000, 1_000_000, 10_000_000):
        for batch in (32, 256, 1024):
            blind = torch_batches(size, batch)
            loop = Loop(size, batch)
            calls = max(min(200, size // batch // 4), 2)
            rivals = {"r8": loop.step, "torch": lambda blind=blind: next(blind)}
            times = interleave(rivals, rounds=9 if quick else 15, calls=calls)
            published = float("nan")
            if size <= 1_000_000:
                rival = Published(size, batch)
                published = interleave({"p": lambda rival=rival: rival.step(1.0)}, rounds=1)["p"] * 1e6
            r8, torch = times["r8"] * 1e6, times["torch"] * 1e6
            cost[size, batch] = r8
            print(f"{size:9d} {batch:5d} {r8:8.1f} {torch:8.1f} {published:11.0f} {r8 / torch:9.2f}")
    largest = max(size for size, _ in cost)
    print(f"B=256: N={largest:,} costs {cost[largest, 256] / cost[10_000, 256]:.2f}x what N=10,000 costs (goal 1.3)")


def boundary(quick: bool) -> None:
    size = 1_000_000 if quick else 10_000_000
    loop = Loop(size, 256)
    scheduler = loop.scheduler
    next(scheduler.epoch_iterator())

    def turn() -> None:
        scheduler._end_epoch(completed=True)
        scheduler._progress.next_epoch()
        scheduler._start_epoch()

    rng = np.random.default_rng(0)
    times = interleave({"boundary": turn, "permutation": lambda: rng.permutation(size)}, rounds=5)
    ratio = times["boundary"] / times["permutation"]
    print(
        f"\nEpoch boundary at N={size:,}: {times['boundary']:.2f} s, "
        f"Generator.permutation {times['permutation']:.2f} s, {ratio:.2f}x (goal 4)"
    )
    print(f"Catalog: {scheduler.catalog.nbytes / size:.0f} bytes a sample (goal 32)")


def import_cost() -> None:
    def seconds(module: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
        return time.perf_counter() - start

    pairs = [(seconds("learnit_r8"), seconds("numpy")) for _ in range(15)]
    ratio = statistics.median(ours / numpy for ours, numpy in pairs)
    print(f"\nimport learnit_r8: {ratio:.2f}x import numpy, whole processes (goal 1.3)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to a million samples")
    quick = parser.parse_args().quick
    per_step(quick)
    boundary(quick)
    import_cost()


if __name__ == "__main__":
    main()
