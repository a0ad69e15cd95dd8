"""Sinks hear everything, may give commands, and cannot hurt the run."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections import deque

import numpy as np
import pytest

from learnit_r8 import Command, R8Scheduler, Sink, events
from learnit_r8.sinks import EventBus, JsonlSink, read_events
from learnit_r8.testing import FakeClock


class Ear:
    """Keeps what it hears."""

    def __init__(self):
        self.heard = []
        self.closed = 0

    def record(self, event):
        self.heard.append(event)

    def close(self):
        self.closed += 1

    def of(self, kind):
        return [event for event in self.heard if isinstance(event, kind)]


class Remote(Ear):
    """Sends a command once a given number of losses were reported."""

    def __init__(self, after):
        super().__init__()
        self.commands = deque()
        self.after = dict(after)

    def record(self, event):
        super().record(event)
        if isinstance(event, events.LossReported):
            self.commands.extend(self.after.pop(event.step, ()))


class Failing(Ear):
    def __init__(self, at=0, error=RuntimeError):
        super().__init__()
        self.at = at
        self.error = error

    def record(self, event):
        super().record(event)
        if len(self.heard) > self.at:
            raise self.error("the disk is full")


class SleeperClock(FakeClock):
    on_sleep = staticmethod(lambda: None)

    def sleep(self, seconds):
        super().sleep(seconds)
        self.on_sleep()


def make(sinks, **more):
    settings = {"num_epochs": 3, "use_curses": False, "checkpoint_dir": None, "clock": FakeClock()}
    return R8Scheduler(40, 10, sinks=sinks, **(settings | more))


def train(scheduler, loss=lambda batch: np.ones(len(batch.indices))):
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            scheduler.update_with_loss(loss(batch))


def test_every_fact_of_a_run_is_heard_in_order():
    ear = Ear()
    assert isinstance(ear, Sink)
    with make([ear]) as scheduler:
        train(scheduler)
    kinds = [type(event).__name__ for event in ear.heard]
    assert kinds[0] == "RunStarted"
    assert kinds[-1] == "RunEnded"
    assert kinds.count("EpochStarted") == kinds.count("EpochEnded") == 3
    assert kinds.count("BatchIssued") == kinds.count("LossReported") == 12
    assert kinds.count("QuadrantsRefreshed") == 2
    assert [event.step for event in ear.of(events.LossReported)] == list(range(12))
    assert [event.completed for event in ear.of(events.EpochEnded)] == [True] * 3
    assert [event.phase for event in ear.of(events.EpochStarted)] == ["cataloging", "quadrant", "quadrant"]
    assert ear.heard[-1].reason == "finished"
    assert ear.closed == 1


def test_quadrant_figures_are_five_edges_and_four_of_the_rest():
    ear = Ear()
    with make([ear]) as scheduler:
        train(scheduler, lambda batch: batch.indices.astype(float))
    for event in ear.of(events.QuadrantsRefreshed):
        assert [len(figure) for figure in (event.edges, event.counts, event.losses, event.uses, event.easier)] == [
            5, 4, 4, 4, 4,
        ]  # fmt: skip
        assert list(event.edges) == sorted(event.edges)
        assert event.counts == (10, 10, 10, 10)
        assert (event.unseen, event.stuck) == (0, 0)


@pytest.mark.parametrize("at", [0, 1, 5, 20])
def test_a_sink_that_raises_is_dropped_and_the_others_hear_of_it(at, capsys):
    before, bad, after = Ear(), Failing(at), Ear()
    with make([before, bad, after]) as scheduler:
        train(scheduler)
        assert scheduler.global_step == 12
    assert len(bad.heard) == at + 1
    assert bad.closed == 1
    for ear in (before, after):
        (failure,) = ear.of(events.SinkFailed)
        assert failure.sink == "Failing"
        assert failure.reason == "RuntimeError: the disk is full"
        told = f"Failing hears no more of the run, from step {failure.step} on: {failure.reason}"
        assert type(ear.heard[-1]) is events.RunEnded
    assert capsys.readouterr().err.count(told) == 1  # where warnings are errors they go there


def test_sinks_that_raise_at_the_same_event_never_reach_the_loop():
    ear = Ear()
    with make([Failing(), Failing(), ear, Failing()]) as scheduler:
        train(scheduler)
        assert scheduler.global_step == 12
    assert len(ear.of(events.SinkFailed)) == 3


@pytest.mark.parametrize("at", [0, 99])
def test_a_sink_that_cannot_even_be_closed_is_dropped_or_said_to_be_incomplete(at, capsys):
    class Stubborn(Failing):
        def close(self):
            raise OSError("no")

    with make([Stubborn(at), Ear()]) as scheduler:
        train(scheduler)
        assert scheduler.global_step == 12
    said = capsys.readouterr().err
    assert said.count("Stubborn hears no more of the run") == (at == 0)
    assert said.count("Stubborn could not be closed, and may have lost what it held: OSError: no") == (at == 99)


def test_the_training_result_is_the_same_with_and_without_sinks():
    def order(sinks):
        drawn = []
        with make(sinks) as scheduler:
            train(scheduler, lambda batch: drawn.append(batch.indices.tolist()) or np.sin(batch.indices))
        return drawn

    assert order([]) == order([Ear(), Failing(3)])


def test_pause_waits_until_resume():
    remote = Remote({3: [Command.PAUSE]})
    clock = SleeperClock()
    clock.on_sleep = lambda: remote.commands.append(Command.RESUME) if clock.monotonic() > 1.0 else None
    with make([remote], clock=clock) as scheduler:
        train(scheduler)
        assert scheduler.global_step == 12
    assert [(event.step, event.paused) for event in remote.of(events.Paused)] == [(4, True), (4, False)]
    assert clock.monotonic() > 1.0


def test_a_paused_run_goes_on_when_the_sink_that_paused_it_is_lost():
    remote = Remote({3: [Command.PAUSE]})

    def lose():
        raise_later = Failing()
        remote.record = raise_later.record
        scheduler._bus.remove(remote)

    clock = SleeperClock()
    clock.on_sleep = lose
    with make([remote], clock=clock) as scheduler:
        train(scheduler)
        assert scheduler.global_step == 12


def test_stop_after_step_ends_both_loops_and_the_run_can_go_on():
    remote = Remote({4: [Command.STOP_AFTER_STEP]})
    with make([remote]) as scheduler:
        train(scheduler)
        assert scheduler.global_step == 5
        assert remote.heard[-1].reason == "stopped"
        train(scheduler)
        assert scheduler.global_step == 12
        np.testing.assert_array_equal(scheduler.catalog.uses, 3)


def test_a_paused_run_can_be_stopped():
    remote = Remote({3: [Command.PAUSE]})
    clock = SleeperClock()
    clock.on_sleep = lambda: remote.commands.append(Command.STOP_AFTER_STEP)
    with make([remote], clock=clock) as scheduler:
        train(scheduler)
        assert scheduler.global_step == 4


def test_stop_after_epoch_finishes_the_epoch_and_saves(tmp_path):
    remote = Remote({4: [Command.STOP_AFTER_EPOCH]})
    with make([remote], checkpoint_dir=tmp_path / "c") as scheduler:
        train(scheduler)
        assert scheduler.global_step == 8
    (saved,) = remote.of(events.CheckpointSaved)
    assert saved.step == 8
    resumed = R8Scheduler.resume_from_checkpoint(tmp_path / "c", use_curses=False)
    train(resumed)
    assert resumed.global_step == 12
    np.testing.assert_array_equal(resumed.catalog.uses, 3)


def test_stop_now_is_a_keyboard_interrupt_at_the_step_boundary():
    remote = Remote({4: [Command.STOP_NOW]})
    scheduler = make([remote])
    with pytest.raises(KeyboardInterrupt), scheduler:
        train(scheduler)
    assert scheduler.global_step == 5
    assert remote.heard[-1].reason == "stopped"


def test_checkpoint_saves_between_two_steps(tmp_path):
    remote = Remote({2: [Command.CHECKPOINT], 6: [Command.CHECKPOINT]})
    with make([remote], checkpoint_dir=tmp_path / "c") as scheduler:
        train(scheduler)
    assert [event.step for event in remote.of(events.CheckpointSaved)] == [3, 7]


def test_a_command_that_is_only_a_string_is_understood(tmp_path):
    remote = Remote({2: ["checkpoint"], 6: ["stop-after-step"]})
    with make([remote], checkpoint_dir=tmp_path / "c") as scheduler:
        train(scheduler)
        assert scheduler.global_step == 7
    assert [event.step for event in remote.of(events.CheckpointSaved)] == [3]


def test_an_unknown_command_is_reported_and_changes_nothing():
    remote = Remote({2: ["make me a sandwich", None]})
    with make([remote]) as scheduler:
        train(scheduler)
        assert scheduler.global_step == 12
    notices = [event.message for event in remote.of(events.Notice)]
    assert len(notices) == 2
    assert "'make me a sandwich'" in notices[0]


def test_a_sink_with_commands_set_to_none_only_listens():
    ear = Ear()
    ear.commands = None
    with make([ear]) as scheduler:
        train(scheduler)
        assert scheduler.global_step == 12


def test_log_shows_the_users_own_numbers():
    ear = Ear()
    with make([ear]) as scheduler:
        for _ in scheduler.epoch_iterator():
            for _ in scheduler.batch_iterator():
                scheduler.update_with_loss(1.0)
            scheduler.log(val_loss=np.float32(0.5), accuracy=1)
    assert [(e.step, e.name, e.value) for e in ear.of(events.MetricLogged)][:2] == [
        (4, "val_loss", 0.5),
        (4, "accuracy", 1.0),
    ]


# The log file --------------------------------------------------------------------------------


def as_logged(event):
    """Return an event as a log tells it: of what comes at each step 7 digits, and whole microseconds."""
    if not isinstance(event, (events.LossReported, events.BackupTaken, events.BackupVerified, events.MetricLogged)):
        return event
    values = dataclasses.asdict(event)
    for name, value in values.items():
        if name == "time" or name.endswith("seconds"):
            values[name] = round(value, 6)
        elif isinstance(value, float):
            values[name] = float(f"{value:.{4 if name == 'score' else 7}g}")
    return type(event)(**values)


def test_the_log_holds_the_run_and_reads_back_as_it_was(tmp_path):
    ear = Ear()
    with make([ear], log_dir=tmp_path / "run") as scheduler:
        train(scheduler, lambda b: np.full(len(b.indices), math.nan if b.step == 6 else 1.0))
    read = list(read_events(tmp_path / "run" / "events.jsonl"))
    expected = [as_logged(event) for event in ear.heard if not isinstance(event, events.BatchIssued)]
    assert list(map(repr, read)) == list(map(repr, expected))


def test_a_batch_is_announced_only_where_a_sink_wants_it(tmp_path):
    class Deaf(Ear):
        ignores_batches = True

    deaf, ear = Deaf(), Ear()
    for sinks in ([deaf], [deaf, ear]):
        with make(sinks, log_dir=tmp_path / "run") as scheduler:
            train(scheduler)
        assert len(deaf.of(events.BatchIssued)) == len(ear.of(events.BatchIssued))
        assert len(deaf.of(events.LossReported)) >= 12
    assert len(ear.of(events.BatchIssued)) == 12


def test_the_log_is_strict_json(tmp_path):
    def refuse(literal):
        raise AssertionError(f"{literal} is not JSON")

    with make([], log_dir=tmp_path) as scheduler:
        train(scheduler, lambda b: (1.0, math.nan, math.inf, -math.inf)[b.step % 4])
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert len(lines) > 5
    for line in lines:
        json.loads(line, parse_constant=refuse)


def test_creating_a_scheduler_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scheduler = R8Scheduler(10, 5, num_epochs=1, log_dir=tmp_path / "log", use_curses=False)
    scheduler.close()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_goes_on_appends_to_its_log(tmp_path):
    with make([], log_dir=tmp_path, num_epochs=1) as first:
        train(first)
    second = make([], log_dir=tmp_path, num_epochs=2)
    second.load_state_dict(first.state_dict())
    with second:
        train(second)
    started = [event for event in read_events(tmp_path / "events.jsonl") if isinstance(event, events.RunStarted)]
    assert [event.resumed for event in started] == [False, True]


def test_a_run_that_starts_anew_sets_the_log_of_an_earlier_one_aside(tmp_path):
    for loss in (1.0, 2.0, 3.0):
        with make([], log_dir=tmp_path) as scheduler:
            train(scheduler, lambda batch, loss=loss: np.full(len(batch.indices), loss))
            (tmp_path / "console.log").write_text(f"printed at loss {loss}\n")
    runs = {".1": 1.0, ".2": 2.0, "": 3.0}
    assert len(list(tmp_path.glob("[!.]*"))) == 9
    for number, loss in runs.items():
        log = read_events(tmp_path / f"events{number}.jsonl")
        assert [event.loss for event in log if isinstance(event, events.LossReported)] == [loss] * 12
        assert np.unique(np.load(tmp_path / f"catalog{number}.npz")["mean_loss"]) == loss
        assert (tmp_path / f"console{number}.log").read_text() == f"printed at loss {loss}\n"


@pytest.mark.parametrize(
    "junk",
    [b"{not json\n", b"123\n", b"[]\n", b"null\n", b'{"event": "FromTheFuture", "x": 1}\n', b'{"event": ["x"]}\n',
     b'{"event": "Notice"}\n', b"\x00\x00\x00\n", b"\xff\xfe broken utf-8\n", b"\n"],
    ids=repr,
)  # fmt: skip
def test_lines_broken_by_a_crash_are_passed_over(tmp_path, junk):
    path = tmp_path / "events.jsonl"
    sink = JsonlSink(path)
    sink.record(events.Notice(time=1.0, step=0, message="one"))
    sink.close()
    with path.open("ab") as file:
        file.write(junk)
    sink.record(events.Notice(time=2.0, step=1, message="two"))
    sink.close()
    with path.open("ab") as file:
        file.write(b'{"event": "Notice", "time": 3.0')  # still being written
    assert [event.message for event in read_events(path)] == ["one", "two"]


def test_everything_but_losses_reaches_the_disk_at_once(tmp_path):
    path = tmp_path / "a" / "b" / "events.jsonl"
    sink = JsonlSink(path, flush_every=3)
    loss = events.LossReported(
        time=0.0,
        step=0,
        epoch=0,
        loss=1.0,
        expected_loss=1.0,
        lr=0.1,
        verdict="calm",
        score=0.0,
        size=4,
        step_seconds=0.0,
        r8_seconds=0.0,
    )
    sink.record(loss)
    assert not path.exists()
    sink.record(events.Notice(time=1.0, step=0, message="now"))
    assert len(list(read_events(path))) == 2
    for _ in range(3):
        sink.record(loss)
    assert len(list(read_events(path))) == 5
    sink.close()
    sink.close()


def test_a_bus_without_sinks_is_false():
    bus = EventBus([], FakeClock())
    bus.emit(events.Notice(step=0, message="to nobody"))
    assert not bus
    assert not bus.commanding
    bus.add(Ear())
    assert bus


def test_fields_of_an_event_are_named_so_that_none_is_exchanged_for_another():
    with pytest.raises(TypeError, match="positional"):
        events.MetricLogged(1.0, 2, "accuracy", 0.5)


def test_a_log_of_an_older_version_lacks_what_has_a_default_and_nothing_else():
    ended = events.RunEnded(time=1.0, step=2, reason="finished", seconds=3.0, best_level=0.5)
    data = events.to_json(ended)
    for name in ("final_level", "best_step", "left_out"):
        del data[name]
    assert events.from_json({**data, "unheard_of": [1]}) == ended
    del data["seconds"]
    with pytest.raises(ValueError, match=r"incomplete RunEnded: .*'seconds'"):
        events.from_json(data)


@pytest.mark.filterwarnings("error")
def test_a_program_that_changes_its_working_directory_keeps_one_log_and_one_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    options = {"log_dir": "log", "checkpoint_dir": "saved", "checkpoint_every": "epoch", "ui": "off"}
    with R8Scheduler(20, 5, num_epochs=3, save_callback=lambda path: open(path, "w").close(), **options) as run:
        for epoch in run.epoch_iterator():
            for _ in run.batch_iterator():
                run.update_with_loss(1.0)
            if epoch == 0:
                monkeypatch.chdir(tmp_path / "elsewhere")
    assert not any((tmp_path / "elsewhere").iterdir())
    heard = list(read_events(tmp_path / "log" / "events.jsonl"))
    assert sum(isinstance(event, events.LossReported) for event in heard) == 12
    assert (tmp_path / "saved" / "step-000000012").is_dir()


LIVE = """
import sys
from learnit_r8 import R8Scheduler
run = R8Scheduler(20, 5, num_epochs=1, log_dir=sys.argv[1], checkpoint_dir=None, ui="off")
for _ in run.epoch_iterator():
    for batch in run.batch_iterator():
        run.update_with_loss(1.0)
        if batch.step == 1:
            print("going", flush=True)
            sys.stdin.read()
