"""R8Scheduler in a JAX loop: state that no later step changes, a learning rate that never retraces.

    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=0.0)
    for batch in scheduler.batch_iterator():
        opt_state = with_lr(opt_state, batch.lr)
        params, opt_state, losses = step(params, opt_state, x[batch.indices], y[batch.indices])
        scheduler.update_with_loss(losses)

A rollback replaces the variables of the loop, so they belong in something that a function can write to:

    def restore(source):
        nonlocal params, opt_state
        params, opt_state = restore_state(source)

    R8Scheduler(..., state_callback=lambda: capture_state((params, opt_state)), load_callback=restore)

Keep the batch size constant (`drop_last=True`), or the last batch of an epoch is compiled once more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from learnit_r8.errors import ConfigError

__all__ = ["capture_state", "restore_state", "with_lr"]

_RATE = "learning_rate"


class _Key(NamedTuple):
    """A typed PRNG key as plain numbers."""

    implementation: str
    numbers: Any


def capture_state(state: Any) -> Any:
    """Return a pytree with numpy copies of its arrays; the arrays may be donated or deleted afterwards.

    On a CPU `jax.device_get` returns views of JAX's own memory, which a donated buffer is written
    to; so everything is copied. Numpy arrays, unlike JAX's, are checked for NaN by the backups.

    Args:
        state: Any pytree: parameters, optimizer state, PRNG keys, numbers.
    """
    return jax.tree.map(_to_numpy, state)


def restore_state(captured: Any, like: Any = None) -> Any:
    """Return what `capture_state` was given, in new memory; `captured` can be used again.

    Args:
        captured: The captured pytree.
        like: A pytree of the same structure whose arrays say where the new ones go (devices and
            sharding); by default to the default device.
    """
    if like is None:
        return jax.tree.map(_to_jax, captured, is_leaf=_is_key)
    return jax.tree.map(_to_jax, captured, like, is_leaf=_is_key)


def with_lr(opt_state: Any, lr: float) -> Any:
    """Return an optimizer state with another learning rate; jitted functions are not traced again.

    Args:
        opt_state: State of an optimizer made by `optax.inject_hyperparams`, which may be part of a
            chain. Where it has several learning rates, all are set.
        lr: Learning rate of the next update.

    Raises:
        ConfigError: The state holds no learning rate.
    """
    new, found = _replaced(opt_state, lr)
    if not found:
        raise ConfigError(
            [
                f"the optimizer state holds no {_RATE!r}, got {type(opt_state).__name__}: make the optimizer with "
                "optax.inject_hyperparams(optax.adam)(learning_rate=0.0)"
            ]
        )
    return new


def _to_numpy(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array):
        return np.array(leaf) if isinstance(leaf, np.ndarray) else leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return _Key(str(jax.random.key_impl(leaf)), np.array(jax.random.key_data(leaf)))
    return np.array(leaf)


def _to_jax(leaf: Any, like: Any = None) -> Any:
    if _is_key(leaf):
        return jax.random.wrap_key_data(jnp.array(leaf.numbers), impl=leaf.implementation)
    if not isinstance(leaf, np.ndarray):
        return leaf
    # Both calls may use a numpy array's own memory: it is copied first.
    if isinstance(like, jax.Array):
        return jax.device_put(leaf.copy(), like.sharding)
    return jnp.asarray(leaf.copy())


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, _Key)


def _replaced(state: Any, lr: float) -> tuple[Any, bool]:
    """Return a state with its learning rates replaced, and whether there was any."""
    hyperparams = getattr(state, "hyperparams", None)
    if isinstance(hyperparams, dict) and _RATE in hyperparams:
        # A Python float would be weakly typed, which is another signature for jit.
        dtype = getattr(hyperparams[_RATE], "dtype", jnp.float32)
        return state._replace(hyperparams={**hyperparams, _RATE: jnp.asarray(lr, dtype)}), True
    if isinstance(state, dict):
        parts = {key: _replaced(value, lr) for key, value in state.items()}
        return {key: part for key, (part, _) in parts.items()}, any(found for _, found in parts.values())
    if isinstance(state, tuple):
        items = [_replaced(value, lr) for value in state]
        new = [part for part, _ in items]
        rebuilt = type(state)(*new) if hasattr(state, "_fields") else tuple(new)
        return rebuilt, any(found for _, found in items)
    return state, False
