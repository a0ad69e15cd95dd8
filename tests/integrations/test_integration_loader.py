"""Loaders used in ways that were not meant: each is right, or ends in one sentence; no loss goes to another sample."""

from __future__ import annotations

import itertools
import random
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from learnit_r8 import ProtocolError, R8Scheduler
from learnit_r8.errors import ConfigError
from learnit_r8.integrations.torch import (
    R8BatchSampler,
    capture_state,
    evaluation_loader,
    follow_lr,
    restore_state,
    set_lr,
    weighted,
)
from learnit_r8.strategies import Draw

SAMPLES, BATCH = 40, 8


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scheduler_for(**options) -> R8Scheduler:
    return R8Scheduler(SAMPLES, BATCH, **{"num_epochs": 2, "checkpoint_dir": None, "ui": "off"} | options)


def loader_for(scheduler: R8Scheduler, data: Dataset | None = None, ahead: int = 0, **options) -> DataLoader:
    data = TensorDataset(torch.arange(SAMPLES)) if data is None else data
    return DataLoader(data, batch_sampler=R8BatchSampler(scheduler, ahead=ahead), **options)


def train_epoch(scheduler: R8Scheduler, loader: DataLoader) -> None:
    for (numbers,) in loader:
        scheduler.update_with_loss(numbers.float() + 1)


# Where no epoch is open ------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("moment", ["between epochs", "after the last", "after close"])
def test_a_loader_that_is_iterated_where_no_epoch_is_open_says_what_to_take(moment, workers):
    scheduler = scheduler_for()
    loader = loader_for(scheduler, num_workers=workers)
    for _ in scheduler.epoch_iterator():
        train_epoch(scheduler, loader)
        if moment == "between epochs":
            break
    if moment == "after close":
        scheduler.close()
    with pytest.raises(ProtocolError, match=r"to evaluate.*take learnit_r8.integrations.torch.evaluation_loader"):
        next(iter(loader))
    scheduler.close()


@pytest.mark.parametrize("through_loader", [False, True])
def test_epochs_that_nobody_opened_are_refused(through_loader):
    scheduler = scheduler_for()
    loader = loader_for(scheduler)

    def epochs() -> None:
        for _ in range(2):
            for batch in loader if through_loader else scheduler.batch_iterator():
                scheduler.update_with_loss(np.ones(len(batch[0] if through_loader else batch.indices)))

    with pytest.raises(ProtocolError, match=r"all batches of epoch 0 are reported.*scheduler\.epoch_iterator\(\)"):
        epochs()
    assert scheduler.global_step == 5
    scheduler.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_each_sample_once_at_any_moment_and_leaves_the_run_as_it_is(workers):
    def run(*, looks: bool) -> list[list[int]]:
        scheduler = scheduler_for()
        loader, seen = loader_for(scheduler, num_workers=workers), []

        def look() -> None:
            if looks:
                numbers = torch.cat([numbers for (numbers,) in evaluation_loader(loader)])
                assert numbers.tolist() == list(range(SAMPLES))

        look()
        for _ in scheduler.epoch_iterator():
            for (numbers,) in loader:
                seen.append(numbers.tolist())
                scheduler.update_with_loss(numbers.float() + 1)
                if len(seen) == 3:
                    look()
            look()
        scheduler.close()
        look()
        return seen

    assert run(looks=True) == run(looks=False)


def test_batch_norm_statistics_come_from_all_data():
    x = torch.randn(SAMPLES + 1, 4) * 3 + 5  # 41 samples: a lone last one would have no variance
    scheduler = R8Scheduler(SAMPLES + 1, BATCH, num_epochs=1, checkpoint_dir=None, ui="off")
    loader = loader_for(scheduler, TensorDataset(x))
    averaged = torch.optim.swa_utils.AveragedModel(nn.BatchNorm1d(4))
    torch.optim.swa_utils.update_bn(evaluation_loader(loader), averaged)
    assert torch.allclose(averaged.module.running_mean, x.mean(dim=0), atol=0.3)
    scheduler.close()


