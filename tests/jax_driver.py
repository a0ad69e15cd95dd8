"""JAX over several devices, run by test_integration_jax.py: jax_driver.py FOLDER SCENARIO [PROCESS PORT]"""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from learnit_r8 import ConfigError, R8Scheduler
from learnit_r8.integrations.jax import all_gather, capture_state, local_part, rank_arguments, restore_state, with_lr
from learnit_r8.stability.tree_copy import CopyPlan

OPTIONS = {"num_epochs": 4, "checkpoint_dir": None, "ui": "off", "drop_last": True, "backup_every": 5}


def alike(one: Any, other: Any) -> bool:
    def same(a: Any, b: Any) -> bool:
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        return bool((a == b).all()) and a.sharding == b.sharding and a.committed == b.committed and a.dtype == b.dtype

    return all(jax.tree.leaves(jax.tree.map(same, one, other)))


def shards() -> dict:
    """One process, four devices."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))

    def put(array: Any, *spec: Any) -> Any:
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

    params = {"w": put(jnp.arange(8.0).reshape(2, 4), None, "model"), "b": put(jnp.ones(4, jnp.bfloat16))}
    optimizer = optax.adam(1e-2)
    key = jax.random.key(1)
    state = (params, optimizer.init(params), key, jax.device_put(jnp.ones(3), jax.devices()[2]), put(key), jnp.ones(2))
    captured = capture_state(state)
    copy = CopyPlan(captured).fill()
    other = jax.tree.map(lambda a: a, state)
    results = {
        "plain": alike(restore_state(captured), state),
        "like": alike(restore_state(captured, other), state),
        "copied": alike(restore_state(copy.tree), state),
        "again": alike(restore_state(copy.tree), state),
        "elsewhere": restore_state(captured[0], {"w": put(params["w"], "model"), "b": params["b"]})["w"].sharding.spec
        == PartitionSpec("model"),
        "scanned": len(copy.arrays) >= 8 and not copy.nonfinite(),
        "nan": sorted(CopyPlan(capture_state({"w": params["w"] * jnp.nan})).fill().nonfinite())[:1] != [],
    }
    read = pickle.loads(pickle.dumps(captured))
    try:
        restore_state(read)
        results["file"] = "restored"
    except ConfigError as error:
        results["file"] = str(error)
    results["file with like"] = alike(restore_state(read, state), state)
    return results


def loop(folder: Path, process: int) -> dict:
    """Two processes of four devices each; NaN on one rolls both back."""
    ranks = rank_arguments()
    gathered = all_gather(np.arange(3 + process, dtype=np.float64) + 0.1).tolist()
    mesh = Mesh(np.array(jax.devices()), ("data",))
    sharded, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    rng = np.random.default_rng(0)
    x = rng.normal(size=(320, 8)).astype(np.float32)
    y = np.sign(x.sum(axis=1))
    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=0.0)
    params = jax.make_array_from_process_local_data(whole, np.zeros(8, np.float32))
    state = {"params": params, "opt": jax.jit(optimizer.init, out_shardings=whole)(params)}

    @jax.jit
    def step(params: Any, opt: Any, a: Any, b: Any) -> Any:
        def loss(p: Any) -> Any:
            losses = jnp.logaddexp(0, -b * (a @ p))
            return losses.mean(), losses

        gradient, losses = jax.grad(loss, has_aux=True)(params)
        updates, opt = optimizer.update(gradient, opt, params)
        return optax.apply_updates(params, updates), opt, losses

    def restore(source: Any) -> None:
        state.update(restore_state(source))

    callbacks = {"state_callback": lambda: capture_state(state), "load_callback": restore}
    scheduler = R8Scheduler(320, 32, initial_lr=0.05, **OPTIONS, **callbacks, **ranks)
    rolled_back, told = [], np.zeros(320)
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            a, b = (jax.make_array_from_process_local_data(sharded, part[batch.indices]) for part in (x, y))
            opt = with_lr(state["opt"], batch.lr)
            state["params"], state["opt"], losses = step(state["params"], opt, a, b)
            if batch.step == 23:
                state["params"] = state["params"] * jnp.nan
            mine = local_part(losses) * (np.nan if batch.step == 23 and process == 1 else 1)
            if scheduler.update_with_loss(mine).rolled_back:
                rolled_back.append(batch.step)
            else:
                told[all_gather(batch.indices)] += all_gather(np.asarray(mine, np.float64))
    weights = np.array(state["params"].addressable_shards[0].data).tolist()
    apart = float(
        np.abs(scheduler.catalog.mean_loss * scheduler.catalog.uses - told)[scheduler.catalog.uses == 4].max()
    )
    return {
        "gathered": gathered,
        "rolled_back": rolled_back,
        "steps": scheduler.global_step,
        "weights": weights,
        "losses_apart": apart,
    }


def main() -> None:
    folder, scenario = Path(sys.argv[1]), sys.argv[2]
    process = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    if scenario == "loop":
        jax.distributed.initialize(f"127.0.0.1:{sys.argv[4]}", 2, process)
    result = shards() if scenario == "shards" else loop(folder, process)
    (folder / f"{scenario}-{process}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
