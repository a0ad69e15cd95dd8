"""A step that is broken off on two ranks of `torch.distributed`: by a rank's death, by an error on one or on both."""

import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEP = 33


def rank(number, folder, how, resumes, backups):
    import torch
    import torch.distributed as dist

    from learnit_r8 import R8Scheduler
    from learnit_r8.integrations.distributed import rank_arguments
    from learnit_r8.integrations.torch import capture_state, follow_lr, restore_state

    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting-{how}-{resumes}"
    dist.init_process_group("gloo", init_method=meeting, rank=number, world_size=2, timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    x = torch.randn(960, 16)
    y = (x.sum(1) > 0).long()
    net = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 2))
    model = torch.nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    def load(source):
        state = torch.load(source, weights_only=True) if isinstance(source, str) else source
        restore_state(state, net, optimizer, rngs=False)

    def save(path):
        torch.save(capture_state(net, optimizer), path)

    options = {"save_callback": save, "load_callback": load, "ui": "off", **rank_arguments()}
    if backups:
        options["state_callback"] = lambda: capture_state(net, optimizer)
    if resumes:
        scheduler = R8Scheduler.resume_from_checkpoint(folder / how, **options)
    else:
        options |= {"backup_every": 1} if backups else {}
        scheduler = R8Scheduler(
            960, 48, num_epochs=3, checkpoint_dir=folder / how, checkpoint_every=20, strategy="uniform", **options
        )
    follow_lr(scheduler, optimizer)
    with scheduler:
        for _ in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                ids = torch.from_numpy(batch.indices)
                losses = torch.nn.functional.cross_entropy(model(x[ids]), y[ids], reduction="none")
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
                if batch.step == STEP and not resumes:
                    if how == "dies" and number == 1:
                        os.kill(os.getpid(), signal.SIGKILL)
                    if how == "both throw" or (how == "one throws" and number == 1):
                        raise ValueError("a bad row")
                scheduler.update_with_loss(losses)
    if number == 0:
        torch.save(net.state_dict(), folder / f"{how}.pt")
    os._exit(0)  # the other one may be a moment behind


def launch(folder, how, resumes=False, backups=False):
    """Run both ranks to their end; return what rank 0 has said."""
    command = [sys.executable, "-m", "tests.checkpoint.test_two_ranks"]
    both = [
        subprocess.Popen(
            [*command, str(number), str(folder), how, str(int(resumes)), str(int(backups))],
            cwd=ROOT, stderr=subprocess.PIPE, text=True,
        )
        for number in (0, 1)
    ]  # fmt: skip
    said, _ = (one.communicate(timeout=100)[1] for one in both)
    return said


@pytest.mark.slow
@pytest.mark.parametrize("backups", [False, True])
@pytest.mark.parametrize("how", ["dies", "one throws", "both throw"])
def test_the_last_whole_boundary_is_saved_or_it_is_said_why_not(how, backups, tmp_path):
    torch = pytest.importorskip("torch")
    said = launch(tmp_path, how, backups=backups)
    if backups:
        assert f"thrown out of step {STEP}, the model was put back as it was before" in said
    else:
        assert f"thrown out of step {STEP}: the model may be trained halfway and is not saved" in said
        assert "saved last after 20 steps" in said
    launch(tmp_path, how, resumes=True, backups=backups)
    launch(tmp_path, "undisturbed", backups=backups)
    ends = [torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in (how, "undisturbed")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


if __name__ == "__main__":
    rank(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], *(bool(int(flag)) for flag in sys.argv[4:]))
