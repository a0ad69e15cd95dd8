"""The notebook display: one output area, updated once a second."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from typing import Any

from learnit_r8.dashboard.displays.display import Display
from learnit_r8.dashboard.drawing.render import Painter, Scene
from learnit_r8.dashboard.keys import ViewState
from learnit_r8.events import Event
from learnit_r8.run.model import DashboardModel

_PERIOD = 1.0
_SIZE = (100, 28)


class Notebook(Display):
    """Shows the screen as preformatted text through IPython's display protocol."""

    name = "notebook"

    def __init__(self) -> None:
        from IPython.display import display

        self._view = ViewState(readonly=True, glyphs="braille")
        self._painter = Painter()
        show: Any = display  # IPython has no types
        self._handle = show(_bundle("..."), raw=True, display_id=True)
        self._last = float("-inf")
        self._newest: tuple[DashboardModel, float] | None = None

    def tick(self, model: DashboardModel, fresh: Sequence[Event], now: float) -> float:
        self._newest = model, now
        if time.monotonic() - self._last >= _PERIOD * 0.9:
            self.leave()
        return _PERIOD

    def leave(self) -> None:
        if self._newest is not None:  # the picture of the end stays
            self._last = time.monotonic()
            model, now = self._newest
            rows = self._painter.draw(Scene(model), self._view, *_SIZE, now).rows()
            self._handle.update(_bundle("\n".join(rows)), raw=True)


def _bundle(text: str) -> dict[str, str]:
    return {"text/plain": text, "text/html": f"<pre style='line-height:1.2'>{html.escape(text)}</pre>"}
