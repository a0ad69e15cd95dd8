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
import warnings
from pathlib import Path

import pytest

from learnit_r8 import R8Scheduler, events, strategies
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


PROGRAMS = [path for path in (ROOT / "README.md", *GUIDES) if blocks(read(path), "python")]
HOW_TO = {  # each of these has a program
    "catch-a-spike", "find-bad-labels", "fine-tune-a-language-model", "learning-rate", "mixed-precision", "move-over",
    "replay", "resume-after-a-crash", "several-gpus", "strategies", "tutorial", "watch", "windows", "write-a-sink",
    "write-a-strategy",
}  # fmt: skip


def test_every_guide_has_a_program():
    assert {path.stem for path in PROGRAMS} >= HOW_TO


@pytest.mark.parametrize("path", names(PROGRAMS))
def test_the_python_of_a_document_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    code = blocks(read(path), "python")
    imported = set(re.findall(r"^(?:from|import) (\w+)", "\n".join(code), re.MULTILINE))
    for needed in imported & {"lightning", "sklearn", "torch", "transformers"}:
        pytest.importorskip(needed)
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    with warnings.catch_warnings():
        if "lightning" in imported:
            warnings.simplefilter("ignore")  # what its dependencies hold against each other
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
@pytest.mark.timeout(900)
def test_the_python_of_all_documents_type_checks_strictly_against_the_installed_package(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("mypy")
    untyped = "[mypy-sklearn.*,transformers.*]\nignore_missing_imports = True\n"
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nstrict = True\n{untyped}follow_imports = skip\n")
    modules = {re.sub(r"\W", "_", str(path.relative_to(ROOT))): path for path in PROGRAMS}
    for name, path in modules.items():
        (tmp_path / f"{name}.py").write_text(alone(read(path)), encoding="utf-8")
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
    assert index >= {path.relative_to(ROOT / "docs").as_posix() for path in GUIDES if path.name != "README.md"}
    assert "docs/README.md#how-to" in targets(read(ROOT / "README.md"))
    assert "docs/tutorial.md" in targets(read(ROOT / "README.md"))


@pytest.mark.parametrize("path", names([*GUIDES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]))
def test_every_file_that_is_named_exists(path):
    named = re.findall(r"`([\w.]+(?:/[\w.-]+)+\.(?:py|md|toml))`", prose(read(path)))
    assert [name for name in named if not (ROOT / name).is_file() and not (ROOT / "learnit_r8" / name).is_file()] == []


def test_each_cell_of_what_works_where_is_a_test_or_a_plain_no():
    page = read(ROOT / "docs" / "what-works-where.md")
    tests = dict(re.findall(r"^(\d+)\. `(tests/[\w/]+\.py::\w+)`$", page, flags=re.MULTILINE))
    for test in tests.values():
        path, name = test.split("::")
        assert f"\ndef {name}(" in read(ROOT / path), test
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|")][2:]
    cells = [cell.strip() for row in rows for cell in row[1:]]
    assert all(len(row) == 7 for row in rows)
    assert set(cells) == {*tests, "no"} - {number for number in tests if number not in cells}
    assert set(tests) <= set(cells)


# The site --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site, strictly; return each page's HTML by its path."""
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {page.relative_to(folder).as_posix(): read(page) for page in folder.rglob("*.html")}


def test_every_document_is_a_page_of_the_site(site):
    for path in GUIDES:
        page = "index.html" if path.stem == "README" else f"{path.relative_to(ROOT / 'docs').with_suffix('.html')}"
        assert "</h1>" in site[page.replace("\\", "/")]


def test_the_site_asks_the_network_for_nothing(site):
    loads = re.compile(
        r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?https?:|<link[^>]*\shref=["']?https?:|mermaid"""
    )
    assert {name: found for name, page in site.items() if (found := loads.findall(page))} == {}


def imports(code):
    """Yield what a program takes from the package, as (module, name)."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "learnit_r8":
            yield from ((node.module, alias.name) for alias in node.names)


def test_every_public_name_is_on_the_site(site):
    shown = {anchor for page in site.values() for anchor in re.findall(r'\bid="(learnit_r8[\w.]*)"', page)}
    modules = {name for path in GUIDES for name in re.findall(r"^::: ([a-z_0-9.]+)$", read(path), re.MULTILINE)}
    integrations = (ROOT / "learnit_r8" / "integrations").glob("[a-z]*")
    modules |= {"learnit_r8", *(f"learnit_r8.integrations.{path.stem}" for path in integrations)}
    modules |= {f"learnit_r8.{path.stem}" for path in (ROOT / "learnit_r8").glob("[a-z]*.py")}
    wanted = {"learnit_r8.__version__"}
    for module in modules:
        for node in ast.parse(read(source(module))).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                wanted |= {f"{module}.{name}" for name in ast.literal_eval(node.value)}
    examples = [read(path) for path in (*ROOT.glob("examples/*.py"), ROOT / "example.py")]
    documents = ["\n".join(blocks(read(path), "python")) for path in PROGRAMS]
    for code in (*examples, *documents):
        wanted |= {f"{module}.{name}" for module, name in imports(code)}
    assert len(wanted) > 100
    assert sorted(wanted - shown) == []


def source(module):
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


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
            given = set(extra.removeprefix(".[").removesuffix("]").split(","))
            return None if given <= set(known) and extra.startswith(".[") else f"extras are {sorted(known)}"
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


def not_in_code(names, path):
    return {name for name in names if not re.search(rf"`[^`\n]*\b{name}\b[^`\n]*`", read(path))}


def test_the_reference_lists_arguments_that_there_are_and_the_guide_every_schedule_and_strategy():
    page = read(ROOT / "docs" / "api" / "scheduler.md")
    table = re.findall(r"^\| (`.*?) \|", page[: page.index("## The class")], re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(table))) <= set(inspect.signature(R8Scheduler).parameters)
    assert len(table) > 15
    assert "::: learnit_r8.R8Scheduler" in page  # its docstring describes all of them
    assert not_in_code(schedule_names(), ROOT / "docs" / "learning-rate.md") == set()
    assert not_in_code(strategies.names(), ROOT / "docs" / "strategies.md") == set()


def test_the_reference_lists_every_command_and_option():
    (known,) = (action.choices for action in _parser()._actions if action.dest == "command")
    page = read(ROOT / "docs" / "api" / "command-line.md")
    for name, command in known.items():
        assert f"`r8 {name}" in page
        options = {option for action in command._actions for option in action.option_strings} - {"-h", "--help"}
        assert [option for option in options if f"`{option}" not in page] == [], name


def test_the_front_page_is_short_and_has_both_commands():
    text = read(ROOT / "README.md")
    assert len(text.splitlines()) <= 180
    assert 'python -m pip install -e ".[example]" && python example.py' in text
    assert 'python -m pip install -e ".[test]" && python -m pytest' in text


def literals(path):
    """Yield the texts of a module, with a gap where an f-string has a value."""
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_message_of_the_troubleshooting_page_is_one_that_the_package_has():
    said = "\n".join(text for path in (ROOT / "learnit_r8").rglob("*.py") for text in literals(path))
    rows = re.findall(r"^\| (`.+?`(?:, `.+?`)*) \|", read(ROOT / "docs" / "troubleshooting.md"), re.MULTILINE)
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    assert len(messages) > 30
    assert [message for message in messages if message not in said] == []


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
    # No frameworks; of verl only the prompts are chosen.
    frameworks -= {"sharded", "importance", "lightning_gate", "verl"}
    imported = "".join(read(ROOT / example) for _, _, example in ROWS)
    assert all(f"learnit_r8.integrations.{name} import" in imported for name in frameworks)
