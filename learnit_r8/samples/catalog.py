"""The loss catalog: what is known of every sample, in 32 bytes each.

All that one report touches of a sample lies in one row (one cache line), so a step costs the
same for ten thousand samples and for ten million: one gather, arithmetic on the batch's rows,
one scatter. The catalog is the only owner and the only writer of these rows.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.arrays import largest, read_only
from learnit_r8.core.portable import owned, portable, unpacked
from learnit_r8.samples.batch_losses import PRIOR_ESTIMATE, PRIOR_VARIANCE, BatchAttribution, Exact
from learnit_r8.samples.quartiles import UNSEEN, Quadrants, QuadrantTable
from learnit_r8.structures.key_table import KeyTable
from learnit_r8.types import Indices, Losses, Mask

SMOOTHING = 0.5
"""Weight of a new per-sample loss in its estimate. Reports are exact and losses move with the
model, so a long memory only makes the estimate stale; one half still halves the jitter that
augmentation and dropout cause."""

LIKELY_CORRECT = math.log(2.0)
"""A cross-entropy below ln 2 means a probability above one half: the sample is classified right."""

_WORDS = ("estimate", "variance", "uses", "last_seen", "mean", "m2", "correct")
_KINDS = ("f4", "f4", "u4", "u4", "f4", "f4", "u4")
_BYTES = ("quadrant", "reported", "epochs_in_q4", "spare")
_ROW = np.dtype([*zip(_WORDS, _KINDS, strict=True), *((name, "u1") for name in _BYTES)])
_OPAQUE = np.dtype(f"V{_ROW.itemsize}")  # numpy moves opaque rows twice as fast as structured ones

# Columns of a batch's rows seen as flat float32 or uint32 words, or bytes: the per-step path slices
# them by number, which costs half of what looking a field's name up does.
_ESTIMATE, _VARIANCE, _USES, _LAST_SEEN, _MEAN, _M2, _CORRECT = (slice(word, None, 8) for word in range(len(_WORDS)))
_REPORTED = slice(29, None, _ROW.itemsize)
# Constants as arrays: numpy need not look up what a Python number's type would be.
_ONE, _HALF, _LIKELY = np.array(1, np.uint32), np.array(SMOOTHING, np.float32), np.array(LIKELY_CORRECT, np.float32)

_JOURNAL_BYTES = 8 << 20
"""How far back reports can be undone: 770 steps of 256 samples. A longer journal would go on growing for longer,
and memory that is touched for the first time costs more than all the rest of a step."""
_ENTRY_BYTES = 600
"""What Python's objects of one entry take beside the arrays' contents."""
_MOST = 0.9
_TOGETHER, _TOGETHER_SAMPLES = 32, 1 << 11
"""Reports that are written to the rows together, and samples in them, at least."""


_ALL = slice(None)


class Rows(NamedTuple):
    """The catalog's rows of one batch before its report."""

    indices: Indices
    block: NDArray[Any]  # opaque, a row for each
    expected: float  # mean expected loss; NaN while none of them has been seen
    unseen: int  # how many have never been seen


