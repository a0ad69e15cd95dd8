"""The fault matrix: what was injected, and what came of it.

python -m benchmarks.faults [--quick] [--seed 0] [--only loss,state,...]

A training's faults are judged against the same run without them: the weights must end as good (within 10%),
the catalog finite, every step accounted for. A disk's are judged by what can be read back afterwards.
"Bytes lost" counts checkpoints whose save had returned. "False" counts rollbacks that no fault called for,
the clean runs' included. The last class, false alarms on a million clean steps, is `python -m benchmarks.stability`
(loss curves) and `python -m benchmarks.clean_runs` (whole trainings); `--quick` runs a tenth of everything.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import clean_runs, fault_fs, fault_kills, fault_training
from benchmarks.fault_training import Result
from benchmarks.harness import columns, main, progress
from learnit_r8 import ConfigError, ProtocolError, R8Scheduler
from learnit_r8.checkpoint.state_codec import decode, encode
from learnit_r8.errors import CheckpointCorrupt

SIZE_OF_MODEL = 100 * 8 * 2  # bytes of fault_fs.model_writer's default model


def _disk(drive: Callable[[Path], Iterator[fault_fs.Outcome]]) -> Iterator[Result]:
    """Turn a driver's outcomes into results."""
    root = Path(tempfile.mkdtemp(prefix="r8-faults-"))
    try:
        for outcome in drive(root):
            lost = 0 if outcome.survived else SIZE_OF_MODEL
            yield Result(outcome.fault, outcome.survived, outcome.detail, outcome.steps_lost, lost)
    finally:
        shutil.rmtree(root)


def kill_points(count: int, seed: int) -> Iterator[Result]:
    """SIGKILL at every point of a save, for `count` sizes of the model."""
    rng = np.random.default_rng(seed)
    sizes = [100, *(int(10**x) for x in rng.uniform(0, 5, count - 1))]
    for size in sizes:
        yield from _disk(lambda root, size=size: fault_fs.kill_everywhere(root, size))


def io_faults(_count: int, _seed: int) -> Iterator[Result]:
    """Let one operation of a save fail, or all from one on."""
    kinds: list[tuple[str, bool]] = [("ENOSPC", False), ("EIO", False), ("short", False), ("lost", False)]
    kinds += [("ENOSPC", True), ("EROFS", True)]
    for kind, onwards in kinds:
        yield from _disk(lambda root, k=kind, on=onwards: fault_fs.fail_everywhere(root, k, onwards=on))
    yield from _disk(lambda root: fault_fs.fail_reads(root, "EIO"))


def corruption(count: int, seed: int) -> Iterator[Result]:
    """Damage the newest checkpoint: it must be noticed and the one before it used."""
    return _disk(lambda root: fault_fs.corrupt_everywhere(root, seed, count))


_JUNK: tuple[Any, ...] = (None, "many", b"x", -1, 0, 1.5, float("nan"), float("inf"), True, [1], {"a": 1}, object())
_GOOD: dict[str, tuple[type, ...]] = {  # types of junk that an argument may take
    "num_samples": (), "batch_size": (), "num_epochs": (), "initial_lr": (float,), "scheduler_mode": (),
    "warmup_proportion": (int, float), "min_lr": (int, float), "strategy": (), "save_callback": (type(None),),
    "load_callback": (type(None),), "state_callback": (type(None),), "backup_every": (type(None),),
    "checkpoint_every": (type(None),), "keep_checkpoints": (), "ui": (type(None),), "noise_guard": (),
    "groups": (type(None),), "seed": (int,), "lookahead": (), "world_size": (), "rank": (int,),
}  # fmt: skip


def bad_input(count: int, seed: int) -> Iterator[Result]:
    """Give every argument what it cannot be, then report random things as losses: all refused, nothing changed."""
    for name, good in _GOOD.items():
        for junk in _JUNK:
            if type(junk) in good:
                continue
            arguments: dict[str, Any] = {"num_samples": 20, "batch_size": 4, "num_epochs": 1, "checkpoint_dir": None}
            try:
                R8Scheduler(**arguments | {"ui": "off", name: junk})
                yield Result(f"{name}={junk!r}", False, "was taken")
            except (ConfigError, TypeError) as error:
                yield Result(f"{name}={junk!r}", name in str(error) or "exactly one" in str(error), str(error))
    rng = np.random.default_rng(seed)
    scheduler = R8Scheduler(20, 4, num_epochs=1, ui="off", checkpoint_dir=None)
    batches = scheduler.batch_iterator()
    next(batches)
    for _ in range(count):
        yield _fuzz_loss(scheduler, rng)
        yield _fuzz_state(rng)


