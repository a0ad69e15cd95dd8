"""The documents keep their word: their Python runs, their links lead somewhere, their commands exist."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import itertools
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from learnit_r8 import R8Scheduler, events
from learnit_r8.cli import _parser
from learnit_r8.schedules import schedule_names

ROOT = Path(__file__).resolve().parents[1]
GUIDES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *GUIDES]
FENCE = re.compile(r"^(`{3,})(\w*)\n(.*?)^\1$", re.DOTALL | re.MULTILINE)


def read(path):
    return path.read_text(encoding="utf-8")


def blocks(text, language):
    return [body for _, name, body in FENCE.findall(text) if name == language]


def prose(text):
    """Return a document without its code blocks."""
    return FENCE.sub("", text)


def names(paths):
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


# Python ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", names([ROOT / "README.md", *(path for path in GUIDES if path.name != "README.md")]))
def test_the_python_of_a_document_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    code = blocks(read(path), "python")
    assert code or path.name == "what-works-where.md"  # which has tests in place of a program
    namespace = {}
    for block in code:
        exec(compile(block, path.name, "exec"), namespace)


def alone(text):
    """Return the Python of a document with every line where it stands there, so that complaints name its lines."""
    lines = [""] * (text.count("\n") + 1)
    for match in FENCE.finditer(text):
        if match[2] == "python":
            first = text.count("\n", 0, match.start(3))
            body = match[3].splitlines()
            lines[first : first + len(body)] = body
    return "\n".join(lines)


@pytest.mark.slow
def test_the_python_of_all_documents_type_checks_strictly_against_the_installed_package(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("mypy")
    untyped = "[mypy-sklearn.*,transformers.*,lightning.*,optax.*,keras.*]\nignore_missing_imports = True\n"
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nstrict = True\n{untyped}follow_imports = skip\n")
    pages = [path for path in (ROOT / "README.md", *GUIDES) if "```python" in read(path)]
    modules = {re.sub(r"\W", "_", str(path.relative_to(ROOT))): path for path in pages}
    for name, path in modules.items():
        (tmp_path / f"{name}.py").write_text(alone(read(path)), encoding="utf-8")
    assert {"README_md", "docs_catch_a_spike_md"} <= set(modules)
    files = [f"{name}.py" for name in modules]
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), *files]
    done = subprocess.run(command, cwd=tmp_path, env=without_paths(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def without_paths():
    return {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "MYPYPATH"}}


# Links -----------------------------------------------------------------------------------------


def anchors(text):
    """Return the anchors of a document's headings, spelled as GitHub spells them."""
    found = []
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(text), re.MULTILINE):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        again = sum(anchor == other or re.fullmatch(rf"{re.escape(anchor)}-\d+", other) is not None for other in found)
        found.append(f"{anchor}-{again}" if again else anchor)
    return found


def targets(text):
    """Return all link targets of a document: Markdown's inline and reference links, pictures, HTML."""
    bare = re.sub(r"`[^`\n]*`", "", prose(text))
    inline = re.findall(r"\]\(\s*<?([^)\s>]+)", bare)
    references = re.findall(r"^ {0,3}\[[^]]+\]:\s*<?(\S+?)>?\s*$", bare, re.MULTILINE)
    return inline + references + re.findall(r"""(?:src|srcset|href)=["']([^"']+)["']""", bare)


def broken_links(path):
    """Yield what is wrong with each link of a document that leads nowhere; addresses on the network are not opened."""
    for target in targets(read(path)):
        if re.match(r"\w+:", target):
            if not target.startswith(("https://", "mailto:")):
                yield f"{target}: neither https nor a path"
            continue
        place, _, anchor = target.partition("#")
        file = (path.parent / place) if place else path
        if not file.exists():
            yield f"{target}: no such file"
        elif not file.resolve().is_relative_to(ROOT):
            yield f"{target}: outside of the repository"
        elif anchor and anchor not in anchors(read(file)):
            yield f"{target}: no such heading, there are {anchors(read(file))}"


