"""`check_strategy`: a strategy keeps its contract."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from learnit_r8.core.rng import Purpose, RandomStreams
from learnit_r8.samples.catalog import LossCatalog
from learnit_r8.strategies.base import BatchRequest, Draw, Strategy
from learnit_r8.strategies.contract import Rules
from learnit_r8.testing.states import equal, require, round_trip
from learnit_r8.types import Indices, LossReport, Mask

_LARGEST_WEIGHT = 5.0
_SEED, _PROGRESS = 7, 0.3
_LIMIT_Z = 5.5
"""A sound strategy fails a statistical check less than once in ten million times."""


def check_strategy(factory: Callable[[], Strategy], *, thorough: bool = True) -> None:
    """Check that a strategy keeps its contract.

    Ids in range and integers, no empty batches, no sample twice in a batch (unless `replacement`),
    excluded samples left out, data sets smaller than a batch and of one sample, draws before any
    loss is known, equal draws for equal seeds, the same tail after a restore in mid-epoch, states
    that are copies, weights within 5 and of mean 1, and inclusion probabilities that are true. A
    strategy whose choice is not random has none: it returns `Draw(indices, weights=...)`, and no
    probability is checked.

    Args:
        factory: Makes a new strategy at each call, for instance its class.
        thorough: Check probabilities over 1e5 draws (about a second); False: 5e3.

    Raises:
        AssertionError: The contract is broken; the message says how and what to do.
    """
    _check_factory(factory)
    for num_samples, size in ((1, 1), (1, 8), (5, 8), (7, 7), (100, 16)):
        for cataloged in (False, True):
            _Run(factory(), num_samples, size, cataloged=cataloged).epochs(3)
    _check_exclusion(factory)
    _check_stable(factory)
    _check_coverage(factory)
    first, second = (_ids(_Run(factory(), 300, 16).epochs(3)) for _ in range(2))
    require(
        equal(first, second),
        "two runs with the same seed drew different samples: take all randomness from request.rng, "
        "and iterate over no set or dict whose order is not fixed",
    )
    _check_restore(factory)
    _check_probabilities(factory, 100_000 if thorough else 5_000)


def _check_factory(factory: Callable[[], Strategy]) -> None:
    require(callable(factory), f"check_strategy takes what makes a strategy, such as its class, got {factory!r}")
    strategy = factory()
    require(isinstance(strategy, Strategy), "the strategy has no draw(request): add one that returns sample ids")
    require(factory() is not strategy, "the factory made one strategy for two calls: let it make a new one at each")
    fault = Rules(strategy).state_fault()
    require(not fault, f"the strategy {fault}")


# How a strategy is run ----------------------------------------------------------------------


class _Run:
    """The scheduler's loop around a strategy, without a model: losses are fixed and noisy."""

    def __init__(
        self, strategy: Strategy, num_samples: int, size: int, *, cataloged: bool = True, reports: bool = True
    ) -> None:
        self.rules = Rules(strategy)
        self.size = size
        self.excluded: Mask | None = None
        self.catalog = LossCatalog(num_samples)
        self.streams = RandomStreams(_SEED)
        self.losses = np.random.default_rng(_SEED).lognormal(0.0, 1.0, num_samples).astype(np.float32)
        self.reports = reports
        self.step = self.epoch = self.cursor = self.left = 0
        if cataloged:
            self.catalog.record(self.catalog.look_up(np.arange(num_samples)), self.losses, 0)

    def exclude(self, mask: Mask | None) -> None:
        """Leave samples out from the next epoch on."""
        self.excluded = mask
        if mask is not None:
            mask.flags.writeable = False
        self.left = 0

    def request(self, purpose: Purpose, size: int, *, stable_only: bool = False) -> BatchRequest:
        return BatchRequest(
            size, self.epoch, self.cursor, self.step, _PROGRESS, self.catalog, self.streams,
            purpose, self.excluded, stable_only,
        )  # fmt: skip

    def start_epoch(self) -> None:
        self.cursor = 0
        samples = self.rules.start_epoch(self.request(Purpose.PLAN, self.size))
        self._require(self.rules.length_fault(samples))
        allowed = self.catalog.num_samples - (0 if self.excluded is None else int(self.excluded.sum()))
        self.left = allowed if samples is None else int(samples)

    def advance(self, *, stable_only: bool = False) -> Draw:
        """Draw one batch and report its losses; a new epoch begins where one is spent."""
        while self.left <= 0:
            self.epoch += self.step > 0
            self.start_epoch()
        asked = min(self.size, self.left)
        draw = Draw.of(self.rules.draw(self.request(Purpose.BATCH, asked, stable_only=stable_only)))
        ids = self._checked(draw, asked)
        self.left -= len(ids)
        self.cursor += 1
        if self.reports:
            jitter = np.random.default_rng(self.step).lognormal(0.0, 0.1, len(ids)).astype(np.float32)
            losses = self.losses[ids] * jitter
            self.catalog.record(self.catalog.look_up(ids), losses, self.step)
            self.rules.observe(LossReport(ids, losses, float(losses.mean()), True, self.step, self.epoch))
        self.step += 1
        return draw

    def epochs(self, count: int) -> list[Draw]:
        last = self.epoch + count
        draws = [self.advance()]
        while self.left > 0 or self.epoch + 1 < last:
            draws.append(self.advance())
        return draws

    def _checked(self, draw: Draw, asked: int) -> Indices:
        for one in (draw, Draw(draw.indices, draw.probabilities)):
            self._require(self.rules.draw_fault(one, asked, self.catalog.num_samples))
        ids = np.asarray(draw.indices).astype(np.int64)
        if self.excluded is not None and self.excluded[ids].any():
            self._require("draw returned a sample of request.excluded: leave these out")
        return ids

    def _require(self, fault: str) -> None:
        require(not fault, f"{fault} (num_samples={self.catalog.num_samples}, batch_size={self.size})")


