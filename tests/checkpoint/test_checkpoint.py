import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from enum import IntEnum
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from benchmarks import fault_fs
from benchmarks.fault_fs import FaultFileSystem, at, example_state, model_writer, same
from learnit_r8.checkpoint import CheckpointStore, FileSystem, resolve, storage
from learnit_r8.checkpoint.manifest import SCHEMA, _sealed
from learnit_r8.checkpoint.state_codec import DTYPES, MAX_DEPTH, decode, encode
from learnit_r8.errors import CheckpointCorrupt, CheckpointError, ConfigError

ROOT = Path(__file__).resolve().parents[2]


def through_disk(state, directory):
    return CheckpointStore(directory).load(CheckpointStore(directory).save(1, state).path).state


def recode(state):
    text, segments = encode(state)
    return decode(text, np.concatenate([*segments, np.zeros(0, np.uint8)]))


# ---------------------------------------------------------------- states

dtypes = st.sampled_from(list(DTYPES.values()))
arrays = hnp.arrays(dtypes, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | text
leaves = (
    scalars
    | arrays
    | hnp.array_dtypes().flatmap(lambda _: st.nothing())
    | arrays.map(lambda a: a.flat[0] if a.size else 0)
)
keys = text | st.sampled_from(["$float", "$array", "$", "$$", "$tuple", "$scalar", "a/b", "..", ""])
nested = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)
states = st.dictionaries(keys, nested, max_size=4)


@given(states)
@settings(max_examples=200, deadline=None)
def test_a_nested_state_comes_back_equal_to_the_bit(state):
    assert same(recode(state), state)


@given(states)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_nested_state_comes_back_from_disk(tmp_path, state):
    assert same(through_disk(state, tmp_path), state)


def test_nan_payloads_negative_zero_and_large_integers_keep_their_bits(tmp_path):
    bits = np.array([0x7FF8000000000001, 0xFFF0000000000002, 1 << 63, 0x7FF0000000000000], np.uint64)
    state = {"floats": bits.view(np.float64), "ids": np.array([2**64 - 1], np.uint64), "zero": -0.0, "seed": 2**200}
    loaded = through_disk(state, tmp_path)
    assert loaded["floats"].view(np.uint64).tolist() == bits.tolist()
    assert loaded["ids"][0] == 2**64 - 1
    assert math.copysign(1, loaded["zero"]) == -1
    assert loaded["seed"] == 2**200


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24).reshape(4, 6)[::-1, ::2],
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        np.arange(5, dtype=">i4"),
        np.broadcast_to(np.float32(3), (2, 3)),
        np.empty((0, 1 << 40), np.int8),
    ],
    ids=["strided", "fortran", "big endian", "broadcast", "empty and wide"],
)
def test_any_memory_layout_is_stored_by_value(array):
    back = recode({"a": array})["a"]
    assert back.dtype == array.dtype.newbyteorder("=")
    assert back.shape == array.shape
    assert np.array_equal(back, array)


def test_contiguous_arrays_are_written_without_a_copy():
    array = np.zeros(1000, np.float32)
    _, segments = encode({"a": array})
    assert np.shares_memory(segments[0], array)


def test_loaded_arrays_can_be_written_to_and_later_saves_do_not_see_it(tmp_path):
    store = CheckpointStore(tmp_path)
    path = store.save(1, {"a": np.zeros(3)}).path
    store.load(path).state["a"][:] = 1
    assert store.load(path).state["a"].tolist() == [0, 0, 0]


def test_an_int_enum_is_stored_as_its_number():
    assert recode({"phase": IntEnum("Phase", "WARMUP HEALTHY").HEALTHY}) == {"phase": 2}


POSIX = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork, no fifo and no link for all on Windows")
cyclic: list = []
cyclic.append(cyclic)
UNSTORABLE = {
    "a set": ({"a": {1}}, r"state\['a'\] is a set"),
    "bytes": ({"a": [b""]}, r"state\['a'\]\[0\] is a bytes"),
    "an object": ({"a": object()}, "a checkpoint cannot hold"),
    "a function": ({"a": {"b": len}}, r"state\['a'\]\['b'\]"),
    "an object array": ({"a": np.array([None])}, "dtype object"),
    "a record array": ({"a": np.zeros(2, [("x", "f4")])}, "not stored"),
    "a string array": ({"a": np.array(["x"])}, "<U1"),
    "a byte-string array": ({"a": np.array([b"x"])}, "dtype"),
    "a date array": ({"a": np.zeros(1, "M8[s]")}, "datetime64"),
    "a duration": ({"a": np.timedelta64(1, "s")}, "timedelta64"),
    "a numpy str": ({"a": np.str_("x")}, "dtype"),
    "a long double": ({"a": np.zeros(1, np.longdouble)}, "float128|longdouble"),
    "a masked array": ({"a": np.ma.zeros(2)}, "MaskedArray"),
    "an int key": ({"a": {1: 2}}, "keys are str, use '1'"),
    "a tuple key": ({("a",): 2}, "keys are str"),
    "a lone surrogate": ({"a": "\ud800"}, "no JSON form"),
    "an endless int": ({"a": 10**5000}, "no JSON form"),
    "itself": ({"a": cyclic}, "contain itself"),
    "no dict": ([1], "a state is a dict"),
    "a complex number": ({"a": 1j}, "is a complex"),
}
if np.dtype(np.longdouble).itemsize == 8:
    del UNSTORABLE["a long double"]  # on Windows it is a float64


