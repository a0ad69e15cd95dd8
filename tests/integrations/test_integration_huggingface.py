"""R8Scheduler and spaced repetition in the Hugging Face Trainer, with tiny random models."""

from __future__ import annotations

import gc
import signal
import warnings

import numpy as np
import pytest
import torch

from learnit_r8 import R8Scheduler, TrainingDiverged
from learnit_r8.errors import ConfigError
from tests.backup_watch import BackupWatch, always, check_diverged, check_survival, random_steps

SAMPLES, LENGTH, VOCABULARY = 40, 6, 20


@pytest.fixture(scope="module")
def hf():
    """transformers takes seconds to import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        from learnit_r8.integrations import huggingface

    transformers.utils.logging.set_verbosity_error()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield transformers, huggingface
    torch.set_num_threads(threads)


class Tokens(torch.utils.data.Dataset):
    def __init__(self, kind: str) -> None:
        rng = np.random.default_rng(0)
        self.ids = torch.from_numpy(rng.integers(0, VOCABULARY, (SAMPLES, LENGTH)))
        self.labels = self.ids.clone() if kind == "lm" else torch.from_numpy(rng.integers(0, 3, SAMPLES))
        if kind == "lm":
            for row, masked in enumerate(rng.integers(0, LENGTH - 2, SAMPLES)):
                self.labels[row, :masked] = -100

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int):
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def tiny_model(transformers, kind: str):
    torch.manual_seed(0)
    if kind == "lm":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def arguments(transformers, folder, **options):
    options = {
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
    } | options
    return transformers.TrainingArguments(output_dir=str(folder), **options)


def scheduler_for(**options) -> R8Scheduler:
    options = {"num_epochs": 3, "initial_lr": 1e-2, "checkpoint_dir": None, "ui": "off", "backup_every": 4} | options
    return R8Scheduler(SAMPLES, 4, **options)


def trainer_for(hf, folder, kind="class", scheduler=None, cls=None, model=None, **options):
    transformers, huggingface = hf
    return (cls or huggingface.R8Trainer)(
        model or tiny_model(transformers, kind),
        arguments(transformers, folder, **options),
        train_dataset=Tokens(kind),
        scheduler=scheduler or scheduler_for(),
    )


def weights(model) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in model.state_dict().values()]


class Spy:
    """Stands between trainer and scheduler: notes every batch and what was reported for it."""

    def __init__(self, scheduler: R8Scheduler) -> None:
        self.reports: list[tuple[list[int], list[float]]] = []
        self.results = []
        self._update = scheduler.update_with_loss
        self._scheduler = scheduler
        scheduler.update_with_loss = self

    def __call__(self, loss, batch=None, *, skipped=False):
        indices = self._scheduler.open_batches[0].indices.tolist()
        self.reports.append((indices, loss.reshape(-1).tolist()))
        self.results.append(self._update(loss, batch, skipped=skipped))
        return self.results[-1]


@pytest.mark.parametrize(
    ("kind", "accumulation", "workers"), [("class", 1, 0), ("class", 4, 2), ("lm", 1, 0), ("lm", 4, 2)]
)
def test_each_sample_gets_the_loss_that_the_model_has_for_it(hf, tmp_path, kind, accumulation, workers):
    scheduler = scheduler_for(num_epochs=1, initial_lr=1e-12)  # the weights stay as they are
    spy = Spy(scheduler)
    trainer = trainer_for(
        hf, tmp_path, kind, scheduler, gradient_accumulation_steps=accumulation, dataloader_num_workers=workers
    )
    trainer.model.config.attn_pdrop = 0.0
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer.train()
    data = Tokens(kind)
    seen = []
    for indices, losses in spy.reports:
        for index, loss in zip(indices, losses, strict=True):
            row = data[index]
            with torch.no_grad():
                alone = trainer.model(row["input_ids"][None], labels=row["labels"][None]).loss.item()
            assert loss == pytest.approx(alone, abs=1e-5)
        seen += indices
    assert sorted(seen) == list(range(SAMPLES))


def test_the_logged_learning_rate_is_the_one_that_was_used(hf, tmp_path):
    scheduler = scheduler_for()
    trainer = trainer_for(hf, tmp_path, scheduler=scheduler)
    used = []

    class Note(hf[0].TrainerCallback):
        def on_optimizer_step(self, *_, optimizer=None, **__):
            used.append(optimizer.param_groups[0]["lr"])

    trainer.add_callback(Note())
    trainer.train()
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == used
    assert len(set(logged)) > 10
    # The Trainer's loggers have the scheduler's numbers too, with no further line.
    ours = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert {"r8/expected_loss", "r8/seconds", "r8/q4_loss"} <= set(ours)
    assert trainer.optimizer.param_groups[0]["lr"] == logged[-1]


@pytest.mark.parametrize(
    ("kind", "accumulation", "workers", "seed"),
    [("class", 1, 0, 0), ("lm", 4, 2, 1), pytest.param("class", 4, 0, 2, marks=pytest.mark.slow)],
)
def test_nan_at_random_steps_ends_finite_and_rollbacks_bring_back_the_backup(
    hf, tmp_path, kind, accumulation, workers, seed
):
    watch = BackupWatch(random_steps(seed), scheduler_for, num_epochs=21)
    trainer = poisoned_trainer(
        hf, tmp_path, kind, watch, gradient_accumulation_steps=accumulation, dataloader_num_workers=workers
    )
    trainer.train()
    check_survival(watch.findings(), accumulation=accumulation)
    assert np.isfinite(trainer.state.log_history[-2]["loss"])


def poisoned_trainer(hf, folder, kind: str, watch: BackupWatch, **options):
    trainer = trainer_for(hf, folder, kind, watch.scheduler, **options)

    def poison(module, args, outputs):
        factor = watch.factor()
        return type(outputs)(loss=outputs.loss * factor, logits=outputs.logits * factor)

    trainer.model.register_forward_hook(poison)
    return trainer


def test_more_nan_than_backups_can_undo_ends_in_an_error_that_names_samples(hf, tmp_path):
    with pytest.raises(TrainingDiverged) as caught:
        poisoned_trainer(hf, tmp_path, "class", BackupWatch(always, scheduler_for)).train()
    check_diverged(str(caught.value))


def test_your_own_trainer_and_loss_function_work(hf, tmp_path):
    transformers, huggingface = hf

    class Mine(transformers.Trainer):
        extra = 0

        def training_step(self, *args, **kwargs):
            self.extra += 1
            return super().training_step(*args, **kwargs)

    class Both(huggingface.R8Mixin, Mine):
        pass

    scheduler = scheduler_for(num_epochs=1)
    spy = Spy(scheduler)
    model = tiny_model(transformers, "class")
    trainer = Both(
        model,
        arguments(transformers, tmp_path),
        train_dataset=Tokens("class"),
        scheduler=scheduler,
        sample_loss_func=lambda outputs, labels: (outputs.logits.sum(1) * 0 + labels).float() + 1,
    )
    trainer.train()
    labels = Tokens("class").labels
    assert trainer.extra == 10
    assert all(losses == (labels[indices] + 1).tolist() for indices, losses in spy.reports)


def test_a_loss_function_of_the_trainer_is_reported_as_one_number_a_batch(hf, tmp_path):
    transformers, huggingface = hf
    scheduler = scheduler_for(num_epochs=1)
    spy = Spy(scheduler)
    trainer = huggingface.R8Trainer(
        tiny_model(transformers, "class"),
        arguments(transformers, tmp_path, gradient_accumulation_steps=2),
        train_dataset=Tokens("class"),
        scheduler=scheduler,
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum() * 0 + 0.75,
    )
    with pytest.warns(RuntimeWarning, match="note_sample_losses"):
        trainer.train()
    assert [losses for _, losses in spy.reports] == [[0.75]] * 10


def test_arguments_that_do_not_go_together_are_listed(hf, tmp_path):
    transformers, huggingface = hf
    with pytest.raises(ConfigError) as caught:
        huggingface.R8Trainer(
            tiny_model(transformers, "class"),
            arguments(transformers, tmp_path, data_seed=5, max_grad_norm=0.5),
            train_dataset=Tokens("class"),
            scheduler=R8Scheduler(7, 2, num_epochs=1, clip="auto", checkpoint_dir=None, ui="off"),
        )
    assert len(caught.value.problems) == 3
    assert "num_samples=7" in str(caught.value)
    assert "max_grad_norm=0.5 of the Trainer and clip= both clip" in str(caught.value)


def test_the_callers_arguments_stay_as_they_are(hf, tmp_path):
    transformers, huggingface = hf
    args = arguments(transformers, tmp_path)
    trainer = huggingface.R8Trainer(
        tiny_model(transformers, "class"), args, train_dataset=Tokens("class"), scheduler=scheduler_for()
    )
    assert (args.num_train_epochs, args.per_device_train_batch_size) == (3.0, 8)
    assert (trainer.args.num_train_epochs, trainer.args.per_device_train_batch_size) == (3, 4)


def test_a_budget_in_seconds_ends_the_training(hf, tmp_path):
    scheduler = scheduler_for(num_epochs=None, train_duration_seconds=0.5)
    trainer = trainer_for(hf, tmp_path, scheduler=scheduler)
    trainer.train()
    assert 0 < trainer.state.global_step == scheduler.global_step


@pytest.mark.parametrize("remove", [False, True])
def test_an_indices_field_reaches_no_model_that_does_not_take_it(hf, tmp_path, remove):
    from learnit_r8 import strategies

    class Numbered(Tokens):
        def __getitem__(self, i):
            return {**super().__getitem__(i), "indices": i}

    transformers, huggingface = hf
    data = Numbered("class")
    sampler = strategies.SpacedRepetitionSampler(data, num_steps=5, batch_size=4, spacing_steps=2)
    options = arguments(transformers, tmp_path, num_train_epochs=1, remove_unused_columns=remove)
    model = tiny_model(transformers, "class")
    trainer = huggingface.SRSTrainer(model, options, train_dataset=data, train_sampler=sampler)
    trainer.train()
    assert trainer.state.global_step == 5


def test_spaced_repetition_resumes_with_the_trainer(hf, tmp_path):
    from learnit_r8 import strategies

    _, huggingface = hf

    def build(**options):
        transformers, _ = hf
        sampler = strategies.SpacedRepetitionSampler(Tokens("class"), num_steps=12, batch_size=4, spacing_steps=2)
        drawn = []
        update = sampler.update_difficulties
        sampler.update_difficulties = lambda loss, indices=None: (
            drawn.append((sampler._open[0][1].tolist(), loss.tolist())),
            update(loss, indices),
        )
        trainer = huggingface.SRSTrainer(
            tiny_model(transformers, "class"),
            arguments(transformers, tmp_path, num_train_epochs=2, save_strategy="steps", save_steps=7),
            train_dataset=Tokens("class"),
            train_sampler=sampler,
        )
        return trainer, drawn

    whole, drawn = build()
    whole.train()
    assert len(drawn) == 24
    resumed, again = build()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert again == drawn[7:]
    assert weights(resumed.model) == weights(whole.model)


def test_the_signals_are_given_back_when_training_ends_not_when_the_garbage_is_collected(hf, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    during = []

    class Look(hf[0].TrainerCallback):
        def on_step_end(self, *_, **__):
            during.append(signal.getsignal(signal.SIGTERM))

    trainer = trainer_for(hf, tmp_path, scheduler=scheduler_for())
    trainer.add_callback(Look())
    gc.disable()
    try:
        trainer.train()
        assert signal.getsignal(signal.SIGTERM) == before
    finally:
        gc.enable()
    assert during
    assert before not in during
