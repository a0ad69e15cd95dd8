"""R8Scheduler in the Hugging Face Trainer: the lines marked R8 are the three that change.

    python examples/huggingface.py [--resume]

A small Bert, made from its configuration (nothing is downloaded), learns which of two words comes
first. With --resume the training is started again from its last checkpoint but one.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments, set_seed

from learnit_r8 import R8Scheduler
from learnit_r8.integrations.huggingface import R8Trainer  # R8: in place of transformers.Trainer


class WordOrder(Dataset):
    """Sequences of 8 tokens with the words 1 and 2 in them; the label says whether 1 comes first."""

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(3, 20, (size, 8), generator=generator)
        places = torch.rand(size, 8, generator=generator).argsort(dim=1)[:, :2]
        self.tokens.scatter_(1, places, torch.tensor([[1, 2]]).expand(size, 2))
        self.labels = (places[:, 0] < places[:, 1]).long()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def build(folder: str, train: WordOrder) -> R8Trainer:
    set_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=2, **size))
    args = TrainingArguments(
        folder, use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=50, save_steps=100, eval_strategy="epoch"
    )
    scheduler = R8Scheduler(len(train), 16, num_epochs=4, initial_lr=3e-3, checkpoint_dir=None, ui="off")  # R8
    return R8Trainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=WordOrder(256, seed=1),
        compute_metrics=accuracy,
        scheduler=scheduler,  # R8
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true")
    resume = parser.parse_args().resume
    train = WordOrder(1024, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(folder, train)
        trainer.train()
        if resume:
            trainer = build(folder, train)
            trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-200")
        print(f"accuracy {trainer.evaluate()['eval_accuracy']:.3f} after {trainer.state.global_step} steps")


if __name__ == "__main__":
    main()