@pytest.mark.parametrize("case", UNSTORABLE)
def test_what_cannot_be_stored_is_refused_before_the_disk_is_touched(tmp_path, case):
    state, message = UNSTORABLE[case]
    with pytest.raises(CheckpointError, match=message):
        CheckpointStore(tmp_path / "new").save(1, state)
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- saving


def test_nothing_is_created_until_the_first_save(tmp_path):
    store = CheckpointStore(tmp_path / "a" / "b")
    assert store.newest() is None
    assert store.entries() == []
    assert not (tmp_path / "a").exists()
    saved = store.save(12340, {"x": 1})
    assert saved.path == tmp_path / "a" / "b" / "step-000012340"
    assert saved.nbytes == sum(p.stat().st_size for p in saved.path.iterdir() if p.name != "manifest.json")
    assert (tmp_path / "a" / "b" / "latest").read_text() == "step-000012340\n"


def test_a_change_of_the_working_directory_does_not_move_the_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = CheckpointStore("run")
    store.save(1, {})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert store.save(2, {}).path == tmp_path / "run" / "step-000000002"
    assert os.listdir(tmp_path / "elsewhere") == []


@pytest.mark.parametrize("name", ["model", "model.npz", "model/weights/0.bin"])
def test_whatever_the_callback_creates_belongs_to_the_checkpoint(tmp_path, name):
    def write(path):
        target = path.parent / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"weights")

    store = CheckpointStore(tmp_path)
    store.save(1, {}, write)
    saved = store.save(2, {}, write)
    loaded = store.load(saved.path)
    assert (loaded.model_path.parent / name).read_bytes() == b"weights"
    assert name in loaded.manifest.files
    (saved.path / name).write_bytes(b"weightz")
    assert store.newest().step == 1


def test_a_file_of_one_block_has_the_digest_that_sha256sum_prints(tmp_path):
    saved = CheckpointStore(tmp_path).save(1, {}, lambda path: path.write_bytes(b"abc"))
    manifest = json.loads((saved.path / "manifest.json").read_text())["manifest"]
    assert manifest["files"]["model"]["sha256"] == ["ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"]


def test_files_of_many_blocks_are_hashed_block_by_block(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "BLOCK", 1000)
    monkeypatch.setattr("learnit_r8.checkpoint.manifest.BLOCK", 1000)
    monkeypatch.setattr(storage, "PIECE", 64)
    state = {f"a{n}": np.arange(n, dtype=np.uint16) for n in (0, 1, 499, 500, 501, 7000)}
    store = CheckpointStore(tmp_path)
    saved = store.save(1, state, lambda path: path.write_bytes(bytes(3001)))
    loaded = store.load(saved.path)
    assert same(loaded.state, state)
    assert len(loaded.manifest.files["model"].sha256) == 4
    assert len(loaded.manifest.files["arrays.bin"].sha256) == math.ceil(
        loaded.manifest.files["arrays.bin"].nbytes / 1000
    )


def failing(error):
    def write(path):
        path.write_bytes(b"half")
        raise error

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: False, "returned False"),
        (lambda path: np.bool_(False), "returned False"),
        (failing(ValueError("no GPU")), "raised ValueError: no GPU"),
        (failing(OSError(errno.ENOSPC, "disk full")), "raised OSError"),
        (lambda path: (path.parent / "state.json").write_text("{}"), "a name that the checkpoint needs"),
        pytest.param(lambda path: path.symlink_to("/etc/hostname"), "regular files only", marks=POSIX),
        pytest.param(lambda path: os.mkfifo(path), "regular files only", marks=POSIX),
    ],
    ids=["False", "numpy False", "raises", "disk full", "our name", "link", "fifo"],
)
def test_a_failing_callback_leaves_the_previous_checkpoint_and_no_litter(tmp_path, write, message):
    store = CheckpointStore(tmp_path)
    store.save(1, {"x": 1})
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CheckpointError, match=message):
        store.save(2, {"x": 2}, write)
    assert sorted(os.listdir(tmp_path)) == before
    assert store.newest().state == {"x": 1}


