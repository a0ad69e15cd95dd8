"""Models that are sharded over real processes: FSDP2, HSDP, tensor parallelism; backups, rollbacks, checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from learnit_r8 import R8Scheduler
from learnit_r8.stability.tree_copy import CopyPlan
from tests.integrations.test_integration_distributed import launch, results, same

DRIVER = Path(__file__).parents[1].joinpath("sharded_driver.py")
KINDS_OF_2 = ("ddp", "fsdp2", "offload", "hsdp", "tensor_parallel")


def run(folder: Path, world: int, *names: str) -> dict[str, list[dict]]:
    launch(folder, world, *names, program=DRIVER)
    return {name: results(folder, world, name.replace(":", "-")) for name in names}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    scenarios = [f"copied:{kind}" for kind in KINDS_OF_2]
    scenarios += ["faults:fsdp2", "hidden:fsdp2", "hidden:ddp", "first:fsdp2", "whole:fsdp2", "second:fsdp2,fsdp2,2"]
    scenarios += [
        "asked:fsdp2",
        "second:ddp,fsdp2,2",
        "disk:fsdp2",
        "spoilt:fsdp2",
        "failing",
        "lost:fsdp2",
        "unmarked:fsdp2",
        "tutorial:fsdp2",
        "shared_slices",
    ]
    return run(tmp_path_factory.mktemp("two"), 2, *scenarios)


def check_faults(ranks: list[dict]) -> None:
    """20 NaN, 20 rollbacks, each to the snapshot's bits."""
    assert sum(found["rollbacks"] for found in ranks[0]["findings"]) == 20
    for found in [found for rank in ranks for found in rank["findings"]]:
        assert {found[name] for name in ("finite", "equal", "unchanged", "held")} == {True}, found
        assert found["steps"] == found["length"]


@pytest.mark.parametrize("kind", KINDS_OF_2)
def test_a_sharded_model_is_restored_to_the_bit(two, kind):
    for rank in two[f"copied:{kind}"]:
        assert rank == {"wrong": {"copy": [], "scheduler": [], "out": []}, "tensors": 24}


def test_nan_on_any_rank_of_an_fsdp2_run_is_undone_to_the_bit(two):
    check_faults(two["faults:fsdp2"])


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_nan_hidden_in_one_ranks_shard_rolls_all_ranks_back(two, kind):
    for rank in two[f"hidden:{kind}"]:  # to the last backup before step 20
        assert rank["found"] == [[1, 20, True], [1, 20, True], [1, 16, True]]


def test_a_backup_that_one_rank_cannot_take_is_kept_by_none_and_one_it_never_can_ends_all_before_the_first_step(two):
    ours, other = two["spoilt:fsdp2"]
    assert ["it failed on another rank" in ours["told"][0], "no room" in other["told"][0]] == [True, True]
    for at, back in (("1", [[15], 0]), ("4", [[45], 30])):
        assert ours[at] == other[at]
        assert ours[at][:2] == back
    assert ours["steps"] == other["steps"] == 0
    assert ["failed on another rank" in ours["error"], "Hollow" in other["error"]] == [True, True]


@pytest.mark.slow
def test_nan_on_four_ranks_is_undone_to_the_bit(tmp_path):
    kinds = ("fsdp2", "hsdp", "both")
    ranks = run(tmp_path, 4, *[f"copied:{kind}" for kind in kinds], "faults:fsdp2", "faults:hsdp", "hidden:hsdp")
    for kind in kinds:
        assert all(rank["wrong"] == {"copy": [], "scheduler": [], "out": []} for rank in ranks[f"copied:{kind}"])
    check_faults(ranks["faults:fsdp2"])
    check_faults(ranks["faults:hsdp"])
    assert all([found[0::2] for found in rank["found"]] == [[1, True]] * 3 for rank in ranks["hidden:hsdp"])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", [2, 4])
