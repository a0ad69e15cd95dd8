"""What a loader's workers get: random numbers that depend on the batch, and shelter from signals.

Random numbers depend neither on the worker nor on how often a run was resumed. Ctrl-C, `scancel`, torchrun and a
hung-up terminal reach the workers too; torch answers a dead worker with an exception in the middle of the step, and
then there is nothing whole to save. So workers ignore what the run itself waits for; only their parent may end them.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
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


class ShieldedWorker:
    """A `worker_init_fn` that ignores signals of others than the parent, then does what the user's own one does."""

    def __init__(self, inner: Callable[[int], Any] | None, numbers: Sequence[int]) -> None:
        self.inner = inner
        self.numbers = tuple(numbers)

    def __call__(self, worker: int) -> None:
        """Prepare a worker's process."""
        others = [number for number in self.numbers if number != signal.SIGTERM]
        for number in others:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, others)
        if signal.SIGTERM in self.numbers:
            # The parent's word for "enough": a worker that ignores it could not be ended. Who sent it is known only to
            # a thread that waits for it.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
        if self.inner is not None:
            self.inner(worker)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        got = signal.sigtimedwait({signal.SIGTERM}, 0.5)
        if got is not None and got.si_pid == parent:
            break
    os._exit(0)


class SignalsHeld:
    """Holds signals back in processes that are started from now on, until they have prepared themselves."""

    def __init__(self, numbers: Sequence[int]) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers) if numbers else set()
        self._numbers = set(numbers) - before

    def end(self) -> None:
        """Let this process have them again; any number of times."""
        numbers, self._numbers = self._numbers, set()
        if numbers:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    def __del__(self) -> None:
        self.end()


def shield(loader: Any, numbers: Sequence[int]) -> SignalsHeld:
    """Let the workers that a loader is about to start ignore signals; to be ended when they have been started."""
    if loader is None or not loader.num_workers or not numbers or sys.platform == "win32":
        return SignalsHeld(())
    if not isinstance(loader.worker_init_fn, ShieldedWorker):
        loader.worker_init_fn = ShieldedWorker(loader.worker_init_fn, numbers)
    return SignalsHeld(numbers)
