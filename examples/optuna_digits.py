"""A search of hyper-parameters by Optuna that stops hopeless runs by the level of their loss.

    python -m pip install optuna scikit-learn
    python examples/optuna_digits.py --trials 20

A trial is a run of its own: a scheduler that is closed at the trial's end, whether it was finished or pruned. Levels
(the median loss of an epoch) are compared epoch by epoch: a trial that is above the median of the others is pruned, and
so is one that diverges. What was found is tested on digits that no trial has seen.
"""

from __future__ import annotations

import argparse
from contextlib import suppress

import numpy as np
import optuna
from sklearn.datasets import load_digits

from learnit_r8 import R8Scheduler, TrainingDiverged

X, Y = load_digits(return_X_y=True)
X = (X / 16.0).astype(np.float32)
TRAIN, TEST = np.arange(1200), np.arange(1200, len(X))


class Net:
    """One hidden layer of ReLUs in numpy, trained by SGD with momentum."""

    def __init__(self, hidden: int, momentum: float, decay: float) -> None:
        rng = np.random.default_rng(0)
        self.a = rng.normal(0, 0.15, (64, hidden)).astype(np.float32)
        self.b = rng.normal(0, 0.15, (hidden, 10)).astype(np.float32)
        self.speeds, self.momentum, self.decay = [0.0, 0.0], momentum, decay

    def train(self, indices: np.ndarray, lr: float) -> np.ndarray:
        """Take a step; return the loss of each sample."""
        x, y, rows = X[indices], Y[indices], np.arange(len(indices))
        hidden = np.maximum(x @ self.a, 0)
        logits = hidden @ self.b
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        losses = -np.log(np.maximum(p[rows, y], 1e-30))
        p[rows, y] -= 1
        p /= len(rows)
        gradients = [x.T @ ((p @ self.b.T) * (hidden > 0)), hidden.T @ p]
        for k, (weights, gradient) in enumerate(zip((self.a, self.b), gradients, strict=True)):
            self.speeds[k] = self.momentum * self.speeds[k] - lr * (gradient + self.decay * weights)
            weights += self.speeds[k]
        return losses

    def accuracy(self, indices: np.ndarray) -> float:
        """Return the share of right answers."""
        return float((np.argmax(np.maximum(X[indices] @ self.a, 0) @ self.b, 1) == Y[indices]).mean())


def objective(trial: optuna.Trial, epochs: int = 8) -> float:
    """Train with what the trial suggests; return the level of the loss in the last epoch."""
    net = Net(
        trial.suggest_int("hidden", 16, 64, log=True),
        trial.suggest_float("momentum", 0.0, 0.95),
        trial.suggest_float("decay", 1e-6, 1e-2, log=True),
    )
    level, pruned = np.inf, True
    with suppress(TrainingDiverged), R8Scheduler(
        len(TRAIN), trial.suggest_categorical("batch", [16, 32, 64]), num_epochs=epochs, seed=trial.number,
        initial_lr=trial.suggest_float("lr", 1e-4, 1.0, log=True), checkpoint_dir=None, ui="off",
    ) as scheduler:  # fmt: skip
        for epoch in scheduler.epoch_iterator():
            losses = [scheduler.update_with_loss(net.train(*batch)).loss for batch in scheduler.batch_iterator()]
            level = float(np.median(losses))
            trial.report(level, epoch)
            if pruned := trial.should_prune():
                break
    if pruned:
        raise optuna.TrialPruned
    trial.set_user_attr("accuracy", net.accuracy(TEST))
    return level


def search(trials: int, seed: int = 0) -> optuna.Study:
    """Search in so many trials."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed), pruner=pruner)
    with np.errstate(all="ignore"):  # rates that are too high belong to the search
        study.optimize(objective, n_trials=trials)
    return study


def main(arguments: list[str] | None = None) -> optuna.Study:
    """Search and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    study = search(parser.parse_args(arguments).trials)
    pruned = sum(trial.state == optuna.trial.TrialState.PRUNED for trial in study.trials)
    print(f"{len(study.trials)} trials, {pruned} pruned; test accuracy {study.best_trial.user_attrs['accuracy']:.3f}")
    print("best:", study.best_params)
    return study


if __name__ == "__main__":
    main()
