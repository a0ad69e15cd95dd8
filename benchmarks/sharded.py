"""What a sharded catalog costs each of 64 ranks over a billion samples: memory, bytes exchanged, time.

python -m benchmarks.sharded [--samples 1000000000] [--ranks 64] [--steps 200]

One rank runs for real, at its full shard size; the other ranks are taken to send what it sends
itself, so that volumes and the work on them are those of the whole. Network time is not in it.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time

import numpy as np

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000_000)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--batch", type=int, default=256, help="samples a step of one rank")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    shard, before = args.samples // args.ranks, peak()
    gather = Echo(args.ranks)
    scheduler = ShardedScheduler(
        shard,
        args.batch,
        num_epochs=4,
        rank=0,
        world_size=args.ranks,
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
    losses = np.random.default_rng(0).lognormal(size=args.batch).astype(np.float32)
    seconds, batches = [], scheduler.batch_iterator()
    for _ in range(args.steps):
        start = time.perf_counter()
        next(batches)
        scheduler.update_with_loss(losses)
        seconds.append(time.perf_counter() - start)
    step_bytes = gather.sent / args.steps
    catalog = scheduler.catalog.nbytes / (1 << 20)
    print(f"{args.samples:,} samples on {args.ranks} ranks: {shard:,} a rank, batch {args.batch} a rank")
    lines = {
        "catalog": f"{catalog:.0f} MiB a rank, {scheduler.catalog.nbytes / shard:.0f} bytes a sample",
        "replicated": f"{catalog * args.ranks:.0f} MiB a rank would be needed",
        "peak memory": f"{after_catalog - before:.0f} MiB a rank with the catalog, "
        f"{peak() - before:.0f} while planning",
        "a step": f"{step_bytes:.0f} bytes sent, {step_bytes * args.ranks:.0f} received, "
        f"{statistics.median(seconds) * 1e6:.0f} us",
        "an epoch start": f"{epoch_bytes:,} bytes sent, {epoch_bytes * args.ranks:,} received, {epoch_seconds:.1f} s",
    }
    for name, text in lines.items():
        print(f"  {name:16}{text}")


if __name__ == "__main__":
    main()