def test_evaluation_of_a_loader_that_is_not_the_schedulers_is_refused():
    with pytest.raises(ConfigError, match="must draw from an R8BatchSampler, got DataLoader"):
        evaluation_loader(DataLoader(TensorDataset(torch.arange(4))))


# Batches that are left out ---------------------------------------------------------------


def left_out(
    skips: set[int], *, workers: int, tells: bool, ahead: int = 0, persistent: bool = False, prefetch: int = 2
) -> R8Scheduler:
    """Train; each sample's loss is its number + 1. The batches at some steps are left out."""
    scheduler = scheduler_for(strategy="uniform")
    factor = prefetch if workers else None
    loader = loader_for(
        scheduler, num_workers=workers, ahead=ahead, persistent_workers=persistent, prefetch_factor=factor
    )
    step = itertools.count()
    for _ in scheduler.epoch_iterator():
        for (numbers,) in loader:
            if next(step) not in skips:
                scheduler.update_with_loss(numbers.float() + 1)
            elif tells:
                scheduler.update_with_loss(float("nan"), skipped=True)
    scheduler.close()
    return scheduler


def misled(scheduler: R8Scheduler) -> int:
    catalog = scheduler.catalog
    wrong = np.abs(catalog.expected_loss - np.arange(SAMPLES) - 1) > 0.01
    return int(wrong[catalog.uses > 0].sum())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("skips", [{0}, {2}, {3, 4, 7}, {9}, set(range(10))])
def test_a_batch_that_is_left_out_and_said_to_be_shifts_no_loss(skips, workers):
    scheduler = left_out(skips, workers=workers, tells=True, persistent=workers > 0)
    assert misled(scheduler) == 0
    assert scheduler.global_step == 10


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_batch_that_is_left_out_silently_is_named(at, workers):
    with pytest.raises(ProtocolError, match=rf"step {at} .*skipped=True"):
        left_out({at}, workers=workers, tells=False)


class Corrupt(Dataset):
    """Data of which one sample cannot be read."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int):
        if index == 13:
            raise ValueError("corrupt")
        return torch.tensor(index)


def train_past_errors(scheduler: R8Scheduler, loader: DataLoader, *, told: bool) -> int:
    """Train as people do who catch a loader's error and ask for the next batch; return the errors."""
    batches, errors = iter(loader), 0
    while True:
        try:
            numbers = next(batches)
        except StopIteration:
            return errors
        except ValueError:
            errors += 1
            if told:
                scheduler.update_with_loss(float("nan"), skipped=True)
            continue
        scheduler.update_with_loss(numbers.float() + 1)


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_a_batch_that_could_not_be_loaded_and_is_reported_as_skipped_shifts_no_loss(workers, persistent):
    scheduler = scheduler_for()
    loader = loader_for(scheduler, Corrupt(), num_workers=workers, persistent_workers=persistent)
    errors = sum(train_past_errors(scheduler, loader, told=True) for _ in scheduler.epoch_iterator())
    assert errors >= 1
    assert misled(scheduler) == 0


def test_losses_whose_batch_is_named_are_taken_after_a_batch_that_could_not_be_loaded():
    scheduler = scheduler_for(num_epochs=1, lookahead=5)
    batches, errors = iter(loader_for(scheduler, Corrupt(), num_workers=2)), 0
    for _ in scheduler.epoch_iterator():
        for _ in range(5):
            try:
                numbers = next(batches)
            except ValueError:
                errors += 1
                continue
            mine = next(one for one in scheduler.open_batches if numbers[0] in one.indices)
            scheduler.update_with_loss(numbers.float() + 1, mine)
        break
    assert errors == 1
    assert scheduler.global_step == 4
    assert misled(scheduler) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_could_not_be_loaded_and_is_not_reported_is_named(workers):
    scheduler = scheduler_for()
    loader = loader_for(scheduler, Corrupt(), num_workers=workers)
    with pytest.raises(ProtocolError, match=r"a batch that is left out .* skipped=True"):
        sum(train_past_errors(scheduler, loader, told=False) for _ in scheduler.epoch_iterator())
    assert misled(scheduler) == 0


