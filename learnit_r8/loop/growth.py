"""More samples in the middle of a run, and the keys that a run goes on with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from learnit_r8.core.config import MAX_SAMPLES, Problems
from learnit_r8.core.portable import unpacked
from learnit_r8.errors import ConfigError
from learnit_r8.loop.arguments import Arguments, check_groups
from learnit_r8.loop.budget import Budget
from learnit_r8.loop.counters import grown_guard
from learnit_r8.loop.safety import SafetyNet
from learnit_r8.loop.sampling import Sampling
from learnit_r8.noise.guard import NoiseGuard
from learnit_r8.samples.catalog import LossCatalog
from learnit_r8.strategies.contract import Rules
from learnit_r8.structures.key_table import KeyTable


def keys_of(state: Mapping[str, Any], mine: KeyTable | None, num_samples: int) -> KeyTable | None:
    """Return the keys of a run that loads a state: its own, which begin with those of the state, or the state's.

    Raises:
        ConfigError: They are other keys, or in another order.
    """
    saved = state.get("keys")
    if saved is None or (mine is None and len(unpacked(saved["sizes"])) == num_samples):
        return mine if saved is None else KeyTable.from_state(saved)
    own = {"text": (), "sizes": ()} if mine is None else unpacked(mine.state_dict())
    for name in ("sizes", "text"):
        were = np.asarray(unpacked(saved)[name])
        if not np.array_equal(np.asarray(own[name])[: len(were)], were):
            raise ConfigError(
                [
                    "keys: the run was saved with other keys, or in another order: leave keys out, as the state holds "
                    "them, and give new ones to grow(keys); or give the same first, and new ones behind them"
                ]
            )
    return mine


class Growth:
    """Samples that come in the middle of a run.

    Args:
        args: The run's; the parts hold this one object, and its configuration, so the new size is written into them.
        rules: Of the strategy.
        keys: What the samples are called by.
        more: Their number, or their keys.
        groups: Their classes.

    Raises:
        ConfigError: They cannot be taken in.
    """

    def __init__(self, args: Arguments, rules: Rules, keys: KeyTable | None, more: Any, groups: Any) -> None:
        self._args, before, problems = args, args.config.num_samples, Problems()
        self._keys, self._new = keys, ()
        if keys is not None and not isinstance(more, (int, str, bytes)):
            self._new = tuple(more)
            more = len(self._new)
        elif keys is not None:
            problems.append(
                f"the run was given keys: grow(keys) takes a list of those of the new samples, got {more!r}"
            )
        self.size = before + problems.integer("more", more, 1)
        problems.integer("num_samples", self.size, 1, MAX_SAMPLES)
        if args.config.shard is not None:
            problems.append("with sharded=True data grow by a resume, on all ranks")
        if not rules.grows:
            problems.append(f"strategy={args.config.strategy!r} cannot take more samples in a run: start a new one")
        self._groups = args.groups
        if (args.groups is None) != (groups is None):
            problems.append("groups must be given for the new samples where the run was given groups, and only there")
        elif args.groups is not None and (new := check_groups(problems, groups, more)) is not None:
            self._groups = np.concatenate([args.groups, new])
        problems.raise_if_any()

    def apply(
        self, catalog: LossCatalog, chooser: Sampling, guard: NoiseGuard, safety: SafetyNet, budget: Budget
    ) -> None:
        """Let all that counts samples count them, too."""
        if self._keys is not None:
            self._keys.add(self._new)  # first: it may refuse one
        object.__setattr__(self._args, "groups", self._groups)
        object.__setattr__(self._args.config, "num_samples", self.size)
        catalog.grow(self.size)
        chooser.grow(self.size)
        guard.grow(self.size, self._groups, grown_guard(guard.state_dict(), self.size))
        safety.grow(self.size)
        budget.resize()
