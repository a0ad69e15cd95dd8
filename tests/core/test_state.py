"""One table a class says what is saved."""

from __future__ import annotations

import json
import math
from enum import StrEnum

import numpy as np
import pytest

from learnit_r8.core.state import KEEP, Kind, Saved, each, kind, mask, maybe, part, row, same, sized, table
from learnit_r8.errors import CheckpointError, StateError


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Inner(Saved):
    _saved = table(total=float)

    def __init__(self):
        self.total = 1.0


class Outer(Saved):
    _saved = table(
        count=int,
        bits=mask(lambda outer: outer.size),
        values=maybe(sized(np.float32, lambda outer: outer.size, "run")),
        colour=Colour,
        pairs=each(row(str, float), tuple),
        older=kind(int, absent=7),
        kept=kind(int, absent=KEEP),
        size=same("size", "num_samples"),
        inner=part(),
        fresh=part(lambda outer, state: Inner()),
    )

    def __init__(self):
        self.size, self._count, self.older, self.kept = 5, 3, 1, 2
        self._bits = np.array([True, False, False, True, True])
        self.values = None
        self._colour, self.pairs = Colour.RED, (("a", 1.0),)
        self.inner, self.fresh = Inner(), Inner()
        self._state_taken()

    def _state_taken(self):
        self.double = 2 * self._count
        if self._count < 0:
            raise ValueError("a count is negative")


class Child(Outer):
    _saved = table(more=float)

    def __init__(self):
        self.more = 4.0
        super().__init__()


def changed():
    outer = Child()
    outer._count, outer.values, outer._colour = 8, np.arange(5, dtype=np.float32), Colour.BLUE
    outer.pairs, outer.inner.total, outer.fresh.total, outer.more = (("b", 2.0), ("c", math.inf)), 9.0, 8.0, 6.0
    outer._bits = ~outer._bits
    return outer


def test_what_was_saved_comes_back_and_what_follows_from_it_is_worked_out():
    outer, other = changed(), Child()
    inner, fresh = other.inner, other.fresh
    other.load_state_dict(outer.state_dict())
    assert other.state_dict().keys() == outer.state_dict().keys() == Child._table.keys()
    assert (other._count, other.double, other._colour, other.pairs) == (8, 16, Colour.BLUE, outer.pairs)
    assert np.array_equal(other._bits, outer._bits)
    assert np.array_equal(other.values, outer.values)
    assert (other.inner.total, other.fresh.total, other.more) == (9.0, 8.0, 6.0)
    assert other.inner is inner  # others may hold it
    assert other.fresh is not fresh


def test_a_state_is_a_copy_and_so_is_what_is_loaded():
    outer, other = changed(), Child()
    state = outer.state_dict()
    outer.values[:] = -1
    other.load_state_dict(state)
    state["values"][:] = -2
    assert other.values.tolist() == [0, 1, 2, 3, 4]


def test_an_older_state_gets_what_the_table_says():
    state = {name: value for name, value in changed().state_dict().items() if name not in ("older", "kept")}
    other = Child()
    other.kept = 11
    other.load_state_dict(state)
    assert (other.older, other.kept) == (7, 11)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"count": "many"}, r"Child, count.*ValueError"),
        ({"count": -1}, r"Child is damaged.*negative"),
        ({"values": [1.0, 2.0]}, "the state has 2 samples, this run 5"),
        ({"colour": "green"}, "colour"),
        ({"pairs": [["a"]]}, "pairs"),
        ({"size": 6}, "num_samples=6, this Child 5"),
        ({"inner": {}}, "Inner lacks total"),
        ({"fresh": {"total": None}}, "total"),
        ({"more": [1]}, "Child, more"),
        ({"bits": None}, "bits"),
    ],
)
def test_a_damaged_state_is_refused_by_name_and_nothing_changes(damage, words):
    other = Child()
    before, inner = json.dumps(other.state_dict(), default=str), other.inner
    with pytest.raises(StateError, match=words):
        other.load_state_dict({**changed().state_dict(), **damage})
    assert json.dumps(other.state_dict(), default=str) == before
    assert other.inner is inner
    assert other.double == 6


def test_a_state_without_a_field_says_which():
    state = changed().state_dict()
    del state["count"], state["pairs"]
    with pytest.raises(CheckpointError, match="lacks count, pairs"):
        Child().load_state_dict(state)


def test_a_kind_of_ones_own_sees_what_was_loaded_before():
    class Tail(Saved):
        _saved = table(used=int, rows=Kind(lambda me, rows: rows[: me.used], lambda me, rows: [*rows, *[0] * me.used]))

        def __init__(self):
            self.used, self.rows = 2, [1, 2, 3]

    tail = Tail()
    tail.load_state_dict(tail.state_dict())
    assert tail.rows == [1, 2, 0, 0]