def test_an_interrupt_during_a_save_passes_through_and_leaves_no_litter(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, {})
    with pytest.raises(KeyboardInterrupt):
        store.save(2, {}, failing(KeyboardInterrupt()))
    assert [entry.path.name for entry in store.entries()] == ["step-000000001"]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".tmp")]


def test_a_save_from_within_a_save_harms_neither(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, {"x": 1}, lambda path: store.save(2, {"x": 2}) and path.write_text("m"))
    assert {entry.manifest.step for entry in store.entries()} == {1, 2}
    assert store.newest().step == 1


def test_saving_a_step_again_makes_a_second_and_newer_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path)
    paths = [store.save(7, {"x": x}, tag="final").path.name for x in range(3)]
    assert paths == ["step-000000007-final", "step-000000007.2-final", "step-000000007.3-final"]
    assert store.newest().state == {"x": 2}
    assert store.newest().manifest.tag == "final"


def test_the_newest_is_the_one_saved_last_even_at_a_lower_step(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (100, 500, 450):
        store.save(step, {})
    assert store.newest().step == 450
    assert store.older_than(450).step == 100
    assert store.older_than(100) is None


@pytest.mark.parametrize(("keep", "left"), [(1, 2), (2, 2), (3, 3), (5, 5)])
def test_retention_keeps_the_newest_and_at_least_two(tmp_path, keep, left):
    store = CheckpointStore(tmp_path, keep=keep)
    for step in range(8):
        assert store.save(step, {}).problems == ()
    assert [entry.manifest.step for entry in store.entries()] == list(range(8))[: -left - 1 : -1]


def test_damaged_checkpoints_do_not_count_as_kept_ones(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3):
        store.save(step, {})
    (tmp_path / "step-000000003" / "manifest.json").write_text("")
    store.save(4, {})
    assert [entry.manifest and entry.manifest.step for entry in store.entries()] == [None, 4, 2]


@pytest.mark.parametrize(("step", "tag"), [(-1, ""), (1.5, ""), ("1", ""), (None, ""), (1, "a b"), (1, "../x"), (1, 3)])
def test_a_bad_step_or_tag_is_a_config_error(tmp_path, step, tag):
    with pytest.raises(ConfigError):
        CheckpointStore(tmp_path).save(step, {}, tag=tag)


def test_all_bad_arguments_are_named_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)step=-1.*tag='!'"):
        CheckpointStore(tmp_path).save(-1, {}, tag="!")
    with pytest.raises(ConfigError, match="keep=0"):
        CheckpointStore(tmp_path, keep=0)


def test_a_numpy_integer_is_a_step(tmp_path):
    assert CheckpointStore(tmp_path).save(np.int64(3), {}).path.name == "step-000000003"


def test_a_state_that_changes_while_it_is_saved_is_refused(tmp_path):
    array = np.zeros(1000)

    class Changing(FileSystem):
        def write(self, file, data):
            count = super().write(file, data)
            array[5] += 1
            return count

    with pytest.raises(CheckpointCorrupt, match="changed by another thread"):
        CheckpointStore(tmp_path, fs=Changing()).save(1, {"a": array})
    assert CheckpointStore(tmp_path).newest() is None


# ---------------------------------------------------------------- faults


def failures(outcomes):
    outcomes = list(outcomes)
    assert outcomes
    return [f"{outcome.fault}: {outcome.detail}" for outcome in outcomes if not outcome.survived]


