"""The gate before the step: lone outliers, exploding gradients and poisoned batches left out; clean steps that are not.

python -m benchmarks.gate [--quick] [--only outliers|explosions|poisoned|clean]

An outlier is a loss, and its gradient with it, of 20 times the median of the last 64. Clean steps: the families and
trainings of `stability_curves` (losses, and for trainings the norms of the gradients), and the trainings of
`clean_runs` and `harm_sound` through the scheduler. All but those of `clean_runs` were looked at as the rule was made.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from benchmarks import clean_runs, harm_sound
from benchmarks import stability_curves as curves
from benchmarks.harness import columns, main, progress
from learnit_r8 import R8Scheduler, Verdict, events
from learnit_r8.stability.detector import Detector
from learnit_r8.stability.gate import Gate, Seen

ACT = (Verdict.SPIKE, Verdict.DRIFT, Verdict.NONFINITE)


class Digits:
    """A network on digits whose steps are checked; what is done to a step's loss, gradient or data is the caller's."""

    def __init__(self, seed: int, checks: bool = True, all_gather: Any = None, rank: int = 0, world: int = 1) -> None:
        import torch
        from sklearn.datasets import load_digits

        self.torch = torch
        torch.set_num_threads(1)
        x, y = load_digits(return_X_y=True)
        x, y = torch.tensor(x / 16.0, dtype=torch.float32), torch.tensor(y)
        order = np.random.default_rng(seed).permutation(len(x))
        self.x, self.y, self.test = x[order[:1297]], y[order[:1297]], (x[order[1297:]], y[order[1297:]])
        generator = torch.Generator().manual_seed(seed)
        self.model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        for p in self.model.parameters():
            p.data = torch.randn(p.shape, generator=generator) * (0.15 if p.ndim > 1 else 0.0)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.checks, self.rollbacks = checks, 0
        self.left_out: list[int] = []
        self.scheduler = R8Scheduler(
            1297 - 1297 % world, 32, num_epochs=30, initial_lr=0.1, seed=seed, ui="off", checkpoint_dir=None,
            sinks=[self], state_callback=self.state, load_callback=self.load, rank=rank, world_size=world,
            all_gather=all_gather,
        )  # fmt: skip

    def record(self, event: object) -> None:
        self.rollbacks += isinstance(event, events.RolledBack)

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: Any) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def train(
        self, *, outliers: Iterable[int] = (), grad_by: Callable[[int], float] = lambda _: 1.0,
        data: Callable[[int, Any], Any] = lambda _, x: x, norms: bool = False,
    ) -> float:  # fmt: skip
        """Train; return the accuracy on the test set."""
        torch, parameters = self.torch, list(self.model.parameters())
        levels: deque[float] = deque(maxlen=64)
        with self.scheduler as scheduler:
            for _ in scheduler.epoch_iterator():
                for batch in scheduler.batch_iterator():
                    self.optimizer.param_groups[0]["lr"] = batch.lr
                    out = self.model(data(batch.step, self.x[batch.indices]))
                    losses = torch.nn.functional.cross_entropy(out, self.y[batch.indices], reduction="none")
                    if batch.step in outliers:
                        losses = losses * (20.0 * float(np.median(levels)) / losses.mean().item())
                    self.optimizer.zero_grad()
                    losses.mean().backward()
                    for p in parameters:
                        p.grad *= grad_by(batch.step)
                    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters]) if norms else None
                    if not self.checks or scheduler.check(losses, norm):
                        self.optimizer.step()
                    else:
                        self.left_out.append(batch.step)
                    levels.append(scheduler.update_with_loss(losses).loss)
        with torch.no_grad():
            return float((self.model(self.test[0]).argmax(1) == self.test[1]).float().mean())


def _at(seed: int, count: int) -> set[int]:
    """Return steps at which something is planted, at least 100 apart, from step 120 on."""
    return set((120 + 180 * np.arange(count) + np.random.default_rng(seed).integers(0, 80, count)).tolist())


def outliers(runs: int, world: int, *, norms: bool) -> dict[str, Any]:
    """Plant lone losses 20 times the level; count those that are left out, and others that are."""
    planted = found = others = rollbacks = 0
    for seed in range(100, 100 + runs):  # others than the rule was chosen on
        at, parts, barrier = _at(seed, 4), [None] * world, threading.Barrier(world)
        ranks: list[Digits] = []

        def work(
            rank: int, seed: int = seed, at: Any = at, parts: Any = parts, barrier: Any = barrier, ranks: Any = ranks
        ) -> None:
            def all_gather(array: Any) -> Any:
                parts[rank] = array
                barrier.wait()
                everyone = np.concatenate(parts)
                barrier.wait()
                return everyone

            digits = Digits(seed, all_gather=all_gather if world > 1 else None, rank=rank, world=world)
            ranks.append(digits)
            digits.train(outliers=at, norms=norms)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(ranks) == world
        assert all(rank.left_out == ranks[0].left_out for rank in ranks)
        left = set(ranks[0].left_out)
        planted, found, others = planted + len(at), found + len(at & left), others + len(left - at)
        rollbacks += ranks[0].rollbacks
    what = f"losses x 20, {world} rank(s)" + ", norms given" * norms
    return {"what": what, "planted": planted, "left out": found, "others": others, "rollbacks": rollbacks}


def explosions(runs: int) -> dict[str, Any]:
    """Multiply gradients by 100 while the losses stay; count those that are left out at that step."""
    planted = found = others = rollbacks = 0
    for seed in range(runs):
        at, digits = _at(seed, 4), Digits(seed)
        digits.train(grad_by=lambda step, at=at: 100.0 if step in at else 1.0, norms=True)  # type: ignore[misc]
        left = set(digits.left_out)
        planted, found, others = planted + len(at), found + len(at & left), others + len(left - at)
        rollbacks += digits.rollbacks
    return {"what": "gradients x 100", "planted": planted, "left out": found, "others": others, "rollbacks": rollbacks}


def poisoned(seeds: int) -> list[dict[str, Any]]:
    """Give one batch in a hundred inputs of noise; compare with the clean run, and with the one that checks nothing."""
    rows = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        bad = set(np.flatnonzero(rng.random(30 * 41) < 0.01).tolist())

        def data(step: int, x: Any, bad: set[int] = bad, seed: int = seed) -> Any:
            import torch

            noise = np.random.default_rng([seed, step]).normal(0, 30, x.shape).astype(np.float32)
            return torch.as_tensor(noise) if step in bad else x

        clean, checked, bare = Digits(seed), Digits(seed), Digits(seed, checks=False)
        row = {"seed": seed, "poisoned": len(bad), "clean": round(clean.train(), 3)}
        row["with check"] = round(checked.train(data=data, norms=True), 3)
        row |= {"left out": len(bad & set(checked.left_out)), "rollbacks": checked.rollbacks}
        rows.append(row | {"without check": round(bare.train(data=data), 3), "rollbacks without": bare.rollbacks})
    return rows


def judged(losses: Iterable[float], norms: Iterable[float | None], notices: frozenset[int] = frozenset()) -> int:
    """Return how many steps of a stream are left out."""
    detector, gate, count = Detector(), Gate(), 0
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        if step in notices:
            detector.announce(step, "learning rate")
        if gate.judge(detector, [Seen(float(loss))], norm):
            count += 1
        elif detector.observe(step, float(loss)).verdict in ACT:
            detector.rebaseline()
    return count


def _trained(make: Callable[[int], curves.Run], steps: int) -> tuple[curves.Run, list[float]]:
    """Return a training's losses, and the norms of its gradients."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    norms: list[float] = []

    def hook(optimizer: Any, *_: Any) -> None:
        parameters = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(parameters)))

    handle = register_optimizer_step_pre_hook(hook)
    try:
        return make(steps), norms
    finally:
        handle.remove()


