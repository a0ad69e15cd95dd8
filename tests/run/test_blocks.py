"""The lines of an event log: what they hold, what they cost, and what a crash leaves of them."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learnit_r8 import events as e
from learnit_r8.run.blocks import Block, decode, each_event, encode, encode_block
from learnit_r8.run.events_file import JsonlSink, read_events
from learnit_r8.run.model import DashboardModel
from learnit_r8.run.table import read_table

TIMES = st.integers(0, 4_000_000_000_000_000).map(lambda micros: micros / 1e6)
SHORT = st.integers(0, 10_000_000).map(lambda micros: micros / 1e6)
SEVEN = st.floats(width=32).map(lambda value: float(f"{value:.7g}") + 0.0)  # the sign of a zero is lost
NUMBERS = SEVEN | st.sampled_from([math.nan, math.inf, -math.inf])
STEPS = st.integers(0, 10**12)


def routine():
    loss = st.builds(
        e.LossReported, time=TIMES, step=STEPS, epoch=STEPS, loss=NUMBERS, expected_loss=NUMBERS, lr=NUMBERS,
        verdict=st.sampled_from(["calm", "spike", '"}\n']), score=NUMBERS.map(lambda value: float(f"{value:.4g}")),
        size=STEPS, step_seconds=SHORT, r8_seconds=SHORT,
    )  # fmt: skip
    taken = st.builds(e.BackupTaken, time=TIMES, step=STEPS, bytes=STEPS, seconds=SHORT)
    proved = st.builds(e.BackupVerified, time=TIMES, step=STEPS, of_step=STEPS)
    metric = st.builds(e.MetricLogged, time=TIMES, step=STEPS, name=st.text(max_size=8), value=NUMBERS)
    return st.lists(loss | taken | proved | metric, min_size=1, max_size=20)


def refuse(literal):
    raise AssertionError(f"{literal} is not JSON")


@given(routine(), st.integers(1, 3))
def test_a_block_is_one_strict_line_and_reads_back_in_order(events, times):
    line = encode_block(events * times)
    assert line.endswith("\n")
    assert line.count("\n") == 1
    json.loads(line, parse_constant=refuse)
    assert list(map(repr, each_event(decode([line])))) == list(map(repr, events * times))


@given(routine())
def test_a_block_and_a_line_for_each_event_are_read_as_the_same(events):
    blocks = decode(map(encode, events))
    assert list(map(repr, each_event(blocks))) == list(map(repr, events))


@given(routine(), st.data())
def test_a_block_that_is_cut_anywhere_is_passed_over(events, data):
    line = encode_block(events)
    cut = data.draw(st.integers(0, len(line) - 2))
    assert list(decode([line[:cut]])) == []


def report(step, **more):
    values = {"time": 1.7e9 + step / 64, "step": step, "epoch": 0, "loss": 0.5, "expected_loss": 0.4, "lr": 0.01}
    values |= {"verdict": "calm", "score": 0.1, "size": 8, "step_seconds": 0.015, "r8_seconds": 1e-4}
    return e.LossReported(**(values | more))


@pytest.mark.parametrize("odd", [{"time": math.nan}, {"time": 1e300}, {"r8_seconds": math.inf}], ids=repr)
def test_what_fits_no_block_has_a_line_of_its_own(odd):
    events = [report(0), report(1, **odd), report(2)]
    text = encode_block(events)
    assert text.count("\n") == 3
    assert list(map(repr, each_event(decode(text.splitlines())))) == list(map(repr, events))


def test_columns_that_say_nothing_new_cost_nothing():
    assert len(encode_block([report(step) for step in range(10_000)])) < 400


def test_fields_of_a_newer_version_are_passed_over_and_missing_ones_are_a_broken_line():
    data = json.loads(encode_block([report(0), report(1)]))
    data["LossReported"]["new"] = [1, 2]
    data["NewEvent"] = {"count": 2, "at": [2, 1]}
    assert list(each_event(decode([json.dumps(data)]))) == [report(0), report(1)]
    del data["LossReported"]["loss"]
    assert list(decode([json.dumps(data)])) == []


@pytest.mark.parametrize("count", [-1, 0, 2, 10**9, 10**30, "x", None, [3]])
def test_a_count_that_no_block_has_is_a_broken_line(count):
    data = json.loads(encode_block([report(0, loss=1.0), report(1, loss=2.0), report(2, loss=3.0)]))
    assert len(list(each_event(decode([json.dumps(data)])))) == 3
    data["LossReported"]["count"] = count
    assert list(decode([json.dumps(data), '{"event":"Block"}', '{"event":"Block","LossReported":[]}'])) == []


def course():
    """Yield a run's events: losses, backups, numbers of each step, evaluations amid and after the epoch, a pause."""
    for step in range(1500):
        yield report(step, loss=math.sin(step) if step % 7 else math.nan)
        if step % 8 == 0:
            yield e.BackupTaken(time=1.7e9 + step / 64 + 0.001, step=step, bytes=100, seconds=1e-5)
        if step % 3 == 0:
            yield e.MetricLogged(time=1.7e9 + step / 64 + 0.002, step=step, name="norm", value=step / 2)
        if step % 400 == 399:
            yield e.MetricLogged(time=1.7e9 + step / 64 + 0.01, step=step, name="val_loss", value=1.0 / step)
        if step == 700:
            yield e.EpochEnded(
                time=1.7e9 + 11, step=step, epoch=0, mean_loss=0.5, seconds=11.0, batches=701, completed=True
            )