def drive(tmp_path, *arguments):
    """Run the drivers in a process of their own: they fork, and this one may have threads."""
    command = [sys.executable, "-m", "benchmarks.fault_fs", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@POSIX
def test_a_kill_at_any_operation_loses_nothing_that_was_committed(tmp_path):
    rows = drive(tmp_path, "--sizes", "1", "--corruptions", "1").splitlines()
    injected, survived = map(int, rows[1].split()[1:3])
    assert injected == survived >= 40


@POSIX
@pytest.mark.slow
def test_the_whole_fault_table_is_survived_at_twenty_model_sizes(tmp_path):
    drive(tmp_path)


@pytest.mark.parametrize("kind", ["ENOSPC", "EIO", "EROFS", "EDQUOT", "EINTR", "short", "lost"])
def test_any_single_operation_may_fail(tmp_path, kind):
    assert failures(fault_fs.fail_everywhere(tmp_path, kind)) == []


@pytest.mark.parametrize("kind", ["ENOSPC", "EIO", "EROFS", "EACCES"])
def test_everything_may_fail_from_any_operation_onwards(tmp_path, kind):
    assert failures(fault_fs.fail_everywhere(tmp_path, kind, onwards=True)) == []


@pytest.mark.parametrize("kind", ["EIO", "EACCES"])
def test_any_read_during_a_save_may_fail(tmp_path, kind):
    assert failures(fault_fs.fail_reads(tmp_path, kind)) == []


def test_the_order_of_operations_is_the_durable_one(tmp_path):
    points = fault_fs.count_points(tmp_path).points
    for earlier, later in [
        ("fsync arrays.bin", "create manifest.json"),
        ("fsync state.json", "create manifest.json"),
        ("fsync weights.bin", "create manifest.json"),
        ("fsync directory model", "create manifest.json"),
        ("fsync manifest.json", "fsync directory temporary"),
        ("fsync directory temporary", "rename step-000000030"),
        ("rename step-000000030", f"fsync directory {tmp_path.name}"),
        (f"fsync directory {tmp_path.name}", "rename latest"),
        ("rename latest", "remove arrays.bin"),
    ]:
        assert points.index(earlier) < points.index(later), (earlier, later)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is another call")
def test_the_system_is_told_to_sync_all_of_a_checkpoint_before_its_rename(tmp_path, monkeypatch):
    """Whether bytes are on a disk cannot be seen; that the system was told to put them there can."""
    calls, sync, replace = [], os.fsync, os.replace

    def fsync(descriptor):
        sync(descriptor)
        file = os.fstat(descriptor)
        calls.append((file.st_ino, file.st_size))

    def rename(source, target):
        replace(source, target)
        calls.append(os.fspath(target))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    path = CheckpointStore(tmp_path).save(30, example_state(30), model_writer(30)).path
    committed = calls.index(os.fspath(path))
    parts = [path, *path.rglob("*")]
    assert {part.name for part in parts} >= {"manifest.json", "state.json", "arrays.bin", "model", "weights.bin"}
    for part in parts:
        assert (part.stat().st_ino, part.stat().st_size) in calls[:committed], part
    assert tmp_path.stat().st_ino in [call[0] for call in calls[committed:]]


def test_failing_saves_do_not_pile_up_litter_even_when_nothing_can_be_removed(tmp_path):
    fault_fs.prepare(tmp_path)
    for _ in range(4):
        with pytest.raises(CheckpointError, match=r"what lay there is kept.*free some space"):
            CheckpointStore(tmp_path, fs=FaultFileSystem(at(4, "ENOSPC", onwards=True))).save(30, example_state(30))
    assert sum(name.startswith(".tmp-") for name in os.listdir(tmp_path)) <= 4
    CheckpointStore(tmp_path).save(30, example_state(30))
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".tmp-")]


def test_what_is_wrong_after_the_commit_is_told_but_is_no_failure(tmp_path):
    fault_fs.prepare(tmp_path)
    points = fault_fs.count_points(tmp_path / "count").points
    fs = FaultFileSystem(at(points.index("rename latest") + 1, "EIO"))
    saved = CheckpointStore(tmp_path, keep=2, fs=fs).save(30, example_state(30), model_writer(30))
    assert "latest" in saved.problems[0]
    assert CheckpointStore(tmp_path).newest().step == 30


def test_an_unreadable_checkpoint_is_passed_over_but_not_renamed(tmp_path):
    fault_fs.prepare(tmp_path)
    reasons = []
    fs = FaultFileSystem(read_fault=at(3, "EIO"))  # after the two manifests
    found = CheckpointStore(tmp_path, fs=fs, on_corrupt=lambda path, reason: reasons.append(reason)).newest()
    assert found.step == 10
    assert "cannot be read" in reasons[0]
    assert (tmp_path / "step-000000020").is_dir()


def test_a_damaged_checkpoint_is_passed_over_where_it_cannot_be_renamed(tmp_path):
    fault_fs.prepare(tmp_path)
    (tmp_path / "step-000000020" / "state.json").write_text("{}")
    reasons = []
    fs = FaultFileSystem(at(1, "EROFS"))
    found = CheckpointStore(tmp_path, fs=fs, on_corrupt=lambda path, reason: reasons.append(reason)).newest()
    assert found.step == 10
    assert "stays under its name" in reasons[0]


# ---------------------------------------------------------------- two processes

CHILD = """
import sys, time
from pathlib import Path
from learnit_r8.checkpoint import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]))
store.save(1, {"x": 1})
print("saved", flush=True)
sys.stdin.read()
"""


