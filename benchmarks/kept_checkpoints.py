"""What a save costs where 3 and where 1,000 checkpoints are kept, in turns.

python -m benchmarks.kept_checkpoints [ROUNDS]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time

import numpy as np

from learnit_r8.checkpoint import CheckpointStore, Retention


def main(rounds: int = 40, most: int = 1000) -> None:
    state = {"losses": np.zeros(100_000), "step": 1}
    times: dict[int, list[float]] = {3: [], most: []}
    with tempfile.TemporaryDirectory() as place:
        stores = {kept: CheckpointStore(f"{place}/{kept}", run="r0", retention=Retention(kept)) for kept in times}
        for kept, store in stores.items():
            for step in range(kept):
                store.save(step, {"step": step})
        for step in range(most, most + rounds):
            for kept, store in stores.items():
                began = time.perf_counter()
                store.save(step, state)
                times[kept].append(1e3 * (time.perf_counter() - began))
    for kept, taken in times.items():
        low, middle, high = statistics.quantiles(taken, n=4)
        print(f"{kept:,} kept: {middle:.1f} ms a save (quartiles {low:.1f} and {high:.1f}, least {min(taken):.1f})")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
