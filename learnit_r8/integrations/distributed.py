"""Several processes over torch.distributed: every rank holds the same plan and takes its slice.

    scheduler = R8Scheduler(len(data), global_batch_size, num_epochs=3, **rank_arguments())

The only traffic is one all-gather of the losses a step (with a hash of the plan). Works with gloo
and nccl, under torchrun, Accelerate and Ray Train.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from learnit_r8.errors import ConfigError, ProtocolError
from learnit_r8.integrations.torch.sharded_model import ShardedModel, collective
from learnit_r8.strategies.base import BatchRequest, Draw, Strategy, make
from learnit_r8.strategies.contract import FLAGS, Rules, sound
from learnit_r8.types import Indices, LossReport

__all__ = ["FromRank0", "ShardedModel", "collective", "make_all_gather", "rank_arguments", "torch_all_gather"]

_NOT_INITIALIZED = (
    "torch.distributed is not initialized: call torch.distributed.init_process_group() first, in every process"
)
_LENGTH = 8  # bytes in front of a rank's data, its size


def _device(group: Any) -> torch.device:
    """Return where the backend wants its tensors."""
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


class _Gather:
    """Gathers ragged arrays in one collective, as long as they fit the buffer that is kept.

    All of the buffer travels. It grows where two calls in a row do not fit, as from one step's losses to the next; what
    is large once, at an epoch's start or in a checkpoint, gets a buffer of its own.
    """

    def __init__(self, group: Any) -> None:
        # Weak: a group that outlives destroy_process_group() aborts the interpreter's exit.
        self.group = weakref.ref(group)
        self._world, self._device = dist.get_world_size(group), _device(group)
        self._buffers = self._allocate(512)
        self._large_before = False

    def _allocate(self, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        mine = torch.empty(_LENGTH + capacity, dtype=torch.uint8)
        return mine, torch.empty(self._world * len(mine), dtype=torch.uint8, device=self._device)

    def __call__(self, array: NDArray[Any]) -> NDArray[Any]:
        if (group := self.group()) is None:
            raise ProtocolError(_NOT_INITIALIZED)
        data = np.ascontiguousarray(array).reshape(-1)
        raw = data.view(np.uint8)
        buffers, large = self._buffers, False
        while True:
            mine, everyone = buffers
            buffer, capacity = mine.numpy(), len(mine) - _LENGTH
            buffer[:_LENGTH].view(np.int64)[0] = len(raw)
            buffer[_LENGTH : _LENGTH + len(raw)] = raw[:capacity]
            dist.all_gather(list(everyone.chunk(self._world)), mine.to(self._device), group=group)
            rows = everyone.cpu().numpy().reshape(self._world, -1)
            sizes = rows[:, :_LENGTH].copy().view(np.int64)[:, 0]
            if sizes.max() <= capacity:
                break
            # All ranks see the same sizes, so all come to the same new capacity.
            buffers, large = self._allocate(1 << int(sizes.max() - 1).bit_length()), True
        if large and self._large_before:
            self._buffers = buffers
        self._large_before = large
        parts = [row[_LENGTH : _LENGTH + size] for row, size in zip(rows, sizes, strict=True)]
        return np.concatenate(parts).view(data.dtype)


def make_all_gather(group: Any = None) -> _Gather:
    """Return `all_gather` over a process group (None: all processes).

    Raises:
        ProtocolError: torch.distributed is not initialized.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ProtocolError(_NOT_INITIALIZED)
    return _Gather(group if group is not None else dist.group.WORLD)


_default: list[_Gather] = []  # of the present default group


def torch_all_gather(array: NDArray[Any]) -> NDArray[Any]:
    """Return every rank's array, concatenated in rank order: `R8Scheduler(all_gather=torch_all_gather)`.

    Args:
        array: 1-D, of the same dtype on all ranks; lengths may differ.

    Raises:
        ProtocolError: torch.distributed is not initialized.
    """
    if not _default or (group := _default[0].group()) is None or group is not dist.group.WORLD:
        _default[:] = [make_all_gather()]
    return _default[0](array)


