"""Flip a fifth of the labels of scikit-learn's digits, train, and see what the losses give away.

    python -m pip install -e ".[example]" && python examples/find_flipped_digits.py

The network is told nothing about the flips. The noise guard finds them from the losses, keeps them
out of most epochs, and the test accuracy shows what that is worth.
"""

from __future__ import annotations

import argparse

import numpy as np
from sklearn.datasets import load_digits

from learnit_r8 import R8Scheduler

TRAIN, HIDDEN = 1200, 128


class Network:
    """A multi-layer perceptron, 64-128-10, with SGD and momentum, in numpy."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.values = [
            rng.normal(0, np.sqrt(2 / 64), (64, HIDDEN)),
            rng.normal(0, np.sqrt(2 / HIDDEN), (HIDDEN, 10)),
        ]
        self.speeds = [np.zeros_like(value) for value in self.values]

    def logits(self, x):
        hidden = np.maximum(x @ self.values[0], 0)
        return hidden, hidden @ self.values[1]

    def train_step(self, x, y, lr):
        """Take one step; return the loss of every sample."""
        hidden, z = self.logits(x)
        log_p = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
        delta = np.exp(log_p)
        delta[np.arange(len(y)), y] -= 1
        delta /= len(y)
        gradients = x.T @ ((delta @ self.values[1].T) * (hidden > 0)), hidden.T @ delta
        for value, speed, gradient in zip(self.values, self.speeds, gradients, strict=True):
            speed *= 0.9
            speed += gradient
            value -= lr * speed
        return -log_p[np.arange(len(y)), y]

    def predict(self, x):
        return self.logits(x)[1].argmax(axis=1)


def train(x, y, guard, epochs, ui):
    network = Network()
    with R8Scheduler(
        len(y), 32, num_epochs=epochs, initial_lr=0.05, noise_guard=guard, checkpoint_dir=None, ui=ui
    ) as scheduler:
        for _ in scheduler.epoch_iterator():
            for indices, lr in scheduler.batch_iterator():
                scheduler.update_with_loss(network.train_step(x[indices], y[indices], lr))
    return network, scheduler


def draw(images, captions, per_row=4):
    """Return digits side by side, two characters to a pixel."""
    shades, rows = " ░▒▓█", []
    for start in range(0, len(images), per_row):
        part = images[start : start + per_row]
        rows += [
            "  ".join("".join(shades[round(v * 4)] * 2 for v in image[line]) for image in part) for line in range(8)
        ]
        rows += ["  ".join(f"{caption:<16}" for caption in captions[start : start + per_row]), ""]
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--flipped", type=float, default=0.2, help="share of the labels (default %(default)s)")
    parser.add_argument("--ui", default="auto", help="auto, curses, rich, log or off")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    x, true = load_digits(return_X_y=True)
    order = rng.permutation(len(true))
    x, true = x[order] / 16, true[order]
    given, wrong = true[:TRAIN].copy(), np.zeros(TRAIN, bool)
    wrong[rng.permutation(TRAIN)[: round(options.flipped * TRAIN)]] = True
    given[wrong] = (given[wrong] + rng.integers(1, 10, wrong.sum())) % 10

    plain, _ = train(x[:TRAIN], given, "off", options.epochs, "off")
    guarded, scheduler = train(x[:TRAIN], given, "cap", options.epochs, options.ui)

    flagged, named = scheduler.noise_guard.flagged, scheduler.catalog.suspects(8)
    captions = [f"label {given[i]}, {'was ' + str(true[i]) if wrong[i] else 'right!'}" for i in named]
    print(f"\nThe eight most suspicious of {TRAIN} training samples:\n")
    print(draw(x[named].reshape(-1, 8, 8), captions))
    print(f"flipped {wrong.sum()}, flagged {flagged.sum()}, flipped among them {wrong[flagged].sum()}")
    for name, network in (("without the guard", plain), ('noise_guard="cap"', guarded)):
        print(f"test accuracy {name:18} {np.mean(network.predict(x[TRAIN:]) == true[TRAIN:]):.3f}")


if __name__ == "__main__":
    main()
