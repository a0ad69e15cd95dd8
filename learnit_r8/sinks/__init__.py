"""Listeners: they hear every event and can neither slow nor break training."""

from __future__ import annotations

from learnit_r8.run.events_file import JsonlSink, read_events
from learnit_r8.sinks.bus import EventBus

__all__ = ["EventBus", "JsonlSink", "read_events"]
