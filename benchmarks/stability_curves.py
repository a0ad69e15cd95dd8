"""Clean loss curves: real training runs and generated families, and faults to plant in them.

Families and runs come in two halves: TUNING ones, on which the detector's rule was chosen, and EXAM
ones, on which it was only measured.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Curve = NDArray[np.float64]
Rng = np.random.Generator


@dataclass(frozen=True, eq=False)
class Run:
    """A clean curve and the steps at which a change was announced."""

    losses: Curve
    notices: frozenset[int] = field(default_factory=frozenset)


def _decay(n: int, floor: float = 0.1, start: float = 2.3) -> Curve:
    return floor + (start - floor) / (1.0 + np.arange(n) / 300.0) ** 0.7


# Generated families. Each is called with a fresh generator and makes one curve of n steps.


def small_batch(rng: Rng, n: int) -> Curve:
    """Log-normal noise of 30%, as of a small batch."""
    return _decay(n) * np.exp(0.3 * rng.standard_normal(n))


def heavy_tail(rng: Rng, n: int) -> Curve:
    """Noise with Student's t of 3 degrees of freedom: its fourth moment is infinite."""
    return _decay(n, 1.0, 4.0) + 0.1 * rng.standard_t(3, n)


def crossing_zero(rng: Rng, n: int) -> Curve:
    """A likelihood that falls through zero."""
    return 1.5 - 3.0 * (1 - np.exp(-np.arange(n) / 4000)) + 0.1 * rng.standard_normal(n)


