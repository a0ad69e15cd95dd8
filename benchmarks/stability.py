"""False alarms and detection delays of the spike detector against simpler rules; cost of a backup.

`python -m benchmarks.stability [--quick] [--tuning]`: exam curves, or the ones used for tuning.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from benchmarks import stability_curves as curves
from benchmarks.harness import columns, main, progress
from benchmarks.timing import interleave
from learnit_r8.stability.backups import BackupRing
from learnit_r8.stability.detector import Detector
from learnit_r8.types import Verdict

ACT = (Verdict.SPIKE, Verdict.DRIFT, Verdict.NONFINITE)
Rule = Callable[[int, float], bool]


def ours(**thresholds: Any) -> tuple[Rule, Callable[[int], None]]:
    """Return (rule, notice) of the library's detector; it starts anew after each intervention."""
    detector = Detector(**thresholds)

    def rule(step: int, loss: float) -> bool:
        if detector.observe(step, loss).verdict not in ACT:
            return False
        detector.rebaseline()
        return True

    return rule, lambda step: detector.announce(step, "learning rate")


def fixed_flags() -> tuple[Rule, Callable[[int], None]]:
    """2 of 3 and 4 of 8 flags always, whatever outliers the run has shown."""
    return ours(chance=1e9, outliers=10**9)


def four_ema() -> tuple[Rule, Callable[[int], None]]:
    """Loss > 4 x its exponential moving average (weight 0.1), after 16 steps."""
    state = [0, 0.0]

    def rule(_step: int, loss: float) -> bool:
        count, mean = state
        if count >= 16 and loss > 4 * mean:
            state[:] = [0, 0.0]
            return True
        state[:] = [count + 1, loss if count == 0 else mean + 0.1 * (loss - mean)]
        return False

    return rule, lambda step: None


def _windowed(size: int, fires: Callable[[float, float, float], bool]) -> tuple[Rule, Callable[[int], None]]:
    window: deque[float] = deque()
    sums = [0.0, 0.0]

    def rule(_step: int, loss: float) -> bool:
        n = len(window)
        if n == size:
            mean = sums[0] / n
            if fires(loss, mean, math.sqrt(max(0.0, sums[1] / n - mean * mean))):
                window.clear()
                sums[:] = [0.0, 0.0]
                return True
            old = window.popleft()
            sums[0] -= old
            sums[1] -= old * old
        window.append(loss)
        sums[0] += loss
        sums[1] += loss * loss
        return False

    return rule, lambda step: None


def six_sigma() -> tuple[Rule, Callable[[int], None]]:
    """Loss > mean + 6 standard deviations of the last 128."""
    return _windowed(128, lambda loss, mean, std: loss > mean + 6 * std + 1e-9 * abs(mean))


def twice_mean() -> tuple[Rule, Callable[[int], None]]:
    """|loss - mean of the last 10| >= 2 x that mean."""
    return _windowed(10, lambda loss, mean, std: abs(loss - mean) >= 2 * abs(mean))


RULES = {
    "learnit_r8": ours,
    "fixed 2/3, 4/8": fixed_flags,
    "4 x EMA": four_ema,
    "mean + 6 std": six_sigma,
    "2 x mean of 10": twice_mean,
}


def interventions(make: Callable[[], tuple[Rule, Callable[[int], None]]], run: curves.Run) -> list[int]:
    """Return the steps at which a rule would intervene."""
    rule, notice = make()
    found = []
    for step, loss in enumerate(run.losses.tolist()):
        if step in run.notices:
            notice(step)
        if rule(step, loss):
            found.append(step)
    return found


def false_alarms(
    families: Iterable, real: Iterable, n_curves: int, length: int, real_steps: int
) -> list[dict[str, Any]]:
    """Return false interventions per curve family and per real run."""
    rows = []
    for kind, makers in (("family", families), ("real run", real)):
        for make in makers:
            progress(f"clean curves: {make.__name__}")
            if kind == "family":
                runs = [curves.Run(make(np.random.default_rng([2024, k]), length)) for k in range(n_curves)]
            else:
                runs = [make(real_steps)]
            counts = {name: sum(len(interventions(rule, run)) for run in runs) for name, rule in RULES.items()}
            rows.append({kind: make.__name__, "steps": sum(run.losses.size for run in runs), **counts})
    return rows


def _scales(losses: curves.Curve, at: int) -> float:
    past = losses[at - 64 : at]
    m = np.median(past)
    return max(abs(float(m)), 4 * 1.4826 * float(np.median(np.abs(past - m))))


def spike(_rng: curves.Rng, losses: curves.Curve, at: int) -> None:
    """Ten times up for 6 steps."""
    losses[at : at + 6] += 10 * _scales(losses, at)


def level(rng: curves.Rng, losses: curves.Curve, at: int) -> None:
    """Up for good, by 3 to 10 times the level."""
    losses[at:] += rng.uniform(3, 10) * _scales(losses, at)


