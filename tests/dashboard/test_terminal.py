"""The curses screen on real pseudo-terminals: it shows, obeys, survives, and always gives the terminal back."""

from __future__ import annotations

import base64
import json
import re
import signal
import subprocess
import sys

import pytest

from tests.terminal_driver import JOB_CONTROL, LEFT_ALTERNATE, PRELUDE, Screen, Stream, Terminal

RUN = "d = open_dashboard('curses', log_dir='run')\ntrain(d)\nd.close()\n"


def console(terminal):
    return (terminal.folder / "run" / "console.log").read_bytes()


def test_the_screen_shows_a_run_and_gives_the_terminal_back_with_a_summary(tmp_path):
    with Terminal("print('before')\n" + RUN + "print('the end')", tmp_path) as terminal:
        terminal.until(lambda: re.search(r"EPOCH .* [1-9]\d?\.\d%", terminal.text()))
        assert terminal.stty() != terminal.before
        terminal.stop()
        assert terminal.wait() == 0
        assert terminal.stty() == terminal.before
        after = terminal.raw.split(LEFT_ALTERNATE)[-1].decode()
        assert "the end" in after
        assert re.search(r"reached +[\d ]+ of 4 000 steps", after)


DEATHS = {
    "normal end": ("", None, 0),
    "exception": ("raise ValueError('boom')", None, 1),
    "SIGINT": ("wait_for_stop()", signal.SIGINT, -2),
    "SIGTERM": ("wait_for_stop()", signal.SIGTERM, -15),
    "SIGHUP": ("wait_for_stop()", signal.SIGHUP, -1),
    "SIGKILL": ("wait_for_stop()", signal.SIGKILL, -9),
    "SIGSEGV": ("ctypes.string_at(0)", None, -11),
    "os._exit": ("os._exit(3)", None, 3),
}


@pytest.mark.parametrize("death", DEATHS)
def test_the_terminal_is_as_before_after(death, tmp_path):
    ending, number, status = DEATHS[death]
    code = "d = open_dashboard('curses', log_dir='run')\ntrain(d, 0.5)\nopen('ready', 'w')\n" + ending
    with Terminal(code, tmp_path) as terminal:
        terminal.until(lambda: (tmp_path / "ready").exists() and b"\x1b[?1049h" in terminal.raw)
        if number is not None:
            terminal.process.send_signal(number)
        assert terminal.wait() == status
        terminal.until(lambda: terminal.stty() == terminal.before)
        terminal.until(lambda: LEFT_ALTERNATE in terminal.raw)


def test_a_traceback_lands_on_the_normal_screen(tmp_path):
    code = "d = open_dashboard('curses', log_dir='run')\nprint('a line')\ntrain(d, 0.3)\nraise ValueError('boom')"
    with Terminal(code, tmp_path) as terminal:
        assert terminal.wait() == 1
        shown = terminal.raw.rsplit(LEFT_ALTERNATE, 1)[-1]
        assert b"Traceback" in shown
        assert b"ValueError: boom" in shown
        assert console(terminal) == b"a line\n"


LEAVING = {
    "os._exit": "os._exit(3)",
    "a watchdog's": "threading.Thread(target=lambda: os._exit(3)).start()\ntime.sleep(20)",
    "exec": "os.execvp('sh', ['sh', '-c', 'stty -a | grep -e -icanon; echo another program; exit 3'])",
}


@pytest.mark.parametrize("way", LEAVING)
def test_who_leaves_without_a_word_leaves_the_terminal_as_it_was(way, tmp_path):
    code = "d = open_dashboard('curses', log_dir='run')\nprint('a line', end='')\ntrain(d, 0.3)\n" + LEAVING[way]
    with Terminal(code, tmp_path) as terminal:
        assert terminal.wait() == 3
        assert terminal.stty() == terminal.before, "a shell takes over what it finds at this moment"
        shown = terminal.raw.rsplit(LEFT_ALTERNATE, 1)[-1]
        assert b"a line\r\nlearnit::r8" in shown
        assert b"died without a word" not in shown
        assert (b"another program" in shown) == (way == "exec")
        assert b"-icanon" not in shown


