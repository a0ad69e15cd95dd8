"""R8Scheduler in a JAX loop: no retracing, backups that no step changes, runs that resume to the bit."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from learnit_r8 import R8Scheduler, TrainingDiverged
from learnit_r8.errors import ConfigError
from learnit_r8.stability.changes import relative_changes
from learnit_r8.stability.tree_copy import CopyPlan
from tests.backup_watch import BackupWatch, always, check_diverged, check_survival, fingerprint, never, random_steps

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

from learnit_r8.integrations.jax import capture_state, clip_gradients, restore_state, with_lr  # noqa: E402

SAMPLES, BATCH = 128, 16


def scheduler_for(**options) -> R8Scheduler:
    return R8Scheduler(SAMPLES, BATCH, initial_lr=0.02, checkpoint_dir=None, ui="off", **options)


class Run:
    """A small network with dropout, whose step donates its buffers."""

    def __init__(self, faults=never, epochs: int = 3) -> None:
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
        self.traces, self.seen = 0, []
        self.step = jax.jit(self._step, donate_argnums=0)
        self.watch = BackupWatch(faults, scheduler_for, num_epochs=epochs)
        self.scheduler = self.watch.scheduler
        self.scheduler.attach_model(lambda: capture_state(self.state), self.restore)

    def restore(self, source) -> None:
        self.state = restore_state(source, self.state)

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
                x = self.x[batch.indices] * np.float32(self.watch.factor())
                opt_state = with_lr(opt_state, batch.lr)
                self.state, losses = self.step((params, opt_state, key), x, self.y[batch.indices])
                self.seen.append(batch.indices.tolist())
                self.scheduler.update_with_loss(losses)
                if self.scheduler.global_step == stop_at:
                    return


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
    assert fingerprint(capture_state(second.state)) == fingerprint(capture_state(whole.state))


@pytest.mark.parametrize("seed", range(3))
def test_nan_at_random_steps_ends_finite_and_rollbacks_bring_back_the_backup(seed):
    run = Run(random_steps(seed), epochs=25)
    run.go()
    check_survival(run.watch.findings())


def test_more_nan_than_backups_can_undo_ends_in_an_error_that_names_samples():
    run = Run(always, epochs=5)
    with pytest.raises(TrainingDiverged) as caught:
        run.go()
    check_diverged(str(caught.value))


def test_a_captured_state_is_not_changed_by_steps_that_donate_their_buffers():
    run = Run()
    captured = capture_state(run.state)
    before = fingerprint(captured)
    run.go()
    assert fingerprint(captured) == before != fingerprint(capture_state(run.state))


def test_captured_bfloat16_weights_with_nan_are_not_used_as_a_backup():
    from learnit_r8.stability.backups import BackupRing

    ring = BackupRing()
    ring.take(capture_state({"w": jnp.ones(4, jnp.bfloat16)}), 0)
    ring.take(capture_state({"w": jnp.full(4, jnp.nan, jnp.bfloat16)}), 1)
    for step in range(1, 20):
        ring.healthy(step)
    assert [info.step for info in ring.backups] == [0]


def run_driver(folder, *arguments: str) -> list:
    """Run tests/jax_driver.py, one process for each of the arguments' last part."""
    driver = Path(__file__).parents[1].joinpath("jax_driver.py")
    environment = {"PYTHONPATH": str(driver.parent.parent), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(driver), str(folder), *line.split()], env=environment, stderr=-1, text=True
        )
        for line in arguments
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(errors)
    return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]


def test_sharded_arrays_come_back_as_they_were_sharded(tmp_path):
    (found,) = run_driver(tmp_path, "shards")
    assert "a file does not say how" in found.pop("file")
    assert found == dict.fromkeys(found, True)
    assert len(found) == 8


def test_two_processes_train_one_run_and_one_ones_nan_rolls_both_back(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one, other = run_driver(tmp_path, f"loop 0 {port}", f"loop 1 {port}")
    assert one == other
    assert one["gathered"] == [0.1, 1.1, 2.1, 0.1, 1.1, 2.1, 3.1]
    assert one["rolled_back"] == [23]
    assert one["steps"] == 40
    assert one["losses_apart"] < 1e-5
    assert np.isfinite(one["weights"]).all()
    assert np.min(one["weights"]) > 0.1


def test_the_moments_of_optax_are_told_from_weights_by_their_names():
    params, moments, _ = Run().state
    moments = jax.tree.map(lambda leaf: leaf + 1.0 if leaf.ndim else leaf, moments)
    before = CopyPlan(capture_state((params, moments))).fill()
    after = CopyPlan(capture_state((params, jax.tree.map(lambda leaf: leaf * 50, moments)))).fill()
    assert any("/nu/" in path for path in before.paths)
    assert set(relative_changes(after, before)) == {"/0/w"}  # a weight that is called v is taken for a moment, too


def test_gradients_are_clipped_by_optax_within_a_step_that_is_compiled_once():
    step, given = jax.jit(clip_gradients), {"a": jnp.array([3.0, 4.0])}
    for norm in (float("inf"), 1.0, 5.5):
        clipped, before = step(given, norm)
        assert float(before) == 5.0
        np.testing.assert_allclose(clipped["a"], given["a"] * min(1.0, norm / 5.0), rtol=1e-6)
    assert step._cache_size() == 1
