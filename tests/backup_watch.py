"""What every framework's fault test checks: NaN at random steps, and what became of the model's backups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from learnit_r8 import R8Scheduler
from learnit_r8.events import RolledBack
from learnit_r8.testing import FakeClock


def leaves(tree: Any) -> list[Any]:
    """Return the arrays, tensors and numbers of nested containers."""
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        return [leaf for part in tree for leaf in leaves(part)]
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


FAULTS, LONGEST = 5, 200


def random_steps(seed: int) -> list[int]:
    """Return `FAULTS` steps below `LONGEST`, the first maybe that of the untrained model.

    They are 20 to 40 steps apart: a backup is proved between two of them. (What comes closer is told from a model
    that cannot be saved, and ends the run; the tests of the recovery table see to that.)
    """
    rng = np.random.default_rng(seed)
    return (rng.integers(0, 20) + np.append(0, rng.integers(20, 41, FAULTS - 1).cumsum())).tolist()


class BackupWatch:
    """Stands between a scheduler and the functions that copy and restore the model, whatever framework gives them.

    Args:
        faults: Numbers of the training steps (micro-batches) that NaN hits.
        make: `(**options) -> R8Scheduler`.
        **options: For `make`.

    Attributes:
        scheduler: The run, to be given to the framework.
    """

    def __init__(self, faults: list[int], make: Callable[..., R8Scheduler], **options: Any) -> None:
        self._faults = set(faults)
        self._calls = 0
        self._capture: Callable[[], Any] = dict
        self._taken: dict[int, list[bytes]] = {}
        self._restored: list[list[bytes]] = []
        self._kept: list[tuple[Any, list[bytes]]] = []
        self._targets: list[int] = []
        self.scheduler = make(sinks=[self], clock=FakeClock(), backup_every=4, **options)
        self.scheduler.attach_model = partial(self._attach, self.scheduler.attach_model)

    def factor(self) -> float:
        """Return what the losses, or the inputs, of the next training step are multiplied with: 1, or NaN."""
        self._calls += 1
        return float("nan") if self._calls - 1 in self._faults else 1.0

    def record(self, event: Any) -> None:
        if isinstance(event, RolledBack):
            self._targets.append(event.to_step)

    def _attach(self, attach: Callable[..., None], capture: Callable[[], Any], restore: Callable[[Any], Any]) -> None:
        def noted() -> Any:
            state = capture()
            self._taken[self.scheduler.global_step] = fingerprint(state)
            return state

        def checked(source: Any) -> None:
            before = fingerprint(source)
            restore(source)
            self._restored.append(fingerprint(capture()))
            self._kept.append((source, before))

        self._capture = capture
        attach(noted, checked)

    def findings(self) -> dict[str, Any]:
        """Return what came of it, as JSON data."""
        return {
            "steps": self.scheduler.global_step,
            "length": self.scheduler.total_steps,
            "hit": sum(fault < self._calls for fault in self._faults),
            "rollbacks": len(self._restored),
            "finite": finite(self._capture()),
            "equal": self._restored == [self._taken[step] for step in self._targets],
            "unchanged": all(fingerprint(source) == before for source, before in self._kept),
            "backups": len(self._taken),
        }


def check_survival(findings: dict[str, Any], *, rollbacks: int = FAULTS) -> None:
    """Assert that training went to its end and that each rollback brought a backup back, to the bit.

    Args:
        findings: Of a `BackupWatch`.
        rollbacks: How often the model was restored.
    """
    assert findings["backups"] > FAULTS
    expected = {"finite": True, "equal": True, "unchanged": True}
    expected |= {"steps": findings["length"], "hit": FAULTS, "rollbacks": rollbacks}
    assert {name: findings[name] for name in expected} == expected