def test_a_custom_sigterm_handler_survives_the_start_of_curses(tmp_path):
    code = """
def leave(number, frame):
    raise SystemExit(7)
signal.signal(signal.SIGTERM, leave)
d = open_dashboard('curses', log_dir='run')
train(d)
"""
    with Terminal(code, tmp_path) as terminal:
        terminal.until(lambda: "loss" in terminal.text())
        terminal.process.terminate()
        assert terminal.wait() == 7
        assert terminal.stty() == terminal.before


def test_ctrl_z_gives_the_terminal_to_the_shell_and_fg_repaints(tmp_path):
    argv = [sys.executable, "-c", JOB_CONTROL, PRELUDE + RUN]
    with Terminal("", tmp_path, argv=argv) as terminal:
        terminal.until(lambda: "loss" in terminal.text())
        terminal.send("\x1a")
        terminal.until(lambda: (tmp_path / "stopped").exists() and (tmp_path / "stopped").stat().st_size > 100)
        modes = (tmp_path / "stopped").read_text()
        assert modes.split(";", 3)[0] + modes.split(";", 3)[3] == terminal.before
        terminal.until(lambda: LEFT_ALTERNATE in terminal.raw)
        seen = len(terminal.raw)
        (tmp_path / "fg").touch()
        terminal.until(lambda: b"\x1b[?1049h" in terminal.raw[seen:])
        assert terminal.stty() != terminal.before
        terminal.until(lambda: "loss" in terminal.text())
        terminal.stop()
        assert terminal.wait() == 0
        assert terminal.stty() == terminal.before


@pytest.mark.parametrize(
    ("term", "curses"),
    [
        ("xterm-256color", True),
        ("screen", True),
        ("tmux", True),
        ("linux", True),
        ("vt100", True),
        ("xterm-ghostty", True),  # no description of them is installed here
        ("xterm-kitty-newest", True),
        ("dumb", False),
        ("no-such-terminal", False),
        (None, False),
    ],
)
def test_every_kind_of_terminal_gets_a_screen_or_plain_lines(term, curses, tmp_path):
    code = "d = open_dashboard('auto')\nprint('is:', d.name, file=open('shown', 'w'))\ntrain(d, epochs=2)\nd.close()\n"
    with Terminal(code, tmp_path, env={"TERM": term}) as terminal:
        terminal.until(lambda: "loss" in terminal.text() if curses else b"r8 " in terminal.raw)
        terminal.until(lambda: (tmp_path / "shown").exists() and (tmp_path / "shown").stat().st_size)
        assert (tmp_path / "shown").read_text() == f"is: {'curses' if curses else 'log'}\n"
        terminal.stop()
        assert terminal.wait() == 0
        assert terminal.stty() == terminal.before
        if not curses:
            assert b"\x1b" not in terminal.raw
            assert b"TERM" in terminal.raw, "a person at a terminal is told why there is no screen"


def test_a_storm_of_200_resizes_ends_with_a_whole_screen(tmp_path):
    with Terminal(RUN, tmp_path) as terminal:
        terminal.until("loss")
        for turn in range(200):
            terminal.resize(1 + (turn * 37) % 160, 1 + (turn * 23) % 60)
            terminal.pump(0.002)
        terminal.resize(90, 28)
        seen = len(terminal.raw)
        terminal.until(lambda: len(terminal.raw) > seen and "loss" in terminal.text() and "─┐" in terminal.text())
        assert terminal.process.poll() is None
        terminal.stop()
        assert terminal.wait() == 0
        assert terminal.stty() == terminal.before


SIZES = [(1, 1), (2, 1), (1, 40), (59, 15), (60, 16), (80, 24), (300, 100)]


def test_one_run_is_drawn_at_every_size_and_recovers(tmp_path):
    with Terminal(
        "d = open_dashboard('curses')\ntrain(d)\nassert not d.fault, d.fault\nd.close()", tmp_path
    ) as terminal:
        terminal.until("loss")
        for columns, rows in SIZES:
            terminal.resize(columns, rows)
            seen = len(terminal.raw)
            terminal.until(lambda: len(terminal.raw) > seen)  # noqa: B023 - run before the next turn
            terminal.until(lambda: terminal.text().strip() != "")
        terminal.until("loss")
        terminal.stop()
        assert terminal.wait() == 0


