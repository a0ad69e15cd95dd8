"""R8Scheduler in Keras 3, on any backend: three changed lines.

    data = R8Dataset(scheduler, x_train, y_train)                                    # 1
    model.fit(data, shuffle=False, epochs=1000, callbacks=[R8Callback(data)])        # 2, 3

The scheduler ends the run, so `epochs` is only an upper bound. `evaluate(data)` and `predict(data)` go over all samples
in order. `ReduceLROnPlateau` lowers the rest of the scheduler's learning rates. `logs["loss"]` of Keras is a running
mean; the callback lets `compute_loss` write the losses of each sample into a variable, and reads
it after each step. Importance weights of the strategy are the dataset's `sample_weight`.

Batches are drawn, losses reported and backups taken by the callback, between two steps, whatever
threads load the data. So a run does not depend on how fast they are.

To resume, keep `capture_state(model)` with the scheduler's checkpoint (in `save_callback`): it holds
the weights, the optimizer and the seeds of the random layers. A run that is resumed in the middle of
an epoch starts a whole Keras epoch of `len(data)` steps there; the scheduler's epochs run on within.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from weakref import WeakKeyDictionary

import keras
import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.config import Problems
from learnit_r8.errors import ConfigError, ProtocolError, tell
from learnit_r8.integrations.keras.host import Host, fit_problems, for_loggers, host
from learnit_r8.integrations.keras.losses import install as install_losses
from learnit_r8.integrations.keras.state import (
    capture_state,
    restore_state,
    set_torch_generators,
    to_numpy,
    torch_generators,
    training_generators,
)
from learnit_r8.scheduler import R8Scheduler
from learnit_r8.sinks.points import Numbers
from learnit_r8.types import Batch

__all__ = ["R8Callback", "R8Dataset", "capture_state", "restore_state"]

_Planned = tuple[Batch, Future[tuple[Any, ...]] | None]
"""A batch, and its data where a thread loads it."""


class R8Dataset(keras.utils.PyDataset):  # type: ignore[misc]
    """The scheduler's batches: `(x, y, weights)`, or `(x,)` without targets.

    Args:
        scheduler: Chooses the samples; on one process.
        x: Inputs, an array or a tree of arrays with one row per sample; or a function
            `indices -> (x, y)` that loads them (called from several threads if `workers` > 1).
        y: Targets, likewise, or None.
        class_weight: Factor of each class in the loss that is trained on, `{class: factor}`, for integer or one-hot
            targets; in place of `fit(class_weight=)`.
        workers: Threads that load data, two batches ahead each. They are the dataset's own: with
            those of Keras, batches that it fetched to learn their shapes come up again in training.

    Raises:
        ConfigError: Another number of samples, or several processes.
    """

    def __init__(
        self,
        scheduler: R8Scheduler,
        x: Any,
        y: Any = None,
        *,
        class_weight: Mapping[int, float] | None = None,
        workers: int = 1,
    ) -> None:
        super().__init__(workers=1, use_multiprocessing=False)
        self.scheduler = scheduler
        self._load: Callable[[NDArray[np.int64]], tuple[Any, ...]] = x if callable(x) else _rows_of(x, y)
        lengths = set() if callable(x) else {len(array) for array in keras.tree.flatten((x, y)) if array is not None}
        problems, samples = Problems(), scheduler.catalog.num_samples
        if not lengths <= {samples}:
            problems.append(f"x and y must have {samples} rows, the scheduler's num_samples, got {sorted(lengths)}")
        if scheduler.world_size > 1:
            problems.append(f"R8Dataset is for one process, the scheduler has world_size={scheduler.world_size}")
        problems.integer("workers", workers, 1)
        if scheduler.clips:
            problems.append(
                "clip=: Keras computes gradients and steps within one function, which JAX and TensorFlow compile: no "
                "norm leaves it: leave it out and give the optimizer's global_clipnorm"
            )
        problems.raise_if_any()
        self._class_weight = None if class_weight is None else dict(class_weight)
        self._testing = False
        self._loaders = workers
        self._pool: ThreadPoolExecutor | None = None
        self._ready = threading.Condition()
        self._plan: list[_Planned] = []  # of this Keras epoch: drawn so far
        self._reported = 0
        self._asked = 0
        self._running = False
        self._thread = 0
        self._epochs: Iterator[int] = iter(())
        self._batches: Iterator[Batch] | None = None
        # Batches that are out at once. TensorFlow and accelerators under JAX fetch one early.
        self._ahead = 2 * workers + 1 if workers > 1 else 1 if _strictly_in_step() else 2

    def __len__(self) -> int:
        """Return the batches of a full epoch."""
        return self.scheduler.steps_per_epoch

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """Return a batch of this epoch; where nothing is trained, of all samples in order."""
        asker = host()
        if asker is not None and asker.name == "fit" and not self._running:
            self._check(asker)
        looks = self._testing or (asker is not None and asker.name != "fit")
        planned = None if looks else self._find(int(index))
        if planned is None:
            size, last = self.scheduler.batch_size, index == len(self) - 1
            end = self.scheduler.catalog.num_samples if last else (index + 1) * size  # with drop_last, too
            indices = np.arange(index * size, end)
            return self._loaded(indices, np.ones(len(indices), np.float32))
        batch, data = planned
        return self._loaded(batch.indices, batch.weights) if data is None else data.result()

    def _loaded(self, indices: NDArray[np.int64], weights: NDArray[np.float32]) -> tuple[Any, ...]:
        loaded = self._load(indices)
        if len(loaded) != 2:
            return loaded
        if self._class_weight is not None:
            weights = weights * self._class_factors(np.asarray(loaded[1]))
        return (*loaded, weights)

    def _class_factors(self, y: NDArray[Any]) -> NDArray[np.float32]:
        assert self._class_weight is not None
        classes = y.argmax(axis=-1) if y.ndim > 1 and y.shape[-1] > 1 else y.reshape(len(y))
        return np.array([self._class_weight.get(int(one), 1.0) for one in classes], np.float32)

    def _check(self, fit: Host) -> None:
        problems = Problems(fit_problems(fit))
        if not any(isinstance(one, R8Callback) and one._dataset is self for one in fit.callbacks):
            problems.append(
                "nothing would report losses: give fit(..., callbacks=[R8Callback(data)]) with this R8Dataset"
            )
        problems.raise_if_any()

    def _find(self, index: int) -> _Planned | None:
        """Return a batch of the plan, None before and after training; TensorFlow's thread waits until it is drawn."""
        with self._ready:
            if not self._running:
                return None
            if index > self._asked:
                raise ConfigError("batches are asked for in a random order: give fit(..., shuffle=False)")
            self._asked = max(self._asked, index + 1)
            waits = threading.get_ident() != self._thread
            if waits:
                self._ready.wait_for(lambda: index < len(self._plan) or not self._running)
            if index < len(self._plan):
                return self._plan[index]
            if waits:  # the run ended meanwhile: what is fetched now is dropped
                return None
            raise ProtocolError(
                f"batch {index} of this epoch is asked for and {len(self._plan)} are drawn: losses are due, is "
                "R8Callback(dataset) among the callbacks of fit?"
            )

    # What the callback uses -----------------------------------------------------------------

    def start(self) -> None:
        """Begin a run, or go on in the middle of one; ProtocolError where its budget is spent."""
        if (former := _active.get(self.scheduler)) is not None:
            former.stop()  # after an exception Keras does not say that training ended
        _active[self.scheduler] = self
        if self._ahead > 1:
            self.scheduler.allow_lookahead(self._ahead)
        with self._ready:
            self._thread = threading.get_ident()
            self._running, self._testing, self._batches = True, False, None
            self._plan, self._reported, self._asked = [], 0, 0
        self._pool = ThreadPoolExecutor(self._loaders) if self._loaders > 1 else None
        self._epochs = self.scheduler.epoch_iterator()
        if next(self._epochs, None) is not None:
            self._batches = self.scheduler.batch_iterator()  # what was out when an earlier fit failed comes again
        if not self.draw():
            self.stop()
            raise ProtocolError("the scheduler's budget is spent: resume it with more epochs to train on")

    def start_epoch(self) -> None:
        """Number the batches from 0 again."""
        with self._ready:
            self._plan, self._reported, self._asked = self._plan[self._reported :], 0, 0
        self.draw()

    def draw(self) -> bool:
        """Draw as many batches as may be out; return whether any is."""
        while len(self._plan) - self._reported < self._ahead:
            batch = self._next_batch()
            if batch is None:
                break
            data = None if self._pool is None else self._pool.submit(self._loaded, batch.indices, batch.weights)
            with self._ready:
                self._plan.append((batch, data))
                self._ready.notify_all()
        return len(self._plan) > self._reported

    def _next_batch(self) -> Batch | None:
        while True:
            batch = None if self._batches is None else next(self._batches, None)
            if batch is not None:
                return batch
            # The losses of an epoch's last batches come before the next epoch.
            if self.scheduler.open_batches or next(self._epochs, None) is None:
                return None
            self._batches = self.scheduler.batch_iterator()

    @property
    def current(self) -> Batch:
        """The batch that is trained on."""
        return self._plan[self._reported][0]

    def report(self, losses: Any) -> None:
        """Report the current batch."""
        batch = self.current
        self._plan[self._reported] = batch, None  # its data may go
        self.scheduler.update_with_loss(losses, batch)
        self._reported += 1

    def stop(self) -> None:
        """Let waiting threads and signal handlers go."""
        with self._ready:
            self._running = self._testing = False
            self._ready.notify_all()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        for iterator in (self._batches, self._epochs):
            if isinstance(iterator, Generator):
                iterator.close()


