"""Recipe: R8Scheduler beyond one machine with Ray Train (V2 API), which starts the processes and restarts them.

    pip install "ray[train]" && python examples/ray_train.py --workers 2

Ray sets up torch.distributed in its workers; the rest is the loop of examples/ddp.py. After a failure it starts them
anew, on as many nodes as there are: the scheduler's own checkpoint, on storage that all share, says where to go on.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learnit_r8 import R8Scheduler
from learnit_r8.integrations.distributed import rank_arguments
from learnit_r8.integrations.torch import R8BatchSampler, capture_state, follow_lr, restore_state


def train_on_a_worker(config: dict[str, Any]) -> None:
    from ray import train
    from ray.train.torch import get_device, prepare_model

    torch.manual_seed(0)
    inputs = torch.randn(4096, 16)
    data = TensorDataset(inputs, (inputs.sum(dim=1) > 0).long())
    device = get_device()
    model = prepare_model(network := nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2)))
    optimizer = torch.optim.AdamW(model.parameters())

    def save(path: str) -> None:
        torch.save(capture_state(network, optimizer), path)

    def load(source: Any) -> None:
        state = torch.load(source, weights_only=True) if isinstance(source, str) else source
        restore_state(state, network, optimizer, rngs=False)  # the file is rank 0's; each rank keeps its own

    folder, options = config["folder"], {"save_callback": save, "load_callback": load, "ui": "off", **rank_arguments()}
    options["state_callback"] = partial(capture_state, network, optimizer, copy=False)
    try:
        scheduler = R8Scheduler.resume_from_checkpoint(folder, **options)
    except FileNotFoundError:
        scheduler = R8Scheduler(4096, 128, num_epochs=5, checkpoint_dir=folder, checkpoint_every="epoch", **options)
    follow_lr(scheduler, optimizer)
    loader = DataLoader(data, batch_sampler=R8BatchSampler(scheduler))  # no prepare_data_loader: it would cut again
    with scheduler:
        for epoch in scheduler.epoch_iterator():
            for batch, target in loader:
                losses = nn.functional.cross_entropy(model(batch.to(device)), target.to(device), reduction="none")
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
                scheduler.update_with_loss(losses)
            train.report({"epoch": epoch, "loss": losses.mean().item()})


def main() -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", default="checkpoints/ray", help="on storage that all nodes share")
    args = parser.parse_args()
    TorchTrainer(
        train_on_a_worker,
        train_loop_config={"folder": str(Path(args.folder).resolve())},
        scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=torch.cuda.is_available()),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    ).fit()


if __name__ == "__main__":
    main()