def _check_exclusion(factory: Callable[[], Strategy]) -> None:
    some = np.zeros(50, bool)
    some[::3] = True
    one = np.zeros(50, bool)
    one[11] = True
    run = _Run(factory(), 50, 8)
    for excluded in (some, ~some, ~one, None):
        run.exclude(excluded)
        run.epochs(2)


def _check_stable(factory: Callable[[], Strategy]) -> None:
    excluded = np.zeros(200, bool)
    excluded[:20] = True
    for mask in (None, excluded):
        run = _Run(factory(), 200, 16)
        run.exclude(mask)
        for _ in range(8):
            run.advance(stable_only=True)
        run.epochs(2)


def _check_coverage(factory: Callable[[], Strategy]) -> None:
    if Rules(factory()).covers:
        ids = np.concatenate(_ids(_Run(factory(), 101, 16).epochs(1)))
        require(
            len(ids) == 101 and len(np.unique(ids)) == 101,
            "an epoch did not draw each sample exactly once: drop the class attribute covers, or keep a plan",
        )


def _check_restore(factory: Callable[[], Strategy]) -> None:
    for cut in (0, 3, 25):
        run = _Run(factory(), 300, 16)
        for _ in range(cut):
            run.advance()
        state = run.rules.state_dict()
        saved = None if state is None else round_trip(state)
        rows = run.catalog.state_dict()
        position = (run.step, run.epoch, run.cursor, run.left)
        expected = _ids(run.advance() for _ in range(40))
        # The state as it was, and twice as it is by now: what goes on must not change it.
        for given in (saved, state, state):
            again = _Run(factory(), 300, 16)
            again.catalog.load_state_dict(rows)
            again.step, again.epoch, again.cursor, again.left = position
            if given is not None:
                again.rules.load_state_dict(given)
            elif cut:
                again.start_epoch()
                again.cursor, again.left = position[2:]
            require(
                equal(expected, _ids(again.advance() for _ in range(40))),
                f"restored after {cut} batches, the strategy draws other samples than the uninterrupted run: put "
                "all that a draw depends on, besides the request, into state_dict()"
                if given is saved
                else f"a state that was taken after {cut} batches changed when the strategy went on: let state_dict() "
                "return copies, and load_state_dict() take copies",
            )


def _check_probabilities(factory: Callable[[], Strategy], draws: int) -> None:
    num_samples, size = (500, 20) if draws > 10_000 else (60, 5)
    run = _Run(factory(), num_samples, size, reports=False)
    inverse, squares = np.zeros((2, num_samples))
    total, weights = 0, []
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
    require(
        float(every.max()) <= _LARGEST_WEIGHT * (1 + 1e-6),
        f"a weight of {every.max():.3g} was returned, allowed are {_LARGEST_WEIGHT:g}: mix the draw with uniform, "
        "p <- 0.8 p + 0.2 / N, and return the mixture's probabilities",
    )
    epoch = every.sum() / (num_samples * (run.epoch - first + 1))
    require(
        min(abs(float(every.mean()) - 1), abs(float(epoch) - 1)) < 0.05,
        f"weights have mean {every.mean():.3g}, expected is 1 (or a sum of N over each epoch): return 1 / (N p), or "
        "divide by their mean",
    )
    if not claimed:
        return
    # Horvitz & Thompson 1952: each sample's 1 / p, summed over its draws, has the number of draws
    # as its expectation; its variance is at most the sum of the squares. Over N samples: chi-square.
    require(
        bool((squares > 0).all()),
        f"{int((squares == 0).sum())} of {num_samples} samples were never drawn in {total} draws: let every sample "
        "have a chance, p <- 0.8 p + 0.2 / N",
    )
    statistic, spread = float(np.sum((inverse - total) ** 2 / squares)), 2 / (9 * num_samples)
    # Wilson & Hilferty 1931: the cube root of a chi-square variable is nearly normal.
    z = ((statistic / num_samples) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    require(
        z < _LIMIT_Z,
        f"samples were not drawn as often as the probabilities say (chi-square {statistic:.0f} for {num_samples} "
        f"samples, {total} draws): Draw.probabilities is each sample's expected share of a draw, and None means that "
        "all are drawn alike",
    )


def _ids(draws: Iterable[Draw]) -> list[Indices]:
    return [np.asarray(draw.indices).astype(np.int64) for draw in draws]