def start(script, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_second_process_cannot_write_but_can_read_and_takes_over_after_a_kill(tmp_path):
    with start(CHILD, tmp_path) as child:
        try:
            assert child.stdout.readline() == "saved\n"
            store = CheckpointStore(tmp_path)
            with pytest.raises(CheckpointError, match=f"process {child.pid} writes its checkpoints"):
                store.save(2, {"x": 2})
            assert store.newest().state == {"x": 1}
            assert sorted(os.listdir(tmp_path)) == [".lock", "latest", "step-000000001"]
        finally:
            child.kill()
    store.save(2, {"x": 2})
    assert store.newest().state == {"x": 2}


FORKING = """
import os, sys, time
from learnit_r8.checkpoint import CheckpointStore
store = CheckpointStore(sys.argv[1])
store.save(1, {})
worker = os.fork()
if worker == 0:
    time.sleep(60)
    os._exit(0)
print(worker, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork on Windows")
def test_an_orphaned_worker_of_a_killed_run_does_not_keep_the_directory_locked(tmp_path):
    with start(FORKING, tmp_path) as child:
        worker = int(child.stdout.readline())
        child.kill()
        child.wait()
        try:
            saved = CheckpointStore(tmp_path).save(2, {})
            os.kill(worker, 0)  # it is still there
            assert saved.path.is_dir()
        finally:
            os.kill(worker, signal.SIGKILL)


def test_two_stores_and_several_threads_of_one_process_may_save_into_one_directory(tmp_path):
    def work(first):
        store = CheckpointStore(tmp_path, keep=100)
        for step in range(first, first + 20, 2):
            store.save(step % 6, {"step": step, "a": np.full(100, step)})

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = CheckpointStore(tmp_path)
    found = [store.load(entry.path) for entry in store.entries()]
    assert sorted(loaded.state["step"] for loaded in found) == list(range(20))
    assert all((loaded.state["a"] == loaded.state["step"]).all() for loaded in found)


def test_where_there_are_no_locks_only_old_leftovers_are_removed(tmp_path):
    class WithoutLocks(FileSystem):
        def lock(self, descriptor):
            return None

    store = CheckpointStore(tmp_path, fs=WithoutLocks())
    young, old, foreign = tmp_path / ".tmp-1-0123abcd", tmp_path / ".tmp-2-0123abcd", tmp_path / ".tmp-mine"
    for path in (young, old, foreign):
        path.mkdir()
    os.utime(old, (0, 0))
    os.utime(foreign, (0, 0))
    store.save(1, {})
    assert (young.exists(), old.exists(), foreign.exists()) == (True, False, True)
    CheckpointStore(tmp_path).save(2, {})
    assert (young.exists(), foreign.exists()) == (False, True)


def test_a_directory_that_was_deleted_and_made_anew_is_locked_anew(tmp_path):
    store = CheckpointStore(tmp_path / "run")
    store.save(1, {})
    (tmp_path / "run").rename(tmp_path / "gone")
    store.save(2, {})
    assert [entry.manifest.step for entry in store.entries()] == [2]


# ---------------------------------------------------------------- damage


def test_a_sample_of_damages_is_always_noticed(tmp_path):
    assert failures(fault_fs.corrupt_everywhere(tmp_path, seed=1, count=250)) == []


@pytest.mark.slow
def test_a_thousand_and_more_damages_are_always_noticed(tmp_path):
    outcomes = list(fault_fs.corrupt_everywhere(tmp_path, seed=2, count=3000))
    assert len(outcomes) == 3000
    assert failures(outcomes) == []


def test_every_single_bit_of_a_manifest_counts(tmp_path):
    path = CheckpointStore(tmp_path).save(1, {}).path
    manifest = path / "manifest.json"
    raw = manifest.read_bytes()
    for bit in range(0, 8 * len(raw), 5):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(damaged)
        with pytest.raises(CheckpointCorrupt):
            CheckpointStore(tmp_path).load(path)


def test_a_checkpoint_that_another_process_prunes_meanwhile_is_not_reported(tmp_path):
    fault_fs.prepare(tmp_path)

    class Pruning(FileSystem):
        reads = 0

        def read(self, file, buffer):
            self.reads += 1
            if self.reads == 3 and (tmp_path / "step-000000020").exists():
                (tmp_path / "step-000000020").rename(tmp_path / ".tmp-1-00000000")
            return super().read(file, buffer)

    reasons = []
    found = CheckpointStore(tmp_path, fs=Pruning(), on_corrupt=lambda *args: reasons.append(args)).newest()
    assert found.step == 10
    assert reasons == []


# ---------------------------------------------------------------- malformed input


def reseal(path, change=None, **files):
    """Rewrite files of a checkpoint, with a manifest whose hashes match: what an attacker would do."""
    body = json.loads((path / "manifest.json").read_text())["manifest"]
    for name, raw in files.items():
        name = name.replace("_", ".")
        (path / name).write_bytes(raw)
        body["files"][name] = {"bytes": len(raw), "sha256": [__import__("hashlib").sha256(raw).hexdigest()]}
    if change:
        change(body)
    (path / "manifest.json").write_bytes(_sealed(body))


ZEROS = bytes(64)
STATES = {
    # text of state.json, bytes of arrays.bin; from the lists of safetensors' and numpy's own tests and beyond
    "empty": (b"", b""),
    "blank": (b" ", b""),
    "not utf-8": (b'{"a":"\xff"}', b""),
    "utf-16": ('{"a":1}'.encode("utf-16"), b""),
    "byte order mark": (b"\xef\xbb\xbf{}", b""),
    "not json": (b"{", b""),
    "a pickle": (b"\x80\x04N.", b""),
    "a npy header": (b"\x93NUMPY\x01\x00", b""),
    "python literal": (b"{'a': 1}", b""),
    "trailing comma": (b'{"a":1,}', b""),
    "trailing bytes": (b"{}x", b""),
    "two values": (b"{}{}", b""),
    "nul inside": (b'{"a":1}\x00', b""),
    "comment": (b"{} // x", b""),
    "control character": (b'{"a":"\n"}', b""),
    "NaN": (b'{"a":NaN}', b""),
    "Infinity": (b'{"a":Infinity}', b""),
    "-Infinity": (b'{"a":-Infinity}', b""),
    "1e999": (b'{"a":1e999}', b""),
    "-1e999": (b'{"a":[-1e999]}', b""),
    "endless int": (b'{"a":' + b"1" * 5000 + b"}", b""),
    "leading zero": (b'{"a":01}', b""),
    "hex": (b'{"a":0x1}', b""),
    "duplicate key": (b'{"a":1,"a":2}', b""),
    "duplicate key, equal": (b'{"a":1,"a":1}', b""),
    "duplicate key, nested": (b'{"a":[{"b":1,"b":2}]}', b""),
    "duplicate key, escaped": (b'{"a":1,"\\u0061":2}', b""),
    "a list": (b"[]", b""),
    "a number": (b"1", b""),
    "null": (b"null", b""),
    "a string": (b'"x"', b""),
    "a float at the top": (b'{"$float":"nan"}', b""),
    "deep lists": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b""),
    "a bit too deep": (b'{"a":' + b"[" * (MAX_DEPTH + 9) + b"]" * (MAX_DEPTH + 9) + b"}", b""),
    "unknown marker": (b'{"a":{"$pickle":"x"}}', b""),
    "marker in a larger dict": (b'{"a":{"$float":"nan","b":1}}', b""),
    "bare dollar": (b'{"a":{"$":1}}', b""),
    "float nonsense": (b'{"a":{"$float":"1e5"}}', b""),
    "float hex": (b'{"a":{"$float":"0x1p3"}}', b""),
    "float list": (b'{"a":{"$float":["nan"]}}', b""),
    "float number": (b'{"a":{"$float":1}}', b""),
    "tuple of nothing": (b'{"a":{"$tuple":null}}', b""),
    "tuple of dict": (b'{"a":{"$tuple":{"b":1}}}', b""),
    "unused array bytes": (b"{}", ZEROS),
    "bool 2": (b'{"a":{"$array":["|b1",[1],0]}}', b"\x02"),
    "two arrays share bytes": (b'{"a":{"$array":["<f4",[2],0]},"b":{"$array":["<f4",[2],0]}}', bytes(8)),
    "arrays overlap": (b'{"a":{"$array":["<f4",[32],0]},"b":{"$array":["<f4",[2],64]}}', bytes(128)),
    "a hole": (b'{"a":{"$array":["<f4",[2],0]},"b":{"$array":["<f4",[2],128]}}', bytes(136)),
    "unaligned": (b'{"a":{"$array":["<f4",[2],0]},"b":{"$array":["<f4",[2],8]}}', bytes(16)),
    "scalar with a shape": (b'{"a":{"$scalar":["<f4",[1],0]}}', bytes(4)),
    "leading bytes": (b'{"a":{"$array":["<f4",[2],64]}}', bytes(72)),
}
for name in (
    "O",
    "|O",
    "|O8",
    "object",
    "V8",
    "|V8",
    "S4",
    "|S4",
    "<U1",
    "U",
    "M8[s]",
    "<m8[ns]",
    "f",
    "float32",
    "<f16",
    ">f4",
    ">i8",
    "=f4",
    "<f3",
    "<b1",
    "F32",
    "BF16",
    "",
    "i4,f4",
    "(2,)f4",
    "<f4 ",
    "__import__('os')",
    "\\u0000",
):
    STATES[f"dtype {name!r}"] = (json.dumps({"a": {"$array": [name, [2], 0]}}).encode(), ZEROS)
for value in (None, 1, True, ["<f4"], [["<f4"]], {"b": 1}, [["x", "<f4"]]):
    STATES[f"dtype {value!r}"] = (json.dumps({"a": {"$array": [value, [2], 0]}}).encode(), ZEROS)
for shape in (
    None,
    2,
    "2",
    {},
    [-1],
    [2, -1],
    [1.0],
    ["2"],
    [True],
    [None],
    [[2]],
    [2**31],
    [2**62],
    [2**63],
    [2**64],
    [2**32, 2**32],
    [2**63, 2],
    [0, 2**70],
    [1] * 33,
    [1] * 1000,
    [0] * 65,
    [17],
    [3],
    [4, 5],
    [-2, -8],
    [2**62, 2**62, 0],
    [10**400],
):
    STATES[f"shape {str(shape)[:40]}"] = (json.dumps({"a": {"$array": ["<f4", shape, 0]}}).encode(), ZEROS)
for offset in (None, -1, -64, 1, 3, 64, 2**63, 2**64, 0.0, "0", True, False, [0], {}):
    STATES[f"offset {offset!r}"] = (json.dumps({"a": {"$array": ["<f4", [16], offset]}}).encode(), ZEROS)
for entry in (None, [], "x", 1, {}, ["<f4"], ["<f4", [16]], ["<f4", [16], 0, 0], ["<f4", 0, [16]]):
    STATES[f"entry {entry!r}"] = (json.dumps({"a": {"$array": entry}}).encode(), ZEROS)


@pytest.mark.parametrize("case", STATES)
def test_a_malformed_state_with_matching_hashes_is_refused(tmp_path, case):
    text, arrays = STATES[case]
    path = CheckpointStore(tmp_path).save(1, {}).path
    reseal(path, state_json=text, arrays_bin=arrays)
    with pytest.raises(CheckpointCorrupt):
        CheckpointStore(tmp_path).load(path)


def set_file(name, **entry):
    def change(body):
        body["files"][name] = {"bytes": 0, "sha256": ["0" * 64]} | entry

    return change


def set_field(name, value):
    return lambda body: body.__setitem__(name, value)


MANIFESTS = {
    **{
        f"file {name!r}": set_file(name)
        for name in (
            "../x",
            "/etc/passwd",
            "a/../../x",
            "..",
            ".",
            "",
            "a//b",
            "./a",
            "a/",
            "a/./b",
            "a\\b",
            "..\\x",
            "missing",
            "manifest.json/x",
            "state.json/x",
            "x\0y",
            "\ud800",
            "model/../state.json",
            "//x",
            "a" * 300,
        )
    },
    "digests missing": set_file("state.json", sha256=[]),
    "digests too many": set_file("state.json", sha256=["0" * 64] * 2),
    "digests no list": set_file("state.json", sha256="0" * 64),
    "digest no string": set_file("state.json", sha256=[0]),
    "digest short": set_file("state.json", sha256=["0" * 63]),
    "size negative": set_file("state.json", bytes=-1),
    "size a float": set_file("state.json", bytes=2.0),
    "size a bool": set_file("state.json", bytes=True),
    "size a string": set_file("state.json", bytes="2"),
    "size of an exabyte, arrays": set_file("arrays.bin", bytes=10**18),
    "size beyond 64 bits": set_file("arrays.bin", bytes=2**70),
    "size of an exabyte, state": set_file("state.json", bytes=10**18),
    "entry has more": set_file("state.json", extra=1),
    "entry null": lambda body: body["files"].__setitem__("state.json", None),
    "no state": lambda body: body["files"].pop("state.json"),
    "no arrays": lambda body: body["files"].pop("arrays.bin"),
    "files a list": set_field("files", []),
    "step negative": set_field("step", -1),
    "step a float": set_field("step", 1.0),
    "step a bool": set_field("step", True),
    "step a string": set_field("step", "1"),
    "serial 0": set_field("serial", 0),
    "tag null": set_field("tag", None),
    "format": set_field("format", "zip"),
    "schema 0": set_field("schema", 0),
    "schema a string": set_field("schema", "1"),
    "field missing": lambda body: body.pop("tag"),
    "field too many": set_field("more", 1),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_malformed_manifest_with_a_matching_hash_is_refused(tmp_path, case):
    path = CheckpointStore(tmp_path).save(1, {}).path
    reseal(path, MANIFESTS[case])
    with pytest.raises(CheckpointCorrupt):
        CheckpointStore(tmp_path).load(path)


@pytest.mark.parametrize(
    "raw",
    [b"", b"null", b"[]", b"{}", b'{"manifest": {}}', b'{"manifest": 1, "sha256": 2}', b"\xff", b"[" * 10**5],
    ids=lambda raw: str(raw[:20]),
)
def test_a_manifest_that_is_no_manifest_is_refused(tmp_path, raw):
    path = CheckpointStore(tmp_path).save(1, {}).path
    (path / "manifest.json").write_bytes(raw)
    with pytest.raises(CheckpointCorrupt, match=r"manifest\.json"):
        CheckpointStore(tmp_path).load(path)


def test_an_absurdly_large_manifest_is_not_even_read(tmp_path):
    path = CheckpointStore(tmp_path).save(1, {}).path
    os.truncate(path / "manifest.json", 10**12)
    with pytest.raises(CheckpointCorrupt, match="make sense"):
        CheckpointStore(tmp_path).load(path)


@given(st.binary(max_size=200) | st.text(max_size=80).map(str.encode))
@settings(max_examples=200, deadline=None)
def test_random_bytes_are_never_a_state_unless_they_are_json(raw):
    try:
        state = decode(raw, np.zeros(0, np.uint8))
    except CheckpointCorrupt:
        return
    assert isinstance(json.loads(raw), dict)
    assert isinstance(state, dict)


@POSIX
@pytest.mark.parametrize("name", ["state.json", "model/weights.bin", "model"])
def test_a_link_out_of_the_checkpoint_is_refused(tmp_path, name):
    store = CheckpointStore(tmp_path / "run")
    path = store.save(1, example_state(1), model_writer(1)).path
    (path / name).rename(tmp_path / "outside")
    (path / name).symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointCorrupt, match="symbolic link"):
        store.load(path)


def test_a_checkpoint_of_a_newer_version_is_neither_loaded_nor_renamed_nor_silently_passed_over(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, {})
    path = store.save(2, {}).path
    reseal(path, set_field("schema", SCHEMA + 1))
    with pytest.raises(CheckpointError, match=r"newer version of learnit_r8.*upgrade") as caught:
        store.newest()
    assert not isinstance(caught.value, CheckpointCorrupt)
    assert path.is_dir()


def test_files_that_somebody_else_put_into_a_checkpoint_do_no_harm(tmp_path):
    path = CheckpointStore(tmp_path).save(1, {"x": 1}).path
    (path / ".DS_Store").write_bytes(b"x")
    assert CheckpointStore(tmp_path).newest().state == {"x": 1}


# ---------------------------------------------------------------- resolve


def test_a_path_means_a_checkpoint_a_file_in_it_or_the_newest_in_a_directory(tmp_path):
    store = CheckpointStore(tmp_path)
    first, last = store.save(1, {}).path, store.save(2, {}).path
    assert resolve(first).step == resolve(str(first / "state.json")).step == 1
    assert resolve(tmp_path).step == resolve(tmp_path / "latest").step == resolve(last).step == 2


def test_a_copied_and_renamed_checkpoint_still_loads(tmp_path):
    CheckpointStore(tmp_path).save(1, {}).path.rename(tmp_path / "best model")
    assert resolve(tmp_path / "best model").step == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is empty"),
        (lambda path: (path.mkdir(), (path / "model.pt").touch()), r"contains model\.pt"),
    ],
)
def test_where_there_is_no_checkpoint_the_error_says_what_there_is(tmp_path, make, message):
    make(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=message) as caught:
        resolve(tmp_path / "run")
    assert str(tmp_path / "run") in str(caught.value)


def test_a_missing_step_is_answered_with_the_steps_that_exist(tmp_path):
    CheckpointStore(tmp_path).save(1, {})
    with pytest.raises(FileNotFoundError, match="step-000000001"):
        resolve(tmp_path / "step-000000002")


def test_a_damaged_checkpoint_asked_for_by_name_is_an_error_that_says_what_to_do(tmp_path):
    path = CheckpointStore(tmp_path).save(1, {}).path
    (path / "state.json").write_text("[]")
    with pytest.raises(CheckpointCorrupt, match=f"damaged.*give {re.escape(str(tmp_path))} to use the newest"):
        resolve(path)
    assert path.is_dir()


def test_where_all_are_damaged_each_reason_is_listed(tmp_path):
    for entry in (fault_fs.prepare(tmp_path), *CheckpointStore(tmp_path).entries())[1:]:
        (entry.path / "state.json").unlink()
    with pytest.raises(CheckpointCorrupt, match=r"(?s)step-000000020: state.json is missing.*step-000000010"):
        resolve(tmp_path)
