"""A data set that has grown since a run was saved."""

from __future__ import annotations

import numpy as np
import pytest

from learnit_r8 import R8Scheduler
from learnit_r8.errors import ConfigError
from learnit_r8.noise.guard import Stage
from learnit_r8.run.model import DashboardModel
from learnit_r8.strategies import names
from learnit_r8.strategies.base import make
from learnit_r8.strategies.contract import Rules
from learnit_r8.testing.states import equal

OLD, NEW, B = 64, 100, 8
GROWING = [name for name in names() if Rules(make(name)).grows]


def scheduler(size, **options):
    options = {"checkpoint_dir": None, "backup_every": None} | options
    return R8Scheduler(size, B, num_epochs=6, ui="off", initial_lr=0.1, scheduler_mode="cosine", **options)


def train(run, *, batches=None, scalar=False, rates=None):
    """Train to the epoch's end or for some batches; return the ids drawn."""
    drawn = []
    for number, batch in enumerate(run.batch_iterator(), 1):
        drawn += batch.indices.tolist()
        losses = np.random.default_rng(batch.step).lognormal(batch.indices / 50, 0.1).astype(np.float32)
        if rates is not None:
            rates.append(batch.lr)
        if hasattr(batch, "asked"):
            assert len(batch.weights)
        run.update_with_loss(float(losses.mean()) if scalar else losses)
        if number == batches:
            break
    return drawn


def state_after(epochs, batches=None, **options):
    run = scheduler(OLD, **options)
    scalar = options.pop("scalar", False)
    for epoch in run.epoch_iterator():
        train(run, batches=batches if epoch == epochs else None, scalar=scalar)
        if epoch == epochs:
            break
    return run.state_dict()


def test_all_strategies_that_plan_from_the_catalog_can_grow():
    assert set(GROWING) == {"uniform", "quadrant", "curriculum", "infobatch", "prioritized", "reward"}


@pytest.mark.parametrize("batches", [None, 3])
@pytest.mark.parametrize("strategy", GROWING)
def test_new_samples_join_the_next_epoch_and_what_was_known_of_the_others_stays(strategy, batches):
    saved = state_after(2, batches, strategy=strategy)
    run = scheduler(NEW, strategy=strategy)
    run.load_state_dict(saved)
    old = scheduler(OLD, strategy=strategy)
    old.load_state_dict(saved)
    for name in ("expected_loss", "mean_loss", "uses", "last_seen", "variability"):
        assert np.array_equal(getattr(run.catalog, name)[:OLD], getattr(old.catalog, name))
    assert run.catalog.num_seen == old.catalog.num_seen == OLD
    assert not run.catalog.uses[OLD:].any()
    met = set()
    for epoch in run.epoch_iterator():
        drawn = train(run)
        if epoch == 2:
            assert max(drawn, default=0) < OLD  # its plan stands
        else:
            met |= set(drawn)
    assert met >= set(range(OLD, NEW))
    assert run.current_epoch == 6


@pytest.mark.parametrize("strategy", ["uniform", "quadrant", "prioritized"])
def test_with_one_loss_a_batch_too(strategy):
    run = scheduler(OLD, strategy=strategy)
    for epoch in run.epoch_iterator():
        train(run, scalar=True)
        if epoch == 2:
            break
    more = scheduler(NEW, strategy=strategy)
    more.load_state_dict(run.state_dict())
    np.testing.assert_allclose(more.catalog.expected_loss[:OLD], run.catalog.expected_loss, rtol=1e-6)
    assert more.catalog.attributed
    for _ in more.epoch_iterator():
        train(more, scalar=True)
    assert (more.catalog.uses > 0).all()


def test_the_rest_of_an_epoch_is_as_it_would_have_been():
    saved = state_after(2, 3)
    drawn = []
    for size in (OLD, NEW):
        run = scheduler(size)
        run.load_state_dict(saved)
        next(run.epoch_iterator())
        drawn.append(train(run))
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == OLD - 3 * B


def test_the_learning_rate_goes_on_by_the_share_of_the_budget():
    saved = state_after(2)
    rates = {}
    for size in (OLD, NEW):
        run = scheduler(size)
        run.load_state_dict(saved)
        for epoch in run.epoch_iterator():
            train(run, rates=rates.setdefault((size, epoch), []))
    for epoch in (3, 4, 5):
        assert rates[OLD, epoch][0] == pytest.approx(rates[NEW, epoch][0], rel=0.02)
    assert rates[NEW, 5][-1] < 0.01


