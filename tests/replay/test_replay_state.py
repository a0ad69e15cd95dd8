"""Replay buffers that are saved, killed, damaged, used from many threads, and given what does not fit."""

import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter, namedtuple

import numpy as np
import pytest
import torch

from learnit_r8.errors import CheckpointCorrupt, CheckpointError, ConfigError
from learnit_r8.replay import HybridSRLReplayBuffer, NStep, PrioritizedReplayBuffer
from learnit_r8.testing.states import equal

ROWS = np.arange(12.0)


def filled(capacity=8, count=6, **options):
    buffer = PrioritizedReplayBuffer(capacity, **options)
    for k in range(count):
        buffer.add(row(k))
    if held := len(buffer):
        buffer.update_priorities(np.arange(held), ROWS[:held] + 0.1)
    return buffer


def row(k):
    return np.full(2, k, np.float32), k, 0.5 * k, np.full(2, k + 1, np.float32), k % 4 == 3


def hybrid(count=6):
    buffer = HybridSRLReplayBuffer(8)
    for k in range(count):
        buffer.add(("x", k), [float(k), 1.0], 0.1)
    buffer.update_after_replay(buffer.get_due_samples(1, 3), [1.0, 0.2, 1.0], 1)
    return buffer


def contents(buffer):
    return buffer.state_dict()


# What a new experience weighs -------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["proportional", "rank"])
def test_the_share_of_draws_a_lap_after_an_outlier_is_what_the_priorities_say(variant):
    def shares(spike):
        buffer = PrioritizedReplayBuffer(1000, variant=variant)
        rng, newest = np.random.default_rng(0), []
        for k in range(3000):
            buffer.add(k)
            _, _, indices = buffer.sample(32)
            errors = rng.uniform(0.05, 0.15, 32)
            if k == 500:
                errors[0] = spike
            buffer.update_priorities(indices, errors)
            if k >= 1500:
                newest.append(((buffer.added - 1 - indices) % 1000 < 20).mean())
        p = buffer.priorities
        drawn = np.bincount(np.concatenate([buffer.sample(1000)[2] for _ in range(300)]), minlength=1000)
        heavy = p > np.quantile(p, 0.9)
        assert drawn[heavy].sum() / drawn.sum() == pytest.approx(p[heavy].sum() / p.sum(), rel=0.02)
        return np.mean(newest)

    assert shares(1e6) == pytest.approx(shares(0.1), rel=0.1)


def test_a_first_priority_is_on_the_scale_of_the_errors_and_falls_with_them():
    buffer = PrioritizedReplayBuffer(80, alpha=1.0, eps=0.0)
    buffer.extend(range(40))
    assert set(buffer.priorities) == {1.0}
    buffer.update_priorities(np.arange(4), [1e-3, 2e-3, 1e-3, 1e-3])
    assert buffer.priorities[4:].tolist() == [2e-3] * 36, "those that nobody has judged yet are alike"
    buffer.add("new")
    assert buffer.priorities[40] == 2e-3
    buffer.update_priorities([5], [7.0])
    buffer.add("newer")
    assert buffer.priorities[41] == 7.0
    for _ in range(23):
        buffer.update_priorities(np.arange(4), [1e-3] * 4)
    assert buffer.priorities[[5, 40, 41]].tolist() == [7.0, 1e-3, 1e-3], "7 is an error; 41 was given it as the largest"
    buffer.add("newest")
    assert buffer.priorities[42] == 1e-3


def test_indices_know_when_they_were_drawn_however_many_batches_are_in_flight():
    buffer = filled(4, 4, alpha=1.0, eps=0.0)
    first = buffer.sample(40)[2]
    buffer.add(row(9))  # replaces slot 0
    second = buffer.sample(40)[2]
    before = buffer.priorities[0]
    assert buffer.update_priorities(first, np.full(40, 5.0)) == (first != 0).sum()
    assert buffer.priorities[0] == before, "that error was the old experience's"
    assert buffer.update_priorities(second[10:30], np.full(20, 6.0)) == 20
    assert set(buffer.priorities[np.unique(second[10:30])]) == {6.0}


