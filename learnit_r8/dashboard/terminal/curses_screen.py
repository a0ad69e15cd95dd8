"""The curses screen: a grid of cells on a real terminal.

Rules, each for a measured reason:

1. ncurses writes into an anonymous file, never to the terminal; `Tty.send` carries each frame over. curses' own writes
   block, some of them with the GIL held (`endwin`, `doupdate`): a terminal stopped by Ctrl-S would stop training.
2. It gets there by C's `stdout` pointing at that file while `initscr` runs; descriptor 1 is for the user's prints only.
3. `initscr` runs in the main thread, which alone can put back the signal handlers that it replaces (SIGINT, SIGTERM,
   SIGTSTP, SIGWINCH): with ncurses' own, SIGTERM exits with 1 and a forked worker clears its parent's screen.
4. From then on exactly one thread calls curses; a resize is polled there, never signalled.
5. Drawing, reading and setting modes happen in the terminal's foreground group only.
"""

from __future__ import annotations

import contextlib
import ctypes
import curses
import locale
import os
import re
import signal
import sys
import tempfile
from collections.abc import Mapping
from functools import cache

from learnit_r8.dashboard.drawing.cells import Grid, cell_width
from learnit_r8.dashboard.terminal.capture import c_stream
from learnit_r8.run.styles import Style

# Tones of the 256 that stand out from black and from white (contrast of at least 3 with both): nobody can be asked
# reliably what the background is.
_COLOURS: dict[Style, tuple[int, int]] = {
    Style.GOOD: (28, curses.COLOR_GREEN),
    Style.WARN: (130, curses.COLOR_YELLOW),
    Style.BAD: (160, curses.COLOR_RED),
    Style.ACCENT: (31, curses.COLOR_CYAN),
    Style.TITLE: (32, curses.COLOR_BLUE),
    Style.MARK: (133, curses.COLOR_MAGENTA),
}
"""A style's tone of 256, and its colour of the eight that every terminal with colours has; the others have none."""
_ATTRIBUTES: dict[Style, int] = {
    Style.DIM: curses.A_DIM,
    Style.BOLD: curses.A_BOLD,
    Style.BAD: curses.A_BOLD,
    Style.TITLE: curses.A_BOLD,
    Style.REVERSE: curses.A_REVERSE,
}
_MODERN = re.compile(
    r"xterm|kitty|ghostty|alacritty|wezterm|foot|contour|rio|konsole|vte|gnome|iterm|mlterm|rxvt|tmux|screen|(256color|direct)$",
    re.IGNORECASE,
)
_STAND_IN = "xterm-256color"
"""What drives a terminal whose own description is not installed here, as after ssh from kitty."""
_UNICODE_LOCALES = ("C.UTF-8", "C.utf8", "en_US.UTF-8", "UTF-8")
_REPLACED_BY_INITSCR = ("SIGINT", "SIGTERM", "SIGTSTP", "SIGWINCH")


class Cells:
    """What a curses window shows of grids: only what has changed is written; `whole`: every cell of the next one."""

    def __init__(self, window: curses.window, styles: Mapping[Style, int]) -> None:
        self._window, self._styles = window, styles
        self._shown, self._last = Grid(0, 0), Grid(0, 0)
        self.whole = True

    @property
    def size(self) -> tuple[int, int]:
        return self._shown.width, self._shown.height

    def show(self, grid: Grid) -> None:
        if (grid.width, grid.height) != self.size:
            self._shown, self.whole = Grid(grid.width, grid.height), True
        touched = grid.take_touched()
        with contextlib.suppress(curses.error):
            if self.whole:
                self._window.erase()
                self._window.clearok(True)
        for y in touched if grid is self._last and not self.whole else range(grid.height):
            runs = grid.runs(y) if self.whole else grid.changes(self._shown, y)
            for x, text, style in runs:
                self._put(y, x, text, self._styles.get(style, 0))
            if runs:
                self._shown.restore(grid, y, 0, grid.width)
        self._last, self.whole = grid, False
        with contextlib.suppress(curses.error):
            self._window.refresh()

    def _put(self, y: int, x: int, text: str, attribute: int) -> None:
        width, height = self.size
        last = ""
        if y == height - 1 and x + cell_width(text) >= width:
            # Writing the last cell would scroll; inserting it does not.
            cut = max((i for i, char in enumerate(text) if cell_width(char)), default=0)
            text, last = text[:cut], text[cut:]
        with contextlib.suppress(curses.error, ValueError):
            if text:
                self._window.addstr(y, x, text, attribute)
            if last:
                self._window.insstr(y, x + cell_width(text), last, attribute)


