"""The documents' pictures, drawn from the results and from nothing else.

Colours are Okabe and Ito's, which the colour-blind can tell apart; markers and labels differ as well.

python -m benchmarks --pictures
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, SKY, VERMILION, PURPLE, GREY = (
    "#0072b2", "#e69f00", "#009e73", "#56b4e9", "#d55e00", "#cc79a7", "#6e7681",
)  # fmt: skip
STYLE = {
    "font.size": 9.5, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.6,
    "legend.frameon": False, "savefig.dpi": 150, "figure.facecolor": "white",
}  # fmt: skip


ABOVE: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.01, 1), "borderaxespad": 0.1, "fontsize": 8.5}
"""A legend between the title and the axes."""


def data_map(figure: Figure, found: dict[str, Any]) -> None:
    """Mean loss against variability, a point a sample; wrong labels as crosses, what was flagged in rings."""
    axes = figure.subplots()
    x, y = np.array(found["variability"]), np.array(found["mean loss"])
    wrong, flagged = (np.isin(np.arange(len(x)), found[key]) for key in ("wrong", "flagged"))
    axes.scatter(x[~wrong], y[~wrong], 10, color=BLUE, alpha=0.6, edgecolors="none", label=f"right ({(~wrong).sum()})")
    axes.scatter(x[wrong], y[wrong], 20, color=VERMILION, marker="x", linewidths=1, label=f"wrong ({wrong.sum()})")
    label = f"flagged by the noise guard ({flagged.sum()}, {(flagged & wrong).sum()} of them wrong)"
    rings = {"facecolors": "none", "edgecolors": "black", "linewidths": 0.5, "alpha": 0.6}
    axes.scatter(x[flagged], y[flagged], 50, label=label, **rings)
    axes.set(xlabel="variability of the loss (standard deviation over the run)", ylabel="mean loss over the run")
    axes.set_title(f"{len(x)} handwritten digits, a fifth of the labels wrong; only losses were looked at", pad=24)
    axes.text(0.01, 0.95, "hard, or wrong", transform=axes.transAxes, color=GREY, style="italic")
    axes.text(0.6, 0.03, "easy", transform=axes.transAxes, color=GREY, style="italic")
    axes.legend(**ABOVE, ncols=3, handletextpad=0.1)


ARMS = {"auto": (BLUE, "o"), "curriculum": (GREEN, "s"), "infobatch": (ORANGE, "D"), "prioritized": (VERMILION, "v")}


def learning(figure: Figure, found: dict[str, Any]) -> None:
    """Gains over uniform with intervals, a row a task, a colour a strategy; the scale is linear near 0 only."""
    tasks = list(found["tasks"])
    axes = figure.subplots()
    for place, (arm, (colour, marker)) in enumerate(ARMS.items()):
        rows_of = [found["tasks"][task] for task in tasks]  # not every strategy was run on every task
        gains = np.array([row[arm]["against matched uniform"] if arm in row else (np.nan, np.nan) for row in rows_of])
        rows = np.arange(len(tasks)) + (place - (len(ARMS) - 1) / 2) * 0.19
        axes.errorbar(gains[:, 0], rows, xerr=gains[:, 1], fmt=marker, ms=4, lw=1, color=colour, label=f'"{arm}"')
    axes.axvline(0, color="black", lw=0.8)
    for row in range(0, len(tasks), 2):
        axes.axhspan(row - 0.5, row + 0.5, color=GREY, alpha=0.07, lw=0)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xscale("symlog", linthresh=2, linscale=0.8)
    ticks = [-20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20]
    axes.set_xticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(
        "gain over a blind shuffle with as many gradients\n"
        "points of accuracy; friedman, characters and diabetes: per cent of the loss"
    )
    axes.set_title(f"{found['seeds']} seeds, 95% intervals; “10%” is the share of wrong labels", pad=24)
    axes.legend(**ABOVE, ncols=len(ARMS))


def divergence(figure: Figure, found: dict[str, Any]) -> None:
    """Training losses of a plain loop and of a protected run, for each fault."""
    titles = {"bad rate": "Learning rate × 1000 for three steps", "bad pixel": "One training image holds infinity"}
    rivals = {"plain loop": VERMILION, "learnit_r8": BLUE}
    sides = figure.subplots(1, 2, sharey=True)
    for axes, (kind, title) in zip(sides, titles.items(), strict=True):
        for name, colour in rivals.items():
            end = found["rivals"][name][kind]
            losses = np.array([np.nan if loss is None else loss for loss in end["losses"]], float)
            _smoothed(axes, losses, colour, f"{name}: " + (f"{end['accuracy']:.1%}" if end["finite"] else "NaN"))
            gone = np.flatnonzero(np.isnan(losses))
            if len(gone) and not end["finite"]:
                axes.axvspan(gone[0], len(losses), color=colour, alpha=0.1, lw=0)
                place = {"transform": axes.get_xaxis_transform(), "ha": "center"}
                text = f"{name}: every loss is NaN"
                axes.text((gone[0] + len(losses)) / 2, 0.92, text, color=colour, fontsize=8.5, **place)
        axes.set(yscale="log", xlabel="step", title=title)
        axes.legend(loc="lower left", fontsize=8.5, title="test accuracy at the end", title_fontsize=8.5)
    sides[0].set_ylabel("training loss (mean of 10 steps)")
    place = {"xycoords": "axes fraction", "fontsize": 8.5, "color": BLUE}
    sides[0].annotate("rolled back, then\neasy samples first", (0.66, 0.16), **place)


def _smoothed(axes: Axes, losses: np.ndarray, colour: str, label: str) -> None:
    finite = np.where(np.isfinite(losses), losses, np.nan)
    groups = finite[: len(finite) // 10 * 10].reshape(-1, 10)
    seen = np.isfinite(groups).any(1)
    means = np.full(len(groups), np.nan)
    means[seen] = np.nanmean(groups[seen], 1)
    axes.plot(np.arange(len(groups)) * 10 + 5, means, color=colour, lw=1.4, label=label)


def speed(figure: Figure, found: dict[str, Any]) -> None:
    """Microseconds of a step's draw and update over the size of the data set."""
    axes = figure.subplots()
    rows = [row for row in found["steps"] if row["B"] == 256]
    lines = {
        "published_us": ("the published algorithm (Python lists, a full sort a batch)", VERMILION, "s"),
        "r8_us": ("learnit_r8: draw, detector, catalog", BLUE, "o"),
        "torch_us": ("torch's blind RandomSampler: draw only", GREY, "^"),
    }
    for key, (label, colour, marker) in lines.items():
        points = [(row["N"], row[key]) for row in rows if row[key] is not None]
        axes.plot(*zip(*points, strict=True), marker=marker, color=colour, label=label)
        axes.annotate(
            f"{points[-1][1]:,.0f} µs", points[-1], (6, 6), textcoords="offset points", color=colour, fontsize=8.5
        )
    axes.set(xscale="log", yscale="log", xlabel="samples in the data set", ylabel="microseconds a step, batches of 256")
    axes.set_title("What choosing costs", pad=10)
    axes.margins(x=0.12, y=0.12)
    axes.legend(loc="upper left", fontsize=8.5)


PICTURES: dict[str, tuple[Callable[[Figure, dict[str, Any]], None], str, tuple[float, float]]] = {
    # file: (what draws it, whose results, size in inches)
    "data-map.png": (data_map, "datamap", (7.2, 4.6)),
    "learning.png": (learning, "learning", (7.6, 8.4)),
    "divergence.png": (divergence, "rivals", (8.4, 3.4)),
    "speed.png": (speed, "speed", (6.4, 4.0)),
}


def draw(results: Path, pictures: Path) -> Iterator[Path]:
    """Draw every picture whose results there are, and yield the files."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from PIL import Image

    pictures.mkdir(parents=True, exist_ok=True)
    for name, (function, source, size) in PICTURES.items():
        file = results / f"{source}.json"
        if not file.is_file():
            continue
        with rc_context(STYLE):
            figure = Figure(figsize=size, layout="constrained")
            function(figure, json.loads(file.read_text("utf8"))["results"])
            # No version or date in the file: the same results give the same bytes.
            raw = io.BytesIO()
            figure.savefig(raw, metadata={"Software": None})
        Image.open(raw).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(pictures / name, optimize=True)
        yield pictures / name
