"""What the dashboard costs: `python -m benchmarks.dashboard [--events 10000000]`.

1. `record()` in nanoseconds, beside `queue.Queue.put`.
2. A loop of 2 ms steps on a pseudo-terminal with nothing, the curses screen, or tqdm, in turns of a second. Three
   kinds of step: numpy on one thread, sleep (what waiting for a GPU is), and pure Python (holds the GIL all the time).
3. One frame of several, 50 ms of the run apart: numbers to cells, cells to bytes. Means of CPU time.
4. Memory over many events.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import queue
import struct
import subprocess
import sys
import tempfile
import termios
import threading
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.harness import columns, main, progress
from benchmarks.timing import interleave
from learnit_r8.events import BatchIssued, LossReported

STEPS, WARM_UP = 500, 150
KINDS = ("numpy", "sleep", "python")
LOOP = """
import json, os, sys, threading, time
import numpy as np
out, kind, rounds, with_tqdm = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "tqdm"
from learnit_r8.dashboard import open_dashboard
from learnit_r8.events import LossReported, RunStarted
weights, batch = (np.random.default_rng(0).normal(0, 0.06, shape).astype("f4") for shape in ((512, 512), (32, 512)))

def with_numpy(n):
    hidden = batch
    for _ in range(n):
        hidden = np.maximum(hidden @ weights, 0)

def with_python(n):
    for _ in range(n):
        sum(range(1000))

def with_sleep(n):
    time.sleep(n * 1e-5)

work = {"numpy": with_numpy, "python": with_python, "sleep": with_sleep}[kind]
def best_of(count):
    times = []
    for _ in range(30):
        began = time.perf_counter()
        work(count)
        times.append(time.perf_counter() - began)
    return min(times)

count = 10
while best_of(count) < 1.5e-3:
    count += 1 + count // 4
count = max(1, round(count * 2e-3 / best_of(count)))
board = open_dashboard("curses")
record = board.record
record(RunStarted(
    time=time.time(), step=0, run="slowdown", config={"num_epochs": 100}, steps_per_epoch=10_000,
    total_steps=1_000_000, resumed=False, version="", pid=1, elapsed=0.0,
))
at = 0

def steps(number, record, bar):
    global at
    for at in range(at, at + number):
        work(count)
        now = time.time()
        reported = LossReported(
            time=now, step=at, epoch=0, loss=1.0 + at % 7, expected_loss=1.0, lr=1e-3, verdict="calm", score=0.0,
            size=32, step_seconds=2e-3, r8_seconds=1e-4,
        )
        if record is not None:
            record(reported)
        if bar is not None:
            bar.update()

own = time.pthread_getcpuclockid(next(t.ident for t in threading.enumerate() if t.name == "r8-dashboard"))
def timed(record, bar):
    steps(WARM_UP, record, bar)
    began, cpu, thread = time.perf_counter(), time.process_time(), time.clock_gettime(own)
    steps(STEPS, record, bar)
    ended = [time.perf_counter() - began, time.process_time() - cpu, time.clock_gettime(own) - thread]
    return [seconds / STEPS for seconds in ended]

def alone():
    with board.suspended():
        return timed(None, None)

def watched():
    return timed(record, None)

def bar():
    from tqdm import tqdm
    with board.suspended(), tqdm(total=STEPS + WARM_UP) as bar:
        return timed(None, bar)

