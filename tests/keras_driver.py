"""Runs Keras on one backend and prints what happened, as JSON; started by test_integration_keras.py."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

warnings.simplefilter("ignore")
import keras  # noqa: E402

from learnit_r8 import R8Scheduler, TrainingDiverged  # noqa: E402
from learnit_r8.integrations.keras import R8Callback, R8Dataset, capture_state, restore_state  # noqa: E402
from tests.backup_watch import BackupWatch, always, fingerprint, random_steps  # noqa: E402

SAMPLES, BATCH = 100, 8  # the last batch is shorter


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(SAMPLES, 4)).astype(np.float32)
    return x, (x[:, 0] > 0).astype(np.int32) + (x[:, 1] > 1).astype(np.int32)


def model_for(seed: int, **compiled):
    keras.utils.set_random_seed(seed)
    # Not relu: TensorFlow's turns NaN into 0, and the losses of a model that is full of NaN are finite.
    layers = [keras.layers.Dense(16, activation="tanh"), keras.layers.Dropout(0.1), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adam(1e-3), loss=loss, metrics=["accuracy"], **compiled)
    return model


def scheduler_for(**options) -> R8Scheduler:
    options = {"num_epochs": 3, "initial_lr": 0.02, "checkpoint_dir": None, "ui": "off", "backup_every": 4} | options
    return R8Scheduler(SAMPLES, BATCH, **options)


class Spy(R8Callback):
    """Remembers what was trained on and at which rate; stops where it is told to."""

    def __init__(self, dataset, stop_at=None) -> None:
        super().__init__(dataset)
        self.seen, self.rates = [], []
        self.stop_at, self.state = stop_at, None

    def on_train_batch_begin(self, batch, logs=None) -> None:
        super().on_train_batch_begin(batch, logs)
        self.seen.append(self._dataset.current.indices.tolist())
        self.rates.append(float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)))

    def on_train_batch_end(self, batch, logs=None) -> None:
        super().on_train_batch_end(batch, logs)
        if len(self.seen) == self.stop_at:
            self.state = capture_state(self.model), self._dataset.scheduler.state_dict()
            raise KeyboardInterrupt


def fit(model, dataset, stop_at=None, **options) -> Spy:
    spy = Spy(dataset, stop_at)
    try:
        model.fit(dataset, shuffle=False, epochs=1000, verbose=0, callbacks=[spy], **options)
    except KeyboardInterrupt:
        dataset.stop()
    return spy


def resume(workers: int) -> dict:
    x, y = data()
    whole, scheduler = model_for(0), scheduler_for()
    seen = fit(whole, R8Dataset(scheduler, x, y, workers=workers)).seen
    first = fit(model_for(0), R8Dataset(scheduler_for(), x, y, workers=workers), stop_at=19)
    second, again = model_for(9), scheduler_for()
    weights, state = first.state
    restore_state(weights, second)
    again.load_state_dict(state)
    rest = fit(second, R8Dataset(again, x, y, workers=workers))
    return {
        "ids": first.seen + rest.seen == seen,
        "weights": fingerprint(capture_state(second)) == fingerprint(capture_state(whole)),
        "steps": scheduler.global_step,
        "uses": sorted(set(scheduler.catalog.uses.tolist())),
        "peak": max(rest.rates + first.rates),
    }


def losses(workers: int = 1) -> float:
    """Return the largest difference between reported losses and those computed one by one."""
    x, y = data()
    model, scheduler = model_for(0), scheduler_for(num_epochs=1, initial_lr=1e-12, min_lr=1e-12)
    model.layers[1].rate = 0.0
    fit(model, R8Dataset(scheduler, x, y, workers=workers))
    logits = keras.ops.convert_to_numpy(model(x)).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    expected = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(SAMPLES), y]
    return float(np.abs(scheduler.catalog.expected_loss - expected).max())


def faults(steps: Callable[[int], list[int]]) -> dict:
    x, y = data()
    watch = BackupWatch(steps, scheduler_for, num_epochs=16)

    def load(indices):
        factor = watch.factor() if dataset._running else 1.0  # Keras looks at a batch before training
        return x[indices] * np.float32(factor), y[indices]

    dataset = R8Dataset(watch.scheduler, load)
    fit(model_for(0), dataset)
    return watch.findings()


def diverged() -> str:
    try:
        faults(always)
    except TrainingDiverged as error:
        return str(error)
    return ""


def refusals() -> list[str]:
    x, y = data()
    found = []

    def attempt(function) -> None:
        try:
            function()
        except Exception as error:  # Keras refuses some itself, and TensorFlow wraps what its generators raise
            found.append(str(error))

    def start(model, **options) -> None:
        dataset = R8Dataset(scheduler_for(), x, y)
        model.fit(dataset, epochs=1, verbose=0, callbacks=[R8Callback(dataset)], **{"shuffle": False} | options)

    attempt(lambda: R8Dataset(scheduler_for(), x[:5], y))
    attempt(lambda: R8Dataset(scheduler_for(clip="auto"), x, y))
    attempt(lambda: R8Callback(x))
    attempt(lambda: start(model_for(0), shuffle=True))
    decayed = model_for(0)
    decayed.compile(
        keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 100)), "sparse_categorical_crossentropy"
    )
    attempt(lambda: start(decayed))
    several = model_for(0)
    several.steps_per_execution = 4
    attempt(lambda: start(several))
    spent = scheduler_for()
    dataset = R8Dataset(spent, x, y)
    model = model_for(0)
    fit(model, dataset)
    attempt(lambda: fit(model, dataset))
    return found


def saved() -> bool:
    """Save the model after training and load it: the callback leaves nothing in the file."""
    x, y = data()
    model = model_for(0)
    fit(model, R8Dataset(scheduler_for(num_epochs=1), x, y), validation_data=(x, y))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        model.save(path)
        loaded = keras.saving.load_model(path)
    return bool(np.array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0)))


def with_callbacks(model, dataset, callbacks, **options):
    return model.fit(dataset, shuffle=False, epochs=1000, verbose=0, callbacks=callbacks, **options)


def looked_at(drop_last: bool) -> dict:
    """Evaluate on the training data after training, as validation, and from a callback amid an epoch."""
    x, y = data()
    model, dataset = model_for(0), R8Dataset(scheduler_for(drop_last=drop_last), x, y)
    differences = []

    def compare() -> None:
        found, wanted = model.evaluate(dataset, verbose=0), model.evaluate(x, y, verbose=0)
        differences.append(float(np.abs(np.subtract(found, wanted)).max()))

    class Looks(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None) -> None:
            compare()

        def on_train_batch_end(self, batch, logs=None) -> None:
            if batch == 3 and keras.backend.backend() != "tensorflow":
                compare()

    history = with_callbacks(model, dataset, [R8Callback(dataset), Looks()], validation_data=dataset).history
    compare()
    predicted = model.predict(dataset, verbose=0)
    same = np.allclose(predicted, model.predict(x, verbose=0), atol=1e-5)
    last = abs(history["val_loss"][-1] - model.evaluate(x, y, verbose=0)[0])
    uses = sorted(set(dataset.scheduler.catalog.uses.tolist()))
    return {
        "difference": max(*differences, last),
        "predicted": bool(same),
        "steps": dataset.scheduler.global_step,
        "uses": uses,
    }


def failed_once(anew: bool) -> dict:
    """An exception leaves `fit`; it is called again, with the same dataset or a new one."""
    x, y = data()

    class Fails(keras.callbacks.Callback):
        count = 0

        def on_train_batch_begin(self, batch, logs=None) -> None:
            self.count += 1
            if self.count == 18:
                raise MemoryError

    model, scheduler = model_for(0), scheduler_for()
    dataset, fails = R8Dataset(scheduler, x, y), Fails()
    with contextlib.suppress(MemoryError):
        with_callbacks(model, dataset, [R8Callback(dataset), fails])
    left = scheduler.global_step
    dataset = R8Dataset(scheduler, x, y) if anew else dataset
    with_callbacks(model, dataset, [R8Callback(dataset), fails])
    return {"left": left, "steps": scheduler.global_step, "uses": sorted(set(scheduler.catalog.uses.tolist()))}


def rate_after_plateau() -> list[float]:
    x, y = data()
    scheduler = scheduler_for(scheduler_mode="constant", warmup_proportion=0.0)
    model, dataset = model_for(0), R8Dataset(scheduler, x, y)
    plateau = keras.callbacks.ReduceLROnPlateau(monitor="loss", factor=0.1, patience=0, min_delta=100)
    spy = Spy(dataset)
    with_callbacks(model, dataset, [spy, plateau])
    resumed = scheduler_for(scheduler_mode="constant", warmup_proportion=0.0, num_epochs=4)
    resumed.load_state_dict(scheduler.state_dict())
    again = R8Dataset(resumed, x, y)
    last = Spy(again)
    with_callbacks(model, again, [last])
    return [spy.rates[0], spy.rates[13], spy.rates[26], last.rates[-1]]


def class_weighted() -> list[float]:
    """The loss that is trained on, and what it should be; the largest error of a reported loss. At a rate near 0."""
    x, y = data()
    factors = {0: 1.0, 1: 10.0, 2: 0.5}
    scheduler = scheduler_for(num_epochs=1, initial_lr=1e-12)
    model = model_for(0)
    model.layers[1].rate = 0.0
    dataset = R8Dataset(scheduler, x, y, class_weight=factors)
    history = with_callbacks(model, dataset, [R8Callback(dataset)]).history
    logits = model.predict(x, verbose=0).astype(float)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(SAMPLES), y]
    weights = np.array([factors[int(one)] for one in y])
    reported = np.abs(scheduler.catalog.expected_loss - losses).max()
    return [history["loss"][-1], float((losses * weights).mean()), float(reported)]


def misuse() -> dict:
    x, y = data()
    refused = []

    def attempt(callbacks, with_ours=True, **options) -> None:
        dataset = R8Dataset(scheduler_for(), x, y)
        ours = [R8Callback(dataset)] if with_ours else []
        try:
            model_for(0).fit(dataset, verbose=0, callbacks=ours + callbacks, **{"shuffle": False} | options)
        except Exception as error:
            refused.append(str(error))

    attempt([], with_ours=False)
    attempt([], shuffle=True)
    attempt([], steps_per_epoch=2)
    attempt([], class_weight={0: 1.0})
    attempt([keras.callbacks.LearningRateScheduler(lambda epoch, lr: 1e-5)])
    attempt([keras.callbacks.BackupAndRestore(tempfile.mkdtemp())])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attempt([], epochs=2)
    return {
        "looked": [looked_at(drop_last) for drop_last in (False, True)],
        "failed": [failed_once(anew) for anew in (False, True)],
        "plateau": rate_after_plateau(),
        "class_weight": class_weighted(),
        "refused": refused,
        "told": [str(one.message) for one in caught if "fit(epochs=2)" in str(one.message)],
    }


def logged() -> dict:
    """Return what a logger that stands before R8Callback wrote, the history's names, and the progress bar's text."""
    x, y = data()
    dataset = R8Dataset(scheduler_for(), x, y)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as shown:
        path = Path(folder) / "log.csv"
        callbacks = [keras.callbacks.CSVLogger(path), R8Callback(dataset)]
        history = model_for(0).fit(dataset, shuffle=False, epochs=3, verbose=2, callbacks=callbacks)
        rows = list(csv.DictReader(path.open()))
    return {"rows": rows, "history": sorted(history.history), "shown": shown.getvalue()}


if __name__ == "__main__":
    wanted = {
        "logged": logged,
        "misuse": misuse,
        "resume": lambda: [resume(1)],
        "resume-threads": lambda: [resume(3)],
        "losses": lambda: [losses(1), losses(3)],
        "faults": lambda: [faults(random_steps(0))],
        "many-faults": lambda: [faults(random_steps(seed)) for seed in range(1, 4)],
        "diverged": diverged,
        "refusals": refusals,
        "saved": saved,
    }
    print(json.dumps({name: wanted[name]() for name in sys.argv[1:]}))
