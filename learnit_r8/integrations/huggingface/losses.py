"""Watches the loss that a Hugging Face Trainer computes, and finds each sample's share of it.

The host's own `compute_loss` makes the loss that is trained on. What is reported is read off the batch and the model's
output (`_sample_losses.py`), and only if the parts add up to the host's loss; else it is the mean of the micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learnit_r8.errors import ProtocolError
from learnit_r8.integrations.huggingface.sample_losses import (
    IGNORED,
    READINGS,
    Reading,
    SampleLosses,
    Seen,
    auxiliary,
    one_each,
)

_TRIES = 3
"""Batches in which no reading was right before none is tried any more."""
_EXACT, _HALF = 2e-5, 1e-2
"""Relative differences that rounding explains, for losses in float32 and in less."""


class Check(NamedTuple):
    """A host's loss and what a reading's losses come to; one pair is equal if the reading is right.

    Attributes:
        host: The host's loss.
        total: Sum of the samples' losses.
        divisors: What the host may have divided it by.
        extra: What experts add, or None.
        parts: Shares of `extra` that the host may have added.
        tolerance: Relative difference that rounding explains.
    """

    host: Tensor
    total: Tensor
    divisors: list[Any]
    extra: Tensor | None
    parts: tuple[float, ...]
    tolerance: float

    def gaps(self) -> list[float]:
        """Return the relative distances to the host's loss, divisor by divisor; all 0 where that is not finite."""
        tensors = [one for one in (self.host, self.total, self.extra, *self.divisors) if isinstance(one, Tensor)]
        if self.host.device.type == "cpu":
            read = iter([one.detach().float().mean().item() if one.dim() else one.item() for one in tensors])
        else:  # the device is waited for once
            device = self.host.device
            read = iter(torch.stack([one.detach().float().mean().to(device) for one in tensors]).tolist())
        host, total = next(read), next(read)
        extra = 0.0 if self.extra is None else next(read)
        sides = [total / max(next(read) if isinstance(one, Tensor) else one, 1e-9) for one in self.divisors]
        if not math.isfinite(host):
            return [0.0] * len(sides)
        gaps = [min(abs(host - side - part * extra) for part in self.parts) / (abs(host) + 1e-3) for side in sides]
        return [gap if gap == gap else math.inf for gap in gaps]

    def gap(self) -> float:
        """Return the smallest of them."""
        return min(self.gaps())


class Note(NamedTuple):
    """What there is to report of one micro-batch.

    Attributes:
        mean: Its mean loss, a number on the device.
        losses: One loss a sample, `[B]`, where a reading gave them.
        check: Says whether they are the host's; None where that is settled.
    """

    mean: Tensor
    losses: Tensor | None = None
    check: Check | None = None

    def agrees(self) -> bool:
        """Whether the losses are the host's."""
        return self.check is None or self.check.gap() <= self.check.tolerance


