import json
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from learnit_r8.samples.batch_losses import PRIOR_ESTIMATE, PRIOR_VARIANCE, BatchAttribution


class Held:
    """The arrays that a catalog owns."""

    def __init__(self, num_samples, **options):
        self.attribution = BatchAttribution(num_samples, **options)
        self.estimate = np.full(num_samples, PRIOR_ESTIMATE, np.float32)
        self.variance = np.full(num_samples, PRIOR_VARIANCE, np.float32)

    def feed(self, reports):
        for batch, loss in reports:
            self.attribution.update(self.estimate, self.variance, batch, loss)
        return self

    def refine(self):
        return self.attribution.refine(self.estimate, self.variance)

    def losses(self):
        return self.attribution.to_loss(self.estimate)

    def confidence(self):
        return self.attribution.known(self.variance)

    def assert_sane(self):
        assert np.isfinite(self.estimate).all()
        assert np.isfinite(self.variance).all()
        assert (self.variance >= 0).all()
        assert (self.variance <= PRIOR_VARIANCE).all()
        assert math.isfinite(self.attribution.level)
        assert math.isfinite(self.attribution.expected_mean(float(self.estimate.mean())))
        assert not np.isnan(self.losses()).any()
        assert 0.0 <= self.confidence() <= 1.0


def reports(truth, size, epochs, seed=0, level=lambda progress: 1.0, offset=lambda progress: 0.0):
    rng = np.random.default_rng(seed)
    n = len(truth)
    for epoch in range(epochs):
        order = rng.permutation(n)
        for i in range(0, n, size):
            progress = (epoch + i / n) / epochs
            batch = order[i : i + size]
            yield batch, float(truth[batch].mean() * level(progress) + offset(progress))


def lognormal(n, seed=0):
    x = np.exp(np.random.default_rng(1000 + seed).standard_normal(n))
    return x / x.mean()


def spearman(a, b):
    return np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1]


def extended_kalman(n_samples, stream, noise, process_noise, level_rate):
    """The filter of the module's text, sample by sample in double precision."""
    x, p = [1.0] * n_samples, [1.0] * n_samples
    level = size = 0.0
    spread = math.sqrt(math.e - 1)
    for t, (batch, loss) in enumerate(stream, 1):
        n = len(batch)
        rate = max(level_rate, 1 / t)
        size += rate * (n - size)
        level += rate * min(1, n / size) * (loss - level)
        deviation = 1.2533 * math.sqrt(n) * abs(loss / level - 1)
        spread += max(level_rate, 1 / (t + 4)) * (deviation - spread)
        s = min(1.0, math.sqrt(math.log(1 + spread**2)))
        slopes = [s * x[i] / n for i in batch]
        error = loss / level - sum(x[i] for i in batch) / n
        total = sum(p[i] * g * g for i, g in zip(batch, slopes, strict=True)) + noise * (math.exp(s * s) - 1) / n
        for i, g in zip(batch, slopes, strict=True):
            k = p[i] * g / total
            x[i] *= math.exp(min(1.5, max(-1.5, s * k * error)))
            p[i] = min(1.0, p[i] * (1 - k * g) + process_noise)
    return np.array(x), np.array(p)


@pytest.mark.parametrize(("n", "size"), [(60, 8), (50, 16), (7, 1), (5, 32)])
def test_the_filter_agrees_with_a_plain_loop(n, size):
    stream = list(reports(lognormal(n), size, 6, level=lambda t: math.exp(-2 * t)))
    held = Held(n).feed(stream)
    x, p = extended_kalman(n, stream, 0.1, 1e-4, 0.02)
    np.testing.assert_allclose(held.estimate, x, rtol=2e-4)
    np.testing.assert_allclose(held.variance, p, rtol=2e-4, atol=1e-6)


