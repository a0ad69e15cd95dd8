"""A training's state as tensors, lists, tuples, dicts and numbers: `torch.load(weights_only=True)` reads it."""

from __future__ import annotations

import io
import random
from collections import OrderedDict
from collections.abc import Iterator, KeysView
from typing import Any

import numpy as np
import torch

from learnit_r8.errors import ConfigError
from learnit_r8.integrations.torch.learning_rate import has_stepped
from learnit_r8.stability.tree_copy import CopyPlan, buffers_of

State = dict[str, Any]
_PARTS = ("model", "optimizer", "scaler", "ema")


def capture_state(
    model: Any,
    optimizer: Any = None,
    scaler: Any = None,
    ema: Any = None,
    *,
    rngs: bool = True,
    out: State | None = None,
    copy: bool = True,
) -> State:
    """Return all that training changes, copied: nothing in it shares memory with the model.

    Args:
        model: A module, or anything else with `state_dict()`, or a list or dict of such; likewise the next three.
        optimizer: Or None.
        scaler: `torch.amp.GradScaler`, or None.
        ema: Averaged weights (`torch.optim.swa_utils.AveragedModel`, ...), or None.
        rngs: Whether the states of the global random generators of torch (CPU and CUDA), numpy and
            Python are part of it.
        out: An earlier result that is not needed any more: its memory is used again, so that
            nothing is allocated. Tensors on a GPU are copied to pinned memory.
        copy: False returns the live tensors: enough for a `state_callback`, whose result the
            scheduler copies at once.

    Returns:
        CPU tensors in the nesting of the `state_dict`s. Tensors that share memory (tied weights) do so here.
    """
    given = dict(zip(_PARTS, (model, optimizer, scaler, ema), strict=True))
    _refuse_deepspeed(given)
    live: State = {name: _state_of(part) for name, part in given.items() if part is not None}
    if rngs:
        live["rngs"] = capture_rngs()
    if not copy:
        return live
    state: State = CopyPlan(live, None if out is None else buffers_of(out)).fill().tree
    return state


def _refuse_deepspeed(given: dict[str, Any]) -> None:
    """Raise where the states are DeepSpeed's, which hold a rank's part and do not load as they were given.

    ZeRO marks parameters: of stage 3 those that lie on all ranks, of the others those whose true values the optimizer
    keeps, and writes over what is restored.
    """
    modules = [one for one in _named(given["model"]).values() if isinstance(one, torch.nn.Module)]
    objects = [one for part in given.values() for one in _named(part).values()]
    objects += [getattr(one, "optimizer", None) for one in objects]  # in Accelerate's wrapper
    theirs = any(type(one).__module__.startswith("deepspeed") for one in objects)
    parameters = (parameter for module in modules for parameter in module.parameters())
    if theirs or any(hasattr(parameter, mark) for parameter in parameters for mark in ("ds_id", "_hp_mapping")):
        raise ConfigError(
            "DeepSpeed's states cannot be copied and restored part by part: take no backups in RAM, and give its "
            "own functions, save_callback=collective(lambda path: engine.save_checkpoint(path)) and load_callback"
        )


def _named(part: Any) -> dict[str, Any]:
    """Return the objects that a part consists of; one that is no list and no dict has the name ""."""
    if isinstance(part, (list, tuple)):
        return {str(number): one for number, one in enumerate(part)}
    return dict(part) if isinstance(part, dict) else {"": part}


def _state_of(part: Any) -> Any:
    states = {name: one.state_dict() for name, one in _named(part).items()}
    return states.get("", states)


def restore_state(
    state: State, model: Any, optimizer: Any = None, scaler: Any = None, ema: Any = None, *, rngs: bool = True
) -> None:
    """Bring back what `capture_state` returned; `state` can be used again, later steps do not change it.

    Gradients are cleared: those of a step that went wrong must not enter the next one.

    Args:
        state: The captured state.
        model: As for `capture_state`; likewise the rest. What the state lacks is left alone.
        optimizer: See there.
        scaler: See there.
        ema: See there.
        rngs: Whether to restore random generators.

    Raises:
        ConfigError: The state is of another list, or dict, of objects; nothing has changed then.
    """
    given = dict(zip(_PARTS, (model, optimizer, scaler, ema), strict=True))
    loads: list[tuple[Any, Any]] = []
    for name, part in given.items():
        if part is None or name not in state:
            continue
        objects = _named(part)
        states = {"": state[name]} if "" in objects else state[name]
        if objects.keys() != states.keys():
            raise ConfigError(
                f"{name}: {len(objects)} objects are to be restored, and the state was captured of others: give "
                "restore_state what capture_state got"
            )
        loads += [(one, states[key]) for key, one in objects.items()]
    for one, kept in loads:
        _load(one, kept)
    for one in (*_named(optimizer).values(), *_named(model).values()):
        if hasattr(one, "zero_grad"):
            one.zero_grad(set_to_none=True)
    if rngs and "rngs" in state:
        restore_rngs(state["rngs"])


