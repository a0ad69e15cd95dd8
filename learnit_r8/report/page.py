"""A finished run, or several, as one HTML file that needs nothing else: no network, no server, no other file.

The page's content security policy forbids every request, so a mistake here or in the chart library cannot make one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from bokeh.embed import components
from bokeh.resources import Resources

from learnit_r8 import events as e
from learnit_r8._version import __version__
from learnit_r8.report import figures
from learnit_r8.report.bands import DECAY, band
from learnit_r8.report.run_data import RunData
from learnit_r8.report.suspects import rows, verdict
from learnit_r8.run import formats as f
from learnit_r8.run.samples_file import MAX_SAMPLES, CatalogSnapshot

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)
_SUSPECTS_SHOWN = 200
_SPIKES_SHOWN = 300
_IDS_SHOWN = 512
_KEYS = "Keys while a chart has the focus: arrows move, + and − zoom, 0 shows all."


class _Charts:
    """Collects figures; each gets a place in the page."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self.titles: list[str] = []

    def card(self, title: str, about: str, figure: Any, *, wide: bool = False) -> str:
        """Return a card with a chart in it; nothing where there is no chart."""
        if figure is None:
            return ""
        name = f"chart{len(self.found)}"
        figure.name = name
        self.found[name] = figure
        self.titles.append(title)
        label = escape(f"{title}. {about}", quote=True)
        names = f'data-chart="{name}" data-title="{escape(title, quote=True)}"'
        inside = f'<div class="chart" tabindex="0" role="group" aria-label="{label}" {names}>@{name}@</div>'
        return _card(title, f'<p class="dim">{escape(about)}</p>{inside}', wide=wide)


