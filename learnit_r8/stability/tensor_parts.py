"""Tensors that are no plain memory: what they are made of, how to make them again, and whether they are finite.

One rank's part of a DTensor (FSDP2, tensor parallelism), quantized numbers and their scales, jagged tensors: such a
tensor has no memory of its own, its `data_ptr()` is 0. It names the tensors that it is made of, which can be copied.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_SCAN_BYTES = 1 << 18  # a chunk and its mask stay in the L2 cache
_HALF_EXPONENT = {"float16": 0x7C00, "bfloat16": 0x7F80}  # IEEE 754 binary16 and bfloat16: all ones = Inf or NaN


class Parts(NamedTuple):
    """The tensors that a tensor is made of, and all else that it takes to make it again."""

    tensors: dict[str, Any]
    others: dict[str, Any]
    context: Any


def parts_of(node: Any, path: str, torch: Any) -> Parts:
    """Return what a tensor that is no plain memory is made of; nothing where `copy.deepcopy` copies it."""
    problem = "its numbers cannot be read"
    try:
        if hasattr(node, "__tensor_flatten__"):
            names, context = node.__tensor_flatten__()
            values = {name: getattr(node, name) for name in names}
            # What another rank still sends is waited for.
            values = {name: value.wait() if _is_awaited(value) else value for name, value in values.items()}
            tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
            if tensors:
                return Parts(tensors, {name: value for name, value in values.items() if name not in tensors}, context)
        elif node.is_meta:
            problem = "it is on the device meta, which holds no numbers"
        elif node.layout is not torch.strided or node.is_quantized or node.data_ptr() or not node.numel():
            return Parts({}, {}, None)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
    kind = f"{type(node).__module__}.{type(node).__qualname__}"
    raise TypeError(
        f"{path.lstrip('/') or 'the state'} is a {kind} that cannot be copied ({problem}): return tensors "
        "from state_callback that can, or leave it out and restore it by other means"
    )


def _is_awaited(value: Any) -> bool:
    return type(value).__name__ == "AsyncCollectiveTensor"


def made_of(node: Any, parts: Parts, tensors: dict[str, Any]) -> Any:
    """Return a tensor like `node` that is made of copies of its parts."""
    made = type(node).__tensor_unflatten__({**tensors, **parts.others}, parts.context, node.shape, node.stride())
    if type(made) is not type(node) or made.shape != node.shape or made.dtype != node.dtype:
        raise TypeError(f"a {type(node).__name__} cannot be copied: it is a {type(made).__name__} afterwards")
    return made.detach()


def readable(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield what can be scanned of something that was copied as a whole."""
    torch = sys.modules.get("torch")
    tensor = getattr(torch, "Tensor", ()) if torch is not None else ()
    if isinstance(node, tensor):
        yield path, node
    elif tensor and isinstance(node, torch.nn.Module):  # type: ignore[union-attr]
        for name, value in node.state_dict().items():
            if isinstance(value, tensor):
                yield f"{path}/{name}", value
    elif hasattr(node, "__array__") and str(getattr(node, "dtype", "")).startswith(("float", "bfloat", "complex")):
        yield path, node  # JAX's arrays and others'


def all_finite(array: Any) -> bool:
    """Say whether an array or CPU tensor holds neither NaN nor infinity (true for integers)."""
    torch = sys.modules.get("torch")
    name = str(array.dtype)
    if torch is not None and isinstance(array, torch.Tensor):
        name, array = name.removeprefix("torch."), array.detach()
        if array.is_quantized or not (array.is_floating_point() or array.is_complex()):
            return True
        if array.layout is not torch.strided:
            return bool(torch.isfinite(array.to_dense()).all())
        if name == "bfloat16":
            array = array.view(torch.int16)
        elif name not in ("float16", "float32", "float64", "complex64", "complex128"):
            return bool(array.float().isfinite().all())
        array = array.numpy(force=True)
    array = np.asarray(array)
    if array.dtype.kind not in "fc" and name not in _HALF_EXPONENT:  # numpy takes bfloat16 for a kind of bytes
        return True
    flat = array.ravel(order="K")  # a view for every dense layout
    step = max(1, _SCAN_BYTES // flat.itemsize)
    exponent = _HALF_EXPONENT.get(name)
    if exponent is not None:
        bits = flat.view(np.uint16)
        return all(int((bits[i : i + step] & exponent).max()) != exponent for i in range(0, bits.size, step))
    return all(_finite(flat[i : i + step]) for i in range(0, flat.size, step))


@np.errstate(all="ignore")
def _finite(numbers: NDArray[Any]) -> bool:
    """Say whether a vector holds neither NaN nor infinity; a sum of squares that is finite says so in half the time."""
    return math.isfinite(abs(numbers.dot(numbers))) or bool(np.isfinite(numbers).all())