def _load(part: Any, state: Any) -> None:
    """Load an earlier state of a part; of an optimizer in use also one from before a parameter group was added.

    Such a group keeps its settings, and what the optimizer knows of its parameters begins anew.
    """
    if not isinstance(part, torch.nn.Module):  # a module copies into its own memory, others keep what they are given
        state = CopyPlan(state).fill().tree
    inner = getattr(part, "optimizer", part)  # of Accelerate's wrapper
    # Of an optimizer that is not in use the state is another program's, and must fit.
    if isinstance(inner, torch.optim.Optimizer) and (inner.state or has_stepped(inner)):
        groups = state["param_groups"]
        state = {**state, "param_groups": [*groups, *inner.state_dict()["param_groups"][len(groups) :]]}
    part.load_state_dict(state)


def tensors_from_arrays(tree: Any) -> Any:
    """Return a copy of a scheduler's state with tensors in place of numpy arrays and scalars.

    `torch.save(tensors_from_arrays(scheduler.state_dict()), path)` loads under `weights_only=True`.
    """
    if isinstance(tree, np.ndarray):
        return torch.from_numpy(tree.copy())
    return _mapped(tree, tensors_from_arrays)


def arrays_from_tensors(tree: Any) -> Any:
    """Undo `tensors_from_arrays`."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().cpu().numpy().copy()
    return _mapped(tree, arrays_from_tensors)


class TensorState:
    """A scheduler or sampler for what saves objects by `torch.save` or `torch.distributed.checkpoint`.

        accelerator.register_for_checkpointing(TensorState(scheduler))
        dcp.save({"model": model_state, "r8": TensorState(scheduler)}, checkpoint_id=folder)

    The file then loads under `weights_only=True`; the scheduler's own state holds numpy arrays, which do not.

    Args:
        part: Has `state_dict` and `load_state_dict`.
    """

    def __init__(self, part: Any) -> None:
        self._part = part

    def state_dict(self) -> OnePiece:
        """Return its state, in new memory."""
        return OnePiece(tensors_from_arrays(self._part.state_dict()))

    def load_state_dict(self, state: Any) -> None:
        """Restore what `state_dict` returned."""
        self._part.load_state_dict(arrays_from_tensors({name: state[name] for name in state}))


class OnePiece:
    """A dict, which is an OrderedDict once it is pickled, and which torch.distributed.checkpoint does not take apart.

    That reads into what a new object's state has the shape of, and a new scheduler has no plan yet.

    Args:
        state: The dict.
    """

    def __init__(self, state: State) -> None:
        self._state = state

    def __getitem__(self, name: str) -> Any:
        return self._state[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def keys(self) -> KeysView[str]:
        """Return the names."""
        return self._state.keys()

    def __reduce__(self) -> Any:
        return OrderedDict, (), None, None, iter(self._state.items())

    def __deepcopy__(self, memo: Any) -> OnePiece:
        return self  # by `async_save`: a dict would be taken apart; nobody else holds what is in it


def _mapped(tree: Any, function: Any) -> Any:
    if isinstance(tree, dict):
        return {key: function(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(function(value) for value in tree)
    return tree.item() if isinstance(tree, np.generic) else tree


def packed(state: Any) -> bytes:
    """Return a state of tensors, containers and numbers as bytes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def unpacked(data: bytes) -> Any:
    """Undo `packed`."""
    return torch.load(io.BytesIO(data), weights_only=True)


def capture_rngs() -> State:
    """Return the states of the global random generators."""
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the users' state, only kept
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys, np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "python": random.getstate(),
    }


def restore_rngs(state: State) -> None:
    """Restore what `capture_rngs` returned."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all([part.cpu() for part in state["cuda"]])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
