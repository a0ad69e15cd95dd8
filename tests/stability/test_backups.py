"""Backups are true deep copies, cheap, and used only when later losses have proved them."""

from __future__ import annotations

import collections
import copy
import dataclasses
import tracemalloc
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from learnit_r8.stability.backups import BackupRing, BackupStatus, chosen_interval
from learnit_r8.stability.tree_copy import CopyPlan, all_finite


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass(frozen=True)
class Frozen:
    weights: Any
    name: str = "frozen"


@dataclasses.dataclass(slots=True)
class Slotted:
    weights: Any


class Opaque:
    def __init__(self, array):
        self.array = array


class Uncopyable:
    def __deepcopy__(self, memo):
        raise RuntimeError("cannot be copied")


def copy_of(tree):
    return CopyPlan(tree).fill().tree


def proved(ring, step, calm=8):
    return [info for k in range(calm) for info in ring.healthy(step + k)]


def arrays_of(tree):
    if isinstance(tree, (np.ndarray, torch.Tensor)):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from arrays_of(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from arrays_of(value)
    elif dataclasses.is_dataclass(tree):
        for field in dataclasses.fields(tree):
            yield from arrays_of(getattr(tree, field.name))
    elif isinstance(tree, Opaque):
        yield tree.array


def equal(a, b):
    left, right = list(arrays_of(a)), list(arrays_of(b))
    assert len(left) == len(right)
    for x, y in zip(left, right, strict=True):
        assert type(x) is type(y)
        assert x.dtype == y.dtype
        assert tuple(x.shape) == tuple(y.shape)
        if isinstance(x, torch.Tensor):
            assert torch.equal(torch.nan_to_num(x.detach()), torch.nan_to_num(y))
        else:
            np.testing.assert_array_equal(x, y)


leaves = st.one_of(
    hnp.arrays(
        st.sampled_from(["f4", "f8", "f2", "i8", "u1", "?", "c8", "U3", "M8[s]"]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    ),
    hnp.arrays("f4", (3, 4)).map(np.asfortranarray),
    hnp.arrays("f4", (3, 4)).map(lambda a: a[::-1, ::2]),
    hnp.arrays("f4", (3, 4)).map(lambda a: torch.from_numpy(a).to(torch.bfloat16)),
    hnp.arrays("f4", (3, 4)).map(torch.from_numpy).map(lambda t: t.T),
    hnp.arrays("f4", (2,)).map(Opaque),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.none(),
)
trees = st.recursive(
    leaves,
    lambda children: st.one_of(
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), children, max_size=3),
        st.builds(Pair, children, children),
        st.builds(Frozen, children),
        st.builds(Slotted, children),
        st.dictionaries(st.text(max_size=3), children, max_size=3).map(collections.OrderedDict),
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(trees)
def test_a_copy_equals_what_deepcopy_gives_and_shares_no_memory(tree):
    result = copy_of(tree)
    assert repr(type(result)) == repr(type(copy.deepcopy(tree)))
    equal(tree, result)
    for x, y in zip(arrays_of(tree), arrays_of(result), strict=True):
        if isinstance(x, np.ndarray):
            assert not np.may_share_memory(x, y)
        elif x.numel():
            assert x.data_ptr() != y.data_ptr()


@settings(max_examples=60, deadline=None)
@given(trees, trees)
@example(
    [np.zeros(3), np.ones(3), torch.zeros(2), torch.ones(2)], [np.full(3, 2.0), np.full(3, 3.0), torch.full((2,), 4.0)]
)
def test_recycled_buffers_of_any_other_tree_do_not_disturb_a_copy(first, second):
    pool = CopyPlan(first).fill().pool
    equal(second, CopyPlan(second, pool).fill().tree)


def test_tied_arrays_stay_tied_in_the_backup_and_in_what_is_restored():
    weight = torch.ones(3, 2)
    flat = np.arange(12.0)
    tree = {
        "embedding": weight, "head": weight.view(3, 2), "transposed": weight.T,
        "flat": flat, "first": flat[:4], "last": flat[:3:-1].reshape(2, 4), "apart": flat.copy(),
        "array": torch.ones(2), "list": [],
    }  # fmt: skip
    tree["numpy"] = tree["array"].numpy()
    tree["again"] = tree["list"]
    ring = BackupRing()
    ring.take(tree, 0)
    _, out = ring.restore()
    equal(tree, out)
    out["embedding"][0, 1] = 7.0
    assert out["head"][0, 1] == 7.0
    assert out["transposed"][1, 0] == 7.0
    out["flat"][0], out["flat"][11] = -1.0, -2.0
    assert out["first"][0] == -1.0
    assert out["last"][0, 0] == -2.0
    assert out["apart"][0] == 0.0
    out["array"][1] = 5.0
    assert out["numpy"][1] == 5.0
    assert out["again"] is out["list"]


def test_views_of_one_allocation_at_odd_offsets_are_copied_byte_for_byte():
    raw = np.arange(67, dtype=np.uint8)
    tree = [raw, raw[3:35].view("f4"), raw[1:9].view("i8"), torch.from_numpy(raw)[8:16].view(torch.int32)]
    equal(tree, copy_of(tree))


def test_containers_that_hold_themselves_are_copied():
    tree: dict[str, Any] = {"weights": np.ones(2)}
    tree["self"] = tree
    result = copy_of(tree)
    assert result["self"] is result
    assert result is not tree


def test_attributes_of_dict_subclasses_are_copied_and_not_shared():
    model = torch.nn.Linear(2, 2)
    state = model.state_dict()
    result = copy_of(state)
    assert type(result) is type(state)
    assert result._metadata == state._metadata
    assert result._metadata is not state._metadata
    table = collections.defaultdict(list, a=[np.zeros(1)])
    assert copy_of(table)["missing"] == []


def test_tensors_that_need_gradients_sparse_ones_and_modules_are_copied():
    w = torch.ones(2, requires_grad=True)
    product = w * 2
    sparse = torch.eye(3).to_sparse()
    tree = {"w": w, "product": product, "sparse": sparse, "module": torch.nn.Linear(2, 1)}
    result = copy_of(tree)
    assert not result["w"].requires_grad
    assert torch.equal(result["product"], product.detach())
    assert torch.equal(result["sparse"].to_dense(), torch.eye(3))
    assert result["module"].weight.data_ptr() != tree["module"].weight.data_ptr()


def test_a_real_optimizer_goes_back_to_exactly_where_it_was():
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    x = torch.randn(8, 5)

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        return model.weight.detach().clone()

    train(3)
    ring = BackupRing()
    ring.take({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, 0)
    expected = train(4)
    _, state = ring.restore()
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    assert torch.equal(train(4), expected)


def test_changing_the_source_or_a_restored_copy_never_changes_the_backup():
    source = {"w": np.ones(4), "nested": [np.ones(2)]}
    ring = BackupRing()
    ring.take(source, 0)
    source["w"][:] = 5
    source["nested"].append(1)
    _, first = ring.restore()
    first["w"][:] = np.nan
    _, second = ring.restore()
    assert second["w"].tolist() == [1.0] * 4
    assert len(second["nested"]) == 1


def test_a_full_ring_takes_backups_without_allocating():
    state = {"a": np.ones(1 << 19, np.float32), "b": [np.ones((512, 512), np.float64), np.zeros(3, np.float16)]}
    ring = BackupRing()
    for step in range(3):
        ring.take(state, step)
    proved(ring, 3)

    def addresses():
        return {array.ctypes.data for slot in ring._slots for _, array in slot.copy.arrays}

    known = addresses()
    tracemalloc.start()
    try:
        for step in range(4, 9):
            ring.take(state, step)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 0.1 * state["a"].nbytes  # stretches of an array that are compared with those of the last backup
    assert addresses() == known


@pytest.mark.parametrize("order", ["C", "F"])
def test_each_buffer_is_an_allocation_of_its_own_in_the_layout_of_its_source(order, tmp_path):
    """Framework code saves, views and resizes what it is given back: no tensor may drag its neighbours along."""
    rng = np.random.default_rng(0)
    state = {f"n{k}": np.asarray(rng.normal(size=(3, k)), order=order) for k in range(5)}
    state |= {f"t{k}": torch.randn(k, 3).t() if order == "F" else torch.randn(3, k) for k in range(5)}
    state |= {"b": torch.randn(7).bfloat16(), "gap": torch.randn(9)[::2], "scalar": torch.tensor(2.5)}
    ring = BackupRing()
    ring.take(state, 0)
    back = ring.restore()[1]
    for name, array in back.items():
        assert array.dtype == state[name].dtype
        assert array.tolist() == state[name].tolist()
        if isinstance(array, torch.Tensor):
            assert array.stride() == state[name].stride() or name == "gap"
            assert array.untyped_storage().nbytes() == array.nbytes
            assert array.data_ptr() % 64 == 0
        else:
            assert array.strides == state[name].strides
            assert array.flags.writeable
    torch.save({name: array for name, array in back.items() if name.startswith("t")}, tmp_path / "t.pt")
    assert (tmp_path / "t.pt").stat().st_size < 5000
    back["t4"].add_(1)
    assert torch.equal(back["t3"], state["t3"])


def test_tensor_buffers_are_reused_too():
    state = {"w": torch.ones(64), "flat": torch.ones(8)}
    state["view"] = state["flat"][2:]
    ring = BackupRing()

    def addresses():
        return {t.data_ptr() for slot in ring._slots for _, t in slot.copy.arrays}

    for step in range(3):
        ring.take(state, step)
    known = addresses()
    for step in range(3, 30):
        ring.take(state, step)
        ring.healthy(step)
        assert addresses() == known


@pytest.mark.parametrize("wanted", [20, 10, 0])
def test_a_copy_that_fails_leaves_the_ring_as_it_was(wanted):
    ring = BackupRing()
    for step in (0, 10, 20):
        ring.take({"w": np.full(3, step)}, step)
        proved(ring, step)
    before = ring.backups
    with pytest.raises(RuntimeError, match="cannot be copied"):
        ring.take({"w": np.full(3, 99), "x": Uncopyable()}, 30)
    assert ring.backups == before
    info, state = ring.restore(before_step=wanted + 1)
    assert info.step == wanted
    assert state["w"].tolist() == [wanted] * 3


def test_a_candidate_is_never_restored_and_eight_calm_losses_prove_it():
    ring = BackupRing()
    ring.take([np.ones(1)], 5)
    assert ring.find() is None
    with pytest.raises(LookupError, match="no verified backup"):
        ring.restore()
    assert ring.healthy(4) == ()
    decided = [ring.healthy(5 + k) for k in range(8)]
    assert [len(d) for d in decided] == [0] * 7 + [1]
    assert decided[-1][0].status is BackupStatus.VERIFIED
    assert ring.restore()[0].step == 5
    assert ring.find(before_step=5) is None


def test_the_initial_state_is_eligible_without_proof_even_for_a_fault_at_step_0():
    ring = BackupRing()
    ring.take([np.ones(1)], 0)
    assert ring.restore(before_step=0)[0].step == 0
    resumed = BackupRing()
    resumed.take([np.ones(1)], 500, initial=True)
    assert resumed.restore(before_step=500)[0].step == 500


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "c8", "c16", "bf16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_nonfinite_number_anywhere_discards_a_backup(dtype, value):
    bad = np.ones(200_001, "f4" if dtype == "bf16" else dtype)
    good = bad.copy()
    bad[-1] = value
    if dtype == "bf16":
        good, bad = torch.from_numpy(good).bfloat16(), torch.from_numpy(bad).bfloat16()
    assert all_finite(good)
    ring = BackupRing()
    ring.take({"w": good}, 0)
    ring.take({"w": bad}, 1)
    decided = proved(ring, 1)
    assert [(i.step, i.status) for i in decided] == [(0, BackupStatus.VERIFIED), (1, BackupStatus.DISCARDED)]
    assert [i.step for i in ring.backups] == [0]


def test_the_scan_is_exact_where_sums_cancel_or_overflow():
    assert not all_finite(np.array([np.inf, -np.inf], np.float32))
    assert all_finite(np.full(1000, 3e38, np.float32))
    assert all_finite(np.full(1000, 65504, np.float16))
    assert all_finite(np.zeros((0, 3)))
    assert all_finite(np.array(2.0, np.float32))
    assert all_finite(torch.full((9,), 448.0).to(torch.float8_e4m3fn))
    assert all_finite(np.arange(3))
    assert not all_finite(np.full((40, 40), np.nan)[::3, ::7])


def test_a_mask_of_minus_infinity_that_was_there_from_the_first_is_no_fault():
    state = {"mask": np.full((2, 2), -np.inf), "w": np.ones(2)}
    ring = BackupRing()
    ring.take(state, 0)
    ring.take(state, 1)
    ring.take({**state, "w": np.array([1, np.inf])}, 2)
    assert {(i.step, str(i.status)) for i in proved(ring, 2)} == {(0, "verified"), (1, "verified"), (2, "discarded")}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["take", "calm", "suspect", "bad"]), max_size=120))
