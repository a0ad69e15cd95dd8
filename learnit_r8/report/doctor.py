"""`r8 doctor`: what is installed, what this terminal can show, where files can go, and whether a run works."""

from __future__ import annotations

import locale
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from learnit_r8._version import __version__
from learnit_r8.core.clock import Clock
from learnit_r8.dashboard.displays.choice import choose, default_glyphs, look, wanted_ui
from learnit_r8.events import LossReported, RunEnded
from learnit_r8.run import formats as f
from learnit_r8.run.events_file import read_events
from learnit_r8.run.tail import EVENTS_FILE
from learnit_r8.scheduler import R8Scheduler

RUN_SECONDS = 1.0
LITTLE_SPACE = 1 << 30
_PACKAGES = {
    "numpy": "needed",
    "rich": "needed",
    "bokeh": "for r8 report",
    "matplotlib": "for r8 plot --png",
    "numba": "faster weighted draws",
    "torch": "",
    "transformers": "",
    "lightning": "",
    "keras": "",
    "jax": "",
}


class Finding(NamedTuple):
    """One line. `good` is None for a plain fact, False for what would make a run fail or poorer."""

    topic: str
    name: str
    text: str
    good: bool | None = None


def examine(folder: Path, environment: Mapping[str, str], clock: Clock) -> Iterator[Finding]:
    """Yield findings about this place to start a run in, as they are made; the run at the end takes a second."""
    yield from _versions()
    yield from _terminal(environment)
    yield from _places(folder)
    yield from _run(clock)


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "learnit_r8", __version__)
    yield Finding("versions", "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name, purpose in _PACKAGES.items():
        try:
            yield Finding("versions", name, metadata.version(name))
        except metadata.PackageNotFoundError:
            if purpose:
                good = False if purpose == "needed" else None
                yield Finding("versions", name, f"not installed ({purpose}): pip install {name}", good)


def _terminal(environment: Mapping[str, str]) -> Iterator[Finding]:
    around = look(environment)
    streams = {"input": around.stdin_tty, "output": around.stdout_tty}
    kinds = ", ".join(f"{name} is {'a' if tty else 'no'} terminal" for name, tty in streams.items())
    yield Finding("terminal", "streams", kinds)
    columns, rows = shutil.get_terminal_size()
    room = "charts need 60x16" if columns < 60 or rows < 16 else "room for charts"
    yield Finding("terminal", "size", f"{columns}x{rows}, {room}" if around.stdout_tty else "no screen")
    yield Finding(
        "terminal", "TERM", f"{around.term or 'not set'}" + (around.term_problem and f", {around.term_problem}")
    )
    encoding = locale.getpreferredencoding(False)
    yield Finding("terminal", "characters", f"{default_glyphs(environment)} charts, encoding {encoding}")
    asked = wanted_ui("auto", environment)
    chosen = choose(asked, around)
    why = f", because {chosen.reason}" if chosen.reason else ""
    setting = f" (R8_UI={asked})" if asked != "auto" else ""
    yield Finding("terminal", "dashboard", f'a run with ui="auto" shows "{chosen.name}"{why}{setting}', True)


def _places(folder: Path) -> Iterator[Finding]:
    places = {"runs and checkpoints": folder, "temporary files": Path(tempfile.gettempdir())}
    for name, place in places.items():
        try:
            fd, probe = tempfile.mkstemp(prefix=".r8-doctor-", dir=place)
            os.close(fd)
            os.unlink(probe)
        except OSError as error:
            problem = error.strerror or type(error).__name__
            text = f"{place}: {problem}; give R8Scheduler another checkpoint_dir and log_dir"
            yield Finding("directories", name, text, False)
            continue
        free = shutil.disk_usage(place).free
        short = free < LITTLE_SPACE
        text = f"{place.resolve()}, {f.size(free)} free" + (": little for checkpoints" if short else "")
        yield Finding("directories", name, text, not short)


def _run(clock: Clock) -> Iterator[Finding]:
    """Train for a second, break the model once, save, resume; say what of it held."""
    # Windows deletes no file that is open, as a run's lock is until the run is forgotten.
    with tempfile.TemporaryDirectory(prefix="r8-doctor-", ignore_cleanup_errors=True) as name:
        try:
            yield from _findings_of_run(Path(name), clock)
        except Exception as error:  # whatever it is, it is what the doctor was asked for
            yield Finding("a run of one second", "failed", f"{type(error).__name__}: {error}", False)


def _findings_of_run(folder: Path, clock: Clock) -> Iterator[Finding]:
    topic = "a run of one second"
    weights = {"w": np.zeros(8, np.float32)}
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(512, 8)).astype(np.float32)
    targets = inputs @ rng.normal(size=8).astype(np.float32)

    def load(source: Any) -> None:
        weights["w"] = source["w"] if isinstance(source, dict) else np.load(source, allow_pickle=False)

    def save(filepath: str) -> None:
        with open(filepath, "wb") as file:
            np.save(file, weights["w"])

    rolled_back = 0
    with R8Scheduler(
        len(inputs), 32, train_duration_seconds=RUN_SECONDS, ui="off", log_dir=folder / "log", clock=clock,
        checkpoint_dir=folder / "checkpoints", save_callback=save, load_callback=load, state_callback=lambda: weights,
    ) as scheduler:  # fmt: skip
        for _ in scheduler.epoch_iterator():
            for indices, lr in scheduler.batch_iterator():
                error = inputs[indices] @ weights["w"] - targets[indices]
                weights["w"] = weights["w"] - lr * (error[:, None] * inputs[indices]).mean(0)
                if scheduler.global_step == 100:
                    weights["w"] = weights["w"] * np.nan
                rolled_back += scheduler.update_with_loss(error * error).rolled_back
        steps = scheduler.global_step
        checkpoint = scheduler.save_checkpoint(is_final=True)
        loss = float(scheduler.catalog.expected_loss.mean())
    yield Finding(topic, "training", f"{f.steps(steps)} steps, loss {f.brief(loss)}", steps > 0)
    back = "a model of NaN was rolled back" if rolled_back else "a model of NaN was not rolled back"
    yield Finding(topic, "rollback", back if steps > 101 else "too few steps for it", steps <= 101 or rolled_back > 0)
    with R8Scheduler.resume_from_checkpoint(
        checkpoint, save, load, ui="off", clock=clock, train_duration_seconds=2 * RUN_SECONDS
    ) as resumed:
        text = f"saved and read back at step {f.steps(resumed.global_step)}"
        yield Finding(topic, "checkpoint", text, resumed.global_step == steps)
    events = list(read_events(folder / "log" / EVENTS_FILE))
    reports = [event for event in events if isinstance(event, LossReported)]
    ended = any(isinstance(event, RunEnded) for event in events)
    yield Finding(topic, "event log", f"{f.steps(len(events))} events", ended and len(reports) == steps)
    if reports:
        cost = sorted(report.r8_seconds for report in reports)[len(reports) // 2]
        yield Finding(topic, "cost", f"the scheduler takes {1e6 * cost:.0f} µs of a step (median)")


def as_text(finding: Finding, topic_before: str) -> str:
    """Return a finding as a line, with its topic above it where that is new."""
    mark = {None: " ", True: "+", False: "!"}[finding.good]
    gap = "\n" if topic_before else ""
    head = "" if finding.topic == topic_before else f"{gap}{finding.topic}\n"
    line = f"{head}{mark} {finding.name:<21} {finding.text}"
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    return line.encode(encoding, "replace").decode(encoding)
