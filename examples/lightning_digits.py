"""Lightning on scikit-learn's digits: the three changed lines are marked.

python -m pip install "learnit_r8[lightning,example]" && python examples/lightning_digits.py
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learnit_r8 import R8Scheduler
from learnit_r8.integrations.lightning import R8Callback, R8DataModuleMixin


class Digits(R8DataModuleMixin, pl.LightningDataModule):  # 1
    """1500 images to train on, 297 to test on."""

    def __init__(self) -> None:
        super().__init__()
        digits = load_digits()
        x = torch.tensor(digits.data / 16, dtype=torch.float32)
        y = torch.tensor(digits.target)
        self.train, self.test = TensorDataset(x[:1500], y[:1500]), TensorDataset(x[1500:], y[1500:])

    def train_dataloader(self) -> DataLoader:
        return self.r8_dataloader(self.train)  # 2

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=297)


class Network(pl.LightningModule):
    """A small network."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> dict[str, torch.Tensor]:
        x, y = batch
        losses = nn.functional.cross_entropy(self.layers(x), y, reduction="none")
        return {"loss": losses.mean(), "r8_losses": losses}

    def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("accuracy", (self.layers(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def main() -> None:
    pl.seed_everything(0, verbose=False)
    scheduler = R8Scheduler(1500, 32, num_epochs=5, initial_lr=3e-3, ui="off")
    trainer = pl.Trainer(
        max_epochs=-1,
        use_distributed_sampler=False,
        callbacks=[R8Callback(scheduler)],  # 3
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data, model = Digits(), Network()
    trainer.fit(model, datamodule=data)
    (result,) = trainer.test(model, datamodule=data, verbose=False)
    print(f"accuracy {result['accuracy']:.3f} after {scheduler.global_step} steps")
    print("most suspicious training images:", scheduler.catalog.suspects(5).tolist())


if __name__ == "__main__":
    main()
