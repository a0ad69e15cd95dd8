"""Which prompts get rollouts: PromptScheduler against uniform draws and against oversampling, all rollouts counted.

    python -m benchmarks.prompts            # 8 tasks, 10 seeds, three ways: half an hour
    python -m benchmarks.prompts --quick    # 2 seeds

Six tasks are contextual bandits: a prompt is an input, a completion one of the classes, its reward 1 where it is
right. The others are walks in a grid world, and a small transformer that learns arithmetic. All are trained with GRPO
(Shao et al. 2024, equation 3, on-policy). "oversample" draws twice as many prompts as a
step takes and throws away groups whose rewards are alike, as DAPO's dynamic sampling does (Yu et al. 2025). Printed,
per task: the final score (the chance of a right answer on held-out prompts), its difference from uniform with a 95%
interval over seeds, the share of mixed groups, and after what share of the rollouts uniform's final score is reached.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_digits, load_wine, make_classification

from benchmarks.arithmetic import ANSWERS, QUESTIONS, warmed_up
from benchmarks.harness import columns, main, progress
from learnit_r8.prompts import PromptScheduler

GROUP, PROMPTS, HIDDEN, RATE = 8, 16, 64, 3e-3
Array = NDArray[np.float64]
Data = tuple[Array, NDArray[np.int64]]


def sums() -> Data:
    """All sums, products' last digits and maxima of two digits, one-hot: arithmetic without language."""
    cases = [(kind, a, b) for kind in range(3) for a in range(10) for b in range(10)]
    answers = [(max(a, b), a + b, a * b % 10)[kind] for kind, a, b in cases]
    parts = [np.eye(size)[[case[column] for case in cases]] for column, size in enumerate((3, 10, 10))]
    pairs = np.eye(300)[np.arange(300)]  # what no additive model knows
    return np.hstack([*parts, pairs]), np.array(answers)


def spirals() -> Data:
    """Three arms that wind round each other, as 40 random waves."""
    rng = np.random.default_rng(3)
    turn, arm = rng.random(1500) * 7, rng.integers(3, size=1500)
    angle = turn + arm * 2 * np.pi / 3
    points = np.column_stack([np.cos(angle), np.sin(angle)]) * turn[:, None] + rng.normal(0, 0.15, (1500, 2))
    return np.cos(points @ rng.normal(0, 0.7, (2, 40)) + rng.random(40) * 6.3), arm


TASKS: dict[str, Callable[[], Data]] = {
    "digits": lambda: load_digits(return_X_y=True),
    "cancer": lambda: load_breast_cancer(return_X_y=True),
    "wine": lambda: load_wine(return_X_y=True),
    "sums": sums,
    "spirals": spirals,
    "20 classes": lambda: make_classification(
        3000, 30, n_informative=12, n_classes=20, n_clusters_per_class=1, class_sep=1.5, random_state=0
    ),
}
# Budgets at whose end uniform draws still gain.
STEPS = {"digits": 400, "cancer": 60, "wine": 60, "sums": 800, "spirals": 200, "20 classes": 1000,
         "grid world": 300, "transformer": 1500}  # fmt: skip
# For these all prompts are known, and what counts is how many are answered.
CLOSED = {"sums"}


class Policy:
    """One hidden layer, trained by Adam."""

    def __init__(self, inputs: int, classes: int, rng: np.random.Generator) -> None:
        self.weights = [rng.normal(0, inputs**-0.5, (inputs, HIDDEN)), np.zeros((HIDDEN, classes))]
        self.moments = [[np.zeros_like(w), np.zeros_like(w)] for w in self.weights]
        self.steps = 0

    def chances(self, x: Array) -> tuple[Array, Array]:
        hidden = np.tanh(x @ self.weights[0])
        logits = hidden @ self.weights[1]
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return hidden, odds / odds.sum(1, keepdims=True)

    def learn(self, x: Array, hidden: Array, chances: Array, answers: NDArray[np.int64], rewards: Array) -> None:
        """Take one GRPO step: answers and rewards are `[prompts, group]`."""
        advantages = normalised(rewards)
        push = -chances * advantages.sum(1, keepdims=True)
        np.add.at(push, (np.arange(len(x))[:, None], answers), advantages)
        self._step(x, hidden, push / answers.size)

    def follow(
        self, x: Array, hidden: Array, chances: Array, moves: NDArray[np.int64], advantages: Array, count: int
    ) -> None:
        """Take one GRPO step on the moves of `count` walks."""
        push = -chances * advantages[:, None]
        push[np.arange(len(x)), moves] += advantages
        self._step(x, hidden, push / count)

    def _step(self, x: Array, hidden: Array, push: Array) -> None:
        back = (push @ self.weights[1].T) * (1 - hidden**2)
        self.steps += 1
        for weights, moments, gradient in zip(self.weights, self.moments, (x.T @ back, hidden.T @ push), strict=True):
            moments[0] += 0.1 * (gradient - moments[0])
            moments[1] += 0.001 * (gradient**2 - moments[1])
            scale = np.sqrt(moments[1] / (1 - 0.999**self.steps)) + 1e-8
            weights += RATE * moments[0] / (1 - 0.9**self.steps) / scale


