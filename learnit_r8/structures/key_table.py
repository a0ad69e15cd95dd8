"""Keys in place of numbers: a table of many keys, 16 bytes each beside the key's own text.

The newest keys are in a dict and a list, where Python is fastest. Each 65,536 of them are packed: their UTF-8 text and
where it begins, and 8 bytes each, CRC-32 and number, into sorted runs, which are merged as they become equal in size,
one pair at a time. So no addition costs more than a pass over the whole, and all is the same in every process: nothing
depends on Python's `hash`. Where CRCs are equal the texts decide.
"""

from __future__ import annotations

import copy
import hashlib
import json
import zlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from learnit_r8.core.portable import portable, unpacked
from learnit_r8.errors import ConfigError
from learnit_r8.structures.keys import key_from_json, key_to_json, plain_key

_BLOCK = 1 << 16
_ROOM = 1.5
"""How much longer an array is made than it has to be: memory that is not written to costs nothing."""
_WIDE = 256
"""Bytes up to which a batch's keys are gathered together, so that the processor need not wait for one after another."""
_REACH = np.arange(_WIDE)
_NO_TEXT = b"\xff"
"""Begins what stands for another key than a text; UTF-8 does not have it."""
_LOW, _HIGH = np.uint64(0xFFFFFFFF), np.uint64(32)

Ids = NDArray[np.int64]


