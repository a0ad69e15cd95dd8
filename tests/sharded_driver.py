"""One rank of a training whose model is sharded: sharded_driver.py FOLDER RANK WORLD NAME...

A name is SCENARIO or SCENARIO:KIND, with KIND one of `KINDS`.
"""

from __future__ import annotations

import collections
import itertools
import json
import os
import signal
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

SAMPLES, BATCH, EPOCHS, FEATURES = 960, 48, 3, 16


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)]
    return nn.Sequential(*layers).double()


def sharded(net: nn.Module, mesh: Any, **options: Any) -> nn.Module:
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def ddp(world: int) -> nn.Module:
    return DistributedDataParallel(network())


def fsdp2(world: int) -> nn.Module:
    return sharded(network(), init_device_mesh("cpu", (world,)))


def offload(world: int) -> nn.Module:
    return sharded(network(), init_device_mesh("cpu", (world,)), offload_policy=CPUOffloadPolicy(pin_memory=False))


def hsdp(world: int) -> nn.Module:
    return sharded(network(), init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))


def tensor_parallel(world: int, mesh: Any = None) -> nn.Module:
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return parallelize_module(network(), mesh or init_device_mesh("cpu", (world,), mesh_dim_names=("tp",)), plan)


def both(world: int) -> nn.Module:
    """FSDP2 over tensor parallelism."""
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    return fully_shard(tensor_parallel(world, mesh["tp"]), mesh=mesh["dp"])


KINDS = {kind.__name__: kind for kind in (ddp, fsdp2, offload, hsdp, tensor_parallel, both)}
GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(SAMPLES, FEATURES, generator=GENERATOR, dtype=torch.float64)
Y = (X[:, :4].sum(dim=1) > 0).long()


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return copies of all tensors, by means of none of the library's functions."""
    named = dict(model.state_dict())
    for number, state in optimizer.state_dict()["state"].items():
        named |= {f"{number}.{name}": value for name, value in state.items()}
    return {name: local(torch.as_tensor(value)).detach().clone() for name, value in named.items()}


def plain_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X[step::50]), Y[step::50]).backward()
        optimizer.step()


def copied(folder: Path, ranks: dict, kind: str) -> dict:
    """Capture, train on, restore: what is another than it was?"""
    from learnit_r8.integrations.torch import capture_state, restore_state
    from learnit_r8.stability.tree_copy import CopyPlan

    wrong = {}
    old = None
    for way in ("copy", "scheduler", "out"):
        model = KINDS[kind](ranks["world_size"])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        plain_steps(model, optimizer, 5)
        before = snapshot(model, optimizer)
        if way == "scheduler":
            copy = CopyPlan(capture_state(model, optimizer, copy=False)).fill()
            assert not copy.nonfinite()
            assert len(copy.arrays) >= len(before)
            state = copy.tree
        else:
            state = old = capture_state(model, optimizer, out=old)
        plain_steps(model, optimizer, 5)
        changed = snapshot(model, optimizer)
        restore_state(state, model, optimizer)
        after = snapshot(model, optimizer)
        wrong[way] = [name for name in before if not torch.equal(before[name], after[name])]
        assert sum(not torch.equal(before[name], changed[name]) for name in before) > len(before) // 2
        plain_steps(model, optimizer, 5)
        again = snapshot(model, optimizer)
        wrong[way] += [name for name in changed if not torch.equal(changed[name], again[name])]
    return {"wrong": wrong, "tensors": len(before)}


