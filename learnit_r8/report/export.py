"""What a run knows of all its samples, out of a checkpoint, as a table that other programs read."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.checkpoint import resolve
from learnit_r8.errors import ConfigError
from learnit_r8.noise.guard import NoiseGuard
from learnit_r8.samples.catalog import LossCatalog
from learnit_r8.structures.key_table import KeyTable

Table = dict[str, NDArray[Any]]


def sample_table(checkpoint: str | Path) -> Table:
    """Return a column each of what the newest checkpoint in a folder, or that one, knows of every sample, `[N]`.

    `id` is the key where the run was given keys.

    Losses are NaN, and the correctness, where a sample was never seen. `group` is there where the run was given
    classes, `flagged` where the noise guard was on.

    Raises:
        FileNotFoundError: There is no checkpoint.
        CheckpointError: It cannot be read.
    """
    state = resolve(checkpoint).state
    size = int(state["config"]["num_samples"])
    catalog = LossCatalog(size)
    catalog.load_state_dict(state["catalog"])
    unseen, left_out = catalog.uses == 0, np.zeros(size, np.bool_)
    left_out[catalog.left_out] = True
    table: Table = {"id": _names(state.get("keys"), size)}
    if state.get("groups") is not None:
        table["group"] = np.asarray(state["groups"])
    for name in ("mean_loss", "expected_loss", "variability", "correctness"):
        table[name] = np.where(unseen, np.float32(np.nan), getattr(catalog, name))
    table |= {"uses": catalog.uses, "last_seen": catalog.last_seen, "left_out": left_out}
    if (mode := state["config"].get("noise_guard", "off")) != "off":
        guard = NoiseGuard(mode, size)
        guard.load_state_dict(state["guard"])
        table["flagged"] = guard.flagged
    return table


def _names(keys: Any, size: int) -> NDArray[Any]:
    """Return the samples' keys where the run was given keys, as texts unless all are whole numbers; else their ids."""
    if keys is None:
        return np.arange(size)
    names = KeyTable.from_state(keys).names(np.arange(size))
    return np.array(names if all(type(name) is int for name in names) else list(map(str, names)), object)


def for_cleanlab(table: Table) -> Table:
    """Return the columns of cleanlab's label issues: `is_label_issue` and `label_quality`, from 0 to 1.

    The quality of a label is exp(-mean loss): for a cross-entropy the (geometric) mean probability of the given label
    over the run, cleanlab's "self-confidence". What was never seen has none.

    Raises:
        ConfigError: The noise guard was off, so nobody has judged the labels.
    """
    if "flagged" not in table:
        raise ConfigError(["cleanlab's format says which labels are wrong: train with noise_guard='report' or 'cap'"])
    quality = np.minimum(np.exp(-table["mean_loss"].astype(np.float64)), 1.0)
    return {"id": table["id"], "is_label_issue": table["flagged"], "label_quality": quality.astype(np.float32)}


def write_table(table: Table, output: Path, kind: str) -> None:
    """Write a table; `kind` is "csv", "parquet" or "cleanlab", whose label issues are a CSV file.

    Raises:
        ConfigError: pyarrow, which parquet needs, is missing.
    """
    if kind == "cleanlab":
        table = for_cleanlab(table)
    if kind == "parquet":
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise ConfigError(["parquet needs pyarrow: pip install pyarrow"]) from error
        parquet.write_table(pyarrow.table(table), output)
        return
    columns = [_text(column) for column in table.values()]
    with output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table)
        writer.writerows(zip(*columns, strict=True))


def _text(column: NDArray[Any]) -> list[Any]:
    """Return the cells: float32 as the shortest text that reads the same, nothing for NaN."""
    if column.dtype.kind != "f":
        return column.tolist()  # type: ignore[no-any-return]
    return ["" if cell == "nan" else cell for cell in column.astype("U16").tolist()]
