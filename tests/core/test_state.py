"""One table a class says what is saved."""

from __future__ import annotations

import json
import math
import sys
import threading
from enum import StrEnum

import numpy as np
import pytest

from learnit_r8.core.state import KEEP, Kind, Saved, each, kind, mask, maybe, part, row, same, sized, table
from learnit_r8.errors import CheckpointError, StateError
from learnit_r8.prompts import PromptScheduler
from learnit_r8.replay import HybridSRLReplayBuffer, PrioritizedReplayBuffer
from learnit_r8.strategies import AdaptiveBatchSampler, CurriculumScheduler


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


# Threads ----------------------------------------------------------------------------------------


def scores(k):
    return SHARED["curriculum"].update(("key", k % 40), (k % 40) / 40), SHARED["curriculum"].sample_item(k, 1000)


def prompts_come_and_go(k):
    prompts = SHARED["prompts"]
    for key in prompts.draw(3):
        prompts.update(key, [0.0, 1.0])
    mine = (threading.get_ident(), k)
    prompts.add([mine])
    if k % 2:
        prompts.remove([mine])


def weights(k):
    indices, _ = SHARED["weights"].sample(16)
    SHARED["weights"].update_weights(indices, np.random.default_rng(k).random(16))


SHARED = {}


@pytest.mark.parametrize("work", [scores, prompts_come_and_go, weights])
def test_what_is_given_to_several_threads_stays_sound(work):
    SHARED.update(curriculum=CurriculumScheduler(ema_alpha=1.0), prompts=PromptScheduler(range(40)))
    SHARED.update(weights=AdaptiveBatchSampler(300))
    problems = []

    def run():
        try:
            for k in range(200):
                work(k)
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert problems == []
    if work is scores:
        assert all(SHARED["curriculum"].get_item_difficulty(("key", k)) == k / 40 for k in range(40))
        assert SHARED["curriculum"].metrics_dict()["curriculum/total_updates"] == 800
    if work is prompts_come_and_go:
        assert (len(SHARED["prompts"]), SHARED["prompts"].metrics_dict()["groups"] > 400) == (40 + 4 * 100, True)


def test_what_other_things_depend_on_cannot_be_changed_afterwards():
    for make, names in (
        (lambda: PrioritizedReplayBuffer(4), ("capacity", "alpha", "eps", "seed")),
        (lambda: HybridSRLReplayBuffer(4), ("capacity", "seed")),
        (CurriculumScheduler, ("n_bins", "seed")),
        (PromptScheduler, ("seed", "reward_range")),
    ):
        thing = make()
        for name in names:
            before = getattr(thing, name)
            with pytest.raises(
                AttributeError, match=f"{name} cannot be changed, .*: make another {type(thing).__name__}"
            ):
                setattr(thing, name, 1)
            assert getattr(thing, name) == before
