"""What a strategy is: one method that turns a request into sample ids.

A user's own strategy needs nothing from this module:

    class Shuffled:
        def draw(self, request):
            ids = np.arange(request.num_samples)
            if request.excluded is not None:
                ids = ids[~request.excluded]
            return request.rng.permutation(ids)[: request.size]

What else it may have stands in `strategies/contract.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.rng import Purpose, RandomStreams
from learnit_r8.errors import ConfigError
from learnit_r8.strategies.contract import Rules, sound
from learnit_r8.types import Indices, Losses, Mask

if TYPE_CHECKING:
    from learnit_r8.samples.catalog import LossCatalog


class BatchRequest(NamedTuple):
    """All that a strategy may look at when it chooses.

    Attributes:
        size: Number of samples wanted, at most (of the whole global batch, before it is cut by
            rank). In `start_epoch`: the full batch size.
        epoch: From 0.
        cursor: Number of the batch within the epoch, from 0.
        step: Global step.
        progress: Share of the training budget that is spent, 0 to 1.
        catalog: The loss catalog, to be read only.
        streams: Source of `rng`.
        purpose: What `rng` is for.
        excluded: True for samples that must not be drawn in this epoch (quarantine, noise
            guard, probes), shape `[num_samples]`, or None when all may be drawn. It
            changes at epoch starts only.
        stable_only: Prefer samples of low loss (Q1): the model was just rolled back.
        multiple: Number of ranks, which take equal shares of a batch: draw a multiple of it. `size` is one.
    """

    size: int
    epoch: int
    cursor: int
    step: int
    progress: float
    catalog: LossCatalog
    streams: RandomStreams
    purpose: Purpose = Purpose.BATCH
    excluded: Mask | None = None
    stable_only: bool = False
    multiple: int = 1

    @property
    def num_samples(self) -> int:
        """Number of samples in the data set."""
        return self.catalog.num_samples

    @property
    def rng(self) -> np.random.Generator:
        """A generator that depends on seed, epoch and cursor only. Do not keep it."""
        return self.streams.at(self.purpose, self.epoch, self.cursor)


@dataclass(frozen=True, slots=True, eq=False)
class Draw:
    """The chosen samples and, for a biased choice, how likely each was.

    Attributes:
        indices: Sample ids, any integer dtype, shape `[n]`, `1 <= n <= request.size`.
        probabilities: Expected share of a draw that each chosen sample gets, shape `[n]`:
            1/N where all are alike. None: unbiased.
        weights: Importance weights, shape `[n]`, not negative, where the strategy computes them itself:
            mean about 1, or a sum of N over a shortened epoch. None: `1 / (N p)` from `probabilities`.
    """

    indices: NDArray[np.integer[Any]]
    probabilities: NDArray[np.floating[Any]] | None = None
    weights: NDArray[np.floating[Any]] | None = None

    @classmethod
    def of(cls, chosen: Draw | Indices) -> Draw:
        """Return what a strategy chose as a draw."""
        return chosen if isinstance(chosen, Draw) else cls(chosen)

    def importance(self, num_samples: int) -> Losses | None:
        """Return the importance weights of the chosen samples, float32 `[n]`, or None for ones."""
        weights = self.weights
        if weights is None and self.probabilities is not None:
            weights = 1.0 / (num_samples * np.asarray(self.probabilities))
        return None if weights is None else np.asarray(weights, np.float32)


@runtime_checkable
class Strategy(Protocol):
    """Chooses samples. What it may have besides stands in `strategies/contract.py`."""

    def draw(self, request: BatchRequest) -> Draw | Indices:
        """Return `request.size` sample ids, or fewer, at least one: the epoch then takes more batches."""
        ...


_REGISTRY: dict[str, Callable[[], Strategy]] = {}


def register(name: str) -> Callable[[type], type]:
    """Class decorator: make a strategy usable as `strategy=name`."""

    def add(cls: type) -> type:
        _REGISTRY[name] = cls
        cls.name = name  # type: ignore[attr-defined]
        return cls

    return add


def builtin(name: str) -> Callable[[type], type]:
    """Class decorator: do the same for a strategy of the library, which `check_strategy` has checked."""
    return lambda cls: sound(register(name)(cls))


def names() -> list[str]:
    """Return the names that `strategy=` takes."""
    return sorted(_REGISTRY)


def make(strategy: str | Strategy) -> Strategy:
    """Return the strategy of that name, or the object itself.

    Raises:
        ConfigError: Unknown name, an object without a `draw` method, or state that is saved and never restored.
    """
    if isinstance(strategy, str) and strategy in _REGISTRY:
        return _REGISTRY[strategy]()
    if isinstance(strategy, type) and hasattr(strategy, "draw"):
        name = strategy.__name__
        raise ConfigError([f"strategy must be an object, got the class {name}: give {name}()"])
    if isinstance(strategy, type) or not isinstance(strategy, Strategy):
        raise ConfigError([f"strategy must be one of {names()} or an object with draw(request), got {strategy!r}"])
    if fault := Rules(strategy).state_fault():
        raise ConfigError([f"strategy {type(strategy).__name__} {fault}"])
    return strategy
