"""A run whose samples are called by keys."""

from __future__ import annotations

import csv
import json
import threading

import numpy as np
import pytest

from learnit_r8 import R8Scheduler, events
from learnit_r8.cli import main
from learnit_r8.errors import ConfigError, TrainingDiverged
from learnit_r8.run.events_file import read_events
from learnit_r8.run.journal import entry
from learnit_r8.strategies import Weighted, names
from learnit_r8.structures.key_table import KeyTable
from learnit_r8.testing.states import equal

N, B = 60, 8
KEYS = [f"img/{number:03d}.jpg" for number in np.random.default_rng(5).permutation(N)]
PLACE = {key: place for place, key in enumerate(KEYS)}


def scheduler(keys=KEYS, size=N, **options):
    options = {"checkpoint_dir": None, "backup_every": None, "num_epochs": 5} | options
    return R8Scheduler(size, B, keys=keys, ui="off", **options)


def losses_of(keys, wrong=()):
    return np.array([3.0 if key in wrong else 0.1 + 0.001 * hash_free(key) for key in keys], np.float32)


def hash_free(key):
    return sum(str(key).encode()) % 97


def train(run, batches=None, wrong=()):
    drawn = []
    for number, batch in enumerate(run.batch_iterator(), 1):
        keys, lr = batch
        assert lr == batch.lr
        if run.keys is not None:
            assert run.keys.of(batch.indices) == keys
        drawn += list(keys)
        assert batch.weights.shape == batch.indices.shape
        run.update_with_loss(losses_of(keys, wrong))
        if number == batches:
            break
    return drawn


@pytest.mark.parametrize("strategy", sorted(set(names()) - {"auto"}))
def test_a_run_with_keys_is_the_run_with_numbers(strategy):
    run, plain = scheduler(strategy=strategy), scheduler(None, strategy=strategy)
    for _, _ in zip(run.epoch_iterator(), plain.epoch_iterator(), strict=True):
        theirs = []
        for ids, _ in plain.batch_iterator():
            theirs += [KEYS[i] for i in ids]
            plain.update_with_loss(losses_of([KEYS[i] for i in ids]))
        assert train(run) == theirs
    for name in ("uses", "expected_loss"):
        assert np.array_equal(getattr(run.catalog, name), getattr(plain.catalog, name))


def test_weighted_draws_too():
    run = scheduler(strategy=Weighted(np.arange(1.0, N + 1)))
    for _ in run.epoch_iterator():
        assert set(train(run)) <= set(KEYS)


@pytest.mark.parametrize("given", [True, False, "other order", "table"])
def test_a_resume_goes_on_to_the_bit_with_the_keys_of_the_state(given):
    whole, run = scheduler(), scheduler()
    reference = [train(whole) for _ in whole.epoch_iterator()]
    for epoch in run.epoch_iterator():
        train(run, batches=3 if epoch == 2 else None)
        if epoch == 2:
            break
    other = {True: KEYS, False: None, "other order": KEYS[::-1], "table": KeyTable(KEYS)}[given]
    again = scheduler(other)
    if given == "other order":
        with pytest.raises(ConfigError, match="saved with other keys, or in another order: leave keys out"):
            again.load_state_dict(run.state_dict())
        return
    again.load_state_dict(run.state_dict())
    assert list(again.keys) == KEYS
    drawn = [train(again) for _ in again.epoch_iterator()]
    assert drawn == [reference[2][3 * B :], *reference[3:]]


def test_a_checkpoint_holds_the_keys_and_more_of_them_may_come(tmp_path):
    run = scheduler(checkpoint_dir=tmp_path)
    for epoch in run.epoch_iterator():
        train(run)
        if epoch == 1:
            break
    run.exclude([KEYS[4]])
    run.save_checkpoint()
    run.close()
    alone = R8Scheduler.resume_from_checkpoint(tmp_path)
    assert list(alone.keys) == KEYS
    alone.close()
    more = [*KEYS, "new/a", "new/b"]
    with pytest.raises(ConfigError, match="one key per sample, got 62 for num_samples=60"):
        R8Scheduler.resume_from_checkpoint(tmp_path, keys=more)
    with pytest.raises(ConfigError, match="one key per sample, got 60 for num_samples=62"):
        R8Scheduler.resume_from_checkpoint(tmp_path, num_samples=62)
    run = R8Scheduler.resume_from_checkpoint(tmp_path, keys=more, num_samples=62)
    met = {key for _ in run.epoch_iterator() for key in train(run)}
    assert met == set(more) - {KEYS[4]}
    run.close()


