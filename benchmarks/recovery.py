"""What safety costs: rollback from RAM against a durable checkpoint, a backup against a copy, the step against torch.

python -m benchmarks.recovery [--quick]

The disk is timed by the wall clock, copies and steps by the thread's CPU time: machines are shared.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import main, progress
from benchmarks.speed import torch_batches
from benchmarks.timing import interleave
from learnit_r8 import R8Scheduler
from learnit_r8.checkpoint import CheckpointStore
from learnit_r8.events import BackupTaken
from learnit_r8.stability.backups import BackupRing


def state_of(megabytes: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"layer{k}": rng.standard_normal((1250, 200), dtype=np.float32) for k in range(megabytes)}


def forget(folder: Path) -> None:
    """Have the system drop a checkpoint's files from memory: a run that wrote it long ago reads it from the disk."""
    for file in (file for file in folder.rglob("*") if file.is_file()):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rollback(megabytes: int, rounds: int) -> dict[str, float]:
    progress(f"rollback of {megabytes} MB")
    state = state_of(megabytes)
    target = {name: array.copy() for name, array in state.items()}
    ring = BackupRing()
    for step in range(3):
        ring.take(state, step)
        for calm in range(8):
            ring.healthy(step + calm)
    with tempfile.TemporaryDirectory(prefix="r8-recovery-") as folder:
        store = CheckpointStore(folder)
        saved = store.save(1, state)

        def load() -> None:
            for name, array in store.load(saved.path).state.items():
                np.copyto(target[name], array)

        def from_ram() -> float:
            ring.take(state, 3)  # the ring of a run is full; the restore works in the memory of the newest backup
            start = time.perf_counter()
            for name, array in ring.restore(3)[1].items():
                np.copyto(target[name], array)
            return time.perf_counter() - start

        def from_disk() -> float:
            start = time.perf_counter()
            load()
            return time.perf_counter() - start

        ram, disk, cached = [], [], []
        for _ in range(rounds):
            ram.append(from_ram())
            forget(saved.path)
            disk.append(from_disk())
            cached.append(from_disk())

    def plain() -> None:
        for name, array in state.items():
            np.copyto(target[name], array)

    rivals = {"plain": plain, "backup": lambda: ring.take(state, 4)}
    times = interleave(rivals, rounds=rounds, clock=time.thread_time)
    ram_s, disk_s = statistics.median(ram), statistics.median(disk)
    return {
        "MB": megabytes, "RAM_ms": ram_s * 1e3, "checkpoint_ms": disk_s * 1e3, "faster": disk_s / ram_s,
        "cached_ms": statistics.median(cached) * 1e3,
        "backup_ms": times["backup"] * 1e3, "copy_ms": times["plain"] * 1e3,
        "backup/copy": times["backup"] / times["plain"], "rounds": rounds,
    }  # fmt: skip


class Appending:
    """A sink that only appends."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.record = self.events.append


def step_cost(rounds: int) -> list[dict[str, float]]:
    """Draw + update with everything on, against torch's blind draw of one batch."""
    rows = []
    for size in (10_000, 1_000_000):
        progress(f"a step at N={size:,}")
        heard = Appending()
        weights = np.zeros(1000, np.float32)
        scheduler = R8Scheduler(
            size, 256, num_epochs=100_000, ui="off", checkpoint_dir=None, sinks=[heard], drop_last=True,
            state_callback=lambda weights=weights: {"w": weights}, load_callback=lambda source: None,
        )  # fmt: skip
        losses = np.random.default_rng(0).lognormal(sigma=0.3, size=256).astype(np.float32)

        def forever(scheduler: R8Scheduler = scheduler) -> Any:
            for _ in scheduler.epoch_iterator():
                yield from scheduler.batch_iterator()

        batches = forever()

        def step(batches: Any = batches, scheduler: R8Scheduler = scheduler, losses: np.ndarray = losses) -> None:
            next(batches)
            scheduler.update_with_loss(losses)

        blind = torch_batches(size, 256)
        for _ in range(2 * (size // 256) + 1):  # past the cataloging epoch, past one boundary
            step()
        times = interleave(
            {"r8": step, "torch": lambda blind=blind: next(blind)}, rounds=8 * rounds, calls=5, clock=time.thread_time
        )
        rows.append({
            "N": size, "r8_us": times["r8"] * 1e6, "torch_us": times["torch"] * 1e6,
            "ratio": times["r8"] / times["torch"], "rounds": 8 * rounds,
        })  # fmt: skip
    return rows


def pacing(megabytes: int, step_seconds: float, steps: int) -> dict[str, float]:
    """Share of a run's time that automatic backups take; and whether a full ring allocates."""
    progress("pacing")
    state, heard, addresses = state_of(megabytes), Appending(), set()
    scheduler = R8Scheduler(
        256, 16, num_epochs=-(-steps // 16), ui="off", checkpoint_dir=None, sinks=[heard], backup_every=1,
        state_callback=lambda: state, load_callback=lambda source: None,
    )  # fmt: skip
    started = time.perf_counter()
    with scheduler:
        for _ in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                time.sleep(step_seconds)
                scheduler.update_with_loss(np.ones(len(batch.indices), np.float32))
                for slot in scheduler._safety.backups.ring._slots:
                    addresses.update(array.ctypes.data for array in slot.copy.tree.values())
    seconds = time.perf_counter() - started
    taken = [event for event in heard.events if isinstance(event, BackupTaken)]
    share = scheduler._safety.backups.ring.seconds / seconds
    return {
        "backups": len(taken), "MB": megabytes, "seconds": seconds, "step_ms": step_seconds * 1e3,
        "share": share, "buffers": len(addresses) / len(state),
    }  # fmt: skip


def run(*, quick: bool = False) -> dict[str, Any]:
    """Measure; `quick`: 50 MB in place of 500."""
    return {
        "rollback": rollback(50 if quick else 500, 5 if quick else 9),
        "step": step_cost(9 if quick else 25),
        "pacing": pacing(8, 0.01, 300 if quick else 1500),
    }


def table(results: dict[str, Any]) -> str:
    back, paced = results["rollback"], results["pacing"]
    return "\n".join([
        f"rollback of {back['MB']} MB: {back['RAM_ms']:.0f} ms from RAM, {back['checkpoint_ms']:.0f} ms to load and "
        f"verify a checkpoint: {back['faster']:.1f} times faster (goal 5); {back['cached_ms']:.0f} ms where the system "
        "still holds its file",
        f"backup: {back['backup_ms']:.0f} ms, plain copy into warm memory {back['copy_ms']:.0f} ms: "
        f"{back['backup/copy']:.2f}x (limit 1.5)",
        "draw + update at B=256 with detector, backups' bookkeeping and events on, against torch's blind draw",
        *(f"  N={row['N']:,}: {row['r8_us']:.0f} us against {row['torch_us']:.0f} us: {row['ratio']:.1f}x (limit 16)"
          for row in results["step"]),
        f"pacing: {paced['backups']} backups of {paced['MB']} MB in {paced['seconds']:.1f} s of "
        f"{paced['step_ms']:.0f} ms steps took {paced['share']:.1%} of the time (limit 3%); "
        f"{paced['buffers']:.0f} buffers an array were ever allocated",
    ])  # fmt: skip


if __name__ == "__main__":
    main(run, table, __doc__)