def test_a_noise_guard_that_is_open_and_excluded_samples_go_on():
    run = scheduler(OLD, noise_guard="cap", groups=np.arange(OLD) % 2)
    for epoch in run.epoch_iterator():
        train(run)
        if epoch == 1:
            run.exclude([3])
            guard = run.noise_guard
            guard._stage, guard._suspect = Stage.OPEN, np.arange(OLD) == 5
            guard._phase = np.arange(OLD).astype(np.uint8)
            guard.hear_predictions(np.arange(OLD), np.arange(OLD))
            break
    more = scheduler(NEW, noise_guard="cap", groups=np.arange(NEW) % 2)
    more.load_state_dict(run.state_dict())
    assert more.catalog.left_out.tolist() == [3]
    assert len(more.noise_guard.flagged) == len(more.noise_guard.suggestions) == NEW
    assert more.noise_guard.suggestions[5] == 5
    for _ in more.epoch_iterator():
        assert 3 not in train(more)
    assert (np.delete(more.catalog.uses, 3) > 0).all()


def test_a_checkpoint_is_resumed_with_more_samples(tmp_path):
    run = scheduler(OLD, checkpoint_dir=tmp_path / "saved", groups=np.arange(OLD) % 3)
    for epoch in run.epoch_iterator():
        train(run)
        if epoch == 1:
            break
    run.save_checkpoint()
    run.close()
    with pytest.raises(ConfigError, match="groups"):
        R8Scheduler.resume_from_checkpoint(tmp_path / "saved", num_samples=NEW)
    more = R8Scheduler.resume_from_checkpoint(tmp_path / "saved", num_samples=NEW, groups=np.arange(NEW) % 3)
    for _ in more.epoch_iterator():
        train(more)
    assert (more.catalog.uses > 0).all()
    again = R8Scheduler.resume_from_checkpoint(tmp_path / "saved", num_epochs=7)
    assert again.catalog.num_samples in (OLD, NEW)
    more.close()
    again.close()


@pytest.mark.parametrize("strategy", ["spaced", "auto", "adaptive"])
def test_a_strategy_with_a_memory_of_its_own_refuses_by_name_and_nothing_changes(strategy):
    saved = state_after(1, strategy=strategy)
    run = scheduler(NEW, strategy=strategy)
    with pytest.raises(ConfigError, match=f"strategy='{strategy}' cannot take more samples"):
        run.load_state_dict(saved)
    assert run.global_step == 0


def test_fewer_samples_are_refused():
    saved = state_after(1)
    run = scheduler(OLD - 1)
    with pytest.raises(ConfigError, match="num_samples"):
        run.load_state_dict(saved)


def test_that_there_are_more_samples_is_said_once(capfd):
    run = scheduler(NEW)
    run.load_state_dict(state_after(1))
    said = "saved with 64 samples and has 100: the new ones, from id 64 on"
    assert capfd.readouterr().err.count(said) == 1
    run.load_state_dict(run.state_dict())
    assert said not in capfd.readouterr().err


def test_where_the_strategy_refuses_the_model_is_not_loaded_either(tmp_path):
    run = scheduler(OLD, strategy="spaced", checkpoint_dir=tmp_path)
    loaded = []
    for _ in run.epoch_iterator():
        train(run)
        break
    run.save_checkpoint()
    run.close()
    more = scheduler(NEW, strategy="spaced", load_callback=loaded.append)
    with pytest.raises(ConfigError, match="cannot take more samples"):
        more.load_checkpoint(tmp_path)
    assert not loaded


# In the middle of a run -----------------------------------------------------------------------


def grown_at(epoch, batches, strategy, *, resumed, scalar=False, **options):
    """Train, take in more samples at one place, in the run or by a resume, and return what was drawn from there on."""
    more, groups = NEW - OLD, options.pop("groups", None)
    old = {} if groups is None else {"groups": groups[:OLD]}
    run, drawn, rates = scheduler(OLD, strategy=strategy, **old, **options), [], []
    for number in run.epoch_iterator():
        stop = batches if number == epoch else None
        train(run, batches=stop, scalar=scalar)
        if number == epoch and (resumed or stop):
            break
    if resumed:
        saved = run.state_dict()
        run = scheduler(NEW, strategy=strategy, **({} if groups is None else {"groups": groups}), **options)
        run.load_state_dict(saved)
    else:
        run.grow(more, groups=None if groups is None else groups[OLD:])
    for _ in run.epoch_iterator():
        drawn.append(train(run, scalar=scalar, rates=rates))
    return drawn, rates, run


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("batches", [3, B])
@pytest.mark.parametrize("strategy", GROWING)
def test_what_grows_in_the_run_goes_on_as_one_that_was_resumed_with_more(strategy, batches, scalar):
    here, there = (grown_at(2, batches, strategy, resumed=resumed, scalar=scalar) for resumed in (False, True))
    assert here[:2] == there[:2]
    for name in ("expected_loss", "mean_loss", "uses", "last_seen", "variance"):
        assert np.array_equal(getattr(here[2].catalog, name), getattr(there[2].catalog, name)), name
    assert here[2].total_steps == there[2].total_steps
    assert set(range(OLD, NEW)) <= {i for epoch in here[0] for i in epoch}


