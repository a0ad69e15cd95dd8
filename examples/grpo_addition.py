"""GRPO on a small transformer that learns to add: which sums get the rollouts?

    python examples/grpo_addition.py
    python examples/grpo_addition.py --ui curses --kinds prompts    with solved, frontier and unsolved on the screen
    python examples/grpo_addition.py --quick

A tiny GPT-2 is warmed up on sums of which most are wrong, then trained by group-relative policy optimisation (Shao et
al. 2024), as in `grpo_replay.py`. A sample is a prompt, a batch 16 prompts with eight answers each, and what is
reported of a prompt is minus its mean reward. "uniform" draws every sum equally often, "prompts" those whose groups
are likely to be mixed (`learnit_r8.strategies.Prompts`). Rollouts are the cost, so both get equally many. Printed are
the probability of the right answer over all sums, before and after, and the share of uniform's rollouts after which
"prompts" is where uniform ends. With three seeds it was no gain here (.385 against .415 after 600 steps, deviations of
.1): most sums are equally hard, and few are solved by then, so no rollouts are saved. `python -m benchmarks.prompts`
has a transformer whose prompts differ, and there it pays.
Needs: torch, transformers.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from grpo_replay import ADDENDS, GROUP, PROMPTS, roll_out, success, update, warmed_up

from learnit_r8 import R8Scheduler
from learnit_r8.strategies import Prompts

EVERY = 10  # steps between two looks at all sums
PAIRS = np.array([(a, b) for a in range(ADDENDS) for b in range(ADDENDS)])


def run(kind: str, seed: int, *, steps: int, warm_up: int, ui: str = "off") -> list[float]:
    """Train; return the probability of the right answer before, and every ten steps."""
    model = warmed_up(seed, warm_up)
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)
    strategy = Prompts(GROUP) if kind == "prompts" else "uniform"
    course = [success(model)]
    with R8Scheduler(
        len(PAIRS), PROMPTS, num_steps=steps, initial_lr=5e-4, scheduler_mode="constant", warmup_proportion=0.0,
        strategy=strategy, checkpoint_dir=None, seed=seed, ui=ui,
    ) as scheduler:  # fmt: skip
        for _ in scheduler.epoch_iterator():
            for indices, _ in scheduler.batch_iterator():
                groups, _ = roll_out(model, PAIRS[indices])
                update(model, optimizer, groups)
                rewards = np.array([float(group.rewards.mean()) for group in groups])
                scheduler.update_with_loss(-rewards)
                if isinstance(strategy, Prompts):
                    known = strategy.prompts.metrics_dict()
                    scheduler.log(**{name: known[name] for name in ("solved", "frontier", "unsolved")})
                if scheduler.global_step % EVERY == 0:
                    course.append(success(model))
    return course


def main(arguments: list[str] | None = None) -> dict[str, list[list[float]]]:
    """Train with each way to choose; return the courses of all seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kinds", nargs="+", default=["uniform", "prompts"], choices=["uniform", "prompts"])
    parser.add_argument("--ui", default="off", help="auto, curses, rich, log or off")
    parser.add_argument("--quick", action="store_true", help="one seed, 20 steps")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds, steps, warm_up = (1, 20, 100) if options.quick else (options.seeds, options.steps, 600)
    found = {}
    print(f"{seeds} seeds, {steps} steps of {PROMPTS} prompts x {GROUP} answers: probability of the right answer")
    for kind in options.kinds:
        found[kind] = [run(kind, seed, steps=steps, warm_up=warm_up, ui=options.ui) for seed in range(seeds)]
        ends = np.array(found[kind])[:, -1]
        print(f"{kind:<10} {np.mean(found[kind], 0)[0]:.3f} -> {ends.mean():.3f} ({ends.std():.3f})", flush=True)
    if len(found) == 2:
        uniform, prompts = (np.mean(found[kind], 0) for kind in ("uniform", "prompts"))
        there = np.flatnonzero(prompts >= uniform[-1])
        share = f"{there[0] * EVERY / steps:.2f} of its rollouts" if len(there) else "not reached"
        print(f"uniform's end: {share}")
    return found


if __name__ == "__main__":
    main()
