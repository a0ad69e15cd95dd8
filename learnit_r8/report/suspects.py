"""The samples whose loss stays high, as a table."""

from __future__ import annotations

import csv
import io
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from learnit_r8.errors import ConfigError
from learnit_r8.run import formats as f
from learnit_r8.run.samples_file import CATALOG_FILE, CatalogSnapshot, read_catalog


class Suspect(NamedTuple):
    """One row, worst first. `group` is None where the run was given no classes, `flagged` where the guard was off."""

    rank: int
    id: int | str  # the key where the run was given keys
    group: int | None
    mean_loss: float
    expected_loss: float
    variability: float
    correctness: float
    uses: int
    flagged: bool | None


_HEADINGS = {"mean_loss": "mean loss", "expected_loss": "loss now", "correctness": "below ln 2", "uses": "trained on"}


def logged_catalog(folder: Path) -> CatalogSnapshot:
    """Return what a run has logged of its samples.

    Raises:
        ConfigError: The run has logged no catalog.
    """
    try:
        catalog = read_catalog(folder)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    if catalog is None:
        raise ConfigError([f"{folder} holds no {CATALOG_FILE}: a run writes it at the end of its first epoch"])
    return catalog


def verdict(catalog: CatalogSnapshot) -> str:
    """Return what the noise guard makes of them, as a sentence: in data without a wrong label some are highest, too."""
    text = "The noise guard was off."
    if catalog.flagged is not None and not catalog.num_flagged:
        text = "The noise guard flags none: so far it sees no reason to take them for wrong rather than hard."
    elif catalog.flagged is not None:
        text = f"The noise guard flags {catalog.num_flagged} of {catalog.num_samples} samples as wrong."
    weak = " One loss a batch was reported: all these figures are estimates, and weak." if catalog.attributed else ""
    return text + weak


def rows(catalog: CatalogSnapshot, top: int) -> list[Suspect]:
    """Return the worst samples of a logged catalog, `top` at most."""
    worst = catalog.suspects[:top]
    at = np.searchsorted(catalog.ids, worst)
    known = np.where(catalog.uses[at] > 0, 1.0, np.nan)  # of some no loss was finite
    figures = (catalog.mean_loss, catalog.expected_loss, catalog.variability, catalog.correctness)
    arrays = (
        None if catalog.groups is None else catalog.groups[at],
        *(known * figure[at] for figure in figures),
        catalog.uses[at],
        None if catalog.flagged is None else catalog.flagged[at],
    )
    columns = [itertools.repeat(None) if array is None else array.tolist() for array in arrays]
    return [Suspect(*row) for row in zip(itertools.count(1), catalog.names[:top], *columns, strict=False)]


def as_csv(found: list[Suspect]) -> str:
    """Return the rows as CSV with a heading; a missing value is an empty field, flagged is 1 or 0."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([Suspect._fields, *(map(_exact, row) for row in found)])
    return text.getvalue().rstrip("\n")


def _exact(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.9g}" if isinstance(value, float) else str(int(value))


def as_text(found: list[Suspect]) -> str:
    """Return the rows as an aligned table, without the columns of groups and flags where there are none."""
    empty = {"group"} if all(row.group is None for row in found) else set()
    empty |= set() if any(row.flagged for row in found) else {"flagged"}
    shown = [name for name in Suspect._fields if name not in empty]
    cells = [[_HEADINGS.get(name, name) for name in shown]]
    cells += [[_brief(getattr(row, name), name) for name in shown] for row in found]
    widths = [max(len(line[i]) for line in cells) for i in range(len(shown))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _brief(value: Any, name: str) -> str:
    if name == "correctness" and value == value:
        return f"{value:.0%}"
    if name == "flagged":
        return "yes" if value else ""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else f.sample(value, 40)
