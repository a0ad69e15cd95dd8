"""What the dashboard costs: `python -m benchmarks.dashboard [--events 10000000]`.

1. `record()` in nanoseconds, beside `queue.Queue.put`.
2. A loop of 2 ms steps on a pseudo-terminal with nothing, the curses screen, or tqdm, in interleaved processes. Two
   kinds of step: hashing (C code that releases the GIL, as a GPU or BLAS call does) and pure Python (holds it).
3. One frame: numbers to cells, cells to bytes.
4. Memory over many events.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import queue
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import threading
from collections import deque
from pathlib import Path
from typing import Any

from benchmarks.harness import columns, main, progress
from benchmarks.timing import interleave
from learnit_r8.events import BatchIssued, LossReported

STEPS = 1000
LOOP = """
import hashlib, json, os, sys, time
rival, kind, out = sys.argv[1:4]
block = bytes(1 << 20)

def hashing(n):
    for _ in range(n):
        hashlib.sha1(block[: 1 << 17]).digest()

def python(n):
    for _ in range(n):
        sum(range(1000))

work = {"hashing": hashing, "python": python}[kind]
count = int(sys.argv[4])
from learnit_r8.events import BatchIssued, LossReported
record = bar = None
if rival == "dashboard":
    from learnit_r8.dashboard import open_dashboard
    board = open_dashboard("curses")
    record = board.record
if rival == "tqdm":
    from tqdm import tqdm
    bar = tqdm(total=STEPS)
work(count * 100)
began, cpu = time.perf_counter(), time.process_time()
for step in range(STEPS):
    work(count)
    now = time.time()
    issued = BatchIssued(now, step, 0, 32, 1e-3, 1e-4)
    reported = LossReported(now, step, 0, 1.0 + step % 7, 1.0, 1e-3, "calm", 0.0, 32, 2e-3, 1e-4)
    if record is not None:
        record(issued)
        record(reported)
    if bar is not None:
        bar.update()
seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
if rival == "dashboard":
    name, fault = board.name, board.fault
    board.close()
    assert name == "curses", (name, fault)
with open(out, "w") as file:
    json.dump([seconds / STEPS, cpu / STEPS], file)
""".replace("STEPS", str(STEPS))

FRAME = """
import json, os, statistics, sys, time
from dataclasses import replace
from learnit_r8.dashboard.demo import DemoRun
from learnit_r8.dashboard.keys import ViewState
from learnit_r8.dashboard.model import DashboardModel
from learnit_r8.dashboard.render import render
from learnit_r8.dashboard.terminal import canvas
model, board, view, costs = DashboardModel(), canvas(os.environ, (120, 35)), ViewState(), {}
events = [event for _, event in DemoRun(epochs=20, start=1e9)]
for event in events[:-5000]:
    model.consume(event)
for size in ((80, 24), (120, 35), (300, 100)):
    rendered, drawn, amount = [], [], []
    for turn in range(40):
        for event in events[-5000 + turn * 100 :][:100]:
            model.consume(event)
        a = time.perf_counter()
        grid = render(model, view, *size, events[-1].time)
        b = time.perf_counter()
        data = board.draw(grid)
        c = time.perf_counter()
        if turn:
            rendered.append(b - a), drawn.append(c - b), amount.append(len(data))
    costs["x".join(map(str, size))] = [statistics.median(rendered), statistics.median(drawn), statistics.median(amount)]
began = time.perf_counter()
for event in events[:10000]:
    model.consume(event)
costs["consume"] = (time.perf_counter() - began) / 10000
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
            env={**os.environ, "TERM": "xterm-256color", "LANG": "C.UTF-8", "R8_UI": ""},
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
    event = LossReported(0.0, 1, 0, 1.0, 1.0, 1e-3, "calm", 0.0, 32, 2e-3, 1e-4)
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


def calibrate(kind: str) -> int:
    """Return how many units of work take about 2 ms here."""
    import hashlib
    import time

    block = bytes(1 << 17)
    unit = {"hashing": lambda: hashlib.sha1(block).digest(), "python": lambda: sum(range(1000))}[kind]
    began = time.perf_counter()
    for _ in range(500):
        unit()
    return max(1, round(2e-3 / ((time.perf_counter() - began) / 500)))


