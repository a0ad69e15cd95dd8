"""Events as lines of text: an icon, a kind, a sentence. One table row an event type."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from pathlib import PurePath
from typing import Any, NamedTuple

from learnit_r8 import events as e
from learnit_r8.run import formats as f
from learnit_r8.run.styles import Style


class Entry(NamedTuple):
    """A line of the events pane."""

    time: float
    step: int
    icon: str
    kind: str
    text: str
    style: Style

    def matches(self, needle: str) -> bool:
        """Say whether the line contains `needle`, upper and lower case being the same."""
        return needle.casefold() in f"{self.icon} {self.kind} {self.text}".casefold()


def _name(path: str) -> str:
    parts = PurePath(path).parts
    return "/".join(parts[-2:]) or path


def _ids(indices: tuple[int | str, ...], total: int) -> str:
    shown = ", ".join(f.sample(index, 40) for index in indices[:4])
    return shown + (f", … ({total} in all)" if total > len(indices[:4]) else "")


def _started(event: e.RunStarted) -> str:
    goal = f"{f.steps(event.total_steps)} steps" if event.total_steps else "a time budget"
    verb = f"resumed at step {f.steps(event.step)}" if event.resumed else "started"
    return f"{event.run} {verb} · {goal} · pid {event.pid}"


def _rolled_back(event: e.RolledBack) -> str:
    source = "RAM backup" if event.source == "ram" else _name(event.source)
    text = f"-> step {f.steps(event.to_step)} ({source})"
    if event.lr_multiplier != 1.0:
        text += f" · lr ×{f.brief(event.lr_multiplier)}"
        text += f" for {f.steps(event.hold_steps)} steps" if event.hold_steps else ""
    return text


def _spike(event: e.SpikeSeen) -> str:
    if event.verdict == "skipped":
        return event.reason
    score = "" if event.verdict == "nonfinite" else f" (z={f.signed(event.score)})"
    expected = f" · expected {f.brief(event.expected_loss)}" if math.isfinite(event.expected_loss) else ""
    return f"loss {f.brief(event.loss)}{score}{expected}"


def _lr_found(event: e.LrFound) -> str:
    if not any(event.suggestions.values()):
        return f"none in {f.steps(event.steps)} steps of search · peak lr stays {event.lr:.2e}"
    return f"peak lr {event.lr:.2e} after {f.steps(event.steps)} steps of search"


def _saved(event: e.CheckpointSaved) -> str:
    return f"{_name(event.path)} ({f.size(event.bytes)}, {f.span(event.seconds)})"


def _epoch_ended(event: e.EpochEnded) -> str:
    text = f"epoch {event.epoch + 1}: mean loss {f.brief(event.mean_loss)} · {f.span(event.seconds)}"
    return text if event.completed else f"{text} · left after {f.steps(event.batches)} batches"


def _made_with(event: e.MadeWith) -> str:
    dirty = {True: " with changes", False: "", None: ""}[event.dirty]
    commit = f"commit {event.commit[:12]}{dirty} · " if event.commit else ""
    # The whole of it is in the log; `python -c` may hold a whole program.
    return f"{commit}{event.device} · {event.host} · {textwrap.shorten(event.command, 100, placeholder=' …')}"


def _ended(event: e.RunEnded) -> str:
    return f"{event.reason} after {f.span(event.seconds)}"


_Text = Callable[[Any], str]
_TABLE: dict[type[e.Event], tuple[str, str, Style, _Text]] = {
    e.RunStarted: (">", "run", Style.TITLE, _started),
    e.RunEnded: (".", "end", Style.TITLE, _ended),
    e.EpochEnded: ("E", "epoch", Style.NORMAL, _epoch_ended),
    e.PhaseChanged: ("P", "phase", Style.ACCENT, lambda x: f"{x.phase} · {x.reason}" if x.reason else x.phase),
    e.SpikeSeen: ("!", "spike", Style.BAD, _spike),
    e.RolledBack: ("R", "rollback", Style.WARN, _rolled_back),
    e.RollbackFailed: ("X", "no rollback", Style.BAD, lambda x: x.reason),
    e.SampleQuarantined: (
        "Q",
        "quarantine",
        Style.WARN,
        lambda x: f"{_ids(x.indices, len(x.indices))} · {x.reason}",
    ),
    e.SuspectsNamed: (
        "?",
        "suspects",
        Style.WARN,
        lambda x: f"{f.steps(x.count)} flagged · {_ids(x.indices, x.count)}",
    ),
    e.StrategyDecided: ("S", "strategy", Style.NORMAL, lambda x: f"{x.decision} · {x.reason} ({f.brief(x.figure)})"),
    e.CheckpointSaved: ("C", "checkpoint", Style.GOOD, _saved),
    e.CheckpointFailed: ("X", "no ckpt", Style.BAD, lambda x: f"{_name(x.path)} · {x.reason}"),
    e.CheckpointLoaded: ("L", "loaded", Style.GOOD, lambda x: _name(x.path)),
    e.OverfittingSeen: ("O", "overfitting", Style.WARN, lambda x: x.reason),
    e.MadeWith: ("i", "made with", Style.NORMAL, _made_with),
    e.LrFound: ("L", "lr found", Style.ACCENT, _lr_found),
    e.Paused: ("|", "pause", Style.WARN, lambda x: "the loop waits" if x.paused else "the loop goes on"),
    e.Notice: ("i", "notice", Style.NORMAL, lambda x: x.message),
    e.SinkFailed: ("X", "sink lost", Style.BAD, lambda x: f"{x.sink} · {x.reason}"),
}


def entry(event: e.Event) -> Entry | None:
    """Return the line for an event, or None for one that is no news by itself."""
    row = _TABLE.get(type(event))
    if row is None:
        return None
    icon, kind, style, text = row
    if isinstance(event, e.Notice) and event.level == "warning":
        icon, kind, style = "W", "warning", Style.WARN
    return Entry(event.time, event.step, icon, kind, " ".join(text(event).split()), style)


def validation_entry(event: e.MetricLogged, is_best: bool, before: Entry | None) -> Entry:
    """Return the line for a validation metric, joined to those logged just before at the same step."""
    text = f"{event.name} {f.brief(event.value)}" + (" (best)" if is_best else "")
    if before is not None and before.icon == "V" and before.step == event.step:
        text = f"{before.text}  {text}"
    return Entry(event.time, event.step, "V", "validation", text, Style.ACCENT)
