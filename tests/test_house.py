"""The house keeps its own rules: layers, sorted names, a true file table, an import that loads little."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import learnit_r8
import learnit_r8.watch

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "learnit_r8"


def test_imports_point_down():
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([tool, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def packages():
    """Yield every package whose import needs no framework."""
    yield learnit_r8
    for found in pkgutil.walk_packages([str(PACKAGE)], "learnit_r8."):
        if found.ispkg and not found.name.startswith("learnit_r8.integrations"):
            yield importlib.import_module(found.name)


@pytest.mark.parametrize("package", list(packages()), ids=lambda package: package.__name__)
def test_public_names_are_sorted_and_exist(package):
    names = getattr(package, "__all__", [])
    assert list(names) == sorted(names)
    assert len(set(names)) == len(names)
    assert [name for name in names if not hasattr(package, name)] == []


def test_every_public_name_of_the_package_is_listed_by_dir_and_unknown_ones_are_errors():
    assert set(learnit_r8.__all__) <= set(dir(learnit_r8))
    with pytest.raises(AttributeError, match="has no attribute 'R9Scheduler'"):
        learnit_r8.R9Scheduler  # noqa: B018 - the access is the test


def test_the_table_of_rooms_names_every_folder_once_and_no_other():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(learnit_r8[\w/]*)` \| \S.*\|$", text, re.MULTILINE)
    assert sorted(set(table)) == sorted(table), "a room is listed twice"
    disk = {str(path.parent.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")}
    assert set(table) == disk, f"not in the table: {sorted(disk - set(table))}; gone: {sorted(set(table) - disk)}"


def test_every_file_says_in_its_first_line_what_it_is():
    for path in PACKAGE.rglob("*.py"):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert 10 < len(text.splitlines()[0]) <= 120, path


def test_no_room_is_crowded():
    for room in {path.parent for path in PACKAGE.rglob("*.py")}:
        assert len(list(room.glob("*.py"))) <= 21, f"{room.name}: more than 20 files beside __init__.py"


def published():
    """Return the names of what the site shows: modules and classes that a page names, and what those modules list."""
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    named = set(re.findall(r"^::: ([\w.]+)", pages, re.MULTILINE))
    names = {name.rpartition(".")[2] for name in named}
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        listed = re.search(r"^__all__ = \[.*?\]", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        if module in named and listed:
            names.update(re.findall(r'"(\w+)"', listed[0]))
    return names


def undescribed_arguments():
    """Yield the arguments of public classes that their docstring does not describe: D107 is off because it does."""
    public = published()
    for path in sorted(PACKAGE.rglob("[!_]*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
                continue
            if public.isdisjoint({node.name, path.stem}):
                continue
            text = ast.get_docstring(node) or ""
            described = re.findall(r"^ +((?:\*{0,2}\w+(?:, )?)+):", text, re.MULTILINE)
            known = {name.strip("*") for names in described for name in names.split(", ")}
            for made in node.body:
                if isinstance(made, ast.FunctionDef) and made.name == "__init__":
                    arguments = made.args.posonlyargs + made.args.args[1:] + made.args.kwonlyargs
                    yield from (f"{path.name}: {node.name}({a.arg})" for a in arguments if a.arg not in known)


def test_every_argument_of_a_public_class_is_described():
    assert list(undescribed_arguments()) == []


HEAVY = (
    "torch",
    "rich",
    "curses",
    "sklearn",
    "scipy",
    "numba",
    "pandas",
    "jax",
    "tensorflow",
    "transformers",
    "IPython",
)

USES = {
    "the import": "import learnit_r8",
    "the scheduler's name": "from learnit_r8 import R8Scheduler",
    "every public name": "import learnit_r8; [getattr(learnit_r8, name) for name in learnit_r8.__all__]",
    "a whole run without a dashboard": (
        "from learnit_r8 import R8Scheduler\n"
        "s = R8Scheduler(20, 8, num_epochs=3, use_curses=False, checkpoint_dir=None)\n"
        "for _ in s.epoch_iterator():\n"
        "    for batch in s.batch_iterator():\n"
        "        s.update_with_loss(1.0 if batch.epoch else [1.0] * len(batch.indices))\n"
        "assert s.global_step == 9\n"
    ),
    "a rollback": (
        "import numpy as np\n"
        "from learnit_r8 import R8Scheduler\n"
        "s = R8Scheduler(20, 8, num_epochs=2, use_curses=False, checkpoint_dir=None, load_callback=lambda _: None,\n"
        "                state_callback=lambda: {'w': np.zeros(3)})\n"
        "for _ in s.epoch_iterator():\n"
        "    for batch in s.batch_iterator():\n"
        "        s.update_with_loss(float('nan') if batch.step == 2 else 1.0)\n"
    ),
}


@pytest.mark.parametrize("use", USES)
def test_no_framework_and_no_terminal_library_is_loaded_by(use):
    code = USES[use] + f"\nimport sys\nprint(*sorted(set({HEAVY!r}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_importing_the_package_starts_no_thread_and_prints_nothing():
    code = "import threading, learnit_r8, learnit_r8.scheduler; assert threading.active_count() == 1"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