def test_the_additive_filter_agrees_with_a_dense_kalman_filter_that_drops_covariances():
    n = 24
    held = Held(n)
    x, p = np.ones(n), np.eye(n)
    for batch, loss in reports(np.linspace(-1, 1, n), 6, 5, offset=lambda _: -2.0):
        old_scale = held.attribution.scale
        held.feed([(batch, loss)])
        scale = held.attribution.scale
        x = 1 + (x - 1) * (old_scale or scale) / scale
        row = np.zeros(n)
        row[batch] = 1 / len(batch)
        gain = p @ row / (row @ p @ row + 0.1 / len(batch))
        x += gain * (1 + (loss - held.attribution.level) / scale - row @ x)
        p = np.diag(np.diag((np.eye(n) - np.outer(gain, row)) @ p))
        p[batch, batch] = np.minimum(p[batch, batch] + 1e-4, 1.0)
    np.testing.assert_allclose(held.estimate, x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(held.variance, np.diag(p), rtol=1e-4)


@pytest.mark.parametrize("offset", [0.0, -3.0])
def test_a_refinement_of_identified_samples_agrees_with_numpy_lstsq(offset):
    n, size = 96, 8
    truth = lognormal(n)
    stream = list(reports(truth, size, 48, offset=lambda _: offset))
    held = Held(n).feed(stream)
    assert held.refine()
    rows = np.zeros((len(stream), n))
    for row, (batch, _) in zip(rows, stream, strict=True):
        row[batch] = 1 / len(batch)
    exact = np.linalg.lstsq(rows, np.array([loss for _, loss in stream]), rcond=None)[0]
    np.testing.assert_allclose(exact, truth + offset, atol=1e-8)
    assert np.corrcoef(held.losses(), exact)[0, 1] > 0.98
    assert np.abs(held.losses() - exact).mean() < 0.12 * exact.std()


@pytest.mark.parametrize("fall", [0.0, 2.0])
def test_more_epochs_bring_the_estimates_to_the_truth(fall):
    truth, found, refined = lognormal(600), [], []
    for epochs in (4, 12, 40):
        held = Held(600).feed(reports(truth, 16, epochs, level=lambda t: math.exp(-fall * t)))
        found.append(spearman(held.estimate, truth))
        held.refine()
        refined.append(spearman(held.estimate, truth))
    assert found[0] < found[1] < found[2]
    assert found[2] > 0.8
    assert refined[2] > 0.95
    assert all(after > before - 0.02 for before, after in zip(found, refined, strict=True))


def test_a_batch_of_one_is_learnt_as_it_is():
    truth = lognormal(40)
    held = Held(40).feed(reports(truth, 1, 12))
    assert spearman(held.estimate, truth) > 0.97
    held.refine()
    assert spearman(held.estimate, truth) > 0.97
    assert held.confidence() > 0.8


def test_a_refinement_predicts_the_last_epoch_without_bias():
    stream = list(reports(lognormal(400), 16, 20, level=lambda t: 5 * math.exp(-2 * t)))
    held = Held(400).feed(stream)
    assert held.refine()
    predicted = [held.attribution.expected_mean(float(held.estimate[batch].mean())) for batch, _ in stream[-25:]]
    assert np.mean(predicted) == pytest.approx(np.mean([loss for _, loss in stream[-25:]]), rel=0.1)


def test_confidence_goes_from_nothing_to_about_the_share_that_is_known():
    truth = lognormal(1000)
    held = Held(1000)
    assert held.confidence() == 0.0
    held.feed(reports(truth, 32, 10))
    assert 0.1 < held.confidence() < 0.4
    held = Held(1000).feed(reports(truth, 16, 40))
    assert held.refine()
    known = np.corrcoef(np.log(held.estimate), np.log(truth))[0, 1] ** 2
    assert held.confidence() == pytest.approx(known, abs=0.15)


def test_too_few_reports_are_not_refined_and_nothing_changes():
    held = Held(300).feed(reports(lognormal(300), 32, 3))
    before = held.estimate.copy(), held.variance.copy()
    assert held.refine() is False
    np.testing.assert_array_equal(before[0], held.estimate)
    np.testing.assert_array_equal(before[1], held.variance)


def test_a_refinement_sees_that_pure_noise_says_little_about_samples():
    shrunk, confidence = [], []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        held = Held(400).feed((batch, 1 + 0.2 * rng.standard_normal()) for batch, _ in reports(np.ones(400), 16, 40))
        before = np.log(held.estimate).std()
        assert held.refine()
        shrunk.append(np.log(held.estimate).std() / before)
        confidence.append(held.confidence())
    assert np.median(shrunk) < 0.5
    assert np.median(confidence) < 0.4


def test_losses_that_cross_zero_turn_additive_and_keep_the_estimates_in_loss_units():
    truth = 0.5 * np.random.default_rng(0).standard_normal(300)
    held = Held(300)
    for batch, loss in reports(truth, 10, 40, offset=lambda t: 3 - 6 * t):
        if loss < 0 and not held.attribution.additive:
            before = held.losses()
            held.attribution._turn_additive(held.estimate, held.variance, loss)
            np.testing.assert_allclose(held.losses(), before, atol=1e-5)
        held.feed([(batch, loss)])
        held.assert_sane()
    assert held.attribution.additive
    streaming = spearman(held.estimate, truth)
    assert streaming > 0.5
    assert held.refine()
    assert spearman(held.estimate, truth) > max(0.9, streaming)
    assert held.attribution.level == pytest.approx(-3, abs=0.5)


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_an_additive_estimate_is_rescaled_without_a_change_in_loss_units(factor):
    held = Held(64).feed(reports(np.random.default_rng(0).standard_normal(64), 8, 3, offset=lambda _: -1.0))
    before, scale = held.losses(), held.attribution.scale
    held.attribution._spread = factor
    held.attribution._rescale(held.estimate)
    assert held.attribution.scale == pytest.approx(scale * factor)
    np.testing.assert_allclose(held.losses(), before, rtol=1e-2 if factor > 1 else 1e-5, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 0.7, -0.7])
