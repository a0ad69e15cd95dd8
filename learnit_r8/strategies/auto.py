"""Seek the hard samples where that pays, avoid those that nothing explains. Experimental.

Theory. A high loss has two causes: the sample is hard and can be learned, or its target is wrong
(or pure chance). Training on it hides the difference; leaving it out shows it. The loss of a
sample that was not drawn for a while, over the loss of the untrained model, is its *held-out
ratio*: near 0 where its like explain it, 1 or more where nothing does. The same quantity is
behind RHO-LOSS (Mindermann et al. 2022, "Prioritized Training on Points that are Learnable,
Worth Learning, and Not Yet Learnt"), which needs a second model and held-out data for it.

1. Probes. Part of the samples of high mean loss is left out for an epoch, another part in the
   next; the first loss after the return is the measurement. Every draw after an absence counts.
2. Avoid. A sample fails where its first measurement is nearer to the untrained loss than to the
   median one (later ones follow more training on the sample itself). A decision stump over the
   rank of the mean loss: the cut above which failures outnumber passes, which count twice, by the
   most. What is above it and did not pass is a suspect, and is drawn less. Each return is a further
   measurement: a suspect that passes is none any more, one that fails again is hardly drawn.
3. Seek. Of those that are not suspects, the harder half of the measured ones: the lower their
   mean held-out ratio, the more the draw leans to `expected loss ** alpha`, over at least a fifth of
   uniform draws. Weights stay 1: the bias is the purpose.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.config import Problems
from learnit_r8.core.state import Kind, each, maybe, row, table
from learnit_r8.strategies.base import BatchRequest, Draw, builtin
from learnit_r8.strategies.weighting import Floats, MixtureSampler, WeightedStrategy, fill_unseen
from learnit_r8.types import LossReport, Mask

_UNTRAINED_BATCHES = 8
_FAILS = 0.6
"""Where between the median loss (0) and the untrained loss (1) an unexplained sample's held-out loss begins."""
_SEEK_FULLY, _SEEK_NOT = 0.08, 0.15
"""Mean held-out ratio of the hard samples below which they are sought fully, above which not at all."""
_PROBED = 0.4
"""Share of the samples, those of highest mean loss, that probes are taken from."""
_PROBE = 0.15
"""Share of these that is left out at a time."""
_FIRST, _LAST = 0.1, 0.4
"""Share of the budget at which probes begin and end."""
_AVOIDED, _DOUBTED = 0.03, 0.3
"""Rate at which suspects are drawn, and until they failed `_CONFIRMED` times in a row."""
_CONFIRMED = 2
_PASS = 2
"""Failures that a pass above the cut weighs as much as."""
_LEAST_MAJORITY = 6
"""Failures above the cut, less passes by their weight, that make suspects."""
_FEWEST = 4
"""Measured samples that allow a decision to seek."""
_TOLD_CHANGE = 0.25
"""Least change of the seeking that is told."""


_COLUMNS = Kind(
    lambda _, columns: {name: column.copy() for name, column in columns.items()},
    lambda _, saved: {name: np.array(column) for name, column in saved.items()},
)


