"""Copies and saved states of every stateful class go on exactly as the original, or refuse with a sentence."""

import copy
import importlib
import inspect
import io
import itertools
import json
import math
import pickle
import re
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch

from learnit_r8 import R8Scheduler
from learnit_r8.checkpoint import CheckpointStore
from learnit_r8.core.portable import portable, unpacked
from learnit_r8.core.rng import Purpose, RandomStreams
from learnit_r8.core.state import Saved
from learnit_r8.errors import CheckpointError
from learnit_r8.integrations.distributed import FromRank0
from learnit_r8.integrations.torch import R8BatchSampler, TensorState, follow_lr
from learnit_r8.noise.guard import NoiseGuard
from learnit_r8.prompts import PromptScheduler
from learnit_r8.replay import HybridSRLReplayBuffer, NStep, PrioritizedReplayBuffer
from learnit_r8.samples.catalog import LossCatalog
from learnit_r8.schedules.range_test import LrFinder
from learnit_r8.schedules.reduction import Reduction, plateau
from learnit_r8.sinks import JsonlSink
from learnit_r8.stability.detector import Detector
from learnit_r8.strategies import (
    AdaptiveBatchSampler,
    Balanced,
    CurriculumScheduler,
    ExponentialMovingStats,
    Mixture,
    Prompts,
    RewardWeightedSampler,
    SpacedRepetitionSampler,
    TokenBudget,
    Weighted,
    names,
)
from learnit_r8.strategies import make as named
from learnit_r8.streams import StreamSelector
from learnit_r8.structures.sum_tree import SumTree
from learnit_r8.testing.states import equal
from learnit_r8.testing.strategies import _Run

STEPS = 1000


def torch_saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)  # with its defaults: weights_only=True


