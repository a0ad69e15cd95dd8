"""Signals to the whole process group at random moments, loaders with two workers, one rank and two: is anything lost?

    python -m benchmarks.group_signals [TRIALS] [--seed SEED]

Each trial trains a small network (dropout and momentum, so that every random state counts), sends TERM, INT, USR1 or
HUP to all of its processes at a random moment, resumes, and compares the final weights with an undisturbed run's, to
the bit. Half of them run in `with scheduler:`, half have no `close()` at all. "Unsaved": steps that had been reported
before the signal, and are not in the checkpoint (the step that was under way may be in it or not).
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path

from learnit_r8 import R8Scheduler, scheduler

SIGNALS = ("TERM", "INT", "USR1", "HUP")


def worker(folder: Path, rank: int, ranks: int, closed: bool) -> None:
    import torch
    from torch.nn import functional
    from torch.utils.data import DataLoader, TensorDataset

    from learnit_r8.integrations.torch import R8BatchSampler, capture_state, follow_lr, restore_state

    torch.set_num_threads(1)
    options = {}
    if ranks > 1:
        import torch.distributed as dist

        from learnit_r8.integrations.distributed import rank_arguments

        port = (folder / "port").read_text()
        dist.init_process_group("gloo", init_method=f"file://{port}", rank=rank, world_size=ranks)
        options = rank_arguments()
    torch.manual_seed(0)
    x = torch.randn(960, 8)
    y = (x.sum(1) > 0).long()
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 2))
    model = torch.nn.parallel.DistributedDataParallel(net) if ranks > 1 else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    def save(path: str) -> None:
        torch.save(capture_state(net, optimizer), path)

    def load(source: str) -> None:
        restore_state(torch.load(source, weights_only=True), net, optimizer)

    options |= {"save_callback": save, "load_callback": load, "ui": "off"}
    try:
        run = R8Scheduler.resume_from_checkpoint(folder / "run", **options)
    except FileNotFoundError:
        run = R8Scheduler(960, 24, num_epochs=2, checkpoint_dir=folder / "run", strategy="uniform", **options)
    follow_lr(run, optimizer)
    loader = DataLoader(TensorDataset(x, y), batch_sampler=R8BatchSampler(run), num_workers=2)

    def train() -> None:
        for _ in run.epoch_iterator():
            for inputs, labels in loader:
                if ranks > 1:  # ranks draw dropout of their own; here all draw the same, which rank 0's state restores
                    torch.manual_seed(run.global_step)
                losses = functional.cross_entropy(model(inputs), labels, reduction="none")
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
                time.sleep(0.004)  # the gap in which a torn state would be saved
                run.update_with_loss(losses)
                with (folder / f"steps{rank}").open("a") as file:
                    file.write(f"{run.global_step}\n")

    if closed:
        with run:
            train()
    else:
        train()
    if rank == 0:
        torch.save(net.state_dict(), folder / "end.pt")


class Rank:
    """A forked process of the group; what this program has imported need not be imported again."""

    def __init__(self, folder: Path, rank: int, ranks: int, closed: bool, group: int) -> None:
        self.pid = os.fork()
        if self.pid:
            with suppress(OSError):  # the child does the same: whoever comes first
                os.setpgid(self.pid, group or self.pid)
            return
        code = 1
        try:
            with suppress(OSError):
                os.setpgid(0, group)
            os.dup2(os.open(folder / f"err{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            for name in SIGNALS:
                default = signal.default_int_handler if name == "INT" else signal.SIG_DFL
                signal.signal(getattr(signal, f"SIG{name}"), default)
            worker(folder, rank, ranks, closed)
            code = 0
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            traceback.print_exc()
        finally:
            if not closed and code != 130:
                scheduler._close_forgotten()  # what the end of an ordinary program does, and no more: this is a fork
            os._exit(code)

    def poll(self) -> int | None:
        found, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if found else None

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def launch(folder: Path, ranks: int, closed: bool) -> list[Rank]:
    (folder / "port").write_text(str(folder / f"rendezvous-{random.random()}"))
    processes: list[Rank] = []
    for rank in range(ranks):
        processes.append(Rank(folder, rank, ranks, closed, processes[0].pid if processes else 0))
    return processes


def reported(folder: Path) -> int:
    path = folder / "steps0"
    return int((path.read_text().split() or ["0"])[-1]) if path.exists() else 0


def saved(folder: Path) -> int:
    return max((int(path.name[5:14]) for path in (folder / "run").glob("step-*")), default=0)


def trial(number: int, ranks: int, closed: bool, whole: object) -> str:
    """Return "equal", or what went wrong."""
    import torch

    name = SIGNALS[number % len(SIGNALS)]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        processes = launch(folder, ranks, closed)
        while reported(folder) == 0:
            time.sleep(0.002)
        time.sleep(random.random() * 0.6)
        before = reported(folder)
        with suppress(ProcessLookupError):  # it has finished meanwhile
            os.killpg(processes[0].pid, getattr(signal, f"SIG{name}"))
        for process in processes:
            process.wait()
        if not (folder / "end.pt").exists():
            if saved(folder) < before:
                return f"unsaved ({name}, ranks {ranks}, closed {closed}: {before} reported, {saved(folder)} saved)"
            codes = [process.wait() for process in launch(folder, ranks, closed)]
            if any(codes):
                return f"resume failed: {(folder / 'err0').read_text()[-600:]}"
        end = torch.load(folder / "end.pt", weights_only=True)
        same = all(torch.equal(end[key], whole[key]) for key in whole)
        return "equal" if same else f"torn ({name}, ranks {ranks}, closed {closed})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trials", type=int, nargs="?", default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    import torch
    import torch.distributed

    import learnit_r8.integrations.torch  # noqa: F401

    torch.set_num_threads(1)
    random.seed(arguments.seed)
    counts: Counter[str] = Counter()
    wholes = {}
    for ranks in (1, 2):
        with tempfile.TemporaryDirectory() as place:
            for process in launch(Path(place), ranks, True):
                assert process.wait() == 0, (Path(place) / "err0").read_text()
            wholes[ranks] = torch.load(Path(place) / "end.pt", weights_only=True)
    for number in range(arguments.trials):
        ranks, closed = (1, 2)[number // 4 % 2], bool(number // 8 % 2)
        outcome = trial(number, ranks, closed, wholes[ranks])
        counts[outcome.split(" (")[0]] += 1
        if outcome != "equal" or number % 8 == 7:
            print(number + 1, outcome, dict(counts), flush=True)
    print(f"{arguments.trials} signals:", dict(counts))


if __name__ == "__main__":
    main()
