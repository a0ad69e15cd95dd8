"""What every framework's fault test checks: NaN at random steps, and what became of the model's backups."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from learnit_r8 import R8Scheduler
from learnit_r8.events import BackupTaken, RolledBack
from learnit_r8.testing import FakeClock


def leaves(tree: Any) -> list[Any]:
    """Return the arrays, tensors and numbers of nested containers."""
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        return [leaf for part in tree for leaf in leaves(part)]
    if hasattr(tree, "to_local"):  # this rank's part of a DTensor
        tree = tree.to_local()
    return [tree.detach().cpu() if hasattr(tree, "detach") else tree]


def fingerprint(tree: Any) -> list[bytes]:
    """Return all that a tree of any framework holds, to the bit; of objects, their type."""
    return [_bytes(leaf) for leaf in leaves(tree)]


def _bytes(leaf: Any) -> bytes:
    if hasattr(leaf, "__array__"):
        return np.asarray(leaf).tobytes()
    return repr(leaf if isinstance(leaf, (str, bytes, bool, int, float, type(None))) else type(leaf)).encode()


def finite(tree: Any) -> bool:
    """Return whether no array holds NaN or infinity."""
    arrays = [np.asarray(leaf) for leaf in leaves(tree) if hasattr(leaf, "__array__")]
    assert arrays
    return all(bool(np.isfinite(array).all()) for array in arrays if array.dtype.kind == "f")


FAULTS, CLOSE = 5, 24


def random_steps(seed: int) -> Callable[[int], list[int]]:
    """Return a function from a run's length to the steps that NaN hits, ascending.

    They fall anywhere: beside each other, on the untrained model, right after a rollback, at the last step. Only
    what `survivable` rules out is drawn again.
    """

    def steps(length: int) -> list[int]:
        rng = np.random.default_rng(seed)
        while True:
            at = rng.choice(length, FAULTS, replace=False)
            at[0] = rng.choice([at[0], rng.integers(12), length - 1])
            at[1] = rng.choice([at[1], at[2] + 1, at[3] + rng.integers(2, 16)])
            drawn = sorted(set(at[at < length].tolist()))
            if len(drawn) == FAULTS and survivable(drawn):
                return drawn

    return steps


def survivable(steps: list[int]) -> bool:
    """Whether a run has to survive NaN at these steps, ascending, whatever backups it has.

    One backup is used at most three times while no 16 calm losses have come in between;
    reports that were under way during a rollback do not count. And there are ten rollbacks in 1000 steps.
    """
    chains = (steps[first : first + 4] for first in range(len(steps) - 3))
    return len(steps) <= 10 and all(max(np.diff(chain)) > CLOSE for chain in chains)


def always(length: int) -> list[int]:
    """Return all steps of a run from one in its first half on."""
    return list(range(int(np.random.default_rng(length).integers(length // 2)), length))


def never(length: int) -> list[int]:
    """Return no step."""
    return []


class BackupWatch:
    """Stands between a scheduler and the functions that copy and restore the model, whatever framework gives them.

    Args:
        faults: From the run's length to the numbers of the training steps (micro-batches) that NaN hits.
        make: `(**options) -> R8Scheduler`.
        **options: For `make`.

    Attributes:
        scheduler: The run, to be given to the framework.
        faults: The steps that NaN hits.
    """

    def __init__(self, faults: Callable[[int], list[int]], make: Callable[..., R8Scheduler], **options: Any) -> None:
        self._calls = 0
        self._capture: Callable[[], Any] = dict
        self._last: list[bytes] = []
        self._taken: dict[int, list[bytes]] = {}
        self._restored: list[list[bytes]] = []
        self._kept: list[tuple[Any, list[bytes]]] = []
        self._targets: list[int] = []
        self.scheduler = make(sinks=[self], clock=FakeClock(), backup_every=4, **options)
        self.faults = faults(self.scheduler.total_steps or 0)
        self.scheduler.attach_model = partial(self._attach, self.scheduler.attach_model)

    def factor(self) -> float:
        """Return what the losses, or the inputs, of the next training step are multiplied with: 1, or NaN."""
        self._calls += 1
        return float("nan") if self._calls - 1 in self.faults else 1.0

    def record(self, event: Any) -> None:
        if isinstance(event, RolledBack):
            self._targets.append(event.to_step)
        elif isinstance(event, BackupTaken):
            self._taken[event.step] = self._last

    def _attach(self, attach: Callable[..., None], capture: Callable[[], Any], restore: Callable[[Any], Any]) -> None:
        def noted() -> Any:
            state = capture()
            self._last = fingerprint(state)  # of a backup, or only looked at
            return state

        def checked(source: Any) -> None:
            before = fingerprint(source)
            restore(source)
            self._restored.append(fingerprint(capture()))
            self._kept.append((source, before))

        self._capture = capture
        attach(noted, checked)

    def findings(self) -> dict[str, Any]:
        """Return what came of it, as JSON data; `held`: the backups that are left are as they were taken."""
        held = [(slot.copy.tree, slot.info.step) for slot in self.scheduler._safety.backups.ring._slots]
        return {
            "steps": self.scheduler.global_step,
            "length": self.scheduler.total_steps,
            "per_epoch": self.scheduler.steps_per_epoch,
            "faults": self.faults,
            "hit": sum(fault < self._calls for fault in self.faults),
            "rollbacks": len(self._restored),
            "finite": finite(self._capture()),
            "equal": self._restored == [self._taken[step] for step in self._targets],
            "unchanged": all(fingerprint(source) == before for source, before in self._kept),
            "held": bool(held) and all(fingerprint(tree) == self._taken[step] for tree, step in held),
            "backups": len(self._taken),
        }


def check_survival(findings: dict[str, Any], *, accumulation: int = 1) -> None:
    """Assert that training went to its end and that each rollback brought a backup back, to the bit.

    Args:
        findings: Of a `BackupWatch`.
        accumulation: Micro-batches of one optimizer step: they are reported together and undone together.
    """
    epochs = (divmod(fault, findings["per_epoch"]) for fault in findings["faults"])
    expected = {"finite": True, "equal": True, "unchanged": True, "held": True, "steps": findings["length"]}
    expected |= {"hit": FAULTS, "rollbacks": len({(epoch, step // accumulation) for epoch, step in epochs})}
    assert findings["backups"] > FAULTS
    assert {name: findings[name] for name in expected} == expected, findings


def check_diverged(error: str) -> None:
    """Assert that a run with more NaN than rollbacks says so, and names samples."""
    cause = (
        r"(no backup and no checkpoint is left|the fault came back 10 times|\d+ losses in a row|the last \d+ losses)"
    )
    assert re.search(rf"training diverged at step \d+: {cause}.*; the last batch held the samples \[\d+, ", error), (
        error
    )
