"""One loss per sample from what a Hugging Face model was given and returned: readings that have to be proved.

Each reading takes the batch and the model's output and returns one loss per sample, or None where it does not apply.
None of them is believed: whoever uses one compares its sum with the loss that the host has computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100
_AT_ONCE = 1 << 26
"""Logits that are widened to float32 at a time: a vocabulary times a few thousand tokens."""


class SampleLosses(NamedTuple):
    """Losses of one micro-batch."""

    sums: Tensor  # loss of each sample, added up over its labels, [B]
    numbers: Callable[[], Tensor]  # how many labels those are, [B]: 1 for a class, the unmasked tokens of a sequence
    single: bool = False  # no sample has more than one label


class Seen(NamedTuple):
    """What one call of a host's `compute_loss` showed."""

    inputs: Mapping[str, Any]  # the batch
    outputs: list[Any]  # of the model, one a call
    reference: list[Any]  # of a reference model, one a call
    samples: int  # in the batch
    host: Any  # the trainer


Reading = Callable[[Seen], SampleLosses | None]


def _tensor(mapping: Any, name: str) -> Tensor | None:
    value = mapping.get(name) if isinstance(mapping, Mapping) else None
    return value if isinstance(value, Tensor) else None


def _logits_and_labels(seen: Seen) -> tuple[Tensor, Tensor] | None:
    outputs, labels = seen.outputs[-1], _tensor(seen.inputs, "labels")
    if isinstance(outputs, Mapping):
        logits = _tensor(outputs, "logits")
    else:
        found = [part for part in outputs if isinstance(part, Tensor) and part.dim() > 0] if outputs else []
        logits = found[0] if found else None
    if logits is None or labels is None or len(labels) != seen.samples or len(logits) != seen.samples:
        return None
    return logits, labels.to(logits.device)


def _smoothing(seen: Seen) -> float:
    smoother = getattr(seen.host, "label_smoother", None)
    return 0.0 if smoother is None else float(smoother.epsilon)


