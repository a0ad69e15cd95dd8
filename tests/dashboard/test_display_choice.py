"""Which display is chosen where, why, and what the plain ones write."""

from __future__ import annotations

import io
import itertools
import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learnit_r8.core.config import UI_NAMES
from learnit_r8.dashboard import open_dashboard
from learnit_r8.dashboard.demo import DemoRun
from learnit_r8.dashboard.displays.choice import Choice, Surroundings, below, choose, wanted_ui
from learnit_r8.dashboard.displays.log_lines import BURST, LogLines, Outlet
from learnit_r8.dashboard.frame_rate import NORMAL, FrameRate
from learnit_r8.dashboard.terminal.keyboard import KeyDecoder
from learnit_r8.dashboard.terminal.tty import TerminalGone
from learnit_r8.errors import ConfigError
from learnit_r8.events import EpochEnded, LossReported, Notice, RunEnded, SpikeSeen
from learnit_r8.run.model import DashboardModel

TERMINAL = Surroundings()
PIPE = Surroundings(stdin_tty=False, stdout_tty=False, foreground=False)


@pytest.mark.parametrize(
    ("ui", "changes", "name", "reason"),
    [
        ("auto", {}, "curses", ""),
        ("auto", {"rank": 1}, "off", "rank 0"),
        ("auto", {"pytest": True}, "off", "pytest"),
        ("auto", {"ci": True}, "log", "continuous-integration"),
        ("auto", {"notebook": True, "stdout_tty": False}, "notebook", "notebook"),
        ("auto", {"stdin_tty": False}, "rich", "standard input"),
        ("auto", {"main_thread": False}, "rich", "main thread"),
        ("auto", {"has_curses": False}, "rich", "redirect curses"),
        ("auto", {"has_curses": False, "posix": False}, "log", "redirect curses"),
        ("auto", {"stdout_tty": False}, "log", "standard output is not"),
        ("auto", {"foreground": False}, "log", "background"),
        ("auto", {"term_problem": "TERM is not set"}, "log", "TERM is not set"),
        ("auto", {"stdout_tty": False, "stdout_open": False}, "off", "standard output is not"),
        ("auto", {"posix": False}, "curses", ""),
        ("rich", {"posix": False}, "log", "POSIX"),
        ("curses", {"ci": True, "pytest": True}, "curses", ""),
        ("rich", {}, "rich", ""),
        ("log", {}, "log", ""),
        ("off", {}, "off", ""),
    ],
)
def test_the_display_and_its_reason(ui, changes, name, reason):
    chosen = choose(ui, replace(TERMINAL, **changes))
    assert chosen.name == name
    assert reason in chosen.reason
    assert bool(chosen.reason) == bool(reason)


FLAGS = [
    "posix",
    "stdin_tty",
    "stdout_tty",
    "stdout_open",
    "foreground",
    "main_thread",
    "notebook",
    "ci",
    "has_curses",
]


@given(st.sampled_from(UI_NAMES), st.fixed_dictionaries({flag: st.booleans() for flag in FLAGS}))
def test_escapes_are_never_chosen_for_what_is_no_terminal(ui, flags):
    around = Surroundings(**flags)
    chosen = choose(ui, around)
    if not around.stdout_tty or not around.foreground:
        assert chosen.name in {"log", "notebook", "off"}
    assert choose(chosen.name, around) == Choice(chosen.name) or chosen.name == "notebook"


def test_each_step_down_leads_to_off():
    for name in ("curses", "rich", "notebook", "log"):
        path = list(itertools.accumulate(range(5), lambda at, _: below(at, PIPE), initial=name))
        assert path[-1] == "off"


def test_the_environment_overrides_the_argument_and_nonsense_in_it_is_ignored():
    assert wanted_ui("auto", {"R8_UI": "log"}) == "log"
    assert wanted_ui("curses", {"R8_UI": " OFF "}) == "off"
    assert wanted_ui("rich", {"R8_UI": "fancy"}) == "rich"
    with pytest.raises(ConfigError, match="auto, curses, rich, log, off; got 'fancy'"):
        wanted_ui("fancy", {})


