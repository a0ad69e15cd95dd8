"""What the safety net does around a loop: after a resume, on several ranks, at the end, and where it is told not to."""

from __future__ import annotations

import collections
import math
import os
import signal
import threading

import numpy as np
import pytest
import torch

from learnit_r8 import Command, R8Scheduler, Recovery, TrainingDiverged, events
from learnit_r8.samples.batch_losses import BatchAttribution


class Ears(list):
    def record(self, event):
        self.append(event)

    def of(self, kind):
        return [event for event in self if isinstance(event, kind)]


def quiet(samples=100, batch=1, **options):
    ears = Ears()
    options = {"num_epochs": 2, "checkpoint_dir": None, "ui": "off", "sinks": [ears], **options}
    return R8Scheduler(samples, batch, **options), ears


def each(scheduler):
    for _ in scheduler.epoch_iterator():
        yield from scheduler.batch_iterator()


def test_a_resumed_run_whose_checkpoint_was_poisoned_goes_back_to_an_older_one(tmp_path):
    w = {"w": np.ones(3)}

    def save(path):
        np.save(path, w["w"])

    def load(source, from_ram=False):
        w["w"] = np.array(source["w"]) if from_ram else np.load(f"{source}.npy")

    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 10, "keep_checkpoints": 4}
    first, _ = quiet(save_callback=save, load_callback=load, state_callback=lambda: w, **options)
    for batch in first.batch_iterator():
        if batch.step == 40:
            break
        loss = float(w["w"].sum())
        if batch.step == 39:
            w["w"] = w["w"] * np.nan
        first.update_with_loss(loss)
    del first
    again = R8Scheduler.resume_from_checkpoint(tmp_path, save, load, state_callback=lambda: w)
    assert np.isnan(w["w"]).all()
    for batch in each(again):
        result = again.update_with_loss(float(w["w"].sum()))
        assert result.rolled_back == (batch.step == 40)
    assert w["w"].tolist() == [1.0, 1.0, 1.0]
    assert again.global_step == 200


def test_the_end_says_when_the_best_is_long_past_and_gives_it_back():
    w = {"w": np.zeros(2)}

    def load(state):
        w.update(state)

    scheduler, ears = quiet(400, state_callback=lambda: w, load_callback=load, scheduler_mode="constant")
    rng = np.random.default_rng(0)
    for batch in each(scheduler):
        w["w"] = w["w"] + 1.0
        scheduler.update_with_loss(rng.lognormal(0, 0.1) * (1.0 if batch.step < 400 else 1.01 ** (batch.step - 400)))
    (end,) = ears.of(events.RunEnded)
    assert end.final_level > 5 * end.best_level
    assert end.best_step < 500
    last = [event.message for event in ears.of(events.Notice)][-1]
    assert "far above its best level" in last
    assert "restore_best()" in last
    step = scheduler.restore_best()
    assert w["w"][0] == step <= 500


@pytest.mark.parametrize(
    "loss",
    [
        lambda rng, step: float(rng.random() < 0.02),
        lambda rng, step: rng.normal() * (1 + step / 1000),
        lambda rng, step: rng.lognormal(0, 1.2),
        lambda rng, step: 1 + 0.8 * math.sin(step / 10) + 0.1 * rng.normal(),
    ],
    ids=["nearly always 0", "of growing spread", "of a heavy tail", "of a period"],
)
def test_a_loss_that_swings_is_not_said_to_end_above_its_best(loss):
    for seed in range(3):
        scheduler, ears = quiet(16000, 32)
        rng = np.random.default_rng(seed)
        for batch in each(scheduler):
            scheduler.update_with_loss(loss(rng, batch.step))
        (end,) = ears.of(events.RunEnded)
        assert end.final_level is not None
        assert [event.message for event in ears.of(events.Notice) if "far above" in event.message] == []