def test_a_loop_over_short_epochs_that_never_reports_is_told_so_where_the_next_epoch_begins():
    with pytest.raises(ProtocolError, match=r"epoch 0 ends and 5 of its batches are not reported.*update_with_loss"):
        left_out(set(range(5)), workers=2, tells=False, prefetch=3)


@pytest.mark.parametrize("persistent", [False, True])
def test_an_epochs_last_batches_that_are_left_out_are_said_and_shift_nothing(capfd, persistent):
    scheduler = left_out({3, 4}, workers=2, tells=False, prefetch=3, persistent=persistent)
    assert "epoch 0 ends and 2 of its batches are not reported, from step 3 on" in capfd.readouterr().err
    assert misled(scheduler) == 0
    assert scheduler.global_step == 8


def test_a_loop_that_is_left_early_is_not_blamed(capfd):
    scheduler = scheduler_for()
    loader = loader_for(scheduler, num_workers=1, prefetch_factor=1)
    for _ in scheduler.epoch_iterator():
        for (numbers,) in loader:
            if scheduler.global_step % 5 == 2:
                break
            scheduler.update_with_loss(numbers.float() + 1)
    assert scheduler.global_step == 2
    assert "epoch 0 ends" not in capfd.readouterr().err  # not all of it was drawn
    scheduler.close()


def test_more_than_the_batches_that_may_be_held_are_named_though_the_loader_has_drawn_all():
    with pytest.raises(ProtocolError, match=r"3 batches came to the loop since step 2"):
        left_out({2, 3}, workers=2, tells=False, ahead=1)


def test_a_loop_that_was_restored_while_its_loader_held_batches_is_not_gone_on_with():
    scheduler = scheduler_for()
    loader = loader_for(scheduler, num_workers=1, prefetch_factor=2)
    state = scheduler.state_dict()

    def train() -> None:
        for _ in scheduler.epoch_iterator():
            for (numbers,) in loader:
                scheduler.update_with_loss(numbers.float() + 1)
                scheduler.load_state_dict(state)

    with pytest.raises(ProtocolError, match="a loader held batches of the run before"):
        train()
    scheduler.close()


def test_a_loop_that_is_left_frees_its_loaders_workers_at_once():
    scheduler = scheduler_for()
    iterator = iter(loader_for(scheduler, num_workers=1))
    next(iterator)
    alive = weakref.ref(iterator)
    del iterator
    assert alive() is None
    scheduler.close()


# Which loader asks -----------------------------------------------------------------------


def test_a_variable_of_the_callers_is_not_taken_for_the_loader():
    loader = DataLoader(TensorDataset(torch.arange(10)))
    scheduler = scheduler_for(num_epochs=1)
    for ids in R8BatchSampler(scheduler):
        scheduler.update_with_loss(np.ones(len(ids)))
    assert scheduler.global_step == 5
    assert len(loader) == 10
    scheduler.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_accelerate_prepared_works(workers):
    from accelerate import Accelerator

    scheduler = scheduler_for()
    loader = Accelerator(cpu=True).prepare(loader_for(scheduler, num_workers=workers))
    for _ in scheduler.epoch_iterator():
        train_epoch(scheduler, loader)
    assert misled(scheduler) == 0
    assert scheduler.global_step == 10
    scheduler.close()


def test_a_loader_that_accelerate_cut_or_fast_forwarded_is_refused():
    from accelerate import skip_first_batches
    from accelerate.data_loader import prepare_data_loader

    scheduler = scheduler_for()
    with pytest.raises(ConfigError, match=r"leave the loader out of accelerator\.prepare"):
        next(iter(prepare_data_loader(loader_for(scheduler), num_processes=2, process_index=0)))
    with pytest.raises(ConfigError, match=r"skip_first_batches takes batches out"):
        next(iter(skip_first_batches(loader_for(scheduler), 2)))
    scheduler.close()


