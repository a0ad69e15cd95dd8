"""Whatever a framework calls a loss is read; what is no loss is refused with a sentence."""

from __future__ import annotations

import importlib
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from learnit_r8.errors import ProtocolError
from learnit_r8.loop.losses import LIMIT, read_losses, read_number


class HasFloat:
    def __init__(self, value):
        self.value = value

    def __float__(self):
        return self.value


class HasArray:
    def __init__(self, value):
        self.value = value

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.value, dtype)


SCALARS = {
    "float": 2.5,
    "int-valued float": 2.5,
    "negative": -2.5,
    "fraction": Fraction(5, 2),
    "decimal": Decimal("2.5"),
    "object with __float__": HasFloat(2.5),
    "numpy float64": np.float64(2.5),
    "numpy float32": np.float32(2.5),
    "numpy float16": np.float16(2.5),
    "numpy longdouble": np.longdouble(2.5),
    "numpy 0-d": np.array(2.5),
    "object with 0-d __array__": HasArray(2.5),
    "torch 0-d": torch.tensor(2.5),
    "torch 0-d with grad": torch.tensor(2.5, requires_grad=True) * 1,
    "torch bf16": torch.tensor(2.5, dtype=torch.bfloat16),
    "torch fp16": torch.tensor(2.5, dtype=torch.float16),
    "torch float64": torch.tensor(2.5, dtype=torch.float64),
    "torch parameter": torch.nn.Parameter(torch.tensor(2.5)),
}


@pytest.mark.parametrize("name", SCALARS)
def test_one_number_for_the_batch_is_read(name):
    reported = read_losses(SCALARS[name], 4)
    assert reported.values is None
    assert abs(reported.mean) == 2.5
    assert type(reported.mean) is float
    assert reported.finite


@pytest.mark.parametrize(
    "whole", [3, np.int8(3), np.uint64(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.uint8)]
)
def test_whole_numbers_are_numbers(whole):
    assert read_losses(whole, 4)[:2] == (None, 3.0)