class Canvas:
    """Draws grids with curses into a buffer; `draw` returns the bytes for the terminal.

    curses can be started once in a process, so there is one of these, from `canvas()`.
    """

    def __init__(self, environment: Mapping[str, str], size: tuple[int, int]) -> None:
        self._fd = _anonymous_file()
        self._window = _initscr(self._fd, size)
        self.unicode = locale.nl_langinfo(locale.CODESET).upper().replace("-", "") == "UTF8"
        self._cells = Cells(self._window, start_colours(environment))
        self._pid = os.getpid()
        self.reset_bytes = b"".join(_capability(name) for name in ("sgr0", "cnorm", "rmcup"))
        for prepare in (curses.noecho, lambda: curses.curs_set(0)):
            with contextlib.suppress(curses.error):
                prepare()
        # The cursor is hidden: it need not travel back after every frame.
        self._window.leaveok(True)
        # ncurses would otherwise break off a refresh when it sees a key waiting.
        curses.typeahead(-1)
        # Entering the screen sets margins for `size`; a first grid of another size has to come after that.
        self._window.refresh()
        self._ahead = self._take()

    @property
    def mine(self) -> bool:
        """This process started it: a forked child shares the buffer with its parent and must not draw."""
        return self._pid == os.getpid()

    def repaint(self) -> None:
        self._cells.whole = True

    def draw(self, grid: Grid) -> bytes:
        """Return the bytes that turn what was drawn before into `grid`."""
        if (grid.width, grid.height) != self._cells.size:
            curses.resizeterm(grid.height, grid.width)
            # ncurses believes that this resets the scrolling margins. They home the cursor: the repaint must follow.
            region = curses.tigetstr("csr")
            self._ahead += curses.tparm(region, 0, grid.height - 1) if region else b""
        self._cells.show(grid)
        ahead, self._ahead = self._ahead, b""
        return ahead + self._take()

    def finish(self) -> bytes:
        """Return the bytes that leave the screen; the next `draw` enters it again."""
        # endwin wants to set the modes of its output, a file: an error that means nothing here.
        with contextlib.suppress(curses.error):
            curses.endwin()
        self.repaint()
        return self._take() + _capability("cnorm")

    def _take(self) -> bytes:
        length = os.lseek(self._fd, 0, os.SEEK_CUR)
        data = os.pread(self._fd, length, 0) if length else b""
        os.lseek(self._fd, 0, os.SEEK_SET)
        os.ftruncate(self._fd, 0)
        return data


_canvas: list[Canvas] = []


def canvas(environment: Mapping[str, str], size: tuple[int, int]) -> Canvas:
    """Return the process's canvas, started by the first call, which must come from the main thread."""
    if not _canvas:
        _canvas.append(Canvas(environment, size))
    return _canvas[0]


def term_problem(term: str) -> str:
    """Return why a terminal of this type cannot be drawn on; empty when it can."""
    return _usable(term)[1]


@cache
def _usable(term: str) -> tuple[str, str]:
    """Return the description to use for a terminal, and why there is none; curses takes only the first one it finds."""
    if not term:
        return term, "TERM is not set"
    problem = ""
    for name in (term, _STAND_IN) if _MODERN.search(term) else (term,):
        try:
            # Asking _curses directly would end the process for an unknown type.
            curses.setupterm(name, fd=sys.__stdout__.fileno() if sys.__stdout__ else 1)
            addressable = curses.tigetstr("cup") and curses.tigetstr("clear")
        except (curses.error, OSError, ValueError) as error:
            problem = problem or f"TERM={term} is unknown here ({error}): install its terminfo, or try TERM={_STAND_IN}"
        else:
            return name, "" if addressable else f"TERM={term} cannot move its cursor"
    return term, problem


def can_redirect() -> bool:
    """Return whether curses can be started here: C's `stdout` can be redirected, and no parent process started it."""
    if _canvas and not _canvas[0].mine:
        return False
    try:
        library = ctypes.CDLL(None)
        return bool(library.fdopen and c_stream(library, "stdout"))
    except (OSError, AttributeError, ValueError, TypeError):
        return False


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("learnit_r8-frames", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _initscr(fd: int, size: tuple[int, int]) -> curses.window:
    library = ctypes.CDLL(None)
    library.fdopen.restype = ctypes.c_void_p
    stream = library.fdopen(fd, b"w")
    handlers = {
        number: signal.getsignal(number) for name in _REPLACED_BY_INITSCR if (number := getattr(signal, name, None))
    }
    _choose_locale()
    pointer = c_stream(library, "stdout")
    before = pointer.value
    told = {name: os.environ.get(name) for name in ("COLUMNS", "LINES", "TERM")}
    # A file has no size: without these, ncurses would set scrolling margins for 24 rows.
    os.environ.update(COLUMNS=str(size[0]), LINES=str(size[1]), TERM=_usable(os.environ.get("TERM", ""))[0])
    pointer.value = stream
    try:
        return curses.initscr()
    finally:
        pointer.value = before
        for name, value in told.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        for number, handler in handlers.items():
            if handler is not None:  # None: installed by C code, which ncurses leaves alone
                signal.signal(number, handler)


def _choose_locale() -> None:
    """Let C write UTF-8, as Python itself does where there is no locale: ncurses blanks what it cannot encode."""
    for name in ("", *_UNICODE_LOCALES):
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, name)
            if locale.nl_langinfo(locale.CODESET).upper() in {"UTF-8", "UTF8"}:
                return
    with contextlib.suppress(locale.Error):
        locale.setlocale(locale.LC_CTYPE, "")


def start_colours(environment: Mapping[str, str], tones: bool = True) -> dict[Style, int]:
    """Start colours and return the attributes of the styles that have some; `tones`: more than eight may be used."""
    styles = dict(_ATTRIBUTES)
    if environment.get("NO_COLOR"):
        return styles
    # Where a terminal says so it is believed; yellow on white cannot be read.
    light = environment.get("COLORFGBG", "").rpartition(";")[2] in {"7", "15"}
    try:
        curses.start_color()
        if not curses.has_colors():
            return styles
        background = curses.COLOR_BLACK
        with contextlib.suppress(curses.error):
            curses.use_default_colors()
            background = -1
        many = tones and curses.COLORS >= 256
        for pair, (style, (tone, colour)) in enumerate(_COLOURS.items(), start=1):
            few = curses.COLOR_RED if light and style is Style.WARN else colour
            curses.init_pair(pair, tone if many else few, background)
            styles[style] = styles.get(style, 0) | curses.color_pair(pair)
    except curses.error:
        return dict(_ATTRIBUTES)
    return styles


def _capability(name: str) -> bytes:
    """Return a terminfo string without its padding marks, which matter to hardware terminals only."""
    value = curses.tigetstr(name) or b""
    head, *rest = value.split(b"$<")
    return head + b"".join(part.partition(b">")[2] for part in rest)
