"""What a sharded catalog costs each of 64 ranks over a billion samples: memory, bytes exchanged, time.

python -m benchmarks.sharded [--samples 1000000000] [--ranks 64] [--steps 200]

One rank runs for real, at its full shard size; the other ranks are taken to send what it sends
itself, so that volumes and the work on them are those of the whole. Network time is not in it.
"""

from __future__ import annotations

import resource
import statistics
import time
from typing import Any

import numpy as np

from benchmarks.harness import main
from learnit_r8.integrations.sharded import ShardedScheduler


class Echo:
    """all_gather among ranks that are all alike; counts what travels."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.sent = 0

    def __call__(self, array: np.ndarray) -> np.ndarray:
        self.sent += array.nbytes
        return np.tile(array, self.ranks)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(
    *, quick: bool = False, samples: int = 1_000_000_000, ranks: int = 64, batch: int = 256, steps: int = 200
) -> dict[str, Any]:
    """Measure; `batch`: samples a step of one rank; `quick`: a hundredth of the samples."""
    samples //= 100 if quick else 1
    shard, before = samples // ranks, peak()
    gather = Echo(ranks)
    scheduler = ShardedScheduler(
        shard,
        batch,
        num_epochs=4,
        rank=0,
        world_size=ranks,
        all_gather=gather,
        checkpoint_dir=None,
        ui="off",
    )
    # Cataloging a whole shard step by step would take minutes; the rows say "seen" at once.
    rows = scheduler.catalog._rows
    rows["estimate"] = np.random.default_rng(1).lognormal(size=shard)
    rows["uses"] = 1
    scheduler.catalog._num_seen = shard
    scheduler.catalog._resum()
    scheduler._progress.epoch = 1
    after_catalog, gather.sent = peak(), 0
    start = time.perf_counter()
    scheduler._start_epoch()
    epoch_seconds, epoch_bytes, gather.sent = time.perf_counter() - start, gather.sent, 0
    losses = np.random.default_rng(0).lognormal(size=batch).astype(np.float32)
    seconds, batches = [], scheduler.batch_iterator()
    for _ in range(steps):
        start = time.perf_counter()
        next(batches)
        scheduler.update_with_loss(losses)
        seconds.append(time.perf_counter() - start)
    step_bytes = gather.sent / steps
    catalog = scheduler.catalog.nbytes / (1 << 20)
    return {
        "samples": samples, "ranks": ranks, "shard": shard, "batch": batch,
        "catalog": {"MiB": catalog, "bytes a sample": scheduler.catalog.nbytes / shard,
                    "replicated_MiB": catalog * ranks},
        "peak memory": {"catalog_MiB": after_catalog - before, "planning_MiB": peak() - before},
        "step": {"sent": step_bytes, "received": step_bytes * ranks, "us": statistics.median(seconds) * 1e6,
                 "repeats": steps},
        "epoch start": {"sent": epoch_bytes, "received": epoch_bytes * ranks, "s": epoch_seconds},
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    held, top, step, start = (results[key] for key in ("catalog", "peak memory", "step", "epoch start"))
    lines = {
        "catalog": f"{held['MiB']:.0f} MiB a rank, {held['bytes a sample']:.0f} bytes a sample",
        "replicated": f"{held['replicated_MiB']:.0f} MiB a rank would be needed",
        "peak memory": f"{top['catalog_MiB']:.0f} MiB with the catalog, {top['planning_MiB']:.0f} while planning",
        "a step": f"{step['sent']:.0f} bytes sent, {step['received']:.0f} received, {step['us']:.0f} us",
        "an epoch start": f"{start['sent']:,} bytes sent, {start['received']:,} received, {start['s']:.1f} s",
    }
    title = f"{results['samples']:,} samples on {results['ranks']} ranks: {results['shard']:,} a rank, " + (
        f"batch {results['batch']} a rank"
    )
    return "\n".join([title, *(f"  {name:16}{text}" for name, text in lines.items())])


if __name__ == "__main__":
    main(run, table, __doc__)
