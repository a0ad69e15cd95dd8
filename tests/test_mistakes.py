"""A stranger's mistakes: each is a program that ends in one sentence which says what to do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LOOP = """
for epoch in scheduler.epoch_iterator():
    for batch in scheduler.batch_iterator():
        {body}
"""
REPORT = LOOP.format(body="scheduler.update_with_loss([1.0] * len(batch.indices))")
FIRST_RUN = (
    "with R8Scheduler(100, 10, num_epochs=1, ui='off', checkpoint_every='epoch') as scheduler:\n"
    + REPORT.replace("\n", "\n    ")
)


def program(arguments: str = "100, 10, num_epochs=2", body: str = "", loop: str = "") -> str:
    return f"scheduler = R8Scheduler({arguments})" + (loop or LOOP.format(body=body))


# Name: program, where its sentence is ("error": the last line of stderr, "shown": a line of stdout), the sentence.
MISTAKES = {
    "no loss reported": (
        program(body="pass"),
        "error",
        "the loss of step 0 (epoch 0, batch id 0) has not been reported: call update_with_loss(loss) before asking for "
        "the next batch",
    ),
    "no loss reported, nor a batch asked for": (
        program(loop="\nfor epoch in scheduler.epoch_iterator(): scheduler.update_with_loss(1.0)"),
        "error",
        "no batch is open: call update_with_loss once for each batch of batch_iterator(), inside its loop",
    ),
    "the training step returns no loss": (
        program(body="scheduler.update_with_loss(None)"),
        "error",
        "got None: does the training step return its loss?",
    ),
    "loss of the wrong batch": (
        program(
            "100, 10, num_epochs=2, lookahead=2",
            "first = first if batch.step else batch; scheduler.update_with_loss(1.0, first)",
        ).replace("scheduler =", "first = None; scheduler =", 1),
        "error",
        "batch id 0 (step 0) is not open (open ids: [1]): report each batch once, inside the loop that handed it out",
    ),
    "losses of a batch of another size": (
        program("25, 10, num_epochs=2", "scheduler.update_with_loss([1.0] * 10)"),
        "error",
        "the batch has 5 samples, but 10 losses came: report one loss per sample in the batch's order",
    ),
    "loss of another scheduler's batch": (
        "other = R8Scheduler(100, 10, num_epochs=2, seed=1)\n"
        + program(body="scheduler.update_with_loss(1.0, next(other.batch_iterator()))"),
        "error",
        "is not open: it is another scheduler's, report it to that one",
    ),
    "a tensor of the wrong shape on the graph": (
        "import torch\n" + program(body="scheduler.update_with_loss(torch.ones(10, 3, requires_grad=True) * 2)"),
        "error",
        "average each sample's losses first, for instance loss.mean(dim=1)",
    ),
    "a log of many numbers on the graph": (
        "import torch\n" + program(body="scheduler.log(loss=torch.ones(10, requires_grad=True) * 2)"),
        "error",
        "log(loss=...) takes one number, such as its mean, got Tensor of shape (10,)",
    ),
    "forgot close": (
        program(body="scheduler.update_with_loss(1.0); break") + "    break",
        "shown",
        "not closed: write `with R8Scheduler(...) as scheduler:`, or call scheduler.close() after the loops",
    ),
    "two schedulers of the learning rate": (
        "import torch\n"
        "from learnit_r8.integrations.torch import follow_lr\n"
        "optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)\n"
        "decay = torch.optim.lr_scheduler.StepLR(optimizer, 1)\n"
        + program(
            body="follow = follow or follow_lr(scheduler, optimizer); optimizer.step(); decay.step(); "
            "scheduler.update_with_loss(1.0)"
        ).replace("scheduler =", "follow = None; scheduler =", 1),
        "error",
        "R8Scheduler had set [0.005] and sets its own at every step: remove the other learning-rate scheduler",
    ),
    "two schedulers with one checkpoint directory": (
        "one = R8Scheduler(100, 10, num_epochs=2)\n"
        "one.save_checkpoint()\n"
        + program(
            "100, 10, num_epochs=1, checkpoint_every=5",
            "scheduler.update_with_loss(1.0); one.save_checkpoint()",
        ),
        "shown",
        "/checkpoints too; to resume from the directory means the one that saved last: give each a checkpoint_dir",
    ),
    "a checkpoint directory with a typo": (
        FIRST_RUN + "\nR8Scheduler.resume_from_checkpoint('chekpoints')",
        "error",
        "no checkpoint in chekpoints: chekpoints does not exist; give the checkpoint_dir of the run, or one of the "
        "step-... folders in it",
    ),
    "a directory without checkpoints": (
        FIRST_RUN + "\nR8Scheduler.resume_from_checkpoint('.')",
        "error",
        "no checkpoint in .: . contains checkpoints, train.py; give the checkpoint_dir of the run",
    ),
    "a data set that changed its size": (
        FIRST_RUN + "\nR8Scheduler.resume_from_checkpoint('checkpoints', num_samples=80)",
        "error",
        "num_samples: the state was saved with 100, this run has 80: use what it was saved with, or start a new run",
    ),
    "a loader's data set that changed its size": (
        FIRST_RUN + "\nfrom learnit_r8.integrations.torch import R8BatchSampler\n"
        "from torch.utils.data import DataLoader\n"
        "scheduler = R8Scheduler.resume_from_checkpoint('checkpoints', num_epochs=2)\n"
        "for epoch in scheduler.epoch_iterator():\n"
        "    for _ in DataLoader(range(120), batch_sampler=R8BatchSampler(scheduler)): pass",
        "error",
        "the loader's data set has 120 samples, R8Scheduler has num_samples=100: create it with num_samples=len(data), "
        "and resume with the data set that the run was saved with",
    ),
    "a batch larger than the data": (
        program("10, 100, num_epochs=2", "scheduler.update_with_loss(1.0)"),
        "shown",
        "batch_size=100 is larger than num_samples=10, so every batch is the whole data set: give a smaller batch_size",
    ),
    "a batch larger than the data, without the last one": (
        program("10, 100, num_epochs=2, drop_last=True", "pass"),
        "error",
        "drop_last=True with batch_size=100 > num_samples=10 leaves no batch: lower batch_size",
    ),
    **{
        f"a {name} without arguments": (
            program(f"100, 10, num_epochs=1, {name}=lambda: None", "pass"),
            "error",
            f"{name} must take {arguments}, got <function <lambda>",
        )
        for name, arguments in (
            ("save_callback", "(state_dict, filepath) or (filepath)"),
            ("load_callback", "(source) or (source, from_ram)"),
        )
    },
    "a state_callback that forgets to return": (
        program("100, 10, num_epochs=1, state_callback=lambda: None, load_callback=print", "pass"),
        "error",
        "a backup needs the model's state, got None: does state_callback return it?",
    ),
    "a state_callback without a load_callback": (
        program("100, 10, num_epochs=1, ui='log', state_callback=dict", loop=REPORT),
        "shown",
        "there is no load_callback to restore what state_callback returns: no backups are made in RAM",
    ),
    "a loop over batches without one over epochs": (
        "with R8Scheduler(100, 10, num_epochs=3, ui='log') as scheduler:\n"
        "    for batch in scheduler.batch_iterator(): scheduler.update_with_loss(1.0)",
        "shown",
        "the run ends after epoch 0, with budget left: loop over the epochs, `for epoch in scheduler.epoch_iterator()`",
    ),
    "a batch sampler that is given as a sampler": (
        "import torch\nfrom learnit_r8.integrations.torch import R8BatchSampler\n"
        "scheduler = R8Scheduler(100, 10, num_epochs=1)\n"
        "loader = torch.utils.data.DataLoader(torch.arange(100), sampler=R8BatchSampler(scheduler))\n"
        "for epoch in scheduler.epoch_iterator():\n    for batch in loader: pass",
        "error",
        "given for single samples: DataLoader(data, batch_sampler=R8BatchSampler(scheduler)), not sampler=, and no ",
    ),
    "a resume from a file": (
        "open('best.pt', 'w').close()\nR8Scheduler.resume_from_checkpoint('best.pt')",
        "error",
        "best.pt is a file, and there is no checkpoint in",
    ),
    "checkpoints without a save_callback": (
        program("100, 10, num_epochs=1, checkpoint_every='epoch'", loop=REPORT),
        "shown",
        "there is no save_callback: the checkpoints hold the run's state, not the model",
    ),
    "a save_callback that writes nothing": (
        program("100, 10, num_epochs=2, checkpoint_every='epoch', save_callback=lambda path: None", loop=REPORT),
        "shown",
        "save_callback wrote nothing to the path that it got: the checkpoint holds no model",
    ),
    "a model that is not loaded": (
        FIRST_RUN.replace("ui='off'", "ui='off', save_callback=lambda path: open(path, 'w').close()")
        + "\nscheduler = R8Scheduler.resume_from_checkpoint('checkpoints', ui='log', num_epochs=2)"
        + REPORT,
        "shown",
        "checkpoints/step-000000010 was not loaded",
    ),
    "a resume in another folder": (
        FIRST_RUN + "\nimport os\nos.mkdir('other'); os.chdir('other')\n"
        "scheduler = R8Scheduler.resume_from_checkpoint('../checkpoints', ui='log', num_epochs=2)" + REPORT,
        "shown",
        "/checkpoints, where this one lies, not to checkpoints: give checkpoint_dir to change that",
    ),
    "a resume of a finished run": (
        FIRST_RUN + "\nscheduler = R8Scheduler.resume_from_checkpoint('checkpoints', ui='log')" + REPORT,
        "shown",
        "nothing is left to train: the run has spent its num_epochs=1; give a larger number to go on",
    ),
    "a resume of a run whose time is spent": (
        FIRST_RUN.replace("num_epochs=1", "train_duration_seconds=0.2")
        + "scheduler.save_checkpoint()\nscheduler = R8Scheduler.resume_from_checkpoint('checkpoints', ui='log')"
        + REPORT,
        "shown",
        "nothing is left to train: the run has spent its train_duration_seconds=0.2; give a larger",
    ),
    "a finished loop that is run again, as a notebook's cell": (
        program("100, 10, num_epochs=1, ui='log'", loop=REPORT) + REPORT + "\nraise SystemExit(1)",
        "error",
        "[r8] nothing is left to train: the run has spent its num_epochs=1; give a larger number to go on",
    ),
    "a schedule of one's own that is not given again": (
        FIRST_RUN.replace("ui=", "scheduler_mode=lambda progress: 1 - progress, ui=")
        + "\nR8Scheduler.resume_from_checkpoint('checkpoints', num_epochs=2)",
        "error",
        "scheduler_mode: the run had one of your own (custom), which no checkpoint holds: give it again",
    ),
    "a checkpoint directory that is a file": (
        "open('checkpoints', 'w').close()\n" + program("100, 10, num_epochs=1, checkpoint_every=5", "pass"),
        "error",
        "checkpoint_dir must be a folder, got 'checkpoints', which is a file",
    ),
    "a log directory that is a file": (
        "open('run', 'w').close()\n" + program("100, 10, num_epochs=1, log_dir='run'", "pass"),
        "error",
        "log_dir must be a folder, got 'run', which is a file",
    ),
    "a state_callback with an argument": (
        program("100, 10, num_epochs=1, state_callback=lambda model: None", "pass"),
        "error",
        "state_callback must take no arguments and return the model's state, got <function <lambda>",
    ),
}


def run(code: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a program as its author would, in a folder of its own, with a pipe for a terminal."""
    (folder / "train.py").write_text(f"from learnit_r8 import R8Scheduler\n{code}\n")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("R8_", "PYTHON", "PYTEST"))
    }
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *options, "train.py"]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_a_sentence_that_says_what_to_do(name, tmp_path):
    code, where, sentence = MISTAKES[name]
    if "torch" in code:
        pytest.importorskip("torch")
    done = run(code, tmp_path, "-W", "error")
    if where == "error":
        assert done.returncode == 1, done.stdout
        assert sentence in done.stderr.splitlines()[-1]
    else:
        assert done.returncode == 0, done.stderr
        assert [line for line in done.stdout.splitlines() if sentence in line], done.stdout
        assert done.stderr == ""


