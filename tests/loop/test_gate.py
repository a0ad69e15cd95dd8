"""The gate before the step: what it leaves out, what it lets through, that it says so, and what it costs."""

from __future__ import annotations

import json
import math
import threading

import numpy as np
import pytest
import torch

from learnit_r8 import ConfigError, ProtocolError, R8Scheduler, Verdict, events
from learnit_r8.integrations.torch import capture_state, clip_gradients, norms_by_group, restore_state


class Ears(list):
    def record(self, event):
        self.append(event)

    def of(self, kind):
        return [event for event in self if isinstance(event, kind)]


BARE = {"checkpoint_dir": None, "ui": "off"}


def quiet(samples=512, batch=8, **options):
    ears = Ears()
    return R8Scheduler(samples, batch, **{"num_epochs": 8, "sinks": [ears], **BARE, **options}), ears


def noise(step):
    return 1.0 + 0.1 * math.sin(37.0 * step * step)


class Learner:
    """A small classifier; `bad` spoils the inputs of a step, `burst` its gradient."""

    def __init__(self, scheduler, *, checks=True, clips=False):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(512, 6, generator=generator)
        self.y = (self.x[:, 0] + 0.3 * torch.randn(512, generator=generator) > 0).float()
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.scheduler, self.checks, self.clips = scheduler, checks, clips
        self.left_out = []

    def step(self, batch, *, bad=False, burst=1.0):
        y = self.y[batch.indices]
        outputs = self.model(self.x[batch.indices])[:, 0]
        losses = torch.nn.functional.binary_cross_entropy_with_logits(outputs, y, reduction="none")
        losses = losses * 40.0 if bad else losses
        self.optimizer.zero_grad()
        losses.mean().backward()
        for parameter in self.model.parameters():
            parameter.grad *= burst
        norm = clip_gradients(self.scheduler, self.model) if self.clips else None
        verdict = self.scheduler.check(losses, norm) if self.checks else True
        if verdict:
            self.optimizer.step()
        else:
            self.left_out.append(batch.step)
        return self.scheduler.update_with_loss(losses)

    def weights(self):
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])


def trained(*, bad=(), bursts=(), steps=None, **options):
    kinds = {name: options.pop(name) for name in ("checks", "clips") if name in options}
    scheduler, ears = quiet(**options)
    learner = Learner(scheduler, **kinds)
    scheduler.attach_model(
        lambda: capture_state(learner.model, learner.optimizer, copy=False),
        lambda state: restore_state(state, learner.model, learner.optimizer),
    )
    with scheduler:
        for _ in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                learner.step(batch, bad=batch.step in bad, burst=100.0 if batch.step in bursts else 1.0)
                if batch.step + 1 == steps:
                    return learner, ears
    return learner, ears


def test_a_run_in_which_nothing_is_left_out_is_the_same_to_the_bit():
    with_gate, ears = trained()
    without, _ = trained(checks=False)
    assert not with_gate.left_out
    assert torch.equal(with_gate.weights(), without.weights())
    catalogs = [learner.scheduler.catalog.state_dict() for learner in (with_gate, without)]
    np.testing.assert_equal(*catalogs)
    assert len(ears.of(events.LossReported)) == 512


def test_lone_outliers_are_left_out_named_as_skipped_and_cost_no_rollback():
    at = (150, 210, 300, 301, 460)
    learner, ears = trained(bad=at)
    assert learner.left_out == list(at)
    told = ears.of(events.SpikeSeen)
    assert [(event.step, event.verdict) for event in told] == [(step, "skipped") for step in at]
    assert all("left out before its step: a loss of" in event.reason for event in told)
    assert not ears.of(events.RolledBack)
    verdicts = {event.step: event.verdict for event in ears.of(events.LossReported)}
    assert {step for step, verdict in verdicts.items() if verdict == "skipped"} == set(at)


def test_a_gradient_that_explodes_without_a_loss_is_left_out():
    learner, ears = trained(bursts=(150, 300), clips=True)
    assert learner.left_out == [150, 300]
    assert all("a gradient's norm of" in event.reason for event in ears.of(events.SpikeSeen))
    norms = [event for event in ears.of(events.MetricLogged) if event.name == "grad_norm"]
    assert [event.step for event in norms] == list(range(512))