class Training:
    """The loop of docs/several-gpus.md over a model of some kind."""

    def __init__(self, kind: str, ranks: dict, *, scheduler: Any = None, spoil: Any = dict, **options: Any) -> None:
        from learnit_r8 import R8Scheduler
        from learnit_r8.integrations.torch import capture_state, follow_lr, restore_state

        self.model = KINDS[kind](dist.get_world_size())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.losses: list[float] = []
        self.rolled_back: list[int] = []
        options = {"num_epochs": EPOCHS, "initial_lr": 1e-2, "checkpoint_dir": None, "ui": "off"} | ranks | options
        self.scheduler = scheduler or R8Scheduler(SAMPLES, BATCH, **options)
        self.scheduler.attach_model(
            lambda: spoil() or capture_state(self.model, self.optimizer, copy=False),
            lambda state: restore_state(state, self.model, self.optimizer),
        )
        follow_lr(self.scheduler, self.optimizer)

    def go(self, before_step: Any = lambda step: 1.0, stop_at: int = -1, micro: int = 1) -> None:
        for _ in self.scheduler.epoch_iterator():
            for batch in self.scheduler.batch_iterator():
                factor = before_step(batch.step)
                losses = []
                self.optimizer.zero_grad()
                parts = torch.from_numpy(batch.indices).chunk(micro)
                for number, ids in enumerate(parts):
                    self._sync(number == len(parts) - 1)
                    part = nn.functional.cross_entropy(self.model(X[ids]), Y[ids], reduction="none") * factor
                    (part.sum() / len(batch.indices)).backward()
                    losses.append(part.detach())
                self.optimizer.step()
                result = self.scheduler.update_with_loss(torch.cat(losses))
                self.losses.append(result.loss)
                if result.rolled_back:
                    self.rolled_back.append(batch.step)
                if self.scheduler.global_step == stop_at:
                    return

    def _sync(self, last: bool) -> None:
        if hasattr(self.model, "set_requires_gradient_sync"):
            self.model.set_requires_gradient_sync(last)
        elif isinstance(self.model, DistributedDataParallel):
            self.model.require_backward_grad_sync = last

    def weights(self) -> list[float]:
        """All weights, whole."""
        state = self.model.state_dict()
        whole = [value.full_tensor() if hasattr(value, "full_tensor") else value for value in state.values()]
        return torch.cat([value.detach().flatten() for value in whole]).tolist()


def faults(folder: Path, ranks: dict, kind: str) -> dict:
    """NaN at random steps, each time on another rank; four runs of five."""
    from learnit_r8 import R8Scheduler
    from tests.backup_watch import BackupWatch, random_steps

    found = []
    for seed in range(4):
        options = {"num_epochs": EPOCHS, "initial_lr": 1e-2, "checkpoint_dir": None, "ui": "off", "seed": seed}
        watch = BackupWatch(random_steps(seed), partial(R8Scheduler, SAMPLES, BATCH, **options, **ranks))
        training = Training(kind, ranks, scheduler=watch.scheduler)

        def poison(step: int, watch: Any = watch) -> float:
            factor = watch.factor()
            return factor if step % ranks["world_size"] == ranks["rank"] else 1.0

        training.go(poison)
        found.append(watch.findings())
    return {"findings": found}


