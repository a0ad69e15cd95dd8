"""Streams: k of m candidates, chosen by what is known of them, and resumed in their midst."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from learnit_r8 import R8Scheduler
from learnit_r8.errors import ConfigError, ProtocolError
from learnit_r8.streams import StreamSelector


class Source:
    """Numbers from 0; it can say where it is."""

    def __init__(self, size, fails=()):
        self.size, self.at, self.fails, self.epochs = size, 0, set(fails), []

    def __iter__(self):
        self.at = self.start if hasattr(self, "start") else 0
        self.__dict__.pop("start", None)
        return self

    def __next__(self):
        if self.at in self.fails:
            self.fails.remove(self.at)
            raise OSError("the disk")
        if self.at >= self.size:
            raise StopIteration
        self.at += 1
        return self.at - 1

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.start = state["at"]

    def set_epoch(self, number):
        self.epochs.append(number)


def drain(stream, steps=None, losses=None):
    """Return the items of the batches up to the pass's end, or of so many."""
    met = []
    for chosen in stream:
        met.append(list(chosen.items))
        stream.update(None if losses is None else [losses(item) for item in chosen.items])
        if len(met) == steps:
            break
    return met


def test_the_best_of_each_m_and_a_share_by_chance():
    stream = StreamSelector(Source(1000), 10, of=50, score=lambda items: np.array(items) % 50, explore=0.0)
    for number, batch in enumerate(drain(stream)):
        assert batch == list(range(50 * number + 40, 50 * number + 50))
    half = StreamSelector(Source(5000), 10, of=50, score=lambda items: np.array(items) % 50, explore=0.5)
    batches = drain(half)
    best = np.mean([sum(item % 50 >= 40 for item in batch) for batch in batches])
    assert 5.0 < best < 7.5  # 5, and a tenth of the fifty among the others; those that chance took are not replaced
    assert half.metrics_dict() == {"passes": 1, "batches": 100, "candidates": 5000, "chosen": 1000, "keys": 0}


@pytest.mark.parametrize(
    ("size", "sizes"), [(0, []), (1, [1]), (4, [4]), (5, [4]), (16, [4]), (17, [4, 1]), (35, [4, 4, 3])]
)
@pytest.mark.parametrize("explore", [0.0, 1.0])
def test_the_end_of_the_stream_and_an_empty_one(size, sizes, explore):
    stream = StreamSelector(iter(range(size)), 4, of=16, score=lambda items: items, explore=explore)
    batches = drain(stream)
    assert [len(batch) for batch in batches] == sizes
    assert len({item for batch in batches for item in batch}) == sum(sizes)
    assert drain(stream) == []  # an iterator has one pass


def test_every_loop_is_a_pass():
    source = Source(32)
    stream = StreamSelector(source, 4, of=8, score=np.zeros_like)
    first, second = drain(stream), drain(stream)
    assert len(first) == len(second) == 4
    assert first != second  # other ties
    assert source.epochs == [0, 1]


def test_what_was_lost_by_its_key_is_wanted_again_after_what_was_never_seen():
    stream = StreamSelector(Source(64), 8, of=16, key=lambda item: f"k{item % 64}", explore=0.0)
    met = [drain(stream, losses=lambda item: float(item >= 56)) for _ in range(4)]
    flat = [{item for batch in one for item in batch} for one in met]
    assert flat[0] | flat[1] == set(range(64))
    assert stream.metrics_dict()["keys"] == 64
    for one in (flat[2], flat[3]):
        assert set(range(56, 64)) <= one


def test_a_key_that_comes_twice_and_losses_that_are_not_finite():
    stream = StreamSelector([1, 1, 2, 3] * 4, 4, of=4, key=str, explore=0.0)
    for _ in stream:
        stream.update([1.0, 3.0, np.nan, 2.0])
    assert stream._known.find(["1", "2", "3"]).tolist() == [0, -1, 1]
    assert stream._losses.tolist() == [3.0, 2.0]


