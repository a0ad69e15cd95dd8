"""The user's prints, from Python, C and subprocesses, are all in the console file, and the pane shows its tail."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learnit_r8.dashboard.terminal.capture import Capture
from learnit_r8.run.tail import ConsoleTail, fold
from tests.terminal_driver import Terminal

SOURCES = r"""
import logging
d = open_dashboard('curses', log_dir='run')
print('from print')
print('from stderr', file=sys.stderr)
logging.warning('from logging')
os.write(2, b'from os.write\n')
subprocess.run(['sh', '-c', 'echo from a subprocess; echo and its stderr >&2'])
ctypes.CDLL(None).printf(b'from %s\n', b'C printf')
sys.stdout.write('no newline at the end')
train(d, 0.3)
d.close()
print('after the run')
"""


def test_every_source_of_output_lands_in_the_console_file(tmp_path):
    with Terminal(SOURCES, tmp_path) as terminal:
        assert terminal.wait() == 0
        text = (tmp_path / "run" / "console.log").read_text()
        assert sorted(text.splitlines()) == sorted(
            [
                "from print",
                "from stderr",
                "WARNING:root:from logging",
                "from os.write",
                "from a subprocess",
                "and its stderr",
                "from C printf",
                "no newline at the end",
            ]
        )
        after = terminal.raw.rpartition(b"\x1b[?1049l")[2].decode()
        places = [after.index(line) for line in (*text.splitlines(), "learnit::r8", "after the run")]
        assert places == sorted(places), "then the terminal has them in their order, the summary, and what follows"


def test_the_pane_shows_the_prints(tmp_path):
    code = "d = open_dashboard('curses', log_dir='run')\nprint('my own line 17')\ntrain(d)\nd.close()"
    with Terminal(code, tmp_path, size=(120, 35)) as terminal:
        terminal.until("my own line 17")
        terminal.stop()
        assert terminal.wait() == 0


BURSTS = {
    # 100 000 numbered lines of 100 bytes.
    "10 MB from print": "for n in range(100_000):\n    print(f'{n:099d}')\n",
    # PyDLL keeps the GIL for the whole call: with a pipe or a pty behind descriptor 1 this never returns.
    "300 kB from C with the GIL held": (
        "libc = ctypes.PyDLL(None)\n"
        "text = ''.join(f'{n:099d}\\n' for n in range(3000)).encode()\n"
        "libc.printf(b'%s', text)\nlibc.fflush(None)\n"
    ),
}


@pytest.mark.parametrize("burst", BURSTS)
def test_nothing_of_a_burst_is_lost(burst, tmp_path):
    code = "d = open_dashboard('curses', log_dir='run')\ntrain(d, 0.2)\n" + BURSTS[burst] + "train(d, 0.3)\nd.close()"
    with Terminal(code, tmp_path) as terminal:
        assert terminal.wait(60) == 0
    numbers = [int(line) for line in (tmp_path / "run" / "console.log").read_text().splitlines()]
    assert numbers == list(range(100_000 if burst.startswith("10 MB") else 3000))


def test_a_killed_run_leaves_its_prints_in_the_file(tmp_path):
    code = """
d = open_dashboard('curses', log_dir='run')
print('last words')
ctypes.CDLL(None).printf(b'and in C\\n')
train(d, 0.2)
os.kill(os.getpid(), signal.SIGKILL)
"""
    with Terminal(code, tmp_path) as terminal:
        assert terminal.wait() == -9
        assert (tmp_path / "run" / "console.log").read_text() == "last words\nand in C\n"


def test_an_error_stream_that_goes_elsewhere_is_left_alone(tmp_path):
    code = """
os.dup2(os.open('err.log', os.O_WRONLY | os.O_CREAT), 2)
d = open_dashboard('curses', log_dir='run')
os.write(2, b'to my own file\\n')
train(d, 0.2)
d.close()
"""
    with Terminal(code, tmp_path) as terminal:
        assert terminal.wait() == 0
    assert (tmp_path / "err.log").read_text() == "to my own file\n"
    assert not (tmp_path / "run" / "console.log").exists()


def test_two_runs_append_to_one_file(tmp_path):
    for word in ("one", "two"):
        code = f"d = open_dashboard('curses', log_dir='run')\nprint({word!r})\ntrain(d, 0.1)\nd.close()"
        with Terminal(code, tmp_path) as terminal:
            assert terminal.wait() == 0
    assert (tmp_path / "run" / "console.log").read_text() == "one\ntwo\n"


def test_a_descriptor_that_is_no_terminal_is_not_captured(tmp_path):
    reader, writer = os.pipe()
    try:
        capture = Capture(tmp_path / "console.log", (writer,))
        os.write(writer, b"x")
        assert os.read(reader, 1) == b"x"
        capture.close()
        assert list(tmp_path.iterdir()) == []
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"plain", "plain"),
        (b" 36%|###\r 37%|####", " 37%|####"),
        (b" 37%|####\r", " 37%|####"),
        (b"windows\r\r", "windows"),
        (b"\x1b[31mred\x1b[0m\x1b]0;title\x07!", "red!"),
        (b"a\tb", "a       b"),
        (b"\xff\xfe bell\x07", "\ufffd\ufffd bell"),
        ("naïve 模".encode(), "naïve 模"),
        (b"", ""),
    ],
)
def test_a_line_is_folded_to_what_a_terminal_would_show(raw, shown):
    assert fold(raw) == shown


@given(st.lists(st.binary(max_size=60), max_size=30))
def test_the_tail_is_the_same_however_the_file_grows(tmp_path_factory, pieces):
    path = tmp_path_factory.mktemp("tail") / "console.log"
    growing = ConsoleTail(path, keep=7)
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            file.flush()
            shown = growing.poll()
    whole = ConsoleTail(path, keep=7)
    assert whole.poll() == (shown if pieces else [])
    assert whole.count == growing.count == b"".join(pieces).count(b"\n")


def test_no_line_ever_carries_a_control_character(tmp_path):
    path = tmp_path / "console.log"
    path.write_bytes(bytes(range(256)) * 3)
    assert all(
        char.isprintable() or char == " " or ord(char) > 0x7F for line in ConsoleTail(path).poll() for char in line
    )


def test_a_missing_file_is_an_empty_pane(tmp_path):
    assert ConsoleTail(tmp_path / "nothing").poll() == []
