"""Importance-weighted fine-tuning (Qin and Springenberg 2025, arXiv 2507.12856)."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from learnit_r8.core.config import Problems

Clip = float | tuple[float, float] | list[float] | None
Level = Literal["token", "sequence", "sequence_mean"]
Ratio = Literal["ref_over_policy", "policy_over_ref"]

IGNORED = -100
_LOWEST_LOG_PROB = -1e4
"""A token of probability zero would make the loss infinite and its gradient NaN."""
_LARGEST_LOG_WEIGHT = 10.0
"""A token's gradient is at most its weight: exp(10) = 22026 stays below float16's 65504."""


def importance_weights(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    temperature: float = 1.0,
    epsilon: float = 0.1,
    clip_weight: Clip = None,
    *,
    mask: Tensor | None = None,
    level: Level = "token",
    ratio: Ratio = "ref_over_policy",
) -> Tensor:
    """Return the weight of each token, without gradient.

    With r_t = log pi_ref(a_t|s_t) - log pi_theta(a_t|s_t):

    * level "token": w_t = exp(r_t / T)
    * level "sequence": w = exp(sum_t r_t / T), one for the whole sequence: the trajectory's
      ratio, which is the product of its steps' ratios (section 3 of the paper)
    * level "sequence_mean": w = exp(mean_t r_t / T), the geometric mean of the ratios, whose
      size does not depend on the length (the authors' own code, with T = 1/2)

    then w <- (1 - epsilon) w + epsilon, a mixture with the plain loss, and w is clipped.

    The published formula is `w_t = exp(r_t / T)`: it has no epsilon. The default of 0.1 draws every weight a
    tenth of the way to 1, so that no token is lost: a weight of 0 becomes 0.1, one of 100 becomes 90.1. With
    `epsilon=0` the formula holds as it stands.

    The paper's objective, E_{tau ~ D+}[q(tau) / pi_ref(tau) log p(tau; theta)], has the policy
    above the reference: with q the current policy that is `ratio="policy_over_ref"`, r_t with
    its sign turned. The default is the published loss of this name, which weighs up what the
    model gives less probability than the reference does.

    Args:
        log_probs: log pi_theta of the labels, shape `[..., S]`.
        ref_log_probs: log pi_ref of the same, same shape.
        temperature: T, above 0.
        epsilon: Share of the plain loss, 0 to 1.
        clip_weight: Largest weight, or (smallest, largest), a list too. Without it weights end at exp(10).
        mask: True where a token counts, same shape; others have no part in a sequence's weight and weigh 0.
        level: See above.
        ratio: See above.

    Returns:
        float32, shape `[..., S]`, finite unless an input is NaN.

    Raises:
        ConfigError: Options out of range.
        ValueError: The shapes differ.
    """
    _check_options(temperature, epsilon, clip_weight, level, ratio)
    if log_probs.shape != ref_log_probs.shape or (mask is not None and mask.shape != log_probs.shape):
        shapes = [tuple(x.shape) for x in (log_probs, ref_log_probs, mask) if x is not None]
        raise ValueError(f"log_probs, ref_log_probs and mask must have one shape, got {shapes}")
    ours, theirs = (x.detach().float().clamp(_LOWEST_LOG_PROB, -_LOWEST_LOG_PROB) for x in (log_probs, ref_log_probs))
    log_ratio = theirs - ours if ratio == "ref_over_policy" else ours - theirs
    counted = torch.ones_like(log_ratio) if mask is None else mask.float()
    log_ratio = torch.where(counted > 0, log_ratio, 0.0)
    if level != "token":
        total = log_ratio.sum(dim=-1, keepdim=True)
        if level == "sequence_mean":
            total = total / counted.sum(dim=-1, keepdim=True).clamp(min=1.0)
        log_ratio = total.expand_as(log_ratio)
    weights = (log_ratio / temperature).clamp(max=_LARGEST_LOG_WEIGHT).exp()
    weights = (1.0 - epsilon) * weights + epsilon
    if (limits := _limits(clip_weight)) is not None:
        weights = weights.clamp(*limits)
    return weights * counted


class ImportanceWeightedSFTLoss(nn.Module):
    """Cross entropy, each token weighed by `importance_weights`.

    L = sum_t w_t l_t / number of tokens that count, where l_t = (1 - s) (-log pi_theta(y_t)) +
    s mean_v(-log pi_theta(v)) with label smoothing s (Szegedy et al. 2016), and w_t carries no
    gradient. Logits and labels must be aligned: for a causal model pass `logits[:, :-1]` and
    `labels[:, 1:]`.

    Args:
        epsilon: See `importance_weights`, also for what it does to the published formula; so are temperature,
            clip_weight, level and ratio. The first four come in the published order.
        label_smoothing: s, 0 to below 1.
        temperature: Above 0.
        clip_weight: Largest weight, or (smallest, largest), a list too.
        level: "token", "sequence" or "sequence_mean".
        ratio: "ref_over_policy" or "policy_over_ref".

    Raises:
        ConfigError: Options out of range; lists all.
    """

    def __init__(
        self,
        epsilon: float = 0.1,
        label_smoothing: float = 0.0,
        temperature: float = 1.0,
        clip_weight: Clip = None,
        *,
        level: Level = "token",
        ratio: Ratio = "ref_over_policy",
    ) -> None:
        super().__init__()
        _check_options(temperature, epsilon, clip_weight, level, ratio, label_smoothing)
        self.epsilon, self.temperature, self.label_smoothing = epsilon, temperature, label_smoothing
        self.clip_weight, self.level, self.ratio = clip_weight, level, ratio

    def forward(
        self, logits: Tensor, labels: Tensor, ref_log_probs: Tensor | None = None, return_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the loss, float32, and on request the weights.

        Args:
            logits: Any floating dtype, shape `[B, S, V]`.
            labels: Shape `[B, S]`; -100 is ignored.
            ref_log_probs: log pi_ref of the labels, shape `[B, S]`; what it holds at ignored
                positions does not matter. None: plain fine-tuning, all weights 1.
            return_weights: Also return the weights, float32, shape `[B, S]`, 0 where ignored.

        Raises:
            ValueError: Shapes that do not belong together, or labels outside 0 .. V - 1.
        """
        mask = labels != IGNORED
        self._check_inputs(logits, labels, ref_log_probs)
        # Ignored positions are left out before anything is computed: a NaN there must not spread.
        log_probs = torch.log_softmax(logits[mask].float(), dim=-1).clamp(min=_LOWEST_LOG_PROB)
        chosen = log_probs.gather(-1, labels[mask].long().unsqueeze(-1)).squeeze(-1)
        losses = -chosen
        if self.label_smoothing:
            losses = (1.0 - self.label_smoothing) * losses - self.label_smoothing * log_probs.mean(dim=-1)
        weights = mask.float()
        if ref_log_probs is not None:
            current = torch.zeros_like(weights).masked_scatter(mask, chosen.detach())
            options = self.temperature, self.epsilon, self.clip_weight
            weights = importance_weights(
                current, ref_log_probs, *options, mask=mask, level=self.level, ratio=self.ratio
            )
        loss = (weights[mask] * losses).sum() / mask.sum().clamp(min=1)
        return (loss, weights) if return_weights else loss

    def _check_inputs(self, logits: Tensor, labels: Tensor, ref_log_probs: Tensor | None) -> None:
        shape = tuple(labels.shape)
        if logits.ndim != 3 or labels.shape != logits.shape[:2]:
            raise ValueError(f"need logits [B, S, V] and labels [B, S], got {tuple(logits.shape)} and {shape}")
        if ref_log_probs is not None and ref_log_probs.shape != labels.shape:
            given = tuple(ref_log_probs.shape)
            raise ValueError(f"need the reference's log-probability of each label, {shape}, got {given}")
        bad = ((labels < 0) & (labels != IGNORED)) | (labels >= logits.shape[-1])
        if bad.any():
            raise ValueError(f"labels must be {IGNORED} or in 0 .. {logits.shape[-1] - 1}, got {int(labels[bad][0])}")


def _check_options(
    temperature: float, epsilon: float, clip_weight: Clip, level: str, ratio: str, label_smoothing: float = 0.0
) -> None:
    problems = Problems()
    problems.real("temperature", temperature, 0.0, open_low=True)
    problems.real("epsilon", epsilon, 0.0, 1.0)
    if not 0.0 <= problems.real("label_smoothing", label_smoothing, 0.0) < 1.0:
        problems.append(f"label_smoothing must be below 1, got {label_smoothing!r}")
    if clip_weight is not None and _limits(clip_weight) is None:
        problems.append(f"clip_weight must be a number above 0, (smallest, largest) or None, got {clip_weight!r}")
    problems.choice("level", level, get_args(Level))
    problems.choice("ratio", ratio, get_args(Ratio))
    problems.raise_if_any()


def _limits(clip_weight: Any) -> tuple[float, float] | None:
    """Return the smallest and the largest weight, or None where these are none."""
    try:
        low, high = clip_weight if hasattr(clip_weight, "__len__") else (0.0, clip_weight)
        good = 0.0 <= low <= high and high > 0.0
    except (TypeError, ValueError):  # also texts, such as "1e-2", which YAML takes for one
        good = False
    return (low, high) if good else None
