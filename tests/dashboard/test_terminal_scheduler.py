"""R8Scheduler itself on a real pseudo-terminal: the screen tells what its event log tells, and every end is clean."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import pytest

from learnit_r8 import events as e
from learnit_r8.run import formats as f
from learnit_r8.run.events_file import read_events
from tests.terminal_driver import JOB_CONTROL, LEFT_ALTERNATE, Terminal

ROOT = Path(__file__).resolve().parents[2]
# Softmax regression; halfway the weights are lost, and at the end of an epoch the loop waits to be looked at.
TRAINING = """
import os, sys, time
import numpy as np
from learnit_r8 import R8Scheduler

rng = np.random.default_rng(0)
centres = rng.normal(size=(4, 8))
labels = rng.integers(0, 4, 640)
data = centres[labels] + rng.normal(0, 0.7, (640, 8))
weights = np.zeros((8, 4))

def step(indices, lr):
    logits = data[indices] @ weights
    logits -= logits.max(axis=1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    slope = np.exp(logs)
    slope[np.arange(len(indices)), labels[indices]] -= 1
    weights[:] -= lr * data[indices].T @ slope / len(indices)
    return -logs[np.arange(len(indices)), labels[indices]]

def restore(source):
    weights[:] = source if isinstance(source, np.ndarray) else np.load(source)

def save(filepath):
    with open(filepath, "wb") as file:
        np.save(file, weights)

with R8Scheduler(
    640, 32, num_epochs=6, initial_lr=0.3, strategy="quadrant", ui="curses", log_dir="run", checkpoint_dir="ckpt",
    checkpoint_every="epoch", save_callback=save, load_callback=restore, state_callback=weights.copy, backup_every=10,
) as scheduler:
    for epoch in scheduler.epoch_iterator():
        for indices, lr in scheduler.batch_iterator():
            losses = step(indices, lr)
            if scheduler.global_step == 70:
                weights[:] = np.nan
            scheduler.update_with_loss(losses)
            time.sleep(0.002)
        print("epoch", epoch, "is over")
        scheduler.log(val_acc=float(np.mean((data @ weights).argmax(axis=1) == labels)))
        if epoch == 4:
            open("waits", "w").close()
            while not os.path.exists(os.environ["STOP_FILE"]):
                time.sleep(0.005)
            ENDING
print("the last line of the program")
"""


def training(ending="pass"):
    return [sys.executable, "-c", TRAINING.replace("ENDING", ending)]


@pytest.fixture
def run(tmp_path):
    def start(ending="pass", size=(120, 40), argv=None):
        return Terminal("", tmp_path, size, argv=argv or training(ending))

    return start


def waits(terminal):
    """Wait until five epochs are over, and the event log and the screen are up to date."""
    terminal.until(lambda: (terminal.folder / "waits").exists())
    terminal.until(lambda: told(terminal) and "epoch 4 is over" in terminal.text())


def told(terminal):
    events = list(read_events(terminal.folder / "run" / "events.jsonl"))
    return any(isinstance(event, e.MetricLogged) and event.step >= 95 for event in events) and events


def test_the_screen_says_what_the_events_say(run):
    with run() as terminal:
        waits(terminal)
        events = told(terminal)
        reports = [event for event in events if isinstance(event, e.LossReported)]
        count = {kind: sum(isinstance(event, kind) for event in events) for kind in (e.SpikeSeen, e.RolledBack)}
        assert count[e.RolledBack] >= 1, "the run is one with something to show"
        loss = f.number(reports[-1].loss, 8).strip()
        accuracy = f.number([event.value for event in events if isinstance(event, e.MetricLogged)][-1], 8).strip()
        spikes = f"spikes {count[e.SpikeSeen]}   rollbacks {count[e.RolledBack]}"
        for shown in (f"ep {reports[-1].epoch + 1}/6", f"{reports[-1].step + 1}/120", loss, accuracy, spikes):
            terminal.until(shown)
        text = terminal.text()
        assert re.search(rf"loss +{re.escape(loss)} ", text)
        assert re.search(rf"val_acc +{re.escape(accuracy)} @ep5", text)
        assert "Q4" in text
        assert re.search(r"R rollback +\S", text)
        terminal.stop()
        assert terminal.wait() == 0
        assert terminal.stty() == terminal.before
        after = terminal.raw.split(LEFT_ALTERNATE)[-1].decode()
        assert "the last line of the program" in after
        assert re.search(rf"{count[e.SpikeSeen]} spikes?, {count[e.RolledBack]} rollbacks?,", after)
        assert "\x1b" not in after.partition("the last line")[2]


ENDS = {
    "exception": ("raise ValueError('boom')", None, 1),
    "Ctrl-C": ("pass", "\x03", -signal.SIGINT),
    "SIGTERM": ("pass", signal.SIGTERM, -signal.SIGTERM),
    "SIGKILL": ("pass", signal.SIGKILL, -signal.SIGKILL),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_terminal_is_as_before_after(end, run):
    ending, how, status = ENDS[end]
    with run(ending) as terminal:
        waits(terminal)
        assert terminal.stty() != terminal.before
        if isinstance(how, str):
            terminal.send(how)
        elif how is not None:
            terminal.process.send_signal(how)
        if how != signal.SIGKILL:
            terminal.stop()  # a signal waits for the loop's next step
        assert terminal.wait() == status
        terminal.until(lambda: LEFT_ALTERNATE in terminal.raw)
        terminal.until(lambda: terminal.stty() == terminal.before)
        after = terminal.raw.split(LEFT_ALTERNATE)[-1]
        assert (b"ValueError: boom" in after) == (end == "exception")
        assert (b"KeyboardInterrupt" in after) == (end == "Ctrl-C")
        assert b"the last line" not in terminal.raw
        if end in {"Ctrl-C", "SIGTERM"}:
            assert any((terminal.folder / "ckpt").iterdir()), "the signal saved a checkpoint"


def test_ctrl_z_and_fg(run):
    with run(argv=[sys.executable, "-c", JOB_CONTROL, *training()[2:]]) as terminal:
        waits(terminal)
        terminal.send("\x1a")
        terminal.until(lambda: (terminal.folder / "stopped").exists() and LEFT_ALTERNATE in terminal.raw)
        terminal.until(lambda: terminal.stty() == terminal.before)
        seen = len(terminal.raw)
        (terminal.folder / "fg").touch()
        terminal.until(lambda: b"\x1b[?1049h" in terminal.raw[seen:])
        terminal.until("ep 5/6")
        terminal.stop()
        assert terminal.wait() == 0
        assert terminal.stty() == terminal.before


def test_the_example_shows_its_rollback_and_ends_with_its_table(tmp_path):
    argv = [sys.executable, str(ROOT / "example.py"), "--epochs", "16", "--ui", "curses"]  # time to look
    with Terminal("", tmp_path, (120, 35), argv=argv) as terminal:
        terminal.until("rollbacks 1", 60)
        terminal.until("the model was restored")
        assert terminal.wait(60) == 0
        assert terminal.stty() == terminal.before
        after = terminal.raw.split(LEFT_ALTERNATE)[-1].decode()
        assert "test accuracy" in after
        assert re.search(r"spikes / rollbacks +│ 1 / 1", after)
