"""The evidence, written down when training has diverged: a folder that `r8 crash` prints."""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from learnit_r8.errors import TrainingDiverged
from learnit_r8.events import Event, plain, to_json
from learnit_r8.types import SAMPLES_TOLD, Indices, Verdict

LAST_STEPS = 64
BUNDLE = "crash.json"


class CrashRecorder:
    """Remembers the last steps, and writes the bundle."""

    def __init__(
        self,
        folder: str | None,
        config: Mapping[str, Any],
        recent_events: Callable[[], Sequence[Event]],
        names: Callable[[Indices], list[int | str]],
    ) -> None:
        self._names = names
        self._folder = folder
        self._config = config
        self._recent_events = recent_events
        self._steps: deque[tuple[int, Verdict, float, Indices]] = deque(maxlen=LAST_STEPS)

    def note(self, step: int, verdict: Verdict, loss: float, indices: Indices) -> None:
        """Remember one report; nobody changes the ids."""
        self._steps.append((step, verdict, loss, indices))

    def note_calm(self, steps: Sequence[int], losses: Sequence[float], indices: Sequence[Indices]) -> None:
        """Remember calm reports."""
        self._steps.extend(zip(steps, itertools.repeat(Verdict.CALM), losses, indices, strict=False))

    def diverged(self, step: int, reason: str, batches: Sequence[Sequence[int]], cause: Exception | None) -> NoReturn:
        """Write the bundle and raise TrainingDiverged, from the last error of the user's load_callback if any."""
        if cause is not None:
            reason = f"{reason}; load_callback failed: {type(cause).__name__}: {cause}"
        where: Path | None = None
        note = "nothing was written: there is no log_dir and no checkpoint_dir"
        if self._folder is not None:
            try:
                where = self._write(step, reason)
                note = f"the evidence is in {where} (r8 crash {where})"
            except OSError as error:  # the disk must not hide the divergence
                note = f"the evidence could not be written: {error}"
        raise TrainingDiverged(
            f"training diverged at step {step}: {reason}; {note}",
            batches=[self._names(np.asarray(ids, np.int64)) for ids in batches],
            crash_bundle=where,
        ) from cause

    def _write(self, step: int, reason: str) -> Path:
        from learnit_r8.checkpoint.remote import folder_of, shown

        assert self._folder is not None
        where = folder_of(self._folder) / f"crash-step-{step:09d}"
        where.mkdir(parents=True, exist_ok=True)
        bundle = {
            "step": step,
            "reason": reason,
            "config": plain(self._config),
            "steps": [
                {
                    "step": at,
                    "verdict": verdict.value,
                    "loss": plain(loss),
                    "size": len(ids),
                    "indices": self._names(ids[:SAMPLES_TOLD]),
                }
                for at, verdict, loss, ids in self._steps
            ],
            "events": [to_json(event) for event in self._recent_events()],
        }
        (where / BUNDLE).write_text(json.dumps(bundle, allow_nan=False, indent=1), encoding="utf-8")
        return shown(where)
