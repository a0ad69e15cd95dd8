"""The picture: every size, every glyph set, every state of a run; a few are kept as text.

After a wanted change of the picture: `R8_UPDATE_SNAPSHOTS=1 python -m pytest tests/dashboard/test_dashboard_render.py`,
then look at the difference.
"""

from __future__ import annotations

import math
import os
import random
import re
from copy import deepcopy
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from learnit_r8 import events as e
from learnit_r8.dashboard.displays.summary import summary_text
from learnit_r8.dashboard.drawing.cells import Grid, cell_width, clip
from learnit_r8.dashboard.drawing.layout import Band, Boxes, allot
from learnit_r8.dashboard.drawing.render import Painter, Scene, render
from learnit_r8.dashboard.drawing.scales import in_six
from learnit_r8.dashboard.keys import AXES, GLYPH_SETS, SCALES, SMOOTHINGS, ViewState
from learnit_r8.dashboard.meters import Gpu, gpu_meter
from learnit_r8.run.model import DashboardModel
from learnit_r8.run.styles import Style

T0 = 1_700_000_000.0
SNAPSHOTS = Path(__file__).parents[1] / "snapshots"
SIZES = [(1, 1), (2, 9), (40, 4), (59, 15), (59, 40), (60, 16), (61, 17), (80, 24), (80, 60), (99, 30)]
SIZES += [(100, 16), (101, 21), (120, 35), (132, 43), (200, 60), (300, 20), (300, 100), (0, 0), (5, 0), (0, 5)]
CONSOLE = (
    "[rank0] epoch 4: augment=randaug(2,9)",
    "warning: 日本語 e\u0301 👍🏽 \x1b[31mred\x1b[0m \t tab",
    " 37%|███▋      | 37/100",
)


def events_of_a_run(steps=3300, per_epoch=1000, epochs=10, seed=1):
    """Yield a run with warm-up, a spike, a NaN, rollbacks, checkpoints, validation and quadrants."""
    rng = random.Random(seed)
    time = T0
    config = {"num_epochs": epochs, "scheduler_mode": "cosine", "world_size": 8, "rank": 0}
    total = per_epoch * epochs
    yield e.RunStarted(
        time=time,
        step=0,
        run="resnet18-cifar",
        config=config,
        steps_per_epoch=per_epoch,
        total_steps=total,
        resumed=False,
        version="0.1.0",
        pid=4242,
        elapsed=0.0,
    )
    yield e.EpochStarted(time=time, step=0, epoch=0, phase="cataloging", batches=per_epoch)
    yield e.PhaseChanged(time=time, step=0, phase="LR search", reason="100 steps at rising rates")
    time += 40
    yield e.LrFound(time=time, step=0, lr=1e-2, suggestions={}, steps=100)
    for step in range(steps):
        epoch = step // per_epoch
        if step and step % per_epoch == 0:
            yield e.EpochEnded(
                time=time, step=step, epoch=epoch - 1, mean_loss=0.3, seconds=360.0, batches=per_epoch, completed=True
            )
            time += 38
            yield e.MetricLogged(time=time, step=step, name="val_loss", value=2.2 * math.exp(-step / 900) + 0.12)
            yield e.MetricLogged(time=time, step=step, name="val_acc", value=0.95 - 0.9 * math.exp(-step / 900))
            yield e.CheckpointSaved(
                time=time, step=step, path=f"ckpt/ep{epoch}-s{step}", bytes=412_000_000, seconds=1.8
            )
            fade = math.exp(-epoch / 4)
            edges = (0.002, 0.031 * fade, 0.074 * fade, 0.152 * fade, 4.81)
            means = (0.01 * fade, 0.05 * fade, 0.11 * fade, 0.4 * fade)
            uses, easier = (4.1, 4.0, 3.9, 4.2), (0.0, 0.31, 0.27, 0.12)
            yield e.QuadrantsRefreshed(
                time=time,
                step=step,
                epoch=epoch,
                edges=edges,
                counts=(12500,) * 4,
                losses=means,
                uses=uses,
                easier=easier,
                unseen=0,
                stuck=214,
            )
            yield e.SuspectsNamed(
                time=time,
                step=step,
                indices=tuple(range(1000, 1040)),
                losses=tuple(5 - i / 20 for i in range(40)),
                count=214,
            )
            yield e.EpochStarted(time=time, step=step, epoch=epoch, phase="quadrant", batches=per_epoch)
        expected = 2.2 * math.exp(-step / 900) + 0.09
        value = {1412: 12.4, 2700: math.nan}.get(step, expected * (1 + rng.gauss(0, 0.12)))
        verdict = "nonfinite" if math.isnan(value) else "spike" if value > 5 else "calm"
        score = (value - expected) / (0.12 * expected)
        lr = 1e-2 * min(1, (step + 1) / 500) * 0.5 * (1 + math.cos(math.pi * step / total))
        seconds = 0.36 * (1 + abs(rng.gauss(0, 0.05)))
        time += seconds + 0.009
        yield e.LossReported(
            time=time,
            step=step,
            epoch=epoch,
            loss=value,
            expected_loss=expected,
            lr=lr,
            verdict=verdict,
            score=score,
            size=32,
            step_seconds=seconds,
            r8_seconds=0.0002,
        )
        if step % 10 == 0:
            yield e.MetricLogged(
                time=time, step=step, name="grad_norm", value=abs(rng.gauss(0.8, 0.1)) * (1 + 2 * math.exp(-step / 400))
            )
        if step % 50 == 0:
            yield e.BackupTaken(time=time, step=step, bytes=45_000_000, seconds=0.02)
        if verdict != "calm":
            yield e.SpikeSeen(
                time=time,
                step=step,
                epoch=epoch,
                verdict=verdict,
                loss=value,
                expected_loss=expected,
                score=score,
                indices=(1, 2, 3),
            )
            yield e.RolledBack(
                time=time, step=step, to_step=step - 62, source="ram", lr_multiplier=0.5, hold_steps=200, seconds=0.3
            )


