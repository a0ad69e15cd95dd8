"""`check_resume`: a saved and restored object goes on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from learnit_r8.checkpoint.state_codec import decode, encode
from learnit_r8.errors import CheckpointError


def check_resume(
    make: Callable[[], Any], advance: Callable[[Any], Any], *, steps: int = 24, cuts: Sequence[int] = (0, 1, 9, 17)
) -> None:
    """Check that a saved and restored object goes on as if nothing had happened.

    The state passes through the checkpoint's encoding (strict JSON plus raw arrays), as in a run.

    Args:
        make: Makes a new object that has `state_dict()` and `load_state_dict(state)`.
        advance: Takes the object one step further and returns what came out: numbers,
            strings, arrays, or lists, tuples and dicts of them.
        steps: Number of steps of a whole run.
        cuts: Steps after which state is saved, each below `steps`.

    Raises:
        AssertionError: The tail after a restore differs, or saving changed the object.
    """
    whole = make()
    expected = [advance(whole) for _ in range(steps)]
    for cut in cuts:
        original = make()
        for _ in range(cut):
            advance(original)
        state = round_trip(original.state_dict())
        tail = [advance(original) for _ in range(steps - cut)]
        require(
            equal(tail, expected[cut:]),
            f"state_dict() after step {cut} changed what follows: return copies and leave the object as it is",
        )
        restored = make()
        restored.load_state_dict(state)
        for step in range(cut, steps):
            require(
                equal(advance(restored), expected[step]),
                f"restored after step {cut}, step {step} differs from the uninterrupted run: something that it "
                "depends on is missing from state_dict()",
            )


def round_trip(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state as a checkpoint would give it back; raise `AssertionError` where it cannot be saved."""
    try:
        text, arrays = encode(state)
    except CheckpointError as error:
        raise AssertionError(f"what state_dict() returned cannot be saved: {error}") from error
    return decode(text, np.concatenate([np.empty(0, np.uint8), *arrays]))


def equal(one: Any, other: Any) -> bool:
    """Compare nested values; NaN equals NaN."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, (np.ndarray, float)) or isinstance(other, (np.ndarray, float)):
        try:
            return np.array_equal(one, other, equal_nan=True)
        except TypeError:
            return np.array_equal(one, other)
    return bool(one == other)


def require(holds: bool, otherwise: str) -> None:
    """Raise `AssertionError` with what is to be done, unless something holds."""
    if not holds:
        raise AssertionError(otherwise)
