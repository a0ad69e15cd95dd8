"""Trackers hear the run's numbers under fixed names, and a failing one never reaches training."""

from __future__ import annotations

import math

import numpy as np
import pytest

from learnit_r8 import R8Scheduler
from learnit_r8.errors import ConfigError
from learnit_r8.events import MetricLogged, RolledBack, RunEnded, RunStarted, SinkFailed
from learnit_r8.sinks.points import Point, Points
from learnit_r8.sinks.trackers import MlflowSink, TensorBoardSink, TrackerSink, WandbSink


class Memory(TrackerSink):
    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.points: list[Point] = []
        self.config: dict = {}
        self.finished = 0

    def configure(self, config) -> None:
        self.config = dict(config)

    def write(self, points) -> None:
        self.points += points

    def finish(self) -> None:
        self.finished += 1


def train(*sinks, epochs: int = 3, nan_at: int | None = None) -> list[float]:
    """Run a small loop; return the losses that were reported."""
    rng, losses = np.random.default_rng(0), []
    state = {"w": np.zeros(2)}
    with R8Scheduler(
        40,
        8,
        num_epochs=epochs,
        checkpoint_dir=None,
        ui="off",
        sinks=sinks,
        state_callback=lambda: state,
        load_callback=state.update,
    ) as scheduler:
        for _ in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                values = rng.uniform(1.0, 1.1, len(batch.indices)).astype(np.float32)
                if batch.step == nan_at:
                    values[0] = np.nan
                    state["w"] = state["w"] * np.nan
                scheduler.update_with_loss(values)
                losses.append(float(values.mean()))
            scheduler.log(val_loss=0.5, grad_norm=2.0)
    return losses


def curve(points, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in points if point.name == name]


def test_every_step_is_a_point_of_each_curve_and_counts_are_totals():
    sink = Memory(interval=0.01)
    losses = train(sink, nan_at=12)
    reported = curve(sink.points, "train/loss")
    assert [step for step, _ in reported] == list(range(15))
    assert [value for _, value in reported] == pytest.approx(losses, rel=1e-6, nan_ok=True)
    assert math.isnan(reported[12][1])
    assert curve(sink.points, "r8/rollbacks") == [(12, 1.0)]
    assert curve(sink.points, "r8/spikes") == [(12, 1.0)]
    assert [value for _, value in curve(sink.points, "train/epoch")] == [0] * 5 + [1] * 5 + [2] * 5
    assert curve(sink.points, "eval/loss") == [(5, 0.5), (10, 0.5), (15, 0.5)]
    assert len(curve(sink.points, "train/grad_norm")) == 3
    assert len(curve(sink.points, "r8/q4_loss")) >= 2
    assert sink.config["num_samples"] == 40
    assert sink.finished == 1


def test_names_are_mapped_and_none_leaves_a_curve_out():
    sink = Memory(names={"train/loss": "loss", "r8/lag": None})
    train(sink, epochs=1)
    names = {point.name for point in sink.points}
    assert "loss" in names
    assert not names & {"train/loss", "r8/lag"}


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("val_loss", "eval/loss"),
        ("eval_f1", "eval/f1"),
        ("accuracy", "train/accuracy"),
        ("a/b", "a/b"),
        ("val", "train/val"),
    ],
)
def test_a_users_metric_is_an_evaluation_or_a_training_number(given, name):
    assert Points().of(MetricLogged(time=0.0, step=3, name=given, value=1.5)) == [Point(name, 1.5, 3, 0.0)]


def test_the_lag_is_how_far_batches_run_ahead_of_their_losses():
    sink = Memory()
    scheduler = R8Scheduler(64, 8, num_epochs=1, lookahead=3, checkpoint_dir=None, ui="off", sinks=[sink])
    held = []
    for batch in scheduler.batch_iterator():
        held.append(batch)
        if len(held) == 3:
            scheduler.update_with_loss(1.0, held.pop(0))
    for batch in held:
        scheduler.update_with_loss(1.0, batch)
    scheduler.close()
    assert [value for _, value in curve(sink.points, "r8/lag")] == [2, 2, 2, 2, 2, 2, 1, 0]


def test_a_tracker_that_fails_is_dropped_and_training_goes_on():
    class Broken(Memory):
        def write(self, points) -> None:
            raise OSError("no route to tracker")

    heard = []

    class Listener:
        def record(self, event) -> None:
            heard.append(event)

    broken = Broken(interval=0.001)
    losses = train(broken, Listener(), epochs=200)
    assert len(losses) == 1000
    failures = [event for event in heard if isinstance(event, SinkFailed)]
    assert [(event.sink, "no route" in event.reason) for event in failures] == [("Broken", True)]


@pytest.mark.parametrize("error", [None, ValueError])
def test_a_run_that_dies_of_an_error_has_failed(error):
    sink = Memory()
    try:
        with R8Scheduler(40, 8, num_epochs=1, checkpoint_dir=None, ui="off", sinks=[sink]) as scheduler:
            for _ in scheduler.epoch_iterator():
                for batch in scheduler.batch_iterator():
                    if error is not None and batch.step == 2:
                        raise error("boom")
                    scheduler.update_with_loss(1.0)
    except ValueError:
        pass
    assert sink.failed == (error is not None)


