"""Traces of 50 seeded runs: ids, rates, weights and events, hashed, so that two versions can be compared to the bit.

    python -m benchmarks.traces before.json          write the hashes of this version
    python -m benchmarks.traces --compare before.json    and say where they differ now

A run trains a softmax regression in numpy; nothing that is hashed depends on the clock. The
stand-alone samplers and the replay buffers are traced by themselves, with a copy or a saved state
taken half-way. Hashes are for one machine and one numpy: another one rounds otherwise.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import io
import json
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from learnit_r8 import R8Scheduler, strategies
from learnit_r8.replay import HybridSRLReplayBuffer, NStep, PrioritizedReplayBuffer

SAMPLES, CLASSES, FEATURES = 230, 4, 6
_CLOCKED = {"time", "seconds", "step_seconds", "r8_seconds", "elapsed", "pid", "run", "version", "path", "config"}
"""Fields of events that depend on the clock, the process or the folder."""

Part = Callable[["Trace"], None]


class Trace:
    """What is hashed, by kind."""

    def __init__(self) -> None:
        self._hashes: dict[str, Any] = {}

    def add(self, kind: str, *values: Any) -> None:
        """Hash values: arrays by dtype, shape and bytes, all else by its text."""
        digest = self._hashes.setdefault(kind, hashlib.sha256())
        for value in values:
            if isinstance(value, np.ndarray):
                digest.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
            else:
                digest.update(repr(value).encode())

    def add_tree(self, kind: str, tree: Any) -> None:
        """Hash a nested state."""
        if isinstance(tree, dict):
            for key in sorted(tree, key=str):
                if key != "version":
                    self.add(kind, key)
                    self.add_tree(kind, tree[key])
        elif isinstance(tree, (list, tuple)):
            self.add(kind, len(tree))
            for item in tree:
                self.add_tree(kind, item)
        else:
            self.add(kind, np.asarray(tree) if isinstance(tree, np.ndarray) else tree)

    def digests(self) -> dict[str, str]:
        """Return the first 16 digits of each hash."""
        return {kind: digest.hexdigest()[:16] for kind, digest in sorted(self._hashes.items())}


class _Heard:
    """A sink that hashes all events but what the clock decides."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def record(self, event: Any) -> None:
        facts = {f.name: getattr(event, f.name) for f in dataclasses.fields(event) if f.name not in _CLOCKED}
        if type(event).__name__ not in ("BackupTaken", "CheckpointSaved", "CheckpointLoaded", "MadeWith"):
            facts.pop("bytes", None)
            self._trace.add("events", type(event).__name__, facts)


