"""The sampler behind every weighted strategy, and its stand-alone faces."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learnit_r8.errors import ConfigError
from learnit_r8.strategies import AdaptiveBatchSampler, RewardWeightedSampler
from learnit_r8.strategies.weighting import MAX_WEIGHT, MixtureSampler
from learnit_r8.testing import check_resume


def again(state):
    """Return a sampler that goes on where the state was taken."""
    sampler = MixtureSampler(len(state["weights"]))
    sampler.load_state_dict(state)
    return sampler


def sampler_of(weights, *, seed=0, excluded=None):
    sampler = MixtureSampler(len(weights))
    sampler.restart(np.array(weights, float), np.random.default_rng(seed), excluded)
    return sampler


def true_inclusion(weights, size, share):
    """Mixture probabilities times the batch size, the ones above 1 set to 1 and the rest scaled."""
    weights = np.asarray(weights, float)
    mixed = (1 - share) * weights / weights.sum() + share / len(weights)
    inclusion = np.zeros(len(weights))
    certain = np.zeros(len(weights), bool)
    while True:
        inclusion[~certain] = (size - certain.sum()) * mixed[~certain] / mixed[~certain].sum()
        inclusion[certain] = 1
        if not (inclusion > 1).any():
            return inclusion
        certain |= inclusion > 1


@pytest.mark.parametrize("power", [0.0, 1.0, 4.0])
def test_samples_are_included_as_often_as_their_probabilities_say(power):
    rng = np.random.default_rng(5)
    weights = rng.lognormal(0, 1, 60) ** power
    expected = true_inclusion(weights, 12, 0.22)
    counts = np.zeros(60)
    batches = 6_000
    sampler = sampler_of(weights)
    for batch in range(batches):
        if batch % 5 == 0:
            sampler.restart(np.array(weights), rng)
        draw = sampler.draw(12)
        counts[draw.indices] += 1
        np.testing.assert_allclose(draw.probabilities * 12, expected[draw.indices], rtol=1e-9)
    np.testing.assert_array_equal(counts[expected > 1 - 1e-9], batches)
    below = expected < 1 - 1e-9
    z = (counts - batches * expected)[below] / np.sqrt(batches * expected * (1 - expected))[below]
    assert np.abs(z).max() < 5


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0, 1e12, allow_subnormal=False), min_size=1, max_size=40),
    st.integers(1, 50),
    st.integers(0, 2**32),
)
def test_any_weights_give_distinct_samples_and_bounded_weights(weights, size, seed):
    rng = np.random.default_rng(seed)
    excluded = rng.random(len(weights)) < 0.3
    excluded[0] = False
    sampler = sampler_of(weights, seed=seed, excluded=excluded)
    for _ in range(4):
        draw = sampler.draw(size)
        assert len(draw.indices) == len(set(draw.indices.tolist())) == min(size, (~excluded).sum())
        assert not excluded[draw.indices].any()
        assert (draw.weights > 0).all()
        assert draw.weights.max() <= MAX_WEIGHT
        changed = rng.integers(len(weights), size=5)
        sampler.set(changed, rng.lognormal(0, 8, 5))


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 200), st.integers(1, 64), st.integers(0, 2**32))
def test_importance_weights_make_the_mean_loss_exact_in_expectation(count, size, seed):
    # The mean over all offsets of the points is an integral; a fine grid of offsets comes close.
    rng = np.random.default_rng(seed)
    weights, losses = rng.lognormal(0, 2, count), rng.lognormal(0, 1, count)
    sampler = sampler_of(weights, seed=seed)
    means = []
    phases = max(1000, 8000 // size)  # a small batch has few points in each
    for phase in (np.arange(phases) + 0.5) / phases:
        sampler._phase = phase
        draw = sampler.draw(size)
        means.append((draw.weights * losses[draw.indices]).mean())
    assert np.mean(means) == pytest.approx(losses.mean(), rel=0.03)


def test_with_equal_weights_an_epoch_is_nearly_a_permutation():
    sampler = sampler_of(np.ones(10_000))
    counts = np.zeros(10_000)
    for _ in range(100):
        counts[sampler.draw(100).indices] += 1
    assert counts.max() <= 2
    assert (counts == 1).mean() > 0.5  # drawn with replacement: 0.37


def test_the_uniform_share_stays_between_a_fifth_and_a_quarter_however_weights_move():
    rng = np.random.default_rng(2)
    sampler = sampler_of(rng.random(500))
    for scale in (1.0, 1e-6, 1e6, 1e-3):
        for _ in range(100):
            ids = sampler.draw(20).indices
            sampler.set(ids, scale * rng.random(20))
            shares = sampler._tree.view
            share = sampler._floor * 500 / shares.sum()
            assert 0.2 - 1e-9 <= share <= 0.25 + 1e-9


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([10, 10, 10, 3, 60]), st.integers(0, 3)), max_size=40), st.integers(0, 3))
def test_what_is_drawn_ahead_is_what_is_drawn_one_by_one_however_reports_come(steps, heavy):
    rng = np.random.default_rng(4)
    sampler, waiting = sampler_of(np.append(rng.random(997), 900.0 * np.arange(heavy, heavy + 3))), []
    for size, reports in steps:
        alone = again(sampler.state_dict())  # it has nothing drawn ahead
        draw, expected = sampler.draw(size), alone.draw(size)
        np.testing.assert_array_equal(draw.indices, expected.indices)
        np.testing.assert_array_equal(draw.probabilities, expected.probabilities)
        np.testing.assert_array_equal(draw.weights, expected.weights)
        waiting.append(draw.indices)
        for ids in [waiting.pop(0) for _ in range(min(reports, len(waiting)))]:
            sampler.set(ids, rng.random(len(ids)))


def test_a_large_data_set_is_drawn_ahead_further_and_alike():
    rng = np.random.default_rng(5)
    sampler, drawn_from = sampler_of(rng.random(100_000)), []
    for _ in range(20):
        alone = again(sampler.state_dict())
        draw, expected = sampler.draw(256), alone.draw(256)
        np.testing.assert_array_equal(draw.indices, expected.indices)
        np.testing.assert_array_equal(draw.probabilities, expected.probabilities)
        drawn_from.append(len(sampler._behind))
        sampler.set(draw.indices, rng.random(256))
    assert drawn_from[:10] == [*range(8), 0, 1]


def test_a_sampler_restored_in_mid_epoch_draws_the_same():
    class Subject:
        def __init__(self):
            self.sampler = sampler_of(np.random.default_rng(1).random(300), excluded=np.arange(300) % 7 == 0)
            self.step = 0

        def state_dict(self):
            return {"sampler": self.sampler.state_dict(), "step": self.step}

        def load_state_dict(self, state):
            self.sampler = again(state["sampler"])
            self.step = state["step"]

    def advance(subject):
        draw = subject.sampler.draw(16)
        subject.step += 1
        subject.sampler.set(draw.indices, np.random.default_rng(subject.step).lognormal(0, 3, 16))
        return draw.indices, draw.probabilities

    check_resume(Subject, advance)


# Stand-alone faces --------------------------------------------------------------------------


def test_the_published_adaptive_program_runs():
    sampler = AdaptiveBatchSampler(dataset_size=1000, learning_rate=0.1)
    indices, importance_weights = sampler.sample(batch_size=32)
    sampler.update_weights(indices, np.random.default_rng(0).random(32))
    assert indices.shape == importance_weights.shape == (32,)
    assert indices.dtype == np.int64
    assert importance_weights.dtype == np.float32


def test_adaptive_weights_follow_the_formula_without_touching_other_samples():
    sampler = AdaptiveBatchSampler(6, learning_rate=0.5, momentum=0.8)
    losses = np.array([1.0, 2.0, 6.0])
    sampler.update_weights([1, 3, 5], torch.tensor(losses, dtype=torch.bfloat16, requires_grad=True))
    boost = np.exp(0.5 * (losses - losses.mean()) / losses.std())
    expected = np.ones(6)
    expected[[1, 3, 5]] = 0.8 + 0.2 * boost
    np.testing.assert_allclose(sampler.weights, expected / expected.sum(), rtol=1e-12)


@pytest.mark.parametrize(
    ("indices", "losses", "complaint"),
    [
        ([0, 1], [1.0], "one loss per index"),
        ([-1], [1.0], "0 .. 5"),
        ([6], [1.0], "0 .. 5"),
        ([0], [float("nan")], "finite"),
        ([0], [float("inf")], "finite"),
    ],
)
def test_a_bad_adaptive_update_changes_nothing(indices, losses, complaint):
    sampler = AdaptiveBatchSampler(6)
    before = sampler.weights.copy()
    with pytest.raises(ValueError, match=complaint):
        sampler.update_weights(indices, losses)
    np.testing.assert_array_equal(sampler.weights, before)


def test_a_hard_sample_is_drawn_more_and_weighs_less():
    sampler = AdaptiveBatchSampler(50, learning_rate=1.0, momentum=0.5)
    losses = np.ones(50)
    losses[3] = 10
    for _ in range(4):
        sampler.update_weights(np.arange(50), losses)
    counts, weight = np.zeros(50), {}
    for _ in range(500):
        ids, weights = sampler.sample(5)
        counts[ids] += 1
        weight.update(zip(ids.tolist(), weights.tolist(), strict=True))
    assert counts[3] == counts.max() > 2 * np.median(counts)
    assert weight[3] == min(weight.values())


def test_reward_weights_follow_the_formula():
    rewards = np.array([0.0, 1.0, 4.0])
    expected = np.exp(np.array([0, 0.25, 1]) / 0.5)
    np.testing.assert_allclose(RewardWeightedSampler(rewards, 0.5).weights, expected / expected.sum())
    ranked = np.exp(np.array([0, 0.5, 1]) / 0.5)
    np.testing.assert_allclose(RewardWeightedSampler(rewards, 0.5, use_rank=True).weights, ranked / ranked.sum())


@pytest.mark.parametrize("rewards", [[3.0], [2.0, 2.0, 2.0], [-1e308, 1e308], [0, 1, 5], torch.tensor([1.0, 2.0])])
@pytest.mark.parametrize("use_rank", [False, True])
@pytest.mark.parametrize("temperature", [1e-300, 1.0, 1e300])
def test_any_finite_rewards_give_finite_draws(rewards, use_rank, temperature):
    sampler = RewardWeightedSampler(rewards, temperature, use_rank)
    ids, weights = sampler.sample(2)
    assert len(ids) == min(2, len(rewards))
    assert np.isfinite(weights).all()
    assert weights.max() <= MAX_WEIGHT


@pytest.mark.parametrize("rewards", [[], [[1.0]], [1.0, float("nan")], [float("inf")]])
def test_bad_rewards_are_refused(rewards):
    with pytest.raises(ConfigError, match="rewards must be"):
        RewardWeightedSampler(rewards)


@pytest.mark.parametrize(
    "make",
    [lambda: AdaptiveBatchSampler(40, seed=3), lambda: RewardWeightedSampler(np.arange(40.0))],
    ids=["adaptive", "reward"],
)
def test_a_stand_alone_sampler_is_resumable_and_leaves_global_randomness_alone(make):
    def advance(sampler):
        ids, weights = sampler.sample(7)
        if isinstance(sampler, AdaptiveBatchSampler):
            sampler.update_weights(ids, np.sin(ids) + 1)
        return ids, weights

    states = global_randomness()
    check_resume(make, advance)
    assert states == global_randomness()


@pytest.mark.parametrize("call", [{}, {"n": 0}, {"n": 2, "batch_size": 2}])
def test_sample_says_what_it_needs(call):
    with pytest.raises(ConfigError, match="needs n >= 1"):
        AdaptiveBatchSampler(5).sample(**call)


def global_randomness():
    legacy = np.random.get_state()[1]  # noqa: NPY002 - that is the state to leave alone
    return random.getstate(), legacy.tolist(), torch.random.get_rng_state().tolist()


@pytest.mark.parametrize("ids", [[0.5, 1.7], ["1", "2"], np.ones(2, bool), [None, 1]])
def test_ids_that_are_no_integers_are_refused(ids):
    sampler = AdaptiveBatchSampler(10)
    before = sampler.state_dict()["sampler"]["weights"]
    with pytest.raises(ValueError, match="indices must be integers, got dtype"):
        sampler.update_weights(ids, [1.0, 2.0])
    np.testing.assert_array_equal(sampler.state_dict()["sampler"]["weights"], before)


@pytest.mark.parametrize("n", [0, -1, 2.5, "3", None, True, float("nan")])
def test_a_batch_size_that_is_no_whole_number_is_refused(n):
    with pytest.raises(ConfigError, match="sample needs n >= 1"):
        AdaptiveBatchSampler(10).sample(n)


def test_without_a_defensive_share_draws_follow_the_stated_probabilities():
    rewards = np.r_[np.ones(200), np.zeros(800)]
    for temperature in (1 / np.log(4), 0.5, 0.1):
        sampler = RewardWeightedSampler(rewards, temperature, defensive=0.0)
        p = np.exp(rewards / temperature) / np.exp(rewards / temperature).sum()
        drawn, weights = map(np.concatenate, zip(*(sampler.sample(20) for _ in range(3000)), strict=True))
        assert (drawn < 200).mean() == pytest.approx(p[:200].sum(), abs=0.01)
        np.testing.assert_allclose(weights, 1 / (1000 * p[drawn]), rtol=1e-5)
    greedy = RewardWeightedSampler(rewards, 1e-4, defensive=0)
    assert max(greedy.sample(150)[0]) < 200
    with pytest.raises(ConfigError, match="n <= 200 with defensive=0"):
        greedy.sample(300)
    assert len(greedy.sample(1000)[0]) == 1000
    restored = RewardWeightedSampler(rewards, 1e-4, defensive=0)
    restored.load_state_dict(greedy.state_dict())
    assert [restored.sample(9)[0].tolist() for _ in range(30)] == [greedy.sample(9)[0].tolist() for _ in range(30)]
    with pytest.raises(ValueError, match="defensive=0"):
        RewardWeightedSampler(rewards).load_state_dict(greedy.state_dict())
    with pytest.raises(ConfigError, match="defensive"):
        RewardWeightedSampler(rewards, defensive=1.0)
