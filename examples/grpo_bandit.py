"""Group-relative policy optimisation on small sums whose prompts come from a curriculum.

    python examples/grpo_bandit.py
    python examples/grpo_bandit.py --quick

A prompt is an operation (larger of two, sum, last digit of the product) and two digits; the policy
answers with one number and a rule says whether it is right. For each prompt the policy gives 16
answers; an answer's advantage is (reward - mean) / (deviation + eps) within its group (GRPO, Shao et
al. 2024, equation 3), and its log-probability is raised in proportion: one on-policy step per batch, so
the clipped ratio of PPO is 1 throughout and is left out. A group that is all right or all wrong
teaches nothing; `CurriculumScheduler` is told each group's mean reward and proposes the next prompts.

Printed is the probability of a right answer, averaged over all 300 prompts, after equally many
answers, and the share of groups that taught something. Needs: torch.
"""

from __future__ import annotations

import argparse
import statistics

import numpy as np
import torch
from torch import nn

from learnit_r8.strategies import CurriculumScheduler

OPERATIONS = (max, lambda a, b: a + b, lambda a, b: a * b % 10)
PROMPTS = np.array([(kind, a, b) for kind in range(3) for a in range(10) for b in range(10)])
ANSWERS = np.array([OPERATIONS[kind](a, b) for kind, a, b in PROMPTS.tolist()])
GROUP = 16
PROMPTS_A_STEP = 16
ENTROPY = 0.02
"""Bonus for undecided answers: without it the policy settles early on wrong ones."""
CHOICES = {
    "random prompts": None,
    "curriculum uniform": {"strategy": "uniform"},
    "curriculum easy_first": {"strategy": "easy_first"},
    "curriculum competence_based": {"strategy": "competence_based"},
    "the same, steered by scores": {"strategy": "competence_based", "steer": True},
}


class Policy(nn.Module):
    """Embeds operation and digits; logits for the answers 0 to 18."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.ModuleList([nn.Embedding(count, 32) for count in (3, 10, 10)])
        self.body = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 19))

    def forward(self, prompts: torch.Tensor) -> torch.Tensor:
        """Return logits, shape `[n, 19]`, for prompts `[n, 3]`."""
        parts = [embed(prompts[:, column]) for column, embed in enumerate(self.embed)]
        return self.body(torch.cat(parts, dim=1))


def success(policy: Policy) -> float:
    """Return the probability of a right answer, averaged over all prompts."""
    with torch.no_grad():
        p = torch.softmax(policy(torch.from_numpy(PROMPTS)), 1)
    return float(p[torch.arange(len(PROMPTS)), torch.from_numpy(ANSWERS)].mean())


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Return each answer's advantage within its group, shape `[prompts, GROUP]`."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True, correction=0) + 1e-4)


def train(options: dict | None, seed: int, steps: int) -> tuple[float, float]:
    """Return the final success and the share of groups that taught something; None: random prompts."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    curriculum = None
    if options is not None:
        curriculum = CurriculumScheduler(**options, n_bins=10, ema_alpha=0.5, seed=seed)
        for prompt in range(len(PROMPTS)):
            curriculum.update(prompt, 0.0)
    useful = 0.0
    for step in range(steps):
        if curriculum is None:
            chosen = rng.integers(len(PROMPTS), size=PROMPTS_A_STEP)
        else:
            chosen = np.array([curriculum.sample_item(step, steps) for _ in range(PROMPTS_A_STEP)])
        distribution = torch.distributions.Categorical(logits=policy(torch.from_numpy(PROMPTS[chosen])))
        answers = distribution.sample((GROUP,))
        rewards = (answers == torch.from_numpy(ANSWERS[chosen])).float().T
        gain = (group_advantages(rewards) * distribution.log_prob(answers).T).mean()
        loss = -gain - ENTROPY * distribution.entropy().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        useful += float((rewards.std(dim=1) > 0).float().mean()) / steps
        if curriculum is not None:
            for prompt, group in zip(chosen.tolist(), rewards.tolist(), strict=True):
                curriculum.update_batch(prompt, group)
    return success(policy), useful


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Run every way of choosing prompts over all seeds; return the median success of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--quick", action="store_true", help="one seed, 50 steps")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds, steps = (1, 50) if options.quick else (options.seeds, options.steps)
    medians = {}
    print(f"{seeds} seeds, {steps} steps of {PROMPTS_A_STEP} groups: median success (range), groups that taught")
    for name, choice in CHOICES.items():
        results = [train(choice, seed, steps) for seed in range(seeds)]
        values = [value for value, _ in results]
        taught = statistics.mean(share for _, share in results)
        medians[name] = statistics.median(values)
        print(f"{name:<28} {medians[name]:.3f} ({min(values):.3f} to {max(values):.3f})   {taught:.2f}", flush=True)
    return medians


if __name__ == "__main__":
    main()