def test_a_backup_without_the_optimizer_is_named_as_the_cause():
    torch.manual_seed(0)
    x, y = torch.randn(256, 8), torch.randint(0, 3, (256,))
    x[7, 3] = math.inf
    model = torch.nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler, _ = quiet(256, 16, state_callback=model.state_dict, load_callback=model.load_state_dict)

    def train():
        for batch in each(scheduler):
            losses = torch.nn.functional.cross_entropy(model(x[batch.indices]), y[batch.indices], reduction="none")
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
            scheduler.update_with_loss(losses)

    with (
        pytest.warns(RuntimeWarning, match="optimizer's state"),
        pytest.raises(TrainingDiverged, match="probably lacks"),
    ):
        train()
    assert scheduler.catalog.left_out.tolist() == [7]


@pytest.mark.parametrize("policy", ["report", "off", Recovery(nonfinite="report", spike="off", drift="off")])
def test_a_policy_that_only_tells_never_restores(policy):
    loads = []
    scheduler, ears = quiet(
        400, 4, recovery=policy, state_callback=lambda: {"w": np.full(2, np.nan)}, load_callback=loads.append
    )
    for batch in each(scheduler):
        scheduler.update_with_loss(math.nan if batch.step in (50, 51) else 1e6 if 100 < batch.step < 104 else 1.0)
    assert loads == []
    told = {event.verdict for event in ears.of(events.SpikeSeen)}
    assert told == {"report": {"nonfinite", "spike"}, "off": set()}.get(str(policy), {"nonfinite"})


def test_what_one_number_a_batch_taught_is_taken_back_with_the_model():
    w = {"w": np.zeros(2)}

    def load(state):
        w.update(state)

    scheduler, ears = quiet(800, 8, state_callback=lambda: w, load_callback=load, backup_every=10, num_epochs=3)
    rng, kept = np.random.default_rng(0), {}
    for batch in each(scheduler):
        if batch.step % 10 == 0:
            kept[batch.step] = scheduler.catalog.state_dict()
        if batch.step == 153:
            w["w"] = w["w"] * np.nan
        result = scheduler.update_with_loss(math.nan if batch.step == 153 else float(rng.lognormal(0, 0.2)))
        if result.rolled_back:
            break
    (back,) = ears.of(events.RolledBack)
    then, now = kept[back.to_step], scheduler.catalog.state_dict()
    assert then["attribution"]["level"] == now["attribution"]["level"]
    np.testing.assert_array_equal(then["attribution"]["history"]["ids"], now["attribution"]["history"]["ids"])
    np.testing.assert_array_equal(then["rows"], now["rows"])


def test_batches_of_all_samples_cost_nothing_to_refine():
    attribution = BatchAttribution(50)
    estimate, variance = np.ones(50, np.float32), np.ones(50, np.float32)
    for _ in range(200):
        attribution.update(estimate, variance, np.arange(50), 1.0)
        assert not attribution.refine(estimate, variance)


def test_a_history_stays_within_128_epochs_and_is_fitted_when_an_eighth_of_it_is_new():
    rng, fitted = np.random.default_rng(0), []
    attribution = BatchAttribution(64)
    estimate, variance, truth = np.ones(64, np.float32), np.ones(64, np.float32), rng.lognormal(0, 1, 64)
    for epoch in range(300):
        order = rng.permutation(64)
        for ids in order.reshape(8, 8):
            attribution.update(estimate, variance, ids, float(truth[ids].mean()))
        if attribution.refine(estimate, variance):
            fitted.append(epoch)
    assert attribution.state_dict()["history"]["ids"].size <= 128 * 64
    assert fitted[:3] == [2, 3, 4]
    assert len(fitted) < 60
    assert np.corrcoef(estimate, truth)[0, 1] > 0.99


def test_one_odd_batch_brands_none_of_its_samples():
    rng = np.random.default_rng(0)
    scheduler, _ = quiet(800, 32, num_epochs=10)
    wrong = set(rng.choice(800, 40, replace=False).tolist())
    base = np.where(np.isin(np.arange(800), list(wrong)), 3.0, 0.3)
    for batch in each(scheduler):
        losses = base[batch.indices] * rng.lognormal(0, 0.2, len(batch.indices))
        scheduler.update_with_loss(losses + (300.0 if batch.step == 60 else 0.0))
    assert set(scheduler.catalog.suspects(40).tolist()) == wrong


class World:
    def __init__(self, size):
        self.parts, self.barrier = [None] * size, threading.Barrier(size, timeout=20)

    def gather(self, rank):
        def all_gather(array):
            self.parts[rank] = np.array(array)
            self.barrier.wait()
            joined = np.concatenate([np.ravel(part) for part in self.parts])
            self.barrier.wait()
            return joined

        return all_gather


