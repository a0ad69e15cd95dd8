"""R8Scheduler in a PyTorch loop.

    loader = DataLoader(data, batch_sampler=R8BatchSampler(scheduler), num_workers=4)
    follow_lr(scheduler, optimizer)
    ...
    weighted(scheduler, losses).mean().backward()  # with strategies that draw some samples more often than others
    ...
    scheduler.update_with_loss(losses)

Clipping, and the gate before the step:

    norm = clip_gradients(scheduler, model)
    if scheduler.check(losses, norm):
        optimizer.step()

`capture_state` and `restore_state` make backups of model and optimizer to roll back to:

    scheduler.attach_model(lambda: capture_state(model, optimizer), lambda s: restore_state(s, model, optimizer))

Under Accelerate, leave the loader out of `prepare`, and save the run with everything else:

    accelerator.register_for_checkpointing(TensorState(scheduler))
"""

from __future__ import annotations

from learnit_r8.integrations.importance import ImportanceWeightedSFTLoss, importance_weights
from learnit_r8.integrations.torch.gradients import clip_gradients, norms_by_group
from learnit_r8.integrations.torch.learning_rate import LearningRateHook, follow_lr, set_lr
from learnit_r8.integrations.torch.sampler import R8BatchSampler, evaluation_loader, weighted
from learnit_r8.integrations.torch.state import (
    TensorState,
    arrays_from_tensors,
    capture_state,
    restore_state,
    tensors_from_arrays,
)

__all__ = [
    "ImportanceWeightedSFTLoss",
    "LearningRateHook",
    "R8BatchSampler",
    "TensorState",
    "arrays_from_tensors",
    "capture_state",
    "clip_gradients",
    "evaluation_loader",
    "follow_lr",
    "importance_weights",
    "norms_by_group",
    "restore_state",
    "set_lr",
    "tensors_from_arrays",
    "weighted",
]