def test_growth_with_groups_a_guard_and_excluded_samples():
    groups = np.arange(NEW) % 3
    (here, _, run), (there, _, other) = (
        grown_at(2, 3, "quadrant", resumed=resumed, noise_guard="cap", groups=groups) for resumed in (False, True)
    )
    assert here == there
    assert len(run.noise_guard.flagged) == NEW
    assert np.array_equal(run.state_dict()["groups"], groups)
    assert np.array_equal(run.noise_guard.flagged, other.noise_guard.flagged)


def test_it_grows_again_and_again_and_before_the_first_epoch_and_is_resumed():
    run = scheduler(OLD)
    run.grow(4)
    for number in run.epoch_iterator():
        train(run, batches=2)
        run.grow(np.int64(8))
        run.exclude([OLD + 5])
        met = train(run)
        assert OLD + 5 not in met or number == 0
        if number == 3:
            break
    assert run.catalog.num_samples == OLD + 4 + 4 * 8
    again = scheduler(OLD + 4 + 4 * 8)
    again.load_state_dict(run.state_dict())
    for one in (run, again):
        one.met = [train(one) for _ in one.epoch_iterator()]
    assert run.met == again.met


def test_the_screen_hears_how_many_steps_there_are_now():
    heard = []
    run = scheduler(OLD, sinks=[type("Sink", (), {"record": lambda self, event: heard.append(event)})()])
    model = DashboardModel()
    for number in run.epoch_iterator():
        train(run)
        if number == 1:
            run.grow(OLD)
    for event in heard:
        model.consume(event)
    steps = 2 * OLD // B + 4 * 2 * OLD // B
    assert run.global_step == model.total_steps == steps
    assert any(
        "64 samples have come, and the run has 128 from here on" in getattr(event, "message", "") for event in heard
    )


@pytest.mark.parametrize(
    ("options", "more", "words"),
    [
        ({"strategy": "spaced"}, 5, "cannot take more samples"),
        ({}, 0, "more must be"),
        ({}, 2**32, "num_samples must be"),
        ({}, ["a"], "more must be"),
        ({"keys": range(OLD)}, 5, r"grow\(keys\) takes a list"),
        ({"keys": range(OLD)}, "abc", r"grow\(keys\) takes a list"),
        ({"keys": range(OLD)}, [], "more must be"),
        ({"keys": range(OLD)}, [70, 5], "5 is there already"),
        ({"groups": np.zeros(OLD, int)}, 5, "groups must be given"),
    ],
)
def test_what_cannot_grow_says_so_and_nothing_changes(options, more, words):
    run = scheduler(OLD, **options)
    next(run.epoch_iterator())
    train(run, batches=2)
    before = run.state_dict()
    with pytest.raises(ConfigError, match=words):
        run.grow(more)
    after = run.state_dict()
    assert equal({**after, "budget": None}, {**before, "budget": None})  # which holds the seconds


def test_a_rollback_after_it_takes_back_what_was_before_it():
    state = {"w": np.zeros(4)}
    run = scheduler(OLD, state_callback=lambda: state, load_callback=lambda saved: None, backup_every=4)
    loop = run.epoch_iterator()
    for _ in range(2):
        next(loop)
        train(run)
    next(loop)
    batches = run.batch_iterator()
    for number, batch in enumerate(batches):
        if number == 6:
            run.grow(10)
            state["w"][:] = np.nan
            assert run.update_with_loss(np.full(len(batch.indices), np.nan, np.float32)).rolled_back
            break
        run.update_with_loss(np.ones(len(batch.indices), np.float32))
    assert run.catalog.num_samples == OLD + 10
    assert run.catalog.num_seen == OLD
    assert not run.catalog.uses[OLD:].any()
