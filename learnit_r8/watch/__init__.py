"""Looking at a run from another process: its folder is the only thing that is read, and nothing is written there."""

from __future__ import annotations

from learnit_r8.watch.run import WatchedRun, find_run

__all__ = ["WatchedRun", "find_run"]
