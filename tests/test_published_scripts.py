"""Scripts written for the published library run unmodified, and its own failures are not ours."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from learnit_r8 import R8Scheduler

ROOT = Path(__file__).resolve().parents[1]

# The published README's quick start, word for word but for the pause that stands for training.
QUICK_START = """
import time
import random
from learnit_r8 import R8Scheduler

# 1. Define your training components
def my_train_step(batch_indices, lr):
    # Your actual model training logic goes here
    # print(f"Training on {len(batch_indices)} samples with LR: {lr:.6f}")
    time.sleep(0.0005)
    # Simulate a loss that depends on the data and learning rate
    return 1.0 / (lr * 100 + 1) + random.uniform(-0.1, 0.1)

def save_model_callback(state_dict, filepath):
    # In a real scenario, you would save model weights, e.g., torch.save(...)
    print(f"\\n[Callback] Saving model state to {filepath}...")
    return True

def load_model_callback(filepath):
    # In a real scenario, you would load model weights, e.g., model.load_state_dict(...)
    print(f"\\n[Callback] Loading model state from {filepath}...")
    return {"key": "mock_model_state"} # Return the loaded state

# 2. Setup the Scheduler
scheduler = R8Scheduler(
    num_samples=1000,
    num_epochs=10,
    batch_size=32,
    initial_lr=0.01,
    scheduler_mode='cosine',
    save_callback=save_model_callback,
    load_callback=load_model_callback,
    use_curses=True
)

# 3. Run the training loop
try:
    for epoch in scheduler.epoch_iterator():
        for batch_indices, lr in scheduler.batch_iterator():
            # Perform a training step
            loss = my_train_step(batch_indices, lr)
            
            # Update the scheduler with the result
            scheduler.update_with_loss(loss)

finally:
    # Ensure curses UI is closed properly
    scheduler.close()

print("\\nTraining complete!")
"""  # noqa: W293 - word for word


def run(script, cwd):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=cwd, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("use_curses", [True, False])
def test_the_quick_start_runs_unmodified_in_a_pipe(use_curses, tmp_path):
    done = run(QUICK_START.replace("use_curses=True", f"use_curses={use_curses}"), tmp_path)
    assert done.stdout.rstrip().endswith("Training complete!")
    assert "\x1b" not in done.stdout + done.stderr, "no escape sequences in a pipe"
    if not use_curses:
        assert done.stdout.split() == ["Training", "complete!"]
        assert done.stderr == ""
    assert list(tmp_path.iterdir()) == [], "nothing was asked to be written"


BACKUPS_AND_CHECKPOINTS = """
import os
import numpy as np
from learnit_r8 import R8Scheduler

weights = {"w": np.zeros(4)}

def get_current_model_weights_on_cpu():
    return weights

def save_model_callback(state_dict, filepath):
    os.makedirs(os.path.dirname(filepath) or ".", exist_ok=True)
    np.savez(open(filepath, "wb"), **weights)
    return True

def load_model_callback(source, from_ram=False):
    loaded = source if from_ram else np.load(source)
    weights["w"] = np.array(loaded["w"])
    print("loaded from", "ram" if from_ram else "disk", weights["w"][0])
    return weights

scheduler = R8Scheduler(num_samples=400, num_epochs=3, batch_size=4, initial_lr=0.01, scheduler_mode='linear',
                        save_callback=save_model_callback, load_callback=load_model_callback, use_curses=False)
try:
    for epoch in scheduler.epoch_iterator():
        for batch_indices, lr in scheduler.batch_iterator():
            weights["w"] += 1
            loss = float("nan") if scheduler.global_step == 130 else 1.0
            scheduler.update_with_loss(loss)
            if scheduler.global_step % 50 == 0:
                scheduler.update_cpu_backup(get_current_model_weights_on_cpu())
        scheduler.save_checkpoint()
        if epoch == 1:
            break
finally:
    scheduler.close()

print("stopped at", scheduler.global_step, "weights", weights["w"][0])
weights["w"][:] = -1
scheduler = R8Scheduler.resume_from_checkpoint("checkpoints", save_model_callback, load_model_callback)
for epoch in scheduler.epoch_iterator():
    print("epoch", epoch)
    for batch_indices, lr in scheduler.batch_iterator():
        weights["w"] += 1
        scheduler.update_with_loss(1.0)