def torch_object(original):
    file = io.BytesIO()
    torch.save(original, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def in_memory_of_others(original):
    """Ray, joblib and dask hand arrays over in memory that they share, and that nobody may write into."""
    pieces = []
    text = pickle.dumps(original, 5, buffer_callback=pieces.append)
    return pickle.loads(text, buffers=[bytes(piece) for piece in pieces])


COPIES = {
    "pickle": lambda original: pickle.loads(pickle.dumps(original)),
    "out of band": in_memory_of_others,
    "deepcopy": copy.deepcopy,
    "torch.save": torch_object,
}


def transition(rng, k, arrays):
    observation = rng.normal(size=3).astype(np.float32) if arrays else [k]
    return observation, int(rng.integers(4)), float(k), observation, k % 17 == 16


def prioritized(**options):
    arrays = options.get("storage") == "arrays"

    def advance(buffer, k):
        rng = np.random.default_rng(k)
        buffer.add(transition(rng, k, arrays))
        if not len(buffer):
            return None
        experiences, weights, indices = buffer.sample(8)
        buffer.update_priorities(indices, rng.normal(size=8) * (1e3 if k == 70 else 1.0))
        return experiences, weights, np.asarray(indices), buffer.priorities

    return lambda: PrioritizedReplayBuffer(60, **options), advance


def hybrid(**options):
    def advance(buffer, k):
        rng = np.random.default_rng(k)
        buffer.add(("x", k), rng.normal(size=4), float(rng.random()), step=k)
        items = buffer.get_due_samples(k + 3, 5)
        buffer.update_after_replay(items, rng.random(len(items)), k + 3)
        buffer.flush()
        return [(item.experience, item.easiness, item.interval, item.embedding) for item in items]

    return lambda: HybridSRLReplayBuffer(40, epsilon=0.1, uncertainty=0.5, **options), advance


def weighted(make):
    def advance(sampler, k):
        indices, weights = sampler.sample(5)
        if hasattr(sampler, "update_weights"):
            sampler.update_weights(indices, np.sin(indices + k))
        return indices, weights

    return make, advance


def spaced():
    def advance(holder, k):
        sampler, passes = holder
        if passes is None or k % 50 == 0:
            passes = holder[1] = iter(sampler)
        batch = next(passes)
        sampler.update_difficulties(np.cos(np.array(batch) + k))
        return batch, sampler.difficulties.copy()

    return lambda: [SpacedRepetitionSampler(range(90), num_steps=50, batch_size=4, spacing_steps=2), None], advance


def curriculum():
    def advance(scheduler, k):
        scheduler.update(k * 7919 % 130, (k * 31 % 7) / 7)
        scheduler.update(("pair", k % 5), float(k % 3 == 0))
        return scheduler.sample_item(k, STEPS), scheduler.bin_probabilities(k, STEPS), scheduler.metrics_dict()

    return lambda: CurriculumScheduler("competence_based", steer=True), advance


def moving_stats():
    def advance(stats, k):
        stats.update(np.sin(k))
        return stats.mean, stats.std

    return ExponentialMovingStats, advance


def prompts():
    def advance(prompts, k):
        keys = prompts.draw(4)
        for key in keys[: 1 + k % 4]:
            prompts.update(key, np.sin(np.arange(8) * k + key) > 0)
        return keys, prompts.metrics_dict()

    return lambda: PromptScheduler(range(60)), advance


class Numbers:
    """A stream that can say where it is."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.at = (self.at + 1) % 141
        if not self.at:
            raise StopIteration
        return self.at

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def chosen_from_a_stream():
    def advance(stream, k):
        batch = next(stream, None) or next(stream)  # a pass ends, the next one begins
        stream.update(np.sin(np.array(batch.items) + k))
        return batch.items, batch.keys, stream.metrics_dict()

    return lambda: StreamSelector(Numbers(), 4, 12, key=str), advance


def n_step():
    return lambda: NStep(3, 0.9), lambda steps, k: steps.push((k, 0, 1.0 * k, k + 1, k % 7 == 6))


def tree(size):
    def advance(tree, k):
        rng = np.random.default_rng(k)
        tree.set(rng.integers(size, size=9), rng.random(9))
        return tree.draw(np.sort(rng.random(7))), tree.total, tree.view.copy()

    return lambda: SumTree(size), advance


def streams():
    return lambda: RandomStreams(5), lambda streams, k: streams.at(Purpose.BATCH, 0, k).random(3)


GIVEN = {
    "weighted": lambda: Weighted(1 + np.sin(np.arange(120))),
    "balanced": lambda: Balanced(np.arange(120) % 7),
    "mixture": lambda: Mixture({"a": range(20), "b": range(20, 120)}, adapt="loss"),
    "tokens": lambda: TokenBudget(1 + np.arange(120) % 9, 40),
    "prompts": lambda: Prompts(reward_range=(-60.0, 0.0)),
}
"""Strategies that have no name, since they need to be told something."""


def strategy(name):
    """A strategy inside its scheduler; the scheduler gets a copy at the cut."""

    def make():
        chosen = GIVEN[name]() if name in GIVEN else name
        scheduler = R8Scheduler(120, 6, num_epochs=60, strategy=chosen, ui="off", checkpoint_dir=None)
        return [scheduler, loop(scheduler)]

    def advance(holder, k):
        return next(holder[1])

    return make, advance


def loop(scheduler):
    for _ in scheduler.epoch_iterator():
        for batch in scheduler.batch_iterator():
            losses = np.abs(np.sin(batch.indices + scheduler.global_step)) + batch.indices % 5
            scheduler.update_with_loss(losses)
            yield batch.indices, batch.weights, batch.lr, scheduler.catalog.expected_loss.copy()


def driven(name):
    """A strategy with the catalog it looks at, driven without a scheduler."""

    def make():
        return _Run(
            FromRank0("quadrant") if name == "rank 0" else GIVEN[name]() if name in GIVEN else named(name), 120, 6
        )

    def advance(run, k):
        draw = run.advance()
        return draw.indices, draw.probabilities, draw.weights, run.catalog.expected_loss

    return make, advance


def noise_guard():
    def advance(both, k):
        guard, catalog = both["guard"], both["catalog"]
        left_out = guard.start_epoch(k / 1200, np.random.default_rng(k))
        drawn = np.flatnonzero(np.ones(60, bool) if left_out is None else ~left_out)
        losses = np.where(drawn < 12, 5.0, 2.3 if k == 0 else 0.3) + np.sin(drawn + k) / 9
        catalog.record(catalog.look_up(drawn), losses.astype(np.float32), k)
        report = guard.end_epoch(catalog, (k + 1) / 1200)
        return left_out, report and (report.indices, report.losses, report.decision, report.reason), guard.flagged

    return lambda: {"guard": NoiseGuard("cap", 60), "catalog": LossCatalog(60)}, advance


def detector():
    def advance(detector, k):
        loss = 2.0 + math.sin(k * k) / 9 + 30.0 * (k % 97 == 96)
        return tuple(detector.observe(k, loss, samples=np.arange(4) + loss))

    return Detector, advance


def range_test():
    return lambda: LrFinder(1200), lambda finder, k: (finder.next_lr(), finder.record(2.0 + np.cos(k) / 9))


def reduction():
    def advance(reduction, k):
        return reduction.observe(1.0 + 1.0 / (1 + k % 90), 0.1), reduction.scale, reduction.best

    return lambda: Reduction(plateau("loss", patience=3, cooldown=2)), advance


SUBJECTS = {
    "prioritized": prioritized(),
    "prioritized, arrays, rank, n-step": prioritized(storage="arrays", variant="rank", n_step=NStep(3), beta_steps=300),
    "prioritized, numpy": prioritized(storage="arrays", fast=False),
    "hybrid": hybrid(),
    "hybrid, mastered": hybrid(eviction="mastered"),
    "hybrid, reservoir, asynchronous": hybrid(eviction="reservoir", asynchronous=True),
    "adaptive": weighted(lambda: AdaptiveBatchSampler(70)),
    "reward": weighted(lambda: RewardWeightedSampler(np.sin(np.arange(70.0)))),
    "spaced": spaced(),
    "curriculum": curriculum(),
    "moving stats": moving_stats(),
    "prompts": prompts(),
    "stream": chosen_from_a_stream(),
    "n-step": n_step(),
    "sum tree, small": tree(200),
    "sum tree, large": tree(9000),
    "streams": streams(),
    "noise guard": noise_guard(),
    "detector": detector(),
    "range test": range_test(),
    "plateau": reduction(),
    **{f"strategy {name}": driven(name) for name in [*names(), *GIVEN, "rank 0"]},
}
ONE_BY_ONE = [name for name in SUBJECTS if not name.startswith("strategy")]


@pytest.fixture
def group_of_one(request):
    """What FromRank0 asks; only for it, since others look whether there is one."""
    if request.node.callspec.params["name"] != "strategy rank 0":
        yield
        return
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_copy_goes_on_exactly_as_the_original_for_a_thousand_operations(name):
    make, advance = SUBJECTS[name]
    for cut in (0, 1, 150) if name in ONE_BY_ONE else (150,):
        original = make()
        for k in range(cut):
            advance(original, k)
        doubles = {how: copied(original, way) for how, way in COPIES.items()}
        for how, double in doubles.items():
            assert shared(original) == shared(double), f"what is a view of what, {how}"
        for k in range(cut, cut + (STEPS if cut > 1 else 100)):
            expected = advance(original, k)
            for how, double in doubles.items():
                assert equal(expected, advance(double, k)), f"operation {k} after a copy by {how} at {cut}"


class Slotted(AdaptiveBatchSampler):
    __slots__ = ("own",)

    def __init__(self):
        super().__init__(30)
        self.own = "own"


@pytest.mark.parametrize("how", COPIES)
def test_copies_keep_what_a_subclass_has_in_slots(how):
    assert COPIES[how](Slotted()).own == "own"


@pytest.mark.parametrize("name", [name for name in ONE_BY_ONE if isinstance(SUBJECTS[name][0](), Saved)])
def test_a_plain_copy_leaves_the_original_alone(name):
    make, advance = SUBJECTS[name]
    originals = [make(), make()]
    for original in originals:
        for k in range(60):
            advance(original, k)
    double = copy.copy(originals[0])
    for k in range(60, 90):
        advance(double, 500 + k)
    for k in range(60, 90):
        assert equal(*(advance(original, k) for original in originals))


def copied(original, how):
    if isinstance(original, list):  # a sampler and its pass: the copy begins the rest of the pass
        sampler, passes = original
        if passes is None:
            return [how(sampler), None]
        double = how(sampler)
        return [double, iter(double)]
    return how(original)


@pytest.mark.parametrize("name", [name for name in ONE_BY_ONE if hasattr(SUBJECTS[name][0](), "state_dict")])
def test_a_state_goes_through_torch_load_with_its_defaults_and_goes_on(name):
    make, advance = SUBJECTS[name]
    original = make()
    for k in range(150):
        advance(original, k)
    restored = make()
    restored.load_state_dict(torch_saved(original.state_dict()))
    for k in range(150, 400):
        assert equal(advance(original, k), advance(restored, k))


@pytest.mark.parametrize("name", ["adaptive", "reward", "curriculum", "moving stats", "n-step", "spaced"])
def test_the_states_of_small_samplers_are_json(name):
    make, advance = SUBJECTS[name]
    original, restored = make(), make()
    for k in range(130):
        advance(original, k)
    both = (original[0], restored[0]) if isinstance(original, list) else (original, restored)
    both[1].load_state_dict(json.loads(json.dumps(both[0].state_dict(), allow_nan=False)))
    if isinstance(restored, list):
        restored[1] = iter(restored[0])
    for k in range(130, 400):
        assert equal(plain(advance(original, k)), plain(advance(restored, k)))


def plain(value):
    return list(map(plain, value)) if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("name", [*names(), *GIVEN])
def test_a_scheduler_with_any_strategy_goes_on_from_what_torch_load_returns(name):
    make, advance = strategy(name)
    original, restored = make(), make()
    for k in range(250):
        advance(original, k)
    state = torch_saved(original[0].state_dict())
    restored[0].load_state_dict(state)
    restored[1] = loop(restored[0])
    for k in range(250, 400):
        assert equal(advance(original, k), advance(restored, k))
    own = original[0].strategy
    if hasattr(own, "state_dict"):
        copy.deepcopy(own).load_state_dict(torch_saved(own.state_dict()))


def test_what_cannot_be_copied_says_so(tmp_path):
    scheduler = R8Scheduler(10, 2, num_epochs=1, ui="off", checkpoint_dir=None)
    for how in COPIES.values():
        for one in (scheduler, R8BatchSampler(scheduler), TensorState(scheduler)):
            with pytest.raises(TypeError, match="save state_dict"):
                how(one)
        with pytest.raises(TypeError, match=r"cannot be copied: save\(\) it"):
            how(PrioritizedReplayBuffer(4, storage="arrays", path=tmp_path))
        with pytest.raises(TypeError, match="make one for each"):
            how(JsonlSink(tmp_path / "events.jsonl"))
        with pytest.raises(TypeError, match="make another one of the same folder"):
            how(CheckpointStore(tmp_path / "saved"))
        with pytest.raises(TypeError, match="call follow_lr"):
            how(follow_lr(scheduler, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)))


FRAMEWORKS = "learnit_r8.integrations.(huggingface|lightning|keras|jax|verl)"
HOLD_A_SCHEDULER = {"R8Scheduler", "ShardedScheduler", "R8BatchSampler", "TensorState"}


def public():
    """Yield every class that the site describes; what frameworks call holds a scheduler."""
    for page in (Path(__file__).parents[2] / "docs" / "api").glob("*.md"):
        for entry in re.findall(r"^::: ([\w.]+)", page.read_text("utf8"), re.MULTILINE):
            home, _, name = entry.rpartition(".")
            if re.match(FRAMEWORKS, entry):
                continue
            if name[0].islower():
                module = importlib.import_module(entry)
                yield from (getattr(module, one) for one in getattr(module, "__all__", []))
            else:
                yield getattr(importlib.import_module(home), name)


def test_every_public_stateful_class_is_among_those_that_are_tried():
    tried = {type(part) for make, _ in SUBJECTS.values() for part in parts_of(make())}
    stateful = {one for one in public() if inspect.isclass(one) and hasattr(one, "load_state_dict")}
    assert {R8Scheduler, PrioritizedReplayBuffer, NoiseGuard, FromRank0} <= stateful
    untried = {one.__name__ for one in stateful - tried if not issubclass(one, torch.nn.Module)}
    assert untried - HOLD_A_SCHEDULER == set()


def parts_of(made):
    if isinstance(made, _Run):
        return [made.rules, made.rules.strategy, made.catalog]
    return list(made.values()) if isinstance(made, dict) else made if isinstance(made, list) else [made]


def arrays_of(owner, path="", seen=None):
    """Return all arrays that an object of ours holds, by the way to them."""
    seen = {} if seen is None else seen
    if id(owner) in seen:
        return {}
    seen[id(owner)] = owner
    if isinstance(owner, np.ndarray):
        return {path: owner} if owner.size else {}
    if isinstance(owner, dict):
        parts = owner.items()
    elif isinstance(owner, (list, tuple, deque)):
        parts = enumerate(owner)
    elif type(owner).__module__.startswith("learnit_r8"):
        slots = [
            name for kind in type(owner).__mro__ for name in getattr(kind, "__slots__", ()) if hasattr(owner, name)
        ]
        parts = [*getattr(owner, "__dict__", {}).items(), *((name, getattr(owner, name)) for name in slots)]
    else:
        return {}
    return {key: value for name, part in parts for key, value in arrays_of(part, f"{path}.{name}", seen).items()}


def shared(owner):
    """Return which of its arrays share memory."""
    arrays = arrays_of(owner)
    return {pair for pair in itertools.combinations(arrays, 2) if np.shares_memory(*map(arrays.get, pair))}


def test_arrays_stay_arrays_until_they_are_pickled_and_come_back_exactly():
    values = [
        np.arange(6, dtype=np.int16).reshape(2, 3)[:, ::2],
        np.array(np.nan),
        np.zeros((0, 4), np.float32),
        np.array(["ab", "c"]),
        np.array(["2026-01-01"], "M8[s]"),
        np.array([1.0, 2.0], ">f8"),
        np.array([True]),
    ]
    state = portable({"deep": [tuple(values)], "scalar": np.float32(0.1), "text": "x"})
    assert all(isinstance(value, np.ndarray) for value in state["deep"][0])
    for saved in (state, pickle.loads(pickle.dumps(state)), torch_saved(state), copy.deepcopy(state)):
        back = unpacked(saved)
        for before, after in zip(values, back["deep"][0], strict=True):
            assert type(after) is np.ndarray
            assert (after.dtype, after.shape) == (before.dtype, before.shape)
            np.testing.assert_array_equal(after, before)
        assert type(back["scalar"]) is np.float32
        assert back["scalar"] == np.float32(0.1)
    with pytest.raises(CheckpointError, match="an array cannot be read"):
        unpacked({"x": {"$array": ["<f8", [3], "AAAA"]}})
    untouched = (1, [2], "x")
    assert portable([untouched])[0][1] == [2]