# Importance weights ----------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("prepared", [False, True])
def test_weights_are_those_of_the_batch_that_came_last(workers, ahead, prepared):
    """A strategy's own weights, which are a function of the sample, so that a mix-up shows."""
    from accelerate import Accelerator

    scheduler = scheduler_for(strategy=Weighing(), num_epochs=3)
    loader = loader_for(scheduler, num_workers=workers, ahead=ahead)
    loader = Accelerator(cpu=True).prepare(loader) if prepared else loader
    held, seen = [], 0
    for _ in scheduler.epoch_iterator():
        for (numbers,) in loader:
            seen += len(numbers)
            product = weighted(scheduler, torch.ones(len(numbers), 2))
            assert torch.equal(product[:, 1], Weighing.weight(numbers).float())
            held.append(numbers.float() + 1)
            while len(held) > ahead:
                scheduler.update_with_loss(held.pop(0))
        while held:
            scheduler.update_with_loss(held.pop(0))
    assert seen == 3 * SAMPLES
    scheduler.close()


class Weighing:
    catalogs = False

    @staticmethod
    def weight(numbers):
        return 0.5 + (numbers % 7) / 4

    def draw(self, request):
        ids = request.rng.permutation(request.num_samples)[: request.size]
        return Draw(ids, weights=self.weight(ids))


@pytest.mark.parametrize("asks", ["batch", "current", "weighted", "nobody", "only looks"])
def test_a_run_says_in_its_first_step_that_nobody_asked_for_its_weights(asks):
    scheduler = scheduler_for(strategy="prioritized")

    def train():
        for _ in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                losses = torch.arange(len(batch.indices)) + 1.0
                looks = {
                    "batch": lambda batch=batch: batch.weights,
                    "current": lambda: scheduler.current_batch.weights,
                    "weighted": lambda losses=losses: weighted(scheduler, losses),
                    "only looks": lambda: scheduler.open_batches[0].weights,
                }
                looks.get(asks, lambda: None)()
                scheduler.update_with_loss(losses)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train()
    messages = [str(one.message) for one in caught if "importance weights" in str(one.message)]
    assert len(messages) == (asks in ("nobody", "only looks"))
    assert all("'prioritized'" in one and "weighted(scheduler, losses)" in one for one in messages)
    scheduler.close()


def test_a_sentence_of_the_library_ends_no_run_where_warnings_are_errors(capsys):
    scheduler = scheduler_for(strategy="prioritized")
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            scheduler.update_with_loss(batch.indices + 1.0)
    assert scheduler.global_step == 10
    assert capsys.readouterr().err.count("nobody asked for the importance weights") == 1
    scheduler.close()


def test_weights_without_a_batch_or_for_other_losses_are_refused():
    scheduler = scheduler_for()
    with pytest.raises(ProtocolError, match="no batch is open"):
        weighted(scheduler, torch.ones(8))
    next(scheduler.batch_iterator())
    with pytest.raises(ProtocolError, match=r"8 samples.*shape \(\)"):
        weighted(scheduler, torch.ones(()))
    scheduler.close()


# Random augmentation ---------------------------------------------------------------------