"""


def logged_run(folder):
    with R8Scheduler(20, 5, num_epochs=1, log_dir=folder, checkpoint_dir=None, ui="off") as run:
        for _ in run.epoch_iterator():
            for _ in run.batch_iterator():
                run.update_with_loss(2.0)


def losses_in(folder):
    return [event.loss for event in read_events(folder / "events.jsonl") if isinstance(event, events.LossReported)]


def test_two_live_runs_with_one_log_dir_are_logged_apart_and_that_is_said(tmp_path):
    folder = tmp_path / "log"
    command = [sys.executable, "-c", LIVE, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as live:
        assert live.stdout.readline() == "going\n"
        with pytest.warns(RuntimeWarning, match="a live run writes into .*log, so this one is logged in .*log-2: "):
            logged_run(folder)
        live.communicate(timeout=60)
    assert losses_in(folder) == [1.0] * 4
    assert losses_in(tmp_path / "log-2") == [2.0] * 4
    logged_run(folder)  # it has ended: its log is set aside
    assert losses_in(folder) == [2.0] * 4


def test_a_run_that_ended_and_goes_on_takes_its_log_folder_back_or_says_who_has_it(tmp_path):
    folder = tmp_path / "log"
    run = R8Scheduler(8, 4, num_epochs=3, checkpoint_dir=None, log_dir=folder, ui="off")
    other = [sys.executable, "-c", LIVE, str(folder)]

    def goes_on():
        for _ in run.epoch_iterator():
            for _ in run.batch_iterator():
                run.update_with_loss(1.0)
            break
        run._end("stopped")

    goes_on()
    loop = run.epoch_iterator()
    next(loop)
    next(run.batch_iterator())
    with subprocess.Popen(
        other, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as live:
        assert live.stdout.readline() == "going\n"
        live.communicate(timeout=60)
    assert (tmp_path / "log-2").is_dir()  # this one goes on, so the other one is logged apart
    run.update_with_loss(1.0)
    run._end("stopped")
    with subprocess.Popen(
        other, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as live:
        assert live.stdout.readline() == "going\n"
        with pytest.warns(RuntimeWarning, match="another run has begun to write into"):
            next(run.batch_iterator())
        live.communicate(timeout=60)
    run.close()
