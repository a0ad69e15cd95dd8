"""Are weights, groups and mixtures drawn as often as stated, and do token budgets keep theirs?

    python -m benchmarks.shares [--quick]

"frequencies": a million draws of `Weighted`, `Balanced` and `Mixture` by 1, 2 and 4 ranks (threads); for each sample
and each source, how far its number of draws is from the stated one, in standard deviations of independent draws; the
share over 3 of them, of which chance has .27%. "changed": other weights or shares are set after a batch in the midst
of a run; the largest deviation of a source in any one batch from the next one on.
"tokens": `TokenBudget` on lengths as texts have them (log-normal), padded on 1 and 4 ranks and packed: batches within
the budget, mean fill, whether each sample came once and whether the ranks' slices are one plan, and what a step of it
costs beside one of "quadrant" with batches of the same size (medians over interleaved epochs, this thread's time).
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import columns, main, progress
from learnit_r8 import R8Scheduler
from learnit_r8.strategies import Balanced, Mixture, TokenBudget, Weighted

N, BATCH, LENGTHS = 20_000, 4000, 10_000
SIZES = (15_000, 4000, 1000)
SOURCES = dict(zip("abc", np.split(np.arange(N), np.cumsum(SIZES)[:-1]), strict=True))
SOURCE = np.repeat(np.arange(3), SIZES)
QUIET: dict[str, Any] = {"ui": "off", "checkpoint_dir": None, "noise_guard": "off", "backup_every": None}


def on_ranks(world: int, body: Callable[[dict[str, Any]], Any]) -> list[Any]:
    """Return what a body returns on each of several ranks, which are threads."""
    slots: list[Any] = [None] * world
    barrier, outcomes = threading.Barrier(world, timeout=600), [None] * world

    def gather(rank: int, array: Any) -> Any:
        slots[rank] = np.array(array)
        barrier.wait()
        everyone = np.concatenate(slots)
        barrier.wait()
        return everyone

    def work(rank: int) -> None:
        of_rank = {"rank": rank, "world_size": world, "all_gather": partial(gather, rank)} if world > 1 else {}
        outcomes[rank] = body(of_rank)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def strategies() -> dict[str, tuple[Callable[[], Any], NDArray[np.float64], Callable[[Any], None] | None]]:
    """Return each strategy, the stated probabilities of samples, and how they are changed to those of `CHANGED`."""
    weights = np.random.default_rng(1).lognormal(0, 1, N)
    shares = dict(zip("abc", (0.5, 0.2, 0.3), strict=True))
    by_source = np.array([0.5, 0.2, 0.3]) / SIZES
    return {
        "weighted": (
            lambda: Weighted(weights), weights / weights.sum(), lambda strategy: strategy.set(np.arange(N), CHANGED)
        ),
        "balanced": (lambda: Balanced(SOURCE), np.repeat(1 / 3 / np.array(SIZES), SIZES), None),
        "mixture": (
            lambda: Mixture(SOURCES, shares), np.repeat(by_source, SIZES),
            lambda strategy: strategy.set_shares({name: float(CHANGED[ids].sum()) for name, ids in SOURCES.items()}),
        ),
    }  # fmt: skip


CHANGED = np.repeat(np.array([0.1, 0.8, 0.1]) / SIZES, SIZES)


def drawn(strategy: Any, draws: int, ranks: dict[str, Any], change: Any = None) -> list[NDArray[np.int64]]:
    """Return this rank's slices; a change is made while the tenth batch is open."""
    batches = []
    options = {**QUIET, **ranks}
    with R8Scheduler(N, BATCH, num_steps=-(-draws // BATCH), strategy=strategy, **options) as run:
        for _ in run.epoch_iterator():
            for batch in run.batch_iterator():
                batches.append(batch.indices.copy())
                if change is not None and len(batches) == 10:
                    change(strategy)
                run.update_with_loss(np.ones(len(batch.indices)))
    return batches


def beyond(counts: NDArray[np.int64], stated: NDArray[np.float64]) -> tuple[float, float]:
    """Return the share of counts that are over 3 deviations off, and the largest deviation."""
    total = counts.sum()
    off = np.abs(counts - total * stated) / np.sqrt(total * stated * (1 - stated))
    return float(np.mean(off > 3)), float(off.max())


def frequencies(draws: int) -> list[dict[str, Any]]:
    """Measure what is drawn, as stated and after a change."""
    rows = []
    for name, (make, stated, change) in strategies().items():
        for world in (1, 2, 4):
            progress(f"{name}, {world} ranks")
            parts = on_ranks(world, lambda ranks, make=make: drawn(make(), draws, ranks))
            counts = np.bincount(np.concatenate([ids for batches in parts for ids in batches]), minlength=N)
            share, worst = beyond(counts, stated)
            of_sources = np.bincount(SOURCE, counts).astype(int)
            row = {"name": name, "ranks": world, "draws": int(counts.sum()), "beyond": share, "worst": worst}
            row["of sources"] = beyond(of_sources, np.bincount(SOURCE, stated))[1]
            if change is not None:
                late = on_ranks(world, lambda ranks, make=make, change=change: drawn(make(), 40 * BATCH, ranks, change))
                after = [np.concatenate(slices) for slices in zip(*(batches[10:] for batches in late), strict=True)]
                found = np.array([np.bincount(SOURCE[ids], minlength=3) for ids in after])
                row["changed"] = max(beyond(batch, np.bincount(SOURCE, CHANGED))[1] for batch in found)
            rows.append(row)
    return rows


def tokens(rounds: int) -> list[dict[str, Any]]:
    """Measure token budgets."""
    lengths = np.random.default_rng(2).lognormal(3.7, 0.6, LENGTHS).astype(int).clip(4, 512)
    budget, rows = 16_384, []
    for padded, world in ((True, 1), (True, 4), (False, 1)):
        progress(f"tokens, {'padded' if padded else 'packed'}, {world} ranks")

        def body(ranks: dict[str, Any], padded: bool = padded) -> list[NDArray[np.int64]]:
            strategy, options = TokenBudget(lengths, budget, padded=padded), {**QUIET, **ranks}
            slices = []
            with R8Scheduler(LENGTHS, 4096, num_epochs=1, strategy=strategy, **options) as run:
                for batch in run.batch_iterator():
                    slices.append(batch.indices.copy())
                    run.update_with_loss(np.ones(len(batch.indices)))
            return slices

        parts = on_ranks(world, body)
        each = np.array([len(ids) * lengths[ids].max() if padded else lengths[ids].sum() for of in parts for ids in of])
        fill = np.array([
            sum(len(ids) * lengths[ids].max() if padded else lengths[ids].sum() for ids in slices) / budget
            for slices in zip(*parts, strict=True)
        ])  # fmt: skip
        times = np.bincount(np.concatenate([ids for of in parts for ids in of]), minlength=LENGTHS)
        rows.append({
            "kind": "padded" if padded else "packed", "ranks": world, "batches": len(parts[0]),
            "within": float(np.mean(each <= budget // world)), "fill": float(fill.mean()),
            "once": float(np.mean(times == 1)), "twice": int((times > 1).sum()),
            "equal slices": bool(all(len({len(ids) for ids in slices}) == 1 for slices in zip(*parts, strict=True))),
        })  # fmt: skip
    size = LENGTHS // rows[0]["batches"]
    costs: dict[str, list[float]] = {"tokens": [], "quadrant": []}
    runs = {
        name: stepping("quadrant" if name == "quadrant" else TokenBudget(lengths, budget), size, rounds)
        for name in costs
    }
    for _ in range(rounds):
        for name, run in runs.items():
            costs[name].append(next(run))
    medians = {name: statistics.median(found[1:]) for name, found in costs.items()}
    rows[0] |= {"step_us": 1e6 * medians["tokens"], "beside quadrant": medians["tokens"] / medians["quadrant"]}
    return rows


def stepping(strategy: Any, size: int, rounds: int) -> Any:
    """Yield seconds of a step, its epoch's plan included, in each of several epochs."""
    losses = np.random.default_rng(0).lognormal(0.0, 1.0, LENGTHS).astype(np.float32)
    size = size if strategy == "quadrant" else 4096
    with R8Scheduler(LENGTHS, size, num_epochs=rounds, strategy=strategy, **QUIET) as run:
        begin, steps = time.thread_time(), 0
        for _ in run.epoch_iterator():
            for batch in run.batch_iterator():
                run.update_with_loss(losses[batch.indices])
                steps += 1
            yield (time.thread_time() - begin) / steps
            begin, steps = time.thread_time(), 0


def run(*, quick: bool = False) -> dict[str, Any]:
    """Measure; `quick`: 50,000 draws, 5 epochs."""
    return {"frequencies": frequencies(50_000 if quick else 1_000_000), "tokens": tokens(5 if quick else 40)}


def table(results: dict[str, Any]) -> str:
    lines = [
        [row["name"], row["ranks"], f"{row['draws']:,}", f"{row['beyond']:.2%}", f"{row['worst']:.2f}",
         f"{row['of sources']:.2f}", f"{row['changed']:.2f}" if "changed" in row else "-"]
        for row in results["frequencies"]
    ]  # fmt: skip
    head = ("drawn", "ranks", "draws", "samples over 3", "worst", "worst source", "worst of a batch after a change")
    first = results["tokens"][0]
    more = [
        [row["kind"], row["ranks"], row["batches"], f"{row['within']:.1%}", f"{row['fill']:.1%}", f"{row['once']:.2%}",
         row["twice"], "yes" if row["equal slices"] else "no"]
        for row in results["tokens"]
    ]  # fmt: skip
    below = ("tokens", "ranks", "batches", "within", "fill", "once", "twice", "equal slices")
    cost = f"a step: {first['step_us']:.1f} us, {first['beside quadrant']:.2f} of quadrant's"
    return "\n".join([columns(head, lines), "", columns(below, more), cost])


if __name__ == "__main__":
    main(run, table, __doc__)
