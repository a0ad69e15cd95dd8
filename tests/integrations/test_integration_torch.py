"""R8Scheduler in a PyTorch loop: every loss reaches the sample that caused it, and runs resume to the bit."""

from __future__ import annotations

import copy
import itertools
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learnit_r8 import ProtocolError, R8Scheduler, TrainingDiverged
from learnit_r8.errors import ConfigError
from learnit_r8.integrations.torch import (
    R8BatchSampler,
    arrays_from_tensors,
    capture_state,
    follow_lr,
    restore_state,
    set_lr,
    tensors_from_arrays,
)
from tests.backup_watch import (
    BackupWatch,
    always,
    check_diverged,
    check_survival,
    fingerprint,
    leaves,
    never,
    random_steps,
    survivable,
)

SAMPLES = 96


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scheduler_for(samples: int = SAMPLES, batch: int = 8, **options) -> R8Scheduler:
    options = {"num_epochs": 3, "checkpoint_dir": None, "ui": "off"} | options
    return R8Scheduler(samples, batch, **options)


class Truth:
    """Each sample's loss is a function of its number and of how often it was used: a mix-up shows."""

    def __init__(self, samples: int) -> None:
        self.uses = np.zeros(samples, int)
        self.last = np.zeros(samples, np.float32)

    def losses(self, numbers: torch.Tensor) -> torch.Tensor:
        ids = numbers.numpy().astype(int)
        self.uses[ids] += 1
        self.last[ids] = 1 + np.sin(ids * 0.7) * 0.5 + 0.01 * self.uses[ids]
        return torch.from_numpy(self.last[ids].copy())


class Listener:
    """A strategy's ear: remembers which loss the scheduler believes each sample to have."""

    covers = True

    def __init__(self, inner) -> None:
        self.inner = inner
        self.believed: dict[int, float] = {}

    def start_epoch(self, request):
        return self.inner.start_epoch(request)

    def draw(self, request):
        return self.inner.draw(request)

    def observe(self, report) -> None:
        self.believed.update(zip(report.indices.tolist(), report.losses.tolist(), strict=True))


