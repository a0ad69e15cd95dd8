"""After a run: its numbers and two small charts as plain text."""

from __future__ import annotations

from learnit_r8.dashboard.model import DashboardModel


def summary_text(model: DashboardModel, width: int = 80) -> str:
    """Return the summary as lines of at most `width` cells."""
    return f"{model.step} steps"
