"""Which display the dashboard shows, and why: facts about the surroundings in, one display out.

The order is `curses -> rich -> log -> off`, with `notebook` beside `rich` for Jupyter. A display is taken when every
fact that it needs holds; the reason names the first one that failed on the one before it.
"""

from __future__ import annotations

import importlib.util
import locale
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from learnit_r8.core.config import UI_NAMES
from learnit_r8.dashboard.terminal.board import POSIX
from learnit_r8.errors import ConfigError

_CURSES = importlib.util.find_spec("_curses") is not None


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What decides the display."""

    posix: bool = True  # the system has POSIX terminals
    stdin_tty: bool = True  # standard input is a terminal
    stdout_tty: bool = True  # standard output is a terminal
    stdout_open: bool = True  # standard output can be written to
    term: str = "xterm"  # value of TERM
    term_problem: str = ""  # why that terminal cannot be drawn on; empty when it can
    foreground: bool = True  # this process belongs to the terminal's foreground group
    main_thread: bool = True  # the dashboard is opened from the main thread
    notebook: bool = False  # a Jupyter kernel runs this process, and IPython can display
    ci: bool = False  # the environment says that this is a continuous-integration job
    pytest: bool = False  # a test of pytest is running
    rank: int = 0  # number of this process among several
    has_curses: bool = True  # the curses library and what it needs of the C library are there


class Choice(NamedTuple):
    """A display by name, and why it is not a better one (empty when it is the one asked for)."""

    name: str
    reason: str = ""


_ASCII_TERMS = ("linux", "vt", "ansi", "dumb", "cons25", "sun")
_DRAWABLE = (("stdout_tty", "standard output is not a terminal"), ("foreground", "the process runs in the background"))
_NEEDS: dict[str, tuple[tuple[str, str], ...]] = {
    "curses": (
        *_DRAWABLE,
        ("stdin_tty", "standard input is not a terminal"),
        ("has_curses", "this Python or C library cannot redirect curses"),
        ("main_thread", "the dashboard was opened outside the main thread"),
    ),
    "rich": (("posix", "the rich display needs a POSIX terminal"), *_DRAWABLE),
    "notebook": (("notebook", "there is no notebook"),),
    "log": (("stdout_open", "standard output is closed"),),
    "off": (),
}
_BELOW = {"curses": ("rich", "log"), "notebook": ("log",), "rich": ("log",), "log": (), "off": ()}
# Environments in which "auto" starts lower: (fact, best display, reason). The first that holds decides.
_AUTO_STARTS: tuple[tuple[str, str, str], ...] = (
    ("rank", "off", "only rank 0 shows a dashboard"),
    ("pytest", "off", "a test of pytest is running"),
    ("notebook", "notebook", "this is a notebook"),
    ("ci", "log", "this is a continuous-integration job"),
)


def wanted_ui(ui: str, env: Mapping[str, str]) -> str:
    """Return what was asked for: `R8_UI` of the environment, where valid, else the argument.

    Raises:
        ConfigError: `ui` is none of `UI_NAMES`.
    """
    if ui not in UI_NAMES:
        raise ConfigError([f"ui must be one of {', '.join(UI_NAMES)}; got {ui!r}"])
    asked = env.get("R8_UI", "").strip().lower()
    return asked if asked in UI_NAMES else ui


def choose(ui: str, around: Surroundings) -> Choice:
    """Return the best display, from the one asked for (see `wanted_ui`) downwards, whose needs are met."""
    starts = ((best, why) for fact, best, why in _AUTO_STARTS if getattr(around, fact))
    start, reason = next(starts, ("curses", "")) if ui == "auto" else (ui, "")
    problem = _problem(start, around)
    return Choice(below(start, around) if problem else start, reason or problem)


def below(name: str, around: Surroundings) -> str:
    """Return the next display after `name` whose needs are met."""
    return next((lower for lower in _BELOW[name] if not _problem(lower, around)), "off")


def _problem(name: str, around: Surroundings) -> str:
    last = around.term_problem if name in {"curses", "rich"} else ""
    return next((why for fact, why in _NEEDS[name] if not getattr(around, fact)), last)


def look(env: Mapping[str, str], rank: int = 0) -> Surroundings:
    """Return the facts about this process, its streams and its terminal."""
    term = env.get("TERM", "")
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    stdout_tty = is_tty(sys.stdout) and is_tty(sys.__stdout__)
    return Surroundings(
        posix=POSIX,
        stdin_tty=is_tty(sys.stdin),
        stdout_tty=stdout_tty,
        stdout_open=sys.stdout is not None and not getattr(sys.stdout, "closed", False),
        term=term,
        term_problem=_term_problem(term) if stdout_tty and POSIX else "",
        foreground=stdout_tty and (not POSIX or _in_foreground()),
        main_thread=not POSIX or threading.current_thread() is threading.main_thread(),
        # Colab's, Databricks' and Spyder's shells are children of Jupyter's.
        notebook=any(kind.__name__ == "ZMQInteractiveShell" for kind in type(shell).__mro__),
        ci=env.get("CI", "").lower() not in {"", "0", "false"},
        pytest="PYTEST_CURRENT_TEST" in env,
        rank=rank,
        has_curses=_has_curses(),
    )


def default_glyphs(env: Mapping[str, str]) -> str:
    """Return the best set of chart glyphs that this terminal is likely to have."""
    if not POSIX:  # a code page says nothing of what the console can show; Windows Terminal's font has braille
        return "braille" if env.get("WT_SESSION") else "blocks"
    told = next((value for name in ("LC_ALL", "LC_CTYPE", "LANG") if (value := env.get(name))), "")
    # Python itself writes UTF-8 where nothing, or "C", is set; a person who has set "C" may have meant it.
    plain = told in {"C", "POSIX"} or ("." in told and "UTF8" not in told.upper().replace("-", ""))
    encoding = locale.getpreferredencoding(False).lower().replace("-", "")
    return "ascii" if plain or encoding != "utf8" or env.get("TERM", "").startswith(_ASCII_TERMS) else "braille"


def _has_curses() -> bool:
    if not POSIX or not _CURSES:
        return _CURSES
    from learnit_r8.dashboard.terminal.curses_screen import can_redirect

    return can_redirect()


def _term_problem(term: str) -> str:
    if not _CURSES:
        return f"TERM={term!r} cannot move its cursor" if term in {"", "dumb", "unknown"} else ""
    from learnit_r8.dashboard.terminal.curses_screen import term_problem

    return term_problem(term)


def _in_foreground() -> bool:
    try:
        return os.tcgetpgrp(1) == os.getpgrp()
    except OSError:
        return False


def is_tty(stream: Any) -> bool:
    """Return whether a stream, which may be anything or nothing, leads to a terminal."""
    try:
        if stream is not None and not POSIX and _CURSES:
            from learnit_r8.dashboard.terminal.windows_board import is_console

            return is_console(stream)
        return stream is not None and os.isatty(stream.fileno())
    except (AttributeError, OSError, ValueError):
        return False
