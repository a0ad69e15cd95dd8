"""Which samples are wrong rather than hard, from their losses alone.

A network that has learned the rule of a data set contradicts a wrong label with confidence: the
label's loss is then above that of a model that knows nothing, while a sample that is merely hard,
or rare, falls below it once it or its kin were trained on. So every loss is measured in units of
the untrained model's loss (ln K for K balanced classes), and two questions are asked:

* **Who?** The mean of all losses reported so far splits the samples into two groups; the cut lies
  half-way between their medians (within `_CUT` times the untrained loss). From the trial on it is the
  mean of the losses since then, and all before count as one: those were made under a model that
  half believed the wrong labels, while many a right sample has been explained since.
* **Wrong or rare?** The gate. Suspects whose latest losses have fallen below `_TRY` times the
  untrained loss are being learned, and nothing happens. Where there are more of them than the loss
  of the others allows (`noise_cut.agreement`), the model has not got round to a region of the data: wait.
  Otherwise a trial: for two epochs half of the candidates are left out in turn. A loss reported right
  after that is a held-out one; the gate opens where the suspects' held-out losses are above the
  untrained loss, in the mean and mostly, and there are still no more of them than the others allow.
  Where the classes are not known and that is so by a little only, a second trial has to confirm it:
  a part of the data that is learned late looks like wrong labels once, seldom twice. Else it watches
  on, and tries again, up to `_TRIALS` times.

Behind the gate ("cap") a suspect is drawn in every tenth epoch, in rotation, and each return is a
further held-out look: what has fallen is released. From the middle of the budget on suspects stay
out: a tenth of the rate until the end still lets a network memorise much of what is wrong.

What limits it is who is found, not when: leaving out the wrong samples from a third of the budget
on is as good as never having seen them, but each tenth of them that is missed costs a tenth of
the gain or more (benchmarks/LOG.md).

The published relatives train two networks (DivideMix, Li et al. 2020) or weigh the loss (Arazo et
al. 2019, "Unsupervised label noise modeling and loss correction"); here only draws change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.arrays import largest, read_only
from learnit_r8.core.state import Saved, finite, mask, maybe, part, table
from learnit_r8.noise.cut import Classes, LossesSince, agreement, even_loss, half_way
from learnit_r8.samples.catalog import LossCatalog
from learnit_r8.types import Indices, Losses, Mask

START = 0.1
"""Share of the budget before which nobody is suspected: the losses do not tell yet."""

START_UNTRIED = 0.2
"""The same for "report", which has no trial; until then "cap" lets no strategy seek high losses either."""

START_ATTRIBUTED = 0.5
"""The same where one loss a batch is reported: estimates of single samples take many epochs."""

_RATE, _UNTIL = 0.1, 0.5
"""Rate at which suspects are drawn, and the share of the budget after which it is zero."""
_TRY, _OPEN = 0.9, 1.0
"""Suspects' mean loss, in untrained losses, from which a trial is made and the gate opens."""
_CUT = (0.6, 1.0)
"""Range of the cut between suspects and the others, in untrained losses."""
_OPEN_ATTRIBUTED, _CUT_ATTRIBUTED = 0.5, (0.3, 1.0)
"""The same for estimates from batch losses, which lie nearer together; there is no trial."""
_AGREE = 1.05
"""Agreement (see `noise_cut.agreement`) from which there is a trial."""
_CANDIDATE = 0.6
"""Mean loss, in untrained losses, from which a sample takes part in the trial."""
_MIN_USES = 5
"""Times that samples were trained on, on average, before a trial: until then rare ones were hardly seen."""
_SEEKING = 0.5
"""Under a strategy that seeks high losses also samples above this share of the cut are left out,
without being called suspects, and suspects at once for good: it finds every wrong one that is left."""
_EVIDENCE = 0.6
"""Share of the suspects whose held-out loss is above the untrained one, times the agreement, that opens the gate."""
_SURE, _SURE_AGREED, _UNTAUGHT = 0.9, 1.2, 1.8
"""The same product, or an agreement, from which one trial is enough without classes; and an agreement above which it
never is: the others' losses are so high then that the model has learned little yet."""
_CONFIRMED = 0.7
"""Share of the suspects whose held-out loss is above the untrained one in a second trial that opens the gate."""
_TRIALS = 3
"""Trials, before the middle of the budget, after which the gate stays shut."""
_LEVEL_OPEN = 0.15
"""Quantile of a class's losses that is its level behind the gate. Before, it is the median: that keeps the gate shut
where a class is merely hard. But most labels of a small class may be wrong, and its median with them."""
_MOST = 0.5
"""More suspects than this share of the data set are none."""
_FIRST_STEPS = 4
"""Steps whose losses count as the untrained model's."""
_NAMED = 100
"""Suspects that a report lists."""

