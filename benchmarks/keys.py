"""Keys in place of indices, and data that grow: memory a key, a step against that of indices, pauses of the loop.

    python -m benchmarks.keys [--size N] [--rounds R]

Keys are `img/000000000.jpg` and so on, 17 bytes of text. The step is draw + update of 256 samples past the first epoch.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.harness import columns, main, progress
from benchmarks.speed import Loop
from benchmarks.timing import interleave
from learnit_r8.structures.key_table import KeyTable

_TEXT = 17
_PART = 10_000


def resident() -> int:
    """Return the bytes of this process that are in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def some(first: int, last: int) -> list[str]:
    """Return keys by their numbers."""
    return [f"img/{number:09d}.jpg" for number in range(first, last)]


def run(size: int = 1_000_000, rounds: int = 300) -> dict[str, Any]:
    """Measure everything at one size."""
    progress(f"{size:,} keys")
    before, start = resident(), time.perf_counter()
    table = KeyTable(f"img/{number:09d}.jpg" for number in range(size))
    found: dict[str, Any] = {"N": size, "built_us_a_key": (time.perf_counter() - start) / size * 1e6}
    found["bytes_beyond_the_key"] = table.nbytes / size - _TEXT
    found["resident_beyond_the_key"] = (resident() - before) / size - _TEXT
    if size <= 1_000_000:
        before = resident()
        plain = {f"img/{number:09d}.jpg": number for number in range(size)}
        found["dict_and_list_beyond_the_key"] = (resident() - before + 8 * size) / size - _TEXT
        del plain
    progress("steps")
    loops = {"keys": Loop(size, 256, keys=table)}
    del table  # the run has a copy
    loops["indices"] = Loop(size, 256)
    steps = {name: loop.step for name, loop in loops.items()}
    calls = max(min(50, size // 256 // 4), 2)
    for name, seconds in interleave(steps, rounds=rounds, calls=calls).items():
        found[f"step_us_{name}"] = seconds * 1e6
    found["keys/indices"] = found["step_us_keys"] / found["step_us_indices"]
    if size > 20_000_000:
        return found
    progress("growth")
    for name, loop in loops.items():
        found[f"grow_ms_a_million_{name}"] = _grow(loop.scheduler, size, name)
    return found


def _grow(scheduler: Any, size: int, name: str) -> float:
    """Let N become 2N: of indices at once, of keys in parts; return the longest pause in ms for each million of N."""
    pauses, part = [], size if name == "indices" else _PART
    for first in range(size, 2 * size, part):
        last = min(first + part, 2 * size)
        more = last - first if name == "indices" else some(first, last)
        start = time.perf_counter()
        scheduler.grow(more)
        pauses.append(time.perf_counter() - start)
    return max(pauses) * 1e3 / (size / 1e6)


def show(found: dict[str, Any]) -> str:
    """Return the figures as text."""
    return columns(("what", "figure"), [(name, f"{value:,.4g}") for name, value in found.items()])


if __name__ == "__main__":
    main(run, show, __doc__)