def test_constant_losses_leave_every_sample_average(value):
    held = Held(100).feed((batch, value) for batch, _ in reports(np.ones(100), 8, 60))
    held.refine()
    held.assert_sane()
    np.testing.assert_allclose(held.losses(), value, atol=1e-3)


def test_relative_and_loss_units_convert_into_each_other():
    held = Held(50).feed(reports(lognormal(50) * 7, 8, 3))
    np.testing.assert_allclose(held.attribution.from_loss(held.losses()), held.estimate, rtol=1e-5)
    assert held.attribution.expected_mean(float(held.estimate.mean())) == pytest.approx(
        float(held.losses().mean()), rel=1e-5
    )
    np.testing.assert_array_equal(BatchAttribution(3).from_loss(np.array([1.0, 2.0, 3.0])), np.ones(3))
    assert BatchAttribution(3).expected_mean(1.0) == 0.0


@pytest.mark.parametrize("offset", [0.0, -0.6])
@pytest.mark.parametrize("cut", [0, 1, 40, 111, 399])
def test_a_restored_estimator_continues_to_the_bit(cut, offset):
    stream = list(reports(lognormal(200), 10, 20, level=lambda t: math.exp(-t), offset=lambda _: offset))
    whole = Held(200, history_entries=5000).feed(stream[:cut])
    state = whole.attribution.state_dict()
    history = {key: array.copy() for key, array in state.pop("history").items()}
    restored = Held(200, history_entries=5000)
    restored.estimate, restored.variance = whole.estimate.copy(), whole.variance.copy()
    restored.attribution.load_state_dict(json.loads(json.dumps(state)) | {"history": history})
    for held in (whole, restored):
        held.feed(stream[cut:])
        held.refine()
        held.feed(stream[:7])
    np.testing.assert_array_equal(whole.estimate, restored.estimate)
    np.testing.assert_array_equal(whole.variance, restored.variance)
    assert whole.attribution.level == restored.attribution.level


def test_a_state_is_a_copy():
    held = Held(50).feed(reports(lognormal(50), 8, 2))
    state = held.attribution.state_dict()
    ids = state["history"]["ids"].copy()
    held.feed(reports(lognormal(50), 8, 9, seed=5))
    np.testing.assert_array_equal(ids, state["history"]["ids"])
    other = BatchAttribution(50)
    other.load_state_dict(state)
    state["history"]["ids"][:] = 0
    np.testing.assert_array_equal(other.state_dict()["history"]["ids"], ids)


def test_the_history_is_bounded_keeps_the_newest_batches_and_costs_nothing_before_a_report():
    held = Held(100, history_entries=600)
    assert held.attribution.state_dict()["history"]["ids"].nbytes == 0
    stream = list(reports(lognormal(100), 7, 40))
    held.feed(stream)
    history = held.attribution.state_dict()["history"]
    count = len(history["records"])
    assert len(history["ids"]) + 8 * count <= 600
    assert count > 10
    np.testing.assert_array_equal(history["ids"], np.concatenate([batch for batch, _ in stream[-count:]]))
    assert history["records"][:, 1].tolist() == [loss for _, loss in stream[-count:]]


def test_without_a_history_there_is_no_refinement():
    held = Held(30, history_entries=0).feed(reports(lognormal(30), 4, 12))
    assert held.refine() is False
    assert spearman(held.estimate, lognormal(30)) > 0.5


