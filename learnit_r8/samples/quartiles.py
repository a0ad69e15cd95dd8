"""The samples' quadrants: quartiles of their estimated loss, kept in the catalog's rows.

Edges are set at epoch starts. A report only marks its row; the quadrant follows from the estimate and the
edges, and is worked out when somebody asks: to look it up at every report cost 2 us a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.types import Losses, Mask

UNSEEN = 255
"""Quadrant code of a sample whose loss is unknown."""

STUCK_AFTER = 5
"""Epochs in a row in Q4 after which a sample counts as stuck."""

_FIGURE_SAMPLES = 1 << 20
"""Figures for people are taken from about this many samples at most, evenly spaced."""


@dataclass(frozen=True, slots=True)
class QuadrantTable:
    """Figures of the four quadrants, Q1 (lowest loss) first: fields of `events.QuadrantsRefreshed`."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    losses: tuple[float, ...]
    uses: tuple[float, ...]
    easier: tuple[float, ...]
    unseen: int
    stuck: int


class Quadrants:
    """The columns `quadrant`, `reported` and `epochs_in_q4` of the catalog's structured rows.

    `edges` are the three quartile edges of the last epoch start, in the units of the estimates, and were set `number`
    times.
    """

    def __init__(self, rows: NDArray[Any]) -> None:
        self.rows = rows
        rows["quadrant"] = UNSEEN
        self.edges: NDArray[np.float32] | None = None
        self.number = 0

    def codes(self) -> NDArray[np.uint8]:
        """Return each sample's quadrant, uint8 `[N]`; before any edges those of a sort."""
        if self.edges is not None:
            return self._present(self.rows)
        codes = np.full(len(self.rows), UNSEEN, np.uint8)
        seen = np.flatnonzero(self.rows["uses"])
        order = seen[np.argsort(self.rows["estimate"][seen], kind="stable")]
        codes[order] = np.repeat(np.arange(4, dtype=np.uint8), _quarter_sizes(len(order)))
        return codes

    def refresh(
        self, rng: np.random.Generator, excluded: Mask | None, edges: Losses | None
    ) -> tuple[float, ...] | None:
        """Set new edges; the arguments are those of `LossCatalog.refresh_quadrants`.

        The share of each planned quadrant that had moved to a lower one comes back, or None while nothing was seen.
        """
        uses = self.rows["uses"]
        ranked = uses > 0 if excluded is None else (uses > 0) & ~excluded
        everything = bool(ranked.all())
        losses = self.rows["estimate"].copy() if everything else self.rows["estimate"][ranked]
        if not len(losses):
            return None
        moved = self._migration()
        if edges is None:
            ends = np.cumsum(_quarter_sizes(len(losses)))[:3]
            ranks = np.maximum(ends - 1, 0)  # of the quadrants' highest losses
            self.edges = np.partition(losses, ranks)[ranks]
            codes = _quartiles(losses, self.edges)
            _split_ties(losses, codes, self.edges, ends, rng)
        else:
            self.edges, codes = edges, _quartiles(losses, edges)
        self.rows["reported"] = 0
        if everything:
            self.rows["quadrant"] = codes
        else:
            unranked = np.flatnonzero(~ranked)
            self.rows["quadrant"][ranked] = codes
            self.rows["quadrant"][unranked] = self._follow(self.rows["estimate"][unranked], uses[unranked])
        epochs = np.minimum(self.rows["epochs_in_q4"], 254) + 1
        self.rows["epochs_in_q4"] = np.where(self.rows["quadrant"] == 3, epochs, 0)
        self.number += 1
        return moved

    def table(
        self, moved: tuple[float, ...], in_loss_units: Callable[[NDArray[Any]], NDArray[Any]], unseen: int
    ) -> QuadrantTable:
        """Return the quadrants' figures; `moved` is what `refresh` returned."""
        stride = 1 + len(self.rows) // _FIGURE_SAMPLES
        rows = self.rows[::stride]
        codes, losses = rows["quadrant"].astype(np.intp), in_loss_units(rows["estimate"])
        counts = np.bincount(codes, minlength=256)[:4]
        divisor = np.maximum(counts, 1)
        known = losses if counts.sum() == len(codes) else losses[codes < 4]
        assert self.edges is not None
        low, high = (float(known.min()), float(known.max())) if len(known) else (math.nan, math.nan)
        return QuadrantTable(
            edges=(low, *map(float, in_loss_units(self.edges)), high),
            counts=tuple((counts * stride).tolist()),
            losses=tuple((np.bincount(codes, losses, 256)[:4] / divisor).tolist()),
            uses=tuple((np.bincount(codes, rows["uses"], 256)[:4] / divisor).tolist()),
            easier=moved,
            unseen=unseen,
            stuck=int(np.count_nonzero(rows["epochs_in_q4"] > STUCK_AFTER)) * stride,
        )

    def adopt(self, block: NDArray[Any], indices: NDArray[np.int64]) -> None:
        """Put into earlier rows of some samples, in place, what the last epoch start made of their quadrants."""
        for name in ("quadrant", "epochs_in_q4"):
            block[name] = self.rows[name][indices]
        block["reported"] = 1  # the quadrant follows from the estimate, which is an earlier one now

    def _present(self, rows: NDArray[Any]) -> NDArray[np.uint8]:
        """Return the quadrants of rows: as planned, or by the estimate where a loss came since."""
        reported = rows["reported"].astype(np.bool_)
        if not reported.any():
            return rows["quadrant"].copy()
        return np.where(reported, self._follow(rows["estimate"], rows["uses"]), rows["quadrant"])

    def _follow(self, estimate: NDArray[Any], uses: NDArray[Any]) -> NDArray[np.uint8]:
        assert self.edges is not None
        codes = _quartiles(estimate, self.edges)
        codes[uses == 0] = UNSEEN
        return codes

    def _migration(self) -> tuple[float, ...]:
        """Share of each planned quadrant that is now in a lower one."""
        if self.edges is None:
            return (0.0, 0.0, 0.0, 0.0)
        rows = self.rows[:: 1 + len(self.rows) // _FIGURE_SAMPLES]
        planned, now = rows["quadrant"], self._present(rows)
        total = np.bincount(planned, minlength=256)[:4]
        easier = np.bincount(planned[now < planned], minlength=256)[:4]
        return tuple((easier / np.maximum(total, 1)).tolist())


def _quartiles(losses: NDArray[Any], edges: NDArray[Any]) -> NDArray[np.uint8]:
    """Return how many of the three edges each loss is above; several times faster than `searchsorted`."""
    codes: NDArray[np.uint8] = (losses > edges[0]).view(np.uint8)
    codes += losses > edges[1]
    codes += losses > edges[2]
    return codes


def _quarter_sizes(count: int) -> list[int]:
    """Split a count into four parts that differ by one at most, the larger ones first."""
    return [(count - part + 3) // 4 for part in range(4)]


def _split_ties(
    losses: NDArray[Any], codes: NDArray[np.uint8], edges: NDArray[Any], ends: NDArray[Any], rng: np.random.Generator
) -> None:
    """Move samples that tie with an edge up, at random, until the quadrants have their sizes."""
    for quadrant in range(3):
        excess = int(np.count_nonzero(codes <= quadrant)) - int(ends[quadrant])
        if excess > 0:
            tied = np.flatnonzero((losses == edges[quadrant]) & (codes == quadrant))
            codes[rng.permutation(tied)[:excess]] = quadrant + 1
