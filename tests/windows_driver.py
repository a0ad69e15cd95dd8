"""Drives the display on a real Windows console, from inside: types keys into it, reads its cells back, resizes it.

python -m tests.windows_driver RESULT.json      (in a console; under wine, in a terminal)
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import subprocess
import sys
import threading
import time


class Coord(ctypes.Structure):
    _fields_ = [("x", ctypes.c_short), ("y", ctypes.c_short)]


class Rect(ctypes.Structure):
    _fields_ = [(name, ctypes.c_short) for name in ("left", "top", "right", "bottom")]


class Info(ctypes.Structure):
    _fields_ = [("size", Coord), ("cursor", Coord), ("colours", ctypes.c_ushort), ("window", Rect), ("most", Coord)]


class Key(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_ushort), ("down", ctypes.c_int), ("repeat", ctypes.c_ushort), ("code", ctypes.c_ushort),
        ("scan", ctypes.c_ushort), ("char", ctypes.c_wchar), ("state", ctypes.c_uint),
    ]  # fmt: skip


CODES = {"\r": 13, "\x1b": 27, "\t": 9, "RIGHT": 39, "LEFT": 37}


class Console:
    def __init__(self):
        self.kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        self.kernel.CreateFileW.restype = ctypes.c_void_p
        self.input = self.open("CONIN$")

    def open(self, name):
        return ctypes.c_void_p(self.kernel.CreateFileW(name, 0xC0000000, 3, None, 3, 0, None))

    @property
    def output(self):
        """The screen buffer that is shown now: curses has one of its own."""
        return self.open("CONOUT$")

    def info(self):
        info = Info()
        self.kernel.GetConsoleScreenBufferInfo(self.output, ctypes.byref(info))
        return info

    def rows(self):
        info, found = self.info(), []
        width = info.window.right - info.window.left + 1
        for y in range(info.window.top, info.window.bottom + 1):
            text, read = ctypes.create_unicode_buffer(width + 1), ctypes.c_uint()
            self.kernel.ReadConsoleOutputCharacterW(self.output, text, width, Coord(0, y), ctypes.byref(read))
            found.append(text[: read.value])
        return found

    def type(self, *keys):
        for key in keys:
            for down in (1, 0):
                code = CODES.get(key, 0)
                event = Key(1, down, 1, code, 0, key if len(key) == 1 else "\0", 0x100 if len(key) > 1 else 0)
                self.kernel.WriteConsoleInputW(self.input, ctypes.byref(event), 1, ctypes.byref(ctypes.c_uint()))

    def resize(self, columns, rows):
        self.kernel.SetConsoleScreenBufferSize(self.output, Coord(max(columns, 120), max(rows, 40)))
        window = Rect(0, 0, columns - 1, rows - 1)
        self.kernel.SetConsoleWindowInfo(self.output, 1, ctypes.byref(window))
        self.kernel.SetConsoleScreenBufferSize(self.output, Coord(columns, rows))


def main(path):
    from learnit_r8.dashboard import open_dashboard
    from learnit_r8.dashboard.demo import DemoRun

    early = logging.StreamHandler()
    logging.getLogger("early").addHandler(early)
    console, seen = Console(), {}
    before = sys.stdout
    dashboard = open_dashboard("curses", log_dir="wine-run")
    seen["name"] = dashboard.name
    stop = threading.Event()

    def train():
        for n, (_, event) in enumerate(DemoRun(start=time.time())):
            dashboard.record(event)
            if n % 400 == 50:
                print("a print of the program", n)
            if stop.is_set():
                return
            time.sleep(0.002)

    thread = threading.Thread(target=train)
    thread.start()
    time.sleep(2.0)
    logging.getLogger("early").warning("a warning of an early handler")
    subprocess.run([sys.executable, "-c", "print('printed by a child')"], check=True)
    time.sleep(1.5)
    seen["first"] = console.rows()
    for name, keys in {
        "help": "?", "words": "?", "closed": "\x1b", "zoomed": "5\r", "back": "\x1b\x1b", "metric": ("RIGHT",),
        "asked": "ppau", "paused": "se\r", "stopped": "sabort\r",
    }.items():  # fmt: skip
        console.type(*keys)
        time.sleep(1.5)
        seen[name] = console.rows()
    console.resize(90, 28)
    time.sleep(2.0)
    seen["small"] = console.rows()
    seen["commands"] = [str(command) for command in dashboard.commands]
    console.type("q")
    time.sleep(1.5)
    stop.set()
    thread.join()
    seen["after q"] = dashboard.name
    dashboard.close()
    seen["fault"] = dashboard.fault
    seen["stream is back"] = sys.stdout is before
    seen["end"] = console.rows()
    with open(path, "w", encoding="utf-8") as file:
        json.dump(seen, file)


if __name__ == "__main__":
    main(os.path.abspath(sys.argv[1]))
