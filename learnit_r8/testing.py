"""Contracts that the author of a plug-in can call in a test: does my strategy, my sink, my state hold?

    from learnit_r8.testing import check_strategy

    def test_my_strategy():
        check_strategy(MyStrategy)

Every check raises `AssertionError` with a sentence that says what to do.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.catalog import LossCatalog
from learnit_r8.checkpoint.state_codec import decode, encode
from learnit_r8.events import EVENT_TYPES, Event
from learnit_r8.rng import Purpose, RandomStreams
from learnit_r8.strategies.base import BatchRequest, Draw, Strategy
from learnit_r8.types import Command, Indices, LossReport, Mask, Sink

_LARGEST_WEIGHT = 5.0
_SEED = 7
_LIMIT_Z = 5.5
"""A sound strategy fails a statistical check less than once in ten million times."""


class FakeClock:
    """Time that passes only when told; a stand-in for `learnit_r8.clock.Clock`.

    Args:
        now: Where `monotonic` starts, seconds.
        wall: Where `wall` starts, seconds since the Unix epoch.
    """

    def __init__(self, now: float = 0.0, wall: float = 1_700_000_000.0) -> None:
        self._now = float(now)
        self._offset = float(wall) - self._now
        self.slept: list[float] = []

    def monotonic(self) -> float:
        """Return seconds since some fixed moment."""
        return self._now

    def wall(self) -> float:
        """Return seconds since the Unix epoch."""
        return self._now + self._offset

    def sleep(self, seconds: float) -> None:
        """Let that much time pass, and note it in `slept`."""
        self.slept.append(seconds)
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        """Let time pass.

        Raises:
            ValueError: `seconds` is below 0.
        """
        if seconds < 0:
            raise ValueError(f"time does not go back, got {seconds} seconds")
        self._now += seconds


def check_strategy(factory: Callable[[], Strategy], *, thorough: bool = True) -> None:
    """Check that a strategy keeps its contract.

    Ids in range and integers, no sample twice in a batch (unless `replacement`), excluded
    samples left out, data sets smaller than a batch and of one sample, draws before any loss is
    known, equal draws for equal seeds, the same tail after a restore in mid-epoch, weights
    within 5 and of mean 1, and inclusion probabilities that are true. A strategy whose choice is
    not random has none: it returns `Draw(indices, weights=...)`, and no probability is checked.

    Args:
        factory: Makes a new strategy, for instance its class.
        thorough: Check probabilities over 1e5 draws (about a second); False: 5e3.

    Raises:
        AssertionError: The contract is broken; the message says how and what to do.
    """
    _require(isinstance(factory(), Strategy), "the strategy has no draw(request): add one that returns sample ids")
    for num_samples, size in ((1, 1), (1, 8), (5, 8), (7, 7), (100, 16)):
        for cataloged in (False, True):
            _Run(factory(), num_samples, size, cataloged=cataloged).epochs(3)
    _check_exclusion(factory)
    _check_stable(factory)
    _check_coverage(factory)
    first, second = (_ids(_Run(factory(), 300, 16).epochs(3)) for _ in range(2))
    _require(
        _equal(first, second),
        "two runs with the same seed drew different samples: take all randomness from request.rng, "
        "and iterate over no set or dict whose order is not fixed",
    )
    _check_restore(factory)
    _check_probabilities(factory, 100_000 if thorough else 5_000)


def check_resume(
    make: Callable[[], Any], advance: Callable[[Any], Any], *, steps: int = 24, cuts: Sequence[int] = (0, 1, 9, 17)
) -> None:
    """Check that a saved and restored object goes on as if nothing had happened.

    The state passes through the checkpoint's encoding (strict JSON plus raw arrays), as in a run.

    Args:
        make: Makes a new object that has `state_dict()` and `load_state_dict(state)`.
        advance: Takes the object one step further and returns what came out: numbers,
            strings, arrays, or lists, tuples and dicts of them.
        steps: Number of steps of a whole run.
        cuts: Steps after which state is saved, each below `steps`.

    Raises:
        AssertionError: The tail after a restore differs, or saving changed the object.
    """
    whole = make()
    expected = [advance(whole) for _ in range(steps)]
    for cut in cuts:
        original = make()
        for _ in range(cut):
            advance(original)
        state = _round_trip(original.state_dict())
        tail = [advance(original) for _ in range(steps - cut)]
        _require(
            _equal(tail, expected[cut:]),
            f"state_dict() after step {cut} changed what follows: return copies and leave the object as it is",
        )
        restored = make()
        restored.load_state_dict(state)
        for step in range(cut, steps):
            _require(
                _equal(advance(restored), expected[step]),
                f"restored after step {cut}, step {step} differs from the uninterrupted run: something that it "
                "depends on is missing from state_dict()",
            )


def check_sink(factory: Callable[[], Sink], events: Sequence[Event] | None = None) -> None:
    """Check that a sink takes every kind of event, has a usable command queue, and closes.

    Args:
        factory: Makes a new sink.
        events: What to send; None: one event of each kind, with empty, NaN and long values among them.

    Raises:
        AssertionError: The contract is broken; the message says how and what to do.
    """
    sink = factory()
    _require(isinstance(sink, Sink), "the sink has no record(event): add one that takes any event")
    for event in events if events is not None else sample_events():
        try:
            record: Callable[[Event], Any] = sink.record
            returned = record(event)
        except Exception as error:
            raise AssertionError(
                f"record({type(event).__name__}) raised {type(error).__name__}: {error}. A run drops such a sink: "
                "ignore the events that you do not know"
            ) from error
        _require(returned is None, f"record returned {returned!r}: it returns nothing")
    commands = getattr(sink, "commands", None)
    _require(
        commands is None or (isinstance(commands, deque) and all(isinstance(item, Command) for item in commands)),
        "commands must be a collections.deque of learnit_r8.types.Command",
    )
    close = getattr(sink, "close", None)
    if close is not None:
        close()


def sample_events() -> list[Event]:
    """Return one event of every kind with plain values, and one with awkward ones."""
    plain: dict[str, Any] = {"float": 1.5, "int": 3, "str": "text", "bool": True}
    awkward: dict[str, Any] = {"float": math.nan, "int": 0, "str": "", "bool": False}
    made = []
    for values, number in ((plain, 3), (awkward, 0)):
        for kind in EVENT_TYPES.values():
            fields = {f.name: _example(str(f.type), values, number) for f in dataclasses.fields(kind)}
            fields["time"] = 1_700_000_000.0
            made.append(kind(**fields))
    return made


def _example(annotation: str, values: Mapping[str, Any], number: int) -> Any:
    if annotation.startswith("tuple"):
        item = "float" if "float" in annotation else "int"
        return tuple(values[item] for _ in range(5 if number else 0))
    if annotation.startswith("Mapping"):
        return {"name": None} if number else {}
    return values[annotation.split(" ", maxsplit=1)[0]]


# How a strategy is run ----------------------------------------------------------------------


class _Run:
    """The scheduler's loop around a strategy, without a model: losses are fixed and noisy."""

    def __init__(
        self,
        strategy: Strategy,
        num_samples: int,
        size: int,
        *,
        cataloged: bool = True,
        excluded: Mask | None = None,
        reports: bool = True,
        progress: float = 0.3,
    ) -> None:
        self.strategy: Any = strategy
        self.size = size
        self.excluded = excluded
        self.catalog = LossCatalog(num_samples)
        self.streams = RandomStreams(_SEED)
        self.losses = np.random.default_rng(_SEED).lognormal(0.0, 1.0, num_samples).astype(np.float32)
        self.reports = reports
        self.progress = progress
        self.step = self.epoch = 0
        self.cursor = self.left = 0
        if cataloged:
            everything = np.arange(num_samples)
            self.catalog.record(self.catalog.look_up(everything), self.losses, 0)

    def request(self, purpose: Purpose, size: int, *, stable_only: bool = False) -> BatchRequest:
        return BatchRequest(
            size, self.epoch, self.cursor, self.step, self.progress, self.catalog, self.streams,
            purpose, self.excluded, stable_only,
        )  # fmt: skip

    def start_epoch(self) -> None:
        self.cursor = 0
        start = getattr(self.strategy, "start_epoch", None)
        samples = start(self.request(Purpose.PLAN, self.size)) if start is not None else None
        allowed = self.catalog.num_samples - (0 if self.excluded is None else int(self.excluded.sum()))
        self.left = allowed if samples is None else int(samples)

    def advance(self, *, stable_only: bool = False) -> Draw:
        """Draw one batch and report its losses; a new epoch begins where one is spent."""
        while self.left <= 0:
            self.epoch += self.step > 0
            self.start_epoch()
        asked = min(self.size, self.left)
        chosen = self.strategy.draw(self.request(Purpose.BATCH, asked, stable_only=stable_only))
        draw = chosen if isinstance(chosen, Draw) else Draw(chosen)
        ids = self._checked(draw, asked)
        self.left -= len(ids)
        self.cursor += 1
        if self.reports:
            jitter = np.random.default_rng(self.step).lognormal(0.0, 0.1, len(ids)).astype(np.float32)
            losses = self.losses[ids] * jitter
            self.catalog.record(self.catalog.look_up(ids), losses, self.step)
            observe = getattr(self.strategy, "observe", None)
            if observe is not None:
                observe(LossReport(ids, losses, float(losses.mean()), True, self.step, self.epoch))
        self.step += 1
        return draw

    def epochs(self, count: int) -> Iterator[Draw]:
        draws = []
        last = self.epoch + count
        while True:
            draws.append(self.advance())
            if self.left <= 0 and self.epoch + 1 >= last:
                return iter(draws)

    def _checked(self, draw: Draw, asked: int) -> Indices:
        ids = np.asarray(draw.indices)
        _require(
            ids.ndim == 1 and ids.dtype.kind in "iu",
            f"draw returned shape {ids.shape} of {ids.dtype}: return a 1-D integer array of sample ids",
        )
        _require(
            1 <= len(ids) <= asked,
            f"draw returned {len(ids)} ids where 1 to {asked} were asked for: return request.size of them, fewer "
            "only where there are not as many, and let start_epoch return how many samples the epoch draws",
        )
        ids = ids.astype(np.int64)
        _require(
            ids.min() >= 0 and ids.max() < self.catalog.num_samples,
            f"draw returned ids from {ids.min()} to {ids.max()}: allowed are 0 to {self.catalog.num_samples - 1}",
        )
        _require(
            getattr(self.strategy, "replacement", False) or len(np.unique(ids)) == len(ids),
            "draw returned a sample twice in one batch: draw without replacement, or set the class attribute "
            "replacement = True",
        )
        _require(
            self.excluded is None or not self.excluded[ids].any(),
            "draw returned a sample of request.excluded: leave these out",
        )
        for name, values in (("probabilities", draw.probabilities), ("weights", draw.weights)):
            if values is not None:
                array = np.asarray(values)
                _require(
                    array.shape == ids.shape and bool(np.isfinite(array).all() and (array > 0).all()),
                    f"{name} must be finite and positive, one per sample: got {array!r} for {len(ids)} samples",
                )
        return ids


