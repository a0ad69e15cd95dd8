"""The catalog as a small file beside the event log: what the data map and the suspects' table are made of."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.samples.catalog import LossCatalog
from learnit_r8.types import Indices, Losses, Mask

CATALOG_FILE = "catalog.npz"
MAX_SAMPLES = 50_000
"""Samples in the file at most, the suspects not counted: 1.5 MB, and as many points as a chart can show."""
MAX_SUSPECTS = 1_000
_COLUMNS = {
    "ids": np.int64,
    "mean_loss": np.float32,
    "variability": np.float32,
    "correctness": np.float32,
    "uses": np.uint32,
    "expected_loss": np.float32,
}
_WHERE_KNOWN = {"groups": np.int64, "flagged": np.bool_}


@dataclass(frozen=True, slots=True, eq=False)
class CatalogSnapshot:
    """What `write_catalog` wrote; arrays have one entry a logged sample, in the order of `ids`."""

    step: int  # global step at which it was written
    num_samples: int  # size of the data set
    ids: Indices  # sample ids, int64 `[n]`, ascending: evenly spaced ones, and every suspect
    mean_loss: Losses  # mean of all reported losses, float32 `[n]`
    variability: Losses  # their standard deviation, float32 `[n]`
    correctness: Losses  # share of the reports below ln 2, float32 `[n]`
    uses: NDArray[np.uint32]  # how often trained on, uint32 `[n]`; 0 where unseen
    expected_loss: Losses  # estimate of the current loss, float32 `[n]`
    suspects: Indices  # ids of the samples whose loss stays high, worst first, int64
    groups: Indices | None  # class of each sample, int64 `[n]`; None where the run was given none
    flagged: Mask | None  # what the noise guard takes for wrong, bool `[n]`; None where it was off
    num_flagged: int  # how many these are in the whole data set
    names: list[int | str]  # what the suspects are called: their keys where the run was given keys, else their ids
    attributed: bool  # one loss a batch was reported: all figures of samples are estimates


def write_catalog(
    directory: str | Path,
    catalog: LossCatalog,
    groups: NDArray[np.integer[Any]] | None,
    step: int,
    flagged: Mask | None = None,
) -> None:
    """Write the figures of at most `MAX_SAMPLES` samples, evenly spaced, and of all suspects, in place of earlier ones.

    The class of each sample and what the noise guard takes for wrong are `[N]`, or None. Where this fails the file is
    as it was, never half of it.
    """
    size = catalog.num_samples
    suspects = catalog.suspects(MAX_SUSPECTS)
    if catalog.attributed and flagged is not None and flagged.any():
        # Left out, they are not heard of again: estimates of them age.
        everyone = catalog.suspects(size)
        suspects = everyone[np.argsort(~flagged[everyone], kind="stable")][:MAX_SUSPECTS]
    count = min(size, MAX_SAMPLES)
    ids = np.union1d(np.arange(count, dtype=np.int64) * size // count, suspects)
    columns: dict[str, Any] = {
        name: getattr(catalog, name)[ids].astype(dtype) for name, dtype in _COLUMNS.items() if name != "ids"
    }
    if groups is not None:
        columns["groups"] = groups[ids]
    if flagged is not None:
        columns |= {"flagged": flagged[ids], "num_flagged": np.count_nonzero(flagged)}
    columns |= {"step": step, "num_samples": size, "attributed": catalog.attributed}
    path = Path(directory) / CATALOG_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{CATALOG_FILE}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            np.savez(file, ids=ids, suspects=suspects, names=np.array(catalog.names(suspects)), **columns)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def read_catalog(directory: str | Path) -> CatalogSnapshot | None:
    """Return what `write_catalog` wrote into a run's folder, None where nothing yet; a ValueError if damaged."""
    path = Path(directory) / CATALOG_FILE
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            columns = {
                name: np.asarray(file[name], dtype) if name in file or name in _COLUMNS else None
                for name, dtype in (_COLUMNS | _WHERE_KNOWN).items()
            }
            numbers = {name: int(file[name]) for name in ("step", "num_samples")}
            suspects = np.asarray(file["suspects"], np.int64)
            names = file["names"].tolist() if "names" in file else suspects.tolist()
            num_flagged = 0 if columns["flagged"] is None else int(file["num_flagged"])
            attributed = bool(file["attributed"]) if "attributed" in file else False
    except FileNotFoundError:
        return None
    except (KeyError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no catalog file ({error}); remove it, the next epoch writes it anew") from error
    lengths = {len(column) for column in columns.values() if column is not None}
    if len(lengths) != 1:
        raise ValueError(f"{path} is no catalog file: its columns have {sorted(lengths)} entries")
    more: dict[str, Any] = {**columns, **numbers}
    return CatalogSnapshot(suspects=suspects, names=names, num_flagged=num_flagged, attributed=attributed, **more)
