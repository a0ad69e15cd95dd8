"""Prompts get rollouts where their groups are likely to teach."""

import json
import math

import numpy as np
import pytest

from learnit_r8 import R8Scheduler
from learnit_r8.errors import ConfigError, StateError
from learnit_r8.prompts import PromptScheduler
from learnit_r8.strategies import Prompts

RATES = np.repeat([0.0, 0.5, 1.0], [40, 20, 40])  # never, sometimes, always


def trained(rate=RATES, steps=60, n=10, **options):
    """Return a scheduler that has heard of binary groups, and how many of its last draws were of mixed prompts."""
    rng = np.random.default_rng(options.get("seed", 0))
    prompts, hits = PromptScheduler(range(len(rate)), 8, **options), 0
    for step in range(steps):
        for key in prompts.draw(n):
            prompts.update(key, (rng.random(8) < rate[key]).astype(float))
            hits += step >= steps // 2 and 0 < rate[key] < 1
    return prompts, hits / max(n * (steps - steps // 2), 1)


def test_prompts_that_are_sometimes_solved_are_drawn_far_more_often_than_their_share():
    shares = [trained(seed=seed)[1] for seed in range(5)]
    assert min(shares) > 1.5 * 0.2


def test_no_prompt_is_given_up():
    prompts = PromptScheduler(range(50), seed=1)
    last = {}
    for step in range(400):
        for key in prompts.draw(5):
            prompts.update(key, [0.0] * 8 if key else [0.0, 1.0] * 4)
            last[key] = step
    assert len(last) == 50
    assert min(last.values()) > 100


def test_a_solved_prompt_comes_back_as_its_evidence_fades():
    fast, slow = PromptScheduler(range(2), fade=0.9), PromptScheduler(range(2), fade=1.0)
    for prompts in (fast, slow):
        prompts.update(0, [1.0] * 8)
        for _ in range(50):
            prompts.draw(1)
    assert slow.pass_rate(0) == pytest.approx(0.9)
    assert fast.pass_rate(0) == pytest.approx((1 + 8 * 0.9**50) / (2 + 8 * 0.9**50))


def test_the_belief_is_the_beta_posterior_of_evidence_that_halves_with_each_group():
    prompts = PromptScheduler(["p"], 4, fade=1.0)
    assert prompts.pass_rate("p") == 0.5
    prompts.update("p", [1, 1, 0, 0])
    prompts.update("p", [1, 1, 1, 0])
    assert prompts.pass_rate("p") == pytest.approx((1 + 0.5 * 2 + 3) / (2 + 0.5 * 4 + 4))
    in_parts = PromptScheduler(["p"], 4, fade=1.0)
    for rewards in ([1, 1, 0, 0], [1, 1], [1, 0]):
        in_parts.update("p", rewards)
    assert in_parts.pass_rate("p") == pytest.approx((1 + 0.5 * 2 + math.sqrt(0.5) * 2 + 1) / (2 + 2 + 2**0.5 + 2))


def test_a_prompt_that_is_always_rewarded_alike_is_dull_whatever_the_reward():
    prompts, drawn = PromptScheduler(range(40), 8, reward_range=(-1, 3)), np.zeros(40)
    for _ in range(80):
        for key in prompts.draw(4):
            prompts.update(key, [1.0] * 8 if key < 20 else [-1.0, 3.0] * 4)
            drawn[key] += 1
    assert drawn[20:].sum() > 3 * drawn[:20].sum()


def test_what_is_under_way_waits_and_a_lost_group_is_waited_for_no_longer_than_sixteen_draws():
    prompts = PromptScheduler(range(100), seed=3)
    first = prompts.draw(50)
    assert not set(first) & set(prompts.draw(50))
    assert len(set(prompts.draw(100))) == 100  # for want of others
    lost = PromptScheduler(range(40), seed=3)
    gone = set(lost.draw(20))
    later = [set(lost.draw(20)) for _ in range(2)]
    assert not gone & later[0]
    for key in later[0]:
        lost.update(key, [])  # lost, and said so: may be drawn again, and nothing is learned
    assert lost.metrics_dict()["unseen"] == 40
    for _ in range(17):
        lost.draw(1)
    assert lost.metrics_dict()["under_way"] <= 17


def test_prompts_come_and_go():
    prompts = PromptScheduler(["a", ("b", 1)], 4, fade=1.0)
    with pytest.raises(ConfigError, match="'a' is there already"):
        prompts.add(["c", "a"])
    with pytest.raises(ConfigError, match="'c' is there already"):
        prompts.add(["c", "c"])
    assert len(prompts) == 2
    prompts.update("a", [1, 1, 1, 0])
    prompts.add([7])
    rate = prompts.pass_rate("a")
    prompts.draw(3)
    prompts.remove([("b", 1)])
    prompts.update(("b", 1), [1, 0, 0, 0])  # it was under way
    assert prompts.pass_rate("a") == rate
    assert sorted(map(str, prompts.draw(9))) == ["7", "a"]
    for _ in range(17):
        prompts.draw(1)
    with pytest.raises(KeyError, match="there is no prompt"):
        prompts.update(("b", 1), [1, 0, 0, 0])
    with pytest.raises(KeyError):
        prompts.remove(["a", "z"])
    assert "a" in prompts
    with pytest.raises(TypeError, match=r"give \['abc'\]"):
        prompts.add("abc")


@pytest.mark.parametrize("cut", [0, 1, 7, 40])
def test_a_restored_scheduler_draws_as_the_original(cut):
    prompts, _ = trained(steps=cut)
    copy = PromptScheduler([], 3, seed=9)
    copy.load_state_dict(json.loads(json.dumps(prompts.state_dict())))
    rng = np.random.default_rng(cut)
    for _ in range(30):
        keys = prompts.draw(7)
        assert copy.draw(7) == keys
        for key in keys[:5]:
            rewards = (rng.random(8) < RATES[key]).astype(float)
            prompts.update(key, rewards)
            copy.update(key, rewards)
    assert copy.state_dict() == prompts.state_dict()


def test_bad_input_is_refused_and_changes_nothing():
    with pytest.raises(ConfigError) as caught:
        PromptScheduler([1], 1, -1, reward_range=(1, 0), fade=2)
    assert all(name in str(caught.value) for name in ("group_size", "seed", "reward_range", "fade"))
    prompts = PromptScheduler([1, 2])
    before = prompts.state_dict()
    for rewards, error in (([0.5, math.nan], ValueError), ([0.0, 1.5], ValueError), (["x"], TypeError)):
        with pytest.raises(error):
            prompts.update(1, rewards)
    with pytest.raises(ConfigError, match="n must be"):
        prompts.draw(0)
    with pytest.raises(ConfigError, match="there is no prompt to draw"):
        PromptScheduler().draw(1)
    with pytest.raises(StateError):
        prompts.load_state_dict({name: value for name, value in before.items() if name != "waits"})
    assert prompts.state_dict() == before
    with pytest.raises(ConfigError, match="0 is there already"):
        PromptScheduler([0, False])


def test_the_numbers_for_a_log_add_up():
    prompts, _ = trained(steps=100)
    numbers = prompts.metrics_dict()
    assert (
        numbers["unseen"] + numbers["solved"] + numbers["frontier"] + numbers["unsolved"] == numbers["prompts"] == 100
    )
    assert numbers["groups"] == 1000
    assert 0 < numbers["mixed_groups"] < 1000
    assert abs(numbers["frontier"] - 20) <= 12


def loop(strategy, stop=None, state=None, **options):
    """Train prompts of known rates inside the scheduler; return the batches and the state at `stop`."""
    scheduler = R8Scheduler(
        100, 10, num_epochs=6, strategy=strategy, ui="off", checkpoint_dir=None, recovery="report", **options
    )
    if state is not None:
        scheduler.load_state_dict(state)
    batches = []
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            batches.append(batch.indices.tolist())
            rng = np.random.default_rng(scheduler.global_step)
            scheduler.update_with_loss(-rng.binomial(8, RATES[batch.indices]) / 8)
            if scheduler.global_step == stop:
                return batches, scheduler.state_dict()
    return batches, None


def test_as_a_strategy_it_draws_the_mixed_prompts_and_resumes_to_the_bit():
    strategy = Prompts()
    batches, _ = loop(strategy)
    assert len(batches) == 60
    late = np.concatenate(batches[30:])
    assert np.isin(late, np.arange(40, 60)).mean() > 1.5 * 0.2
    assert strategy.prompts.pass_rate(99) > 0.8
    assert strategy.prompts.metrics_dict()["groups"] == 600
    _, state = loop(Prompts(), stop=23)
    rest, _ = loop(Prompts(), state=state)
    assert rest == batches[23:]


def test_as_a_strategy_it_names_rewards_that_are_out_of_range():
    with pytest.raises(ConfigError, match=r"reward_range=\(0.0, 0.1\)"):
        loop(Prompts(reward_range=(0.0, 0.1)))
    assert len(loop(Prompts(4, reward_range=(-1.0, 3.0)))[0]) == 60


def test_all_groups_of_a_prompt_that_was_removed_are_ignored():
    prompts = PromptScheduler(["a", "b"])
    assert sorted([*prompts.draw(2), *prompts.draw(2)]) == ["a", "a", "b", "b"], "two groups of each are under way"
    prompts.remove(["a"])
    for _ in range(2):
        prompts.update("a", [1.0, 0.0])
    assert prompts.metrics_dict()["groups"] == 0
