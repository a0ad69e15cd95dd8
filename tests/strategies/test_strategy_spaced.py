"""Spaced repetition, inside a scheduler and as the batch sampler of a torch DataLoader."""

from __future__ import annotations

import io
import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from learnit_r8.errors import ConfigError, ProtocolError
from learnit_r8.strategies import ExponentialMovingStats, SpacedRepetitionSampler
from learnit_r8.structures.max_tree import MaxTree
from learnit_r8.testing import check_resume


def sampler_of(size=40, **settings):
    defaults = {"num_steps": 20, "batch_size": 4, "spacing_steps": 2}
    return SpacedRepetitionSampler(range(size), **{**defaults, **settings})


# The published program ----------------------------------------------------------------------


class ToyDataset(Dataset):
    def __init__(self, num_samples=200):
        self.data = torch.randn(num_samples, 10, generator=torch.Generator().manual_seed(0))
        self.labels = torch.arange(num_samples) % 5

    def __len__(self):
        return len(self.data)

    def __getitem__(self, idx):
        return self.data[idx], self.labels[idx], idx


def collate(batch):
    return torch.stack([item[0] for item in batch]), torch.tensor([item[1] for item in batch]), [i[2] for i in batch]


def test_the_published_training_loop_runs():
    # Its README names the collate function once `collate` and once `collate_with_indices`: the latter does not exist.
    dataset = ToyDataset()
    sampler = SpacedRepetitionSampler(
        data_source=dataset,
        loss_stats=ExponentialMovingStats(alpha=0.01),
        num_steps=50,
        batch_size=16,
        spacing_steps=5,
        min_backlog_ratio=0.1,
        growth_rate=1.2,
        max_interval=100,
        success_threshold_std=0.5,
    )
    model = torch.nn.Linear(10, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    steps = 0
    for inputs, labels, indices in DataLoader(dataset, batch_sampler=sampler, collate_fn=collate):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        sampler.update_difficulties(loss.item())
        assert len(set(indices)) == 16
        steps += 1
    assert steps == len(sampler) == 50
    assert sampler.loss_stats.mean > 0


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("by_name", [False, True])
def test_losses_reach_the_samples_that_they_belong_to_under_prefetching_workers(workers, by_name):
    # The original credits a loss to the batch that was drawn last; workers have drawn several ahead by then.
    dataset = ToyDataset(60)
    sampler = SpacedRepetitionSampler(dataset, num_steps=30, batch_size=6)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers)
    for _, _, indices in loader:
        losses = torch.tensor(indices, dtype=torch.float32) + 1
        sampler.update_difficulties(losses, indices if by_name else None)
    seen = np.flatnonzero(sampler.difficulties)
    assert len(seen) > 20
    np.testing.assert_allclose(sampler.difficulties[seen], seen + 1, rtol=1e-6)


# What is chosen -----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_batch_is_full_distinct_and_takes_its_share_of_unseen_samples(data):
    size = data.draw(st.integers(1, 60))
    batch_size = data.draw(st.integers(1, 20))
    ratio = data.draw(st.sampled_from([0, 0.1, 0.34, 1.0]))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    sampler = sampler_of(
        size,
        num_steps=40,
        batch_size=batch_size,
        spacing_steps=data.draw(st.sampled_from([0, 0.5, 1, 7])),
        min_backlog_ratio=ratio,
        patience=data.draw(st.sampled_from([1, 4, 32])),
    )
    seen: set[int] = set()
    waiting = []
    for batch in sampler:
        assert len(batch) == len(set(batch)) == min(batch_size, size)
        assert all(type(index) is int and 0 <= index < size for index in batch)
        new = set(batch) - seen
        assert len(new) >= min(math.ceil(ratio * len(batch) - 1e-9), size - len(seen))
        seen |= new
        waiting.append(batch)
        if rng.random() < 0.7:
            batch = waiting.pop(0)
            loss = (
                rng.lognormal(size=len(batch)) if rng.random() < 0.5 else float(rng.choice([1.0, 5.0, np.nan, np.inf]))
            )
            sampler.update_difficulties(loss)
        elif rng.random() < 0.5:
            batch = waiting.pop(int(rng.integers(len(waiting))))
            sampler.update_difficulties(rng.lognormal(size=len(batch)), batch)
    assert np.isfinite(sampler.difficulties).all()


def test_due_samples_come_hardest_first():
    sampler = sampler_of(40, spacing_steps=0, min_backlog_ratio=0)
    order = np.random.default_rng(0).permutation(40)
    sampler.update_difficulties(order.astype(float), order)
    batches = iter(sampler)
    assert next(batches) == [39, 38, 37, 36]
    assert next(batches) == [35, 34, 33, 32]


