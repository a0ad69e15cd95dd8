import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from learnit_r8.errors import ConfigError
from learnit_r8.schedules.range_test import MIN_STEPS, LrFinder, longest_valley, plan_steps


class LinearRegression:
    """Stochastic gradient descent diverges above 2 / (largest eigenvalue of the covariance)."""

    def __init__(self, seed, dimensions=20, rows=1000):
        self.rng = np.random.default_rng(seed)
        self.inputs = self.rng.normal(size=(rows, dimensions)) * np.logspace(0, -1, dimensions)
        self.targets = self.inputs @ self.rng.normal(size=dimensions) + 0.1 * self.rng.normal(size=rows)
        self.weights = np.zeros(dimensions)
        self.limit = 2 / np.linalg.eigvalsh(self.inputs.T @ self.inputs / rows)[-1]

    def step(self, lr, batch_size=32):
        batch = self.rng.integers(0, len(self.inputs), batch_size)
        error = self.inputs[batch] @ self.weights - self.targets[batch]
        self.weights = self.weights - lr * self.inputs[batch].T @ error / batch_size
        return float((error**2).mean() / 2)


class DigitsMLP:
    """64-64-10, ReLU, cross-entropy, plain stochastic gradient descent."""

    images, labels = load_digits(return_X_y=True)
    images = images / 16.0

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.w1, self.b1 = self.rng.normal(size=(64, 64)) * math.sqrt(2 / 64), np.zeros(64)
        self.w2, self.b2 = self.rng.normal(size=(64, 10)) * math.sqrt(1 / 64), np.zeros(10)

    def forward(self, rows):
        hidden = np.maximum(self.images[rows] @ self.w1 + self.b1, 0)
        logits = hidden @ self.w2 + self.b2
        log_p = logits - logits.max(1, keepdims=True)
        log_p = log_p - np.log(np.exp(log_p).sum(1, keepdims=True))
        return hidden, log_p, float(-log_p[np.arange(len(rows)), self.labels[rows]].mean())

    def step(self, lr, batch_size=32):
        rows = self.rng.integers(0, 1400, batch_size)
        hidden, log_p, loss = self.forward(rows)
        delta = np.exp(log_p)
        delta[np.arange(batch_size), self.labels[rows]] -= 1
        delta /= batch_size
        back = delta @ self.w2.T * (hidden > 0)
        self.w2 = self.w2 - lr * hidden.T @ delta
        self.b2 = self.b2 - lr * delta.sum(0)
        self.w1 = self.w1 - lr * self.images[rows].T @ back
        self.b1 = self.b1 - lr * back.sum(0)
        return loss

    def test_loss(self):
        return self.forward(np.arange(1400, len(self.images)))[2]


def search(train_step, **settings):
    finder = LrFinder(**settings)
    with np.errstate(all="ignore"):
        while finder.record(train_step(finder.next_lr())):
            pass
    return finder


def replay(losses, **settings):
    values = iter(losses)
    return search(lambda lr: next(values), **{"num_steps": len(losses), **settings})


def assert_ambiguous(found):
    assert (found.lr, found.valley, found.steep, found.minimum) == (None, None, None, None)
    assert found.reason


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_steps", [100, 50])
def test_on_linear_regression_the_suggestion_is_below_the_stability_limit_by_less_than_two_decades(seed, num_steps):
    model = LinearRegression(seed)
    found = search(model.step, num_steps=num_steps).result()
    assert found.lr == found.valley
    for rate in (found.valley, found.minimum):
        assert model.limit / 100 < rate < model.limit


@pytest.mark.parametrize("seed", range(3))
def test_training_digits_at_the_suggestion_beats_a_rate_10_times_lower(seed):
    found = search(DigitsMLP(seed).step).result()

    def final_loss(peak, steps=300):
        model = DigitsMLP(seed + 100)
        for step in range(steps):
            model.step(peak * (1 - step / steps))
        return model.test_loss()

    assert found.lr is not None
    assert final_loss(found.lr) < 0.6
    assert final_loss(found.lr) < 0.8 * final_loss(found.lr / 10)


def test_the_sweep_is_exponential_and_asking_twice_gives_the_same_rate():
    finder = LrFinder(9, min_lr=1e-7, max_lr=10.0)
    rates = []
    for index in range(9):
        rates.append(finder.next_lr())
        assert finder.next_lr() == rates[-1]
        assert finder.record(1.0) is (index < 8)
    np.testing.assert_allclose(rates, np.logspace(-7, 1, 9), rtol=1e-12)
    assert finder.done
    assert finder.record(0.1) is False
    assert len(finder.result().losses) == 9


def test_losses_are_smoothed_by_a_debiased_exponential_mean():
    losses = np.random.default_rng(0).normal(5, 1, 40)
    found = replay(losses, smoothing=0.9)
    ages = np.arange(40)
    for index, smoothed in enumerate(replay(losses, smoothing=0.9).result().losses):
        weights = 0.9 ** ages[: index + 1][::-1]
        assert smoothed == pytest.approx(np.average(losses[: index + 1], weights=weights), rel=1e-12)
    assert len(found.result().lrs) == 40