STILL = """
d = open_dashboard('curses', log_dir='run')
print('needle in the console')
train(d, 0.5)
wait_for_stop()
d.close()
print('commands', *d.commands)
"""


def test_every_key_does_what_the_help_says(tmp_path):
    with Terminal(STILL, tmp_path, size=(120, 35)) as terminal:
        terminal.until("needle in the console")
        for keys, expected in [
            ("?", "close this view"),
            ("\x1b", "!close this view"),
            ("6\r", "needle in the console"),
            ("\x1b", "EPOCH"),
            ("/nothing", "filter: nothing_"),
            ("\r", "/nothing"),
            ("\x1b\x1b", "!/nothing"),
            ("\x1b[C", "!loss [1]"),
            ("\x1b[D", "loss [1]"),
            ("y", "y:log"),
            ("x", "x:time"),
            ("s", "after this epoch, with a checkpoint"),
            ("\x1b", "!after this epoch"),
            ("gg", "!─"),
            ("g", "─"),
            ("12345\t\x1b[Z\x1b[5~\x1b[6~\x1bOA\x1bOB\x1b[H\x1b[Fzzzz++--ff\x0c", "EPOCH"),
            ("cppause\rsabort\r", "!after this epoch"),
        ]:
            terminal.send(keys)
            if expected.startswith("!"):
                terminal.until(lambda: expected[1:] not in terminal.text())  # noqa: B023 - run before the next turn
            else:
                terminal.until(expected)
        terminal.stop()
        assert terminal.wait() == 0
        assert b"commands checkpoint pause stop-now" in terminal.raw


def test_readonly_keys_control_nothing(tmp_path):
    code = STILL.replace("log_dir='run'", "log_dir='run', readonly=True")
    with Terminal(code, tmp_path, size=(120, 35)) as terminal:
        terminal.until("needle in the console")
        terminal.send("cppause\rsabort\r\x1b?")
        terminal.until("close this view")
        terminal.stop()
        assert terminal.wait() == 0
        assert b"commands\r\n" in terminal.raw


def test_q_closes_the_view_and_training_goes_on_in_plain_lines(tmp_path):
    code = "d = open_dashboard('curses', log_dir='run')\ntrain(d)\nprint('prints reach the terminal')\nd.close()"
    with Terminal(code, tmp_path) as terminal:
        terminal.until("loss")
        terminal.send("q")
        terminal.until(lambda: b"training goes on" in terminal.raw)
        assert terminal.stty() == terminal.before
        assert terminal.process.poll() is None
        terminal.stop()
        assert terminal.wait() == 0
        after = terminal.raw.split(LEFT_ALTERNATE)[-1].partition(b"training goes on")[2]
        assert b"prints reach the terminal" in after
        assert b"learnit::r8" in after
        assert b"\x1b" not in after


def test_input_and_breakpoint_get_the_normal_screen(tmp_path):
    code = """
d = open_dashboard('curses', log_dir='run')
train(d, 0.3)
name = input('who? ')
train(d, 0.3)
breakpoint()
x = name
train(d)
d.close()
print('hello', x)
"""
    with Terminal(code, tmp_path) as terminal:
        terminal.until(lambda: b"who? " in terminal.raw)
        assert terminal.stty() == terminal.before
        entered = terminal.raw.count(b"\x1b[?1049h")
        terminal.send("Ada\n")
        terminal.until(lambda: terminal.raw.count(b"\x1b[?1049h") > entered)
        terminal.until(lambda: b"(Pdb) " in terminal.raw)
        assert LEFT_ALTERNATE in terminal.raw.rpartition(b"\x1b[?1049h")[2]
        entered = terminal.raw.count(b"\x1b[?1049h")
        terminal.send("p name\n")
        terminal.until(lambda: b"'Ada'" in terminal.raw)
        terminal.send("continue\n")
        terminal.until(lambda: terminal.raw.count(b"\x1b[?1049h") > entered)
        terminal.stop()
        assert terminal.wait() == 0
        assert b"hello Ada" in terminal.raw.split(LEFT_ALTERNATE)[-1]
        assert terminal.stty() == terminal.before


