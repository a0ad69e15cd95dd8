"""A small training through R8Scheduler that is damaged on purpose; used by the fault matrix and by tests.

Least squares by SGD with momentum, updated in place. Time is counted in steps, so a run is a function of
its seed alone.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from learnit_r8 import R8Scheduler, TrainingDiverged
from learnit_r8.checkpoint import CheckpointStore
from learnit_r8.events import LossReported, RolledBack

SAMPLES, BATCH, EPOCHS, FEATURES, BACKUP_EVERY = 256, 16, 12, 12, 20
STEPS = SAMPLES // BATCH * EPOCHS
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True, slots=True)
class Result:
    """What one fault did.

    Attributes:
        name: The fault, and where it struck.
        survived: It had no lasting effect.
        detail: Why not.
        steps_lost: Steps that were undone, or done in vain.
        bytes_lost: Of checkpoints whose save had returned; None where nothing was saved.
        false_rollbacks: Rollbacks that no fault called for.
    """

    name: str
    survived: bool
    detail: str = ""
    steps_lost: int = 0
    bytes_lost: int | None = None
    false_rollbacks: int = 0


class StepClock:
    """A clock that goes on by one second a step."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return 1.7e9 + self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Model:
    """Least squares. All that training changes is in `arrays`.

    `ghost` is added to the loss and grows by itself (value, factor, step); `fuse` delays a damage: both
    are part of the state, so a backup that is taken meanwhile carries them.
    """

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.x = rng.standard_normal((SAMPLES, FEATURES))
        self.y = self.x @ rng.standard_normal(FEATURES) + 0.3 * rng.standard_normal(SAMPLES)
        names = {"w": FEATURES, "v": FEATURES, "ghost": 3, "fuse": 2}
        self.arrays = {name: np.zeros(size) for name, size in names.items()}

    def step(self, indices: np.ndarray, lr: float) -> np.ndarray:
        w, v, ghost, fuse = self.arrays.values()
        if fuse[1]:
            fuse[0] -= 1
            if fuse[0] < 0:
                DAMAGES[int(fuse[1]) - 1][1](self.arrays)
                fuse[:] = 0
        with np.errstate(all="ignore"):
            error = self.x[indices] @ w - self.y[indices]
            v *= 0.9
            v += 2 * error @ self.x[indices] / len(indices)
            w -= lr * v
            ghost[0] = ghost[0] * (1 + ghost[1]) + ghost[2]
            return error**2 + ghost[0]

    @property
    def loss(self) -> float:
        """Mean squared error over all samples."""
        with np.errstate(all="ignore"):
            return float(np.mean((self.x @ self.arrays["w"] - self.y) ** 2))

    def state(self) -> dict[str, np.ndarray]:
        return self.arrays

    def load(self, source: Any, from_ram: bool = True) -> None:
        self.arrays = source if from_ram else dict(np.load(f"{source}.npz"))

    def save(self, _state: Any, path: str) -> None:
        np.savez(f"{path}.npz", **self.arrays)


def _nan_weight(arrays: dict[str, np.ndarray]) -> None:
    arrays["w"][3] = NAN


def _nan_momentum(arrays: dict[str, np.ndarray]) -> None:
    arrays["v"][3] = NAN


def _scaled(arrays: dict[str, np.ndarray]) -> None:
    arrays["w"] *= 40


DAMAGES = (("NaN weight", _nan_weight), ("weights x 40", _scaled), ("NaN momentum", _nan_momentum))


class Ear:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def record(self, event: Any) -> None:
        self.heard.append(event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.heard if isinstance(event, kind)]