def lightning(folder: Path, ranks: dict, kind: str) -> dict:
    """FSDP2 inside Lightning; NaN at random steps."""
    import lightning
    from lightning.pytorch.strategies import ModelParallelStrategy

    from learnit_r8 import R8Scheduler
    from learnit_r8.integrations.lightning import R8Callback, R8DataModuleMixin
    from tests.backup_watch import BackupWatch, random_steps

    os.environ["LOCAL_RANK"] = str(ranks["rank"])  # without it Lightning starts this program again for the other rank
    watch = BackupWatch(random_steps(1), partial(R8Scheduler, SAMPLES, BATCH, num_epochs=EPOCHS, ui="off", **ranks))

    class Module(R8DataModuleMixin, lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def configure_model(self) -> None:
            if not hasattr(self.net[0].weight, "placements"):
                sharded(self.net, self.device_mesh["data_parallel"])

        def training_step(self, batch: Any, index: int) -> dict:
            losses = nn.functional.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
            losses = losses * (watch.factor() if ranks["rank"] == 1 else 1.0)
            return {"loss": losses.mean(), "r8_losses": losses}

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

        def train_dataloader(self) -> Any:
            return self.r8_dataloader(torch.utils.data.TensorDataset(X, Y))

    module = Module()
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    lightning.Trainer(
        accelerator="cpu", devices=2, strategy=ModelParallelStrategy(), max_epochs=-1, use_distributed_sampler=False,
        callbacks=[R8Callback(watch.scheduler)], **quiet,
    ).fit(module)  # fmt: skip
    return {"kind": type(module.net[0].weight).__name__, "findings": watch.findings()}


def accelerated(folder: Path, ranks: dict, kind: str) -> dict:
    """FSDP2 with the optimizer in Accelerate's wrapper; NaN at random steps."""
    from accelerate import Accelerator

    from learnit_r8 import R8Scheduler
    from tests.backup_watch import BackupWatch, random_steps

    accelerator = Accelerator(cpu=True)
    options = {"num_epochs": EPOCHS, "initial_lr": 1e-2, "checkpoint_dir": None, "ui": "off"}
    watch = BackupWatch(random_steps(2), partial(R8Scheduler, SAMPLES, BATCH, **options, **ranks))
    training = Training("fsdp2", ranks, scheduler=watch.scheduler)
    training.optimizer = accelerator.prepare(training.optimizer)
    training.go(lambda step: watch.factor() if ranks["rank"] == 1 else 1.0)
    return {"kind": type(training.model[0].weight).__name__, "findings": watch.findings()}


def hidden(folder: Path, ranks: dict, kind: str) -> dict:
    """NaN in one rank's shard of a parameter that no loss depends on."""
    found = []
    for every in (4, 5, 8):  # steps: also where a backup is taken right when it is found
        training = Training(kind, ranks, backup_every=every)

        def poison(step: int, training: Any = training) -> float:
            if step == 20 and ranks["rank"] == ranks["world_size"] - 1:
                local(training.frozen.detach())[:] = float("nan")
            return 1.0

        training.frozen = nn.Parameter(next(training.model.parameters()).detach().clone(), requires_grad=False)
        training.model.register_parameter("frozen", training.frozen)
        training.go(poison)
        finite = bool(local(training.frozen).isfinite().all())
        found.append((len(training.rolled_back), training.scheduler._safety.restored_step, finite))
    return {"found": found}


def spoilt(folder: Path, ranks: dict, kind: str) -> dict:
    """Backups that one rank cannot take: for once, and ever."""
    calls = itertools.count()

    def spoil(at: int, error: Exception) -> None:
        if next(calls) == at and ranks["rank"] == 1:
            raise error

    result: dict[str, Any] = {}
    for at in (1, 4):  # backups; the ring is full from the third on
        calls = itertools.count()
        training = Training(kind, ranks, backup_every=10, spoil=partial(spoil, at, MemoryError("no room")))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            training.go(lambda step, at=at: float("nan") if step == at * 10 + 5 and ranks["rank"] else 1.0)
        result["told"] = [str(one.message) for one in told]
        held = [backup.step for backup in training.scheduler._safety.backups.ring.backups]
        result[str(at)] = [training.rolled_back, training.scheduler._safety.restored_step, held, training.weights()]
    calls = itertools.count()
    training = Training(kind, ranks, spoil=partial(spoil, 0, TypeError("net/w is a Hollow")))
    try:
        training.go()
    except TypeError as error:
        result |= {"error": str(error), "steps": training.scheduler.global_step}
    return result


def plain(folder: Path, ranks: dict, kind: str) -> dict:
    """A thousand steps with accumulation."""
    training = Training(kind, ranks, num_epochs=50)
    training.go(micro=3)
    return {"weights": training.weights(), "losses": training.losses, "hash": training.scheduler._ranks._hash}


def batchnorm(folder: Path, ranks: dict, kind: str) -> dict:
    """Digits with BatchNorm, whose statistics are those of a rank's slice: test losses of six seeds."""
    from sklearn.datasets import load_digits

    from learnit_r8 import R8Scheduler
    from learnit_r8.integrations.torch import follow_lr

    images, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    images, found = images.float() / 16, []
    for seed in range(6):
        torch.manual_seed(seed)
        layers = nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)
        model = DistributedDataParallel(nn.Sequential(*layers))
        optimizer = torch.optim.AdamW(model.parameters())
        options = {"num_epochs": 4, "initial_lr": 1e-2, "checkpoint_dir": None, "ui": "off", "seed": seed}
        scheduler = R8Scheduler(1200, 64, **options, **ranks)
        follow_lr(scheduler, optimizer)
        for _ in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                ids = torch.from_numpy(batch.indices)
                losses = nn.functional.cross_entropy(model(images[ids]), labels[ids], reduction="none")
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
                scheduler.update_with_loss(losses)
        model.eval()
        with torch.no_grad():
            found.append(nn.functional.cross_entropy(model.module(images[1200:]), labels[1200:]).item())
    return {"losses": found}