print("ended at", scheduler.global_step, "weights", weights["w"][0])
print("again", list(scheduler.epoch_iterator()))
scheduler.close()
"""


def test_backups_every_fifty_steps_and_checkpoints_by_hand_work_as_published(tmp_path):
    lines = run(BACKUPS_AND_CHECKPOINTS, tmp_path).stdout.splitlines()
    kinds = [line.rsplit(" ", 1)[0] for line in lines]
    assert kinds[0] == "loaded from ram"
    back = float(lines[0].rsplit(" ", 1)[1])
    assert back in (50.0, 100.0), "one of the backups"
    assert lines[1] == f"stopped at 200 weights {back + 69}"
    assert lines[2] == f"loaded from disk {back + 69}"
    assert lines[3:] == ["epoch 2", f"ended at 300 weights {back + 169}", "again []"]


@pytest.mark.parametrize("published", [
    {"num_samples": 10, "num_epochs": 1, "batch_size": 4, "use_curses": False},
    {"num_samples": 10, "num_epochs": 1, "batch_size": 4, "use_curses": False, "scheduler_mode": "linear"},
    {"num_samples": 10, "num_epochs": 1, "batch_size": 4, "use_curses": False, "initial_lr": 0.1},
    {"num_samples": 10, "train_duration_seconds": 0.05, "batch_size": 4, "use_curses": False},
], ids=["least", "linear", "rate", "seconds"])  # fmt: skip
def test_construction_works_for_every_published_set_of_keywords(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scheduler = R8Scheduler(**published)
    for _ in scheduler.epoch_iterator():
        for _, lr in scheduler.batch_iterator():
            assert 0 < lr <= published.get("initial_lr", 0.01)
            scheduler.update_with_loss(1.0)
    assert scheduler.global_step >= 1
    assert list(scheduler.epoch_iterator()) == []
    scheduler.close()


SAVES = {
    "(state_dict, filepath)": lambda log: lambda state_dict, filepath: log.append((state_dict, filepath)),
    "(filepath)": lambda log: lambda filepath: log.append((None, filepath)),
}


@pytest.mark.parametrize("form", SAVES)
def test_both_forms_of_save_callback_get_a_path_in_the_checkpoint(form, tmp_path):
    log = []
    scheduler = R8Scheduler(
        8, 4, num_epochs=1, use_curses=False, checkpoint_dir=tmp_path / "c", save_callback=SAVES[form](log)
    )
    scheduler.save_checkpoint()
    scheduler.save_checkpoint(is_final=True)
    assert len(log) == 2
    for state, path in log:
        assert isinstance(path, str)
        assert Path(path).is_relative_to(tmp_path / "c")
        if form != "(filepath)":
            assert state["global_step"] == 0
            assert state["config"]["num_samples"] == 8


@pytest.mark.parametrize("told", [True, False])
def test_both_forms_of_load_callback_work_from_ram_and_from_disk(told, tmp_path):
    heard = []

    def load_told(source, from_ram=False):
        heard.append((from_ram, source))

    def load(filepath):
        heard.append((None, filepath))

    callbacks = {
        "save_callback": lambda path: Path(path).write_text("model"),
        "load_callback": load_told if told else load,
    }
    scheduler = R8Scheduler(40, 4, num_epochs=1, use_curses=False, checkpoint_dir=tmp_path / "c", **callbacks)
    scheduler.update_cpu_backup({"w": 1})
    for batch in scheduler.batch_iterator():
        scheduler.update_with_loss(math.nan if batch.step == 1 else 1.0)
        if batch.step == 3:
            break
    path = scheduler.save_checkpoint()
    R8Scheduler.resume_from_checkpoint(path, **callbacks)
    (ram, state), (disk, model) = heard
    assert (ram, disk) == ((True, False) if told else (None, None))
    assert state == {"w": 1}
    assert Path(model).read_text() == "model"


# The published code's own failures -------------------------------------------------------------


def test_its_backup_was_no_deep_copy_and_ours_is():
    model = torch.nn.Linear(2, 1)
    restored = []
    scheduler = R8Scheduler(16, 4, num_epochs=1, use_curses=False, checkpoint_dir=None, load_callback=restored.append)
    original = copy.deepcopy(model.state_dict())
    scheduler.update_cpu_backup(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    next(scheduler.batch_iterator())
    assert scheduler.update_with_loss(math.nan).rolled_back
    for name, value in original.items():
        assert torch.equal(restored[0][name], value)
    model.load_state_dict(restored[0])


@pytest.mark.parametrize("calls", [1, 3])
def test_it_raised_stop_iteration_inside_a_generator_and_we_return(calls):
    scheduler = R8Scheduler(8, 4, num_epochs=1, use_curses=False, checkpoint_dir=None)

    def pairs():
        """A user's own generator around ours: PEP 479 turns a StopIteration in here into a RuntimeError."""
        epochs = scheduler.epoch_iterator()
        while True:
            epoch = next(epochs, None)
            if epoch is None:
                return
            batches = scheduler.batch_iterator()
            while (batch := next(batches, None)) is not None:
                yield epoch, batch
                scheduler.update_with_loss(1.0)

    assert [(epoch, batch.step) for epoch, batch in pairs()] == [(0, 0), (0, 1)]
    for _ in range(calls):
        assert list(pairs()) == []
        assert list(scheduler.epoch_iterator()) == []
        assert list(scheduler.batch_iterator()) == []


def test_a_spent_time_budget_ends_both_loops_by_returning():
    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

        wall = monotonic

        def sleep(self, seconds):
            self.now += seconds

    clock = Clock()
    scheduler = R8Scheduler(100, 4, train_duration_seconds=5, use_curses=False, checkpoint_dir=None, clock=clock)
    epochs = scheduler.epoch_iterator()
    assert next(epochs) == 0
    batches = scheduler.batch_iterator()
    steps = 0
    while next(batches, None) is not None:
        clock.now += 1
        scheduler.update_with_loss(1.0)
        steps += 1
    assert steps == 5
    assert next(batches, "spent") == next(epochs, "spent") == "spent"


def test_its_usage_counts_and_estimates_are_arrays_here():
    scheduler = R8Scheduler(8, 4, num_epochs=2, use_curses=False, checkpoint_dir=None)
    for _ in scheduler.epoch_iterator():
        for indices, _ in scheduler.batch_iterator():
            scheduler.update_with_loss(float(np.mean(indices)))
    assert scheduler.catalog.uses.tolist() == [2] * 8
    assert scheduler.catalog.expected_loss.shape == (8,)


def test_close_may_be_called_any_number_of_times_even_unused():
    scheduler = R8Scheduler(8, 4, num_epochs=2, use_curses=True, checkpoint_dir=None)
    for _ in range(3):
        scheduler.close()
    with R8Scheduler(8, 4, num_epochs=2, use_curses=False, checkpoint_dir=None) as scheduler:
        scheduler.close()
