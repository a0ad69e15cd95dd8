"""Every built-in strategy keeps the contract, and the contract's checks catch what breaks it."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from learnit_r8 import strategies
from learnit_r8.core.rng import Purpose, RandomStreams
from learnit_r8.errors import ConfigError
from learnit_r8.samples.catalog import LossCatalog
from learnit_r8.scheduler import R8Scheduler
from learnit_r8.strategies import (
    Adaptive,
    BatchRequest,
    Curriculum,
    Draw,
    InfoBatch,
    Prioritized,
    RewardWeighted,
    SpacedRepetition,
)
from learnit_r8.testing import FakeClock, check_resume, check_sink, check_strategy

BUILT_IN = ["uniform", "quadrant", "spaced", "curriculum", "prioritized", "adaptive", "reward", "infobatch"]


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_strategy_keeps_the_contract(name):
    check_strategy(lambda: strategies.make(name))


EXTREMES = {
    "spaced, eager": lambda: SpacedRepetition(spacing_steps=3, min_backlog_ratio=0.5, patience=1),
    "spaced, in fractions of a step": lambda: SpacedRepetition(spacing_steps=0.3, min_backlog_ratio=0, max_interval=1),
    "curriculum, cold": lambda: Curriculum("competence_based", n_bins=3, temperature=0.01, debias=True),
    "curriculum, one bin": lambda: Curriculum("uniform", n_bins=1),
    "curriculum, more bins than samples": lambda: Curriculum("easy_first", n_bins=400),
    "prioritized, uniform": lambda: Prioritized(alpha=0, beta=1, beta_end=1, normalize=None),
    "prioritized, greedy": lambda: Prioritized(alpha=4, beta=1, beta_end=1),
    "adaptive, wild": lambda: Adaptive(learning_rate=50, momentum=0),
    "reward, greedy": lambda: RewardWeighted(temperature=1e-3),
    "reward, by rank": lambda: RewardWeighted(use_rank=True),
    "infobatch, hard pruning": lambda: InfoBatch(ratio=0.9, anneal=0, normalize=True),
    "infobatch, weights up to 5": lambda: InfoBatch(ratio=0.8, anneal=0),
    "infobatch, none": lambda: InfoBatch(ratio=0),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_settings_keep_the_contract_too(name):
    check_strategy(EXTREMES[name], thorough=False)


class Broken:
    """A sound uniform strategy; subclasses break one rule each."""

    def draw(self, request):
        ids = np.arange(request.num_samples)
        if request.excluded is not None:
            ids = ids[~request.excluded]
        return request.rng.permutation(ids)[: request.size]


class OutOfRange(Broken):
    def draw(self, request):
        return super().draw(request) + 1


class Repeats(Broken):
    def draw(self, request):
        ids = super().draw(request)
        ids[-1] = ids[0]
        return ids


class Greedy(Broken):
    def draw(self, request):
        return request.rng.permutation(request.num_samples)[: request.size]


class GlobalRandomness(Broken):
    def draw(self, request):
        return np.random.default_rng().permutation(super().draw(request))


class Forgetful(Broken):
    count = 0

    def draw(self, request):
        self.count += 1
        return np.roll(np.sort(super().draw(request)), self.count % request.size)


class Liar(Broken):
    def draw(self, request):
        ids = super().draw(request)
        half = np.where(ids < request.num_samples // 2, 0.5, 1.5)
        return Draw(ids, half / request.num_samples, np.ones(len(ids)))


class Unbounded(Broken):
    def draw(self, request):
        ids = super().draw(request)
        return Draw(ids, weights=np.where(ids == 0, 50.0, 1.0))


class Floats(Broken):
    def draw(self, request):
        return super().draw(request).astype(float)


@pytest.mark.parametrize(
    ("strategy", "complaint"),
    [
        (OutOfRange, "allowed are 0 to"),
        (Repeats, "twice in one batch"),
        (Greedy, "request.excluded"),
        (GlobalRandomness, "request.rng"),
        (Forgetful, "state_dict"),
        (Liar, "as often as the probabilities say"),
        (Unbounded, "mix the draw with uniform"),
        (Floats, "integer array"),
    ],
)
def test_a_broken_strategy_is_told_what_to_do(strategy, complaint):
    with pytest.raises(AssertionError, match=complaint):
        check_strategy(strategy)


def test_a_sound_strategy_of_a_user_passes():
    check_strategy(Broken)


def request_of(
    catalog, *, epoch=1, cursor=0, size=10, progress=0.3, purpose=Purpose.BATCH, excluded=None, stable=False
):
    return BatchRequest(size, epoch, cursor, 50, progress, catalog, RandomStreams(3), purpose, excluded, stable)


def catalog_of(losses):
    catalog = LossCatalog(len(losses))
    catalog.record(catalog.look_up(np.arange(len(losses))), np.asarray(losses, np.float32), 0)
    return catalog


@pytest.mark.parametrize("name", ["spaced", "curriculum", "prioritized", "adaptive", "reward", "infobatch"])
def test_after_a_rollback_batches_come_from_the_lower_losses(name):
    losses = np.random.default_rng(0).permutation(1000) / 1000
    strategy = strategies.make(name)
    catalog = catalog_of(losses)
    strategy.draw(request_of(catalog))
    drawn = strategy.draw(request_of(catalog, cursor=1, stable=True))
    ids = drawn.indices if isinstance(drawn, Draw) else drawn
    assert losses[ids].mean() < 0.4
    assert len(np.unique(ids)) == 10


@pytest.mark.parametrize("name", ["prioritized", "adaptive"])
def test_a_report_changes_how_often_a_sample_is_drawn(name):
    strategy = strategies.make(name)
    catalog = catalog_of(np.ones(200))
    strategy.draw(request_of(catalog))
    losses = np.ones(200, np.float32)
    losses[7] = 100
    for _ in range(40):
        strategy.observe(report_of(np.arange(200), losses))
    counts = np.zeros(200)
    for cursor in range(400):
        counts[strategy.draw(request_of(catalog, cursor=cursor)).indices] += 1
    assert counts[7] > 2 * counts.mean()


def report_of(indices, losses):
    from learnit_r8.types import LossReport

    return LossReport(indices, losses, float(losses.mean()), True, 51, 1)


def test_unseen_samples_have_the_highest_priority():
    catalog = LossCatalog(100)
    catalog.record(catalog.look_up(np.arange(50)), np.linspace(0, 2, 50, dtype=np.float32), 0)
    strategy = Prioritized()
    strategy.start_epoch(request_of(catalog, purpose=Purpose.PLAN))
    weights = strategy.state_dict()["sampler"]["weights"]
    np.testing.assert_array_equal(weights[50:], weights[:50].max())


def test_infobatch_is_unbiased_and_prunes():
    losses = np.random.default_rng(1).lognormal(0, 1, 2000)
    catalog = catalog_of(losses)
    for strategy, scale in ((InfoBatch(normalize=True), 1.0), (InfoBatch(), None)):
        sums, drawn, batches, epoch = [], 0, 0, 0
        while batches < 10_000:
            epoch += 1
            samples = strategy.start_epoch(request_of(catalog, epoch=epoch, purpose=Purpose.PLAN))
            drawn += samples
            for cursor in range(-(-samples // 20)):
                draw = strategy.draw(request_of(catalog, epoch=epoch, cursor=cursor, size=20))
                sums.append((draw.weights * losses[draw.indices]).sum())
                batches += 1
        share = drawn / (epoch * 2000)
        assert share < 0.75
        # The published weights keep an epoch's sum, the normalised ones a step's size.
        assert sum(sums) / drawn * (scale or share) == pytest.approx(losses.mean(), rel=0.01)


def test_infobatch_refuses_weights_above_the_limit():
    with pytest.raises(ConfigError, match=r"at most 0\.8 for weights up to 5, got 0\.9: .* normalize=True"):
        InfoBatch(ratio=0.9)


def test_infobatch_uses_everything_at_the_end_and_before_losses_are_known():
    losses = np.random.default_rng(1).lognormal(0, 1, 100)
    late = request_of(catalog_of(losses), progress=0.9, purpose=Purpose.PLAN)
    assert InfoBatch().start_epoch(late) == 100
    assert InfoBatch().start_epoch(request_of(LossCatalog(100), purpose=Purpose.PLAN)) == 100


def test_curriculum_moves_from_easy_to_hard():
    losses = np.random.default_rng(0).permutation(1000) / 1000
    catalog = catalog_of(losses)
    strategy = Curriculum("competence_based")
    strategy.start_epoch(request_of(catalog, purpose=Purpose.PLAN))
    means = [
        np.mean([losses[strategy.draw(request_of(catalog, cursor=c, progress=t)).indices].mean() for c in range(40)])
        for t in (0.0, 0.5, 1.0)
    ]
    assert means[0] < 0.4 < means[1] < 0.6 < means[2]


def test_rewards_of_another_length_are_refused():
    with pytest.raises(ValueError, match="one entry per sample"):
        RewardWeighted([1.0, 2.0]).draw(request_of(LossCatalog(3)))


def test_bad_settings_are_listed_together():
    with pytest.raises(strategies.base.ConfigError) as caught:
        SpacedRepetition(spacing_steps=-1, min_backlog_ratio=2, growth_rate=0.5, patience=0)
    assert len(caught.value.problems) == 4


class ListSink:
    def __init__(self):
        self.events = []
        self.commands = deque()

    def record(self, event):
        self.events.append(event)


def test_check_sink_sends_every_kind_of_event_and_reports_a_failure():
    check_sink(ListSink)

    class Fussy(ListSink):
        def record(self, event):
            event.loss  # noqa: B018 - most events have none

    with pytest.raises(AssertionError, match="ignore the events that you do not know"):
        check_sink(Fussy)


def test_check_resume_finds_state_that_is_not_saved():
    class Counter:
        def __init__(self):
            self.a = self.b = 0

        def state_dict(self):
            return {"a": self.a}

        def load_state_dict(self, state):
            self.a = state["a"]

    def both(counter):
        counter.a += 1
        counter.b += 1
        return counter.a, counter.b

    def first(counter):
        return both(counter)[0]

    check_resume(Counter, first)
    with pytest.raises(AssertionError, match="missing from state_dict"):
        check_resume(Counter, both)


def test_a_fake_clock_moves_only_when_told():
    clock = FakeClock()
    clock.sleep(2)
    clock.advance(3)
    assert (clock.monotonic(), clock.wall(), clock.slept) == (5.0, 1_700_000_005.0, [2])
    with pytest.raises(ValueError, match="does not go back"):
        clock.advance(-1)


def losses_of(batch, scalar):
    losses = np.sin(batch.indices) + 2 + batch.step % 3
    return float(losses.mean()) if scalar else losses


@pytest.mark.parametrize("scalar", [False, True], ids=["losses per sample", "one loss a batch"])
@pytest.mark.parametrize("name", BUILT_IN)
def test_a_run_saved_in_mid_epoch_goes_on_the_same(name, scalar, tmp_path):
    def run(scheduler, stop=None):
        seen = []
        with scheduler:
            for _ in scheduler.epoch_iterator():
                for batch in scheduler.batch_iterator():
                    seen.append((batch.indices.tolist(), batch.weights.tolist()))
                    scheduler.update_with_loss(losses_of(batch, scalar))
                    if len(seen) == stop:
                        return scheduler.state_dict(), seen
        return None, seen

    def make():
        return R8Scheduler(90, 8, num_epochs=4, strategy=name, use_curses=False, checkpoint_dir=tmp_path, seed=1)

    _, whole = run(make())
    for stop in (5, 17, 31):
        state, head = run(make(), stop)
        resumed = make()
        resumed.load_state_dict(state)
        assert head + run(resumed)[1] == whole
