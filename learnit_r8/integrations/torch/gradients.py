"""Gradients: clipped by the scheduler's norm, and measured by part of the model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from learnit_r8.integrations.torch.learning_rate import is_sharded
from learnit_r8.scheduler import R8Scheduler

_MOST, _FEW, _RANGES = 8, 4, 4
"""Parts of a model, at most; fewer than these are split further; parts that a row of layers makes."""
_Named = list[tuple[list[str], Tensor]]
_parts: WeakKeyDictionary[nn.Module, tuple[list[int], dict[str, list[Tensor]]]] = WeakKeyDictionary()


def clip_gradients(scheduler: R8Scheduler, parameters: nn.Module | Iterable[Tensor]) -> Tensor:
    """Clip gradients as `torch.nn.utils.clip_grad_norm_` does, at `scheduler.clip_norm()`; call it before the step.

    Behind a `GradScaler` call `scaler.unscale_(optimizer)` first. Nothing waits for the device: the norm is read when
    `scheduler.check` or `scheduler.update_with_loss` reads the loss. Of a model the norms of its parts are read with it
    (torch 2.6 on, and not where its parameters are sharded), for the screen, the log and the report.

    Args:
        scheduler: Knows the norm, and learns from this one.
        parameters: A model, or the parameters whose gradients are clipped together.

    Returns:
        The norm before clipping, a tensor without dimensions.
    """
    measured = measure(parameters) if isinstance(parameters, nn.Module) else None
    if measured is None:
        given = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
        norm = nn.utils.clip_grad_norm_(given, scheduler.clip_norm())
        if hasattr(norm, "full_tensor"):  # sharded parameters: one collective, on all ranks
            norm = norm.full_tensor()
        scheduler.clipped(norm)
        return norm
    names, norms = measured
    assert isinstance(parameters, nn.Module)
    norm, limit = norms[0], scheduler.clip_norm()
    if limit < math.inf:
        nn.utils.clip_grads_with_norm_(itertools.chain(*_parts[parameters][1].values()), limit, norm)
    scheduler.clipped(norm, names, norms)
    return norm


def norms_by_group(model: nn.Module) -> dict[str, Tensor]:
    """Return the norm of the gradient of each part of a model, to be logged: `scheduler.log(**norms_by_group(model))`.

    Args:
        model: Its modules are split, the largest first, into eight parts at most; layers in a row make four.

    Returns:
        Tensors without dimensions, by "grad_norm/" and the part's name; parts without gradients have no entry.
    """
    return {f"grad_norm/{name}": _norm(part) for name, part in _parts_of(model).items() if _gradients(part)}


def measure(model: nn.Module) -> tuple[tuple[str, ...], Tensor] | None:
    """Return the names of a model's parts, and the norm of its gradient and of each part's; None where it has none."""
    parts = _parts_of(model)
    found = {name: part for name, part in parts.items() if _gradients(part)}
    if len(found) < 2 or not hasattr(nn.utils, "get_total_norm") or is_sharded(next(iter(found.values()))[0]):
        return None
    each = [_norm(part) for part in found.values()]
    norms = torch.stack([norm.to(each[0].device, torch.promote_types(norm.dtype, torch.float32)) for norm in each])
    return tuple(found), torch.cat([torch.linalg.vector_norm(norms).reshape(1), norms])


def _gradients(part: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in part if p.grad is not None]


def _norm(part: list[Tensor]) -> Tensor:
    total: Any = getattr(nn.utils, "get_total_norm", None)
    if total is not None:
        return total(_gradients(part))  # type: ignore[no-any-return]
    norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(one) for one in _gradients(part)]))
    return norm


def _parts_of(model: nn.Module) -> dict[str, list[Tensor]]:
    """Return the parameters of each part, which are looked for where they are others than before."""
    now = [id(parameter) for parameter in model.parameters()]
    known = _parts.get(model)
    if known is None or known[0] != now:
        named: _Named = [
            ([word for word in name.split(".") if word not in ("module", "_orig_mod")], parameter)
            for name, parameter in model.named_parameters()
        ]
        known = _parts[model] = now, {name: [p for _, p in part] for name, part in _split(named).items()}
    return known[1]


def _split(named: _Named) -> dict[str, _Named]:
    """Split the largest part by the next word of its parameters' names, as long as there is room."""
    parts: dict[tuple[str, ...], _Named] = {(): named}
    for _ in named:  # splits are fewer
        for path in sorted(parts, key=lambda path: -sum(p.numel() for _, p in parts[path])):
            if path and ("-" in path[-1] or (path[-1].isdigit() and len(parts) >= _FEW)):
                continue  # one layer among others is a part
            inner: dict[tuple[str, ...], _Named] = {}
            for words, parameter in parts[path]:
                if len(words) > len(path) + 1 or not path:  # the last word is the parameter's own
                    inner.setdefault(tuple(words[: len(path) + 1]), []).append((words, parameter))
            whole = sum(map(len, inner.values())) == len(parts[path])
            room = _MOST + 1 - len(parts)
            if whole and len(inner) > min(_RANGES, room) and all(key[-1].isdigit() for key in inner) and room > 1:
                inner = _ranges(inner, min(_RANGES, room))
            if whole and inner and len(inner) <= room:
                parts = {
                    key: value
                    for old, part in parts.items()
                    for key, value in (inner if old == path else {old: part}).items()
                }
                break
        else:
            break
    short = {path: ".".join(path[-2:] if path and path[-1][0].isdigit() else path[-1:]) for path in parts}
    if len(set(short.values())) < len(short):
        short = {path: ".".join(path) for path in parts}
    return {short[path]: part for path, part in parts.items()}


def _ranges(layers: dict[tuple[str, ...], _Named], count: int) -> dict[tuple[str, ...], _Named]:
    """Put layers in a row together."""
    keys, made = list(layers), {}
    for k in range(count):
        some = keys[len(keys) * k // count : len(keys) * (k + 1) // count]
        name = some[0][-1] if len(some) == 1 else f"{some[0][-1]}-{some[-1][-1]}"
        made[*some[0][:-1], name] = [one for key in some for one in layers[key]]
    return made
