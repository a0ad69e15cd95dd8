"""Small real trainings that can be harmed: state, step, score, and ways to damage each."""

from __future__ import annotations

import copy
import itertools
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Task(Protocol):
    """One training. Higher scores are better; `tolerance` is what counts as two points of it."""

    size: int
    batch: int
    lr: float
    tolerance: float

    def step(self, ids: NDArray[np.int64], lr: float, *, skip_nonfinite: bool, garbage: bool, poison: bool) -> Floats:
        """Train on a batch; return one loss per sample. Garbage: labels of others; poison: NaN inputs."""

    def state(self) -> Any:
        """Return all that training changes."""

    def load(self, state: Any) -> None:
        """Restore what `state` returned."""

    def damage(self, kind: str, rng: np.random.Generator) -> None:
        """Damage the weights or the momentum."""

    def spoil(self, rows: NDArray[np.int64]) -> None:
        """Put NaN into a feature of training rows."""

    def score(self) -> float:
        """Return the model's worth on the test set."""


def _split(rng: np.random.Generator, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    order = rng.permutation(count)
    return order[count * 28 // 100 :], order[: count * 28 // 100]


class NumpyMlp:
    """Two layers on scikit-learn's digits (classes) or a noisy linear problem (one number), SGD with momentum 0.9."""

    def __init__(self, seed: int, data: str) -> None:
        from sklearn import datasets

        rng = np.random.default_rng([seed, 1])
        self._classes = data == "digits"
        if self._classes:
            x, y = datasets.load_digits(return_X_y=True)
            x = x / 16.0
        else:
            x, y = datasets.make_regression(1800, 10, noise=100.0, random_state=0)
            y = (y - y.mean()) / y.std()
        train, test = _split(np.random.default_rng(0), len(x))
        self._x, self._y, self._test = x[train].copy(), y[train].copy(), (x[test], y[test])
        self.size, self.batch, self.lr = len(train), 32, 0.1 if self._classes else 0.02
        self.tolerance = 0.02
        sizes = (x.shape[1], 32, 10 if self._classes else 1)
        self._w: dict[str, Floats] = {}
        for i, (a, b) in enumerate(itertools.pairwise(sizes)):
            self._w[f"w{i}"] = rng.normal(0, np.sqrt(2 / a), (a, b))
            self._w[f"b{i}"] = np.zeros(b)
        self._momentum = {name: np.zeros_like(w) for name, w in self._w.items()}

    def _forward(self, x: Floats) -> tuple[Floats, Floats]:
        hidden = np.maximum(x @ self._w["w0"] + self._w["b0"], 0.0)
        return hidden, hidden @ self._w["w1"] + self._w["b1"]

    def step(self, ids: NDArray[np.int64], lr: float, *, skip_nonfinite: bool, garbage: bool, poison: bool) -> Floats:
        with np.errstate(all="ignore"):
            x, y = self._x[ids], self._y[_mixed(ids)] if garbage else self._y[ids]
            if poison:
                x = x * np.nan
            hidden, out = self._forward(x)
            if self._classes:
                p = np.exp(out - out.max(1, keepdims=True))
                p /= p.sum(1, keepdims=True)
                losses = -np.log(p[np.arange(len(ids)), y] + 1e-30)
                p[np.arange(len(ids)), y] -= 1.0
                delta = p / len(ids)
            else:
                error = out[:, 0] - y
                losses = error**2
                delta = 2.0 * error[:, None] / len(ids)
            if skip_nonfinite and not np.isfinite(losses).all():
                return losses
            back = (delta @ self._w["w1"].T) * (hidden > 0)
            gradients = {"w1": hidden.T @ delta, "b1": delta.sum(0), "w0": x.T @ back, "b0": back.sum(0)}
            for name, gradient in gradients.items():
                self._momentum[name] = 0.9 * self._momentum[name] + gradient
                self._w[name] = self._w[name] - lr * self._momentum[name]
        return losses

    def state(self) -> Any:
        return {"model": self._w, "momentum": self._momentum}

    def load(self, state: Any) -> None:
        self._w, self._momentum = dict(state["model"]), dict(state["momentum"])

    def damage(self, kind: str, rng: np.random.Generator) -> None:
        name = ("w0", "w1")[int(rng.integers(2))]
        if kind == "nan momentum":
            self._momentum[name] = self._momentum[name].copy()
            self._momentum[name][0, 0] = np.nan
            return
        self._w[name] = _damaged(self._w[name], kind, rng)

    def spoil(self, rows: NDArray[np.int64]) -> None:
        self._x[rows, 3] = np.nan

    def score(self) -> float:
        x, y = self._test
        with np.errstate(all="ignore"):
            _, out = self._forward(x)
            if not np.isfinite(out).all():
                return 0.1 if self._classes else -99.0
            if self._classes:
                return float((out.argmax(1) == y).mean())
            return -float(((out[:, 0] - y) ** 2).mean())


def _mixed(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the batch's samples in another order: labels of others, as a loader that lost its place gives them."""
    return np.roll(ids, 1)


def _damaged(w: Any, kind: str, rng: np.random.Generator) -> Any:
    if kind == "nan weight":
        w = copy.deepcopy(w)
        w.reshape(-1)[int(rng.integers(w.size if isinstance(w, np.ndarray) else w.numel()))] = float("nan")
        return w
    return w * {"weights x 8": 8.0, "weights x 60": 60.0, "layer lost": 0.0}[kind]


class TorchTask:
    """A small network in torch with AdamW or SGD: a convolution on digits, or a GRU or transformer on characters."""

    def __init__(self, seed: int, kind: str) -> None:
        import torch
        from sklearn.datasets import load_digits

        torch.set_num_threads(1)
        torch.manual_seed(seed)
        self._torch, self._kind = torch, kind
        if kind == "cnn":
            x, y = load_digits(return_X_y=True)
            train, test = _split(np.random.default_rng(0), len(x))
            x = torch.tensor(x / 16.0, dtype=torch.float32).reshape(-1, 1, 8, 8)
            y = torch.tensor(y)
            nn = torch.nn
            self.net = nn.Sequential(
                nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
            )  # fmt: skip
            self.lr, self.tolerance = 0.05, 0.02
            self._opt: Any = torch.optim.SGD(self.net.parameters(), self.lr, momentum=0.9)
        else:
            x, y, train, test = _characters(torch)
            self.net = _Gru(torch)
            self.lr, self.tolerance = 1e-2, 0.02
            self._opt = torch.optim.AdamW(self.net.parameters(), self.lr)
        self._x, self._y = x[train].clone(), y[train].clone()
        self._test = x[test], y[test]
        self.size, self.batch = len(train), 32
        self._bad = torch.zeros(self.size, dtype=torch.bool)

    def _losses(self, x: Any, y: Any) -> Any:
        losses = self._torch.nn.functional.cross_entropy(
            self.net(x).reshape(-1, self.net_classes), y.reshape(-1), reduction="none"
        )
        return losses.reshape(len(x), -1).mean(1)

    @property
    def net_classes(self) -> int:
        return 10 if self._kind == "cnn" else 32

    def step(self, ids: NDArray[np.int64], lr: float, *, skip_nonfinite: bool, garbage: bool, poison: bool) -> Floats:
        torch = self._torch
        rows = torch.from_numpy(np.ascontiguousarray(ids))
        x, y = self._x[rows], self._y[torch.from_numpy(_mixed(ids))] if garbage else self._y[rows]
        for group in self._opt.param_groups:
            group["lr"] = lr
        losses = self._losses(x, y)
        losses = losses * torch.where(self._bad[rows] | poison, float("nan"), 1.0)
        if skip_nonfinite and not bool(losses.isfinite().all()):
            return losses.detach().numpy()
        self._opt.zero_grad()
        losses.mean().backward()
        self._opt.step()
        return losses.detach().numpy()

    def state(self) -> Any:
        return {"model": self.net.state_dict(), "optimizer": self._opt.state_dict()}

    def load(self, state: Any) -> None:
        self.net.load_state_dict(state["model"])
        self._opt.load_state_dict(state["optimizer"])

    def damage(self, kind: str, rng: np.random.Generator) -> None:
        torch = self._torch
        with torch.no_grad():
            matrices = [p for p in self.net.parameters() if p.ndim > 1]
            chosen = matrices[int(rng.integers(len(matrices)))]
            if kind == "nan momentum":
                state = self._opt.state[chosen]
                for name in ("momentum_buffer", "exp_avg"):
                    if name in state:
                        state[name].view(-1)[0] = float("nan")
            else:
                chosen.copy_(_damaged(chosen, kind, rng))

    def spoil(self, rows: NDArray[np.int64]) -> None:
        self._bad[self._torch.from_numpy(rows)] = True

    def score(self) -> float:
        torch = self._torch
        self.net.eval()
        with torch.no_grad():
            x, y = self._test
            if self._kind == "cnn":
                out = self.net(x)
                found = float((out.argmax(1) == y).float().mean()) if bool(out.isfinite().all()) else 0.1
            else:
                found = -float(self._losses(x, y).mean())
                found = found if np.isfinite(found) else -99.0
        self.net.train()
        return found


def _characters(torch: Any) -> tuple[Any, Any, NDArray[np.int64], NDArray[np.int64]]:
    """Sequences of 16 characters of Python's own source text, and the next ones."""
    import inspect
    import random
    import statistics

    text = (inspect.getsource(random) + inspect.getsource(statistics)).lower()
    codes = np.array([min(31, max(0, ord(c) - 95)) if c.isalpha() or c == "_" else 27 + (c == "\n") for c in text])
    starts = np.arange(0, len(codes) - 18, 16)[:1500]
    windows = np.stack([codes[s : s + 17] for s in starts])
    train, test = _split(np.random.default_rng(0), len(windows))
    return torch.tensor(windows[:, :-1]), torch.tensor(windows[:, 1:]), train, test


def _Gru(torch: Any) -> Any:  # noqa: N802 - makes a module
    class Gru(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(32, 16)
            self.gru = torch.nn.GRU(16, 32, batch_first=True)
            self.head = torch.nn.Linear(32, 32)

        def forward(self, x: Any) -> Any:
            return self.head(self.gru(self.embed(x))[0])

    return Gru()


def make(name: str, seed: int) -> Task:
    """Return a fresh task of a name in `NAMES`."""
    if name in ("mlp", "regression"):
        return NumpyMlp(seed, "digits" if name == "mlp" else "linear")
    return TorchTask(seed, name)


NAMES = ("mlp", "regression", "cnn", "gru")