class Augmented(Dataset):
    """Each sample comes with random numbers of all three generators."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index, torch.tensor([torch.rand(()).item(), np.random.random(), random.random()])  # noqa: NPY002


def augmented(seed: int, workers: int, *, persistent: bool, stop_at: int = -1, state: dict | None = None):
    """Train, from a state if there is one; return what came, by step, and the state at the stop."""
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    scheduler = scheduler_for(num_epochs=3, seed=seed)
    if state is not None:
        scheduler.load_state_dict(state["run"])
        restore_state(state["generators"], None)
    loader = loader_for(scheduler, Augmented(), num_workers=workers, persistent_workers=persistent)
    seen = {}
    for _ in scheduler.epoch_iterator():
        for numbers, noise in loader:
            seen[scheduler.global_step] = numbers.tolist(), noise.tolist()
            scheduler.update_with_loss(numbers.float() + 1)
            if scheduler.global_step == stop_at:
                state = {"run": scheduler.state_dict(), "generators": capture_state(None)}
                scheduler.close()
                return seen, state
    scheduler.close()
    return seen, None


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("workers", "persistent"),
    [
        (0, False),
        (2, True),
        *(pytest.param(w, p, marks=pytest.mark.slow) for w, p in [(2, False), (4, False), (4, True)]),
    ],
)
@pytest.mark.parametrize("stop_at", [7, 10])
def test_a_resumed_run_augments_as_the_uninterrupted_one(workers, persistent, stop_at):
    whole, _ = augmented(0, workers, persistent=persistent)
    head, state = augmented(0, workers, persistent=persistent, stop_at=stop_at)
    tail, _ = augmented(0, workers, persistent=persistent, state=state)
    assert head | tail == whole
    noise = [row for _, rows in whole.values() for row in rows]
    assert len({tuple(row) for row in noise}) == len(noise) == 3 * SAMPLES  # no epoch has an earlier one's


def test_augmentation_follows_the_runs_seed_and_not_the_number_of_workers():
    one, two, other = (augmented(seed, workers, persistent=False)[0] for seed, workers in ((0, 1), (0, 2), (1, 2)))
    assert one == two
    assert one[0][1] != other[0][1]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("amid", [True, False])
def test_a_loop_that_is_thrown_out_of_a_step_saves_no_model_of_half_a_step(tmp_path, workers, amid):
    trained = []

    def save(path):
        Path(path).write_text(str(len(trained)))

    scheduler = R8Scheduler(
        40, 4, num_epochs=2, ui="off", checkpoint_dir=tmp_path, checkpoint_every=1000, save_callback=save
    )
    data = TensorDataset(torch.arange(40.0))
    loader = DataLoader(data, batch_sampler=R8BatchSampler(scheduler), num_workers=workers)

    def loop():
        for _ in scheduler.epoch_iterator():
            for (x,) in loader:
                trained.append(x)
                if amid and len(trained) == 6:
                    raise ZeroDivisionError
                scheduler.update_with_loss(x * 0 + 1)
                if len(trained) == 6:
                    raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught, scheduler:
        loop()
    (note,) = caught.value.__notes__
    assert ("thrown out of step 5: the model may be trained halfway" if amid else "stopped after 6 steps") in note
    assert len(list(tmp_path.glob("step-*"))) == (not amid)


# The learning rate -----------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("asks", ["nobody", "follow_lr", "lr", "constant"])
def test_a_schedule_that_nobody_asks_for_is_told_once(capfd, asks, workers):
    options = {"scheduler_mode": "constant", "warmup_proportion": 0.0} if asks == "constant" else {}
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = R8Scheduler(64, 16, num_epochs=3, ui="off", checkpoint_dir=None, **options)
    if asks == "follow_lr":
        follow_lr(scheduler, optimizer)
    loader = DataLoader(torch.arange(64), batch_sampler=R8BatchSampler(scheduler), num_workers=workers)
    for _ in scheduler.epoch_iterator():
        for _batch in loader:
            if asks == "lr":
                set_lr(optimizer, scheduler.lr)
            optimizer.step()
            scheduler.update_with_loss(1.0)
    assert capfd.readouterr().err.count("nobody asks for R8Scheduler's learning rate") == (asks == "nobody")


def test_who_sets_the_rate_by_hand_hears_nothing_when_a_loader_with_workers_resumes(capfd):
    options = {"num_epochs": 3, "ui": "off", "checkpoint_dir": None}
    first, second = R8Scheduler(64, 8, **options), R8Scheduler(64, 8, **options)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    for scheduler, most in ((first, 5), (second, 24)):
        loader = DataLoader(torch.arange(64), batch_sampler=R8BatchSampler(scheduler), num_workers=2)
        for _ in scheduler.epoch_iterator():
            for _batch in loader:
                set_lr(optimizer, scheduler.lr)
                scheduler.update_with_loss(1.0)
                if scheduler.global_step == most:
                    break
            if scheduler.global_step == most:
                break
        if scheduler is first:
            second.load_state_dict(first.state_dict())
    assert second.global_step == 24
    assert "nobody asks" not in capfd.readouterr().err
