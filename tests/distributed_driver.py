"""One rank of a training, run by test_integration_distributed.py: distributed_driver.py FOLDER RANK WORLD SCENARIO...

The model is a logistic regression whose update is computed from all ranks' gathered gradients,
sample by sample in the order of their ids, so that its weights are equal to the bit on any number of ranks.
"""

from __future__ import annotations

import collections
import json
import os
import signal
import sys
import warnings
from pathlib import Path

import numpy as np

SAMPLES, BATCH, EPOCHS, FEATURES = 800, 8, 10, 4


def one_rank() -> dict:
    """Return the arguments of a single process; time stands still: backups are paced by it, and ranks take them all."""
    from learnit_r8.testing import FakeClock

    return {"rank": 0, "world_size": 1, "all_gather": None, "clock": FakeClock()}


class Training:
    """A run of one rank: what it saw and where it ended."""

    def __init__(self, folder: Path, ranks: dict, *, resume: bool = False, own: bool = True, **options) -> None:
        from learnit_r8 import R8Scheduler

        rng = np.random.default_rng(0)
        self.x = rng.normal(size=(SAMPLES, FEATURES))
        self.y = np.sign(self.x @ rng.normal(size=FEATURES) + 0.5 * rng.normal(size=SAMPLES))
        self.weights = np.zeros(FEATURES)
        self.ranks = ranks
        self.seen: list[list[int]] = []
        self.rolled_back: list[int] = []
        callbacks = {"save_callback": self.save, "load_callback": self.load}
        if resume:
            self.scheduler = R8Scheduler.resume_from_checkpoint(
                folder, **callbacks, state_callback=self.state, **ranks, ui="off"
            )
            return
        options = {"num_epochs": EPOCHS, "initial_lr": 0.5, "backup_every": 20, "ui": "off"} | ranks | options
        callbacks |= {"state_callback": self.state}
        self.scheduler = R8Scheduler(SAMPLES, BATCH, checkpoint_dir=folder, **(callbacks if own else {}), **options)

    def state(self):
        return {"weights": self.weights}

    def save(self, state, path) -> None:
        np.save(path + ".npy", self.weights)

    def load(self, source) -> None:
        self.weights = np.load(source + ".npy") if isinstance(source, str) else source["weights"]

    def step(self, ids: np.ndarray, lr: float, poison: bool) -> np.ndarray:
        margins = self.y[ids] * (self.x[ids] * self.weights).sum(axis=1)
        rows = -(self.y[ids] / (1 + np.exp(margins)))[:, None] * self.x[ids]
        if poison:
            rows = rows * np.nan
        gather = self.ranks["all_gather"] or (lambda array: array)
        rows = gather(rows.ravel()).reshape(-1, FEATURES)[np.argsort(gather(ids))]
        self.weights = self.weights - lr * rows.mean(axis=0)
        return np.log1p(np.exp(-margins)) * (np.nan if poison else 1)

    def go(
        self, *, stop_at: int = -1, nan_at: int = -1, kill_at: int = -1, interrupt_at: int = -1, poisons=None
    ) -> None:
        poisons = poisons or (lambda step: step == nan_at)
        scheduler = self.scheduler
        for _ in scheduler.epoch_iterator():
            for ids, lr in scheduler.batch_iterator():
                step = scheduler.global_step
                if step == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                if step == interrupt_at:
                    os.kill(os.getpid(), signal.SIGINT)
                self.seen.append(ids.tolist())
                if scheduler.update_with_loss(self.step(ids, lr, poisons(step))).rolled_back:
                    self.rolled_back.append(step)
                if scheduler.global_step == stop_at:
                    scheduler.save_checkpoint()
                    return

    def report(self) -> dict:
        return {
            "seen": self.seen,
            "weights": self.weights.tobytes().hex(),
            "hash": self.scheduler._ranks._hash,
            "rolled_back": self.rolled_back,
            "steps": self.scheduler.global_step,
        }


class OwnMind:
    """A strategy that would choose differently in every process."""

    catalogs = False

    def __init__(self) -> None:
        self.rng = np.random.default_rng([os.getpid()])
        self.decisions = [("own mind", f"process {os.getpid()}", float(os.getpid()))]

    def pop_decisions(self):
        decisions, self.decisions = self.decisions, []
        return decisions

    def draw(self, request):
        from learnit_r8.strategies import Draw

        ids = self.rng.choice(SAMPLES, request.size, replace=False)
        return Draw(ids, probabilities=np.full(len(ids), 2 / SAMPLES))


class Heard:
    """A sink that keeps what the strategy decided."""

    def __init__(self) -> None:
        self.decisions: list[list] = []

    def record(self, event) -> None:
        from learnit_r8.events import StrategyDecided

        if isinstance(event, StrategyDecided):
            self.decisions.append([event.decision, event.reason, event.figure])