def test_once_there_was_a_verified_backup_there_always_is_one(events):
    ring, ever = BackupRing(), False
    state = [np.ones(2)]
    ring.take(state, 0)
    for step, event in enumerate(events, start=1):
        if event == "take":
            ring.take(state, step)
        elif event == "bad":
            ring.take([np.array([1.0, np.nan])], step)
        elif event == "calm":
            ring.healthy(step)
        verified = [i for i in ring.backups if i.status is BackupStatus.VERIFIED]
        ever = ever or bool(verified)
        assert bool(verified) == ever
        assert len(ring.backups) <= 3
        assert [i.step for i in ring.backups] == sorted(i.step for i in ring.backups)


def test_a_backup_at_every_step_still_yields_fresh_verified_ones():
    ring = BackupRing()
    for step in range(200):
        ring.take([np.full(1, step)], step)
        ring.healthy(step)
        found = ring.find()
        assert found is not None
        assert step - found.step <= 16 or step < 16


def test_a_restore_takes_the_memory_of_a_backup_that_is_of_no_more_use():
    ring = BackupRing()
    for step in (0, 10, 20):
        ring.take({"w": np.full(1 << 16, step, np.float32)}, step)
        proved(ring, step)
    later = ring._slots[2].copy.tree["w"]
    first, a = ring.restore(before_step=20)
    second, b = ring.restore(before_step=20)
    assert first == second
    assert first.step == 10
    assert np.shares_memory(a["w"], later)
    assert not np.shares_memory(b["w"], later)
    assert a["w"].tolist() == b["w"].tolist() == [10] * (1 << 16)
    assert not np.may_share_memory(a["w"], b["w"])
    assert [i.step for i in ring.backups] == [0, 10]
    ring.take({"w": np.full(1 << 16, 11, np.float32)}, 11)
    ring.take({"w": np.full(1 << 16, 12, np.float32)}, 12)
    assert a["w"][0] == 10


