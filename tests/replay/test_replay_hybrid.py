"""The hybrid buffer against the published rules, item by item, and beyond them."""

import math
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from learnit_r8.errors import CheckpointError, ConfigError
from learnit_r8.replay import HybridSRLReplayBuffer


def reference_diversity(item, items, beta):
    centroid = np.mean([other["embedding"] for other in items], axis=0)
    distances = [np.linalg.norm(other["embedding"] - centroid) for other in items]
    return beta * item["variance"] + (1 - beta) * np.linalg.norm(item["embedding"] - centroid) / np.ptp(distances)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.integers(4, 12), st.floats(0.0, 1.0), st.floats(0.0, 3.0))
def test_schedule_and_diversity_follow_the_published_rules(seed, capacity, beta, alpha):
    rng = np.random.default_rng(seed)
    buffer = HybridSRLReplayBuffer(capacity, alpha=alpha, beta=beta, initial_interval=2.0)
    items = []
    for step in range(40):
        embedding, variance = rng.normal(3.0, 1.0, 5).astype(np.float32), float(rng.random())
        assert buffer.add(step, embedding, variance)
        items.append({"experience": step, "embedding": embedding.astype(float), "variance": variance})
        items[-1] |= {"interval": 2.0, "easiness": 2.0, "last_review": 0.0}
        items = items[-capacity:]
        if step < 3:
            continue
        due = [item for item in items if step >= item["last_review"] + item["interval"]]
        due = sorted(due, key=lambda item: (item["easiness"], item["last_review"] + item["interval"]))[:3]
        got = buffer.get_due_samples(step, 3)
        assert [item.experience for item in got] == [item["experience"] for item in due]
        scores = rng.uniform(0.7, 1.0, len(due))
        diversities = [reference_diversity(item, items, beta) for item in due]
        np.testing.assert_allclose([buffer.compute_diversity(item) for item in got], diversities, rtol=1e-3)
        buffer.update_after_replay(got, scores, step)
        for item, score, diversity in zip(due, scores, diversities, strict=True):
            if score >= 0.9:
                item["easiness"] = min(item["easiness"] + 0.1, 2.5)
                base = item["interval"] * 1.5 * (item["easiness"] - 1)
            else:
                item["easiness"], base = max(item["easiness"] - 0.2, 1.3), 1.0
            # The buffer's own value, so that rounding does not decide which step an item is due at.
            item["interval"] = float(buffer._columns["interval"][item["experience"] % capacity])
            assert item["interval"] == pytest.approx(base / (1 + alpha * diversity), rel=1e-3)
            item["last_review"] = float(step)


def test_equal_distances_have_no_diversity_and_nearly_equal_ones_stay_within_one():
    for count in (1, 2, 30):
        buffer = HybridSRLReplayBuffer(50, beta=0.0)
        for k in range(count):
            buffer.add(k, [1e6 + (k % 2), 5.0])
        np.testing.assert_array_equal(buffer.diversities(), np.zeros(count))
    ring = HybridSRLReplayBuffer(50, beta=0.0)
    for k in range(40):
        angle, radius = 2 * math.pi * k / 40, 1.0 + 1e-4 * (k % 4 == 0)
        ring.add(k, [radius * math.cos(angle), radius * math.sin(angle)])
    values = ring.diversities()
    assert values.min() == 0.0
    assert values.max() == 1.0


def test_distances_stay_exact_far_from_the_origin_after_many_replacements():
    rng = np.random.default_rng(1)
    buffer = HybridSRLReplayBuffer(64, beta=0.0)
    for k in range(1000):
        buffer.add(k, 1000.0 + rng.normal(size=16))
    held = buffer._spread.embeddings.astype(float)
    distances = np.linalg.norm(held - held.mean(axis=0), axis=1)
    np.testing.assert_allclose(buffer.diversities(), distances / np.ptp(distances), rtol=1e-3)


def test_due_selection_takes_the_hardest_and_among_equals_the_longest_due_and_then_the_oldest():
    rng = np.random.default_rng(2)
    buffer = HybridSRLReplayBuffer(500)
    for k in range(800):
        buffer.add(k, rng.normal(size=4))
    for step in range(1, 40):
        items = buffer.get_due_samples(step, 37)
        buffer.update_after_replay(items, rng.random(len(items)) + 0.3, step)
    columns = {name: column.copy() for name, column in buffer._columns.items()}
    due_at = columns["last_review"] + columns["interval"]
    order = np.lexsort((columns["serial"], due_at, columns["easiness"]))
    expected = [int(columns["serial"][slot]) for slot in order if due_at[slot] <= 40]
    for size in (1, 10, 100, 500):
        items = buffer.get_due_samples(40, size)
        assert [item.serial for item in items] == expected[:size]
        assert all(item["experience"] == item.serial for item in items)