@cache
def run():
    model = DashboardModel()
    for event in events_of_a_run():
        model.consume(event)
    return model


def frame(width, height, model=None, console=(), now=None, **view):
    model = run() if model is None else model
    now = model.last_time + 0.2 if now is None else now
    return render(Scene(model, console), ViewState(utc_offset=0, **view), width, height, now)


def check_cells(grid, width, height, ascii_only=False):
    """Every row has exactly `width` cells, in `rows` as in `runs`, and nothing that could move the cursor."""
    rows = grid.rows()
    assert len(rows) == height
    for y, row in enumerate(rows):
        assert cell_width(row) == width, (y, row)
        assert row.isprintable(), (y, row)
        assert not ascii_only or row.isascii(), (y, row)
        runs = grid.runs(y)
        assert "".join(text for _, text, _ in runs) == row
        assert [x for x, _, _ in runs] == [0, *(x + cell_width(t) for x, t, _ in runs)][: len(runs)]


# Sizes and states -----------------------------------------------------------------------------


@pytest.mark.parametrize("glyphs", GLYPH_SETS)
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_every_size_is_filled_exactly(width, height, glyphs):
    for model in (run(), DashboardModel()):
        for view in ({}, {"help": 2}, {"confirm": "stop"}, {"focus": 3, "zoomed": True}, {"focus": 2, "zoomed": True}):
            grid = frame(width, height, model, CONSOLE, now=model.last_time, glyphs=glyphs, **view)
            check_cells(grid, width, height, glyphs == "ascii")


VIEWS = st.builds(
    ViewState,
    focus=st.integers(0, 6),
    zoomed=st.booleans(),
    metric=st.integers(-9, 9),
    scale=st.sampled_from(SCALES),
    smoothing=st.sampled_from(SMOOTHINGS),
    x_axis=st.sampled_from(AXES),
    window=st.integers(0, 16),
    glyphs=st.sampled_from(GLYPH_SETS),
    help=st.integers(0, 3),
    confirm=st.sampled_from(["", "stop", "pause"]),
    filter=st.text(max_size=4),
    editing=st.booleans(),
    scroll=st.integers(0, 10**6),
    readonly=st.booleans(),
    ui_share=st.none() | st.floats(0, 1),
    gpus=st.lists(st.builds(Gpu, *[st.integers(0, 10**12)] * 5), max_size=9).map(tuple),
    utc_offset=st.just(0),
)


@given(st.integers(0, 310), st.integers(0, 110), VIEWS, st.lists(st.text(max_size=200), max_size=5), st.floats())
@settings(max_examples=60, deadline=None)
def test_any_view_of_a_run_at_any_size_and_time(width, height, view, console, now):
    grid = render(Scene(run(), console), view, width, height, now)
    check_cells(grid, width, height, view.glyphs == "ascii")


