"""Several real processes over gloo: one plan, one verdict, one end."""

from __future__ import annotations

import collections
import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from learnit_r8 import Command, ProtocolError, R8Scheduler
from learnit_r8.sinks import read_events
from learnit_r8.strategies import Balanced, Mixture, Prompts, TokenBudget, Weighted, make, names
from tests.backup_watch import check_survival

DRIVER = Path(__file__).parents[1].joinpath("distributed_driver.py")
_spec = importlib.util.spec_from_file_location("distributed_driver", DRIVER)
driver = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(driver)


def launch(folder: Path, world: int, *scenarios: str, dies: bool = False, program: Path = DRIVER) -> None:
    """Run scenarios one after another on `world` processes."""
    ranks = [
        subprocess.Popen(
            [sys.executable, str(program), str(folder), str(rank), str(world), *scenarios],
            cwd=DRIVER.parent.parent,
            env={"PYTHONPATH": str(DRIVER.parent.parent), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        with ThreadPoolExecutor(world) as pool:
            errors = list(pool.map(lambda process: process.communicate(timeout=800)[1], ranks))
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    codes = [process.returncode for process in ranks]
    if dies:
        assert -9 in codes
    else:
        assert codes == [0] * world, "\n".join(errors)


def results(folder: Path, world: int, scenario: str) -> list[dict]:
    return [json.loads((folder / f"{scenario}-{world}-{rank}.json").read_text()) for rank in range(world)]


def merged(ranks: list[dict]) -> list[list[int]]:
    """The global batches: every rank's slices, joined and sorted."""
    return [sorted(itertools.chain(*slices)) for slices in zip(*(rank["seen"] for rank in ranks), strict=True)]


def ordered(batches: list[list[int]]) -> list[list[int]]:
    return [sorted(batch) for batch in batches]


def same(values: list) -> bool:
    return all(value == values[0] for value in values)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    names = (
        "ragged",
        "plain",
        "faults",
        "half",
        "mismatch",
        "rank0",
        "rank0_broken",
        "budget",
        "interrupted",
        "stopped",
    )
    launch(folder, 2, *names)
    return folder, {name: results(folder, 2, name) for name in names}


def test_ragged_arrays_of_any_size_are_gathered(two):
    assert [rank["equal"] for rank in two[1]["ragged"]] == [[True] * 4] * 2


def test_two_ranks_hold_one_plan_for_a_thousand_steps(two):
    ranks = two[1]["plain"]
    assert ranks[0]["steps"] == 1000
    assert same([rank["hash"] for rank in ranks])
    epochs = np.array(merged(ranks)).reshape(10, -1)
    assert (np.sort(epochs, axis=1) == np.arange(800)).all()


def test_one_ranks_nan_rolls_all_ranks_back(two):
    ranks = two[1]["plain"]
    assert [rank["rolled_back"] for rank in ranks] == [[333]] * 2
    assert same([rank["weights"] for rank in ranks])
    assert np.isfinite(np.frombuffer(bytes.fromhex(ranks[0]["weights"]))).all()


def test_nan_at_random_steps_on_any_rank_rolls_all_ranks_back_to_the_backup(two):
    ranks = two[1]["faults"]
    assert same([rank["weights"] for rank in ranks])
    for rank in ranks:
        check_survival(rank["findings"])


def test_two_ranks_do_what_one_rank_does(two, tmp_path):
    alone = driver.Training(tmp_path, driver.one_rank())
    alone.go(nan_at=333)
    assert merged(two[1]["plain"]) == ordered(alone.seen)
    assert two[1]["plain"][0]["weights"] == alone.weights.tobytes().hex()


def test_a_run_of_two_ranks_is_resumed_on_one(two, tmp_path):
    folder, scenarios = two
    whole = driver.Training(tmp_path, driver.one_rank())
    whole.go()
    tail = driver.Training(folder / "half", driver.one_rank(), resume=True)
    tail.go()
    assert merged(scenarios["half"]) + ordered(tail.seen) == ordered(whole.seen)
    assert tail.weights.tobytes() == whole.weights.tobytes()


def test_ranks_with_different_plans_are_told_both_hashes(two):
    errors = [rank["error"] for rank in two[1]["mismatch"]]
    assert errors[0] == errors[1]
    assert "step 0: rank 0 has hash" in errors[0]
    assert "rank 1 has" in errors[0]


def test_rank_0_draws_for_all_when_the_strategy_would_not_agree(two):
    ranks = two[1]["rank0"]
    assert ranks[0]["steps"] == 200
    assert same([rank["hash"] for rank in ranks])
    assert all(len(set(batch)) == 8 for batch in merged(ranks))
    leader = ranks[0]["process"]
    assert [rank["decisions"] for rank in ranks] == [[["own mind", f"process {leader}", leader]]] * 2


def test_what_rank_0_draws_wrongly_is_refused_on_all_ranks(two):
    ranks = two[1]["rank0_broken"]
    assert same([rank["errors"][:-1] for rank in ranks])
    why = "LookupError: the list of samples is gone"  # the others do not wait for it
    assert [rank["errors"][-1] for rank in ranks] == [why, f"ProtocolError: the strategy failed on rank 0: {why}"]
    for error, complaint in zip(
        ranks[0]["errors"][:-1],
        ["dtype float64", "ids from -1", "allowed are 0 to", "twice in one batch", "1 to"],
        strict=True,
    ):
        assert complaint in error


@pytest.mark.parametrize("scenario", ["budget", "interrupted", "stopped"])
def test_all_ranks_end_at_the_same_step(two, scenario):
    ranks = two[1][scenario]
    assert same([rank["steps"] for rank in ranks])
    assert 0 < ranks[0]["steps"] < 1000
    if scenario == "interrupted":
        assert [rank.get("interrupted") for rank in ranks] == [True] * 2


@pytest.mark.slow
def test_four_ranks_hold_one_plan_for_a_thousand_steps(tmp_path):
    launch(tmp_path, 4, "plain", "ragged")
    ranks = results(tmp_path, 4, "plain")
    alone = driver.Training(tmp_path / "alone", driver.one_rank())
    alone.go(nan_at=333)
    assert same([rank["hash"] for rank in ranks])
    assert [rank["rolled_back"] for rank in ranks] == [[333]] * 4
    assert merged(ranks) == ordered(alone.seen)
    assert {rank["weights"] for rank in ranks} == {alone.weights.tobytes().hex()}
    assert all(rank["equal"] == [True] * 4 for rank in results(tmp_path, 4, "ragged"))


@pytest.mark.slow
def test_two_ranks_then_one_then_four_equal_the_uninterrupted_run(tmp_path):
    whole = driver.Training(tmp_path / "whole", driver.one_rank())
    whole.go()
    launch(tmp_path, 2, "half")
    middle = driver.Training(tmp_path / "half", driver.one_rank(), resume=True)
    middle.go(stop_at=700)
    launch(tmp_path, 4, "resumed")
    tail = results(tmp_path, 4, "resumed")
    assert merged(results(tmp_path, 2, "half")) + ordered(middle.seen) + merged(tail) == ordered(whole.seen)
    assert {rank["weights"] for rank in tail} == {whole.weights.tobytes().hex()}


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint_and_nothing_else(tmp_path, world):
    launch(tmp_path, world, "killed", dies=True)
    launch(tmp_path, world, "restarted")
    ranks = results(tmp_path, world, "restarted")
    whole = driver.Training(tmp_path / "whole", driver.one_rank())
    whole.go()
    assert ranks[0]["first"] == 250
    assert merged(ranks) == ordered(whole.seen)[250:]
    assert {rank["weights"] for rank in ranks} == {whole.weights.tobytes().hex()}


# Without processes: threads that exchange arrays ------------------------------------------


class Exchange:
    """all_gather between threads."""

    def __init__(self, world: int) -> None:
        self.barrier, self.slots = threading.Barrier(world), [None] * world

    def of(self, rank: int):
        def gather(array):
            self.slots[rank] = np.array(array)
            self.barrier.wait(30)
            everyone = np.concatenate(self.slots)
            self.barrier.wait(30)
            return everyone

        return gather


def on_threads(world: int, function) -> list:
    exchange, outcomes = Exchange(world), [None] * world

    def body(rank: int) -> None:
        try:
            outcomes[rank] = function({"rank": rank, "world_size": world, "all_gather": exchange.of(rank)})
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


@pytest.mark.parametrize("world", [2, 3])
def test_one_number_a_rank_is_averaged_by_the_slices_sizes(world):
    def body(ranks):
        scheduler = R8Scheduler(6 * 4, 6, num_epochs=1, checkpoint_dir=None, ui="off", **ranks)
        return [
            scheduler.update_with_loss(float(batch.indices.mean())).loss for batch in scheduler.batch_iterator()
        ], np.array([])

    def whole(ranks):
        scheduler = R8Scheduler(6 * 4, 6, num_epochs=1, checkpoint_dir=None, ui="off")
        return [batch.indices.mean() for batch in drained(scheduler)]

    outcomes = on_threads(world, body)
    for losses, _ in outcomes:
        assert losses == pytest.approx(whole(None))


def drained(scheduler):
    for batch in scheduler.batch_iterator():
        yield batch
        scheduler.update_with_loss(1.0)


def test_ranks_that_report_in_different_ways_are_told_so():
    def body(ranks):
        scheduler = R8Scheduler(8, 4, num_epochs=1, checkpoint_dir=None, ui="off", **ranks)
        batch = next(scheduler.batch_iterator())
        scheduler.update_with_loss(1.0 if ranks["rank"] else np.ones(len(batch.indices)))

    outcomes = on_threads(2, body)
    assert all(isinstance(outcome, ProtocolError) and "[2, 0]" in str(outcome) for outcome in outcomes)


def test_an_all_gather_that_does_not_gather_is_named():
    scheduler = R8Scheduler(
        8, 4, num_epochs=1, checkpoint_dir=None, ui="off", rank=0, world_size=2, all_gather=lambda array: array
    )
    next(scheduler.batch_iterator())
    with pytest.raises(ProtocolError, match="1 reports of 2"):
        scheduler.update_with_loss([1.0, 2.0])


def test_only_rank_0_writes_checkpoints(tmp_path):
    def body(ranks):
        folder = tmp_path / str(ranks["rank"])
        scheduler = R8Scheduler(8, 4, num_epochs=2, checkpoint_dir=folder, checkpoint_every=1, ui="off", **ranks)
        for _ in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                scheduler.update_with_loss(np.ones(len(batch.indices)))
        return scheduler.save_checkpoint()

    paths = on_threads(2, body)
    assert paths[0].parent == tmp_path / "0"
    assert paths[1] == tmp_path / "1"
    assert not (tmp_path / "1").exists()


def test_rank_0_alone_writes_the_event_log_and_every_ranks_own_sinks_hear_all(tmp_path):
    class Listener(list):
        record = list.append

    def body(ranks):
        heard = Listener()
        options = {"checkpoint_dir": None, "ui": "off", "log_dir": tmp_path, "sinks": [heard]}
        with R8Scheduler(8, 4, num_epochs=2, **options, **ranks) as scheduler:
            for _ in scheduler.epoch_iterator():
                for batch in scheduler.batch_iterator():
                    scheduler.update_with_loss(np.ones(len(batch.indices)))
        return heard

    heard = on_threads(2, body)
    logged = [type(event).__name__ for event in read_events(tmp_path / "events.jsonl")]
    for events in heard:  # the log leaves out that a batch was issued: its report tells all of it
        kinds = [type(event).__name__ for event in events]
        assert logged == [kind for kind in kinds if kind != "BatchIssued"]
        assert kinds.count("LossReported") == 4


def test_a_tracker_is_written_by_rank_0_alone():
    from learnit_r8.sinks.trackers import TrackerSink

    class Tracker(TrackerSink):
        def __init__(self):
            super().__init__()
            self.steps, self.finished = [], 0

        def write(self, points):
            self.steps += [point.step for point in points if point.name == "train/loss"]

        def finish(self):
            self.finished += 1

    def body(ranks):
        tracker = Tracker()
        with R8Scheduler(16, 4, num_epochs=1, checkpoint_dir=None, ui="off", sinks=[tracker], **ranks) as scheduler:
            for batch in scheduler.batch_iterator():
                scheduler.update_with_loss(np.full(len(batch.indices), float(ranks["rank"])))
        return tracker.steps

    assert on_threads(2, body) == [[0, 1, 2, 3], []]


@pytest.mark.parametrize(("samples", "world", "steps"), [(26, 2, 5), (26, 3, 4), (25, 1, 5), (25, 2, 4)])
def test_a_last_batch_too_small_for_the_ranks_is_neither_drawn_nor_counted(samples, world, steps):
    def body(ranks):
        scheduler = R8Scheduler(samples, 6, num_epochs=3, checkpoint_dir=None, ui="off", **ranks)
        lrs = []
        for _ in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                lrs.append(batch.lr)
                assert len(batch.indices)
                scheduler.update_with_loss(np.ones(len(batch.indices)))
        return scheduler.steps_per_epoch, scheduler.total_steps, scheduler.global_step, lrs

    whole = R8Scheduler(steps * 6, 6, num_epochs=3, checkpoint_dir=None, ui="off")
    expected = [lr for _ in whole.epoch_iterator() for _, lr in drained(whole)]
    for each, total, done, lrs in on_threads(world, body):
        assert (each, total, done) == (steps, steps * 3, steps * 3)
        assert lrs == expected


@pytest.mark.parametrize(("samples", "world", "out"), [(41, 4, 1), (47, 4, 3), (48, 4, 0), (37, 4, 1)])
def test_every_slice_has_one_size_and_what_is_over_is_told_and_changes(samples, world, out):
    class Listener(list):
        record = list.append

    def body(ranks):
        heard, left = Listener(), []
        options = {"checkpoint_dir": None, "ui": "off", "sinks": [heard], "strategy": "uniform"}
        scheduler = R8Scheduler(samples, 12, num_epochs=3, **options, **ranks)
        for _ in scheduler.epoch_iterator():
            sizes = []
            for batch in scheduler.batch_iterator():
                sizes.append(len(batch.indices))
                scheduler.update_with_loss(np.ones(len(batch.indices)))
            left.append(frozenset(np.flatnonzero(scheduler.catalog.uses == scheduler.catalog.uses.min()).tolist()))
        notices = [event.message for event in heard if type(event).__name__ == "Notice"]
        return sizes, notices, left, scheduler.global_step

    for sizes, notices, left, steps in on_threads(world, body):
        assert sizes == on_threads(world, body)[0][0]
        assert sum(sizes) * world == samples - out
        assert len(notices) == (out > 0)
        assert all(f"leaves out {out} samples" in notice for notice in notices)
        assert steps == 3 * len(sizes)
        assert out == 0 or len(set(left)) > 1


@pytest.mark.parametrize(("batch", "advice"), [(10, "give 8 or 12"), (7, "give 4 or 8")])
def test_slices_that_would_differ_in_size_are_refused(batch, advice):
    from learnit_r8.errors import ConfigError

    with pytest.raises(ConfigError, match=f"multiple of world_size=4, got {batch}: {advice}"):
        R8Scheduler(100, batch, num_epochs=1, world_size=4, all_gather=np.asarray, checkpoint_dir=None, ui="off")


def test_an_own_strategys_batch_that_cannot_be_shared_equally_is_refused():
    class Five:
        catalogs = False

        def draw(self, request):
            assert request.multiple == 2
            return np.arange(5)

    def body(ranks):
        scheduler = R8Scheduler(16, 8, num_epochs=1, checkpoint_dir=None, ui="off", strategy=Five(), **ranks)
        next(scheduler.batch_iterator())

    outcomes = on_threads(2, body)
    assert all(isinstance(o, ProtocolError) and "drew 5 samples for 2 ranks" in str(o) for o in outcomes)


LEVEL = np.random.default_rng(0).lognormal(0, 1, 1600)
LENGTHS = np.clip((LEVEL * 40).astype(int), 1, 400)  # the longest samples have the highest losses
BY_LOSS = {"low": np.argsort(LEVEL)[:800], "high": np.argsort(LEVEL)[800:]}
STRATEGIES = {name: partial(make, name) for name in names()} | {
    "weighted": lambda: Weighted(np.random.default_rng(1).exponential(size=1600)),
    "balanced": lambda: Balanced(np.digitize(LEVEL, [1.0, 2.0, 4.0])),
    "mixture": lambda: Mixture(BY_LOSS, {"low": 1, "high": 3}),
    "mixture that adapts": lambda: Mixture(BY_LOSS, adapt="loss", floor=0.1),
    "tokens": lambda: TokenBudget(LENGTHS, 2000),
    "prompts": Prompts,
}


def reported(samples, epoch: int, strategy: str):
    losses = LEVEL[samples] * 0.7**epoch
    return -np.clip(losses / 40, 0, 1) if strategy == "prompts" else losses


def slices_of(strategy: str, ranks: dict, *, seed: int):
    """Mean loss of each rank's slice of each batch after the first epoch, `[world, steps]`."""
    options = {"checkpoint_dir": None, "ui": "off", "seed": seed}
    world, slices = ranks["world_size"], []
    scheduler = R8Scheduler(1600, 32, num_epochs=6, strategy=STRATEGIES[strategy](), **options, **ranks)
    for epoch in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            _ = batch.weights
            everyones = LEVEL[ranks["all_gather"](batch.indices).reshape(world, -1)]
            scheduler.update_with_loss(reported(batch.indices, epoch, strategy))
            if epoch:
                slices.append(everyones.mean(axis=1))
    return np.array(slices).T


def errors_apart(slices) -> list[float]:
    """How many standard errors each two ranks' means lie apart; what the ranks share is no difference between them."""
    apart = [one - other for one, other in itertools.combinations(slices, 2)]
    return [abs(each.mean()) / (each.std() / np.sqrt(len(each))) for each in apart]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_the_slices_of_every_strategy_are_alike_in_expectation(strategy, world):
    """Each sample has a loss of its own; over a run the ranks' means differ by no more than chance lets them."""
    ranks = on_threads(world, partial(slices_of, strategy, seed=3))
    assert all(np.array_equal(each, ranks[0]) for each in ranks)
    assert max(errors_apart(ranks[0])) < 3.5


def slices_in_one_process(strategy: str, world: int, seed: int):
    """As `slices_of`; the ranks all hold one plan, so that one of them can tell what the others would report."""
    slices, samples = [], None
    scheduler: R8Scheduler

    def gather(array):
        if len(array) == 1:
            return np.repeat(array, world)
        losses = reported(samples, scheduler.current_epoch, strategy)
        return np.concatenate([np.concatenate([array[: -losses.shape[1]], each]) for each in losses])

    options = {"checkpoint_dir": None, "ui": "off", "seed": seed, "strategy": STRATEGIES[strategy]()}
    scheduler = R8Scheduler(1600, 32, num_epochs=6, rank=0, world_size=world, all_gather=gather, **options)
    for epoch in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            ticket = scheduler._desk.oldest
            samples = ticket.indices[ticket.order].reshape(world, -1)
            assert np.array_equal(samples[0], batch.indices)
            _ = batch.weights
            scheduler.update_with_loss(reported(batch.indices, epoch, strategy))
            if epoch:
                slices.append(LEVEL[samples].mean(axis=1))
    return np.array(slices).T


@pytest.mark.slow
def test_the_slices_of_every_strategy_are_within_two_errors_as_often_as_chance_has_it():
    apart = []
    for strategy, world in itertools.product(sorted(STRATEGIES), [2, 4]):
        found = np.concatenate([errors_apart(slices_in_one_process(strategy, world, seed)) for seed in range(10)])
        print(f"{strategy:20} {world} ranks: {np.mean(found < 2):6.1%} of {len(found)} pairs, worst {found.max():.2f}")
        apart += found.tolist()
    print(f"all: {np.mean(np.array(apart) < 2):.1%} of {len(apart)} pairs; 95.4% are expected")
    assert np.mean(np.array(apart) < 2) > 0.93
    assert max(apart) < 4.2


@pytest.mark.parametrize(("first", "then"), [(2, 4), (4, 2), (1, 4), (4, 1)])
@pytest.mark.parametrize("strategy", ["quadrant", "infobatch", "tokens"])
def test_an_epoch_that_goes_on_with_more_or_fewer_ranks_has_each_sample_once(strategy, first, then):
    lengths = np.random.default_rng(0).integers(1, 60, 203)

    def body(ranks, state=None, stop_at=-1):
        chosen = TokenBudget(lengths, 256) if strategy == "tokens" else strategy
        options = {"num_epochs": 2, "strategy": chosen, "checkpoint_dir": None, "ui": "off"}
        scheduler, seen = R8Scheduler(203, 24, **options, **ranks), []
        if state is not None:
            scheduler.load_state_dict(state)
        for epoch in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                _ = batch.weights
                seen += [(epoch, sample) for sample in batch.indices.tolist()]
                scheduler.update_with_loss(1.0 + np.sin(batch.indices))
                if scheduler.global_step == stop_at:
                    return seen, scheduler.state_dict()
        return seen, None

    heads = on_threads(first, partial(body, stop_at=5))
    tails = on_threads(then, partial(body, state=heads[0][1]))
    drawn = collections.Counter(itertools.chain(*(seen for seen, _ in heads + tails)))
    assert set(drawn.values()) == {1}
    for epoch in (0, 1):
        count = sum(which == epoch for which, _ in drawn)
        assert count > 203 - 4 or (strategy == "infobatch" and epoch), "more are left out than the ranks cannot share"


def test_a_sample_longer_than_a_ranks_part_of_the_tokens_is_refused():
    from learnit_r8.errors import ConfigError

    def body(ranks):
        lengths = np.r_[300, np.full(99, 20)]
        strategy = TokenBudget(lengths, 1024)
        scheduler = R8Scheduler(100, 20, num_epochs=1, strategy=strategy, checkpoint_dir=None, ui="off", **ranks)
        return len(next(scheduler.batch_iterator()).indices)

    assert all(isinstance(o, ConfigError) and "at most 256" in str(o) for o in on_threads(4, body))
    assert on_threads(2, body)[0] > 0


def test_what_is_known_of_samples_is_the_same_to_the_bit_on_any_number_of_ranks():
    level = np.random.default_rng(0).lognormal(0, 1, 400)

    def body(ranks):
        scheduler = R8Scheduler(400, 24, num_epochs=4, checkpoint_dir=None, ui="off", **ranks)
        for _ in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                scheduler.update_with_loss(level[batch.indices] * 0.99**batch.step)
        return scheduler.catalog.expected_loss.tobytes(), scheduler.global_step

    alone = on_threads(1, body)
    for world in (2, 4):
        assert set(on_threads(world, body)) == set(alone)


def test_a_step_that_one_rank_skipped_is_skipped_on_all():
    def body(ranks):
        scheduler, verdicts = R8Scheduler(400, 8, num_epochs=2, checkpoint_dir=None, ui="off", **ranks), []
        for _ in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                losses, alone = 1.0 + 0.1 * np.sin(batch.indices), ranks["rank"] == 1
                if batch.step == 30 and alone:  # out of memory: this rank has no losses
                    result = scheduler.update_with_loss(float("nan"), skipped=True)
                else:  # at 60 a loss scaler skips, which has seen one rank's gradients
                    result = scheduler.update_with_loss(losses, skipped=batch.step == 60 and alone)
                verdicts.append(result.verdict.value)
        return verdicts

    one, other = on_threads(2, body)
    assert one == other
    assert [step for step, verdict in enumerate(one) if verdict == "skipped"] == [30, 60]
    assert set(one) == {"skipped", "calm"}


def test_a_new_best_is_saved_by_all_ranks_where_a_save_takes_all_of_them(tmp_path):
    from learnit_r8 import Checkpoints
    from learnit_r8.integrations.distributed import collective

    def body(ranks):
        saved = []
        policy = Checkpoints(tmp_path, keep_best="val_loss")
        options = {"num_epochs": 1, "ui": "off", "checkpoints": policy, "save_callback": collective(saved.append)}
        scheduler = R8Scheduler(80, 8, **options, **ranks)
        for batch in scheduler.batch_iterator():
            scheduler.update_with_loss(np.ones(len(batch.indices)))
            if batch.step in (2, 5):
                scheduler.log(val_loss=10.0 - batch.step)
        return [Path(path).parent.name for path in saved]

    one, other = on_threads(2, body)
    assert one == other
    assert len(one) == 2


def test_more_ranks_than_samples_are_refused():
    from learnit_r8.errors import ConfigError

    with pytest.raises(ConfigError, match=r"num_samples must be >= world_size=4, got 3"):
        R8Scheduler(3, 8, num_epochs=1, world_size=4, all_gather=np.asarray, checkpoint_dir=None, ui="off")


def test_a_gather_without_a_process_group_says_what_to_call():
    from learnit_r8.integrations.distributed import rank_arguments, torch_all_gather

    with pytest.raises(ProtocolError, match="init_process_group"):
        torch_all_gather(np.ones(1))
    assert rank_arguments() == {"rank": 0, "world_size": 1, "all_gather": None}


# Shards ---------------------------------------------------------------------------------------


class Shard:
    """One rank's run over its shard; the loss of a sample is its own number, shrinking with use."""

    def __init__(
        self, ranks: dict, folder=None, *, resume: bool = False, size: int = 500, one_folder: bool = False, **options
    ) -> None:
        from learnit_r8.integrations.sharded import ShardedScheduler

        self.rank = ranks["rank"]
        self.level = np.random.default_rng(self.rank).lognormal(self.rank / 3, 1, size)
        self.restored: list[int] = []
        self.model = {"w": np.ones(3)}
        callbacks = {"load_callback": self.load, "save_callback": lambda path: Path(path).write_text("")}
        path = folder if folder is None or one_folder else folder / str(self.rank)
        if resume:
            self.scheduler = ShardedScheduler.resume_from_checkpoint(
                path, **callbacks, state_callback=lambda: self.model, **ranks, ui="off"
            )
        else:
            options = {"num_epochs": 4, "backup_every": 5, "ui": "off", "checkpoint_dir": path} | options
            options["state_callback"] = lambda: self.model
            self.scheduler = ShardedScheduler(size, 10, **callbacks, **ranks, **options)
        self.results: list = []
        self.seen: list[list[int]] = []

    def load(self, source, from_ram: bool) -> None:
        if from_ram:
            self.restored.append(self.scheduler.global_step - 1)
            self.model = source

    def go(self, nan_at: int = -1, stop_at: int = -1, saves: bool = True):
        for _ in self.scheduler.epoch_iterator():
            for batch in self.scheduler.batch_iterator():
                losses = self.level[batch.indices] * (0.5 + 0.5 * 0.998**batch.step)
                if batch.step == nan_at:
                    losses = losses * np.nan
                    self.model["w"] = self.model["w"] * np.nan
                self.seen.append(batch.indices.tolist())
                self.results.append(self.scheduler.update_with_loss(losses))
                if self.scheduler.global_step == stop_at:
                    if saves:
                        self.scheduler.save_checkpoint()
                    return self
        return self


def test_shards_share_verdicts_rollbacks_and_the_quartiles_of_the_whole():
    shards = on_threads(4, lambda ranks: Shard(ranks).go(nan_at=120 if ranks["rank"] == 2 else -1))
    assert [shard.restored for shard in shards] == [[120]] * 4
    for results in zip(*(shard.results for shard in shards), strict=True):
        assert same([(r.loss, r.expected_loss, r.verdict) for r in results if np.isfinite(r.loss)])
    assert all(shard.scheduler.global_step == 200 for shard in shards)
    known = [shard.scheduler.catalog.expected_loss for shard in shards]
    assert shards[0].scheduler.catalog.mean_expected == pytest.approx(np.concatenate(known).mean(), rel=0.01)
    edges = shards[0].scheduler.catalog._quadrants.edges
    assert same([shard.scheduler.catalog._quadrants.edges.tolist() for shard in shards])
    share = np.searchsorted(np.sort(np.concatenate(known)), edges) / 2000
    assert share == pytest.approx([0.25, 0.5, 0.75], abs=0.02)
    assert not same([shard.seen for shard in shards])
    for shard in shards:  # each sample's own losses, which shrink from its level to .83 of that
        share = shard.scheduler.catalog.expected_loss / shard.level
        assert 0.8 < share.min() < share.max() < 1.0 + 1e-6


def test_a_sharded_run_is_resumed_by_the_same_number_of_ranks(tmp_path):
    whole = on_threads(3, lambda ranks: Shard(ranks, tmp_path / "whole").go())
    first = on_threads(3, lambda ranks: Shard(ranks, tmp_path / "half").go(stop_at=77))
    second = on_threads(3, lambda ranks: Shard(ranks, tmp_path / "half", resume=True).go())
    for one, head, tail in zip(whole, first, second, strict=True):
        assert head.seen + tail.seen == one.seen


def test_shards_of_different_sizes_are_refused():
    from learnit_r8.errors import ConfigError

    outcomes = on_threads(2, lambda ranks: Shard(ranks, size=500 + ranks["rank"]))
    assert all(isinstance(outcome, ConfigError) and "501" in str(outcome) for outcome in outcomes)


def test_high_losses_in_one_shard_alone_give_all_ranks_one_verdict():
    def body(ranks):
        rng, results = np.random.default_rng(ranks["rank"]), []
        options = {"num_epochs": 4, "checkpoint_dir": None, "ui": "off", "backup_every": 10, "state_callback": dict}
        from learnit_r8.integrations.sharded import ShardedScheduler

        scheduler = ShardedScheduler(1600, 16, load_callback=lambda state: None, **options, **ranks)
        for _ in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                losses = rng.normal(1.0, 0.1, len(batch.indices)).clip(0.1)
                if 250 <= batch.step < 256 and ranks["rank"] == 1:
                    losses *= 30
                if batch.step == 300 and ranks["rank"] == 1:
                    losses[3] = np.nan
                result = scheduler.update_with_loss(losses)
                results.append((result.verdict, result.rolled_back, result.accepted))
        assert scheduler.world_size == 2
        assert scheduler.batch_size == 32
        return results

    one, other = on_threads(2, body)
    assert one == other
    assert any(verdict == "spike" for verdict, _, _ in one[250:256])  # the weights did not move: it is told
    assert len(one) == 400


def test_all_ranks_shards_share_a_folder_and_go_on_from_the_newest_step_that_all_have(tmp_path):
    def crashed(ranks):  # the second rank dies before its save of step 80
        shard = Shard(ranks, tmp_path, one_folder=True)
        shard.go(stop_at=60)
        return shard.go(stop_at=80, saves=ranks["rank"] == 0)

    whole = on_threads(2, lambda ranks: Shard(ranks).go())
    on_threads(2, crashed)
    names = {path.name: sorted(step.name for step in path.glob("step-*")) for path in tmp_path.iterdir()}
    assert names == {
        "shard-0000-of-0002": ["step-000000060", "step-000000080"],
        "shard-0001-of-0002": ["step-000000060"],
    }
    tails = on_threads(2, lambda ranks: Shard(ranks, tmp_path, one_folder=True, resume=True).go())
    assert [tail.seen for tail in tails] == [one.seen[60:] for one in whole]


@pytest.mark.parametrize("world", [1, 3])
def test_shards_are_not_resumed_on_another_number_of_ranks(tmp_path, world):
    from learnit_r8 import CheckpointError

    on_threads(2, lambda ranks: Shard(ranks, tmp_path, one_folder=True).go(stop_at=20))
    outcomes = on_threads(world, lambda ranks: Shard(ranks, tmp_path, one_folder=True, resume=True))
    assert all(isinstance(o, CheckpointError) and f"of 2 shards, this run has {world}" in str(o) for o in outcomes)


def test_a_shard_whose_folder_is_lost_is_named_on_all_ranks(tmp_path):
    from learnit_r8 import CheckpointError

    nothing = on_threads(2, lambda ranks: Shard(ranks, tmp_path / "none", one_folder=True, resume=True))
    assert all(isinstance(outcome, FileNotFoundError) for outcome in nothing)
    on_threads(2, lambda ranks: Shard(ranks, tmp_path, one_folder=True).go(stop_at=20))
    shutil.rmtree(tmp_path / "shard-0001-of-0002")
    outcomes = on_threads(2, lambda ranks: Shard(ranks, tmp_path, one_folder=True, resume=True))
    assert all(isinstance(o, CheckpointError) and "rank 0: [20]; rank 1: none" in str(o) for o in outcomes)


def test_a_few_nan_samples_of_one_shard_are_named_and_cost_one_rollback_each():
    from learnit_r8.integrations.sharded import ShardedScheduler

    def body(ranks):
        rng, model, bad = np.random.default_rng(ranks["rank"]), {"w": np.zeros(4)}, [7, 50, 111]
        x = rng.normal(size=(200, 4))
        y = np.sign(x[:, 0])
        if ranks["rank"] == 1:
            x[bad] = np.nan

        def load(source):
            model["w"] = source["w"].copy()

        options = {"num_epochs": 6, "checkpoint_dir": None, "ui": "off", "initial_lr": 0.1, "backup_every": 5}
        options |= {"state_callback": lambda: model, "load_callback": load}
        scheduler, results = ShardedScheduler(200, 10, **options, **ranks), []
        for _ in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                rows, signs = x[batch.indices], y[batch.indices]
                margins = signs * (rows @ model["w"])
                gradient = (-(signs / (1 + np.exp(margins)))[:, None] * rows).mean(axis=0)
                model["w"] = model["w"] - batch.lr * ranks["all_gather"](gradient).reshape(-1, 4).mean(axis=0)
                with np.errstate(invalid="ignore"):
                    losses = np.logaddexp(0, -margins)
                results.append(scheduler.update_with_loss(losses))
        return results, scheduler.catalog.left_out.tolist(), scheduler._safety.detector.state_dict(), model["w"]

    (one, kept, first, w), (other, named, second, same_w) = on_threads(2, body)
    assert [(r.verdict, r.rolled_back) for r in one] == [(r.verdict, r.rolled_back) for r in other]
    assert (kept, named) == ([], [7, 50, 111])
    assert sum(r.rolled_back for r in one) <= 3
    assert str(first) == str(second)
    assert np.array_equal(w, same_w)
    assert np.isfinite(w).all()


def test_what_one_shards_strategy_decides_all_detectors_hear_of():
    from learnit_r8.integrations.sharded import ShardedScheduler
    from learnit_r8.strategies import Uniform

    class Decides(Uniform):
        def pop_decisions(self):
            return [("seek", "the losses here", 1.0)] if self.decides else []

    def body(ranks):
        strategy = Decides()
        strategy.decides = ranks["rank"] == 1
        options = {"num_epochs": 4, "checkpoint_dir": None, "ui": "off", "strategy": strategy}
        scheduler, rng = ShardedScheduler(200, 10, **options, **ranks), np.random.default_rng(0)
        for _ in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                scheduler.update_with_loss(rng.normal(1, 0.1, len(batch.indices)))
        return str(scheduler._safety.detector.state_dict())

    one, other = on_threads(2, body)
    assert one == other


def test_a_checkpoint_that_one_shards_rank_is_asked_for_is_written_by_all(tmp_path):
    class Asks:
        def __init__(self):
            self.commands = collections.deque()

        def record(self, event):
            if type(event).__name__ == "LossReported" and event.step == 10:
                self.commands.append(Command.CHECKPOINT)

    def body(ranks):
        return Shard(ranks, tmp_path, one_folder=True, sinks=[Asks()] if ranks["rank"] == 0 else []).go()

    on_threads(2, body)
    written = [sorted(step.name for step in shard.glob("step-*")) for shard in sorted(tmp_path.iterdir())]
    assert written[0] == written[1] != []


def test_a_strategy_that_rank_0_draws_for_all_is_refused_over_shards():
    from learnit_r8.errors import ConfigError
    from learnit_r8.integrations.distributed import FromRank0

    outcomes = on_threads(2, lambda ranks: Shard(ranks, strategy=FromRank0("uniform")))
    assert all(isinstance(o, ConfigError) and "chooses on rank 0 for all" in str(o) for o in outcomes)


def test_a_host_whose_checkpoints_hold_one_shard_only_is_told_before_it_trains(tmp_path):
    lightning, transformers = pytest.importorskip("lightning"), pytest.importorskip("transformers")
    import torch

    from learnit_r8.errors import ConfigError
    from learnit_r8.integrations.huggingface import R8Trainer
    from learnit_r8.integrations.lightning import R8Callback
    from learnit_r8.integrations.sharded import ShardedScheduler

    ranks = {"rank": 0, "world_size": 2, "all_gather": lambda array: np.tile(array, 2)}
    scheduler = ShardedScheduler(8, 4, num_epochs=1, checkpoint_dir=None, ui="off", **ranks)
    host = lightning.Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=tmp_path, max_epochs=1)
    with pytest.raises(ConfigError, match="enable_checkpointing=False"):
        R8Callback(scheduler).setup(host, lightning.LightningModule(), "fit")
    with pytest.raises(ConfigError, match="enable_checkpointing=False"):
        R8Callback(scheduler).state_dict()
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ConfigError, match="save_strategy='no'"):
        R8Trainer(torch.nn.Linear(1, 1), args, scheduler=scheduler, train_dataset=list(range(8)))


def test_another_ranks_shard_is_not_loaded():
    from learnit_r8.errors import ConfigError

    first = on_threads(2, lambda ranks: Shard(ranks).go(stop_at=-1).scheduler.state_dict())
    shard = Shard(driver.one_rank())
    with pytest.raises(ConfigError, match="shard 1 of 2, this is shard 0 of 1"):
        shard.scheduler.load_state_dict(first[1])


def test_one_shard_alone_runs_too():
    shard = Shard(driver.one_rank()).go(nan_at=50)
    assert shard.restored == [50]
    assert shard.scheduler.global_step == 200