def test_the_interval_grows_with_success_and_falls_back_with_a_miss():
    stats = ExponentialMovingStats(alpha=1e-9)
    stats.update([0.0, 2.0])  # mean 1, standard deviation 1
    sampler = sampler_of(5, loss_stats=stats, growth_rate=2, max_interval=5, batch_size=5)
    growth = []
    for _ in range(4):
        sampler.update_difficulties(0.5, [3])
        growth.append(float(sampler.intervals[3]))
    assert growth == [2, 4, 5, 5]
    sampler.update_difficulties(1.6, [3])
    assert sampler.intervals[3] == 1


@pytest.mark.parametrize(("loss", "steps"), [(-1.5, 4), (-0.5, 2), (1.0, 1), (2.5, 0.5), (3.5, 0.25)])
def test_the_next_review_depends_on_the_distance_from_the_mean(loss, steps):
    stats = ExponentialMovingStats(alpha=1e-9)
    stats.update([0.0, 2.0])
    sampler = sampler_of(5, loss_stats=stats, growth_rate=1, spacing_steps=8)
    sampler.update_difficulties(loss, [3])
    assert sampler.state_dict()["queue"]["due"][3] == 8 * steps


def test_samples_whose_loss_is_never_reported_come_back():
    # The original takes them for reviewed, for ever.
    sampler = sampler_of(12, num_steps=60, patience=4, spacing_steps=50)
    counts = np.zeros(12)
    for step, batch in enumerate(sampler):
        counts[batch] += 1
        if step % 2:
            sampler.update_difficulties(1.0, batch)
    assert counts.min() >= 5


def test_a_new_pass_forgets_what_the_last_one_left_unreported():
    sampler = sampler_of(40)
    abandoned = [next(iter(sampler)), next(iter(sampler))]
    batches = iter(sampler)
    first = next(batches)
    sampler.update_difficulties(7.0)
    np.testing.assert_array_equal(np.flatnonzero(sampler.difficulties), np.sort(first))
    assert abandoned


# State --------------------------------------------------------------------------------------


def test_a_restored_sampler_goes_on_and_repeats_what_was_not_reported():
    def report(sampler, batch):
        sampler.update_difficulties(np.sin(np.array(batch)) + 2)
        return batch

    reference = sampler_of()
    whole = [report(reference, batch) for batch in reference]
    interrupted = sampler_of()
    batches = iter(interrupted)
    for _ in range(7):
        report(interrupted, next(batches))
    unreported = next(batches)
    restored = sampler_of()
    restored.load_state_dict(json_with_arrays(interrupted.state_dict()))
    rest = [report(restored, batch) for batch in restored]
    assert rest[0] == unreported
    assert rest == whole[7:]
    second_pass = [report(reference, batch) for batch in reference]
    assert [report(restored, batch) for batch in restored] == second_pass


def json_with_arrays(state):
    """Send a state through JSON, arrays as lists."""
    return json.loads(json.dumps(state, default=lambda array: array.tolist()))


def test_the_sampler_is_resumable_at_any_step_and_leaves_global_randomness_alone():
    class Subject:
        def __init__(self):
            self.sampler = sampler_of(num_steps=10)
            self.batches = None

        def state_dict(self):
            return self.sampler.state_dict()

        def load_state_dict(self, state):
            self.sampler.load_state_dict(state)

    def advance(subject):
        if subject.batches is None:
            subject.batches = iter(subject.sampler)
        batch = next(subject.batches, None)
        if batch is None:
            subject.batches = iter(subject.sampler)
            batch = next(subject.batches)
        subject.sampler.update_difficulties(np.cos(batch) + 2)
        return batch

    states = global_randomness()
    check_resume(Subject, advance, steps=35, cuts=(1, 9, 10, 11, 23))
    assert states == global_randomness()


def test_a_state_of_another_data_set_is_refused():
    with pytest.raises(ValueError, match="40 samples, this queue 50"):
        sampler_of(50).load_state_dict(sampler_of(40).state_dict())


# Errors -------------------------------------------------------------------------------------


def test_bad_arguments_are_listed_together():
    with pytest.raises(ConfigError) as caught:
        SpacedRepetitionSampler([], num_steps=0, growth_rate=0.5, seed=-1)
    assert len(caught.value.problems) == 5  # with the missing batch_size


def test_reports_that_fit_no_batch_change_nothing():
    sampler = sampler_of()
    with pytest.raises(ProtocolError, match="no batch waits"):
        sampler.update_difficulties(1.0)
    next(iter(sampler))
    before = json_with_arrays(sampler.state_dict())
    with pytest.raises(ValueError, match="4 samples, losses of shape"):
        sampler.update_difficulties([1.0, 2.0])
    with pytest.raises(ValueError, match=r"0 \.\. 39"):
        sampler.update_difficulties(1.0, [40])
    with pytest.raises(TypeError, match="losses must be numbers"):
        sampler.update_difficulties("1.0")
    assert json_with_arrays(sampler.state_dict()) == before


