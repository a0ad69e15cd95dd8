"""What ARCHITECTURE.md draws is what the code does."""

from pathlib import Path

from learnit_r8.stability.recovery import TABLE, Phase

TEXT = (Path(__file__).parent.parent / "ARCHITECTURE.md").read_text(encoding="utf-8")


def state_diagram():
    """Return the table as a Mermaid state diagram; what stays in its phase is left out."""
    arrows = {}
    for (phase, signal), move in TABLE.items():
        if phase is not move.phase:
            arrows.setdefault((phase, move.phase), []).append(str(signal))
    lines = ["stateDiagram-v2", f"    [*] --> {Phase.HEALTHY.name}"]
    for (start, end), signals in sorted(arrows.items(), key=lambda item: [list(Phase).index(p) for p in item[0]]):
        lines.append(f"    {start.name} --> {end.name}: {', '.join(signals)}")
    return "\n".join([*lines, f"    {Phase.FAILED.name} --> [*]"])


def test_the_recovery_diagram_is_the_one_that_the_table_draws():
    assert f"```mermaid\n{state_diagram()}\n```" in TEXT