TALKS = {
    "pdb.set_trace": ("import pdb; pdb.set_trace()\nx = 1", b"(Pdb) ", "p 6 * 7\ncontinue\n", b"42"),
    "pdb.post_mortem": (
        "try:\n    1 / 0\nexcept ZeroDivisionError:\n    import pdb; pdb.post_mortem()",
        b"(Pdb) ",
        "p 6 * 7\nq\n",
        b"42",
    ),
    "code.interact": ("import code; code.interact(banner='HELLO', local={})", b">>> ", "6 * 7\n\x04", b"42"),
    "stdin.readline": (
        "print('PROMPT> ', end=''); print('GOT', sys.stdin.readline())",
        b"PROMPT> ",
        "Ada\n",
        b"GOT Ada",
    ),
    "getpass": ("import getpass; print('GOT', getpass.getpass('secret: '))", b"secret: ", "Ada\n", b"GOT Ada"),
    "getpass imported before": ("print('GOT', ask('secret: '))", b"secret: ", "Ada\n", b"GOT Ada"),
    "IPython.embed": ("import IPython; IPython.embed(colors='nocolor')", b"]: ", "6*7\n\x04y\n", b"42"),
    "a shell in suspended()": (
        "with d.suspended(): subprocess.run(['sh', '-c', 'printf \"asks: \"; read x; echo GOT $x'])",
        b"asks: ",
        "Ada\n",
        b"GOT Ada",
    ),
}


@pytest.mark.parametrize("talk", TALKS)
def test_whatever_talks_to_the_user_gets_the_normal_screen(talk, tmp_path):
    code, prompt, keys, answer = TALKS[talk]
    program = f"""
from getpass import getpass as ask
d = open_dashboard('curses', log_dir='run')
train(d, 0.3)
{code}
train(d)
d.close()
"""
    with Terminal(program, tmp_path) as terminal:
        terminal.until(lambda: prompt in terminal.raw.rpartition(LEFT_ALTERNATE)[2])
        if talk == "IPython.embed":
            terminal.pump(1.0)  # it discards what is typed before it is ready
        entered = terminal.raw.count(b"\x1b[?1049h")
        for line in keys.splitlines(keepends=True):
            # A key that comes before the prompt means something else: an end of file among them is lost.
            asked = terminal.raw.count(prompt)
            for key in line:
                terminal.send(key)
                terminal.pump(0.02)
            if not keys.endswith(line):
                terminal.until(lambda asked=asked: terminal.raw.count(prompt) > asked)
        terminal.until(lambda: terminal.raw.count(b"\x1b[?1049h") > entered)
        terminal.stop()
        assert terminal.wait() == 0
        shown = terminal.raw.decode("utf-8", "replace").replace("\x1b[?1049h", "")
        assert answer.decode() in shown
        if talk.startswith("getpass"):
            assert shown.count("Ada") == shown.count("GOT Ada"), "what is typed is not echoed"
        assert terminal.stty() == terminal.before


def test_another_program_that_takes_the_terminal_is_left_alone_and_told_about(tmp_path):
    code = """
d = open_dashboard('curses', log_dir='run')
train(d, 0.3)
subprocess.run(['sh', '-c', 'saved=$(stty -g); stty -echo icanon; read x; stty $saved; echo GOT $x'])
train(d)
d.close()
"""
    with Terminal(code, tmp_path) as terminal:
        terminal.until(lambda: b"another program has taken the terminal" in terminal.raw)
        entered = terminal.raw.count(b"\x1b[?1049h")
        terminal.send("Ada\n")
        terminal.until(lambda: terminal.raw.count(b"\x1b[?1049h") > entered)
        terminal.stop()
        assert terminal.wait() == 0
        assert "GOT Ada" in terminal.raw.rpartition(LEFT_ALTERNATE)[2].decode()
        assert terminal.stty() == terminal.before