class Saved(Training):
    """A training that is saved and resumed by all ranks together, through ShardedModel."""

    def __init__(self, kind: str, ranks: dict, folder: Path, *, resume: bool = False, **options: Any) -> None:
        from learnit_r8 import R8Scheduler
        from learnit_r8.integrations.distributed import ShardedModel
        from learnit_r8.integrations.torch import follow_lr

        self.model = KINDS[kind](dist.get_world_size())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.1)
        self.losses, self.rolled_back = [], []
        parts = ShardedModel(self.model, self.optimizer)
        options = {"ui": "off", "save_callback": parts.save, "load_callback": parts.load} | ranks | options
        options |= {"state_callback": parts.capture}
        if resume:
            self.scheduler = R8Scheduler.resume_from_checkpoint(folder, **options)
        else:
            options = {"num_epochs": EPOCHS, "initial_lr": 1e-2, "checkpoint_dir": folder} | options
            self.scheduler = R8Scheduler(SAMPLES, BATCH, **options)
        follow_lr(self.scheduler, self.optimizer)

    def outcome(self) -> dict:
        return {"weights": self.weights(), "losses": self.losses, "rolled_back": self.rolled_back}


def whole(folder: Path, ranks: dict, kind: str) -> dict:
    training = Saved(kind, ranks, folder / f"whole-{ranks['world_size']}")
    training.go()
    return training.outcome()


def first(folder: Path, ranks: dict, kind: str) -> dict:
    """The first half, saved at its last step; a checkpoint was due at others."""
    training = Saved(kind, ranks, folder / f"half-{kind}-{ranks['world_size']}", checkpoint_every=10)
    training.go(stop_at=25)
    path = training.scheduler.save_checkpoint()
    names = sorted(entry.name for entry in path.parent.iterdir())
    return training.outcome() | {"path": path.name, "names": names}


def second(folder: Path, ranks: dict, kind: str) -> dict:
    """The second half of what another number of ranks, or another kind of sharding, began: KIND,FIRST,WORLD."""
    kind, before, world = kind.split(",")
    own = {"checkpoint_dir": None, "checkpoint_every": None}
    training = Saved(kind, ranks, folder / f"half-{before}-{world}", resume=True, **own)
    begun = training.scheduler.global_step
    training.go()
    return training.outcome() | {"begun": begun}


class Asks:
    """A sink whose user asks for a checkpoint at step 7."""

    def __init__(self) -> None:
        self.commands: collections.deque = collections.deque()

    def record(self, event: Any) -> None:
        from learnit_r8.types import Command

        if type(event).__name__ == "LossReported" and event.step == 7:
            self.commands.append(Command.CHECKPOINT)


def asked(folder: Path, ranks: dict, kind: str) -> dict:
    """One rank is asked for a checkpoint; a signal comes to the other one."""
    training = Saved(kind, ranks, folder / "asked", sinks=[Asks()] if ranks["rank"] == 0 else [])

    def interrupt(step: int) -> float:
        if step == 20 and ranks["rank"] == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return 1.0

    try:
        training.go(interrupt)
        ended = "end"
    except KeyboardInterrupt:
        ended = "interrupted"
    names = sorted(path.name for path in (folder / "asked").glob("step-*"))
    return {"ended": ended, "names": names, "steps": training.scheduler.global_step}


def disk(folder: Path, ranks: dict, kind: str) -> dict:
    """No backups in RAM: NaN rolls back to the checkpoint."""
    training = Saved(kind, ranks, folder / "disk", checkpoint_every=10, backup_every=None)
    training.go(lambda step: float("nan") if step == 35 and ranks["rank"] == 1 else 1.0)
    return training.outcome()


def lost(folder: Path, ranks: dict, kind: str) -> dict:
    """A node takes its part of the newest checkpoint with it: all ranks go on from the one before."""
    one = Saved(kind, ranks, folder / "lost", checkpoint_every=10)
    one.go(stop_at=25)
    if ranks["rank"] == 0:
        newest = max((folder / "lost").glob("step-*"))
        next(iter((newest / "model").glob("__1_*"))).unlink()
    dist.barrier()
    two = Saved(kind, ranks, folder / "lost", resume=True)
    begun = two.scheduler.global_step
    two.go(stop_at=25)
    return {"begun": begun, "newest": newest.name if ranks["rank"] == 0 else "", "same": two.weights() == one.weights()}


