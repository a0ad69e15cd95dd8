"""`strategy="auto"`: what is left out and learned all the same is sought, what nothing explains is avoided."""

from __future__ import annotations

import numpy as np
import pytest

from learnit_r8.errors import ConfigError
from learnit_r8.events import StrategyDecided
from learnit_r8.scheduler import R8Scheduler
from learnit_r8.strategies import Auto, make
from learnit_r8.testing import check_strategy

EPOCHS, SAMPLES = 20, 600


class Kinds:
    """Losses of a made-up learner: each sample has a kind, and forgets in epochs what it learned by heart.

    Easy and hard samples are explained by their like, wrong ones only by themselves.
    """

    def __init__(self, hard: float, wrong: float) -> None:
        rng = np.random.default_rng(3)
        order = rng.permutation(SAMPLES)
        self.hard, self.wrong = np.zeros((2, SAMPLES), bool)
        self.hard[order[: round(hard * SAMPLES)]] = True
        self.wrong[order[SAMPLES - round(wrong * SAMPLES) :]] = True
        self.jitter = rng.lognormal(0, 0.1, SAMPLES)
        self.last = np.full(SAMPLES, -1)
        self.draws = np.zeros(SAMPLES, int)

    def losses(self, ids: np.ndarray, epoch: int) -> np.ndarray:
        common = np.exp(-epoch / 2.0)
        level = np.where(self.hard, np.exp(-epoch / 4.0), common)
        by_heart = (self.last[ids] >= epoch - 1) & (epoch > 0)
        wrong = np.where(by_heart, 1.0, 2.5)
        self.last[ids] = epoch
        self.draws[ids] += 1
        return 2.3 * self.jitter[ids] * np.where(self.wrong[ids], wrong, np.maximum(level[ids], 0.01))


class Heard:
    def __init__(self) -> None:
        self.decisions: list[StrategyDecided] = []

    def record(self, event) -> None:
        if isinstance(event, StrategyDecided):
            self.decisions.append(event)


def run(kinds: Kinds, *, scalar: bool = False, strategy="auto"):
    heard = Heard()
    late = np.zeros(SAMPLES, int)
    with R8Scheduler(
        SAMPLES,
        20,
        num_epochs=EPOCHS,
        strategy=strategy,
        noise_guard="off",  # it decides too, and is heard in the same events
        use_curses=False,
        sinks=[heard],
    ) as scheduler:
        for epoch in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                losses = kinds.losses(batch.indices, epoch)
                scheduler.update_with_loss(float(losses.mean()) if scalar else losses)
                if epoch >= EPOCHS // 2:
                    late[batch.indices] += 1
    return heard.decisions, late


def test_auto_keeps_the_contract_of_a_strategy():
    check_strategy(Auto)
    check_strategy(lambda: Auto(alpha=2.0, avoid=False), thorough=False)


def test_hard_samples_that_are_learnable_are_drawn_more_often():
    kinds = Kinds(hard=0.2, wrong=0.0)
    decisions, late = run(kinds)
    assert decisions[-1].decision == "seek hard samples"
    assert late[kinds.hard].mean() > 1.1 * late[~kinds.hard].mean()


def test_unexplained_samples_are_drawn_less_and_are_not_sought():
    kinds = Kinds(hard=0.0, wrong=0.2)
    decisions, late = run(kinds)
    assert "avoid" in decisions[-1].decision
    assert late[kinds.wrong].mean() < 0.5 * late[~kinds.wrong].mean()


def test_a_suspect_that_its_like_explain_after_all_is_drawn_like_the_others_again():
    kinds = Kinds(hard=0.0, wrong=0.2)
    explained = np.flatnonzero(kinds.wrong)[:60]
    suspected = []

    class Watched(Auto):
        def start_epoch(self, request):
            if request.epoch == 9:
                kinds.wrong[explained] = False
            count = super().start_epoch(request)
            suspected.append(self.state_dict()["samples"]["suspect"][explained].mean())
            return count

    run(kinds, strategy=Watched())
    assert max(suspected[:9]) > 0.8
    assert suspected[-1] < 0.2 * max(suspected[:9])


def test_with_avoid_off_unexplained_samples_only_stop_the_seeking():
    kinds = Kinds(hard=0.0, wrong=0.2)
    decisions, late = run(kinds, strategy=Auto(avoid=False))
    assert [decision.decision for decision in decisions] == ["uniform"]
    assert late[kinds.wrong].mean() == pytest.approx(late[~kinds.wrong].mean(), rel=0.05)


def test_every_decision_is_an_event_with_its_figure():
    decisions, _ = run(Kinds(hard=0.2, wrong=0.1))
    assert decisions
    for event in decisions:
        assert f"{event.figure:.2f}" in event.reason


def test_from_one_loss_a_batch_it_stays_uniform_and_says_why():
    decisions, late = run(Kinds(hard=0.2, wrong=0.2), scalar=True)
    assert [(event.decision, event.reason) for event in decisions] == [("uniform", "one loss per sample is needed")]
    assert late.max() - late.min() <= EPOCHS // 2


def test_it_spends_the_same_number_of_samples_as_uniform():
    auto, uniform = Kinds(0.2, 0.2), Kinds(0.2, 0.2)
    run(auto)
    run(uniform, strategy="uniform")
    assert auto.draws.sum() == uniform.draws.sum()


@pytest.mark.parametrize("loss", [0.0, -1.0, 1e-30])
def test_losses_that_say_nothing_leave_it_uniform(loss):
    with R8Scheduler(50, 8, num_epochs=10, strategy="auto", use_curses=False) as scheduler:
        for _ in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                scheduler.update_with_loss(np.full(len(batch.indices), loss))
        uses = scheduler.catalog.uses
    assert uses.sum() == 500
    assert uses.min() >= 5


@pytest.mark.parametrize("cut", [3, 45, 100, 211])
def test_a_run_resumed_from_its_state_draws_what_the_whole_run_draws(cut):
    def start():
        return R8Scheduler(SAMPLES, 50, num_epochs=EPOCHS, strategy="auto", use_curses=False, checkpoint_dir=None)

    def go(scheduler, kinds, steps):
        drawn = []
        for epoch in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                drawn.append(batch.indices)
                scheduler.update_with_loss(kinds.losses(batch.indices, epoch))
                if len(drawn) == steps:
                    return drawn
        return drawn

    kinds = Kinds(0.2, 0.1)
    whole = go(start(), kinds, 10_000)
    kinds = Kinds(0.2, 0.1)
    first = start()
    go(first, kinds, cut)
    second = start()
    second.load_state_dict(first.state_dict())
    rest = go(second, kinds, 10_000)
    assert len(rest) == len(whole) - cut
    for one, other in zip(rest, whole[cut:], strict=True):
        np.testing.assert_array_equal(one, other)


def test_bad_arguments_are_all_listed():
    with pytest.raises(ConfigError, match=r"alpha.*\n?.*avoid"):
        Auto(alpha=-1, avoid="yes")


def test_it_is_known_by_name():
    assert isinstance(make("auto"), Auto)
