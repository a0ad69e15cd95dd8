"""Prioritized experience replay (Schaul, Quan, Antonoglou, Silver 2015, arXiv 1511.05952)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from learnit_r8.errors import CheckpointError, ConfigError
from learnit_r8.replay.n_step import NStep
from learnit_r8.replay.ranking import Ranking
from learnit_r8.replay.storage import as_array, make_storage
from learnit_r8.rng import Purpose, RandomStreams
from learnit_r8.sum_tree import SumTree
from learnit_r8.types import Indices, Losses

_CHOICES: dict[str, tuple[Any, ...]] = {
    "normalize": ("max", "mean", None),
    "variant": ("proportional", "rank"),
    "storage": ("objects", "arrays"),
}
_LARGEST_ALPHA, _LARGEST_BETA, _LARGEST_EPS, _LARGEST_ERROR = 3.0, 10.0, 1.0, 1e90
"""Larger errors count as this one, so that no priority leaves the range of float64."""
# What is known of an experience's slot, so that an update can tell whom it is for.
_IDLE, _AWAITED, _REPLACED = 0, 1, 2


class PrioritizedReplayBuffer:
    """A ring of experiences, drawn in proportion to how wrong the model was about them.

    `p_i = (|delta_i| + eps)**alpha`, `P(i) = p_i / sum p`, `w_i = (N P(i))**-beta`, where N is
    the number of experiences held (section 3.3 and 3.4 of the paper). The rank-based variant
    has `p_i = rank(i)**-alpha`, rank 1 being the largest |delta|. New experiences get the
    largest priority there is, so that each is soon replayed once.

    Draws are stratified (appendix B.2.1): the sum of priorities is cut into `batch_size`
    equal ranges with one draw from each, with replacement, so a batch may be larger than the
    buffer. Indices are slots, `0 .. len - 1`; slots are reused, oldest first.

    Args:
        capacity: Number of experiences held, at least 1.
        alpha: How much priorities count: 0 is uniform. 0 to 3.
        beta: How much of the bias the weights undo, at first.
        beta_end: The same after `beta_steps` calls of `sample`, linear in between.
        beta_steps: None: beta stays at `beta`.
        eps: Keeps experiences without error alive. 0 to 1.
        seed: Of all draws.
        normalize: "max": weights are divided by the largest of the batch, as published; this
            shrinks the gradient, so learning rates do not carry over. "mean": by the mean.
            None: raw.
        variant: "proportional" or "rank". Ranks are sorted anew once per `capacity` updates and
            looked up in the last order in between.
        storage: "objects": anything, `sample` returns a list. "arrays": arrays or tensors of
            fixed shapes (see `ArrayStorage`), `sample` returns them stacked, much faster.
        path: Folder for memory-mapped arrays; needs `storage="arrays"`.
        n_step: Makes n-step experiences of single steps on their way in.
        fast: See `SumTree`.

    Raises:
        ConfigError: Lists every bad argument.
    """

    def __init__(
        self,
        capacity: int,
        alpha: float = 0.6,
        beta: float = 0.4,
        beta_end: float = 1.0,
        beta_steps: int | None = None,
        eps: float = 1e-6,
        seed: int = 0,
        *,
        normalize: str | None = "max",
        variant: str = "proportional",
        storage: str = "objects",
        path: str | Path | None = None,
        n_step: NStep | None = None,
        fast: bool | None = None,
    ) -> None:
        problems = _problems(
            capacity,
            beta_steps,
            seed,
            {
                "alpha": (alpha, _LARGEST_ALPHA),
                "beta": (beta, _LARGEST_BETA),
                "beta_end": (beta_end, _LARGEST_BETA),
                "eps": (eps, _LARGEST_EPS),
            },
        )
        for name, value in (("normalize", normalize), ("variant", variant), ("storage", storage)):
            if value not in _CHOICES[name]:
                problems.append(f"{name} must be one of {_CHOICES[name]}, got {value!r}")
        if path is not None and storage != "arrays":
            problems.append(f'path needs storage="arrays", got storage={storage!r}')
        if problems:
            raise ConfigError(problems)
        self.capacity, self.alpha, self.eps, self.seed = int(capacity), alpha, eps, int(seed)
        self.beta_start, self.beta_end, self.beta_steps = beta, beta_end, beta_steps
        self._normalize = normalize
        self._n_step = n_step
        self._streams = RandomStreams(self.seed)
        self._tree = SumTree(self.capacity, fast=fast)
        self._storage = make_storage(storage, self.capacity, path)
        self._marks = np.zeros(self.capacity, dtype=np.uint8)
        self._added = 0
        self._draws = 0
        self._ranking = Ranking(self.capacity) if variant == "rank" else None
        self._largest = 1.0  # |delta| (rank) or p (proportional), of this lap or the last

    def __len__(self) -> int:
        return min(self._added, self.capacity)

    @property
    def added(self) -> int:
        """Number of experiences ever added; experience number k has slot `k % capacity`."""
        return self._added

    @property
    def beta(self) -> float:
        """Exponent of the weights at the next `sample`."""
        if self.beta_steps is None:
            return self.beta_start
        return self.beta_start + (self.beta_end - self.beta_start) * min(1.0, self._draws / self.beta_steps)

    @property
    def priorities(self) -> NDArray[np.float64]:
        """Copy of every p_i, shape `[len]`."""
        return self._tree.view[: len(self)].copy()

    def add(self, experience: Any, priority: float | None = None) -> None:
        """Add one experience, replacing the oldest where the buffer is full.

        Args:
            experience: See `storage`.
            priority: Its |delta| where known, which `eps` and `alpha` are applied to. None:
                the largest priority there is.

        Raises:
            ValueError: A NaN or infinite priority, or an experience unlike the first.
        """
        ready = [experience] if self._n_step is None else self._n_step.push(experience)
        if ready:
            self._append(ready, None if priority is None else [priority] * len(ready), stacked=False)

    def extend(self, experiences: Any, priorities: ArrayLike | None = None, *, stacked: bool = False) -> None:
        """Add many experiences at once.

        Args:
            experiences: An iterable of experiences; with `stacked`, one experience whose
                leaves have an additional first axis (needs `storage="arrays"`).
            priorities: One |delta| each, or None.
            stacked: See above.

        Raises:
            ValueError: As for `add`; nothing is added.
        """
        if self._n_step is not None:
            if stacked or priorities is not None:
                raise ValueError("with n_step, extend takes an iterable of single steps and no priorities")
            experiences = [ready for step in experiences for ready in self._n_step.push(step)]
        self._append(experiences, priorities, stacked=stacked)

    def end_episode(self) -> None:
        """With `n_step`: the episode was cut short, so add what is pending."""
        if self._n_step is not None:
            self._append(self._n_step.end_episode(), None, stacked=False)

    def sample(self, batch_size: int, beta: float | None = None) -> tuple[Any, Losses, Indices]:
        """Draw a batch, with replacement.

        Args:
            batch_size: At least 1; it may exceed `len`.
            beta: For this call, in place of the annealed one.

        Returns:
            Experiences (list or stacked tree), weights (float32, shape `[batch_size]`) and
            indices (int64, same shape) for `update_priorities`.

        Raises:
            ValueError: The buffer is empty or `batch_size` is not a positive int.
        """
        if not _is_int(batch_size) or batch_size < 1:
            raise ValueError(f"batch_size must be an int of at least 1, got {batch_size!r}")
        if not self._added:
            raise ValueError("cannot sample from an empty buffer: add experiences first")
        beta = self.beta if beta is None else beta
        rng = self._streams.at(Purpose.BATCH, 0, self._draws)
        u = rng.random(batch_size)
        u += np.arange(batch_size)
        u /= batch_size
        slots = self._tree.draw(u)
        p = self._tree.view[slots]
        if self._normalize == "max":
            weights = (p / p.min()) ** -beta
        else:
            weights = (p * (len(self) / self._tree.total)) ** -beta
            if self._normalize == "mean":
                weights /= weights.mean()
        experiences = self._storage.read(slots)
        self._marks[slots] = _AWAITED
        self._draws += 1
        return experiences, weights.astype(np.float32), slots

    def update_priorities(self, indices: ArrayLike, td_errors: ArrayLike, *, as_of: int | None = None) -> int:
        """Give experiences the priority of their newest error.

        Where an index comes twice the last one counts. An index is skipped where the
        experience that was sampled has been overwritten since: the error belongs to one that
        is gone. By default the buffer remembers per slot whether an answer to `sample` is
        awaited; several batches in flight at once need `as_of` to be told apart.

        Args:
            indices: Slots that `sample` returned, shape `[n]`.
            td_errors: One error each, of either sign; tensors are detached.
            as_of: `buffer.added` at the time of `sample`.

        Returns:
            Number of indices that were not skipped.

        Raises:
            IndexError: An index outside `0 .. len - 1`.
            ValueError: NaN or infinite errors, or not one per index. Nothing is changed.
        """
        slots = as_array(indices).reshape(-1)
        errors = self._checked_errors(td_errors, slots.size)
        if slots.size and slots.dtype.kind not in "iu":
            raise IndexError(f"indices must be integers, got dtype {slots.dtype}")
        slots = slots.astype(np.int64, copy=False)
        # Negative numbers read as unsigned are huge: one comparison checks both ends.
        if slots.size and slots.view(np.uint64).max() >= len(self):
            bad = slots[(slots < 0) | (slots >= len(self))]
            raise IndexError(
                f"indices must be in 0 .. {len(self) - 1}, got {bad[0]} ({bad.size} of {slots.size} outside)"
            )
        if as_of is None:
            marks = self._marks[slots]
            self._marks[slots] = _IDLE
            current = marks != _REPLACED
        else:
            # How many experiences were added after the one now in the slot.
            age = (self._added - 1 - slots) % self.capacity
            current = age >= self._added - as_of
        if not current.all():
            slots, errors = slots[current], errors[current]
        if slots.size:
            self._set(slots, errors)
        return int(slots.size)

    def state_dict(self, *, experiences: bool = True) -> dict[str, Any]:
        """Return copies of priorities, counters and experiences.

        Args:
            experiences: False leaves them out. With `path` the files are flushed and opened
                again on loading; they go on changing, so such a state is good for stopping
                and going on, not for going back.
        """
        return {
            "capacity": self.capacity,
            "seed": self.seed,
            "added": self._added,
            "draws": self._draws,
            "largest": self._largest,
            "priorities": self.priorities,
            "marks": self._marks[: len(self)].copy(),
            "ranking": None if self._ranking is None else self._ranking.state_dict(len(self)),
            "n_step": None if self._n_step is None else self._n_step.state_dict(),
            "experiences": self._storage.state_dict(len(self), contents=experiences),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            CheckpointError: The state is of a buffer made with other arguments.
        """
        parts = {"ranking": self._ranking, "n_step": self._n_step}
        mine = {"capacity": self.capacity} | {name: part is not None for name, part in parts.items()}
        came = {"capacity": state["capacity"]} | {name: state[name] is not None for name in parts}
        if came != mine:
            raise CheckpointError(f"the state is of a buffer with {came}, this one has {mine}")
        count = min(state["added"], self.capacity)
        self._storage.load_state_dict(state["experiences"], count)
        weights = np.zeros(self.capacity)
        weights[:count] = state["priorities"]
        self._tree.fill(weights)
        self._marks[:] = _IDLE
        self._marks[:count] = state["marks"]
        self.seed = int(state["seed"])
        self._streams = RandomStreams(self.seed)
        self._added, self._draws = int(state["added"]), int(state["draws"])
        self._largest = float(state["largest"])
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(state[name])

    def _append(self, experiences: Any, priorities: ArrayLike | None, *, stacked: bool) -> None:
        count, rows = self._storage.stack(experiences, stacked=stacked)
        errors = None if priorities is None else self._checked_errors(priorities, count)
        if not count:
            return
        kept = min(count, self.capacity)
        slots = np.arange(self._added + count - kept, self._added + count) % self.capacity
        self._storage.write(slots, rows)
        self._marks[slots] = np.where(self._marks[slots] == _IDLE, _IDLE, _REPLACED)
        laps = self._added // self.capacity
        self._added += count
        if errors is not None:
            self._set(slots, errors[-kept:])
        elif self._ranking is not None:
            self._set(slots, np.full(kept, self._largest))
        else:
            self._tree.set(slots, self._largest)
        if self._added // self.capacity > laps:
            # Once a lap, so that one outlier does not rule over new experiences for ever.
            self._largest = float((self._tree.view if self._ranking is None else self._ranking.values).max())

    def _set(self, slots: Indices, errors: NDArray[np.float64]) -> None:
        largest = float(errors.max())
        if self._ranking is None:
            p = (errors + self.eps) ** self.alpha
            self._tree.set(slots, p)
            largest = float(p.max())
        else:
            slots, ranks = self._ranking.set(slots, errors, len(self))
            self._tree.set(slots, ranks**-self.alpha)
        self._largest = max(self._largest, largest)

    def _checked_errors(self, values: ArrayLike, count: int) -> NDArray[np.float64]:
        signed = np.asarray(as_array(values, lambda tensor: tensor.double()), dtype=np.float64)
        errors: NDArray[np.float64] = np.fabs(signed.reshape(-1))
        if errors.size != count:
            raise ValueError(f"need one error per experience: {count} experiences, {errors.size} errors")
        if errors.size and not errors.max() < math.inf:
            bad = np.flatnonzero(~np.isfinite(errors))
            raise ValueError(f"errors must be finite, got {errors[bad[0]]} at position {bad[0]} ({bad.size} in all)")
        return np.minimum(errors, _LARGEST_ERROR)


def _problems(capacity: Any, beta_steps: Any, seed: Any, numbers: Mapping[str, tuple[Any, float]]) -> list[str]:
    ints = {"capacity": (capacity, 1), "seed": (seed, 0)} | (
        {} if beta_steps is None else {"beta_steps": (beta_steps, 1)}
    )
    return [
        f"{name} must be an int of at least {low}, got {value!r}"
        for name, (value, low) in ints.items()
        if not (_is_int(value) and value >= low)
    ] + [
        f"{name} must be a number in 0 .. {high:g}, got {value!r}"
        for name, (value, high) in numbers.items()
        if not (_is_number(value) and 0.0 <= value <= high)
    ]


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
