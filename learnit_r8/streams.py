"""Streams without a length: of every m candidates that come, the k that are worth a step.

    stream = StreamSelector(source, choose=32, of=128, score=excess_losses)
    for chosen in stream:                                  # ends with the source
        losses = train_step(chosen.items)
        stream.update(losses)

What a candidate is worth is said by `score`, a quick look of yours (a forward pass; its loss less that of a model
trained on held-out data), or by the losses that its key has had before, where the stream comes back to it.
`python -m benchmarks.streams` says what that gains, and where it loses.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.arrays import as_losses
from learnit_r8.core.config import Problems
from learnit_r8.core.portable import portable, unpacked
from learnit_r8.core.rng import Purpose, RandomStreams
from learnit_r8.errors import ConfigError, ProtocolError, tell
from learnit_r8.structures.key_table import KeyTable

__all__ = ["Chosen", "StreamSelector"]

_SMOOTHING = 0.5
"""Weight of a new loss in what is known of a key, as in the catalog."""


class Chosen(NamedTuple):
    """The candidates of one step, in the order in which they came.

    Attributes:
        items: As the source gave them.
        keys: Their keys; None without `key`.
        scores: What they were believed to be worth, float64 `[k]`; NaN for what was never seen.
    """

    items: list[Any]
    keys: list[Hashable] | None
    scores: NDArray[np.float64]


class StreamSelector:
    """Chooses k of every m candidates of a stream, by what is known of them.

    It resumes in mid-stream, to the bit, where the source has `state_dict` and `load_state_dict`, as torchdata's
    `StatefulDataLoader` and `datasets.IterableDataset` do. Save its state with the model's; a batch whose step was not
    reported then is chosen again. Every loop is a pass over the source: before it, `set_epoch(pass)` is called where
    the source, its `dataset` or its `sampler` has it.

    Args:
        source: An iterable of candidates, or of lists of them.
        choose: k, the size of a batch.
        of: m, candidates to choose from. None: the source gives lists of them, as a `DataLoader` with
            `collate_fn=list` does, whose workers then send many at a time.
        score: `(candidates) -> m numbers`, the highest to be taken. None: those whose keys have had the highest losses,
            and before them those that were never seen. Both that and the loss itself lose to a blind choice where
            labels are wrong; a loss less that of a model trained on other data does not.
        key: `(candidate) -> its key`: a text, a number, bytes, or a tuple of those.
        explore: Share of a batch that is drawn uniformly, so that no candidate is left out for good.
        seed: Any non-negative int; global random states are never touched.

    Raises:
        ConfigError: All that is wrong.
    """

    def __init__(
        self,
        source: Iterable[Any],
        choose: int,
        of: int | None,
        *,
        score: Callable[[Any], Any] | None = None,
        key: Callable[[Any], Any] | None = None,
        explore: float = 0.25,
        seed: int = 0,
    ) -> None:
        problems = Problems()
        self._choose = problems.integer("choose", choose, 1)
        self._of = None if of is None else problems.integer("of", of, self._choose)
        self._score, self._key = problems.function("score", score), problems.function("key", key)
        self._explore = problems.real("explore", explore, 0.0, 1.0)
        self._seed = problems.integer("seed", seed, 0)
        if score is None and key is None:
            problems.append("give score, what candidates are worth, or key, by which their losses are remembered")
        if not isinstance(source, Iterable) or isinstance(source, (str, bytes, Mapping)):
            problems.append(f"source must be an iterable of candidates, got {type(source).__name__}")
        problems.raise_if_any()
        self._settings = {"seed": self._seed, "choose": self._choose, "of": self._of, "explore": self._explore}
        self._source, self._streams = source, RandomStreams(self._seed)
        self._resumable = all(callable(getattr(source, name, None)) for name in ("state_dict", "load_state_dict"))
        self._known, self._losses = KeyTable(), np.empty(0, np.float32)
        self._coming: Iterator[Any] | None = None
        self._pool: list[Any] = []  # candidates that came, of a batch that is not chosen yet
        self._open: Chosen | None = None
        self._came = 0  # candidates that it was chosen from
        self._counts = dict.fromkeys(("passes", "batches", "candidates", "chosen"), 0)
        self._before: Any = None  # the source's state in front of the open batch's candidates; None: where it begins

    # The loop -----------------------------------------------------------------------------

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chosen:
        """Return the next batch; one that was handed out in an earlier loop and never reported comes again.

        Raises:
            ProtocolError: The losses of the batch before have not been reported.
        """
        if self._open is not None:
            raise ProtocolError(
                "the batch before has not been reported: call update(losses), or update() where there are none, after "
                "its step"
            )
        if self._coming is None:  # a state that was loaded is that of its beginning; the source may not know it yet
            self._begin_pass()
            self._coming = iter(self._source)
        elif not self._pool:
            self._before = self._where()
        candidates = self._pull(self._coming)
        if not candidates:
            self._coming, self._before = None, None
            self._counts["passes"] += 1
            raise StopIteration
        keys = None if self._key is None else [self._key(candidate) for candidate in candidates]
        scores = self._worth(candidates, keys)
        places = self._places(scores).tolist()
        self._pool, self._came = [], len(candidates)
        names = None if keys is None else [keys[place] for place in places]
        self._open = Chosen([candidates[place] for place in places], names, scores[places])
        return self._open

    def _begin_pass(self) -> None:
        for part in (self._source, getattr(self._source, "dataset", None), getattr(self._source, "sampler", None)):
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(self._counts["passes"])

    def _where(self) -> Any:
        return self._source.state_dict() if self._resumable else None  # type: ignore[attr-defined]

    def _pull(self, coming: Iterator[Any]) -> list[Any]:
        """Return the next candidates; what has come is kept where the source, or a look at them, fails."""
        while len(self._pool) < (self._of or 1):
            try:
                one = next(coming)
            except StopIteration:
                break
            self._pool += [one] if self._of else one
        return self._pool

    def _worth(self, candidates: list[Any], keys: list[Hashable] | None) -> NDArray[np.float64]:
        if self._score is None:
            found = self._known.find(keys or ())
            return np.array([self._losses[place] if place >= 0 else np.nan for place in found.tolist()], np.float64)
        scores = as_losses(self._score(candidates), "scores").reshape(-1)
        if len(scores) != len(candidates):
            raise ValueError(f"score must return a number for each of {len(candidates)} candidates, got {len(scores)}")
        if np.isnan(scores).any():
            tell("score returned NaN: such candidates are taken last", stacklevel=3)
        return scores

    def _places(self, scores: NDArray[np.float64]) -> NDArray[np.int64]:
        rng = self._streams.at(Purpose.BATCH, self._counts["passes"], self._counts["batches"])
        size, order = min(self._choose, len(scores)), rng.permutation(len(scores))
        free = min(int(size * self._explore + rng.random()), size)
        unknown = np.inf if self._score is None else -np.inf  # never seen; or no number
        worth = np.where(np.isnan(scores), unknown, scores)[order[free:]]
        best = order[free:][np.argsort(-worth, kind="stable")[: size - free]]  # ties by chance
        return np.sort(np.concatenate([order[:free], best]))

    def update(self, losses: Any = None) -> None:
        """Report the step on the batch that came last.

        Args:
            losses: One for each of its candidates: remembered by key. None: nothing to remember.

        Raises:
            ProtocolError: No batch is open.
            ValueError: Another number of losses.
        """
        if self._open is None:
            raise ProtocolError("no batch is open: call update once for each batch, inside the loop")
        if losses is not None:
            values = as_losses(losses).reshape(-1)
            if len(values) != len(self._open.items):
                raise ValueError(f"the batch has {len(self._open.items)} candidates, got {len(values)} losses")
            if self._open.keys is not None:
                self._remember(self._open.keys, values.astype(np.float32))
        for name, more in (("batches", 1), ("candidates", self._came), ("chosen", len(self._open.items))):
            self._counts[name] += more
        self._open = None

    def _remember(self, keys: list[Hashable], losses: NDArray[np.float32]) -> None:
        last = {key: loss for key, loss in zip(keys, losses.tolist(), strict=True) if np.isfinite(loss)}
        self._known.add([key for key, place in zip(last, self._known.find(last).tolist(), strict=True) if place < 0])
        fresh = np.full(len(self._known) - len(self._losses), np.nan, np.float32)
        self._losses = np.append(self._losses, fresh)
        at, new = self._known.find(last), np.array(list(last.values()), np.float32)
        old = self._losses[at]
        self._losses[at] = np.where(np.isnan(old), new, _SMOOTHING * new + (1 - _SMOOTHING) * old)

    def metrics_dict(self) -> dict[str, float]:
        """Return numbers for a log: passes over the source, batches, candidates that came, those chosen, keys known."""
        return {**self._counts, "keys": len(self._known)}

    # State --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next batch depends on; a batch that is open will be chosen again.

        Raises:
            ConfigError: The source cannot say where it is.
        """
        if not self._resumable:
            name = type(self._source).__name__
            raise ConfigError(
                [
                    f"source: a {name} has no state_dict and load_state_dict, so nobody can go on amid it: wrap it "
                    "in torchdata's StatefulDataLoader, or give it these two"
                ]
            )
        state = {
            **self._settings,
            "counts": dict(self._counts),
            "known": self._known.state_dict(),
            "losses": self._losses.copy(),
        }
        amid = self._open is not None or self._pool or self._coming is None
        return {**portable(state), "source": self._before if amid else self._where()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called; the source is given its own state.

        Raises:
            ConfigError: The state is another selector's, or the source cannot take one.
        """
        if not self._resumable:
            self.state_dict()
        problems = [
            f"{name}: the state has {state.get(name)!r}, this selector {mine!r}"
            for name, mine in self._settings.items()
            if state.get(name) != mine
        ]
        if problems:
            raise ConfigError(problems)
        known, losses = KeyTable.from_state(state["known"]), np.array(unpacked(state["losses"]), np.float32)
        counts = {name: int(state["counts"][name]) for name in self._counts}
        if state["source"] is not None:
            self._source.load_state_dict(state["source"])  # type: ignore[attr-defined]
        self._known, self._losses, self._counts = known, losses, counts
        self._before, self._coming, self._open, self._pool = state["source"], None, None, []
