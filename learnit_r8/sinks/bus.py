"""Hands every event to every sink, and drops a sink that raises."""

from __future__ import annotations

import atexit
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from learnit_r8.core.clock import Clock
from learnit_r8.errors import tell
from learnit_r8.events import BatchIssued, Event, LossReported, Notice, SinkFailed
from learnit_r8.run.metric import GRADIENT
from learnit_r8.types import Command, Sink

_EVERY_STEP = (BatchIssued, LossReported)
_COMMANDS = [command.value for command in Command]


class EventBus:
    """The scheduler's side of all sinks.

    Args:
        sinks: Listeners, in order.
        clock: Source of the events' times.
    """

    def __init__(self, sinks: Iterable[Sink], clock: Clock) -> None:
        self.sinks = list(sinks)
        self._clock = clock
        self.names: Callable[[Sequence[int]], list[int | str]] | None = None  # what samples are called in events
        self.recent: deque[Event] = deque(maxlen=200)  # notable ones, for a crash bundle
        self.first: Callable[[], object] = bool  # called before each event that is sent without a time
        self._told = 0.0  # time of the last event
        self._pid = os.getpid()
        _unclosed.add(self)

    def __bool__(self) -> bool:
        return bool(self.sinks)

    def add(self, sink: Sink) -> None:
        """Let one more sink listen from now on."""
        self.first()
        self.sinks.append(sink)

    @property
    def wants_batches(self) -> bool:
        """Whether any sink has a use for `BatchIssued`; without one it need not even be built."""
        return not all(getattr(sink, "ignores_batches", False) for sink in self.sinks)

    @property
    def patient(self) -> bool:
        """Whether no sink minds to hear of a calm loss a few steps late."""
        return all(getattr(sink, "patient", False) for sink in self.sinks)

    def emit(self, event: Event, time: float | None = None) -> None:
        """Put the time into a new event, now unless it is given, and let every sink hear it."""
        if time is None:
            self.first()
            time = self._clock.wall()
        elif time < self._told:  # of what follows from a loss is told before the loss
            time = self._told
        self._told = time
        object.__setattr__(event, "time", time)
        if type(event) not in _EVERY_STEP and not getattr(event, "name", "").startswith(GRADIENT):
            if self.names is not None and (indices := getattr(event, "indices", None)):
                object.__setattr__(event, "indices", tuple(self.names(indices)))
            self.recent.append(event)
        for sink in tuple(self.sinks):
            try:
                sink.record(event)
            except Exception as error:
                self._drop(sink, event.step, error)

    def emit_late(self, event: LossReported, score: float, time: float) -> None:
        """Let every sink hear a loss of earlier, whose score was worked out since."""
        object.__setattr__(event, "score", score)
        self.emit(event, time)

    def _drop(self, sink: Sink, step: int, error: Exception) -> None:
        if sink not in self.sinks:  # it failed again at the news of another sink's failure
            return
        self.sinks.remove(sink)
        _close(sink)
        name, reason = type(sink).__name__, f"{type(error).__name__}: {error}"
        tell(f"{name} hears no more of the run, from step {step} on: {reason}")
        self.emit(SinkFailed(step=step, sink=name, reason=reason))

    def remove(self, sink: Sink) -> None:
        """Close one sink and let it hear no more."""
        self.first()
        if sink in self.sinks:
            self.sinks.remove(sink)
            _close(sink, told=True)

    @property
    def commanding(self) -> bool:
        """Whether any sink can give commands."""
        return any(hasattr(sink, "commands") for sink in self.sinks)

    @property
    def asked(self) -> bool:
        """Whether a command waits."""
        return any(getattr(sink, "commands", None) for sink in self.sinks)

    def commands(self, step: int) -> Iterator[Command]:
        """Yield what the sinks ask for, oldest first; what is no command is answered by a `Notice`."""
        for sink in tuple(self.sinks):
            queue = getattr(sink, "commands", None)
            while queue:
                asked = queue.popleft()
                if asked in _COMMANDS:
                    yield Command(asked)
                else:
                    known = ", ".join(_COMMANDS)
                    message = f"{type(sink).__name__} asked for {asked!r}, which is no command: use {known}"
                    self.emit(Notice(step=step, message=message, level="warning"))

    def close(self) -> None:
        """Close every sink."""
        self.first()
        self.first = bool  # what was called belongs to a run that holds this bus: a circle would keep its memory
        _unclosed.discard(self)
        while self.sinks:
            _close(self.sinks.pop(), told=True)


def _close(sink: Sink, *, told: bool = False) -> None:
    """Close a sink; a failure to close must not hide the error or the result of the run."""
    try:
        close = getattr(sink, "close", None)
        if close is not None:
            close()
    except Exception as error:
        if told:
            reason = f"{type(error).__name__}: {error}"
            tell(f"{type(sink).__name__} could not be closed, and may have lost what it held: {reason}")


_unclosed: weakref.WeakSet[EventBus] = weakref.WeakSet()


@atexit.register
def _close_forgotten() -> None:
    """Let sinks write what they hold back, where a program has forgotten `close()`."""
    for bus in list(_unclosed):
        if bus._pid == os.getpid():  # in a forked child the run is its parent's
            bus.close()