def write_report(runs: Sequence[RunData], path: Path) -> None:
    """Write the report of one or several runs.

    Args:
        runs: In the order in which they are shown.
        path: The HTML file; an earlier one is replaced.

    Raises:
        OSError: It could not be written.
    """
    draft = path.with_name(f".{path.name}.tmp")
    try:
        draft.write_text(page(runs), encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def page(runs: Sequence[RunData], live: bool = False) -> str:
    """Return the report as HTML.

    Args:
        runs: In the order in which they are shown.
        live: A server keeps it up to date (`serve.py`): the page asks where it came from, and nobody else.
    """
    charts = _Charts()
    title = " · ".join(run.name for run in runs)
    body = [
        '<a class="skip" href="#main">Skip to the charts</a>',
        f"<header><h1>{escape(title)}</h1>",
        f'<p class="dim">learnit::r8 {escape(__version__)} run report. {escape(_KEYS)}</p>',
        '<p class="dim" id="live" role="status"></p>' if live else "",
        '<nav aria-label="Sections"><a href="#summary">Summary</a><a href="#main">Course of training</a>'
        '<a href="#samples">Samples and events</a><a href="#run">Configuration and console</a></nav></header>',
        f'<div id="overview">{_summary(runs)}</div>',
        f'<main id="main"><h2>Course of training</h2><div class="grid">{"".join(_course(runs, charts))}</div>',
        _side_by_side("samples", "Samples and events", runs, charts, _samples),
        _side_by_side("run", "Configuration and console", runs, charts, _settings),
        "</main>",
    ]
    html = "\n".join(body)
    name_sources(charts.found)
    policy = _POLICY + ("; connect-src 'self'" if live else "")
    script, places = components(charts.found)
    for name, place in places.items():
        html = html.replace(f"@{name}@", place, 1)
    parts = files("learnit_r8.report")
    return "\n".join(
        [
            "<!DOCTYPE html>",
            f'<html lang="en"{" data-live" if live else ""}><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{parts.joinpath('page.css').read_text(encoding='utf-8')}</style>",
            *(f"<script>{code}</script>" for code in Resources(mode="inline", components=["bokeh"]).js_raw),
            f"<script>{parts.joinpath('page.js').read_text(encoding='utf-8')}</script>",
            f"</head><body>{html}",
            f"{script}</body></html>",
        ]
    )


def name_sources(found: dict[str, Any]) -> dict[str, Any]:
    """Name the data sources of the charts, in the order that drawing a run again gives, and return them."""
    sources = {}
    for chart, figure in found.items():
        for i, renderer in enumerate(figure.renderers):
            source = getattr(renderer, "data_source", None)
            if source is not None and not source.name:
                source.name = f"{chart}.{i}"
                sources[source.name] = source
    return sources


def refreshed(runs: Sequence[RunData]) -> dict[str, Any]:
    """Return what has to change in a page that shows earlier states of the runs.

    Returns:
        `sources`: columns by the data source's name; `titles`: of all charts; `steps`: the ends of the step axis;
        `html`: parts of the page.
    """
    charts = _Charts()
    for _ in _course(runs, charts):
        pass
    for number, run in enumerate(runs):
        for _ in _samples(run, number, len(runs), charts):
            pass
    sources = {
        name: {column: _strict(values) for column, values in source.data.items()}
        for name, source in name_sources(charts.found).items()
    }
    axis = figures.StepAxis(runs).range
    return {
        "sources": sources,
        "titles": charts.titles,
        "steps": [axis.start, axis.end],
        "html": {"overview": _summary(runs)},
    }


def _strict(values: Any) -> list[Any]:
    """Return a column as strict JSON: what is not finite is null."""
    plain = values.tolist() if hasattr(values, "tolist") else list(values)
    return [None if isinstance(value, float) and not math.isfinite(value) else value for value in plain]


def _card(title: str, inside: str, *, wide: bool = False) -> str:
    if not inside:
        return ""
    return f'<section class="card{" wide" if wide else ""}"><h3>{escape(title)}</h3>{inside}</section>'


def _side_by_side(name: str, title: str, runs: Sequence[RunData], charts: _Charts, part: Any) -> str:
    """Return a part of the page that every run has its own column of."""
    columns = []
    for number, run in enumerate(runs):
        head = f"<p><strong>{_dot(number)}{escape(run.name)}</strong></p>" if len(runs) > 1 else ""
        cards = "".join(part(run, number, len(runs), charts))
        columns.append(f'<div class="run">{head}<div class="grid">{cards}</div></div>')
    return f'<h2 id="{name}">{escape(title)}</h2><div class="side">{"".join(columns)}</div>'


def _dot(number: int) -> str:
    return f'<span class="dot" style="background:{figures.colour(number)}"></span>'


def _summary(runs: Sequence[RunData]) -> str:
    facts = [_facts(run) for run in runs]
    names = list(dict.fromkeys(itertools.chain.from_iterable(facts)))
    head = "".join(f"<th>{_dot(i)}{escape(run.name)}</th>" for i, run in enumerate(runs))
    lines = []
    for name in names:
        cells = "".join(f"<td>{escape(each.get(name, ''))}</td>" for each in facts)
        lines.append(f'<tr><th class="text">{escape(name)}</th>{cells}</tr>')
    body = "".join(lines)
    problems = "".join(f'<p class="bad">{escape(run.problem)}</p>' for run in runs if run.problem)
    table = f'<table><thead><tr><th class="text"></th>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<h2 id="summary">Summary</h2>{problems}<div class="card scroll" tabindex="0">{table}</div>'


def _facts(run: RunData) -> dict[str, str]:
    columns = run.table.columns
    course = band(columns["step"], columns["loss"], 1)
    steps = int(columns["step"].max()) + 1
    facts = {
        "state": run.state,
        "steps": f.steps(steps),
        "time": f.span(run.seconds),
        "loss, smoothed at the end": f.brief(float(course.smooth[-1])),
        "lowest loss": f.brief(float(course.low[0])),
        "highest loss": f.brief(float(course.high[0])),
        "losses not finite": f.steps(int((~_finite(columns["loss"])).sum())),
        "spikes": f.steps(len(run.of(e.SpikeSeen))),
        "rollbacks": f.steps(len(run.of(e.RolledBack))),
        "checkpoints": f.steps(len(run.of(e.CheckpointSaved))),
        "samples held back": f.steps(len({i for event in run.of(e.SampleQuarantined) for i in event.indices})),
    }
    if run.table.abandoned:
        facts["steps taken back by a resume"] = f.steps(run.table.abandoned)
    for name, (_, values) in itertools.islice(run.metrics.items(), 12):
        facts[f"{name}, last"] = f.brief(float(values[-1]))
    return facts


def _finite(values: Any) -> Any:
    return abs(values) < math.inf


def _course(runs: Sequence[RunData], charts: _Charts) -> Iterable[str]:
    axis = figures.StepAxis(runs)
    about = f"Band: lowest to highest loss of neighbouring batches. Line: moving average (decay {DECAY:g})."
    about += " Dots: validation loss." if any(map(figures.validation, runs)) else ""
    yield charts.card("Loss", about, figures.loss(runs, axis), wide=True)
    for run in runs:
        figure = figures.timeline(run, axis)
        name = f"What happened: {run.name}" if len(runs) > 1 else "What happened"
        yield charts.card(name, "Hover a mark for the samples of its batch.", figure, wide=True)
    yield charts.card("Learning rate", "As used by each step.", figures.learning_rate(runs, axis))
    yield charts.card("Throughput", "Samples a second within steps.", figures.throughput(runs, axis))
    for name, figure in figures.metrics(runs, axis).items():
        yield charts.card(name, "Logged by the run.", figure)


def _samples(run: RunData, number: int, count: int, charts: _Charts) -> Iterable[str]:
    chart = figures.data_map(run, MAX_SAMPLES // count)
    about = (
        "A point a sample. Low and left: learned. Right: the loss varies. High and left: never learned, "
        "often a wrong label. Blue: mostly below ln 2; red: never. Rings: the 50 worst suspects."
    )
    yield charts.card("Data map", about, chart, wide=True)
    if run.catalog is not None:
        yield _card("Suspects", _suspects_table(run.catalog, run, number), wide=True)
    about = "Quartiles of the samples' loss at each epoch; dotted: the lowest and the highest."
    yield charts.card("Quadrant edges", about, figures.quadrant_edges(run))
    yield charts.card("Migration", "Samples that ended an epoch in an easier quadrant.", figures.migration(run))
    yield _card("Spikes and rollbacks", _spikes_table(run, number), wide=True)
    yield _card("Where the time went", _time_bars(run, number), wide=True)


def _suspects_table(catalog: CatalogSnapshot, run: RunData, number: int) -> str:
    found = rows(catalog, _SUSPECTS_SHOWN)
    if not found:
        return '<p class="dim">No sample has been seen yet.</p>'
    columns = ["rank", "sample", "mean loss", "loss now", "variability", "below ln 2", "trained on"]
    grouped = any(row.group is not None for row in found)
    columns[2:2] = ["class"] if grouped else []
    columns += ["flagged"] if catalog.num_flagged else []
    body = []
    for row in found:
        cells: list[Any] = [row.rank, row.id]
        cells += [row.group] if grouped else []
        cells += [row.mean_loss, row.expected_loss, row.variability, row.correctness, row.uses]
        cells += ["yes" if row.flagged else ""] if catalog.num_flagged else []
        body.append(cells)
    about = f"The samples of the highest mean loss. {verdict(catalog)} Click a heading to sort."
    return f'<p class="dim">{about}</p>' + _table(f"suspects{number}", f"{run.name}-suspects.csv", columns, body)


def _spikes_table(run: RunData, number: int) -> str:
    events: list[e.SpikeSeen | e.RolledBack | e.RollbackFailed]
    events = [*run.of(e.SpikeSeen), *run.of(e.RolledBack), *run.of(e.RollbackFailed)]
    events.sort(key=lambda event: (event.step, event.time))
    if not events:
        return '<p class="dim">None.</p>'
    body: list[list[Any]] = []
    for event in events[:_SPIKES_SHOWN]:
        when = f.of_day(event.time, None, "%Y-%m-%d %H:%M:%S")
        if isinstance(event, e.SpikeSeen):
            ids = figures.sample_list(event.indices, _IDS_SHOWN)
            body.append([event.step, when, event.verdict, event.loss, event.expected_loss, ids])
        elif isinstance(event, e.RolledBack):
            source = "a backup in RAM" if event.source == "ram" else event.source
            text = f"to step {event.to_step} from {source}, learning rate × {event.lr_multiplier:g}"
            body.append([event.step, when, "rollback", "", "", text])
        else:
            body.append([event.step, when, "no rollback", "", "", event.reason])
    left = len(events) - len(body)
    more = f'<p class="dim">The first {len(body)}; {left} more are in the log.</p>' if left else ""
    columns = ["step", "time", "what", "loss", "expected", "samples of the batch"]
    return more + _table(f"spikes{number}", f"{run.name}-spikes.csv", columns, body)


_TEXT_COLUMNS = {"time": "word", "what": "word", "samples of the batch": "text", "flagged": "word"}


def _table(name: str, file: str, columns: Sequence[str], body: Iterable[Sequence[Any]]) -> str:
    """Return a sortable table with a button that saves it as CSV; numbers keep all digits there."""
    kinds = [f' class="{_TEXT_COLUMNS[column]}"' if column in _TEXT_COLUMNS else "" for column in columns]
    head = "".join(
        f'<th scope="col" aria-sort="none"{kind}><button type="button">{escape(column)}</button></th>'
        for column, kind in zip(columns, kinds, strict=True)
    )
    lines = []
    for cells in body:
        parts = []
        for cell, kind in zip(cells, kinds, strict=True):
            exact = f' data-value="{cell:.9g}"' if isinstance(cell, float) else ""
            parts.append(f"<td{kind}{exact}>{escape(_shown(cell))}</td>")
        lines.append(f"<tr>{''.join(parts)}</tr>")
    button = f'<button type="button" class="csv" data-table="{name}" data-file="{escape(file)}">Save as CSV</button>'
    return (
        f'{button}<div class="scroll" tabindex="0"><table id="{name}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _shown(cell: Any) -> str:
    return "" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _time_bars(run: RunData, number: int) -> str:
    spent = run.time_spent()
    total = sum(spent.values())
    if not 0 < total < math.inf:
        return ""
    lines = []
    for name, seconds in spent.items():
        share = seconds / total
        style = f"width:{100 * share:.2f}%;background:{figures.colour(number)}"
        text = f"{f.span(seconds)} · {100 * share:.1f}%"
        lines.append(f'<div class="bar"><span>{escape(name)}</span><i style="{style}"></i><span>{text}</span></div>')
    return "".join(lines)


def _settings(run: RunData, number: int, count: int, charts: _Charts) -> Iterable[str]:
    del number, count, charts
    items = "".join(
        f'<tr><th class="word">{escape(str(name))}</th><td class="text">{escape(str(value))}</td></tr>'
        for name, value in run.config.items()
    )
    yield _card("Configuration", f'<div class="scroll" tabindex="0"><table>{items}</table></div>' if items else "")
    lines = "".join(
        f'<tr><td>{f.of_day(line.time, None)}</td><td>{line.step}</td><td class="word">{escape(line.kind)}</td>'
        f'<td class="text">{escape(line.text)}</td></tr>'
        for line in run.journal()
    )
    yield _card("Events, newest first", f'<div class="scroll" tabindex="0"><table>{lines}</table></div>')
    text = (
        "\n".join(run.console) if run.console else "Nothing was captured: the run showed no screen, or printed nothing."
    )
    yield _card("Console", f'<div class="scroll" tabindex="0"><pre>{escape(text)}</pre></div>', wide=True)
