"""Experiences as trees: dicts and tuples of arrays or tensors, taken apart and put together again."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from learnit_r8.errors import CheckpointError

Spec = int | dict[str, Any]
"""Shape of an experience as JSON: a leaf's number, or {"dict": {name: spec}} or {"tuple": [spec]}."""


def fits(values: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> bool:
    """Whether a cast keeps the values; floats may be rounded, not made infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        cast = values.astype(dtype)
        back = cast.astype(values.dtype)  # numpy compares large integers with floats as floats
    if values.dtype.kind in "fc":
        return bool((np.isfinite(cast) == np.isfinite(values)).all())
    return bool(((back == values) | (values != values)).all())  # NaT, which is no date, differs from itself


def layout_of(held: Any) -> list[Any]:
    """Return dtype and shape of a leaf's rows, as JSON data."""
    return [held.dtype.str if isinstance(held, np.ndarray) else str(held.dtype), list(held.shape[1:])]


def is_tensor(leaf: Any) -> bool:
    """Whether this is a torch tensor."""
    return hasattr(leaf, "detach") and hasattr(leaf, "new_zeros")


def flatten(tree: Any, leaves: list[Any]) -> Spec:
    """Append a tree's leaves to a list; return how it is built."""
    if isinstance(tree, dict):
        if not all(isinstance(key, str) for key in tree):
            raise ValueError(f"dicts of arrays need string keys, got {list(tree)}")
        return {"dict": {key: flatten(tree[key], leaves) for key in sorted(tree)}}
    if isinstance(tree, tuple):
        return {"tuple": [flatten(item, leaves) for item in tree]}
    if isinstance(tree, (str, bytes)) and tree[-1:] in ("\0", b"\0"):
        raise ValueError(
            f'text and bytes that end in a zero lose it in an array: use storage="objects", got {tree!r:.40}'
        )
    leaves.append(tree.detach() if is_tensor(tree) else np.asarray(tree))
    return len(leaves) - 1


def check_spec(spec: Any, leaves: int) -> None:
    """Raise unless this says how an experience of so many leaves is built."""
    found: list[Any] = []
    flatten(unflatten(spec, [np.array(number) for number in range(leaves)]), found)
    if [int(number) for number in found] != list(range(leaves)):
        raise ValueError(f"an experience of {leaves} leaves is not built like {spec}")


def unflatten(spec: Spec, leaves: Sequence[Any]) -> Any:
    """Return the tree that is built like this of these leaves."""
    if isinstance(spec, int):
        return leaves[spec]
    if "dict" in spec:
        return {key: unflatten(item, leaves) for key, item in spec["dict"].items()}
    return tuple(unflatten(item, leaves) for item in spec["tuple"])


def stack_trees(experiences: list[Any]) -> tuple[Spec, list[Any]]:
    """Return how experiences are built, and one array for each leaf with all of them."""
    columns: list[list[Any]] = []
    first: Spec | None = None
    for experience in experiences:
        leaves: list[Any] = []
        spec = flatten(experience, leaves)
        if first is None:
            first = spec
            columns = [[leaf] for leaf in leaves]
            continue
        if spec != first:
            raise ValueError(f"experiences must be built alike: {first} and {spec}")
        for column, leaf in zip(columns, leaves, strict=True):
            if leaf.shape != column[0].shape or leaf.dtype != column[0].dtype:
                raise ValueError(
                    f"experiences must have equal shapes and dtypes: {tuple(column[0].shape)} {column[0].dtype} "
                    f'and {tuple(leaf.shape)} {leaf.dtype}; for varying ones use storage="objects"'
                )
            column.append(leaf)
    assert first is not None
    return first, [stack_leaf(column) for column in columns]


def stack_leaf(column: list[Any]) -> Any:
    """Return arrays or tensors as one, along a new first axis."""
    if not is_tensor(column[0]):
        return np.stack(column)
    stacked = column[0].new_empty((len(column), *column[0].shape))
    for row, leaf in enumerate(column):
        stacked[row] = leaf
    return stacked


def to_numpy(held: Any, *, copy: bool = True) -> np.ndarray[Any, Any]:
    """Return an array or a tensor as an array, bfloat16 as float32."""
    if isinstance(held, np.ndarray):
        return np.array(held) if copy else np.asarray(held)
    tensor = held.detach().cpu()
    return np.array((tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy())


def to_torch(saved: Any, dtype: str) -> Any:
    """Return an array as a tensor of a dtype given by its name, on the CPU."""
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise CheckpointError("this buffer held tensors: restoring it needs torch") from error
    return torch.from_numpy(np.array(saved)).to(getattr(torch, dtype.removeprefix("torch.")))
