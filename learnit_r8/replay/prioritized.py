"""Prioritized experience replay (Schaul, Quan, Antonoglou, Silver 2015, arXiv 1511.05952)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from learnit_r8.core.arrays import as_array, as_losses
from learnit_r8.core.config import Problems
from learnit_r8.core.rng import Purpose, RandomStreams
from learnit_r8.core.state import Kind, fixed, maybe, part, table
from learnit_r8.errors import CheckpointError
from learnit_r8.replay.n_step import NStep
from learnit_r8.replay.priorities import Ranking, RecentLargest
from learnit_r8.replay.saving import SavedBuffer, check_made_with, filled, slots
from learnit_r8.replay.storage import ArrayStorage, ObjectStorage
from learnit_r8.structures.sum_tree import SumTree
from learnit_r8.types import Indices, Losses

_LARGEST_ALPHA, _LARGEST_BETA, _LARGEST_EPS, _LARGEST_ERROR = 3.0, 10.0, 1.0, 1e90
"""Larger errors count as this one, so that no priority leaves the range of float64."""
_CALLS_AHEAD, _FEW_POINTS = 8, 4096
"""Calls of `sample` whose random numbers are drawn together, and the batch up to which that pays."""
# What is known of an experience's slot, so that an update can tell whom it is for.
_IDLE, _AWAITED, _REPLACED = 0, 1, 2


class DrawnIndices(np.ndarray[Any, np.dtype[np.int64]]):
    """The slots that `sample` returns; they, slices and copies know how many experiences had been added until then."""

    as_of: int | None = None

    def __array_finalize__(self, source: Any) -> None:
        self.as_of = getattr(source, "as_of", None)

    def __reduce__(self) -> Any:
        made: Any = super().__reduce__()
        return *made[:2], (made[2], self.as_of)

    def __setstate__(self, state: Any) -> None:
        array, self.as_of = state
        super().__setstate__(array)


class PrioritizedReplayBuffer(SavedBuffer):
    """A ring of experiences, drawn in proportion to how wrong the model was about them.

    `p_i = (|delta_i| + eps)**alpha`, `P(i) = p_i / sum p`, `w_i = (N P(i))**-beta`, where N is
    the number of experiences held (section 3.3 and 3.4 of the paper). The rank-based variant
    has `p_i = rank(i)**-alpha`, rank 1 being the largest |delta|. New experiences get the
    largest priority there is, so that each is soon replayed once: the largest of the last
    `capacity` additions and reported errors, so that an outlier is forgotten after a lap. Until
    an error is reported all are alike.

    Draws are stratified (appendix B.2.1): the sum of priorities is cut into `batch_size`
    equal ranges with one draw from each, with replacement, so a batch may be larger than the
    buffer. Indices are slots, `0 .. len - 1`; slots are reused, oldest first.

    Any number of threads may use one buffer (with `n_step` one of them adds). Copies made by pickle
    and deepcopy go on like the original; `save` and `load` keep a buffer in a file.

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
        path: Folder for memory-mapped arrays, of this buffer alone; needs `storage="arrays"`.
        n_step: Makes n-step experiences of single steps on their way in.
        fast: True: draws compiled with numba. False: numpy. None: numba where it is installed and the buffer is
            large enough to repay its import. Draws do not depend on it.

    Raises:
        ConfigError: Lists every bad argument.
    """

    capacity: int = fixed()
    alpha: float = fixed()
    eps: float = fixed()
    seed: int = fixed()
    _saved = table(
        seed=int,
        added=int,
        draws=int,
        recent=part(lambda buffer, _: RecentLargest(buffer.capacity)),
        default=slots(np.bool_),
        largest=float,
        priorities=Kind(lambda buffer, _: buffer.priorities, lambda buffer, saved: buffer._tree_of(saved), "_tree"),
        marks=slots(np.uint8),
        ranking=maybe(part(lambda buffer, _: Ranking(buffer.capacity, len(buffer)))),
        n_step=maybe(part()),
    )

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
        problems = Problems()
        self.capacity = problems.integer("capacity", capacity, 1)
        self.seed = problems.integer("seed", seed, 0)
        self.beta_steps = None if beta_steps is None else problems.integer("beta_steps", beta_steps, 1)
        self.alpha = problems.real("alpha", alpha, 0.0, _LARGEST_ALPHA)
        self.beta_start = problems.real("beta", beta, 0.0, _LARGEST_BETA)
        self.beta_end = problems.real("beta_end", beta_end, 0.0, _LARGEST_BETA)
        self.eps = problems.real("eps", eps, 0.0, _LARGEST_EPS)
        if normalize not in ("max", "mean", None):
            problems.append(f"normalize must be 'max', 'mean' or None, got {normalize!r}")
        problems.choice("variant", variant, ("proportional", "rank"))
        problems.choice("storage", storage, ("objects", "arrays"))
        if path is not None and storage != "arrays":
            problems.append(f'path needs storage="arrays", got storage={storage!r}')
        problems.raise_if_any()
        self._normalize = normalize
        self._kind = {"variant": variant, "storage": storage}
        self._n_step = copy.deepcopy(n_step)  # one for each buffer: what is pending belongs to one episode
        self._streams = RandomStreams(self.seed)
        self._fast = fast
        self._tree = SumTree(self.capacity, fast=fast)
        self._storage: Any = ObjectStorage(capacity) if storage == "objects" else ArrayStorage(capacity, path)
        self._marks = np.zeros(self.capacity, dtype=np.uint8)
        self._added = 0
        self._draws = 0
        self._ahead = (-1, 0), np.zeros((0, 0))  # points of the coming calls, and which calls these are
        self._ranking = Ranking(self.capacity) if variant == "rank" else None
        self._recent = RecentLargest(self.capacity)  # |delta| (rank) or p (proportional)
        self._largest = 1.0  # what a new experience gets: the largest of them
        self._default = np.zeros(self.capacity, dtype=bool)  # experiences that have it: no error was reported yet

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:  # other threads go on while the copies are pickled
            parts = {name: copy.deepcopy(vars(self)[name]) for name in ("_tree", "_ranking", "_n_step", "_recent")}
            arrays = {"_marks": self._marks.copy(), "_default": self._default.copy()}
            return {**super().__getstate__(), **parts, **arrays, "_storage": self._storage.copied()}

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
        self._put([experience], None if priority is None else [priority])

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
        if self._n_step is not None and (stacked or priorities is not None):
            raise ValueError("with n_step, extend takes an iterable of single steps and no priorities")
        self._put(experiences, priorities, stacked=stacked)

    def end_episode(self) -> None:
        """With `n_step`: the episode was cut short, so add what is pending."""
        if self._n_step is not None:
            with self._lock:
                self._append(self._n_step.end_episode(), None)

    def _put(self, experiences: Any, priorities: Any, *, stacked: bool = False) -> None:
        with self._lock:
            if self._n_step is None:
                self._append(experiences, priorities, stacked=stacked)
                return
            steps = [self._storage.own(step) for step in experiences]
            # Each step by itself: what does not fit is refused now, not when it has become part of others.
            alone = steps if len(self) else [*self._n_step.pending, *steps]
            ready, pending = self._n_step.follow(steps)
            self._storage.stack([self._n_step.combined([step]) for step in alone], stacked=False)
            self._append(ready, None if priorities is None else priorities * len(ready))
            self._n_step.keep(pending)

    def sample(self, batch_size: int, beta: float | None = None) -> tuple[Any, Losses, Indices]:
        """Draw a batch, with replacement.

        Args:
            batch_size: At least 1; it may exceed `len`.
            beta: For this call, in place of the annealed one, 0 to 10.

        Returns:
            Experiences (list or stacked tree), weights (float32, shape `[batch_size]`) and
            indices (int64, same shape) for `update_priorities`, which know when they were drawn.

        Raises:
            ValueError: The buffer is empty, `batch_size` is not a positive int, or `beta` out of range.
        """
        if beta is not None and not 0.0 <= (beta := float(beta)) <= _LARGEST_BETA:
            raise ValueError(f"beta must be in 0 .. {_LARGEST_BETA:g}, got {beta}")
        if not isinstance(batch_size, (int, np.integer)) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"batch_size must be an int of at least 1, got {batch_size!r}")
        with self._lock:
            if not self._added:
                raise ValueError("cannot sample from an empty buffer: add experiences first")
            beta = self.beta if beta is None else beta
            slots = self._tree.draw(self._points(batch_size))
            p = self._tree.view[slots]
            if self._normalize == "max":
                weights = (p / np.minimum.reduce(p)) ** -beta
            else:
                weights = (p * (len(self) / self._tree.total)) ** -beta
                if self._normalize == "mean":
                    weights /= weights.mean()
            experiences = self._storage.read(slots)
            self._marks[slots] = _AWAITED
            self._draws += 1
            drawn = slots.view(DrawnIndices)
            drawn.as_of = self._added
        return experiences, weights.astype(np.float32), drawn

    def _points(self, size: int) -> NDArray[np.float64]:
        """Return one number from each of `size` equal parts of 0 .. 1, of several calls at a time."""
        calls = _CALLS_AHEAD if size <= _FEW_POINTS else 1
        block, row = divmod(self._draws, calls)
        if self._ahead[0] != (block, size):
            points = self._streams.at(Purpose.BATCH, calls, block).random((calls, size))
            self._ahead = (block, size), (points + np.arange(float(size))) / size
        return np.asarray(self._ahead[1][row])

    def update_priorities(self, indices: ArrayLike, td_errors: ArrayLike, *, as_of: int | None = None) -> int:
        """Give experiences the priority of their newest error.

        Where an index comes twice the last one counts. An index is skipped where the
        experience that was sampled has been overwritten since: the error belongs to one that
        is gone. The indices that `sample` returned, and slices of them, know when they were drawn;
        of copies in another form the buffer knows per slot whether an answer is awaited, and
        several batches of them in flight at once need `as_of` to be told apart.

        Args:
            indices: Slots that `sample` returned, shape `[n]`.
            td_errors: One error each, of either sign; tensors are detached.
            as_of: `buffer.added` at the time of `sample`.

        Returns:
            Number of indices that were not skipped.

        Raises:
            IndexError: An index outside `0 .. len - 1`.
            TypeError: The errors are not numbers.
            ValueError: NaN or infinite errors, or not one per index. Nothing is changed.
        """
        as_of = getattr(indices, "as_of", None) if as_of is None else as_of
        slots = as_array(indices).reshape(-1)
        errors = self._checked_errors(td_errors, slots.size)
        if slots.size and slots.dtype.kind not in "iu":
            raise IndexError(f"indices must be integers, got dtype {slots.dtype}")
        slots = slots.astype(np.int64, copy=False)
        with self._lock:
            # Negative numbers read as unsigned are huge: one comparison checks both ends.
            if slots.size and np.maximum.reduce(slots.view(np.uint64)) >= len(self):
                bad = slots[(slots < 0) | (slots >= len(self))]
                raise IndexError(
                    f"indices must be in 0 .. {len(self) - 1}, got {bad[0]} ({bad.size} of {slots.size} outside)"
                )
            current: Any = slice(None)
            if as_of is None:
                current = self._marks[slots] != _REPLACED
            elif as_of < self._added:  # how many experiences were added after the one now in the slot?
                current = (self._added - 1 - slots) % self.capacity >= self._added - as_of
            self._marks[slots] = _IDLE
            slots, errors = slots[current], errors[current]
            if slots.size:
                self._set(slots, errors)
        return int(slots.size)

    def _made_with(self) -> dict[str, Any]:
        steps = None if self._n_step is None else self._n_step.made_with
        return {"capacity": self.capacity, "alpha": self.alpha, "eps": self.eps, **self._kind, "n_step": steps}

    def _tree_of(self, priorities: ArrayLike) -> SumTree:
        tree = SumTree(self.capacity, fast=self._fast)
        tree.fill(filled(priorities, len(self), np.zeros(self.capacity)))
        return tree

    def _held(self, experiences: bool, *, copy: bool) -> Any:
        return self._storage.state_dict(len(self), self._added % self.capacity, contents=experiences, copy=copy)

    def _hold(self, state: Mapping[str, Any], before: Mapping[str, Any]) -> None:
        if min(self._added, self._draws, self.seed) < 0 or not 0.0 <= self._largest < math.inf:
            raise ValueError("a counter is negative")
        if (self._ranking is None, self._n_step is None) != (before["_ranking"] is None, before["_n_step"] is None):
            raise ValueError("ranking or n_step is missing, or too much")
        self._streams, self._ahead = RandomStreams(self.seed), ((-1, 0), np.zeros((0, 0)))
        if state["experiences"] is not None:
            check_made_with({"storage": state["experiences"]["kind"]}, {"storage": self._kind["storage"]})
            self._storage.load_state_dict(state["experiences"], len(self), self._added % self.capacity)
        elif len(self) and before["_added"] != self._added:
            raise CheckpointError(
                "the state was saved without its experiences, and this buffer holds others: save with experiences=True"
            )

    def _append(self, experiences: Any, priorities: ArrayLike | None, *, stacked: bool = False) -> None:
        count, rows = self._storage.stack(experiences, stacked=stacked)
        errors = None if priorities is None else self._checked_errors(priorities, count)
        if not count:
            return
        kept = min(count, self.capacity)
        slots = np.arange(self._added + count - kept, self._added + count, dtype=np.int64) % self.capacity
        self._storage.write(slots, rows)
        self._marks[slots] = np.where(self._marks[slots] == _IDLE, _IDLE, _REPLACED)
        self._added += count
        if errors is not None:
            self._set(slots, errors[-kept:])
        else:
            self._default[slots] = True
            self._weigh(slots, self._largest)
            self._note(count, None)

    def _set(self, slots: Indices, errors: NDArray[np.float64]) -> None:
        self._default[slots] = False
        values = errors if self._ranking is not None else (errors + self.eps) ** self.alpha
        self._weigh(slots, values)
        self._note(slots.size, float(np.maximum.reduce(values)))

    def _weigh(self, slots: Indices, values: NDArray[np.float64] | float) -> None:
        weights = values if isinstance(values, np.ndarray) else np.full(slots.size, values)
        if self._ranking is not None:
            slots, ranks = self._ranking.set(slots, weights, len(self))
            weights = ranks**-self.alpha
        self._tree.set(slots, weights)

    def _note(self, events: int, largest: float | None) -> None:
        """Count events; where the largest falls, or is known at last, so do the priorities that are nobody's error."""
        first = self._recent.value is None
        self._recent.note(events, largest)
        value = self._recent.value
        if value is None or value == self._largest:
            return
        fell, self._largest = value < self._largest, value
        if (fell or first) and self._default.any():
            slots = np.flatnonzero(self._default)
            self._weigh(slots, value)

    def _checked_errors(self, values: ArrayLike, count: int) -> NDArray[np.float64]:
        errors = np.abs(as_losses(values, "errors").reshape(-1))
        if errors.size != count:
            raise ValueError(f"need one error per experience: {count} experiences, {errors.size} errors")
        largest = np.maximum.reduce(errors, initial=0.0)
        if not largest < math.inf:
            bad = np.flatnonzero(~np.isfinite(errors))
            raise ValueError(f"errors must be finite, got {errors[bad[0]]} at position {bad[0]} ({bad.size} in all)")
        return errors if largest <= _LARGEST_ERROR else np.minimum(errors, _LARGEST_ERROR)
