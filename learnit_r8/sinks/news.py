"""News of a run for people who are elsewhere: e-mail, Slack, Discord, ntfy and a hundred others, through Apprise.

    R8Scheduler(..., sinks=[NewsSink("ntfys://ntfy.sh/my-topic", "mailto://user:password@example.org")])

A thread sends, so a slow server costs training nothing. Rollbacks, divergence, alarms and the end of the run are news;
what comes in quick succession is one message.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from learnit_r8 import events
from learnit_r8.errors import ConfigError

__all__ = ["NewsSink"]

MOST_LINES = 20
"""Lines of one message; the rest is counted."""
TRIES = 5
"""Messages in a row that a server did not take, after which it gets none; the others hear of it, or the events."""
_CLOSE_SECONDS = 15.0


def _rolled_back(event: events.RolledBack) -> str:
    return f"rolled back from step {event.step} to {event.to_step}, learning rate x{event.lr_multiplier:g}"


_NEWS: dict[type[events.Event], tuple[str, Callable[[Any], str]]] = {
    events.RolledBack: ("warning", _rolled_back),
    events.RollbackFailed: ("failure", lambda event: f"no rollback at step {event.step}: {event.reason}"),
    events.CheckpointFailed: ("failure", lambda event: f"checkpoint failed at step {event.step}: {event.reason}"),
    events.SinkFailed: ("warning", lambda event: f"{event.sink} was lost at step {event.step}: {event.reason}"),
    events.RunEnded: ("info", lambda event: f"{event.reason} at step {event.step} after {event.seconds:.0f} s"),
}
_ORDER = ("info", "success", "warning", "failure")


def news(event: events.Event) -> tuple[str, str] | None:
    """Return (kind, text) of an event that people elsewhere should hear of, None for the others."""
    if isinstance(event, events.Notice) and event.level == "warning":
        return "warning", f"step {event.step}: {event.message}"
    row = _NEWS.get(type(event))
    if row is None:
        return None
    kind, text = row
    if isinstance(event, events.RunEnded):
        kind = {"finished": "success", "error": "failure"}.get(event.reason, "info")
    return kind, text(event)


class _Server:
    """An address, and the news that it has not taken yet."""

    def __init__(self, url: str) -> None:
        from apprise import Apprise

        self.name = f"{str(url).partition(':')[0]}://..."  # the rest may hold a password
        self._apprise: Any = Apprise()
        self.understood = bool(self._apprise.add(url))
        self.waiting: deque[tuple[str, str]] = deque(maxlen=1000)
        self.failed = 0

    def send(self, run: str) -> str:
        """Send what waits as one message; return why it was not taken, and nothing where it was."""
        some = [self.waiting.popleft() for _ in range(len(self.waiting))]
        if not some:
            return ""
        lines = [text for _, text in some]
        if len(lines) > MOST_LINES:
            lines = [*lines[: MOST_LINES - 1], f"... and {len(lines) - MOST_LINES} more", lines[-1]]
        worst = max((kind for kind, _ in some), key=_ORDER.index)
        reason = "it did not take it"
        try:
            taken = self._apprise.notify(title=f"{run}: {some[-1][1]}", body="\n".join(lines), notify_type=worst)
        except Exception as error:
            taken, reason = False, f"{type(error).__name__}: {error}"
        self.failed = 0 if taken else self.failed + 1
        if taken:
            return ""
        self.waiting.extendleft(reversed(some))
        return reason


class NewsSink:
    """Sends a run's news to people; needs `learnit_r8[news]`.

    Args:
        *urls: Where to, as Apprise has it: `mailto://`, `slack://`, `discord://`, `ntfy://` and others.
        interval: Seconds between two messages at least; what happens meanwhile is told in the next one.
        seconds: How long a first piece of news waits for others that belong to it, as a rollback to its spike.

    Raises:
        ConfigError: No address, one that Apprise does not understand, or a bad time.
    """

    ignores_batches = patient = True
    once = True

    def __init__(self, *urls: str, interval: float = 60.0, seconds: float = 2.0) -> None:
        try:
            self._servers = [_Server(url) for url in urls]
        except ImportError as error:
            raise ConfigError(['NewsSink needs apprise: pip install "learnit_r8[news]"']) from error
        problems = [] if urls else ["NewsSink needs one address at least, as ntfy://host/topic"]
        problems += [f"{name} must be seconds, 0 or more; got {value!r}" for name, value in
                     (("interval", interval), ("seconds", seconds)) if not value >= 0]  # fmt: skip
        problems += [
            f"Apprise does not understand the address {one.name}" for one in self._servers if not one.understood
        ]
        if problems:
            raise ConfigError(problems)
        self._interval, self._seconds = interval, seconds
        self._lost: list[str] = []
        self._news, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._run = "run"

    def record(self, event: events.Event) -> None:
        """Queue what is news.

        Raises:
            ConnectionError: No server takes messages any more.
        """
        if self._error is not None:
            raise self._error
        if isinstance(event, events.RunStarted):
            self._run = event.run or "run"
        found = news(event)
        if found is None:
            return
        for server in self._servers:
            server.waiting.append(found)
        self._news.set()
        if self._thread is None:
            self._closing.clear()
            self._thread = threading.Thread(target=self._work, name="r8-news", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while not self._closing.is_set():
            self._news.wait()
            self._closing.wait(self._seconds)
            self._send()
            self._closing.wait(self._interval)
        self._send()

    def _send(self) -> None:
        self._news.clear()
        for server in sorted(self._servers, key=lambda one: one.failed):  # a dead one keeps nobody waiting
            reason = server.send(self._run)
            if reason and server.failed >= TRIES:
                self._lose(server, f"{TRIES} messages in a row were not delivered to {server.name}: {reason}")
            elif reason:
                self._news.set()

    def _lose(self, server: _Server, text: str) -> None:
        self._servers = [other for other in self._servers if other is not server]
        self._lost.append(text)
        for other in self._servers:
            other.waiting.append(("warning", text))
            self._news.set()
        if not self._servers:
            self._error = ConnectionError("; ".join(self._lost))

    def close(self) -> None:
        """Send what is left, waiting for the servers for some seconds.

        Raises:
            ConnectionError: Some news was not delivered.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._closing.set()
        self._news.set()
        end = time.monotonic() + _CLOSE_SECONDS
        thread.join(max(0.0, end - time.monotonic()))
        waiting = [
            f"{len(one.waiting)} pieces of news were not delivered to {one.name}"
            for one in self._servers
            if one.waiting
        ]
        if waiting or self._lost:
            raise ConnectionError("; ".join(self._lost + waiting))