@pytest.mark.parametrize("path", names(DOCUMENTS))
def test_every_link_of_a_document_leads_somewhere(path):
    assert list(broken_links(path)) == []


def test_links_to_nowhere_are_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# `r8` & co: one\n\n## Twice\n## Twice\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Top\n[a](other.md#r8--co-one) [b](#top) [c](other.md#twice-1) [d](https://example.org) `[e](x)`\n"
        "```python\n[f](x)\n```\n"
    )
    assert list(broken_links(page)) == []
    page.write_text(
        "# Top\n[a](othr.md) [b](#tip) [c](other.md#twice-2) ![d](no.png) [e](http://example.org)\n"
        '[f]: nowhere.md\n<img src="none.svg"> [g](../outside.md)\n'
    )
    (tmp_path.parent / "outside.md").touch()
    assert len(list(broken_links(page))) == 8


def test_the_guides_are_found_from_the_readme():
    index = set(targets(read(ROOT / "docs" / "README.md")))
    assert index >= {path.name for path in GUIDES if path.name != "README.md"}
    assert {f"docs/{path.name}" for path in GUIDES} <= set(targets(read(ROOT / "README.md")))


@pytest.mark.parametrize("path", names([*GUIDES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]))
def test_every_file_that_is_named_exists(path):
    named = re.findall(r"`([\w.]+(?:/[\w.-]+)+\.(?:py|md|toml))`", prose(read(path)))
    assert [name for name in named if not (ROOT / name).is_file() and not (ROOT / "learnit_r8" / name).is_file()] == []


def test_each_cell_of_what_works_where_is_a_test_or_a_plain_no():
    page = read(ROOT / "docs" / "what-works-where.md")
    tests = dict(re.findall(r"^(\d+)\. `(tests/\w+\.py::\w+)`$", page, flags=re.MULTILINE))
    for test in tests.values():
        path, name = test.split("::")
        assert f"\ndef {name}(" in read(ROOT / path), test
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|")][2:]
    cells = [cell.strip() for row in rows for cell in row[1:]]
    assert all(len(row) == 7 for row in rows)
    assert set(cells) == {*tests, "no"} - {number for number in tests if number not in cells}
    assert set(tests) <= set(cells)


