"""Properties of the loop over sizes, strategies and interruptions at any point."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter, deque

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from learnit_r8 import R8Scheduler, TrainingDiverged
from learnit_r8.checkpoint import state_codec

PEAK, FLOOR = 0.1, 1e-3


class BodyError(Exception):
    """Raised by the body of a user's loop."""


@st.composite
def runs(draw, max_samples=60, min_batches_of_four=False):
    """Arguments of a run that is small enough to be run to its end."""
    batch_size = draw(st.integers(1, 12), label="B")
    low = 4 * batch_size if min_batches_of_four else 1
    num_samples = draw(st.integers(low, max(max_samples, 2 * low)), label="N")
    return {
        "num_samples": num_samples,
        "batch_size": batch_size,
        "num_epochs": draw(st.integers(1, 4), label="epochs"),
        "drop_last": draw(st.booleans(), label="drop_last") and batch_size <= num_samples,
        "strategy": draw(st.sampled_from(["uniform", "quadrant"]), label="strategy"),
        "scheduler_mode": draw(st.sampled_from(["cosine", "linear", "one_cycle", "warmup_stable_decay"]), label="mode"),
        "warmup_proportion": draw(st.sampled_from([0.0, 0.1, 1.0]), label="warmup"),
        "seed": draw(st.integers(0, 5), label="seed"),
        "lookahead": draw(st.integers(1, 4), label="lookahead"),
    }


KINDS = st.sampled_from(["distinct", "ties", "equal", "negative", "scalar", "scalar equal"])


def loss_of(kind, batch):
    """Losses that depend on the samples and the epoch only, so that a repeated batch gets the same."""
    base = np.sin(batch.indices * 12.9898) + 2.0
    values = {
        "distinct": base / (1 + batch.epoch),
        "ties": np.round(base),
        "equal": np.ones(len(base)),
        "negative": -base,
        "scalar": base,
        "scalar equal": np.ones(len(base)),
    }[kind]
    return float(values.mean()) if kind.startswith("scalar") else values


def make(arguments, **more):
    settings_ = {"initial_lr": PEAK, "min_lr": FLOOR, "use_curses": False, "checkpoint_dir": None}
    return R8Scheduler(**(settings_ | arguments | more))


def play(scheduler, kind, on_batch=lambda batch: None, order=None):
    """Train to the end as a prefetching user would, `lookahead` batches ahead; return what was handed out."""
    handed = []
    for _ in scheduler.epoch_iterator():
        waiting = deque()
        for batch in scheduler.batch_iterator():
            handed.append((batch.epoch, batch.indices.tolist(), batch.lr))
            on_batch(batch)
            waiting.append(batch)
            if len(waiting) == scheduler._config.lookahead:
                late = waiting[order.pop() % len(waiting)] if order else waiting[0]
                waiting.remove(late)
                scheduler.update_with_loss(loss_of(kind, late), late)
        while waiting:
            late = waiting.popleft()
            scheduler.update_with_loss(loss_of(kind, late), late)
    return handed


def check_batches(arguments, handed):
    size, samples = arguments["batch_size"], arguments["num_samples"]
    for _, indices, lr in handed:
        assert 1 <= len(indices) <= size
        assert len(set(indices)) == len(indices), "no id twice in a batch"
        assert min(indices) >= 0
        assert max(indices) < samples
        assert FLOOR <= lr <= PEAK


@settings(deadline=None, max_examples=50)
@given(runs(), KINDS)
def test_every_epoch_uses_each_sample_once(arguments, kind):
    scheduler = make(arguments)
    handed = play(scheduler, kind)
    check_batches(arguments, handed)
    samples, size = arguments["num_samples"], arguments["batch_size"]
    expected = samples // size * size if arguments["drop_last"] else samples
    for epoch in range(arguments["num_epochs"]):
        uses = Counter(itertools.chain.from_iterable(ids for at, ids, _ in handed if at == epoch))
        assert set(uses.values()) <= {1}
        assert len(uses) == expected
    assert scheduler.global_step == scheduler.total_steps == len(handed)
    assert scheduler.catalog.uses.sum() == expected * arguments["num_epochs"]
    assert list(scheduler.epoch_iterator()) == []
    assert list(scheduler.batch_iterator()) == []
    assert np.isfinite(scheduler.catalog.expected_loss).all()