def clean(*, quick: bool) -> list[list[Any]]:
    """Return of each clean stream its name, kind, steps and how many of them were left out."""
    rows: list[list[Any]] = []
    steps, seeds = (3000, 1) if quick else (20_000, 5)
    for kind, families in (("tuning", curves.TUNING_FAMILIES), ("exam", curves.EXAM_FAMILIES)):
        for family in families:
            streams = [family(np.random.default_rng(1000 + seed), steps) for seed in range(seeds)]
            rows.append([family.__name__, kind, steps * seeds, sum(judged(s, [None] * steps) for s in streams)])
    steps = 600 if quick else 12_000
    for kind, runs in (("tuning", curves.TUNING_RUNS), ("exam", curves.EXAM_RUNS)):
        for make in runs:
            progress(make.__name__)
            run, norms = _trained(make, steps)
            rows.append([f"training: {make.__name__}", kind, steps, judged(run.losses, norms, run.notices)])
    for name, recipe in clean_runs.RECIPES.items():
        progress(name)
        with _checked() as seen:
            clean_runs.train(recipe, 0, 2 if quick else None)
        rows.append([f"scheduler: {name}", "exam", *seen])
    for name in list(harm_sound.KINDS)[: 1 if quick else None]:
        progress(name)
        with _checked() as seen:
            harm_sound.run_all(1, name)
        rows.append([f"odd losses: {name}", "exam", *seen])
    return rows


@contextlib.contextmanager
def _checked() -> Iterator[list[int]]:
    """Let every report be checked, and taken for a step that was taken; count steps, and those to be left out."""
    report, seen = R8Scheduler.update_with_loss, [0, 0]

    def checked(self: R8Scheduler, loss: Any = None, *args: Any, **options: Any) -> Any:
        seen[0], seen[1] = seen[0] + 1, seen[1] + (not self.check(loss))
        self._checks.clear()
        return report(self, loss, *args, **options)

    R8Scheduler.update_with_loss = checked  # type: ignore[assignment,method-assign]
    try:
        yield seen
    finally:
        R8Scheduler.update_with_loss = report  # type: ignore[method-assign]


def run(*, quick: bool = False, only: str = "") -> dict[str, Any]:
    """Measure; `only`: one part. `quick`: a run or a seed each."""
    runs = 1 if quick else 10
    found: dict[str, Any] = {"planted": [], "poisoned": [], "clean": []}
    if only in ("", "outliers"):
        found["planted"] += [outliers(runs, world, norms=norms) for world in (1, 4) for norms in (False, True)]
    if only in ("", "explosions"):
        found["planted"].append(explosions(runs))
    if only in ("", "poisoned"):
        found["poisoned"] = poisoned(1 if quick else 5)
    if only in ("", "clean"):
        found["clean"] = clean(quick=quick)
    return found


def table(results: dict[str, Any]) -> str:
    parts = [columns(list(rows[0]), [list(row.values()) for row in rows])
             for rows in (results["planted"], results["poisoned"]) if rows]  # fmt: skip
    if rows := results["clean"]:
        parts.append(columns(["clean stream", "kind", "steps", "left out"], rows))
        for kind in ("tuning", "exam"):
            steps, count = (sum(row[k] for row in rows if row[1] == kind) for k in (2, 3))
            parts.append(f"{kind}: {steps:,} steps, {count} left out, {count / steps * 1e5:.2f} per 100k")
    return "\n\n".join(parts)


if __name__ == "__main__":
    main(run, table, __doc__)
