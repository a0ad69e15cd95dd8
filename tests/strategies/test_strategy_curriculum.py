"""The curriculum scheduler: the published figures, right bins, and updates that stay cheap."""

from __future__ import annotations

import json
import math
import random
from array import array
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learnit_r8 import R8Scheduler
from learnit_r8.strategies import Curriculum, CurriculumScheduler, CurriculumStrategy
from learnit_r8.structures.rank_windows import RankWindows
from learnit_r8.testing import check_resume


def tracked(scores, **settings):
    scheduler = CurriculumScheduler(**settings)
    for number, score in enumerate(scores):
        scheduler.update(f"item {number}", score)
    return scheduler


def test_the_published_usage_runs():
    scheduler = CurriculumScheduler(strategy="competence_based", n_bins=5, temperature=1.0)
    scheduler.update("item_key_123", 0.7)
    assert scheduler.sample_bin(current_step=50, total_steps=1000) in range(5)
    assert scheduler.strategy == "competence_based" == CurriculumStrategy.COMPETENCE_BASED
    assert scheduler.n_items_tracked == 1
    assert scheduler.get_item_difficulty("item_key_123") == 0.7
    assert scheduler.get_item_difficulty("another") is None
    assert scheduler.get_item_bin("another") == 2


@pytest.mark.parametrize("step", [-5, 0, 250, 1000, 5000])
def test_bin_probabilities_follow_the_published_formulas(step):
    t = min(1.0, max(0.0, step / 1000))
    easy = np.array([(1 - t) * math.exp(-2 * i / 4) + t / 5 for i in range(5)])
    frontier = np.array([math.exp(-0.5 * (i - 4 * t) ** 2) for i in range(5)])
    for temperature in (1.0, 0.3, 4.0):
        for strategy, shape in (("easy_first", easy), ("competence_based", frontier), ("uniform", np.ones(5))):
            scheduler = CurriculumScheduler(strategy, temperature=temperature)
            expected = shape ** (1 / temperature)
            got = scheduler.bin_probabilities(step, 1000)
            np.testing.assert_allclose(got, expected / expected.sum(), rtol=1e-9)


def test_bins_are_drawn_with_their_probabilities():
    scheduler = CurriculumScheduler("easy_first", temperature=0.5, seed=3)
    counts = Counter(scheduler.sample_bin(100, 1000) for _ in range(20_000))
    expected = np.array(scheduler.bin_probabilities(100, 1000)) * 20_000
    observed = np.array([counts[i] for i in range(5)])
    assert ((observed - expected) ** 2 / expected).sum() < 25  # chi-square, 4 degrees: p < 1e-4


def test_extreme_temperatures_are_clamped_and_finite():
    scheduler = CurriculumScheduler("competence_based", n_bins=50, temperature=-3, ema_alpha=7)
    assert (scheduler.temperature, scheduler.ema_alpha) == (0.01, 1.0)
    probabilities = scheduler.bin_probabilities(1000, 1000)
    assert math.isclose(sum(probabilities), 1)
    assert probabilities[-1] > 0.999


def test_bins_are_quantiles_of_equal_size_with_the_easiest_first():
    # The published class compares with each bin's highest score: bin 0 gets one item, the last bin 39.
    scores = np.random.default_rng(0).permutation(100) / 100
    scheduler = tracked(scores)
    bins = np.array([scheduler.get_item_bin(f"item {i}") for i in range(100)])
    np.testing.assert_array_equal(np.bincount(bins), [20] * 5)
    np.testing.assert_array_equal(bins, 4 - (scores * 100).astype(int) // 20)
    metrics = scheduler.metrics_dict()
    assert [metrics[f"curriculum/bin_{i}_count"] for i in range(5)] == [20.0] * 5
    assert metrics["curriculum/items_tracked"] == metrics["curriculum/total_updates"] == 100.0
    assert metrics["curriculum/mean_difficulty"] == pytest.approx(0.495)


def test_equal_scores_are_all_easy_and_few_items_spread_over_the_bins():
    assert {tracked([0.4] * 9).get_item_bin(f"item {i}") for i in range(9)} == {0}
    two = tracked([0.1, 0.9])
    assert [two.get_item_bin(f"item {i}") for i in range(2)] == [4, 0]
    assert tracked([0.3], n_bins=1).get_item_bin("item 0") == 0


def test_scores_are_averaged_exponentially():
    scheduler = CurriculumScheduler(ema_alpha=0.25)
    scheduler.update_batch("a", [0.0, 1.0])
    scheduler.update_batch("a", [])
    scheduler.update("a", 1.5)
    assert scheduler.get_item_difficulty("a") == 0.75
    assert CurriculumScheduler().metrics_dict() == {"curriculum/items_tracked": 0, "curriculum/strategy": 0}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 400))
