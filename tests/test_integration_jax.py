"""R8Scheduler in a JAX loop: no retracing, backups that no step changes, runs that resume to the bit."""

from __future__ import annotations

import numpy as np
import pytest

from learnit_r8 import R8Scheduler
from learnit_r8.errors import ConfigError
from learnit_r8.events import RolledBack

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

from learnit_r8.integrations.jax import capture_state, restore_state, with_lr  # noqa: E402

SAMPLES, BATCH = 128, 16


class Listener:
    def __init__(self) -> None:
        self.events = []

    def record(self, event) -> None:
        self.events.append(event)


class Run:
    """A small network with dropout, whose step donates its buffers."""

    def __init__(self, nan_at=(), epochs: int = 3, **options) -> None:
        rng = np.random.default_rng(0)
        self.x = rng.normal(size=(SAMPLES, 6)).astype(np.float32)
        self.y = (self.x[:, 0] + self.x[:, 1] ** 2 > 0.7).astype(np.float32)
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(1.0), optax.inject_hyperparams(optax.adam)(learning_rate=0.0)
        )
        params = {
            "w": jnp.asarray(rng.normal(0, 0.4, (6, 16)), jnp.float32),
            "v": jnp.asarray(rng.normal(0, 0.2, 16), jnp.float32),
        }
        self.state = (params, self.optimizer.init(params), jax.random.key(3))
        self.nan_at, self.traces, self.backups, self.restored, self.seen = set(nan_at), 0, [], [], []
        self.listener = Listener()
        self.step = jax.jit(self._step, donate_argnums=0)
        self.scheduler = R8Scheduler(
            SAMPLES,
            BATCH,
            num_epochs=epochs,
            initial_lr=0.02,
            checkpoint_dir=None,
            ui="off",
            backup_every=4,
            state_callback=self.capture,
            load_callback=self.restore,
            sinks=[self.listener],
            **options,
        )

    def capture(self):
        captured = capture_state(self.state)
        self.backups.append((self.scheduler.global_step, captured, fingerprint(captured)))
        return captured

    def restore(self, source) -> None:
        self.state = restore_state(source, self.state)
        self.restored.append(fingerprint(self.state))

    def _step(self, state, x, y):
        self.traces += 1
        params, opt_state, key = state
        key, use = jax.random.split(key)

        def loss(params):
            hidden = jnp.tanh(x @ params["w"]) * jax.random.bernoulli(use, 0.9, (len(x), 16))
            losses = optax.sigmoid_binary_cross_entropy(hidden @ params["v"], y)
            return losses.mean(), losses

        (_, losses), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = self.optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, key), losses

    def go(self, stop_at: int | None = None) -> None:
        for _ in self.scheduler.epoch_iterator():
            for batch in self.scheduler.batch_iterator():
                params, opt_state, key = self.state
                x = self.x[batch.indices]
                if batch.step in self.nan_at:
                    x = x * np.float32("nan")
                opt_state = with_lr(opt_state, batch.lr)
                self.state, losses = self.step((params, opt_state, key), x, self.y[batch.indices])
                self.seen.append(batch.indices.tolist())
                self.scheduler.update_with_loss(losses)
                if self.scheduler.global_step == stop_at:
                    return


def fingerprint(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(capture_state(tree)) if not isinstance(leaf, str)]


def test_the_learning_rate_changes_every_step_and_the_step_is_traced_once():
    run = Run()
    run.go()
    assert run.traces == 1
    assert run.scheduler.global_step == 3 * SAMPLES // BATCH


def test_a_learning_rate_is_set_in_every_part_of_a_chain_and_its_type_stays():
    optimizer = optax.chain(optax.clip(1.0), optax.inject_hyperparams(optax.sgd)(learning_rate=0.5))
    before = optimizer.init({"w": jnp.zeros(2)})
    after = with_lr(before, 0.25)
    assert float(after[1].hyperparams["learning_rate"]) == 0.25
    assert float(before[1].hyperparams["learning_rate"]) == 0.5
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert not after[1].hyperparams["learning_rate"].weak_type


def test_an_optimizer_without_a_learning_rate_is_named():
    with pytest.raises(ConfigError, match="inject_hyperparams"):
        with_lr(optax.sgd(0.1).init({"w": jnp.zeros(2)}), 0.1)


def test_a_resumed_run_equals_the_uninterrupted_one():
    whole, first, second = Run(), Run(), Run()
    whole.go()
    first.go(stop_at=11)
    second.scheduler.load_state_dict(first.scheduler.state_dict())
    second.state = restore_state(capture_state(first.state))
    second.go()
    assert first.seen + second.seen == whole.seen
    assert fingerprint(second.state) == fingerprint(whole.state)


@pytest.mark.parametrize("seed", range(3))
def test_nan_at_random_steps_ends_finite_and_rollbacks_bring_back_the_backup(seed):
    # Far enough apart that a backup is proved in between.
    faults = np.random.default_rng(seed).integers(20, 40, 4).cumsum().tolist()
    run = Run(nan_at=faults, epochs=25)
    run.go()
    assert len(run.restored) == 4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(capture_state(run.state)[:2]))
    taken = {step: print_ for step, _, print_ in run.backups}
    targets = [event.to_step for event in run.listener.events if isinstance(event, RolledBack)]
    assert run.restored == [taken[step] for step in targets]
    assert all(fingerprint(captured) == before for _, captured, before in run.backups)


def test_captured_bfloat16_weights_with_nan_are_not_used_as_a_backup():
    from learnit_r8.stability.backups import BackupRing

    ring = BackupRing()
    ring.take(capture_state({"w": jnp.ones(4, jnp.bfloat16)}), 0)
    ring.take(capture_state({"w": jnp.full(4, jnp.nan, jnp.bfloat16)}), 1)
    for step in range(1, 20):
        ring.healthy(step)
    assert [info.step for info in ring.backups] == [0]