def mismatches(
    steps: int, *, samples: int = SAMPLES, workers: int, prefetch: int, accumulation: int, persistent: bool
) -> tuple[int, int]:
    """Train `steps` steps through a loader; return (losses at the wrong sample, steps)."""
    from learnit_r8.strategies import make

    batch = 8
    epochs = -(-steps // (samples // batch))
    listener = Listener(make("quadrant"))
    scheduler = scheduler_for(samples, batch, num_epochs=epochs, strategy=listener)
    loader = DataLoader(
        TensorDataset(torch.arange(samples)),
        batch_sampler=R8BatchSampler(scheduler, ahead=accumulation - 1),
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        persistent_workers=persistent and workers > 0,
    )
    truth, wrong, pending = Truth(samples), 0, []
    with scheduler:
        for _ in scheduler.epoch_iterator():
            for (numbers,) in loader:
                pending.append((numbers, truth.losses(numbers)))
                if len(pending) < accumulation:
                    continue
                wrong += report(scheduler, listener, pending)
            wrong += report(scheduler, listener, pending)  # the epoch's last, shorter accumulation
        assert scheduler.catalog.uses.tolist() == [epochs] * samples
        return wrong, scheduler.global_step


def report(scheduler: R8Scheduler, listener: Listener, pending: list) -> int:
    wrong = 0
    for numbers, losses in pending:
        listener.believed.clear()
        scheduler.update_with_loss(losses)
        expected = dict(zip(numbers.tolist(), losses.tolist(), strict=True))
        wrong += sum(listener.believed.get(number) != loss for number, loss in expected.items())
    pending.clear()
    return wrong


@pytest.mark.parametrize(
    ("workers", "prefetch", "accumulation", "persistent"), [(0, 1, 4, False), (2, 2, 1, True), (2, 4, 4, False)]
)
def test_every_loss_reaches_the_sample_that_caused_it(workers, prefetch, accumulation, persistent):
    wrong, steps = mismatches(36, workers=workers, prefetch=prefetch, accumulation=accumulation, persistent=persistent)
    assert (wrong, steps) == (0, 36)


GRID = [
    (workers, prefetch, accumulation, persistent)
    for workers, prefetch, accumulation, persistent in itertools.product((0, 2, 4), (1, 2, 4), (1, 4), (False, True))
    if workers or (prefetch == 1 and not persistent)
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("workers", "prefetch", "accumulation", "persistent"), GRID)
def test_every_loss_reaches_its_sample_over_5000_steps(workers, prefetch, accumulation, persistent):
    wrong, steps = mismatches(
        5040, samples=960, workers=workers, prefetch=prefetch, accumulation=accumulation, persistent=persistent
    )
    assert (wrong, steps) == (0, 5040)


def test_batches_that_a_loop_was_left_with_are_handed_out_again():
    scheduler = scheduler_for(num_epochs=1)
    loader = DataLoader(
        TensorDataset(torch.arange(SAMPLES)), batch_sampler=R8BatchSampler(scheduler), num_workers=2, prefetch_factor=2
    )
    seen: list[int] = []
    next(scheduler.epoch_iterator())
    for step, (numbers,) in enumerate(loader):
        if step == 3:
            break  # this batch is not reported either
        seen += numbers.tolist()
        scheduler.update_with_loss(numbers.float() + 1)
    for (numbers,) in loader:
        seen += numbers.tolist()
        scheduler.update_with_loss(numbers.float() + 1)
    assert sorted(seen) == list(range(SAMPLES))
    assert scheduler.global_step == len(loader) == SAMPLES // 8
    scheduler.close()


def test_a_forgotten_report_is_named_and_not_waited_for():
    scheduler = scheduler_for()
    loader = DataLoader(TensorDataset(torch.arange(SAMPLES)), batch_sampler=R8BatchSampler(scheduler))
    with pytest.raises(ProtocolError, match="step 0"):
        for _ in loader:
            pass
    scheduler.close()


@pytest.mark.filterwarnings("ignore:.*in_order")
def test_a_loader_that_reorders_batches_is_refused():
    sampler = R8BatchSampler(scheduler_for())
    loader = DataLoader(TensorDataset(torch.arange(SAMPLES)), batch_sampler=sampler, num_workers=1, in_order=False)
    with pytest.raises(ConfigError, match="in_order"):
        next(iter(loader))


def test_a_sampler_wrapped_by_accelerate_finds_its_loader():
    from accelerate import skip_first_batches

    scheduler = scheduler_for(num_epochs=1)
    loader = DataLoader(
        TensorDataset(torch.arange(SAMPLES)), batch_sampler=R8BatchSampler(scheduler), num_workers=1, prefetch_factor=3
    )
    count = 0
    for (numbers,) in skip_first_batches(loader, 0):
        count += 1
        scheduler.update_with_loss(numbers.float())
    assert count == 12
    scheduler.close()


def test_a_learning_rate_search_refuses_a_loader_that_prefetches_and_says_why():
    scheduler = scheduler_for(
        2000, num_epochs=20, auto_find_lr=True, state_callback=dict, load_callback=lambda state: None
    )
    loader = DataLoader(TensorDataset(torch.arange(2000)), batch_sampler=R8BatchSampler(scheduler), num_workers=1)
    with pytest.raises(ProtocolError, match="num_workers=0"):
        next(iter(loader))
    scheduler.close()


@pytest.mark.parametrize("bad", [-1, 1.5, True])
def test_a_bad_lead_is_refused(bad):
    with pytest.raises(ConfigError, match="ahead"):
        R8BatchSampler(scheduler_for(), ahead=bad)


# Learning rate --------------------------------------------------------------------------


def test_the_learning_rate_is_that_of_the_batch_that_is_trained_on_however_far_the_loader_is_ahead():
    rates = []
    for workers in (0, 2):
        scheduler = scheduler_for(num_epochs=2, initial_lr=0.1)
        weight = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        follow_lr(scheduler, optimizer)
        loader = DataLoader(
            TensorDataset(torch.arange(SAMPLES)), batch_sampler=R8BatchSampler(scheduler), num_workers=workers
        )
        used = []
        for _ in scheduler.epoch_iterator():
            for (numbers,) in loader:
                weight.grad = torch.ones(1)
                optimizer.step()
                used.append(optimizer.param_groups[0]["lr"])
                assert used[-1] == scheduler.open_batches[0].lr
                scheduler.update_with_loss(numbers.float() + 1)
        rates.append(used)
    assert rates[0] == rates[1]
    assert max(rates[0]) == pytest.approx(0.1, rel=0.05)


def test_parameter_groups_keep_their_proportions_and_tensors_keep_their_identity():
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    optimizer = torch.optim.Adam(
        [{"params": parameters[0], "lr": 1e-3}, {"params": parameters[1], "lr": torch.tensor(1e-4)}], capturable=False
    )
    tensor = optimizer.param_groups[1]["lr"]
    set_lr(optimizer, 0.5)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.5, 0.05])
    assert optimizer.param_groups[1]["lr"] is tensor
    optimizer.add_param_group({"params": parameters[2]})
    set_lr(optimizer, 0.2)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.2, 0.02, 0.2])


