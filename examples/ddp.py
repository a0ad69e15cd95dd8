"""R8Scheduler with DistributedDataParallel; the lines marked R8 are what several ranks add.

    torchrun --nproc-per-node 2 examples/ddp.py
    python examples/ddp.py                          # one process

The batch size is the global one: any number of ranks trains the same batches, and a checkpoint of
two ranks is resumed on four.
"""

from __future__ import annotations

import argparse
import os

import numpy as np
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from learnit_r8 import R8Scheduler
from learnit_r8.integrations.distributed import rank_arguments
from learnit_r8.integrations.torch import R8BatchSampler, capture_state, follow_lr, restore_state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    epochs = parser.parse_args().epochs
    distributed = "RANK" in os.environ  # set by torchrun
    if distributed:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)

    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    inputs, labels = torch.tensor(x[order] / 16, dtype=torch.float32), torch.tensor(y[order])
    train, test = TensorDataset(inputs[:1400], labels[:1400]), (inputs[1400:].to(device), labels[1400:].to(device))
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    model = DistributedDataParallel(network) if distributed else network
    optimizer = torch.optim.AdamW(model.parameters())

    options = {"num_epochs": epochs, "initial_lr": 5e-3, "checkpoint_dir": None, "ui": "off"}
    scheduler = R8Scheduler(len(train), 32, **options, **rank_arguments())  # R8
    scheduler.attach_model(
        lambda: capture_state(network, optimizer, copy=False), lambda state: restore_state(state, network, optimizer)
    )
    follow_lr(scheduler, optimizer)
    loader = DataLoader(train, batch_sampler=R8BatchSampler(scheduler))  # this rank's slices; no DistributedSampler
    with scheduler:
        for _ in scheduler.epoch_iterator():
            for batch, target in loader:
                losses = nn.functional.cross_entropy(model(batch.to(device)), target.to(device), reduction="none")
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
                scheduler.update_with_loss(losses)  # one rank's NaN rolls all ranks back
    with torch.no_grad():
        accuracy = (network(test[0]).argmax(dim=1) == test[1]).float().mean().item()
    if not distributed or dist.get_rank() == 0:
        print(f"test accuracy {accuracy:.3f} after {scheduler.global_step} steps")
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
