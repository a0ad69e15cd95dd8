"""`python -m benchmarks`: it runs, one failure costs nothing else, and the documents show what was measured."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import harness, tables

ROOT = Path(__file__).resolve().parents[1]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in tables.DOCUMENTS}
RESULTS = tables.load(ROOT / "benchmarks" / "results")


def strict(file):
    return json.loads(
        file.read_text("utf8"), parse_constant=lambda name: pytest.fail(f"{file.name}: {name} is no JSON")
    )


def test_the_tables_of_the_documents_are_those_of_the_results():
    shown = [name for page in PAGES.values() for name in re.findall(r"<!-- results: (\w+) -->", page)]
    assert sorted(shown) == sorted(tables.TABLES)
    for page in PAGES.values():
        assert tables.filled(page, RESULTS) == page, "run `python -m benchmarks --pictures`"


def test_the_page_of_benchmarks_counts_autos_wins_and_losses_rightly():
    gains = [found["auto"]["against matched uniform"] for found in RESULTS["learning"]["results"]["tasks"].values()]
    above, below = (sum(sign * gain > half for gain, half in gains) for sign in (1, -1))
    words = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    text = " ".join(PAGES["docs/benchmarks.md"].split())
    wins, losses = (str(count) if count > 10 else words[count] for count in (above, below))
    assert f"above uniform beyond the interval on {wins} tasks and below on {losses}" in text


def test_results_say_how_they_came_about_and_name_no_machine():
    for name, found in RESULTS.items():
        text = json.dumps(strict(ROOT / "benchmarks" / "results" / f"{name}.json"))
        assert set(found) >= {"benchmark", "command", "date", "seconds", "machine", "versions", "results"}, name
        assert set(found["machine"] or ()) <= {"cpu", "cores", "system"}, name
        assert {"python", "numpy", "learnit_r8"} <= set(found["versions"]), name
        assert not re.search(r"/(work|home|root|tmp|usr)\b", text), name


def test_pictures_are_drawn_from_results_and_small(tmp_path):
    pictures = pytest.importorskip("benchmarks.pictures")
    pytest.importorskip("matplotlib")
    drawn = {file.name: file.stat().st_size for file in pictures.draw(ROOT / "benchmarks" / "results", tmp_path)}
    sources = {name: source for name, (_, source, _) in pictures.PICTURES.items()}
    assert set(drawn) == {name for name, source in sources.items() if source in RESULTS}
    assert all(1000 < size < 150_000 for size in drawn.values()), drawn
    for name in re.findall(r"\((?:\.\./)?(assets/[^)]+)\)", "".join(PAGES.values())):
        assert (ROOT / name).is_file(), name
        assert (ROOT / name).stat().st_size < 150_000, name


def test_one_benchmark_that_fails_does_not_lose_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "NAMES", ("no_such_benchmark", "datamap"))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--quick", "--out", str(tmp_path)])
    assert command.main() == 1
    said = capsys.readouterr().out
    assert re.search(r"no_such_benchmark\s+FAILED with status 1, \d+ s, no new results", said)
    assert re.search(r"datamap\s+done, \d+ s\n", said)
    found = strict(tmp_path / "datamap.json")
    assert found["command"] == "python -m benchmarks.datamap --quick"
    flagged = found["results"]["named"]["flagged"]
    assert flagged["wrong"] > 0.8 * flagged["samples"]  # chance is .2
    assert (tmp_path / "data-map.png").is_file()


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_the_list_names_every_benchmark_and_an_unknown_one_is_refused():
    listed = run("--list")
    assert listed.returncode == 0, listed.stderr
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(command.NAMES)
    assert all(len(line.split()) > 3 for line in listed.stdout.splitlines())
    refused = run("sped")
    assert refused.returncode == 2
    assert "no benchmark is called sped; there are speed," in refused.stderr


def test_figures_become_strict_json_and_columns_line_up(tmp_path):
    values = {"array": np.arange(3), "float": np.float32(0.1), "nan": np.nan, 5: (1, True), "none": None}
    harness.write(tmp_path / "a" / "b.json", values)
    written = strict(tmp_path / "a" / "b.json")
    assert written == {"array": [0, 1, 2], "float": 0.1, "nan": None, "5": [1, True], "none": None}
    assert harness.columns(("", "us"), [("one", 5), ("fifteen", 15)]) == "         us\none       5\nfifteen  15"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_benchmarks_run_quickly(tmp_path):
    done = run("--quick", "--out", str(tmp_path))
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {file.stem for file in tmp_path.glob("*.json")} == set(command.NAMES)
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".png"}
