"""One loss per sample from a Hugging Face model's logits, with the same mean as the model's own loss.

With gradient accumulation the mean is over all micro-batches of an optimizer step. (transformers
5.23 adds up the micro-batches' means where a model's own loss ignores `num_items_in_batch`, as
Bert's does; that is not imitated.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

IGNORED = -100


class SampleLosses(NamedTuple):
    """Losses of one micro-batch.

    Attributes:
        sums: Loss of each sample, added up over its labels, `[B]`, with grad.
        number: Returns how many labels those are, `[B]`: 1 for a class, the unmasked tokens of a sequence.
        single: No sample has more than one label.
    """

    sums: Tensor
    number: Callable[[], Tensor]
    single: bool = False

    @property
    def means(self) -> Tensor:
        """Mean loss of each sample, `[B]`, without grad; 0 where all labels are masked."""
        sums = self.sums.detach()
        return sums if self.single else sums / self.number().clamp(min=1)


def logits_of(outputs: Any) -> Tensor:
    """Return the logits of a model's output, a dict or a tuple."""
    return outputs["logits"] if isinstance(outputs, dict) else outputs[0]  # type: ignore[no-any-return]


def causal_lm(logits: Tensor, labels: Tensor, _config: Any) -> SampleLosses:
    """Cross-entropy of the next token: logits `[B, S, V]`, labels `[B, S]`, -100 where masked.

    As transformers' `ForCausalLMLoss`: the labels are shifted, not the (large) logits.
    """
    targets = functional.pad(labels, (0, 1), value=IGNORED)[..., 1:].to(logits.device)
    flat = logits.float().reshape(-1, logits.shape[-1])
    tokens = functional.cross_entropy(flat, targets.reshape(-1), ignore_index=IGNORED, reduction="none")
    return SampleLosses(tokens.view(targets.shape).sum(dim=1), lambda: targets.ne(IGNORED).sum(dim=1))


def sequence_classification(logits: Tensor, labels: Tensor, config: Any) -> SampleLosses:
    """Cross-entropy, squared error or binary cross-entropy by the model's problem type, as transformers does."""
    labels = labels.to(logits.device)
    if config.problem_type is None:
        whole = labels.dtype in (torch.long, torch.int)
        config.problem_type = (
            "regression"
            if config.num_labels == 1
            else "single_label_classification"
            if whole
            else "multi_label_classification"
        )
    if config.problem_type == "single_label_classification":
        labels = labels.view(-1)
        losses = functional.cross_entropy(
            logits.view(-1, config.num_labels), labels, ignore_index=IGNORED, reduction="none"
        )
        return SampleLosses(losses, lambda: labels.ne(IGNORED), single=True)
    function: Callable[..., Tensor] = functional.mse_loss
    if config.problem_type == "multi_label_classification":
        function = functional.binary_cross_entropy_with_logits
    rows = function(logits.view(len(labels), -1), labels.view(len(labels), -1).to(logits.dtype), reduction="none")
    return SampleLosses(rows.sum(dim=1), lambda: torch.full((len(rows),), rows.shape[1], device=rows.device))


BY_LOSS_TYPE: dict[str, Callable[[Tensor, Tensor, Any], SampleLosses]] = {
    "ForCausalLM": causal_lm,
    "ForSequenceClassification": sequence_classification,
}
"""Keys are `PreTrainedModel.loss_type`, which follows from the class's name."""


def loss_function(model: Any) -> Callable[[Tensor, Tensor, Any], SampleLosses] | None:
    """Return the function for a model's loss type; None for types that are not known."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT wraps
    loss_type = getattr(inner, "loss_type", None)
    if loss_type is None and type(inner).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        loss_type = "ForCausalLM"  # GPT2LMHeadModel and others are named without it
    return BY_LOSS_TYPE.get(loss_type or "")