_active: WeakKeyDictionary[R8Scheduler, R8Dataset] = WeakKeyDictionary()


class R8Callback(keras.callbacks.Callback):  # type: ignore[misc]
    """Reports losses, sets the learning rate, backs up and restores the model, ends the run.

    Args:
        dataset: The `R8Dataset` that `fit` gets.
        sample_loss: `(y, y_pred) -> losses [B]`, for models with several outputs and for losses
            given as something else than one name, function or `keras.losses.Loss`; without it the
            mean of each batch is reported there.
    """

    def __init__(self, dataset: R8Dataset, sample_loss: Callable[[Any, Any], Any] | None = None) -> None:
        super().__init__()
        if not isinstance(dataset, R8Dataset):
            raise ConfigError(f"dataset must be the R8Dataset that fit gets, got {type(dataset).__name__}")
        self._dataset = dataset
        self._sample_loss = sample_loss
        self._losses: Any = None
        self._rate: float | None = None  # as it was set last
        self._plateau = self._told = False
        self._numbers = Numbers(dataset.scheduler)

    def on_train_begin(self, logs: Any = None) -> None:
        """Check the model and start the run."""
        self._check()
        self._rate = None
        self._losses = install_losses(self.model, self._dataset.scheduler.batch_size, self._sample_loss)
        self._dataset.scheduler.attach_model(
            lambda: capture_state(self.model, copy=False), lambda state: restore_state(state, self.model)
        )
        self._dataset.start()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Draw the epoch's first batches."""
        self._heed_rate(at_epoch=True)
        self._dataset.start_epoch()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Give the scheduler's numbers, as `r8/...`, to the callbacks that log."""
        if logs is not None:
            logs.update(dict.fromkeys(Numbers.LATE, math.nan) | self._numbers.newest())

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Set the learning rate."""
        self._heed_rate(at_epoch=batch == 0)
        scheduler = self._dataset.scheduler
        self.model.optimizer.learning_rate = scheduler.lr_now()
        self._rate = self._present_rate()
        set_torch_generators(training_generators.get(self.model, []))

    def _heed_rate(self, *, at_epoch: bool) -> None:
        """Take up a rate that another callback has set, or say that it is overruled."""
        if self._rate is None or math.isclose(now := self._present_rate(), self._rate, rel_tol=1e-6):
            return
        before, self._rate = self._rate, now
        if self._plateau and at_epoch:
            self._dataset.scheduler.scale_lr(now / before, "ReduceLROnPlateau")
        elif not self._told:
            self._told = True
            tell(
                f"something else set the learning rate to {now:g}, R8Scheduler had set {before:g} and sets its own at "
                "every step: leave the other callback out"
            )

    def _present_rate(self) -> float:
        return float(to_numpy(self.model.optimizer._learning_rate, copy=False))

    def on_test_begin(self, logs: Any = None) -> None:
        """Let validation within `fit` see samples in order."""
        self._dataset._testing = True

    def on_test_end(self, logs: Any = None) -> None:
        """Training goes on."""
        self._dataset._testing = False

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Report the step's losses and draw the next batch.

        Raises:
            ConfigError: The model's own `train_step` leaves no loss to read.
        """
        if not self._losses.written:
            raise ConfigError("this model's train_step does not call compute_loss: no loss can be read")
        if hasattr(self.model, "jax_state_sync"):  # the JAX trainer keeps its variables to itself
            self.model.jax_state_sync()
        training_generators[self.model] = torch_generators()
        values = to_numpy(self._losses.values, copy=False)
        size = len(self._dataset.current.indices)
        self._dataset.report(values[:size] if self._losses.per_sample else float(values[-1]))
        if not self._dataset.draw():
            self.model.stop_training = True

    def on_train_end(self, logs: Any = None) -> None:
        """Release what the run held."""
        self._heed_rate(at_epoch=True)
        self._dataset.stop()
        training_generators.pop(self.model, None)

    def _check(self) -> None:
        problems = Problems()
        fit = host()
        if fit is not None:
            self._dataset._check(fit)
            for_loggers(fit, self)
            self._plateau = any(isinstance(one, keras.callbacks.ReduceLROnPlateau) for one in fit.callbacks)
        if (replicas := getattr(getattr(self.model, "distribute_strategy", None), "num_replicas_in_sync", 1)) > 1:
            problems.append(
                f"the model runs on {replicas} replicas (tf.distribute), each of which sees a part of a batch: their "
                "losses cannot be told apart, train on one device"
            )
        if keras.distribution.distribution() is not None:
            problems.append("keras.distribution shards the model, which backups would undo: train on one device")
        if (steps := self.model.steps_per_execution) > 1:
            problems.append(f"steps_per_execution={steps} hides the losses of all steps but the last: compile with 1")
        schedule = keras.optimizers.schedules.LearningRateSchedule
        if isinstance(getattr(self.model.optimizer, "_learning_rate", None), schedule):
            problems.append(
                "the optimizer has a LearningRateSchedule, and R8Scheduler sets the learning rate: give the optimizer "
                "a number"
            )
        problems.raise_if_any()
        scheduler, asked = self._dataset.scheduler, (self.params or {}).get("epochs")
        if asked is not None and scheduler.total_steps is not None:
            left = -(-scheduler.total_steps // scheduler.steps_per_epoch) - scheduler.current_epoch
            if asked < left:
                tell(
                    f"fit(epochs={asked}) ends the run before the scheduler does, which has {left} epochs left: the "
                    "learning rate stays where it is then; give epochs=1000, the scheduler ends the run"
                )


def _strictly_in_step() -> bool:
    """Whether the backend asks for a batch only when the one before it is done."""
    if keras.backend.backend() != "jax":
        return bool(keras.backend.backend() == "torch")
    import jax

    return bool(jax.default_backend() == "cpu")


def _rows_of(x: Any, y: Any) -> Callable[[NDArray[np.int64]], tuple[Any, ...]]:
    parts = (x,) if y is None else (x, y)
    return lambda indices: tuple(keras.tree.map_structure(lambda array: array[indices], part) for part in parts)
