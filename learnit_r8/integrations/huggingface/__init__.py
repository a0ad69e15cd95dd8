"""R8Scheduler in the Hugging Face Trainer: `R8Trainer`, `R8Mixin` for other trainers, `SRSTrainer` for a sampler."""

from __future__ import annotations

from learnit_r8.integrations.huggingface.mixin import SampleLossMixin
from learnit_r8.integrations.huggingface.trainer import R8Mixin, R8Trainer, SRSTrainer

__all__ = ["R8Mixin", "R8Trainer", "SRSTrainer", "SampleLossMixin"]