def on_two_ranks(run):
    world, ended = World(2), {}

    def main(rank):
        try:
            ended[rank] = run(rank, {"rank": rank, "world_size": 2, "all_gather": world.gather(rank)})
        except BaseException as error:
            ended[rank] = type(error).__name__
            world.barrier.abort()

    threads = [threading.Thread(target=main, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return ended


def test_checkpoints_of_rank_0_bring_all_ranks_back(tmp_path):
    def run(rank, ranks):
        w = {"w": np.ones(2)}

        def save(path):
            np.save(path, w["w"])

        def load(path):
            w["w"] = np.load(f"{path}.npy")

        scheduler, ears = quiet(
            200, 4, save_callback=save, load_callback=load, checkpoint_dir=tmp_path, checkpoint_every=10, **ranks
        )
        for batch in each(scheduler):
            if batch.step in (35, 36):
                w["w"] = w["w"] * np.nan
            scheduler.update_with_loss(np.full(len(batch.indices), w["w"].sum()))
        (back,) = ears.of(events.RolledBack)
        return back.to_step, float(w["w"].sum()), scheduler.global_step

    assert on_two_ranks(run) == {0: (30, 2.0, 100), 1: (30, 2.0, 100)}


@pytest.mark.parametrize("pauses", [False, True])
def test_a_command_on_one_rank_stops_all_of_them_at_the_same_step(pauses):
    class Sink:
        def __init__(self):
            self.commands = collections.deque()

        def record(self, event):
            if isinstance(event, events.Paused) and event.paused:
                self.commands.append(Command.STOP_NOW)

    sink = Sink()

    def run(rank, ranks):
        scheduler, _ = quiet(400, 4, **{**ranks, "sinks": [sink] if rank == 0 else []})
        steps = 0
        try:
            for batch in each(scheduler):
                if rank == 0 and batch.step == 10:
                    sink.commands.append(Command.PAUSE if pauses else Command.STOP_NOW)
                scheduler.update_with_loss(np.ones(len(batch.indices)))
                steps += 1
        except KeyboardInterrupt:
            return f"stopped after {steps}"
        return "finished"

    ended = on_two_ranks(run)
    assert ended[0] == ended[1]
    assert ended[0].startswith("stopped after 1")


@pytest.mark.parametrize("ends", ["asked to save, then to go on", "the sink is lost"])
def test_a_pause_of_two_ranks_heeds_what_is_asked_for_meanwhile(ends, tmp_path):
    class Sink:
        def __init__(self):
            self.commands = collections.deque()

        def record(self, event):
            if isinstance(event, events.Paused) and event.paused:
                if ends == "the sink is lost":
                    raise OSError("its terminal is gone")
                self.commands.extend([Command.CHECKPOINT, Command.RESUME])

    sink = Sink()

    def run(rank, ranks):
        options = {**ranks, "sinks": [sink] if rank == 0 else [], "checkpoint_dir": tmp_path}
        scheduler, _ = quiet(400, 4, **options)
        with scheduler:
            for batch in each(scheduler):
                if rank == 0 and batch.step == 10:
                    sink.commands.append(Command.PAUSE)
                scheduler.update_with_loss(np.ones(len(batch.indices)))
        return scheduler.global_step

    ended = on_two_ranks(run)
    assert ended[0] == ended[1] > 11
    assert len(list(tmp_path.glob("step-*"))) == (ends != "the sink is lost")


def test_a_stop_or_a_signal_ends_the_search_for_a_rate_at_once():
    sink = type("Sink", (), {"commands": collections.deque(), "record": lambda self, event: None})()
    callbacks = {"state_callback": lambda: [1.0], "load_callback": lambda state: None, "backup_every": None}
    for stop in (lambda: sink.commands.append(Command.STOP_AFTER_STEP), lambda: os.kill(os.getpid(), signal.SIGINT)):
        scheduler, _ = quiet(10_000, 10, auto_find_lr=True, sinks=[sink], **callbacks)
        handed = 0
        try:
            with scheduler:
                for _batch in each(scheduler):
                    handed += 1
                    if handed == 4:
                        stop()
                    scheduler.update_with_loss(1.0)
        except KeyboardInterrupt:
            pass
        assert handed == 4
        assert scheduler.global_step == 0


@pytest.mark.parametrize("high", [2.4, 1.0])
def test_losses_of_the_untrained_model_restore_one_that_nobody_can_see_and_lower_ones_do_not(high):
    heard = Ears()
    scheduler = R8Scheduler(
        1200, 4, num_epochs=1, load_callback=lambda state: None, checkpoint_dir=None, ui="off", sinks=[heard], seed=0
    )
    with scheduler:
        for batch in scheduler.batch_iterator():
            if batch.step == 90:
                scheduler.update_cpu_backup({"w": np.ones(3)})
            level = 2.3 * 0.95**batch.step + 0.05 if batch.step < 110 else high
            scheduler.update_with_loss(np.full(4, level * (1 + 0.01 * (batch.step % 3))))
    assert len(heard.of(events.RolledBack)) == (high > 2)


def rollbacks_after_a_move(factor, at, loss):
    """Return how often a model is restored whose weights are multiplied at a step; `loss(step, off, rng)` follows."""
    rng = np.random.default_rng(3)
    w = {"model": {"a": rng.normal(size=200), "b": rng.normal(size=200)}}
    scheduler, ears = quiet(
        800, num_epochs=1, strategy="uniform", state_callback=lambda: w, load_callback=w.update, backup_every=8,
        scheduler_mode="constant",
    )  # fmt: skip
    sound = np.linalg.norm(w["model"]["a"])
    for batch in each(scheduler):
        w["model"] = {name: array + 0.01 * rng.normal(size=200) for name, array in w["model"].items()}
        if batch.step == at:
            w["model"]["a"] = w["model"]["a"] * factor
        off = not 0.9 < np.linalg.norm(w["model"]["a"]) / sound < 1.2
        scheduler.update_with_loss(loss(batch.step, off, rng))
    return len(ears.of(events.RolledBack))


@pytest.mark.parametrize(
    ("factor", "rise", "restored"), [(60.0, 0.15, 1), (8.0, 0.15, 1), (0.0, 0.15, 1), (1.5, 0.15, 0), (60.0, 0.0, 0)]
)
def test_weights_that_moved_beyond_any_habit_are_undone_by_a_small_rise_of_the_losses_and_by_none_without(
    factor, rise, restored
):
    """A language model's loss rises by a sixth where a layer is lost: no spike, and yet a good part of its training."""
    assert rollbacks_after_a_move(factor, 401, lambda t, off, rng: 2.0 + 0.02 * rng.normal() + rise * off) == restored


LOSSES_AFTER_A_MOVE = {
    # name: (factor on the weights, loss before by step, loss after by steps since, is it undone?)
    "learning stops": (60.0, lambda t: 3.0 - 0.005 * t, lambda t: 1.04, True),
    "learning goes on": (60.0, lambda t: 3.0 - 0.005 * t, lambda t: 1.0 - 0.005 * t, False),
    "nothing was being learned": (60.0, lambda t: 1.0, lambda t: 1.0, False),
    "most losses are 0, a few enormous": (60.0, lambda t: 1.0, lambda t: 8.0 * (t % 4 == 3), True),
    "a tenth of the fall is lost": (3.0, lambda t: max(1.5, 3.0 - 0.02 * t), lambda t: 1.65, False),
    "a half of the fall is lost": (3.0, lambda t: max(1.5, 3.0 - 0.02 * t), lambda t: 2.2, True),
    "the same rise where little has fallen": (3.0, lambda t: max(1.5, 1.6 - 0.02 * t), lambda t: 2.2, False),
}


@pytest.mark.parametrize("situation", LOSSES_AFTER_A_MOVE)
def test_weights_that_moved_far_are_undone_where_the_losses_say_so_without_a_jump(situation):
    factor, before, after, undone = LOSSES_AFTER_A_MOVE[situation]

    def loss(step, off, rng):
        return (after(step - 400) if off else before(min(step, 400))) + 0.02 * rng.random()

    assert rollbacks_after_a_move(factor, 396, loss) == undone