def _cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> SampleLosses:
    """Cross-entropy: logits `[B, ..., C]`, labels `[B, ...]`, -100 where masked; added up for each sample."""
    labels = labels.long()

    def losses(part: Tensor, target: Tensor) -> Tensor:
        flat = part.reshape(-1, part.shape[-1]).float(), target.reshape(-1)
        found = functional.cross_entropy(*flat, ignore_index=IGNORED, reduction="none", label_smoothing=smoothing)
        return found if target.dim() == 1 else found.view(len(part), -1).sum(dim=1)

    rows = max(1, _AT_ONCE * len(logits) // max(logits.numel(), 1))
    if rows >= len(logits):
        sums = losses(logits, labels)
    else:  # no second copy of all logits of a large vocabulary
        parts = zip(torch.split(logits, rows), torch.split(labels, rows), strict=True)
        sums = torch.cat([losses(*part) for part in parts])
    if labels.dim() == 1:
        return SampleLosses(sums, lambda: labels.ne(IGNORED), single=True)
    return SampleLosses(sums, lambda: labels.ne(IGNORED).view(len(labels), -1).sum(dim=1))


def classes(seen: Seen) -> SampleLosses | None:
    """One class a sample."""
    found = _logits_and_labels(seen)
    if found is None or found[0].dim() != 2 or found[1].is_floating_point() or found[1].numel() != seen.samples:
        return None
    return _cross_entropy(found[0], found[1].view(-1), _smoothing(seen))


def next_tokens(seen: Seen) -> SampleLosses | None:
    """Causal language models: the label of a position is the token after it."""
    found = _token_labels(seen)
    if found is None:
        return None
    logits, labels = found
    return _cross_entropy(logits, functional.pad(labels, (0, 1), value=IGNORED)[..., 1:], _smoothing(seen))


def tokens(seen: Seen) -> SampleLosses | None:
    """One class a token: masked tokens, tags, the target of an encoder-decoder."""
    found = _token_labels(seen)
    return None if found is None else _cross_entropy(*found, _smoothing(seen))


def _token_labels(seen: Seen) -> tuple[Tensor, Tensor] | None:
    found = _logits_and_labels(seen)
    if found is None:
        return None
    logits, labels = found
    behind = logits.shape[1] - labels.shape[1] if logits.dim() == 3 and labels.dim() == 2 else -1
    if behind < 0 or labels.is_floating_point():
        return None
    return logits, functional.pad(labels, (behind, 0), value=IGNORED)  # trained prompts stand in front, unlabelled


def fused_tokens(seen: Seen) -> SampleLosses | None:
    """TRL's fused heads: log-probabilities of the labels in place of logits."""
    log_probs, mask = _tensor(seen.outputs[-1], "log_probs"), _tensor(seen.outputs[-1], "label_mask")
    if log_probs is None or mask is None or len(log_probs) != seen.samples:
        return None
    return SampleLosses(-log_probs.sum(dim=1), lambda: mask.sum(dim=1))


def several_labels(seen: Seen) -> SampleLosses | None:
    """Any number of classes a sample."""
    return _elementwise(seen, functional.binary_cross_entropy_with_logits)


def numbers(seen: Seen) -> SampleLosses | None:
    """Regression: one number a sample, or several."""
    return _elementwise(seen, functional.mse_loss)


def _elementwise(seen: Seen, function: Callable[..., Tensor]) -> SampleLosses | None:
    found = _logits_and_labels(seen)
    if found is None or found[0].numel() != found[1].numel() or _smoothing(seen):
        return None
    logits, labels = (part.reshape(seen.samples, -1) for part in found)
    losses = function(logits, labels.to(logits.dtype), reduction="none")
    ones = torch.ones_like(losses, dtype=torch.long)
    return SampleLosses(losses.sum(dim=1), lambda: ones.sum(dim=1), single=losses.shape[1] == 1)


def one_each(losses: Tensor) -> SampleLosses:
    """Return losses of samples with one label each."""
    return SampleLosses(losses, lambda: torch.ones_like(losses, dtype=torch.long), single=True)


def spans(seen: Seen) -> SampleLosses | None:
    """Question answering: where the answer starts and ends."""
    ends = []
    for name in ("start", "end"):
        logits, at = _tensor(seen.outputs[-1], f"{name}_logits"), _tensor(seen.inputs, f"{name}_positions")
        if logits is None or at is None or logits.dim() != 2 or len(logits) != seen.samples:
            return None
        at = at.to(logits.device).view(-1).clamp(0, logits.shape[1])  # beyond the end: ignored
        ends.append(functional.cross_entropy(logits, at, ignore_index=logits.shape[1], reduction="none"))
    return one_each((ends[0] + ends[1]) / 2)


def rewards(seen: Seen) -> SampleLosses | None:
    """A reward model's pairs: the chosen ones, then the rejected ones."""
    logits = _tensor(seen.outputs[-1], "logits")
    if logits is None or logits.numel() != 2 * seen.samples or "labels" in seen.inputs:
        return None
    better, worse = logits.reshape(-1).chunk(2)
    margin = _tensor(seen.inputs, "margin")
    losses = -functional.logsigmoid(better - worse - (0 if margin is None else margin))
    coefficient = getattr(seen.host.args, "center_rewards_coefficient", None)
    return one_each(losses if coefficient is None else losses + coefficient * (better + worse) ** 2)


def preferences(seen: Seen) -> SampleLosses | None:
    """TRL's DPO (sigmoid): pairs' log-probabilities under the model and under the reference."""
    mask, beta = _tensor(seen.inputs, "completion_mask"), getattr(seen.host, "beta", None)
    policy = _tensor(seen.outputs[0], "log_probs")
    if mask is None or beta is None or policy is None or len(policy) != 2 * seen.samples:
        return None
    length = mask.shape[1] - 1
    better, worse = policy[:, -length:].sum(dim=1).chunk(2)
    before, after = _tensor(seen.inputs, "ref_chosen_logps"), _tensor(seen.inputs, "ref_rejected_logps")
    if before is None or after is None:
        others = seen.reference or seen.outputs[1:]
        log_probs = _tensor(others[-1], "log_probs") if others else None
        if log_probs is None or len(log_probs) != 2 * seen.samples:
            return None
        before, after = log_probs[:, -length:].sum(dim=1).chunk(2)
    return one_each(-functional.logsigmoid(beta * ((better - before) - (worse - after))))


READINGS: tuple[Reading, ...] = (
    fused_tokens, next_tokens, tokens, classes, several_labels, numbers, spans, rewards, preferences,
)  # fmt: skip
"""In the order in which they are tried."""


def auxiliary(outputs: Any, config: Any) -> Tensor | None:
    """Return what a mixture of experts adds to its loss, weighted; None where there is none."""
    if (loss := _tensor(outputs, "aux_loss")) is None:
        return None
    coefficient = getattr(config, "router_aux_loss_coef", None)
    return None if coefficient is None else coefficient * loss.detach()
