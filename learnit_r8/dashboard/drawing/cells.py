"""A grid of styled character cells: all that a terminal needs, and all that a test compares."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby, takewhile

from learnit_r8.run.styles import Style

STYLES = tuple(Style)
# One cell to one cell, so that the ASCII picture has the layout of the others.
_ASCII = str.maketrans(
    dict(zip("─│━░×δσ·…±→←↑↓▲▼●○◌‹›–°µ", "-|=:xds-.~><^v^v*oo<>-ou", strict=True))
    | dict.fromkeys("┌┐└┘├┤┬┴┼", "+")
    | dict.fromkeys("█▉▊▋▌▍▎▏", "#")
    | dict(zip("▁▂▃▄▅▆▇", "_..--==", strict=True))
)
_REGIONAL_A, _REGIONAL_Z = 0x1F1E6, 0x1F1FF


def _classify(char: str) -> tuple[str, int]:
    """Return the character that may be drawn for `char`, and how many cells it takes."""
    code = ord(char)
    if char == "\t":
        return " ", 1
    # A flag is two regional indicators, and terminals disagree on the width: show its letters.
    if _REGIONAL_A <= code <= _REGIONAL_Z:
        return chr(ord("A") + code - _REGIONAL_A), 1
    category = unicodedata.category(char)
    # Format characters reorder or join what follows (bidi, ZWJ); variation selectors change widths.
    if category == "Cf" or 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF:
        return "", 0
    if category in {"Cc", "Cs", "Cn", "Co", "Zl", "Zp"}:
        return "?", 1
    if category in {"Mn", "Me"} or 0x1160 <= code <= 0x11FF:
        return char, 0
    if category == "Zs":
        return (" ", 1) if code != 0x3000 else ("\u3000", 2)
    return char, 2 if unicodedata.east_asian_width(char) in "WF" else 1


class _Widths(dict[str, tuple[str, int]]):
    def __missing__(self, char: str) -> tuple[str, int]:
        found = _classify(char)
        if len(self) < 8192:
            self[char] = found
        return found


_WIDTHS = _Widths()
# Characters of one cell that are drawn as they are; a row of them needs no look at each.
_PLAIN = set(map(chr, (*range(0x20, 0x7F), *range(0x2500, 0x25A0), *range(0x2800, 0x2900)))) | set("▲▼●○·×±→←…░")


def _cells(text: str) -> list[str]:
    """Return what each cell of a text holds, the second one of a wide character nothing."""
    found: list[str] = []
    for char in text:
        drawn, cells = _WIDTHS[char]
        if cells:
            found += [drawn, ""][:cells]
        elif found:
            base = -2 if found[-1] == "" else -1
            # Two marks a cell: enough for every script, too few to climb over other rows.
            found[base] += drawn if len(found[base]) < 3 else ""
    return found


def cell_width(text: str) -> int:
    """Return how many cells `text` takes when it is put into a grid."""
    if text.isascii():
        return len(text)
    return sum(_WIDTHS[char][1] for char in text)


def clip(text: str, width: int) -> str:
    """Return `text`, cut with an ellipsis where it takes more than `width` cells."""
    if cell_width(text) <= width:
        return text
    if width <= 0:
        return ""
    used = accumulate(_WIDTHS[char][1] for char in text)
    return text[: sum(1 for _ in takewhile(lambda cells: cells < width, used))] + "…"


def clip_middle(text: str, width: int) -> str:
    """Return `text`, cut in its middle where it takes more than `width` cells: names in a family differ at the end."""
    if cell_width(text) <= width:
        return text
    head = max(0, (width - 1) // 3)
    tail = text
    while tail and cell_width(tail) > width - 1 - head:
        tail = tail[1:]
    return (clip(text, head + 1) if head else "…") + tail


class Grid:
    """`height` rows of `width` cells, blank at first.

    Whatever is put, every row keeps exactly `width` cells: text is clipped at the edges, a wide
    character takes two cells or none, control characters never pass. `ascii_only` translates drawing
    characters and shows `?` for all others.
    """

    def __init__(self, width: int, height: int, ascii_only: bool = False) -> None:
        self.width = max(0, width)
        self.height = max(0, height)
        self.ascii_only = ascii_only
        # A wide character's second cell holds the empty string.
        self._cells = [[" "] * self.width for _ in range(self.height)]
        self._styles = [[Style.NORMAL] * self.width for _ in range(self.height)]
        self._touched = set(range(self.height))

    def put(self, y: int, x: int, text: str, style: Style = Style.NORMAL, limit: int | None = None) -> int:
        """Write `text` from cell (`y`, `x`) to the right and return the cell after it.

        What lies outside the grid, or from cell `limit` on, is left out.
        """
        end = self.width if limit is None else min(limit, self.width)
        if not 0 <= y < self.height:
            return x
        self._touched.add(y)
        if self.ascii_only and not text.isascii():
            text = "".join(char if char.isascii() else "?" * _WIDTHS[char][1] for char in text.translate(_ASCII))
        cells: Sequence[str] = text if _PLAIN.issuperset(text) else _cells(text)
        shown = cells[: max(0, end - x)]
        if shown and len(shown) < len(cells) and cells[len(shown)] == "":  # half of a wide character
            shown = shown[:-1]
        after = x + len(shown)
        if x < 0:
            shown, x = shown[-x:], 0
            if shown and shown[0] == "":
                shown, x = shown[1:], 1
        if shown:
            row, stop = self._cells[y], x + len(shown)
            if row[x] == "":
                row[x - 1] = " "
            if stop < self.width and row[stop] == "":
                row[stop] = " "
            row[x:stop] = shown
            self._styles[y][x:stop] = [style] * len(shown)
        return after

    def put_all(self, y: int, x: int, parts: Iterable[tuple[str, Style]], limit: int | None = None) -> int:
        """Write styled pieces one after the other and return the cell after them."""
        for text, style in parts:
            x = self.put(y, x, text, style, limit)
        return x

    def put_row(self, y: int, x: int, chars: Sequence[str], styles: Sequence[int]) -> None:
        """Write characters of one cell each that lie within the grid; those that are blank leave the cell as it is."""
        row, kinds = self._cells[y], self._styles[y]
        self._touched.add(y)
        for at, char in enumerate(chars, x):
            if char != " ":
                row[at], kinds[at] = char, STYLES[styles[at - x]]

    def restore(self, source: Grid, y: int, x: int, width: int) -> None:
        """Copy `width` cells of row `y` from a grid of the same size."""
        cells = slice(max(0, x), x + width)
        self._touched.add(y)
        self._cells[y][cells] = source._cells[y][cells]
        self._styles[y][cells] = source._styles[y][cells]

    def take_touched(self) -> list[int]:
        """Return the rows that were written to since the last call, or since the grid was made, in order."""
        touched = sorted(self._touched)
        self._touched.clear()
        return touched

    def changes(self, before: Grid, y: int) -> list[tuple[int, str, Style]]:
        """Return `runs` of row `y` from the first to the last cell that differs in a grid of the same size."""
        cells, styles, old, kinds = self._cells[y], self._styles[y], before._cells[y], before._styles[y]
        if cells == old and styles == kinds:
            return []
        first, last = 0, self.width - 1
        while cells[first] == old[first] and styles[first] == kinds[first]:
            first += 1
        while cells[last] == old[last] and styles[last] == kinds[last]:
            last -= 1
        # Wide characters are written whole.
        while first and "" in (cells[first], old[first]):
            first -= 1
        while last + 1 < self.width and "" in (cells[last + 1], old[last + 1]):
            last += 1
        return self.runs(y, first, last + 1)

    def rows(self) -> list[str]:
        """Return the rows as text, each `width` cells wide."""
        return ["".join(row) for row in self._cells]

    def runs(self, y: int, start: int = 0, end: int | None = None) -> list[tuple[int, str, Style]]:
        """Return cells `start` to `end` of row `y` as (first cell, text, style) runs, left to right, without gaps."""
        found, x, cells = [], start, self._cells[y]
        for style, group in groupby(self._styles[y][start:end]):
            length = len(list(group))
            found.append((x, "".join(cells[x : x + length]), style))
            x += length
        return found
