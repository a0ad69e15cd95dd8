"""What training changes of a Trainer's model: enough for a backup in RAM, a small part of it under LoRA."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from learnit_r8.integrations.torch.learning_rate import unwrapped
from learnit_r8.integrations.torch.state import capture_state, restore_state

State = dict[str, Any]


class TrainedState:
    """Captures and restores a trainer's trained weights, buffers, optimizer, gradient scaler and random generators.

    Weights that are frozen, and have not been written to since training began, are left out. What is captured is
    copied back in place, by name: a quantised layer's `state_dict`, which cannot be loaded, plays no part.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._model: Any = None
        self._versions: dict[str, int] = {}
        self._tried = self._broken = False

    def _trained(self) -> dict[str, Tensor]:
        model = self._trainer.model
        if self._trainer.is_fsdp_enabled:  # a forward without a backward leaves FSDP2's outermost weights whole
            for module in model.modules():
                if hasattr(module, "reshard"):
                    module.reshard()
        weights = dict(model.named_parameters())
        if model is not self._model:
            self._model, self._versions = model, {name: p._version for name, p in weights.items()}
        known = self._versions
        parts = {name: p.detach() for name, p in weights.items() if p.requires_grad or p._version != known.get(name)}
        return parts | {
            name: buffer
            for name, buffer in model.named_buffers()
            if buffer.is_floating_point() or name.endswith("num_batches_tracked")
        }

    def watch(self) -> None:
        """Take note of the frozen weights as they are now, before training."""
        self._trained()

    def _others(self) -> tuple[Any, Any]:
        return unwrapped(self._trainer.optimizer), getattr(self._trainer.accelerator, "scaler", None)

    def capture(self) -> State:
        """Return the live tensors; who keeps them copies them."""
        optimizer, scaler = self._others()
        state = capture_state(None, optimizer, scaler, copy=False)
        if not self._tried and state["optimizer"].get("state"):  # empty before the first step
            self._tried = True
            self._try(optimizer, state)
        state["weights"] = self._trained()
        return state

    def _try(self, optimizer: Any, state: State) -> None:
        """Load the optimizer's state once into a twin of it: a backup that cannot be restored is worth nothing."""
        twin = copy.copy(optimizer)
        twin.state = defaultdict(dict)
        twin.param_groups = [dict(group) for group in optimizer.param_groups]
        try:
            twin.load_state_dict(state["optimizer"])
        except Exception as error:
            self._trainer._say(
                "backups",
                f"{type(optimizer).__name__} cannot load the state that it gives ({type(error).__name__}: {error}): a "
                "rollback would bring the weights back, but not the optimizer's averages",
            )
            self._broken = True

    def restore(self, state: State) -> None:
        """Bring back what `capture` returned; `state` can be used again."""
        live = self._trained()
        with torch.no_grad():
            for name, value in state["weights"].items():
                if name in live:
                    live[name].copy_(value)
        if self._broken:
            state = {name: part for name, part in state.items() if name != "optimizer"}
        restore_state(state, None, *self._others())
