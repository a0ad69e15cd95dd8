"""Events to numbers: counts, estimates and lines agree with the events that were sent."""

from __future__ import annotations

import json
import math
import random
from copy import deepcopy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learnit_r8 import events as e
from learnit_r8.dashboard.displays.summary import summary_text
from learnit_r8.run.journal import entry
from learnit_r8.run.model import ENTRIES_KEPT, METRICS_KEPT, DashboardModel

T0 = 1_700_000_000.0


def loss(time, step, value=1.0, *, epoch=0, seconds=0.1, expected=1.0, lr=0.1, verdict="calm"):
    return e.LossReported(
        time=time,
        step=step,
        epoch=epoch,
        loss=value,
        expected_loss=expected,
        lr=lr,
        verdict=verdict,
        score=0.5,
        size=32,
        step_seconds=seconds,
        r8_seconds=0.001,
    )


def started(total=1000, per_epoch=100, time=T0, step=0, resumed=False, **config):
    return e.RunStarted(
        time=time,
        step=step,
        run="run",
        config=config,
        steps_per_epoch=per_epoch,
        total_steps=total,
        resumed=resumed,
        version="0.1.0",
        pid=1,
        elapsed=0.0,
    )


def fed(*events):
    model = DashboardModel()
    for event in events:
        model.consume(event)
    return model


def training(epochs, per_epoch=100, all_epochs=10, seconds=0.5, validation=20.0, jitter=0.1, checkpoint=0.0, **config):
    """Yield a run's events up to the start of epoch `epochs`; its steps vary by `jitter`."""
    rng = random.Random(3)
    time = T0
    yield started(per_epoch * all_epochs, per_epoch, num_epochs=all_epochs, **config)
    for epoch in range(epochs):
        yield e.EpochStarted(
            time=time,
            step=epoch * per_epoch,
            epoch=epoch,
            phase="cataloging" if epoch == 0 else "quadrant",
            batches=per_epoch,
        )
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            duration = seconds * (1 + jitter * rng.uniform(-1, 1))
            time += duration
            yield loss(time, step, epoch=epoch, seconds=duration - 0.001)
        yield e.EpochEnded(
            time=time,
            step=(epoch + 1) * per_epoch,
            epoch=epoch,
            mean_loss=1.0,
            seconds=per_epoch * seconds,
            batches=per_epoch,
            completed=True,
        )
        time += validation
        if checkpoint:
            time += checkpoint
            yield e.CheckpointSaved(
                time=time, step=(epoch + 1) * per_epoch, path="ckpt/x", bytes=100, seconds=checkpoint
            )


def any_event(kind):
    """A strategy for events of one class, every field anything of its type."""
    numbers = st.floats(allow_nan=True)
    whole = st.integers(0, 10**7)
    texts = st.text(max_size=8)
    by_type = {
        "float": numbers,
        "int": whole,
        "float | None": st.none() | numbers,
        "int | None": st.none() | whole,
        "str": texts,
        "bool": st.booleans(),
        "bool | None": st.none() | st.booleans(),
        "tuple[int, ...]": st.lists(whole, max_size=5).map(tuple),
        "tuple[int | str, ...]": st.lists(whole | texts, max_size=5).map(tuple),
        "tuple[float, ...]": st.lists(numbers, max_size=5).map(tuple),
        "Mapping[str, Any]": st.fixed_dictionaries(
            {}, optional={"num_epochs": st.none() | whole, "train_duration_seconds": st.none() | numbers}
        ),
        "Mapping[str, float | None]": st.just({}),
        "Mapping[str, int]": st.just({}),
        "Mapping[str, str]": st.just({}),
    }
    fields = {name: by_type[str(field.type)] for name, field in kind.__dataclass_fields__.items()}
    if "verdict" in fields:
        fields["verdict"] = st.sampled_from(["calm", "spike", "nonfinite"])
    return st.builds(kind, **fields)


STREAMS = st.lists(st.one_of([any_event(kind) for kind in e.EVENT_TYPES.values()]), max_size=25)


@given(STREAMS)
@settings(max_examples=150, deadline=None)
def test_any_stream_of_events_is_taken_and_exported_as_strict_json(events):
    model = fed(*events, "not an event", None)
    json.dumps(model.to_json(), allow_nan=False)
    assert summary_text(model)
    assert model.spikes == sum(isinstance(event, e.SpikeSeen) for event in events)
    assert model.series["loss"].count == sum(isinstance(event, e.LossReported) for event in events)


