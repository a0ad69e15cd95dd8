"""Prompts through TRL's GRPOTrainer: a small transformer that learns arithmetic, against uniform draws.

    python -m benchmarks.prompts_trl            # 10 seeds, 1500 steps: hours
    python -m benchmarks.prompts_trl --quick

The task is "transformer" of `benchmarks.prompts`: answers are generated, scored and learned from by TRL, and R8Mixin
draws the prompts, "uniform" or by `Prompts`. Printed are the chance of a right answer over all prompts at the end, its
difference from uniform with a 95% interval over seeds, and after what share of the rollouts uniform's end is reached.
"""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

import numpy as np
import torch

from benchmarks.arithmetic import ANSWERS, CASES, LETTERS, QUESTIONS, warmed_up
from benchmarks.harness import columns, main, progress
from benchmarks.prompts import GROUP, PROMPTS, reached

LOOKS = 50


def tokenizer() -> Any:
    """Return one whose tokens are the letters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {letter: number for number, letter in enumerate(LETTERS)}
    made = Tokenizer(models.WordLevel(words, unk_token="="))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="=", eos_token="=", padding_side="left")


def train(way: str, seed: int, steps: int) -> np.ndarray:
    """Return the chance of a right answer at the start and after each fiftieth of the steps."""
    import datasets
    import trl
    from transformers import TrainerCallback

    from learnit_r8 import R8Scheduler
    from learnit_r8.integrations.huggingface import R8Mixin
    from learnit_r8.strategies import Prompts

    texts = ["".join(LETTERS[token] for token in row) for row in QUESTIONS.tolist()]
    right = dict(zip(texts, map(str, ANSWERS.tolist()), strict=True))
    model, scores = warmed_up(seed), []

    def look() -> None:
        model.eval()
        with torch.no_grad():
            chances = torch.softmax(model(QUESTIONS.to(model.device)).logits[:, -1].cpu(), -1)
        model.train()
        scores.append(float(chances.gather(1, ANSWERS[:, None]).mean()))

    class Look(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step * LOOKS // steps > (state.global_step - 1) * LOOKS // steps:
                look()

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [float(right[prompt] == answer) for prompt, answer in zip(prompts, completions, strict=True)]

    look()
    with tempfile.TemporaryDirectory() as folder:
        args = trl.GRPOConfig(
            folder, num_generations=GROUP, max_completion_length=1, steps_per_generation=1, beta=0.0, report_to=[],
            disable_tqdm=True, use_cpu=True, bf16=False, save_strategy="no", logging_strategy="no", loss_type="grpo",
            per_device_train_batch_size=PROMPTS * GROUP, gradient_checkpointing=False, seed=seed,
        )  # fmt: skip
        scheduler = R8Scheduler(
            len(CASES), PROMPTS, num_steps=steps, initial_lr=1e-3, scheduler_mode="constant", warmup_proportion=0.0,
            strategy=Prompts(GROUP) if way == "prompts" else "uniform", checkpoint_dir=None, seed=seed, ui="off",
            backup_every=None,
        )  # fmt: skip
        both = type("Trainer", (R8Mixin, trl.GRPOTrainer), {})
        both(
            model, reward_funcs=reward, args=args, train_dataset=datasets.Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer(), scheduler=scheduler, callbacks=[Look()],
        ).train()  # fmt: skip
    return np.array(scores)


def run(seeds: int = 10, first: int = 100, steps: int = 1500, *, quick: bool = False) -> dict[str, Any]:
    """Measure both ways; `quick` takes 20 steps of 2 seeds."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seeds, steps = (2, 20) if quick else (seeds, steps)
    curves: dict[str, list[np.ndarray]] = {"uniform": [], "prompts": []}
    for seed in range(first, first + seeds):
        for way, of_way in curves.items():
            of_way.append(train(way, seed, steps))
            progress(f"seed {seed}, {way}: {of_way[-1][-1]:.3f}")
    ends = {way: np.array([curve[-1] for curve in of_way]) for way, of_way in curves.items()}
    off, level = ends["prompts"] - ends["uniform"], ends["uniform"].mean()
    share = reached(np.mean(curves["prompts"], 0)[1:], level) * 100 / LOOKS
    return {
        "seeds": seeds, "steps": steps, "share": share, "above uniform": off.mean(),
        "half interval": 1.96 * off.std(ddof=1) / seeds**0.5,
        "ends": {way: [float(end) for end in of_way] for way, of_way in ends.items()},
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    lines = [[way, f"{np.mean(ends):.3f}", f"{np.std(ends, ddof=1):.3f}"] for way, ends in results["ends"].items()]
    return "\n".join([
        f"{results['seeds']} seeds, {results['steps']} steps of {PROMPTS} prompts and {GROUP} completions each",
        columns(("draws", "chance of a right answer", "deviation"), lines),
        f"above uniform {results['above uniform']:+.4f} +- {results['half interval']:.4f}; uniform's end after "
        f"{results['share']:.2f} of its rollouts",
    ])  # fmt: skip


if __name__ == "__main__":
    main(run, table, __doc__)
