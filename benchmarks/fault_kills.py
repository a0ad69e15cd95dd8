"""Kill -9 a training at random moments and resume it: does it end as if nothing had happened?

python -m benchmarks.fault_kills [--kills 200] [--seed 0]

Used by the fault matrix and by tests. The training runs in a child process that is forked, so the caller
must have no threads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fault_training import Model, Result, StepClock
from learnit_r8 import R8Scheduler

SAMPLES, BATCH, EPOCHS, SAVE_EVERY = 256, 16, 10, 2
PER_EPOCH = SAMPLES // BATCH
STEPS = EPOCHS * PER_EPOCH


def train(folder: Path, seed: int, log: int, pipe: int | None = None) -> None:
    """Train from the newest checkpoint, or from the start, to the end; write one line a step."""
    model = Model(seed)
    options: dict[str, Any] = {
        "save_callback": model.save,
        "load_callback": lambda source, from_ram: model.load(source, from_ram),
        "state_callback": model.state,
        "sinks": [],
        "ui": "off",
        "clock": StepClock(),
    }
    if (folder / "checkpoints" / "latest").exists():
        scheduler = R8Scheduler.resume_from_checkpoint(folder / "checkpoints", **options)
    else:
        scheduler = R8Scheduler(
            SAMPLES,
            BATCH,
            num_epochs=EPOCHS,
            initial_lr=0.01,
            seed=seed,
            strategy=("quadrant", "uniform")[seed % 2],
            checkpoint_dir=folder / "checkpoints",
            checkpoint_every=SAVE_EVERY,
            **options,
        )
    with scheduler:
        for _ in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                losses = model.step(batch.indices, batch.lr)
                scheduler.update_with_loss(losses.mean() if seed % 4 > 1 else losses)
                line = {"step": batch.step, "lr": batch.lr.hex(), "ids": batch.indices.tolist()}
                os.write(log, (json.dumps(line) + "\n").encode())
                if pipe is not None:
                    os.write(pipe, b".")
    end = {"catalog": scheduler.state_dict()["catalog"], "model": model.arrays}
    np.savez(folder / "end.npz", digest=np.frombuffer(_digest(end), np.uint8))


def _digest(value: Any) -> bytes:
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, dict):
            for name, child in part.items():
                digest.update(name.encode())
                add(child)
        else:
            digest.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())

    add(value)
    return digest.digest()


def _child(folder: Path, seed: int, pipe: tuple[int, int]) -> int:
    pid = os.fork()
    if pid:
        os.close(pipe[1])
        return pid
    status = 1
    try:
        os.close(pipe[0])
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        train(folder, seed, log, pipe[1])
        status = 0
    finally:
        os._exit(status)


def _run(folder: Path, seed: int, wait_for: int | None, delay: float) -> tuple[int, int]:
    """Run a child; kill it `delay` seconds after so many steps. Return (wait status, steps it took)."""
    pipe = os.pipe()
    pid = _child(folder, seed, pipe)
    steps = 0
    while wait_for is None or steps < wait_for:
        got = os.read(pipe[0], 1 if wait_for is not None else 4096)
        if not got:
            break
        steps += len(got)
    else:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    while got := os.read(pipe[0], 4096):
        steps += len(got)
    os.close(pipe[0])
    return os.waitpid(pid, 0)[1], steps


def _read(folder: Path) -> tuple[dict[int, Any], list[int], bytes]:
    """Return what was trained at each step (as it counted in the end), all steps in order, and the end."""
    lines = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    digest = np.load(folder / "end.npz")["digest"].tobytes()
    return {line["step"]: (line["lr"], line["ids"]) for line in lines}, [line["step"] for line in lines], digest


def killed_runs(kills: int, seed: int) -> Iterator[Result]:
    """Kill runs `kills` times in all, 1 to 5 times an epoch; yield one result per kill."""
    rng = np.random.default_rng(seed)
    number = 0
    while kills > 0:
        root = Path(tempfile.mkdtemp(prefix="r8-kills-"))
        whole, cut = root / "whole", root / "cut"
        whole.mkdir()
        cut.mkdir()
        status, _ = _run(whole, number, None, 0.0)
        expected, _, end = _read(whole)
        struck = 0
        while kills > struck:
            # 1 to 5 kills an epoch; a kill may cost SAVE_EVERY steps, so more than that must pass.
            wait = int(rng.integers(SAVE_EVERY + 1, PER_EPOCH + 1))
            killed, _ = _run(cut, number, wait, float(rng.uniform(0, 0.004)))
            if not os.WIFSIGNALED(killed):
                break
            struck += 1
        else:
            _run(cut, number, None, 0.0)
        trained, order, end_after = _read(cut)
        lost = len(order) - STEPS
        again = [step for k, step in enumerate(order) if k and step != order[k - 1] + 1]
        problems = [] if status == 0 and sorted(expected) == list(range(STEPS)) else ["the whole run is not whole"]
        if trained != expected:
            problems.append("other ids or learning rates")
        if end != end_after:
            problems.append("another catalog or other weights")
        shutil.rmtree(root)
        for k in range(max(struck, 1)):
            share = lost // max(struck, 1)
            yield Result(
                f"run {number}, kill {k} of {struck} at {again[k : k + 1]}", not problems, "; ".join(problems), share, 0
            )
        kills -= max(struck, 1)
        number += 1


def main() -> int:
    """Kill and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    results = list(killed_runs(options.kills, options.seed))
    bad = [result for result in results if not result.survived]
    print(
        f"{len(results)} kills, {len(results) - len(bad)} resumed to the bit, {sum(r.steps_lost for r in results)} steps lost"
    )
    for result in bad[:5]:
        print(f"  {result.name}: {result.detail}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
