"""Cost of choosing by each strategy, against uniform and quadrant, and of a curriculum update.

`python -m benchmarks.strategies [--large] [--plain]`: B = 256, one loss per sample, microseconds per step, medians of
rounds in which the strategies take turns. "choose" is draw + observe (plus the epoch's plan, spread over its batches);
"step" is the whole of `R8Scheduler`'s share of a training step within an epoch. Times are of the CPU (all of it is one
thread's work), so that other processes disturb less. `--large` adds N = 1e7, `--plain` leaves numba out.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from benchmarks.harness import columns, main, progress
from learnit_r8.core.rng import Purpose, RandomStreams
from learnit_r8.samples.catalog import LossCatalog
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
    turns = max(1, 400 // epoch) * epoch if num_samples < 100_000 else 200  # whole epochs, or parts of one
    for run in runs.values():
        for _ in islice(run, epoch):  # cataloging
            pass
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(5 * ROUNDS):
        for name, run in runs.items():
            begin = time.process_time()
            for _ in islice(run, turns):
                pass
            times[name].append((time.process_time() - begin) / turns)
    for run in runs.values():
        run.close()  # type: ignore[attr-defined]
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}


def ask_never(scheduler: CurriculumScheduler, updates: list[tuple[str, float]]) -> None:
    for key, score in updates:
        scheduler.update(key, score)


def ask_every_50(scheduler: CurriculumScheduler, updates: list[tuple[str, float]]) -> None:
    for number, (key, score) in enumerate(updates):
        scheduler.update(key, score)
        if number % 50 == 0:
            scheduler.get_item_bin(key)


def plain_dict(averages: dict[str, float], updates: list[tuple[str, float]]) -> None:
    """Average exponentially and do nothing else: what keeping the scores costs at least."""
    for key, score in updates:
        averages[key] = 0.3 * score + 0.7 * averages[key]


def curriculum_updates() -> dict[str, dict[int, float]]:
    """Return microseconds of an update at each number of tracked keys; other keys are updated in each round."""
    rivals: dict[str, Any] = {"alone": ask_never, "asked every 50": ask_every_50, "in a plain dict": plain_dict}
    rng = np.random.default_rng(0)
    subjects: dict[tuple[str, int], Any] = {}
    for size in (1_000, 1_000_000):
        for name in rivals:
            scheduler = CurriculumScheduler("competence_based", steer=True)
            first = [(f"item {key}", score) for key, score in enumerate(rng.random(size).tolist())]
            ask_every_50(scheduler, first[:50])
            ask_never(scheduler, first[50:])
            subjects[name, size] = dict(first) if name == "in a plain dict" else scheduler
    times: dict[tuple[str, int], list[float]] = {subject: [] for subject in subjects}
    for _ in range(100):
        for (name, size), subject in subjects.items():
            updates = [(f"item {key}", float(rng.random())) for key in rng.integers(size, size=2000).tolist()]
            begin = time.process_time()
            rivals[name](subject, updates)
            times[name, size].append((time.process_time() - begin) / len(updates))
    found: dict[str, dict[int, float]] = {name: {} for name in rivals}
    for (name, size), values in times.items():
        found[name][size] = statistics.median(values[1:]) * 1e6
    return found


def run(*, quick: bool = False, large: bool = False, plain: bool = False) -> dict[str, Any]:
    """Measure; `quick`: 10 000 samples only, `large`: N = 1e7 too, `plain`: numpy's path."""
    if plain:
        sys.modules["numba"] = None  # type: ignore[assignment]
    sizes = [10_000, *([] if quick else [1_000_000]), *([10_000_000] if large else [])]
    costs = {name: {} for name in names()}
    for size in sizes:
        progress(f"N={size:,}")
        choose, step = choosing(size), stepping(size)
        for name in costs:
            costs[name][f"N={size}"] = {"choose_us": choose[name], "step_us": step[name]}
    progress("curriculum updates")
    updates = curriculum_updates()
    return {"B": BATCH, "rounds": ROUNDS, "strategies": costs, "curriculum update, us by keys": updates}


def table(results: dict[str, Any]) -> str:
    costs = results["strategies"]
    sizes = list(next(iter(costs.values())))
    last, first = sizes[-1], sizes[0]
    rows = [
        [name, *(f"{found[size][key]:.0f}" for size in sizes for key in ("choose_us", "step_us")),
         f"{found[last]['step_us'] / costs['quadrant'][last]['step_us']:.2f}",
         f"{found[last]['step_us'] / found[first]['step_us']:.2f}"]
        for name, found in costs.items()
    ]  # fmt: skip
    head = ["strategy", *(f"{key}, {size}" for size in sizes for key in ("choose", "step")), "step/quadrant", "growth"]
    lines = [
        f"curriculum update {label}: {small:.2f} us at 1e3 keys, {large:.2f} us at 1e6, {large / small:.2f}x"
        for label, (small, large) in (
            (label, tuple(found.values())) for label, found in results["curriculum update, us by keys"].items()
        )
    ]
    return "\n".join([f"B = {results['B']}; microseconds of CPU", columns(head, rows), *lines])


if __name__ == "__main__":
    main(run, table, __doc__)