class Run:
    """A scheduler, its model and what was heard of it."""

    def __init__(self, seed: int, **options: Any) -> None:
        self.model, self.ear, self.clock = Model(seed), Ear(), StepClock()
        defaults: dict[str, Any] = {
            "num_epochs": EPOCHS,
            "initial_lr": 0.01,
            "scheduler_mode": "constant",
            "seed": seed,
            "state_callback": lambda: self.model.state(),
            "load_callback": self.model.load,
            "backup_every": BACKUP_EVERY,
            "checkpoint_dir": None,
            "ui": "off",
            "sinks": [self.ear],
            "clock": self.clock,
        }
        self.scheduler = R8Scheduler(SAMPLES, BATCH, **defaults | options)

    def go(
        self,
        report: Callable[[int, np.ndarray], Any] = lambda step, losses: losses,
        before: Callable[[int], None] = lambda step: None,
    ) -> Run:
        """Train to the end: `before` may damage the model, `report` the losses."""
        with self.scheduler as scheduler:
            for _ in scheduler.epoch_iterator():
                for batch in scheduler.batch_iterator():
                    self.clock.now += 1
                    before(batch.step)
                    losses = report(batch.step, self.model.step(batch.indices, batch.lr))
                    if losses is None:
                        try:
                            scheduler.update_with_loss(None)
                        except TypeError:
                            losses = np.full(len(batch.indices), self.model.loss)
                    scheduler.update_with_loss(losses)
        return self

    @property
    def rollbacks(self) -> list[tuple[int, int]]:
        """(step of the fault, step gone back to)."""
        return [(event.step, event.to_step) for event in self.ear.of(RolledBack)]


@lru_cache(maxsize=64)
def clean(seed: int) -> tuple[float, int]:
    """Return final loss and number of rollbacks of a run without a fault."""
    run = Run(seed).go()
    return run.model.loss, len(run.rollbacks)


STEPS_TO_HIT = (0, 1, 15, 2 * BACKUP_EVERY - 1, 2 * BACKUP_EVERY, 2 * BACKUP_EVERY + 1, STEPS - 1)
_ONCE = {"NaN": NAN, "+Inf": INF, "-Inf": -INF}
LOSS_FAULTS = (*_ONCE, "None", "10x once", "step")
SLOW_FAULTS = ("exponential", "drift")
"""They may be in every backup before they show."""
_LATE = 40  # steps that a slow fault needs to show


def loss_fault(kind: str, at: int, seed: int, *, scalar: bool) -> Result:
    """Report a wrong loss, or let the loss rise."""
    run = Run(seed)
    level = np.mean(run.model.y**2) if at < 16 else 0.1

    def report(step: int, losses: np.ndarray) -> Any:
        if step == at and kind in _ONCE:
            losses[seed % len(losses)] = _ONCE[kind]
        if step == at and kind == "None":
            return None
        if step == at and kind == "10x once":
            losses *= 10
        if step >= at and kind == "step":
            losses += 8 * level
        return losses.mean() if scalar else losses

    def before(step: int) -> None:
        if step == at and kind == "exponential":
            run.model.arrays["ghost"][:2] = 0.05 * level, 0.3
        if step == at and kind == "drift":
            run.model.arrays["ghost"][2] = 0.3 * level

    try:
        run.go(report, before)
    except TrainingDiverged as error:
        return Result(f"{kind} at {at}, seed {seed}", False, str(error))
    # A report that is not finite while the model is sound is left out; what only drifts is told.
    needed = kind == "exponential" and at < STEPS - _LATE
    problems = _problems(run, seed)
    if needed and not run.rollbacks:
        problems.append("no rollback")
    if needed and run.model.arrays["ghost"].any():
        problems.append("the model is still damaged")
    false = clean(seed)[1] + (len(run.rollbacks) if kind in {"None", "10x once", *_ONCE} else 0)
    lost = sum(step - to for step, to in run.rollbacks)
    return Result(f"{kind} at {at}, seed {seed}", not problems, "; ".join(problems), lost, None, false)


def state_fault(kind: int, at: int, lag: int, seed: int) -> Result:
    """Damage the model's state; it shows `lag` steps later."""
    run = Run(seed)
    at = min(at, STEPS - 8 - lag)

    def before(step: int) -> None:
        if step == at:
            run.model.arrays["fuse"][:] = lag, kind + 1

    name = f"{DAMAGES[kind][0]} at {at}, shows {lag} steps later, seed {seed}"
    try:
        run.go(before=before)
    except TrainingDiverged as error:
        return Result(name, False, str(error))
    problems = _problems(run, seed)
    if not run.rollbacks and DAMAGES[kind][0].startswith("NaN"):
        problems.append("no rollback")
    early = sum(step < at for step, _ in run.rollbacks)
    return Result(
        name,
        not problems,
        "; ".join(problems),
        sum(step - to for step, to in run.rollbacks),
        None,
        early + clean(seed)[1],
    )