def test_after_a_sudden_death_the_terminal_has_the_last_words_and_the_newest_checkpoint(tmp_path):
    code = """
from learnit_r8.events import CheckpointSaved
d = open_dashboard('curses', log_dir='run')
print('an early line')
train(d, 0.3)
d.record(CheckpointSaved(time=time.time(), step=7, path='ckpt/step7', bytes=10, seconds=0.1))
for n in range(30):
    print('line', n)
print('\\x1b[31mred\\x1b[0m 10%\\r 20%\\r 30%', end='', flush=True)
while not d._display.board._guardian.newest:
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""
    with Terminal(code, tmp_path, size=(300, 20)) as terminal:
        assert terminal.wait() == -9
        terminal.until(lambda: b"newest checkpoint" in terminal.raw)
        terminal.pump(0.3)
        screen = Screen(300, 20)
        Stream(screen).feed(b"\r\n" * 12 + b"PROMPT> " + terminal.raw.rpartition(LEFT_ALTERNATE)[2])
        rows = [row.rstrip() for row in screen.display]
        lines = [row for row in rows if row]
        assert "what it printed last:" in lines[0]
        assert lines[1:-3] == [f"line {n}" for n in range(18, 30)] + [" 30%"], "as many as there is room for"
        assert lines[-3].endswith("run/console.log")
        assert lines[-2].endswith(str(tmp_path / "ckpt" / "step7"))
        assert (lines[-1], rows[screen.cursor.y], screen.cursor.x) == ("PROMPT>", "PROMPT>", 8), "its prompt was first"


def test_after_q_faults_are_told_and_ctrl_z_and_fg_bring_the_screen_back(tmp_path):
    code = RUN.replace("train(d)", "train(d, 60)")
    argv = [sys.executable, "-c", JOB_CONTROL, PRELUDE + code]
    with Terminal("", tmp_path, argv=argv) as terminal:
        terminal.until("loss")
        terminal.send("q")
        terminal.until(lambda: b"training goes on" in terminal.raw)
        terminal.until(lambda: b"rollback: ->" in terminal.raw.rpartition(b"training goes on")[2])
        seen = len(terminal.raw)
        terminal.send("\x1a")
        terminal.until(lambda: (tmp_path / "stopped").exists())
        (tmp_path / "fg").touch()
        terminal.until(lambda: b"\x1b[?1049h" in terminal.raw[seen:])
        terminal.until("EPOCH")
        terminal.stop()
        assert terminal.wait() == 0
        assert terminal.stty() == terminal.before


def test_a_child_that_reads_a_line_without_setting_modes_has_the_keyboard(tmp_path):
    code = """
d = open_dashboard('curses', log_dir='run')
train(d, 0.3)
subprocess.run(['sh', '-c', 'printf "asks: "; read x; echo GOT $x'])
train(d)
d.close()
"""
    with Terminal(code, tmp_path) as terminal:
        terminal.until(lambda: b"another program has taken the terminal" in terminal.raw)
        terminal.until(lambda: b"asks: " in terminal.raw.rpartition(LEFT_ALTERNATE)[2])
        entered = terminal.raw.count(b"\x1b[?1049h")
        terminal.send("Ada\n")
        terminal.until(lambda: terminal.raw.count(b"\x1b[?1049h") > entered)
        terminal.stop()
        assert terminal.wait() == 0
        shown = terminal.raw.decode()
        assert "GOT Ada" in shown.rpartition("\x1b[?1049l")[2]
        assert "Ada" in shown.partition("GOT Ada")[0], "what is typed is echoed"
        assert terminal.stty() == terminal.before


def test_the_rich_display_has_last_words_too(tmp_path):
    code = """
