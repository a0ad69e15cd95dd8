"""Recipe: R8Scheduler beyond one machine with Ray Train (V2 API), which starts the processes and restarts them.

    pip install "ray[train]" && python examples/ray_train.py --workers 2

The state is reported into --storage, which all nodes share; after a failure, or started again, the run goes on there.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from ray import train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device, prepare_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learnit_r8 import R8Scheduler
from learnit_r8.integrations.distributed import rank_arguments
from learnit_r8.integrations.torch import R8BatchSampler, TensorState, capture_state, follow_lr, restore_state


def newest_state() -> dict[str, Any] | None:
    reported = train.get_all_reported_checkpoints()
    for kept in reversed(reported):
        try:
            with kept.checkpoint.as_directory() as folder:
                return torch.load(Path(folder) / "state.pt", weights_only=True)
        except (OSError, RuntimeError) as error:
            print(f"{kept.checkpoint.path} is passed over: {error}")
            kept.checkpoint.filesystem.create_dir(kept.checkpoint.path)  # Ray ends a run where it has none to remove
    assert not reported, "no checkpoint can be read: give another --storage to start anew"
    return None


def train_on_a_worker() -> None:
    inputs = torch.randn(4096, 16, generator=torch.manual_seed(0))
    data, device = TensorDataset(inputs, (inputs.sum(dim=1) > 0).long()), get_device()
    model = prepare_model(net := nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2)))
    parts = _, optimizer = net, torch.optim.AdamW(model.parameters())
    scheduler = R8Scheduler(4096, 128, num_epochs=5, checkpoint_dir=None, ui="off", **rank_arguments())
    scheduler.attach_model(lambda: capture_state(*parts, copy=False), lambda state: restore_state(state, *parts))
    if (state := newest_state()) is not None:
        restore_state(state["model"], *parts, rngs=False)  # rank 0's; each rank keeps its own generators
        TensorState(scheduler).load_state_dict(state["r8"])
        if scheduler.global_step == scheduler.total_steps:
            print(f"nothing is left to train after {scheduler.global_step} steps: the run is done")
    follow_lr(scheduler, optimizer)
    loader = DataLoader(data, batch_sampler=R8BatchSampler(scheduler))  # no prepare_data_loader: it would cut again
    with scheduler, tempfile.TemporaryDirectory() as folder:
        for _ in scheduler.epoch_iterator():
            for batch, target in loader:
                losses = nn.functional.cross_entropy(model(batch.to(device)), target.to(device), reduction="none")
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
                loss = scheduler.update_with_loss(losses).loss  # of all ranks
            saved = {"model": capture_state(*parts), "r8": TensorState(scheduler).state_dict()}
            torch.save(saved, Path(folder) / "state.pt")
            here = train.Checkpoint.from_directory(folder) if train.get_context().get_world_rank() == 0 else None
            train.report({"loss": loss, "steps": scheduler.global_step}, checkpoint=here)


def main(worker: Any = train_on_a_worker) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--storage", default="checkpoints/ray", help="on storage that all nodes share")
    args = parser.parse_args()
    kept = {"checkpoint_config": CheckpointConfig(num_to_keep=2), "failure_config": FailureConfig(max_failures=10)}
    run = RunConfig(name="r8", storage_path=str(Path(args.storage).resolve()), **kept)
    scaling = ScalingConfig(num_workers=args.workers, use_gpu=torch.cuda.is_available())
    result = TorchTrainer(worker, scaling_config=scaling, run_config=run).fit()
    print(result.metrics, result.checkpoint)


if __name__ == "__main__":
    main()
