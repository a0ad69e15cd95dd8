"""Work that is put off changes nothing: not what is drawn, told, judged or saved, whoever looks at it, and when."""

import dataclasses

import numpy as np
import pytest

from learnit_r8 import R8Scheduler
from learnit_r8.events import MadeWith
from learnit_r8.loop.judge import Judge

CLOCKED = {"time", "seconds", "step_seconds", "r8_seconds", "elapsed", "pid", "version", "bytes"}


class Heard:
    """A sink; a patient one may hear of calm losses late."""

    ignores_batches = True

    def __init__(self, *, patient):
        self.patient = patient
        self.facts, self.times = [], []

    def record(self, event):
        if isinstance(event, MadeWith):  # the packages that are loaded by then
            return
        fields = {f.name: getattr(event, f.name) for f in dataclasses.fields(event) if f.name not in CLOCKED}
        self.facts.append((type(event).__name__, repr(fields)))
        self.times.append(event.time)


class Program:
    """A run on losses that follow from (seed, step): calm ones, or with outliers, NaN, faults and steep falls."""

    def __init__(self, seed, how, *, noise=0.05, faults=False, **options):
        self.rng, self.noise, self.faults = np.random.default_rng(seed), noise, faults
        self.how, self.looker = how, np.random.default_rng(99)
        self.sink = None if how == "unheard" else Heard(patient=how not in ("eager", "one by one"))
        self.model = {"w": np.zeros(4)}
        self.seen, self.put_off = [], 0
        given = {"num_epochs": 6, "backup_every": 8, "initial_lr": 0.1} | options
        self.scheduler = R8Scheduler(
            203, given.pop("batch_size", 8), seed=seed, ui="off", checkpoint_dir=None,
            sinks=[self.sink] if self.sink else [],
            state_callback=lambda: self.model, load_callback=self.load, **given,
        )  # fmt: skip
        if how == "one by one":
            self.scheduler._foresees = self.scheduler._puts_off = False

    def load(self, state):
        self.model = {"w": state["w"].copy()}

    def losses(self, ids, step):
        level = 0.2 + 2.0 * np.exp(-step / 30.0)
        losses = level * (1.0 + ids / 400.0) * self.rng.lognormal(0.0, self.noise, len(ids))
        if self.faults and step % 61 == 40:
            losses = losses * 30.0
        if self.faults and step % 97 == 50:
            losses[0] = np.nan
        if self.faults == "returns" and step in (150, 153, 156, 170, 172):
            self.model["w"] *= 60.0
            losses = losses * np.nan
            self.model["w"][0] = np.nan
        if self.faults and 100 <= step < 104:
            self.model["w"] += 1e3
            losses = losses * 200.0
        self.model["w"] += 0.01
        return losses.astype(np.float32)

    def look(self, step):
        if self.how != "looked at" or self.looker.random() > 0.3:
            return
        kind = self.looker.integers(5)
        if kind == 0:
            self.scheduler.state_dict()
        elif kind == 1:
            assert np.isfinite(self.scheduler.catalog.expected_loss).all()
        elif kind == 2:
            self.scheduler._safety.detector.state_dict()
        elif kind == 3:
            assert self.scheduler._safety.backups.ring.backups is not None
        else:
            assert self.scheduler.catalog.num_seen >= 0

    def train(self, until=10**9):
        for _ in self.scheduler.epoch_iterator():
            for batch in self.scheduler.batch_iterator():
                losses = self.losses(batch.indices, batch.step)
                result = self.scheduler.update_with_loss(losses)
                self.seen.append((batch.indices.tolist(), batch.lr, batch.id, batch.step, batch.epoch, repr(result)))
                self.look(batch.step)
                if self.scheduler.global_step >= until:
                    return

    def state(self):
        state = self.scheduler.state_dict()
        return repr({name: part for name, part in state.items() if name != "budget"})


@pytest.fixture
def counted(monkeypatch):
    """Count the losses that are put off."""
    count, real = [0], Judge.put_off

    def put_off(self, *args):
        count[0] += 1
        real(self, *args)

    monkeypatch.setattr(Judge, "put_off", put_off)
    return count