def plateaus(rng: Rng, n: int) -> Curve:
    """Long flat stretches with sudden falls between them."""
    levels = np.sort(rng.uniform(0.05, 2.3, 1 + n // 5000))[::-1]
    return np.repeat(levels, 5000)[:n] * (1 + 0.1 * rng.standard_normal(n))


def gamma_batch(rng: Rng, n: int) -> Curve:
    """Mean of eight exponential sample losses, batch after batch dependent (AR 0.5)."""
    noise = rng.gamma(8, 1 / 8, n) - 1
    smooth = np.empty(n)
    last = 0.0
    for k, x in enumerate(noise):
        last = 0.5 * last + math.sqrt(0.75) * x
        smooth[k] = last
    return _decay(n) * np.maximum(0.05, 1 + smooth)


def hard_samples(rng: Rng, n: int) -> Curve:
    """Near interpolation: one batch in thirty holds a hard sample and has a 3 to 30 times higher loss."""
    outlier = rng.random(n) < 1 / 30
    return _decay(n, 0.01) * rng.lognormal(0, 0.3, n) * np.where(outlier, rng.uniform(3, 30, n), 1.0)


def cauchy_ratio(rng: Rng, n: int) -> Curve:
    """Student's t of 2 degrees of freedom: infinite variance."""
    return _decay(n, 1.0, 4.0) + 0.05 * rng.standard_t(2, n)


def negative_widening(rng: Rng, n: int) -> Curve:
    """A negative loss whose noise slowly grows sixfold."""
    width = np.linspace(0.05, 0.3, n)
    return -2.0 + 3.0 * np.exp(-np.arange(n) / 2000) + width * rng.standard_normal(n)


def periodic(rng: Rng, n: int) -> Curve:
    """Data read in the same unshuffled order each epoch: the loss swings by half its level."""
    phase = 2 * np.pi * np.arange(n) / 400
    return _decay(n, 0.5) * (1 + 0.5 * np.sin(phase)) * rng.lognormal(0, 0.15, n)


def sawtooth(rng: Rng, n: int) -> Curve:
    """A new task every 900 steps: the loss jumps by 60% and comes down again."""
    phase = np.arange(n) % 900
    return _decay(n, 0.3) * (1 + 0.6 * np.exp(-phase / 150)) * (1 + 0.15 * rng.standard_normal(n))


def collapsing(rng: Rng, n: int) -> Curve:
    """A loss that falls by ten powers of ten, its noise always proportional."""
    return 2.0 * np.exp(-np.arange(n) * 23.0 / n) * rng.lognormal(0, 0.25, n)


def pareto_batch(rng: Rng, n: int) -> Curve:
    """Mean of sixteen sample losses with a Pareto tail of index 2.5: infinite fourth and third moments."""
    return _decay(n, 0.2) * rng.pareto(2.5, (n, 16)).mean(axis=1)


def random_volatility(rng: Rng, n: int) -> Curve:
    """A policy gradient's surrogate loss: around zero, its noise a random walk over a factor of ten."""
    width = np.exp(np.cumsum(0.02 * rng.standard_normal(n)) % (2 * math.log(10)))
    width = np.where(width > 10, 100 / width, width)  # reflected, so that it does not jump
    return -0.05 + 0.05 * width * rng.standard_normal(n)


def harder_data(rng: Rng, n: int) -> Curve:
    """A curriculum: every 3000 steps the data get harder by a quarter, and are learned again."""
    phase, tasks = np.arange(n) % 3000, np.arange(n) // 3000
    level = 0.5 * 1.05**tasks * (1 + 0.25 * np.exp(-phase / 500)) + 2.0 * np.exp(-np.arange(n) / 400)
    return level * rng.lognormal(0, 0.2, n)


# `periodic` was an exam family until the drift rule failed on it (35 alarms in 240k steps, 2 now);
# `sawtooth` took its place. The last three, and the last two real runs, came when the rule for drift in young
# runs was final: nothing was changed after they were first run.
TUNING_FAMILIES: tuple[Callable[[Rng, int], Curve], ...] = (
    small_batch,
    heavy_tail,
    crossing_zero,
    plateaus,
    hard_samples,
    periodic,
)
EXAM_FAMILIES: tuple[Callable[[Rng, int], Curve], ...] = (
    gamma_batch,
    cauchy_ratio,
    negative_widening,
    sawtooth,
    collapsing,
    pareto_batch,
    random_volatility,
    harder_data,
)


# Real training runs, in PyTorch on the CPU.


def _train(model, loss_of, n_samples: int, steps: int, *, batch: int, lr, seed: int = 0, adam: bool = False) -> Curve:
    import torch

    generator = torch.Generator().manual_seed(seed)
    make = torch.optim.Adam if adam else torch.optim.SGD
    kwargs = {} if adam else {"momentum": 0.9}
    optimizer = make(model.parameters(), lr=lr(0), **kwargs)
    losses = np.empty(steps)
    order = torch.randperm(n_samples, generator=generator)
    cursor = 0
    for step in range(steps):
        if cursor + batch > n_samples:
            order, cursor = torch.randperm(n_samples, generator=generator), 0
        index = order[cursor : cursor + batch]
        cursor += batch
        optimizer.param_groups[0]["lr"] = lr(step)
        optimizer.zero_grad()
        loss = loss_of(model, index)
        loss.backward()
        optimizer.step()
        losses[step] = loss.item()
    return losses


def _mlp(*sizes: int, dropout: float = 0.0):
    import torch

    layers: list[torch.nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(a, b), torch.nn.Tanh()]
        if dropout:
            layers.append(torch.nn.Dropout(dropout))
    while not isinstance(layers[-1], torch.nn.Linear):
        layers.pop()
    return torch.nn.Sequential(*layers)


def _tensors(load):
    import torch

    data = load()
    x = torch.tensor((data.data - data.data.mean(0)) / (data.data.std(0) + 1e-6), dtype=torch.float32)
    return x, torch.tensor(data.target)


def digits(steps: int) -> Run:
    """Digits, MLP, cross-entropy, SGD to interpolation, batches of 32."""
    import torch
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    x, y = _tensors(load_digits)
    ce = torch.nn.functional.cross_entropy
    losses = _train(_mlp(64, 64, 10), lambda m, i: ce(m(x[i]), y[i]), len(y), steps, batch=32, lr=lambda t: 0.05)
    return Run(losses)


def gaussian_nll(steps: int) -> Run:
    """Diabetes, mean and variance predicted, Gaussian negative log-likelihood (becomes negative), Adam."""
    import torch
    from sklearn.datasets import load_diabetes

    torch.manual_seed(1)
    x, y = _tensors(load_diabetes)
    y = ((y - y.mean()) / y.std()).float()

    def loss(model, index):
        mean, log_variance = model(x[index]).unbind(1)
        log_variance = log_variance.clamp(-8, 8)
        return 0.5 * (log_variance + (y[index] - mean) ** 2 * torch.exp(-log_variance)).mean()

    model = _mlp(10, 64, 64, 2)
    return Run(_train(model, loss, len(y), steps, batch=32, lr=lambda t: 3e-4, adam=True))


def warm_restarts(steps: int) -> Run:
    """Digits with a tenth of the labels wrong and dropout, LR with cosine warm restarts (announced)."""
    import torch
    from sklearn.datasets import load_digits

    torch.manual_seed(2)
    x, y = _tensors(load_digits)
    wrong = torch.rand(len(y)) < 0.1
    y = torch.where(wrong, torch.randint(0, 10, y.shape), y)
    ce = torch.nn.functional.cross_entropy
    period = 2000

    def lr(t: int) -> float:
        return 0.001 + 0.1 * 0.5 * (1 + math.cos(math.pi * (t % period) / period))

    model = _mlp(64, 128, 10, dropout=0.2)
    losses = _train(model, lambda m, i: ce(m(x[i]), y[i]), len(y), steps, batch=64, lr=lr)
    return Run(losses, frozenset(range(period, steps, period)))


def characters(steps: int) -> Run:
    """The next letter of Python's own licence and docstrings from 16 letters, embedding + MLP, Adam."""
    import inspect
    import textwrap

    import torch

    torch.manual_seed(3)
    text = inspect.getsource(inspect) + inspect.getsource(textwrap)
    letters = sorted(set(text))
    data = torch.tensor([letters.index(c) for c in text])
    windows = data.unfold(0, 17, 1)
    embed = torch.nn.Embedding(len(letters), 12)
    model = torch.nn.Sequential(embed, torch.nn.Flatten(), *_mlp(16 * 12, 128, len(letters)))
    ce = torch.nn.functional.cross_entropy
    losses = _train(
        model,
        lambda m, i: ce(m(windows[i, :16]), windows[i, 16]),
        len(windows),
        steps,
        batch=32,
        lr=lambda t: 1e-3,
        adam=True,
    )
    return Run(losses)


def wine_regression(steps: int) -> Run:
    """Wine classes as numbers, squared error, batches of 8, warm restarts from interpolation (announced)."""
    import torch
    from sklearn.datasets import load_wine

    torch.manual_seed(4)
    x, y = _tensors(load_wine)
    period = 3000

    def lr(t: int) -> float:
        return 0.02 * 0.5 * (1 + math.cos(math.pi * (t % period) / period)) + 1e-5

    losses = _train(_mlp(13, 32, 1), lambda m, i: ((m(x[i])[:, 0] - y[i]) ** 2).mean(), len(y), steps, batch=8, lr=lr)
    return Run(losses, frozenset(range(period, steps, period)))


def cancer_logistic(steps: int) -> Run:
    """Breast cancer, MLP with dropout, batches of 8: most losses near zero, a few samples never learned."""
    import torch
    from sklearn.datasets import load_breast_cancer

    torch.manual_seed(5)
    x, y = _tensors(load_breast_cancer)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    model = _mlp(30, 32, 1, dropout=0.3)
    losses = _train(model, lambda m, i: bce(m(x[i])[:, 0], y[i].float()), len(y), steps, batch=8, lr=lambda t: 0.02)
    return Run(losses)


def autoencoder(steps: int) -> Run:
    """Digits through eight numbers and back, squared error, Adam, batches of 64, linear decay of the LR."""
    import torch
    from sklearn.datasets import load_digits

    torch.manual_seed(6)
    x, y = _tensors(load_digits)
    model = _mlp(64, 48, 8, 48, 64)
    losses = _train(
        model,
        lambda m, i: ((m(x[i]) - x[i]) ** 2).mean(),
        len(y),
        steps,
        batch=64,
        lr=lambda t: 2e-3 * (1 - t / steps),
        adam=True,
    )
    return Run(losses)


def similarity(steps: int) -> Run:
    """Two noisy views of a digit made alike: negative cosine similarity (from 0 to almost -1), batches of 16."""
    import torch
    from sklearn.datasets import load_digits

    torch.manual_seed(7)
    x, y = _tensors(load_digits)

    def loss(model, index):
        one, other = (model(x[index] + 0.3 * torch.randn(len(index), 64)) for _ in range(2))
        return -torch.nn.functional.cosine_similarity(one, other.detach()).mean()

    return Run(_train(_mlp(64, 64, 16), loss, len(y), steps, batch=16, lr=lambda t: 0.01))


TUNING_RUNS: tuple[Callable[[int], Run], ...] = (cancer_logistic, wine_regression)
EXAM_RUNS: tuple[Callable[[int], Run], ...] = (
    digits,
    gaussian_nll,
    warm_restarts,
    characters,
    autoencoder,
    similarity,
)