def _check_exclusion(factory: Callable[[], Strategy]) -> None:
    excluded = np.zeros(50, bool)
    excluded[::3] = True
    run = _Run(factory(), 50, 8, excluded=excluded)
    run.epochs(2)
    run.excluded = ~excluded
    run.left = 0
    run.epochs(2)
    run.excluded = np.ones(50, bool)
    run.excluded[11] = False
    run.left = 0
    run.epochs(2)
    run.excluded = None
    run.left = 0
    run.epochs(2)


def _check_stable(factory: Callable[[], Strategy]) -> None:
    excluded = np.zeros(200, bool)
    excluded[:20] = True
    for mask in (None, excluded):
        run = _Run(factory(), 200, 16, excluded=mask)
        for _ in range(8):
            run.advance(stable_only=True)
        run.epochs(2)


def _check_coverage(factory: Callable[[], Strategy]) -> None:
    if getattr(factory(), "covers", False):
        ids = np.concatenate(_ids(_Run(factory(), 101, 16).epochs(1)))
        _require(
            len(ids) == 101 and len(np.unique(ids)) == 101,
            "an epoch did not draw each sample exactly once: drop the class attribute covers, or keep a plan",
        )


def _check_restore(factory: Callable[[], Strategy]) -> None:
    for cut in (0, 3, 25):
        run = _Run(factory(), 300, 16)
        for _ in range(cut):
            run.advance()
        save = getattr(run.strategy, "state_dict", None)
        state = None if save is None else _round_trip(save())
        rows = run.catalog.state_dict()
        position = (run.step, run.epoch, run.cursor, run.left)
        expected = _ids(run.advance() for _ in range(40))
        again = _Run(factory(), 300, 16)
        again.catalog.load_state_dict(rows)
        again.step, again.epoch, again.cursor, again.left = position
        if state is not None:
            again.strategy.load_state_dict(state)
        elif cut:
            again.start_epoch()
            again.cursor, again.left = position[2:]
        _require(
            _equal(expected, _ids(again.advance() for _ in range(40))),
            f"restored after {cut} batches, the strategy draws other samples than the uninterrupted run: put all "
            "that a draw depends on, besides the request, into state_dict()",
        )


