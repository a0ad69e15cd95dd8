"""What ARCHITECTURE.md draws is what the code does."""

from pathlib import Path

from learnit_r8.stability.recovery import state_diagram

TEXT = (Path(__file__).parent.parent / "ARCHITECTURE.md").read_text(encoding="utf-8")


def test_the_recovery_diagram_is_the_one_that_the_table_draws():
    assert f"```mermaid\n{state_diagram()}\n```" in TEXT
