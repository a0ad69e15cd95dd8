"""Random numbers of loader workers that depend on the batch, not on the worker or on how often a run was resumed.

Of this module's own: workers started by "spawn" import it, and nothing else of the package.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info


class SeededIndices(list[int]):
    """A batch's sample ids; on their way into a worker process they seed its random generators.

    The worker takes them out of its queue right before it loads the batch, so whatever it draws then follows from
    the seed (from 0, below 2^63): from torch (on the CPU), numpy and `random`.
    """

    def __init__(self, ids: Iterable[int], seed: int) -> None:
        super().__init__(ids)
        self.seed = seed

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (list(self), self.seed)


def _arrive(ids: list[int], seed: int) -> list[int]:
    if get_worker_info() is not None:
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % (1 << 32))  # noqa: NPY002 - what datasets draw from
        random.seed(seed)
    return ids