def test_a_run_that_goes_on_has_each_step_once():
    class Remembering(Memory):
        def reached(self, name):
            return 4 if name == "eval/loss" else -1

    sink = Remembering()
    sink.record(
        RunStarted(
            time=0.0,
            step=3,
            run="run",
            config={},
            steps_per_epoch=5,
            total_steps=20,
            resumed=True,
            version="1",
            pid=1,
            elapsed=0.0,
        )
    )
    for step in (3, 4, 5):
        sink.record(MetricLogged(time=1.0, step=step, name="val_loss", value=0.5))
        sink.record(MetricLogged(time=1.0, step=step, name="lr", value=0.5))
    sink.close()
    assert [step for step, _ in curve(sink.points, "eval/loss")] == [5]
    assert [step for step, _ in curve(sink.points, "train/lr")] == [3, 4, 5]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*:UserWarning")
def test_tensorboard_shows_a_resumed_run_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed, steps in ((False, range(10)), (True, range(6, 12))):
        sink = TensorBoardSink(tmp_path)
        sink.record(
            RunStarted(
                time=1e9 + steps[0],
                step=steps[0],
                run="run",
                config={},
                steps_per_epoch=5,
                total_steps=20,
                resumed=resumed,
                version="1",
                pid=1,
                elapsed=0.0,
            )
        )
        for step in steps:
            sink.record(
                MetricLogged(time=1e9 + 100 * resumed + step, step=step, name="acc", value=step + 100.0 * resumed)
            )
        sink.close()
    found = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    found.Reload()
    assert [event.step for event in found.Scalars("train/acc")] == list(range(12))
    assert [event.value for event in found.Scalars("train/acc")] == [*range(6), *range(106, 112)]


@pytest.mark.filterwarnings("ignore")
def test_mlflow_loses_no_point_to_a_refused_name_and_tells_crashes_and_resumes_apart(tmp_path):
    tracking = pytest.importorskip("mlflow.tracking")
    pytest.importorskip("sqlalchemy")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    first = MlflowSink(uri)
    first.record(
        RunStarted(
            time=0.0,
            step=0,
            run="run",
            config={},
            steps_per_epoch=5,
            total_steps=20,
            resumed=False,
            version="1",
            pid=1,
            elapsed=0.0,
        )
    )
    for step in range(5):
        for name in ("a/b", "loss@top(1)", "/refused", "x" * 600):
            first.record(MetricLogged(time=1.0 + step, step=step, name=name, value=float(step)))
    first.record(RunEnded(time=9.0, step=5, reason="error", seconds=9.0))
    first.close()
    client = tracking.MlflowClient(uri)
    assert client.get_run(first.run_id).info.status == "FAILED"
    assert [m.step for m in client.get_metric_history(first.run_id, "a/b")] == list(range(5))
    second = MlflowSink(uri, run_id=first.run_id)
    second.record(
        RunStarted(
            time=10.0,
            step=3,
            run="run",
            config={},
            steps_per_epoch=5,
            total_steps=20,
            resumed=True,
            version="1",
            pid=1,
            elapsed=0.0,
        )
    )
    for step in range(3, 8):
        second.record(MetricLogged(time=11.0, step=step, name="a/b", value=float(step)))
    second.close()
    assert [m.step for m in client.get_metric_history(first.run_id, "a/b")] == list(range(8))
    names = set(client.get_run(first.run_id).data.metrics)
    assert {"a/b", "train/loss_top_1_"} & names == {"a/b", "train/loss_top_1_"}


def test_a_bad_interval_is_refused():
    with pytest.raises(ConfigError, match="interval"):
        Memory(interval=0)


def test_a_rollback_tells_its_learning_rate():
    points = Points().of(
        RolledBack(time=1.0, step=7, to_step=3, source="ram", lr_multiplier=0.5, hold_steps=32, seconds=0.1)
    )
    assert [(point.name, point.value) for point in points] == [("r8/rollbacks", 1.0), ("r8/lr_multiplier", 0.5)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*:UserWarning")
def test_tensorboard_reads_back_what_was_reported(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    losses = train(TensorBoardSink(tmp_path))
    (path,) = tmp_path.iterdir()
    found = {}
    for event in EventFileLoader(str(path)).Load():
        for value in event.summary.value:
            number = value.tensor.float_val[0] if value.HasField("tensor") else value.simple_value
            found.setdefault(value.tag, []).append((event.step, number))
    assert [value for _, value in found["train/loss"]] == pytest.approx(losses, rel=1e-6)
    assert [step for step, _ in found["train/loss"]] == list(range(15))
    assert {"train/lr", "r8/q1_loss", "eval/loss"} <= set(found)


@pytest.mark.filterwarnings("ignore")
def test_mlflow_reads_back_what_was_reported(tmp_path):
    tracking = pytest.importorskip("mlflow.tracking")
    pytest.importorskip("sqlalchemy")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    sink = MlflowSink(uri)
    losses = train(sink, nan_at=12)
    client = tracking.MlflowClient(uri)
    history = client.get_metric_history(sink.run_id, "train/loss")
    assert [metric.step for metric in history] == list(range(15))
    assert [metric.value for metric in history] == pytest.approx(losses, rel=1e-6, nan_ok=True)
    run = client.get_run(sink.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["r8.num_samples"] == "40"


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline_keeps_every_step(tmp_path):
    pytest.importorskip("wandb")
    sink = WandbSink(mode="offline", dir=str(tmp_path), project="r8")
    rows = []
    log, sink._run.log = sink._run.log, lambda row: (rows.append(row), log(row))
    losses = train(sink)
    assert [row["train/loss"] for row in rows if "train/loss" in row] == pytest.approx(losses, rel=1e-6)
    (file,) = tmp_path.rglob("*.wandb")
    assert file.stat().st_size > 1000