def test_nan_is_left_out_from_the_first_step_and_its_sample_named():
    scheduler, ears = quiet()
    for batch in scheduler.batch_iterator():
        losses = np.full(8, noise(batch.step), np.float32)
        bad = batch.step in (0, 20)
        losses[3] = np.nan if bad else losses[3]
        assert bool(scheduler.check(losses)) == (not bad)
        named = batch.indices[3]
        result = scheduler.update_with_loss(losses)
        if batch.step == 20:
            assert result.verdict is Verdict.NONFINITE
            assert named in scheduler.catalog.left_out
    assert not ears.of(events.RolledBack) + ears.of(events.RollbackFailed)


def test_a_nan_that_was_left_out_restores_no_backup_where_nobody_can_look():
    restored = []
    scheduler, ears = quiet(load_callback=restored.append, backup_every=None)
    for batch in scheduler.batch_iterator():
        if batch.step == 10:
            scheduler.update_cpu_backup({"w": np.ones(3)})
        bad = batch.step == 30
        assert bool(scheduler.check(math.nan if bad else noise(batch.step))) == (not bad)
        scheduler.update_with_loss()
    assert not restored
    assert not ears.of(events.RolledBack)


def test_a_norm_that_is_not_finite_is_left_out_and_a_row_of_them_is_told_once(capsys):
    scheduler, ears = quiet(num_epochs=1)
    for batch in scheduler.batch_iterator():
        answer = scheduler.check(noise(batch.step), grad_norm=torch.tensor(math.inf if batch.step >= 5 else 1.0))
        assert bool(answer) == (batch.step < 5)
        result = scheduler.update_with_loss()
        assert result.verdict is (Verdict.CALM if batch.step < 5 else Verdict.SKIPPED)
    told = [event.message for event in ears.of(events.Notice) if "norms of the gradient" in event.message]
    assert len(told) == 1
    assert "the last 16" in told[0]


def test_a_new_level_costs_one_step_and_that_it_is_one_is_told():
    scheduler, ears = quiet()
    left_out = []
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            loss = noise(batch.step) * (50.0 if batch.step >= 200 else 1.0)
            if not scheduler.check(loss):
                left_out.append(batch.step)
            scheduler.update_with_loss(loss)
    assert left_out == [200]
    assert sum("is a level or a tail by now" in event.message for event in ears.of(events.Notice)) == 1
    assert not ears.of(events.RollbackFailed)


def test_an_easier_or_harder_mix_of_known_samples_is_no_outlier():
    hard = np.arange(512) % 16 == 0
    scheduler, _ = quiet(batch=16, strategy="uniform")
    rng = np.random.default_rng(0)
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            losses = np.where(hard[batch.indices], 8.0, 0.1) * rng.lognormal(0, 0.2, 16)
            assert scheduler.check(losses)
            scheduler.update_with_loss(losses)


def test_an_outlier_that_all_samples_show_stands_out_amid_batches_that_a_few_make_as_high():
    rng, hard = np.random.default_rng(0), np.arange(512) % 100 == 7
    scheduler, _ = quiet(batch=16, strategy="uniform", num_epochs=20)
    left_out = set()
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            losses = rng.lognormal(-3.0, 0.5, 16) * np.where(rng.random(16) < 0.01, 60.0, 1.0)
            losses[hard[batch.indices]] *= rng.choice([1.0, 40.0])  # at times learned, at times not
            if batch.step in (200, 333, 500):
                losses *= 12.0
            if not scheduler.check(losses):
                left_out.add(batch.step)
            scheduler.update_with_loss(losses)
    assert left_out == {200, 333, 500}


def test_two_outliers_in_a_row_are_both_left_out_where_lone_ones_were_seen_before():
    scheduler, _ = quiet()
    bad, left_out = {150, 260, 261, 262, 350}, set()
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            loss = noise(batch.step) * (30.0 if batch.step in bad else 1.0)
            if not scheduler.check(loss):
                left_out.add(batch.step)
            scheduler.update_with_loss(loss)
    assert left_out == bad


