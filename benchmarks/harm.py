"""Does the safety net ever make a run worse? Faults of all kinds, several a run, against runs without a net.

python -m benchmarks.harm [--quick] [--only mlp] [--part faults|rows|sound|clocks] [--steps 6000] [--first-seed 100]

faults: every kind x 1, 3, 6 times x anywhere or within 40 steps x run lengths x models. Each protected run is compared
with the clean run of its seed, and with the loop that leaves non-finite losses out and does nothing else.
rows: training rows with NaN features; each must be named at its first fault.
sound: trainings with nothing wrong whose losses look odd; the right number of rollbacks is 0.
clocks: the same run under three clocks must give the same trace.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks import harm_tasks
from benchmarks.harness import columns, main, progress
from learnit_r8 import R8Scheduler, TrainingDiverged, events
from learnit_r8.testing import FakeClock

KINDS = (
    "nan report", "nan weight", "nan momentum", "weights x 8", "weights x 60", "layer lost", "rate x 1000",
    "50 NaN batches", "50 garbage batches",
)  # fmt: skip
ROWS = (1, 3, 8, 20)


@dataclass
class Outcome:
    """What came of a run."""

    score: float
    ended: str = "finished"
    rollbacks: int = 0
    told: int = 0
    left_out: frozenset[int] = frozenset()
    named_at: dict[int, int] = field(default_factory=dict)
    trace: int = 0
    advised: float | None = None  # score after restore_best(), where the end of the run says that it holds the best


class _Ears:
    def __init__(self) -> None:
        self.heard: list[events.Event] = []

    def record(self, event: events.Event) -> None:
        if isinstance(event, events.RolledBack | events.SpikeSeen | events.SampleQuarantined | events.Notice):
            self.heard.append(event)

    @property
    def advised(self) -> bool:
        return any("restore_best()" in e.message for e in self.heard if isinstance(e, events.Notice))


def steps_of(kind: str, times: int, *, near: bool, length: int, rng: np.random.Generator) -> list[int]:
    """Return the steps at which a fault strikes, from a twentieth of the run on."""
    first = length // 20
    if near:
        start = int(rng.integers(first, length - 45))
        return sorted(rng.choice(40, times, replace=False) + start)
    last = length - (55 if kind.startswith("50") else 2)
    return sorted(rng.choice(np.arange(first, last), times, replace=False))


def train(
    name: str, seed: int, length: int, *, net: bool, kind: str = "", at: list[int] | None = None,
    rows: np.ndarray | None = None, batch: int | None = None, tick: float = 1e-3, **options: Any,
) -> Outcome:  # fmt: skip
    """Run one training; without a net, non-finite losses are left out and nothing else happens."""
    task = harm_tasks.make(name, seed)
    rng = np.random.default_rng([seed, 7])
    if rows is not None:
        task.spoil(rows)
    clock, ears = FakeClock(), _Ears()
    size = batch or task.batch
    epochs = -(-length // -(-task.size // size))
    callbacks = {"state_callback": task.state, "load_callback": task.load} if net else {"recovery": "off"}
    faults = at or []
    ended, trace, done = "finished", 0, 0
    scheduler = R8Scheduler(
        task.size, size, num_epochs=epochs, initial_lr=task.lr, seed=seed, ui="off", checkpoint_dir=None,
        sinks=[ears], clock=clock, noise_guard="off", **callbacks, **options,
    )  # fmt: skip
    try:
        with scheduler, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _epoch in scheduler.epoch_iterator():
                for ids, lr in scheduler.batch_iterator():
                    rate = lr * 1000 if kind == "rate x 1000" and any(s <= done < s + 3 for s in faults) else lr
                    bad = kind.startswith("50") and any(s <= done < s + 50 for s in faults)
                    garbage = bad and kind == "50 garbage batches"
                    poison = bad and kind == "50 NaN batches"
                    losses = task.step(ids, rate, skip_nonfinite=not net, garbage=garbage, poison=poison)
                    if done in faults and kind in KINDS[1:6]:
                        task.damage(kind, rng)
                    report = losses * np.nan if done in faults and kind == "nan report" else losses
                    clock.advance(tick)
                    result = scheduler.update_with_loss(report)
                    trace = zlib.crc32(ids.tobytes() + np.float64([lr, result.rolled_back]).tobytes(), trace)
                    done += 1
    except TrainingDiverged:
        ended = "diverged"
    left_out = frozenset(scheduler.catalog.left_out.tolist())
    named = {i: e.step for e in ears.heard if isinstance(e, events.SampleQuarantined) for i in e.indices}
    kinds, score, advised = [type(e) for e in ears.heard], task.score(), None
    if ears.advised and ended == "finished":
        scheduler.restore_best()
        advised = task.score()
    told = kinds.count(events.SpikeSeen)
    return Outcome(score, ended, kinds.count(events.RolledBack), told, left_out, named, trace, advised)


def _points(score: float, base: float, name: str) -> float:
    """Return by how many points (accuracy), or percent of the loss, a run is better than another."""
    if not np.isfinite(base):  # weights that overflow
        return 100.0
    return 100.0 * (score - base) / (abs(base) if name in ("regression", "gru") else 1.0)


def fault_runs(names: Iterable[str], lengths: Iterable[int], seeds: range, kinds: Iterable[str]) -> Iterator[dict]:
    """Yield a row for each faulty run."""
    for name in names:
        for length in lengths:
            for seed in seeds:
                clean = train(name, seed, length, net=False)
                for kind in kinds:
                    for times in (1, 3, 6):
                        for near in (False, True):
                            if (times == 1 and near) or (times > 1 and kind.startswith("50")):
                                continue
                            rng = np.random.default_rng([seed, zlib.crc32(kind.encode()), times, near])
                            at = [int(s) for s in steps_of(kind, times, near=near, length=length, rng=rng)]
                            saved = train(name, seed, length, net=True, kind=kind, at=at)
                            less = train(name, seed, length, net=False, kind=kind, at=at)
                            yield {
                                "model": name, "steps": length, "seed": seed, "kind": kind, "times": times,
                                "near": near, "below clean": _points(saved.score, clean.score, name),
                                "over less": _points(saved.score, less.score, name), "rollbacks": saved.rollbacks,
                                "ended": saved.ended, "at": at,
                                "advised": None if saved.advised is None else _points(saved.advised, clean.score, name),
                            }  # fmt: skip
                progress(f"{name}, {length} steps, seed {seed}")


def row_runs(names: Iterable[str], epochs: int, seeds: range) -> Iterator[dict]:
    """Yield a row for each run with bad rows."""
    for name in names:
        for batch in (8, 32, 128):
            for count in ROWS:
                for seed in seeds:
                    task = harm_tasks.make(name, seed)
                    rng = np.random.default_rng([seed, count])
                    rows = rng.choice(task.size, count, replace=False)
                    length = epochs * -(-task.size // batch)
                    clean = train(name, seed, length, net=False, batch=batch)
                    saved = train(name, seed, length, net=True, rows=rows, batch=batch)
                    less = train(name, seed, length, net=False, rows=rows, batch=batch)
                    late = sum(saved.named_at.get(int(i), 10**9) >= -(-task.size // batch) for i in rows)
                    yield {
                        "model": name, "B": batch, "rows": count, "seed": seed,
                        "below clean": _points(saved.score, clean.score, name),
                        "over less": _points(saved.score, less.score, name),
                        "named": len(saved.left_out & set(rows.tolist())),
                        "others": len(saved.left_out - set(rows.tolist())),
                        "late": late, "rollbacks": saved.rollbacks, "ended": saved.ended,
                    }  # fmt: skip
        progress(f"bad rows, {name}")


def summary(rows: list[dict], key: str) -> list[list[object]]:
    """Return, for each value of a key: runs, share within two points, worst, worst against doing less."""
    table = []
    for value in dict.fromkeys(row[key] for row in rows):
        mine = [row for row in rows if row[key] == value]
        below = np.array([row["below clean"] for row in mine])
        over = np.array([row["over less"] for row in mine])
        table.append([
            str(value), len(mine), f"{np.mean(below >= -2):.1%}", f"{below.min():.1f}", f"{over.min():.1f}",
            sum(row["ended"] != "finished" for row in mine), sum(row["rollbacks"] for row in mine),
        ])  # fmt: skip
    return table


def run(
    *, quick: bool = False, only: str = "", part: str = "", seeds: int = 2, first_seed: int = 0, steps: int = 0
) -> dict[str, Any]:
    """Measure; see the module. Steps of 0: 300, and 1,500 unless it is to be quick."""
    names = (only,) if only else harm_tasks.NAMES
    lengths = (steps,) if steps else (300,) if quick else (300, 1500)
    which = range(first_seed, first_seed + seeds)
    results: dict[str, Any] = {}
    if part in ("", "faults"):
        results["faults"] = list(fault_runs(names, lengths, which, KINDS))
    if part in ("", "rows"):
        results["rows"] = list(row_runs(("mlp",) if not only else names, 8, which))
    if part in ("", "clocks"):
        faults: dict[str, Any] = {"net": True, "kind": "weights x 60", "at": [60, 61, 200]}
        traces = {tick: train("mlp", 0, 300, tick=tick, **faults).trace for tick in (1e-4, 1e-2, 1.0)}
        results["clocks"] = {str(tick): trace for tick, trace in traces.items()}
        results["same under all clocks"] = len(set(traces.values())) == 1
    if part in ("", "sound"):
        from benchmarks import harm_sound

        results["sound"] = harm_sound.run_all(seeds=2 if quick else 5)
    return results


HEAD = ["", "runs", "within 2", "worst", "worst over less", "diverged", "rollbacks"]


def table(results: Any) -> str:
    """Return the figures for people."""
    parts = []
    if "faults" in results:
        rows = results["faults"]
        keys = ("kind", "times", "near", "steps", "model")
        parts += [columns([key, *HEAD[1:]], summary(rows, key)) for key in keys]
        below = np.array([row["below clean"] for row in rows])
        over = np.array([row["over less"] for row in rows])
        advised = [row["advised"] for row in rows if row["below clean"] < -5 and row["advised"] is not None]
        parts.append(
            f"{len(rows)} faulty runs: {np.mean(below >= -2):.1%} within 2 of the clean one, {int((below < -5).sum())} "
            f"more than 5 below ({len(advised)} of them say so at their end, and restore_best() leaves "
            f"{sum(points < -5 for points in advised)}), {int((over < -2).sum())} more than 2 below doing less, "
            f"{int(((over < -2) & (below < -2)).sum())} of them more than 2 below the clean one, too"
        )
        worst = sorted(rows, key=lambda row: row["below clean"])[:12]
        parts.append(
            "\n".join(str({k: round(v, 1) if isinstance(v, float) else v for k, v in w.items()}) for w in worst)
        )
    if "rows" in results:
        rows = [{**row, "what": f"B={row['B']}, {row['rows']} rows"} for row in results["rows"]]
        found = summary(rows, "what")
        for line in found:
            mine = [row for row in rows if row["what"] == line[0]]
            total = {key: sum(row[key] for row in mine) for key in ("named", "rows", "others", "late")}
            line += [f"{total['named']}/{total['rows']}", total["others"], total["late"]]
        parts.append(columns(["bad rows", *HEAD[1:], "named", "others", "late"], found))
    if "clocks" in results:
        parts.append(f"same trace under three clocks: {results['same under all clocks']}")
    if "sound" in results:
        parts.append(columns(["sound runs", "runs", "rollbacks", "stopped", "told"], results["sound"]))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main(run, table, __doc__)
