"""Watches the loss that a Hugging Face Trainer computes, and finds each sample's share of it.

The host's own `compute_loss` makes the loss that is trained on. What is reported is read off the batch and the model's
output (`_sample_losses.py`), and only if the parts add up to the host's loss, which is looked at for every micro-batch;
else it is the mean of the micro-batch. All numbers of a micro-batch come to the CPU at once, when it is reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
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


class Result(NamedTuple):
    """What a check found."""

    means: Tensor  # loss of each sample, float32 [B]
    finite: bool  # the host's loss is
    gap: float  # relative distance to it from what the samples' losses come to; 0 where it is not finite
    divisor: float  # what their sum is to be divided by for it
    fits: bool  # they are the host's, but for rounding


class Check(NamedTuple):
    """A host's loss and one loss per sample: do these add up to it?"""

    host: Tensor  # without a graph
    found: SampleLosses
    items: Any  # what the host may have divided by, for the whole optimizer step; a number, a tensor or None
    extra: Tensor | None  # what experts add
    steps: int  # micro-batches of the optimizer step
    world: int  # processes over which gradients are averaged
    given: bool  # the losses are the user's: they are reported whatever they add up to

    def read(self) -> Result:
        """Compare; this waits for the device."""
        one = self.found.single and self.steps == self.world == 1  # the items are the samples
        counts = None if one and self.items is not None and not self.given else self.found.numbers()
        items = self.items if isinstance(self.items, Tensor) or self.items is None else torch.tensor(self.items)
        host, sums, numbers, divided, added = _on_cpu((self.host, self.found.sums, counts, items, self.extra))
        loss, extra, total = _mean(host), _mean(0.0 if added is None else added), sum(sums)
        divisors = [] if divided is None or self.given else [_mean(divided)]
        if numbers is not None:
            divisors.append(max(sum(numbers), 1.0))
            if self.given and self.steps > 1:
                divisors.append(divisors[-1] * self.steps)
        if self.world > 1:  # the host may have multiplied its loss by that
            divisors += [divisor / self.world for divisor in divisors]
        finite = math.isfinite(loss)
        shares = {1.0} if added is None else {1.0, 1 / self.steps, float(self.world), self.world / self.steps}
        sides = [(total / max(divisor, 1e-9) + share * extra, divisor) for divisor in divisors for share in shares]
        gaps = [(abs(loss - side) / (abs(loss) + 1e-3) if finite else 0.0, divisor) for side, divisor in sides]
        gap, divisor = min((gap if gap == gap else math.inf, divisor) for gap, divisor in gaps)
        limit = _EXACT if self.host.dtype in (torch.float32, torch.float64) else _HALF
        means = self.found.sums.detach()
        if not self.found.single:
            means = torch.tensor([one / max(count, 1) for one, count in zip(sums, numbers, strict=True)])
        return Result(means, finite, gap, divisor, gap <= limit)


class Note(NamedTuple):
    """What there is to report of one micro-batch."""

    mean: Tensor  # its mean loss, a number on the device
    check: Check | None = None  # of one loss per sample
    result: Result | None = None  # of the check, where it costs no waiting for a device


