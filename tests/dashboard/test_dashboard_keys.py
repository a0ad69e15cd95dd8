"""Keys: what each does, and that none does anything by accident."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learnit_r8.dashboard.keys import GLYPH_SETS, MAX_WINDOW, PANES, SMOOTHINGS, Action, ViewState, handle_key
from learnit_r8.types import Command

NAMED = [
    "KEY_LEFT", "KEY_RIGHT", "KEY_UP", "KEY_DOWN", "KEY_PPAGE", "KEY_NPAGE", "KEY_HOME", "KEY_END", "KEY_BACKSPACE",
    "KEY_RESIZE", "ENTER", "ESC", "TAB", "BACKTAB", "^L", "KEY_F1", "",
]  # fmt: skip
KEYS = st.one_of(st.sampled_from(NAMED), st.characters())


def press(*keys, **fields):
    view, asked = ViewState(**fields), []
    for key in keys:
        view, action = handle_key(view, key)
        asked.append(action)
    return view, asked


@given(st.lists(KEYS, max_size=40), st.booleans())
def test_any_keys_in_any_order_keep_the_view_valid(keys, readonly):
    view, asked = press(*keys, readonly=readonly)
    assert 0 <= view.focus <= PANES
    assert 0 <= view.window <= MAX_WINDOW
    assert view.glyphs in GLYPH_SETS
    assert view.smoothing in SMOOTHINGS
    assert view.scroll >= 0
    if readonly:
        assert not any(isinstance(action, Command) for action in asked)


def test_q_detaches_and_changes_nothing():
    assert press("q") == (ViewState(), [Action.DETACH])


@pytest.mark.parametrize(
    ("keys", "command"),
    [
        ("sstep", Command.STOP_AFTER_STEP),
        ("sepoch", Command.STOP_AFTER_EPOCH),
        ("sabort", Command.STOP_NOW),
        ("ppause", Command.PAUSE),
    ],
)
def test_stopping_and_pausing_take_a_whole_word_and_enter(keys, command):
    view, asked = press(*keys, "ENTER")
    assert asked == [None] * len(keys) + [command]
    assert not view.confirm
    assert press(*keys, "ESC")[1][-1] is None
    assert press(*keys[:-1], "ENTER")[1][-1] is None
    assert press(*keys, "x", "KEY_BACKSPACE", "ENTER")[1][-1] is command


SHELL = """
ls -la;cd ..;ps aux;cp -r a b;ssh gpu2;less train.log;pip install numpy;python train.py;nvidia-smi;top;htop;vim x.py
git status;git push;sudo su;df -h;du -sh .;tail -f out.log;grep -n step *.py;squeue -u me;scancel 123;sbatch run.sh;exit
make;cmake ..;gcc a.c;docker compose up;tmux ls;screen -r;mv a b;rm x;echo $PATH;source env.sh;conda activate p;snow sql
pause;stop;pp;ss;ps;sp;cpp;pip;gcc;kill %1;fg;bg;jobs;history;clear;reset;export X=1;unzip a.zip;tar xf p.tgz;cat a
"""


@pytest.mark.parametrize("command", [line.strip() for line in SHELL.replace("\n", ";").split(";") if line.strip()])
def test_a_shell_command_that_was_meant_for_another_window_neither_stops_nor_pauses(command):
    asked = press(*command, "ENTER", *command, "ENTER")[1]
    assert not set(asked) & {Command.STOP_AFTER_STEP, Command.STOP_AFTER_EPOCH, Command.STOP_NOW, Command.PAUSE}


@pytest.mark.parametrize("word", ["", "y", "yes", "stop", "s", "n", "e", " step", "pause"])
def test_any_other_word_leaves_the_stop_dialogue_and_stops_nothing(word):
    view, asked = press("s", *word, "ENTER")
    assert set(asked) == {None}
    assert not view.confirm


def test_p_pauses_and_goes_on():
    assert press(*"ppause", "ENTER", "p")[1][-2:] == [Command.PAUSE, Command.RESUME]
    assert press("p", paused=True)[1] == [Command.RESUME]


def test_c_asks_for_a_checkpoint():
    assert press("c")[1] == [Command.CHECKPOINT]


@pytest.mark.parametrize("key", list("scp"))
def test_readonly_turns_control_keys_off(key):
    assert press(key, readonly=True) == (ViewState(readonly=True), [None])


def test_repaint_works_everywhere():
    for fields in ({}, {"editing": True}, {"confirm": "stop"}, {"help": 1}):
        assert press("^L", **fields)[1] == [Action.REPAINT]


def test_tab_goes_round_the_panes_and_back():
    assert [press(*["TAB"] * n)[0].focus for n in range(1, 8)] == [1, 2, 3, 4, 5, 6, 1]
    assert press("BACKTAB")[0].focus == 6
    assert press("1", "BACKTAB")[0].focus == 6
    assert press("4")[0].focus == 4


def test_enter_zooms_and_escape_leaves_one_thing_at_a_time():
    view = press("5", "/", "x", "ENTER", "ENTER", "?")[0]
    assert (view.help, view.zoomed, view.filter, view.focus) == (True, True, "x", 5)
    seen = []
    for _ in range(4):
        view = handle_key(view, "ESC")[0]
        seen.append((view.help, view.zoomed, view.filter, view.focus))
    assert seen == [(False, True, "x", 5), (False, False, "x", 5), (False, False, "", 5), (False, False, "", 0)]


def test_filter_takes_every_printable_key_even_commands():
    view, asked = press("/", *"spike q", "KEY_BACKSPACE", "ENTER")
    assert (view.filter, view.editing) == ("spike ", False)
    assert set(asked) == {None}
    assert press("/", "a", "ESC")[0].filter == ""


def test_arrows_scroll_towards_older_lines_in_each_pane():
    assert press("5", "KEY_DOWN")[0].scroll == 1
    assert press("6", "KEY_UP")[0].scroll == 1
    assert press("6", "KEY_DOWN")[0].scroll == 0
    assert handle_key(ViewState(focus=5, scroll=3), "KEY_END", 7)[0].scroll == 7


def test_cycles_come_back():
    for key, length in (("y", 3), ("z", 5), ("x", 3), ("g", 3), ("f", 2), ("?", 4)):
        assert press(*[key] * length)[0] == ViewState()
        assert press(key)[0] != ViewState()


def test_window_halves_and_doubles():
    assert press("+", "+", "-")[0].window == 1
    assert press("-")[0].window == 0


def test_metric_goes_left_and_right():
    assert press("KEY_RIGHT", "KEY_RIGHT", "KEY_LEFT")[0].metric == 1
    assert press("KEY_LEFT")[0].metric == -1
