"""Step -> learning rate: pure functions, composed, without state.

A schedule is `factor = schedule(t, total)`; `learning_rate` turns the factor into

    lr = min_lr + (peak - min_lr) * factor.

`t` is the step from 0, `total` the budget in steps. Both may be fractional: a wall-clock budget
is counted in virtual steps, an epoch that shrinks in `progress * total`; keep `total` fixed then,
for the length of warm-up is rounded to whole steps of it. Past the end the last value is kept.

With `W = round(warmup_proportion * total)`, `e = t - W`, `n = total - W` and `p = e / n`
(progress after warm-up), the factor is `(t + 1) / W` for `t < W`, afterwards:

====================  ===========================================  =====================================
name                  factor after warm-up                         agrees with
====================  ===========================================  =====================================
constant              1, from step 0: no warm-up                   transformers
constant_with_warmup  1                                            transformers
linear                1 - p                                        transformers, torch LinearLR
polynomial            (1 - p)^power, power 1                       transformers, torch PolynomialLR
cosine                (1 + cos(pi p)) / 2                          transformers, torch CosineAnnealingLR
cosine_with_min_lr    the same; the floor is the run's `min_lr`    transformers
cosine_with_restarts  (1 + cos(pi (cycles p mod 1))) / 2,          transformers, torch
                      cycles 1                                     CosineAnnealingWarmRestarts
inverse_sqrt          (1 + e / (W or 10000))^-1/2                  transformers
warmup_stable_decay   1 until p = 0.8, then half a cosine to 0     transformers, n / 5 decay steps
one_cycle             1/25 up to 1 and down to 1/250000, by half   torch OneCycleLR with
                      cosines; the rise takes the place of warm-up `pct_start=warmup_proportion`
====================  ===========================================  =====================================

Parameters have the defaults of `transformers.get_scheduler`, so "cosine_with_restarts" has one
cycle. For other values pass a shape as the run's function of progress: `restarts(4)`,
`polynomial(2)`, `stable_then_decay(0.1)`.

Differences from transformers 5 and torch 2, on purpose:

* Warm-up starts at `1 / W` and reaches the peak at step `W - 1`; theirs starts at 0 and reaches it
  at `W`, which wastes step 0. From step `W` on the values are the same.
* `min_lr` is the floor of every schedule, as torch's `eta_min`, and of warm-up, which in
  transformers rises from 0 even in "cosine_with_min_lr". Without `min_lr` the two agree.
* The floor of "polynomial" is `min_lr`, not transformers' `lr_end=1e-7`.
* Past the end transformers' cosine rises again.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from typing import Any

from learnit_r8.core.config import Problems
from learnit_r8.errors import ConfigError

Schedule = Callable[[float, float], float]
"""(step t, total steps) -> factor in [0, 1]."""

Shape = Callable[[float], float]
"""Progress in [0, 1] -> factor in [0, 1]."""

# A cool-down of about a fifth matches cosine in Hägele et al. 2024, "Scaling laws and compute-optimal
# training beyond fixed training durations". transformers has no default.
DECAY_SHARE = 0.2
# torch.optim.lr_scheduler.OneCycleLR: div_factor and div_factor * final_div_factor.
ONE_CYCLE_START = 1 / 25.0
ONE_CYCLE_END = ONE_CYCLE_START / 1e4
# transformers.get_inverse_sqrt_schedule without warm-up.
INVERSE_SQRT_TIMESCALE = 10_000


def learning_rate(factor: float, peak: float, min_lr: float = 0.0) -> float:
    """Return `min_lr + (peak - min_lr) * factor`, kept in [min_lr, peak] against rounding."""
    return min(peak, max(min_lr, min_lr + (peak - min_lr) * factor))


def half_cosine(progress: float) -> float:
    """Fall from 1 to 0 along half a cosine (Loshchilov and Hutter 2017, "SGDR", equation 5)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def polynomial(power: float = 1.0) -> Shape:
    """Return `(1 - progress)^power`, power > 0."""
    _require(power > 0, f"power must be above 0, got {power!r}")
    return lambda progress: (1.0 - progress) ** power


def restarts(cycles: int) -> Shape:
    """Return `cycles` half cosines of equal length, each starting at 1 (SGDR, equation 5)."""
    _require(cycles >= 1, f"cycles must be at least 1, got {cycles!r}")
    return lambda progress: half_cosine((cycles * progress) % 1.0) if progress < 1.0 else 0.0


def stable_then_decay(decay_share: float = DECAY_SHARE) -> Shape:
    """Return 1, and half a cosine over the last `decay_share`, in (0, 1], of progress.

    Source: Hu et al. 2024, "MiniCPM" (warmup-stable-decay), with transformers' cosine.
    """
    _require(0 < decay_share <= 1, f"decay_share must be in (0, 1], got {decay_share!r}")
    return lambda progress: half_cosine(max(0.0, (progress - 1.0 + decay_share) / decay_share))


def with_warmup(warmup_proportion: float, shape: Shape) -> Schedule:
    """Return linear warm-up followed by `shape` over the steps that remain.

    Args:
        warmup_proportion: Share of the total, in [0, 1].
        shape: Factor as a function of progress after warm-up.
    """
    return _with_warmup(warmup_proportion, lambda elapsed, n, _: shape(elapsed / n if n > 0 else 1.0))


def constant() -> Schedule:
    """Return 1 at every step."""
    return lambda t, total: 1.0


