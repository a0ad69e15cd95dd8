"""R8Scheduler in a PyTorch loop with workers; the lines marked R8 are what it adds.

    python examples/pytorch_loop.py [--workers 2] [--nan]

With --nan a step is poisoned: the run goes back to a backup in RAM and ends as well.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learnit_r8 import R8Scheduler
from learnit_r8.integrations.torch import R8BatchSampler, capture_state, follow_lr, restore_state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--nan", action="store_true", help="poison a step halfway")
    parser.add_argument("--ui", default="off")
    args = parser.parse_args()

    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    inputs, labels = torch.tensor(x[order] / 16, dtype=torch.float32), torch.tensor(y[order])
    train, test = TensorDataset(inputs[:1400], labels[:1400]), (inputs[1400:], labels[1400:])
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters())

    scheduler = R8Scheduler(  # R8
        len(train), 32, num_epochs=args.epochs, initial_lr=5e-3, backup_every=20, checkpoint_dir=None, ui=args.ui
    )
    scheduler.attach_model(  # R8: backups in RAM, to roll back to
        lambda: capture_state(model, optimizer, copy=False), lambda state: restore_state(state, model, optimizer)
    )
    follow_lr(scheduler, optimizer)  # R8
    loader = DataLoader(
        train,
        batch_sampler=R8BatchSampler(scheduler),  # R8
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
    )
    poisoned = scheduler.total_steps // 2 if args.nan else -1
    with scheduler:
        for _ in scheduler.epoch_iterator():  # R8
            for batch, target in loader:
                losses = nn.functional.cross_entropy(model(batch), target, reduction="none")  # R8: one per sample
                if scheduler.global_step == poisoned:
                    losses = losses * float("nan")
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
                result = scheduler.update_with_loss(losses)  # R8
                if result.rolled_back:
                    print(f"step {result.step}: loss {result.loss}, the model was restored")
            with torch.no_grad():
                accuracy = (model(test[0]).argmax(dim=1) == test[1]).float().mean().item()
            scheduler.log(val_accuracy=accuracy)
    print(f"test accuracy {accuracy:.3f} after {scheduler.global_step} steps")


if __name__ == "__main__":
    main()
