"""JAX and optax on scikit-learn's digits, with backups that a rollback can go back to.

python -m pip install "learnit_r8[jax,example]" && python examples/jax_digits.py
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

from learnit_r8 import R8Scheduler
from learnit_r8.integrations.jax import capture_state, restore_state, with_lr

optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=0.0)


def logits(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


@jax.jit
def step(params: Any, opt_state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any, jax.Array]:
    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)
        return losses.mean(), losses

    gradient, losses = jax.grad(loss, has_aux=True)(params)
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, losses


def main() -> None:
    digits = load_digits()
    x, y = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)
    key1, key2 = jax.random.split(jax.random.key(0))
    params = {
        "w1": jax.random.normal(key1, (64, 128)) / 8,
        "b1": jnp.zeros(128),
        "w2": jax.random.normal(key2, (128, 10)) / 11,
        "b2": jnp.zeros(10),
    }
    opt_state = optimizer.init(params)

    def restore(source: Any) -> None:
        nonlocal params, opt_state
        params, opt_state = restore_state(source)

    with R8Scheduler(
        1500,
        32,
        num_epochs=5,
        initial_lr=3e-3,
        drop_last=True,
        ui="off",
        state_callback=lambda: capture_state((params, opt_state)),
        load_callback=restore,
    ) as scheduler:
        for _ in scheduler.epoch_iterator():
            for indices, lr in scheduler.batch_iterator():
                params, opt_state, losses = step(params, with_lr(opt_state, lr), x[indices], y[indices])
                scheduler.update_with_loss(losses)
    accuracy = (logits(params, x[1500:]).argmax(1) == y[1500:]).mean()
    print(f"accuracy {accuracy:.3f} after {scheduler.global_step} steps")
    print("most suspicious training images:", scheduler.catalog.suspects(5).tolist())


if __name__ == "__main__":
    main()
