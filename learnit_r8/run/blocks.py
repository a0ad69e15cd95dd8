"""The lines of an event log, written and read: one a rare event, and one for all that comes at each step.

Eleven names and numbers of 17 digits a step would be 300 bytes; a `Block` holds them as columns, in 50:

    {"event":"Block","LossReported":{"count":3,"time":[1796057014897804,63,71],"step":[0,1],"loss":[0.7012,0.6981,0.7107],
     "verdict":["calm"], ...},"BackupTaken":{"count":1,"at":[2],"bytes":[32], ...}}

- A column that is shorter than `count` goes on with its last entry.
- Whole numbers, and times, are differences to the entry before. Times and seconds are whole microseconds.
- Other numbers have 7 digits (about a float32), `score` has 4; those that are not finite are strings.
- `at` is the event's place among all of the block; kinds without one have the places that are left.
"""

from __future__ import annotations

import dataclasses
import json
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.events import (
    EVENT_TYPES,
    BackupTaken,
    BackupVerified,
    Event,
    LossReported,
    MetricLogged,
    from_json,
    to_json,
)
from learnit_r8.run.metric import is_validation

BLOCK = "Block"
ROUTINE = frozenset({LossReported, BackupTaken, BackupVerified, MetricLogged})
"""Kinds that come at every step, or nearly: they are written in blocks."""
_DIGITS = {"score": 4}
_BROKEN = (ValueError, TypeError, LookupError, OverflowError, AttributeError, RecursionError)
MOST = 1 << 16
"""Events in a block."""
_SINGLE = 4096
_LARGEST = 9e15
"""More microseconds are no whole number in double precision."""
Column = NDArray[Any] | list[str]


def _field(name: str, annotation: str) -> str:
    """Return how a field is written: "time", "seconds", "int", "float" or "text"."""
    if name == "time":
        return "time"
    if name == "seconds" or name.endswith("_seconds"):
        return "seconds"
    return annotation if annotation in {"int", "float"} else "text"


_FIELDS = {kind: {f.name: _field(f.name, str(f.type)) for f in dataclasses.fields(kind)} for kind in ROUTINE}
_VALUES = {kind: operator.attrgetter(*fields) for kind, fields in _FIELDS.items()}


class Block:
    """Events of the kinds that come all the time, as columns.

    Attributes:
        columns: By kind and name of the field, `[n]` each: int64, float64 (times and seconds are seconds), or text.
        places: By kind, the events' places among all of the block, int64 `[n]`.
    """

    __slots__ = ("columns", "places")

    def __init__(self, columns: dict[type[Event], dict[str, Column]], places: dict[type[Event], NDArray[Any]]) -> None:
        self.columns, self.places = columns, places

    @classmethod
    def of(cls, events: Sequence[Event]) -> Block:
        """Return the block of some events; a ValueError or TypeError where a number is none."""
        columns, places = {}, {}
        for kind, at in _by_kind(events).items():
            cells = zip(*[_VALUES[kind](events[place]) for place in at], strict=True)
            columns[kind] = {
                name: list(column) if how == "text" else np.array(column, np.int64 if how == "int" else np.float64)
                for (name, how), column in zip(_FIELDS[kind].items(), cells, strict=True)
            }
            places[kind] = np.array(at)
        return cls(columns, places)

    def __len__(self) -> int:
        return sum(map(len, self.places.values()))

    def events(self, *kinds: type[Event]) -> list[Event]:
        """Return the events in their order; those of some kinds only where any are given."""
        found: list[tuple[int, Event]] = []
        for kind in kinds or self.columns:
            if columns := self.columns.get(kind):
                cells = [column if isinstance(column, list) else column.tolist() for column in columns.values()]
                made = (kind(**dict(zip(columns, row, strict=True))) for row in zip(*cells, strict=True))
                found += zip(self.places[kind].tolist(), made, strict=True)
        return [event for _, event in sorted(found, key=operator.itemgetter(0))]

    def newest(self, kind: type[Event]) -> Event | None:
        """Return the last event of a kind."""
        columns = self.columns.get(kind)
        if columns is None:
            return None
        last = {name: column[-1:] for name, column in columns.items()}
        return Block({kind: last}, {kind: self.places[kind][-1:]}).events()[0]

    @property
    def time(self) -> float:
        """When the last event happened."""
        last = max(self.places, key=lambda kind: int(self.places[kind][-1]))
        return float(self.columns[last]["time"][-1])


def ends_block(event: Event) -> bool:
    """Return whether routine events are not to wait for more: the end of an evaluation is looked for."""
    return type(event) is MetricLogged and is_validation(event.name)


def _by_kind(events: Sequence[Event]) -> dict[type[Event], list[int]]:
    """Return the places of each kind's events."""
    kinds: dict[type[Event], list[int]] = {}
    for place, event in enumerate(events):
        kinds.setdefault(type(event), []).append(place)
    return kinds


