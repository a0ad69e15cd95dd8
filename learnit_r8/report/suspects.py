"""The samples whose loss stays high, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from learnit_r8.errors import ConfigError
from learnit_r8.sinks.catalog_log import CATALOG_FILE, CatalogSnapshot, read_catalog


class Suspect(NamedTuple):
    """One row, worst first. `group` is None where the run was given no classes."""

    rank: int
    id: int
    group: int | None
    mean_loss: float
    expected_loss: float
    variability: float
    correctness: float
    uses: int


_HEADINGS = {"mean_loss": "mean loss", "expected_loss": "loss now", "correctness": "below ln 2", "uses": "trained on"}


def suspects(folder: Path, top: int) -> list[Suspect]:
    """Return the worst samples of a run.

    Args:
        folder: The run's `log_dir`.
        top: How many at most.

    Raises:
        ConfigError: The run has logged no catalog.
    """
    try:
        catalog = read_catalog(folder)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    if catalog is None:
        raise ConfigError([f"{folder} holds no {CATALOG_FILE}: a run writes it at the end of its first epoch"])
    return rows(catalog, top)


def rows(catalog: CatalogSnapshot, top: int) -> list[Suspect]:
    """Return the worst samples of a logged catalog, `top` at most."""
    found = []
    for rank, sample in enumerate(catalog.suspects[:top].tolist(), start=1):
        at = int(np.searchsorted(catalog.ids, sample))
        found.append(
            Suspect(
                rank,
                sample,
                None if catalog.groups is None else int(catalog.groups[at]),
                float(catalog.mean_loss[at]),
                float(catalog.expected_loss[at]),
                float(catalog.variability[at]),
                float(catalog.correctness[at]),
                int(catalog.uses[at]),
            )
        )
    return found


def as_csv(found: list[Suspect]) -> str:
    """Return the rows as CSV with a heading; a missing group is an empty field."""
    lines = [",".join(Suspect._fields)]
    lines += [",".join(_exact(value) for value in row) for row in found]
    return "\n".join(lines)


def _exact(value: float | None) -> str:
    return "" if value is None else f"{value:.9g}" if isinstance(value, float) else str(value)


def as_text(found: list[Suspect]) -> str:
    """Return the rows as an aligned table; the group's column is left out where there are none."""
    shown = [name for name in Suspect._fields if name != "group" or any(row.group is not None for row in found)]
    cells = [[_HEADINGS.get(name, name) for name in shown]]
    cells += [[_brief(row._asdict(), name) for name in shown] for row in found]
    widths = [max(len(line[i]) for line in cells) for i in range(len(shown))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _brief(row: Mapping[str, float | None], name: str) -> str:
    value = row[name]
    if name == "correctness":
        return f"{value:.0%}"
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
