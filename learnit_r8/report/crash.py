"""A crash bundle (`loop/crash.py` writes it) as text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from learnit_r8.errors import ConfigError
from learnit_r8.events import from_json
from learnit_r8.loop.crash import BUNDLE
from learnit_r8.run import formats as f
from learnit_r8.run.journal import entry

_IDS_SHOWN = 8
_STEPS_SHOWN = 16


def find_bundle(path: str | Path) -> Path:
    """Return the bundle's file: `path` itself, the one inside it, or a run's newest.

    Raises:
        ConfigError: There is none.
    """
    given = Path(path)
    if given.is_file():
        return given
    if (given / BUNDLE).is_file():
        return given / BUNDLE
    inside = sorted(given.glob(f"crash-step-*/{BUNDLE}"))
    if inside:
        return inside[-1]
    what = "holds no crash bundle" if given.is_dir() else "does not exist"
    raise ConfigError([f"{given} {what}: give the folder that the error named (crash-step-...), or the run's log_dir"])


def crash_text(path: str | Path, *, everything: bool = False) -> str:
    """Return a bundle as text: why, the last steps with their samples, the last events, the configuration.

    Raises:
        ConfigError: There is no bundle, or it cannot be read.
    """
    file = find_bundle(path)
    try:
        bundle = json.loads(file.read_text(encoding="utf-8"))
        parts = [
            [f"step {f.steps(int(bundle['step']))}: {bundle['reason']}"],
            _steps(bundle["steps"], everything),
            _blamed(bundle["steps"]),
            _events(bundle["events"]),
            _settings(bundle["config"], everything),
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError([f"{file} is no crash bundle ({type(error).__name__}: {error})"]) from error
    return "\n\n".join("\n".join(part) for part in [[str(file)], *parts] if part)


def _steps(steps: Sequence[Mapping[str, Any]], everything: bool) -> list[str]:
    shown = steps if everything else steps[-_STEPS_SHOWN:]
    lines = [f"The last {len(shown)} steps:" if len(shown) < len(steps) or not steps else "The last steps:"]
    for step in shown:
        mark = " " if step["verdict"] in {"calm", "skipped"} else "!"
        ids = _ids(step["indices"], None if everything else _IDS_SHOWN)
        lines.append(
            f"{mark} {step['step']:>9}  {step['verdict']:<9}  loss {float(step['loss']):>10.4g}  samples {ids}"
        )
    return lines


def _ids(indices: Sequence[int], most: int | None) -> str:
    shown = " ".join(str(index) for index in indices[:most])
    left = len(indices) - len(indices[:most])
    return f"{shown} … and {left} more" if left else shown


def _blamed(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the samples that several faulty batches share."""
    faulty = [step for step in steps if step["verdict"] in {"spike", "nonfinite", "drift"}]
    counts = Counter(index for step in faulty for index in set(step["indices"]))
    shared = sorted((-times, index) for index, times in counts.items() if times > 1)
    if not shared:
        return []
    listing = ", ".join(f"{index} ({-times}×)" for times, index in shared[:_IDS_SHOWN])
    return [f"Samples in more than one faulty batch: {listing}" + (" …" if len(shared) > _IDS_SHOWN else "")]


def _events(events: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for data in events:
        try:
            line = entry(from_json(data))
        except ValueError:  # of a newer version
            continue
        if line is not None:
            lines.append(f"  {f.of_day(line.time, None)}  {line.step:>9}  {line.kind:<11} {line.text}")
    return ["The last events:", *lines[-2 * _STEPS_SHOWN :]] if lines else []


def _settings(config: Mapping[str, Any], everything: bool) -> list[str]:
    shown = {name: value for name, value in config.items() if everything or value is not None}
    return ["The run's settings:", *(f"  {name} = {value!r}" for name, value in shown.items())]
