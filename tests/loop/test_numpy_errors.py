"""What the program makes of numpy's floating point errors changes nothing: `np.seterr(all="raise")`, `-W error`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from learnit_r8 import R8Scheduler, TrainingDiverged
from learnit_r8.loop.losses import read_losses
from learnit_r8.strategies import names

KINDS = {
    "plain": lambda losses: losses,
    "tiny": lambda losses: losses * 1e-40,
    "large": lambda losses: losses * 1e12,
    "beyond float32": lambda losses: np.where(losses > 10, 1e300, losses),
    "zero": lambda losses: losses * 0,
    "one number": lambda losses: float(losses.mean()),
}


def run(strategy: str, kind: str) -> list:
    seen, rng = [], np.random.default_rng(0)
    with R8Scheduler(
        120,
        16,
        num_epochs=5,
        ui="off",
        checkpoint_dir=None,
        strategy=strategy,
        noise_guard="cap",
        state_callback=lambda: {"weight": np.ones(3)},
        load_callback=lambda state: None,
    ) as scheduler:
        try:
            for _ in scheduler.epoch_iterator():
                for batch in scheduler.batch_iterator():
                    seen.append((batch.indices.tolist(), batch.weights.tolist(), batch.lr))
                    scheduler.update_with_loss(KINDS[kind](rng.lognormal(0, 3, len(batch.indices))))
            seen.append((scheduler.catalog.quadrants().tolist(), scheduler.catalog.confidence))
        except TrainingDiverged as error:  # losses beyond all bounds end a run
            seen.append(str(error)[:60])
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", names())
def test_a_run_is_the_same_where_numpys_errors_are_raised(strategy, kind):
    expected = run(strategy, kind)
    with np.errstate(all="raise"):
        assert run(strategy, kind) == expected


@pytest.mark.parametrize("size", [1, 3, 64, 65, 5000])
@pytest.mark.parametrize(
    "dtype",
    ["float16", "float32", "float64", "longdouble", "int8", "uint8", "int64", "uint64", "bfloat16", "float8_e4m3fn"],
)
def test_losses_of_every_kind_and_size_are_read(dtype, size):
    if dtype in ("bfloat16", "float8_e4m3fn"):
        losses = (torch.arange(size) % 7).float().requires_grad_().to(getattr(torch, dtype))
    else:
        losses = (np.arange(size) % 7).astype(dtype)
    with np.errstate(all="raise"):
        found = read_losses(losses, size)
    assert found.values.dtype == np.float32
    assert found.values.tolist() == (np.arange(size) % 7).tolist()
    assert found.mean == pytest.approx((np.arange(size) % 7).mean())
    assert found.finite


@pytest.mark.parametrize("size", [3, 65])
@pytest.mark.parametrize("value", [1e16, 1e38, 3e38, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_losses_beyond_all_bounds_are_not_finite_and_raise_nothing(dtype, value, size):
    losses = np.ones(size, dtype)
    losses[1] = value
    with np.errstate(all="raise"):
        assert not read_losses(losses, size).finite