VALUES = [0.5, 1.0, 2.0, 4.5]
ARRAYS = {
    "list": VALUES,
    "tuple": tuple(VALUES),
    "list of numpy scalars": [np.float32(value) for value in VALUES],
    "list of 0-d tensors with grad": [torch.tensor(value, requires_grad=True) for value in VALUES],
    "float64": np.array(VALUES),
    "float16": np.array(VALUES, np.float16),
    "big-endian": np.array(VALUES, ">f4"),
    "longdouble": np.array(VALUES, np.longdouble),
    "not contiguous": np.repeat(np.array(VALUES), 2)[::2],
    "reversed": np.array(VALUES[::-1])[::-1],
    "read-only": np.frombuffer(np.array(VALUES).tobytes()),
    "object with __array__": HasArray(VALUES),
    "torch": torch.tensor(VALUES),
    "torch with grad": torch.tensor(VALUES, requires_grad=True) * 1,
    "torch leaf with grad": torch.tensor(VALUES, requires_grad=True),
    "torch bf16 with grad": torch.tensor(VALUES, dtype=torch.bfloat16, requires_grad=True),
    "torch fp16": torch.tensor(VALUES, dtype=torch.float16),
    "torch not contiguous": torch.tensor([VALUES, VALUES]).t()[:, 0],
    "torch negative view": torch.tensor([-value for value in VALUES]).neg(),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_one_number_per_sample_is_read(name):
    reported = read_losses(ARRAYS[name], 4)
    np.testing.assert_array_equal(reported.values, np.array(VALUES, np.float32))
    assert reported.values.dtype == np.float32
    assert reported.mean == 2.0
    assert reported.finite


@pytest.mark.parametrize("whole", [[0, 1, 2], np.array([0, 1, 2], np.uint8), np.arange(3), torch.arange(3)])
def test_whole_numbers_per_sample_are_numbers(whole):
    np.testing.assert_array_equal(read_losses(whole, 3).values, [0, 1, 2])


@pytest.mark.parametrize("framework", ["jax", "tensorflow", "pandas"])
def test_arrays_of_other_frameworks_are_read(framework):
    try:
        module = importlib.import_module("jax.numpy" if framework == "jax" else framework)
    except ImportError:
        pytest.skip(f"{framework} is not installed here")
    make = {"jax": "asarray", "tensorflow": "constant", "pandas": "Series"}
    array = getattr(module, make[framework])(VALUES)
    np.testing.assert_array_equal(read_losses(array, 4).values, np.array(VALUES, np.float32))


def test_jax_scalars_and_bfloat16_are_read():
    jnp = pytest.importorskip("jax.numpy", reason="jax is not installed here")
    assert read_losses(jnp.float32(2.5), 4)[:2] == (None, 2.5)
    assert read_losses(jnp.bfloat16(2.5), 4)[:2] == (None, 2.5)
    values = read_losses(jnp.asarray(VALUES, jnp.bfloat16), 4).values
    np.testing.assert_array_equal(values, np.array(VALUES, np.float32))


def test_a_report_of_the_users_array_is_a_copy():
    mine = np.array(VALUES, np.float32)
    reported = read_losses(mine, 4)
    mine[:] = 0
    np.testing.assert_array_equal(reported.values, np.array(VALUES, np.float32))


def test_a_tensors_graph_is_left_alone():
    weights = torch.tensor(VALUES, requires_grad=True)
    losses = weights**2
    read_losses(losses, 4)
    losses.sum().backward()
    np.testing.assert_array_equal(weights.grad, 2 * np.array(VALUES))


NONFINITE = [math.nan, math.inf, -math.inf, 1e300, -1e300, 1.1 * LIMIT, 10**400, -(10**400)]


@pytest.mark.parametrize("value", NONFINITE, ids=[str(value)[:8] for value in NONFINITE])
def test_what_is_not_finite_is_read_as_such_and_not_refused(value):
    assert not read_losses(value, 4).finite


@pytest.mark.parametrize("position", [0, 1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300, 1.1 * LIMIT])
def test_one_bad_element_makes_the_report_not_finite(value, position):
    losses = list(VALUES)
    losses[position] = value
    assert not read_losses(losses, 4).finite
    assert not read_losses(np.array(losses), 4).finite
    assert not read_losses(torch.tensor(losses, dtype=torch.float64), 4).finite


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_not_finite_in_any_precision(dtype):
    for value in (math.nan, math.inf):
        assert not read_losses(torch.tensor(value, dtype=dtype), 1).finite
        assert not read_losses(torch.tensor([1.0, value], dtype=dtype), 2).finite


@given(
    hnp.arrays(st.sampled_from([np.float16, np.float32, np.float64]), st.integers(1, 40), elements=st.floats(width=16))
)
def test_finite_means_that_every_element_is(losses):
    reported = read_losses(losses, len(losses))
    assert reported.finite == bool(np.isfinite(losses).all())
    if reported.finite:
        assert reported.mean == pytest.approx(losses.astype(np.float64).mean(), abs=1e-9)


@given(st.lists(st.floats(-LIMIT, LIMIT), min_size=1, max_size=20))
def test_everything_within_the_limit_is_finite(losses):
    assert read_losses(losses, len(losses)).finite


NO_LOSS = {
    "None": None,
    "string": "0.5",
    "bytes": b"0.5",
    "True": True,
    "numpy bool": np.True_,
    "torch bool": torch.tensor(True),
    "complex": 1 + 2j,
    "numpy complex": np.complex64(1),
    "torch complex": torch.tensor(1j),
    "dict": {"loss": 0.5},
    "set": {0.5},
    "object": object(),
    "function": print,
    "generator": (x for x in VALUES),
    "2-D list": [[1.0], [2.0], [3.0], [4.0]],
    "2-D array": np.ones((4, 1)),
    "2-D tensor": torch.ones(1, 4),
    "3-D": np.ones((4, 1, 1)),
    "ragged list": [[1.0], [2.0, 3.0]],
    "list of strings": ["a", "b", "c", "d"],
    "list of None": [None, 1.0, 2.0, 3.0],
    "list with bools": [True, 1.0, 2.0, 3.0],
    "bool array": np.ones(4, bool),
    "bool tensor": torch.ones(4, dtype=torch.bool),
    "complex array": np.ones(4, complex),
    "complex tensor": torch.ones(4, dtype=torch.complex64),
    "object array": np.array([1.0, None, 2.0, 3.0], object),
    "string array": np.array(["1", "2", "3", "4"]),
    "dates": np.zeros(4, "M8[s]"),
    "durations": np.zeros(4, "m8[s]"),
    "records": np.zeros(4, [("a", "f4")]),
}


@pytest.mark.parametrize("name", NO_LOSS)
def test_what_is_no_loss_is_refused_with_what_came_and_what_was_expected(name):
    with pytest.raises(TypeError, match="a loss is a number, or a 1-D array with one number per sample"):
        read_losses(NO_LOSS[name], 4)


@pytest.mark.parametrize("losses", [[], [1.0], [1.0] * 3, [1.0] * 5, np.ones(3), torch.ones(5)])
def test_another_length_is_refused_with_both_lengths(losses):
    with pytest.raises(ProtocolError, match=rf"the batch has 4 samples, but {len(losses)} losses came"):
        read_losses(losses, 4)


def test_a_long_value_is_shortened_in_the_message():
    with pytest.raises(TypeError) as caught:
        read_losses({"x" * 10_000: 1}, 4)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("empty", [torch.empty(3, device="meta"), torch.ones(3).to_sparse()], ids=["meta", "sparse"])
def test_a_tensor_without_numbers_to_read_is_refused_as_no_loss(empty):
    with pytest.raises(TypeError, match="one number per sample of the batch, got a tensor that holds none"):
        read_losses(empty, 3)


def test_a_text_is_no_number_to_log():
    with pytest.raises(TypeError, match=r"log\(val_loss=\.\.\.\) takes one number, such as its mean, got str '0.3'"):
        read_number("val_loss", "0.3")
