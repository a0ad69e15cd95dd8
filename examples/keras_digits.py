"""Keras on scikit-learn's digits, on any backend: the three changed lines are marked.

python -m pip install "learnit_r8[keras,jax,example]" && KERAS_BACKEND=jax python examples/keras_digits.py
"""

from __future__ import annotations

import keras
from sklearn.datasets import load_digits

from learnit_r8 import R8Scheduler
from learnit_r8.integrations.keras import R8Callback, R8Dataset


def main() -> None:
    keras.utils.set_random_seed(0)
    digits = load_digits()
    x, y = (digits.data / 16).astype("float32"), digits.target
    layers = [keras.layers.Dense(128, activation="relu"), keras.layers.Dense(10)]
    model = keras.Sequential([keras.Input((64,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer="adam", loss=loss, metrics=["accuracy"])

    scheduler = R8Scheduler(1500, 32, num_epochs=5, initial_lr=3e-3, drop_last=True, ui="off")  # 1
    data = R8Dataset(scheduler, x[:1500], y[:1500])  # 2
    model.fit(data, shuffle=False, epochs=1000, callbacks=[R8Callback(data)], verbose=0)  # 3

    _, accuracy = model.evaluate(x[1500:], y[1500:], verbose=0)
    print(f"accuracy {accuracy:.3f} after {scheduler.global_step} steps on {keras.backend.backend()}")
    print("most suspicious training images:", scheduler.catalog.suspects(5).tolist())


if __name__ == "__main__":
    main()
