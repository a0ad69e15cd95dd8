"""A partially observable grid world whose rare successes are replayed from a hybrid buffer.

    python examples/pomdp_grid.py
    python examples/pomdp_grid.py --quick

The agent sees the three by three cells around it, and at the first step a cue that says behind which of two doors
at the far end the goal lies; the cue is gone afterwards, so it takes memory. A GRU is trained by REINFORCE with a
baseline (Williams 1992); the goal pays 1, the wrong door and running out of time 0. Half of every update can come
from replay: past episodes that reached the goal, imitated (Oh et al. 2018, "Self-imitation learning"). Compared at
equally many episodes and gradients: no replay (twice as many fresh gradients on the same episodes), a reservoir, and
`HybridSRLReplayBuffer`, whose embedding of an episode is the GRU's last hidden state and whose recall
score is how likely the policy finds the episode's actions now. The task changes half way (doors swap their meaning
for the cue), so what was learned has to be forgotten, too.
Three seeds of 160 updates: no replay is best, the reservoir does not get over the change, the hybrid buffer does.
Needs: torch.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from learnit_r8.replay import HybridSRLReplayBuffer

LENGTH, LIMIT, EPISODES = 6, 24, 32
MOVES = np.array([(0, 1), (0, -1), (1, 0), (-1, 0)])
KINDS = ("none", "reservoir", "hybrid")


@dataclass(frozen=True)
class Episode:
    """What was seen `[t, 11]`, done `[t]` and earned."""

    seen: np.ndarray
    actions: np.ndarray
    reward: float


class Corridor:
    """A corridor of width 3; doors at both sides of its far end, one of them right, and a cue at the start."""

    def __init__(self, rng: np.random.Generator, *, swapped: bool) -> None:
        self.place = np.array([1, 0])
        self.cue = int(rng.integers(2))
        self.goal = 2 * (self.cue ^ int(swapped))
        self.time = 0

    def look(self) -> np.ndarray:
        """Return walls around the agent, and the cue at the first step."""
        rows, columns = np.meshgrid(self.place[0] + np.arange(-1, 2), self.place[1] + np.arange(-1, 2), indexing="ij")
        walls = (rows < 0) | (rows > 2) | (columns < 0) | (columns >= LENGTH)
        cue = np.eye(2)[self.cue] if self.time == 0 else np.zeros(2)
        return np.concatenate([walls.reshape(-1), cue]).astype(np.float32)

    def move(self, action: int) -> tuple[float, bool]:
        """Return what that earns, and whether the episode is over."""
        self.time += 1
        self.place = np.clip(self.place + MOVES[action], 0, [2, LENGTH - 1])
        at_a_door = self.place[1] == LENGTH - 1 and self.place[0] != 1
        return float(at_a_door and self.place[0] == self.goal), bool(at_a_door or self.time == LIMIT)


class Policy(nn.Module):
    """A GRU over what is seen; logits for four moves and a value."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.GRU(11, 48, batch_first=True)
        self.head = nn.Linear(48, 5)

    def forward(self, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return log-probabilities `[n, t, 4]`, values `[n, t]` and hidden states `[n, t, 48]`."""
        hidden, _ = self.memory(seen)
        out = self.head(hidden)
        return torch.log_softmax(out[..., :4], -1), out[..., 4], hidden


def play(policy: Policy, rng: np.random.Generator, *, swapped: bool) -> list[Episode]:
    """Return a batch of episodes, all at once."""
    worlds = [Corridor(rng, swapped=swapped) for _ in range(EPISODES)]
    seen: list[list[np.ndarray]] = [[] for _ in worlds]
    actions: list[list[int]] = [[] for _ in worlds]
    rewards, over, hidden = np.zeros(EPISODES), np.zeros(EPISODES, bool), None
    with torch.no_grad():
        while not over.all():
            views = np.stack([world.look() for world in worlds])
            out, hidden = policy.memory(torch.from_numpy(views)[:, None], hidden)
            p = torch.softmax(policy.head(out)[:, 0, :4], -1).double().numpy()
            chosen = (p.cumsum(1) < rng.random((EPISODES, 1)) * p.sum(1, keepdims=True)).sum(1).clip(0, 3)
            for k in np.flatnonzero(~over):
                seen[k].append(views[k])
                actions[k].append(int(chosen[k]))
                rewards[k], over[k] = worlds[k].move(int(chosen[k]))
    return [Episode(np.stack(s), np.array(a), float(r)) for s, a, r in zip(seen, actions, rewards, strict=True)]


def padded(episodes: list[Episode]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what was seen, the actions, and where there was a step."""
    seen, actions = np.zeros((len(episodes), LIMIT, 11), np.float32), np.zeros((len(episodes), LIMIT), np.int64)
    lengths = np.array([len(episode.actions) for episode in episodes])
    for k, episode in enumerate(episodes):
        seen[k, : lengths[k]], actions[k, : lengths[k]] = episode.seen, episode.actions
    there = np.arange(LIMIT) < lengths[:, None]
    return torch.from_numpy(seen), torch.from_numpy(actions), torch.from_numpy(there.astype(np.float32))


def loss_of(policy: Policy, episodes: list[Episode]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the policy's loss, the mean probability of each episode's actions, and its last hidden state."""
    seen, actions, there = padded(episodes)
    logs, values, hidden = policy(seen)
    taken = logs.gather(-1, actions[..., None])[..., 0]
    returns = torch.tensor([episode.reward for episode in episodes])[:, None] * 0.98 ** (
        there.sum(1, keepdim=True) - 1 - torch.arange(LIMIT)
    ).clamp(min=0)
    advantage = (returns - values).detach()
    entropy = -(logs.exp() * logs).sum(-1)
    each = -taken * advantage + 0.5 * (returns - values) ** 2 - 0.02 * entropy
    likely = torch.exp((taken * there).sum(1) / there.sum(1)).detach()
    last = hidden[torch.arange(len(episodes)), there.sum(1).long() - 1].detach()
    return (each * there).sum() / there.sum(), likely, last


def run(kind: str, seed: int, updates: int) -> np.ndarray:
    """Return the share of episodes that reached the goal, by update."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    eviction = "reservoir" if kind == "reservoir" else "fifo"
    buffer = HybridSRLReplayBuffer(256, mastery_threshold=0.8, alpha=0.5, beta=0.0, eviction=eviction, seed=seed)
    reached = np.zeros(updates)
    for update in range(updates):
        fresh = play(policy, rng, swapped=update >= updates // 2)
        reached[update] = np.mean([episode.reward for episode in fresh])
        for turn in range(2):
            replayed = turn == 1 and kind != "none" and len(buffer) > 0
            items = []
            if replayed and kind == "hybrid":
                items = buffer.get_due_samples(update, EPISODES)
            elif replayed:
                held = buffer.get_due_samples(np.inf, len(buffer))
                items = [held[k] for k in rng.choice(len(held), min(len(held), EPISODES), replace=False)]
            loss, likely, last = loss_of(policy, [item.experience for item in items] or fresh)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            if items:
                buffer.update_after_replay(items, likely.numpy(), update)
            elif turn == 0:
                for episode, embedding in zip(fresh, last.numpy(), strict=True):
                    if episode.reward > 0:
                        buffer.add(episode, embedding, step=update)
    return reached


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train with every kind of replay; return the share of episodes that reached the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--quick", action="store_true", help="one seed, 40 updates")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds, updates = (1, 40) if options.quick else (options.seeds, options.updates)
    found = {}
    print(f"{seeds} seeds, {updates} updates of {EPISODES} episodes: share of episodes that reach the goal")
    for kind in KINDS:
        curves = np.stack([run(kind, seed, updates) for seed in range(seeds)])
        half, tail = updates // 2, max(1, updates // 20)
        cells = [
            f"{name} {values.mean():.3f} ({values.std():.3f})"
            for name, values in (
                ("over all", curves.mean(1)),
                ("before the change", curves[:, half - tail : half].mean(1)),
                ("at the end", curves[:, -tail:].mean(1)),
            )
        ]
        print(f"{kind:<10} " + "   ".join(cells), flush=True)
        found[kind] = float(curves.mean())
    return found


if __name__ == "__main__":
    main()