def test_equally_hard_experiences_take_turns_though_all_are_due_at_every_step():
    buffer = HybridSRLReplayBuffer(100)
    for k in range(100):
        buffer.add(k, [float(k)])
    for step in range(1, 6):
        buffer.update_after_replay(buffer.get_due_samples(step, 100), np.zeros(100), step)
    turns = np.zeros(100)
    for step in range(6, 106):
        items = buffer.get_due_samples(step, 4)
        turns[[item.experience for item in items]] += 1
        buffer.update_after_replay(items, np.zeros(4), step)
    assert (turns == 4).all()


def test_an_item_that_was_dropped_is_skipped_and_one_given_twice_counts_twice():
    buffer = HybridSRLReplayBuffer(2, beta=0.0)
    buffer.add("a", [0.0])
    buffer.add("b", [1.0])
    old, kept = buffer.get_due_samples(5, 2)
    buffer.add("c", [2.0])
    buffer.update_after_replay([old, kept, kept], [1.0, 0.0, 1.0], 5)
    new = next(item for item in buffer.get_due_samples(5, 9) if item.experience == "c")
    assert (new.easiness, new.last_review) == (2.0, 0.0)
    slot = kept.slot
    assert buffer._columns["easiness"][slot] == pytest.approx(2.0 - 0.2 + 0.1)
    assert buffer._columns["recalls"][slot] == 2
    elsewhere = HybridSRLReplayBuffer(1)
    elsewhere.add("z", [0.0])
    elsewhere.update_after_replay([kept], [1.0], 5)
    assert elsewhere.get_due_samples(5, 1)[0].easiness == 2.0


def test_mastered_eviction_drops_the_least_diverse_of_the_mastered_then_the_oldest():
    buffer = HybridSRLReplayBuffer(4, eviction="mastered", beta=0.0)
    for name, place in (("near", 1.0), ("far", 9.0), ("failed", 0.5), ("fresh", 2.0)):
        buffer.add(name, [place])
    items = {item.experience: item for item in buffer.get_due_samples(5, 4)}
    buffer.update_after_replay([items["near"], items["far"], items["failed"]], [1.0, 1.0, 0.0], 5)
    expected = [{"far", "failed", "fresh"}, {"failed", "fresh"}, {"fresh"}, set()]
    for k, remaining in enumerate(expected):
        buffer.add(k, [3.0])
        assert {name for name in buffer._experiences if isinstance(name, str)} == remaining


def test_a_reservoir_holds_early_and_late_experiences_alike():
    held = np.zeros(200)
    for seed in range(300):
        buffer = HybridSRLReplayBuffer(20, eviction="reservoir", seed=seed)
        taken = [buffer.add(k, [float(k)]) for k in range(200)]
        assert len(buffer) == 20
        assert sum(taken) < 120
        held[buffer._experiences] += 1
    halves = held.reshape(4, 50).sum(axis=1)
    assert stats.chisquare(halves).pvalue > 1e-3


def test_a_divergent_experience_is_reviewed_sooner_once():
    buffer = HybridSRLReplayBuffer(3, beta=0.0)
    for k, flag in enumerate((True, False, False)):
        buffer.add(k, [0.0], divergent=flag)
    for step in (5, 50):
        buffer.update_after_replay(buffer.get_due_samples(step, 3), np.ones(3), step)
        intervals = buffer._columns["interval"]
        ratio = intervals[0] / intervals[1]
        assert ratio == pytest.approx(0.5), "halved at the first review, and only grown from there"
    flagged = HybridSRLReplayBuffer(2000, epsilon=0.3)
    for k in range(2000):
        flagged.add(k, [float(k)])
    assert 0.26 < (flagged._columns["boost"] > 0).mean() < 0.34


def test_noisy_recalls_take_more_to_count_as_mastered():
    buffer = HybridSRLReplayBuffer(2, uncertainty=1.0, beta=0.0)
    buffer.add("steady", [0.0])
    buffer.add("noisy", [0.0])
    for step, scores in ((10, (0.92, 0.5)), (20, (0.92, 1.0)), (30, (0.92, 0.92))):
        items = sorted(buffer.get_due_samples(step, 2), key=lambda item: item.serial)
        buffer.update_after_replay(items, scores, step)
    assert buffer._columns["easiness"][0] == pytest.approx(2.3)
    assert buffer._columns["easiness"][1] == pytest.approx(1.4)


