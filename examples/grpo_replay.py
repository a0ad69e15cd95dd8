"""GRPO on a small language model that replays groups of answers from a hybrid buffer.

    python examples/grpo_replay.py
    python examples/grpo_replay.py --quick

A tiny GPT-2 with random weights is warmed up on sums ("07+15=22.") of which most are wrong, then trained
by group-relative policy optimisation (Shao et al. 2024): eight answers a prompt, a rule says which are
right, an answer's advantage is its reward against its group's. Every step has one update on the fresh
groups and one more: on the same groups again ("none"), or on groups replayed from a buffer. Replayed
answers come from an older policy, so each has PPO's clipped ratio to the probability that it was drawn
with (Schulman et al. 2017). Only groups that are neither all right nor all wrong are kept. For
`HybridSRLReplayBuffer` a group's embedding is the last hidden state at the end of its prompt, its
variance that of its rewards, and its recall score the probability that the policy now gives to the
answers that were right. Printed is the share of right answers over all prompts, after equally many
rollouts and updates. With two seeds the hybrid buffer was below both others: the hardest groups are the
oldest, which an on-policy method learns least from. Needs: torch, transformers.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from learnit_r8.replay import HybridSRLReplayBuffer

ALPHABET = "0123456789+=."
ADDENDS, GROUP, PROMPTS, ANSWER = 20, 8, 16, 3
CLIP = 0.2
KINDS = ("none", "reservoir", "hybrid")


@dataclass(frozen=True)
class Group:
    """One prompt's answers: tokens `[prompt]` and `[GROUP, ANSWER]`, log-probabilities when drawn, rewards."""

    prompt: torch.Tensor
    answers: torch.Tensor
    old: torch.Tensor
    rewards: torch.Tensor


def codes(text: str) -> list[int]:
    """Return a text as tokens."""
    return [ALPHABET.index(letter) for letter in text]


def prompt_of(a: int, b: int) -> torch.Tensor:
    """Return "aa+bb=", always of one length."""
    return torch.tensor(codes(f"{a:02d}+{b:02d}="))


def answer_of(value: int) -> list[int]:
    """Return the right answer: two digits and a full stop."""
    return codes(f"{value:02d}.")


def warmed_up(seed: int, steps: int, right: float = 0.3) -> GPT2LMHeadModel:
    """Return a model that has seen sums, most of them wrong."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    config = GPT2Config(
        vocab_size=len(ALPHABET), n_positions=16, n_embd=64, n_layer=2, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        pairs = rng.integers(ADDENDS, size=(64, 2))
        sums = np.where(rng.random(64) < right, pairs.sum(1), rng.integers(2 * ADDENDS - 1, size=64))
        rows = [prompt_of(a, b).tolist() + answer_of(int(s)) for (a, b), s in zip(pairs, sums, strict=True)]
        tokens = torch.tensor(rows)
        labels = tokens.clone()
        labels[:, :6] = -100
        optimizer.zero_grad()
        model(tokens, labels=labels).loss.backward()
        optimizer.step()
    return model


def roll_out(model: GPT2LMHeadModel, pairs: np.ndarray) -> tuple[list[Group], torch.Tensor]:
    """Return a group of drawn answers for each prompt, and the hidden states at the prompts' ends."""
    prompts = torch.stack([prompt_of(a, b) for a, b in pairs])
    rows = prompts.repeat_interleave(GROUP, 0)
    old = torch.zeros(len(rows))
    with torch.no_grad():
        hidden = model(prompts, output_hidden_states=True).hidden_states[-1][:, -1]
        for _ in range(ANSWER):
            logs = torch.log_softmax(model(rows).logits[:, -1], -1)
            token = torch.multinomial(logs.exp(), 1)
            old += logs.gather(1, token)[:, 0]
            rows = torch.cat([rows, token], 1)
    answers = rows[:, prompts.shape[1] :].view(len(pairs), GROUP, ANSWER)
    right = torch.tensor([answer_of(int(a + b)) for a, b in pairs])
    rewards = (answers == right[:, None]).all(-1).float()
    groups = [Group(*parts) for parts in zip(prompts, answers, old.view(len(pairs), GROUP), rewards, strict=True)]
    return groups, hidden


def update(model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer, groups: list[Group]) -> np.ndarray:
    """Take one step on groups; return the mean probability that each one's right answers have now."""
    prompts = torch.stack([group.prompt for group in groups]).repeat_interleave(GROUP, 0)
    answers = torch.cat([group.answers for group in groups])
    old, rewards = (torch.stack([getattr(group, name) for group in groups]) for name in ("old", "rewards"))
    logits = model(torch.cat([prompts, answers], 1)).logits[:, prompts.shape[1] - 1 : -1]
    logs = torch.log_softmax(logits, -1).gather(-1, answers[..., None])[..., 0].sum(1).view_as(old)
    advantage = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    ratio = torch.exp(logs - old)
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        return ((logs.exp() * rewards).sum(1) / rewards.sum(1).clamp(min=1)).numpy()


def success(model: GPT2LMHeadModel) -> float:
    """Return the probability of the right answer, averaged over all prompts."""
    pairs = [(a, b) for a in range(ADDENDS) for b in range(ADDENDS)]
    rows = torch.tensor([prompt_of(a, b).tolist() + answer_of(a + b) for a, b in pairs])
    with torch.no_grad():
        logs = torch.log_softmax(model(rows).logits[:, 5:-1], -1).gather(-1, rows[:, 6:, None])
    return float(logs[..., 0].sum(1).exp().mean())


def run(kind: str, seed: int, *, steps: int, warm_up: int) -> tuple[float, float]:
    """Return the share of right answers before and after training."""
    model = warmed_up(seed, warm_up)
    torch.manual_seed(seed)
    rng, before = np.random.default_rng(seed), success(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)
    eviction = "reservoir" if kind == "reservoir" else "fifo"
    buffer = HybridSRLReplayBuffer(
        256, mastery_threshold=0.6, initial_interval=2.0, alpha=0.5, eviction=eviction, seed=seed
    )
    for step in range(steps):
        groups, hidden = roll_out(model, rng.integers(ADDENDS, size=(PROMPTS, 2)))
        useful = [k for k, group in enumerate(groups) if 0 < group.rewards.mean() < 1]
        update(model, optimizer, groups)
        if kind == "hybrid":
            items = buffer.get_due_samples(step, PROMPTS)
        else:
            held = buffer.get_due_samples(np.inf, len(buffer)) if len(buffer) and kind != "none" else []
            items = [held[k] for k in rng.permutation(len(held))[:PROMPTS]]
        recalled = update(model, optimizer, [item.experience for item in items] or groups)
        if items:
            buffer.update_after_replay(items, recalled, step)
        for k in useful:
            buffer.add(groups[k], hidden[k], float(groups[k].rewards.var()), step=step)
    return before, success(model)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train with every kind of replay; return the share of right answers of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--quick", action="store_true", help="one seed, 20 steps")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds, steps, warm_up = (1, 20, 100) if options.quick else (options.seeds, options.steps, 600)
    found = {}
    print(f"{seeds} seeds, {steps} steps of {PROMPTS} prompts x {GROUP} answers: share of right answers")
    for kind in KINDS:
        results = np.array([run(kind, seed, steps=steps, warm_up=warm_up) for seed in range(seeds)])
        before, after = results.T
        print(f"{kind:<10} {before.mean():.3f} -> {after.mean():.3f} ({after.std():.3f})", flush=True)
        found[kind] = float(after.mean())
    return found


if __name__ == "__main__":
    main()