CASES = {
    "calm": {},
    "noisy": {"noise": 0.6},
    "faults": {"faults": True},
    "faults, replayed": {"faults": True, "rollback_data": "replay"},
    "faults that return": {"faults": "returns", "scheduler_mode": "cosine"},
    "faults that return, replayed": {"faults": "returns", "rollback_data": "replay", "strategy": "uniform"},
    "no backups": {"backup_every": None, "faults": True},
    "uniform, steps": {"strategy": "uniform", "num_epochs": None, "num_steps": 111},
    "large batches": {"batch_size": 70, "num_epochs": 30},
    "a strategy that listens": {"strategy": "prioritized"},
    "drop_last": {"drop_last": True, "warmup_proportion": 0.9},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_losses_that_are_put_off_lead_to_what_losses_lead_to_that_are_judged_at_once(case, seed, counted):
    eager = Program(seed, "one by one", **CASES[case])
    eager.train()
    assert counted[0] == 0
    for how in ("eager", "patient", "unheard", "looked at"):
        other, counted[0] = Program(seed, how, **CASES[case]), 0
        other.train()
        if case in ("calm", "faults", "uniform, steps", "drop_last") and how in ("patient", "unheard"):
            assert counted[0] > len(other.seen) / 4
        assert other.seen == eager.seen
        assert other.state() == eager.state()
        if other.sink is not None:
            assert other.sink.facts == eager.sink.facts
            assert other.sink.times == sorted(other.sink.times)
        other.scheduler.close()


@pytest.mark.parametrize("stop", [17, 40, 77, 101, 130])
def test_a_run_that_is_saved_while_losses_are_put_off_goes_on_as_the_one_that_was_not(stop):
    whole = Program(3, "unheard")
    whole.train()
    first = Program(3, "unheard")
    first.train(until=stop)
    second = Program(3, "unheard")
    second.rng, second.model = first.rng, first.model
    second.scheduler.load_state_dict(first.scheduler.state_dict())
    second.train()
    assert first.seen + second.seen == whole.seen
    assert second.scheduler.catalog.expected_loss.tolist() == whole.scheduler.catalog.expected_loss.tolist()


def test_what_the_user_does_amid_batches_that_were_made_ready_counts_at_once():
    program = Program(0, "unheard", num_epochs=4)
    scheduler, rates, drawn = program.scheduler, [], []
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            if batch.step == 40:
                scheduler.scale_lr(0.25, "a test")
            rates.append(batch.lr)
            drawn += batch.indices.tolist()
            batch.indices[:] = -1  # their user's own, also where they were made together
            batch.weights[:] = np.nan
            scheduler.update_with_loss(np.full(len(batch.indices), 0.5, np.float32))
    assert rates[41] == pytest.approx(0.25 * scheduler_rate(program, 41))
    assert sorted(drawn) == sorted(list(range(203)) * 4)


def scheduler_rate(program, step):
    """The rate of a step by a run of the same options that nobody interferes with."""
    other = Program(0, "eager", num_epochs=4)
    for _ in other.scheduler.epoch_iterator():
        for batch in other.scheduler.batch_iterator():
            if batch.step == step:
                return batch.lr
            other.scheduler.update_with_loss(np.full(len(batch.indices), 0.5, np.float32))
    raise AssertionError


def test_a_schedule_that_fails_fails_at_its_own_step():
    def schedule(progress):
        return 1.0 if progress < 0.5 else float("nan")

    scheduler = R8Scheduler(
        64, 4, num_epochs=4, scheduler_mode=schedule, warmup_proportion=0.0, ui="off", checkpoint_dir=None
    )
    with pytest.raises(ValueError, match=r"at progress 0\.5 it gave nan"):
        train_on_ones(scheduler)
    assert scheduler.global_step == 32


def train_on_ones(scheduler):
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            scheduler.update_with_loss(np.ones(len(batch.indices), np.float32))


def test_a_loss_that_should_not_have_been_put_off_raises_a_flag_and_ends_no_run():
    program = Program(0, "unheard", num_epochs=4)
    program.train(until=60)
    safety = program.scheduler._safety
    safety.limits = [1e9, 1e9]
    safety.put_off(60, 1e3, float("nan"), np.arange(8), None, 0.0)
    assert safety.detector.first_suspect_step == 60
    assert safety.limits == []
