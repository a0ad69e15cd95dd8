"""What each strategy learns from the same number of sample gradients, against uniform.

`python -m benchmarks.learning [--quick] [--seeds N] [--tasks A,B] [--arms A,B] [--minutes M] [--out FILE]`

Every run goes through `R8Scheduler`: same split, wrong labels, initial weights and peak learning rate for one seed,
the learning rate decays fully over the budget. Cells are differences to uniform with the same number of sample
gradients, in points of test accuracy (of the test loss, where the score is a loss: per cent of uniform's), mean over
the seeds with a 95% interval (Student's t over paired differences). A strategy that draws fewer samples (infobatch)
is compared with a uniform run that is as much shorter. `--quick`: 3 seeds, 4 tasks.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "learning.json"
BATCH = 32
LOW = 0.6
"""Share of the budget of the shorter runs."""


@dataclass(frozen=True)
class Arm:
    """One way to train: a strategy, its share of the budget, and whether it is told the classes."""

    name: str
    strategy: str
    share: float = 1.0
    guard: str = "off"
    groups: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    def make(self) -> Any:
        from learnit_r8.strategies import make

        return type(make(self.strategy))(**dict(self.options)) if self.options else self.strategy


def all_arms() -> dict[str, Arm]:
    """Return uniform, every registered strategy, the halves of auto, and shorter runs."""
    from learnit_r8.strategies import names

    arms = [Arm("uniform", "uniform")]
    arms += [Arm(name, name) for name in names() if name != "uniform"]
    arms += [
        Arm("always seek", "prioritized", options=(("alpha", 0.8), ("beta", 0.0), ("beta_end", 0.0))),
        Arm("auto, seek only", "auto", options=(("avoid", False),)),
        Arm("auto 60%", "auto", LOW),
        Arm("uniform 60%", "uniform", LOW),
    ]
    return {arm.name: arm for arm in arms}


def train(task: Any, arm: Arm, seed: int, epochs: int | None = None) -> dict[str, Any]:
    """Return score, gradients, the score after each epoch, and what the strategy decided."""
    from learnit_r8.scheduler import R8Scheduler

    model = task.model(seed)
    curve: list[tuple[int, float]] = []
    used = 0
    decisions = Decisions()
    with R8Scheduler(
        len(task.targets), BATCH, num_epochs=epochs or max(1, round(task.epochs * arm.share)),
        initial_lr=task.peak_lr, strategy=arm.make(), noise_guard=arm.guard,
        groups=task.groups if arm.groups else None, seed=seed, use_curses=False, checkpoint_dir=None,
        backup_every=None, sinks=[decisions],
    ) as scheduler:  # fmt: skip
        for _ in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                scheduler.update_with_loss(model.train(batch.indices, batch.lr, batch.weights))
                used += len(batch.indices)
            curve.append((used, model.score()))
    return {"score": curve[-1][1], "gradients": used, "curve": curve, "decisions": decisions.figures}


class Decisions:
    """Keeps what strategies report."""

    def __init__(self) -> None:
        self.figures: list[tuple[str, float]] = []

    def record(self, event: Any) -> None:
        if type(event).__name__ == "StrategyDecided":
            self.figures.append((event.decision, event.figure))


def run_seed(job: tuple[str, int, tuple[Arm, ...]]) -> tuple[str, int, dict[str, Any]]:
    """Train one task with one seed in all ways; a shorter plan also gets a uniform run of its length."""
    from benchmarks.tasks import make_task

    name, seed, arms = job
    task = make_task(name, seed)
    runs = {}
    for arm in arms:
        runs[arm.name] = train(task, arm, seed)
        full = len(task.targets) * max(1, round(task.epochs * arm.share))
        if runs[arm.name]["gradients"] < 0.98 * full:
            epochs = max(1, round(runs[arm.name]["gradients"] / len(task.targets)))
            runs[arm.name]["matched"] = train(task, Arm("", "uniform"), seed, epochs)["score"]
    return name, seed, runs


# Figures --------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95% interval."""
    from scipy.stats import t

    if len(values) < 2:
        return values[0], float("nan")
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), float(half)


def gains(scores: Iterable[float], rivals: Sequence[float], *, loss: bool) -> list[float]:
    """Return each seed's gain in points of accuracy, or per cent of the rival's mean loss."""
    unit = -statistics.fmean(rivals) if loss else 1.0
    return [100 * (score - rival) / unit for score, rival in zip(scores, rivals, strict=True)]


def samples_to(curves: Sequence[Sequence[tuple[int, float]]], target: float, *, loss: bool) -> float:
    """Return the gradients after which the mean over the seeds first reaches the target; NaN if never."""
    for points in zip(*curves, strict=False):
        mean = statistics.fmean(score for _, score in points)
        if (mean <= target) if loss else (mean >= target):
            return statistics.fmean(used for used, _ in points)
    return float("nan")