def test_ddp_fsdp2_and_hsdp_train_the_same_run(tmp_path, world):
    ranks = run(tmp_path, world, "plain:ddp", "plain:fsdp2", "plain:hsdp")
    first = ranks["plain:ddp"][0]
    for each in (rank for kind in ranks.values() for rank in kind):
        assert each["hash"] == first["hash"]
        assert len(each["losses"]) == 1000
        np.testing.assert_allclose(each["losses"], first["losses"], rtol=1e-6)
        np.testing.assert_allclose(each["weights"], first["weights"], rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_batchnorm_model_learns_as_well_on_several_ranks_as_on_one(tmp_path):
    pytest.importorskip("sklearn")
    found = {world: np.array(run(tmp_path, world, "batchnorm")["batchnorm"][0]["losses"]) for world in (1, 2, 4)}
    for losses in found.values():
        print(f"{losses.mean():.4f} +- {losses.std(ddof=1) / len(losses) ** 0.5:.4f}", end="  ")
    for world in (2, 4):
        apart = found[world] - found[1]
        assert abs(apart.mean()) < 3 * apart.std(ddof=1) / len(apart) ** 0.5 + 0.01


@pytest.mark.slow
def test_fsdp2_inside_lightning_and_accelerate_is_restored_to_the_bit(tmp_path):
    pytest.importorskip("lightning")
    pytest.importorskip("accelerate")
    for ranks in run(tmp_path, 2, "lightning", "accelerated").values():
        assert [rank["kind"] for rank in ranks] == ["DTensor", "DTensor"]
        for found in [rank["findings"] for rank in ranks]:
            assert {found[name] for name in ("finite", "equal", "unchanged", "held")} == {True}, found
            assert (found["rollbacks"], found["steps"]) == (5, 60)


# Checkpoints of all ranks --------------------------------------------------------------------------


def check_second_half(ranks: list[dict], first: list[dict], whole: list[dict]) -> None:
    """It went on as the run on that many ranks."""
    for rank in ranks:
        assert rank["begun"] == 25
        np.testing.assert_allclose(first[0]["losses"] + rank["losses"], whole[0]["losses"], rtol=1e-6)
        np.testing.assert_allclose(rank["weights"], whole[0]["weights"], rtol=0, atol=1e-9)


def test_a_sharded_run_is_saved_by_all_ranks_and_resumed_to_the_bit(two):
    first, second, whole = (two[name] for name in ("first:fsdp2", "second:fsdp2,fsdp2,2", "whole:fsdp2"))
    for rank in first:
        assert rank["path"] == "step-000000025"
        assert {"step-000000010", "step-000000020", "step-000000025"} <= set(rank["names"])
    for head, tail, all_of_it in zip(first, second, whole, strict=True):
        assert head["losses"] + tail["losses"] == all_of_it["losses"]
        assert tail["weights"] == all_of_it["weights"]


def test_a_sharded_run_goes_on_unsharded(two):
    check_second_half(two["second:ddp,fsdp2,2"], two["first:fsdp2"], two["whole:fsdp2"])


def test_a_part_of_the_newest_checkpoint_that_is_lost_sends_all_ranks_to_the_one_before(two):
    assert two["lost:fsdp2"][0]["newest"] == "step-000000020"
    for rank in two["lost:fsdp2"]:
        assert (rank["begun"], rank["same"]) == (10, True)


def test_without_backups_in_ram_all_ranks_go_back_to_the_checkpoint_that_they_wrote(two):
    for rank in two["disk:fsdp2"]:
        assert rank["rolled_back"] == [36]  # nobody looks at the model: the second NaN in a row tells
        assert np.isfinite(rank["weights"]).all()


def test_a_checkpoint_that_one_rank_is_asked_for_and_a_signal_to_another_are_written_by_all(two):
    for rank in two["asked:fsdp2"]:
        assert rank == {"ended": "interrupted", "names": ["step-000000009", "step-000000021"], "steps": 21}


def test_a_save_that_fails_on_one_rank_fails_on_all_and_the_next_one_works(two):
    told = [rank["told"] for rank in two["failing"]]
    assert [names[1] for names in told] == ["step-000000002"] * 2
    assert "save_callback failed on another rank" in told[0][0]
    assert "disk full" in told[1][0]
    assert same([rank["paths"] for rank in two["failing"]])
    assert len(two["failing"][0]["paths"]) == 2


def test_a_save_callback_that_would_gather_a_sharded_model_on_rank_0_alone_is_refused(two):
    assert all("save_callback=collective(save)" in rank["error"] for rank in two["unmarked:fsdp2"])


def test_torchs_own_distributed_checkpoint_takes_the_scheduler_along(two):
    for rank in two["tutorial:fsdp2"]:
        assert rank["begun"] == 25
        assert rank["losses"][0] == rank["losses"][1]
        assert rank["weights"][0] == rank["weights"][1]


def test_processes_that_share_a_slice_train_on_the_same_samples_and_hear_of_each_others_nan(two):
    one, other = two["shared_slices"]
    assert one["seen"] == other["seen"]
    assert len(one["seen"][0]) == 48
    assert one["rolled_back"] == other["rolled_back"] == [30]
    assert one["weights"] == other["weights"]


@pytest.mark.slow
def test_four_ranks_save_and_two_go_on_and_the_other_way_round(tmp_path):
    two = run(tmp_path, 2, "whole:fsdp2", "first:fsdp2")
    four = run(tmp_path, 4, "whole:fsdp2", "first:fsdp2", "second:fsdp2,fsdp2,2", "second:hsdp,fsdp2,2")
    tail = run(tmp_path, 2, "second:fsdp2,fsdp2,4", "second:hsdp,fsdp2,4")
    for name in ("second:fsdp2,fsdp2,2", "second:hsdp,fsdp2,2"):
        check_second_half(four[name], two["first:fsdp2"], four["whole:fsdp2"])
    for ranks in tail.values():
        check_second_half(ranks, four["first:fsdp2"], two["whole:fsdp2"])


@pytest.mark.slow
def test_four_processes_share_two_slices(tmp_path):
    ranks = run(tmp_path, 4, "shared_slices")["shared_slices"]
    assert [rank["slice"] for rank in ranks] == [0, 0, 1, 1]
    assert ranks[0]["seen"] == ranks[1]["seen"] != ranks[2]["seen"] == ranks[3]["seen"]
    assert not set(ranks[0]["seen"][0]) & set(ranks[2]["seen"][0])
    assert all(rank["rolled_back"] == [30] for rank in ranks)
    assert same([rank["weights"] for rank in ranks])


# What cannot be copied -----------------------------------------------------------------------------


class Hollow(torch.Tensor):
    """A tensor whose numbers are nowhere that torch could tell."""

    @staticmethod
    def __new__(cls, shape):
        return torch.Tensor._make_wrapper_subclass(cls, shape)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(f"{function} is not for Hollow")


class Scaled(torch.Tensor):
    """Whole numbers and a scale, as quantized weights are kept."""

    @staticmethod
    def __new__(cls, numbers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)

    def __init__(self, numbers, scale):
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self):
        return ["numbers", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Scaled(inner["numbers"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Scaled(args[0].numbers, args[0].scale)
        raise NotImplementedError(f"{function} is not for Scaled")


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.empty(3, device="meta"), "on the device meta, which holds no numbers"),
        (Hollow((2, 2)), "Hollow that cannot be copied"),
        (torch.nn.UninitializedParameter(), "UninitializedParameter that cannot be copied"),
    ],
    ids=["meta", "wrapper", "uninitialized"],
)
def test_a_tensor_that_cannot_be_copied_ends_in_one_sentence_at_the_first_backup(tensor, reason):
    scheduler = R8Scheduler(
        64, 8, num_epochs=1, checkpoint_dir=None, ui="off", state_callback=lambda: {"net": {"w": tensor}},
        load_callback=lambda state: None,
    )  # fmt: skip
    with pytest.raises(TypeError, match=rf"net/w is a .*{reason}.*leave it out"):
        next(scheduler.batch_iterator())
    assert scheduler.global_step == 0


