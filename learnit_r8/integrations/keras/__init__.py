"""R8Scheduler in Keras 3, on any backend: `R8Dataset` and `R8Callback`."""

from __future__ import annotations

from learnit_r8.integrations.keras.dataset import R8Callback, R8Dataset
from learnit_r8.integrations.keras.state import capture_state, restore_state

__all__ = ["R8Callback", "R8Dataset", "capture_state", "restore_state"]
