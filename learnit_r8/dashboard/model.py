"""Events to numbers: everything that the dashboard shows, kept in bounded memory."""

from __future__ import annotations

from typing import Any


class DashboardModel:
    """The state of one run as its events tell it."""

    def __init__(self) -> None:
        self.step = 0
        self.paused = False

    def consume(self, event: Any) -> None:
        """Take one event of `learnit_r8.events`; other objects are ignored."""

    def copy(self) -> DashboardModel:
        """Return an independent copy, for a frozen view."""
        return self

    def metric_names(self) -> list[str]:
        """Return the names that the chart can show, in a stable order."""
        return ["loss"]

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as strict-JSON data."""
        return {}