@settings(deadline=None, max_examples=50)
@given(runs(max_samples=100, min_batches_of_four=True), KINDS)
def test_each_batch_takes_a_quarter_of_its_samples_from_each_quadrant(arguments, kind):
    arguments |= {"strategy": "quadrant", "lookahead": 1, "num_epochs": 4, "drop_last": False}
    scheduler = make(arguments)
    for epoch in scheduler.epoch_iterator():
        quadrants = None
        for batch in scheduler.batch_iterator():
            if quadrants is None:
                quadrants = scheduler.catalog.quadrants()
            if epoch:
                counts = np.bincount(quadrants[batch.indices], minlength=4)
                assert len(counts) == 4, "every sample is cataloged"
                assert np.abs(counts - len(batch.indices) / 4).max() <= 1
            scheduler.update_with_loss(loss_of(kind, batch))
        sizes = np.bincount(quadrants, minlength=256)
        assert epoch == 0 or sizes[:4].max() - sizes[:4].min() <= 1


@settings(deadline=None, max_examples=30)
@given(runs(), KINDS)
def test_a_run_is_the_same_for_the_same_seed(arguments, kind):
    assert play(make(arguments), kind) == play(make(arguments), kind)


@settings(deadline=None, max_examples=50)
@given(runs(), KINDS, st.data())
def test_breaks_and_exceptions_repeat_what_was_not_reported_and_skip_nothing(arguments, kind, data):
    arguments["lookahead"] = 1
    scheduler = make(arguments)
    reference = play(make(arguments), kind)
    reported = []

    def go_on(outcomes):
        for _ in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                outcome = outcomes.popleft() if outcomes else "report"
                if outcome == "raise before":
                    raise BodyError
                if outcome == "break before":
                    return
                scheduler.update_with_loss(loss_of(kind, batch))
                reported.append((batch.epoch, batch.indices.tolist(), batch.lr))
                if outcome == "raise after":
                    raise BodyError
                if outcome == "break after":
                    return

    choices = ["report", "raise before", "break before", "raise after", "break after"]
    outcomes = deque(data.draw(st.lists(st.sampled_from(choices), max_size=15), label="outcomes"))
    while outcomes:
        with contextlib.suppress(BodyError):
            go_on(outcomes)
        scheduler.state_dict()
        if scheduler.global_step == len(reference):
            break
    go_on(deque())
    assert reported == reference


@settings(deadline=None, max_examples=30)
@given(runs(), st.integers(0, 30))
def test_an_epoch_whose_batch_loop_is_left_is_given_up_when_the_epoch_loop_goes_on(arguments, stop):
    scheduler = make(arguments | {"lookahead": 1})
    used = Counter()
    for epoch in scheduler.epoch_iterator():
        for count, batch in enumerate(scheduler.batch_iterator()):
            if epoch == 0 and count == stop:
                break
            scheduler.update_with_loss(loss_of("distinct", batch))
            used.update((epoch, index) for index in batch.indices.tolist())
    assert set(used.values()) <= {1}
    assert scheduler.current_epoch == arguments["num_epochs"]
    per_epoch = Counter(epoch for epoch, _ in used)
    full = scheduler.steps_per_epoch * arguments["batch_size"]
    full = min(full, arguments["num_samples"])
    assert all(per_epoch[epoch] == full for epoch in range(1, arguments["num_epochs"]))


def through_bytes(state):
    text, segments = state_codec.encode(state)
    raw = np.concatenate([np.zeros(0, np.uint8), *segments])
    return state_codec.decode(text, raw)


@settings(deadline=None, max_examples=50)
@given(runs(max_samples=40), KINDS, st.data())
def test_saved_anywhere_and_restored_the_rest_is_what_it_would_have_been(arguments, kind, data):
    arguments["lookahead"] = 1
    reference = play(make(arguments), kind)
    first = make(arguments)
    stop = data.draw(st.integers(0, len(reference)), label="batches before the save")
    where = data.draw(st.sampled_from(["drawn", "reported", "left", "epoch end"]), label="where")
    handed, state = [], None

    def save():
        nonlocal state
        state = through_bytes(first.state_dict())

    if stop == 0 and where != "drawn":
        save()
    for _ in first.epoch_iterator() if state is None else ():
        for batch in first.batch_iterator():
            if where == "drawn" and len(handed) == min(stop, len(reference) - 1):
                save()
                break
            handed.append((batch.epoch, batch.indices.tolist(), batch.lr))
            first.update_with_loss(loss_of(kind, batch))
            if where == "reported" and len(handed) == stop:
                save()
            elif where == "left" and len(handed) == stop:
                break
        if where == "left" and len(handed) == stop:
            break
        if where == "epoch end" and state is None and len(handed) >= stop:
            stop = len(handed)
            save()
        if state is not None:
            break
    if state is None:
        save()
    done = len(handed) if where in ("drawn", "left", "epoch end") else stop
    second = make(arguments)
    second.load_state_dict(state)
    assert second.global_step == done
    rest = play(second, kind)
    assert reference[:done] + rest == reference
    np.testing.assert_array_equal(second.catalog.uses, _final(arguments, kind).uses)
    np.testing.assert_array_equal(second.catalog.expected_loss, _final(arguments, kind).expected_loss)