def numbers():
    return st.floats(allow_nan=True)


LOSSES = st.builds(
    e.LossReported,
    time=numbers(),
    step=st.integers(0, 10**9),
    epoch=st.integers(0, 9),
    loss=numbers(),
    expected_loss=numbers(),
    lr=numbers(),
    verdict=st.just("calm"),
    score=numbers(),
    size=st.integers(0, 99),
    step_seconds=numbers(),
    r8_seconds=numbers(),
)
QUADRANTS = st.builds(
    e.QuadrantsRefreshed,
    time=numbers(),
    step=st.integers(0, 99),
    epoch=st.integers(0, 99),
    edges=st.tuples(*[numbers()] * 5),
    counts=st.tuples(*[st.integers(0, 10**9)] * 4),
    losses=st.tuples(*[numbers()] * 4),
    uses=st.tuples(*[numbers()] * 4),
    easier=st.tuples(*[numbers()] * 4),
    unseen=st.integers(0, 10**9),
    stuck=st.integers(0, 10**9),
)
METRICS = st.builds(e.MetricLogged, time=numbers(), step=st.integers(0, 99), name=st.text(), value=numbers())
STARTS = st.builds(
    e.RunStarted,
    time=numbers(),
    step=st.integers(0, 10**6),
    run=st.text(max_size=300),
    config=st.fixed_dictionaries(
        {}, optional={"num_epochs": st.integers(0, 9), "train_duration_seconds": numbers(), "world_size": st.integers()}
    ),
    steps_per_epoch=st.integers(0, 10**6),
    total_steps=st.none() | st.integers(0, 10**9),
    resumed=st.booleans(),
    version=st.text(),
    pid=st.integers(),
    elapsed=numbers(),
)
NOTICES = st.builds(e.Notice, time=numbers(), step=st.integers(0, 9), message=st.text(), level=st.just("warning"))
PHASES = st.builds(e.PhaseChanged, time=numbers(), step=st.integers(0, 9), phase=st.text(), reason=st.text())
STREAMS = st.lists(st.one_of(LOSSES, QUADRANTS, METRICS, STARTS, NOTICES, PHASES), max_size=20)


@given(STREAMS, VIEWS, st.sampled_from([(40, 4), (60, 16), (80, 24), (80, 50), (120, 35), (200, 60)]), numbers())
@settings(max_examples=120, deadline=None, phases=[Phase.generate])
def test_any_stream_of_events_is_drawn(events, view, size, now):
    model = DashboardModel()
    for event in events:
        model.consume(event)
    check_cells(render(Scene(model, ["a line"]), view, *size, now), *size, view.glyphs == "ascii")
    assert all(cell_width(line) <= 80 for line in summary_text(model).splitlines())


# What is drawn anew ---------------------------------------------------------------------------


def pictures(painter, model, view, size, now, console):
    grid = painter.draw(Scene(model, console), view, *size, now)
    return [grid.runs(y) for y in range(grid.height)]


def fresh(*arguments):
    return pictures(Painter(), *arguments)


CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "steps": st.integers(0, 400),
        "view": VIEWS,
        "size": st.sampled_from([(40, 4), (60, 16), (80, 24), (120, 35), (120, 50)]),
        "line": st.text(max_size=9),
        "wait": st.floats(0, 100),
    },
)


@given(st.lists(CHANGES, max_size=12))
@settings(max_examples=40, deadline=None)
def test_a_painter_that_goes_on_draws_what_a_new_one_draws(changes):
    painter, lazy = Painter(), Painter(chart_seconds=1.0)
    model, view, size, console, waited = DashboardModel(), ViewState(utc_offset=0), (120, 35), [], 0
    events = events_of_a_run(per_epoch=300)
    for change in changes:
        for event in islice(events, change.get("steps", 0)):
            model.consume(event)
        view, size = change.get("view", view), change.get("size", size)
        console += [change["line"]] if "line" in change else []
        waited += change.get("wait", 0)
        now = T0 + waited
        lazy.draw(Scene(model, console), view, *size, now)
        assert pictures(painter, model, view, size, now, console) == fresh(model, view, size, now, console)
    # One chart a frame: after as many frames as there are charts, all are up to date.
    for later in range(6):
        shown = pictures(lazy, model, view, size, T0 + waited + 4 * later, console)
    assert shown == fresh(model, view, size, T0 + waited + 20, console)