def test_the_screen_of_a_log_in_blocks_is_that_of_a_log_of_lines(tmp_path):
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(map(encode, course())))
    sink = JsonlSink(tmp_path / "blocks.jsonl")
    for event in course():
        sink.record(event)
    sink.close()
    assert (tmp_path / "blocks.jsonl").stat().st_size * 4 < lines.stat().st_size
    one_by_one = DashboardModel()
    for event in read_events(lines):
        one_by_one.consume(event)
    for path in (lines, tmp_path / "blocks.jsonl"):
        blocks = DashboardModel()
        blocks.consume_all(decode(path.read_bytes().splitlines()))
        expected, found = flat(one_by_one.to_json()), flat(blocks.to_json())
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            near = pytest.approx(value, rel=1e-6, abs=1e-6) if isinstance(value, float) else value
            assert found[name] == near, name
    both = read_table(lines), read_table(tmp_path / "blocks.jsonl")
    for name, column in both[0].columns.items():
        np.testing.assert_allclose(both[1].columns[name], column, rtol=1e-6)
    assert both[0].backups == pytest.approx(both[1].backups)
    assert {name: rows.shape for name, rows in both[0].metrics.items()} == {"norm": (3, 500), "val_loss": (3, 3)}


def test_steps_wait_for_a_second_and_an_evaluation_for_nothing(tmp_path):
    path = tmp_path / "events.jsonl"
    sink = JsonlSink(path)
    for step in range(64):
        sink.record(report(step))
        assert not path.exists()
    sink.record(report(65))
    assert len(list(read_events(path))) == 65
    sink.record(report(66))
    assert len(list(read_events(path))) == 65
    sink.record(e.MetricLogged(time=1.7e9 + 67 / 64, step=66, name="val_loss", value=1.0))
    assert len(list(read_events(path))) == 67
    sink.close()


def test_a_run_goes_on_behind_a_line_that_broke(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text(encode_block([report(0), report(1)])[:-40])
    sink = JsonlSink(path)
    sink.record(e.Notice(time=2.0, step=1, message="resumed"))
    sink.close()
    assert [event.message for event in read_events(path)] == ["resumed"]


ENDLESS = """
import sys
from learnit_r8 import R8Scheduler
log, saved = sys.argv[1:]
def make():
    options = dict(log_dir=log, checkpoint_dir=saved, checkpoint_every=500, ui="off")
    return R8Scheduler(3200, 32, num_epochs=10_000, save_callback=lambda path: open(path, "w").close(), **options)
try:
    run = R8Scheduler.resume_from_checkpoint(saved, lambda path: open(path, "w").close(), lambda path: None, ui="off")
except Exception:
    run = make()
print("go", flush=True)
for _ in run.epoch_iterator():
    for batch in run.batch_iterator():
        run.update_with_loss(1.0 / (1 + batch.step))
"""


@pytest.mark.slow
def test_fifty_kills_lose_no_step_that_was_written(tmp_path):
    path, before, rng = tmp_path / "log" / "events.jsonl", 0, np.random.default_rng(0)
    for _ in range(50):
        command = [sys.executable, "-W", "ignore", "-c", ENDLESS, str(tmp_path / "log"), str(tmp_path / "saved")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"go\n"
        time.sleep(rng.uniform(0.0, 0.4))
        seen = path.read_bytes() if path.exists() else b""
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert path.read_bytes().startswith(seen) if seen else True  # it is the same file, and nothing of it is lost
        assert len(seen) >= before
        before = len(seen)
    steps = read_table(path).columns["step"]
    assert len(steps) > 500
    assert steps.tolist() == list(range(len(steps)))  # none twice, none missing, over fifty processes
    started = [event for event in read_events(path) if isinstance(event, e.RunStarted)]
    assert sum(event.resumed for event in started) > 30


def flat(data, name=""):
    if isinstance(data, dict):
        return {key: value for part, item in data.items() for key, value in flat(item, f"{name}.{part}").items()}
    if isinstance(data, (list, tuple)):
        return {key: value for i, item in enumerate(data) for key, value in flat(item, f"{name}.{i}").items()}
    return {name: data}


def test_a_block_knows_its_newest_events():
    block = next(decode([encode_block([report(0), report(1), e.BackupVerified(time=1.7e9 + 2, step=1, of_step=0)])]))
    assert isinstance(block, Block)
    assert block.newest(e.LossReported) == report(1)
    assert block.newest(e.BackupTaken) is None
    assert (len(block), block.time) == (3, 1.7e9 + 2)