def _final(arguments, kind):
    scheduler = make(arguments)
    play(scheduler, kind)
    return scheduler.catalog


ACTIONS = st.one_of(
    st.tuples(st.just("report"), st.integers(0, 3)),
    st.tuples(
        st.sampled_from(["draw", "draw", "leave the batch loop", "leave both loops", "restore a new one"]), st.just(0)
    ),
)


@settings(deadline=None, max_examples=100)
@given(runs(max_samples=40), st.sampled_from(["distinct", "ties", "negative"]), st.lists(ACTIONS, max_size=40))
def test_whatever_is_left_or_restored_unreported_batches_come_again_in_order(arguments, kind, actions):
    """Draws, late reports in any order, breaks and restores, in any sequence within one epoch and beyond."""
    reference = play(make(arguments), kind)
    keys = [(epoch, tuple(ids)) for epoch, ids, _ in reference]
    scheduler = make(arguments)
    epochs = batches = None
    waiting, reported = [], []

    def enter():
        nonlocal epochs, batches
        epochs = scheduler.epoch_iterator()
        batches = scheduler.batch_iterator() if next(epochs, None) is not None else iter(())
        waiting.clear()

    def leave():
        batches.close()
        epochs.close()

    def report(which):
        late = waiting.pop(which % len(waiting))
        scheduler.update_with_loss(loss_of(kind, late), late)
        reported.append((late.epoch, tuple(late.indices.tolist())))

    enter()
    for action, which in actions:
        if len(reported) == len(reference):
            break
        if action == "report" and waiting:
            report(which)
        elif action == "draw" and len(waiting) < arguments["lookahead"]:
            batch = next(batches, None)
            if batch is not None:
                waiting.append(batch)
                continue
            while waiting:
                report(0)
            if next(epochs, None) is None:
                break
            batches = scheduler.batch_iterator()
        elif action == "leave the batch loop":
            batches.close()
            waiting.clear()
            batches = scheduler.batch_iterator()
        elif action in ("leave both loops", "restore a new one"):
            leave()
            if action == "restore a new one":
                old, scheduler = scheduler, make(arguments)
                scheduler.load_state_dict(through_bytes(old.state_dict()))
            enter()
    leave()
    assert scheduler.global_step == len(reported)
    rest = play(scheduler, kind)
    assert [(epoch, tuple(ids)) for epoch, ids, _ in rest] == [key for key in keys if key not in reported]
    rates = {key: lr for key, (_, _, lr) in zip(keys, reference, strict=True)}
    assert all(rates[epoch, tuple(ids)] == lr for epoch, ids, lr in rest)


@settings(deadline=None, max_examples=30)
@given(runs(), KINDS, st.lists(st.integers(0, 3), max_size=40))
def test_losses_may_come_back_in_any_order(arguments, kind, order):
    scheduler = make(arguments)
    handed = play(scheduler, kind, order=list(order))
    check_batches(arguments, handed)
    assert scheduler.global_step == len(handed) == scheduler.total_steps
    assert [(e, ids) for e, ids, _ in handed if e == 0] == [
        (e, ids) for e, ids, _ in play(make(arguments), kind) if e == 0
    ]


@settings(deadline=None, max_examples=100)
@given(
    runs(),
    st.booleans(),
    # Three rollbacks to the one backup that there is; a fourth would end the run.
    st.dictionaries(st.integers(0, 60), st.sampled_from([math.nan, math.inf, -math.inf]), max_size=3),
)
def test_losses_that_are_not_finite_never_enter_the_catalog(arguments, scalar, bad):
    scheduler = make(arguments | {"lookahead": 1}, load_callback=lambda source: None)
    scheduler.update_cpu_backup({"w": np.zeros(2)})
    diverged = False
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            losses = np.array(loss_of("distinct", batch))
            if batch.step in bad:
                losses[batch.step % len(losses)] = bad[batch.step]
            try:
                result = scheduler.update_with_loss(losses.mean() if scalar else losses)
            except TrainingDiverged:
                assert sum(step in bad for step in range(batch.step + 1)) > 1
                diverged = True
                break
            if batch.step in bad:
                assert not result
                assert result.rolled_back
                assert result.verdict == "nonfinite"
            assert result.step == batch.step
        if diverged:
            break
    catalog = scheduler.catalog
    for values in (catalog.expected_loss, catalog.variance, catalog.mean_loss, catalog.variability):
        assert np.isfinite(values).all()
    # A sample that was in two faulty batches of one is put in quarantine: its steps are not taken.
    assert diverged or scheduler.global_step == scheduler.total_steps or scheduler._safety.quarantine is not None
    assert catalog.num_seen == np.count_nonzero(catalog.uses)