@pytest.mark.parametrize("kind", e.EVENT_TYPES.values(), ids=lambda kind: kind.__name__)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_lines_of_events_are_one_line(kind, data):
    line = entry(data.draw(any_event(kind)))
    if line is not None:
        assert "\n" not in line.text
        assert len(line.icon) == 1


def test_loss_statistics_are_those_of_the_reports():
    model = fed(*[loss(T0 + i, i, v) for i, v in enumerate([3.0, 1.0, math.nan, 2.0])])
    series = model.series["loss"]
    assert (series.lo, series.hi, series.last, model.best_step, model.nonfinite) == (1.0, 3.0, 2.0, 1, 1)
    assert (model.step, model.samples) == (4, 128)


def test_estimate_waits_for_twenty_steps_and_ten_seconds():
    quick = fed(started(), *[loss(T0 + 0.1 * i, i) for i in range(1, 60)])
    assert quick.eta(T0 + 6) is None
    slow = fed(started(), *[loss(T0 + 2.0 * i, i, seconds=2.0) for i in range(1, 15)])
    assert slow.eta(T0 + 28) is None
    both = fed(started(), *[loss(T0 + 1.0 * i, i, seconds=1.0) for i in range(1, 30)])
    assert both.eta(T0 + 29)[0] == pytest.approx(970, rel=0.02)


def test_a_run_of_a_few_seconds_has_an_estimate_once_a_tenth_is_done():
    events = [loss(T0 + 0.01 * i, i, seconds=0.01) for i in range(200)]
    assert fed(started(), *events[:90]).eta(T0 + 1.5) is None
    assert fed(started(), *events[:110]).eta(T0 + 0.9) is None, "nobody can read that fast"
    assert fed(started(), *events).eta(T0 + 2)[0] == pytest.approx(8, rel=0.02)


def test_estimate_counts_validation_and_checkpoints():
    events = list(training(epochs=3, checkpoint=5.0))
    model = fed(*events)
    # Seven epochs of 100 steps of 0.5 s, seven validations of 20 s, seven checkpoints of 5 s, and
    # what is left of the third epoch's validation.
    truth = 7 * (50 + 20 + 5)
    assert model.eta(model.last_time)[0] == pytest.approx(truth, rel=0.06)


@pytest.mark.parametrize("jitter", [0.05, 0.3, 0.9])
def test_estimate_is_within_its_uncertainty_of_the_truth(jitter):
    whole = list(training(epochs=10, jitter=jitter, validation=0.0))
    end = whole[-1].time
    inside = tried = 0
    model = DashboardModel()
    for i, event in enumerate(whole):
        model.consume(event)
        if i % 50 == 49 and isinstance(event, e.LossReported) and event.step > 120:
            left, error = model.eta(event.time)
            tried += 1
            inside += abs(event.time + left - end) <= 2 * error + 2
    assert tried >= 10
    assert inside >= 0.7 * tried


def test_cataloging_steps_have_their_own_rate():
    slow = [loss(T0 + 3.0 * i, i, seconds=3.0) for i in range(100)]
    fast = [loss(T0 + 300 + 0.1 * i, 100 + i, epoch=1, seconds=0.099) for i in range(100)]
    model = fed(
        started(num_epochs=10),
        e.EpochStarted(time=T0, step=0, epoch=0, phase="cataloging", batches=100),
        *slow,
        e.EpochEnded(time=T0 + 300, step=100, epoch=0, mean_loss=1.0, seconds=300.0, batches=100, completed=True),
        e.EpochStarted(time=T0 + 300, step=100, epoch=1, phase="quadrant", batches=100),
        *fast,
    )
    assert model.eta(model.last_time)[0] == pytest.approx(80, rel=0.05)


def test_a_resumed_run_is_timed_from_the_resume():
    before = [loss(T0 + 5.0 * i, i, seconds=5.0) for i in range(50)]
    later = T0 + 90_000
    after = [loss(later + 0.5 * i, 50 + i, seconds=0.49) for i in range(50)]
    model = fed(started(), *before, started(time=later, step=50, resumed=True), *after)
    assert model.eta(model.last_time)[0] == pytest.approx(450, rel=0.03)
    assert (model.epoch_step, model.epoch_batches) == (100, 100)


def test_a_time_budget_is_counted_down():
    model = fed(started(total=None, train_duration_seconds=100.0), loss(T0 + 1, 0))
    assert model.eta(T0 + 40) == (60.0, None)
    assert model.progress(T0 + 40) == pytest.approx(0.4)
    assert model.progress(T0 + 4000) == 1.0