def encode(event: Event) -> str:
    """Return the line of one event."""
    return json.dumps(to_json(event), allow_nan=False, separators=(",", ":")) + "\n"


def encode_block(events: Sequence[Event]) -> str:
    """Return the line of routine events; one line each where a time or a duration is no number."""
    kinds = _by_kind(events)
    most = max(kinds, key=lambda kind: len(kinds[kind]))
    parts = [f'"event":"{BLOCK}"']
    try:
        for kind, places in sorted(kinds.items(), key=lambda item: item[0] is not most):
            rows = zip(*[_VALUES[kind](events[place]) for place in places], strict=True)
            columns = [_column(name, how, row) for (name, how), row in zip(_FIELDS[kind].items(), rows, strict=True)]
            columns = columns if kind is most else [_column("at", "int", tuple(places)), *columns]
            parts.append(f'"{kind.__name__}":{{"count":{len(places)},{",".join(columns)}}}')
    except (ValueError, OverflowError):
        return "".join(map(encode, events))
    return f"{{{','.join(parts)}}}\n"


def _column(name: str, how: str, values: tuple[Any, ...]) -> str:
    same = values.count(values[0]) == len(values)  # one NaN, too, told again and again
    if how == "text":
        text = ",".join(map(json.dumps, values[:1] if same else values))
    elif how == "float":
        some = values[:1] if same else values
        text = ",".join([f"%.{_DIGITS.get(name, 7)}g"] * len(some)) % some
        if "n" in text:  # nan or inf
            text = ",".join(f'"{cell}"' if "n" in cell else cell for cell in text.split(","))
    else:
        whole = np.array(values, np.int64) if how == "int" else _micros(values)
        if how != "seconds":
            whole[1:] -= whole[:-1].copy()
        most = 1 if how == "seconds" else 2
        if (whole[most:] == whole[most - 1 : most]).all():
            whole = whole[:most]
        text = ",".join(map(str, whole.tolist()))
    return f'"{name}":[{text}]'


def _micros(seconds: tuple[float, ...]) -> NDArray[np.int64]:
    micros = np.rint(np.array(seconds) * 1e6)
    if not (np.abs(micros) < _LARGEST).all():
        raise ValueError
    return micros.astype(np.int64)


def decode(lines: Iterable[bytes | str]) -> Iterator[Event | Block]:
    """Yield what whole lines hold: routine events as blocks, the others as they are.

    Events of a newer version, and lines broken by a crash, are passed over. Logs of older versions have a line a step.
    """
    single: list[Event] = []
    for line in lines:
        try:
            data = json.loads(line)
            found = _block(data) if data.get("event") == BLOCK else from_json(data)
        except _BROKEN:
            continue
        if type(found) in ROUTINE:
            single.append(found)  # type: ignore[arg-type]
            if len(single) < _SINGLE and not ends_block(found):  # type: ignore[arg-type]
                continue
        if single:
            yield from _blocks(single)
            single = []
        if type(found) not in ROUTINE:
            yield found
    yield from _blocks(single)


def _blocks(events: list[Event]) -> Iterator[Block]:
    """Yield the block of some events; without those whose numbers are none."""
    try:
        if events:
            yield Block.of(events)
    except _BROKEN:
        half = len(events) // 2
        for some in (events[:half], events[half:]) if half else ():
            yield from _blocks(some)


def each_event(decoded: Iterable[Event | Block]) -> Iterator[Event]:
    """Yield what `decode` yields, the events of blocks one by one."""
    for found in decoded:
        if isinstance(found, Block):
            yield from found.events()
        else:
            yield found


def _block(data: Mapping[str, Any]) -> Block:
    columns: dict[type[Event], dict[str, Column]] = {}
    places: dict[type[Event], NDArray[Any]] = {}
    total = 0
    for name, cells in data.items():
        kind = EVENT_TYPES.get(name)
        if kind in _FIELDS:
            count = int(cells["count"])
            total += count
            if not 0 < count <= total <= MOST:
                raise ValueError
            columns[kind] = {field: _cells(how, cells[field], count) for field, how in _FIELDS[kind].items()}
            if "at" in cells:
                places[kind] = _cells("int", cells["at"], count)
    free = np.ones(total, bool)
    for taken in places.values():
        free[taken] = False
    for kind in columns:
        places.setdefault(kind, np.flatnonzero(free))
    if not total or sum(map(len, places.values())) != total:
        raise ValueError
    return Block(columns, places)


def _cells(how: str, cells: list[Any], count: int) -> Any:
    """Return a whole column."""
    if how == "text":
        return cells + cells[-1:] * (count - len(cells))
    column = np.empty(count, np.float64 if how == "float" else np.int64)
    column[: len(cells)] = cells
    column[len(cells) :] = cells[-1]
    if how in ("int", "time"):
        column = column.cumsum()
    return column / 1e6 if how in ("time", "seconds") else column
