"""Trainings with nothing wrong whose losses look odd: the net must leave every one of them alone.

Each is a real training of a small model in numpy or torch, reported as its practitioners would, with all state backed
up. Right is: no rollback, no stop. (One rollback is granted where a part of the state is overwritten or switched on.)
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from learnit_r8 import R8Scheduler, TrainingDiverged, events

Loop = Iterator[tuple[Any, float, Callable[[Any], Any]]]
"""ids, learning rate, report."""


VERBOSE = False


class _Run:
    """A scheduler's loop with everything counted."""

    def __init__(self, size: int, batch: int, steps: int, lr: float, seed: int, **options: Any) -> None:
        self.counts = {"rollbacks": 0, "told": 0}
        epochs = -(-steps // -(-size // batch))
        self.scheduler = R8Scheduler(
            size, batch, num_epochs=epochs, initial_lr=lr, seed=seed, ui="off", checkpoint_dir=None, sinks=[self],
            noise_guard="off", **options,
        )  # fmt: skip

    def record(self, event: events.Event) -> None:
        self.counts["rollbacks"] += isinstance(event, events.RolledBack)
        self.counts["told"] += isinstance(event, events.SpikeSeen)
        if VERBOSE and isinstance(event, events.SpikeSeen | events.RolledBack | events.Notice):
            print("   ", event, flush=True)

    def __iter__(self) -> Loop:
        for _epoch in self.scheduler.epoch_iterator():
            for ids, lr in self.scheduler.batch_iterator():
                yield ids, lr, self.scheduler.update_with_loss


class _Nets:
    """Modules and optimizers as one state."""

    def __init__(self, *parts: Any) -> None:
        self._parts = parts

    def state(self) -> Any:
        return {("optimizer" if hasattr(p, "param_groups") else "model") + str(i): p.state_dict()
                for i, p in enumerate(self._parts)}  # fmt: skip

    def load(self, state: Any) -> None:
        for i, part in enumerate(self._parts):
            part.load_state_dict(state[("optimizer" if hasattr(part, "param_groups") else "model") + str(i)])

    @property
    def callbacks(self) -> dict[str, Any]:
        return {"state_callback": self.state, "load_callback": self.load}


def _mlp(*sizes: int, last: Any = None) -> Any:
    import torch

    layers: list[Any] = []
    for a, b in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(a, b), torch.nn.ReLU()]
    layers.pop()
    return torch.nn.Sequential(*layers, *([last] if last is not None else []))


def _digits() -> tuple[Any, Any]:
    import torch
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16.0, dtype=torch.float32), torch.tensor(y)


