"""What an object saves: one table a class, from which saving and loading are made.

    class Stats(Saved):
        _saved = table(alpha=float, count=int, parts=each(float), bits=maybe(np.uint8))

An entry stands for the attribute of that name, or that name with an underscore before it; its kind says
how the value becomes plain data and comes back. A subclass's table is added to its parents'. Loading is all or nothing.
"""

from __future__ import annotations

import copy
import functools
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, ClassVar, Self, TypeVar

import numpy as np

from learnit_r8.core.portable import owned, portable, unpacked
from learnit_r8.errors import StateError

_Method = TypeVar("_Method", bound=Callable[..., Any])
_NEEDED = object()
KEEP = object()
"""What is absent stays as it is."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How one value is saved and loaded.

    Attributes:
        save: `(owner, value) -> plain data`, a copy.
        load: `(owner, plain data) -> value`, a copy; `owner` has what stands above it in the table.
        of: The attribute, where the table's name does not tell.
        absent: What it is where an older state does not have it, as it would have been saved; or `KEEP`.
    """

    save: Callable[[Any, Any], Any]
    load: Callable[[Any, Any], Any]
    of: str = ""
    absent: Any = _NEEDED


def kind(given: Any, *, of: str = "", absent: Any = _NEEDED) -> Kind:
    """Return the kind that a table's entry means.

    Args:
        given: A kind; `int`, `float`, `bool` or `str`; an enumeration; or a numpy type, for arrays.
        of: See `Kind`.
        absent: See `Kind`.
    """
    if isinstance(given, Kind):
        made = given
    elif issubclass(given, np.generic):
        made = Kind(lambda _, array: np.array(array), lambda _, saved: np.array(saved, given))
    elif issubclass(given, Enum):
        made = Kind(lambda _, member: member.value, lambda _, saved: given(saved))
    else:
        made = Kind(lambda _, value: value, lambda _, saved: given(saved))
    return replace(made, of=of or made.of, absent=absent)


def table(**entries: Any) -> dict[str, Kind]:
    """Return a class's table: the kind of each entry, or what `kind` takes."""
    return {name: entry if isinstance(entry, Kind) else kind(entry) for name, entry in entries.items()}


def finite(otherwise: float) -> Kind:
    """A float that is None in the state where it is not finite, which JSON does not know, and then loaded as this."""
    return Kind(
        lambda _, value: value if math.isfinite(value) else None,
        lambda _, saved: otherwise if saved is None else float(saved),
    )


def maybe(inner: Any) -> Kind:
    """A value or None."""
    made = kind(inner)
    return Kind(
        lambda owner, value: None if value is None else made.save(owner, value),
        lambda owner, saved: None if saved is None else made.load(owner, saved),
    )


def each(inner: Any, into: Callable[[Iterable[Any]], Any] = list) -> Kind:
    """Several values, a list in the state."""
    made = kind(inner)
    return Kind(
        lambda owner, values: [made.save(owner, value) for value in values],
        lambda owner, saved: into([made.load(owner, value) for value in saved]),
    )


def row(*inner: Any) -> Kind:
    """A tuple of so many values of different kinds, a list in the state."""
    made = [kind(one) for one in inner]
    return Kind(
        lambda owner, values: [one.save(owner, value) for one, value in zip(made, values, strict=True)],
        lambda owner, saved: tuple(one.load(owner, value) for one, value in zip(made, saved, strict=True)),
    )


def mask(count: Callable[[Any], int]) -> Kind:
    """A mask, eight samples a byte; `count` is `(owner) -> its length`."""
    return Kind(
        lambda _, bits: np.packbits(bits),
        lambda owner, saved: np.unpackbits(np.array(saved, np.uint8), count=count(owner)).astype(np.bool_),
    )


def part(make: Callable[[Any, Any], Any] | None = None) -> Kind:
    """An object with a state of its own.

    Args:
        make: `(owner, state) -> object` to load the state into. None: the one that is there, which is `Saved`.
    """
    return Kind(_tree, lambda owner, saved: _Into(saved) if make is None else _loaded(make(owner, saved), saved))


def _tree(_: Any, value: Any) -> Any:
    return value._state_tree() if isinstance(value, Saved) else value.state_dict()


def same(attribute: str, said: str) -> Kind:
    """A value that must be the owner's own; `said` is what the user knows it as."""

    def load(owner: Any, saved: Any) -> Any:
        mine = getattr(owner, attribute)
        if saved != mine:
            raise StateError(f"the state has {said}={saved!r}, this {type(owner).__name__} {mine!r}")
        return mine

    return Kind(lambda _, value: value, load)