def test_a_chart_waits_for_its_second_and_numbers_do_not():
    painter, model, view = Painter(chart_seconds=1.0), DashboardModel(), ViewState(utc_offset=0)
    events = (event for event in events_of_a_run(per_epoch=5000) if isinstance(event, e.LossReported))
    for event in islice(events, 2000):
        model.consume(event)
    before = pictures(painter, model, view, (120, 35), T0, [])[4:14]

    def left_of_the_numbers(rows):
        return ["".join(text for _, text, _ in row)[:70] for row in rows]

    for event in islice(events, 200):
        model.consume(event)
    grid = painter.advance(model, T0 + 0.5)
    assert [list(grid.runs(y)) for y in (1, 2)] == fresh(model, view, (120, 35), T0 + 0.5, [])[1:3]
    assert [list(grid.runs(y)) for y in range(4, 14)] == before
    assert painter.advance(DashboardModel(), T0) is None, "nothing of this run was drawn"
    soon, later = (pictures(painter, model, view, (120, 35), T0 + wait, [])[4:14] for wait in (0.5, 1.0))
    assert soon != before
    assert left_of_the_numbers(soon) == left_of_the_numbers(before)
    assert later == fresh(model, view, (120, 35), T0 + 1.0, [])[4:14]


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_the_changes_of_a_row_turn_the_old_one_into_the_new_one(data):
    old, new = Grid(30, 1), Grid(30, 1)
    for grid in (old, new):
        for x, text, style in data.draw(
            st.lists(st.tuples(st.integers(0, 29), st.text(max_size=9), st.sampled_from(Style)), max_size=4)
        ):
            grid.put(0, x, text, style)
    for x, text, style in new.changes(old, 0):
        old.put(0, x, text, style)
    assert old.runs(0) == new.runs(0)


# Layout ---------------------------------------------------------------------------------------


def titles(grid):
    names = ("loss", "now", "difficulty", "lr", "events", "console")
    text = "\n".join(row for row in grid.rows() if row.startswith("├"))
    return [name for name in names if f" {name} [" in text]


def test_console_goes_first_then_events_then_the_quadrants():
    seen = []
    for height in range(60, 15, -1):
        now = titles(frame(120, height, console=CONSOLE))
        if not seen or seen[-1] != now:
            seen.append(now)
    assert seen == [
        ["loss", "now", "difficulty", "lr", "events", "console"],
        ["loss", "now", "difficulty", "lr", "events"],
        ["loss", "now", "difficulty", "lr"],
        ["loss", "now"],
    ]


@pytest.mark.parametrize("width", [60, 80, 99, 100, 120, 300])
def test_progress_and_loss_are_never_left_out(width):
    for height in range(16, 70):
        text = "\n".join(frame(width, height, console=CONSOLE).rows())
        assert "TOTAL" in text
        assert "EPOCH" in text
        assert "loss" in text


def test_rows_for_what_a_run_does_not_have_are_left_out():
    plain = DashboardModel()
    for event in events_of_a_run(steps=900):
        if not isinstance(event, (e.MetricLogged, e.BackupTaken)):
            plain.consume(event)
    text = "\n".join(frame(120, 35, plain).rows())
    for absent in ("difficulty", "console [6]", "val", "grad", "backup", "ckpt "):
        assert absent not in text.replace("c ckpt", "")


@given(
    st.lists(
        st.builds(Band, st.just((("x", 0),)), st.integers(1, 9), st.integers(9, 12), share=st.integers(0, 3)),
        min_size=1,
        max_size=6,
    ),
    st.integers(2, 120),
)
def test_bands_fill_the_rows_exactly(bands, rows):
    heights = allot(bands, rows)
    assert sum(height + 1 for height in heights if height) == rows
    left_out = [height == 0 for height in heights]
    assert left_out == sorted(left_out)


def test_lines_join_where_they_meet():
    boxes = Boxes()
    for y in (0, 2, 4):
        boxes.horizontal(y, 0, 6)
    for x, top, bottom in ((0, 0, 4), (6, 0, 4), (2, 0, 2), (4, 2, 4), (3, 0, 4)):
        boxes.vertical(x, top, bottom)
    grid = Grid(7, 5)
    boxes.draw(grid)
    assert grid.rows() == ["┌─┬┬──┐", "│ ││  │", "├─┴┼┬─┤", "│  ││ │", "└──┴┴─┘"]