def test_bins_after_many_updates_are_those_of_a_full_sort(seed, n_bins, items):
    rng = np.random.default_rng(seed)
    scheduler = CurriculumScheduler(n_bins=n_bins)
    scores: dict[int, float] = {}
    for _ in range(8):
        for key in rng.integers(items, size=rng.integers(50, 300)).tolist():
            score = float(rng.integers(0, 12)) / 8
            scores[key] = scores[key] + 0.3 * (score - scores[key]) if key in scores else score
            scheduler.update(key, score)
        order = sorted(scores.values(), reverse=True)
        if len(order) < n_bins:
            continue
        lowest = [order[i * len(order) // n_bins - 1] for i in range(1, n_bins)]
        for key in list(scores)[:50]:
            exact = scheduler.get_item_difficulty(key)
            assert exact == pytest.approx(scores[key])
            near = min((abs(exact - edge) for edge in lowest), default=1)
            if near > 1e-9:
                assert scheduler.get_item_bin(key) == sum(exact < edge for edge in lowest)


def test_sample_item_draws_a_key_of_the_target_bin():
    scheduler = tracked(np.arange(100) / 100, strategy="competence_based", temperature=0.01)
    for step, target in ((0, 0), (500, 2), (1000, 4)):
        drawn = {scheduler.sample_item(step, 1000) for _ in range(300)}
        assert {scheduler.get_item_bin(key) for key in drawn} == {target}
        assert len(drawn) > 15  # of 20
    tied = tracked([1.0] * 30, strategy="competence_based", temperature=0.01)
    assert tied.sample_item(1000, 1000).startswith("item")  # bin 4 is empty
    with pytest.raises(ValueError, match="no item is tracked"):
        CurriculumScheduler().sample_item()


def test_the_threshold_steers_the_frontier_only_when_asked():
    # The published class stores competence_threshold and never reads it.
    scores = np.arange(100) / 100
    published = tracked(scores, strategy="competence_based", competence_threshold=0.2)
    assert np.argmax(published.bin_probabilities(0, 1000)) == 0
    for threshold, frontier in ((0.95, 0), (0.5, 2), (0.05, 4)):
        steered = tracked(scores, strategy="competence_based", competence_threshold=threshold, steer=True)
        assert np.argmax(steered.bin_probabilities(0, 1000)) == frontier
        assert np.argmax(steered.bin_probabilities(1000, 1000)) == frontier


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"strategy": "hardest"}, "Invalid curriculum strategy 'hardest'. Must be one of"),
        ({"n_bins": 0}, "n_bins must be >= 1, got 0"),
        ({"strategy": "x", "n_bins": -1}, "2 problems"),
        ({"temperature": float("nan")}, "temperature must be a finite number"),
    ],
)
def test_bad_arguments_raise_the_published_texts(arguments, text):
    with pytest.raises(ValueError, match=text):
        CurriculumScheduler(**arguments)


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_changes_nothing(score):
    scheduler = tracked([0.5])
    with pytest.raises(ValueError, match="score must be finite"):
        scheduler.update("item 0", score)
    assert scheduler.metrics_dict()["curriculum/total_updates"] == 1


@pytest.mark.parametrize("key", [str, int])
def test_it_is_resumable_with_keys_of_either_kind_and_leaves_global_randomness_alone(key):
    class Subject:
        def __init__(self):
            self.scheduler = CurriculumScheduler("competence_based", steer=True, seed=4)
            self.step = 0

        def state_dict(self):
            return {"scheduler": self.scheduler.state_dict(), "step": self.step}

        def load_state_dict(self, state):
            self.scheduler.load_state_dict(state["scheduler"])
            self.step = state["step"]

    def advance(subject):
        subject.step += 1
        for number in range(13):
            subject.scheduler.update(key(number * subject.step % 31), math.sin(number + subject.step))
        bins = [subject.scheduler.get_item_bin(key(number)) for number in range(31)]
        return subject.scheduler.sample_item(subject.step, 40), subject.scheduler.sample_bin(subject.step, 40), bins

    states = global_randomness()
    check_resume(Subject, advance)
    assert states == global_randomness()


def test_a_published_state_is_read():
    state = {
        "strategy": "easy_first",
        "n_bins": 2,
        "temperature": 1.0,
        "ema_alpha": 0.3,
        "competence_threshold": 0.5,
        "item_scores": {"a": (0.9, 3), "b": (0.1, 1)},
        "bin_boundaries": [0.9, 0.1],
        "last_rebin_count": 4,
    }
    scheduler = CurriculumScheduler()
    scheduler.load_state_dict(state)
    assert [scheduler.get_item_bin(key) for key in "ab"] == [0, 1]
    assert scheduler.metrics_dict()["curriculum/total_updates"] == 4
    with pytest.raises(ValueError, match="n_bins must be >= 1"):
        scheduler.load_state_dict({**state, "n_bins": 0})


