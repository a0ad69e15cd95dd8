"""What a run was made with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from learnit_r8 import R8Scheduler, events
from learnit_r8.core import provenance
from learnit_r8.core.provenance import Repository


def git(folder, *words):
    line = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@x", *words]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "code.py").write_text("1")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder


@pytest.mark.parametrize("state", ["clean", "changed", "untracked", "packed", "detached", "worktree", "below"])
def test_the_commit_and_whether_files_differ_are_those_of_git(repository, state):
    folder = repository
    if state == "changed":
        (folder / "code.py").write_text("2")
    elif state == "untracked":
        (folder / "more.py").write_text("2")
    elif state == "packed":
        git(folder, "pack-refs", "--all")
    elif state == "detached":
        git(folder, "checkout", "-q", "--detach")
    elif state == "worktree":
        git(folder, "worktree", "add", "-q", str(folder.parent / "tree"))
        folder = folder.parent / "tree"
    elif state == "below":
        folder = folder / "deep" / "er"
        folder.mkdir(parents=True)
    found = Repository(folder)
    assert found.asked(30.0)
    assert found.commit == git(folder, "rev-parse", "HEAD")
    assert found.dirty is (state == "changed")


@pytest.mark.parametrize("state", ["no repository", "no commit", "damaged", "no git"])
def test_what_git_does_not_say_is_left_open(repository, state, tmp_path, monkeypatch):
    folder = repository
    if state == "no repository":
        folder = tmp_path
    elif state == "no commit":
        folder = tmp_path / "empty"
        folder.mkdir()
        git(folder, "init", "-q")
    elif state == "damaged":
        (folder / ".git" / "HEAD").unlink()
    else:
        monkeypatch.setenv("PATH", "")
    found = Repository(folder)
    assert found.asked(30.0)
    assert (found.commit != "") == (state == "no git")
    assert found.dirty is (False if state == "no commit" else None)


def test_secrets_on_the_command_line_are_left_out(monkeypatch):
    line = ["python", "train.py", "--hub-token", "abc", "--api-key=def", "--lr", "0.1", "WANDB_API_KEY=ghi", "--seed=3"]
    monkeypatch.setattr(sys, "orig_argv", line)
    assert provenance.command() == "python train.py --hub-token ... --api-key=... --lr 0.1 WANDB_API_KEY=... --seed=3"


def test_packages_and_seeds_are_those_that_are_loaded(monkeypatch):
    import numpy

    monkeypatch.setenv("PYTHONHASHSEED", "5")
    assert provenance.packages()["numpy"] == numpy.__version__
    assert "sys" not in provenance.packages()
    assert {"learnit_r8": 7, "PYTHONHASHSEED": 5}.items() <= provenance.seeds(7).items()


def test_the_event_log_tells_it_from_the_start_and_once_git_has_said_it(repository, tmp_path):
    program = """
import sys
from learnit_r8 import R8Scheduler
scheduler = R8Scheduler(4, 2, num_epochs=1, ui="off", log_dir=sys.argv[1], checkpoint_dir=None, seed=9)
for _ in scheduler.epoch_iterator():
    for _ in scheduler.batch_iterator():
        scheduler.update_with_loss(1.0)
"""
    (repository / "code.py").write_text(program)
    subprocess.run([sys.executable, "code.py", tmp_path / "log"], cwd=repository, check=True)
    from learnit_r8.run.events_file import read_events

    heard = [event for event in read_events(tmp_path / "log" / "events.jsonl") if isinstance(event, events.MadeWith)]
    assert [event.commit for event in heard] == [git(repository, "rev-parse", "HEAD")] * 2
    assert heard[0].dirty is not False
    assert heard[1].dirty is True
    assert heard[0].command.endswith(f"code.py {tmp_path / 'log'}")
    assert heard[0].seeds["learnit_r8"] == 9
    assert heard[0].host == os.uname().nodename
    assert {"numpy", "learnit_r8"} <= heard[0].packages.keys()


def test_the_report_says_it(tmp_path):
    bokeh = pytest.importorskip("bokeh")
    from learnit_r8.report.page import page
    from learnit_r8.report.run_data import load_run

    scheduler = R8Scheduler(4, 2, num_epochs=1, ui="off", log_dir=tmp_path, checkpoint_dir=None)
    with scheduler:
        for _ in scheduler.epoch_iterator():
            for _ in scheduler.batch_iterator():
                scheduler.update_with_loss(1.0)
            scheduler.log(val_loss=0.5)
    html = page([load_run(Path(tmp_path))])
    assert "Made with" in html
    assert f"bokeh {bokeh.__version__}" in html
    assert "evaluation" in html