# Threads ----------------------------------------------------------------------------------------


def race(buffer, seconds, learners=3):
    stop, problems, rows = threading.Event(), Counter(), Counter()

    def watched(work):
        def run():
            k = 0
            while not stop.is_set():
                try:
                    work(k)
                except Exception as error:
                    problems[f"{type(error).__name__}: {error}"] += 1
                k += 1

        return run

    def act(k):
        buffer.add((np.full(64, k, np.float32), np.full(64, k, np.float32)))

    def learn(k):
        (states, others), weights, indices = buffer.sample(32)
        rows["all"] += 32
        rows["torn"] += int((states != states[:, :1]).any() or (others != states).any())
        rows["bad weights"] += int(not np.isfinite(weights).all())
        buffer.update_priorities(indices, np.random.default_rng(k).normal(size=32))

    act(0)
    threads = [threading.Thread(target=watched(work)) for work in (act, *[learn] * learners)]
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        stop.set()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    return rows, problems


@pytest.mark.parametrize("seconds", [1.5, pytest.param(60.0, marks=pytest.mark.slow)])
def test_one_actor_and_three_learners_tear_no_row_and_the_total_stays_exact(seconds):
    buffer = PrioritizedReplayBuffer(700, storage="arrays")
    rows, problems = race(buffer, seconds)
    assert not problems
    assert rows["all"] > 1000
    assert (rows["torn"], rows["bad weights"]) == (0, 0)
    rebuilt = PrioritizedReplayBuffer(700, storage="arrays")
    rebuilt.load_state_dict(buffer.state_dict())
    assert rebuilt._tree.total == buffer._tree.total, "the sums are those of the weights, to the bit"


# Processes --------------------------------------------------------------------------------------


def in_a_fork(work):
    """Return what `work` returned or raised in a forked child, and what it warned of."""
    mine, childs = multiprocessing.Pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, from Python 3.12 on
        child = os.fork()
    if child == 0:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                came = work()
            except Exception as error:
                came = f"{type(error).__name__}: {error}"
            childs.send((came, [str(one.message) for one in told]))
        os._exit(0)
    if not mine.poll(30):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return mine.recv()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_told_that_its_buffer_is_a_copy_and_never_hangs(tmp_path):
    buffer, reviews = filled(), HybridSRLReplayBuffer(8, asynchronous=True)
    reviews.add("x", [1.0])
    reviews.update_after_replay(reviews.get_due_samples(1, 1), [1.0], 1)
    reviews.flush()  # its thread lives, here
    drawn, told = in_a_fork(lambda: [buffer.sample(4)[2].tolist() for _ in range(2)])
    assert drawn == [buffer.sample(4)[2].tolist() for _ in range(2)], "the very draws that the original makes"
    assert len(told) == 1
    assert "copy of the replay buffer that goes its own way" in told[0]

    def review():
        reviews.update_after_replay(reviews.get_due_samples(9, 1), [1.0], 9)
        reviews.flush()
        return reviews.get_due_samples(99, 1)[0].last_review

    assert in_a_fork(review)[0] == 9
    mapped = filled(storage="arrays", path=tmp_path)
    before = contents(mapped)
    assert "both would write into the same files" in in_a_fork(lambda: mapped.add(row(1)))[0]
    assert len(in_a_fork(lambda: mapped.sample(3)[1])[0]) == 3, "reading is harmless"
    np.testing.assert_equal(contents(mapped)["experiences"], before["experiences"])
    grandchild = in_a_fork(lambda: in_a_fork(lambda: len(buffer.sample(5)[1])))
    assert grandchild[0][0] == 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_copy_that_was_forked_amid_a_change_is_refused():
    buffer, held, done = filled(), threading.Event(), threading.Event()

    def change():
        with buffer._lock:
            held.set()
            done.wait(30)

    other = threading.Thread(target=change)
    other.start()
    held.wait(30)
    came, _ = in_a_fork(lambda: buffer.sample(4))
    done.set()
    other.join()
    assert came.startswith("ProtocolError: this process was forked while another thread was changing")
    assert len(buffer.sample(4)[1]) == 4, "the original goes on"


