"""TRL's GRPO and RLOO draw whole groups from R8; DPO's pairs and rewards reach the catalog by sample."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from torch.nn import functional

from learnit_r8 import R8Scheduler
from learnit_r8.errors import ConfigError
from learnit_r8.strategies import Prompts
from tests.backup_watch import BackupWatch, check_survival, random_steps
from tests.trainer_cases import BATCH, CASES, ROWS, TRL_LLAMA, texts, tokenizer
from tests.trainer_equality import Reports, mixed

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPTS = texts(prompt=(3, 6))


class Groups:
    """One run of GRPO or RLOO; the reward of a prompt is its number."""

    def __init__(
        self, folder: Any, name: str = "GRPO", strategy: Any = "uniform", resume: Any = None, **options: Any
    ) -> None:
        import trl

        from learnit_r8.integrations.huggingface import R8Mixin

        self.scheduler = R8Scheduler(
            ROWS, BATCH, num_epochs=1, initial_lr=1e-3, strategy=strategy, ui="off", checkpoint_dir=None
        )
        self.reports = Reports(self.scheduler)
        self.generated: list[list[int]] = []
        data = PROMPTS()
        texts_of = [row["prompt"] for row in data]

        def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
            self.generated.append([texts_of.index(prompt) for prompt in prompts])
            return [float(number) for number in self.generated[-1]]

        options = {"num_generations": 2, "max_completion_length": 3, "steps_per_generation": 1} | options
        options |= {"report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False, "beta": 0.0}
        args = getattr(trl, f"{name}Config")(str(folder), per_device_train_batch_size=8, **options)
        both = type("Both", (R8Mixin, getattr(trl, f"{name}Trainer")), {})
        self.trainer = both(
            TRL_LLAMA(), reward_funcs=reward, args=args, train_dataset=data, processing_class=tokenizer(),
            scheduler=self.scheduler,
        )  # fmt: skip
        self.trainer.train(resume_from_checkpoint=resume)


PARTS = {"steps_per_generation": 2, "gradient_accumulation_steps": 2}
TWICE = {"steps_per_generation": 2, "num_iterations": 2, "num_generations": 4}


@pytest.mark.parametrize(
    ("name", "options"),
    [("GRPO", {}), ("RLOO", PARTS), ("GRPO", TWICE), ("RLOO", TWICE), ("GRPO", {"gradient_accumulation_steps": 4})],
    ids=["plain", "two parts", "used twice", "used twice, RLOO", "accumulated"],
)
def test_groups_are_completions_of_one_prompt_and_rewards_reach_the_catalog(tmp_path, name, options):
    run = Groups(tmp_path, name, save_strategy="no", **options)
    size = options.get("num_generations", 2)
    groups = [drawn[i : i + size] for drawn in run.generated for i in range(0, len(drawn), size)]
    assert len(groups) == ROWS
    assert all(len(set(group)) == 1 for group in groups)
    assert sorted(group[0] for group in groups) == list(range(ROWS))
    assert run.reports.losses == [[-float(i) for i in batch] for batch in run.reports.batches]
    assert run.scheduler.global_step == ROWS // BATCH
    assert run.trainer.state.epoch == 1
    assert run.trainer.state.global_step == run.trainer.state.max_steps


def test_prompts_are_drawn_by_what_their_groups_have_shown(tmp_path):
    strategy = Prompts(2, reward_range=(0.0, ROWS))
    run = Groups(tmp_path, strategy=strategy, save_strategy="no")
    groups = [drawn[i : i + 2] for drawn in run.generated for i in range(0, len(drawn), 2)]
    assert all(len(set(group)) == 1 for group in groups)
    seen = {group[0] for group in groups}
    assert strategy.prompts.metrics_dict()["groups"] == len(groups) == ROWS
    assert all(strategy.prompts.pass_rate(i) != 0.5 or i == ROWS / 2 for i in seen)


def test_a_resumed_run_of_groups_draws_the_prompts_that_are_left(tmp_path):
    whole = Groups(tmp_path, save_strategy="steps", save_steps=4)
    again = Groups(tmp_path, save_strategy="no", resume=str(tmp_path / "checkpoint-4"))
    assert again.generated == whole.generated[4:]
    assert again.trainer.state.global_step == whole.trainer.state.global_step


def test_nan_at_random_steps_of_sft_ends_finite_and_rollbacks_bring_back_the_backup(tmp_path):
    options = {"initial_lr": 1e-3, "ui": "off", "checkpoint_dir": None, "num_epochs": 150 * BATCH // ROWS}
    watch = BackupWatch(random_steps(4), partial(R8Scheduler, ROWS, BATCH), **options)
    trainer = mixed(CASES["sft"], tmp_path, watch.scheduler)
    trainer.model.get_input_embeddings().register_forward_hook(lambda _, __, output: output * watch.factor())
    trainer.train()
    check_survival(watch.findings())


def test_a_checkpoint_amid_a_batch_of_groups_says_that_its_prompts_come_again(tmp_path):
    with pytest.warns(RuntimeWarning, match="save_steps=4, or a multiple") as said:
        whole = Groups(tmp_path, save_strategy="steps", save_steps=3, **TWICE)
    assert sum("come again" in str(one.message) for one in said) == 1
    again = Groups(tmp_path, save_strategy="no", resume=str(tmp_path / "checkpoint-6"), **TWICE)
    assert again.generated[0] == whole.generated[1]  # the second batch, from the start
    assert again.generated == whole.generated[1:]
    assert again.reports.losses == whole.reports.losses[1:]
    assert again.trainer.state.global_step == again.trainer.state.max_steps


def test_parts_that_would_leave_completions_out_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="steps_per_generation=4"):
        Groups(tmp_path, steps_per_generation=4, gradient_accumulation_steps=4)


def test_kto_that_needs_a_fixed_order_is_refused(tmp_path):
    scheduler = R8Scheduler(ROWS, BATCH, num_epochs=1, ui="off", checkpoint_dir=None)
    with pytest.raises(ConfigError, match="apo_zero_unpaired"):
        mixed(CASES["kto"], tmp_path, scheduler, loss_type="kto")


def test_each_pair_of_dpo_gets_the_loss_that_one_computes_by_hand(tmp_path):
    scheduler = R8Scheduler(ROWS, BATCH, num_epochs=1, initial_lr=1e-12, ui="off", checkpoint_dir=None)
    reports = Reports(scheduler)
    trainer = mixed(CASES["dpo"], tmp_path, scheduler, gradient_accumulation_steps=2)
    trainer.train()

    def log_probability(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            each = functional.log_softmax(model(input_ids=ids).logits[0, :-1].float(), dim=-1)
        return each.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()

    def by_hand(row: dict[str, Any]) -> float:
        ratios = [
            log_probability(trainer.model, row["prompt_ids"], row[f"{side}_ids"])
            - log_probability(trainer.ref_model, row["prompt_ids"], row[f"{side}_ids"])
            for side in ("chosen", "rejected")
        ]
        return float(-functional.logsigmoid(trainer.beta * (ratios[0] - ratios[1])))

    seen = 0
    for batch, losses in zip(reports.batches, reports.losses, strict=True):
        wanted = [by_hand(trainer.train_dataset[index]) for index in batch]
        assert losses == pytest.approx(wanted, abs=1e-5)
        seen += len(batch)
    assert seen == ROWS
    assert len({round(loss, 4) for losses in reports.losses for loss in losses}) > ROWS / 2