def test_sparse_signals_amid_zeros_are_not_starved():
    scheduler, _ = quiet(samples=2048)
    signals = 0
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            seldom = batch.step > 60 and batch.step % 90 == 0
            loss = 0.5 if seldom or batch.step < 16 else 0.0
            assert scheduler.check(loss, grad_norm=2.0 * loss)
            scheduler.update_with_loss(loss)
            signals += seldom
    assert signals == 22


def test_what_stands_out_again_and_again_is_the_tail_and_is_let_through():
    scheduler, ears = quiet(samples=4096)
    answers = []
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            high = batch.step > 200 and batch.step % 20 == 0
            loss = noise(batch.step) * (30.0 if high else 1.0)
            if high:
                answers.append(bool(scheduler.check(loss)))
            else:
                assert scheduler.check(loss)
            scheduler.update_with_loss(loss)
    first = answers.index(True)
    assert 16 <= first <= 40
    assert all(answers[first:])
    assert sum("is a level or a tail by now" in event.message for event in ears.of(events.Notice)) == 1


def test_a_young_run_leaves_out_what_is_far_by_loss_and_norm_alike():
    scheduler, _ = quiet()
    for batch in scheduler.batch_iterator():
        high = 50.0 if batch.step == 6 else 1.0
        loss = 2.3 * noise(batch.step) * high
        assert bool(scheduler.check(loss, grad_norm=noise(batch.step) * high)) == (high == 1.0)
        scheduler.update_with_loss(loss)


def test_the_loss_is_read_once_and_the_report_needs_none():
    class Loss:
        reads = 0

        def __float__(self):
            self.reads += 1
            return 0.5

    scheduler, _ = quiet()
    for batch in scheduler.batch_iterator():
        loss, norm = Loss(), Loss()
        scheduler.check(loss, norm)
        result = scheduler.update_with_loss(loss if batch.step % 2 else None)
        assert (loss.reads, norm.reads, result.loss) == (1, 1, 0.5)


def test_a_report_of_another_loss_than_was_checked_counts_as_given():
    scheduler, _ = quiet()
    batch = next(iter(scheduler.batch_iterator()))
    scheduler.check(3.0)
    assert scheduler.update_with_loss(np.arange(8.0), batch).loss == 3.5


def test_loss_and_norm_may_be_checked_one_by_one():
    scheduler, _ = quiet()
    batches = scheduler.batch_iterator()
    next(batches)
    assert not scheduler.check(math.nan)
    assert not scheduler.check(grad_norm=1.0)
    assert scheduler.update_with_loss().verdict is Verdict.NONFINITE
    next(batches)
    assert scheduler.check(1.0)
    assert not scheduler.check(grad_norm=math.nan)
    assert scheduler.update_with_loss().verdict is Verdict.SKIPPED


def test_each_of_several_open_batches_is_checked_with_its_name():
    scheduler, _ = quiet(lookahead=3)
    loop = scheduler.batch_iterator()
    first, second, third = (next(loop) for _ in range(3))
    assert not scheduler.check(math.nan, batch=second)
    assert scheduler.check(1.0)  # of the newest
    verdicts = [scheduler.update_with_loss(1.0 if batch is not second else None, batch) for batch in (first, second)]
    assert [bool(verdict) for verdict in verdicts] == [True, False]
    assert scheduler.update_with_loss(batch=third).loss == 1.0


def test_a_step_that_the_scaler_skips_after_a_good_check_is_skipped_as_ever():
    scheduler, ears = quiet()
    next(iter(scheduler.batch_iterator()))
    assert scheduler.check(1.0)
    result = scheduler.update_with_loss(skipped=True)
    assert (result.verdict, result.accepted) == (Verdict.SKIPPED, True)
    assert not ears.of(events.SpikeSeen)


