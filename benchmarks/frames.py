"""What the dashboard costs its thread: one event, one frame.

An event is compared with `json.dumps` of the same event (what an event log pays), a frame with
`rich` printing six boxed panels of plain text at the same size.

    python -m benchmarks.frames
"""

from __future__ import annotations

import io
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.layout import Layout
from rich.panel import Panel

from benchmarks.harness import columns, main, progress
from benchmarks.timing import interleave
from learnit_r8 import events as e
from learnit_r8.dashboard.drawing.render import Scene, render
from learnit_r8.dashboard.keys import ViewState
from learnit_r8.run.model import DashboardModel

STEPS, PER_EPOCH, PORTION, BLOCK = 1_000_000, 50_000, 20_000, 250
SIZES = ((80, 24), (120, 35), (200, 60))


def losses(first: int, count: int, rng: random.Random) -> Iterator[e.LossReported]:
    for step in range(first, first + count):
        level = 2 * math.exp(-step / 1e5) + 0.1
        value = level * (1 + 0.1 * rng.gauss(0, 1)) if rng.random() > 1e-4 else 50.0
        yield e.LossReported(
            time=0.1 * step,
            step=step,
            epoch=step // PER_EPOCH,
            loss=value,
            expected_loss=level,
            lr=0.01,
            verdict="calm",
            score=0.5,
            size=32,
            step_seconds=0.09,
            r8_seconds=1e-4,
        )


def long_run() -> DashboardModel:
    rng, model = random.Random(0), DashboardModel()
    config = {"num_epochs": STEPS // PER_EPOCH}
    model.consume(
        e.RunStarted(
            time=0.0,
            step=0,
            run="run",
            config=config,
            steps_per_epoch=PER_EPOCH,
            total_steps=STEPS,
            resumed=False,
            version="",
            pid=1,
            elapsed=0.0,
        )
    )
    for epoch in range(STEPS // PER_EPOCH):
        time, step = 0.1 * epoch * PER_EPOCH, epoch * PER_EPOCH
        model.consume(e.EpochStarted(time=time, step=step, epoch=epoch, phase="quadrant", batches=PER_EPOCH))
        quarters = (0.1, 0.2, 0.3, 0.4)
        model.consume(
            e.QuadrantsRefreshed(
                time=time,
                step=step,
                epoch=epoch,
                edges=(0.0, *quarters),
                counts=(9,) * 4,
                losses=quarters,
                uses=quarters,
                easier=quarters,
                unseen=0,
                stuck=1,
            )
        )
        model.consume(e.MetricLogged(time=time, step=step, name="val_loss", value=0.5))
        model.consume(e.CheckpointSaved(time=time, step=step, path=f"ckpt/{epoch}", bytes=10**8, seconds=1.0))
        model.consume_all(losses(step, PER_EPOCH, rng))
    return model


def rich_screen(width: int, height: int) -> str:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True)
    layout = Layout()
    layout.split_column(*[Layout(Panel("text", title=str(i))) for i in range(6)])
    console.print(layout)
    return console.file.getvalue()


def cpu_milliseconds(function: Callable[[], object], rounds: int = 30) -> float:
    """Median CPU time of a call: unlike the clock on the wall it does not grow with what else runs."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times)


def run(*, quick: bool = False) -> dict[str, Any]:
    """Measure; `quick`: few rounds."""
    portion = list(losses(0, PORTION, random.Random(1)))
    model, rounds = DashboardModel(), 3 if quick else 15

    def consume() -> None:
        for first in range(0, PORTION, BLOCK):
            model.consume_all(portion[first : first + BLOCK])

    def dump() -> None:
        for event in portion:
            json.dumps(e.to_json(event))

    progress("events")
    times = interleave({"dashboard": consume, "json.dumps": dump}, rounds=5)
    event = {name: 1e6 * value / PORTION for name, value in times.items()}
    progress("a run of a million steps")
    model = long_run()
    console = [f"line {i}" for i in range(50)]
    frames = []
    for width, height in SIZES:
        frame = lambda w=width, h=height: render(Scene(model, console), ViewState(), w, h, model.last_time)  # noqa: E731
        screen = lambda w=width, h=height: rich_screen(w, h)  # noqa: E731
        times = {
            name: 1e3 * value for name, value in interleave({"ours": frame, "rich": screen}, rounds=rounds).items()
        }
        size = {"size": f"{width}x{height}", "cpu_ms": cpu_milliseconds(frame), "rounds": rounds}
        frames.append(size | {f"{name}_ms": value for name, value in times.items()})
    return {"event_us": event, "frames after 1e6 steps": frames}


def table(results: dict[str, Any]) -> str:
    ours, theirs = results["event_us"].values()
    rows = [["one LossReported, us", f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.2f}", ""]]
    rows += [
        [f"frame {row['size']}, 1e6 steps, ms", f"{row['ours_ms']:.2f}", f"{row['rich_ms']:.2f}",
         f"{row['ours_ms'] / row['rich_ms']:.2f}", f"{row['cpu_ms']:.2f}"]
        for row in results["frames after 1e6 steps"]
    ]  # fmt: skip
    return columns(("", "dashboard", "json.dumps / rich", "ratio", "CPU"), rows)


if __name__ == "__main__":
    main(run, table, __doc__)
