"""R8Scheduler in a JAX loop: state that no later step changes, a learning rate that never retraces.

    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=0.0)
    for batch in scheduler.batch_iterator():
        opt_state = with_lr(opt_state, batch.lr)
        params, opt_state, losses = step(params, opt_state, x[batch.indices], y[batch.indices], batch.weights)
        scheduler.update_with_loss(losses)

The step trains on `(losses * weights).mean()` and returns the losses without the weights.

A rollback replaces the variables of the loop, so they belong in something that a function can write to:

    def restore(source):
        nonlocal params, opt_state
        params, opt_state = restore_state(source)

    R8Scheduler(..., state_callback=lambda: capture_state((params, opt_state)), load_callback=restore)

Keep the batch size constant (`drop_last=True`), or the last batch of an epoch is compiled once more.

Sharded arrays come back as they were sharded. With several processes (`jax.distributed.initialize()`) each gets its
slice of a batch, from which the global arrays are made:

    scheduler = R8Scheduler(len(data), global_batch_size, num_epochs=3, drop_last=True, **rank_arguments())
    inputs = jax.make_array_from_process_local_data(sharding, x[batch.indices])
    scheduler.update_with_loss(local_part(losses))
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from numpy.typing import NDArray

from learnit_r8.errors import ConfigError

__all__ = ["all_gather", "capture_state", "clip_gradients", "local_part", "rank_arguments", "restore_state", "with_lr"]

_RATE = "learning_rate"


class _Key(NamedTuple):
    """A typed PRNG key as plain numbers."""

    implementation: str
    numbers: Any


class _Placement:
    """A sharding, which a copy of a captured state shares and a file of it lacks."""

    def __init__(self, sharding: Any = None) -> None:
        self.sharding = sharding

    def __deepcopy__(self, memo: Any) -> _Placement:
        return self

    def __reduce__(self) -> Any:
        return _Placement, ()


class _Placed(NamedTuple):
    """An array that belongs to certain devices: the pieces of it that this process has, by their place."""

    pieces: dict[Any, NDArray[Any]]
    shape: tuple[int, ...]
    dtype: str
    placement: _Placement


def capture_state(state: Any) -> Any:
    """Return a pytree with numpy copies of its arrays; the arrays may be donated or deleted afterwards.

    Of an array that is sharded, or was put on a device, the copy knows where it belongs. On a CPU `jax.device_get`
    returns views of JAX's own memory, which a donated buffer is written to; so everything is copied. Numpy arrays,
    unlike JAX's, are checked for NaN by the backups.

    Args:
        state: Any pytree: parameters, optimizer state, PRNG keys, numbers.
    """
    return jax.tree.map(_to_numpy, state)


def restore_state(captured: Any, like: Any = None) -> Any:
    """Return what `capture_state` was given, in new memory; `captured` can be used again.

    Args:
        captured: The captured pytree.
        like: A pytree of the same structure whose arrays say where the new ones go (devices and
            sharding); by default to where they were. Needed for a state that was read from a file.

    Raises:
        ConfigError: An array was sharded, and nothing says how; or not all of it is in this process, and it is to be
            sharded in another way.
    """
    others = () if like is None else (like,)
    return jax.tree.map(_to_jax, captured, *others, is_leaf=lambda leaf: isinstance(leaf, (_Key, _Placed)))


def with_lr(opt_state: Any, lr: float) -> Any:
    """Return an optimizer state with another learning rate; jitted functions are not traced again.

    Args:
        opt_state: State of an optimizer made by `optax.inject_hyperparams`, which may be part of a
            chain. Where it has several learning rates, all are set.
        lr: Learning rate of the next update.

    Raises:
        ConfigError: The state holds no learning rate.
    """
    found = False

    def replaced(path: Any, leaf: Any) -> Any:
        nonlocal found
        if [getattr(key, "key", getattr(key, "name", None)) for key in path[-2:]] != ["hyperparams", _RATE]:
            return leaf
        found = True
        # A Python float would be weakly typed, which is another signature for jit.
        return jnp.asarray(lr, getattr(leaf, "dtype", jnp.float32))

    new = jax.tree_util.tree_map_with_path(replaced, opt_state)
    if not found:
        raise ConfigError(
            f"the optimizer state holds no {_RATE!r}, got {type(opt_state).__name__}: make the optimizer with "
            "optax.inject_hyperparams(optax.adam)(learning_rate=0.0)"
        )
    return new


def clip_gradients(gradients: Any, norm: Any) -> tuple[Any, jax.Array]:
    """Return gradients clipped by `optax.clip_by_global_norm`, and their norm before; for use inside a jitted step.

    Give `scheduler.clip_norm()` to the step as an argument, and the norm to `scheduler.check` or `scheduler.clipped`.

    Args:
        gradients: A pytree of arrays.
        norm: What to clip at, a number or a traced scalar; infinite for not at all.
    """
    import optax

    clip = optax.clip_by_global_norm(norm)
    squares = (jnp.sum(jnp.square(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradients))
    return clip.update(gradients, clip.init(gradients))[0], jnp.sqrt(sum(squares))


def rank_arguments() -> dict[str, Any]:
    """Return `rank`, `world_size` and `all_gather` of this process, for `R8Scheduler` or `resume_from_checkpoint`."""
    if jax.process_count() == 1:
        return {"rank": 0, "world_size": 1, "all_gather": None}
    return {"rank": jax.process_index(), "world_size": jax.process_count(), "all_gather": all_gather}


def all_gather(array: NDArray[Any]) -> NDArray[Any]:
    """Return every process's array, concatenated in the order of the processes.

    Args:
        array: 1-D, of the same dtype in all processes; lengths may differ.
    """
    data = np.ascontiguousarray(array).reshape(-1)
    raw = data.view(np.uint8)  # jax would make float32 of float64
    sizes = np.asarray(multihost_utils.process_allgather(np.array([len(raw)], np.int32))).ravel()
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)  # few sizes: each is compiled once
    padded[: len(raw)] = raw
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return np.concatenate([row[:size] for row, size in zip(rows, sizes, strict=True)]).view(data.dtype)


def local_part(array: jax.Array) -> NDArray[Any]:
    """Return the part of a global array that this process has, along the first axis: its losses of a batch."""
    pieces = {shard.index[0].start or 0: np.array(shard.data) for shard in array.addressable_shards}
    return np.concatenate([pieces[start] for start in sorted(pieces)])


def _to_numpy(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array):
        return np.array(leaf) if isinstance(leaf, np.ndarray) else leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return _Key(str(jax.random.key_impl(leaf)), _to_numpy(jax.random.key_data(leaf)))
    if not leaf.committed:
        return np.array(leaf)
    pieces = {_place(shard.index): np.array(shard.data) for shard in leaf.addressable_shards}
    return _Placed(pieces, leaf.shape, leaf.dtype.name, _Placement(leaf.sharding))


def _to_jax(leaf: Any, like: Any = None) -> Any:
    if isinstance(leaf, _Key):
        numbers = _to_jax(leaf.numbers, None if like is None else jax.random.key_data(like))
        return jax.random.wrap_key_data(numbers, impl=leaf.implementation)
    like = like if isinstance(like, jax.Array) else None
    if isinstance(leaf, _Placed):
        return _placed(leaf, like)
    if not isinstance(leaf, np.ndarray):
        return leaf
    # Both calls may use a numpy array's own memory: it is copied first.
    if like is not None and like.committed:
        return jax.device_put(leaf.copy(), like.sharding)
    return jnp.asarray(leaf.copy())  # an uncommitted array goes where the others of a computation are


def _placed(leaf: _Placed, like: Any) -> jax.Array:
    sharding = leaf.placement.sharding
    if like is not None and not like.committed:
        return jnp.asarray(_whole(leaf))
    if like is not None and like.sharding != sharding:
        return jax.device_put(_whole(leaf), like.sharding)  # type: ignore[no-any-return]
    if sharding is None:
        raise ConfigError(
            "the captured arrays were sharded, but a file does not say how: give restore_state(captured, like=...)"
        )
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf.pieces[_place(index)].copy())


def _whole(leaf: _Placed) -> NDArray[Any]:
    if sum(piece.size for piece in leaf.pieces.values()) < math.prod(leaf.shape):
        raise ConfigError(
            f"this process holds only a part of an array of shape {leaf.shape}: restore it with the sharding that "
            "it was captured with"
        )
    whole = np.empty(leaf.shape, next(iter(leaf.pieces.values())).dtype)
    for place, piece in leaf.pieces.items():
        whole[tuple(slice(*bounds) for bounds in place)] = piece
    return whole


def _place(index: tuple[slice, ...] | None) -> tuple[tuple[Any, ...], ...]:
    return tuple((part.start, part.stop, part.step) for part in index or ())
