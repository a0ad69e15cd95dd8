"""The user's save and load functions, called the way that their signatures allow."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learnit_r8.errors import CheckpointError

if TYPE_CHECKING:
    from learnit_r8.checkpoint.background import Background


class SaveCallback:
    """`save_callback(state_dict, filepath)`, or `save_callback(filepath)`; `collective` ones run on all ranks."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        partly = getattr(function, "func", None)  # of functools.partial
        self.collective = any(getattr(one, "collective", False) is True for one in (function, partly))
        self._with_state = accepts(function, 2) and not _wants_only_a_path(function)
        if not self._with_state and not accepts(function, 1):
            raise TypeError("save_callback must take (state_dict, filepath) or (filepath)")

    def prepare(self) -> None:
        """Do what makes the first save as fast as the later ones; a failure shows there."""
        if isinstance(self._function, BackgroundSave):
            with suppress(Exception):
                self._function.prepare()

    def __call__(self, state: Callable[[], dict[str, Any]], path: Path) -> Callable[[], object] | None:
        """Save the model at `path`; return what is left to be done, by any thread."""
        if isinstance(self._function, BackgroundSave):
            return self._function.begin(str(path))
        arguments = (state(), str(path)) if self._with_state else (str(path),)
        if self._function(*arguments) is False:
            raise CheckpointError("save_callback returned False")
        return None


class BackgroundSave:
    """A `save_callback` whose model file is written while training goes on.

        R8Scheduler(..., save_callback=BackgroundSave(lambda: {"model": model.state_dict()}, torch.save))

    Between two steps, what `capture` returns is copied in RAM; the copy is written by another thread. A function of
    your own reads the model itself, so the step waits until it has returned.

    Args:
        capture: Returns the model's state: any tree of arrays, tensors, dicts, lists and copyable objects.
        write: `(copy, filepath)`: writes it. It runs in another thread, and gets tensors on the CPU.

    Raises:
        TypeError: One of them is no function.
    """

    def __init__(self, capture: Callable[[], Any], write: Callable[[Any, str], object]) -> None:
        if not callable(capture) or not callable(write):
            raise TypeError(f"BackgroundSave needs two functions, capture() and write(copy, filepath), got {capture!r}")
        self._capture = capture
        self._write = write
        self._buffers: Any = None  # of the last copy; one save is under way at most
        self._preparing: Background[Any] | None = None

    def prepare(self) -> None:
        """Get the memory for the copy, in the background: copying into new memory takes several times as long."""
        from learnit_r8.checkpoint.background import Background
        from learnit_r8.stability.tree_copy import CopyPlan

        plan = CopyPlan(self._capture())
        self._preparing = Background(lambda: plan.fill().pool)  # of whatever is there: only the memory counts

    def begin(self, filepath: str) -> Callable[[], object]:
        """Make the copy; return the function that writes it."""
        from learnit_r8.stability.tree_copy import CopyPlan

        if self._preparing is not None:
            with suppress(Exception):
                self._buffers = self._preparing.result()
            self._preparing = None
        copied = CopyPlan(self._capture(), self._buffers).fill()
        self._buffers = copied.pool
        return partial(self._write, copied.tree, filepath)

    def __call__(self, filepath: str) -> object:
        """Save the model at once."""
        return self.begin(filepath)()


class LoadCallback:
    """`load_callback(source)`, or `load_callback(source, from_ram=...)`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        self._told = any(p.name == "from_ram" and p.kind in named for p in _parameters(function))
        if not accepts(function, 1) and not self._told:
            raise TypeError("load_callback must take (source) or (source, from_ram)")

    def __call__(self, source: Any, *, from_ram: bool) -> None:
        """Restore the model from a path or an in-memory state."""
        result = self._function(source, from_ram=from_ram) if self._told else self._function(source)
        if result is False:
            raise RuntimeError("load_callback returned False")


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    with suppress(TypeError, ValueError):  # some built-ins have none
        return inspect.signature(function)
    return None


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    signature = _signature(function)
    return list(signature.parameters.values()) if signature else []


def accepts(function: Callable[..., Any], positional: int) -> bool:
    """Whether the function can be called with so many positional arguments and no more."""
    signature = _signature(function)
    try:
        return signature is None or signature.bind(*range(positional)) is not None
    except TypeError:
        return False


def _wants_only_a_path(function: Callable[..., Any]) -> bool:
    """Whether further arguments are options: `def save(filepath, verbose=False)`."""
    ordered = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [p for p in _parameters(function) if p.kind in ordered]
    if len(positional) < 2 or positional[1].default is inspect.Parameter.empty:
        return False
    return any(word in positional[0].name.lower() for word in ("path", "file", "name"))
