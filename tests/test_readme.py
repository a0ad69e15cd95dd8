"""The README's Python runs, in order, as a reader would type it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_readme_python_runs_from_top_to_bottom(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    assert len(BLOCKS) >= 2
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), namespace)
    assert (tmp_path / "checkpoints").is_dir()


def test_readme_lists_every_argument_and_every_schedule():
    import inspect

    from learnit_r8 import R8Scheduler
    from learnit_r8.schedules import schedule_names

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    arguments = set(inspect.signature(R8Scheduler).parameters) - {"clock"}
    missing = {
        name for name in arguments | set(schedule_names()) if not re.search(rf"`[^`\n]*\b{name}\b[^`\n]*`", text)
    }
    assert not missing
