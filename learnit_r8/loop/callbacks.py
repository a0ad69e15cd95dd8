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
    """`save_callback(state_dict, filepath)`, or `save_callback(filepath)`.

    Attributes:
        collective: It has to run on all ranks at once, see `learnit_r8.integrations.distributed.collective`.

    Raises:
        TypeError: It takes neither one nor two positional arguments.
    """

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
        """Save the model at `path`; return what is left to be done, by any thread.

        Raises:
            CheckpointError: The user's function returned False.
        """
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
    """`load_callback(source)`, or `load_callback(source, from_ram=...)`.

    Raises:
        TypeError: It takes no positional argument.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._told = _has_keyword(function, "from_ram")
        if not accepts(function, 1) and not self._told:
            raise TypeError("load_callback must take (source) or (source, from_ram)")

    def __call__(self, source: Any, *, from_ram: bool) -> None:
        """Restore the model from a path or an in-memory state.

        Raises:
            RuntimeError: The user's function returned False.
        """
        result = self._function(source, from_ram=from_ram) if self._told else self._function(source)
        if result is False:
            raise RuntimeError("load_callback returned False")


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # some built-ins have none
        return None


def accepts(function: Callable[..., Any], positional: int) -> bool:
    """Whether the function can be called with so many positional arguments and no more."""
    signature = _signature(function)
    if signature is None:
        return True
    try:
        signature.bind(*range(positional))
    except TypeError:
        return False
    return True


def _wants_only_a_path(function: Callable[..., Any]) -> bool:
    """Whether further arguments are options: `def save(filepath, verbose=False)`."""
    signature = _signature(function)
    positional = [p for p in signature.parameters.values() if p.kind in _POSITIONAL] if signature else []
    if len(positional) < 2 or positional[1].default is inspect.Parameter.empty:
        return False
    return any(word in positional[0].name.lower() for word in ("path", "file", "name"))


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _has_keyword(function: Callable[..., Any], name: str) -> bool:
    signature = _signature(function)
    if signature is None:
        return False
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return any(p.name == name and p.kind in kinds for p in signature.parameters.values())
