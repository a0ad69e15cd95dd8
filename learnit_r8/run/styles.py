"""What a piece of text means; colours are the display's choice."""

from __future__ import annotations

from enum import IntEnum


class Style(IntEnum):
    """What a cell means. Colours are the terminal's choice, and never carry meaning alone."""

    NORMAL = 0
    DIM = 1
    BOLD = 2
    GOOD = 3
    WARN = 4
    BAD = 5
    ACCENT = 6
    TITLE = 7
    MARK = 8
    REVERSE = 9
