"""What characters can draw: rasters of dots, sparklines and bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from learnit_r8.run.series import HUGE

_BLOCKS = "▁▂▃▄▅▆▇█"
_EIGHTHS = " ▏▎▍▌▋▊▉"
_BRAILLE_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


@dataclass(frozen=True, slots=True, eq=False)
class Raster:
    """How a glyph set divides a cell into dots."""

    columns: int  # dots side by side
    rows: int  # dots one above the other
    bits: npt.NDArray[np.int64]  # bit of each dot, int of shape (rows, columns)
    glyphs: npt.NDArray[np.str_]  # character for each set of dots, string of shape (2 ** (rows * columns),)
    texture: npt.NDArray[np.bool_]  # the dots that a filled area shows, bool of shape (rows, columns)


def _braille() -> Raster:
    bits = np.array(_BRAILLE_DOTS).T
    texture = np.array([[True, False], [False, True]] * 2)
    return Raster(2, 4, bits, np.array([" ", *(chr(0x2800 + dots) for dots in range(1, 256))]), texture)


def _levels(levels: str, full: str) -> Raster:
    """Return a raster of one column: a cell shows the height of its topmost dot, or `full`."""
    n = len(levels)
    glyphs = [" "] + [levels[bits.bit_length() - 1] for bits in range(1, 1 << n)]
    glyphs[-1] = full
    return Raster(1, n, 1 << np.arange(n)[::-1, None], np.array(glyphs), np.ones((n, 1), bool))


RASTERS = {"braille": _braille(), "blocks": _levels(_BLOCKS, "█"), "ascii": _levels(".-'", "|")}


def sparkline(values: Sequence[float], width: int, low: float | None = None, high: float | None = None) -> str:
    """Return the values as `width` blocks of eight heights; a value that is not finite is a gap.

    Longer series are cut into `width` parts and show each part's last value. `low` and `high` are
    the values' own where omitted.
    """
    if width <= 0 or not values:
        return ""
    values = [value if abs(value) < HUGE else math.nan for value in values]
    if len(values) > width:
        values = [values[(i + 1) * len(values) // width - 1] for i in range(width)]
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return " " * len(values)
    low = min(finite) if low is None else low
    high = max(finite) if high is None else high
    scale = 7.999 / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[min(7, max(0, int((v - low) * scale)))] if math.isfinite(v) else " " for v in values)


def bar(share: float, width: int, rest: str = "─") -> str:
    """Return a bar of `width` cells, filled to an eighth of a cell; `rest` fills what is left."""
    if width <= 0:
        return ""
    share = min(1.0, max(0.0, share)) if math.isfinite(share) else 0.0
    eighths = int(share * width * 8 + 1e-9)
    full, part = divmod(eighths, 8)
    text = "█" * full + (_EIGHTHS[part] if part else "")
    return text + rest * (width - len(text))
