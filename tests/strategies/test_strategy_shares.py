"""Weights, groups, mixtures, token budgets: drawn as stated, on any number of ranks, resumed to the bit."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learnit_r8 import R8Scheduler
from learnit_r8.core.rng import RandomStreams
from learnit_r8.errors import ConfigError, ProtocolError
from learnit_r8.samples.catalog import LossCatalog
from learnit_r8.strategies import Balanced, BatchRequest, Mixture, TokenBudget, Weighted
from learnit_r8.testing.states import round_trip
from learnit_r8.types import LossReport

N = 600
LENGTHS = np.random.default_rng(5).integers(1, 200, N)
SOURCES = {"a": range(100), "b": range(100, 500), "c": np.arange(500, N)}


def weights():
    values = np.random.default_rng(1).exponential(size=N)
    values[:2] = 40, 0
    return values


MAKE = {
    "weighted": lambda: Weighted(weights()),
    "balanced": lambda: Balanced(np.repeat([3, 1, 2], [500, 70, 30])),
    "mixture": lambda: Mixture(SOURCES, {"a": 5, "b": 3, "c": 2}),
    "mixture that adapts": lambda: Mixture(SOURCES, adapt="loss", floor=0.1),
    "tokens": lambda: TokenBudget(LENGTHS, 1024),
    "tokens, packed": lambda: TokenBudget(LENGTHS, 1024, padded=False),
}


def losses_of(ids):
    return 1.0 + (np.asarray(ids) >= 500) + 0.1 * np.sin(ids)


def run(strategy, *, size=32, epochs=3, rank=0, world=1, gather=None, stop=None, state=None, **options):
    """Train; return the batches, the scheduler and its state at `stop`."""
    scheduler = R8Scheduler(
        N, size, num_epochs=epochs, strategy=strategy, ui="off", checkpoint_dir=None, rank=rank, world_size=world,
        all_gather=gather, **options,
    )  # fmt: skip
    if state is not None:
        scheduler.load_state_dict(state)
    batches = []
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            batches.append((batch.indices.copy(), batch.lr))
            scheduler.update_with_loss(losses_of(batch.indices))
            if scheduler.global_step == stop:
                return batches, scheduler, round_trip(scheduler.state_dict())
    return batches, scheduler, None


def counts(batches):
    return np.bincount(np.concatenate([ids for ids, _ in batches]), minlength=N)


def expected(name):
    if name == "weighted":
        return weights() / weights().sum()
    shares = {"balanced": ([1 / 3] * 3, [500, 70, 30]), "mixture": ([0.5, 0.3, 0.2], [100, 400, 100])}[name]
    return np.repeat(np.divide(*shares), shares[1])


@pytest.mark.parametrize("name", ["weighted", "balanced", "mixture"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_samples_are_drawn_as_often_as_stated_on_any_number_of_ranks(name, world):
    slots, barrier, drawn = [None] * world, threading.Barrier(world, timeout=60), [None] * world

    def gather(rank):
        def all_gather(array):
            slots[rank] = np.array(array)
            barrier.wait()
            everyone = np.concatenate(slots)
            barrier.wait()
            return everyone

        return all_gather

    def work(rank):
        drawn[rank] = run(MAKE[name](), epochs=20, rank=rank, world=world, gather=gather(rank) if world > 1 else None)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = sum(counts(batches) for batches, _, _ in drawn)
    wanted = expected(name) * total.sum()
    # Systematic draws lie closer than independent ones: no sample beyond 3 sigma of the latter.
    assert (np.abs(total - wanted) <= 3 * np.sqrt(np.maximum(wanted, 1))).all()
    if world == 1:  # and from one batch to the next, the shares themselves
        heavy = 0 if name == "weighted" else slice(500, N)
        share = expected(name)[heavy].sum()
        for ids, _ in drawn[0][0]:
            found = np.isin(ids, np.arange(N)[heavy]).sum()
            assert abs(found - len(ids) * share) < 1 + 1e-9


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("stop", [1, 7, 25])
def test_a_resumed_run_draws_what_the_uninterrupted_one_does(name, stop):
    whole, *_ = run(MAKE[name]())
    _, _, state = run(MAKE[name](), stop=stop)
    rest, *_ = run(MAKE[name](), state=state)
    assert len(rest) == len(whole) - stop
    for (ids, lr), (others, rate) in zip(rest, whole[stop:], strict=True):
        np.testing.assert_array_equal(ids, others)
        assert lr == rate


@pytest.mark.parametrize("name", MAKE)
def test_excluded_samples_are_never_drawn(name):
    mask = np.zeros(N, bool)
    mask[::3] = mask[500:550] = True
    mask.flags.writeable = False
    strategy, catalog, streams = MAKE[name](), LossCatalog(N), RandomStreams(3)
    for epoch in range(3):
        left, cursor = None, 0
        while left is None or left > 0:
            request = BatchRequest(32 if left is None else min(32, left), epoch, cursor, 0, 0.0, catalog, streams)
            request = request._replace(excluded=mask)
            if left is None:
                left = strategy.start_epoch(request) or int((~mask).sum())
                continue
            ids = strategy.draw(request).indices
            assert 1 <= len(ids) <= request.size
            assert not mask[ids].any()
            left, cursor = left - len(ids), cursor + 1


def test_weights_that_change_count_from_the_next_batch():
    strategy = Weighted(np.ones(N))
    scheduler = R8Scheduler(N, 32, num_epochs=2, strategy=strategy, ui="off", checkpoint_dir=None)
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            if scheduler.global_step > 5:
                assert (batch.indices < 10).all()
            if scheduler.global_step == 5:
                strategy.set(np.arange(10, N), 0.0)
            scheduler.update_with_loss(losses_of(batch.indices))
    mixture = Mixture(SOURCES)
    mixture.set_shares({"a": 0, "b": 0, "c": 1})
    batches, *_ = run(mixture, epochs=1)
    assert counts(batches)[:500].sum() == 0


def test_each_sample_of_a_source_comes_before_any_comes_twice():
    batches, *_ = run(Mixture(SOURCES, {"a": 0.6, "b": 0.3, "c": 0.1}), epochs=5)
    total = counts(batches)
    for part in SOURCES.values():
        assert np.ptp(total[np.asarray(part)]) <= 1


def test_shares_that_adapt_go_where_losses_fall_and_keep_their_floor():
    strategy = Mixture(SOURCES, {"a": 1, "b": 1, "c": 1}, adapt="loss", floor=0.1)
    assert strategy.pop_decisions() == []  # before each source was heard of
    run(strategy, epochs=10)
    assert strategy.shares == pytest.approx(dict.fromkeys("abc", 1 / 3), abs=0.01), "no loss falls"
    strategy = Mixture(SOURCES, {"a": 1, "b": 1, "c": 1}, adapt="loss", floor=0.1)
    levels = {"a": 2.0, "b": 2.0, "c": 2.0}
    for _ in range(200):  # a is noise, b is being learned, c is nearly known
        ids, losses = (np.concatenate(part) for part in zip(*(
            (SOURCES[name][:4], np.full(4, level, np.float32)) for name, level in levels.items()
        ), strict=True))  # fmt: skip
        strategy.observe(LossReport(ids, losses, 1.0, True, 0, 0))
        levels = {"a": 2.0, "b": 0.6, "c": 0.02}
    pulls = 0.02 + np.array([0.0, 0.3 * 0.7**2, 0.01 * 0.99**2])
    assert list(strategy.shares.values()) == pytest.approx(0.1 + 0.7 * pulls / pulls.sum(), abs=0.005)
    reasons = {decision: why for decision, why, _ in strategy.pop_decisions()}
    stays = "its loss stays: noise, or too hard yet"
    assert reasons == {"share of a": stays, "share of b": "follows the losses", "share of c": "follows the losses"}
    greedy = Mixture(SOURCES, adapt=lambda losses: {name: float(loss > 1.5) for name, loss in losses.items()})
    _, scheduler, _ = run(greedy, epochs=10)
    assert greedy.shares == pytest.approx({"a": 0.05, "b": 0.05, "c": 0.9})
    assert sum(greedy.shares.values()) == pytest.approx(1)
    assert scheduler.global_step == 10 * -(-N // 32)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=300), st.booleans(), st.integers(1, 64), st.integers(0, 9))
def test_every_batch_fits_the_budget_and_each_sample_comes_once(lengths, padded, size, seed):
    lengths = np.array(lengths)
    strategy = TokenBudget(lengths, 64, padded=padded)
    scheduler = R8Scheduler(
        len(lengths), size, num_epochs=2, strategy=strategy, seed=seed, ui="off", checkpoint_dir=None
    )
    for _ in scheduler.epoch_iterator():
        drawn = []
        for batch in scheduler.batch_iterator():
            assert strategy.batches_left == scheduler.epoch_batches[1] - scheduler.epoch_batches[0] - 1
            of_batch = lengths[batch.indices]
            assert (len(of_batch) * of_batch.max() if padded else of_batch.sum()) <= 64
            drawn += batch.indices.tolist()
            scheduler.update_with_loss(losses_of(batch.indices))
        assert sorted(drawn) == list(range(len(lengths)))


@pytest.mark.parametrize(("padded", "longest"), [(True, 60), (False, 700)])
def test_batches_fill_95_percent_of_the_budget(padded, longest):
    lengths = np.random.default_rng(2).integers(1, longest, 5000)
    scheduler = R8Scheduler(
        5000, 2048, num_epochs=1, strategy=TokenBudget(lengths, 1024, padded=padded), ui="off", checkpoint_dir=None
    )
    fill = []
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            of_batch = lengths[batch.indices]
            fill.append((len(of_batch) * of_batch.max() if padded else of_batch.sum()) / 1024)
            scheduler.update_with_loss(losses_of(batch.indices))
    assert np.mean(fill) >= 0.95


def test_ranks_get_equal_slices_of_a_padded_budget_and_a_packed_one_is_refused():
    strategy = TokenBudget(LENGTHS, 1024)
    request = BatchRequest(64, 0, 0, 0, 0.0, LossCatalog(N), RandomStreams(0), multiple=4)
    left = strategy.start_epoch(request)
    while left > 0:
        ids = strategy.draw(request).indices
        left -= len(ids)
        assert len(ids) % 4 == 0
        assert len(ids) * LENGTHS[ids].max() <= 1024
    with pytest.raises(ProtocolError, match="works on one rank"):
        TokenBudget(LENGTHS, 1024, padded=False).start_epoch(request)


BAD = [
    (lambda: Weighted([]), "a positive one"),
    (lambda: Weighted([0.0, 0.0]), "a positive one"),
    (lambda: Weighted([1.0, -1.0]), "not negative"),
    (lambda: Weighted([1.0, np.nan]), "finite"),
    (lambda: Mixture({}), "at least one"),
    (lambda: Mixture({"a": [], "b": [0]}), "'a' must have sample ids"),
    (lambda: Mixture({"a": [0, 1], "b": [1]}), r"\[1\] have several"),
    (lambda: Mixture(SOURCES, {"a": 1}), "shares must name the sources"),
    (lambda: Mixture(SOURCES, {"a": 1, "b": -1, "c": 1}), "not negative"),
    (lambda: Mixture(SOURCES, adapt="love"), "adapt must be"),
    (lambda: Mixture(SOURCES, adapt="loss", floor=0.5), "floor"),
    (lambda: Balanced(np.zeros((2, 2))), "1-D"),
    (lambda: TokenBudget([3, 0]), "whole numbers from 1"),
    (lambda: TokenBudget([3, 9000]), r"the first ones \[1\]"),
    (lambda: run(Weighted([1.0, 2.0])), "one a sample: 2 for 600"),
    (lambda: run(TokenBudget([1, 2])), "one a sample: 2 for 600"),
    (lambda: run(Mixture({"a": [N]})), "below num_samples"),
    (lambda: Weighted([1.0, 2.0]).set([0, 1], 0.0), "leave a positive one"),
    (lambda: Weighted([1.0, 2.0]).set([0, 1], [1.0]), "one for each"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_says_what_was_expected(case):
    make, says = BAD[case]
    with pytest.raises(ConfigError, match=says):
        make()