def test_losses_on_the_graph_are_no_mistake_in_any_form(tmp_path):
    pytest.importorskip("torch")
    forms = "losses, list(losses), losses.mean(), losses.double(), losses.bfloat16()"
    code = (
        "import gc, torch, weakref\n"
        "weight = torch.ones(10, requires_grad=True)\n"
        "graphs = []\n"
        + program(
            body="losses = weight * 2; graphs.append(weakref.ref(losses)); "
            f"scheduler.update_with_loss(({forms})[batch.step % 5]); scheduler.log(loss=losses.mean()); del losses"
        )
        + "scheduler.close(); gc.collect()\n"
        "assert len(graphs) == 20\n"
        "assert not any(graph() is not None for graph in graphs), 'a graph is still alive'\n"
    )
    done = run(code, tmp_path, "-W", "error")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_finished_run_needs_no_close_and_its_sinks_get_one(tmp_path):
    sink = (
        "class Slow:\n"
        "    def __init__(self): self.count = 0\n"
        "    def record(self, event): self.count += 1\n"
        "    def close(self): print('written', self.count, flush=True)\n"
    )
    done = run(
        sink + program("100, 10, num_epochs=2, sinks=[Slow()], log_dir='run'", loop=REPORT), tmp_path, "-W", "error"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "written" in done.stdout
    assert "not closed" not in done.stdout
    assert '"event":"RunEnded"' in (tmp_path / "run" / "events.jsonl").read_text().splitlines()[-1]


def test_a_directory_that_cannot_be_made_is_told_before_the_first_step(tmp_path):
    arguments = "100, 10, num_epochs=1, ui='off', checkpoint_dir='file/run', checkpoint_every='epoch'"
    body = "print('step', file=sys.stderr); scheduler.update_with_loss(1.0)"
    done = run("import sys\nopen('file', 'w').close()\n" + program(arguments, body), tmp_path)
    told, step = done.stderr.splitlines()[:2]
    assert done.returncode == 0
    assert told == f"[r8] no checkpoint can be saved: {tmp_path}/file is no folder; give another checkpoint_dir"
    assert step == "step"


INTERRUPT = "os.kill(os.getpid(), signal.{name}) if batch.step == 13 else None; scheduler.update_with_loss(1.0)"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            "save_callback=lambda path: open(path, 'w').close()",
            "saved in {path}: go on with R8Scheduler.resume_from_checkpoint('{path}', ...)",
        ),
        ("", "saved in {path} (without the model: give save_callback for that): go on with R8Scheduler"),
        ("checkpoint_dir=None", "not saved: give R8Scheduler a checkpoint_dir to be able to go on"),
    ],
    ids=["with a model", "without a model", "without a directory"],
)
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_in_a_sentence_that_says_how_to_go_on(name, arguments, sentence, tmp_path):
    code = "import os, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += program(f"100, 10, num_epochs=2, {arguments}", INTERRUPT.format(name=name))
    done = run(code, tmp_path, "-W", "error")
    assert done.returncode == -getattr(signal, name)
    last = done.stderr.splitlines()[-1]
    path = tmp_path.resolve() / "checkpoints" / "step-000000014"
    assert "stopped after 14 steps" in last
    assert sentence.format(path=path) in last
    assert path.is_dir() == ("saved in" in sentence)
    told = "stopping after this step" if "None" in arguments else "saving a checkpoint after this step"
    assert f"[r8] {name}: {told}; again to stop at once" in done.stderr
    if path.is_dir():
        resumed = (
            f"scheduler = R8Scheduler.resume_from_checkpoint({str(path)!r}){REPORT}assert scheduler.global_step == 20"
        )
        done = run(resumed, tmp_path)
        assert done.returncode == 0, done.stderr