def _problems(run: Run, seed: int) -> list[str]:
    problems = []
    if not run.model.loss < 1.1 * clean(seed)[0] + 0.01:
        problems.append(f"final loss {run.model.loss:.4g}, without a fault {clean(seed)[0]:.4g}")
    catalog = run.scheduler.catalog
    if not np.isfinite(catalog.expected_loss).all() or not np.isfinite(catalog.variance).all():
        problems.append("the catalog is not finite")
    if run.scheduler.global_step != STEPS or len(run.ear.of(LossReported)) != STEPS:
        problems.append("steps are missing")
    return problems


def rate_fault(factor: float, length: int, at: int, seed: int) -> Result:
    """Multiply the learning rate behind the scheduler's back: no backup is at fault, and none may be burned."""
    name = f"learning rate x {factor:g} for {length} steps at {at}, seed {seed}"
    run, plain = Run(seed, num_epochs=4 * EPOCHS), clean(seed)
    train, taken = run.model.step, itertools.count()
    run.model.step = lambda indices, lr: train(indices, lr * (factor if at <= next(taken) < at + length else 1.0))
    try:
        run.go()
    except TrainingDiverged as error:
        return Result(name, False, str(error))
    problems = [] if run.model.loss < 1.1 * plain[0] + 0.01 else [f"final loss {run.model.loss:.4g}"]
    lost = sum(step - to for step, to in run.rollbacks)
    return Result(name, not problems, "; ".join(problems), lost, None, sum(step < at for step, _ in run.rollbacks))


def rate_faults(count: int, seed: int) -> Iterator[Result]:
    """Yield `count` results over factors, lengths and random steps with two backups before them.

    Where there is only the initial state, three rollbacks are all that is tried.
    """
    rng, kinds = np.random.default_rng(seed), list(itertools.product((30.0, 1e3, 1e6), (1, 5, 20)))
    for k in range(count):
        yield rate_fault(*kinds[k % len(kinds)], at=int(rng.integers(2 * BACKUP_EVERY, STEPS)), seed=k % 20)


def aliasing(seed: int) -> Result:
    """Change what was backed up and what was restored, in place; a rollback must not see it."""
    run = Run(seed, state_callback=None)
    kept: dict[str, np.ndarray] = {}
    wrong: list[int] = []
    at = 40 + seed

    def load(source: dict[str, np.ndarray]) -> None:
        wrong.extend(at for name in kept if not np.array_equal(source[name], kept[name]))
        run.model.arrays = source  # from now on changed in place by every step

    run = Run(seed, state_callback=None, load_callback=load)

    def before(step: int) -> None:
        if step == at - 20:
            kept.update({name: array.copy() for name, array in run.model.arrays.items()})
            run.scheduler.update_cpu_backup(run.model.arrays)
        if step in (at, at + 20):
            for array in run.model.arrays.values():
                array[:] = NAN  # what was backed up, and later what was restored

    run.go(before=before)
    ok = not wrong and len(run.rollbacks) == 2 and [to for _, to in run.rollbacks] == [at - 20] * 2
    lost = sum(step - to for step, to in run.rollbacks)
    return Result(f"aliasing, seed {seed}", ok, "" if ok else f"{wrong=} {run.rollbacks=}", lost)


CALLBACK_FAULTS = tuple(
    itertools.product(("load", "save"), ("raise once", "raise always", "False", "partial", "KeyboardInterrupt"))
)