rivals = {"nothing": alone, "dashboard": watched, **({"tqdm": bar} if with_tqdm else {})}
steps(5000 // (1 if rounds > 3 else 10), record, None)
times = {name: [] for name in rivals}
for turn in range(rounds):
    names = list(rivals)
    for name in names[turn % len(names):] + names[:turn % len(names)]:
        times[name].append(rivals[name]())
name, fault = board.name, board.fault
board.close()
assert name == "curses", (name, fault)
with open(out, "w") as file:
    json.dump(times, file)
""".replace("STEPS", str(STEPS)).replace("WARM_UP", str(WARM_UP))

FRAME = """
import json, os, statistics, sys, time
from learnit_r8.dashboard.demo import DemoRun
from learnit_r8.dashboard.keys import ViewState
from learnit_r8.run.model import DashboardModel
from learnit_r8.dashboard.drawing.render import Painter, Scene
from learnit_r8.dashboard.terminal.curses_screen import canvas
model, board, view, costs = DashboardModel(), canvas(os.environ, (120, 35)), ViewState(), {}
events = [event for _, event in DemoRun(epochs=20, start=1e9)]
for event in events[:-5000]:
    model.consume(event)
for size in ((80, 24), (120, 35), (300, 100)):
    rendered, drawn, amount = [], [], []
    painter = Painter(chart_seconds=1.0)
    for turn in range(200):
        for event in events[-5000 + turn * 20 :][:20]:
            model.consume(event)
        a = time.thread_time()
        grid = painter.draw(Scene(model), view, *size, events[-1].time + turn / 4)
        b = time.thread_time()
        data = board.draw(grid)
        c = time.thread_time()
        if turn:
            rendered.append(b - a), drawn.append(c - b), amount.append(len(data))
    costs["x".join(map(str, size))] = [statistics.mean(rendered), statistics.mean(drawn), statistics.mean(amount)]
began = time.thread_time()
for event in events[:10000]:
    model.consume(event)
costs["consume"] = (time.thread_time() - began) / 10000
with open(sys.argv[1], "w") as file:
    json.dump(costs, file)
"""


def on_a_terminal(code: str, *arguments: str) -> Any:
    """Run code in a new process on a pty that is read all the time; return the JSON that it wrote to the file OUT."""
    master, slave = os.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("4H", 35, 120, 0, 0))
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "out.json")
        argv = [sys.executable, "-c", code, *(out if argument == "OUT" else argument for argument in arguments)]
        process = subprocess.Popen(
            argv,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={
                **os.environ,
                "TERM": "xterm-256color",
                "LANG": "C.UTF-8",
                "R8_UI": "",
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            },
        )
        os.close(slave)
        tail = bytearray()
        reader = threading.Thread(target=_drain, args=(master, tail), daemon=True)
        reader.start()
        process.wait()
        reader.join(2)
        os.close(master)
        if process.returncode:
            raise RuntimeError(f"status {process.returncode}: {bytes(tail[-2000:]).decode(errors='replace')}")
        return json.loads(Path(out).read_text())


def _drain(master: int, tail: bytearray) -> None:
    try:
        while data := os.read(master, 1 << 16):
            tail += data
            del tail[:-10000]
    except OSError:
        pass


def record_cost() -> dict[str, float]:
    """Nanoseconds to hand one event over."""
    event = LossReported(
        time=0.0,
        step=1,
        epoch=0,
        loss=1.0,
        expected_loss=1.0,
        lr=1e-3,
        verdict="calm",
        score=0.0,
        size=32,
        step_seconds=2e-3,
        r8_seconds=1e-4,
    )
    ring: deque[LossReported] = deque(maxlen=65536)
    line: queue.Queue[LossReported] = queue.Queue()
    record, put = ring.append, line.put
    calls = 100_000

    def drain_put(item: LossReported) -> None:
        put(item)

    def many(function: object) -> object:
        return lambda: [function(event) for _ in range(calls)]  # type: ignore[operator]

    def puts() -> None:
        for _ in range(calls):
            drain_put(event)
        line.queue.clear()

    times = interleave({"record (deque.append)": many(record), "queue.Queue.put": puts}, rounds=7)  # type: ignore[dict-item]
    return {name: seconds / calls * 1e9 for name, seconds in times.items()}


def slowdown(rounds: int) -> list[dict[str, Any]]:
    """Return the loop's time per step under each rival, and its excess over nothing in percent: median, 95% interval.

    The rivals take turns in one process. CPU seconds count the dashboard's thread and do not see what else the machine
    does: for a loop that holds the GIL they are the better figure, for the others an upper bound. The thread is also
    timed by itself: a step that never releases the GIL waits for all of that, others for less.
    """
    tqdm = "tqdm" if importlib.util.find_spec("tqdm") else "-"
    rows = []
    for kind in KINDS:
        progress(f"a loop of 2 ms steps on a terminal, {kind}")
        times = {name: np.array(pairs) for name, pairs in on_a_terminal(LOOP, "OUT", kind, str(rounds), tqdm).items()}
        for name, pairs in times.items():
            wall, cpu = (interval(pairs[:, i] / times["nothing"][:, i]) for i in (0, 1))
            row = {"step": kind, "rival": name, "ms": np.median(pairs[:, 0]) * 1e3, "wall_percent": wall}
            thread = 100 * np.sum(pairs[:, 2]) / np.sum(pairs[:, 0]) if name == "dashboard" else None
            row |= {"cpu_percent": None if kind == "sleep" else cpu, "thread_percent": thread, "rounds": rounds}
            if name == "dashboard" and "tqdm" in times:
                row["over_tqdm_percent"] = interval(pairs[:, 0] / times["tqdm"][:, 0])
            rows.append(row)
    return rows


def interval(ratios: npt.NDArray[np.float64]) -> list[float]:
    """Return the median excess in percent and its 95% bootstrap interval."""
    draws = np.random.default_rng(0).choice(ratios, (4000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975)) * 100 - 100
    return [float(np.median(ratios)) * 100 - 100, float(low), float(high)]


def memory(events: int) -> dict[str, float]:
    """Return the resident size after a tenth of the events and after all of them."""
    from learnit_r8.run.model import DashboardModel

    progress("memory")
    model = DashboardModel()
    sizes = []
    for step in range(events):
        model.consume(BatchIssued(time=step * 0.002, step=step, epoch=step // 5000, size=32, lr=1e-3, seconds=1e-4))
        model.consume(
            LossReported(
                time=step * 0.002,
                step=step,
                epoch=step // 5000,
                loss=1.0,
                expected_loss=1.0,
                lr=1e-3,
                verdict="calm",
                score=0.0,
                size=32,
                step_seconds=2e-3,
                r8_seconds=1e-4,
            )
        )
        if step + 1 in {events // 10, events}:
            sizes.append(_resident())
    return {"steps": events, "a tenth_MB": sizes[0] / 1e6, "end_MB": sizes[1] / 1e6}


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(*, quick: bool = False, events: int = 1_000_000, rounds: int = 30) -> dict[str, Any]:
    """Measure; `events`: steps of the memory test; `rounds`: interleaved repeats of the loop; `quick`: few of both."""
    events, rounds = (events // 10, 3) if quick else (events, rounds)
    found = {"record_ns": record_cost(), "slowdown": slowdown(rounds), "memory": memory(events)}
    costs = on_a_terminal(FRAME, "OUT")
    consume = costs.pop("consume")
    frames = {size: dict(zip(("render_s", "draw_s", "bytes"), cost, strict=True)) for size, cost in costs.items()}
    return {**found, "frames": frames, "consume_us": consume * 1e6}


def _excess(percent: list[float] | None) -> str:
    return "" if percent is None else "{:+.2f} [{:+.2f}, {:+.2f}]".format(*percent)


def table(results: dict[str, Any]) -> str:
    loop = [
        [row["step"], row["rival"], f"{row['ms']:.3f}", _excess(row["wall_percent"]), _excess(row["cpu_percent"]),
         "" if row["thread_percent"] is None else f"{row['thread_percent']:.2f}", _excess(row.get("over_tqdm_percent"))]
        for row in results["slowdown"]
    ]  # fmt: skip
    frames = [
        [size, f"{cost['render_s'] * 1e3:.2f}", f"{cost['draw_s'] * 1e3:.2f}", f"{cost['bytes']:.0f}"]
        for size, cost in results["frames"].items()
    ]
    kept = results["memory"]
    return "\n".join([
        "one event handed over: " + ", ".join(f"{name} {value:.0f} ns" for name, value in results["record_ns"].items()),
        "a loop of 2 ms steps on a terminal",
        columns(("step", "rival", "ms", "wall %", "CPU %", "its thread, % of a core", "wall % over tqdm"), loop),
        columns(("one frame", "render ms", "curses ms", "bytes sent"), frames),
        f"one event into the model: {results['consume_us']:.1f} us",
        f"memory, {kept['steps']:,} steps: {kept['a tenth_MB']:.1f} MB after a tenth, {kept['end_MB']:.1f} at the end",
    ])  # fmt: skip


if __name__ == "__main__":
    main(run, table, __doc__)
