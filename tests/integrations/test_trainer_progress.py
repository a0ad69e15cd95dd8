"""The Trainer's steps and the scheduler's never cut each other: epochs of any length, resumed anywhere."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch

from learnit_r8 import R8Scheduler
from learnit_r8.errors import ConfigError, ProtocolError
from learnit_r8.strategies import TokenBudget
from tests.trainer_cases import BATCH, ROWS, adapted, bert, classes, transformers
from tests.trainer_equality import Notices, Reports, trained

MODEL = bert("BertForSequenceClassification")
LORA = adapted(MODEL, "LoraConfig", task_type="SEQ_CLS", r=2, target_modules=["query"])


class EveryOtherEpochShort:
    """A strategy whose epochs differ in length."""

    catalogs = False

    def start_epoch(self, request):
        return 26 if request.epoch % 2 else ROWS

    def draw(self, request):
        return np.random.default_rng([request.epoch, request.cursor]).permutation(ROWS)[: request.size]


class Run:
    """One training; what it reported and where it ended."""

    def __init__(
        self,
        folder,
        *,
        resume=None,
        accumulation=1,
        batch=BATCH,
        model=MODEL,
        poison=(),
        bad=(),
        args=None,
        callbacks=(),
        **options,
    ):
        from learnit_r8.integrations.huggingface import R8Trainer

        transformers.set_seed(0)
        options = {
            "num_epochs": 4,
            "initial_lr": 1e-2,
            "ui": "off",
            "checkpoint_dir": None,
            "backup_every": 3,
        } | options
        self.scheduler = R8Scheduler(ROWS, batch, **options)
        self.reports = Reports(self.scheduler)
        given = {"save_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True} | (args or {})
        training = transformers.TrainingArguments(str(folder), gradient_accumulation_steps=accumulation, **given)
        self.trainer = R8Trainer(
            model(), training, train_dataset=classes(), scheduler=self.scheduler, callbacks=list(callbacks)
        )
        self._left, self._bad = set(poison), set(bad)
        if poison or bad:
            self.trainer.model.register_forward_hook(self._poison)
        self.trainer.train(resume_from_checkpoint=resume)
        self.weights = trained(self.trainer.model)

    def _poison(self, module: Any, _args: Any, outputs: Any) -> Any:
        """Spoil the batches of certain steps, and those with certain samples."""
        place = len(self.trainer._watch.notes)
        step, batch = self.scheduler.global_step + place, self.scheduler.open_batches[place]
        rows = torch.tensor([[torch.nan if index in self._bad else 1.0] for index in batch.indices.tolist()])
        if step in self._left:
            self._left.discard(step)
            rows[:] = torch.nan
        return type(outputs)(loss=outputs.loss * rows.mean(), logits=outputs.logits * rows)


def check_resumes(tmp_path, stops, **options) -> Run:
    whole = Run(tmp_path / "whole", **options)
    for stop in stops:
        resumed = Run(tmp_path / "resumed", resume=str(tmp_path / "whole" / f"checkpoint-{stop}"), **options)
        count = len(resumed.reports.batches)
        assert 0 < count < len(whole.reports.batches)
        assert resumed.reports.batches == whole.reports.batches[-count:]
        assert repr(resumed.reports.losses) == repr(whole.reports.losses[-count:])  # NaN included
        assert torch.equal(resumed.weights, whole.weights)
        assert resumed.trainer.state.global_step == whole.trainer.state.global_step
        assert resumed.trainer.state.epoch == whole.trainer.state.epoch == options.get("num_epochs", 4)
    return whole


@pytest.mark.parametrize(
    ("options", "stops"),
    [
        ({"strategy": "infobatch", "num_epochs": 6}, (20, 35)),
        ({"strategy": "infobatch", "num_epochs": 6, "accumulation": 3}, (7, 12)),
        ({"strategy": "infobatch", "num_epochs": 6, "accumulation": 3, "model": LORA}, (11,)),
        ({"strategy": EveryOtherEpochShort(), "accumulation": 4}, (4, 8)),
        ({"noise_guard": "cap", "num_epochs": 8, "initial_lr": 0.05}, (50, 65)),
        ({"bad": (3, 9, 20, 31, 36)}, (12, 24)),
        ({"bad": (3, 9, 20, 31, 36), "accumulation": 3, "model": LORA}, (6,)),
        ({"rollback_data": "replay", "poison": (9, 17), "num_epochs": 3}, (25,)),
        ({"rollback_data": "replay", "poison": (29,), "num_epochs": 3, "accumulation": 4}, (8,)),
    ],
    ids=[
        "infobatch",
        "infobatch by 3",
        "infobatch, LoRA",
        "own epochs by 4",
        "cap",
        "left out",
        "left out by 3, LoRA",
        "replay",
        "replay at the end",
    ],
)
def test_a_run_with_epochs_of_any_length_resumes_as_if_it_had_not_stopped(tmp_path, options, stops):
    pytest.importorskip("peft")
    whole = check_resumes(tmp_path, stops, **options)
    if bad := options.get("bad"):  # they were left out, and an epoch is a batch shorter
        assert not set(bad) & set(chain(*whole.reports.batches[-9:]))
        assert len(whole.reports.batches) < 40
    assert whole.trainer.state.max_steps == whole.trainer.state.global_step
    assert os.path.isdir(tmp_path / "whole" / f"checkpoint-{whole.trainer.state.global_step}")


def test_workers_draw_ahead_and_nothing_is_lost_on_resume(tmp_path):
    options = {"strategy": "infobatch", "accumulation": 3, "args": {"dataloader_num_workers": 2, "save_steps": 5}}
    check_resumes(tmp_path, (5,), **options)


@pytest.mark.parametrize("change", [{"accumulation": 2}, {"batch": 8}, {"batch": 2, "accumulation": 3}])
def test_another_batch_size_or_accumulation_on_resume_leaves_no_sample_out(tmp_path, change):
    options = {"strategy": "uniform", "accumulation": 4, "num_epochs": 3}
    whole = Run(tmp_path / "whole", **options)
    stop = 4  # in the second epoch, after its first four batches
    resumed = Run(tmp_path / "resumed", resume=str(tmp_path / "whole" / f"checkpoint-{stop}"), **options | change)
    batches = whole.reports.batches[:14] + resumed.reports.batches
    for epoch in range(3):
        drawn: list[int] = []
        while len(drawn) < ROWS:
            drawn += batches.pop(0)
        assert sorted(drawn) == list(range(ROWS)), epoch
    assert not batches
    assert resumed.trainer.state.epoch == 3


@pytest.mark.parametrize(
    ("budget", "most", "steps", "told"),
    [
        ({"num_epochs": 4}, 7, 7, "num_steps=21"),
        ({"num_epochs": 4}, 16, 16, None),
        ({"num_epochs": 4}, 99, 16, "is not reached"),
        ({"num_epochs": None, "num_steps": 24}, -1, 10, None),
        ({"num_epochs": None, "num_steps": 24, "strategy": "infobatch"}, -1, None, None),
        ({"num_epochs": None, "num_steps": 24}, 5, 5, "num_steps=15"),
        ({"num_epochs": None, "train_duration_seconds": 1e6}, 5, 5, "num_steps=15"),
    ],
)
def test_the_training_ends_at_max_steps_or_with_the_budget(tmp_path, budget, most, steps, told):
    """Ten batches an epoch, three to a step: an epoch is four steps."""
    notices = Notices()
    args = {"max_steps": most, "save_steps": 3, "logging_steps": 1}
    run = Run(tmp_path, accumulation=3, sinks=(notices,), args=args, **budget)
    state = run.trainer.state
    assert state.global_step == state.max_steps == (steps or state.global_step)
    assert [told in notice for notice in notices if "max_steps" in notice] == ([] if told is None else [True])
    if "num_steps" in budget and most < 0:
        assert run.scheduler.global_step == 24
    saved = str(tmp_path / "checkpoint-3")
    resumed = Run(tmp_path, resume=saved, accumulation=3, args=args | {"save_strategy": "no"}, **budget)
    assert resumed.trainer.state.global_step == state.global_step
    assert torch.equal(resumed.weights, run.weights) or "train_duration_seconds" in budget


def test_more_steps_go_on_amid_the_epoch_that_max_steps_ended(tmp_path):
    Run(tmp_path, args={"max_steps": 13})
    whole = Run(tmp_path / "whole", args={"max_steps": 25, "save_strategy": "no"})
    more = Run(tmp_path, resume=str(tmp_path / "checkpoint-13"), args={"max_steps": 25, "save_strategy": "no"})
    assert torch.equal(more.weights, whole.weights)
    assert more.reports.batches == whole.reports.batches[13:]
    fewer = Run(tmp_path, resume=str(tmp_path / "checkpoint-13"), args={"max_steps": 10, "save_strategy": "no"})
    assert not fewer.reports.batches
    assert fewer.trainer.state.global_step == 13


def test_shares_of_the_steps_are_shares_of_the_schedulers(tmp_path):
    args = {"save_steps": 0.5, "logging_steps": 0.25}
    run = Run(tmp_path, num_epochs=None, num_steps=24, args=args)
    assert (run.trainer.state.save_steps, run.trainer.state.logging_steps) == (12, 6)
    with pytest.raises(ConfigError, match="logging_steps, save_steps below 1"):
        Run(tmp_path, num_epochs=None, train_duration_seconds=5.0, args=args)


def test_the_search_for_a_rate_is_no_part_of_an_epoch(tmp_path):
    held: list[Any] = []
    from learnit_r8.integrations.huggingface import R8Trainer

    scheduler = R8Scheduler(
        ROWS, BATCH, num_epochs=3, auto_find_lr=True, ui="off", checkpoint_dir=None,
        state_callback=lambda: held[0]._backups.capture(), load_callback=lambda state: held[0]._backups.restore(state),
    )  # fmt: skip
    reports = Reports(scheduler)
    args = transformers.TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    held.append(R8Trainer(MODEL(), args, train_dataset=classes(), scheduler=scheduler))
    held[0].train()
    after = reports.batches[-3 * ROWS // BATCH :]
    assert [sorted(chain(*after[i : i + 10])) for i in (0, 10, 20)] == [list(range(ROWS))] * 3
    assert scheduler.global_step == 30
    assert held[0].state.epoch == 3


def test_a_checkpoint_without_the_schedulers_state_is_told(tmp_path):
    Run(tmp_path, args={"save_only_model": True, "save_steps": 7})
    with pytest.warns(RuntimeWarning, match=r"no scheduler\.pt"):
        again = Run(tmp_path, resume=str(tmp_path / "checkpoint-14"), args={"save_steps": 1000})
    assert len(again.reports.batches) == 40


def test_a_finished_run_that_is_resumed_trains_no_more(tmp_path):
    whole = Run(tmp_path, args={"save_steps": 40})
    again = Run(tmp_path, resume=str(tmp_path / "checkpoint-40"), args={"save_strategy": "no"})
    assert not again.reports.batches
    assert torch.equal(again.weights, whole.weights)


def test_a_second_training_is_refused_and_a_resumed_one_goes_on(tmp_path):
    run = Run(tmp_path, args={"save_steps": 30})
    with pytest.raises(ProtocolError, match="anew"):
        run.trainer.train()
    with pytest.raises(ProtocolError, match="objective of your search"):
        run.trainer.hyperparameter_search(lambda trial: {})
    before = len(run.reports.batches)
    run.trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-30"))
    assert len(run.reports.batches) == before + 10


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"train_sampling_strategy": "group_by_length"}, "group_by_length"),
        ({"dataloader_drop_last": True}, "drop_last"),
        ({"data_seed": 3}, "data_seed"),
        ({"dataloader_in_order": False}, "in_order"),
    ],
)
def test_what_would_be_undone_is_refused_by_name(tmp_path, args, word):
    with pytest.raises(ConfigError, match=word):
        Run(tmp_path, args=args)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_batches_of_one_length_are_a_token_budgets_and_a_resumed_run_goes_on_with_them(tmp_path, accumulation):
    from learnit_r8.integrations.huggingface import R8Trainer

    rng = np.random.default_rng(0)
    rows = [{"input_ids": torch.from_numpy(rng.integers(1, 20, size)), "labels": 1} for size in rng.integers(2, 12, 60)]
    lengths = np.array([len(row["input_ids"]) for row in rows])

    def padded(batch):
        ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in batch], batch_first=True)
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.ones(len(ids), dtype=torch.long)}

    def run(resume=None, strategy=None):
        transformers.set_seed(0)
        strategy = strategy or TokenBudget(lengths, 64)
        scheduler = R8Scheduler(60, 32, num_epochs=2, strategy=strategy, ui="off", checkpoint_dir=None)
        reports, shapes = Reports(scheduler), []
        args = transformers.TrainingArguments(
            str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, train_sampling_strategy="group_by_length",
            gradient_accumulation_steps=accumulation, save_steps=3, save_strategy="no" if resume else "steps",
        )  # fmt: skip
        trainer = R8Trainer(MODEL(), args, train_dataset=rows, scheduler=scheduler, data_collator=padded)
        hook = trainer.model.register_forward_pre_hook(
            lambda _, __, inputs: shapes.append(inputs["input_ids"].numel()), with_kwargs=True
        )
        trainer.train(resume_from_checkpoint=resume)
        hook.remove()
        assert trainer.state.global_step == trainer.state.max_steps
        return reports, shapes, trained(trainer.model)

    reports, shapes, weights = run()
    assert max(shapes) <= 64
    assert shapes == [len(batch) * lengths[batch].max() for batch in reports.batches]
    assert (np.bincount(list(chain(*reports.batches))) == 2).all()
    again, _, same = run(str(tmp_path / "checkpoint-3"))
    assert 0 < len(again.batches) < len(reports.batches)
    assert again.batches == reports.batches[-len(again.batches) :]
    assert torch.equal(same, weights)
    with pytest.raises(ConfigError, match=r"strategy=TokenBudget\(lengths, max_tokens\)"):
        run(strategy="uniform")


def test_loaders_and_samplers_of_ones_own_and_streams_are_refused(tmp_path):
    from learnit_r8.integrations.huggingface import R8Mixin, R8Trainer

    class OwnSampler(transformers.Trainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Below(R8Mixin, OwnSampler):
        pass

    class Above(R8Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(self.train_dataset, batch_size=4)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(classes().rows)

    def make(cls, data=None):
        args = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
        scheduler = R8Scheduler(ROWS, BATCH, num_epochs=1, ui="off", checkpoint_dir=None)
        return cls(MODEL(), args, train_dataset=data or classes(), scheduler=scheduler)

    with pytest.raises(ConfigError, match="OwnSampler"):
        make(Below)
    with pytest.raises(ConfigError, match="must have a length"):
        make(R8Trainer, Stream())
    with pytest.raises(ConfigError, match="another loader"):
        make(Above).train()


class SignalAt(transformers.TrainerCallback):
    def __init__(self, step: int, name: str) -> None:
        self.step, self.name = step, name

    def on_step_end(self, args, state, control, **options):
        if state.global_step == self.step:
            os.kill(os.getpid(), getattr(signal, self.name))


def in_a_child(work: Callable[[], Any], errors: Any) -> int:
    """Return how a forked process ends that does the work, as `os.waitpid` says it; its errors go to a file."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    with open(errors, "w") as file:
        os.dup2(file.fileno(), 2)
        sys.stderr = file
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            work()
        except BaseException:
            traceback.print_exc()
        file.flush()
        os._exit(1)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_saves_with_the_trainer_and_says_how_it_resumes(tmp_path, name):
    args = {"save_steps": 1000, "save_strategy": "steps"}
    status = in_a_child(
        lambda: Run(tmp_path / "out", args=args, callbacks=[SignalAt(5, name)]), errors := tmp_path / "errors"
    )
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 1
    folder = tmp_path / "out" / "checkpoint-6"
    assert f"trainer.train(resume_from_checkpoint='{folder}')" in errors.read_text().splitlines()[-1]
    whole = Run(tmp_path / "whole", args={"save_strategy": "no"})
    resumed = Run(tmp_path / "out", resume=str(folder), args={"save_strategy": "no"})
    assert resumed.reports.batches == whole.reports.batches[6:]
    assert torch.equal(resumed.weights, whole.weights)
