"""The prioritized buffer against its formulas, a naive ring, and interrupted copies of itself."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from learnit_r8.errors import CheckpointError, ConfigError
from learnit_r8.replay import NStep, PrioritizedReplayBuffer


def filled(capacity=8, errors=(1.0, 2.0, 4.0, 1.0), **options):
    buffer = PrioritizedReplayBuffer(capacity, **options)
    buffer.extend(range(len(errors)))
    buffer.update_priorities(np.arange(len(errors)), errors)
    return buffer


def test_probabilities_and_weights_are_the_published_formulas():
    errors = np.array([0.5, -2.0, 0.0, 1.0, 3.0])
    buffer = filled(errors=errors, alpha=0.7, beta=0.5, eps=0.01)
    p = (np.abs(errors) + 0.01) ** 0.7
    np.testing.assert_allclose(buffer.priorities, p, rtol=1e-14)
    experiences, weights, indices = buffer.sample(64)
    assert experiences == indices.tolist()
    assert (weights.dtype, indices.dtype) == (np.float32, np.int64)
    raw = (5 * p[indices] / p.sum()) ** -0.5
    np.testing.assert_allclose(weights, raw / raw.max(), rtol=1e-6)
    for normalize, scale in (("mean", raw.mean()), (None, 1.0)):
        same = filled(errors=errors, alpha=0.7, beta=0.5, eps=0.01, normalize=normalize)
        np.testing.assert_allclose(same.sample(64)[1], raw / scale, rtol=1e-6)


@pytest.mark.parametrize("fast", [False, True])
def test_draws_match_the_priorities_after_a_million_updates_with_duplicates_and_wrap_around(fast):
    rng = np.random.default_rng(5)
    capacity, batch = 2000, 1000
    buffer = PrioritizedReplayBuffer(capacity, storage="arrays", fast=fast, seed=9)
    errors = np.zeros(capacity)
    added = 0
    for _ in range(1000):
        fresh, known = rng.integers(1, 30), rng.pareto(2.0, 30)
        buffer.extend({"x": np.arange(added, added + fresh)}, known[:fresh], stacked=True)
        errors[np.arange(added, added + fresh) % capacity] = known[:fresh]
        added += fresh
        slots, values = rng.integers(0, len(buffer), batch), rng.normal(0.0, 3.0, batch)
        assert buffer.update_priorities(slots, values) == batch
        errors[slots] = np.abs(values)
    p = (errors + 1e-6) ** 0.6
    np.testing.assert_allclose(buffer.priorities, p, rtol=1e-12)
    assert abs(buffer._tree.total / math.fsum(p) - 1.0) < 1e-9
    counts = np.zeros(capacity)
    for _ in range(1000):
        experiences, _, indices = buffer.sample(1000)
        counts += np.bincount(indices, minlength=capacity)
        np.testing.assert_array_equal(experiences["x"] % capacity, indices)
    # Stratified draws vary less than independent ones, so only the lower tail accuses.
    assert stats.chisquare(counts, 1e6 * p / p.sum()).pvalue > 1e-3


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.lists(st.integers(1, 15), min_size=1, max_size=8))
def test_the_ring_keeps_the_last_experiences_in_their_slots(capacity, parts):
    objects = PrioritizedReplayBuffer(capacity)
    arrays = PrioritizedReplayBuffer(capacity, storage="arrays")
    added = 0
    for part in parts:
        objects.extend(range(added, added + part))
        arrays.extend(np.arange(added, added + part), stacked=True)
        added += part
        held = {k % capacity: k for k in range(max(0, added - capacity), added)}
        assert (len(objects), objects.added) == (len(held), added)
        experiences, _, indices = objects.sample(20)
        assert experiences == [held[slot] for slot in indices.tolist()]
        np.testing.assert_array_equal(arrays.sample(20)[0], experiences)


def test_new_experiences_get_the_largest_priority_and_an_outlier_is_forgotten_after_a_lap():
    buffer = filled(4, (1.0, 2.0, 50.0, 1.0), alpha=1.0, eps=0.0)
    buffer.add("new")
    assert buffer.priorities[0] == 50.0
    buffer.update_priorities(np.arange(4), np.full(4, 3.0))
    buffer.extend("abc", [3.0, 3.0, 3.0])
    buffer.add("after a lap")
    assert buffer.priorities.max() == 3.0


def test_an_update_for_an_overwritten_experience_is_skipped_under_wrap_around():
    buffer = filled(4, (1.0, 1.0, 1.0, 1.0), alpha=1.0, eps=0.0)
    _, _, indices = buffer.sample(40)
    assert set(indices.tolist()) == {0, 1, 2, 3}
    buffer.extend(["new 0", "new 1"])
    assert buffer.update_priorities([0, 1, 2, 3], [9.0, 9.0, 9.0, 9.0]) == 2
    np.testing.assert_array_equal(buffer.priorities, [1.0, 1.0, 9.0, 9.0])
    assert buffer.update_priorities([0], [5.0]) == 1, "the second answer is for the new one"
    buffer.sample(40)
    buffer.extend(range(9))
    assert buffer.update_priorities(np.arange(4), np.ones(4)) == 0, "twice round"


def test_with_as_of_batches_in_flight_at_once_are_told_apart():
    buffer = filled(4, (1.0, 1.0, 1.0, 1.0), alpha=1.0, eps=0.0)
    early = buffer.added
    buffer.sample(40)
    buffer.add("new 0")
    late = buffer.added
    buffer.sample(40)
    assert buffer.update_priorities([0, 1], [7.0, 7.0], as_of=early) == 1
    assert buffer.update_priorities([0, 1], [8.0, 8.0], as_of=late) == 2
    buffer.extend(range(8))
    assert buffer.update_priorities([0, 1, 2, 3], np.ones(4), as_of=late) == 0


def test_beta_anneals_linearly_with_calls_and_stays_without_steps():
    buffer = filled(beta=0.4, beta_end=1.0, beta_steps=3)
    seen = []
    for _ in range(5):
        seen.append(buffer.beta)
        buffer.sample(2)
    np.testing.assert_allclose(seen, [0.4, 0.6, 0.8, 1.0, 1.0])
    constant = filled(beta=0.4)
    constant.sample(2)
    assert constant.beta == 0.4
    np.testing.assert_array_equal(constant.sample(50, beta=0.0)[1], np.ones(50))


def test_a_batch_may_exceed_the_buffer_and_no_slot_that_was_never_filled_is_drawn():
    buffer = filled(1000, (1.0,))
    experiences, weights, indices = buffer.sample(64)
    assert experiences == [0] * 64
    assert set(indices.tolist()) == {0}
    np.testing.assert_array_equal(weights, np.ones(64))


@pytest.mark.parametrize("variant", ["proportional", "rank"])
@pytest.mark.parametrize("storage", ["objects", "arrays"])
def test_a_restored_buffer_goes_on_like_the_uninterrupted_one(variant, storage):
    def make(seed=3):
        return PrioritizedReplayBuffer(
            50, seed=seed, variant=variant, storage=storage, beta_steps=30, n_step=NStep(3), fast=False
        )

    def run(buffer, steps, trace):
        for step in steps:
            buffer.add((float(step), 0, 1.0, step + 1.0, step % 17 == 16))
            if len(buffer):
                experiences, weights, indices = buffer.sample(8)
                if storage == "arrays":
                    experiences = [leaf.tolist() for leaf in experiences]
                trace.append((experiences, weights.tolist(), indices.tolist()))
                if step % 3:
                    buffer.update_priorities(indices, np.sin(indices + step))
        return trace

    straight, first = make(), make()
    full = run(straight, range(120), [])
    head = run(first, range(70), [])
    second = make(seed=99)
    state = first.state_dict()
    run(first, range(70, 75), [])  # the state is a copy: this must not reach it
    second.load_state_dict(state)
    assert head + run(second, range(70, 120), []) == full
    assert json.dumps({k: v for k, v in state.items() if isinstance(v, (int, float))})


@pytest.mark.parametrize("options", [{"storage": "arrays"}, {"variant": "rank"}, {"capacity": 9}, {"n_step": NStep(2)}])
def test_a_state_of_another_kind_of_buffer_is_refused(options):
    state = filled(8).state_dict()
    other = PrioritizedReplayBuffer(**({"capacity": 8} | options))
    with pytest.raises(CheckpointError, match="state is of"):
        other.load_state_dict(state)
    assert len(other) == 0


def test_numpy_and_numba_give_the_same_run():
    runs = []
    for fast in (False, True):
        buffer = PrioritizedReplayBuffer(20_000, storage="arrays", fast=fast, seed=4)
        buffer.extend(np.arange(30_000), stacked=True)
        trace = []
        for step in range(30):
            values, weights, indices = buffer.sample(256)
            buffer.update_priorities(indices, np.cos(indices * (step + 1.0)))
            trace.append((values.tolist(), weights.tolist()))
        runs.append(trace)
    assert runs[0] == runs[1]


def test_rank_based_draws_follow_one_over_rank_whatever_the_scale():
    errors = 10.0 ** np.arange(10)
    buffer = filled(10, errors, variant="rank", alpha=1.0)
    np.testing.assert_allclose(buffer.priorities, 1.0 / np.arange(10, 0, -1))
    buffer.update_priorities([9], [5.0])
    assert buffer.priorities[9] == pytest.approx(1.0 / 10.0), "looked up in the last order: nine are larger"
    buffer.add("new")
    assert buffer.priorities[0] == 1.0


def test_ranks_stay_close_to_exact_ones_between_sorts():
    rng = np.random.default_rng(0)
    buffer = PrioritizedReplayBuffer(1000, variant="rank", alpha=1.0)
    buffer.extend(range(1000))
    errors = np.full(1000, 1.0)
    for _ in range(60):
        slots = rng.choice(1000, 50, replace=False)
        errors[slots] = rng.exponential(1.0, 50)
        buffer.update_priorities(slots, errors[slots])
    ranks = stats.rankdata(-errors, method="min")
    assert stats.spearmanr(ranks, 1.0 / buffer.priorities).statistic > 0.95


def test_tensors_stay_tensors_and_keep_their_dtype_through_a_state():
    def experience(k):
        return {"tokens": torch.full((3,), k), "logp": torch.tensor([k], dtype=torch.bfloat16), "reward": np.float32(k)}

    buffer = PrioritizedReplayBuffer(5, storage="arrays")
    buffer.extend([experience(k) for k in range(7)])
    restored = PrioritizedReplayBuffer(5, storage="arrays")
    restored.load_state_dict(buffer.state_dict())
    for source in (buffer, restored):
        batch, _, indices = source.sample(16)
        assert (batch["tokens"].dtype, batch["logp"].dtype) == (torch.int64, torch.bfloat16)
        assert batch["reward"].dtype == np.float32
        held = np.where(indices < 2, indices + 5, indices)
        np.testing.assert_array_equal(batch["tokens"][:, 0], held)
        source.update_priorities(torch.tensor(indices), torch.ones(16, 1, requires_grad=True))
    first = buffer.sample(4)[0]["tokens"]
    first += 100
    assert buffer.sample(64)[0]["tokens"].max() < 100, "a sample is a copy"


def test_memory_mapped_experiences_survive_without_being_copied_into_the_state(tmp_path):
    def make():
        return PrioritizedReplayBuffer(30, storage="arrays", path=tmp_path / "replay")

    buffer = make()
    buffer.extend((np.arange(40.0), np.arange(80).reshape(40, 2)), stacked=True)
    state = buffer.state_dict(experiences=False)
    expected = buffer.sample(32)
    del buffer
    reopened = make()
    reopened.load_state_dict(state)
    found = reopened.sample(32)
    for ours, theirs in zip((*found[0], *found[1:]), (*expected[0], *expected[1:]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert sorted(file.name for file in (tmp_path / "replay").iterdir()) == ["000.npy", "001.npy"]
    elsewhere = PrioritizedReplayBuffer(30, storage="arrays", path=tmp_path / "empty")
    with pytest.raises(CheckpointError, match="cannot open"):
        elsewhere.load_state_dict(state)
    with pytest.raises(CheckpointError, match="left in files"):
        PrioritizedReplayBuffer(30, storage="arrays").load_state_dict(state)


def test_n_step_returns_sum_discounted_rewards_and_end_with_the_episode():
    buffer = PrioritizedReplayBuffer(10, n_step=NStep(3, 0.5))
    for step in range(4):
        buffer.add((step, "a", 1.0 + step, step + 1, step == 3))
    held = buffer.state_dict()["experiences"]["experiences"]
    assert held == [
        (0, "a", 1.0 + 0.5 * 2.0 + 0.25 * 3.0, 3, False, 0.125),
        (1, "a", 2.0 + 0.5 * 3.0 + 0.25 * 4.0, 4, True, 0.125),
        (2, "a", 3.0 + 0.5 * 4.0, 4, True, 0.25),
        (3, "a", 4.0, 4, True, 0.5),
    ]
    buffer.add((10, "a", 1.0, 11, False))
    assert len(buffer) == 4
    buffer.end_episode()
    assert buffer.state_dict()["experiences"]["experiences"][4] == (10, "a", 1.0, 11, False, 0.5)
    named = NStep(2, 1.0, reward="r", next_state="s2", done="d")
    assert named.push({"s": 0, "r": 1.0, "s2": 1, "d": False}) == []
    assert named.push({"s": 1, "r": 2.0, "s2": 2, "d": False}) == [
        {"s": 0, "r": 3.0, "s2": 2, "d": False, "discount": 1.0}
    ]


def test_every_bad_argument_is_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        PrioritizedReplayBuffer(0, alpha=-1, beta=math.nan, beta_steps=0, eps="no", seed=-1, normalize="sum", path="x")
    assert [problem.split()[0] for problem in caught.value.problems] == [
        "capacity", "seed", "beta_steps", "alpha", "beta", "eps", "normalize", "path",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"n must be[\s\S]*gamma must be"):
        NStep(0, 2.0)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda b: b.update_priorities([0, 1], [1.0, math.nan]), ValueError, "finite, got nan at position 1"),
        (lambda b: b.update_priorities([0], [math.inf]), ValueError, "finite, got inf"),
        (lambda b: b.update_priorities([0, 1], [1.0]), ValueError, "2 experiences, 1 errors"),
        (lambda b: b.update_priorities([4], [1.0]), IndexError, r"0 \.\. 3, got 4"),
        (lambda b: b.update_priorities([-1], [1.0]), IndexError, "got -1"),
        (lambda b: b.update_priorities([0.0], [1.0]), IndexError, "integers"),
        (lambda b: b.add("x", priority=math.nan), ValueError, "finite"),
        (lambda b: b.extend("xy", [1.0]), ValueError, "one error per experience"),
        (lambda b: b.extend("xy", stacked=True), TypeError, "arrays"),
        (lambda b: b.sample(0), ValueError, "at least 1, got 0"),
        (lambda b: b.sample(2.0), ValueError, "got 2.0"),
        (lambda b: b.sample(2, beta=math.nan), ValueError, r"beta must be in 0 \.\. 10, got nan"),
        (lambda b: b.sample(2, beta=-1), ValueError, "got -1"),
        (lambda b: b.save("s3://bucket/replay"), ConfigError, "path must be a path of this machine"),
        (lambda b: b.load("s3://bucket/replay"), ConfigError, "got s3://bucket/replay"),
        (lambda b: PrioritizedReplayBuffer(4, storage="arrays", path="gs://b/x"), ConfigError, "got gs://b/x"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(call, error, words):
    buffer = filled()
    before = buffer.state_dict()
    with pytest.raises(error, match=words):
        call(buffer)
    after = buffer.state_dict()
    np.testing.assert_equal(after, before)


@pytest.mark.parametrize("variant", ["proportional", "rank"])
def test_the_largest_finite_errors_leave_everything_finite(variant):
    buffer = filled(4, (1e308, 0.0, 1.0, 1e200), alpha=3.0, variant=variant, normalize=None)
    buffer.add("new")
    _, weights, indices = buffer.sample(32)
    assert np.isfinite(buffer.priorities).all()
    assert np.isfinite(weights).all()
    assert set(indices.tolist()) >= {0, 3}


def test_sampling_from_an_empty_buffer_says_what_to_do():
    with pytest.raises(ValueError, match="add experiences first"):
        PrioritizedReplayBuffer(3).sample(1)


@pytest.mark.parametrize(
    ("experience", "words"),
    [
        ((np.zeros(3), 1.0), "leaf 0 must be like"),
        ((np.zeros(2), 1.0 + 2.0j), "leaf 1 must be like"),
        ({"a": np.zeros(2)}, "built like the first"),
        ((np.zeros(2), 1.0, 2.0), "built like the first"),
        ((np.zeros(2), torch.tensor(1.0)), "leaf 1 must be like"),
        ((np.zeros(2), object()), "Python objects"),
        ({1: np.zeros(2)}, "string keys"),
    ],
)
def test_an_experience_unlike_the_first_is_refused_and_changes_nothing(experience, words):
    buffer = PrioritizedReplayBuffer(4, storage="arrays")
    buffer.add((np.zeros(2), 1.0))
    with pytest.raises(ValueError, match=words):
        buffer.add(experience)
    with pytest.raises(ValueError, match=r"equal shapes|built alike|Python objects|string keys"):
        buffer.extend([(np.zeros(2), 1.0), experience])
    assert len(buffer) == 1
    buffer.sample(3)
