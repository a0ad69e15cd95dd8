"""A state of a run with fewer samples, made one of a run with more: those that are new were never seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.errors import ConfigError
from learnit_r8.samples.catalog import more_rows
from learnit_r8.strategies.contract import Rules


def check_growth(state: Mapping[str, Any], num_samples: int, rules: Rules) -> None:
    """Raise where a run of more samples has a strategy that cannot take them: it has a schedule of its own of all."""
    before = state["config"]["num_samples"]
    if before != num_samples and not rules.grows:
        raise ConfigError(
            [
                f"num_samples: the state was saved with {before}, this run has {num_samples}, and "
                f"strategy={state['config']['strategy']!r} cannot take more samples: use what it was saved with, or "
                "start a new run"
            ]
        )


def grown(state: Mapping[str, Any], num_samples: int) -> dict[str, Any]:
    """Return the state with samples behind its last one; they join the epochs that begin later.

    Masks need nothing: what their bytes do not reach is False.
    """
    if state["config"]["num_samples"] == num_samples:
        return dict(state)
    catalog = {**state["catalog"], "rows": more_rows(state["catalog"], num_samples)}
    guard: dict[str, Any] = dict(state["guard"])
    if guard["phase"] is not None:
        guard["phase"] = _padded(guard["phase"], num_samples)
    if guard["since"] is not None:
        guard["since"] = {name: _padded(value, num_samples) for name, value in guard["since"].items()}
    return {**state, "catalog": catalog, "guard": guard}


def _padded(values: Any, size: int) -> NDArray[Any]:
    array = np.asarray(values)
    return np.concatenate([array, np.zeros(size - len(array), array.dtype)])
