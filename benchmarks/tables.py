"""The documents' tables, written from the results, so that their figures are those that were measured.

A table stands between `<!-- results: NAME -->` and `<!-- end of results -->`. `python -m benchmarks` writes them anew,
and a test compares them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Results = dict[str, dict[str, Any]]
_BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
DOCUMENTS = ("README.md", "docs/benchmarks.md")
FAULTS = (
    ("one training image holds infinity", "bad pixel"),
    ("three of them", "3 bad rows"),
    ("ten of them", "10 bad rows"),
    ("learning rate × 1000 for three steps", "bad rate"),
    ("the same three times", "3 bad rates"),
)
STRATEGIES = ("quadrant", "infobatch", "prioritized", "adaptive", "spaced", "curriculum", "reward", "auto")


def load(folder: Path) -> Results:
    """Return all results in a folder by their benchmark's name."""
    return {file.stem: json.loads(file.read_text("utf8")) for file in sorted(folder.glob("*.json"))}


def filled(text: str, results: Results) -> str:
    """Return the text with its tables written anew; one whose results are missing stays."""

    def block(match: re.Match[str]) -> str:
        function, needs = TABLES[match[2]]
        return match[1] + "\n" + function(results) + "\n\n" + match[3] if needs in results else match[0]

    return _BLOCK.sub(block, text)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def rivals(results: Results) -> str:
    """What becomes of one training under each library."""
    found, cost = dict(results["rivals"]["results"]["rivals"]), dict(results["rivals"]["results"]["step"])
    if "composer" in results and "Composer" not in found:
        other = results["composer"]["results"]
        found["Composer"], cost["Composer"] = other["rivals"]["Composer"], other["step"]["Composer"]
    names = [name for name in ("plain loop", "Lightning", "HF Trainer", "Composer", "learnit_r8") if name in found]

    def end(run: dict[str, Any] | None) -> str:
        if run is None:
            return "not run"
        model = f"{run['accuracy']:.1%}" if run["finite"] else "NaN"
        says = "says so" if run["told"] else "silent"
        return f"{model}; {run['finite checkpoints']} of {run['checkpoints']}; {says}"

    def difference(run: dict[str, Any]) -> str:
        return f"{run['difference']:.1g}" if run["difference"] else "0: to the bit"

    rows = [
        ["nothing goes wrong: test accuracy", *(f"{found[name]['clean']['accuracy']:.1%}" for name in names)],
        *([what, *(end(found[name].get(fault)) for name in names)] for what, fault in FAULTS),
        ["killed in mid-epoch and resumed: largest difference of a weight at the end",
         *(difference(found[name]["killed"]) for name in names)],
        ["CPU time of a step of this tiny training, relative", *(f"{cost[name]['ratio']:.2f}" for name in names)],
    ]  # fmt: skip
    return markdown(["", *names], rows)


def front(results: Results) -> str:
    """The front page's few rows of `rivals`: the accuracy of the model that is left, and what a step costs."""
    found, cost = results["rivals"]["results"]["rivals"], results["rivals"]["results"]["step"]
    names = [name for name in ("plain loop", "Lightning", "HF Trainer", "learnit_r8") if name in found]

    def row(what: str, fault: str) -> list[str]:
        runs = [found[name][fault] for name in names]
        return [what, *(f"{run['accuracy']:.1%}" if run["finite"] else "NaN" for run in runs)]

    rows = [
        row("nothing goes wrong", "clean"),
        *(row(*fault) for fault in FAULTS),
        ["CPU time of a step of this tiny training, relative", *(f"{cost[name]['ratio']:.2f}" for name in names)],
    ]
    return markdown(["", *names], rows)


def costs(results: Results) -> str:
    """What parts of the library cost beside the tool that does only that; below 1 is faster than the rival."""
    rows: list[list[str]] = []

    def row(what: str, rival: str, ratio: float) -> None:
        rows.append([what, rival, f"{ratio:.3g}"])

    for step in results["speed"]["results"]["steps"]:
        if step["B"] in (32, 256) and step["N"] == 1_000_000:
            row(f"choose and record a batch of {step['B']} from a million", "torch's blind `RandomSampler`, which only "
                "draws", step["r8/torch"])  # fmt: skip
    for step in results.get("replay", {}).get("results", {}).get("steps", []):
        if (step["capacity"], step["B"]) in {(10_000, 32), (1_000_000, 32), (1_000_000, 256)}:
            row(f"prioritized replay, {step['capacity']:,} transitions, batches of {step['B']} (numba)", "cpprb",
                step["numba/cpprb"])  # fmt: skip
    if "recovery" in results:
        back = results["recovery"]["results"]["rollback"]
        row(f"restore {back['MB']} MB from RAM", "load and verify a checkpoint", 1 / back["faster"])
        row(f"back {back['MB']} MB up to RAM", "a plain copy", back["backup/copy"])
    if "integrations" in results:
        for framework, rival in (("Hugging Face", "Trainer"), ("PyTorch", "DataLoader(shuffle=True)")):
            for name, found in results["integrations"]["results"][framework].items():
                if name in ("R8Trainer", "R8BatchSampler"):
                    row(f"a whole step of a tiny model, `{name}`", f"`{rival}`", 1 + found["wall_overhead"])
    return markdown(["what", "rival", "our time / rival's"], rows)


def overhead(results: Results) -> str:
    """What a whole step costs under each library, beside a bare loop."""
    found = results["overhead"]["results"]["rivals"]
    base = found["bare loop"]["cpu_us"]
    rows = [
        [name, f"{row['cpu_us']:.0f}", f"{row['cpu_us'] - base:+.0f}", f"{row['cpu_ratio']:.2f}"]
        for name, row in found.items()
    ]
    return markdown(["", "µs a step", "more than the bare loop", "ratio"], rows)


def learning(results: Results) -> str:
    """Gains of every strategy on every task."""
    rows = []
    for task, found in results["learning"]["results"]["tasks"].items():
        gains = [found[arm]["against matched uniform"] if arm in found else None for arm in STRATEGIES]
        rows.append([task, *("" if g is None else f"{round(g[0], 1) + 0.0:+.1f} ±{g[1]:.1f}" for g in gains)])
    return markdown(["task", *STRATEGIES], rows)


TABLES: dict[str, tuple[Callable[[Results], str], str]] = {
    # name: (what writes it, the results that it cannot do without)
    "rivals": (rivals, "rivals"),
    "front": (front, "rivals"),
    "costs": (costs, "speed"),
    "overhead": (overhead, "overhead"),
    "learning": (learning, "learning"),
}
