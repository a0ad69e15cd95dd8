"""learnit::r8 runs training loops with open eyes.

with R8Scheduler(num_samples=len(data), batch_size=32, num_epochs=10) as scheduler:
    for epoch in scheduler.epoch_iterator():
        for indices, lr in scheduler.batch_iterator():
            scheduler.update_with_loss(train_step(indices, lr))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from learnit_r8._version import __version__

if TYPE_CHECKING:
    from learnit_r8.core.config import Checkpoints, Evaluation
    from learnit_r8.errors import (
        CheckpointCorrupt,
        CheckpointError,
        ConfigError,
        ProtocolError,
        R8Error,
        TrainingDiverged,
    )
    from learnit_r8.loop.callbacks import BackgroundSave
    from learnit_r8.scheduler import R8Scheduler
    from learnit_r8.stability.policy import Recovery
    from learnit_r8.types import Batch, Command, LossReport, Sink, StepResult, Verdict

__all__ = [
    "BackgroundSave",
    "Batch",
    "CheckpointCorrupt",
    "CheckpointError",
    "Checkpoints",
    "Command",
    "ConfigError",
    "Evaluation",
    "LossReport",
    "ProtocolError",
    "R8Error",
    "R8Scheduler",
    "Recovery",
    "Sink",
    "StepResult",
    "TrainingDiverged",
    "Verdict",
    "__version__",
]

# Names load with their module at first use: programs that only ask for the version, or import one
# room, do not pay for the others.
_HOMES = {
    "learnit_r8.core.config": {"Checkpoints", "Evaluation"},
    "learnit_r8.errors": {
        "CheckpointCorrupt",
        "CheckpointError",
        "ConfigError",
        "ProtocolError",
        "R8Error",
        "TrainingDiverged",
    },
    "learnit_r8.loop.callbacks": {"BackgroundSave"},
    "learnit_r8.scheduler": {"R8Scheduler"},
    "learnit_r8.stability.policy": {"Recovery"},
    "learnit_r8.types": {"Batch", "Command", "LossReport", "Sink", "StepResult", "Verdict"},
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(home), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