class LossWatch:
    """Stands around the `compute_loss` of a host, for as long as a training step lasts.

    It `reads`, which is to say that it looks for one loss per sample.
    """

    def __init__(self, host: Any, *, reads: bool = True) -> None:
        self.notes: list[Note] = []  # of the micro-batches whose optimizer step is not done yet
        self.reading: Reading | None = None  # the one that is right for this training
        self.open = False  # a training step is running
        self._host = host
        self._tries = _TRIES if reads else 0
        self._calls = 0
        self._outputs: list[Any] = []
        self._reference: list[Any] = []
        self._given: Tensor | None = None
        self._hooked: dict[Any, Any] = {}
        self._attached: tuple[Any, ...] = ()  # models, when the hooks were looked at last
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
            self._forget()
        if self._calls != 1:
            # Nothing is known of what the host did with them: its own number is the loss.
            del self.notes[known:]
            self.notes.append(Note(loss.detach().float()))
            self._host._say("calls", f"compute_loss ran {self._calls} times in a training step: {_ONE_NUMBER}")
        return loss

    def _forget(self) -> None:
        self._outputs.clear()
        self._reference.clear()
        self._given = None

    def _attach(self, model: Any) -> None:
        host = self._host
        seen = model, host.model, getattr(host, "ref_model", None)
        if self._hooked and all(one is other for one, other in zip(seen, self._attached, strict=True)):
            return
        self._attached = seen
        wrapped = host.args.torch_compile or host.args.n_gpu > 1 or not isinstance(host.model, torch.nn.Module)
        reference = seen[-1]
        targets = {model if wrapped else host.model: self._outputs}
        if isinstance(reference, torch.nn.Module):
            targets[reference] = self._reference
        if self._hooked.keys() == targets.keys():
            return
        self.detach()
        for module, kept in targets.items():
            self._hooked[module] = module.register_forward_hook(partial(self._keep, kept))

    def _keep(self, kept: list[Any], _module: Any, _args: Any, outputs: Any) -> None:
        if self.open:
            kept.append(outputs)

    def detach(self) -> None:
        """Leave the models alone."""
        for handle in self._hooked.values():
            handle.remove()
        self._hooked.clear()

    def give(self, losses: Tensor) -> None:
        """Take the losses of this micro-batch from who computes them."""
        wanted, shape = self._host._batch_rows(), tuple(losses.shape) if isinstance(losses, Tensor) else None
        if shape != (wanted,):
            got = type(losses).__name__ if shape is None else f"shape {shape}"
            raise ProtocolError(f"one loss per sample is a tensor of shape ({wanted},) here, got {got}")
        self._given = losses

    # Around the host's loss -----------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.open:
            return self._compute(model, inputs, *args, **kwargs)
        self._calls += 1
        self._forget()
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
        return (weighted, *result[1:]) if isinstance(result, tuple) else weighted

    def _note(self, loss: Tensor, seen: Seen, items: Any) -> Tensor:
        """Take note of the micro-batch; return the loss to train on, weighted where there are weights."""
        weights = self._host._weights(loss)
        with torch.set_grad_enabled(weights is not None):
            found = self._read(loss, seen, items)
        check = None if found is None else self._check(loss, found, seen, items)
        waits = weights is None and loss.device.type != "cpu"
        result = None if check is None or waits else check.read()
        self.notes.append(Note(self._mean(loss.detach(), seen, items), check, result))
        if weights is None:
            return loss
        if found is None or result is None or not result.fits:
            self._host._say("weights", _UNWEIGHTED)
            return loss
        return loss + ((weights - 1) * found.sums).sum() / result.divisor if result.finite else loss

    def _read(self, loss: Tensor, seen: Seen, items: Any) -> SampleLosses | None:
        if self._given is not None:
            return one_each(self._given)
        found = None if self.reading is None else self.reading(seen)
        return found if found is not None or not self._tries else self._search(loss, seen, items)

    def _search(self, loss: Tensor, seen: Seen, items: Any) -> SampleLosses | None:
        """Try all readings, and keep the one that is right; this waits for the device."""
        best: tuple[float, Reading | None, SampleLosses | None] = (math.inf, None, None)
        for reading in READINGS if seen.outputs else ():
            found = reading(seen)
            if found is None:
                continue
            result = self._check(loss, found, seen, items).read()
            if not result.finite:
                return None
            if result.fits and result.gap < best[0]:
                best = result.gap, reading, found  # the nearest: before training all classes are alike to most of them
        _, self.reading, nearest = best
        if nearest is None:
            self._missed()
        return nearest

    def judge(self, note: Note) -> Tensor | None:
        """Return one loss per sample, or None where these are not the host's: a reading is looked for anew then."""
        if note.check is None:
            return None
        result = note.result or note.check.read()
        if note.check.given or result.fits:
            self._tries = max(self._tries, _TRIES)
            return result.means
        self.reading = None
        self._missed()
        return None

    def _missed(self) -> None:
        self._tries = max(self._tries - 1, 0)
        if self._tries == 0:
            own = not getattr(type(self._host).compute_loss, "__module__", "").startswith("transformers.")
            self._host._say("means", _MEANS if own else f"{_MEANS}, or pass {_FUNCTION}")

    # How the host scales its loss -----------------------------------------------------------

    @property
    def _steps(self) -> int:
        return int(getattr(self._host, "current_gradient_accumulation_steps", 1))

    def _check(self, loss: Tensor, found: SampleLosses, seen: Seen, items: Any) -> Check:
        extra = auxiliary(seen.outputs[-1] if seen.outputs else None, getattr(self._host.model, "config", None))
        given, world = self._given is not None, self._host.accelerator.num_processes
        return Check(loss.detach(), found, items, extra, self._steps, world, given)

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
        alone = self._steps == self._host.accelerator.num_processes == 1
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
        if (labels := seen.inputs.get("shift_labels")) is None:
            labels = seen.inputs["labels"][..., int(getattr(self._host, "_loss_shifts_labels", False)) :]
        own = labels.ne(IGNORED).sum().clamp(min=1).to(loss.device)
        part = loss * self._divided
        mean: Tensor = loss - part + part * items.to(loss.device).float().mean() / own
        return mean


def _mean(values: float | list[float]) -> float:
    return sum(values) / len(values) if isinstance(values, list) else values


def _on_cpu(parts: tuple[Tensor | None, ...]) -> list[Any]:
    """Return tensors as lists of numbers, None as it is; several of a device come at once.

    Amid a training step each call of torch or numpy costs ten times what it does in a loop, so these are few.
    """
    given = [part for part in parts if part is not None]
    device = next((part.device for part in given if part.device.type != "cpu"), None)
    if device is not None:
        flat = [part.detach().reshape(-1) for part in given]
        whole = torch.cat([part.to(device, torch.float32) for part in flat]).cpu()
        given = list(torch.split(whole, [len(part) for part in flat]))
    read = (part.tolist() for part in given)
    return [None if part is None else next(read) for part in parts]


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
    "per sample, call self.note_sample_losses(losses) in your compute_loss, or in what it calls"
)
_MEANS = (
    "learnit_r8 could not find each sample's share of this training's loss (it is not the cross-entropy or squared "
    f"error of the model's logits and labels, nor DPO's 'sigmoid'): training is as without it, {_ONE_NUMBER}"
)
_FUNCTION = "sample_loss_func=(outputs, labels) -> losses [B] to train on their mean"
_UNWEIGHTED = (
    "the strategy draws some samples more often and gives importance weights that make up for it, but learnit_r8 "
    "cannot find each sample's share of this training's loss: the weights are not applied. Call "
    "self.note_sample_losses(losses) in your compute_loss with losses whose mean is your loss, or use a strategy "
    "without weights, such as 'quadrant'"
)