def test_a_second_learning_rate_scheduler_is_overruled_and_named_once():
    scheduler = scheduler_for(num_epochs=1)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    other = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    hook = follow_lr(scheduler, optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in scheduler.batch_iterator():
            weight.grad = torch.ones(1)
            optimizer.step()
            assert optimizer.param_groups[0]["lr"] == pytest.approx(batch.lr)
            other.step()
            scheduler.update_with_loss(1.0)
    messages = [str(w.message) for w in caught if "R8Scheduler" in str(w.message)]
    assert len(messages) == 1
    assert "remove the other" in messages[0]
    hook.remove()
    optimizer.param_groups[0]["lr"] = 7.0
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 7.0


def test_restoring_an_optimizer_is_not_taken_for_a_second_scheduler():
    scheduler = scheduler_for(num_epochs=1)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    follow_lr(scheduler, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in itertools.islice(scheduler.batch_iterator(), 4):
            weight.grad = torch.ones(1)
            optimizer.step()
            rate = scheduler.lr_now()
            assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
            optimizer.load_state_dict(saved)
            scheduler.update_with_loss(1.0)
    scheduler.close()


# State ----------------------------------------------------------------------------------


def toy(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model, optimizer, steps: int = 3, scaler=None) -> None:
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.randint(3, (16,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def storages(tree) -> set[int]:
    """Return the addresses of all tensors' memory."""
    return {leaf.untyped_storage().data_ptr() for leaf in leaves(tree) if isinstance(leaf, torch.Tensor)}


def test_training_continues_to_the_bit_from_a_captured_state():
    model, optimizer = toy()
    ema = torch.optim.swa_utils.AveragedModel(model)
    scaler = torch.amp.GradScaler("cpu")
    train(model, optimizer)
    ema.update_parameters(model)
    state = capture_state(model, optimizer, scaler, ema)
    before = fingerprint(state)
    train(model, optimizer)
    expected = fingerprint([model.state_dict(), optimizer.state_dict()]), random.random(), np.random.random()  # noqa: NPY002
    for _ in range(2):  # the state is not used up by the first restore
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
            parameter.grad = torch.full_like(parameter, float("nan"))
        restore_state(state, model, optimizer, scaler, ema)
        assert all(parameter.grad is None for parameter in model.parameters())
        train(model, optimizer)
        again = fingerprint([model.state_dict(), optimizer.state_dict()]), random.random(), np.random.random()  # noqa: NPY002
        assert again == expected
        assert fingerprint(state) == before


class Both:
    """Two optimizers as one, with the two methods that a state needs."""

    def __init__(self, optimizers):
        self.optimizers = optimizers

    def state_dict(self):
        return {str(at): one.state_dict() for at, one in enumerate(self.optimizers)}

    def load_state_dict(self, state):
        for at, one in enumerate(self.optimizers):
            one.load_state_dict(state[str(at)])


def named(each):
    return dict(zip("gd", each, strict=True))


@pytest.mark.parametrize("given", [list, tuple, named, Both])
def test_several_optimizers_come_back_together_and_gradients_are_cleared(given):
    models = [nn.Linear(2, 1), nn.Linear(2, 1)]
    optimizers = [torch.optim.Adam(model.parameters()) for model in models]

    def step():
        sum(model(torch.ones(1, 2)).square().sum() for model in models).backward()
        for optimizer in optimizers:
            optimizer.step()

    step()
    parts = (models if given is list else nn.ModuleList(models)), given(optimizers)
    state = capture_state(*parts)
    before = [model.weight.clone() for model in models]
    moments = [one.state[model.weight]["exp_avg"].clone() for model, one in zip(models, optimizers, strict=True)]
    step()
    restore_state(state, *parts)
    for at, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
        assert torch.equal(model.weight, before[at])
        assert torch.equal(optimizer.state[model.weight]["exp_avg"], moments[at])
        assert model.weight.grad is None


@pytest.mark.parametrize("count", [1, 3])
def test_a_state_of_other_objects_is_refused_before_anything_is_restored(count):
    models = [nn.Linear(2, 1) for _ in range(3)]
    state = capture_state(models[:2])
    state["model"]["0"]["weight"].fill_(7.0)
    with pytest.raises(ConfigError, match=f"model: {count} objects"):
        restore_state(state, models[:count])
    assert not (models[0].weight == 7.0).any()


def test_a_captured_state_shares_no_memory_and_reuses_its_buffers():
    model, optimizer = toy()
    train(model, optimizer)
    state = capture_state(model, optimizer)
    held = storages(state)
    assert not storages([model.state_dict(), optimizer.state_dict()]) & held
    train(model, optimizer)
    again = capture_state(model, optimizer, out=state)
    assert storages(again["model"]) <= held
    assert fingerprint(again["model"]) == fingerprint(model.state_dict())
    restore_state(again, model, optimizer)
    assert not storages([model.state_dict(), optimizer.state_dict()]) & storages(again)


def test_tied_weights_stay_tied_and_weights_that_were_untied_do_not_share_a_buffer():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

    model = Tied()
    state = capture_state(model)
    assert state["model"]["first.weight"] is state["model"]["second.weight"]
    model.second.weight = nn.Parameter(torch.zeros(4, 4))
    state = capture_state(model, out=state)
    assert fingerprint(state["model"]) == fingerprint(model.state_dict())


def test_states_load_with_weights_only(tmp_path):
    model, optimizer = toy()
    train(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scheduler = scheduler_for()
    for batch in itertools.islice(scheduler.batch_iterator(), 5):
        scheduler.update_with_loss(torch.rand(len(batch.indices)))
    saved = {
        "training": capture_state(model, optimizer, scaler),
        "scheduler": tensors_from_arrays(scheduler.state_dict()),
    }
    torch.save(saved, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    restore_state(loaded["training"], *toy(seed=1), scaler)
    other = scheduler_for()
    other.load_state_dict(arrays_from_tensors(loaded["scheduler"]))
    tail = [batch.indices.tolist() for batch in drain(scheduler)]
    assert [batch.indices.tolist() for batch in drain(other)] == tail
    assert len(tail) == 3 * 12 - 5


def drain(scheduler: R8Scheduler):
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            yield batch
            scheduler.update_with_loss(np.cos(batch.indices) + 2)


# Whole runs -----------------------------------------------------------------------------


class Run:
    """A small network trained through a loader, with all that a script has."""

    def __init__(self, workers: int = 0, accumulation: int = 1, watch: BackupWatch | None = None) -> None:
        rng = np.random.default_rng(0)
        self.x = torch.from_numpy(rng.normal(size=(SAMPLES, 4)).astype(np.float32))
        self.y = torch.from_numpy(rng.integers(0, 3, SAMPLES))
        self.model, self.optimizer = toy()
        self.watch = BackupWatch(never, scheduler_for, initial_lr=0.05) if watch is None else watch
        self.scheduler = self.watch.scheduler
        self.scheduler.attach_model(
            lambda: capture_state(self.model, self.optimizer, copy=False),
            lambda state: restore_state(state, self.model, self.optimizer),
        )
        follow_lr(self.scheduler, self.optimizer)
        self.accumulation = accumulation
        sampler = R8BatchSampler(self.scheduler, ahead=accumulation - 1)
        self.loader = DataLoader(
            TensorDataset(torch.arange(SAMPLES)),
            batch_sampler=sampler,
            num_workers=workers,
            generator=torch.Generator(),
        )
        self.seen: list[list[int]] = []

    def go(self, stop_at: int | None = None) -> None:
        held: list[torch.Tensor] = []
        for _ in self.scheduler.epoch_iterator():
            for (numbers,) in self.loader:
                losses = nn.functional.cross_entropy(self.model(self.x[numbers]), self.y[numbers], reduction="none")
                losses = losses * self.watch.factor()
                (losses.mean() / self.accumulation).backward()
                self.seen.append(numbers.tolist())
                held.append(losses.detach())
                if len(held) == self.accumulation:
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    for part in held:
                        self.scheduler.update_with_loss(part)
                    held.clear()
                    if stop_at is not None and self.scheduler.global_step >= stop_at:
                        return

    def save(self, path) -> None:
        state = {
            "training": capture_state(self.model, self.optimizer),
            "scheduler": tensors_from_arrays(self.scheduler.state_dict()),
        }
        torch.save(state, path)

    def load(self, path) -> None:
        state = torch.load(path, weights_only=True)
        self.scheduler.load_state_dict(arrays_from_tensors(state["scheduler"]))
        restore_state(state["training"], self.model, self.optimizer)


@pytest.mark.parametrize(("workers", "accumulation", "stop_at"), [(0, 1, 17), (2, 4, 16)])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, workers, accumulation, stop_at):
    whole = Run(workers, accumulation)
    whole.go()
    first = Run(workers, accumulation)
    first.go(stop_at)
    first.save(tmp_path / "run.pt")
    first.scheduler.close()
    torch.manual_seed(99)
    second = Run(workers, accumulation)
    second.load(tmp_path / "run.pt")
    second.go()
    assert first.seen + second.seen == whole.seen
    assert fingerprint(second.model.state_dict()) == fingerprint(whole.model.state_dict())


@pytest.mark.parametrize(
    ("workers", "accumulation", "seed"),
    [(0, 1, 0), (2, 1, 1), (0, 4, 2), *(pytest.param(2, 4, seed, marks=pytest.mark.slow) for seed in range(3, 9))],
)
def test_nan_at_random_steps_ends_finite_and_rollbacks_bring_back_the_backup(workers, accumulation, seed):
    run = Run(workers, accumulation, BackupWatch(random_steps(seed), scheduler_for, num_epochs=17, initial_lr=0.05))
    run.go()
    check_survival(run.watch.findings(), accumulation=accumulation)


@pytest.mark.parametrize(("workers", "accumulation"), [(0, 1), (2, 4)])
def test_more_nan_than_backups_can_undo_ends_in_an_error_that_names_samples(workers, accumulation):
    run = Run(workers, accumulation, BackupWatch(always, scheduler_for, num_epochs=17))
    with pytest.raises(TrainingDiverged) as caught:
        run.go()
    check_diverged(str(caught.value))
    run.scheduler.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_any_pattern_of_nan_is_survived_or_ends_in_the_error(seed):
    """Up to 14 faults, crowded or not: what has to be survived is, and the rest is survived or says why not."""
    rng = np.random.default_rng(seed)
    first, width = int(rng.integers(0, 204)), int(rng.integers(10, 204))
    faults = sorted({int(step) for step in first + rng.integers(0, width, rng.integers(1, 15)) if step < 204})
    run = Run(watch=BackupWatch(lambda _: faults, scheduler_for, num_epochs=17))
    try:
        run.go()
    except TrainingDiverged as error:
        assert not survivable(faults)
        check_diverged(str(error))
        return
    found = run.watch.findings()
    assert found["steps"] == found["length"]
    assert found["rollbacks"] == len(faults)
    assert found["finite"]
    assert found["equal"]
    assert found["unchanged"]
    assert found["held"]


def test_a_step_that_mixed_precision_left_out_is_no_fault_and_needs_no_rollback():
    watch = BackupWatch(random_steps(4), scheduler_for, num_epochs=17, initial_lr=0.05)
    overflows = {7, 30, 61} - set(watch.faults)
    run = Run(watch=watch)
    scaler, scales = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=20), []
    parts = (run.model, run.optimizer, scaler)
    watch.scheduler._safety._load = None  # Run's own functions leave the scaler out
    watch.scheduler.attach_model(lambda: capture_state(*parts, copy=False), lambda state: restore_state(state, *parts))
    for _ in watch.scheduler.epoch_iterator():
        for (numbers,) in run.loader:
            step = watch.scheduler.global_step
            with torch.autocast("cpu", torch.bfloat16):
                losses = nn.functional.cross_entropy(run.model(run.x[numbers]), run.y[numbers], reduction="none")
            assert losses.dtype is torch.float32
            scales.append(scaler.get_scale())
            losses = (losses * watch.factor()).bfloat16()
            scaler.scale(losses.float().mean() * (3e38 if step in overflows else 1.0)).backward()
            before = fingerprint(run.model.state_dict())
            scaler.step(run.optimizer)
            scaler.update()
            run.optimizer.zero_grad()
            skipped = scaler.get_scale() < scales[-1] and step not in watch.faults
            result = watch.scheduler.update_with_loss(losses, skipped=skipped)
            assert skipped == (step in overflows)
            if skipped:
                assert fingerprint(run.model.state_dict()) == before
                assert not result.rolled_back
    found = watch.findings()  # the scaler leaves out the steps that NaN hits, too
    assert (found["rollbacks"], found["finite"], found["steps"]) == (0, True, found["length"])
    assert len(set(scales)) > 2


@pytest.mark.filterwarnings("ignore:'set_vital'")  # torchdata 0.11 with torch 2.13
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_data_loader_resumes_in_the_middle_of_an_epoch(workers):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def build() -> tuple[R8Scheduler, DataLoader]:
        scheduler = scheduler_for(num_epochs=2)
        sampler = R8BatchSampler(scheduler)
        return scheduler, stateful.StatefulDataLoader(
            TensorDataset(torch.arange(SAMPLES)), batch_sampler=sampler, num_workers=workers
        )

    def run(scheduler, loader, limit=None) -> list[list[int]]:
        seen = []
        for _ in scheduler.epoch_iterator():
            for (numbers,) in loader:
                seen.append(numbers.tolist())
                scheduler.update_with_loss(torch.cos(numbers.float()) + 2)
                if len(seen) == limit:
                    return seen
        return seen

    whole = run(*build())
    scheduler, loader = build()
    head = run(scheduler, loader, limit=5)
    state, place = scheduler.state_dict(), loader.state_dict()
    scheduler.close()
    scheduler, loader = build()
    scheduler.load_state_dict(state)
    loader.load_state_dict(place)
    assert head + run(scheduler, loader) == whole
