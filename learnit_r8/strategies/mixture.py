"""Several sources in given shares: data sets of a mixture, or the classes of one.

Each source is a shuffled stream of its own: all of its samples come once before any comes twice. How many of a batch
are of which source is a systematic sample of the shares, so that each is met within one sample a batch, and exactly
over the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from learnit_r8.core.arrays import as_array
from learnit_r8.core.config import Problems
from learnit_r8.core.state import KEEP, Saved, kind, sized, table
from learnit_r8.errors import ConfigError
from learnit_r8.strategies.base import BatchRequest, Draw
from learnit_r8.strategies.contract import sound
from learnit_r8.strategies.weighting import next_phase
from learnit_r8.types import Indices, LossReport, Mask

_LOSS_RATE = 0.1
"""Weight of a batch in a source's average loss."""
_LEAST = 0.02
"""Pull of a source whose loss has not begun to fall, or is 0; the most is 4/27, at a third of its highest loss."""
_STAYS = 0.5
"""Share of its highest loss above which a source's loss counts as one that stays, where another's is at half of it."""


@sound
class Mixture(Saved):
    """Draws from several sources in given shares, on any number of ranks.

    An epoch is as many draws as the sources have samples. Samples that are excluded (quarantine, noise guard) are left
    out; a source of which none is left gives its share to the others. Samples of no source are never drawn.

    Args:
        sources: `{name: ids}`: the sample ids of each source, integers `[n]` or a `range`; no sample has two.
        shares: `{name: share}`; they are scaled to add up to 1. None: in proportion to the sources' sizes.
        adapt: None: the shares stay. "loss": they go where losses fall and are not low yet, share times
            `r (1 - r)^2` with r the source's average loss over the highest that it has had; so noise, whose loss stays,
            is not sought, and the run says so. Or a function `{name: average loss} -> {name: share}`, asked after each
            batch. From equal `shares` "loss" was as good as the best shares of a grid on four of five collections, and
            .7 points below, without a word, where clear sources taught the blurred ones, whose noise was learned by
            heart (`python -m benchmarks.mixtures`).
        floor: Least share of a source, where they adapt.

    Raises:
        ConfigError: Sources without samples or with samples in common, shares that are none, `floor` too large.
    """

    catalogs = False
    replacement = True
    _saved = table(
        order=sized(np.uint32, lambda me: len(me._order), "strategy"),
        positions=np.int64,
        phase=float,
        losses=np.float64,
        highest=kind(np.float64, absent=KEEP),
        shares=sized(np.float64, lambda me: len(me._names), "mixture"),
    )

    def __init__(
        self,
        sources: Mapping[str, ArrayLike | range],
        shares: Mapping[str, float] | None = None,
        adapt: str | Callable[[dict[str, float]], Mapping[str, float]] | None = None,
        floor: float = 0.05,
    ) -> None:
        problems = Problems()
        ids = {name: _ids(problems, name, values) for name, values in sources.items()}
        if not ids:
            problems.append("sources must have at least one, {name: ids}, got none")
        self.adapt = adapt
        if not callable(adapt) and adapt not in (None, "loss"):
            problems.append(f"adapt must be None, 'loss' or a function of the sources' losses, got {adapt!r}")
        self.floor = problems.real("floor", floor, 0.0, 1.0 / max(len(ids), 1)) if adapt else 0.0
        problems.raise_if_any()
        self._names = list(ids)
        self._ends = np.cumsum([len(values) for values in ids.values()])
        self._order = np.concatenate(list(ids.values())).astype(np.uint32)
        samples, counts = np.unique(self._order, return_counts=True)
        if (counts > 1).any():
            raise ConfigError([f"a sample has one source, and {samples[counts > 1][:8].tolist()} have several"])
        self._source = np.full(int(samples[-1]) + 1, -1, np.int32)
        self._source[self._order] = np.repeat(np.arange(len(ids)), np.diff(self._ends, prepend=0))
        self._positions = np.zeros(len(ids), np.int64)  # draws of each source's stream so far; its end: shuffle anew
        self._phase = 0.0
        self._losses = np.full(len(ids), np.nan)
        self._highest = np.zeros(len(ids))
        self._base = self._shares = np.diff(self._ends, prepend=0) / self._ends[-1]
        if shares is not None:
            self.set_shares(shares)

    @property
    def shares(self) -> dict[str, float]:
        """The share of each source as of now; they add up to 1."""
        return dict(zip(self._names, self._shares.tolist(), strict=True))

    def set_shares(self, shares: Mapping[str, float]) -> None:
        """Change the shares, from the next batch on; with several ranks, on each of them.

        Raises:
            ConfigError: Not one share a source, or numbers that are no shares.
        """
        self._base = self._shares = self._checked(shares)

    def _checked(self, shares: Mapping[str, float]) -> NDArray[np.float64]:
        if set(shares) != set(self._names):
            raise ConfigError([f"shares must name the sources {self._names}, got {list(shares)}"])
        values = np.array([float(shares[name]) for name in self._names])
        if not (np.isfinite(values).all() and (values >= 0).all() and values.any()):
            raise ConfigError([f"shares must be finite, not negative and not all 0, got {dict(shares)}"])
        return np.asarray(values / values.sum())

    def start_epoch(self, request: BatchRequest) -> int:
        """Return how many samples the sources have that may be drawn; shuffle the streams that have not begun.

        Raises:
            ConfigError: A source has ids beyond the data set, or none may be drawn.
        """
        if len(self._source) > (count := request.num_samples):
            raise ConfigError([f"sources must have ids below num_samples={count}, got {len(self._source) - 1}"])
        rng = request.rng
        for source in np.flatnonzero(self._positions == 0):
            rng.shuffle(self._stream(source))
        count = len(self._order) if request.excluded is None else int((~request.excluded[self._order]).sum())
        if not count:
            raise ConfigError(["no sample of any source is left to draw: all of them are excluded"])
        return count

    def _stream(self, source: Any) -> NDArray[np.uint32]:
        return self._order[self._ends[source - 1] if source else 0 : self._ends[source]]

    def draw(self, request: BatchRequest) -> Draw:
        """Return a batch in the shares of now, also on probation after a rollback."""
        shares, rng = self._shares, request.rng
        if request.excluded is not None:
            alive = np.array([not request.excluded[self._stream(k)].all() for k in range(len(shares))])
            shares = np.where(alive, shares, 0.0) if (shares[alive] > 0).any() else alive.astype(float)
        self._phase = next_phase(self._phase)
        edges = np.floor(np.cumsum(shares) / shares.sum() * request.size + self._phase)
        edges[-1] = request.size  # the sum's last bits
        counts = np.diff(np.minimum(edges, request.size), prepend=0.0).astype(int)
        parts = [self._take(source, counts[source], request.excluded, rng) for source in np.flatnonzero(counts)]
        return Draw(np.concatenate(parts).astype(np.int64))

    def _take(self, source: Any, count: Any, excluded: Mask | None, rng: np.random.Generator) -> Indices:
        stream, parts, wanted = self._stream(source), [], count
        while wanted:
            start = int(self._positions[source]) % len(stream)
            if start == 0 and self._positions[source]:
                rng.shuffle(stream)
            taken = stream[start : start + wanted].copy()
            self._positions[source] += len(taken)
            kept = taken if excluded is None else taken[~excluded[taken]]
            parts.append(kept)
            wanted -= len(kept)
        return np.concatenate(parts)

    def observe(self, report: LossReport) -> None:
        """Let the shares follow the losses, where they adapt."""
        if self.adapt is None:
            return
        sources = self._source[report.indices]
        losses = np.asarray(report.losses, np.float64)
        counts = np.bincount(sources, minlength=len(self._names))
        means = np.bincount(sources, losses, len(self._names)) / np.maximum(counts, 1)
        new = np.isnan(self._losses)
        moved = np.where(new, means, self._losses + _LOSS_RATE * (means - self._losses))
        self._losses = np.where(counts > 0, moved, self._losses)
        if np.isnan(self._losses).any():
            return  # a source that was not heard of yet
        if callable(self.adapt):
            wanted = self._checked(self.adapt(dict(zip(self._names, self._losses.tolist(), strict=True))))
        else:
            left = self._left()
            pull = self._base * (_LEAST + left * (1.0 - left) ** 2)
            wanted = pull / pull.sum()
        self._shares = self.floor + (1.0 - len(wanted) * self.floor) * wanted

    def _left(self) -> NDArray[np.float64]:
        """Return how much of its highest loss each source still has, 0 to 1; 1 where it was never above 0."""
        self._highest = np.maximum(self._highest, np.nan_to_num(self._losses))
        losses = np.clip(self._losses, 0.0, self._highest)
        return np.asarray(np.divide(losses, self._highest, out=np.ones(len(losses)), where=self._highest > 0))

    def pop_decisions(self) -> list[tuple[str, str, float]]:
        """Return the shares that the next epoch begins with, where they adapt."""
        if self.adapt is None or np.isnan(self._losses).any():
            return []
        left = self._left()
        stays = (left > _STAYS) & (left > 2.0 * left.min()) & (self.adapt == "loss")
        reasons = ["its loss stays: noise, or too hard yet" if one else "follows the losses" for one in stays]
        return [(f"share of {name}", why, self.shares[name]) for name, why in zip(self._names, reasons, strict=True)]


class Balanced(Mixture):
    """Draws all groups alike often, however large they are: each has a share of `1 / groups`.

    Args:
        groups: The group of each sample, for instance its class, `[num_samples]`.

    Raises:
        ConfigError: Not one group a sample.
    """

    def __init__(self, groups: ArrayLike) -> None:
        labels = as_array(groups)
        if labels.ndim != 1 or not len(labels):
            raise ConfigError([f"groups must be a 1-D array, one a sample, got shape {labels.shape}"])
        values, inverse = np.unique(labels, return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        parts = np.split(order, np.cumsum(np.bincount(inverse))[:-1])
        names = [str(value) for value in values]
        super().__init__(dict(zip(names, parts, strict=True)), dict.fromkeys(names, 1.0))


def _ids(problems: Problems, name: str, values: Any) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != 1 or not len(array) or array.dtype.kind not in "iu" or array.min() < 0:
        problems.append(
            f"the source {name!r} must have sample ids, integers from 0 in a 1-D array, at least one, got "
            f"{type(values).__name__} of shape {array.shape} and dtype {array.dtype}"
        )
        return np.zeros(1, np.int64)
    return array.astype(np.int64)