def test_nonsense_in_the_environment_is_told_of(capfd):
    open_dashboard("log", environment={"R8_UI": "fancy"}).close()
    assert "R8_UI=fancy is none of auto, curses, rich, log, off" in capfd.readouterr().out


def test_nothing_is_opened_in_a_test_of_pytest_unless_asked_for():
    assert open_dashboard("auto", environment={"PYTEST_CURRENT_TEST": "x"}) is None
    assert open_dashboard("auto", environment={"R8_UI": "off"}) is None


def play(display, model, events, start=0.0):
    for event in events:
        model.consume(event)
        display.tick(model, [event], event.time)


def test_the_log_has_one_line_an_epoch_and_news_but_no_escapes():
    out = io.StringIO()
    model = DashboardModel()
    play(LogLines(Outlet(out), 0.0), model, [event for _, event in DemoRun(epochs=4, batches=100, start=0.0, seed=2)])
    lines = out.getvalue().splitlines()
    assert sum(" epoch: " in line for line in lines) == 4
    assert sum(" checkpoint: " in line for line in lines) == 4
    assert "end: finished" in lines[-1]
    assert all(line.startswith("r8 ") for line in lines)
    assert not set("\x1b\r") & set(out.getvalue())


def test_the_log_beats_every_30_seconds_while_steps_happen():
    out = io.StringIO()
    model = DashboardModel()
    display = LogLines(Outlet(out), 0.0)
    for second in range(125):
        event = LossReported(
            time=float(second),
            step=second,
            epoch=0,
            loss=1.0,
            expected_loss=1.0,
            lr=1e-3,
            verdict="calm",
            score=0.0,
            size=8,
            step_seconds=1.0,
            r8_seconds=1e-4,
        )
        model.consume(event)
        display.tick(model, [event], float(second))
    assert len(out.getvalue().splitlines()) == 4
    for second in range(125, 300):
        display.tick(model, [], float(second))
    assert len(out.getvalue().splitlines()) == 5, "a loop that stands still says nothing new"


def test_a_flood_of_spikes_is_counted_instead_of_printed():
    out = io.StringIO()
    display, model = LogLines(Outlet(out), 0.0), DashboardModel()
    spikes = [
        SpikeSeen(time=1.0, step=n, epoch=0, verdict="spike", loss=9.0, expected_loss=1.0, score=8.0, indices=(1,))
        for n in range(1000)
    ]
    play(
        display,
        model,
        [*spikes, EpochEnded(time=1.5, step=1000, epoch=0, mean_loss=1.0, seconds=1.0, batches=10, completed=True)],
    )
    display.tick(model, [RunEnded(time=40.0, step=1000, reason="finished", seconds=40.0)], 40.0)
    lines = out.getvalue().splitlines()
    assert len(lines) <= BURST + 4
    assert any("and more events: 980 spike" in line for line in lines)
    assert any("finished" in line for line in lines)


def test_a_message_cannot_smuggle_control_characters_into_the_log():
    out = io.StringIO()
    play(
        LogLines(Outlet(out), 0.0),
        DashboardModel(),
        [Notice(time=1.0, step=0, message="a\x1b[2Jb\rc\nd\x9be", level="warning")],
    )
    assert out.getvalue().count("\n") == 1
    assert not set("\x1b\r\x9b") & set(out.getvalue())


def test_a_reader_that_is_gone_ends_the_log():
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        outlet = Outlet(stream)
        os.close(reader)
        outlet.line("nobody reads this")
        with pytest.raises(TerminalGone):
            outlet.pump()


def test_a_reader_that_sleeps_costs_lines_and_no_time():
    reader, writer = os.pipe()
    try:
        with os.fdopen(writer, "w") as stream:
            outlet = Outlet(stream)
            for number in range(5000):  # 500 kB into a pipe of 64 kB: a blocking write would never return
                outlet.line(f"{number:099d}")
                outlet.pump()
            assert os.read(reader, 100) == b"%099d\n" % 0
    finally:
        os.close(reader)