def test_what_check_refuses():
    scheduler, _ = quiet()
    with pytest.raises(ProtocolError, match="no batch is open"):
        scheduler.check(1.0)
    next(iter(scheduler.batch_iterator()))
    with pytest.raises(TypeError, match="check got nothing to judge"):
        scheduler.check()
    with pytest.raises(TypeError, match="takes one number, such as its mean, got str"):
        scheduler.check(1.0, "big")
    with pytest.raises(ProtocolError, match="has 8 samples, but 3 losses came"):
        scheduler.check(np.ones(3))
    with pytest.raises(TypeError, match="got None"):
        scheduler.update_with_loss()


@pytest.mark.parametrize("clip", [0, -1.0, "adaptive", math.nan, True, [1.0]])
def test_a_bad_clip_is_refused(clip):
    with pytest.raises(ConfigError, match="clip must be a"):
        R8Scheduler(8, 2, num_epochs=1, clip=clip, **BARE)


def test_clip_takes_a_number_exactly_and_auto_follows_the_norms():
    scheduler, _ = quiet(clip=0.25)
    learner = Learner(scheduler, clips=True)
    next(iter(scheduler.batch_iterator()))
    weight = learner.model[0].weight
    weight.grad = torch.full_like(weight, 3.0)
    assert float(clip_gradients(scheduler, learner.model)) == pytest.approx(3.0 * math.sqrt(48))
    assert float(weight.grad.norm()) == pytest.approx(0.25, rel=1e-4)
    assert set(norms_by_group(learner.model)) == {"grad_norm/0"}
    assert float(norms_by_group(learner.model)["grad_norm/0"]) == pytest.approx(0.25, rel=1e-4)
    scheduler, _ = quiet(clip="auto")
    assert scheduler.clip_norm() == math.inf
    for batch in scheduler.batch_iterator():
        scheduler.clipped(2.0 if batch.step % 2 else 3.0)
        scheduler.update_with_loss(1.0)
    assert 3.0 < scheduler.clip_norm() < 8.0
    assert quiet()[0].clip_norm() == math.inf


def test_the_parts_of_a_model_are_measured_with_its_norm_and_the_one_that_exploded_is_named():
    scheduler, ears = quiet(clip=1.0)
    learner = Learner(scheduler)
    for batch in scheduler.batch_iterator():
        losses = learner.model(learner.x[batch.indices])[:, 0].square()
        learner.optimizer.zero_grad()
        losses.mean().backward()
        if batch.step == 43:
            learner.model[2].weight.grad *= 1e4
        parts = norms_by_group(learner.model)
        whole = torch.nn.utils.get_total_norm([p.grad for p in learner.model.parameters()])
        norm = clip_gradients(scheduler, learner.model)
        assert float(norm) == pytest.approx(float(whole), rel=1e-5)
        assert bool(scheduler.check(losses, norm)) == (batch.step != 43)
        if batch.step == 43:
            told = {event.name: event.value for event in ears.of(events.MetricLogged) if event.step == 43}
            assert told == {"grad_norm": pytest.approx(float(norm)), **{name: float(parts[name]) for name in parts}}
        scheduler.update_with_loss(losses)
    steps = [event.step for event in ears.of(events.MetricLogged) if event.name == "grad_norm/2"]
    assert steps == [0, 8, 16, 24, 32, 40, 43, 51, 59]
    (told,) = ears.of(events.SpikeSeen)
    assert told.reason.endswith(", most of it in 2")


