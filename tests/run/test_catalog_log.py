"""The catalog's file: what a run leaves behind of its samples, and that writing it harms nobody."""

from __future__ import annotations

import numpy as np
import pytest

from learnit_r8 import R8Scheduler
from learnit_r8.events import Notice
from learnit_r8.run.samples_file import MAX_SAMPLES, MAX_SUSPECTS, read_catalog, write_catalog
from learnit_r8.samples.catalog import LossCatalog


class Heard:
    def __init__(self):
        self.events = []

    def record(self, event):
        self.events.append(event)


def trained(size, rounds=2, seed=0):
    catalog, rng = LossCatalog(size), np.random.default_rng(seed)
    ids = np.arange(size)
    for step in range(rounds):
        catalog.record(catalog.look_up(ids), rng.exponential(size=size).astype(np.float32), step)
    return catalog


def run(folder, steps=None, **arguments):
    heard = Heard()
    with R8Scheduler(
        20, 8, num_epochs=2, ui="off", checkpoint_dir=None, sinks=[heard], log_dir=folder, **arguments
    ) as s:
        for _ in s.epoch_iterator():
            for batch in s.batch_iterator():
                s.update_with_loss(np.linspace(0.1, 3, len(batch.indices)))
                if s.global_step == steps:
                    return s, heard
    return s, heard


def test_what_is_read_is_what_the_catalog_knows(tmp_path):
    catalog, groups = trained(100), np.arange(100) % 7
    write_catalog(tmp_path, catalog, groups, 200)
    found = read_catalog(tmp_path)
    assert (found.step, found.num_samples) == (200, 100)
    assert np.array_equal(found.ids, np.arange(100))
    for name in ("mean_loss", "variability", "correctness", "uses", "expected_loss"):
        assert np.array_equal(getattr(found, name), getattr(catalog, name).astype(getattr(found, name).dtype)), name
    assert np.array_equal(found.groups, groups)
    assert np.array_equal(found.suspects, catalog.suspects(100))
    assert (found.flagged, found.num_flagged, found.attributed) == (None, 0, False)


def test_what_the_noise_guard_flags_is_logged_and_counted(tmp_path):
    flagged = np.arange(100) % 9 == 0
    write_catalog(tmp_path, trained(100), None, 1, flagged)
    found = read_catalog(tmp_path)
    assert np.array_equal(found.flagged, flagged)
    assert found.num_flagged == 12


def test_flagged_samples_come_first_where_one_loss_a_batch_is_known(tmp_path):
    """Their estimates are as old as their absence; others' go on changing."""
    heard, flagged = trained(100), np.arange(100) % 9 == 0
    catalog, ids = LossCatalog(100), np.arange(100)
    for step, start in enumerate(range(0, 100, 10)):
        catalog.record_batch(catalog.look_up(ids[start : start + 10]), 1.0 + start, step)
    for known, first in ((catalog, True), (heard, False)):
        write_catalog(tmp_path, known, None, 1, flagged)
        suspects = read_catalog(tmp_path).suspects
        expected = known.suspects(100)
        if first:
            expected = [*expected[flagged[expected]], *expected[~flagged[expected]]]
        assert np.array_equal(suspects, expected)


@pytest.mark.parametrize("guard", ["off", "report", "cap"])
def test_a_run_logs_what_its_guard_flags(tmp_path, guard):
    run(tmp_path, noise_guard=guard)
    flagged = read_catalog(tmp_path).flagged
    assert flagged is None if guard == "off" else flagged.shape == (20,)


def test_a_large_data_set_is_sampled_evenly_and_no_suspect_is_left_out(tmp_path):
    size = 3 * MAX_SAMPLES + 7
    catalog = trained(size)
    write_catalog(tmp_path, catalog, None, 1)
    found = read_catalog(tmp_path)
    assert MAX_SAMPLES <= len(found.ids) <= MAX_SAMPLES + MAX_SUSPECTS
    assert np.array_equal(found.suspects, catalog.suspects(MAX_SUSPECTS))
    assert np.isin(found.suspects, found.ids).all()
    assert np.diff(found.ids).max() <= 4
    assert np.array_equal(found.mean_loss, catalog.mean_loss[found.ids])
    assert found.groups is None
    assert (tmp_path / "catalog.npz").stat().st_size < 2_000_000


@pytest.mark.parametrize("size", [1, 2, 9, 11])
def test_small_data_sets_have_suspects_too(tmp_path, size):
    write_catalog(tmp_path, trained(size), None, 1)
    assert len(read_catalog(tmp_path).suspects) >= 1


def test_a_folder_without_the_file_has_no_catalog(tmp_path):
    assert read_catalog(tmp_path) is None


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", b"no archive at all", "half", "object"])
def test_a_damaged_file_says_so_and_nothing_is_unpickled(tmp_path, damage):
    path = tmp_path / "catalog.npz"
    write_catalog(tmp_path, trained(50), None, 1)
    if damage == "half":
        path.write_bytes(path.read_bytes()[:900])
    elif damage == "object":
        np.savez(path, ids=np.array([{"an": "object"}], dtype=object))
    else:
        path.write_bytes(damage)
    with pytest.raises(ValueError, match=r"catalog\.npz"):
        read_catalog(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    write_catalog(tmp_path, trained(10), None, 1)
    before = (tmp_path / "catalog.npz").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        write_catalog(tmp_path, trained(10), None, 2)
    assert (tmp_path / "catalog.npz").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["catalog.npz"]


def test_a_run_logs_its_catalog_at_the_end_of_each_epoch_and_of_the_run(tmp_path):
    scheduler, _ = run(tmp_path, groups=list(range(20)))
    found = read_catalog(tmp_path)
    assert found.step == 6
    assert np.array_equal(found.mean_loss, scheduler.catalog.mean_loss)
    assert np.array_equal(found.groups, np.arange(20))


def test_a_run_that_is_left_in_the_middle_of_an_epoch_logs_what_it_knows(tmp_path):
    scheduler, _ = run(tmp_path, steps=5)
    found = read_catalog(tmp_path)
    assert found.step == 5
    assert np.array_equal(found.uses, scheduler.catalog.uses)


def test_a_write_that_fails_is_a_notice_and_training_goes_on(tmp_path):
    (tmp_path / "catalog.npz").mkdir()
    scheduler, heard = run(tmp_path)
    assert scheduler.global_step == 6
    notices = [event for event in heard.events if isinstance(event, Notice)]
    assert len(notices) == 2
    assert all(event.level == "warning" and "not logged" in event.message for event in notices)


def test_only_rank_0_writes_and_nothing_is_written_without_a_log_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(None)
    run(tmp_path / "rank1", rank=1, world_size=2, all_gather=lambda array: np.concatenate([array, array]))
    assert not list(tmp_path.rglob("catalog.npz"))