def test_every_box_is_closed():
    """Each line end on the screen meets a line of the neighbouring cell."""
    up, down, left, right = set("│┘└┤├┴┼"), set("│┐┌┤├┬┼"), set("─┐┘┤┬┴┼"), set("─┌└├┬┴┼")
    for size in ((80, 24), (120, 35), (200, 60)):
        rows = frame(*size, console=CONSOLE).rows()
        edge = [rows[0], rows[-1], "".join(row[0] for row in rows), "".join(row[-1] for row in rows)]
        assert [line[0] + line[-1] for line in edge] == ["┌┐", "└┘", "┌└", "┐┘"]
        for y, row in enumerate(rows):
            if row[0] in "├┌└":
                for x, char in enumerate(row):
                    assert char not in "┬┼" or rows[y + 1][x] in up, (size, y, x)
                    assert char not in "┴┼" or y == 0 or rows[y - 1][x] in down, (size, y, x)
        assert all(row[0] in right | down and row[-1] in left | up for row in rows)


# What is said ---------------------------------------------------------------------------------


def test_gpus_have_a_row_each_and_the_narrow_screen_shows_the_first():
    gpus = (Gpu(0, 0.93, 71, 10_952_000_000, 17_179_869_184), Gpu(3, 1.0, 88, 0, 17_179_869_184))
    text = "\n".join(frame(120, 50, gpus=gpus).rows())
    assert re.search(r"gpu0 +93%  71°C  10\.2/16\.0G", text)
    assert re.search(r"gpu3 +100%  88°C  0\.0/16\.0G", text)
    assert "gpu 93% 71°C 10.2/16G" in "\n".join(frame(80, 24, gpus=gpus).rows())
    assert "gpu" not in "\n".join(frame(120, 50).rows())


def test_the_gpu_meter_says_what_the_driver_says_or_nothing():
    try:
        import pynvml

        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except Exception:
        count = 0
    found = gpu_meter({}).read()
    assert len(found) == min(8, count)
    for gpu in found:
        assert 0 <= gpu.busy <= 1
        assert 0 <= gpu.used <= gpu.total
    assert gpu_meter({"CUDA_VISIBLE_DEVICES": ""}).read() == ()
    assert len(gpu_meter({"CUDA_VISIBLE_DEVICES": "0", "LOCAL_RANK": "0"}).read()) == min(1, count)


def test_the_filter_hides_other_lines():
    text = "\n".join(frame(120, 40, filter="rollback", console=("a rollback", "other")).rows())
    assert "ckpt/ep" not in text
    assert "step 1 350" in text
    assert "other" not in text


def test_scrolling_shows_older_events():
    first, scrolled = (frame(120, 35, focus=5, scroll=scroll).rows() for scroll in (0, 3))
    top = next(y for y, row in enumerate(first) if "events" in row) + 1
    assert scrolled[top] == first[top + 3]


def test_a_silent_run_says_how_long():
    assert "SILENT 2m00s" in frame(120, 35, now=run().last_time + 120).rows()[0]
    assert "RUN" in frame(120, 35).rows()[0]


def test_small_screens_show_whole_fields_only():
    rows = frame(40, 4).rows()
    assert rows[0].split()[:3] == ["R8", "●", "33.0%"]
    assert rows[3].strip() == "(40x4: enlarge to 60x16 for charts)"
    assert frame(12, 1).rows()[0].strip() == "R8 ● 33.0%"


def test_readonly_offers_no_control_keys():
    keys = frame(120, 35, readonly=True).rows()[-2]
    assert "stop" not in keys
    assert "close" in keys
    for width, height in ((120, 35), (80, 24)):
        keys = frame(width, height, opened=run().last_time).rows()[-2]
        assert "if the chart looks broken" in keys
        assert "? help" in keys


def test_several_runs_are_overlaid_with_letters():
    other = DashboardModel()
    for event in events_of_a_run(steps=2000, seed=5):
        other.consume(event)
    grid = render(Scene(run(), others=[other]), ViewState(utc_offset=0), 120, 35, run().last_time)
    assert "a run" in grid.rows()[3]
    assert any(style is Style.MARK and text.endswith("a") for y in range(4, 13) for _, text, style in grid.runs(y))