def test_filters_refuse_experiences_and_are_counted():
    buffer = HybridSRLReplayBuffer(5, filters=[lambda text, vector, variance: "secret" not in text and vector[0] < 9])
    assert buffer.add("fine", [1.0])
    assert not buffer.add("a secret", [1.0])
    assert not buffer.add("far out", [10.0])
    assert (len(buffer), buffer.refused) == (1, 2)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda x: torch.tensor([x]).bfloat16()])
def test_embeddings_of_any_kind_are_taken(kind):
    buffer = HybridSRLReplayBuffer(2)
    buffer.add("x", kind([1.0, 2.5, -3.0]))
    buffer.add("y", np.array([1, 2, 3]))
    item = buffer.get_due_samples(9, 1)[0]
    np.testing.assert_array_equal(item.embedding, np.array([1.0, 2.5, -3.0], dtype=np.float32))
    assert item.embedding.dtype == np.float32
    assert math.isfinite(buffer.compute_diversity({"embedding": kind([1.0, 2.5, -3.0]), "variance": 0.5}))


@pytest.mark.parametrize(
    ("embedding", "words"),
    [
        ([1.0], r"d 2, got shape \(1,\)"),
        ([[1.0, 2.0], [3.0, 4.0]], "shape"),
        (3.0, "shape"),
        ([], "shape"),
        ([1.0, math.nan], "finite"),
        ([1.0, 1e30], "finite and within"),
        (["a", "b"], "vector of numbers"),
        (None, "shape|numbers|finite"),
    ],
)
def test_a_bad_embedding_is_refused_and_changes_nothing(embedding, words):
    buffer = HybridSRLReplayBuffer(4)
    buffer.add("x", [1.0, 2.0])
    with pytest.raises(ValueError, match=words):
        buffer.add("y", embedding)
    with pytest.raises(ValueError, match=words):
        buffer.compute_diversity({"embedding": embedding, "variance": 0.0})
    assert len(buffer) == 1


@pytest.mark.parametrize("item", [5, None, "x", {"embedding": [1.0]}, {"slot": 0, "serial": None}])
def test_items_of_another_kind_are_refused_and_nothing_changes(item):
    buffer = HybridSRLReplayBuffer(4)
    buffer.add("first", [1.0, 2.0])
    (due,) = buffer.get_due_samples(3, 1)
    with pytest.raises(TypeError, match="items must be what get_due_samples returned, got"):
        buffer.update_after_replay([due, item], [1.0, 1.0], 3)
    assert len(buffer.get_due_samples(3, 1)) == 1


def test_other_bad_input_is_refused_and_changes_nothing():
    buffer = HybridSRLReplayBuffer(4)
    buffer.add("x", [1.0])
    items = buffer.get_due_samples(3, 1)
    before = buffer.state_dict()
    for call, words in (
        (lambda: buffer.add("y", [1.0], variance=-1.0), "variance"),
        (lambda: buffer.add("y", [1.0], variance=math.nan), "variance"),
        (lambda: buffer.add("y", [1.0], step=math.nan), "step nan"),
        (lambda: buffer.add("y", [1.0], step="soon"), "soon"),
        (lambda: buffer.add("y", [1.0], divergent="no"), "divergent 'no'"),
        (lambda: buffer.update_after_replay(items, [math.nan], 3), "finite"),
        (lambda: buffer.update_after_replay(items, [1.0], math.inf), "finite"),
        (lambda: buffer.update_after_replay(items, [1.0, 1.0], 3), "1 items and 2 scores"),
        (lambda: buffer.get_due_samples(3, 0), "batch_size"),
        (lambda: buffer.get_due_samples(math.nan, 1), "NaN"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    np.testing.assert_equal(buffer.state_dict(), before)
    with pytest.raises(ConfigError) as caught:
        HybridSRLReplayBuffer(0, multiplier=0, alpha=-1, beta=1.5, eviction="lru", epsilon=2, clusters=1)
    assert [problem.split()[0] for problem in caught.value.problems] == [
        "capacity", "clusters", "multiplier", "alpha", "beta", "epsilon", "eviction",
    ]  # fmt: skip
    assert HybridSRLReplayBuffer(3).get_due_samples(0, 5) == []
    assert HybridSRLReplayBuffer(3).compute_diversity({"embedding": [1.0], "variance": 0.5}) == 0.25


def test_clusters_measure_distance_to_the_nearest_centre():
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0]])
    buffer = HybridSRLReplayBuffer(600, beta=0.0, clusters=3, cluster_above=100)
    for k in range(600):
        buffer.add(k, centres[k % 3] + rng.normal(size=2) * (8.0 if k == 300 else 1.0))
    assert buffer.diversities().argmax() == 300
    held = buffer._spread.embeddings
    nearest = np.linalg.norm(held[:, None] - buffer._spread._centers, axis=2).min(axis=1)
    np.testing.assert_allclose(buffer.diversities(), nearest / np.ptp(nearest), atol=2e-3)
    assert buffer.compute_diversity(buffer.get_due_samples(1, 1)[0]) == pytest.approx(buffer.diversities()[0], abs=2e-3)


