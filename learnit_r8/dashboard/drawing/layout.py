"""Where the panes go, and the lines between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from learnit_r8.dashboard.drawing.cells import Grid
from learnit_r8.run.styles import Style

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
        """Put all lines into the grid."""
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


def place(bands: Sequence[Band], heights: Sequence[int], top: int, width: int, boxes: Boxes) -> list[Rect]:
    """Stack the bands from row `top` on, add their lines to `boxes`, and return the panes."""
    found, y = [], top
    for band, height in zip(bands, heights, strict=True):
        if height == 0:
            continue
        boxes.horizontal(y, 0, width - 1)
        x = 0
        free = width - 1 - sum(cells for _, cells in band.panes)
        sharing = sum(cells == 0 for _, cells in band.panes)
        for name, cells in band.panes[:-1]:
            edge = x + (cells or free // sharing)
            boxes.vertical(edge, y, y + height + 1)
            found.append(Rect(name, y, x + 2, edge - x - 3, height))
            x = edge
        found.append(Rect(band.panes[-1][0], y, x + 2, width - x - 4, height))
        y += height + 1
    return found