d = open_dashboard('rich', log_dir='run')
train(d, 0.7)
print('the very last line')
os.kill(os.getpid(), signal.SIGKILL)
"""
    with Terminal(code, tmp_path) as terminal:
        assert terminal.wait() == -9
        terminal.until(lambda: b"newest checkpoint" in terminal.raw)
        assert b"the very last line" in terminal.raw.partition(b"printed last:")[2]
        assert terminal.stty() == terminal.before


@pytest.mark.parametrize("names", [{"LC_ALL": "C"}, {"LC_ALL": "POSIX"}, {"LANG": "xx_YY.UTF-8"}, {"LANG": None}])
def test_no_cell_is_blank_where_the_locale_is_missing(names, tmp_path):
    with Terminal(RUN, tmp_path, env=names) as terminal:
        terminal.until("EPOCH")
        terminal.until(lambda: len(terminal.text().splitlines()[-1].strip()) == 100)
        assert set(terminal.text().splitlines()[-1]) <= set("+-└─┘")
        terminal.send("g")  # and other glyphs than the first are drawn as well
        terminal.pump(1.0)
        terminal.until(lambda: len(terminal.text().splitlines()[-1].strip()) == 100)
        terminal.stop()
        assert terminal.wait() == 0


def test_an_exception_in_the_thread_costs_a_display_and_not_the_run(tmp_path):
    code = """
import learnit_r8.dashboard.displays.screen as screen
d = open_dashboard('curses', log_dir='run')
train(d, 0.3)
def broken(*args, **kw):
    raise ZeroDivisionError('a bug in a chart')
screen.Screen._own_scene = broken
while d.name != 'rich':
    train(d, 0.1)
name, fault = d.name, d.fault
d.close()
print(name, fault)
"""
    with Terminal(code, tmp_path) as terminal:
        assert terminal.wait() == 0
        assert b"rich ZeroDivisionError: a bug in a chart" in terminal.raw
        assert terminal.stty() == terminal.before


def test_a_bug_in_the_model_reaches_neither_the_loop_nor_close(tmp_path):
    code = """
from learnit_r8.run.model import DashboardModel
def broken(*_):
    raise IndexError('a bug in the model')
DashboardModel.consume_all = broken
d = open_dashboard('curses', log_dir='run')
train(d, 0.5)
d.close()
print('alive', d.fault)
"""
    with Terminal(code, tmp_path) as terminal:
        assert terminal.wait() == 0
        assert b"alive IndexError: a bug in the model" in terminal.raw
        assert terminal.stty() == terminal.before


def test_forked_and_spawned_workers_leave_the_screen_alone(tmp_path):
    code = """
import multiprocessing
def work(n):
    print('worker', n, flush=True)
    return n
if __name__ == '__main__':
    d = open_dashboard('curses', log_dir='run')
    train(d, 0.3)
    with multiprocessing.get_context('fork').Pool(2) as pool:
        assert pool.map(work, range(4)) == [0, 1, 2, 3]
    child = os.fork()
    if not child:
        d.close()
        sys.exit(0)
    os.waitpid(child, 0)
    worker = multiprocessing.get_context('spawn').Process(target=time.sleep, args=(0,))
    worker.start()
    worker.join()
    victim = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))
    victim.start()
    victim.terminate()
    victim.join()
    open('ready', 'w')
    train(d)
    assert victim.exitcode == -15, victim.exitcode
    d.close()
"""
    script = tmp_path / "script.py"
    script.write_text(PRELUDE + code)
    with Terminal("", tmp_path, argv=[sys.executable, str(script)]) as terminal:
        terminal.until(lambda: (tmp_path / "ready").exists())
        terminal.until("loss")
        assert LEFT_ALTERNATE not in terminal.raw
        assert terminal.stty() != terminal.before
        terminal.stop()
        assert terminal.wait() == 0
        assert console(terminal).count(b"worker") == 4
        assert terminal.stty() == terminal.before


def test_the_death_of_the_parent_is_noticed_although_forked_workers_live_on(tmp_path):
    code = """
