"""Replay buffers: sample + weights + update against cpprb, drift, and selection by diversity.

    python -m benchmarks.replay [--quick]

Every rival holds the same transitions (observation of 4 floats, action, reward, next
observation, done) under the same random priorities, and is asked for the same: a batch with
importance weights, then new priorities for it.
"""

from __future__ import annotations

import argparse
import importlib
import math
import time
from collections.abc import Callable

import numpy as np

from benchmarks.timing import interleave
from learnit_r8.replay import HybridSRLReplayBuffer, PrioritizedReplayBuffer
from learnit_r8.sum_tree import SumTree

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


def compare(capacity: int, rounds: int) -> None:
    """Print one row per batch size: microseconds per step and ratios to cpprb."""
    rng = np.random.default_rng(1)
    numpy, numba, cpprb = ours(capacity, fast=False), ours(capacity, fast=True), theirs(capacity)
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
        )
        cells = [f"{1e6 * seconds[name]:9.1f}" for name in ("cpprb", "numpy", "numba")]
        ratios = [f"{seconds[name] / seconds['cpprb']:9.2f}" for name in ("numpy", "numba")]
        print(f"{capacity:>10.0e} {size:>6}", *cells, *ratios)


def drift(updates: int) -> None:
    """Print the relative error of the total after many updates with duplicates."""
    rng = np.random.default_rng(2)
    tree = SumTree(100_000)
    for _ in range(updates // 1000):
        tree.set(rng.integers(0, tree.size, 1000), rng.pareto(1.2, 1000))
    error = abs(tree.total / math.fsum(tree.weights()) - 1.0)
    print(f"total after {updates:.0e} updates: relative error {error:.1e}")


def diversity(count: int, rounds: int) -> None:
    """Print the milliseconds for diversity of all and for selecting what is due."""
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
    print(f"diversity + due selection, {count:.0e} x 256: {1e3 * float(np.median(both)):.1f} ms")


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    quick = parser.parse_args().quick
    try:
        importlib.import_module("torchrl.data")
        print("torchrl loads here: add it as a rival")
    except (ImportError, OSError, RuntimeError) as error:
        print(f"torchrl left out: {error}")
    print(
        f"{'capacity':>10} {'batch':>6} {'cpprb us':>9} {'numpy us':>9} {'numba us':>9} {'numpy/c':>9} {'numba/c':>9}"
    )
    for capacity in (10_000,) if quick else (10_000, 1_000_000, 10_000_000):
        compare(capacity, rounds=3 if quick else 15)
    drift(10_000 if quick else 1_000_000)
    diversity(2_000 if quick else 100_000, rounds=3 if quick else 15)


if __name__ == "__main__":
    main()
