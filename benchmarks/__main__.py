"""Every benchmark with its rivals, the results as JSON, the pictures of the documents.

    python -m benchmarks                 # all of them: hours; a quiet machine, please
    python -m benchmarks speed replay    # some
    python -m benchmarks --quick         # small sizes and few repeats: minutes, figures for no one to quote
    python -m benchmarks --pictures      # only draw again what the results say, and write the documents' tables

Figures go to `benchmarks/results/*.json` and pictures to `assets/*.png`; those of `--quick` go to
`build/benchmarks`. Each benchmark runs in a process of its own, with one thread for linear algebra, so one that
fails takes no other with it. Options of one benchmark: `python -m benchmarks.speed --help`.
"""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.harness import RESULTS

ROOT = Path(__file__).parents[1]
NAMES = (
    "speed", "attribution", "replay", "rivals", "datamap", "strategies", "recovery", "checkpoint", "dashboard",
    "frames", "report", "integrations", "overhead", "sharded", "clean_runs", "stability", "faults", "continual",
    "learning",
)  # fmt: skip


def options() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run, all by default; see --list")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    parser.add_argument("--pictures", action="store_true", help="run nothing, only draw")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for both results and pictures")
    found = parser.parse_args()
    if unknown := [name for name in found.names if name not in NAMES]:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(NAMES)}")
    return found


def measure(name: str, folder: Path, *, quick: bool) -> str:
    """Run one benchmark and return what became of it."""
    begin = time.time()
    file = folder / f"{name}.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(file), *(["--quick"] if quick else [])]
    one = {f"{kind}_NUM_THREADS": "1" for kind in ("OMP", "OPENBLAS", "MKL")}
    status = subprocess.run(command, cwd=ROOT, env=one | os.environ).returncode
    became = "done" if status == 0 else f"FAILED with status {status}"
    written = file.is_file() and file.stat().st_mtime >= begin - 1
    return f"{name:14} {became}, {time.time() - begin:.0f} s" + ("" if written else ", no new results")


def main() -> int:
    """Run what was asked for; return 1 if any of it failed."""
    asked = options()
    if asked.list:
        for name in NAMES:
            text = ast.get_docstring(ast.parse((Path(__file__).parent / f"{name}.py").read_text("utf8"))) or ""
            print(f"{name:14} {text.splitlines()[0]}")
        return 0
    results = asked.out or (ROOT / "build" / "benchmarks" if asked.quick else RESULTS)
    names = [] if asked.pictures else asked.names or NAMES
    lines = []
    for number, name in enumerate(names, 1):
        print(f"\n== {name} ({number} of {len(names)})", flush=True)
        lines.append(measure(name, results, quick=asked.quick))
    from benchmarks import tables
    from benchmarks.pictures import draw

    pictures = asked.out or (results if asked.quick else ROOT / "assets")
    lines += [f"{'picture':14} {drawn.name}" for drawn in draw(results, pictures)]
    if results == RESULTS:
        for name in tables.DOCUMENTS:
            page = ROOT / name
            page.write_text(tables.filled(page.read_text("utf8"), tables.load(RESULTS)), "utf8")
            lines.append(f"{'tables':14} {name}")
    print("\n" + "\n".join(lines))
    return 1 if any("FAILED" in line for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