def test_a_frozen_copy_does_not_move():
    model = DashboardModel()
    for event in events_of_a_run(steps=500):
        model.consume(event)
    twin = deepcopy(model)
    before = frame(120, 35, twin, now=T0 + 300).rows()
    for event in events_of_a_run(steps=900):
        model.consume(event)
    assert frame(120, 35, twin, now=T0 + 300).rows() == before


# The grid -------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(-5, 25), st.text(max_size=30), st.integers(0, 25)), max_size=12), st.booleans())
@settings(max_examples=200)
def test_any_text_put_anywhere_keeps_the_cells(puts, ascii_only):
    grid = Grid(20, 1, ascii_only)
    for x, text, limit in puts:
        grid.put(0, x, text, Style.BOLD, limit)
    check_cells(grid, 20, 1, ascii_only)


@given(st.text(), st.integers(-1, 30))
def test_clipped_text_fits(text, width):
    assert cell_width(clip(text, width)) <= max(0, width)
    assert cell_width(text) > width or clip(text, width) == text


def test_wide_and_odd_characters_are_safe():
    grid = Grid(8, 1)
    grid.put(0, 0, "日本語漢字")
    assert grid.rows() == ["日本語漢"]
    grid.put(0, 1, "x")
    assert grid.rows() == [" x本語漢"]
    grid.put(0, 0, "a\x1b[2J\u202e\ud800e\u0301")
    assert grid.rows() == ["a?[2J?e\u0301 "]


# Snapshots ------------------------------------------------------------------------------------

PICTURES = {
    "wide": (120, 35, {}),
    "narrow": (80, 24, {}),
    "least": (60, 16, {}),
    "tall": (100, 60, {}),
    "blocks": (80, 24, {"glyphs": "blocks", "x_axis": "time"}),
    "ascii": (80, 24, {"glyphs": "ascii", "x_axis": "epoch"}),
    "worst": (120, 30, {"focus": 3, "zoomed": True}),
    "help": (80, 24, {"help": True}),
}


@given(st.floats(1e-99, 1e14), st.floats(1e-99, 1e14))
def test_an_edge_of_a_quadrant_is_never_cut_off(low, high):
    value = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    for edge in (low, high):
        text = in_six(edge)
        scale = value.get(text[-1], 1.0)
        assert len(text) <= 6
        assert float(text.rstrip("kMGT")) * scale == pytest.approx(edge, rel=0.5)


@pytest.mark.parametrize("name", PICTURES)
def test_the_picture_is_the_one_that_was_looked_at(name):
    width, height, view = PICTURES[name]
    text = "\n".join(row.rstrip() for row in frame(width, height, console=CONSOLE, hz=4, **view).rows()) + "\n"
    assert text == looked_at(name, text)


def test_the_summary_is_the_one_that_was_looked_at():
    text = summary_text(run()) + "\n"
    assert text == looked_at("summary", text)


def looked_at(name, text):
    path = SNAPSHOTS / f"{name}.txt"
    if os.environ.get("R8_UPDATE_SNAPSHOTS"):
        SNAPSHOTS.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return path.read_text(encoding="utf-8")


def test_routine_events_push_no_fault_out_of_view():
    model = DashboardModel()
    model.consume(
        e.SpikeSeen(time=1.0, step=10, epoch=0, verdict="spike", loss=9.0, expected_loss=1.0, score=8.0, indices=(1,))
    )
    for n in range(40):
        model.consume(e.CheckpointSaved(time=2.0 + n, step=20 + n, path=f"ckpt/{n}", bytes=10, seconds=0.1))
    text = "\n".join(render(Scene(model), ViewState(), 120, 35, 50.0).rows())
    assert "! spike" in text
    assert "ckpt/39" in text
    assert "ckpt/3 " not in text


def test_marks_of_routine_leave_room_and_those_of_faults_always_stand():
    model = DashboardModel()
    for n in range(400):
        model.consume(
            e.LossReported(
                time=float(n),
                step=n,
                epoch=0,
                loss=1.0 / (n + 1),
                expected_loss=1.0,
                lr=0.1,
                verdict="ok",
                score=0.0,
                size=8,
                step_seconds=0.1,
                r8_seconds=0.0,
            )
        )
        if n % 4 == 0:
            model.consume(e.CheckpointSaved(time=float(n), step=n, path="ckpt", bytes=10, seconds=0.1))
        if n in (101, 250):
            model.consume(
                e.SpikeSeen(
                    time=float(n),
                    step=n,
                    epoch=0,
                    verdict="spike",
                    loss=9.0,
                    expected_loss=1.0,
                    score=8.0,
                    indices=(1,),
                )
            )
    axis = next(row for row in render(Scene(model), ViewState(), 120, 35, 400.0).rows() if "└" in row and "C" in row)
    chart = axis.partition("│ ")[2][:70]
    assert chart.count("!") == 2
    assert 5 < chart.count("C") < 20
    assert "CC" not in chart


