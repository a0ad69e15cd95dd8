"""Cost of choosing by each strategy, against uniform and quadrant, and of a curriculum update.

`python -m benchmarks.strategies [--large]`: B = 256, one loss per sample, microseconds per step, medians of rounds in
which the strategies take turns. "choose" is draw + observe (plus the epoch's plan, spread over its batches); "step"
is the whole of `R8Scheduler`'s share of a training step. Times are of the CPU (all of it is one thread's work), so
that other processes disturb less. `--large` adds N = 1e7.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from itertools import islice

import numpy as np

from learnit_r8.catalog import LossCatalog
from learnit_r8.rng import Purpose, RandomStreams
from learnit_r8.scheduler import R8Scheduler
from learnit_r8.strategies import BatchRequest, CurriculumScheduler, Draw, make, names
from learnit_r8.types import LossReport

BATCH = 256
CALLS = 300
ROUNDS = 5


class Choosing:
    """One strategy in mid-run, without a scheduler."""

    def __init__(self, name: str, num_samples: int) -> None:
        self.strategy = make(name)
        self.catalog = LossCatalog(num_samples)
        self.streams = RandomStreams(0)
        rng = np.random.default_rng(0)
        losses = rng.lognormal(0.0, 1.0, num_samples).astype(np.float32)
        self.catalog.record(self.catalog.look_up(np.arange(num_samples)), losses, 0)
        self.catalog.refresh_quadrants(rng)
        self.losses = rng.lognormal(0.0, 1.0, (64, BATCH)).astype(np.float32)
        self.step = self.cursor = self.left = 0
        self.epoch = 1
        self.draw = self.strategy.draw
        self.observe = getattr(self.strategy, "observe", None)

    def request(self, purpose: Purpose) -> BatchRequest:
        return BatchRequest(
            BATCH, self.epoch, self.cursor, self.step, 0.3, self.catalog, self.streams, purpose, None, False
        )

    def plan(self) -> None:
        self.epoch += 1
        self.cursor = 0
        start = getattr(self.strategy, "start_epoch", None)
        samples = start(self.request(Purpose.PLAN)) if start is not None else None
        self.left = self.catalog.num_samples if samples is None else samples

    def batches(self, count: int) -> None:
        for _ in range(count):
            chosen = self.draw(self.request(Purpose.BATCH))
            indices = (chosen.indices if isinstance(chosen, Draw) else chosen).astype(np.int64)
            if self.observe is not None:
                losses = self.losses[self.step % 64][: len(indices)]
                self.observe(LossReport(indices, losses, 1.0, True, self.step, self.epoch))
            self.step += 1
            self.cursor += 1
            self.left -= len(indices)

    def seconds(self) -> tuple[float, float]:
        """Return the time of one batch and of one plan."""
        count = min(CALLS, self.catalog.num_samples // BATCH // 2)
        spent = self.left < count * BATCH
        begin = time.process_time()
        if spent:
            self.plan()
        planned = time.process_time()
        self.batches(count)
        return (time.process_time() - planned) / count, (planned - begin if spent else float("nan"))


def choosing(num_samples: int) -> dict[str, float]:
    """Return microseconds of draw + observe of each strategy."""
    loops = {name: Choosing(name, num_samples) for name in names()}
    batches: dict[str, list[float]] = {name: [] for name in loops}
    plans: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(2 * ROUNDS + 1):
        for name, loop in loops.items():
            batch, plan = loop.seconds()
            batches[name].append(batch)
            if plan == plan:
                plans[name].append(plan)
    share = BATCH / num_samples
    return {
        name: 1e6 * (statistics.median(batches[name][1:]) + share * statistics.median(plans[name])) for name in loops
    }


def training(name: str, num_samples: int) -> Iterator[None]:
    """Train without a model; one item a step."""
    losses = np.random.default_rng(0).lognormal(0.0, 1.0, num_samples).astype(np.float32)
    epochs = 4 if num_samples > 100_000 else 2000
    with R8Scheduler(num_samples, BATCH, num_epochs=epochs, strategy=name, use_curses=False) as scheduler:
        for _ in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                scheduler.update_with_loss(losses[batch.indices])
                yield


def stepping(num_samples: int) -> dict[str, float]:
    """Return microseconds of the scheduler's share of a step, after the cataloging epoch."""
    runs = {name: training(name, num_samples) for name in names()}
    epoch = -(-num_samples // BATCH)
    turns = max(1, 2000 // epoch) * epoch if num_samples < 100_000 else 1300  # whole epochs, or thirds of one
    for run in runs.values():
        for _ in islice(run, epoch):  # cataloging
            pass
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            begin = time.process_time()
            for _ in islice(run, turns):
                pass
            times[name].append((time.process_time() - begin) / turns)
    for run in runs.values():
        run.close()  # type: ignore[attr-defined]
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}


def curriculum_update(asking: bool) -> dict[int, float]:
    """Return microseconds of an update at each number of tracked keys; `asking`: with a drawn bin for each."""
    rivals = {}
    rng = np.random.default_rng(0)
    for size in (1_000, 1_000_000):
        scheduler = CurriculumScheduler("competence_based", steer=True)
        for key, score in enumerate(rng.random(size).tolist()):
            scheduler.update(f"item {key}", score)
        scheduler.sample_bin()
        updates = [(f"item {key}", float(rng.random())) for key in rng.integers(size, size=2000).tolist()]

        def run(scheduler: CurriculumScheduler = scheduler, updates: list[tuple[str, float]] = updates) -> None:
            for number, (key, score) in enumerate(updates):
                scheduler.update(key, score)
                if asking and number % 50 == 0:
                    scheduler.get_item_bin(key)

        rivals[str(size)] = run
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(25):
        for name, run in rivals.items():
            begin = time.process_time()
            run()
            times[name].append((time.process_time() - begin) / 2000)
    return {int(name): statistics.median(values[1:]) * 1e6 for name, values in times.items()}


def main() -> None:
    """Print the tables and one line for the log."""
    sizes = [10_000, 1_000_000] + ([10_000_000] if "--large" in sys.argv else [])
    choose = {size: choosing(size) for size in sizes}
    step = {size: stepping(size) for size in sizes}
    print(f"B = {BATCH}; microseconds: choose, step")
    print(
        f"{'strategy':<13}" + "".join(f"{f'N = {n:.0e}':>18}" for n in sizes) + f"{'step / quadrant':>18}{'growth':>9}"
    )
    for name in names():
        cells = "".join(f"{choose[n][name]:>9.0f}{step[n][name]:>9.0f}" for n in sizes)
        ratio = step[1_000_000][name] / step[1_000_000]["quadrant"]
        growth = step[1_000_000][name] / step[10_000][name]
        print(f"{name:<13}{cells}{ratio:>18.2f}{growth:>9.2f}")
    ratios = []
    for asking in (False, True):
        small, large = curriculum_update(asking).values()
        ratios.append(large / small)
        label = "with a question every 50" if asking else "alone"
        print(f"curriculum update {label}: {small:.2f} us at 1e3 keys, {large:.2f} us at 1e6, {large / small:.2f}x")
    large_steps = step[1_000_000]
    worst = max(large_steps, key=lambda name: large_steps[name])
    print(
        f"python -m benchmarks.strategies -> slowest step at N=1e6: {worst}, "
        f"{large_steps[worst] / large_steps['quadrant']:.2f}x quadrant; largest growth from N=1e4: "
        f"{max(large_steps[name] / step[10_000][name] for name in names()):.2f}x; "
        f"curriculum update 1e6 / 1e3 keys: {ratios[0]:.2f}x, asked every 50 updates {ratios[1]:.2f}x"
    )


if __name__ == "__main__":
    main()
