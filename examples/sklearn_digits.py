"""scikit-learn's `partial_fit` on its digits: no framework needed.

python -m pip install "learnit_r8[example]" && python examples/sklearn_digits.py
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import SGDClassifier

from learnit_r8 import R8Scheduler


def log_losses(model: SGDClassifier, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the log loss of each sample, before the step as in other frameworks."""
    probabilities = model.predict_proba(x)[np.arange(len(y)), y]
    return -np.log(np.maximum(probabilities, 1e-7))


def main() -> None:
    digits = load_digits()
    x, y = digits.data / 16, digits.target
    model = SGDClassifier(loss="log_loss", learning_rate="constant", eta0=0.1, random_state=0)
    model.partial_fit(x[:1], y[:1], classes=np.arange(10))

    def restore(state: dict[str, Any]) -> None:
        model.__dict__.update(copy.deepcopy(state))

    with R8Scheduler(
        num_samples=1500,
        batch_size=32,
        num_epochs=10,
        initial_lr=0.1,
        ui="off",
        state_callback=lambda: model.__dict__,
        load_callback=restore,
    ) as scheduler:
        for _ in scheduler.epoch_iterator():
            for indices, lr in scheduler.batch_iterator():
                losses = log_losses(model, x[indices], y[indices])
                model.set_params(eta0=max(lr, 1e-6)).partial_fit(x[indices], y[indices])
                scheduler.update_with_loss(losses)
    print(f"accuracy {model.score(x[1500:], y[1500:]):.3f} after {scheduler.global_step} steps")
    print("most suspicious training images:", scheduler.catalog.suspects(5).tolist())


if __name__ == "__main__":
    main()
