"""Whatever a framework calls a loss, read into numpy: one number, or one per sample."""

from __future__ import annotations

import math
import numbers
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from learnit_r8.errors import ProtocolError
from learnit_r8.types import Losses

LIMIT = 1e15
"""Losses beyond this count as infinite: their squares would leave float32's range, and a loss
of this size means a diverged model in any units."""

_SAFE_SQUARES = 1e30  # LIMIT ** 2
_FLOAT32S: dict[int, Any] = {id(kind): kind for kind in (np.dtype(np.float32),)}
"""The float32 of each framework that was met, by identity: to compare and to print dtypes is slow."""
_FEW = 64  # losses that Python adds up faster than numpy


class Reported(NamedTuple):
    """A loss as it was reported.

    Attributes:
        values: Per-sample losses, float32 `[n]`, or None for one number per batch.
        mean: Their mean, or the number.
        finite: False when anything is NaN, infinite or beyond `LIMIT`.
        own: Per-sample losses of this rank's shard, float32 `[n]`, where no rank has those of all: they are recorded,
            but decide nothing, as all ranks have to come to one verdict.
        others: Mean of all ranks' finite losses where a few are not, for a report with `own`; else NaN.
    """

    values: Losses | None
    mean: float
    finite: bool
    own: Losses | None = None
    others: float = math.nan


def read_losses(loss: Any, size: int) -> Reported:
    """Read a report for a batch of `size` samples.

    Args:
        loss: A float, anything with `__float__`, or a 1-D array, tensor (any device, with
            grad) or sequence of `size` losses in the batch's order.
        size: Number of samples in the batch.

    Raises:
        TypeError: Not a real number or a 1-D array of them.
        ProtocolError: An array of another length.
    """
    if isinstance(loss, (float, int)) and not isinstance(loss, bool):
        return _one(float(loss)) if abs(loss) <= LIMIT else Reported(None, _clamped(loss), finite=False)
    if (few := read_few(loss, size)) is not None:
        return Reported(np.asarray(few[0], np.float32), few[1], finite=True)
    array = loss if isinstance(loss, np.ndarray) else _to_numpy(loss)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{_EXPECTED}, got {_describe(loss)} with dtype {array.dtype}")
    if array.ndim == 0:
        return _one(float(array))
    if array.ndim > 1:
        raise TypeError(
            f"{_EXPECTED}, got {array.ndim} dimensions, shape {array.shape}: "
            "average each sample's losses first, for instance loss.mean(dim=1)"
        )
    if len(array) != size:
        raise ProtocolError(
            f"the batch has {size} samples, but {len(array)} losses came: report one loss per sample in the "
            "batch's order (reduction='none'), or one number such as losses.mean()"
        )
    return _many(array)


def _one(value: float) -> Reported:
    return Reported(None, value, finite=-LIMIT <= value <= LIMIT)


def read_few(loss: Any, size: int) -> tuple[Losses | list[float], float] | None:
    """Read a float32 array or tensor of a few finite losses by one call.

    Each call of numpy or torch costs several microseconds amid a training step.

    Returns:
        The losses, their reader's to keep, and their mean; None where that is not all there is to do.
    """
    if not 0 < size <= _FEW:
        return None
    kind = getattr(loss, "dtype", None)
    if id(kind) not in _FLOAT32S:
        if str(kind) != "torch.float32":
            return None
        _FLOAT32S[id(kind)] = kind
    try:
        each = loss.tolist()
    except RuntimeError:  # a tensor that holds no numbers
        return None
    if type(each) is not list or len(each) != size or type(each[0]) is not float:
        return None
    lowest = min(each)
    if not (lowest >= 0.0 or (lowest >= -LIMIT and max(each) <= LIMIT)):
        return None
    total = math.fsum(each)  # NaN hides from min
    if not total <= LIMIT:
        return None
    return loss.copy() if isinstance(loss, np.ndarray) else each, total / size


@np.errstate(all="ignore")
def _many(array: NDArray[Any]) -> Reported:
    # The sum of squares is small only if every loss is finite and small: one pass in place of three.
    values = array.astype(np.float32)
    finite = float(values.dot(values)) <= _SAFE_SQUARES or bool(np.all(np.abs(values) <= LIMIT))
    mean = float(np.add.reduce(array, dtype=np.float64)) / len(array)
    return Reported(values, mean, finite)


def _clamped(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an int beyond float64
        return float("inf") if value > 0 else float("-inf")


_EXPECTED = "a loss is a number, or a 1-D array with one number per sample of the batch"


def _to_numpy(loss: Any) -> NDArray[Any]:
    if loss is None:
        raise TypeError(f"{_EXPECTED}, got None: does the training step return its loss?")
    if isinstance(loss, (str, bytes, bool, complex, dict, set)):
        raise TypeError(f"{_EXPECTED}, got {_describe(loss)}")
    if hasattr(loss, "detach"):  # torch: leave the graph and the device; numpy has no bfloat16
        try:
            tensor = loss.detach().cpu()
            try:
                return tensor.numpy()  # type: ignore[no-any-return]
            except TypeError:
                return tensor.float().numpy()  # type: ignore[no-any-return]
        except (RuntimeError, TypeError) as error:  # on the device "meta", sparse
            raise TypeError(f"{_EXPECTED}, got a tensor that holds none: {error}") from error
    if isinstance(loss, (list, tuple)):
        loss = [item.detach().cpu() if hasattr(item, "detach") else item for item in loss]
        if any(isinstance(item, (bool, np.bool_)) for item in loss):
            raise TypeError(f"{_EXPECTED}, got a list with bools")
    elif isinstance(loss, numbers.Real) or not hasattr(loss, "__array__"):
        try:
            return np.asarray(float(loss))
        except (TypeError, ValueError) as error:
            raise TypeError(f"{_EXPECTED}, got {_describe(loss)}") from error
    try:
        array = np.asarray(loss)
    except ValueError as error:  # ragged
        raise TypeError(f"{_EXPECTED}, got {_describe(loss)}: {error}") from error
    if array.dtype.kind == "V" or array.dtype.name == "bfloat16":  # JAX's and TensorFlow's bfloat16
        array = array.astype(np.float32)
    return array


def read_classes(predictions: Any, size: int, ranks: int) -> NDArray[np.int64]:
    """Read the classes that a model gives the samples of a batch, whole numbers in its order.

    Raises:
        TypeError: No whole numbers.
        ProtocolError: An array of another shape, or several ranks: no rank hears of the others' predictions.
    """
    if ranks > 1:
        raise ProtocolError(f"predictions= is for one rank, this run has world_size={ranks}: leave it out")
    array = predictions if isinstance(predictions, np.ndarray) else _to_numpy(predictions)
    if array.shape != (size,):
        raise ProtocolError(
            f"the batch has {size} samples, but predictions= has the shape {array.shape}: report one class per sample "
            "in the batch's order, such as logits.argmax(1)"
        )
    if array.dtype.kind not in "iu":
        raise TypeError(f"predictions= are classes, whole numbers such as logits.argmax(1), got {array.dtype}")
    return array.astype(np.int64)


def read_number(name: str, value: Any) -> float:
    """Return a number that the user logs; a tensor leaves its graph and device.

    Raises:
        TypeError: Not one number.
    """
    if not isinstance(value, (str, bytes)):
        with suppress(TypeError, ValueError, RuntimeError, OverflowError):
            return float(value.detach() if hasattr(value, "detach") else value)
    raise TypeError(f"log({name}=...) takes one number, such as its mean, got {_describe(value)}")


def _describe(value: Any) -> str:
    if getattr(value, "shape", ()):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
