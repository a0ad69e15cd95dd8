"""The command `r8`: real processes, real terminals, real runs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from learnit_r8 import R8Scheduler, TrainingDiverged
from learnit_r8.dashboard.demo import DemoRun
from learnit_r8.events import LossReported, RunEnded, RunStarted, to_json
from learnit_r8.run.blocks import each_event
from learnit_r8.run.samples_file import write_catalog
from learnit_r8.run.tail import EventTail
from learnit_r8.samples.catalog import LossCatalog
from learnit_r8.sinks import JsonlSink, read_events
from learnit_r8.watch import WatchedRun
from tests.terminal_driver import Terminal

R8 = [sys.executable, "-W", "error", "-m", "learnit_r8"]
ENVIRONMENT = {"PATH": os.environ["PATH"], "PYTHONPATH": os.getcwd(), "LANG": "C.UTF-8", "PYTHONIOENCODING": "utf-8"}


def r8(*arguments, cwd=None, **environment):
    return subprocess.run(
        [*R8, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=60,
        stdin=subprocess.DEVNULL,
        env={**ENVIRONMENT, **environment},
    )


def write_demo(folder, start=None, until=None, **arguments):
    sink = JsonlSink(folder / "events.jsonl")
    for number, (_, event) in enumerate(DemoRun(start=time.time() if start is None else start, **arguments)):
        if number == until:
            break
        sink.record(event)
    sink.close()
    return folder


@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    """A small run whose samples 3, 4 and 5 are hard for ever, in the classes 3, 4 and 0."""
    folder = tmp_path_factory.mktemp("real") / "first"
    with R8Scheduler(60, 8, num_epochs=3, ui="off", checkpoint_dir=None, log_dir=folder, groups=np.arange(60) % 5) as s:
        for _ in s.epoch_iterator():
            for batch in s.batch_iterator():
                hard = np.isin(batch.indices, (3, 4, 5))
                s.update_with_loss(np.where(hard, batch.indices.astype(float), 0.1))
    return folder


# watch ------------------------------------------------------------------------------------


def test_once_prints_one_frame_and_says_that_the_run_ended(real_run):
    done = r8("watch", real_run, "--once", "--size", "100x30")
    assert (done.returncode, done.stderr) == (0, "")
    *frame, last = done.stdout.splitlines()
    assert len(frame) == 30
    assert "first: ended: finished" in last
    assert "\x1b" not in done.stdout
    assert "100.0%" in done.stdout


def test_json_has_the_numbers_and_is_strict(real_run):
    done = r8("watch", real_run, "--json")
    numbers = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(name))
    assert (numbers["status"], numbers["step"], numbers["state"]) == ("ended", 24, "finished")


def test_several_runs_are_overlaid_and_named(real_run, tmp_path):
    other = write_demo(tmp_path / "other", epochs=1)
    done = r8("watch", real_run, other, "--once", "--size", "120x35")
    *_, first, second = done.stdout.splitlines()
    assert first.startswith("   first: ended")
    assert second.startswith("a  demo: ended")
    assert len(json.loads(r8("watch", real_run, other, "--json").stdout)) == 2


@pytest.mark.parametrize(("age", "status"), [(0, "live"), (86400, "stale")])
def test_a_run_that_writes_is_live_and_one_that_fell_silent_is_stale(tmp_path, age, status):
    folder = write_demo(tmp_path, start=time.time() - age, until=50)
    numbers = json.loads(r8("watch", folder, "--json").stdout)
    assert numbers["status"] == status
    assert age - 10 < numbers["silent_seconds"] < age + 60
    assert f"demo: {status}: last event" in r8("watch", folder, "--once").stdout


def test_slow_steps_are_not_mistaken_for_a_stale_run(tmp_path):
    run = WatchedRun(write_demo(tmp_path, start=1000.0, until=60, step_seconds=10.0))
    run.read_all()
    assert run.status(run.model.last_time + 150) == "live"
    assert run.status(run.model.last_time + 900) == "stale"


def test_a_run_of_slow_steps_is_seen_step_by_step(tmp_path):
    sink, run = JsonlSink(tmp_path / "events.jsonl"), WatchedRun(tmp_path)
    sink.record(
        RunStarted(
            time=995.0,
            step=0,
            run="slow",
            config={},
            steps_per_epoch=10,
            total_steps=100,
            resumed=False,
            version="0",
            pid=1,
            elapsed=0.0,
        )
    )
    for step in range(3):
        sink.record(
            LossReported(
                time=1000.0 + 5 * step,
                step=step,
                epoch=0,
                loss=0.25,
                expected_loss=0.2,
                lr=0.01,
                verdict="calm",
                score=0.1,
                size=32,
                step_seconds=5.0,
                r8_seconds=0.001,
            )
        )
        run.read_all()
        assert run.model.step == step + 1
    sink.close()


def test_a_partial_last_line_is_held_back_until_it_is_complete(tmp_path):
    path = tmp_path / "events.jsonl"
    line = json.dumps(to_json(RunEnded(time=5.0, step=7, reason="finished", seconds=4.0)))
    tail = EventTail(path)
    assert tail.poll() == []
    for cut in range(len(line)):
        path.write_text(line[:cut])
        assert EventTail(path).poll() == []
    path.write_text(line[:10])
    assert tail.poll() == []
    with path.open("a") as file:
        file.write(line[10:] + "\n" + line[:3])
    assert tail.poll() == [RunEnded(time=5.0, step=7, reason="finished", seconds=4.0)]
    assert tail.poll() == []


def test_the_tail_agrees_with_the_reader_of_whole_logs_whatever_the_chunks(tmp_path):
    write_demo(tmp_path, epochs=1)
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'\n[]\n7\nnull\n{"event":"LossReported"}\n{"event":"New"}\n\xff\xfe\n' + b"[" * 5000 + b"\n")
    write_demo(tmp_path, epochs=1, seed=1)
    expected = [repr(event) for event in read_events(tmp_path / "events.jsonl")]  # repr: NaN differs from itself
    for chunk in (97, 4096, 1 << 22):
        tail = EventTail(tmp_path / "events.jsonl")
        found = tail.poll(chunk)
        while tail.behind:
            found += tail.poll(chunk)
        assert [repr(event) for event in each_event(found)] == expected


def test_a_log_that_was_replaced_starts_the_view_anew(tmp_path):
    run = WatchedRun(write_demo(tmp_path, epochs=2))
    run.read_all()
    (tmp_path / "events.jsonl").unlink()
    write_demo(tmp_path, until=30)
    run.read_all()
    assert run.model.ended is None
    assert run.model.step < 40


def test_a_log_that_was_set_aside_for_a_longer_one_starts_the_view_anew(tmp_path):
    run = WatchedRun(write_demo(tmp_path, until=30))
    run.read_all()
    (tmp_path / "events.jsonl").rename(tmp_path / "events.1.jsonl")
    write_demo(tmp_path, until=200)
    run.read_all()
    fresh = WatchedRun(tmp_path)
    fresh.read_all()
    assert fresh.model.step > 50
    assert run.model.to_json() == fresh.model.to_json()


def test_watching_changes_nothing_in_the_folder(tmp_path):
    folder = write_demo(tmp_path / "run", epochs=1)
    (folder / "console.log").write_text("hello from the run\n")
    (folder / "console.log").chmod(0o444)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    done = r8("watch", folder, "--once", "--size", "120x40")
    assert "hello from the run" in done.stdout
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


def test_the_screen_follows_a_growing_log_and_q_gives_the_terminal_back(tmp_path):
    folder = write_demo(tmp_path / "run", until=200)
    (folder / "console.log").write_text("printed by the run\n")
    with Terminal("", tmp_path, (120, 35), argv=[*R8, "watch", str(folder)]) as terminal:
        terminal.until(lambda: "read-only" in terminal.text() and "printed by the run" in terminal.text())
        with (folder / "console.log").open("a") as file:
            file.write("printed later\n")
        sink = JsonlSink(folder / "events.jsonl")
        sink.record(
            LossReported(
                time=time.time(),
                step=1999,
                epoch=4,
                loss=0.25,
                expected_loss=0.2,
                lr=0.01,
                verdict="calm",
                score=0.1,
                size=32,
                step_seconds=0.1,
                r8_seconds=0.001,
            )
        )
        sink.record(RunEnded(time=time.time(), step=2000, reason="finished", seconds=100.0))
        sink.close()
        terminal.until("printed later")
        terminal.until("DONE")
        terminal.until("2 000/4 000")
        terminal.send("q")
        assert terminal.wait() == 0
        assert terminal.stty() == terminal.before
    assert sorted(path.name for path in folder.iterdir()) == ["console.log", "events.jsonl"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, -15), (signal.SIGKILL, -9)])
def test_signals_give_the_terminal_back(tmp_path, number, status):
    folder = write_demo(tmp_path / "run", until=50)
    with Terminal("", tmp_path, argv=[*R8, "watch", str(folder)]) as terminal:
        terminal.until("read-only")
        terminal.process.send_signal(number)
        assert terminal.wait() == status
        terminal.until(lambda: terminal.stty() == terminal.before)


# demo -------------------------------------------------------------------------------------


def test_the_demo_in_a_pipe_is_plain_lines(tmp_path):
    done = r8("demo", "--speed", "1000", "--epochs", "2", "--log-dir", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    assert "finished" in done.stdout
    assert json.loads(r8("watch", tmp_path, "--json").stdout)["step"] == 800


def test_the_demo_shows_the_screen_pauses_and_stops_by_keys(tmp_path):
    argv = [*R8, "demo", "--speed", "20", "--log-dir", str(tmp_path / "log")]
    with Terminal("", tmp_path, (120, 35), argv=argv) as terminal:
        terminal.until("● RUN")
        terminal.send("ppause\r")
        terminal.until("PAUSED")
        terminal.send("p")
        terminal.until("● RUN")
        terminal.send("sstep\r")
        assert terminal.wait() == 0
        assert terminal.stty() == terminal.before
    *_, last = read_events(tmp_path / "log" / "events.jsonl")
    assert isinstance(last, RunEnded)
    assert last.reason == "stopped"


# suspects and crash -----------------------------------------------------------------------


def test_suspects_are_listed_worst_first_with_their_class(real_run):
    done = r8("suspects", real_run, "--top", "3")
    heading, *rows, verdict = done.stdout.splitlines()
    assert heading.split()[:3] == ["rank", "id", "group"]
    assert "flagged" not in heading
    assert verdict.startswith("The noise guard flags none")
    assert done.stderr == ""
    assert [row.split()[:4] for row in rows] == [["1", "5", "0", "5"], ["2", "4", "4", "4"], ["3", "3", "3", "3"]]


def test_suspects_as_csv_have_all_digits(real_run):
    heading, *rows = r8("suspects", real_run, "--top", "2", "--csv").stdout.splitlines()
    assert heading == "rank,id,group,mean_loss,expected_loss,variability,correctness,uses,flagged"
    assert rows == ["1,5,0,5,5,0,0,3,0", "2,4,4,4,4,0,0,3,0"]


def test_suspects_say_which_the_guard_flags_and_how_many_a_run_keeps(tmp_path):
    catalog = LossCatalog(1200)
    catalog.record(catalog.look_up(np.arange(1200)), np.arange(1200, dtype=np.float32), 0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "events.jsonl").touch()
    write_catalog(tmp_path / "run", catalog, None, 1, np.arange(1200) >= 950)
    done = r8("suspects", tmp_path / "run", "--top", "1100")
    heading, *rows, verdict = done.stdout.splitlines()
    assert heading.split()[-1] == "flagged"
    assert [row.endswith(" yes") for row in rows] == [True] * 250 + [False] * 750
    assert verdict == "The noise guard flags 250 of 1200 samples as wrong."
    assert done.stderr == "r8 suspects: a run logs its 1000 worst samples\n"
    csv = r8("suspects", tmp_path / "run", "--csv").stdout.splitlines()
    assert csv[1] == "1,1199,,1199,1199,0,0,1,1"
    catalog.record_batch(catalog.look_up(np.arange(8)), 3.0, 2)
    write_catalog(tmp_path / "run", catalog, None, 2, np.zeros(1200, bool))
    said = r8("suspects", tmp_path / "run").stdout.splitlines()[-1]
    assert said.startswith("The noise guard flags none")
    assert said.endswith("One loss a batch was reported: all these figures are estimates, and weak.")


def test_without_the_guard_nothing_is_said_of_flags(tmp_path):
    catalog = LossCatalog(1200)
    catalog.record(catalog.look_up(np.arange(1200)), np.arange(1200, dtype=np.float32), 0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "events.jsonl").touch()
    write_catalog(tmp_path / "run", catalog, None, 1)
    assert r8("suspects", tmp_path / "run").stdout.endswith("The noise guard was off.\n")
    assert r8("suspects", tmp_path / "run", "--csv").stdout.splitlines()[1] == "1,1199,,1199,1199,0,0,1,"


def diverge(folder):
    with R8Scheduler(
        40, 4, num_epochs=9, ui="off", checkpoint_dir=None, log_dir=folder, load_callback=lambda _: None,
        state_callback=lambda: {"w": np.zeros(2)},
    ) as scheduler:  # fmt: skip
        for _ in scheduler.epoch_iterator():
            for _ in scheduler.batch_iterator():
                scheduler.update_with_loss(float("nan") if scheduler.global_step > 20 else 1.0)


def test_the_bundle_of_a_diverged_run_is_printed_with_its_samples(tmp_path):
    with pytest.raises(TrainingDiverged) as error:
        diverge(tmp_path)
    bundle = error.value.crash_bundle
    first = r8("crash", bundle)
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout == r8("crash", tmp_path).stdout == r8("crash", bundle / "crash.json").stdout
    assert "nonfinite" in first.stdout
    assert "rollback" in first.stdout
    assert "batch_size = 4" in first.stdout
    last = " ".join(map(str, error.value.batches[-1]))
    assert f"samples {last}" in first.stdout
    assert len(r8("crash", bundle, "--all").stdout) > len(first.stdout)


# doctor, mistakes and pipes ---------------------------------------------------------------


MISTAKES = {
    "no such folder": (["watch", "nowhere"], "nowhere: give the folder that the run got as log_dir"),
    "no log in it": (["suspects", "empty"], "holds no events.jsonl: give the folder"),
    "no terminal": (["watch", "run"], "standard output is not a terminal): use --once"),
    "no catalog": (["suspects", "run"], "holds no catalog.npz: a run writes it at the end of its first epoch"),
    "no bundle": (["crash", "run"], "holds no crash bundle: give the folder that the error named"),
    "no path": (["crash", "nowhere"], "nowhere does not exist: give the folder"),
    "another file": (["crash", "run/events.jsonl"], "is no crash bundle"),
    "no command": ([], "required: COMMAND; see r8 --help"),
    "unknown command": (["wach"], "see r8 --help"),
    "no run": (["watch"], "required: RUN_DIR; see r8 watch --help"),
    "bad size": (["watch", "run", "--once", "--size", "big"], "as 120x35, not 'big'"),
    "bad number": (["suspects", "run", "--top", "-1"], "give a whole number >= 1"),
    "bad speed": (["demo", "--speed", "nan"], "give a number from 0.01 to 1000"),
    "doctor of a run": (["doctor", "run"], "`r8 watch --once run` tells how it stands, `r8 crash run`"),
    "bad ui": (["demo", "--ui", "gui"], "ui must be one of auto, curses, rich, log, off; got 'gui'"),
    "nothing shown": (["demo", "--ui", "off"], "try r8 demo --ui log"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_sentence_that_says_what_to_do(mistake, tmp_path):
    write_demo(tmp_path / "run", until=20)
    (tmp_path / "empty").mkdir()
    arguments, sentence = MISTAKES[mistake]
    done = r8(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert sentence in done.stderr
    assert done.stderr.startswith("r8")
    assert done.stderr.count("\n") == 1


def test_a_folder_of_runs_names_the_runs(tmp_path):
    for name in "abcd":
        write_demo(tmp_path / name, until=3)
    done = r8("watch", tmp_path, "--once")
    assert done.returncode == 2
    assert "holds a, b, c and 1 more: give one of these folders" in done.stderr


@pytest.mark.parametrize("command", ["watch run --once", "watch run --json", "suspects first", "demo --speed 50"])
def test_a_reader_that_leaves_ends_it_quietly(command, tmp_path, real_run):
    write_demo(tmp_path / "run", epochs=2)
    (tmp_path / "first").symlink_to(real_run)
    line = f"{' '.join(R8)} {command} | head -1"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, cwd=tmp_path, timeout=60, env=ENVIRONMENT)
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1


def test_frames_can_be_printed_where_only_ascii_can(real_run):
    done = r8("watch", real_run, "--once", LANG="C", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert done.stdout.isascii()


def test_the_version_is_printed():
    assert re.fullmatch(r"learnit_r8 \d+\.\d+\.\d+\n", r8("--version").stdout)


def test_the_help_of_the_program_names_every_command():
    text = r8("--help").stdout
    for name in ("watch", "report", "plot", "demo", "suspects", "crash", "doctor"):
        assert re.search(rf"^ +{name} ", text, re.MULTILINE), name


def test_a_run_that_only_just_started_can_be_watched(tmp_path):
    (tmp_path / "events.jsonl").write_text("")
    assert ": waiting: no event yet" in r8("watch", tmp_path, "--once").stdout
    sink = JsonlSink(tmp_path / "events.jsonl")
    sink.record(
        RunStarted(
            time=time.time(),
            step=0,
            run="young",
            config={},
            steps_per_epoch=10,
            total_steps=100,
            resumed=False,
            version="0",
            pid=1,
            elapsed=0.0,
        )
    )
    sink.close()
    assert "young: live" in r8("watch", tmp_path, "--once").stdout
