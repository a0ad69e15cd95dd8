"""Where the panes go, the lines between them, and how a pane is written into."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from learnit_r8.dashboard.drawing.cells import Grid
from learnit_r8.dashboard.keys import ViewState
from learnit_r8.run.model import DashboardModel
from learnit_r8.run.styles import Style

Piece = tuple[str, Style]
UP, DOWN, LEFT, RIGHT = 1, 2, 4, 8
_JUNCTIONS = " │││─┘┐┤─└┌├─┴┬┼"
"""Box character for each set of directions."""
WIDE = 100
ROOMY = 160
"""Columns from which the run's settings and the machine's load have a pane."""
MIN_WIDTH, MIN_HEIGHT = 60, 16


class Boxes:
    """Lines that know where they meet: the junctions follow from the lines."""

    def __init__(self) -> None:
        self._ways: dict[tuple[int, int], int] = defaultdict(int)

    def horizontal(self, y: int, x0: int, x1: int) -> None:
        """Add a line from cell `x0` to cell `x1` of row `y`, both included."""
        for x in range(x0, x1 + 1):
            self._ways[y, x] |= (LEFT if x > x0 else 0) | (RIGHT if x < x1 else 0)

    def vertical(self, x: int, y0: int, y1: int) -> None:
        """Add a line from row `y0` to row `y1` of column `x`, both included."""
        for y in range(y0, y1 + 1):
            self._ways[y, x] |= (UP if y > y0 else 0) | (DOWN if y < y1 else 0)

    def draw(self, grid: Grid) -> None:
        for (y, x), ways in self._ways.items():
            grid.put(y, x, _JUNCTIONS[ways], Style.DIM)


@dataclass(frozen=True, slots=True)
class Rect:
    """A pane's place: its title row and the content below, borders left out."""

    name: str  # which pane: "chart", "now", "difficulty", "metric:NAME", "events" or "console"
    y: int  # row of the title, on the line above the content
    x: int  # first cell of the content
    width: int  # cells of the content
    height: int  # rows of the content

    @property
    def kind(self) -> str:
        return self.name.partition(":")[0]

    @property
    def metric(self) -> str:
        return self.name.partition(":")[2]


@dataclass(frozen=True, slots=True)
class Scene:
    """What a frame shows."""

    model: DashboardModel  # the run's numbers; read only
    lines: Sequence[str] = ()  # the newest lines that the run printed, oldest first
    title: str = ""  # where they are kept
    others: Sequence[DashboardModel] = ()  # further runs, whose lines lie in the main chart
    own: bool = True  # the run is this process's: what a frame costs is one of its costs


PANES = ("", "chart", "now", "difficulty", "metric:lr", "events", "console")
"""The panes that keys focus, by number."""


@dataclass(frozen=True, slots=True)
class Pane:
    """A pane's place on the grid, and what it is drawn from."""

    grid: Grid
    rect: Rect
    scene: Scene
    view: ViewState
    now: float
    other_key: Sequence[Piece] = ()  # key and name of the pane that has no room beside this one

    @property
    def wide(self) -> bool:
        """The screen has room for more than the least."""
        return self.grid.width >= WIDE

    def write(self, row: int, *parts: Piece, indent: int = 0) -> int:
        """Write styled pieces one after the other into a row, the title's being -1; return the cell after them."""
        rect = self.rect
        return self.grid.put_all(rect.y + 1 + row, rect.x + indent, parts, rect.x + rect.width) - rect.x

    def heading(self, name: str, *parts: Piece) -> None:
        """Write the title into the line above; the pane in focus has angles round its number."""
        number = PANES.index(self.rect.name) if self.rect.name in PANES else 0
        focused = number and self.view.focus == number
        x = self.write(-1, (f" {name} ", Style.REVERSE if focused else Style.TITLE))
        if number:
            key = (f"‹{number}› ", Style.REVERSE) if focused else (f"[{number}] ", Style.DIM)
            x = self.write(-1, key, indent=x)
        for text, style in parts:
            if x + len(text) + 2 > self.rect.width:
                break
            x = self.write(-1, (f" {text} ", style), indent=x)


@dataclass(frozen=True, slots=True)
class Band:
    """A row of panes side by side, from the left; a width of 0 takes what is left."""

    panes: tuple[tuple[str, int], ...]  # (name, width) from left to right
    least: int  # fewest rows of content; with fewer the band is left out
    usual: int  # rows of content that it gets before any band gets more
    most: int = 1000  # rows of content that it can use
    share: int = 0  # its part of the rows that are left after that


def allot(bands: Sequence[Band], rows: int) -> list[int]:
    """Return the content rows of each band, 0 for those left out; the last ones are left out first.

    Every band takes one row more, for its title.
    """
    kept = len(bands)
    while kept > 1 and sum(band.least + 1 for band in bands[:kept]) > rows:
        kept -= 1
    heights = [band.least for band in bands[:kept]]
    free = rows - sum(heights) - kept
    if free < 0:
        heights[0] = max(0, heights[0] + free)
        free = 0
    for i, band in enumerate(bands[:kept]):
        more = min(free, band.usual - heights[i])
        heights[i] += more
        free -= more
    while free > 0:
        taking = [i for i in range(kept) if bands[i].share and heights[i] < bands[i].most]
        if not taking:
            heights[0] += free
            break
        for i in taking:
            more = min(free, bands[i].share, bands[i].most - heights[i])
            heights[i] += more
            free -= more
    return heights + [0] * (len(bands) - kept)


def place(bands: Sequence[tuple[Band, int]], top: int, width: int, boxes: Boxes) -> list[Rect]:
    """Stack the bands, each with its content rows, from row `top` on, add their lines, and return the panes."""
    found, y = [], top
    for band, height in bands:
        if height == 0:
            continue
        boxes.horizontal(y, 0, width - 1)
        x = 0
        free = width - 1 - sum(cells for _, cells in band.panes)
        sharing = sum(cells == 0 for _, cells in band.panes)
        for i, (name, cells) in enumerate(band.panes, start=1):
            edge = x + (cells or free // sharing) if i < len(band.panes) else width - 1
            boxes.vertical(edge, y, y + height + 1)
            found.append(Rect(name, y, x + 2, edge - x - 3, height))
            x = edge
        y += height + 1
    return found