@pytest.mark.slow
def test_the_guides_build_as_a_site(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for path in GUIDES:
        page = tmp_path / ("" if path.stem == "README" else path.stem) / "index.html"
        assert "</h1>" in page.read_text(encoding="utf-8")


# Commands --------------------------------------------------------------------------------------


def commands(text):
    """Yield the commands of a document's shell blocks, as words."""
    for line in "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        for joint, words in itertools.groupby(lexer, key=lambda word: word in {"&&", "||", ";", "|"}):
            if not joint:
                yield list(itertools.dropwhile(lambda word: re.fullmatch(r"[A-Z]\w+=.*", word), words))


def complaint(words):
    """Return what is wrong with a command, or None."""
    match words:
        case ["python", "-m", "pip", "install", "-e", extra]:
            known = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
            return None if re.fullmatch(rf"\.\[({'|'.join(known)})\]", extra) else f"extras are {sorted(known)}"
        case ["python", "-m", module, *_]:
            return None if importlib.util.find_spec(module) else "no such module"
        case ["python", script, *options] if script.endswith(".py"):
            return complaint_of_script(script, options)
        case ["torchrun", *options]:
            at = next(at for at, word in enumerate(options) if word.endswith(".py"))
            return complaint_of_script(options[at], options[at + 1 :])
        case ["mkdocs", "serve" | "build", *_]:
            return None if importlib.util.find_spec("mkdocs") else "not installed"
        case ["r8", *arguments]:
            try:
                _parser().parse_args(arguments)
            except SystemExit as error:
                return f"exit {error.code}"
            return None
        case ["make", target]:
            return None if re.search(rf"^{target}:", read(ROOT / "Makefile"), re.MULTILINE) else "no such target"
        case [script] if (ROOT / script).is_file():
            return None if os.access(ROOT / script, os.X_OK) else "not executable"
    return "not known here"


def complaint_of_script(script, options):
    if not (ROOT / script).is_file():
        return "no such file"
    unknown = [word for word in options if word.startswith("--") and f'"{word}"' not in read(ROOT / script)]
    return f"no options {unknown}" if unknown else None


@pytest.mark.parametrize("path", names(DOCUMENTS))
def test_every_command_of_a_document_exists(path):
    shown = list(commands(read(path)))
    assert [(words, problem) for words in shown if (problem := complaint(words))] == []


@pytest.mark.parametrize(
    "line",
    [
        "python nowhere.py", "python example.py --nothing", "python -m nowhere", "r8 wach x", "r8 suspects x --topp 3",
        "make nothing", "python -m pip install -e .[nothing]", "rm -rf x", "torchrun examples/nothing.py",
    ],
)  # fmt: skip
def test_a_command_that_does_not_exist_is_found(line):
    assert complaint(*commands(f"```bash\n{line}\n```\n"))


def test_commands_in_the_text_exist():
    (known,) = (action.choices for action in _parser()._actions if action.dest == "command")
    for path in DOCUMENTS:
        for code in re.findall(r"`([^`]+)`", prose(read(path))):
            words = code.split()
            if words[:1] == ["r8"] and len(words) > 1:
                assert words[1] in known, f"{path.name}: {code}"
            if words[:2] == ["python", "-m"]:
                assert complaint(words) is None, f"{path.name}: {code}"


# Lists -----------------------------------------------------------------------------------------


def test_readme_lists_every_argument_and_every_schedule():
    text = read(ROOT / "README.md")
    arguments = set(inspect.signature(R8Scheduler).parameters) - {"clock"}
    missing = {
        name for name in arguments | set(schedule_names()) if not re.search(rf"`[^`\n]*\b{name}\b[^`\n]*`", text)
    }
    assert not missing


def test_the_guide_to_sinks_lists_every_event():
    listed = set(
        re.findall(r"`([A-Z][a-z]\w+[a-z])`", read(ROOT / "docs" / "write-a-sink.md").split("## The events")[1])
    )
    assert listed >= set(events.EVENT_TYPES)
    assert all(hasattr(events, name) for name in listed)


# Three changed lines ---------------------------------------------------------------------------


ROWS = re.findall(r"^\| ([^|]+) \| ([^|]+) \| `(examples/\w+\.py)` \|$", read(ROOT / "README.md"), re.MULTILINE)


def calls(code: str) -> list[tuple[str, set[str], int]]:
    """Return name, keywords and number of other arguments of all calls, and the bases of classes."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).split(".")[-1]
            found.append((name, {str(keyword.arg) for keyword in node.keywords}, len(node.args)))
        elif isinstance(node, ast.ClassDef):
            found += [(ast.unparse(base).split(".")[-1], set(), 0) for base in node.bases]
    return found


@pytest.mark.parametrize(("framework", "changes", "example"), ROWS)
def test_the_lines_that_change_are_those_of_the_example(framework, changes, example):
    """The examples themselves run in the tests of the integrations."""
    shown = [call for span in re.findall(r"`([^`]+)`", changes.split(" in place of ")[0]) for call in calls(span)]
    there = calls(read(ROOT / example))
    assert shown
    for name, keywords, count in shown:
        assert any((name, count) == (other, others) and keywords <= given for other, given, others in there), (
            f"{name} with {sorted(keywords)} and {count} more is not in {example}"
        )


def test_every_integration_has_its_row():
    assert len(ROWS) == 8
    frameworks = {path.stem for path in (ROOT / "learnit_r8" / "integrations").glob("[a-z]*")}
    frameworks -= {"sharded", "importance"}  # no frameworks
    imported = "".join(read(ROOT / example) for _, _, example in ROWS)
    assert all(f"learnit_r8.integrations.{name} import" in imported for name in frameworks)
