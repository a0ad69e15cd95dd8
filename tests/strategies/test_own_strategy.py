"""A strategy of the user's own that breaks the contract: `check_strategy` finds it, and a run says what is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from learnit_r8.errors import ConfigError, ProtocolError
from learnit_r8.events import SampleQuarantined
from learnit_r8.scheduler import R8Scheduler
from learnit_r8.strategies import Draw, base, make
from learnit_r8.strategies.contract import OPTIONAL, Rules
from learnit_r8.strategies.uniform import Uniform
from learnit_r8.testing import check_strategy


class Sound:
    def draw(self, request):
        ids = np.arange(request.num_samples)
        if request.excluded is not None:
            ids = ids[~request.excluded]
        return request.rng.permutation(ids)[: request.size]


ONLY_ONE = Sound()


def returns(change):
    """Make a strategy whose draw is changed."""

    class Changed(Sound):
        def draw(self, request):
            return change(super().draw(request))

    return Changed


def plans(samples):
    """Make a strategy whose epochs claim that many samples."""

    class Planning(Sound):
        def start_epoch(self, request):
            return samples

    return Planning


class Wraps:
    """Changes what a built-in strategy draws."""

    def __init__(self):
        self.wrapped = make("uniform")

    def draw(self, request):
        return np.asarray(self.wrapped.draw(request)) + 50


class Turning(Sound):
    """Depends on the number of its draws, in an array that it changes in place."""

    def __init__(self):
        self.turn = np.zeros(1, np.int64)

    def draw(self, request):
        self.turn += 1
        return np.roll(np.sort(super().draw(request)), self.turn[0] % request.size)

    def state_dict(self):
        return {"turn": self.turn.copy()}

    def load_state_dict(self, state):
        self.turn = np.array(state["turn"])


class LeaksItsState(Turning):
    def state_dict(self):
        return {"turn": self.turn}


class KeepsTheGivenState(Turning):
    def load_state_dict(self, state):
        self.turn = state["turn"]


class SavesASet(Turning):
    def state_dict(self):
        return {"turn": {1, 2}}


class SavesOnly(Sound):
    def state_dict(self):
        return {}


class Scribbles(Sound):
    def start_epoch(self, request):
        if request.excluded is not None:
            request.excluded[0] = True


@pytest.mark.parametrize(
    ("factory", "complaint"),
    [
        (returns(lambda ids: ids[:0]), "draw must return 1 to 1 sample ids.*shape .0,..*num_samples=1, batch_size=1"),
        (returns(lambda ids: None), "NoneType of shape"),
        (returns(lambda ids: Draw(ids, weights=["1"] * len(ids))), "not all 0, one per sample"),
        (returns(lambda ids: Draw(ids, weights=np.ones(len(ids) + 1))), "one per sample"),
        (plans(0), "start_epoch must return how many .* got 0"),
        (plans("ten"), "start_epoch must return .* got .ten."),
        (LeaksItsState, r"state_dict\(\) return copies"),
        (KeepsTheGivenState, r"load_state_dict\(\) take copies"),
        (SavesASet, r"cannot be saved: state\['turn'\] is a set"),
        (SavesOnly, "a resume needs both"),
        (Sound(), "such as its class, got"),
        ("uniform", "such as its class, got 'uniform'"),
        (lambda: ONLY_ONE, "a new one at each"),
    ],
)
def test_the_check_says_what_is_broken(factory, complaint):
    with pytest.raises(AssertionError, match=complaint):
        check_strategy(factory, thorough=False)


def test_the_check_passes_sound_strategies():
    check_strategy(Turning, thorough=False)
    check_strategy(lambda: returns(lambda ids: ids.tolist())(), thorough=False)
    with pytest.raises(ValueError, match="read-only"):
        check_strategy(Scribbles)


def test_the_strategy_in_the_protocols_text_is_sound():
    start = base.__doc__.index("    class Shuffled:")
    lines = base.__doc__[start : base.__doc__.index("What else it may have")].splitlines()
    names = {"np": np}
    exec("\n".join(line[4:] for line in lines), names)
    check_strategy(names["Shuffled"], thorough=False)


def train(scheduler, epochs=None):
    with scheduler:
        for epoch in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                scheduler.update_with_loss(np.sin(batch.indices) + 2)
            if epoch == epochs:
                break


def scheduler_with(strategy, **arguments):
    return R8Scheduler(50, 8, **({"num_epochs": 3, "strategy": strategy, "ui": "off", "seed": 1} | arguments))


@pytest.mark.parametrize(
    ("factory", "complaint"),
    [
        (returns(lambda ids: ids + 50), "Changed.draw returned ids from .* allowed are 0 to 49"),
        (Wraps, "Wraps.draw returned ids from .* allowed are 0 to 49"),
        (returns(lambda ids: np.repeat(ids[:1], 2)), "twice in one batch"),
        (returns(lambda ids: ids / 1.0), "ndarray of shape .8,. and dtype float64"),
        (returns(lambda ids: None), "got NoneType"),
        (returns(lambda ids: Draw(ids, weights=np.full(len(ids), np.nan))), "weights that are finite, not negative"),
        (returns(lambda ids: Draw(ids, weights=np.zeros(len(ids)))), "not all 0"),
        (returns(lambda ids: Draw(ids, weights=np.arange(len(ids)) - 1.0)), "not negative"),
        (returns(lambda ids: Draw(ids, weights=np.ones(3))), "got shape .3,., .* for 8 samples"),
        (returns(lambda ids: Draw(ids, weights=["1"] * len(ids))), "shape .8,., .'1' '1'"),
        (returns(lambda ids: Draw(ids, [0.0] * len(ids))), "probabilities that are finite and positive"),
        (plans(0), "Planning.start_epoch must return .* got 0"),
        (plans(2.5), "whole number >= 1, or None .* got 2.5"),
    ],
)
def test_a_run_stops_at_a_broken_strategy_and_can_still_be_saved(factory, complaint):
    scheduler = scheduler_with(factory())
    with pytest.raises(ProtocolError, match=complaint):
        train(scheduler)
    other = scheduler_with(Sound())
    state = scheduler.state_dict()
    state["config"]["strategy"] = "Sound"
    other.load_state_dict(state)
    train(other)
    assert other.global_step == 21


def test_probabilities_may_be_lists():
    scheduler = scheduler_with(returns(lambda ids: Draw(ids.tolist(), [0.01] * len(ids)))())
    with scheduler:
        for epoch in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                np.testing.assert_allclose(batch.weights, 2.0 if epoch else 1.0)
                scheduler.update_with_loss(1.0)


def test_a_class_in_place_of_an_object_is_told_to_be_called():
    with pytest.raises(ConfigError, match=r"strategy must be an object, got the class Sound: give Sound\(\)"):
        scheduler_with(Sound)


def test_state_that_is_saved_but_never_restored_is_refused_at_once():
    with pytest.raises(ConfigError, match="SavesOnly has state_dict but no load_state_dict: a resume needs both"):
        scheduler_with(SavesOnly())


class Careless(Sound):
    def draw(self, request):
        ids = request.rng.permutation(request.num_samples)[: request.size]
        return Draw(ids, weights=1 + ids / 100)


class Quarantines(list):
    def record(self, event):
        if isinstance(event, SampleQuarantined):
            self.append(event)


def poisoned_run():
    """Train with losses that are NaN at sample 7; return the batches of the epochs after its quarantine."""
    quarantines, batches = Quarantines(), []
    scheduler = scheduler_with(
        Careless(), num_epochs=8, state_callback=dict, load_callback=lambda state: None, sinks=[quarantines]
    )
    with scheduler:
        for _ in scheduler.epoch_iterator():
            known = bool(quarantines)
            for batch in scheduler.batch_iterator():
                losses = np.sin(batch.indices) + 2
                assert batch.weights.all()
                losses[batch.indices == 7] = np.nan
                scheduler.update_with_loss(losses)
                batches += [batch] * known
    return batches


def test_what_must_not_be_trained_on_is_taken_out_of_a_careless_strategys_batches():
    with pytest.warns(RuntimeWarning, match="Careless.draw returned samples of request.excluded") as caught:
        batches = poisoned_run()
    assert len(caught) == 1
    assert batches
    assert not any(7 in batch.indices for batch in batches)
    assert min(len(batch.indices) for batch in batches) < 8
    for batch in batches:
        np.testing.assert_allclose(batch.weights, 1 + batch.indices / 100, rtol=1e-6)


LENGTHS = np.random.default_rng(3).integers(10, 60, 1000)


class TokenBudget:
    """As many samples as make up 256 tokens, each once an epoch."""

    covers = True
    catalogs = False

    def __init__(self):
        self.plan = np.empty(0, np.int64)

    def start_epoch(self, request):
        order = request.rng.permutation(request.num_samples)
        self.plan = order if request.excluded is None else order[~request.excluded[order]]
        return len(self.plan)

    def draw(self, request):
        count = max(int((np.cumsum(LENGTHS[self.plan[: request.size]]) <= 256).sum()), 1)
        chosen, self.plan = self.plan[:count], self.plan[count:]
        return chosen

    def state_dict(self):
        return {"plan": self.plan}

    def load_state_dict(self, state):
        self.plan = np.array(state["plan"], np.int64)


def drawn(scheduler, stop_at=-1):
    seen = []
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            seen.append((batch.epoch, batch.indices.tolist(), batch.lr))
            scheduler.update_with_loss(np.cos(batch.indices) + 2)
            if len(seen) == stop_at:
                return seen
    return seen


def test_an_epoch_of_short_batches_goes_on_until_each_sample_was_drawn():
    check_strategy(TokenBudget, thorough=False)
    with R8Scheduler(300, 32, num_epochs=3, ui="off", checkpoint_dir=None, strategy=TokenBudget()) as scheduler:
        seen = drawn(scheduler)
    for epoch in range(3):
        assert sorted(i for at, ids, _ in seen if at == epoch for i in ids) == list(range(300))
    assert max(int(LENGTHS[ids].sum()) for _, ids, _ in seen) <= 256
    rates = [lr for _, _, lr in seen]
    peak = int(np.argmax(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.01 * max(rates)


@pytest.mark.parametrize("lookahead", [1, 6])
@pytest.mark.parametrize("stop_at", [1, 20, 45])
def test_short_batches_resume_to_the_bit_also_those_that_were_out(lookahead, stop_at):
    def make():
        return R8Scheduler(
            300, 32, num_epochs=3, ui="off", checkpoint_dir=None, strategy=TokenBudget(), lookahead=lookahead
        )

    whole = drawn(make())
    first = make()
    head = drawn(first, stop_at)
    early = first.batch_iterator()
    for _ in range(lookahead):  # drawn ahead, and lost with the process
        next(early, None)
    second = make()
    second.load_state_dict(first.state_dict())
    assert head + drawn(second) == whole
    first.close()


@pytest.mark.parametrize("count", [1, 3])
def test_a_strategy_without_a_plan_that_draws_few_takes_more_batches(count):
    with R8Scheduler(
        20, 8, num_epochs=2, ui="off", checkpoint_dir=None, strategy=returns(lambda ids: ids[:count])()
    ) as scheduler:
        seen = drawn(scheduler)
    sizes = [len(ids) for epoch, ids, _ in seen if epoch == 1]
    assert sum(sizes) == 20
    assert max(sizes) == count


def test_the_guide_names_what_a_strategy_may_have_and_the_reference_has_all_of_it():
    docs = Path(__file__).parents[2] / "docs"
    guide = (docs / "write-a-strategy.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|", guide[guide.index("## All that a strategy may have") :], re.MULTILINE)
    named = set(re.findall(r"`(\w+)", " ".join(rows)))
    assert {"draw", "start_epoch", "observe", "state_dict"} <= named <= {"draw", *OPTIONAL}
    assert "::: learnit_r8.strategies.contract.Rules" in (docs / "api" / "strategies.md").read_text(encoding="utf-8")


def test_what_a_strategy_has_not_does_nothing():
    rules = Rules(Sound())
    assert rules.start_epoch(None) is rules.observe(None) is rules.state_dict() is None
    assert (rules.pop_decisions(), rules.catalogs, rules.covers, rules.replacement) == ([], True, False, False)
    assert not any(map(rules.has, OPTIONAL))
    assert (Rules(Uniform()).sound, rules.sound) == (True, False)