def failing(folder: Path, ranks: dict, kind: str) -> dict:
    """A save that fails on one rank fails on all, and the run goes on."""
    from learnit_r8 import CheckpointError, R8Scheduler
    from learnit_r8.integrations.distributed import collective

    calls = []

    def save(path: str) -> None:
        calls.append(path)
        if len(calls) == 1 and ranks["rank"] == 1:
            raise OSError("disk full")
        if ranks["rank"] == 0:
            Path(path).write_text("model")

    options = {"num_epochs": 1, "ui": "off", "checkpoint_dir": folder / "failing"} | ranks
    scheduler = R8Scheduler(SAMPLES, BATCH, save_callback=collective(save), **options)
    told = []
    for batch in scheduler.batch_iterator():
        scheduler.update_with_loss(torch.ones(len(batch.indices)))
        if batch.step < 2:
            try:
                told.append(scheduler.save_checkpoint().name)
            except CheckpointError as error:
                told.append(str(error))
    return {"told": told, "paths": calls}


def unmarked(folder: Path, ranks: dict, kind: str) -> dict:
    """A save_callback that would gather a sharded model on rank 0 alone."""
    from learnit_r8 import ConfigError

    try:
        Training(kind, ranks, checkpoint_dir=folder / "unmarked", save_callback=lambda path: None)
    except ConfigError as error:
        return {"error": str(error)}
    return {"error": ""}


def tutorial(folder: Path, ranks: dict, kind: str) -> dict:
    """torch.distributed.checkpoint as its tutorial has it, with the scheduler as one of its parts."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    from learnit_r8.integrations.torch import TensorState

    def save(training: Training) -> dict:
        model, optimizer = get_state_dict(training.model, training.optimizer)
        return {"model": model, "optimizer": optimizer, "r8": TensorState(training.scheduler)}

    one = Training(kind, ranks)
    one.go(stop_at=25)
    dcp.save(save(one), checkpoint_id=folder / "tutorial")
    one_piece = {"r8": TensorState(one.scheduler)}
    written = dcp.async_save(one_piece, checkpoint_id=folder / "async", process_group=dist.new_group(backend="gloo"))
    one.go()
    written.result()
    two = Training(kind, ranks)
    state = save(two)
    dcp.load(state, checkpoint_id=folder / "tutorial")
    dcp.load({"r8": state["r8"]}, checkpoint_id=folder / "async")
    set_state_dict(two.model, two.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    begun = two.scheduler.global_step
    two.go()
    return {"begun": begun, "losses": [one.losses[25:], two.losses], "weights": [one.weights(), two.weights()]}


def shared_slices(folder: Path, ranks: dict, kind: str) -> dict:
    """Two processes train on each slice; NaN in a part that one of four processes holds."""
    from learnit_r8.integrations.distributed import rank_arguments

    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    ranks = rank_arguments(mesh["dp"])
    training = Training("both" if world > 2 else "tensor_parallel", ranks)
    seen = []

    def poison(step: int) -> float:
        seen.append(training.scheduler.open_batches[0].indices.tolist())
        return float("nan") if step == 30 and dist.get_rank() == world - 1 else 1.0

    training.go(poison)
    return {"seen": seen, "weights": training.weights(), "rolled_back": training.rolled_back, "slice": ranks["rank"]}


def main() -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*(barrier|gloo|Gloo).*")
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous-{world}-{sys.argv[4].replace(chr(58), chr(45))}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    from learnit_r8.integrations.distributed import rank_arguments

    for name in sys.argv[4:]:
        scenario, _, kind = name.partition(":")
        result = globals()[scenario](folder, rank_arguments(), kind)
        (folder / f"{name.replace(':', '-')}-{world}-{rank}.json").write_text(json.dumps(result))
        dist.barrier()
    os._exit(0)  # gloo of torch 2.13 aborts now and then in its destructors, with or without this library


if __name__ == "__main__":
    main()
