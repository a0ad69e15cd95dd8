"""Bytes of a terminal to key names: the sequences of xterm, screen, tmux, linux and vt100 in both keypad modes."""

from __future__ import annotations

import codecs
import re

_SEQUENCE = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|O[ -~])")
_UNFINISHED = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*|O)?$")
# By the last character, or by the number before a last "~".
_NAMES = {
    "A": "KEY_UP", "B": "KEY_DOWN", "C": "KEY_RIGHT", "D": "KEY_LEFT", "H": "KEY_HOME", "F": "KEY_END", "Z": "BACKTAB",
    "M": "ENTER", "1": "KEY_HOME", "7": "KEY_HOME", "4": "KEY_END", "8": "KEY_END", "5": "KEY_PPAGE", "6": "KEY_NPAGE",
    "3": "KEY_DC",
}  # fmt: skip
_CONTROL = {"\r": "ENTER", "\n": "ENTER", "\t": "TAB", "\x7f": "KEY_BACKSPACE", "\x08": "KEY_BACKSPACE", "\x1b": "ESC"}


class KeyDecoder:
    r"""Turns input into names: characters as they are, `KEY_UP`, `ENTER`, `^L`, ...

    >>> KeyDecoder().feed(b"y\x1b[A\x0c")
    ['y', 'KEY_UP', '^L']
    """

    def __init__(self) -> None:
        self._held = b""
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def waiting(self) -> bool:
        """An escape sequence has begun; without more input, `flush` makes it the Escape key."""
        return bool(self._held)

    def feed(self, data: bytes) -> list[str]:
        """Return the keys that `data` completes."""
        data, self._held = self._held + data, b""
        unfinished = _UNFINISHED.search(data)
        if unfinished:
            data, self._held = data[: unfinished.start()], unfinished.group()
        names, position = [], 0
        for match in _SEQUENCE.finditer(data):
            names += self._plain(data[position : match.start()])
            sequence = match.group().decode("ascii")
            name = _NAMES.get(sequence[2:-1].split(";")[0] if sequence[-1] == "~" else sequence[-1])
            names += [name] if name else []
            position = match.end()
        return names + self._plain(data[position:])

    def flush(self) -> list[str]:
        """No more input came: return what was held back as plain keys."""
        held, self._held = self._held, b""
        return self._plain(held)

    def _plain(self, data: bytes) -> list[str]:
        return [
            _CONTROL.get(char) or (f"^{chr(ord(char) + 64)}" if char < " " else char)
            for char in self._utf8.decode(data)
        ]