class LossCatalog:
    """Per-sample loss statistics.

    Args:
        num_samples: Size of the data set.
    """

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.keys: KeyTable | None = None
        """What the samples are called by, where the run was given keys."""
        self._table = np.zeros(num_samples, _ROW)
        self._quadrants = Quadrants(self._table)
        self._opaque = self._table.view(_OPAQUE)
        # Reports that are not in the rows yet; sums and counts hold them already.
        self._waiting: deque[tuple[Rows, Losses | list[float], int]] = deque()
        self._ahead: dict[int, Rows] = {}  # of batches that were looked up ahead, by the identity of their ids
        self._estimator = Exact()
        self._sum = 0.0  # of all estimates, in the units of the estimate column
        self._num_seen = 0
        # Steps (one, or of each row), number of the edges, rows, and where the attribution stood.
        self._journal: deque[tuple[int | NDArray[np.int64], int, Rows, tuple[float, ...] | None]] = deque()
        self._mark: tuple[float, ...] | None = None
        self._journal_bytes = 0
        self._left_out: Indices = np.empty(0, np.int64)
        self._renewed: list[tuple[int, Indices]] = []

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        own = {name: value for name, value in vars(self).items() if name != "_opaque"}  # a view of the rows
        return own | {"_ahead": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(owned(state))
        self._opaque = self._table.view(_OPAQUE)

    def __copy__(self) -> LossCatalog:
        """Return a deep copy: one that shared the rows would write into them."""
        return copy.deepcopy(self)

    @property
    def _rows(self) -> NDArray[Any]:
        """The rows, every report in them."""
        self._settle()
        return self._table

    # What users read ----------------------------------------------------------------------

    @property
    def expected_loss(self) -> Losses:
        """Estimated current loss of each sample, float32 `[N]`, read-only; 0 where unseen."""
        return read_only(self.expected_of(_ALL))

    def expected_of(self, indices: Any) -> Losses:
        """Return the estimated current loss of some samples, float32 `[n]`, without touching the others."""
        losses = self._estimator.to_loss(self._rows["estimate"][indices])
        if self._estimator.attributed:
            losses = np.where(self._table["uses"][indices] > 0, losses, np.float32(0))
        return losses

    @property
    def variance(self) -> Losses:
        """Uncertainty of the estimate, float32 `[N]`, read-only.

        From per-sample losses: the exponentially weighted mean of the squared surprise. From
        one loss a batch: the share of the prior variance that is left, 1 for a sample never seen.
        """
        return read_only(self._rows["variance"])

    @property
    def uses(self) -> NDArray[np.uint32]:
        """How often each sample was trained on, uint32 `[N]`, read-only; 0 means unseen."""
        return read_only(self._rows["uses"])

    @property
    def last_seen(self) -> NDArray[np.uint32]:
        """Global step of each sample's last accepted report, uint32 `[N]`, read-only."""
        return read_only(self._rows["last_seen"])

    @property
    def mean_loss(self) -> Losses:
        """Mean of all losses reported for each sample, float32 `[N]`, read-only; 0 where unseen."""
        return read_only(self._rows["mean"])

    @property
    def variability(self) -> Losses:
        """Standard deviation of the losses reported for each sample, float32 `[N]`.

        With `mean_loss` and `correctness` it makes the data map of Swayamdipta et al. 2020
        ("Dataset Cartography"), there over the probability of the true class, here over the loss.
        """
        return read_only(np.sqrt(self._rows["m2"] / np.maximum(self._rows["uses"], 1)).astype(np.float32))

    @property
    def correctness(self) -> Losses:
        """Share of each sample's reports that were below ln 2, float32 `[N]`.

        For a cross-entropy these are (at least) the times that it was classified correctly.
        """
        return read_only((self._rows["correct"] / np.maximum(self._rows["uses"], 1)).astype(np.float32))

    @property
    def left_out(self) -> Indices:
        """Ids of the samples that are kept out of batches since faults named them, int64, ascending, read-only."""
        return read_only(self._left_out)

    def leave_out(self, ids: Iterable[int]) -> tuple[int, ...]:
        """Keep samples out of batches from now on; return those that are new."""
        new = np.setdiff1d(np.asarray(list(ids), np.int64), self._left_out)
        self._left_out = np.union1d(self._left_out, new)
        return tuple(int(i) for i in new)

    def renew(self, ids: Iterable[int], step: int) -> None:
        """Forget all of some samples, as if never seen, from this step on: their data or labels were changed.

        What a rollback takes back of the steps before does not bring it back. From one loss a batch, reports of the
        batches that they were in go on counting in the estimates.
        """
        chosen = np.asarray(list(ids), np.int64)
        self._renewed.append((step, chosen))
        self._left_out = np.setdiff1d(self._left_out, chosen)
        self._wipe(chosen)

    def _wipe(self, ids: Indices) -> None:
        rows = self._rows
        rows[ids] = 0
        rows["quadrant"][ids] = UNSEEN
        if self.attributed:
            rows["estimate"][ids], rows["variance"][ids] = PRIOR_ESTIMATE, PRIOR_VARIANCE
        self._ahead.clear()
        self._resum()

    @property
    def attributed(self) -> bool:
        """Whether losses were reported one a batch, so that all figures of samples are estimates."""
        return self._estimator.attributed

    @property
    def num_seen(self) -> int:
        """Number of samples with at least one accepted report."""
        return self._num_seen

    @property
    def share_seen(self) -> float:
        """Share of the samples with at least one accepted report."""
        return self._num_seen / self.num_samples

    @property
    def mean_expected(self) -> float:
        """Mean of the expected loss over the samples that were seen; NaN while none was."""
        if not self._num_seen:
            return math.nan
        if not self._estimator.attributed:
            return self._sum / self._num_seen
        return self._estimator.expected_mean(self._sum / self.num_samples)

    @property
    def usual(self) -> float:
        """Mean expected loss that a batch's can be compared with; NaN until nine tenths of the samples were seen."""
        # Not all: what is always NaN is never seen.
        return math.nan if self._num_seen < _MOST * self.num_samples else self.mean_expected

    @property
    def nbytes(self) -> int:
        """Bytes held for the samples."""
        return int(self._rows.nbytes)

    @property
    def confidence(self) -> float:
        """How far the estimates are identified, 0 to 1.

        From per-sample losses: the share of samples that were seen. From one loss a batch
        there are N unknowns and N/B equations an epoch, so it takes many epochs.
        """
        if isinstance(self._estimator, BatchAttribution):
            return self._estimator.known(self._rows["variance"])
        return self.share_seen

    def quadrants(self) -> NDArray[np.uint8]:
        """Return each sample's loss quartile, uint8 `[N]`: 0 (lowest) to 3; 255 where unseen.

        Edges are those of the last epoch start; a sample moves when its loss is reported.
        """
        self._settle()
        return self._quadrants.codes()

    def suspects(self, k: int) -> Indices:
        """Return the k samples whose loss is high throughout, worst first: those most likely to be wrong.

        Ranked by the mean of all reported losses: a network may learn a wrong label by heart in the
        end, but it learns it last. With one loss a batch by the current estimate, which then
        holds all that was reported; that takes many epochs (see `confidence`). Samples that were left out
        since faults named them come first.

        Args:
            k: How many, 0 to N; fewer come back while fewer were seen.

        Returns:
            Sample ids, int64 `[k]`.

        Raises:
            TypeError: `k` is no whole number.
            ValueError: `k` is below 0.
        """
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)):
            raise TypeError(f"k must be a whole number, got {k!r}")
        if k < 0:
            raise ValueError(f"k must be >= 0, got {k}")
        score = np.where(self._rows["uses"] > 0, self._rows["estimate" if self.attributed else "mean"], -np.inf)
        score[self._left_out] = np.inf
        return largest(score, min(int(k), int(np.count_nonzero(score > -np.inf))))

    def names(self, indices: Sequence[int] | Indices) -> list[int | str]:
        """Return what samples are told as: their keys where they have any, else their ids."""
        return np.asarray(indices, np.int64).tolist() if self.keys is None else self.keys.names(indices)

    # What the loop writes -----------------------------------------------------------------

    def expect(self, batches: Sequence[Indices]) -> None:
        """Look up together the rows of batches that will be reported one by one, which costs a fraction.

        No sample is in two of them, or is reported otherwise before.
        """
        if self._estimator.attributed:
            return
        table, size = self._opaque.take(np.concatenate(batches)), len(batches[0])
        all_seen = self._num_seen == self.num_samples
        estimates, full = table.view(np.float32)[_ESTIMATE], len(batches)
        while len(batches[full - 1]) != size:  # the last ones of an epoch may be shorter
            full -= 1
        sums, start = np.add.reduce(estimates[: full * size].reshape(full, size), axis=1).tolist(), 0
        for number, ids in enumerate(batches):
            end = start + len(ids)
            block = table[start:end]
            total = sums[number] if number < full else _total(estimates[start:end])
            unseen, expected = 0 if all_seen else self._unseen(block), total / len(ids)
            if unseen in (0, len(ids)):  # what is expected of the others follows from the mean of then
                self._ahead[id(ids)] = Rows(ids, block, math.nan if unseen else expected, unseen)
            start = end

    def _unseen(self, block: NDArray[Any]) -> int:
        if self._num_seen == self.num_samples:
            return 0
        return len(block) - int(np.count_nonzero(block.view(np.uint32)[_USES]))

    def look_up(self, indices: Indices) -> Rows:
        """Return the rows of a batch and its expected loss."""
        if (ahead := self._ahead.pop(id(indices), None)) is not None:
            return ahead
        size, block = len(indices), self._opaque.take(indices)
        unseen, total = self._unseen(block), _total(block.view(np.float32)[_ESTIMATE])
        if unseen == size:
            return Rows(indices, block, math.nan, unseen)
        if unseen and not self._estimator.attributed:
            total += unseen * self._sum / self._num_seen  # as those that were seen
        return Rows(indices, block, self._estimator.expected_mean(total / size), unseen)

    def estimates(self, rows: Rows) -> Losses:
        """Return what is expected of each sample of a batch that was looked up; 0 where unseen."""
        return self._estimator.to_loss(rows.block.view(np.float32)[_ESTIMATE])

    def take(
        self, indices: Indices, losses: Losses | list[float], mean: float, step: int, floor: float = -math.inf
    ) -> tuple[float, float] | None:
        """Record finite losses of a batch that was looked up ahead, of a plan that has each sample once.

        Returns:
            What was expected of the batch, and by how much that was beyond the mean of all; NaN where not known. None
            where the batch was not looked up, or things have changed since, or the mean less a positive excess is below
            `floor`: then nothing is done.
        """
        rows = self._ahead.get(id(indices))
        if rows is None:
            return None
        expected, unseen = rows.expected, rows.unseen
        if unseen or self._num_seen < _MOST * self.num_samples:
            excess = math.nan
        else:
            excess = expected - self._sum / self._num_seen  # the estimates are losses, or nothing is looked up
        if mean < floor or mean - excess < floor:
            return None
        del self._ahead[id(indices)]
        self._wait(rows, losses, mean, step)
        return expected, excess

    def _wait(self, rows: Rows, losses: Losses | list[float], mean: float, step: int) -> None:
        """Count a report whose samples are all new, or none is, and put off writing it into the rows."""
        if rows.unseen:
            self._sum += mean * rows.unseen
            self._num_seen += rows.unseen
        else:
            self._sum += (mean - rows.expected) * len(losses) * SMOOTHING
        self._waiting.append((rows, losses, step))
        if len(self._waiting) >= _TOGETHER and len(self._waiting) * len(losses) >= _TOGETHER_SAMPLES:
            self._settle()

    def record(self, rows: Rows, losses: Losses, step: int, mean: float | None = None, *, once: bool = False) -> Losses:
        """Take one finite loss per sample of a batch, the catalog's to keep; return them.

        `once`: none of the samples is reported again before the rows are read. Then reports of many steps are
        written together, which costs a fraction. Their `mean`, where it is known, saves adding up.
        """
        exact = mean is not None and not self._estimator.attributed
        if once and exact and mean is not None and rows.unseen in (0, len(losses)):
            self._wait(rows, losses, mean, step)
            return losses
        self._settle()
        if not once:
            self._ahead.clear()
        with np.errstate(all="ignore"):
            change = self._write(rows, losses, step)
        self._remember(step, rows)
        if exact and mean is not None and not rows.unseen:
            self._sum += (mean - rows.expected) * len(losses) * SMOOTHING  # what `change` adds up to
        else:
            self._sum += _total(change)
        self._num_seen += rows.unseen
        return losses

    def _settle(self) -> None:
        """Write the reports that wait. Another thread may read the catalog: each report is taken off once."""
        waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if not waiting:
            return
        reports, losses, steps = zip(*waiting, strict=True)
        ids, blocks, _, unseen = zip(*reports, strict=True)
        together = Rows(np.concatenate(ids), np.concatenate(blocks), math.nan, sum(unseen))
        each = np.repeat(np.array(steps, np.int64), list(map(len, losses)))
        self._remember(each, together)
        with np.errstate(all="ignore"):
            self._write(together, np.concatenate(losses, dtype=np.float32, casting="same_kind"), each)

    def _write(self, rows: Rows, losses: Losses, step: int | NDArray[Any]) -> NDArray[Any]:
        """Bring the rows of samples up to their losses; return what changed in the estimates."""
        block = rows.block.copy()
        floats, words = block.view(np.float32), block.view(np.uint32)
        estimate, variance = floats[_ESTIMATE], floats[_VARIANCE]
        change = self._estimator.from_loss(losses) - estimate
        if rows.unseen:
            fresh = words[_USES] == 0
            change *= np.where(fresh, np.float32(1), _HALF)
            spread = np.where(fresh, np.float32(0), change)
        else:
            change *= _HALF
            spread = change
        estimate += change
        # Exponentially weighted variance (Finch 2009, "Incremental calculation of weighted mean and
        # variance", eq. 143) for a weight of one half: (1 - a) (v + a s^2) with a s = `spread`.
        variance *= _HALF
        variance += spread * spread
        self._commit(rows.indices, block, losses, step)
        return change

    @np.errstate(all="ignore")
    def record_batch(self, rows: Rows, loss: float, step: int) -> Losses:
        """Take one finite mean loss for a whole batch; return the new estimates of its samples."""
        self._ahead.clear()
        if not isinstance(self._estimator, BatchAttribution):
            rows = self._start_attribution(rows)
        attribution = self._estimator
        assert isinstance(attribution, BatchAttribution)
        units = attribution.additive, attribution.additive and attribution.scale
        self._mark = attribution.mark()
        attribution.update(self._rows["estimate"], self._rows["variance"], rows.indices, loss)
        block = self._opaque.take(rows.indices)
        floats = block.view(np.float32)
        after, before = floats[_ESTIMATE], rows.block.view(np.float32)[_ESTIMATE]
        if units == (attribution.additive, attribution.additive and attribution.scale):
            self._sum += _total(after - before)
        else:  # all estimates were converted to other units
            self._resum()
            self._forget_journal()
        losses = attribution.to_loss(after)
        self._commit(rows.indices, block, losses, step)
        self._num_seen += rows.unseen
        self._remember(step, rows)
        return losses

    def _commit(self, indices: Indices, block: NDArray[Any], losses: Losses, step: int | NDArray[Any]) -> None:
        """Update the statistics that both kinds of report share, and write the rows back."""
        floats: NDArray[Any] = block.view(np.float32)
        words: NDArray[Any] = block.view(np.uint32)
        uses, mean, m2, correct = words[_USES], floats[_MEAN], floats[_M2], words[_CORRECT]
        uses += _ONE
        off = losses - mean
        mean += off / uses.astype(np.float32)  # Welford 1962
        off *= losses - mean
        m2 += off
        correct += (losses < _LIKELY).astype(np.uint32)
        words[_LAST_SEEN] = step
        block.view(np.uint8)[_REPORTED] = 1
        self._opaque[indices] = block

    def _start_attribution(self, rows: Rows) -> Rows:
        """From here on estimates are relative to the tracked mean loss; return the rows anew."""
        attribution = BatchAttribution(self.num_samples)
        seen = self._rows["uses"] > 0
        estimate, variance = self._rows["estimate"], self._rows["variance"]
        if self._num_seen:
            attribution.start(estimate[seen])
            estimate[seen] = attribution.from_loss(estimate[seen])
            variance[seen] = PRIOR_VARIANCE / 10  # reported exactly, but by an older model
        estimate[~seen] = PRIOR_ESTIMATE
        variance[~seen] = PRIOR_VARIANCE
        self._estimator = attribution
        self._quadrants.edges = None  # they were in other units
        self._resum()
        self._forget_journal()
        return self.look_up(rows.indices)

    def _resum(self) -> None:
        """Sum the estimates anew: of the seen samples, or with attribution of all (unseen ones are at the mean)."""
        seen = self._rows["uses"] > 0
        self._num_seen = int(np.count_nonzero(seen))  # a batch may have held an unseen sample twice
        self._sum = float(self._rows["estimate"].sum(dtype=np.float64, where=self.attributed or seen))

    def end_epoch(self) -> None:
        """Refine the estimates over the reported batches of the last epochs; O(N) and more."""
        rows, estimator = self._rows, self._estimator
        if isinstance(estimator, BatchAttribution) and estimator.refine(rows["estimate"], rows["variance"]):
            self._resum()
            self._forget_journal()

    def refresh_quadrants(
        self, rng: np.random.Generator, excluded: Mask | None = None, edges: Losses | None = None
    ) -> QuadrantTable | None:
        """Set new quartile edges and return the quadrants' figures; None while nothing was seen.

        The samples that may be drawn are split into four equal parts (their sizes differ by
        one at most, the larger ones first); ties at an edge are split at random. Excluded ones count for no edge and
        get the quadrant that the edges give them. Where the three `edges` are known from elsewhere ties stay together.
        """
        self._settle()
        self._ahead.clear()
        moved = self._quadrants.refresh(rng, excluded, edges)
        if moved is None:
            return None
        self._resum()  # drops rounding drift
        return self._quadrants.table(moved, self._estimator.to_loss, self.num_samples - self._num_seen)

    def grow(self, num_samples: int) -> None:
        """Have room for more samples, which were never seen.

        Where the rows have to be moved there is room for as many again, which costs nothing until it is written to.
        """
        rows, before = self._rows, self.num_samples
        room = rows.base
        if not isinstance(room, np.ndarray) or room.dtype != _ROW or len(room) < num_samples:
            room = np.zeros(2 * num_samples, _ROW)
            room.view(np.uint8)[: rows.nbytes] = rows.view(np.uint8)
        self.num_samples, self._table = num_samples, room[:num_samples]
        self._opaque, self._quadrants.rows = self._table.view(_OPAQUE), self._table
        new = self._table[before:]
        new["quadrant"] = UNSEEN
        if isinstance(self._estimator, BatchAttribution):
            new["estimate"], new["variance"] = PRIOR_ESTIMATE, PRIOR_VARIANCE
            self._sum += PRIOR_ESTIMATE * len(new)
            attribution = BatchAttribution(num_samples)
            attribution.load_state_dict(self._estimator.state_dict())
            self._estimator = attribution
        self._ahead.clear()

    # Undo, for rollbacks ------------------------------------------------------------------

    def _remember(self, step: int | NDArray[np.int64], rows: Rows) -> None:
        self._journal.append((step, self._quadrants.number, rows, self._mark))
        self._mark = None
        self._journal_bytes += _size(rows)
        while self._journal_bytes > _JOURNAL_BYTES:
            self._journal_bytes -= _size(self._journal.popleft()[2])

    def _forget_journal(self) -> None:
        self._journal.clear()
        self._journal_bytes = 0

    def rewind(self, step: int) -> int:
        """Undo the reports of `step` and later, newest first; return how many were undone.

        With one loss a batch it reaches back to the last epoch start at most: there all estimates changed.
        """
        self._settle()
        self._ahead.clear()
        undone = 0
        while self._journal and np.max(self._journal[-1][0]) >= step:
            steps, edges, rows, mark = self._journal.pop()
            self._journal_bytes -= _size(rows)
            if isinstance(steps, np.ndarray):  # of reports that were written together, the older ones may stay
                later = steps >= step
                if not later.all():
                    self._remember(steps[~later], self._part(rows, ~later))
                    rows = self._part(rows, later)
                undone += len(np.unique(steps[later])) - 1
            if mark is not None and isinstance(self._estimator, BatchAttribution):
                self._estimator.back_to(mark)
            if edges != self._quadrants.number:  # a row of an earlier epoch, with what this one's start made of it
                block = rows.block.copy().view(_ROW)
                self._quadrants.adopt(block, rows.indices)
                rows = rows._replace(block=block.view(_OPAQUE))
            before, now = rows.block.view(_ROW)["estimate"], self._rows["estimate"][rows.indices]
            self._sum += float((before - now).sum(dtype=np.float64))
            self._num_seen -= rows.unseen
            self._opaque[rows.indices] = rows.block
            undone += 1
        for at, ids in self._renewed:
            if at >= step:
                self._wipe(ids)
        return undone

    def _part(self, rows: Rows, which: Mask) -> Rows:
        block = rows.block[which]
        unseen = int(np.count_nonzero(block.view(np.uint32)[_USES] == 0))
        return Rows(rows.indices[which], block, math.nan, unseen)

    # State --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return copies of everything; arrays and JSON scalars."""
        estimator = self._estimator
        state = {
            "rows": self._rows.view(np.uint8).copy(),
            "edges": None if self._quadrants.edges is None else self._quadrants.edges.copy(),
            "sum": self._sum,
            "num_seen": self._num_seen,
            "left_out": self._left_out,
            "attribution": estimator.state_dict() if isinstance(estimator, BatchAttribution) else None,
        }
        return portable(state)  # type: ignore[no-any-return]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, bit for bit.

        Raises:
            ValueError: The state belongs to a data set of another size.
        """
        state = unpacked(state)
        rows = np.asarray(state["rows"], dtype=np.uint8)
        if rows.nbytes != self._rows.nbytes:
            saved = rows.nbytes // _ROW.itemsize
            raise ValueError(f"the state has {saved} samples, this run has num_samples={self.num_samples}")
        estimator = Exact()
        if state["attribution"] is not None:
            estimator = BatchAttribution(self.num_samples)
            estimator.load_state_dict(state["attribution"])
        edges = None if state["edges"] is None else np.array(state["edges"], np.float32)
        self._waiting.clear()
        self._ahead.clear()
        self._sum, self._num_seen = float(state["sum"]), int(state["num_seen"])
        self._left_out = np.asarray(state.get("left_out", ()), np.int64)
        self._estimator, self._quadrants.edges = estimator, edges
        self._rows.view(np.uint8)[:] = rows  # in place: they may be most of the memory
        self._forget_journal()


def with_more(state: Mapping[str, Any], num_samples: int) -> dict[str, Any]:
    """Return a catalog's state with samples behind the others that were never seen."""
    saved = np.asarray(state["rows"], np.uint8)
    rows, before = np.zeros(num_samples, _ROW), saved.size // _ROW.itemsize
    rows.view(np.uint8)[: saved.size] = saved.ravel()
    rows["quadrant"][before:] = UNSEEN
    total = float(state["sum"])
    if state["attribution"] is not None:
        rows["estimate"][before:], rows["variance"][before:] = PRIOR_ESTIMATE, PRIOR_VARIANCE
        total += PRIOR_ESTIMATE * (num_samples - before)
    return {**state, "rows": rows.view(np.uint8), "sum": total}


def _total(values: NDArray[Any]) -> float:
    return float(np.add.reduce(values))


def _size(rows: Rows) -> int:
    return rows.block.nbytes + rows.indices.nbytes + _ENTRY_BYTES