class Stopper:
    """A sink whose user asks for a stop after some steps."""

    def __init__(self) -> None:
        self.commands: collections.deque = collections.deque()

    def record(self, event) -> None:
        from learnit_r8.types import Command

        if type(event).__name__ == "LossReported" and event.step == 30:
            self.commands.append(Command.STOP_AFTER_STEP)


def ragged(folder: Path, ranks: dict) -> dict:
    """Arrays of other lengths at each call, past the first buffer's end and back."""
    from learnit_r8.integrations.distributed import make_all_gather

    gather, got = make_all_gather(), []
    for size in (3, 5000, 0, 7):
        mine = np.arange(size + ranks["rank"], dtype=np.float32) + ranks["rank"]
        everyone = np.concatenate([np.arange(size + r, dtype=np.float32) + r for r in range(ranks["world_size"])])
        result = gather(mine)
        got.append(bool(result.dtype == np.float32 and np.array_equal(result, everyone)))
    return {"equal": got}


def plain(folder: Path, ranks: dict) -> dict:
    training = Training(folder / "plain", ranks)
    training.go(nan_at=333 if ranks["rank"] == ranks["world_size"] - 1 else -1)
    return training.report()


def faults(folder: Path, ranks: dict) -> dict:
    """NaN at random steps, each time on another rank."""
    from tests.backup_watch import BackupWatch, random_steps

    training: Training

    def make(**options):
        nonlocal training
        training = Training(folder / "faults", ranks, num_epochs=3, own=False, **options)
        return training.scheduler

    watch = BackupWatch(random_steps(5), make)
    watch.scheduler.attach_model(training.state, training.load)
    training.go(poisons=lambda step: np.isnan(watch.factor()) and step % ranks["world_size"] == ranks["rank"])
    return training.report() | {"findings": watch.findings()}


def half(folder: Path, ranks: dict) -> dict:
    training = Training(folder / "half", ranks)
    training.go(stop_at=430)
    return training.report()


def resumed(folder: Path, ranks: dict) -> dict:
    training = Training(folder / "half", ranks, resume=True)
    training.go()
    return training.report()


def killed(folder: Path, ranks: dict) -> dict:
    training = Training(folder / "killed", ranks, checkpoint_every=25)
    training.go(kill_at=257 if ranks["rank"] == 1 else -1)
    return training.report()


def restarted(folder: Path, ranks: dict) -> dict:
    training = Training(folder / "killed", ranks, resume=True)
    first = training.scheduler.global_step
    training.go()
    return training.report() | {"first": first}


def mismatch(folder: Path, ranks: dict) -> dict:
    training = Training(folder / "mismatch", ranks, seed=ranks["rank"])
    try:
        training.go()
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": ""}


def rank0(folder: Path, ranks: dict) -> dict:
    from learnit_r8.integrations.distributed import FromRank0

    heard = Heard()
    training = Training(folder / "rank0", ranks, num_epochs=2, strategy=FromRank0(OwnMind()), sinks=[heard])
    training.go()
    return training.report() | {"decisions": heard.decisions, "process": os.getpid()}


class Broken:
    """Draws what is no sample id, each time something else; None: fails."""

    catalogs = False

    def __init__(self, ids: list | None) -> None:
        self.ids = ids

    def draw(self, request):
        if self.ids is None:
            raise LookupError("the list of samples is gone")
        return np.array(self.ids)


def rank0_broken(folder: Path, ranks: dict) -> dict:
    from learnit_r8 import ProtocolError
    from learnit_r8.integrations.distributed import FromRank0

    errors = []
    for ids in ([0.5, 1.5], [-1, 2], [SAMPLES, 2], [3, 3], [], None):
        training = Training(folder / "rank0_broken", ranks, num_epochs=1, strategy=FromRank0(Broken(ids)))
        try:
            training.go()
        except (ProtocolError, LookupError) as error:
            errors.append(f"{type(error).__name__}: {error}")
    return {"errors": errors}


def budget(folder: Path, ranks: dict) -> dict:
    training = Training(folder / "budget", ranks, num_epochs=None, train_duration_seconds=0.3)
    training.go()
    return training.report()


def interrupted(folder: Path, ranks: dict) -> dict:
    training = Training(folder / "interrupted", ranks)
    try:
        training.go(interrupt_at=40 if ranks["rank"] == 1 else -1)
    except KeyboardInterrupt:
        return training.report() | {"interrupted": True}
    return training.report()


def stopped(folder: Path, ranks: dict) -> dict:
    sinks = [Stopper()] if ranks["rank"] == 0 else []
    training = Training(folder / "stopped", ranks, sinks=sinks)
    training.go()
    return training.report()


def main() -> None:
    warnings.simplefilter("error")
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        store = f"file://{folder}/rendezvous-{'-'.join(sys.argv[3:])}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    from learnit_r8.integrations.distributed import rank_arguments

    for scenario in sys.argv[4:]:
        result = globals()[scenario](folder, rank_arguments())
        (folder / f"{scenario}-{world}-{rank}.json").write_text(json.dumps(result))
        dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo of torch 2.13 aborts now and then in its destructors, with or without this library


if __name__ == "__main__":
    main()
