"""Quadrant's option that steers each batch toward the data set's mean loss."""

import numpy as np

from learnit_r8 import R8Scheduler
from learnit_r8.strategies import Quadrant


def deviations(strategy):
    losses = np.random.default_rng(1).lognormal(sigma=1.5, size=2000).astype(np.float32)
    scheduler = R8Scheduler(2000, 32, num_epochs=3, strategy=strategy, ui="off", checkpoint_dir=None)
    found = []
    for epoch in scheduler.epoch_iterator():
        drawn = []
        for indices, _ in scheduler.batch_iterator():
            scheduler.update_with_loss(losses[indices])
            drawn.append(indices)
            if epoch:
                found.append(abs(losses[indices].mean() / losses.mean() - 1))
        assert sorted(np.concatenate(drawn)) == list(range(2000))
    return np.array(found)


def test_most_batches_come_within_a_tenth_of_the_mean_loss():
    assert np.mean(deviations(Quadrant(target_loss=True)) <= 0.1) > 0.75
    assert np.mean(deviations("quadrant") <= 0.1) < 0.35


def test_every_batch_still_takes_a_quarter_from_each_quadrant():
    losses = np.random.default_rng(2).lognormal(size=403).astype(np.float32)
    scheduler = R8Scheduler(403, 30, num_epochs=2, strategy=Quadrant(target_loss=True), ui="off", checkpoint_dir=None)
    for epoch in scheduler.epoch_iterator():
        quadrants = scheduler.catalog.quadrants()
        for indices, _ in scheduler.batch_iterator():
            if epoch:
                shares = np.bincount(quadrants[indices], minlength=4)
                assert np.all(np.abs(shares - len(indices) / 4) <= 1)
            scheduler.update_with_loss(losses[indices])