class Bandit:
    """A prompt is an input, a completion one of the classes, its reward 1 where that is right."""

    def __init__(self, name: str, rng: np.random.Generator) -> None:
        x, y = TASKS[name]()
        x = np.asarray((x - x.mean(0)) / (x.std(0) + 1e-8) / (1 if name != "sums" else 4))
        order = rng.permutation(len(x))
        self.test = order[: len(x) // 4] if name not in CLOSED else order
        self.pool = order[len(x) // 4 :] if name not in CLOSED else order
        self.policy = Policy(x.shape[1], int(y.max()) + 1, rng)
        self.x, self.y, self.rng, self.prompts = x, y, rng, len(self.pool)

    def score(self) -> float:
        """Return the chance of a right answer, here and below over all that is asked in the end."""
        chances = self.policy.chances(self.x[self.test])[1]
        return float(chances[np.arange(len(self.test)), self.y[self.test]].mean())

    def roll(self, chosen: NDArray[np.int64]) -> Array:
        """Return the rewards of each prompt's group, `[prompts, group]`."""
        ids = self.pool[chosen]
        hidden, chances = self.policy.chances(self.x[ids])
        draws = self.rng.random((len(ids), GROUP, 1))
        answers = (chances.cumsum(1)[:, None] < draws).sum(2).clip(max=chances.shape[1] - 1)
        rewards = (answers == self.y[ids][:, None]).astype(float)
        self.rolled = self.x[ids], hidden, chances, answers, rewards
        return rewards

    def learn(self, kept: Any) -> None:
        """Take one GRPO step on groups of the last roll."""
        self.policy.learn(*(part[kept] for part in self.rolled))


class GridWorld:
    """A prompt is where to start and where to go in a maze of 6 x 6, a completion a walk of at most 12 steps."""

    SIDE, MOST = 6, 12

    def __init__(self, rng: np.random.Generator) -> None:
        self.next, self.cells = _maze(np.random.default_rng(1), self.SIDE)
        self.starts, self.goals = (part.ravel() for part in np.meshgrid(self.cells, self.cells, indexing="ij"))
        self.pairs = np.flatnonzero(self.starts != self.goals)
        self.policy = Policy(2 * self.SIDE**2, 4, rng)
        self.rng, self.prompts = rng, len(self.pairs)

    def _inputs(self, here: NDArray[np.int64], goals: NDArray[np.int64]) -> Array:
        eye = np.eye(self.SIDE**2)
        return np.hstack([eye[here], eye[goals]])

    def score(self) -> float:
        count = len(self.cells)
        chances = self.policy.chances(self._inputs(self.starts, self.goals))[1].reshape(count, count, 4)
        there = np.searchsorted(self.cells, self.next[self.cells])
        reach = np.eye(count)
        for _ in range(self.MOST):
            reach = (chances * reach[there].transpose(0, 2, 1)).sum(2)
            np.fill_diagonal(reach, 1.0)
        return float(reach[~np.eye(count, dtype=bool)].mean())

    def roll(self, chosen: NDArray[np.int64]) -> Array:
        here, goals = (part[self.pairs[chosen]].repeat(GROUP) for part in (self.starts, self.goals))
        self.walks = []
        for _ in range(self.MOST):
            if not len(live := np.flatnonzero(here != goals)):
                break
            x = self._inputs(here[live], goals[live])
            hidden, chances = self.policy.chances(x)
            moves = (chances.cumsum(1) < self.rng.random((len(live), 1))).sum(1).clip(max=3)
            self.walks.append((live, x, hidden, chances, moves))
            here[live] = self.next[here[live], moves]
        self.rewards = (here == goals).astype(float).reshape(-1, GROUP)
        return self.rewards

    def learn(self, kept: Any) -> None:
        advantages = np.zeros_like(self.rewards)
        advantages[kept] = normalised(self.rewards[kept])
        live, x, hidden, chances, moves = (np.concatenate(part) for part in zip(*self.walks, strict=True))
        self.policy.follow(x, hidden, chances, moves, advantages.ravel()[live], len(self.rewards[kept]) * GROUP)


def _maze(rng: np.random.Generator, side: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each move leads from each cell, `[cells, 4]`, and the cells of a maze that is all connected."""
    while True:
        free = rng.random((side + 2, side + 2)) > 0.25
        free[[0, -1]] = free[:, [0, -1]] = False
        rows, columns_ = np.divmod(np.arange(side * side), side)
        moves = []
        for down, right in ((0, 1), (1, 0), (0, -1), (-1, 0)):
            r, c = rows + down, columns_ + right
            moves.append(np.where(free[r + 1, c + 1], r * side + c, np.arange(side * side)))
        there, cells = np.column_stack(moves), np.flatnonzero(free[1:-1, 1:-1].ravel())
        reached_, fresh = {int(cells[0])}, [int(cells[0])]
        while fresh:
            fresh = [cell for cell in set(there[fresh].ravel().tolist()) if cell not in reached_]
            reached_ |= set(fresh)
        if len(reached_) == len(cells):
            return there, cells


class Transformer:
    """Larger one, sum and product of two digits (the last digit of it), by a GPT-2 of two layers of 32.

    It has seen 300 batches of answers of which .7, .4 and .25 were right.
    """

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model, self.prompts = warmed_up(seed), len(ANSWERS)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def score(self) -> float:
        with torch.no_grad():
            chances = torch.softmax(self.model(QUESTIONS).logits[:, -1], -1)
        return float(chances.gather(1, ANSWERS[:, None]).mean())

    def roll(self, chosen: NDArray[np.int64]) -> Array:
        ids = torch.from_numpy(chosen)
        logs = torch.log_softmax(self.model(QUESTIONS[ids]).logits[:, -1], -1)
        answers = torch.multinomial(logs.detach().exp(), GROUP, replacement=True)
        rewards = (answers == ANSWERS[ids, None]).double().numpy()
        self.rolled = logs.gather(1, answers), rewards
        return rewards

    def learn(self, kept: Any) -> None:
        logs, rewards = (part[kept] for part in self.rolled)
        loss = -(logs * torch.from_numpy(normalised(rewards))).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def normalised(rewards: Array) -> Array:
    """Return the advantages of groups."""
    return (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-4)


def make(name: str, seed: int, rng: np.random.Generator) -> Any:
    """Return a task."""
    return Transformer(seed) if name == "transformer" else GridWorld(rng) if name == "grid world" else Bandit(name, rng)


def train(name: str, way: str, seed: int, steps: int) -> tuple[Array, float]:
    """Return the score after each hundredth of the rollouts, and the share of groups that were mixed."""
    rng = np.random.default_rng(seed)
    task = make(name, seed, rng)
    prompts = PromptScheduler(range(task.prompts), GROUP, seed)
    left, budget, scores, mixed, groups = steps * PROMPTS, steps * PROMPTS, [], 0, 0
    while left > 0:
        if way == "scheduler":
            chosen = np.array(prompts.draw(PROMPTS), np.int64)
        else:
            count = PROMPTS * (2 if way == "oversample" else 1)
            chosen = rng.choice(task.prompts, min(task.prompts, count), replace=False)
        left -= len(chosen)
        rewards = task.roll(chosen)
        teaches = np.ptp(rewards, axis=1) > 0
        mixed, groups = mixed + int(teaches.sum()), groups + len(chosen)
        if way == "scheduler":
            for key, of_group in zip(chosen.tolist(), rewards, strict=True):
                prompts.update(key, of_group)
        kept = np.flatnonzero(teaches)[:PROMPTS] if way == "oversample" else np.arange(len(chosen))
        if len(kept):
            task.learn(kept)
        while len(scores) < 100 and left <= budget * (1 - (len(scores) + 1) / 100):
            scores.append(task.score())
    return np.array(scores), mixed / groups


def reached(curve: Array, score: float) -> float:
    """Return the share of the rollouts after which a curve reaches a score, infinity where it does not."""
    there = np.flatnonzero(curve >= score)
    return (there[0] + 1) / 100 if len(there) else np.inf


def run(seeds: int = 10, first: int = 100, only: str = "", *, quick: bool = False) -> dict[str, Any]:
    """Measure all ways on all tasks; `quick` takes 2 seeds. The numbers below 100 were used for tuning."""
    torch.set_num_threads(1)
    seeds, rows = 2 if quick else seeds, []
    for name in only.split(",") if only else STEPS:
        found = {}
        for way in ("uniform", "scheduler", "oversample"):
            progress(f"{name}, {way}")
            found[way] = [train(name, way, first + seed, STEPS[name]) for seed in range(seeds)]
        level = np.mean([curve for curve, _ in found["uniform"]], 0)[-1]
        for way, runs in found.items():
            final = np.array([curve[-1] for curve, _ in runs])
            off = final - [curve[-1] for curve, _ in found["uniform"]]
            rows.append({
                "task": name, "way": way, "score": final.mean(), "above uniform": off.mean(),
                "half interval": 1.96 * off.std(ddof=1) / seeds**0.5, "mixed": np.mean([share for _, share in runs]),
                "rollouts": reached(np.mean([curve for curve, _ in runs], 0), level),
            })  # fmt: skip
    return {"rows": rows, "seeds": seeds}


def table(results: dict[str, Any]) -> str:
    lines = [
        [row["task"], row["way"], f"{row['score']:.3f}", f"{row['above uniform']:+.4f} +- {row['half interval']:.4f}",
         f"{row['mixed']:.2f}", f"{row['rollouts']:.2f}"]
        for row in results["rows"]
    ]  # fmt: skip
    head = f"{results['seeds']} seeds, steps of {PROMPTS} prompts and {GROUP} completions each"
    return "\n".join([head, columns(("task", "prompts", "score", "above uniform", "mixed groups", "rollouts"), lines)])


if __name__ == "__main__":
    main(run, table, __doc__)