Scores = NDArray[np.float32]
Decision = tuple[str, str, float]
"""What was decided about the gate, why, and the figure."""


class Stage(StrEnum):
    """Where the guard stands."""

    WATCHING = "watching"
    TRIAL_1 = "trial, first half"
    TRIAL_2 = "trial, second half"
    OPEN = "open"
    SHUT = "shut"


@dataclass(frozen=True, slots=True, eq=False)
class GuardReport:
    """What a refit found.

    Attributes:
        indices: Suspects, worst first, int64; the first hundred of them.
        losses: Their scores, float32.
        count: How many there are.
        changed: The set of suspects is another than after the last refit.
        decision: What was decided about the gate, or "" when it stays as it was.
        reason: Why.
        figure: The suspects' loss in untrained losses that decided it.
    """

    indices: Indices
    losses: Losses
    count: int
    changed: bool
    decision: str
    reason: str
    figure: float


_MASK = mask(lambda guard: guard.num_samples)


class NoiseGuard(Saved):
    """Names wrong samples and keeps them out of epochs.

    It owns 10 bytes a sample from the trial on, one before it.

    Args:
        mode: "off"; "report": name suspects, change nothing; "cap": also leave them out.
        num_samples: Size N of the data set.
        groups: Class of each sample, int `[N]`: losses are then compared within classes, and
            classes of fewer than 20 samples are left alone.
        seeking: The strategy draws samples of high loss more often than others.

    Attributes:
        untrained: Loss of a model that knows nothing; NaN until the first epoch has ended.
    """

    _saved = table(
        untrained=finite(math.nan),
        stage=Stage,
        turn=float,
        trials=int,
        confirming=bool,
        suspect=_MASK,
        doubtful=maybe(_MASK),
        candidate=maybe(_MASK),
        phase=maybe(np.uint8),
        since=maybe(part(lambda *_: LossesSince(np.empty(0, np.float32), np.empty(0, np.uint32)))),
    )

    def __init__(
        self, mode: str, num_samples: int, groups: NDArray[np.integer[Any]] | None = None, *, seeking: bool = False
    ) -> None:
        self.mode = mode
        self._seeking = seeking
        self.num_samples = num_samples
        self.untrained = math.nan
        self._classes = None if groups is None else Classes(groups)
        self._stage = Stage.WATCHING
        self._suspect = np.zeros(num_samples, np.bool_)
        self._doubtful: Mask | None = None  # the suspects, and with `seeking` those that come near
        self._candidate: Mask | None = None
        self._phase: NDArray[np.uint8] | None = None
        self._since: LossesSince | None = None
        self._turn = 0.0
        self._trials = 0
        self._confirming = False  # the trial is a second one

    @property
    def flagged(self) -> Mask:
        """The current suspects, bool `[N]`, read-only."""
        return read_only(self._suspect)

    def undecided(self, progress: float) -> bool:
        """Whether every sample should be drawn alike for now: "cap" has yet to judge them.

        A strategy that seeks high losses would teach the model the wrong labels before they can
        be told from hard ones.
        """
        early = progress < START_UNTRIED - 1e-9
        return self.mode == "cap" and (early or self._stage in (Stage.TRIAL_1, Stage.TRIAL_2))

    # The loop calls these -----------------------------------------------------------------

    def grow(self, num_samples: int, groups: NDArray[np.integer[Any]] | None, state: Mapping[str, Any]) -> None:
        """Watch more samples, from its state with these in it."""
        self.num_samples = num_samples
        self._classes = None if groups is None else Classes(groups)
        self.load_state_dict(state)

    def forget(self, ids: Indices) -> None:
        """Suspect some samples no more: their labels were changed."""
        for known in (self._suspect, self._doubtful, self._candidate):
            if known is not None:
                known[ids] = False
        if self._since is not None:
            self._since.forget(ids)

    def start_epoch(self, catalog: LossCatalog, progress: float, rng: np.random.Generator) -> Mask | None:
        """Return the samples to leave out of this epoch, bool `[N]`, or None."""
        if self.mode != "cap" or self._stage in (Stage.WATCHING, Stage.SHUT):
            return None
        if self._phase is None:
            self._phase = rng.integers(0, 256, self.num_samples, np.uint8)
        if self._stage in (Stage.TRIAL_1, Stage.TRIAL_2):
            assert self._candidate is not None
            mask = self._candidate & (self._phase % 2 == (self._stage is Stage.TRIAL_2))
        else:
            rate = _RATE if progress < _UNTIL and not self._seeking else 0.0
            turns = self._phase.astype(np.float32) / 256 + np.float32(self._turn % 1)
            self._turn += rate
            doubtful = self._suspect if self._doubtful is None else self._doubtful
            mask = doubtful & (np.floor(turns + np.float32(rate)) == np.floor(turns))
            if self._candidate is not None:  # the second half of the trial is looked at now
                mask &= self._phase % 2 == 0
                self._candidate = None
        return mask if mask.any() else None

    def end_epoch(self, catalog: LossCatalog, progress: float) -> GuardReport | None:
        """Take an epoch's losses and think again, at this share of the budget; None while there is nothing to say."""
        if self.mode == "off":
            return None
        if math.isnan(self.untrained):
            self.untrained = self._untrained(catalog)
        start, cuts = START if self.mode == "cap" else START_UNTRIED, _CUT
        if catalog.attributed:
            start, cuts = START_ATTRIBUTED, _CUT_ATTRIBUTED
        if progress < start - 1e-9 or math.isnan(self.untrained):
            return None
        if self.untrained <= 0:
            return self._give_up()
        scores = self._scores(catalog)
        judged = catalog.uses > 0
        if self._classes is not None:
            judged &= self._classes.large
        cut = half_way(scores[judged], cuts[0] * self.untrained, cuts[1] * self.untrained)
        found = self._above(cut, scores, judged)
        decision, reason, figure = self._decide(catalog, progress, found, judged) or ("", "", math.nan)
        if self._stage is not Stage.OPEN:
            found = np.zeros_like(found)
        elif catalog.attributed and self.mode == "cap":
            # Left out, suspects are not heard of again, and all estimates move with the level of the rest.
            both = found | self._suspect
            found = both if np.count_nonzero(both) <= _MOST * self.num_samples else self._suspect
        if self._stage is Stage.OPEN and self._seeking:
            self._doubtful = found | self._above(_SEEKING * cut, scores, judged)
        changed = bool(np.any(found != self._suspect))
        self._suspect = found
        if not changed and not decision:
            return None
        suspects = np.flatnonzero(found)
        count = len(suspects)
        worst = suspects[largest(scores[suspects], min(count, _NAMED))]
        return GuardReport(worst, scores[worst], count, changed, decision, reason, figure)

    def _give_up(self) -> GuardReport | None:
        """Say once that these losses cannot be judged, to who asked for suspects to be kept out."""
        if self.mode != "cap" or self._stage is Stage.SHUT:
            return None
        self._stage = Stage.SHUT
        why = "losses of the untrained model are not above 0: they do not tell wrong samples from right ones"
        nobody = np.empty(0, np.int64)
        return GuardReport(nobody, nobody.astype(np.float32), 0, False, "noise guard shut", why, self.untrained)

    # How it decides -----------------------------------------------------------------------

    def _untrained(self, catalog: LossCatalog) -> float:
        """Return the loss of a model that knows nothing, or NaN while nothing was seen.

        That is the entropy of the classes where they are known.
        """
        first = (catalog.uses == 1) & (catalog.last_seen < _FIRST_STEPS)
        if not first.any():
            return math.nan
        losses = catalog.mean_loss[first]
        mean = float(np.mean(losses, dtype=np.float64))
        if self._classes is not None and mean < 4 * self._classes.entropy:
            return self._classes.entropy  # right for a model that was trained before, too
        return mean if catalog.attributed else even_loss(losses)

    def _scores(self, catalog: LossCatalog) -> Scores:
        """Return how wrong each sample looks, in units of the loss, float32 `[N]`.

        That is its mean loss; from the trial on the mean of the losses since, with that of all the
        losses before as one more.
        """
        scores = np.array(catalog.expected_loss if catalog.attributed else catalog.mean_loss, np.float32)
        if self._since is not None:
            scores = self._since.scores(catalog)
        if self._classes is not None:
            scores -= self._classes.excess(scores, _LEVEL_OPEN if self._stage is Stage.OPEN else 0.5)
        return scores

    def _above(self, cut: float, scores: Scores, judged: Mask) -> Mask:
        """Return the samples above a cut, bool `[N]`; none where they are most of the data set."""
        found: Mask = (scores > cut) & judged
        return found if np.count_nonzero(found) <= _MOST * self.num_samples else np.zeros_like(found)

    def _decide(self, catalog: LossCatalog, progress: float, found: Mask, judged: Mask) -> Decision | None:
        """Move to the next stage; return what was decided about the gate."""
        if self._stage is Stage.TRIAL_1:
            self._stage = Stage.TRIAL_2
            return None
        if self._stage is Stage.TRIAL_2:
            return self._end_trial(catalog, found, judged)
        if self._stage is not Stage.WATCHING or not found.any():
            return None
        level = float(np.mean(catalog.expected_loss[found], dtype=np.float64)) / self.untrained
        why = f"suspects' loss stays at {level:.2f} of the untrained one"
        why += ", by estimates from one loss a batch, which are weak" if catalog.attributed else ""
        at_once = catalog.attributed or self.mode == "report"
        if at_once:
            ripe = level > (_OPEN_ATTRIBUTED if catalog.attributed else _OPEN)
        else:
            ripe = level > _TRY and progress <= _UNTIL and float(np.mean(catalog.uses)) >= _MIN_USES
        if not ripe or (not catalog.attributed and self._agreement(catalog, found, judged) < _AGREE):
            return None
        if at_once:
            self._stage = Stage.OPEN
            return "noise guard open" if self.mode == "cap" else "suspects named", why, level
        self._begin_trial(catalog, judged)
        return "noise trial", why, level

    def _begin_trial(self, catalog: LossCatalog, judged: Mask) -> None:
        self._stage = Stage.TRIAL_1
        self._since = LossesSince(catalog.mean_loss, catalog.uses)
        self._candidate = judged & (self._scores(catalog) > _CANDIDATE * self.untrained)

    def _end_trial(self, catalog: LossCatalog, found: Mask, judged: Mask) -> Decision:
        """Open the gate, ask again, or watch on."""
        assert self._candidate is not None
        assert self._phase is not None
        assert self._since is not None
        held = self._since.means(catalog, found & self._candidate & (self._phase % 2 == 0)) / self.untrained
        level, above = (float(np.mean(held)), float(np.mean(held > 1))) if len(held) else (0.0, 0.0)
        figures = f"left out, suspects have {level:.2f} of the untrained loss"
        agreed = self._agreement(catalog, found, judged)
        evidence = above * agreed
        if level > _OPEN and (above > _CONFIRMED if self._confirming else evidence > _EVIDENCE):
            sure = (evidence >= _SURE or agreed >= _SURE_AGREED) and agreed <= _UNTAUGHT
            if sure or self._classes is not None or self._confirming:
                self._stage, self._confirming = Stage.OPEN, False
                hint = "" if self._classes is not None else "; pass groups= if some classes are rare"
                return "noise guard open", figures + hint, level
            self._confirming = True
            self._begin_trial(catalog, judged)
            return "noise trial again", figures, level
        self._trials += 1
        self._stage = Stage.WATCHING if self._trials < _TRIALS else Stage.SHUT
        self._since, self._candidate, self._confirming = None, None, False
        if level > _OPEN:
            return "noise guard shut", f"{figures}, but not most", level
        return "noise guard shut", f"suspects were rare or hard: left out, they fell to {level:.2f}", level

    def _agreement(self, catalog: LossCatalog, found: Mask, judged: Mask) -> float:
        bounds = _CUT[0] * self.untrained, _CUT[1] * self.untrained
        return agreement(catalog.expected_loss[judged], int(np.count_nonzero(found)), *bounds)