def sized(dtype: Any, count: Callable[[Any], int], owner: str) -> Kind:
    """An array with a number for each sample; `count` is `(owner) -> how many`, and `owner` what the user calls it."""

    def load(me: Any, saved: Any) -> Any:
        if len(saved) != count(me):
            raise StateError(f"the state has {len(saved)} samples, this {owner} {count(me)}")
        return np.array(saved, dtype)

    return Kind(lambda _, array: np.array(array), load)


@dataclass(frozen=True, slots=True)
class _Into:
    """A state that goes into the object that is there, once all of it is known to be sound."""

    state: Any


def _loaded(thing: Any, state: Any) -> Any:
    thing.load_state_dict(state)
    return thing


class _Fixed:
    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __set__(self, thing: Any, value: Any) -> None:
        if self._name in vars(thing):
            raise AttributeError(
                f"{self._name} cannot be changed, since what is held depends on it: make another "
                f"{type(thing).__name__} with {self._name}={value!r}"
            )
        vars(thing)[self._name] = value


def fixed() -> Any:
    """Return an attribute of a class that is set once and then only read."""
    return _Fixed()


def alone(method: _Method) -> _Method:
    """Decorate a method of a `Saved` class: one thread at a time."""

    @functools.wraps(method)
    def waiting(self: Any, *args: Any, **options: Any) -> Any:
        with self._lock:
            return method(self, *args, **options)

    return waiting  # type: ignore[return-value]


class Saved:
    """Base of classes that say in `_saved` what their state is.

    `_as_json` is the size up to which arrays become lists; `_state_taken()` works out what follows from the saved
    values, in attributes that are new: this is a shallow copy until all is known to be sound.
    """

    _saved: ClassVar[Mapping[str, Kind]] = {}
    _as_json: ClassVar[int] = 0
    _table: ClassVar[Mapping[str, Kind]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._table = {**cls._table, **cls._saved}

    _lock: Any

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Make one with a lock of its own, whatever its `__init__` does."""
        made = super().__new__(cls)
        made._lock = threading.RLock()
        return made

    def __getstate__(self) -> dict[str, Any]:
        state: Any = super().__getstate__()
        held, slots = state if isinstance(state, tuple) else (state, {})  # slots: of a subclass
        return {name: value for name, value in (held | slots).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in owned(state).items():
            setattr(self, name, value)
        self._lock = threading.RLock()

    def __copy__(self) -> Self:
        """Return a deep copy: where some is shared and some is not, both go wrong."""
        return copy.deepcopy(self)

    @alone
    def state_dict(self) -> dict[str, Any]:
        """Return copies of all that the next steps depend on, as plain data."""
        return portable(self._state_tree(), self._as_json)  # type: ignore[no-any-return]

    def _state_tree(self) -> dict[str, Any]:
        held = vars(self)
        return {name: entry.save(self, held[_attribute(held, name, entry)]) for name, entry in self._table.items()}

    @alone
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            StateError: Something is missing, damaged or belongs to something else. Nothing is changed.
        """
        fresh, changes = shallow(self), []  # type: ignore[var-annotated]
        fresh._take_state(unpacked(state), changes)
        for holder, attribute, there, other in changes:
            vars(there).update(vars(other))
            holder[attribute] = there
        self.__dict__.update(vars(fresh))

    def _take_state(self, state: Mapping[str, Any], changes: list[Any]) -> None:
        """Let this shallow copy hold a state; what is to be changed elsewhere once all is sound is noted."""
        name, held, owner = "", vars(self), type(self).__name__
        missing = [name for name, entry in self._table.items() if name not in state and entry.absent is _NEEDED]
        if missing:
            raise StateError(f"the state of {owner} lacks {', '.join(missing)}")
        try:
            for name, entry in self._table.items():
                if name not in state and entry.absent is KEEP:
                    continue
                attribute = _attribute(held, name, entry)
                value = entry.load(self, state.get(name, entry.absent))
                if isinstance(value, _Into):
                    there, state_of_it = held[attribute], value.state
                    value = shallow(there)
                    value._take_state(state_of_it, changes)
                    changes.append((held, attribute, there, value))
                held[attribute] = value
            name = ""
            self._state_taken()
        except StateError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            where = f"{owner}, {name}" if name else owner
            raise StateError(f"the state of {where} is damaged ({type(error).__name__}: {error})") from error

    def _state_taken(self) -> None:
        """Work out what follows from the saved values."""


def _attribute(held: Mapping[str, Any], name: str, entry: Kind) -> str:
    return entry.of or (name if name in held else f"_{name}")


def shallow(thing: Any) -> Any:
    """Return another one with the same attributes."""
    other = object.__new__(type(thing))
    other.__dict__.update(vars(thing))
    return other
