"""What each strategy learns from the same number of sample gradients, against uniform.

`python -m benchmarks.learning [--quick] [--seeds N] [--tasks A,B] [--arms A,B] [--minutes M] [--keep FILE]`

Every run goes through `R8Scheduler`: same split, wrong labels, initial weights and peak learning rate for one seed,
the learning rate decays fully over the budget. Cells are differences to uniform with the same number of sample
gradients, in points of test accuracy (of the test loss, where the score is a loss: per cent of uniform's), mean over
the seeds with a 95% interval (Student's t over paired differences). A strategy that draws fewer samples (infobatch)
is compared with a uniform run that is as much shorter. `--quick`: 3 seeds, 4 tasks. `--keep`: runs are written there
as they end, and those that are there already are not repeated; remove it when the code has changed.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import main, progress

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


def measure(
    tasks: Sequence[str], arms: Sequence[Arm], seeds: int, processes: int = 2, minutes: float = float("inf"),
    keep: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train everything, seed after seed, and return each task's figures over the seeds that were done in time."""
    from benchmarks.tasks import make_task

    done = _kept(keep)
    wanted = [(task, seed) for seed in range(seeds) for task in tasks]
    jobs = [(*key, tuple(arm for arm in arms if arm.name not in done.get(key, {}))) for key in wanted]
    jobs = [job for job in jobs if job[2]]
    for number, (task, seed, result) in enumerate(_results(jobs, processes, time.monotonic() + 60 * minutes), 1):
        done.setdefault((task, seed), {}).update(result)
        if keep is not None:
            with keep.open("a", encoding="utf8") as file:
                file.write(json.dumps([task, seed, result]) + "\n")
        progress(f"{number} of {len(jobs)}: {task}, seed {seed}")
    complete = list(itertools.takewhile(lambda key: all(arm.name in done.get(key, {}) for arm in arms), wanted))
    complete = complete[: len(complete) // len(tasks) * len(tasks)]
    runs = {
        task: {arm.name: [done[key][arm.name] for key in complete if key[0] == task] for arm in arms} for task in tasks
    }
    return {task: summarise(runs[task], loss=make_task(task, 0).loss) for task in tasks}


def _kept(keep: Path | None) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the runs of an earlier call, by task and seed."""
    done: dict[tuple[str, int], dict[str, Any]] = {}
    for line in keep.read_text("utf8").splitlines() if keep is not None and keep.exists() else ():
        task, seed, result = json.loads(line)
        done.setdefault((task, seed), {}).update(result)
    return done


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


def gains_table(figures: dict[str, Any], key: str) -> str:
    """Return a markdown table, tasks down and arms across."""
    arms = list(next(iter(figures.values())))[1:]
    lines = ["| task | uniform | " + " | ".join(arms) + " |", "|---" * (len(arms) + 2) + "|"]
    for task, row in figures.items():
        cells = [f"{row[arm][key][0]:+.1f} ± {row[arm][key][1]:.1f}" for arm in arms]
        lines.append(f"| {task} | {row['uniform']['mean']:.3f} | " + " | ".join(cells) + " |")
    mean = [statistics.fmean(row[arm][key][0] for row in figures.values()) for arm in arms]
    worst = [min(row[arm][key][0] for row in figures.values()) for arm in arms]
    above = [sum(row[arm][key][0] > 0 for row in figures.values()) for arm in arms]
    lines.append("| mean | | " + " | ".join(f"{value:+.2f}" for value in mean) + " |")
    lines.append("| worst | | " + " | ".join(f"{value:+.2f}" for value in worst) + " |")
    lines.append("| above uniform | | " + " | ".join(f"{value} of {len(figures)}" for value in above) + " |")
    return "\n".join(lines)


def samples_table(figures: dict[str, Any]) -> str:
    """Return how much of uniform's budget each arm took until its mean curve first reached uniform's final score."""
    arms = [arm for arm in next(iter(figures.values())) if "%" not in arm]
    lines = ["| task | " + " | ".join(arms) + " |", "|---" * (len(arms) + 1) + "|"]
    for task, row in figures.items():
        shares = [row[arm]["to uniform's score"] for arm in arms]
        lines.append(f"| {task} | " + " | ".join(f"{s:.2f}" if s == s else "never" for s in shares) + " |")
    return "\n".join(lines)


def run(
    *, quick: bool = False, seeds: int = 0, tasks: str = "", arms: str = "", minutes: float = float("inf"),
    processes: int = 2, keep: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Train; `seeds` 0: 10 of them, 3 with `quick`; `minutes`: report the seeds that are done by then."""
    from benchmarks.tasks import SEEN, TUNED, UNSEEN

    known = all_arms()
    chosen = [known[name] for name in ["uniform", *arms.split(",")]] if arms else list(known.values())
    named = ["digits", "digits 20%", "longtail", "separated"] if quick else TUNED + SEEN + UNSEEN
    named = tasks.split(",") if tasks else named
    figures = measure(named, chosen, seeds or (3 if quick else 10), processes, minutes, Path(keep) if keep else None)
    return {"seeds": len(figures[named[0]]["uniform"]["scores"]), "batch": BATCH, "tasks": figures}


def table(results: dict[str, Any]) -> str:
    figures = results["tasks"]
    return "\n".join([
        f"Against uniform with the same number of sample gradients, {results['seeds']} seeds, mean and 95% interval\n",
        gains_table(figures, "against matched uniform"),
        "\nAgainst uniform with the full budget, whatever the strategy drew\n",
        gains_table(figures, "against full uniform"),
        "\nShare of uniform's samples after which the mean curve first reaches uniform's final score\n",
        samples_table(figures),
    ])  # fmt: skip


if __name__ == "__main__":
    for kind in ("OMP", "OPENBLAS", "MKL"):
        os.environ.setdefault(f"{kind}_NUM_THREADS", "1")  # before the workers import numpy: small matrices
    main(run, table, __doc__)
