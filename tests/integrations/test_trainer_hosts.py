"""Backups of what is trained, importance weights and losses of one's own, in the Hugging Face Trainer and TRL's."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from learnit_r8 import R8Scheduler
from learnit_r8.errors import ProtocolError
from tests.integrations.test_trainer_progress import LORA, MODEL, Run
from tests.trainer_cases import BATCH, CASES, ROWS, Rows, classes, transformers
from tests.trainer_equality import Notices, Reports, mixed, trained


def plain_args(folder: Any, **options: Any) -> Any:
    options = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1} | options
    options |= {"save_strategy": "no"}
    return transformers.TrainingArguments(str(folder), **options)


def test_backups_hold_what_is_trained_and_bring_it_back(tmp_path):
    pytest.importorskip("peft")
    run = Run(tmp_path, model=LORA, args={"save_strategy": "no"})
    state = run.trainer._backups.capture()
    size = sum(part.numel() for part in state["weights"].values())
    assert size < sum(p.numel() for p in run.trainer.model.parameters()) / 2
    kept = {name: part.clone() for name, part in state["weights"].items()}
    with torch.no_grad():
        for p in run.trainer.model.parameters():
            if p.requires_grad:
                p.fill_(torch.nan)
    run.trainer._backups.restore(state | {"weights": kept})
    assert torch.equal(trained(run.trainer.model), run.weights)


def test_frozen_weights_that_training_writes_to_are_backed_up(tmp_path):
    """As a teacher is, that follows the student."""

    class Follow(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **options):
            with torch.no_grad():
                model.classifier.bias.add_(1.0)

    from learnit_r8.integrations.huggingface import R8Trainer

    model = MODEL()
    model.classifier.bias.requires_grad_(False)
    model.bert.pooler.dense.bias.requires_grad_(False)
    scheduler = R8Scheduler(ROWS, BATCH, num_epochs=1, ui="off", checkpoint_dir=None)
    args = plain_args(tmp_path)
    trainer = R8Trainer(model, args, train_dataset=classes(), scheduler=scheduler, callbacks=[Follow()])
    trainer.train()
    held = trainer._backups.capture()["weights"]
    assert "classifier.bias" in held
    assert "bert.pooler.dense.bias" not in held


def test_an_optimizer_that_cannot_load_its_state_is_told_at_the_first_backup(tmp_path):
    class Stubborn(torch.optim.SGD):
        def load_state_dict(self, state_dict):
            if state_dict["state"]:
                raise KeyError("no such state")
            super().load_state_dict(state_dict)

    from learnit_r8.integrations.huggingface import R8Trainer

    model, notices = MODEL(), Notices()
    scheduler = R8Scheduler(ROWS, BATCH, num_epochs=2, backup_every=2, ui="off", checkpoint_dir=None, sinks=(notices,))
    args = plain_args(tmp_path)
    optimizer = Stubborn(model.parameters(), lr=0.1, momentum=0.9)
    trainer = R8Trainer(model, args, train_dataset=classes(), scheduler=scheduler, optimizers=(optimizer, None))
    with pytest.warns(RuntimeWarning, match="Stubborn cannot load"):
        trainer.train()
    assert sum("Stubborn" in notice for notice in notices) == 1


class Weighted:
    """Draws four samples of which only the last counts."""

    catalogs = False

    def draw(self, request):
        from learnit_r8.strategies import Draw

        ids = np.arange(request.cursor * BATCH, request.cursor * BATCH + request.size) % ROWS
        return Draw(ids, weights=np.array([0.0, 0.0, 0.0, 4.0], np.float32)[: request.size])


@pytest.mark.parametrize("name", ["llama", "dpo", "weights in forward", "own compute_loss", "kto"])
def test_importance_weights_reach_the_loss_or_the_run_says_that_they_do_not(tmp_path, name):
    pytest.importorskip("trl")
    case, notices = CASES[name], Notices()
    scheduler = R8Scheduler(
        ROWS, BATCH, num_epochs=1, initial_lr=1e-9, strategy=Weighted(), ui="off", checkpoint_dir=None, sinks=(notices,)
    )
    reports = Reports(scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = mixed(case, tmp_path, scheduler)
        trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if not case.per_sample:
        assert sum("weights are not applied" in notice for notice in notices) == 1
        assert [losses[0] for losses in reports.losses] == pytest.approx(logged, rel=1e-4)
        return
    assert not any("weights" in notice for notice in notices)
    if name == "dpo":  # the mean of a batch is that of its samples
        assert logged == pytest.approx([losses[3] for losses in reports.losses], rel=1e-4)
    else:
        rows = case.rows()
        tokens = [[int((rows[i]["labels"][1:] != -100).sum()) for i in batch] for batch in reports.batches]
        wanted = [4 * t[3] * losses[3] / sum(t) for t, losses in zip(tokens, reports.losses, strict=True)]
        assert logged == pytest.approx(wanted, rel=1e-4)


def test_losses_noted_in_ones_own_compute_loss_are_reported_and_weighted(tmp_path):
    from torch.nn import functional

    from learnit_r8.integrations.huggingface import R8Trainer

    class Focal(R8Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            losses = functional.cross_entropy(outputs.logits, labels, reduction="none")
            losses = (1 - (-losses).exp()) ** 2 * losses
            if model.training:
                self.note_sample_losses(losses)
            return (losses.mean(), outputs) if return_outputs else losses.mean()

    scheduler = R8Scheduler(
        ROWS, BATCH, num_epochs=1, initial_lr=1e-9, strategy=Weighted(), ui="off", checkpoint_dir=None
    )
    reports = Reports(scheduler)
    args = plain_args(tmp_path)
    trainer = Focal(MODEL(), args, train_dataset=classes(), eval_dataset=Rows(classes().rows[:4]), scheduler=scheduler)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([losses[3] for losses in reports.losses], rel=1e-4)
    assert np.isfinite(trainer.evaluate()["eval_loss"])


def test_a_function_that_the_host_does_not_call_is_refused_in_the_first_step(tmp_path):
    scheduler = R8Scheduler(ROWS, BATCH, num_epochs=1, ui="off", checkpoint_dir=None)
    case = replace(
        CASES["own compute_loss"], extra=lambda: {"sample_loss_func": lambda outputs, labels: labels.float()}
    )
    trainer = mixed(case, tmp_path, scheduler)
    with pytest.raises(ProtocolError, match="sample_loss_func has no effect"):
        trainer.train()
