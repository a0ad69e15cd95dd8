"""Which prompts get rollouts: PromptScheduler against uniform draws and against oversampling, all rollouts counted.

    python -m benchmarks.prompts            # 6 tasks, 10 seeds, three ways: a few minutes
    python -m benchmarks.prompts --quick    # 2 seeds

Each task is a contextual bandit that is trained with GRPO (Shao et al. 2024, equation 3, on-policy): a prompt is an
input, a completion one of the classes, its reward 1 where it is right. "oversample" draws twice as many prompts as a
step takes and throws away groups whose rewards are alike, as DAPO's dynamic sampling does (Yu et al. 2025). Printed,
per task: the final score (the chance of a right answer on held-out prompts), its difference from uniform with a 95%
interval over seeds, the share of mixed groups, and after what share of the rollouts uniform's final score is reached.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_digits, load_wine, make_classification

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
STEPS = {"digits": 400, "cancer": 60, "wine": 60, "sums": 800, "spirals": 200, "20 classes": 1000}
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
        advantages = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-4)
        push = -chances * advantages.sum(1, keepdims=True)
        np.add.at(push, (np.arange(len(x))[:, None], answers), advantages)
        push /= answers.size
        back = (push @ self.weights[1].T) * (1 - hidden**2)
        self.steps += 1
        for weights, moments, gradient in zip(self.weights, self.moments, (x.T @ back, hidden.T @ push), strict=True):
            moments[0] += 0.1 * (gradient - moments[0])
            moments[1] += 0.001 * (gradient**2 - moments[1])
            scale = np.sqrt(moments[1] / (1 - 0.999**self.steps)) + 1e-8
            weights += RATE * moments[0] / (1 - 0.9**self.steps) / scale


def train(name: str, way: str, seed: int, steps: int) -> tuple[Array, float]:
    """Return the score after each hundredth of the rollouts, and the share of groups that were mixed."""
    x, y = TASKS[name]()
    x = np.asarray((x - x.mean(0)) / (x.std(0) + 1e-8) / (1 if name != "sums" else 4))
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(x))
    test = order[: len(x) // 4] if name not in CLOSED else order
    pool = order[len(x) // 4 :] if name not in CLOSED else order
    policy = Policy(x.shape[1], int(y.max()) + 1, rng)
    prompts = PromptScheduler(range(len(pool)), GROUP, seed)
    left, budget, scores, mixed, groups = steps * PROMPTS, steps * PROMPTS, [], 0, 0
    while left > 0:
        if way == "scheduler":
            chosen = np.array(prompts.draw(PROMPTS), np.int64)
        else:
            chosen = rng.choice(len(pool), min(len(pool), PROMPTS * (2 if way == "oversample" else 1)), replace=False)
        left -= len(chosen)
        ids = pool[chosen]
        hidden, chances = policy.chances(x[ids])
        answers = (chances.cumsum(1)[:, None] < rng.random((len(ids), GROUP, 1))).sum(2).clip(max=chances.shape[1] - 1)
        rewards = (answers == y[ids][:, None]).astype(float)
        teaches = np.ptp(rewards, axis=1) > 0
        mixed, groups = mixed + int(teaches.sum()), groups + len(ids)
        if way == "scheduler":
            for key, of_group in zip(chosen.tolist(), rewards, strict=True):
                prompts.update(key, of_group)
        kept = np.flatnonzero(teaches)[:PROMPTS] if way == "oversample" else slice(None)
        policy.learn(x[ids][kept], hidden[kept], chances[kept], answers[kept], rewards[kept])
        while len(scores) < 100 and left <= budget * (1 - (len(scores) + 1) / 100):
            scores.append(policy.chances(x[test])[1][np.arange(len(test)), y[test]].mean())
    return np.array(scores), mixed / groups


def reached(curve: Array, score: float) -> float:
    """Return the share of the rollouts after which a curve reaches a score, infinity where it does not."""
    there = np.flatnonzero(curve >= score)
    return (there[0] + 1) / 100 if len(there) else np.inf


def run(seeds: int = 10, first: int = 100, *, quick: bool = False) -> dict[str, Any]:
    """Measure all ways on all tasks; `quick` takes 2 seeds. The numbers below 100 were used for tuning."""
    seeds, rows = 2 if quick else seeds, []
    for name in TASKS:
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
