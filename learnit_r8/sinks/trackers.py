"""Bridges to experiment trackers: the run's numbers under names that do not change between trackers.

    R8Scheduler(..., sinks=[TensorBoardSink("runs/one")])

`record` appends to a queue; a thread turns events into points and writes them every few seconds,
so a slow tracker (MLflow: milliseconds a point) costs training nothing. What the tracker raises
is raised at the next `record`, where the scheduler drops the sink and says so in an event.

The trackers are imported when their sink is made, never before.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from learnit_r8 import events
from learnit_r8.errors import ConfigError, tell
from learnit_r8.sinks.points import Point, Points

__all__ = ["MlflowSink", "TensorBoardSink", "TrackerSink", "WandbSink"]

PATIENCE = 30.0
"""Seconds that `close` waits for a tracker."""
CAPACITY = 200_000
"""Events that wait at most; older ones are dropped when a tracker hangs for that long."""


class TrackerSink:
    """Writes points from a thread of its own; subclasses say where to.

    Args:
        names: See `Points`.
        interval: Seconds between two writes.

    Attributes:
        failed: The run has not ended in an orderly way, so far.
        once: Of several ranks only rank 0 uses it: the numbers are those of all, and come once.

    Raises:
        ConfigError: A bad interval.
    """

    once = True

    def __init__(self, names: Mapping[str, str | None] | None = None, interval: float = 2.0) -> None:
        if not interval > 0:
            raise ConfigError([f"interval must be positive seconds, got {interval!r}"])
        self._points = Points(names)
        self._interval = interval
        self._queue: deque[events.Event] = deque(maxlen=CAPACITY)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._resumed = False
        self._reached: dict[str, int] = {}
        self._refused: dict[str, str] = {}
        self.failed = True

    def write(self, points: list[Point]) -> None:
        """Write points, oldest first; called from the thread, and at last from `close`."""
        raise NotImplementedError

    def configure(self, config: Mapping[str, Any]) -> None:
        """Take the run's configuration, once, before the first points."""

    def resume(self, step: int, time: float) -> None:
        """Take note that the run goes on from a step at a time, where the tracker can drop what it has later."""

    def reached(self, name: str) -> int:
        """Return the last step that the tracker has of a curve, for a run that goes on; -1 for none."""
        return -1

    def finish(self) -> None:
        """Flush and release the tracker."""

    def record(self, event: events.Event) -> None:
        """Queue one event; raise what the tracker raised since the last one."""
        if self._error is not None:
            raise self._error
        if self._refused:
            said, self._refused = self._refused, {}
            names = "; ".join(f"{name} ({reason})" for name, reason in said.items())
            warnings.warn(f"{type(self).__name__} refused, and went on without: {names}", RuntimeWarning, stacklevel=2)
        self._queue.append(event)
        if self._thread is None:
            self._closing.clear()
            self._thread = threading.Thread(target=self._work, name=type(self).__name__, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Write what is left and release the tracker; one that does not answer is waited for half a minute."""
        thread, self._thread = self._thread, None
        self._closing.set()
        if thread is None:
            self._end()
        else:
            thread.join(PATIENCE)
            if thread.is_alive():
                tell(
                    f"{type(self).__name__} has not answered for {PATIENCE:g} seconds: the run ends without it, and "
                    f"{len(self._queue)} events or more are lost to it",
                    stacklevel=2,
                )
                return
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while not self._closing.wait(self._interval) and self._error is None:
            self._drain()
        self._end()

    def _end(self) -> None:
        self._drain()
        try:
            self.finish()
        except Exception as error:
            self._error = error

    def _drain(self) -> None:
        if self._error is not None:
            return
        points: list[Point] = []
        try:
            while self._queue:
                event = self._queue.popleft()
                if isinstance(event, events.RunStarted):
                    self.configure(events.plain(event.config))
                    self._resumed, self.failed, self._reached = event.resumed, True, {}
                    if event.resumed:
                        self.resume(event.step, event.time)
                elif isinstance(event, events.RunEnded):
                    self.failed = event.reason == "error"
                points += self._points.of(event)
            if self._resumed:
                points = [point for point in points if point.step > self._last(point.name)]
            if points:
                self.write(points)
        except Exception as error:
            self._error = error

    def _last(self, name: str) -> int:
        if name not in self._reached:
            self._reached[name] = self.reached(name)
        return self._reached[name]


class TensorBoardSink(TrackerSink):
    """Writes TensorBoard event files; needs `tensorboard`, neither torch nor TensorFlow.

    Args:
        log_dir: Folder of the run.
        names: See `Points`.
        interval: Seconds between two writes.
    """

    def __init__(
        self, log_dir: str | Path, *, names: Mapping[str, str | None] | None = None, interval: float = 2.0
    ) -> None:
        super().__init__(names, interval)
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary, self._event_pb2 = event_pb2.Event, summary_pb2.Summary, event_pb2
        self._make: Any = EventFileWriter
        self._log_dir = str(log_dir)
        self._writer: Any = None

    def resume(self, step: int, time: float) -> None:
        """Say that a session starts here: TensorBoard drops what an earlier one has from this step on."""
        self._writer = self._writer or self._make(self._log_dir)
        start = self._event_pb2.SessionLog(status=self._event_pb2.SessionLog.START)
        self._writer.add_event(self._event(wall_time=time, step=step, session_log=start))

    def write(self, points: list[Point]) -> None:
        """Write one record per step and time."""
        if self._writer is None:
            self._writer = self._make(self._log_dir)
        for (step, time), group in _grouped(points).items():
            values = [self._summary.Value(tag=point.name, simple_value=point.value) for point in group]
            self._writer.add_event(self._event(wall_time=time, step=step, summary=self._summary(value=values)))
        self._writer.flush()

    def finish(self) -> None:
        """Close the file; later points open another one."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandbSink(TrackerSink):
    """Logs to a Weights & Biases run; `mode="offline"` writes files that `wandb sync` sends later.

    Args:
        run: A run of your own, which stays open; or None to start one.
        names: See `Points`.
        interval: Seconds between two writes.
        **options: For `wandb.init`, e.g. `project=`, `name=`, `mode="offline"`.
    """

    def __init__(
        self,
        run: Any = None,
        *,
        names: Mapping[str, str | None] | None = None,
        interval: float = 2.0,
        **options: Any,
    ) -> None:
        super().__init__(names, interval)
        self._own = run is None
        if run is None:
            import wandb

            run = wandb.init(**options)
        self._run: Any = run
        # W&B wants its own step to rise at every call; ours is an axis like any other.
        run.define_metric("r8/step")
        run.define_metric("*", step_metric="r8/step")

    def configure(self, config: Mapping[str, Any]) -> None:
        """Add the configuration to the run's own."""
        self._run.config.update({"r8": dict(config)}, allow_val_change=True)

    def reached(self, name: str) -> int:
        """Return the step of the run's last row."""
        return int(self._run.summary.get("r8/step", -1))

    def write(self, points: list[Point]) -> None:
        """Log one row per step and time."""
        for (step, _), group in _grouped(points).items():
            self._run.log({"r8/step": step, **{point.name: point.value for point in group}})

    def finish(self) -> None:
        """End the run, if this sink started it."""
        if self._own:
            self._run.finish(exit_code=int(self.failed))


class MlflowSink(TrackerSink):
    """Logs to an MLflow run in batches; MLflow 3 wants a database: `tracking_uri="sqlite:///mlflow.db"`.

    Args:
        tracking_uri: Where to, or None for MLflow's own default.
        experiment: Name of the experiment; made if there is none.
        run_id: A run of your own, which stays open; or None to start one.
        names: See `Points`.
        interval: Seconds between two writes.
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        *,
        experiment: str = "learnit_r8",
        run_id: str | None = None,
        names: Mapping[str, str | None] | None = None,
        interval: float = 2.0,
    ) -> None:
        super().__init__(names, interval)
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self._metric, self._param = Metric, Param
        self._client = MlflowClient(tracking_uri)
        self._refusal: type[Exception] = MlflowException
        self._bad: set[str] = set()
        self._own = run_id is None
        if run_id is None:
            found = self._client.get_experiment_by_name(experiment)
            where = found.experiment_id if found is not None else self._client.create_experiment(experiment)
            run_id = self._client.create_run(where).info.run_id
        self.run_id: str = run_id

    def configure(self, config: Mapping[str, Any]) -> None:
        """Log the configuration as parameters, once: MLflow refuses a second value."""
        known = self._client.get_run(self.run_id).data.params
        new = {f"r8.{key}": str(value)[:500] for key, value in config.items()}
        params = [self._param(key, value) for key, value in new.items() if key not in known]
        self._client.log_batch(self.run_id, params=params)

    def write(self, points: list[Point]) -> None:
        """Log 1000 points a request, MLflow's limit; a name that it refuses costs no other point."""
        metrics = [
            self._metric(_mlflow_name(point.name), point.value, int(point.time * 1000), point.step) for point in points
        ]
        for start in range(0, len(metrics), 1000):
            some = metrics[start : start + 1000]
            try:
                self._client.log_batch(self.run_id, metrics=some)
            except self._refusal:
                self._one_by_one(some)

    def _one_by_one(self, metrics: list[Any]) -> None:
        """Log each name apart; where none is taken it is no matter of names."""
        groups: dict[str, list[Any]] = {}
        for metric in metrics:
            groups.setdefault(metric.key, []).append(metric)
        refused: dict[str, Exception] = {}
        for name, group in groups.items():
            if name in self._bad:
                continue
            try:
                self._client.log_batch(self.run_id, metrics=group)
            except self._refusal as error:
                refused[name] = error
        if refused and len(refused) == len(groups) > 1:
            raise next(iter(refused.values()))
        self._bad.update(refused)
        self._refused.update({name: str(error).split("\n")[0][:200] for name, error in refused.items()})

    def reached(self, name: str) -> int:
        """Return the last step of a curve."""
        history = self._client.get_metric_history(self.run_id, _mlflow_name(name))
        return max((metric.step for metric in history), default=-1)

    def finish(self) -> None:
        """End the run, if this sink started it."""
        if self._own:
            self._client.set_terminated(self.run_id, "FAILED" if self.failed else "FINISHED")


def _mlflow_name(name: str) -> str:
    """Return a name that MLflow takes: letters, digits and `_-. :/`."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _grouped(points: list[Point]) -> dict[tuple[int, float], list[Point]]:
    groups: dict[tuple[int, float], list[Point]] = {}
    for point in points:
        groups.setdefault((point.step, point.time), []).append(point)
    return groups