KEYS = [3, "3", ("math", 3), ("math", (3, None)), 2.5, b"\xff", None, -(2**70), "", -math.inf, (1, math.inf)]


def test_keys_of_every_kind_are_one_key_in_memory_and_in_the_state():
    torch = pytest.importorskip("torch")
    scheduler = CurriculumScheduler()
    for key in [*KEYS, np.int64(3), np.int8(3), torch.tensor(3), np.array(3), np.str_("3"), ("math", torch.tensor(3))]:
        scheduler.update(key, 1.0)
    scheduler.update_batch(np.bytes_(b"\xff"), [0.0, 1.0])
    assert scheduler.n_items_tracked == len(KEYS)
    restored = CurriculumScheduler()
    restored.load_state_dict(json.loads(json.dumps(scheduler.state_dict(), allow_nan=False)))
    for key in KEYS:
        assert restored.get_item_difficulty(key) == scheduler.get_item_difficulty(key) is not None
        assert type(restored._keys[restored._slots[key]]) is type(key)
    assert restored.get_item_difficulty(torch.tensor(3)) == 1.0
    assert restored.get_item_bin(np.int32(3)) == restored.get_item_bin(3)


@pytest.mark.parametrize("key", [math.nan, object(), np.arange(2), frozenset("a"), Path("a"), (1, object()), 2 + 1j])
def test_a_key_that_no_state_could_hold_is_refused_at_the_update(key):
    scheduler = CurriculumScheduler()
    with pytest.raises(TypeError, match=r"a key is a text|NaN is no key"):
        scheduler.update(key, 1.0)
    assert scheduler.n_items_tracked == 0


def test_a_few_solved_or_unsolved_items_among_a_thousand_ties_are_told_apart():
    def share(strategy, step, rare, mass):
        scheduler = CurriculumScheduler(strategy)
        for key in range(1000):
            scheduler.update(key, rare if key < 10 else mass)
        bins = np.array([scheduler.get_item_bin(key) for key in range(1000)])
        np.testing.assert_array_equal(scheduler._bins(np.array(scheduler._items[::2])), bins)
        draws = [scheduler.sample_item(step, 1000) for _ in range(1000)]
        return np.mean(np.array(draws) < 10)

    assert share("easy_first", 0, 1.0, 0.0) > 0.4, "solved ones are preferred"
    assert share("competence_based", 0, 1.0, 0.0) > 0.8
    assert share("competence_based", 1000, 1.0, 0.0) < 0.02
    assert share("competence_based", 1000, 0.0, 1.0) > 0.9, "unsolved ones come at the end"
    assert share("competence_based", 0, 0.0, 1.0) < 0.15
    assert share("uniform", 0, 0.5, 0.5) < 0.03, "all alike"


def test_ties_within_the_range_share_the_middle_of_the_bins_that_they_fill():
    scheduler = tracked([0.0, 0.1, *[0.5] * 96, 0.9, 1.0])
    assert [scheduler.get_item_bin(f"item {i}") for i in (0, 1, 50, 98, 99)] == [4, 4, 2, 0, 0]


