import math
import warnings

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers.optimization import get_wsd_schedule

from learnit_r8.errors import ConfigError
from learnit_r8.schedules import (
    learning_rate,
    make_schedule,
    polynomial,
    restarts,
    schedule_names,
    stable_then_decay,
    with_warmup,
)

PEAK = 0.3
SIZES = [(100, 0), (100, 10), (57, 6), (20, 20), (10, 9), (2, 1), (1, 0), (1000, 333)]
TOLERANCE = 1e-12
DECAYING = [name for name in schedule_names() if not name.startswith("constant")]


def optimizer(lr=PEAK):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates(scheduler, total):
    """The LR at each step of a torch or transformers scheduler."""
    values = []
    for _ in range(total):
        values.append(scheduler.get_last_lr()[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # stepping before the optimizer, and past the end
            scheduler.step()
    return np.array(values)


def ours(mode, total, warmup, peak=PEAK, min_lr=0.0):
    schedule = make_schedule(mode, warmup / total)
    return np.array([learning_rate(schedule(t, total), peak, min_lr) for t in range(total)])


def assert_agrees_with_transformers(mine, theirs, warmup, peak=PEAK, floor=0.0):
    np.testing.assert_allclose(mine[warmup:], theirs[warmup:], rtol=0, atol=TOLERANCE)
    # theirs at t is t / W; ours is one step ahead, and above the floor
    if warmup > 1:
        rise = mine[: warmup - 1]
        expected = floor + (peak - floor) * theirs[1:warmup] / peak
        np.testing.assert_allclose(rise, expected, rtol=0, atol=TOLERANCE)
    if warmup:
        assert mine[warmup - 1] == peak


@pytest.mark.parametrize(("total", "warmup"), SIZES)
@pytest.mark.parametrize(
    "name", ["linear", "cosine", "cosine_with_restarts", "constant", "constant_with_warmup", "inverse_sqrt"]
)
def test_names_agree_with_transformers_get_scheduler_at_every_step(name, total, warmup):
    theirs = rates(transformers.get_scheduler(name, optimizer(), warmup, total), total)
    mine = ours(name, total, warmup)
    if name == "constant":
        np.testing.assert_array_equal(mine, theirs)
    else:
        assert_agrees_with_transformers(mine, theirs, warmup)


@pytest.mark.parametrize(("total", "warmup"), SIZES)
def test_cosine_with_min_lr_agrees_with_transformers_where_min_lr_is_the_floor(total, warmup):
    settings = {"min_lr": 0.02}
    theirs = rates(transformers.get_scheduler("cosine_with_min_lr", optimizer(), warmup, total, settings), total)
    mine = ours("cosine_with_min_lr", total, warmup, min_lr=0.02)
    assert_agrees_with_transformers(mine, theirs, warmup, floor=0.02)


@pytest.mark.parametrize("power", [1, 2, 0.5])
@pytest.mark.parametrize(("total", "warmup"), [size for size in SIZES if size[0] > size[1]])
def test_polynomial_agrees_with_transformers_where_lr_end_is_min_lr(total, warmup, power):
    settings = {"power": power, "lr_end": 1e-7}
    theirs = rates(transformers.get_scheduler("polynomial", optimizer(), warmup, total, settings), total)
    mode = "polynomial" if power == 1 else polynomial(power)
    assert_agrees_with_transformers(ours(mode, total, warmup, min_lr=1e-7), theirs, warmup, floor=1e-7)


@pytest.mark.parametrize("cycles", [2, 3, 5])
@pytest.mark.parametrize(("total", "warmup"), SIZES)
def test_restarts_agree_with_transformers_for_any_number_of_cycles(total, warmup, cycles):
    settings = {"num_cycles": cycles}
    theirs = rates(transformers.get_scheduler("cosine_with_restarts", optimizer(), warmup, total, settings), total)
    assert_agrees_with_transformers(ours(restarts(cycles), total, warmup), theirs, warmup)


@pytest.mark.parametrize(("total", "warmup", "share"), [(100, 0, 0.2), (100, 10, 0.2), (57, 7, 0.1), (40, 40, 0.2)])
def test_warmup_stable_decay_agrees_with_transformers_for_the_same_number_of_decay_steps(total, warmup, share):
    decay = round((total - warmup) * share)
    theirs = rates(get_wsd_schedule(optimizer(), warmup, decay, total, min_lr_ratio=0.0), total)
    mode = "warmup_stable_decay" if share == 0.2 else stable_then_decay(share)
    assert_agrees_with_transformers(ours(mode, total, warmup), theirs, warmup)


@pytest.mark.parametrize("total", [1, 2, 10, 57, 1000])
@pytest.mark.parametrize("min_lr", [0.0, 0.01])
def test_cosine_agrees_with_torch_cosine_annealing_and_its_eta_min(total, min_lr):
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer(), total, eta_min=min_lr)
    # torch computes each value from the last one, so rounding adds up: compare its closed form
    theirs_closed = []
    for t in range(total):
        theirs.last_epoch = t
        theirs_closed.append(theirs._get_closed_form_lr()[0])
    np.testing.assert_allclose(ours("cosine", total, 0, min_lr=min_lr), theirs_closed, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("cycles", [1, 2, 5])
def test_restarts_agree_with_torch_warm_restarts(cycles):
    theirs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer(), T_0=100 // cycles, eta_min=0.01)
    np.testing.assert_allclose(ours(restarts(cycles), 100, 0, min_lr=0.01), rates(theirs, 100), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_polynomial_agrees_with_torch_polynomial_lr(power):
    theirs = torch.optim.lr_scheduler.PolynomialLR(optimizer(), total_iters=80, power=power)
    np.testing.assert_allclose(ours(polynomial(power), 80, 0), rates(theirs, 80), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("total", "warmup"), [(100, 10), (57, 6), (10, 9)])
def test_linear_agrees_with_torch_linear_warmup_then_linear_decay(total, warmup):
    sgd = optimizer()
    rise = torch.optim.lr_scheduler.LinearLR(sgd, 1 / warmup, 1.0, total_iters=warmup - 1)
    fall = torch.optim.lr_scheduler.LinearLR(sgd, 1.0, 0.0, total_iters=total - warmup)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR passes an epoch number itself, which torch deprecates
        theirs = rates(torch.optim.lr_scheduler.SequentialLR(sgd, [rise, fall], milestones=[warmup]), total)
    np.testing.assert_allclose(ours("linear", total, warmup), theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("total", [1, 3, 7, 100, 999])
@pytest.mark.parametrize("rise", [0.0, 0.1, 0.3, 0.5])
def test_one_cycle_agrees_with_torch_at_every_step(total, rise):
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer(), max_lr=PEAK, total_steps=total, pct_start=rise, cycle_momentum=False
    )
    schedule = make_schedule("one_cycle", rise)
    mine = [learning_rate(schedule(t, total), PEAK) for t in range(total)]
    np.testing.assert_allclose(mine, rates(theirs, total), rtol=0, atol=TOLERANCE)


def test_one_cycle_with_a_rise_of_one_step_starts_at_the_peak_where_torch_divides_by_zero():
    assert make_schedule("one_cycle", 0.5)(0, 2) == 1.0


proportions = st.floats(0, 1)
totals = st.one_of(st.integers(1, 10**6), st.floats(0, 1e9))


@given(st.sampled_from(schedule_names()), proportions, totals, st.floats(-1, 3), st.floats(1e-9, 10), st.floats(0, 1))
def test_every_position_has_a_factor_in_0_1_and_a_rate_between_floor_and_peak(
    name, warmup, total, position, peak, share
):
    factor = make_schedule(name, warmup)(position * total, total)
    assert 0.0 <= factor <= 1.0
    assert peak * share <= learning_rate(factor, peak, peak * share) <= peak


@given(st.sampled_from(DECAYING), proportions, st.integers(1, 2000))
def test_no_step_is_wasted_at_a_rate_of_zero_and_the_curve_rises_then_falls(name, warmup, total):
    factors = np.array([make_schedule(name, warmup)(t, total) for t in range(total)])
    assert factors[0] > 0
    assert (factors > 0).all()
    top = int(factors.argmax())
    assert (np.diff(factors[: top + 1]) >= 0).all()
    assert (np.diff(factors[top:]) <= 0).all()


@given(st.sampled_from(schedule_names()), proportions, st.floats(1, 1e5), st.floats(0, 1e5))
def test_past_the_end_the_last_value_is_kept(name, warmup, total, beyond):
    schedule = make_schedule(name, warmup)
    assert schedule(total + beyond, total) == schedule(total, total)


@pytest.mark.parametrize("name", DECAYING)
def test_edges_are_defined(name):
    for warmup, total in [(0, 1), (1, 1), (1, 50), (0.02, 50), (0, 0), (0.5, 0.4), (1, 3.5)]:
        schedule = make_schedule(name, warmup)
        for t in (0, 0.3, total / 2, max(total - 1, 0), total, total + 7):
            assert math.isfinite(schedule(t, total))


@given(proportions, st.integers(1, 500))
def test_a_function_is_the_whole_curve_without_warmup_and_the_rest_with_it(proportion, total):
    seen = []
    schedule = make_schedule(lambda p: seen.append(p) or 0.25, proportion)
    seen.clear()
    factors = [schedule(t, total) for t in range(total)]
    warmup = round(proportion * total)
    assert factors[:warmup] == [(t + 1) / warmup for t in range(warmup)]
    assert factors[warmup:] == [0.25] * (total - warmup)
    assert seen == [(t - warmup) / (total - warmup) for t in range(warmup, total)]


def test_a_function_that_leaves_0_1_is_clipped():
    schedule = make_schedule(lambda p: 3 * p - 1, 0.0)
    assert [schedule(t, 4) for t in range(4)] == [0.0, 0.0, 0.5, 1.0]


@pytest.mark.parametrize("value", [np.float32(0.5), np.array(0.5), torch.tensor(0.5), True, 1])
def test_a_function_may_give_any_kind_of_number(value):
    assert make_schedule(lambda p: value, 0.0)(0, 10) == float(value)


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "0.5", 1j, [0.1, 0.2], 10**400])
def test_a_function_that_gives_no_finite_number_is_an_error_that_names_progress_and_value(value):
    schedule = make_schedule(lambda p: 1.0 if p < 0.5 else value, 0.0)
    assert schedule(4, 10) == 1.0
    with pytest.raises(ConfigError, match=r"finite number.*progress 0\.5 it gave") as caught:
        schedule(5, 10)
    assert repr(value) in str(caught.value)
    with pytest.raises(ConfigError, match=r"progress 0\.0"):
        make_schedule(lambda p: value, 0.0)


def test_a_function_with_a_wrong_signature_is_found_at_once():
    with pytest.raises(ConfigError, match=r"function of one number.*TypeError"):
        make_schedule(lambda step, total: 1.0, 0.1)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("cosin", "cosine"),
        ("Linear", "linear"),
        ("one-cycle", "one_cycle"),
        ("warmup stable decay", "warmup_stable_decay"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_and_all_others(wrong, meant):
    with pytest.raises(ConfigError, match=f"did you mean '{meant}'") as caught:
        make_schedule(wrong, 0.1)
    assert all(name in str(caught.value) for name in schedule_names())


def test_a_name_like_no_other_gets_no_suggestion():
    with pytest.raises(ConfigError, match=r"got 'zzz'$"):
        make_schedule("zzz", 0.1)


@pytest.mark.parametrize("proportion", [-0.1, 1.1, math.nan, math.inf, None, "0.1", True, 1j])
def test_a_bad_mode_and_a_bad_proportion_are_reported_together(proportion):
    with pytest.raises(ConfigError) as caught:
        make_schedule(7, proportion)
    assert [problem.split()[0] for problem in caught.value.problems] == ["scheduler_mode", "warmup_proportion"]


@pytest.mark.parametrize("shape", [restarts, polynomial, stable_then_decay])
def test_shapes_refuse_parameters_that_define_no_curve(shape):
    with pytest.raises(ConfigError, match="got 0"):
        shape(0)


def test_names_may_be_members_of_the_transformers_enum():
    assert make_schedule(transformers.SchedulerType.COSINE, 0.0)(5, 10) == pytest.approx(0.5)


def test_shapes_compose_with_warmup_without_a_name():
    schedule = with_warmup(0.5, lambda p: 1 - p * p)
    assert [schedule(t, 4) for t in range(5)] == [0.5, 1.0, 1.0, 0.75, 0.0]


def test_the_table_in_the_docstring_lists_every_name():
    import learnit_r8.schedules.curves as module

    listed = {line.split()[0] for line in module.__doc__.splitlines() if line and line[0].isalpha() and "  " in line}
    assert listed - {"name"} == set(schedule_names())