class _SharedSlices:
    """`torch_all_gather` where several processes train on one slice of a batch.

    Args:
        mesh: The dimensions over which the data are parallel.
    """

    def __init__(self, mesh: Any) -> None:
        coordinate = mesh.get_coordinate()
        self.slice = int(np.ravel_multi_index(tuple(coordinate), tuple(mesh.shape)))
        self.place = dist.get_rank()
        self.slices = torch_all_gather(np.array([self.slice]))

    def __call__(self, array: NDArray[Any]) -> NDArray[Any]:
        return torch_all_gather(array)


def rank_arguments(mesh: Any = None) -> dict[str, Any]:
    """Return `rank`, `world_size` and `all_gather` of this process, for `R8Scheduler` or `resume_from_checkpoint`.

    Args:
        mesh: Where not all processes are data-parallel (tensor, context or pipeline parallelism): the dimensions of
            the `DeviceMesh` over which they are, `mesh["dp"]`. Processes that differ in the other dimensions get the
            same slice. All processes must call it then.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return {"rank": 0, "world_size": 1, "all_gather": None}
    if mesh is not None:
        shared = _SharedSlices(mesh)
        return {"rank": shared.slice, "world_size": mesh.size(), "all_gather": shared}
    return {"rank": dist.get_rank(), "world_size": dist.get_world_size(), "all_gather": torch_all_gather}


@sound  # as far as what it wraps is
class FromRank0:
    """A strategy whose every choice is made on rank 0 and broadcast: `strategy=FromRank0("prioritized")`.

    For strategies that would not choose alike on all ranks (they read a clock, a file, their own
    random numbers). The plan costs two broadcasts a batch; the other ranks' strategies stay idle.

    Args:
        strategy: A name or an object, as for `R8Scheduler`.

    Attributes:
        wrapped: The strategy object.

    Raises:
        ConfigError: No strategy, or one that could not be resumed.
    """

    needs_one_plan = True
    catalogs: bool
    covers: bool
    replacement: bool
    grows: bool

    def __init__(self, strategy: str | Strategy) -> None:
        self.wrapped: Any = make(strategy)
        self._rules = rules = Rules(self.wrapped)
        if rules.has("start_epoch") and not rules.has("load_state_dict"):
            raise ConfigError(f"{strategy!r} plans epochs: FromRank0 needs its state_dict() and load_state_dict()")
        self.name = strategy if isinstance(strategy, str) else getattr(strategy, "name", type(strategy).__name__)
        vars(self).update({flag: getattr(rules, flag) for flag in FLAGS})
        self._decisions: list[tuple[str, str, float]] = []

    def _told(self, choose: Callable[[], Any]) -> Any:
        """Return what rank 0 chooses; where that fails, no other rank goes on waiting for it."""
        told, failure = [None, ""], None
        if dist.get_rank() == 0:
            try:
                told[0] = choose()
            except Exception as error:
                failure, told[1] = error, f"{type(error).__name__}: {error}"
        dist.broadcast_object_list(told, 0, device=_device(None))
        if told[1]:
            raise failure or ProtocolError(f"the strategy failed on rank 0: {told[1]}")
        return told[0]

    def start_epoch(self, request: BatchRequest) -> int | None:
        """Let rank 0 plan the epoch; return its number of samples."""
        # A detector that is warned of a decision on one rank only would judge differently.
        samples, decisions = self._told(lambda: (self._rules.start_epoch(request), self._rules.pop_decisions()))
        self._decisions += decisions
        return samples  # type: ignore[no-any-return]

    def pop_decisions(self) -> list[tuple[str, str, float]]:
        """Return what rank 0's strategy decided since the last call."""
        decisions, self._decisions = self._decisions, []
        return decisions

    def draw(self, request: BatchRequest) -> Draw:
        """Return rank 0's choice."""
        return self._told(lambda: Draw.of(self.wrapped.draw(request)))  # type: ignore[no-any-return]

    def observe(self, report: LossReport) -> None:
        """Let rank 0's strategy hear the report."""
        if dist.get_rank() == 0:
            self._rules.observe(report)

    def forget(self, indices: Indices) -> None:
        """Let rank 0's strategy know what will not be reported."""
        if dist.get_rank() == 0:
            self._rules.forget(indices)

    def state_dict(self) -> dict[str, Any]:
        """Return the strategy's state; rank 0's is the one that counts."""
        return {"strategy": self._rules.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if state["strategy"] is not None:
            self._rules.load_state_dict(state["strategy"])
