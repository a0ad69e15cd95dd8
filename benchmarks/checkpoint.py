"""What a checkpoint of N samples costs, against writing the same bytes with fsync.

    python -m benchmarks.checkpoint [--samples 10000000] [--rounds 7] [--directory DIR]

State: the arrays of a catalog, 24 bytes a sample. All rivals end with an fsync and the directory they
write into holds no more than three checkpoints, as in a run. Files are read from the page cache.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import columns, main, progress
from learnit_r8.checkpoint import CheckpointStore

Results = dict[str, Any]


def catalog_state(samples: int) -> dict[str, object]:
    """Return arrays of 24 bytes a sample, as a catalog has them."""
    rng = np.random.default_rng(0)
    return {
        "step": 12340,
        "catalog": {
            "loss": rng.random(samples, np.float32),
            "variance": rng.random(samples, np.float32),
            "surprise": rng.random(samples, np.float32),
            "uses": rng.integers(0, 100, samples, np.uint32),
            "last_seen": rng.integers(0, 100_000, samples, np.uint32),
            "flags": rng.integers(0, 8, samples, np.uint32),
        },
    }


def run(*, quick: bool = False, samples: int = 10_000_000, rounds: int = 7, directory: str | None = None) -> Results:
    """Measure; `directory`: where to write, a temporary directory by default; `quick`: a hundredth of the samples."""
    root = Path(tempfile.mkdtemp(prefix="r8-checkpoint-", dir=directory))
    try:
        return measure(root, samples // 100 if quick else samples, rounds)
    finally:
        shutil.rmtree(root)


def measure(root: Path, samples: int, rounds: int) -> Results:
    """Time the rivals below `root`."""
    progress(f"{samples:,} samples")
    state = catalog_state(samples)
    arrays = list(state["catalog"].values())  # type: ignore[attr-defined]
    megabytes = sum(array.nbytes for array in arrays) / 1e6
    store = CheckpointStore(root / "store", keep=3)
    steps = iter(range(10**9))
    plain_files: list[Path] = []

    def plain(hashed: bool = False) -> None:
        """Keep three files, as the store keeps three checkpoints."""
        path = root / f"plain-{next(steps)}"
        digest = hashlib.sha256()
        with path.open("xb", buffering=0) as file:
            for array in arrays:
                view = memoryview(array).cast("B")
                while view:
                    view = view[file.write(view) :]
                if hashed:
                    digest.update(array)
            os.fsync(file.fileno())
        plain_files.append(path)
        if len(plain_files) > 3:
            plain_files.pop(0).unlink()

    def read() -> None:
        np.fromfile(plain_files[-1], np.uint8)

    times = interleave_warm(
        {
            "write + fsync": plain,
            "write, then sha256, fsync": lambda: plain(hashed=True),
            "CheckpointStore.save": lambda: store.save(next(steps), state),
            "read": read,
            "CheckpointStore.newest (load + verify)": store.newest,
        },
        rounds,
        int(megabytes * 1.5e6),
    )
    return {"samples": samples, "MB": megabytes, "rounds": rounds, "seconds": times}


def table(results: Results) -> str:
    times, megabytes = results["seconds"], results["MB"]
    base = times["write + fsync"]
    rows = [
        [name, f"{seconds * 1e3:.1f}", f"{megabytes / seconds:.0f}", f"{seconds / base:.2f}"]
        for name, seconds in times.items()
    ]
    title = f"{results['samples']:,} samples, {megabytes:.0f} MB; the limit of save is 1.5 x write + fsync"
    return f"{title}\n{columns(('', 'ms', 'MB/s', 'x'), rows)}"


def interleave_warm(rivals: Mapping[str, Callable[[], object]], rounds: int, nbytes: int) -> dict[str, float]:
    """Return the median seconds of each rival, after `nbytes` of memory were touched and freed.

    A virtual machine gives freed memory back to its host, and whoever needs it next pays for that: up to
    four times the cost of the whole write. Rivals take turns, and none of them is charged with that.
    """
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(rounds + 1):
        for name, function in rivals.items():
            np.ones(nbytes, np.uint8)
            start = time.perf_counter()
            function()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main(run, table, __doc__)