def test_samples_that_the_history_has_forgotten_keep_their_estimates():
    truth = lognormal(120)
    held = Held(120, history_entries=4000).feed(reports(truth, 8, 4))
    held.feed(reports(truth[:60], 8, 60, seed=3))
    kept = held.estimate[60:].copy()
    assert held.refine()
    np.testing.assert_array_equal(held.estimate[60:], kept)
    assert spearman(held.estimate[:60], truth[:60]) > 0.95


def test_an_update_allocates_nothing_of_the_size_of_the_data_set():
    rows = np.ones(1_000_000, [("estimate", np.float32), ("variance", np.float32), ("rest", np.uint32, (6,))])
    attribution, batch = BatchAttribution(len(rows)), np.arange(0, len(rows), 4000)
    attribution.update(rows["estimate"], rows["variance"], batch, 1.0)
    tracemalloc.start()
    try:
        attribution.update(rows["estimate"], rows["variance"], batch, 2.0)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("offset", [0.0, -0.8])
def test_columns_of_a_structured_array_give_the_same_as_plain_arrays(offset):
    plain = Held(300)
    rows = np.zeros(300, [("estimate", np.float32), ("variance", np.float32), ("rest", np.uint32, (6,))])
    strided = Held(300)
    strided.estimate, strided.variance = rows["estimate"], rows["variance"]
    strided.estimate[:], strided.variance[:] = PRIOR_ESTIMATE, PRIOR_VARIANCE
    for held in (plain, strided):
        held.feed(reports(lognormal(300), 16, 20, offset=lambda _: offset))
        assert held.refine()
    np.testing.assert_array_equal(plain.estimate, rows["estimate"])
    np.testing.assert_array_equal(plain.variance, rows["variance"])
    assert not rows["rest"].any()


@pytest.mark.parametrize("offset", [0.0, -4.0])
def test_losses_known_per_sample_are_a_start_for_batch_losses(offset):
    truth = (lognormal(200) + offset).astype(np.float32)
    held = Held(200)
    held.attribution.start(truth)
    held.estimate[:] = held.attribution.from_loss(truth)
    held.variance[:] = 0.1
    np.testing.assert_allclose(held.losses(), truth, rtol=1e-5, atol=1e-5)
    held.feed(reports(truth, 10, 5))
    assert spearman(held.estimate, truth) > 0.9
    for constant in (0.0, 2.0, -2.0):
        held = Held(20)
        held.attribution.start(np.full(5, constant, np.float32))
        held.feed(reports(np.ones(20), 4, 3)).assert_sane()


magnitudes = st.sampled_from([0.0, 1e-30, 1e-12, 1.0, 1e12, 1e30])


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 60),
    size=st.integers(1, 40),
    epochs=st.integers(1, 9),
    pattern=st.lists(st.tuples(magnitudes, st.floats(-1, 1)), min_size=1, max_size=30),
    positive=st.booleans(),
    seed=st.integers(0, 10),
)
@example(n=3, size=1, epochs=9, pattern=[(1e-30, 1.0), (1e30, -1.0)], positive=False, seed=0)
@example(n=3, size=2, epochs=9, pattern=[(1e30, -1.0), (1e-30, -1.0)], positive=False, seed=0)
@example(n=1, size=1, epochs=9, pattern=[(1.0, 5e-324), (1.0, -5e-324), (1e30, 1.0)], positive=False, seed=0)
def test_everything_stays_finite_for_all_sizes_and_magnitudes(n, size, epochs, pattern, positive, seed):
    held = Held(n)
    for t, (batch, _) in enumerate(reports(np.ones(n), size, epochs, seed=seed)):
        magnitude, factor = pattern[t % len(pattern)]
        held.feed([(batch, abs(magnitude * factor) if positive else magnitude * factor)])
        held.assert_sane()
    held.refine()
    held.assert_sane()


@settings(max_examples=30, deadline=None)
@given(exponent=st.integers(-30, 30), seed=st.integers(0, 5), size=st.integers(1, 12))
def test_the_unit_of_the_loss_does_not_matter(exponent, seed, size):
    truth = lognormal(48, seed)
    plain = Held(48).feed(reports(truth, size, 14, seed))
    scaled = Held(48).feed(reports(truth * 2.0**exponent, size, 14, seed))
    assert plain.refine() == scaled.refine()
    np.testing.assert_array_equal(plain.estimate, scaled.estimate)
    np.testing.assert_array_equal(plain.variance, scaled.variance)