class OneByOne:
    """What the scheduler must compute, without any of its shortcuts."""

    def __init__(self):
        self.scores, self.counts = {}, {}

    def update(self, key, score):
        if key in self.scores:
            score = 0.3 * score + (1 - 0.3) * self.scores[key]
        self.scores[key] = score
        self.counts[key] = self.counts.get(key, 0) + 1

    def bins(self, n_bins):
        """Return the lowest score of each bin but the hardest, and the share of mastered items."""
        order, count = sorted(self.scores.values(), reverse=True), len(self.scores)
        if count < n_bins:
            edges = [order[0] - i * (order[0] - order[-1]) / n_bins for i in range(1, n_bins)]
        else:
            edges = [order[i * count // n_bins - 1] for i in range(1, n_bins)]
        return edges, 1 - sum(score < 0.5 for score in order) / count


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([0, 40, 3000]),
    st.sampled_from([1, 2, 5, 30]),
    st.sampled_from([2, 16, None]),
    st.sampled_from([0.0, 0.05]),
)
def test_updates_in_bulk_are_updates_one_by_one_to_the_bit(seed, first, n_bins, levels, drift):
    rng = np.random.default_rng(seed)
    naive, scheduler = OneByOne(), CurriculumScheduler("competence_based", n_bins=n_bins, steer=True)
    for turn in range(25):
        for key in [
            *range(first * (turn == 0)),
            *rng.integers(first + 5 * turn + 3, size=rng.integers(1, 400)).tolist(),
        ]:
            score = float(rng.random() if levels is None else rng.integers(levels) / levels) + turn * drift
            scheduler.update(key, score)
            naive.update(key, score)
            if rng.random() < 0.01:
                assert scheduler.get_item_difficulty(key) == naive.scores[key]
                assert scheduler.n_items_tracked == len(naive.scores)
        scheduler.update(0, 0.25)
        naive.update(0, 0.25)
        scheduler.bin_probabilities()
        state = scheduler.state_dict()
        assert dict(zip(state["keys"], state["scores"], strict=True)) == naive.scores
        assert dict(zip(state["keys"], state["counts"], strict=True)) == naive.counts
        if state["last_rebin_count"] == state["updates"]:
            assert (state["bin_boundaries"], state["mastered"]) == naive.bins(n_bins)


@pytest.mark.parametrize("waiting", [0, 3, 100])
def test_a_key_that_is_not_hashable_changes_nothing(waiting):
    scheduler = tracked([0.5] * waiting)
    with pytest.raises(TypeError, match="a key is a text"):
        scheduler.update([1], 0.5)
    assert scheduler.n_items_tracked == waiting
    assert scheduler.metrics_dict().get("curriculum/total_updates", 0) == waiting


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([1, 2, 60, 500, 3000]),
    st.sampled_from([1, 3, 5, 40]),
    st.sampled_from([3, 200, None]),
    st.sampled_from([0.0, 0.001, 0.1]),
)
def test_rank_windows_agree_with_sorting(seed, size, parts, levels, drift):
    """With many equal numbers and few, numbers that wander off, and more and more of them."""
    rng = np.random.default_rng(seed)

    def number(turn):
        return float(rng.random() if levels is None else rng.integers(levels) / levels) + drift * turn

    def by_sorting():
        ranks = [i * len(values) // parts for i in range(parts)]
        return ranks, ([sorted(values)[rank] for rank in ranks], sum(value < mark for value in values))

    values = [number(0) for _ in range(size)]
    mark = float(rng.choice(values))
    kept = None
    for turn in range(40):
        ranks, expected = by_sorting()
        found = None if kept is None else kept.answer(ranks, mark)
        if found is None:
            assert turn < 2 or drift or size < 600  # it goes on without sorting where little changes
            kept = RankWindows(np.sort(values), ranks, mark)
            found = kept.answer(ranks, mark)
        assert found == expected
        old, new = [], []
        for at in rng.integers(len(values), size=rng.integers(20)).tolist():
            old.append(values[at])
            values[at] = number(turn)
            new.append(values[at])
        new += [number(turn) for _ in range(turn % 3)]
        values += new[len(old) :]
        kept.replace(array("d", old), array("d", new))
    assert kept.answer(ranks, mark + 1) is None


def global_randomness():
    legacy = np.random.get_state()[1]  # noqa: NPY002 - that is the state to leave alone
    return random.getstate(), legacy.tolist()


def test_a_new_alpha_counts_for_the_scores_after_it():
    eager, lazy = (CurriculumScheduler(ema_alpha=0.5) for _ in range(2))
    for scheduler in (eager, lazy):
        for score in (0.0, 1.0):
            scheduler.update("item", score)
            if scheduler is eager:
                scheduler.get_item_difficulty("item")
        scheduler.ema_alpha = 0.1
        scheduler.update("item", 0.0)
    assert lazy.get_item_difficulty("item") == eager.get_item_difficulty("item") == pytest.approx(0.45)


def test_the_strategy_tells_a_few_easy_or_hard_samples_among_equal_losses_apart():
    def shares(losses, mode, progress_epoch):
        counts = np.zeros(200)
        with R8Scheduler(200, 20, num_epochs=6, ui="off", checkpoint_dir=None, strategy=Curriculum(mode)) as scheduler:
            for epoch in scheduler.epoch_iterator():
                for batch in scheduler.batch_iterator():
                    counts[batch.indices] += epoch == progress_epoch
                    scheduler.update_with_loss(losses[batch.indices])
        return counts / counts.sum()

    rare = np.arange(200) < 20
    assert shares(np.where(rare, 0.1, 2.0), "easy_first", 1)[rare].sum() > 0.3
    assert shares(np.where(rare, 2.0, 0.1), "competence_based", 5)[rare].sum() > 0.5
    assert shares(np.where(rare, 2.0, 0.1), "competence_based", 1)[rare].sum() < 0.2
