"""Deep Q-learning on CartPole-v1: prioritized against uniform replay, everything else equal.

    python examples/dqn_cartpole.py --seeds 5 --picture cartpole.png
    python examples/dqn_cartpole.py --quick

Double DQN (van Hasselt et al. 2016) with a soft target. Uniform replay is the same buffer with
alpha = 0, whose weights are all 1. The greedy policy plays 10 episodes every 500 steps; printed
is the first step at which their average return is 475, the value at which the task counts as solved.

Needs: torch, gymnasium, matplotlib (for the picture).
"""

from __future__ import annotations

import argparse
import copy
import importlib
import statistics
from pathlib import Path

import gymnasium
import numpy as np
import torch
from torch import nn

from learnit_r8.replay import PrioritizedReplayBuffer

SOLVED = 475.0
EVERY = 500


def network() -> nn.Module:
    """Return the Q-network: 4 observations, 2 actions."""
    return nn.Sequential(nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))


def evaluate(model: nn.Module, environment: gymnasium.Env, seed: int) -> float:
    """Return the greedy policy's average return over 10 episodes, played side by side."""
    returns = []
    for episode in range(10):
        observation, _ = environment.reset(seed=seed + episode)
        total, over = 0.0, False
        while not over:
            with torch.no_grad():
                action = int(model(torch.from_numpy(observation)).argmax())
            observation, reward, ended, cut, _ = environment.step(action)
            total, over = total + float(reward), ended or cut
        returns.append(total)
    return statistics.mean(returns)


def train(alpha: float, seed: int, steps: int, gamma: float = 0.99, batch_size: int = 128) -> list[float]:
    """Return the evaluations of one run, one per `EVERY` steps; the last repeated once it is solved."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    environment, judge = gymnasium.make("CartPole-v1"), gymnasium.make("CartPole-v1")
    model = network()
    target = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    replay = PrioritizedReplayBuffer(
        20_000, alpha=alpha, beta=0.4, beta_steps=steps, seed=seed, normalize="mean", storage="arrays"
    )
    curve: list[float] = []
    observation, _ = environment.reset(seed=seed)
    for step in range(1, steps + 1):
        if rng.random() < max(0.05, 1.0 - step / 5_000):
            action = int(rng.integers(2))
        else:
            with torch.no_grad():
                action = int(model(torch.from_numpy(observation)).argmax())
        following, reward, ended, cut, _ = environment.step(action)
        replay.add((observation, action, np.float32(reward), following, np.float32(ended)))
        observation = environment.reset()[0] if ended or cut else following
        if len(replay) >= 1_000:
            learn(model, target, optimizer, replay, batch_size, gamma)
        if step % EVERY == 0:
            curve.append(evaluate(model, judge, seed=10_000 + 100 * seed))
            if curve[-1] >= SOLVED:
                break
    return curve


def learn(
    model: nn.Module,
    target: nn.Module,
    optimizer: torch.optim.Optimizer,
    replay: PrioritizedReplayBuffer,
    batch_size: int,
    gamma: float,
) -> None:
    """Take one gradient step on one batch and report its errors to the buffer."""
    batch, weights, indices = replay.sample(batch_size)
    states, actions, rewards, following, ended = (torch.from_numpy(leaf) for leaf in batch)
    with torch.no_grad():
        best = model(following).argmax(1, keepdim=True)
        goal = rewards + gamma * (1.0 - ended) * target(following).gather(1, best).squeeze(1)
    value = model(states).gather(1, actions[:, None]).squeeze(1)
    losses = nn.functional.smooth_l1_loss(value, goal, reduction="none")
    optimizer.zero_grad()
    (torch.from_numpy(weights) * losses).mean().backward()
    optimizer.step()
    replay.update_priorities(indices, goal - value)
    with torch.no_grad():
        for slow, quick in zip(target.parameters(), model.parameters(), strict=True):
            slow.lerp_(quick, 0.005)


def draw(curves: dict[str, list[list[float]]], path: Path, steps: int) -> None:
    """Save the median return by step, with the range over seeds."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    plot = importlib.import_module("matplotlib.pyplot")
    count = steps // EVERY
    at = EVERY * np.arange(1, count + 1)
    for name, runs in curves.items():
        # A solved run has stopped: it stays at its last value.
        filled = np.array([run + [run[-1]] * (count - len(run)) for run in runs])
        (line,) = plot.plot(at, np.median(filled, axis=0), label=name)
        plot.fill_between(at, filled.min(axis=0), filled.max(axis=0), alpha=0.15, color=line.get_color())
    plot.axhline(SOLVED, linestyle=":", color="grey")
    plot.xlabel("environment steps")
    plot.ylabel("average return of 10 greedy episodes")
    plot.legend()
    plot.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Run both kinds of replay over all seeds; return the median steps to solve of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--alpha", type=float, default=0.6)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--quick", action="store_true", help="one seed, 2000 steps")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds, steps = (1, 2_000) if options.quick else (options.seeds, options.steps)
    curves: dict[str, list[list[float]]] = {"uniform": [], "prioritized": []}
    for seed in range(seeds):
        for name, alpha in (("uniform", 0.0), ("prioritized", options.alpha)):
            curves[name].append(train(alpha, seed, steps))
            print(f"seed {seed} {name:<12} {solved_at(curves[name][-1]):>8} steps", flush=True)
    medians = {name: statistics.median(solved_at(run) for run in runs) for name, runs in curves.items()}
    print(f"median steps to an average return of {SOLVED:.0f} (inf: not within {steps}): {medians}")
    if options.picture:
        draw(curves, options.picture, steps)
    return medians


def solved_at(curve: list[float]) -> float:
    """Return the step of the first evaluation that counts as solved, or infinity."""
    return EVERY * len(curve) if curve[-1] >= SOLVED else float("inf")


if __name__ == "__main__":
    main()
