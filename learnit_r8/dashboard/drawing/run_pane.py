"""What a run was told to do, and what the machine has to do beside: for screens with room."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from learnit_r8.dashboard.drawing.cells import Grid, clip_middle
from learnit_r8.dashboard.drawing.layout import Rect
from learnit_r8.dashboard.drawing.panels import heading
from learnit_r8.dashboard.keys import ViewState
from learnit_r8.run import formats as f
from learnit_r8.run.model import DashboardModel
from learnit_r8.run.styles import Style

_SECONDS = 2.0
_LABEL = 12
_SETTINGS = (
    ("strategy", "strategy"), ("batch", "batch_size"), ("samples", "num_samples"), ("epochs", "num_epochs"),
    ("seconds", "train_duration_seconds"), ("peak lr", "initial_lr"), ("schedule", "scheduler_mode"),
    ("warm-up", "warmup_proportion"), ("min lr", "min_lr"), ("backup each", "backup_every"),
    ("ckpt each", "checkpoint_every"), ("checkpoints", "checkpoint_dir"), ("log", "log_dir"), ("guard", "noise_guard"),
    ("seed", "seed"), ("ranks", "world_size"),
)  # fmt: skip


class HostMeter:
    """Reads the machine's load at most every two seconds; nothing where `psutil` is not installed."""

    def __init__(self) -> None:
        self._next = 0.0
        self._rows: tuple[tuple[str, str], ...] = ()
        self._process: Any = None

    def read(self, folder: str) -> tuple[tuple[str, str], ...]:
        """Return (label, text) rows; the disk is that of `folder`."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _SECONDS
            try:
                self._rows = self._measure(folder)
            except Exception:  # no package, or a system that tells nothing: no rows
                self._rows, self._next = (), float("inf")
        return self._rows

    def _measure(self, folder: str) -> tuple[tuple[str, str], ...]:
        import psutil

        if self._process is None:
            self._process = psutil.Process()
            self._process.cpu_percent()
            psutil.cpu_percent()
        memory, own = psutil.virtual_memory(), self._process.memory_info().rss
        place = Path(folder).absolute()
        while not place.exists() and place != place.parent:
            place = place.parent
        return (
            (
                "cpu",
                f"{psutil.cpu_percent():.0f}% of {os.cpu_count()}   this process {self._process.cpu_percent():.0f}%",
            ),
            ("ram", f"{memory.used / 2**30:.1f}/{memory.total / 2**30:.1f}G   this process {own / 2**30:.2f}G"),
            ("disk", f"{psutil.disk_usage(str(place)).free / 2**30:.0f}G free for checkpoints"),
        )


def settings(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a run's settings as (label, text), those that are not set left out."""
    found = []
    for label, name in _SETTINGS:
        value = config.get(name)
        if value is None or value == "":
            continue
        if isinstance(value, float):
            text = f.brief(value)
        elif isinstance(value, int) and not isinstance(value, bool) and name != "seed":
            text = f.steps(value)
        else:
            text = str(value)
        found.append((label, text))
    return found


def run_pane(grid: Grid, rect: Rect, model: DashboardModel, view: ViewState) -> None:
    """Draw the machine's load, then the settings."""
    heading(grid, rect, 0, "run", view, [(f"pid {model.pid}", Style.DIM)] if model.pid else [])
    limit = rect.x + rect.width
    rows = [*view.host, *settings(model.config)]
    for i, (label, text) in enumerate(rows[: rect.height]):
        x = grid.put(rect.y + 1 + i, rect.x, f"{label:<{_LABEL}}", Style.DIM, limit)
        grid.put(rect.y + 1 + i, x, clip_middle(text, limit - x), Style.NORMAL, limit)
