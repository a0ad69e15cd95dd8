"""Replay buffers: sample + weights + update against cpprb, drift, and selection by diversity.

    python -m benchmarks.replay [--quick]

Every rival holds the same transitions (observation of 4 floats, action, reward, next
observation, done) under the same random priorities, and is asked for the same: a batch with
importance weights, then new priorities for it. Times are of the thread's CPU.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.harness import columns, main, progress
from benchmarks.timing import interleave
from learnit_r8.replay import HybridSRLReplayBuffer, PrioritizedReplayBuffer
from learnit_r8.structures.sum_tree import SumTree

BATCHES = (32, 256, 1024)
CHUNK = 10_000


def ours(capacity: int, *, fast: bool) -> PrioritizedReplayBuffer:
    """Return a full buffer of ours."""
    rng = np.random.default_rng(0)
    buffer = PrioritizedReplayBuffer(capacity, storage="arrays", fast=fast)
    for start in range(0, capacity, CHUNK):
        buffer.extend(transitions(rng), stacked=True)
        buffer.update_priorities(np.arange(start, start + CHUNK), rng.random(CHUNK))
    return buffer


def theirs(capacity: int) -> object:
    """Return a full buffer of cpprb."""
    rng = np.random.default_rng(0)
    shapes = {"obs": {"shape": 4}, "act": {"dtype": np.int32}, "rew": {}, "next_obs": {"shape": 4}, "done": {}}
    buffer = importlib.import_module("cpprb").PrioritizedReplayBuffer(capacity, shapes, alpha=0.6)
    for start in range(0, capacity, CHUNK):
        buffer.add(**transitions(rng))
        buffer.update_priorities(np.arange(start, start + CHUNK), rng.random(CHUNK))
    return buffer


def transitions(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return `CHUNK` transitions in the dtypes that both sides store."""
    return {
        "obs": rng.random((CHUNK, 4), dtype=np.float32),
        "act": rng.integers(0, 2, (CHUNK, 1), dtype=np.int32),
        "rew": rng.random((CHUNK, 1), dtype=np.float32),
        "next_obs": rng.random((CHUNK, 4), dtype=np.float32),
        "done": np.zeros((CHUNK, 1), dtype=np.float32),
    }


def our_step(buffer: PrioritizedReplayBuffer, errors: np.ndarray) -> Callable[[], object]:
    """Return one sample + update of ours."""

    def step() -> None:
        _, _, indices = buffer.sample(len(errors))
        buffer.update_priorities(indices, errors)

    return step


def their_step(buffer: object, errors: np.ndarray) -> Callable[[], object]:
    """Return one sample + update of cpprb."""

    def step() -> None:
        batch = buffer.sample(len(errors), beta=0.4)
        buffer.update_priorities(batch["indexes"], errors)

    return step


def compare(capacity: int, rounds: int) -> list[dict[str, float]]:
    """Return one row per batch size: microseconds per step."""
    progress(f"{capacity:,} transitions")
    rng = np.random.default_rng(1)
    numpy, numba, cpprb = ours(capacity, fast=False), ours(capacity, fast=True), theirs(capacity)
    rows = []
    for size in BATCHES:
        errors = rng.random(size)
        seconds = interleave(
            {
                "cpprb": their_step(cpprb, errors),
                "numpy": our_step(numpy, errors),
                "numba": our_step(numba, errors),
            },
            rounds=rounds,
            calls=max(10, 3200 // size),
            clock=time.thread_time,
        )
        rows.append(
            {"capacity": capacity, "B": size, **{f"{name}_us": 1e6 * value for name, value in seconds.items()}}
            | {f"{name}/cpprb": seconds[name] / seconds["cpprb"] for name in ("numpy", "numba")}
            | {"rounds": rounds}
        )
    return rows


def drift(updates: int) -> float:
    """Return the relative error of the total after many updates with duplicates."""
    progress("drift of the total")
    rng = np.random.default_rng(2)
    tree = SumTree(100_000)
    for _ in range(updates // 1000):
        tree.set(rng.integers(0, tree.size, 1000), rng.pareto(1.2, 1000))
    return abs(tree.total / math.fsum(tree.view) - 1.0)


def diversity(count: int, rounds: int) -> float:
    """Return the milliseconds for diversity of all and for selecting what is due."""
    progress("diversity")
    rng = np.random.default_rng(3)
    buffer = HybridSRLReplayBuffer(count)
    for k in range(count):
        buffer.add(k, rng.standard_normal(256, dtype=np.float32))
    items = buffer.get_due_samples(1, count)
    buffer.update_after_replay(items, rng.random(count), 1)
    both = []
    for _ in range(rounds):
        buffer.add(0, rng.standard_normal(256, dtype=np.float32))  # moves the centroid: nothing may be remembered
        start = time.perf_counter()
        buffer.diversities()
        buffer.get_due_samples(9, 64)
        both.append(time.perf_counter() - start)
    return 1e3 * float(np.median(both))


def run(*, quick: bool = False) -> dict[str, Any]:
    """Measure; `quick`: small sizes, few rounds."""
    rounds, updates, count = (3, 10_000, 2_000) if quick else (15, 1_000_000, 100_000)
    sizes = (10_000,) if quick else (10_000, 1_000_000, 10_000_000)
    return {
        "steps": [row for capacity in sizes for row in compare(capacity, rounds)],
        "drift": {"updates": updates, "relative error": drift(updates)},
        "diversity": {"embeddings": count, "ms": diversity(count, rounds), "rounds": rounds},
    }


def table(results: dict[str, Any]) -> str:
    fields = ("cpprb_us", "numpy_us", "numba_us", "numpy/cpprb", "numba/cpprb")
    rows = [
        [f"{row['capacity']:,}", row["B"], *(f"{row[key]:.{1 if key.endswith('us') else 2}f}" for key in fields)]
        for row in results["steps"]
    ]
    drifted, found = results["drift"], results["diversity"]
    return "\n".join([
        "Sample + weights + update, microseconds (median of interleaved rounds)",
        columns(("capacity", "B", "cpprb", "ours, numpy", "ours, numba", "numpy/cpprb", "numba/cpprb"), rows),
        f"total after {drifted['updates']:,} updates: relative error {drifted['relative error']:.1e}",
        f"diversity + due selection, {found['embeddings']:,} x 256: {found['ms']:.1f} ms",
    ])  # fmt: skip


if __name__ == "__main__":
    main(run, table, __doc__)