def layers(kind, *counts):
    """A model with tokens and rows of layers."""
    rows = {name: torch.nn.ModuleList([kind(4, 4) for _ in range(n)]) for name, n in zip("ab", counts, strict=False)}
    return torch.nn.ModuleDict({"tokens": torch.nn.Embedding(9, 4), **rows})


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (layers(torch.nn.Linear, 12), ["tokens", "a.0-2", "a.3-5", "a.6-8", "a.9-11"]),
        (layers(torch.nn.Linear, 2, 9), ["tokens", "a.0", "a.1", "b.0-1", "b.2-3", "b.4-5", "b.6-8"]),
        (torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))), ["0.0", "0.1"]),
        (torch.nn.Linear(3, 3), []),
    ],
)
def test_a_model_is_split_into_a_few_parts_that_a_screen_can_name(model, names):
    assert not norms_by_group(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    found = norms_by_group(model)
    if names:
        assert [name.removeprefix("grad_norm/") for name in found] == names
    total = math.sqrt(sum(float(norm) ** 2 for norm in found.values()))
    assert total == pytest.approx(math.sqrt(sum(p.numel() for p in model.parameters())), rel=1e-6)


def test_several_batches_that_share_a_step_are_checked_together():
    scheduler, ears = quiet(lookahead=3, num_epochs=2)
    loop, answers = scheduler.batch_iterator(), []
    for _ in range(20):
        shared = [next(loop) for _ in range(3)]
        losses = [noise(batch.step) * (40.0 if batch.step == 49 else 1.0) for batch in shared]
        answers.append(bool(scheduler.check(losses, noise(len(answers)), batch=shared)))
        for batch, loss in zip(shared, losses, strict=True):
            result = scheduler.update_with_loss(loss, batch)
            assert (result.verdict is Verdict.SKIPPED) == (not answers[-1])
    assert [k for k, answer in enumerate(answers) if not answer] == [16]
    assert [event.value for event in ears.of(events.MetricLogged)] == [noise(k) for k in range(20)]
    with pytest.raises(ProtocolError, match="check got 2 batches and 1 losses"):
        scheduler.check([1.0], batch=[next(loop), next(loop)])


def test_a_clip_that_nobody_applies_is_told(capsys):
    scheduler, ears = quiet(clip="auto", num_epochs=1)
    for _ in scheduler.batch_iterator():
        scheduler.update_with_loss(1.0)
    assert [event.message.startswith("clip='auto' and nothing clips") for event in ears.of(events.Notice)] == [True]


def test_gate_and_clip_go_on_to_the_bit_after_a_resume():
    whole, _ = trained(bad=(150, 400), bursts=(330,), clips=True, clip="auto")
    first, _ = trained(bad=(150, 400), bursts=(330,), clips=True, clip="auto", steps=180)
    state = json.loads(json.dumps(first.scheduler._safety.gate.state_dict()))
    assert state["credit"] < 16
    assert len(state["norms"]) == 64
    scheduler, _ = quiet(clip="auto")
    scheduler.load_state_dict(first.scheduler.state_dict())
    first.scheduler, first.left_out = scheduler, [150]
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            first.step(batch, bad=batch.step == 400, burst=100.0 if batch.step == 330 else 1.0)
    assert first.left_out == whole.left_out == [150, 330, 400]
    assert torch.equal(first.weights(), whole.weights())
    assert scheduler.clip_norm() == whole.scheduler.clip_norm()


class World:
    """Ranks as threads."""

    def __init__(self, size):
        self.parts, self.barrier = [None] * size, threading.Barrier(size, timeout=20)

    def gather(self, rank):
        def all_gather(array):
            self.parts[rank] = array
            self.barrier.wait()
            everyone = np.concatenate(self.parts)
            self.barrier.wait()
            return everyone

        return all_gather


@pytest.mark.parametrize("sharded", [False, True])
def test_ranks_decide_together(sharded):
    world, found = World(4), [None] * 4

    def work(rank):
        scheduler, _ = quiet(
            512, 8, num_epochs=4, rank=rank, world_size=4, all_gather=world.gather(rank), sharded=sharded, sinks=[]
        )
        answers = []
        with scheduler:
            for _ in scheduler.epoch_iterator():
                for batch in scheduler.batch_iterator():
                    size = len(batch.indices)
                    high = 90.0 if batch.step == 120 and rank == 2 else 1.0  # of one rank's share, 23 of all
                    losses = np.full(size, high * noise(batch.step), np.float32)
                    norm = 500.0 if batch.step == 160 and rank == 1 else 1.0 + 0.1 * rank
                    ok = scheduler.check(losses, norm)
                    result = scheduler.update_with_loss(losses)
                    answers.append((bool(ok), result.verdict))
        found[rank] = answers

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] is not None
    assert found[0] == found[1] == found[2] == found[3]
    assert [step for step, (ok, _) in enumerate(found[0]) if not ok] == [120, 160]
