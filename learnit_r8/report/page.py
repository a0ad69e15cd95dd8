"""A finished run, or several, as one HTML file that needs nothing else: no network, no server, no other file.

The page's content security policy forbids every request, so a mistake here or in the chart library cannot make one.
What it looks like is in `page.html`, `page.css` and `page.js`; here is what it says.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from bokeh.embed import components
from bokeh.resources import Resources
from jinja2 import Environment, PackageLoader
from PIL import Image

from learnit_r8 import events as e
from learnit_r8._version import __version__
from learnit_r8.report import figures
from learnit_r8.report.bands import DECAY, band
from learnit_r8.report.run_data import RunData
from learnit_r8.report.suspects import rows as worst
from learnit_r8.report.suspects import verdict
from learnit_r8.run import formats as f
from learnit_r8.run.metric import is_part
from learnit_r8.run.samples_file import MAX_SAMPLES, CatalogSnapshot

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)
_SUSPECTS_SHOWN = 200
_SPIKES_SHOWN = 300
_IDS_SHOWN = 512


@dataclass(frozen=True, slots=True)
class Card:
    """A card of the page; what it does not have is left out."""

    title: str
    about: str = ""
    wide: bool = False
    chart: str = ""  # name of a chart
    table: dict[str, Any] | None = None  # one that can be sorted and saved, from `_table`
    bars: Sequence[tuple[str, str, str]] = ()  # name, percent, text
    colour: str = ""  # of the bars
    rows: Sequence[Sequence[tuple[str, str, Any]]] = ()  # of a plain table: (tag, class, text) each
    console: str = ""  # what was printed


class _Charts:
    """Collects figures; each gets a place in the page."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self.titles: list[str] = []

    def card(self, title: str, about: str, figure: Any, *, wide: bool = False) -> Iterator[Card]:
        """Yield a card with a chart in it; nothing where there is no chart."""
        if figure is not None:
            figure.name = f"chart{len(self.found)}"
            self.found[figure.name] = figure
            self.titles.append(title)
            yield Card(title, about, wide, chart=figure.name)


Describe = Callable[[Any], Any]