def test_indices_that_went_to_another_process_still_know_when_they_were_drawn():
    buffer = filled(4, 4, alpha=1.0, eps=0.0)
    first = pickle.loads(pickle.dumps(buffer.sample(40)[2]))
    buffer.add(row(9))  # replaces slot 0
    buffer.sample(40)
    before = buffer.priorities[0]
    assert buffer.update_priorities(first, np.full(40, 5.0)) == (first != 0).sum()
    assert buffer.priorities[0] == before, "that error was the old experience's"


# What does not fit ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("hi", "what is 17 * 23?"),
        (b"ab", b"abcdef"),
        (b"ab", "ab"),
        ("ab", 3.0),
        (np.int8(1), np.int64(300)),
        (np.int32(1), 2**40),
        (np.uint8(1), np.int64(-1)),
        (np.float32(1), np.float64(1e300)),
        (np.float16(1), np.float32(1e5)),
        (1.0, 2**53 + 1),
        (np.float32(1), np.int32(2**24 + 1)),
        (np.datetime64("2026-01-01"), np.datetime64("2026-01-01T12:00")),
        (np.int64(3), np.timedelta64(3, "s")),
        (np.uint8([1, 2]), np.array([1.5, 2.0])),
    ],
)
def test_what_an_array_would_cut_is_refused(first, second):
    buffer = PrioritizedReplayBuffer(4, storage="arrays")
    buffer.add({"x": first})
    before = contents(buffer)
    with pytest.raises(ValueError, match="leaf 0"):
        buffer.add({"x": second})
    assert equal(contents(buffer), before)


@pytest.mark.parametrize("value", [b"ab\0\0", "a\0", None, [1, "a", None]])
def test_what_an_array_would_change_is_refused_from_the_first_on(value):
    buffer = PrioritizedReplayBuffer(4, storage="arrays")
    if value == [1, "a", None]:
        value = {"x": np.array(value, object)}
    with pytest.raises(ValueError, match="storage="):
        buffer.add(value)
    assert len(buffer) == 0
    buffer.add(1.0)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (np.float32(1), 0.1),
        (np.float64(1), 2**53),
        (np.int32(1), 7),
        ("what?", "hi"),
        (np.float32(1), np.float64(np.inf)),
        (np.float32(1), np.float64(np.nan)),
        (np.datetime64("2026-01-01"), np.datetime64("NaT")),
        (np.int16(1), True),
    ],
)
def test_what_fits_is_taken(first, second):
    buffer = PrioritizedReplayBuffer(4, storage="arrays")
    buffer.extend([first])
    buffer.add(second)
    held = buffer._storage.read(np.array([1]))[0]
    assert held == np.asarray(second).astype(np.asarray(first).dtype) or held != held


# n-step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["objects", "arrays"])
@pytest.mark.parametrize(
    "bad", [("broken",), (1, 0, None, 2, False), (1, 0, "1", 2, False), (1, 0, 1.0, 2, np.ones(2))]
)
def test_a_bad_step_is_refused_at_once_and_forgotten(storage, bad):
    buffer, twin = (PrioritizedReplayBuffer(9, n_step=NStep(3), storage=storage) for _ in range(2))
    for k in range(7):
        if k in (0, 1, 5):
            with pytest.raises(ValueError, match="reward at 2"):
                buffer.add(bad)
            with pytest.raises(ValueError, match="reward at 2"):
                buffer.extend([(9, 0, 1.0, 9, False), bad])
            with pytest.raises(ValueError, match="finite"):
                buffer.add((k, 0, 1.0, k + 1, True), priority=np.nan)
        for one in (buffer, twin):
            one.add((k, 0, 1.0, k + 1, k == 4))
    assert equal(contents(buffer), contents(twin))


