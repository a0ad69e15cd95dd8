"""Arithmetic for a small transformer: larger one, sum and product of two digits, of which the last digit is asked.

Larger ones are easy, sums harder and products hardest, as the prompts of a collection differ.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

LETTERS = "0123456789>+*="
CASES = [(kind, a, b) for kind in range(3) for a in range(10) for b in range(10)]
QUESTIONS = torch.tensor([[a, 10 + kind, b, 13] for kind, a, b in CASES])
"""As tokens, `[300, 4]`."""
ANSWERS = torch.tensor([(max(a, b), (a + b) % 10, a * b % 10)[kind] for kind, a, b in CASES])
RIGHT = np.repeat([0.7, 0.4, 0.25], 100)
"""Shares of right answers in what the model has seen before."""


def warmed_up(seed: int, steps: int = 300) -> Any:
    """Return a model that has seen answers, many of them wrong."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    config = GPT2Config(
        vocab_size=len(LETTERS), n_positions=8, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        chosen = rng.integers(len(CASES), size=64)
        wrong, right = torch.from_numpy(rng.integers(10, size=64)), torch.from_numpy(rng.random(64) < RIGHT[chosen])
        labels: Tensor = torch.where(right, ANSWERS[chosen], wrong)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(QUESTIONS[chosen]).logits[:, -1], labels).backward()
        optimizer.step()
    return model