def slowdown(rounds: int) -> list[dict[str, Any]]:
    """Return the loop's time per step under each rival.

    Excess over nothing is the median over pairs of interleaved processes. CPU seconds count the dashboard's thread, and
    do not see what else the machine does: the better figure on a busy one.
    """
    rivals = ["none", "dashboard", *(["tqdm"] if importlib.util.find_spec("tqdm") else [])]
    rows = []
    for kind in ("hashing", "python"):
        progress(f"a loop of 2 ms steps on a terminal, {kind}")
        count = calibrate(kind)
        times: dict[str, list[float]] = {rival: [] for rival in rivals}
        work: dict[str, list[float]] = {rival: [] for rival in rivals}
        for turn in range(rounds):
            for rival in rivals[turn % len(rivals) :] + rivals[: turn % len(rivals)]:
                seconds, cpu = on_a_terminal(LOOP, rival, kind, "OUT", str(count))
                times[rival].append(seconds)
                work[rival].append(cpu)
        for rival in rivals:
            wall, cpu = (_more(side[rival], side["none"]) for side in (times, work))
            step = statistics.median(times[rival]) * 1e3
            row = {"step": kind, "rival": rival, "ms": step, "wall_percent": wall, "cpu_percent": cpu}
            rows.append(row | {"rounds": rounds})
    return rows


def _more(mine: list[float], base: list[float]) -> float:
    """Return the median excess of the pairs in percent."""
    return (statistics.median(a / b for a, b in zip(mine, base, strict=True)) - 1) * 100


def memory(events: int) -> dict[str, float]:
    """Return the resident size after a tenth of the events and after all of them."""
    from learnit_r8.dashboard.model import DashboardModel

    progress("memory")
    model = DashboardModel()
    sizes = []
    for step in range(events):
        model.consume(BatchIssued(step * 0.002, step, step // 5000, 32, 1e-3, 1e-4))
        model.consume(LossReported(step * 0.002, step, step // 5000, 1.0, 1.0, 1e-3, "calm", 0.0, 32, 2e-3, 1e-4))
        if step + 1 in {events // 10, events}:
            sizes.append(_resident())
    return {"steps": events, "a tenth_MB": sizes[0] / 1e6, "end_MB": sizes[1] / 1e6}


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(*, quick: bool = False, events: int = 1_000_000, rounds: int = 7) -> dict[str, Any]:
    """Measure; `events`: steps of the memory test; `rounds`: interleaved repeats of the loop; `quick`: few of both."""
    events, rounds = (events // 10, 2) if quick else (events, rounds)
    found = {"record_ns": record_cost(), "slowdown": slowdown(rounds), "memory": memory(events)}
    costs = on_a_terminal(FRAME, "OUT")
    consume = costs.pop("consume")
    frames = {size: dict(zip(("render_s", "draw_s", "bytes"), cost, strict=True)) for size, cost in costs.items()}
    return {**found, "frames": frames, "consume_us": consume * 1e6}


def table(results: dict[str, Any]) -> str:
    loop = [
        [row["step"], row["rival"], f"{row['ms']:.3f}", f"{row['wall_percent']:+.2f}", f"{row['cpu_percent']:+.2f}"]
        for row in results["slowdown"]
    ]
    frames = [
        [size, f"{cost['render_s'] * 1e3:.2f}", f"{cost['draw_s'] * 1e3:.2f}", f"{cost['bytes']:.0f}"]
        for size, cost in results["frames"].items()
    ]
    kept = results["memory"]
    return "\n".join([
        "one event handed over: " + ", ".join(f"{name} {value:.0f} ns" for name, value in results["record_ns"].items()),
        "a loop of 2 ms steps on a terminal",
        columns(("step", "rival", "ms", "wall %", "CPU %"), loop),
        columns(("one frame", "render ms", "curses ms", "bytes sent"), frames),
        f"one event into the model: {results['consume_us']:.1f} us",
        f"memory, {kept['steps']:,} steps: {kept['a tenth_MB']:.1f} MB after a tenth, {kept['end_MB']:.1f} at the end",
    ])  # fmt: skip


if __name__ == "__main__":
    main(run, table, __doc__)
