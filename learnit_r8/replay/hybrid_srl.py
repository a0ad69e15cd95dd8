"""Replay by spaced repetition: what was recalled well waits longer, what is unusual comes sooner."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from learnit_r8.core.arrays import as_losses
from learnit_r8.core.config import Problems
from learnit_r8.core.rng import Purpose, RandomStreams
from learnit_r8.core.state import Kind, fixed, part, table
from learnit_r8.errors import CheckpointError
from learnit_r8.replay.diversity import EmbeddingSpread
from learnit_r8.replay.item import ReplayItem
from learnit_r8.replay.saving import SavedBuffer, filled
from learnit_r8.types import Indices

Filter = Callable[[Any, NDArray[np.float32], float], bool]

_EASIEST, _HARDEST, _FIRST = 2.5, 1.3, 2.0
_EASIER, _HARDER = 0.1, -0.2
_RECENT = 0.7
"""Weight of a new score in an experience's running mean and variance."""
_BOOST = 1.0
"""Added to the diversity of an experience that is flagged divergent: as much as the spread of all."""
_EVICTIONS = ("fifo", "mastered", "reservoir")
_COLUMNS = {
    "serial": np.int64,  # number of the add; tells an item from its slot's next tenant
    "variance": np.float64,
    "interval": np.float64,
    "easiness": np.float64,
    "last_review": np.float64,
    "boost": np.float64,
    "recalls": np.int64,
    "recall_mean": np.float64,
    "recall_variance": np.float64,  # exponentially weighted, like the mean
    "spare": np.float64,  # diversity at the last review if mastered, else infinity: the smallest goes first
}