def test_the_abandoned_future_is_forgotten():
    ring = BackupRing()
    for step in (0, 10, 20):
        ring.take([np.full(3, step)], step)
        proved(ring, step)
    ring.discard_after(10)
    assert [i.step for i in ring.backups] == [0, 10]


@pytest.mark.parametrize(("nbytes", "steps"), [(0, 8), (1e6, 8), (4e6, 16), (1e8, 80), (1e9, 253), (1e12, 512)])
def test_the_chosen_interval_follows_from_the_bytes_alone(nbytes, steps):
    assert chosen_interval(int(nbytes)) == steps


def test_the_oldest_backup_stays_until_it_is_four_intervals_old():
    ring, held = BackupRing(), []
    for step in range(0, 400, 20):
        ring.take({"w": np.zeros(3)}, step)
        proved(ring, step)
        held.append([info.step for info in ring.backups])
    assert held[3:8] == [[0, 40, 60], [0, 60, 80], [60, 80, 100], [60, 100, 120], [60, 120, 140]]
    reach = [(steps[-1] - steps[0]) // 20 for steps in held[3:]]
    assert min(reach) == 2
    assert max(reach) == 4


def test_restoring_the_newest_backup_leaves_the_oldest_where_it_is():
    ring = BackupRing()
    for step in (0, 20, 40):
        ring.take({"w": np.full(3, step)}, step)
        proved(ring, step)
    info, state = ring.restore()
    assert (info.step, state["w"][0]) == (40, 40)
    assert [info.step for info in ring.backups] == [0, 40]