import multiprocessing
d = open_dashboard('curses', log_dir='run')
train(d, 0.3)
multiprocessing.get_context('fork').Process(target=wait_for_stop).start()
open('ready', 'w')
wait_for_stop()
"""
    with Terminal(code, tmp_path) as terminal:
        terminal.until(lambda: (tmp_path / "ready").exists())
        terminal.process.kill()
        terminal.until(lambda: LEFT_ALTERNATE in terminal.raw and terminal.stty() == terminal.before)
        terminal.stop()
        assert terminal.process.wait(10) == -9


@pytest.mark.parametrize("how", ["stopped by Ctrl-S", "never read"])
def test_a_terminal_that_takes_nothing_stops_neither_training_nor_close(how, tmp_path):
    code = "d = open_dashboard('curses', log_dir='run')\ntrain(d)\nopen('trained', 'w')\nd.close()\nopen('closed', 'w')"
    with Terminal(code, tmp_path) as terminal:
        terminal.until("loss")
        if how == "never read":
            terminal.drain = False
        else:
            terminal.send("\x13")
        for turn in range(5):  # every new size is a whole new frame of 20 kB and more; a pty holds 4 to 64 kB
            terminal.resize(290 + turn, 99)
            terminal.pump(0.3)
        terminal.stop()
        terminal.until(lambda: (tmp_path / "closed").exists(), 10)
        assert terminal.stty() == terminal.before
        terminal.drain = True
        assert terminal.wait() == 0
        if how == "stopped by Ctrl-S":
            assert LEFT_ALTERNATE in terminal.raw


def test_no_color_leaves_colours_out(tmp_path):
    with Terminal(RUN, tmp_path, env={"NO_COLOR": "1"}) as terminal:
        terminal.until("loss")
        terminal.stop()
        assert terminal.wait() == 0
    assert not any(f"\x1b[3{colour}m".encode() in terminal.raw for colour in range(8))


def test_two_dashboards_in_one_process_follow_each_other(tmp_path):
    with Terminal(
        "for _ in range(2):\n    d = open_dashboard('curses')\n    train(d, 0.4)\n    d.close()\n", tmp_path
    ) as terminal:
        assert terminal.wait() == 0
        assert terminal.raw.count(b"\x1b[?1049h") == terminal.raw.count(LEFT_ALTERNATE) == 2
        assert terminal.stty() == terminal.before


def test_of_runs_in_several_threads_one_has_the_screen(tmp_path):
    code = """
names, begin = [], threading.Barrier(3)
def run():
    begin.wait()
    d = open_dashboard()
    names.append(d.name)
    train(d, 1.0)
    d.close()
threads = [threading.Thread(target=run) for _ in range(2)]
for thread in threads: thread.start()
run()
for thread in threads: thread.join()
print('names:', *sorted(names))
"""
    with Terminal(code, tmp_path, size=(100, 80)) as terminal:
        assert terminal.wait() == 0
        assert re.search(rb"names: (curses log log|log log rich)\r\n", terminal.raw)
        assert terminal.stty() == terminal.before


def test_the_summary_is_readable_where_the_stream_is_less_than_its_terminal(tmp_path):
    with Terminal(RUN, tmp_path, env={"PYTHONIOENCODING": "ascii"}) as terminal:
        terminal.until("alarms none")
        terminal.stop()
        assert terminal.wait() == 0
        shown = terminal.raw.rsplit(LEFT_ALTERNATE, 1)[-1]
        assert b"where the time went" in shown
        assert b"??" not in shown


def test_anything_that_has_a_write_gets_lines_and_the_summary(tmp_path):
    code = """
kept, real = [], sys.stdout
class Tee:
    def write(self, text): kept.append(text)
sys.stdout = Tee()
d = open_dashboard()
train(d, 0.5)
d.close()
sys.stdout = real
print(d.name, d.fault or 'sound', 'learnit::r8  demo' in ''.join(kept))
"""
    with Terminal(code, tmp_path) as terminal:
        assert terminal.wait() == 0
        assert b"log sound True" in terminal.raw


def test_a_dashboard_opened_outside_the_main_thread_uses_rich(tmp_path):
    code = """
box = []
thread = threading.Thread(target=lambda: box.append(open_dashboard('curses')))
thread.start(); thread.join()
for n in range(3):
    print('user line', n)
    train(box[0], 0.4)