def _rates(optimizers: Any, lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def gan(seed: int, kind: str, reported: str) -> dict[str, int]:
    """A GAN on digits; the generator's or the discriminator's loss is reported."""
    import torch

    x, _ = _digits()
    g, d = _mlp(16, 64, 64, last=torch.nn.Sigmoid()), _mlp(64, 64, 1)
    og, od = torch.optim.Adam(g.parameters(), 2e-3, (0.5, 0.9)), torch.optim.Adam(d.parameters(), 2e-3, (0.5, 0.9))
    run = _Run(len(x), 32, 2500, 2e-3, seed, scheduler_mode="constant", **_Nets(g, d, og, od).callbacks)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    for ids, lr, report in run:
        _rates((og, od), lr)
        real = x[torch.from_numpy(ids)]
        fake = g(torch.randn(len(real), 16))
        if kind == "wgan-gp":
            a = torch.rand(len(real), 1)
            mixed = (a * real + (1 - a) * fake.detach()).requires_grad_()
            slope = torch.autograd.grad(d(mixed).sum(), mixed, create_graph=True)[0].norm(dim=1)
            loss_d = d(fake.detach()).mean() - d(real).mean() + 10 * ((slope - 1) ** 2).mean()
        else:
            loss_d = bce(d(real), torch.ones(len(real), 1)) + bce(d(fake.detach()), torch.zeros(len(real), 1))
        od.zero_grad()
        loss_d.backward()
        od.step()
        out = d(fake)
        loss_g = -out.mean() if kind == "wgan-gp" else bce(out, torch.ones_like(out))
        og.zero_grad()
        loss_g.backward()
        og.step()
        report(loss_g if reported == "g" else loss_d)
    return run.counts


def vae_annealing(seed: int) -> dict[str, int]:
    """A VAE whose KL weight rises from 0 to 4."""
    import torch

    x, _ = _digits()
    enc, dec = _mlp(64, 64, 16), _mlp(8, 64, 64)
    opt = torch.optim.Adam([*enc.parameters(), *dec.parameters()], 2e-3)
    run = _Run(len(x), 32, 2500, 2e-3, seed, **_Nets(enc, dec, opt).callbacks)
    for k, (ids, lr, report) in enumerate(run):
        _rates((opt,), lr)
        real = x[torch.from_numpy(ids)]
        mean, log_var = enc(real).chunk(2, 1)
        out = dec(mean + torch.randn_like(mean) * (0.5 * log_var).exp())
        kl = 0.5 * (log_var.exp() + mean**2 - 1 - log_var).sum(1)
        losses = ((out - real) ** 2).sum(1) + 4.0 * min(1.0, max(0.0, (k - 500) / 1000)) * kl
        opt.zero_grad()
        losses.mean().backward()
        opt.step()
        report(losses)
    return run.counts


def diffusion_b1(seed: int) -> dict[str, int]:
    """Noise prediction, one sample a step."""
    import torch

    x, _ = _digits()
    net = _mlp(65, 96, 64)
    opt = torch.optim.Adam(net.parameters(), 1e-3)
    run = _Run(len(x), 1, 3500, 1e-3, seed, **_Nets(net, opt).callbacks)
    for ids, lr, report in run:
        _rates((opt,), lr)
        real, t = x[torch.from_numpy(ids)] * 2 - 1, torch.rand(len(ids), 1)
        noise = torch.randn_like(real)
        mixed = torch.cos(t * math.pi / 2) * real + torch.sin(t * math.pi / 2) * noise
        losses = ((net(torch.cat([mixed, t], 1)) - noise) ** 2).mean(1)
        opt.zero_grad()
        losses.mean().backward()
        opt.step()
        report(losses)
    return run.counts


def grpo_kl(seed: int) -> dict[str, int]:
    """Policy gradient in groups on digits as a bandit, with a KL term to the start: the first loss is 0."""
    import copy

    import torch

    x, y = _digits()
    net = _mlp(64, 64, 10)
    reference = copy.deepcopy(net)
    opt = torch.optim.Adam(net.parameters(), 2e-3)
    run = _Run(
        len(x), 32, 2000, 2e-3, seed, scheduler_mode="constant", warmup_proportion=0.0, **_Nets(net, opt).callbacks
    )
    for ids, lr, report in run:
        _rates((opt,), lr)
        rows = torch.from_numpy(ids)
        logits = net(x[rows]).log_softmax(1)
        with torch.no_grad():
            ref = reference(x[rows]).log_softmax(1)
        actions = torch.distributions.Categorical(logits=logits.detach()).sample((8,)).T
        rewards = (actions == y[rows][:, None]).float()
        advantage = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        chosen = logits.gather(1, actions)
        ratio = (chosen - chosen.detach()).exp()
        kl = (logits.exp() * (logits - ref)).sum(1)
        losses = -(ratio * advantage).mean(1) + 0.04 * kl
        opt.zero_grad()
        losses.mean().backward()
        opt.step()
        report(losses.mean())
    return run.counts


def distillation_from_copy(seed: int) -> dict[str, int]:
    """A student that starts as a copy of its teacher, which then moves on: the first loss is 0."""
    import copy

    import torch

    x, y = _digits()
    teacher = _mlp(64, 64, 10)
    student = copy.deepcopy(teacher)
    ot, os_ = torch.optim.SGD(teacher.parameters(), 0.1, 0.9), torch.optim.SGD(student.parameters(), 0.1, 0.9)
    run = _Run(len(x), 32, 2000, 0.1, seed, **_Nets(teacher, student, ot, os_).callbacks)
    for ids, lr, report in run:
        _rates((ot, os_), lr)
        rows = torch.from_numpy(ids)
        aim = teacher(x[rows]).detach().softmax(1)
        losses = (aim * (aim.clamp_min(1e-9).log() - student(x[rows]).log_softmax(1))).sum(1)
        os_.zero_grad()
        losses.mean().backward()
        os_.step()
        ot.zero_grad()
        torch.nn.functional.cross_entropy(teacher(x[rows]), y[rows]).backward()
        ot.step()
        report(losses)
    return run.counts


def contrastive_queue(seed: int) -> dict[str, int]:
    """Contrastive learning whose queue of negatives grows from nothing to 4096."""
    import torch

    x, _ = _digits()
    net = _mlp(64, 64, 16)
    opt = torch.optim.SGD(net.parameters(), 0.05, 0.9)
    run = _Run(len(x), 32, 2000, 0.05, seed, **_Nets(net, opt).callbacks)
    queue = torch.empty(0, 16)
    norm = torch.nn.functional.normalize
    for ids, lr, report in run:
        _rates((opt,), lr)
        real = x[torch.from_numpy(ids)]
        a = norm(net(real + 0.1 * torch.randn_like(real)), dim=1)
        b = norm(net(real + 0.1 * torch.randn_like(real)), dim=1)
        logits = torch.cat([(a * b).sum(1, keepdim=True), a @ queue.T], 1) / 0.2
        losses = torch.nn.functional.cross_entropy(logits, torch.zeros(len(a), dtype=torch.long), reduction="none")
        opt.zero_grad()
        losses.mean().backward()
        opt.step()
        queue = torch.cat([b.detach(), queue])[:4096]
        report(losses)
    return run.counts


def fitted_q(seed: int) -> dict[str, int]:
    """Fitted Q on a random chain with a hard target update every 200 steps."""
    import copy

    import torch

    rng = np.random.default_rng(seed)
    states, actions, count = 30, 4, 4096
    move, reward = rng.integers(states, size=(states, actions)), rng.random((states, actions))
    s, a = rng.integers(states, size=count), rng.integers(actions, size=count)
    eye = torch.eye(states)
    net = _mlp(states, 64, actions)
    target = copy.deepcopy(net)
    opt = torch.optim.Adam(net.parameters(), 2e-3)
    run = _Run(count, 32, 3000, 2e-3, seed, scheduler_mode="constant", **_Nets(net, target, opt).callbacks)
    for k, (ids, lr, report) in enumerate(run):
        _rates((opt,), lr)
        if k % 200 == 0:
            target.load_state_dict(net.state_dict())
        after = torch.from_numpy(move[s[ids], a[ids]])
        with torch.no_grad():
            aim = torch.tensor(reward[s[ids], a[ids]], dtype=torch.float32) + 0.97 * target(eye[after]).max(1).values
        q = net(eye[torch.from_numpy(s[ids])]).gather(1, torch.from_numpy(a[ids])[:, None])[:, 0]
        losses = (q - aim) ** 2
        opt.zero_grad()
        losses.mean().backward()
        opt.step()
        report(losses)
    return run.counts


def _classify(
    seed: int, steps: int, change: Callable[[int, Any], Any], lr: float = 0.1, adam: bool = False, bn: bool = False,
    batch: int = 32, head: bool = False, **options: Any,
) -> dict[str, int]:  # fmt: skip
    import torch

    x, y = _digits()
    net = _mlp(64, 64, 10)
    if bn:
        net.insert(1, torch.nn.BatchNorm1d(64))
    extra = torch.nn.Linear(10, 64)
    parts = [*net.parameters(), *extra.parameters()]
    opt = torch.optim.AdamW(parts, lr) if adam else torch.optim.SGD(parts, lr, 0.9)
    run = _Run(len(x), batch, steps, lr, seed, **options, **_Nets(net, extra, opt).callbacks)
    for k, (ids, rate, report) in enumerate(run):
        _rates((opt,), rate)
        rows = torch.from_numpy(ids)
        out = net(change(k, x[rows]))
        losses = torch.nn.functional.cross_entropy(out, y[rows], reduction="none")
        if head and k >= steps // 2:
            losses = losses + 10.0 * ((extra(out) - x[rows]) ** 2).mean(1)
        opt.zero_grad()
        losses.mean().backward()
        opt.step()
        report(losses)
    return run.counts


def harder_curriculum(seed: int) -> dict[str, int]:
    """Inputs get noisier at every sixth of the run."""
    import torch

    return _classify(seed, 2000, lambda k, x: x + 0.25 * (k // 330) * torch.randn_like(x))


def augmentation_switched_on(seed: int) -> dict[str, int]:
    """From the middle on half of the pixels are dropped, the rest turned upside down; BatchNorm, AdamW."""
    import torch

    def change(k: int, x: Any) -> Any:
        return x if k < 1000 else 1.5 * x.flip(1) * (torch.rand_like(x) > 0.5)

    return _classify(seed, 2000, change, lr=3e-3, adam=True, bn=True)


def auxiliary_loss(seed: int) -> dict[str, int]:
    """A reconstruction term with a head of its own is switched on in the middle."""
    return _classify(seed, 2000, lambda k, x: x, head=True, lr=0.02)


def auxiliary_loss_adam(seed: int) -> dict[str, int]:
    """The same with AdamW."""
    return _classify(seed, 2000, lambda k, x: x, head=True, lr=3e-3, adam=True)


def warm_restarts(seed: int) -> dict[str, int]:
    """Cosine with restarts at a high rate."""
    return _classify(seed, 2500, lambda k, x: x, lr=0.3, scheduler_mode="cosine_with_restarts")


def batch_of_one(seed: int) -> dict[str, int]:
    """Classification, one sample a step."""
    return _classify(seed, 3500, lambda k, x: x, lr=0.005, batch=1)


def regression_b1(seed: int) -> dict[str, int]:
    """Squared error on diabetes, one sample a step."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    x, y = x / x.std(0), (y - y.mean()) / y.std()
    w = {"w": np.zeros(10)}

    def load(state: Any) -> None:
        w.update(state)

    run = _Run(len(y), 1, 2500, 0.002, seed, state_callback=lambda: w, load_callback=load)
    for ids, lr, report in run:
        error = x[ids] @ w["w"] - y[ids]
        w["w"] = w["w"] - lr * (x[ids].T @ error)
        report(error**2)
    return run.counts


def summed_tokens(seed: int) -> dict[str, int]:
    """Losses summed over sequences whose lengths differ a hundredfold."""
    import torch

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(3, 1, 1500), 3, 400).astype(int)
    walk = [torch.from_numpy(np.cumsum(rng.integers(-1, 2, n + 1)) % 12) for n in lengths]
    net = torch.nn.Sequential(torch.nn.Embedding(12, 16), torch.nn.Linear(16, 12))
    opt = torch.optim.AdamW(net.parameters(), 3e-3)
    run = _Run(1500, 2, 2200, 3e-3, seed, **_Nets(net, opt).callbacks)
    for ids, lr, report in run:
        _rates((opt,), lr)
        losses = torch.stack([
            torch.nn.functional.cross_entropy(net(walk[i][:-1]), walk[i][1:], reduction="sum") for i in ids
        ])  # fmt: skip
        opt.zero_grad()
        losses.mean().backward()
        opt.step()
        report(losses)
    return run.counts


def unfreezing(seed: int) -> dict[str, int]:
    """A frozen body under a new head; the body is unfrozen at a third of the run at the full rate."""
    import torch

    x, y = _digits()
    body, head = _mlp(64, 64, 64), torch.nn.Linear(64, 10)
    opt = torch.optim.AdamW(head.parameters(), 5e-3)
    run = _Run(len(x), 32, 2000, 5e-3, seed, **_Nets(body, head).callbacks)
    for k, (ids, lr, report) in enumerate(run):
        if k == 660:
            opt.add_param_group({"params": list(body.parameters())})
        _rates((opt,), lr)
        rows = torch.from_numpy(ids)
        losses = torch.nn.functional.cross_entropy(head(body(x[rows])), y[rows], reduction="none")
        opt.zero_grad()
        losses.mean().backward()
        opt.step()
        report(losses)
    return run.counts


def another_task(seed: int) -> dict[str, int]:
    """From the middle on the classes have other numbers, and are learned anew."""
    import torch

    x, y = _digits()
    net = _mlp(64, 64, 10)
    opt = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    run = _Run(len(x), 32, 1000, 0.05, seed, **_Nets(net).callbacks)
    for k, (ids, lr, report) in enumerate(run):
        _rates((opt,), lr)
        rows = torch.from_numpy(ids)
        target = y[rows] if k < 500 else (y[rows] + 3) % 10
        losses = torch.nn.functional.cross_entropy(net(x[rows]), target, reduction="none")
        opt.zero_grad()
        losses.mean().backward()
        opt.step()
        report(losses)
    return run.counts


KINDS: dict[str, Callable[[int], dict[str, int]]] = {
    "GAN, generator": lambda seed: gan(seed, "gan", "g"),
    "GAN, discriminator": lambda seed: gan(seed, "gan", "d"),
    "WGAN-GP, critic": lambda seed: gan(seed, "wgan-gp", "d"),
    "WGAN-GP, generator": lambda seed: gan(seed, "wgan-gp", "g"),
    **{f.__name__.replace("_", " "): f for f in (
        vae_annealing, diffusion_b1, grpo_kl, distillation_from_copy, contrastive_queue, fitted_q, harder_curriculum,
        augmentation_switched_on, auxiliary_loss, auxiliary_loss_adam, warm_restarts, batch_of_one, regression_b1,
        summed_tokens, unfreezing, another_task,
    )},
}  # fmt: skip


def run_all(seeds: int, only: str = "") -> list[list[Any]]:
    """Return name, runs, rollbacks, stops and what was told, for each kind."""
    import torch

    torch.set_num_threads(1)
    rows = []
    for name, make in KINDS.items():
        if only and only not in name:
            continue
        totals = {"rollbacks": 0, "stopped": 0, "told": 0}
        for seed in range(seeds):
            torch.manual_seed(seed)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    counts = make(seed)
            except TrainingDiverged:
                counts = {"stopped": 1}
            for key, value in counts.items():
                totals[key] += value
        rows.append([name, seeds, totals["rollbacks"], totals["stopped"], totals["told"]])
    return rows


if __name__ == "__main__":
    import sys

    for line in run_all(int(sys.argv[1]) if len(sys.argv) > 1 else 2, sys.argv[2] if len(sys.argv) > 2 else ""):
        print(*line, sep="\t", flush=True)
