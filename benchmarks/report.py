"""What `r8 report` and `r8 watch` take for a long run: a million steps, a million samples.

    python -m benchmarks.report [--quick] [--steps 10000000 --rounds 1]

The events are those of `r8 demo`, with spikes, rollbacks and checkpoints; the catalog is generated. Limits: 6 MB, 10 s,
20 s at ten million steps.
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
    samples = min(steps, 1_000_000)
    catalog, rng = LossCatalog(samples), np.random.default_rng(0)
    for epoch in range(3):
        losses = rng.lognormal(-epoch, 1.0, samples).astype(np.float32)
        catalog.record(catalog.look_up(np.arange(samples)), losses, epoch)
    write_catalog(folder, catalog, np.arange(samples) % 10, 3)


def timed(*arguments: object) -> tuple[float, float, float]:
    """Run `r8`; return seconds on the wall and of CPU, and megabytes of memory at most."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "learnit_r8", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, process.returncode, usage = os.wait4(process.pid, 0)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000


def run(*, quick: bool = False, rounds: int = 5, steps: int = 1_000_000) -> dict[str, Any]:
    """Measure whole processes; `quick`: a tenth of the steps, one round."""
    steps, rounds = (steps // 10, 1) if quick else (steps, rounds)
    with tempfile.TemporaryDirectory(prefix="r8-report-") as root:
        folder, page = Path(root) / "run", Path(root) / "report.html"
        write_run(folder, steps)
        reports, watches = [], []
        for turn in range(rounds):
            progress(f"report and watch, {turn + 1} of {rounds}")
            reports.append(timed("report", folder, "-o", page))
            watches.append(timed("watch", folder, "--json"))
        log = (folder / "events.jsonl").stat().st_size / 1e6
        size = page.stat().st_size / 1e6
    wall, cpu, memory = (statistics.median(column) for column in zip(*reports, strict=True))
    watch, _, watch_memory = (statistics.median(column) for column in zip(*watches, strict=True))
    return {
        "steps": steps, "log_MB": log, "page_MB": size, "wall_s": wall, "slowest_s": max(reports)[0], "cpu_s": cpu,
        "memory_MB": memory, "watch_s": watch, "watch_memory_MB": watch_memory, "rounds": rounds,
        "failed": int(size > 6),
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    return (
        f"r8 report of {results['steps']:,} steps ({results['log_MB']:.0f} MB of events): {results['page_MB']:.2f} MB "
        f"(limit 6), {results['wall_s']:.1f} s, the slowest {results['slowest_s']:.1f} s, {results['cpu_s']:.1f} s of "
        f"CPU, {results['memory_MB']:.0f} MB of memory; r8 watch: {results['watch_s']:.1f} s, "
        f"{results['watch_memory_MB']:.0f} MB"
    )


if __name__ == "__main__":
    main(run, table, __doc__)