def inverse_sqrt(warmup_proportion: float) -> Schedule:
    """Return warm-up, then decay with the square root of steps (Zhai et al. 2022, "Scaling vision transformers").

    Unlike the others it depends on how many steps there are, not on progress alone.
    """
    return _with_warmup(
        warmup_proportion,
        lambda elapsed, _, warmup: 1.0 / math.sqrt(1.0 + elapsed / (warmup or INVERSE_SQRT_TIMESCALE)),
    )


def one_cycle(warmup_proportion: float) -> Schedule:
    """Return the one-cycle policy; unlike the others it ends at step `total - 1`, as torch's does.

    Source: Smith and Topin 2018, "Super-convergence"; phases as in `torch.optim.lr_scheduler.OneCycleLR`.
    """

    def schedule(t: float, total: float) -> float:
        top, end = warmup_proportion * total - 1.0, total - 1.0
        if t < top:
            return 1.0 + (ONE_CYCLE_START - 1.0) * half_cosine(max(t, 0.0) / top)
        progress = min(1.0, (t - top) / (end - top)) if end > top else float(t > top)
        return ONE_CYCLE_END + (1.0 - ONE_CYCLE_END) * half_cosine(progress)

    return schedule


_BY_NAME: dict[str, Callable[[float], Schedule]] = {
    "constant": lambda _: constant(),
    "constant_with_warmup": lambda warmup: with_warmup(warmup, lambda _: 1.0),
    "cosine": lambda warmup: with_warmup(warmup, half_cosine),
    "cosine_with_min_lr": lambda warmup: with_warmup(warmup, half_cosine),
    "cosine_with_restarts": lambda warmup: with_warmup(warmup, restarts(1)),
    "inverse_sqrt": inverse_sqrt,
    "linear": lambda warmup: with_warmup(warmup, polynomial()),
    "one_cycle": one_cycle,
    "polynomial": lambda warmup: with_warmup(warmup, polynomial()),
    "warmup_stable_decay": lambda warmup: with_warmup(warmup, stable_then_decay()),
}


def schedule_names() -> list[str]:
    """Return the names that `make_schedule` takes, sorted."""
    return sorted(_BY_NAME)


def make_schedule(mode: str | Shape, warmup_proportion: float) -> Schedule:
    """Return the schedule of that name, or one with the user's shape.

    Args:
        mode: A name of the table above, or a pure function of progress: of the whole run when
            `warmup_proportion` is 0, otherwise of what follows warm-up. Its value is clipped to
            [0, 1], so that the learning rate stays within [min_lr, peak]. It is called once here,
            at progress 0, so that a wrong signature is found before training.
        warmup_proportion: Share of the run for linear warm-up, in [0, 1].

    Raises:
        ConfigError: Unknown name (the message names the nearest), a mode that is neither a string
            nor a function, a function that does not give a finite number (also from the returned
            schedule, while training), or a bad proportion.
    """
    problems = Problems(_mode_problems(mode))
    problems.real("warmup_proportion", warmup_proportion, 0.0, 1.0)
    problems.raise_if_any()
    if isinstance(mode, str):
        return _BY_NAME[_plain(mode)](float(warmup_proportion))
    return with_warmup(float(warmup_proportion), _checked(mode))


def _with_warmup(warmup_proportion: float, decay: Callable[[float, float, int], float]) -> Schedule:
    """Warm-up, then `decay(steps since, steps that follow warm-up, warm-up steps)`."""

    def schedule(t: float, total: float) -> float:
        warmup, t = round(warmup_proportion * total), max(t, 0.0)
        if t < min(warmup, total):
            return min(1.0, (t + 1.0) / warmup)
        remaining = max(0.0, total - warmup)
        return decay(min(max(t - warmup, 0.0), remaining), remaining, warmup)

    return schedule


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ConfigError([problem])


def _checked(shape: Shape) -> Shape:
    def checked(progress: float) -> float:
        value = shape(progress)
        number = _finite(value)
        if number is None:
            wanted = "scheduler_mode must give a finite number, a factor in [0, 1]"
            raise ConfigError([f"{wanted}; at progress {progress} it gave {value!r}"])
        return min(1.0, max(0.0, number))

    return checked


def _finite(value: Any) -> float | None:
    """The value as a float; None for text, what is no number, NaN and infinity."""
    if isinstance(value, (str, bytes)):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _mode_problems(mode: Any) -> list[str]:
    expected = f"scheduler_mode must be one of {', '.join(schedule_names())}, or a function of progress in [0, 1]"
    if isinstance(mode, str):
        name = _plain(mode)
        near = difflib.get_close_matches(name.lower().replace("-", "_").replace(" ", "_"), _BY_NAME, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        if "plateau" in name.lower():
            hint = "; to follow a metric give learnit_r8.schedules.plateau()"
        return [] if name in _BY_NAME else [f"{expected}, got {name!r}{hint}"]
    if not callable(mode):
        return [f"{expected}, got {mode!r}"]
    try:
        _checked(mode)(0.0)
    except ConfigError as error:
        return list(error.problems)
    except Exception as error:
        return [
            "scheduler_mode must be a function of one number, progress in [0, 1]; "
            f"at progress 0.0 it raised {type(error).__name__}: {error}"
        ]
    return []


def _plain(name: str) -> str:
    # A member of transformers' SchedulerType is a str that hashes by its enum name, not by its value.
    return str.__str__(name)
