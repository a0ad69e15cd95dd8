"""Numbers to cells: one pure function draws the whole screen."""

from __future__ import annotations

from collections.abc import Sequence

from learnit_r8.dashboard.cells import Grid, Style
from learnit_r8.dashboard.keys import ViewState
from learnit_r8.dashboard.model import DashboardModel

__all__ = ["Grid", "Style", "render"]


def render(
    model: DashboardModel,
    view: ViewState,
    width: int,
    height: int,
    now: float,
    console_lines: Sequence[str] = (),
) -> Grid:
    """Draw one frame.

    Args:
        model: The run's numbers; read only.
        view: What to show and how.
        width: Cells in a row.
        height: Rows.
        now: Wall-clock time, seconds since the Unix epoch.
        console_lines: The newest lines that the user's code printed, oldest first.

    Returns:
        A grid of exactly `height` rows of `width` cells, whatever the size.
    """
    grid = Grid(width, height, ascii_only=view.glyphs == "ascii")
    grid.put(0, 0, f"R8 {model.step}")
    return grid
