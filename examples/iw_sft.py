"""Importance-weighted fine-tuning of a tiny GPT-2: curated data, plain against weighted.

    python examples/iw_sft.py
    python examples/iw_sft.py --quick

A reference model is trained on text of mixed quality: lines of Python's own source files, half of
them with scrambled characters. "Curated" keeps the clean half, a small part of which is used for
fine-tuning. Compared at equal steps, from the same reference, on held-out clean text: no
fine-tuning, plain fine-tuning (SFT), and `ImportanceWeightedSFTLoss` with the ratio of the published
loss (reference over policy) and of the paper (policy over reference), by token and by sequence.
Everything is characters, random weights and the standard library's files: nothing is downloaded.

Needs: torch, transformers.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from learnit_r8.integrations.importance import ImportanceWeightedSFTLoss

LENGTH = 64
VOCABULARY = 128
METHODS = {
    "plain": None,
    "ref/policy, token": {},
    "ref/policy, sequence_mean": {"level": "sequence_mean"},
    "policy/ref, token": {"ratio": "policy_over_ref", "clip_weight": (0.2, 1.8), "epsilon": 0.0},
    "policy/ref, sequence_mean": {
        "ratio": "policy_over_ref",
        "level": "sequence_mean",
        "temperature": 0.5,
        "epsilon": 0.0,
    },
}
"""The last two with the bounds that the paper's authors use in their code."""


def snippets(seed: int) -> torch.Tensor:
    """Return pieces of source text as ASCII codes, int64, shape `[n, LENGTH]`, shuffled."""
    text = "\n".join(path.read_text("utf-8") for path in sorted(Path(json.__file__).parent.glob("*.py")))
    text += Path(argparse.__file__).read_text("utf-8") + Path(statistics.__file__).read_text("utf-8")
    codes = np.frombuffer(text.encode("ascii", "ignore"), dtype=np.uint8).astype(np.int64)
    pieces = codes[: len(codes) // LENGTH * LENGTH].reshape(-1, LENGTH)
    return torch.from_numpy(np.random.default_rng(seed).permutation(pieces))


def scrambled(pieces: torch.Tensor, seed: int) -> torch.Tensor:
    """Return the pieces, each with its characters in random order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(pieces.shape, generator=generator).argsort(dim=1)
    return pieces.gather(1, order)


def label_log_probs(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return log pi of each token but the first, shape `[B, LENGTH - 1]`."""
    logits = model(tokens).logits[:, :-1]
    return torch.log_softmax(logits.float(), -1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


def perplexity(model: nn.Module, tokens: torch.Tensor) -> float:
    """Return the perplexity per character."""
    model.eval()
    with torch.no_grad():
        return math.exp(-label_log_probs(model, tokens).mean())


def train(model: nn.Module, tokens: torch.Tensor, steps: int, lr: float, seed: int, options: dict | None) -> None:
    """Train in place; `options` None: plain cross entropy, else the weighted loss with these."""
    loss_fn = ImportanceWeightedSFTLoss(**(options or {}))
    reference = copy.deepcopy(model).eval()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = tokens[torch.randint(len(tokens), (32,), generator=generator)]
        known = None
        if options is not None:
            with torch.no_grad():
                known = label_log_probs(reference, batch)
        loss = loss_fn(model(batch).logits[:, :-1], batch[:, 1:], known)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def run(seed: int, pretrain: int, finetune: int) -> dict[str, float]:
    """Return the held-out perplexity after each kind of fine-tuning."""
    torch.manual_seed(seed)
    pieces = snippets(seed)
    held_out, clean, curated = pieces[:300], pieces[300:1100], pieces[1100:1400]
    configuration = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    reference = GPT2LMHeadModel(configuration)
    train(reference, torch.cat([clean, scrambled(clean, seed)]), pretrain, 2e-3, seed, None)
    results = {"reference": perplexity(reference, held_out)}
    for name, options in METHODS.items():
        model = copy.deepcopy(reference)
        train(model, curated, finetune, 5e-4, seed, options)
        results[name] = perplexity(model, held_out)
    return results


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Run all seeds; return the median held-out perplexity of each method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pretrain", type=int, default=400, help="steps")
    parser.add_argument("--finetune", type=int, default=200, help="steps")
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds, pretrain, finetune = (1, 20, 10) if options.quick else (options.seeds, options.pretrain, options.finetune)
    runs = [run(seed, pretrain, finetune) for seed in range(seeds)]
    print(f"held-out perplexity per character, {seeds} seeds: median (range)")
    medians = {}
    for name in runs[0]:
        values = [result[name] for result in runs]
        medians[name] = statistics.median(values)
        print(f"{name:<28} {medians[name]:.3f} ({min(values):.3f} to {max(values):.3f})")
    return medians


if __name__ == "__main__":
    main()