def _check_probabilities(factory: Callable[[], Strategy], draws: int) -> None:
    num_samples, size = (500, 20) if draws > 10_000 else (60, 5)
    run = _Run(factory(), num_samples, size, reports=False)
    inverse = np.zeros(num_samples)
    squares = np.zeros(num_samples)
    total = 0
    weights: list[NDArray[Any]] = []
    claimed, first = True, run.epoch
    while total < draws or run.left > 0:
        draw = run.advance()
        ids = np.asarray(draw.indices)
        # Weights of the strategy's own without probabilities: a deliberate choice, not a random one.
        claimed &= draw.probabilities is not None or draw.weights is None
        shares = np.full(len(ids), 1 / num_samples) if draw.probabilities is None else np.asarray(draw.probabilities)
        np.add.at(inverse, ids, 1 / shares)
        np.add.at(squares, ids, 1 / shares**2)
        total += len(ids)
        weights.append(1 / (num_samples * shares) if draw.weights is None else np.asarray(draw.weights))
    every = np.concatenate(weights)
    _require(
        float(every.max()) <= _LARGEST_WEIGHT * (1 + 1e-6),
        f"a weight of {every.max():.3g} was returned, allowed are {_LARGEST_WEIGHT:g}: mix the draw with uniform, "
        "p <- 0.8 p + 0.2 / N, and return the mixture's probabilities",
    )
    epoch = every.sum() / (num_samples * (run.epoch - first + 1))
    _require(
        min(abs(float(every.mean()) - 1), abs(float(epoch) - 1)) < 0.05,
        f"weights have mean {every.mean():.3g}, expected is 1 (or a sum of N over each epoch): return 1 / (N p), or "
        "divide by their mean",
    )
    if not claimed:
        return
    # Horvitz & Thompson 1952: each sample's 1 / p, summed over its draws, has the number of draws
    # as its expectation; its variance is at most the sum of the squares. Over N samples: chi-square.
    _require(
        bool((squares > 0).all()),
        f"{int((squares == 0).sum())} of {num_samples} samples were never drawn in {total} draws: let every sample "
        "have a chance, p <- 0.8 p + 0.2 / N",
    )
    statistic = float(np.sum((inverse - total) ** 2 / squares))
    freedom = num_samples
    # Wilson & Hilferty 1931: the cube root of a chi-square variable is nearly normal.
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    _require(
        z < _LIMIT_Z,
        f"samples were not drawn as often as the probabilities say (chi-square {statistic:.0f} for {freedom} samples, "
        f"{total} draws): Draw.probabilities is each sample's expected share of a draw, and None means that all "
        "are drawn alike",
    )


def _ids(draws: Iterator[Draw]) -> list[Indices]:
    return [np.asarray(draw.indices).astype(np.int64) for draw in draws]


def _round_trip(state: Mapping[str, Any]) -> dict[str, Any]:
    text, arrays = encode(state)
    return decode(text, np.concatenate([np.empty(0, np.uint8), *arrays]))


def _equal(one: Any, other: Any) -> bool:
    """Compare nested values; NaN equals NaN."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, (np.ndarray, float)) or isinstance(other, (np.ndarray, float)):
        try:
            return np.array_equal(one, other, equal_nan=True)
        except TypeError:
            return np.array_equal(one, other)
    return bool(one == other)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)