def callback_fault(which: str, kind: str, seed: int) -> Result:
    """Let `load_callback` fail in a rollback, or `save_callback` in a checkpoint."""
    name = f"{which}_callback: {kind}, seed {seed}"
    with tempfile.TemporaryDirectory(prefix="r8-callback-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return _load_fault(name, kind, seed, folder) if which == "load" else _save_fault(name, kind, seed, folder)


def _fails(kind: str, calls: int) -> bool:
    return kind == "raise always" or calls == 1


def _load_fault(name: str, kind: str, seed: int, folder: str) -> Result:
    calls = 0

    def load(source: Any, from_ram: bool) -> bool | None:
        nonlocal calls
        calls += 1
        if _fails(kind, calls):
            if kind == "partial":
                run.model.arrays["w"] = source["w"]
            if kind == "KeyboardInterrupt":
                raise KeyboardInterrupt
            if kind == "False":
                return False
            raise OSError("out of reach")
        run.model.load(source, from_ram)
        return None

    run = Run(seed, load_callback=load, log_dir=folder)
    scheduler, at = run.scheduler, 50 + seed
    interrupted = 0
    try:
        while scheduler.current_epoch < EPOCHS - 1 or scheduler.global_step < STEPS:
            try:
                for _ in scheduler.epoch_iterator():
                    for batch in scheduler.batch_iterator():
                        run.clock.now += 1
                        if batch.step == at:
                            run.model.arrays["w"][0] = NAN
                        scheduler.update_with_loss(run.model.step(batch.indices, batch.lr))
            except KeyboardInterrupt:
                interrupted += 1
    except TrainingDiverged as error:
        bundle = error.crash_bundle
        told = bundle is not None and json.loads((bundle / "crash.json").read_text())["step"] == at
        ok = kind == "raise always" and told and isinstance(error.__cause__, OSError)
        return Result(name, ok, str(error))
    finally:
        scheduler.close()
    problems = _problems(run, seed)
    expected = 1 if kind == "KeyboardInterrupt" else 0
    if kind == "raise always" or interrupted != expected or not run.rollbacks:
        problems.append(f"{interrupted=} {run.rollbacks=}")
    return Result(name, not problems, "; ".join(problems), sum(step - to for step, to in run.rollbacks))


def _save_fault(name: str, kind: str, seed: int, folder: str) -> Result:
    calls = 0

    def save(state: Any, path: str) -> bool | None:
        nonlocal calls
        calls += 1
        if calls > 1 and _fails(kind, calls - 1):
            if kind == "partial":
                Path(f"{path}.npz").write_bytes(b"PK")
            if kind == "KeyboardInterrupt":
                raise KeyboardInterrupt
            if kind == "False":
                return False
            raise OSError("disk full")
        run.model.save(state, path)
        return None

    run = Run(seed, save_callback=save, checkpoint_dir=folder)
    scheduler = run.scheduler
    scheduler.save_checkpoint()
    size = sum(path.stat().st_size for path in Path(folder).rglob("step-*/*"))
    before = scheduler.state_dict()["global_step"]
    raised = False
    try:
        scheduler.save_checkpoint()
    except BaseException as error:
        raised = isinstance(error, KeyboardInterrupt) == (kind == "KeyboardInterrupt")
    found = CheckpointStore(folder).newest()
    kept = found is not None and found.step == before and (found.path / "model.npz").is_file()
    run.go()
    problems = _problems(run, seed)
    if not raised or not kept:
        problems.append(f"{raised=} {kept=}")
    return Result(name, not problems, "; ".join(problems), 0, 0 if kept else size)


def loss_faults(count: int, seed: int, kinds: tuple[str, ...] = LOSS_FAULTS) -> Iterator[Result]:
    """Yield `count` results: every fault at every step of interest, then at random ones."""
    rng = np.random.default_rng(seed)
    cases = list(itertools.product(kinds, STEPS_TO_HIT))
    cases += [(kinds[k % len(kinds)], int(rng.integers(STEPS))) for k in range(max(0, count - len(cases)))]
    for k in _spread(len(cases), count):
        yield loss_fault(*cases[k], seed=k % 20, scalar=k % 2 == 1)


def slow_loss_faults(count: int, seed: int) -> Iterator[Result]:
    """Yield `count` results of faults that grow unseen."""
    return loss_faults(count, seed, SLOW_FAULTS)


def state_faults(count: int, seed: int) -> Iterator[Result]:
    """Yield `count` results: every damage with every lag, at the steps of interest and at random ones."""
    rng = np.random.default_rng(seed)
    steps = [*STEPS_TO_HIT, *(int(step) for step in rng.integers(0, STEPS, 5))]
    cases = list(itertools.product(range(len(DAMAGES)), range(9), steps))
    for k in _spread(len(cases), count):
        damage, lag, at = cases[k]
        yield state_fault(damage, at, lag, seed=k % 20)


def callback_faults(count: int) -> Iterator[Result]:
    """Yield `count` results over all ways in which a callback fails."""
    for k in range(count):
        yield callback_fault(*CALLBACK_FAULTS[k % len(CALLBACK_FAULTS)], seed=k // len(CALLBACK_FAULTS))


def _spread(available: int, count: int) -> list[int]:
    """Return `count` of the numbers below `available`, evenly spread; all of them if there are fewer."""
    return [k * available // count for k in range(count)] if count < available else list(range(available))