# Parts --------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=300), st.floats(0.01, 1))
def test_moving_statistics_agree_with_an_explicit_weighted_sum(values, alpha):
    stats = ExponentialMovingStats(alpha)
    weights = []
    for value in values:
        stats.update(value)
        weights = [weight * (1 - alpha) for weight in weights] + [alpha if weights else 1.0]
    mean = np.dot(weights, values)
    deviation = math.sqrt(np.dot(weights, (np.array(values) - mean) ** 2))
    assert stats.mean == pytest.approx(mean, abs=1e-6 + 1e-9 * abs(mean))
    assert stats.std == pytest.approx(deviation, rel=1e-6, abs=1e-2)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 15, 17, 4096, 4097, 70_000]), st.integers(1, 300))
def test_the_top_of_a_max_tree_agrees_with_sorting(seed, size, k):
    rng = np.random.default_rng(seed)
    tree, reference = MaxTree(size), np.full(size, -np.inf, np.float32)
    for _ in range(3):
        empty = np.flatnonzero(np.isneginf(reference))
        slots = rng.permutation(empty)[: rng.integers(0, min(size, 2000) + 1)]
        values = rng.integers(-3, rng.integers(1, 1000) + 3, len(slots)).astype(np.float32)
        tree.insert(slots, values)
        reference[slots] = values
        top = tree.top(k)
        expected = np.sort(reference[~np.isneginf(reference)])[::-1][:k]
        np.testing.assert_array_equal(reference[top], expected)
        assert len(np.unique(top)) == len(top)
        gone = rng.permutation(np.flatnonzero(~np.isneginf(reference)))[: rng.integers(0, 500)]
        tree.remove(gone)
        reference[gone] = -np.inf
    filled = MaxTree(size)
    filled.fill(reference)
    np.testing.assert_array_equal(filled.top(k), tree.top(k))


def global_randomness():
    legacy = np.random.get_state()[1]  # noqa: NPY002 - that is the state to leave alone
    return random.getstate(), legacy.tolist(), torch.random.get_rng_state().tolist()


def test_statistics_take_tensors_and_nothing_that_is_no_number():
    plain, tensors = ExponentialMovingStats(), ExponentialMovingStats()
    for value in ([1.0, 2.0], [4.0, 6.5]):
        plain.update(value)
        tensors.update(torch.tensor(value, requires_grad=True))
    assert (plain.mean, plain.std) == (tensors.mean, tensors.std)
    before = plain.state_dict()
    for wrong in (None, "loss", [None]):
        with pytest.raises(TypeError, match="must be numbers"):
            plain.update(wrong)
    assert plain.state_dict() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_resumed_in_mid_pass_goes_on_the_same_with_workers_too(workers):
    def make():
        sampler = SpacedRepetitionSampler(range(60), num_steps=30, batch_size=8, spacing_steps=2)
        return sampler, DataLoader(range(60), batch_sampler=sampler, num_workers=workers)

    def train(sampler, loader, stop=None):
        seen = []
        for batch in loader:
            seen.append(batch.tolist())
            sampler.update_difficulties(np.sin(batch.numpy()) + 2)
            if len(seen) == stop:
                break
        return seen, sampler.state_dict()

    whole, _ = train(*make())
    head, state = train(*make(), stop=11)
    sampler, loader = make()
    sampler.load_state_dict(state)
    assert head + train(sampler, loader)[0] == whole


@pytest.mark.filterwarnings("ignore:'set_vital'")  # torchdata 0.11 with torch 2.13
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_data_loader_goes_on_with_as_many_batches_as_are_left(workers):
    torch = pytest.importorskip("torch")
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def build():
        sampler = SpacedRepetitionSampler(range(60), num_steps=30, batch_size=4, spacing_steps=3)
        return sampler, stateful.StatefulDataLoader(range(60), batch_sampler=sampler, num_workers=workers)

    sampler, loader = build()
    seen, file = [], io.BytesIO()
    for number, batch in enumerate(loader):
        seen.append(batch.tolist())
        sampler.update_difficulties((batch > 30).float() + batch / 100)
        if number == 11:
            torch.save(loader.state_dict(), file)
    file.seek(0)
    sampler, loader = build()
    loader.load_state_dict(torch.load(file))  # with its defaults
    rest = []
    for batch in loader:
        rest.append(batch.tolist())
        sampler.update_difficulties((batch > 30).float() + batch / 100)
    assert len(rest) == 18
    assert workers or rest == seen[12:]