def test_nan_scores_come_last_and_are_told():
    stream = StreamSelector(range(8), 2, of=8, score=lambda items: [np.nan] * 6 + [0.0, 1.0], explore=0.0)
    with pytest.warns(RuntimeWarning, match="score returned NaN"):
        assert drain(stream) == [[6, 7]]


@pytest.mark.parametrize("explore", [0.0, 0.25])
@pytest.mark.parametrize("steps", [0, 1, 7, 13, 20])
@pytest.mark.parametrize("open_batch", [False, True])
def test_it_goes_on_to_the_bit_from_any_place_through_json_and_pickle(steps, open_batch, explore):
    def make():
        return StreamSelector(Source(100), 4, of=9, key=str, explore=explore, seed=3)

    def losses(item):
        return item % 7

    whole, stopped, again = make(), make(), make()
    reference = drain(whole, losses=losses) + drain(whole, losses=losses)
    met = drain(stopped, steps, losses) if steps else []
    if len(met) < steps:
        met += drain(stopped, steps - len(met), losses)
    if open_batch:
        next(stopped, None)
    state = pickle.loads(pickle.dumps(stopped.state_dict()))
    assert isinstance(json.dumps(state), str)
    again.load_state_dict(state)
    rest = drain(again, losses=losses)
    if len(met) + len(rest) < len(reference):
        rest += drain(again, losses=losses)
    assert met + rest == reference
    assert again.metrics_dict() == whole.metrics_dict()


def test_what_came_is_not_lost_where_the_source_or_the_look_fails():
    wanted = drain(StreamSelector(Source(64), 4, of=16, score=lambda items: items))
    looks = iter([True, False, True, True, True, True])

    def shaky(items):
        if not next(looks):
            raise MemoryError("the look")
        return items

    stream, met = StreamSelector(Source(64, fails=[7, 50]), 4, of=16, score=shaky), []
    for error in (OSError, MemoryError, OSError):
        with pytest.raises(error):
            drain_into(stream, met)
    drain_into(stream, met)
    assert met == wanted


def drain_into(stream, met):
    for chosen in stream:
        met.append(chosen.items)
        stream.update()


def test_a_state_saved_where_the_source_failed_goes_on_there():
    stream = StreamSelector(Source(64, fails=[40]), 4, of=16, score=lambda items: items)
    with pytest.raises(OSError, match="disk"):
        drain(stream)
    again = StreamSelector(Source(64), 4, of=16, score=lambda items: items)
    again.load_state_dict(stream.state_dict())
    assert drain(again) == drain(StreamSelector(Source(64), 4, of=16, score=lambda items: items))[2:]


def test_a_batch_is_reported_before_the_next():
    stream = StreamSelector(range(40), 2, of=4, score=lambda items: items)
    with pytest.raises(ProtocolError, match="no batch is open"):
        stream.update()
    next(stream)
    with pytest.raises(ProtocolError, match="has not been reported"):
        next(stream)
    with pytest.raises(ValueError, match="2 candidates, got 3 losses"):
        stream.update([1.0, 2.0, 3.0])
    stream.update([1.0, 2.0])
    next(stream)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"choose": 0}, "choose must be"),
        ({"of": 2}, "of must be"),
        ({"explore": 2.0}, "explore must be"),
        ({"seed": -1}, "seed must be"),
        ({"score": 3}, "score must be a function"),
        ({"score": None}, "give score"),
        ({"source": "abc"}, "source must be an iterable"),
        ({"source": 5}, "source must be an iterable"),
    ],
)
def test_bad_arguments_are_refused(given, words):
    arguments = {"source": range(9), "choose": 4, "of": 8, "score": np.zeros_like} | given
    with pytest.raises(ConfigError, match=words):
        StreamSelector(**arguments)