def test_names_of_a_family_stay_apart_and_what_has_no_room_is_counted():
    model = DashboardModel()
    model.consume(
        e.LossReported(
            time=1.0,
            step=1,
            epoch=0,
            loss=1.0,
            expected_loss=1.0,
            lr=0.1,
            verdict="ok",
            score=0.0,
            size=8,
            step_seconds=0.1,
            r8_seconds=0.0,
        )
    )
    for name in ("train/loss_cls", "train/loss_box", "train/loss_obj", *(f"m{n}" for n in range(20))):
        model.consume(e.MetricLogged(time=1.0, step=1, name=name, value=0.5))
    text = "\n".join(render(Scene(model), ViewState(), 120, 35, 2.0).rows())
    assert {"ss_cls", "ss_box", "ss_obj"} <= {word[-6:] for word in text.split()}
    assert "+" in text
    assert "more: 2 Enter" in text


def test_norms_of_the_gradient_s_parts_share_rows_of_the_numbers_and_the_one_that_leaps_stands_out():
    model = DashboardModel()
    names = ("wte", "h.0-2", "h.3-5", "h.6-8", "lm_head")
    for step in range(40):
        model.consume(
            e.LossReported(
                time=1.0 + step, step=step, epoch=0, loss=1.0, expected_loss=1.0, lr=0.1, verdict="calm", score=0.0,
                size=8, step_seconds=0.1, r8_seconds=0.0,
            )
        )  # fmt: skip
        model.consume(e.MetricLogged(time=1.0 + step, step=step, name="grad_norm", value=2.0))
        if step % 8 == 7:
            for name in names:
                value = 20.0 if name == "h.3-5" and step == 39 else 0.5
                model.consume(e.MetricLogged(time=1.0 + step, step=step, name=f"grad_norm/{name}", value=value))
    grid = render(Scene(model), ViewState(), 120, 35, 41.0)
    (y,) = (y for y, row in enumerate(grid.rows()) if "└ wte" in row)
    text = "\n".join(grid.rows()[y - 1 : y + 2])
    assert "grad_norm    2.000" in text
    assert "└ wte .500  h.0-2 .500  h.3-5 20" in text
    assert "lm_head .500" in text
    assert "grad_norm/" not in "\n".join(grid.rows())
    warned = [text for _, text, style in grid.runs(y) if style is Style.WARN]
    assert [text.split()[0] for text in warned] == ["h.3-5"]
    assert "grad_norm/" not in summary_text(model)
    assert "grad_norm" in summary_text(model)


@pytest.mark.parametrize("size", [(60, 16), (80, 24), (200, 50)])
def test_the_help_explains_every_word_and_sign_within_the_smallest_screen(size):
    pages = ["\n".join(render(Scene(DashboardModel()), ViewState(help=page), *size, 1.0).rows()) for page in (1, 2, 3)]
    for word in (
        "δsurp",
        "σ",
        "z ",
        "└ms",
        "used×",
        "easier",
        "stuck",
        "phase",
        "Q1..Q4",
        "▲",
        "ema",
        "held",
        "unseen",
    ):
        assert any(word in page for page in pages), word


def test_a_short_run_is_smoothed_over_a_small_part_of_it():
    model = DashboardModel()
    for n in range(400):
        model.consume(
            e.LossReported(
                time=float(n),
                step=n,
                epoch=0,
                loss=10 * 0.98**n,
                expected_loss=1.0,
                lr=0.1,
                verdict="ok",
                score=0.0,
                size=8,
                step_seconds=0.1,
                r8_seconds=0.0,
            )
        )
    for smoothing, word in ((-1.0, "ema.9 "), (0.98, "ema.98"), (0.0, "value")):
        assert word in "\n".join(render(Scene(model), ViewState(smoothing=smoothing), 120, 35, 400.0).rows())