def _fuzz_loss(scheduler: R8Scheduler, rng: np.random.Generator) -> Result:
    shape = tuple(rng.integers(0, 4, rng.integers(1, 4)).tolist())
    kind = rng.choice(["f8", "c16", "U3", "O", "?", "M8[s]", "V4", "i4"])
    loss = np.zeros(shape, kind)
    try:
        scheduler.update_with_loss(loss)
    except (TypeError, ProtocolError, ValueError):
        unchanged = scheduler.global_step == 0 and scheduler.catalog.num_seen == 0
        return Result(f"loss {kind}{shape}", unchanged, "something changed")
    return Result(f"loss {kind}{shape}", False, "was taken")


def _fuzz_state(rng: np.random.Generator) -> Result:
    text, segments = encode(fault_fs.example_state(int(rng.integers(100)), 5))
    arrays = np.concatenate([np.asarray(part).view(np.uint8).ravel() for part in segments] or [np.empty(0, np.uint8)])
    raw = bytearray(text)
    for _ in range(int(rng.integers(1, 4))):
        raw[int(rng.integers(len(raw)))] = int(rng.integers(256))
    # Some changes make another valid state; hashes find those. Here nothing else may be raised.
    with contextlib.suppress(CheckpointCorrupt):
        decode(bytes(raw), arrays)
    return Result("fuzzed state", True)


def clean_trainings(count: int, seed: int) -> Iterator[Result]:
    """Run ordinary trainings, 3000 steps or so each; nothing may happen, but what ends untrained may be told."""
    for name, recipe in list(clean_runs.RECIPES.items())[:count]:
        heard = clean_runs.train(recipe, seed)
        spikes = heard.count["SpikeSeen"]
        untrained = np.median(heard.losses[-48:]) > 0.5 * np.median(heard.losses[:16])
        yield Result(name, spikes == 0 or untrained, f"{spikes} interventions", 0, None, heard.count["RolledBack"])


CLASSES: dict[str, tuple[Callable[[int, int], Iterator[Result]], int, int]] = {
    # name: (driver of (count, seed), count in full, count with --quick)
    "loss": (fault_training.loss_faults, 504, 48),
    "slow rise": (fault_training.slow_loss_faults, 126, 14),
    "state": (fault_training.state_faults, 324, 36),
    "rate from outside": (fault_training.rate_faults, 90, 9),
    "aliasing": (lambda count, seed: map(fault_training.aliasing, range(count)), 50, 5),
    "callbacks": (lambda count, seed: fault_training.callback_faults(count), 100, 10),
    "SIGKILL points": (kill_points, 20, 1),
    "I/O errors": (io_faults, 50, 50),
    "corruption": (corruption, 1000, 50),
    "bad input": (bad_input, 500, 50),
    "kill -9 and resume": (fault_kills.killed_runs, 200, 6),
    "clean trainings": (clean_trainings, len(clean_runs.RECIPES), 0),
}

PUBLISHED = {"slow rise"}
"""Classes whose misses are printed and bounded by the test, but fail no run of this benchmark: a slow rise may be in
every backup before it shows."""


def summary(results: list[Result]) -> dict[str, Any]:
    """Return a class's figures."""
    kept = [result.bytes_lost for result in results if result.bytes_lost is not None]
    steps = [result.steps_lost for result in results]
    return {
        "injected": len(results), "survived": sum(result.survived for result in results),
        "steps lost": sum(steps), "worst": max(steps, default=0), "bytes lost": sum(kept) if kept else None,
        "false rollbacks": sum(result.false_rollbacks for result in results),
    }  # fmt: skip


def run(*, quick: bool = False, seed: int = 0, only: str = "") -> dict[str, Any]:
    """Inject; `only`: names of classes, separated by commas."""
    classes, misses, bad = {}, {}, 0
    for name in only.split(",") if only else CLASSES:
        driver, full, few = CLASSES[name]
        count = few if quick else full
        progress(f"{name}: {count}")
        results = list(driver(count, seed)) if count else []
        found = classes[name] = summary(results)
        missed = [f"{result.name}: {result.detail[:160]}" for result in results if not result.survived]
        if missed:
            misses[name] = missed[:12]
        bad += 0 if name in PUBLISHED else len(missed)
        bad += (found["bytes lost"] or 0) + found["false rollbacks"]
    return {"seed": seed, "classes": classes, "misses": misses, "failed": bad}


def table(results: dict[str, Any]) -> str:
    head = ("injected", "survived", "steps lost", "worst", "bytes lost", "false rollbacks")
    rows = [
        [name, *("-" if found[key] is None else f"{found[key]:,}" for key in head)]
        for name, found in results["classes"].items()
    ]
    misses = [f"  {name}, {text}" for name, texts in results["misses"].items() for text in texts]
    return "\n".join([columns(("class", *head), rows), *misses])


if __name__ == "__main__":
    main(run, table, __doc__)
