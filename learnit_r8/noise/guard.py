"""Which samples are wrong rather than hard, from their losses.

A network learns what many samples agree on before it learns single ones by heart. Two questions:

* **Who?** The mean of all losses reported so far splits the samples into two groups, with the least
  variance within each (`cut.two_groups`). It ranks wrong labels as well as held-out predictions of a
  cross-validation do, also where each class is taken for one other or for the one it resembles
  (benchmarks/LOG.md).
* **Wrong or hard?** The gate. Any data have an upper group. It is believed where it stays at a high
  loss though it is trained on, while even the best known samples are not given all probability
  (`cut.evidence`): at two ends of epochs in a row, since while little is learned yet all losses are
  high, and soon after, hard ones are not.

Behind the gate ("cap") suspects, and who comes near, are drawn in every fifth epoch, in rotation, and each
return is a held-out look: from then on scores are means of the losses since, all before counting as one,
and what has fallen is released. From the middle of the budget on they stay out: a low rate until the end
still lets a network memorise much of what is wrong.

What limits it is who is found, not when: leaving out the wrong samples from a third of the budget
on is as good as never having seen them, but each tenth of them that is missed costs a tenth of
the gain or more.

The published relatives train two networks (DivideMix, Li et al. 2020) or weigh the loss (Arazo et
al. 2019, "Unsupervised label noise modeling and loss correction"); here only draws change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.arrays import largest, read_only
from learnit_r8.core.state import Saved, mask, maybe, part, table
from learnit_r8.noise.cut import Classes, LossesSince, evidence, two_groups
from learnit_r8.noise.votes import Votes
from learnit_r8.samples.catalog import LossCatalog
from learnit_r8.types import Indices, Losses, Mask

START = 0.1
"""Share of the budget before which nobody is suspected: the losses do not tell yet."""

ALIKE = 0.2
"""Share of the budget until which, and until it has judged, "cap" lets no strategy seek high losses."""

START_ATTRIBUTED = 0.5
"""The first, where one loss a batch is reported: estimates of single samples take many epochs."""

_USES, _OPEN = 8, 1.5
"""Times that samples were trained on, on average, and evidence (see `cut.evidence`) from which the gate opens."""
_USES_CLASSES, _OPEN_CLASSES = 6, 1.0
"""The same where classes are known. Else rare ones, which are learned late, look like wrong labels for longer."""
_PARTED = 0.69
"""Share of the scores' variance between the two groups from which they are two, rather than one with a tail: where
classes overlap a network lacks certainty, too."""
_LEAST = 3
"""Times that a sample was trained on before it is judged: the first losses of new and relabelled ones are high."""
_OPEN_ATTRIBUTED = 0.8
"""Evidence for estimates from batch losses, which lie nearer together; once is enough, as they follow each other."""
_RATE, _RATE_SEEKING, _UNTIL = 0.2, 0.1, 0.5
"""Rate at which suspects are drawn, the same under a strategy that seeks high losses, which draws those it may more
than once, and the share of the budget after which it is zero."""
_LATEST = 0.75
"""Share of the budget after which "cap" opens no gate: little would be won."""
_NEAR, _NEAR_SEEKING = 0.7, 1.0
"""Samples above this share of the cut are left out, too, without being called suspects: a wrong one that is missed
costs more than a right one that is not drawn. A strategy that seeks high losses needs its hard samples."""
_LEVEL_OPEN = 0.15
"""Quantile of a class's losses that is its level behind the gate. Before, it is the median: that keeps the gate shut
where a class is merely hard. But most labels of a small class may be wrong, and its median with them."""
_MOST = 0.5
"""More suspects than this share of the data set are none."""
_NAMED = 100
"""Suspects that a report lists."""


class Stage(StrEnum):
    """Where the guard stands."""

    WATCHING = "watching"
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
        figure: The evidence that decided it (see `noise.cut.evidence`).
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

    It owns 11 bytes a sample, and 5 more where predictions are reported.

    Args:
        mode: "off"; "report": name suspects, change nothing; "cap": also leave them out.
        num_samples: Size N of the data set.
        groups: Class of each sample, int `[N]`: losses are then compared within classes, and
            classes of fewer than 20 samples are left alone.
        seeking: The strategy draws samples of high loss more often than others.
    """

    _saved = table(
        stage=Stage,
        turn=float,
        before=float,
        judged=bool,
        suspect=_MASK,
        doubtful=maybe(_MASK),
        phase=maybe(np.uint8),
        since=maybe(part(lambda *_: LossesSince(np.empty(0, np.float32), np.empty(0, np.uint32)))),
        votes=maybe(part(lambda guard, _: Votes(guard.num_samples, None))),
    )

    def __init__(
        self, mode: str, num_samples: int, groups: NDArray[np.integer[Any]] | None = None, *, seeking: bool = False
    ) -> None:
        self.mode = mode
        self._near, self._rate = (_NEAR_SEEKING, _RATE_SEEKING) if seeking else (_NEAR, _RATE)
        self.num_samples = num_samples
        self._groups = groups
        self._classes = None if groups is None else Classes(groups)
        self._needed, self._open = (_USES, _OPEN) if groups is None else (_USES_CLASSES, _OPEN_CLASSES)
        self._stage = Stage.WATCHING
        self._suspect = np.zeros(num_samples, np.bool_)
        self._doubtful: Mask | None = None  # the suspects and those that come near
        self._phase: NDArray[np.uint8] | None = None
        self._since: LossesSince | None = None  # the last end of an epoch; behind the gate, its opening
        self._before = 0.0  # the evidence at the last end of an epoch
        self._judged = False  # samples were trained on often enough
        self._turn = 0.0
        self._votes: Votes | None = None

    @property
    def flagged(self) -> Mask:
        """The current suspects, bool `[N]`, read-only."""
        return read_only(self._suspect)

    def undecided(self, progress: float) -> bool:
        """Whether every sample should be drawn alike for now: "cap" has yet to judge them.

        A strategy that seeks high losses would teach the model the wrong labels before they can
        be told from hard ones.
        """
        watching = self.mode == "cap" and self._stage is Stage.WATCHING
        return watching and (progress < ALIKE - 1e-9 or not self._judged)

    # The loop calls these -----------------------------------------------------------------

    def forget(self, ids: Indices) -> None:
        """Suspect some samples no more: their labels were changed."""
        for known in (self._suspect, self._doubtful):
            if known is not None:
                known[ids] = False
        for kept in (self._since, self._votes):
            if kept is not None:
                kept.forget(ids)

    def grow(self, num_samples: int, groups: NDArray[np.integer[Any]] | None, state: Mapping[str, Any]) -> None:
        """Watch more samples, from its state with these in it."""
        self.num_samples = num_samples
        self._groups, self._classes = groups, None if groups is None else Classes(groups)
        self.load_state_dict(state)

    def start_epoch(self, progress: float, rng: np.random.Generator) -> Mask | None:
        """Return the samples to leave out of this epoch, bool `[N]`, or None."""
        if self.mode != "cap" or self._stage is not Stage.OPEN:
            return None
        if self._phase is None:
            self._phase = rng.integers(0, 256, self.num_samples, np.uint8)
        rate = self._rate if progress < _UNTIL else 0.0
        turns = self._phase.astype(np.float32) / 256 + np.float32(self._turn % 1)
        self._turn += rate
        doubtful = self._suspect if self._doubtful is None else self._doubtful
        mask = doubtful & (np.floor(turns + np.float32(rate)) == np.floor(turns))
        return mask if mask.any() else None

    def end_epoch(self, catalog: LossCatalog, progress: float) -> GuardReport | None:
        """Take an epoch's losses and think again, at this share of the budget; None while there is nothing to say."""
        if self.mode == "off" or self._stage is Stage.SHUT or not catalog.num_seen:
            return None
        scores, judged = self._scores(catalog), catalog.uses >= _LEAST
        if self._classes is not None:
            judged &= self._classes.large
        if not judged.any():
            return None
        cut, parted = two_groups(scores[judged])
        found = self._above(cut, scores, judged)
        decision, reason, figure = "", "", 0.0
        if self._stage is Stage.WATCHING:
            decision, reason, figure = self._decide(catalog, progress, found, judged, parted)
        if self._stage is not Stage.OPEN:
            found = np.zeros_like(found)
        elif catalog.attributed and self.mode == "cap":
            # Left out, suspects are not heard of again, and all estimates move with the level of the rest.
            both = found | self._suspect
            found = both if np.count_nonzero(both) <= _MOST * self.num_samples else self._suspect
        if self._stage is Stage.OPEN and self.mode == "cap":
            near = found if catalog.attributed else self._above(self._near * cut, scores, judged)
            self._doubtful = found | near
        changed = bool(np.any(found != self._suspect))
        self._suspect = found
        if not changed and not decision:
            return None
        suspects = np.flatnonzero(found)
        count = len(suspects)
        worst = suspects[largest(scores[suspects], min(count, _NAMED))]
        return GuardReport(worst, scores[worst], count, changed, decision, reason, figure)

    # How it decides -----------------------------------------------------------------------

    def _scores(self, catalog: LossCatalog) -> Losses:
        """Return how wrong each sample looks, in units of the loss, float32 `[N]`.

        That is its mean loss; once suspects are left out the mean of the losses since, with that of all the
        losses before as one more.
        """
        scores = np.array(catalog.expected_loss if catalog.attributed else catalog.mean_loss, np.float32)
        if self._stage is Stage.OPEN and self._since is not None:
            scores = self._since.scores(catalog)
        return self._within(scores, _LEVEL_OPEN if self._stage is Stage.OPEN else 0.5)

    def _within(self, losses: Losses, level: float) -> Losses:
        return losses if self._classes is None else losses - self._classes.excess(losses, level)

    def _above(self, cut: float, scores: Losses, judged: Mask) -> Mask:
        """Return the samples above a cut, bool `[N]`; none where they are most of the data set."""
        found: Mask = (scores > cut) & judged
        return found if np.count_nonzero(found) <= _MOST * self.num_samples else np.zeros_like(found)

    def _decide(
        self, catalog: LossCatalog, progress: float, found: Mask, judged: Mask, parted: float
    ) -> tuple[str, str, float]:
        """Open the gate, shut it for good, or watch on; return what was decided, why, and the evidence."""
        latest = catalog.expected_loss if catalog.attributed else self._latest(catalog)
        heard = judged & np.isfinite(latest)
        latest = np.where(heard, latest, np.float32(0))
        negative = heard.any() and float(np.quantile(latest[heard], 0.25)) < 0
        latest = np.maximum(self._within(latest, 0.5), 0)
        figure = evidence(latest[found & heard], latest[heard])
        before, self._before = self._before, figure
        start = START_ATTRIBUTED if catalog.attributed else START
        uses = float(np.mean(catalog.uses))
        if progress < start - 1e-9 or uses < self._needed:
            if self.mode == "cap" and progress > 1 - 1e-9:  # a resume with a larger budget judges yet
                why = f"samples were trained on {uses:.1f} times on average, {self._needed} tell wrong ones from hard"
                return "noise guard judged nobody", why, figure
            return "", "", figure
        self._judged = True
        if negative:
            return self._shut("losses below 0 do not tell wrong samples from hard ones", figure)
        late = self.mode == "cap" and progress > _LATEST and not catalog.attributed
        least = _OPEN_ATTRIBUTED if catalog.attributed else self._open
        enough = figure > least if catalog.attributed else min(before, figure) > least and parted > _PARTED
        if enough and not late:
            self._stage = Stage.OPEN
            kept = self.mode == "cap" and not catalog.attributed
            self._since = LossesSince(catalog.mean_loss, catalog.uses) if kept else None
            why = f"the evidence for wrong labels is {figure:.2f} ({least}), two groups explain {parted:.0%} of them"
            why = f"{why}, by estimates from one loss a batch, which are weak" if catalog.attributed else why
            hint = "" if self._classes is not None else "; pass groups= if some classes are rare"
            return "noise guard open" if self.mode == "cap" else "suspects named", why + hint, figure
        if late:
            groups = f"two groups explain {parted:.0%} of the losses, {_PARTED:.0%} would have been needed"
            return self._shut(f"the evidence for wrong labels is {figure:.2f} ({least}), {groups}", figure)
        return "", "", figure

    def _latest(self, catalog: LossCatalog) -> Losses:
        """Return the losses reported since the last end of an epoch, `[N]`; NaN where there is none."""
        since = self._since or LossesSince(
            np.zeros(self.num_samples, np.float32), np.zeros(self.num_samples, np.uint32)
        )
        self._since = LossesSince(catalog.mean_loss, catalog.uses)
        return since.means(catalog)

    def _shut(self, why: str, figure: float) -> tuple[str, str, float]:
        """Judge no more; say so to who asked for suspects to be kept out."""
        self._stage, self._since = Stage.SHUT, None
        return ("noise guard shut", why, figure) if self.mode == "cap" else ("", "", figure)

    # What the labels should be ------------------------------------------------------------

    def hear_predictions(self, ids: Indices, classes: NDArray[np.integer[Any]]) -> None:
        """Take the classes that the model gives some samples, `[n]` whole numbers."""
        if self._votes is None:
            self._votes = Votes(self.num_samples, self._groups)
        self._votes.groups = self._groups
        self._votes.add(ids, classes)

    @property
    def suggestions(self) -> NDArray[np.int64]:
        """What the label of each suspect should be, int64 `[N]`: the class that the model gave it most often.

        -1 for others, and where no predictions were reported. With `groups=` (the labels) another one than its own.
        """
        if self._votes is None:
            return np.full(self.num_samples, -1)
        return np.where(self._suspect, self._votes.classes, -1)
