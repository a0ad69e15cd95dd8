"""A file system that fails on purpose, and drivers that make it fail everywhere.

    python -m benchmarks.fault_fs [--seed 0] [--sizes 20] [--corruptions 1000]

Used by the tests of checkpoints and by the fault matrix. Every driver is a pure function of its seed.
"""

from __future__ import annotations

import argparse
import errno
import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from learnit_r8.checkpoint import CheckpointStore, FileSystem
from learnit_r8.errors import CheckpointError

KEEP = 2
OLD_STEPS = (10, 20)
NEW_STEP = 30

Fault = Callable[[str, int], str | None]
"""(operation, number of this call) -> None, "kill", "kill-midway", "short", "lost", or the name of an errno."""


class FaultFileSystem(FileSystem):
    """Numbers the operations that change something, and lets one of them fail.

    Args:
        fault: Asked before each of them.
        read_fault: Asked before each read; reads are numbered apart, because several threads read.

    Attributes:
        points: The operations so far, such as "write arrays.bin".
        reads: How many reads there were.
    """

    def __init__(self, fault: Fault | None = None, read_fault: Fault | None = None) -> None:
        self.points: list[str] = []
        self.reads = 0
        self._fault = fault or (lambda operation, number: None)
        self._read_fault = read_fault or (lambda operation, number: None)

    def make_directory(self, path: Path) -> None:
        """Count, then maybe do it."""
        self._point("mkdir", path)
        super().make_directory(path)

    def create(self, path: Path) -> FileIO:
        """Count, then maybe do it."""
        self._point("create", path)
        return super().create(path)

    def write(self, file: FileIO, data: memoryview) -> int:
        """Count, then maybe do it, or half of it."""
        verdict = self._point("write", Path(str(file.name)))
        half = data[: len(data) // 2]
        if verdict == "kill-midway":
            super().write(file, half)
            os.kill(os.getpid(), signal.SIGKILL)
        if verdict == "short" and half:
            return super().write(file, half)
        if verdict == "lost":
            super().write(file, half)
            return len(data)
        return super().write(file, data)

    def sync(self, file: FileIO) -> None:
        """Count, then maybe do it."""
        self._point("fsync", Path(str(file.name)))
        super().sync(file)

    def sync_directory(self, path: Path) -> None:
        """Count, then maybe do it."""
        self._point("fsync directory", path)
        super().sync_directory(path)

    def read(self, file: FileIO, buffer: memoryview) -> int:
        """Count, then maybe do it."""
        self.reads += 1
        _carry_out(self._read_fault("read", self.reads))
        return super().read(file, buffer)

    def rename(self, source: Path, target: Path) -> None:
        """Count, then maybe do it."""
        self._point("rename", target)
        super().rename(source, target)

    def remove(self, path: Path) -> None:
        """Count, then maybe do it."""
        self._point("remove", path)
        super().remove(path)

    def remove_directory(self, path: Path) -> None:
        """Count, then maybe do it."""
        self._point("rmdir", path)
        super().remove_directory(path)

    def _point(self, operation: str, path: Path) -> str | None:
        self.points.append(f"{operation} {'temporary' if path.name.startswith('.tmp-') else path.name}")
        verdict = self._fault(operation, len(self.points))
        _carry_out(verdict)
        return verdict


def _carry_out(verdict: str | None) -> None:
    if verdict == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    number = getattr(errno, verdict, None) if verdict else None
    if number is not None:
        raise OSError(number, os.strerror(number))


def at(number: int, verdict: str, *, onwards: bool = False) -> Fault:
    """Return the fault that strikes at one call, or from it onwards."""

    def fault(_operation: str, now: int) -> str | None:
        return verdict if now == number or (onwards and now > number) else None

    return fault


def example_state(step: int, size: int = 100) -> dict[str, Any]:
    """Return a state with one of everything, a function of its arguments."""
    rng = np.random.default_rng([step, size])
    return {
        "step": step,
        "loss": float("nan"),
        "history": [float(x) for x in rng.random(5)] + [float("inf")],
        "catalog": {"estimate": rng.random(size, np.float32), "uses": rng.integers(0, 9, (size, 2), np.uint32)},
        "empty": np.zeros((0, 3)),
        "flag": np.array(True),
    }


def model_writer(step: int, size: int = 100) -> Callable[[Path], None]:
    """Return a callback that writes a model of one file and a folder of two."""
    values = np.random.default_rng([step, size, 1]).bytes(size * 8)

    def write(path: Path) -> None:
        (path / "optimizer").mkdir(parents=True)
        (path / "weights.bin").write_bytes(values)
        (path / "optimizer" / "momentum.bin").write_bytes(values[::-1])

    return write


def same(left: Any, right: Any) -> bool:
    """Tell whether two states are equal to the bit, types included (any NaN equals any NaN outside of arrays)."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, (np.ndarray, np.generic)):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    if isinstance(left, float):
        return left.hex() == right.hex()
    return bool(left == right)


def prepare(directory: Path, size: int = 100) -> None:
    """Fill a directory with the checkpoints of `OLD_STEPS`."""
    store = CheckpointStore(directory, keep=KEEP)
    for step in OLD_STEPS:
        store.save(step, example_state(step, size), model_writer(step, size))


def save_new(directory: Path, fs: FileSystem, size: int = 100) -> None:
    """Save `NEW_STEP`, which prunes the oldest."""
    CheckpointStore(directory, keep=KEEP, fs=fs).save(
        NEW_STEP, example_state(NEW_STEP, size), model_writer(NEW_STEP, size)
    )


def count_points(directory: Path, size: int = 100) -> FaultFileSystem:
    """Run the scenario without a fault in a fresh directory and return its operations."""
    prepare(directory, size)
    fs = FaultFileSystem()
    save_new(directory, fs, size)
    return fs


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one fault did.

    Attributes:
        fault: What struck, and where.
        survived: The newest whole checkpoint is one that was committed, equal to the bit, at least as new
            as the last one whose save returned; and the next save works and leaves no litter.
        detail: Why not.
        steps_lost: Steps between the save that was struck and the checkpoint found.
    """

    fault: str
    survived: bool
    detail: str = ""
    steps_lost: int = 0


def judge(directory: Path, fault: str, *, committed: bool, size: int = 100) -> Outcome:
    """Look at what a fault left behind."""
    bad: list[str] = []
    store = CheckpointStore(directory, keep=KEEP, on_corrupt=lambda path, reason: bad.append(reason))
    found = store.newest()
    if found is None or bad:
        return Outcome(fault, False, f"found {found}, damaged {bad}")
    if found.step not in {OLD_STEPS[-1], NEW_STEP} or (committed and found.step != NEW_STEP):
        return Outcome(fault, False, f"newest is step {found.step}")
    weights = found.model_path / "weights.bin"
    model = np.random.default_rng([found.step, size, 1]).bytes(size * 8)
    if not same(found.state, example_state(found.step, size)) or weights.read_bytes() != model:
        return Outcome(fault, False, f"step {found.step} is not what was saved")
    if len([e for e in store.entries() if e.manifest]) < KEEP:
        return Outcome(fault, False, "too few checkpoints are left")
    store.save(NEW_STEP + 10, example_state(NEW_STEP + 10, size))
    names = sorted(os.listdir(directory))
    if len(names) != KEEP + 2 or (directory / "latest").read_text() != f"step-{NEW_STEP + 10:09d}\n":
        return Outcome(fault, False, f"after the next save there are {names}")
    return Outcome(fault, True, steps_lost=NEW_STEP - found.step)


def kill_everywhere(root: Path, size: int = 100) -> Iterator[Outcome]:
    """SIGKILL a child before each operation of a save, and halfway through each write.

    The caller must have no threads: children are forked.
    """
    points = count_points(root / "count", size).points
    prepare(root / "base", size)
    faults = [(n, "kill") for n in range(1, len(points) + 1)]
    faults += [(n, "kill-midway") for n, point in enumerate(points, 1) if point.startswith("write")]
    for number, verdict in faults:
        directory = root / "run"
        shutil.copytree(root / "base", directory)
        child = os.fork()
        if child == 0:
            try:
                save_new(directory, FaultFileSystem(at(number, verdict)), size)
            finally:
                os._exit(1)  # the fault did not strike
        _, status = os.waitpid(child, 0)
        name = f"{verdict} at {number}: {points[number - 1]}"
        if not os.WIFSIGNALED(status):
            yield Outcome(name, False, "the child was not killed")
        else:
            yield judge(directory, name, committed=False, size=size)
        shutil.rmtree(directory)


def fail_everywhere(root: Path, verdict: str, *, onwards: bool = False, size: int = 100) -> Iterator[Outcome]:
    """Let each operation of a save fail, alone or together with all later ones."""
    points = count_points(root / "count", size).points
    prepare(root / "base", size)
    for number, point in enumerate(points, 1):
        if verdict in {"short", "lost"} and not point.startswith("write"):
            continue
        yield _fail_once(
            root, f"{verdict} at {number}: {point}", FaultFileSystem(at(number, verdict, onwards=onwards)), size
        )


def fail_reads(root: Path, verdict: str, size: int = 100) -> Iterator[Outcome]:
    """Let each read during a save fail."""
    reads = count_points(root / "count", size).reads
    prepare(root / "base", size)
    for number in range(1, reads + 1):
        yield _fail_once(root, f"{verdict} at read {number}", FaultFileSystem(read_fault=at(number, verdict)), size)


def _fail_once(root: Path, name: str, fs: FaultFileSystem, size: int) -> Outcome:
    directory = root / "run"
    shutil.copytree(root / "base", directory)
    try:
        save_new(directory, fs, size)
        committed = True
    except CheckpointError:
        committed = False
    try:
        return judge(directory, name, committed=committed, size=size)
    finally:
        if sys.platform == "win32":
            gc.collect()  # an open lock cannot be removed there; the failed save's is in its error's cycle
        shutil.rmtree(directory)


Damage = tuple[str, Callable[[Path], object]]


def damages(checkpoint: Path, seed: int, count: int) -> Iterator[Damage]:
    """Yield ways to damage a checkpoint: each file empty, deleted, cut, longer, swapped, and flipped bits."""
    rng = np.random.default_rng(seed)
    files = sorted(p.relative_to(checkpoint) for p in checkpoint.rglob("*") if p.is_file())
    fixed: list[Damage] = []
    for name in files:
        size = (checkpoint / name).stat().st_size
        fixed.append((f"{name} deleted", lambda root, name=name: (root / name).unlink()))
        fixed.append((f"{name} with a byte more", lambda root, name=name: _append(root / name)))
        fixed.append((f"{name} zeroed", lambda root, name=name, size=size: (root / name).write_bytes(bytes(size))))
        cuts = {0, 1, size // 2, size - 1} | set(range(64, size, max(64, size // 8)))
        fixed += [
            (f"{name} cut to {cut} of {size} bytes", lambda root, name=name, cut=cut: os.truncate(root / name, cut))
            for cut in sorted(cuts - {size})
        ]
        fixed += [
            (f"{name} and {other} swapped", lambda root, a=name, b=other: _swap(root / a, root / b))
            for other in files
            if other < name and (checkpoint / name).read_bytes() != (checkpoint / other).read_bytes()
        ]
    yield from fixed[:count]
    for _ in range(count - len(fixed)):
        name = files[rng.integers(len(files))]
        bit = int(rng.integers(8 * (checkpoint / name).stat().st_size))
        yield f"bit {bit} of {name} flipped", lambda root, name=name, bit=bit: _flip(root / name, bit)


def corrupt_everywhere(root: Path, seed: int, count: int) -> Iterator[Outcome]:
    """Damage the newest checkpoint in `count` ways: it must be noticed, set aside, and the one before it used."""
    prepare(root / "base")
    newest = f"step-{OLD_STEPS[-1]:09d}"
    for name, damage in damages(root / "base" / newest, seed, count):
        directory = root / "run"
        shutil.copytree(root / "base", directory)
        damage(directory / newest)
        reasons: list[str] = []
        found = CheckpointStore(directory, on_corrupt=lambda path, reason, to=reasons: to.append(reason)).newest()
        fallen_back = (
            found is not None and found.step == OLD_STEPS[0] and same(found.state, example_state(OLD_STEPS[0]))
        )
        aside = (directory / f"{newest}.corrupt").is_dir()
        ok = fallen_back and len(reasons) == 1 and aside
        yield Outcome(name, ok, "" if ok else f"found {found}, reported {reasons}", OLD_STEPS[1] - OLD_STEPS[0])
        shutil.rmtree(directory)


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\n")


def _swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def _flip(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


def main() -> int:
    """Run every driver and print one row for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", type=int, default=20, help="random model sizes for the kills")
    parser.add_argument("--corruptions", type=int, default=1000)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    sizes = [100, *(int(10**x) for x in rng.uniform(0, 5, args.sizes - 1))]
    rows: dict[str, Callable[[Path], Iterator[Outcome]]] = {
        "SIGKILL": lambda root: (o for i, n in enumerate(sizes) for o in kill_everywhere(root / str(i), n)),
        **{kind: lambda root, kind=kind: fail_everywhere(root, kind) for kind in ("ENOSPC", "EIO", "short", "lost")},
        "ENOSPC from then on": lambda root: fail_everywhere(root, "ENOSPC", onwards=True),
        "read-only from then on": lambda root: fail_everywhere(root, "EROFS", onwards=True),
        "EIO on read": lambda root: fail_reads(root, "EIO"),
        "corruption": lambda root: corrupt_everywhere(root, args.seed, args.corruptions),
    }
    failed = 0
    print(f"{'fault':24} {'injected':>9} {'survived':>9} {'most steps lost':>16}")
    for name, driver in rows.items():
        root = Path(tempfile.mkdtemp(prefix="r8-faults-"))
        outcomes = list(driver(root))
        shutil.rmtree(root)
        bad = [outcome for outcome in outcomes if not outcome.survived]
        failed += len(bad)
        print(f"{name:24} {len(outcomes):9} {len(outcomes) - len(bad):9} {max(o.steps_lost for o in outcomes):16}")
        for outcome in bad[:5]:
            print(f"  {outcome.fault}: {outcome.detail}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