def write_report(runs: Sequence[RunData], path: Path, describe: Describe | None = None) -> None:
    """Write the report of one or several runs; an earlier file is replaced.

    Args:
        runs: What `run_data.load_run(folder)` returned.
        path: The HTML file.
        describe: Returns what stands beside a suspect, given its id: a text, or a picture as an array,
            `[height, width]` or `[height, width, 3]`, uint8 or floats from 0 to 1.
    """
    draft = path.with_name(f".{path.name}.tmp")
    try:
        draft.write_text(page(runs, describe=describe), encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@cache
def _templates() -> Environment:
    return Environment(loader=PackageLoader("learnit_r8.report", "."), autoescape=True)


def page(runs: Sequence[RunData], live: bool = False, describe: Describe | None = None) -> str:
    """Return the report as HTML, with what `describe` says of suspects (see `write_report`).

    A live one asks the server that it came from (`serve.py`) for news.
    """
    charts, parts = _Charts(), files("learnit_r8.report")
    said = {
        **_overview(runs),
        "course": list(_course(runs, charts)),
        "samples": [(run, list(_samples(run, number, len(runs), charts, describe))) for number, run in enumerate(runs)],
        "settings": [(run, list(_settings(run))) for run in runs],
    }
    name_sources(charts.found)
    script, places = components(charts.found)
    return _templates().get_template("page.html").render(
        **said, live=live, policy=_POLICY, version=__version__, script=script, places=places,
        title=" · ".join(run.name for run in runs), bokeh=Resources(mode="inline", components=["bokeh"]).js_raw,
        css=parts.joinpath("page.css").read_text("utf-8"), js=parts.joinpath("page.js").read_text("utf-8"),
    )  # fmt: skip


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
    drawn = [_course(runs, charts), *(_samples(run, i, len(runs), charts) for i, run in enumerate(runs))]
    for _ in itertools.chain.from_iterable(drawn):
        pass
    sources = {
        name: {column: _strict(values) for column, values in source.data.items()}
        for name, source in name_sources(charts.found).items()
    }
    axis = figures.step_axis(runs)
    overview = _templates().get_template("overview.html").render(_overview(runs))
    steps = [axis.start, axis.end]
    return {"sources": sources, "titles": charts.titles, "steps": steps, "html": {"overview": overview}}


def _strict(values: Any) -> list[Any]:
    """Return a column as strict JSON: what is not finite is null."""
    plain = values.tolist() if hasattr(values, "tolist") else list(values)
    return [None if isinstance(value, float) and not math.isfinite(value) else value for value in plain]


def _overview(runs: Sequence[RunData]) -> dict[str, Any]:
    facts = [_facts(run) for run in runs]
    names = dict.fromkeys(itertools.chain.from_iterable(facts))
    return {"runs": runs, "names": names, "all_facts": facts, "colours": [*map(figures.colour, range(len(runs)))]}


def _facts(run: RunData) -> dict[str, str]:
    columns = run.table.columns
    course = band(columns["step"], columns["loss"], 1)
    facts = {
        "state": run.state,
        "steps": f.steps(int(columns["step"].max()) + 1),
        "time": f.span(run.seconds),
        "loss, smoothed at the end": f.brief(float(course.smooth[-1])),
        "lowest loss": f.brief(float(course.low[0])),
        "highest loss": f.brief(float(course.high[0])),
        "losses not finite": f.steps(int((~(abs(columns["loss"]) < math.inf)).sum())),
        "spikes": f.steps(len(run.of(e.SpikeSeen))),
        "rollbacks": f.steps(len(run.of(e.RolledBack))),
        "checkpoints": f.steps(len(run.of(e.CheckpointSaved))),
        "samples held back": f.steps(len({i for event in run.of(e.SampleQuarantined) for i in event.indices})),
    }
    if run.table.abandoned:
        facts["steps taken back by a resume"] = f.steps(run.table.abandoned)
    whole = ((name, values) for name, (_, values) in run.metrics.items() if not is_part(name))
    for name, values in itertools.islice(whole, 12):
        facts[f"{name}, last"] = f.brief(float(values[-1]))
    return facts


def _course(runs: Sequence[RunData], charts: _Charts) -> Iterator[Card]:
    axis = figures.step_axis(runs)
    about = f"Band: lowest to highest loss of neighbouring batches. Line: moving average (decay {DECAY:g})."
    about += " Dots: validation loss." if any(map(figures.validation, runs)) else ""
    yield from charts.card("Loss", about, figures.loss(runs, axis), wide=True)
    for run in runs:
        name = f"What happened: {run.name}" if len(runs) > 1 else "What happened"
        about = "Hover a mark for the samples of its batch."
        yield from charts.card(name, about, figures.timeline(run, axis), wide=True)
    yield from charts.card("Learning rate", "As used by each step.", figures.learning_rate(runs, axis))
    yield from charts.card("Throughput", "Samples a second within steps.", figures.throughput(runs, axis))
    for name, figure in figures.metrics(runs, axis).items():
        yield from charts.card(name, "Logged by the run.", figure)
    for run in runs:
        name = f"Gradient by part: {run.name}" if len(runs) > 1 else "Gradient by part"
        yield from charts.card(name, "Its norm in each part of the model.", figures.gradient(run, axis))


def _samples(
    run: RunData, number: int, count: int, charts: _Charts, describe: Describe | None = None
) -> Iterator[Card]:
    about = (
        "A point a sample. Low and left: learned. Right: the loss varies. High and left: never learned, "
        "often a wrong label. Blue: mostly below ln 2; red: never. Rings: the 50 worst suspects."
    )
    yield from charts.card("Data map", about, figures.data_map(run, MAX_SAMPLES // count), wide=True)
    if run.catalog is not None:
        yield _suspects(run.catalog, run, number, describe)
    about = "Quartiles of the samples' loss at each epoch; dotted: the lowest and the highest."
    yield from charts.card("Quadrant edges", about, figures.quadrant_edges(run))
    about = "Samples that ended an epoch in an easier quadrant."
    yield from charts.card("Migration", about, figures.migration(run))
    yield _spikes(run, number)
    spent = run.time_spent()
    total = sum(spent.values())
    if 0 < total < math.inf:
        shares = [(name, seconds, 100 * seconds / total) for name, seconds in spent.items()]
        bars = [(name, f"{share:.2f}", f"{f.span(seconds)} · {share:.1f}%") for name, seconds, share in shares]
        yield Card("Where the time went", wide=True, bars=bars, colour=figures.colour(number))


def _suspects(catalog: CatalogSnapshot, run: RunData, number: int, describe: Describe | None) -> Card:
    found = worst(catalog, _SUSPECTS_SHOWN)
    if not found:
        return Card("Suspects", "No sample has been seen yet.", wide=True)
    columns = ["rank", "sample", "mean loss", "loss now", "variability", "below ln 2", "trained on"]
    body: list[list[Any]] = [[*row[:2], *row[3:8]] for row in found]
    if any(row.group is not None for row in found):
        columns.insert(2, "class")
        for cells, row in zip(body, found, strict=True):
            cells.insert(2, row.group)
    if catalog.num_flagged:
        columns.append("flagged")
        for cells, row in zip(body, found, strict=True):
            cells.append("yes" if row.flagged else "")
    if describe is not None:
        columns.insert(2, "what it is")
        for cells, row in zip(body, found, strict=True):
            cells.insert(2, _described(describe, row.id))
    about = f"The samples of the highest mean loss. {verdict(catalog)} Click a heading to sort."
    return Card("Suspects", about, True, table=_table(run, f"suspects{number}", columns, body))


class _Picture(str):
    """A picture as a data URL."""

    kind = "picture"


def _described(describe: Describe, sample: int | str) -> str:
    """Return what a user's function says of a sample; what goes wrong there stands in its place."""
    try:
        said = describe(sample)
        if isinstance(said, str):
            return said
        pixels = np.asarray(said.detach().cpu() if hasattr(said, "detach") else said)
        if pixels.dtype.kind == "f":
            pixels = np.clip(np.nan_to_num(pixels), 0.0, 1.0) * 255.0
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels, np.uint8)).save(file, "png")
    except Exception as error:
        return f"describe({sample!r}) failed: {type(error).__name__}: {error}"
    return _Picture("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())


def _spikes(run: RunData, number: int) -> Card:
    events: list[e.SpikeSeen | e.RolledBack | e.RollbackFailed]
    events = [*run.of(e.SpikeSeen), *run.of(e.RolledBack), *run.of(e.RollbackFailed)]
    events.sort(key=lambda event: (event.step, event.time))
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
    about = f"The first {len(body)}; {left} more are in the log." if left else "" if events else "None."
    columns = ["step", "time", "what", "loss", "expected", "samples of the batch"]
    table = _table(run, f"spikes{number}", columns, body) if events else None
    return Card("Spikes and rollbacks", about, True, table=table)


_TEXT_COLUMNS = {
    "time": "word",
    "what": "word",
    "samples of the batch": "text",
    "flagged": "word",
    "what it is": "text",
}


def _table(run: RunData, name: str, columns: Sequence[str], body: Iterable[Sequence[Any]]) -> dict[str, Any]:
    """Return a sortable table that can be saved as CSV; numbers keep all digits there."""
    kinds = [_TEXT_COLUMNS.get(column, "") for column in columns]
    cells = [
        [
            ("picture" if isinstance(cell, _Picture) else kind, *_cell(cell))
            for kind, cell in zip(kinds, line, strict=True)
        ]
        for line in body
    ]
    file = f"{run.name}-{name.rstrip('0123456789')}.csv"
    return {"name": name, "file": file, "columns": list(zip(kinds, columns, strict=True)), "body": cells}


def _cell(value: Any) -> tuple[str, str]:
    """Return a number with all its digits, nothing for what is exact already, and what is shown."""
    if isinstance(value, float):
        return f"{value:.9g}", f"{value:.4g}"
    return "", "" if value is None else str(value)


def _made_with(event: e.MadeWith) -> Iterator[tuple[str, str]]:
    changed = {True: ", with changes", False: ", unchanged", None: ""}[event.dirty]
    yield "commit", f"{event.commit}{changed}" if event.commit else "no git repository"
    yield "command", event.command
    yield "host", event.host
    yield "device", event.device
    yield "seeds", ", ".join(f"{name} {seed}" for name, seed in event.seeds.items())
    yield "packages", ", ".join(f"{name} {version}" for name, version in event.packages.items())


def _settings(run: RunData) -> Iterator[Card]:
    if run.config:
        rows = [[("th", "word", name), ("td", "text", value)] for name, value in run.config.items()]
        yield Card("Configuration", rows=rows)
    if made := run.of(e.MadeWith):
        yield Card(
            "Made with", rows=[[("th", "word", name), ("td", "text", text)] for name, text in _made_with(made[-1])]
        )
    kinds = ("", "", "word", "text")
    lines = [(f.of_day(line.time, None), line.step, line.kind, line.text) for line in run.journal()]
    rows = [[("td", kind, text) for kind, text in zip(kinds, line, strict=True)] for line in lines]
    yield Card("Events, newest first", rows=rows)
    nothing = "Nothing was captured: the run showed no screen, or printed nothing."
    yield Card("Console", wide=True, console="\n".join(run.console) or nothing)