class KeyTable:
    """Keys in the order in which they were added; the place of each, from 0, is its number.

    Args:
        keys: Texts, numbers, bytes, None, or tuples of those; numbers that are equal (1, 1.0, True) are one key, the
            whole number. Any number of them, from an iterator, too.

    Raises:
        ConfigError: A key came twice.
        TypeError: Something that is no key.
    """

    def __init__(self, keys: Iterable[Hashable] = ()) -> None:
        self._text = np.empty(0, np.uint8)  # of all packed keys, one after another
        self._ascii = True  # it is: then a part of it needs no decoding
        self._ends = np.zeros(1, np.int64)  # where keys begin, and where the last one ends
        self._runs: list[NDArray[np.uint64]] = []  # CRC << 32 | number, each sorted; every one more than the next
        self._new: list[Hashable] = []
        self._number: dict[Hashable, int] = {}  # of the new ones
        several = iter(_several(keys))
        while part := list(map(_plain, islice(several, _BLOCK - len(self._new)))):
            self._append(part)
        if self._runs:
            self._refuse_known(self._new, [_encoded(key) for key in self._new])

    def __len__(self) -> int:
        return len(self._ends) - 1 + len(self._new)

    def __copy__(self) -> KeyTable:
        """Return a deep copy: one that shared the arrays would write into them."""
        return copy.deepcopy(self)

    def __iter__(self) -> Iterator[Hashable]:
        for first in range(0, len(self), _BLOCK):
            yield from self.of(np.arange(first, min(first + _BLOCK, len(self))))

    def __getitem__(self, number: int) -> Hashable:
        return self.of([number])[0]

    def __contains__(self, key: Hashable) -> bool:
        return bool(self.find([key])[0] >= 0)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed keys and of what finds them; the newest keys, 65,535 at most, are Python's."""
        return self._text.nbytes + self._ends.nbytes + sum(run.nbytes for run in self._runs)

    def add(self, keys: Iterable[Hashable]) -> None:
        """Add keys behind the others; all of them or, where this raises, none.

        Raises:
            ConfigError: A key is there already, or came twice.
        """
        new = list(map(_plain, _several(keys)))
        if len(set(new)) < len(new):
            self._refuse(next(key for place, key in enumerate(new) if key in new[:place]))
        known = np.flatnonzero(self.find(new) >= 0)
        if len(known):
            self._refuse(new[known[0]])
        while new:
            room = _BLOCK - len(self._new)
            self._append(new[:room], known=True)
            new = new[room:]

    def of(self, numbers: ArrayLike) -> list[Hashable]:
        """Return the keys that have these numbers, int `[n]`.

        Raises:
            IndexError: There is no such number.
        """
        at = np.asarray(numbers, np.int64)
        if at.size and at.min() < 0:
            raise IndexError(f"keys have numbers from 0 to {len(self) - 1}, got {at.min()}")
        return self.drawn(at)

    def drawn(self, at: Ids) -> list[Hashable]:
        """Return the same of numbers that are known to be there, one batch of each step."""
        packed, new = len(self._ends) - 1, self._new
        if not packed:
            return [new[number] for number in at.tolist()]
        start, end = self._ends.take(at, mode="clip"), self._ends[1:].take(at, mode="clip")
        size = end - start
        longest = int(size.max(initial=1))
        keys: list[Any]
        if longest <= _WIDE:
            self._text.take(start, mode="clip")  # all are under way to the cache before the first is asked for
            table = self._text.take(start[:, None] + _REACH[:longest], mode="clip").tobytes()
            lines, stops = range(0, len(table), longest), (np.arange(0, len(table), longest) + size).tolist()
            if self._ascii:
                text = table.decode("ascii")
                keys = [text[line:stop] for line, stop in zip(lines, stops, strict=True)]
            else:
                keys = [_decoded(table[line:stop]) for line, stop in zip(lines, stops, strict=True)]
        else:
            keys = [_decoded(self._encoded_at(number)) if number < packed else None for number in at.tolist()]
        for place in np.flatnonzero(at >= packed).tolist():
            keys[place] = new[at[place] - packed]
        return keys

    def find(self, keys: Iterable[Hashable]) -> Ids:
        """Return the numbers of keys, int64 `[n]`; -1 for what is not in the table."""
        wanted = list(map(_plain, keys))
        found = np.fromiter((self._number.get(key, -1) for key in wanted), np.int64, len(wanted))
        if self._runs and len(missing := np.flatnonzero(found < 0)):
            found[missing] = self._find_packed([_encoded(wanted[place]) for place in missing.tolist()])
        return found

    def numbers(self, keys: Iterable[Hashable]) -> Ids:
        """Return the numbers of keys, int64 `[n]`.

        Raises:
            KeyError: One is not in the table.
        """
        wanted = list(_several(keys))
        found = self.find(wanted)
        if len(unknown := np.flatnonzero(found < 0)):
            first = wanted[unknown[0]]
            raise KeyError(f"{len(unknown)} of {len(wanted)} keys are not among the {len(self)}, such as {first!r}")
        return found

    def names(self, numbers: ArrayLike) -> list[int | str]:
        """Return keys as they are told: texts and whole numbers as they are, others as Python writes them."""
        return [key if type(key) in (int, str) else repr(key) for key in self.of(numbers)]  # type: ignore[misc]

    def digest(self) -> str:
        """Return a text that is equal where keys and their order are."""
        digest = hashlib.sha256()
        for part in self.state_dict().values():
            digest.update(np.asarray(part).tobytes())
        return digest.hexdigest()[:16]

    # State --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return all keys as one text, uint8, and the length of each in bytes, uint32 `[N]`."""
        new = [_encoded(key) for key in self._new]
        sizes = np.concatenate([np.diff(self._ends), np.fromiter(map(len, new), np.int64, len(new))]).astype(np.uint32)
        text = np.concatenate([self._text, np.frombuffer(b"".join(new), np.uint8)])
        return portable({"text": text, "sizes": sizes})  # type: ignore[no-any-return]

    @classmethod
    def from_state(cls, state: Any) -> KeyTable:
        """Return the table that `state_dict` was of."""
        state, table, start = unpacked(state), cls(), 0
        text = np.asarray(state["text"], np.uint8).tobytes()
        sizes = np.asarray(state["sizes"], np.int64)
        for first in range(0, len(sizes), _BLOCK):
            ends = start + np.cumsum(sizes[first : first + _BLOCK])
            starts = [start, *ends[:-1].tolist()]
            encoded = [text[a:b] for a, b in zip(starts, ends.tolist(), strict=True)]
            start = int(ends[-1])
            if len(encoded) == _BLOCK:
                table._pack(encoded)
            else:
                table._append([_decoded(raw) for raw in encoded])
        return table

    # The parts ----------------------------------------------------------------------------

    def _append(self, keys: list[Hashable], *, known: bool = False) -> None:
        """Add keys that the new ones have room for; `known`: that they are no packed ones, too."""
        first, before = len(self), len(self._number)
        self._number.update(zip(keys, range(first, first + len(keys)), strict=True))
        if len(self._number) < before + len(keys):  # of a table in the making: `add` looks first
            there = set(self._new)
            self._refuse(next(key for place, key in enumerate(keys) if key in there or key in keys[:place]))
        self._new += keys
        if len(self._new) == _BLOCK:
            encoded = [_encoded(key) for key in self._new]
            if not known:
                self._refuse_known(self._new, encoded)
            self._new, self._number = [], {}
            self._pack(encoded)

    def _pack(self, encoded: list[bytes]) -> None:
        text, packed = b"".join(encoded), len(self._ends) - 1
        numbers = np.arange(packed, packed + _BLOCK).astype(np.uint64)
        self._runs.append(np.sort(_crcs(encoded) << _HIGH | numbers))
        used = len(self._text)
        self._text, self._ends = _longer(self._text, used + len(text)), _longer(self._ends, packed + 1 + _BLOCK)
        self._text[used:] = np.frombuffer(text, np.uint8)
        self._ends[packed + 1 :] = used + np.cumsum(np.fromiter(map(len, encoded), np.int64, _BLOCK))
        self._ascii &= text.isascii()
        for later in range(len(self._runs) - 1, 0, -1):  # one pair a block, so that there is no long pause
            if len(self._runs[later - 1]) <= len(self._runs[later]):
                merged = np.concatenate(self._runs[later - 1 : later + 1])
                merged.sort(kind="stable")  # which merges what is sorted
                self._runs[later - 1 : later + 1] = [merged]
                break

    def _find_packed(self, encoded: Sequence[bytes]) -> Ids:
        found = np.full(len(encoded), -1, np.int64)
        crcs = _crcs(encoded) << _HIGH
        order = np.argsort(crcs)  # neighbours are looked for in neighbouring memory
        wanted = crcs[order]
        for run in self._runs:
            at = run.searchsorted(wanted)
            near = np.flatnonzero(run[np.minimum(at, len(run) - 1)] ^ wanted <= _LOW)  # of the same CRC
            for place, look in zip(order[near].tolist(), at[near].tolist(), strict=True):
                while look < len(run) and run[look] ^ crcs[place] <= _LOW:
                    number = int(run[look] & _LOW)
                    if self._encoded_at(number) == encoded[place]:
                        found[place] = number
                        break
                    look += 1
        return found

    def _encoded_at(self, number: int) -> bytes:
        return self._text[self._ends[number] : self._ends[number + 1]].tobytes()

    def _refuse_known(self, keys: list[Hashable], encoded: list[bytes]) -> None:
        known = np.flatnonzero(self._find_packed(encoded) >= 0)
        if len(known):
            self._refuse(keys[known[0]])

    def _refuse(self, key: Hashable) -> None:
        raise ConfigError([f"each needs a key of its own, and {key!r} is there already"])