def exponential(rng: curves.Rng, losses: curves.Curve, at: int) -> None:
    """Divergence that grows by 5% to 50% a step from a hundredth of the level."""
    k = np.arange(losses.size - at)
    losses[at:] += 0.01 * _scales(losses, at) * np.exp(np.minimum(rng.uniform(0.05, 0.5) * k, 60))


def drift(_rng: curves.Rng, losses: curves.Curve, at: int) -> None:
    """A linear rise by 4 times the level within 1000 steps."""
    losses[at:] += 4 * _scales(losses, at) * np.arange(losses.size - at) / 1000


def outlier(_rng: curves.Rng, losses: curves.Curve, at: int) -> None:
    """One harmless loss, ten times up: nothing should happen."""
    losses[at] += 10 * _scales(losses, at)


def detection(families: Iterable, repeats: int) -> list[dict[str, Any]]:
    """Return how many planted faults were found within 1200 steps, and after how many steps."""
    rows = []
    for fault in (spike, level, exponential, drift, outlier):
        for family in families:
            progress(f"planted faults: {fault.__name__}, {family.__name__}")
            row: dict[str, Any] = {"fault": fault.__name__, "family": family.__name__, "planted": repeats}
            for name, make in RULES.items():
                delays = []
                for k in range(repeats):
                    rng = np.random.default_rng([77, k])
                    losses = family(rng, 6000)
                    at = int(rng.integers(1000, 4500))
                    fault(rng, losses, at)
                    hits = [step - at for step in interventions(make, curves.Run(losses[: at + 1200])) if step >= at]
                    limit = 20 if fault is outlier else 1200
                    delays += [hit for hit in hits[:1] if hit < limit]
                median, worst = (statistics.median(delays), max(delays)) if delays else (None, None)
                row[name] = {"found": len(delays), "median delay": median, "worst": worst}
            rows.append(row)
    return rows


def cost(megabytes: int) -> dict[str, float]:
    """Return the cost of a reading and of a backup."""
    progress("cost")
    losses = curves.small_batch(np.random.default_rng(0), 50_000).tolist()
    detector = Detector()
    start = time.perf_counter()
    for step, loss in enumerate(losses):
        detector.observe(step, loss)
    reading = (time.perf_counter() - start) / len(losses) * 1e6

    rng = np.random.default_rng(0)
    state = {f"layer{k}": rng.standard_normal((1250, 200), dtype=np.float32) for k in range(megabytes)}
    target = {name: array.copy() for name, array in state.items()}
    ring = BackupRing()
    for step in range(4):
        ring.take(state, step)

    def plain() -> None:
        for name, array in state.items():
            np.copyto(target[name], array)

    times = interleave({"plain": plain, "backup": lambda: ring.take(state, 4)}, rounds=11)
    return {
        "detector_us": reading, "MB": megabytes, "backup_ms": times["backup"] * 1e3, "copy_ms": times["plain"] * 1e3,
        "backup/copy": times["backup"] / times["plain"], "rounds": 11,
    }  # fmt: skip


def run(*, quick: bool = False, tuning: bool = False) -> dict[str, Any]:
    """Measure; `quick`: a tenth of the work; `tuning`: the curves that the rule was chosen on."""
    families = curves.TUNING_FAMILIES if tuning else curves.EXAM_FAMILIES
    real = curves.TUNING_RUNS if tuning else curves.EXAM_RUNS
    sizes, repeats, megabytes = ((2, 12_000, 2_500), 5, 50) if quick else ((10, 24_000, 25_000), 40, 500)
    found = false_alarms(families, real, *sizes)
    total = {key: sum(row[key] for row in found) for key in ("steps", *RULES)}
    return {
        "false alarms": found, "total": total,
        "per 100k steps": {name: total[name] / total["steps"] * 1e5 for name in RULES},
        "detection": detection(families, repeats), "cost": cost(megabytes),
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    names = list(RULES)
    alarms = [[next(iter(row.values())), row["steps"], *(row[name] for name in names)]
              for row in results["false alarms"]]  # fmt: skip
    alarms += [["total", results["total"]["steps"], *(results["total"][name] for name in names)]]
    alarms += [["per 100k steps", "", *(f"{results['per 100k steps'][name]:.2f}" for name in names)]]

    def cell(hits: dict[str, Any]) -> str:
        return f"{hits['found']}: {hits['median delay']:.0f} ({hits['worst']})" if hits["found"] else "0"

    planted = [[row["fault"], row["family"], *(cell(row[name]) for name in names)] for row in results["detection"]]
    cost = results["cost"]
    return "\n".join([
        "false interventions on clean curves",
        columns(("", "steps", *names), alarms),
        f"\nplanted faults, {results['detection'][0]['planted']} a family: found, median (worst) delay in steps",
        columns(("fault", "family", *names), planted),
        f"\ndetector: {cost['detector_us']:.1f} us a step (limit 32)",
        f"backup of {cost['MB']} MB: {cost['backup_ms']:.0f} ms, plain copy into warm memory {cost['copy_ms']:.0f} ms: "
        f"{cost['backup/copy']:.2f} x (limit 1.5)",
    ])  # fmt: skip


if __name__ == "__main__":
    main(run, table, __doc__)
