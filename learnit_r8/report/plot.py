"""`r8 plot`: a run's curves as a picture for a paper or a chat, or as CSV for any other tool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from learnit_r8 import events as e
from learnit_r8.errors import ConfigError
from learnit_r8.report.bands import band, wants_log
from learnit_r8.report.run_data import RunData

CSV_BINS = 2000
_MARKS: tuple[tuple[type[e.Event], str, str, str, float], ...] = (
    (e.SpikeSeen, "spike", "#d8434e", "v", 0.985),
    (e.RolledBack, "rollback", "#e07b2c", "v", 0.96),
    (e.CheckpointSaved, "checkpoint", "#35a06a", "^", 0.015),
)


def as_csv(run: RunData) -> str:
    """Return the course of a run as CSV: one line a step, or a bin of steps where there are more than 2000.

    Columns: first_step, last_step, time (seconds since the Unix epoch, at the bin's end), loss_min, loss_max,
    loss_mean, loss_smoothed, lr. A bin without a finite loss has empty fields.
    """
    columns = run.table.columns
    loss = band(columns["step"], columns["loss"], CSV_BINS)
    times = band(columns["time"], columns["time"], CSV_BINS).last
    lr = band(columns["step"], columns["lr"], CSV_BINS).mean
    lines = ["first_step,last_step,time,loss_min,loss_max,loss_mean,loss_smoothed,lr"]
    for row in zip(loss.first, loss.last, times, loss.low, loss.high, loss.mean, loss.smooth, lr, strict=True):
        first, last, *values = row
        fields = [f"{values[0]:.3f}", *("" if np.isnan(value) else f"{value:.9g}" for value in values[1:])]
        lines.append(",".join([str(int(first)), str(int(last)), *fields]))
    return "\n".join(lines)


def write_png(runs: Sequence[RunData], path: Path) -> None:
    """Draw loss and learning rate of runs, 1600 x 1000 pixels; the events of the first are marked.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(['--png needs matplotlib: pip install "learnit_r8[report]", or use --csv']) from error
    figure = Figure(figsize=(10, 6.25), dpi=160, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bands = [band(run.table.columns["step"], run.table.columns["loss"]) for run in runs]
    for number, (run, found) in enumerate(zip(runs, bands, strict=True)):
        colour = f"C{number % 10}"
        top.fill_between(found.middle, found.low, found.high, color=colour, alpha=0.25, linewidth=0.6)
        top.plot(found.middle, found.smooth, color=colour, label=_plain(run.name))
        rate = band(run.table.columns["step"], run.table.columns["lr"])
        bottom.plot(rate.middle, rate.mean, color=colour)
    for kind, name, colour, marker, place in _MARKS:
        steps = [event.step for event in runs[0].of(kind)]
        if steps:
            where = {"transform": top.get_xaxis_transform(), "ls": ""}
            top.plot(steps, [place] * len(steps), marker, color=colour, ms=5, label=name, **where)
    if wants_log(np.concatenate([array for found in bands for array in (found.low, found.high)])):
        top.set_yscale("log")
    top.set_ylabel("loss (smoothed, min to max)")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    top.legend(loc="upper right", fontsize="small")
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
    figure.savefig(path, format="png")


def _plain(name: str) -> str:
    """Return a name in which matplotlib sees neither mathematics nor a hidden label."""
    return name.replace("$", r"\$").lstrip("_") or "run"