def _plain(key: Any) -> Hashable:
    if type(key) is str or type(key) is int:
        return key
    return _whole(plain_key(key))


def _whole(key: Any) -> Hashable:
    """Return a plain key whose numbers are whole where they are equal to whole ones."""
    if isinstance(key, tuple):
        return tuple(map(_whole, key))
    return int(key) if isinstance(key, bool) or (isinstance(key, float) and key.is_integer()) else key


def _encoded(key: Hashable) -> bytes:
    if type(key) is not str:
        return _NO_TEXT + json.dumps(key_to_json(key)).encode()
    try:
        return key.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as in names of files that are no UTF-8
        return key.encode("utf-8", "surrogatepass")


def _decoded(encoded: bytes) -> Hashable:
    if encoded[:1] == _NO_TEXT:
        return key_from_json(json.loads(encoded[1:]))
    return encoded.decode("utf-8", "surrogatepass")


def _crcs(encoded: Sequence[bytes]) -> NDArray[np.uint64]:
    return np.fromiter(map(zlib.crc32, encoded), np.uint64, len(encoded))


def _longer(array: NDArray[Any], size: int) -> NDArray[Any]:
    """Return an array with room behind what it holds, in the same memory where there is some left."""
    room = array.base
    if not isinstance(room, np.ndarray) or room.dtype != array.dtype or len(room) < size:
        room = np.empty(int(_ROOM * size), array.dtype)
        room[: len(array)] = array
    return room[:size]


def _several(keys: Any) -> Iterable[Hashable]:
    if isinstance(keys, (str, bytes)):
        raise TypeError(f"keys must be several, got {keys!r} alone: give [{keys!r}]")
    return keys  # type: ignore[no-any-return]
