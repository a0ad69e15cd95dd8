"""Listeners: they hear every event and can neither slow nor break training."""

from __future__ import annotations

from learnit_r8.sinks.bus import EventBus
from learnit_r8.sinks.jsonl import JsonlSink, read_events

__all__ = ["EventBus", "JsonlSink", "read_events"]