def test_tensors_made_of_tensors_are_copied_and_scanned_through_their_parts():
    source = {"a": Scaled(torch.arange(4), torch.ones(4)), "b": Scaled(torch.arange(4) * 2, torch.full((4,), 2.0))}
    copy = CopyPlan(source).fill()
    source["a"].numbers.zero_()
    source["b"].scale.mul_(float("nan"))
    assert copy.tree["a"].numbers.tolist() == [0, 1, 2, 3]
    assert copy.tree["b"].scale.tolist() == [2.0] * 4
    assert type(copy.tree["a"]) is Scaled
    assert not copy.nonfinite()
    assert CopyPlan(source, copy.pool).fill().nonfinite() == {"/b/scale"}


def test_what_is_copied_as_a_whole_is_scanned_too():
    layer = torch.nn.Linear(2, 2)
    sparse = torch.eye(3).to_sparse()
    assert not CopyPlan({"net": layer, "sparse": sparse}).fill().nonfinite()
    with torch.no_grad():
        layer.bias[0] = float("nan")
    assert CopyPlan({"net": layer, "sparse": sparse * float("inf")}).fill().nonfinite() == {"/net/bias", "/sparse"}


def test_a_model_with_all_kinds_of_parts_is_written_and_read_in_one_process(tmp_path):
    from learnit_r8.integrations.distributed import ShardedModel

    def make():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))
        net[2].weight = net[0].weight  # tied
        net[2].bias.requires_grad = False
        optimizers = [torch.optim.SGD(net[1].parameters(), lr=0.1), torch.optim.AdamW([*net[0].parameters()], lr=0.1)]
        scaler = torch.amp.GradScaler("cpu")
        ema = torch.optim.swa_utils.AveragedModel(net)
        return net, optimizers, ema, ShardedModel(net, optimizers, scaler, ema)

    def step(net, optimizers, ema):
        net(torch.randn(8, 4)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema.update_parameters(net)
        return [value.clone() for value in (*net.state_dict().values(), *ema.state_dict().values())]

    *one, parts = make()
    for _ in range(3):
        step(*one)
    parts.save(str(tmp_path / "model"))
    expected = [step(*one) for _ in range(3)]
    for again in (one, None):
        *other, parts = (*again, parts) if again else make()
        parts.load(str(tmp_path / "model"))
        assert other[0][2].weight is other[0][0].weight
        for wanted in expected:
            assert all(torch.equal(a, b) for a, b in zip(step(*other), wanted, strict=True))
    state = CopyPlan(parts.capture()).fill().tree
    wanted = step(*other)
    parts.load(state)
    assert all(torch.equal(a, b) for a, b in zip(step(*other), wanted, strict=True))


def test_deepspeeds_parts_of_parameters_are_no_backup():
    from learnit_r8.errors import ConfigError
    from learnit_r8.integrations.torch import capture_state

    layer = torch.nn.Linear(2, 2)
    layer.weight.ds_id = 0  # as ZeRO-3 marks it
    with pytest.raises(ConfigError, match="DeepSpeed's states cannot be copied"):
        capture_state(layer)
