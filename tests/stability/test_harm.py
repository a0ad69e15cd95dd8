"""The safety net never makes a run worse: against the clean run, and against the run that only leaves NaN out."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from benchmarks import harm, harm_sound, harm_tasks

SEED, STEPS = 0, 300


@functools.cache
def clean(batch=None, epochs=None):
    length = STEPS if epochs is None else epochs * -(-harm_tasks.make("mlp", SEED).size // batch)
    return harm.train("mlp", SEED, length, net=False, batch=batch).score


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("kind", [kind for kind in harm.KINDS if kind != "50 garbage batches"])
def test_a_run_with_faults_ends_as_the_clean_one_and_no_worse_than_doing_less(kind, times):
    if kind.startswith("50") and times > 1:
        times = 1
    at = harm.steps_of(kind, times, near=False, length=STEPS, rng=np.random.default_rng([times, len(kind)]))
    faults = {"kind": kind, "at": [int(step) for step in at]}
    saved = harm.train("mlp", SEED, STEPS, net=True, **faults)
    less = harm.train("mlp", SEED, STEPS, net=False, **faults)
    assert saved.ended == "finished"
    assert saved.score > clean() - 0.025
    assert saved.score > less.score - 0.025


@pytest.mark.parametrize(("seed", "at"), [(0, 44), (0, 60), (0, 150), (1, 229)])
def test_what_fifty_batches_with_wrong_labels_destroyed_comes_back_from_the_best_backup(seed, at):
    faults = {"kind": "50 garbage batches", "at": [at]}
    assert harm.train("mlp", seed, STEPS, net=False, **faults).score < 0.6
    assert harm.train("mlp", seed, STEPS, net=True, **faults).score > 0.94


@pytest.mark.parametrize(
    ("name", "kind", "at"),
    [
        (
            "regression",
            "layer lost",
            [69, 133, 144, 152, 196, 252],
        ),  # losses of the fault before are still compared with
        ("mlp", "weights x 8", [15, 64, 133, 165, 279]),  # damage that shows in every third batch only
    ],
)
def test_damage_that_the_next_backup_finds_is_undone_though_single_losses_look_ordinary(name, kind, at):
    seed = 101  # not one that rules were made with
    saved = harm.train(name, seed, STEPS, net=True, kind=kind, at=at)
    assert saved.score > harm.train(name, seed, STEPS, net=False).score - 0.04


@pytest.mark.parametrize("at", [229, 234])
def test_wrong_labels_that_might_be_a_harder_task_are_left_alone_and_the_end_names_the_way_back(at):
    sound = harm.train("regression", SEED, STEPS, net=False).score
    saved = harm.train("regression", SEED, STEPS, net=True, kind="50 garbage batches", at=[at])
    assert saved.rollbacks == 0
    assert saved.score < 2 * sound  # a loss, negative: it is twice as high
    assert saved.advised is not None
    assert saved.advised > 1.05 * sound


def test_another_task_is_taken_for_a_loss_of_the_old_one_at_most_once():
    assert harm_sound.KINDS["another task"](0)["rollbacks"] <= 1


@pytest.mark.parametrize("batch", [8, 32, 128])
@pytest.mark.parametrize("count", harm.ROWS)
def test_rows_that_hold_nan_are_named_at_their_first_fault_and_cost_nothing_else(count, batch):
    size = harm_tasks.make("mlp", SEED).size
    rows = np.random.default_rng(count).choice(size, count, replace=False)
    saved = harm.train("mlp", SEED, 8 * -(-size // batch), net=True, rows=rows, batch=batch)
    assert saved.ended == "finished"
    assert saved.left_out == set(rows.tolist())
    assert max(saved.named_at.values()) < -(-size // batch)  # each is in one batch of the first epoch
    assert saved.score > clean(batch, 8) - 0.03


def test_the_same_run_under_three_clocks_is_the_same():
    faults = {"net": True, "kind": "weights x 60", "at": [60, 61, 200]}
    assert len({harm.train("mlp", SEED, STEPS, tick=tick, **faults).trace for tick in (1e-4, 1e-2, 1.0)}) == 1


def _left_alone(kind, seed):
    torch.manual_seed(seed)
    # A part of the state is overwritten or switched on by design.
    switched = (
        "fitted q", "auxiliary loss", "auxiliary loss adam", "augmentation switched on", "unfreezing", "another task",
    )  # fmt: skip
    assert harm_sound.KINDS[kind](seed)["rollbacks"] <= (kind in switched)


@pytest.mark.parametrize("kind", ["GAN, generator", "grpo kl", "fitted q", "auxiliary loss adam", "regression b1"])
def test_a_sound_training_whose_losses_look_odd_is_left_alone(kind):
    _left_alone(kind, 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", harm_sound.KINDS)
def test_all_sound_trainings_are_left_alone(kind):
    for seed in range(5):
        _left_alone(kind, seed)
