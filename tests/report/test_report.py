"""Reports: every extreme survives, files stay small, and nothing that a run contains can break the page."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learnit_r8 import events as e
from learnit_r8.dashboard.demo import DemoRun
from learnit_r8.errors import ConfigError
from learnit_r8.events import LossReported, to_json
from learnit_r8.report.bands import band, wants_log
from learnit_r8.report.page import write_report
from learnit_r8.report.plot import write_png
from learnit_r8.report.run_data import load_run
from learnit_r8.run.blocks import ROUTINE
from learnit_r8.run.samples_file import write_catalog
from learnit_r8.run.table import read_table
from learnit_r8.samples.catalog import LossCatalog
from learnit_r8.sinks import JsonlSink, read_events

FIELDS = ("time", "step", "loss", "lr", "size", "step_seconds", "r8_seconds")
ENVIRONMENT = {"PATH": os.environ["PATH"], "PYTHONPATH": os.getcwd(), "LANG": "C.UTF-8", "MPLCONFIGDIR": "/tmp"}


def r8(*arguments, cwd):
    command = [sys.executable, "-W", "error", "-m", "learnit_r8", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, env=ENVIRONMENT)


def report(step, loss=0.5, **more):
    values = {"time": 1000.0 + step, "step": step, "epoch": 0, "loss": loss, "expected_loss": 0.4, "lr": 0.01}
    values |= {"verdict": "calm", "score": 0.1, "size": 8, "step_seconds": 0.1, "r8_seconds": 1e-4}
    return LossReported(**(values | more))


def write(folder, events):
    sink = JsonlSink(folder / "events.jsonl")
    for event in events:
        sink.record(event)
    sink.close()
    return folder


def demo(folder, **arguments):
    return write(folder, (event for _, event in DemoRun(start=1.7e9, **arguments)))


def test_the_parts_of_the_gradient_s_norm_have_one_chart_together(tmp_path):
    events = [report(step) for step in range(30)]
    for step in range(0, 30, 8):
        events += [e.MetricLogged(time=1e3, step=step, name=f"m{n}", value=1.0) for n in range(5)]
        events += [
            e.MetricLogged(time=1e3, step=step, name=f"grad_norm{n}", value=2.0) for n in ("", "/h.0", "/h.1", "/head")
        ]
    write(tmp_path, events)
    write_report([load_run(tmp_path)], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<h3>Gradient by part</h3>") == 1
    for part in ("h.0", "h.1", "head"):
        assert f"<h3>grad_norm/{part}</h3>" not in page
        assert f"grad_norm/{part}, last" not in page
    assert "<h3>grad_norm</h3>" in page
    (tmp_path / "none").mkdir()
    write_report([load_run(write(tmp_path / "none", events[:30]))], tmp_path / "none.html")
    assert "Gradient by part" not in (tmp_path / "none.html").read_text()


# reading ----------------------------------------------------------------------------------


def test_the_table_agrees_with_the_reader_line_by_line(tmp_path):
    demo(tmp_path, epochs=5, spike_every=20)
    table = read_table(tmp_path / "events.jsonl")
    events = list(read_events(tmp_path / "events.jsonl"))
    reports = [event for event in events if isinstance(event, LossReported)]
    assert any(np.isnan(event.loss) for event in reports)
    for name in FIELDS:
        assert np.array_equal(table.columns[name], [getattr(event, name) for event in reports], equal_nan=True), name
    assert list(map(repr, table.others)) == [repr(event) for event in events if type(event) not in ROUTINE]
    assert table.backups == sum(event.seconds for event in events if isinstance(event, e.BackupTaken)) > 0
    metrics = [event for event in events if isinstance(event, e.MetricLogged)]
    assert sum(rows.shape[1] for rows in table.metrics.values()) == len(metrics) > 0
    for name, rows in table.metrics.items():
        assert rows.T.tolist() == [[x.step, x.time, x.value] for x in metrics if x.name == name]


def test_reports_in_another_form_and_broken_lines_are_read_as_by_the_reader(tmp_path):
    odd = to_json(report(1, float("inf"))) | {"added": [1, 2]}
    lines = [
        json.dumps(to_json(report(0))),
        json.dumps(odd),
        '{"event":"LossReported","time":"x"}',
        '{"event":"LossReported","time":1',
        "",
        json.dumps(to_json(report(2)), separators=(",", ":")).replace("0.5", "0.5.5"),
        json.dumps(to_json(report(3)), separators=(",", ":")),
        json.dumps(to_json(report(4)), separators=(",", ":"))[:-3],
    ]
    (tmp_path / "events.jsonl").write_text("\n".join(lines))
    assert read_table(tmp_path / "events.jsonl").columns["step"].tolist() == [0, 1, 3]


def test_blocks_may_end_anywhere(tmp_path, monkeypatch):
    demo(tmp_path, epochs=1, batches=60)
    whole = read_table(tmp_path / "events.jsonl")
    for size in (1, 37, 1000):
        monkeypatch.setattr("learnit_r8.run.table._BLOCK", size)
        pieces = read_table(tmp_path / "events.jsonl")
        assert np.array_equal(pieces.columns["loss"], whole.columns["loss"], equal_nan=True)
        assert len(pieces.others) == len(whole.others)


def started(step, time, resumed):
    return e.RunStarted(
        time=time,
        step=step,
        run="run",
        config={},
        steps_per_epoch=10,
        total_steps=100,
        resumed=resumed,
        version="0",
        pid=1,
        elapsed=0.0,
    )


def test_steps_that_a_resume_took_back_are_left_out(tmp_path):
    first = [started(0, 1000.0, False), *(report(step, 1.0) for step in range(10))]
    second = [started(6, 2000.0, True), *(report(step, 2.0, time=2000.0 + step) for step in range(6, 12))]
    write(tmp_path, [*first, *second])
    table = read_table(tmp_path / "events.jsonl")
    assert table.columns["step"].tolist() == list(range(12))
    assert table.columns["loss"].tolist() == [1.0] * 6 + [2.0] * 6
    assert table.abandoned == 4


def test_the_time_between_two_processes_is_nobodys(tmp_path):
    first = [started(0, 1000.0, False), *(report(step) for step in range(10))]
    second = [started(10, 9000.0, True), report(10, time=9005.0)]
    run = load_run(write(tmp_path, [*first, *second]))
    assert run.seconds == pytest.approx(9.0 + 5.0)
    assert sum(run.time_spent().values()) == pytest.approx(14.0)


def test_a_run_without_a_step_says_so(tmp_path):
    write(tmp_path, [started(0, 1.0, False)])
    with pytest.raises(ConfigError, match="no reported loss yet"):
        load_run(tmp_path)


# bands ------------------------------------------------------------------------------------

values = st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=300)


@settings(deadline=None)
@given(values, st.integers(1, 40))
def test_no_extreme_is_ever_lost(series, bins):
    y = np.array(series, float)
    found = band(np.arange(len(y), dtype=float), y, bins)
    finite = y[np.isfinite(y)]
    if not len(finite):
        assert np.isnan(found.low).all()
        return
    assert np.nanmin(found.low) == finite.min()
    assert np.nanmax(found.high) == finite.max()
    for first, last, low, high in zip(found.first, found.last, found.low, found.high, strict=True):
        part = y[int(first) : int(last) + 1]
        part = part[np.isfinite(part)]
        assert (low, high) == (part.min(), part.max()) if len(part) else np.isnan(low)


def test_every_single_spike_of_a_long_series_is_in_its_bin():
    rng = np.random.default_rng(0)
    y = np.full(1_000_000, 0.5)
    spikes = rng.choice(len(y), 200, replace=False)
    y[spikes] = 10 + np.arange(200)
    found = band(np.arange(len(y), dtype=float), y)
    for spike in spikes:
        at = np.searchsorted(found.last, spike)
        assert found.first[at] <= spike <= found.last[at]
        assert found.high[at] >= y[spike]


def test_the_smoothed_line_is_the_debiased_average_of_the_finite_values():
    y = np.array([4.0, np.nan, 2.0, np.inf, 1.0])
    found = band(np.arange(5.0), y, decay=0.5)
    weights = {0: [1], 2: [1, 2], 4: [1, 2, 4]}
    finite = [4.0, 2.0, 1.0]
    for at, factors in weights.items():
        expected = np.dot(factors, finite[: len(factors)]) / sum(factors)
        assert found.smooth[at] == pytest.approx(expected)
    assert found.smooth[1] == found.smooth[0]


@pytest.mark.parametrize(
    ("series", "log"), [([1, 2, 3], False), ([1e-3, 1, 10], True), ([0, 1, 1000], False), ([np.nan], False)]
)
def test_a_log_scale_needs_positive_values_over_a_wide_range(series, log):
    assert wants_log(np.array(series, float)) is log


# the page ---------------------------------------------------------------------------------


def test_a_report_is_one_file_without_any_address(tmp_path):
    demo(tmp_path / "run", epochs=2)
    done = r8("report", "run", "-o", "out.html", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    text = (tmp_path / "out.html").read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"""<(script|link|img|iframe)[^>]*\s(src|href)=""", text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "run"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["events.jsonl"]


def test_names_from_the_run_cannot_become_part_of_the_page(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    events = [
        e.RunStarted(
            time=1.0,
            step=0,
            run=evil,
            config={evil: evil},
            steps_per_epoch=10,
            total_steps=100,
            resumed=False,
            version="0",
            pid=1,
            elapsed=0.0,
        ),
        report(0),
        e.MetricLogged(time=2.0, step=1, name=evil, value=0.5),
        e.PhaseChanged(time=3.0, step=1, phase=evil, reason=evil),
        e.SpikeSeen(time=4.0, step=1, epoch=0, verdict=evil, loss=9.0, expected_loss=0.5, score=8.0, indices=(1, 2)),
        e.RolledBack(time=5.0, step=1, to_step=0, source=evil, lr_multiplier=0.5, hold_steps=10, seconds=0.1),
        e.Notice(time=6.0, step=1, message=evil),
    ]
    write(tmp_path / "run", events)
    (tmp_path / "run" / "console.log").write_text(evil)
    assert r8("report", "run", cwd=tmp_path).returncode == 0
    text = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in text
    assert "<img" not in text


def test_a_damaged_catalog_is_told_on_the_page(tmp_path):
    demo(tmp_path / "run", epochs=1)
    (tmp_path / "run" / "catalog.npz").write_bytes(b"PK nonsense")
    assert r8("report", "run", cwd=tmp_path).returncode == 0
    assert "is no catalog file" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("losses", [[float("nan")] * 5, [1.0], [0.0] * 4, [1e300, -1e300], [float("inf"), 1.0]])
def test_strange_losses_have_a_report_and_a_picture(tmp_path, losses):
    run = load_run(write(tmp_path, [report(step, loss) for step, loss in enumerate(losses)]))
    write_report([run], tmp_path / "report.html")
    assert "</html>" in (tmp_path / "report.html").read_text()
    write_png([run], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# plot -------------------------------------------------------------------------------------


def test_the_csv_has_a_line_a_step_and_empty_fields_for_what_is_not_finite(tmp_path):
    write(tmp_path / "run", [report(0, 2.0), report(1, float("nan")), report(2, 1.0)])
    rows = list(csv.DictReader(io.StringIO(r8("plot", "run", "--csv", cwd=tmp_path).stdout)))
    assert [row["loss_min"] for row in rows] == ["2", "", "1"]
    assert [row["first_step"] for row in rows] == ["0", "1", "2"]
    assert rows[0]["time"] == "1000.000"


def test_the_csv_of_a_long_run_is_binned_and_keeps_its_highest_loss(tmp_path):
    demo(tmp_path / "run", epochs=10, batches=1000, spike_every=300)
    rows = list(csv.DictReader(io.StringIO(r8("plot", "run", "--csv", cwd=tmp_path).stdout)))
    assert len(rows) == 2000
    losses = read_table(tmp_path / "run" / "events.jsonl").columns["loss"]
    assert max(float(row["loss_max"]) for row in rows) == pytest.approx(np.nanmax(losses), rel=1e-8)


def test_a_picture_shows_several_runs(tmp_path):
    demo(tmp_path / "a", epochs=1)
    demo(tmp_path / "b", epochs=2, seed=1)
    done = r8("plot", "a", "b", "-o", "both.png", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "both.png\n", "")


MISTAKES = {
    "two tables": (["plot", "run", "run", "--csv"], "--csv writes one run"),
    "no folder": (["report", "run", "-o", "no/where.html"], "there is no folder no"),
    "a folder": (["report", "run", "-o", "run"], "run is a folder: give a file with -o"),
    "two kinds": (["plot", "run", "--csv", "--png"], "not allowed with"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_sentence(mistake, tmp_path):
    write(tmp_path / "run", [report(0)])
    arguments, sentence = MISTAKES[mistake]
    done = r8(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("command", "package"), [("report", "bokeh"), ("plot", "matplotlib")])
def test_a_missing_library_is_named_with_the_extra_that_brings_it(tmp_path, command, package):
    write(tmp_path / "run", [report(0)])
    code = f"import sys; sys.modules['{package}'] = None; from learnit_r8.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, command, "run"], capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT
    )
    assert done.returncode == 2
    assert 'pip install "learnit_r8[report]"' in done.stderr


@pytest.mark.slow
def test_the_report_of_a_million_steps_and_samples_is_under_6_mb(tmp_path):
    demo(tmp_path / "run", epochs=10, batches=100_000)
    catalog, rng = LossCatalog(1_000_000), np.random.default_rng(0)
    for step in range(3):
        ids = np.arange(catalog.num_samples)
        catalog.record(catalog.look_up(ids), rng.exponential(size=len(ids)).astype(np.float32), step)
    write_catalog(tmp_path / "run", catalog, np.arange(1_000_000) % 10, 3)
    assert r8("report", "run", cwd=tmp_path).returncode == 0
    assert (tmp_path / "report.html").stat().st_size < 6_000_000