def test_keys_that_come_in_the_run_are_drawn_saved_and_named():
    run = scheduler()
    for epoch in run.epoch_iterator():
        drawn = train(run, batches=2)
        if epoch == 1:
            run.grow(f"new/{i}" for i in range(70))
        drawn += train(run)
        assert ("new/3" in drawn) == (epoch >= 2)
        if epoch == 2:
            run.relabelled(["new/3"])
            assert run.catalog.uses[run.keys.numbers(["new/3"])].tolist() == [0]
        if epoch == 3:
            break
    again = scheduler(None, size=N + 70)
    again.load_state_dict(run.state_dict())
    drawn = [[train(one) for _ in one.epoch_iterator()] for one in (run, again)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0][-1])) == N + 70


def test_a_state_without_keys_is_taken_for_that_of_the_keys_and_said(capfd):
    plain = scheduler(None)
    for _ in plain.epoch_iterator():
        for ids, _ in plain.batch_iterator():
            plain.update_with_loss(losses_of([KEYS[i] for i in ids]))
        break
    run = scheduler()
    run.load_state_dict(plain.state_dict())
    assert "saved without keys" in capfd.readouterr().err
    assert list(run.keys) == KEYS
    shorter = scheduler(None, size=N + 2)
    with pytest.raises(ConfigError, match="saved with other keys"):
        shorter.load_state_dict(run.state_dict())


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (KEYS[:-1], "one key per sample, got 59 for num_samples=60"),
        ([*KEYS[:-1], KEYS[0]], "is there already"),
        ("a" * N, "keys must be several"),
        ([object()] * N, "a key is a text"),
        (5, "keys"),
    ],
)
def test_what_are_no_keys_is_refused_with_all_else(keys, words):
    with pytest.raises(ConfigError, match=words) as caught:
        scheduler(keys, seed=-1)
    assert "seed" in str(caught.value)


def test_sharded_runs_have_no_keys():
    with pytest.raises(ConfigError, match="leave keys out"):
        scheduler(sharded=True, rank=0, world_size=1, all_gather=lambda array: array)


@pytest.mark.parametrize("call", ["exclude", "relabelled"])
def test_samples_are_excluded_and_relabelled_by_key(call):
    run = scheduler()
    next(run.epoch_iterator())
    train(run)
    for wrong, error in (([3], KeyError), (["x"], KeyError), ("img/001.jpg", TypeError), ([None, "x"], KeyError)):
        with pytest.raises(error):
            getattr(run, call)(wrong)
    getattr(run, call)([KEYS[7], KEYS[2]])
    if call == "exclude":
        assert run.catalog.left_out.tolist() == [2, 7]
    else:
        assert run.catalog.uses[[2, 7]].tolist() == [0, 0]