def test_a_step_that_does_not_fit_the_others_is_refused_before_it_is_part_of_any():
    buffer = PrioritizedReplayBuffer(9, n_step=NStep(3), storage="arrays")
    buffer.add((np.zeros(2), 0, 1.0, np.zeros(2), False))
    with pytest.raises(ValueError, match="equal shapes"):
        buffer.add((np.zeros(3), 0, 1.0, np.zeros(2), False))
    with pytest.raises(ValueError, match="built alike"):
        buffer.add((np.zeros(2), 0, 1.0, np.zeros(2), False, "more"))
    for _ in range(4):
        buffer.add((np.zeros(2), 0, 1.0, np.zeros(2), False))
    with pytest.raises(ValueError, match="leaf 0"):
        buffer.add((np.zeros(3), 0, 1.0, np.zeros(2), False))
    assert (len(buffer), len(buffer._n_step.pending)) == (3, 2)
    named = PrioritizedReplayBuffer(4, n_step=NStep(2, reward="r", next_state="s", done="d"))
    with pytest.raises(ValueError, match='"discount" of its own'):
        named.add({"r": 1.0, "s": 0, "d": False, "discount": 1.0})


@pytest.mark.parametrize("kind", [np.zeros, torch.zeros], ids=["numpy", "torch"])
def test_what_is_pending_is_a_copy_since_environments_write_into_their_arrays(kind):
    buffer, state = PrioritizedReplayBuffer(9, n_step=NStep(3, 1.0), storage="arrays"), kind(2)
    for _ in range(6):
        buffer.add((state, 0, 1.0, state, False))
        state += 1
    assert [row[0] for row in buffer._storage.read(np.arange(4))[0].tolist()] == [0.0, 1.0, 2.0, 3.0]


def test_fields_are_counted_from_the_end_too_and_no_two_buffers_share_what_is_pending():
    steps = NStep(2, 0.5, reward=-3, next_state=-2, done=-1)
    one, other = (PrioritizedReplayBuffer(4, n_step=steps) for _ in range(2))
    one.add((0, 1.0, 1, False))
    other.add((9, 9.0, 9, False))
    one.add((1, 2.0, 2, False))
    assert one.sample(1)[0] == [(0, 2.0, 2, False, 0.25)]


# States -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [filled, lambda: filled(storage="arrays", variant="rank", n_step=NStep(2)), hybrid])
def test_a_damaged_state_is_refused_and_changes_nothing(make):
    target = make()
    before = contents(target)

    def damaged(tree, path=()):
        """Yield the state without each of its entries, and with nonsense in its place."""
        for key in tree:
            if key != "next_row":
                yield {name: value for name, value in tree.items() if name != key}
            if isinstance(tree[key], dict):
                yield from ({**tree, key: worse} for worse in damaged(tree[key]))
            elif isinstance(tree[key], np.ndarray) and key != "order":  # it may be of any length
                yield {**tree, key: tree[key][:-1] if tree[key].size else np.zeros(3)}
            elif key not in ("tensors", "next_row"):  # not of use here
                yield {**tree, key: object()}

    states = list(damaged(make().state_dict()))
    assert len(states) > 20
    for state in [*states, None, [], {}, {**make().state_dict(), "version": 2}]:
        with pytest.raises(CheckpointError):
            target.load_state_dict(state)
        assert equal(contents(target), before)
    priorities = make().state_dict()
    if "priorities" in priorities:
        priorities["priorities"][0] = np.nan
        with pytest.raises(CheckpointError, match="damaged"):
            target.load_state_dict(priorities)
        assert equal(contents(target), before)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"alpha": 0.0}, "alpha"),
        ({"eps": 0.1}, "eps"),
        ({"variant": "rank"}, "variant"),
        ({"storage": "arrays"}, "storage"),
        ({"capacity": 9}, "capacity"),
        ({"n_step": NStep(2)}, "n_step"),
    ],
)
def test_a_state_of_a_buffer_made_otherwise_is_refused_by_name(options, word):
    other = filled(**options)
    before = contents(other)
    with pytest.raises(CheckpointError, match=rf"state is of a buffer with \{{'{word}'"):
        other.load_state_dict(filled().state_dict())
    assert equal(contents(other), before)
    with pytest.raises(CheckpointError, match=r"'gamma': 0\.5"):
        filled(n_step=NStep(2, 0.9)).load_state_dict(filled(n_step=NStep(2, 0.5)).state_dict())


