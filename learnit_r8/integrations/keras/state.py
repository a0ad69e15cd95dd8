"""A Keras model's training state as numpy arrays, on any backend."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import keras
import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.config import Problems

State = dict[str, list[NDArray[Any]]]


def capture_state(model: Any, *, copy: bool = True) -> State:
    """Return all that training changes, as numpy arrays: weights, optimizer, seeds and generators of random layers.

    Args:
        model: A built and compiled model.
        copy: False may return views of the model's own memory.
    """
    live = _variables(model)
    state = {part: [to_numpy(variable, copy=copy) for variable in live[part]] for part in live}
    return state | {"generators": [array.copy() for array in training_generators.get(model, torch_generators())]}


def restore_state(state: State, model: Any) -> None:
    """Bring back what `capture_state` returned; `state` can be used again.

    Args:
        state: The captured state.
        model: A built and compiled model of the same architecture and optimizer.

    Raises:
        ConfigError: The state is of another model; nothing has changed then.
    """
    live, problems = _variables(model), Problems()
    for part, variables in live.items():
        given, shapes = [array.shape for array in state[part]], [tuple(variable.shape) for variable in variables]
        if given != shapes:
            problems.append(f"{part}: the state has shapes {given}, the model {shapes}")
    problems.raise_if_any()
    for part, variables in live.items():
        for variable, array in zip(variables, state[part], strict=True):
            variable.assign(np.array(array))  # JAX would use the array's own memory
    training_generators[model] = [array.copy() for array in state.get("generators", [])]


# Keras on torch draws unseeded dropout from torch's global generators, and a loader draws from them
# whenever a Keras epoch begins. So the state after one step is put back before the next.
training_generators: WeakKeyDictionary[Any, list[NDArray[Any]]] = WeakKeyDictionary()


def torch_generators() -> list[NDArray[Any]]:
    """Return the states of torch's global generators; nothing on other backends."""
    if keras.backend.backend() != "torch":
        return []
    import torch

    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]
    return [state.numpy() for state in states]


def set_torch_generators(states: list[NDArray[Any]]) -> None:
    """Put back what `torch_generators` returned."""
    if keras.backend.backend() != "torch" or not states:
        return
    import torch

    first, *others = (torch.from_numpy(state.copy()) for state in states)
    torch.set_rng_state(first)
    if others and torch.cuda.device_count() == len(others):
        torch.cuda.set_rng_state_all(others)


def _variables(model: Any) -> dict[str, list[Any]]:
    trainable, optimizer = model.trainable_variables, model.optimizer
    if not optimizer.built:
        optimizer.build(trainable)
    return {
        "trainable": trainable, "non_trainable": model.non_trainable_variables, "optimizer": optimizer.variables
    }  # fmt: skip


def to_numpy(variable: Any, *, copy: bool) -> NDArray[Any]:
    """Return a variable's value."""
    value = variable.value
    try:
        # Not Keras' own way on torch: numpy warns of it, and it copies.
        array = value.detach().cpu().numpy() if hasattr(value, "detach") else keras.ops.convert_to_numpy(value)
    except TypeError:  # bfloat16
        array = keras.ops.convert_to_numpy(value)
    array = np.asarray(array)
    return array.copy() if copy else array