class LossWatch:
    """Stands around a host's `compute_loss`, for as long as a training step lasts.

    Args:
        host: The trainer, a `SampleLossMixin`.
        reads: Whether to look for one loss per sample.

    Attributes:
        open: A training step is running.
        notes: Of the micro-batches whose optimizer step is not done yet.
        reading: The reading that is right for this training, None while there is none.
    """

    def __init__(self, host: Any, *, reads: bool = True) -> None:
        self.notes: list[Note] = []
        self.reading: Reading | None = None
        self._host = host
        self._tries = _TRIES if reads else 0
        self.open = False
        self._calls = 0
        self._outputs: list[Any] = []
        self._reference: list[Any] = []
        self._given: Tensor | None = None
        self._hooked: dict[Any, Any] = {}
        self._divided: float | None = None  # share of the host's loss that is divided by num_items_in_batch
        self._compute = host.compute_loss
        host.compute_loss = self._compute_loss  # on the object: whoever overrides it, above or below, is inside

    # Around a training step -----------------------------------------------------------------

    def step(self, train: Callable[[], Tensor], model: Any) -> Tensor:
        """Run the host's training step; takes note of one micro-batch."""
        self._attach(model)
        known, self.open, self._calls = len(self.notes), True, 0
        try:
            loss = train()
        finally:
            self.open = False
            self._outputs.clear()
            self._reference.clear()
        if self._calls != 1:
            # Nothing is known of what the host did with them: its own number is the loss.
            del self.notes[known:]
            self.notes.append(Note(loss.detach().float()))
            self._host._say("calls", f"compute_loss ran {self._calls} times in a training step: {_ONE_NUMBER}")
        return loss

    def _attach(self, model: Any) -> None:
        host = self._host
        wrapped = host.args.torch_compile or host.args.n_gpu > 1 or not isinstance(host.model, torch.nn.Module)
        reference = getattr(host, "ref_model", None)
        targets = {model if wrapped else host.model: self._outputs}
        if isinstance(reference, torch.nn.Module):
            targets[reference] = self._reference
        if self._hooked.keys() == targets.keys():
            return
        self.detach()
        for module, kept in targets.items():
            self._hooked[module] = module.register_forward_hook(self._keep_in(kept))

    def _keep_in(self, kept: list[Any]) -> Callable[..., None]:
        def keep(_module: Any, _args: Any, outputs: Any) -> None:
            if self.open:
                kept.append(outputs)

        return keep

    def detach(self) -> None:
        """Leave the models alone."""
        for handle in self._hooked.values():
            handle.remove()
        self._hooked.clear()

    def give(self, losses: Tensor) -> None:
        """Take the losses of this micro-batch from who computes them."""
        if not isinstance(losses, Tensor) or losses.dim() != 1 or len(losses) != self._host._batch_rows():
            got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            wanted = self._host._batch_rows()
            raise ProtocolError(f"one loss per sample is a tensor of shape ({wanted},) here, got {got}")
        self._given = losses

    # Around the host's loss -----------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.open:
            return self._compute(model, inputs, *args, **kwargs)
        self._calls += 1
        self._outputs.clear()
        self._reference.clear()
        self._given = None
        batch = dict(inputs) if hasattr(inputs, "keys") else {}
        items = kwargs.get("num_items_in_batch")
        probe = self._probe(items)
        if probe is not None:
            kwargs["num_items_in_batch"] = probe
        result = self._compute(model, inputs, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if self._calls > 1:
            return result
        if probe is not None:
            self._divided = _share(loss, probe)
        seen = Seen(batch, self._outputs, self._reference, self._host._batch_rows(), self._host)
        weighted = self._note(loss, seen, items)
        if weighted is loss:
            return result
        return (weighted, *result[1:]) if isinstance(result, tuple) else weighted

    def _note(self, loss: Tensor, seen: Seen, items: Any) -> Tensor:
        """Take note of the micro-batch; return the loss to train on, weighted where there are weights."""
        weights = self._host._weights(loss)
        with torch.set_grad_enabled(weights is not None):
            found = self._read(loss, seen, items)
        mean = self._mean(loss.detach(), seen, items)
        weighted = None
        if found is None:
            self.notes.append(Note(mean))
        else:
            check = self._check(loss, found, seen, items)
            self.notes.append(Note(mean, found.means, None if found.sums is self._given else check))
            if weights is not None:
                weighted = _weighted(loss, found, weights, check)
        if weights is not None and weighted is None:
            self._host._say("weights", _UNWEIGHTED)
        return loss if weighted is None else weighted

    def _read(self, loss: Tensor, seen: Seen, items: Any) -> SampleLosses | None:
        if self._given is not None:
            return one_each(self._given)
        if self.reading is not None:
            found = self.reading(seen)
            if found is not None:
                return found
        return self._search(loss, seen, items) if self._tries else None

    def _search(self, loss: Tensor, seen: Seen, items: Any) -> SampleLosses | None:
        """Try all readings, and keep the one that is right; this waits for the device."""
        if not bool(torch.isfinite(loss.detach()).all()):
            return None
        best: tuple[float, Reading | None, SampleLosses | None] = (math.inf, None, None)
        for reading in READINGS if seen.outputs else ():
            found = reading(seen)
            if found is None:
                continue
            check = self._check(loss, found, seen, items)
            gap = check.gap()
            if gap <= check.tolerance and gap < best[0]:
                best = gap, reading, found  # the nearest: before training all classes are alike to most of them
        _, self.reading, nearest = best
        if nearest is None:
            self._missed()
        return nearest

    def judge(self, note: Note) -> bool:
        """Return whether a micro-batch's losses are the host's. A reading that was wrong is looked for anew."""
        if note.losses is None:
            return False
        right = note.agrees()
        if right:
            self._tries = max(self._tries, _TRIES)
        else:
            self.reading = None
            self._missed()
        return right

    def _missed(self) -> None:
        self._tries = max(self._tries - 1, 0)
        if self._tries == 0:
            self._host._say("means", _MEANS)

    # How the host scales its loss -----------------------------------------------------------

    @property
    def _steps(self) -> int:
        return int(getattr(self._host, "current_gradient_accumulation_steps", 1))

    def _check(self, loss: Tensor, found: SampleLosses, seen: Seen, items: Any) -> Check:
        """Return how to tell whether the samples' losses are the host's.

        It may have divided their sum by the items of the whole step, or of the micro-batch, and where gradients are
        averaged over processes it may have multiplied its loss by their number.
        """
        steps, world = self._steps, self._host.accelerator.num_processes
        divisors: list[Any] = [] if items is None or self._given is not None else [items]
        if not (divisors and found.single and steps == world == 1):  # there the two are one
            own = found.numbers().sum().clamp(min=1)
            divisors.append(own)
            if self._given is not None and steps > 1:
                divisors.append(own * steps)
        extra = auxiliary(seen.outputs[-1] if seen.outputs else None, getattr(self._host.model, "config", None))
        parts = {1.0} if extra is None else {1.0, 1 / steps, float(world), world / steps}
        if world > 1:
            divisors += [divisor / world for divisor in divisors]
        return Check(loss, found.sums.detach().sum(), divisors, extra, tuple(sorted(parts)), _tolerance(loss))

    def _scale(self, loss: Tensor, seen: Seen, items: Any) -> float:
        """Return by how much the host multiplied its loss, because gradients are averaged over processes."""
        host = self._host
        world = float(host.accelerator.num_processes)
        if world == 1 or items is None or not host.args.average_tokens_across_devices:
            return 1.0
        if getattr(type(host).compute_loss, "__module__", "").startswith("transformers."):
            return world
        raw = _raw_loss(seen.outputs)
        return world if raw is not None and math.isclose(float(loss), world * float(raw), rel_tol=1e-3) else 1.0

    def _probe(self, items: Any) -> Tensor | None:
        """Return the count of items as a leaf of the graph, where it has to be found out what the host does with it."""
        steps = getattr(self._host, "current_gradient_accumulation_steps", 1)
        alone = steps == 1 and self._host.accelerator.num_processes == 1
        if self._divided is not None or alone or self.reading is not None or self._host.args.torch_compile:
            return None
        if not isinstance(items, Tensor) or items.dim() or not items.is_floating_point():
            return None
        return items.detach().clone().requires_grad_()

    def _mean(self, loss: Tensor, seen: Seen, items: Any) -> Tensor:
        """Return the mean of the micro-batch from a loss that may be divided by the items of the whole step."""
        loss = loss.float().mean() if loss.dim() else loss
        scale = self._scale(loss, seen, items)
        loss = loss if scale == 1 else loss / scale
        if not isinstance(items, Tensor) or not self._divided:
            return loss
        labels = seen.inputs.get("shift_labels")
        if labels is None:
            labels = seen.inputs["labels"]
            labels = labels[..., 1:] if getattr(self._host, "_loss_shifts_labels", False) else labels
        own = labels.ne(IGNORED).sum().clamp(min=1).to(loss.device)
        part = loss * self._divided
        mean: Tensor = loss - part + part * items.to(loss.device).float().mean() / own
        return mean


def _weighted(loss: Tensor, found: SampleLosses, weights: Tensor, check: Check) -> Tensor | None:
    """Return the loss with its samples' shares weighted, or None where they do not add up to it."""
    gaps = check.gaps()
    nearest = min(range(len(gaps)), key=gaps.__getitem__)
    if gaps[nearest] > check.tolerance or not bool(torch.isfinite(loss.detach()).all()):
        return None
    weighted: Tensor = loss + ((weights - 1) * found.sums).sum() / check.divisors[nearest]
    return weighted


def _tolerance(loss: Tensor) -> float:
    return _EXACT if loss.dtype in (torch.float32, torch.float64) else _HALF


def _raw_loss(outputs: list[Any]) -> Tensor | None:
    last = outputs[-1] if outputs else None
    loss = last.get("loss") if isinstance(last, dict) else None
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


def _share(loss: Tensor, items: Tensor) -> float:
    """Return which share of a loss is divided by `items`: -n dL/dn / L."""
    if not loss.requires_grad or loss.dim():
        return 0.0
    try:
        (slope,) = torch.autograd.grad(loss, items, retain_graph=True, allow_unused=True)
    except RuntimeError:  # a fused kernel that cannot be walked twice
        return 0.0
    value = loss.item()
    if slope is None or not math.isfinite(value) or value == 0:
        return 0.0
    return min(max(-(items.detach() * slope).item() / value, 0.0), 1.0)


_ONE_NUMBER = (
    "the mean of each micro-batch is reported, and which of its samples are hard shows only slowly. To give one loss "
    "per sample, call self.note_sample_losses(losses) in your compute_loss"
)
_MEANS = (
    "learnit_r8 could not find each sample's share of this training's loss (it is not the cross-entropy or squared "
    f"error of the model's logits and labels): training is as without it, {_ONE_NUMBER}, or pass "
    "sample_loss_func=(outputs, labels) -> losses [B] to train on their mean"
)
_UNWEIGHTED = (
    "the strategy draws some samples more often and gives importance weights that make up for it, but learnit_r8 "
    "cannot find each sample's share of this training's loss: the weights are not applied. Call "
    "self.note_sample_losses(losses) in your compute_loss with losses whose mean is your loss, or use a strategy "
    "without weights, such as 'quadrant'"
)
