"""One loss per sample out of a Keras model's training step, on any backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras


class SampleLosses(keras.metrics.Metric):  # type: ignore[misc]
    """One loss per sample, and the step's loss last. A metric: its state is no weight, so it is not saved."""

    def __init__(self, size: int) -> None:
        super().__init__(name="r8_sample_losses", dtype="float32")
        self.size = size
        self.values = self.add_variable((size + 1,), "zeros", name="values")
        self.written = self.per_sample = False

    def write(self, losses: Any, total: Any) -> None:
        """Keep the losses of each sample, where there are any, and the step's."""
        self.written, self.per_sample, ops = True, losses is not None, keras.ops
        total = ops.reshape(ops.cast(total, "float32"), (1,))
        losses = total if losses is None else losses
        # A shorter batch is filled up, without asking for its size, which a graph may not know.
        filled = ops.concatenate([ops.cast(losses, "float32"), ops.zeros((self.size,), "float32")])[: self.size]
        self.values.assign(ops.stop_gradient(ops.concatenate([filled, total])))

    def update_state(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `compute_loss` writes."""

    def reset_state(self) -> None:
        """Do nothing: what is written is read in the same step."""

    def result(self) -> dict[str, Any]:
        """Return nothing for the logs."""
        return {}


def install(model: Any, size: int, sample_loss: Callable[[Any, Any], Any] | None) -> SampleLosses:
    """Let the model's `compute_loss` write into a variable, once per model."""
    for metric in model._metrics:
        if isinstance(metric, SampleLosses) and metric.size == size:
            return metric
    losses = SampleLosses(size)
    # Not by attribute: a built model refuses new state there, and would save it.
    model._metrics.append(losses)
    original = model.compute_loss

    def compute_loss(
        x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        total = original(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)
        if training:
            function = sample_loss or _per_sample(model.loss, y, y_pred)
            losses.write(None if function is None else _one_per_sample(function(y, y_pred)), total)
        return total

    model.compute_loss = compute_loss
    model.make_train_function(force=True)  # it may be compiled without
    return losses


def _per_sample(loss: Any, y: Any, y_pred: Any) -> Callable[[Any, Any], Any] | None:
    """Return the compiled loss without its reduction; None where there is not just one."""
    if loss is None or y is None or isinstance(loss, (dict, list, tuple)) or isinstance(y_pred, (dict, list, tuple)):
        return None
    function = keras.losses.get(loss)
    unreduced: Callable[[Any, Any], Any] = function.call if isinstance(function, keras.losses.Loss) else function
    return unreduced


def _one_per_sample(values: Any) -> Any:
    axes = tuple(range(1, len(values.shape)))
    return keras.ops.mean(values, axis=axes) if axes else values
