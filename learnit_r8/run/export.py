"""The model as strict-JSON data, for scripts that watch a run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from learnit_r8.run.model import DashboardModel


_SILENT_STEPS = 20
"""So many steps' time without an event is no reason to worry."""
_SAME = (
    "run", "phase", "step", "total_steps", "epoch", "num_epochs", "epoch_step", "epoch_batches", "lr", "spikes",
    "rollbacks", "quarantined", "backup_step",
)  # fmt: skip
_QUADRANTS = ("edges", "counts", "losses", "uses", "easier", "unseen", "stuck")


def _strict(value: Any) -> Any:
    """Return data whose numbers are finite or None."""
    if isinstance(value, dict):
        return {name: _strict(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def state(model: DashboardModel) -> str:
    """Return "waiting", "running", "paused", or why the run ended."""
    if model.ended is not None:
        return model.ended.reason
    if model.paused:
        return "paused"
    return "waiting" if math.isnan(model.last_report) else "running"


def silent_for(model: DashboardModel, now: float, least: float) -> float:
    """Return the seconds without an event where they are more than `least` and than 20 steps take, else 0."""
    step = model.pace.step_seconds
    silent = now - model.last_time
    return silent if silent > max(least, _SILENT_STEPS * step if math.isfinite(step) else 0.0) else 0.0


def numbers(model: DashboardModel) -> dict[str, Any]:
    """Return what the screen shows as plain data; times are seconds, the present is the last event."""
    now, loss = model.last_time, model.series["loss"]
    left, error = model.eta(now) or (None, None)
    data = {
        **{name: getattr(model, name) for name in _SAME},
        "state": state(model),
        "time": now,
        "elapsed": model.elapsed(now),
        "progress": model.progress(now),
        "eta": left,
        "eta_error": error,
        "loss": {
            "last": model.loss,
            "ema": loss.averages[0],
            "min": loss.lo,
            "min_step": model.best_step,
            "max": loss.hi,
            "expected": model.expected_loss,
            **{name: getattr(model, name) for name in ("sigma", "score", "verdict", "nonfinite")},
        },
        "step_seconds": model.pace.step_seconds,
        "spent": model.pace.spent,
        "checkpoint": model.checkpoint and model.checkpoint.path,
        "metrics": {
            name: {"last": metric.last, "best": metric.best, "step": metric.last_step}
            for name, metric in model.metrics.items()
        },
        "quadrants": model.quadrants and {name: getattr(model.quadrants, name) for name in _QUADRANTS},
        "suspects": model.suspects and model.suspects.count,
        "alarms": tuple(line.text for line in model.alarms.values()),
    }
    return {name: _strict(value) for name, value in data.items()}
