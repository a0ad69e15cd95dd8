"""The detector calls faults by their name and leaves clean curves alone."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learnit_r8.stability.detector import Detector, Reading
from learnit_r8.stability.windows import SortedWindow
from learnit_r8.types import Verdict

ACT = {Verdict.SPIKE, Verdict.DRIFT, Verdict.NONFINITE}
CLEAN = {
    "noisy": lambda rng, n: (0.1 + 2.0 / (1 + np.arange(n) / 300)) * np.exp(0.3 * rng.standard_normal(n)),
    "crossing zero": lambda rng, n: 1.5 - 3 * (1 - np.exp(-np.arange(n) / 1000)) + 0.1 * rng.standard_normal(n),
    "negative": lambda rng, n: -5 + 0.2 * rng.standard_t(3, n),
    "constant": lambda rng, n: np.full(n, 0.5),
    "zero": lambda rng, n: np.zeros(n),
    "near interpolation": lambda rng, n: 0.01 * rng.lognormal(0, 0.3, n) * np.where(rng.random(n) < 0.05, 30, 1),
}


def clean(kind, n=3000, seed=0):
    return CLEAN[kind](np.random.default_rng(seed), n).tolist()


def read(detector, losses, start=0):
    return [detector.observe(start + k, loss) for k, loss in enumerate(losses)]


def first_action(readings):
    return next(((k, r.verdict) for k, r in enumerate(readings) if r.verdict in ACT), None)


@pytest.mark.parametrize("kind", CLEAN)
@pytest.mark.parametrize("seed", range(3))
def test_a_clean_curve_causes_no_action(kind, seed):
    assert first_action(read(Detector(), clean(kind, seed=seed))) is None


@pytest.mark.parametrize("kind", ["noisy", "crossing zero", "negative", "constant"])
@pytest.mark.parametrize("at", [3, 15, 16, 17, 500])
def test_one_harmless_outlier_of_ten_times_causes_no_action(kind, at):
    losses = clean(kind)
    losses[at] += 10 * max(1.0, abs(losses[at]))
    assert first_action(read(Detector(), losses)) is None


@pytest.mark.parametrize("step", [0, 1, 15, 16, 100])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_a_fault_at_once_and_leaves_no_trace(step, value):
    losses = clean("noisy", 200)
    with_fault, without = Detector(), Detector()
    read(with_fault, losses[:step])
    read(without, losses[:step])
    reading = with_fault.observe(step, value)
    assert reading.verdict is Verdict.NONFINITE
    assert with_fault.first_suspect_step == step
    with_fault.reset_after_rollback(without.state_dict())
    without.reset_after_rollback()
    assert read(with_fault, losses[step:], step) == read(without, losses[step:], step)


def test_one_nonfinite_sample_in_a_finite_mean_is_a_fault():
    assert Detector().observe(0, 1.0, finite=False).verdict is Verdict.NONFINITE


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=120))
def test_any_floats_are_read_and_state_stays_finite_strict_json(losses):
    detector = Detector()
    read(detector, [1.0] * 16 + losses)
    state = detector.state_dict()
    for numbers in (state["window"], state["level"]["losses"]):
        assert all(math.isfinite(x) for x in numbers)
    json.dumps(state, allow_nan=False)


@pytest.mark.parametrize("kind", ["noisy", "crossing zero", "negative", "constant"])
def test_a_level_ten_times_up_is_a_spike_within_three_steps(kind):
    losses = clean(kind)
    scale = max(abs(np.median(losses[436:500])), 4 * np.std(losses[436:500]))
    detector = Detector()
    readings = read(detector, losses[:500] + [loss + 10 * scale for loss in losses[500:510]])
    where, verdict = first_action(readings)
    assert 500 <= where < 503
    assert verdict is Verdict.SPIKE
    assert detector.first_suspect_step == 500
    assert readings[where].reason


@pytest.mark.parametrize("kind", ["noisy", "crossing zero", "negative", "constant"])
@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5])
def test_an_exponential_divergence_is_found_before_it_is_a_thousand_times_the_level(kind, rate):
    losses = np.array(clean(kind))
    scale = max(abs(np.median(losses[936:1000])), 4 * np.std(losses[936:1000]))
    losses[1000:] += 0.01 * scale * np.exp(np.minimum(rate * np.arange(2000), 100))
    where, _ = first_action(read(Detector(), losses.tolist()))
    assert where >= 1000
    assert losses[where] - losses[999] < 1000 * scale


@pytest.mark.parametrize("kind", ["noisy", "crossing zero", "negative", "constant"])
def test_a_slow_growth_is_told_and_is_no_suspect_run(kind):
    losses = np.array(clean(kind, 4000))
    scale = max(abs(np.median(losses[1936:2000])), 4 * np.std(losses[1936:2000]))
    losses[2000:] += 6 * scale * np.arange(2000) / 1500
    detector = Detector()
    for step, loss in enumerate(losses.tolist()):
        reading = detector.observe(step, loss)
        if reading.verdict in ACT:
            break
    assert reading.verdict is Verdict.DRIFT
    assert 2000 < step < 3500
    assert detector.first_suspect_step is None
    assert re.search("has (grown|shifted)", reading.reason)


@pytest.mark.parametrize("steps", [100, 300, 1000, 3000, 10_000, 25_000])
def test_growth_without_end_is_told_before_it_is_ten_times_the_best(steps):
    at = 3000
    k = np.arange(at + 4 * steps)
    rng = np.random.default_rng(steps)
    level = (0.1 + 1 / (1 + k / 300) ** 0.5) * np.exp(np.maximum(k - at, 0) / steps)
    where, _ = first_action(read(Detector(), (level * rng.lognormal(0, 0.15, len(k))).tolist()))
    assert where >= at
    assert level[where] < 10 * level.min()


@pytest.mark.parametrize(("factor", "noise"), [(1.4, 0.01), (1.4, 0.03), (1.4, 0.1), (2.0, 0.3)])
def test_a_level_that_has_shifted_for_good_is_told_within_a_hundred_steps(factor, noise):
    for seed in range(5):
        losses = 2.3 * np.random.default_rng(seed).lognormal(0, noise, 1200)
        losses[1000:] *= factor
        where, _ = first_action(read(Detector(), losses.tolist()))
        assert 1000 <= where < 1100


@pytest.mark.parametrize(("classes", "level"), [(10, 0.5), (10, 1.6), (1000, 5.0), (50_000, 8.0)])
def test_a_collapse_to_chance_is_told(classes, level):
    rng = np.random.default_rng(0)
    losses = np.where(
        np.arange(1500) < 1000, level * rng.lognormal(0, 0.1, 1500), np.log(classes) * rng.normal(1, 0.01, 1500)
    )
    where, _ = first_action(read(Detector(), losses.tolist()))
    assert 1000 <= where < 1100


def test_flagged_losses_stay_out_of_the_window_and_the_suspect_run_ends_after_eight_calm_steps():
    detector = Detector()
    read(detector, clean("constant", 100))
    before = detector.state_dict()["window"]
    assert detector.observe(100, 9.0).verdict is Verdict.SUSPECT
    assert detector.state_dict()["window"] == before
    for step in range(101, 108):
        assert detector.observe(step, 0.5).verdict is Verdict.CALM
        assert detector.first_suspect_step == 100
    detector.observe(108, 0.5)
    assert detector.first_suspect_step is None


def test_frequent_harmless_outliers_become_part_of_what_is_normal():
    detector = Detector()
    readings = read(detector, clean("near interpolation"))
    late = [r.verdict for r in readings[-1000:]]
    assert late.count(Verdict.CALM) > 980
    fault = read(detector, [5.0] * 4, 3000)
    assert first_action(fault) is not None


def test_a_batch_of_hard_samples_is_no_spike_where_its_loss_was_expected():
    detector, blind = Detector(), Detector()
    read(detector, clean("noisy", 500))
    read(blind, clean("noisy", 500))
    corrected = [detector.observe(500 + k, 12.0, expected_batch=11.5, expected_all=0.5).verdict for k in range(5)]
    assert set(corrected) == {Verdict.CALM}
    assert Verdict.SPIKE in {blind.observe(500 + k, 12.0).verdict for k in range(5)}
    assert detector.observe(505, 1.0, expected_batch=math.nan, expected_all=0.5).verdict is Verdict.CALM
    assert detector.observe(506, 1.0, expected_batch=1e308, expected_all=-1e308).verdict is Verdict.CALM


def test_an_announced_change_may_double_the_loss():
    for announced in (True, False):
        detector = Detector()
        read(detector, clean("constant", 300))
        if announced:
            detector.announce(300, "restart")
        action = first_action(read(detector, [1.1] * 300, 300))
        assert (action is None) == announced


def test_before_it_is_active_only_three_losses_in_a_row_ten_times_the_highest_are_a_spike():
    assert first_action(read(Detector(), [1.0, 50.0, 60.0, 1.0])) is None  # one loss is no yardstick
    assert first_action(read(Detector(), [1.0, 1.0, 500.0, 1.0, 1.0])) is None
    assert first_action(read(Detector(), [1.0, 1.2, 9.0, 9.0, 9.0, 9.0])) is None
    assert first_action(read(Detector(), [1.0, 1.2, 500.0, 600.0, 400.0])) == (4, Verdict.SPIKE)
    assert first_action(read(Detector(), [0.0, 0.0, 1e-3, 2.0, 3.0, 2.0, 2.0])) is not None


def test_rebaseline_accepts_a_new_level():
    detector = Detector()
    read(detector, [0.5] * 100)
    assert first_action(read(detector, [9.0] * 10, 100)) is not None
    detector.rebaseline()
    assert not detector.active
    assert first_action(read(detector, [9.0] * 500, 110)) is None
    assert first_action(read(detector, [200.0] * 10, 610)) is not None


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 300), st.sampled_from(sorted(CLEAN)))
def test_a_restored_detector_reads_on_exactly_as_the_first_would(cut, kind):
    losses = np.array(clean(kind, 400))
    losses[150::40] += 5 * np.abs(losses[150::40]) + 1
    losses = losses.tolist()
    first, second = Detector(), Detector()
    read(first, losses[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert read(first, losses[cut:], cut) == read(second, losses[cut:], cut)
    assert first.state_dict() == second.state_dict()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=90))
def test_median_and_deviation_agree_with_numpy(values):
    window = SortedWindow(64)
    for value in values:
        window.push(value)
    last = np.array(values[-64:])
    assert window.median() == pytest.approx(np.median(last))
    distances = np.sort(np.abs(last - window.median()))
    assert window.deviation(window.median()) == distances[last.size // 2]


@pytest.mark.parametrize("after", [80, 100, 150])
def test_a_spike_right_after_a_steep_fall_is_found(after):
    rng = np.random.default_rng(after)
    losses = (0.1 + 10 * np.exp(-np.arange(after + 3) / 12)) * rng.lognormal(0, 0.1, after + 3)
    losses[after:] = 4.0
    detector = Detector()
    assert first_action(read(detector, losses.tolist())) == (after + 1, Verdict.SPIKE)
    assert detector.first_suspect_step == after


def test_growth_in_a_young_run_is_told_before_it_is_ten_times_the_level():
    rng, k = np.random.default_rng(0), np.arange(400)
    losses = (0.1 + 10 * np.exp(-k / 12)) * rng.lognormal(0, 0.1, 400) + 0.01 * np.maximum(0, k - 120)
    at, verdict = first_action(read(Detector(), losses.tolist()))
    assert verdict is Verdict.DRIFT
    assert losses[at] < 1.0


def test_a_loss_that_swings_is_told_at_its_first_swings_and_a_rise_beyond_them_again():
    k = np.arange(6000)
    swing = 1 + 0.45 * np.sin(2 * np.pi * k / 400) + 0.02 * np.random.default_rng(1).standard_normal(6000)
    told = [step for step, r in enumerate(read(Detector(), swing.tolist())) if r.verdict in ACT]
    assert len(told) <= 2
    assert not told or max(told) < 1000
    rising = swing + np.maximum(0, k - 3000) / 300
    told = [step for step, r in enumerate(read(Detector(), rising.tolist())) if r.verdict in ACT and step > 3000]
    assert told


@pytest.mark.parametrize("seed", range(3))
def test_a_loss_that_swings_by_factors_near_zero_is_not_told_and_its_return_from_there_is(seed):
    k, rng = np.arange(4000), np.random.default_rng(seed)
    level = 2.3 * np.exp(-k / 60) + 0.02 * np.exp(-k / 2000) * np.exp(1.2 * np.sin(2 * np.pi * k / 300))
    losses = level * rng.lognormal(0, 0.5, k.size)
    detector = Detector()
    assert first_action(read(detector, losses.tolist())) is None
    grown = 0.02 * np.exp(np.arange(2000) / 300) * rng.lognormal(0, 0.5, 2000)
    at, verdict = first_action(read(detector, grown.tolist(), 4000))
    assert verdict is Verdict.DRIFT
    assert np.exp(at / 300) < 10


def test_a_level_that_holds_stands_out_until_it_is_accepted():
    detector, rng = Detector(), np.random.default_rng(0)
    read(detector, rng.lognormal(-1.0, 0.1, 500).tolist())
    held = [detector.observe(500 + k, loss).verdict for k, loss in enumerate(rng.lognormal(1.0, 0.1, 40).tolist())]
    assert set(held[2:]) <= {Verdict.SUSPECT, Verdict.SPIKE}


def test_a_restore_to_before_the_first_level_leaves_the_detector_seeing():
    detector = Detector()
    young = detector.state_dict()
    read(detector, clean("noisy", 300))
    detector.reset_after_rollback(young)
    assert detector.active
    assert first_action(read(detector, [60.0] * 4, 300)) is not None


def test_an_accepted_jump_is_no_news_when_it_comes_again_and_a_larger_one_is():
    detector, rng = Detector(), np.random.default_rng(0)
    told = []
    for step in range(8000):
        level = 2.0 if step % 1000 < 40 and step > 500 else 0.2
        if detector.observe(step, level * rng.lognormal(0, 0.1)).verdict is Verdict.SPIKE:
            told.append(step)
            detector.rebaseline()
    assert 1 <= len(told) <= 4
    assert max(told) < 4000
    assert first_action(read(detector, [50.0] * 4, 8000)) is not None


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    noise=st.sampled_from([0.02, 0.3, 1.0]),
    fall=st.sampled_from([0.0, 0.02, 0.2]),
    outliers=st.sampled_from([0.0, 0.02, 0.2]),
    known=st.booleans(),
)
def test_the_short_way_for_calm_losses_reads_them_as_the_long_way_does(seed, noise, fall, outliers, known):
    rng = np.random.default_rng(seed)
    short, long, taken = Detector(), Detector(), 0
    for step in range(400):
        loss = float(math.exp(-fall * step) * rng.lognormal(0.0, noise) * (40.0 if rng.random() < outliers else 1.0))
        loss = float(rng.choice([loss, -loss, math.nan])) if rng.random() < 0.01 else loss
        excess = float(rng.normal(0.0, 0.3)) if known else math.nan
        if step % 150 == 149:
            short.announce(step, "a test")
            long.announce(step, "a test")
        expected = long.observe(step, loss, expected_batch=excess, expected_all=0.0)
        scores = short.take_calm([loss], [excess], scored=True)
        taken += len(scores)
        reading = Reading(Verdict.CALM, scores[0], "") if scores else None
        if reading is None:
            reading = short.observe(step, loss, expected_batch=excess, expected_all=0.0)
        assert repr(reading) == repr(expected)
        assert repr(short.state_dict()) == repr(long.state_dict())
        assert repr(short.last) == repr(long.last)
    assert taken or noise == 1.0 or outliers == 0.2 or fall == 0.2


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    before=st.integers(16, 150),
    fall=st.sampled_from([0.0, 0.01, 0.05]),
    sign=st.sampled_from([1.0, -1.0]),
    most=st.integers(1, 30),
)
def test_losses_within_the_limits_that_are_known_ahead_are_calm_beyond_doubt(seed, before, fall, sign, most):
    rng, detector = np.random.default_rng(seed), Detector()
    for step in range(before):
        detector.observe(step, float(sign * math.exp(-fall * step) * rng.lognormal(0.0, 0.1)))
    limits, floor = detector.calm_limits(most)
    assert len(limits) <= most
    losses, excesses = [], []
    for limit in reversed(limits):
        excess = float(rng.choice([math.nan, 0.0, rng.normal(0.0, 0.2)]))
        lowest = max(floor, limit - abs(limit) * rng.choice([0.1, 1.0, 100.0]))
        loss = float(rng.choice([limit, lowest, rng.uniform(lowest, max(limit, lowest))]))
        if loss > limit or loss - max(0.0, excess if excess == excess else 0.0) < floor:
            break
        losses.append(loss)
        excesses.append(excess)
    assert len(detector.take_calm(losses, excesses)) == len(losses)
