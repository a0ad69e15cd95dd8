"""The model as strict-JSON data, for scripts that watch a run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from learnit_r8.run.model import DashboardModel


_SILENT_STEPS = 20
"""So many steps' time without an event is no reason to worry."""


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _listed(values: tuple[float, ...]) -> list[float | None]:
    return [_finite(value) for value in values]


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
    now = model.last_time
    eta = model.eta(now)
    loss = model.series["loss"]
    return {
        "run": model.run,
        "state": state(model),
        "phase": model.phase,
        "time": _finite(now),
        "elapsed": _finite(model.elapsed(now)),
        "step": model.step,
        "total_steps": model.total_steps,
        "epoch": model.epoch,
        "num_epochs": model.num_epochs,
        "epoch_step": model.epoch_step,
        "epoch_batches": model.epoch_batches,
        "progress": _finite(model.progress(now)),
        "eta": None if eta is None else _finite(eta[0]),
        "eta_error": None if eta is None else _finite(eta[1]),
        "loss": {
            "last": _finite(model.loss),
            "ema": _finite(loss.averages[0]),
            "min": _finite(loss.lo),
            "min_step": model.best_step,
            "max": _finite(loss.hi),
            "sigma": _finite(model.sigma),
            "expected": _finite(model.expected_loss),
            "score": _finite(model.score),
            "verdict": model.verdict,
            "nonfinite": model.nonfinite,
        },
        "lr": _finite(model.lr),
        "step_seconds": _finite(model.pace.step_seconds),
        "spent": {name: _finite(seconds) for name, seconds in model.pace.spent.items()},
        "spikes": model.spikes,
        "rollbacks": model.rollbacks,
        "quarantined": model.quarantined,
        "backup_step": model.backup_step,
        "checkpoint": None if model.checkpoint is None else model.checkpoint.path,
        "metrics": {
            name: {"last": _finite(metric.last), "best": _finite(metric.best), "step": metric.last_step}
            for name, metric in model.metrics.items()
        },
        "quadrants": _quadrants(model),
        "suspects": None if model.suspects is None else model.suspects.count,
        "alarms": [line.text for line in model.alarms.values()],
    }


def _quadrants(model: DashboardModel) -> dict[str, Any] | None:
    found = model.quadrants
    if found is None:
        return None
    return {
        "edges": _listed(found.edges),
        "counts": list(found.counts),
        "losses": _listed(found.losses),
        "uses": _listed(found.uses),
        "easier": _listed(found.easier),
        "unseen": found.unseen,
        "stuck": found.stuck,
    }