@pytest.mark.parametrize(
    "options",
    [{}, {"eviction": "mastered", "epsilon": 0.4}, {"eviction": "reservoir"}, {"clusters": 2, "cluster_above": 20}],
)
def test_a_restored_buffer_goes_on_like_the_uninterrupted_one(options):
    def run(buffer, steps, trace):
        for step in steps:
            rng = np.random.default_rng(step)
            buffer.add(step, rng.normal(size=6), rng.random())
            items = buffer.get_due_samples(step, 5)
            trace.append([(item.experience, item.interval, item.easiness) for item in items])
            buffer.update_after_replay(items, 0.6 + 0.4 * rng.random(len(items)), step)
        return trace

    def make():
        return HybridSRLReplayBuffer(30, seed=5, **options)

    full = run(make(), range(150), [])
    first, second = make(), make()
    head = run(first, range(80), [])
    state = first.state_dict()
    run(first, range(80, 90), [])
    second.load_state_dict(state)
    assert head + run(second, range(80, 150), []) == full
    with pytest.raises(CheckpointError, match="capacity"):
        HybridSRLReplayBuffer(31).load_state_dict(state)


def test_asynchronous_updates_never_block_sampling_and_end_where_synchronous_ones_do():
    plain = HybridSRLReplayBuffer(200, beta=0.3)
    background = HybridSRLReplayBuffer(200, beta=0.3, asynchronous=True)
    rng = np.random.default_rng(3)
    for k in range(200):
        embedding = rng.normal(size=8)
        plain.add(k, embedding)
        background.add(k, embedding)
    items = plain.get_due_samples(4, 50)
    release, entered = threading.Event(), threading.Event()
    measure = background.diversities

    def slow(slots):
        entered.set()
        assert release.wait(20)
        return measure(slots)

    background.diversities = slow
    background.update_after_replay(items, np.linspace(0.5, 1.0, 50), 4)
    assert entered.wait(20)
    assert len(background.get_due_samples(4, 500)) == 200, "sampling went on while the update was at work"
    release.set()
    plain.update_after_replay(items, np.linspace(0.5, 1.0, 50), 4)
    background.flush()
    np.testing.assert_equal(background.state_dict(), plain.state_dict())
    background.close()
    background.close()


def test_threads_that_add_sample_and_update_at_once_leave_a_sound_buffer():
    buffer = HybridSRLReplayBuffer(300, asynchronous=True, eviction="mastered")
    stop = time.monotonic() + 0.5
    failures = []

    def work(seed):
        rng = np.random.default_rng(seed)
        step = 0
        try:
            while time.monotonic() < stop:
                step += 1
                buffer.add((seed, step), rng.normal(size=8), rng.random())
                items = buffer.get_due_samples(step, 8)
                buffer.update_after_replay(items, rng.random(len(items)), step)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    buffer.close()
    assert failures == []
    assert len(buffer) == min(300, buffer._added)
    held = buffer._spread.embeddings.astype(float)[: len(buffer)]
    spread = buffer._spread
    np.testing.assert_allclose(spread._anchor + spread._sum / len(buffer), held.mean(axis=0), atol=1e-6)
    assert np.isfinite(buffer.diversities()).all()
    assert (buffer._columns["interval"][: len(buffer)] > 0).all()


def test_an_error_in_an_asynchronous_update_surfaces_at_flush():
    buffer = HybridSRLReplayBuffer(2, asynchronous=True)
    buffer.add("x", [1.0])
    buffer.diversities = lambda slots: 1 / 0
    buffer.update_after_replay(buffer.get_due_samples(5, 1), [1.0], 5)
    with pytest.raises(ZeroDivisionError):
        buffer.flush()
    buffer.close()
