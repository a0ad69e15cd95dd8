"""Gradients: clipped by the scheduler's norm, and measured by part of the model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from learnit_r8.scheduler import R8Scheduler


def clip_gradients(scheduler: R8Scheduler, parameters: nn.Module | Iterable[Tensor]) -> Tensor:
    """Clip gradients by `torch.nn.utils.clip_grad_norm_` at `scheduler.clip_norm()`; call it before the step.

    Behind a `GradScaler` call `scaler.unscale_(optimizer)` first. Nothing waits for the device: the norm is read when
    `scheduler.check` or `scheduler.update_with_loss` reads the loss.

    Args:
        scheduler: Knows the norm, and learns from this one.
        parameters: A model, or the parameters whose gradients are clipped together.

    Returns:
        The norm before clipping, a tensor without dimensions.
    """
    given = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
    norm = nn.utils.clip_grad_norm_(given, scheduler.clip_norm())
    if hasattr(norm, "full_tensor"):  # sharded parameters: one collective, on all ranks
        norm = norm.full_tensor()
    scheduler.clipped(norm)
    return norm


def norms_by_group(model: nn.Module) -> dict[str, Tensor]:
    """Return the norm of the gradient of each child of a model, to be logged: `scheduler.log(**norms_by_group(model))`.

    Args:
        model: Its direct children are the groups; its own parameters, and children without gradients, have no entry.

    Returns:
        Tensors without dimensions, by "grad_norm/" and the child's name.
    """
    norms = {}
    for name, child in model.named_children():
        gradients = [p.grad for p in child.parameters() if p.grad is not None]
        if gradients:
            each = [torch.linalg.vector_norm(gradient) for gradient in gradients]
            norms[f"grad_norm/{name}"] = torch.linalg.vector_norm(torch.stack(each))
    return norms