def test_a_pause_is_no_step():
    steps = [loss(T0 + 0.5 * i, i, seconds=0.4) for i in range(50)]
    pause = [e.Paused(time=T0 + 25, step=50, paused=True), e.Paused(time=T0 + 1025, step=50, paused=False)]
    more = [loss(T0 + 1025 + 0.5 * i, 50 + i, seconds=0.4) for i in range(1, 50)]
    model = fed(started(), *steps, *pause, *more)
    assert model.pace.step_seconds == pytest.approx(0.5, rel=0.05)
    assert model.pace.spent["paused"] == 1000


def test_steps_that_overlap_are_not_counted_twice():
    # A loader hands out batches ahead: each waits for two others, so its own seconds are three steps' worth.
    model = fed(started(), *(loss(T0 + 0.5 * i, i, seconds=1.5) for i in range(1, 200)))
    assert model.pace.step_seconds == pytest.approx(0.5)
    assert model.recent_steps[-1] == pytest.approx(0.5)
    assert sum(model.pace.spent.values()) == pytest.approx(100, abs=1.5)


def test_a_search_that_found_nothing_and_a_first_nan_say_no_more_than_is_known():
    assert (
        entry(e.LrFound(time=T0, step=0, lr=0.01, suggestions={"valley": None}, steps=100)).text
        == "none in 100 steps of search · peak lr stays 1.00e-02"
    )
    assert (
        entry(e.LrFound(time=T0, step=0, lr=0.02, suggestions={"valley": 0.02}, steps=100)).text
        == "peak lr 2.00e-02 after 100 steps of search"
    )
    assert (
        entry(
            e.SpikeSeen(
                time=T0,
                step=3,
                epoch=0,
                verdict="nonfinite",
                loss=math.nan,
                expected_loss=math.nan,
                score=math.nan,
                indices=(1,),
            )
        ).text
        == "loss nan"
    )


def test_a_resumed_run_is_never_past_its_last_epoch():
    run = e.RunStarted(
        time=T0,
        step=36,
        run="run",
        config={"num_epochs": 4},
        steps_per_epoch=8,
        total_steps=32,
        resumed=True,
        version="",
        pid=1,
        elapsed=0.0,
    )
    assert fed(run).epoch == 3


def test_time_spent_adds_up():
    model = fed(
        *training(epochs=4, checkpoint=5.0), e.RunEnded(time=T0 + 300, step=400, reason="finished", seconds=300.0)
    )
    assert sum(model.pace.spent.values()) == pytest.approx(4 * (50 + 20 + 5), rel=0.03)
    assert model.pace.spent["between epochs"] == pytest.approx(80, rel=0.02)


@pytest.mark.parametrize("at_once", [True, False])
def test_evaluations_amid_an_epoch_have_their_time(at_once):
    heard, time = [started(), e.EpochStarted(time=T0, step=0, epoch=0, phase="uniform", batches=30)], T0
    for step in range(30):
        time += 1.0
        heard.append(loss(time, step))
        if step % 10 == 9:
            time += 5.0
            heard += [
                e.MetricLogged(time=time, step=step + 1, name=name, value=0.5) for name in ("val_loss", "val_acc")
            ]
    model = DashboardModel()
    for events in [heard] if at_once else [[event] for event in heard]:
        model.consume_all(events)
    assert model.pace.spent["evaluation"] == pytest.approx(15.0)
    assert sum(model.pace.spent.values()) == pytest.approx(time - T0, abs=1.5)


def test_validation_metrics_of_one_step_share_a_line():
    model = fed(
        e.MetricLogged(time=T0, step=10, name="val_loss", value=0.5),
        e.MetricLogged(time=T0, step=10, name="val_acc", value=0.9),
        e.MetricLogged(time=T0, step=10, name="grad_norm", value=1.0),
        e.MetricLogged(time=T0 + 9, step=20, name="val_loss", value=0.6),
        e.MetricLogged(time=T0 + 9, step=20, name="val_acc", value=0.95),
    )
    assert [line.text for line in model.entries] == [
        "val_loss 0.5 (best)  val_acc 0.9 (best)",
        "val_loss 0.6  val_acc 0.95 (best)",
    ]
    assert (model.metrics["val_loss"].best, model.metrics["val_acc"].best) == (0.5, 0.95)
    assert model.metrics["grad_norm"].best is None


def test_alarms_go_when_what_failed_works_again():
    failed = e.CheckpointFailed(time=T0, step=5, path="ckpt/x", reason="disk full")
    assert list(fed(failed).alarms) == ["no ckpt"]
    assert not fed(failed, e.CheckpointSaved(time=T0 + 1, step=6, path="ckpt/y", bytes=10, seconds=0.1)).alarms
    assert list(
        fed(e.Notice(time=T0, step=1, message="odd", level="warning"), e.Notice(time=T0, step=1, message="fine")).alarms
    ) == ["warning"]