class _Model:
    """Softmax regression on noisy clusters."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.labels = rng.integers(CLASSES, size=SAMPLES)
        centres = rng.normal(size=(CLASSES, FEATURES)) * 2
        self.inputs = centres[self.labels] + rng.normal(size=(SAMPLES, FEATURES))
        wrong = rng.random(SAMPLES) < 0.08
        self.labels[wrong] = rng.integers(CLASSES, size=int(wrong.sum()))
        self.weights = np.zeros((FEATURES, CLASSES))

    def step(self, ids: Any, lr: float, sample_weights: Any) -> Any:
        x, y = self.inputs[ids], self.labels[ids]
        scores = x @ self.weights
        scores -= scores.max(axis=1, keepdims=True)
        p = np.exp(scores)
        p /= p.sum(axis=1, keepdims=True)
        losses = -np.log(np.maximum(p[np.arange(len(y)), y], 1e-12))
        p[np.arange(len(y)), y] -= 1
        self.weights -= lr * x.T @ (p * sample_weights[:, None]) / len(y)
        return losses


def _scheduler(model: _Model, heard: _Heard, seed: int, options: dict[str, Any]) -> R8Scheduler:
    given = dict(options)
    given.pop("fault", None)
    given.pop("report", None)
    given["strategy"] = copy.deepcopy(given.get("strategy", "quadrant"))
    if given.pop("classes", False):
        given["groups"] = model.labels

    def load(state: Any) -> None:
        model.weights = state["weights"].copy()

    return R8Scheduler(
        SAMPLES,
        given.pop("batch_size", 16),
        num_epochs=given.pop("num_epochs", 12),
        initial_lr=0.5,
        seed=seed,
        ui="off",
        checkpoint_dir=None,
        state_callback=lambda: {"weights": model.weights},
        load_callback=load,
        backup_every=8,
        sinks=[heard],
        **given,
    )


def _run(trace: Trace, seed: int, options: dict[str, Any]) -> None:
    """Train once; at a fault of "resume" go on in another scheduler from the pickled state."""
    model, heard, fault = _Model(seed), _Heard(trace), options.get("fault")
    scheduler = _scheduler(model, heard, seed, options)
    calls = 0

    def train() -> Iterator[int]:
        nonlocal calls
        for _ in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                trace.add("ids", batch.indices)
                trace.add("rates", batch.lr)
                trace.add("weights", np.asarray(batch.weights))
                losses = model.step(batch.indices, batch.lr, np.asarray(batch.weights, np.float64))
                calls += 1
                if fault == "nan" and calls in (40, 90):
                    losses[1] = np.nan
                elif fault == "spike" and 60 <= calls < 63:
                    model.weights = -9 * model.weights
                    losses = losses * 50 + 30
                whole = options.get("report") == "batch"
                result = scheduler.update_with_loss(float(losses.mean()) if whole else losses)
                trace.add("results", tuple(result))
                yield calls

    for call in train():
        if fault == "resume" and call == 77:
            state = pickle.loads(pickle.dumps(scheduler.state_dict()))
            scheduler.close()
            scheduler = _scheduler(model, heard, seed, options)
            scheduler.load_state_dict(state)
            for _ in train():
                pass
            break
    scheduler.close()
    catalog = scheduler.catalog
    trace.add("catalog", catalog.expected_loss, catalog.uses, catalog.quadrants(), catalog.suspects(9))
    trace.add_tree("state", {k: v for k, v in scheduler.state_dict().items() if k not in ("budget", "config")})
    trace.add("model", model.weights)


def _runs() -> Iterator[tuple[str, Part]]:
    choices: dict[str, Any] = {name: name for name in strategies.names()}
    choices |= {
        "quadrant target_loss": strategies.Quadrant(target_loss=True),
        "competence": strategies.Curriculum("competence_based", debias=True),
        "reward ranks": strategies.RewardWeighted(use_rank=True, temperature=0.5),
        "infobatch normalized": strategies.InfoBatch(ratio=0.7, normalize=True),
        "spaced 9": strategies.SpacedRepetition(spacing_steps=9, patience=5),
    }
    for number, (name, strategy) in enumerate(choices.items()):
        for fault in ("none", "resume", "nan" if number % 2 else "spike"):
            options: dict[str, Any] = {"strategy": strategy, "fault": fault}
            yield f"{name}, {fault}", lambda trace, o=options, s=number: _run(trace, s, o)  # type: ignore[misc]
    others: dict[str, dict[str, Any]] = {
        "batch losses": {"report": "batch", "num_epochs": 20},
        "batch losses, resume": {"report": "batch", "fault": "resume"},
        "batch losses, prioritized": {"report": "batch", "strategy": "prioritized", "fault": "nan"},
        "guard caps": {"noise_guard": "cap", "num_epochs": 40, "classes": True},
        "guard caps, prioritized": {"noise_guard": "cap", "num_epochs": 40, "strategy": "prioritized"},
        "guard caps, resume": {"noise_guard": "cap", "num_epochs": 20, "strategy": "adaptive", "fault": "resume"},
        "drop_last": {"drop_last": True, "batch_size": 32, "scheduler_mode": "linear"},
        "replayed": {"rollback_data": "replay", "fault": "spike"},
    }
    for number, (name, options) in enumerate(others.items()):
        yield name, lambda trace, o=options, s=100 + number: _run(trace, s, o)  # type: ignore[misc]


# Without a scheduler ------------------------------------------------------------------------


def _copied(thing: Any, how: str) -> Any:
    """Return a copy that must go on like the original."""
    if how == "deepcopy":
        return copy.deepcopy(thing)
    return pickle.loads(pickle.dumps(thing))


def _samplers(trace: Trace, how: str) -> None:
    rng = np.random.default_rng(5)
    adaptive = strategies.AdaptiveBatchSampler(90, seed=3)
    reward = strategies.RewardWeightedSampler(rng.normal(size=90), use_rank=how == "deepcopy", seed=4)
    spaced = strategies.SpacedRepetitionSampler(range(90), num_steps=300, batch_size=8, spacing_steps=4, patience=9)
    keyed = strategies.CurriculumScheduler("competence_based", steer=True, seed=6)
    batches = iter(spaced)
    for step in range(300):
        ids, weights = adaptive.sample(8)
        trace.add("adaptive", ids, weights)
        adaptive.update_weights(ids, rng.exponential(size=8))
        trace.add("reward", *reward.sample(n=7))
        batch = next(batches)
        trace.add("spaced", batch)
        if step % 7:
            spaced.update_difficulties(rng.exponential(size=8), batch)
        for key in rng.integers(60, size=40).tolist():
            keyed.update((key, "k") if key % 5 == 0 else key, float(rng.random() < key / 60))
        item, number = keyed.sample_item(step, 300), keyed.sample_bin(step, 300)
        trace.add("keyed", item, number, keyed.get_item_bin(3), keyed.metrics_dict())
        if step == 150:
            if how == "state":
                for made in (adaptive, reward, spaced, keyed):
                    made.load_state_dict(json.loads(json.dumps(made.state_dict())))
            else:
                adaptive, reward, spaced, keyed = (_copied(made, how) for made in (adaptive, reward, spaced, keyed))
            batches = iter(spaced)
    for made in (adaptive, reward, spaced, keyed):
        trace.add_tree("states", made.state_dict())


def _prioritized(trace: Trace, how: str, **options: Any) -> None:
    rng = np.random.default_rng(8)
    buffer = PrioritizedReplayBuffer(150, beta_steps=100, seed=2, **options)
    for step in range(300):
        for _ in range(3):
            buffer.add((np.float32(step), 1.0 * step, float(rng.normal()), 2.0, bool(rng.random() < 0.1)))
        items, weights, ids = buffer.sample(16)
        trace.add("draws", weights, np.asarray(ids))
        trace.add_tree("items", items)
        buffer.update_priorities(ids, rng.standard_cauchy(16))
        if step == 150:
            buffer = _restored(buffer, PrioritizedReplayBuffer(150, beta_steps=100, **options), how)
    trace.add_tree("state", buffer.state_dict())


def _restored(buffer: Any, other: Any, how: str) -> Any:
    if how != "state":
        return _copied(buffer, how)
    with io.BytesIO() as file:
        pickle.dump(buffer.state_dict(), file)
        other.load_state_dict(pickle.loads(file.getvalue()))
    return other


def _hybrid(trace: Trace, how: str, **options: Any) -> None:
    rng = np.random.default_rng(9)
    buffer = HybridSRLReplayBuffer(60, seed=3, **options)
    for step in range(300):
        buffer.add({"n": step}, rng.normal(size=5), variance=float(rng.random()), step=step)
        due = buffer.get_due_samples(step, 6)
        trace.add("due", *((item.serial, item.slot, item.easiness, item.interval) for item in due))
        buffer.update_after_replay(due, rng.random(len(due)), step)
        if step == 150:
            buffer = _restored(buffer, HybridSRLReplayBuffer(60, **options), how)
    trace.add("diversities", buffer.diversities())
    trace.add_tree("state", buffer.state_dict())


def _parts() -> Iterator[tuple[str, Part]]:
    for how in ("state", "pickle", "deepcopy"):
        yield f"samplers, {how}", lambda trace, h=how: _samplers(trace, h)  # type: ignore[misc]
        kinds: tuple[dict[str, Any], ...] = (
            {},
            {"variant": "rank", "storage": "arrays"},
            {"normalize": "mean", "n_step": NStep(3)},
        )
        for number, kind in enumerate(kinds):
            name = f"prioritized replay {number}, {how}"
            yield name, lambda trace, h=how, k=kind: _prioritized(trace, h, **k)  # type: ignore[misc]
        for eviction in ("fifo", "mastered", "reservoir"):
            more = {"eviction": eviction, "epsilon": 0.2, "uncertainty": 0.5 * (eviction == "mastered")}
            yield f"hybrid replay {eviction}, {how}", lambda trace, h=how, m=more: _hybrid(trace, h, **m)  # type: ignore[misc]


def trace_all() -> dict[str, dict[str, str]]:
    """Return the hashes of all runs and parts by name."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, part in (*_runs(), *_parts()):
            trace = Trace()
            part(trace)
            found[name] = trace.digests()
    return found


def main() -> int:
    """Write the hashes, or compare them; the exit status is 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--compare", action="store_true", help="compare with the file, write nothing")
    args = parser.parse_args()
    now = trace_all()
    if not args.compare:
        args.file.write_text(json.dumps(now, indent=1))
        print(f"{len(now)} traces written to {args.file}")
        return 0
    before = json.loads(args.file.read_text())
    different = [
        f"{name}: {', '.join(kind for kind, digest in kinds.items() if now.get(name, {}).get(kind) != digest)}"
        for name, kinds in before.items()
        if now.get(name) != kinds
    ]
    print(f"{len(before) - len(different)} of {len(before)} traces are equal", *different, sep="\n")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