def summarise(runs: dict[str, list[dict[str, Any]]], *, loss: bool) -> dict[str, Any]:
    """Return a task's figures for each arm."""
    uniform = [run["score"] for run in runs["uniform"]]
    target, full = statistics.fmean(uniform), statistics.fmean(run["gradients"] for run in runs["uniform"])
    figures = {}
    for name, mine in runs.items():
        scores = [run["score"] for run in mine]
        matched = [run.get("matched", rival) for run, rival in zip(mine, uniform, strict=True)]
        figures[name] = {
            "median": statistics.median(scores),
            "mean": statistics.fmean(scores),
            "against full uniform": interval(gains(scores, uniform, loss=loss)),
            "against matched uniform": interval(gains(scores, matched, loss=loss)),
            "gradients": statistics.fmean(run["gradients"] for run in mine) / full,
            "to uniform's score": samples_to([run["curve"] for run in mine], target, loss=loss) / full,
            "scores": scores,
            "decisions": [run["decisions"] for run in mine],
        }
    return figures


def versions() -> dict[str, str]:
    import numpy
    import scipy
    import sklearn

    from learnit_r8 import __version__

    return {
        "learnit_r8": __version__, "numpy": numpy.__version__, "scipy": scipy.__version__,
        "scikit-learn": sklearn.__version__, "python": platform.python_version(),
    }  # fmt: skip


def measure(
    tasks: Sequence[str], arms: Sequence[Arm], seeds: int, processes: int = 2, minutes: float = float("inf")
) -> dict[str, Any]:
    """Train everything, seed after seed, and return each task's figures over the seeds that were done in time."""
    from benchmarks.tasks import make_task

    jobs = [(task, seed, tuple(arms)) for seed in range(seeds) for task in tasks]
    done = []
    for result in _results(jobs, processes, time.monotonic() + 60 * minutes):
        done.append(result)
        print(f"\r{len(done)} of {len(jobs)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    runs: dict[str, dict[str, list[Any]]] = {task: {arm.name: [] for arm in arms} for task in tasks}
    for task, _, result in done[: len(done) // len(tasks) * len(tasks)]:
        for arm, run in result.items():
            runs[task][arm].append(run)
    return {task: summarise(runs[task], loss=make_task(task, 0).loss) for task in tasks}


def _results(jobs: Sequence[Any], processes: int, deadline: float) -> Iterator[tuple[str, int, dict[str, Any]]]:
    if processes == 1:
        yield from map(run_seed, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        results = pool.imap(run_seed, jobs)
        try:
            for _ in jobs:
                yield results.next(max(0.0, deadline - time.monotonic()) if deadline < float("inf") else None)
        except multiprocessing.TimeoutError:
            return


def print_table(figures: dict[str, Any], key: str) -> None:
    """Print a markdown table, tasks down and arms across."""
    arms = list(next(iter(figures.values())))[1:]
    print("| task | uniform | " + " | ".join(arms) + " |")
    print("|---" * (len(arms) + 2) + "|")
    for task, row in figures.items():
        cells = [f"{row[arm][key][0]:+.1f} ± {row[arm][key][1]:.1f}" for arm in arms]
        print(f"| {task} | {row['uniform']['mean']:.3f} | " + " | ".join(cells) + " |")
    mean = [statistics.fmean(row[arm][key][0] for row in figures.values()) for arm in arms]
    worst = [min(row[arm][key][0] for row in figures.values()) for arm in arms]
    above = [sum(row[arm][key][0] > 0 for row in figures.values()) for arm in arms]
    print("| mean | | " + " | ".join(f"{value:+.2f}" for value in mean) + " |")
    print("| worst | | " + " | ".join(f"{value:+.2f}" for value in worst) + " |")
    print("| above uniform | | " + " | ".join(f"{value} of {len(figures)}" for value in above) + " |")


def print_samples(figures: dict[str, Any]) -> None:
    """Print how much of uniform's budget each arm took until its mean curve first reached uniform's final score."""
    arms = [arm for arm in next(iter(figures.values())) if "%" not in arm]
    print("| task | " + " | ".join(arms) + " |")
    print("|---" * (len(arms) + 1) + "|")
    for task, row in figures.items():
        shares = [row[arm]["to uniform's score"] for arm in arms]
        print(f"| {task} | " + " | ".join(f"{share:.2f}" if share == share else "never" for share in shares) + " |")


def main() -> None:
    """Measure, print the tables and write the results."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # before the workers import numpy: small matrices, one core each
    from benchmarks.tasks import TUNED, UNSEEN

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--tasks", type=lambda text: text.split(","))
    parser.add_argument("--arms", type=lambda text: text.split(","))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="report the seeds done by then")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    tasks = options.tasks or (["digits", "digits 20%", "longtail", "separated"] if options.quick else TUNED + UNSEEN)
    arms = all_arms()
    chosen = list(arms.values()) if options.arms is None else [arms[name] for name in ["uniform", *options.arms]]
    seeds = options.seeds or (3 if options.quick else 10)
    begin = time.monotonic()
    figures = measure(tasks, chosen, seeds, options.processes, options.minutes)
    seeds = len(figures[tasks[0]]["uniform"]["scores"])
    print(f"Against uniform with the same number of sample gradients, {seeds} seeds, mean and 95% interval\n")
    print_table(figures, "against matched uniform")
    print("\nAgainst uniform with the full budget, whatever the strategy drew\n")
    print_table(figures, "against full uniform")
    print("\nShare of uniform's samples after which the mean curve first reaches uniform's final score\n")
    print_samples(figures)
    out = options.out or (None if options.quick or options.tasks or options.arms else RESULTS)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"seeds": seeds, "batch": BATCH, "versions": versions(), "tasks": figures})
        text = text.replace("NaN", "null")  # strict JSON: never reached
        out.write_text(text + "\n", "utf8")
    print(f"\n{time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