def test_text_that_the_stream_cannot_encode_is_replaced():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    outlet = Outlet(stream)
    outlet.line("loss ▁▂▃")
    outlet.pump()
    assert raw.getvalue() == b"loss ???\n"


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (b"qs?1", ["q", "s", "?", "1"]),
        (b"\x1b[A\x1b[B\x1b[C\x1b[D", ["KEY_UP", "KEY_DOWN", "KEY_RIGHT", "KEY_LEFT"]),
        (b"\x1bOA\x1bOB\x1bOC\x1bOD", ["KEY_UP", "KEY_DOWN", "KEY_RIGHT", "KEY_LEFT"]),
        (b"\x1b[5~\x1b[6~\x1b[H\x1b[4~", ["KEY_PPAGE", "KEY_NPAGE", "KEY_HOME", "KEY_END"]),
        (b"\x1b[1;5A", ["KEY_UP"]),
        (b"\r\n\t\x1b[Z", ["ENTER", "ENTER", "TAB", "BACKTAB"]),
        (b"\x7f\x08", ["KEY_BACKSPACE", "KEY_BACKSPACE"]),
        (b"\x0c\x1a", ["^L", "^Z"]),
        ("é模".encode(), ["é", "模"]),
        (b"\x1b[200~\x1b[99;9u", []),
    ],
)
def test_bytes_become_key_names_however_they_are_cut(data, names):
    assert KeyDecoder().feed(data) == names
    one_by_one = KeyDecoder()
    assert [name for byte in data for name in one_by_one.feed(bytes([byte]))] + one_by_one.flush() == names


def test_a_lone_escape_is_the_escape_key_once_nothing_follows():
    decoder = KeyDecoder()
    assert decoder.feed(b"\x1b") == []
    assert decoder.waiting
    assert decoder.flush() == ["ESC"]
    assert not decoder.waiting


@given(st.binary(max_size=200))
def test_no_input_breaks_the_decoder(data):
    decoder = KeyDecoder()
    for name in decoder.feed(data) + decoder.flush():
        assert name
        assert name.isprintable() or ord(name) > 0x7F


def frames(rate, seconds, fresh, cost=0.001, start=0.0, others=0.0, busy=1.0):
    count, now = 0, start
    while now < start + seconds:
        if rate.due(now, fresh):
            rate.drew(now, cost, others, busy)
            count += 1
        now += 0.05
    return count


def test_the_frame_rate_follows_what_happens():
    assert frames(FrameRate(), 10, fresh=True) == 40
    assert frames(FrameRate(), 10, fresh=False) == 10
    assert frames(FrameRate(), 10, fresh=True, cost=0.004) == 20, "the thread takes 0.8% of a core at most"
    assert frames(FrameRate(), 60, fresh=True, cost=0.0015, others=0.006 * 0.25) < 4 * 60 * 0.9, "events included"
    assert frames(FrameRate(), 60, fresh=True, cost=0.003, busy=0.02) > 4 * 60 * 0.95, "a process that waits has time"
    assert frames(FrameRate(), 10, fresh=True, cost=0.02) == 10
    pressed = FrameRate()
    pressed.key(0.0)
    assert frames(pressed, 2, fresh=False) == 20
    assert frames(pressed, 8, fresh=False, start=2.0) == 8


def test_a_frame_a_second_is_whole_and_each_one_after_a_key_or_a_new_size():
    rate, drawn = FrameRate(), []
    for number in range(50):
        drawn.append(rate.whole(number / 4))
        rate.drew(number / 4, 0.002 if drawn[-1] else 0.0005, whole=drawn[-1])
    assert drawn == [True] * 9 + [True, False, False, False] * 10 + [True]
    assert rate.period == NORMAL, "most frames are cheap"
    rate.hurry()
    assert rate.whole(12.3)
    rate.drew(12.3, 0.002)
    assert not rate.whole(12.4)
    rate.key(12.4)
    rate.drew(12.4, 0.002)
    assert rate.whole(12.5)


def test_the_demo_run_is_the_same_for_the_same_seed_and_has_everything():
    once = [event for _, event in DemoRun(seed=3)]
    assert repr(once) == repr([event for _, event in DemoRun(seed=3)])
    assert repr(once) != repr([event for _, event in DemoRun(seed=4)])
    kinds = {type(event).__name__ for event in once}
    assert {"SpikeSeen", "RolledBack", "CheckpointSaved", "MetricLogged", "QuadrantsRefreshed", "RunEnded"} <= kinds
    assert [event.time for event in once] == sorted(event.time for event in once)
