"""What the benchmarks share: a command line made from the arguments of `run`, results as JSON, tables as text.

A benchmark is a module with two functions:

    run(*, quick=False, ...) -> dict    measures; medians and the number of their repeats, as JSON can hold them
    table(results) -> str               the same figures for people

A key "failed" that is not 0 means that something which must hold does not: the exit status is then 1.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import inspect
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
RIVALS = (
    "numpy", "scipy", "scikit-learn", "torch", "cpprb", "numba", "lightning", "transformers", "mosaicml", "infobatch",
    "rich", "tqdm", "keras", "fastai", "pytorch-ignite",
)  # fmt: skip


def progress(text: str) -> None:
    """Say what is being measured, away from the tables."""
    print(f"  {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main(run: Callable[..., dict[str, Any]], table: Callable[[Any], str], text: str | None) -> None:
    """Measure with the options of the command line, print the table, write JSON if asked, and exit."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, parameter in inspect.signature(run).parameters.items():
        flag = "--" + name.replace("_", "-")
        if parameter.default is False:
            parser.add_argument(flag, action="store_true")
        else:
            kind = str if parameter.default is None else type(parameter.default)
            parser.add_argument(flag, type=kind, default=parameter.default, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    options = vars(parser.parse_args())
    file = options.pop("json")
    begin = time.monotonic()
    results = run(**options)
    print(table(results), flush=True)
    if file is not None:
        given = {name: value for name, value in options.items() if value != parser.get_default(name)}
        write(file, document(Path(sys.argv[0]).stem, given, results, time.monotonic() - begin))
    sys.exit(1 if results.get("failed") else 0)


def document(name: str, options: Mapping[str, Any], results: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return results with what is needed to judge them: command with the options given, date, machine, versions."""
    words = [f"--{key.replace('_', '-')}" + ("" if value is True else f" {value}") for key, value in options.items()]
    return {
        "benchmark": name,
        "command": " ".join([f"python -m benchmarks.{name}", *words]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seconds": round(seconds),
        "machine": machine(),
        "versions": versions(),
        "results": results,
    }


def machine() -> dict[str, Any]:
    """Return the kind of machine, and nothing that names this one."""
    model = platform.processor() or platform.machine()
    cpus = Path("/proc/cpuinfo")
    if cpus.is_file():
        lines = [line.partition(":")[2].strip() for line in cpus.read_text().splitlines() if "model name" in line]
        model = lines[0] if lines else model
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.system()}


def versions() -> dict[str, str]:
    """Return the versions of Python, of this library and of the rivals that are installed."""
    from learnit_r8 import __version__

    found = {"python": platform.python_version(), "learnit_r8": __version__}
    for name in RIVALS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write(file: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON, one line per list or small mapping, floats to six digits; whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(_text(plain(content), 0) + "\n", "utf8")
    partial.replace(file)


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: numpy's numbers and arrays as Python's, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _text(value: Any, depth: int) -> str:
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if len(line) + depth <= 120 or not value or not isinstance(value, dict | list):
        return line
    if isinstance(value, list) and not isinstance(value[0], dict):
        return line
    pad = " " * (depth + 1)
    if isinstance(value, list):
        return "[\n" + ",\n".join(pad + _text(item, depth + 1) for item in value) + "\n" + " " * depth + "]"
    items = (f"{pad}{json.dumps(key, ensure_ascii=False)}: {_text(item, depth + 1)}" for key, item in value.items())
    return "{\n" + ",\n".join(items) + "\n" + " " * depth + "}"


def columns(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table as text: the first column to the left, the others to the right."""
    cells = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                  for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in cells
    )  # fmt: skip
