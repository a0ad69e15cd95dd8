"""The notebook rung: one output area, updated once a second."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from typing import Any

from learnit_r8.dashboard.faces import Face
from learnit_r8.dashboard.keys import ViewState
from learnit_r8.dashboard.model import DashboardModel
from learnit_r8.dashboard.render import render
from learnit_r8.events import Event

_PERIOD = 1.0
_SIZE = (100, 28)


class Notebook(Face):
    """Shows the screen as preformatted text through IPython's display protocol."""

    name = "notebook"

    def __init__(self) -> None:
        from IPython.display import display

        self._view = ViewState(readonly=True, glyphs="braille")
        self._handle: Any = display(_bundle("..."), raw=True, display_id=True)
        self._last = float("-inf")

    def tick(self, model: DashboardModel, fresh: Sequence[Event], now: float) -> float:
        """Update the output area."""
        if time.monotonic() - self._last >= _PERIOD * 0.9:
            self._last = time.monotonic()
            rows = render(model, self._view, *_SIZE, now).rows()
            self._handle.update(_bundle("\n".join(rows)), raw=True)
        return _PERIOD


def _bundle(text: str) -> dict[str, str]:
    return {"text/plain": text, "text/html": f"<pre style='line-height:1.2'>{html.escape(text)}</pre>"}