def test_lr_search_ends_and_the_epochs_phase_comes_back():
    phase = [
        e.EpochStarted(time=T0, step=0, epoch=0, phase="cataloging", batches=10),
        e.PhaseChanged(time=T0, step=0, phase="LR search", reason=""),
    ]
    model = fed(started(), *phase)
    assert (model.searching, model.phase) == (True, "LR search")
    model.consume(e.LrFound(time=T0, step=0, lr=0.1, suggestions={}, steps=50))
    assert (model.searching, model.phase) == (False, "cataloging")


def rough_loss(rng, number):
    """A loss of a run in which everything happens: gaps, clocks that go backwards, values of any size."""
    value = rng.choice([rng.random(), rng.gauss(1, 5), math.nan, math.inf, 1e305, -1e200])
    seconds = rng.choice([0.01, 0.3, 2.0, math.nan, -1.0, 1e12])
    time = T0 + number * 0.4 + rng.choice([0.0, 0.0, -30.0, 500.0])
    expected = rng.choice([1.0, math.nan])
    return loss(time, number, value, epoch=number // 100, seconds=seconds, expected=expected, lr=0.1 * 0.999**number)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("rough", [False, True])
def test_events_in_blocks_are_the_same_as_events_one_by_one(rough, seed):
    rng = random.Random(seed)
    events = list(training(epochs=6, seconds=0.4, checkpoint=2.0))
    if rough:
        events = [rough_loss(rng, i) if isinstance(old, e.LossReported) else old for i, old in enumerate(events)]
        events.insert(rng.randrange(len(events)), loss(1e15, 7))
    events.insert(rng.randrange(len(events)), e.PhaseChanged(time=T0, step=0, phase="LR search", reason=""))
    single, block = fed(*events), DashboardModel()
    while events:
        some = rng.choice([1, 30, 1000])
        block.consume_all(events[:some], later=rng.random() < 0.5)
        if isinstance(events[:some][-1], e.LossReported):
            newest = events[:some][-1]
            assert (block.step, block.epoch, block.lr) == (newest.step + 1, newest.epoch, newest.lr)
        del events[:some]
    block.consume_all(())

    def flat(value):
        return [x for v in value.values() for x in flat(v)] if isinstance(value, dict) else [value]

    for one, other in zip(flat(single.to_json()), flat(block.to_json()), strict=True):
        assert other == (pytest.approx(one, rel=1e-9, abs=1e-12) if isinstance(one, float) else one)
    assert list(block.recent_steps) == pytest.approx(list(single.recent_steps), nan_ok=True)
    for name, series in single.series.items():
        np.testing.assert_array_equal(series.bins()["hi"], block.series[name].bins()["hi"])
    for one, other in ((single.pace.train, block.pace.train), (single.pace.cataloging, block.pace.cataloging)):
        assert (one.steps, one.total_steps, one.blocks.count) == (other.steps, other.total_steps, other.blocks.count)
        assert other.blocks.variance == pytest.approx(one.blocks.variance, nan_ok=True)


def test_a_copy_stays_as_it_is():
    model = fed(*training(epochs=2))
    twin = deepcopy(model)
    before = json.dumps(twin.to_json())
    for event in [
        *training(epochs=4),
        e.SpikeSeen(time=T0, step=1, epoch=0, verdict="spike", loss=9.0, expected_loss=1.0, score=40.0, indices=(1,)),
    ]:
        model.consume(event)
    assert json.dumps(twin.to_json()) == before
    assert len(twin.entries) < len(model.entries)
    twin.consume(loss(T0, 5000))
    assert model.step != 5001


def test_memory_has_a_bound_whatever_is_sent():
    model = DashboardModel()
    for i in range(5000):
        model.consume(
            e.SpikeSeen(
                time=T0 + i, step=i, epoch=0, verdict="spike", loss=9.0, expected_loss=1.0, score=40.0, indices=(1, 2)
            )
        )
        model.consume(e.EpochStarted(time=T0 + i, step=i, epoch=i, phase="quadrant", batches=1))
        model.consume(e.MetricLogged(time=T0 + i, step=i, name=f"metric {i}", value=1.0))
    assert len(model.entries) == ENTRIES_KEPT
    assert len(model.metrics) == METRICS_KEPT
    assert sum(map(len, model.marks.values())) < 2000
    assert len(model.epoch_starts) <= 1024
