"""A number of the user's own: its history, its best value, and which way is better."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from learnit_r8.run.series import Series

_LOWER = {"loss", "err", "error", "ppl", "perplexity", "nll", "mse", "mae", "rmse", "wer", "cer", "bpb", "fid"}
_HIGHER = {"acc", "accuracy", "f1", "auc", "bleu", "map", "iou", "dice", "r2", "reward", "precision", "recall", "psnr"}
_VALIDATION = {"val", "valid", "validation", "eval", "test"}

GRADIENT = "grad_norm"
"""The name under which the norm of the gradient is told; those of the model's parts follow after a slash."""


def is_part(name: str) -> bool:
    """Say whether a metric is the gradient's norm of a part of the model: they are shown together."""
    return name.startswith(f"{GRADIENT}/")


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", name.casefold()))


@lru_cache(maxsize=256)
def is_validation(name: str) -> bool:
    """Say whether a metric's name is one of validation: `val_loss`, `eval/acc`, `test.f1`."""
    return not is_part(name) and not _words(name).isdisjoint(_VALIDATION)


@lru_cache(maxsize=256)
def better(name: str) -> int:
    """Return -1 where lower values are better, 1 where higher ones are, 0 where the name does not tell."""
    words = _words(name)
    return -1 if words & _LOWER else 1 if words & _HIGHER else 0


@dataclass(slots=True)
class Metric:
    """A logged number and its best value."""

    name: str  # its name
    series: Series  # its history
    last: float = float("nan")  # the last value, finite or not
    last_step: int = 0  # step of the last value
    last_epoch: int = 0  # epoch of the last value, from 0
    # Best finite value; None before one, and for names that do not tell which way is better
    best: float | None = None
    best_epoch: int = 0  # epoch of the best value, from 0
    is_best: bool = False  # the last value is the best one

    def add(self, step: int, time: float, value: float, epoch: int) -> None:
        """Take a value."""
        self.series.add(step, time, value)
        self.last, self.last_step, self.last_epoch = value, step, epoch
        sign = better(self.name)
        self.is_best = sign != 0 and value - value == 0.0 and (self.best is None or sign * (value - self.best) > 0)
        if self.is_best:
            self.best, self.best_epoch = value, epoch