def test_a_state_without_its_experiences_is_taken_only_where_they_are():
    for storage in ("objects", "arrays"):
        buffer = filled(storage=storage)
        state = buffer.state_dict(experiences=False)
        with pytest.raises(CheckpointError, match="without its experiences"):
            filled(count=0, storage=storage).load_state_dict(state)
        buffer.update_priorities([0], [9.0])
        buffer.load_state_dict(state)
        assert buffer.priorities[0] < 1.0


def test_memory_mapped_files_are_never_wiped_and_tell_when_they_went_on(tmp_path):
    buffer = filled(path=tmp_path, storage="arrays")
    light, whole = buffer.state_dict(experiences=False), buffer.state_dict()
    kept = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    rival = PrioritizedReplayBuffer(8, storage="arrays", path=tmp_path)
    with pytest.raises(ConfigError, match=r"000\.npy exists"):
        rival.add(row(0))
    assert kept == {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    rival.load_state_dict(light)
    assert equal(rival.sample(9), buffer.sample(9))
    buffer.add(row(77))
    with pytest.warns(RuntimeWarning, match="overwritten after this state was saved"):
        rival.load_state_dict(light)
    again = PrioritizedReplayBuffer(8, storage="arrays", path=tmp_path)
    again.load_state_dict(whole)
    assert equal(again.state_dict(), whole)
    with pytest.raises(ConfigError, match="numpy arrays only"):
        PrioritizedReplayBuffer(8, storage="arrays", path=tmp_path / "new").add((np.zeros(2), torch.zeros(2)))
    assert list((tmp_path / "new").iterdir()) == [], "what was begun is removed"


# Files ------------------------------------------------------------------------------------------

Step = namedtuple("Step", "state reward")


def test_a_buffer_in_a_file_goes_on_exactly(tmp_path):
    path = tmp_path / "deep" / "er" / "replay.bin"
    for make in (
        filled,
        hybrid,
        lambda: filled(storage="arrays", n_step=NStep(2)),
        lambda: filled(storage="arrays", path=tmp_path / "mapped"),
        lambda: HybridSRLReplayBuffer(3),
        lambda: filled(count=0),
    ):
        buffer = make()
        buffer.save(path)
        target = type(buffer).__new__(type(buffer))
        target = hybrid(3) if isinstance(buffer, HybridSRLReplayBuffer) and len(buffer) else None
        if target is None:
            target = make() if not len(buffer) else filled(8, 3, **options_of(buffer, tmp_path))
        target.load(path)
        assert equal(contents(target), contents(buffer))
        assert [file.name for file in path.parent.iterdir()] == [path.name]


def options_of(buffer, folder):
    storage = buffer._kind["storage"]
    mapped = storage == "arrays" and buffer._storage._path is not None
    return {"storage": storage, "n_step": buffer._n_step, "path": folder / "other" if mapped else None}


def test_objects_come_back_as_what_they_were_or_are_refused_by_name(tmp_path):
    path = tmp_path / "replay"
    held = [
        {"text": "a\0", "raw": b"\0\xff\0", "none": None, "deep": [1, (2.5, True)], "nan": float("inf")},
        (np.float32(0.1), np.arange(3, dtype=np.uint8), torch.arange(3, dtype=torch.bfloat16), -(2**70)),
    ]
    buffer = PrioritizedReplayBuffer(4)
    buffer.extend(held)
    buffer.save(path)
    restored = PrioritizedReplayBuffer(4)
    restored.load(path)
    first, second = restored._storage.read(np.arange(2))
    assert first == held[0]
    assert type(second[0]) is np.float32
    assert second[1].flags.writeable
    assert second[2].dtype == torch.bfloat16
    assert second[3] == held[1][3]
    for bad, word in ((object(), "object"), (Step(1, 2), "Step"), ({1: 2}, "keys are str")):
        before = path.read_bytes()
        buffer = PrioritizedReplayBuffer(4)
        buffer.extend([*held, bad])
        with pytest.raises(CheckpointError, match=word):
            buffer.save(path)
        assert path.read_bytes() == before, "the older one is as it was"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_files_of_other_things_and_damaged_ones_are_refused(tmp_path):
    path = tmp_path / "replay"
    buffer = filled()
    buffer.save(path)
    whole = path.read_bytes()
    target = filled(count=2)
    before = contents(target)
    with pytest.raises(FileNotFoundError):
        target.load(tmp_path / "none")
    with pytest.raises(CheckpointError, match="HybridSRLReplayBuffer"):
        hybrid().load(path)
    rng = random.Random(0)
    for _ in range(150):
        raw = bytearray(whole)
        if rng.random() < 0.5:
            del raw[rng.randrange(len(raw)) :]
        else:
            raw[rng.randrange(len(raw) - 48)] ^= 1 << rng.randrange(8)
        path.write_bytes(raw)
        with pytest.raises(CheckpointCorrupt):
            target.load(path)
    assert equal(contents(target), before)


WRITER = """
import sys
import numpy as np
from learnit_r8.replay import PrioritizedReplayBuffer
path, size, first = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
buffer = PrioritizedReplayBuffer(size, storage="arrays", fast=False)
buffer.extend((np.zeros((size, 4), np.float32), np.zeros(size, np.int64)), stacked=True)
for k in range(first, first + 1000):
    buffer.extend((np.full((size, 4), k, np.float32), np.full(size, k)), stacked=True)
    print("begin", k, flush=True)
    buffer.save(path)
    print("saved", k, flush=True)
"""


@pytest.mark.parametrize(("size", "kills"), [(20_000, 5), pytest.param(1_000_000, 50, marks=pytest.mark.slow)])
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.timeout(900)
def test_a_writer_killed_at_any_moment_leaves_the_newer_or_the_older_buffer_whole(tmp_path, size, kills):
    path, rng, first = tmp_path / "replay", random.Random(1), 0
    reader = PrioritizedReplayBuffer(size, storage="arrays", fast=False)
    for _ in range(kills):
        command = [sys.executable, "-c", WRITER, str(path), str(size), str(first)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=os.getcwd()) as writer:
            lines = [writer.stdout.readline().split() for _ in range(2)]
            lines.append(writer.stdout.readline().split())  # it has begun the second file
            time.sleep(rng.uniform(0.0, 1.5) * size / 1e6)
            writer.send_signal(signal.SIGKILL)
            lines += [line.split() for line in writer.stdout.read().splitlines()]
        saved = max(int(number) for word, number in lines if word == "saved")
        begun = max(int(number) for word, number in lines if word == "begin")
        reader.load(path)
        states, numbers = reader._storage.read(np.arange(size))
        assert numbers[0] in (saved, begun)
        assert (numbers == numbers[0]).all()
        assert (states == numbers[0]).all()
        first = begun + 1
    filled(storage="arrays").save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["replay"], "what the killed have left is removed"
