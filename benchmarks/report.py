"""What `r8 report` takes for a long run: a million steps, a million samples.

    python -m benchmarks.report [--quick]

The events are those of `r8 demo`, with spikes, rollbacks and checkpoints; the catalog is generated. Limits: 6 MB, 10 s.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import main, progress
from learnit_r8.dashboard.demo import DemoRun
from learnit_r8.run.samples_file import write_catalog
from learnit_r8.samples.catalog import LossCatalog
from learnit_r8.sinks import JsonlSink

PER_EPOCH = 10_000


def write_run(folder: Path, steps: int) -> None:
    """Write the folder of a run of that many steps and samples."""
    progress(f"writing a run of {steps:,} steps")
    folder.mkdir()
    sink = JsonlSink(folder / "events.jsonl")
    for _, event in DemoRun(epochs=steps // PER_EPOCH, batches=PER_EPOCH, start=1.7e9):
        sink.record(event)
    sink.close()
    catalog, rng = LossCatalog(steps), np.random.default_rng(0)
    for epoch in range(3):
        losses = rng.lognormal(-epoch, 1.0, steps).astype(np.float32)
        catalog.record(catalog.look_up(np.arange(steps)), losses, epoch)
    write_catalog(folder, catalog, np.arange(steps) % 10, 3)


def run(*, quick: bool = False, rounds: int = 5) -> dict[str, Any]:
    """Measure whole processes; `quick`: a tenth of the steps, one round."""
    steps, rounds = (100_000, 1) if quick else (1_000_000, rounds)
    with tempfile.TemporaryDirectory(prefix="r8-report-") as root:
        folder, page = Path(root) / "run", Path(root) / "report.html"
        write_run(folder, steps)
        wall, cpu = [], []
        for turn in range(rounds):
            progress(f"report {turn + 1} of {rounds}")
            start, before = time.perf_counter(), os.times()
            subprocess.run(
                [sys.executable, "-m", "learnit_r8", "report", str(folder), "-o", str(page)],
                check=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            after = os.times()
            wall.append(time.perf_counter() - start)
            cpu.append(sum(after[2:4]) - sum(before[2:4]))  # of the children
        log = (folder / "events.jsonl").stat().st_size / 1e6
        size = page.stat().st_size / 1e6
    return {
        "steps": steps, "log_MB": log, "page_MB": size, "wall_s": statistics.median(wall),
        "slowest_s": max(wall), "cpu_s": statistics.median(cpu), "rounds": rounds, "failed": int(size > 6),
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    return (
        f"r8 report of {results['steps']:,} steps and as many samples ({results['log_MB']:.0f} MB of events): "
        f"{results['page_MB']:.2f} MB (limit 6), {results['wall_s']:.1f} s, the slowest {results['slowest_s']:.1f} s "
        f"(limit 10), {results['cpu_s']:.1f} s of CPU"
    )


if __name__ == "__main__":
    main(run, table, __doc__)