@builtin("auto")
class Auto(WeightedStrategy):
    """Leans to hard samples as far as they turn out learnable; avoids the unexplained. Experimental.

    It needs one loss per sample; from one number a batch it stays uniform, and says so. What it
    decides it reports as `StrategyDecided` events.

    Args:
        alpha: Exponent of the expected loss in the draw; 0 never seeks.
        avoid: Whether suspects are drawn less; False: only seek.
    """

    _saved = table(
        untrained=each(float),
        per_sample=bool,
        samples=maybe(_COLUMNS),
        level=float,
        progress=float,
        strength=float,
        told=maybe(row(str, float)),
        decisions=each(row(str, str, float)),
    )

    def __init__(self, *, alpha: float = 0.8, avoid: bool = True) -> None:
        problems = Problems()
        self.alpha = problems.real("alpha", alpha, 0.0, 4.0)
        self.avoid = problems.flag("avoid", avoid)
        problems.raise_if_any()
        self._untrained: list[float] = []
        self._per_sample = True
        self._samples: dict[str, NDArray[Any]] | None = None
        self._level = 0.0  # median loss over the untrained one, at the epoch's start
        self._strength = 0.0
        self._progress = 0.0  # of the budget, at the epoch's start
        self._told: tuple[str, float] | None = None
        self._decisions: list[tuple[str, str, float]] = []
        super().__init__()

    # Each epoch ---------------------------------------------------------------------------

    def start_epoch(self, request: BatchRequest) -> int:  # type: ignore[override]
        """Judge what was measured, choose the probes, and set the weights; return how many samples to draw."""
        arrays = self._arrays(request.num_samples)
        barred = np.zeros(request.num_samples, bool) if request.excluded is None else request.excluded
        arrays["away"] += arrays["away"] < 255
        ranks = _ranks(request.catalog.mean_loss, request.catalog.uses)
        np.copyto(arrays["rank"], ranks, where=arrays["away"] <= 1)  # an absent one's mean stays while others fall
        if self._reference > 0:
            self._level = float(np.median(request.catalog.expected_loss)) / self._reference
        self._progress = request.progress
        if request.progress >= _FIRST:
            self._decide(arrays)
        hidden = self._probe(arrays, request, barred)
        suspect = arrays["suspect"]
        rate = np.where(arrays["fails"] >= _CONFIRMED, _AVOIDED, _DOUBTED)
        hidden |= suspect & (request.rng.random(request.num_samples) >= rate)
        if (hidden | barred).all():
            hidden[:] = False
        self._sampler = self._sampler or MixtureSampler(request.num_samples)
        self._sampler.restart(self._weights(request, suspect), request.rng, hidden | barred)
        return int(np.count_nonzero(~barred))

    def _arrays(self, count: int) -> dict[str, NDArray[Any]]:
        if self._samples is None:
            self._samples = {
                "away": np.zeros(count, np.uint8),  # epochs since it was drawn
                "held": np.full(count, np.nan, np.float32),  # held-out ratio, the last time
                "failed": np.zeros(count, bool),  # it was unexplained, the first time or as a suspect
                "fails": np.zeros(count, np.uint8),  # times in a row
                "rank": np.zeros(count, np.float32),  # of the mean loss, 0 to 1, after it was drawn last
                "rank_first": np.zeros(count, np.float32),  # the same before the first measurement
                "rank_held": np.zeros(count, np.float32),  # before the last one
                "suspect": np.zeros(count, bool),
            }
        return self._samples

    def _probe(self, arrays: dict[str, NDArray[Any]], request: BatchRequest, barred: Mask) -> Mask:
        """Return the samples that this epoch leaves out to measure them."""
        hidden = np.zeros(request.num_samples, bool)
        if self._measuring and _FIRST <= request.progress < _LAST:
            pool = np.flatnonzero(
                (arrays["rank"] >= 1 - _PROBED) & np.isnan(arrays["held"]) & ~arrays["suspect"] & ~barred
            )
            size = int(_PROBED * _PROBE * request.num_samples)
            hidden[request.rng.permutation(pool)[:size]] = True
        return hidden

    @property
    def _measuring(self) -> bool:
        return self._per_sample and self._reference > 0

    @property
    def _reference(self) -> float:
        """Loss of the untrained model; 0 while unknown."""
        return sum(self._untrained) / len(self._untrained) if self._untrained else 0.0

    def _weights(self, request: BatchRequest, suspect: Mask) -> Floats:
        losses = np.maximum(fill_unseen(request.catalog.expected_loss, request.catalog.uses), 0.0)
        sought = losses**self.alpha
        mean = float(sought[~suspect].mean()) if not suspect.all() else 0.0
        if self._strength == 0 or mean <= 0:
            return np.ones(len(losses))
        return np.where(suspect, 1.0, self._strength * sought / mean + 1 - self._strength)

    # Decisions ----------------------------------------------------------------------------

    def _decide(self, arrays: dict[str, NDArray[Any]]) -> None:
        if not self._measuring:
            self._strength = 0.0
            reason = "the untrained loss is not above 0" if self._per_sample else "one loss per sample is needed"
            self._tell("uniform", reason, self._reference)
            return
        measured = np.flatnonzero(~np.isnan(arrays["held"]))
        if len(measured) < _FEWEST:
            return
        if self.avoid:
            self._suspect(arrays, measured)
        held, rank = arrays["held"][measured], arrays["rank_held"][measured]
        fair = ~arrays["suspect"][measured] & (rank >= 1 - _PROBED)
        hard, order = held[fair], rank[fair]
        figure = float("nan")  # too few are left to tell
        self._strength = 0.0
        if len(hard) >= _FEWEST:
            figure = float(hard[order >= np.median(order)].mean(dtype=np.float64))
            self._strength = float(np.clip((_SEEK_NOT - figure) / (_SEEK_NOT - _SEEK_FULLY), 0.0, 1.0))
        self._announce(int(arrays["suspect"].sum()), len(held), figure)

    def _suspect(self, arrays: dict[str, NDArray[Any]], measured: NDArray[np.int64]) -> None:
        """Mark the unexplained."""
        rank = arrays["rank_first"][measured]
        failed = arrays["failed"][measured]
        cut = _stump(rank, failed)
        suspect = arrays["rank"] >= cut
        suspect[measured] = failed & (rank >= cut)
        # Where most is unexplained, the model is to blame.
        arrays["suspect"] = suspect & (2 * np.count_nonzero(suspect) <= len(suspect))

    def _announce(self, suspects: int, measured: int, figure: float) -> None:
        kind = "seek hard samples" if self._strength >= _TOLD_CHANGE else "uniform"
        avoided = ", avoid unexplained ones" if suspects else ""
        reason = (
            f"left out, hard samples have {figure:.2f} of the untrained loss ({measured} measured, {suspects} "
            f"unexplained): seeking at {self._strength:.0%}"
        )
        self._tell(kind + avoided, reason, figure)

    def _tell(self, decision: str, reason: str, figure: float) -> None:
        told = self._told
        if told is None or told[0] != decision or abs(told[1] - self._strength) >= _TOLD_CHANGE:
            self._told = decision, self._strength
            self._decisions.append((decision, reason, figure))

    def pop_decisions(self) -> list[tuple[str, str, float]]:
        """Return (decision, reason, held-out ratio) of each decision since the last call."""
        decisions, self._decisions = self._decisions, []
        return decisions

    # Each batch ---------------------------------------------------------------------------

    def draw(self, request: BatchRequest) -> Draw:
        """Return a batch, with weights of 1; samples of low loss where only stable ones are wanted."""
        indices = super().draw(request).indices
        return Draw(indices, weights=np.ones(len(indices), np.float32))

    def observe(self, report: LossReport) -> None:
        """Note the untrained loss, and the losses of samples that come back."""
        self._per_sample = report.per_sample
        if len(self._untrained) < _UNTRAINED_BATCHES:
            self._untrained.append(float(report.loss))
        if self._samples is None or not self._measuring:
            return
        away = self._samples["away"]
        back = away[report.indices] > 1
        away[report.indices] = 0
        if back.any() and self._progress >= _FIRST:
            ids = report.indices[back]
            samples = self._samples
            ratios = report.losses[back] / self._reference
            first = np.isnan(samples["held"][ids])
            samples["held"][ids] = ratios
            judged = first | samples["suspect"][ids]
            failed = ratios > self._level + _FAILS * (1 - self._level)
            samples["failed"][ids[judged]] = failed[judged]
            samples["fails"][ids] = np.where(failed, np.minimum(samples["fails"][ids], 250) + 1, 0)
            samples["rank_first"][ids[first]] = samples["rank"][ids[first]]
            samples["rank_held"][ids] = samples["rank"][ids]


def _ranks(mean_loss: NDArray[np.float32], uses: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Return each sample's rank by mean loss, from 0 to 1; unseen ones lowest."""
    order = np.argsort(np.where(uses > 0, mean_loss, -np.inf), kind="stable")
    ranks = np.empty(len(order), np.float32)
    ranks[order] = (np.arange(len(order)) + 0.5) / len(order)
    return ranks


def _stump(rank: NDArray[np.float32], failed: Mask) -> float:
    """Return the rank above which failures most outnumber passes by their weight; infinity without a clear majority."""
    order = np.argsort(-rank, kind="stable")
    majority = np.cumsum(np.where(failed[order], 1, -_PASS))
    best = int(np.argmax(majority))
    return float(rank[order][best]) if majority[best] >= _LEAST_MAJORITY else np.inf