def test_everything_that_names_samples_names_keys(tmp_path, capsys):
    wrong, log = KEYS[3], tmp_path / "log"
    run = scheduler(log_dir=log, checkpoint_dir=tmp_path / "saved", groups=np.zeros(N, int))
    for epoch in run.epoch_iterator():
        train(run, wrong=[wrong])
        if epoch == 1:
            run.exclude([KEYS[9], KEYS[8]])
    run.save_checkpoint()
    run.close()
    told = [json.loads(line) for line in (log / "events.jsonl").read_text().splitlines()]
    quarantined = [event["indices"] for event in told if event["event"] == "SampleQuarantined"]
    assert quarantined == [sorted([KEYS[8], KEYS[9]], key=PLACE.get)]
    assert any(KEYS[8] in event.get("message", "") for event in told)
    assert events.from_json(told[-1]) is not None
    capsys.readouterr()
    assert main(["suspects", str(log), "--top", "3"]) == 0
    assert wrong in capsys.readouterr().out
    assert main(["suspects", str(log), "--top", "3", "--csv"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert rows[2]["id"] == wrong  # after the two that were excluded
    assert main(["export", str(tmp_path / "saved"), "--to", "csv", "-o", str(tmp_path / "s.csv")]) == 0
    with (tmp_path / "s.csv").open(newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == KEYS
    for kind in ("parquet", "cleanlab"):
        assert main(["export", str(tmp_path / "saved"), "--to", kind, "-o", str(tmp_path / kind)]) == 0
    seen = []
    from learnit_r8.report.page import write_report
    from learnit_r8.report.run_data import load_run

    write_report([load_run(log)], tmp_path / "report.html", lambda key: seen.append(key) or "a picture of it")
    assert wrong in seen
    assert wrong in (tmp_path / "report.html").read_text()


def diverge(run):
    for _ in run.epoch_iterator():
        for keys, _ in run.batch_iterator():
            run.update_with_loss(np.full(len(keys), np.nan if run.global_step > 9 else 1.0, np.float32))


def test_a_run_that_diverges_names_the_keys_of_its_batches(tmp_path):
    run = scheduler(log_dir=tmp_path)
    with pytest.raises(TrainingDiverged) as caught, run:
        diverge(run)
    assert {key for batch in caught.value.batches for key in batch} <= set(KEYS)
    bundle = json.loads((caught.value.crash_bundle / "crash.json").read_text())
    assert set(bundle["steps"][-1]["indices"]) <= set(KEYS)


def test_keys_of_several_kinds_and_with_commas(tmp_path, capsys):
    keys = [("class, a", 1), 7, "7", b"x", *KEYS[4:]]
    run = scheduler(keys, log_dir=tmp_path, checkpoint_dir=tmp_path / "saved")
    for _ in run.epoch_iterator():
        assert set(train(run, wrong=keys[:4])) == set(keys)
    run.save_checkpoint()
    run.close()
    assert main(["suspects", str(tmp_path), "--top", "4", "--csv"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert {row["id"] for row in rows} == {"('class, a', 1)", "7", "b'x'"}
    for kind in ("parquet", "csv"):
        assert main(["export", str(tmp_path / "saved"), "--to", kind, "-o", str(tmp_path / kind)]) == 0


class Exchange:
    """Two ranks in two threads."""

    def __init__(self):
        self.barrier = threading.Barrier(2)
        self.there = [None, None]

    def of(self, rank):
        def all_gather(array):
            self.there[rank] = np.asarray(array)
            self.barrier.wait(20)
            together = np.concatenate(self.there)
            self.barrier.wait(20)
            return together

        return all_gather


def on_two_ranks(keys, grow=lambda rank, run: None):
    exchange, drawn, errors = Exchange(), [[], []], []

    def work(rank):
        try:
            run = scheduler(keys[rank], rank=rank, world_size=2, all_gather=exchange.of(rank), num_epochs=3)
            for epoch in run.epoch_iterator():
                for keys_here, _ in run.batch_iterator():
                    drawn[rank] += [(epoch, key) for key in keys_here]
                    run.update_with_loss(losses_of(keys_here))
                if epoch == 0:
                    grow(rank, run)
        except Exception as error:
            errors.append(error)
            exchange.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return drawn, errors


def test_two_ranks_draw_each_key_once_and_take_in_the_same_new_ones():
    drawn, errors = on_two_ranks([KEYS, list(KEYS)], lambda rank, run: run.grow([f"new/{i}" for i in range(20)]))
    assert not errors
    for epoch, size in ((0, N), (1, N + 20), (2, N + 20)):
        of_epoch = [key for rank in drawn for at, key in rank if at == epoch]
        assert len(set(of_epoch)) == len(of_epoch) == size


def test_ranks_with_other_keys_are_found_at_the_first_step():
    _, errors = on_two_ranks([KEYS, KEYS[::-1]])
    assert any("the ranks' plans differ" in str(error) for error in errors)


def test_a_loader_asks_the_data_set_for_keys():
    torch = pytest.importorskip("torch")
    from learnit_r8.integrations.torch import R8BatchSampler, evaluation_loader

    class Pictures(torch.utils.data.Dataset):
        def __len__(self):
            return N

        def __getitem__(self, key):
            return PLACE[key], key

    run = scheduler(num_epochs=2)
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(Pictures(), batch_sampler=R8BatchSampler(run), num_workers=workers)
        next(run.epoch_iterator())
        met = []
        for places, keys in loader:
            assert [PLACE[key] for key in keys] == places.tolist()
            met += keys
            run.update_with_loss(losses_of(keys))
        assert sorted(met) == sorted(KEYS)
    assert [key for _, keys in evaluation_loader(loader) for key in keys] == KEYS


def test_a_table_that_two_runs_are_given_is_changed_by_neither():
    table = KeyTable(KEYS)
    runs = [scheduler(table), scheduler(table)]
    for run in runs:
        run.grow(["new"])
    assert len(table) == N
    assert [list(run.keys) for run in runs] == [[*KEYS, "new"]] * 2
    assert equal(table.state_dict(), KeyTable(iter(KEYS)).state_dict())


def test_long_keys_and_those_that_would_move_the_cursor_are_shown_in_their_place(tmp_path, capsys):
    keys = ["a\x1b[31mred", "new\nline", "folder/" * 30 + "picture.jpg", *KEYS[3:]]
    with scheduler(keys, log_dir=tmp_path) as run:
        for _ in run.epoch_iterator():
            train(run, wrong=keys[:3])
            run.exclude(keys[:2])
    capsys.readouterr()
    assert main(["suspects", str(tmp_path), "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert max(map(len, lines[:-1])) < 120
    assert "\\x1b[31mred" in "".join(lines)
    assert "…" in "".join(lines)
    assert all(line.isprintable() for line in lines)
    told = [line.text for event in read_events(tmp_path / "events.jsonl") if (line := entry(event)) is not None]
    assert any("new\\nline" in text for text in told)
    assert all("\n" not in text and "\x1b" not in text for text in told)
