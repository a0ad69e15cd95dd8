"""The importance-weighted loss against a float64 reference, and at the edges of every dtype."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learnit_r8.errors import ConfigError
from learnit_r8.integrations.importance import ImportanceWeightedSFTLoss, importance_weights

LEVELS = ["token", "sequence", "sequence_mean"]
RATIOS = ["ref_over_policy", "policy_over_ref"]


def reference(logits, labels, ref, *, temperature, epsilon, smoothing, clip, level, ratio):
    """The documented formulas in float64 numpy, token by token."""
    losses, logs = [], {}
    for b, s in np.ndindex(labels.shape):
        if labels[b, s] == -100:
            continue
        row = logits[b, s]
        log_p = row - row.max() - math.log(np.exp(row - row.max()).sum())
        logs[b, s] = log_p[labels[b, s]]
        losses.append((1 - smoothing) * -log_p[labels[b, s]] + smoothing * -log_p.mean())
    weights = np.zeros(labels.shape)
    for b in range(len(labels)):
        steps = {s: ref[b, s] - value for (row, s), value in logs.items() if row == b}
        if ratio == "policy_over_ref":
            steps = {s: -value for s, value in steps.items()}
        for s, value in steps.items():
            if level != "token":
                value = sum(steps.values()) / (len(steps) if level == "sequence_mean" else 1)
            w = (1 - epsilon) * math.exp(min(value / temperature, 10.0)) + epsilon
            weights[b, s] = w if clip is None else min(max(w, clip[0]), clip[1])
    total = sum(weights[place] * loss for place, loss in zip(logs, losses, strict=True))
    return total / max(1, len(losses)), weights


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32),
    st.floats(0.3, 4.0),
    st.floats(0.0, 1.0),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([None, (0.2, 3.0), (0.0, 1.5)]),
    st.sampled_from(LEVELS),
    st.sampled_from(RATIOS),
)
def test_loss_and_weights_agree_with_the_documented_formulas(seed, temperature, epsilon, smoothing, clip, level, ratio):
    rng = np.random.default_rng(seed)
    logits, ref = rng.normal(0, 2, (3, 5, 7)), rng.normal(-2, 0.5, (3, 5))
    labels = rng.integers(0, 7, (3, 5))
    labels[rng.random((3, 5)) < 0.3] = -100
    expected, expected_weights = reference(
        logits,
        labels,
        ref,
        temperature=temperature,
        epsilon=epsilon,
        smoothing=smoothing,
        clip=clip,
        level=level,
        ratio=ratio,
    )
    loss_fn = ImportanceWeightedSFTLoss(
        epsilon, smoothing, temperature, clip[1] if clip and clip[0] == 0.0 else clip, level=level, ratio=ratio
    )
    loss, weights = loss_fn(*(torch.tensor(x) for x in (logits, labels, ref)), return_weights=True)
    np.testing.assert_allclose(weights, expected_weights, rtol=2e-4)
    assert float(loss) == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_a_reference_or_with_an_equal_one_it_is_cross_entropy(smoothing):
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 6, 9), torch.randint(0, 9, (4, 6))
    labels[1, 2:] = -100
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, 9), labels.reshape(-1), label_smoothing=smoothing)
    loss_fn = ImportanceWeightedSFTLoss(label_smoothing=smoothing)
    equal = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    for ref in (None, equal):
        torch.testing.assert_close(loss_fn(logits, labels, ref), expected)
    _, weights = loss_fn(logits, labels, None, return_weights=True)
    torch.testing.assert_close(weights, (labels != -100).float())


@pytest.mark.parametrize("level", LEVELS)
def test_weights_carry_no_gradient(level):
    torch.manual_seed(1)
    logits = torch.randn(2, 3, 5, requires_grad=True)
    labels, ref = torch.randint(0, 5, (2, 3)), torch.randn(2, 3, requires_grad=True) - 1.0
    loss, weights = ImportanceWeightedSFTLoss(level=level)(logits, labels, ref, return_weights=True)
    assert not weights.requires_grad
    (gradient,) = torch.autograd.grad(loss, logits)
    p = torch.softmax(logits.detach(), -1)
    by_hand = weights[..., None] * (p - torch.nn.functional.one_hot(labels, 5)) / 6
    torch.testing.assert_close(gradient, by_hand)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_extreme_log_probabilities_stay_finite_in_loss_weights_and_gradient(dtype, level, ratio):
    largest = torch.finfo(dtype).max
    logits = torch.zeros(3, 8, 6, dtype=dtype)
    logits[0, :, 0] = largest
    logits[1, :, 1:] = -torch.inf
    logits[2] = torch.finfo(dtype).tiny
    logits.requires_grad_()
    labels = torch.tensor([0, 1, 2, 5, 0, 1, 2, 5]).repeat(3, 1)
    for value in (0.0, -1.0, -1e4, -torch.inf, largest, torch.inf):
        ref = torch.full((3, 8), value, dtype=dtype)
        loss, weights = ImportanceWeightedSFTLoss(label_smoothing=0.1, level=level, ratio=ratio)(
            logits, labels, ref, return_weights=True
        )
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.dtype == weights.dtype == torch.float32
        for result in (loss, weights, gradient):
            assert torch.isfinite(result).all()


def test_nothing_at_ignored_positions_reaches_loss_or_gradient():
    torch.manual_seed(2)
    logits, labels, ref = torch.randn(2, 4, 5), torch.randint(0, 5, (2, 4)), torch.randn(2, 4)
    labels[0, 1:], labels[1, 3] = -100, -100
    spoiled_logits, spoiled_ref = logits.clone(), ref.clone()
    spoiled_logits[labels == -100], spoiled_ref[labels == -100] = math.nan, math.nan
    for level in LEVELS:
        loss_fn = ImportanceWeightedSFTLoss(level=level)
        results = []
        for x, r in ((logits, ref), (spoiled_logits, spoiled_ref)):
            x.requires_grad_()
            loss = loss_fn(x, labels, r)
            results.append((loss, torch.autograd.grad(loss, x)[0]))
        torch.testing.assert_close(*results)
        assert (results[0][1][labels == -100] == 0).all()


def test_a_batch_without_labels_has_loss_zero_and_gradient_zero():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = ImportanceWeightedSFTLoss()(logits, torch.full((2, 3), -100), torch.zeros(2, 3))
    assert loss == 0
    assert (torch.autograd.grad(loss, logits)[0] == 0).all()


def test_bad_options_and_shapes_are_refused_with_what_was_expected():
    with pytest.raises(ConfigError) as caught:
        ImportanceWeightedSFTLoss(2.0, 1.0, 0.0, (3.0, 1.0), level="word", ratio="x")
    assert [problem.split()[0] for problem in caught.value.problems] == [
        "temperature", "epsilon", "label_smoothing", "clip_weight", "level", "ratio",
    ]  # fmt: skip
    loss_fn, logits = ImportanceWeightedSFTLoss(), torch.zeros(2, 3, 5)
    with pytest.raises(ValueError, match=r"labels \[B, S\], got \(2, 3, 5\) and \(2, 4\)"):
        loss_fn(logits, torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"log-probability of each label, \(2, 3\), got \(2, 3, 5\)"):
        loss_fn(logits, torch.zeros(2, 3, dtype=torch.int64), logits)
    for bad in (5, -1):
        with pytest.raises(ValueError, match=rf"in 0 \.\. 4, got {bad}"):
            loss_fn(logits, torch.full((2, 3), bad))
    with pytest.raises(ValueError, match="one shape"):
        importance_weights(torch.zeros(2, 3), torch.zeros(3))


def test_arguments_come_in_the_published_order_and_as_a_config_file_has_them():
    loss_fn = ImportanceWeightedSFTLoss(0.0, 0.1, 2.0, [0.5, 3])
    assert (loss_fn.epsilon, loss_fn.label_smoothing, loss_fn.temperature) == (0.0, 0.1, 2.0)
    ours, theirs = torch.zeros(1, 3), torch.tensor([[-9.0, 1.0, 9.0]])
    weights = importance_weights(ours, theirs, 2.0, 0.0, [0.5, 3])
    torch.testing.assert_close(weights, torch.tensor([[0.5, math.exp(0.5), 3.0]]))
    torch.testing.assert_close(importance_weights(ours, theirs, 2.0, 0.0, np.array([0.5, 3.0])), weights)
    mixed = importance_weights(ours, torch.tensor([[-math.inf, 0.0, math.log(100.0)]]))
    torch.testing.assert_close(mixed, torch.tensor([[0.1, 1.0, 90.1]]))
    for bad in ([1.0], [2.0, 1.0], "3", [0.0, 0.0], 0.0, -1.0, [None, 2.0], math.nan, ["1e-2", 5]):
        with pytest.raises(ConfigError, match="clip_weight"):
            ImportanceWeightedSFTLoss(clip_weight=bad)