def test_what_cannot_resume_says_so_when_it_is_saved():
    stream = StreamSelector(iter(range(40)), 2, of=4, score=lambda items: items)
    drain(stream, 3)
    with pytest.raises(ConfigError, match="range_iterator has no state_dict"):
        stream.state_dict()
    with pytest.raises(ConfigError, match="StatefulDataLoader"):
        stream.load_state_dict({})
    state = StreamSelector(Source(9), 2, of=4, score=lambda items: items).state_dict()
    with pytest.raises(ConfigError, match="choose: the state has 2, this selector 3"):
        StreamSelector(Source(9), 3, of=4, score=lambda items: items).load_state_dict(state)


def test_a_look_that_returns_another_number_of_scores_is_refused():
    stream = StreamSelector(range(40), 2, of=4, score=lambda items: items[1:])
    with pytest.raises(ValueError, match="each of 4 candidates, got 3"):
        next(stream)


def check_resume(make, steps):
    """Compare a run that is stopped after some steps, a batch open, with one that is not."""
    reference, stopped, again = drain(make()), make(), make()
    met = drain(stopped, steps)
    next(stopped)
    again.load_state_dict(pickle.loads(pickle.dumps(stopped.state_dict())))
    rest = drain(again)
    assert met + rest == reference
    assert len(rest) > 1
    assert len(drain(again)) == len(reference)  # and another pass is a whole one


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_torchdatas_loader(workers):
    loader = pytest.importorskip("torchdata.stateful_dataloader")

    def make():
        source = loader.StatefulDataLoader(
            list(range(96)), batch_size=16, collate_fn=list, num_workers=workers, drop_last=False
        )
        return StreamSelector(source, 4, None, score=lambda items: [item * 37 % 101 for item in items], key=str)

    check_resume(make, 2)


@pytest.mark.filterwarnings("ignore")
def test_iterable_data_sets():
    datasets = pytest.importorskip("datasets")

    def make():
        data = datasets.Dataset.from_dict({"x": list(range(120))}).to_iterable_dataset(num_shards=4)
        return StreamSelector(data, 4, of=16, score=lambda rows: [row["x"] * 37 % 101 for row in rows])

    check_resume(make, 3)


def train(folder, stop_at=None, resume=False):
    """Train a line on a stream, in a scheduler's loop; return the weights, or None where it was stopped."""
    model = {"w": np.zeros(2)}
    stream = StreamSelector(Source(4000), 8, of=32, score=lambda items: np.abs(errors(model, items)), seed=1)

    def save(state, path):
        with open(path, "wb") as file:
            pickle.dump({"w": model["w"], "stream": stream.state_dict()}, file)

    def load(path, from_ram=False):
        with open(path, "rb") as file:
            saved = pickle.load(file)
        model["w"] = saved["w"]
        stream.load_state_dict(saved["stream"])

    options = {"save_callback": save, "load_callback": load}
    if resume:
        run = R8Scheduler.resume_from_checkpoint(folder, ui="off", **options)
    else:
        run = R8Scheduler(
            8 * 20,
            8,
            num_steps=100,
            initial_lr=0.2,
            strategy="uniform",
            noise_guard="off",
            ui="off",
            checkpoint_dir=folder,
            **options,
        )
    with run:
        for _ in run.epoch_iterator():
            for (_, lr), chosen in zip(run.batch_iterator(), stream, strict=False):
                error = errors(model, chosen.items)
                model["w"] = model["w"] - lr * 2 * (error[:, None] * inputs(chosen.items)).mean(0)
                run.update_with_loss(error**2)
                stream.update()
                if run.global_step == stop_at:
                    run.save_checkpoint()
                    return None
    assert run.global_step == 100
    return model["w"]


def inputs(items):
    return np.stack([np.ones(len(items)), np.sin(np.array(items))], axis=1)


def errors(model, items):
    return inputs(items) @ (model["w"] - np.array([1.0, -2.0]))


def test_in_a_schedulers_loop_stopped_and_resumed_to_the_bit(tmp_path):
    whole = train(tmp_path / "whole")
    assert np.abs(whole - [1.0, -2.0]).max() < 0.5
    assert train(tmp_path / "parts", stop_at=47) is None
    assert np.array_equal(train(tmp_path / "parts", resume=True), whole)
