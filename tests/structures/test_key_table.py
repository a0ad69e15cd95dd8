"""The table of keys: equal to a dict and a list, whatever the keys are and however many."""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learnit_r8.errors import ConfigError
from learnit_r8.structures import key_table
from learnit_r8.structures.key_table import KeyTable

NUMBERS = st.integers() | st.floats(allow_nan=False) | st.booleans()
TEXTS = st.text(st.characters(exclude_categories=()), max_size=8)  # halves of surrogate pairs, too
KEYS = st.recursive(TEXTS | NUMBERS | st.binary(max_size=4) | st.none(), lambda parts: st.tuples(parts, parts))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(key_table, "_BLOCK", 8)


@pytest.mark.usefixtures("small_blocks")
class TestAgainstADict:
    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.lists(KEYS, max_size=20), max_size=3), st.lists(KEYS, max_size=10))
    def test_every_key_is_found_and_comes_back_in_its_place(self, parts, others):
        table, plain = KeyTable(), {}
        for part in parts:
            new = list(dict.fromkeys(key for key in part if key not in plain))
            table.add(new)
            plain |= {key: place for place, key in enumerate(new, len(plain))}
        assert list(table) == list(plain)
        assert len(table) == len(plain)
        keys = [*plain, *others]
        assert table.find(keys).tolist() == [plain.get(key, -1) for key in keys]
        assert [key in table for key in others] == [key in plain for key in others]
        again = KeyTable.from_state(table.state_dict())
        assert list(again) == list(plain)
        assert again.find(keys).tolist() == table.find(keys).tolist()
        assert again.digest() == table.digest() == KeyTable(plain).digest()
        for copied in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
            assert list(copied) == list(plain)

    @pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 16, 64, 65])
    def test_a_key_that_is_there_is_refused_and_nothing_is_added(self, size):
        keys = [f"k{i}" for i in range(size)]
        table = KeyTable(keys)
        for place in range(size):
            with pytest.raises(ConfigError, match=f"'k{place}' is there already"):
                table.add(["new", keys[place]])
            with pytest.raises(ConfigError, match=f"'k{place}' is there already"):
                KeyTable([*keys, *(f"z{i}" for i in range(3)), keys[place]])
        with pytest.raises(ConfigError, match="'new' is there already"):
            table.add(["new", "new"])
        assert list(table) == keys
        assert "new" not in table

    def test_texts_of_one_crc_are_told_apart(self, monkeypatch):
        monkeypatch.setattr(zlib, "crc32", lambda _: 7)
        keys = [f"k{i}" for i in range(70)]
        table = KeyTable(keys)
        assert table.find([*keys[::-1], "other"]).tolist() == [*range(69, -1, -1), -1]

    def test_numbers_beyond_the_last_are_no_keys(self):
        for size in (5, 8, 13):
            with pytest.raises(IndexError):
                KeyTable(range(size)).of([size])


def test_numbers_that_are_equal_are_one_key():
    table = KeyTable([1, ("a", 2.0), 0.5])
    assert table.find([True, 1.0, np.int64(1), np.float32(0.5), ("a", 2), "1"]).tolist() == [0, 0, 0, 2, 1, -1]
    assert table.names([0, 1, 2]) == [1, "('a', 2)", "0.5"]
    with pytest.raises(ConfigError, match="1 is there already"):
        table.add([True])


def test_what_is_no_key_is_refused():
    for wrong, error in ((["a", object()], TypeError), ("abc", TypeError), ([float("nan")], TypeError)):
        with pytest.raises(error):
            KeyTable(wrong)
    table = KeyTable(["a"])
    with pytest.raises(KeyError, match="2 of 3 keys are not among the 1, such as 'b'"):
        table.numbers(["a", "b", "c"])


def test_many_keys_take_their_text_and_16_bytes():
    size = 65536 + 100
    tracemalloc.start()
    table = KeyTable(f"image/{number:08d}" for number in range(size))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    packed, newest = 65536, 100
    assert table.nbytes == (14 + 16) * packed + 8
    assert held < 1.5 * (14 + 8) * packed + 8 * packed + 400 * newest + 500_000
    ids = np.random.default_rng(0).integers(0, size, 256)
    keys = table.of(ids)
    assert keys == [f"image/{number:08d}" for number in ids]
    assert np.array_equal(table.find(keys), ids)


def test_every_process_has_the_same_table():
    program = (
        "from learnit_r8.structures.key_table import KeyTable\n"
        "t = KeyTable(f'k{i * i}' for i in range(70_000))\n"
        "print(t.digest(), [int(r[999]) for r in t._runs], t.find(['k4761000000', 'k9'])[1])\n"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("0", "1")
    }  # fmt: skip
    assert len(said) == 1
    assert said.pop().split()[-1] == "3"


def test_keys_of_any_length_from_an_endless_source():
    source = ("x" * (i % 50) + "y" * 70_000 * (i == 9) + str(i) for i in itertools.count())
    table = KeyTable(itertools.islice(source, 66_000))
    assert table[9] == "x" * 9 + "y" * 70_000 + "9"
    assert table[65_999] == "x" * 49 + "65999"