class HybridSRLReplayBuffer(SavedBuffer):
    """Experiences on a review schedule, shortened for those that differ from the rest.

    An experience is due when `step >= last_review + interval`; harder ones come first. Its
    diversity is `beta * variance + (1 - beta) * d`, d being its embedding's distance to the
    centroid over the spread of the distances (see `EmbeddingSpread`). After a replay:

    * recall score >= mastery_threshold: easiness = min(easiness + 0.1, 2.5),
      base = interval * multiplier * (easiness - 1);
    * else: easiness = max(easiness - 0.2, 1.3), base = 1;
    * interval = base / (1 + alpha * diversity).

    The diversity bonus is that of exploratory iteration (arXiv 2509.04575). `eviction`,
    `epsilon`, `uncertainty`, `filters`, `clusters` and `asynchronous` go beyond the published
    buffer; at their defaults it behaves as published.

    Args:
        capacity: Number of experiences held, at least 1.
        mastery_threshold: Recall score from which a replay counts as a success.
        initial_interval: Interval of a new experience, in steps, above 0.
        multiplier: Growth of intervals, above 0.
        alpha: How much diversity shortens intervals, at least 0.
        beta: Share of the variance in the diversity, 0 to 1.
        eviction: "fifo": a full buffer drops the oldest. "mastered": it drops, of those that
            were recalled well the last time, the least diverse; the oldest where there is none.
            "reservoir": a new experience takes a random one's place, ever less often, so that
            all that were ever added are as likely to be held (Vitter 1985, algorithm R).
        epsilon: Probability that a new experience is flagged divergent, which adds 1 to its
            diversity until its first review.
        seed: Of that flag and of the clusters.
        uncertainty: A score must pass the threshold by this many standard deviations of the
            experience's recent scores, so that a noisy recall takes more to count as mastery. Once
            these are above the threshold on average, `best_score` is enough.
        best_score: The highest score there is; with `uncertainty` not below the threshold.
        filters: Called as `filter(experience, embedding, variance)`; one False refuses it.
        clusters: Number of k-means clusters: beyond `cluster_above` experiences d is the
            distance to the nearest cluster's centre. Needs scikit-learn.
        cluster_above: See `clusters`.
        asynchronous: `update_after_replay` returns at once and a thread does the work;
            sampling never waits for it. Order of effects is then a matter of timing: `flush`
            waits for all.

    Raises:
        ConfigError: Lists every bad argument.
    """

    capacity: int = fixed()
    seed: int = fixed()
    _saved = table(
        seed=int,
        added=int,
        refused=int,
        columns=Kind(
            lambda buffer, columns: {name: column[: len(buffer)].copy() for name, column in columns.items()},
            lambda buffer, saved: {
                name: filled(saved[name], len(saved["serial"]), np.zeros(buffer.capacity, dtype))
                for name, dtype in _COLUMNS.items()
            },
        ),
        spread=part(lambda buffer, saved: buffer._spread.emptied(len(saved["norms"]))),
    )

    def __init__(
        self,
        capacity: int,
        mastery_threshold: float = 0.9,
        initial_interval: float = 1.0,
        multiplier: float = 1.5,
        alpha: float = 1.0,
        beta: float = 0.5,
        eviction: str = "fifo",
        epsilon: float = 0.0,
        seed: int = 0,
        *,
        uncertainty: float = 0.0,
        best_score: float = 1.0,
        filters: Sequence[Filter] = (),
        clusters: int | None = None,
        cluster_above: int = 50_000,
        asynchronous: bool = False,
    ) -> None:
        problems = Problems()
        self.capacity = problems.integer("capacity", capacity, 1)
        self.seed = problems.integer("seed", seed, 0)
        problems.integer("cluster_above", cluster_above, 0)
        if clusters is not None:
            problems.integer("clusters", clusters, 2)
        self.mastery_threshold = problems.real("mastery_threshold", mastery_threshold, -math.inf)
        self.initial_interval = problems.real("initial_interval", initial_interval, 0.0, open_low=True)
        self.multiplier = problems.real("multiplier", multiplier, 0.0, open_low=True)
        self.alpha = problems.real("alpha", alpha, 0.0)
        self.beta = problems.real("beta", beta, 0.0, 1.0)
        self.epsilon = problems.real("epsilon", epsilon, 0.0, 1.0)
        self.uncertainty = problems.real("uncertainty", uncertainty, 0.0)
        self.best_score = problems.real("best_score", best_score, -math.inf)
        if self.uncertainty and self.best_score < self.mastery_threshold:
            problems.append(f"best_score must not be below mastery_threshold={mastery_threshold!r}, got {best_score!r}")
        self.eviction = problems.choice("eviction", eviction, _EVICTIONS)
        problems.raise_if_any()
        self.refused = 0
        """Number of experiences that a filter refused."""
        self._filters = tuple(filters)
        self._streams = RandomStreams(self.seed)
        self._spread = EmbeddingSpread(self.capacity, clusters, cluster_above, self.seed)
        self._columns = {name: np.zeros(self.capacity, dtype) for name, dtype in _COLUMNS.items()}
        self._experiences: list[Any] = []
        self._added = 0
        self._worker = ThreadPoolExecutor(1, "replay-updates") if asynchronous else None
        self._jobs: list[Future[None]] = []

    def __len__(self) -> int:
        return len(self._experiences)

    def add(
        self,
        experience: Any,
        embedding: Any,
        variance: float = 0.0,
        *,
        step: float = 0.0,
        divergent: bool | None = None,
    ) -> bool:
        """Add one experience, dropping another where the buffer is full.

        Args:
            experience: Anything.
            embedding: List, array or tensor, shape `[d]`; d is that of the first.
            variance: Variance of its rewards, at least 0.
            step: Counts as its last review. At 0 it is due at once.
            divergent: Flag it as divergent or not; None leaves that to chance (`epsilon`).

        Returns:
            False where a filter refused it, or the reservoir passed it over.

        Raises:
            ValueError: Bad embedding, variance, step or flag. Nothing is changed.
        """
        vector = self._spread.checked(embedding)
        variance, step = float(variance), float(step)
        if not (0.0 <= variance < math.inf and math.isfinite(step) and divergent in (None, True, False)):
            came = f"variance {variance!r}, step {step!r}, divergent {divergent!r}"
            raise ValueError(f"need a finite variance of at least 0, a finite step and a flag or None, got {came}")
        if not all(keep(experience, vector, variance) for keep in self._filters):
            self.refused += 1
            return False
        with self._lock:
            rng = self._streams.at(Purpose.BATCH, 0, self._added)
            if divergent is None:
                divergent = bool(self.epsilon and rng.random() < self.epsilon)
            full = len(self) == self.capacity
            slot = self._slot_to_drop(rng) if full else len(self)
            self._added += 1
            if slot is None:
                return False
            if full:
                self._experiences[slot] = experience
            else:
                self._experiences.append(experience)
            values = {"serial": self._added - 1, "variance": variance, "interval": self.initial_interval}
            values |= {"easiness": _FIRST, "last_review": step, "boost": _BOOST * divergent, "spare": math.inf}
            for name, column in self._columns.items():
                column[slot] = values.get(name, 0)
            self._spread.put(slot, vector, replaces=full)
        return True

    def compute_diversity(self, item: Any) -> float:
        """Return the diversity, boost apart, of an item or of anything with `["embedding"]` and `["variance"]`."""
        vector = self._spread.checked(item["embedding"])
        distance = float(self._spread.relative(vector)[0])
        return self.beta * float(item["variance"]) + (1.0 - self.beta) * distance

    def diversities(self, slots: Indices | None = None) -> NDArray[np.float64]:
        """Return the diversity of all experiences by slot, or of some, boosts included."""
        which: Any = slice(len(self)) if slots is None else slots
        distances = self._spread.relative(slots)
        variance, boost = (self._columns[name][which] for name in ("variance", "boost"))
        return np.asarray(self.beta * variance + (1.0 - self.beta) * distances + boost)

    def get_due_samples(self, current_step: float, batch_size: int) -> list[ReplayItem]:
        """Return up to `batch_size` experiences that are due, lowest easiness first.

        Among equals that which has been due longest comes first, then the oldest. (In the
        published buffer it is the oldest, so that while nothing is mastered the same few are
        replayed for ever.)

        Raises:
            ValueError: `batch_size` is not a positive int, or `current_step` is NaN.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
            raise ValueError(f"batch_size must be an int of at least 1, got {batch_size!r}")
        if math.isnan(current_step):
            raise ValueError("current_step must be a number, got NaN")
        with self._lock:
            used, columns = len(self), self._columns
            due_at = columns["last_review"][:used] + columns["interval"][:used]
            due = np.flatnonzero(due_at <= current_step)
            keys = columns["serial"], due_at, columns["easiness"]
            certain = due[:0]
            for key in reversed(keys):
                # Sorting all would take ten times as long as finding who lies below the border.
                places = batch_size - len(certain)
                if places < len(due):
                    border = np.partition(key[due], places - 1)[places - 1]
                    certain = np.append(certain, due[key[due] < border])
                    due = due[key[due] == border]
            due = np.append(certain, due)
            return [self._item(slot) for slot in due[np.lexsort([key[due] for key in keys])].tolist()]

    def update_after_replay(self, items: Sequence[Any], recall_scores: ArrayLike, current_step: float) -> None:
        """Reschedule experiences after they were replayed.

        Items that have been dropped in the meantime are skipped.

        Args:
            items: What `get_due_samples` returned.
            recall_scores: How well each was recalled, usually 0 to 1.
            current_step: Becomes their last review.

        Raises:
            ValueError: Not one finite score per item, or a step that is not finite. Nothing is changed.
            TypeError: Not items of this buffer. Nothing is changed.
        """
        scores = as_losses(recall_scores, "recall scores").reshape(-1)
        if len(items) != len(scores):
            raise ValueError(f"need one recall score per item, got {len(items)} items and {len(scores)} scores")
        if not (np.isfinite(scores).all() and math.isfinite(current_step)):
            raise ValueError(f"recall scores and step must be finite, got {scores} at step {current_step}")
        try:
            places = np.array([(item["slot"], item["serial"]) for item in items], dtype=np.int64).reshape(-1, 2)
        except (TypeError, KeyError, IndexError) as error:
            raise TypeError(f"items must be what get_due_samples returned, got {items!r:.80}") from error
        slots, serials = places[:, 0].copy(), places[:, 1].copy()
        if self._worker is None:
            self._apply(slots, serials, scores, float(current_step))
            return
        job = self._worker.submit(self._apply, slots, serials, scores, float(current_step))
        with self._lock:
            self._jobs = [*(old for old in self._jobs if not old.done() or old.exception()), job]

    def flush(self) -> None:
        """Wait until every asynchronous update has taken effect; raise what one of them raised."""
        with self._lock:
            jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.result()

    _settle = flush

    def close(self) -> None:
        """Finish asynchronous updates and end their thread. Any number of times."""
        self.flush()
        if self._worker is not None:
            self._worker.shutdown()

    def __getstate__(self) -> dict[str, Any]:
        self.flush()
        with self._lock:  # other threads go on while the copies are pickled
            copies: dict[str, Any] = {name: copy.deepcopy(vars(self)[name]) for name in ("_columns", "_spread")}
            copies |= {"_experiences": list(self._experiences), "_jobs": [], "_worker": self._worker is not None}
            return {**super().__getstate__(), **copies}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._worker = ThreadPoolExecutor(1, "replay-updates") if state["_worker"] else None

    def _forked(self) -> None:
        super()._forked()
        if self._worker is not None:  # its thread and what it had to do are the parent's
            self._worker, self._jobs = ThreadPoolExecutor(1, "replay-updates"), []

    def _made_with(self) -> dict[str, Any]:
        return {"capacity": self.capacity}

    def _held(self, experiences: bool, *, copy: bool) -> Any:
        return list(self._experiences) if experiences else None

    def _hold(self, state: Mapping[str, Any], before: Mapping[str, Any]) -> None:
        if state["experiences"] is None:
            raise CheckpointError("the state was saved without its experiences: save with experiences=True")
        self._experiences = list(state["experiences"])
        used, held = len(self), {len(self._spread), len(state["columns"]["serial"])}
        if held != {used} or not used <= min(self.capacity, self._added) or self.refused < 0:
            raise ValueError(f"{used} experiences, {held} rows, {self._added} were added, {self.refused} refused")
        self._streams = RandomStreams(self.seed)

    def _apply(self, slots: Indices, serials: Indices, scores: NDArray[np.float64], step: float) -> None:
        known = np.flatnonzero((slots >= 0) & (slots < len(self)))
        slots, serials, scores = slots[known], serials[known], scores[known]
        # The distances, which take long, are worked out before the lock is taken.
        diversity = self.diversities(slots)
        left = np.arange(len(slots))
        while left.size:
            # An item that comes twice is rescheduled twice, in order.
            first = np.unique(slots[left], return_index=True)[1]
            now, left = left[first], np.delete(left, first)
            with self._lock:
                now = now[self._columns["serial"][slots[now]] == serials[now]]
                self._reschedule(slots[now], scores[now], diversity[now], step)

    def _reschedule(
        self, slots: Indices, scores: NDArray[np.float64], diversity: NDArray[np.float64], step: float
    ) -> None:
        columns = self._columns
        bar = self.mastery_threshold + self.uncertainty * self._score_deviation(slots, scores)
        if self.uncertainty:  # who recalls well again must be able to pass
            steady = self._columns["recall_mean"][slots] >= self.mastery_threshold
            np.minimum(bar, self.best_score, out=bar, where=steady)
        mastered = scores >= bar
        easiness = columns["easiness"][slots] + np.where(mastered, _EASIER, _HARDER)
        easiness = np.clip(easiness, _HARDEST, _EASIEST)
        base = np.where(mastered, columns["interval"][slots] * self.multiplier * (easiness - 1.0), 1.0)
        columns["easiness"][slots] = easiness
        columns["interval"][slots] = base / (1.0 + self.alpha * diversity)
        columns["last_review"][slots] = step
        columns["boost"][slots] = 0.0
        columns["spare"][slots] = np.where(mastered, diversity, math.inf)

    def _score_deviation(self, slots: Indices, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Take the scores into their running statistics; return the standard deviations, 0 for a first score."""
        columns = self._columns
        recalls = columns["recalls"][slots]
        share = np.where(recalls > 0, _RECENT, 1.0)
        away = scores - columns["recall_mean"][slots]
        variance = (1.0 - share) * (columns["recall_variance"][slots] + share * away * away)
        columns["recalls"][slots] = recalls + 1
        columns["recall_mean"][slots] += share * away
        columns["recall_variance"][slots] = variance
        return np.asarray(np.sqrt(variance))

    def _slot_to_drop(self, rng: np.random.Generator) -> int | None:
        if self.eviction == "fifo":
            return self._added % self.capacity
        if self.eviction == "reservoir":
            slot = int(rng.integers(self._added + 1))
            return slot if slot < self.capacity else None
        slot = int(self._columns["spare"].argmin())
        if self._columns["spare"][slot] < math.inf:
            return slot
        return int(self._columns["serial"].argmin())

    def _item(self, slot: int) -> ReplayItem:
        shown = ("variance", "interval", "easiness", "last_review", "serial")
        numbers = {name: self._columns[name][slot].item() for name in shown}
        return ReplayItem(self._experiences[slot], self._spread.embeddings[slot].copy(), slot=slot, **numbers)
