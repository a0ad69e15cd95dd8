"""The charts of a report, as Bokeh figures that share one step axis.

Colours are of medium lightness, so that they can be read on white and on near black; the page's script gives axes and
grids the colours of the theme. No `CustomJS`: the page's policy forbids `eval`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from bokeh.models import (
    BasicTickFormatter,
    ColumnDataSource,
    DataRange1d,
    FixedTicker,
    HoverTool,
    NumeralTickFormatter,
    Range1d,
)
from bokeh.plotting import figure
from bokeh.transform import linear_cmap

from learnit_r8 import events as e
from learnit_r8.report.bands import BINS, Band, Floats, band, wants_log
from learnit_r8.report.run_data import RunData
from learnit_r8.run import formats as f
from learnit_r8.run.journal import entry
from learnit_r8.run.metric import is_part
from learnit_r8.run.samples_file import MAX_SAMPLES

COLOURS = ("#3f83d0", "#e07b2c", "#35a06a", "#b65fc0", "#c9a227", "#2aa3a8", "#d0567a", "#8a7a5c")
"""One a run, in their order; used again from the start when there are more."""
_RED, _GREEN, _GREY = "#d8434e", "#35a06a", "#8a8f98"
_CORRECTNESS = ("#d8434e", "#e07b2c", "#dfa637", "#b9b45a", "#79b08e", "#4f9ac0", "#3f83d0")
"""Never below ln 2 to always."""
_TOOLS = "xpan,xwheel_zoom,box_zoom,reset,save"
_MARKS_KEPT = 2000
_LEFT = 72
"""Pixels left of the loss and of what happened below it, so that their steps lie under each other."""
_IDS_SHOWN = 12
_METRICS_SHOWN = 12
Figure = Any
_STRIP: tuple[tuple[str, type[e.Event], str, str], ...] = (
    ("quarantine", e.SampleQuarantined, "square", _RED),
    ("phase", e.PhaseChanged, "diamond", _GREY),
    ("checkpoint", e.CheckpointSaved, "circle", _GREEN),
    ("rollback", e.RolledBack, "triangle", "#e07b2c"),
    ("spike", e.SpikeSeen, "inverted_triangle", _RED),
)


def colour(number: int) -> str:
    """Return the colour of the run of that number."""
    return COLOURS[number % len(COLOURS)]


def step_axis(runs: Sequence[RunData]) -> Range1d:
    """Return the x axis that all charts over steps share: it spans all their steps, and panning one pans all."""
    low = min(float(run.table.columns["step"].min()) for run in runs)
    high = max(float(run.table.columns["step"].max()) for run in runs)
    room = max(1.0, high - low) * 0.01
    return Range1d(start=low - room, end=high + room)


def _over_steps(axis: Range1d, label: str, height: int, values: Floats) -> Figure:
    """Return an empty chart over steps whose y scale suits the values."""
    return _figure(label, height, values, x_range=axis, x_axis_label="step")


def _figure(label: str, height: int, values: Floats | None = None, **more: Any) -> Figure:
    """Return an empty chart; its y axis is logarithmic where that shows the values better."""
    values = np.empty(0) if values is None else values[np.isfinite(values)]
    log = wants_log(values)
    more |= {"y_axis_type": "log"} if log else {}
    fig = figure(height=height, sizing_mode="stretch_width", tools=_TOOLS, y_axis_label=label, **more)
    if log and (ticks := _log_ticks(values)):
        fig.yaxis.ticker = fig.ygrid.ticker = FixedTicker(ticks=ticks)
        fig.yaxis.formatter = BasicTickFormatter(use_scientific=True, power_limit_low=-4, power_limit_high=6)
    # Transparent from the start: what was once painted white leaves an edge when the theme is dark.
    fig.background_fill_color = fig.border_fill_color = None
    fig.toolbar.logo = None
    fig.toolbar.autohide = False
    fig.xaxis.axis_label_text_font_style = fig.yaxis.axis_label_text_font_style = "normal"
    fig.min_border_right = 12
    if more.get("x_axis_label") == "step":
        fig.xaxis.formatter = NumeralTickFormatter(format="0,0")
    return fig


def _log_ticks(values: Floats) -> list[float]:
    """Return ticks of a log axis of less than two decades, which Bokeh would leave all but bare; else none."""
    low, high = float(values.min()), float(values.max())
    if high >= 100 * low:
        return []
    mantissas = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 5, 7)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    return [mantissa * 10.0**decade for decade in decades for mantissa in mantissas]


def _hover(fig: Figure, tooltips: list[tuple[str, str]], renderers: list[Any], **more: Any) -> None:
    fig.add_tools(HoverTool(tooltips=tooltips, renderers=renderers, **more))


def _joined(fig: Figure, x: Any, y: Any, **more: Any) -> list[Any]:
    """Draw points with a line through them, and return both."""
    source, dash = ColumnDataSource({"x": x, "y": y}), more.pop("line_dash", "solid")
    line = fig.line("x", "y", source=source, line_width=2, line_dash=dash, **more)
    return [line, fig.scatter("x", "y", source=source, size=5, **more)]


def _legend(fig: Figure, several: bool) -> None:
    """Several runs have a legend whose entries hide them; one run needs none."""
    for legend in fig.legend:
        legend.visible = several
        legend.click_policy = "hide"
        legend.location = "top_right"
        legend.padding, legend.spacing = 4, 0


def _band_lines(fig: Figure, found: Band, run: RunData, number: int, *, smooth: bool) -> None:
    """Draw the band of extremes, and the smoothed line (or the bins' means) over it."""
    shade = colour(number)
    columns = {"x": found.middle, "first": found.first, "last": found.last, "low": found.low, "high": found.high}
    source = ColumnDataSource(columns | {"line": found.smooth if smooth else found.mean})
    common = {"source": source, "color": shade, "legend_label": run.name}
    fig.varea("x", "low", "high", alpha=0.28, **common)
    # An edge as well: one bin's spike is a thin needle, and bins of one point have no area.
    fig.line("x", "high", alpha=0.5, **common)
    line = fig.line("x", "line", line_width=2, **common)
    label = "smoothed" if smooth else "mean"
    tips = [("run", run.name), ("steps", "@first{0,0} to @last{0,0}"), (label, "@line"), ("from", "@low to @high")]
    _hover(fig, tips, [line], mode="vline", line_policy="nearest", limit=1)


def loss(runs: Sequence[RunData], axis: Range1d) -> Figure:
    """Return the chart of the loss: band, moving average, and the validation losses as points."""
    fig = _over_steps(axis, "loss", 340, np.concatenate([run.table.columns["loss"] for run in runs]))
    fig.min_border_left = _LEFT
    for number, run in enumerate(runs):
        columns = run.table.columns
        _band_lines(fig, band(columns["step"], columns["loss"]), run, number, smooth=True)
        if name := validation(run):
            steps, values = _thin(*run.metrics[name])
            source = ColumnDataSource({"x": steps, "y": values})
            points = fig.scatter("x", "y", source=source, color=colour(number), line_color="#8a8f98", size=7)
            _hover(fig, [("run", run.name), (name, "@y"), ("step", "@x{0,0}")], [points])
    _legend(fig, len(runs) > 1)
    return fig


def validation(run: RunData) -> str:
    """Return the name of the run's validation loss, or nothing."""
    return next((name for name in ("val_loss", "val/loss", "eval_loss", "valid_loss") if name in run.metrics), "")


def learning_rate(runs: Sequence[RunData], axis: Range1d) -> Figure:
    """Return the chart of the learning rate."""
    return _banded(runs, axis, "learning rate", lambda run: run.table.columns["lr"], log=False)


def throughput(runs: Sequence[RunData], axis: Range1d) -> Figure:
    """Return the chart of samples a second, from what each step took."""

    def rate(run: RunData) -> Floats:
        columns = run.table.columns
        seconds = columns["step_seconds"] + columns["r8_seconds"]
        found: Floats = np.divide(columns["size"], seconds, out=np.full(len(seconds), np.nan), where=seconds > 0)
        return found

    fig = _banded(runs, axis, "samples / s", rate, log=True)
    fig.yaxis.formatter = NumeralTickFormatter(format="0.[0]a")
    return fig


def _banded(
    runs: Sequence[RunData], axis: Range1d, label: str, values: Callable[[RunData], Floats], *, log: bool
) -> Figure:
    found = [values(run) for run in runs]
    fig = _over_steps(axis, label, 240, np.concatenate(found) if log else np.empty(0))
    if isinstance(fig.y_range, DataRange1d) and len(highest := found[0][np.isfinite(found[0])]):
        fig.y_range.default_span = float(abs(highest.max())) or 1.0  # of values that are all equal
    for number, (run, series) in enumerate(zip(runs, found, strict=True)):
        _band_lines(fig, band(run.table.columns["step"], series, decay=None), run, number, smooth=False)
    _legend(fig, len(runs) > 1)
    return fig


def metrics(runs: Sequence[RunData], axis: Range1d) -> dict[str, Figure]:
    """Return a chart for each number that the user logged, the first dozen; parts of a norm have one together."""
    logged = [run.metrics for run in runs]
    names = dict.fromkeys(name for name in itertools.chain.from_iterable(logged) if not is_part(name))
    charts = {}
    for name in list(names)[:_METRICS_SHOWN]:
        fig = _over_steps(axis, name, 220, np.concatenate([found[name][1] for found in logged if name in found]))
        for number, (run, found) in enumerate(zip(runs, logged, strict=True)):
            if name not in found:
                continue
            steps, values = found[name]
            if len(steps) > BINS:
                _band_lines(fig, band(steps, values), run, number, smooth=True)
                continue
            _, points = _joined(fig, steps, values, color=colour(number), legend_label=run.name)
            _hover(fig, [("run", run.name), (name, "@y"), ("step", "@x{0,0}")], [points], mode="vline", limit=1)
        _legend(fig, len(runs) > 1)
        charts[name] = fig
    return charts


def gradient(run: RunData, axis: Range1d) -> Figure | None:
    """Return the chart of the gradient's norm in each part of the model; None where none is known."""
    found = {name.partition("/")[2]: series for name, series in run.metrics.items() if is_part(name)}
    if not found:
        return None
    fig = _over_steps(axis, "norm of the gradient", 260, np.concatenate([values for _, values in found.values()]))
    for number, (name, (steps, values)) in enumerate(found.items()):
        x, y = _thin(steps, values)
        line = fig.line("x", "y", source=ColumnDataSource({"x": x, "y": y}), color=colour(number), legend_label=name)
        _hover(fig, [(name, "@y"), ("step", "@x{0,0}")], [line], limit=1)
    _legend(fig, several=True)
    return fig


def _thin(steps: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Keep every point of a short series, and evenly spaced ones of a long one."""
    keep = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), BINS)).astype(int))
    return steps[keep], values[keep]


def timeline(run: RunData, axis: Range1d) -> Figure | None:
    """Return what happened when: spikes with their batch's samples, rollbacks, checkpoints; None if nothing did."""
    rows = [(name, run.of(kind)[:_MARKS_KEPT], marker, shade) for name, kind, marker, shade in _STRIP]
    rows = [row for row in rows if row[1]]
    if not rows:
        return None
    fig = _figure("", 90 + 26 * len(rows), x_range=axis, x_axis_label="step", y_range=[row[0] for row in rows])
    fig.ygrid.visible = False
    fig.min_border_left = _LEFT
    for name, found, marker, shade in rows:
        columns: dict[str, list[Any]] = {
            "x": [event.step for event in found],
            "y": [name] * len(found),
            "at": [f.of_day(event.time, None, "%d %b %H:%M:%S") for event in found],
            "text": [line.text if (line := entry(event)) else "" for event in found],
            "ids": [sample_list(getattr(event, "indices", ()), _IDS_SHOWN) for event in found],
        }
        source = ColumnDataSource(columns)
        points = fig.scatter("x", "y", source=source, marker=marker, size=11, color=shade, alpha=0.8)
        tips = [("", f"{name} at step @x{{0,0}}, @at"), ("", "@text")]
        _hover(fig, tips + ([("samples", "@ids")] if any(columns["ids"]) else []), [points], limit=5)
    return fig


def sample_list(indices: Sequence[int | str], most: int) -> str:
    """Return ids as text, `most` of them."""
    shown = " ".join(str(index) for index in indices[:most])
    return f"{shown} … ({len(indices)} in all)" if len(indices) > most else shown


def quadrant_edges(run: RunData) -> Figure | None:
    """Return the quartile edges of the loss at each epoch's start; None before the second epoch."""
    found = run.of(e.QuadrantsRefreshed)
    if not found:
        return None
    edges = np.array([event.edges for event in found], float)
    epochs = np.array([event.epoch + 1 for event in found], float)
    fig = _figure("loss", 260, edges.ravel(), x_axis_label="epoch")
    names = ("lowest", "Q1 | Q2", "Q2 | Q3", "Q3 | Q4", "highest")
    for number, name in enumerate(names):
        style = "dotted" if number in (0, 4) else "solid"
        drawn = _joined(fig, epochs, edges[:, number], color=_DIFFICULTY[number], line_dash=style)
        _hover(fig, [("edge", name), ("loss", "@y"), ("epoch", "@x")], drawn, limit=1)
    return fig


_DIFFICULTY = ("#2f7fb8", "#35a06a", "#c9a227", "#e07b2c", _RED)


def migration(run: RunData) -> Figure | None:
    """Return the share of each quadrant's samples that ended an epoch in an easier one; None while unknown."""
    found = [event for event in run.of(e.QuadrantsRefreshed) if any(share > 0 for share in event.easier)]
    if not found:
        return None
    fig = _figure("moved to an easier quadrant", 260, x_axis_label="epoch", y_range=DataRange1d(start=0))
    fig.yaxis.formatter = NumeralTickFormatter(format="0%")
    for quadrant in (1, 2, 3):
        name, shares = f"Q{quadrant + 1}", [event.easier[quadrant] for event in found]
        epochs, shade = [event.epoch + 1 for event in found], _DIFFICULTY[quadrant + 1]
        _, points = _joined(fig, epochs, shares, color=shade, legend_label=f"from {name}")
        _hover(fig, [("from", name), ("epoch", "@x"), ("easier", "@y{0.0%}")], [points], limit=1)
    _legend(fig, True)
    return fig


def data_map(run: RunData, most: int = MAX_SAMPLES) -> Figure | None:
    """Return each sample's mean loss against its variability (Swayamdipta et al. 2020); None where none is logged.

    Of more than `most` samples some are shown, all suspects among them.
    """
    catalog = run.catalog
    if catalog is None or not catalog.uses.any():
        return None
    suspect = np.isin(catalog.ids, catalog.suspects[:50])
    keep = catalog.uses > 0
    stride = -(-int(keep.sum()) // most)
    keep &= suspect | (np.arange(len(keep)) % stride == 0)
    columns: dict[str, Any] = {
        "id": catalog.ids[keep].astype(np.uint32),
        "x": catalog.variability[keep],
        "y": catalog.mean_loss[keep],
        "now": catalog.expected_loss[keep],
        "correct": catalog.correctness[keep],
        "uses": catalog.uses[keep],
    }
    tips = [("sample", "@id"), ("mean loss", "@y"), ("variability", "@x"), ("loss now", "@now")]
    tips += [("below ln 2", "@correct{0%} of @uses")]
    if catalog.groups is not None:
        columns["group"] = catalog.groups[keep].astype(np.int32)
        tips.insert(1, ("class", "@group"))
    fig = _figure("mean loss", 420, columns["y"], x_axis_label="variability (standard deviation)")
    fig.tools = [tool for tool in fig.tools if "X" not in type(tool).__name__]
    fig.add_tools("pan", "wheel_zoom")
    shade = linear_cmap("correct", _CORRECTNESS, 0, 1)
    size = 3 if len(columns["id"]) > 20_000 else 5
    source = ColumnDataSource(columns)
    points = fig.scatter("x", "y", source=source, size=size, color=shade, alpha=0.65, line_color=None)
    worst = ColumnDataSource({name: values[suspect[keep]] for name, values in columns.items()})
    rings = fig.scatter("x", "y", source=worst, size=10, fill_alpha=0, line_color=_RED, line_width=1.5)
    _hover(fig, tips, [points, rings], limit=3)
    return fig
