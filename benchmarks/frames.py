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

from rich.console import Console
from rich.layout import Layout
from rich.panel import Panel

from benchmarks.timing import interleave
from learnit_r8 import events as e
from learnit_r8.dashboard.keys import ViewState
from learnit_r8.dashboard.model import DashboardModel
from learnit_r8.dashboard.render import render

STEPS, PER_EPOCH, PORTION = 1_000_000, 50_000, 20_000
SIZES = ((80, 24), (120, 35), (200, 60))


def losses(first: int, count: int, rng: random.Random) -> Iterator[e.LossReported]:
    for step in range(first, first + count):
        level = 2 * math.exp(-step / 1e5) + 0.1
        value = level * (1 + 0.1 * rng.gauss(0, 1)) if rng.random() > 1e-4 else 50.0
        yield e.LossReported(0.1 * step, step, step // PER_EPOCH, value, level, 0.01, "calm", 0.5, 32, 0.09, 1e-4)


def long_run() -> DashboardModel:
    rng, model = random.Random(0), DashboardModel()
    config = {"num_epochs": STEPS // PER_EPOCH}
    model.consume(e.RunStarted(0.0, 0, "run", config, PER_EPOCH, STEPS, False, "", 1, 0.0))
    for epoch in range(STEPS // PER_EPOCH):
        time, step = 0.1 * epoch * PER_EPOCH, epoch * PER_EPOCH
        model.consume(e.EpochStarted(time, step, epoch, "quadrant", PER_EPOCH))
        quarters = (0.1, 0.2, 0.3, 0.4)
        model.consume(
            e.QuadrantsRefreshed(time, step, epoch, (0.0, *quarters), (9,) * 4, quarters, quarters, quarters, 0, 1)
        )
        model.consume(e.MetricLogged(time, step, "val_loss", 0.5))
        model.consume(e.CheckpointSaved(time, step, f"ckpt/{epoch}", 10**8, 1.0))
        for event in losses(step, PER_EPOCH, rng):
            model.consume(event)
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


def main() -> None:
    portion = list(losses(0, PORTION, random.Random(1)))
    model = DashboardModel()

    def consume() -> None:
        for event in portion:
            model.consume(event)

    def dump() -> None:
        for event in portion:
            json.dumps(e.to_json(event))

    times = interleave({"consume": consume, "json.dumps": dump}, rounds=5)
    print(f"{'':24}{'dashboard':>12}{'rival':>12}{'ratio':>8}")
    ours, theirs = (1e6 * times[name] / PORTION for name in ("consume", "json.dumps"))
    print(f"{'one LossReported':24}{ours:>9.1f} us{theirs:>9.1f} us{ours / theirs:>8.2f}")
    model = long_run()
    console = [f"line {i}" for i in range(50)]
    for width, height in SIZES:
        frame = lambda w=width, h=height: render(model, ViewState(), w, h, model.last_time, console)  # noqa: E731
        screen = lambda w=width, h=height: rich_screen(w, h)  # noqa: E731
        times = interleave({"ours": frame, "rich": screen}, rounds=15)
        ours, theirs = 1e3 * times["ours"], 1e3 * times["rich"]
        name = f"frame {width}x{height}, 1e6 steps"
        print(
            f"{name:24}{ours:>9.2f} ms{theirs:>9.2f} ms{ours / theirs:>8.2f}   {cpu_milliseconds(frame):.2f} ms of CPU"
        )


if __name__ == "__main__":
    main()
