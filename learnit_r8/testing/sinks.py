"""`check_sink`: a sink takes every kind of event, has a usable command queue, and closes."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from learnit_r8.events import EVENT_TYPES, Event
from learnit_r8.testing.states import require
from learnit_r8.types import Command, Sink


def check_sink(factory: Callable[[], Sink], events: Sequence[Event] | None = None) -> None:
    """Check that a sink takes every kind of event, has a usable command queue, and closes.

    Args:
        factory: Makes a new sink.
        events: What to send; None: one event of each kind, with empty, NaN and long values among them.

    Raises:
        AssertionError: The contract is broken; the message says how and what to do.
    """
    sink = factory()
    require(isinstance(sink, Sink), "the sink has no record(event): add one that takes any event")
    for event in events if events is not None else sample_events():
        try:
            record: Callable[[Event], Any] = sink.record
            returned = record(event)
        except Exception as error:
            raise AssertionError(
                f"record({type(event).__name__}) raised {type(error).__name__}: {error}. A run drops such a sink: "
                "ignore the events that you do not know"
            ) from error
        require(returned is None, f"record returned {returned!r}: it returns nothing")
    commands = getattr(sink, "commands", None)
    require(
        commands is None or (isinstance(commands, deque) and all(isinstance(item, Command) for item in commands)),
        "commands must be a collections.deque of learnit_r8.types.Command",
    )
    close = getattr(sink, "close", None)
    if close is not None:
        close()


def sample_events() -> list[Event]:
    """Return one event of every kind with plain values, and one with awkward ones."""
    plain: dict[str, Any] = {"float": 1.5, "int": 3, "str": "text", "bool": True}
    awkward: dict[str, Any] = {"float": math.nan, "int": 0, "str": "", "bool": False}
    made = []
    for values, number in ((plain, 3), (awkward, 0)):
        for kind in EVENT_TYPES.values():
            fields = {f.name: _example(str(f.type), values, number) for f in dataclasses.fields(kind)}
            fields["time"] = 1_700_000_000.0
            made.append(kind(**fields))
    return made


def _example(annotation: str, values: Mapping[str, Any], number: int) -> Any:
    if annotation.startswith("tuple"):
        item = "float" if "float" in annotation else "int"
        return tuple(values[item] for _ in range(5 if number else 0))
    if annotation.startswith("Mapping"):
        return {"name": None} if number else {}
    return values[annotation.split(" ", maxsplit=1)[0]]