def test_it_stops_at_the_first_smoothed_loss_above_four_times_the_best():
    losses = [1.0] * 30 + [3.9] * 10 + [4.1] + [1.0] * 59
    finder = replay(losses, smoothing=0.0)
    assert len(finder.result().losses) == 41


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=60))
def test_the_longest_valley_agrees_with_a_quadratic_search(values):
    lengths, end = [], 0
    for i, value in enumerate(values):
        lengths.append(1 + max((lengths[j] for j in range(i) if value < values[j]), default=0))
        if lengths[i] > lengths[end]:
            end = i
    assert longest_valley(np.array(values)) == (max(0, end - lengths[end]), end)


def test_the_valley_is_two_thirds_down_steep_at_the_steepest_and_minimum_a_tenth_of_the_lowest():
    position = np.arange(101)
    losses = np.where(position < 30, 1.0, np.where(position <= 60, 1 - (position - 30) / 60, 0.5))
    losses[45:61] -= 0.1  # the steepest step is 44 -> 45, the lowest loss at 60
    losses[61:] = losses[60] + np.arange(1, 41) * 0.01
    found = replay(losses, smoothing=0.0, min_lr=1e-8, max_lr=100.0)
    rate = 10.0 ** (position / 10 - 8)
    # The fall of 31 losses (29 to 60) is taken as the 31 steps before its end.
    assert found.result().valley == pytest.approx(rate[29 + 2 * 31 // 3])
    assert found.result().steep == pytest.approx(rate[44])
    assert found.result().minimum == pytest.approx(rate[60] / 10)


@pytest.mark.parametrize("level", [0.0, 2.3, -7.0])
def test_a_flat_curve_is_ambiguous(level):
    assert_ambiguous(replay([level] * 100).result())


@pytest.mark.parametrize("noise", ["normal", "exponential", "lognormal", "standard_normal"])
def test_pure_noise_is_ambiguous_but_for_a_few_in_a_hundred(noise):
    rng = np.random.default_rng(3)
    found = [replay(getattr(rng, noise)(size=100)).result().lr for _ in range(100)]
    assert sum(lr is not None for lr in found) <= 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_a_non_finite_loss_ends_the_search_and_never_enters_the_curve(bad):
    finder = LrFinder()
    assert finder.record(bad) is False
    assert finder.result().losses == ()
    assert_ambiguous(finder.result())
    assert "NaN or infinite after 0 steps" in finder.result().reason


def test_a_loss_that_diverges_from_the_first_step_is_ambiguous():
    assert_ambiguous(replay(1.3 ** np.arange(100)).result())


def test_a_fall_of_fewer_than_ten_points_is_ambiguous():
    losses = list(np.linspace(2, 1, 15))
    finder = LrFinder()
    for loss in losses:
        finder.record(loss)
    assert_ambiguous(finder.result())
    assert "cut short" in finder.result().reason


@pytest.mark.parametrize("offset", [-1000.0, -2.0, -1.0, -0.5, 0.0])
def test_curves_below_or_through_zero_are_read_like_positive_ones(offset):
    position = np.arange(100)
    curve = 1 / (1 + np.exp((position - 60) / 5)) + np.exp((position - 85) * 1.2)
    curve = curve + offset + np.random.default_rng(1).normal(0, 0.02, 100)
    finder = replay(curve)
    found = finder.result()
    reference = replay(curve - offset).result()
    assert found.lr is not None
    assert abs(math.log10(found.lr / reference.lr)) < 0.5
    assert finder.done
    assert len(found.losses) < 100  # the exponential rise ended it


def test_a_surrogate_loss_that_jitters_around_zero_does_not_end_the_search():
    losses = np.random.default_rng(0).normal(0, 0.01, 100)
    losses[0] = 1e-9
    assert len(replay(losses).result().losses) == 100


any_loss = st.one_of(st.floats(), st.floats(-3, 3))
spans = st.tuples(st.floats(1e-12, 1.0), st.floats(1.0000001, 1e12))


@given(
    st.lists(any_loss, max_size=150),
    st.integers(2, 120),
    spans,
    st.one_of(st.none(), st.floats(0, 0.999)),
    st.floats(1.01, 100),
)
def test_no_losses_make_it_raise_or_leave_the_range(losses, num_steps, span, smoothing, divergence):
    low, high = span[0], span[0] * span[1]
    finder = LrFinder(num_steps, low, high, smoothing, divergence)
    for loss in losses:
        assert low <= finder.next_lr() <= high
        finder.record(loss)
    found = finder.result()
    assert len(found.lrs) == len(found.losses) <= num_steps
    assert np.isfinite(found.losses).all()
    rates = (found.lr, found.valley, found.steep, found.minimum)
    assert all(rate is None for rate in rates) or all(low <= rate <= high for rate in rates)
    assert (found.lr is None) == bool(found.reason)


def test_all_bad_settings_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        LrFinder(1, min_lr=1.0, max_lr=0.1, smoothing=1.0, divergence=1.0)
    assert [problem.split()[0] for problem in caught.value.problems] == [
        "num_steps",
        "min_lr",
        "smoothing",
        "divergence",
    ]


@pytest.mark.parametrize(
    ("total", "steps"), [(0, 0), (79, 0), (80, 20), (200, 20), (500, 50), (1000, 100), (10**6, 100), (math.nan, 0)]
)
def test_a_search_takes_a_tenth_of_the_run_within_limits(total, steps):
    assert plan_steps(total) == steps


@given(st.floats(0, 1e9))
def test_a_planned_search_is_long_enough_to_read_and_at_most_a_quarter_of_the_run(total):
    steps = plan_steps(total)
    assert steps == 0 or MIN_STEPS <= steps <= total / 4
