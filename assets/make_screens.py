"""Draws the README's pictures: example.py on a real pseudo-terminal, its cells as SVG.

python assets/make_screens.py     # needs the example and test extras
"""

from __future__ import annotations

import fcntl
import html
import os
import pty
import re
import select
import struct
import sys
import tempfile
import termios
import time
from pathlib import Path

import pyte

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tests.terminal_driver import Screen, Stream  # noqa: E402 - pyte's own lack two sequences that ncurses sends

TEMPORARY = re.compile(r"/\S*\.console\.log")  # the prints' file, whose name says where the picture was made
CELL_WIDTH, CELL_HEIGHT, MARGIN = 8.4, 17, 14
BACKGROUND, FOREGROUND = "#11151c", "#d7dce4"
COLOURS = {
    "black": "#3b4252", "red": "#ff6b6b", "green": "#7bd88f", "brown": "#f5c76b", "yellow": "#f5c76b",
    "blue": "#6fa8ff", "magenta": "#d59bff", "cyan": "#62d6e8", "white": "#ffffff", "default": FOREGROUND,
}  # fmt: skip


def record(columns: int, rows: int, share: float) -> Screen:
    """Run example.py on a terminal and return its screen when that share of the steps is done."""
    screen = Screen(columns, rows)
    stream = Stream(screen)
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm-256color", LANG="C.UTF-8")
        os.environ.pop("CI", None)
        # A run is called what its folder is called.
        folder = Path(tempfile.mkdtemp()) / "digits"
        folder.mkdir()
        os.chdir(folder)
        os.environ["PYTHONPATH"] = str(HERE.parent)
        os.execv(sys.executable, [sys.executable, str(HERE.parent / "example.py"), "--ui", "curses"])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    deadline = time.monotonic() + 120
    settled = deadline
    try:
        while time.monotonic() < deadline:
            ready, _, _ = select.select([terminal], [], [], 0.05)
            if ready:
                try:
                    stream.feed(os.read(terminal, 65536))
                except OSError as error:  # the program has ended
                    raise RuntimeError("\n".join(screen.display)) from error
            if progress(screen) >= share and time.monotonic() > settled:
                return screen
            if progress(screen) < share:
                settled = time.monotonic() + 0.2  # the rest of the frame
    finally:
        os.kill(pid, 15)
        os.waitpid(pid, 0)
        os.close(terminal)
    raise TimeoutError("example.py did not get that far within two minutes")


def progress(screen: pyte.Screen) -> float:
    """Return the share that the TOTAL bar shows, 0 while there is none."""
    for line in screen.display:
        found = re.search(r"TOTAL.*?([\d.]+)%", line)
        if found:
            return float(found.group(1)) / 100
    return 0.0


def colour(name: str, *, bold: bool) -> str:
    if name in COLOURS:
        return COLOURS["white"] if bold and name == "default" else COLOURS[name]
    return f"#{name}"


def svg(screen: pyte.Screen) -> str:
    """Return the screen's cells as an SVG document."""
    width, height = screen.columns * CELL_WIDTH + 2 * MARGIN, screen.lines * CELL_HEIGHT + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}">',
        f'<rect width="100%" height="100%" rx="10" fill="{BACKGROUND}"/>',
        "<g font-family=\"'DejaVu Sans Mono','Menlo','Consolas',monospace\" font-size=\"14\">",
    ]
    for row in range(screen.lines):
        column = 0
        while column < screen.columns:
            cell = screen.buffer[row][column]
            style = (cell.fg, cell.bold, cell.reverse)
            end = column
            while end < screen.columns and style == (
                screen.buffer[row][end].fg, screen.buffer[row][end].bold, screen.buffer[row][end].reverse
            ):  # fmt: skip
                end += 1
            parts += run(screen, row, column, end)
            column = end
    return "\n".join([*parts, "</g></svg>", ""])


def run(screen: pyte.Screen, row: int, start: int, end: int) -> list[str]:
    """Return one run of cells of the same style."""
    cells = [screen.buffer[row][column] for column in range(start, end)]
    text = "".join(cell.data for cell in cells)
    if not text.strip() and not cells[0].reverse:
        return []
    x, y = MARGIN + start * CELL_WIDTH, MARGIN + row * CELL_HEIGHT
    length = (end - start) * CELL_WIDTH
    fill = colour(cells[0].fg, bold=cells[0].bold)
    parts = []
    if cells[0].reverse:
        parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{length:.1f}" height="{CELL_HEIGHT}" fill="{fill}"/>')
        fill = BACKGROUND
    weight = ' font-weight="bold"' if cells[0].bold else ""
    # Words of ASCII hold together in any monospace font; braille and boxes do not, so each has its own place.
    for word in re.finditer(r"[!-~]+|[^ -~]", "".join(cell.data or " " for cell in cells)):
        place = x + word.start() * CELL_WIDTH
        shown = TEMPORARY.sub("console.log", word[0])
        parts.append(f'<text x="{place:.1f}" y="{y + 14:.1f}" fill="{fill}"{weight}>{html.escape(shown)}</text>')
    return parts


def main() -> None:
    for columns, rows in ((120, 35), (80, 24)):
        target = HERE / f"dashboard-{columns}x{rows}.svg"
        target.write_text(svg(record(columns, rows, 0.7)), encoding="utf-8")
        print(f"wrote {target.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