print('name', box[0].name)
box[0].close()
"""
    with Terminal(code, tmp_path, size=(100, 80)) as terminal:
        assert terminal.wait() == 0
        shown = [line.rstrip() for line in terminal.text().splitlines()]
        prints = [number for number, line in enumerate(shown) if line in {"user line 0", "user line 1", "user line 2"}]
        assert prints == [0, 1, 2], "prints stand above the live lines, whole and in order"
        assert "name rich" in shown
        assert terminal.stty() == terminal.before


def plain_run(code, folder, **kw):
    import os

    env = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.getcwd(),
        "STOP_FILE": str(folder / "stop"),
        "LANG": "C.UTF-8",
        "TERM": kw.pop("term", "xterm"),
    }
    return subprocess.run(
        kw.pop("argv", [sys.executable, "-c", PRELUDE + code]), env=env, cwd=folder, capture_output=True, **kw
    )


@pytest.mark.parametrize("ui", ["auto", "curses", "rich", "log"])
def test_without_a_terminal_there_is_no_escape_and_no_carriage_return(ui, tmp_path):
    code = f"d = open_dashboard({ui!r})\ntrain(d, pause=0, epochs=3, batches=50)\nd.close()"
    done = plain_run(code, tmp_path, stdin=subprocess.DEVNULL, timeout=60)
    assert done.returncode == 0
    assert done.stderr == b""
    assert b"checkpoint" in done.stdout
    assert b"\x1b" not in done.stdout
    assert b"\r" not in done.stdout


def test_head_ends_quietly(tmp_path):
    code = (
        PRELUDE
        + "d = open_dashboard('auto')\ntrain(d, epochs=40, batches=20, pause=0.0005)\nd.close()\nopen('done', 'w')"
    )
    (tmp_path / "script.py").write_text(code)
    done = plain_run("", tmp_path, argv=["sh", "-c", f"{sys.executable} script.py | head -1"], timeout=60)
    assert done.stderr == b""
    assert done.stdout.count(b"\n") == 1
    assert (tmp_path / "done").exists()


GRIDS = """
import base64, json
import numpy as np
from learnit_r8.dashboard.drawing.cells import Grid, Style
from learnit_r8.dashboard.terminal.curses_screen import canvas
# No wide characters: pyte loses half of one that something is written over.
rng, board, frames = np.random.default_rng(5), canvas(os.environ, (80, 24)), []
words = ['loss', '│', '─' * 9, '⣿⣀⠤', ' ' * 12, 'é', '▁▂▇█', '0.0873', '┘']
grid = None
for turn in range(120):
    if turn % 10 == 0:
        grid = Grid(int(rng.integers(1, 130)), int(rng.integers(1, 40)))
    for _ in range(int(rng.integers(0, 60))):
        y, x = int(rng.integers(0, grid.height)), int(rng.integers(0, grid.width))
        grid.put(y, x, str(rng.choice(words)), Style(int(rng.integers(0, 10))))
    if turn % 3 == 0 and grid.height > 2:  # rows move as a whole: ncurses scrolls
        grid._cells[1:], grid._styles[1:] = grid._cells[:-1], grid._styles[:-1]
        grid._cells = [list(row) for row in grid._cells]
        grid._styles = [list(row) for row in grid._styles]
        grid._touched.update(range(grid.height))
    data = board.draw(grid)
    frames.append([grid.width, grid.height, base64.b64encode(data).decode(), grid.rows()])
print(json.dumps(frames))
"""


@pytest.mark.parametrize("term", ["xterm-256color", "screen", "tmux", "linux", "vt100"])
def test_the_terminal_ends_up_with_exactly_the_cells_of_the_grid(term, tmp_path):
    done = plain_run(GRIDS, tmp_path, stdin=subprocess.DEVNULL, timeout=60, term=term)
    assert done.returncode == 0, done.stderr.decode()
    screen = Screen(80, 24)
    stream = Stream(screen)
    for width, height, data, rows in json.loads(done.stdout):
        if (screen.columns, screen.lines) != (width, height):
            screen.resize(height, width)
        stream.feed(base64.b64decode(data))
        assert screen.display == rows
